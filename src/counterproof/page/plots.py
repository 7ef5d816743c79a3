"""The report's plots, as what the templates draw.

A plot is a grid of 1000 by 1000 that the page stretches to the space there is. Its labels are text of the page, so they
keep their size, and its `alt` says in numbers what it shows. Right is better wherever effects are drawn.
"""

# ruff: noqa: RUF001 - minus and times signs are typeset

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterproof.page.typeset import ARMS, VERDICTS, Reading, Which, counted, number, signed, words

Floats = NDArray[np.float64]
GRID = 1000  # units of a plot in either direction
MOST_TICKS = 5
CURVE_POINTS = 40  # of a mean, and of a seed's own line while there are few: together they get seven times as many


# --- Axes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A label at a share (percent) of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """An interval on the grid; an end that is clipped or infinite is open."""

    low: int
    high: int
    open_low: bool
    open_high: bool


@dataclass(frozen=True)
class Axis:
    """Maps values to the grid; what lies outside is clipped to the edge."""

    low: float
    high: float
    forward: Callable[[float], float]
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> int:
        return round(min(max(self._share(value), 0.0), 1.0) * GRID)

    def bar(self, low: float, high: float) -> Bar:
        clipped = self._share(low) < -1e-9, self._share(high) > 1 + 1e-9
        return Bar(self.at(low), self.at(high), *clipped)

    def _share(self, value: float) -> float:
        return (self.forward(value) - self.low) / (self.high - self.low)


def _axis(
    low: float, high: float, forward: Callable[[float], float], ticks: Iterable[float], pad: float = 0.05
) -> Axis:
    """An axis from the value `low` (left or bottom) to `high`, with the ticks that lie on it."""
    ends = forward(low), forward(high)
    room = pad * (ends[1] - ends[0])
    start, stop = ends[0] - room, ends[1] + room
    inside = [tick for tick in ticks if start <= forward(tick) <= stop]
    # As many decimals as the finest tick needs, so that labels of one axis agree; not over orders of magnitude.
    places = [len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in inside]
    sizes = [abs(tick) for tick in inside if tick]
    if sizes and max(sizes) / min(sizes) < 50:
        places = [max(places)] * len(places)
    labels = [number(tick, None if 0 < abs(tick) < 1e-5 else n) for tick, n in zip(inside, places)]
    shares = [round(100 * (forward(tick) - start) / (stop - start), 1) for tick in inside]
    return Axis(start, stop, forward, tuple(Tick(at, n.replace(".00 ×", " ×")) for at, n in zip(shares, labels)))


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Ticks for positive values on a logarithmic axis: round numbers, spread evenly enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / MOST_TICKS) or 1]


def _value_axis(values: Iterable[float], *, log: bool, pad: float = 0.05) -> Axis:
    """An axis of round ticks over all these values, logarithmic if asked for and if they are not all the same."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        widen = abs(low) * 0.1 or 1.0
        low, high, log = low - widen, high + widen, False
    if log and high / low > 2.5:
        return _axis(low, high, math.log10, _log_ticks(low, high), pad)
    return _axis(low, high, math.log10 if log else float, _linear_ticks(low, high), pad)


def _path(xs: Iterable[int], ys: Iterable[int]) -> str:
    """A line in relative moves: the shortest way to write it."""
    points = list(zip(xs, ys, strict=True))
    start = f"M{points[0][0]} {points[0][1]}"
    steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(points)] or [(0, 0)]
    return start + "l" + " ".join(f"{dx} {dy}" for dx, dy in steps).replace(" -", "-")


# --- All claims -------------------------------------------------------------------------------------------------------


def forest(claims: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A row per measured claim on one axis: the improvement in standard deviations of the paired effects.

    Args:
        claims: the report's views of claims, each with a measurement; its `headline` is drawn.
    """
    if not claims:
        return None
    measured = [[(reading, _standardised(reading)) for reading in claim["headline"]["readings"]] for claim in claims]
    finite = [
        value
        for places in measured
        for _, scaled in places
        if scaled
        for value in scaled.values()
        if math.isfinite(value)
    ]
    least, most = max(min([-1.0, *finite]), -100.0), min(max([3.0, *finite]), 300.0)
    ticks = [-100.0, -30.0, -10.0, -3.0, -1.0, 0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
    axis = _axis(least, most, math.asinh, ticks, pad=0.03)
    rows: list[dict[str, Any]] = []
    for claim, places in zip(claims, measured):
        marks = []
        told = []
        for reading, scaled in places:
            if scaled is None:
                continue
            bounded = reading.bounded(reading.found.interval)
            marks.append(
                {
                    "place": reading.place,
                    "mean": axis.at(scaled["mean"]),
                    "bar": axis.bar(scaled["low"], scaled["high"]) if bounded else None,
                    "matters": axis.at(scaled["matters"]) if scaled["matters"] > 0 else None,
                }
            )
            if reading.spread == 0:
                told.append(f"{reading.title}: the same effect on all {counted(len(reading.effects), 'pair')}")
            else:
                mean, low, high = (signed(scaled[name], 1) for name in ("mean", "low", "high"))
                within = f"{low} to {high}" if bounded else "not bounded yet"
                told.append(f"{reading.title}: {mean} standard deviations, {within}")
        first = claim["headline"]["first"]
        rows.append(
            {
                "claim": claim,
                "verdict": first["verdict"],
                "survives": first["survives"],
                "effect": first["effect"],
                "interval": first["interval"],
                "seeds": first["seeds"],
                "budget": claim["headline"]["budget"],
                "here": first["place"] == "here",
                "marks": marks,
                "alt": "; ".join(told) or "Fewer than two pairs: no standard deviation",
            }
        )
    count = Counter(row["verdict"] for row in rows)
    told = [f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict]]
    return {"axis": axis, "none": axis.at(0.0), "rows": rows, "told": ", ".join(told)}


def _standardised(reading: Reading) -> dict[str, float] | None:
    """Mean, interval and smallest effect that matters in standard deviations; None for fewer than two pairs."""
    if len(reading.effects) < 2:
        return None
    low, high = reading.improvements(reading.found.interval)
    values = {"mean": float(reading.effects.mean()), "low": low, "high": high, "matters": reading.matters}
    if reading.spread == 0:  # equal effects are any number of standard deviations away from what they are not
        return {name: math.copysign(math.inf, value) if value else 0.0 for name, value in values.items()}
    return {name: value / reading.spread for name, value in values.items()}


# --- Seed by seed -----------------------------------------------------------------------------------------------------


def effect_plot(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """Effects seed by seed with mean and intervals, one row per measurement, on one axis; None without an effect."""
    shown = [reading for reading in readings if reading.found.effect is not None]
    if not shown:
        return None
    one = shown[0]
    inner = [0.0, one.matters]
    outer: list[float] = []
    for reading in shown:
        inner += reading.effects.tolist()
        for interval in (reading.found.interval, reading.found.usual_interval):
            outer += [end for end in reading.improvements(interval) if math.isfinite(end)]
    low, high = min(inner), max(inner)
    # An interval may be far wider than what it is about; then it leaves the plot, and its ends are in the text.
    reach = (high - low) or 1.0
    low = max(min([low, *outer]), low - 1.5 * reach)
    high = min(max([high, *outer]), high + 1.5 * reach)
    if low == high:
        low, high = -1.0, 1.0
    left, right = one.natural(low), one.natural(high)
    least, most = min(left, right), max(left, right)
    ticks = _log_ticks(least, most) if one.ratio and most / least > 2.5 else _linear_ticks(least, most)
    axis = _axis(left, right, one.improvement, ticks)

    def at(improvement: float) -> int:
        return axis.at(one.natural(improvement))

    def bar(reading: Reading, interval: tuple[float, float]) -> Bar | None:
        if not reading.bounded(interval):
            return None
        low, high = interval if one.sign > 0 else interval[::-1]
        return axis.bar(low, high)

    rows = []
    for reading in shown:
        found = reading.found
        assert found.effect is not None
        rows.append(
            {
                "title": reading.title,
                "verdict": found.verdict,
                "dots": sorted({at(value) for value in reading.effects.tolist()}),
                "mean": axis.at(found.effect),
                "sequence": bar(reading, found.interval),
                "usual": bar(reading, found.usual_interval),
                "alt": f"{reading.title}: effect {reading.effect_with_unit(found.effect)}, "
                f"{reading.interval_text(found.interval)} ({reading.level} confidence sequence), "
                f"{counted(found.seeds, reading.noun)}; verdict {found.verdict}",
            }
        )
    return {
        "axis": axis,
        "rows": rows,
        "none": at(0.0),
        "matters": at(one.matters) if one.matters else None,
        "smallest": one.smallest,
        "label": one.contrast + (f", {one.metric.unit}" if one.metric.unit and not one.ratio else ""),
        "noun": one.noun,
        "unbounded": any(row["sequence"] is None for row in rows),
        "level": one.level,
    }


def pairs_plot(reading: Reading) -> dict[str, Any] | None:
    """Baseline and method of every seed as a dumbbell; None when no trial finished."""
    values = [value for pair in reading.values for value in pair if value is not None]
    if not values:
        return None
    log = min(values) > 0 and max(values) / min(values) > 30
    axis = _value_axis(values, log=log)
    count = len(reading.values)
    height = 22 if count <= 16 else max(8, 352 // count)
    every = math.ceil(16 / height)
    rows = []
    drawn: dict[str, list[str]] = {kind: [] for kind in ("link", "link worse", "baseline", "hole", "method")}
    for index, (pair, values_of) in enumerate(zip(reading.comparison.pairs, reading.values)):
        y = round((index + 0.5) * height)
        at = [None if value is None else axis.at(value) for value in values_of]
        failed = " and ".join(arm for arm, x in zip(ARMS, at) if x is None)
        # Where the other arm's dot is not.
        side = "right" if any(x is not None and x <= GRID / 2 for x in at) else "left"
        rows.append({"label": str(pair.seed) if index % every == 0 else "", "y": y, "failed": failed, "side": side})
        for arm, x in zip(ARMS, at):
            if x is not None:
                drawn[arm].append(f"M{x} {y}h0")
        if not failed:
            drawn["link" if reading.effects[index] > 0 else "link worse"].append(f"M{at[0]} {y}H{at[1]}")
    drawn["hole"] = drawn["baseline"]
    both = ", ".join(
        f"{reading.arm(arm)} {'never finished' if mean is None else f'mean {reading.value(mean)}{reading.unit}'}"
        for arm in ARMS
        for mean in [reading.mean(arm)]
    )
    return {
        "axis": axis,
        "rows": rows,
        "paths": [(kind, "".join(pieces)) for kind, pieces in drawn.items() if pieces],
        "height": height * count,
        "small": height < 14,
        "log": log,
        "alt": f"{reading.claim.metric} per {reading.noun}: {both}; the method is better on {reading.found.wins} "
        f"of {reading.found.seeds}.",
    }


# --- Learning curves --------------------------------------------------------------------------------------------------


def curves(reading: Reading) -> dict[str, Any]:
    """Learning curves of the claim's metric, or of what was logged first; over cost too where it tells more.

    Beside the plots: a note on what the arms spend, and a key that measurements with the same curves share. `with` is
    for the claim whose curves stand for these.
    """
    logged = [point for record in reading.comparison.records for point in record.curve]
    names = list(dict.fromkeys(name for point in logged for name in point if name not in ("progress", "cost", "step")))
    if not names:
        return {"plots": [], "note": "", "key": (), "with": None}
    shown = reading.claim.metric if reading.claim.metric in names else names[0]
    stepped = all("step" in point for point in logged if shown in point)
    plots = [_curve_plot(reading, "step" if stepped else "progress", shown)]
    spent = [
        math.fsum(costs) / len(costs)
        for arm in ARMS
        if (costs := [record.curve[-1].get("cost", 0.0) for record in reading.records(arm) if record.curve])
    ]
    note = ""
    if len(spent) == 2 and min(spent) > 0:
        share = spent[1] / spent[0] - 1
        if abs(share) > 0.05:
            plots.append(_curve_plot(reading, "cost", shown))
            note = (
                f"To the end of its curve {reading.arm('method')} spends {number(abs(share) * 100, 0)} % "
                f"{'more' if share > 0 else 'less'} CPU time than {reading.arm('baseline')}."
            )
        else:
            note = "Both arms spend the same CPU time to within 5 %, so over cost the curves look the same."
    key = (shown, *(record.uid for record in reading.comparison.records))
    return {"plots": [plot for plot in plots if plot is not None], "note": note, "key": key, "with": None}


def _curve_plot(reading: Reading, x_key: str, y_key: str) -> dict[str, Any] | None:
    """What was logged as `y_key` over `x_key` ("step", "progress" or "cost"); None when nothing was."""
    lines, means = _curve_lines(reading, x_key, y_key)
    drawn = [line for arm in ARMS for line in lines[arm]]
    if not drawn:
        return None
    heights = np.concatenate([ys for _, ys in drawn])
    low, high = float(heights.min()), float(heights.max())
    log = low > 0 and high / low > 30
    y_axis = _value_axis((low, high), log=log)
    x_axis = _value_axis((x for xs, _ in drawn for x in (float(xs[0]), float(xs[-1]))), log=False, pad=0.01)
    points = max(12, min(CURVE_POINTS, 7 * CURVE_POINTS // len(drawn)))

    def path(line: tuple[Floats, Floats], most: int) -> str:
        xs, ys = line
        chosen = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), most)).round().astype(int))
        return _path((x_axis.at(float(xs[i])) for i in chosen), (GRID - y_axis.at(float(ys[i])) for i in chosen))

    metric = reading.claim.task.metrics.get(y_key)
    name = words(y_key) + (f" ({metric.unit})" if metric is not None and metric.unit else "")
    over = {"step": "step", "progress": "share of the trial", "cost": "CPU seconds"}[x_key]
    told = []
    for arm in ARMS:
        if lines[arm]:
            xs, ys = means.get(arm) or lines[arm][0]
            kind = "mean of" if arm in means else "first of"
            told.append(
                f"{reading.arm(arm)}, {kind} {counted(len(lines[arm]), 'curve')}, goes from {ys[0]:.4g} at "
                f"{xs[0]:.4g} to {ys[-1]:.4g} at {xs[-1]:.4g}"
            )
    return {
        "name": name,
        "over": over,
        "log": log,
        "x": x_axis,
        "y": y_axis,
        "lines": [(arm, "".join(path(line, points) for line in lines[arm])) for arm in ARMS if lines[arm]],
        "means": [(arm, path(means[arm], CURVE_POINTS)) for arm in ARMS if arm in means],
        "alt": f"{name} over {over}. " + "; ".join(told) + ".",
    }


def _curve_lines(
    reading: Reading, x_key: str, y_key: str
) -> tuple[dict[Which, list[tuple[Floats, Floats]]], dict[Which, tuple[Floats, Floats]]]:
    """Every trial's curve by arm, and the mean of each arm over the range that all its curves share."""
    lines: dict[Which, list[tuple[Floats, Floats]]] = {}
    means: dict[Which, tuple[Floats, Floats]] = {}
    for arm in ARMS:
        lines[arm] = []
        for record in reading.records(arm):
            points = sorted((point[x_key], point[y_key]) for point in record.curve if y_key in point and x_key in point)
            if points:
                xs, ys = np.array(points, dtype=np.float64).T
                lines[arm].append((xs, ys))
        if len(lines[arm]) < 2:
            continue
        start = max(float(xs[0]) for xs, _ in lines[arm])
        stop = min(float(xs[-1]) for xs, _ in lines[arm])
        if start < stop:
            grid = np.linspace(start, stop, min(CURVE_POINTS, max(len(xs) for xs, _ in lines[arm])))
            means[arm] = grid, np.mean([np.interp(grid, xs, ys) for xs, ys in lines[arm]], axis=0)
    return lines, means
