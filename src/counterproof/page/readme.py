"""The README's tables, made from cards and from the project's own trials: ``python -m counterproof.page.readme``."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from counterproof.bench.comparison import Comparison
from counterproof.errors import UserError
from counterproof.files import replacing
from counterproof.page.catalogue import ROOMS, Paper, papers
from counterproof.page.results import judged_together, measured_by_us
from counterproof.page.text import effect_text, interval_text, number

__all__ = ["renewed", "tables"]

BETWEEN = re.compile(r"(<!-- papers: made by `make readme` -->\n).*?(<!-- end of papers -->)", re.DOTALL)


def tables(shown: Sequence[Paper]) -> str:
    """Markdown: one table of measured claims, one of all papers by room."""
    lines = [
        "| claim | the paper reports | measured by us | verdict |",
        "|---|---|---|---|",
    ]
    for several in judged_together({paper.slug: measured_by_us(paper) for paper in shown}).values():
        lines += [_row(comparison) for comparison in several]
    lines += ["", "| room | papers (**bold** ones run) |", "|---|---|"]
    for room in ROOMS:
        inside = [paper for paper in shown if paper.room == room]
        links = [f"[{_name(paper)}]({_link(paper)})" for paper in inside]
        lines.append(f"| {room} | {', '.join(links)} |")
    return "\n".join(lines) + "\n"


def _row(comparison: Comparison) -> str:
    claim, found = comparison.claim, comparison.assessment
    seconds = comparison.as_json()["cpu_seconds"]
    cost = seconds["method"] / seconds["baseline"]  # a ratio: bare times of a shared machine say little
    mark = "" if comparison.survives in (None, True) else " (does not survive e-BH)"
    measured = (
        f"{claim.metric} {effect_text(claim, found.effect)} {interval_text(claim, found.interval)}, "
        f"e = {number(found.e_value)}, {found.seeds} {claim.task.sample}s, CPU time {number(cost, 2)}x the baseline's"
    )
    cells = [f"`{claim.paper}/{claim.name}`: {claim.says}", claim.reported, measured, f"**{found.verdict}**{mark}"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _name(paper: Paper) -> str:
    return f"**{paper.slug}**" if paper.status == "runs" else paper.slug


def _link(paper: Paper) -> str:
    return "src/" + paper.path.relative_to(Path(__file__).parents[2]).as_posix()


def renewed(text: str) -> str:
    """A README with its tables made anew.

    Raises:
        UserError: a text without the two marks between which they stand.
    """
    if not BETWEEN.search(text):
        raise UserError("the README lacks the marks <!-- papers: ... --> and <!-- end of papers -->")
    own = [paper for paper in papers().values() if paper.package.startswith("counterproof.")]
    return BETWEEN.sub(lambda match: match[1] + tables(own) + match[2], text)


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    new = renewed(readme.read_text(encoding="utf-8"))
    with replacing(readme) as stream:
        stream.write(new)
