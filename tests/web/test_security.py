"""Nothing is changed by who may not, from elsewhere, or too often; no answer goes out without its headers."""

import itertools
import stat

import pytest

from counterproof.errors import UserError
from counterproof.web.app import Settings
from counterproof.web.security import BROWSER, SESSION, Bucket, client_of, host_name, read_token
from web.conftest import TOKEN, form_token, sign_in

VOTE = {"paper": "arxiv:2611.20003", "value": "1", "back": "/latest"}


def votes(page):
    with page.site.reading() as reader:
        return reader.store.votes(reader.store.find("arxiv:2611.20003").id)


def test_a_vote_counts_once_and_can_be_taken_back(page):
    web = sign_in(page.web)
    token = form_token(web, "/latest")
    for _ in range(2):
        done = web.post("/vote", data={**VOTE, "csrf": token})
        assert (done.status_code, done.headers["location"]) == (303, "/latest")
    assert votes(page) == 1
    assert 'aria-pressed="true"' in web.get("/paper/arxiv/2611.20003").text
    done = web.post("/vote", data={**VOTE, "csrf": token, "value": "0"}, headers={"accept": "application/json"})
    assert done.json() == {"votes": 0, "voted": False}
    assert votes(page) == 0
    assert web.post("/vote", data={**VOTE, "csrf": token, "paper": "nope"}).status_code == 404


def test_nobody_in_particular_changes_nothing(page):
    web = page.web
    token = form_token(web)
    for address, form in (
        ("/vote", VOTE), ("/views", {"name": "x", "query": "{}"}), ("/runs/start", {}), ("/runs/stop", {})
    ):  # fmt: skip
        done = web.post(address, data={**form, "csrf": token})
        assert done.status_code == 401, address
    assert votes(page) == 0


@pytest.mark.parametrize("forged", ["", "x", "of another"])
def test_a_form_must_come_from_this_browser(page, forged):
    web, other = sign_in(page.web), sign_in(page.browser())
    token = form_token(other, "/latest") if forged == "of another" else forged
    for address in ("/vote", "/views", "/sign-out", "/runs/start"):
        assert web.post(address, data={**VOTE, "csrf": token}).status_code == 403, address
    assert votes(page) == 0


def test_a_form_of_before_the_signing_in_does_not_do(page):
    before = form_token(page.web)
    web = sign_in(page.web)
    assert web.post("/vote", data={**VOTE, "csrf": before}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "null"},
    ],
)
def test_forms_from_elsewhere_are_refused(page, headers):
    web = sign_in(page.web)
    token = form_token(web, "/latest")
    assert web.post("/vote", data={**VOTE, "csrf": token}, headers=headers).status_code == 403
    own = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    assert web.post("/vote", data={**VOTE, "csrf": token}, headers=own).status_code == 303


def test_sessions_end_cannot_be_made_up_and_die_with_the_token(make):
    page = make()
    web = sign_in(page.web)
    cookie = web.cookies[SESSION]
    assert "Signed in as operator" in web.get("/").text
    until, _, mac = cookie.partition(".")
    for wrong in (f"{int(until) + 1}.{mac}", f"{until}.{mac[:-1]}x", f"{until}.", ".", "", "9" * 5000):
        fresh = page.browser()
        fresh.headers["cookie"] = f"{SESSION}={wrong}"
        assert "Signed in" not in fresh.get("/").text
    other = make(path=page.path, token="another-token-9876543210")
    stranger = other.browser()
    stranger.cookies.set(SESSION, cookie)
    assert "Signed in" not in stranger.get("/").text
    page.pages.guard.now = lambda: float(until) + 1
    assert "Signed in" not in web.get("/").text


def test_cookies_are_kept_from_script_and_other_sites(make):
    page = make(page="https://papers.example", names=("127.0.0.1",))
    done = page.web.get("/sign-in")
    (cookie,) = done.headers.get_list("set-cookie")
    assert cookie.startswith(BROWSER)
    for part in ("HttpOnly", "SameSite=lax", "Secure", "Path=/"):
        assert part in cookie
    assert "set-cookie" not in page.web.get("/latest").headers


def test_signing_in_needs_the_token_and_out_ends_it(page):
    token = form_token(page.web)
    wrong = page.web.post("/sign-in", data={"csrf": token, "token": "guess", "back": "/"})
    assert wrong.status_code == 403
    assert SESSION not in page.web.cookies
    web = sign_in(page.web)
    assert web.post("/sign-out", data={"csrf": form_token(web, "/latest")}).status_code == 303
    assert "Signed in" not in web.get("/").text
    away = page.browser()
    done = away.post("/sign-in", data={"csrf": form_token(away), "token": TOKEN, "back": "//evil.example"})
    assert done.headers["location"] == "/"


def test_a_proxy_names_users_only_if_it_is_trusted_and_here(make):
    named = {"x-user": "ann"}
    assert "Signed in" not in make().web.get("/", headers=named).text
    page = make(user_header="x-user")
    web = page.browser()
    web.headers.update(named)
    assert "Signed in as ann" in web.get("/").text
    assert "Signed in" not in page.browser("203.0.113.9").get("/", headers=named).text
    assert web.post("/vote", data=VOTE).status_code == 403  # a form it must be all the same
    token = form_token(web, "/latest")
    assert web.post("/vote", data={**VOTE, "csrf": token}).status_code == 303
    bob = page.browser()
    bob.headers["x-user"] = "bob"
    assert bob.post("/vote", data={**VOTE, "csrf": form_token(bob, "/latest")}).status_code == 303
    assert votes(page) == 2
    bob.headers["x-user"] = "bob\x7f"
    assert "Signed in" not in bob.get("/").text


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::1", "a b"]
)
def test_another_host_is_not_answered(page, host):
    response = page.web.get("/", headers={"host": host})
    assert response.status_code == 421
    assert response.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["127.0.0.1:8642", "localhost", "LOCALHOST:1", "[::1]:8642"])
def test_own_names_are(page, host):
    assert page.web.get("/robots.txt", headers={"host": host}).status_code == 200


def test_the_names_of_a_site():
    assert "papers.example" in Settings(page="https://papers.example/", host="0.0.0.0").hosts
    assert "box.lan" in Settings(host="0.0.0.0", names=("Box.lan",)).hosts
    assert host_name("papers.example:80") == "papers.example"
    with pytest.raises(UserError, match="--page"):
        Settings(host="0.0.0.0")
    for wrong in (
        "papers.example",
        "ftp://x",
        "https://a/b",
        "https://u:p@x",
        "https://x?y",
        "https://x:99999",
        "http://",
    ):
        with pytest.raises(UserError, match="no address of a site"):
            Settings(page=wrong)


def test_too_much_is_refused(page):
    assert page.web.get("/search?q=" + "a" * 60_000).status_code == 414
    assert page.web.get("/" + "a" * 20_000).status_code == 414
    assert page.web.post("/subscribe", content=b"a" * 70_000).status_code == 413
    assert page.web.post("/subscribe", content=iter([b"a" * 40_000] * 3)).status_code == 413  # its length not said
    fields = "&".join(f"a{number}=1" for number in range(500))
    assert page.web.post("/subscribe", content=fields).status_code == 413
    assert page.web.post("/api/v1/votes", content=b"a" * 70_000).json()["error"]


def test_a_bucket_empties_and_fills():
    now = itertools.count()
    bucket = Bucket(0.5, 3, now=lambda: next(now) * 0.0)
    assert [bucket.take("a") for _ in range(3)] == [0, 0, 0]
    assert bucket.take("a") == pytest.approx(2)
    assert bucket.take("b") == 0
    bucket.now = lambda: 2.0
    assert bucket.take("a") == 0
    assert bucket.take("a") > 0
    bucket.now = lambda: -5.0  # a clock that jumps back
    assert bucket.take("a") > 0
    for number in range(20_000):
        bucket.take(f"{number}")
    assert len(bucket._left) <= 10_000


def test_rates_hold_for_others_but_not_for_reading_on_this_machine(make):
    page = make(reads=0.5)
    far = page.browser("203.0.113.9")
    answers = [far.get("/robots.txt") for _ in range(12)]
    assert [one.status_code for one in answers] == [200] * 10 + [429] * 2
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert page.browser("203.0.113.10").get("/robots.txt").status_code == 200
    assert {page.web.get("/robots.txt").status_code for _ in range(30)} == {200}
    posts = [page.web.post("/vote").status_code for _ in range(40)]
    assert posts[:30] == [401] * 30
    assert set(posts[30:]) <= {401, 429}
    assert posts[-1] == 429


def test_whose_request_it_is():
    def scope(host, forwarded=None):
        headers = [] if forwarded is None else [(b"x-forwarded-for", forwarded.encode())]
        return {"type": "http", "client": (host, 1), "headers": headers}

    assert client_of(scope("203.0.113.9", "1.1.1.1"), True) == "203.0.113.9"
    assert client_of(scope("127.0.0.1", "9.9.9.9, 203.0.113.9"), True) == "203.0.113.9"
    assert client_of(scope("127.0.0.1", "9.9.9.9"), False) == "127.0.0.1"
    assert client_of(scope("2001:db8::1"), False) == client_of(scope("2001:db8::ffff"), False)
    assert client_of(scope("2001:db8::1"), False) != client_of(scope("2001:db8:0:1::1"), False)
    assert client_of(scope("::ffff:203.0.113.9"), False) == "203.0.113.9"


def test_the_token_is_made_kept_and_guarded(tmp_path):
    file = tmp_path / "token"
    token, new = read_token(file)
    assert new
    assert len(token) >= 24
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_token(file) == (token, False)
    assert read_token(None)[0] != read_token(None)[0]
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(UserError, match="holds no token"):
        read_token(file)
    with pytest.raises(UserError, match="cannot use"):
        read_token(tmp_path / "none" / "token")


def test_views_are_saved_and_forgotten_by_who_may(page):
    web = sign_in(page.web)
    token = form_token(web, "/latest")
    query = '{"view": "search", "words": "sparrows"}'
    done = web.post("/views", data={"csrf": token, "name": "birds", "query": query})
    assert done.headers["location"] == "/view/birds"
    assert web.post("/views", data={"csrf": token, "name": "../x", "query": query}).status_code == 400
    assert web.post("/views", data={"csrf": token, "name": "y", "query": "[]"}).status_code == 400
    assert web.post("/views", data={"csrf": token, "forget": "birds"}).status_code == 303
    assert web.get("/view/birds").status_code == 404
