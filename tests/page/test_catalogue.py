import json
import re
from pathlib import Path

import pytest

from counterproof.errors import UserError
from counterproof.page.catalogue import ROOMS, CardError, find_paper, papers, read_card

CARD = """---
slug: a-paper
title: "A paper"
year: 2024
arxiv: "2401.00001"
room: rewards
tags: [one, two, three]
status: planned
summary: It does something.
---

## Idea
Words.

## What the paper reports
- Nothing.

## How it is used here
Not yet.

## Limits
- Many.

## Sources
- None.
"""


@pytest.fixture
def card(tmp_path):
    def card(old="", new="", name="a_paper.md"):
        assert old in CARD
        path = tmp_path / name
        path.write_text(CARD.replace(old, new, 1) if old else CARD)
        return read_card(path, "somewhere")

    return card


def test_every_card_follows_the_schema_and_is_complete():
    for paper in papers().values():
        assert paper.summary.endswith("."), paper.slug
        assert all(tag == tag.lower() for tag in paper.tags), paper.slug
        if paper.status == "planned":
            assert "```" not in paper.sections["How it is used here"], f"{paper.slug} shows code that is not there"
        words = len(paper.sections["Idea"].split())
        assert 40 <= words <= 160, f"{paper.slug}: the idea has {words} words"
        if paper.arxiv and re.match(r"\d{4}\.", paper.arxiv):
            assert paper.year == 2000 + int(paper.arxiv[:2]), paper.slug


def test_every_room_has_papers():
    assert {paper.room for paper in papers().values()} == set(ROOMS)


def test_titles_and_ids_are_distinct():
    everything = list(papers().values())
    assert len({paper.title for paper in everything}) == len(everything)
    ids = [paper.arxiv for paper in everything if paper.arxiv]
    assert len(set(ids)) == len(ids)


def test_a_card_is_read(card):
    paper = card()
    assert paper.slug == "a-paper"
    assert paper.sections["Limits"] == "- Many."
    assert paper.module == "somewhere.a_paper"
    assert paper.claims == ()
    json.dumps(paper.as_json())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nslug", "slug", "a_paper.md:1: a card begins with front matter"),
        ("tags: [one, two, three]", "tags: [one", "a_paper.md:8: not YAML"),
        ("slug: a-paper", "slug: another", "a_paper.md:2: slug: expected 'a-paper'"),
        ("year: 2024", "year: soon", "a_paper.md:4: year: expected int, not 'soon'"),
        ("year: 2024", "year: 3024", "a_paper.md:4: year: expected a year"),
        ("room: rewards", "room: kitchen", "a_paper.md:6: room: expected one of detection"),
        ("status: planned", "status: done", "a_paper.md:8: status: expected runs or planned"),
        ("three]", "three, 4]", "a_paper.md:7: tags: expected 3 to 6 words"),
        (", three]", "]", "a_paper.md:7: tags: expected 3 to 6 words"),
        ("It does something.", "x" * 161, "a_paper.md:9: summary: expected at most 160 characters"),
        ('"2401.00001"', "2401.00001", "a_paper.md:5: arxiv: expected text in quotes"),
        ('"2401.00001"', '"2401.00001v2"', "a_paper.md:5: arxiv: expected an arXiv id without version"),
        ("status: planned", "mood: good\nstatus: planned", "a_paper.md:8: mood: expected one of slug"),
        ("## Limits\n- Many.\n\n", "", "sections Idea, What the paper reports"),
        ("- Many.\n", "", "the section 'Limits' is empty"),
    ],
)
def test_a_card_that_does_not_follow_the_schema_is_named_with_its_line(card, old, new, message):
    with pytest.raises(CardError, match=re.escape(message)):
        card(old, new)


def test_claims_that_cannot_be_imported_are_named(tmp_path):
    runs = CARD.replace("status: planned", "status: runs").replace(
        "## Limits", "## What was measured here\nIt.\n\n## Deviations\nNone.\n\n## Limits"
    )
    (tmp_path / "a_paper.md").write_text(runs)
    paper = read_card(tmp_path / "a_paper.md", "nowhere.papers")
    with pytest.raises(UserError, match=r"claims of a-paper cannot be read from nowhere\.papers\.claims\.a_paper"):
        _ = paper.claims


def test_an_unknown_slug_names_the_nearest():
    with pytest.raises(UserError, match="did you mean convergent-learning"):
        find_paper("convergant-learning")


def test_cards_are_in_our_own_words():
    """No card holds a long run of words of the briefs or abstracts it was written from, where those are at hand."""
    briefs = Path(__file__).parents[3] / "shared" / "papers"
    if not briefs.is_dir():
        pytest.skip("the briefs are not on this machine")
    run = 14
    for paper in papers().values():
        source = briefs / f"{paper.slug}.md"
        if not source.exists():
            continue
        words = re.findall(r"[a-z]+", source.read_text().lower())
        taken = {tuple(words[i : i + run]) for i in range(len(words) - run)}
        body = re.findall(r"[a-z]+", " ".join(list(paper.sections.values())[:-1]).lower())
        shared = [" ".join(body[i : i + run]) for i in range(len(body) - run) if tuple(body[i : i + run]) in taken]
        assert not shared, f"{paper.slug}: {shared[0]}"
