"""The application: pages and interface behind the shield, and the server that runs it."""

import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from counterproof.errors import MissingExtra, UserError, extra
from counterproof.page.store import utc_now
from counterproof.page.vectors import Encodes
from counterproof.web.api import Interface, failure
from counterproof.web.mailing import Mailing
from counterproof.web.pages import Pages
from counterproof.web.runs import Checks
from counterproof.web.security import Bucket, Guard, Refused, Shield, host_name
from counterproof.web.site import Site

with extra("page"):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

__all__ = ["Application", "Settings", "build", "serve"]

log = logging.getLogger("counterproof.web")
LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Settings:
    """How the page is served.

    Attributes:
        path: the store's file; None: where it always is.
        host, port: where it listens.
        page: its address as its readers see it; None: that of host and port.
        names: further names that it answers to.
        token: the operator's; None: nobody can sign in.
        user_header: in which a reverse proxy on this machine names its user.
        allow_runs: whether checks are started from the page.
        jobs: trials at a time of such a check.
        send_mail: whether the outbox is emptied from here.
        reads, writes: requests a second of a client; of what changes something.
    """

    path: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8642
    page: str | None = None
    names: tuple[str, ...] = ()
    token: str | None = None
    user_header: str | None = None
    allow_runs: bool = False
    jobs: int | None = None
    send_mail: bool = False
    reads: float = 10.0
    writes: float = 1.0

    def __post_init__(self) -> None:
        if self.page is not None:
            try:
                parts = urlsplit(self.page)
                good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.path in ("", "/")
                good = good and not (parts.query or parts.fragment or parts.username) and parts.port != 0
            except ValueError:
                good = False
            if not good:
                raise UserError(f"{self.page[:100]!r} is no address of a site; expected one as https://papers.example")
            object.__setattr__(self, "page", self.page.rstrip("/"))
        if self.host in EVERYWHERE and self.page is None and not self.names:
            raise UserError("say under which address the page is reached: --page https://papers.example")

    @property
    def hosts(self) -> frozenset[str]:
        """Names that the site answers to."""
        named = [urlsplit(self.page).hostname or ""] if self.page else []
        own = [] if self.host in EVERYWHERE else [self.host.strip("[]")]
        found = [*LOCAL, *own, *named, *(host_name(name) for name in self.names)]
        return frozenset(name.lower() for name in found if name)


@dataclass
class Application:
    """What is served, and what it is made of."""

    app: ASGIApp
    site: Site
    pages: Pages
    checks: Checks | None
    mailing: Mailing | None


def build(
    settings: Settings,
    *,
    clock: Callable[[], datetime] = utc_now,
    encoder: Encodes | None = None,
    checks: Checks | None = None,
    mailing: Mailing | None = None,
    warm: bool = True,
) -> Application:
    """The application for these settings.

    Args:
        settings: see there.
        clock: gives the present.
        encoder: makes queries' vectors; default MiniLM in a process of its own.
        checks, mailing: over the settings' own.
        warm: whether to read at the start, in a thread, what takes seconds.
    """
    site = Site(settings.path, clock=clock, encoder=encoder)
    secure = (settings.page or "").startswith("https://")
    guard = Guard(settings.token, user_header=settings.user_header, secure=secure)
    checks = checks or (Checks(jobs=settings.jobs, clock=clock) if settings.allow_runs else None)
    mailing = mailing or (Mailing(site) if settings.send_mail else None)
    pages = Pages(site, guard, checks, mailing, base=settings.page, version=version("counterproof"))
    interface = Interface(pages)

    def answer(request: Request, wrong: Exception) -> Response:
        if isinstance(wrong, HTTPException):
            words = {404: "there is no such page", 405: "that cannot be done here"}
            wrong = Refused(wrong.status_code, words.get(wrong.status_code, wrong.detail), wrong.headers)
        if request.url.path.startswith("/api/"):
            return failure(wrong)
        if isinstance(wrong, Refused) and wrong.status == 404:
            return pages.missing(request)
        return pages.problem(request, wrong)

    async def broken(request: Request, wrong: Exception) -> Response:
        return answer(request, RuntimeError())  # its trace goes to the log, never to the client

    def prepare() -> None:
        problem = site.add_cards()
        if problem is not None:
            log.warning("nothing can be changed here: %s", problem)
        try:
            pages.warm()
        except (UserError, MissingExtra) as wrong:
            log.warning("what was measured cannot be read: %s", wrong)

    @asynccontextmanager
    async def living(app: Starlette) -> AsyncIterator[None]:
        if warm:
            threading.Thread(target=prepare, name="prepare", daemon=True).start()
        try:
            yield
        finally:
            if checks is not None:
                checks.close()
            if mailing is not None:
                mailing.close()
            site.close()

    kinds: dict[Any, Any] = dict.fromkeys((HTTPException, Refused, UserError, MissingExtra), answer)
    app = Starlette(
        routes=[*interface.routes(), *pages.routes()], exception_handlers={**kinds, Exception: broken}, lifespan=living
    )
    shield = Shield(
        app,
        hosts=settings.hosts,
        reads=Bucket(settings.reads, 20 * settings.reads),
        writes=Bucket(settings.writes, 30 * settings.writes),
        proxied=settings.user_header is not None or settings.page is not None,
        origin=settings.page,
    )
    return Application(shield, site, pages, checks, mailing)


def serve(settings: Settings, *, ready: Callable[[str], None] | None = None) -> None:
    """Serve until interrupted.

    Args:
        settings: how.
        ready: called with the page's address once requests are taken.

    Raises:
        UserError: the port is taken or may not be used.
    """
    application = build(settings)
    config = uvicorn.Config(
        application.app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=262_144,  # so that a long address gets an answer that says so
        limit_concurrency=2_000,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
    )

    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=2048)
        # asyncio does it only for sockets that were made by name of the protocol; without it an answer waits 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as problem:
        why = problem.strerror or problem
        raise UserError(
            f"cannot listen on {settings.host}:{settings.port}: {why}; --port 0 takes one that is free"
        ) from None

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.started:
                return
            shown = f"[{settings.host.strip('[]')}]" if ":" in settings.host else settings.host
            page = settings.page or f"http://{shown}:{listening.getsockname()[1]}"
            if application.mailing is not None:
                application.mailing.start(page)
            if ready is not None:
                ready(page)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            application.pages.closing = True  # who follows a check is let go
            super().handle_exit(sig, frame)

    with listening, suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listening])
