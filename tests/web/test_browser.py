"""The page in Chromium: search, vote, subscribe, read, follow a check; by keyboard, by axe, in light and dark.

Screenshots of every page at two sizes go to ``.ci-artifacts/``.
"""

import email
import email.policy
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

from counterproof.page.outbox import Folder, Letterhead, send
from counterproof.page.store import Store
from counterproof.page.subscribers import find_subscriber, unsubscribe_token
from counterproof.page.views import Query, save_view
from counterproof.web.app import Settings, build
from counterproof.web.runs import Checks
from lab.browser import violations
from web.conftest import MEASURED, NOW, TOKEN, Plain

SHOTS = Path(__file__).parents[2] / ".ci-artifacts"
SIZES = {"phone": (360, 740), "wide": (1440, 900)}
PAGES = {
    "front": "/",
    "trending": "/trending",
    "week": "/week/2026-W47",
    "search": "/search?q=sparrows",
    "nothing-found": "/search?q=zzzzqqqq",
    "card": "/paper/arxiv/2310.03708",
    "pulled": "/paper/doi/10.1000/odd.json",
    "claims": "/claims",
    "rooms": "/rooms",
    "views": "/views",
    "subscribe": "/subscribe",
    "sign-in": "/sign-in",
    "runs": "/runs",
    "history": "/history",
    "roots": "/history/group-detr",
    "missing": "/nope",
}
CHECK = """
import json, sys, time
for seed in range(100):
    print("modpo/main: seed", seed, file=sys.stderr, flush=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory, filled):
    path = tmp_path_factory.mktemp("served") / "page.sqlite"
    path.write_bytes(filled)
    store = Store(path, clock=lambda: NOW)
    save_view(store, "birds", Query("search", words="sparrows"))
    store.close()
    checks = Checks(command=(sys.executable, "-c", CHECK))
    built = build(Settings(path=path, token=TOKEN), clock=lambda: NOW, encoder=Plain(), checks=checks, warm=False)
    built.site.measured.ours = MEASURED
    built.site.measured.ready = True
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        built.app, log_level="warning", lifespan="off", proxy_headers=False, http="h11", ws="none",
        h11_max_incomplete_event_size=262_144, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    at = f"http://127.0.0.1:{listening.getsockname()[1]}"
    yield SimpleNamespace(at=at, path=path, checks=checks, pages=built.pages)
    built.pages.closing = server.should_exit = True
    thread.join(10)
    checks.close(1)
    built.site.close()


@pytest.fixture
def open_page(browser, served):
    contexts = []

    def open_page(path="/", width=1440, height=900, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce",
            base_url=served.at, **options,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.messages = []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on(
            "request", lambda asked: page.messages.append(asked.url) if not asked.url.startswith(served.at) else None
        )
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()


def sign_in(page):
    page.goto("/sign-in")
    page.get_by_label("operator's token").fill(TOKEN)
    page.get_by_role("main").get_by_role("button", name="Sign in").click()
    page.get_by_text("Signed in as operator").wait_for()


@pytest.mark.parametrize("size", SIZES)
def test_every_page_fits_and_is_kept_as_a_picture(open_page, size):
    SHOTS.mkdir(exist_ok=True)
    width, height = SIZES[size]
    page = open_page(width=width, height=height, scheme="light" if size == "wide" else "dark")
    for name, path in PAGES.items():
        page.goto(path)
        page.screenshot(path=SHOTS / f"{name}-{size}.png", full_page=name not in ("history", "claims", "card"))
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    said = [text for text in page.messages if "404" not in text]  # the page that is missing is
    assert said == []


@pytest.mark.parametrize(("scheme", "size"), [("light", "wide"), ("dark", "phone")])
def test_axe_finds_nothing(open_page, axe, scheme, size):
    width, height = SIZES[size]
    page = open_page(width=width, height=height, scheme=scheme, bypass_csp=True)  # axe itself is put in by evaluation
    for name, path in PAGES.items():
        if name == "history":
            continue  # what is in it is looked at in tests/page/test_timeline_browser.py
        page.goto(path)
        page.evaluate("document.querySelectorAll('details').forEach((one, i) => { if (i < 6) one.open = true; })")
        assert violations(page, axe) == [], name


def test_search_while_typing_and_without_script(open_page):
    page = open_page("/search")
    page.locator("form.search").get_by_role("searchbox", name="Words").fill("sparrows")
    page.locator("#found .item").first.wait_for()
    assert page.locator("#found .item").count() == 30
    assert page.url.endswith("/search?q=sparrows&how=both")
    page.get_by_label("Since").fill("2026-11-23")
    page.locator("#said", has_text="4 papers shown").wait_for(state="attached")
    assert page.locator("#found .item").count() == 4
    assert page.messages == []
    plain = open_page("/", java_script_enabled=False)
    plain.get_by_label("Search all papers").fill("sparrows")
    plain.keyboard.press("Enter")
    plain.wait_for_url("**/search?q=sparrows")
    assert plain.locator("#found .item").count() == 30
    plain.get_by_role("link", name="Next part").click()
    plain.wait_for_url("**cursor=**")
    assert plain.locator("#found .item").count() == 10


def test_vote(open_page):
    page = open_page()
    assert page.locator("form.vote").count() == 0
    sign_in(page)
    page.goto("/paper/arxiv/2611.20009")
    button = page.locator("form.vote button")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    page.locator(".vote .number", has_text="1").wait_for()
    assert button.get_attribute("aria-pressed") == "true"
    assert button.evaluate("node => node === document.activeElement")
    page.reload()
    assert page.locator(".vote .number").inner_text() == "1"
    page.locator("form.vote button").press("Enter")
    page.locator(".vote .number", has_text="0").wait_for()
    assert page.messages == []
    page.goto("/trending")
    assert page.locator("form.vote").count() == page.locator(".item").count()


def test_subscribe_confirm_unsubscribe(open_page, served, tmp_path):
    page = open_page("/subscribe", width=360)
    page.get_by_label("Mail address").fill("reader@example.org")
    page.get_by_label("weekly").check()
    page.get_by_label("Topics").fill("sparrows")
    page.get_by_label("birds").check()
    page.get_by_role("button", name="Subscribe").click()
    page.get_by_text("is on its way").wait_for()
    store = Store(served.path, clock=lambda: NOW)
    send(store, Folder(tmp_path), Letterhead(sender="papers@example.org", page=served.at))
    (file,) = tmp_path.glob("*.eml")
    message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
    address = re.search(r"http\S+/confirm/\S+", message.get_body(("plain",)).get_content())[0]
    page.goto(address)
    assert find_subscriber(store, "reader@example.org").state == "pending"
    page.get_by_role("button", name="Confirm").click()
    page.get_by_text("You will get the digest").wait_for()
    person = find_subscriber(store, "reader@example.org")
    assert (person.state, person.wishes.views) == ("active", ("birds",))
    page.goto(f"/unsubscribe/{unsubscribe_token(person)}")
    page.get_by_role("button", name="Stop the digest").click()
    page.get_by_text("You will get no more mail").wait_for()
    assert find_subscriber(store, "reader@example.org").state == "unsubscribed"
    store.close()
    assert page.messages == []


def test_read_a_paper(open_page):
    page = open_page("/room/preference")
    page.get_by_role("link", name=re.compile("Multi-Objective Direct Preference")).first.click()
    assert page.locator("h1").inner_text().startswith("Beyond One-Preference")
    assert page.locator(".claim .badge").first.is_visible()
    table = page.locator("table.seedtable").first
    assert not table.is_visible()
    page.locator(".claim summary").first.click()
    assert table.is_visible()
    tick = page.locator(".ticks span").nth(1)
    assert (
        tick.evaluate("node => getComputedStyle(node).left") != "auto"
    )  # its place came with the page's own style sheet
    assert page.messages == []


def test_follow_a_running_check(open_page, served):
    page = open_page()
    sign_in(page)
    page.goto("/runs")
    page.locator("select[name=target]").select_option("modpo")
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator(".log", has_text="seed 3").wait_for()
    other = open_page("/runs", width=360)
    other.locator(".log", has_text="seed 5").wait_for()
    other.context.close()  # a browser that goes away
    page.locator(".log", has_text="seed 12").wait_for()
    page.screenshot(path=SHOTS / "running-wide.png")
    assert served.checks.current is not None
    page.get_by_role("button", name="Stop it").click()
    page.locator(".state", has_text=re.compile("stopped")).wait_for()
    page.get_by_role("button", name="Start", exact=True).wait_for()
    assert page.messages == []


def test_by_keyboard(open_page):
    page = open_page("/latest")
    page.keyboard.press("Tab")
    skip = page.locator("a.skip")
    assert skip.evaluate("node => node === document.activeElement")
    assert skip.bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_print(open_page):
    page = open_page("/trending", scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("form.find").is_visible()
    assert page.locator(".item").first.is_visible()


def test_hundred_kilobytes_get_an_answer(served):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(served.at + "/search?q=" + "a" * 100_000)
    assert caught.value.code == 414
    assert b"16,384 bytes" in caught.value.read()
