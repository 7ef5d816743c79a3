"""counterproof page: the timeline of ideas behind the papers, and histories of your own."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from counterproof.errors import UserError

as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


def own(command: Any) -> Any:
    """The options by which a verb takes histories of the user's own."""
    path = click.Path(path_type=Path)
    say = "A history of your own, a folder of YAML files, in place of the page's; several are joined."
    command = click.option("--history", "folders", multiple=True, type=path, help=say)(command)
    say = "A folder of YAML files joined to the history: your events, or your shares beside the page's."
    return click.option("--add", "added", multiple=True, type=path, help=say)(command)


@click.group()
def commands() -> None:
    """The ideas behind the papers: a timeline with sources, and credit that flows back through it."""


def _load(folders: Sequence[Path], added: Sequence[Path]) -> Any:
    from counterproof.page import History

    return History.load(*folders, *added) if folders else History.shipped(*added)


def _write(text: str, out: Path | None) -> None:
    from counterproof.files import replacing

    if out is None:
        click.echo(text, nl=not text.endswith("\n"))
        return
    with replacing(out) as stream:
        stream.write(text if text.endswith("\n") else text + "\n")
    click.echo(f"written to {out}", err=True)


def _as_text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


@commands.command()
@own
@click.option("--kind", help="Only one kind, such as mathematics or architecture.")
@click.option("--person", help="Only events of whoever has this in the name.")
@click.option("--root-of", metavar="SLUG_OR_EVENT", help="Only an event or paper and all that it builds on.")
@click.option("--disputed", is_flag=True, help="Only events in dispute.")
@click.option("--since", type=float, help="Only events that end in this year or later.")
@click.option("--until", type=float, help="Only events that begin in this year or earlier.")
@click.option("--samples", default=200, show_default=True, type=click.IntRange(0), help="Sweeps behind an interval.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the page with everything to this HTML file.")
@as_json
def timeline(
    folders: tuple[Path, ...],
    added: tuple[Path, ...],
    kind: str | None,
    person: str | None,
    root_of: str | None,
    disputed: bool,
    since: float | None,
    until: float | None,
    samples: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """List the events, the earliest first, or write them as a page with --out.

    A star marks an event in dispute. The page needs no network and no script; it shows the whole history, so it takes
    --root-of (whose roots it is about, in place of all papers) but none of the other filters.
    """
    from counterproof.page.history_data import KINDS
    from counterproof.page.history_formats import to_json
    from counterproof.page.history_views import choose_events, timeline_text

    if kind is not None and kind not in KINDS:
        raise UserError(f"no kind {kind!r}; kinds: {', '.join(KINDS)}")
    history = _load(folders, added)
    if out is not None:
        if kind or person or disputed or since is not None or until is not None:
            raise UserError("a page shows all events and has its own filters; with --out only --root-of is taken")
        if out.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{out}: the page is HTML; name a file that ends in .html")
        history.to_html(out, [root_of] if root_of else None, samples=samples)
        click.echo(f"the timeline is in {out.resolve()}", err=True)
        return
    years = {"since": since, "until": until}
    events = choose_events(
        history,
        kind=kind,
        person=person,
        root_of=root_of,
        disputed=disputed,
        **{name: year for name, year in years.items() if year is not None},
    )
    if as_json:
        names = {event.id for event in events}
        edges = [edge for edge in history.edges if {edge.later, edge.earlier} <= names]
        keys = {source.key for event in events for source in event.sources}
        keys |= {s.key for event in events for d in event.disputes for side in d.sides for s in side.sources}
        works = {key: work for key, work in history.works.items() if key in keys}
        click.echo(_as_text(to_json({event.id: event for event in events}, edges, works, ())))
    elif events:
        click.echo(timeline_text(events))
    else:
        click.echo("nothing found", err=True)


@commands.command()
@click.argument("name", metavar="SLUG_OR_EVENT")
@own
@click.option("--top", default=10, show_default=True, type=click.IntRange(1), help="Most roots shown.")
@click.option("--samples", default=200, show_default=True, type=click.IntRange(0), help="Sweeps behind an interval.")
@as_json
def roots(name: str, folders: tuple[Path, ...], added: tuple[Path, ...], top: int, samples: int, as_json: bool) -> None:
    """Show what a paper or an event builds on: credit with its interval, and the strongest path as a sentence."""
    from counterproof.page.history_views import roots_json, roots_text

    history = _load(folders, added)
    if as_json:
        click.echo(_as_text(roots_json(history, name, top=top, samples=samples)))
    else:
        click.echo(roots_text(history, name, top=top, samples=samples))


@commands.command()
@click.argument("name", metavar="EVENT")
@own
@as_json
def descendants(name: str, folders: tuple[Path, ...], added: tuple[Path, ...], as_json: bool) -> None:
    """Show what was built on an event, directly or by way of others, and which share of it rests there."""
    history = _load(folders, added)
    found = history.descendants(name)
    if as_json:
        rows = [
            {"id": one, "title": history.events[one].title, "year": history.events[one].when.text, "rests": share}
            for one, share in found
        ]
        click.echo(_as_text({"id": name, "title": history.events[name].title, "descendants": rows}))
    elif found:
        wide = max(len(one) for one, _ in found)
        for one, share in found:
            event = history.events[one]
            click.echo(f"{event.when!s:>10}  {share:6.1%}  {one:{wide}}  {event.title}")
    else:
        click.echo(f"nothing is noted that builds on {name}", err=True)


@commands.command()
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--add",
    "added",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder of YAML files joined to the history that is checked.",
)
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text file of a source; no event may share a run of words with it.",
)
@click.option("--run", default=8, show_default=True, type=click.IntRange(2), help="Words in a row that are too many.")
@as_json
def lint(
    folders: tuple[Path, ...], added: tuple[Path, ...], against: tuple[Path, ...], run: int, as_json: bool
) -> None:
    """Check a history: time, cycles, sources, priority, shares, orphans, dead keys, copied sentences.

    FOLDER is a history of your own; default the page's. Exit code 1 when something is found.
    """
    texts = {}
    for path in against:
        try:
            texts[str(path)] = path.read_text(encoding="utf-8")
        except OSError as problem:
            raise UserError(f"cannot read {path}: {problem.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
    history = _load(folders, added)
    found = history.lint(texts, run=run)
    if as_json:
        rows = [
            {"file": one.place.file, "line": one.place.line, "rule": one.rule, "message": one.message} for one in found
        ]
        click.echo(_as_text(rows))
    else:
        for one in found:
            click.echo(str(one))
        count = f"{len(history.events)} events, {len(history.edges)} edges, {len(history.works)} works"
        click.echo(f"{count}: {len(found) or 'no'} finding{'' if len(found) == 1 else 's'}", err=True)
    if found:
        sys.exit(1)


@commands.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--kind", default="theory", show_default=True, help="Kind of all the events, to be mended by hand.")
@click.option("--out", type=click.Path(path_type=Path), help="The YAML file to write; default standard output.")
def import_(file: Path, kind: str, out: Path | None) -> None:
    """Make events of a bibliography: FILE.bib (BibTeX), or FILE.json (CSL-JSON, as Zotero exports it).

    Texts and edges are left to you; put the file into a folder, and counterproof page lint FOLDER says what is missing.
    """
    from counterproof.page.history_formats import import_bibliography, to_yaml

    records = import_bibliography(file, kind)
    _write(to_yaml(records), out)
    click.echo(f"{file}: {len(records.events)} events", err=True)


@commands.command()
@click.option(
    "--format",
    "form",
    default="json",
    show_default=True,
    type=click.Choice(["graphml", "json", "bibtex", "csv"]),
    help="graphml for Gephi, yEd or networkx; csv has a row per event.",
)
@own
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; default standard output.")
def export(form: str, folders: tuple[Path, ...], added: tuple[Path, ...], out: Path | None) -> None:
    """Write the history for other programs."""
    from counterproof.page.history_formats import to_bibtex, to_csv, to_graphml, to_json

    history = _load(folders, added)
    if form == "bibtex":
        text = to_bibtex(history.works.values())
    elif form == "json":
        text = _as_text(to_json(history.events, history.edges, history.works, history.milestones))
    else:
        text = (to_graphml if form == "graphml" else to_csv)(history.events, history.joined())
    _write(text, out)
