"""The fetcher, against a real server that misbehaves."""

import gzip
import socket
import subprocess
import sys
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from counterproof.page.fetching import Fetcher, FetchError

sys.path.insert(0, str(Path(__file__).parent))
import misbehaving
from misbehaving import Server


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def clock():
    return Time()


def fetcher(clock, **settings):
    settings = {"allow_private": True, "timeout": 5.0, "tries": 3, **settings}
    return Fetcher(clock=clock, sleep=clock.sleep, **settings)


def resolver(**hosts):
    """Looks names up in a dictionary, and counts."""

    def resolve(host, port, **kind):
        resolve.asked.append(host)
        if host not in hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = hosts[host]() if callable(hosts[host]) else hosts[host]
        return [(socket.AF_INET, kind["type"], 6, "", (address, port)) for address in found.split()]

    resolve.asked = []
    return resolve


def test_what_is_there_comes_with_what_the_next_time_needs(server, clock):
    def page(handler):
        if handler.headers.get("If-None-Match") == '"7"':
            handler.reply(b"", 304, ETag='"7"')
        else:
            handler.reply(b"words", ETag='"7"', Last_Modified="x", Content_Type="text/xml; charset=ISO-8859-1")

    server.routes["/a"] = page
    getter = fetcher(clock)
    got = getter.get(f"{server.url}/a?q=x y".replace(" ", "%20"))
    assert (got.body, got.etag, got.modified, got.charset, got.unchanged) == (b"words", '"7"', "x", "ISO-8859-1", False)
    assert server.asked == ["/a?q=x%20y"]
    headers = server.headers[0]
    assert "counterproof/" in headers["User-Agent"]
    assert "+https://" in headers["User-Agent"]
    assert headers["Host"] == f"127.0.0.1:{server.port}"
    again = getter.get(f"{server.url}/a", etag=got.etag, modified=got.modified)
    assert (again.unchanged, again.body) == (True, b"")
    assert server.headers[1]["If-Modified-Since"] == "x"


def test_unchanged_without_being_asked_is_an_error(server, clock):
    server.routes["/a"] = lambda handler: handler.reply(b"", 304)
    with pytest.raises(FetchError, match="304"):
        fetcher(clock).get(f"{server.url}/a")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_with_back_off(server, clock, status):
    answers = iter([status, status, 200])

    def page(handler):
        handler.reply(b"at last", next(answers))

    server.routes["/a"] = page
    assert fetcher(clock).get(f"{server.url}/a").body == b"at last"
    assert clock.slept == [2.0, 4.0]


def test_a_server_that_asks_to_wait_is_given_the_time(server, clock):
    moment = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)
    later = (moment + timedelta(seconds=50)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    answers = iter([(429, "7"), (503, later), (503, "soon"), (200, None)])

    def page(handler):
        status, wait = next(answers)
        handler.reply(b"done", status, Retry_After=wait)

    server.routes["/a"] = page
    assert fetcher(clock, tries=4, now=lambda: moment).get(f"{server.url}/a").body == b"done"
    assert clock.slept == [7.0, 50.0, 8.0]


def test_a_wait_beyond_patience_is_said_at_once(server, clock):
    server.routes["/a"] = lambda handler: handler.reply(b"", 429, Retry_After="7200")
    with pytest.raises(FetchError, match="asks to wait 7200 seconds") as problem:
        fetcher(clock).get(f"{server.url}/a")
    assert problem.value.status == 429
    assert clock.slept == []
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204, 206])
def test_what_will_not_pass_is_not_tried_again(server, clock, status):
    server.routes["/a"] = lambda handler: handler.reply(b"", status)
    with pytest.raises(FetchError, match=str(status)) as problem:
        fetcher(clock).get(f"{server.url}/a")
    assert problem.value.status == status
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("route", "says"),
    [
        (misbehaving.truncated, "breaks off 990 bytes before its end"),
        (misbehaving.cut_chunks, "breaks off"),
        (misbehaving.cut_gzip, "compressed answer breaks off"),
        (lambda handler: handler.reply(b"no gzip", Content_Encoding="gzip"), "damaged"),
        (misbehaving.no_http, "no proper HTTP"),
        (misbehaving.gone, "no proper HTTP|connection failed"),
    ],
    ids=["truncated", "chunks", "cut gzip", "no gzip", "no http", "gone"],
)
def test_half_an_answer_is_no_answer_and_tried_again(server, clock, route, says):
    server.routes["/a"] = route
    with pytest.raises(FetchError, match=f"{says}.*after 3 tries"):
        fetcher(clock).get(f"{server.url}/a")
    assert len(server.asked) == 3


@pytest.mark.parametrize("route", [misbehaving.drip, misbehaving.slow_headers], ids=["body", "headers"])
def test_time_is_over_however_it_drips(server, clock, route):
    server.routes["/a"] = route
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"not there within 0\.3 seconds"):
        fetcher(clock, timeout=0.3, tries=1).get(f"{server.url}/a")
    assert time.monotonic() - began < 3


def test_silence_ends_before_the_whole_time_does(server, clock):
    server.routes["/a"] = misbehaving.silence
    with pytest.raises(FetchError, match=r"nothing more came within 0\.2 seconds"):
        fetcher(clock, idle=0.2, tries=1).get(f"{server.url}/a")


def test_no_thread_is_left_behind(server, clock):
    server.routes["/a"] = b"x"
    getter = fetcher(clock)
    getter.get(f"{server.url}/a")
    deadline = time.monotonic() + 2
    while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_more_is_read_than_allowed(server, clock, compressed):
    server.routes["/a"] = misbehaving.bomb if compressed else b"x" * 2_000_000
    with pytest.raises(FetchError, match="more than the 1,000,000"):
        fetcher(clock, cap=1_000_000).get(f"{server.url}/a")
    assert len(server.asked) == 1


def test_an_endless_answer_is_cut(server, clock):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 10_000)

    server.routes["/a"] = endless
    with pytest.raises(FetchError, match="more than the 100,000"):
        fetcher(clock, cap=100_000).get(f"{server.url}/a")


def test_compression_is_undone(server, clock):
    text = b"words and words " * 1000
    server.routes["/a"] = lambda handler: handler.reply(
        gzip.compress(text[:500]) + gzip.compress(text[500:]), Content_Encoding="gzip"
    )
    server.routes["/b"] = lambda handler: handler.reply(zlib.compress(text), Content_Encoding="deflate")
    server.routes["/c"] = lambda handler: handler.reply(b"x", Content_Encoding="br")
    getter = fetcher(clock)
    assert getter.get(f"{server.url}/a").body == getter.get(f"{server.url}/b").body == text
    with pytest.raises(FetchError, match="'br', which was not asked for"):
        getter.get(f"{server.url}/c")


def redirect(target, status=302):
    return lambda handler: handler.reply(b"", status, Location=target)


def test_redirects_are_followed_and_counted(server, clock):
    server.routes |= {f"/{n}": redirect(f"/{n + 1}", 301 + n % 2) for n in range(20)}
    server.routes["/3"] = b"here"
    getter = fetcher(clock)
    got = getter.get(f"{server.url}/0")
    assert (got.body, got.url) == (b"here", f"{server.url}/3")
    with pytest.raises(FetchError, match="more than 5 redirects"):
        getter.get(f"{server.url}/4")
    server.routes |= {"/x": redirect("/y"), "/y": redirect("x")}
    with pytest.raises(FetchError, match="in a circle"):
        getter.get(f"{server.url}/x")
    server.routes["/z"] = lambda handler: handler.reply(b"", 302)
    with pytest.raises(FetchError, match="without saying where"):
        getter.get(f"{server.url}/z")
    assert clock.slept == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://x/", "ftp://x/y", "javascript:1", "http://u:p@x/"])
def test_redirects_lead_to_addresses_of_the_web_only(server, clock, target):
    server.routes["/a"] = redirect(target)
    with pytest.raises(FetchError, match=r"only http|name or password"):
        fetcher(clock).get(f"{server.url}/a")


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "64:ff9b::7f00:1", "2002:7f00:1::1", "192.0.2.1", "8.8.8.8 127.0.0.1", "fe80::1%lo",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_by_name_and_by_figure(clock, address):
    resolve = resolver(**{"inside.example": address})
    getter = fetcher(clock, allow_private=False, resolve=resolve)
    with pytest.raises(FetchError, match="--allow-private"):
        getter.get("http://inside.example/feed")
    assert getter.requests == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "127.1"])
def test_this_machine_is_refused_however_it_is_written(server, clock, host):
    server.routes["/"] = b"secret"
    with pytest.raises(FetchError, match=r"--allow-private|no host|cannot be looked up"):
        fetcher(clock, allow_private=False).get(f"http://{host}:{server.port}/")
    assert server.asked == []


def test_public_addresses_pass_the_check():
    from counterproof.page.fetching import _is_public

    for address in ("8.8.8.8", "151.101.3.42", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert _is_public(address), address


def test_a_redirect_to_a_private_address_is_refused(server, clock, monkeypatch):
    from counterproof.page import fetching

    public = resolver(**{"outside.example": "8.8.8.8", "inside.example": "127.0.0.1"})
    reached = []
    real = socket.create_connection

    def connect(address, *rest):
        reached.append(address)
        return real(("127.0.0.1", server.port), *rest)

    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    server.routes["/a"] = redirect(f"http://inside.example:{server.port}/secret")
    server.routes["/secret"] = b"secret"
    with pytest.raises(FetchError, match=r"inside\.example is 127\.0\.0\.1"):
        fetcher(clock, allow_private=False, resolve=public).get("http://outside.example/a")
    assert reached == [("8.8.8.8", 80)]
    assert server.asked == ["/a"]


def test_a_name_is_looked_up_once_and_that_address_is_asked(server, clock, monkeypatch):
    """A name whose second answer is another (DNS rebinding) gains nothing."""
    from counterproof.page import fetching

    answers = iter(["8.8.8.8", "127.0.0.1", "127.0.0.1"])
    resolve = resolver(**{"rebinding.example": lambda: next(answers)})
    reached = []
    real = socket.create_connection

    def connect(address, *rest):
        reached.append(address[0])
        return real(("127.0.0.1", server.port), *rest)

    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    server.routes["/a"] = b"x"
    assert fetcher(clock, allow_private=False, resolve=resolve).get("http://rebinding.example/a").body == b"x"
    assert reached == ["8.8.8.8"]
    assert resolve.asked == ["rebinding.example"]
    assert server.headers[0]["Host"] == "rebinding.example"


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "file:///etc/passwd", "http://", "http:///x", "http://a b/", "http://x/\r\nHost: y", "http://u:p@x/",
        "http://x:99999/", "http://[::1/", "ftp://x/", "//x/y", "http://\u2100.com\udc80/",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(clock, url):
    getter = fetcher(clock)
    with pytest.raises(FetchError):
        getter.get(url)
    assert getter.requests == 0
    assert clock.slept == []


def test_a_host_that_is_not_there_is_not_asked_for_again(clock):
    resolve = resolver()
    with pytest.raises(FetchError, match=r"there is no host nowhere\.example"):
        fetcher(clock, resolve=resolve).get("http://nowhere.example/")
    assert len(resolve.asked) == 1


def test_arxiv_and_its_subdomains_share_one_pace(server, clock):
    server.routes["/a"] = b"x"
    hosts = {"export.arxiv.org": "127.0.0.1", "rss.arxiv.org": "127.0.0.1", "notarxiv.org": "127.0.0.1"}
    getter = fetcher(clock, resolve=resolver(**hosts))
    for host in ("export.arxiv.org", "rss.arxiv.org", "notarxiv.org", "notarxiv.org", "export.arxiv.org"):
        getter.get(f"http://{host}:{server.port}/a")
    assert clock.slept == [3.0, 3.0]
    clock.now -= 500  # a clock that jumps back makes nobody wait for ever
    getter.get(f"http://rss.arxiv.org:{server.port}/a")
    assert clock.slept[2:] == [3.0]


def test_a_try_again_keeps_the_pace_too(server, clock):
    answers = iter([503, 200])
    server.routes["/a"] = lambda handler: handler.reply(b"x", next(answers))
    getter = fetcher(clock, resolve=resolver(**{"arxiv.org": "127.0.0.1"}), back_off=1.0)
    getter.get(f"http://arxiv.org:{server.port}/a")
    assert clock.slept == [1.0, 2.0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key", "-out", folder / "cert",
         "-days", "2", "-subj", "/CN=secure.example", "-addext", "subjectAltName=DNS:secure.example"],
        capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


def test_certificates_are_checked_for_the_name_and_not_the_address(clock, certificate, monkeypatch):
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    server = Server({"/a": b"safe"})
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    resolve = resolver(**{"secure.example": "127.0.0.1", "other.example": "127.0.0.1"})
    try:
        with pytest.raises(FetchError, match="certificate is not valid"):
            fetcher(clock, resolve=resolve).get(f"https://secure.example:{server.port}/a")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
        got = fetcher(clock, resolve=resolve).get(f"https://secure.example:{server.port}/a")
        assert got.body == b"safe"
        with pytest.raises(FetchError, match="Hostname mismatch"):
            fetcher(clock, resolve=resolve).get(f"https://other.example:{server.port}/a")
    finally:
        server.close()
