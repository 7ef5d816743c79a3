"""What the README, the cards and the results say agrees with the code."""

import re
import shlex
from pathlib import Path

import click
import pytest

from counterproof.cli import cli
from counterproof.page.catalogue import papers
from counterproof.page.readme import renewed
from counterproof.page.results import measured_by_us, results_folder

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md")]
RUNNING = [paper for paper in papers().values() if paper.status == "runs"]


def test_the_readme_is_made_from_cards_and_results():
    text = (ROOT / "README.md").read_text()
    assert renewed(text) == text, "run `make readme`"


@pytest.mark.parametrize("paper", RUNNING, ids=lambda paper: paper.slug)
def test_its_claims_were_measured_by_us(paper):
    measured = {comparison.claim.name: comparison for comparison in measured_by_us(paper)}
    assert list(measured) == [claim.name for claim in paper.claims], "run `make results`"
    for comparison in measured.values():
        assert comparison.assessment.seeds >= 4
        for record in comparison.records:
            assert record.host["processor"]
            assert record.versions["python"]


def test_results_are_of_papers_that_run():
    assert {path.stem for path in results_folder().glob("*.jsonl")} == {paper.slug for paper in RUNNING}


def test_the_changelog_names_every_paper_that_runs():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert all(f"`{paper.slug}`" in text for paper in RUNNING)


def commands():
    """Every command line that a document or card shows."""
    for path in [*DOCUMENTS, *(paper.path for paper in papers().values())]:
        text = path.read_text()
        shown = re.findall(r"`(?:\.venv/bin/)?counterproof ([^`\n]+)`", text)
        shown += re.findall(r"^\$ counterproof (.+)$", text, re.MULTILINE)
        for line in shown:
            yield pytest.param(line, id=f"{path.name}: {line}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_shown_is_one(line):
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    command = cli
    while isinstance(command, click.Group):
        if not words:
            return
        context = click.Context(command)
        name = words.pop(0)
        for choice in name.split("|"):
            assert choice in command.list_commands(context), f"no command {choice!r}"
        command = command.get_command(context, name.split("|")[0])
        if "|" in name:
            return
    if words:
        command.make_context(command.name, words)


def test_the_main_job_checks_claims_that_exist():
    (front,) = re.findall(r"^FRONT := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in front.split():
        slug, _, claim = name.partition("/")
        assert claim in [known.name for known in papers()[slug].claims]
