"""counterproof feed subscribe, confirm, unsubscribe, subscribers, digest, send, bounce: the digest by email."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from counterproof.errors import UserError

if TYPE_CHECKING:
    from counterproof.page.outbox import Letterhead
    from counterproof.page.store import Store
    from counterproof.page.subscribers import Subscriber

__all__ = ["DIGEST_COMMANDS"]

as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
LARGEST = 10 * 2**20  # bytes of a mail that is read


@contextmanager
def opened(*, read_only: bool = False) -> Iterator["Store"]:
    from counterproof.page.store import Store

    store = Store(read_only=read_only)
    try:
        with store.clear_errors():
            yield store
    finally:
        store.close()


def write_json(value: Any) -> None:
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def mail_from(command: Any) -> Any:
    """The options that say whose mail it is."""
    for option in (
        click.option(
            "--stop",
            envvar="COUNTERPROOF_MAIL_STOP",
            help="Address that takes mail which asks to stop; default the sender.",
        ),
        click.option(
            "--page",
            envvar="COUNTERPROOF_PAGE_URL",
            help="Where the page is served, such as https://papers.example.org.",
        ),
        click.option(
            "--name",
            envvar="COUNTERPROOF_MAIL_NAME",
            default="Counterproof",
            show_default=True,
            help="Beside the sender's address.",
        ),
        click.option(
            "--from",
            "sender",
            envvar="COUNTERPROOF_MAIL_FROM",
            default="counterproof@localhost",
            show_default=True,
            help="The sender's address.",
        ),
    ):
        command = option(command)
    return command


def letterhead_of(sender: str, name: str, page: str | None, stop: str | None) -> "Letterhead":
    from counterproof.page.outbox import Letterhead

    return Letterhead(sender, name, page or None, stop or None)


def read_mail(path: Path) -> bytes:
    """A file, or standard input for ``-``."""
    try:
        if str(path) == "-":
            raw = sys.stdin.buffer.read(LARGEST + 1)
        else:
            with path.open("rb") as stream:
                raw = stream.read(LARGEST + 1)
    except OSError as problem:
        raise UserError(
            f"cannot read {path} ({problem.strerror}); name a file with a mail, or - for standard input"
        ) from None
    if len(raw) > LARGEST:
        raise UserError(f"{path} is larger than {LARGEST >> 20} MiB; that is no such mail")
    return raw


@click.command()
@click.argument("address")
@click.option("--rhythm", type=click.Choice(["daily", "weekly"]), default="daily", show_default=True, help="How often.")
@click.option(
    "--topic",
    "topics",
    multiple=True,
    help='Words that must all be in title or abstract; "two words" together, -word absent. Repeatable.',
)
@click.option(
    "--view", "views", multiple=True, help="A saved view. Repeatable; without topics and views: every new paper."
)
@as_json
def subscribe(address: str, rhythm: str, topics: tuple[str, ...], views: tuple[str, ...], as_json: bool) -> None:
    """Ask for the digest at ADDRESS, or for other wishes: a mail with a link to confirm goes into the outbox."""
    from counterproof.page.subscribers import ASKED
    from counterproof.page.subscribers import subscribe as ask

    with opened() as store:
        ask(store, address, rhythm=rhythm, topics=topics, views=views)
    if as_json:
        write_json({"says": ASKED})
    else:
        click.echo(ASKED)
        click.echo("It is sent by: counterproof feed send", err=True)


@click.command()
@click.argument("token")
@as_json
def confirm(token: str, as_json: bool) -> None:
    """Confirm a subscription by the TOKEN of the mail; the page does the same."""
    from counterproof.page.subscribers import confirm as use

    with opened() as store:
        outcome = use(store, token)
    if as_json:
        write_json({"outcome": outcome})
    if outcome != "confirmed":
        wrong = {
            "used": "this link was used already; nothing was changed",
            "expired": "this link is too old; ask again with: counterproof feed subscribe ADDRESS",
            "unknown": "this is no token that was given out and not withdrawn; copy it whole out of the mail",
        }
        raise UserError(wrong[outcome])
    if not as_json:
        click.echo("confirmed: the digest comes as you wished")


@click.command()
@click.argument("who", required=False)
@click.option(
    "--mail",
    type=click.Path(path_type=Path),
    help="A mail that asks to stop, as mail programs send it; - for standard input.",
)
@click.option("--forget", "erase", is_flag=True, help="Remove everything known of the person too.")
@as_json
def unsubscribe(who: str | None, mail: Path | None, erase: bool, as_json: bool) -> None:
    """Stop the digest of WHO: an address, or the token of a digest."""
    from counterproof.page.outbox import read_stop
    from counterproof.page.subscribers import find_subscriber, forget, of_unsubscribe_token, stop

    if (who is None) == (mail is None):
        raise UserError("say who: an address, a token, or --mail FILE")
    token = read_stop(read_mail(mail)) if mail is not None else who or ""
    with opened() as store:
        person: Subscriber | None
        if "@" in token:
            person = find_subscriber(store, token)
        else:
            person = of_unsubscribe_token(store, token)
            if person is None:
                raise UserError("this is no token of a digest; copy it whole, or name the address")
        stop(store, person)
        if erase:
            forget(store, person)
    outcome = "forgotten" if erase else "unsubscribed"
    if as_json:
        write_json({"outcome": outcome, "email": person.email})
    else:
        click.echo(f"{person.email}: {outcome}")


@click.command()
@click.option("--state", type=click.Choice(["pending", "active", "unsubscribed", "suspended"]), help="Only these.")
@as_json
def subscribers(state: Literal["pending", "active", "unsubscribed", "suspended"] | None, as_json: bool) -> None:
    """List who asked for the digest: state, wishes, time of consent, mail that came back."""
    from counterproof.page.subscribers import all_subscribers

    with opened() as store:
        for person in all_subscribers(store, state=state):
            wishes = person.wishes
            if as_json:
                write_json(
                    {
                        "email": person.email,
                        "state": person.state,
                        **asdict(wishes),
                        "asked": person.asked,
                        "confirmed": person.confirmed,
                        "ended": person.ended,
                        "bounces": person.bounces,
                    }
                )
                continue
            wanted = "; ".join([*wishes.topics, *(f"view {name}" for name in wishes.views)]) or "everything"
            consent = f"confirmed {person.confirmed}" if person.confirmed else f"asked {person.asked}"
            came_back = f", came back {person.bounces} times" if person.bounces else ""
            click.echo(f"{person.email}  {person.state}  {wishes.rhythm}  {consent}{came_back}  {wanted}")


def day_of(_context: click.Context, _parameter: click.Parameter, value: datetime | None) -> Any:
    return None if value is None else value.date()


@click.command()
@click.option(
    "--rhythm", type=click.Choice(["daily", "weekly"]), help="Only the daily or the weekly digest; default both."
)
@click.option("--day", type=click.DateTime(["%Y-%m-%d"]), callback=day_of, help="Default today (UTC).")
@click.option("--most", default=50, show_default=True, type=click.IntRange(1, 500), help="Papers in a digest.")
@click.option(
    "--empty",
    type=click.Choice(["send", "skip"]),
    default="send",
    show_default=True,
    help="What becomes of a digest without papers; one that is sent says why.",
)
@click.option("--preview", metavar="ADDRESS", help="Print a person's digest as text and change nothing.")
@mail_from
@as_json
def digest(
    rhythm: Literal["daily", "weekly"] | None,
    day: Any,
    most: int,
    empty: Literal["send", "skip"],
    preview: str | None,
    sender: str,
    name: str,
    page: str | None,
    stop: str | None,
    as_json: bool,
) -> None:
    """Put today's digest of every subscriber into the outbox; again changes nothing.

    A weekly one is made once an ISO week.
    """
    from counterproof.page.digest import issue_letter, make_issue, queue_issues
    from counterproof.page.subscribers import find_subscriber

    head = letterhead_of(sender, name, page, stop)
    if preview is not None:
        import email
        import email.policy

        with opened() as store:
            person = find_subscriber(store, preview)
            issue = make_issue(store, person, day=day, most=most)
            message = email.message_from_bytes(issue_letter(store, person, issue, head), policy=email.policy.default)
        body = message.get_body(("plain",))
        text = "" if body is None else body.get_content()
        if as_json:
            papers = [
                {"key": paper.key, "title": paper.entry.title, "reasons": found.reasons, "votes": found.votes}
                for paper, found in zip(issue.papers, issue.found, strict=True)
            ]
            write_json(
                {
                    "issue": issue.name,
                    "papers": papers,
                    "more": issue.more,
                    "why_empty": issue.why_empty,
                    "missing": issue.missing,
                    "gone": issue.gone,
                    "text": text,
                }
            )
        else:
            click.echo(text)
        return
    with opened() as store, counting("subscribers") as watch:
        done = queue_issues(
            store, head, rhythm=rhythm, day=day, most=most, empty=empty, watch=lambda number: watch(number, 0)
        )
    if as_json:
        write_json(asdict(done))
        return
    click.echo(
        f"{done.queued} queued with {done.papers} papers, {done.known} made before, {done.empty} empty and left out"
    )
    if done.missing:
        click.echo(f"the last pull of these sources failed, which the digests say: {', '.join(done.missing)}", err=True)
    if done.queued:
        click.echo("They are sent by: counterproof feed send", err=True)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A line on a terminal's stderr that says how far it is."""
    if not sys.stderr.isatty():
        yield lambda number, of: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda number, of: status.update(f"{number:,}{f' of {of:,}' if of else ''} {what}")


def password() -> str | None:
    """Out of the environment or of a file it names; never of the command line, which everybody on a machine sees."""
    if path := os.environ.get("COUNTERPROOF_SMTP_PASSWORD_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else "not text"
            raise UserError(f"cannot read COUNTERPROOF_SMTP_PASSWORD_FILE, {path} ({why})") from None
    return os.environ.get("COUNTERPROOF_SMTP_PASSWORD")


@click.command()
@click.option("--smtp", envvar="COUNTERPROOF_SMTP", metavar="HOST[:PORT]", help="A mail server; default: .eml files.")
@click.option(
    "--security",
    envvar="COUNTERPROOF_SMTP_SECURITY",
    default="starttls",
    show_default=True,
    type=click.Choice(["starttls", "tls", "none"]),
    help="How the line to the server is encrypted.",
)
@click.option(
    "--user",
    envvar="COUNTERPROOF_SMTP_USER",
    help="Login; the password is in COUNTERPROOF_SMTP_PASSWORD, or in the file COUNTERPROOF_SMTP_PASSWORD_FILE names.",
)
@click.option(
    "--timeout", default=60.0, show_default=True, type=click.FloatRange(1), help="Seconds for the server's answers."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where .eml files go; default the folder mail beside the page's file.",
)
@click.option(
    "--retry-unsure",
    is_flag=True,
    help="Send again what may have arrived: a sender died, or a line broke, at the last moment.",
)
@click.option("--dry-run", is_flag=True, help="Only list what waits.")
@mail_from
@as_json
def send(
    smtp: str | None,
    security: Literal["starttls", "tls", "none"],
    user: str | None,
    timeout: float,
    folder: Path | None,
    retry_unsure: bool,
    dry_run: bool,
    sender: str,
    name: str,
    page: str | None,
    stop: str | None,
    as_json: bool,
) -> None:
    """Send what is due in the outbox, by SMTP or as .eml files. Exits with 1 when messages are newly unsure.

    No message is sent twice: one of which nobody knows whether it arrived, because the line broke or the sender was
    killed at the very end, is kept as unsure, and only --retry-unsure sends it again.
    """
    from counterproof.page.outbox import Carrier, Folder, Smtp, waiting
    from counterproof.page.outbox import send as send_all

    with opened() as store:
        if dry_run:
            for row in waiting(store):
                if as_json:
                    write_json(row)
                else:
                    when = f", not before {row['next_try']}" if row["next_try"] else ""
                    why = f" ({row['problem']})" if row["problem"] else ""
                    click.echo(f"{row['issue']}  {row['email']}  {row['state']}{when}{why}")
            return
        if smtp and folder is not None:
            raise UserError("either --smtp or --folder; leave one out (COUNTERPROOF_SMTP counts as --smtp)")
        head = letterhead_of(sender, name, page, stop)
        carrier: Carrier
        if smtp:
            host, port = server_of(smtp)
            carrier = Smtp(host, port, security, user, password() if user else None, timeout=timeout)
        else:
            carrier = Folder(folder or store.path.parent / "mail")
        before = sum(row["state"] == "unsure" for row in waiting(store))
        with counting("messages") as watch:
            done = send_all(store, carrier, head, retry_unsure=retry_unsure, watch=watch)
    if as_json:
        write_json(asdict(done))
    else:
        where = f"to {smtp}" if smtp else f"as files in {carrier.path}" if isinstance(carrier, Folder) else ""
        click.echo(f"{done.sent} sent {where}, {done.later} tried again later, {done.failed} failed")
        for problem in done.problems:
            click.echo(problem, err=True)
        if done.unsure:
            click.echo(
                f"{done.unsure} unsure: they may have arrived; see --dry-run, and --retry-unsure to send again",
                err=True,
            )
    if done.unsure > (0 if retry_unsure else before):
        sys.exit(1)


def server_of(text: str) -> tuple[str, int | None]:
    """Host and port of ``mail.example.org``, ``mail.example.org:2525`` or ``[::1]:25``."""
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"{text[:100]!a} is no HOST[:PORT]; expected one such as mail.example.org:587")
    return host, int(port) if port else None


@click.command()
@click.argument("address", required=False)
@click.option(
    "--dsn", type=click.Path(path_type=Path), help="A delivery report (RFC 3464) as it came; - for standard input."
)
@as_json
def bounce(address: str | None, dsn: Path | None, as_json: bool) -> None:
    """Note that mail came back: suspend ADDRESS, or do what a delivery report says."""
    from counterproof.page.outbox import read_bounce, take_bounce
    from counterproof.page.subscribers import find_subscriber, note_bounce

    if (address is None) == (dsn is None):
        raise UserError("name an address, or --dsn FILE")
    found: list[dict[str, str]] = []
    with opened() as store:
        if address is not None:
            person = find_subscriber(store, address)
            suspended = note_bounce(store, person.id, final=True)
            found.append({"email": person.email, "outcome": "suspended" if suspended else person.state})
        elif dsn is not None:
            for report in read_bounce(read_mail(dsn)):
                found.append(
                    {"email": report.recipient, "status": report.status, "outcome": take_bounce(store, report)}
                )
    for one in found:
        if as_json:
            write_json(one)
        else:
            click.echo(f"{ascii(one['email'])[1:-1]}: {one['outcome']}")


DIGEST_COMMANDS: tuple[click.Command, ...] = (subscribe, confirm, unsubscribe, subscribers, digest, send, bounce)
