"""Papers out of XML: arXiv's API and RSS, OAI-PMH, and any feed. No entity is expanded, nothing outside is fetched."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from io import BytesIO

from counterproof.errors import extra
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
from counterproof.page.store import Entry, arxiv_id

with extra("page"):
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

__all__ = ["READERS", "OaiAnswer", "oai_answer", "opensearch_total"]

Pieces = Iterator[Piece | Skipped | Note]
NAMES = {
    "a": "http://www.w3.org/2005/Atom",
    "arxiv": "http://arxiv.org/schemas/atom",
    "opensearch": "http://a9.com/-/spec/opensearch/1.1/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "oai": "http://www.openarchives.org/OAI/2.0/",
    "oai_dc": "http://www.openarchives.org/OAI/2.0/oai_dc/",
    "raw": "http://arxiv.org/OAI/arXiv/",
    "rss1": "http://purl.org/rss/1.0/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "content": "http://purl.org/rss/1.0/modules/content/",
    "prism": "http://prismstandard.org/namespaces/basic/2.0/",
}
for prefix in ("arxiv", "opensearch", "dc", "oai_dc", "rdf", "content", "prism"):
    ET.register_namespace(prefix, NAMES[prefix])
XML_BASE = "{http://www.w3.org/XML/1998/namespace}base"


def _local(tag: object) -> str:
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def _as_utf8(data: bytes, charset: str | None) -> tuple[bytes, str | None]:
    """The document as UTF-8 that says so, and what had to be guessed."""
    head = data[:200]
    said = re.search(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"']", head)
    own = said[1].decode() if said else None
    # What the document says of itself goes before what the server says, which is often a default.
    text, guessed = decoded(data, own or charset)
    text = re.sub(r"\A\ufeff?\s*<\?xml[^>]*\?>", "", text, count=1)
    return text.encode("utf-8", "replace"), guessed


def _elements(data: bytes, charset: str | None, wanted: frozenset[str]) -> Iterator[ET.Element | Skipped | Note]:
    """The elements of some names, one after the other, as far as the document can be read."""
    document, guessed = _as_utf8(data, charset)
    if guessed:
        yield Note("file", guessed)
    number, root, depth = 0, None, 0
    try:
        for event, element in iterparse(BytesIO(document), events=("start", "end"), forbid_entities=True):
            if event == "start":
                root = element if root is None else root
                depth += 1
                if depth > 200:
                    yield Broken("file", "its elements are nested more than 200 deep")
                    return
                continue
            depth -= 1
            if _local(element.tag) in wanted:
                number += 1
                yield element
                element.clear()
    except DefusedXmlException as problem:
        kind = type(problem).__name__
        yield Broken("file", f"declares entities of its own, which no list of papers needs; refused ({kind})")
    except ET.ParseError as problem:
        after = f" after record {number}" if number else ""
        yield Broken(f"line {problem.position[0]}", f"is no proper XML{after}: {problem}; the rest was not read")


def _split(form: str, *names: str) -> Split:
    wanted = frozenset(names)

    def split(data: bytes, charset: str | None) -> Pieces:
        number = 0
        for element in _elements(data, charset, wanted):
            if not isinstance(element, ET.Element):
                yield element
                continue
            number += 1
            where = f"record {number}"
            if form == "oai-pmh":
                yield _oai_piece(where, element)
                continue
            day = _announced(element) if form == "arxiv-rss" else None
            source = "arxiv" if form.startswith("arxiv") else None
            yield Piece(where, ET.tostring(element, encoding="utf-8"), form, day, source)

    return split


def _tree(raw: bytes) -> ET.Element:
    """
    Raises:
        Unreadable: no XML.
    """
    try:
        found: ET.Element | None = None
        for _, element in iterparse(BytesIO(raw), forbid_entities=True):
            found = element
        assert found is not None  # a document without an element is no proper one
        return found
    except (ET.ParseError, DefusedXmlException) as problem:
        raise Unreadable(f"is no proper XML: {problem}") from None


def _text(element: ET.Element, path: str) -> str:
    found = element.find(path, NAMES)
    return "".join(found.itertext()).strip() if found is not None else ""


def _texts(element: ET.Element, path: str) -> list[str]:
    return ["".join(found.itertext()).strip() for found in element.iterfind(path, NAMES)]


# arXiv


def _version(text: str) -> str:
    found = re.search(r"v(\d+)\s*$", text)
    return found[1] if found else ""


def _announced(item: ET.Element) -> str | None:
    return _mail_date(_text(item, "pubDate"), 10)


def _mail_date(text: str, length: int = 20) -> str | None:
    try:
        return (plain_date(parsedate_to_datetime(text).isoformat()) or "")[:length] or None
    except ValueError:
        return None


def _without_announcement(text: str) -> str:
    """The abstract of arXiv's daily feeds, which begin with id and type."""
    return re.sub(r"\A\s*arXiv:\S+\s+Announce Type:.*?\bAbstract:\s*", "", text, flags=re.DOTALL)


def _arxiv_atom(raw: bytes) -> Entry:
    entry = _tree(raw)
    name = _text(entry, "a:id")
    if "/api/errors" in name:
        raise Unreadable(f"is an error of arXiv's: {' '.join(_text(entry, 'a:summary').split())[:200]}")
    arxiv = arxiv_id(name)
    if arxiv is None:
        raise Unreadable(f"its id is no arXiv id: {name[:80]!r}")
    links = {"page": f"https://arxiv.org/abs/{arxiv}", "pdf": f"https://arxiv.org/pdf/{arxiv}"}
    primary = entry.find("arxiv:primary_category", NAMES)
    terms = [primary.get("term", "")] if primary is not None else []
    terms += [found.get("term", "") for found in entry.iterfind("a:category", NAMES)]
    authors = _texts(entry, "a:author/a:name")
    if not authors:
        authors = _people(_text(entry, "dc:creator"))
    doi = _text(entry, "arxiv:doi") or _text(entry, "arxiv:DOI")
    return entry_of(
        title=_text(entry, "a:title"),
        abstract=_without_announcement(_text(entry, "a:summary")),
        authors=authors,
        arxiv=arxiv,
        doi=doi_in(doi),
        published=plain_date(_text(entry, "a:published")),
        updated=plain_date(_text(entry, "a:updated")),
        venue=_text(entry, "arxiv:journal_ref") or _text(entry, "arxiv:journal_reference"),
        categories=dict.fromkeys(term for term in terms if term),
        links=links,
        extra={
            "version": _version(name),
            "comment": _text(entry, "arxiv:comment"),
            "announced as": _text(entry, "arxiv:announce_type"),
        },
    )


def _people(text: str) -> list[str]:
    return [name.strip() for name in re.split(r",\s*|\s+and\s+", text) if name.strip()]


def _arxiv_rss(raw: bytes) -> Entry:
    item = _tree(raw)
    name = _text(item, "guid") or _text(item, "link")
    arxiv = arxiv_id(name) or arxiv_id(_text(item, "link"))
    if arxiv is None:
        raise Unreadable(f"its guid is no arXiv id: {name[:80]!r}")
    return entry_of(
        title=_text(item, "title"),
        abstract=_without_announcement(_text(item, "description")),
        authors=_people(_text(item, "dc:creator")),
        arxiv=arxiv,
        doi=doi_in(_text(item, "arxiv:DOI")),
        # The feed's date is that of the announcement: of a new version too.
        venue=_text(item, "arxiv:journal_reference"),
        categories=_texts(item, "category"),
        links={"page": f"https://arxiv.org/abs/{arxiv}", "pdf": f"https://arxiv.org/pdf/{arxiv}"},
        extra={"version": _version(name), "announced as": _text(item, "arxiv:announce_type")},
    )


def opensearch_total(data: bytes) -> int | None:
    """How many results an answer says there are; None when it does not."""
    found = re.search(rb"<opensearch:totalResults[^>]*>\s*(\d{1,12})\s*<", data)
    return int(found[1]) if found else None


# OAI-PMH


@dataclass(frozen=True)
class OaiAnswer:
    """What an answer says beside its records: an error's code and text, the token of the next one, and its date."""

    error: str
    message: str
    token: str
    answered: str


def oai_answer(data: bytes) -> OaiAnswer:
    """Read an OAI-PMH answer's error, resumption token and date; empty where it has none."""
    error = message = token = answered = ""
    for element in _elements(data, None, frozenset({"error", "resumptionToken", "responseDate"})):
        if isinstance(element, ET.Element):
            text = "".join(element.itertext()).strip()
            name = _local(element.tag)
            if name == "error" and not error:
                error, message = element.get("code", "unknown"), text
            elif name == "resumptionToken":
                token = text
            elif name == "responseDate":
                answered = text
    return OaiAnswer(error, message, token, answered)


def _oai_piece(where: str, record: ET.Element) -> Piece | Skipped:
    name = _text(record, "oai:header/oai:identifier")
    header = record.find("oai:header", NAMES)
    if header is not None and header.get("status") == "deleted":
        stamp = _text(record, "oai:header/oai:datestamp")
        return Skipped(where, f"{name} was deleted there on {stamp}")
    source = "arxiv" if name.lower().startswith("oai:arxiv.org:") else None
    return Piece(f"{where} ({name})" if name else where, ET.tostring(record, encoding="utf-8"), "oai-pmh", None, source)


def _oai(raw: bytes) -> Entry:
    record = _tree(raw)
    metadata = record.find("oai:metadata", NAMES)
    if metadata is None or len(metadata) == 0:
        raise Unreadable("has no metadata")
    inner = metadata[0]
    if _local(inner.tag) in ("arXiv", "arXivRaw"):
        return _oai_arxiv(inner)
    if _local(inner.tag) == "dc":
        return _dublin_core(inner, _text(record, "oai:header/oai:identifier"))
    raise Unreadable(f"its metadata are <{_local(inner.tag)}>; arXiv and oai_dc are read")


def _oai_arxiv(inner: ET.Element) -> Entry:
    def text(name: str) -> str:
        return _text(inner, f"{{*}}{name}")

    arxiv = arxiv_id(text("id"))
    if arxiv is None:
        raise Unreadable(f"its id is no arXiv id: {text('id')[:80]!r}")
    people = [
        " ".join(part for part in (_text(who, f"{{*}}{name}") for name in ("forenames", "keyname", "suffix")) if part)
        for who in inner.iterfind("{*}authors/{*}author")
    ]
    return entry_of(
        title=text("title"),
        abstract=text("abstract"),
        authors=people or _people(text("authors")),
        arxiv=arxiv,
        doi=doi_in(text("doi")),
        published=plain_date(text("created")),
        updated=plain_date(text("updated")),
        venue=text("journal-ref"),
        categories=text("categories").split(),
        links={"page": f"https://arxiv.org/abs/{arxiv}", "pdf": f"https://arxiv.org/pdf/{arxiv}"},
        extra={"comment": text("comments"), "license": text("license")},
    )


def _dublin_core(inner: ET.Element, name: str) -> Entry:
    def texts(field: str) -> list[str]:
        return [text for text in _texts(inner, f"dc:{field}") if text]

    identifiers = [*texts("identifier"), *texts("relation")]
    arxiv = next((found for text in [name, *identifiers] if (found := arxiv_id(text))), None)
    doi = next((found for text in texts("identifier") if (found := doi_in(text)) and not arxiv_id(found)), None)
    page = next((text for text in identifiers if re.match(r"https?://", text)), "")
    # An abstract is a description; so are remarks, which are shorter.
    descriptions = texts("description")
    dates = sorted(found for text in texts("date") if (found := plain_date(text)))
    return entry_of(
        title=next(iter(texts("title")), ""),
        abstract=max(descriptions, key=len, default=""),
        authors=[_turned(who) for who in texts("creator")],
        arxiv=arxiv,
        doi=doi,
        published=dates[0] if dates else None,
        updated=dates[-1] if len(dates) > 1 else None,
        venue=next(iter(texts("source")), ""),
        categories=texts("subject"),
        links={"page": page},
        extra={"oai": "" if arxiv else name},
    )


def _turned(name: str) -> str:
    """``Carion, Nicolas`` as ``Nicolas Carion``."""
    family, comma, given = name.partition(",")
    return f"{given.strip()} {family.strip()}" if comma and "," not in given else name


# any feed


class _Words(HTMLParser):
    """The text of HTML."""

    SILENT = frozenset({"script", "style", "head", "template"})
    BREAKS = frozenset({"p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "td"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.silent += tag in self.SILENT
        if tag in self.BREAKS:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        if tag in self.BREAKS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def _plain(html: str, kind: str = "text/html") -> str:
    """What a title or a summary says, without its markup; ``a < b`` in plain text stays."""
    if kind == "text/plain" or not re.search(r"<[a-zA-Z/!]|&[a-zA-Z#]", html):
        return html
    words = _Words()
    words.feed(html)
    words.close()
    return "".join(words.parts)


def _split_feed(data: bytes, charset: str | None) -> Pieces:
    """Each entry in a feed of its own, so that it can be read alone; a feed that is no proper XML as a whole."""
    number, broken = 0, None
    for found in _elements(data, charset, frozenset({"item", "entry"})):
        if isinstance(found, Broken):
            broken = found
        elif isinstance(found, ET.Element):
            number += 1
            yield Piece(f"record {number}", _alone(found), "feed")
        else:
            yield found
    if broken is None:
        return
    if "entities" in broken.reason or b"<!ENTITY" in data:
        yield broken
        return
    # Feeds are often written carelessly; feedparser reads those too, but not record by record.
    rest = _leniently(data)
    yield Note(broken.where, f"{broken.reason.split(';')[0]}; read leniently, {len(rest)} records")
    for place, raw in enumerate(rest, 1):
        if place > number:
            yield Piece(f"record {place}", raw, "feed")


def _bytes(element: ET.Element) -> bytes:
    written: bytes = ET.tostring(element, encoding="utf-8")
    return written


def _alone(element: ET.Element) -> bytes:
    tag = element.tag if isinstance(element.tag, str) else ""
    if tag.startswith(f"{{{NAMES['a']}}}") or _local(tag) == "entry":
        outer = ET.Element(f"{{{NAMES['a']}}}feed")
    elif tag.startswith(f"{{{NAMES['rss1']}}}"):
        outer = ET.Element(f"{{{NAMES['rdf']}}}RDF")
    else:
        root = ET.Element("rss", version="2.0")
        outer = ET.SubElement(root, "channel")
        outer.append(element)
        return _bytes(root)
    outer.append(element)
    return _bytes(outer)


def _leniently(data: bytes) -> list[bytes]:
    with extra("page"):
        import feedparser
    found = []
    for item in feedparser.parse(data, sanitize_html=False, resolve_relative_uris=False).entries:
        root = ET.Element("rss", version="2.0")
        element = ET.SubElement(ET.SubElement(root, "channel"), "item")
        for name, value in (
            ("title", item.get("title")),
            ("link", item.get("link")),
            ("guid", item.get("id")),
            ("description", item.get("summary")),
            (f"{{{NAMES['dc']}}}creator", ", ".join(who.get("name", "") for who in item.get("authors", ()))),
            ("pubDate", item.get("published")),
        ):
            if value:
                ET.SubElement(element, name).text = clean(value)
        for tag in item.get("tags", ()):
            if tag.get("term"):
                ET.SubElement(element, "category").text = clean(tag["term"])
        found.append(ET.tostring(root, encoding="utf-8"))
    return found


def _feed(raw: bytes) -> Entry:
    with extra("page"):
        import feedparser
    # Its own sanitising is for showing HTML; here only words are taken.
    parsed = feedparser.parse(BytesIO(raw), sanitize_html=False, resolve_relative_uris=False)
    if len(parsed.entries) != 1:
        raise Unreadable("is no entry of a feed")
    item = parsed.entries[0]
    bodies = [item.get("summary_detail") or {}, *item.get("content", ())]
    texts = [_plain(body.get("value") or "", body.get("type") or "text/html") for body in bodies]
    title = item.get("title_detail") or {}
    link, name = item.get("link") or "", item.get("id") or ""
    people = [who.get("name") or "" for who in item.get("authors", ())]
    if len(people) == 1:
        people = _people(people[0])
    doi = doi_in(item.get("prism_doi") or "") or doi_in(item.get("dc_identifier") or "") or doi_in(name) or doi_in(link)
    arxiv = arxiv_id(name) or arxiv_id(link)
    if doi is not None:
        arxiv = arxiv or arxiv_id(doi)
    when = {}
    for field in ("published", "updated"):
        # Asked for one that is not there, feedparser gives the other.
        moment = item.get(f"{field}_parsed") if dict.__contains__(item, f"{field}_parsed") else None
        if moment is not None:
            when[field] = plain_date("{:04d}-{:02d}-{:02d}T{:02d}:{:02d}:{:02d}Z".format(*moment[:6]))
        else:
            when[field] = None
    web = link if re.match(r"https?://", link) else ""
    return entry_of(
        title=_plain(title.get("value") or "", title.get("type") or "text/html"),
        abstract=max(texts, key=len, default=""),
        authors=people,
        arxiv=arxiv,
        doi=None if doi and arxiv_id(doi) else doi,
        published=when["published"] or when["updated"],
        updated=when["updated"],
        venue=item.get("prism_publicationname") or "",
        categories=dict.fromkeys(tag.get("term") or "" for tag in item.get("tags", ())),
        links={"page": web},
        extra={"guid": name if name != link else ""},
    )


READERS: dict[str, tuple[Split, Parse]] = {
    "arxiv-atom": (_split("arxiv-atom", "entry"), _arxiv_atom),
    "arxiv-rss": (_split("arxiv-rss", "item"), _arxiv_rss),
    "oai-pmh": (_split("oai-pmh", "record"), _oai),
    "feed": (_split_feed, _feed),
}
