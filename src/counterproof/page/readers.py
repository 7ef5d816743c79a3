"""Papers out of files and answers: from bytes of any known form to entries, and a word on all that was left out.

A form is read in two steps: a file is split into records, and each record is parsed by itself. So a record that was
kept as it came is read again by the same code (`parse_record`). What a file holds is told by its content; its name is
only held against it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from importlib import import_module
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, BinaryIO

from counterproof.errors import UserError
from counterproof.page.store import Entry

__all__ = ["FORMS", "Broken", "Note", "Record", "Skipped", "detect", "parse_record", "read", "read_lines"]

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "arxiv-atom": "the answer of arXiv's API",
        "arxiv-rss": "arXiv's daily RSS",
        "oai-pmh": "an answer of an OAI-PMH repository",
        "feed": "a feed: RSS, Atom or RDF",
        "daily-papers": "daily papers as JSON",
        "semantic-scholar": "JSON of Semantic Scholar",
        "json-lines": "JSON lines, a paper each",
        "bibtex": "BibTeX",
        "ris": "RIS",
        "text": "a page saved as plain text",
    }
)
# What a name may promise; one that is not here promises nothing.
ENDINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        ".bib": ("bibtex",),
        ".bibtex": ("bibtex",),
        ".ris": ("ris",),
        ".xml": ("arxiv-atom", "arxiv-rss", "oai-pmh", "feed"),
        ".rss": ("arxiv-rss", "feed"),
        ".rdf": ("arxiv-rss", "feed"),
        ".atom": ("arxiv-atom", "feed"),
        ".json": ("daily-papers", "semantic-scholar", "json-lines"),
        ".jsonl": ("json-lines",),
        ".ndjson": ("json-lines",),
    }
)
MAGIC = (
    (b"%PDF", "a PDF file; only lists of papers are read, not papers"),
    (b"PK\x03\x04", "a zip archive (or an office document); unpack it first"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first: gunzip"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"SQLite format 3\0", "an SQLite database; export it to a list first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)


@dataclass(frozen=True)
class Record:
    """A record that could be read.

    Attributes:
        where: its place: ``line 12``, ``record 3``.
        entry: what it says.
        form: how `raw` is to be read.
        raw: the record as it came; None when the entry is all there was.
        day: the day it was listed on, ``YYYY-MM-DD``; None when not said.
        source: where it comes from, when the form or the record says so.
    """

    where: str
    entry: Entry
    form: str
    raw: bytes | None = None
    day: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A line or a record that was left out, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Broken(Skipped):
    """Where reading had to stop: what comes after was not read."""


@dataclass(frozen=True)
class Note:
    """What was read, but not as plainly as it should be."""

    where: str
    text: str


Found = Record | Skipped | Note


@dataclass(frozen=True)
class Piece:
    """A record before it is parsed."""

    where: str
    raw: bytes
    form: str
    day: str | None = None
    source: str | None = None
    keep: bool = True  # whether raw says more than the entry
    entry: Callable[[], Entry] | None = None  # where splitting has parsed it already


class Unreadable(ValueError):
    """A record that makes no paper; the message says why."""


Split = Callable[[bytes, str | None], Iterator[Piece | Skipped | Note]]
Parse = Callable[[bytes], Entry]


@cache
def _reader(form: str) -> tuple[Split, Parse]:
    """The two steps of a form; the libraries they need are imported when they are."""
    if form in ("arxiv-atom", "arxiv-rss", "oai-pmh", "feed"):
        module = "readers_xml"
    elif form in ("daily-papers", "semantic-scholar", "json-lines"):
        module = "readers_json"
    elif form in ("bibtex", "ris", "text"):
        module = "readers_text"
    else:
        raise UserError(f"no form {form!r}; forms: {', '.join(FORMS)}")
    readers: Mapping[str, tuple[Split, Parse]] = import_module(f"counterproof.page.{module}").READERS
    return readers[form]


def read(data: bytes, form: str, *, charset: str | None = None) -> Iterator[Found]:
    """Read a file or an answer.

    Args:
        data: all of it.
        form: one of `FORMS`.
        charset: what came with it as its charset; what the data says of itself, or shows, goes first where they differ.

    Yields:
        a `Record` for each paper, a `Skipped` for each line or record that makes none, a `Note` for what was guessed,
        and a `Broken` last where the rest cannot be read. In order.

    Raises:
        UserError: an unknown form.
    """
    split, parse = _reader(form)
    return _parsed(split(data, charset), parse)


def read_lines(stream: BinaryIO) -> Iterator[Found]:
    """`read` for JSON lines of any number: no more than one of them is in memory."""
    from counterproof.page.readers_json import split_lines

    return _parsed(split_lines(stream), _reader("json-lines")[1])


def _parsed(pieces: Iterable[Piece | Skipped | Note], parse: Parse) -> Iterator[Found]:
    for piece in pieces:
        if not isinstance(piece, Piece):
            yield piece
            continue
        try:
            entry = parse(piece.raw) if piece.entry is None else piece.entry()
        except Unreadable as problem:
            yield Skipped(piece.where, str(problem))
        else:
            yield Record(piece.where, entry, piece.form, piece.raw if piece.keep else None, piece.day, piece.source)


def parse_record(form: str, raw: bytes) -> Entry:
    """Read a record again that was kept as it came: the `parse` of `Store.rebuild`.

    Raises:
        UserError: a form that is unknown, or a record that makes no paper any more.
    """
    try:
        return _reader(form)[1](raw)
    except Unreadable as problem:
        raise UserError(f"a record of the form {form} cannot be read again: {problem}") from None


# telling forms


def detect(data: bytes, name: str = "", *, whole: bool = True) -> str:
    """What form a file has, by its content.

    Args:
        data: all of it, or its first part.
        name: the file's, for messages; when it ends like another form than the content has, that is an error.
        whole: whether `data` is all.

    Raises:
        UserError: nothing in it, a form that is not known, or not the form that the name says.
    """
    called = name or "the answer"
    form = _content(data, called, whole)
    promised = ENDINGS.get(PurePath(name).suffix.lower(), (form,)) if "://" not in name else (form,)
    if form not in promised:
        raise UserError(
            f"{called} is not what its name says: it ends like {FORMS[promised[0]]}, and holds {FORMS[form]}; "
            f"say --format {form} to take it as that"
        )
    return form


def _content(data: bytes, called: str, whole: bool) -> str:
    for magic, meaning in MAGIC:
        if data.startswith(magic):
            raise UserError(f"{called} is {meaning}")
    text, _ = decoded(data[: 1 << 20] if data[:2] not in (b"\xff\xfe", b"\xfe\xff") else data, None)
    head = text.lstrip("\ufeff \t\r\n\f\v")
    if not head:
        raise UserError(f"{called} is empty")
    if "\0" in head[:4096]:
        raise UserError(f"{called} is not text")
    if head[0] == "<":
        return _xml_form(head, called)
    if head[0] in "{[":
        from counterproof.page.readers_json import form_of

        return form_of(data, called, whole)
    if re.match(r"TY {1,2}- ?\S", head):
        return "ris"
    if re.search(r"^\s*@[A-Za-z]+\s*[{(]\s*[^\s,{}()=]*\s*[,=]", head, re.MULTILINE):
        return "bibtex"
    if re.search(r"^TY {1,2}- ?\S", head, re.MULTILINE) and re.search(r"^ER {1,2}-", head, re.MULTILINE):
        return "ris"
    return "text"


def _xml_form(head: str, called: str) -> str:
    """By the first element."""
    first = re.search(
        r"<(?:[A-Za-z_][\w.-]*:)?([A-Za-z_][\w.-]*)", re.sub(r"<!--.*?-->|<\?.*?\?>", "", head, flags=re.S)
    )
    root = first[1] if first else ""
    doctype = re.match(r"\s*<!doctype\s+html", head, re.IGNORECASE)
    if doctype or root.lower() == "html":
        raise UserError(
            f"{called} is a web page (HTML), not a list of papers; give the address of its feed, or save the page as "
            "plain text"
        )
    if root == "OAI-PMH":
        return "oai-pmh"
    if root == "feed":
        ours = "arxiv.org/api" in head[:4000] or "arxiv.org/schemas/atom" in head[:4000]
        return "arxiv-atom" if ours else "feed"
    if root in ("rss", "RDF"):
        return "arxiv-rss" if re.search(r"//(?:export\.|rss\.)?arxiv\.org/(?:schemas|rss)", head[:4000]) else "feed"
    raise UserError(f"{called} is XML, but no feed and no OAI-PMH: its first element is <{root or '?'}>")


# what the readers share


def decoded(data: bytes, charset: str | None) -> tuple[str, str | None]:
    """Text of bytes, and what had to be guessed.

    In turn: what a byte-order mark says, UTF-8, the charset that came with it, Windows-1252.
    """
    for mark, name in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            try:
                return data.decode(name), None
            except UnicodeDecodeError:
                return data.decode(name, "replace"), f"damaged {name}; what could not be read is marked with U+FFFD"
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as problem:
        first = problem.start
    said = (charset or "").lower().replace("_", "-")
    if said and said not in ("utf-8", "utf8", "us-ascii", "ascii"):
        try:
            # What calls itself Latin-1 is Windows-1252 in practice, as in HTML.
            return data.decode("cp1252" if said in ("iso-8859-1", "latin-1", "latin1") else said), None
        except (LookupError, UnicodeDecodeError):
            pass  # said below
    if len(data) - first < 4:  # a part of a file may end within a letter
        return data[:first].decode("utf-8"), "ends within a letter of UTF-8"
    claim = f"not {said}, as it claims" if said else "not UTF-8"
    return data.decode("cp1252", "replace"), f"{claim} (byte {first}); read as Windows-1252"


CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
WEB = re.compile(r"https?://[^\s<>\"]+\Z", re.IGNORECASE)
YEAR = re.compile(r"(?:1[5-9]|2[01])\d\d")
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
DOI = re.compile(r"\b10\.\d{4,9}/[^\s\"<>{}]+")


def clean(text: str) -> str:
    """Without half surrogates, which neither SQLite nor XML can hold, and what steers terminals or turns text round."""
    return text if text.isascii() and text.isprintable() else CONTROLS.sub("", text)


def cut(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line, for a message."""
    text = " ".join(clean(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def lines_of(data: bytes, charset: str | None) -> tuple[list[str], str | None]:
    """The lines of a text, and what was guessed of its letters, as `decoded` says it."""
    text, guessed = decoded(data, charset)
    return re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), guessed


def doi_in(text: str) -> str | None:
    """The first DOI in a text, lower case; None when there is none."""
    found = DOI.search(text)
    return found[0].lower().rstrip(".,;)") if found else None


def plain_date(text: str) -> str | None:
    """A date or a time of ISO 8601, or a year, as it is stored: UTC; None for anything else."""
    text = text.strip()
    if not text:
        return None
    if YEAR.fullmatch(text):
        return text
    try:
        if DAY.fullmatch(text):
            return date.fromisoformat(text).isoformat()
        moment = datetime.fromisoformat(text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return aware.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError):
        return None


def entry_of(**values: Any) -> Entry:
    """An entry from what a record says.

    Raises:
        Unreadable: no title, or what is longer than any title or abstract.
    """
    for name in ("title", "abstract", "venue"):
        values[name] = clean(values.get(name) or "")
    for name in ("authors", "categories"):
        values[name] = tuple(text for item in values.get(name, ()) if (text := clean(item).strip()))
    for name in ("links", "extra"):
        values[name] = {clean(key): clean(text) for key, text in values.get(name, {}).items() if text}
    for name in [name for name, address in values["links"].items() if not WEB.match(address)]:
        values["extra"][f"link {name}"] = values["links"].pop(name)  # kept, but nothing to click on
    if not values["title"].strip():
        raise Unreadable("has no title")
    for name, most in (("title", 2_000), ("abstract", 100_000)):
        if len(values[name]) > most:
            raise Unreadable(f"its {name} has {len(values[name]):,} characters, more than the {most:,} of any paper")
    try:
        return Entry(**values)
    except ValueError as problem:
        raise Unreadable(str(problem)) from None
