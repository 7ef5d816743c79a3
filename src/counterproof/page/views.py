"""Lists of papers: the latest, a day, an ISO week, a month, what is trending, a room, a search, papers like one.

A list is a `Query`; `Views.page` gives its pages. A page's cursor holds the moment it was made at, the last vote,
signal and paper that counted, and the place where it ended: what happens between two pages neither doubles nor moves a
paper.

What orders trending lists, days, weeks and months is a sum of parts, each of which is shown with its number
(`Score.formula`, `Item.parts`). All parts lose half of their worth in the same time, so the order of two papers changes
by votes and signals only, not by waiting.
"""

import base64
import binascii
import hashlib
import json
import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, get_args

from counterproof.errors import UserError
from counterproof.page.catalogue import ROOMS, nearest
from counterproof.page.finding import Filter, Finder, How
from counterproof.page.store import Listed, Store, stamp

__all__ = [
    "Item",
    "Page",
    "Query",
    "Score",
    "Views",
    "forget_view",
    "save_view",
    "saved_view",
    "saved_views",
]

View = Literal["latest", "day", "week", "month", "trending", "room", "search", "similar"]
MOST = 500  # papers on a page
KEPT = 32  # rankings that are remembered
SIMILAR = 100  # papers like one that are listed
WINDOW = 10  # half-lives after which a paper that nobody votes for leaves the trending list
PERIODS = ("day", "week", "month")


@dataclass(frozen=True)
class Score:
    """What a paper is worth.

    Attributes:
        half_life: days in which votes, signals and newness lose half of their worth; infinite: never.
        weights: of imported signals, by name; others do not count.
        prior: votes that the mean of a paper's source counts for.
        new: what being new is worth, to order papers that nobody voted for.
    """

    half_life: float = 3.0
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"upvotes": 0.5, "stars": 0.25, "comments": 0.25, "citations": 0.25}
    )
    prior: float = 2.0
    new: float = 0.1

    def formula(self) -> str:
        """The sum, in words and numbers."""
        signals = " + ".join(f"{weight:g} d log2(1 + {name})" for name, weight in self.weights.items())
        decays = math.isfinite(self.half_life)
        after = f"2^(-days since %s / {self.half_life:g})" if decays else "1 (nothing decays)"
        return (
            f"score = votes + {signals} + {self.new:g} d; d = {after % 'the paper was listed' if decays else after}; "
            f"votes = (n V + {self.prior:g} m d) / (n + {self.prior:g}), where n people voted, "
            f"V = {'the sum of ' + after % 'a vote' if decays else 'n'}, and m is the mean n of its source's papers "
            "here; signals are what a source said on the date beside them"
        )

    def decay(self, days: float) -> float:
        """What is left after so many days; a day ahead counts as a day behind, so a wrong clock favours nobody."""
        return float(2.0 ** (-abs(days) / self.half_life))


@dataclass(frozen=True)
class Query:
    """A list that can be asked for, saved, or made a feed of.

    Attributes:
        view: which kind.
        at: of a day ``2026-11-23``, a week ``2026-W48``, a month ``2026-11``, or empty for the present one; of a room
            its name; of similar papers the name of the paper.
        words: of a search.
        how: of a search: by words, by meaning, or both.
        since, until, source, room, runnable: see `counterproof.page.finding.Filter`.
        half_life: days, over the view's own.
    """

    view: View = "latest"
    at: str = ""
    words: str = ""
    how: How = "both"
    since: str | None = None
    until: str | None = None
    source: str | None = None
    room: str | None = None
    runnable: bool = False
    half_life: float | None = None

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> UserError:
            return UserError(f"{name}: expected {expected}, not {str(getattr(self, name))[:60]!r}")

        for name in ("at", "words"):
            if not isinstance(getattr(self, name), str):
                raise refuse(name, "text")
        if self.view not in get_args(View):
            raise refuse("view", f"one of {', '.join(get_args(View))}")
        if self.how not in get_args(How):
            raise refuse("how", f"one of {', '.join(get_args(How))}")
        for name in ("since", "until"):
            if getattr(self, name) is not None and _day(getattr(self, name)) is None:
                raise refuse(name, "a day such as 2026-11-23")
        if self.view in PERIODS:
            if self.at:
                period(self.view, self.at)
        elif self.view == "room":
            if self.at not in ROOMS:
                raise refuse("at", f"a room: {', '.join(ROOMS)}{nearest(str(self.at), list(ROOMS))}")
        elif self.view == "similar":
            if not self.at:
                raise refuse("at", "the name of a paper")
        elif self.at:
            raise refuse("at", f"nothing for the view {self.view}")
        if self.view == "search" and not re.search(r"\w", self.words):
            raise refuse("words", "what the paper is about")
        for name in ("source", "room"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise refuse(name, "a name")
        if not isinstance(self.runnable, bool):
            raise refuse("runnable", "true or false")
        if self.half_life is not None and not (
            isinstance(self.half_life, int | float) and 0.01 <= self.half_life <= 36_500
        ):
            raise refuse("half_life", "days between 0.01 and 36500")
        _ = self.where

    @property
    def where(self) -> Filter:
        room = self.at if self.view == "room" else self.room
        return Filter(since=self.since, until=self.until, source=self.source, room=room, runnable=self.runnable)

    @property
    def score(self) -> Score | None:
        """What orders the list; None where something else does."""
        if self.view not in ("trending", *PERIODS):
            return None
        # Within a day, a week or a month nothing decays unless that is asked for.
        own = Score().half_life if self.view == "trending" else math.inf
        return replace(Score(), half_life=own if self.half_life is None else float(self.half_life))

    def to_json(self) -> str:
        """The fields that say something, as JSON."""
        said = {name: value for name, value in asdict(self).items() if value not in (None, "", False)}
        return json.dumps(said, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Query":
        """The query of `to_json`.

        Raises:
            UserError: not one, naming what is wrong.
        """
        try:
            said = json.loads(text)
        except ValueError:
            raise UserError("a saved view is a JSON object") from None
        known = [item.name for item in fields(cls)]
        if not isinstance(said, dict) or not set(said) <= set(known):
            raise UserError(f"a saved view is a JSON object with some of {', '.join(known)}")
        return cls(**said)

    def title(self, today: str) -> str:
        """What stands over the list."""
        if self.view == "search":
            name = f"Papers on {' '.join(self.words.split())[:80]}"
        elif self.view == "similar":
            name = f"Papers like {self.at}"
        elif self.view == "room":
            name = f"Room: {self.at}"
        elif self.view in PERIODS:
            first, _ = period(self.view, self.at or present(self.view, today))
            names = {
                "day": f"{first:%A} {first.day} {first:%B %Y}",
                "week": f"Week {first:%V} of {first:%G}",
                "month": f"{first:%B %Y}",
            }
            name = f"Papers of {names[self.view]}"
        else:
            name = "Trending papers" if self.view == "trending" else "Latest papers"
        parts = [f"from {self.source}"] if self.source else []
        parts += [f"in the room {self.room}"] if self.room else []
        parts += ["that run here"] if self.runnable else []
        parts += [f"since {self.since}"] if self.since else []
        parts += [f"until {self.until}"] if self.until else []
        return " ".join([name, *parts])


@dataclass(frozen=True)
class Item:
    """A paper on a list.

    Attributes:
        paper: it.
        place: on the whole list, from 1; None on lists that may be longer than anyone counts.
        score: what orders it; None where that is the day.
        parts: what the score is the sum of, or comes from, by name.
        says: the parts as a line: ``3 votes 1.42 + 12 upvotes on 2026-11-22 1.80 + new 0.08 = 3.30``.
    """

    paper: Listed
    place: int | None
    score: float | None
    parts: Mapping[str, float]
    says: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            **self.paper.as_json(),
            "place": self.place,
            "score": self.score,
            "parts": dict(self.parts),
        }


@dataclass(frozen=True)
class Page:
    """A part of a list.

    Attributes:
        query: what was asked.
        title: of the list.
        items: papers in order.
        cursor: for the next page; None at the end.
        formula: how the list is ordered.
        notes: what the reader should know.
        moment: when the list was made, UTC; the same on all its pages.
        earlier, later: `at` of the neighbouring day, week or month; None where there is none yet.
    """

    query: Query
    title: str
    items: tuple[Item, ...]
    cursor: str | None
    formula: str
    notes: tuple[str, ...]
    moment: str
    earlier: str | None = None
    later: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "query": json.loads(self.query.to_json()),
            "items": [item.as_json() for item in self.items],
            "cursor": self.cursor,
            "formula": self.formula,
            "notes": list(self.notes),
            "moment": self.moment,
            "earlier": self.earlier,
            "later": self.later,
        }


@dataclass(frozen=True)
class Snapshot:
    """What counts on all pages of a list: events up to these numbers, at this moment."""

    moment: str
    votes: int
    signals: int
    papers: int


@dataclass(frozen=True)
class Ranked:
    paper: int
    score: float
    parts: Mapping[str, float]
    says: str


class Views:
    """Makes lists of a store's papers; keep one for each thread, it remembers the last rankings.

    Args:
        store: the papers.
        finder: for searches and similar papers; default one that searches by words.
    """

    def __init__(self, store: Store, finder: Finder | None = None) -> None:
        self.store = store
        self.finder = finder or Finder(store)
        self._rankings: OrderedDict[tuple[str, Snapshot], list[Ranked]] = OrderedDict()
        self._moments: OrderedDict[tuple[str, int, int, int], str] = OrderedDict()

    def page(self, query: Query, *, limit: int = 50, cursor: str | None = None) -> Page:
        """A page of a list.

        Args:
            query: which list.
            limit: most papers, 1 to 500.
            cursor: of the page before; None: the first.

        Raises:
            UserError: a cursor that is damaged or of another list, or a paper that is not there.
        """
        if not 1 <= limit <= MOST:
            raise UserError(f"a page has 1 to {MOST} papers, not {limit}")
        with self.store.clear_errors():
            snapshot, after = self._begin(query, cursor)
            if query.view in ("search", "similar"):
                return self._found(query, limit, snapshot, after)
            if query.score is None:
                return self._by_day(query, limit, snapshot, after)
            return self._scored(query, limit, snapshot, after)

    def papers(self, query: Query) -> Iterator[Item]:
        """All papers of a list, page by page."""
        cursor = None
        while True:
            page = self.page(query, limit=MOST, cursor=cursor)
            yield from page.items
            cursor = page.cursor
            if cursor is None:
                return

    # kinds of lists

    def _by_day(self, query: Query, limit: int, snapshot: Snapshot, after: Sequence[Any] | None) -> Page:
        condition, values = query.where.sql("papers.id")
        if after is not None:
            condition += " AND (day, id) < (?, ?)"
            values += [_text(after[0]), _number(after[1])]
        rows = self.store.db.execute(
            f"SELECT id, day FROM papers WHERE merged_into IS NULL AND id <= ?{condition} "
            "ORDER BY day DESC, id DESC LIMIT ?",
            (snapshot.papers, *values, limit + 1),
        ).fetchall()
        papers = self.store.get_all([row["id"] for row in rows[:limit]])
        items = tuple(Item(paper, None, None, {}) for paper in papers)
        more = (rows[limit - 1]["day"], rows[limit - 1]["id"]) if len(rows) > limit else None
        return self._made(query, items, more, snapshot, "the latest first, by the day they were listed")

    def _found(self, query: Query, limit: int, snapshot: Snapshot, after: Sequence[Any] | None) -> Page:
        last = None if after is None else (_number(after[0]), _number(after[1]))
        if query.view == "search":
            found = self.finder.search(query.words, how=query.how, where=query.where, limit=limit, after=last)
            hits, begin, more = found.hits, found.begin, found.more
        else:
            paper = self.store.find(query.at)
            if paper is None:
                raise UserError(f"no paper {query.at[:80]!r}; counterproof feed find looks for papers by words")
            found = self.finder.similar(paper, where=query.where, limit=SIMILAR)
            order = [hit.paper.id for hit in found.hits]
            begin = 0
            if last is not None:
                begin = order.index(last[0]) + 1 if last[0] in order else last[1] + 1
            hits, more = found.hits[begin : begin + limit], len(order) > begin + limit
        items = tuple(
            Item(hit.paper, begin + number + 1, hit.score, hit.parts,
                 ", ".join(f"{name} {value:.3g}" for name, value in hit.parts.items()))
            for number, hit in enumerate(hits)
        )  # fmt: skip
        formulas = {
            "words": "bm25, a title's words counting ten times an abstract's; papers with all words first",
            "meaning": "cosine similarity of MiniLM's vectors of title and abstract",
            "words and meaning": "half the sum of the scores by words and by meaning, each stretched to 0 .. 1",
        }
        ended = (hits[-1].paper.id, begin + len(hits) - 1) if more else None
        return self._made(query, items, ended, snapshot, formulas[found.by], found.notes)

    def _scored(self, query: Query, limit: int, snapshot: Snapshot, after: Sequence[Any] | None) -> Page:
        score = query.score
        assert score is not None
        ranking = self._ranking(query, score, snapshot)
        begin = 0
        if after is not None:
            ended = (-_real(after[0]), -_number(after[1]))
            begin = next((n for n, one in enumerate(ranking) if (-one.score, -one.paper) > ended), len(ranking))
        chosen = ranking[begin : begin + limit]
        papers = self.store.get_all([one.paper for one in chosen])
        items = tuple(
            Item(paper, begin + number + 1, one.score, one.parts, one.says)
            for number, (one, paper) in enumerate(zip(chosen, papers, strict=True))
        )
        more = (chosen[-1].score, chosen[-1].paper) if len(ranking) > begin + limit else None
        return self._made(query, items, more, snapshot, score.formula())

    def _made(
        self,
        query: Query,
        items: tuple[Item, ...],
        ended: tuple[Any, ...] | None,
        snapshot: Snapshot,
        formula: str,
        notes: tuple[str, ...] = (),
    ) -> Page:
        today = snapshot.moment[:10]
        earlier = later = None
        if query.view in PERIODS:
            at = query.at or present(query.view, today)
            first, last = period(query.view, at)
            if first > date.min + timedelta(days=40):
                earlier = present(query.view, str(first - timedelta(days=1)))
            if str(last) < today:
                later = present(query.view, str(last + timedelta(days=1)))
        cursor = None if ended is None else _sealed([_mark(query), *_values(snapshot), *ended])
        return Page(query, query.title(today), items, cursor, formula, notes, snapshot.moment, earlier, later)

    # scores

    def _ranking(self, query: Query, score: Score, snapshot: Snapshot) -> list[Ranked]:
        """The whole list in order: by score, then the paper that came last."""
        key = (query.to_json(), snapshot)
        if key not in self._rankings:
            self._rankings[key] = self._rank(query, score, snapshot)
            if len(self._rankings) > KEPT:
                self._rankings.popitem(last=False)
        self._rankings.move_to_end(key)
        return self._rankings[key]

    def _rank(self, query: Query, score: Score, snapshot: Snapshot) -> list[Ranked]:
        days = self._candidates(query, score, snapshot)
        kept = {paper: paper for paper in days}
        merged = self.store.db.execute("SELECT id, merged_into FROM papers WHERE merged_into IS NOT NULL").fetchall()
        into = {row[0]: row[1] for row in merged}
        for paper in into:
            final = paper
            while final in into:
                final = into[final]
            if final in days:
                kept[paper] = final
        known = json.dumps(sorted(kept))
        moment = _moment(snapshot.moment)
        last: dict[tuple[int, str], tuple[int, int, str]] = {}  # each voter's last word on each paper
        for row in self.store.db.execute(
            "SELECT id, paper, voter, value, at FROM votes WHERE paper IN (SELECT value FROM json_each(?)) AND id <= ? "
            "ORDER BY id",
            (known, snapshot.votes),
        ):
            last[kept[row["paper"]], row["voter"]] = (row["id"], row["value"], row["at"])
        voted: dict[int, list[float]] = defaultdict(list)
        for (paper, _), (_, value, at) in last.items():
            if value:
                voted[paper].append(score.decay(_days(moment, _moment(at))))
        signals: dict[int, dict[str, tuple[float, str]]] = defaultdict(dict)
        for row in self.store.db.execute(
            "SELECT paper, name, value, at FROM signals WHERE paper IN (SELECT value FROM json_each(?)) AND id <= ? "
            "ORDER BY id",
            (known, snapshot.signals),
        ):
            signals[kept[row["paper"]]][row["name"]] = (row["value"], row["at"][:10])
        sums: dict[str, int] = defaultdict(int)
        counts: dict[str, int] = defaultdict(int)
        for paper, (_, source) in days.items():
            sums[source] += len(voted.get(paper, ()))
            counts[source] += 1
        ranking = []
        for paper, (day, source) in days.items():
            listed = _listed(day)
            left = 0.0 if listed is None else score.decay(_days(moment, listed))
            votes, mean = voted.get(paper, []), sums[source] / counts[source]
            number = len(votes)
            worth: float = (number * math.fsum(votes) + score.prior * mean * left) / (number + score.prior)
            parts = {"votes": worth}
            said = [f"{number} {'vote' if number == 1 else 'votes'} {worth:.2f}"]
            for name, weight in score.weights.items():
                amount, said_on = signals.get(paper, {}).get(name, (0.0, ""))
                if amount > 0:
                    parts[name] = weight * left * math.log2(1 + amount)
                    said.append(f"{amount:,.0f} {name} on {said_on} {parts[name]:.2f}")
            parts["new"] = score.new * left
            said.append(f"new {parts['new']:.2f}")
            total = math.fsum(parts.values())
            ranking.append(Ranked(paper, total, parts, f"{' + '.join(said)} = {total:.2f}"))
        ranking.sort(key=lambda one: (-one.score, -one.paper))
        return ranking

    def _candidates(self, query: Query, score: Score, snapshot: Snapshot) -> dict[int, tuple[str, str]]:
        """Day and source of the papers that are ranked."""
        condition, values = query.where.sql("papers.id")
        if query.view in PERIODS:
            first, last = period(query.view, query.at or present(query.view, snapshot.moment[:10]))
            chosen = (
                "SELECT coalesce(merged_into, id) FROM papers WHERE id IN "
                "(SELECT paper FROM appearances WHERE day BETWEEN ? AND ?)"
            )
            bounds: list[str | int] = [str(first), str(last)]
        else:
            moment = _moment(snapshot.moment)
            window = timedelta(days=min(WINDOW * score.half_life, 36_500.0))
            begin, end = (stamp(moment + way * window) if _fits(moment, way * window) else "" for way in (-1, 1))
            end = end or "9999"
            chosen = (
                "SELECT id FROM papers WHERE merged_into IS NULL AND day BETWEEN ? AND ? "
                "UNION SELECT coalesce(merged_into, id) FROM papers WHERE id IN "
                "(SELECT paper FROM votes WHERE at BETWEEN ? AND ? AND id <= ?)"
            )
            bounds = [begin[:10], end[:10], begin, end, snapshot.votes]
        rows = self.store.db.execute(
            f"SELECT papers.id, papers.day, (SELECT source FROM appearances WHERE paper = papers.id "
            f"ORDER BY day, source LIMIT 1) AS source FROM papers WHERE id IN ({chosen}) AND merged_into IS NULL "
            f"AND id <= ?{condition}",
            (*bounds, snapshot.papers, *values),
        )
        return {row["id"]: (row["day"], row["source"] or "") for row in rows}

    # cursors

    def _begin(self, query: Query, cursor: str | None) -> tuple[Snapshot, Sequence[Any] | None]:
        if cursor is not None:
            opened = _opened(cursor)
            if opened[0] != _mark(query):
                raise UserError("this page belongs to another list; begin at the list's first page")
            moment = _text(opened[1])
            if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", moment) or _day(moment[:10]) is None:
                raise UserError(DAMAGED)
            return Snapshot(moment, *(_number(value) for value in opened[2:5])), opened[5:]
        votes, signals, papers = (
            self.store.db.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0]
            for table in ("votes", "signals", "papers")
        )
        now = self.store.now()
        # For a minute in which nothing happens the same ranking serves every reader.
        key = (query.to_json(), votes, signals, papers)
        last = self._moments.get(key)
        if last is None or not 0 <= _days(_moment(now), _moment(last)) * 86_400 < 60:
            self._moments[key] = now
            if len(self._moments) > KEPT:
                self._moments.popitem(last=False)
        return Snapshot(self._moments[key], votes, signals, papers), None


DAMAGED = "the address of this page is damaged; begin at the list's first page"


def _mark(query: Query) -> str:
    return hashlib.blake2b(query.to_json().encode(), digest_size=6).hexdigest()


def _values(snapshot: Snapshot) -> list[Any]:
    return [snapshot.moment, snapshot.votes, snapshot.signals, snapshot.papers]


def _sealed(values: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode().rstrip("=")


def _opened(cursor: str) -> list[Any]:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        opened = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        raise UserError(DAMAGED) from None
    if not isinstance(opened, list) or len(opened) != 7:
        raise UserError(DAMAGED)
    return opened


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise UserError(DAMAGED)
    return value


def _real(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(DAMAGED)
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 40:
        raise UserError(DAMAGED)
    return value


# days, weeks, months


def _day(text: Any) -> date | None:
    try:
        return date.fromisoformat(text) if isinstance(text, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", text) else None
    except ValueError:
        return None


def _moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _listed(day: str) -> datetime | None:
    """The beginning of a paper's day, of which some sources say the month or the year only."""
    found = re.match(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", day)
    whole = None if found is None else _day(f"{found[1]}-{found[2] or '01'}-{found[3] or '01'}")
    return None if whole is None else datetime(whole.year, whole.month, whole.day, tzinfo=UTC)


def _days(one: datetime, other: datetime) -> float:
    return (one - other).total_seconds() / 86_400


def _fits(moment: datetime, by: timedelta) -> bool:
    return 1000 <= moment.year + by.days / 365 <= 9998


def period(view: str, at: str) -> tuple[date, date]:
    """First and last day of a day, ISO week or month.

    Raises:
        UserError: it is not one.
    """
    try:
        if view == "day" and (day := _day(at)) is not None:
            return day, day
        if view == "week" and (found := re.fullmatch(r"(\d{4})-W(\d\d)", at)):
            first = date.fromisocalendar(int(found[1]), int(found[2]), 1)
            return first, first + timedelta(days=6)
        if view == "month" and (found := re.fullmatch(r"(\d{4})-(\d\d)", at)):
            first = date(int(found[1]), int(found[2]), 1)
            return first, (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
    except (ValueError, OverflowError):
        pass
    example = {"day": "2026-11-23", "week": "2026-W48", "month": "2026-11"}[view]
    raise UserError(f"{str(at)[:60]!r} is no {view}; write it as {example}")


def present(view: str, today: str) -> str:
    """The day, ISO week or month that a day is in."""
    day = date.fromisoformat(today)
    year, week, _ = day.isocalendar()
    return {"day": today, "week": f"{year:04d}-W{week:02d}", "month": today[:7]}[view]


# saved views


def save_view(store: Store, name: str, query: Query, *, replace: bool = False) -> None:
    """Keep a list under a name.

    Args:
        store: where.
        name: small letters, digits and hyphens, at most 60: it becomes part of addresses.
        query: the list.
        replace: whether it may take the place of one that has the name.

    Raises:
        UserError: another kind of name, or one that is taken.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,59}", name):
        raise UserError(f"{name[:80]!r} cannot name a view; use small letters, digits and hyphens, at most 60")
    with store.transaction():
        taken = store.db.execute("SELECT query FROM saved_views WHERE name = ?", (name,)).fetchone()
        if taken is not None and taken[0] != query.to_json() and not replace:
            raise UserError(f"a view {name!r} is there already; take another name, or replace it")
        store.db.execute(
            "INSERT INTO saved_views (name, query, made) VALUES (?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET query = excluded.query, made = excluded.made "
            "WHERE query != excluded.query",
            (name, query.to_json(), store.now()),
        )


def saved_view(store: Store, name: str) -> Query:
    """The list of a name.

    Raises:
        UserError: there is none, naming those that are like it.
    """
    row = store.db.execute("SELECT query FROM saved_views WHERE name = ?", (name,)).fetchone()
    if row is None:
        known = list(saved_views(store))
        close = nearest(name, known) or (f"; there are {', '.join(known[:20])}" if known else "")
        raise UserError(f"no saved view {name[:80]!r}{close}")
    return Query.from_json(row[0])


def saved_views(store: Store) -> dict[str, Query]:
    """Every saved list by name."""
    rows = store.db.execute("SELECT name, query FROM saved_views ORDER BY name")
    return {row[0]: Query.from_json(row[1]) for row in rows.fetchall()}


def forget_view(store: Store, name: str) -> None:
    """Forget a saved list.

    Raises:
        UserError: there is none.
    """
    saved_view(store, name)
    with store.transaction():
        store.db.execute("DELETE FROM saved_views WHERE name = ?", (name,))
