"""New papers into the store: sources that are pulled, files that are imported, and our own cards.

Everything that is taken in is committed together with how far it was read, so a pull that dies goes on where it was,
and nothing is taken twice. Each pull and import leaves a row that counts what was new and names what was left out.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from counterproof.errors import UserError
from counterproof.page.catalogue import nearest, papers
from counterproof.page.fetching import Fetched, Fetcher, FetchError
from counterproof.page.readers import (
    FORMS,
    Broken,
    Found,
    Note,
    Record,
    Skipped,
    detect,
    parse_record,
    read,
    read_lines,
)
from counterproof.page.store import RANKS, Entry, Store

__all__ = [
    "KINDS",
    "Kind",
    "Pulled",
    "Source",
    "add_cards",
    "add_source",
    "find_source",
    "import_file",
    "list_merges",
    "list_sources",
    "pull",
    "rebuild",
    "remove_source",
]


@dataclass(frozen=True)
class Kind:
    """What can be pulled.

    Attributes:
        says: what it is.
        url: the address when none is given; None: one must be.
        options: what can be set, and what it means.
        needs: options without which nothing can be asked.
    """

    says: str
    url: str | None
    options: Mapping[str, str]
    needs: tuple[str, ...] = ()


MOST = "most papers of one pull"
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "arxiv": Kind(
            "arXiv's API, the papers changed last first",
            "https://export.arxiv.org/api/query",
            {"query": "as arXiv has it, such as cat:cs.CV", "most": f"{MOST} (1000)"},
            ("query",),
        ),
        "oai-pmh": Kind(
            "an OAI-PMH repository: whole archives, and what changed since",
            "https://oaipmh.arxiv.org/oai",
            {
                "set": "one set, such as cs:cs:CV",
                "prefix": "metadata format: arXiv or oai_dc (arXiv for arXiv, else oai_dc)",
                "since": "first day, YYYY-MM-DD",
                "most": f"{MOST} (100000); the next one goes on",
            },
        ),
        "daily-papers": Kind(
            "the daily papers of Hugging Face",
            "https://huggingface.co/api/daily_papers",
            {"since": "first day, YYYY-MM-DD (today)"},
        ),
        "semantic-scholar": Kind(
            "Semantic Scholar's search",
            "https://api.semanticscholar.org/graph/v1/paper/search",
            {"query": "words", "most": f"{MOST} (500)"},
            ("query",),
        ),
        "web": Kind(
            "an address that holds a list in a form that is read",
            None,
            {"format": f"one of {', '.join(FORMS)}; told by the content when left out"},
        ),
    }
)
BATCH = 2_000  # records of one transaction
LARGEST = 512 << 20  # bytes of a file that is read whole
STREAMED = 16 << 20  # bytes from which on JSON lines are read line by line
SCHOLAR_FIELDS = (
    "externalIds,title,abstract,year,publicationDate,authors,venue,citationCount,influentialCitationCount,url,"
    "openAccessPdf,fieldsOfStudy,tldr"
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Where papers are pulled from.

    Attributes:
        name: the user's.
        kind: of `KINDS`.
        url: the address.
        options: the kind's, and ``allow_private``.
        added: when, UTC.
        state: how far it was read; not for users.
    """

    name: str
    kind: str
    url: str
    options: Mapping[str, Any]
    added: str
    state: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "url": self.url,
            "options": dict(self.options),
            "added": self.added,
        }


@dataclass
class Pulled:
    """What a pull or an import did.

    Attributes:
        source: its name, or the file's.
        outcome: ``done``, ``unchanged`` (the server says so), ``partial`` (an answer broke off), ``failed``,
            ``interrupted``, or ``running``.
        new, changed, same: papers that were new, papers that this changed, records that were there.
        skipped: what was left out or guessed, in order.
        seconds: how long it took.
    """

    source: str
    outcome: str = "running"
    new: int = 0
    changed: int = 0
    same: int = 0
    skipped: list[Skipped | Note] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def records(self) -> int:
        return self.new + self.changed + self.same

    def skipped_json(self) -> list[dict[str, str]]:
        """``where`` with ``reason`` for what was left out, with ``note`` for what was taken in all the same."""
        return [
            {"where": item.where, "note": item.text}
            if isinstance(item, Note)
            else {"where": item.where, "reason": item.reason}
            for item in self.skipped
        ]

    def as_json(self) -> dict[str, Any]:
        counts = {"new": self.new, "changed": self.changed, "same": self.same}
        rest = {"skipped": self.skipped_json(), "seconds": round(self.seconds, 3)}
        return {"source": self.source, "outcome": self.outcome, **counts, **rest}


# sources


def add_source(store: Store, name: str, kind: str, url: str | None = None, **options: Any) -> Source:
    """Note a source; nothing is asked of it yet.

    Args:
        store: where.
        name: what it is to be called: letters, digits, ``.``, ``_``, ``-``.
        kind: of `KINDS`.
        url: over the kind's own.
        options: the kind's; ``allow_private=True`` to pull from this machine or its network.

    Raises:
        UserError: a name that is taken or cannot be one, an unknown kind, an option it has not or needs, a bad address.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"{name!r} cannot be a source's name: up to 64 letters, digits, '.', '_' and '-'")
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}{nearest(kind, list(KINDS)) or '; kinds: ' + ', '.join(KINDS)}")
    if name in RANKS and name != kind:
        raise UserError(f"the name {name} is kept for what really comes from there; take another")
    what = KINDS[kind]
    given = {option: value for option, value in options.items() if value is not None and value is not False}
    for option in given:
        if option != "allow_private" and option not in what.options:
            raise UserError(f"a source of the kind {kind} has no {option}; it has {', '.join(what.options)}")
    for option in what.needs:
        if not str(given.get(option, "")).strip():
            raise UserError(f"a source of the kind {kind} needs --{option}: {what.options[option]}")
    if "since" in given:
        _check_day(given["since"])
    if "most" in given and not 1 <= given["most"] <= 1_000_000:
        raise UserError(f"most is from 1 to 1,000,000, not {given['most']}")
    if "format" in given and given["format"] not in FORMS:
        raise UserError(f"no form {given['format']!r}; forms: {', '.join(FORMS)}")
    address = url or what.url
    if address is None:
        raise UserError(f"a source of the kind {kind} needs an address")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\x00-\x20\x7f]", address):
        raise UserError(f"{address!r} is not an address; one looks like https://example.org/feed.xml")
    if parts.username is not None or parts.password is not None:
        raise UserError("an address with a name or password in it is not kept")
    now = store.now()
    with store.transaction():
        if store.db.execute("SELECT 1 FROM sources WHERE name = ?", (name,)).fetchone():
            raise UserError(f"there is a source {name} already; remove it first: counterproof feed remove {name}")
        store.db.execute(
            "INSERT INTO sources (name, kind, url, options, added, state) VALUES (?, ?, ?, ?, ?, '{}')",
            (name, kind, address, json.dumps(given), now),
        )
    return find_source(store, name)


def _check_day(text: str) -> None:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no day; one looks like 2026-11-23") from None


def list_sources(store: Store) -> list[Source]:
    """By name."""
    rows = store.db.execute("SELECT * FROM sources ORDER BY name").fetchall()
    return [
        Source(row["name"], row["kind"], row["url"], json.loads(row["options"]), row["added"], json.loads(row["state"]))
        for row in rows
    ]


def find_source(store: Store, name: str) -> Source:
    """
    Raises:
        UserError: there is none.
    """
    known = {source.name: source for source in list_sources(store)}
    if name not in known:
        several = f"; sources: {', '.join(known)}" if known else "; there is none yet: counterproof feed add"
        raise UserError(f"no source {name!r}{nearest(name, list(known)) or several}")
    return known[name]


def remove_source(store: Store, name: str) -> None:
    """Pull no more from a source; its papers stay.

    Raises:
        UserError: there is none.
    """
    find_source(store, name)
    with store.transaction():
        store.db.execute("DELETE FROM sources WHERE name = ?", (name,))


# taking in


class _Run:
    """One pull or import: its row, and what it takes in, a batch and how far it got in one transaction."""

    def __init__(self, store: Store, name: str, word: str | None, say: Say | None, *, trusted: bool = True) -> None:
        self.store = store
        self.word = word
        self.say = say
        self.trusted = trusted
        self.pulled = Pulled(name)
        self.began = self.said = time.monotonic()
        now = store.now()
        with store.transaction():
            # Whoever wrote these died: a source is pulled by one process at a time.
            store.db.execute(
                "UPDATE pulls SET outcome = 'interrupted' WHERE source = ? AND outcome = 'running'", (name,)
            )
            self.number = store.db.execute(
                "INSERT INTO pulls (source, started, outcome, new, changed, same, skipped) "
                "VALUES (?, ?, 'running', 0, 0, 0, '[]')",
                (name, now),
            ).lastrowid

    def take(
        self, found: Iterable[Found], *, form: str = "", day: str | None = None, state: Mapping[str, Any] | None = None
    ) -> int:
        """Take in what was read.

        Args:
            found: it.
            form: what it is called as a source where nothing better is known.
            day: over what the records say themselves.
            state: changes of the source's state that are true once all of it is in.

        Returns:
            records that were not there.
        """
        stream, fresh, last = iter(found), 0, False
        while not last:
            batch = list(islice(stream, BATCH))
            last = len(batch) < BATCH
            counts = {"new": 0, "changed": 0, "same": 0}
            left = [item for item in batch if not isinstance(item, Record)]
            with self.store.transaction():
                for item in batch:
                    if isinstance(item, Record):
                        word = self.word or item.source or form or item.form
                        own = self.trusted or item.entry.slug is None
                        entry = item.entry if own else replace(item.entry, slug=None)
                        added = self.store.add(entry, source=word, form=item.form, raw=item.raw, day=day or item.day)
                        counts[added.outcome] += 1
                self._write(counts, left, state if last else None)
            self.pulled.new += counts["new"]
            self.pulled.changed += counts["changed"]
            self.pulled.same += counts["same"]
            self.pulled.skipped += left
            if self.say is not None:
                for note in left:
                    said = note.text if isinstance(note, Note) else f"left out: {note.reason}"
                    self.say(f"{self.pulled.source}: {note.where}: {said}")
            fresh += counts["new"] + counts["changed"]
            self._progress()
        return fresh

    def note(self, *items: Skipped | Note) -> None:
        self.take(items)

    def keep(self, **state: Any) -> None:
        """Change the source's state; None takes a value away."""
        with self.store.transaction():
            self._write({}, [], state)

    def _write(self, counts: Mapping[str, int], left: list[Any], state: Mapping[str, Any] | None) -> None:
        if left:
            whole = replace(self.pulled, skipped=[*self.pulled.skipped, *left])
            self.store.db.execute(
                "UPDATE pulls SET skipped = ? WHERE id = ?",
                (json.dumps(whole.skipped_json(), ensure_ascii=False), self.number),
            )
        if any(counts.values()):
            self.store.db.execute(
                "UPDATE pulls SET new = new + ?, changed = changed + ?, same = same + ? WHERE id = ?",
                (counts["new"], counts["changed"], counts["same"], self.number),
            )
        if state:
            row = self.store.db.execute("SELECT state FROM sources WHERE name = ?", (self.pulled.source,)).fetchone()
            if row is not None:
                merged = {**json.loads(row["state"]), **state}
                self.store.db.execute(
                    "UPDATE sources SET state = ? WHERE name = ?",
                    (json.dumps({k: v for k, v in merged.items() if v is not None}), self.pulled.source),
                )

    def _progress(self) -> None:
        if self.say is not None and time.monotonic() - self.said > 2:
            self.said = time.monotonic()
            rate = self.pulled.records / (self.said - self.began)
            self.say(f"{self.pulled.source}: {self.pulled.records:,} records so far, {rate:,.0f} a second")

    def end(self, outcome: str) -> Pulled:
        self.pulled.outcome = outcome
        self.pulled.seconds = time.monotonic() - self.began
        with self.store.transaction():
            self.store.db.execute(
                "UPDATE pulls SET outcome = ?, finished = ? WHERE id = ?", (outcome, self.store.now(), self.number)
            )
        return self.pulled


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One pull at a time for a store: sources allow one connection. A lock of the system's, so it dies with us.

    Raises:
        UserError: another process is pulling.
    """
    path = Path(f"{store.path}.pulling")
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another process is pulling; wait for its end, or stop it") from None
        yield
    finally:
        os.close(handle)


def pull(store: Store, name: str, fetcher: Fetcher | None = None, *, say: Say | None = None) -> Pulled:
    """Ask a source for what is new, and take it in.

    What was taken in before something goes wrong stays, with how far it was read.

    Args:
        store: where.
        name: the source.
        fetcher: default one with its own settings.
        say: is told what is left out at once, and how it goes every few seconds.

    Raises:
        UserError: no such source, or a source that could not be read; the pull's row says the same.
    """
    source = find_source(store, name)
    ways = {
        "arxiv": _pull_arxiv,
        "oai-pmh": _pull_oai,
        "daily-papers": _pull_daily,
        "semantic-scholar": _pull_scholar,
        "web": _pull_web,
    }
    with _alone(store):
        run = _Run(store, name, _word(source), say, trusted=False)
        try:
            return run.end(ways[source.kind](run, source, fetcher or Fetcher()))
        except UserError as problem:
            run.note(Broken("pull", str(problem)))
            run.end("failed")
            raise
        except KeyboardInterrupt:
            run.end("interrupted")
            raise


def _word(source: Source) -> str:
    """What its records are called by: arXiv's word counts for more than that of whoever writes like arXiv."""
    host = urlsplit(source.url).hostname or ""
    for known, domain in (
        ("arxiv", "arxiv.org"),
        ("daily-papers", "huggingface.co"),
        ("semantic-scholar", "semanticscholar.org"),
    ):
        if host == domain or host.endswith(f".{domain}"):
            return known
    return source.name


def _with(url: str, **more: Any) -> str:
    """An address with more in its query."""
    parts = urlsplit(url)
    added = urlencode({name: value for name, value in more.items() if value is not None})
    return urlunsplit(parts._replace(query="&".join(part for part in (parts.query, added) if part), fragment=""))


def _get(source: Source, fetcher: Fetcher, url: str, **more: Any) -> Fetched:
    return fetcher.get(url, allow_private=source.options.get("allow_private") or None, **more)


def _whole(found: Iterable[Found], url: str) -> list[Found]:
    """All of an answer.

    Raises:
        FetchError: it breaks off; the next page cannot be known from half of one.
    """
    items = list(found)
    for item in items:
        if isinstance(item, Broken):
            raise FetchError(f"{url}: {item.where}: {item.reason}")
    return items


def _must_be(data: bytes, form: str, url: str) -> None:
    """
    Raises:
        UserError: another form, such as a page that says that something is wrong.
    """
    held = detect(data, url)
    if held != form:
        raise UserError(f"{url}: expected {FORMS[form]}, and it holds {FORMS[held]}")


def _pull_arxiv(run: _Run, source: Source, fetcher: Fetcher) -> str:
    from counterproof.page.readers_xml import opensearch_total

    most = int(source.options.get("most", 1_000))
    reached = source.state.get("reached")  # by a pull that did not come to its end
    start = 0
    while start < most:
        url = _with(
            source.url,
            search_query=source.options["query"],
            start=start,
            max_results=min(200, most - start),
            sortBy="lastUpdatedDate",
            sortOrder="descending",
        )
        for _ in range(3):  # arXiv sometimes serves an empty page in the middle
            body = _get(source, fetcher, url).body
            _must_be(body, "arxiv-atom", url)
            found, total = _whole(read(body, "arxiv-atom"), url), opensearch_total(body)
            number = sum(not isinstance(item, Note) for item in found)
            if number or start >= (total or 0):
                break
        if number == 0:
            if start < min(total or 0, most):
                run.note(Note("pull", f"arXiv says there are {total:,} papers and served {start:,}"))
            break
        for item in found:
            if isinstance(item, Skipped) and "is an error of arXiv's" in item.reason:
                raise FetchError(f"{url}: {item.reason}")
        start += number
        fresh = run.take(found, state={"reached": max(start, reached or 0)})
        if total is not None and start >= total:
            break
        if fresh == 0:
            # From here on all is known: to where the pull that was interrupted had come.
            if reached is None or reached < start:
                break
            start, reached = max(start, reached), None
    run.keep(reached=None)
    return "done"


def _pull_oai(run: _Run, source: Source, fetcher: Fetcher) -> str:
    from counterproof.page.readers_xml import oai_answer

    ours = _word(source) == "arxiv"
    most = int(source.options.get("most", 100_000))
    token, begun = source.state.get("token"), source.state.get("begun")
    taken = 0
    while True:
        if token is not None:
            url = _with(source.url, verb="ListRecords", resumptionToken=token)
        else:
            begun = None
            url = _with(
                source.url,
                verb="ListRecords",
                metadataPrefix=source.options.get("prefix") or ("arXiv" if ours else "oai_dc"),
                set=source.options.get("set"),
                **{"from": source.state.get("since") or source.options.get("since")},
            )
        body = _get(source, fetcher, url).body
        _must_be(body, "oai-pmh", url)
        found, answer = _whole(read(body, "oai-pmh"), url), oai_answer(body)
        if answer.error == "badResumptionToken" and token is not None:
            run.note(Note("pull", "the place to go on from has expired; begun anew"))
            run.keep(token=None, begun=None)
            token = None
            continue
        if answer.error and answer.error != "noRecordsMatch":
            raise FetchError(f"{url}: {answer.error}: {answer.message}")
        begun = begun or answer.answered[:10] or run.store.today()
        fresh = run.take(found, state={"token": answer.token or None, "begun": begun})
        taken += len(found)
        if answer.token and answer.token == token and not fresh:
            run.keep(token=None, begun=None)
            raise FetchError(f"{url}: says to go on with the same answer again, without end")
        token = answer.token or None
        if token is None:
            run.keep(since=begun, begun=None)
            return "done"
        if taken >= most:
            run.note(Note("pull", f"{taken:,} records are enough for one pull; the next goes on"))
            return "done"


def _pull_daily(run: _Run, source: Source, fetcher: Fetcher) -> str:
    today = date.fromisoformat(run.store.today())
    # The last day may have been half published; a clock that was set back asks for no day twice over.
    first = source.state.get("day") or source.options.get("since") or today.isoformat()
    day = min(date.fromisoformat(first), today)
    while day <= today:
        page = 0
        while page < 20:
            url = _with(source.url, date=day.isoformat(), limit=100, p=page or None)
            try:
                body = _get(source, fetcher, url).body
            except FetchError as problem:
                if problem.status == 400 and day == today and page == 0:
                    run.note(Note(day.isoformat(), "the day has not begun there yet"))
                    break
                raise
            if body.strip() != b"[]":
                _must_be(body, "daily-papers", url)
            found = _whole(read(body, "daily-papers"), url)
            run.take(found, day=day.isoformat())
            if len(found) < 100:
                break
            page += 1
        run.keep(day=day.isoformat())
        day += timedelta(days=1)
    return "done"


def _pull_scholar(run: _Run, source: Source, fetcher: Fetcher) -> str:
    most = min(int(source.options.get("most", 500)), 1_000)  # the search serves no more
    offset = 0
    while offset < most:
        url = _with(
            source.url,
            query=source.options["query"],
            fields=SCHOLAR_FIELDS,
            offset=offset,
            limit=min(100, most - offset),
        )
        body = _get(source, fetcher, url).body
        _must_be(body, "semantic-scholar", url)
        found = _whole(read(body, "semantic-scholar"), url)
        run.take(found)
        following = json.loads(body).get("next")
        if not found or not isinstance(following, int) or following <= offset:
            break
        offset = following
    return "done"


def _pull_web(run: _Run, source: Source, fetcher: Fetcher) -> str:
    state = source.state
    got = _get(source, fetcher, source.url, etag=state.get("etag"), modified=state.get("modified"))
    if got.unchanged:
        return "unchanged"
    form = source.options.get("format") or detect(got.body, source.url)
    found = list(read(got.body, form, charset=got.charset))
    _check_words(found, form, source.url)
    broken = any(isinstance(item, Broken) for item in found)
    # What broke off is asked for again, whatever the server says of it then.
    after = {"etag": None, "modified": None} if broken else {"etag": got.etag, "modified": got.modified}
    run.take(found, form=source.name, state=after)
    return "partial" if broken else "done"


def _check_words(found: Iterable[Found], form: str, called: str) -> None:
    """Any words pass for a page saved as text.

    Raises:
        UserError: words that are none.
    """
    if form == "text" and not any(isinstance(item, Record) for item in found):
        raise UserError(f"nothing in {called} reads as a paper: no title followed by an abstract")


# files


def import_file(
    store: Store,
    path: Path,
    *,
    form: str | None = None,
    source: str | None = None,
    day: str | None = None,
    say: Say | None = None,
) -> Pulled:
    """Take in a file.

    Args:
        store: where.
        path: the file.
        form: one of `FORMS`; None: told by its content, and held against its name.
        source: what its records are called by; None: what they say, else the form.
        day: the day they were listed on, ``YYYY-MM-DD``; None: what they say, else the day of publication.
        say: is told what is left out at once, and how it goes every few seconds.

    Returns:
        what it did; ``partial`` when the file breaks off.

    Raises:
        UserError: a file that is not there, cannot be read, is too large, holds nothing that is known, or is not what
            its name or `form` says; nothing is taken in then.
    """
    if day is not None:
        _check_day(day)
    form = check_file(path, form)
    try:
        with open(path, "rb") as stream:
            lines = form == "json-lines" and stream.read(1).strip() != b"[" and path.stat().st_size >= STREAMED
            stream.seek(0)
            data = b"" if lines else stream.read()
            found = read_lines(stream) if lines else read(data, form)
            if form == "text":
                kept = list(found)
                _check_words(kept, form, str(path))
                found = iter(kept)
            run = _Run(store, str(path), source, say)
            try:
                run.take(found, day=day)
            except KeyboardInterrupt:
                run.end("interrupted")
                raise
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror}") from None
    broken = any(isinstance(item, Broken) for item in run.pulled.skipped)
    return run.end("partial" if broken else "done")


def check_file(path: Path, form: str | None = None) -> str:
    """The form of a file, before anything of it is taken in.

    Raises:
        UserError: as `import_file`.
    """
    if form is not None and form not in FORMS:
        raise UserError(f"no form {form!r}; forms: {', '.join(FORMS)}")
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the files in it")
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(STREAMED)
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror}") from None
    whole = size <= len(head)
    held = detect(head, str(path) if form is None else "", whole=whole)
    if form is not None and not _may_be(held, form):
        raise UserError(f"{path} is no {form}: it holds {FORMS[held]}")
    if held != "json-lines" and size > LARGEST:
        raise UserError(f"{path} has {size:,} bytes, more than the {LARGEST:,} that are read at once; divide it")
    return form or held


def _may_be(held: str, form: str) -> bool:
    """Whether a file that looks like one form may be another that the user says it is."""
    alike = ({"arxiv-atom", "arxiv-rss", "feed"}, {"daily-papers", "semantic-scholar", "json-lines"})
    return held == form or form == "text" or any({held, form} <= group for group in alike)


# cards, merges, everything anew


def add_cards(store: Store) -> dict[str, int]:
    """Our own papers into the store, so that search and views hold them too; again, only what changed.

    Returns:
        how many were new, changed, same.
    """
    counts = {"new": 0, "changed": 0, "same": 0}
    with store.transaction():
        for paper in papers().values():
            year, month = paper.year, 1
            dated = re.match(r"(\d\d)(\d\d)\.", paper.arxiv or "")
            if dated and 1 <= int(dated[2]) <= 12:  # arXiv's ids begin with year and month
                year, month = 2000 + int(dated[1]), int(dated[2])
            entry = Entry(
                title=paper.title,
                abstract=f"{paper.summary} {paper.sections.get('Idea', '')}",
                arxiv=paper.arxiv,
                slug=paper.slug,
                published=None if paper.arxiv else str(paper.year),  # arXiv knows the day
                categories=paper.tags,
                links={"code": f"https://github.com/{paper.repository}"} if paper.repository else {},
                extra={"room": paper.room, "status": paper.status},
            )
            counts[store.add(entry, source="card", form="card", day=f"{year}-{month:02d}-01").outcome] += 1
    return counts


def rebuild(store: Store) -> int:
    """Read every record again with the readers of today, and say of every paper what its records say.

    Returns:
        papers that changed.

    Raises:
        UserError: a record that its reader does not take any more; nothing is changed then.
    """
    return store.rebuild(parse_record)


def list_merges(store: Store) -> list[dict[str, Any]]:
    """Papers that were made one, the latest first: number, both keys, why, when, and when it was undone."""
    rows = store.db.execute(
        "SELECT merges.id, one.key AS kept, two.key AS merged, why, at, undone FROM merges "
        "JOIN papers AS one ON one.id = merges.kept JOIN papers AS two ON two.id = merges.merged "
        "ORDER BY merges.id DESC"
    )
    return [dict(row) for row in rows]
