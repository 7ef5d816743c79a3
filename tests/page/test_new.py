"""What `counterproof new` writes passes as it is."""

import subprocess
import sys
from dataclasses import replace

import pytest

from counterproof.errors import UserError
from counterproof.page import new
from counterproof.page.catalogue import papers, read_card
from counterproof.page.new import new_paper


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "src" / "mine" / "papers"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder.parent / "__init__.py").touch()
    return folder


def test_its_four_files_pass(package, tmp_path):
    written = new_paper("two-words", "rewards", package)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "src/mine/papers/two_words.md",
        "src/mine/papers/two_words.py",
        "src/mine/papers/claims/two_words.py",
        "tests/papers/test_two_words.py",
    ]
    assert read_card(written[0], "mine.papers").status == "runs"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "tests"],
        env={"PYTHONPATH": str(tmp_path / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stdout
    assert "5 passed" in ran.stdout
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W,B,UP", "--line-length", "120"]
    lint = subprocess.run([*ruff, tmp_path], capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


def test_a_planned_card_keeps_its_text_and_begins_to_run(package, monkeypatch):
    planned = next((paper for paper in papers().values() if paper.status == "planned"), None)
    if planned is None:
        pytest.skip("every paper runs")
    path = package / planned.path.name
    path.write_text(planned.path.read_text())
    moved = replace(planned, path=path)
    monkeypatch.setattr(new, "papers", lambda: {planned.slug: moved})
    new_paper(planned.slug, planned.room, package)
    card = read_card(path, "mine.papers")
    assert card.status == "runs"
    assert card.title == planned.title
    assert card.arxiv == planned.arxiv
    for heading in ("Idea", "What the paper reports", "Limits", "Sources"):
        assert card.sections[heading] == planned.sections[heading]
    assert card.sections["How it is used here"].startswith(planned.sections["How it is used here"])
    assert f"counterproof check {planned.slug}" in card.sections["How it is used here"]
    with pytest.raises(UserError, match="exists; nothing was written"):
        new_paper(planned.slug, planned.room, package)


def test_nothing_is_overwritten(package):
    new_paper("mine", "rewards", package)
    (package / "mine.py").write_text("my work")
    with pytest.raises(UserError, match="exists; nothing was written"):
        new_paper("mine", "rewards", package)
    assert (package / "mine.py").read_text() == "my work"


def test_the_third_partys_own_tests_pass_where_it_is_installed(plugin):
    ran = subprocess.run(
        [plugin.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], cwd=plugin.folder, capture_output=True
    )
    assert ran.returncode == 0, ran.stdout
