"""Search: nothing a user writes is syntax, what should be found is found and stands where it should."""

import re
import time
import zlib
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.page import finding
from counterproof.page.catalogue import papers
from counterproof.page.finding import Filter, Finder
from counterproof.page.store import Entry, Store
from counterproof.page.vectors import refresh


class Bags:
    """Counts of words by their hash: texts with the same words are alike. `meanings` makes words the same."""

    model, length, dimension = "bags", 9, 512

    def __init__(self, **meanings):
        self.meanings = meanings
        self.slow = False

    def encode(self, texts, timeout=None):
        if self.slow and timeout is not None:
            return None
        made = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(made, texts):
            for word in re.findall(r"\w+", text.lower()):
                word = self.meanings.get(word, word)
                row[zlib.crc32(word.encode()) % self.dimension] += 1
        return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9)


TEXTS = [
    ("Object detection with transformers", "A set of objects is predicted at once by matching."),
    ("Reward models for language", "Ensembles of reward models are more robust to overoptimisation."),
    ("A survey", "Detection of objects, and much about reward models in passing, with transformers too."),
    ("Schrödinger bridges", "Optimal transport between two distributions, as diffusion."),
    ("Naïve ranking", "Bradley-Terry models of battles rank the players."),
    ("Text-to-image generation", "Noise is paired with images before diffusion; C++ and x_y are here."),
]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=lambda: datetime(2026, 11, 23, tzinfo=UTC))
    for number, (title, abstract) in enumerate(TEXTS):
        day = f"2026-11-{10 + number}"
        store.add(Entry(title=title, abstract=abstract, arxiv=f"2611.{number:05d}"), source="ab"[number % 2], day=day)
    yield store
    store.close()


def with_cards(store):
    for card in papers().values():
        abstract = f"{card.summary} {card.sections['Idea']}"
        store.add(Entry(title=card.title, abstract=abstract, slug=card.slug, arxiv=card.arxiv), source="card")
    return store


def found(store, query, **how):
    how.setdefault("how", "words")
    return [hit.paper.id for hit in Finder(store).search(query, **how).hits]


def by_definition(words, weights=(10.0, 1.0)):
    """FTS5's bm25 of TEXTS for papers with all of some unstemmed words: k1 = 1.2, b = .75, columns weighted."""
    texts = [tuple(re.findall(r"[^\W_]+", part.lower()) for part in text) for text in TEXTS]
    lengths = [sum(map(len, text)) for text in texts]
    mean = sum(lengths) / len(lengths)
    scores = {}
    for number, text in enumerate(texts):
        if not all(any(word in part for part in text) for word in words):
            continue
        score = 0.0
        for word in words:
            having = sum(any(word in part for part in other) for other in texts)
            idf = np.log((len(texts) - having + 0.5) / (having + 0.5))
            frequency = sum(weight * part.count(word) for weight, part in zip(weights, text))
            score += idf * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * lengths[number] / mean))
        scores[number + 1] = score
    return scores


def test_scores_are_bm25_with_titles_counting_ten_times(store):
    for query in ("matching", "diffusion", "detection transformers", "schrodinger"):
        want = by_definition(query.replace("schrodinger", "schrödinger").split())
        got = {hit.paper.id: hit.score for hit in Finder(store).search(query, how="words").hits if hit.paper.id in want}
        assert got == pytest.approx(want, rel=1e-6)
    assert found(store, "detection transformers")[:2] == [1, 3]  # in the title before in the abstract


def test_papers_with_all_words_come_first_then_those_with_some(store):
    assert found(store, "reward transformers")[0] == 3
    assert set(found(store, "reward transformers")) == {1, 2, 3}
    assert set(found(store, "transport battles")) == {4, 5}


def test_phrases_beginnings_stems_and_accents(store):
    assert found(store, '"reward models" robust') == [2, 3]
    assert found(store, '"models reward"') == []
    assert found(store, "overopt") == [2]
    assert found(store, "overopt robust") == [2]  # only the last word may be a beginning
    assert found(store, "ov") == []
    assert found(store, '"overopt"') == []
    assert found(store, "ensemble") == [2]
    assert found(store, "SCHRODINGER") == [4]
    assert found(store, "naive") == [5]
    assert 6 in found(store, "text-to-image")
    assert 6 in found(store, "x_y")


def test_typos_are_mended_and_said(store):
    result = Finder(store).search("detecton schrodnger", how="words")
    assert {hit.paper.id for hit in result.hits} == {1, 3, 4}
    assert any("'detecton'" in note and "detection" in note for note in result.notes)
    result = Finder(store).search("zzzzqqqq bridges", how="words")
    assert [hit.paper.id for hit in result.hits] == [4]
    assert "no paper has the word 'zzzzqqqq'" in result.notes


@pytest.mark.parametrize(
    "query",
    [
        'title : detection', "detection AND", "NOT detection", "NEAR(detection matching)", "detection OR", "(detection",
        'detection"', '"detection', "detection*", "^detection", "{title} : detection", "-detection", "detection + ",
        "words MATCH detection", "detection'; DROP TABLE papers; --", "detection\0", "detection %_", '""detection""',
        "detection\ud800", "detection ½ ² ⑥ กำ 🙂",
    ],
)  # fmt: skip
def test_what_is_syntax_elsewhere_is_words_here(store, query):
    assert 1 in found(store, query)
    assert store.count() == 6


@given(st.text(max_size=60), st.sampled_from(["words", "both"]))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_query(shared, query, how):
    finder = shared
    try:
        result = finder.search(query, how=how)
    except UserError:
        assert not re.search(r"\w", query)
        return
    scores = [hit.score for hit in result.hits]
    assert len({hit.paper.id for hit in result.hits}) == len(scores)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("shared") / "p.sqlite")
    for title, abstract in TEXTS:
        store.add(Entry(title=title, abstract=abstract), source="x")
    encoder = Bags()
    refresh(store, encoder)
    yield Finder(store, encoder=encoder)
    store.close()


def test_a_query_of_a_hundred_thousand_letters_is_cut_and_that_is_said(store):
    for query in (
        "detection " * 10_000,
        "x" * 100_000 + " detection",
        " ".join(map(str, range(20_000))),
        '"' * 100_000 + "a",
    ):
        began = time.process_time()
        result = Finder(store).search(query, how="words")
        assert time.process_time() - began < 5
        assert any("letters of the query count" in note for note in result.notes)
    assert any("64 of" in note for note in Finder(store).search(" ".join(map(str, range(1000))), how="words").notes)


def test_without_words_there_is_nothing_to_ask(store):
    for query in ("", "   ", "?!", '""', "🙂"):
        with pytest.raises(UserError, match="no word"):
            found(store, query)


@pytest.mark.parametrize(
    "name", ["2611.00003", "arXiv:2611.00003v2", "https://arxiv.org/abs/2611.00003", "arxiv:2611.00003"]
)
def test_the_name_of_a_paper_finds_it_first(store, name):
    assert found(store, name)[0] == 4
    assert 4 not in found(store, name, where=Filter(source="a"))


def test_filters(store):
    with_cards(store)
    everything = found(store, "reward models detection", limit=200)
    assert set(found(store, "reward models detection", where=Filter(source="a"), limit=200)) == {1, 3, 5}
    assert {1, 2} == set(found(store, "reward models detection", where=Filter(until="2026-11-11"), limit=200))
    later = found(store, "reward models detection", where=Filter(since="2026-11-12"), limit=200)
    assert set(later) == set(everything) - {1, 2}
    by_id = {paper: store.get(paper).entry.slug for paper in everything}
    for where, wanted in (
        (Filter(room="rewards"), lambda card: card.room == "rewards"),
        (Filter(runnable=True), lambda card: card.status == "runs"),
    ):
        got = found(store, "reward models detection", where=where, limit=200)
        want = {paper for paper, slug in by_id.items() if slug is not None and wanted(papers()[slug])}
        assert set(got) == want
        assert want
    with pytest.raises(UserError, match="no room 'reward'; did you mean rewards"):
        Filter(room="reward")


def test_cards_and_pulled_papers_are_ranked_together(store):
    with_cards(store)
    hits = Finder(store).search("object detection transformers", how="words").hits
    assert hits[0].paper.id == 1
    assert "group-detr" in [hit.paper.entry.slug for hit in hits]


def test_merged_papers_are_found_once(store):
    encoder = Bags()
    refresh(store, encoder)
    store.merge(1, 3, why="alike")
    for how in ("words", "meaning", "both"):
        hits = Finder(store, encoder=encoder).search("detection of objects", how=how).hits
        numbers = [hit.paper.id for hit in hits]
        assert 1 in numbers
        assert 3 not in numbers
        assert len(numbers) == len(set(numbers))


def test_meaning_finds_other_words_and_both_is_half_of_either_stretched(store):
    encoder = Bags(automobiles="players", contests="battles")
    refresh(store, encoder)
    finder = Finder(store, encoder=encoder)
    assert finder.search("contests automobiles", how="words").hits == ()
    by_meaning = finder.search("contests automobiles", how="meaning")
    assert by_meaning.by == "meaning"
    assert by_meaning.hits[0].paper.id == 5
    want = {}
    ranks = []
    for how in ("words", "meaning"):
        found = {hit.paper.id: hit.score for hit in finder.search("detection diffusion", how=how).hits}
        low, high = min(found.values()), max(found.values())
        for paper, score in found.items():
            want[paper] = want.get(paper, 0) + (score - low) / (high - low) / 2
        ranks.append(list(found))
    words, meaning = ranks
    both = finder.search("detection diffusion")
    assert {hit.paper.id: hit.score for hit in both.hits} == pytest.approx(want)
    assert [hit.paper.id for hit in both.hits] == sorted(want, key=lambda paper: (-want[paper], paper))
    assert both.by == "words and meaning"
    first = both.hits[0]
    assert first.parts["rank by words"] == words.index(first.paper.id) + 1
    assert first.parts["rank by meaning"] == meaning.index(first.paper.id) + 1


def test_filters_hold_for_meaning_too_however_narrow(store):
    encoder = Bags()
    for number in range(300):
        store.add(Entry(title=f"Object detection with transformers {number}"), source="many", day="2026-01-01")
    refresh(store, encoder)
    finder = Finder(store, encoder=encoder)
    hits = finder.search("object detection with transformers", how="meaning", where=Filter(source="b"), limit=2).hits
    assert len(hits) == 2
    assert {hit.paper.id for hit in hits} <= {2, 4, 6}


def test_without_vectors_or_with_a_slow_encoder_it_says_so_and_goes_by_words(store):
    encoder = Bags()
    result = Finder(store, encoder=encoder).search("detection")
    assert (result.by, result.hits[0].paper.id) == ("words", 1)
    assert any("no paper has a vector" in note for note in result.notes)
    refresh(store, encoder)
    encoder.slow = True
    result = Finder(store, encoder=encoder, patience=0.1).search("detection")
    assert result.by == "words"
    assert any("being loaded" in note for note in result.notes)
    assert any("no encoder" in note for note in Finder(store).search("detection").notes)
    store.add(Entry(title="Newer detection"), source="x")
    encoder.slow = False
    assert any("1 papers have no vector" in note for note in Finder(store, encoder=encoder).search("detection").notes)


def test_similar_papers_by_vectors_and_by_the_title_where_there_are_none(store):
    encoder = Bags()
    before = Finder(store, encoder=encoder)
    result = before.similar(store.get(1))
    assert result.by == "words"
    assert result.hits[0].paper.id == 3
    assert 1 not in [hit.paper.id for hit in result.hits]
    assert "no vector yet" in result.notes[0]
    refresh(store, encoder)
    for finder in (before, Finder(store, shape=encoder)):  # it sees vectors that came since
        result = finder.similar(store.get(1), limit=5)
        assert result.by == "meaning"
        assert 1 not in [hit.paper.id for hit in result.hits]
        assert len(result.hits) == 5
        vectors = encoder.encode([f"{title}\n{abstract}" for title, abstract in TEXTS])
        likeness = vectors @ vectors[0]
        assert [hit.paper.id for hit in result.hits] == [n + 1 for n in np.argsort(-likeness, kind="stable") if n][:5]
        assert result.hits[0].score == pytest.approx(np.sort(likeness)[-2], abs=1e-6)
    assert before.similar(store.get(1), where=Filter(source="b"), limit=1).hits[0].paper.id in (2, 4, 6)


def test_relatives_are_cards_that_run_with_the_reason(store):
    with_cards(store)
    runs = {slug for slug, card in papers().items() if card.status == "runs"}
    pulled = store.add(
        Entry(
            title="Leaderboards of language models",
            abstract="We judge chat models by an LLM judge and rank them with Bradley-Terry on a benchmark, as arenas "
            "do; a judge's position bias is measured.",
        ),
        source="x",
    ).paper
    encoder = Bags()
    without = Finder(store).relatives(store.get(pulled))
    refresh(store, encoder)
    relatives = Finder(store, shape=encoder).relatives(store.get(pulled), least=0.2)
    for found_cards in (without, relatives):
        assert found_cards
        assert {relative.card.slug for relative in found_cards} <= runs
        assert all(relative.reason for relative in found_cards)
    for relative in relatives:
        texts = [f"{entry.title}\n{entry.abstract}" for entry in (store.get(pulled).entry, relative.paper.entry)]
        one, other = encoder.encode(texts)
        assert relative.similarity == pytest.approx(float(one @ other), abs=1e-6)
        assert f"similarity {relative.similarity:.2f}" in relative.reason
    numbers = [relative.similarity for relative in relatives]
    assert numbers == sorted(numbers, reverse=True)
    own = store.find("slug:" + next(iter(runs)))
    assert own.entry.slug not in [relative.card.slug for relative in Finder(store, shape=encoder).relatives(own)]


def test_pages_of_a_search_neither_double_nor_lose_a_paper(store):
    for number in range(60):
        store.add(Entry(title=f"Detection number {number}", abstract="word " * (number % 7)), source="x")
    encoder = Bags()
    refresh(store, encoder)
    finder = Finder(store, encoder=encoder)
    for how in ("words", "both", "meaning"):
        whole = [hit.paper.id for hit in finder.search("detection", how=how, limit=500).hits]
        got, after = [], None
        while True:
            page = finder.search("detection", how=how, limit=7, after=after)
            assert page.begin == len(got)
            got += [hit.paper.id for hit in page.hits]
            if not page.more:
                break
            after = (got[-1], len(got) - 1)
        assert got == whole
    first = finder.search("detection", how="words", limit=10)
    last = first.hits[-1].paper.id
    store.add(Entry(title="Detection detection"), source="x")  # comes first
    second = finder.search("detection", how="words", limit=10, after=(last, 9))
    assert not {hit.paper.id for hit in second.hits} & {hit.paper.id for hit in first.hits}
    gone = finder.search("detection", how="words", limit=10, after=(10**6, 9))
    assert gone.begin == 10


def test_the_work_for_common_words_is_bounded_and_titles_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "CANDIDATES", 50)
    monkeypatch.setattr(finding, "SOME", 80)
    monkeypatch.setattr(finding, "MANY", 20)
    store = Store(tmp_path / "p.sqlite")
    store.add(Entry(title="Learning models", abstract="the first of all"), source="x")
    for number in range(400):
        store.add(Entry(title=f"Nr {number}", abstract="learning models " + "of things " * (number % 5)), source="x")
    seen = []

    class Watched:
        """The store's connection; counts what bm25 is computed for."""

        def execute(self, sql, values=()):
            rows = store.db.execute(sql, values)
            if "bm25" in sql and "FROM (SELECT" in sql:
                inner = sql.partition("FROM (")[2].rpartition(") ORDER BY score")[0]
                seen.append(len(store.db.execute(inner, values[:-1]).fetchall()))
            return rows

    watched = SimpleNamespace(db=Watched(), get_all=store.get_all, clear_errors=store.clear_errors, count=store.count)
    result = Finder(watched).search("learning models", how="words", limit=5)
    assert result.hits[0].paper.id == 1  # the oldest: by its title
    assert max(seen) <= 50
    assert any("more than 50 papers" in note for note in result.notes)
    seen.clear()
    rare = Finder(watched).search("first learning models", how="words", limit=5)
    assert rare.hits[0].paper.id == 1
    assert max(seen) <= 80


def test_a_damaged_index_is_one_clear_line(store):
    store.db.execute("DROP TABLE words")
    with pytest.raises(UserError, match=re.escape(str(store.path))):
        found(store, "detection")
