"""Lists for other programs: read back by their own readers, whatever strangers wrote, the same bytes each time."""

import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime

import bibtexparser
import feedparser
import pytest
import rispy
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.page.formats import (
    FORMATS,
    Place,
    atom,
    bibtex,
    cite_key,
    dump,
    json_feed,
    json_lines,
    moment,
    ris,
    safe_link,
    tex,
)
from counterproof.page.readers import Record, Skipped, read
from counterproof.page.store import Entry, Listed, Store

DETR = Listed(
    1,
    "arxiv:2005.12872",
    Entry(
        title="End-to-End Object Detection: $O(n^3)$ & <b>more</b>",
        abstract="We score 42 % on COCO_val, 100 # of $5; braces { and \\alpha. 'Ünïcode' \u2028 too.",
        authors=("Nicolas Carion", "Laurens van der Maaten", "Müller, Jürgen", "DeepMind"),
        arxiv="2005.12872",
        published="2020-05-26T17:06:38Z",
        categories=("cs.CV", "cs.LG"),
        signals={"upvotes": 3},
        links={"page": "javascript:alert(1)"},
    ),
    "2020-05-27",
    "2026-11-23T08:30:00Z",
)
DOI = Listed(
    2,
    "doi:10.1002/(sici)1<44::aid>3.0.co;2-#",
    Entry(title="Odd DOI", doi="10.1002/(sici)1<44::aid>3.0.co;2-#", published="1996", venue="Journal of <A> & B"),
    "2026-11-20",
    "2026-11-20T00:00:00Z",
)
HONEST = replace(DETR, entry=replace(DETR.entry, links={"code": "https://github.com/x/y"}))
FAIR = replace(DOI, key="doi:10.1000/(a)1", entry=replace(DOI.entry, doi="10.1000/(a)1"))
PLAIN = Listed(3, "hash:0123456789abcdef", Entry(title="Only a title"), "2026-11-21", "2026-11-21T00:00:00Z")
ALL = [DETR, DOI, PLAIN]
SITE = Place("Trending & more", "https://papers.example", "/trending", "/trending.atom?room=judging")

# What strangers may send: any letters that an entry can hold.
words = st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and text.isprintable())
anything = st.text(max_size=60)
entries = st.builds(
    Entry,
    title=anything.filter(lambda text: text.strip()),
    abstract=anything,
    authors=st.lists(words, max_size=3).map(tuple),
    venue=anything,
    categories=st.lists(anything, max_size=3).map(tuple),
    published=st.sampled_from([None, "2020", "2020-05", "2020-05-06", "2020-05-06T01:02:03Z", "soon", "2020\n"]),
    arxiv=st.sampled_from([None, "2005.12872", "math/0309136"]),
    doi=st.sampled_from([None, "10.1000/1", "10.1000/}{\\%"]),
    links=st.fixed_dictionaries({"page": anything}),
)


def listed(entry, number=1):
    return Listed(number, entry.names()[0], entry, "2026-11-23", "2026-11-23T08:30:00Z")


# Atom


def test_atom_says_what_the_rfc_asks_for_and_is_read_back():
    text = atom(ALL, replace(SITE, following="/trending.atom?room=judging&cursor=abc"))
    feed = feedparser.parse(text.encode())
    assert not feed.bozo
    assert feed.version == "atom10"
    assert feed.feed.title == "Trending & more"
    assert feed.feed.updated == "2026-11-23T08:30:00Z"
    links = {link.rel: link.href for link in feed.feed.links}
    assert links == {
        "self": "https://papers.example/trending.atom?room=judging",
        "alternate": "https://papers.example/trending",
        "next": "https://papers.example/trending.atom?room=judging&cursor=abc",
    }
    first, odd, plain = feed.entries
    assert first.title == DETR.entry.title.replace("<b>", "<b>")
    assert first.title_detail.type == "text/plain"
    assert first.summary.startswith("We score 42 %")
    assert [author.name for author in first.authors] == list(DETR.entry.authors)
    assert first.published == "2020-05-26T17:06:38Z"
    assert [tag.term for tag in first.tags] == ["cs.CV", "cs.LG"]
    assert first.link == "https://papers.example/paper/arxiv/2005.12872"
    assert {link.href for link in first.links if link.rel == "related"} == {"https://arxiv.org/abs/2005.12872"}
    assert plain.summary == "Only a title"  # an entry without content must have something to read
    assert odd.published == "1996-01-01T00:00:00Z"
    root = ET.fromstring(text.partition("\n")[2])
    name = "{http://www.w3.org/2005/Atom}"
    for element in [root, *root.iter(f"{name}entry")]:
        for needed in ("id", "title", "updated"):
            assert len(element.findall(f"{name}{needed}")) == 1
    ids = [element.text for element in root.iter(f"{name}id")]
    assert len(set(ids)) == 4
    assert all(re.fullmatch(r"tag:counterproof\.invalid,2026:[A-Za-z0-9_.~%:/?=&-]+", one) for one in ids)


def test_atom_ids_stay_and_updated_changes_with_the_content_only():
    one, other = atom(ALL, SITE), atom(ALL, replace(SITE, base="http://localhost:8000", title="X"))
    ids = re.compile("<id>(.*?)</id>")
    assert ids.findall(one) == ids.findall(other)
    page_two = replace(SITE, feed="/trending.atom?room=judging&cursor=abc")
    assert ids.findall(atom(ALL, page_two)) == ids.findall(one)
    assert ids.findall(atom([DETR], replace(SITE, feed="/week.atom")))[0] != ids.findall(one)[0]
    assert atom(ALL, SITE) == one
    assert atom([], SITE) == atom([], SITE)
    assert not feedparser.parse(atom([], SITE)).bozo
    assert "<updated>2026-11-21T00:00:00Z</updated>" in atom([PLAIN, DOI], SITE).partition("<entry>")[0]


@given(st.lists(entries, max_size=3), anything)
@settings(max_examples=60, deadline=None)
def test_no_text_of_strangers_breaks_a_feed(papers, title):
    chosen = [listed(entry, number) for number, entry in enumerate(papers)]
    root = ET.fromstring(atom(chosen, replace(SITE, title=title)).partition("\n")[2].encode("utf-8"))
    assert len(root.findall("{http://www.w3.org/2005/Atom}entry")) == len(papers)
    for link in root.iter("{http://www.w3.org/2005/Atom}link"):
        assert re.match(r"https?://", link.get("href"))
    json.loads(json_feed(chosen, replace(SITE, title=title)))


def test_only_web_links_are_followed():
    for address in ("javascript:alert(1)", "data:text/html,x", "//x", "http://", "https://x y", 'https://x"y', "ftp://x",
                    "https://[", "https://x\ny", " https://x"):  # fmt: skip
        assert safe_link(address) is None
    assert safe_link("https://example.org/a?b=c#d") == "https://example.org/a?b=c#d"
    home = Listed(1, "hash:0", Entry(title="T", links={"page": "javascript:x"}), "2026-11-23", "2026-11-23T00:00:00Z")
    assert "javascript" not in atom([home], Place("T")) + json_feed([home], Place("T")) + bibtex([home]) + ris([home])


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ("2020", "2020-01-01T00:00:00Z"), ("2020-05", "2020-05-01T00:00:00Z"), ("2020-05-06", "2020-05-06T00:00:00Z"),
        ("2020-05-06T01:02:03.5+02:00", "2020-05-06T01:02:03+02:00"), ("May 2020", None), (None, None), ("", None),
    ],
)  # fmt: skip
def test_moments(said, want):
    assert moment(said) == want


# JSON Feed


def test_json_feed_has_the_fields_of_version_1_1():
    feed = json.loads(json_feed(ALL, replace(SITE, feed="/t.json", following="/t.json?cursor=a")))
    assert feed["version"] == "https://jsonfeed.org/version/1.1"
    assert feed["feed_url"] == "https://papers.example/t.json"
    assert feed["next_url"] == "https://papers.example/t.json?cursor=a"
    first = feed["items"][0]
    assert first["external_url"] == "https://arxiv.org/abs/2005.12872"
    assert first["authors"][0] == {"name": "Nicolas Carion"}
    assert first["date_modified"] == "2026-11-23T08:30:00Z"
    assert first["_counterproof"]["signals"] == {"upvotes": 3}
    for item in feed["items"]:
        assert isinstance(item["id"], str)
        assert item["content_text"]
    assert "next_url" not in json.loads(json_feed(ALL, SITE))


# BibTeX


def test_bibtex_is_read_back():
    library = bibtexparser.parse_string(bibtex(ALL))
    assert library.failed_blocks == []
    one, two, three = library.entries
    assert (one.entry_type, one.key) == ("misc", "arxiv:2005.12872")
    fields = {name: field.value for name, field in one.fields_dict.items()}
    assert fields["title"] == r"{End-to-End Object Detection: $O(n^3)$ \& <b>more</b>}"
    assert fields["author"] == "Nicolas Carion and Laurens van der Maaten and Müller, Jürgen and DeepMind"
    assert (fields["eprint"], fields["archivePrefix"], fields["primaryClass"]) == ("2005.12872", "arXiv", "cs.CV")
    assert (fields["year"], fields["month"]) == ("2020", "5")
    assert (
        r"42 \% on COCO\_val, 100 \# of \$5; braces \textbraceleft{} and \textbackslash{}alpha." in fields["abstract"]
    )
    assert two.entry_type == "article"
    assert two.fields_dict["journal"].value == r"Journal of <A> \& B"
    assert three.fields_dict["title"].value == "{Only a title}"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a & b_c 5% #1 ~ ^", r"a \& b\_c 5\% \#1 \textasciitilde{} \textasciicircum{}"),
        (r"$x_1^2$ and \emph{this} {Kept}", r"$x_1^2$ and \emph{this} {Kept}"),
        ("costs $5 or $6", r"costs \$5 or \$6"),
        ("a $5", r"a \$5"),
        ("open { only", r"open \textbraceleft{} only"),
        ("} {", r"\textbraceright{} \textbraceleft{}"),
        (r"trailing \ ".strip(), r"trailing \textbackslash{}"),
        (r"an escaped \{ brace", r"an escaped \textbackslash{}\textbraceleft{} brace"),
        (r"already \& \% \_", r"already \& \% \_"),
        (r"$\mathbb{R}^d$-valued", r"$\mathbb{R}^d$-valued"),
        (r"$\{$", r"\$\textbackslash{}\textbraceleft{}\$"),
        ("line\nbreak\x00\x07", "line break"),
    ],
)
def test_tex_keeps_mathematics_and_escapes_the_rest(text, want):
    assert tex(text) == want


@given(st.lists(entries, max_size=3, unique_by=lambda entry: entry.names()[0]))
@settings(max_examples=100, deadline=None)
def test_no_text_of_strangers_breaks_a_bibliography(papers):
    chosen = [listed(entry, number) for number, entry in enumerate(papers)]
    text = bibtex(chosen)
    library = bibtexparser.parse_string(text)
    assert library.failed_blocks == []
    assert [entry.key for entry in library.entries] == [cite_key(paper) for paper in chosen]
    for entry in library.entries:
        assert set(entry.fields_dict) <= {
            "title", "author", "year", "month", "journal", "eprint", "archivePrefix", "primaryClass", "doi", "url",
            "abstract",
        }  # fmt: skip
        for field in entry.fields:
            assert field.value.count("{") == field.value.count("}")
    references = rispy.loads(ris(chosen))
    assert len(references) == len(chosen)


def test_keys_are_stable_and_differ():
    assert cite_key(DETR) == cite_key(replace(DETR, entry=Entry(title="Another title", arxiv="2005.12872")))
    assert re.fullmatch(r"[A-Za-z0-9._:/+-]+", cite_key(DOI))
    assert cite_key(DOI) != cite_key(replace(DOI, key=DOI.key.replace("<", ">")))


# RIS


def test_ris_is_read_back():
    text = ris(ALL)
    assert "\r\n" in text
    assert not re.search(r"(?<!\r)\n", text)
    one, two, three = rispy.loads(text)
    assert one["type_of_reference"] == "UNPB"
    assert one["title"] == DETR.entry.title
    assert one["authors"] == ["Carion, Nicolas", "van der Maaten, Laurens", "Müller, Jürgen", "DeepMind"]
    assert one["doi"] == "10.48550/arXiv.2005.12872"
    assert one["year"] == "2020"
    assert one["keywords"] == ["cs.CV", "cs.LG"]
    assert one["abstract"] == DETR.entry.abstract
    assert (two["type_of_reference"], two["doi"]) == ("JOUR", DOI.entry.doi)
    assert three["title"] == "Only a title"


# JSON lines


def records(text):
    found = list(read(text.encode(), "json-lines"))
    assert not [one for one in found if isinstance(one, Skipped)], found
    return [one for one in found if isinstance(one, Record)]


def test_json_lines_of_papers_are_read_back_by_our_own_reader():
    chosen = [HONEST, FAIR, PLAIN]
    back = records(json_lines(chosen))
    assert [(one.entry, one.day) for one in back] == [(paper.entry, paper.day) for paper in chosen]


def test_the_dump_of_everything_makes_the_same_papers(tmp_path):
    store = Store(tmp_path / "a.sqlite", clock=lambda: datetime(2026, 11, 23, tzinfo=UTC))
    store.add(HONEST.entry, source="arxiv", day="2020-05-27")
    store.add(replace(HONEST.entry, abstract="", venue="ECCV", doi="10.1007/detr"), source="bibtex")
    store.add(FAIR.entry, source="semantic-scholar", raw=b"{}", form="semantic-scholar", day="2026-11-20")
    store.add(PLAIN.entry, source="x")
    text = "".join(dump(store))
    assert text.count("\n") == 4
    again = Store(tmp_path / "b.sqlite", clock=store.clock)
    for one in records(text):
        again.add(one.entry, source=one.source, day=one.day)
    assert [again.get(n) for n in (1, 2, 3)] == [store.get(n) for n in (1, 2, 3)]
    days = "SELECT day, paper, source FROM appearances ORDER BY 1, 2, 3"
    assert [tuple(row) for row in again.db.execute(days)] == [tuple(row) for row in store.db.execute(days)]
    assert "".join(dump(again)) == text


def test_every_format_has_a_media_type_and_writes_nothing_for_nothing():
    for form in FORMATS.values():
        assert re.fullmatch(r"[a-z]+/[a-z+-]+; charset=utf-8", form.media_type)
        assert "2005.12872" in form.write(ALL, SITE)
        form.write([], SITE)
    assert rispy.loads(FORMATS["ris"].write([], SITE)) == []
    assert io.StringIO(FORMATS["jsonl"].write([], SITE)).read() == ""
