"""The report's words and numbers: what is printed, and to how many digits.

For HTML: minus and times signs are typeset, units do not break off, and numbers carry their exact value for machines.
The terminal's are in `counterproof.page.text`.
"""

# ruff: noqa: RUF001 - minus and times signs are typeset

import math
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
from markupsafe import Markup

from counterproof.bench.comparison import Comparison
from counterproof.bench.statistics import VerdictName, paired_effects
from counterproof.bench.trials import Outcome, Record

Which = Literal["baseline", "method"]
ARMS: tuple[Which, Which] = ("baseline", "method")
Place = Literal["us", "here"]
PLACES: Mapping[Place, str] = {"us": "Measured by us", "here": "Measured on this machine"}
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


# --- Numbers ----------------------------------------------------------------------------------------------------------


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
    """As `number`, with a plus before what is above zero as printed."""
    text = number(value, decimals)
    return f"+{text}" if value > 0 and re.search("[1-9∞]", text) else text


def evidence(e_value: float) -> str:
    """An e-value: three digits around the thresholds that matter, whole numbers from a hundred on."""
    return number(e_value, 0 if e_value >= 100 else 1 if e_value >= 10 else 2 if e_value >= 0.01 else None)


def seconds(value: float) -> str:
    """A duration in seconds, minutes or hours, to two or three digits."""
    if value < 120:
        return f"{number(value, 0 if value >= 10 else 1)} s"
    if value < 7200:
        return f"{number(value / 60, 0 if value >= 600 else 1)} min"
    return f"{number(value / 3600, 1)} h"


def memory(value: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def data_element(value: float, text: str, spec: str = ".17g") -> Markup:
    """What is printed, with the value for machines in the format `spec`."""
    return Markup('<data value="{}">{}</data>').format(format(value, spec), text)


def _decimals(spread: float, size: float) -> int | None:
    """Decimals that print two digits of what varies, and three of what does not."""
    scale = max(spread, size / 20)
    return min(max(1 - math.floor(math.log10(scale)), 0), 9) if 0 < scale < math.inf else None


# --- Words ------------------------------------------------------------------------------------------------------------


def counted(n: int, noun: str) -> str:
    """How many, with the noun in its number: "1 seed", "8 seeds"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def words(name: str) -> str:
    """A name of code as words."""
    return name.replace("_", " ")


def capital(text: str) -> str:
    """With a capital first letter, and the rest as it is."""
    return text[:1].upper() + text[1:]


def printable(text: str) -> str:
    """Without the control characters that terminals read and HTML forbids."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", text)


# --- A comparison -----------------------------------------------------------------------------------------------------


class Reading:
    """A comparison with the words and decimals its numbers are printed in.

    Args:
        comparison: what was measured.
        place: where.
        alone: no other device measured there, so its name can be left out.

    Attributes:
        title: where it was measured, in words.
        unit: of the metric, after a space that does not break; empty when there is none.
        sign: 1.0 when higher is better, -1.0 when lower is.
        ratio: whether effects are ratios of method to baseline, not differences.
        contrast: what an effect is, as a formula in words.
        matters: the smallest effect that matters, as an improvement; 0.0 when every improvement counts.
        values: (baseline, method) by pair; None for a trial that failed.
        effects: improvements by pair (n,), logarithms where effects are ratios; empty when no pair finished.
        spread: standard deviation of the effects; 0.0 when they are equal but for rounding, or fewer than two.
    """

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
        self.contrast = "method / baseline" if self.ratio else "method − baseline"
        self.matters = 0.0
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

    def improvement(self, effect: float) -> float:
        """An effect as a coordinate that grows with what is better, whatever the metric's direction."""
        if not self.ratio:
            return self.sign * effect
        return self.sign * (math.log(effect) if effect > 0 else -math.inf)

    def improvements(self, interval: tuple[float, float]) -> tuple[float, float]:
        """An interval of effects as improvements, the worse end first."""
        first, second = (self.improvement(end) for end in interval)
        return min(first, second), max(first, second)

    def natural(self, improvement: float) -> float:
        """The effect that an improvement stands for: the inverse of `improvement`."""
        return math.exp(min(max(self.sign * improvement, -700.0), 700.0)) if self.ratio else self.sign * improvement

    def value(self, value: float) -> str:
        """A value of the metric."""
        return number(value, self.value_decimals)

    def effect(self, value: float) -> str:
        """An effect: a ratio, or a difference with its sign."""
        return number(value, self.decimals) if self.ratio else signed(value, self.decimals)

    def effect_with_unit(self, value: float) -> str:
        """An effect: a factor, or a difference with its sign and unit."""
        return f"×\u00a0{self.effect(value)}" if self.ratio else f"{self.effect(value)}{self.unit}"

    def bounded(self, interval: tuple[float, float]) -> bool:
        """Whether an interval of effects says anything: it is not the whole line."""
        return not (math.isinf(interval[1]) and (interval[0] == 0.0 if self.ratio else math.isinf(interval[0])))

    def interval(self, interval: tuple[float, float] | None) -> Markup | None:
        """An interval of effects; None when there is none, or it is not bounded."""
        if interval is None or not self.bounded(interval):
            return None
        return Markup("{} to {}").format(*(data_element(end, self.effect(end)) for end in interval))

    def interval_text(self, interval: tuple[float, float]) -> str:
        """The same without markup, in words when it is not bounded."""
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
        return f"Not settled by {counted(found.seeds, noun)}; with the mean and spread seen so far, {more}."

    def arm(self, which: Which) -> str:
        """The arm's name."""
        return self.claim.baseline.name if which == "baseline" else self.claim.method.name

    def records(self, which: Which) -> list[Record]:
        """The arm's trials by pair."""
        return [getattr(pair, which) for pair in self.comparison.pairs]

    def mean(self, which: Which) -> float | None:
        """Of the trials that finished; geometric where effects are ratios, so that it agrees with them."""
        finished = [value for pair in self.values if (value := pair[which == "method"]) is not None]
        if not finished:
            return None
        if self.ratio:
            return math.exp(math.fsum(map(math.log, finished)) / len(finished))
        return math.fsum(finished) / len(finished)
