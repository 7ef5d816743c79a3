"""The pairwise judge: templates, verdicts, both orders, its habits with intervals; judges are scripted."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from counterproof.cli import cli
from counterproof.errors import UserError
from counterproof.judging.pairwise import (
    Estimate,
    Pair,
    PairwiseJudge,
    battle_rows,
    bootstrap_means,
    pairwise_report,
    read_pairs,
    read_verdict,
    write_json_lines,
)
from counterproof.judging.templates import SHIPPED, PromptTemplate
from counterproof.language.conversation import Chat, Reply

PLACES = ("prompt", "answer_a", "answer_b")


class Script:
    def __init__(self, say):
        self.say, self.requests = say, []

    def check(self, settings):
        pass

    def identity(self):
        return {"script": 1}

    def ask(self, requests, jobs, keep, say):
        for key, request in requests.items():
            self.requests.append(request)
            found = self.say(request.messages, request.sample)
            if isinstance(found, str):
                found = Reply(text=found, finish="stop", prompt_tokens=1, completion_tokens=1)
                keep(key, found)
            say(key, found)


def judge(say, **more):
    """A judge that says `say(prompt, first answer, second answer, sample)`."""
    template = PromptTemplate.parse("{{prompt}}|{{answer_a}}|{{answer_b}}", "t", needed=PLACES)
    backend = Script(lambda messages, sample: say(*messages[0]["content"].split("|"), sample))
    return PairwiseJudge(Chat(backend, None, None, None, 0), template, **more)


def by_number(prompt, first, second, sample):
    """The judge that always knows: the larger number is better, much better by 10."""
    gap = int(first) - int(second)
    return (
        "[[A=B]]"
        if gap == 0
        else f"[[{'A' if gap > 0 else 'B'}{'>>' if abs(gap) >= 10 else '>'}{'B' if gap > 0 else 'A'}]]"
    )


def pairs_of(numbers, **more):
    return [
        Pair(prompt=f"p{i}", answer_a=str(a), answer_b=str(b), model_a="x", model_b="y", **more)
        for i, (a, b) in enumerate(numbers)
    ]


# verdicts


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("My final verdict is tie: [[A=B]].", "A=B"),
        ("[[A>>B]]", "A>>B"),
        ("first [[A>B]], on reflection [[B>>A]]", "B>>A"),  # the last one
        ("so [[b>a]]", "B>A"),  # lower case
        ("so [B>A]", "B>A"),  # single brackets
        ("[[A>B]] rather than [B>A]", "A>B"),  # single ones count only without double ones
        ("[A>B] [B>>A]", "B>>A"),
        ("[[A]]", None),  # none of the five
        ("[[A>B]] or [[A<B]]", None),  # the last one is none: nothing is guessed from the one before
        ("A>B", None),
        ("[[ A>B ]]", None),
        ("I cannot say.", None),
        ("", None),
    ],
)
def test_verdicts(text, verdict):
    assert read_verdict(text) == verdict


@given(st.text("AB<>=[] ab", max_size=40))
def test_a_verdict_is_one_of_five_or_none(text):
    assert read_verdict(text) in {"A>>B", "A>B", "A=B", "B>A", "B>>A", None}
    assert read_verdict(text + "[[B>A]]") == "B>A"


# templates


def test_a_template_has_sections_and_a_note_that_is_not_sent():
    text = "A {{note}}.\n=== system ===\nBe {{mood}}.\n=== user ===\n{{prompt}}?\n\n=== reminder ===\nOnly that.\n"
    template = PromptTemplate.parse(text, "t", needed=["prompt"], allowed=["mood"])
    assert template.messages(prompt="Why", mood="brief") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    assert template.reminder == "Only that."


def test_without_headings_the_file_is_the_users_message():
    assert PromptTemplate.parse("Q: {{prompt}}", "t", needed=["prompt"]).messages(prompt="x") == [
        {"role": "user", "content": "Q: x"}
    ]


def test_what_is_put_in_is_text():
    template = PromptTemplate.parse('{"a": {"b": 1}} {{prompt}} {{answer}}', "t", needed=["prompt", "answer"])
    (message,) = template.messages(prompt=r"{{answer}} \1 {x}", answer="=== user ===")
    assert message["content"] == r'{"a": {"b": 1}} {{answer}} \1 {x} === user ==='


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{prompt}}", r"t: the place \{\{answer\}\} is missing; the places are \{\{prompt\}\}, \{\{answer\}\}"),
        ("\n{{prompt}}\n{{answer}} {{aswer}}", r"t:3: unknown place \{\{aswer\}\}; the places are"),
        ("=== user ===\n{{prompt}}{{answer}}\n=== sytem ===\n", r"t:3: no section 'sytem'; there are system, user"),
        ("=== user ===\n{{prompt}}{{answer}}\n=== user ===\nx", r"t:3: a second section 'user'"),
        ("=== system ===\n{{prompt}}{{answer}}", "t has no user's message"),
        ("", "t has no user's message"),
        ("=== user ===\n{{prompt}}{{answer}}\n=== reminder ===\n{{prompt}}", "reminder must be a text without places"),
        ("=== user ===\n{{prompt}}\n=== reminder ===\n{{answer}}", r"\{\{answer\}\} is missing"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(text, says):
    with pytest.raises(UserError, match=says):
        PromptTemplate.parse(text, "t", needed=["prompt", "answer"])


def test_templates_are_files(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff{{prompt}} {{answer_a}} {{answer_b}}", encoding="utf-8")
    judge = PairwiseJudge(Chat(Script(None), None, None, None, 0), path)
    assert judge.messages(Pair(prompt="p", answer_a="1", answer_b="2"), "ba") == [{"role": "user", "content": "p 2 1"}]
    path.write_text("{{prompt}} {{answer_a}}")
    with pytest.raises(UserError, match=r"mine\.txt: the place \{\{answer_b\}\} is missing"):
        PairwiseJudge(Chat(Script(None), None, None, None, 0), path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine\.txt: is not UTF-8"):
        PromptTemplate.read(path, needed=[])
    with pytest.raises(UserError, match=r"cannot read the template .*nowhere: No such file.*pairwise"):
        PromptTemplate.read(tmp_path / "nowhere", needed=[])


def test_the_shipped_prompt_holds_both_answers_and_the_five_verdicts():
    judge = PairwiseJudge(Chat(Script(None), None, None, None, 0))
    pair = Pair(prompt="PROMPT", answer_a="ALPHA", answer_b="BETA")
    system, user = judge.messages(pair, "ab")
    assert all(f"[[{verdict}]]" in system["content"] for verdict in ("A>>B", "A>B", "A=B", "B>A", "B>>A"))
    assert user["content"].index("PROMPT") < user["content"].index("ALPHA") < user["content"].index("BETA")
    swapped = judge.messages(pair, "ba")[1]["content"]
    assert swapped.replace("ALPHA", "~").replace("BETA", "ALPHA").replace("~", "BETA") == user["content"]
    assert "not sent" not in system["content"] + user["content"]
    assert (SHIPPED / "pairwise.txt").is_file()


# pairs


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


GOOD = {"prompt": "p", "answer_a": "1", "answer_b": "2", "model_a": "x", "model_b": "y"}


def test_pairs_from_a_file(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        {**GOOD, "prompt_id": 7, "winner": "tie", "category": "maths", "other": [1]},
        "",
        {"prompt": "q\u2028r", "answer_a": "", "answer_b": "2", "strength": 2, "totals": [3, 9]},
    )
    first, second = read_pairs(path)
    assert (first.prompt_id, first.winner, first.category) == ("7", "tie", "maths")
    assert (second.model_a, second.model_b, second.totals, second.strength) == ("a", "b", (3, 9), 2)
    assert second.prompt == "q\u2028r"
    same = Pair(prompt="q\u2028r", answer_a="", answer_b="", model_a="u", model_b="v")
    assert second.prompt_id == same.prompt_id != first.prompt_id


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", r"pairs\.jsonl:2: not JSON"),
        ("[1]", r"pairs\.jsonl:2: \[1\] is not a JSON object"),
        (
            {"prompt": "p", "answer_a": "1"},
            r"pairs\.jsonl:2: no field 'answer_b'; it has 'prompt_id', 'prompt', 'answer_a'",
        ),
        ({**GOOD, "answer_a": 5}, r"pairs\.jsonl:2: answer_a is 5; expected a text"),
        ({**GOOD, "prompt": " "}, r"pairs\.jsonl:2: the prompt is empty"),
        ({**GOOD, "model_b": "x"}, r"pairs\.jsonl:2: model_a and model_b are both 'x'"),
        ({**GOOD, "winner": "a"}, r"pairs\.jsonl:2: winner is 'a'; expected one of model_a, tie, model_b"),
        ({**GOOD, "strength": 3}, r"pairs\.jsonl:2: strength is 3"),
        ({**GOOD, "totals": [1, 11]}, r"pairs\.jsonl:2: totals is \[1, 11\]"),
        (
            {**GOOD, "model_a": "y", "model_b": "x"},
            r"pairs\.jsonl:2: y and x are compared on prompt_id .* in line 1 already",
        ),
        (
            {**GOOD, "prompt": "other", "prompt_id": "1"},
            r"pairs\.jsonl:2: prompt_id '1' has another prompt than in line 1",
        ),
    ],
)
def test_a_bad_pair_is_named_by_file_and_line(tmp_path, record, says):
    path = write(
        tmp_path / "pairs.jsonl",
        {**GOOD, "prompt_id": "1"},
        {"prompt_id": "1", **record} if isinstance(record, dict) else record,
    )
    with pytest.raises(UserError, match=says):
        read_pairs(path)


def test_files_that_hold_no_pairs(tmp_path):
    with pytest.raises(UserError, match="has no pairs"):
        read_pairs(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(UserError, match=r"cannot read .*gone"):
        read_pairs(tmp_path / "gone")
    with pytest.raises(UserError, match=r"one\.jsonl:1: no field 'winner'"):
        read_pairs(write(tmp_path / "one.jsonl", GOOD), labelled=True)


# judging


def test_each_pair_is_asked_in_both_orders_and_both_verdicts_are_kept():
    found = judge(by_number).judge(pairs_of([(3, 1), (1, 30), (2, 2)]))
    assert [(each.order, each.verdict, each.winner, each.level) for each in found] == [
        ("ab", "A>B", "model_a", 1),
        ("ba", "B>A", "model_a", 1),
        ("ab", "B>>A", "model_b", -2),
        ("ba", "A>>B", "model_b", -2),
        ("ab", "A=B", "tie", 0),
        ("ba", "A=B", "tie", 0),
    ]


def test_a_verdict_in_the_question_does_not_count():
    found = judge(lambda *shown: "no idea").judge([Pair(prompt="[[A>>B]]", answer_a="[[A>B]]", answer_b="[[B>A]]")])
    assert [each.outcome for each in found] == ["unparsed"] * 2
    assert {each.winner for each in found} == {None}
    assert found[0].replies == ("no idea", "no idea")


def test_a_judge_that_fails_is_recorded():
    def say(prompt, first, second, sample):
        return UserError("timed out") if prompt == "p1" and first == "5" else by_number(prompt, first, second, sample)

    it = judge(say)
    found = it.judge(pairs_of([(3, 1), (5, 4)]))
    assert [each.outcome for each in found] == ["read", "read", "failed", "read"]
    assert found[2].problem == "timed out"
    # One order alone would carry the position bias: no battle of that pair.
    assert [row["prompt_id"] for row in battle_rows(found, judge="j")] == [found[0].pair.prompt_id] * 2


def test_long_answers_are_cut_and_counted():
    shown = []
    it = judge(lambda *said: shown.append(said[:3]) or "[[A=B]]", longest_answer=3)
    found = it.judge([Pair(prompt="a long prompt", answer_a="12345", answer_b="123")])
    assert shown == [("a long prompt", "123\n[... cut]", "123"), ("a long prompt", "123", "123\n[... cut]")]
    assert pairwise_report(found).answers_cut == 1


def test_repeats_are_samples_of_their_own_and_progress_goes_through_all():
    seen = []
    it = judge(lambda prompt, first, second, sample: "[[A>B]]" if sample == 1 else "[[B>A]]", temperature=1.0)
    found = it.judge(pairs_of([(1, 2)]), repeats=2, progress=lambda *at: seen.append(at))
    assert [(each.order, each.repeat, each.verdict) for each in found] == [
        ("ab", 0, "B>A"), ("ab", 1, "A>B"), ("ba", 0, "B>A"), ("ba", 1, "A>B"),
    ]  # fmt: skip
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_battles_have_the_arena_schema(tmp_path):
    found = judge(by_number).judge(pairs_of([(30, 1), (1, 2)]))
    rows = battle_rows(found, judge="j")
    assert [(row["winner"], row["weight"], row["order"]) for row in rows] == [
        ("model_a", 3.0, "ab"), ("model_a", 3.0, "ba"), ("model_b", 1.0, "ab"), ("model_b", 1.0, "ba"),
    ]  # fmt: skip
    assert set(rows[0]) == {"model_a", "model_b", "winner", "prompt_id", "judge", "weight", "order"}
    twice = battle_rows(judge(by_number).judge(pairs_of([(30, 1)]), repeats=4), judge="j")
    assert sum(row["weight"] for row in twice) == pytest.approx(6.0)  # as much as asked once
    write_json_lines(tmp_path / "b.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == rows
    with pytest.raises(ValueError, match="strong is 0"):
        battle_rows(found, judge="j", strong=0)


def test_the_battles_are_what_the_ranking_reads(tmp_path):
    from counterproof.judging import read_battles

    write_json_lines(tmp_path / "b.jsonl", battle_rows(judge(by_number).judge(pairs_of([(30, 1), (1, 2)])), judge="j"))
    read_battles(tmp_path / "b.jsonl")


# what a judge is like


def values(report):
    return {name: figure.value for name, figure in report.figures.items()}


def test_a_judge_without_faults():
    it = judge(by_number)
    found = values(pairwise_report(it.judge(pairs_of([(3, 1), (1, 2), (2, 2)], winner=None), repeats=2)))
    assert found["position_bias"] == found["unparsed"] == found["failed"] == found["first_twice"] == 0
    assert found["consistency"] == found["self_consistency"] == 1
    assert found["tie"] == pytest.approx(1 / 3)
    assert math.isnan(found["agreement"])


def test_a_judge_that_always_says_a():
    found = values(pairwise_report(judge(lambda *shown: "[[A>B]]").judge(pairs_of([(3, 1), (1, 2)]))))
    assert found["position_bias"] == 1
    assert found["consistency"] == 0
    assert (found["first_twice"], found["second_twice"]) == (1, 0)
    found = values(pairwise_report(judge(lambda *shown: "[[B>A]]").judge(pairs_of([(3, 1), (1, 2)]))))
    assert (found["position_bias"], found["first_twice"], found["second_twice"]) == (-1, 0, 1)


def test_position_bias_counts_half_where_one_order_is_a_tie():
    it = judge(lambda prompt, first, second, sample: "[[A>B]]" if first == "9" else "[[A=B]]")
    found = values(pairwise_report(it.judge(pairs_of([(9, 1)]))))
    assert found["position_bias"] == 0.5
    assert found["consistency"] == 0


def test_verbosity_and_what_of_it_is_bias():
    longer = judge(lambda prompt, first, second, sample: "[[A>B]]" if len(first) > len(second) else "[[B>A]]")
    pairs = [
        Pair(prompt="p", answer_a="aaaa", answer_b="b", winner="model_a"),
        Pair(prompt="q", answer_a="a", answer_b="bbbb", winner="model_a"),
        Pair(prompt="r", answer_a="a", answer_b="bb", winner="tie"),
        Pair(prompt="s", answer_a="aa", answer_b="bb", winner="tie"),  # of equal length: says nothing
    ]
    report = pairwise_report(longer.judge(pairs))
    assert report.figures["verbosity"].value == 1
    assert report.figures["verbosity"].count == 3
    assert report.figures["verbosity_bias"].value == pytest.approx((0 + 2 + 1) / 3)
    assert report.figures["agreement"].value == pytest.approx(2 / 8)


def test_self_consistency_is_the_share_of_agreeing_repeats():
    said = {0: "[[A>B]]", 1: "[[A>>B]]", 2: "[[B>A]]", 3: "?"}
    it = judge(lambda prompt, first, second, sample: said[sample], temperature=1.0)
    report = pairwise_report(it.judge(pairs_of([(1, 2)]), repeats=4))
    assert report.figures["self_consistency"].value == pytest.approx(1 / 3)  # of three that could be read, one pair
    assert report.figures["unparsed"].value == 1 / 4
    assert report.figures["reminded"].value == 1 / 4


def test_nothing_to_say_is_nan_in_the_report_and_null_in_json():
    report = pairwise_report(judge(lambda *shown: "?").judge(pairs_of([(1, 2)])))
    assert math.isnan(report.figures["position_bias"].value)
    assert report.figures["unparsed"].value == 1
    assert report.complete == 0
    said = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert said["figures"]["position_bias"]["value"] is None
    assert math.isnan(report.figures["unparsed"].low)  # one prompt: no interval


# the bootstrap


def test_the_mean_is_over_rows_and_the_interval_over_prompts():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 25)
    shared = np.repeat(rng.normal(size=40), 25)  # every row of a prompt the same: 40 observations, not 1000
    found = bootstrap_means({"x": shared}, prompts.tolist(), rounds=4000)["x"]
    assert found.value == pytest.approx(shared.mean())
    assert (found.count, found.prompts) == (1000, 40)
    error = shared[::25].std() / math.sqrt(40)  # of a mean of 40
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.06)
    apart = bootstrap_means({"x": shared}, list(range(1000)), rounds=2000)["x"]
    assert (found.high - found.low) / (apart.high - apart.low) == pytest.approx(5, rel=0.1)  # sqrt(25) too narrow


def test_the_bootstrap_is_that_of_a_plain_loop():
    values, prompts = np.array([1.0, 0.0, np.nan, 4.0, 2.0]), ["a", "a", "b", "b", "c"]
    rng = np.random.default_rng(5)
    means = []
    for counts in rng.multinomial(3, [1 / 3] * 3, size=300):
        drawn = [v for name, times in zip("abc", counts, strict=True) for _ in range(times)
                 for v, p in zip(values, prompts, strict=True) if p == name and not math.isnan(v)]  # fmt: skip
        means.append(np.mean(drawn))
    found = bootstrap_means({"x": values}, prompts, rounds=300, level=0.9, seed=5)["x"]
    assert found.value == pytest.approx(7 / 4)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    columns, prompts = {"x": rng.normal(size=30)}, list(range(30))
    whole = bootstrap_means(columns, prompts, rounds=50)
    monkeypatch.setattr("counterproof.judging.pairwise.BLOCK", 70)  # two resamples at a time
    assert bootstrap_means(columns, prompts, rounds=50) == whole


def test_columns_share_their_resamples():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 50))
    found = bootstrap_means({"x": x, "same": x, "y": y, "gap": x - x}, list(range(50)))
    assert found["x"] == found["same"] != found["y"]
    assert (found["gap"].low, found["gap"].high) == (0, 0)


def test_the_interval_covers():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(30), 4)
        x = np.repeat(rng.normal(size=30), 4) + rng.normal(size=120)
        found = bootstrap_means({"x": x}, prompts.tolist(), rounds=300, seed=seed)["x"]
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bad_arguments_of_the_bootstrap():
    with pytest.raises(ValueError, match="rounds is 0"):
        bootstrap_means({"x": [1.0]}, ["a"], rounds=0)
    with pytest.raises(ValueError, match=r"column 'x' has shape \(2,\); there are 1 rows"):
        bootstrap_means({"x": [1.0, 2.0]}, ["a"])
    assert str(Estimate(0.5, 0.25, 0.75, 3, 2)) == "0.500 [0.250, 0.750]"
    assert str(Estimate(math.nan, math.nan, math.nan, 0, 0)) == "-"


@pytest.mark.parametrize("wrong", [{"repeats": 0}])
def test_bad_arguments_of_the_judge(wrong):
    with pytest.raises(ValueError, match="repeats is 0"):
        judge(by_number).judge(pairs_of([(1, 2)]), **wrong)
    with pytest.raises(ValueError, match="longest_answer is 0"):
        judge(by_number, longest_answer=0)


# the command line, against a real endpoint


@pytest.fixture
def endpoint(monkeypatch):
    path = Path(__file__).parents[1] / "language" / "test_conversation.py"
    spec = importlib.util.spec_from_file_location("conversation_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    it = module.Endpoint()

    def behave(body, number):
        text = body["messages"][-1]["content"]
        if "refuse" in text:
            return 400, {"error": {"message": "too long"}}, {}
        first, second = (int(found) for found in re.findall(r"<answer [AB]>\n(\d+)", text))
        return 200, module.completion("[[A>>B]]" if first > second else "[[B>A]]"), {}

    it.behave = behave
    yield it
    it.close()


def run(*words):
    return CliRunner().invoke(cli, ["judging", *map(str, words)], catch_exceptions=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_compare_writes_verdicts_battles_and_a_report(endpoint, tmp_path):
    records = [{**GOOD, "prompt": f"p{i}", "answer_a": "7", "answer_b": str(i)} for i in range(4)]
    records.append({**GOOD, "prompt": "refuse"})
    path, out = write(tmp_path / "pairs.jsonl", *records), tmp_path / "out"
    words = ("compare", path, "--judge", endpoint.url, "--judge-model", "m", "--out", out, "--price", 1, 2, "--jobs", 1)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "4 of 5 pairs judged in both orders: 8 battles" in done.output
    assert "2 questions got no answer" in done.output
    judgments = lines(out / "judgments.jsonl")
    assert [each["outcome"] for each in judgments] == ["read"] * 8 + ["failed"] * 2
    assert judgments[0]["replies"] == ["[[A>>B]]"]
    assert [(each["winner"], each["weight"]) for each in lines(out / "battles.jsonl")] == [
        ("model_a", 3.0), ("model_a", 1.0)] * 4  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["figures"]["consistency"]["value"] == 1
    assert report["figures"]["failed"]["value"] == 0.2
    assert report["usage"]["cost"] == pytest.approx(8 * (11 * 1 + 3 * 2) / 1e6)
    # Again: what was answered is on disk, what failed is asked for.
    endpoint.requests.clear()
    again = json.loads(run(*words, "--json").stdout)
    assert len(endpoint.requests) == 2
    assert (again["usage"]["cached"], again["usage"]["calls"], again["battles"]) == (8, 0, 8)


def test_test_judge_on_labelled_pairs(endpoint, tmp_path):
    records = [{**GOOD, "prompt": f"p{i}", "answer_a": "7", "answer_b": str(i), "category": "odd" if i % 2 else "even",
                "winner": "model_b" if i == 2 else "model_a"} for i in range(4)]  # fmt: skip
    path = write(tmp_path / "labelled.jsonl", *records)
    words = ("test-judge", path, "--judge", endpoint.url, "--judge-model", "m", "--out", tmp_path / "out")
    found = json.loads(run(*words, "--json").stdout)
    figures = found["judges"]["m"]["figures"]["pairs"]
    assert figures["accuracy"]["value"] == 0.75
    assert figures["accuracy of even"]["value"] == 0.5
    assert figures["consistency"]["value"] == 1
    assert found["judges"]["m"]["correlations"]["pairs"]["pairs"]["problem"]
    assert len(lines(tmp_path / "out" / "verdicts.jsonl")) == 4
    text = run(*words).output
    assert "0 calls" in text
    assert "accuracy of even" in text


def test_what_a_user_can_mend_is_one_line(endpoint, tmp_path):
    path = write(tmp_path / "pairs.jsonl", {**GOOD, "winner": "model_a"})
    mine = tmp_path / "mine.txt"
    mine.write_text("{{prompt}}")
    out = ("--out", tmp_path / "out")
    for words, says in (
        (("compare", tmp_path / "gone", *out), "cannot read"),
        (("compare", path, "--template", mine, *out), "answer_a"),
        (("compare", path, "--judge", endpoint.url, *out), "model="),
        (("compare", path, "--judge", endpoint.url, "--judge-model", "m", "--out", path), "cannot make the folder"),
        (("test-judge", path, "--judge", endpoint.url), "0 --judge-model for 1 endpoints"),
        (("test-judge", path, "--family", "a", "--family", "b"), "2 --family for 1 --judge"),
        (("test-judge", tmp_path), "no file judgerbench_A"),
        (("test-judge", tmp_path, "--template", mine), "prompts of their own"),
    ):
        problem = run(*words).exception
        assert isinstance(problem, UserError), words
        assert says in str(problem)
    assert endpoint.requests == []
