"""Papers out of text: BibTeX, RIS, and a page of titles and abstracts as people save them."""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from itertools import pairwise

from counterproof.page.bibtex_text import fields_of, names_of, unlatex
from counterproof.page.bibtex_text import split as split_bibtex
from counterproof.page.readers import (
    Note,
    Parse,
    Piece,
    Skipped,
    Split,
    Unreadable,
    clean,
    cut,
    doi_in,
    entry_of,
    lines_of,
    plain_date,
)
from counterproof.page.store import Entry, arxiv_id

__all__ = ["READERS"]

Pieces = Iterator[Piece | Skipped | Note]
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def _month(text: str) -> int | None:
    text = text.strip().lower()
    if text.isdigit():
        return int(text) if 1 <= int(text) <= 12 else None
    return MONTHS.index(text[:3]) + 1 if text[:3] in MONTHS else None


# BibTeX


def _bibtex(raw: bytes) -> Entry:
    key, fields = fields_of(raw)
    text = {name: unlatex(value) for name, value in fields.items() if name not in ("doi", "url", "eprint", "file")}
    eprint = fields.get("eprint", "").strip()
    kind = (fields.get("archiveprefix") or fields.get("eprinttype") or "arxiv").strip().lower()
    address = re.sub(r"\\url\{([^}]*)\}", r"\1", fields.get("url", "")).strip().replace(r"\_", "_").replace(r"\%", "%")
    mention = re.search(r"arxiv[:.\s]+(\S+)", " ".join((text.get("journal", ""), text.get("note", ""))), re.IGNORECASE)
    arxiv = (arxiv_id(eprint) if kind == "arxiv" else None) or arxiv_id(address)
    if arxiv is None and mention is not None:
        arxiv = arxiv_id(mention[1].strip(".,;[]()"))
    doi = doi_in(fields.get("doi", "").replace(r"\_", "_"))
    return entry_of(
        title=text.get("title", ""),
        abstract=text.get("abstract", ""),
        authors=[name for name in names_of(fields.get("author") or fields.get("editor", "")) if name != "others"],
        arxiv=arxiv,
        doi=doi,
        published=_bibtex_date(text),
        venue=text.get("journal") or text.get("journaltitle") or text.get("booktitle") or "",
        categories=[
            *fields.get("primaryclass", "").split(),
            *(word.strip() for word in re.split(r"[;,]", text.get("keywords", ""))),
        ],
        links={"page": address} if re.match(r"https?://", address) else {},
        extra={
            "bibtex key": key,
            "note": text.get("note", ""),
            "doi": "" if doi else fields.get("doi", ""),
        },
    )


def _bibtex_date(text: Mapping[str, str]) -> str | None:
    for name in ("date", "year"):
        said = text.get(name, "").strip()
        if whole := plain_date(said):
            if len(whole) == 4 and (month := _month(text.get("month", ""))):
                day = text.get("day", "1").strip()
                return plain_date(f"{whole}-{month:02d}-{int(day) if day.isdigit() else 1:02d}") or whole
            return whole
        if match := re.search(r"\b((?:1[5-9]|2[01])\d\d)(?:-(\d\d))?\b", said):
            return plain_date(f"{match[1]}-{match[2]}-01") if match[2] else match[1]
    return None


# RIS

RIS_LINE = re.compile(r"([A-Z][A-Z0-9]) {1,2}-(?: (.*))?\Z")


def _split_ris(data: bytes, charset: str | None) -> Pieces:
    lines, guessed = lines_of(data, charset)
    if guessed:
        yield Note("file", guessed)
    record: list[str] = []
    began = 0
    for number, line in enumerate([*lines, "TY  - END"], 1):
        found = RIS_LINE.match(line.rstrip())
        tag = found[1] if found else None
        if tag == "TY":
            if record:
                end = "the next begins" if number <= len(lines) else "the file ends"
                yield Note(f"line {began}", f"the record has no ER line before {end}")
                yield Piece(f"line {began}", "\n".join(record).encode("utf-8", "replace"), "ris")
            record, began = [line], number
        elif record and tag == "ER":
            yield Piece(f"line {began}", "\n".join([*record, line]).encode("utf-8", "replace"), "ris")
            record = []
        elif record:
            record.append(line)
        elif line.strip():
            yield Skipped(f"line {number}", f"outside of a record: {cut(line)}")


def _ris(raw: bytes) -> Entry:
    fields: dict[str, list[str]] = {}
    last: list[str] | None = None
    for line in raw.decode().split("\n"):
        found = RIS_LINE.match(line.rstrip())
        if found is not None:
            last = fields.setdefault(found[1], [])
            last.append((found[2] or "").strip())
        elif last and line.strip():
            last[-1] += f" {line.strip()}"  # a long value goes on in the next line

    def first(*tags: str) -> str:
        return next((value for tag in tags for value in fields.get(tag, ()) if value), "")

    def every(*tags: str) -> list[str]:
        return [value for tag in tags for value in fields.get(tag, ()) if value]

    addresses = every("UR", "LK", "L2", "L1")
    doi = doi_in(first("DO")) or next(filter(None, map(doi_in, addresses)), None)
    ids = [*addresses, *every("DO", "AN", "ID", "M1", "C1", "SP", "T2", "JO")]
    arxiv = next(filter(None, (arxiv_id(text) for text in ids if "arxiv" in text.lower())), None)
    return entry_of(
        title=first("TI", "T1", "CT"),
        abstract=first("AB", "N2"),
        authors=[_given_first(name) for name in every("AU", "A1")],
        arxiv=arxiv,
        doi=doi,
        published=_ris_date(first("DA", "Y1")) or _ris_date(first("PY", "Y1")),
        venue=first("JO", "JF", "T2", "JA", "BT"),
        categories=every("KW"),
        links={
            "page": next((text for text in addresses if re.match(r"https?://", text)), ""),
            "pdf": next((text for text in every("L1") if re.match(r"https?://", text)), ""),
        },
        extra={"note": first("N1"), "doi": first("DO") if not doi else ""},
    )


def _given_first(name: str) -> str:
    parts = [part.strip() for part in name.split(",")]
    return " ".join([*parts[1:2], parts[0], *parts[2:]]).strip()


def _ris_date(text: str) -> str | None:
    """``2020/05/26/note``, of which everything after the year may be missing."""
    year, month, day = [*text.replace("-", "/").split("/"), "", ""][:3]
    if plain_date(year.strip()) is None:
        return None
    if number := _month(month) if month.strip() else None:
        return plain_date(f"{year.strip()}-{number:02d}-{int(day) if day.strip().isdigit() else 1:02d}") or year.strip()
    return year.strip()


# a page saved as plain text

BANNER = re.compile(
    r"get trending papers|in your (?:e?mail )?inbox|\bby ak and the\b|\bdaily papers\b|^submitted by\b|"
    r"^(?:published|posted) on\b|^\W*\d[\d.,k]*\W*(?:upvotes?|comments?|likes?|authors?|replies|stars?)\b|"
    r"^(?:upvotes?|subscribe|sign up|log ?in|cookies?|privacy(?: policy)?|terms(?: of (?:use|service))?|papers|models|"
    r"datasets|spaces|docs|pricing|previous|next|today|daily|weekly|monthly|trending(?: papers)?|abstract|new|search|"
    r"view (?:on )?(?:arxiv|pdf)(?: page)?)\b\W*$",
    re.IGNORECASE,
)
DATES = (
    re.compile(r"(?P<y>20\d\d|19\d\d)-(?P<n>\d\d?)-(?P<d>\d\d?)"),
    re.compile(r"(?P<m>[A-Za-z]{3,9})\.? (?P<d>\d\d?)(?:st|nd|rd|th)?,? (?P<y>20\d\d|19\d\d)"),
    re.compile(r"(?P<d>\d\d?)(?:st|nd|rd|th)?\.? (?P<m>[A-Za-z]{3,9})\.?,? (?P<y>20\d\d|19\d\d)"),
)
ABSTRACT = 240  # letters from which on a block is an abstract whatever it looks like


def _date_line(text: str) -> str | None:
    """The day that a line is about, when it is about nothing else."""
    for form in DATES:
        found = form.search(text)
        if found is None:
            continue
        rest = re.sub(r"(?i)\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b", "", text.replace(found[0], ""))
        if len(re.sub(r"(?i)\b(?:papers?|of|for|the|daily|published|posted|on|date)\b|\W", "", rest)) > 3:
            continue
        parts = found.groupdict()
        month = int(parts["n"]) if parts.get("n") else _month(parts["m"])
        try:
            return date(int(parts["y"]), month or 0, int(parts["d"])).isoformat()
        except ValueError:
            continue
    return None


def _is_abstract(text: str) -> bool:
    """By length and punctuation: a title is short and seldom ends a sentence."""
    if len(text) >= ABSTRACT:
        return True
    sentences = len(re.findall(r"[.!?](?:\s+[A-Z]|\s*\Z)", text))
    return len(text.split()) >= 12 and (sentences >= 2 or text.rstrip().endswith("."))


def _is_banner(text: str) -> bool:
    bare = re.sub(r"[\W\d_]+", "", text)
    return len(bare) < 3 or (len(text) < 120 and BANNER.search(text) is not None)


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Lines between blank ones; a line of a block that is no part of a paper is a block of its own."""
    block: list[str] = []
    began = 1
    for number, line in enumerate([*lines, ""], 1):
        text = " ".join(clean(line).split())
        alone = bool(text) and (_is_banner(text) or _date_line(text) is not None or _only_id(text) is not None)
        if block and (not text or alone):
            yield began, block
            block = []
        if alone:
            yield number, [text]
        elif text:
            if not block:
                began = number
            block.append(text)


def _only_id(text: str) -> str | None:
    """The arXiv id of a line that is one, or an address of one."""
    return arxiv_id(text) if " " not in text.replace("arXiv: ", "arXiv:") else None


def _divided(block: list[str], waiting: bool) -> list[str]:
    """A block's title and abstract, where they are not apart by a blank line.

    The lines of a wrapped paragraph end where the next word does not fit; a title ends before, or goes beyond, or is
    written With Capitals. After a title that is `waiting` for its abstract, it takes both to be another.
    """
    whole = " ".join(block)
    if len(block) == 1 or not _is_abstract(whole):
        return [whole]
    for size in range(1, min(3, len(block) - 1) + 1):
        title, rest = block[:size], block[size:]
        width = max(map(len, rest))
        if not all(_is_full(line, after, width) for line, after in pairwise(rest)):
            continue
        ends = len(title[-1]) > width or not _is_full(title[-1], rest[0], width)
        capitals = _capitals(" ".join(title)) > 0.6 and _capitals(rest[0]) < 0.5
        text = " ".join(title)
        good = len(text) <= 250 and not text.endswith((".", ",", ";", "-"))
        seems = ends and capitals if waiting else ends or capitals
        if seems and good and _is_abstract(" ".join(rest)):
            return [text, " ".join(rest)]
    return [whole]


def _is_full(line: str, after: str, width: int) -> bool:
    """Whether the first word of the next line would not have fitted on a line; a word may be broken at a hyphen."""
    return len(line) + 1 + len(re.split(r"(?<=-)|\s", after, maxsplit=1)[0]) > width


def _capitals(text: str) -> float:
    """The share of words of four letters and more that begin with a capital."""
    words: list[str] = re.findall(r"\b[^\W\d_]{4,}", text)
    return sum(word[0].isupper() for word in words) / max(1, len(words))


def _split_text(data: bytes, charset: str | None) -> Pieces:
    lines, guessed = lines_of(data, charset)
    if guessed:
        yield Note("file", guessed)
    day: str | None = None
    title: tuple[int, str] | None = None  # one that has no abstract yet
    paper: tuple[int, list[str], list[str]] | None = None  # line; title and abstracts; ids
    begun = False

    def finished(paper: tuple[int, list[str], list[str]]) -> Piece:
        where, parts, ids = paper
        body = "\n\n".join([parts[0], " ".join(parts[1:]), *(f"arXiv:{name}" for name in ids[:1])])
        return Piece(f"line {where}", body.encode("utf-8", "replace"), "text", day)

    for number, block in _blocks(lines):
        whole = " ".join(block)
        name = _only_id(whole)
        if name is not None and (paper or title):
            if title is not None:
                paper = (title[0], [title[1]], [])
                title = None
            assert paper is not None
            if paper[2]:
                yield Skipped(f"line {number}", f"a second arXiv id of one paper: {whole}")
            else:
                paper[2].append(name)
            continue
        found = _date_line(whole) if len(block) == 1 else None
        if found is not None or _is_banner(whole):
            if paper is not None:
                yield finished(paper)
                paper = None
            if title is not None and begun:
                yield finished((title[0], [title[1]], []))
            elif title is not None:
                yield Skipped(f"line {title[0]}", f"before the first paper: {cut(title[1])}")
            title = None
            if found is not None:
                yield Skipped(f"line {number}", f"the day: {found}")
                day, begun = found, True
            else:
                yield Skipped(f"line {number}", f"no part of a paper: {cut(whole)}")
            continue
        for part in _divided(block, title is not None):
            if not _is_abstract(part):
                if paper is not None:
                    yield finished(paper)
                    paper = None
                if title is not None and begun:
                    yield finished((title[0], [title[1]], []))
                elif title is not None:
                    yield Skipped(f"line {title[0]}", f"before the first paper: {cut(title[1])}")
                title = (number, part)
            elif title is not None:
                paper, title, begun = (title[0], [title[1], part], []), None, True
            elif paper is not None:
                yield Note(f"line {number}", "a second paragraph; taken as part of the abstract before it")
                paper[1].append(part)
            else:
                yield Skipped(f"line {number}", f"an abstract without a title: {cut(part)}")
    if paper is not None:
        yield finished(paper)
    if title is not None:
        if begun:
            yield finished((title[0], [title[1]], []))
        else:
            yield Skipped(f"line {title[0]}", f"a title without an abstract, and nothing else: {cut(title[1])}")


def _text_record(raw: bytes) -> Entry:
    title, _, rest = raw.decode().partition("\n\n")
    abstract, _, name = rest.partition("\n\n")
    if len(title) > 300:
        raise Unreadable(f"its title has {len(title)} letters; is it one?")
    return entry_of(title=title, abstract=abstract, arxiv=arxiv_id(name))


READERS: dict[str, tuple[Split, Parse]] = {
    "bibtex": (split_bibtex, _bibtex),
    "ris": (_split_ris, _ris),
    "text": (_split_text, _text_record),
}
