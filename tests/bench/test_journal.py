import io
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from counterproof.bench.journal import Journal, home
from counterproof.bench.trials import key_of
from counterproof.bench.worker import failure
from counterproof.errors import UserError


@pytest.fixture
def record(spec):
    def record(seed=0, **changes):
        made = failure(
            spec(seed=seed), "raised", "no", wall=1.0, cpu=1.0, memory=1.0, started="2026-01-01T00:00:00.000"
        )
        return replace(made, **changes)

    return record


def contents(path):
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_home_is_where_the_environment_says(monkeypatch):
    assert Journal().path.parent == home() == Path(os.environ["COUNTERPROOF_HOME"])
    monkeypatch.delenv("COUNTERPROOF_HOME")
    assert "counterproof" in str(home())


def test_the_latest_execution_answers(journal, record):
    early = record(finished="2026-01-01T00:00:00.000+00:00")
    late = record(finished="2026-01-02T00:00:00.000+00:00", outcome="ok", metrics={"score": 0.1 + 0.2})
    journal.record(late)
    journal.record(early)
    assert journal.find([early.key]) == {early.key: late}
    assert journal.find([early.key], since="2026-01-03") == {}
    assert [r.uid for r in journal.trials()] == [early.uid, late.uid]
    assert [r.uid for r in journal.trials(outcome="ok")] == [late.uid]


def test_many_keys_are_found_at_once(journal, record):
    records = [record(seed) for seed in range(3)]
    for one in records:
        journal.record(one)
    assert len(journal.find([one.key for one in records] + [f"{n:032}" for n in range(1500)])) == 3


def test_export_and_import_lose_nothing_and_add_nothing_twice(journal, record, tmp_path):
    for seed in range(3):
        journal.record(record(seed))
    out = io.StringIO()
    assert journal.export(out) == 3
    lines = out.getvalue().splitlines()
    exported = json.loads(lines[0])
    assert {"key", "paper", "claim", "arm", "seed", "budget", "outcome", "metrics", "cost", "versions"} <= set(exported)
    other = Journal(tmp_path / "other.sqlite")
    assert other.merge(lines, "f") == (3, 0)
    assert other.merge(lines, "f") == (0, 3)
    assert list(other.trials()) == list(journal.trials())


def test_only_current_trials_are_exported_if_asked(journal, record):
    journal.record(record(0))
    one = record(1)
    journal.record(replace(one, parts={**one.parts, "versions": {"python": "2.7"}}))
    assert journal.export(io.StringIO(), current=True) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: "{", "f:2: not JSON"),
        (lambda line: "[1]", "f:2: not an exported trial"),
        (lambda line: '{"key": "x"}', "f:2: not an exported trial"),
        (lambda line: line.replace('"raised"', '"fine"', 1), "f:2: unknown outcome 'fine'"),
        (lambda line: line, "f:2: the key"),
        (lambda line: line.replace('"seed": 1', '"seed": "x"', 1), "f:2: seed"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_taken_in(journal, record, change, message, tmp_path):
    journal.record(record(0))
    journal.record(record(1))
    out = io.StringIO()
    journal.export(out)
    first, second = out.getvalue().splitlines()
    altered = json.loads(second)
    if "the key" in message:
        altered["parts"]["seed"] = 7
        second = json.dumps(altered)
    else:
        second = change(second)
    other = Journal(tmp_path / "other.sqlite")
    with pytest.raises(UserError, match=message):
        other.merge([first, second], "f")
    assert list(other.trials()) == []


def test_a_key_may_be_shortened_as_long_as_it_is_clear(journal, record):
    for seed in range(40):
        journal.record(record(seed))
    one = record(0)
    assert journal.by_prefix(one.key[:12]).key == one.key
    with pytest.raises(UserError, match="short for several"):
        journal.by_prefix(next(a for a in "0123456789abcdef" if sum(k.startswith(a) for k in keys(journal)) > 1))
    with pytest.raises(UserError, match="no trial has the key"):
        journal.by_prefix("zz")
    with pytest.raises(UserError, match="no trial has the key"):
        journal.by_prefix("%")


def keys(journal):
    return [record.key for record in journal.trials()]


def test_a_lease_is_given_to_one_driver_and_freed_by_its_death(journal, driver):
    process = driver("j = Journal()\nprint(j.lease('k'), flush=True)\nimport time; time.sleep(60)")
    assert process.stdout.readline().strip() == "True"
    assert not journal.lease("k")
    process.kill()
    process.wait()
    assert journal.lease("k")
    journal.release(["k"])
    assert journal.lease("k")


def test_a_lease_of_another_host_lasts_as_long_as_it_beats(journal, monkeypatch):
    other = Journal()
    other._host, other._owner = "elsewhere", "elsewhere:1:1"
    assert other.lease("k")
    assert not journal.lease("k")
    monkeypatch.setattr("counterproof.bench.journal.STALE_AFTER", -1.0)
    assert journal.lease("k")


def test_a_foreign_database_is_left_alone(tmp_path):
    path = tmp_path / "notes.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE notes (text)")
    before = contents(path)
    with pytest.raises(UserError, match=r"notes\.sqlite is an SQLite file of another program"):
        Journal(path)
    assert contents(path) == before


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_text("dear diary, " * 100)
    before = contents(path)
    with pytest.raises(UserError, match="damaged or not a journal"):
        Journal(path)
    assert contents(path) == before


def test_a_damaged_journal_is_said_to_be_damaged(journal, record, tmp_path):
    for seed in range(30):
        journal.record(record(seed))
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.close()
    damaged = bytearray(journal.path.read_bytes())
    damaged[4096:] = b"\x7f" * (len(damaged) - 4096)
    path = tmp_path / "damaged.sqlite"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        list(Journal(path).trials())
    assert path.read_bytes()[4096:] == damaged[4096:]


def test_a_journal_of_a_newer_version_is_left_alone(journal, record):
    journal.record(record())
    journal._db.execute("PRAGMA user_version = 99")
    journal.close()
    with pytest.raises(UserError, match=r"newer Counterproof \(journal version 99"):
        Journal()


def test_a_full_disk_keeps_what_is_there(journal, record):
    journal.record(record(0))
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")

    def fill():
        for seed in range(1, 200):
            journal.record(record(seed, message="x" * 5000))

    with pytest.raises(UserError, match="the disk is full"):
        fill()
    journal._db.execute("PRAGMA max_page_count = 100000")
    assert journal.find([record(0).key])
    journal.record(record(500))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
def test_a_really_full_disk_is_one_clear_line(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        (small / "filling").write_bytes(b"x" * 50_000)
        ran = subprocess.run(
            [sys.executable, "-m", "counterproof", "runs", "list"],
            env={**os.environ, "COUNTERPROOF_HOME": str(small / "home")},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2
        assert "disk is full" in ran.stderr
        assert ran.stderr.count("\n") == 1
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_home_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="COUNTERPROOF_HOME"):
        Journal(tmp_path / "file" / "journal.sqlite")


@pytest.mark.skipif(os.getuid() == 0 and not Path("/proc/sys").exists(), reason="root can write everywhere")
def test_a_home_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match="COUNTERPROOF_HOME"):
        Journal(Path("/proc/sys/journal.sqlite"))


def test_fingerprints_follow_content_and_names(journal, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("one")
    first = journal.fingerprint(folder)
    assert journal.fingerprint(folder) == first
    (folder / "a").write_text("two!")
    second = journal.fingerprint(folder)
    (folder / "a").rename(folder / "b")
    assert len({first, second, journal.fingerprint(folder)}) == 3
    with pytest.raises(UserError, match="nowhere does not exist"):
        journal.fingerprint(tmp_path / "nowhere")


def test_the_key_ignores_the_order_of_its_parts():
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
