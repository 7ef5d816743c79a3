"""A file is replaced whole or not at all, and what stands in the way is named with the remedy."""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from counterproof.errors import UserError
from counterproof.files import replacing


def write(text, path):
    with replacing(path) as stream:
        stream.write(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path):
    """A file that says "old", alone in its folder."""
    path = tmp_path / "file.txt"
    write("old", path)
    return path


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_mode_of_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        write("text", tmp_path / "file.txt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o640, 0o444, 0o755])
def test_a_file_that_is_there_keeps_its_mode(old, mode):
    old.chmod(mode)
    write("new", old)
    assert old.read_text() == "new"
    assert stat.S_IMODE(old.stat().st_mode) == mode
    assert names(old.parent) == ["file.txt"]


def test_text_is_utf_8_with_its_own_line_ends(old):
    write("é\r\n\ud800\n", old)
    assert old.read_bytes() == "é\r\n?\n".encode()


def test_a_path_without_a_folder_is_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("text", Path("file.txt"))
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_points_to_is_replaced_not_the_link(tmp_path, there):
    target = tmp_path / "public" / "index.html"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link = tmp_path / "page.html"
    link.symlink_to("public/index.html")
    write("text", link)
    assert link.is_symlink()
    assert target.read_text() == "text"
    assert names(target.parent) == ["index.html"]


@pytest.mark.parametrize("problem", [RuntimeError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "gone", "other")])
def test_what_goes_wrong_for_the_caller_is_told_as_it_is_and_leaves_the_old_file(old, problem):
    def half_a_file():
        with replacing(old) as stream:
            stream.write("half")
            stream.flush()
            raise problem

    with pytest.raises(type(problem)) as caught:
        half_a_file()
    assert caught.value is problem
    assert old.read_text() == "old"
    assert names(old.parent) == ["file.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("where", "step"), [(os, "fsync"), (Path, "chmod"), (Path, "replace")])
def test_a_write_that_breaks_off_leaves_the_old_file_whole(old, monkeypatch, where, step, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(where, step, full)
    with pytest.raises(UserError, match="the disk is full"):
        write("new", old)
    assert old.read_text() == "old"
    assert names(old.parent) == ["file.txt"]


def test_the_file_is_never_seen_half_written(old, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(old.read_text()))
    with replacing(old) as stream:
        for _ in range(10):
            stream.write("new" * 10_000)
            seen.append(old.read_text())
    assert seen == ["old"] * 11
    assert old.read_text() == "new" * 100_000


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing/file.txt", "there is no folder"),
        ("file/file.txt", "there is no folder"),
        ("folder", "is a folder; name a file in it"),
        ("pipe", "is not a regular file; name another file"),
        ("loop", "is not a regular file; name another file"),
        ("n" * 300, "File name too long; name another file"),
    ],
)
def test_what_cannot_be_a_file_is_named_with_the_remedy(tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    with pytest.raises(UserError) as caught:
        write("text", tmp_path / name)
    message = str(caught.value)
    assert says in message
    assert str(tmp_path / name) in message
    assert "\n" not in message
    assert names(tmp_path) == before


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of one megabyte: mount(options) -> folder."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = []

    def mount(options):
        command = ["mount", "-o", options, *(() if mounted else ("-t", "tmpfs", "tmpfs")), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
        if done is None or done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip() if done else 'not root'}")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [1_050_000, 20_000_000])
def test_a_full_disk(tmpfs, size):
    path = tmpfs("size=1m") / "file.txt"
    write("old", path)
    with pytest.raises(UserError, match=f"cannot write {path}: the disk is full.* free some space") as caught:
        write("x" * size, path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]


def test_a_read_only_file_system(tmpfs):
    path = tmpfs("size=1m") / "file.txt"
    write("old", path)
    tmpfs("remount,ro")
    with pytest.raises(UserError, match=f"cannot write {path}: the folder {path.parent} may not be written to; make"):
        write("new", path)
    assert path.read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(old):
    old.parent.chmod(0o500)
    try:
        with pytest.raises(UserError, match="may not be written to"):
            write("new", old)
    finally:
        old.parent.chmod(0o700)
    assert old.read_text() == "old"
