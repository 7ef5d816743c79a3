"""A user's data: one path, or a kind with the paths it needs, all of them in the fingerprint."""

from dataclasses import replace
from pathlib import Path

import pytest

from counterproof.bench import owned
from counterproof.bench.owned import own_data
from counterproof.errors import UserError
from lab.task import TASK

READING = replace(TASK, data="lab.task:read")


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What the task's reader was given."""
    seen = []

    def read(path):
        seen.append(path)
        return "three numbers"

    monkeypatch.setattr(owned, "resolve", lambda reference: read)
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("[1]")
    Path("b,c.json").write_text("[2]")
    Path("images").mkdir()
    (Path("images") / "x.png").write_text("x")
    return seen


def test_a_plain_path_is_read_as_it_is(given, journal, tmp_path):
    found = own_data(READING, Path("a.json"), journal)
    assert given == [Path("a.json")]
    assert (found.path, found.says) == (str(tmp_path / "a.json"), "three numbers")
    assert found.fingerprint == journal.fingerprint(Path("a.json"))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("coco:a.json,images", ["a.json", "images"]),
        ("coco:./images/../a.json,images", ["a.json", "images"]),
        ("coco:a.json", ["a.json"]),
        ("coco:a.json,", ["a.json"]),
        ("yolo:images", ["images"]),
        ("coco:b,c.json", ["b,c.json"]),
        ("coco:b,c.json,images", ["b,c.json", "images"]),
    ],
)
def test_a_kind_names_its_paths(spec, parts, given, journal, tmp_path, monkeypatch):
    found = own_data(READING, Path(spec), journal)
    kind = spec.partition(":")[0]
    whole = f"{kind}:" + ",".join(str(tmp_path / part) for part in parts)
    assert given == [Path(whole)]
    assert found.path == whole
    monkeypatch.chdir("/")
    assert own_data(READING, Path(found.path), journal) == found


def test_all_that_is_named_is_in_the_fingerprint(given, journal):
    def fingerprint(spec="coco:a.json,images"):
        return own_data(READING, Path(spec), journal).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint("yolo:a.json,images") != first
    (Path("images") / "x.png").write_text("another")
    second = fingerprint()
    assert second != first
    Path("a.json").write_text("[another]")
    assert fingerprint() not in (first, second)


def test_what_exists_under_that_name_is_a_plain_path(given, journal):
    Path("coco:a.json").write_text("[3]")
    found = own_data(READING, Path("coco:a.json"), journal)
    assert given == [Path("coco:a.json")]
    assert found.fingerprint == journal.fingerprint(Path("coco:a.json"))
    Path("2026-11-22T10:30.csv").write_text("1")
    assert own_data(READING, Path("2026-11-22T10:30.csv"), journal).path.endswith("T10:30.csv")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing.json", "nothing.json does not exist"),
        ("coco:nothing.json,images", r"nothing.json does not exist \(coco:nothing.json,images\)"),
        ("coco:a.json,pictures", r"pictures does not exist \(coco:a.json,pictures\)"),
        ("coco:", "coco: does not exist"),
        ("2026-11-22T10:30.csv", "T10:30.csv does not exist"),
    ],
)
def test_what_does_not_exist_is_named(spec, says, given, journal):
    with pytest.raises(UserError, match=says):
        own_data(READING, Path(spec), journal)
    assert given == []


def test_home_is_found_behind_a_kind(given, journal, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_data(READING, Path("coco:~/a.json,~/images"), journal).path.count(str(tmp_path)) == 2


def test_a_task_without_reader_takes_none(journal):
    with pytest.raises(UserError, match="takes no --data"):
        own_data(TASK, Path("coco:a.json"), journal)
