"""counterproof judging: rank battles, build a benchmark, judge pairs, test a judge, grade essays."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from counterproof.errors import UserError

as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def commands() -> None:
    """Who is better: rank battles, build a benchmark, judge pairs, test a judge, grade essays."""


# arena-hard


def column(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """``ours=theirs`` pairs."""
    pairs = [text.partition("=") for text in given]
    for name, equals, theirs in pairs:
        if not (equals and theirs) or name not in ("model_a", "model_b", "winner", "prompt_id", "weight"):
            raise click.BadParameter(
                f"{name}{equals}{theirs}; give model_a, model_b, winner, prompt_id or weight = a column"
            )
    return {name: theirs for name, _, theirs in pairs}


@commands.command()
@click.argument("battles", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), help="A human ranking's battles, to compare with.")
@click.option("--bootstrap", "rounds", default=1000, show_default=True, type=click.IntRange(0),
              help="Rounds; 0: intervals from the sandwich covariance.")  # fmt: skip
@click.option("--unit", type=click.Choice(["prompt", "battle"]), help="What is resampled; default prompts if named.")
@click.option("--ties", default="half", show_default=True, type=click.Choice(["half", "drop"]), help="What a tie is.")
@click.option("--style", is_flag=True, help="Control for the style_... columns.")
@click.option("--l2", default=0.0, type=click.FloatRange(0), help="A prior on ratings; default where needed only.")
@click.option("--level", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Of the intervals.")  # fmt: skip
@click.option("--scale", default="elo", show_default=True, type=click.Choice(["elo", "winrate", "logit"]),
              help="Of the ratings.")  # fmt: skip
@click.option("--anchor", help="The model with 1000 Elo, 50 % or 0; for winrate the one played against.")
@click.option("--column", "columns", multiple=True, callback=column, metavar="OURS=THEIRS",
              help="A column's name in the file, such as model_a=model_x; repeatable.")  # fmt: skip
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Write the leaderboard.")
@click.option("--probabilities", type=click.Path(path_type=Path), help="Write the pairs' win probabilities (CSV).")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the leaderboard (.png, .svg or .pdf).")
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")
@as_json
def rank(
    battles: Path,
    reference: Path | None,
    columns: dict[str, str],
    style: bool,
    table: Path | None,
    probabilities: Path | None,
    plot: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Rank models by their battles (JSONL, CSV or Parquet): Bradley-Terry ratings with intervals.

    A battle has model_a, model_b and winner (model_a, model_b, tie or "tie (bothbad)"); it may have prompt_id, weight
    and style_... columns. arena-hard-auto's judgments are read as they are.
    """
    from rich.console import Console
    from rich.table import Table

    from counterproof.judging.battles import read_battles
    from counterproof.judging.leaderboard import rank_models

    say = Console(stderr=True)
    by_prompt = how["unit"] != "battle"
    with say.status("reading battles") as status:

        def told(number: int) -> None:
            status.update(f"{number:,} battles read")

        read = read_battles(battles, columns=columns, by_prompt=by_prompt, style=style, watch=told)
        people = None if reference is None else read_battles(reference, watch=told)
        status.update(f"rating {len(read.models)} models by {len(read):,} battles")
        board = rank_models(read, reference=people, style=style, **how)
    if table is not None:
        board.write_csv(table)
    if probabilities is not None:
        board.write_probabilities(probabilities)
    if plot is not None:
        board.plot(plot)
    if as_json:
        found = {"battles": len(read), "scale": board.scale, "level": board.level, "unit": board.unit}
        models = [{name: None if value != value else value for name, value in row.items()} for row in board.rows]
        click.echo(json.dumps({**found, "models": models, "statistics": dict(board.statistics),
                               "style": dict(board.style), "notes": list(board.notes)}))  # fmt: skip
        return
    shown = Table(box=None, pad_edge=False)
    for name in ("", "model", board.scale, f"{board.level:.0%} interval", "battles", ""):
        shown.add_column(name, justify="left" if name == "model" else "right")
    before = 0
    digits = 2 if board.scale == "logit" else 1
    for row in board.rows:
        if row["component"] != before:
            shown.add_section()
            before = row["component"]
        interval = f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"
        shown.add_row(str(row["rank"]), row["model"], f"{row['rating']:.{digits}f}", interval, f"{row['battles']:,}",
                      row["flag"])  # fmt: skip
    Console().print(shown)
    for name, value in board.statistics.items():
        click.echo(
            f"{name.replace('_', ' '):24} {value:.3f}" if name != "models" else f"{'models compared':24} {value:.0f}"
        )
    for name, value in board.style.items():
        click.echo(f"{name:24} {value:+.3f} log-odds per standard deviation")
    for note in board.notes:
        click.echo(f"note: {note}", err=True)


@commands.command("build-benchmark")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The benchmark, a .jsonl file.")
@click.option("--judge", default="smollm2", show_default=True,
              help="Annotates: an endpoint's address, a model folder, a GGUF file, or a hub id.")  # fmt: skip
@click.option("--judge-model", help="Which of an endpoint's models.")
@click.option("--price", nargs=2, type=float, help="US dollars per million tokens read and written.")
@click.option(
    "--template", type=click.Path(path_type=Path), help="Your own wording; see prompts/arena-hard-criteria.txt."
)
@click.option("--encoder", help="A sentence encoder's folder or hub id; default all-MiniLM-L6-v2.")
@click.option(
    "--reduce", default="pca", show_default=True, type=click.Choice(["pca", "umap"]), help="Before clustering."
)
@click.option("--prompt-threshold", default=6.0, show_default=True, help="Fewest criteria of a prompt.")
@click.option("--cluster-threshold", default=5.0, show_default=True, help="Lowest mean of a topic.")
@click.option("--clusters", default=250, show_default=True, type=click.IntRange(1), help="Topics drawn.")
@click.option("--per-cluster", default=2, show_default=True, type=click.IntRange(1), help="Prompts of each.")
@click.option("--smallest", default=8, show_default=True, type=click.IntRange(2), help="Prompts of the smallest topic.")
@click.option("--jobs", default=8, show_default=True, type=click.IntRange(1), help="Requests under way at a time.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@as_json
def build_benchmark(
    prompts: Path,
    out: Path,
    judge: str,
    judge_model: str | None,
    price: tuple[float, float] | None,
    template: Path | None,
    encoder: str | None,
    jobs: int,
    seed: int,
    as_json: bool,
    **how: Any,
) -> None:
    """Mine a benchmark out of crowd prompts (JSONL): topics, seven criteria by a judge, an even selection.

    Every reply of the judge is kept beside OUT (folder OUT.answers), so that the same command goes on where it was
    stopped. OUT has a prompt a line with its topic, criteria, scores, and where it came from; OUT.all.jsonl has all
    that were annotated.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from counterproof.judging import (
        Selection,
        annotate_prompts,
        name_topics,
        read_prompts,
        select_prompts,
        write_benchmark,
    )
    from counterproof.language.conversation import chat
    from counterproof.language.embedding import embed

    candidates, unfit = read_prompts(prompts)
    asked = chat(judge, model=judge_model, cache=Path(f"{out}.answers"), price=price)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def bar(says: str) -> Callable[[int, int], None]:
            task = bars.add_task(says, total=len(candidates))
            return lambda done, total: bars.update(task, completed=done, total=total)

        reading, asking = bar("embedding"), bar("annotating")
        found = select_prompts(
            candidates,
            embed=lambda texts: embed(texts, model=encoder, progress=reading),
            annotate=lambda texts: annotate_prompts(asked, texts, template=template, jobs=jobs, progress=asking),
            seed=seed,
            **how,
        )
        topics = name_topics(asked, found.chosen, jobs=jobs, seed=seed) if found.chosen else {}
    named = tuple(replace(one, topic=topics[one.cluster]) for one in found.chosen)
    write_benchmark(Selection(named, found.candidates, found.dropped), out, judge=judge_model or judge)
    write_benchmark(Selection(found.candidates, (), {}), f"{out}.all.jsonl", judge=judge_model or judge)
    outcomes = {name: sum(one.outcome == name for one in found.candidates) for name in ("read", "unparsed", "failed")}
    usage = asked.usage
    if as_json:
        click.echo(json.dumps({"out": str(out), "prompts": len(named), "topics": len(topics), "unfit": unfit,
                               "dropped": dict(found.dropped), "annotations": outcomes, "calls": usage.calls,
                               "cached": usage.cached, "cost": usage.cost}))  # fmt: skip
        return
    click.echo(f"{len(named)} prompts of {len(topics)} topics written to {out}")
    for why, count in {**unfit, **found.dropped}.items():
        if count:
            click.echo(f"  {count:,} left out: {why}")
    spent = f", ${usage.cost:.2f}" if usage.cost is not None else ""
    click.echo(f"  annotations: {outcomes['read']} read, {outcomes['unparsed']} unparsed, {outcomes['failed']} failed; "
               f"{usage.calls} calls, {usage.cached} replies from disk{spent}")  # fmt: skip
    if outcomes["failed"]:
        click.echo("note: run the same command again to ask for those that failed", err=True)


# compass-judger


def judge_options(command: Any) -> Any:
    """What every judge that is asked about pairs is told."""
    options = (
        click.option("--price", nargs=2, type=click.FloatRange(0), metavar="READ WRITTEN",
                     help="US dollars per million tokens, to count the costs."),
        click.option("--max-tokens", default=4096, show_default=True, type=click.IntRange(1),
                     help="The longest reply."),
        click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(0, min_open=True),
                     help="Seconds without a sign of the endpoint."),
        click.option("--jobs", default=8, show_default=True, type=click.IntRange(1),
                     help="Questions under way at a time; of a model here, in a batch."),
        click.option("--rounds", default=1000, show_default=True, type=click.IntRange(1), help="Of the bootstrap."),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of judge and bootstrap."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def asking(says: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; yields what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        row = bars.add_task(says, total=None)
        yield lambda done, total: bars.update(row, completed=done, total=total)


def folder(path: Path) -> Path:
    """One to write in, made if need be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot make the folder {path}: {problem.strerror}; name another --out") from None
    return path


def spent(usage: Any) -> dict[str, Any]:
    """What asking has cost."""
    return {name: getattr(usage, name) for name in ("calls", "cached", "prompt_tokens", "completion_tokens", "cost")}


def told(usage: Any) -> str:
    cost = "" if usage.cost is None else f", ${usage.cost:.2f}"
    tokens = f"{usage.prompt_tokens:,} tokens read and {usage.completion_tokens:,} written"
    return f"{usage.calls} calls ({tokens}){cost}, {usage.cached} replies from disk"


@commands.command()
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--judge", default="smollm2", show_default=True,
              help="An endpoint's address, a model folder, a GGUF file, or a hub id.")  # fmt: skip
@click.option("--judge-model", help="Which of an endpoint's models.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for verdicts, battles and report.")
@click.option("--template", type=click.Path(path_type=Path),
              help="Your own prompt, with {{prompt}}, {{answer_a}} and {{answer_b}}.")  # fmt: skip
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1),
              help="Ask so often, to see how far the judge agrees with itself.")  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="Of the judge.")
@click.option("--longest-answer", type=click.IntRange(1), help="Characters of an answer that are shown.")
@click.option("--strong", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Weight in the battles of a verdict of much better.")  # fmt: skip
@judge_options
@as_json
def compare(
    pairs: Path,
    judge: str,
    judge_model: str | None,
    out: Path,
    template: Path | None,
    repeats: int,
    temperature: float,
    longest_answer: int | None,
    strong: float,
    price: tuple[float, float] | None,
    max_tokens: int,
    timeout: float,
    jobs: int,
    rounds: int,
    seed: int,
    as_json: bool,
) -> None:
    """Judge pairs of answers (JSONL), each in both orders, on five levels.

    A pair has prompt, answer_a and answer_b, and may have model_a, model_b, prompt_id, category and winner. OUT gets
    judgments.jsonl, every verdict with its replies; battles.jsonl, which counterproof judging rank takes; report.json,
    with the judge's position and verbosity bias; and answers/, every reply, so that the same command goes on where it
    was stopped, and asks again for what failed.
    """
    from rich.console import Console
    from rich.table import Table

    from counterproof.files import replacing
    from counterproof.judging.pairwise import (
        FIGURES,
        PairwiseJudge,
        battle_rows,
        pairwise_report,
        read_pairs,
        write_json_lines,
    )
    from counterproof.judging.templates import PromptTemplate
    from counterproof.language.conversation import chat

    cases = read_pairs(pairs)
    wording = None
    if template is not None:
        wording = PromptTemplate.read(template, needed=("prompt", "answer_a", "answer_b"))
    asked = chat(
        judge, model=judge_model, cache=folder(out) / "answers", price=price or None, timeout=timeout, seed=seed
    )
    name = judge_model or judge
    it = PairwiseJudge(
        asked,
        wording,
        name=name,
        max_tokens=max_tokens,
        temperature=temperature,
        longest_answer=longest_answer,
        jobs=jobs,
    )
    with asking("judging") as progress:
        judgments = it.judge(cases, repeats=repeats, progress=progress)
    battles = battle_rows(judgments, judge=name, strong=strong)
    report = pairwise_report(judgments, rounds=rounds, seed=seed)
    write_json_lines(out / "judgments.jsonl", [judgment.as_json() for judgment in judgments])
    write_json_lines(out / "battles.jsonl", battles)
    found = {"judge": name, "out": str(out), "battles": len(battles), **report.as_json(), "usage": spent(asked.usage)}
    with replacing(out / "report.json") as stream:
        json.dump(found, stream, indent=1)
    if as_json:
        click.echo(json.dumps(found))
        return
    shown = Table(box=None, pad_edge=False)
    for heading in ("", f"{report.level:.0%} interval", "prompts", ""):
        shown.add_column(heading)
    for figure, estimate in report.figures.items():
        if estimate.count:
            shown.add_row(figure.replace("_", " "), str(estimate), str(estimate.prompts), FIGURES[figure])
    Console().print(shown)
    click.echo(f"{report.complete} of {report.pairs} pairs judged in both orders: {len(battles)} battles in {out}")
    click.echo(told(asked.usage))
    if report.answers_cut:
        click.echo(f"note: {report.answers_cut} answers were shown cut to {longest_answer} characters", err=True)
    problems = [judgment.problem for judgment in judgments if judgment.outcome == "failed"]
    if problems:
        click.echo(f"note: {len(problems)} questions got no answer: {problems[0]}", err=True)
        click.echo("note: the same command asks for them again, and for nothing else", err=True)


@commands.command("test-judge")
@click.argument("labelled", type=click.Path(path_type=Path))
@click.option("--judge", "judges", multiple=True, default=("smollm2",), show_default=True,
              help="An endpoint's address, a model folder, a GGUF file, a hub id; repeatable.")  # fmt: skip
@click.option("--judge-model", "models", multiple=True, help="Which of an endpoint's models; one for each endpoint.")
@click.option("--family", "families", multiple=True, metavar="PREFIX",
              help="How the names of the judge's own family begin; one for each judge.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder for replies, verdicts and report; resumable.")
@click.option("--template", type=click.Path(path_type=Path), help="Your own prompt, for a file of pairs.")
@click.option("--rules", default="strict", show_default=True, type=click.Choice(["strict", "official"]),
              help="How replies to OpenCompass's items are read.")  # fmt: skip
@judge_options
@as_json
def test_judge(
    labelled: Path,
    judges: tuple[str, ...],
    models: tuple[str, ...],
    families: tuple[str, ...],
    out: Path | None,
    template: Path | None,
    rules: Any,
    price: tuple[float, float] | None,
    max_tokens: int,
    timeout: float,
    jobs: int,
    rounds: int,
    seed: int,
    as_json: bool,
) -> None:
    """Test judges on labelled pairs (JSONL, with a winner), or on OpenCompass's JudgerBench files.

    LABELLED is a .jsonl file, a judgerbench .json file, or a folder of these. Printed are the accuracy of the verdicts,
    in all and per category, whether they stay when the answers change places, and how the ranking of the models that
    they add up to correlates with the true one. The parts are never put in one number.
    """
    from rich.console import Console
    from rich.table import Table

    from counterproof.files import replacing
    from counterproof.judging import JudgerBench
    from counterproof.judging.pairwise import write_json_lines
    from counterproof.language.conversation import chat

    if families and len(families) != len(judges):
        raise UserError(f"{len(families)} --family for {len(judges)} --judge; give one for each")
    endpoints = [judge.startswith(("http://", "https://")) for judge in judges]
    if len(models) != sum(endpoints):
        raise UserError(f"{len(models)} --judge-model for {sum(endpoints)} endpoints; give one for each")
    opencompass = labelled.is_dir() or labelled.suffix == ".json"
    if opencompass and template is not None:
        raise UserError("--template is for a file of pairs; JudgerBench's items have prompts of their own")
    if opencompass:
        bench = JudgerBench.from_opencompass(labelled, rules=rules)
    else:
        bench = JudgerBench.from_pairs(labelled, template=template)
    which = iter(models)
    asked: dict[str, Any] = {}
    for judge, endpoint in zip(judges, endpoints, strict=True):
        model = next(which) if endpoint else None
        name = model or judge
        if name in asked:
            raise UserError(f"two judges are called {name}; test them one by one")
        cache = None if out is None else folder(out) / "answers"
        asked[name] = chat(judge, model=model, cache=cache, price=price or None, timeout=timeout, seed=seed)
    verdicts = {}
    for name, one in asked.items():
        with asking(name) as progress:
            verdicts[name] = bench.ask(one, progress=progress, max_tokens=max_tokens, jobs=jobs)
    report = bench.evaluate(verdicts, family=dict(zip(asked, families, strict=False)), rounds=rounds, seed=seed)
    found = {**report.as_json(), "usage": {name: spent(one.usage) for name, one in asked.items()}}
    if out is not None:
        rows = [
            {"judge": name, "item": index, "part": item.part, "category": item.category, "truth": item.truth,
             "margins": [None if margin != margin else margin for margin in said.margins[index]],
             "failed": said.failed[index].tolist(), "replies": said.replies[index]}
            for name, said in verdicts.items() for index, item in enumerate(bench.items)
        ]  # fmt: skip
        write_json_lines(out / "verdicts.jsonl", rows)
        with replacing(out / "report.json") as stream:
            json.dump(found, stream, indent=1)
    if as_json:
        click.echo(json.dumps(found))
        return
    shown = Table(box=None, pad_edge=False)
    for heading in ("part", "figure", *asked):
        shown.add_column(heading)
    for part in next(iter(report.judges.values())).figures:
        every = [result.figures[part] for result in report.judges.values()]
        for figure in dict.fromkeys(figure for own in every for figure in own):
            if any(figure in own and own[figure].count for own in every):
                values = [str(own[figure]) if figure in own else "-" for own in every]
                shown.add_row(part, figure.replace("_", " "), *values)
        for dataset in next(iter(report.judges.values())).correlations.get(part, {}):
            each = [result.correlations[part][dataset] for result in report.judges.values()]
            said_of = [one.problem if one.value != one.value else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
                       for one in each]  # fmt: skip
            shown.add_row(part, f"correlation over models, {dataset}", *said_of)
        for name, gap in report.differences.get(part, {}).items():
            shown.add_row(part, f"accuracy of {name} less that of {next(iter(asked))}", str(gap))
    Console().print(shown)
    for name, one in asked.items():
        click.echo(f"{name}: {told(one.usage)}")
    if report.skipped:
        click.echo(f"note: {report.skipped} items left out, their own verdict cannot be read", err=True)
    failed = sum(int(said.failed.sum()) for said in verdicts.values())
    if failed:
        click.echo(f"note: {failed} questions got no answer and are left out of the accuracy; ask again", err=True)


# mooc-grader


def gradebook_columns(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> Any:
    """A layout's name, or ``ours=theirs`` pairs."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [text.partition("=") for text in given]
    for name, equals, theirs in pairs:
        if not (equals and theirs):
            raise click.BadParameter(f"{name}{equals}; give canvas, moodle, or NAME=COLUMN such as answer=Essay")
    return {name: theirs for name, _, theirs in pairs} or None


@commands.command()
@click.argument("essays", type=click.Path(path_type=Path))
@click.option("--rubric", type=click.Path(path_type=Path), help="YAML: criteria and points, for one question or each.")
@click.option("--answers", type=click.Path(path_type=Path), help="Instructors' answers by question: CSV or YAML.")
@click.option("--model", default="smollm2", show_default=True, help="A folder, GGUF file, hub id, or endpoint's URL.")
@click.option("--endpoint-model", help="Which of an endpoint's models.")
@click.option("--prompt", type=click.Choice(["question", "answer", "answer+rubric", "answer+generated-rubric"]),
              help="What the model is told; default answer+rubric with --rubric, else answer.")  # fmt: skip
@click.option("--mode", type=click.Choice(["generate", "expected"]), default="generate", show_default=True,
              help="Reasons and points, or the mean score by probabilities.")  # fmt: skip
@click.option("--template", type=click.Path(path_type=Path), help="A prompt file in place of the shipped one.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Gradings of each answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="Of the replies.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest reply.")
@click.option("--jobs", type=click.IntRange(1), default=8, show_default=True, help="Requests at a time, or batch.")
@click.option("--columns", multiple=True, callback=gradebook_columns, metavar="NAME=COLUMN",
              help="The file's column for ours, repeatable; or canvas, or moodle.")  # fmt: skip
@click.option("--empty", type=click.Choice(["zero", "ungraded"]), default="zero", show_default=True,
              help="What an empty answer gets.")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0, min_open=True), help="Points within which means count as equal.")
@click.option("--send-ids", is_flag=True, help="Name the students to the model.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV, XLSX or JSONL; default ESSAYS-graded beside it.")
@as_json
def grade(
    essays: Path,
    rubric: Path | None,
    answers: Path | None,
    model: str,
    endpoint_model: str | None,
    prompt: Any,
    mode: Any,
    template: Path | None,
    repeats: int,
    temperature: float,
    max_tokens: int,
    jobs: int,
    columns: Any,
    empty: Any,
    margin: float | None,
    send_ids: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Grade the answers in ESSAYS (.csv, .xlsx, .jsonl) with points and reasons, and compare with who graded before.

    Columns: answer, and as far as they are there question_id, question, max_points, instructor_answer, rubric,
    student_id, instructor_grade, peer_grade_1, .... Replies are kept in OUT.replies: stop it at any time, and the same
    command goes on there. A grade is advice to a person; answers without one are listed, never given points.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from counterproof.errors import UserError
    from counterproof.judging import Grader, agreement_report

    if out is None:
        out = essays.with_name(f"{essays.stem}-graded{essays.suffix if essays.suffix != '.tsv' else '.csv'}")
    if out.absolute() == essays.absolute():
        raise UserError(f"{out} is the file that is graded; name another one with --out")
    chosen = prompt or ("answer+rubric" if rubric is not None else "answer")
    grader = Grader(model, endpoint_model=endpoint_model, prompt=chosen, mode=mode, template=template,
                    temperature=temperature, max_tokens=max_tokens, jobs=jobs, empty=empty,
                    send_ids=send_ids)  # fmt: skip
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*bars, console=Console(stderr=True), transient=True) as progress:
            row = progress.add_task("grading", total=None)
            table = grader.grade_table(
                essays,
                rubric=rubric,
                answers=answers,
                columns=columns,
                out=out,
                repeats=repeats,
                progress=lambda what, done, of: progress.update(row, description=what, completed=done, total=of),
            )
    except KeyboardInterrupt:
        click.echo(f"counterproof: interrupted; the same command goes on from {out}.replies", err=True)
        raise SystemExit(130) from None
    entries = table.gradebook.entries
    outcomes = {name: sum(one.outcome == name for one in table.grades)
                for name in ("graded", "empty", "unparsed", "failed")}  # fmt: skip
    usage = grader.usage
    found: dict[str, Any] = {
        "out": str(out), "answers": len(entries), **outcomes,
        "ungraded": [{"row": e.row, "question_id": e.question_id, "student_id": e.student_id, "outcome": g.outcome,
                      "reason": g.reason} for e, g in table.ungraded],
        "flagged": sum(bool(one.flags) for one in table.grades), "calls": usage.calls, "cached": usage.cached,
    }  # fmt: skip
    notes = []
    if repeats > 1:
        try:
            found["consistency"] = table.consistency().as_json()
        except UserError as problem:
            notes.append(str(problem))
    report = None
    if any(entry.instructor_grade is not None for entry in entries):
        baselines = ["peer_median"] if any(entry.peer_grades for entry in entries) else []
        baselines += ["constant", "length"]
        baselines += ["tfidf"] if all(one.answer for one in table.assignments.values()) else []
        by = "question_id" if len(table.assignments) > 1 else "student_id"
        try:
            report = agreement_report(table, baselines=baselines, by=by, margin=margin)
            found["agreement"] = report.as_json()
        except UserError as problem:
            notes.append(str(problem))
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    click.echo(f"{len(entries)} answers: {outcomes['graded']} graded, {outcomes['empty']} empty, "
               f"{outcomes['unparsed']} unparsed, {outcomes['failed']} failed; written to {out}")  # fmt: skip
    for entry, one in table.ungraded:
        click.echo(f"  without a grade: row {entry.row}, question {entry.question_id}, student {entry.student_id}: "
                   f"{one.outcome}, {one.reason}")  # fmt: skip
    if "consistency" in found:
        values = ", ".join(f"{name} {'-' if v is None else f'{v:.3g}'}" for name, v in found["consistency"].items())
        click.echo(f"consistency of the repeats: {values}")
    if report is not None:
        click.echo(report.text())
    if outcomes["failed"]:
        click.echo("note: run the same command again to ask for those that failed", err=True)
    if mode == "generate" and 2 * outcomes["unparsed"] > len(entries):
        click.echo("note: the model does not keep to the form that it is asked for; a larger one may, and a small one "
                   "that runs here grades with --mode expected", err=True)  # fmt: skip
