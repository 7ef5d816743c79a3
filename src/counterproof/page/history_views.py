"""A history to look at: one page of HTML and SVG without script, and the same as text and JSON."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterproof.page.history_data import KINDS, RELATIONS, Event, Work

if TYPE_CHECKING:
    from jinja2 import Environment

    # The history itself is duck-typed here: what it looks like does not depend on how credit is computed.
    History = Any
    Credit = Any

__all__ = ["choose_events", "reference", "roots_json", "roots_text", "timeline_html", "timeline_text"]

ERAS = (
    (-math.inf, 1900, "Before 1900"),
    (1900, 1950, "1900 to 1949"),
    (1950, 1970, "The fifties and sixties"),
    (1970, 1990, "The seventies and eighties"),
    (1990, 2010, "The nineties and two-thousands"),
    (2010, 2020, "The twenty-tens"),
    (2020, math.inf, "Since 2020"),
)
WIDTH = 1000.0  # of a drawing, in its own units
DOT = 4.0
STEP = 10.0  # between two dots that would touch


def choose_events(
    history: "History",
    *,
    kind: str | None = None,
    person: str | None = None,
    root_of: str | None = None,
    disputed: bool = False,
    since: float = -math.inf,
    until: float = math.inf,
) -> list[Event]:
    """Events that fulfil all conditions, the earliest first.

    Args:
        history: events and edges.
        kind: one of `KINDS`.
        person: part of a name, in any case.
        root_of: an event or paper; it and all that it builds on.
        disputed: only those in dispute.
        since, until: years; an interval counts when it touches them.

    Raises:
        UserError: `root_of` is not there.
    """
    chosen = list(history.events.values())
    if root_of is not None:
        history.event(root_of)
        roots = {row.id for row in history.ancestors(root_of, samples=0)} | {root_of}
        chosen = [event for event in chosen if event.id in roots]
    return [
        event
        for event in chosen
        if (kind is None or event.kind == kind)
        and (person is None or any(person.lower() in name.lower() for name in event.people))
        and (event.disputes or not disputed)
        and event.when.end >= since
        and event.when.start <= until
    ]


def timeline_text(events: Iterable[Event]) -> str:
    """A line per event: when, id, title, people; a star marks a dispute."""
    rows = [(str(event.when), f"{event.id}{' *' if event.disputes else ''}", event) for event in events]
    wide = max((len(when) for when, *_ in rows), default=0), max((len(name) for _, name, _ in rows), default=0)
    lines = []
    for when, name, event in rows:
        people = f" ({', '.join(event.people)})" if event.people else ""
        lines.append(f"{when:>{wide[0]}}  {name:{wide[1]}}  {event.title}{people}")
    return "\n".join(lines)


def roots_json(history: "History", name: str, *, top: int | None = None, samples: int = 200) -> dict[str, Any]:
    """What an event or a paper builds on, as JSON values; see `History.ancestors`."""
    event = history.event(name)
    return {
        "id": name,
        "title": event.title,
        "roots": [
            {
                "id": row.id,
                "title": history.events[row.id].title,
                "year": history.events[row.id].when.text,
                "people": list(history.events[row.id].people),
                "credit": row.kept,
                "low": row.low,
                "high": row.high,
                "reach": row.reach,
                "rank": [row.rank_low, row.rank_high],
                "path": list(row.path),
                "path_share": row.path_share,
                "sentence": history.sentence(row.path),
            }
            for row in history.ancestors(name, top=top, samples=samples)
        ],
    }


def roots_text(history: "History", name: str, *, top: int | None = 10, samples: int = 200) -> str:
    """The roots of an event or a paper: credit with its interval, and the strongest path as a sentence."""
    found = roots_json(history, name, top=top, samples=samples)
    if not found["roots"]:
        return f"{found['title']}: nothing is noted that it builds on."
    lines = [f"{found['title']} builds on, by share of credit (with an interval over what annotators might say):"]
    for row in found["roots"]:
        people = f", {_and(row['people'])}" if row["people"] else ""
        lines.append(
            f"{row['credit']:6.1%} ({row['low']:.1%} to {row['high']:.1%})  {row['title']}, {row['year']}{people}"
        )
        if len(row["path"]) > 2:
            lines.append(f"        {row['sentence']}.")
    return "\n".join(lines)


def reference(work: Work) -> str:
    """A work as a line of a bibliography."""
    parts = [_and(work.authors), work.title, work.venue, "" if work.year is None else str(work.year)]
    return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts if part)


def _and(names: Sequence[str]) -> str:
    if len(names) > 1 and names[-1] == "others":
        return f"{', '.join(names[:-1])} and others"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


# --- HTML -------------------------------------------------------------------------------------------------------------


def timeline_html(history: "History", credit: "Credit", *, samples: int = 200, top: int = 30) -> str:
    """The page: drawing, roots, disputes side by side, every event with its sources, indexes.

    Args:
        history: what is shown.
        credit: of the roots that the page is about.
        samples: for each root's own table.
        top: so many events in the table of all roots.
    """
    events: Mapping[str, Event] = history.events
    rows = {row.id: row for row in credit.table}
    whole = sum(credit.roots.values()) or 1.0
    later: dict[str, list[Any]] = {}
    earlier: dict[str, list[Any]] = {}
    for edge in history.edges:
        later.setdefault(edge.earlier, []).append(edge)
        earlier.setdefault(edge.later, []).append(edge)
    views: list[dict[str, Any]] = []
    for event in events.values():
        builds_on = sorted(earlier.get(event.id, ()), key=lambda edge: -edge.share)
        views.append(
            {
                "event": event,
                "kind": _slug(event.kind),
                "people": _and(event.people),
                "credit": f"{rows[event.id].kept / whole:.1%}",
                "sources": [(source, history.works.get(source.key)) for source in event.sources],
                "disputes": [_dispute(history, dispute) for dispute in event.disputes],
                "builds_on": [
                    {
                        "to": events[edge.earlier],
                        "relation": RELATIONS[edge.relation],
                        "share": f"{edge.share:.2f}".removeprefix("0"),
                        "edge": edge,
                    }
                    for edge in builds_on
                ],
                "built_on_by": sorted((events[e.later] for e in later.get(event.id, ())), key=lambda e: e.moment),
            }
        )
    eras = [
        {"name": name, "events": [view for view in views if start <= view["event"].when.start < end]}
        for start, end, name in ERAS
    ]
    credited = [row for row in credit.table if row.id not in credit.roots and row.kept > 0][:top]
    most = max((row.high for row in credited), default=1.0)
    roots = [name for name in events if name in credit.roots]
    people: dict[str, list[Event]] = {}
    for event in events.values():
        for name in event.people:
            if name != "others":
                people.setdefault(name, []).append(event)
    return (
        _environment()
        .get_template("timeline.html")
        .render(
            eras=[era for era in eras if era["events"]],
            views=views,
            kinds=[(kind, _slug(kind)) for kind in KINDS if any(event.kind == kind for event in events.values())],
            counts={
                "events": len(events),
                "edges": len({(edge.later, edge.earlier) for edge in history.edges}),
                "works": len(history.works),
                "disputes": sum(len(event.disputes) for event in events.values()),
            },
            annotators=sorted({edge.annotator for edge in history.edges}),
            drawings=[_drawing(list(events.values()), name) for name in ("logarithmic", "linear")] if events else [],
            credited=[
                {
                    "event": events[row.id],
                    "kept": f"{row.kept / whole:.1%}",
                    "interval": f"{row.low / whole:.1%} to {row.high / whole:.1%}",
                    "bar": [round(1000 * value / most, 1) for value in (row.low, row.kept, row.high)],
                    "ranks": f"{row.rank_low} to {row.rank_high}",
                    "sentence": history.sentence(row.path),
                }
                for row in credited
            ],
            roots=[{"event": events[name], **roots_json(history, name, top=8, samples=samples)} for name in roots],
            disputed=[view for view in views if view["disputes"]],
            people=[{"name": name, "events": people[name]} for name in sorted(people, key=_surname)],
            pattern=_pattern(history),
            reference=reference,
        )
    )


def _dispute(history: "History", dispute: Any) -> dict[str, Any]:
    sides = [
        {"side": side, "sources": [(source, history.works.get(source.key)) for source in side.sources]}
        for side in dispute.sides
    ]
    return {"question": dispute.question, "sides": sides}


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def _surname(name: str) -> tuple[str, str]:
    return (name.split()[-1].lower() if name.split() else "", name.lower())


def _drawing(events: Sequence[Event], scale: str) -> dict[str, Any]:
    """Dots in a lane for each kind, and ticks; touching dots are stacked."""
    first, last = min(event.when.start for event in events), max(event.when.end for event in events)
    now = last + 3.0

    def place(year: float) -> float:
        if scale == "linear":
            share = (year - first) / max(last - first, 1.0)
        else:
            span = math.log((now - first) / (now - last))
            share = 1.0 - math.log((now - year) / (now - last)) / span if span else 0.5
        return 14.0 + share * (WIDTH - 28.0)

    lanes, top = [], 4.0
    for kind in KINDS:
        inside = [event for event in events if event.kind == kind]
        if not inside:
            continue
        ends: list[float] = []  # of each row of this lane, where its last dot ends
        dots: list[dict[str, Any]] = []
        for event in inside:
            left, right = place(event.when.start), place(event.when.end)
            row = next((i for i, end in enumerate(ends) if left - end >= STEP), len(ends))
            ends[row : row + 1] = [right]
            dots.append({"event": event, "x": round(left, 1), "end": round(right, 1), "row": row})
        height = 18.0 + STEP * max(len(ends), 1)
        for dot in dots:
            dot["y"] = round(top + 18.0 + STEP * dot["row"] + STEP / 2, 1)
        lanes.append(
            {"kind": kind, "slug": _slug(kind), "top": round(top, 1), "height": round(height, 1), "dots": dots}
        )
        top += height + 4.0
    ticks, free = [], -math.inf
    for year, label in _ticks(first, last, now, scale):
        x = place(year)
        half = 3.6 * len(label)
        if x - half >= free and half <= x <= WIDTH - half:
            ticks.append({"x": round(x, 1), "label": label})
            free = x + half + 8.0
    return {"scale": scale, "lanes": lanes, "ticks": ticks, "height": round(top + 20.0, 1), "dot": DOT}


def _ticks(first: float, last: float, now: float, scale: str) -> list[tuple[float, str]]:
    def label(year: float) -> str:
        return f"{year:.0f}" if abs(year) < 10_000 else f"{2000 - year:.3g} years ago"

    if scale == "linear":
        rough = max(last - first, 1.0) / 8
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        years = [step * number for number in range(math.ceil(first / step), math.floor(last / step) + 1)]
    else:
        ages = [factor * 10.0**power for power in range(0, 11) for factor in (1, 1.5, 2, 3, 5, 7)]
        years = sorted({_round(now - age, age) for age in ages})
        years = [year for year in years if first <= year <= last]
    return [(year, label(year)) for year in years]


def _round(year: float, age: float) -> float:
    """A year that is round for its age."""
    unit = 1.0 if age < 8 else 5.0 if age < 20 else 10.0 if age < 150 else 50.0 if age < 1000 else age / 10
    return round(year / unit) * unit


def _pattern(history: "History") -> dict[str, Any] | None:
    """The turning points outside the graph, their fit, and how well lists that mean nothing fit."""
    from counterproof.page import acceleration, random_milestones, selected_milestones

    before = np.array([one.before for one in history.milestones])
    if len(before) < 3 or np.any(np.diff(before) >= 0):
        return None
    fit = acceleration(before)
    rng = np.random.default_rng(0)
    first, last, count = float(before[0]), float(before[-1]), len(before)
    draws: dict[str, Callable[[], Any]] = {
        "random times, sorted": partial(random_milestones, rng, first=first, last=last, count=count)
    }
    for pool in (100, 1000, 10_000):
        draws[f"chosen to fit among {pool:,} random times"] = partial(
            selected_milestones, rng, first=first, ratio=fit.ratio, count=count, pool=pool
        )
    nulls = []
    for name, draw in draws.items():
        fits = [acceleration(draw()) for _ in range(100)]
        nulls.append(
            {
                "name": name,
                "r_squared": f"{float(np.median([one.r_squared for one in fits])):.4f}",
                "as_good": sum(one.r_squared >= fit.r_squared for one in fits),
            }
        )
    return {
        "milestones": [(_years(one.before), one.title) for one in history.milestones],
        "ratio": f"{fit.ratio:.3f}",
        "r_squared": f"{fit.r_squared:.5f}",
        "nulls": nulls,
    }


def _years(value: float) -> str:
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if value >= unit:
            return f"{value / unit:g}{name} years"
    return f"{value:,.0f} years"


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    return Environment(
        loader=FunctionLoader(lambda name: re.sub(r"(?m)^ +", "", (folder / name).read_text(encoding="utf-8"))),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
