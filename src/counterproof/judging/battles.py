"""Battles, read once and counted: which model met which, on which prompt, and who won.

A rating needs counts only, so a file is passed through in blocks and never held: what stays in memory are the distinct
combinations of prompt, pair, outcome and weight. Files whose battles carry style covariates are the exception, since
every battle differs in them.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import UserError, extra

with extra("judging"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

__all__ = ["Battles", "count_battles", "read_battles"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Record = Mapping[str, Any]

# What the winner column may say, and what it is worth to model_a.
WINNERS = {
    "model_a": 1.0,
    "a": 1.0,
    "left": 1.0,
    "model_b": 0.0,
    "b": 0.0,
    "right": 0.0,
    "tie": 0.5,
    "tie (bothbad)": 0.5,
    "bothbad": 0.5,
    "both_bad": 0.5,
}
NAMES = ("model_a", "model_b", "winner")
PROMPTS = ("prompt_id", "question_id")  # the first that is there tells battles of one prompt
STYLE = "style_"  # columns that begin so are covariates: a's measure less b's
# arena-hard-auto: a game's score, in whose first position the baseline stands; worth to B, and games it counts for.
ARENA_HARD = {"A>>B": (0.0, True), "A>B": (0.0, False), "A=B": (0.5, False), "B>A": (1.0, False), "B>>A": (1.0, True)}
BLOCK = 1 << 22  # bytes read at a time
PARTS = 1 << 18  # rows of counts after which they are added up


@dataclass(frozen=True, eq=False)
class Battles:
    """Battles counted by what distinguishes them; a row of the arrays is a cell.

    Attributes:
        models: (M,) names, sorted.
        first, second: (C,) int64, places in `models`; first < second.
        outcome: (C,) float64: 1 the first won, 0 the second won, 0.5 a tie.
        count: (C,) float64, how many battles.
        weight: (C,) float64, what each of them counts for.
        prompt: (C,) int64, a number for each prompt; None when battles name none.
        style: (C, F) float64, covariates, the first's measure less the second's; None without.
        style_names: (F,).
        unread: verdicts that say nothing, left out: only files of judgments have them.
    """

    models: tuple[str, ...]
    first: Ints
    second: Ints
    outcome: Floats
    count: Floats
    weight: Floats
    prompt: Ints | None = None
    style: Floats | None = None
    style_names: tuple[str, ...] = ()
    unread: int = 0

    def __len__(self) -> int:
        """How many battles."""
        return int(self.count.sum())


def read_battles(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    by_prompt: bool = True,
    style: bool = False,
    strong: float = 3.0,
    watch: Callable[[int], None] | None = None,
) -> Battles:
    """Read a file of battles in blocks.

    JSONL, CSV (or TSV) and Parquet in the arena's schema: ``model_a``, ``model_b`` and ``winner``, one of `WINNERS`;
    if there are any, ``prompt_id`` (or ``question_id``), ``weight`` and ``style_...``; other columns are passed over.
    Or arena-hard-auto's judgments (JSONL with ``uid``, ``model``, ``baseline`` and two ``games``): the first game has
    the baseline as A, the second as B; a null score is counted as `unread`.

    Args:
        columns: names in the file of ours, such as ``{"model_a": "model_x", "prompt_id": "id"}``.
        by_prompt: keep the prompts apart; a bootstrap by prompts needs it, and memory then grows with their number.
        style: keep covariates; memory then grows with the number of battles.
        strong: how many games a "much better" of arena-hard-auto counts for.
        watch: called with the battles read so far.

    Raises:
        UserError: naming file and line: what is no record, a missing or empty name, a model against itself, an unknown
            winner, a weight that is not a positive number, a style that is not finite; a file without battles, of
            another kind, or without the columns asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a .jsonl, .csv, .tsv or .parquet file of battles")
    source = _Source(path, dict(columns or {}), by_prompt, style, strong)
    parts: list[pa.Table] = []
    rows, limit, total = 0, PARTS, 0
    for table in source.tables():
        total += len(table)
        counted = source.counted(table)
        parts.append(counted)
        rows += len(counted)
        if rows > limit and not style:
            parts = [_added(parts)]
            rows = len(parts[0])
            limit = max(PARTS, 2 * rows)  # what does not shrink is added up ever less often
        if watch is not None:
            watch(total)
    if not total:
        raise UserError(f"{path} has no battle in it")
    return _battles(parts[0] if len(parts) == 1 else _added(parts, style), source.styles, source.unread)


def count_battles(records: Iterable[Record], *, by_prompt: bool = True, style: bool = False) -> Battles:
    """The battles among records, in the schema of `read_battles`.

    Raises:
        UserError: see `read_battles`; it names the record by its number, from 1.
    """
    listed = list(records)
    for number, record in enumerate(listed, 1):
        if problem := _complaint(record):
            raise UserError(f"battle {number}: {problem}")
    if not listed:
        raise UserError("there are no battles")
    styles = sorted({name for record in listed for name in record if name.startswith(STYLE)}) if style else []
    table = _table(listed, styles)
    prompt = next((name for name in PROMPTS if name in listed[0]), None) if by_prompt else None
    return _battles(_count(table, prompt, styles), tuple(styles), 0)


# what a record has to be


def _complaint(record: Any) -> str | None:
    """What is wrong with a record, for whom can mend it; one authority for every way of reading."""
    if not isinstance(record, Mapping):
        return f"{record!r:.60} is no record; expected model_a, model_b and winner"
    for name in NAMES:
        if name not in record or record[name] is None or record[name] == "":
            return f"there is no {name}; expected model_a, model_b and winner"
        if not isinstance(record[name], str):
            return f"{name} is {record[name]!r:.60}; expected text"
    if record["model_a"] == record["model_b"]:
        return f"{record['model_a']!r} is matched against itself; leave such battles out"
    if record["winner"].lower() not in WINNERS:
        return f"winner is {record['winner']!r:.60}; expected model_a, model_b, tie or tie (bothbad)"
    for name, value in record.items():
        if name == "weight" and not (_number(value) and 0 < value < np.inf):
            return f"weight is {value!r:.60}; expected a number above 0"
        if name.startswith(STYLE) and not (_number(value) and np.isfinite(value)):
            return f"{name} is {value!r:.60}; expected a finite number"
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# files


class _Source:
    """A file of battles: its columns under our names, block by block."""

    def __init__(self, path: Path, columns: dict[str, str], by_prompt: bool, style: bool, strong: float) -> None:
        self.path, self.strong, self.unread = path, strong, 0
        kind = path.suffix.lower()
        if kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
            raise UserError(f"{path} is a {kind or 'file without ending'}; battles are .jsonl, .csv, .tsv or .parquet")
        self.kind = {".ndjson": ".jsonl", ".json": ".jsonl", ".tsv": ".csv"}.get(kind, kind)
        self.delimiter = "\t" if kind == ".tsv" else ","
        there = self._header()
        if not there:
            raise UserError(f"{path} has no battle in it")
        self.judgments = self.kind == ".jsonl" and "games" in there
        self.named = {columns.get(name, name): name for name in (*NAMES, *PROMPTS, "weight")}
        if style:
            self.named |= {name: name for name in there if name.startswith(STYLE)}
        self.named = {theirs: ours for theirs, ours in self.named.items() if theirs in there}
        ours = set(self.named.values())
        for name, theirs in columns.items():
            if theirs not in there:
                raise UserError(f"{path} has no column {theirs!r} (for {name}); it has {', '.join(there)}")
        if not self.judgments:
            for name in NAMES:
                if name not in ours:
                    raise UserError(
                        f"{path} has no column {name!r}; it has {', '.join(there) or 'none'}. Battles need model_a, "
                        "model_b and winner; other names can be mapped to these"
                    )
        self.styles = tuple(sorted(name for name in ours if name.startswith(STYLE)))
        if style and not self.styles:
            raise UserError(f"{path} has no column {STYLE}...; style control needs at least one covariate")
        prompts = ("prompt_id",) if self.judgments else PROMPTS
        present = prompts if self.judgments else [name for name in prompts if name in ours]
        self.prompt = present[0] if by_prompt and present else None

    def _header(self) -> dict[str, Any]:
        """The columns, with a value or type each."""
        if self.kind == ".parquet":
            try:
                schema = pa.parquet.read_schema(self.path)
            except (pa.ArrowInvalid, OSError) as problem:
                raise UserError(f"{self.path} is not a Parquet file: {problem}") from None
            return dict(zip(schema.names, schema.types, strict=True))
        if self.kind == ".csv":
            with self._text() as stream:
                return dict.fromkeys(next(csv.reader(stream, delimiter=self.delimiter), []))
        for _, record in self._json_records():
            return record
        return {}

    def tables(self) -> Iterator[pa.Table]:
        if self.judgments:
            yield from self._judgments()
        elif self.kind == ".parquet":
            with pa.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=BLOCK) as file:
                for batch in file.iter_batches(1 << 16, columns=list(self.named), use_threads=False):
                    yield pa.Table.from_batches([batch])
        elif self.kind == ".csv":
            yield from self._csv()
        else:
            yield from self._json()

    def counted(self, table: pa.Table) -> pa.Table:
        """A block, checked and counted."""
        table = table.rename_columns([self.named.get(name, name) for name in table.column_names])
        try:
            for name in NAMES:  # Parquet may have them as categories
                table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
            table = table.set_column(table.column_names.index("winner"), "winner", pc.utf8_lower(table["winner"]))
            counted = _count(table, self.prompt, list(self.styles))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            raise self._located() from None
        sound = (
            not any(counted[name].null_count for name in counted.column_names)
            and not pc.any(pc.equal(counted["model_a"], counted["model_b"])).as_py()
            and pc.all(pc.is_in(counted["winner"], pa.array(list(WINNERS)))).as_py()
            and pc.min(pc.binary_length(counted["model_a"])).as_py() > 0
            and pc.min(pc.binary_length(counted["model_b"])).as_py() > 0
            and pc.all(pc.and_(pc.greater(counted["weight"], 0), pc.is_finite(counted["weight"]))).as_py()
            and all(pc.all(pc.is_finite(counted[name])).as_py() for name in self.styles)
        )
        if not sound:
            raise self._located()
        return counted

    # Reading fast says that something is wrong; reading slowly says where.

    def _located(self) -> UserError:
        for line, record in self._records():
            ours = {self.named[name]: value for name, value in record.items() if name in self.named}
            if problem := _complaint(ours):
                return UserError(f"{self.path}:{line}: {problem}")
            if self.prompt is not None and ours.get(self.prompt) is None:
                return UserError(f"{self.path}:{line}: there is no {self.prompt}, which other battles have")
            missing = next(
                (name for name in ("weight", *self.styles) if name in self.named.values() and name not in ours), None
            )
            if missing is not None:
                return UserError(f"{self.path}:{line}: there is no {missing}, which other battles have")
        return UserError(f"{self.path} cannot be read as battles; are its columns text and numbers?")

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.kind == ".jsonl":
            yield from self._json_records()
        elif self.kind == ".csv":
            yield from self._csv_records()
        else:
            line = 0
            with pa.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(columns=list(self.named)):
                    for record in batch.to_pylist():
                        line += 1
                        yield line, record

    def _csv(self) -> Iterator[pa.Table]:
        types = {theirs: _type(ours) for theirs, ours in self.named.items()}
        try:
            with (
                pa.OSFile(str(self.path)) as file,
                pa.csv.open_csv(
                    file,
                    # Small blocks, since it reads 32 of them ahead.
                    read_options=pa.csv.ReadOptions(block_size=BLOCK >> 3, use_threads=False),
                    parse_options=pa.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
                    convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(types)),
                ) as reader,
            ):
                for batch in reader:
                    yield pa.Table.from_batches([batch])
        except pa.ArrowInvalid as problem:
            if "Empty CSV" in str(problem):
                return
            raise self._located() from None

    @contextmanager
    def _text(self) -> Iterator[TextIO]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as stream:
                yield stream
        except UnicodeDecodeError as problem:
            raise UserError(f"{self.path} is not UTF-8 text ({problem}); save it as UTF-8") from None

    def _csv_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._text() as stream:
            reader = csv.reader(stream, delimiter=self.delimiter)
            header = next(reader)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{self.path}:{reader.line_num}: {len(row)} fields, but the header has {len(header)}"
                    )
                record: dict[str, Any] = dict(zip(header, row, strict=True))
                for theirs, ours in self.named.items():
                    if _type(ours) == pa.float64():
                        # What is no number stays text, and is complained of as what it is.
                        with suppress(ValueError):
                            record[theirs] = float(record[theirs])
                yield reader.line_num, record

    def _json(self) -> Iterator[pa.Table]:
        example = next(record for _, record in self._json_records())
        # What the first battle lacks, others must lack too: it is looked for, so that it cannot be passed over.
        lacking = [name for name in (*PROMPTS, "weight") if name not in (*self.named, *self.named.values())]
        fields = [pa.field(name, _type(name)) for name in lacking]
        for theirs, ours in self.named.items():
            number = ours in PROMPTS and isinstance(example.get(theirs), int)
            fields.append(pa.field(theirs, pa.int64() if number else _type(ours)))
        parse = pa.json.ParseOptions(
            explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore", newlines_in_values=False
        )
        options = pa.json.ReadOptions(block_size=2 * BLOCK, use_threads=True)
        line = 0
        with open(self.path, "rb") as stream:
            while block := stream.read(BLOCK):
                block += stream.readline()
                try:
                    table = pa.json.read_json(io.BytesIO(block), options, parse)
                    late = [name for name in lacking if table[name].null_count < len(table)]
                    table = table.drop_columns(lacking)
                except pa.ArrowInvalid:
                    # Prompts that are numbers here and text there, a line that is none, or values of the wrong kind.
                    records = [record for _, record in self._json_lines(block.splitlines(), line)]
                    late = [name for name in lacking if any(record.get(name) is not None for record in records)]
                    ours_ = [{self.named[k]: v for k, v in r.items() if k in self.named} for r in records]
                    if any(map(_complaint, ours_)):
                        raise self._located() from None
                    table = _table(ours_, self.styles)
                if late:
                    raise UserError(f"{self.path}: some battles have {late[0]}, and the first has not; give it to all")
                yield table
                line += block.count(b"\n")

    def _json_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(self.path, "rb") as stream:
            yield from self._json_lines(stream, 0)

    def _json_lines(self, lines: Iterable[bytes], before: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, text in enumerate(lines, before + 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as problem:
                raise UserError(f"{self.path}:{number}: not JSON ({problem}); expected one record a line") from None
            if not isinstance(record, dict):
                raise UserError(f"{self.path}:{number}: {record!r:.60} is no record; expected one object a line")
            yield number, record

    def _judgments(self) -> Iterator[pa.Table]:
        records: list[dict[str, Any]] = []
        for line, record in self._json_records():
            records += self._games(line, record)
            if len(records) >= 1 << 16:
                yield _table(records, ())
                records = []
        if records:
            yield _table(records, ())

    def _games(self, line: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        where = f"{self.path}:{line}"
        for name in ("uid", "model", "baseline", "games"):
            if not record.get(name):
                raise UserError(f"{where}: there is no {name}; a judgment has uid, model, baseline and games")
        if record["model"] == record["baseline"]:
            raise UserError(f"{where}: {record['model']!r} is matched against itself; leave such judgments out")
        if not isinstance(record["games"], list) or len(record["games"]) != 2:
            raise UserError(f"{where}: expected two games, the baseline first as A, then as B")
        for number, game in enumerate(record["games"]):
            score = game.get("score") if isinstance(game, dict) else None
            if score is None:
                self.unread += 1
                continue
            if score not in ARENA_HARD:
                raise UserError(f"{where}: score is {score!r:.40}; expected one of {', '.join(ARENA_HARD)} or null")
            to_b, much = ARENA_HARD[score]
            to_model = to_b if number == 0 else 1 - to_b
            yield {
                "model_a": str(record["model"]),
                "model_b": str(record["baseline"]),
                "winner": {1.0: "model_a", 0.5: "tie", 0.0: "model_b"}[to_model],
                "prompt_id": str(record["uid"]),
                "weight": self.strong if much else 1.0,
            }


def _type(name: str) -> pa.DataType:
    return pa.float64() if name == "weight" or name.startswith(STYLE) else pa.string()


def _table(records: Sequence[Record], styles: Sequence[str]) -> pa.Table:
    wanted = [name for name in (*NAMES, *PROMPTS, "weight", *styles) if any(name in record for record in records)]
    columns: dict[str, pa.Array] = {}
    for name in wanted:
        values = [record.get(name) for record in records]
        if name in PROMPTS:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, _type(name), from_pandas=False)
    table = pa.table(columns)
    return table.set_column(table.column_names.index("winner"), "winner", pc.utf8_lower(table["winner"]))


# counting


def _count(table: pa.Table, prompt: str | None, styles: Sequence[str]) -> pa.Table:
    """Columns model_a, model_b, winner, prompt, weight, the styles, and count."""
    columns = {name: table[name] for name in NAMES}
    columns["prompt"] = (
        pa.nulls(len(table), pa.string()).fill_null("") if prompt is None else table[prompt].cast(pa.string())
    )
    ones = pa.array(np.ones(len(table)))
    columns["weight"] = table["weight"].cast(pa.float64()) if "weight" in table.column_names else ones
    if styles:
        columns |= {name: table[name].cast(pa.float64()) for name in styles}
        return pa.table({**columns, "count": ones})
    keys = list(columns)
    counted = pa.table(columns).group_by(keys).aggregate([([], "count_all")])
    return counted.select([*keys, "count_all"]).rename_columns([*keys, "count"]).cast(_counted_schema())


def _counted_schema() -> pa.Schema:
    text = [pa.field(name, pa.string()) for name in (*NAMES, "prompt")]
    return pa.schema([*text, pa.field("weight", pa.float64()), pa.field("count", pa.float64())])


def _added(parts: list[pa.Table], style: bool = False) -> pa.Table:
    table = pa.concat_tables(parts)
    if style:
        return table
    keys = [name for name in table.column_names if name != "count"]
    added = table.group_by(keys).aggregate([("count", "sum")])
    return added.select([*keys, "count_sum"]).rename_columns([*keys, "count"])


def _battles(table: pa.Table, styles: Sequence[str], unread: int) -> Battles:
    """Places instead of names, each pair the same way round, and equal cells added."""
    models = sorted({*pc.unique(table["model_a"]).to_pylist(), *pc.unique(table["model_b"]).to_pylist()})
    a, b = (pc.index_in(table[name], pa.array(models)).to_numpy().astype(np.int64) for name in ("model_a", "model_b"))
    worth = pa.array(list(WINNERS.values()))
    outcome = pc.take(worth, pc.index_in(table["winner"], pa.array(list(WINNERS)))).to_numpy().astype(float)
    prompt = table["prompt"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    weight, count = (np.asarray(table[name].to_numpy(), dtype=float) for name in ("weight", "count"))
    first, second = np.minimum(a, b), np.maximum(a, b)
    outcome = np.where(a < b, outcome, 1 - outcome)
    style = None
    if styles:
        style = np.column_stack([table[name].to_numpy() for name in styles]) * np.where(a < b, 1.0, -1.0)[:, None]
    else:
        keys = (weight, outcome, second, first, prompt)
        order = np.lexsort(keys)
        new = np.ones(len(order), dtype=bool)
        new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
        count = np.add.reduceat(count[order], np.flatnonzero(new))
        order = order[new]
        first, second, outcome, weight, prompt = (x[order] for x in (first, second, outcome, weight, prompt))
    return Battles(
        models=tuple(models),
        first=first,
        second=second,
        outcome=outcome,
        count=count,
        weight=weight,
        prompt=prompt if len(np.unique(prompt)) > 1 else None,
        style=style,
        style_names=tuple(styles),
        unread=unread,
    )
