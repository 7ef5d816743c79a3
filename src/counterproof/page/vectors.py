"""What papers say as vectors: made by MiniLM in a process of its own, kept in the store, searched exactly.

A vector belongs to a model, a length (tokens that are read) and a dimension, and to the text it was made of; it is made
anew when that text changes. The store's table is the truth; beside it may lie a file with the same vectors as one
matrix, which is mapped into memory rather than read, and which may be deleted at any time.
"""

import hashlib
import json
import os
import select
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import MissingExtra, UserError
from counterproof.page.store import Store

__all__ = ["Encoder", "Encodes", "Refreshed", "Vectors", "refresh", "text_of"]

Matrix = NDArray[np.float32]
BATCH = 32  # texts between two commits
TAIL = 2_000  # vectors that are not in the mapped file before it is written again
IDLE = 900.0  # seconds after which the encoder's process ends


class Encodes(Protocol):
    """What makes vectors; `Encoder` does, and in tests anything that has these."""

    model: str
    length: int
    dimension: int

    def encode(self, texts: Sequence[str], timeout: float | None = None) -> Matrix | None:
        """(N, dimension) of length 1; None when it takes longer than `timeout` seconds."""


class Encoder:
    """all-MiniLM-L6-v2 over whole abstracts (512 tokens), in a process that is started when it is needed.

    torch and the model (460 MB of memory) never enter this process. The other one ends after 15 idle minutes, or with
    this one, and is started again when asked. Safe to use from several threads.

    Args:
        idle: seconds without a question after which the process ends.
    """

    model = "all-minilm-l6-v2"
    length = 512
    dimension = 384

    def __init__(self, *, idle: float = IDLE) -> None:
        self.idle = idle
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0
        self._rest = b""

    def start(self) -> None:
        """Begin to load the model, without waiting for it."""
        with self._lock:
            self._ask([])

    def encode(self, texts: Sequence[str], timeout: float | None = None) -> Matrix | None:
        """Vectors of texts.

        Args:
            texts: N of them.
            timeout: seconds to wait; None: as long as it takes. The first call loads the model (some seconds).

        Returns:
            (N, 384) float32 of length 1; None when they did not come in time: ask again later.

        Raises:
            MissingExtra: what the model needs is not installed.
            UserError: the model cannot be fetched or read.
        """
        with self._lock:
            number = self._ask(list(texts))
            while True:
                line = self._line(timeout)
                if line is None:
                    return None
                said = json.loads(line)
                if "missing" in said:
                    raise MissingExtra(said["missing"], said["extra"])
                if "error" in said:
                    raise UserError(said["error"])
                content = self._bytes(4 * said["rows"] * self.dimension)
                if said["number"] == number:  # not the late answer to an earlier question
                    return np.frombuffer(content, dtype=np.float32).reshape(said["rows"], self.dimension)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, texts: list[str]) -> int:
        self._asked += 1
        question = json.dumps({"number": self._asked, "texts": texts}).encode() + b"\n"
        for _ in range(2):
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._rest = b""
                code = f"from counterproof.page.vectors import answer; answer({self.idle!r})"
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(question)
                self._process.stdin.flush()
                break
            except BrokenPipeError:  # it became idle just now
                self._end()
        return self._asked

    def _more(self, timeout: float | None) -> bool:
        """Take in what has come; False when nothing comes in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return False
        part = os.read(self._process.stdout.fileno(), 1 << 20)
        if not part:
            code = self._process.wait()
            self._end()
            raise UserError(f"the process that embeds ended with code {code}; out of memory? it takes 500 MB")
        self._rest += part
        return True

    def _line(self, timeout: float | None) -> bytes | None:
        while b"\n" not in self._rest:
            if not self._more(timeout):
                return None
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _bytes(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._more(None)
        content, self._rest = self._rest[:size], self._rest[size:]
        return content


def answer(idle: float) -> None:
    """What the encoder's process does: a question a line on stdin, answers on stdout, until stdin ends or is idle."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with answers
    rest = b""
    embed: Callable[..., Matrix] | None = None
    while True:
        while b"\n" not in rest:
            if not select.select([0], [], [], idle)[0]:
                return
            part = os.read(0, 1 << 20)
            if not part:
                return
            rest += part
        line, _, rest = rest.partition(b"\n")
        asked = json.loads(line)
        said: dict[str, Any] = {"number": asked["number"]}
        found = np.zeros((0, Encoder.dimension), dtype=np.float32)
        try:
            if embed is None:
                from counterproof.language.embedding import default_encoder
                from counterproof.language.embedding import embed as embed_texts

                folder = default_encoder()

                def embed(texts: Sequence[str], folder: Path = folder) -> Matrix:
                    # Named by its folder it reads as many tokens as it can: 512.
                    return embed_texts(texts, model=folder)

                embed(["loaded"])
            found = embed(asked["texts"]) if asked["texts"] else found
            said["rows"] = len(found)
        except MissingExtra as problem:
            text = str(problem)
            said |= {"missing": problem.name, "extra": text.rpartition("[")[2].partition("]")[0]}
        except UserError as problem:
            said["error"] = str(problem)
        out.write(json.dumps(said).encode() + b"\n")
        out.write(np.ascontiguousarray(found, dtype=np.float32).tobytes())
        out.flush()


def text_of(title: str, abstract: str) -> str:
    """What of a paper becomes a vector."""
    return f"{title}\n{abstract}" if abstract else title


def _digest(title: str, abstract: str) -> bytes:
    return hashlib.blake2b(text_of(title, abstract).encode(), digest_size=12).digest()


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did: vectors made, and papers without an up-to-date one that are left."""

    made: int
    left: int


def refresh(
    store: Store,
    encoder: Encodes,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Refreshed:
    """Make the vectors that are missing or older than their paper's text, the latest papers first.

    Killed at any moment, it has kept all but the last 32.

    Args:
        limit: most vectors to make now; None: all.
        progress: called with the vectors made and to be made.
    """
    key = (encoder.model, encoder.length, encoder.dimension)
    with store.clear_errors():
        stale = [
            row["id"]
            for row in store.db.execute(
                "SELECT id, title, abstract, content FROM papers LEFT JOIN embeddings "
                "ON paper = id AND model = ? AND length = ? AND dimension = ? "
                "WHERE merged_into IS NULL ORDER BY day DESC, id DESC",
                key,
            )
            if row["content"] != _digest(row["title"], row["abstract"])
        ]
    chosen = stale[:limit]
    for begin in range(0, len(chosen), BATCH):
        entries = {paper.id: paper.entry for paper in store.get_all(chosen[begin : begin + BATCH])}
        made = encoder.encode([text_of(entry.title, entry.abstract) for entry in entries.values()])
        assert made is not None
        with store.transaction():
            store.db.executemany(
                "INSERT OR REPLACE INTO embeddings (paper, model, length, dimension, content, vector) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (paper, *key, _digest(entry.title, entry.abstract), vector.astype("<f4").tobytes())
                    for (paper, entry), vector in zip(entries.items(), made, strict=True)
                ],
            )
        if progress is not None:
            progress(min(begin + BATCH, len(chosen)), len(chosen))
    vectors = Vectors(store, encoder)
    if len(vectors.tail) > TAIL:
        vectors.write()
    return Refreshed(len(chosen), len(stale) - len(chosen))


class Vectors:
    """A store's vectors of one model, length and dimension as a matrix, for exact search.

    Args:
        store: where they are.
        shape: the encoder that made them; only its model, length and dimension matter.
    """

    def __init__(self, store: Store, shape: Encodes) -> None:
        self.store = store
        self.key = (shape.model, shape.length, shape.dimension)
        self.kind = np.dtype([("number", "<i8"), ("paper", "<i8"), ("vector", "<f4", (shape.dimension,))])
        name = f"{store.path.name}.{shape.model}-{shape.length}-{shape.dimension}.npy"
        self.path = store.path.with_name(name)
        self.base: NDArray[Any] = np.zeros(0, dtype=self.kind)
        self.tail: NDArray[Any] = np.zeros(0, dtype=self.kind)
        self.papers = np.zeros(0, dtype=np.int64)  # of base, then tail; -1 for one that was made anew since
        self._seen = 0
        self._map()
        self.renew()

    def __len__(self) -> int:
        return int((self.papers >= 0).sum())

    def renew(self) -> None:
        """Take in what was made since; costs next to nothing when nothing was."""
        last = self.store.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'embeddings'").fetchone()
        if last is None or last[0] == self._seen:
            return
        new = self._rows(self._seen)
        self._seen = last[0]
        if len(new):
            self.papers[np.isin(self.papers, new["paper"])] = -1
            self.tail = np.concatenate([self.tail, new])
            self.papers = np.concatenate([self.papers, new["paper"]])

    def search(self, query: Matrix, number: int) -> list[tuple[int, float]]:
        """The papers most like a vector (D,): id and cosine similarity, the most similar first, ties by id."""
        if not len(self.papers) or number < 1:
            return []
        likeness = np.concatenate([part["vector"] @ query for part in (self.base, self.tail)])
        likeness[self.papers < 0] = -np.inf
        number = min(number, len(self))
        least = np.partition(likeness, len(likeness) - number)[len(likeness) - number]
        best = np.flatnonzero((likeness >= least) & (self.papers >= 0))  # more than asked for where some are equal
        order = np.lexsort((self.papers[best], -likeness[best]))[:number]
        return [(int(self.papers[place]), float(likeness[place])) for place in best[order]]

    def of(self, papers: Sequence[int]) -> dict[int, Matrix]:
        """Vectors by paper; those that have none are left out."""
        rows = self.store.db.execute(
            "SELECT paper, vector FROM embeddings WHERE model = ? AND length = ? AND dimension = ? "
            "AND paper IN (SELECT value FROM json_each(?))",
            (*self.key, json.dumps(list(papers))),
        )
        return {row[0]: np.frombuffer(row[1], dtype="<f4") for row in rows}

    def write(self) -> None:
        """Write the file that is mapped; a folder that cannot be written stays as it is, and nothing is lost."""
        part = self.path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as stream:
                header = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": (0,)}
                size = self.store.db.execute(
                    "SELECT count(*) FROM embeddings WHERE model = ? AND length = ? AND dimension = ?", self.key
                ).fetchone()[0]
                np.lib.format.write_array_header_2_0(stream, header | {"shape": (size,)})
                written = 0
                for chunk in self._chunks(0):
                    stream.write(chunk[: size - written].tobytes())  # another process may add some meanwhile
                    written += len(chunk)
            part.replace(self.path)
        except OSError:
            return
        finally:
            part.unlink(missing_ok=True)
        self._map()
        self.renew()

    def _map(self) -> None:
        """Map the file if it says what the table says."""
        empty = np.zeros(0, dtype=self.kind)
        self.base, self.tail, self.papers, self._seen = empty, empty, np.zeros(0, dtype=np.int64), 0
        try:
            base = np.lib.format.open_memmap(self.path, mode="r")
        except (OSError, ValueError, EOFError):  # not there, or cut off
            return
        if base.dtype != self.kind or base.ndim != 1 or not len(base):
            return
        for place in np.linspace(0, len(base) - 1, 16).astype(int):
            row = self.store.db.execute(
                "SELECT paper, vector FROM embeddings WHERE number = ?", (int(base["number"][place]),)
            ).fetchone()
            # A vector that was made anew is no longer there; what is there must be the same.
            if row is not None and (row[0] != base["paper"][place] or row[1] != base["vector"][place].tobytes()):
                return
        papers, numbers = np.array(base["paper"]), np.array(base["number"])
        there = np.fromiter(
            (
                row[0]
                for row in self.store.db.execute(
                    "SELECT number FROM embeddings WHERE model = ? AND length = ? AND dimension = ? AND number <= ?",
                    (*self.key, int(numbers[-1])),
                )
            ),
            dtype=np.int64,
        )
        if len(there) > len(base) or not np.isin(there, numbers).all():  # of another store
            return
        papers[~np.isin(numbers, there)] = -1
        self.base, self.papers, self._seen = base, papers, int(numbers[-1])

    def _rows(self, after: int) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype=self.kind), *self._chunks(after)])

    def _chunks(self, after: int) -> Iterator[NDArray[Any]]:
        rows = self.store.db.execute(
            "SELECT number, paper, vector FROM embeddings WHERE number > ? AND model = ? AND length = ? "
            "AND dimension = ? ORDER BY number",
            (after, *self.key),
        )
        while some := rows.fetchmany(4096):
            chunk = np.zeros(len(some), dtype=self.kind)
            chunk["number"] = [row[0] for row in some]
            chunk["paper"] = [row[1] for row in some]
            chunk["vector"] = np.frombuffer(b"".join(row[2] for row in some), dtype="<f4").reshape(len(some), -1)
            yield chunk
