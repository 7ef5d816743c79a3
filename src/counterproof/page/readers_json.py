"""Papers out of JSON: daily papers, Semantic Scholar, and lines of entries such as our own dump."""

import json
import math
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

from counterproof.errors import UserError
from counterproof.page.readers import (
    Broken,
    Note,
    Parse,
    Piece,
    Skipped,
    Split,
    Unreadable,
    clean,
    decoded,
    doi_in,
    entry_of,
    plain_date,
)
from counterproof.page.store import Entry, arxiv_id, compact

__all__ = ["READERS", "form_of", "split_lines"]

Pieces = Iterator[Piece | Skipped | Note]
LONGEST_LINE = 4 << 20  # bytes


def _loads(text: str | bytes) -> Any:
    """
    Raises:
        Unreadable: no JSON, or nested deeper than anything sensible.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, " if problem.lineno > 1 else ""
        raise Unreadable(f"is no JSON ({problem.msg}, {place}column {problem.colno})") from None
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except ValueError as problem:  # a number of thousands of digits, bytes that are no text
        raise Unreadable(f"is no JSON ({problem})") from None


def _kind(value: Any) -> str:
    """What form an object is a record of."""
    if isinstance(value, dict):
        if isinstance(value.get("paper"), dict):
            return "daily-papers"
        if "paperId" in value or "externalIds" in value:
            return "semantic-scholar"
    return "json-lines"


def _items(value: Any) -> list[Any]:
    """The records of a whole document."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        for name in ("data", "recommendedPapers", "papers"):
            if isinstance(value.get(name), list):
                return list(value[name])
    return [value]


def form_of(data: bytes, called: str, whole: bool) -> str:
    """Which of the JSON forms a file has.

    Raises:
        UserError: none.
    """
    head = data[: 1 << 16]
    first = decoded(head, None)[0].lstrip("\ufeff \t\r\n").split("\n", 1)[0]
    try:
        value = _loads(first)
    except Unreadable:
        value = None
    lines = isinstance(value, dict) and _items(value) == [value] and "error" not in value
    if lines and (not whole or b"\n" in data.strip() or _kind(value) == "json-lines"):
        return "json-lines"
    if not whole:
        raise UserError(f"{called} is too large for one JSON document; make it JSON lines, a paper on each")
    try:
        found = _items(_loads(decoded(data, None)[0]))
    except Unreadable as problem:
        # Lines of which the first is damaged are still lines.
        rest = data.split(b"\n", 2)[1:2]
        try:
            if rest and isinstance(_loads(rest[0]), dict):
                return "json-lines"
        except Unreadable:
            pass  # the first problem is the one to tell
        raise UserError(f"{called} begins like JSON, but {problem}") from None
    kinds = {_kind(item) for item in found if isinstance(item, dict)}
    if not kinds or kinds == {"semantic-scholar"}:
        return "semantic-scholar"
    if kinds == {"daily-papers"}:
        return "daily-papers"
    if any(isinstance(item, dict) and ("title" in item or "entry" in item) for item in found):
        return "json-lines"
    raise UserError(f"{called} is JSON, but holds no papers: no object in it has a title")


def _split_document(data: bytes, charset: str | None) -> Pieces:
    text, guessed = decoded(data, charset)
    if guessed:
        yield Note("file", guessed)
    try:
        value = _loads(text)
    except Unreadable as problem:
        yield Broken("file", f"the answer {problem}")
        return
    if isinstance(value, dict) and "error" in value and "title" not in value:
        yield Broken("file", f"the answer is an error: {clean(str(value['error']))[:200]}")
        return
    for number, item in enumerate(_items(value), 1):
        where = f"record {number}"
        if item is None:
            yield Skipped(where, "is not known there (null)")
        elif not isinstance(item, dict):
            yield Skipped(where, f"is no object but {json.dumps(item)[:60]}")
        else:
            yield _piece(where, compact(item).encode("utf-8", "surrogatepass"), item, _kind(item))


def _piece(where: str, raw: bytes, item: dict[str, Any], form: str) -> Piece:
    day = source = None
    if form == "daily-papers":
        paper = item["paper"]
        said = paper.get("submittedOnDailyAt") or item.get("publishedAt") or ""
        day = (plain_date(said) or "")[:10] if isinstance(said, str) else ""
        source = form
    elif form == "semantic-scholar":
        source = form
    else:
        day = plain_date(item["day"]) if isinstance(item.get("day"), str) else None
        source = item["source"] if isinstance(item.get("source"), str) else None
    return Piece(where, raw, form, day or None, source, form != "json-lines", partial(_of, item))


def split_lines(lines: Iterable[bytes]) -> Pieces:
    """JSON lines; a file that is open for reading bytes will do."""
    for number, line in enumerate(lines, 1):
        where = f"line {number}"
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        line = line.strip()
        if not line:
            continue
        if len(line) > LONGEST_LINE:
            yield Skipped(where, f"has {len(line):,} bytes, more than any paper")
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text, guessed = decoded(line, None)
            yield Note(where, guessed or "not UTF-8")
        try:
            item = _loads(text)
        except Unreadable as problem:
            yield Skipped(where, str(problem))
            continue
        if isinstance(item, dict):
            yield _piece(where, text.encode(), item, _kind(item))
        else:
            yield Skipped(where, f"is no object but {text[:60]}")


def _split_lines_or_document(data: bytes, charset: str | None) -> Pieces:
    text = data.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"["):
        yield from _split_document(data, charset)
        return
    first, _, rest = text.partition(b"\n")
    if rest:
        try:
            _loads(first)
        except Unreadable:
            try:
                _loads(decoded(data, charset)[0])
            except Unreadable:
                pass  # lines, of which the first is damaged
            else:
                yield from _split_document(data, charset)
                return
    yield from split_lines(data.split(b"\n"))


# what a record says


def _parse(raw: bytes) -> Entry:
    return _of(_loads(raw))


def _of(value: dict[str, Any]) -> Entry:
    kind = _kind(value)
    if kind == "daily-papers":
        return _daily(value)
    return _scholar(value) if kind == "semantic-scholar" else _own(value)


def _text(value: dict[str, Any], *names: str) -> str:
    """The first of several fields that says something.

    Raises:
        Unreadable: it is no text.
    """
    for name in names:
        found = value.get(name)
        if found is None or found == "":
            continue
        if not isinstance(found, str):
            raise Unreadable(f"its {name} is no text but {json.dumps(found)[:60]}")
        return found
    return ""


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Unreadable(f"its {name} is no number but {json.dumps(value)[:60]}")
    return int(number) if number == int(number) else number


def _numbers(pairs: dict[str, Any]) -> dict[str, float]:
    return {name: number for name, value in pairs.items() if (number := _number(value, name)) is not None}


def _people(value: Any) -> list[str]:
    """Authors as objects with a name, or as plain text."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unreadable(f"its authors are no list but {json.dumps(value)[:60]}")
    found = []
    for person in value:
        name = person.get("name") if isinstance(person, dict) else person
        if isinstance(name, str):
            found.append(name)
        elif name is not None:
            raise Unreadable(f"an author is no text but {json.dumps(person)[:60]}")
    return found


def _inner(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _daily(value: dict[str, Any]) -> Entry:
    paper = value["paper"]
    name = _text(paper, "id")
    arxiv = arxiv_id(name)
    return entry_of(
        title=_text(paper, "title") or _text(value, "title"),
        abstract=_text(paper, "summary") or _text(value, "summary"),
        authors=_people(paper.get("authors")),
        arxiv=arxiv,
        published=plain_date(_text(paper, "publishedAt")),
        links={
            "page": f"https://huggingface.co/papers/{name}" if arxiv else "",
            "code": _text(paper, "githubRepo"),
            "project": _text(paper, "projectPage"),
        },
        # Likes are the paper's, comments the item's.
        signals=_numbers(
            {
                "upvotes": paper.get("upvotes"),
                "comments": value.get("numComments"),
                "stars": paper.get("githubStars"),
            }
        ),
        extra={
            "organization": _text(_inner(value, "organization") or _inner(paper, "organization"), "fullname", "name"),
            "daily id": "" if arxiv else name,
        },
    )


def _scholar(value: dict[str, Any]) -> Entry:
    if "error" in value and "title" not in value:
        raise Unreadable(f"is an error: {clean(str(value['error']))[:200]}")
    names = _inner(value, "externalIds")
    year = _number(value.get("year"), "year")
    fields = value.get("fieldsOfStudy")
    doi = doi_in(_text(names, "DOI"))
    return entry_of(
        title=_text(value, "title"),
        abstract=_text(value, "abstract"),
        authors=_people(value.get("authors")),
        arxiv=arxiv_id(_text(names, "ArXiv")),
        doi=doi,
        published=plain_date(_text(value, "publicationDate")) or (plain_date(str(year)) if year else None),
        venue=_text(value, "venue") or _text(_inner(value, "journal"), "name"),
        categories=[item for item in fields if isinstance(item, str)] if isinstance(fields, list) else (),
        links={"page": _text(value, "url"), "pdf": _text(_inner(value, "openAccessPdf"), "url")},
        signals=_numbers(
            {
                "citations": value.get("citationCount"),
                "influential citations": value.get("influentialCitationCount"),
            }
        ),
        extra={"semantic-scholar": _text(value, "paperId"), "tldr": _text(_inner(value, "tldr"), "text")},
    )


def _own(value: dict[str, Any]) -> Entry:
    """An entry, an entry with what the store adds to it, or a line of arXiv's own metadata dump."""
    entry = {**value, **_inner(value, "entry")}
    extra = {name: text for name, text in _inner(entry, "extra").items() if isinstance(text, str)}
    links, signals = _inner(entry, "links"), _inner(entry, "signals")
    authors, categories = entry.get("authors"), entry.get("categories")
    published = _text(entry, "published", "publishedAt", "date")
    when = plain_date(published)
    if published and when is None:
        extra["published"] = published
    if isinstance(authors, str):
        parsed = entry.get("authors_parsed")
        authors = _parsed_people(parsed) if isinstance(parsed, list) else [authors]
    versions = entry.get("versions")
    if when is None and isinstance(versions, list) and versions and isinstance(versions[0], dict):
        when = _mail_date(_text(versions[0], "created"))
    slug, doi = _text(entry, "slug"), _text(entry, "doi")
    found = doi_in(doi)
    if doi and found is None and arxiv_id(doi) is None:
        extra["doi"] = doi
    for name in ("comments", "report-no", "note", "tldr"):
        if isinstance(entry.get(name), str):
            extra[name] = entry[name]
    said = _text(entry, "arxiv")
    arxiv = arxiv_id(said)
    if said and arxiv is None:
        raise Unreadable(f"its arxiv is no arXiv id: {said[:60]!r}")
    return entry_of(
        title=_text(entry, "title"),
        abstract=_text(entry, "abstract", "summary"),
        authors=_people(authors),
        arxiv=arxiv or (arxiv_id(entry["id"]) if isinstance(entry.get("id"), str) else None),
        doi=found,
        slug=slug or None,
        published=when,
        updated=plain_date(_text(entry, "updated", "update_date")),
        venue=_text(entry, "venue", "journal-ref"),
        categories=_people(categories.split() if isinstance(categories, str) else categories),
        links={name: address for name, address in links.items() if isinstance(address, str)},
        signals=_numbers(signals),
        extra=extra,
    )


def _parsed_people(rows: list[Any]) -> list[str]:
    """arXiv's ``[family, given, suffix]``."""
    return [
        " ".join(part for part in (*row[1:2], *row[:1], *row[2:3]) if isinstance(part, str) and part)
        for row in rows
        if isinstance(row, list)
    ]


def _mail_date(text: str) -> str | None:
    try:
        return plain_date(parsedate_to_datetime(text).isoformat())
    except ValueError:
        return None


READERS: dict[str, tuple[Split, Parse]] = {
    "daily-papers": (_split_document, _parse),
    "semantic-scholar": (_split_document, _parse),
    "json-lines": (_split_lines_or_document, _parse),
}
