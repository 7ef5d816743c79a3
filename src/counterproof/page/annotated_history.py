"""Annotated History of Modern AI and Deep Learning: a sourced graph of ideas, and credit that flows back through it.

Paper: arXiv 2212.11279 (Schmidhuber).
Read beside: the survey (structure and dates of its headings), Hummon & Doreian 1989 (main paths), Griewank (reverse
accumulation); one public timeline built from the survey, of which only the fields of an event were looked at.
Deviations: the survey is prose; data model, shares, sweep and checks are our reading of its "credit assignment". Kinds
"evaluation" and "paper" are added. An annotator who gives shares for an event and leaves an edge out gave it 0.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterproof.errors import UserError
from counterproof.page.catalogue import Paper, nearest, papers
from counterproof.page.history_checks import Finding, lint
from counterproof.page.history_data import (
    RELATIONS,
    Dispute,
    Edge,
    Event,
    Milestone,
    Place,
    Records,
    Source,
    When,
    Work,
    read_history,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Acceleration",
    "Credit",
    "CreditRow",
    "Dispute",
    "Edge",
    "Event",
    "History",
    "Source",
    "acceleration",
    "backward_credit",
    "credit",
    "random_milestones",
    "selected_milestones",
]

FOLDER = Path(__file__).parent / "history"


@dataclass(frozen=True)
class Graph:
    """A history as arrays, its events in an order in which what is built on comes first.

    Attributes:
        ids: events, by place.
        later, earlier: (E,) int64, places; one edge for each pair.
        share: (E,) float64, mean over the annotators of the later event.
        spread: (E,) float64, standard deviation over them; 0 for one.
        own: (n,) float64, what an event does not owe to others: 1 minus its shares.
        judged: (E,) for each edge the shares by annotator.
    """

    ids: tuple[str, ...]
    later: "NDArray[np.int64]"
    earlier: "NDArray[np.int64]"
    share: "NDArray[np.float64]"
    spread: "NDArray[np.float64]"
    own: "NDArray[np.float64]"
    judged: tuple[tuple[float, ...], ...]

    @cached_property
    def place(self) -> Mapping[str, int]:
        """Where an event stands in `ids`."""
        return {name: number for number, name in enumerate(self.ids)}

    def equal(self) -> "NDArray[np.float64]":
        """(E,) shares of somebody who knows the edges only: an event and each of its k roots get 1 / (k + 1)."""
        roots = np.bincount(self.later, minlength=len(self.ids))
        return np.asarray(1.0 / (1.0 + roots[self.later]), np.float64)


@dataclass(frozen=True)
class History:
    """Events, and the edges by which later ones build on earlier ones.

    Attributes:
        events: by id, the earliest first.
        edges: as annotators gave them; several annotators may have judged the same one.
        works: what sources refer to, by key.
        milestones: turning points, outside the graph.
    """

    events: Mapping[str, Event]
    edges: tuple[Edge, ...] = ()
    works: Mapping[str, Work] = field(default_factory=dict)
    milestones: tuple[Milestone, ...] = ()

    @classmethod
    def of(cls, *records: Records) -> "History":
        """A history of what was read or made.

        Raises:
            UserError: two events with one id, or two works with one key.
        """
        events: dict[str, Event] = {}
        works: dict[str, Work] = {}
        for event in sorted((event for one in records for event in one.events), key=lambda event: event.moment):
            if event.id in events:
                raise UserError(f"{event.place}: the event {event.id!r} is already in {events[event.id].place}")
            events[event.id] = event
        for work in (work for one in records for work in one.works):
            if work.key in works:
                raise UserError(f"{work.place}: the work {work.key!r} is already in {works[work.key].place}")
            works[work.key] = work
        return cls(
            events=events,
            edges=tuple(edge for one in records for edge in one.edges),
            works=works,
            milestones=tuple(milestone for one in records for milestone in one.milestones),
        )

    @classmethod
    def load(cls, *paths: str | Path) -> "History":
        """Read folders (or files) of YAML; the format is described in `counterproof.page.history_data`.

        Raises:
            HistoryError: what cannot be read, with file and line.
            UserError: two events with one id, or two works with one key.
        """
        return cls.of(*(read_history(Path(path)) for path in paths))

    @classmethod
    def shipped(cls, *more: str | Path) -> "History":
        """The history that comes with the page; every paper of the page is an event of it.

        Args:
            more: folders (or files) to join to it: further events, or another annotator's shares.

        Raises:
            HistoryError, UserError: as `load`.
        """
        return cls.of(read_history(FOLDER), _cards(papers()), *(read_history(Path(path)) for path in more))

    def event(self, name: str) -> Event:
        """The event of that id.

        Raises:
            UserError: naming the nearest ones.
        """
        try:
            return self.events[name]
        except KeyError:
            close = nearest(name, list(self.events))
            raise UserError(f"no event {name!r}{close or '; counterproof page timeline lists them'}") from None

    def lint(self, texts: Mapping[str, str] | None = None, *, run: int = 8) -> list[Finding]:
        """What is wrong with it: time violations, cycles, missing or dead sources, shares, orphans, copied sentences.

        Args:
            texts: texts of sources by name; no event may share `run` words in a row with one of them.
            run: that number of words.

        Returns:
            findings with file, line, rule and message, in the order of files and lines; none for a clean set.
        """
        return lint(self.events, self.edges, self.works, texts or {}, run)

    @cached_property
    def graph(self) -> Graph:
        """The history as arrays.

        Raises:
            UserError: an edge to an event that is not there, a share outside (0, 1], shares of an event that sum to
                more than 1, a cycle; with file and line.
        """
        judged: dict[tuple[str, str], dict[str, float]] = {}
        annotators: dict[str, dict[str, float]] = {}
        for edge in self.edges:
            for end in (edge.later, edge.earlier):
                if end not in self.events:
                    raise UserError(f"{edge.place}: no event {end!r}{nearest(end, list(self.events))}")
            if not 0 < edge.share <= 1:
                raise UserError(f"{edge.place}: a share lies in (0, 1], not {edge.share:g}")
            pair = (edge.later, edge.earlier)
            if edge.annotator in judged.setdefault(pair, {}):
                raise UserError(f"{edge.place}: {edge.annotator} gave {edge.later} -> {edge.earlier} a share already")
            judged[pair][edge.annotator] = edge.share
            totals = annotators.setdefault(edge.later, {})
            totals[edge.annotator] = totals.get(edge.annotator, 0.0) + edge.share
            if totals[edge.annotator] > 1 + 1e-9:
                raise UserError(
                    f"{edge.place}: the shares that {edge.annotator} gave for {edge.later} sum to "
                    f"{totals[edge.annotator]:g}, more than 1"
                )
        ids = self._in_order([*judged])
        place = {name: number for number, name in enumerate(ids)}
        pairs = sorted(judged, key=lambda pair: (place[pair[0]], place[pair[1]]))
        shares = [tuple(judged[pair].get(who, 0.0) for who in annotators[pair[0]]) for pair in pairs]
        share = np.array([math.fsum(one) / len(one) for one in shares])
        later = np.array([place[pair[0]] for pair in pairs], np.int64)
        own = 1.0 - np.bincount(later, share, minlength=len(ids)) if len(pairs) else np.ones(len(ids))
        return Graph(
            ids=ids,
            later=later,
            earlier=np.array([place[pair[1]] for pair in pairs], np.int64),
            share=share.reshape(-1),
            spread=np.array([float(np.std(one)) for one in shares]),
            own=np.clip(own, 0.0, 1.0),
            judged=tuple(shares),
        )

    def _in_order(self, pairs: list[tuple[str, str]]) -> tuple[str, ...]:
        """Every event after all it builds on, the earliest first where that leaves a choice."""
        waiting = dict.fromkeys(self.events, 0)
        followers: dict[str, list[str]] = {}
        for later, earlier in pairs:
            waiting[later] += 1
            followers.setdefault(earlier, []).append(later)
        ready = [(self.events[name].moment, name) for name, count in waiting.items() if not count]
        heapq.heapify(ready)
        ids: list[str] = []
        while ready:
            name = heapq.heappop(ready)[1]
            ids.append(name)
            for later in followers.get(name, ()):
                waiting[later] -= 1
                if not waiting[later]:
                    heapq.heappush(ready, (self.events[later].moment, later))
        if len(ids) < len(self.events):
            cycle = next(finding for finding in self.lint() if finding.rule == "cycle")
            raise UserError(f"{cycle.place}: {cycle.message}")
        return tuple(ids)

    def ancestors(self, name: str, *, top: int | None = None, samples: int = 200, seed: int = 0) -> list["CreditRow"]:
        """What an event builds on, by the credit that each keeps when the event's weight of 1 flows back.

        Args:
            name: an event's id, or a paper's slug.
            top: at most so many; default all.
            samples, seed: see `credit`.

        Raises:
            UserError: no such event.
        """
        found = credit(self, {name: 1.0}, samples=samples, seed=seed)
        return [row for row in found.table if row.id != name and row.reach > 0][:top]

    def descendants(self, name: str) -> list[tuple[str, float]]:
        """Which later events rest on one, the earliest first: (id, share of it that rests there, over all paths).

        Raises:
            UserError: no such event.
        """
        self.event(name)
        graph = self.graph
        rests = np.zeros(len(graph.ids))
        rests[graph.place[name]] = 1.0
        for edge in np.argsort(graph.later, kind="stable"):
            rests[graph.later[edge]] += graph.share[edge] * rests[graph.earlier[edge]]
        return [(one, float(rests[i])) for i, one in enumerate(graph.ids) if rests[i] > 0 and one != name]

    def path(self, later: str, earlier: str) -> tuple[tuple[str, ...], float]:
        """The strongest path from a later event back to an earlier one: its events, and the product of its shares.

        Raises:
            UserError: no such event, or no path.
        """
        self.event(later), self.event(earlier)
        graph = self.graph
        weights = np.zeros(len(graph.ids))
        weights[graph.place[later]] = 1.0
        strength, before = _strongest(graph, weights)
        if strength[graph.place[earlier]] == 0:
            raise UserError(f"nothing leads from {later} back to {earlier}")
        return _walk(graph, before, graph.place[earlier]), float(strength[graph.place[earlier]])

    def sentence(self, path: tuple[str, ...]) -> str:
        """A path in words: "A (2022) uses B (2020), which generalises C (1990)"."""
        relation: dict[tuple[str, str], str] = {}
        for edge in self.edges:
            relation.setdefault((edge.later, edge.earlier), RELATIONS[edge.relation])
        named = [f"{self.events[name].title} ({self.events[name].when})" for name in path]
        text = named[0]
        for number, (later, earlier) in enumerate(pairwise(path)):
            text += f"{', which' if number else ''} {relation[later, earlier]} {named[number + 1]}"
        return text

    def without(self, name: str) -> "History":
        """The history with an event left out; what rested on it rests on its roots, or on the later event itself.

        Credit of all events other than it and those that build on it directly stays what it was.

        Raises:
            UserError: no such event.
        """
        self.event(name)
        graph = self.graph
        index = graph.place[name]
        roots = {graph.ids[graph.earlier[e]]: graph.share[e] for e in np.flatnonzero(graph.later == index)}
        kept: dict[tuple[str, str], Edge] = {}
        for e in range(len(graph.later)):
            pair = (graph.ids[graph.later[e]], graph.ids[graph.earlier[e]])
            first = next(edge for edge in self.edges if (edge.later, edge.earlier) == pair)
            if name not in pair:
                kept[pair] = replace(first, share=float(graph.share[e]) + (kept[pair].share if pair in kept else 0.0))
            elif pair[1] == name:
                for root, share in roots.items():
                    over = (pair[0], root)
                    moved = float(graph.share[e] * share)
                    edge = kept.get(over) or replace(first, earlier=root, share=0.0, evidence=f"by way of {name}")
                    kept[over] = replace(edge, share=edge.share + moved)
        events = {one: event for one, event in self.events.items() if one != name}
        return replace(self, events=events, edges=tuple(replace(e, annotator="rerouted") for e in kept.values()))

    def joined(self) -> list[tuple[str, str, float, float, str]]:
        """One row per pair of events: later, earlier, mean share, spread over annotators, relation."""
        graph = self.graph
        relation = {(edge.later, edge.earlier): edge.relation for edge in reversed(self.edges)}
        pairs = [(graph.ids[later], graph.ids[earlier]) for later, earlier in zip(graph.later, graph.earlier)]
        return [(*pair, float(graph.share[e]), float(graph.spread[e]), relation[pair]) for e, pair in enumerate(pairs)]

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` whose edges run from later to earlier events, with share, spread and relation.

        Raises:
            UserError: networkx is not installed.
        """
        try:
            import networkx
        except ModuleNotFoundError:
            raise UserError("networkx is not installed; pip install networkx") from None
        made = networkx.DiGraph()
        graph = self.graph
        for name in graph.ids:
            event = self.events[name]
            own = float(graph.own[graph.place[name]])
            made.add_node(name, title=event.title, year=event.when.start, kind=event.kind, own=own)
        for later, earlier, share, spread, relation in self.joined():
            made.add_edge(later, earlier, share=share, spread=spread, relation=relation)
        return made

    def to_html(
        self, out: str | Path, roots: Mapping[str, float] | list[str] | None = None, *, samples: int = 200
    ) -> None:
        """Write the timeline as one page that needs no network and no script.

        Args:
            out: the file; an old one stays until the new one is whole.
            roots: events whose roots are shown, with weights or alike; default the events of kind "paper", or all that
                nothing builds on.
            samples: for the intervals, see `credit`.

        Raises:
            UserError: no such event, or a file that cannot be written.
        """
        from counterproof.files import replacing
        from counterproof.page.history_views import timeline_html

        html = timeline_html(self, self.credit_of(roots, samples=samples), samples=samples)
        with replacing(Path(out)) as stream:
            stream.write(html)

    def credit_of(self, roots: Mapping[str, float] | list[str] | None = None, *, samples: int = 200) -> "Credit":
        """Credit that flows back from `roots`, which share a weight of 1 when none is given; see `to_html`."""
        if roots is None:
            built_on = {edge.earlier for edge in self.edges}
            roots = [one.id for one in self.events.values() if one.kind == "paper"] or [
                one for one in self.events if one not in built_on
            ]
        if not isinstance(roots, Mapping):
            roots = {name: 1.0 / len(roots) for name in roots}
        return credit(self, roots, samples=samples)


def _cards(found: Mapping[str, Paper]) -> Records:
    """The papers of the page as events: what their cards say, and the arXiv entry as source."""
    events, works = [], []
    for paper in found.values():
        place = Place(f"{paper.path.parent.name}/{paper.path.name}", 1)
        month = int(paper.arxiv[2:4]) if paper.arxiv and paper.arxiv[:4].isdigit() else None
        events.append(
            Event(
                id=paper.slug,
                when=When(paper.year, paper.year, text=str(paper.year)),
                title=paper.title,
                kind="paper",
                text=paper.summary,
                sources=(Source(paper.slug, "the paper itself"),),
                order=month,
                place=place,
            )
        )
        works.append(Work(paper.slug, paper.title, paper.year, arxiv=paper.arxiv or "", place=place))
    return Records(events=tuple(events), works=tuple(works))


# --- Credit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CreditRow:
    """What reaches an event and what it keeps.

    Attributes:
        id: the event.
        reach: the sum over all paths from the roots of the products of shares: what depends on it.
        kept: the part of that which it does not pass on; over all events these sum to the weight put in.
        low, high: interval of `kept`; equal to it without samples.
        rank: 1 for the most kept.
        rank_low, rank_high: interval of the rank.
        path: the strongest path from a root to it.
        path_share: the product of the shares along it, times the root's weight.
    """

    id: str
    reach: float
    kept: float
    low: float
    high: float
    rank: int
    rank_low: int
    rank_high: int
    path: tuple[str, ...]
    path_share: float


@dataclass(frozen=True)
class Credit:
    """Credit of all events for a set of roots.

    Attributes:
        table: a row per event, the most kept first.
        roots: the weights that were put in.
        samples: how many perturbed sweeps the intervals rest on.
    """

    table: tuple[CreditRow, ...]
    roots: Mapping[str, float]
    samples: int

    def __getitem__(self, name: str) -> CreditRow:
        """The row of an event."""
        return next(row for row in self.table if row.id == name)


def backward_credit(
    later: "NDArray[np.int64]", earlier: "NDArray[np.int64]", shares: "NDArray[Any]", roots: "NDArray[Any]"
) -> "NDArray[Any]":
    """Credit that reaches each event: one sweep from the latest to the earliest, as in reverse accumulation.

    Args:
        later, earlier: (E,) ints, places of events; an event comes after all it builds on, so ``earlier < later``.
        shares: (..., E), of the later event that rests on the earlier; leading dimensions are swept side by side.
        roots: (n,), weights put on events.

    Returns:
        (..., n), the sum over all paths from the roots of the products of shares; dtype of `shares` and `roots`.

    Raises:
        ValueError: an edge that does not lead back, or shapes that do not fit.
    """
    later, earlier, shares = np.asarray(later), np.asarray(earlier), np.asarray(shares)
    if later.shape != earlier.shape or shares.shape[-1:] != later.shape:
        raise ValueError(f"later {later.shape}, earlier {earlier.shape} and shares {shares.shape} name different edges")
    if len(later) and (earlier.min() < 0 or later.max() >= len(roots)):
        raise ValueError(f"edges name events from 0 to {max(later.max(), earlier.max())}; roots has {len(roots)}")
    if wrong := np.flatnonzero(earlier >= later).tolist():
        raise ValueError(f"edge {wrong[0]} leads from {later[wrong[0]]} to {earlier[wrong[0]]}, which is not earlier")
    reach = np.empty((*shares.shape[:-1], len(roots)), np.result_type(shares, roots))
    reach[...] = roots
    for edge in np.argsort(-later, kind="stable"):
        reach[..., earlier[edge]] += shares[..., edge] * reach[..., later[edge]]
    return reach


def credit(
    history: History,
    roots: Mapping[str, float],
    *,
    samples: int = 0,
    jitter: float = 0.5,
    equal: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> Credit:
    """Assign credit for some events to all that they rest on.

    Args:
        history: events and edges.
        roots: weights by event id, not negative.
        samples: so many sweeps with annotators drawn with replacement, where an event has several, and with shares
            and own parts multiplied by exp(jitter N(0, 1)) and scaled back to sum to 1; 0 for no intervals.
        jitter: how far a judgement may be off, on the log scale.
        equal: forget the shares and divide every event evenly among itself and its roots.
        level: of the intervals, between quantiles of the samples.
        seed: of the samples.

    Raises:
        UserError: an unknown event, or a history that is no graph; see `History.graph`.
        ValueError: a weight that is negative or not finite; samples, jitter or level out of range.
    """
    if samples < 0 or jitter < 0 or not 0 < level < 1:
        raise ValueError(f"samples {samples} and jitter {jitter} are not negative, level {level} lies in (0, 1)")
    graph = history.graph
    weights = np.zeros(len(graph.ids))
    for name, weight in roots.items():
        history.event(name)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {name} is a number >= 0, not {weight!r}")
        weights[graph.place[name]] = weight
    share: NDArray[np.float64] = graph.equal() if equal else graph.share
    own = np.asarray(1.0 - np.bincount(graph.later, share, minlength=len(graph.ids)) if equal else graph.own, float)
    reach = backward_credit(graph.later, graph.earlier, share, weights)
    kept = own * reach
    low = high = kept
    order = np.lexsort((np.arange(len(kept)), -kept))
    rank = np.empty(len(kept), int)
    rank[order] = np.arange(1, len(kept) + 1)
    rank_low = rank_high = rank
    if samples:
        drawn, rest = _perturbed(graph, share, own, samples, jitter, equal, np.random.default_rng(seed))
        each = rest * backward_credit(graph.later, graph.earlier, drawn, weights)
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(each, tails, axis=0)
        ranks = 1 + np.argsort(np.argsort(-each, axis=1, kind="stable"), axis=1, kind="stable")
        rank_low, rank_high = np.quantile(ranks, tails, axis=0, method="nearest")
    strength, before = _strongest(graph, weights, share)
    return Credit(
        table=tuple(
            CreditRow(
                id=graph.ids[i],
                reach=float(reach[i]),
                kept=float(kept[i]),
                low=float(low[i]),
                high=float(high[i]),
                rank=int(rank[i]),
                rank_low=int(rank_low[i]),
                rank_high=int(rank_high[i]),
                path=_walk(graph, before, int(i)) if strength[i] > 0 else (),
                path_share=float(strength[i]),
            )
            for i in order
        ),
        roots=dict(roots),
        samples=samples,
    )


def _perturbed(
    graph: Graph,
    share: "NDArray[np.float64]",
    own: "NDArray[np.float64]",
    samples: int,
    jitter: float,
    equal: bool,
    rng: np.random.Generator,
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Shares (S, E) and own parts (S, n) as other annotators might have given them; they sum to 1 for each event."""
    drawn = np.tile(share, (samples, 1))
    if not equal:
        for later in np.unique(graph.later):
            edges = np.flatnonzero(graph.later == later)
            given = np.array([graph.judged[e] for e in edges])
            count = given.shape[1]
            if count > 1:
                drawn[:, edges] = rng.multinomial(count, np.full(count, 1 / count), size=samples) / count @ given.T
    rest = np.tile(own, (samples, 1))
    if not equal:
        rest = np.ones((samples, len(own)))
        rest -= _summed(drawn, graph)
        rest = np.clip(rest, 0.0, 1.0)
    drawn = drawn * np.exp(jitter * rng.standard_normal(drawn.shape))
    rest = rest * np.exp(jitter * rng.standard_normal(rest.shape))
    total = rest + _summed(drawn, graph)
    return drawn / total[:, graph.later], rest / total


def _summed(shares: "NDArray[np.float64]", graph: Graph) -> "NDArray[np.float64]":
    """(S, n) sums of (S, E) shares over the edges of each later event."""
    total = np.zeros((len(graph.ids), len(shares)))
    np.add.at(total, graph.later, shares.T)
    return total.T


def _strongest(
    graph: Graph, weights: "NDArray[np.float64]", share: "NDArray[np.float64] | None" = None
) -> "tuple[NDArray[np.float64], NDArray[np.int64]]":
    """For each event the largest product along a path from a root, and the event before it on that path (-1: none)."""
    share = graph.share if share is None else share
    strength, before = weights.copy(), np.full(len(weights), -1)
    for edge in np.argsort(-graph.later, kind="stable"):
        later, earlier = graph.later[edge], graph.earlier[edge]
        if strength[later] * share[edge] > strength[earlier]:
            strength[earlier], before[earlier] = strength[later] * share[edge], later
    return strength, before


def _walk(graph: Graph, before: "NDArray[np.int64]", place: int) -> tuple[str, ...]:
    path = [place]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return tuple(graph.ids[one] for one in reversed(path))


# --- The closing pattern ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acceleration:
    """A straight line through the logarithms of intervals.

    Attributes:
        ratio: from one interval to the next.
        r_squared: share of the variance of the logarithms that the line explains.
        misfit: root of the mean squared residual, in natural logarithms.
    """

    ratio: float
    r_squared: float
    misfit: float


def acceleration(before: "NDArray[np.float64]") -> Acceleration:
    """Fit how turning points draw nearer to an end point: log(before) on their number.

    Args:
        before: (n,) years before the end point, the longest first; n >= 3.

    Raises:
        ValueError: fewer than three, not above 0, or not falling.
    """
    years = np.asarray(before, float)
    if years.ndim != 1 or len(years) < 3 or not np.all(years > 0) or not np.all(np.diff(years) < 0):
        raise ValueError(f"expected three or more falling numbers above 0, not {years.tolist()}")
    number, logarithm = np.arange(len(years)), np.log(years)
    slope, start = np.polyfit(number, logarithm, 1)
    residual = logarithm - (start + slope * number)
    explained = 1.0 - float(residual @ residual) / float(np.sum((logarithm - logarithm.mean()) ** 2))
    return Acceleration(float(np.exp(slope)), explained, float(np.sqrt(np.mean(residual**2))))


def random_milestones(
    generator: np.random.Generator, *, first: float = 13.8e9, last: float = 12.0, count: int = 16
) -> "NDArray[np.float64]":
    """Turning points without a pattern: (count,) falling years, `first` and then log-uniform ones down to `last`."""
    drawn = np.exp(generator.uniform(math.log(last), math.log(first), size=count - 1))
    return np.concatenate([[first], np.sort(drawn)[::-1]])


def selected_milestones(
    generator: np.random.Generator, *, first: float = 13.8e9, ratio: float = 0.25, count: int = 16, pool: int = 1000
) -> "NDArray[np.float64]":
    """Turning points chosen to fit: of `pool` random ones, the one nearest to each date that the pattern predicts.

    Args:
        generator: draws the pool, log-uniform over the range of the pattern.
        first: years before the end point of the first one, which is given.
        ratio: of each interval to the one before; the survey says about a quarter.
        count: how many are chosen.
        pool: how many events a chooser may choose from.

    Returns:
        (count,) falling years; fewer than `count` when one event is nearest to two dates.
    """
    wanted = math.log(first) + math.log(ratio) * np.arange(1, count)
    drawn = generator.uniform(wanted[-1] + 0.5 * math.log(ratio), math.log(first), size=pool)
    nearest_to = np.unique(np.abs(drawn[None] - wanted[:, None]).argmin(axis=1))
    return np.concatenate([[first], np.sort(np.exp(drawn[nearest_to]))[::-1]])
