"""What was measured: by the project itself, kept as exported trials, and on this machine, kept in the journal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from counterproof.bench.comparison import Comparison, from_records, survivors
from counterproof.bench.journal import read_record
from counterproof.bench.trials import Record
from counterproof.page.catalogue import Paper

__all__ = ["comparisons", "judged_together", "measured_by_us", "results_folder"]


def results_folder() -> Path:
    """Where the project's own trials lie: inside an installed package, or in the checkout it is run from."""
    package = Path(__file__).parents[1]
    installed = package / "results"
    return installed if installed.is_dir() else package.parents[1] / "results"


def _records(paper: Paper) -> Iterator[Record]:
    file = results_folder() / f"{paper.slug}.jsonl"
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield read_record(line, f"{file}:{number}")


def measured_by_us(paper: Paper, budget: str = "quick") -> list[Comparison]:
    """The paper's claims as the project measured them; only those that it did.

    Raises:
        UserError: a results file with a line that is not a trial.
    """
    return comparisons(paper, _records(paper), budget)


def comparisons(paper: Paper, records: Iterable[Record], budget: str) -> list[Comparison]:
    """The paper's claims as far as these trials settle them."""
    records = list(records)
    if not records:
        return []
    found = (from_records(claim, records, budget) for claim in paper.claims if budget in claim.task.budgets)
    return [comparison for comparison in found if comparison is not None]


def judged_together(found: Mapping[str, Sequence[Comparison]]) -> dict[str, list[Comparison]]:
    """Comparisons by slug, marked with whether their verdicts survive among all of them: see `survivors`."""
    marked = iter(survivors([comparison for several in found.values() for comparison in several]))
    return {slug: [next(marked) for _ in several] for slug, several in found.items()}
