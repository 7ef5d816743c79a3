"""counterproof incentives: mechanisms from your numbers, fair decisions on your table, agents with two principals."""

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def commands() -> None:
    """Who is paid for what, and who is accepted: mechanisms, fair decisions, agents between two principals."""


# hiring-agents


def _rounds(context: click.Context, parameter: click.Parameter, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e15 or value != int(value):
        raise click.BadParameter(f"{text!r} is not a whole number from 1 to 1e15, such as 1e6")
    return int(value)


def _read_instance(instance: Path, max_payment: float | None, outside: float | None = None) -> Any:
    from counterproof.incentives import InformationAcquisition

    given = {"max_payment": max_payment, "outside": outside}
    return InformationAcquisition.from_yaml(instance, **{k: v for k, v in given.items() if v is not None})


def _check_writable(out: Path | None, endings: Sequence[str]) -> None:
    """Before hours of work, not after."""
    from counterproof.errors import UserError

    if out is not None and out.suffix.lower() not in endings:
        raise UserError(f"{out}: the ending says what is written; use one of {', '.join(endings)}")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}; make it, or name another file")


@commands.command()
@click.argument("instance", type=click.Path(path_type=Path))
@click.option("--payments", default="correlated", show_default=True,
              type=click.Choice(["own", "peer", "correlated"]),
              help="One profile paid by own reports or by all, or correlated recommendations.")  # fmt: skip
@click.option("--profile", metavar="EFFORTS", help="The efforts to recommend, such as work,shirk; default the best.")
@click.option("--max-payment", type=click.FloatRange(0, min_open=True), help="Cap, over the file's.")
@click.option("--outside", type=float, help="What an agent has that walks away, over the file's.")
@click.option("--compare", is_flag=True, help="Also the values of the other two kinds.")
@click.option("--out", type=click.Path(path_type=Path), help="The whole mechanism, as a JSON file.")
@as_json
def mechanism(
    instance: Path,
    payments: str,
    profile: str | None,
    max_payment: float | None,
    outside: float | None,
    compare: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Find the best way to pay several agents for information.

    Recommends efforts and pays by reports and state, so that no agent gains by another effort, by lying, or by both.
    INSTANCE is a YAML file, described in counterproof.incentives.read_instance:

    \b
      states: [low, high]
      prior: [1/2, 1/2]
      decisions: [sell, buy]
      utility: [[1, 0], [0, 1]]        # a row per decision, by state
      max_payment: 1
      view: [[0.7, 0.3], [0.3, 0.7]]   # optional: what all see errs, a row per state
      agents:
        ann:
          signals: [bad, good]
          efforts:                     # signals: a row per state, or column of view
            shirk: {cost: 0, signals: [[0.5, 0.5], [0.5, 0.5]]}
            work: {cost: 0.05, signals: [[0.95, 0.05], [0.05, 0.95]]}
    """
    from counterproof.errors import UserError
    from counterproof.files import replacing

    _check_writable(out, (".json",))
    problem = _read_instance(instance, max_payment, outside)
    names = problem.labels
    chosen = None
    if profile is not None:
        asked = [part.strip() for part in profile.split(",")]
        if len(asked) != problem.n_agents:
            raise UserError(f"--profile {profile}: name an effort for each of {', '.join(names.agents)}")
        for name, known, agent in zip(asked, names.efforts, names.agents):
            if name not in known:
                raise UserError(f"--profile {profile}: {agent} has no effort {name!r}; it has {', '.join(known)}")
        chosen = tuple(known.index(name) for name, known in zip(asked, names.efforts))
    found = problem.optimal(payments, profile=chosen)
    result = found.as_json()
    if compare:
        kinds = ("own", "peer", "correlated")
        result["values"] = {
            kind: result["value"] if kind == payments and chosen is None else problem.optimal(kind).value
            for kind in kinds
        }
    if out is not None:
        with replacing(out) as stream:
            json.dump(result, stream, indent=1, allow_nan=False, ensure_ascii=False)
            stream.write("\n")
    if as_json:
        click.echo(json.dumps(result, allow_nan=False, ensure_ascii=False))
        return
    _show_mechanism(result)
    if out is not None:
        click.echo(f"\nsaved to {out}")


SHOWN = 64  # rows of payments on a terminal


def _show_mechanism(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    agents = result["agents"]
    console.print(f"value {result['value']:.6g} (first best {result['first_best']:.6g})", markup=False)
    for kind, value in result.get("values", {}).items():
        console.print(f"  {kind:10} {value:.6g}", markup=False)
    paid = ", ".join(f"{name} {p:.4g}" for name, p in zip(agents, result["expected_payments"]))
    console.print(f"expected payments: {paid}", markup=False)
    console.print(f"most an agent gains by not following: {max(result['max_deviation_gain'], 0):.1e}", markup=False)
    rows = 0
    for entry in result["recommendations"]:
        console.print()
        who = ", ".join(f"{name}: {effort}" for name, effort in zip(agents, entry["efforts"]))
        console.print(f"recommend with probability {entry['probability']:.4f}: {who}", markup=False)
        table = Table(box=None, pad_edge=False)
        for heading in (*(f"{name} reports" for name in agents), "state", "chance"):
            table.add_column(heading)
        for name in agents:
            table.add_column(f"pay {name}", justify="right")
        table.add_column("decision")
        for row in entry["table"]:
            if row["probability"] > 0:
                rows += 1
                pay = [f"{p:.4g}" for p in row["payments"]]
                cells = (*row["reports"], row["state"], f"{row['probability']:.4f}", *pay, row["decision"])
                if rows <= SHOWN:
                    table.add_row(*cells)
        console.print(table)
    if rows > SHOWN:
        console.print(f"\n{rows - SHOWN} more rows; see them all with --out or --json", markup=False)


@commands.command()
@click.argument("instance", type=click.Path(path_type=Path))
@click.option("--rounds", default="1e6", show_default=True, callback=_rounds, help="The longest horizon.")
@click.option("--repeats", default=10, show_default=True, type=click.IntRange(1), help="Runs per horizon.")
@click.option("--payments", default="correlated", show_default=True,
              type=click.Choice(["own", "peer", "correlated"]), help="The kind of mechanism to learn.")  # fmt: skip
@click.option("--costs", default="known", show_default=True, type=click.Choice(["known", "learned"]),
              help="Whether the principal knows what efforts cost.")  # fmt: skip
@click.option("--kappa", default=0.25, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Exploration per profile, over rounds^(2/3).")  # fmt: skip
@click.option("--radius", default=2.0, show_default=True, type=click.FloatRange(0),
              help="Estimation error, times the square root of the samples.")  # fmt: skip
@click.option("--alpha", type=click.FloatRange(0, 1), help="Weight of the known rules; default by radius and gap.")
@click.option("--gap", type=click.FloatRange(0, min_open=True), help="Of the known rules, over what is computed.")
@click.option("--max-payment", type=click.FloatRange(0, min_open=True), help="Cap, over the file's.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the samples.")
@click.option("--out", type=click.Path(path_type=Path), help="The regret curve: .png, .svg or .pdf.")
@as_json
def learn(
    instance: Path,
    rounds: int,
    repeats: int,
    max_payment: float | None,
    seed: int,
    out: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Learn whom to hire: the online algorithm's regret against the number of rounds.

    Agents' signals are unknown: explore each profile with rules known to work, then commit to the best mechanism for
    what was seen. The regret is that of not knowing the best mechanism from the start, with agents who do what is best
    for them.
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from counterproof.errors import UserError
    from counterproof.incentives import ExploreThenCommit, fit_slope

    _check_writable(out, (".png", ".svg", ".pdf"))
    problem = _read_instance(instance, max_payment)
    fewest = 10 * int(np.prod(problem.efforts))
    if rounds < fewest:
        raise UserError(f"--rounds {rounds}: too few for {fewest // 10} profiles of efforts; give at least {fewest}")
    steps = max(1, round(2 * np.log10(rounds / max(fewest, min(1e3, rounds)))))
    horizons = sorted({round(rounds / 10 ** (k / 2)) for k in range(steps + 1)} - set(range(fewest)))
    points = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        row = bar.add_task("horizons", total=len(horizons) * repeats)
        for horizon in horizons:
            try:
                plan = ExploreThenCommit(problem, horizon, **settings)
            except ValueError as wrong:
                raise UserError(f"{instance}: {wrong}") from None
            runs = []
            for k in range(repeats):
                runs.append(plan.simulate(np.random.default_rng([seed, horizon, k])))
                bar.advance(row)
            regret = [run.regret for run in runs]
            points.append(
                {
                    "rounds": horizon,
                    "samples": plan.samples,
                    "alpha": plan.weight,
                    "capped": plan.capped,
                    "regret": regret,
                    "mean": float(np.mean(regret)),
                    "over_rate": float(np.mean(regret)) / horizon ** (2 / 3),
                    "obeyed": float(np.mean([run.obeyed for run in runs])),
                    "settled": float(np.mean([run.behaviour.settled for run in runs])),
                }
            )
    # Where alpha or exploration is cut to what is possible, regret does not follow the rate.
    free = [(p["rounds"], r) for p in points if not p["capped"] for r in p["regret"] if r > 0]
    slope = fit_slope(*zip(*free)) if len({at for at, _ in free}) > 1 and len(free) > 2 else None
    if out is not None:
        _plot_regret(out, instance.name, points, slope)
    if as_json:
        result = {"optimum": plan.optimum, "gap": plan.gap, "points": points, "slope": slope}
        click.echo(json.dumps(result, allow_nan=False))
        return
    click.echo(f"value of the best mechanism {plan.optimum:.6g}; known rules are best by {plan.gap:.4g}\n")
    headings = ("rounds", "explored", "alpha", "regret", "/ T^(2/3)", "per round", "obeyed")
    click.echo("  ".join(f"{heading:>9}" for heading in headings))
    profiles = int(np.prod(problem.efforts))
    for p in points:
        shown = (
            f"{p['rounds']:.3g}",
            f"{profiles * p['samples']}",
            f"{p['alpha']:.3f}",
            f"{p['mean']:.4g}",
            f"{p['over_rate']:.3f}",
            f"{p['mean'] / p['rounds']:.4f}",
            f"{p['obeyed']:.0%}",
        )
        click.echo("  ".join(f"{cell:>9}" for cell in shown) + ("  capped" if p["capped"] else ""))
    if any(p["capped"] for p in points):
        click.echo("capped: alpha or exploration had to be cut; the bound says nothing there")
    if any(p["settled"] < 1 for p in points):
        click.echo("in some runs agents' best responses went in circles; the last ones counted", err=True)
    if slope is None:
        click.echo("no slope: it takes two horizons without a cap; raise --rounds")
    else:
        between = f"{slope[1]:.3f} to {slope[2]:.3f}"
        click.echo(f"slope of log regret {slope[0]:.3f} (95 % interval {between}); the rate is 2/3")
    if out is not None:
        click.echo(f"saved to {out}")


def _plot_regret(
    out: Path, title: str, points: "Sequence[dict[str, Any]]", slope: tuple[float, float, float] | None
) -> None:
    from counterproof.errors import extra
    from counterproof.files import replacing

    with extra("incentives"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rounds = [p["rounds"] for p in points]
    axes.plot(rounds, [p["mean"] for p in points], color="#1f4e79", label="mean regret")
    for capped, face, says in ((False, "#1f4e79", "a run"), (True, "white", "a run, alpha or exploration capped")):
        at = [(p["rounds"], r) for p in points if p["capped"] == capped for r in p["regret"]]
        if at:
            x, y = zip(*at)
            axes.scatter(x, y, s=14, facecolor=face, edgecolor="#1f4e79", label=says, zorder=3)
    last = points[-1]
    rate = [last["mean"] * (t / last["rounds"]) ** (2 / 3) for t in rounds]
    axes.plot(rounds, rate, color="0.5", linestyle="--", label="rounds^(2/3)")
    axes.set(xscale="log", yscale="log", xlabel="rounds", ylabel="regret", title=title)
    if slope is not None:
        axes.set_title(f"{title}: slope {slope[0]:.3f}")
    axes.legend(frameon=False)
    ending = out.suffix.lower().removeprefix(".")
    with replacing(out) as stream:
        # No dates, so that equal runs write equal files.
        dated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(stream.buffer, format=ending, dpi=150, metadata=dated[ending])


# fair-one-sided


def _column_names(given: Sequence[str], known: Collection[str]) -> list[str]:
    """Columns by name, repeated or with commas between; a name that has a comma itself is taken whole."""
    found: list[str] = []
    for text in given:
        found.extend([text] if text in known else [name.strip() for name in text.split(",")])
    return found


def _number_list(context: click.Context, parameter: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0,2,8") from None
    if not all(0 <= value < float("inf") for value in values):
        raise click.BadParameter(f"{text!r} has a number that is negative or not finite")
    return values


@commands.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--label", required=True, metavar="COLUMN", help="Outcomes: whether accepting was right.")
@click.option("--positive", metavar="VALUE", help="The outcome that makes accepting right; default 1, true, yes or y.")
@click.option("--protected", multiple=True, metavar="COLUMNS", help="May make no difference to the auditors.")
@click.option("--similar-by", multiple=True, metavar="COLUMNS", help="May; default all but the protected.")
@click.option("--drop", multiple=True, metavar="COLUMNS", help="Not read at all, such as names.")
@click.option("--c", "weights", default="0,2,8", show_default=True, callback=_number_list, help="Weights of fairness.")
@click.option("--alpha", default=0.1, show_default=True, type=click.FloatRange(0, 1),
              help="Tolerated over what an auditor allows.")  # fmt: skip
@click.option("--gamma", default=0.6, show_default=True, type=click.FloatRange(0, 1, min_open=True),
              help="Share of the auditors that must agree on a pair.")  # fmt: skip
@click.option("--allow", default="0.8,1,1.2,1.5,2.5", show_default=True, callback=_number_list,
              help="Per auditor, the difference in chances over the whole of the columns that count.")  # fmt: skip
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="People per round.")
@click.option("--rounds", type=click.IntRange(1), help="Default one pass, at least 2,000: small tables come again.")
@click.option("--cuts", default=5, show_default=True, type=click.IntRange(1, 1000), help="Thresholds per column.")
@click.option("--algorithm", default="exp2", show_default=True, type=click.Choice(["exp2", "ftpl"]),
              help="Exponential weights over all rules, or the perturbed leader.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the order and the draws.")
@click.option("--out", multiple=True, type=click.Path(path_type=Path),
              help="Write the frontier: .png, .svg or .pdf a plot, .csv the numbers; repeatable.")  # fmt: skip
@as_json
def fair(
    table: Path,
    label: str,
    positive: str | None,
    protected: tuple[str, ...],
    similar_by: tuple[str, ...],
    drop: tuple[str, ...],
    weights: tuple[float, ...],
    alpha: float,
    gamma: float,
    allow: tuple[float, ...],
    batch: int,
    rounds: int | None,
    cuts: int,
    algorithm: Literal["exp2", "ftpl"],
    seed: int,
    out: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Replay fair decisions on a CSV file of people with known outcomes, seeing those of the accepted only.

    Auditors find people as different as the columns say that may make a difference, and object when chances differ
    more. Per weight of fairness C: error, objections and labels seen.
    """
    from counterproof.errors import UserError
    from counterproof.incentives import frontier_figure, read_decision_table, replay_decisions
    from counterproof.incentives.decisions import table_columns

    for path in out:
        if path.suffix not in (".png", ".svg", ".pdf", ".csv"):
            raise UserError(f"--out {path}: the name must end in .png, .svg or .pdf for a plot, .csv for the numbers")
    known = table_columns(table)
    if label in (left_out := _column_names(drop, known)):
        raise UserError(f"--drop {label}: these are the outcomes (--label); keep them")
    people = read_decision_table(table, label, positive=positive, drop=left_out)
    panel = people.panel(
        _column_names(similar_by, known), _column_names(protected, known), allow=allow, gamma=gamma, alpha=alpha
    )
    if batch > len(people):
        raise UserError(f"--batch {batch} is more than the {len(people)} people of {table}; choose a smaller one")
    total = rounds or max(2000, len(people) // batch)
    with click.progressbar(length=total * len(weights), label="deciding", file=sys.stderr) as bar:
        replay = replay_decisions(
            people,
            panel,
            C=weights,
            rounds=total,
            batch=batch,
            cuts=cuts,
            algorithm=algorithm,
            rng=seed,
            watch=lambda at, done: bar.update(1) if sys.stderr.isatty() else None,
        )
    found = replay.summary()
    for path in out:
        _write_frontier(path, found, frontier_figure)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    click.echo(found["table"])
    click.echo(
        f"{found['rounds']:,} rounds of {found['batch']}, every person about {found['passes']:.1f} times; "
        f"{found['rules']} rules; best rule with all labels known: error {found['best_rule_error']:.4f}"
    )
    click.echo(f"{'C':>6} {'error':>8} {'objections':>11} {'labels seen':>12} {'of people':>10} {'accepted':>9}")
    for row in found["frontier"]:
        click.echo(
            f"{row['C']:6g} {row['error']:8.4f} {row['objections']:11.1%} {row['labels_seen']:12,} "
            f"{row['people_seen']:10,} {row['accepted']:9.1%}"
        )
    first = found["frontier"][0]
    if "best_fair_error" in first:
        click.echo(f"best mixture of rules that is fair by half of alpha: error {first['best_fair_error']:.4f}")
        for row in found["frontier"]:
            click.echo(
                f"  C = {row['C']:g}: {row['accuracy_regret']:.1f} errors more than it, "
                f"{row['lagrangian_regret']:.1f} with the penalty"
            )
    for row in found["frontier"]:
        if "rules" in row:
            said = ", ".join(f"{rule['accepts']} ({rule['weight']:.2f})" for rule in row["rules"][:3])
            click.echo(f"  C = {row['C']:g} ends with: {said}")
    if found["policy_error"]:
        click.echo(f"note: the panel saw sampled policies; a gap may be off by {found['policy_error']:.2f}")


def _write_frontier(path: Path, found: dict[str, Any], figure_of: Any) -> None:
    import csv
    import io

    from counterproof.files import replacing

    with replacing(path) as stream:
        if path.suffix == ".csv":
            rows = [{name: value for name, value in row.items() if name != "rules"} for row in found["frontier"]]
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            drawn = io.BytesIO()
            figure_of(found).savefig(drawn, format=path.suffix[1:], dpi=150)
            stream.flush()
            stream.buffer.write(drawn.getvalue())
    click.echo(f"wrote {path}", err=True)


# tin-men


def _several(*choices: str) -> Any:
    return click.Choice(choices)


@commands.command()
@click.option("--model", help="A folder, GGUF file or hub id, or an endpoint's address; default SmolLM2-135M-Instruct.")
@click.option("--endpoint-model", help="Which of an endpoint's models.")
@click.option("--mode", type=_several("logprob", "explained", "sample"),
              help="Score both answers; score them behind a sampled explanation; or sample whole answers. Default: "
              "logprob here, sample at an endpoint.")  # fmt: skip
@click.option("--scenarios", type=click.Path(path_type=Path), help="YAML with your own scenarios and wordings.")
@click.option(
    "--scenario", "chosen", multiple=True, help="Only this scenario; repeatable. ai-lab is not run otherwise."
)
@click.option(
    "--wording", multiple=True, help="plain, terse, formal, or one of your file; repeatable. [default: plain]"
)
@click.option("--orders", type=_several("both", "listed", "reversed"), default="both", show_default=True,
              help="Of the two products.")  # fmt: skip
@click.option("--case", multiple=True, type=_several("standard", "upper", "lower"), help="Of the prompt; repeatable.")
@click.option("--prices", type=_several("own", "equal", "both"), default="own", show_default=True,
              help="As they are, both at the lower one, or one after the other.")  # fmt: skip
@click.option("--temperature", multiple=True, type=float, help="Of sampling; repeatable. [default: 0.2 and 0.6]")
@click.option("--replications", type=click.IntRange(1), default=30, show_default=True,
              help="Sampled answers per prompt and temperature.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of a sampled text.")
@click.option("--jobs", type=click.IntRange(1), default=8, show_default=True, help="Requests, or prompts, at a time.")
@click.option("--retries", type=click.IntRange(0), default=4, show_default=True, help="Of a request that fails.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds, of a request.")
@click.option("--price", type=(float, float), help="US dollars per million tokens read and written, to count costs.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the answers.")
@as_json
def principals(
    model: str | None,
    endpoint_model: str | None,
    mode: str | None,
    scenarios: Path | None,
    chosen: tuple[str, ...],
    wording: tuple[str, ...],
    orders: str,
    case: tuple[str, ...],
    prices: str,
    temperature: tuple[float, ...],
    replications: int,
    max_tokens: int,
    jobs: int,
    retries: int,
    timeout: float,
    price: tuple[float, float] | None,
    device: str,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Does a model serve the customer or its other principal, and does it matter who sees its reasons?

    OUT gets the table of answers (answers.jsonl, answers.csv), every prompt (prompts.jsonl), the design, and a plot.
    Stop it at any time: the same command goes on. Answers that failed are asked again by the same command. Exit code
    1: some failed; the others are there.
    """
    from counterproof.errors import UserError
    from counterproof.incentives import (
        WORDINGS,
        EndpointAgent,
        HFAgent,
        PrincipalAgentExperiment,
        Results,
        ai_lab,
        oil_company,
        product_safety,
        read_scenarios,
    )

    endpoint = model is not None and model.startswith(("http://", "https://"))
    if endpoint and mode not in (None, "sample"):
        raise UserError(f"--mode {mode} needs the model here; an endpoint is asked with --mode sample")
    if endpoint_model is not None and not endpoint:
        raise UserError("--endpoint-model names a model of an endpoint; give the endpoint's address as --model")
    if endpoint and not endpoint_model:
        raise UserError(f"{model} is an endpoint; name one of its models with --endpoint-model")
    own_words = {}
    if scenarios is None:
        known = {one.name: one for one in (oil_company(), product_safety(), ai_lab())}
        names = chosen or ("oil-company", "product-safety")
    else:
        found, words = read_scenarios(scenarios)
        known, own_words = {one.name: one for one in found}, {one.name: one for one in words}
        names = chosen or tuple(known)
    every = {**WORDINGS, **own_words}
    for kind, wanted, there in (("scenario", names, known), ("wording", wording, every)):
        for name in wanted:
            if name not in there:
                raise UserError(f"there is no {kind} {name!r}; there are {', '.join(there)}")
    try:
        experiment = PrincipalAgentExperiment(
            [known[name] for name in names],
            orders=orders,
            cases=case or ("standard",),
            wordings=[every[name] for name in wording] or list(own_words.values()) or ["plain"],
            prices=prices,
            temperatures=temperature or (0.2, 0.6),
            replications=replications,
        )
        experiment.questions(deterministic=not endpoint and mode in (None, "logprob"))
    except ValueError as problem:
        raise UserError(str(problem)) from None
    begun = (out / "answers.jsonl").exists()
    if not begun and out.is_dir() and {one.name for one in out.iterdir()} - {"replies", "scores"}:
        raise UserError(f"{out} holds files of something else; name a folder of its own with --out")
    before = Results.read(out) if begun else None
    with _asking() as watch:
        if endpoint:
            agent: Any = EndpointAgent(
                str(model),
                str(endpoint_model),
                cache=out / "replies",
                retries=retries,
                timeout=timeout,
                price=price,
                jobs=jobs,
                max_tokens=max_tokens,
            )
        else:
            from counterproof.language import load

            agent = HFAgent(
                load(model, device=device),
                mode=mode or "logprob",
                max_tokens=max_tokens,
                batch_size=jobs,
                cache=out,
                name=model or "smollm2",
            )
        try:
            results = experiment.run(agent, seed=seed, resume=before, progress=watch)
        except KeyboardInterrupt:
            click.echo("counterproof: interrupted; the same command goes on", err=True)
            sys.exit(130)
    results.write(out)
    results.plot().savefig(out / "shares.png", dpi=150)
    usage = getattr(agent, "usage", None)
    if as_json:
        spent = None if usage is None else {name: getattr(usage, name) for name in ("calls", "cached", "cost")}
        click.echo(json.dumps({"out": str(out), **results.as_json(), "usage": spent}, ensure_ascii=False))
    else:
        click.echo(results.text())
        click.echo(f"\nsaved to {out}")
        if usage is not None:
            cost = "" if usage.cost is None else f", {usage.cost:.4f} US dollars"
            click.echo(f"{usage.calls} calls, {usage.cached} from {out / 'replies'}{cost}")
    if results.failed:
        why = next(one.error for one in results if one.outcome == "failed")
        click.echo(
            f"counterproof: {results.failed} of {len(results)} answers failed, the first because {why}; the same "
            "command asks them again",
            err=True,
        )
        sys.exit(1)


@commands.command()
@click.argument("answers", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Answers of another model, to compare effects.")
@click.option("--level", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.95, show_default=True,
              help="Of the intervals.")  # fmt: skip
@as_json
def observed(answers: Path, against: Path | None, level: float, as_json: bool) -> None:
    """What stored answers say: the folder of a run, or its table (.jsonl or .csv)."""
    from counterproof.errors import UserError
    from counterproof.incentives import CONTRASTS, INFORMATION, Results

    results = Results.read(answers)
    found = results.as_json(level=level)
    compared = []
    if against is not None:
        other = Results.read(against)
        shared = [name for name in dict.fromkeys(one.scenario for one in results) if other.where(scenario=name)]
        if not shared:
            raise UserError(f"{answers} and {against} have no scenario in common")
        for one in (results, other):
            if {row.information for row in one} != set(INFORMATION):
                raise UserError("effects are compared when both have all four information conditions")
        for name in shared:
            for by in CONTRASTS:
                difference = results.where(scenario=name).compare(other.where(scenario=name), by, level=level)
                plain = {key: value if math.isfinite(value) else None for key, value in difference.items()}
                compared.append({"scenario": name, "by": by, **plain})
    if as_json:
        click.echo(json.dumps({**found, "differences": compared}, ensure_ascii=False))
        return
    click.echo(results.text(level=level))
    for row in compared:
        numbers = ["-" if row[key] is None else f"{row[key]:+.3f}" for key in ("estimate", "low", "high")]
        click.echo(
            f"{row['scenario']}, {row['by']}: effect here less there {numbers[0]} ({numbers[1]} to {numbers[2]})"
        )


@contextmanager
def _asking() -> "Iterator[Callable[[int, int], None]]":
    """A bar with an estimate on a terminal, a line now and then elsewhere; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
    row = bars.add_task("loading", total=None)
    last = -1

    def watch(had: int, of: int) -> None:
        nonlocal last
        bars.update(row, description="asking", total=of, completed=had)
        if not sys.stderr.isatty() and had * 10 // of > last:
            last = had * 10 // of
            click.echo(f"{had} of {of} answers", err=True)

    with bars:
        yield watch
