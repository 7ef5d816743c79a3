"""What is graded: each question with its maximum, the instructor's answer and rubric, from wherever they stand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterproof.errors import UserError
from counterproof.judging.gradebook import Entry, Gradebook, read_answers
from counterproof.judging.rubrics import QuestionNotes, Rubric, read_notes

__all__ = ["Assignment", "assignments_of"]

CLOSE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A question as it is graded."""

    question: str
    max_points: float
    answer: str | None
    rubric: Rubric | None


def assignments_of(
    book: Gradebook,
    rubric: Rubric | Mapping[str, Rubric] | str | Path | None,
    answers: Mapping[str, str] | str | Path | None,
    *,
    prompt: str,
    whole: bool,
) -> dict[str, Assignment]:
    """What is known of each question from gradebook, rubrics and answers, which may not contradict each other.

    Args:
        prompt: the variant; what it needs has to be there.
        whole: maxima have to be whole points.

    Raises:
        UserError: what is missing or contradictory, naming the question and the remedy.
    """
    if prompt == "answer+generated-rubric" and isinstance(rubric, Rubric):
        raise UserError("a rubric was given, and the prompt asks for one that the model writes: answer+rubric uses it")
    sources: list[tuple[str, Mapping[str | None, QuestionNotes]]] = []
    if isinstance(rubric, str | Path):
        sources.append((str(rubric), read_notes(rubric)))
    elif isinstance(rubric, Rubric):
        sources.append(("the rubric", {None: QuestionNotes(rubric=rubric, max_points=rubric.max_points)}))
    elif rubric is not None:
        notes = {key: QuestionNotes(rubric=one, max_points=one.max_points) for key, one in rubric.items()}
        sources.append(("the rubrics", notes))  # type: ignore[arg-type]
    if isinstance(answers, str | Path):
        sources.append((str(answers), read_answers(answers)))
    elif answers is not None:
        sources.append(("the answers", {key: QuestionNotes(answer=text) for key, text in answers.items()}))
    found = {}
    for key, entries in book.by_question().items():
        where = f"{book.name}: question {key!r:.60}"

        def one_of(what: str, entries: list[Entry] = entries, key: str = key, where: str = where) -> Any:
            column = {"question": "question", "max_points": "max_points", "answer": "instructor_answer"}.get(what)
            told: list[tuple[str, Any]] = []
            if column is not None:
                told += [(book.name, value) for e in entries if (value := getattr(e, column)) not in ("", None)][:1]
            for name, notes in sources:
                value = getattr(notes.get(key, notes.get(None, QuestionNotes())), what)
                if value not in (None, ""):
                    told.append((name, value))
            for name, value in told[1:]:
                if value != told[0][1]:
                    raise UserError(
                        f"{where}: {what} is {told[0][1]!r:.60} in {told[0][0]} and {value!r:.60} in {name}; "
                        "make them equal, or leave one out"
                    )
            return told[0][1] if told else None

        maximum = one_of("max_points")
        own = one_of("rubric")
        written_down = next((entry for entry in entries if entry.rubric), None)
        if own is None and written_down is not None:
            try:
                own = Rubric.from_text(written_down.rubric, maximum)
            except UserError as problem:
                raise UserError(f"{book.name}: row {written_down.row}: {problem}") from None
            maximum = own.max_points
        if maximum is None:
            raise UserError(f"{where} has no max_points; add the column, or a rubric")
        answer = one_of("answer")
        question = one_of("question") or (key if key != "1" else None)
        if question is None and prompt == "question":
            raise UserError(f"{where} has no text; add a column question")
        if answer is None and prompt != "question":
            raise UserError(
                f"{where} has no instructor's answer, which the prompt {prompt} needs; add the column "
                "instructor_answer, or give a file of answers"
            )
        if own is None and prompt == "answer+rubric":
            raise UserError(f"{where} has no rubric, which the prompt answer+rubric needs; add it to the rubric file")
        if whole and abs(maximum - round(maximum)) > CLOSE:
            raise UserError(f"{where} has {maximum:g} points; mode expected needs a whole maximum")
        over = next((e for e in entries if e.instructor_grade is not None and e.instructor_grade > maximum), None)
        if over is not None:
            raise UserError(
                f"{book.name}: row {over.row}: instructor_grade is {over.instructor_grade:g}, and the question's "
                f"maximum is {maximum:g}"
            )
        found[key] = Assignment(
            question=question or "(see the instructor's answer)", max_points=maximum, answer=answer, rubric=own
        )
    return found
