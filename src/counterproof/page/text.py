"""Comparisons as plain text: for the terminal, and for the README's table."""

import math

from counterproof.bench.comparison import Comparison
from counterproof.bench.task import Claim

__all__ = ["duration", "effect_text", "full_text", "interval_text", "number", "verdict_line"]


def number(value: float | None, digits: int = 3) -> str:
    """A number at `digits` significant digits, without an exponent where it can be read."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 7:
        return f"{value:.{max(0, digits - 1 - size)}f}"
    return f"{value:.{digits - 1}e}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def effect_text(claim: Claim, value: float | None) -> str:
    """An effect with its sign or as a factor, and its unit."""
    if value is None:
        return "-"
    if claim.effect == "ratio":
        return f"{number(value)}x"
    unit = claim.task.metrics[claim.metric].unit
    return f"{'+' if value > 0 else ''}{number(value)}{' ' + unit if unit else ''}"


def interval_text(claim: Claim, bounds: tuple[float, float]) -> str:
    if claim.effect == "ratio":
        return f"[{number(bounds[0])}, {number(bounds[1])}]"
    return f"[{number(bounds[0])}, {'+' if 0 < bounds[1] < math.inf else ''}{number(bounds[1])}]"


def smallest_text(claim: Claim) -> str:
    if claim.smallest is None:
        return "any improvement counts"
    if claim.effect == "ratio":
        return f"matters {'below' if claim.better == 'lower' else 'above'} {number(claim.smallest)}x"
    unit = claim.task.metrics[claim.metric].unit
    return f"matters from {number(claim.smallest)}{' ' + unit if unit else ''} on"


def verdict_line(comparison: Comparison) -> str:
    """One line: which claim, verdict, effect, interval, evidence, seeds."""
    claim, found = comparison.claim, comparison.assessment
    mark = "" if comparison.survives in (None, True) else " (does not survive e-BH)"
    return (
        f"{claim.paper}/{claim.name}: {found.verdict.upper()}{mark}  {claim.metric} "
        f"{effect_text(claim, found.effect)} {interval_text(claim, found.interval)}, "
        f"e = {number(found.e_value)}, {found.seeds} {claim.task.sample}s"
    )


def full_text(comparison: Comparison) -> str:
    """The verdict with everything it rests on."""
    claim, found = comparison.claim, comparison.assessment
    metric = claim.task.metrics[claim.metric]
    baseline, method = comparison.arm("baseline"), comparison.arm("method")
    kind = "ratio" if claim.effect == "ratio" else "difference"
    lines = [
        verdict_line(comparison),
        f"  claim      {claim.says}",
        f"             {claim.metric}{f' ({metric.unit})' if metric.unit else ''}, {claim.better} is better; "
        f"{smallest_text(claim)}",
        f"  task       {claim.task.name}, budget {comparison.budget}, {comparison.device}",
    ]
    names = [claim.task.sample, claim.baseline.name, claim.method.name, kind]
    rows = [
        [
            str(pair.seed),
            *(_cell(comparison, pair, which) for which in ("baseline", "method")),
            _effect(comparison, pair),
        ]
        for pair in comparison.pairs
    ]
    rows.append(["mean", number(baseline["mean"]), number(method["mean"]), effect_text(claim, found.effect)])
    widths = [max(len(row[column]) for row in [names, *rows]) for column in range(4)]
    for row in [names, *rows]:
        lines.append("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    against = "no effect" if found.verdict == "reversed" or claim.smallest is None else "the smallest that matters"
    lines += [
        f"  evidence   e = {number(found.e_value)} against {against} ({number(1 / (1 - found.level))} settles it); "
        f"{found.level:.0%} confidence sequence {interval_text(claim, found.interval)}",
        f"  also       t interval {interval_text(claim, found.usual_interval)}, "
        f"better on {found.wins} of {found.seeds}"
        + (f", correlation of the arms {number(found.correlation, 2)}" if found.correlation is not None else "")
        + (f", leaving one out {interval_text(claim, found.leave_one_out)}" if found.leave_one_out else ""),
    ]
    if any(found.failed):
        lines.append(
            f"  failed     {found.failed[0]} of {claim.baseline.name}, {found.failed[1]} of {claim.method.name}; each "
            f"counts against its arm. Finished pairs only: {effect_text(claim, found.finished_only)}"
        )
        lines += [
            f"             {record.arm} {record.seed}: {record.outcome}: {record.message.strip().splitlines()[-1]}"
            f" (counterproof runs show {record.key[:10]})"
            for record in comparison.failed
        ]
    if found.verdict == "open":
        lines.append(
            f"  open       it would take about {found.needed} {claim.task.sample}s at this mean and spread"
            if found.needed
            else "  open       more seeds would not settle it at this mean and spread"
        )
    if claim.reported:
        lines.append(f"  reported   {claim.reported}")
    cost = comparison.as_json()["cpu_seconds"]
    lines.append(
        f"  cost       {duration(comparison.seconds)} of trials; CPU {duration(cost['baseline'])} for "
        f"{claim.baseline.name}, {duration(cost['method'])} for {claim.method.name}"
        + (", all from the journal" if comparison.cached else "")
    )
    return "\n".join(lines)


def _cell(comparison: Comparison, pair: object, which: str) -> str:
    record = getattr(pair, which)
    return number(record.value(comparison.claim.metric)) if record.outcome == "ok" else str(record.outcome)


def _effect(comparison: Comparison, pair: object) -> str:
    claim = comparison.claim
    baseline, method = (getattr(pair, which).value(claim.metric) for which in ("baseline", "method"))
    if baseline is None or method is None:
        return "-"
    return effect_text(claim, method / baseline if claim.effect == "ratio" else method - baseline)
