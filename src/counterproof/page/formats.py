"""Lists of papers in other programs' formats: Atom, JSON Feed, BibTeX, RIS, JSON lines.

What is written depends on the papers and the addresses alone, not on when it is written: a feed that says the same is
the same bytes. Texts and addresses of strangers are escaped; links other than http and https are left out.
"""

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlsplit

from counterproof.page.store import ENTRY_FIELDS, Entry, Listed, Store, compact

__all__ = ["FORMATS", "Format", "Place", "atom", "bibtex", "cite_key", "dump", "json_feed", "json_lines", "ris"]

ATOM = "http://www.w3.org/2005/Atom"
AUTHORITY = "counterproof.invalid,2026"
EPOCH = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class Place:
    """Where a list is to be found.

    Attributes:
        title: of the list.
        base: address of the site, such as ``https://papers.example``; empty: papers link to where they are published.
        page: path of the list for readers, from the base.
        feed: path of the feed itself.
        following: path of its next page; None on the last.
    """

    title: str
    base: str = ""
    page: str = "/"
    feed: str = "/feed.atom"
    following: str | None = None

    def address(self, path: str) -> str:
        return self.base.rstrip("/") + path

    def paper(self, paper: Listed) -> str:
        """Where a paper is read: on this site, else where it was published, else its tag."""
        if self.base:
            return self.address("/paper/" + quote(paper.path))
        return published_at(paper.entry) or tag(paper)


def tag(paper: Listed) -> str:
    """A paper's id in feeds (RFC 4151): the same wherever and whenever it is listed."""
    return f"tag:{AUTHORITY}:{quote(paper.key, safe=':/')}"


def published_at(entry: Entry) -> str | None:
    """The paper's own page."""
    if entry.arxiv:
        return f"https://arxiv.org/abs/{entry.arxiv}"
    if entry.doi:
        return f"https://doi.org/{quote(entry.doi, safe='/:;().-_')}"
    return safe_link(entry.links.get("page") or entry.links.get("pdf") or "")


def safe_link(address: str) -> str | None:
    """The address if it is http or https and nothing in it is odd; else None."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    plain = parts.scheme in ("http", "https") and parts.hostname and not re.search(r"[\s<>\"\\^`{|}\x00-\x1f]", address)
    return address if plain else None


def plain(text: str) -> str:
    """Text that XML 1.0 can hold, on one line."""
    text = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    return " ".join(text.split())


def _printable(text: str) -> str:
    """On one line, without control characters."""
    if not text.isprintable():
        text = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return " ".join(text.split())


def moment(said: str | None) -> str | None:
    """A year, a day or a time as RFC 3339 has it; None when it is none of these."""
    day, time = r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", r"(\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)"
    found = re.fullmatch(f"{day}(?:T{time})?", said or "")
    if found is None:
        return None
    return f"{found[1]}-{found[2] or '01'}-{found[3] or '01'}T{found[4] or '00:00:00'}{found[5] or 'Z'}"


def atom(papers: Sequence[Listed], place: Place) -> str:
    """An Atom feed (RFC 4287), paged as RFC 5005 says.

    An entry's ``updated`` is when what is said of the paper last changed; the feed's is the latest of them.
    """
    ET.register_namespace("", ATOM)
    feed = ET.Element(f"{{{ATOM}}}feed")

    def add(parent: ET.Element, name: str, text: str | None = None, **attributes: str) -> ET.Element:
        child = ET.SubElement(parent, f"{{{ATOM}}}{name}", attributes)
        child.text = None if text is None else plain(text)
        return child

    add(feed, "id", f"tag:{AUTHORITY}:list:{quote(_lasting(place.feed), safe='/:?=&%')}")
    add(feed, "title", place.title)
    add(feed, "updated", max((paper.changed for paper in papers), default=EPOCH))
    add(add(feed, "author"), "name", "Counterproof")
    add(feed, "generator", "Counterproof")
    if place.base:
        add(feed, "link", rel="self", type="application/atom+xml", href=place.address(place.feed))
        add(feed, "link", rel="alternate", type="text/html", href=place.address(place.page))
        if place.following is not None:
            add(feed, "link", rel="next", type="application/atom+xml", href=place.address(place.following))
    for paper in papers:
        said = paper.entry
        entry = add(feed, "entry")
        add(entry, "id", tag(paper))
        add(entry, "title", said.title, type="text")
        add(entry, "updated", paper.changed)
        published = moment(said.published)
        if published is not None:
            add(entry, "published", published)
        for name in said.authors:
            add(add(entry, "author"), "name", name)
        add(entry, "link", rel="alternate", href=place.paper(paper))
        own = published_at(said)
        if place.base and own is not None:
            add(entry, "link", rel="related", href=own)
        for category in said.categories:
            add(entry, "category", term=plain(category))
        add(entry, "summary", said.abstract or said.title, type="text")
    ET.indent(feed, " ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(feed, encoding="unicode") + "\n"


def _lasting(path: str) -> str:
    """A feed's path without what names the page of it."""
    before, _, query = path.partition("?")
    kept = "&".join(part for part in query.split("&") if part and not part.startswith("cursor="))
    return f"{before}?{kept}" if kept else before


def json_feed(papers: Sequence[Listed], place: Place) -> str:
    """A JSON Feed, version 1.1; what it has no word for is under ``_counterproof``."""
    feed: dict[str, Any] = {"version": "https://jsonfeed.org/version/1.1", "title": plain(place.title)}
    if place.base:
        feed |= {"home_page_url": place.address(place.page), "feed_url": place.address(place.feed)}
        if place.following is not None:
            feed["next_url"] = place.address(place.following)
    items = []
    for paper in papers:
        said = paper.entry
        item: dict[str, Any] = {"id": tag(paper), "url": place.paper(paper)}
        own = published_at(said)
        if place.base and own is not None:
            item["external_url"] = own
        item |= {"title": said.title, "content_text": said.abstract or said.title}
        published = moment(said.published)
        if published is not None:
            item["date_published"] = published
        item["date_modified"] = paper.changed
        if said.authors:
            item["authors"] = [{"name": name} for name in said.authors]
        if said.categories:
            item["tags"] = list(said.categories)
        item["_counterproof"] = {"key": paper.key, "day": paper.day, "signals": dict(said.signals)}
        items.append(item)
    return json.dumps(feed | {"items": items}, ensure_ascii=False, indent=1) + "\n"


# BibTeX


def cite_key(paper: Listed) -> str:
    """A BibTeX key that stays the same whatever changes in the entry: ``arxiv:2207.13085``."""
    clean = re.sub(r"[^A-Za-z0-9._:/+-]", "-", paper.key)
    return clean if clean == paper.key else f"{clean}-{hashlib.sha256(paper.key.encode()).hexdigest()[:6]}"


# A dollar that is a price is no mathematics: that has no space inside its dollars, and no digit behind them.
MATHS = re.compile(r"(?<!\\)\$(?=\S)((?:[^$\\]|\\.)+?)(?<=\S)\$(?!\d)")
TEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "#": r"\#",
        "_": r"\_",
        "$": r"\$",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "{": r"\textbraceleft{}",
        "}": r"\textbraceright{}",
    }
)


def tex(text: str) -> str:
    """Text for a BibTeX field: mathematics between dollars and TeX commands stay, what harms is escaped."""
    text = _printable(text)
    parts = []
    begin = 0
    for found in MATHS.finditer(text):
        if _balanced(found[1]):
            parts += [_tex_words(text[begin : found.start()]), found[0]]
            begin = found.end()
    return "".join([*parts, _tex_words(text[begin:])])


def _tex_words(text: str) -> str:
    if _balanced(text):
        # A command or an escaped letter, and braces, are TeX already.
        pieces = re.split(r"(\\(?:[A-Za-z]+|[&%#_$\"'`^~=.{} -])|[{}])", text)
        return "".join(piece if place % 2 else _escaped(piece) for place, piece in enumerate(pieces))
    return _escaped(text)


def _escaped(text: str) -> str:
    return text.translate(TEX)


def _balanced(text: str) -> bool:
    """Whether braces are paired as BibTeX counts them, and no backslash hides one."""
    if re.search(r"\\[{}]|\\$", text):
        return False
    depth = 0
    for letter in re.findall("[{}]", text):
        depth += 1 if letter == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def bibtex(papers: Iterable[Listed]) -> str:
    """BibTeX in UTF-8: ``@misc`` with eprint, archivePrefix and primaryClass for arXiv, ``@article`` where there is a
    venue."""
    entries = []
    for paper in papers:
        said = paper.entry
        fields = [("title", f"{{{tex(said.title)}}}")]  # a second pair of braces keeps capitals
        if said.authors:
            fields.append(("author", " and ".join(_bib_name(name) for name in said.authors)))
        date = re.match(r"(\d{4})(?:-(\d\d))?", said.published or "")
        if date is not None:
            fields.append(("year", date[1]))
            if date[2]:
                fields.append(("month", str(int(date[2]))))
        if said.venue:
            fields.append(("journal", tex(said.venue)))
        if said.arxiv:
            fields += [("eprint", said.arxiv), ("archivePrefix", "arXiv")]
            subject = next((c for c in said.categories if re.fullmatch(r"[a-z-]+(\.[A-Za-z-]+)?", c)), None)
            fields += [("primaryClass", subject)] if subject else []
        if said.doi:
            fields.append(("doi", _escaped_verbatim(said.doi)))
        own = published_at(said)
        if own is not None:
            fields.append(("url", _escaped_verbatim(own)))
        if said.abstract:
            fields.append(("abstract", tex(said.abstract)))
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields)
        entries.append(f"@{'article' if said.venue else 'misc'}{{{cite_key(paper)},\n{lines}\n}}\n")
    return "\n".join(entries)


def _bib_name(name: str) -> str:
    """An author; one that BibTeX would take apart (``The A and B Team``) in braces."""
    clean = tex(name)
    return f"{{{clean}}}" if re.search(r"\band\b|,.*,.*,", name, re.IGNORECASE) else clean


def _escaped_verbatim(address: str) -> str:
    """An address, in which only braces and backslashes can harm."""
    return re.sub(r"[{}\\\s%]", lambda found: "\\%" if found[0] == "%" else quote(found[0]), address)


# RIS


def ris(papers: Iterable[Listed]) -> str:
    """RIS, lines ended by CR LF; a preprint is ``UNPB``, what has a venue ``JOUR``."""
    lines: list[str] = []

    def add(name: str, value: str) -> None:
        clean = _printable(value)
        if clean:
            lines.append(f"{name}  - {clean}")

    for paper in papers:
        said = paper.entry
        add("TY", "JOUR" if said.venue else "UNPB")
        add("ID", paper.key)
        add("TI", said.title)
        for name in said.authors:
            add("AU", _family_first(name))
        date = re.match(r"(\d{4})(?:-(\d\d)-(\d\d))?", said.published or "")
        if date is not None:
            add("PY", date[1])
            if date[2]:
                add("DA", f"{date[1]}/{date[2]}/{date[3]}")
        add("JO", said.venue)
        add("AB", said.abstract)
        for category in said.categories:
            add("KW", category)
        add("DO", said.doi or (f"10.48550/arXiv.{said.arxiv}" if said.arxiv else ""))
        add("UR", published_at(said) or "")
        lines.append("ER  - ")
        lines.append("")
    return "".join(f"{line}\r\n" for line in lines)


def _family_first(name: str) -> str:
    """``Carion, Nicolas`` from ``Nicolas Carion``; a name with a comma, or of one word, as it is."""
    if "," in name or " " not in name:
        return name
    words = name.split()
    begin = len(words) - 1
    while begin > 1 and words[begin - 1][0].islower():  # van der Maaten
        begin -= 1
    return f"{' '.join(words[begin:])}, {' '.join(words[:begin])}"


# JSON lines


def _object(entry: Entry, **more: str | None) -> str:
    said = {name: getattr(entry, name) for name in ENTRY_FIELDS if getattr(entry, name)}
    return compact({name: value for name, value in more.items() if value} | said) + "\n"


def json_lines(papers: Iterable[Listed]) -> str:
    """A paper a line: key, day, and what is said of it by the entry's own names, as ``feed import`` reads it."""
    return "".join(_object(paper.entry, key=paper.key, day=paper.day) for paper in papers)


def dump(store: Store) -> Iterator[str]:
    """Every record of the store, a line each, in the order they came: imported into an empty store they make the same
    papers. Votes, hand-made merges and subscribers are not in it."""
    rows = store.db.execute("SELECT source, day, entry FROM records ORDER BY id")
    for row in rows:
        yield _object(Entry.from_json(row["entry"]), day=row["day"], source=row["source"])


@dataclass(frozen=True)
class Format:
    """A way to write a list: what it is called in a file's name and in HTTP, and what writes it."""

    suffix: str
    media_type: str
    write: Callable[[Sequence[Listed], Place], str]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "atom": Format("atom", "application/atom+xml; charset=utf-8", atom),
        "jsonfeed": Format("json", "application/feed+json; charset=utf-8", json_feed),
        "bibtex": Format("bib", "application/x-bibtex; charset=utf-8", lambda papers, place: bibtex(papers)),
        "ris": Format("ris", "application/x-research-info-systems; charset=utf-8", lambda papers, place: ris(papers)),
        "jsonl": Format("jsonl", "application/jsonl; charset=utf-8", lambda papers, place: json_lines(papers)),
    }
)
