"""The command line. Thin: every command is a few calls that a library user can make too."""

import json
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from counterproof.errors import MissingExtra, UserError

if TYPE_CHECKING:
    from counterproof.bench.comparison import Comparison
    from counterproof.bench.task import Claim
    from counterproof.page.catalogue import Paper

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


# The page, live: imported when it is asked for.
LIVE = {
    "feed": "counterproof.page.feed_commands:feed",
    "serve": "counterproof.web.commands:serve",
    "mcp": "counterproof.web.commands:mcp",
}


class Rooms(click.Group):
    """The page's own commands, and one group for each room that has something to do with your files.

    A room's ``commands.py`` is imported when it is asked for; it knows click and the room.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return [*super().list_commands(context), *LIVE, *rooms_with_commands()]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in LIVE:
            module, _, command = LIVE[name].partition(":")
            live: click.Command = getattr(import_module(module), command)
            return live
        if name in rooms_with_commands():
            found: click.Group = import_module(f"counterproof.{name}.commands").commands
            return found
        return super().get_command(context, name)


def rooms_with_commands() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/commands.py") if path.parent.name != "web")


@click.group(cls=Rooms, context_settings=CONTEXT)
@click.version_option(package_name="counterproof")
def cli() -> None:
    """Research papers that run: look one up, check its claims, compare its method on your own work.

    Exit codes: 0 done, whatever the verdicts; 1 a trial failed; 2 bad usage or bad input; 3 with --strict, a claim that
    does not hold.
    """


def main() -> None:
    """Entry point: errors a user can mend are one line on stderr."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        stop("interrupted", 130)
    except click.ClickException as problem:
        problem.show()
        sys.exit(2)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (UserError, MissingExtra) as problem:
        stop(str(problem), 2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)


def stop(message: str, code: int) -> NoReturn:
    click.echo(f"counterproof: {message}", err=True)
    sys.exit(code)


def write_json(value: Any) -> None:
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns, the last one cut to the terminal's width."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(line if len(line) <= room else line[: room - 1] + "…")


# the page


def check_room(name: str | None) -> None:
    from counterproof.page.catalogue import ROOMS, nearest

    if name is not None and name not in ROOMS:
        raise UserError(f"no room {name!r}{nearest(name, list(ROOMS)) or '; rooms: ' + ', '.join(ROOMS)}")


@cli.command()
@click.option("--room", help="Only one room.")
@as_json
def papers(room: str | None, as_json: bool) -> None:
    """List the papers on the page."""
    from counterproof.page.catalogue import papers

    check_room(room)
    chosen = [paper for paper in papers().values() if room in (None, paper.room)]
    if as_json:
        write_json([paper.as_json() for paper in chosen])
    else:
        show_table([(paper.slug, str(paper.year), paper.room, paper.status, paper.title) for paper in chosen])


@cli.command()
@click.argument("slug")
@click.option("--history", is_flag=True, help="The ideas it rests on, by credit, each with its strongest path.")
@as_json
def show(slug: str, history: bool, as_json: bool) -> None:
    """Show a paper: its card, and what was measured of it; or the ideas it rests on."""
    from counterproof.page.catalogue import find_paper
    from counterproof.page.store import arxiv_id

    try:
        paper = find_paper(slug)
    except UserError as problem:
        if arxiv_id(slug) is None:
            raise
        raise UserError(f"{problem}; of pulled papers: counterproof feed show {slug}") from None
    if history:
        from counterproof.page import History, roots_json, roots_text

        shipped = History.shipped()
        if as_json:
            write_json(roots_json(shipped, slug))
        else:
            click.echo(roots_text(shipped, slug))
        return
    measured: Sequence[Comparison] = ()
    if paper.status == "runs":
        from counterproof.page.results import measured_by_us
        from counterproof.page.text import full_text

        measured = measured_by_us(paper)
    if as_json:
        write_json({**paper.as_json(), "measured": [comparison.as_json() for comparison in measured]})
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=min(100, shutil.get_terminal_size((100, 24)).columns))
    console.print(paper.title, style="bold", highlight=False)
    where = f"arXiv {paper.arxiv}, " if paper.arxiv else ""
    console.print(f"{where}{paper.year}. Room: {paper.room}. {paper.status}.", f"Tags: {', '.join(paper.tags)}.\n")
    for heading, text in paper.sections.items():
        console.print(Markdown(f"## {heading}\n\n{text}"))
        if heading == "What was measured here":
            for comparison in measured:
                console.print()
                console.print(full_text(comparison), markup=False, highlight=False, soft_wrap=True)
        console.print()
    if paper.status == "runs":
        console.print(f"Check it here: counterproof check {paper.slug}", highlight=False)


@cli.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--room", help="Only one room.")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1), help="Most papers shown.")
@as_json
def search(words: tuple[str, ...], room: str | None, limit: int, as_json: bool) -> None:
    """Find papers by words; typos are forgiven."""
    from counterproof.page.catalogue import papers
    from counterproof.page.search import search

    check_room(room)
    hits = search(" ".join(words), [paper for paper in papers().values() if room in (None, paper.room)])[:limit]
    if as_json:
        write_json([{**hit.paper.as_json(), "score": hit.score, "matched": list(hit.words)} for hit in hits])
    elif hits:
        show_table([(hit.paper.slug, hit.paper.room, hit.paper.status, hit.paper.summary) for hit in hits])
    else:
        click.echo("nothing found; pulled papers are searched by: counterproof feed find", err=True)


# comparisons


def seed_range(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    low, colon, high = value.partition(":")
    try:
        return int(low), int(high if colon else low)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not MIN:MAX, such as 4:12") from None


def comparison_options(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--budget", default="quick", show_default=True, help="quick, standard or full."),
            click.option(
                "--seeds", callback=seed_range, metavar="MIN:MAX", help="Fewest and most seeds, over the claim's own."
            ),
            click.option("--jobs", type=click.IntRange(1), help="Trials at a time; default one per core."),
            click.option("--engine", default="local", show_default=True, help="Where trials run."),
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."),
            click.option("--fresh", is_flag=True, help="Run every trial again, even if the journal has it."),
            click.option("--strict", is_flag=True, help="Exit with 3 if a claim does not hold."),
            as_json,
        ]
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("slugs", nargs=-1, metavar="[SLUG[/CLAIM]]...")
@click.option("--room", help="All runnable papers of a room.")
@click.option("--all", "everything", is_flag=True, help="All runnable papers.")
@comparison_options
def check(slugs: tuple[str, ...], room: str | None, everything: bool, **options: Any) -> None:
    """Settle papers' claims: add seeds until the verdict stands or the budget ends.

    Finished trials are kept in the journal: the same command again answers from there, and goes on where it was
    stopped. With --json, one JSON object a line for each claim.
    """
    run_claims(chosen_claims(slugs, room, everything), **options)


def chosen_claims(slugs: Sequence[str], room: str | None, everything: bool) -> "list[Claim]":
    from counterproof.page.catalogue import find_paper, nearest, papers

    check_room(room)
    if sum([bool(slugs), room is not None, everything]) != 1:
        raise UserError("say what to check: papers by slug, --room ROOM, or --all")
    if not slugs:
        runnable = [paper for paper in papers().values() if paper.status == "runs" and room in (None, paper.room)]
        if not runnable:
            raise UserError(f"no paper of the room {room} runs yet; counterproof papers shows which do")
        return [claim for paper in runnable for claim in claims_of(paper)]
    claims: list[Claim] = []
    for slug in slugs:
        name, slash, which = slug.partition("/")
        paper = find_paper(name)
        if paper.status != "runs":
            raise UserError(f"{name} is planned: its card is here, its method is not yet; counterproof papers")
        own = claims_of(paper)
        if slash and which not in [claim.name for claim in own]:
            names = [claim.name for claim in own]
            raise UserError(f"{name} has no claim {which!r}{nearest(which, names) or '; it has: ' + ', '.join(names)}")
        claims += [claim for claim in own if which in ("", claim.name)]
    return list({(claim.paper, claim.name): claim for claim in claims}.values())


def claims_of(paper: "Paper") -> "Sequence[Claim]":
    from counterproof.errors import require

    if paper.package.startswith("counterproof."):
        require(paper.room)
    return paper.claims


@cli.command()
@click.argument("task")
@click.option("--arms", required=True, metavar="A,B[,C...]", help="Arms by name; the first is the baseline.")
@click.option("--data", type=click.Path(path_type=Path), help="Your own data, in a format the task reads.")
@click.option("--model", help="Your own model: a local folder or a hub id, where the task takes one.")
@click.option("--metric", help="What to compare; default the task's main metric.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the arms' table and plots to this HTML file.")
@comparison_options
def compare(
    task: str, arms: str, data: Path | None, model: str | None, metric: str | None, out: Path | None, **options: Any
) -> None:
    """Compare arms of a task on your own data or model, under the same rules as a paper's claim.

    A task that knows what to make of all arms together, such as preference, ends with a table of them and the one it
    recommends; with --json that is the last line.
    """
    from counterproof.errors import require
    from counterproof.page.catalogue import comparison_claims, find_task, summary_of

    found = find_task(task)
    if found.run.startswith("counterproof."):
        require(found.run.split(".")[1])
    claims = comparison_claims(found, arms.split(","), metric)
    summary = summary_of(found)
    if out is not None and summary is None:
        raise UserError(f"task {task} has no table or plots of all arms; leave out --out")
    run_claims(claims, data=data, model=model, summary=summary, out=out, **options)


def run_claims(
    claims: "Sequence[Claim]",
    *,
    budget: str,
    seeds: tuple[int, int] | None,
    jobs: int | None,
    engine: str,
    device: str,
    fresh: bool,
    strict: bool,
    as_json: bool,
    data: Path | None = None,
    model: str | None = None,
    summary: Any = None,
    out: Path | None = None,
) -> None:
    from counterproof.bench.comparison import compare, survivors
    from counterproof.bench.journal import Journal
    from counterproof.bench.owned import own_data, own_device, own_model
    from counterproof.page.text import full_text, verdict_line

    journal = Journal()
    task = claims[0].task
    own: tuple[str, str] | None = None
    if data is not None:
        given = own_data(task, data, journal)
        click.echo(f"{data}: {given.says}", err=True)
        own = (given.path, given.fingerprint)
    latest: dict[tuple[str, str], Comparison] = {}
    with progress(len(claims)) as watch, stop_signals():
        try:
            for comparison in compare(
                claims,
                journal,
                budget=budget,
                seeds=seeds,
                jobs=jobs,
                engine_name=engine,
                device=own_device(device),
                data=own,
                model=own_model(task, model, journal) if model is not None else None,
                fresh=fresh,
                watch=watch,
            ):
                name = (comparison.claim.paper, comparison.claim.name)
                if name in latest and not as_json:
                    watch.say(f"{name[0]}/{name[1]}: more evidence, to stand among {len(claims)} claims")
                latest[name] = comparison
                if not as_json:
                    watch.say(full_text(comparison) + "\n")
        except KeyboardInterrupt:
            stop("interrupted; finished trials are kept, and the same command goes on from there", 130)
    comparisons = survivors(list(latest.values()))
    if as_json:
        for comparison in comparisons:
            write_json(comparison.as_json())
    elif len(comparisons) > 1:
        click.echo(f"{len(comparisons)} claims, each verdict against e-BH at 5 % over all of them:")
        for comparison in comparisons:
            click.echo("  " + verdict_line(comparison))
    if summary is not None:
        show_summary(summary, comparisons, as_json, out)
    if any(comparison.failed for comparison in comparisons):
        sys.exit(1)
    if strict and any(
        comparison.assessment.verdict != "holds" or comparison.survives is False for comparison in comparisons
    ):
        sys.exit(3)


def show_summary(summary: Any, comparisons: "Sequence[Comparison]", as_json: bool, out: Path | None) -> None:
    """What the task makes of all arms together: `summary` takes their trials and has a text, JSON and HTML."""
    from counterproof.files import replacing

    trials: dict[str, dict[int, Any]] = {}
    for comparison in comparisons:
        for record in comparison.records:
            trials.setdefault(record.arm, {})[record.seed] = record.as_json()
    if not any(record["outcome"] == "ok" for own in trials.values() for record in own.values()):
        return
    found = summary({arm: [own[seed] for seed in sorted(own)] for arm, own in trials.items()})
    if as_json:
        write_json({"summary": found.as_json()})
    else:
        click.echo("\n" + found.text())
    if out is not None:
        with replacing(out) as stream:
            stream.write(found.html())
        click.echo(f"table and plots: {out}", err=True)


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does: the trials are ended and their leases given back."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress(claims: int) -> "Iterator[Any]":
    """A bar on a terminal, a line per seed elsewhere; both on stderr."""
    from counterproof.watch import Bars, Lines

    with Bars(claims) if sys.stderr.isatty() else Lines(claims) as watch:
        yield watch


# the journal


@cli.group()
def runs() -> None:
    """The journal: every trial that was run."""


@runs.command("list")
@click.option("--paper", help="Only one paper's.")
@click.option("--outcome", help="ok, raised, diverged, memory, time or killed.")
@as_json
def runs_list(paper: str | None, outcome: str | None, as_json: bool) -> None:
    """List trials, oldest first."""
    from counterproof.bench.journal import Journal
    from counterproof.page.text import duration

    records = list(Journal().trials(paper, outcome))
    if as_json:
        write_json([record.as_json() for record in records])
        return
    show_table(
        [
            (r.key[:10], r.finished[:19], f"{r.paper}/{r.claim}", r.arm, str(r.seed), r.budget, r.outcome,
             duration(r.cost["wall_seconds"]))
            for r in records
        ]
    )  # fmt: skip


@runs.command("show")
@click.argument("key")
@as_json
def runs_show(key: str, as_json: bool) -> None:
    """Show one trial: metrics or error, cost, host, versions. KEY may be shortened."""
    from counterproof.bench.journal import Journal

    record = Journal().by_prefix(key).as_json()
    if as_json:
        write_json(record)
        return
    for name, value in record.items():
        if name == "curve":
            value = f"{len(value)} points (see --json)"
        elif name == "parts":
            continue
        elif isinstance(value, dict):
            value = ", ".join(f"{inner} {content}" for inner, content in value.items())
        click.echo(f"{name:9} {value}")


@runs.command("explain")
@click.argument("key")
@as_json
def runs_explain(key: str, as_json: bool) -> None:
    """Say what a trial's key covers, and why it would or would not be used today. KEY may be shortened."""
    from counterproof.bench.journal import Journal
    from counterproof.bench.trials import stale_parts

    record = Journal().by_prefix(key)
    reasons = stale_parts(record.parts)
    if as_json:
        write_json({"key": record.key, "covers": record.parts, "current": not reasons, "stale": reasons})
        return
    click.echo(f"{record.key}  {record.paper}/{record.claim}, arm {record.arm}, seed {record.seed}: {record.outcome}")
    for name, value in record.parts.items():
        if name in ("code", "versions"):
            click.echo(f"  {name}")
            for inner, content in value.items():
                click.echo(f"    {inner} {content}")
        else:
            click.echo(f"  {name} {json.dumps(value)}")
    click.echo("current: the same trial is answered from here" if not reasons else "stale:")
    for reason in reasons:
        click.echo(f"  {reason}")


@runs.command("export")
@click.option("--paper", help="Only one paper's.")
@click.option("--current", is_flag=True, help="Only trials of today's code and versions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A file; default standard output.")
def runs_export(paper: str | None, current: bool, out: Path | None) -> None:
    """Write trials as JSON lines, one object per trial; of a paper also those it shares with another."""
    from counterproof.bench.comparison import belonging
    from counterproof.bench.journal import Journal
    from counterproof.files import replacing
    from counterproof.page.catalogue import papers

    journal = Journal()
    known = papers().get(paper or "")
    also = belonging(known.claims) if known is not None else None
    if out is None:
        journal.export(sys.stdout, paper, current, also)
        return
    with replacing(out) as stream:
        count = journal.export(stream, paper, current, also)
    click.echo(f"{count} trials in {out}", err=True)


@runs.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def runs_import(files: tuple[Path, ...]) -> None:
    """Take in trials exported on another machine; those that are here already change nothing."""
    from counterproof.bench.journal import Journal

    journal = Journal()
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                new, known = journal.merge(lines, str(file))
        except OSError as problem:
            raise UserError(f"cannot read {file}: {problem.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{file} is not text; expected JSON lines from 'counterproof runs export'") from None
        click.echo(f"{file}: {new} new, {known} known")


@runs.command("prune")
@click.option("--stale", is_flag=True, help="Trials of code or versions that are no longer today's.")
@click.option("--failed", is_flag=True, help="Trials that did not end well.")
@click.option("--paper", help="Only one paper's.")
@click.option("--dry-run", is_flag=True, help="Only say how many.")
def runs_prune(stale: bool, failed: bool, paper: str | None, dry_run: bool) -> None:
    """Forget trials that are stale or failed."""
    from counterproof.bench.journal import Journal
    from counterproof.bench.trials import stale_parts

    if not (stale or failed):
        raise UserError("say which trials to forget: --stale, --failed, or both")
    journal = Journal()
    chosen = [
        record.uid
        for record in journal.trials(paper)
        if (failed and record.outcome != "ok") or (stale and stale_parts(record.parts))
    ]
    if not dry_run:
        journal.remove(chosen)
    click.echo(f"{len(chosen)} trials {'would be ' if dry_run else ''}forgotten")


# the report, and new papers


@cli.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The HTML file to write.")
@click.option("--budget", default="quick", show_default=True, help="Which measurements to show.")
def report(out: Path, budget: str) -> None:
    """Write the page with everything measured as one self-contained file."""
    from counterproof.bench.journal import Journal
    from counterproof.bench.trials import now
    from counterproof.page.catalogue import papers
    from counterproof.page.report import render, write
    from counterproof.page.results import comparisons, measured_by_us

    journal = Journal()
    shown = list(papers().values())
    ours = {paper.slug: measured_by_us(paper, budget) for paper in shown}
    here = {paper.slug: comparisons(paper, journal.trials(paper.slug), budget) for paper in shown}
    write(render(shown, ours, here, made=now(), version=version("counterproof")), out)
    click.echo(f"the page is in {out.resolve()}")


@cli.command()
@click.argument("slug")
@click.option("--room", required=True, help="The room it belongs to.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="The package folder that takes it; default the room of this checkout.",
)
def new(slug: str, room: str, into: Path | None) -> None:
    """Start a paper of your own: card, method, claim and test that pass as they are."""
    from counterproof.page.new import new_paper

    check_room(room)
    for path in new_paper(slug, room, into):
        click.echo(path)
