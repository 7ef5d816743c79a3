"""The page's store, search and views on made-up papers: speed, growth, memory, and how well search finds.

    .venv/bin/python benchmarks/page.py [--quick] [--json FILE]

Papers have titles of about 9 and abstracts of about 160 words, drawn from a Zipf law over 60,000 words and from one of
200 subjects; vectors are clustered by subject, as MiniLM's are. Queries: one to four words of a random paper's title
or abstract (a third), two of its subject's words (a third), and words drawn as the texts are, so mostly very common
ones (a third). Times are CPU milliseconds of one thread, which are wall milliseconds where nothing else runs; each
query is asked once, in a process that was asked others before. Peer is the goal, where there is one. The last rows ask
for a paper by its title, and for one part of an abstract by another, with MiniLM: over the cards, or over the papers of
--corpus FILE, JSON lines with title and abstract.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
from _contest import Row, run  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from counterproof.page.store import Entry, Store  # noqa: E402

VOCABULARY, SUBJECTS, OWN = 60_000, 200, 150
END = datetime(2026, 9, 5, tzinfo=UTC)
DAYS = 3900


class Corpus:
    """Made-up papers; the same number is always the same paper.

    Args:
        number: of papers.
        seed: of everything drawn.
        end: the last paper's day.
    """

    def __init__(self, number: int, seed: int = 0, end: datetime = END) -> None:
        self.end = end
        rng = np.random.default_rng(seed)
        syllables = np.array([a + b for a in "bcdfghklmnprstvz" for b in "aeiou"])
        lengths = 2 + (np.arange(VOCABULARY) > 800) + (np.arange(VOCABULARY) > 20_000)
        made: dict[str, None] = {}
        for length in lengths:
            while (word := "".join(rng.choice(syllables, size=length))) in made:
                pass
            made[word] = None
        self.words = np.array(list(made))
        weight = 1 / (np.arange(VOCABULARY) + 2.7)
        self.law = np.cumsum(weight / weight.sum())
        self.subjects = rng.integers(300, VOCABULARY, size=(SUBJECTS, OWN))
        own = 1 / (np.arange(OWN) + 5.0)
        self.own = np.cumsum(own / own.sum())
        self.number, self.seed = number, seed

    def drawn(self, rng: np.random.Generator, subject: int, size: int) -> NDArray[Any]:
        common = np.searchsorted(self.law, rng.random(size) * self.law[-1])
        own = self.subjects[subject][np.searchsorted(self.own, rng.random(size) * self.own[-1])]
        return self.words[np.where(rng.random(size) < 0.3, own, common)]

    def entries(self) -> Iterator[Entry]:
        for block in range(0, self.number, 1000):
            rng = np.random.default_rng([self.seed, block])
            for paper in range(block, min(block + 1000, self.number)):
                subject = int(rng.integers(SUBJECTS))
                title, abstract = 5 + int(rng.integers(9)), 90 + int(rng.integers(140))
                words = self.drawn(rng, subject, title + abstract)
                day = self.end - timedelta(days=(self.number - paper) * DAYS / self.number)
                yield Entry(
                    title=" ".join(words[:title]).capitalize(),
                    abstract=" ".join(words[title:]),
                    authors=("A. Author", "B. Author"),
                    arxiv=f"{day:%y%m}.{paper % 100_000:05d}" if self.number <= 100_000 else None,
                    published=f"{day:%Y-%m-%d}",
                    categories=(f"cs.{'ABCDEFGH'[subject % 8]}{'ILVR'[subject % 4]}",),
                    signals={"upvotes": float(rng.integers(1, 60))} if rng.random() < 0.1 else {},
                    extra={"subject": str(subject)},
                )

    def queries(self, number: int, seed: int = 1) -> list[str]:
        rng = np.random.default_rng([self.seed, seed])
        found = []
        sample = list(itertools.islice(self.entries(), 3000))
        for turn in range(number):
            entry = sample[int(rng.integers(len(sample)))]
            size = int(rng.integers(1, 5))
            if turn % 3 == 0:
                text = (entry.title if rng.random() < 0.5 else entry.abstract).lower().split()
                words = rng.choice(text, size=min(size, len(text)), replace=False)
            elif turn % 3 == 1:
                words = self.words[rng.choice(self.subjects[int(entry.extra["subject"])], size=2)]
            else:
                words = self.words[np.searchsorted(self.law, rng.random(size) * self.law[-1])]
            found.append(" ".join(words))
        return found


class Given:
    """An encoder that has its answer already, so that what is timed is the search."""

    length, dimension = 512, 384

    def __init__(self, model: str = "given") -> None:
        self.model = model
        self.answer = np.zeros((1, self.dimension), dtype=np.float32)

    def encode(self, texts: Sequence[str], timeout: float | None = None) -> NDArray[np.float32]:
        return self.answer


def filled(path: Path, corpus: Corpus) -> float:
    """Make a store of the corpus; records a second."""
    store = Store(path, clock=lambda: corpus.end)
    taken = 0.0
    entries = corpus.entries()
    while some := [(entry, None) for entry in itertools.islice(entries, 20_000)]:
        began = time.process_time()
        store.add_all(some, source="arxiv")
        taken += time.process_time() - began
    rng = np.random.default_rng(corpus.seed)
    with store.transaction():
        for voter, paper in enumerate(rng.integers(1, corpus.number + 1, size=2000)):
            store.vote(int(paper), f"v{voter % 500}", 1)
    store.close()
    return corpus.number / taken


def add_vectors(path: Path, corpus: Corpus, model: str = "given") -> list[NDArray[np.float32]]:
    """Clustered vectors for every paper, as `embed` would have kept them, and a few queries."""
    from counterproof.page.vectors import Vectors

    store = Store(path)
    rng = np.random.default_rng(corpus.seed)
    centers = rng.normal(size=(SUBJECTS, Given.dimension))

    def near(subjects: Any) -> NDArray[np.float32]:
        made = centers[subjects] + 1.2 * rng.normal(size=(len(subjects), Given.dimension))
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    for begin in range(1, corpus.number + 1, 10_000):
        ids = range(begin, min(begin + 10_000, corpus.number + 1))
        made = near(rng.integers(SUBJECTS, size=len(ids)))
        with store.transaction():
            store.db.executemany(
                "INSERT INTO embeddings (paper, model, length, dimension, content, vector) VALUES (?, ?, ?, ?, '', ?)",
                [(n, model, Given.length, Given.dimension, row.tobytes()) for n, row in zip(ids, made)],
            )
    Vectors(store, Given(model)).write()
    store.close()
    return list(near(rng.integers(SUBJECTS, size=64)))


def timed(work: Callable[[Any], Any], arguments: Sequence[Any]) -> NDArray[np.float64]:
    """CPU milliseconds of each call."""
    taken = []
    for argument in arguments:
        began = time.process_time()
        work(argument)
        taken.append(1000 * (time.process_time() - began))
    return np.array(taken)


def peak() -> float:
    """MB that this process holds for itself; mapped files are the system's, and given back when it needs them."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem"))) / 1024


def alone(work: str, size: str, value: float, unit: str, note: str = "ours alone") -> Row:
    return Row(work, size, value, float("nan"), note, unit, float("nan"))


def against(work: str, size: str, value: float, goal: float, unit: str = "ms") -> Row:
    """A row against the goal; for rates, more is better."""
    return Row(work, size, value, goal, "goal", unit, value / goal if unit.endswith("/s") else goal / value)


GOALS = {
    ("words", 100_000, 50): 10,
    ("words", 100_000, 99): 60,
    ("both", 100_000, 50): 40,
    ("words", 1_000_000, 50): 50,
}


def searches(path: Path, corpus: Corpus, number: int, vectors: Sequence[NDArray[np.float32]]) -> Iterator[Row]:
    from counterproof.page.finding import Filter, Finder
    from counterproof.page.views import Query, Views

    size = f"{corpus.number:,} papers"
    store = Store(path, clock=lambda: corpus.end, read_only=True)
    given = Given()
    base = peak()
    began = time.process_time()
    finder = Finder(store, encoder=given)
    yield alone("open with vectors", size, 1000 * (time.process_time() - began), "ms")
    queries = corpus.queries(number)
    for how in ("words", "meaning", "both"):

        def ask(numbered: tuple[int, str], how: Any = how) -> None:
            given.answer = vectors[numbered[0] % len(vectors)][None]
            finder.search(numbered[1], how=how, limit=20)

        asked = list(enumerate(queries if how == "words" else queries[: number // 2]))
        timed(ask, asked[:20])
        taken = timed(ask, asked)
        names = {"words": "keyword", "meaning": "semantic", "both": "hybrid"}
        for share in (50, 99):
            value, goal = float(np.percentile(taken, share)), GOALS.get((how, corpus.number, share))
            work = f"{names[how]} query p{share}"
            yield against(work, size, value, goal) if goal else alone(work, size, value, "ms")
        if how == "words":
            for kind, name in enumerate(("a paper's words", "a subject's words", "common words")):
                yield alone(f"  {name} p50", size, float(np.median(taken[kind::3])), "ms")
    narrow = Filter(since="2026-01-01", source="arxiv")
    few = queries[: number // 4]
    for name, change in (
        ("keyword, filtered p50", lambda text: finder.search(text, how="words", where=narrow)),
        ("one letter wrong p50", lambda text: finder.search(text.split()[0][:-1] + "q", how="words")),
        ("long query (60 words) p50", lambda text: finder.search(" ".join([text, *queries[:25]]), how="words")),
    ):
        change(few[0])
        yield alone(name, size, float(np.median(timed(change, few))), "ms")
    papers = store.get_all(list(range(1, corpus.number, max(1, corpus.number // 40))))
    yield alone("similar papers p50", size, float(np.median(timed(finder.similar, papers))), "ms")

    views = Views(store, finder)
    lists = [
        ("trending", Query(view="trending")),
        ("month", Query(view="month", at="2021-05")),
        ("latest", Query()),
        ("day", Query(view="day", at="2021-05-05")),
    ]
    for name, query in lists:
        first = timed(lambda query: Views(store, finder).page(query), [query] * 5)
        yield alone(f"view {name}, first time", size, float(np.median(first)), "ms")
        again = timed(views.page, [query] * 20)
        yield alone(f"view {name}, again p50", size, float(np.median(again)), "ms")
    cursor = views.page(Query(), limit=500).cursor
    yield alone("latest, page two of 500", size, float(np.median(timed(
        lambda cursor: views.page(Query(), limit=50, cursor=cursor), [cursor] * 20))), "ms")  # fmt: skip
    yield alone("memory of search over imports", size, peak() - base, "MB")
    yield alone("memory of the process", size, peak(), "MB")
    yield alone("file", size, path.stat().st_size / 1e6, "MB")
    store.close()


def exports(path: Path, size: str) -> Iterator[Row]:
    from counterproof.page.formats import FORMATS, Place

    store = Store(path, read_only=True)
    papers = store.get_all(list(range(1, 1001)))
    for name, form in FORMATS.items():
        taken = np.median(timed(lambda form: form.write(papers, Place("Benchmark", "https://x.example")), [form] * 5))
        yield alone(f"write {name}", "1,000 papers", float(taken), "ms")
    store.close()


# how well search finds


def held_out(corpus: Path | None) -> tuple[str, list[tuple[str, str]]]:
    """Titles and abstracts: of a file, else of the cards."""
    import json

    if corpus is not None:
        lines = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
        return corpus.name, [(line["title"], line["abstract"]) for line in lines if line.get("abstract")]
    from counterproof.page.catalogue import papers

    return "cards", [(card.title, card.sections["Idea"]) for card in papers().values()]


def retrieval(corpus: Path | None) -> Iterator[Row]:
    """MRR of the paper whose title or half is the query: by both, beside bm25 alone and MiniLM alone."""
    from counterproof.page.finding import Finder
    from counterproof.page.vectors import Encoder, refresh

    name, texts = held_out(corpus)
    halves = [(a.split(), n) for n, (_, a) in enumerate(texts)]
    tasks = {
        "title -> abstract": ([title for title, _ in texts], [abstract for _, abstract in texts]),
        "first half -> second": (
            [" ".join(words[: len(words) // 2]) for words, _ in halves],
            [" ".join(words[len(words) // 2 :]) for words, _ in halves],
        ),
        "last third -> rest": (
            [" ".join(words[2 * len(words) // 3 :]) for words, _ in halves],
            [" ".join(words[: 2 * len(words) // 3]) for words, _ in halves],
        ),
    }
    encoder = Encoder()
    try:
        for task, (queries, targets) in tasks.items():
            with tempfile.TemporaryDirectory() as folder:
                store = Store(Path(folder) / "held.sqlite")
                for number, target in enumerate(targets):
                    store.add(Entry(title=f"Q{number:05d}", abstract=target), source="held")
                began = time.perf_counter()
                refresh(store, encoder)
                embedding = len(targets) / (time.perf_counter() - began)
                finder = Finder(store, encoder=encoder)
                found: dict[str, float] = {}
                for how in ("words", "meaning", "both"):
                    ranks = []
                    for number, query in enumerate(queries):
                        order = [hit.paper.id for hit in finder.search(query, how=how, limit=400).hits]  # type: ignore[arg-type]
                        ranks.append(order.index(number + 1) + 1 if number + 1 in order else float("inf"))
                    found[how] = float(np.mean([1 / rank for rank in ranks]))
                    found[f"{how} first"] = float(np.mean([rank == 1 for rank in ranks]))
                match = " OR ".join
                plain = []
                for number, query in enumerate(queries):
                    words = {f'"{word}"' for word in "".join(c if c.isalnum() else " " for c in query.lower()).split()}
                    rows = store.db.execute(
                        "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words, 10, 1), rowid",
                        (match(words),),
                    )
                    order = [row[0] for row in rows]
                    plain.append(1 / (order.index(number + 1) + 1) if number + 1 in order else 0.0)
                found["bm25"] = float(np.mean(plain))
                size = f"{len(targets)} {name}"
                for peer, label in (("bm25", "bm25, all words"), ("words", "keyword"), ("meaning", "MiniLM")):
                    yield Row(task, size, found["both"], found[peer], label, "MRR", found["both"] / found[peer])
                firsts = ", ".join(f"{how} {found[f'{how} first']:.2f}" for how in ("words", "meaning", "both"))
                yield alone(f"{task}, first", size, found["both first"], "share", firsts)
                yield alone("embed", size, embedding, "texts/s")
                store.close()
        # The encoder's time is another process's: wall time, of which the fastest is least disturbed.
        asked = []
        for title, _ in texts[:40]:
            began = time.perf_counter()
            encoder.encode([title])
            asked.append(1000 * (time.perf_counter() - began))
        yield alone("query to vector p10, wall", name, float(np.percentile(asked, 10)), "ms")
        yield alone("query to vector p50, wall", name, float(np.median(asked)), "ms")
    finally:
        encoder.close()


def imports(corpus: Corpus) -> Iterator[Row]:
    """Files of every form that people have many records in: read, taken in, and read again."""
    from counterproof.page.feed import import_file
    from counterproof.page.formats import bibtex, json_lines, ris
    from counterproof.page.store import Listed

    size = f"{corpus.number:,} papers"
    papers = [Listed(n, entry.names()[0], entry, "2026-11-01", "") for n, entry in enumerate(corpus.entries(), 1)]
    for form, ending, write in (("JSON lines", "jsonl", json_lines), ("BibTeX", "bib", bibtex), ("RIS", "ris", ris)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"papers.{ending}"
            file.write_text(write(papers))
            store = Store(Path(folder) / "page.sqlite")
            for work in (f"import {form}", f"import {form} again"):
                began = time.process_time()
                pulled = import_file(store, file)
                rate = corpus.number / (time.process_time() - began)
                assert (pulled.records, pulled.skipped) == (corpus.number, [])
                if form == "JSON lines":
                    yield against(work, size, rate, 5000, "records/s")
                else:
                    yield alone(work, size, rate, "records/s")
            store.close()


def contests(quick: bool, _seconds: float) -> Iterator[Row]:
    for number in (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            path, corpus = Path(folder) / "page.sqlite", Corpus(number)
            yield against("import", f"{number:,} papers", filled(path, corpus), 5000, "records/s")
            vectors = add_vectors(path, corpus)
            yield from searches(path, corpus, 200 if quick else 600, vectors)
            if number == 10_000:
                yield from exports(path, f"{number:,} papers")
                yield from imports(corpus)
    yield from retrieval(CORPUS)


if __name__ == "__main__":
    CORPUS = None
    if "--corpus" in sys.argv:
        place = sys.argv.index("--corpus")
        CORPUS = Path(sys.argv[place + 1])
        del sys.argv[place : place + 2]
    run(__doc__, contests)
