"""Readers: every form that is known, every record taken or named, nothing expanded, nothing guessed in silence."""

import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.page.catalogue import papers
from counterproof.page.readers import (
    ENDINGS,
    FORMS,
    Broken,
    Note,
    Record,
    Skipped,
    detect,
    parse_record,
    plain_date,
    read,
    read_lines,
)
from counterproof.page.store import Entry

ATOM = b"""<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom"
      xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">
  <id>http://arxiv.org/api/abc</id>
  <opensearch:totalResults>2</opensearch:totalResults>
  <entry>
    <id>http://arxiv.org/abs/2005.12872v3</id>
    <updated>2020-05-28T17:37:59Z</updated>
    <published>2020-05-26T17:06:38Z</published>
    <title>End-to-End Object Detection
  with Transformers</title>
    <summary>  We present $x &lt; y$ a new
method.  </summary>
    <author><name>Nicolas Carion</name></author>
    <author><name>Francisco Massa</name></author>
    <arxiv:doi>10.1007/978-3-030-58452-8_13</arxiv:doi>
    <arxiv:comment>16 pages</arxiv:comment>
    <link href="http://arxiv.org/abs/2005.12872v3" rel="alternate" type="text/html"/>
    <arxiv:primary_category term="cs.CV"/>
    <category term="cs.CV"/><category term="cs.LG"/>
  </entry>
  <entry>
    <id>http://arxiv.org/abs/hep-th/9901001v2</id>
    <published>1999-01-04T00:00:00Z</published>
    <title>Old</title><summary>S.</summary><author><name>A</name></author>
  </entry>
</feed>"""
RSS = b"""<?xml version='1.0' encoding='UTF-8'?>
<rss xmlns:arxiv="http://arxiv.org/schemas/atom" xmlns:dc="http://purl.org/dc/elements/1.1/" version="2.0">
  <channel><title>cs.CV updates on arXiv.org</title><link>http://rss.arxiv.org/rss/cs.CV</link>
    <item><title>A Title</title><link>https://arxiv.org/abs/2411.00001</link>
      <description>arXiv:2411.00001v2 Announce Type: replace-cross
Abstract: The text of it.</description>
      <guid isPermaLink="false">oai:arXiv.org:2411.00001v2</guid>
      <category>cs.CV</category><category>cs.LG</category>
      <pubDate>Mon, 04 Nov 2024 00:00:00 -0500</pubDate>
      <arxiv:announce_type>replace-cross</arxiv:announce_type>
      <dc:creator>Ann Lee, Bob M\xc3\xbcller</dc:creator></item>
  </channel></rss>"""
OAI = b"""<?xml version="1.0" encoding="UTF-8"?>
<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><responseDate>2026-11-23T01:02:03Z</responseDate>
<request verb="ListRecords">http://x/oai</request><ListRecords>
<record><header><identifier>oai:arXiv.org:0704.0001</identifier><datestamp>2008-11-26</datestamp></header>
<metadata><arXiv xmlns="http://arxiv.org/OAI/arXiv/"><id>0704.0001</id><created>2007-04-02</created>
<updated>2007-07-24</updated><authors><author><keyname>Bal\xc3\xa1zs</keyname><forenames>C.</forenames></author>
<author><keyname>Nadolsky</keyname><forenames>P. M.</forenames><suffix>Jr.</suffix></author></authors>
<title>Calculation of prompt diphoton production</title><categories>hep-ph hep-ex</categories>
<journal-ref>Phys.Rev.D76:013009,2007</journal-ref><doi>10.1103/PhysRevD.76.013009</doi>
<abstract>  A fully differential calculation. </abstract></arXiv></metadata></record>
<record><header status="deleted"><identifier>oai:arXiv.org:0704.0002</identifier><datestamp>2009-01-01</datestamp>
</header></record>
<record><header><identifier>oai:zenodo.org:77</identifier><datestamp>2020-01-01</datestamp></header>
<metadata><oai_dc:dc xmlns:oai_dc="http://www.openarchives.org/OAI/2.0/oai_dc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>A Data Set</dc:title><dc:creator>Lee, Ann</dc:creator>
<dc:description>Short.</dc:description><dc:description>The longer one is the abstract.</dc:description>
<dc:date>2020-02-03</dc:date><dc:identifier>https://doi.org/10.5281/zenodo.77</dc:identifier></oai_dc:dc></metadata>
</record>
<resumptionToken completeListSize="9">next|1</resumptionToken></ListRecords></OAI-PMH>"""
DAILY = json.dumps(
    [
        {
            "paper": {
                "id": "2411.04905",
                "title": "OpenCoder",
                "summary": "Code models.",
                "authors": [{"_id": "x", "name": "Siming Huang", "hidden": False}, {"name": "Tianhao Cheng"}],
                "publishedAt": "2024-11-07T17:47:25.000Z",
                "submittedOnDailyAt": "2024-11-08T01:30:00.000Z",
                "upvotes": 130,
                "githubRepo": "https://github.com/a/b",
            },
            "publishedAt": "2024-11-08T05:00:00.000Z",
            "title": "OpenCoder",
            "numComments": 4,
        },
        {"paper": {"id": "2411.00002", "title": ""}},
        7,
    ]
).encode()
SCHOLAR = json.dumps(
    {
        "total": 3,
        "data": [
            {
                "paperId": "649def34f8be52c8b66281af98ae884c09aef38b",
                "externalIds": {"ArXiv": "1805.02262", "DOI": "10.18653/V1/N18-3011", "CorpusId": 19170988},
                "title": "Construction of the Literature Graph",
                "abstract": None,
                "year": 2018,
                "publicationDate": "2018-05-06",
                "authors": [{"authorId": "1", "name": "Waleed Ammar"}],
                "venue": "NAACL",
                "citationCount": 365,
                "openAccessPdf": {"url": "https://aclanthology.org/N18-3011.pdf"},
            },
            None,
        ],
    }
).encode()
BIBTEX = r"""
% a comment line
@string{cvpr = "Proc. {CVPR}"}
@inproceedings{carion, title={End-to-End {DETR} with $x^{2}$ and 5\% \'{E}cole}, author={M{\"u}ller, Jörg and {The
 BIG and Co} and Łukasz Kaiser and others}, booktitle=cvpr # " 2020", month=may, year=2020,
 eprint={2005.12872v3}, archivePrefix={arXiv}, primaryClass={cs.CV}}
@article{carion, title="Second", doi={https://doi.org/10.1000/X_1}, year = 2019, note={arXiv:1901.00001}}
@article{broken, title={Broken, year=2020
@misc{twice, title={Third}, title={Again}, eprint={10.7/zz}, archivePrefix={hdl}}
some junk
@misc{untitled, year=2001}
""".encode()
RIS = """junk before
TY  - JOUR
TI  - A long title
      that goes on
AU  - Müller, Jörg
AU  - Lee, Ann, Jr.
AB  - The abstract.
PY  - 2020
DA  - 2020/05/26/
DO  - 10.1000/Abc
UR  - https://arxiv.org/abs/2005.12872v2
KW  - one
KW  - two
ER  -
TY  - CONF
T1  - No end
Y1  - 2019
TY  - JOUR
AU  - Nobody
ER  -
""".encode()


def found(data, form, kind=Record):
    return [item for item in read(data, form) if isinstance(item, kind)]


def entries(data, form):
    return [item.entry for item in found(data, form)]


def test_the_arxiv_api_is_read_whole():
    first, old = entries(ATOM, "arxiv-atom")
    assert first == Entry(
        title="End-to-End Object Detection with Transformers",
        abstract="We present $x < y$ a new method.",
        authors=("Nicolas Carion", "Francisco Massa"),
        arxiv="2005.12872",
        doi="10.1007/978-3-030-58452-8_13",
        published="2020-05-26T17:06:38Z",
        updated="2020-05-28T17:37:59Z",
        categories=("cs.CV", "cs.LG"),
        links={"page": "https://arxiv.org/abs/2005.12872", "pdf": "https://arxiv.org/pdf/2005.12872"},
        extra={"version": "3", "comment": "16 pages"},
    )
    assert (old.arxiv, old.extra["version"]) == ("hep-th/9901001", "2")


def test_an_error_of_arxiv_is_no_paper():
    error = (
        b'<feed xmlns="http://www.w3.org/2005/Atom"><entry><id>http://arxiv.org/api/errors#max_results</id>'
        b"<title>Error</title><summary>max_results must be an integer</summary></entry></feed>"
    )
    (left,) = read(error, "arxiv-atom")
    assert isinstance(left, Skipped)
    assert "max_results must be" in left.reason


def test_arxivs_rss_loses_its_announcement():
    (record,) = found(RSS, "arxiv-rss")
    assert record.day == "2024-11-04"
    assert record.entry.abstract == "The text of it."
    assert record.entry.authors == ("Ann Lee", "Bob Müller")
    assert (record.entry.arxiv, record.entry.published) == ("2411.00001", None)
    assert record.entry.extra == {"version": "2", "announced as": "replace-cross"}


def test_oai_pmh_in_both_formats_and_what_was_deleted():
    from counterproof.page.readers_xml import OaiAnswer, oai_answer

    physics, data = entries(OAI, "oai-pmh")
    assert physics.authors == ("C. Balázs", "P. M. Nadolsky Jr.")
    assert (physics.arxiv, physics.doi) == ("0704.0001", "10.1103/physrevd.76.013009")
    assert (physics.published, physics.categories) == ("2007-04-02", ("hep-ph", "hep-ex"))
    assert (data.title, data.authors, data.doi) == ("A Data Set", ("Ann Lee",), "10.5281/zenodo.77")
    assert data.abstract == "The longer one is the abstract."
    (left,) = found(OAI, "oai-pmh", Skipped)
    assert left == Skipped("record 2", "oai:arXiv.org:0704.0002 was deleted there on 2009-01-01")
    assert oai_answer(OAI) == OaiAnswer("", "", "next|1", "2026-11-23T01:02:03Z")


def test_daily_papers_keep_likes_of_the_paper_and_comments_of_the_item():
    items = list(read(DAILY, "daily-papers"))
    record = items[0]
    assert record.entry.signals == {"upvotes": 130, "comments": 4}
    assert (record.day, record.source) == ("2024-11-08", "daily-papers")
    assert record.entry.published == "2024-11-07T17:47:25Z"
    assert record.entry.links["code"] == "https://github.com/a/b"
    assert items[1:] == [Skipped("record 2", "has no title"), Skipped("record 3", "is no object but 7")]


@pytest.mark.parametrize("shape", ["search", "batch", "single"])
def test_semantic_scholar_in_its_three_shapes(shape):
    value = json.loads(SCHOLAR)
    value = {"search": value, "batch": value["data"], "single": value["data"][0]}[shape]
    data = json.dumps(value, indent=1).encode()
    assert detect(data) == "semantic-scholar"
    items = list(read(data, "semantic-scholar"))
    entry = items[0].entry
    assert (entry.arxiv, entry.doi, entry.abstract) == ("1805.02262", "10.18653/v1/n18-3011", "")
    assert entry.signals == {"citations": 365}
    assert entry.published == "2018-05-06"
    left = [] if shape == "single" else [Skipped("record 2", "is not known there (null)")]
    assert items[1:] == left


def feed_of(kind, item):
    if kind == "rss":
        return f'<rss version="2.0" xmlns:dc="http://purl.org/dc/elements/1.1/"><channel>{item}</channel></rss>'
    if kind == "rdf":
        return (
            '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns="http://purl.org/rss/1.0/" '
            f'xmlns:dc="http://purl.org/dc/elements/1.1/">{item}</rdf:RDF>'
        )
    return f'<feed xmlns="http://www.w3.org/2005/Atom">{item}</feed>'


ITEM = (
    "<item><title>Caf&#233; &amp; x &lt; y</title><link>https://e.org/1</link>"
    "<description>&lt;p&gt;One &lt;b&gt;two&lt;/b&gt;&lt;/p&gt;&lt;script&gt;alert(1)&lt;/script&gt;</description>"
    "<dc:creator>Ann Lee</dc:creator>{when}</item>"
)


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("rss", ITEM.format(when="<pubDate>Tue, 26 May 2020 12:00:00 +0200</pubDate>")),
        ("rdf", ITEM.format(when="<dc:date>2020-05-26T12:00:00+02:00</dc:date>")),
        (
            "atom",
            "<entry><title type='html'>Caf&#233; &amp;amp; x &amp;lt; y</title><id>urn:1</id>"
            "<link href='https://e.org/1'/><summary type='html'>&lt;p&gt;One &lt;b&gt;two&lt;/b&gt;&lt;/p&gt;</summary>"
            "<author><name>Ann Lee</name></author><published>2020-05-26T10:00:00Z</published></entry>",
        ),
    ],
)
def test_any_feed_gives_words_without_markup(kind, item):
    data = feed_of(kind, item).encode()
    assert detect(data) == "feed"
    (entry,) = entries(data, "feed")
    assert (entry.title, entry.abstract, entry.authors) == ("Café & x < y", "One two", ("Ann Lee",))
    assert (entry.published, entry.links["page"]) == ("2020-05-26T10:00:00Z", "https://e.org/1")


def test_a_careless_feed_is_read_leniently_and_said_so():
    good = "<item><title>One</title><link>https://e.org/1</link></item>"
    bad = "<item><title>Two & three</title><link>https://e.org/2</link></item>"
    items = list(read(feed_of("rss", good + bad).encode(), "feed"))
    assert [item.entry.title for item in items if isinstance(item, Record)] == ["One", "Two & three"]
    assert "read leniently" in next(item.text for item in items if isinstance(item, Note))


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">'
    b'<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'
)
OUTSIDE = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY c SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("head", [BOMB, OUTSIDE], ids=["billion laughs", "external"])
@pytest.mark.parametrize("form", ["arxiv-atom", "arxiv-rss", "oai-pmh", "feed"])
def test_entities_are_never_expanded(head, form):
    body = {"arxiv-atom": ATOM, "arxiv-rss": RSS, "oai-pmh": OAI, "feed": feed_of("rss", ITEM).encode()}[form]
    body = body.partition(b"?>")[2] if body.startswith(b"<?") else body
    items = list(read(head + body.replace(b"itle>", b"itle>&c;", 1), form))
    assert [type(item) for item in items] == [Broken]
    assert "entities" in items[0].reason


def test_a_document_that_breaks_off_gives_what_came_before_and_says_so():
    cut = ATOM[: ATOM.rindex(b"<title>Old")]
    first, end = read(cut, "arxiv-atom")
    assert first.entry.arxiv == "2005.12872"
    assert isinstance(end, Broken)
    assert end.where == f"line {cut.count(10) + 1}"
    assert "after record 1" in end.reason


@pytest.mark.parametrize(
    ("form", "data", "wrong", "charset"),
    [
        ("arxiv-atom", ATOM.decode().replace("Carion", "Cárión"), "cp1252", None),
        ("arxiv-atom", ATOM.decode().replace("Carion", "Cárión").replace("UTF-8", "iso-8859-1"), "utf-8", None),
        ("arxiv-atom", ATOM.decode().replace("Carion", "Cárión").replace("UTF-8", "utf-16"), "utf-16", None),
        ("arxiv-atom", ATOM.decode().replace("Carion", "Cárión").replace('encoding="UTF-8"', ""), "koi8-r", "koi8-r"),
        ("bibtex", "@misc{a, title={T}, author={Nicolas Cárión}}", "cp1252", None),
        ("bibtex", "@misc{a, title={T}, author={Nicolas Cárión}}", "utf-8-sig", "latin-1"),
        ("ris", "TY  - JOUR\nTI  - T\nAU  - Nicolas Cárión\nER  - \n", "utf-16", None),
        ("json-lines", '{"title": "T", "authors": ["Nicolas Cárión"]}', "cp1252", None),
    ],
)
def test_a_wrong_charset_is_found_out_or_reported(form, data, wrong, charset):
    cyrillic = "\u0418\u0432\u0430\u043d"
    if wrong == "koi8-r":
        data = data.replace("Cárión", cyrillic)
    items = list(read(data.encode(wrong), form, charset=charset))
    record = next(item for item in items if isinstance(item, Record))
    assert record.entry.authors[0] == f"Nicolas {cyrillic if wrong == 'koi8-r' else 'Cárión'}"
    assert bool([item for item in items if isinstance(item, Note)]) == (wrong == "cp1252")


def test_bibtex_with_all_its_ways():
    items = list(read(BIBTEX, "bibtex"))
    first, second, third = (item.entry for item in items if isinstance(item, Record))
    assert first.title == "End-to-End DETR with $x^{2}$ and 5% École"
    assert first.authors == ("Jörg Müller", "The BIG and Co", "Łukasz Kaiser")
    assert (first.arxiv, first.published, first.venue) == ("2005.12872", "2020-05-01", "Proc. CVPR 2020")
    assert (second.title, second.doi, second.arxiv) == ("Second", "10.1000/x_1", "1901.00001")
    assert (third.title, third.arxiv) == ("Third", None)
    left = {item.where: item.reason for item in items if isinstance(item, Skipped)}
    assert set(left) == {"line 8", "line 10", "line 11 (untitled)"}
    assert left["line 8"].startswith("is no proper BibTeX: Unexpected block start")
    assert "some junk" in left["line 10"]
    notes = " ".join(item.text for item in items if isinstance(item, Note))
    assert "'carion' was used before" in notes
    assert "title twice" in notes


def test_ris_with_lines_that_go_on_and_a_record_without_end():
    items = list(read(RIS, "ris"))
    first, second = (item.entry for item in items if isinstance(item, Record))
    assert first.title == "A long title that goes on"
    assert first.authors == ("Jörg Müller", "Ann Lee Jr.")
    assert (first.published, first.doi, first.arxiv) == ("2020-05-26", "10.1000/abc", "2005.12872")
    assert first.categories == ("one", "two")
    assert (second.title, second.published) == ("No end", "2019")
    assert [item for item in items if isinstance(item, Skipped)] == [
        Skipped("line 1", "outside of a record: junk before"),
        Skipped("line 18", "has no title"),
    ]
    assert [item.where for item in items if isinstance(item, Note)] == ["line 15"]


def test_ris_reads_like_rispy():
    rispy = pytest.importorskip("rispy")
    text = (
        RIS.decode()
        .replace("junk before\n", "")
        .replace("\n      that", " that")
        .replace("2019\nTY", "2019\nER  -\nTY")
    )
    theirs = [item.get("title") or item.get("primary_title") for item in rispy.loads(text.replace("ER  -", "ER  - "))]
    assert [entry.title for entry in entries(text.encode(), "ris")] == theirs[:2]


ABSTRACT = (
    "Large models are trained on much data, and nobody knows why. We study this in detail, with many experiments on "
    "three data sets, and find that a simple rule explains most of it. Code is available. "
) * 2
PAGE = f"""Daily Papers

Get trending papers in your email inbox once a day!
by AK and the research community

Nov 22, 2026

Immiscible Diffusion: Accelerating Training with Noise Assignment

{ABSTRACT}

arXiv:2406.12303v2

42 upvotes
A Title without an Abstract

Convergent Learning: Do Different Networks
Learn the Same Representations?
{ABSTRACT}

{ABSTRACT}

Privacy in Terms of News Comments
{ABSTRACT}

Previous
"""


def test_a_saved_page_gives_its_papers_and_names_every_other_line():
    items = list(read(PAGE.encode(), "text"))
    records = [item for item in items if isinstance(item, Record)]
    assert [(record.entry.title, bool(record.entry.abstract)) for record in records] == [
        ("Immiscible Diffusion: Accelerating Training with Noise Assignment", True),
        ("A Title without an Abstract", False),
        ("Convergent Learning: Do Different Networks Learn the Same Representations?", True),
        ("Privacy in Terms of News Comments", True),
    ]
    assert records[0].entry.arxiv == "2406.12303"
    assert records[0].entry.abstract == " ".join(ABSTRACT.split())
    assert len(records[2].entry.abstract) == 2 * len(ABSTRACT.strip()) + 1
    assert {record.day for record in records} == {"2026-11-22"}
    left = [item for item in items if isinstance(item, Skipped)]
    assert [item.where for item in left] == ["line 1", "line 3", "line 4", "line 6", "line 14", "line 26"]
    (note,) = (item for item in items if isinstance(item, Note))
    assert note.where == "line 21"
    # Every line that says something is in a paper, or was named.
    taken = " ".join(f"{record.entry.title} {record.entry.abstract} arXiv:2406.12303v2" for record in records)
    named = {int(item.where.removeprefix("line ")) for item in left}
    for number, line in enumerate(PAGE.splitlines(), 1):
        assert (" ".join(line.split()) in taken) != (number in named) or not line.strip()


@pytest.mark.parametrize("width", [None, 60, 90])
@pytest.mark.parametrize("between", ["\n\n", "\n"])
def test_a_page_of_the_fifty_gives_the_fifty(width, between):
    import textwrap

    cards = list(papers().values())
    body = [" ".join(card.sections["Idea"].split()) for card in cards]
    kept = [textwrap.fill(text, width, break_long_words=False) if width else text for text in body]
    page = "Daily Papers\n\nNov 22, 2026\n\n" + "\n\n".join(
        f"{card.title}{between}{text}" for card, text in zip(cards, kept, strict=True)
    )
    items = list(read(page.encode(), "text"))
    told = {item.entry.title: item.entry.abstract for item in items if isinstance(item, Record)}
    wanted = {card.title: " ".join(text.split()) for card, text in zip(cards, kept, strict=True)}
    if between == "\n" and width:
        # A title that fills its line like the first of a paragraph cannot be told; that it was guessed is said.
        missed = [title for title in wanted if title not in told]
        notes = [item for item in items if isinstance(item, Note)]
        assert len(missed) <= 2
        assert len(notes) >= len(missed)
        assert len(told) == len(cards) - len(missed)
    else:
        assert told == wanted


def test_a_wrapped_abstract_is_no_title_and_abstract():
    import textwrap

    page = "A Short Title\n\n" + textwrap.fill(ABSTRACT, 79) + "\n\nAnother: The Title\n" + textwrap.fill(ABSTRACT, 79)
    for text in (page, page.replace("\n", "\r\n")):
        first, second = entries(text.encode(), "text")
        assert (first.title, second.title) == ("A Short Title", "Another: The Title")
        assert first.abstract == second.abstract == " ".join(ABSTRACT.split())


entry_texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30)


@settings(deadline=None, max_examples=50)
@given(
    st.builds(
        Entry,
        title=entry_texts.filter(str.strip).filter(lambda text: any(map(str.isprintable, text.strip()))),
        abstract=entry_texts,
        authors=st.lists(entry_texts.filter(str.strip), max_size=3).map(tuple),
        arxiv=st.sampled_from([None, "2005.12872", "hep-th/9901001"]),
        doi=st.sampled_from([None, "10.1000/182"]),
        slug=st.sampled_from([None, "group-detr"]),
        published=st.sampled_from([None, "2020", "2020-05-26", "2020-05-26T17:06:38Z"]),
        signals=st.dictionaries(st.sampled_from(["upvotes", "stars"]), st.integers(0, 9)),
        extra=st.dictionaries(st.sampled_from(["note", "tldr"]), entry_texts.filter(bool)),
    )
)
def test_json_lines_of_entries_come_back_as_they_were(entry):
    line = json.loads(entry.to_json()) | {"key": "x", "day": "2020-05-27", "source": "arxiv"}
    (record,) = read(json.dumps(line).encode(), "json-lines")
    assert record.entry == Entry.from_json(entry.to_json())
    assert (record.day, record.source, record.raw) == ("2020-05-27", "arxiv", None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"title": "T"', "no JSON"), ("[1]", "no object"), ('{"title": 3}', "title is no text but 3"),
        ('{"title": " "}', "no title"), ('{"abstract": "x"}', "no title"),
        ('{"title": "T", "arxiv": "12"}', "no arXiv id"), ('{"title": "T", "authors": 4}', "authors are no list"),
        ('{"title": "T", "signals": {"stars": NaN}}', "no number"),
        ('{"title": "T", "signals": {"stars": 1e999}}', "no number"),
        ('{"title": "%s"}' % ("x" * 2001), "2,001 characters"),
        ("[" * 100_000, "nested too deeply"), ('{"title": "T", "signals": {"n": %s}}' % ("9" * 5000), "no JSON"),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_bad_line_is_named_and_the_others_are_read(line, says):
    data = f'{{"title": "Before"}}\n{line}\n\n{{"title": "After \\ud800\\u0000"}}\n'.encode()
    for items in (list(read(data, "json-lines")), list(read_lines(io.BytesIO(data)))):
        assert [item.entry.title for item in items if isinstance(item, Record)] == ["Before", "After"]
        (left,) = (item for item in items if isinstance(item, Skipped))
        assert left.where == "line 2"
        assert says in left.reason


def test_arxivs_own_dump_is_read():
    line = {
        "id": "0704.0001", "authors": "C. Balázs, E. Berger", "title": "A\n  title", "categories": "hep-ph cs.LG",
        "doi": "10.1103/PhysRevD.76.013009", "abstract": "  A. ", "journal-ref": None,
        "versions": [{"version": "v1", "created": "Mon, 2 Apr 2007 19:18:42 GMT"}],
        "authors_parsed": [["Balázs", "C.", ""], ["Berger", "E.", ""]],
    }  # fmt: skip
    (entry,) = entries(json.dumps(line).encode(), "json-lines")
    assert (entry.arxiv, entry.authors, entry.published) == (
        "0704.0001",
        ("C. Balázs", "E. Berger"),
        "2007-04-02T19:18:42Z",
    )
    assert entry.categories == ("hep-ph", "cs.LG")


SAMPLES = {
    "arxiv-atom": ATOM, "arxiv-rss": RSS, "oai-pmh": OAI, "feed": feed_of("rss", ITEM.format(when="")).encode(),
    "daily-papers": DAILY, "semantic-scholar": SCHOLAR, "json-lines": b'{"title": "T"}\n{"title": "U"}\n',
    "bibtex": BIBTEX, "ris": RIS, "text": PAGE.encode(),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_told_by_its_content_and_its_records_read_alone(form):
    data = SAMPLES[form]
    assert detect(data) == form
    records = found(data, form)
    assert records
    for record in records:
        if record.raw is not None:
            assert parse_record(record.form, record.raw) == record.entry
    assert [record.raw is None for record in records] == [form == "json-lines"] * len(records)


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_says_something_else_is_refused(form):
    for ending, forms in ENDINGS.items():
        if form in forms:
            assert detect(SAMPLES[form], f"x{ending}") == form
        else:
            with pytest.raises(UserError, match="is not what its name says"):
                detect(SAMPLES[form], f"x{ending}")
    assert detect(SAMPLES[form], "x.txt") == form


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"%PDF-1.7 ...", "a PDF"), (gzip.compress(b"x"), "gzip"), (b"SQLite format 3\0", "SQLite"),
        (b"PK\3\4xx", "zip"),
        (b"", "empty"), (b" \n", "empty"), (b"a\0b", "not text"), (b"<!DOCTYPE html><html><p>x", "a web page"),
        (b"<html><body>", "a web page"), (b"<svg/>", "first element is <svg>"), (b"{oops", "begins like JSON"),
        (b'{"a": 1}', "no papers"), (b'[{"a": 1}]', "no papers"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_papers_is_said_clearly(data, says):
    if says == "no papers" and data.startswith(b"{"):
        (left,) = read(data, detect(data))
        assert left.reason == "has no title"
        return
    with pytest.raises(UserError, match=says):
        detect(data, "x.dat")


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(FORMS)))
def test_no_bytes_make_a_reader_fail(data, form):
    for item in read(data, form):
        assert isinstance(item, Record | Skipped | Note)


@settings(deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_no_damage_makes_a_reader_fail(data, form):
    sample = SAMPLES[form]
    at = data.draw(st.integers(0, len(sample)))
    wound = data.draw(st.binary(max_size=8))
    for item in read(sample[:at] + wound + sample[at + data.draw(st.integers(0, 30)) :], form):
        assert isinstance(item, Record | Skipped | Note)


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2020", "2020"), ("2020-05-26", "2020-05-26"), ("2020-05-26T12:00:00+02:00", "2020-05-26T10:00:00Z"),
        ("2020-05-26T12:00:00", "2020-05-26T12:00:00Z"), ("2020-13-01", None), ("999", None), ("soon", None),
        ("", None), ("0001-01-01T00:00:00+14:00", None),
    ],
)  # fmt: skip
def test_dates_are_utc(text, date):
    assert plain_date(text) == date


def test_what_steers_a_terminal_or_turns_text_around_is_taken_out():
    record = {
        "title": "Red \x1b[31m \x9b31m\x85words",
        "abstract": "\u202eturned \u2066round\u2069",
        "authors": ["A\x07"],
    }
    (item,) = [item for item in read(json.dumps(record).encode(), "json-lines") if isinstance(item, Record)]
    assert item.entry.title == "Red [31m 31m words"
    assert item.entry.abstract == "turned round"
    assert item.entry.authors == ("A",)
