"""Getting what an address holds, from servers that may be slow, broken or hostile.

One fetcher for every source: it keeps each host's pace, asks again when that may help, follows redirects by hand, and
reads no more than it was told to. Addresses of this machine or its network are refused unless allowed: the name is
looked up once, what it stands for is checked, and the connection goes to just that address.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from types import MappingProxyType
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from counterproof.errors import UserError
from counterproof.page.store import utc_now

__all__ = ["FetchError", "Fetched", "Fetcher"]

# Seconds between two requests to a host and its subdomains together; arXiv's terms ask for three.
PACE: Mapping[str, float] = MappingProxyType({"arxiv.org": 3.0, "semanticscholar.org": 1.0, "huggingface.co": 0.5})
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
MOVED = frozenset({301, 302, 303, 307, 308})
CONTACT = "https://pypi.org/project/counterproof/"
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(UserError):
    """An address that could not be had.

    Attributes:
        status: what the server answered, or None where it did not come to that.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Passing(Exception):
    """What may go better the next time; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None, status: int | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        self.status = status


@dataclass(frozen=True)
class Fetched:
    """What came.

    Attributes:
        url: where it was in the end, after redirects.
        body: decompressed; empty when nothing is new.
        content_type: as the server says, with its parameters; empty when it says none.
        etag, modified: for the next `Fetcher.get`; None when the server gives none.
        unchanged: the server says that it is what `etag` or `modified` stood for.
    """

    url: str
    body: bytes
    content_type: str = ""
    etag: str | None = None
    modified: str | None = None
    unchanged: bool = False

    @property
    def charset(self) -> str | None:
        """What the server says the text is written in."""
        found = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", self.content_type, re.IGNORECASE)
        return found[1] if found else None


class Fetcher:
    """Gets addresses, one request at a time.

    Args:
        timeout: seconds for one request, from looking up the name to the last byte.
        idle: seconds in which something must come.
        cap: most bytes of an answer, on the wire and decompressed.
        tries: most requests for an address, redirects not counted.
        redirects: most redirects followed.
        back_off: seconds before the second try; doubles with every further one.
        patience: most seconds that a server may ask to wait; one that asks for more is an error that says when.
        pace: seconds between two requests, by host, its subdomains included; ``*`` for every other host.
        allow_private: also get addresses of this machine and of private networks.
        clock, sleep: monotonic seconds, and waiting; a test may give its own.
        now: the present, for a ``Retry-After`` that is a date.
        resolve: what ``socket.getaddrinfo`` does.
        agent: who asks; default Counterproof, its version and where to complain.
    """

    def __init__(
        self,
        *,
        timeout: float = 60.0,
        idle: float = 20.0,
        cap: int = 64 << 20,
        tries: int = 4,
        redirects: int = 5,
        back_off: float = 2.0,
        patience: float = 120.0,
        pace: Mapping[str, float] = PACE,
        allow_private: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        now: Callable[[], datetime] = utc_now,
        resolve: Callable[..., Sequence[tuple[object, ...]]] = socket.getaddrinfo,
        agent: str | None = None,
    ) -> None:
        self.timeout = timeout
        self.idle = idle
        self.cap = cap
        self.tries = tries
        self.redirects = redirects
        self.back_off = back_off
        self.patience = patience
        self.pace = pace
        self.allow_private = allow_private
        self.clock = clock
        self.sleep = sleep
        self.now = now
        self.resolve = resolve
        self.agent = agent or f"counterproof/{version('counterproof')} (+{CONTACT})"
        self.requests = 0
        self._free: dict[str, float] = {}  # when a host may be asked again, by the clock
        self._one = threading.Lock()  # arXiv allows one connection; nobody needs more

    def get(
        self,
        url: str,
        *,
        etag: str | None = None,
        modified: str | None = None,
        accept: str = "*/*",
        allow_private: bool | None = None,
    ) -> Fetched:
        """What an http or https address holds.

        Args:
            url: the address.
            etag, modified: of the last time: only what changed since is asked for.
            accept: media types, as the header has them.
            allow_private: over the fetcher's own, for this address and its redirects.

        Raises:
            FetchError: a bad or refused address, a server that keeps failing or says no, an answer that is too large
                or breaks off, too many redirects; the message says which.
        """
        private = self.allow_private if allow_private is None else allow_private
        headers = {"User-Agent": self.agent, "Accept": accept, "Accept-Encoding": "gzip", "Connection": "close"}
        for name, value in (("If-None-Match", etag), ("If-Modified-Since", modified)):
            if value is not None:
                headers[name] = value
        with self._one:
            attempt = 1
            while True:
                try:
                    return self._follow(url, headers, private)
                except _Passing as problem:
                    if attempt >= self.tries:
                        times = f"after {attempt} tries" if attempt > 1 else "at the first try"
                        raise FetchError(f"{url}: {problem}, {times}; try again later", problem.status) from None
                    wait = self.back_off * 2 ** (attempt - 1)
                    if problem.wait is not None:
                        if problem.wait > self.patience:
                            raise FetchError(
                                f"{url}: {problem}, and asks to wait {problem.wait:.0f} seconds; try again then",
                                problem.status,
                            ) from None
                        wait = max(wait, problem.wait)
                    self.sleep(wait)
                    attempt += 1

    def _follow(self, url: str, headers: Mapping[str, str], private: bool) -> Fetched:
        """One try: the address, and what it redirects to."""
        here, seen = url, [url]
        while True:
            answer = self._ask(here, headers, private)
            if isinstance(answer, Fetched):
                return answer
            here = urljoin(here, answer)
            if here in seen:
                raise FetchError(f"{url}: redirects in a circle, back to {here}")
            if len(seen) > self.redirects:
                raise FetchError(f"{url}: more than {self.redirects} redirects, the last to {here}")
            seen.append(here)

    def _ask(self, url: str, headers: Mapping[str, str], private: bool) -> Fetched | str:
        """One request; the address of a redirect, or the answer."""
        scheme, host, port, target = _parts(url)
        addresses = self._addresses(url, host, port, private)
        self._keep_pace(host)
        self.requests += 1
        deadline = _Deadline(self.timeout)
        connection = _Pinned(scheme, host, port, addresses, min(self.idle, self.timeout), deadline)
        try:
            connection.request("GET", target, headers=dict(headers))
            response = connection.getresponse()
            deadline.check()
            return self._answer(url, response, deadline, conditional=len(headers) > 4)
        except TimeoutError:
            waited = self.timeout if deadline.over else min(self.idle, self.timeout)
            raise _Passing(f"nothing more came within {waited:g} seconds") from None
        except ssl.SSLCertVerificationError as problem:
            raise FetchError(f"{url}: its certificate is not valid ({problem.verify_message})") from None
        except http.client.IncompleteRead:
            raise _Passing(deadline.reason or "the answer breaks off") from None
        except http.client.HTTPException as problem:
            raise _Passing(deadline.reason or f"no proper HTTP ({type(problem).__name__})") from None
        except OSError as problem:
            raise _Passing(deadline.reason or f"the connection failed ({problem.strerror or problem})") from None
        finally:
            deadline.cancel()
            connection.close()

    def _answer(
        self, url: str, response: http.client.HTTPResponse, deadline: "_Deadline", *, conditional: bool
    ) -> Fetched | str:
        status = response.status
        etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        if status == 304 and conditional:
            return Fetched(url, b"", "", etag, modified, unchanged=True)
        if status in MOVED:
            target = response.headers.get("Location", "").strip()
            if not target:
                raise FetchError(f"{url}: redirects ({status}) without saying where", status)
            # What a header holds beyond ASCII is UTF-8 in practice, and http.client reads it as Latin-1.
            return target.encode("latin-1", "replace").decode("utf-8", "replace")
        if status in AGAIN:
            wait = self._asked_to_wait(response.headers.get("Retry-After"))
            raise _Passing(f"the server answered {status} {response.reason}".rstrip(), wait, status)
        if status != 200:
            raise FetchError(f"{url}: the server answered {status} {response.reason}".rstrip(), status)
        if response.length is not None and response.length > self.cap:
            raise FetchError(f"{url}: {response.length:,} bytes, more than the {self.cap:,} allowed")
        body = self._body(url, response, deadline)
        return Fetched(url, body, response.headers.get("Content-Type", ""), etag, modified)

    def _body(self, url: str, response: http.client.HTTPResponse, deadline: "_Deadline") -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"{url}: compressed as {encoding!r}, which was not asked for")
        plain = encoding in ("identity", "")
        opened = None if plain else zlib.decompressobj(47)  # gzip or zlib, by its header
        parts: list[bytes] = []
        size = received = 0
        too_large = FetchError(f"{url}: more than the {self.cap:,} bytes allowed")
        expected = response.length  # None when the end says it, by chunks or by closing
        while expected is None or received < expected:
            part = response.read1(1 << 16 if expected is None else min(1 << 16, expected - received))
            deadline.check()
            if not part:
                break
            received += len(part)
            if received > self.cap:
                raise too_large
            while part:
                if opened is None:
                    new, part = part, b""
                else:
                    if opened.eof:  # a gzip file may be several, one after the other
                        opened = zlib.decompressobj(47)
                    try:
                        new = opened.decompress(part, self.cap - size + 1)
                    except zlib.error as problem:
                        raise _Passing(f"its compressed answer is damaged ({problem})") from None
                    part = opened.unconsumed_tail or opened.unused_data
                size += len(new)
                if size > self.cap:
                    raise too_large
                parts.append(new)
        if expected is not None and received < expected:  # read1 does not say so itself
            raise _Passing(f"the answer breaks off {expected - received:,} bytes before its end")
        if opened is not None and received and not opened.eof:
            raise _Passing("its compressed answer breaks off")
        return b"".join(parts)

    def _asked_to_wait(self, header: str | None) -> float | None:
        """Seconds of a ``Retry-After``, which is a number or a date; None when there is none that can be read."""
        if header is None:
            return None
        if re.fullmatch(r"\s*\d{1,9}\s*", header):
            return float(header)
        try:
            moment = parsedate_to_datetime(header)
        except ValueError:
            return None
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (aware - self.now()).total_seconds())

    def _keep_pace(self, host: str) -> None:
        name = next((known for known in self.pace if host == known or host.endswith(f".{known}")), None)
        seconds = self.pace[name] if name is not None else self.pace.get("*", 0.0)
        key, now = name or host, self.clock()
        # Never longer than the pace itself, should the clock have been set.
        wait = min(self._free.get(key, now) - now, seconds)
        if wait > 0:
            self.sleep(wait)
        self._free[key] = self.clock() + seconds

    def _addresses(self, url: str, host: str, port: int, private: bool) -> list[str]:
        """What a name stands for, looked up once and checked."""
        try:
            found = self.resolve(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as problem:
            if problem.errno == socket.EAI_AGAIN:
                raise _Passing(f"the name {host} cannot be looked up now") from None
            raise FetchError(f"{url}: there is no host {host}; check the address and the network") from None
        except (UnicodeError, OSError) as problem:
            raise FetchError(f"{url}: {host!r} cannot be looked up ({problem})") from None
        addresses: list[str] = []
        for item in found:
            address = str(item[4][0])  # type: ignore[index]
            if not private and not _is_public(address):
                raise FetchError(
                    f"{url}: {host} is {address}, an address of this machine or a private network; "
                    "allow it with --allow-private if that is meant"
                )
            if address not in addresses:
                addresses.append(address)
        return addresses


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's; those that carry another inside are judged by that too."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped
        if carried is not None:
            return _is_public(str(carried))
        if any(other is not None and not _is_public(str(other)) for other in (ip.sixtofour, *(ip.teredo or ()))):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_loopback or ip.is_link_local or ip.is_reserved)


def _parts(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and what is asked for.

    Raises:
        FetchError: what is not an http or https address, or holds a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as problem:
        raise FetchError(f"{url!r} is not an address ({problem})") from None
    if parts.scheme not in ("http", "https"):
        raise FetchError(f"{url!r}: only http:// and https:// addresses are fetched")
    if not parts.hostname or re.search(r"[\x00-\x20\x7f]", url):
        raise FetchError(f"{url!r} is not an address; one looks like https://example.org/feed.xml")
    if parts.username is not None or parts.password is not None:
        raise FetchError(f"an address with a name or password in it is not fetched ({parts.hostname})")
    host = parts.hostname
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError as problem:
            raise FetchError(f"{url!r}: {host!r} is no host name ({problem})") from None
    safe = "/%:@!$&'()*+,;=~-._?"
    target = urlunsplit(("", "", quote(parts.path or "/", safe=safe), quote(parts.query, safe=safe + "[]{}|"), ""))
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target


class _Deadline:
    """Ends a connection when its time is over, however slowly its bytes drip."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    @property
    def reason(self) -> str:
        return f"the answer was not there within {self.seconds:g} seconds" if self.over else ""

    def guard(self, connected: socket.socket) -> None:
        self._socket = connected
        if self.over:
            self._end()

    def check(self) -> None:
        """An end that this brought about looks like the server's own."""
        if self.over:
            raise _Passing(self.reason)

    def cancel(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        if self._socket is not None:
            try:
                # The plain one: that of TLS would first say goodbye and wait for the other's.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already


class _Pinned(http.client.HTTPConnection):
    """A connection to addresses that were looked up before, under the name they were looked up for."""

    def __init__(
        self, scheme: str, host: str, port: int, addresses: Sequence[str], timeout: float, deadline: _Deadline
    ) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = 443 if scheme == "https" else 80  # else the Host header repeats it
        self._scheme = scheme
        self._addresses = addresses
        self._deadline = deadline

    def connect(self) -> None:
        problem: OSError | None = None
        for address in self._addresses:
            self._deadline.check()
            try:
                # An address in figures: no name is looked up again.
                plain = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError as failed:
                problem = failed
        else:
            assert problem is not None
            raise problem
        self._deadline.guard(plain)
        self.sock = plain
        if self._scheme == "https":
            trusted = ssl.create_default_context()
            self.sock = trusted.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
            self._deadline.guard(self.sock)
            self.sock.do_handshake()
