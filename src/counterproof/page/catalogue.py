"""The papers on the page: their cards, read from Markdown files beside the methods, without importing any method.

A card is ``PACKAGE/SLUG.md`` (hyphens as underscores) with YAML front matter and fixed sections. Counterproof's own
packages are its rooms; a third party's are named by entry points of the group ``counterproof.papers``, whose value is
the package that holds the cards.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from counterproof.bench.task import Arm, Claim, Task, resolve
from counterproof.errors import MissingExtra, UserError

__all__ = [
    "ROOMS",
    "CardError",
    "Paper",
    "arms_of",
    "comparison_claims",
    "find_paper",
    "find_task",
    "papers",
    "read_card",
    "summary_of",
    "tasks",
]

ROOMS: Mapping[str, str] = MappingProxyType(
    {
        "detection": "finding objects in pictures",
        "generation": "making pictures",
        "representation": "what networks learn, and how it is aligned, distilled or adapted",
        "video": "moments, frames and exposure over time",
        "preference": "aligning language models with preferences",
        "rewards": "learning, combining and using reward functions",
        "safety": "keeping models harmless, controllable and honest",
        "judging": "who is better: judges, arenas, grades",
        "reasoning": "search and learning for reasoning",
        "recommendation": "what to show next",
        "incentives": "mechanisms, agents, fairness",
        "classroom": "teaching people and machines",
        "page": "the page itself: history and credit",
    }
)
GROUP = "counterproof.papers"
SECTIONS = {
    "planned": ("Idea", "What the paper reports", "How it is used here", "Limits", "Sources"),
    "runs": (
        "Idea",
        "What the paper reports",
        "How it is used here",
        "What was measured here",
        "Deviations",
        "Limits",
        "Sources",
    ),
}
REQUIRED: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {"slug": str, "title": str, "year": int, "room": str, "tags": list, "status": str, "summary": str}
)
OPTIONAL: Mapping[str, type] = MappingProxyType({"arxiv": str, "repository": str, "defaults": dict})
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CardError(UserError):
    """A card that does not follow the schema; names file, line and what was expected."""


@dataclass(frozen=True)
class Paper:
    """An entry of the page: what its card says, and where its code is.

    Attributes:
        slug, title, year, room, tags, summary: from the front matter.
        status: ``runs`` when method, claims and tests are here; ``planned`` until then.
        arxiv: id without version, or None.
        repository: owner/name of the official or reference code, or None.
        defaults: the paper's values by ``name.parameter``; the code's defaults are tested against them.
        sections: Markdown by heading, in order.
        package: the package that holds card, method and claims.
        path: the card.
    """

    slug: str
    title: str
    year: int
    room: str
    tags: tuple[str, ...]
    summary: str
    status: Literal["runs", "planned"]
    arxiv: str | None
    repository: str | None
    defaults: Mapping[str, Any]
    sections: Mapping[str, str]
    package: str
    path: Path

    @property
    def module(self) -> str:
        """What a user imports."""
        return f"{self.package}.{self.slug.replace('-', '_')}"

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's claims, the headline first; none while it is planned. Imports no method.

        Raises:
            UserError: when they cannot be imported, naming the module and what it lacks.
        """
        if self.status == "planned":
            return ()
        module = f"{self.package}.claims.{self.slug.replace('-', '_')}"
        try:
            return tuple(import_module(module).CLAIMS)
        except MissingExtra:
            raise
        except (ImportError, AttributeError) as problem:
            raise UserError(f"the claims of {self.slug} cannot be read from {module}: {problem}") from problem

    def as_json(self) -> dict[str, Any]:
        return {
            "slug": self.slug,
            "title": self.title,
            "year": self.year,
            "arxiv": self.arxiv,
            "room": self.room,
            "tags": list(self.tags),
            "status": self.status,
            "summary": self.summary,
            "repository": self.repository,
            "defaults": dict(self.defaults),
            "module": self.module if self.status == "runs" else None,
            "sections": dict(self.sections),
        }


def read_card(path: Path, package: str) -> Paper:
    """Read and check one card.

    Args:
        path: the Markdown file.
        package: the package it lies in.

    Raises:
        CardError: with file, line and what was expected.
    """
    text = path.read_text(encoding="utf-8")
    match = re.match(r"---\n(.*?\n)---\n(.*)\Z", text, re.DOTALL)
    if match is None:
        raise CardError(f"{path}:1: a card begins with front matter between two lines of '---'")
    try:
        front = yaml.load(match[1], Loader=Loader)
    except yaml.MarkedYAMLError as problem:
        line = 2 + (problem.problem_mark.line if problem.problem_mark else 0)
        raise CardError(f"{path}:{line}: not YAML: {problem.problem}") from None
    if not isinstance(front, dict):
        raise CardError(f"{path}:2: front matter is a mapping of {', '.join(REQUIRED)}")

    def wrong(key: str, expected: str) -> CardError:
        lines = text.splitlines()
        line = next((number for number, content in enumerate(lines, 1) if content.startswith(f"{key}:")), 1)
        return CardError(f"{path}:{line}: {key}: expected {expected}, not {front.get(key)!r}")

    for key, kind in REQUIRED.items():
        if not isinstance(front.get(key), kind):
            raise wrong(key, getattr(kind, "__name__", "a value"))
    for key, value in front.items():
        if key not in REQUIRED and key not in OPTIONAL:
            raise wrong(str(key), f"one of {', '.join([*REQUIRED, *OPTIONAL])} as the key")
        if key in OPTIONAL and not isinstance(value, OPTIONAL[key]):
            raise wrong(key, "a mapping" if OPTIONAL[key] is dict else "text in quotes")
    if front["slug"].replace("-", "_") != path.stem:
        raise wrong("slug", f"{path.stem.replace('_', '-')!r}, as the file is called")
    if front["room"] not in ROOMS:
        raise wrong("room", f"one of {', '.join(ROOMS)}")
    if front["status"] not in SECTIONS:
        raise wrong("status", "runs or planned")
    if not 1900 <= front["year"] <= 2100:
        raise wrong("year", "a year")
    if len(front["summary"]) > 160:
        raise wrong("summary", f"at most 160 characters ({len(front['summary'])} here)")
    if not 3 <= len(front["tags"]) <= 6 or not all(isinstance(tag, str) for tag in front["tags"]):
        raise wrong("tags", "3 to 6 words or phrases")
    if "arxiv" in front and not re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", front["arxiv"]):
        raise wrong("arxiv", "an arXiv id without version")
    headings = tuple(re.findall(r"^## (.+)$", match[2], re.MULTILINE))
    if headings != SECTIONS[front["status"]]:
        expected = ", ".join(SECTIONS[front["status"]])
        raise CardError(f"{path}: a card with status {front['status']} has the sections {expected}, in this order")
    bodies = re.split(r"^## .+$", match[2], flags=re.MULTILINE)[1:]
    for heading, body in zip(headings, bodies, strict=True):
        if not body.strip():
            raise CardError(f"{path}: the section {heading!r} is empty")
    return Paper(
        slug=front["slug"],
        title=front["title"],
        year=front["year"],
        room=front["room"],
        tags=tuple(front["tags"]),
        summary=front["summary"],
        status=front["status"],
        arxiv=front.get("arxiv"),
        repository=front.get("repository"),
        defaults=MappingProxyType(front.get("defaults", {})),
        sections=MappingProxyType(dict(zip(headings, (body.strip() for body in bodies), strict=True))),
        package=package,
        path=path,
    )


@cache
def papers() -> Mapping[str, Paper]:
    """Every paper on the page by slug: in the order of the rooms, then by slug; third parties' after our own.

    Raises:
        CardError: a card that does not follow the schema, or two papers with one slug.
    """
    found: dict[str, Paper] = {}
    for folder, package in _packages():
        for path in sorted(folder.glob("*.md")):
            paper = read_card(path, package)
            if paper.slug in found:
                raise CardError(f"{path}: the slug {paper.slug!r} is taken by {found[paper.slug].path}")
            found[paper.slug] = paper
    return MappingProxyType(found)


def _packages() -> Iterator[tuple[Path, str]]:
    here = Path(__file__).parents[1]
    for room in ROOMS:
        yield here / room, f"counterproof.{room}"
    for point in entry_points(group=GROUP):
        try:
            spec = find_spec(point.value)
        except ModuleNotFoundError:  # a parent is not there
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise CardError(
                f"the entry point {point.name} = {point.value!r} of {point.dist and point.dist.name} names no package; "
                f"the group {GROUP} wants the package that holds the cards"
            )
        yield Path(next(iter(spec.submodule_search_locations))), point.value


def nearest(word: str, known: Sequence[str]) -> str:
    """The known words most like one that is not known, as the tail of a message."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def find_paper(slug: str) -> Paper:
    """The paper of that slug.

    Raises:
        UserError: naming the nearest ones.
    """
    try:
        return papers()[slug]
    except KeyError:
        close = nearest(slug, list(papers()))
        raise UserError(f"no paper {slug!r}{close or '; counterproof papers lists them'}") from None


@cache
def tasks() -> Mapping[str, Task]:
    """Every task that a claim of a runnable paper uses, by name."""
    found: dict[str, Task] = {}
    for paper in papers().values():
        for claim in paper.claims:
            found.setdefault(claim.task.name, claim.task)
    return MappingProxyType(found)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: naming the nearest ones.
    """
    try:
        return tasks()[name]
    except KeyError:
        close = nearest(name, list(tasks()))
        raise UserError(f"no task {name!r}{close or '; known: ' + ', '.join(tasks())}") from None


def arms_of(task: Task) -> Mapping[str, Arm]:
    """The arms of a task by name: those that its module lists under ``ARMS``, then those that papers' claims bring."""
    claims = [claim for paper in papers().values() for claim in paper.claims if claim.task.name == task.name]
    listed = getattr(import_module(task.run.partition(":")[0]), "ARMS", {})
    found: dict[str, Arm] = {arm.name: arm for arm in listed.get(task.name, ())}
    for arm in [claim.baseline for claim in claims] + [claim.method for claim in claims]:
        found.setdefault(arm.name, arm)
    return MappingProxyType(found)


def summary_of(task: Task) -> Any:
    """What a task's module lists under ``SUMMARIES``: a function of all arms' trials; None when there is none."""
    listed = getattr(import_module(task.run.partition(":")[0]), "SUMMARIES", {})
    return resolve(listed[task.name]) if task.name in listed else None


def comparison_claims(task: Task, arms: Sequence[str], metric: str | None = None) -> list[Claim]:
    """What a comparison of a task's arms asks: each of the others against the first, on one metric.

    The effect is a ratio or a difference as in the papers' claims on that metric.

    Raises:
        UserError: an unknown arm or metric, naming the nearest ones; fewer than two arms, or one twice.
    """
    known = arms_of(task)
    for name in arms:
        if name not in known:
            close = nearest(name, list(known))
            raise UserError(f"task {task.name} has no arm {name!r}{close or '; it has: ' + ', '.join(known)}")
    if len(arms) < 2 or len(set(arms)) < len(arms):
        raise UserError(f"a comparison takes two or more different arms, not {','.join(arms)}")
    metric = metric or next(iter(task.metrics))
    if metric not in task.metrics:
        close = nearest(metric, list(task.metrics))
        raise UserError(f"task {task.name} has no metric {metric!r}{close or '; it has: ' + ', '.join(task.metrics)}")
    alike = [c for p in papers().values() for c in p.claims if c.task.name == task.name and c.metric == metric]
    baseline = known[arms[0]]
    return [
        Claim(
            paper=task.name,
            name=f"{name}-against-{baseline.name}",
            says=f"{name} does better than {baseline.name} on {metric}",
            task=task,
            baseline=baseline,
            method=known[name],
            metric=metric,
            better=task.metrics[metric].better,
            effect=alike[0].effect if alike else "difference",
            settings=alike[0].settings if alike else {},
        )
        for name in arms[1:]
    ]
