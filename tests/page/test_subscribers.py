"""Subscribers: nothing without consent, nothing learnt from asking, and every link does one thing."""

import base64
import json
import sqlite3
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.page.store import Store
from counterproof.page.subscribers import (
    Limits,
    TooMany,
    Wishes,
    all_subscribers,
    check,
    confirm,
    find_subscriber,
    forget,
    forget_unconfirmed,
    mail_address,
    new_token,
    note_bounce,
    stop,
    subscribe,
    topic_match,
    unsubscribe,
    unsubscribe_token,
)
from lab.clock import Clock


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=Clock())
    yield store
    store.close()


def outbox(store):
    return [tuple(row) for row in store.db.execute("SELECT issue, state, message FROM outbox ORDER BY id")]


def asked(store, email="ann@example.org", **wishes):
    """A token as the mail of an ask would have it."""
    subscribe(store, email, **wishes)
    person = find_subscriber(store, email)
    (message,) = store.db.execute(
        "SELECT message FROM outbox WHERE subscriber = ? ORDER BY id DESC LIMIT 1", (person.id,)
    ).fetchone()
    store.db.execute("UPDATE outbox SET state = 'sent' WHERE subscriber = ?", (person.id,))
    return new_token(store, person.id, Wishes.from_json(message.decode()))


def subscribed(store, email="ann@example.org", **wishes):
    assert confirm(store, asked(store, email, **wishes)) == "confirmed"
    return find_subscriber(store, email)


# addresses


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" Ann@Example.ORG ", "ann@example.org"),
        ("a.b+c@sub.example.org", "a.b+c@sub.example.org"),
        ("o'neil@example.org", "o'neil@example.org"),
        ("bob@bücher.example", "bob@xn--bcher-kva.example"),
        ("bob@STRASSE.example", "bob@strasse.example"),
        ("bob@BÜCHER。example", "bob@xn--bcher-kva.example"),
        ("bob@straße.example", "bob@xn--strae-oqa.example"),  # IDNA 2008: another domain than strasse
        ("x" * 64 + "@example.org", "x" * 64 + "@example.org"),
    ],
)
def test_addresses_are_kept_in_one_form(text, clean):
    assert mail_address(text) == clean
    assert mail_address(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "", "ann", "ann@", "@example.org", "ann@@example.org", "a@b@c.org", "ann@localhost", "ann@example..org",
        "ann@-example.org", "ann@example-.org", ".ann@example.org", "ann.@example.org", "a..b@example.org",
        "ann@example.org\nBcc: all@example.org", "ann@example.org\r\nX: y", "ann\0@example.org", "ann b@example.org",
        "ann\t@example.org", "<ann@example.org>", "Ann <ann@example.org>", '"a b"@example.org', "ann@[127.0.0.1]",
        "ann@127.0.0.1", "ann@example.org,bob@example.org", "x" * 65 + "@example.org", "a@" + "b" * 64 + ".org",
        "a@" + ".".join(["b" * 60] * 5), "änn@example.org", "ann@exa\u202emple.org", "ann@xn--\ud800.org",
        "ann@" + "é" * 300 + ".org", "ann@exam_ple.org", "ann@example.org.", "ann%@example.org\x0b", "a\u200b@b.org",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_on_one_line(text):
    with pytest.raises(UserError) as problem:
        mail_address(text)
    assert "\n" not in str(problem.value)
    assert "\r" not in str(problem.value)
    assert str(problem.value).isprintable()


def test_asking_with_no_address_leaves_nothing(store):
    before = list(store.db.iterdump())
    for text in ("", "ann@example.org\r\nBcc: all@example.org"):
        with pytest.raises(UserError, match="no mail address"):
            subscribe(store, text)
    assert list(store.db.iterdump()) == before


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_is_an_address_without_anything_a_header_could_mean_or_refused(text):
    for candidate in (text, f"{text}@example.org", f"ann@{text}", f"ann@{text}.org"):
        try:
            clean = mail_address(candidate)
        except UserError:
            continue
        assert clean.isascii()
        assert clean.isprintable()
        assert not set(' ,;:<>()[]"\\') & set(clean)
        assert clean.count("@") == 1
        assert len(clean) <= 254


# wishes


@pytest.mark.parametrize(
    ("topic", "match"),
    [
        ("object detection", '("object" AND "detection")'),
        ('"object detection" robots', '("object detection" AND "robots")'),
        ("rewards -medical", '("rewards") NOT "medical"'),
        ("rewards -medical -law", '("rewards") NOT "medical" NOT "law"'),
        ("co-training", '("co training")'),
        ("AND OR NOT NEAR(a b) title: * ^x", '("AND" AND "OR" AND "NOT" AND "NEAR a" AND "b" AND "title" AND "x")'),
        ('un"balanced', '("un balanced")'),
        ("-medical", None),
        ("?!", None),
        ("", None),
    ],
)
def test_topics_never_become_syntax(topic, match):
    assert topic_match(topic) == match


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_word_index_takes_whatever_a_topic_is_made_of(text):
    with sqlite3.connect(":memory:") as db:
        db.execute("CREATE VIRTUAL TABLE words USING fts5 (title, abstract)")
        match = topic_match(text)
        if match is not None:
            db.execute("SELECT rowid FROM words WHERE words MATCH ?", (match,)).fetchall()


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"rhythm": "hourly"}, "daily or weekly"),
        ({"topics": ["a\r\nBcc: x@y.org"]}, "control characters"),
        ({"topics": ["a\u202eb"]}, "control characters"),
        ({"topics": ["?"]}, "no word"),
        ({"topics": ["x" * 81]}, "81 letters"),
        ({"topics": ["x"] * 21}, "at most 20"),
        ({"views": ["nothing"]}, "no saved view"),
    ],
)
def test_wishes_that_make_no_sense_are_refused_for_known_and_unknown_alike(store, wishes, says):
    subscribed(store, "known@example.org")
    before = list(store.db.iterdump())
    for email in ("known@example.org", "new@example.org"):
        with pytest.raises(UserError, match=says):
            subscribe(store, email, **wishes)
    assert list(store.db.iterdump()) == before


# asking and confirming


def test_asking_makes_nobody_a_subscriber_and_confirming_does_with_the_time_of_consent(store):
    token = asked(store, rhythm="weekly", topics=["  object   detection", "Object Detection"])
    person = find_subscriber(store, "ANN@example.org")
    assert (person.state, person.confirmed) == ("pending", None)
    store.clock.now += timedelta(hours=1)
    link = check(store, token)
    assert (link.purpose, link.problem, link.address) == ("confirm", None, "a…@example.org")
    assert link.wishes == Wishes("weekly", ("object detection",))
    assert find_subscriber(store, "ann@example.org").state == "pending"  # looking did nothing
    assert confirm(store, token) == "confirmed"
    person = find_subscriber(store, "ann@example.org")
    assert (person.state, person.confirmed) == ("active", "2026-11-23T09:30:00Z")
    assert person.wishes == link.wishes


def test_a_token_works_once_and_for_two_days_and_is_nowhere_in_the_file(store):
    token = asked(store)
    assert token.encode() not in b"".join(line.encode() for line in store.db.iterdump())
    assert base64.urlsafe_b64decode(token).hex().upper() not in "".join(store.db.iterdump()).upper()
    late = asked(store, "bob@example.org")
    store.clock.now += timedelta(hours=48) - timedelta(seconds=1)
    assert confirm(store, token) == "confirmed"
    store.clock.now += timedelta(seconds=1)
    assert check(store, late).problem == "expired"
    assert confirm(store, late) == "expired"
    assert find_subscriber(store, "bob@example.org").state == "pending"
    assert confirm(store, token) == "used"
    assert check(store, token).problem == "used"


def test_a_used_link_does_not_bring_back_who_stopped(store):
    token = asked(store)
    second = asked(store)
    assert confirm(store, token) == "confirmed"
    person = find_subscriber(store, "ann@example.org")
    assert unsubscribe(store, unsubscribe_token(person)) == "unsubscribed"
    assert confirm(store, token) == "used"
    assert confirm(store, second) == "unknown"  # and neither does an unused one sent earlier
    assert find_subscriber(store, "ann@example.org").state == "unsubscribed"
    assert confirm(store, asked(store)) == "confirmed"
    assert find_subscriber(store, "ann@example.org").state == "active"


@pytest.mark.parametrize("email", ["new@example.org", "active@example.org", "gone@example.org", "full@example.org"])
def test_the_answer_is_the_same_whoever_the_address_belongs_to(store, email):
    subscribed(store, "active@example.org")
    stop(store, subscribed(store, "gone@example.org"))
    note_bounce(store, subscribed(store, "full@example.org").id, final=True)
    before = {person.email: person for person in all_subscribers(store)}
    queued = len(outbox(store))
    assert subscribe(store, email, topics=["other"], caller="192.0.2.1") is None
    assert len(outbox(store)) == queued + 1
    # ... and nothing changes for who is known, whoever asked.
    after = {person.email: person for person in all_subscribers(store)}
    assert {name: after[name] for name in before} == before


def test_other_wishes_hold_when_they_are_confirmed_and_consent_keeps_its_time(store):
    first = subscribed(store, topics=["one"])
    store.clock.now += timedelta(days=2)
    token = asked(store, topics=["two"], rhythm="weekly")
    assert find_subscriber(store, first.email).wishes == Wishes("daily", ("one",))
    assert confirm(store, token) == "confirmed"
    second = find_subscriber(store, first.email)
    assert second.wishes == Wishes("weekly", ("two",))
    assert second.confirmed == first.confirmed
    assert unsubscribe_token(second) == unsubscribe_token(first)


@pytest.mark.parametrize(
    "token", ["", "x", "x" * 44, "ä" * 44, "A" * 100_000, "\0", "\ud800", "../..", "a b", "=" * 44]
)
def test_forged_tokens_do_nothing(store, token):
    subscribed(store)
    before = list(store.db.iterdump())
    assert check(store, token) is None
    assert confirm(store, token) == "unknown"
    assert unsubscribe(store, token) == "unknown"
    assert list(store.db.iterdump()) == before


def test_every_letter_of_a_token_counts(store):
    token = asked(store)
    stops = unsubscribe_token(subscribed(store, "bob@example.org"))
    for place in range(44):
        for good, use in ((token, confirm), (stops, unsubscribe)):
            bad = good[:place] + ("A" if good[place] != "A" else "B") + good[place + 1 :]
            assert use(store, bad) == "unknown"
    assert unsubscribe(store, token) == "unknown"
    assert confirm(store, stops) == "unknown"
    assert find_subscriber(store, "bob@example.org").state == "active"


def test_tokens_are_no_options_of_a_command_line(store, monkeypatch):
    given = iter([b"\xf8" * 33, b"\xfb" * 33, b"\xf7" * 33, b"\xfa" * 33, b"\x01" * 33])
    monkeypatch.setattr("counterproof.page.subscribers.secrets.token_bytes", lambda size: next(given)[:size])
    subscribe_row = (b"h" * 12, b"s" * 32)
    store.db.execute(
        "INSERT INTO subscribers (email, state, rhythm, topics, views, handle, secret, asked) "
        "VALUES ('a@b.org', 'pending', 'daily', '[]', '[]', ?, ?, '2026')",
        subscribe_row,
    )
    person = find_subscriber(store, "a@b.org")
    assert new_token(store, person.id, Wishes()) == base64.urlsafe_b64encode(b"\xf7" * 33).decode()
    assert new_token(store, person.id, Wishes()) == base64.urlsafe_b64encode(b"\x01" * 33).decode()


# stopping


def test_stopping_needs_the_link_only_and_may_be_repeated(store):
    ann, bob = subscribed(store), subscribed(store, "bob@example.org")
    token = unsubscribe_token(ann)
    assert token != unsubscribe_token(bob)
    assert check(store, token).purpose == "unsubscribe"
    assert find_subscriber(store, ann.email).state == "active"
    store.clock.now += timedelta(days=400)  # it never expires
    assert unsubscribe(store, token) == "unsubscribed"
    ended = find_subscriber(store, ann.email).ended
    store.clock.now += timedelta(days=1)
    assert unsubscribe(store, token) == "unsubscribed"
    assert find_subscriber(store, ann.email).ended == ended
    assert check(store, token).problem == "used"
    assert find_subscriber(store, bob.email).state == "active"


def test_what_waits_for_who_stops_is_not_sent_and_was_not_delivered(store):
    from counterproof.page.store import Entry

    ann = subscribed(store)
    paper = store.add(Entry(title="T"), source="x").paper
    store.db.execute(
        "INSERT INTO outbox (issue, subscriber, message_id, message, state, changed) "
        "VALUES ('daily:2026-11-23', ?, 'm', x'41', 'queued', 'now')",
        (ann.id,),
    )
    store.db.execute("INSERT INTO delivered VALUES (?, ?, 'daily:2026-11-23')", (ann.id, paper))
    stop(store, ann)
    assert outbox(store)[-1] == ("daily:2026-11-23", "failed", b"")
    assert store.db.execute("SELECT count(*) FROM delivered").fetchone()[0] == 0


# floods


def test_an_address_gets_three_mails_a_day_and_a_fourth_ask_looks_the_same(store):
    for _ in range(3):
        asked(store)
        store.clock.now += timedelta(hours=1)
    for _ in range(5):
        assert subscribe(store, "ANN@example.org") is None
    assert len(outbox(store)) == 3
    store.clock.now += timedelta(hours=21, seconds=1)  # a day after the first
    subscribe(store, "ann@example.org")
    assert len(outbox(store)) == 4


def test_asking_again_before_the_mail_went_out_sends_one_mail_with_the_last_wishes(store):
    subscribe(store, "ann@example.org", topics=["one"])
    subscribe(store, "ann@example.org", topics=["two"])
    ((issue, state, message),) = outbox(store)
    assert issue.startswith("confirm:")
    assert state == "queued"
    assert json.loads(message)["topics"] == ["two"]


def test_a_flood_is_stopped_per_caller_and_over_all(store):
    limits = Limits(address=3, caller=4, all=6)
    for number in range(4):
        subscribe(store, f"a{number}@example.org", caller="2001:db8:1:2::1", limits=limits)
    with pytest.raises(TooMany):
        subscribe(store, "b@example.org", caller="2001:db8:1:2:ffff::9", limits=limits)  # the same /64
    subscribe(store, "c@example.org", caller="192.0.2.1", limits=limits)
    subscribe(store, "d@example.org", caller="::ffff:192.0.2.1", limits=limits)
    with pytest.raises(TooMany):
        subscribe(store, "e@example.org", caller="192.0.2.7", limits=limits)
    subscribe(store, "f@example.org", limits=limits)  # the operator
    assert len(list(all_subscribers(store))) == 7
    store.clock.now += timedelta(hours=1, seconds=1)
    subscribe(store, "e@example.org", caller="192.0.2.7", limits=limits)


def test_a_clock_that_was_ahead_blocks_nobody(store):
    store.clock.now += timedelta(days=3000)
    limits = Limits(address=1, caller=1, all=1)
    subscribe(store, "ann@example.org", caller="a", limits=limits)
    token = asked(store, "bob@example.org")
    store.clock.now -= timedelta(days=3000)
    store.db.execute("UPDATE outbox SET state = 'sent'")
    subscribe(store, "ann@example.org", caller="a", limits=limits)
    assert len(outbox(store)) == 3
    assert confirm(store, token) == "confirmed"
    assert confirm(store, token) == "used"


# bounces, forgetting


def test_a_final_bounce_suspends_and_three_others_within_months_do(store):
    ann, bob, cy = (subscribed(store, f"{name}@example.org") for name in ("ann", "bob", "cy"))
    assert note_bounce(store, ann.id, final=True)
    for number in range(3):
        assert note_bounce(store, bob.id, final=False) == (number == 2)
        store.clock.now += timedelta(days=29)
    for _ in range(6):
        assert not note_bounce(store, cy.id, final=False)
        store.clock.now += timedelta(days=31)
    assert find_subscriber(store, "ann@example.org").state == "suspended"
    assert find_subscriber(store, "bob@example.org").state == "suspended"
    assert find_subscriber(store, "cy@example.org").state == "active"
    assert confirm(store, asked(store)) == "confirmed"
    back = find_subscriber(store, "ann@example.org")
    assert (back.state, back.bounces, back.ended) == ("active", 0, None)


def test_who_never_confirmed_is_forgotten_after_a_month_and_who_did_is_not(store):
    subscribed(store, "ann@example.org")
    asked(store, "bob@example.org")
    note_bounce(store, find_subscriber(store, "bob@example.org").id, final=True)
    store.clock.now += timedelta(days=29)
    asked(store, "cy@example.org")
    assert forget_unconfirmed(store) == 0
    store.clock.now += timedelta(days=2)
    assert forget_unconfirmed(store) == 1
    assert [person.email for person in all_subscribers(store)] == ["ann@example.org", "cy@example.org"]
    assert store.db.execute("SELECT count(*) FROM tokens").fetchone()[0] == 2


def test_forgetting_leaves_nothing_of_a_person(store):
    person = subscribed(store, "rare.name@example.org")
    subscribe(store, "rare.name@example.org")
    forget(store, person)
    assert "rare.name" not in "".join(store.db.iterdump())
    with pytest.raises(UserError, match="never asked"):
        find_subscriber(store, "rare.name@example.org")


def test_listing_goes_through_everybody_by_state_and_rhythm(store):
    for number in range(1203):
        store.db.execute(
            "INSERT INTO subscribers (email, state, rhythm, topics, views, handle, secret, asked) "
            "VALUES (?, ?, ?, '[]', '[]', ?, x'00', '2026')",
            (f"{number}@example.org", ("active", "pending")[number % 2], ("daily", "weekly")[number % 3 == 0],
             number.to_bytes(12)),
        )  # fmt: skip
    assert len(list(all_subscribers(store))) == 1203
    assert len(list(all_subscribers(store, state="active"))) == 602
    assert len(list(all_subscribers(store, state="active", rhythm="weekly"))) == 201
