"""What the page, the interface and the tools share: the store opened for reading and writing, and what was measured.

Several requests read at once, each with a connection of its own; one writes. The model that reads queries runs in a
process of its own, which is started by the first query, once any paper has a vector.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from queue import LifoQueue
from typing import Any

from counterproof.bench.comparison import Comparison
from counterproof.bench.journal import Journal, home
from counterproof.errors import MissingExtra, UserError
from counterproof.page.catalogue import Paper, papers
from counterproof.page.finding import Finder, Relative
from counterproof.page.results import comparisons, judged_together, measured_by_us
from counterproof.page.store import Listed, Store, utc_now
from counterproof.page.typeset import Place
from counterproof.page.vectors import Encoder, Encodes, Matrix, Vectors
from counterproof.page.views import Views

__all__ = ["Closed", "Measured", "Reader", "Site"]

READERS = 3  # connections that read; more only wait for the same two cores
PATIENCE = 1.0  # seconds a search waits for its query's vector, once the model is there
BATCH = 16
REMEMBERED = 2_000  # queries' vectors, and papers' neighbours


class Closed(UserError):
    """The store cannot be opened, or not be written to; the message says what to do."""


class Queries:
    """Queries' vectors, made in the background, several at once; what `Finder` asks is answered from here.

    Args:
        encoder: makes them.
    """

    def __init__(self, encoder: Encodes) -> None:
        self.model, self.length, self.dimension = encoder.model, encoder.length, encoder.dimension
        self.encoder = encoder
        self.problem: str | None = None
        self._made: OrderedDict[str, Matrix] = OrderedDict()
        self._asked: dict[str, None] = {}  # in order; those at work are in `_doing`
        self._doing: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._working = False
        self._ready = False

    def prepare(self, text: str) -> None:
        """Have a vector made; waits for it a second at most, and not at all while the model is being loaded."""
        with self._changed:
            if text in self._made:
                return
            if text not in self._doing and len(self._asked) < 4 * BATCH:
                self._asked[text] = None
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="queries", daemon=True).start()
            self._changed.wait_for(lambda: text in self._made or not self._working, PATIENCE if self._ready else 0.01)

    def _work(self) -> None:
        while True:
            with self._changed:
                batch = list(self._asked)[:BATCH]
                for text in batch:
                    del self._asked[text]
                self._doing = frozenset(batch)
                if not batch:
                    self._working = False
                    self._changed.notify_all()
                    return
            try:
                made = self.encoder.encode(batch, None)
                problem = None
            except (UserError, MissingExtra) as wrong:
                made, problem = None, str(wrong)
            with self._changed:
                self.problem, self._ready = problem, made is not None
                if made is not None:
                    self._made.update(zip(batch, made, strict=True))
                while len(self._made) > REMEMBERED:
                    self._made.popitem(last=False)
                self._changed.notify_all()

    def encode(self, texts: Sequence[str], timeout: float | None = None) -> Matrix | None:
        with self._changed:
            found = [self._made.get(text) for text in texts]
        if any(vector is None for vector in found):
            return None
        import numpy as np

        return np.stack([vector for vector in found if vector is not None])


class SharedVectors(Vectors):
    """One matrix in memory for all readers."""

    def __init__(self, store: Store, shape: Encodes) -> None:
        self._lock = threading.RLock()
        super().__init__(store, shape)

    def __len__(self) -> int:
        with self._lock:
            return super().__len__()

    def renew(self) -> None:
        with self._lock:
            super().renew()

    def search(self, query: Matrix, number: int) -> list[tuple[int, float]]:
        with self._lock:
            return super().search(query, number)

    def of(self, papers: Sequence[int]) -> dict[int, Matrix]:
        with self._lock:
            return super().of(papers)


@dataclass
class Reader:
    """A connection that reads, with what is asked through it."""

    store: Store
    finder: Finder
    views: Views


@dataclass
class Measured:
    """What was measured of every card, by the project and on this machine.

    Attributes:
        ours: by slug; complete once `ready`, before that what was asked for.
    """

    ours: dict[str, list[Comparison]] = field(default_factory=dict)
    ready: bool = False
    _here: dict[str, tuple[Any, list[Comparison]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def warm(self) -> None:
        """Read all results, which takes some seconds of a processor; meant for a thread."""
        read = {slug: self._own(paper) for slug, paper in papers().items()}
        with self._lock:
            self.ours, self.ready = judged_together(read), True

    def _own(self, paper: Paper) -> list[Comparison]:
        with self._lock:
            if paper.slug in self.ours:
                return self.ours[paper.slug]
        try:
            found = [] if paper.status != "runs" else measured_by_us(paper)
        except MissingExtra:  # the claims of this paper cannot be read here
            found = []
        with self._lock:
            return self.ours.setdefault(paper.slug, found)

    def of(self, paper: Paper) -> Mapping[Place, list[Comparison]]:
        """Comparisons of a card."""
        return {"us": self._own(paper), "here": self.here(paper)}

    def here(self, paper: Paper) -> list[Comparison]:
        """What this machine's journal says of a card; read again when the journal changed."""
        state = journal_state()
        if state is None or paper.status != "runs":
            return []
        with self._lock:
            known = self._here.get(paper.slug)
        if known is not None and known[0] == state:
            return known[1]
        journal = Journal()
        try:
            records = list(journal.trials(paper.slug))
        finally:
            journal.close()
        found = [one for budget in budgets_of(paper) for one in comparisons(paper, records, budget)]
        with self._lock:
            self._here[paper.slug] = (state, found)
        return found

    def reruns(self, paper: Paper, limit: int = 60) -> list[dict[str, Any]]:
        """The latest trials of a card in this machine's journal, the last first."""
        if journal_state() is None:
            return []
        journal = Journal()
        try:
            records = list(journal.trials(paper.slug))[-limit:]
        finally:
            journal.close()
        metric = {claim.name: claim.metric for claim in paper.claims}
        return [
            {
                "finished": record.finished,
                "claim": record.claim,
                "arm": record.arm,
                "seed": record.seed,
                "budget": record.budget,
                "outcome": record.outcome,
                "metric": metric.get(record.claim),
                "value": record.value(metric[record.claim])
                if record.outcome == "ok" and metric.get(record.claim) in record.metrics
                else None,
                "seconds": record.cost.get("cpu_seconds"),
                "key": record.key,
            }
            for record in reversed(records)
        ]


def budgets_of(paper: Paper) -> list[str]:
    return list(dict.fromkeys(budget for claim in paper.claims for budget in claim.task.budgets))


def journal_state() -> tuple[tuple[int, int], ...] | None:
    """Size and time of the journal's files; None when there is no journal."""
    path = home() / "journal.sqlite"
    if not path.exists():
        return None
    found = []
    for name in (path, path.with_name("journal.sqlite-wal")):
        try:
            said = os.stat(name)
            found.append((said.st_size, said.st_mtime_ns))
        except FileNotFoundError:
            found.append((0, 0))
    return tuple(found)


class Site:
    """The page's papers and what was measured of them, for many readers at once.

    Args:
        path: the store's file; default as `Store`.
        clock: gives the present.
        encoder: makes queries' vectors; default MiniLM in a process of its own.
        size: connections that read.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        clock: Callable[[], datetime] = utc_now,
        encoder: Encodes | None = None,
        size: int = READERS,
    ) -> None:
        self.path = path if path is not None else home() / "page.sqlite"
        self.clock = clock
        self.measured = Measured()
        self.queries = Queries(encoder or Encoder())
        self._size = size
        self._opening = threading.Lock()
        self._pool: LifoQueue[Reader] | None = None
        self._vectors: SharedVectors | None = None
        self._file: tuple[int, int] | None = None
        self._writer: Store | None = None
        self._writing = threading.Lock()
        self._near: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    # reading

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """A reader for a while.

        Raises:
            Closed: there is no store yet, or it cannot be read.
        """
        pool = self._readers()
        reader = pool.get()
        try:
            yield reader
        finally:
            pool.put(reader)

    def _readers(self) -> "LifoQueue[Reader]":
        with self._opening:
            try:
                said = os.stat(self.path)
                file = (said.st_dev, said.st_ino)
            except OSError:
                file = None
            if self._pool is None or file != self._file:  # another file lies there now
                try:
                    self._vectors = SharedVectors(self._open(), self.queries)
                    pool: LifoQueue[Reader] = LifoQueue()
                    for _ in range(self._size):
                        store = self._open()
                        finder = Finder(store)
                        finder.encoder, finder.vectors = self.queries, self._vectors
                        pool.put(Reader(store, finder, Views(store, finder)))
                except UserError as problem:
                    self._pool = None
                    raise Closed(str(problem)) from None
                self._pool, self._file = pool, file
            return self._pool

    def _open(self) -> Store:
        return Store(self.path, clock=self.clock, read_only=True)

    def prepare(self, words: str) -> list[str]:
        """Before a search by meaning: have the query's vector made, unless no paper has one; what went wrong."""
        self._readers()
        assert self._vectors is not None
        self._vectors.renew()
        if not len(self._vectors):
            return []
        self.queries.prepare(words[:10_000])
        return [f"by words only: {self.queries.problem}"] if self.queries.problem else []

    # writing

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """The store, for changes; one at a time.

        Raises:
            Closed: it cannot be written to.
        """
        with self._writing:
            try:
                if self._writer is None or not self.path.exists():
                    self._writer = Store(self.path, clock=self.clock)
            except UserError as problem:
                raise Closed(str(problem)) from None
            yield self._writer

    def add_cards(self) -> str | None:
        """Put our own papers into the store; returns why that cannot be done."""
        from counterproof.page.feed import add_cards

        try:
            with self.writing() as store:
                add_cards(store)
        except UserError as problem:
            return str(problem)
        return None

    # papers like one

    def near(self, reader: Reader, paper: Listed) -> tuple[list[Listed], list[Relative], str]:
        """Similar papers, cards that run and are near, and by what; remembered until papers or vectors change."""
        state = reader.store.db.execute(
            "SELECT (SELECT max(id) FROM papers), (SELECT coalesce(max(seq), 0) FROM sqlite_sequence)"
        ).fetchone()
        key = (paper.id, paper.changed, *state)
        with self._opening:
            if key in self._near:
                found: tuple[list[Listed], list[Relative], str] = self._near[key]
                return found
        similar = reader.finder.similar(paper, limit=8)
        made = ([hit.paper for hit in similar.hits], reader.finder.relatives(paper, limit=4), similar.by)
        with self._opening:
            self._near[key] = made
            if len(self._near) > REMEMBERED:
                self._near.popitem(last=False)
        return made

    def close(self) -> None:
        """End the process that reads queries, and give back all connections that nobody uses."""
        if isinstance(self.queries.encoder, Encoder):
            self.queries.encoder.close()
        if self._writer is not None:
            self._writer.close()
        pool, self._pool = self._pool, None
        while pool is not None and not pool.empty():
            pool.get().store.close()


# JSON, for the interface and for assistants


def card_of(paper: Listed) -> Paper | None:
    """The card of a paper of the store."""
    return papers().get(paper.entry.slug) if paper.entry.slug else None


def claims_json(site: Site, paper: Paper) -> list[dict[str, Any]]:
    """Every claim of a card with all that was measured of it."""
    found = site.measured.of(paper)
    return [
        {
            "paper": paper.slug,
            "claim": claim.name,
            "says": claim.says,
            "reported": claim.reported,
            "task": claim.task.name,
            "metric": claim.metric,
            "better": claim.better,
            "baseline": claim.baseline.name,
            "method": claim.method.name,
            "command": f"counterproof check {paper.slug}/{claim.name}",
            "measured": [
                {"by": {"us": "the project", "here": "this machine"}[place], **comparison.as_json()}
                for place, several in found.items()
                for comparison in several
                if comparison.claim.name == claim.name
            ],
        }
        for claim in paper.claims
    ]


def show_json(site: Site, reader: Reader, paper: Listed) -> dict[str, Any]:
    """All that the page of a paper says."""
    card = card_of(paper)
    similar, relatives, by = site.near(reader, paper)
    return {
        **paper.as_json(),
        "aliases": reader.store.aliases(paper.id),
        "votes": reader.store.votes(paper.id),
        "sources": [{"source": source, "fetched": fetched} for source, fetched, _, _ in reader.store.records(paper.id)],
        "card": None if card is None else {**card.as_json(), "sections": dict(card.sections)},
        "claims": [] if card is None else claims_json(site, card),
        "similar": [{"key": one.key, "title": one.entry.title} for one in similar],
        "similar_by": by,
        "runnable_relatives": [
            {"slug": one.card.slug, "title": one.card.title, "reason": one.reason, "similarity": one.similarity}
            for one in relatives
        ],
    }
