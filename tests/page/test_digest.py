"""The digest: each paper once, to those who asked for it, and an honest word when there is none."""

import email
import email.policy
import json
import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser

import click
import pytest
from click.testing import CliRunner

from counterproof.errors import UserError
from counterproof.page.digest import issue_letter, issue_name, make_issue, new_papers, queue_issues
from counterproof.page.digest_commands import DIGEST_COMMANDS, server_of
from counterproof.page.outbox import Folder, Letterhead, message_id, send
from counterproof.page.store import Entry, Store
from counterproof.page.subscribers import (
    confirm,
    find_subscriber,
    get_subscriber,
    new_token,
    stop,
    subscribe,
    unsubscribe_token,
)
from counterproof.page.views import Query, forget_view, save_view
from lab.clock import Clock

HEAD = Letterhead("papers@example.org", page="https://papers.example.org")
MONDAY = date(2026, 11, 23)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=Clock())
    yield store
    store.close()


def person(store, name="ann", **wishes):
    subscribe(store, f"{name}@example.org", **wishes)
    store.db.execute("DELETE FROM outbox WHERE issue LIKE 'confirm:%'")
    found = find_subscriber(store, f"{name}@example.org")
    assert confirm(store, new_token(store, found.id, found.wishes)) == "confirmed"
    return get_subscriber(store, found.id)


def paper(store, title, day=MONDAY, source="arxiv", **more):
    return store.add(Entry(title=title, **more), source=source, day=day).paper


def titles(issue):
    return [one.entry.title for one in issue.papers]


def issues(store):
    """Name, address, titles of every issue in the outbox."""
    found = []
    for row in store.db.execute("SELECT issue, email, message FROM outbox JOIN subscribers s ON s.id = subscriber"):
        message = email.message_from_bytes(row["message"], policy=email.policy.default)
        text = message.get_body(("plain",)).get_content()
        found.append((row["issue"], row["email"], re.findall(r"(?m)^\d+\. (.*?)\r?$", text)))
    return found


def later(store, **time):
    store.clock.now += timedelta(**time)


# what is in an issue


def test_an_issue_has_what_is_new_and_asked_for_and_says_why(store):
    paper(store, "Object detection with robots", abstract="Rewards.")
    paper(store, "Detecting objects", abstract="Nothing of the kind.")
    paper(store, "Rewards for robots", abstract="Medical.")
    paper(store, "Old object detection", day="2026-10-01")
    paper(store, "Tomorrow's object detection", day="2026-11-24")
    ann = person(store, topics=["object detection", "robots -medical"])
    issue = make_issue(store, ann)
    assert issue.name == "daily:2026-11-23"
    assert titles(issue) == ["Object detection with robots", "Detecting objects"]
    assert [one.reasons for one in issue.found] == [
        ("topic: object detection", "topic: robots -medical"),
        ("topic: object detection",),
    ]
    assert titles(make_issue(store, person(store, "bob"))) == [
        "Rewards for robots", "Detecting objects", "Object detection with robots",
    ]  # fmt: skip


def test_votes_come_before_newness_and_topics_before_votes(store):
    one = paper(store, "A robot", day="2026-11-22")
    two = paper(store, "B robot")
    both = paper(store, "C robot rewards", day="2026-11-21")
    for voter in "xyz":
        store.vote(one, voter, 1)
    store.vote(two, "x", 1)
    store.vote(two, "x", 0)
    ann = person(store, topics=["robot", "rewards"])
    found = new_papers(store, ann, MONDAY - timedelta(days=3), MONDAY)
    assert [entry.paper for entry in found] == [both, one, two]
    assert [entry.votes for entry in found] == [0, 3, 0]


def test_a_saved_view_is_a_reason_and_one_that_is_gone_is_said(store):
    paper(store, "Robots that learn", abstract="They walk.", published="2026-11-20")
    paper(store, "Rewards")
    store.add(Entry(title="Robots of another source"), source="elsewhere", day=MONDAY)
    save_view(store, "robots", Query("search", words="robots learn"))
    save_view(store, "elsewhere", Query(source="elsewhere"))
    save_view(store, "before", Query("day", at="2026-11-01"))
    save_view(store, "hot", Query("trending"))
    assert titles(make_issue(store, person(store, "a", views=["robots"]))) == ["Robots that learn"]
    assert titles(make_issue(store, person(store, "b", views=["elsewhere"]))) == ["Robots of another source"]
    assert titles(make_issue(store, person(store, "c", views=["before"]))) == []
    assert len(titles(make_issue(store, person(store, "d", views=["hot"])))) == 3
    ann = person(store, views=["robots", "elsewhere"], topics=["rewards"])
    issue = make_issue(store, ann)
    assert {reason for found in issue.found for reason in found.reasons} == {
        "view: robots", "view: elsewhere", "topic: rewards",
    }  # fmt: skip
    forget_view(store, "robots")
    issue = make_issue(store, ann)
    assert issue.gone == ("robots",)
    assert "No longer saved, so left out: robots." in text_of(store, ann, issue)


def test_what_did_not_fit_is_counted_and_comes_next(store):
    for number in range(5):
        paper(store, f"Paper {number}")
    ann = person(store)
    issue = make_issue(store, ann, most=3)
    assert (titles(issue), issue.more) == (["Paper 4", "Paper 3", "Paper 2"], 2)
    queue_issues(store, HEAD, most=3)
    later(store, days=1)
    assert titles(make_issue(store, ann)) == ["Paper 1", "Paper 0"]


# never twice, and everything once


def test_over_weeks_everybody_gets_every_paper_once_whenever_it_came(store):
    ann, bob = person(store), person(store, "bob", rhythm="weekly")
    expected = set()
    for number in range(30):
        day = date.fromisoformat(store.today())
        for late in (0, 1, 3):
            paper(store, f"P{number}-{late}", day=day - timedelta(days=late))
            expected.add(f"P{number}-{late}")
        for _ in range(2):  # the second call changes nothing
            queue_issues(store, HEAD)
        later(store, days=1)
    for who, number in ((ann, 30), (bob, 5)):
        got = [title for _, email, held in issues(store) if email == who.email for title in held]
        assert len(got) == len(set(got))
        names = [name for name, email, _ in issues(store) if email == who.email]
        assert len(names) == len(set(names)) == number
        # What came after the last weekly issue waits for the next.
        assert expected - set(got) == ({"P29-0", "P29-1", "P29-3"} if who is bob else set())


def test_nothing_is_lost_when_nobody_made_issues_for_a_while(store):
    ann = person(store)
    queue_issues(store, HEAD)
    for number in range(1, 15):
        paper(store, f"P{number}", day=MONDAY + timedelta(days=number))
    later(store, days=14)
    assert len(titles(make_issue(store, ann))) == 14


def test_a_paper_that_was_merged_or_listed_again_is_not_sent_again(store):
    ann = person(store)
    one = paper(store, "Robots", arxiv="2611.00001")
    two = paper(store, "The robots", doi="10.1000/1")
    queue_issues(store, HEAD)
    later(store, days=1)
    kept = paper(store, "Robots anew", day="2026-11-24")
    store.merge(kept, one, why="the same")
    top = paper(store, "Robots once more", day="2026-11-24")
    merge = store.merge(top, kept, why="the same")
    store.add(Entry(title="The robots", doi="10.1000/1"), source="semantic-scholar", day="2026-11-24")
    assert two
    assert titles(make_issue(store, ann)) == []
    store.unmerge(merge)
    assert titles(make_issue(store, ann)) == ["Robots once more"]


def test_a_paper_merged_into_an_old_one_counts_as_listed_on_its_new_day(store):
    ann = person(store)
    old = paper(store, "Robots", day="2020-01-01")
    new = paper(store, "Robots of today")
    store.merge(old, new, why="the same")
    issue = make_issue(store, ann)
    assert [one.paper for one in issue.found] == [old]
    assert issue.found[0].day == "2026-11-23"


def test_what_failed_for_good_comes_again_and_what_may_have_arrived_does_not(store, tmp_path):
    ann = person(store)
    paper(store, "Robots")
    queue_issues(store, HEAD)
    stop(store, ann)  # before it was sent
    later(store, days=1)
    ann = person(store)
    assert titles(make_issue(store, ann)) == ["Robots"]
    queue_issues(store, HEAD)
    store.db.execute("UPDATE outbox SET state = 'unsure' WHERE issue LIKE 'daily:2026-11-24'")
    later(store, days=1)
    assert titles(make_issue(store, ann)) == []


def test_an_issue_that_failed_does_not_hide_the_days_it_was_for(store):
    ann = person(store)
    paper(store, "Robots", day="2026-11-24")
    later(store, days=10)
    queue_issues(store, HEAD)
    with store.transaction():
        store.db.execute("UPDATE outbox SET state = 'failed'")
        store.db.execute("DELETE FROM delivered")
    later(store, days=1)
    assert titles(make_issue(store, ann)) == ["Robots"]


def test_a_clock_put_back_makes_no_second_issue_and_one_that_was_ahead_stops_nothing(store):
    ann = person(store)
    paper(store, "Robots")
    assert queue_issues(store, HEAD).queued == 1
    later(store, days=1)
    assert queue_issues(store, HEAD).queued == 1
    later(store, days=-1, hours=-3)
    assert queue_issues(store, HEAD).queued == 0
    later(store, days=4000)
    assert queue_issues(store, HEAD).queued == 1
    later(store, days=-3998)
    paper(store, "Rewards", day="2026-11-25")
    assert queue_issues(store, HEAD).queued == 1
    assert issues(store)[-1] == ("daily:2026-11-25", ann.email, ["Rewards"])
    later(store, days=-30)  # before consent
    assert queue_issues(store, HEAD).queued == 1


def test_killed_while_issues_are_made_each_person_has_one_or_none_and_then_one(store):
    for number in range(12):
        person(store, f"p{number}")
    for number in range(3):
        paper(store, f"Paper {number}")
    code = (
        "import os, signal, sys\nfrom datetime import *\nfrom pathlib import Path\n"
        "from counterproof.page.digest import queue_issues\nfrom counterproof.page.outbox import Letterhead\n"
        "from counterproof.page.store import Store\n"
        "store = Store(Path(sys.argv[1]), clock=lambda: datetime(2026, 11, 23, 9, tzinfo=UTC))\n"
        "def watch(number):\n    if number == 5:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "queue_issues(store, Letterhead('papers@example.org'), watch=watch)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, store.path], check=False).returncode == -9
    rows = store.db.execute("SELECT subscriber, count(*) FROM delivered GROUP BY subscriber").fetchall()
    assert [row[1] for row in rows] == [3] * 5
    done = queue_issues(store, HEAD)
    assert (done.queued, done.known) == (7, 5)
    assert {len(held) for _, _, held in issues(store)} == {3}


def test_weeks_are_iso_weeks(store):
    assert issue_name("weekly", date(2026, 12, 31)) == issue_name("weekly", date(2027, 1, 3)) == "weekly:2026-W53"
    assert issue_name("weekly", date(2027, 1, 4)) == "weekly:2027-W01"
    person(store, rhythm="weekly")
    made = []
    for _ in range(15):
        made.append(queue_issues(store, HEAD).queued)
        later(store, days=1)
    assert made == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]


# an empty issue


def text_of(store, who, issue):
    message = email.message_from_bytes(issue_letter(store, who, issue, HEAD), policy=email.policy.default)
    return " ".join(message.get_body(("plain",)).get_content().split())


def pulled(store, source, outcome, started="2026-11-23T06:00:00Z"):
    values = (source, "rss", "https://secret.example/?key=1", "{}", "2026", "{}")
    store.db.execute("INSERT OR IGNORE INTO sources VALUES (?, ?, ?, ?, ?, ?)", values)
    store.db.execute(
        "INSERT INTO pulls (source, started, finished, outcome, new, changed, same, skipped) "
        "VALUES (?, ?, ?, ?, 0, 0, 0, '[]')",
        (source, started, started, outcome),
    )


def test_an_empty_issue_says_that_the_filter_was_too_narrow(store):
    ann = person(store, topics=["robots", '"object detection"'])
    paper(store, "Rewards")
    issue = make_issue(store, ann)
    assert issue.why_empty == (
        'One new paper was listed, but none is in what you asked for: “robots”, “"object detection"”.',
    )
    assert "No new papers, 23 November 2026" in text_of(store, ann, issue)
    assert issue.why_empty[0] in text_of(store, ann, issue)


def test_an_empty_issue_says_that_it_is_the_weekend(store):
    ann = person(store)
    pulled(store, "arxiv", "done")
    for day, weekend in ((27, False), (28, True), (29, True), (30, False)):
        store.clock.now = datetime(2026, 11, day, 8, tzinfo=UTC)
        (why,) = make_issue(store, ann).why_empty
        queue_issues(store, HEAD)
        assert ("weekend" in why) == weekend, (day, why)


def test_an_empty_issue_says_that_nothing_was_read_or_nothing_was_there(store):
    ann = person(store)
    paper(store, "A card of ours", day="2024-05-01", source="card")
    assert make_issue(store, ann).why_empty == ("No source was ever read; this page's operator has to add one.",)
    pulled(store, "arxiv", "done")
    assert make_issue(store, ann).why_empty == ("No source listed a new paper.",)
    queue_issues(store, HEAD)
    later(store, days=1)
    queue_issues(store, HEAD)
    later(store, days=1)
    assert make_issue(store, ann).why_empty == ("No source was read since 23 November 2026.",)


@pytest.mark.parametrize("outcome", ["failed", "partial", "interrupted"])
def test_a_source_that_failed_is_said_in_full_and_empty_issues_without_its_address(store, outcome):
    ann = person(store)
    pulled(store, "arxiv", "done")
    pulled(store, "journal", "done", "2026-11-22T06:00:00Z")
    pulled(store, "journal", outcome)
    pulled(store, "journal", "running")
    pulled(store, "forgotten", "failed")
    store.db.execute("DELETE FROM sources WHERE name = 'forgotten'")
    for number in range(2):
        issue = make_issue(store, ann)
        assert issue.missing == ("journal",)
        text = text_of(store, ann, issue)
        assert "the last reading failed: journal." in text
        assert "secret" not in text
        assert bool(issue.papers) == bool(number)
        paper(store, "Robots")
    pulled(store, "journal", "done")
    assert make_issue(store, ann).missing == ()


def test_everything_delivered_before_is_said(store):
    ann = person(store)
    paper(store, "Robots")
    queue_issues(store, HEAD)
    later(store, days=1)
    store.add(Entry(title="Robots"), source="elsewhere", day="2026-11-24")
    assert make_issue(store, ann).why_empty == ("You had every paper that was listed since then in an earlier digest.",)


def test_empty_issues_may_be_left_out_and_are_made_when_papers_come(store):
    person(store)
    assert queue_issues(store, HEAD, empty="skip").empty == 1
    assert issues(store) == []
    paper(store, "Robots")
    assert queue_issues(store, HEAD, empty="skip").queued == 1


# the mail


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


HOSTILE = Entry(
    title='<script>alert(1)</script> <img src=x onerror=alert(1)> " & \x1b[31m\u202eevil',
    abstract="</p><a href='javascript:x'>click</a> " + "long " * 300 + "$x < y$",
    authors=("<b>Eve</b>", "Bob\r\nBcc: x@y.org", "C", "D", "E"),
    links={"page": "javascript:alert(1)"},
    venue="",
)


def test_what_strangers_wrote_is_text_in_every_part_of_the_mail(store):
    store.add(HOSTILE, source="x", day=MONDAY)
    ann = person(store, topics=['script "click"'])
    raw = issue_letter(store, ann, make_issue(store, ann), HEAD)
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert "Bcc" not in message
    html = message.get_body(("html",)).get_content()
    page = Tags(html)
    assert page.open == []
    assert set(page.tags) <= {
        "html",
        "head",
        "meta",
        "title",
        "body",
        "h1",
        "h2",
        "p",
        "a",
        "br",
        "span",
        "em",
        "hr",
        "code",
    }
    assert all(link.startswith("https://papers.example.org/") for link in page.links)
    text = message.get_body(("plain",)).get_content().replace("\r\n", "\n")
    assert "<script>alert(1)</script>" in text
    for part in (text, html):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", part.replace("\r\n", "\n"))
    assert "javascript:alert" not in text
    assert "and 1 more" in text
    assert "long …" in text
    assert len(raw) < 8000
    # The words are those of the paper, so nothing was lost by making them safe.
    assert "click" in text


def test_the_mail_links_to_the_page_and_to_the_source_and_stops_with_its_own_link(store):
    entry = Entry(
        title="Robots", arxiv="math.GT/0309136", slug="group-detr", authors=("A B",), links={"page": "https://x.org/1"}
    )
    store.vote(store.add(entry, source="card", day=MONDAY).paper, "v", 1)
    ann = person(store)
    issue = make_issue(store, ann)
    raw = issue_letter(store, ann, issue, HEAD)
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert message["Subject"] == "1 new paper, 23 November 2026"
    assert message["Message-ID"] == message_id(HEAD, "daily:2026-11-23", ann)
    stops = f"https://papers.example.org/unsubscribe/{unsubscribe_token(ann)}"
    for kind in ("plain", "html"):
        content = message.get_body((kind,)).get_content()
        ours, theirs = "https://papers.example.org/paper/arxiv/math/0309136", "https://arxiv.org/abs/math/0309136"
        for there in (ours, theirs, stops, "1 vote", "counterproof show group-detr", "confirmed on 23 November 2026"):
            assert there in content, (kind, there)
    local = issue_letter(store, ann, issue, Letterhead())
    text = email.message_from_bytes(local, policy=email.policy.default).get_body(("plain",)).get_content()
    assert "counterproof feed unsubscribe ann@example.org" in text


# the commands


@pytest.fixture
def feed(own_home):
    group = click.Group("feed")
    for command in DIGEST_COMMANDS:
        group.add_command(command)

    def run(*words, **more):
        return CliRunner().invoke(group, list(words), **more)

    run.home = own_home
    return run


def test_from_asking_to_stopping_by_commands(feed):
    with_papers = Store()
    paper(with_papers, "Robots", day=with_papers.today())
    with_papers.close()
    assert json.loads(feed("subscribe", "Ann@Example.org", "--topic", "robots", "--json").output)["says"]
    assert feed("send").exit_code == 0
    (mail,) = (feed.home / "mail").glob("confirm-*.eml")
    text = email.message_from_bytes(mail.read_bytes(), policy=email.policy.default).get_body(("plain",)).get_content()
    token = re.search(r"counterproof feed confirm (\S+)", text)[1]
    assert json.loads(feed("subscribers", "--json").output)["state"] == "pending"
    assert feed("confirm", token).exit_code == 0
    assert isinstance(feed("confirm", token).exception, UserError)
    preview = json.loads(feed("digest", "--preview", "ann@example.org", "--json").output)
    assert [one["title"] for one in preview["papers"]] == ["Robots"]
    assert json.loads(feed("digest", "--json").output)["queued"] == 1
    assert json.loads(feed("digest", "--json").output)["queued"] == 0
    assert json.loads(feed("send", "--dry-run", "--json").output)["state"] == "queued"
    assert json.loads(feed("send", "--json").output)["sent"] == 1
    (mail,) = (feed.home / "mail").glob("daily-*.eml")
    message = email.message_from_bytes(mail.read_bytes(), policy=email.policy.default)
    asks = f"Subject: {re.search('subject=(.*)>', message['List-Unsubscribe'])[1].replace('%20', ' ')}\r\n\r\n"
    assert feed("unsubscribe", "--mail", "-", input=asks).exit_code == 0
    assert json.loads(feed("subscribers", "--json").output)["state"] == "unsubscribed"
    assert feed("unsubscribe", "ann@example.org", "--forget").exit_code == 0
    assert feed("subscribers").output == ""


def test_bad_usage_is_one_clear_line(feed, monkeypatch, tmp_path):
    for words, says in (
        (["subscribe", "ann"], "no mail address"),
        (["confirm", "x"], "no token"),
        (["unsubscribe"], "say who"),
        (["unsubscribe", "ann@example.org"], "never asked"),
        (["bounce", "ann@example.org"], "never asked"),
        (["bounce"], "name an address"),
        (["bounce", "--dsn", str(tmp_path / "none")], "cannot read"),
        (["digest", "--page", "ftp://x"], "no address of a page"),
        (["send", "--smtp", "x:99999"], "HOST"),
        (["send", "--smtp", "127.0.0.1:1", "--security", "none"], "--from"),
        (["send", "--smtp", "h", "--folder", "x"], "either"),
        (["send", "--smtp", "h", "--user", "me"], "PASSWORD"),
    ):
        problem = feed(*words).exception
        assert isinstance(problem, UserError), (words, problem)
        assert says in str(problem)
        assert "\n" not in str(problem)
    monkeypatch.setenv("COUNTERPROOF_SMTP_PASSWORD_FILE", str(tmp_path / "none"))
    assert "cannot read" in str(feed("send", "--smtp", "h", "--user", "me").exception)
    assert server_of("[::1]:25") == ("::1", 25)
    assert server_of("mail.example.org") == ("mail.example.org", None)
    assert all(
        parameter.help
        for command in DIGEST_COMMANDS
        for parameter in command.params
        if isinstance(parameter, click.Option)
    )


def test_bouncing_by_hand_and_by_report(feed, tmp_path):
    store = Store()
    for name in ("ann", "bob"):
        person(store, name)
    queue_issues(store, Letterhead())
    send(store, Folder(tmp_path / "mail"), Letterhead())
    bob = find_subscriber(store, "bob@example.org")
    identity = message_id(Letterhead(), issue_name("daily", date.fromisoformat(store.today())), bob)
    store.close()
    assert "suspended" in feed("bounce", "ann@example.org").output
    report = (
        'Content-Type: multipart/report; boundary="b"\n\n--b\nContent-Type: message/delivery-status\n\n'
        "Reporting-MTA: x\n\nFinal-Recipient: rfc822; bob@example.org\nAction: failed\nStatus: 5.1.1\n\n--b\n"
        f"Content-Type: text/rfc822-headers\n\nMessage-ID: {identity}\n\n--b--\n"
    )
    assert json.loads(feed("bounce", "--dsn", "-", "--json", input=report).output)["outcome"] == "suspended"
    states = [json.loads(line)["state"] for line in feed("subscribers", "--json").output.splitlines()]
    assert states == ["suspended", "suspended"]
