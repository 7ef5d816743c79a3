"""Pages: they say what the store says, to anybody, without script, and nothing strange in them becomes code."""

import re
import shutil
import subprocess
import sys
from datetime import timedelta
from html.parser import HTMLParser

import feedparser
import pytest

from counterproof.page.store import Entry, Store
from counterproof.page.vectors import refresh
from counterproof.page.views import Query, save_view
from counterproof.web.pages import own_path, shortened, without_styles
from counterproof.web.site import Queries
from web.conftest import NOW, Plain, form_token, said, sign_in

PAGES = (
    "/", "/latest", "/day", "/day/2026-11-22", "/day/2030-01-01", "/week", "/week/2026-W47", "/month", "/trending",
    "/search", "/search?q=sparrows", "/room/preference", "/rooms", "/claims", "/views", "/subscribe", "/sign-in",
    "/runs", "/history/group-detr", "/paper/doi/10.1000/odd.json", "/paper/arxiv/2611.20003",
    "/paper/arxiv/2310.03708", "/similar/arxiv/2611.20003",
)  # fmt: skip


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory, filled):
    """Every page, once."""
    from starlette.testclient import TestClient

    from counterproof.web.app import Settings, build

    path = tmp_path_factory.mktemp("shown") / "page.sqlite"
    path.write_bytes(filled)
    built = build(Settings(path=path, token="x" * 30), clock=lambda: NOW, encoder=Plain(), warm=False)
    web = TestClient(built.app, base_url="http://127.0.0.1", client=("127.0.0.1", 1), raise_server_exceptions=False)
    yield {address: web.get(address) for address in PAGES}, web
    built.site.close()


@pytest.mark.parametrize("address", PAGES)
def test_every_page_answers_and_has_nothing_inline(shown, address):
    response = shown[0][address]
    assert response.status_code == 200, response.text[-500:]
    assert "style-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    elements = Elements(response.text).found
    for tag, attributes in elements:
        assert tag != "style"
        assert tag != "script" or attributes["src"].startswith("/static/")
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("href", "src", "action"):
            assert re.match(r"(https?:/)?/|#|data:,$|$", attributes.get(name) or ""), (tag, attributes)
    assert [tag for tag, _ in elements].count("h1") == 1


@pytest.mark.parametrize("address", PAGES)
def test_what_a_page_names_is_there(shown, address):
    web = shown[1]
    for tag, attributes in Elements(shown[0][address].text).found:
        if tag in ("link", "script") and (attributes.get("href") or attributes.get("src", "")).startswith("/static/"):
            asset = web.get(attributes.get("href") or attributes["src"])
            assert asset.status_code == 200
            assert "immutable" in asset.headers["cache-control"]


@pytest.mark.parametrize("address", ["/", "/latest", "/paper/doi/10.1000/odd.json", "/search?q=quotes", "/trending"])
def test_texts_of_strangers_are_escaped(page, address):
    text = page.web.get(address).text
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "<b>Bold" not in text
    assert "<u>Venue" not in text
    assert "javascript:" not in text


def test_a_paper_shows_title_abstract_links_and_where_it_is_from(page):
    text = page.web.get("/paper/doi/10.1000/odd.json").text
    assert "&lt;script&gt;alert(" in text
    assert "https://example.org/p?a=1&amp;b=2" in text
    assert "https://doi.org/10.1000/odd.json" in text
    assert "<math" in text
    assert "/paper/arxiv/2310.03708" in text  # a relative that runs
    assert "both: " in text


def test_a_card_shows_call_claims_and_verdicts(page):
    text = page.web.get("/paper/arxiv/2310.03708").text
    for expected in ("import counterproof.preference.modpo", "How it is used here", "counterproof check modpo/",
                     "confidence sequence", "Learning curves", "Cost and environment", "Limits"):  # fmt: skip
        assert expected in text, expected
    assert "aria-level" in text


def test_roots_of_a_card(page):
    text = page.web.get("/paper/slug/group-detr", follow_redirects=True).text
    assert 'href="/history/group-detr"' in text
    assert "% of the credit" in page.web.get("/paper/arxiv/2207.13085").text
    assert said(page.web.get("/history/group-detr.json"))["roots"]
    assert page.web.get("/history/nothing-of-ours").status_code == 404


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ("/paper/slug/modpo", "/paper/arxiv/2310.03708"),
        ("/paper/modpo", "/paper/arxiv/2310.03708"),
        ("/paper/2611.20003v7", "/paper/arxiv/2611.20003"),
        ("/paper/arxiv/2611.20003v2", "/paper/arxiv/2611.20003"),
        ("/paper/math.GT/0309136", "/paper/arxiv/math/0309136"),
        ("/paper/10.1000/ODD.json", "/paper/doi/10.1000/odd.json"),
    ],
)
def test_other_names_lead_to_the_paper(page, address, canonical):
    response = page.web.get(address)
    assert (response.status_code, response.headers.get("location")) == (302, canonical)
    assert page.web.get(canonical).status_code == 200


def test_what_is_not_there_is_said_so(page):
    for address in ("/nope", "/nope/2026", "/paper/arxiv/9999.99999", "/paper/slug/nope", "/static/page.0.css",
                    "/view/nope", "/similar/slug/nope", "/latest/2026-11-23", "/latest.exe", "/confirm/nope",
                    "/paper/", "/paper/..%2f..%2fetc/passwd"):  # fmt: skip
        assert page.web.get(address).status_code == 404, address
    assert page.web.post("/latest").status_code == 405


@pytest.mark.parametrize(
    "address",
    [
        "/day/2026-13-01", "/week/2026-W60", "/month/yesterday", "/trending?half_life=x", "/trending?half_life=nan",
        "/trending?half_life=-1", "/latest?cursor=zzz", "/latest?since=1.1.2026", "/latest?room=kitchen",
        "/latest?limit=0", "/latest?limit=501", "/latest?limit=%D9%A3", "/search?q=a&how=magic", "/room/kitchen",
        "/search.atom", "/day/2026-11-22?cursor=" + "A" * 3000,
    ],
)  # fmt: skip
def test_bad_questions_get_a_line_and_no_trace(page, address):
    response = page.web.get(address)
    assert response.status_code == 400
    assert "Traceback" not in response.text
    assert "That does not work" in response.text


@pytest.mark.parametrize(
    "query",
    [
        '"',
        'a" OR "b',
        "title:x AND NOT",
        "NEAR(a b)",
        "*",
        "a*b^2",
        "(((",
        "sparrows'--",
        "\x00sparrows",
        "-",
        "AND",
        "é" * 1000,
    ],
)
def test_no_query_is_syntax(page, query):
    assert page.web.get("/search", params={"q": query}).status_code == 200
    assert page.web.get("/search", params={"q": query, "part": "1"}).status_code == 200


def test_search_finds_filters_and_forgives(page):
    found = page.web.get("/search?q=sparrows").text
    assert found.count('class="item"') == 30
    assert page.web.get("/search?q=sparrows&since=2026-11-23").text.count('class="item"') == 4
    assert page.web.get("/search?q=sparrows&source=web").text.count('class="item"') == 0
    runs = page.web.get("/search?q=preference&runnable=1&room=preference").text
    assert runs.count('class="item"') > 3
    assert "planned" not in re.sub(r"<option.*?</option>", "", runs)
    assert page.web.get("/search?q=2611.20007").text.index("number 7 of") < page.web.get(
        "/search?q=2611.20007"
    ).text.index("</ol>")
    part = page.web.get("/search?q=sparrows&part=1").text
    assert "<html" not in part
    assert part.count('class="item"') == 30


def test_a_list_goes_on_to_its_end_once_each(page):
    seen, address = [], "/latest?limit=17"
    while address:
        text = page.web.get(address).text
        seen += re.findall(r'class="name">.*?href="(/paper/[^"]+)"', text, re.DOTALL)
        following = re.search(r'href="([^"]+)" rel="next">Next part', text)
        address = following and following[1].replace("&amp;", "&") + "&limit=17"
    with page.site.reading() as reader:
        assert len(seen) == len(set(seen)) == reader.store.count()


def test_days_weeks_and_months_lead_to_their_neighbours(page):
    text = page.web.get("/day/2026-11-20").text
    assert 'href="/day/2026-11-19"' in text
    assert 'href="/day/2026-11-21"' in text
    assert 'rel="next"' not in page.web.get("/day").text
    assert 'href="/week/2026-W46"' in page.web.get("/week/2026-W47").text
    assert 'href="/month/2026-10"' in page.web.get("/month").text
    assert "rest at weekends" in page.web.get("/day/2026-11-08").text


def test_trending_prints_its_formula_and_the_parts(page):
    text = page.web.get("/trending").text
    assert "2^(-days since a vote / 3)" in text
    assert re.search(r"0 votes [\d.]+ \+ 3 upvotes on 2026-11-23 [\d.]+ \+ new [\d.]+ = [\d.]+", text)
    assert "/ 7)" in page.web.get("/trending?half_life=7").text


# feeds


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("/latest.atom", "application/atom+xml"),
        ("/trending.json", "application/feed+json"),
        ("/day/2026-11-22.bib", "application/x-bibtex"),
        ("/room/preference.ris", "application/x-research-info-systems"),
        ("/search.jsonl?q=sparrows", "application/jsonl"),
        ("/similar/arxiv/2611.20003.atom", "application/atom+xml"),
        ("/similar/doi/10.1000/odd.json.bib", "application/x-bibtex"),
        ("/paper/arxiv/2611.20003.bib", "application/x-bibtex"),
        ("/paper/arxiv/2611.20003.json", "application/json"),
        ("/week.atom", "application/atom+xml"),
    ],
)
def test_lists_in_other_formats_with_an_etag(page, address, kind):
    response = page.web.get(address)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    tag = response.headers["etag"]
    for given in (tag, f'W/{tag}, "other"', "*"):
        again = page.web.get(address, headers={"if-none-match": given})
        assert (again.status_code, again.content) == (304, b"")
    assert page.web.get(address, headers={"if-none-match": '"other"'}).status_code == 200


def test_a_feed_changes_when_a_paper_comes_and_leads_to_its_pages(page):
    first = page.web.get("/latest.atom?source=daily-papers&limit=10")
    feed = feedparser.parse(first.content)
    assert len(feed.entries) == 10
    assert feed.entries[0].link.startswith("http://127.0.0.1/paper/arxiv/")
    following = next(link.href for link in feed.feed.links if link.rel == "next")
    second = feedparser.parse(page.web.get(following.removeprefix("http://127.0.0.1")).content)
    assert not {entry.id for entry in feed.entries} & {entry.id for entry in second.entries}
    store = page.store()
    store.add(Entry(title="New", arxiv="2611.30000"), source="daily-papers", day="2026-11-23")
    store.close()
    again = page.web.get("/latest.atom?source=daily-papers&limit=10", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 200
    assert "New" in again.text


def test_a_saved_view_has_page_and_feed(page):
    store = page.store()
    save_view(store, "birds", Query("search", words="sparrows", since="2026-11-23"))
    store.close()
    assert "birds" in page.web.get("/views").text
    assert page.web.get("/view/birds").text.count('class="item"') == 4
    assert len(feedparser.parse(page.web.get("/view/birds.atom").content).entries) == 4


# meaning


def test_the_first_search_is_by_words_and_later_ones_also_by_meaning(make):
    encoder = Plain()
    page = make(encoder=encoder)
    store = page.store()
    refresh(store, encoder)
    store.close()
    encoder.gate.clear()
    first = page.web.get("/search?q=sparrows").text
    assert "encoder is being loaded" in first
    assert first.count('class="item"') == 30
    encoder.gate.set()
    for _ in range(100):
        later = page.web.get("/search?q=sparrows").text
        if "encoder is being loaded" not in later:
            break
    assert "by words and by meaning" in later
    assert "meaning (MiniLM)" in page.web.get("/paper/arxiv/2611.20003").text


def test_an_encoder_that_cannot_work_is_said_so(make):
    from counterproof.errors import MissingExtra

    encoder = Plain()
    page = make(encoder=encoder)
    store = page.store()
    refresh(store, encoder)
    store.close()
    encoder.problem = MissingExtra("torch", "language")
    for _ in range(100):
        text = page.web.get("/search?q=sparrows").text
        if "torch is not installed" in text:
            break
    assert "By words only: torch is not installed" in text
    assert text.count('class="item"') == 30


def test_many_queries_at_once_are_made_in_few_batches():
    sizes = []

    class Counting(Plain):
        def encode(self, texts, timeout=None):
            found = super().encode(texts, timeout)
            sizes.append(len(texts))
            return found

    encoder = Counting()
    encoder.gate.clear()
    queries = Queries(encoder)
    for number in range(40):
        queries.prepare(f"query {number}")
    assert queries.encode(["query 3"]) is None
    encoder.gate.set()
    queries.prepare("query 3")
    for _ in range(200):
        if queries.encode(["query 39"]) is not None:
            break
        queries.prepare("query 39")
    assert sum(sizes) == 40
    assert len(sizes) <= 5


def test_nothing_heavy_is_imported_to_serve(tmp_path, filled):
    path = tmp_path / "page.sqlite"
    path.write_bytes(filled)
    code = f"""
from pathlib import Path
from starlette.testclient import TestClient
from counterproof.web.app import Settings, build
built = build(Settings(path=Path({str(path)!r})), warm=False)
web = TestClient(built.app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
for address in ("/", "/search?q=sparrows", "/paper/arxiv/2611.20003", "/api/v1/status"):
    assert web.get(address).status_code == 200
import sys
print(sorted({{"torch", "transformers", "sklearn", "mcp"}} & set(sys.modules)))
built.site.close()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


# without a store, or with one that cannot be used


def test_without_a_store_the_pages_say_what_to_do(make, tmp_path):
    page = make(path=tmp_path / "none" / "page.sqlite")
    front = page.web.get("/")
    assert front.status_code == 200
    assert "counterproof feed import" in front.text
    assert "/paper/slug/modpo" in front.text
    assert page.web.get("/paper/slug/group-detr").status_code == 200
    assert page.web.get("/paper/arxiv/2207.13085").status_code == 200
    assert page.web.get("/rooms").status_code == 200
    for address in ("/latest", "/trending.atom", "/search?q=x", "/api/v1/papers", "/views"):
        response = page.web.get(address)
        assert response.status_code == 503
        assert "counterproof feed import" in response.text
    assert not (tmp_path / "none").exists()
    assert page.site.add_cards() is None
    assert page.web.get("/latest").status_code == 200


def test_a_store_that_takes_the_place_of_another_is_seen(make, tmp_path):
    page = make()
    assert page.web.get("/latest").status_code == 200
    other = tmp_path / "other.sqlite"
    store = Store(other, clock=lambda: NOW)
    store.add(Entry(title="The only one", arxiv="2611.00001"), source="web")
    store.close()
    shutil.move(other, page.path)
    assert page.web.get("/latest").text.count('class="item"') == 1


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_file_that_is_no_store_is_left_alone(make, tmp_path, content):
    path = tmp_path / "page.sqlite"
    path.write_bytes(content)
    page = make(path=path)
    assert page.web.get("/").status_code == 200
    response = page.web.get("/latest")
    assert response.status_code == 503
    assert path.read_bytes() == content


def test_a_store_that_cannot_be_written_is_read_all_the_same(make, monkeypatch):
    page = make()
    web = sign_in(page.web)
    token = form_token(web, "/latest")
    real = Store.__init__

    def refuse(self, path=None, *, read_only=False, **rest):
        from counterproof.errors import UserError

        if not read_only:
            raise UserError(f"{path}: it cannot be written")
        real(self, path, read_only=True, **rest)

    monkeypatch.setattr(Store, "__init__", refuse)
    page.site._writer = None
    assert page.web.get("/latest").status_code == 200
    response = web.post("/vote", data={"csrf": token, "paper": "arxiv:2611.20003", "value": "1", "back": "/"})
    assert response.status_code == 503
    assert "cannot be written" in response.text
    assert "cannot be written" in page.site.add_cards()


def test_a_fault_of_ours_is_not_shown(page, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(page.site, "near", fail)
    for address in ("/paper/arxiv/2611.20003", "/api/v1/papers/arxiv/2611.20003"):
        response = page.web.get(address)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert "log" in response.text
        assert response.headers["content-security-policy"]


# small things


def test_styles_become_rules():
    html, css = without_styles(
        '<div class="frame" style="--h:4px"><span style="left:12%">a</span>'
        '<span title="b" style="left:12%">b</span></div>'
        "<h5 id=x>c</h5><h6>d</h6>"
    )
    assert "style=" not in html
    assert css.count("{") == 2
    assert "{left:12%}" in css
    rule = re.search(r"\.(s\w+)\{left", css)[1]
    assert html.count(rule) == 2
    assert re.search(r'<div class="s\w+ frame">', html)
    assert '<h5 aria-level="3" id=x>' in html
    assert '<h6 aria-level="4">' in html


@pytest.mark.parametrize(
    "given", ["//evil.example", "https://evil.example", "/\\evil.example", "", "javascript:x", "/a\nb"]
)
def test_nobody_is_sent_elsewhere(given):
    assert own_path(given) == "/"


def test_own_paths_stay():
    assert own_path("/search?q=a%20b&room=x") == "/search?q=a%20b&room=x"


def test_shortened_text_ends_with_a_word_and_no_open_formula():
    text = "one two $a + b$ three $c + d$ four"
    assert shortened(text, 100) == text
    assert shortened(text, 26) == "one two $a + b$ three …"
    assert shortened(text, 10) == "one two …"
    assert "$" not in shortened("a $" + "x" * 50, 20)


def test_a_clock_that_jumps_back_changes_no_page(make):
    page = make()
    first = page.web.get("/trending?limit=5").text
    following = re.search(r'href="([^"]+)" rel="next">', first)[1].replace("&amp;", "&")
    expected = re.findall("number [0-9]+ of", page.web.get(following).text)
    page.site.clock = lambda: NOW - timedelta(days=400)
    page.site._pool = None
    assert re.findall("number [0-9]+ of", page.web.get(following).text) == expected
    assert page.web.get("/").status_code == 200
