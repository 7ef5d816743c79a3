"""The journal: every finished trial in one SQLite file, found again instead of being run twice.

Many drivers may use one journal at once. A driver leases a key before it runs it, so that another waits for the answer
instead of computing it too; the lease of a driver that died is free again.
"""

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TextIO, get_args, get_origin

import psutil

from counterproof.bench.trials import Outcome, Record, canonical, key_of, stale_parts
from counterproof.database import clear_errors, look, make_folder, whole
from counterproof.errors import UserError

__all__ = ["Journal", "home"]

APPLICATION = 0x43504A4E  # "CPJN" in the file's header: ours, whatever its name
VERSION = 1
STALE_AFTER = 90.0  # seconds without a beat after which a lease from another host is free

SCHEMA = """
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    key TEXT NOT NULL,
    paper TEXT NOT NULL, claim TEXT NOT NULL, task TEXT NOT NULL, arm TEXT NOT NULL,
    seed INTEGER NOT NULL, budget TEXT NOT NULL, device TEXT NOT NULL,
    outcome TEXT NOT NULL, started TEXT NOT NULL, finished TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX trials_key ON trials (key, finished);
CREATE INDEX trials_paper ON trials (paper, claim);
CREATE TABLE leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
                     born REAL NOT NULL, beat REAL NOT NULL);
CREATE TABLE fingerprints (path TEXT PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL,
                           digest TEXT NOT NULL);
"""


def home() -> Path:
    """Where Counterproof keeps its data: ``COUNTERPROOF_HOME``, else the platform's folder for user data."""
    if chosen := os.environ.get("COUNTERPROOF_HOME"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("counterproof", appauthor=False))


class Journal:
    """The trials in one file; made on first use.

    Args:
        path: the SQLite file; default ``home() / "journal.sqlite"``.

    Raises:
        UserError: a file that is not a journal, is damaged, or comes from a newer version; a folder that cannot be
            written; a full disk. What is in the file is left as it is.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else home() / "journal.sqlite"
        self._host = socket.gethostname()
        self._born = psutil.Process().create_time()
        self._owner = uuid.uuid4().hex
        make_folder(self.path)
        with self._clear_errors():
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._prepare()

    def _prepare(self) -> None:
        _, empty = look(self._db, self.path, application=APPLICATION, newest=VERSION, name="journal")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        if empty:
            with whole(self._db):
                if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    for statement in SCHEMA.split(";")[:-1]:
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    def _clear_errors(self) -> AbstractContextManager[None]:
        return clear_errors(
            self.path,
            kept="finished trials are kept",
            damaged="not a journal; nothing was changed. Move it away and start anew, or bring trials back with "
            "'counterproof runs import'",
        )

    # trials

    def record(self, record: Record) -> None:
        """Keep a finished trial and give back its lease, in one transaction."""
        with self._clear_errors(), whole(self._db):
            self._insert(record)
            self._db.execute("DELETE FROM leases WHERE key = ? AND owner = ?", (record.key, self._owner))

    def _insert(self, record: Record) -> bool:
        columns = record.as_json()
        named = ("uid", "key", "paper", "claim", "task", "arm", "seed", "budget", "device", "outcome")
        cursor = self._db.execute(
            f"INSERT OR IGNORE INTO trials ({', '.join(named)}, started, finished, record) "
            f"VALUES ({', '.join('?' * (len(named) + 3))})",
            [*(columns[name] for name in named), record.started, record.finished, canonical(columns)],
        )
        return cursor.rowcount == 1

    def find(self, keys: Sequence[str], since: str = "") -> dict[str, Record]:
        """The latest trial of each key that has one.

        Args:
            keys: full keys.
            since: trials that finished before this moment (UTC, ISO 8601) do not count.
        """
        found: dict[str, Record] = {}
        with self._clear_errors():
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                rows = self._db.execute(
                    f"SELECT record FROM trials WHERE key IN ({', '.join('?' * len(some))}) AND finished >= ? "
                    "ORDER BY finished, id",
                    [*some, since],
                )
                for row in rows:
                    record = Record(**json.loads(row["record"]))
                    found[record.key] = record
        return found

    def trials(self, paper: str | None = None, outcome: str | None = None) -> Iterator[Record]:
        """All trials, oldest first, of one paper or outcome if asked."""
        query, values = "SELECT record FROM trials WHERE 1", []
        for column, value in (("paper", paper), ("outcome", outcome)):
            if value is not None:
                query += f" AND {column} = ?"
                values.append(value)
        with self._clear_errors():
            for row in self._db.execute(query + " ORDER BY finished, id", values):
                yield Record(**json.loads(row["record"]))

    def by_prefix(self, prefix: str) -> Record:
        """The latest trial whose key begins with `prefix`.

        Raises:
            UserError: none, or trials of several keys.
        """
        with self._clear_errors():
            keys = [
                row["key"]
                for row in self._db.execute(
                    "SELECT DISTINCT key FROM trials WHERE substr(key, 1, ?) = ? ORDER BY key LIMIT 5",
                    (len(prefix), prefix),
                )
            ]
        if not keys or not prefix:
            raise UserError(f"no trial has the key {prefix!r}; 'counterproof runs list' shows them")
        if len(keys) > 1:
            raise UserError(f"{prefix!r} is short for several trials: {', '.join(keys)}")
        return self.find(keys)[keys[0]]

    def remove(self, uids: Sequence[str]) -> None:
        """Forget executions."""
        with self._clear_errors(), whole(self._db):
            self._db.executemany("DELETE FROM trials WHERE uid = ?", [(uid,) for uid in uids])

    # journals of other machines

    def export(
        self,
        out: TextIO,
        paper: str | None = None,
        current: bool = False,
        also: Callable[[Record], bool] | None = None,
    ) -> int:
        """Write trials as JSON lines, oldest first.

        Args:
            out: where to.
            paper: only trials that were run for this one, and those that `also` says; None: all.
            current: only those of today's code and versions.
            also: see `counterproof.bench.comparison.belonging`.

        Returns:
            how many.
        """
        count = 0
        for record in self.trials(paper if also is None else None):
            if paper is not None and record.paper != paper and not (also is not None and also(record)):
                continue
            if current and stale_parts(record.parts):
                continue
            out.write(json.dumps(record.as_json(), allow_nan=False) + "\n")
            count += 1
        return count

    def merge(self, lines: Iterable[str], name: str) -> tuple[int, int]:
        """Take in exported trials; all or none.

        Args:
            lines: JSON lines.
            name: of the file, for messages.

        Returns:
            how many were new, and how many were known already.

        Raises:
            UserError: a line that is not a trial, by number, with what was expected.
        """
        new = known = 0
        with self._clear_errors(), whole(self._db):
            for number, line in enumerate(lines, 1):
                if line.strip():
                    if self._insert(read_record(line, f"{name}:{number}")):
                        new += 1
                    else:
                        known += 1
        return new, known

    # leases

    def lease(self, key: str) -> bool:
        """Reserve a key for this driver; False while another driver that is alive has it."""
        now = time.time()
        with self._clear_errors(), whole(self._db):
            row = self._db.execute("SELECT * FROM leases WHERE key = ?", (key,)).fetchone()
            if row is not None and row["owner"] != self._owner and self._alive(row, now):
                return False
            self._db.execute(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)",
                (key, self._owner, self._host, os.getpid(), self._born, now),
            )
        return True

    def _alive(self, row: sqlite3.Row, now: float) -> bool:
        if row["host"] != self._host:
            return bool(now - row["beat"] < STALE_AFTER)
        try:
            return bool(abs(psutil.Process(row["pid"]).create_time() - row["born"]) < 1)
        except psutil.NoSuchProcess:
            return False

    def beat(self) -> None:
        """Say that this driver is alive; call it at least once a minute while trials run."""
        with self._clear_errors():
            self._db.execute("UPDATE leases SET beat = ? WHERE owner = ?", (time.time(), self._owner))

    def release(self, keys: Sequence[str] | None = None) -> None:
        """Give back leases without a result, by default all that this journal holds."""
        with self._clear_errors(), whole(self._db):
            if keys is None:
                self._db.execute("DELETE FROM leases WHERE owner = ?", (self._owner,))
            else:
                own = [(key, self._owner) for key in keys]
                self._db.executemany("DELETE FROM leases WHERE key = ? AND owner = ?", own)

    # fingerprints of the user's own files

    def fingerprint(self, path: Path) -> str:
        """Digest of a file's content, or of a folder's names and contents; a file not touched since is not read again.

        Raises:
            UserError: a path that does not exist or cannot be read.
        """
        try:
            if path.is_file():
                return self._digest(path)
            if not path.is_dir():
                raise UserError(f"{path} does not exist")
            whole = blake2b(digest_size=16)
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    whole.update(f"{file.relative_to(path).as_posix()}\0{self._digest(file)}\0".encode())
            return whole.hexdigest()
        except OSError as problem:
            raise UserError(f"cannot read {problem.filename}: {problem.strerror}") from None

    def _digest(self, file: Path) -> str:
        state = file.stat()
        identity = (str(file.resolve()), state.st_size, state.st_mtime_ns)
        with self._clear_errors():
            row = self._db.execute(
                "SELECT digest FROM fingerprints WHERE path = ? AND size = ? AND modified = ?", identity
            ).fetchone()
        if row is not None:
            return str(row["digest"])
        content = blake2b(digest_size=16)
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        with self._clear_errors():
            self._db.execute(
                "INSERT OR REPLACE INTO fingerprints VALUES (?, ?, ?, ?)", (*identity, content.hexdigest())
            )
        return content.hexdigest()


def read_record(line: str, where: str) -> Record:
    """A trial from a line of an export.

    Raises:
        UserError: naming `where` and what was expected.
    """
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as problem:
        raise UserError(f"{where}: not JSON ({problem.msg}); expected one exported trial a line") from None
    try:
        record = Record(**value)
    except TypeError as problem:
        raise UserError(f"{where}: not an exported trial ({problem})") from None
    for column in fields(Record):
        origin = get_origin(column.type)
        kind: Any = {Mapping: dict, list: list, Literal: str}.get(origin, column.type)
        if not isinstance(getattr(record, column.name), kind):
            raise UserError(f"{where}: {column.name} is {getattr(record, column.name)!r}, not of type {kind.__name__}")
    if record.outcome not in get_args(Outcome):
        raise UserError(f"{where}: unknown outcome {record.outcome!r}; expected one of {', '.join(get_args(Outcome))}")
    if key_of(record.parts) != record.key:
        raise UserError(f"{where}: the key {record.key!r} is not the key of its parts; the line was altered")
    return record
