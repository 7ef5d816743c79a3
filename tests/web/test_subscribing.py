"""The digest by the page: ask, confirm by a button, stop by a button or by the mail program's own POST."""

import email
import email.policy
import re
import sys
import time

import pytest
from starlette.testclient import TestClient

from counterproof.page.outbox import Folder, Letterhead, send
from counterproof.page.subscribers import find_subscriber, new_token, unsubscribe_token
from counterproof.web.app import Settings, build
from counterproof.web.mailing import Mailing
from web.conftest import TOKEN, Plain, form_token

LETTERHEAD = Letterhead(sender="papers@example.org", page="https://papers.example")


@pytest.fixture
def asked(page, tmp_path):
    """Somebody asked; the link of the mail."""
    form = {"csrf": form_token(page.web, "/subscribe"), "email": "Ann@Example.org", "rhythm": "weekly",
            "topics": "sparrows\n\n object detection "}  # fmt: skip
    done = page.web.post("/subscribe", data=form)
    assert done.status_code == 200
    assert "message with a link is on its way" in done.text
    return link(page, tmp_path)


def link(page, tmp_path):
    store = page.store()
    send(store, Folder(tmp_path / "mail"), LETTERHEAD)
    store.close()
    (file,) = (tmp_path / "mail").glob("*.eml")
    message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
    text = message.get_body(("plain",)).get_content()
    found = re.search(r"https://papers\.example(/confirm/\S+)", text)
    assert found, text
    return found[1]


def state(page):
    store = page.store()
    try:
        return find_subscriber(store, "ann@example.org")
    finally:
        store.close()


def test_ask_confirm_stop(page, asked):
    shown = page.web.get(asked)
    assert "a…@example.org" in shown.text
    assert "ann@" not in shown.text.lower()
    assert shown.headers["referrer-policy"] == "no-referrer"
    assert shown.headers["x-robots-tag"] == "noindex"
    for _ in range(3):  # scanners follow links
        page.web.get(asked)
        page.web.head(asked)
    assert state(page).state == "pending"
    assert page.browser().post(asked).status_code == 200
    person = state(page)
    assert person.state == "active"
    assert person.wishes.topics == ("sparrows", "object detection")
    assert "used before" in page.web.post(asked).text
    stop = f"/unsubscribe/{unsubscribe_token(person)}"
    assert "Stop the digest" in page.web.get(stop).text
    assert state(page).state == "active"
    for _ in range(2):  # RFC 8058: without cookies, and again is fine
        done = page.browser("203.0.113.9").post(
            stop, content="List-Unsubscribe=One-Click", headers={"content-type": "application/x-www-form-urlencoded"}
        )
        assert done.status_code == 200
    assert state(page).state == "unsubscribed"


def test_one_click_from_a_mail_page_of_another_site_works(page, asked):
    page.web.post(asked)
    stop = f"/unsubscribe/{unsubscribe_token(state(page))}"
    far = {"origin": "https://mail.example", "sec-fetch-site": "cross-site"}
    assert page.web.post(stop, headers=far).status_code == 200
    assert state(page).state == "unsubscribed"


def test_a_link_does_only_what_it_is_for(page, asked):
    assert page.web.get(asked.replace("confirm", "unsubscribe")).status_code == 404
    assert page.web.post(asked.replace("confirm", "unsubscribe")).status_code == 404
    assert page.web.post(asked[:-1] + ("A" if asked[-1] != "A" else "B")).status_code == 404
    assert page.web.post("/confirm/" + "A" * 44).status_code == 404
    assert state(page).state == "pending"


def test_an_old_link_is_too_late(page, asked):
    store = page.store()
    person = find_subscriber(store, "ann@example.org")
    token = new_token(store, person.id, person.wishes)
    store.db.execute("UPDATE tokens SET expires = '2026-11-01T00:00:00Z'")
    store.close()
    assert "older than two days" in page.web.get(f"/confirm/{token}").text
    assert page.web.post(f"/confirm/{token}").status_code == 410


@pytest.mark.parametrize(
    "form",
    [
        {"email": "no address"}, {"email": "a@b.example\r\nBcc: c@d.example"}, {"rhythm": "hourly"},
        {"topics": "a\x00b"}, {"topics": "\n".join(f"topic {n}" for n in range(40))}, {"views": "nope"}, {"email": ""},
    ],
)  # fmt: skip
def test_bad_wishes_are_said_and_kept_in_the_form(page, form):
    good = {"csrf": form_token(page.web, "/subscribe"), "email": "ann@example.org", "topics": "kept topic"}
    done = page.web.post("/subscribe", data={**good, **form})
    assert done.status_code == 400
    assert 'role="alert"' in done.text
    assert "kept topic" in done.text or "topics" in form
    store = page.store()
    assert store.db.execute("SELECT count(*) FROM outbox").fetchone()[0] == 0
    store.close()


def test_the_answer_says_nothing_of_who_is_known(page, asked):
    page.web.post(asked)
    form = {"csrf": form_token(page.web, "/subscribe"), "rhythm": "daily"}
    known = page.web.post("/subscribe", data={**form, "email": "ann@example.org"})
    unknown = page.web.post("/subscribe", data={**form, "email": "bob@example.org"})
    assert (known.status_code, known.text) == (unknown.status_code, unknown.text)


def test_a_flood_is_stopped(page):
    web = page.browser("203.0.113.9")
    form = {"csrf": form_token(web, "/subscribe")}
    answers = [web.post("/subscribe", data={**form, "email": f"a{n}@example.org"}).status_code for n in range(12)]
    assert answers == [200] * 10 + [429] * 2


def test_no_form_no_mail(page):
    assert page.web.post("/subscribe", data={"email": "ann@example.org"}).status_code == 403


# mail out of the served page


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def subscribe(web, address="ann@example.org"):
    form = {"csrf": form_token(web, "/subscribe"), "email": address, "rhythm": "daily", "topics": ""}
    assert web.post("/subscribe", data=form).status_code == 200


def test_the_link_leaves_at_once_where_the_page_sends_mail(own_home, filled):
    (own_home / "page.sqlite").write_bytes(filled)
    built = build(Settings(token=TOKEN, send_mail=True), encoder=Plain(), warm=False)
    web = TestClient(built.app, base_url="http://127.0.0.1", client=("127.0.0.1", 5000))
    built.mailing.start("https://papers.example")
    try:
        time.sleep(0.2)
        assert not (own_home / "mail").exists()  # nothing waits: nothing is started
        subscribe(web)
        until(lambda: list((own_home / "mail").glob("*.eml")))
        (file,) = (own_home / "mail").glob("*.eml")
        message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
        found = re.search(r"https://papers\.example(/confirm/\S+)", message.get_body(("plain",)).get_content())
        assert "You will get the digest" in web.post(found[1]).text
    finally:
        built.mailing.close()
        built.site.close()


def test_a_sender_that_fails_is_a_line_in_the_log_and_is_tried_again(make, caplog):
    page = make()
    fails = "import sys, pathlib; print('no mail server', file=sys.stderr); sys.exit(2)"
    mailing = Mailing(page.site, command=(sys.executable, "-c", fails), every=0.1)
    subscribe(page.web)
    tries = []
    say = mailing._say
    mailing._say = lambda problem: (tries.append(problem), say(problem))
    mailing.start("https://papers.example")
    try:
        until(lambda: len(tries) > 2)
    finally:
        mailing.close()
    assert set(tries) == {"no mail server"}
    assert [record.getMessage() for record in caplog.records] == ["mail waits: no mail server"]
