"""counterproof feed trending, view, find, similar, show, embed, export: papers in the terminal and as files."""

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar

import click

from counterproof.errors import UserError

__all__ = ["COMMANDS"]

F = TypeVar("F", bound=Callable[..., Any])
FORMAT_NAMES = ("atom", "jsonfeed", "bibtex", "ris", "jsonl")
as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
to_file = click.option("--out", type=click.Path(path_type=Path), help="A file; default standard output.")
in_format = click.option("--format", "form", type=click.Choice(FORMAT_NAMES), help="Write the list in this format.")


def list_options(command: F) -> F:
    """What every list takes."""
    options = [
        click.option("--since", metavar="DAY", help="Only papers listed on this day or later (2026-11-23)."),
        click.option("--until", metavar="DAY", help="Only papers listed on this day or before."),
        click.option("--source", help="Only papers that this source listed."),
        click.option("--room", help="Only cards of this room."),
        click.option("--runnable", is_flag=True, help="Only cards whose method is here."),
        click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 500), help="Papers on a page."),
        click.option("--cursor", help="Go on where the page before ended; it says how."),
        click.option("--save", "name", help="Keep this list as a view of that name."),
        in_format,
        to_file,
        as_json,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.option("--half-life", type=float, help="Days in which a vote loses half of its worth; default 3.")
@list_options
def trending(**options: Any) -> None:
    """What people vote for now; the formula is printed beside the list, its parts beside each paper."""
    show("trending", **options)


@click.command()
@click.argument("kind", metavar="[latest|day|week|month|room|NAME]", required=False)
@click.argument("at", required=False, default="")
@click.option("--half-life", type=float, help="Days in which a vote loses half of its worth; default never.")
@click.option("--forget", is_flag=True, help="Forget the saved view.")
@list_options
def view(kind: str | None, at: str, forget: bool, **options: Any) -> None:
    """A day (2026-11-23), an ISO week (2026-W48), a month (2026-11), the latest, a room, or a saved view.

    Without AT, the present day, week or month. Without anything, the names of the saved views.
    """
    from counterproof.page.store import Store
    from counterproof.page.views import forget_view, saved_view, saved_views

    if kind in ("latest", "day", "week", "month", "room"):
        if forget:
            raise UserError(f"{kind} is always there; name a saved view to forget")
        show(kind, at=at, **options)
        return
    if kind is None:
        known = saved_views(Store(read_only=True))
        if options["as_json"]:
            click.echo(json.dumps({name: json.loads(query.to_json()) for name, query in known.items()}))
            return
        for name, query in known.items():
            click.echo(f"{name}  {query.to_json()}")
        return
    if forget:
        forget_view(Store(), kind)
        click.echo(f"forgot {kind}", err=True)
        return
    if at:
        raise UserError(f"{kind} is none of latest, day, week, month, room; of a saved view give the name only")
    own = json.loads(saved_view(Store(read_only=True), kind).to_json())
    given = {name: value for name, value in options.items() if value not in (None, False)}
    show(own.pop("view", "latest"), **{**options, **own, **given})


@click.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--how", default="both", show_default=True, type=click.Choice(["both", "words", "meaning"]),
              help="By words (bm25), by meaning (MiniLM), or both.")  # fmt: skip
@list_options
def find(words: tuple[str, ...], **options: Any) -> None:
    """Search everything: cards and pulled papers. Put phrases in double quotes; typos are forgiven."""
    show("search", words=" ".join(words), **options)


@click.command()
@click.argument("paper")
@list_options
def similar(paper: str, **options: Any) -> None:
    """Papers like one, and the methods that run here nearest to it. PAPER is any of its names."""
    show("similar", at=paper, **options)


@click.command("show")
@click.argument("paper")
@as_json
def show_paper(paper: str, as_json: bool) -> None:
    """Show a paper that was pulled: what its sources say of it, and the methods that run here nearest to it.

    PAPER is any of its names: an arXiv id, a DOI, a key as the lists have it.
    """
    from counterproof.page.finding import Finder
    from counterproof.page.store import Store
    from counterproof.page.vectors import Encoder

    store = Store(read_only=True)
    found = store.find(paper)
    if found is None:
        raise UserError(f"no paper {paper[:100]!r} here; counterproof feed find WORDS looks for one")
    relatives = Finder(store, shape=Encoder()).relatives(found)
    votes = store.votes(found.id)
    sources = list(dict.fromkeys((source, fetched) for source, fetched, _, _ in store.records(found.id)))
    if as_json:
        near = [{"slug": r.card.slug, "similarity": r.similarity, "shared": list(r.shared)} for r in relatives]
        said = {
            **found.as_json(),
            "aliases": store.aliases(found.id),
            "votes": votes,
            "sources": [{"source": source, "fetched": fetched} for source, fetched in sources],
            "relatives": near,
        }
        click.echo(json.dumps(said, ensure_ascii=False))
        return
    entry = found.entry
    subjects = f"{', '.join(entry.categories)}. " if entry.categories else ""
    lines = [
        entry.title,
        ", ".join(entry.authors),
        f"{found.key}, {found.day}. {subjects}{entry.venue}".rstrip(),
        *(f"{name}: {address}" for name, address in entry.links.items()),
        "",
        *([*wrap(entry.abstract, 100), ""] if entry.abstract else ["no abstract", ""]),
        f"{votes} vote{'s' * (votes != 1)}" + "".join(f", {value:g} {name}" for name, value in entry.signals.items()),
        f"from {', '.join(f'{source} ({fetched[:10]})' for source, fetched in sources)}",
        *(f"runs here: {relative.card.slug} ({relative.reason})" for relative in relatives),
        *([f"its card: counterproof show {entry.slug}"] if entry.slug else []),
    ]
    click.echo("\n".join(line for number, line in enumerate(lines) if line or number > 1))


def show(
    kind: str,
    *,
    limit: int,
    cursor: str | None,
    name: str | None,
    form: str | None,
    out: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Make a list and say it, in the way that was asked for."""
    from counterproof.page.finding import Finder
    from counterproof.page.formats import FORMATS, Place
    from counterproof.page.store import Store
    from counterproof.page.vectors import Encoder
    from counterproof.page.views import Query, Views, save_view

    query = Query(view=kind, **{field: value for field, value in asked.items() if value is not None})  # type: ignore[arg-type]
    if name is not None:
        save_view(Store(), name, query)
        click.echo(f"saved as {name}; see it again: counterproof feed view {name}", err=True)
    store = Store(read_only=True)
    encoder = Encoder()
    try:
        finder = Finder(store, encoder=encoder if query.how != "words" else None, shape=encoder)
        page = Views(store, finder).page(query, limit=limit, cursor=cursor)
        # A list's own file, or what is told of one paper beside the papers like it.
        center = store.find(query.at) if kind == "similar" else None
        relatives = finder.relatives(center) if center is not None else []
    finally:
        encoder.close()
    for note in page.notes:
        click.echo(note, err=True)
    if form is not None:
        write(FORMATS[form].write([item.paper for item in page.items], Place(page.title)), out)
    elif as_json:
        near = [{"slug": r.card.slug, "similarity": r.similarity, "shared": list(r.shared)} for r in relatives]
        write(json.dumps(page.as_json() | ({"relatives": near} if near else {}), ensure_ascii=False) + "\n", out)
    else:
        lines = [page.title, page.formula, ""]
        for item in page.items:
            place = f"{item.place:3} " if item.place is not None else ""
            lines.append(f"{place}{item.paper.day}  {item.paper.entry.title}  [{item.paper.key}]")
            lines += [f"      {item.says}"] if item.says else []
        if not page.items:
            lines.append("no papers")
        for relative in relatives:
            lines.append(f"runs here: {relative.card.slug} ({relative.reason})")
        if page.cursor is not None:
            lines.append(f"\nmore: the same with --cursor {page.cursor}")
        write("\n".join(lines) + "\n", out)


def write(text: str, out: Path | None) -> None:
    from counterproof.files import replacing

    if out is None:
        click.echo(text, nl=False)
        return
    with replacing(out) as stream:
        stream.write(text)
    click.echo(out, err=True)


@click.command()
@click.option("--limit", type=click.IntRange(1), help="Most papers to embed now, the latest first; default all.")
@as_json
def embed(limit: int | None, as_json: bool) -> None:
    """Make the vectors of papers that have none or whose text changed; search by meaning and similar papers need them.

    About 10 papers a second on two cores. Stopped, it goes on with the next call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from counterproof.page.store import Store
    from counterproof.page.vectors import Encoder, Vectors, refresh

    encoder = Encoder()
    store = Store()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("embedding", total=None)
            done = refresh(
                store, encoder, limit=limit, progress=lambda made, of: bar.update(task, completed=made, total=of)
            )
    finally:
        encoder.close()
    if as_json:
        total = len(Vectors(store, encoder))
        click.echo(json.dumps({"made": done.made, "left": done.left, "vectors": total, "model": encoder.model}))
    else:
        click.echo(f"{done.made} vectors made, {done.left} left to make")


@click.command()
@click.option("--format", "form", default="jsonl", show_default=True, type=click.Choice(FORMAT_NAMES),
              help="jsonl: every record, for feed import; the others: every paper.")  # fmt: skip
@to_file
@as_json
def export(form: str, out: Path | None, as_json: bool) -> None:
    """Write out everything: records as JSON lines that feed import reads, or all papers in another format.

    A part of it: the lists (trending, view, find, similar) take --format too.
    """
    from contextlib import nullcontext
    from sys import stdout

    from counterproof.files import replacing
    from counterproof.page.formats import FORMATS, Place, dump
    from counterproof.page.store import Store
    from counterproof.page.views import Query, Views

    store = Store(read_only=True)
    if as_json and out is None:
        raise UserError("--json tells what was written; name the file with --out")
    number = 0
    with nullcontext(stdout) if out is None else replacing(out) as stream:
        if form == "jsonl":
            for line in dump(store):
                stream.write(line)
                number += 1
        else:
            papers = [item.paper for item in Views(store).papers(Query())]
            stream.write(FORMATS[form].write(papers, Place("All papers")))
            number = len(papers)
    what = "records" if form == "jsonl" else "papers"
    if as_json:
        click.echo(json.dumps({what: number, "file": str(out)}))
    else:
        click.echo(f"{number} {what}", err=True)


COMMANDS: tuple[click.Command, ...] = (trending, view, find, similar, show_paper, embed, export)
