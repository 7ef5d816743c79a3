"""The store: one paper under all its names, nothing lost by importing, merging, undoing, rebuilding or dying."""

import sqlite3
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.page.schema import MIGRATIONS
from counterproof.page.store import Entry, Store, arxiv_id, combined, title_digest
from lab.clock import Clock


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=Clock())
    yield store
    store.close()


DETR = Entry(
    title="End-to-End Object Detection\n with Transformers",
    abstract="We present a new method.",
    authors=("Nicolas Carion", "Francisco Massa"),
    arxiv="2005.12872v3",
    published="2020-05-26T17:06:38Z",
    categories=("cs.CV",),
    signals={"upvotes": 3},
)


def found(store, words):
    rows = store.db.execute("SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid", (words,))
    return [row[0] for row in rows]


def consistent(store):
    """FTS5's own check of the index against its table, over the papers that are not merged into others."""
    for paper, title in store.db.execute("SELECT id, title FROM papers WHERE merged_into IS NULL").fetchall():
        assert paper in found(store, " ".join(f'"{word}"' for word in title.split()))
    merged = {row[0] for row in store.db.execute("SELECT id FROM papers WHERE merged_into IS NOT NULL")}
    for (title,) in store.db.execute("SELECT title FROM papers").fetchall():
        assert not merged & set(found(store, " ".join(f'"{word}"' for word in title.split())))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("2207.13085", "2207.13085"),
        ("arXiv:2207.13085v12", "2207.13085"),
        ("https://arxiv.org/abs/2207.13085v1", "2207.13085"),
        ("http://arxiv.org/pdf/2207.13085v2.pdf", "2207.13085"),
        ("https://arxiv.org/abs/hep-th/9901001v3?context=x", "hep-th/9901001"),
        ("math.GT/0309136", "math/0309136"),
        ("oai:arXiv.org:0704.0001", "0704.0001"),
        ("10.48550/arXiv.2207.13085", "2207.13085"),
        ("10.1145/3368089", None),
        ("2207.130", None),
        ("a quick 2207.13085 brown fox", None),
        ("", None),
    ],
)
def test_arxiv_ids_are_read_without_version(text, clean):
    assert arxiv_id(text) == clean


def test_a_record_makes_a_paper_and_again_changes_nothing(store):
    added = store.add(DETR, source="arxiv", raw=b"<entry/>", form="arxiv-atom")
    assert added.outcome == "new"
    before = list(store.db.iterdump())
    assert store.add(DETR, source="arxiv", raw=b"<entry/>", form="arxiv-atom").outcome == "same"
    assert list(store.db.iterdump()) == before
    paper = store.get(added.paper)
    assert paper.key == "arxiv:2005.12872"
    assert paper.path == "arxiv/2005.12872"
    assert paper.entry.title == "End-to-End Object Detection with Transformers"
    assert paper.day == "2020-05-26"
    assert store.records(paper.id) == [("arxiv", "2026-11-23T08:30:00Z", DETR, b"<entry/>")]
    assert found(store, "transformer detection") == [paper.id]


@pytest.mark.parametrize(
    "name",
    [
        "arxiv:2005.12872", "2005.12872", "2005.12872v1", "arXiv:2005.12872v2", "https://arxiv.org/abs/2005.12872",
        "10.1007/978-3-030-58452-8_13", "https://doi.org/10.1007/978-3-030-58452-8_13",
        "DOI:10.1007/978-3-030-58452-8_13",
    ],
)  # fmt: skip
def test_a_paper_is_found_by_any_of_its_names(store, name):
    paper = store.add(replace(DETR, doi="https://doi.org/10.1007/978-3-030-58452-8_13"), source="arxiv").paper
    assert store.find(name).id == paper
    assert store.find("2005.99999") is None
    assert store.find("") is None


def test_a_later_record_adds_what_the_first_lacked_and_the_trusted_source_wins(store):
    first = store.add(replace(DETR, abstract="", categories=()), source="bibtex")
    store.clock.now += timedelta(hours=1)
    second = store.add(replace(DETR, links={"code": "https://github.com/x/y"}), source="arxiv")
    third = store.add(replace(DETR, title="END-TO-END OBJECT DETECTION WITH TRANSFORMERS", venue="ECCV"), source="ris")
    assert (second.paper, second.outcome) == (first.paper, "changed")
    assert third.paper == first.paper
    paper = store.get(first.paper)
    assert paper.entry.title == "End-to-End Object Detection with Transformers"
    assert paper.entry.abstract == DETR.abstract
    assert paper.entry.venue == "ECCV"
    assert paper.entry.links == {"code": "https://github.com/x/y"}
    assert paper.changed == "2026-11-23T09:30:00Z"
    assert found(store, "present") == [first.paper]
    assert found(store, '"end to end object"') == [first.paper]
    consistent(store)


@pytest.mark.parametrize(
    ("published", "day"), [("1996", "1996-01-01"), ("1996-07", "1996-07-01"), ("1996-07-12T10:00:00Z", "1996-07-12")]
)
def test_a_paper_is_listed_on_a_day_even_when_only_its_year_is_known(store, published, day):
    added = store.add(replace(DETR, published=published), source="bibtex")
    assert store.get(added.paper).day == day
    assert store.add(replace(DETR, published=published), source="ris").outcome == "same"  # says nothing new
    assert store.rebuild() == 0


def test_the_same_title_author_and_year_is_the_same_paper_unless_ids_differ(store):
    paper = store.add(DETR, source="arxiv").paper
    alike = Entry(title="End-to-end object detection with transformers", authors=("Carion, Nicolas",), published="2020")
    assert store.add(alike, source="bibtex").paper == paper
    other = store.add(replace(DETR, arxiv="2012.00001"), source="arxiv")
    assert other.paper != paper
    assert other.outcome == "new"
    assert store.find("2012.00001").id == other.paper
    assert store.add(replace(DETR, authors=("Someone Else",), arxiv=None), source="bibtex").outcome == "new"


def test_a_record_with_two_known_names_merges_and_undoing_brings_both_back(store):
    one = store.add(DETR, source="arxiv", day="2026-11-20").paper
    two = store.add(Entry(title="DETR", doi="10.1007/detr", abstract="Another text."), source="crossref").paper
    store.vote(one, "ann", 1)
    store.vote(two, "bob", 1)
    store.vote(two, "ann", 1)
    both = store.add(replace(DETR, doi="10.1007/detr", published="2020-08-01"), source="semantic-scholar")
    assert both.paper == one
    assert store.count() == 1
    assert store.find("10.1007/detr").id == one
    assert store.get(two).id == one
    assert store.votes(one) == 2
    assert found(store, "another") == []
    consistent(store)
    (merge,) = store.db.execute("SELECT id FROM merges").fetchone()
    store.unmerge(merge)
    assert store.count() == 2
    assert store.get(two).entry.title == "DETR"
    assert store.find("10.1007/detr").id == two
    assert (store.votes(one), store.votes(two)) == (1, 2)
    assert found(store, "another") == [two]
    consistent(store)
    with pytest.raises(UserError, match="was undone"):
        store.unmerge(merge)
    with pytest.raises(UserError, match="does not exist"):
        store.unmerge(99)


def test_merges_are_undone_in_the_opposite_order(store):
    a, b, c = (store.add(Entry(title=f"Paper {name}"), source="x").paper for name in "abc")
    first = store.merge(b, c, why="alike")
    second = store.merge(a, b, why="alike")
    assert store.get(c).id == a
    with pytest.raises(UserError, match=f"merge {second} came after"):
        store.unmerge(first)
    store.unmerge(second)
    store.unmerge(first)
    assert [store.get(paper).id for paper in (a, b, c)] == [a, b, c]
    consistent(store)
    with pytest.raises(ValueError, match="itself"):
        store.merge(a, a, why="")


def test_votes_are_events_and_the_last_word_counts(store):
    paper = store.add(DETR, source="arxiv").paper
    for voter, value in (("ann", 1), ("ann", 1), ("bob", 1), ("bob", 0), ("cy", 1)):
        store.vote(paper, voter, value)
    assert store.votes(paper) == 2
    assert store.db.execute("SELECT count(*) FROM votes").fetchone()[0] == 5
    with pytest.raises(ValueError, match="not 2"):
        store.vote(paper, "ann", 2)


def test_signals_keep_their_history(store):
    paper = store.add(DETR, source="arxiv").paper
    store.clock.now += timedelta(days=1)
    store.add(replace(DETR, signals={"upvotes": 3, "stars": 1}), source="arxiv")
    store.clock.now += timedelta(days=1)
    store.add(replace(DETR, signals={"upvotes": 9}), source="arxiv")
    rows = store.db.execute("SELECT name, value, at FROM signals WHERE paper = ? ORDER BY id", (paper,)).fetchall()
    assert [tuple(row) for row in rows] == [
        ("upvotes", 3, "2026-11-23T08:30:00Z"),
        ("stars", 1, "2026-11-24T08:30:00Z"),
        ("upvotes", 9, "2026-11-25T08:30:00Z"),
    ]
    assert store.get(paper).entry.signals == {"upvotes": 9, "stars": 1}


def test_everything_follows_from_the_records(store):
    papers = [store.add(replace(DETR, title=f"Title {n}", arxiv=f"2005.0000{n}"), source="arxiv", raw=b"%d" % n).paper
              for n in range(3)]  # fmt: skip
    store.merge(papers[0], papers[2], why="alike")
    before = [store.get(paper) for paper in papers]
    store.db.execute("UPDATE papers SET title = 'lost', abstract = 'lost', entry = '{}'")
    store.db.execute("INSERT INTO words (words) VALUES ('delete-all')")
    assert store.rebuild() == 2
    assert [replace(store.get(paper), changed="") for paper in papers] == [
        replace(paper, changed="") for paper in before
    ]
    consistent(store)
    changed = store.rebuild(lambda form, raw: replace(DETR, title=f"Read again {raw.decode()}", arxiv=None))
    assert changed == 2
    assert store.get(papers[1]).entry.title == "Read again 1"
    consistent(store)


def test_many_records_are_taken_in_or_none(store):
    entries = [(replace(DETR, title=f"T {n}", arxiv=f"2005.0000{n}"), None) for n in range(5)]

    def broken():
        yield from entries
        raise RuntimeError("the line broke")

    with pytest.raises(RuntimeError):
        store.add_all(broken(), source="arxiv")
    assert store.count() == 0
    assert store.add_all(entries, source="arxiv") == {"new": 5, "changed": 0, "same": 0}
    assert store.add_all([*entries, entries[0]], source="arxiv") == {"new": 0, "changed": 0, "same": 6}
    consistent(store)


def test_what_is_committed_survives_a_kill(tmp_path):
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom counterproof.page.store import *\n"
        f"store = Store(Path({str(tmp_path / 'p.sqlite')!r}))\n"
        "for n in range(50):\n    store.add(Entry(title=f'Paper {n}'), source='x')\n"
        "store.db.execute('BEGIN')\nstore.add(Entry(title='Half a paper'), source='x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    store = Store(tmp_path / "p.sqlite")
    assert store.count() == 50
    consistent(store)
    assert found(store, "half") == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=12), st.randoms())
@settings(max_examples=40, deadline=None)
def test_importing_in_any_order_twice_leaves_every_name_with_one_paper(tmp_path_factory, pairs, random):
    store = Store(tmp_path_factory.mktemp("s") / "p.sqlite", clock=Clock())
    entries = [
        Entry(title=f"T{a}", arxiv=f"2005.1000{a}", doi=f"10.1000/{b}" if both else None, published="2020")
        for a, b, both in pairs
    ]
    for entry in entries:
        store.add(entry, source="arxiv")
    before = store.db.execute("SELECT count(*) FROM records").fetchone()[0]
    random.shuffle(entries)
    assert all(store.add(entry, source="arxiv").outcome == "same" for entry in entries)
    assert store.db.execute("SELECT count(*) FROM records").fetchone()[0] == before
    for entry in entries:
        assert store.find(entry.arxiv) is not None
        assert not entry.doi or store.find(entry.doi) is not None
    assert store.count() == len({entry.arxiv for entry in entries})  # two arXiv ids are two papers, whatever else
    consistent(store)
    store.close()


def test_two_processes_may_make_the_file_at_once(tmp_path):
    code = (
        "from pathlib import Path\nfrom counterproof.page.store import *\n"
        f"store = Store(Path({str(tmp_path / 'p.sqlite')!r}))\n"
        "for n in range(20):\n    store.add(Entry(title=f'Paper {n}'), source='x')\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert Store(tmp_path / "p.sqlite").count() == 20


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    before = other.read_bytes()
    with pytest.raises(UserError, match="another program"):
        Store(other)
    assert other.read_bytes() == before
    (tmp_path / "text").write_text("no database at all, just some text that is long enough" * 40)
    with pytest.raises(UserError, match="damaged or no page"):
        Store(tmp_path / "text")


def test_a_newer_file_is_refused_and_an_older_one_migrated(tmp_path, monkeypatch):
    path = tmp_path / "p.sqlite"
    Store(path).close()
    monkeypatch.setattr("counterproof.page.store.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE later (x);"))
    with pytest.raises(UserError, match="older version"):
        Store(path, read_only=True)
    store = Store(path)
    assert store.db.execute("SELECT count(*) FROM later").fetchone()[0] == 0
    store.close()
    monkeypatch.setattr("counterproof.page.store.MIGRATIONS", MIGRATIONS)
    with pytest.raises(UserError, match="newer Counterproof"):
        Store(path)


def test_reading_only_makes_nothing(tmp_path):
    with pytest.raises(UserError, match="feed import"):
        Store(tmp_path / "p.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []
    Store(tmp_path / "p.sqlite").close()
    reader = Store(tmp_path / "p.sqlite", read_only=True)
    with pytest.raises(UserError, match="cannot be written"):
        reader.add(DETR, source="x")


@pytest.fixture
def sealed(tmp_path):
    """A disk that cannot be written, with a store on it; makes it, given what is done to the folder before."""
    mounted = []

    def sealed(prepare):
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode != 0:
            pytest.skip("a disk can be mounted by root only")
        mounted.append(disk)
        prepare(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return disk

    yield sealed
    for disk in mounted:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_store_on_a_read_only_disk_is_read(sealed):
    def prepare(disk):
        store = Store(disk / "page.sqlite")
        store.add(DETR, source="arxiv")
        store.close()

    disk = sealed(prepare)
    assert [path.name for path in disk.iterdir()] == ["page.sqlite"]
    store = Store(disk / "page.sqlite", read_only=True)
    assert store.find("2005.12872").entry.title.startswith("End-to-End")
    with pytest.raises(UserError, match="cannot be written"):
        store.add(DETR, source="x")
    store.close()
    with pytest.raises(UserError, match="cannot be written"):
        Store(disk / "page.sqlite")


def test_a_log_that_was_not_taken_in_is_never_passed_over(sealed, tmp_path):
    def prepare(disk):
        store = Store(tmp_path / "page.sqlite")
        store.add(DETR, source="arxiv")
        for name in ("page.sqlite", "page.sqlite-wal"):  # as a machine leaves them that loses its power
            (disk / name).write_bytes((tmp_path / name).read_bytes())
        store.close()

    disk = sealed(prepare)
    with pytest.raises(UserError):
        Store(disk / "page.sqlite", read_only=True).find("2005.12872")


@pytest.mark.parametrize("wrong", [{"title": "  "}, {"arxiv": "12"}, {"doi": "x"}])
def test_entries_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Entry(**{"title": "T", **wrong})


def test_an_entry_survives_json_and_an_arxiv_doi_is_an_arxiv_id():
    entry = replace(DETR, links={"pdf": "x"}, extra={"note": "é"}, doi="10.1000/1")
    assert Entry.from_json(entry.to_json()) == entry
    assert Entry.from_json(entry.rest(), title=entry.title, abstract=entry.abstract) == entry
    own = Entry(title="T", doi="https://doi.org/10.48550/arXiv.2005.12872")
    assert (own.arxiv, own.doi) == ("2005.12872", None)


def test_titles_are_compared_without_case_accents_and_punctuation():
    one = title_digest("Schrödinger's  Bridge: A-B", ("Érwin Müller",), "2020-01-01")
    assert one == title_digest("schrodingers bridge ab", ("Muller, E.",), "2020")
    assert one != title_digest("schrodingers bridge ab", ("Muller, E.",), "2021")


def test_combining_takes_the_latest_of_equally_trusted_records():
    old, new = Entry(title="Old", venue="A", categories=("x",)), Entry(title="New", categories=("y", "x"))
    assert combined([("a", old), ("b", new)]) == Entry(title="New", venue="A", categories=("y", "x"))
    assert combined([("arxiv", old), ("b", new)]).title == "Old"
