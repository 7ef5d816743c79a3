"""Events, edges and sources of a history, read from YAML that people write.

A history is a folder of ``.yaml`` files. Each has any of these keys::

    annotator: ann                     # whose judgement the shares of this file are
    works:
      rosenblatt1958: {authors: [Frank Rosenblatt], title: The perceptron, venue: Psychological Review, year: 1958}
    events:
      - id: perceptron-1958
        year: 1958                     # also "circa 1800", 1795..1805, -300, "300 BC", "13.8e9 years ago"
        order: 6                       # optional: earlier or later within a year, such as the month
        title: The perceptron
        kind: architecture
        people: [Frank Rosenblatt]
        idea: perceptron               # optional: events of one idea have to be joined by re-invents
        text: What happened, in our own words, at most 600 characters.
        sources: {rosenblatt1958: describes the machine and its rule}
        secondary: {olazaran1996: tells the controversy}
        disputes:
          - question: Who was first?
            sides:
              - {by: one side, claim: what it says, sources: [rosenblatt1958]}
              - {by: the other, claim: what that says, sources: [], secondary: [olazaran1996]}
        roots:
          - {to: neuron-1943, relation: uses, share: 0.3, because: units are threshold elements}
    roots:                             # of events that stand in another file, or by another annotator
      perceptron-1958:
        - {to: neuron-1943, relation: uses, share: 0.4, because: the same units, annotator: bob}
    milestones:
      - {before: 13.8e9, title: The Big Bang}
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn
from urllib.parse import quote

import yaml

from counterproof.errors import UserError

__all__ = [
    "KINDS",
    "RELATIONS",
    "Dispute",
    "Edge",
    "Event",
    "HistoryError",
    "Milestone",
    "Place",
    "Records",
    "Side",
    "Source",
    "When",
    "Work",
    "read_history",
    "read_when",
]

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "mathematics": "a theorem, a model or a method of calculation",
        "theory": "what can be known, computed or proved",
        "learning rule": "how parameters are changed",
        "architecture": "how a machine that learns is built",
        "hardware": "what it runs on",
        "system": "something that works as a whole",
        "data": "examples to learn or to measure from",
        "evaluation": "how to tell what is better",
        "paper": "an entry of this page",
    }
)
RELATIONS: Mapping[str, str] = MappingProxyType(
    {
        "uses": "uses",
        "generalises": "generalises",
        "special-case-of": "is a special case of",
        "re-invents": "re-invents",
        "makes-practical": "makes practical",
    }
)
PRESENT = 2000  # what "years ago" are counted from
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class HistoryError(UserError):
    """A file of a history that cannot be read as one; names file, line and what was expected."""


@dataclass(frozen=True)
class Place:
    """Where something is written: a file, and a line from 1 on."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


NOWHERE = Place("(made in code)", 0)


@dataclass(frozen=True, order=True)
class When:
    """When something happened: a year, or an interval of years; years before Christ are negative.

    Attributes:
        start, end: first and last year.
        circa: whether that is approximate.
        text: as it was written.
    """

    start: float
    end: float
    circa: bool = False
    text: str = ""

    def __str__(self) -> str:
        return self.text.replace("..", "\u2013")


@dataclass(frozen=True)
class Work:
    """A publication that events refer to by key. `fields` holds what else a BibTeX entry said."""

    key: str
    title: str
    year: int | None = None
    authors: tuple[str, ...] = ()
    venue: str = ""
    doi: str = ""
    arxiv: str = ""
    url: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    place: Place = NOWHERE

    @property
    def address(self) -> str:
        """Where it is found on the web; empty when no address is known for certain."""
        if self.doi:
            return f"https://doi.org/{quote(self.doi, safe='/')}"
        if self.arxiv:
            return f"https://arxiv.org/abs/{quote(self.arxiv, safe='/')}"
        return self.url if self.url.lower().startswith(("https://", "http://")) else ""  # no other scheme is a link


@dataclass(frozen=True)
class Source:
    """That a work supports something an event says; at first hand (`primary`) or not (`secondary`)."""

    key: str
    supports: str
    kind: Literal["primary", "secondary"] = "primary"


@dataclass(frozen=True)
class Side:
    """One side of a dispute: who says what, and where."""

    by: str
    claim: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Dispute:
    """A question of priority or of novelty that is not settled, with what each side says."""

    question: str
    sides: tuple[Side, ...]
    place: Place = NOWHERE


@dataclass(frozen=True)
class Event:
    """Something that happened, with its sources.

    Attributes:
        id: words joined by hyphens; the anchor of the page.
        when: see `When`.
        title, text: in our own words; the text has at most 600 characters.
        kind: one of `KINDS`.
        people: who did it.
        sources: at least one.
        disputes: non-empty when it is disputed.
        order: earlier or later within a year, such as the month; None when not known.
        idea: events of one idea have to be joined by an edge ``re-invents``; empty when it stands alone.
    """

    id: str
    when: When
    title: str
    kind: str
    text: str = ""
    people: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    disputes: tuple[Dispute, ...] = ()
    order: float | None = None
    idea: str = ""
    place: Place = NOWHERE

    @property
    def status(self) -> Literal["settled", "disputed"]:
        return "disputed" if self.disputes else "settled"

    @property
    def moment(self) -> tuple[float, float, str]:
        """What events are sorted by: year, order within it, id."""
        return (self.when.start, 0.0 if self.order is None else self.order, self.id)


@dataclass(frozen=True)
class Edge:
    """That a later event builds on an earlier one, as one annotator sees it.

    Attributes:
        later, earlier: ids of events.
        relation: one of `RELATIONS`.
        share: how much of the later rests on the earlier, in (0, 1].
        annotator: who judged so.
        evidence: a line on why.
    """

    later: str
    earlier: str
    relation: str
    share: float
    annotator: str
    evidence: str
    place: Place = NOWHERE


@dataclass(frozen=True)
class Milestone:
    """A turning point, by how many years before an end point it lies."""

    before: float
    title: str


@dataclass(frozen=True)
class Records:
    """What the files of a history say, unchecked against one another; `files` are those that were read."""

    events: tuple[Event, ...] = ()
    edges: tuple[Edge, ...] = ()
    works: tuple[Work, ...] = ()
    milestones: tuple[Milestone, ...] = ()
    files: tuple[str, ...] = ()


def read_when(value: Any) -> When:
    """Read a year, an interval, or an age.

    Args:
        value: 1958, -300, "300 BC", "1795..1805", "circa 1800", "13.8e9 years ago" (counted from the year 2000).

    Raises:
        ValueError: anything else, or an interval that ends before it begins.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"expected a year such as 1958, 1795..1805, 'circa 1800' or '13.8e9 years ago', not {value!r}")
    text = str(value).strip()
    bare = re.sub(r"^(?:circa|ca?\.|about)\s+", "", text, flags=re.IGNORECASE)
    circa = bare != text
    first, dots, last = bare.partition("..")
    start = _year(first, value)
    end = _year(last, value) if dots else start
    if end < start:
        raise ValueError(f"the interval {text!r} ends before it begins")
    return When(start, end, circa, text)


def _year(text: str, value: Any) -> float:
    text = text.strip()
    if re.fullmatch(r"[+-]?\d{1,6}", text):
        return float(int(text))
    if match := re.fullmatch(r"(\d{1,6})\s*BCE?", text, re.IGNORECASE):
        return float(-int(match[1]))
    if match := re.fullmatch(r"([\d.]+(?:e\+?\d+)?)\s+years\s+ago", text, re.IGNORECASE):
        try:
            ago = float(match[1])
        except ValueError:
            ago = math.inf
        if math.isfinite(ago):
            return PRESENT - ago
    raise ValueError(f"expected a year such as 1958, 1795..1805, 'circa 1800' or '13.8e9 years ago', not {value!r}")


def read_history(path: Path) -> Records:
    """Read a folder of YAML files (or one file).

    Whether the records fit together is for `lint` to say; here only what cannot be read stops.

    Raises:
        HistoryError: no such folder, nothing in it, bad YAML, an unknown key or value, an id or key given twice; with
            file and line.
    """
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in (".yaml", ".yml"))
        if not files:
            raise HistoryError(f"{path} holds no .yaml file; a history is a folder of them")
    elif path.is_file():
        files = [path]
    else:
        raise HistoryError(f"there is no folder or file {path}")
    everything = [_read_file(file, str(file) if path.is_file() else f"{path.name}/{file.name}") for file in files]
    found = Records(
        events=tuple(event for one in everything for event in one.events),
        edges=tuple(edge for one in everything for edge in one.edges),
        works=tuple(work for one in everything for work in one.works),
        milestones=tuple(milestone for one in everything for milestone in one.milestones),
        files=tuple(str(file) for file in files),
    )
    _refuse_twice("the event", ((event.id, event.place) for event in found.events))
    _refuse_twice("the work", ((work.key, work.place) for work in found.works))
    return found


def _refuse_twice(what: str, named: Iterable[tuple[str, Place]]) -> None:
    seen: dict[str, Place] = {}
    for name, place in named:
        if name in seen:
            raise HistoryError(f"{place}: {what} {name!r} is already in {seen[name]}")
        seen[name] = place


class _Table(dict[str, Any]):
    """A mapping of a YAML file that knows the lines of itself and of its keys."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}


class _Reader:
    """One file: values with lines, and errors that name them."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as problem:
            raise HistoryError(f"cannot read {path}: {problem.strerror}") from None
        except UnicodeDecodeError as problem:
            line = path.read_bytes()[: problem.start].count(b"\n") + 1
            raise HistoryError(f"{name}:{line}: not UTF-8 text") from None
        self.constructor = yaml.SafeLoader("")
        try:
            node = yaml.compose(text, Loader=Loader)
            self.content = self._value(node) if node is not None else _Table(1)
        except yaml.MarkedYAMLError as problem:
            line = problem.problem_mark.line + 1 if problem.problem_mark else 1
            raise HistoryError(f"{name}:{line}: not YAML: {problem.problem}") from None
        except yaml.reader.ReaderError as problem:
            line = text[: problem.position].count("\n") + 1
            raise HistoryError(f"{name}:{line}: not YAML: {problem.reason}") from None

    def _value(self, node: Any) -> Any:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            table = _Table(line)
            for key_node, value_node in node.value:
                key = self.constructor.construct_object(key_node)
                if not isinstance(key, str):
                    self.wrong(key_node.start_mark.line + 1, f"a key is a word, not {key!r}")
                if key in table:
                    self.wrong(key_node.start_mark.line + 1, f"the key {key!r} stands here twice")
                table[key] = self._value(value_node)
                table.lines[key] = key_node.start_mark.line + 1
            return table
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item) for item in node.value]
        try:
            return self.constructor.construct_object(node)
        except ValueError as problem:
            self.wrong(line, f"cannot read {node.value!r}: {problem}")

    def wrong(self, line: int, message: str) -> NoReturn:
        raise HistoryError(f"{self.name}:{line}: {message}")

    def table(self, value: Any, line: int, what: str, known: Sequence[str], needed: Sequence[str]) -> _Table:
        """A mapping with no other than the known keys, and all that are needed."""
        if not isinstance(value, _Table):
            self.wrong(line, f"{what} is a mapping of {', '.join(known)}")
        for key in value:
            if key not in known:
                self.wrong(value.lines[key], f"{what} has no {key!r}; it has {', '.join(known)}")
        for key in needed:
            if value.get(key) is None:
                self.wrong(value.line, f"{what} lacks {key!r}")
        return value

    def items(self, table: _Table, key: str) -> list[Any]:
        value = table.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.wrong(table.lines[key], f"{key} is a list")
        return value

    def mapping(self, table: _Table, key: str) -> _Table:
        value = table.get(key)
        if value is None:
            return _Table(table.line)
        if not isinstance(value, _Table):
            self.wrong(table.lines[key], f"{key} is a mapping")
        return value

    def text(self, table: _Table, key: str) -> str:
        value = table.get(key, "")
        if not isinstance(value, str):
            self.wrong(table.lines[key], f"{key} is text (in quotes), not {value!r}")
        return " ".join(value.split())

    def names(self, table: _Table, key: str) -> tuple[str, ...]:
        values = self.items(table, key)
        for value in values:
            if not isinstance(value, str) or not value.strip():
                self.wrong(table.lines[key], f"{key} is a list of text, not {value!r}")
        return tuple(value.strip() for value in values)

    def number(self, table: _Table, key: str) -> float:
        value = table[key]
        if isinstance(value, str):  # YAML 1.1 takes 13.8e9 for text
            try:
                value = float(value)
            except ValueError:
                value = None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.wrong(table.lines[key], f"{key} is a number, not {table[key]!r}")
        return float(value)


WORK_KEYS = ("authors", "title", "venue", "year", "doi", "arxiv", "url")
EVENT_KEYS = (
    "id", "year", "order", "title", "kind", "people", "idea", "text", "sources", "secondary", "disputes", "roots",
)  # fmt: skip
ROOT_KEYS = ("to", "relation", "share", "because", "annotator")
SIDE_KEYS = ("by", "claim", "sources", "secondary")


def _read_file(path: Path, name: str) -> Records:
    reader = _Reader(path, name)
    top = reader.table(reader.content, 1, "a file", ("annotator", "works", "events", "roots", "milestones"), ())
    annotator = reader.text(top, "annotator")
    works = []
    for key, value in reader.mapping(top, "works").items():
        works.append(_work(reader, key, value, top["works"].lines[key]))
    events, edges = [], []
    for value in reader.items(top, "events"):
        event, own = _event(reader, value, top.lines["events"], annotator)
        events.append(event)
        edges += own
    listed = reader.mapping(top, "roots")
    for later in listed:
        for value in reader.items(listed, later):
            edges.append(_edge(reader, later, value, listed.lines[later], annotator))
    milestones = []
    for value in reader.items(top, "milestones"):
        row = reader.table(value, top.lines["milestones"], "a milestone", ("before", "title"), ("before", "title"))
        before = reader.number(row, "before")
        if before <= 0:
            reader.wrong(row.lines["before"], f"before is a number of years above 0, not {before:g}")
        milestones.append(Milestone(before, reader.text(row, "title")))
    return Records(tuple(events), tuple(edges), tuple(works), tuple(milestones))


def _work(reader: _Reader, key: str, value: Any, line: int) -> Work:
    row = reader.table(value, line, f"the work {key}", WORK_KEYS, ("title",))
    year = row.get("year")
    if year is not None and (isinstance(year, bool) or not isinstance(year, int)):
        reader.wrong(row.lines["year"], f"the year of a work is a whole number, not {year!r}")
    words: dict[str, Any] = {name: reader.text(row, name) for name in ("title", "venue", "doi", "arxiv", "url")}
    if words["doi"] and not re.fullmatch(r"10\.\d{4,9}/\S+", words["doi"]):
        reader.wrong(row.lines["doi"], f"a DOI looks like 10.1000/182, not {words['doi']!r}")
    if words["arxiv"] and not re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7}", words["arxiv"]):
        reader.wrong(
            row.lines["arxiv"], f"an arXiv id has no version and looks like 1706.03762, not {words['arxiv']!r}"
        )
    if words["url"] and not re.match(r"https?://", words["url"]):
        reader.wrong(row.lines["url"], f"an address begins with https://, not {words['url']!r}")
    return Work(key=key, year=year, authors=reader.names(row, "authors"), place=Place(reader.name, line), **words)


def _sources(reader: _Reader, row: _Table) -> tuple[Source, ...]:
    found: list[Source] = []
    for name, kind in (("sources", "primary"), ("secondary", "secondary")):
        table = reader.mapping(row, name)
        for key in table:
            found.append(Source(key, reader.text(table, key), kind))  # type: ignore[arg-type]
    return tuple(found)


def _event(reader: _Reader, value: Any, line: int, annotator: str) -> tuple[Event, list[Edge]]:
    row = reader.table(value, line, "an event", EVENT_KEYS, ("id", "year", "title", "kind"))
    identity = reader.text(row, "id")
    if not re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*", identity):
        reader.wrong(row.lines["id"], f"an id is lower-case words joined by hyphens, not {identity!r}")
    try:
        when = read_when(row["year"])
    except ValueError as problem:
        reader.wrong(row.lines["year"], f"{identity}: year: {problem}")
    kind = reader.text(row, "kind")
    if kind not in KINDS:
        reader.wrong(row.lines["kind"], f"{identity}: kind: expected one of {', '.join(KINDS)}, not {kind!r}")
    disputes = tuple(_dispute(reader, one, row) for one in reader.items(row, "disputes"))
    event = Event(
        id=identity,
        when=when,
        title=reader.text(row, "title"),
        kind=kind,
        text=reader.text(row, "text"),
        people=reader.names(row, "people"),
        sources=_sources(reader, row),
        disputes=disputes,
        order=reader.number(row, "order") if row.get("order") is not None else None,
        idea=reader.text(row, "idea"),
        place=Place(reader.name, row.line),
    )
    edges = [_edge(reader, identity, one, row.lines["roots"], annotator) for one in reader.items(row, "roots")]
    return event, edges


def _dispute(reader: _Reader, value: Any, event: _Table) -> Dispute:
    line = event.lines["disputes"]
    row = reader.table(value, line, "a dispute", ("question", "sides"), ("question", "sides"))
    sides = []
    for one in reader.items(row, "sides"):
        side = reader.table(one, row.lines["sides"], "a side", SIDE_KEYS, ("by", "claim"))
        sources = [Source(key, "", "primary") for key in reader.names(side, "sources")]
        sources += [Source(key, "", "secondary") for key in reader.names(side, "secondary")]
        sides.append(Side(reader.text(side, "by"), reader.text(side, "claim"), tuple(sources)))
    return Dispute(reader.text(row, "question"), tuple(sides), Place(reader.name, row.line))


def _edge(reader: _Reader, later: str, value: Any, line: int, annotator: str) -> Edge:
    row = reader.table(value, line, f"a root of {later}", ROOT_KEYS, ("to", "relation", "share", "because"))
    relation = reader.text(row, "relation")
    if relation not in RELATIONS:
        reader.wrong(row.lines["relation"], f"relation: expected one of {', '.join(RELATIONS)}, not {relation!r}")
    who = reader.text(row, "annotator") or annotator
    if not who:
        reader.wrong(row.line, "whose judgement is this share? give annotator here, or at the top of the file")
    return Edge(
        later=later,
        earlier=reader.text(row, "to"),
        relation=relation,
        share=reader.number(row, "share"),
        annotator=who,
        evidence=reader.text(row, "because"),
        place=Place(reader.name, row.line),
    )
