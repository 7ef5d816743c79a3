"""Mail that waits, and sending it: by SMTP, or as ``.eml`` files into a folder.

A message is in the outbox once for an issue and a subscriber, and leaves it once. Its state is ``queued`` until the
server has taken sender and recipient; ``sending``, on disk before the message itself goes over the line; then ``sent``,
``queued`` again (the server said: later) or ``failed`` (it said: never). Whoever dies, or loses the line, while a row
says ``sending`` cannot know whether the server has the message: the row becomes ``unsure``, and is sent again only when
the operator says so. So a crash can cost one person one issue, which is said, and never sends anything twice by itself.
Files are different: writing one again leaves the same file, so nothing is ever unsure.
"""

import contextlib
import email
import email.policy
import hashlib
import re
import smtplib
import sqlite3
import ssl
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.headerregistry import Address
from email.message import EmailMessage, Message
from email.utils import format_datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import quote, urlsplit

from counterproof.errors import UserError
from counterproof.files import replacing
from counterproof.page.store import Store, stamp
from counterproof.page.subscribers import (
    LIFE,
    LIST,
    Subscriber,
    Wishes,
    get_subscriber,
    mail_address,
    new_token,
    note_bounce,
    printable,
    unsubscribe_token,
)

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = [
    "Bounce",
    "Folder",
    "Letterhead",
    "Sent",
    "Smtp",
    "Unreachable",
    "due",
    "letter",
    "message_id",
    "read_bounce",
    "read_stop",
    "render_mail",
    "send",
    "take_bounce",
    "waiting",
]

CONFIRMATION = "confirm:"  # what the issue of such a mail begins with
FIRST_PAUSE = timedelta(minutes=5)  # doubled after every try
LONGEST_PAUSE = timedelta(hours=6)
TRIES = 14  # about two days
Security = Literal["starttls", "tls", "none"]
PORTS: Mapping[Security, int] = {"starttls": 587, "tls": 465, "none": 25}


# what a mail looks like


@dataclass(frozen=True)
class Letterhead:
    """Whose mail it is.

    Attributes:
        sender: the address it comes from, and that errors go back to.
        name: beside it.
        page: where the page is served, such as ``https://papers.example.org``; None: links go to the papers' own pages,
            and confirming and stopping is by command or mail.
        stop: takes mail that asks to stop; None: `sender`.

    Raises:
        UserError: an address that is none, a page that is no http or https address, a name with control characters.
    """

    sender: str = "counterproof@localhost"
    name: str = "Counterproof"
    page: str | None = None
    stop: str | None = None

    def __post_init__(self) -> None:
        for name in ("sender", "stop"):
            value = getattr(self, name)
            if value is not None and value != "counterproof@localhost":
                object.__setattr__(self, name, mail_address(value))
        if any(unicodedata.category(letter)[0] == "C" for letter in self.name) or len(self.name) > 100:
            raise UserError(f"{self.name[:100]!a} cannot stand beside an address; no control characters, 100 letters")
        if self.page is not None:
            page = self.page.rstrip("/")
            try:
                parts = urlsplit(page)
                host = parts.hostname if parts.port != 0 else None
            except ValueError:
                parts, host = urlsplit(""), None
            if (
                parts.scheme not in ("http", "https")
                or not host
                or parts.query
                or parts.fragment
                or parts.username is not None
                or len(page) > 300
                or not re.fullmatch(r"[!-~]+", page)
                or set('<>",\\') & set(page)
            ):
                raise UserError(
                    f"{self.page[:100]!a} is no address of a page; expected one as https://papers.example.org"
                )
            object.__setattr__(self, "page", page)

    @property
    def domain(self) -> str:
        """What list and message ids end with."""
        return self.sender.partition("@")[2]

    @property
    def local(self) -> bool:
        """Nobody was named as the sender: mail that stays on this machine."""
        return self.sender == Letterhead.sender

    def link(self, *path: str) -> str | None:
        """An address on the page; None when it is not served."""
        return None if self.page is None else "/".join((self.page, *(quote(part, safe="/") for part in path)))


class Letters(email.policy.EmailPolicy):
    """Header lines folded as usual, but for the one that signatures of some servers break on."""

    def fold(self, name: str, value: str) -> str:
        if name.lower() == "list-unsubscribe":
            return f"{name}: {value}{self.linesep}"
        return str(super().fold(name, value))

    def fold_binary(self, name: str, value: str) -> bytes:
        if name.lower() == "list-unsubscribe":
            return self.fold(name, value).encode("ascii")
        return super().fold_binary(name, value)


LETTERS = Letters(linesep="\r\n", raise_on_defect=False)


def message_id(letterhead: Letterhead, issue: str, subscriber: Subscriber) -> str:
    """The same for the same issue and subscriber, and nothing that could be guessed or read of either."""
    digest = hashlib.sha256(f"{issue}\0{subscriber.handle.hex()}".encode()).hexdigest()[:32]
    return f"<{digest}@{letterhead.domain}>"


def letter(
    letterhead: Letterhead,
    subscriber: Subscriber,
    *,
    identity: str,
    date: datetime,
    subject: str,
    text: str,
    html: str,
    stoppable: bool,
) -> bytes:
    """A message as it goes over the line: text and HTML, ASCII bytes, lines ended by CR LF.

    Args:
        identity: its Message-ID.
        date: its Date, aware.
        stoppable: an issue of the list, with the headers that say so and how to stop it (RFC 2369, 2919, 8058);
            otherwise a single mail.

    Raises:
        ValueError: a header with a line break.
    """
    message = EmailMessage(LETTERS)
    message["From"] = Address(letterhead.name, addr_spec=letterhead.sender)
    message["To"] = Address(addr_spec=subscriber.email)
    message["Subject"] = subject
    message["Date"] = format_datetime(date)
    message["Message-ID"] = identity
    message["Auto-Submitted"] = "auto-generated"
    if stoppable:
        token = unsubscribe_token(subscriber)
        message["List-Id"] = f"Counterproof papers <{LIST}.{letterhead.domain}>"
        mailto = f"<mailto:{letterhead.stop or letterhead.sender}?subject=unsubscribe%20{token}>"
        address = letterhead.link("unsubscribe", token)
        message["List-Unsubscribe"] = mailto if address is None else f"<{address}>, {mailto}"
        if address is not None and address.startswith("https://"):
            message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    # Quoted-printable whatever is inside: no server breaks or re-encodes lines of 76 ASCII letters.
    message.set_content(text, cte="quoted-printable")
    message.add_alternative(html, subtype="html", cte="quoted-printable")
    return message.as_bytes()


def plain(text: str) -> str:
    """Text of strangers on one line, without control characters or those that turn the direction of writing."""
    return " ".join(printable(text).split())


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_mail(kind: str, /, **values: Any) -> tuple[str, str]:
    """Text and HTML of ``templates/mail_KIND.txt`` and ``.html``."""
    text, html = (_environment().get_template(f"mail_{kind}.{end}").render(values) for end in ("txt", "html"))
    return re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n", html.strip() + "\n"


def confirmation(store: Store, subscriber: Subscriber, wishes: Wishes, letterhead: Letterhead, identity: str) -> bytes:
    """The mail with the link that confirms; its token is made now, and is nowhere but in this mail."""
    token = new_token(store, subscriber.id, wishes)
    text, made = render_mail(
        "confirm",
        name=letterhead.name,
        wishes=wishes,
        hours=int(LIFE.total_seconds() // 3600),
        address=letterhead.link("confirm", token),
        token=token,
        active=subscriber.state == "active",
    )
    return letter(
        letterhead,
        subscriber,
        identity=identity,
        date=store.clock(),
        subject=f"Confirm the {wishes.rhythm} digest of papers",
        text=text,
        html=made,
        stoppable=False,
    )


# the ways out


class Refused(Exception):
    """The server said no.

    Attributes:
        code: SMTP's, 400 to 599.
        text: what it said.
        step: of whom it said so: ``sender``, ``recipient`` or ``message``.
    """

    def __init__(self, code: int, text: bytes | str, step: Literal["sender", "recipient", "message"]) -> None:
        said = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        super().__init__(f"{code} {plain(said)[:300]}")
        self.code = code
        self.step = step
        found = re.match(r"\s*([245]\.\d{1,3}\.\d{1,3})\b", said)
        self.status = found[1] if found else ""

    @property
    def final(self) -> bool:
        return self.code >= 500


class Lost(Exception):
    """The line broke, or nothing came for too long; whether the server has the message is known only before DATA."""

    def __init__(self, problem: Exception, *, after_data: bool) -> None:
        super().__init__(f"{type(problem).__name__}: {plain(str(problem))[:300]}")
        self.after_data = after_data


class Unreachable(UserError):
    """No mail server, or it does not let us in; nothing was sent."""


class Carrier(Protocol):
    """A way out. `repeatable`: handing a message over twice is the same as once."""

    repeatable: bool

    def __enter__(self) -> Any: ...
    def __exit__(self, *problem: object) -> None: ...
    def address(self, sender: str, recipient: str) -> None: ...
    def hand_over(self, message: bytes, name: str) -> None: ...
    def reset(self) -> None: ...


@dataclass
class Folder:
    """Writes every message as a file ``ISSUE-NUMBER.eml`` that any mail program opens."""

    path: Path
    repeatable: bool = field(default=True, init=False)

    def __enter__(self) -> "Folder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"cannot make the folder {self.path} ({problem.strerror}); name another one") from None
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def address(self, sender: str, recipient: str) -> None:
        pass

    def hand_over(self, message: bytes, name: str) -> None:
        with replacing(self.path / f"{name}.eml") as stream:
            stream.write(message.decode("ascii"))

    def reset(self) -> None:
        pass


@dataclass
class Smtp:
    """A mail server.

    Args:
        host, port: where; the port's default is 587 (starttls), 465 (tls) or 25 (none).
        security: ``starttls``: encrypted before mail is named, or not at all; ``tls``: from the first byte; ``none``.
        user, password: a login, if one is needed; never sent in the clear but to this machine.
        timeout: seconds for an answer.
        patience: seconds for the answer to a message, which a server may first scan.
        context: certificates that are believed; default the system's.

    Raises:
        UserError: settings that contradict each other.
        Unreachable: from ``with``: no connection, no encryption, or no login.
    """

    host: str
    port: int | None = None
    security: Security = "starttls"
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    patience: float = 600.0
    context: ssl.SSLContext | None = None
    repeatable: bool = field(default=False, init=False)
    _line: smtplib.SMTP | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", self.host):
            raise UserError(f"{self.host[:100]!a} is no mail server's name; expected one such as mail.example.org")
        if (self.user is None) != (self.password is None):
            raise UserError("a login needs both: --user, and COUNTERPROOF_SMTP_PASSWORD or ..._PASSWORD_FILE")
        if self.user is not None and self.security == "none" and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise UserError(f"the password would go to {self.host} in the clear; use --security starttls or tls")
        self.port = self.port or PORTS[self.security]

    def __enter__(self) -> "Smtp":
        where = f"the mail server {self.host}:{self.port}"
        context = self.context or ssl.create_default_context()
        line: smtplib.SMTP | None = None
        try:
            if self.security == "tls":
                line = smtplib.SMTP_SSL(self.host, self.port or 0, timeout=self.timeout, context=context)
            else:
                line = smtplib.SMTP(self.host, self.port or 0, timeout=self.timeout)
            line.ehlo_or_helo_if_needed()
            if self.security == "starttls":
                line.starttls(context=context)
                line.ehlo_or_helo_if_needed()
            if self.user is not None and self.password is not None:
                line.login(self.user, self.password)
        except smtplib.SMTPAuthenticationError as problem:
            raise self._unreachable(line, f"{where} refuses the login of {self.user!a} ({problem.smtp_code})") from None
        except smtplib.SMTPNotSupportedError as problem:
            remedy = (
                "use --security tls, or none on a line you trust" if self.user is None else "see --security, --user"
            )
            raise self._unreachable(line, f"{where}: {plain(str(problem))}; {remedy}") from None
        except ssl.SSLError as problem:
            remedy = (
                "check --security and the port, and the server's certificate (SSL_CERT_FILE names others to believe)"
            )
            raise self._unreachable(line, f"{where}: {problem.reason or problem}; {remedy}") from None
        except (smtplib.SMTPException, OSError) as problem:
            remedy = "nothing was sent; check --smtp and --security, or try again later"
            raise self._unreachable(line, f"{where} does not answer ({plain(str(problem))[:200]}); {remedy}") from None
        self._line = line
        return self

    def _unreachable(self, line: smtplib.SMTP | None, message: str) -> Unreachable:
        if line is not None:
            line.close()
        return Unreachable(message)

    def __exit__(self, *problem: object) -> None:
        line, self._line = self._line, None
        if line is not None:
            if line.sock is not None:
                line.sock.settimeout(min(self.timeout, 5))
            with contextlib.suppress(smtplib.SMTPException, OSError):  # to say good-bye is a courtesy
                line.quit()
            line.close()

    def address(self, sender: str, recipient: str) -> None:
        """Name sender and recipient.

        Raises:
            Refused: either of them is not taken.
            Lost: the line broke.
        """
        line = self._open()
        try:
            code, text = line.mail(sender)
            step: Literal["sender", "recipient"] = "sender"
            if 200 <= code < 300:
                code, text = line.rcpt(recipient)
                step = "recipient"
                if 200 <= code < 300:
                    return
                if code != 421:
                    self.reset()
        except (smtplib.SMTPException, OSError) as problem:
            raise Lost(problem, after_data=False) from None
        if code == 421 or not 400 <= code < 600:
            raise Lost(ConnectionError(f"{code} {text.decode('utf-8', 'replace')}"), after_data=False)
        raise Refused(code, text, step)

    def hand_over(self, message: bytes, name: str) -> None:
        """Give the message.

        Raises:
            Refused: it is not taken.
            Lost: the line broke; with `after_data` if the server may have it.
        """
        line = self._open()
        begun = False
        try:
            code, text = line.docmd("DATA")
            if code == 354:
                begun = True
                assert line.sock is not None
                line.sock.settimeout(self.patience)
                line.send(re.sub(rb"(?m)^\.", b"..", message.removesuffix(b"\r\n")) + b"\r\n.\r\n")
                code, text = line.getreply()
                if line.sock is not None:
                    line.sock.settimeout(self.timeout)
        except (smtplib.SMTPException, OSError) as problem:
            raise Lost(problem, after_data=begun) from None
        if 200 <= code < 300 and begun:
            return
        if not 400 <= code < 600:
            raise Lost(ConnectionError(f"{code} {text.decode('utf-8', 'replace')}"), after_data=begun)
        if not begun:
            self.reset()
        raise Refused(code, text, "message")

    def reset(self) -> None:
        """Forget sender and recipient; a line that broke meanwhile is met by the next message."""
        with contextlib.suppress(smtplib.SMTPException, OSError):
            self._open().rset()

    def _open(self) -> smtplib.SMTP:
        if self._line is None:
            raise ValueError("a mail server is used inside of: with Smtp(...) as server")
        return self._line


# sending


@dataclass
class Sent:
    """What a call of `send` did.

    Attributes:
        sent: messages the server, or the folder, has.
        later: messages that are tried again.
        failed: messages that never go out.
        suspended: addresses that take no mail.
        unsure: messages of which nobody knows whether the server has them, those of earlier calls too.
        problems: a line for each that went wrong.
    """

    sent: int = 0
    later: int = 0
    failed: int = 0
    suspended: list[str] = field(default_factory=list)
    unsure: int = 0
    problems: list[str] = field(default_factory=list)


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """One sender at a time; the lock is the system's, so it ends with the process that holds it.

    Raises:
        UserError: another one is sending.
    """
    path = store.path.with_name(store.path.name + "-sending")
    with contextlib.ExitStack() as leaving:
        try:
            lock = sqlite3.connect(path, timeout=0, isolation_level=None)
            leaving.callback(lock.close)
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as problem:
            if "locked" in str(problem):
                raise UserError("another 'feed send' is at work; it sends what waits") from None
            raise UserError(f"cannot use {path} ({problem}); make its folder writable") from None
        yield


def waiting(store: Store) -> list[dict[str, Any]]:
    """What is in the outbox and not done: queued, unsure, or in the hands of a sender; oldest first."""
    rows = store.db.execute(
        "SELECT issue, email, outbox.state, attempts, next_try, problem FROM outbox "
        "JOIN subscribers ON subscribers.id = subscriber "
        "WHERE outbox.state IN ('queued', 'sending', 'unsure') ORDER BY outbox.id"
    )
    return [dict(row) for row in rows]


def send(
    store: Store,
    carrier: Carrier,
    letterhead: Letterhead,
    *,
    retry_unsure: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Sent:
    """Send what is due.

    Args:
        carrier: `Folder` or `Smtp`; opened and closed here.
        letterhead: whose address the envelope has.
        retry_unsure: send messages again of which nobody knows whether they arrived.
        watch: called with how many are done and how many were due.

    Raises:
        UserError: another call is at work; a server without a sender.
        Unreachable: no connection to begin with; what waits goes on waiting.
    """
    if not carrier.repeatable and letterhead.local:
        raise UserError("mail needs a sender that answers can go to: --from, or COUNTERPROOF_MAIL_FROM")
    done = Sent()
    with alone(store):
        # Against power failure too: what says "sending" must be on disk before the message leaves.
        store.db.execute("PRAGMA synchronous = FULL")
        try:
            _recover(store, carrier, retry_unsure, done)
            numbers = due(store)
            if numbers:
                _send_all(store, carrier, letterhead, numbers, done, watch)
        finally:
            store.db.execute("PRAGMA synchronous = NORMAL")
            done.unsure = store.db.execute("SELECT count(*) FROM outbox WHERE state = 'unsure'").fetchone()[0]
    return done


def _recover(store: Store, carrier: Carrier, retry_unsure: bool, done: Sent) -> None:
    """We are alone: what says ``sending`` belongs to one who died."""
    with store.transaction():
        if carrier.repeatable:
            store.db.execute("UPDATE outbox SET state = 'queued' WHERE state = 'sending' AND problem IS 'folder'")
        store.db.execute(
            "UPDATE outbox SET state = 'unsure', problem = 'the sender ended in the middle of sending', changed = ? "
            "WHERE state = 'sending'",
            (store.now(),),
        )
        if retry_unsure:
            store.db.execute(
                "UPDATE outbox SET state = 'queued', next_try = NULL, changed = ? WHERE state = 'unsure'",
                (store.now(),),
            )


def due(store: Store) -> list[int]:
    """Rows of the outbox that may be sent now, the oldest first."""
    now = store.now()
    # A time further ahead than any pause was set by a clock that was put back since.
    beyond = stamp(store.clock() + LONGEST_PAUSE)
    rows = store.db.execute(
        "SELECT id FROM outbox WHERE state = 'queued' AND (next_try IS NULL OR next_try <= ? OR next_try > ?) "
        "ORDER BY id",
        (now, beyond),
    )
    return [row[0] for row in rows]


def _send_all(
    store: Store,
    carrier: Carrier,
    letterhead: Letterhead,
    numbers: list[int],
    done: Sent,
    watch: Callable[[int, int], None] | None,
) -> None:
    number, broken = 0, 0
    while number < len(numbers):
        try:
            with carrier:
                while number < len(numbers):
                    try:
                        _send_one(store, carrier, letterhead, numbers[number], done)
                    except Lost:
                        number += 1
                        broken += 1
                        break
                    number += 1
                    broken = 0
                    if watch is not None:
                        watch(number, len(numbers))
        except Unreachable as problem:
            if not number:
                raise
            done.problems.append(str(problem))
            return
        if broken > 1:
            done.problems.append("the line broke twice in a row; the rest waits for the next 'feed send'")
            return


def _send_one(store: Store, carrier: Carrier, letterhead: Letterhead, number: int, done: Sent) -> None:
    """Send one message and note what became of it.

    Raises:
        Lost: the line broke, after that was noted.
    """
    row = store.db.execute("SELECT * FROM outbox WHERE id = ?", (number,)).fetchone()
    if row is None or row["state"] != "queued":  # forgotten or stopped since
        return
    person = get_subscriber(store, row["subscriber"])
    confirming = row["issue"].startswith(CONFIRMATION)
    if not confirming and person.state != "active":
        _fail(store, row, f"{person.state} before it was sent")
        done.failed += 1
        return
    identity, message = row["message_id"], row["message"]
    try:
        if confirming:
            identity = f"<{row['message_id'].strip('<>').partition('@')[0]}@{letterhead.domain}>"
            wishes = Wishes.from_json(message.decode())
            message = confirmation(store, person, wishes, letterhead, identity)
        carrier.address(letterhead.sender, person.email)
        with store.transaction():
            taken = store.db.execute(
                "UPDATE outbox SET state = 'sending', attempts = attempts + 1, message_id = ?, problem = ?, "
                "changed = ? WHERE id = ? AND state = 'queued'",
                (identity, "folder" if carrier.repeatable else None, store.now(), number),
            ).rowcount
        if not taken:  # stopped a moment ago
            carrier.reset()
            return
        carrier.hand_over(message, f"{row['issue'].replace(':', '-')}-{identity[1:17]}")
    except Refused as problem:
        _refused(store, row, person, problem, done)
    except Lost as problem:
        if problem.after_data:
            _set(store, number, "unsure", str(problem))
            done.problems.append(f"{person.email}: the line broke after the message was given ({problem}); unsure")
        else:
            _later(store, row, str(problem), done, person)
        raise
    else:
        with store.transaction():
            # What was sent is not kept: it has links in it that are nobody else's.
            store.db.execute(
                "UPDATE outbox SET state = 'sent', message = x'', problem = NULL, next_try = NULL, changed = ? "
                "WHERE id = ?",
                (store.now(), number),
            )
        done.sent += 1


def _set(store: Store, number: int, state: str, problem: str | None) -> None:
    with store.transaction():
        store.db.execute(
            "UPDATE outbox SET state = ?, problem = ?, changed = ? WHERE id = ?", (state, problem, store.now(), number)
        )


def _fail(store: Store, row: sqlite3.Row, problem: str) -> None:
    """It never goes out: its papers were not delivered."""
    with store.transaction():
        store.db.execute(
            "UPDATE outbox SET state = 'failed', problem = ?, message = x'', changed = ? WHERE id = ?",
            (problem, store.now(), row["id"]),
        )
        store.db.execute("DELETE FROM delivered WHERE subscriber = ? AND issue = ?", (row["subscriber"], row["issue"]))


def _later(store: Store, row: sqlite3.Row, problem: str, done: Sent, person: Subscriber) -> None:
    """Try again after a pause that doubles; after two days, never."""
    tries = row["attempts"] + 1
    if tries >= TRIES:
        with store.transaction():
            _fail(store, row, f"given up after {tries} tries: {problem}")
            note_bounce(store, row["subscriber"], final=False)
        done.failed += 1
        done.problems.append(f"{person.email}: given up after {tries} tries ({problem})")
        return
    pause = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
    with store.transaction():
        store.db.execute(
            "UPDATE outbox SET state = 'queued', attempts = ?, next_try = ?, problem = ?, changed = ? WHERE id = ?",
            (tries, stamp(store.clock() + pause), problem, store.now(), row["id"]),
        )
    done.later += 1
    done.problems.append(f"{person.email}: {problem}; tried again in {pause.total_seconds() / 60:.0f} minutes")


def _refused(store: Store, row: sqlite3.Row, person: Subscriber, problem: Refused, done: Sent) -> None:
    if problem.final and (problem.step == "sender" or problem.code in (530, 535)):
        _set(store, row["id"], "queued", str(problem))
        raise Unreachable(f"the mail server takes no mail from us: {problem}; see --from, --user and --security")
    # A policy against us (x.7.x, and what 554 mostly is) says nothing of the person.
    policy = problem.status.startswith("5.7.") or (problem.code == 554 and not problem.status.startswith("5.1."))
    if not problem.final or (policy and problem.step == "recipient"):
        _later(store, row, str(problem), done, person)
        return
    with store.transaction():
        _fail(store, row, str(problem))
        suspended = note_bounce(store, person.id, final=problem.step == "recipient")
    done.failed += 1
    done.problems.append(f"{person.email}: {problem}" + ("; suspended" if suspended else ""))
    if suspended:
        done.suspended.append(person.email)


# mail that came back


@dataclass(frozen=True)
class Bounce:
    """What a delivery status notification (RFC 3464) says.

    Attributes:
        recipient: whom it is about.
        action: ``failed``, ``delayed``, ...
        status: such as ``5.1.1``.
        of: the Message-ID of our mail, when the report holds it.
    """

    recipient: str
    action: str
    status: str
    of: str | None


def read_bounce(raw: bytes) -> list[Bounce]:
    """The reports in a message.

    Raises:
        UserError: it is no delivery report.
    """
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    found: list[Bounce] = []
    of: str | None = None
    blocks: list[Message] = []
    for part in message.walk():
        kind = part.get_content_type()
        if kind == "message/delivery-status":
            content = part.get_payload()
            blocks += [block for block in content if isinstance(block, Message)] if isinstance(content, list) else []
        elif kind == "text/rfc822-headers":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                of = of or email.message_from_bytes(payload).get("Message-ID")
        elif kind == "message/rfc822":
            content = part.get_payload()
            if isinstance(content, list) and content and isinstance(content[0], Message):
                of = of or content[0].get("Message-ID")
    for block in blocks:
        recipient = block.get("Original-Recipient") or block.get("Final-Recipient")
        if recipient is not None:
            address = str(recipient).rpartition(";")[2].strip()
            status = re.search(r"[245]\.\d{1,3}\.\d{1,3}", str(block.get("Status", "")))
            action = str(block.get("Action", "")).strip().lower()
            found.append(Bounce(address, action, status[0] if status else "", of and str(of).strip()))
    if not found:
        raise UserError("this is no delivery report (RFC 3464) with a recipient; use: counterproof feed bounce ADDRESS")
    return found


def read_stop(raw: bytes) -> str:
    """The token of a mail that asks to stop: what mail programs send to the address in List-Unsubscribe.

    Raises:
        UserError: there is none in its subject.
    """
    subject = str(email.message_from_bytes(raw, policy=email.policy.default).get("Subject", ""))
    found = re.search(r"(?:^|\s)unsubscribe\s+([A-Za-z0-9_-]{44})(?:\s|$)", subject)
    if found is None:
        raise UserError("the subject is not 'unsubscribe' and a token; use: counterproof feed unsubscribe ADDRESS")
    return found[1]


def take_bounce(store: Store, bounce: Bounce) -> Literal["suspended", "counted", "delayed"]:
    """Note a report.

    It is believed only of a mail that is in the outbox as sent (or as unsure): anybody can write a report.

    Returns:
        ``suspended``: the address takes no mail; ``counted``: it came back for a reason that may pass; ``delayed``:
        nothing was changed, the server still tries.

    Raises:
        UserError: a report of no mail of ours.
    """
    row = store.db.execute(
        "SELECT * FROM outbox WHERE message_id = ? AND (state IN ('sent', 'unsure', 'sending') "
        "OR problem LIKE 'came back: %')",
        (bounce.of,),
    ).fetchone()
    if row is None:
        raise UserError(
            f"the report on {plain(bounce.recipient)[:80]!a} names no mail that was sent from here; if you believe it: "
            "counterproof feed bounce ADDRESS"
        )
    if bounce.action != "failed":
        return "delayed"
    if row["state"] == "failed":  # the same report again
        return "suspended" if get_subscriber(store, row["subscriber"]).state == "suspended" else "counted"
    # Mailbox full (5.2.2) and policy (5.7.x) pass; an address or a host that does not exist does not.
    final = bounce.status.startswith("5.") and not re.match(r"5\.2\.2$|5\.7\.", bounce.status)
    with store.transaction():
        _fail(store, row, f"came back: {bounce.status}")
        return "suspended" if note_bounce(store, row["subscriber"], final=final) else "counted"
