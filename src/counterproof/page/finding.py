"""Search over everything in the store: by words, by meaning, by both; similar papers, and the cards near to one.

By words: bm25 with a title's words counting ten times an abstract's. Papers with all words come before papers with
some. A query is words and, between double quotes, phrases; nothing in it is syntax of the database, and the last word
may be the beginning of one. The work for a query is bounded: words that are in more than half of the papers are left
aside when there are others, and of more than 5,000 papers that match, those with the words in their titles and those
that came last are ranked.

By meaning: the vectors of `counterproof.page.vectors`, exactly. Both are put together by their scores: those of either
list are stretched to 0 .. 1 over its first 200, and a paper has half of the sum, 0 for a list it is not in. On held-out
titles and halves of texts that was better than either list alone, which fusing ranks (1 / (60 + rank)) was not.
"""

import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import OSA

from counterproof.errors import UserError
from counterproof.page.catalogue import ROOMS, Paper, nearest, papers
from counterproof.page.search import TYPO
from counterproof.page.store import Listed, Store, arxiv_id
from counterproof.page.vectors import Encodes, Vectors

__all__ = ["Filter", "Finder", "Found", "Hit", "Relative"]

TITLE, ABSTRACT = 10.0, 1.0  # bm25 weights
CANDIDATES = 5_000  # papers that bm25 ranks of those that have all words
SOME = 10_000  # papers that may have one of the words, for words taken in from the rarest on
TERMS = 64  # words of a query that count
LETTERS = 10_000  # of a query
SHORT = 3  # letters a last word needs to stand for what it begins
ENOUGH = 20  # papers that have the last word itself, above which it stands for itself only
DEPTH = 200  # papers of either list that are fused
DEEPEST = 1_000  # papers of one list alone
TITLES = 50_000  # of the latest papers, whose words replace one that no paper has
MANY = 300  # papers looked at to estimate how many have a word

How = Literal["both", "words", "meaning"]


@dataclass(frozen=True)
class Filter:
    """Which papers are looked at; nothing: all.

    Attributes:
        since, until: first and last day on which they were listed, ``YYYY-MM-DD``.
        source: name of a source that listed them.
        room: cards of a room.
        runnable: cards whose method is here.
    """

    since: str | None = None
    until: str | None = None
    source: str | None = None
    room: str | None = None
    runnable: bool = False

    def __post_init__(self) -> None:
        if self.room is not None and self.room not in ROOMS:
            raise UserError(f"no room {self.room!r}{nearest(self.room, list(ROOMS)) or '; rooms: ' + ', '.join(ROOMS)}")

    def sql(self, paper: str) -> tuple[str, list[Any]]:
        """A condition on a column that holds paper ids, beginning with AND, and its values."""
        parts: list[str] = []
        values: list[Any] = []
        if self.since is not None:
            parts.append(f"(SELECT own.day FROM papers AS own WHERE own.id = {paper}) >= ?")
            values.append(self.since)
        if self.until is not None:
            parts.append(f"(SELECT own.day FROM papers AS own WHERE own.id = {paper}) <= ?")
            values.append(self.until)
        if self.source is not None:
            parts.append(f"EXISTS (SELECT 1 FROM appearances WHERE paper = {paper} AND source = ?)")
            values.append(self.source)
        if self.room is not None or self.runnable:
            slugs = [card.slug for card in papers().values() if self.takes(card)]
            marks = ", ".join("?" * len(slugs))
            # The plus keeps SQLite from asking the word index once for each card.
            parts.append(f"+{paper} IN (SELECT id FROM papers WHERE slug IN ({marks}))")
            values += slugs
        return "".join(f" AND {part}" for part in parts), values

    def takes(self, card: Paper) -> bool:
        return self.room in (None, card.room) and (card.status == "runs" or not self.runnable)


ALL = Filter()


@dataclass(frozen=True)
class Hit:
    """A paper that was found.

    Attributes:
        paper: it.
        score: higher is better; comparable within one search only.
        parts: where that comes from: ``words`` (bm25), ``meaning`` (cosine similarity), ``rank by words`` and
            ``rank by meaning`` from 1.
    """

    paper: Listed
    score: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Found:
    """What a search found, best first.

    Attributes:
        hits: the papers.
        by: ``words``, ``meaning``, or ``words and meaning``.
        notes: what the reader should know: words replaced, left aside or cut, vectors missing.
        more: whether the list goes on.
        begin: place of the first hit, from 0.
    """

    hits: tuple[Hit, ...]
    by: str
    notes: tuple[str, ...] = ()
    more: bool = False
    begin: int = 0


@dataclass(frozen=True)
class Relative:
    """A card whose method runs here, near to a paper.

    Attributes:
        card: of the catalogue.
        paper: the card's entry in the store.
        similarity: cosine of their vectors; None where one is missing.
        shared: the card's tags and the words of its title that are in the paper's text.
    """

    card: Paper
    paper: Listed
    similarity: float | None
    shared: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why it is named, in a line: ``similarity .61; both: reward model, preference``."""
        parts = [] if self.similarity is None else [f"similarity {self.similarity:.2f}"]
        parts += [f"both: {', '.join(self.shared)}"] if self.shared else []
        return "; ".join(parts)


@dataclass
class Term:
    """A part of a query as the word index takes it: ``"word"``, ``"two words"``, ``"wor"*``, or several as one."""

    match: str
    papers: float  # that have it, about


class Finder:
    """Searches a store; keep one for each thread, it remembers the vectors and the words of titles.

    Threads may share an encoder, and the mapped file of the vectors is in memory once.

    Args:
        store: what is searched.
        encoder: makes a query's vector; None: search is by words, and vectors of papers are compared only if
            `shape` says whose.
        shape: model, length and dimension of the papers' vectors; default the encoder's.
        patience: seconds to wait for a query's vector, after which the search is by words and says so.
    """

    def __init__(
        self,
        store: Store,
        *,
        encoder: Encodes | None = None,
        shape: Encodes | None = None,
        patience: float | None = None,
    ) -> None:
        self.store = store
        self.encoder = encoder
        self.patience = patience
        kind = shape or encoder
        with store.clear_errors():
            self.vectors = None if kind is None else Vectors(store, kind)
        self._titles: tuple[int, list[str]] = (0, [])

    def search(
        self,
        query: str,
        *,
        how: How = "both",
        where: Filter = ALL,
        limit: int = 20,
        after: tuple[int, int] | None = None,
    ) -> Found:
        """Papers for a query, best first.

        A query that is an arXiv id, an address of arXiv's, a DOI or a slug has that paper first.

        Args:
            query: what the user wrote; anything.
            how: by words, by meaning, or both; without vectors by words, with a note.
            where: which papers.
            limit: most hits.
            after: to go on: the id of the last paper that was seen and its place from 0. The list goes on behind that
                paper, wherever it is now. It ends at the 1,000th, or, by both lists, with the 200 of either.

        Raises:
            UserError: the query has no word.
        """
        if not re.search(r"\w", query):
            raise UserError("the query has no word in it; write what the paper is about")
        named = self._named(query, where)
        begin = 0 if after is None else after[1] + 1
        # Fused scores depend on how deep the lists are, so every page of a fused list is made of lists equally deep.
        depth = DEPTH if how == "both" else min(begin + limit + 1, DEEPEST)
        notes: list[str] = []
        by_words: list[tuple[int, float]] = []
        by_meaning: list[tuple[int, float]] = []
        with self.store.clear_errors():
            if how != "meaning":
                by_words, notes = self._by_words(query, where, depth)
            if how != "words":
                by_meaning, more = self._by_meaning(query, where, depth)
                notes += more
        lists = {"words": by_words, "meaning": by_meaning}
        used = [name for name, found in lists.items() if found]
        parts: dict[int, dict[str, float]] = {}
        scores: dict[int, float] = {}
        for name in used:
            worst, best = min(score for _, score in lists[name]), max(score for _, score in lists[name])
            for rank, (paper, score) in enumerate(lists[name], 1):
                parts.setdefault(paper, {}).update({name: score, f"rank by {name}": rank})
                stretched = (score - worst) / (best - worst) if best > worst else 1.0
                scores[paper] = scores.get(paper, 0.0) + (stretched / 2 if len(used) == 2 else score)
        if len(used) == 2:
            order = sorted(scores, key=lambda paper: (-scores[paper], paper))
        else:
            order = [paper for name in used for paper, _ in lists[name]]
        if named is not None:
            order = [named, *(paper for paper in order if paper != named)]
        if after is not None and after[0] in order:
            begin = order.index(after[0]) + 1
        chosen = order[begin : begin + limit]
        hits = [
            Hit(paper, scores.get(number, 0.0), parts.get(number, {}))
            for number, paper in zip(chosen, self.store.get_all(chosen), strict=True)
        ]
        by = " and ".join(used) or ("words" if how != "meaning" else "meaning")
        return Found(tuple(hits), by, tuple(notes), len(order) > begin + limit, begin)

    def similar(self, paper: Listed, *, where: Filter = ALL, limit: int = 10) -> Found:
        """Papers like one, the most similar first: by vectors where it has one, else by the words of its title."""
        with self.store.clear_errors():
            vector = None
            notes: list[str] = []
            if self.vectors is not None:
                self.vectors.renew()
                vector = self.vectors.of([paper.id]).get(paper.id)
            if vector is not None:
                found, by = self._nearest(vector, where, limit + 1), "meaning"
            else:
                (found, _), by = self._by_words(paper.entry.title, where, limit + 1, quiet=True), "words"
                notes = ["by the words of the title: this paper has no vector yet (counterproof feed embed)"]
        found = [(other, score) for other, score in found if other != paper.id][:limit]
        listed = self.store.get_all([other for other, _ in found])
        hits = [Hit(other, score, {by: score}) for other, (_, score) in zip(listed, found, strict=True)]
        return Found(tuple(hits), by, tuple(notes))

    def relatives(self, paper: Listed, *, limit: int = 3, least: float = 0.3) -> list[Relative]:
        """The cards whose methods run here that are nearest to a paper, with the reason.

        Args:
            paper: any, itself left out.
            limit: most cards.
            least: similarity below which a card that shares no tag is not named.
        """
        cards = {
            card.slug: card for card in papers().values() if card.status == "runs" and card.slug != paper.entry.slug
        }
        with self.store.clear_errors():
            marks = ", ".join("?" * len(cards))
            rows = self.store.db.execute(
                f"SELECT id, slug FROM papers WHERE merged_into IS NULL AND slug IN ({marks})", tuple(cards)
            ).fetchall()
            vectors: Mapping[int, Any] = {}
            if self.vectors is not None:
                vectors = self.vectors.of([paper.id, *(row[0] for row in rows)])
        text = _plain(f"{paper.entry.title} {paper.entry.abstract}")
        found = []
        for number, slug in rows:
            card = cards[slug]
            both = number in vectors and paper.id in vectors
            similarity = float(np.dot(vectors[number], vectors[paper.id])) if both else None
            tags = [tag for tag in card.tags if _plain(tag) in text]
            words = [word for word in re.findall(r"\w{6,}", card.title.lower()) if _plain(word) in text]
            shared = tuple(
                dict.fromkeys([*tags, *(word for word in words if not any(word in tag or tag in word for tag in tags))])
            )
            if tags or (similarity is not None and similarity >= least) or (similarity is None and len(words) > 1):
                found.append(((similarity or 0.0, len(tags), len(words)), slug, number, similarity, shared))
        found.sort(key=lambda one: (*(-part for part in one[0]), one[1]))
        listed = self.store.get_all([number for _, _, number, _, _ in found[:limit]])
        return [
            Relative(cards[slug], entry, similarity, shared)
            for (_, slug, _, similarity, shared), entry in zip(found[:limit], listed, strict=True)
        ]

    # by meaning

    def _by_meaning(self, query: str, where: Filter, limit: int) -> tuple[list[tuple[int, float]], list[str]]:
        if self.vectors is None or self.encoder is None:
            return [], ["by words only: no encoder is in use"]
        self.vectors.renew()
        if not len(self.vectors):
            return [], ["by words only: no paper has a vector yet (counterproof feed embed)"]
        made = self.encoder.encode([query[:LETTERS]], self.patience)
        if made is None:
            return [], ["by words only: the encoder is being loaded; try again in some seconds"]
        found = self._nearest(made[0], where, limit)
        missing = self.store.count() - len(self.vectors)
        notes = [f"{missing:,} papers have no vector yet and were looked up by words only"] if missing > 0 else []
        return found, notes

    def _nearest(self, vector: Any, where: Filter, limit: int) -> list[tuple[int, float]]:
        assert self.vectors is not None
        condition, values = where.sql("papers.id")
        number = limit if not condition else 4 * limit
        while True:
            near = self.vectors.search(vector, number)
            marks = ", ".join(str(paper) for paper, _ in near)
            rows = self.store.db.execute(
                f"SELECT id FROM papers WHERE id IN ({marks}) AND merged_into IS NULL{condition}", values
            )
            kept = {row[0] for row in rows}
            found = [(paper, likeness) for paper, likeness in near if paper in kept]
            if len(found) >= limit or len(near) >= len(self.vectors):
                return found[:limit]
            number *= 16

    # by words

    def _by_words(
        self, query: str, where: Filter, limit: int, *, quiet: bool = False
    ) -> tuple[list[tuple[int, float]], list[str]]:
        """Ids and scores, best first, and notes; `quiet`: no typos are mended and no word is a beginning."""
        terms, notes = self._terms(query, quiet)
        if not terms:
            return [], notes
        total = self._papers()
        rare = [term for term in terms if term.papers <= total / 2] or terms
        rare.sort(key=lambda term: term.papers)
        found: list[tuple[int, float]] = []
        if len(rare) <= 16:
            match = " AND ".join(term.match for term in rare)
            found = self._ranked(match, where, limit, CANDIDATES)
            # As many papers have all words as have the rarest, at most.
            if rare[0].papers > CANDIDATES and self._has_more(match, where):
                best = dict(found)
                titles = " AND ".join(f"{{title}} : {term.match}" for term in rare)
                for paper, score in self._ranked(titles, where, limit, CANDIDATES):
                    best[paper] = max(score, best.get(paper, score))
                found = sorted(best.items(), key=lambda one: (-one[1], one[0]))[:limit]
                if not quiet:
                    notes.append(
                        f"more than {CANDIDATES:,} papers have these words: those with them in the title and the "
                        "latest were ranked"
                    )
        terms.sort(key=lambda term: term.papers)
        if len(found) < limit and len(terms) > 1:
            number, some = 1, terms[0].papers
            while number < len(terms) and some + terms[number].papers <= SOME:
                some += terms[number].papers
                number += 1
            known = {paper for paper, _ in found}
            rest = self._ranked(" OR ".join(term.match for term in terms[:number]), where, limit, SOME)
            found += [one for one in rest if one[0] not in known][: limit - len(found)]
        return found, notes

    def _ranked(self, match: str, where: Filter, limit: int, candidates: int) -> list[tuple[int, float]]:
        """The best by bm25 of the latest that match."""
        condition, values = where.sql("words.rowid")
        rows = self.store.db.execute(
            f"SELECT id, score FROM (SELECT rowid AS id, -bm25(words, {TITLE}, {ABSTRACT}) AS score FROM words "
            f"WHERE words MATCH ?{condition} ORDER BY rowid DESC LIMIT ?) ORDER BY score DESC, id LIMIT ?",
            (match, *values, candidates, limit),
        )
        return [(row[0], row[1]) for row in rows]

    def _has_more(self, match: str, where: Filter) -> bool:
        condition, values = where.sql("words.rowid")
        row = self.store.db.execute(
            f"SELECT 1 FROM words WHERE words MATCH ?{condition} LIMIT 1 OFFSET ?", (match, *values, CANDIDATES)
        ).fetchone()
        return row is not None

    def _terms(self, query: str, quiet: bool) -> tuple[list[Term], list[str]]:
        notes = []
        if len(query) > LETTERS:
            notes.append(f"only the first {LETTERS:,} of {len(query):,} letters of the query count")
            query = query[:LETTERS]
        parts: dict[str, bool] = {}  # what the index is asked for, and whether it was a phrase
        for phrase, word in re.findall(r'"([^"]*)"|(\w+)', query.lower()):
            words = re.findall(r"\w+", phrase)
            if word or words:
                parts.setdefault(word or " ".join(words), bool(words))
        if len(parts) > TERMS:
            notes.append(f"only the first {TERMS} of {len(parts)} words of the query count")
        chosen = list(parts.items())[:TERMS]
        terms = []
        for place, (text, phrase) in enumerate(chosen):
            exact = Term(f'"{text}"', self._count(f'"{text}"'))
            last = place == len(chosen) - 1 and query[-1:].isalnum()
            if not (phrase or quiet) and last and exact.papers < ENOUGH and len(text) >= SHORT:
                begun = Term(f'"{text}"*', self._count(f'"{text}"*'))
                exact = begun if begun.papers else exact
            if not exact.papers and not phrase and not quiet:
                close = self._alike(text)
                if close:
                    match = " OR ".join(f'"{word}"' for word in close)
                    exact = Term(f"({match})", self._count(match))
                    notes.append(f"no paper has the word {text!r}; searched for {' or '.join(close)}")
            if exact.papers:
                terms.append(exact)
            elif not quiet:
                notes.append(f"no paper has the {'phrase' if phrase else 'word'} {text!r}")
        return terms, notes

    def _count(self, match: str) -> float:
        """About how many papers match: exactly if few, else by how close the first ones lie to each other."""
        count, last = self.store.db.execute(
            "SELECT count(*), max(rowid) FROM (SELECT rowid FROM words WHERE words MATCH ? LIMIT ?)", (match, MANY)
        ).fetchone()
        return float(count) if count < MANY else count * self._papers() / last

    def _papers(self) -> int:
        return int(self.store.db.execute("SELECT max(id) FROM papers").fetchone()[0] or 0)

    def _alike(self, word: str) -> list[str]:
        """The words of titles that are fewest slips away, at most three."""
        count, words = self._titles
        papers = self._papers()
        if papers > 1.1 * count:
            rows = self.store.db.execute("SELECT title FROM papers ORDER BY id DESC LIMIT ?", (TITLES,))
            words = sorted({word for row in rows for word in re.findall(r"\w{3,}", row[0].lower())})
            self._titles = (papers, words)
        slips = max(1, len(word) // TYPO)
        close = process.extract(word, words, scorer=OSA.distance, limit=3, score_cutoff=slips)
        return [text for text, distance, _ in close if distance == close[0][1]]

    def _named(self, query: str, where: Filter) -> int | None:
        """The paper whose name the query is."""
        name = query.strip()
        if len(name) > 200 or any(letter.isspace() for letter in name):
            return None
        doi = re.sub(r"^(?:doi:|https?://(?:dx\.)?doi\.org/)", "", name.lower())
        if not (arxiv_id(name) or doi.startswith("10.") or name in papers() or ":" in name):
            return None
        paper = self.store.find(name)
        if paper is None:
            return None
        condition, values = where.sql("papers.id")
        row: sqlite3.Row | None = self.store.db.execute(
            f"SELECT 1 FROM papers WHERE id = ?{condition}", (paper.id, *values)
        ).fetchone()
        return paper.id if row is not None else None


def _plain(text: str) -> str:
    """Lower-case words without a plural's s, between spaces, so that a part of it is made of whole words."""
    words: Sequence[str] = re.findall(r"\w+", text.lower())
    return f" {' '.join(word[:-1] if len(word) > 3 and word.endswith('s') else word for word in words)} "
