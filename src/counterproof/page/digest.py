"""The digest: which papers an issue holds, why it holds none, and the mail it becomes.

An issue is of a day (``daily:2026-11-23``) or an ISO week (``weekly:2026-W48``) and of one subscriber. It holds what
was listed since the issue before it, and a few days further back for what sources were late with; no paper is ever in
two issues of a person, whatever it was merged with meanwhile. Making issues again changes nothing.
"""

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Literal

from counterproof.page.outbox import Letterhead, letter, message_id, plain, render_mail
from counterproof.page.store import Listed, Store
from counterproof.page.subscribers import (
    Rhythm,
    Subscriber,
    all_subscribers,
    forget_unconfirmed,
    get_subscriber,
    topic_match,
    unsubscribe_token,
)
from counterproof.page.views import Query, Views, period, saved_views

__all__ = ["FoundNew", "Issue", "Queued", "issue_letter", "issue_name", "make_issue", "new_papers", "queue_issues"]

LATE: Mapping[Rhythm, timedelta] = {"daily": timedelta(days=3), "weekly": timedelta(days=7)}
MOST = 50
LISTED = 100  # papers of a saved trending or similar list that count as on it
READ = ("done", "unchanged")  # outcomes of a pull that missed nothing
SHOWN = 400  # letters of an abstract


@dataclass(frozen=True)
class FoundNew:
    """A paper that is new for a subscriber.

    Attributes:
        paper: id.
        reasons: the person's topics and views that it is in, as ``topic: ...`` and ``view: ...``; none are needed when
            the person named none.
        votes: of the page's readers.
        day: the latest day it was listed on, within the days asked about.
    """

    paper: int
    reasons: tuple[str, ...]
    votes: int
    day: str


@dataclass(frozen=True)
class Issue:
    """What a mail says.

    Attributes:
        name: ``daily:2026-11-23`` or ``weekly:2026-W48``.
        day: it was made for.
        since: the day after which papers count as listed since the last issue.
        papers: what it holds, with `found` at the same place.
        more: papers that match and did not fit.
        why_empty: why it holds none; empty when it holds some.
        missing: sources that could not be read, so that papers may be missing.
        gone: the person's views that are no longer saved.
    """

    name: str
    day: date
    since: date
    papers: tuple[Listed, ...]
    found: tuple[FoundNew, ...]
    more: int
    why_empty: tuple[str, ...]
    missing: tuple[str, ...]
    gone: tuple[str, ...]


def issue_name(rhythm: Rhythm, day: date) -> str:
    """What the issue of a day is called; every day of an ISO week has the same weekly issue.

    Example:
        >>> issue_name("daily", date(2026, 11, 23)), issue_name("weekly", date(2027, 1, 1))
        ('daily:2026-11-23', 'weekly:2026-W53')
    """
    year, week, _ = day.isocalendar()
    return f"daily:{day.isoformat()}" if rhythm == "daily" else f"weekly:{year}-W{week:02}"


def _issue_day(name: str) -> date | None:
    """The day of an issue, of a weekly one its Monday; None of another mail."""
    rhythm, _, when = name.partition(":")
    if rhythm == "daily":
        return date.fromisoformat(when)
    if rhythm == "weekly":
        return date.fromisoformat(f"{when}-1")
    return None


# which papers


def _listed(store: Store, since: date, until: date) -> dict[int, str]:
    """Papers listed from one day to another, both included, as what they are merged into; with the latest day."""
    rows = store.db.execute(
        "WITH RECURSIVE up (day, id) AS (SELECT day, paper FROM appearances WHERE day BETWEEN ? AND ? UNION "
        "SELECT up.day, merged_into FROM up JOIN papers ON papers.id = up.id WHERE merged_into IS NOT NULL) "
        "SELECT papers.id, max(up.day) FROM up JOIN papers ON papers.id = up.id WHERE papers.merged_into IS NULL "
        "GROUP BY papers.id",
        (since.isoformat(), until.isoformat()),
    )
    return {row[0]: row[1] for row in rows}


def _had(store: Store, subscriber: Subscriber, papers: Sequence[int]) -> set[int]:
    """Those that the person got, under this name or one that was merged into it."""
    rows = store.db.execute(
        # Every merge has a row, so what was merged into a paper is found without reading all papers.
        "WITH RECURSIVE whole (top, id) AS (SELECT value, value FROM json_each(?) UNION "
        "SELECT whole.top, merges.merged FROM whole JOIN merges ON merges.kept = whole.id AND merges.undone IS NULL) "
        "SELECT DISTINCT top FROM whole WHERE EXISTS "
        "(SELECT 1 FROM delivered WHERE delivered.subscriber = ? AND delivered.paper = whole.id)",
        (json.dumps(list(papers)), subscriber.id),
    )
    return {row[0] for row in rows}


def _votes(store: Store, papers: Sequence[int]) -> dict[int, int]:
    rows = store.db.execute(
        "SELECT paper, sum(value) FROM (SELECT paper, value, max(id) FROM votes "
        "WHERE paper IN (SELECT value FROM json_each(?)) GROUP BY paper, voter) GROUP BY paper",
        (json.dumps(list(papers)),),
    )
    return {row[0]: int(row[1]) for row in rows}


def _reasons(store: Store, subscriber: Subscriber, papers: list[int], views: Views) -> dict[int, list[str]]:
    """Of these papers, those in the person's topics and views, with the names of them."""
    reasons: dict[int, list[str]] = {}
    if not papers:
        return reasons
    inside = set(papers)
    for topic in subscriber.wishes.topics:
        match = topic_match(topic)
        if match is not None:
            # New papers have the highest numbers: the range keeps a common word from visiting the whole index.
            rows = store.db.execute(
                "SELECT rowid FROM words WHERE words MATCH ? AND rowid BETWEEN ? AND ?",
                (match, min(papers), max(papers)),
            )
            for (paper,) in rows:
                if paper in inside:
                    reasons.setdefault(paper, []).append(f"topic: {topic}")
    known = saved_views(store)
    for name in subscriber.wishes.views:
        if name in known:
            for paper in _in_view(store, known[name], papers, views):
                reasons.setdefault(paper, []).append(f"view: {name}")
    return reasons


def _in_view(store: Store, query: Query, papers: Sequence[int], views: Views) -> set[int]:
    """Of these papers, those on a saved list: of a search those with all its words, of a trending or similar list those
    among its first hundred."""
    condition, values = query.where.sql("papers.id")
    if query.view in ("day", "week", "month") and query.at:
        first, last = period(query.view, query.at)
        condition += " AND day BETWEEN ? AND ?"
        values += [first.isoformat(), last.isoformat()]
    if query.view == "search":
        match = topic_match(query.words)
        if match is None:
            return set()
        condition += " AND id IN (SELECT rowid FROM words WHERE words MATCH ? AND rowid BETWEEN ? AND ?)"
        values += [match, min(papers), max(papers)]
    rows = store.db.execute(
        f"SELECT id FROM papers WHERE id IN (SELECT value FROM json_each(?)){condition}", (json.dumps(papers), *values)
    )
    inside = {row[0] for row in rows}
    if query.view in ("trending", "similar") and inside:
        inside &= {item.paper.id for item in views.page(query, limit=LISTED).items}
    return inside


def new_papers(
    store: Store, subscriber: Subscriber, since: date, until: date, *, views: Views | None = None
) -> list[FoundNew]:
    """What was listed from one day to another, both included, is what the person asked for, and was not delivered to
    them yet.

    Args:
        views: for saved trending and similar lists; keep one for many persons, it remembers the last rankings.

    Returns:
        those in most of the person's topics and views first; of equals, those with most votes, then the latest.
    """
    days = _listed(store, since, until)
    had = _had(store, subscriber, list(days))
    fresh = [paper for paper in days if paper not in had]
    if subscriber.wishes.topics or subscriber.wishes.views:
        reasons = _reasons(store, subscriber, fresh, views or Views(store))
        fresh = [paper for paper in fresh if paper in reasons]
    else:
        reasons = {}
    votes = _votes(store, fresh)
    found = [FoundNew(paper, tuple(reasons.get(paper, ())), votes.get(paper, 0), days[paper]) for paper in fresh]
    found.sort(key=lambda one: (one.day, one.paper), reverse=True)
    found.sort(key=lambda one: (-len(one.reasons), -one.votes))
    return found


def make_issue(
    store: Store, subscriber: Subscriber, *, day: date | None = None, most: int = MOST, views: Views | None = None
) -> Issue:
    """The issue of a day for a person, whether or not it was sent; nothing is changed.

    Args:
        day: default today, UTC.
        most: papers in an issue.
        views: see `new_papers`.
    """
    day = day or date.fromisoformat(store.today())
    rhythm = subscriber.wishes.rhythm
    base = _last(store, subscriber, day)
    found = new_papers(store, subscriber, base - LATE[rhythm], day, views=views)
    shown = tuple(found[:most])
    known = {row[0] for row in store.db.execute("SELECT name FROM saved_views")}
    return Issue(
        name=issue_name(rhythm, day),
        day=day,
        since=base,
        papers=tuple(store.get_all([one.paper for one in shown])),
        found=shown,
        more=len(found) - len(shown),
        why_empty=() if found else tuple(_why_empty(store, subscriber, base, day)),
        missing=tuple(_unread_sources(store)),
        gone=tuple(view for view in subscriber.wishes.views if view not in known),
    )


def _last(store: Store, subscriber: Subscriber, day: date) -> date:
    """The day of the person's last issue before this one, else that of their consent, else the day before."""
    rows = store.db.execute(
        "SELECT issue FROM outbox WHERE subscriber = ? AND state != 'failed' AND issue NOT LIKE 'confirm:%' "
        "ORDER BY id DESC LIMIT 60",
        (subscriber.id,),
    )
    own = issue_name(subscriber.wishes.rhythm, day)
    before = [when for row in rows if row[0] != own and (when := _issue_day(row[0])) is not None and when < day]
    if subscriber.confirmed is not None:
        before.append(min(date.fromisoformat(subscriber.confirmed[:10]), day - timedelta(days=1)))
    return max(before, default=day - timedelta(days=1))


# why there are none


def _unread_sources(store: Store) -> list[str]:
    """Sources whose last pull failed, broke off or was interrupted."""
    rows = store.db.execute(
        "SELECT pulls.source, pulls.outcome FROM pulls JOIN sources ON sources.name = pulls.source "
        "WHERE pulls.id IN (SELECT max(id) FROM pulls WHERE outcome != 'running' GROUP BY source) ORDER BY pulls.source"
    )
    return [row["source"] for row in rows if row["outcome"] not in READ]


def _why_empty(store: Store, subscriber: Subscriber, base: date, day: date) -> list[str]:
    listed = _listed(store, base + timedelta(days=1), day)
    had = _had(store, subscriber, list(listed))
    others = len(listed) - len(had)
    wishes = subscriber.wishes
    if others:
        named = [f"“{topic}”" for topic in wishes.topics] + [f"the view “{view}”" for view in wishes.views]
        told = "One new paper was" if others == 1 else f"{others} new papers were"
        return [f"{told} listed, but none is in what you asked for: {', '.join(named)}."]
    if listed:
        return ["You had every paper that was listed since then in an earlier digest."]
    days = [base + timedelta(days=number) for number in range(1, (day - base).days + 1)]
    if all(one.weekday() >= 5 for one in days):
        return ["It is the weekend: arXiv and most other sources list nothing."]
    read = store.db.execute("SELECT fetched FROM records WHERE source != 'card' ORDER BY id DESC LIMIT 1").fetchone()
    pulled = store.db.execute("SELECT max(coalesce(finished, started)) FROM pulls").fetchone()
    latest = max([moment for moment in (read and read[0], pulled[0]) if moment], default=None)
    if latest is None:
        return ["No source was ever read; this page's operator has to add one."]
    if date.fromisoformat(latest[:10]) < base:
        return [f"No source was read since {_spoken(date.fromisoformat(latest[:10]))}."]
    return ["No source listed a new paper."]


# the mail


def _spoken(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _shortened(text: str) -> str:
    text = plain(text)
    if len(text) <= SHOWN:
        return text
    cut = text[:SHOWN].rsplit(" ", 1)[0]
    return f"{cut} …"


def _authors(names: Sequence[str]) -> str:
    shown = ", ".join(plain(name)[:80] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _safe_link(address: str | None) -> str | None:
    return address if address and re.fullmatch(r"https?://[!#-;=?-~]{1,1000}", address) else None


def _paper_links(letterhead: Letterhead, paper: Listed) -> tuple[str | None, str | None]:
    """Where the paper is on our page, and where its source has it."""
    entry = paper.entry
    source = entry.links.get("page")
    if entry.arxiv:
        source = f"https://arxiv.org/abs/{entry.arxiv}"
    elif entry.doi:
        source = f"https://doi.org/{entry.doi}"
    return _safe_link(letterhead.link("paper", paper.path)), _safe_link(source)


def issue_letter(store: Store, subscriber: Subscriber, issue: Issue, letterhead: Letterhead) -> bytes:
    """The issue as a message, text and HTML."""
    items: list[dict[str, Any]] = []
    for paper, found in zip(issue.papers, issue.found, strict=True):
        entry = paper.entry
        ours, theirs = _paper_links(letterhead, paper)
        items.append(
            {
                "title": plain(entry.title)[:500],
                "authors": _authors(entry.authors),
                "day": found.day,
                "votes": found.votes,
                "reasons": found.reasons,
                "abstract": _shortened(entry.abstract),
                "slug": entry.slug,
                "ours": ours,
                "theirs": theirs,
            }
        )
    number = len(items) + issue.more
    what = "No new papers" if not number else "1 new paper" if number == 1 else f"{number} new papers"
    year, week, _ = issue.day.isocalendar()
    when = _spoken(issue.day) if subscriber.wishes.rhythm == "daily" else f"week {week} of {year}"
    token = unsubscribe_token(subscriber)
    text, made = render_mail(
        "digest",
        what=what,
        when=when,
        since=_spoken(issue.since),
        items=items,
        more=issue.more,
        why_empty=issue.why_empty,
        missing=[plain(name)[:80] for name in issue.missing],
        gone=issue.gone,
        wishes=subscriber.wishes,
        consent=subscriber.confirmed and _spoken(date.fromisoformat(subscriber.confirmed[:10])),
        name=letterhead.name,
        page=letterhead.page,
        stop=letterhead.link("unsubscribe", token),
        stop_mail=letterhead.stop or (None if letterhead.local else letterhead.sender),
        to=subscriber.email,
        token=token,
        fill=lambda text, indent: textwrap.fill(
            text, 76, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ),
    )
    return letter(
        letterhead,
        subscriber,
        identity=message_id(letterhead, issue.name, subscriber),
        date=store.clock(),
        subject=f"{what}, {when}",
        text=text,
        html=made,
        stoppable=True,
    )


@dataclass
class Queued:
    """What a call of `queue_issues` did: persons whose issue was put into the outbox, had been before, or had nothing
    in it and was left out; and persons forgotten who never confirmed."""

    queued: int = 0
    known: int = 0
    empty: int = 0
    papers: int = 0
    forgotten: int = 0
    missing: list[str] = field(default_factory=list)


def queue_issues(
    store: Store,
    letterhead: Letterhead,
    *,
    rhythm: Rhythm | None = None,
    day: date | None = None,
    most: int = MOST,
    empty: Literal["send", "skip"] = "send",
    watch: Callable[[int], None] | None = None,
) -> Queued:
    """Put the issue of a day into the outbox for everybody who is active and does not have it yet.

    Killed at any moment, each person has the issue or has not; the next call goes on.

    Args:
        rhythm: only the daily or the weekly one; default both.
        day: default today, UTC.
        most: papers in an issue.
        empty: whether an issue without papers, which says why, is sent.
        watch: called with how many persons were looked at.
    """
    day = day or date.fromisoformat(store.today())
    views = Views(store)
    done = Queued(forgotten=forget_unconfirmed(store), missing=_unread_sources(store))
    for number, subscriber in enumerate(all_subscribers(store, state="active", rhythm=rhythm), 1):
        name = issue_name(subscriber.wishes.rhythm, day)
        row = store.db.execute(
            "SELECT 1 FROM outbox WHERE issue = ? AND subscriber = ?", (name, subscriber.id)
        ).fetchone()
        if row is not None:
            done.known += 1
        else:
            issue = make_issue(store, subscriber, day=day, most=most, views=views)
            if not issue.papers and empty == "skip":
                done.empty += 1
            elif _queue(store, subscriber, issue, letterhead):
                done.queued += 1
                done.papers += len(issue.papers)
            else:
                done.known += 1
        if watch is not None:
            watch(number)
    return done


def _queue(store: Store, subscriber: Subscriber, issue: Issue, letterhead: Letterhead) -> bool:
    """Whether it was put there now; not if another process did, or the person stopped it meanwhile."""
    message = issue_letter(store, subscriber, issue, letterhead)
    with store.transaction():
        if get_subscriber(store, subscriber.id).state != "active":
            return False
        new = store.db.execute(
            "INSERT OR IGNORE INTO outbox (issue, subscriber, message_id, message, state, changed) "
            "VALUES (?, ?, ?, ?, 'queued', ?)",
            (issue.name, subscriber.id, message_id(letterhead, issue.name, subscriber), message, store.now()),
        ).rowcount
        if new:
            store.db.executemany(
                "INSERT OR IGNORE INTO delivered (subscriber, paper, issue) VALUES (?, ?, ?)",
                [(subscriber.id, one.paper, issue.name) for one in issue.found],
            )
        return bool(new)
