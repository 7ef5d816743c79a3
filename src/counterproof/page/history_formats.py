"""A history from and to other programs: BibTeX and CSL-JSON in; BibTeX, JSON, GraphML and CSV out; YAML for editing."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import yaml

from counterproof.errors import UserError
from counterproof.page.bibtex_text import fields_of, names_of, unlatex
from counterproof.page.bibtex_text import split as split_bibtex
from counterproof.page.formats import TEX
from counterproof.page.history_data import KINDS, Edge, Event, Place, Records, Source, Work, read_when
from counterproof.page.readers import Piece, Skipped
from counterproof.page.store import arxiv_id

if TYPE_CHECKING:
    from counterproof.page.history_data import Milestone

__all__ = [
    "from_bibtex",
    "from_csl",
    "import_bibliography",
    "to_bibtex",
    "to_csv",
    "to_graphml",
    "to_json",
    "to_yaml",
]

# --- BibTeX and CSL-JSON in -------------------------------------------------------------------------------------------

VENUES = ("journal", "booktitle", "journaltitle", "publisher", "school", "institution", "howpublished")
KNOWN = {"author", "title", "year", "date", "doi", "eprint", "url", "editor", *VENUES}


def import_bibliography(path: Path, kind: str = "theory") -> Records:
    """Read a bibliography as events, one for each entry, with the entry as its source.

    The text is left empty, to be said in one's own words, and there are no edges: `lint` names what is left to do.

    Args:
        path: a ``.bib`` file, or a ``.json`` file in CSL-JSON as Zotero exports it.
        kind: of all events; one of `KINDS`.

    Raises:
        UserError: a file that cannot be read, an entry without title or year, a key given twice; with file and line.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; kinds: {', '.join(KINDS)}")
    readers = {".bib": from_bibtex, ".bibtex": from_bibtex, ".json": from_csl}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a .bib or .json (CSL-JSON) file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    works = readers[path.suffix.lower()](text, str(path))
    events, ids = [], set()
    for work in works:
        if work.year is None:
            raise UserError(f"{work.place}: the entry {work.key} has no year")
        plain = unicodedata.normalize("NFKD", work.key).encode("ascii", "ignore").decode().lower()
        name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "entry"
        if name in ids:
            raise UserError(f"{work.place}: the keys of two entries both make the id {name!r}; rename one")
        ids.add(name)
        events.append(
            Event(
                id=name,
                when=read_when(work.year),
                title=work.title,
                kind=kind,
                people=tuple(one for one in work.authors if one != "others"),
                sources=(Source(work.key, "the work itself"),),
                place=work.place,
            )
        )
    return Records(events=tuple(events), works=tuple(works), files=(str(path),))


def from_bibtex(text: str, name: str = "BibTeX") -> list[Work]:
    """The entries of a BibTeX file; accents become letters, braces fall, names become "First Last".

    Raises:
        UserError: with file and line, what is not BibTeX; an entry without title, or a key given twice.
    """
    works: list[Work] = []
    for piece in split_bibtex(text.encode("utf-8", "replace"), None):
        place = Place(name, int(re.sub(r"line (\d+).*", r"\1", piece.where)))
        if isinstance(piece, Skipped) and piece.reason.startswith("outside of an entry") and "@" not in piece.reason:
            continue  # where BibTeX, too, reads nothing
        if not isinstance(piece, Piece):
            raise UserError(f"{place}: {piece.reason if isinstance(piece, Skipped) else piece.text}")
        works.append(_work(*fields_of(piece.raw), place))
    return works


def _work(key: str, fields: Mapping[str, str], place: Place) -> Work:
    if not re.fullmatch(r"[^\s,{}()=\"#%~\\]+", key):
        raise UserError(f"{place}: an entry begins with its key")
    plain = {label: " ".join(unlatex(value).split()) for label, value in fields.items()}
    if not plain.get("title"):
        raise UserError(f"{place}: the entry {key} has no title")
    eprint = fields.get("eprint", "").strip()
    arxiv = arxiv_id(eprint) or ""
    year = re.search(r"\b\d{3,4}\b", plain.get("year") or plain.get("date", ""))
    kept = {label for label in fields if label not in KNOWN or (label == "eprint" and not arxiv)}
    return Work(
        key=key,
        title=plain["title"],
        year=int(year[0]) if year else None,
        authors=tuple(names_of(fields.get("author") or fields.get("editor", ""))),
        venue=next((plain[label] for label in VENUES if plain.get(label)), ""),
        doi=re.sub(r"^https?://(?:dx\.)?doi\.org/", "", fields.get("doi", "").strip()).replace("\\_", "_"),
        arxiv=arxiv,
        url=fields.get("url", "").strip().replace("\\_", "_").replace("\\%", "%"),
        fields={label: plain[label] for label in fields if label in kept},
        place=place,
    )


def from_csl(text: str, name: str = "CSL-JSON") -> list[Work]:
    """The items of a CSL-JSON file, as Zotero exports them.

    Raises:
        UserError: what is not CSL-JSON, an item without id or title, an id given twice; with file and item.
    """
    try:
        items = json.loads(text)
    except json.JSONDecodeError as problem:
        raise UserError(f"{name}:{problem.lineno}: not JSON: {problem.msg}") from None
    if isinstance(items, dict) and isinstance(items.get("items"), list):
        items = items["items"]
    if not isinstance(items, list):
        raise UserError(f"{name}:1: CSL-JSON is a list of items")
    found: dict[str, Work] = {}
    for number, item in enumerate(items, 1):
        where = f"{name}: item {number}"
        if not isinstance(item, dict) or not item.get("id") or not isinstance(item.get("title"), str):
            raise UserError(f"{where} is no mapping with id and title")
        key = re.sub(r"[\s,{}()=\"#%~\\]+", "-", str(item.get("citation-key") or item["id"])).strip("-")
        if key in found:
            raise UserError(f"{where}: the id {key!r} is given twice")
        try:
            authors = tuple(_csl_person(one) for one in item.get("author", []))
            dates = (item.get("issued") or {}).get("date-parts") or [[None]]
            year = int(dates[0][0]) if dates[0] and dates[0][0] is not None else None
        except (TypeError, ValueError, AttributeError, IndexError, KeyError):
            raise UserError(f"{where} ({key}): author or issued is not as CSL-JSON has it") from None
        found[key] = Work(
            key=key,
            title=" ".join(item["title"].split()),
            year=year,
            authors=authors,
            venue=str(item.get("container-title") or item.get("publisher") or ""),
            doi=str(item.get("DOI") or ""),
            url=str(item.get("URL") or ""),
            place=Place(name, _line_of(text, str(item["id"]))),
        )
    return list(found.values())


def _csl_person(one: Mapping[str, str]) -> str:
    if "literal" in one:
        return str(one["literal"])
    particle = one.get("non-dropping-particle") or one.get("dropping-particle") or ""
    parts = (one.get("given", ""), particle, one["family"], one.get("suffix", ""))
    return " ".join(part for part in parts if part)


def _line_of(text: str, identity: str) -> int:
    at = text.find(json.dumps(identity, ensure_ascii=False))
    return text.count("\n", 0, max(at, 0)) + 1


# --- Out --------------------------------------------------------------------------------------------------------------


def to_bibtex(works: Iterable[Work]) -> str:
    """BibTeX entries, in UTF-8; titles in double braces, so that no style changes their capitals."""
    entries = []
    for work in works:
        kind = "article" if work.venue and not work.arxiv else "misc"
        lines = [f"@{kind}{{{work.key},"]
        if work.authors:
            lines.append(f"  author = {{{' and '.join(_author(one) for one in work.authors)}}},")
        lines.append(f"  title = {{{{{_escape(work.title)}}}}},")
        if work.year is not None:
            lines.append(f"  year = {{{work.year}}},")
        if work.venue:
            lines.append(f"  {'journal' if kind == 'article' else 'howpublished'} = {{{_escape(work.venue)}}},")
        if work.doi:
            lines.append(f"  doi = {{{work.doi}}},")
        if work.arxiv:
            lines += [f"  eprint = {{{work.arxiv}}},", "  archiveprefix = {arXiv},"]
        if work.url:
            lines.append(f"  url = {{{work.url}}},")
        for name, value in work.fields.items():
            if name not in ("archiveprefix", "eprinttype"):
                lines.append(f"  {name} = {{{_escape(value)}}},")
        entries.append("\n".join([*lines, "}"]))
    return "\n\n".join(entries) + ("\n" if entries else "")


def _escape(text: str) -> str:
    """Plain text for LaTeX: its signs escaped, and nothing made of two that stand together."""
    return "{}".join(part.translate(TEX) for part in re.split(r"(?<=[-`'<>,?!])(?=[-`'<>,])", text))


def _author(name: str) -> str:
    """A name that holds "and" or a comma is kept together by braces."""
    text = _escape(name)
    return f"{{{text}}}" if re.search(r"\band\b|,", name) else text


def to_json(
    events: Mapping[str, Event], edges: Sequence[Edge], works: Mapping[str, Work], milestones: "Sequence[Milestone]"
) -> dict[str, Any]:
    """Everything as JSON values."""

    def where(place: Place) -> str:
        return str(place)

    return {
        "events": [
            {
                **{k: v for k, v in asdict(event).items() if k not in ("when", "place")},
                "year": event.when.start,
                "year_end": event.when.end,
                "circa": event.when.circa,
                "year_text": event.when.text,
                "status": event.status,
                "disputes": [
                    {"question": dispute.question, "sides": [asdict(side) for side in dispute.sides]}
                    for dispute in event.disputes
                ],
                "place": where(event.place),
            }
            for event in events.values()
        ],
        "edges": [{**asdict(edge), "place": where(edge.place)} for edge in edges],
        "works": [{**asdict(work), "place": where(work.place), "address": work.address} for work in works.values()],
        "milestones": [asdict(one) for one in milestones],
    }


GRAPHML = "http://graphml.graphdrawing.org/xmlns"


def to_graphml(events: Mapping[str, Event], edges: Sequence[tuple[str, str, float, float, str]]) -> str:
    """GraphML for Gephi, yEd or networkx: a directed graph from later to earlier events.

    Args:
        events: by id.
        edges: later, earlier, share, spread, relation.
    """
    ElementTree.register_namespace("", GRAPHML)
    top = ElementTree.Element(f"{{{GRAPHML}}}graphml")
    keys = [
        ("title", "node", "string"), ("year", "node", "double"), ("kind", "node", "string"),
        ("people", "node", "string"), ("status", "node", "string"),
        ("share", "edge", "double"), ("spread", "edge", "double"), ("relation", "edge", "string"),
    ]  # fmt: skip
    for name, of, kind in keys:
        ElementTree.SubElement(top, f"{{{GRAPHML}}}key", {"id": name, "for": of, "attr.name": name, "attr.type": kind})
    graph = ElementTree.SubElement(top, f"{{{GRAPHML}}}graph", {"id": "history", "edgedefault": "directed"})

    def data(parent: ElementTree.Element, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            ElementTree.SubElement(parent, f"{{{GRAPHML}}}data", {"key": name}).text = _xml(str(value))

    for event in events.values():
        node = ElementTree.SubElement(graph, f"{{{GRAPHML}}}node", {"id": event.id})
        people = "; ".join(event.people)
        data(node, {"title": event.title, "year": event.when.start, "kind": event.kind, "people": people,
                    "status": event.status})  # fmt: skip
    for later, earlier, share, spread, relation in edges:
        edge = ElementTree.SubElement(graph, f"{{{GRAPHML}}}edge", {"source": later, "target": earlier})
        data(edge, {"share": repr(share), "spread": repr(spread), "relation": relation})
    ElementTree.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(top, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def to_csv(events: Mapping[str, Event], edges: Sequence[tuple[str, str, float, float, str]]) -> str:
    """A row per event; the last column holds what it builds on, as ``id (relation, share)`` joined by semicolons."""
    roots: dict[str, list[str]] = {}
    for later, earlier, share, _, relation in edges:
        roots.setdefault(later, []).append(f"{earlier} ({relation}, {share:g})")
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(("id", "year", "year_end", "title", "kind", "people", "status", "text", "sources", "builds_on"))
    for event in events.values():
        table.writerow(
            (
                event.id, f"{event.when.start:.12g}", f"{event.when.end:.12g}", event.title, event.kind,
                "; ".join(event.people), event.status, event.text,
                "; ".join(source.key for source in event.sources), "; ".join(roots.get(event.id, [])),
            )
        )  # fmt: skip
    return stream.getvalue()


def to_yaml(records: Records, annotator: str = "") -> str:
    """A file of a history that `read_history` reads and people edit."""
    works: dict[str, Any] = {}
    for work in records.works:
        row: dict[str, Any] = {
            "authors": list(work.authors), "title": work.title, "venue": work.venue, "year": work.year,
            "doi": work.doi, "arxiv": work.arxiv, "url": work.url,
        }  # fmt: skip
        works[work.key] = {name: value for name, value in row.items() if value not in ("", [], None)}
    roots: dict[str, list[dict[str, Any]]] = {}
    for edge in records.edges:
        roots.setdefault(edge.later, []).append(
            {"to": edge.earlier, "relation": edge.relation, "share": edge.share, "because": edge.evidence,
             "annotator": edge.annotator}
        )  # fmt: skip
    events = []
    for event in records.events:
        whole = re.fullmatch(r"-?\d+", event.when.text)
        row = {
            "id": event.id, "year": int(event.when.text) if whole else event.when.text, "order": event.order,
            "title": event.title, "kind": event.kind, "people": list(event.people), "idea": event.idea,
            "text": event.text, **_sources(event.sources),
            "disputes": [
                {"question": dispute.question, "sides": [
                    {"by": side.by, "claim": side.claim,
                     **{name: list(keys) for name, keys in _sources(side.sources).items()}}
                    for side in dispute.sides]}
                for dispute in event.disputes
            ],
        }  # fmt: skip
        events.append({name: value for name, value in row.items() if value not in ("", [], {}, None)})
    top: dict[str, Any] = {"annotator": annotator, "works": works, "events": events, "roots": roots}
    top["milestones"] = [asdict(one) for one in records.milestones]
    filled = {name: value for name, value in top.items() if value}
    return str(yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=116, default_flow_style=False))


def _sources(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for source in sources:
        found.setdefault("sources" if source.kind == "primary" else "secondary", {})[source.key] = source.supports
    return found
