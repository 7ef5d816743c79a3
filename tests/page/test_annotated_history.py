"""The history of ideas: credit by independent means, every check with its fault, formats, page and command line."""

# ruff: noqa: E501, RUF001 - tables of faults, one a line; dashes that LaTeX spells out

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import networkx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.bench.task import Trial
from counterproof.cli import cli
from counterproof.errors import UserError
from counterproof.page.annotated_history import (
    Edge,
    Event,
    History,
    Source,
    acceleration,
    backward_credit,
    credit,
    random_milestones,
    selected_milestones,
)
from counterproof.page.catalogue import papers
from counterproof.page.claims import annotated_history as claims
from counterproof.page.history_checks import RULES
from counterproof.page.history_data import HistoryError, Records, Work, read_history, read_when
from counterproof.page.history_formats import from_bibtex, from_csl, import_bibliography, to_bibtex, to_yaml
from counterproof.page.history_views import choose_events, reference, roots_json, roots_text, timeline_html


def make(shares, years=None, annotators=("ann",)):
    """A history of e0, e1, ... from {(later, earlier): share or shares by annotator}."""
    count = 1 + max((max(pair) for pair in shares), default=0)
    events = tuple(
        Event(
            f"e{i}",
            read_when(years[i] if years else 1900 + i),
            f"Event {i}",
            "theory",
            "Said.",
            ("P",),
            (Source("w", ""),),
        )
        for i in range(count)
    )
    edges = []
    for (later, earlier), share in shares.items():
        for who, one in zip(annotators, share if isinstance(share, tuple) else (share,)):
            if one:
                edges.append(Edge(f"e{later}", f"e{earlier}", "uses", one, who, "because"))
    return History.of(Records(events=events, edges=tuple(edges), works=(Work("w", "Work", 1900),)))


def random_history(rng, count=8):
    shares = {}
    for later in range(1, count):
        chosen = [i for i in range(later) if rng.random() < 0.4]
        if chosen:
            parts = rng.dirichlet(np.ones(len(chosen) + 1))
            shares.update({(later, earlier): float(p) for earlier, p in zip(chosen, parts)})
    if count - 1 not in {later for later, _ in shares}:
        shares[count - 1, 0] = 0.5
    return make(shares)


def paths(history, start, end):
    """Products of shares over all paths, by enumeration."""
    if start == end:
        return [1.0]
    return [
        edge.share * rest for edge in history.edges if edge.later == start for rest in paths(history, edge.earlier, end)
    ]


SHIPPED = History.shipped()

# --- credit


def test_credit_equals_the_enumeration_of_all_paths():
    rng = np.random.default_rng(0)
    for _ in range(200):
        history = random_history(rng)
        roots = {"e7": 0.7, "e5": 0.3}
        found = credit(history, roots)
        for row in found.table:
            expected = sum(weight * sum(paths(history, root, row.id)) for root, weight in roots.items())
            assert row.reach == pytest.approx(expected, abs=1e-12)
            own = 1 - sum(edge.share for edge in history.edges if edge.later == row.id)
            assert row.kept == pytest.approx(own * expected, abs=1e-12)
            strongest = max((w * p for root, w in roots.items() for p in paths(history, root, row.id)), default=0)
            assert row.path_share == pytest.approx(strongest, abs=1e-12)


def test_the_strongest_path_has_the_product_it_says():
    rng = np.random.default_rng(1)
    for _ in range(50):
        history = random_history(rng)
        shares = {(edge.later, edge.earlier): edge.share for edge in history.edges}
        for row in history.ancestors("e7", samples=0):
            assert row.path[0] == "e7"
            assert row.path[-1] == row.id
            product = math.prod(shares[pair] for pair in zip(row.path, row.path[1:]))
            assert row.path_share == pytest.approx(product)
            assert product == pytest.approx(max(paths(history, "e7", row.id)))
            assert history.path("e7", row.id) == (row.path, pytest.approx(product))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
def test_what_is_kept_sums_to_the_weights(seed, count):
    rng = np.random.default_rng(seed)
    history = random_history(rng, count)
    roots = {f"e{i}": float(rng.random()) for i in range(count)}
    for equal in (False, True):
        found = credit(history, roots, equal=equal)
        assert sum(row.kept for row in found.table) == pytest.approx(sum(roots.values()), abs=1e-12)


def test_credit_is_linear_in_the_weights():
    history = random_history(np.random.default_rng(2), 20)
    a, b = credit(history, {"e19": 1.0}), credit(history, {"e15": 1.0})
    for row in credit(history, {"e19": 0.3, "e15": 2.0}).table:
        assert row.kept == pytest.approx(0.3 * a[row.id].kept + 2.0 * b[row.id].kept, abs=1e-12)


def test_the_sweep_is_the_gradient_of_the_linear_value():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    history = random_history(rng, 15)
    graph = history.graph
    base = torch.zeros(15, dtype=torch.float64, requires_grad=True)
    values = []
    for i in range(15):
        value = base[i]
        for e in np.flatnonzero(graph.later == i):
            value = value + graph.share[e] * values[graph.earlier[e]]
        values.append(value)
    weights = rng.random(15)
    sum(w * v for w, v in zip(weights, values)).backward()
    found = backward_credit(graph.later, graph.earlier, graph.share, weights)
    np.testing.assert_allclose(found, base.grad.numpy(), atol=1e-12)
    shares = torch.tensor(graph.share, requires_grad=True)
    assert (
        backward_credit(graph.later, graph.earlier, graph.share.astype(np.float32), weights.astype(np.float32)).dtype
        == np.float32
    )
    assert shares.grad is None


def test_an_event_that_owes_nothing_keeps_everything():
    history = make({(1, 0): 0.5, (2, 1): 0.5})
    assert credit(history, {"e0": 1.0})["e0"].kept == 1.0
    assert credit(history, {"e0": 1.0})["e1"].kept == 0.0


def test_a_chain_of_halves_is_a_geometric_series():
    found = credit(make({(i + 1, i): 0.5 for i in range(9)}), {"e9": 1.0})
    for i in range(1, 10):
        assert found[f"e{i}"].kept == pytest.approx(0.5 ** (10 - i))
    assert found["e0"].kept == pytest.approx(0.5**9)


def test_equal_shares_on_a_tree_are_products_along_the_branch():
    # e6 has two roots, e5 three, the rest none.
    history = make({(6, 5): 0.9, (6, 4): 0.05, (5, 0): 0.1, (5, 1): 0.1, (5, 2): 0.1, (4, 3): 0.2})
    found = credit(history, {"e6": 1.0}, equal=True)
    assert found["e5"].reach == pytest.approx(1 / 3)
    assert found["e0"].reach == pytest.approx(1 / 3 / 4)
    assert found["e3"].kept == pytest.approx(1 / 3 / 2)
    assert found["e6"].kept == pytest.approx(1 / 3)


def test_shares_of_one_count_paths_as_networkx_does():
    rng = np.random.default_rng(4)
    graph = networkx.gnp_random_graph(12, 0.4, seed=4, directed=True)
    edges = [(max(a, b), min(a, b)) for a, b in graph.edges if a != b]
    later, earlier = np.array(sorted(set(edges))).T
    weights = np.zeros(12)
    weights[11] = 1.0
    found = backward_credit(later, earlier, np.ones(len(later)), weights)
    made = networkx.DiGraph(list(zip(later.tolist(), earlier.tolist())))
    made.add_nodes_from(range(12))
    for i in range(11):
        assert found[i] == sum(1 for _ in networkx.all_simple_paths(made, 11, i))
    assert rng is not None


def test_leaving_an_event_out_conserves_credit_and_moves_it_to_its_roots_and_followers():
    rng = np.random.default_rng(5)
    for _ in range(40):
        history = random_history(rng, 10)
        before = credit(history, {"e9": 1.0})
        smaller = history.without("e5")
        after = credit(smaller, {"e9": 1.0})
        assert sum(row.kept for row in after.table) == pytest.approx(1.0, abs=1e-12)
        followers = {edge.later for edge in history.edges if edge.earlier == "e5"}
        for row in after.table:
            assert row.reach == pytest.approx(before[row.id].reach, abs=1e-12)
            if row.id not in followers:
                assert row.kept == pytest.approx(before[row.id].kept, abs=1e-12)
        gained = sum(after[one].kept - before[one].kept for one in followers)
        assert gained == pytest.approx(before["e5"].kept, abs=1e-12)


def test_descendants_rest_on_an_event_as_credit_says():
    history = random_history(np.random.default_rng(6), 12)
    for name, share in history.descendants("e2"):
        assert share == pytest.approx(credit(history, {name: 1.0})["e2"].reach)
    below = {name for name, _ in history.descendants("e2")}
    assert below == networkx.ancestors(history.to_networkx(), "e2")


def test_several_annotators_are_averaged_and_silence_is_zero():
    history = make({(2, 0): (0.2, 0.6), (2, 1): (0.5, 0)}, annotators=("ann", "bob"))
    graph = history.graph
    assert dict(zip(graph.earlier.tolist(), graph.share)) == pytest.approx({0: 0.4, 1: 0.25})
    assert dict(zip(graph.earlier.tolist(), graph.spread)) == pytest.approx({0: 0.2, 1: 0.25})
    assert graph.own[2] == pytest.approx(0.35)
    only_people = credit(history, {"e2": 1.0}, samples=400, jitter=0.0)["e1"]
    assert (only_people.low, only_people.high) == pytest.approx((0.0, 0.5))
    alone = credit(make({(1, 0): 0.4}), {"e1": 1.0}, samples=50, jitter=0.0)["e0"]
    assert (alone.low, alone.kept, alone.high) == pytest.approx((0.4, 0.4, 0.4))


def test_intervals_come_from_the_jitter_and_repeat():
    history = random_history(np.random.default_rng(7), 12)
    one, again = (credit(history, {"e11": 1.0}, samples=300, seed=3) for _ in range(2))
    assert one == again
    assert one != credit(history, {"e11": 1.0}, samples=300, seed=4)
    for row in one.table:
        assert 0 <= row.low <= row.high <= 1
        assert 1 <= row.rank_low <= row.rank_high <= 12
    wide = credit(history, {"e11": 1.0}, samples=300, jitter=1.0)
    narrow = credit(history, {"e11": 1.0}, samples=300, jitter=0.1)
    assert sum(r.high - r.low for r in narrow.table) < 0.4 * sum(r.high - r.low for r in wide.table)
    # Log-normal shares of a single edge: quantiles have a closed form.
    single = credit(make({(1, 0): 0.3}), {"e1": 1.0}, samples=20_000)["e0"]
    for value, z in ((single.low, -1.96), (single.high, 1.96)):
        odds = 0.3 / 0.7 * math.exp(z * 0.5 * math.sqrt(2))
        assert value == pytest.approx(odds / (1 + odds), abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: credit(h, {"e99": 1.0}), "no event 'e99'"),
        (lambda h: credit(h, {"e1": -1.0}), "the weight of e1"),
        (lambda h: credit(h, {"e1": math.nan}), "the weight of e1"),
        (lambda h: credit(h, {"e1": 1.0}, samples=-1), "samples -1"),
        (lambda h: credit(h, {"e1": 1.0}, level=1.0), "level 1.0"),
        (lambda h: h.path("e0", "e1"), "nothing leads from e0 back to e1"),
        (lambda h: h.ancestors("e77"), "no event 'e77'"),
        (lambda h: h.lint(run=1), "run is a number of words"),
        (lambda h: backward_credit(np.array([0]), np.array([1]), np.ones(1), np.ones(2)), "which is not earlier"),
        (lambda h: backward_credit(np.array([5]), np.array([1]), np.ones(1), np.ones(2)), "roots has 2"),
        (lambda h: backward_credit(np.array([1]), np.array([0]), np.ones(2), np.ones(2)), "different edges"),
    ],
)
def test_bad_calls_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(make({(1, 0): 0.5}))


# --- reading


@pytest.mark.parametrize(
    ("value", "start", "end", "circa"),
    [
        (1958, 1958, 1958, False),
        ("circa 1800", 1800, 1800, True),
        ("ca. 1800", 1800, 1800, True),
        ("1795..1805", 1795, 1805, False),
        (-300, -300, -300, False),
        ("300 BC", -300, -300, False),
        ("300 BC..100", -300, 100, False),
        ("13.8e9 years ago", 2000 - 13.8e9, 2000 - 13.8e9, False),
        ("about 5000 years ago", -3000, -3000, True),
    ],
)
def test_years_are_read(value, start, end, circa):
    when = read_when(value)
    assert (when.start, when.end, when.circa) == (start, end, circa)


def test_years_sort():
    order = ["13.8e9 years ago", "5000 years ago", "300 BC", "1795..1805", "circa 1800", 1958]
    assert sorted(order, key=lambda one: read_when(one).start) == order


@pytest.mark.parametrize(
    "value", [None, True, 3.5, "unknown", "", "1805..1795", "19th century", "x years ago", "1..2..3"]
)
def test_a_year_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"expected a year|ends before it begins"):
        read_when(value)


GOOD = """
annotator: ann
works:
  one: {authors: [A. One], title: First work, year: 1950}
  two: {title: Second work, year: 1960, doi: 10.1000/182}
events:
  - id: first-1950
    year: 1950
    title: The first
    kind: theory
    people: [A. One]
    text: Something was found.
    sources: {one: finds it}
  - id: second-1960
    year: 1960
    title: The second
    kind: system
    text: Something was built.
    sources: {two: builds it}
    disputes:
      - question: Who built it?
        sides:
          - {by: Two, claim: we did, sources: [two]}
          - {by: One, claim: they did not, sources: [one]}
    roots:
      - {to: first-1950, relation: uses, share: 0.5, because: it does}
"""


@pytest.fixture
def folder(tmp_path):
    def folder(old="", new="", text=GOOD, name="history.yaml"):
        assert old in text
        path = tmp_path / "mine"
        path.mkdir(exist_ok=True)
        (path / name).write_text(text.replace(old, new, 1) if old else text)
        return path

    return folder


def test_a_clean_history_gives_no_finding(folder):
    history = History.load(folder())
    assert history.lint({"some text": "nothing that is in there"}) == []
    assert list(history.events) == ["first-1950", "second-1960"]
    assert history.events["second-1960"].status == "disputed"
    assert history.edges[0].annotator == "ann"
    assert history.edges[0].place.line == 26
    assert credit(history, {"second-1960": 1.0})["first-1950"].kept == 0.5


CYCLE = """roots:
  first-1950:
    - {to: second-1960, relation: uses, share: 0.1, because: a circle}
"""


@pytest.mark.parametrize(
    ("rule", "old", "new", "line", "message"),
    [
        ("time", "year: 1950\n    title", "year: 1970\n    title", 26, "which came later"),
        ("time", "year: 1950\n    title", "year: 1960\n    title", 26, "give both an order"),
        ("time", "year: 1950\n    title", "year: 1955..1965\n    title", 26, "give both an order"),
        ("cycle", "events:", CYCLE + "events:", 8, "second-1960 -> first-1950 -> second-1960 goes in a circle"),
        ("source", "    sources: {one: finds it}\n", "", 7, "first-1950 has no source"),
        ("priority", "    sources: {two: builds it}", "    secondary: {two: builds it}", 14, "no primary source"),
        (
            "priority",
            "claim: they did not, sources: [one]",
            "claim: they did not, secondary: [one]",
            21,
            "the side of One",
        ),
        ("priority", "          - {by: One, claim: they did not, sources: [one]}\n", "", 21, "one side only"),
        ("idea", "title: The second", "title: The First", 14, "shares the title 'the first'"),
        (
            "orphan",
            "    roots:\n      - {to: first-1950, relation: uses, share: 0.5, because: it does}\n",
            "",
            7,
            "first-1950",
        ),
        ("share", "share: 0.5", "share: 1.5", 26, "lies in (0, 1], not 1.5"),
        ("share", "share: 0.5", "share: 0", 26, "lies in (0, 1], not 0"),
        ("key", "sources: {one: finds it}", "sources: {won: finds it}", 7, "refers to 'won'"),
        ("key", "to: first-1950", "to: frist-1950", 26, "'frist-1950', which is not there"),
        ("key", "works:\n", "works:\n  three: {title: Third}\n", 4, "no event refers to the work 'three'"),
        ("text", "    text: Something was found.\n", "", 7, "has no text"),
        ("text", "text: Something was found.", "text: " + 150 * "found ", 7, "characters, over 600"),
        ("text", "because: it does", "because: ''", 26, "no evidence"),
    ],
)
def test_lint_finds_the_fault_with_file_and_line(folder, rule, old, new, line, message):
    findings = [one for one in History.load(folder(old, new)).lint() if one.rule == rule]
    assert findings
    assert any(
        message in one.message and (one.place.file, one.place.line) == ("mine/history.yaml", line) for one in findings
    ), [str(one) for one in findings]


def test_every_rule_has_a_fault_above_or_below():
    marks = test_lint_finds_the_fault_with_file_and_line.pytestmark[0].args[1]
    assert {rule for rule, *_ in marks} | {"copied"} == set(RULES)


def test_lint_finds_shares_that_sum_to_more_than_one(folder):
    more = (
        "\n      - {to: zero-1940, relation: uses, share: 0.6, because: too much}"
        "\n  - {id: zero-1940, year: 1940, title: Z, kind: theory, text: t, sources: {one: x}}"
    )
    history = History.load(folder("because: it does}", "because: it does}" + more))
    assert [one.rule for one in history.lint()] == ["share"]
    with pytest.raises(UserError, match=r"mine/history.yaml:27: the shares that ann gave for second-1960 sum to 1\.1"):
        _ = history.graph


def test_lint_finds_sentences_of_a_source(folder):
    history = History.load(folder())
    assert [one.rule for one in history.lint({"book": "And then: Something was found!"}, run=3)] == ["copied"]
    assert history.lint({"book": "Something was lost. found."}, run=3) == []


def test_one_idea_needs_an_edge_that_says_how(folder):
    text = GOOD.replace("kind: theory", "kind: theory\n    idea: x").replace(
        "kind: system", "kind: system\n    idea: x"
    )
    assert [one.rule for one in History.load(folder(text=text)).lint()] == ["idea"]
    told = folder(text=text.replace("relation: uses", "relation: re-invents"))
    assert History.load(told).lint() == []


def test_equal_years_are_allowed_with_an_order(folder):
    text = GOOD.replace("year: 1950\n    title", "year: 1960\n    order: 2\n    title")
    for order, found in ((5, []), (2, ["time"]), (1, ["time"])):
        path = folder(
            text=text.replace(
                "year: 1960\n    title: The second", f"year: 1960\n    order: {order}\n    title: The second"
            )
        )
        assert [one.rule for one in History.load(path).lint()] == found


def test_a_cycle_is_named_also_by_the_graph(folder):
    history = History.load(folder("events:", CYCLE + "events:"))
    with pytest.raises(UserError, match=re.escape("second-1960 -> first-1950 -> second-1960 goes in a circle")):
        _ = history.graph
    selfish = History.load(folder("to: first-1950", "to: second-1960"))
    assert "cycle" in {one.rule for one in selfish.lint()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[A. One], title", "[A. One, title", "mine/history.yaml:4: not YAML"),
        ("year: 1950\n    title", "year: unknown\n    title", "mine/history.yaml:8: first-1950: year: expected a year"),
        ("kind: theory", "kind: gossip", "mine/history.yaml:10: first-1950: kind: expected one of mathematics"),
        ("relation: uses", "relation: copies", "mine/history.yaml:26: relation: expected one of uses"),
        ("share: 0.5", "share: half", "mine/history.yaml:26: share is a number, not 'half'"),
        ("share: 0.5", "share: .nan", "mine/history.yaml:26: share is a number"),
        ("    people: [A. One]", "    mood: [A. One]", "mine/history.yaml:11: an event has no 'mood'"),
        ("    people: [A. One]", "    people: A. One", "mine/history.yaml:11: people is a list"),
        ("    title: The first\n", "", "mine/history.yaml:7: an event lacks 'title'"),
        ("    title: The first\n", "    title: The first\n    title: The last\n", "10: the key 'title' stands here twice"),
        ("title: The first", "title: 1984", "mine/history.yaml:9: title is text (in quotes), not 1984"),
        ("doi: 10.1000/182", "doi: '182'", "mine/history.yaml:5: a DOI looks like"),
        ("id: first-1950", "id: First 1950", "mine/history.yaml:7: an id is lower-case words"),
        ("id: second-1960", "id: first-1950", "mine/history.yaml:14: the event 'first-1950' is already in mine/history.yaml:7"),
        ("annotator: ann", "annotator: ''", "mine/history.yaml:26: whose judgement"),
        ("year: 1950}", "year: long ago}", "mine/history.yaml:4: the year of a work"),
        ("annotator: ann", "annotator: ann\nextra: 1", "mine/history.yaml:3: a file has no 'extra'"),
        ("title: The first", "title: \x00", "mine/history.yaml:9: not YAML"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_file_and_line(folder, old, new, message):
    with pytest.raises(HistoryError, match=re.escape(message)):
        History.load(folder(old, new))


def test_folders_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(HistoryError, match=r"holds no \.yaml file"):
        History.load(tmp_path)
    with pytest.raises(HistoryError, match="there is no folder"):
        History.load(tmp_path / "nowhere")
    (tmp_path / "a.yaml").write_bytes(b"annotator: \xff\n")
    with pytest.raises(HistoryError, match=r"a\.yaml:1: not UTF-8"):
        History.load(tmp_path)


def test_an_event_in_two_folders_is_refused(folder, tmp_path):
    one = folder()
    other = tmp_path / "other"
    shutil.copytree(one, other)
    with pytest.raises(UserError, match=r"the event 'first-1950' is already in mine/history\.yaml:7"):
        History.load(one, other)


def test_another_annotator_judges_in_another_file(folder):
    folder(
        text="annotator: bob\nroots:\n  second-1960:\n    - {to: first-1950, relation: uses, share: 0.9, because: more}\n",
        name="bob.yaml",
    )
    history = History.load(folder())
    assert history.lint() == []
    assert history.graph.share.tolist() == pytest.approx([0.7])
    assert history.graph.spread.tolist() == pytest.approx([0.2])


# --- formats

BIB = r"""
% a comment line
@comment{jabref-meta: databaseType:bibtex;}
@string{nature = "Nature"}
@article{rumelhart:1986,
  author = {Rumelhart, David E. and Hinton, Geoffrey E. and Williams, Ronald J.},
  title = {Learning Representations by {Back-Propagating} Errors},
  journal = nature # " (London)",
  year = 1986,
  doi = {10.1038/323533a0},
}
@book{gödel_31, author = "G{\"o}del, Kurt and {\'E}. B{\'e}zout and Jean-Luc d'{\^I}le and {\O}ystein {\AA}s",
  title = "\"{U}ber $\omega$-S\"atze \& mehr --- 50\% {\ss}", publisher = "Verlag {\&} S{\o}hne", date = {1931-05}, pages = {1--20}}
@misc(openai, author = {{OpenAI and Partners} and others}, title = {A report}, year = {2023}, eprint = {2303.08774v4})
"""


def test_bibtex_is_read():
    one, two, three = from_bibtex(BIB)
    assert (one.key, one.year, one.doi, one.venue) == ("rumelhart:1986", 1986, "10.1038/323533a0", "Nature (London)")
    assert one.authors == ("David E. Rumelhart", "Geoffrey E. Hinton", "Ronald J. Williams")
    assert one.title == "Learning Representations by Back-Propagating Errors"
    assert two.authors == ("Kurt Gödel", "É. Bézout", "Jean-Luc d'Île", "Øystein Ås")
    assert two.title == "Über $\\omega$-Sätze & mehr — 50% ß"
    assert (two.year, two.venue, two.fields["pages"]) == (1931, "Verlag & Søhne", "1–20")
    assert three.authors == ("OpenAI and Partners", "others")
    assert three.arxiv == "2303.08774"
    assert one.place.line == 5


def test_bibtex_round_trip_keeps_key_authors_year_and_title(tmp_path):
    path = tmp_path / "in.bib"
    path.write_text(BIB.replace(r"$\omega$", "omega"))
    history = History.of(import_bibliography(path))
    again = from_bibtex(to_bibtex(history.works.values()))
    assert [(w.key, w.authors, w.year, w.title, w.doi, w.arxiv) for w in again] == [
        (w.key, w.authors, w.year, w.title, w.doi, w.arxiv) for w in history.works.values()
    ]
    assert history.events["rumelhart-1986"].people[0] == "David E. Rumelhart"
    assert history.events["godel-31"].when.start == 1931


def test_the_shipped_works_survive_bibtex():
    again = {work.key: work for work in from_bibtex(to_bibtex(SHIPPED.works.values()))}
    assert set(again) == set(SHIPPED.works)
    for key, work in SHIPPED.works.items():
        assert (again[key].title, again[key].authors, again[key].year) == (work.title, work.authors, work.year)


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters=","), min_size=1, max_size=8
)


@settings(max_examples=80, deadline=None)
@given(st.lists(NAMES.filter(lambda n: n.lower() != "and"), min_size=1, max_size=3), NAMES)
def test_any_names_and_titles_survive_bibtex(authors, title):
    title = title.replace("--", "-").replace("--", "-")
    authors = [re.sub("-+", "-", one) for one in authors]
    (again,) = from_bibtex(to_bibtex([Work("k", re.sub("-+", "-", title), 1999, tuple(authors))]))
    assert (again.authors, again.title) == (tuple(authors), re.sub("-+", "-", title))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@article{a, title = {x}", "x.bib:1: is no proper BibTeX"),
        ("@article{a,\n title = {x", "x.bib:1: is no proper BibTeX"),
        ("@article{a, year = 1999}", "x.bib:1: the entry a has no title"),
        ("@article{a, title={x}, year=1}\n\n@article{a, title={x}}", "x.bib:3: the key 'a' was used before"),
        ("@article{a, title={x}, title={y}}", "x.bib:1: 'a' has title twice"),
        ("@article a", "x.bib:1: outside of an entry: @article a"),
        ("@article{ , title={x}}", "an entry begins with its key"),
        ("@article{a, title={x}}", "x.bib:1: the entry a has no year"),
        ("@misc{a.b, title={x}, year=1999}\n@misc{a-b, title={y}, year=1999}", "x.bib:2: the keys of two entries"),
    ],
)
def test_bad_bibtex_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "x.bib"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        import_bibliography(path)


def test_csl_json_is_read(tmp_path):
    items = [
        {
            "id": "http://zotero.org/1/items/ABC", "citation-key": "gogh1889", "type": "article-journal", "title": "Stars",
            "author": [{"family": "Gogh", "given": "Vincent", "non-dropping-particle": "van"}, {"literal": "A Group"}],
            "issued": {"date-parts": [["1889", 6]]}, "DOI": "10.1000/182", "URL": "javascript:alert(1)",
        }
    ]  # fmt: skip
    (work,) = from_csl(json.dumps(items))
    assert (work.key, work.year, work.authors) == ("gogh1889", 1889, ("Vincent van Gogh", "A Group"))
    assert work.address == "https://doi.org/10.1000/182"
    del items[0]["DOI"]
    assert from_csl(json.dumps(items))[0].address == ""
    for text, message in [
        ("[", "1: not JSON"),
        ("{}", "CSL-JSON is a list"),
        ('[{"id": 1}]', "item 1 is no mapping with id and title"),
        ('[{"id": 1, "title": "t", "issued": {"date-parts": [["x"]]}}]', "author or issued"),
        ('[{"id": 1, "title": "t"}, {"id": "1", "title": "u"}]', "item 2: the id '1' is given twice"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            from_csl(text)
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=r"expected a \.bib or \.json"):
        import_bibliography(tmp_path / "x.txt")


def test_yaml_round_trip(folder, tmp_path):
    records = read_history(folder())
    out = tmp_path / "again.yaml"
    out.write_text(to_yaml(records))
    again = read_history(out)

    def bare(value):
        return re.sub(r"Place\(file='[^']*', line=\d+\)", "", repr(value))

    assert bare((again.events, again.edges, again.works)) == bare((records.events, records.edges, records.works))
    whole = read_history(Path(SHIPPED_FOLDER))
    out.write_text(to_yaml(whole))
    again = read_history(out)
    assert bare(again.events) == bare(whole.events)
    assert bare(sorted(again.edges, key=repr_of)) == bare(sorted(whole.edges, key=repr_of))


SHIPPED_FOLDER = Path(__file__).parents[2] / "src" / "counterproof" / "page" / "history"


def repr_of(edge):
    return (edge.later, edge.earlier)


def test_graphml_is_what_networkx_reads(tmp_path):
    done = CliRunner().invoke(cli, ["page", "export", "--format", "graphml", "--out", str(tmp_path / "h.graphml")])
    assert done.exit_code == 0, done.output
    read, made = networkx.read_graphml(tmp_path / "h.graphml"), SHIPPED.to_networkx()
    assert set(read.nodes) == set(made.nodes)
    assert set(read.edges) == set(made.edges)
    for pair in made.edges:
        assert read.edges[pair]["share"] == made.edges[pair]["share"]
        assert read.edges[pair]["relation"] == made.edges[pair]["relation"]
    for name in made.nodes:
        assert read.nodes[name]["title"] == SHIPPED.events[name].title


# --- the shipped history


def test_the_shipped_history_is_clean():
    assert [str(one) for one in SHIPPED.lint()] == []
    assert len(SHIPPED.events) >= 140


def test_every_paper_of_the_page_leads_back():
    for slug in papers():
        found = SHIPPED.ancestors(slug, samples=0)
        assert len(found) >= 2, slug
        # Back to before the first paper of the page.
        assert min(SHIPPED.events[row.id].when.start for row in found) < 2012, slug


BACKBONE = """chain-rule-1676 least-squares-1805 gradient-descent-1847 ising-1925 amari-1972 perceptron-1958
ivakhnenko-1965
amari-1967 reverse-mode-1970 werbos-1982 rectified-units-1969 neocognitron-1979 tdnn-1987 shift-invariant-1988
lecun-cnn-1989 adversarial-curiosity-1990 subgoals-1990 fast-weights-1991 chunker-1991 vanishing-gradients-1991
lstm-1997
highway-2015 resnet-2015 zuse-1941 gpu-nets-2010 incompleteness-1931 lambda-calculus-1936 turing-machine-1936
transformer-2017"""


def test_the_backbone_of_the_survey_is_there():
    assert set(BACKBONE.split()) <= set(SHIPPED.events)


def test_disputed_events_show_two_sides_with_primary_sources():
    disputed = [event for event in SHIPPED.events.values() if event.disputes]
    assert len(disputed) >= 8
    for event in disputed:
        for dispute in event.disputes:
            assert len(dispute.sides) >= 2
            assert all(any(s.kind == "primary" for s in side.sources) for side in dispute.sides)


def test_events_are_in_our_own_words():
    """No event holds a run of words of the brief, where that is at hand."""
    brief = Path(__file__).parents[3] / "shared" / "papers" / "annotated-history.md"
    if not brief.exists():
        pytest.skip("the brief is not on this machine")
    assert [str(one) for one in SHIPPED.lint({"the brief": brief.read_text()}) if one.rule == "copied"] == []


def test_identifiers_agree_with_years():
    """An arXiv id tells the year of the first version; a published year is that or up to three later."""
    for work in SHIPPED.works.values():
        if re.match(r"\d{4}\.", work.arxiv):
            first = 2000 + int(work.arxiv[:2])
            assert first <= work.year <= first + 3 or work.key.startswith("schmidhuber"), work.key
            assert 1 <= int(work.arxiv[2:4]) <= 12
    arxiv = [work.arxiv for work in SHIPPED.works.values() if work.arxiv]
    doi = [work.doi for work in SHIPPED.works.values() if work.doi]
    assert len(set(doi)) == len(doi)
    twice = {one for one in arxiv if arxiv.count(one) > 1}
    assert twice <= {paper.arxiv for paper in papers().values()}


# --- the claims


def test_without_noise_and_worth_the_sweep_is_the_loss_itself():
    rng = np.random.default_rng(0)
    later, earlier, shares, own, _ = claims.simulate(120, rng)
    present = np.arange(100, 120)
    weights = np.zeros(120)
    weights[present] = 1.0
    # With worth 1 every value is 1, so the gradient is the effect of taking an idea away.
    lost = claims.losses(later, earlier, shares, own, np.ones(120), present, "linear")
    found = backward_credit(later, earlier, shares, weights)
    np.testing.assert_allclose(found, lost, atol=1e-10)
    worth = np.exp(rng.standard_normal(120))
    value = own * worth
    for edge in np.argsort(later, kind="stable"):
        value[later[edge]] += shares[edge] * value[earlier[edge]]
    lost = claims.losses(later, earlier, shares, own, worth, present, "linear")
    np.testing.assert_allclose(found * value, lost, atol=1e-10)


def test_losses_by_hand():
    # 2 builds on 1 and 0, 1 on 0; worth 1; value 0 = 1, 1 = .5 + .5, 2 = .2 + .3 * v1 + .5 * v0
    later, earlier, shares = np.array([1, 2, 2]), np.array([0, 1, 0]), np.array([0.5, 0.3, 0.5])
    own = np.array([1.0, 0.5, 0.2])
    lost = claims.losses(later, earlier, shares, own, np.ones(3), np.array([2]), "linear")
    np.testing.assert_allclose(lost, [0.3 * 0.5 + 0.5, 0.3, 1.0])
    root = math.sqrt
    v1, whole = root(0.5), root(0.2**2 + (0.3 * root(0.5)) ** 2 + 0.5**2)
    lost = claims.losses(later, earlier, shares, own, np.ones(3), np.array([2]), "root-sum-square")
    np.testing.assert_allclose(lost[1], whole - root(0.2**2 + 0.5**2))
    np.testing.assert_allclose(lost[0], whole - root(0.2**2 + (0.3 * 0.5) ** 2))
    assert v1 > 0


def view(seed=0):
    rng = np.random.default_rng(seed)
    later, earlier, shares, own, _ = claims.simulate(60, rng)
    return claims.View(later, earlier, shares, own, np.arange(50, 60))


def test_pagerank_is_networkx_pagerank():
    one = view()
    made = networkx.DiGraph(list(zip(one.later.tolist(), one.earlier.tolist())))
    made.add_nodes_from(range(60))
    expected = networkx.pagerank(made, alpha=0.85, tol=1e-13, max_iter=2000)
    np.testing.assert_allclose(claims.pagerank(one), [expected[i] for i in range(60)], atol=1e-10)
    degree = dict(made.in_degree())
    np.testing.assert_array_equal(claims.in_degree(one), [degree[i] for i in range(60)])
    np.testing.assert_allclose(claims.in_degree_by_age(one)[50], degree[50] / 10)


def test_simulated_histories_lead_back_and_sum_to_one():
    later, earlier, shares, own, worth = claims.simulate(200, np.random.default_rng(1))
    assert (earlier < later).all()
    assert len(set(zip(later.tolist(), earlier.tolist()))) == len(later)
    np.testing.assert_allclose(own + np.bincount(later, shares, minlength=200), 1.0)
    assert (worth > 0).all()


def test_trials_are_paired_and_the_noise_is_what_is_asked():
    quick = dict(claims.IDEAS.budgets["quick"].settings)
    small = {**quick, "ideas": 100, "present": 20}
    one = claims.run_ideas(claims.ANNOTATED, Trial(seed=1000, settings=small))
    assert one == claims.run_ideas(claims.ANNOTATED, Trial(seed=1000, settings=small))
    assert set(one) == set(claims.IDEAS.metrics)
    clean = claims.run_ideas(claims.ANNOTATED, Trial(seed=1000, settings={**small, "noise": 0.0}))
    noisy = claims.run_ideas(claims.ANNOTATED, Trial(seed=1000, settings={**small, "noise": 3.0}))
    assert noisy["spearman"] < one["spearman"] <= clean["spearman"]
    equal = [claims.run_ideas(claims.EQUAL, Trial(seed=1000, settings={**small, "noise": n})) for n in (0.0, 3.0)]
    assert equal[0] == equal[1]
    sparse = claims.run_ideas(claims.ANNOTATED, Trial(seed=1000, settings={**small, "missing": 0.6}))
    assert sparse["spearman"] < one["spearman"]


def test_acceleration_against_scipy_and_exact_lists():
    from scipy.stats import linregress

    exact = acceleration(13.8e9 * 0.25 ** np.arange(16))
    assert (exact.ratio, exact.r_squared) == pytest.approx((0.25, 1.0))
    assert exact.misfit < 1e-9
    years = random_milestones(np.random.default_rng(0))
    line = linregress(np.arange(16), np.log(years))
    found = acceleration(years)
    assert found.r_squared == pytest.approx(line.rvalue**2)
    assert found.ratio == pytest.approx(math.exp(line.slope))
    for bad in ([1.0, 2.0, 3.0], [3.0, 2.0], [3.0, 2.0, 0.0], [3.0, 3.0, 1.0]):
        with pytest.raises(ValueError, match="falling numbers above 0"):
            acceleration(np.array(bad))


def test_choosing_among_more_times_fits_better_and_takes_the_nearest():
    fits = []
    for pool in (30, 300, 3000):
        lists = [selected_milestones(np.random.default_rng(seed), pool=pool) for seed in range(20)]
        assert all((np.diff(one) < 0).all() and one[0] == 13.8e9 for one in lists)
        fits.append(np.mean([acceleration(one).misfit for one in lists]))
    assert fits[0] > 2 * fits[1] > 4 * fits[2]
    many = selected_milestones(np.random.default_rng(0), pool=100_000)
    np.testing.assert_allclose(many, 13.8e9 * 0.25 ** np.arange(16), rtol=1e-2)
    plain = random_milestones(np.random.default_rng(0))
    assert len(plain) == 16
    assert (np.diff(plain) < 0).all()


def test_the_claims_hold_the_figures_that_are_shipped():
    assert [one.before for one in SHIPPED.milestones] == claims.GIVEN
    found = claims.run_pattern(claims.SURVEY, Trial(seed=1000, settings={"lists": 2, "pool": 10}))
    assert found["r_squared"] == pytest.approx(acceleration(np.array(claims.GIVEN)).r_squared)


# --- views


EVIL = (
    GOOD.replace("The first", '"<script>alert(1)</script> & \\"quotes\\""')
    .replace("Something was found.", "'<img src=x onerror=alert(2)> {{ 7 * 7 }}'")
    .replace("A. One]\n    text", "'</p><i>One</i>']\n    text")
)


def test_the_page_escapes_everything_and_drops_nothing(folder, tmp_path):
    history = History.load(folder(text=EVIL))
    out = tmp_path / "page.html"
    history.to_html(out, samples=5)
    html = out.read_text()
    assert "<script" not in html
    assert "<img" not in html
    assert "<i>One" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    assert re.findall(r'id="(first-1950|second-1960)"', html) == ["first-1950", "second-1960"]
    assert "https://doi.org/10.1000/182" in html
    assert "Who built it?" in html


def test_every_event_of_the_page_has_an_anchor_its_sources_and_no_link_is_dead():
    html = timeline_html(SHIPPED, SHIPPED.credit_of(samples=5), samples=0)
    ids = re.findall(r' id="?([^"\s>]+)', html)
    assert len(set(ids)) == len(ids)
    assert set(SHIPPED.events) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    assert "src=" not in html
    from markupsafe import escape

    for event in SHIPPED.events.values():
        article = html.split(f'id="{event.id}"')[1].split("</article>")[0]
        for source in event.sources:
            assert str(escape(reference(SHIPPED.works[source.key]))) in article, event.id
    assert html.count('class="side"') == 2 * sum(
        len(dispute.sides) for event in SHIPPED.events.values() for dispute in event.disputes
    )


def test_an_empty_and_a_cosmic_history_can_be_looked_at(tmp_path):
    empty = History.of(Records())
    empty.to_html(tmp_path / "empty.html")
    cosmic = make({(1, 0): 0.5, (2, 1): 0.5}, years=["13.8e9 years ago", "300 BC", 2020])
    cosmic.to_html(tmp_path / "cosmic.html", ["e2"], samples=0)
    html = (tmp_path / "cosmic.html").read_text()
    assert "years ago" in html
    assert "nan" not in html


def test_a_reference_reads_well():
    assert reference(Work("k", "Who?", 1999, ("A", "B", "others"), "V")) == "A, B and others. Who? V. 1999."
    assert Work("k", "T", doi="10.1/a<b>").address == "https://doi.org/10.1/a%3Cb%3E"


def test_events_are_chosen():
    assert {event.id for event in choose_events(SHIPPED, person="turing")} == {
        "turing-machine-1936", "turing-learning-1948", "imitation-game-1950",
    }  # fmt: skip
    hardware = choose_events(SHIPPED, kind="hardware")
    assert [event.id for event in hardware] == ["zuse-1941", "gpu-nets-2010"]
    assert all(event.disputes for event in choose_events(SHIPPED, disputed=True))
    roots = choose_events(SHIPPED, root_of="group-detr", until=1960)
    assert "hungarian-1955" in {event.id for event in roots}
    assert "bradley-terry-1952" not in {event.id for event in roots}
    assert choose_events(SHIPPED, since=1809, until=1809)[0].id == "least-squares-1805"


def test_roots_as_text_and_json_agree():
    found = roots_json(SHIPPED, "arena-hard", top=5, samples=50)
    text = roots_text(SHIPPED, "arena-hard", top=5, samples=50)
    assert len(found["roots"]) == 5
    for row in found["roots"]:
        assert row["title"] in text
        assert f"{row['credit']:.1%}" in text
        assert row["low"] <= row["high"]
    assert "re-invents" in roots_text(SHIPPED, "arena-hard", top=8, samples=0)
    json.dumps(found, allow_nan=False)
    assert "nothing is noted" in roots_text(SHIPPED, "chain-rule-1676")


# --- command line


def run(*words):
    return CliRunner().invoke(cli, ["page", *map(str, words)])


def test_the_verbs(folder, tmp_path):
    mine = folder()
    assert "chain-rule-1676" in run("timeline", "--until", 1800).output
    listed = json.loads(run("timeline", "--root-of", "vlanet", "--json").output)
    assert {"vlanet", "rcnn-2013"} <= {event["id"] for event in listed["events"]}
    assert "DETR" not in run("timeline", "--history", mine).output
    assert "Hungarian" in run("roots", "group-detr").output
    assert json.loads(run("roots", "second-1960", "--history", mine, "--json").output)["roots"][0]["credit"] == 0.5
    assert "group-detr" in run("descendants", "hungarian-1955").output
    below = json.loads(run("descendants", "first-1950", "--history", mine, "--json").output)
    assert [row["rests"] for row in below["descendants"]] == [0.5]
    page = tmp_path / "t.html"
    assert run("timeline", "--history", mine, "--out", page, "--samples", 5).exit_code == 0
    assert "second-1960" in page.read_text()


def test_lint_from_the_command_line(folder, tmp_path):
    mine = folder()
    assert run("lint", mine).exit_code == 0
    text = tmp_path / "book.txt"
    text.write_text("something WAS found")
    found = run("lint", mine, "--against", text, "--run", 3, "--json")
    assert found.exit_code == 1
    assert json.loads(found.output)[0]["rule"] == "copied"
    bad = run("lint", folder("share: 0.5", "share: 2"))
    assert bad.exit_code == 1
    assert "mine/history.yaml:26: share:" in bad.output
    assert "1 finding" in bad.output


def test_import_and_export(folder, tmp_path):
    bib = tmp_path / "in.bib"
    bib.write_text(BIB)
    out = tmp_path / "new" / "library.yaml"
    out.parent.mkdir()
    assert run("import", bib, "--out", out).exit_code == 0
    history = History.load(out.parent)
    assert {one.rule for one in history.lint()} == {"text", "orphan"}
    assert len(history.events) == 3
    mine = folder()
    table = list(csv.DictReader(io.StringIO(run("export", "--format", "csv", "--history", mine).output)))
    assert table[1]["builds_on"] == "first-1950 (uses, 0.5)"
    assert from_bibtex(run("export", "--format", "bibtex", "--history", mine).output)[0].key == "one"
    whole = json.loads(run("export", "--history", mine).output)
    assert len(whole["edges"]) == 1
    assert whole["works"][1]["address"] == "https://doi.org/10.1000/182"


def test_shares_beside_those_of_the_page(tmp_path):
    mine = tmp_path / "bob.yaml"
    mine.write_text(
        "annotator: bob\nroots:\n  group-detr:\n    - {to: hungarian-1955, relation: uses, share: 0.9, because: all}\n"
    )
    ours = json.loads(run("roots", "group-detr", "--json").output)["roots"]
    both = json.loads(run("roots", "group-detr", "--add", mine, "--json").output)["roots"]

    def of(rows, name):
        return next(row["reach"] for row in rows if row["id"] == name)

    assert of(both, "hungarian-1955") > 2 * of(ours, "hungarian-1955")
    assert of(both, "detr-2020") == pytest.approx(of(ours, "detr-2020") / 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roots", "group-detrr"], "no event 'group-detrr'; did you mean group-detr"),
        (["descendants", "hungarian"], "no event 'hungarian'; did you mean"),
        (["timeline", "--kind", "gossip"], "no kind 'gossip'"),
        (["timeline", "--out", "t.pdf"], "the page is HTML"),
        (["timeline", "--out", "t.html", "--kind", "theory"], "has its own filters"),
        (["timeline", "--history", "nowhere"], "there is no folder or file nowhere"),
        (["lint", "nowhere"], "there is no folder or file nowhere"),
        (["lint", "--against", "nowhere.txt"], "cannot read nowhere.txt"),
        (["import", "nowhere.bib"], "cannot read nowhere.bib"),
        (["import", "nowhere.doc"], "expected a .bib or .json"),
        (["import", "nowhere.bib", "--kind", "gossip"], "no kind 'gossip'"),
    ],
)
def test_bad_usage_names_the_remedy(words, message):
    done = run(*words)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
