"""The outbox against real servers on this machine: whatever they do, nobody gets a message twice, no mail is lost."""

import contextlib
import email
import email.policy
import json
import os
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta

import pytest
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from click.testing import CliRunner

from counterproof.errors import UserError
from counterproof.page.digest_commands import password
from counterproof.page.digest_commands import send as send_command
from counterproof.page.outbox import (
    LONGEST_PAUSE,
    TRIES,
    Bounce,
    Folder,
    Letterhead,
    Smtp,
    Unreachable,
    letter,
    message_id,
    read_bounce,
    read_stop,
    send,
    take_bounce,
    waiting,
)
from counterproof.page.store import Entry, Store
from counterproof.page.subscribers import (
    check,
    confirm,
    find_subscriber,
    get_subscriber,
    new_token,
    stop,
    subscribe,
    unsubscribe_token,
)
from lab.clock import Clock

HEAD = Letterhead("papers@example.org", "Papers", "https://papers.example.org", "stop@example.org")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=Clock())
    yield store
    store.close()


def person(store, name="ann"):
    subscribe(store, f"{name}@example.org")
    store.db.execute("DELETE FROM outbox WHERE issue LIKE 'confirm:%'")
    found = find_subscriber(store, f"{name}@example.org")
    assert confirm(store, new_token(store, found.id, found.wishes)) == "confirmed"
    return get_subscriber(store, found.id)


def queue(store, who, issue="daily:2026-11-23", text="Hello"):
    identity = message_id(HEAD, issue, who)
    message = letter(HEAD, who, identity=identity, date=store.clock(), subject="New papers", text=text,
                     html=f"<p>{text}</p>", stoppable=True)  # fmt: skip
    store.db.execute(
        "INSERT INTO outbox (issue, subscriber, message_id, message, state, changed) VALUES (?, ?, ?, ?, 'queued', ?)",
        (issue, who.id, identity, message, store.now()),
    )
    paper = store.add(Entry(title=f"Paper of {issue}"), source="x").paper
    store.db.execute("INSERT INTO delivered VALUES (?, ?, ?)", (who.id, paper, issue))
    return message


def states(store):
    return [row[0] for row in store.db.execute("SELECT state FROM outbox ORDER BY id")]


def delivered(store):
    return store.db.execute("SELECT count(*) FROM delivered").fetchone()[0]


class Handler:
    """A server's conduct; `replies` by address, else everything is taken."""

    def __init__(self):
        self.got = []
        self.replies = {}
        self.sender = self.data = None

    async def handle_MAIL(self, server, session, envelope, address, options):  # noqa: N802
        if self.sender:
            return self.sender
        envelope.mail_from = address
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: N802
        if address in self.replies:
            return self.replies[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        if self.data:
            return self.data
        self.got.append((envelope.mail_from, envelope.rcpt_tos, bytes(envelope.original_content)))
        return "250 taken"


class Here(Controller):
    """On a port of the system's choice."""

    def _trigger_server(self):
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


@contextlib.contextmanager
def serving(handler, **options):
    controller = Here(handler, hostname="127.0.0.1", port=0, **options)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


@pytest.fixture
def handler():
    return Handler()


@pytest.fixture
def port(handler):
    with serving(handler) as port:
        yield port


def smtp(port, **more):
    return Smtp("127.0.0.1", port, "none", timeout=5, patience=5, **more)


# what goes over the line


def test_a_message_arrives_whole_with_the_headers_that_stop_it(store, handler, port):
    ann = person(store)
    text = ".\n..dots\n.at the beginning\nFrom here\n" + "x" * 2000 + "\nüñïçødé 数学 \n"
    queue(store, ann, text=text)
    done = send(store, smtp(port), HEAD)
    assert (done.sent, done.later, done.failed, done.unsure) == (1, 0, 0, 0)
    ((sender, recipients, raw),) = handler.got
    assert (sender, recipients) == ("papers@example.org", ["ann@example.org"])
    assert raw.isascii()
    assert all(len(line) <= 998 for line in raw.split(b"\r\n"))
    assert b"\n" not in raw.replace(b"\r\n", b"")
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert message.get_body(("plain",)).get_content().replace("\r\n", "\n") == text
    assert message["From"].addresses[0].addr_spec == "papers@example.org"
    assert message["Date"].datetime == store.clock.now
    assert message["List-Id"] == "Counterproof papers <papers.example.org>"
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    token = unsubscribe_token(ann)
    # On one line as it is sent, whatever its length.
    line = next(line for line in raw.split(b"\r\n") if line.startswith(b"List-Unsubscribe:"))
    assert line.decode() == (
        f"List-Unsubscribe: <https://papers.example.org/unsubscribe/{token}>, "
        f"<mailto:stop@example.org?subject=unsubscribe%20{token}>"
    )
    assert len(set(message.keys())) == len(message.keys())
    assert message["Message-ID"] == message_id(HEAD, "daily:2026-11-23", ann)
    assert states(store) == ["sent"]
    assert send(store, smtp(port), HEAD).sent == 0
    assert len(handler.got) == 1


def test_message_ids_follow_from_issue_and_subscriber(store):
    ann, bob = person(store), person(store, "bob")
    ids = {message_id(HEAD, issue, who) for issue in ("a", "b") for who in (ann, bob)}
    assert len(ids) == 4
    assert message_id(HEAD, "a", ann) in ids
    assert all(identity.endswith("@example.org>") and "ann" not in identity for identity in ids)


@pytest.mark.parametrize("page", [None, "http://127.0.0.1:8000"])
def test_one_click_is_offered_only_where_it_is_safe(store, page):
    head = Letterhead("papers@example.org", page=page)
    ann = person(store)
    raw = letter(head, ann, identity="<x@y>", date=store.clock(), subject="s", text="t", html="h", stoppable=True)
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert "List-Unsubscribe-Post" not in message
    assert f"<mailto:papers@example.org?subject=unsubscribe%20{unsubscribe_token(ann)}>" in message["List-Unsubscribe"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sender": "papers@example.org\r\nBcc: all@example.org"}, {"sender": "papers"}, {"name": "A\r\nBcc: b@b.org"},
        {"name": "a\0"}, {"stop": "x"}, {"page": "javascript:alert(1)"}, {"page": "https://a.org/?q=1"},
        {"page": "https://a.org\r\nX: y"}, {"page": "https://a.org/>,<mailto:x@y.org"}, {"page": "https://u:p@a.org"},
        {"page": "https://[::1"}, {"page": "papers.example.org"}, {"page": "https://a.org/" + "x" * 300},
    ],
)  # fmt: skip
def test_a_letterhead_cannot_carry_a_header(wrong):
    with pytest.raises(UserError) as problem:
        Letterhead(**wrong)
    assert str(problem.value).isprintable()


def test_names_are_quoted_and_subjects_with_line_breaks_refused(store):
    ann = person(store)
    head = Letterhead("papers@example.org", 'Papers, "the" <b@example.org>, Ünïcødé')
    about = dict(identity="<x@y>", date=store.clock(), text="t", html="h", stoppable=False)
    raw = letter(head, ann, subject="ü" * 200, **about)
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert [(one.display_name, one.addr_spec) for one in message["From"].addresses] == [
        ('Papers, "the" <b@example.org>, Ünïcødé', "papers@example.org")
    ]
    assert message["Subject"] == "ü" * 200
    assert max(map(len, raw.partition(b"\r\n\r\n")[0].split(b"\r\n"))) <= 78
    assert "List-Unsubscribe" not in message
    with pytest.raises(ValueError):
        letter(head, ann, subject="New\r\nBcc: all@example.org", **about)


# the link that confirms


def test_the_token_of_a_confirmation_is_in_the_mail_and_nowhere_else(store, handler, port):
    subscribe(store, "ann@example.org", topics=["<b>tags</b> & “quotes”"], rhythm="weekly")
    assert store.db.execute("SELECT count(*) FROM tokens").fetchone()[0] == 0
    store.clock.now += timedelta(days=5)  # the two days begin when it is sent
    assert send(store, smtp(port), HEAD).sent == 1
    message = email.message_from_bytes(handler.got[0][2], policy=email.policy.default)
    text = message.get_body(("plain",)).get_content()
    (address,) = [word for word in text.split() if word.startswith("https://papers.example.org/confirm/")]
    token = address.rpartition("/")[2]
    assert "topic: <b>tags</b> & “quotes”" in text
    html = message.get_body(("html",)).get_content()
    assert address in html
    assert "<b>" not in html
    assert "List-Unsubscribe" not in message
    assert token not in "".join(store.db.iterdump())
    assert token.encode().hex().upper() not in "".join(store.db.iterdump()).upper()
    assert check(store, token).purpose == "confirm"
    assert confirm(store, token) == "confirmed"


# servers that say no


def test_a_server_that_says_later_is_asked_again_after_pauses_that_double(store, handler, port):
    queue(store, person(store))
    queue(store, person(store, "bob"))
    handler.replies["ann@example.org"] = "451 4.3.0 try again later"
    done = send(store, smtp(port), HEAD)
    assert (done.sent, done.later) == (1, 1)
    assert send(store, smtp(port), HEAD).later == 0
    pauses = []
    while "queued" in states(store):
        begun = store.clock.now
        row = waiting(store)[0]
        store.clock.now = datetime.fromisoformat(row["next_try"])
        pauses.append(store.clock.now - begun)
        send(store, smtp(port), HEAD)
    assert pauses[:3] == [timedelta(minutes=5), timedelta(minutes=10), timedelta(minutes=20)]
    assert max(pauses) == LONGEST_PAUSE
    assert len(pauses) == TRIES - 1
    assert timedelta(days=1.5) < sum(pauses, timedelta()) < timedelta(days=5)
    assert states(store) == ["failed", "sent"]
    assert delivered(store) == 1  # what never arrived may come again
    assert find_subscriber(store, "ann@example.org").state == "active"
    assert find_subscriber(store, "ann@example.org").bounces == 1


def test_it_arrives_once_when_later_has_come(store, handler, port):
    queue(store, person(store))
    handler.data = "452 4.2.2 full for now"
    assert send(store, smtp(port), HEAD).later == 1
    handler.data = None
    store.clock.now += timedelta(minutes=5)
    assert send(store, smtp(port), HEAD).sent == 1
    assert len(handler.got) == 1


def test_a_clock_put_back_does_not_keep_mail_waiting_for_years(store, handler, port):
    queue(store, person(store))
    handler.replies["ann@example.org"] = "450 later"
    store.clock.now += timedelta(days=3000)
    send(store, smtp(port), HEAD)
    store.clock.now -= timedelta(days=3000)
    handler.replies.clear()
    assert send(store, smtp(port), HEAD).sent == 1


def test_an_address_that_is_refused_for_good_is_suspended_at_once(store, handler, port):
    ann = person(store)
    queue(store, ann)
    queue(store, ann, "daily:2026-11-24")
    queue(store, person(store, "bob"))
    handler.replies["ann@example.org"] = "550 5.1.1 no such user\x1b[31m"
    done = send(store, smtp(port), HEAD)
    assert (done.sent, done.failed, done.suspended) == (1, 2, ["ann@example.org"])
    assert states(store) == ["failed", "failed", "sent"]
    assert find_subscriber(store, "ann@example.org").state == "suspended"
    assert delivered(store) == 1
    assert all(problem.isprintable() for problem in done.problems)


@pytest.mark.parametrize("reply", ["550 5.7.1 relaying denied", "554 blocked using a list", "554 5.7.1 go away"])
def test_a_policy_against_the_sender_suspends_nobody(store, handler, port, reply):
    queue(store, person(store))
    handler.replies["ann@example.org"] = reply
    assert send(store, smtp(port), HEAD).later == 1
    assert find_subscriber(store, "ann@example.org").state == "active"


@pytest.mark.parametrize("reply", ["553 5.1.8 no such sender", "530 5.7.0 authentication required"])
def test_a_server_that_takes_nothing_from_us_stops_the_run_and_nothing_is_lost(store, handler, port, reply):
    for name in ("ann", "bob"):
        queue(store, person(store, name))
    handler.sender = reply
    with pytest.raises(Unreachable, match="takes no mail from us"):
        send(store, smtp(port), HEAD)
    assert states(store) == ["queued", "queued"]
    handler.sender = None
    assert send(store, smtp(port), HEAD).sent == 2


def test_a_message_that_is_refused_counts_and_the_third_suspends(store, handler, port):
    ann = person(store)
    handler.data = "554 5.6.0 looks like spam"
    for number in range(3):
        queue(store, ann, f"daily:{number}")
        done = send(store, smtp(port), HEAD)
        assert done.failed == 1
        assert find_subscriber(store, ann.email).state == ("active" if number < 2 else "suspended")


def test_who_stopped_gets_nothing_that_was_queued(store, handler, port):
    ann, bob = person(store), person(store, "bob")
    queue(store, ann)
    stop(store, ann)
    queue(store, bob)
    store.db.execute("UPDATE subscribers SET state = 'unsubscribed' WHERE id = ?", (bob.id,))  # between, by another
    done = send(store, smtp(port), HEAD)
    assert handler.got == []
    assert done.failed == 1
    assert states(store) == ["failed", "failed"]


# lines that break


class Script(socketserver.ThreadingTCPServer):
    """A server that breaks off where it is told to; takes messages as soon as their last line is in."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, *breaks):
        self.breaks = list(breaks)
        self.got = []
        self.mails = 0
        super().__init__(("127.0.0.1", 0), Talk)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]


class Talk(socketserver.StreamRequestHandler):
    def handle(self):
        how = self.server.breaks.pop(0) if self.server.breaks else None
        if how == "silent":
            time.sleep(2)
            return
        if how == "garbage":
            self.wfile.write(b"\xff\xfe HTTP/1.1 400 what?\r\n" * 3)
            return
        self.say(b"220 hi")
        while line := self.rfile.readline():
            word = line[:4].upper()
            if word == b"MAIL":
                self.server.mails += 1
            if how == b"421 busy" and word == b"RCPT":
                self.say(how)
                return
            if word == b"RCPT" and how == "at rcpt":
                return
            if word == b"DATA":
                if how == "before data":
                    return
                self.say(b"354 go on")
                if how == "in data":
                    self.rfile.read(10)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    return
                body = b""
                while (line := self.rfile.readline()) != b".\r\n":
                    if not line:
                        return
                    body += line
                self.server.got.append(body)
                if how == "after data":
                    return
                if how == "slow":
                    time.sleep(1.5)
                self.say(b"250 taken")
            elif word == b"QUIT":
                self.say(b"221 bye")
                return
            else:
                self.say(b"250 ok")

    def say(self, line):
        self.wfile.write(line + b"\r\n")


@contextlib.contextmanager
def script(*breaks):
    server = Script(*breaks)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("how", ["after data", "in data"])
def test_a_line_that_breaks_after_the_message_began_leaves_it_unsure_and_only_the_operator_sends_it_again(store, how):
    queue(store, person(store))
    queue(store, person(store, "bob"))
    with script(how) as server:
        done = send(store, smtp(server.port), HEAD)
        assert (done.sent, done.unsure) == (1, 1)
        assert states(store) == ["unsure", "sent"]
        before = list(server.got)
        for _ in range(3):
            store.clock.now += timedelta(days=1)
            assert send(store, smtp(server.port), HEAD).unsure == 1
        assert server.got == before
        assert delivered(store) == 2
        done = send(store, smtp(server.port), HEAD, retry_unsure=True)
        assert (done.sent, done.unsure) == (1, 0)
        assert len(server.got) == len(before) + 1
        assert states(store) == ["sent", "sent"]


@pytest.mark.parametrize("how", ["before data", "at rcpt", b"421 busy"])
def test_a_line_that_breaks_before_the_message_began_loses_and_doubles_nothing(store, how):
    queue(store, person(store))
    queue(store, person(store, "bob"))
    with script(how) as server:
        done = send(store, smtp(server.port), HEAD)
        assert (done.sent, done.later, done.unsure) == (1, 1, 0)
        store.clock.now += timedelta(minutes=5)
        assert send(store, smtp(server.port), HEAD).sent == 1
        assert len(server.got) == 2
        assert len({body.partition(b"Message-ID: ")[2][:32] for body in server.got}) == 2


def test_a_server_that_breaks_every_time_is_left_alone_after_two(store):
    for name in "abcdef":
        queue(store, person(store, name))
    with script(*["before data"] * 9) as server:
        done = send(store, smtp(server.port), HEAD)
        assert (done.later, server.mails) == (2, 2)
        assert states(store) == ["queued"] * 6
        assert any("twice in a row" in problem for problem in done.problems)


def test_a_slow_answer_is_waited_for_and_one_that_does_not_come_leaves_unsure(store):
    queue(store, person(store))
    with script("slow", "slow") as server:
        patient = Smtp("127.0.0.1", server.port, "none", timeout=0.5, patience=5)
        assert send(store, patient, HEAD).sent == 1
        queue(store, person(store, "bob"))
        hasty = Smtp("127.0.0.1", server.port, "none", timeout=5, patience=0.3)
        assert send(store, hasty, HEAD).unsure == 1


@pytest.mark.parametrize("how", ["silent", "garbage"])
def test_a_server_that_makes_no_sense_leaves_everything_waiting(store, how):
    queue(store, person(store))
    with (
        script(how) as server,
        pytest.raises(Unreachable, match="does not answer") as problem,
    ):
        send(store, Smtp("127.0.0.1", server.port, "none", timeout=0.3), HEAD)
    assert str(problem.value).isprintable()
    assert states(store) == ["queued"]
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = nobody.getsockname()[1]
    with pytest.raises(Unreachable, match="does not answer"):
        send(store, smtp(closed), HEAD)
    assert states(store) == ["queued"]


SENDER = """
import sys
from pathlib import Path
from counterproof.page.outbox import *
from counterproof.page.store import Store
store = Store(Path(sys.argv[1]))
carrier = Smtp("127.0.0.1", int(sys.argv[2]), "none") if sys.argv[2].isdigit() else Folder(Path(sys.argv[2]))
print("begun", flush=True)
send(store, carrier, Letterhead("papers@example.org"))
"""


def test_a_sender_killed_while_the_server_takes_the_message_sends_nothing_twice(store, tmp_path):
    for name in ("ann", "bob", "cy"):
        queue(store, person(store, name))
    with script("slow") as server:
        # The first connection answers late: the sender is killed when the server has the first message.
        process = subprocess.Popen([sys.executable, "-c", SENDER, store.path, str(server.port)])
        until = time.monotonic() + 30
        while not server.got and time.monotonic() < until:
            time.sleep(0.01)
        assert states(store) == ["sending", "queued", "queued"]
        with pytest.raises(UserError, match="another 'feed send'"):
            send(store, smtp(server.port), HEAD)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = send(store, smtp(server.port), HEAD)
        assert (done.sent, done.unsure) == (2, 1)
        assert states(store) == ["unsure", "sent", "sent"]
        recipients = [email.message_from_bytes(body)["To"] for body in server.got]
        assert sorted(recipients) == ["ann@example.org", "bob@example.org", "cy@example.org"]
        assert waiting(store)[0]["problem"] == "the sender ended in the middle of sending"


def test_killed_again_and_again_everybody_has_the_mail_at_most_once(store, tmp_path):
    names = [f"p{number}" for number in range(40)]
    for name in names:
        queue(store, person(store, name))
    with script() as server:
        for wait in (0.01, 0.05, 0.1):
            process = subprocess.Popen(
                [sys.executable, "-c", SENDER, store.path, str(server.port)], stdout=subprocess.PIPE
            )
            process.stdout.readline()
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        done = send(store, smtp(server.port), HEAD)
        got = [email.message_from_bytes(body)["To"] for body in server.got]
    assert len(got) == len(set(got))
    assert len(got) >= 40 - done.unsure
    assert states(store).count("sent") + done.unsure == 40


def test_the_command_exits_with_1_once_when_something_became_unsure(own_home):
    store = Store()
    for name in ("ann", "bob"):
        queue(store, person(store, name))
    store.db.execute("UPDATE subscribers SET state = 'unsubscribed' WHERE email = 'bob@example.org'")

    def run(*words):
        options = ["--smtp", f"127.0.0.1:{server.port}", "--security", "none", "--from", "papers@example.org"]
        return CliRunner().invoke(send_command, [*options, *words])

    with script("after data") as server:
        assert run().exit_code == 1
        again = run()
        assert again.exit_code == 0
        assert "1 unsure" in again.stderr
        assert len(server.got) == 1
        done = run("--retry-unsure", "--json")
        assert done.exit_code == 0
        assert json.loads(done.stdout)["sent"] == 1
        assert len(server.got) == 2
    store.close()


def test_a_password_comes_from_the_environment_or_a_file_of_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("COUNTERPROOF_SMTP_PASSWORD", " in the environment ")
    assert password() == " in the environment "
    (tmp_path / "secret").write_text("in a file \n")
    monkeypatch.setenv("COUNTERPROOF_SMTP_PASSWORD_FILE", str(tmp_path / "secret"))
    assert password() == "in a file "
    assert not any("password" in name for option in send_command.params for name in option.opts)


# encryption and login


@pytest.fixture(scope="module")
def certified():
    """What a server for this machine shows, and what a client needs to believe it."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    believes = ssl.create_default_context()
    authority.configure_trust(believes)
    return context, believes


def test_starttls_login_and_certificates(store, handler, certified):
    context, believes = certified

    def login(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (b"me", b"pass word"), handled=False)

    options = dict(tls_context=context, require_starttls=True, authenticator=login, auth_required=True)
    with serving(handler, **options) as port:

        def server(**more):
            return Smtp("127.0.0.1", port, **{"timeout": 5, "context": believes, "user": "me", **more})

        queue(store, person(store))
        with pytest.raises(Unreachable, match="refuses the login of 'me'") as problem:
            send(store, server(password="wrong"), HEAD)
        assert "wrong" not in str(problem.value)
        with pytest.raises(Unreachable, match="certificate"):
            send(store, server(password="pass word", context=None), HEAD)
        with pytest.raises(Unreachable):
            send(store, smtp(port), HEAD)
        assert states(store) == ["queued"]
        assert send(store, server(password="pass word"), HEAD).sent == 1
    assert "pass word" not in repr(server(password="pass word"))


def test_tls_from_the_first_byte_and_a_server_without_starttls(store, handler, certified):
    context, believes = certified
    queue(store, person(store))
    with serving(handler) as plain_port, pytest.raises(Unreachable, match="STARTTLS"):
        send(store, Smtp("127.0.0.1", plain_port, timeout=5), HEAD)
    assert handler.got == []
    with serving(handler, ssl_context=context) as port:
        assert send(store, Smtp("127.0.0.1", port, "tls", timeout=5, context=believes), HEAD).sent == 1


def test_settings_that_contradict_each_other_are_refused(store):
    with pytest.raises(UserError, match="in the clear"):
        Smtp("mail.example.org", security="none", user="me", password="x")
    with pytest.raises(UserError, match="both"):
        Smtp("mail.example.org", user="me")
    with pytest.raises(UserError, match="no mail server"):
        Smtp("mail.example.org\r\nX")
    with pytest.raises(UserError, match="--from"):
        send(store, smtp(25), Letterhead())
    assert [Smtp("h", security=kind).port for kind in ("starttls", "tls", "none")] == [587, 465, 25]


# files


def test_files_are_the_message_and_writing_again_after_a_crash_leaves_one(store, tmp_path):
    message = queue(store, person(store))
    folder = tmp_path / "a" / "mail"
    assert send(store, Folder(folder), HEAD).sent == 1
    (file,) = folder.iterdir()
    assert file.name.startswith("daily-2026-11-23-")
    assert file.read_bytes() == message
    # Killed after the file was written, before that was noted.
    store.db.execute("UPDATE outbox SET state = 'sending', problem = 'folder', message = ?", (message,))
    assert send(store, Folder(folder), HEAD).sent == 1
    assert list(folder.iterdir()) == [file]
    # What an SMTP server may have is unsure for a folder too.
    store.db.execute("UPDATE outbox SET state = 'sending', problem = NULL")
    assert send(store, Folder(folder), HEAD).unsure == 1


def test_a_folder_that_cannot_be_written_loses_nothing(store, tmp_path):
    queue(store, person(store))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the folder"):
        send(store, Folder(tmp_path / "file" / "mail"), HEAD)
    assert states(store) == ["queued"]


# mail that came back

REPORT = """From: MAILER-DAEMON@example.org
Content-Type: multipart/report; report-type=delivery-status; boundary="b"

--b
Content-Type: text/plain

Sorry.
--b
Content-Type: message/delivery-status

Reporting-MTA: dns; mail.example.org

Final-Recipient: rfc822; {recipient}
Action: {action}
Status: {status}

--b
Content-Type: {kind}

Message-ID: {of}
Subject: New papers

--b--
"""


@pytest.mark.parametrize("kind", ["message/rfc822", "text/rfc822-headers"])
@pytest.mark.parametrize(
    ("action", "status", "outcome", "state"),
    [
        ("failed", "5.1.1", "suspended", "suspended"),
        ("failed", "5.2.2", "counted", "active"),
        ("failed", "4.4.7", "counted", "active"),
        ("delayed", "4.4.1", "delayed", "active"),
    ],
)
def test_a_report_on_a_mail_of_ours_is_believed_once(store, tmp_path, kind, action, status, outcome, state):
    ann = person(store)
    queue(store, ann)
    send(store, Folder(tmp_path / "mail"), HEAD)
    raw = REPORT.format(recipient="other@example.org", action=action, status=status, kind=kind,
                        of=message_id(HEAD, "daily:2026-11-23", ann))  # fmt: skip
    (report,) = read_bounce(raw.replace("\n", "\r\n").encode())
    assert (report.recipient, report.action, report.status) == ("other@example.org", action, status)
    for _ in range(4):
        assert take_bounce(store, report) == outcome
    found = find_subscriber(store, "ann@example.org")
    assert (found.state, found.bounces) == (state, int(outcome != "delayed"))
    assert delivered(store) == int(outcome == "delayed")


def test_forged_reports_suspend_nobody(store, tmp_path):
    ann = person(store)
    queue(store, ann)
    send(store, Folder(tmp_path / "mail"), HEAD)
    for of in (None, "<made-up@example.org>", message_id(HEAD, "daily:2026-11-24", ann)):
        with pytest.raises(UserError, match="no mail that was sent"):
            take_bounce(store, Bounce("ann@example.org", "failed", "5.1.1", of))
    for raw in (b"", b"Subject: no report\r\n\r\nhi", b"\xff" * 1000, b"Content-Type: message/delivery-status\r\n\r\n"):
        with pytest.raises(UserError, match="no delivery report"):
            read_bounce(raw)
    assert find_subscriber(store, "ann@example.org").state == "active"


def test_a_mail_that_asks_to_stop_names_its_token(store):
    token = unsubscribe_token(person(store))
    assert read_stop(f"From: a@b.org\r\nSubject: Re: unsubscribe {token}\r\n\r\n".encode()) == token
    with pytest.raises(UserError, match="a token"):
        read_stop(b"Subject: please stop\r\n\r\n")
