"""What can be wrong with a history: one rule each, with file and line."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from counterproof.page.history_data import Edge, Event, Place, Source, Work

__all__ = ["RULES", "Finding", "lint"]

LONGEST = 600
# Edges that say how a later event of an idea stands to an earlier one; "uses" does not.
SAME_IDEA = ("re-invents", "generalises", "special-case-of", "makes-practical")


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        place: file and line.
        rule: one of `RULES`.
        message: what is wrong, and the remedy.
    """

    place: Place
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}: {self.message}"


def lint(
    events: Mapping[str, Event], edges: Sequence[Edge], works: Mapping[str, Work], texts: Mapping[str, str], run: int
) -> list[Finding]:
    """Check a history against every rule; see `RULES`.

    Args:
        events, edges, works: what it holds.
        texts: texts of sources by name, for the rule "copied".
        run: words in a row that are too many to share with one.
    """
    if run < 2:
        raise ValueError(f"run is a number of words from 2 on, not {run}")
    history = _History(events, edges, works, texts, run)
    found = [Finding(place, rule, message) for rule, check in RULES.items() for place, message in check(history)]
    return sorted(found, key=lambda one: (one.place.file, one.place.line, one.rule, one.message))


@dataclass(frozen=True)
class _History:
    events: Mapping[str, Event]
    edges: Sequence[Edge]
    works: Mapping[str, Work]
    texts: Mapping[str, str]
    run: int

    def joined(self) -> Iterator[tuple[Edge, Event, Event]]:
        """Edges whose ends are there."""
        for edge in self.edges:
            if edge.later in self.events and edge.earlier in self.events:
                yield edge, self.events[edge.later], self.events[edge.earlier]


Found = Iterator[tuple[Place, str]]


def _time(history: _History) -> Found:
    for edge, later, earlier in history.joined():
        if later is earlier:
            continue  # that is a cycle
        what = f"{later.id} ({later.when}) builds on {earlier.id} ({earlier.when})"
        if later.when.end < earlier.when.start:
            yield edge.place, f"{what}, which came later; turn the edge round, or mend a year"
        elif later.when.start <= earlier.when.end:
            if later.order is None or earlier.order is None:
                yield edge.place, f"{what} of the same time; give both an order, such as the month"
            elif (later.when.end, later.order) <= (earlier.when.end, earlier.order):
                yield edge.place, f"{what}, which has no smaller order; mend order, or turn the edge round"


def _cycle(history: _History) -> Found:
    roots: dict[str, dict[str, Edge]] = {}
    for edge, later, earlier in history.joined():
        roots.setdefault(later.id, {}).setdefault(earlier.id, edge)
    done: set[str] = set()
    for start in roots:
        if start in done:
            continue
        path, on_path, todo = [start], {start}, [iter(roots[start])]
        while todo:
            name = next(todo[-1], None)
            if name is None:
                todo.pop()
                on_path.discard(path[-1])
                done.add(path.pop())
            elif name in on_path:
                cycle = [*path[path.index(name) :], name]
                yield roots[path[-1]][name].place, f"{' -> '.join(cycle)} goes in a circle; take one of these edges out"
            elif name not in done:
                path.append(name)
                on_path.add(name)
                todo.append(iter(roots.get(name, {})))


def _source(history: _History) -> Found:
    for event in history.events.values():
        if not event.sources:
            yield event.place, f"{event.id} has no source; name a work that supports it"


def _priority(history: _History) -> Found:
    for event in history.events.values():
        if event.disputes and not any(source.kind == "primary" for source in event.sources):
            yield event.place, f"{event.id} is disputed and has no primary source"
        for dispute in event.disputes:
            if len(dispute.sides) < 2:
                yield dispute.place, f"{event.id}: {dispute.question!r} has one side only; give the other's claim"
            for side in dispute.sides:
                if not any(source.kind == "primary" for source in side.sources):
                    yield dispute.place, f"{event.id}: the side of {side.by} has no primary source"


def _idea(history: _History) -> Found:
    told = {(edge.later, edge.earlier) for edge, *_ in history.joined() if edge.relation in SAME_IDEA}
    ideas: dict[str, list[Event]] = {}
    for event in history.events.values():
        if event.idea:
            ideas.setdefault(event.idea, []).append(event)
    for title, same in _by_title(history).items():
        if len(same) > 1 and not (same[0].idea and len({event.idea for event in same}) == 1):
            ideas.setdefault(f"the title {title!r}", same)
    for idea, same in ideas.items():
        first, *rest = sorted(same, key=lambda event: event.moment)
        before = [first]
        for event in rest:
            if not any((event.id, one.id) in told or (one.id, event.id) in told for one in before):
                names = " or ".join(one.id for one in before)
                yield event.place, f"{event.id} shares {idea} with {names}; add an edge re-invents (or how it differs)"
            before.append(event)


def _by_title(history: _History) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in history.events.values():
        found.setdefault(" ".join(_words(event.title)), []).append(event)
    return found


def _orphan(history: _History) -> Found:
    joined = {name for edge in history.edges for name in (edge.later, edge.earlier)}
    for event in history.events.values():
        if event.id not in joined:
            yield event.place, f"nothing leads to or from {event.id}; add an edge, or leave it out"


def _share(history: _History) -> Found:
    totals: dict[tuple[str, str], float] = {}
    given: dict[tuple[str, str, str], Edge] = {}
    for edge in history.edges:
        if not 0 < edge.share <= 1:
            yield edge.place, f"the share of {edge.later} -> {edge.earlier} lies in (0, 1], not {edge.share:g}"
        key = (edge.later, edge.earlier, edge.annotator)
        if key in given:
            yield edge.place, f"{edge.annotator} gave {edge.later} -> {edge.earlier} a share in {given[key].place} too"
        given.setdefault(key, edge)
        before = totals.get((edge.later, edge.annotator), 0.0)
        totals[edge.later, edge.annotator] = before + edge.share
        if before <= 1 + 1e-9 < before + edge.share and edge.share <= 1:
            yield edge.place, f"the shares of {edge.later} by {edge.annotator} sum to {before + edge.share:g}, over 1"


def _key(history: _History) -> Found:
    used: set[str] = set()
    for event in history.events.values():
        sources: list[tuple[Place, Source]] = [(event.place, source) for source in event.sources]
        sources += [(d.place, source) for d in event.disputes for side in d.sides for source in side.sources]
        for place, source in sources:
            used.add(source.key)
            if source.key not in history.works:
                yield place, f"{event.id} refers to {source.key!r}, which is among no file's works"
    for key, work in history.works.items():
        if key not in used:
            yield work.place, f"no event refers to the work {key!r}"
    for edge in history.edges:
        for name in (edge.later, edge.earlier):
            if name not in history.events:
                yield edge.place, f"an edge refers to the event {name!r}, which is not there"


def _text(history: _History) -> Found:
    for event in history.events.values():
        if not event.text:
            yield event.place, f"{event.id} has no text; say in your own words what happened"
        elif len(event.text) > LONGEST:
            yield event.place, f"the text of {event.id} has {len(event.text)} characters, over {LONGEST}"
    for edge in history.edges:
        if not edge.evidence:
            yield edge.place, f"{edge.later} -> {edge.earlier} gives no evidence for its share"


def _copied(history: _History) -> Found:
    for name, text in history.texts.items():
        words = _words(text)
        runs = {tuple(words[i : i + history.run]) for i in range(len(words) - history.run + 1)}
        for event in history.events.values():
            own = _words(event.text)
            for i in range(len(own) - history.run + 1):
                if tuple(own[i : i + history.run]) in runs:
                    same = " ".join(own[i : i + history.run])
                    yield event.place, f"{event.id} has {history.run} words in a row of {name}: {same!r}; say it anew"
                    break


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


RULES: Mapping[str, Callable[[_History], Found]] = {
    "time": _time,
    "cycle": _cycle,
    "source": _source,
    "priority": _priority,
    "idea": _idea,
    "orphan": _orphan,
    "share": _share,
    "key": _key,
    "text": _text,
    "copied": _copied,
}
