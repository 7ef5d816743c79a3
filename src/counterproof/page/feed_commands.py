"""counterproof feed: sources of new papers, files of them, and what became of both."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from counterproof.page.digest_commands import DIGEST_COMMANDS
from counterproof.page.view_commands import COMMANDS as VIEW_COMMANDS

if TYPE_CHECKING:
    from counterproof.page.feed import Pulled
    from counterproof.page.store import Store

as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def feed() -> None:
    """New papers: where they come from, what is new, what people think of them.

    The page is one file, page.sqlite in COUNTERPROOF_HOME. No source is asked unless you add it and pull.
    """


for _command in (*VIEW_COMMANDS, *DIGEST_COMMANDS):
    feed.add_command(_command)


def _write(value: Any) -> None:
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def _printable(text: str) -> str:
    """What a stranger wrote, for a terminal: no control codes."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _say(text: str) -> None:
    click.echo(_printable(text), err=True)


def _open(*, cards: bool = False) -> "Store":
    """The page, with our own papers on it where more are added."""
    from counterproof.page.feed import add_cards
    from counterproof.page.store import Store

    store = Store()
    if cards:
        add_cards(store)
    return store


def _show(pulled: "Pulled") -> None:
    """The count on stdout; every line that was left out has been named on stderr."""
    lost = sum("reason" in item for item in pulled.skipped_json())
    rate = f", {pulled.records / pulled.seconds:,.0f} records a second" if pulled.records >= 1000 else ""
    click.echo(
        f"{_printable(pulled.source)}: {pulled.outcome}; {pulled.new:,} new, {pulled.changed:,} changed, "
        f"{pulled.same:,} known, {lost:,} left out{rate}"
    )


@feed.command()
@click.argument("name")
@click.argument("address", required=False)
@click.option("--kind", default="web", show_default=True,
              type=click.Choice(["arxiv", "oai-pmh", "daily-papers", "semantic-scholar", "web"]),
              help="What it is; web: an address that holds a list in any form that is read.")  # fmt: skip
@click.option("--query", help="For arxiv, such as cat:cs.CV, and for semantic-scholar.")
@click.option("--set", "set_", help="For oai-pmh: one set, such as cs:cs:CV.")
@click.option("--prefix", help="For oai-pmh: metadata format, arXiv or oai_dc.")
@click.option("--since", metavar="DAY", help="For oai-pmh and daily-papers: the first day, YYYY-MM-DD.")
@click.option("--most", type=click.IntRange(1), help="Most papers of one pull.")
@click.option("--format", "form", help="For web: the form, where the content does not tell.")
@click.option("--allow-private", is_flag=True, help="Also addresses of this machine and its network.")
@as_json
def add(
    name: str,
    address: str | None,
    kind: str,
    query: str | None,
    set_: str | None,
    prefix: str | None,
    since: str | None,
    most: int | None,
    form: str | None,
    allow_private: bool,
    as_json: bool,
) -> None:
    """Add a source under a name of yours; nothing is asked of it until you pull.

    \b
      counterproof feed add vision --kind arxiv --query cat:cs.CV
      counterproof feed add daily --kind daily-papers
      counterproof feed add cv-rss https://rss.arxiv.org/rss/cs.CV
    """
    from counterproof.page.feed import add_source

    options = {"query": query, "set": set_, "prefix": prefix, "since": since, "most": most, "format": form}
    source = add_source(_open(), name, kind, address, allow_private=allow_private, **options)
    if as_json:
        _write(source.as_json())
    else:
        click.echo(f"{source.name}: {source.kind}, {source.url}. Get it: counterproof feed pull {source.name}")


@feed.command("list")
@as_json
def list_(as_json: bool) -> None:
    """List the sources, with what their last pull did."""
    from counterproof.page.feed import list_sources

    store = _open()
    rows = []
    for source in list_sources(store):
        last = store.db.execute(
            "SELECT started, finished, outcome, new, changed, same, skipped FROM pulls WHERE source = ? "
            "ORDER BY id DESC LIMIT 1",
            (source.name,),
        ).fetchone()
        said = None if last is None else {**dict(last), "skipped": json.loads(last["skipped"])}
        rows.append({**source.as_json(), "last": said})
    if as_json:
        _write(rows)
    for row in rows if not as_json else ():
        last = row["last"]
        when = "never pulled" if last is None else f"{last['started']} {last['outcome']}, {last['new']:,} new"
        click.echo(f"{row['name']}  {row['kind']}  {row['url']}  {when}")
    if not rows and not as_json:
        click.echo("no sources yet; see: counterproof feed add --help", err=True)


@feed.command()
@click.argument("name")
@as_json
def remove(name: str, as_json: bool) -> None:
    """Remove a source; its papers stay."""
    from counterproof.page.feed import remove_source

    remove_source(_open(), name)
    _write({"removed": name}) if as_json else click.echo(f"{name} is removed; its papers stay")


@feed.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every source.")
@click.option("--allow-private", is_flag=True, help="Also addresses of this machine and its network.")
@click.option("--timeout", default=60.0, show_default=True, type=click.FloatRange(1, 3600),
              help="Seconds for one request.")  # fmt: skip
@as_json
def pull(names: tuple[str, ...], everything: bool, allow_private: bool, timeout: float, as_json: bool) -> None:
    """Ask sources for what is new, and take it in.

    A pull that was interrupted goes on where it was. With several sources, one that fails does not keep the others
    from their turn; the exit code is then 1.
    """
    from counterproof.errors import UserError
    from counterproof.page.feed import find_source, list_sources
    from counterproof.page.feed import pull as pull_source
    from counterproof.page.fetching import Fetcher

    if bool(names) == everything:
        raise click.UsageError("name the sources, or say --all")
    store = _open(cards=True)
    chosen = [find_source(store, name).name for name in dict.fromkeys(names)]
    if everything:
        chosen = [source.name for source in list_sources(store)]
    fetcher = Fetcher(allow_private=allow_private, timeout=timeout)
    done: list[dict[str, Any]] = []
    failed = False
    for name in chosen:
        try:
            pulled = pull_source(store, name, fetcher, say=_say)
        except UserError as problem:
            if len(chosen) == 1:
                raise
            failed = True
            _say(f"{name}: {problem}")
            done.append({"source": name, "outcome": "failed", "problem": str(problem)})
            continue
        done.append(pulled.as_json())
        if not as_json:
            _show(pulled)
    if as_json:
        _write(done)
    if failed:
        sys.exit(1)


@feed.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "form",
              help="Over what the content tells: arxiv-atom, arxiv-rss, oai-pmh, feed, daily-papers, "
                   "semantic-scholar, json-lines, bibtex, ris or text.")  # fmt: skip
@click.option("--source", help="What to call where they come from; default what they say, else their form.")
@click.option("--day", metavar="DAY", help="The day they were listed on, YYYY-MM-DD; default what they say.")
@as_json
def import_(files: tuple[Path, ...], form: str | None, source: str | None, day: str | None, as_json: bool) -> None:
    """Take in files: feeds, OAI-PMH, JSON, JSON lines, BibTeX, RIS, or a page saved as plain text.

    The same file again changes nothing. Every line or record that is left out is named.
    """
    from counterproof.page.feed import check_file, import_file

    for path in files:  # before the first is taken in
        check_file(path, form)
    store = _open(cards=True)
    done = []
    for path in files:
        pulled = import_file(store, path, form=form, source=source, day=day, say=_say)
        done.append(pulled.as_json())
        if not as_json:
            _show(pulled)
    if as_json:
        _write(done)


@feed.command()
@as_json
def merges(as_json: bool) -> None:
    """List papers that were found to be one, the latest first."""
    from counterproof.page.feed import list_merges

    rows = list_merges(_open())
    if as_json:
        _write(rows)
    for row in rows if not as_json else ():
        undone = f", undone {row['undone']}" if row["undone"] else ""
        _say_out(f"{row['id']}  {row['merged']} is {row['kept']}  ({row['why']}; {row['at']}{undone})")
    if not rows and not as_json:
        click.echo("no papers were merged", err=True)


def _say_out(text: str) -> None:
    click.echo(_printable(text))


@feed.command()
@click.argument("number", type=int)
@as_json
def unmerge(number: int, as_json: bool) -> None:
    """Undo a merge; its number is in: counterproof feed merges."""
    _open().unmerge(number)
    _write({"undone": number}) if as_json else click.echo(f"merge {number} is undone")


@feed.command()
@as_json
def rebuild(as_json: bool) -> None:
    """Read every kept record again, and build papers and search index from them anew."""
    from counterproof.page.feed import rebuild as build

    changed = build(_open(cards=True))
    _write({"changed": changed}) if as_json else click.echo(f"built anew; {changed:,} papers changed")
