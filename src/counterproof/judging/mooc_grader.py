"""Grade course answers with a language model: points and a reason for each criterion, and how far they can be trusted.

Paper: arXiv 2402.03776 (Golchin, Garuda, Impey, Wenger: Large Language Models As MOOCs Graders).
Read beside: the abstracts of arXiv 2406.11102 (later version, COLING 2025) and 2412.18719 (follow-up); no code or data
of the study was found.
Deviations: (1) the study's prompts, rubrics and temperature are not public: the wording is ours, and greedy; (2) a
fourth variant, ``question``, is a control that the paper does not have; (3) ``mode="expected"``, the mean of the
allowed scores under the model's probabilities, is for models too small to follow a format; (4) beside the paper's test
of means stand errors of single students, intervals over questions, and a test of equivalence.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from counterproof.errors import UserError, extra
from counterproof.judging.asking import Answer, ask_judge
from counterproof.judging.assignments import Assignment, assignments_of
from counterproof.judging.grade_agreement import AgreementReport, Consistency, compare_graders, consistency
from counterproof.judging.gradebook import Columns, Entry, Gradebook, read_gradebook, write_gradebook
from counterproof.judging.rubrics import QuestionNotes, Rubric, mark_of, read_notes, write_notes, written
from counterproof.judging.score_reading import CriterionGrade, Reading, read_criteria, read_graded
from counterproof.judging.templates import PLACEHOLDER, PromptTemplate
from counterproof.language.conversation import Chat, Usage, chat, fingerprint

with extra("judging"):
    from counterproof.judging.score_probabilities import ScoreStore, labels_of, score_labels
    from counterproof.judging.word_overlap import tfidf_cosine
    from counterproof.language.models import Language, load
    from counterproof.language.sampling import encode
    from counterproof.language.scoring import causal_model

__all__ = ["Grade", "GradeTable", "Grader", "agreement_report"]

Variant = Literal["question", "answer", "answer+rubric", "answer+generated-rubric"]
Mode = Literal["generate", "expected"]
Progress: TypeAlias = Callable[[str, int, int], None]

CLOSE = 1e-6

# What chat templates use to end a turn; in a student's text it would end the prompt.
CONTROL = re.compile(
    r"<\|[^<>|\n]{0,40}\|>|<\uff5c[^<>\n]{0,40}\uff5c>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
)

# grades


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """What became of one answer.

    Attributes:
        points: None unless graded.
        outcome: ``"graded"``; ``"empty"`` (0 points by rule, the model was not asked); ``"unparsed"``: the judge
            answered twice, and not in the form asked for; ``"failed"``: no reply, such as for an answer longer than the
            model's context. The last two are never given points; asked again later, a failed one may be graded.
        per_criterion: empty without a rubric, and in mode expected. Over repeats: mean points, the first reasons.
        reason: the judge's words, or why there are none.
        flags: what a person should look at.
        prompt_hash: of the messages and, in mode expected, the scores asked for; 16 hexadecimal digits.
        repeats: the points of each repeat, None where it could not be read; points are the mean of the others.
        replies: the judge's words, the last repeat's last.
    """

    points: float | None
    outcome: Literal["graded", "empty", "unparsed", "failed"]
    per_criterion: tuple[CriterionGrade, ...] = ()
    reason: str = ""
    flags: tuple[str, ...] = ()
    prompt_hash: str = ""
    repeats: tuple[float | None, ...] = ()
    replies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GradeTable:
    """A gradebook and its grades, in the gradebook's order.

    Attributes:
        gradebook: what was graded.
        grades: one for each entry.
        model, prompt: what graded, and by which variant.
        assignments: question, maximum, answer and rubric by question.
    """

    gradebook: Gradebook
    grades: tuple[Grade, ...]
    model: str
    prompt: str
    assignments: Mapping[str, Assignment]

    @property
    def points(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """(n,), float64: the grades; nan where there is none."""
        return np.array([np.nan if one.points is None else one.points for one in self.grades])

    @property
    def ungraded(self) -> list[tuple[Entry, Grade]]:
        """The entries without a grade."""
        return [(e, g) for e, g in zip(self.gradebook.entries, self.grades, strict=True) if g.points is None]

    def rows(self) -> list[dict[str, Any]]:
        """The gradebook's columns, then grade, outcome, per_criterion (JSON), reason, flags, model, prompt, hash."""
        rows = []
        for entry, grade in zip(self.gradebook.entries, self.grades, strict=True):
            row: dict[str, Any] = dict(entry.fields)
            for name in ("question_id", "student_id"):
                row.setdefault(name, getattr(entry, name))
            if row.get("max_points") in (None, ""):
                row["max_points"] = self.assignments[entry.question_id].max_points
            row["grade"] = grade.points
            if len(grade.repeats) > 1:
                read = [one for one in grade.repeats if one is not None]
                row |= {f"grade_{number}": one for number, one in enumerate(grade.repeats, 1)}
                row["grade_sd"] = statistics.stdev(read) if len(read) > 1 else None
            row["outcome"] = grade.outcome
            row["per_criterion"] = json.dumps(
                [
                    {"criterion": one.criterion, "points": one.points, "of": one.most, "reason": one.reason}
                    for one in grade.per_criterion
                ],
                ensure_ascii=False,
            )
            row |= {"reason": grade.reason, "flags": "; ".join(grade.flags), "model": self.model}
            row |= {"prompt": self.prompt, "prompt_hash": grade.prompt_hash}
            rows.append(row)
        return rows

    def write(self, path: str | Path) -> None:
        """As CSV, XLSX or JSONL; see `write_gradebook`."""
        write_gradebook(path, self.rows())

    def consistency(self) -> Consistency:
        """Agreement of the repeats with each other.

        Raises:
            UserError: fewer than 2 repeats, or no answer with a grade in each.
        """
        rows = [[np.nan if one is None else one for one in grade.repeats] for grade in self.grades if grade.repeats]
        return consistency(np.array(rows, np.float64).reshape(len(rows), -1))


def _only(template: PromptTemplate, values: Mapping[str, str | None]) -> PromptTemplate:
    """A template without the paragraphs that have a place for what there is no value for."""

    def kept(text: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text)
        return "\n\n".join(p for p in paragraphs if all(values[n] is not None for n in PLACEHOLDER.findall(p)))

    return replace(template, user=kept(template.user), system=kept(template.system))


class Grader:
    """A language model as a grader of short answers and essays.

    Args:
        model: what `counterproof.language.load` takes, a `Language`, the address of an OpenAI-compatible endpoint, or a
            `Chat`.
        endpoint_model: which of an endpoint's models.
        prompt: what the prompt carries beside the question. ``"answer"``: the instructor's correct answer;
            ``"answer+rubric"``: and the instructor's rubric; ``"answer+generated-rubric"``: and one that the model
            wrote from question and answer, once for each question, before it saw any student's;
            ``"question"``: nothing.
        mode: ``"generate"``: the model writes its reasons, then points. ``"expected"``: the mean of the whole scores 0,
            1, ..., max under the model's probabilities of each as its reply, normalised over these; no reasons,
            deterministic, one pass; needs a model that runs here and a whole maximum.
        template: a prompt file in place of ``prompts/grade-generate.txt`` or ``grade-expected.txt``, which say what
            places there are.
        temperature: 0 is greedy.
        max_tokens: the longest reply.
        jobs: see `Chat.ask_all`.
        empty: grade an empty answer ``"zero"`` by rule, or leave it ``"ungraded"``; the model is never asked.
        send_ids: name the student in the prompt. Otherwise the student_id, where it has at least 5 characters, is also
            blotted out of the answer.
        cache: a folder for the replies; default: beside the file that a table is written to.
        options: for `chat`: api_key, price, timeout, retries, seed.

    Raises:
        UserError: mode expected with an endpoint; what `chat`, `load` and the prompt file raise.
        ValueError: another value out of its range.
    """

    def __init__(
        self,
        model: "Chat | Language | str | Path | None" = None,
        *,
        endpoint_model: str | None = None,
        prompt: Variant = "answer+rubric",
        mode: Mode = "generate",
        template: str | Path | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        jobs: int = 8,
        empty: Literal["zero", "ungraded"] = "zero",
        send_ids: bool = False,
        cache: str | Path | None = None,
        **options: Any,
    ) -> None:
        if prompt not in get_args(Variant):
            raise ValueError(f"prompt {prompt!r} is not one of {', '.join(get_args(Variant))}")
        if mode not in get_args(Mode) or empty not in ("zero", "ungraded"):
            raise ValueError(f"mode {mode!r}, empty {empty!r}; expected generate or expected, and zero or ungraded")
        self._endpoint = isinstance(model, str) and model.startswith(("http://", "https://"))
        if mode == "expected" and (self._endpoint or isinstance(model, Chat)):
            raise UserError(
                "mode expected needs the probabilities of every score, which only a model that runs here gives; name a "
                "folder, a GGUF file or smollm2, or use mode generate"
            )
        self.prompt, self.mode, self.empty, self.send_ids = prompt, mode, empty, send_ids
        self.temperature, self.max_tokens, self.jobs = temperature, max_tokens, jobs
        self.cache = None if cache is None else Path(cache)
        self._template = PromptTemplate.read(
            template or f"grade-{mode}",
            needed=("question", "student_answer", *(("format",) if mode == "generate" else ())),
            allowed=("max_points", "instructor_answer", "rubric", "student_id"),
        )
        self._options = {**options, "model": endpoint_model} if self._endpoint else options
        if endpoint_model is not None and not self._endpoint:
            raise UserError(
                f"endpoint_model={endpoint_model!r} names a model of an endpoint; give its address as model"
            )
        self._target: Any = model
        self._given = model if isinstance(model, Chat) else None
        if not self._endpoint and self._given is None and not isinstance(model, Language):
            self._target = load(model)  # type: ignore[arg-type]
        if self._endpoint:
            self.name = str(endpoint_model)
        elif self._given is not None:
            self.name = repr(model)
        else:
            self.name = type(model.model).__name__ if isinstance(model, Language) else str(model or "smollm2")
        self._chats: dict[Path | None, Chat] = {}
        self.model  # noqa: B018  (an endpoint without a model is refused here, not at the first answer)

    @property
    def model(self) -> Chat:
        """The chat that is asked."""
        return self._chat(self.cache)

    @property
    def usage(self) -> Usage:
        """What has been asked so far: calls, replies from disk, tokens; of mode expected nothing but rubrics."""
        chats = [self._given] if self._given is not None else list(self._chats.values())
        return Usage(
            calls=sum(one.usage.calls for one in chats),
            cached=sum(one.usage.cached for one in chats),
            prompt_tokens=sum(one.usage.prompt_tokens for one in chats),
            completion_tokens=sum(one.usage.completion_tokens for one in chats),
        )

    def _chat(self, cache: Path | None) -> Chat:
        if self._given is not None:
            return self._given
        if cache not in self._chats:
            self._chats[cache] = chat(self._target, cache=cache, **self._options)
        return self._chats[cache]

    def grade_table(
        self,
        source: "str | Path | Gradebook | Iterable[Mapping[str, Any]]",
        *,
        rubric: Rubric | Mapping[str, Rubric] | str | Path | None = None,
        answers: Mapping[str, str] | str | Path | None = None,
        columns: Columns = None,
        out: str | Path | None = None,
        resume: bool = True,
        repeats: int = 1,
        progress: Progress | None = None,
    ) -> GradeTable:
        """Grade every answer of a gradebook.

        What is asked of the model is kept in the folder ``OUT.replies`` (or the grader's `cache`) as it comes, prompts
        included: a run that was broken off goes on there, and what was graded is not asked again. Rubrics that the
        model writes are kept in ``OUT.rubrics.yaml``, where they can be read and edited before the next run.
        The grades do not depend on the order of the rows or on what was graded before.

        Args:
            source: see `read_gradebook`.
            rubric: for every question, by question_id, or a YAML file (`read_notes`), which may also hold questions,
                maxima and answers. Default: the gradebook's column.
            answers: the instructor's by question_id, or a file (`read_answers`). Default: the gradebook's column.
            columns: see `read_gradebook`.
            out: where the table is written, as CSV, XLSX or JSONL.
            resume: False refuses a folder of replies that is there already.
            repeats: gradings of each answer; more than one needs a temperature above 0, or an endpoint.
            progress: called with what is done, how many are, and how many there are.

        Raises:
            UserError: bad input, naming file and row; a question without what the prompt variant needs; an endpoint
                that does not answer at all. Single answers that get no grade are no error: see `Grade`.
        """
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; expected at least 1")
        if repeats > 1 and self.mode == "expected":
            raise UserError("mode expected is deterministic; repeats would all be equal")
        if repeats > 1 and self.temperature == 0 and not self._endpoint and self._given is None:
            raise UserError("greedy repeats of a model that runs here are all equal; give a temperature, such as 0.7")
        book = source if isinstance(source, Gradebook) else read_gradebook(source, columns=columns)
        assignments = assignments_of(book, rubric, answers, prompt=self.prompt, whole=self.mode == "expected")
        out = None if out is None else Path(out)
        if out is not None and out.suffix.lower() not in (".csv", ".xlsx", ".jsonl", ".ndjson"):
            raise UserError(f"{out}: a gradebook is written as .csv, .xlsx or .jsonl")
        if out is not None and not out.absolute().parent.is_dir():
            raise UserError(f"cannot write {out}: there is no folder {out.absolute().parent}; make it")
        folder = self.cache
        if folder is None and out is not None:
            folder = out.with_name(out.name + ".replies")
            if not resume and folder.exists():
                raise UserError(f"{folder} holds replies of an earlier run; remove it, name another file, or resume")
        say = progress or (lambda what, done, of: None)
        problems: dict[str, str] = {}
        if self.prompt == "answer+generated-rubric":
            assignments, problems = self._with_rubrics(assignments, folder, out, say)
        grades: dict[tuple[str, str], Grade] = {}
        total = len(book.entries)
        marks = self._expected_store(folder) if self.mode == "expected" else None
        for key, entries in book.by_question().items():
            assignment = assignments[key]
            watch = partial(say, "grading")
            if key in problems:
                found = [Grade(points=None, outcome="unparsed", reason=problems[key]) for _ in entries]
            else:
                found = self._question(entries, assignment, folder, repeats, marks, watch, len(grades), total)
            for entry, grade in zip(entries, found, strict=True):
                grades[entry.question_id, entry.student_id] = grade
            watch(len(grades), total)
        ordered = tuple(grades[entry.question_id, entry.student_id] for entry in book.entries)
        table = GradeTable(book, ordered, self.name, self.prompt, assignments)
        if out is not None:
            table.write(out)
        return table

    def messages(self, entry: Entry, assignment: Assignment) -> tuple[list[dict[str, str]], tuple[str, ...]]:
        """The prompt for an entry, as chat messages, and what was done to the student's text."""
        answer, flags = entry.answer, []
        if not self.send_ids and len(entry.student_id) >= 5 and not entry.student_id.startswith("row "):
            blotted = re.sub(rf"(?<!\w){re.escape(entry.student_id)}(?!\w)", "[student]", answer)
            if blotted != answer:
                answer = blotted
                flags.append("the student's id is blotted out")
        fenced, altered = self._fenced(answer)
        if altered:
            flags.append("the answer holds control tokens, which were broken up")
        uses_answer, uses_rubric = self.prompt != "question", "rubric" in self.prompt
        values = {
            "question": assignment.question,
            "max_points": f"{assignment.max_points:g}",
            "instructor_answer": assignment.answer if uses_answer else None,
            "rubric": assignment.rubric.text() if uses_rubric and assignment.rubric is not None else None,
            "student_id": entry.student_id if self.send_ids else None,
            "student_answer": fenced,
        }
        if self.mode == "generate":
            values["format"] = self._format(assignment)
        return _only(self._template, values).messages(**{k: v for k, v in values.items() if v is not None}), tuple(
            flags
        )

    def _fenced(self, answer: str) -> tuple[str, bool]:
        """The student's text between two marker lines, which it cannot close, and whether control tokens were in it."""
        plain = CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", answer)
        if isinstance(self._target, Language):
            for token in sorted(map(str, self._target.tokenizer.all_special_tokens), key=len, reverse=True):
                if len(token) > 1:
                    plain = plain.replace(token, f"{token[0]} {token[1:]}")
        code = ""
        if "student answer" in " ".join(plain.lower().split()):
            # It imitates the marker: the real one has a code that its author could not know.
            code = " " + hashlib.sha256(plain.encode("utf-8", "replace")).hexdigest()[:8]
        fence = f"----- student answer{code} -----\n{plain}\n----- end of student answer{code} -----"
        return fence, plain != answer

    def _format(self, assignment: Assignment) -> str:
        if "rubric" in self.prompt and assignment.rubric is not None:
            lines = "\n".join(
                f"Criterion {number}: <points>/{one.points:g} - <reason>"
                for number, one in enumerate(assignment.rubric.criteria, 1)
            )
            return (
                "End with one line for each criterion, with its points and a short reason that quotes the student's "
                f"words, in this form:\n{lines}"
            )
        return (
            "Give a short reason that quotes the student's words, and end with one line in this form:\n"
            f"Score: <points>/{assignment.max_points:g}"
        )

    def _with_rubrics(
        self, assignments: dict[str, Assignment], folder: Path | None, out: Path | None, say: Progress
    ) -> tuple[dict[str, Assignment], dict[str, str]]:
        """The assignments with rubrics that the model wrote, now or in an earlier run, and why some have none."""
        path = None if out is None else out.with_name(out.name + ".rubrics.yaml")
        kept = read_notes(path) if path is not None and path.exists() else {}
        text = PromptTemplate.read(
            "grade-rubric", needed=(), allowed=("question", "instructor_answer", "max_points")
        ).user
        marks = {k: mark_of(self.name, text, a.question, a.answer, a.max_points) for k, a in assignments.items()}
        rubrics: dict[str, Rubric] = {}
        for key in assignments:
            note = kept.get(key)
            if note is None or note.rubric is None:
                continue
            if note.rubric.generated != marks[key] or abs(note.rubric.max_points - assignments[key].max_points) > CLOSE:
                raise UserError(
                    f"{path} holds a rubric for question {key!r:.60} that was written by another model or for another "
                    "question, answer or maximum; remove that file, or name another one to write to"
                )
            rubrics[key] = note.rubric
        wanted = [key for key in assignments if key not in rubrics]
        found = written(
            self._chat(folder),
            [(assignments[k].question, assignments[k].answer or "", assignments[k].max_points) for k in wanted],
            marks=[marks[key] for key in wanted],
            jobs=self.jobs,
            progress=partial(say, "writing rubrics"),
        )
        problems = {}
        for key, one in zip(wanted, found, strict=True):
            if isinstance(one, UserError):
                problems[key] = str(one)
            else:
                rubrics[key] = one
        if path is not None and rubrics:
            known = {key: note for key, note in kept.items() if key is not None}
            for key, one in rubrics.items():
                known[key] = QuestionNotes(question=assignments[key].question, max_points=one.max_points, rubric=one)
            write_notes(path, known)
        return {key: replace(one, rubric=rubrics.get(key)) for key, one in assignments.items()}, problems

    def _question(
        self,
        entries: Sequence[Entry],
        assignment: Assignment,
        folder: Path | None,
        repeats: int,
        store: "ScoreStore | None",
        watch: Callable[[int, int], None],
        before: int,
        total: int,
    ) -> list[Grade]:
        """The grades of one question's entries."""
        found: dict[int, Grade] = {}
        asked: dict[str, tuple[list[dict[str, str]], tuple[str, ...]]] = {}
        keys: dict[int, str] = {}
        for place, entry in enumerate(entries):
            if not entry.answer:
                points = 0.0 if self.empty == "zero" else None
                found[place] = Grade(points=points, outcome="empty", reason="empty", repeats=(points,) * repeats)
                continue
            messages, flags = self.messages(entry, assignment)
            keys[place] = mark_of(self.mode, messages, assignment.max_points)
            asked[keys[place]] = (messages, flags)
        # In an order of their own, so that neither the order of rows nor equal answers change a batch.
        ordered = sorted(asked)
        prompts = [asked[key][0] for key in ordered]
        if self.mode == "expected":
            assert store is not None
            grades = self._expected(prompts, assignment, store, lambda done: watch(before + done, total))
        else:
            grades = self._generated(prompts, assignment, folder, repeats, lambda done: watch(before + done, total))
        by_key = dict(zip(ordered, grades, strict=True))
        for place, key in keys.items():
            found[place] = replace(by_key[key], prompt_hash=key, flags=(*by_key[key].flags, *asked[key][1]))
        return [found[place] for place in range(len(entries))]

    def _generated(
        self,
        prompts: Sequence[list[dict[str, str]]],
        assignment: Assignment,
        folder: Path | None,
        repeats: int,
        watch: Callable[[int], None],
    ) -> list[Grade]:
        if not prompts:
            return []
        rubric = assignment.rubric if "rubric" in self.prompt else None
        read: Callable[[str], Reading | None]
        if rubric is not None:
            read = partial(read_criteria, rubric=rubric)
        else:
            read = partial(read_graded, maximum=assignment.max_points)
        reminder = f"{self._template.reminder}\n{self._format(assignment)}"
        rounds: list[list[Answer[Reading]]] = []
        for sample in range(repeats):
            rounds.append(
                ask_judge(
                    self._chat(folder),
                    prompts,
                    read,
                    reminder=reminder,
                    sample=sample,
                    jobs=self.jobs,
                    progress=lambda done, of, sample=sample: watch((sample * of + done) // repeats),  # type: ignore[misc]
                    temperature=self.temperature,
                    max_tokens=self.max_tokens,
                )
            )
        return [self._merged([one[place] for one in rounds]) for place in range(len(prompts))]

    def _merged(self, answers: Sequence[Answer[Reading]]) -> Grade:
        """One grade from the repeats of one answer."""
        values = [one.value for one in answers]
        read = [one for one in values if one is not None]
        replies = tuple(reply for one in answers for reply in one.replies)
        points = tuple(None if one is None else one.points for one in values)
        if not read:
            failed = next((one for one in answers if one.outcome == "failed"), None)
            if failed is not None:
                why = re.sub(r"^question \d+", "the prompt with this answer", failed.problem)
                return Grade(points=None, outcome="failed", reason=why, repeats=points, replies=replies)
            why = "the judge's reply could not be read, twice"
            if any(one.cut for one in answers):
                why += f"; it was cut at {self.max_tokens} tokens: raise max_tokens"
            return Grade(points=None, outcome="unparsed", reason=why, repeats=points, replies=replies)
        flags = tuple(dict.fromkeys(flag for one in read for flag in one.flags))
        if len(read) < len(values):
            flags += (f"{len(values) - len(read)} of {len(values)} repeats gave no grade",)
        merged = tuple(
            replace(first, points=math.fsum(one.per_criterion[place].points for one in read) / len(read))
            for place, first in enumerate(read[0].per_criterion)
        )
        mean = math.fsum(one.points for one in read) / len(read)
        return Grade(
            points=mean,
            outcome="graded",
            per_criterion=merged,
            reason=read[0].reason,
            flags=flags,
            repeats=points,
            replies=replies,
        )

    # expected scores

    def _expected_store(self, folder: Path | None) -> "ScoreStore":
        return ScoreStore(None if folder is None else folder / "expected.jsonl", fingerprint(self._target))

    def _expected(
        self,
        prompts: Sequence[list[dict[str, str]]],
        assignment: Assignment,
        store: "ScoreStore",
        watch: Callable[[int], None],
    ) -> list[Grade]:
        maximum = round(assignment.max_points)
        language: Language = self._target
        context = getattr(causal_model(language.model).config.get_text_config(), "max_position_embeddings", None)
        labels = labels_of(language, maximum)
        room = max(map(len, labels))
        found: list[Grade | None] = [None] * len(prompts)
        fitting: list[tuple[int, tuple[int, ...]]] = []
        for place, messages in enumerate(prompts):
            try:
                ids = encode(language, messages, "the prompt with this answer")
                if context is not None and len(ids) + room > context:
                    raise UserError(
                        f"the prompt with this answer has {len(ids) + room} tokens, and the model's context is "
                        f"{context}; shorten it, or take a model with a longer context"
                    )
            except UserError as problem:
                found[place] = Grade(points=None, outcome="failed", reason=str(problem))
                continue
            fitting.append((place, ids))
        done = 0
        for run, logps in score_labels(language, [ids for _, ids in fitting], labels, store):
            for index, values in zip(run, logps, strict=True):
                shares = np.exp(values - values.max())
                shares /= shares.sum()
                best = int(shares.argmax())
                found[fitting[index][0]] = Grade(
                    # Batches may differ in the last bits.
                    points=round(float(shares @ np.arange(maximum + 1)), 4),
                    outcome="graded",
                    reason=f"expected score of 0 to {maximum}; likeliest {best} (probability {shares[best]:.2f})",
                )
            done += len(run)
            watch(done)
        return [replace(one, repeats=(one.points,)) for one in found if one is not None]


# agreement


def agreement_report(
    table: "GradeTable | str | Path | Iterable[Mapping[str, Any]]",
    *,
    truth: str = "instructor_grade",
    baselines: Sequence[str] = ("peer_median",),
    by: str = "question_id",
    grade: str = "grade",
    margin: float | None = None,
    rounds: int = 10_000,
    rng: int | np.random.Generator = 0,
) -> AgreementReport:
    """How close the grades are to the truth, beside baselines on the same answers.

    Args:
        table: graded answers, or a file or rows with the column `grade`.
        truth: the column of the instructor's grades; answers without one are left out and counted.
        baselines: columns of other grades, or ``"peer_median"`` (of each answer's peer grades); ``"constant"``: the
            median share of the maximum in the truth itself, for everyone; ``"tfidf"``: cosine of TF-IDF vectors of
            the answer and the instructor's answer, times the maximum; ``"length"``: words, for correlations only.
        by: what the bootstrap draws: ``"question_id"``, ``"student_id"`` or another column.
        grade: the column of the grades in question.
        margin: of equivalence in points; default a tenth of the mean maximum.
        rounds: bootstrap rounds, as many as the paper's.
        rng: seed or generator.

    Raises:
        UserError: a column that is not there, fewer than 2 clusters, or no answer with all grades.
    """
    if isinstance(table, GradeTable):
        rows, book = table.rows(), table.gradebook
        answers = {key: one.answer or "" for key, one in table.assignments.items()}
    else:
        book = read_gradebook(table)
        rows = [dict(one.fields) for one in book.entries]
        answers = {}
        for one in book.entries:
            answers[one.question_id] = answers.get(one.question_id) or one.instructor_answer
    entries = book.entries

    def column(name: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
        if name == "instructor_grade":
            return np.array([np.nan if e.instructor_grade is None else e.instructor_grade for e in entries])
        if any(name in entry.peer_grades for entry in entries):
            return np.array([entry.peer_grades.get(name, np.nan) for entry in entries])
        if name == "peer_median":
            if not any(entry.peer_grades for entry in entries):
                raise UserError(f"{book.name} has no column peer_grade_1, ...; leave peer_median out of the baselines")
            return book.peer_median()
        if not any(name in row for row in rows):
            raise UserError(f"{book.name} has no column {name!r}; it has: {', '.join(rows[0])}")
        values = []
        for entry, row in zip(entries, rows, strict=True):
            value = row.get(name)
            try:
                values.append(math.nan if value in (None, "") else float(value))
            except (TypeError, ValueError):
                raise UserError(
                    f"{book.name}: row {entry.row}: {name} is {value!r:.40}; expected a number, or blank"
                ) from None
        return np.array(values, np.float64)

    wanted = column(truth)
    maxima = np.array([_maximum(row, entry, book.name) for row, entry in zip(rows, entries, strict=True)])
    graders = {grade: column(grade)}
    for name in baselines:
        if name == "constant":
            graders[name] = float(np.nanmedian(wanted / maxima)) * maxima if np.isfinite(wanted).any() else wanted
        elif name == "length":
            graders[name] = np.array([float(len(entry.answer.split())) for entry in entries])
        elif name == "tfidf":
            graders[name] = (
                tfidf_cosine([answers[e.question_id] for e in entries], [e.answer for e in entries]) * maxima
            )
        else:
            graders[name] = column(name)
    keys = [entry.question_id for entry in entries]
    if by in ("question_id", "student_id"):
        clusters = [getattr(entry, by) for entry in entries]
    else:
        column_of = [row.get(by) for row in rows]
        if all(one is None for one in column_of):
            raise UserError(f"{book.name} has no column {by!r} to draw by")
        clusters = column_of
    return compare_graders(
        graders,
        wanted,
        question=keys,
        cluster=clusters,
        max_points=maxima,
        margin=margin,
        rounds=rounds,
        rng=rng,
        truth_name=truth,
        ranks_only=[name for name in graders if name == "length"],
    )


def _maximum(row: Mapping[str, Any], entry: Entry, name: str) -> float:
    value = entry.max_points if entry.max_points is not None else row.get("max_points")
    if value is None:
        raise UserError(f"{name}: row {entry.row} has no max_points; add the column")
    return float(value)
