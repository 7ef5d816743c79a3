"""Vectors: made once for a text, kept by model, length and dimension, and searched exactly."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest

from counterproof.errors import UserError
from counterproof.page import vectors as module
from counterproof.page.store import Entry, Store
from counterproof.page.vectors import Encoder, Vectors, refresh, text_of


class Fake:
    """A random vector for each text, the same each time; counts what it is asked."""

    def __init__(self, model="fake", length=9, dimension=16):
        self.model, self.length, self.dimension = model, length, dimension
        self.asked = []

    def encode(self, texts, timeout=None):
        self.asked += texts
        seeds = [int.from_bytes(f"{self.model}{text}".encode(), "big") % (1 << 63) for text in texts]
        made = np.array([np.random.default_rng(seed).normal(size=self.dimension) for seed in seeds])
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=lambda: datetime(2026, 11, 23, tzinfo=UTC))
    yield store
    store.close()


def filled(store, number, begin=0):
    for n in range(begin, begin + number):
        store.add(Entry(title=f"Paper {n}", abstract=f"About {n}.", arxiv=f"2005.{n:05d}"), source="x")
    return store


def brute(store, fake, query, number):
    """By definition, from the texts themselves."""
    papers = [store.get(row[0]) for row in store.db.execute("SELECT id FROM papers WHERE merged_into IS NULL")]
    likeness = [(float(fake.encode([text_of(p.entry.title, p.entry.abstract)])[0] @ query), p.id) for p in papers]
    return [paper for _, paper in sorted(likeness, key=lambda one: (-one[0], one[1]))[:number]]


def test_each_text_is_embedded_once_and_again_when_it_changes(store):
    fake = Fake()
    filled(store, 70)
    assert refresh(store, fake) == module.Refreshed(70, 0)
    assert sorted(fake.asked) == sorted(f"Paper {n}\nAbout {n}." for n in range(70))
    assert refresh(store, fake) == module.Refreshed(0, 0)
    store.add(Entry(title="Paper 3", abstract="Now about something else.", arxiv="2005.00003"), source="arxiv")
    fake.asked.clear()
    assert refresh(store, fake).made == 1
    assert fake.asked == ["Paper 3\nNow about something else."]
    store.add(Entry(title="Paper 3", arxiv="2005.00003", venue="ECCV"), source="bibtex")  # its text is the same
    assert refresh(store, fake).made == 0
    assert len(Vectors(store, fake)) == 70


def test_vectors_of_other_models_lengths_and_dimensions_stay_apart(store):
    filled(store, 3)
    kinds = [Fake(), Fake(model="other"), Fake(length=512), Fake(dimension=8)]
    for number, fake in enumerate(kinds):
        assert [len(Vectors(store, other)) for other in kinds] == [3] * number + [0] * (4 - number)
        assert refresh(store, fake).made == 3
    found = Vectors(store, kinds[3]).of([1, 2])
    assert {paper: vector.shape for paper, vector in found.items()} == {1: (8,), 2: (8,)}


def test_the_latest_are_made_first_and_a_limit_leaves_the_rest(store):
    for day in ("2026-11-01", "2026-11-20", "2026-11-10"):
        store.add(Entry(title=f"Of {day}"), source="x", day=day)
    fake = Fake()
    assert refresh(store, fake, limit=2) == module.Refreshed(2, 1)
    assert fake.asked == ["Of 2026-11-20", "Of 2026-11-10"]
    seen = []
    assert refresh(store, fake, progress=lambda *what: seen.append(what)).left == 0
    assert seen == [(1, 1)]


def test_search_is_exact_with_or_without_the_mapped_file(store):
    fake, rng = Fake(), np.random.default_rng(0)
    refresh(filled(store, 200), fake)
    vectors = Vectors(store, fake)
    query = rng.normal(size=16).astype(np.float32)
    query /= np.linalg.norm(query)
    want = brute(store, fake, query, 17)
    assert [paper for paper, _ in vectors.search(query, 17)] == want
    vectors.write()
    assert len(vectors.tail) == 0
    assert isinstance(vectors.base, np.memmap)
    assert [paper for paper, _ in vectors.search(query, 17)] == want
    # A vector that is in the file is made anew, and others come: both are seen, also by one who opens the file anew.
    store.add(Entry(title="Paper 7", abstract="Rewritten.", arxiv="2005.00007"), source="arxiv")
    refresh(filled(store, 20, begin=200), fake)
    for reader in (vectors, Vectors(store, fake)):
        reader.renew()
        assert isinstance(reader.base, np.memmap)
        assert len(reader) == 220
        assert [paper for paper, _ in reader.search(query, 220)] == brute(store, fake, query, 220)
        assert len(reader.search(query, 500)) == 220
        assert reader.search(query, 0) == []
    scores = [score for _, score in vectors.search(query, 220)]
    assert scores == sorted(scores, reverse=True)
    paper = vectors.of([5])[5]
    assert vectors.search(paper, 1)[0] == (5, pytest.approx(1.0, abs=1e-6))


def test_equal_vectors_are_ordered_by_id(store):
    fake = Fake()
    fake.encode = lambda texts, timeout=None: np.tile(np.eye(1, 16, dtype=np.float32), (len(texts), 1))
    refresh(filled(store, 5), fake)
    assert [paper for paper, _ in Vectors(store, fake).search(np.ones(16, dtype=np.float32), 5)] == [1, 2, 3, 4, 5]


def test_a_mapped_file_that_does_not_belong_to_the_store_is_not_believed(store, tmp_path):
    fake = Fake()
    refresh(filled(store, 30), fake)
    vectors = Vectors(store, fake)
    vectors.write()
    whole = vectors.path.read_bytes()
    other = Store(tmp_path / "other.sqlite")
    refresh(filled(other, 30, begin=100), fake)
    strange = Vectors(other, fake)
    for damage in (whole, whole[: len(whole) // 2], b"", b"no matrix"):
        strange.path.write_bytes(damage)
        reader = Vectors(other, fake)
        assert len(reader.base) == 0
        assert len(reader) == 30
        query = reader.of([4])[4]
        assert reader.search(query, 1)[0][0] == 4
    # The folder of the file cannot be written: the table is enough.
    reader.path = tmp_path / "missing" / "file.npy"
    reader.write()
    assert len(reader) == 30


def test_a_merged_papers_text_is_not_embedded(store):
    filled(store, 3)
    store.merge(1, 2, why="alike")
    assert refresh(store, Fake()).made == 2


def test_killed_while_embedding_what_was_made_is_kept(tmp_path):
    path = tmp_path / "p.sqlite"
    with_killer = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_vectors import *
store = filled(Store(Path({str(path)!r})), 100)
refresh(store, Fake(), progress=lambda made, of: made >= 64 and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", with_killer], check=False).returncode == -signal.SIGKILL
    store, fake = Store(path), Fake()
    assert len(Vectors(store, fake)) == 64
    assert refresh(store, fake).made == 36
    assert len(fake.asked) == 36


ANSWER = """
import os, sys, time, types
import numpy as np
embedding = sys.modules["counterproof.language.embedding"] = types.ModuleType("embedding")
def embed(texts, model=None):
    if "slow" in texts:
        time.sleep(1.5)
    if "die" in texts:
        os._exit(3)
    if "bad" in texts:
        from counterproof.errors import UserError
        raise UserError("cannot fetch it")
    print("noise of a library")
    return np.array([[len(text)] * 384 for text in texts], dtype=np.float32)
embedding.embed, embedding.default_encoder = embed, lambda: "folder"
from counterproof.page.vectors import answer
answer(float(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The encoder's process with another model behind it."""
    folder = tmp_path_factory.mktemp("answering")
    fake = folder / "counterproof_fake_embedding.py"
    fake.write_text(ANSWER)

    def popen(command, **how):
        return subprocess.Popen([sys.executable, str(fake), command[2].rpartition("(")[2].rstrip(")")], **how)

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
    encoder = Encoder(idle=60)
    yield encoder
    encoder.close()
    patch.undo()


def test_the_encoders_process_answers_in_order_and_survives_errors_delays_and_death(process):
    assert process.encode(["a", "bb"])[:, 0].tolist() == [1, 2]
    first = process._process.pid
    assert process.encode([]).shape == (0, 384)
    with pytest.raises(UserError, match="cannot fetch it"):
        process.encode(["bad"])
    assert process.encode(["slow", "x"], timeout=0.05) is None
    assert process.encode(["ccc"])[:, 0].tolist() == [3]  # not the late answer to the one before
    assert process._process.pid == first
    with pytest.raises(UserError, match="ended with code 3"):
        process.encode(["die"])
    assert process.encode(["dddd"])[:, 0].tolist() == [4]
    assert process._process.pid != first
    long = ["w" * 50_000] * 40  # more than a pipe holds
    assert process.encode(long)[:, 0].tolist() == [50_000] * 40


def test_an_idle_encoder_ends_and_is_started_again(process):
    process.close()
    process.idle = 0.2
    assert process.encode(["a"])[0, 0] == 1
    process._process.wait(timeout=20)
    assert process.encode(["bb"])[0, 0] == 2


def test_torch_stays_out_of_this_process():
    code = (
        "import sys\nfrom counterproof.page import finding, views, vectors, formats, view_commands\n"
        "vectors.Encoder()\nprint(sorted({'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
