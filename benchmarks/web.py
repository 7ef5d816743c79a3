"""The page served over made-up papers: time of each kind of page, readers at once, feeds, memory.

    .venv/bin/python benchmarks/web.py [--quick] [--json FILE]

The server is a process of its own, `counterproof serve` as it is; papers and vectors are those of benchmarks/page.py.
Requests are made by a client of this file, over connections that are kept: first one at a time, for the time of a page
(wall milliseconds of the 50th and 99th in a hundred, and the server's processor time per page, which other work on the
machine changes less; each page asked for the first time, then again), then by 200 readers at once, each of whom asks
for one page after the other: by wrk where it is installed (apt install wrk), else by this file's client. The goals are
half of them in 15 ms (searches by words and meaning: 40, with the query's vector made in another process, whose time
is in the wall time only), no error, 400 MB of the server, the file of vectors that it maps among them.
"""

import asyncio
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import psutil
from _contest import Row, run

from counterproof.page.vectors import Encoder
from page import Corpus, add_vectors, against, alone, filled

READERS = 200


class Line:
    """A connection that is kept."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, address: str) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(f"GET {address} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
        body = await reader.readexactly(size)
        if b"connection: close" in head.lower():
            writer.close()
            self.streams = None
        return int(head.split(b" ", 2)[1]), body

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()


async def one_by_one(port: int, addresses: Sequence[str]) -> list[float]:
    """Milliseconds of each."""
    line, took = Line(port), []
    for address in addresses:
        began = time.perf_counter()
        status, _ = await line.get(address)
        took.append(1000 * (time.perf_counter() - began))
        assert status == 200, f"{status} {address}"
    line.close()
    return took


async def at_once(port: int, addresses: Sequence[str], seconds: float) -> tuple[list[float], int]:
    """Milliseconds of what was answered, and how many were not."""
    took: list[float] = []
    errors = 0
    turn = itertools.cycle(addresses)
    end = time.perf_counter() + seconds

    async def reader() -> None:
        nonlocal errors
        line = Line(port)
        while time.perf_counter() < end:
            began = time.perf_counter()
            try:
                status, _ = await asyncio.wait_for(line.get(next(turn)), 30)
                errors += status != 200
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                errors += 1
                line = Line(port)
            took.append(1000 * (time.perf_counter() - began))
        line.close()

    await asyncio.gather(*(reader() for _ in range(READERS)))
    return took, errors


SCRIPT = """
local addresses, turn = {}, 0
for line in io.lines("%s") do addresses[#addresses + 1] = line end
request = function()
  turn = turn %% #addresses + 1
  return wrk.format("GET", addresses[turn])
end
done = function(summary, latency, requests)
  local wrong = summary.errors
  local errors = wrong.connect + wrong.read + wrong.write + wrong.status + wrong.timeout
  print(string.format("said %%d %%d %%f %%f", summary.requests, errors, latency:percentile(50), latency:percentile(99)))
end
"""


def by_wrk(port: int, addresses: Sequence[str], seconds: int) -> tuple[int, int, float, float]:
    """Requests, errors, and milliseconds of the 50th and 99th in a hundred."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "addresses").write_text("\n".join(addresses) + "\n")
        script = Path(folder) / "script.lua"
        script.write_text(SCRIPT % (Path(folder) / "addresses"))
        command = ["wrk", "-t", "1", "-c", str(READERS), "-d", f"{seconds}s", "--timeout", "30s", "-s", script]
        said = subprocess.run([*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"said (\d+) (\d+) (\S+) (\S+)", said)
    assert found, said
    return int(found[1]), int(found[2]), float(found[3]) / 1000, float(found[4]) / 1000


def share(took: Sequence[float], part: float) -> float:
    return sorted(took)[min(int(part * len(took)), len(took) - 1)]


def contests(quick: bool, _seconds: float) -> Iterator[Row]:
    number = 10_000 if quick else 100_000
    size = f"{number:,}"
    corpus = Corpus(number, end=datetime.now(UTC))
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "page.sqlite"
        filled(path, corpus)
        add_vectors(path, corpus, Encoder.model)
        entries = list(itertools.islice(corpus.entries(), 3000))[:: 30 if quick else 10]
        kinds = {
            "a day": [f"/day/{entry.published}" for entry in entries],
            "latest": ["/latest"] * len(entries),
            "trending": ["/trending"] * len(entries),
            "a paper": [f"/paper/arxiv/{entry.arxiv}" for entry in entries],
            "a search by words": [f"/search?how=words&q={quote(text)}" for text in corpus.queries(len(entries))],
            "a search by both": [f"/search?q={quote(text)}" for text in corpus.queries(len(entries), seed=2)],
            "an Atom feed": ["/latest.atom"] * len(entries),
        }
        environment = {**os.environ, "COUNTERPROOF_HOME": home, "OMP_NUM_THREADS": "1"}
        command = "from counterproof.web.commands import commands; commands(['serve', '--port', '0'])"
        server = subprocess.Popen([sys.executable, "-c", command], env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            port = int(re.search(r":(\d+);", server.stderr.readline())[1])  # type: ignore[index]
            while b'"measured":true' not in asyncio.run(Line(port).get("/api/v1/status"))[1].replace(b" ", b""):
                time.sleep(1)
            process = psutil.Process(server.pid)
            asyncio.run(one_by_one(port, ["/search?q=model"] * 3))  # the first loads the model that reads queries
            time.sleep(20)
            for name, addresses in kinds.items():
                for turn in ("first", "again"):
                    before = sum(process.cpu_times()[:2])
                    took = asyncio.run(one_by_one(port, addresses))
                    spent = 1000 * (sum(process.cpu_times()[:2]) - before) / len(took)
                    goal = 40 if name == "a search by both" else 15
                    yield against(f"{name}, {turn}: p50", size, share(took, 0.5), goal)
                    yield against(f"{name}, {turn}: CPU, mean", size, spent, goal)
                    yield alone(f"{name}, {turn}: p99", size, share(took, 0.99), "ms")
            mixed = [one for several in zip(*kinds.values()) for one in several]
            seconds = 5 if quick else 20
            if shutil.which("wrk"):
                asked, errors, half, slow = by_wrk(port, mixed, seconds)
                peer = "wrk"
            else:
                took, errors = asyncio.run(at_once(port, mixed, seconds))
                asked, half, slow, peer = len(took), share(took, 0.5), share(took, 0.99), "this file's client"
            yield alone(f"{READERS} readers: errors", size, errors, f"of {asked}", peer)
            yield alone(f"{READERS} readers: p50", size, half, "ms", peer)
            yield alone(f"{READERS} readers: p99", size, slow, "ms", peer)
            yield alone(f"{READERS} readers: pages", size, asked / seconds, "/s", peer)
            yield against("memory of the server", size, process.memory_info().rss / 2**20, 400, "MiB")
        finally:
            server.terminate()
            server.wait(20)


if __name__ == "__main__":
    run(__doc__ or "", contests)
