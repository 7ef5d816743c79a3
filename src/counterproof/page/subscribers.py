"""Who gets the digest: asking for it, confirming by a link, changing one's wishes, stopping, bouncing.

Nobody gets a digest who did not confirm: `subscribe` only puts a mail with a link into the outbox, and answers the same
whether the address is known or not. The link's token is made when that mail is sent, is good for two days and once, and
only its SHA-256 is stored. What was wished stays with the token until it is used, so that asking in another's name
changes nothing for them. A link in every digest stops it: its token is an HMAC under the subscriber's own secret, needs
no login, and may be used again. Reading either link changes nothing; only `confirm` and `unsubscribe` do.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, get_args

from counterproof.errors import UserError, extra
from counterproof.page.store import Store, stamp

__all__ = [
    "ASKED",
    "Limits",
    "Link",
    "Subscriber",
    "TooMany",
    "Wishes",
    "all_subscribers",
    "check",
    "confirm",
    "find_subscriber",
    "forget",
    "forget_unconfirmed",
    "get_subscriber",
    "mail_address",
    "new_token",
    "note_bounce",
    "of_unsubscribe_token",
    "stop",
    "subscribe",
    "unsubscribe",
    "unsubscribe_token",
]

Rhythm = Literal["daily", "weekly"]
State = Literal["pending", "active", "unsubscribed", "suspended"]
LIST = "papers"
ASKED = "If the address takes mail, a message with a link is on its way; nothing more is sent until the link is used."
LIFE = timedelta(hours=48)  # of a confirmation link
SOFT_BOUNCES = 3  # so many that are not final, none more than a month after the one before, suspend too
MONTH = timedelta(days=30)
MOST_TOPICS = 20
LONGEST_TOPIC = 80
HANDLE, MAC = 12, 21  # bytes; 33 together are 44 letters without slack
LOCAL = re.compile(r"[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


class TooMany(UserError):
    """A caller, or all callers together, asked too often; the answer says nothing of any address."""


@dataclass(frozen=True)
class Limits:
    """How often one may ask.

    Attributes:
        address: mails to one address in 24 hours; asking more often is answered as ever and sends nothing.
        caller: asks of one caller in an hour; IPv6 callers count by their /64.
        all: asks of all callers in an hour.
    """

    address: int = 3
    caller: int = 10
    all: int = 300


def mail_address(text: str) -> str:
    """An address as it is stored and sent to: lower case, the domain in ASCII (punycode).

    Raises:
        UserError: what is no address, or one that needs SMTPUTF8 or is quoted.

    Example:
        >>> mail_address(" Ann@Example.ORG"), mail_address("bob@bücher.example")
        ('ann@example.org', 'bob@xn--bcher-kva.example')
    """
    given = text.strip(" ")
    shown = ascii(given if len(given) <= 80 else given[:79] + "…")
    wrong = UserError(f"{shown} is no mail address; expected one such as ann@example.org")
    if len(given) > 320 or given.count("@") != 1 or any(unicodedata.category(letter)[0] in "CZ" for letter in given):
        raise wrong
    local, domain = given.split("@")
    if not local.isascii():
        raise UserError(f"{shown}: letters before the @ must be ASCII; mail servers rarely take others")
    if not domain.isascii():
        with extra("page"):
            import idna
        try:
            domain = idna.encode(domain, uts46=True).decode()
        except idna.IDNAError:
            raise wrong from None
    local, domain = local.lower(), domain.lower()
    labels = domain.split(".")
    if (
        not LOCAL.fullmatch(local)
        or len(local) > 64
        or len(local) + 1 + len(domain) > 254
        or len(labels) < 2
        or not all(LABEL.fullmatch(label) for label in labels)
        or labels[-1].isdigit()
    ):
        raise wrong
    return f"{local}@{domain}"


@dataclass(frozen=True)
class Wishes:
    """What a person wants to read.

    Attributes:
        rhythm: ``daily`` or ``weekly``.
        topics: words; a paper that has all words of one, in title or abstract, is in. ``"two words"`` in quotes must
            stand together, ``-word`` must be absent.
        views: names of saved views. Without topics and views: every new paper.
    """

    rhythm: Rhythm = "daily"
    topics: tuple[str, ...] = ()
    views: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"rhythm": self.rhythm, "topics": self.topics, "views": self.views}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Wishes":
        value = json.loads(text)
        return cls(value["rhythm"], tuple(value["topics"]), tuple(value["views"]))


def _wishes(store: Store, rhythm: str, topics: Sequence[str], views: Sequence[str]) -> Wishes:
    """Checked.

    Raises:
        UserError: another rhythm, a topic with control characters or without a word to look for, too many or too long
            topics, a view that is not there.
    """
    if rhythm not in get_args(Rhythm):
        raise UserError(f"{rhythm!r} is no rhythm; choose daily or weekly")
    if len(topics) > MOST_TOPICS or len(views) > MOST_TOPICS:
        raise UserError(f"at most {MOST_TOPICS} topics and {MOST_TOPICS} views; {max(len(topics), len(views))} given")
    clean: dict[str, str] = {}
    for topic in topics:
        if len(topic) > LONGEST_TOPIC:
            raise UserError(f"the topic {topic[:30]!r}… has {len(topic)} letters; at most {LONGEST_TOPIC}")
        if topic != printable(topic):
            raise UserError(f"the topic {topic!a} has control characters; leave them out")
        text = " ".join(topic.split())
        if topic_match(text) is None:
            raise UserError(f"the topic {topic!r} has no word to look for; give one, such as: object detection")
        clean.setdefault(text.casefold(), text)
    for view in views:
        if store.db.execute("SELECT 1 FROM saved_views WHERE name = ?", (view,)).fetchone() is None:
            known = [row[0] for row in store.db.execute("SELECT name FROM saved_views ORDER BY name LIMIT 20")]
            raise UserError(
                f"no saved view {view[:LONGEST_TOPIC]!a}; "
                + (f"there are: {', '.join(known)}" if known else "none is saved")
            )
    return Wishes(rhythm, tuple(clean.values()), tuple(dict.fromkeys(views)))  # type: ignore[arg-type]


def printable(text: str) -> str:
    """With a space for each control character, and for each that turns the direction of writing."""
    if text.isprintable():
        return text
    return "".join(
        " " if unicodedata.category(letter) in ("Cc", "Cf", "Cs") and letter not in "\u200c\u200d" else letter
        for letter in text
    )


def topic_match(topic: str) -> str | None:
    """A topic as an expression for FTS5's MATCH, every word quoted; None when it asks for no word.

    Example:
        >>> topic_match('"object detection" one-to-many -medical AND')
        '("object detection" AND "one to many" AND "AND") NOT "medical"'
    """
    wanted: list[str] = []
    absent: list[str] = []
    for minus, quoted, bare in re.findall(r'(?<!\S)(-?)(?:"([^"]*)"|(\S+))', topic):
        words = " ".join(re.findall(r"[^\W_]+", quoted or bare))
        if words:
            (absent if minus else wanted).append(f'"{words}"')
    if not wanted:
        return None
    return " NOT ".join([f"({' AND '.join(wanted)})", *absent])


@dataclass(frozen=True)
class Subscriber:
    """A person's row.

    Attributes:
        id: in this file.
        email: as `mail_address` writes it.
        state: ``pending`` until the link is used; ``suspended`` after mail came back.
        wishes: the confirmed ones, of a pending one those asked for.
        asked, confirmed, ended: when; UTC. `confirmed` is the time of consent.
        bounces: how often mail came back of late.
        handle, secret: what the link that stops the digest is made of.
    """

    id: int
    email: str
    state: State
    wishes: Wishes
    asked: str
    confirmed: str | None
    ended: str | None
    bounces: int
    handle: bytes = field(repr=False)
    secret: bytes = field(repr=False)


COLUMNS = "id, email, state, rhythm, topics, views, asked, confirmed, ended, bounces, handle, secret"


def _subscriber(row: sqlite3.Row) -> Subscriber:
    wishes = Wishes(row["rhythm"], tuple(json.loads(row["topics"])), tuple(json.loads(row["views"])))
    return Subscriber(
        row["id"], row["email"], row["state"], wishes, row["asked"], row["confirmed"], row["ended"], row["bounces"],
        row["handle"], row["secret"],
    )  # fmt: skip


def all_subscribers(store: Store, *, state: State | None = None, rhythm: Rhythm | None = None) -> Iterator[Subscriber]:
    """In the order they first asked."""
    last = 0
    while True:
        # In pieces, so that no reading transaction stays open while the caller works on one.
        rows = store.db.execute(
            f"SELECT {COLUMNS} FROM subscribers WHERE id > ? AND state = coalesce(?, state) "
            "AND rhythm = coalesce(?, rhythm) ORDER BY id LIMIT 500",
            (last, state, rhythm),
        ).fetchall()
        if not rows:
            return
        for row in rows:
            yield _subscriber(row)
        last = rows[-1]["id"]


def get_subscriber(store: Store, number: int) -> Subscriber:
    """The row of an id.

    Raises:
        KeyError: there is none.
    """
    row = store.db.execute(f"SELECT {COLUMNS} FROM subscribers WHERE id = ?", (number,)).fetchone()
    if row is None:
        raise KeyError(number)
    return _subscriber(row)


def find_subscriber(store: Store, email: str) -> Subscriber:
    """For the operator: the row of an address.

    Raises:
        UserError: no address, or nobody's.
    """
    address = mail_address(email)
    row = store.db.execute(f"SELECT {COLUMNS} FROM subscribers WHERE email = ?", (address,)).fetchone()
    if row is None:
        raise UserError(f"{address} never asked for the digest; see: counterproof feed subscribers")
    return _subscriber(row)


# asking


def subscribe(
    store: Store,
    email: str,
    *,
    rhythm: str = "daily",
    topics: Sequence[str] = (),
    views: Sequence[str] = (),
    caller: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Ask for the digest, or for other wishes: puts a mail with a link into the outbox; nothing else changes.

    What is returned, and what is raised, does not depend on whether the address is known: show `ASKED`.

    Args:
        email: where to.
        rhythm, topics, views: see `Wishes`.
        caller: who asks, such as an IP address, for the limit; kept for a day. None: the operator, who has none.
        limits: how often one may ask.

    Raises:
        UserError: no address, or wishes that make no sense.
        TooMany: the caller, or all together, asked too often.
    """
    limits = limits or Limits()
    address = mail_address(email)
    wishes = _wishes(store, rhythm, topics, views)
    who = _caller(caller)
    with store.transaction():
        now = store.now()
        present = store.clock()
        hour, day = stamp(present - timedelta(hours=1)), stamp(present - timedelta(days=1))
        # What lies ahead was noted by a clock that was put back since, and would block for as long.
        ahead = stamp(present + timedelta(hours=1))
        store.db.execute("DELETE FROM asks WHERE at <= ? OR at > ?", (day, ahead))
        if who is not None:
            asked = store.db.execute(
                "SELECT count(*), coalesce(sum(caller = ?), 0) FROM asks WHERE at > ? AND caller IS NOT NULL",
                (who, hour),
            ).fetchone()
            if asked[0] >= limits.all or asked[1] >= limits.caller:
                raise TooMany("asked too often within an hour; try again later")
        mails = store.db.execute("SELECT count(*) FROM asks WHERE email = ?", (address,)).fetchone()[0]
        # An ask that sends nothing does not make the address wait longer.
        counted = address if mails < limits.address else ""
        store.db.execute("INSERT INTO asks (at, email, caller) VALUES (?, ?, ?)", (now, counted, who))
        if not counted:
            return
        row = store.db.execute("SELECT id, state FROM subscribers WHERE email = ?", (address,)).fetchone()
        told = (wishes.rhythm, json.dumps(wishes.topics), json.dumps(wishes.views))
        if row is None:
            subscriber = store.db.execute(
                "INSERT INTO subscribers (email, state, rhythm, topics, views, handle, secret, asked) "
                "VALUES (?, 'pending', ?, ?, ?, ?, ?, ?)",
                (address, *told, _random(HANDLE), secrets.token_bytes(32), now),
            ).lastrowid
        else:
            subscriber = row["id"]
            if row["state"] == "pending":
                store.db.execute(
                    "UPDATE subscribers SET rhythm = ?, topics = ?, views = ?, asked = ? WHERE id = ?",
                    (*told, now, subscriber),
                )
        # The mail itself is written when it is sent: its token is nowhere else.
        waiting = store.db.execute(
            "UPDATE outbox SET message = ?, changed = ? WHERE subscriber = ? AND issue LIKE 'confirm:%' "
            "AND state = 'queued'",
            (wishes.to_json().encode(), now, subscriber),
        ).rowcount
        if not waiting:
            issue = f"confirm:{secrets.token_hex(8)}"
            store.db.execute(
                "INSERT INTO outbox (issue, subscriber, message_id, message, state, changed) "
                "VALUES (?, ?, ?, ?, 'queued', ?)",
                (issue, subscriber, secrets.token_hex(16), wishes.to_json().encode(), now),
            )


def _caller(caller: str | None) -> str | None:
    if caller is None:
        return None
    try:
        address = ipaddress.ip_address(caller)
    except ValueError:
        return caller[:100]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)


def new_token(store: Store, subscriber: int, wishes: Wishes) -> str:
    """A token that confirms these wishes once within two days; only its digest is kept."""
    token = base64.urlsafe_b64encode(_random(HANDLE + MAC)).decode()
    with store.transaction():
        store.db.execute(
            "INSERT INTO tokens (digest, subscriber, wishes, expires) VALUES (?, ?, ?, ?)",
            (_digest(token), subscriber, wishes.to_json(), stamp(store.clock() + LIFE)),
        )
    return token


def _random(size: int) -> bytes:
    """Random bytes whose token does not begin with a hyphen, which a command line would take for an option."""
    while True:
        value = secrets.token_bytes(size)
        if not base64.urlsafe_b64encode(value).startswith(b"-"):
            return value


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


# using a link


def confirm(store: Store, token: str) -> Literal["confirmed", "used", "expired", "unknown"]:
    """Use a confirmation link: the person is active with the wishes of that link, and the time is their consent's.

    Returns:
        ``confirmed``; or ``used``, ``expired``, ``unknown`` when nothing was changed.
    """
    with store.transaction():
        row = store.db.execute("SELECT * FROM tokens WHERE digest = ?", (_digest(token),)).fetchone()
        if row is None:
            return "unknown"
        if row["used"] is not None:
            return "used"
        now = store.now()
        if row["expires"] <= now:
            return "expired"
        store.db.execute("UPDATE tokens SET used = ? WHERE digest = ?", (now, row["digest"]))
        wishes = Wishes.from_json(row["wishes"])
        store.db.execute(
            "UPDATE subscribers SET rhythm = ?, topics = ?, views = ?, bounces = 0, bounced = NULL, ended = NULL, "
            "confirmed = CASE state WHEN 'active' THEN confirmed ELSE ? END, state = 'active' WHERE id = ?",
            (wishes.rhythm, json.dumps(wishes.topics), json.dumps(wishes.views), now, row["subscriber"]),
        )
        return "confirmed"


def unsubscribe_token(subscriber: Subscriber) -> str:
    """The token that stops this person's digest; the same in every issue."""
    return base64.urlsafe_b64encode(subscriber.handle + _mac(subscriber.secret)).decode()


def _mac(secret: bytes) -> bytes:
    return hmac.digest(secret, f"counterproof unsubscribe {LIST}".encode(), "sha256")[:MAC]


def of_unsubscribe_token(store: Store, token: str) -> Subscriber | None:
    """Whose digest a token stops; None for one that was never given out."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{44}", token):
        return None
    value = base64.urlsafe_b64decode(token)
    row = store.db.execute(f"SELECT {COLUMNS} FROM subscribers WHERE handle = ?", (value[:HANDLE],)).fetchone()
    if row is None or not hmac.compare_digest(value[HANDLE:], _mac(row["secret"])):
        return None
    return _subscriber(row)


def unsubscribe(store: Store, token: str) -> Literal["unsubscribed", "unknown"]:
    """Stop the digest by the link of a digest, without login; again is fine.

    Returns:
        ``unsubscribed``, also when the person was already; ``unknown`` for a token that was never given out.
    """
    found = of_unsubscribe_token(store, token)
    if found is None:
        return "unknown"
    stop(store, found)
    return "unsubscribed"


def stop(store: Store, subscriber: Subscriber) -> None:
    """Unsubscribe a person: waiting mail is not sent, and links sent earlier confirm nothing any more."""
    with store.transaction():
        now = store.now()
        store.db.execute(
            "UPDATE subscribers SET state = 'unsubscribed', ended = ? WHERE id = ? AND state != 'unsubscribed'",
            (now, subscriber.id),
        )
        store.db.execute("DELETE FROM tokens WHERE subscriber = ? AND used IS NULL", (subscriber.id,))
        store.db.execute(
            "DELETE FROM delivered WHERE subscriber = ? AND issue IN "
            "(SELECT issue FROM outbox WHERE subscriber = ? AND state = 'queued')",
            (subscriber.id, subscriber.id),
        )
        store.db.execute(
            "UPDATE outbox SET state = 'failed', problem = 'unsubscribed before it was sent', message = x'', "
            "changed = ? WHERE subscriber = ? AND state = 'queued'",
            (now, subscriber.id),
        )


@dataclass(frozen=True)
class Link:
    """What a link would do; looking changes nothing.

    Attributes:
        purpose: ``confirm`` or ``unsubscribe``.
        problem: why using it changes nothing: ``used``, ``expired``; None when it would.
        address: whose, most of it hidden, such as ``a…@example.org``.
        wishes: what is confirmed, or was subscribed to.
    """

    purpose: Literal["confirm", "unsubscribe"]
    problem: Literal["used", "expired"] | None
    address: str
    wishes: Wishes


def check(store: Store, token: str) -> Link | None:
    """What the page behind a link shows before its button is pressed; None for a token that was never given out."""
    row = store.db.execute(
        "SELECT tokens.*, email FROM tokens JOIN subscribers ON subscribers.id = subscriber WHERE digest = ?",
        (_digest(token),),
    ).fetchone()
    if row is not None:
        problem: Literal["used", "expired"] | None = None
        if row["used"] is not None:
            problem = "used"
        elif row["expires"] <= store.now():
            problem = "expired"
        return Link("confirm", problem, _hidden(row["email"]), Wishes.from_json(row["wishes"]))
    found = of_unsubscribe_token(store, token)
    if found is None:
        return None
    return Link("unsubscribe", "used" if found.state == "unsubscribed" else None, _hidden(found.email), found.wishes)


def _hidden(email: str) -> str:
    local, _, domain = email.partition("@")
    return f"{local[0]}…@{domain}"


# mail that comes back, and forgetting


def note_bounce(store: Store, subscriber: int, *, final: bool) -> bool:
    """Mail to a person came back.

    Args:
        final: the address does not exist or takes no mail: suspended at once. Otherwise the third suspends, when none
            came more than a month after the one before.

    Returns:
        whether the person is suspended now.
    """
    with store.transaction():
        row = store.db.execute("SELECT state, bounces, bounced FROM subscribers WHERE id = ?", (subscriber,)).fetchone()
        now = store.now()
        recent = row["bounced"] is not None and row["bounced"] > stamp(store.clock() - MONTH)
        bounces = row["bounces"] + 1 if recent else 1
        store.db.execute("UPDATE subscribers SET bounces = ?, bounced = ? WHERE id = ?", (bounces, now, subscriber))
        if (final or bounces >= SOFT_BOUNCES) and row["state"] in ("active", "pending"):
            store.db.execute("UPDATE subscribers SET state = 'suspended', ended = ? WHERE id = ?", (now, subscriber))
            return True
        return bool(row["state"] == "suspended")


def forget(store: Store, subscriber: Subscriber) -> None:
    """Remove everything known of a person: row, tokens, mail, what was delivered."""
    with store.transaction():
        for table in ("tokens", "outbox", "delivered"):
            store.db.execute(f"DELETE FROM {table} WHERE subscriber = ?", (subscriber.id,))
        store.db.execute("DELETE FROM asks WHERE email = ?", (subscriber.email,))
        store.db.execute("DELETE FROM subscribers WHERE id = ?", (subscriber.id,))


def forget_unconfirmed(store: Store) -> int:
    """Remove who asked more than a month ago and never confirmed, and tokens as old; returns how many persons."""
    long_ago = stamp(store.clock() - MONTH)
    # Whose address took no mail, or who stopped it before it began, too.
    rows = store.db.execute(f"SELECT {COLUMNS} FROM subscribers WHERE confirmed IS NULL AND asked < ?", (long_ago,))
    people = [_subscriber(row) for row in rows]
    with store.transaction():
        for person in people:
            forget(store, person)
        store.db.execute("DELETE FROM tokens WHERE expires < ?", (long_ago,))
    return len(people)
