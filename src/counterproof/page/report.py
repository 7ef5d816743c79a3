"""The report: everything measured as one HTML file that needs no network, no script and no server to be read.

What is shown, and in which words, is decided here; the templates only lay it out. Plots are drawn on a grid of 1000 by
1000 that the page stretches to the space there is; their labels are text of the page, so they keep their size.
"""

# ruff: noqa: RUF001 - minus and times signs are typeset

import base64
import errno
import hashlib
import math
import os
import re
import shlex
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from counterproof.bench.comparison import Comparison
from counterproof.bench.statistics import VerdictName, paired_effects
from counterproof.bench.task import Claim
from counterproof.bench.trials import Outcome, Record
from counterproof.errors import UserError
from counterproof.page.catalogue import ROOMS, Paper
from counterproof.page.results import judged_together

if TYPE_CHECKING:
    from jinja2 import Environment
    from markdown_it import MarkdownIt

__all__ = ["render", "write"]

Floats = NDArray[np.float64]
Which = Literal["baseline", "method"]
ARMS: tuple[Which, Which] = ("baseline", "method")
GRID = 1000  # units of a plot in either direction
CURVE_POINTS = 40  # of a mean, and of a seed's own line while there are few: together they get seven times as many
OUTCOMES: Mapping[Outcome, str] = {
    "ok": "finished",
    "raised": "raised an error",
    "diverged": "diverged",
    "memory": "ran out of memory",
    "time": "ran out of time",
    "killed": "was killed",
}
VERDICTS: Mapping[VerdictName, str] = {
    "holds": "the method is better, by more than the smallest effect that matters where one is set",
    "absent": "any improvement is smaller than the smallest effect that matters",
    "reversed": "the method is worse than the baseline",
    "open": "not resolved with these seeds",
}
Place = Literal["us", "here"]
PLACES: Mapping[Place, str] = {"us": "Measured by us", "here": "Measured on this machine"}
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
        ImportError: when the claims of a runnable paper cannot be imported.
        ValueError: when `made` is not ISO 8601.
    """
    moment = datetime.fromisoformat(made)
    slugs = [paper.slug for paper in papers]
    measured: dict[Place, dict[str, list[Comparison]]] = {
        "us": judged_together({slug: ours.get(slug, ()) for slug in slugs}),
        "here": judged_together({slug: local.get(slug, ()) for slug in slugs}),
    }
    views = [_paper_view(paper, {place: found[paper.slug] for place, found in measured.items()}) for paper in papers]
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
                    "runs": sum(view["paper"].status == "runs" for view in inside),
                }
                for room, inside in by_room.items()
                if inside
            ],
            papers=len(papers),
            runs=sum(paper.status == "runs" for paper in papers),
            claims=len(claims),
            verdicts=VERDICTS,
            count=Counter(claim["verdict"] for claim in claims),
            forest=_forest([claim for claim in claims if claim["sheets"]]),
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
    target = Path(os.path.realpath(out))
    remedy = "name another file with --out"
    temporary: Path | None = None
    try:
        if target.is_dir():
            raise UserError(f"{out} is a folder; {remedy}, e.g. {out / 'page.html'}")
        if target.exists() and not target.is_file():
            raise UserError(f"{out} is not a regular file; {remedy}")
        if not target.parent.is_dir():
            raise UserError(f"{out}: there is no folder {target.parent}; create it, or {remedy}")
        beside = target.parent / f".counterproof-{uuid.uuid4().hex}.tmp"
        with open(beside, "xb") as file:
            temporary = beside
            # Surrogates can come in with the messages of failed trials; UTF-8 has no place for them.
            file.write(html.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
        temporary = None
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk is full; free {len(html) / 1e6:.1f} MB there"
        elif problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = f"the folder {target.parent} may not be written to; make it writable"
        else:
            what = f"{problem.strerror or problem}; mend that"
        raise UserError(f"{out}: {what}, or {remedy}") from None
    finally:
        if temporary is not None:
            temporary.unlink()


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
    environment.filters["capital"] = _capital
    return environment


# --- Words and numbers ------------------------------------------------------------------------------------------------


def number(value: float, decimals: int | None = None) -> str:
    """A number for readers: four significant digits, or fixed decimals; a true minus, thin spaces between thousands."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    magnitude = math.floor(math.log10(size)) if size else 0
    digits = 2
    if decimals is None:
        decimals = max(0, 3 - magnitude) if size else 0
        scientific = size >= 1e6 or 0 < size < 1e-4
    else:
        scientific = size >= 1e7 or (0 < size < 1e-4 and decimals > 6)
        digits = max(0, decimals + magnitude) if size < 1 else 2
    if scientific:
        mantissa, _, exponent = f"{size:.{digits}e}".partition("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa} × 10{raised}"
    else:
        text = f"{size:,.{decimals}f}".replace(",", "\u202f")
    negative = value < 0 and re.search("[1-9]", text)
    return f"−{text}" if negative else text


def signed(value: float, decimals: int | None = None) -> str:
    text = number(value, decimals)
    return f"+{text}" if value > 0 and re.search("[1-9∞]", text) else text


def _evidence(e_value: float) -> str:
    return number(e_value, 0 if e_value >= 100 else 1 if e_value >= 10 else 2 if e_value >= 0.01 else None)


def seconds(value: float) -> str:
    if value < 120:
        return f"{number(value, 0 if value >= 10 else 1)} s"
    if value < 7200:
        return f"{number(value / 60, 0 if value >= 600 else 1)} min"
    return f"{number(value / 3600, 1)} h"


def memory(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _data(value: float, text: str, spec: str = ".17g") -> Markup:
    """What is printed, with the value for machines."""
    return Markup('<data value="{}">{}</data>').format(format(value, spec), text)


def _decimals(spread: float, size: float) -> int | None:
    """Decimals that print two digits of what varies, and three of what does not."""
    scale = max(spread, size / 20)
    return min(max(1 - math.floor(math.log10(scale)), 0), 9) if 0 < scale < math.inf else None


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _anchor(text: str) -> str:
    """Part of an id: papers and claims are called by words and hyphens, and this keeps it so."""
    return re.sub(r"[^\w-]", "-", text)


def _printable(text: str) -> str:
    """Without the control characters that terminals read and HTML forbids."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", text)


class _Reading:
    """A comparison with the words and decimals its numbers are printed in."""

    def __init__(self, comparison: Comparison, place: Place, *, alone: bool) -> None:
        self.comparison = comparison
        self.place = place
        self.title = PLACES[place] if alone else f"{PLACES[place]} ({comparison.device})"
        self.claim = claim = comparison.claim
        self.found = comparison.assessment
        self.metric = claim.task.metrics[claim.metric]
        self.unit = f"\u00a0{self.metric.unit}" if self.metric.unit else ""
        self.noun = claim.task.sample
        self.sign = 1.0 if claim.better == "higher" else -1.0
        self.ratio = claim.effect == "ratio"
        self.matters = 0.0  # the smallest effect that matters, as an improvement
        if claim.smallest is not None:
            self.matters = abs(math.log(claim.smallest)) if self.ratio else claim.smallest
        self.values = [
            (pair.baseline.value(claim.metric), pair.method.value(claim.metric)) for pair in comparison.pairs
        ]
        self.effects = np.array(paired_effects(self.values, claim.better, claim.effect))
        self.spread = float(self.effects.std(ddof=1)) if len(self.effects) > 1 else 0.0
        if self.spread < 1e-9 * np.abs(self.effects).max(initial=0.0):
            self.spread = 0.0  # rounding
        self.level = f"{self.found.level * 100:g} %"
        effect = self.found.effect or 0.0
        sizes = [abs(value) for pair in self.values for value in pair if value is not None]
        if self.ratio:
            decimals = _decimals(self.spread * effect, abs(effect))
            # Ratios over orders of magnitude have no decimals in common.
            self.decimals = None if decimals is None or self.spread > 1 else max(2, decimals)
            smallest, largest = min(sizes, default=0.0), max(sizes, default=0.0)
            wide = largest > 1000 * smallest
            self.value_decimals = None if wide else _decimals(self.spread * smallest, smallest)
        else:
            self.decimals = self.value_decimals = _decimals(self.spread, abs(effect) or max(sizes, default=0.0))

    # In the plots right is better, whatever the metric's direction: `improvement` is that coordinate.
    def improvement(self, effect: float) -> float:
        if not self.ratio:
            return self.sign * effect
        return self.sign * (math.log(effect) if effect > 0 else -math.inf)

    def natural(self, improvement: float) -> float:
        return math.exp(min(max(self.sign * improvement, -700.0), 700.0)) if self.ratio else self.sign * improvement

    def value(self, value: float) -> str:
        return number(value, self.value_decimals)

    def effect(self, value: float) -> str:
        return number(value, self.decimals) if self.ratio else signed(value, self.decimals)

    def effect_with_unit(self, value: float) -> str:
        return f"×\u00a0{self.effect(value)}" if self.ratio else f"{self.effect(value)}{self.unit}"

    def bounded(self, interval: tuple[float, float]) -> bool:
        return not (math.isinf(interval[1]) and (interval[0] == 0.0 if self.ratio else math.isinf(interval[0])))

    def interval(self, interval: tuple[float, float] | None) -> Markup | None:
        if interval is None or not self.bounded(interval):
            return None
        return Markup("{} to {}").format(*(_data(end, self.effect(end)) for end in interval))

    def interval_text(self, interval: tuple[float, float]) -> str:
        if not self.bounded(interval):
            return "no bounded interval yet"
        return f"{self.effect(interval[0])} to {self.effect(interval[1])}"

    def in_words(self, effect: float) -> str:
        """Size and direction: "0.031 lower, which is better"."""
        better = self.improvement(effect) > 0
        if not self.ratio:
            size = number(abs(effect), self.decimals)
            if not re.search("[1-9]", size):
                return "no difference"
            text = f"{size}{self.unit} {'higher' if effect > 0 else 'lower'}"
        elif effect == 1:
            return "no difference"
        elif 0.1 <= effect < 2:
            text = f"{number(abs(effect - 1) * 100, 1 if abs(effect - 1) < 0.1 else 0)} %"
            text += " higher" if effect > 1 else " lower"
        else:
            text = f"{number(effect)} times as high" if effect > 1 else f"{number(1 / effect)} times lower"
        return f"{text}, which is {'better' if better else 'worse'}"

    @property
    def smallest(self) -> str | None:
        """The smallest effect that matters, in the metric's own terms."""
        if self.claim.smallest is None or self.matters == 0:
            return None
        if self.ratio:
            return f"×\u00a0{self.claim.smallest:g}"
        return f"{'+' if self.sign > 0 else '−'}{self.claim.smallest:g}{self.unit}"

    @property
    def sentence(self) -> str:
        """The verdict, and what it rests on."""
        found, noun = self.found, self.noun
        beyond = f"the smallest effect that matters ({self.smallest})" if self.smallest else "no effect"
        if found.verdict == "holds":
            return f"The whole {self.level} confidence sequence lies beyond {beyond}, on the better side."
        if found.verdict == "reversed":
            return f"The whole {self.level} confidence sequence lies on the worse side of no effect."
        if found.verdict == "absent":
            return f"The whole {self.level} confidence sequence lies short of {beyond}."
        if 0 < max(found.failed) == found.seeds:
            which = " and of ".join(self.arm(arm) for arm, failed in zip(ARMS, found.failed) if failed == found.seeds)
            return f"Every trial of {which} failed."
        if found.effect is None:
            return f"No {noun} finished in both arms, so there is no effect to speak of."
        if found.seeds < 2:
            return f"One {noun} carries no evidence: it takes at least two."
        if found.needed is None:
            return f"With the mean and spread seen so far, 10\u202f000 {noun}s would not settle it."
        more = f"about {number(found.needed, 0)} {noun}s would settle it"
        return f"Not settled by {_count(found.seeds, noun)}; with the mean and spread seen so far, {more}."

    def arm(self, which: Which) -> str:
        arm = self.claim.baseline if which == "baseline" else self.claim.method
        return arm.name

    def records(self, which: Which) -> list[Record]:
        return [getattr(pair, which) for pair in self.comparison.pairs]

    def mean(self, which: Which) -> float | None:
        """Of the trials that finished; geometric where effects are ratios, so that it agrees with them."""
        finished = [value for pair in self.values if (value := pair[which == "method"]) is not None]
        if not finished:
            return None
        if self.ratio:
            return math.exp(math.fsum(map(math.log, finished)) / len(finished))
        return math.fsum(finished) / len(finished)

    def summary(self) -> str:
        """Effect and interval in one plain line."""
        if self.found.effect is None:
            return "no finished pair"
        return f"{self.effect_with_unit(self.found.effect)}, {self.interval_text(self.found.interval)}"


# --- Axes and plots ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A label at a share (percent) of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Maps values to the grid; what lies outside is clipped to the edge."""

    low: float
    high: float
    forward: Callable[[float], float]
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> int:
        return round(min(max(self._share(value), 0.0), 1.0) * GRID)

    def before(self, value: float) -> bool:
        return self._share(value) < -1e-9

    def beyond(self, value: float) -> bool:
        return self._share(value) > 1 + 1e-9

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
    labels = {tick: number(tick, None if 0 < abs(tick) < 1e-5 else n) for tick, n in zip(inside, places)}
    labels = {tick: label.replace(".00 ×", " ×") for tick, label in labels.items()}
    return Axis(
        start,
        stop,
        forward,
        tuple(Tick(round(100 * (forward(tick) - start) / (stop - start), 1), labels[tick]) for tick in inside),
    )


def _linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Ticks for positive values on a logarithmic axis: round numbers, spread evenly enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else []


def _value_axis(values: Iterable[float], *, log: bool, pad: float = 0.05) -> Axis:
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


@dataclass(frozen=True)
class Bar:
    """An interval on the grid; an end that is clipped or infinite is open."""

    low: int
    high: int
    open_low: bool
    open_high: bool


def _bar(axis: Axis, ends: tuple[float, float]) -> Bar:
    low, high = ends
    return Bar(axis.at(low), axis.at(high), axis.before(low), axis.beyond(high))


def _improvements(reading: _Reading, interval: tuple[float, float]) -> tuple[float, float]:
    first, second = (reading.improvement(end) for end in interval)
    return min(first, second), max(first, second)


def _effect_plot(readings: Sequence[_Reading]) -> dict[str, Any] | None:
    """Effects seed by seed with mean and intervals, one row per measurement, on one axis: right is better."""
    shown = [reading for reading in readings if reading.found.effect is not None]
    if not shown:
        return None
    one = shown[0]
    inner = [0.0, one.matters]
    outer: list[float] = []
    for reading in shown:
        inner += reading.effects.tolist()
        for interval in (reading.found.interval, reading.found.usual_interval):
            outer += [end for end in _improvements(reading, interval) if math.isfinite(end)]
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

    def bar(reading: _Reading, interval: tuple[float, float]) -> Bar | None:
        if not reading.bounded(interval):
            return None
        low, high = interval
        return _bar(axis, (low, high) if one.sign > 0 else (high, low))

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
                "alt": f"{reading.title}: effect {reading.summary()} "
                f"({reading.level} confidence sequence), {_count(found.seeds, reading.noun)}; "
                f"verdict {found.verdict}",
            }
        )
    return {
        "axis": axis,
        "rows": rows,
        "none": at(0.0),
        "matters": at(one.matters) if one.matters else None,
        "smallest": one.smallest,
        "label": ("method / baseline" if one.ratio else "method − baseline")
        + (f", {one.metric.unit}" if one.metric.unit and not one.ratio else ""),
        "noun": one.noun,
        "unbounded": any(row["sequence"] is None for row in rows),
        "level": one.level,
    }


def _pairs_plot(reading: _Reading) -> dict[str, Any] | None:
    """Baseline and method of every seed as a dumbbell."""
    values = [value for pair in reading.values for value in pair if value is not None]
    if not values:
        return None
    log = min(values) > 0 and max(values) / min(values) > 30
    axis = _value_axis(values, log=log)
    count = len(reading.values)
    height = 22 if count <= 16 else max(8, 352 // count)
    every = math.ceil(16 / height)
    rows = []
    drawn: dict[str, list[str]] = {kind: [] for kind in ("link", "link worse", "baseline", "method")}
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
    paths = {kind: "".join(pieces) for kind, pieces in drawn.items()}
    both = ", ".join(
        f"{reading.arm(arm)} {'never finished' if mean is None else f'mean {reading.value(mean)}{reading.unit}'}"
        for arm in ARMS
        for mean in [reading.mean(arm)]
    )
    return {
        "axis": axis,
        "rows": rows,
        "paths": [
            (kind, d)
            for kind, d in (
                ("link", paths["link"]),
                ("link worse", paths["link worse"]),
                ("baseline", paths["baseline"]),
                ("hole", paths["baseline"]),
                ("method", paths["method"]),
            )
            if d
        ],
        "height": height * count,
        "small": height < 14,
        "log": log,
        "alt": f"{reading.claim.metric} per {reading.noun}: {both}; the method is better on {reading.found.wins} "
        f"of {reading.found.seeds}.",
    }


def _curve_lines(
    reading: _Reading, x_key: str, y_key: str
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


def _curve_plot(reading: _Reading, x_key: str, y_key: str) -> dict[str, Any] | None:
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
    name = _words(y_key) + (f" ({metric.unit})" if metric is not None and metric.unit else "")
    over = {"step": "step", "progress": "share of the trial", "cost": "CPU seconds"}[x_key]
    told = []
    for arm in ARMS:
        if lines[arm]:
            xs, ys = means.get(arm) or lines[arm][0]
            kind = "mean of" if arm in means else "first of"
            told.append(
                f"{reading.arm(arm)}, {kind} {_count(len(lines[arm]), 'curve')}, goes from {ys[0]:.4g} at "
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


def _curves(reading: _Reading) -> dict[str, Any]:
    """Learning curves of the claim's metric, or of what was logged first; over cost too where it tells more."""
    logged = [point for record in reading.comparison.records for point in record.curve]
    names = list(dict.fromkeys(name for point in logged for name in point if name not in ("progress", "cost", "step")))
    if not names:
        return {"plots": [], "note": "", "key": (), "with": None}
    shown = reading.claim.metric if reading.claim.metric in names else names[0]
    points = [point for point in logged if shown in point]
    first = _curve_plot(reading, "step" if all("step" in point for point in points) else "progress", shown)
    plots = [first]
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


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- Views ------------------------------------------------------------------------------------------------------------


def _paper_view(paper: Paper, measured: Mapping[Place, Sequence[Comparison]]) -> dict[str, Any]:
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
        "short": _short(paper),
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
                curves = measurement["curves"]
                first = shown.setdefault(curves["key"], claim)
                if curves["plots"] and first is not claim:
                    measurement["curves"] = {**curves, "plots": [], "note": "", "with": first}


def _short(paper: Paper) -> str:
    """What the paper is called in a row: its title up to the colon, or its slug."""
    head, colon, _ = paper.title.partition(":")
    return head if colon and len(head) <= 32 else paper.title if len(paper.title) <= 32 else paper.slug


def _claim_view(
    paper: Paper, claim: Claim, introduces: bool, found: Mapping[Place, Sequence[Comparison]]
) -> dict[str, Any]:
    budgets = list(dict.fromkeys([*claim.task.budgets, *(c.budget for all_of in found.values() for c in all_of)]))
    sheets = []
    for budget in budgets:
        readings = [
            _Reading(comparison, place, alone=len({c.device for c in all_of}) == 1)
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
        "paper": paper,
        "short": _short(paper),
        "claim": claim,
        "says": _capital(claim.says),
        "metric": _words(claim.metric),
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


def _sheet(paper: Paper, claim: Claim, budget: str, readings: Sequence[_Reading]) -> dict[str, Any]:
    measurements = [_measurement(reading) for reading in readings]
    return {
        "id": f"{_anchor(paper.slug)}/{_anchor(claim.name)}/{_anchor(budget)}",
        "budget": budget,
        "planned": _planned(readings[0].claim, budget),
        "readings": readings,
        "measurements": measurements,
        "first": measurements[0],
        "effect_plot": _effect_plot(readings),
        "beside": _beside(readings),
        "numbers": _numbers(readings),
        "curves": any(measurement["curves"]["plots"] for measurement in measurements),
        "command": _command(paper, claim, budget),
    }


def _planned(claim: Claim, budget: str) -> str:
    limits = claim.task.budgets[budget]
    fewest, most = claim.seeds or limits.seeds
    settings = {**limits.settings, **claim.settings}
    parts = [f"{_words(str(name))} {value}" for name, value in settings.items()]
    parts.append(f"{fewest} to {most} {claim.task.sample}s")
    parts.append("no time limit" if limits.minutes is None else f"{limits.minutes:g} minutes times the number of jobs")
    return ", ".join(parts)


def _beside(readings: Sequence[_Reading]) -> dict[str, Any] | None:
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


def _measurement(reading: _Reading) -> dict[str, Any]:
    comparison, found = reading.comparison, reading.found
    failures = [
        {
            "arm": reading.arm(arm),
            "seed": record.seed,
            "outcome": OUTCOMES[record.outcome],
            "message": _printable(record.message).strip()[-4000:] or "no message was recorded",
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
        "effect": None if found.effect is None else _data(found.effect, reading.effect_with_unit(found.effect)),
        "words": None if found.effect is None else reading.in_words(found.effect),
        "interval": reading.interval(found.interval),
        "level": reading.level,
        "seeds": _count(found.seeds, reading.noun),
        "device": comparison.device,
        "stale": [_printable(reason) for reason in comparison.stale],
        "failures": failures,
        "wins": found.wins,
        "count": found.seeds,
        "noun": reading.noun,
        "metric": _words(reading.claim.metric),
        "better": reading.claim.better,
        "unit": reading.metric.unit,
        "arms": {arm: reading.arm(arm) for arm in ARMS},
        "pairs": _pairs_plot(reading),
        "rows": _rows(reading),
        "difference": "ratio" if reading.ratio else "difference",
        "curves": _curves(reading),
        "costs": _costs(reading),
        "total": seconds(comparison.seconds),
        "environment": _surroundings(comparison),
    }


def _rows(reading: _Reading) -> list[dict[str, Any]]:
    rows = []
    for index, (pair, (baseline, method)) in enumerate(zip(reading.comparison.pairs, reading.values)):
        effect = None
        if len(reading.effects):
            natural = reading.natural(float(reading.effects[index]))
            effect = _data(natural, reading.effect(natural), ".8g")
        rows.append(
            {
                "seed": pair.seed,
                "baseline": OUTCOMES[pair.baseline.outcome]
                if baseline is None
                else _data(baseline, reading.value(baseline), ".8g"),
                "method": OUTCOMES[pair.method.outcome]
                if method is None
                else _data(method, reading.value(method), ".8g"),
                "effect": effect,
                "counted": baseline is None or method is None,
                "result": _result(float(reading.effects[index])) if len(reading.effects) else "",
            }
        )
    return rows


def _result(improvement: float) -> str:
    return "better" if improvement > 0 else "worse" if improvement < 0 else "tie"


def _numbers(readings: Sequence[_Reading]) -> list[tuple[str, list[Markup | str]]]:
    """Everything the verdict rests on: a label, and a cell per measurement."""
    table: list[tuple[str, list[Markup | str | None]]] = []

    def row(label: str, cell: Callable[[_Reading], Markup | str | None]) -> None:
        table.append((label, [cell(reading) for reading in readings]))

    def mean(arm: Which) -> Callable[[_Reading], Markup | str | None]:
        def cell(reading: _Reading) -> Markup | str:
            value = reading.mean(arm)
            if value is None:
                return "never finished"
            return Markup("{}{}").format(_data(value, reading.value(value)), reading.unit)

        return cell

    def effect(reading: _Reading, value: float | None) -> Markup | str:
        return "none" if value is None else _data(value, reading.effect_with_unit(value))

    def interval(of: Callable[[_Reading], tuple[float, float] | None]) -> Callable[[_Reading], Markup | str]:
        return lambda reading: reading.interval(of(reading)) or "not bounded yet"

    def survives(reading: _Reading) -> str:
        if reading.comparison.survives is None:
            return "not asked: no verdict" if reading.found.verdict in ("open", "absent") else "not asked: the only one"
        return "survives" if reading.comparison.survives else "does not survive"

    def standardised(reading: _Reading) -> Markup | str:
        if len(reading.effects) < 2:
            return "not known yet"
        mean = float(reading.effects.mean())
        if reading.spread == 0:
            return "no spread between the pairs"
        return _data(mean / reading.spread, signed(mean / reading.spread, 2))

    def failed(reading: _Reading) -> str:
        if not any(reading.found.failed):
            return "none"
        baseline, method = reading.found.failed
        return f"{baseline} of the baseline, {method} of the method"

    one = readings[0]
    kind = "Geometric mean" if one.ratio else "Mean"
    row(f"{kind} of the baseline", mean("baseline"))
    row(f"{kind} of the method", mean("method"))
    row(
        f"Effect: {kind.lower()} of {'method / baseline' if one.ratio else 'method − baseline'}",
        lambda r: effect(r, r.found.effect),
    )
    row(f"{one.level} confidence sequence (valid under peeking)", interval(lambda reading: reading.found.interval))
    row(f"{one.level} t interval (for a fixed number of {one.noun}s)", interval(lambda r: r.found.usual_interval))
    row("Standardised effect (positive is better)", standardised)
    row(
        f"Evidence (e-value; {1 / (1 - one.found.level):.0f} settles)",
        lambda r: _data(r.found.e_value, _evidence(r.found.e_value)),
    )
    row("Among all verdicts of this page (e-BH at 5 %)", survives)
    row(f"{one.noun.capitalize()}s", lambda r: str(r.found.seeds))
    row("The method is better on", lambda r: f"{r.found.wins} of {r.found.seeds}")
    row(
        "Correlation between the arms",
        lambda r: (
            "not known" if r.found.correlation is None else _data(r.found.correlation, number(r.found.correlation, 2))
        ),
    )
    row(f"Effect when any one {one.noun} is left out", lambda r: r.interval(r.found.leave_one_out) or "not known yet")
    row("Failed trials (they count against their arm)", failed)
    if any(any(reading.found.failed) for reading in readings):
        row("Effect over pairs that finished", lambda r: effect(r, r.found.finished_only))
    if any(reading.found.verdict == "open" for reading in readings):
        row(
            f"{one.noun.capitalize()}s it would take",
            lambda r: (
                "settled"
                if r.found.verdict != "open"
                else "not known"
                if r.found.needed is None
                else str(r.found.needed)
            ),
        )
    return [(label, [cell if cell is not None else "" for cell in cells]) for label, cells in table]


def _costs(reading: _Reading) -> list[dict[str, str]]:
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


def _forest(claims: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A row per measured claim on one axis: the improvement in standard deviations of the paired effects."""
    if not claims:
        return None

    def standardised(reading: _Reading) -> dict[str, float] | None:
        if len(reading.effects) < 2:
            return None
        mean = float(reading.effects.mean())
        low, high = _improvements(reading, reading.found.interval)
        if reading.spread == 0:  # equal effects are any number of standard deviations away from what they are not
            return {
                name: math.copysign(math.inf, value) if value else 0.0
                for name, value in (("mean", mean), ("low", low), ("high", high), ("matters", reading.matters))
            }
        scaled = {"mean": mean, "low": low, "high": high, "matters": reading.matters}
        return {name: value / reading.spread for name, value in scaled.items()}

    rows: list[dict[str, Any]] = []
    for claim in claims:
        sheet = claim["headline"]
        first = sheet["first"]
        rows.append(
            {
                "claim": claim,
                "anchor": claim["id"],
                "verdict": first["verdict"],
                "survives": first["survives"],
                "effect": first["effect"],
                "interval": first["interval"],
                "words": first["words"],
                "seeds": first["seeds"],
                "budget": sheet["budget"],
                "here": first["place"] == "here",
                "places": [(reading, standardised(reading)) for reading in sheet["readings"]],
            }
        )
    finite = [
        value
        for row in rows
        for _, scaled in row["places"]
        if scaled
        for value in scaled.values()
        if math.isfinite(value)
    ]
    low, high = max(min([-1.0, *finite]), -100.0), min(max([3.0, *finite]), 300.0)
    ticks = [-100.0, -30.0, -10.0, -3.0, -1.0, 0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
    axis = _axis(low, high, math.asinh, ticks, pad=0.03)
    for row in rows:
        marks = []
        told = []
        for reading, scaled in row.pop("places"):
            if scaled is None:
                continue
            bounded = reading.bounded(reading.found.interval)
            low, high = (signed(scaled[end], 1) for end in ("low", "high"))
            marks.append(
                {
                    "place": reading.place,
                    "mean": axis.at(scaled["mean"]),
                    "bar": _bar(axis, (scaled["low"], scaled["high"])) if bounded else None,
                    "matters": axis.at(scaled["matters"]) if scaled["matters"] > 0 else None,
                }
            )
            if reading.spread == 0:
                told.append(f"{reading.title}: the same effect on all {_count(len(reading.effects), 'pair')}")
            else:
                within = f"{low} to {high}" if bounded else "not bounded yet"
                told.append(f"{reading.title}: {signed(scaled['mean'], 1)} standard deviations, {within}")
        row["marks"] = marks
        row["alt"] = "; ".join(told) or "Fewer than two pairs: no standard deviation"
    count = Counter(row["verdict"] for row in rows)
    told = [f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict]]
    return {"axis": axis, "none": axis.at(0.0), "rows": rows, "told": ", ".join(told)}


# --- Cards ------------------------------------------------------------------------------------------------------------


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
