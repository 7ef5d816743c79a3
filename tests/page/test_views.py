"""Lists: the order is the printed formula, pages hold together whatever happens between them, times may jump."""

import json
import math
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.page.store import Entry, Store
from counterproof.page.view_commands import COMMANDS
from counterproof.page.views import (
    Query,
    Score,
    Views,
    forget_view,
    period,
    present,
    save_view,
    saved_view,
    saved_views,
)


class Clock:
    def __init__(self):
        self.now = datetime(2026, 11, 23, 8, 30, 40, tzinfo=UTC)

    def __call__(self):
        return self.now


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "page.sqlite", clock=Clock())
    yield store
    store.close()


def add(store, title, day, source="x", **more):
    return store.add(Entry(title=title, **more), source=source, day=day).paper


def numbers(page):
    return [item.paper.id for item in page.items]


def all_pages(views, query, limit):
    cursor, pages = None, []
    while True:
        pages.append(views.page(query, limit=limit, cursor=cursor))
        cursor = pages[-1].cursor
        if cursor is None:
            return pages


def test_the_score_is_the_sum_of_its_parts_and_the_parts_are_the_formula(store):
    one = add(store, "One", "2026-11-20")
    two = add(store, "Two", "2026-11-22", signals={"upvotes": 15, "unknown": 1000})
    three = add(store, "Three", "2026-11-22", source="y")
    store.clock.now = datetime(2026, 11, 21, 8, 30, tzinfo=UTC)
    for voter in ("ann", "bob"):
        store.vote(one, voter, 1)
    store.vote(one, "ann", 1)
    store.clock.now = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)
    store.vote(one, "cy", 1)
    store.vote(one, "bob", 0)
    page = Views(store).page(Query(view="trending"))
    items = {item.paper.id: item for item in page.items}

    def left(days):
        return 0.5 ** (days / 3)

    day = 8.5 / 24
    votes = {one: left(2) + left(0), two: 0.0, three: 0.0}  # ann on the 21st, cy now; bob took his back
    mean = (2 + 0) / 2
    want = {
        one: {"votes": (2 * votes[one] + 2 * mean * left(3 + day)) / 4, "new": 0.1 * left(3 + day)},
        two: {"votes": 2 * mean * left(1 + day) / 2, "upvotes": 0.5 * left(1 + day) * 4, "new": 0.1 * left(1 + day)},
        three: {"votes": 0.0, "new": 0.1 * left(1 + day)},
    }
    for paper, parts in want.items():
        assert items[paper].parts == pytest.approx(parts)
        assert items[paper].score == pytest.approx(sum(parts.values()))
    assert numbers(page) == sorted(want, key=lambda paper: -sum(want[paper].values()))
    assert "15 upvotes on 2026-11-" in items[two].says
    assert items[one].says.startswith("2 votes ")
    assert "half" not in page.formula
    assert "/ 3)" in page.formula
    assert "0.5 d log2(1 + upvotes)" in page.formula


def test_waiting_changes_no_order_but_votes_do(store):
    rng = random.Random(0)
    papers = [
        add(store, f"P{n}", f"2026-11-{rng.randint(10, 22)}", signals={"stars": rng.randint(0, 50)}) for n in range(30)
    ]
    for n in range(60):
        store.vote(rng.choice(papers), f"v{n}", 1)
    first = Views(store).page(Query(view="trending"))
    store.clock.now += timedelta(days=3)
    later = Views(store).page(Query(view="trending"))
    assert numbers(later) == numbers(first)
    for before, after in zip(first.items, later.items):
        assert after.score == pytest.approx(before.score / 2, rel=1e-6)
    last = numbers(first)[-1]
    for n in range(40):
        store.vote(last, f"new{n}", 1)
    assert numbers(Views(store).page(Query(view="trending")))[0] == last


def test_half_life_is_the_readers_choice(store):
    old = add(store, "Old", "2026-11-01")
    new = add(store, "New", "2026-11-22")
    store.clock.now = datetime(2026, 11, 2, tzinfo=UTC)
    for voter in range(9):
        store.vote(old, f"v{voter}", 1)
    store.clock.now = datetime(2026, 11, 22, tzinfo=UTC)
    for voter in range(3):
        store.vote(new, f"v{voter}", 1)
    assert numbers(Views(store).page(Query(view="trending"))) == [new, old]
    assert numbers(Views(store).page(Query(view="trending", half_life=30))) == [old, new]
    page = Views(store).page(Query(view="trending", half_life=30))
    assert "/ 30)" in page.formula


def test_ties_go_by_id_and_new_papers_without_votes_are_newest_first(store):
    same = [add(store, f"Same {n}", "2026-11-20") for n in range(5)]
    newer = add(store, "Newer", "2026-11-22")
    assert numbers(Views(store).page(Query(view="trending"))) == [newer, *reversed(same)]


def test_days_and_votes_of_a_wrong_clock_ahead_decay_as_those_behind(store):
    ahead, behind = add(store, "Ahead", "2026-12-05"), add(store, "Behind", "2026-11-11", signals={})
    for paper, days in ((ahead, 6), (behind, -6)):
        store.clock.now += timedelta(days=days)
        store.vote(paper, "ann", 1)
        store.clock.now -= timedelta(days=days)
    store.clock.now = datetime(2026, 11, 23, tzinfo=UTC)
    ahead_item, behind_item = (
        next(item for item in Views(store).page(Query(view="trending")).items if item.paper.id == paper)
        for paper in (ahead, behind)
    )
    assert ahead_item.parts["new"] == pytest.approx(behind_item.parts["new"])
    assert ahead_item.parts["votes"] < 0.5


def test_days_of_which_only_the_year_or_nothing_is_known_do_no_harm(store):
    good = add(store, "Good", "2026-11-20")
    year = store.add(Entry(title="Year", published="2026"), source="x", day="2026").paper
    odd = add(store, "Odd", "soon")
    for paper in (good, year, odd):
        store.vote(paper, "ann", 1)
    assert set(numbers(Views(store).page(Query(view="trending")))) == {good, year, odd}
    assert set(numbers(Views(store).page(Query()))) == {good, year, odd}


def test_an_old_paper_comes_back_when_it_is_voted_for(store):
    old = add(store, "Old", "2020-01-01")
    for n in range(5):
        add(store, f"New {n}", "2026-11-22")
    assert old not in numbers(Views(store).page(Query(view="trending")))
    store.vote(old, "ann", 1)
    assert numbers(Views(store).page(Query(view="trending")))[0] == old


def test_votes_and_signals_of_merged_papers_count_once_for_the_one_that_is_left(store):
    one = add(store, "One", "2026-11-22", signals={"stars": 3})
    two = add(store, "Two", "2026-11-22", signals={"stars": 7})
    store.vote(one, "ann", 1)
    store.vote(two, "ann", 1)
    store.vote(two, "bob", 1)
    store.merge(one, two, why="alike")
    for query in (Query(view="trending"), Query(view="day", at="2026-11-22"), Query(view="month", at="2026-11")):
        (item,) = Views(store).page(query).items
        assert item.paper.id == one
        assert item.says.startswith("2 votes")
        assert "7 stars" in item.says
    three = add(store, "Three", "2026-11-10")
    store.merge(one, three, why="alike")
    assert numbers(Views(store).page(Query(view="day", at="2026-11-10"))) == [one]


def test_a_clock_that_jumps_back_reorders_no_page_that_was_handed_out(store):
    rng = random.Random(1)
    papers = [add(store, f"P{n}", f"2026-11-{rng.randint(15, 23)}") for n in range(20)]
    for n in range(40):
        store.vote(rng.choice(papers), f"v{n}", 1)
    views = Views(store)
    whole = numbers(views.page(Query(view="trending")))
    first = views.page(Query(view="trending"), limit=6)
    store.clock.now -= timedelta(days=400)
    store.vote(whole[-1], "late", 1)
    for n in range(30):
        store.vote(whole[-1], f"late{n}", 1)
    add(store, "Another", "2026-11-23")
    got = numbers(first)
    page = first
    while page.cursor is not None:
        page = Views(store).page(Query(view="trending"), limit=6, cursor=page.cursor)  # also by another process
        assert page.moment == first.moment
        got += numbers(page)
    assert got == whole
    assert all(math.isfinite(item.score) for item in Views(store).page(Query(view="trending")).items)
    Views(store).page(Query(view="week"))


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5), st.booleans()), max_size=40), st.integers(1, 9),
       st.sampled_from([Query(view="trending"), Query(view="month", at="2026-11"), Query(), Query(view="search",
       words="paper", how="words")]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_pages_are_the_whole_list_in_order_whatever_happens_between(tmp_path_factory, votes, limit, query):
    store = Store(tmp_path_factory.mktemp("s") / "p.sqlite", clock=Clock())
    for n in range(12):
        add(store, f"Paper {n}", f"2026-11-{10 + n % 5}", abstract="word " * n)
    for paper, voter, value in votes:
        store.vote(paper + 1, f"v{voter}", int(value))
    whole = numbers(Views(store).page(query))
    assert len(whole) == 12
    cursor, got, number = None, [], 0
    while True:
        page = Views(store).page(query, limit=limit, cursor=cursor)
        got += numbers(page)
        cursor = page.cursor
        if cursor is None:
            break
        store.vote(1 + number % 12, f"between{number}", 1)
        if query.view != "search":
            add(store, f"Between {number}", "2026-11-12")
        number += 1
    assert got == whole
    store.close()


def test_days_weeks_and_months_are_iso_and_have_neighbours(store):
    sunday = add(store, "Sunday", "2026-11-22")
    monday = add(store, "Monday", "2026-11-23")
    first = add(store, "First of january", "2027-01-01")
    views = Views(store)
    assert numbers(views.page(Query(view="day"))) == [monday]
    assert numbers(views.page(Query(view="week"))) == [monday]
    assert numbers(views.page(Query(view="week", at="2026-W47"))) == [sunday]
    assert numbers(views.page(Query(view="week", at="2026-W53"))) == [first]
    assert numbers(views.page(Query(view="month", at="2026-11"))) == [monday, sunday]
    page = views.page(Query(view="day", at="2026-11-22"))
    assert (page.earlier, page.later) == ("2026-11-21", "2026-11-23")
    assert views.page(Query(view="day")).later is None
    assert views.page(Query(view="week")).earlier == "2026-W47"
    assert views.page(Query(view="month", at="2026-01")).earlier == "2025-12"
    assert views.page(Query(view="week", at="2026-W01")).title == "Papers of Week 01 of 2026"
    assert views.page(Query(view="day", at="2020-01-01")).items == ()
    for at, text in (("0001-01-01", "day"), ("9999-12-31", "day"), ("0001-01", "month")):
        views.page(Query(view=text, at=at))


def test_a_paper_is_on_every_day_that_a_source_listed_it(store):
    paper = add(store, "Again", "2026-11-01", abstract="a")
    store.add(Entry(title="Again", abstract="a"), source="y", day="2026-11-20")
    for day in ("2026-11-01", "2026-11-20"):
        assert numbers(Views(store).page(Query(view="day", at=day))) == [paper]
    assert numbers(Views(store).page(Query(view="month", at="2026-11"))) == [paper]


@given(st.dates())
def test_every_day_lies_in_its_week_and_month(day):
    for view in ("day", "week", "month"):
        try:
            first, last = period(view, present(view, str(day)))
        except UserError:
            assert day.year in (1, 9999)
            continue
        assert first <= day <= last


def test_filters_narrow_every_list(store):
    add(store, "Paper a", "2026-11-20", source="a")
    b = add(store, "Paper b", "2026-11-21", source="b")
    c = store.add(Entry(title="Paper card", slug="arena-hard"), source="card", day="2026-11-22").paper
    for query in (
        Query(),
        Query(view="trending"),
        Query(view="month"),
        Query(view="search", words="paper", how="words"),
    ):
        views = Views(store)
        said = {**json.loads(query.to_json())}
        assert numbers(views.page(Query(**said, source="b"))) == [b]
        assert numbers(views.page(Query(**said, runnable=True))) == [c]
        assert numbers(views.page(Query(**said, room="judging"))) == [c]
        assert set(numbers(views.page(Query(**said, since="2026-11-21")))) == {b, c}
        assert numbers(views.page(Query(**said, since="2026-11-21", until="2026-11-21"))) == [b]
    assert numbers(views.page(Query(view="room", at="judging"))) == [c]
    assert numbers(views.page(Query(view="room", at="safety"))) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (dict(view="best"), "view"), (dict(view="day", at="2026-02-30"), "2026-02-30"),
        (dict(view="week", at="2025-W53"), "2025-W53"), (dict(view="month", at="2026-13"), "2026-13"),
        (dict(view="room", at="kitchen"), "kitchen"), (dict(view="search", words="?!"), "words"),
        (dict(view="similar"), "at"), (dict(view="trending", at="x"), "at"), (dict(since="yesterday"), "since"),
        (dict(half_life=0), "half_life"), (dict(half_life="3"), "half_life"), (dict(room="kitchen"), "kitchen"),
        (dict(how="magic"), "how"), (dict(runnable="yes"), "runnable"), (dict(source=3), "source"),
        (dict(room=[1]), "room"),
        (dict(at=3), "at"), (dict(view=["day"]), "view"), (dict(half_life=math.nan), "half_life"),
    ],
)  # fmt: skip
def test_lists_that_make_no_sense_are_refused_by_name(wrong, what):
    with pytest.raises(UserError, match=what):
        Query(**wrong)
    with pytest.raises(UserError):
        Query.from_json(json.dumps(wrong))


def test_cursors_are_bound_to_their_list_and_damage_is_told(store):
    for n in range(5):
        add(store, f"P{n}", "2026-11-22")
    views = Views(store)
    cursor = views.page(Query(view="trending"), limit=2).cursor
    with pytest.raises(UserError, match="another list"):
        views.page(Query(), cursor=cursor)
    rng = random.Random(0)
    for _ in range(300):
        place = rng.randrange(len(cursor))
        damaged = cursor[:place] + rng.choice("AZaz09-_=!é ") + cursor[place + 1 :]
        try:
            views.page(Query(view="trending"), cursor=damaged)
        except UserError:
            continue
    for text in ("", "x", "=" * 50, "W10", cursor[:-3], "WzFd" * 5000):
        with pytest.raises(UserError, match="damaged"):
            views.page(Query(view="trending"), cursor=text)
    with pytest.raises(UserError, match="1 to 500"):
        views.page(Query(), limit=0)


def test_views_are_saved_found_replaced_and_forgotten(store):
    query = Query(view="search", words='"reward model"', room="rewards", how="words")
    save_view(store, "rewards", query)
    save_view(store, "rewards", query)
    assert saved_view(store, "rewards") == query
    with pytest.raises(UserError, match="there already"):
        save_view(store, "rewards", Query())
    save_view(store, "rewards", Query(view="trending"), replace=True)
    assert saved_views(store) == {"rewards": Query(view="trending")}
    with pytest.raises(UserError, match="did you mean rewards"):
        saved_view(store, "reward")
    forget_view(store, "rewards")
    with pytest.raises(UserError, match="no saved view"):
        forget_view(store, "rewards")
    for name in ("", "Rewards", "a/b", "a b", "x" * 61, "-a", "a\n"):
        with pytest.raises(UserError, match="cannot name a view"):
            save_view(store, name, query)


def test_a_query_survives_json_and_other_json_is_refused():
    for query in (Query(), Query(view="week", at="2026-W48", source="x", half_life=7), Query(view="room", at="page")):
        assert Query.from_json(query.to_json()) == query
    for text in ("", "[]", "3", '{"view": "day", "other": 1}', "{"):
        with pytest.raises(UserError):
            Query.from_json(text)


def test_similar_papers_as_a_list(store):
    for n in range(8):
        add(store, f"Object detection {n}", "2026-11-20", arxiv=f"2611.0000{n}")
    views = Views(store)
    pages = all_pages(views, Query(view="similar", at="2611.00003"), 3)
    got = [paper for page in pages for paper in numbers(page)]
    assert sorted(got) == [1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(UserError, match=r"no paper '2611\.99999'"):
        views.page(Query(view="similar", at="2611.99999"))


def test_the_formula_tells_its_numbers():
    score = Score(half_life=7, weights={"stars": 0.3}, prior=4, new=0.2)
    assert "0.3 d log2(1 + stars)" in score.formula()
    assert "(n V + 4 m d) / (n + 4)" in score.formula()
    assert "/ 7)" in score.formula()
    assert "decays" in Score(half_life=math.inf).formula()


# the command line


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPROOF_HOME", str(tmp_path))
    from counterproof.bench.journal import home

    store = Store(home() / "page.sqlite")
    for n in range(5):
        store.add(
            Entry(title=f"Object detection {n}", abstract="With transformers.", arxiv=f"2611.0000{n}"),
            source="x",
            day="2026-11-20",
        )
    store.vote(3, "ann", 1)
    store.close()
    commands = {command.name: command for command in COMMANDS}

    def call(name, *words):
        return CliRunner().invoke(commands[name], words)

    return call


def test_verbs_say_lists_as_text_json_and_files(run, tmp_path):
    said = run("view", "day", "2026-11-20")
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines()[0] == "Papers of Friday 20 November 2026"
    assert "Object detection 2  [arxiv:2611.00002]" in said.stdout
    answer = json.loads(run("view", "month", "2026-11", "--json", "--limit", "2").stdout)
    assert [item["key"] for item in answer["items"]] == ["arxiv:2611.00002", "arxiv:2611.00004"]
    more = json.loads(run("view", "month", "2026-11", "--json", "--cursor", answer["cursor"]).stdout)
    assert [item["place"] for item in more["items"]] == [3, 4, 5]
    assert json.loads(run("trending", "--json", "--half-life", "1e4").stdout)["formula"].count("10000") >= 2
    found = run("find", "detection", "transformers", "--how", "words", "--save", "detr", "--json")
    assert len(json.loads(found.stdout)["items"]) == 5
    again = json.loads(run("view", "detr", "--json", "--limit", "1").stdout)
    assert again["query"] == {"view": "search", "words": "detection transformers", "how": "words"}
    assert "detr" in run("view").stdout
    assert run("view", "detr", "--format", "bibtex", "--out", str(tmp_path / "a.bib")).exit_code == 0
    assert (tmp_path / "a.bib").read_text().count("@misc{") == 5
    assert run("view", "detr", "--forget").exit_code == 0
    assert isinstance(run("view", "detr").exception, UserError)
    assert isinstance(run("view", "nonsense", "2026").exception, UserError)
    similar = run("similar", "2611.00001", "--json")
    assert len(json.loads(similar.stdout)["items"]) == 4
    assert "no vector yet" in similar.stderr


def test_a_pulled_paper_is_shown_under_any_of_its_names(run):
    said = run("show", "https://arxiv.org/abs/2611.00002v3")
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines()[0] == "Object detection 2"
    assert "With transformers." in said.stdout
    assert "1 vote\n" in said.stdout
    found = json.loads(run("show", "arxiv:2611.00002", "--json").stdout)
    assert (found["key"], found["votes"], found["sources"][0]["source"]) == ("arxiv:2611.00002", 1, "x")
    assert found["aliases"][0] == "arxiv:2611.00002"
    assert "feed find" in str(run("show", "2611.99999").exception)


def test_everything_is_exported(run, tmp_path):
    lines = run("export").stdout.splitlines()
    assert [json.loads(line)["arxiv"] for line in lines] == [f"2611.0000{n}" for n in range(5)]
    assert run("export", "--format", "ris", "--out", str(tmp_path / "all.ris")).exit_code == 0
    assert (tmp_path / "all.ris").read_text().count("TY  - ") == 5
    assert json.loads(run("export", "--json", "--out", str(tmp_path / "x")).stdout)["records"] == 5
    assert isinstance(run("export", "--json").exception, UserError)


def test_every_option_has_help():
    for command in COMMANDS:
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"
    assert subprocess.run([sys.executable, "-c", "import counterproof.page.view_commands"], check=True).returncode == 0
