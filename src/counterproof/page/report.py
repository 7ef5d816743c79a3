"""The report: everything measured as one HTML file that needs no network, no script and no server to be read.

What is shown, and in which words, is decided here, in `plots` and in `typeset`; the templates only lay it out.
"""

# ruff: noqa: RUF001 - minus and times signs are typeset

import base64
import hashlib
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from counterproof.bench.comparison import Comparison
from counterproof.bench.task import Claim
from counterproof.bench.trials import Record
from counterproof.files import replacing
from counterproof.page.catalogue import ROOMS, Paper
from counterproof.page.plots import curves, effect_plot, forest, pairs_plot
from counterproof.page.results import judged_together
from counterproof.page.typeset import (
    ARMS,
    OUTCOMES,
    PLACES,
    VERDICTS,
    Place,
    Reading,
    Which,
    capital,
    counted,
    data_element,
    evidence,
    memory,
    number,
    printable,
    seconds,
    signed,
    words,
)

if TYPE_CHECKING:
    from jinja2 import Environment
    from markdown_it import MarkdownIt

__all__ = ["paper_view", "render", "write"]

MEASURED = "What was measured here"  # the card's section that introduces the claims


def render(
    papers: Sequence[Paper],
    ours: Mapping[str, Sequence[Comparison]],
    local: Mapping[str, Sequence[Comparison]],
    *,
    made: str,
    version: str,
) -> str:
    """The page.

    Verdicts are marked by whether they survive e-BH at 5 % among all verdicts of this page: the project's as one
    family, the reader's as another.

    Args:
        papers: in the order they are shown within their rooms. Comparisons of papers that are not among them are left
            out.
        ours: slug -> comparisons that the project has measured.
        local: slug -> comparisons measured on the reader's machine.
        made: when, in ISO 8601.
        version: of Counterproof.

    Raises:
        UserError: when the claims of a runnable paper cannot be imported.
        ValueError: when `made` is not ISO 8601.
    """
    moment = datetime.fromisoformat(made)
    slugs = [paper.slug for paper in papers]
    measured: dict[Place, dict[str, list[Comparison]]] = {
        "us": judged_together({slug: ours.get(slug, ()) for slug in slugs}),
        "here": judged_together({slug: local.get(slug, ()) for slug in slugs}),
    }
    views = [paper_view(paper, {place: found[paper.slug] for place, found in measured.items()}) for paper in papers]
    by_room = {room: [view for view in views if view["paper"].room == room] for room in ROOMS}
    claims = [claim for view in views for claim in view["claims"]]
    script = _environment().get_template("report.js").render().strip()
    return (
        _environment()
        .get_template("report.html")
        .render(
            made=moment.isoformat(timespec="minutes"),
            made_words=f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip(),
            version=version,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            rooms=[
                {
                    "name": room,
                    "says": ROOMS[room],
                    # Runnable papers first; the order of `papers` otherwise.
                    "papers": sorted(inside, key=lambda view: view["paper"].status != "runs"),
                }
                for room, inside in by_room.items()
                if inside
            ],
            papers=len(papers),
            runs=sum(paper.status == "runs" for paper in papers),
            claims=len(claims),
            verdicts=VERDICTS,
            count=Counter(claim["verdict"] for claim in claims),
            forest=forest([claim for claim in claims if claim["sheets"]]),
        )
    )


def write(html: str, out: Path) -> None:
    """Put a page in its place at once: whoever opens `out` meanwhile finds the old page or the new one, whole.

    Args:
        html: the page.
        out: the file; what a link points to is replaced, not the link.

    Raises:
        UserError: when it cannot be written there, naming path and remedy; an old page stays as it was.
    """
    with replacing(out) as stream:
        stream.write(html)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        # The templates' own indentation would be a tenth of the page.
        loader=FunctionLoader(lambda name: re.sub(r"(?m)^ +", "", (folder / name).read_text(encoding="utf-8"))),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["capital"] = capital
    return environment


# --- Views ------------------------------------------------------------------------------------------------------------


def paper_view(paper: Paper, measured: Mapping[Place, Sequence[Comparison]]) -> dict[str, Any]:
    """What the templates show of a paper: its claims with all that was measured, and its card's sections as HTML."""
    known = {claim.name: claim for claim in paper.claims}
    for comparisons in measured.values():
        for comparison in comparisons:
            known.setdefault(comparison.claim.name, comparison.claim)
    first_on: dict[str, Claim] = {}
    for claim in known.values():
        first_on.setdefault(claim.task.name, claim)
    claims = [
        _claim_view(
            paper,
            claim,
            first_on[claim.task.name] is claim,
            {place: [c for c in found if c.claim.name == claim.name] for place, found in measured.items()},
        )
        for claim in known.values()
    ]
    _share_curves(claims)
    return {
        "paper": paper,
        "id": _anchor(paper.slug),
        "claims": claims,
        "verdicts": [(verdict, n) for verdict in VERDICTS if (n := sum(c["verdict"] == verdict for c in claims))],
        "measured": next((_markdown(text) for name, text in paper.sections.items() if name == MEASURED), ""),
        "sections": [(name, _markdown(text)) for name, text in paper.sections.items() if name != MEASURED],
    }


def _share_curves(claims: Sequence[dict[str, Any]]) -> None:
    """Claims that share their trials may have the same curves: they are drawn with the first, and named by the rest."""
    shown: dict[tuple[str, ...], dict[str, Any]] = {}
    for claim in claims:
        for sheet in claim["sheets"]:
            for measurement in sheet["measurements"]:
                own = measurement["curves"]
                first = shown.setdefault(own["key"], claim)
                if own["plots"] and first is not claim:
                    measurement["curves"] = {**own, "plots": [], "note": "", "with": first}


def _claim_view(
    paper: Paper, claim: Claim, introduces: bool, found: Mapping[Place, Sequence[Comparison]]
) -> dict[str, Any]:
    budgets = list(dict.fromkeys([*claim.task.budgets, *(c.budget for all_of in found.values() for c in all_of)]))
    sheets = []
    for budget in budgets:
        readings = [
            Reading(comparison, place, alone=len({c.device for c in all_of}) == 1)
            for place, all_of in found.items()
            for comparison in all_of
            if comparison.budget == budget
        ]
        if readings:
            sheets.append(_sheet(paper, claim, budget, readings))
    # The most thorough budget that we have measured speaks for the claim; the reader's own where there is none of ours.
    by_us = [sheet for sheet in sheets if sheet["first"]["place"] == "us"]
    headline = (by_us or sheets)[-1] if sheets else None
    metric = claim.task.metrics[claim.metric]
    return {
        "id": f"{_anchor(paper.slug)}/{_anchor(claim.name)}",
        "short": _short(paper),
        "claim": claim,
        "says": capital(claim.says),
        "metric": words(claim.metric),
        "metric_says": metric.says,
        "unit": metric.unit,
        "noun": claim.task.sample,
        "smallest": _smallest(claim),
        "introduces": introduces,
        "sheets": sheets,
        "headline": headline,
        "verdict": headline["first"]["verdict"] if headline else None,
        "command": _command(paper, claim, next(iter(claim.task.budgets))),
    }


def _anchor(text: str) -> str:
    """Part of an id: papers and claims are called by words and hyphens, and this keeps it so."""
    return re.sub(r"[^\w-]", "-", text)


def _short(paper: Paper) -> str:
    """What the paper is called in a row: its title up to the colon, or its slug."""
    head, colon, _ = paper.title.partition(":")
    return head if colon and len(head) <= 32 else paper.title if len(paper.title) <= 32 else paper.slug


def _smallest(claim: Claim) -> str:
    metric = claim.task.metrics[claim.metric]
    if claim.smallest is None:
        return "any improvement counts"
    if claim.effect == "ratio":
        side = "at most" if claim.better == "lower" else "at least"
        return f"what matters: {side} {claim.smallest:g} times the baseline"
    unit = f"\u00a0{metric.unit}" if metric.unit else ""
    return f"what matters: at least {claim.smallest:g}{unit} {claim.better}"


def _command(paper: Paper, claim: Claim, budget: str) -> str:
    return f"counterproof check {shlex.quote(f'{paper.slug}/{claim.name}')} --budget {shlex.quote(budget)}"


def _sheet(paper: Paper, claim: Claim, budget: str, readings: Sequence[Reading]) -> dict[str, Any]:
    measurements = [_measurement(reading) for reading in readings]
    return {
        "id": f"{_anchor(paper.slug)}/{_anchor(claim.name)}/{_anchor(budget)}",
        "budget": budget,
        "planned": _planned(readings[0].claim, budget),
        "readings": readings,
        "measurements": measurements,
        "first": measurements[0],
        "effect_plot": effect_plot(readings),
        "beside": _beside(readings),
        "numbers": _numbers(readings),
        "curves": any(measurement["curves"]["plots"] for measurement in measurements),
        "command": _command(paper, claim, budget),
    }


def _planned(claim: Claim, budget: str) -> str:
    limits = claim.task.budgets[budget]
    fewest, most = claim.seeds or limits.seeds
    settings = {**limits.settings, **claim.settings}
    parts = [f"{words(str(name))} {value}" for name, value in settings.items()]
    parts.append(f"{fewest} to {most} {claim.task.sample}s")
    parts.append("no time limit" if limits.minutes is None else f"{limits.minutes:g} minutes times the number of jobs")
    return ", ".join(parts)


def _beside(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """The reader's measurement held against ours, in a sentence."""
    us, here = (next((r for r in readings if r.place == place), None) for place in PLACES)
    if us is None or here is None or us.found.effect is None or here.found.effect is None:
        return None
    same = us.found.verdict == here.found.verdict
    if us.ratio:
        change = here.found.effect / us.found.effect
        apart = f"the effect here is × {number(change, 3)} of ours"
    else:
        change = here.found.effect - us.found.effect
        text = signed(change, us.decimals)
        apart = f"the effect here is {text}{us.unit} from ours" if re.search("[1-9]", text) else "the same effect"
    overlap = max(us.found.interval[0], here.found.interval[0]) <= min(us.found.interval[1], here.found.interval[1])
    verdicts = "the same verdict" if same else f"another verdict ({here.found.verdict}, not {us.found.verdict})"
    intervals = "the confidence sequences overlap" if overlap else "the confidence sequences do not overlap"
    return {"same": same and overlap, "text": f"This machine against ours: {verdicts}; {apart}; {intervals}."}


def _measurement(reading: Reading) -> dict[str, Any]:
    comparison, found = reading.comparison, reading.found
    failures = [
        {
            "arm": reading.arm(arm),
            "seed": record.seed,
            "outcome": OUTCOMES[record.outcome],
            "message": printable(record.message).strip()[-4000:] or "no message was recorded",
        }
        for arm in ARMS
        for record in reading.records(arm)
        if record.outcome != "ok"
    ]
    return {
        "place": reading.place,
        "title": reading.title,
        "verdict": found.verdict,
        "sentence": reading.sentence,
        "survives": comparison.survives,
        "effect": None if found.effect is None else data_element(found.effect, reading.effect_with_unit(found.effect)),
        "words": None if found.effect is None else reading.in_words(found.effect),
        "interval": reading.interval(found.interval),
        "level": reading.level,
        "seeds": counted(found.seeds, reading.noun),
        "device": comparison.device,
        "stale": [printable(reason) for reason in comparison.stale],
        "failures": failures,
        "wins": found.wins,
        "count": found.seeds,
        "noun": reading.noun,
        "metric": words(reading.claim.metric),
        "better": reading.claim.better,
        "unit": reading.metric.unit,
        "arms": {arm: reading.arm(arm) for arm in ARMS},
        "pairs": pairs_plot(reading),
        "rows": _rows(reading),
        "difference": "ratio" if reading.ratio else "difference",
        "curves": curves(reading),
        "costs": _costs(reading),
        "total": seconds(comparison.seconds),
        "environment": _surroundings(comparison),
    }


def _rows(reading: Reading) -> list[dict[str, Any]]:
    """A pair per row; without an effect when no pair finished in both arms."""

    def cell(record: Record, value: float | None) -> Markup | str:
        return OUTCOMES[record.outcome] if value is None else data_element(value, reading.value(value), ".8g")

    rows = []
    improvements = reading.effects.tolist() or [None] * len(reading.values)
    for pair, values, improvement in zip(reading.comparison.pairs, reading.values, improvements):
        effect, result = None, ""
        if improvement is not None:
            natural = reading.natural(improvement)
            effect = data_element(natural, reading.effect(natural), ".8g")
            result = "better" if improvement > 0 else "worse" if improvement < 0 else "tie"
        rows.append(
            {
                "seed": pair.seed,
                "baseline": cell(pair.baseline, values[0]),
                "method": cell(pair.method, values[1]),
                "effect": effect,
                "counted": None in values,
                "result": result,
            }
        )
    return rows


def _numbers(readings: Sequence[Reading]) -> list[tuple[str, list[Markup | str]]]:
    """Everything the verdict rests on: a label, and a cell per measurement."""
    table: list[tuple[str, list[Markup | str]]] = []

    def row(label: str, cell: Callable[[Reading], Markup | str]) -> None:
        table.append((label, [cell(reading) for reading in readings]))

    def mean(arm: Which) -> Callable[[Reading], Markup | str]:
        def cell(reading: Reading) -> Markup | str:
            value = reading.mean(arm)
            if value is None:
                return "never finished"
            return Markup("{}{}").format(data_element(value, reading.value(value)), reading.unit)

        return cell

    def effect(reading: Reading, value: float | None) -> Markup | str:
        return "none" if value is None else data_element(value, reading.effect_with_unit(value))

    def interval(of: Callable[[Reading], tuple[float, float] | None]) -> Callable[[Reading], Markup | str]:
        return lambda reading: reading.interval(of(reading)) or "not bounded yet"

    def survives(reading: Reading) -> str:
        if reading.comparison.survives is None:
            return "not asked: no verdict" if reading.found.verdict == "open" else "not asked: the only one"
        return "survives" if reading.comparison.survives else "does not survive"

    def standardised(reading: Reading) -> Markup | str:
        if len(reading.effects) < 2:
            return "not known yet"
        if reading.spread == 0:
            return "no spread between the pairs"
        share = float(reading.effects.mean()) / reading.spread
        return data_element(share, signed(share, 2))

    def failed(reading: Reading) -> str:
        if not any(reading.found.failed):
            return "none"
        baseline, method = reading.found.failed
        return f"{baseline} of the baseline, {method} of the method"

    def correlation(reading: Reading) -> Markup | str:
        value = reading.found.correlation
        return "not known" if value is None else data_element(value, number(value, 2))

    def needed(reading: Reading) -> str:
        if reading.found.verdict != "open":
            return "settled"
        return "not known" if reading.found.needed is None else str(reading.found.needed)

    one = readings[0]
    kind = "Geometric mean" if one.ratio else "Mean"
    row(f"{kind} of the baseline", mean("baseline"))
    row(f"{kind} of the method", mean("method"))
    row(f"Effect: {kind.lower()} of {one.contrast}", lambda r: effect(r, r.found.effect))
    row(f"{one.level} confidence sequence (valid under peeking)", interval(lambda r: r.found.interval))
    row(f"{one.level} t interval (for a fixed number of {one.noun}s)", interval(lambda r: r.found.usual_interval))
    row("Standardised effect (positive is better)", standardised)
    row(
        f"Evidence (e-value; {1 / (1 - one.found.level):.0f} settles)",
        lambda r: data_element(r.found.e_value, evidence(r.found.e_value)),
    )
    row("Among all verdicts of this page (e-BH at 5 %)", survives)
    row(f"{one.noun.capitalize()}s", lambda r: str(r.found.seeds))
    row("The method is better on", lambda r: f"{r.found.wins} of {r.found.seeds}")
    row("Correlation between the arms", correlation)
    row(f"Effect when any one {one.noun} is left out", lambda r: r.interval(r.found.leave_one_out) or "not known yet")
    row("Failed trials (they count against their arm)", failed)
    if any(any(reading.found.failed) for reading in readings):
        row("Effect over pairs that finished", lambda r: effect(r, r.found.finished_only))
    if any(reading.found.verdict == "open" for reading in readings):
        row(f"{one.noun.capitalize()}s it would take", needed)
    return table


def _costs(reading: Reading) -> list[dict[str, str]]:
    costs = []
    for arm in ARMS:
        records = reading.records(arm)
        if not records:
            continue
        cpu, wall = (math.fsum(record.cost[name] for record in records) for name in ("cpu_seconds", "wall_seconds"))
        costs.append(
            {
                "arm": reading.arm(arm),
                "cpu": seconds(cpu / len(records)),
                "wall": seconds(wall / len(records)),
                "total": seconds(cpu),
                "memory": memory(max(record.cost["peak_memory_bytes"] for record in records)),
            }
        )
    return costs


def _surroundings(comparison: Comparison) -> list[tuple[str, str]]:
    """Where and when; several values where the trials differ."""
    records = list(comparison.records)

    def distinct(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value))

    def machine(host: Mapping[str, Any]) -> str:
        parts = [str(host.get("processor") or ""), f"{host['cores']} cores" if host.get("cores") else ""]
        if host.get("memory_bytes"):
            parts.append(memory(float(host["memory_bytes"])))
        return ", ".join(part for part in parts if part)

    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.versions.items():
            versions.setdefault(name, {})[version] = None
    days = sorted({stamp[:10] for record in records for stamp in (record.started, record.finished)})
    found = [
        ("Machine", distinct(machine(record.host) for record in records)),
        ("System", distinct(str(record.host.get("system") or "") for record in records)),
        ("Device", comparison.device),
        ("Measured", " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""),
        ("Versions", ", ".join(f"{name} {' / '.join(found)}" for name, found in sorted(versions.items()))),
    ]
    return [(name, text) for name, text in found if text]


# --- Cards ------------------------------------------------------------------------------------------------------------


def _markdown(text: str) -> Markup:
    """A section of a card as HTML; its headings come below the section's own (h4), without gaps."""
    parser = _parser()
    tokens = parser.parse(text)
    levels = sorted({token.tag for token in tokens if token.type == "heading_open"})
    previous = 4
    for token in tokens:
        if token.type == "heading_open":
            previous = min(5 + levels.index(token.tag), previous + 1, 6)
            token.tag = f"h{previous}"
        elif token.type == "heading_close":
            token.tag = f"h{previous}"
        elif token.type == "th_open":
            token.attrSet("scope", "col")
    return Markup(parser.renderer.render(tokens, parser.options, {}))


@cache
def _parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    # No raw HTML, and no pictures: a page that opens without a network must not ask for any.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n')
    parser.add_render_rule("fence", _code)
    parser.add_render_rule("code_block", _code)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return parser


def _code(renderer: Any, tokens: Sequence[Any], index: int, *_: Any) -> str:
    return Markup('<pre tabindex="0"><code>{}</code></pre>\n').format(tokens[index].content)
