"""Sources and files into the store: nothing twice, nothing lost by dying, every record left out named."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from counterproof.errors import UserError
from counterproof.page.catalogue import papers
from counterproof.page.feed import (
    add_cards,
    add_source,
    find_source,
    import_file,
    list_merges,
    list_sources,
    pull,
    rebuild,
    remove_source,
)
from counterproof.page.feed_commands import feed
from counterproof.page.fetching import Fetcher, FetchError
from counterproof.page.readers import Note, Skipped
from counterproof.page.store import Entry, Store

sys.path.insert(0, str(Path(__file__).parent))
import misbehaving
from misbehaving import Server
from test_readers import BOMB, DAILY, PAGE, RIS, RSS, SCHOLAR

from lab.clock import Clock


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=Clock())
    yield store
    store.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def fetcher(**settings):
    return Fetcher(**{"allow_private": True, "timeout": 5.0, "tries": 2, "back_off": 0.01, **settings})


def content(store):
    """All but the log of pulls and how far sources were read."""
    return [
        line for line in store.db.iterdump() if not line.startswith(('INSERT INTO "pulls"', 'INSERT INTO "sources"'))
    ]


def rows(store):
    return [dict(row) | {"skipped": json.loads(row["skipped"])} for row in store.db.execute("SELECT * FROM pulls")]


def atom(numbers, total):
    """An answer of arXiv's API."""
    entries = "".join(
        f"<entry><id>http://arxiv.org/abs/2411.{number:05d}v1</id><title>Paper {number}</title>"
        f"<summary>About {number}.</summary><published>2024-11-01T00:00:00Z</published></entry>"
        for number in numbers
    )
    return (
        '<feed xmlns="http://www.w3.org/2005/Atom" xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">'
        f"<id>http://arxiv.org/api/x</id><opensearch:totalResults>{total}</opensearch:totalResults>{entries}</feed>"
    ).encode()


class Arxiv:
    """Its API: the newest first."""

    def __init__(self, number, most=100):
        self.papers = list(range(number, 0, -1))
        self.most = most
        self.fail_from = None

    def __call__(self, handler):
        start, wanted = int(handler.query["start"]), int(handler.query["max_results"])
        if self.fail_from is not None and start >= self.fail_from:
            handler.reply(b"", 500)
            return
        end = start + min(wanted, self.most)
        handler.reply(atom(self.papers[start:end], len(self.papers)), Content_Type="application/atom+xml")


def starts(server):
    return [int(path.split("start=")[1].split("&")[0]) for path in server.asked]


# sources


def test_sources_are_noted_listed_and_removed(store):
    source = add_source(store, "vision", "arxiv", query="cat:cs.CV")
    assert source.url == "https://export.arxiv.org/api/query"
    assert (source.options, source.added) == ({"query": "cat:cs.CV"}, "2026-11-23T08:30:00Z")
    add_source(store, "blog", "web", "https://example.org/feed", allow_private=True)
    assert [item.name for item in list_sources(store)] == ["blog", "vision"]
    with pytest.raises(UserError, match="already"):
        add_source(store, "vision", "daily-papers")
    remove_source(store, "vision")
    assert [item.name for item in list_sources(store)] == ["blog"]
    with pytest.raises(UserError, match=r"no source 'blgo'.*blog"):
        find_source(store, "blgo")


@pytest.mark.parametrize(
    ("name", "kind", "url", "options", "says"),
    [
        ("a b", "web", "https://x.org", {}, "cannot be a source's name"), ("", "web", "https://x.org", {}, "name"),
        ("../x", "web", "https://x.org", {}, "name"), ("x", "wep", None, {}, "no kind 'wep'"),
        ("x", "web", None, {}, "needs an address"), ("x", "web", "x.org/feed", {}, "not an address"),
        ("x", "web", "file:///etc/passwd", {}, "not an address"), ("x", "web", "https://u:p@x.org", {}, "password"),
        ("x", "web", "https://x.org\r\nX: y", {}, "not an address"), ("x", "arxiv", None, {}, "needs --query"),
        ("x", "arxiv", None, {"query": " "}, "needs --query"),
        ("x", "daily-papers", None, {"since": "no"}, "no day"),
        ("x", "web", "https://x.org", {"query": "q"}, "no query"),
        ("x", "web", "https://x.org", {"format": "p"}, "no form 'p'"),
        ("card", "web", "https://x.org", {}, "kept for"), ("arxiv", "web", "https://x.org", {}, "kept for"),
        ("x", "arxiv", None, {"query": "q", "most": 0}, "most is from 1"),
    ],
)  # fmt: skip
def test_sources_that_make_no_sense_are_refused(store, name, kind, url, options, says):
    with pytest.raises(UserError, match=says):
        add_source(store, name, kind, url, **options)
    assert list_sources(store) == []


# pulling


def test_arxiv_is_pulled_page_by_page_until_all_is_known(store, server):
    server.routes["/q"] = arxiv = Arxiv(250)
    add_source(store, "cv", "arxiv", f"{server.url}/q", query="cat:cs.CV AND x")
    pulled = pull(store, "cv", fetcher())
    assert (pulled.outcome, pulled.new, pulled.same) == ("done", 250, 0)
    assert starts(server) == [0, 100, 200]
    assert "search_query=cat%3Acs.CV+AND+x" in server.asked[0]
    assert "sortBy=lastUpdatedDate" in server.asked[0]
    server.asked.clear()
    before = content(store)
    again = pull(store, "cv", fetcher())
    assert (again.new, again.changed, again.same) == (0, 0, 100)
    assert starts(server) == [0]
    assert content(store) == before
    arxiv.papers = [*range(400, 250, -1), *arxiv.papers]
    server.asked.clear()
    assert pull(store, "cv", fetcher()).new == 150
    assert starts(server) == [0, 100, 200]
    assert store.count() == 400


def test_a_pull_that_failed_goes_on_behind_what_it_had(store, server):
    server.routes["/q"] = arxiv = Arxiv(900)
    arxiv.fail_from = 600
    add_source(store, "cv", "arxiv", f"{server.url}/q", query="q")
    with pytest.raises(FetchError, match="500"):
        pull(store, "cv", fetcher())
    (row,) = rows(store)
    assert (row["outcome"], row["new"]) == ("failed", 600)
    assert "500" in row["skipped"][-1]["reason"]
    assert row["finished"] is not None
    arxiv.fail_from = None
    arxiv.papers = [*range(950, 900, -1), *arxiv.papers]  # new ones have pushed the others down
    server.asked.clear()
    assert pull(store, "cv", fetcher()).new == 350
    assert starts(server) == [0, 100, 600, 700, 800, 900]
    assert store.count() == 950
    assert "reached" not in find_source(store, "cv").state


def test_an_empty_page_in_the_middle_is_asked_for_again(store, server):
    arxiv, empty = Arxiv(150), iter([False, True, True, False])
    server.routes["/q"] = lambda handler: handler.reply(atom([], 150)) if next(empty) else arxiv(handler)
    add_source(store, "cv", "arxiv", f"{server.url}/q", query="q")
    assert pull(store, "cv", fetcher()).new == 150
    server.routes["/q"] = lambda handler: handler.reply(atom([], 150))
    (note,) = pull(store, "cv", fetcher()).skipped
    assert note.text == "arXiv says there are 150 papers and served 0"


def test_half_a_page_ends_a_pull_and_is_no_progress(store, server):
    server.routes["/q"] = lambda handler: handler.reply(atom(range(5, 0, -1), 5)[:-200])
    add_source(store, "cv", "arxiv", f"{server.url}/q", query="q")
    with pytest.raises(FetchError, match="no proper XML"):
        pull(store, "cv", fetcher())
    assert store.count() == 0
    assert rows(store)[0]["outcome"] == "failed"


def test_what_was_left_out_is_said_though_the_pull_fails_later(store, server):
    def api(handler):
        first = handler.query["start"] == "0"
        handler.reply(atom([2, 1], 9).replace(b"Paper 1", b""), 200 if first else 404)

    server.routes["/q"] = api
    add_source(store, "cv", "arxiv", f"{server.url}/q", query="q")
    said = []
    with pytest.raises(FetchError, match="404"):
        pull(store, "cv", fetcher(), say=said.append)
    assert said[0] == "cv: record 2: left out: has no title"
    assert [item["where"] for item in rows(store)[0]["skipped"]] == ["record 2", "pull"]


def oai(names, token="", error=""):
    records = "".join(
        f"<record><header><identifier>oai:x.org:{name}</identifier><datestamp>2024-01-01</datestamp></header><metadata>"
        '<d:dc xmlns:d="http://www.openarchives.org/OAI/2.0/oai_dc/" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<dc:title>Paper {name}</dc:title></d:dc></metadata></record>"
        for name in names
    )
    token = f"<resumptionToken>{token}</resumptionToken>"
    body = f'<error code="{error}">why</error>' if error else f"<ListRecords>{records}{token}</ListRecords>"
    return (
        '<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><responseDate>2026-11-20T23:00:00Z</responseDate>'
        f"{body}</OAI-PMH>"
    ).encode()


def test_oai_pmh_goes_from_token_to_token_and_later_asks_for_what_is_new(store, server):
    def repository(handler):
        token = handler.query.get("resumptionToken")
        if token is None:
            handler.reply(oai([], error="noRecordsMatch") if "from" in handler.query else oai("ab", "t 1&amp;x"))
        else:
            handler.reply({"t 1&x": oai("cd", "t2"), "t2": oai("e")}[token])

    server.routes["/oai"] = repository
    add_source(store, "repo", "oai-pmh", f"{server.url}/oai", set="s")
    pulled = pull(store, "repo", fetcher())
    assert (pulled.new, pulled.outcome) == (5, "done")
    assert server.asked[0] == "/oai?verb=ListRecords&metadataPrefix=oai_dc&set=s"
    assert server.asked[1] == "/oai?verb=ListRecords&resumptionToken=t+1%26x"
    server.asked.clear()
    assert pull(store, "repo", fetcher()).records == 0
    assert server.asked == ["/oai?verb=ListRecords&metadataPrefix=oai_dc&set=s&from=2026-11-20"]


def test_oai_pmh_goes_on_at_its_token_and_begins_anew_when_that_expired(store, server):
    state = {"broken": True, "expired": False}

    def repository(handler):
        token = handler.query.get("resumptionToken")
        if token is None:
            handler.reply(oai("ab", "t1"))
        elif state["expired"]:
            state["expired"] = False
            handler.reply(oai([], error="badResumptionToken"))
        else:
            handler.reply(oai("cd") if not state["broken"] else b"<OAI-PMH")

    server.routes["/oai"] = repository
    add_source(store, "repo", "oai-pmh", f"{server.url}/oai")
    with pytest.raises(UserError):
        pull(store, "repo", fetcher())
    assert (store.count(), find_source(store, "repo").state["token"]) == (2, "t1")
    state.update(broken=False, expired=True)
    server.asked.clear()
    pulled = pull(store, "repo", fetcher())
    assert (pulled.new, pulled.same) == (2, 2)
    assert pulled.skipped == [Note("pull", "the place to go on from has expired; begun anew")]
    assert ["resumptionToken" in path for path in server.asked] == [True, False, True]
    assert find_source(store, "repo").state == {"since": "2026-11-20"}


def test_oai_pmh_that_never_ends_is_noticed(store, server):
    server.routes["/oai"] = lambda handler: handler.reply(oai("ab", "again"))
    add_source(store, "repo", "oai-pmh", f"{server.url}/oai")
    with pytest.raises(FetchError, match="without end"):
        pull(store, "repo", fetcher())
    assert len(server.asked) == 2
    server.routes["/oai"] = lambda handler: handler.reply(oai([], error="badArgument"))
    with pytest.raises(FetchError, match="badArgument: why"):
        pull(store, "repo", fetcher())


def daily(day, likes=1):
    paper = {"id": f"2411.{day[-2:]}000", "title": f"Of {day}", "upvotes": likes}
    return json.dumps([{"paper": paper, "numComments": 2}, {"paper": {"id": "x"}}]).encode()


def test_daily_papers_day_by_day_and_the_last_day_once_more(store, server):
    def api(handler):
        day = handler.query["date"]
        if day > "2026-11-24":
            handler.reply(b'{"error": "in the future"}', 400)
        else:
            handler.reply(b"[]" if day == "2026-11-22" else daily(day))

    server.routes["/d"] = api
    add_source(store, "hf", "daily-papers", f"{server.url}/d", since="2026-11-21")
    pulled = pull(store, "hf", fetcher())
    assert (pulled.new, pulled.skipped) == (2, [Skipped("record 2", "has no title")] * 2)
    assert [path[8:18] for path in server.asked] == ["2026-11-21", "2026-11-22", "2026-11-23"]
    assert store.find("2411.21000").day == "2026-11-21"
    assert store.find("2411.21000").entry.signals == {"upvotes": 1, "comments": 2}
    server.asked.clear()
    store.clock.now += timedelta(days=2)
    pulled = pull(store, "hf", fetcher())
    assert [path[8:18] for path in server.asked] == ["2026-11-23", "2026-11-24", "2026-11-25"]
    assert (pulled.new, pulled.same) == (1, 1)
    assert Note("2026-11-25", "the day has not begun there yet") in pulled.skipped
    store.clock.now -= timedelta(days=30)  # a clock that jumps back
    server.asked.clear()
    pull(store, "hf", fetcher())
    assert [path[8:18] for path in server.asked] == ["2026-10-26"]


def test_semantic_scholar_is_paged_and_ends(store, server):
    def search(handler):
        offset = int(handler.query["offset"])
        data = [{"paperId": str(n), "title": f"P{n}"} for n in range(offset, min(offset + 100, 150))]
        handler.reply(json.dumps({"total": 150, "data": data, **({"next": 100} if offset == 0 else {})}).encode())

    server.routes["/s"] = search
    add_source(store, "s2", "semantic-scholar", f"{server.url}/s", query="detection transformers")
    assert pull(store, "s2", fetcher()).new == 150
    assert len(server.asked) == 2


def test_an_address_of_the_web_is_asked_only_for_what_changed(store, server):
    def page(handler):
        if handler.headers.get("If-None-Match") == '"1"':
            handler.reply(b"", 304)
        else:
            handler.reply(RSS, ETag='"1"')

    server.routes["/rss"] = page
    add_source(store, "rss", "web", f"{server.url}/rss")
    assert (pull(store, "rss", fetcher()).new, pull(store, "rss", fetcher()).outcome) == (1, "unchanged")
    # Only arXiv itself is believed to be arXiv.
    assert [record[0] for record in store.records(store.find("2411.00001").id)] == ["rss"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"), (b"Service down.", "reads as a paper"),
        (b"", "is empty"), (b"%PDF-1.4", "PDF"),
        (BOMB + b"<rss><channel><item><title>&c;</title></item></channel></rss>", None), (b'{"a":', "begins like JSON"),
    ],
    ids=["html", "words", "empty", "pdf", "bomb", "json"],
)  # fmt: skip
def test_what_is_no_list_is_said_and_nothing_is_taken(store, server, body, says):
    server.routes["/x"] = body
    add_source(store, "x", "web", f"{server.url}/x")
    if says is None:
        pulled = pull(store, "x", fetcher())
        assert pulled.outcome == "partial"
        assert "entities" in pulled.skipped[0].reason
    else:
        with pytest.raises(UserError, match=says):
            pull(store, "x", fetcher())
    assert store.count() == 0
    assert "entities" in rows(store)[0]["skipped"][0]["reason"] or rows(store)[0]["outcome"] == "failed"


def test_a_feed_that_breaks_off_is_asked_for_whole_the_next_time(store, server):
    document = atom([1, 2], 2)
    server.routes["/x"] = lambda handler: handler.reply(document[:-60], ETag='"1"')
    add_source(store, "x", "web", f"{server.url}/x")
    assert (pull(store, "x", fetcher()).outcome, find_source(store, "x").state) == ("partial", {})
    server.routes["/x"] = lambda handler: handler.reply(document, ETag='"1"')
    assert (pull(store, "x", fetcher()).outcome, store.count()) == ("done", 2)
    assert "If-None-Match" not in server.headers[-1]
    assert find_source(store, "x").state == {"etag": '"1"'}


def test_a_stranger_cannot_write_on_our_cards(store, server):
    add_cards(store)
    card = next(paper for paper in papers().values() if paper.arxiv is None or paper.slug == "group-detr")
    forged = {"title": "Forged", "slug": card.slug, "source": "card", "abstract": "x"}
    server.routes["/x"] = json.dumps(forged).encode()
    add_source(store, "x", "web", f"{server.url}/x")
    pull(store, "x", fetcher())
    assert store.find(card.slug).entry.title == card.title
    assert [record[0] for record in store.records(store.find(card.slug).id)] == ["card"]


def test_private_addresses_need_leave(store, server):
    server.routes["/x"] = RIS
    add_source(store, "x", "web", f"{server.url}/x")
    with pytest.raises(FetchError, match="--allow-private"):
        pull(store, "x", Fetcher())
    assert server.asked == []
    remove_source(store, "x")
    add_source(store, "x", "web", f"{server.url}/x", allow_private=True)
    assert pull(store, "x", Fetcher()).new == 2


def test_one_pull_at_a_time(store, server):
    import fcntl

    add_source(store, "x", "web", f"{server.url}/x")
    with open(f"{store.path}.pulling", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is pulling"):
            pull(store, "x", fetcher())
    with pytest.raises(FetchError, match="404"):
        pull(store, "x", fetcher())


def test_a_pull_that_is_killed_is_gone_on_with_and_nothing_doubles(tmp_path, server):
    arxiv = Arxiv(600)

    def slow(handler):
        if int(handler.query["start"]) >= 300:
            time.sleep(30)
        arxiv(handler)

    server.routes["/q"] = slow
    path = tmp_path / "page.sqlite"
    store = Store(path)
    add_source(store, "cv", "arxiv", f"{server.url}/q", query="q")
    code = (
        "from pathlib import Path\nfrom counterproof.page.feed import pull\n"
        "from counterproof.page.fetching import Fetcher\nfrom counterproof.page.store import Store\n"
        f"pull(Store(Path({str(path)!r})), 'cv', Fetcher(allow_private=True))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(server.asked) < 4:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert store.count() == 300
    assert rows(store)[0]["outcome"] == "running"
    assert rows(store)[0]["new"] == 300
    server.routes["/q"] = arxiv
    server.asked.clear()
    pulled = pull(store, "cv", fetcher())
    assert (pulled.new, pulled.same) == (300, 100)
    assert starts(server) == [0, 300, 400, 500]
    assert [row["outcome"] for row in rows(store)] == ["interrupted", "done"]
    count = store.db.execute("SELECT count(*), count(DISTINCT digest) FROM records").fetchone()
    assert tuple(count) == (600, 600)
    store.close()


# files


@pytest.mark.parametrize(
    ("name", "data", "new", "left"),
    [
        ("a.ris", RIS, 2, 2), ("a.json", DAILY, 1, 2), ("b.json", SCHOLAR, 1, 1), ("page.txt", PAGE.encode(), 4, 6),
        ("a.xml", RSS, 1, 0), ("a.jsonl", b'{"title": "T"}\n\n{"title": "U"}\n{\n', 2, 1),
    ],
)  # fmt: skip
def test_a_file_again_changes_nothing_and_all_left_out_is_kept(store, tmp_path, name, data, new, left):
    (tmp_path / name).write_bytes(data)
    pulled = import_file(store, tmp_path / name)
    assert (pulled.outcome, pulled.new) == ("done", new)
    assert sum(isinstance(item, Skipped) for item in pulled.skipped) == left
    assert rows(store)[0]["skipped"] == pulled.skipped_json()
    assert (rows(store)[0]["new"], rows(store)[0]["outcome"]) == (new, "done")
    before = content(store)
    store.clock.now += timedelta(days=3)
    again = import_file(store, tmp_path / name)
    assert (again.new, again.changed, again.same) == (0, 0, new)
    assert content(store) == before


def test_a_large_file_is_taken_in_parts_and_line_by_line(store, tmp_path, monkeypatch):
    monkeypatch.setattr("counterproof.page.feed.BATCH", 7)
    monkeypatch.setattr("counterproof.page.feed.STREAMED", 100)
    lines = [json.dumps({"title": f"Paper {n}"}) if n % 5 else "{" for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"title": "First"}', *lines]))
    pulled = import_file(store, tmp_path / "a.jsonl")
    assert (pulled.new, len(pulled.skipped)) == (81, 20)
    assert rows(store)[0]["new"] == 81
    assert len(rows(store)[0]["skipped"]) == 20


def test_days_and_sources_are_as_told(store, tmp_path):
    (tmp_path / "a.ris").write_bytes(RIS)
    import_file(store, tmp_path / "a.ris", source="library", day="2026-11-01")
    paper = store.find("2005.12872")
    assert (paper.day, store.records(paper.id)[0][0]) == ("2026-11-01", "library")
    with pytest.raises(UserError, match="no day"):
        import_file(store, tmp_path / "a.ris", day="1.11.2026")


@pytest.mark.parametrize(
    ("name", "data", "form", "says"),
    [
        ("a.bib", RIS, None, "not what its name says: it ends like BibTeX, and holds RIS"),
        ("a.ris", b"", None, "empty"), ("a.txt", b"The service is down.", None, "nothing in .* reads as a paper"),
        ("a.ris", RIS, "bibtex", "is no bibtex: it holds RIS"), ("a.ris", RIS, "docx", "no form 'docx'"),
        ("missing.ris", None, None, "No such file"), ("a.json", b"%PDF-", None, "a PDF file"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_says_leaves_the_page_as_it_was(store, tmp_path, name, data, form, says):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = list(store.db.iterdump())
    with pytest.raises(UserError, match=says):
        import_file(store, tmp_path / name, form=form)
    with pytest.raises(UserError, match="is a folder"):
        import_file(store, tmp_path)
    assert list(store.db.iterdump()) == before


def test_our_dump_comes_back_into_another_page(store, tmp_path):
    formats = pytest.importorskip("counterproof.page.formats")
    (tmp_path / "a.ris").write_bytes(RIS)
    (tmp_path / "b.json").write_bytes(DAILY)
    add_cards(store)
    for name in ("a.ris", "b.json"):
        import_file(store, tmp_path / name)
    (tmp_path / "dump.jsonl").write_text("".join(formats.dump(store)))
    other = Store(tmp_path / "other.sqlite", clock=Clock())
    pulled = import_file(other, tmp_path / "dump.jsonl")
    assert pulled.skipped == []
    said = "SELECT key, slug, title, abstract, entry, published, day FROM papers ORDER BY key"
    assert [tuple(row) for row in other.db.execute(said)] == [tuple(row) for row in store.db.execute(said)]
    other.close()


# cards, merges, everything anew


def test_the_cards_are_papers_like_the_others(store, tmp_path):
    number = len(papers())
    assert add_cards(store) == {"new": number, "changed": 0, "same": 0}
    before = content(store)
    assert add_cards(store) == {"new": 0, "changed": 0, "same": number}
    assert content(store) == before
    card = next(paper for paper in papers().values() if paper.arxiv)
    line = {"title": card.title, "arxiv": card.arxiv, "published": "2022-07-17T00:00:00Z", "authors": ["A B"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert import_file(store, tmp_path / "a.jsonl").changed == 1
    paper = store.find(card.slug)
    assert paper.entry.authors == ("A B",)
    assert paper.entry.abstract.startswith(card.summary)
    assert paper.entry.extra["room"] == card.room
    assert all(len(row[0]) == 10 for row in store.db.execute("SELECT day FROM papers"))


def test_every_record_is_read_again_by_the_reader_of_its_form(store, tmp_path, server):
    add_cards(store)
    for name, data in (
        ("a.ris", RIS),
        ("a.json", DAILY),
        ("b.json", SCHOLAR),
        ("p.txt", PAGE.encode()),
        ("a.xml", RSS),
    ):
        (tmp_path / name).write_bytes(data)
        import_file(store, tmp_path / name)
    rebuild(store)
    before = content(store)
    assert rebuild(store) == 0
    assert content(store) == before
    store.db.execute("UPDATE papers SET title = 'lost' WHERE slug IS NULL")
    store.db.execute("UPDATE records SET entry = json_set(entry, '$.title', 'misread') WHERE raw IS NOT NULL")
    assert rebuild(store) == 8  # one paper of the page is a card of ours, whose word goes first
    assert content(store) == before
    store.db.execute("UPDATE records SET form = 'gone' WHERE form = 'ris'")
    with pytest.raises(UserError, match="no form 'gone'"):
        rebuild(store)


def test_merges_are_listed_with_what_became_of_them(store):
    one = store.add(Entry(title="A", arxiv="2005.00001"), source="x").paper
    two = store.add(Entry(title="B", doi="10.1000/1"), source="x").paper
    number = store.merge(one, two, why="alike")
    (row,) = list_merges(store)
    assert (row["id"], row["kept"], row["merged"], row["why"]) == (number, "arxiv:2005.00001", "doi:10.1000/1", "alike")
    store.unmerge(number)
    assert list_merges(store)[0]["undone"] == "2026-11-23T08:30:00Z"


# the command line


def run(*words, code=0):
    done = CliRunner().invoke(feed, [str(word) for word in words], catch_exceptions=True)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_the_commands_do_it_all(tmp_path, server):
    (tmp_path / "a.ris").write_bytes(RIS + b"\x1b[31mred\n")
    said = run("import", tmp_path / "a.ris")
    assert "2 new, 0 changed, 0 known, 3 left out" in said.stdout
    assert "line 1: left out: outside of a record: junk before" in said.stderr
    assert "line 15: the record has no ER line" in said.stderr
    assert "\x1b" not in said.output
    (again,) = json.loads(run("import", "--json", tmp_path / "a.ris").stdout)
    assert (again["same"], len(again["skipped"])) == (2, 4)
    server.routes["/x"] = RSS
    assert json.loads(run("add", "x", f"{server.url}/x", "--json").stdout)["kind"] == "web"
    run("add", "y", f"{server.url}/y")
    assert "never pulled" in run("list").stdout
    assert "1 new" in run("pull", "x", "--allow-private").stdout
    both = run("pull", "--all", "--allow-private", "--json", code=1)
    assert [row["outcome"] for row in json.loads(both.stdout)] == ["done", "failed"]
    assert "404" in both.stderr
    listed = json.loads(run("list", "--json").stdout)
    assert [row["last"]["outcome"] for row in listed] == ["done", "failed"]
    assert json.loads(run("remove", "y", "--json").stdout) == {"removed": "y"}
    assert json.loads(run("merges", "--json").stdout) == []
    run("rebuild")
    assert json.loads(run("rebuild", "--json").stdout) == {"changed": 0}
    run("pull", code=2)
    run("pull", "x", "--all", code=2)
    assert isinstance(run("unmerge", "7", code=1).exception, UserError)
    assert isinstance(run("import", tmp_path / "none.ris", code=1).exception, UserError)


def test_of_several_files_none_is_taken_when_one_is_bad(tmp_path):
    (tmp_path / "a.ris").write_bytes(RIS)
    (tmp_path / "b.bib").write_bytes(RIS)
    run("import", tmp_path / "a.ris", tmp_path / "b.bib", code=1)
    assert not Path(os.environ["COUNTERPROOF_HOME"], "page.sqlite").exists()


def test_every_option_says_what_it_does():
    for command in feed.commands.values():
        assert command.help
        assert all(option.help for option in command.params if option.param_type_name == "option"), command.name


def test_looking_at_the_page_loads_nothing_heavy():
    code = (
        "import sys, counterproof.page.feed, counterproof.page.feed_commands\n"
        "print(sorted({'torch', 'feedparser', 'bibtexparser', 'defusedxml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_slow_server_does_not_hold_a_pull_for_ever(store, server):
    server.routes["/x"] = misbehaving.drip
    add_source(store, "x", "web", f"{server.url}/x")
    with pytest.raises(FetchError, match="within"):
        pull(store, "x", fetcher(timeout=0.2, tries=1))
    assert rows(store)[0]["outcome"] == "failed"
