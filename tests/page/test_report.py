"""The report of papers and comparisons made up here: real cards, synthetic trials, `judge`'s own verdicts."""

# ruff: noqa: RUF001 - minus and times signs are typeset

import math
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterproof.bench.comparison import Comparison, Pair, judge
from counterproof.bench.task import Arm, Budget, Claim, Metric, Task
from counterproof.bench.trials import Record
from counterproof.page.catalogue import ROOMS, SECTIONS, Paper, papers
from counterproof.page.report import render, write
from counterproof.page.typeset import number

NASTY = "<script>alert(\"1\")</script> & 'quotes' </style> {{ 7 * 7 }} {% raw %}"
LONG = "an_uncommonly_long_name_without_any_place_to_break_it_" * 4


# --- Comparisons made by hand -----------------------------------------------------------------------------------------


def make_claim(
    slug="waxed-paper", name="main", better="higher", unit="AP", sample="seed", budgets=("quick",), **changes
):
    task = Task(
        name="shape-scenes",
        says="synthetic scenes of shapes, a tiny detector trained from scratch, average precision on held-out scenes",
        run="proofs.task:run",
        metrics={"score": Metric(better, unit, "mean over held-out scenes"), "other": Metric("higher")},
        budgets={level: Budget(settings={"steps": 400, "images": 512}, seeds=(4, 12)) for level in budgets},
        plug="a detector",
        sample=sample,
    )
    wanted = {
        "paper": slug,
        "name": name,
        "says": "with three groups of queries the detector reaches a higher",
        "task": task,
        "baseline": Arm("one group"),
        "method": Arm("three groups", "proofs.method:groups", {"groups": 3}),
        "metric": "score",
        "better": better,
        "reported": "35.2 to 39.1 AP (COCO, ResNet-50, DAB-DETR, 12 epochs)",
    }
    return Claim(**{**wanted, **changes})


def make_record(claim, which, seed, value, budget="quick", device="cpu", curve=(), cpu=21.5, **changes):
    arm = getattr(claim, which)
    wanted = {
        "key": f"{arm.name}-{seed}",
        "paper": claim.paper,
        "claim": claim.name,
        "task": claim.task.name,
        "arm": arm.name,
        "seed": seed,
        "budget": budget,
        "device": device,
        "outcome": "ok" if value is not None else "diverged",
        "metrics": {} if value is None else {claim.metric: value, "other": 1.0},
        "message": "" if value is not None else "loss is nan",
        "curve": list(curve),
        "cost": {"wall_seconds": cpu * 1.1, "cpu_seconds": cpu, "peak_memory_bytes": 6.1e8},
        "versions": {"Python": "3.11.15", "numpy": "2.3.4", "torch": "2.13.0"},
        "host": {
            "name": "press",
            "system": "Linux 6.1",
            "processor": "A Processor @ 2.80GHz",
            "cores": 2,
            "memory_bytes": 24 * 2**30,
            "load": 0.5,
        },
        "started": "2026-11-20T10:00:00.000+00:00",
        "finished": "2026-11-20T10:00:21.000+00:00",
        "parts": {},
    }
    return Record(**{**wanted, **changes})


def make_comparison(claim, values, budget="quick", device="cpu", curves=None, cpu=(21.5, 21.5), **changes):
    pairs = tuple(
        Pair(
            seed,
            make_record(claim, "baseline", seed, b, budget, device, curves(seed, 0) if curves else (), cpu[0]),
            make_record(claim, "method", seed, m, budget, device, curves(seed, 1) if curves else (), cpu[1]),
        )
        for seed, (b, m) in enumerate(values)
    )
    return Comparison(claim, budget, device, pairs, judge(claim, pairs), **changes)


def normal_pairs(n, mean, sd, by, noise, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.normal(mean, sd, n)
    return [(float(b), float(b + d)) for b, d in zip(start, rng.normal(by, noise, n))]


def learning(metric, start, ends, cost=(1.0, 1.0), points=25, key="step"):
    """Curves that fall or rise exponentially from `start` to `ends[arm]`, with noise."""

    def curve(seed, arm):
        rng = np.random.default_rng([seed, arm])
        shares = np.linspace(1 / points, 1, points)
        values = ends[arm] + (start - ends[arm]) * np.exp(-4 * shares) * rng.lognormal(0, 0.06, points)
        return [
            {"progress": float(x), "cost": float(x * 20 * cost[arm]), metric: float(y)}
            | ({"step": float(round(x * 400))} if key == "step" else {})
            for x, y in zip(shares, values)
        ]

    return curve


def make_paper(slug="waxed-paper", status="runs", **changes):
    wanted = {
        "slug": slug,
        "title": "Waxed Paper: A Method That Was Never Published",
        "year": 2024,
        "room": "detection",
        "tags": ("object detection", "assignment", "training speed"),
        "summary": "Trains a detector with several groups of queries and keeps one.",
        "status": status,
        "arxiv": "2401.00001",
        "repository": "press/waxed-paper",
        "defaults": MappingProxyType({}),
        "sections": MappingProxyType({name: f"Text of *{name}*." for name in SECTIONS[status]}),
        "package": "proofs",
        "path": Path("/nowhere.md"),
    }
    return Paper(**{**wanted, **changes})


@pytest.fixture
def with_claims(monkeypatch):
    """A paper that runs, whose claims module holds the given claims."""

    def with_claims(*claims, paper=None):
        paper = paper or make_paper(claims[0].paper if claims else "waxed-paper")
        install(monkeypatch.setitem, paper, claims)
        return paper

    return with_claims


def install(set_item, paper, claims):
    module = ModuleType(f"proofs.claims.{paper.slug.replace('-', '_')}")
    module.CLAIMS = tuple(claims)
    set_item(sys.modules, module.__name__, module)


def showcase(set_item=dict.__setitem__):
    """The page's real cards as planned ones, and papers with every kind of outcome: (papers, ours, local)."""
    planned = [replace(paper, status="planned", sections=paper.sections) for paper in papers().values()]
    shown: list[Paper] = []
    ours: dict[str, list[Comparison]] = {}
    local: dict[str, list[Comparison]] = {}

    def runs(slug, *claims, here=(), by_us=(), **changes):
        paper = make_paper(slug, **changes)
        install(set_item, paper, claims)
        shown.append(paper)
        ours[slug], local[slug] = list(by_us), list(here)

    slug = "waxed-paper"  # holds, with curves and a cost that differs; other budgets; another verdict on this machine
    main = make_claim(slug, smallest=0.5, budgets=("quick", "standard"))
    equal_time = make_claim(slug, "equal-time", says="at equal CPU time it still reaches a higher")
    unmeasured = make_claim(slug, "isolated", says="groups that see each other lose the gain: a lower")
    curves = learning("score", 2.0, (31.0, 33.4), cost=(1.0, 1.5))
    runs(
        slug,
        main,
        equal_time,
        unmeasured,
        by_us=[
            make_comparison(main, normal_pairs(8, 31, 1.6, 2.2, 0.7), curves=curves, cpu=(20.4, 30.9)),
            make_comparison(
                main, normal_pairs(12, 38, 1.2, 2.0, 0.6, 3), "standard", curves=curves, cpu=(204.0, 309.0)
            ),
            make_comparison(equal_time, normal_pairs(12, 31, 1.6, 0.1, 1.1, 1)),
        ],
        here=[make_comparison(main, normal_pairs(5, 31.2, 1.4, 1.9, 0.9, 5), curves=curves)],
    )

    slug = "soft-ground"  # holds by ratio, lower is better, curves of another quantity, old code
    faster = make_claim(
        slug,
        better="lower",
        unit="steps",
        effect="ratio",
        smallest=0.95,
        says="reaches the baseline's final quality in fewer",
        baseline=Arm("random noise"),
        method=Arm("immiscible", "proofs.method:pair"),
        reported="up to 3 times fewer (CIFAR-10, consistency models)",
    )
    rng = np.random.default_rng(2)
    steps = [(float(b), float(b * r)) for b, r in zip(rng.normal(380, 30, 6), rng.lognormal(-0.5, 0.06, 6))]
    runs(
        slug,
        faster,
        title="Soft Ground: Pairing Plates with Nearby Papers",
        room="generation",
        by_us=[
            make_comparison(
                faster,
                steps,
                curves=learning("energy", 5.0, (0.021, 0.016)),
                stale=("module proofs.method has changed", "torch was 2.13.0, is absent"),
            )
        ],
    )

    slug = "dry-point"  # reversed, absent, open
    worse = make_claim(slug, "worse", better="lower", unit="", says="normalising by length leaves a lower")
    absent = make_claim(slug, "absent", smallest=1.0, unit="%", says="a mean of four models gives a higher")
    unsure = make_claim(slug, "open", smallest=0.02, unit="", says="an easy-to-hard order of pairs gives a higher")
    runs(
        slug,
        worse,
        absent,
        unsure,
        title="Dry Point: One Needle Fits All",
        room="preference",
        by_us=[
            make_comparison(worse, normal_pairs(7, 0.62, 0.05, 0.03, 0.009, 4)),
            make_comparison(
                absent, normal_pairs(12, 71, 2.5, 0.1, 0.5, 6), curves=learning("score", 50, (71, 71.1), key="")
            ),
            make_comparison(unsure, normal_pairs(12, 0.71, 0.04, 0.015, 0.03, 7)),
        ],
    )

    slug = "lift-ground"  # three seeds: no bounds; one seed; equal effects; no pair at all
    three = make_claim(slug, "three", says="three seeds say nothing yet of a higher")
    one = make_claim(slug, "one", says="one seed says less of a lower", better="lower", effect="ratio")
    equal = make_claim(slug, "equal", says="a closed form always gives a higher", sample="instance")
    none = make_claim(slug, "none", says="what never ran cannot be a higher")
    runs(
        slug,
        three,
        one,
        equal,
        none,
        title="Lift Ground",
        room="reasoning",
        by_us=[
            make_comparison(three, normal_pairs(3, 10, 1, 1, 1)),
            make_comparison(one, [(3.1, 2.2)]),
            make_comparison(equal, [(float(b), b + 0.25) for b in range(5)]),
            make_comparison(none, []),
        ],
    )

    slug = "foul-bite"  # one trial failed; every trial of an arm failed
    some = make_claim(slug, "some", says="without hand-set weights, training still gives a higher", smallest=0.5)
    every = make_claim(slug, "every", says="a learning rate of ten gives a higher")
    values = normal_pairs(8, 31, 1.6, 2.2, 0.5, 8)
    values[3] = (values[3][0], None)
    failing = make_comparison(some, values)
    trace = (
        f'Traceback (most recent call last):\n  File "task.py", line 3\n\x1b[31mValueError\x1b[0m: {NASTY}\x00\ud800'
    )
    broken = replace(failing.pairs[3].method, message=trace, outcome="raised")
    pairs = (*failing.pairs[:3], replace(failing.pairs[3], method=broken), *failing.pairs[4:])
    runs(
        slug,
        some,
        every,
        title="Foul Bite: Acid Where None Was Meant",
        room="video",
        by_us=[
            replace(failing, pairs=pairs),
            make_comparison(every, [(1.0, None), (2.0, None), (None, None), (2.5, None)]),
        ],
    )

    slug = "chine-colle"  # many instances over orders of magnitude; only on this machine, on two devices
    many = make_claim(
        slug, "many", sample="instance", better="lower", effect="ratio", unit="", says="on 40 instances a lower"
    )
    here = make_claim(slug, "here", says="only measured here, on another device: a higher", unit="")
    spread = np.random.default_rng(9)
    ratios = zip(spread.lognormal(0, 2, 40), spread.lognormal(-0.3, 0.5, 40))
    runs(
        slug,
        many,
        here,
        title="Chine Collé: Two Papers, One Pull",
        room="incentives",
        by_us=[make_comparison(many, [(float(b), float(b * r)) for b, r in ratios])],
        here=[
            make_comparison(here, normal_pairs(6, 0.4, 0.1, 0.2, 0.05), device="cuda"),
            make_comparison(here, normal_pairs(6, 0.4, 0.1, 0.18, 0.05, 4)),
        ],
    )

    slug = "plate-tone"  # texts and names that do not fit
    nasty = make_claim(
        slug,
        says=f"{NASTY} and a longer",
        reported=NASTY,
        unit="<b>&",
        baseline=Arm(f"{LONG}baseline"),
        method=Arm(f"{LONG}{NASTY}"),
    )
    runs(
        slug,
        nasty,
        title=f"{NASTY}: {LONG}",
        tags=(NASTY, LONG, "c"),
        summary=LONG,
        room="incentives",
        sections=MappingProxyType(dict.fromkeys(SECTIONS["runs"], NASTY)),
        by_us=[make_comparison(nasty, normal_pairs(5, 1e-7, 1e-8, 3e-8, 1e-8), stale=(NASTY,))],
    )
    return [*shown, *planned], ours, local


# --- Reading the page -------------------------------------------------------------------------------------------------

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SEPARATE = {"td", "th", "dt", "dd", "p", "li", "div", "h1", "h2", "h3", "h4", "h5", "h6"}
OPTIONAL_END = {"option"}


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def __getitem__(self, name):
        return self.attributes.get(name)

    @property
    def classes(self):
        return (self["class"] or "").split()

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag=None, **wanted):
        names = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        for node in self.walk():
            if tag in (None, node.tag) and all(
                value in node.classes if name == "class" else node[name] == value for name, value in names.items()
            ):
                yield node

    def one(self, tag=None, **wanted):
        found = list(self.all(tag, **wanted))
        assert len(found) == 1, (tag, wanted, len(found))
        return found[0]

    @property
    def text(self):
        return "".join(
            child if isinstance(child, str) else child.text + " " * (child.tag in SEPARATE) for child in self.children
        )

    @property
    def words(self):
        return " ".join(self.text.split())


class Reader(HTMLParser):
    """A tree out of HTML in which every element is closed, in order; anything else is an error."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.root = self.open = Node("document", {}, None)
        self.feed(html)
        self.close()
        assert self.open is self.root, f"<{self.open.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        node = Node(tag, dict(attributes), self.open)
        self.open.children.append(node)
        if tag not in VOID:
            self.open = node

    def handle_startendtag(self, tag, attributes):
        assert tag == "path", f"<{tag}/> is no empty element"
        self.open.children.append(Node(tag, dict(attributes), self.open))

    def handle_endtag(self, tag):
        while self.open.tag in OPTIONAL_END and self.open.tag != tag:
            self.open = self.open.parent
        assert self.open.tag == tag, f"</{tag}> closes <{self.open.tag}>"
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.children.append(data)


def read(html):
    return Reader(html).root


MADE = {"made": "2026-11-22T15:30:00.000+00:00", "version": "0.1.0"}


@pytest.fixture(scope="module")
def shown():
    """(papers, ours, local) of the showcase, with its claims in reach."""
    with pytest.MonkeyPatch.context() as patch:
        yield showcase(patch.setitem)


@pytest.fixture(scope="module")
def html(shown):
    return render(*shown, **MADE)


@pytest.fixture(scope="module")
def page(html):
    return read(html)


@pytest.fixture
def sheet(with_claims):
    """The part of the page that shows one measurement (ours, unless `local` is given), as a tree."""

    def sheet(comparison=None, local=None):
        one = comparison or local
        paper = with_claims(one.claim)
        slug = paper.slug
        html = render([paper], {slug: [comparison]} if comparison else {}, {slug: [local]} if local else {}, **MADE)
        return read(html).one(id=f"{slug}/{one.claim.name.replace(' ', '-')}/{one.budget}")

    return sheet


def numbers_of(tree):
    """The table of numbers by label: what its cells say."""
    (table, *_) = tree.all("table", class_="numbers")
    rows = [[cell for cell in row.children if isinstance(cell, Node)] for row in table.all("tr")]
    return {row[0].words: row[1] for row in rows}


def printed(text):
    """The number that a printed text stands for, and half a unit of its last digit."""
    text = text.replace("−", "-").replace("\u202f", "").replace("×\u00a0", "").split("\u00a0")[0]
    text = text.removeprefix("× ").removeprefix("+")
    if text in ("∞", "-∞"):
        return float(text.replace("∞", "inf")), 0.0
    mantissa, _, power = text.partition(" × 10")
    scale = 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or "0")
    return float(mantissa) * scale, 0.5 * scale * 10.0 ** -len(mantissa.partition(".")[2])


# --- Structure --------------------------------------------------------------------------------------------------------


def test_ids_are_unique_and_whatever_names_one_finds_it(page):
    ids = [node["id"] for node in page.walk() if node["id"] is not None]
    assert [name for name, n in Counter(ids).items() if n > 1] == []
    assert all(re.fullmatch(r"[^\s]+", name) for name in ids)
    for node in page.walk():
        if (node["href"] or "").startswith("#"):
            assert node["href"][1:] in ids
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((node[name] or "").split()) <= set(ids), node.attributes


def test_nothing_is_loaded(page, html):
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping", "xlink:href"}
    for node in page.walk():
        assert not loading & set(node.attributes), node.attributes
        assert node.tag not in {"img", "iframe", "object", "embed", "video", "audio", "base", "use", "image"}
        if node.tag == "link":
            assert node["href"] == "data:,"
        if node["href"] and node.tag != "link":
            assert node.tag == "a"
            assert re.match(r"#|https://(arxiv\.org/abs|github\.com)/", node["href"])
        assert not any(name.startswith("on") for name in node.attributes)
    styles = "".join(node.text for node in page.all("style")) + " ".join(node["style"] or "" for node in page.walk())
    assert "url(" not in styles
    assert "@import" not in styles
    assert page.one("meta", http_equiv="Content-Security-Policy")["content"].startswith("default-src 'none'")


def test_the_outline_has_one_first_heading_and_no_gaps(page):
    levels = [int(node.tag[1]) for node in page.walk() if re.fullmatch("h[1-6]", node.tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_landmarks_and_language(page):
    assert page.one("html")["lang"] == "en"
    for landmark in ("main", "nav"):
        assert page.one(landmark)
    assert [n.tag for n in page.one("body").children if isinstance(n, Node)][:2] == ["a", "header"]
    (skip, *_) = page.all("a")
    assert skip["href"] == "#.main"
    assert page.one("head").one("title").text
    for node in page.all("section"):
        assert node["aria-labelledby"] or node.parent.classes == ["prose"]


def test_tables_name_their_columns_and_rows(page):
    tables = list(page.all("table"))
    assert tables
    for table in tables:
        assert all(th["scope"] in ("col", "row") for th in table.all("th"))
        widths = {len([c for c in row.children if isinstance(c, Node)]) for row in table.all("tr")}
        assert len(widths) == 1
        if table.parent.classes == ["scroll"] and table.classes:
            assert table.one("caption").text


def test_every_plot_says_in_numbers_what_it_shows(page):
    plots = [node for node in page.all("svg") if node["role"] == "img"]
    assert len(plots) > 30
    for plot in plots:
        assert re.search(r"\d|Fewer than two pairs", plot.one("title").text)
    for node in page.all("svg"):
        assert node["role"] == "img" or node["aria-hidden"] == "true"
        for path in node.all("path"):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", path["d"])
            assert numbers
            assert not re.search(r"nan|inf|e", path["d"])


def test_every_paper_is_there_with_its_links_and_card(page, shown):
    found, _, _ = shown
    assert len(list(page.all("article"))) == len(found)
    for paper in found:
        article = page.one("article", id=paper.slug)
        assert paper.title.split() == article.one("h3").text.split()
        assert " ".join(paper.summary.split()) in article.words
        links = [a["href"] for a in article.all("a")]
        assert (f"https://arxiv.org/abs/{paper.arxiv}" in links) == (paper.arxiv is not None)
        assert (f"https://github.com/{paper.repository}" in links) == (paper.repository is not None)
        headings = [h.text for h in article.one("details", class_="card").all("h4")]
        assert headings == [name for name in paper.sections if name != "What was measured here"]
        assert ("runs here" in article.words) == (paper.status == "runs")


def test_rooms_come_in_their_order_and_their_runnable_papers_first(page, shown):
    rooms = [node["data-room"] for node in page.all("section", class_="room")]
    assert rooms == [room for room in ROOMS if any(paper.room == room for paper in shown[0])]
    for room in page.all("section", class_="room"):
        running = ["runs" in node.classes for node in room.all("article")]
        assert running == sorted(running, reverse=True)


def test_counts(page, shown):
    found, ours, local = shown
    counts = {div.one("dt").words: int(div.one("dd").text) for div in page.one("dl", class_="counts").all("div")}
    verdicts = Counter(
        ([c for c in ours[slug] if c.claim.name == name] or [c for c in local[slug] if c.claim.name == name])[
            -1
        ].assessment.verdict
        for slug in ours
        for name in dict.fromkeys(c.claim.name for c in (*ours[slug], *local[slug]))
    )
    assert counts.pop("papers") == len(found)
    assert counts.pop("run here") == sum(paper.status == "runs" for paper in found)
    assert counts.pop("claims") == sum(verdicts.values()) + 1
    assert counts.pop("not measured yet") == 1
    assert counts == dict(verdicts)
    assert len(list(page.one(role="table").all(role="rowheader"))) == sum(verdicts.values())


def test_two_pages_of_the_same_are_equal(shown, html):
    assert render(*shown, **MADE) == html


def test_fifty_papers_with_three_claims_stay_under_three_megabytes(with_claims):
    ours, found = {}, []
    for i in range(50):
        slug = f"paper-{i}"
        claims = [make_claim(slug, f"claim-{j}", smallest=0.5) for j in range(3)]
        curves = learning("score", 2.0, (31.0, 33.4), cost=(1.0, 1.5), points=400)
        found.append(with_claims(*claims))
        ours[slug] = [make_comparison(c, normal_pairs(12, 31, 1.6, 2.2, 0.7, i), curves=curves) for c in claims]
    assert len(render(found, ours, {}, **MADE).encode()) < 3e6


# --- What is said -----------------------------------------------------------------------------------------------------


def every_comparison(shown):
    _, ours, local = shown
    return [c for measured in (ours, local) for comparisons in measured.values() for c in comparisons]


def test_effect_and_interval_are_those_of_the_comparison(page, shown):
    for comparison in every_comparison(shown):
        claim, found = comparison.claim, comparison.assessment
        sheet = page.one(id=f"{claim.paper}/{claim.name}/{comparison.budget}")
        data = {float(node["value"]): node.text for node in sheet.all("data")}
        wanted = [found.e_value]
        if found.effect is not None:
            wanted += [
                found.effect,
                *(v for p in comparison.pairs for r in (p.baseline, p.method) for v in [r.value("score")]),
            ]
        bounded = found.interval[0] not in (-math.inf, 0.0) or math.isfinite(found.interval[1])
        wanted += [*found.interval, *found.usual_interval, *found.leave_one_out] if bounded else []
        wanted += [v for v in (found.correlation, found.finished_only) if v is not None]
        for value in wanted:
            if value is None:
                continue
            assert any(math.isclose(value, shown, rel_tol=1e-7) for shown in data), (claim.paper, claim.name, value)
        for value, text in data.items():
            about, tolerance = printed(text)
            assert about == pytest.approx(value, abs=tolerance * 1.01), text


def test_the_verdict_and_its_reason_are_in_words(sheet):
    claim = make_claim(smallest=0.5)
    cases = {
        "holds": (2.0, "lies beyond the smallest effect that matters (+0.5 AP), on the better side"),
        "absent": (0.1, "lies short of the smallest effect that matters (+0.5 AP)"),
        "reversed": (-2.0, "lies on the worse side of no effect"),
    }
    for verdict, (by, reason) in cases.items():
        comparison = make_comparison(claim, [(b, b + by + 0.01 * (-1) ** i) for i, b in enumerate(range(8))])
        assert comparison.assessment.verdict == verdict
        words = sheet(comparison).words
        assert reason in words
        assert verdict in words
        better = "better" if by > 0 else "worse"
        assert (
            f"{abs(by):.{2 if abs(by) > 1 else 3}f} AP {'higher' if by > 0 else 'lower'}, which is {better}"
            in words.replace("\u00a0", " ")
        )


def test_lower_is_better_turns_direction_and_smallest_effect_around(sheet):
    claim = make_claim(better="lower", unit="s", smallest=0.5)
    words = sheet(make_comparison(claim, [(b, b - 2 + 0.01 * (-1) ** i) for i, b in enumerate(range(8))])).words
    assert "2.00 s lower, which is better" in words.replace("\u00a0", " ")
    assert "(−0.5 s), on the better side" in words


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.6, "40 % lower, which is better"),
        (0.97, "3.0 % lower, which is better"),
        (1.25, "25 % higher, which is worse"),
        (2.5, "2.500 times as high, which is worse"),
        (0.05, "20.00 times lower, which is better"),
        (1.0, "no difference"),
    ],
)
def test_ratios_in_words(sheet, ratio, words):
    claim = make_claim(better="lower", effect="ratio")
    tree = sheet(make_comparison(claim, [(b, b * ratio) for b in (1.0, 2.0, 4.0, 8.0)]))
    assert words.capitalize() in tree.words


def test_open_says_how_many_seeds_it_would_take(sheet):
    comparison = make_comparison(make_claim(), normal_pairs(8, 10, 1, 0.5, 1.0))
    assert comparison.assessment.verdict == "open"
    tree = sheet(comparison)
    assert f"about {comparison.assessment.needed} seeds would settle it" in tree.words
    assert numbers_of(tree)["Seeds it would take"].words == str(comparison.assessment.needed)


def test_three_seeds_have_no_bounds(sheet):
    comparison = make_comparison(make_claim(), normal_pairs(3, 10, 1, 1, 1))
    assert comparison.assessment.interval == (-math.inf, math.inf)
    tree = sheet(comparison)
    assert "95 % confidence sequence: not bounded yet" in tree.words
    assert "∞" not in tree.text
    assert "inf" not in tree.words.split()
    assert list(tree.all("path", class_="unbounded"))


def test_a_ratio_of_three_seeds_has_no_bounds_either(sheet):
    comparison = make_comparison(make_claim(effect="ratio"), [(1.0, 1.2), (1.1, 1.4), (1.2, 1.3)])
    assert comparison.assessment.interval == (0.0, math.inf)
    assert "95 % confidence sequence: not bounded yet" in sheet(comparison).words


def test_one_pair_and_none(sheet):
    words = sheet(make_comparison(make_claim(), [(1.0, 2.0)])).words
    assert "One seed carries no evidence" in words
    assert "No seed finished in both arms" in sheet(make_comparison(make_claim(), [])).words


def test_equal_effects(sheet):
    tree = sheet(make_comparison(make_claim(), [(float(b), b + 0.25) for b in range(6)]))
    assert numbers_of(tree)["Standardised effect (positive is better)"].words == "no spread between the pairs"
    tree = sheet(make_comparison(make_claim(), [(b / 7, b / 7 + 0.1) for b in range(6)]))  # equal but for rounding
    assert numbers_of(tree)["Standardised effect (positive is better)"].words == "no spread between the pairs"
    assert sheet(make_comparison(make_claim(), [(1.0, 1.0)] * 4))


def test_an_instance_is_not_called_a_seed(sheet):
    tree = sheet(make_comparison(make_claim(sample="instance"), normal_pairs(8, 10, 1, 2, 0.3)))
    assert "8 instances" in tree.words
    assert "seed" not in tree.words


def test_a_failed_trial_is_named_counted_and_explained(sheet):
    values = normal_pairs(6, 31, 1.6, 2.2, 0.5)
    values[2] = (values[2][0], None)
    comparison = make_comparison(make_claim(), values)
    message = "Traceback:\n\x1b[31mValueError\x1b[0m: \x07too <large>\ud800"
    pair = comparison.pairs[2]
    pairs = list(comparison.pairs)
    pairs[2] = replace(pair, method=replace(pair.method, message=message, outcome="memory"))
    tree = sheet(replace(comparison, pairs=tuple(pairs)))
    assert "three groups, seed 2: ran out of memory." in tree.words
    assert "1 trial failed." in tree.words
    (pre,) = tree.all("pre")
    assert pre.text == "Traceback:\nValueError: too <large>\ud800"
    row = next(row for row in tree.one("table", class_="seedtable").all("tr") if row.words.startswith("2 "))
    assert "ran out of memory counts as" in row.words
    worst = max(abs(m - b) for b, m in values if m is not None)
    assert float(list(row.all("data"))[-1]["value"]) == pytest.approx(-worst)
    table = numbers_of(tree)
    assert table["Failed trials (they count against their arm)"].words == "0 of the baseline, 1 of the method"
    finished = table["Effect over pairs that finished"].one("data")
    assert float(finished["value"]) == comparison.assessment.finished_only


def test_an_arm_that_never_finished(sheet):
    tree = sheet(make_comparison(make_claim(), [(1.0, None), (2.0, None)]))
    assert "Every trial of three groups failed." in tree.words
    assert numbers_of(tree)["Mean of the method"].words == "never finished"


def test_means_of_a_ratio_agree_with_it(sheet):
    tree = numbers_of(sheet(make_comparison(make_claim(effect="ratio"), [(1.0, 2.0), (4.0, 2.0), (2.0, 8.0)])))
    baseline, method, effect = (
        float(tree[label].one("data")["value"])
        for label in (
            "Geometric mean of the baseline",
            "Geometric mean of the method",
            "Effect: geometric mean of method / baseline",
        )
    )
    assert method / baseline == pytest.approx(effect)
    assert effect == pytest.approx((2.0 * 0.5 * 4.0) ** (1 / 3))


def test_old_code_is_said(sheet):
    comparison = make_comparison(make_claim(), normal_pairs(8, 31, 1.6, 2.2, 0.7))
    assert "of today's code and versions" in sheet(comparison).words
    words = sheet(replace(comparison, stale=("torch was 2.12, is 2.13", "module a has changed"))).words
    assert "not of today's code and versions: torch was 2.12, is 2.13; module a has changed" in words
    assert "Measured with other code or versions than today's." in words


def test_cost_and_environment(sheet):
    words = sheet(make_comparison(make_claim(), normal_pairs(8, 31, 1.6, 2.2, 0.7), cpu=(20.0, 300.0))).words
    assert "one group 20 s 22 s 582 MiB 2.7 min" in words
    assert "three groups 5.0 min 5.5 min 582 MiB 40 min" in words
    assert "A Processor @ 2.80GHz, 2 cores, 24.0 GiB" in words
    assert "Python 3.11.15, numpy 2.3.4, torch 2.13.0" in words
    assert "2026-11-20" in words
    assert "press" not in words  # the machine's name is nobody's business
    assert "quick: steps 400, images 512, 4 to 12 seeds, 3 minutes times the number of jobs" in words


def test_the_command_runs_the_claim_again(sheet):
    comparison = make_comparison(make_claim("dry-point", "equal time"), normal_pairs(4, 1, 1, 1, 1))
    code = sheet(comparison)
    assert "counterproof check 'dry-point/equal time' --budget quick" in [c.text for c in code.all("code")]


def test_this_machine_is_held_against_ours(with_claims):
    claim = make_claim()
    paper = with_claims(claim)
    ours = make_comparison(claim, normal_pairs(8, 31, 1.6, 2.2, 0.7))
    other = make_comparison(claim, normal_pairs(8, 31, 1.6, -2.2, 0.7), device="cuda")
    for here, sentence in (
        (ours, "This machine against ours: the same verdict; the same effect; the confidence sequences overlap."),
        (other, "another verdict (reversed, not holds)"),
    ):
        tree = read(render([paper], {paper.slug: [ours]}, {paper.slug: [here]}, **MADE))
        assert sentence in tree.words
        assert [dt.words for dt in tree.one("dl", class_="beside").all("dt")] == [
            "The paper reports",
            "Measured by us",
            "Measured on this machine",
        ]
        assert ("differs" in tree.one("p", class_="against").classes) == (here is other)
    assert "do not overlap" in tree.words


def test_two_devices_are_told_apart(with_claims):
    claim = make_claim()
    paper = with_claims(claim)
    here = [make_comparison(claim, normal_pairs(5, 31, 1.6, 2, 0.7), device=device) for device in ("cpu", "cuda")]
    words = read(render([paper], {}, {paper.slug: here}, **MADE)).words
    assert "Measured on this machine (cpu)" in words
    assert "Measured on this machine (cuda)" in words


def test_the_most_thorough_budget_speaks_for_the_claim(with_claims):
    claim = make_claim(budgets=("quick", "standard"))
    paper = with_claims(claim)
    quick = make_comparison(claim, normal_pairs(8, 31, 1.6, -2.2, 0.7))
    standard = make_comparison(claim, normal_pairs(8, 31, 1.6, 2.2, 0.7), "standard")
    for measured in ([quick, standard], [standard, quick]):
        tree = read(render([paper], {paper.slug: measured}, {}, **MADE))
        row = tree.one(role="rowheader").parent
        assert "holds" in row.words
        assert "standard" in row.words
        assert "reversed" in tree.one(id="waxed-paper/main/quick").words


def test_verdicts_are_marked_that_do_not_survive_among_the_others(with_claims):
    claims = [make_claim(name=f"claim-{i}") for i in range(40)]
    paper = with_claims(*claims)
    tried = (make_comparison(claims[0], normal_pairs(8, 31, 1.6, by, 0.7)) for by in np.linspace(0.5, 3, 50))
    weak = next(comparison for comparison in tried if comparison.assessment.verdict == "holds")
    assert 20 <= weak.assessment.e_value < 200
    rest = [make_comparison(c, normal_pairs(4, 31, 1.6, 0.0, 0.7, i)) for i, c in enumerate(claims[1:])]
    assert {c.assessment.verdict for c in rest} == {"open"}
    tree = read(render([paper], {paper.slug: [weak, *rest]}, {}, **MADE))
    assert "does not survive (e-BH at 5 %)" in tree.one(id="waxed-paper/claim-0/quick").words
    assert "does not survive" not in tree.one(id="waxed-paper/claim-1/quick").one("dl", class_="beside").words
    strong = make_comparison(claims[0], normal_pairs(12, 31, 1.6, 9.0, 0.7))
    tree = read(render([paper], {paper.slug: [strong, *rest]}, {}, **MADE))
    label = "Among all verdicts of this page (e-BH at 5 %)"
    assert numbers_of(tree.one(id="waxed-paper/claim-0/quick"))[label].words == "survives"


def test_what_is_not_measured_says_so_and_how_to_measure_it(with_claims):
    claim = make_claim()
    tree = read(render([with_claims(claim)], {}, {}, **MADE))
    assert "Nothing has been measured yet." in tree.words
    assert "not measured yet" in tree.one(id="waxed-paper/main").words
    assert "counterproof check waxed-paper/main --budget quick" in tree.words
    assert claim.reported in tree.words


def test_no_papers_at_all():
    assert read(render([], {}, {}, **MADE)).one("main")


def test_a_comparison_whose_claim_is_gone_is_still_shown_and_one_whose_paper_is_gone_is_not(with_claims):
    paper = with_claims(make_claim(name="today"))
    old = make_comparison(make_claim(name="yesterday"), normal_pairs(6, 31, 1.6, 2, 0.7))
    tree = read(render([paper], {paper.slug: [old], "gone": [old]}, {}, **MADE))
    assert [s["id"] for s in tree.all("div", class_="claim")] == ["waxed-paper/today", "waxed-paper/yesterday"]


def test_texts_are_text(page, html):
    assert len(list(page.all("script"))) == 1
    assert len(list(page.all("style"))) == 1
    article = page.one(id="plate-tone")
    table, environment = article.one("table", class_="seedtable"), article.one("dl", class_="environment")
    for where in (article.one("h3"), article.one("h5"), table, environment):
        assert NASTY in where.words
    assert "<b>&" in article.words
    assert "alert" not in page.one("script").text
    assert "{{ 7 * 7 }}" in article.words
    assert "49" not in article.one("h3").words


# --- Plots ------------------------------------------------------------------------------------------------------------


def trace(d):
    """The points of a path of one absolute move and relative lines."""
    start, _, rest = d.removeprefix("M").partition("l")
    x, y = map(int, start.split())
    points = [(x, y)]
    steps = list(map(int, re.findall(r"-?\d+", rest)))
    for dx, dy in zip(steps[::2], steps[1::2], strict=True):
        x, y = x + dx, y + dy
        points.append((x, y))
    return points


@pytest.mark.parametrize(("better", "by"), [("higher", 2.2), ("higher", -2.2), ("lower", 2.2), ("lower", -2.2)])
@pytest.mark.parametrize("effect", ["difference", "ratio"])
def test_right_is_better_in_every_plot_of_effects(with_claims, better, by, effect):
    claim = make_claim(better=better, effect=effect)
    paper = with_claims(claim)
    comparison = make_comparison(claim, normal_pairs(8, 31, 1.6, by, 0.7))
    tree = read(render([paper], {paper.slug: [comparison]}, {}, **MADE))
    improves = (by > 0) == (better == "higher")
    assert comparison.assessment.verdict == ("holds" if improves else "reversed")
    plots = [tree.one(role="rowheader").parent.one("svg", role="img"), tree.one("figure", class_="effect").one("svg")]
    for plot in plots:
        none = int(re.match(r"M(\d+)", plot.one("path", class_="none")["d"])[1])
        dot = int(re.match(r"M(\d+)", plot.one("path", class_="dot")["d"])[1])
        low, high = map(int, re.match(r"M(\d+) \d+H(\d+)", plot.one("path", class_="bar")["d"]).groups())
        assert low < dot < high
        assert (low > none) == improves
        assert (high < none) == (not improves)


def test_effects_are_drawn_to_scale(sheet):
    comparison = make_comparison(make_claim(), [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (0.0, 6.0), (0.0, 4.0)])
    plot = sheet(comparison).one("figure", class_="effect")
    dots = [int(x) for x in re.findall(r"M(\d+)", plot.one("path", class_="seeds")["d"])]
    none = int(re.match(r"M(\d+)", plot.one("path", class_="none")["d"])[1])
    assert [(x - none) / (dots[0] - none) for x in dots] == pytest.approx([1, 2, 3, 4, 6], rel=0.02)
    ticks = {
        printed(s.text)[0]: float(s["style"].removeprefix("left:").removesuffix("%")) * 10
        for s in plot.one(class_="ticks").all("span")
    }
    assert ticks[0] == pytest.approx(none, abs=1)
    for tick, at in ticks.items():
        assert at - none == pytest.approx(tick * (dots[0] - none), rel=0.02, abs=2)


def test_both_arms_of_every_seed_are_drawn_to_scale(sheet):
    values = [(1.0, 2.0), (3.0, 2.5), (2.0, None), (None, 4.0)]
    figure = sheet(make_comparison(make_claim(), values)).one("figure", class_="pairs")
    plot = figure.one("svg", role="img")

    def xs(which):
        return [int(x) for p in plot.all("path", class_=which) for x in re.findall(r"M(\d+)", p["d"])]

    assert xs("hole") == xs("baseline")
    scale = (xs("method")[2] - xs("baseline")[0]) / 3.0
    assert xs("baseline") == pytest.approx([xs("baseline")[0] + scale * (b - 1) for b in (1, 3, 2)], abs=1)
    assert xs("method") == pytest.approx([xs("baseline")[0] + scale * (m - 1) for m in (2, 2.5, 4)], abs=1)
    assert [len(re.findall("M", p["d"])) for p in plot.all("path", class_="link")] == [1, 1]
    assert int(re.search(r"M(\d+)", plot.one("path", class_="worse")["d"])[1]) == xs("baseline")[1]
    assert [s.words for s in figure.all("span", class_="failed")] == ["method failed", "baseline failed"]


def test_curves_show_the_metric_over_steps_and_over_cost_when_it_tells_more(sheet):
    same, dearer = learning("score", 2.0, (31.0, 33.4)), learning("score", 2.0, (31.0, 33.4), cost=(1.0, 1.5))
    pairs = normal_pairs(6, 31, 1.6, 2.2, 0.7)
    tree = sheet(make_comparison(make_claim(), pairs, curves=same))
    (figure,) = tree.all("figure", class_="curve")
    assert figure.one("figcaption").words.startswith("Score (AP) over step.")
    assert "Both arms spend the same CPU time to within 5 %" in tree.words
    tree = sheet(make_comparison(make_claim(), pairs, curves=dearer))
    _, second = tree.all("figure", class_="curve")
    assert second.one("figcaption").words.startswith("Score (AP) over CPU seconds.")
    assert "three groups spends 50 % more CPU time than one group" in tree.words
    logged = learning("energy", 5.0, (0.02, 0.01), key="")
    (figure,) = sheet(make_comparison(make_claim(), pairs, curves=logged)).all("figure", class_="curve")
    assert figure.one("figcaption").words.startswith("Energy over share of the trial, logarithmic.")
    assert not list(sheet(make_comparison(make_claim(), pairs)).all("figure", class_="curve"))


def test_a_mean_curve_is_the_mean_of_its_lines_and_lines_are_thin(sheet):
    curves = learning("score", 2.0, (31.0, 33.4), points=300)
    plot = next(
        sheet(make_comparison(make_claim(), normal_pairs(6, 31, 1.6, 2.2, 0.7), curves=curves)).all(
            "figure", class_="curve"
        )
    ).one("svg", role="img")
    lines = [trace(f"M{d}") for p in plot.all("path", class_="thin") for d in p["d"].split("M")[1:]]
    means = [trace(p["d"]) for p in plot.all("path", class_="mean")]
    assert (len(lines), len(means)) == (12, 2)
    assert max(map(len, lines)) <= 60
    assert max(map(len, means)) <= 60
    for mean, of in zip(means, (lines[:6], lines[6:])):
        assert mean[-1][1] == pytest.approx(np.mean([line[-1][1] for line in of]), abs=2)
        assert mean[-1][0] == max(x for line in of for x, _ in line)
    assert all(0 <= x <= 1000 and 0 <= y <= 1000 for line in (*lines, *means) for x, y in line)


@pytest.mark.parametrize("points", [[], [{"progress": 1.0, "cost": 2.0, "score": 3.0}]])
def test_curves_of_no_and_one_point(sheet, points):
    tree = sheet(make_comparison(make_claim(), normal_pairs(4, 31, 1, 2, 1), curves=lambda seed, arm: points))
    assert len(list(tree.all("figure", class_="curve"))) == len(points)


def test_curves_of_some_trials_and_some_points_only(sheet):
    full = learning("score", 2.0, (31.0, 33.4))

    def curves(seed, arm):
        return (
            []
            if seed == 1
            else [{k: v for k, v in p.items() if k != "score" or i % 2} for i, p in enumerate(full(seed, arm))]
        )

    tree = sheet(make_comparison(make_claim(), normal_pairs(4, 31, 1, 2, 1), curves=curves))
    thin = tree.one("figure", class_="curve").all("path", class_="thin")
    assert [path["d"].count("M") for path in thin] == [3, 3]


def test_claims_that_share_their_trials_share_their_curves(with_claims):
    first = make_claim(name="first")
    second = make_claim(name="second", metric="other", unit="")
    paper = with_claims(first, second)
    logged = make_comparison(first, normal_pairs(6, 31, 1, 2, 1), curves=learning("energy", 5.0, (0.02, 0.01)))
    ours = [logged, Comparison(second, "quick", "cpu", logged.pairs, judge(second, logged.pairs))]
    tree = read(render([paper], {paper.slug: ours}, {}, **MADE))
    assert list(tree.one(id="waxed-paper/first").all("figure", class_="curve"))
    assert not list(tree.one(id="waxed-paper/second").all("figure", class_="curve"))
    assert "#waxed-paper/first" in [a["href"] for a in tree.one(id="waxed-paper/second").all("a")]


@pytest.mark.parametrize("size", [1e-100, 1e-7, 1.0, 1e9, 1e100])
@pytest.mark.parametrize("effect", ["difference", "ratio"])
def test_values_of_any_size(sheet, size, effect):
    values = [(b * size, m * size) for b, m in normal_pairs(6, 31, 1.6, 2.2, 0.7)]
    tree = sheet(make_comparison(make_claim(effect=effect), values))
    assert "nan" not in tree.words.lower()


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.0, None, "0"),
        (0.12344, None, "0.1234"),
        (-1234.5678, None, "−1\u202f235"),
        (123456.0, 1, "123\u202f456.0"),
        (-0.0004, 2, "0.00"),
        (1.5e-9, None, "1.50 × 10⁻⁹"),
        (3.1e-8, 9, "3.1 × 10⁻⁸"),
        (-2.5e12, 3, "−2.50 × 10¹²"),
        (math.inf, 2, "∞"),
        (-math.inf, None, "−∞"),
    ],
)
def test_number(value, decimals, text):
    assert number(value, decimals) == text


@given(st.floats(-1e307, 1e307))
def test_a_number_is_printed_to_three_digits_at_least(value):
    assert printed(number(value))[0] == pytest.approx(value, rel=6e-3, abs=1e-320)


# --- Cards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def card():
    def card(text):
        sections = dict.fromkeys(SECTIONS["planned"], "Text.") | {"Idea": text}
        html = render([make_paper(status="planned", sections=MappingProxyType(sections))], {}, {}, **MADE)
        return next(read(html).one("details", class_="card").all("section"))

    return card


def test_cards_are_markdown(card):
    tree = card(
        "A *word*, `code` and [a link](https://arxiv.org/abs/1).\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    assert tree.one("em").text == "word"
    assert tree.one("code").text == "code"
    assert tree.one("a")["href"] == "https://arxiv.org/abs/1"
    assert [li.words for li in tree.all("li")] == ["one", "two"]
    assert [th["scope"] for th in tree.all("th")] == ["col", "col"]


def test_code_of_a_card_is_kept_as_it_is_and_can_be_scrolled_to(card):
    code = "import torch\n\nif a < b and c > d:\n    print('<b>')\n"
    pre = card(f"```python\n{code}```").one("pre")
    assert pre.text == code
    assert pre["tabindex"] == "0"


def test_html_of_a_card_is_text_and_nothing_of_it_loads_or_runs(card):
    tree = card(f"{NASTY}\n\n<div onclick='x()'>\n\n![pixel](https://example.org/x.png) [run](javascript:alert(1))")
    assert {node.tag for node in tree.walk()} <= {"section", "h4", "p", "a"}
    assert "<div onclick=" in tree.text
    assert not any((a["href"] or "").startswith("javascript") for a in tree.all("a"))


@pytest.mark.parametrize(
    ("text", "levels"),
    [("### a\n\n#### b\n\n### c", [5, 6, 5]), ("# a\n\n### b\n\n##### c", [5, 6, 6]), ("##### b\n\n### a", [5, 5])],
)
def test_headings_of_a_card_come_below_its_sections(card, text, levels):
    found = [int(n.tag[1]) for n in card(text).walk() if re.fullmatch("h[1-6]", n.tag)]
    assert found == [4, *levels]


# --- Colours ----------------------------------------------------------------------------------------------------------


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_contrast(page, theme):
    style = page.one("style").text
    start = {"light": ":root {", "dark": "prefers-color-scheme: dark", "print": "@media print"}[theme]
    colours = dict(
        re.findall(
            r"--([a-z]+): (#[0-9a-f]{3,6});",
            style[: style.index("*, ::before")].partition(":root {")[2].partition("}")[0],
        )
    )
    block = style[style.index(start) :].partition("}")[0]
    colours |= dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6});", block))
    colours = {k: "#" + "".join(c * 2 for c in v[1:]) if len(v) == 4 else v for k, v in colours.items()}
    for ground in ("paper", "sheet", "tint"):
        for text in ("ink", "soft", "press", "holds", "absent", "reversed", "open"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (theme, text, ground)
        for line in ("method", "baseline"):
            assert contrast(colours[line], colours[ground]) >= 3, (theme, line, ground)
    used = set(re.findall(r"var\(--([a-z]+)\)", style)) - {"serif", "sans", "mono", "h", "v"}
    assert used <= set(colours)


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_a_page_is_written_as_it_is_even_with_what_utf_8_cannot_hold(tmp_path, html):
    assert "\ud800" in html
    write(html, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == html.encode("utf-8", "replace")


if __name__ == "__main__":
    write(render(*showcase(), **MADE), Path(sys.argv[1]))
