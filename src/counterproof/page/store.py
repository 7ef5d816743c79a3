"""The papers that were pulled, in one SQLite file: who they are, where they came from, what people think of them.

Every record is kept as it came, and everything else follows from the records: papers, their names and the search index
can be built anew (`Store.rebuild`). Votes and signals are events that are only ever added. Times are UTC, ISO 8601 with
a Z.

A paper has many names: an arXiv id (without version), a DOI, a slug of ours, and a digest of title, first author and
year. A record belongs to the paper that has one of its names; where its names belong to several, those are merged, and
a merge can be undone. Two different arXiv ids, or two DOIs of which neither is arXiv's own, are two papers whatever
their titles say.
"""

import hashlib
import json
import os
import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

from counterproof.bench.journal import home
from counterproof.database import clear_errors, look, make_folder, whole
from counterproof.errors import UserError
from counterproof.page.schema import MIGRATIONS

__all__ = ["Added", "Entry", "Listed", "Store", "arxiv_id", "utc_now"]

APPLICATION = 0x43505047  # "CPPG" in the file's header
PLAIN_RANK = 1
# What a record's word is worth where records of a paper differ.
RANKS: Mapping[str, int] = {"card": 4, "arxiv": 3, "semantic-scholar": 2, "daily-papers": 2}


def utc_now() -> datetime:
    """The present, aware, UTC."""
    return datetime.now(UTC)


def stamp(moment: datetime) -> str:
    """``2026-11-23T08:30:00Z``; an aware moment of any zone."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # JSON on one line
ADDRESS = re.compile(r"arxiv\.org/(?:abs|pdf|html|e-print)/([^?#\s]+)", re.IGNORECASE)
PREFIX = re.compile(r"^(?:oai:arxiv\.org:|10\.48550/arxiv\.)", re.IGNORECASE)
SUBJECT_CLASS = re.compile(r"\.[a-z]{2}/")
NO_WORD = re.compile(r"[\W_]+")
ARXIV = re.compile(r"(?:arxiv:)?(?P<id>\d{4}\.\d{4,5}|[a-z][a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?", re.IGNORECASE)


def arxiv_id(text: str) -> str | None:
    """An arXiv id without its version, old or new style, from an id or an address of arXiv's; None for anything else.

    Example:
        >>> arxiv_id("https://arxiv.org/abs/2207.13085v3"), arxiv_id("math.GT/0309136v1"), arxiv_id("10.1000/182")
        ('2207.13085', 'math/0309136', None)
    """
    address = ADDRESS.search(text)
    bare = address[1].removesuffix(".pdf") if address else text.strip()
    found = ARXIV.fullmatch(PREFIX.sub("", bare))
    if found is None:
        return None
    # An old id's subject class is no part of it: math.GT/0309136 is math/0309136.
    return SUBJECT_CLASS.sub("/", found["id"].lower())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a record says of a paper, in our terms.

    Attributes:
        title, abstract: plain text with TeX left as it is, white space made single; abstract may be empty.
        authors: as written, in order.
        arxiv: id without version, or None.
        doi: lower case, without ``https://doi.org/``, or None.
        slug: of a card of ours, or None.
        published, updated: UTC, ISO 8601, a date or a time; None when not said.
        venue: journal or conference as written, or empty.
        categories: subjects as the source names them.
        links: addresses by what they are: ``page``, ``pdf``, ``code``, ``project``, ...
        signals: numbers the source had on the day, by name: ``upvotes``, ``citations``, ``stars``, ``comments``.
        extra: what else a source said that is worth keeping, by name.
    """

    title: str
    abstract: str = ""
    authors: tuple[str, ...] = ()
    arxiv: str | None = None
    doi: str | None = None
    slug: str | None = None
    published: str | None = None
    updated: str | None = None
    venue: str = ""
    categories: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    signals: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError("an entry needs a title")
        object.__setattr__(self, "title", " ".join(self.title.split()))
        object.__setattr__(self, "abstract", " ".join(self.abstract.split()))
        object.__setattr__(self, "authors", tuple(" ".join(name.split()) for name in self.authors))
        object.__setattr__(self, "categories", tuple(self.categories))
        if self.arxiv is not None:
            clean = arxiv_id(self.arxiv)
            if clean is None:
                raise ValueError(f"{self.arxiv!r} is no arXiv id")
            object.__setattr__(self, "arxiv", clean)
        if self.doi is not None:
            clean = re.sub(r"^(?:doi:|https?://(?:dx\.)?doi\.org/)", "", self.doi.strip().lower())
            if not re.fullmatch(r"10\.\d{4,9}/\S+", clean):
                raise ValueError(f"{self.doi!r} is no DOI")
            own = arxiv_id(clean)
            object.__setattr__(self, "arxiv", self.arxiv or own)
            object.__setattr__(self, "doi", None if own else clean)

    def names(self) -> list[str]:
        """Its aliases, the one that becomes the key first."""
        found = []
        if self.arxiv is not None:
            found.append(f"arxiv:{self.arxiv}")
        if self.doi is not None:
            found.append(f"doi:{self.doi}")
        if self.slug is not None:
            found.append(f"slug:{self.slug}")
        found.append(f"hash:{title_digest(self.title, self.authors, self.published)}")
        return found

    def to_json(self) -> str:
        """One line, the fields that say something, in a fixed order."""
        return compact({name: value for name in ENTRY_FIELDS if (value := getattr(self, name))})

    def rest(self) -> str:
        """`to_json` without title and abstract, which have columns of their own."""
        names = (name for name in ENTRY_FIELDS if name not in ("title", "abstract"))
        return compact({name: value for name in names if (value := getattr(self, name))})

    @classmethod
    def from_json(cls, text: str, **more: str) -> "Entry":
        """The entry of `to_json`; of `rest`, with title and abstract as `more`."""
        values = json.loads(text) | more
        for name in ("authors", "categories"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


ENTRY_FIELDS = tuple(sorted(item.name for item in fields(Entry)))


def title_digest(title: str, authors: Sequence[str], published: str | None) -> str:
    """Sixteen hexadecimal digits for normalised title, first author's last word, and year."""

    def plain(text: str) -> str:
        return NO_WORD.sub("", unicodedata.normalize("NFKD", text.casefold()))

    first = authors[0] if authors else ""
    family = first.split(",")[0] if "," in first else (first.split() or [""])[-1]
    year = (published or "")[:4]
    return hashlib.sha256("\n".join((plain(title), plain(family), year)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Listed:
    """A paper as the store has it.

    Attributes:
        id: in this file; stable, but use `key` outside of it.
        key: its canonical name, such as ``arxiv:2207.13085``.
        entry: what its records say, the most trusted first.
        day: the day it was first listed, ``YYYY-MM-DD``.
        changed: when what is said of it last changed, UTC.
    """

    id: int
    key: str
    entry: Entry
    day: str
    changed: str

    @property
    def path(self) -> str:
        """The key as a path of an address: ``arxiv/2207.13085``, ``arxiv/math/0309136``, ``slug/group-detr``."""
        return self.key.replace(":", "/", 1)

    def as_json(self) -> dict[str, Any]:
        """JSON values: the fields above, the entry's beside them."""
        said: dict[str, Any] = json.loads(self.entry.to_json())
        return {"key": self.key, "path": f"/paper/{self.path}", "day": self.day, "changed": self.changed, **said}


Outcome = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class Added:
    """What adding a record did."""

    paper: int
    outcome: Outcome


class Store:
    """The file of papers; made on first use.

    Args:
        path: the SQLite file; default ``home() / "page.sqlite"``.
        clock: gives the present; a test may freeze it.
        read_only: open for reading: nothing is made or migrated.

    Raises:
        UserError: a file that is no store, is damaged or comes from a newer version; a folder that cannot be written;
            a full disk. What is in the file is left as it is.
    """

    def __init__(
        self, path: Path | None = None, *, clock: Callable[[], datetime] = utc_now, read_only: bool = False
    ) -> None:
        self.path = path if path is not None else home() / "page.sqlite"
        self._unindexed: set[int] = set()  # papers whose words enter the index when the transaction ends
        self.clock = clock
        if not read_only:
            make_folder(self.path)
        elif not self.path.exists():
            raise UserError(f"{self.path} does not exist; import something first: counterproof feed import FILE")
        with self.clear_errors():
            mode = "rwc" if not read_only else "ro&immutable=1" if self._unchanging() else "ro"
            self.db = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode={mode}",
                uri=True,
                timeout=30,
                isolation_level=None,
                check_same_thread=False,
            )
            self.db.row_factory = sqlite3.Row
            self._prepare(read_only)

    def _unchanging(self) -> bool:
        """Whether the file lies where nobody can write: SQLite reads a WAL file there only when told so.

        A log that was not taken in would be passed over then, so that is left to SQLite's own error.
        """
        log = self.path.with_name(self.path.name + "-wal")
        logged = log.exists() and log.stat().st_size > 0
        return not logged and bool(os.statvfs(self.path).f_flag & os.ST_RDONLY)

    def _prepare(self, read_only: bool) -> None:
        version, _ = look(self.db, self.path, application=APPLICATION, newest=len(MIGRATIONS), name="page")
        if read_only:
            if version < len(MIGRATIONS):
                raise UserError(f"{self.path} is of an older version; open it once for writing: counterproof feed list")
            return
        self.db.execute("PRAGMA page_size = 8192")  # of a new file: abstracts fill a smaller page badly
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute("PRAGMA cache_size = -32000")  # KiB
        while version < len(MIGRATIONS):
            with self.transaction():
                # Another process may have migrated since.
                version = self.db.execute("PRAGMA user_version").fetchone()[0]
                if version < len(MIGRATIONS):
                    for statement in MIGRATIONS[version].split(";")[:-1]:
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA application_id = {APPLICATION}")
                    version += 1
                    self.db.execute(f"PRAGMA user_version = {version}")

    def close(self) -> None:
        self.db.close()

    def now(self) -> str:
        """The present as it is stored."""
        return stamp(self.clock())

    def today(self) -> str:
        """The present day in UTC."""
        return self.now()[:10]

    def clear_errors(self) -> AbstractContextManager[None]:
        """Say what a database error means for the user.

        Raises:
            UserError: in place of what sqlite3 raises.
        """
        return clear_errors(
            self.path,
            kept="what was stored is kept",
            damaged="no page; nothing was changed. Move it away and import again",
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; inside another transaction, part of that."""
        with self.clear_errors():
            if self.db.in_transaction:
                yield
                return
            try:
                with whole(self.db):
                    yield
                    # In one go: an index that is fed between other statements writes its segments far more often.
                    self.db.execute(
                        "INSERT INTO words (rowid, title, abstract) SELECT id, title, abstract FROM papers "
                        "WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id",
                        (json.dumps(sorted(self._unindexed)),),
                    )
            finally:
                self._unindexed.clear()

    # records and papers

    def add(
        self,
        entry: Entry,
        *,
        source: str,
        form: str = "entry",
        raw: bytes | None = None,
        day: date | str | None = None,
    ) -> Added:
        """Take in a record.

        Args:
            entry: what it says.
            source: where it comes from: ``arxiv``, ``daily-papers``, ``semantic-scholar``, ``card``, or any other name.
            form: what `raw` is (arxiv-atom, bibtex, ...), for `rebuild`.
            raw: the record as it came; None when the entry is all there was.
            day: the day the source listed it on; None: the day it was published on, else today.

        Returns:
            the paper, and whether it is new, was changed by this record, or says the same as before.
        """
        listed = None if day is None else str(day)[:10]
        text = entry.to_json()
        digest = hashlib.blake2b("\0".join((source, listed or "", text)).encode(), digest_size=16).digest()
        with self.transaction():
            known = self.db.execute("SELECT paper FROM records WHERE digest = ?", (digest,)).fetchone()
            if known is not None:
                return Added(self._kept(known[0]), "same")
            now = self.now()
            names = entry.names()
            paper = self._owner(entry, names, now)
            outcome: Outcome
            if paper is None:
                outcome = "new"
                said = (entry.published or now)[:10]
                listed = listed or said + "-01-01"[len(said) - 4 :]  # a year or month alone: its first day
                paper = self.db.execute(
                    "INSERT INTO papers (key, slug, title, abstract, entry, published, day, changed) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        self._free_key(names),
                        entry.slug,
                        entry.title,
                        entry.abstract,
                        entry.rest(),
                        entry.published,
                        listed,
                        now,
                    ),
                ).lastrowid
                assert paper is not None
                self._unindexed.add(paper)
            else:
                outcome = "changed"
            self.db.executemany(
                "INSERT INTO aliases (alias, paper) VALUES (?, ?) ON CONFLICT DO NOTHING",
                [(name, paper) for name in names],
            )
            self.db.execute(
                "INSERT INTO records (paper, source, form, digest, fetched, day, entry, raw) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (paper, source, form, digest, now, listed, text, None if raw is None else zlib.compress(raw, 1)),
            )
            if listed is not None:
                self.db.execute("INSERT OR IGNORE INTO appearances VALUES (?, ?, ?)", (listed, paper, source))
            self._note_signals(paper, entry.signals, now)
            if outcome == "changed" and not self._refresh(paper, now):
                outcome = "same"
            return Added(paper, outcome)

    def _owner(self, entry: Entry, names: Sequence[str], now: str) -> int | None:
        """The paper a record belongs to, after merging where its names belong to several; None for a new one."""
        owners: list[int] = []
        marks = ", ".join("?" * len(names))
        rows = self.db.execute(f"SELECT alias, paper FROM aliases WHERE alias IN ({marks})", tuple(names)).fetchall()
        for name in names:
            for alias, paper in rows:
                if alias == name and paper not in owners and not self._contradicts(entry, paper):
                    owners.append(paper)
        for other in owners[1:]:
            self.merge(owners[0], other, why=f"a record names both: {', '.join(names)}")
        return owners[0] if owners else None

    def _contradicts(self, entry: Entry, paper: int) -> bool:
        """Whether the paper has an arXiv id or DOI, and the entry another one."""
        for kind, value in (("arxiv", entry.arxiv), ("doi", entry.doi)):
            if value is None:
                continue
            theirs = self.db.execute(
                "SELECT alias FROM aliases WHERE paper = ? AND alias LIKE ?", (paper, f"{kind}:%")
            ).fetchall()
            if theirs and (f"{kind}:{value}",) not in [tuple(row) for row in theirs] and kind == "arxiv":
                return True
            if theirs and kind == "doi" and entry.arxiv is None and all(row[0] != f"doi:{value}" for row in theirs):
                return True
        return False

    def _free_key(self, names: Sequence[str]) -> str:
        """The first name that is no paper's key; a digest that another paper has gets a number."""
        for name in names:
            if self.db.execute("SELECT 1 FROM papers WHERE key = ?", (name,)).fetchone() is None:
                return name
        number = 2
        while self.db.execute("SELECT 1 FROM papers WHERE key = ?", (f"{names[-1]}-{number}",)).fetchone():
            number += 1
        return f"{names[-1]}-{number}"

    def _refresh(self, paper: int, now: str) -> bool:
        """Say of a paper what its records say; whether that is a change."""
        rows = self.db.execute(
            "SELECT source, entry, day FROM records WHERE paper = ? ORDER BY id", (paper,)
        ).fetchall()
        entry = combined([(source, Entry.from_json(text)) for source, text, _ in rows])
        old = self.db.execute("SELECT title, abstract, entry, day FROM papers WHERE id = ?", (paper,)).fetchone()
        day = min([row["day"] for row in rows if row["day"]] + [old["day"]])
        said = (entry.title, entry.abstract, entry.rest())
        if said == (old["title"], old["abstract"], old["entry"]) and day == old["day"]:
            return False
        self._take_from_index(paper)
        self.db.execute(
            "UPDATE papers SET title = ?, abstract = ?, entry = ?, published = ?, slug = ?, day = ?, changed = ? "
            "WHERE id = ?",
            (*said, entry.published, entry.slug, day, now, paper),
        )
        self._unindexed.add(paper)
        return True

    def _take_from_index(self, paper: int) -> None:
        """Before a paper's words change: the index must be told what they were."""
        if paper in self._unindexed:
            self._unindexed.discard(paper)
            return
        self.db.execute(
            "INSERT INTO words (words, rowid, title, abstract) "
            "SELECT 'delete', id, title, abstract FROM papers WHERE id = ?",
            (paper,),
        )

    def _note_signals(self, paper: int, signals: Mapping[str, float], now: str) -> None:
        for name, value in signals.items():
            last = self.db.execute(
                "SELECT value FROM signals WHERE paper = ? AND name = ? ORDER BY id DESC LIMIT 1", (paper, name)
            ).fetchone()
            if last is None or last[0] != value:
                self.db.execute(
                    "INSERT INTO signals (paper, name, value, at) VALUES (?, ?, ?, ?)", (paper, name, value, now)
                )

    def rebuild(self, parse: Callable[[str, bytes], Entry] | None = None) -> int:
        """Say of every paper again what its records say, and index it anew.

        Args:
            parse: ``parse(form, raw)``: reads raw records again, after a reader was mended; None: the entries as they
                were read are used. An entry whose names changed keeps its paper.

        Returns:
            papers that changed.
        """
        now, changed = self.now(), 0
        with self.transaction():
            if parse is not None:
                for row in self.db.execute("SELECT id, form, raw FROM records WHERE raw IS NOT NULL").fetchall():
                    text = parse(row["form"], zlib.decompress(row["raw"])).to_json()
                    self.db.execute("UPDATE records SET entry = ? WHERE id = ?", (text, row["id"]))
            # The index is emptied rather than corrected: it may not say what the table says.
            self.db.execute("INSERT INTO words (words) VALUES ('delete-all')")
            papers = [row[0] for row in self.db.execute("SELECT id FROM papers WHERE merged_into IS NULL")]
            self._unindexed.update(papers)
            for paper in papers:
                changed += self._refresh(paper, now)
        return changed

    # finding one

    def find(self, name: str) -> Listed | None:
        """The paper of a name: a key, an alias, an arXiv id or address with or without version, a DOI, a slug."""
        row = self.db.execute("SELECT paper FROM aliases WHERE alias = ?", (name,)).fetchone()
        if row is None:
            found = self.db.execute("SELECT id FROM papers WHERE key = ?", (name,)).fetchone()
            if found is not None:
                return self.get(found[0])
        if row is None:
            kind, _, rest = name.partition(":")
            bare = rest if kind.lower() in ("arxiv", "doi", "slug") else name
            arxiv = arxiv_id(bare)
            doi = re.sub(r"^https?://(?:dx\.)?doi\.org/", "", bare.lower())
            for alias in ([f"arxiv:{arxiv}"] if arxiv else []) + [f"doi:{doi}", f"slug:{bare}"]:
                row = row or self.db.execute("SELECT paper FROM aliases WHERE alias = ?", (alias,)).fetchone()
        return None if row is None else self.get(row[0])

    def get(self, paper: int) -> Listed:
        """The paper of an id; of one that was merged, the paper it was merged into.

        Raises:
            KeyError: there is none.
        """
        return self.get_all([paper])[0]

    def get_all(self, papers: Sequence[int]) -> list[Listed]:
        """The papers of ids, in their order.

        Raises:
            KeyError: one is not there.
        """
        found: dict[int, sqlite3.Row] = {}
        for start in range(0, len(papers), 500):
            part = papers[start : start + 500]
            marks = ", ".join("?" * len(part))
            for row in self.db.execute(
                f"SELECT id, key, title, abstract, entry, day, changed, merged_into FROM papers WHERE id IN ({marks})",
                tuple(part),
            ):
                found[row["id"]] = row
        listed = []
        for paper in papers:
            row = found[paper]
            if row["merged_into"] is not None:
                listed.append(self.get(self._kept(paper)))
            else:
                entry = Entry.from_json(row["entry"], title=row["title"], abstract=row["abstract"])
                listed.append(Listed(row["id"], row["key"], entry, row["day"], row["changed"]))
        return listed

    def _kept(self, paper: int) -> int:
        while True:
            row = self.db.execute("SELECT merged_into FROM papers WHERE id = ?", (paper,)).fetchone()
            if row[0] is None:
                return paper
            paper = row[0]

    def count(self) -> int:
        """Papers, merged ones left out."""
        return int(self.db.execute("SELECT count(*) FROM papers WHERE merged_into IS NULL").fetchone()[0])

    def aliases(self, paper: int) -> list[str]:
        """Every name of a paper, sorted."""
        rows = self.db.execute("SELECT alias FROM aliases WHERE paper = ? ORDER BY alias", (paper,))
        return [row[0] for row in rows]

    def records(self, paper: int) -> list[tuple[str, str, Entry, bytes | None]]:
        """The records of a paper in order: source, when it was fetched, what it said, and how it came."""
        rows = self.db.execute("SELECT source, fetched, entry, raw FROM records WHERE paper = ? ORDER BY id", (paper,))
        return [(row["source"], row["fetched"], Entry.from_json(row["entry"]), _unpacked(row["raw"])) for row in rows]

    # merging

    def merge(self, kept: int, merged: int, *, why: str) -> int:
        """Make two papers one: names, records, votes and days of the second become the first's.

        Votes, signals, appearances and what was delivered keep the paper they were given to, and count for the one it
        was merged into; so undoing a merge loses nothing.

        Returns:
            the number of the merge, for `unmerge`.

        Raises:
            ValueError: a paper with itself.
        """
        kept, merged = self._kept(kept), self._kept(merged)
        if kept == merged:
            raise ValueError(f"paper {kept} cannot be merged with itself")
        now = self.now()
        with self.transaction():
            aliases = self.aliases(merged)
            records = [row[0] for row in self.db.execute("SELECT id FROM records WHERE paper = ?", (merged,))]
            number = self.db.execute(
                "INSERT INTO merges (kept, merged, aliases, records, why, at) VALUES (?, ?, ?, ?, ?, ?)",
                (kept, merged, json.dumps(aliases), json.dumps(records), why, now),
            ).lastrowid
            self.db.execute("UPDATE aliases SET paper = ? WHERE paper = ?", (kept, merged))
            self.db.execute("UPDATE records SET paper = ? WHERE paper = ?", (kept, merged))
            self._take_from_index(merged)
            self.db.execute("UPDATE papers SET merged_into = ?, slug = NULL WHERE id = ?", (kept, merged))
            self._refresh(kept, now)
        assert number is not None
        return number

    def unmerge(self, merge: int) -> None:
        """Undo a merge: the second paper is there again with the names and records it had.

        Raises:
            UserError: no such merge, one that was undone, or one of whose papers was merged since.
        """
        row = self.db.execute("SELECT * FROM merges WHERE id = ?", (merge,)).fetchone()
        if row is None or row["undone"] is not None:
            raise UserError(f"merge {merge} {'was undone' if row else 'does not exist'}; see: counterproof feed merges")
        later = self.db.execute(
            "SELECT id FROM merges WHERE id > ? AND undone IS NULL AND (kept IN (?, ?) OR merged IN (?, ?))",
            (merge, row["kept"], row["merged"], row["kept"], row["merged"]),
        ).fetchone()
        if later is not None:
            raise UserError(f"merge {later[0]} came after merge {merge} with the same paper; undo that one first")
        now = self.now()
        with self.transaction():
            kept, merged = row["kept"], row["merged"]
            self.db.execute("UPDATE papers SET merged_into = NULL WHERE id = ?", (merged,))
            self.db.executemany(
                "UPDATE aliases SET paper = ? WHERE alias = ?", [(merged, name) for name in json.loads(row["aliases"])]
            )
            self.db.executemany(
                "UPDATE records SET paper = ? WHERE id = ?", [(merged, number) for number in json.loads(row["records"])]
            )
            self._unindexed.add(merged)
            self._refresh(kept, now)
            self._refresh(merged, now)
            self.db.execute("UPDATE merges SET undone = ? WHERE id = ?", (now, merge))

    # opinions

    def vote(self, paper: int, voter: str, value: int) -> None:
        """Add a vote; a voter's last one counts.

        Args:
            paper: id.
            voter: who, opaque; one identity has one vote for a paper.
            value: 1 for, 0 takes it back.

        Raises:
            ValueError: another value.
        """
        if value not in (0, 1):
            raise ValueError(f"a vote is 1, or 0 to take it back, not {value}")
        with self.transaction():
            self.db.execute(
                "INSERT INTO votes (paper, voter, value, at) VALUES (?, ?, ?, ?)", (paper, voter, value, self.now())
            )

    def votes(self, paper: int) -> int:
        """Voters whose last word on a paper, or on one merged into it, is for it."""
        row = self.db.execute(
            "WITH RECURSIVE whole (id) AS (SELECT ? UNION SELECT papers.id FROM papers JOIN whole "
            "ON papers.merged_into = whole.id) "
            "SELECT count(*) FROM (SELECT voter, value, max(id) FROM votes WHERE paper IN whole GROUP BY voter) "
            "WHERE value = 1",
            (paper,),
        ).fetchone()
        return int(row[0])

    def add_all(
        self,
        entries: Iterable[tuple[Entry, bytes | None]],
        *,
        source: str,
        form: str = "entry",
        day: str | None = None,
    ) -> dict[str, int]:
        """`add` for many records in one transaction: all are taken in, or none.

        Returns:
            how many were new, changed, same.
        """
        counts = {"new": 0, "changed": 0, "same": 0}
        with self.transaction():
            for entry, raw in entries:
                counts[self.add(entry, source=source, form=form, raw=raw, day=day).outcome] += 1
        return counts


def _unpacked(raw: bytes | None) -> bytes | None:
    return None if raw is None else zlib.decompress(raw)


def combined(records: Sequence[tuple[str, Entry]]) -> Entry:
    """What several records say of a paper: each field from the most trusted source that has it, the latest of equals.

    Links, signals and extras are put together; categories too.
    """
    order = sorted(range(len(records)), key=lambda number: (RANKS.get(records[number][0], PLAIN_RANK), number))
    values: dict[str, Any] = {}
    for number in order:
        for name in ENTRY_FIELDS:
            value = getattr(records[number][1], name)
            if name in ("links", "signals", "extra"):
                values[name] = {**values.get(name, {}), **value}
            elif name == "categories":
                values[name] = tuple(dict.fromkeys((*value, *values.get(name, ()))))
            elif value:
                values[name] = value
    return Entry(**values)
