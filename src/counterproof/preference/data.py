"""Preference data: read, check, survey, convert, encode and write them, one record at a time.

The formats are TRL's, plus a ranked one that TRL lacks. A record is recognised by its fields; a text is a string or a
list of chat messages ``{"role": ..., "content": ...}``.

| kind | fields |
|---|---|
| pair | prompt, chosen, rejected; or chosen, rejected, which begin with the same prompt |
| unpaired | prompt, completion, label (true: good) |
| completion | prompt, completion |
| prompt | prompt |
| ranked, a higher score is better | prompt, completions, scores; or query, responses, scores (RRHF, KnowPAT) |
| ranked, as UltraFeedback | instruction, completions: objects with response, overall_score or fine-grained_score |

What else a record holds stays in `Example.columns`. Files: JSON lines (``.jsonl``, ``.jsonl.gz``), a JSON array
(``.json``), Parquet, a folder written by ``datasets.Dataset.save_to_disk``; or a folder or glob of such files.
"""

import codecs
import glob
import gzip
import itertools
import json
import math
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from counterproof.errors import UserError, extra
from counterproof.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from counterproof.language.scoring import Group

__all__ = [
    "Encoded",
    "Example",
    "Leaks",
    "Lengths",
    "Pairs",
    "Problem",
    "Survey",
    "encode",
    "problems",
    "read",
    "split",
    "survey",
    "to_pairs",
    "to_unpaired",
    "write",
]

Text = str | list[dict[str, Any]]
Kind = Literal["pair", "unpaired", "ranked", "completion", "prompt"]
Strategy = Literal["best_worst", "best_vs_rest", "all"]
Location = str | os.PathLike[str]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
CHUNK = 1 << 16  # characters of a JSON array, read at a time
ROWS = 256  # of a Parquet file, decoded at a time
SHOWN = 5  # leaks that are named
BOM = codecs.BOM_UTF8


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt and what is known of its completions.

    Attributes:
        prompt: text or chat messages.
        completions: of the same sort as the prompt. Pair: chosen, rejected. Ranked: two or more, in the order given.
            Unpaired and completion: one. Prompt: none.
        scores: one per completion. Pair: 1, 0. Unpaired: 1 good, 0 bad. Ranked: as given, higher is better.
            Completion: 1.
        kind: see the module.
        columns: the record's other fields.
        where: where it was read, such as ``train.jsonl:12``.

    Raises:
        ValueError: completions or scores of a number that does not go with the kind.
    """

    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...]
    kind: Kind
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        count = len(self.completions)
        wanted = {"pair": 2, "unpaired": 1, "completion": 1, "prompt": 0}.get(self.kind, max(count, 2))
        if count != wanted or len(self.scores) != count:
            raise ValueError(f"{self.kind}: {count} completions, {len(self.scores)} scores; expected {wanted} of each")
        if (self.kind == "pair" and self.scores != (1.0, 0.0)) or (
            self.kind in ("unpaired", "completion") and self.scores[0] not in (0.0, 1.0)
        ):
            raise ValueError(f"{self.kind}: scores {self.scores}; a pair has (1, 0), a single completion 1 or 0")

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are chat messages."""
        return not isinstance(self.prompt, str)


class Problem(NamedTuple):
    """A bad record: where it is, what is wrong with it and how to mend it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def read(path: Location, *, kind: Kind | None = None) -> Iterator[Example]:
    """Stream the examples of a file, folder or glob; memory does not grow with its size.

    Args:
        path: see the module; the files of a folder or glob are read in the order of their names.
        kind: what the records have to be. None: what the first one is. It also decides for records whose fields fit
            two kinds.

    Raises:
        UserError: at once, when there is nothing of that name to read; while reading, at the first bad record, naming
            file and line (or row, from 1) and the remedy. `problems` lists all of them.
    """
    scan = _Scan(path, kind)

    def examples() -> Iterator[Example]:
        for found in scan:
            if isinstance(found, Problem):
                raise UserError(str(found))
            yield found

    return examples()


def problems(path: Location, *, kind: Kind | None = None) -> Iterator[Problem]:
    """All the bad records of what `read` would stop at the first of; same arguments and errors."""
    scan = _Scan(path, kind)
    return (found for found in scan if isinstance(found, Problem))


class _Scan:
    """A pass over all that a path names: examples, and problems in place of bad records."""

    def __init__(self, path: Location, kind: Kind | None) -> None:
        if kind is not None:
            _check_kind(kind)
        self.path, self.kind = path, kind
        self.sources = _sources(path)
        self.blank = 0  # lines

    def __iter__(self) -> Iterator[Example | Problem]:
        anything = False
        for name, rows in self.sources:
            first: tuple[_Layout, bool, str] | None = None
            try:
                for where, value in rows():
                    if value is _BLANK:
                        self.blank += 1
                        continue
                    anything = True
                    if isinstance(value, Problem):
                        yield value
                        continue
                    try:
                        layout, example = _example(value, self.kind, where)
                        first = first or (layout, example.conversational, where)
                        _same_format(layout, example, first)
                    except _BadRecord as problem:
                        yield Problem(where, str(problem))
                    else:
                        yield example
            except OSError as problem:
                raise UserError(f"cannot read {name}: {problem.strerror or problem}") from None
        if not anything:
            raise UserError(f"{self.path} holds no record; expected {_formats(self.kind)}")


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r}; expected one of {', '.join(get_args(Kind))}")


# from a path to rows


_BLANK = object()
Row = tuple[str, Any]  # where, and the parsed record, a Problem in its place, or _BLANK
Source = tuple[str, Callable[[], Iterator[Row]]]


def _sources(path: Location) -> list[Source]:
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if place.exists():
        return [_file(place)]
    if any(sign in str(place) for sign in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
        if not matches:
            raise UserError(f"no file matches {place}; give a file, a folder or a pattern such as 'data/*.jsonl'")
        return [source for match in matches for source in (_folder(match) if match.is_dir() else [_file(match)])]
    raise UserError(f"{place} does not exist; give a file ({', '.join(SUFFIXES)}), a folder of them, or a pattern")


def _file(path: Path) -> Source:
    name = path.name.lower()
    for suffix, rows in zip(SUFFIXES, (_json_lines, _json_lines, _json, _parquet), strict=True):
        if name.endswith(suffix):
            return str(path), partial(rows, path)
    raise UserError(f"{path} is none of {', '.join(SUFFIXES)}; convert it to one of them, or rename it to what it is")


def _folder(path: Path) -> list[Source]:
    if (path / "dataset_dict.json").exists():
        parts = sorted(part.name for part in path.iterdir() if (part / "state.json").exists())
        if len(parts) != 1:
            raise UserError(f"{path} holds the splits {', '.join(parts) or 'of no data set'}; name one: {path}/train")
        path = path / parts[0]
    if (path / "state.json").exists():
        return [(str(path), partial(_saved_dataset, path))]
    files = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name.lower().endswith(SUFFIXES)
    )
    if not files:
        folders = sorted(file.name for file in path.iterdir() if file.is_dir() and not file.name.startswith("."))
        hint = f"; its folders are {', '.join(folders)}: name one of them" if folders else ""
        raise UserError(f"{path} holds no file of {', '.join(SUFFIXES)} and no saved data set{hint}")
    return [_file(file) for file in files]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    with _open(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                where = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(BOM)
                yield where, (_parsed(line, where, number == 1) if line.strip() else _BLANK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
            what = f"the compressed file is damaged from here on ({problem}); fetch or compress it again"
            yield f"{path}:{number + 1}", Problem(f"{path}:{number + 1}", what)


def _parsed(line: bytes, where: str, first: bool) -> Any:
    """What a line says, or the problem with it."""
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as problem:
        if first and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return Problem(where, "the file is UTF-16; save it as UTF-8")
        byte = f"byte 0x{line[problem.start]:02x} at column {problem.start + 1}"
        return Problem(where, f"not UTF-8 ({byte}, in bytes); save the file as UTF-8")
    except json.JSONDecodeError as problem:
        what = f"not JSON at column {problem.colno}: {problem.msg}"
        return Problem(where, f"{what}; write each record as one JSON object on a line of its own")
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits; brackets nested thousandfold
        return Problem(where, f"not a record: {problem}; write it as one JSON object on a line of its own")


def _json(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        head = stream.read(len(BOM))
        head = head if head != BOM else b""
        while not head.strip() and (byte := stream.read(1)):
            head = byte
    return _json_array(path) if head.lstrip().startswith(b"[") else _json_lines(path)


def _json_array(path: Path) -> Iterator[Row]:
    """The items of an array, of which never more than about two are held."""
    decoder = json.JSONDecoder()
    buffer, at, ended = "", 0, False
    line, item = 1, 0
    before = 0  # characters of the buffer's first line that are no longer in it
    # Bytes that are not UTF-8 become half characters, and so cost one item only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:

        def column(place: int) -> int:
            newline = buffer.rfind("\n", 0, place)
            return place - newline if newline >= 0 else before + place + 1

        def fill() -> None:
            nonlocal buffer, at, ended, line, before
            # As much again as there is, so that a long item is not parsed anew for every chunk of it.
            more = stream.read(max(CHUNK, len(buffer) - at))
            line, before = line + buffer.count("\n", 0, at), column(at) - 1
            buffer, at, ended = buffer[at:] + more, 0, not more

        def peek() -> str:
            nonlocal at
            while True:
                at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
                if at < len(buffer) or ended:
                    return buffer[at : at + 1]
                fill()

        def where(place: int) -> str:
            return f"{path}:{line + buffer.count(chr(10), 0, place)}, item {item}"

        def broken(what: str, place: int) -> Row:
            return where(place), Problem(
                where(place), f"not JSON at column {column(place)}: {what}; mend it to read on"
            )

        peek()
        at += 1  # the bracket, by which the file was recognised
        more = peek() != "]"
        while more:
            item += 1
            while True:
                try:
                    value, end = decoder.raw_decode(buffer, at)
                    if end < len(buffer) or ended:
                        break
                except (ValueError, RecursionError) as problem:
                    place = getattr(problem, "pos", at)
                    what = getattr(problem, "msg", str(problem))
                    if ended or (place < len(buffer) - 16 and not what.startswith("Unterminated string")):
                        yield broken(what, place)
                        return
                fill()
            raw = buffer[at:end]
            odd = None if raw.isascii() else _HALF.search(raw)
            if odd:
                byte = f"byte 0x{ord(odd[0]) - 0xDC00:02x}"
                value = Problem(where(at), f"not UTF-8 ({byte}); save the file as UTF-8")
            yield where(at), value
            at = end
            more = peek() == ","
            if more:
                at += 1
                peek()
        if peek() != "]":
            yield broken("expected ',' or ']' after an item", at)
            return
        at += 1
        if peek():
            yield broken("expected nothing after the array's ']'", at)


_SPACE = re.compile(r"[ \t\r\n]*")
_HALF = re.compile("[\ud800-\udfff]")


def _parquet(path: Path) -> Iterator[Row]:
    with extra("preference"):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_rows(file.iter_batches(batch_size=ROWS), str(path))
    except pyarrow.ArrowException as problem:
        raise UserError(f"{path} cannot be read as Parquet: {_one_line(problem)}; write or fetch it again") from None


def _saved_dataset(path: Path) -> Iterator[Row]:
    # The arrow files are read as they are: `datasets` would only import pandas and hand out the same rows.
    with extra("preference"):
        import pyarrow
    try:
        names = [part["filename"] for part in json.loads((path / "state.json").read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}/state.json is not that of a saved data set; save it again") from None

    def batches() -> Iterator[Any]:
        for name in names:
            with pyarrow.memory_map(str(path / name)) as file, pyarrow.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield from (batch.slice(start, ROWS) for start in range(0, batch.num_rows, ROWS))

    try:
        yield from _arrow_rows(batches(), str(path))
    except pyarrow.ArrowException as problem:
        raise UserError(f"{path} cannot be read as a saved data set: {_one_line(problem)}; save it again") from None


def _arrow_rows(batches: Iterable[Any], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in _decoded(batch):
            number += 1
            where = f"{name}, row {number}"
            if row is None:
                yield where, Problem(where, "text that is not UTF-8; write the file again from its source")
            else:
                # A column of objects has every field of any of them; those that an object lacks are null.
                yield where, {key: _without_nulls(value) for key, value in row.items()}


def _decoded(batch: Any) -> Iterator[dict[str, Any] | None]:
    """A batch's rows; None for one whose text cannot be decoded."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


# from rows to examples


class _BadRecord(Exception):
    pass


class _Layout(NamedTuple):
    kind: Kind
    fields: tuple[str, ...]
    title: str

    def __str__(self) -> str:
        return f"{self.title} ({', '.join(self.fields)})"


_PAIR = _Layout("pair", ("prompt", "chosen", "rejected"), "pair")
_IMPLICIT = _Layout("pair", ("chosen", "rejected"), "pair with the prompt in both")
_UNPAIRED = _Layout("unpaired", ("prompt", "completion", "label"), "unpaired")
_COMPLETION = _Layout("completion", ("prompt", "completion"), "prompt and completion")
_RANKED = _Layout("ranked", ("prompt", "completions", "scores"), "ranked")
_RRHF = _Layout("ranked", ("query", "responses", "scores"), "ranked")
_ULTRAFEEDBACK = _Layout("ranked", ("instruction", "completions"), "ranked, as UltraFeedback")
_PROMPT = _Layout("prompt", ("prompt",), "prompt only")
_LAYOUTS = (_PAIR, _IMPLICIT, _UNPAIRED, _COMPLETION, _RANKED, _RRHF, _ULTRAFEEDBACK, _PROMPT)
_ANSWER_FIELDS = {"chosen", "rejected", "completion", "completions", "responses"}
_RATINGS = ("overall_score", "fine-grained_score")


def _formats(kind: Kind | None) -> str:
    return " | ".join(str(layout) for layout in _LAYOUTS if kind in (None, layout.kind))


def _layout(record: Mapping[str, Any], kind: Kind | None) -> _Layout:
    fits = [layout for layout in _LAYOUTS if all(name in record for name in layout.fields)]
    # A format whose fields are a part of another's is that other one, with something left out.
    fits = [layout for layout in fits if not any(set(layout.fields) < set(other.fields) for other in fits)]
    if _PROMPT in fits and not _ANSWER_FIELDS.isdisjoint(record):
        fits.remove(_PROMPT)
    kinds = dict.fromkeys(layout.kind for layout in fits)
    if kind in kinds:
        return next(layout for layout in fits if layout.kind == kind)
    if len(kinds) == 1 and kind is None:
        return fits[0]
    found = ", ".join(record) or "none"
    if len(kinds) > 1:
        options = " or ".join(f"kind={name!r}" for name in kinds)
        raise _BadRecord(f"the fields fit {' and '.join(map(str, fits))}; say which is meant: {options}")
    if kinds:
        raise _BadRecord(f"this is {fits[0]}; expected {_formats(kind)}")
    if {"prompt", "completions", "labels"} <= record.keys():
        raise _BadRecord(
            "stepwise supervision (prompt, completions, labels) grades the steps of one answer, not whole answers; "
            "join the steps to a completion and give it a label, or two of them to chosen and rejected"
        )
    if "messages" in record or "conversations" in record:
        name = "messages" if "messages" in record else "conversations"
        raise _BadRecord(
            f"{name} is a conversation without a preference; put its last turn into completion, the turns before into "
            f"prompt. Fields found: {found}; formats: {_formats(kind)}"
        )
    candidates = [layout for layout in _LAYOUTS if kind in (None, layout.kind) and set(layout.fields) - record.keys()]
    near = max(candidates, key=lambda layout: sum(name in record for name in layout.fields) / len(layout.fields))
    lacks = [name for name in near.fields if name not in record]
    if len(lacks) < len(near.fields):
        raise _BadRecord(
            f"{' and '.join(lacks)} missing for {near}; add it. Fields found: {found}; formats: {_formats(kind)}"
        )
    raise _BadRecord(f"no format has these fields: {found}; rename them to those of {_formats(kind)}")


def _same_format(layout: _Layout, example: Example, first: tuple[_Layout, bool, str]) -> None:
    before, conversational, where = first
    if layout != before:
        raise _BadRecord(
            f"this is {layout}, the records from {where} on are {before}; keep each format in a file of its own"
        )
    if example.conversational != conversational:
        sorts = ("plain text", "chat messages")
        raise _BadRecord(
            f"this is {sorts[example.conversational]}, the records from {where} on are {sorts[conversational]}; "
            "keep each in a file of its own"
        )


def _example(record: Any, kind: Kind | None, where: str) -> tuple[_Layout, Example]:
    if not isinstance(record, dict):
        raise _BadRecord(f"a record is an object with named fields, not {_show(record)}; write it as {{...}}")
    layout = _layout(record, kind)
    columns = {name: value for name, value in record.items() if name not in layout.fields and value is not None}
    completions: tuple[Text, ...]
    scores: tuple[float, ...]
    if layout in (_PAIR, _IMPLICIT):
        prompt, completions = _pair(record, layout)
        scores = (1.0, 0.0)
    elif layout == _PROMPT:
        prompt, completions, scores = _text(record["prompt"], "prompt"), (), ()
    elif layout in (_UNPAIRED, _COMPLETION):
        prompt, completions = _text(record["prompt"], "prompt"), (_text(record["completion"], "completion"),)
        label = record["label"] if layout == _UNPAIRED else True
        if not isinstance(label, bool):
            raise _BadRecord(f"label is {_show(label)}; write true for a good completion, false for a bad one")
        scores = (float(label),)
    else:
        prompt, completions, scores = _ranked(record, layout, columns)
    names = {"pair": ("chosen", "rejected"), "ranked": tuple(f"completion {i}" for i in range(1, len(completions) + 1))}
    _check_prompt(prompt, layout)
    for name, completion in zip(names.get(layout.kind, ("completion",)), completions, strict=False):
        _check_completion(completion, name, prompt)
        if layout != _IMPLICIT and isinstance(prompt, list) and completion[: len(prompt)] == prompt:
            raise _BadRecord(f"{name} repeats the whole prompt before its answer; keep those messages in prompt only")
    _check_columns(columns)
    return layout, Example(
        prompt=prompt, completions=completions, scores=scores, kind=layout.kind, columns=columns, where=where
    )


def _pair(record: dict[str, Any], layout: _Layout) -> tuple[Text, tuple[Text, Text]]:
    chosen, rejected = _text(record["chosen"], "chosen"), _text(record["rejected"], "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _BadRecord("one of chosen and rejected is text, the other messages; write both in the same way")
    if chosen == rejected:
        raise _BadRecord("chosen and rejected are equal, which prefers nothing; correct one of them or drop the record")
    prompt = _text(record["prompt"], "prompt") if layout == _PAIR else None
    if prompt is not None and not (isinstance(prompt, str) and isinstance(chosen, list)):
        return prompt, (chosen, rejected)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text or (isinstance(text, str) and not text.strip()):
            raise _BadRecord(f"{name} is empty; give it the prompt and a completion, or drop the record")
    shared = _shared_prefix(chosen, rejected)
    if not shared:
        raise _BadRecord(
            "chosen and rejected begin differently, so no prompt is in both; add a field prompt"
            + (" that holds messages" if prompt is not None else "")
        )
    # As in ultrafeedback_binarized: the prompt as text beside whole conversations that hold it already.
    if prompt is not None and not any(message.get("content") == prompt for message in chosen[:shared]):  # type: ignore[union-attr]
        raise _BadRecord(
            "prompt is text, chosen and rejected are messages that do not begin with it; write the prompt as messages: "
            '[{"role": "user", "content": ...}]'
        )
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _shared_prefix(chosen: Text, rejected: Text) -> int:
    """Characters or messages at the beginning that are the prompt; as `trl.extract_prompt` counts them."""
    shortest = min(len(chosen), len(rejected))
    for index in range(shortest):
        if chosen[index] != rejected[index]:
            return index - 1 if index and chosen[index - 1] == " " else index
    return shortest - 1


def _ranked(
    record: dict[str, Any], layout: _Layout, columns: dict[str, Any]
) -> tuple[Text, tuple[Text, ...], tuple[float, ...]]:
    asked, answers = layout.fields[:2]
    prompt = _text(record[asked], asked)
    given = record[answers]
    if not isinstance(given, list):
        raise _BadRecord(f"{answers} is {_show(given)}; write a list of two or more completions")
    if layout == _ULTRAFEEDBACK:
        for number, one in enumerate(given, 1):
            if not isinstance(one, dict) or "response" not in one:
                raise _BadRecord(
                    f"completion {number} is {_show(one)}; beside instruction, write objects with response"
                )
        rating = next((name for name in _RATINGS if all(one.get(name) is not None for one in given)), None)
        if rating is None:
            raise _BadRecord(f"not every completion has a score; give all of them {' or '.join(_RATINGS)}")
        scores = [one[rating] for one in given]
        details = [{name: one[name] for name in one if name not in ("response", rating)} for one in given]
        if any(details):
            columns["details"] = details
        given = [one["response"] for one in given]
    else:
        scores = record["scores"]
        if not isinstance(scores, list):
            raise _BadRecord(f"scores is {_show(scores)}; write a list of numbers, one per completion")
    if len(given) < 2:
        raise _BadRecord(f"{answers} holds {len(given)}; a ranking takes two or more completions")
    if len(scores) != len(given):
        raise _BadRecord(f"{len(scores)} scores for {len(given)} {answers}; give one score per completion")
    for number, score in enumerate(scores, 1):
        if not _is_number(score):
            raise _BadRecord(f"score {number} is {_show(score)}; write a finite number, higher is better")
    completions = tuple(_text(one, f"completion {number}") for number, one in enumerate(given, 1))
    return prompt, completions, tuple(map(float, scores))


def _text(value: Any, name: str) -> Text:
    """Text or messages, of the right types; whether there is anything in them is asked later."""
    if isinstance(value, str):
        _check_characters(value, name)
        return value
    if not isinstance(value, list):
        raise _BadRecord(f"{name} is {_show(value)}; write text, or a list of chat messages")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _BadRecord(
                f"{name} is a list, and its item {number} is {_show(message)}; write chat messages: {_CHAT}"
            )
        if not isinstance(message.get("role"), str):
            old = "; rename from and value to role and content" if "from" in message else f"; write {_CHAT}"
            raise _BadRecord(f"message {number} of {name} has no role as text: {_show(message)}{old}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise _BadRecord(f"message {number} of {name} has no content as text: {_show(message)}; write {_CHAT}")
        _check_characters(content or "", name)
    return value


_CHAT = '{"role": "user", "content": "..."}'


def _check_characters(text: str, name: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            half = f"\\u{ord(text[problem.start]):04x}"
            raise _BadRecord(f"{name} holds half a character ({half}); write the character whole") from None


def _check_prompt(prompt: Text, layout: _Layout) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _BadRecord(
                "chosen and rejected share no beginning but space; add a field prompt"
                if layout == _IMPLICIT
                else f"{layout.fields[0]} is empty; give it text, or drop the record"
            )
    elif not prompt:
        raise _BadRecord("prompt has no message; give it at least the user's turn")
    elif prompt[-1]["role"] not in ("user", "tool", "assistant"):
        raise _BadRecord(
            f"prompt ends on a message of {_show(prompt[-1]['role'])}; it must end on a turn of user, tool or assistant"
        )


def _check_completion(completion: Text, name: str, prompt: Text) -> None:
    if isinstance(completion, str) != isinstance(prompt, str):
        sorts = ("messages", "text")
        raise _BadRecord(
            f"prompt is {sorts[isinstance(prompt, str)]}, {name} is {sorts[isinstance(completion, str)]}; write both "
            'in the same way, a completion as [{"role": "assistant", "content": ...}] beside messages'
        )
    if isinstance(completion, str):
        if not completion.strip():
            raise _BadRecord(f"{name} is empty; give it text, or drop the record")
        return
    if not completion or completion[-1]["role"] != "assistant":
        ends = f"ends on a turn of {_show(completion[-1]['role'])}" if completion else "has no message"
        raise _BadRecord(f"{name} {ends}; it must end on a turn of assistant")
    if not (completion[-1].get("content") or "").strip() and not completion[-1].get("tool_calls"):
        raise _BadRecord(f"{name} ends on an empty message; give it content, or drop the record")


def _check_columns(columns: Mapping[str, Any]) -> None:
    for name, value in columns.items():
        if name == "weight":
            if not _is_number(value) or value < 0:
                raise _BadRecord(f"weight is {_show(value)}; write a finite number, 0 or more")
        elif name in ("ref_chosen_logps", "ref_rejected_logps"):
            if not _is_number(value):
                raise _BadRecord(f"{name} is {_show(value)}; write a finite number, or leave the field out")
        elif name.startswith("margin_"):
            if not (_is_number(value) or (isinstance(value, list) and value and all(map(_is_number, value)))):
                raise _BadRecord(f"{name} is {_show(value)}; write a finite number, or a list of them")
        elif name == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise _BadRecord(f"chat_template_kwargs is {_show(value)}; write an object of the template's arguments")
        elif name == "tools":
            _tools(value)


def _tools(value: Any) -> list[Any]:
    """Tools as a list; like TRL, also from a list that was written as text."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
    else:
        parsed = value
    if not isinstance(parsed, list):
        raise _BadRecord(f"tools is {_show(value)}; write a list of tool descriptions, or that list as JSON text")
    return parsed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    try:
        return _BRIEF.repr(value) if not isinstance(value, bool | None) else str(value).lower().replace("none", "null")
    except ValueError:  # an integer of thousands of digits
        return "a very long number"


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60
_BRIEF.maxlevel = 2


# conversions


def _name(example: Example) -> str:
    return example.where or "an example"


class Pairs(Iterator[Example]):
    """Pairs, made as they are asked for. The counts are complete once all have been.

    Attributes:
        ties: pairs not made because the two scores are equal.
        identical: pairs not made because the two completions are.
    """

    def __init__(self, examples: Iterable[Example], strategy: Strategy) -> None:
        self.ties = 0
        self.identical = 0
        self._pairs = self._made(examples, strategy)

    def __next__(self) -> Example:
        return next(self._pairs)

    def _made(self, examples: Iterable[Example], strategy: Strategy) -> Iterator[Example]:
        for example in examples:
            if example.kind == "pair":
                yield example
                continue
            if example.kind != "ranked":
                raise UserError(f"{_name(example)}: no pair can be made of one {example.kind}; give pairs or rankings")
            for better, worse in _matches(example.scores, strategy):
                if example.scores[better] == example.scores[worse]:
                    self.ties += 1
                elif example.completions[better] == example.completions[worse]:
                    self.identical += 1
                else:
                    yield replace(
                        example,
                        kind="pair",
                        completions=(example.completions[better], example.completions[worse]),
                        scores=(1.0, 0.0),
                        columns={
                            **example.columns,
                            "score_chosen": example.scores[better],
                            "score_rejected": example.scores[worse],
                        },
                    )


def to_pairs(examples: Iterable[Example], strategy: Strategy = "best_worst") -> Pairs:
    """Pairs out of rankings; pairs pass.

    Args:
        examples: rankings or pairs.
        strategy: ``best_worst`` one pair per ranking; ``best_vs_rest`` the best against every other one; ``all`` every
            two. Of several best (worst) ones the first counts.

    Returns:
        An iterator that counts the ties it made no pair of. The columns of a pair made here gain ``score_chosen`` and
        ``score_rejected``.

    Raises:
        UserError: while iterating, at an example of another kind.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy {strategy!r}; expected one of {', '.join(get_args(Strategy))}")
    return Pairs(examples, strategy)


def _matches(scores: Sequence[float], strategy: Strategy) -> Iterator[tuple[int, int]]:
    """Indices of a better and a worse one, or of two equal ones."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if strategy == "best_worst":
        # All equal: the same one is best and worst, and its equal score makes a tie.
        yield best, worst
    elif strategy == "best_vs_rest":
        yield from ((best, other) for other in range(len(scores)) if other != best)
    else:
        for one, other in itertools.combinations(range(len(scores)), 2):
            yield (one, other) if scores[one] >= scores[other] else (other, one)


def to_unpaired(examples: Iterable[Example], threshold: float | None = None) -> Iterator[Example]:
    """Single completions, good or bad, out of pairs (as `trl.unpair_preference_dataset`) or rankings.

    Args:
        examples: pairs, rankings or unpaired ones, which pass.
        threshold: a ranked completion is good from this score on; it is kept in the column ``score``.

    Raises:
        UserError: while iterating, at a ranking without a threshold, or an example of another kind.
    """
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold is nan; give a number")
    return _unpaired(examples, threshold)


def _unpaired(examples: Iterable[Example], threshold: float | None) -> Iterator[Example]:
    for example in examples:
        if example.kind == "unpaired":
            yield example
            continue
        if example.kind not in ("pair", "ranked"):
            raise UserError(f"{_name(example)}: {example.kind}: nothing says how good it is; give pairs or rankings")
        if example.kind == "ranked" and threshold is None:
            raise UserError(f"{_name(example)}: a ranking says what is better, not what is good; give a threshold")
        for completion, score in zip(example.completions, example.scores, strict=True):
            columns = example.columns
            if example.kind == "ranked":
                columns, score = {**columns, "score": score}, float(score >= threshold)  # type: ignore[operator]
            yield replace(example, kind="unpaired", completions=(completion,), scores=(score,), columns=columns)


def split(examples: Iterable[Example], share: float, seed: int = 0) -> tuple[Iterator[Example], Iterator[Example]]:
    """Two streams: most of the prompts, and about a share of them to hold out.

    A prompt's side depends on its text and the seed alone: all its examples go there together (upper or lower case and
    space do not count), and examples that are added move none.

    Args:
        examples: read once; what only one of the two streams has reached is kept for the other.
        share: of the prompts that are held out, from 0 to 1.
        seed: of the division.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share!r}; expected a number from 0 to 1")
    salt = int(seed).to_bytes(16, "little", signed=True)

    def held_out(example: Example) -> bool:
        drawn = blake2b(_normal(example.prompt).encode(errors="surrogatepass"), digest_size=7, key=salt).digest()
        return int.from_bytes(drawn, "little") < share * 2**56

    sides = ((held_out(example), example) for example in examples)
    left, right = itertools.tee(sides)
    return (example for held, example in left if not held), (example for held, example in right if held)


# writing


def write(examples: Iterable[Example], path: Location, *, overwrite: bool = False) -> int:
    """Write JSON lines in the formats that `read` and TRL read; the file appears when it is whole.

    Args:
        examples: of one kind, all plain or all chat.
        path: a ``.jsonl`` file.
        overwrite: replace a file that is there; it may be the one that the examples are read from.

    Returns:
        How many were written.

    Raises:
        UserError: another suffix, a file that is there, examples of different formats, a column that JSON cannot hold.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: JSON lines are written; name a file that ends in .jsonl")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} exists and is left as it is; name another file, or allow it with overwrite=True")
    count = 0
    first: Example | None = None
    with replacing(path) as stream:
        for example in examples:
            first = first or example
            if (example.kind, example.conversational) != (first.kind, first.conversational):
                raise UserError(
                    f"{_name(example)}: {_sort(example)} after {_sort(first)}; write each to a file of its own"
                )
            stream.write(_line(example) + "\n")
            count += 1
    return count


def _sort(example: Example) -> str:
    return f"{example.kind} ({'chat messages' if example.conversational else 'plain text'})"


def _line(example: Example) -> str:
    row = {"prompt": example.prompt, **_answers(example)}
    clash = row.keys() & example.columns.keys()
    if clash:
        raise UserError(f"{_name(example)}: the column {min(clash)} has the name of a field of the format; rename it")
    row |= example.columns
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise UserError(
            f"{_name(example)}: cannot be written as JSON: {problem}; drop or convert that column"
        ) from None
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character somewhere in the columns: escaped, it survives
        line = json.dumps(row, allow_nan=False)
    return line


def _answers(example: Example) -> dict[str, Any]:
    if example.kind == "pair":
        return dict(zip(("chosen", "rejected"), example.completions, strict=True))
    if example.kind == "ranked":
        return {"completions": list(example.completions), "scores": list(example.scores)}
    if example.kind == "unpaired":
        return {"completion": example.completions[0], "label": bool(example.scores[0])}
    return {"completion": example.completions[0]} if example.kind == "completion" else {}


# tokens


class Encoded(NamedTuple):
    """Token ids, and how many of the prompt's were cut off at its beginning."""

    group: "Group"
    cut: int


def encode(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    trim_after_eos: bool = False,
) -> Encoded:
    """Token ids of an example, chat messages rendered by the tokenizer's template (see `language.tokenize`).

    Args:
        example: with at least one completion.
        tokenizer: a transformers tokenizer.
        max_length: tokens of prompt and longest completion. What is too much is cut off at the prompt's beginning (a
            BOS token that opens it stays), never from a completion. None: no limit.
        trim_after_eos: drop what a chat template renders after a completion's end token, such as SmolLM2's newline: all
            after the first end token, or after the last one when the completion is several messages.

    Raises:
        UserError: naming the example: a completion that leaves no room for a prompt token, chat messages and a
            tokenizer or template that cannot render them, no completion.
    """
    if not example.completions:
        raise UserError(f"{_name(example)}: a prompt alone has nothing to score; give it a completion")
    group = _tokenized(example, tokenizer)
    completions = group.completions
    if trim_after_eos and tokenizer.eos_token_id is not None:
        completions = tuple(
            _trimmed(ids, tokenizer.eos_token_id, last=isinstance(text, list) and len(text) > 1)
            for ids, text in zip(completions, example.completions, strict=True)
        )
    prompt, cut = group.prompt, 0
    if max_length is not None:
        longest = max(map(len, completions))
        room = max_length - longest
        if room < 1:
            raise UserError(
                f"{_name(example)}: a completion of {longest} tokens and one of the prompt do not fit in max_length "
                f"{max_length}; raise it to {longest + 1} or more, or shorten the completion"
            )
        cut = max(0, len(prompt) - room)
        opens = cut > 0 and room > 1 and prompt[0] == tokenizer.bos_token_id
        prompt = prompt[:1] + prompt[cut + 1 :] if opens else prompt[cut:]
    return Encoded(replace(group, prompt=prompt, completions=completions), cut)


def _tokenized(example: Example, tokenizer: "PreTrainedTokenizerBase") -> "Group":
    from jinja2 import TemplateError

    from counterproof.language.scoring import tokenize

    template: dict[str, Any] = {}
    if example.conversational:
        template |= example.columns.get("chat_template_kwargs") or {}
        if example.columns.get("tools"):
            template["tools"] = _tools(example.columns["tools"])
    try:
        return tokenize(tokenizer, example.prompt, example.completions, **template)
    except UserError as problem:
        raise UserError(f"{_name(example)}: {problem}") from None
    except TemplateError as problem:
        raise UserError(
            f"{_name(example)}: the tokenizer's chat template refuses the messages: {_one_line(problem)}; change their "
            "roles, or use another model's tokenizer"
        ) from None


def _trimmed(ids: tuple[int, ...], end: int, *, last: bool) -> tuple[int, ...]:
    if end not in ids:
        return ids
    return ids[: len(ids) - ids[::-1].index(end)] if last else ids[: ids.index(end) + 1]


# what is in it


@dataclass(frozen=True)
class Lengths:
    """Of how many, and their mean, median, 95th percentile and maximum."""

    count: int
    mean: float
    median: float
    p95: float
    longest: int


class Leaks(NamedTuple):
    """What of another data set occurs here too, upper or lower case and space aside.

    Attributes:
        against: the other data set.
        prompts: records here whose prompt occurs there.
        completions: records here of which the prompt with one of its completions occurs there.
        where: the first few such records.
    """

    against: str
    prompts: int
    completions: int
    where: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a data set holds.

    Attributes:
        records: good ones.
        kinds: how many of each kind.
        conversational: how many are chat messages.
        prompts: different ones, upper or lower case and space aside.
        repeated_prompts: records whose prompt an earlier record has.
        completions_per_prompt: over different prompts.
        lengths: unit (characters, words; tokens with a tokenizer) -> role -> lengths. Roles: prompt; chosen and
            rejected, for rankings the (first) best and worst; good and bad; completion, for rankings all of them.
        chosen_longer: unit -> share of pairs and rankings whose chosen (best) completion is longer than the rejected
            (worst) one; empty when there are none.
        ties: pairs of equal scores within rankings.
        duplicates: records with exactly the prompt and completions of an earlier one, and the same preference.
        contradictions: pairs that occur in both orders, single completions that occur as good and as bad.
        leaks: None when not compared.
        blank: empty lines, which are skipped.
        problems: bad records, which are left out of all other figures.
    """

    records: int
    kinds: Mapping[str, int]
    conversational: int
    prompts: int
    repeated_prompts: int
    completions_per_prompt: Lengths | None
    lengths: Mapping[str, Mapping[str, Lengths]]
    chosen_longer: Mapping[str, float]
    ties: int
    duplicates: int
    contradictions: int
    leaks: Leaks | None
    blank: int
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, as what `json.dumps` takes."""
        return {
            "records": self.records,
            "kinds": dict(self.kinds),
            "conversational": self.conversational,
            "prompts": self.prompts,
            "repeated_prompts": self.repeated_prompts,
            "completions_per_prompt": self.completions_per_prompt and asdict(self.completions_per_prompt),
            "lengths": {
                unit: {role: asdict(lengths) for role, lengths in roles.items()} for unit, roles in self.lengths.items()
            },
            "chosen_longer": dict(self.chosen_longer),
            "ties": self.ties,
            "duplicates": self.duplicates,
            "contradictions": self.contradictions,
            "leaks": self.leaks and {**self.leaks._asdict(), "where": list(self.leaks.where)},
            "blank": self.blank,
            "problems": [problem._asdict() for problem in self.problems],
        }

    def text(self) -> str:
        """The same for people."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        chat = f"; {self.conversational:,} as chat messages" if self.conversational else ""
        rows = [("records", f"{self.records:,}" + (f" ({kinds}{chat})" if kinds else ""))]
        rows.append(("prompts", f"{self.prompts:,} different; repeated by records: {self.repeated_prompts:,}"))
        if per := self.completions_per_prompt:
            rows.append(("completions", f"{per.mean:.1f} per prompt on average, {per.longest:,} at most"))
        if self.chosen_longer:
            shares = ", ".join(f"{share:.1%} by {unit}" for unit, share in self.chosen_longer.items())
            rows.append(("chosen is longer", shares))
        if "ranked" in self.kinds:
            rows.append(("equal scores", f"{self.ties:,}, counted in pairs within rankings"))
        rows.append(("duplicates", f"{self.duplicates:,}, exact copies of an earlier record"))
        rows.append(("contradictions", f"{self.contradictions:,}, the same preference both ways round"))
        if self.leaks:
            first = f"; the first at {', '.join(self.leaks.where)}" if self.leaks.where else ""
            rows.append(
                (
                    "leaks",
                    f"{self.leaks.prompts:,}, records with a prompt of {self.leaks.against}; "
                    f"{self.leaks.completions:,} of them with its completion too{first}",
                )
            )
        if self.blank:
            rows.append(("blank lines", f"{self.blank:,}, skipped"))
        rows.append(("bad records", f"{len(self.problems):,}"))
        lines = [f"{name:<17} {value}" for name, value in rows]
        lines += [f"  {problem}" for problem in self.problems]
        if self.lengths:
            lines += ["", f"{'length':<22} {'count':>9} {'mean':>9} {'median':>9} {'95 %':>9} {'longest':>9}"]
        for unit, roles in self.lengths.items():
            for role, of in roles.items():
                name = f"{role}, {unit}"
                lines.append(
                    f"{name:<22} {of.count:>9,} {of.mean:>9,.1f} {of.median:>9,.1f} {of.p95:>9,.1f} {of.longest:>9,}"
                )
        return "\n".join(lines)


def survey(
    source: Location | Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    kind: Kind | None = None,
    against: Location | Iterable[Example] | None = None,
) -> Survey:
    """Count what a data set holds and what is wrong with it, in one pass that keeps hashes, not texts.

    Args:
        source: as for `read`; bad records are listed, not raised. Or examples.
        tokenizer: to measure lengths in tokens as well, as `encode` makes them.
        kind: as for `read`, of both data sets.
        against: another data set, whose prompts and completions should not occur in this one.

    Raises:
        UserError: nothing to read, a bad record in ``against``, what the tokenizer cannot render.
    """
    known: tuple[set[bytes], set[bytes]] = (set(), set())
    name = "the other examples"
    if isinstance(against, str | os.PathLike):
        name, against = str(against), read(against, kind=kind)
    for example in against or ():
        prompt = _normal(example.prompt)
        known[0].add(_digest(prompt))
        known[1].update(_digest(prompt, _normal(completion)) for completion in example.completions)
    scan = _Scan(source, kind) if isinstance(source, str | os.PathLike) else None
    found: Iterable[Example | Problem] = source if scan is None else scan  # type: ignore[assignment]
    bad: list[Problem] = []
    count = _Counts(tokenizer, known)
    for one in found:
        if isinstance(one, Problem):
            bad.append(one)
        else:
            count.add(one)
    leaks = None
    if against is not None:
        leaks = Leaks(name, count.leaked_prompts, count.leaked_completions, tuple(count.leaked))
    of_prompts = list(count.completions.values())
    return Survey(
        records=sum(count.kinds.values()),
        kinds=dict(count.kinds),
        conversational=count.conversational,
        prompts=len(count.completions),
        repeated_prompts=sum(count.kinds.values()) - len(count.completions),
        completions_per_prompt=_lengths(Counter(of_prompts)) if of_prompts else None,
        lengths={unit: {role: _lengths(seen) for role, seen in roles.items()} for unit, roles in count.lengths.items()},
        chosen_longer={unit: count.longer[unit] / count.compared for unit in count.lengths if count.compared},
        ties=count.ties,
        duplicates=count.duplicates,
        contradictions=count.contradictions,
        leaks=leaks,
        blank=0 if scan is None else scan.blank,
        problems=tuple(bad),
    )


class _Counts:
    """What `survey` keeps while it reads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", known: tuple[set[bytes], set[bytes]]) -> None:
        self.tokenizer, self.known = tokenizer, known
        self.kinds: Counter[str] = Counter()
        self.conversational = 0
        self.completions: Counter[bytes] = Counter()  # by prompt
        self.lengths: dict[str, dict[str, Counter[int]]] = {}
        self.longer: Counter[str] = Counter()  # by unit
        self.compared = 0
        self.ties = self.duplicates = self.contradictions = 0
        self.records: set[bytes] = set()
        self.leaked_prompts = self.leaked_completions = 0
        self.leaked: list[str] = []

    def add(self, example: Example) -> None:
        self.kinds[example.kind] += 1
        self.conversational += example.conversational
        normal = _normal(example.prompt)
        prompt = _digest(normal)
        self.completions[prompt] += len(example.completions)
        self.ties += sum(n * (n - 1) // 2 for n in Counter(example.scores).values() if example.kind == "ranked")
        self._record(example)
        self._measure(example)
        if prompt in self.known[0]:
            self.leaked_prompts += 1
            self.leaked_completions += any(
                _digest(normal, _normal(completion)) in self.known[1] for completion in example.completions
            )
            if len(self.leaked) < SHOWN:
                self.leaked.append(example.where)

    def _record(self, example: Example) -> None:
        exact = [_exact(example.prompt), *map(_exact, example.completions)]
        scores = list(example.scores)
        this = _digest(example.kind, json.dumps(scores), *exact)
        if this in self.records:
            self.duplicates += 1
            return
        self.records.add(this)
        opposite = None
        if example.kind == "pair":
            opposite = _digest("pair", json.dumps(scores), exact[0], exact[2], exact[1])
        elif example.kind == "unpaired":
            opposite = _digest("unpaired", json.dumps([1.0 - scores[0]]), *exact)
        self.contradictions += opposite in self.records

    def _measure(self, example: Example) -> None:
        roles: tuple[str, ...] = ("completion",) * len(example.completions)
        extremes: tuple[int, int] | None = None
        if example.kind == "pair":
            roles, extremes = ("chosen", "rejected"), (0, 1)
        elif example.kind == "unpaired":
            roles = ("good" if example.scores[0] else "bad",)
        elif example.kind == "ranked" and len(set(example.scores)) > 1:
            ((best, worst),) = _matches(example.scores, "best_worst")
            extremes = best, worst
        self.compared += extremes is not None
        for unit, prompt, sizes in self._sizes(example):
            seen = self.lengths.setdefault(unit, {})
            seen.setdefault("prompt", Counter())[prompt] += 1
            for role, size in zip(roles, sizes, strict=True):
                seen.setdefault(role, Counter())[size] += 1
            if extremes is not None:
                better, worse = (sizes[index] for index in extremes)
                self.longer[unit] += better > worse
                if example.kind == "ranked":
                    seen.setdefault("chosen", Counter())[better] += 1
                    seen.setdefault("rejected", Counter())[worse] += 1

    def _sizes(self, example: Example) -> Iterator[tuple[str, int, list[int]]]:
        prompt, *completions = map(_plain, (example.prompt, *example.completions))
        yield "characters", len(prompt), [len(text) for text in completions]
        yield "words", len(prompt.split()), [len(text.split()) for text in completions]
        if self.tokenizer is None:
            return
        if completions:
            group = _tokenized(example, self.tokenizer)
            yield "tokens", len(group.prompt), [len(ids) for ids in group.completions]
        else:
            # A prompt alone is measured as the beginning that an answer would share with it.
            answer: Text = [{"role": "assistant", "content": "."}] if example.conversational else "."
            group = _tokenized(
                replace(example, kind="completion", completions=(answer,), scores=(1.0,)), self.tokenizer
            )
            yield "tokens", len(group.prompt), []


def _lengths(seen: Mapping[int, int]) -> Lengths:
    values = sorted(seen)
    count = sum(seen.values())
    mean = sum(value * seen[value] for value in values) / count
    ends = list(itertools.accumulate(seen[value] for value in values))

    def at(rank: int) -> int:
        return next(value for value, end in zip(values, ends, strict=True) if rank < end)

    def quantile(q: float) -> float:
        # Between the two nearest of the sorted values, as numpy.quantile does.
        place = q * (count - 1)
        low = math.floor(place)
        return at(low) + (place - low) * (at(min(low + 1, count - 1)) - at(low))

    return Lengths(count, mean, quantile(0.5), quantile(0.95), values[-1])


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message.get("content") or "" for message in text)


def _normal(text: Text) -> str:
    """What two texts have in common that differ by case and space alone; a single message counts as its text."""
    if isinstance(text, str):
        return " ".join(text.casefold().split())
    if len(text) == 1 and not text[0].get("tool_calls"):
        return _normal(text[0].get("content") or "")
    turns = ((m["role"], _normal(m.get("content") or ""), m.get("tool_calls")) for m in text)
    return json.dumps(list(turns), default=repr)


def _exact(text: Text) -> str:
    return json.dumps(text, default=repr, sort_keys=True)


def _digest(*parts: str) -> bytes:
    return blake2b(json.dumps(parts).encode(), digest_size=16).digest()
