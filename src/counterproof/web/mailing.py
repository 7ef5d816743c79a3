"""Mail out of the served page: what waits in the outbox is sent when somebody asks for the digest, and every minute.

The sending is ``counterproof feed send`` in a process of its own, with that command's settings from the environment, so
that a mail server that is slow holds up no page, and only one of all senders works at a time.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from counterproof.errors import UserError
from counterproof.page.outbox import due
from counterproof.page.store import Store
from counterproof.web.site import Site

__all__ = ["Mailing"]

log = logging.getLogger("counterproof.web")
EVERY = 60.0  # seconds between two looks into the outbox


class Mailing:
    """Sends in a thread of its own; what goes wrong is a line in the log, and is tried again at the next look.

    Args:
        site: whose outbox.
        command: how Counterproof is called.
        every: seconds between two looks.
    """

    def __init__(
        self, site: Site, *, command: Sequence[str] = (sys.executable, "-m", "counterproof"), every: float = EVERY
    ) -> None:
        self.site, self.command, self.every = site, tuple(command), every
        self._woken = threading.Event()
        self._closing = False
        self._said = ""

    def start(self, page: str) -> None:
        """Begin; `page` is the site's address, for the links of mails."""
        self._environment = {**os.environ, "COUNTERPROOF_PAGE_URL": page}
        threading.Thread(target=self._work, name="mailing", daemon=True).start()

    def wake(self) -> None:
        """Look into the outbox now."""
        self._woken.set()

    def close(self) -> None:
        """End. A sender that is at work goes on to its own end: cut off, it would not know what has arrived."""
        self._closing = True
        self._woken.set()

    def _work(self) -> None:
        while not self._closing:
            self._woken.clear()
            try:
                self._send()
            except (UserError, OSError) as problem:
                self._say(str(problem))
            self._woken.wait(self.every)

    def _send(self) -> None:
        if not self.site.path.exists():
            return
        store = Store(self.site.path, clock=self.site.clock, read_only=True)
        try:
            if not due(store):
                return
        finally:
            store.close()
        done = subprocess.run(
            [*self.command, "feed", "send"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # an interrupt of the server's terminal must not cut a message off
        )
        self._say(" ".join(done.stderr.split())[-1000:] if done.returncode else "")

    def _say(self, problem: str) -> None:
        """Once for each change: a server that is away for a night is one line."""
        if problem and problem != self._said:
            log.warning("mail waits: %s", problem)
        self._said = problem
