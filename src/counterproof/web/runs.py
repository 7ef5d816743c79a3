"""Checks that are started from the page: one at a time, in a process of their own, followed line by line.

A check is ``counterproof check`` in a subprocess. It goes on whatever becomes of the browser that started it; stopping
it is an interrupt, so finished trials are kept and the same check goes on from there.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any, Literal

from counterproof.errors import MissingExtra, UserError, require
from counterproof.page.catalogue import find_paper, nearest
from counterproof.page.store import stamp, utc_now

__all__ = ["Busy", "Check", "Checks"]

LINES = 400  # of a check that are kept
PAST = 20  # checks that are remembered
PATIENCE = 20.0  # seconds between an interrupt and the end by force
State = Literal["running", "stopping", "done", "stopped", "failed"]


class Busy(UserError):
    """Another check, or the same, is running."""


@dataclass
class Check:
    """One check.

    Attributes:
        number: counts from 1.
        paper, claim: what is checked; claim empty for all of them.
        budget: quick, standard, full.
        by: who started it.
        state: ``done`` whatever the verdicts; ``failed`` when a trial or the command failed.
        lines: what it said, the last ones.
        verdicts: what came out, a JSON object for each claim.
        code: of the process, at its end.
    """

    number: int
    paper: str
    claim: str
    budget: str
    by: str
    started: str
    state: State = "running"
    lines: "deque[str]" = field(default_factory=lambda: deque(maxlen=LINES))
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    finished: str | None = None
    code: int | None = None

    @property
    def target(self) -> str:
        return f"{self.paper}/{self.claim}" if self.claim else self.paper

    def as_json(self, lines: int = 60) -> dict[str, Any]:
        kept = ("paper", "claim", "says", "metric", "verdict", "effect", "interval", "seeds", "seconds", "budget")
        return {
            "number": self.number,
            "target": self.target,
            "paper": self.paper,
            "claim": self.claim,
            "budget": self.budget,
            "state": self.state,
            "started": self.started,
            "finished": self.finished,
            "code": self.code,
            "lines": list(self.lines)[-lines:],
            "verdicts": [{name: one.get(name) for name in kept} for one in self.verdicts],
        }


class Checks:
    """Starts, stops and follows checks.

    Args:
        jobs: trials at a time; None: as the command does.
        command: what is run before the check's own words; default this Python's ``counterproof``.
        clock: gives the present.
    """

    def __init__(
        self,
        *,
        jobs: int | None = None,
        command: Sequence[str] = (sys.executable, "-m", "counterproof"),
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.jobs, self.command, self.clock = jobs, tuple(command), clock
        self.version = 0  # goes up with everything that happens
        self.past: deque[Check] = deque(maxlen=PAST)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._count = 0

    @property
    def current(self) -> Check | None:
        """The one that is running."""
        with self._lock:
            return self.past[-1] if self.past and self.past[-1].state in ("running", "stopping") else None

    def start(self, paper: str, claim: str, budget: str, by: str) -> Check:
        """Start a check.

        Raises:
            Busy: one is running.
            UserError: a paper, claim or budget that is not there.
        """
        found = find_paper(paper)
        if found.status != "runs":
            raise UserError(f"{paper} is planned: its card is here, its method is not yet")
        try:
            if found.package.startswith("counterproof."):
                require(found.room)
            claims = {one.name: one for one in found.claims}
        except MissingExtra as problem:
            raise UserError(str(problem)) from None
        if claim and claim not in claims:
            raise UserError(f"{paper} has no claim {claim[:80]!r}{nearest(claim, list(claims))}")
        chosen = [claims[claim]] if claim else list(claims.values())
        budgets = [name for name in chosen[0].task.budgets if all(name in one.task.budgets for one in chosen)]
        if budget not in budgets:
            raise UserError(f"no budget {budget[:40]!r}; budgets: {', '.join(budgets)}")
        with self._lock:
            if self.past and self.past[-1].state in ("running", "stopping"):
                running = self.past[-1]
                raise Busy(f"{running.target} is running; one check runs at a time")
            self._count += 1
            check = Check(self._count, found.slug, claim, budget, by, stamp(self.clock()))
            words = [*self.command, "check", check.target, "--budget", budget, "--json"]
            words += ["--jobs", str(self.jobs)] if self.jobs else []
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # an interrupt of the server's terminal is not the check's
            )
            self.past.append(check)
            self._process = process
            self.version += 1
        threading.Thread(target=self._follow, args=(check, process), name=f"check {check.number}", daemon=True).start()
        return check

    def stop(self, number: int | None = None) -> bool:
        """Interrupt the check that is running, or the one of that number if it is; whether there was one."""
        with self._lock:
            check = self.past[-1] if self.past else None
            process = self._process
            if check is None or process is None or check.state != "running" or number not in (None, check.number):
                return False
            check.state = "stopping"
            self.version += 1
            process.send_signal(signal.SIGINT)
        timer = threading.Timer(PATIENCE, self._end, (process,))
        timer.daemon = True
        timer.start()
        return True

    @staticmethod
    def _end(process: "subprocess.Popen[str]") -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def close(self, patience: float = PATIENCE) -> None:
        """Stop what is running and wait for it; what is finished of it is kept."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self.stop()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            self._end(process)
            process.wait()

    def _follow(self, check: Check, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        assert process.stderr is not None

        def answers(stream: IO[str]) -> None:
            for line in stream:
                try:
                    said = json.loads(line)
                except ValueError:
                    said = None
                with self._lock:
                    if isinstance(said, dict) and "verdict" in said:
                        check.verdicts.append(said)
                    else:
                        check.lines.append(line.rstrip()[:2000])
                    self.version += 1

        reading = threading.Thread(target=answers, args=(process.stdout,), daemon=True)
        reading.start()
        for line in process.stderr:
            with self._lock:
                check.lines.append(line.rstrip()[:2000])
                self.version += 1
        reading.join()
        code = process.wait()
        with self._lock:
            check.code, check.finished = code, stamp(self.clock())
            asked = check.state == "stopping"
            check.state = "done" if code == 0 else "stopped" if asked else "failed"
            self.version += 1
