"""Trials of two arms over the same seeds, run until the verdict is settled or the budget ends."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from counterproof.bench.journal import Journal
from counterproof.bench.statistics import Assessment, assess, e_bh
from counterproof.bench.task import Arm, Claim
from counterproof.bench.trials import Record, Spec, canonical, now, specs, stale_parts
from counterproof.errors import UserError

if TYPE_CHECKING:
    from counterproof.bench.engine import Engine

__all__ = ["Comparison", "Pair", "Progress", "belonging", "compare", "from_records", "survivors"]

FALSE = 0.05  # rate of false discoveries among the verdicts that are asked together
ATTEMPTS = 2  # of a trial that a signal from outside has ended
BEAT_EVERY = 20.0
POLL_EVERY = 0.25


@dataclass(frozen=True)
class Pair:
    """The two trials of one seed."""

    seed: int
    baseline: Record
    method: Record


@dataclass(frozen=True)
class Comparison:
    """A claim with its trials: printing, JSON and the page are views of it.

    Attributes:
        claim, budget, device: what was compared.
        pairs: by seed, without gaps.
        assessment: what they say.
        cached: no trial had to be run for it.
        survives: whether the verdict stands among the others it was asked with (e-BH at 5 %); None when alone or open.
        stale: reasons why these trials are not of today's code or versions; empty when they are.
    """

    claim: Claim
    budget: str
    device: str
    pairs: tuple[Pair, ...]
    assessment: Assessment
    cached: bool = True
    survives: bool | None = None
    stale: tuple[str, ...] = ()

    @property
    def records(self) -> Iterator[Record]:
        for pair in self.pairs:
            yield pair.baseline
            yield pair.method

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.outcome != "ok"]

    @property
    def seconds(self) -> float:
        """Wall seconds of all trials together."""
        return math.fsum(record.cost["wall_seconds"] for record in self.records)

    def arm(self, which: str) -> dict[str, Any]:
        """Name, mean and values by seed of the ``"baseline"`` or the ``"method"``; None for failed trials."""
        values = [getattr(pair, which).value(self.claim.metric) for pair in self.pairs]
        finished = [value for value in values if value is not None]
        return {
            "arm": getattr(self.claim, which).name,
            "mean": math.fsum(finished) / len(finished) if finished else None,
            "values": values,
        }

    def as_json(self) -> dict[str, Any]:
        """One JSON object; infinite ends of an interval are null."""
        claim, found = self.claim, self.assessment

        def finite(bounds: tuple[float, float] | None) -> list[float | None] | None:
            return bounds and [bound if math.isfinite(bound) else None for bound in bounds]

        return {
            "paper": claim.paper,
            "claim": claim.name,
            "says": claim.says,
            "task": claim.task.name,
            "metric": claim.metric,
            "better": claim.better,
            "unit": claim.task.metrics[claim.metric].unit,
            "effect_kind": claim.effect,
            "smallest": claim.smallest,
            "baseline": self.arm("baseline"),
            "method": self.arm("method"),
            "effect": found.effect,
            "interval": finite(found.interval),
            "level": found.level,
            "e_value": found.e_value,
            "seeds": found.seeds,
            "verdict": found.verdict,
            "survives": self.survives,
            "seeds_needed": found.needed,
            "t_interval": finite(found.usual_interval),
            "wins": found.wins,
            "correlation": found.correlation,
            "leave_one_out": finite(found.leave_one_out),
            "failed": {"baseline": found.failed[0], "method": found.failed[1]},
            "finished_only": found.finished_only,
            "reported": claim.reported,
            "seconds": self.seconds,
            "cpu_seconds": {
                which: math.fsum(getattr(pair, which).cost["cpu_seconds"] for pair in self.pairs)
                for which in ("baseline", "method")
            },
            "budget": self.budget,
            "device": self.device,
            "cached": self.cached,
            "stale": list(self.stale),
            "keys": [record.key for record in self.records],
        }


@dataclass(frozen=True)
class Progress:
    """How far a comparison is: `running` maps "arm seed" to the share of that trial that is done."""

    claim: Claim
    pairs: int
    most: int
    assessment: Assessment
    running: Mapping[str, float]
    latest: Pair | None = None


def judge(claim: Claim, pairs: Sequence[Pair]) -> Assessment:
    """The verdict on a claim's pairs.

    Raises:
        UserError: a ratio of values that are not positive, naming the claim.
    """
    try:
        return assess(
            [(pair.baseline.value(claim.metric), pair.method.value(claim.metric)) for pair in pairs],
            better=claim.better,
            effect=claim.effect,
            smallest=claim.smallest,
        )
    except ValueError as problem:
        raise UserError(f"{claim.paper}/{claim.name}: {problem}; compare {claim.metric} by difference") from None


def survivors(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, marked with whether their verdicts survive being asked together (e-BH at 5 %)."""
    if len(comparisons) < 2:
        return list(comparisons)
    found = e_bh([0.0 if c.assessment.verdict == "open" else c.assessment.e_value for c in comparisons], FALSE)
    return [
        replace(c, survives=None if c.assessment.verdict == "open" else survives)
        for c, survives in zip(comparisons, found, strict=True)
    ]


def compare(
    claims: Sequence[Claim],
    journal: Journal,
    *,
    budget: str = "quick",
    seeds: tuple[int, int] | None = None,
    jobs: int | None = None,
    engine_name: str = "local",
    device: str = "cpu",
    data: tuple[str, str] | None = None,
    model: tuple[str, str] | None = None,
    fresh: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Comparison]:
    """Settle claims one after another, each as far as its budget goes.

    Finished trials come from the journal; what is missing is run. Seeds are added one by one until the verdict is
    settled (which the e-value allows at any time), the most seeds are reached, or another pair would not fit into the
    budget's minutes. The minutes are counted by what the trials have recorded, whether run now or found, so the same
    call gives the same answer.

    Args:
        claims: what to settle.
        journal: where trials are found and kept.
        budget: a level all their tasks know.
        seeds: fewest and most, over those of claim and budget.
        jobs: trials at a time; default one per core.
        engine_name: where trials run.
        device: as torch spells it.
        data, model: (path or name, fingerprint) of the user's own.
        fresh: run every trial again, even if the journal has it.
        watch: called with every change.

    Yields:
        a comparison per claim, in order; then again those that needed more evidence to stand among the others, as far
        as their budgets go. `survives` is left open: see `survivors`.

    Raises:
        UserError: an unknown budget or engine, a range of seeds that makes no sense, a journal that cannot be written.
    """
    from counterproof.bench.engine import engine, jobs_at_once  # not needed to show what was measured

    for claim in claims:
        if budget not in claim.task.budgets:
            known = ", ".join(claim.task.budgets)
            raise UserError(f"task {claim.task.name} has no budget {budget!r}; it has: {known}")
    if seeds is not None and not 2 <= seeds[0] <= seeds[1]:
        raise UserError(f"seeds {seeds[0]}:{seeds[1]} make no sense: MIN:MAX with 2 <= MIN <= MAX")
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be at least 1, not {jobs}")
    since = now() if fresh else ""
    plans = []
    for claim in claims:
        fewest, most = seeds or claim.seeds or claim.task.budgets[budget].seeds
        arms = [
            specs(claim, arm, range(most), budget=budget, device=device, data=data, model=model)
            for arm in (claim.baseline, claim.method)
        ]
        plans.append((claim, fewest, most, arms[0], arms[1]))
    examples = [arm[0] for _, _, _, *arms in plans for arm in arms]
    at_once = jobs or jobs_at_once(engine_name, max((spec.threads for spec in examples), default=1))
    driver = _Driver(journal, lambda: engine(engine_name, at_once, examples), at_once, since, watch)
    try:
        settled = []
        for claim, fewest, most, baseline, method in plans:
            settled.append(driver.settle(claim, fewest, most, baseline, method))
            yield settled[-1]
        moved = True
        while moved:
            moved = False
            verdicts = sum(comparison.assessment.verdict != "open" for comparison in settled)
            for index, comparison in enumerate(survivors(settled)):
                if comparison.survives is False:
                    more = driver.settle(*plans[index], evidence=len(settled) / (FALSE * verdicts))
                    if len(more.pairs) > len(comparison.pairs):
                        moved = True
                        settled[index] = more
                        yield more
    finally:
        driver.stop()


class _Driver:
    """Runs what the journal lacks."""

    def __init__(
        self,
        journal: Journal,
        start: Callable[[], "Engine"],
        jobs: int,
        since: str,
        watch: Callable[[Progress], None],
    ) -> None:
        self._journal = journal
        self._start = start
        self._jobs = jobs
        self._since = since
        self._watch = watch
        self._engine: Engine | None = None
        self._attempts: dict[str, int] = {}
        self._ran: set[str] = set()
        self._beaten = time.monotonic()

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.cancel()
            self._journal.release()  # also of a trial that an interrupt kept from being started

    def settle(
        self,
        claim: Claim,
        fewest: int,
        most: int,
        baseline: Sequence[Spec],
        method: Sequence[Spec],
        evidence: float = 0.0,
    ) -> Comparison:
        """Add seeds until there is a verdict with at least that e-value, or the budget ends."""
        wanted = [spec for both in zip(baseline, method, strict=True) for spec in both]
        records = self._found([spec.key for spec in wanted])
        minutes = claim.task.budgets[baseline[0].budget].minutes
        running: dict[str, Spec] = {}
        elsewhere: dict[str, Spec] = {}
        shares: dict[str, float] = {}
        pairs: list[Pair] = []
        assessment = judge(claim, pairs)
        affordable = most
        self._report(claim, pairs, most, assessment, shares)

        def settled() -> bool:
            """Look after every pair in turn, however many have come in: the same trials end at the same seed."""
            nonlocal pairs, assessment, affordable
            finished = _prefix(baseline, method, records)
            while len(pairs) < len(finished):
                pairs = finished[: len(pairs) + 1]
                assessment = judge(claim, pairs)
                affordable = _affordable(pairs, fewest, most, minutes, self._jobs)
                done = len(pairs) >= fewest and (
                    (assessment.verdict != "open" and assessment.e_value >= evidence)
                    or len(pairs) >= affordable
                    or max(assessment.failed) == len(pairs)
                )
                if done or len(pairs) == len(finished):
                    self._report(claim, pairs, most, assessment, shares)
                if done:
                    return True
            return False

        while not settled():
            if self._engine is None:
                self._engine = self._start()
                continue
            for spec in wanted[: 2 * affordable]:
                if len(running) >= self._engine.jobs:
                    break
                if spec.key not in records and spec.key not in running and spec.key not in elsewhere:
                    self._begin(spec, records, running, elsewhere)
            events = self._engine.poll(POLL_EVERY)
            if not running:
                time.sleep(POLL_EVERY)
            for event in events:
                if not isinstance(event, Record):
                    spec = running[event.key]
                    shares[f"{spec.arm} {spec.seed}"] = event.values["progress"]
                    self._report(claim, pairs, most, assessment, shares)
                    continue
                spec = running.pop(event.key)
                shares.pop(f"{spec.arm} {spec.seed}", None)
                self._ran.add(event.key)
                self._journal.record(event)
                if not self._again(event):
                    records[event.key] = event
            if elsewhere:
                for key, record in self._found(list(elsewhere)).items():
                    records[key] = record
                    del elsewhere[key]
                for key in [key for key in elsewhere if self._journal.lease(key)]:  # its driver has died or given up
                    self._journal.release([key])
                    del elsewhere[key]
            if time.monotonic() - self._beaten > BEAT_EVERY:
                self._journal.beat()
                self._beaten = time.monotonic()
        if self._engine is not None:
            self._journal.release(self._engine.cancel(list(running)))
        comparison = Comparison(claim, baseline[0].budget, baseline[0].device, tuple(pairs), assessment)
        return replace(comparison, cached=self._ran.isdisjoint(record.key for record in comparison.records))

    def _begin(
        self, spec: Spec, records: dict[str, Record], running: dict[str, Spec], elsewhere: dict[str, Spec]
    ) -> None:
        assert self._engine is not None
        if not self._journal.lease(spec.key):
            elsewhere[spec.key] = spec
            return
        if found := self._found([spec.key]):  # finished by another driver since we looked
            self._journal.release([spec.key])
            records.update(found)
            return
        self._attempts[spec.key] = self._attempts.get(spec.key, 0) + 1
        self._engine.submit(spec)
        running[spec.key] = spec

    def _found(self, keys: Sequence[str]) -> dict[str, Record]:
        found = self._journal.find(keys, self._since)
        return {key: record for key, record in found.items() if not self._again(record)}

    def _again(self, record: Record) -> bool:
        retries = {"killed"} if self._engine is None else self._engine.retries
        return record.outcome in retries and self._attempts.get(record.key, 0) < ATTEMPTS

    def _report(
        self, claim: Claim, pairs: Sequence[Pair], most: int, assessment: Assessment, shares: Mapping[str, float]
    ) -> None:
        self._watch(
            Progress(claim, len(pairs), most, assessment, dict(shares), pairs[-1] if pairs else None),
        )


def _prefix(baseline: Sequence[Spec], method: Sequence[Spec], records: Mapping[str, Record]) -> list[Pair]:
    """Finished pairs up to the first gap: looking only at these, a fast arm or seed cannot bias the stopping."""
    pairs = []
    for left, right in zip(baseline, method, strict=True):
        if left.key not in records or right.key not in records:
            break
        pairs.append(Pair(left.seed, records[left.key], records[right.key]))
    return pairs


def _affordable(pairs: Sequence[Pair], fewest: int, most: int, minutes: float | None, jobs: int) -> int:
    """Seeds that fit into the budget at the cost per pair seen so far."""
    if minutes is None or not pairs:
        return most
    spent = math.fsum(_cost(record) for pair in pairs for record in (pair.baseline, pair.method))
    return min(most, max(fewest, int(minutes * 60 * jobs * len(pairs) / max(spent, 1e-9))))


def _cost(record: Record) -> float:
    """Seconds that a trial takes of its budget: of the processor, which a busy machine changes little, or of the wall
    where the processor's time says nothing: on another device, or for a trial that hung or died."""
    if record.device == "cpu" and record.outcome == "ok":
        return record.cost["cpu_seconds"] / int(record.parts["threads"])
    return record.cost["wall_seconds"]


def from_records(claim: Claim, records: Iterable[Record], budget: str) -> Comparison | None:
    """A comparison out of trials that were made earlier, perhaps elsewhere, perhaps by earlier code. Runs nothing.

    Trials are matched by task, arm, settings, seed and budget; of several for one seed the newest counts. `stale` says
    why they are not of today's code and versions.

    Returns:
        None when seed 0 lacks an arm.
    """
    newest: dict[tuple[str, int], Record] = {}
    for record in sorted(records, key=lambda record: record.finished):
        newest[_identity_of(record), record.seed] = record
    baseline, method = (_identity(claim, arm, budget) for arm in (claim.baseline, claim.method))
    pairs: list[Pair] = []
    while (baseline, len(pairs)) in newest and (method, len(pairs)) in newest:
        seed = len(pairs)
        pairs.append(Pair(seed, newest[baseline, seed], newest[method, seed]))
    if not pairs:
        return None
    reasons = {reason for pair in pairs for record in (pair.baseline, pair.method) for reason in _stale(record)}
    return Comparison(
        claim, budget, pairs[0].method.device, tuple(pairs), judge(claim, pairs), stale=tuple(sorted(reasons))
    )


def belonging(claims: Iterable[Claim]) -> Callable[[Record], bool]:
    """Whether a trial is one that these claims rest on, whichever paper it was run for: claims of a task share arms."""
    known = {
        _identity(claim, arm, budget)
        for claim in claims
        for arm in (claim.baseline, claim.method)
        for budget in claim.task.budgets
    }
    return lambda record: _identity_of(record) in known


def _stale(record: Record) -> tuple[str, ...]:
    without_seed = canonical({name: value for name, value in record.parts.items() if name != "seed"})
    return _stale_parts(without_seed)


@cache
def _stale_parts(parts: str) -> tuple[str, ...]:
    return tuple(stale_parts(json.loads(parts)))


def _identity(claim: Claim, arm: Arm, budget: str) -> str:
    settings = {**claim.task.budgets[budget].settings, **claim.settings}
    return canonical([claim.task.name, arm.method, dict(arm.settings), settings, budget, None, None])


def _identity_of(record: Record) -> str:
    parts = record.parts
    names = ("task", "method", "method_settings", "settings", "budget", "data", "model")
    return canonical([parts[name] for name in names])
