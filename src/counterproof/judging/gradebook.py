"""Gradebooks: answers to be graded, from CSV, XLSX or JSONL, and the same with grades, written back."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from counterproof.errors import UserError
from counterproof.files import replacing
from counterproof.judging.rubrics import QuestionNotes, read_notes

__all__ = ["Entry", "Gradebook", "read_answers", "read_gradebook", "write_gradebook"]

TEXTS = ("question_id", "question", "instructor_answer", "rubric", "student_id", "answer")
NUMBERS = ("max_points", "instructor_grade")
PEER = re.compile(r"peer_grade_\d+")
CANVAS_QUESTION = re.compile(r"(\d+):\s*(.*)", re.DOTALL)
MOODLE_RESPONSE = re.compile(r"Response (\d+)")
MOODLE_STUDENTS = ("ID number", "Username", "Email address")
LAYOUTS = ("canvas", "moodle")
DELIMITERS = ",;\t"

Columns: TypeAlias = str | Mapping[str, str] | None
Row: TypeAlias = tuple[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One student's answer to one question.

    Attributes:
        row: where it stands: line of a CSV or JSONL file, row of a sheet.
        question_id, student_id, answer: as read, blanks around them stripped; a missing question_id is the question's
            text, or ``"1"``; a missing student_id the row.
        question, instructor_answer, rubric: texts, ``""`` when the file has none. A rubric's lines are
            ``points | criterion``.
        max_points: None when the file has none.
        instructor_grade: None when there is none.
        peer_grades: those that are there, by column.
        fields: every column as it was read.
    """

    row: int
    question_id: str
    student_id: str
    answer: str
    question: str = ""
    instructor_answer: str = ""
    rubric: str = ""
    max_points: float | None = None
    instructor_grade: float | None = None
    peer_grades: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gradebook:
    """Entries in the file's order, and what the file is called in errors."""

    entries: tuple[Entry, ...]
    name: str = "the gradebook"

    def by_question(self) -> dict[str, list[Entry]]:
        """The entries of each question, questions in order of appearance."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.question_id, []).append(entry)
        return found

    def peer_median(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(n,), float64: the median of each entry's peer grades; nan without any."""
        return np.array(
            [np.median(list(one.peer_grades.values())) if one.peer_grades else np.nan for one in self.entries]
        )


def read_gradebook(source: str | Path | Iterable[Mapping[str, Any]], *, columns: Columns = None) -> Gradebook:
    """Read answers and what is known of them.

    Columns: ``answer``, and as far as they are there ``question_id, question, max_points, instructor_answer, rubric,
    student_id, instructor_grade, peer_grade_1, peer_grade_2, ...``. Others are kept.

    Args:
        source: a ``.csv`` file (UTF-8; comma, semicolon or tab), ``.xlsx`` (its first sheet; needs openpyxl),
            ``.jsonl`` (an object a line), or such rows.
        columns: the file's name for ours, such as ``{"answer": "Essay"}``; ``"canvas"`` for a quiz's student analysis
            or ``"moodle"`` for a quiz's responses, both with a row for each student: every question of it becomes an
            entry.

    Raises:
        UserError: naming file and row: a file that cannot be read, is empty, or lacks a column; a row with too many or
            too few fields; a number that is none, a grade outside 0 to max_points; a question with two texts, maxima,
            answers or rubrics; two answers of one student to one question.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        name, suffix = str(path), path.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            rows = _jsonl_rows(path)
        elif suffix in (".xlsx", ".xlsm"):
            rows = _xlsx_rows(path)
        elif suffix in (".csv", ".tsv", ".txt"):
            rows = _csv_rows(path)
        else:
            raise UserError(f"{path}: a gradebook is a .csv, .xlsx or .jsonl file")
    else:
        name, rows = "the gradebook", [(number, dict(one)) for number, one in enumerate(source, 1)]
    if not rows:
        raise UserError(f"{name} holds no row; expected a header and an answer in each row")
    if isinstance(columns, str):
        if columns not in LAYOUTS:
            raise UserError(f"columns {columns!r} is no layout; known: {', '.join(LAYOUTS)}, or a mapping of columns")
        rows = list((_canvas if columns == "canvas" else _moodle)(rows, name))
        columns = None
    entries = [_entry(line, fields, columns or {}, name) for line, fields in rows]
    _agree(entries, name)
    return Gradebook(tuple(entries), name)


def read_answers(path: str | Path) -> dict[str | None, QuestionNotes]:
    """Instructors' answers by question, from YAML (`read_notes`) or CSV.

    A CSV file has the columns ``question_id`` and ``instructor_answer`` (or ``answer``), and may have ``question`` and
    ``max_points``.

    Raises:
        UserError: see `read_gradebook` and `read_notes`.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_notes(path)
    rows = _csv_rows(path)
    if not rows or "question_id" not in rows[0][1]:
        raise UserError(f"{path}: expected rows with the columns question_id and instructor_answer")
    column = "instructor_answer" if "instructor_answer" in rows[0][1] else "answer"
    book = read_gradebook(path, columns={"answer": column})
    return {
        one.question_id: QuestionNotes(
            question=one.question or None, max_points=one.max_points, answer=one.answer or None
        )
        for one in book.entries
    }


def _entry(row: int, fields: dict[str, Any], columns: Mapping[str, str], name: str) -> Entry:
    for ours, theirs in columns.items():
        if ours not in (*TEXTS, *NUMBERS) and not PEER.fullmatch(ours):
            raise UserError(f"columns names {ours!r}; known: {', '.join((*TEXTS, *NUMBERS))}, peer_grade_1, ...")
        if theirs not in fields:
            raise UserError(f"{name}: no column {theirs!r} for {ours}; it has: {', '.join(map(str, fields))}")
    if columns.get("answer", "answer") not in fields:
        layouts = "".join(
            f"; it looks like an export of {one.title()}: give the columns as {one}"
            for one, pattern in (("canvas", CANVAS_QUESTION), ("moodle", MOODLE_RESPONSE))
            if any(pattern.fullmatch(str(column)) for column in fields)
        )
        raise UserError(
            f"{name}: row {row} has no column 'answer'; it has: {', '.join(map(str, fields))[:300]}"
            + (layouts or "; map one with answer=COLUMN")
        )

    def text(ours: str) -> str:
        value = fields.get(columns.get(ours, ours))
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # an id that a sheet keeps as a number
        return "" if value is None else str(value).strip()

    def number(ours: str) -> float | None:
        value = text(ours)
        if not value:
            return None
        try:
            found = float(value if "." in value else value.replace(",", "."))
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise UserError(
                f"{name}: row {row}: {columns.get(ours, ours)} is {value!r:.40}; expected a number, or blank"
            )
        return found

    peers = dict.fromkeys([one for one in (*columns, *map(str, fields)) if PEER.fullmatch(one)])
    maximum = number("max_points")
    if maximum is not None and maximum <= 0:
        raise UserError(f"{name}: row {row}: max_points is {maximum:g}; expected more than 0")
    grades = {one: number(one) for one in ("instructor_grade", *peers)}
    for one, grade in grades.items():
        if grade is not None and not 0 <= grade <= (math.inf if maximum is None else maximum):
            most = "" if maximum is None else f" to max_points, {maximum:g}"
            raise UserError(f"{name}: row {row}: {columns.get(one, one)} is {grade:g}; expected 0{most or ' or more'}")
    return Entry(
        row=row,
        question_id=text("question_id") or text("question") or "1",
        student_id=text("student_id") or f"row {row}",
        answer=text("answer"),
        question=text("question"),
        instructor_answer=text("instructor_answer"),
        rubric=text("rubric"),
        max_points=maximum,
        instructor_grade=grades["instructor_grade"],
        peer_grades={one: grade for one in peers if (grade := grades[one]) is not None},
        fields=fields,
    )


def _agree(entries: Sequence[Entry], name: str) -> None:
    said: dict[tuple[str, str], tuple[Any, int]] = {}
    seen: dict[tuple[str, str], int] = {}
    for entry in entries:
        for what in ("question", "max_points", "instructor_answer", "rubric"):
            value = getattr(entry, what)
            if value in ("", None):
                continue
            first, row = said.setdefault((entry.question_id, what), (value, entry.row))
            if value != first:
                raise UserError(
                    f"{name}: question {entry.question_id!r:.60} has two values of {what}, in rows {row} and "
                    f"{entry.row}; give different questions different question_ids"
                )
        row = seen.setdefault((entry.question_id, entry.student_id), entry.row)
        if row != entry.row:
            raise UserError(
                f"{name}: student {entry.student_id!r:.60} has two answers to question {entry.question_id!r:.60}, in "
                f"rows {row} and {entry.row}; keep one"
            )


# files


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 ({problem.reason}, byte {problem.start}); save it as UTF-8") from None
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None


def _csv_rows(path: Path) -> list[Row]:
    with _reading(path):
        text = path.read_bytes().decode("utf-8-sig")
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    limit = csv.field_size_limit(max(len(text), 131_072))  # an essay may be longer than what csv allows by itself
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows: list[Row] = []
        header: list[str] | None = None
        before = 0
        try:
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = _header([cell.strip() for cell in cells], str(path))
                elif len(cells) != len(header):
                    raise UserError(
                        f"{path}:{line}: {len(cells)} fields, and the header has {len(header)}; put text that holds "
                        f"{delimiter!r}, quotes or line breaks in quotes"
                    )
                else:
                    rows.append((line, dict(zip(header, cells, strict=True))))
        except csv.Error as problem:
            raise UserError(f"{path}:{before + 1}: no CSV that can be read: {problem}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _header(cells: list[str], name: str) -> list[str]:
    """Names of columns; Canvas repeats those that hold points, so a name that comes again is numbered."""
    counts: dict[str, int] = {}
    found = []
    for cell in cells:
        counts[cell] = counts.get(cell, 0) + 1
        if counts[cell] > 1 and cell in (*TEXTS, *NUMBERS):
            raise UserError(f"{name}: the column {cell!r} is there twice; rename one")
        found.append(cell if counts[cell] == 1 else f"{cell} ({counts[cell]})")
    return found


def _jsonl_rows(path: Path) -> list[Row]:
    rows: list[Row] = []
    with _reading(path), path.open(encoding="utf-8-sig") as stream:
        for line, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                one = json.loads(text)
            except ValueError as problem:
                raise UserError(f"{path}:{line}: not JSON: {problem}") from None
            if not isinstance(one, dict):
                raise UserError(f"{path}:{line}: expected an object with an answer, not {text.strip()!r:.60}")
            rows.append((line, one))
    return rows


def _openpyxl(path: Path) -> Any:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: XLSX files need openpyxl, which is not installed: pip install openpyxl, or use CSV"
        ) from None
    return openpyxl


def _xlsx_rows(path: Path) -> list[Row]:
    openpyxl = _openpyxl(path)
    with _reading(path):
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        except OSError:
            raise
        except Exception as problem:  # what openpyxl, zipfile and the XML parser raise on what is no sheet
            raise UserError(f"{path} is no XLSX file that can be read ({problem}); save it anew, or as CSV") from None
        try:
            found = [[cell.value for cell in row] for row in book.worksheets[0].iter_rows()]
        finally:
            book.close()
    rows: list[Row] = []
    header: list[str] | None = None
    for number, cells in enumerate(found, 1):
        if all(cell is None or not str(cell).strip() for cell in cells):
            continue
        if header is None:
            header = _header(["" if cell is None else str(cell).strip() for cell in cells], str(path))
            continue
        cells += [None] * (len(header) - len(cells))
        if any(cell is not None for cell in cells[len(header) :]):
            raise UserError(f"{path}: row {number} has more cells than the header has columns; name the columns")
        rows.append((number, {name: cell for name, cell in zip(header, cells, strict=False) if name}))
    return rows


def _canvas(rows: list[Row], name: str) -> Iterator[Row]:
    """A quiz's student analysis: ``ID: text`` with the response, followed by a column headed by the points possible."""
    header = list(rows[0][1])
    found = []
    for place, column in enumerate(header[:-1]):
        named = CANVAS_QUESTION.fullmatch(column)
        worth = re.fullmatch(r"(\d+(?:\.\d+)?)(?: \(\d+\))?", header[place + 1])
        if named and worth:
            found.append((column, named[1], named[2].strip(), worth[1]))
    if not found:
        raise UserError(f"{name}: no column like '12345: the question', followed by its points; is it Canvas's?")
    student = next((one for one in ("sis_id", "id", "name") if one in header), None)
    for line, fields in rows:
        for column, key, question, points in found:
            yield (
                line,
                {
                    "question_id": key,
                    "question": question,
                    "max_points": points,
                    "student_id": fields.get(student) if student else None,
                    "answer": fields[column],
                },
            )


def _moodle(rows: list[Row], name: str) -> Iterator[Row]:
    """A quiz's responses: ``Response N``, and where they were asked for ``Question N`` and ``Right answer N``."""
    header = list(rows[0][1])
    numbers = [match[1] for one in header if (match := MOODLE_RESPONSE.fullmatch(one))]
    if not numbers:
        raise UserError(f"{name}: no column like 'Response 1'; is it Moodle's report of responses?")
    student = next((one for one in MOODLE_STUDENTS if any(fields.get(one) for _, fields in rows)), None)
    for line, fields in rows:
        if student is not None and not str(fields.get(student) or "").strip():
            continue  # the line of averages below the students
        for number in numbers:
            answer = str(fields[f"Response {number}"] or "").strip()
            yield (
                line,
                {
                    "question_id": number,
                    "question": fields.get(f"Question {number}"),
                    "instructor_answer": fields.get(f"Right answer {number}"),
                    "student_id": fields.get(student) if student else None,
                    "answer": "" if answer == "-" else answer,  # what Moodle writes for no response
                },
            )


def write_gradebook(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, XLSX or JSONL, as the file's name says; None becomes an empty cell.

    The columns are those of all rows, in order of appearance. Text that begins like a formula is text in XLSX; CSV
    knows no such difference, and is written as it is.
    """
    path = Path(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        with replacing(path) as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif suffix == ".csv":
        with replacing(path) as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(names)
            for row in rows:
                writer.writerow(["" if row.get(name) is None else row[name] for name in names])
    elif suffix == ".xlsx":
        openpyxl = _openpyxl(path)
        book = openpyxl.Workbook()
        sheet = book.active
        control = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE
        table: list[list[Any]] = [list(names), *([row.get(name) for name in names] for row in rows)]
        for number, cells in enumerate(table, 1):
            for place, value in enumerate(cells, 1):
                text = isinstance(value, str)
                cell = sheet.cell(number, place, control.sub("?", value) if text else value)
                if text:
                    cell.data_type = "s"
        content = io.BytesIO()
        book.save(content)
        with replacing(path) as stream:
            stream.buffer.write(content.getvalue())
    else:
        raise UserError(f"{path}: a gradebook is written as .csv, .xlsx or .jsonl")
