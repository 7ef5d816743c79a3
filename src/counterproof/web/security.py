"""Who may change what, and what every answer carries: hosts, sizes, rates, headers; sessions, and forms' tokens.

Reading is free. What changes something needs the operator's token (in a session, or as ``Authorization: Bearer``) or a
user's name from a reverse proxy that is trusted to give it. A form is only taken with a token that was given to the
same browser for the same person, and never from another site.
"""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import time
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from counterproof.errors import UserError, extra

with extra("page"):
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "Refused", "Shield", "read_token"]

SESSION, BROWSER = "counterproof-session", "counterproof-browser"  # cookies
LASTS = 30 * 24 * 3600  # seconds of a session
LONGEST_ADDRESS = 16_384  # bytes of path and query
LARGEST_BODY = 65_536
CLIENTS = 10_000  # that are remembered for their rates
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")


class Refused(Exception):
    """A request that is not answered, with the status and a line that says why."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.headers = status, why, headers


def read_token(file: Path | None) -> tuple[str, bool]:
    """The operator's token and whether it is new: out of a file, which is made when it is not there; else a fresh one.

    Raises:
        UserError: a file that cannot be read or made, others may read, or whose token is shorter than 20 letters.
    """
    if file is None:
        return secrets.token_urlsafe(24), True
    try:
        if not file.exists():
            token = secrets.token_urlsafe(24)
            file.touch(mode=0o600, exist_ok=False)
            file.write_text(token + "\n", encoding="ascii")
            return token, True
        if file.stat().st_mode & 0o077:
            raise UserError(f"others may read {file}; make it yours alone: chmod 600 {file}")
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else "not text"
        raise UserError(f"cannot use {file} for the token: {why}") from None
    if not re.fullmatch(r"[!-~]{20,200}", token):
        raise UserError(f"{file} holds no token: 20 to 200 letters, digits and signs on one line; or delete it")
    return token, False


# who


@dataclass(frozen=True)
class Person:
    """Who asks.

    Attributes:
        name: what votes are counted by; None for anybody.
        shown: to themselves.
        session: whether a cookie says so, which a browser sends by itself.
    """

    name: str | None = None
    shown: str = ""
    session: bool = False


class Guard:
    """Knows the operator's token and who is behind a request.

    Args:
        token: the operator's; None: nobody can sign in.
        user_header: of a reverse proxy on this machine that names its users; None: not trusted.
        secure: whether the site is served by https, so that cookies are kept to it.
        now: seconds since 1970.
    """

    def __init__(
        self,
        token: str | None,
        *,
        user_header: str | None = None,
        secure: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.token = token
        self.user_header = user_header
        self.secure = secure
        self.now = now
        # A session ends when the token is changed; without one there is nothing to keep over a restart.
        self._key = hashlib.sha256(f"counterproof sessions {token or secrets.token_hex(32)}".encode()).digest()

    def _mac(self, *parts: str) -> str:
        made = hmac.digest(self._key, "\0".join(parts).encode(), "sha256")
        return urlsafe_b64encode(made[:21]).decode()

    def person(self, request: Request) -> Person:
        """Who asks; nobody in particular, if nothing that is asked proves it."""
        if self.user_header is not None and near(request):
            user = request.headers.get(self.user_header, "").strip()
            if user and len(user) <= 200 and user.isprintable():
                # The proxy vouches for whatever the browser sends, so forms need their token here too.
                return Person(f"user:{user}", user, session=True)
        if self.token is None:
            return Person()
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(given.strip()):
            return Person("operator", "operator")
        until, _, mac = request.cookies.get(SESSION, "").partition(".")
        ours = hmac.compare_digest(mac.encode(), self._mac("session", until).encode())
        if ours and int(until) > self.now():
            return Person("operator", "operator", session=True)
        return Person()

    def is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def sign_in(self, response: Response) -> None:
        until = str(int(self.now()) + LASTS)
        self._set(response, SESSION, f"{until}.{self._mac('session', until)}", LASTS)

    def sign_out(self, response: Response) -> None:
        response.delete_cookie(SESSION, path="/")

    def _set(self, response: Response, name: str, value: str, age: int | None) -> None:
        response.set_cookie(name, value, max_age=age, path="/", secure=self.secure, httponly=True, samesite="lax")

    # forms

    def form_token(self, request: Request) -> str:
        """What a form carries; also has the browser's cookie set, see `finish`."""
        browser = request.cookies.get(BROWSER, "")
        if not re.fullmatch(r"[A-Za-z0-9_-]{32}", browser):
            browser = getattr(request.state, "browser", None) or secrets.token_urlsafe(24)
            request.state.browser = browser
        return self._mac("form", browser, self.person(request).name or "")

    def finish(self, request: Request, response: Response) -> None:
        """Set the browser's cookie if a form needs it."""
        browser = getattr(request.state, "browser", None)
        if browser is not None:
            self._set(response, BROWSER, browser, None)

    def check_form(self, request: Request, given: str) -> None:
        """
        Raises:
            Refused: the form does not come from a page that this browser was given.
        """
        browser = request.cookies.get(BROWSER, "")
        expected = self._mac("form", browser, self.person(request).name or "")
        if not browser or not hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode()):
            raise Refused(403, "this form is out of date, or cookies are off; go back, load the page again, and repeat")

    def require(self, request: Request, form: Mapping[str, str] | None) -> Person:
        """Who may change something.

        Args:
            request: what is asked.
            form: what was sent; None where no form is (then only a token in the header will do).

        Raises:
            Refused: nobody in particular, or a forged form.
        """
        who = self.person(request)
        if who.name is None:
            raise Refused(401, "sign in with the operator's token first", {"www-authenticate": "Bearer"})
        if who.session:
            self.check_form(request, (form or {}).get("csrf", ""))
        return who


def near(request: Request) -> bool:
    """Whether the other end of the line is this machine."""
    try:
        return request.client is None or ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def client_of(scope: Scope, proxied: bool) -> str:
    """Whose request it is, for rates: an address, of IPv6 its /64.

    Args:
        scope: of ASGI.
        proxied: whether a proxy on this machine adds the client's address to ``X-Forwarded-For``.
    """
    host = scope["client"][0] if scope.get("client") else "local"
    if proxied and _loopback(host):
        host = Headers(scope=scope).get("x-forwarded-for", host).split(",")[-1].strip() or host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)[:60]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), 64), strict=False).network_address)
    return str(address)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "local"


# rates


@dataclass
class Bucket:
    """So many at once, and so many a second after that, for each client.

    Attributes:
        rate: a second.
        burst: at once.
    """

    rate: float
    burst: float
    now: Callable[[], float] = time.monotonic
    _left: "OrderedDict[str, tuple[float, float]]" = field(default_factory=OrderedDict)

    def take(self, client: str, cost: float = 1.0) -> float:
        """Seconds to wait before the next; 0 when this one may pass."""
        present = self.now()
        left, since = self._left.get(client, (self.burst, present))
        left = min(self.burst, left + max(present - since, 0.0) * self.rate)
        wait = 0.0 if left >= cost else (cost - left) / self.rate
        self._left[client] = (left if wait else left - cost, present)
        self._left.move_to_end(client)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return wait


# around everything


class Shield:
    """Around the application: refuses what is too long, too much, too often, or meant for another host; adds headers.

    Args:
        app: what is served.
        hosts: names that the site answers to, without port, lower case.
        reads: rate of reading for clients that are not this machine.
        writes: rate of what changes something, for everybody.
        proxied: see `client_of`.
        origin: of the site as its readers see it, where that is known: ``https://papers.example``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        reads: Bucket,
        writes: Bucket,
        proxied: bool = False,
        origin: str | None = None,
    ) -> None:
        self.app, self.hosts, self.reads, self.writes = app, hosts, reads, writes
        self.proxied, self.origin = proxied, origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "private, no-cache")
            await send(message)

        try:
            scope["client_name"] = client_of(scope, self.proxied)
            self.check(scope)
            await self.app(scope, self._bounded(scope, receive), with_headers)
        except Refused as problem:
            if begun:
                raise
            await refusal(scope, problem)(scope, receive, with_headers)

    def check(self, scope: Scope) -> None:
        """
        Raises:
            Refused: see the class.
        """
        headers = Headers(scope=scope)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_ADDRESS:
            raise Refused(414, f"the address is longer than {LONGEST_ADDRESS:,} bytes; a search needs a few words")
        if host_name(headers.get("host", "")) not in self.hosts:
            raise Refused(421, "this server does not answer to that name; the operator can add it: serve --page URL")
        if scope["method"] in UNSAFE:
            size = headers.get("content-length", "0")
            if not size.isdigit() or int(size) > LARGEST_BODY:
                raise Refused(413, f"more than {LARGEST_BODY:,} bytes were sent")
            wait = self.writes.take(scope["client_name"])
            self._same_site(scope, headers)
        else:
            client = scope["client_name"]
            wait = 0.0 if _loopback(client) else self.reads.take(client, 5.0 if "search" in scope["path"] else 1.0)
        if wait:
            seconds = str(int(wait) + 1)
            raise Refused(429, f"too many requests; try again in {seconds} s", {"retry-after": seconds})

    def _same_site(self, scope: Scope, headers: Headers) -> None:
        """Browsers say where a form comes from; programs that send none, such as mail clients, cannot be misled."""
        if re.fullmatch(r"/(un)?(subscribe|confirm)/[^/]+", scope["path"]):  # the address itself is the permission
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        own = {f"http://{headers.get('host')}", f"https://{headers.get('host')}", self.origin}
        if site in ("cross-site", "same-site") or (origin is not None and origin not in own):
            raise Refused(403, "this form was sent from another site")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """What is sent in pieces may not be more than it said either."""
        came = 0

        async def bounded() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > LARGEST_BODY:
                raise Refused(413, f"more than {LARGEST_BODY:,} bytes were sent")
            return message

        return bounded


def host_name(host: str) -> str:
    """Of a Host header, without port and the brackets of IPv6."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if re.fullmatch(r"[\w.:\[\]-]{1,255}", host) else ""
    except ValueError:
        return ""


def refusal(scope: Scope, problem: Refused) -> Response:
    """A line as JSON for programs, as a page for readers."""
    headers = {**(problem.headers or {}), "cache-control": "no-store"}
    if scope["path"].startswith("/api/"):
        return Response(json.dumps({"error": problem.why}), problem.status, headers, "application/json")
    body = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{problem.status}</title><h1>{problem.status}</h1><p>{escape(problem.why)}</p>"
        '<p><a href="/">Back to the page</a></p></html>'
    )
    return Response(body, problem.status, headers, "text/html")
