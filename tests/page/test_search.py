import pytest

from counterproof.page.catalogue import papers
from counterproof.page.search import search

EVERYTHING = list(papers().values())


@pytest.mark.parametrize("paper", EVERYTHING, ids=lambda paper: paper.slug)
def test_a_paper_is_found_first_by_its_title_and_by_its_slug(paper):
    assert search(paper.title, EVERYTHING)[0].paper is paper
    assert search(paper.slug, EVERYTHING)[0].paper is paper


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("group dter", "group-detr"),
        ("immisible difusion", "immiscible-diffusion"),
        ("convergnt lerning", "convergent-learning"),
        ("regret prefrence", "regret-preference"),
        ("weak to strong deceptoin", "weak-to-strong-deception"),
    ],
)
def test_typos_are_forgiven(query, slug):
    assert slug in [hit.paper.slug for hit in search(query, EVERYTHING)[:3]]


def test_inflections_and_beginnings_match():
    slugs = {hit.paper.slug for hit in search("detectors", EVERYTHING)}
    assert "group-detr" in slugs
    assert {hit.paper.slug for hit in search("rewar", EVERYTHING)} >= {"reward-ensembles", "regret-preference"}


def test_papers_with_all_words_come_first():
    hits = search("reward ensembles", EVERYTHING)
    assert hits[0].paper.slug == "reward-ensembles"
    assert [hit.paper.slug for hit in hits].count("reward-ensembles") == 1


@pytest.mark.parametrize("query", ["", "  ", "???", '"', "AND OR NOT", "a* OR (b", "NEAR(x y)", "slug:x", "ü", "-"])
def test_any_text_is_a_query(query):
    search(query, EVERYTHING)
    assert search(query, []) == []


def test_nothing_is_found_where_nothing_is():
    assert search("qqqqqqqq", EVERYTHING) == []
