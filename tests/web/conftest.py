"""A store with papers of every kind, and the application over it."""

import json
import re
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra page is not installed")

from starlette.testclient import TestClient

from counterproof.page.feed import add_cards
from counterproof.page.store import Entry, Store
from counterproof.web.app import Settings, build

TOKEN = "operator-token-0123456789"
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
MEASURED = {}  # what the project measured does not change from test to test
HOSTILE = '<script>alert("title")</script> of $x < y$ & "quotes" onload=alert(1)'


class Plain:
    """Vectors of letters, at once: what the model would do, without it."""

    model, length, dimension = "plain", 8, 26
    problem = None

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, texts, timeout=None):
        assert self.gate.wait(20)
        if self.problem is not None:
            raise self.problem
        found = np.zeros((len(texts), 26), dtype=np.float32)
        for row, text in enumerate(texts):
            for letter in re.findall("[a-z]", text.lower()):
                found[row, ord(letter) - 97] += 1
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def fill(path):
    store = Store(path, clock=lambda: NOW)
    add_cards(store)
    for number in range(40):
        day = f"2026-11-{23 - number // 4:02d}"
        store.add(
            Entry(
                title=f"Matching number {number} of sparrows",
                abstract=f"Sparrows in flock {number} are matched with $O(n^2)$ effort.",
                authors=("Ann Author", "Bob <b>Bold</b>"),
                arxiv=f"2611.{20000 + number}",
                published=day,
                categories=("cs.CV",),
                signals={"upvotes": float(number)},
            ),
            source="daily-papers",
            day=day,
        )
    store.add(
        Entry(
            title=HOSTILE,
            abstract="</p><img src=x onerror=alert(1)> preference optimisation of language models",
            authors=("<i>Eve</i>",),
            doi="10.1000/odd.json",
            links={"code": "javascript:alert(1)", "project": "https://example.org/p?a=1&b=2"},
            venue="<u>Venue</u>",
        ),
        source="web",
        day="2026-11-22",
    )
    store.add(Entry(title="An old one", arxiv="math.GT/0309136"), source="web", day="2026-11-01")
    store.close()


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "page.sqlite"
    fill(path)
    return path.read_bytes()


@pytest.fixture
def make(tmp_path, filled):
    """Makes applications; each with its own store unless told otherwise."""
    opened = []

    def make(path=None, client="127.0.0.1", checks=None, encoder=None, base="http://127.0.0.1", **settings):
        if path is None:
            path = tmp_path / "page.sqlite"
            path.write_bytes(filled)
        settings = {"token": TOKEN, **settings}
        built = build(
            Settings(path=path, **settings), clock=lambda: NOW, encoder=encoder or Plain(), checks=checks, warm=False
        )
        built.site.measured.ours = MEASURED
        opened.append(built)

        def browser(host=client, **options):
            return TestClient(
                built.app, base_url=base, client=(host, 5000), follow_redirects=False,
                raise_server_exceptions=False, **options,
            )  # fmt: skip

        return SimpleNamespace(
            **vars(built), browser=browser, web=browser(), path=path, store=lambda: Store(path, clock=lambda: NOW)
        )

    yield make
    for built in opened:
        if built.checks is not None:
            built.checks.close(2)
        built.site.close()


@pytest.fixture
def page(make):
    return make()


def form_token(web, address="/sign-in"):
    found = re.search(r'name="csrf" value="([^"]+)"', web.get(address).text)
    assert found, f"no form on {address}"
    return found[1]


def sign_in(web):
    done = web.post("/sign-in", data={"csrf": form_token(web), "token": TOKEN, "back": "/latest"})
    assert done.status_code == 303
    assert done.headers["location"] == "/latest"
    return web


def said(response):
    return json.loads(response.text)
