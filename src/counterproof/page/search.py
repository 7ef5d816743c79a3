"""Ranked full-text search over the cards, forgiving of typos."""

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz import process
from rapidfuzz.distance import OSA

from counterproof.page.catalogue import Paper

__all__ = ["Hit", "search"]

WEIGHTS = (10.0, 8.0, 6.0, 4.0, 1.0)  # slug, title, tags, summary, sections
TYPO = 4  # letters of a word for each slip in it: one left out, put in, changed, or two that changed places


@dataclass(frozen=True)
class Hit:
    """A paper that was found, its score (higher is better), and the words it was found by."""

    paper: Paper
    score: float
    words: tuple[str, ...]


def search(query: str, papers: Sequence[Paper]) -> list[Hit]:
    """Papers that match, best first (bm25 over slug, title, tags, summary and text).

    The paper of that very slug comes first; papers with all words come before papers with some. A word also matches
    its inflections (Porter stems) and what it begins; one that no card has is replaced by the most similar words of
    the cards.

    Args:
        query: words; punctuation separates them.
        papers: what is searched.
    """
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    if not words or not papers:
        return []
    with sqlite3.connect(":memory:") as db:
        db.execute(
            "CREATE VIRTUAL TABLE cards USING fts5 (slug, title, tags, summary, sections, "
            "tokenize = 'porter unicode61 remove_diacritics 2')"
        )
        db.executemany(
            "INSERT INTO cards (rowid, slug, title, tags, summary, sections) VALUES (?, ?, ?, ?, ?, ?)", rows(papers)
        )
        vocabulary: set[str] = set()
        groups: list[list[str]] = []
        for word in words:
            prefix = f'"{word}"*'
            if db.execute("SELECT 1 FROM cards WHERE cards MATCH ? LIMIT 1", (prefix,)).fetchone():
                groups.append([prefix])
                continue
            vocabulary = vocabulary or {
                term for row in rows(papers) for cell in row[1:] for term in re.findall(r"\w{3,}", str(cell).lower())
            }
            slips = max(1, len(word) // TYPO)
            close = process.extract(word, sorted(vocabulary), scorer=OSA.distance, limit=3, score_cutoff=slips)
            if close:
                groups.append([f'"{term}"' for term, distance, _ in close if distance == close[0][1]])
        if not groups:
            return []
        alternatives = [f"({' OR '.join(group)})" for group in groups]
        ranked: dict[int, Hit] = {}
        shown = tuple(term.strip('"*') for group in groups for term in group)
        for operator in (" AND ", " OR "):
            query_rows = db.execute(
                f"SELECT rowid, bm25(cards, {', '.join(map(str, WEIGHTS))}) AS rank FROM cards "
                "WHERE cards MATCH ? ORDER BY rank, slug",
                (operator.join(alternatives),),
            )
            for number, rank in query_rows:
                ranked.setdefault(number, Hit(papers[number], -rank, shown))
        slug = "-".join(words)
        return sorted(ranked.values(), key=lambda hit: hit.paper.slug != slug)  # stable: the rank stands otherwise


def rows(papers: Sequence[Paper]) -> list[tuple[int, str, str, str, str, str]]:
    return [
        (number, paper.slug, paper.title, ", ".join(paper.tags), paper.summary, "\n".join(paper.sections.values()))
        for number, paper in enumerate(papers)
    ]
