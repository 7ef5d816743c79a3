"""Rubrics: what is asked of an answer, and for how many points; from a file, from text, or written by a model."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from counterproof.errors import UserError
from counterproof.files import replacing
from counterproof.judging.asking import ask_judge
from counterproof.judging.templates import PromptTemplate

if TYPE_CHECKING:
    from counterproof.language.conversation import Chat

__all__ = ["Criterion", "QuestionNotes", "Rubric", "read_notes", "write_notes"]

LINE = re.compile(r"^\s*(?:[-*•]\s+)?\[?(\d+(?:[.,]\d+)?)\]?\s*(?:points?|pts?\.?|marks?)?\s*\|\s*(.+?)\s*$", re.I)
CLOSE = 1e-6  # points; sums closer than this are equal


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """One thing that is asked, and the points it earns, more than 0."""

    name: str
    points: float

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("a criterion has no text; say what it asks for")
        if not (math.isfinite(self.points) and self.points > 0):
            raise UserError(f"criterion {self.name!r:.60} has {self.points:g} points; expected more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    """Criteria whose points add up to the maximum.

    Attributes:
        criteria: at least one.
        max_points: the most an answer can earn.
        generated: what it was made from, when a model wrote it: a hash of model, question, answer and maximum.
        repair: what was done to a model's points so that they add up; empty when nothing was.

    Raises:
        UserError: no criterion, or points that do not add up to `max_points`.
    """

    criteria: tuple[Criterion, ...]
    max_points: float
    generated: str = ""
    repair: str = ""

    def __post_init__(self) -> None:
        if not self.criteria:
            raise UserError("the rubric has no criterion; give at least one")
        total = math.fsum(one.points for one in self.criteria)
        if abs(total - self.max_points) > CLOSE:
            raise UserError(
                f"the points of the rubric's {len(self.criteria)} criteria add up to {total:g}, and its maximum is "
                f"{self.max_points:g}; change one of them"
            )

    @classmethod
    def of(cls, criteria: Mapping[str, float]) -> "Rubric":
        """From names and points, as in ``Rubric.of({"names gravity": 2, "says why": 1})``."""
        listed = tuple(Criterion(name=name, points=float(points)) for name, points in criteria.items())
        return cls(criteria=listed, max_points=math.fsum(one.points for one in listed))

    @classmethod
    def from_text(cls, text: str, max_points: float | None = None) -> "Rubric":
        """From lines ``points | criterion``; without `max_points` it is their sum.

        Raises:
            UserError: a line of another form, and what the class raises.
        """
        criteria = []
        for line in text.replace("\r", "\n").splitlines():
            if not line.strip():
                continue
            match = LINE.match(line)
            if match is None:
                raise UserError(f"the rubric's line {line.strip()!r:.60} is not of the form: points | criterion")
            criteria.append(Criterion(name=match[2], points=float(match[1].replace(",", "."))))
        total = math.fsum(one.points for one in criteria)
        return cls(criteria=tuple(criteria), max_points=total if max_points is None else max_points)

    @classmethod
    def generate(
        cls,
        model: "Chat | Any",
        question: str,
        instructor_answer: str,
        max_points: float,
        *,
        template: str | Path | None = None,
    ) -> "Rubric":
        """Have a model write a rubric from a question and the instructor's answer, before any student's is seen.

        The points that it gives are kept as proportions: should they not add up to the maximum, they are scaled and
        rounded to whole points (half points for a maximum like 2.5) by largest remainder, and `repair` says so.

        Args:
            model: a `Chat`, or what `counterproof.language.chat` takes.
            question, instructor_answer: texts.
            max_points: what the points have to add up to; a multiple of 0.5.
            template: a prompt file in place of ``prompts/grade-rubric.txt``.

        Raises:
            UserError: a reply, and a second one, that holds no rubric; no reply; a maximum that is no multiple of 0.5.
        """
        from counterproof.language.conversation import Chat, chat

        judge = model if isinstance(model, Chat) else chat(model)
        found = written(judge, [(question, instructor_answer, max_points)], template=template)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def text(self) -> str:
        """Numbered lines, as a prompt shows them."""
        return "\n".join(
            f"Criterion {number} (0 to {one.points:g} points): {one.name}"
            for number, one in enumerate(self.criteria, 1)
        )

    def lines(self) -> str:
        """Lines that `from_text` reads."""
        return "\n".join(f"{one.points:g} | {one.name}" for one in self.criteria)


def written(
    judge: "Chat",
    wanted: Sequence[tuple[str, str, float]],
    *,
    template: str | Path | None = None,
    marks: Sequence[str] | None = None,
    **settings: Any,
) -> "list[Rubric | UserError]":
    """A rubric for each (question, instructor's answer, maximum), one call each, or why there is none.

    Args:
        marks: what each is said to be `generated` from.
        settings: see `ask_judge`.
    """
    prompt = PromptTemplate.read(template or "grade-rubric", needed=("question", "instructor_answer", "max_points"))
    asked = []
    for question, answer, maximum in wanted:
        if not (maximum > 0 and abs(2 * maximum - round(2 * maximum)) < CLOSE):
            raise UserError(f"a rubric for {maximum:g} points cannot be written; expected a multiple of 0.5 above 0")
        asked.append(prompt.messages(question=question, instructor_answer=answer, max_points=f"{maximum:g}"))
    answers = ask_judge(judge, asked, proposed, reminder=prompt.reminder, **{"max_tokens": 512, **settings})
    found: list[Rubric | UserError] = []
    for index, (reply, (question, _, maximum)) in enumerate(zip(answers, wanted, strict=True)):
        if reply.value is None:
            why = reply.problem or f"twice no lines of the form points | criterion, at last {reply.replies[-1]!r:.80}"
            found.append(UserError(f"no rubric could be had for the question {question!r:.60}: {why}"))
            continue
        criteria, repair = add_up(reply.value, maximum)
        mark = marks[index] if marks is not None else "a model"
        found.append(Rubric(criteria=criteria, max_points=maximum, generated=mark, repair=repair))
    return found


def proposed(reply: str) -> tuple[Criterion, ...] | None:
    """The criteria in a model's reply; None when a line that looks like one cannot be read, or there is none."""
    criteria = []
    for line in reply.splitlines():
        if "|" not in line:
            continue
        match = LINE.match(line)
        if match is None or not float(match[1].replace(",", ".")) > 0:
            return None
        criteria.append(Criterion(name=match[2], points=float(match[1].replace(",", "."))))
    return tuple(criteria) or None


def add_up(criteria: Sequence[Criterion], maximum: float) -> tuple[tuple[Criterion, ...], str]:
    """Points that add up to the maximum, in the proportions given, by largest remainder; and what was done.

    The unit is a whole point where the maximum is whole, else half a point. A criterion left with nothing is dropped.
    Of equal remainders the earlier criterion's is the larger.
    """
    total = math.fsum(one.points for one in criteria)
    if abs(total - maximum) <= CLOSE:
        return tuple(criteria), ""
    unit = 1.0 if abs(maximum - round(maximum)) < CLOSE else 0.5
    quotas = [one.points / total * maximum / unit for one in criteria]
    shares = [math.floor(quota + CLOSE) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (round(shares[i] - quotas[i], 9), i))
    for index in order[: round(maximum / unit) - sum(shares)]:
        shares[index] += 1
    kept = tuple(replace(one, points=share * unit) for one, share in zip(criteria, shares, strict=True) if share)
    repair = f"the model's points added up to {total:g}, scaled to {maximum:g} by largest remainder"
    dropped = len(criteria) - len(kept)
    return kept, repair + (
        f", {dropped} of {len(criteria)} criteria left without points and dropped" if dropped else ""
    )


# files


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionNotes:
    """What an instructor says of a question; what is not said is None."""

    question: str | None = None
    max_points: float | None = None
    answer: str | None = None
    rubric: Rubric | None = None


class _Block(dict[str, Any]):
    """A YAML mapping that knows its line."""

    line = 0


class _Loader(yaml.SafeLoader):
    """YAML with keys as they are written (question 1.10 is not 1.1), each once, and lines."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> _Block:
    block = _Block()
    block.line = node.start_mark.line + 1
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is no plain text", key.start_mark)
        if key.value in block:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        block[key.value] = loader.construct_object(value, deep=True)
    return block


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_notes(path: str | Path) -> dict[str | None, QuestionNotes]:
    """Rubrics, answers and maxima by question, from YAML; under None what holds for every other question.

    ::

        questions:                  # or, for one question or all of them, the inner part alone
          q1:
            question: Why is the sky blue?   # every line but criteria is optional
            answer: Air scatters blue light more than red light.
            max_points: 3
            criteria:
              - {criterion: names scattering, points: 2}
              - {criterion: says that it depends on the wavelength, points: 1}

    Text in place of the inner part is the instructor's answer.

    Raises:
        UserError: naming file and line: no YAML, an unknown or doubled key, points that do not add up.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as stream:
            content = yaml.load(stream, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}") from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where}: not YAML that can be read: {getattr(problem, 'problem', problem)}") from None
    if not isinstance(content, _Block):
        raise UserError(f"{path} holds no mapping; begin with questions:, or with criteria:")
    if "questions" not in content:
        if set(content) & {"criteria", "answer", "question", "max_points"}:
            return {None: _notes(content, path)}
        return {key: _notes(value, path, key) for key, value in content.items()}
    if extra_keys := sorted(set(content) - {"questions"}):
        raise UserError(f"{path}: {extra_keys[0]!r} stands beside questions:; move it into a question")
    questions = content["questions"]
    if not isinstance(questions, _Block) or not questions:
        raise UserError(f"{path}: questions: holds no question; expected a mapping of question_id to its notes")
    return {key: _notes(value, path, key) for key, value in questions.items()}


def _notes(block: Any, path: Path, key: str | None = None) -> QuestionNotes:
    named = "" if key is None else f" question {key!r}:"
    if isinstance(block, str):
        return QuestionNotes(answer=block)
    if not isinstance(block, _Block):
        raise UserError(f"{path}:{named} expected question, answer, max_points and criteria, not {block!r:.60}")
    where = f"{path}:{block.line}:{named}"
    known = ("question", "answer", "max_points", "criteria", "generated", "repair")
    for one in block:
        if one not in known:
            raise UserError(f"{where} unknown key {one!r}; known: {', '.join(known[:4])}")
    maximum = None if block.get("max_points") is None else _number(block["max_points"], f"{where} max_points")
    for one in ("question", "answer", "generated", "repair"):
        if block.get(one) is not None and not isinstance(block[one], str):
            raise UserError(f"{where} {one} is {block[one]!r:.60}; expected text (put it in quotes)")
    rubric = None
    if block.get("criteria") is not None:
        listed = block["criteria"]
        if not isinstance(listed, list):
            raise UserError(f"{where} criteria is {listed!r:.60}; expected a list of criterion and points")
        criteria = []
        for number, one in enumerate(listed, 1):
            at = f"{path}:{getattr(one, 'line', block.line)}:{named} criterion {number}"
            if not isinstance(one, _Block) or set(one) != {"criterion", "points"}:
                raise UserError(f"{at} is {one!r:.80}; expected its text under criterion: and its points under points:")
            try:
                criteria.append(Criterion(name=str(one["criterion"]), points=_number(one["points"], f"{at}: points")))
            except UserError as problem:
                raise problem if str(problem).startswith(at) else UserError(f"{at}: {problem}") from None
        total = math.fsum(one.points for one in criteria)
        try:
            rubric = Rubric(
                criteria=tuple(criteria),
                max_points=total if maximum is None else maximum,
                generated=block.get("generated") or "",
                repair=block.get("repair") or "",
            )
        except UserError as problem:
            raise UserError(f"{where} {problem}") from None
        maximum = rubric.max_points
    return QuestionNotes(question=block.get("question"), max_points=maximum, answer=block.get("answer"), rubric=rubric)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where} is {value!r:.40}; expected a number above 0")
    return float(value)


def write_notes(path: str | Path, notes: Mapping[str, QuestionNotes]) -> None:
    """Write what `read_notes` reads; for rubrics that a model wrote, to be looked at, edited and kept."""
    found: dict[str, Any] = {}
    for key, one in notes.items():
        entry: dict[str, Any] = {}
        for name in ("question", "answer", "max_points"):
            if getattr(one, name) is not None:
                entry[name] = _plain(getattr(one, name))
        if one.rubric is not None:
            entry["criteria"] = [{"criterion": c.name, "points": _plain(c.points)} for c in one.rubric.criteria]
            if one.rubric.generated:
                entry["generated"] = one.rubric.generated
            if one.rubric.repair:
                entry["repair"] = one.rubric.repair
        found[key] = entry
    with replacing(Path(path)) as stream:
        yaml.safe_dump({"questions": found}, stream, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def mark_of(*parts: Any) -> str:
    """A short hash of what something was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
