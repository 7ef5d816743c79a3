"""The all-in-one judge, its training mixture, and JudgerBench against counts and numpy on hand-made verdicts."""

import csv
import itertools
import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from counterproof.bench.task import Trial
from counterproof.errors import UserError
from counterproof.judging.claims import compass_judger as claims
from counterproof.judging.compass_judger import (
    CritiquePoint,
    Judge,
    JudgerBench,
    Point,
    agreeing_pairs,
    judge_mixture,
    reply_labels,
)
from counterproof.judging.judge_training import FORMS, TEMPLATES
from counterproof.judging.judger_bench import REPLAYED, BenchItem, Verdicts
from counterproof.judging.pairwise import Pair
from counterproof.judging.templates import PromptTemplate
from counterproof.judging.verdicts import (
    OFFICIAL,
    STRICT,
    read_bracket,
    read_choice,
    read_critique,
    read_letter,
    read_level,
    read_points,
    read_totals,
)
from counterproof.language.conversation import Chat, Reply
from counterproof.language.models import Language
from counterproof.language.tiny import tiny_model, tiny_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"


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
            found = self.say(request.messages[-1]["content"])
            if isinstance(found, str):
                found = Reply(text=found, finish="stop", prompt_tokens=1, completion_tokens=1)
                keep(key, found)
            say(key, found)


def scripted(say):
    return Chat(Script(say), None, None, None, 0)


# verdicts


@pytest.mark.parametrize(
    ("reader", "text", "value"),
    [
        (read_letter, "B", -1),
        (read_letter, " A.\n", 1),
        (read_letter, "**B**", -1),
        (read_letter, "[[A]]", 1),
        (read_letter, "Assistant B is better", None),  # the official rule says A
        (read_letter, "AB", None),
        (read_letter, "a", None),
        (read_letter, "Well. [[A]] ... no: [[B]]", -1),
        (read_bracket, "[[A]] then [[B]]", -1),
        (read_bracket, "B", None),
        (read_level, "[[A>>B]] ... [[B>A]]", -1),
        (read_level, "[[A=B]]", 0),
        (read_choice, '{"reason": "A++ it is not", "choice": "B++"}', -2),
        (read_choice, "{'choice': 'A=B'}", 0),
        (read_choice, '{"choice": "A+"} or rather {"choice": "B+"}', -1),
        (read_choice, '{"choice": "A+++"}', None),
        (read_choice, '"choice": "A+"', None),
        (read_choice, '```json\n{"a": {"choice": "A+"}, "choice": "B+"}\n```', -1),
        (read_choice, '{"choice": 2}', None),
        (read_totals, '{"A": {"total": 4}, "B": {"total": 7}}', -1),
        (read_totals, '{"A": {"total": 7, "style": 2}, "B": {"total": 7}}', 0),
        (read_totals, '{"A": {"total": 11}, "B": {"total": 7}}', None),
        (read_totals, '{"A": 4, "B": 7}', None),
        (read_totals, '{"A": {"total": true}, "B": {"total": 7}}', None),
        (read_critique, "## Comments\nbad\n## Revised answer\ngood", ("bad", "good")),
        (read_critique, "## Comments\n\n## Revised answer\ngood", None),
        (read_critique, "Comments: bad", None),
    ],
)
def test_replies_are_read_strictly(reader, text, value):
    assert reader(text) == value


def test_points_need_every_dimension_in_whole_numbers_from_1_to_10():
    rubric = ("accuracy", "clarity")
    good = {"accuracy": 1, "clarity": 10, "total": 5}
    assert read_points(f"Fine. {json.dumps(good)}", rubric) == good
    assert read_points(f"Fine. {good}", rubric) == good  # as Python writes it
    assert read_points(json.dumps({"total": 5, **good, "accuracy": 3}), rubric) == {**good, "accuracy": 3}
    for wrong in ({"total": 0}, {"total": 11}, {"clarity": 2.5}, {"accuracy": "7"}, {"accuracy": True}, {"wit": 5}):
        assert read_points(json.dumps(good | wrong), rubric) is None
    assert read_points('{"accuracy": 1, "total": 5}', rubric) is None
    assert read_points("accuracy: 1, total: 5", rubric) is None


def test_the_official_rules_keep_their_faults():
    assert OFFICIAL["letter"]("Assistant B is better") == 1  # it holds an A
    assert OFFICIAL["letter"]("B") == -1
    assert OFFICIAL["letter"]("neither") is None
    assert OFFICIAL["choice"]('"choice": "B++"') == -1  # B+ is looked for first
    assert STRICT["choice"]('{"choice": "B++"}') == -2
    assert OFFICIAL["level"]("[[A>B]] no, [[B>A]]") == 1  # the first
    assert STRICT["level"]("[[A>B]] no, [[B>A]]") == -1
    assert OFFICIAL["identifier"]("model M") == 1
    assert STRICT["identifier"]("model M") is None
    assert (STRICT["identifier"]("M"), STRICT["identifier"]('"m"')) == (-1, 1)
    assert OFFICIAL["bracket"]("[[A]] [[B]]") == 1
    assert (OFFICIAL["format"]("'format_correctness': 0"), STRICT["format"]('"format_correctness": "1"')) == (0, 1)
    assert STRICT["format"]('"format_correctness": 10') is None
    levels = {"[[A>>B]]": 2, "[[A>B]]": 1, "[[A=B]]": 0, "[[B>A]]": -1, "[[B>>A]]": -2}
    assert {text: OFFICIAL["level"](text) for text in levels} == levels


# the judge


def sized(prompt_text):
    """The two answers of a shipped comparison prompt."""
    return re.search(r"### Assistant A\n(.*?)\n\n### Assistant B\n(.*?)\n\n", prompt_text, re.DOTALL).groups()


def knows(form):
    """A judge that prefers the larger number, in a form."""

    def say(text):
        a, b = map(int, sized(text))
        sign = (a > b) - (a < b)
        return {
            "letter": "B" if sign < 0 else "A",
            "bracket": f"[[{'B' if sign < 0 else 'A'}]]",
            "five-level": ["[[B>A]]", "[[A=B]]", "[[A>B]]"][sign + 1],
            "json": json.dumps({"choice": ["B++", "A=B", "A++"][sign + 1]}),
            "scores": json.dumps({"A": {"total": a}, "B": {"total": b}}),
        }[form]

    return Judge(scripted(say))


@pytest.mark.parametrize("form", ["letter", "bracket", "five-level", "json", "scores"])
def test_comparing_is_antisymmetric_in_every_form(form):
    judge = knows(form)
    for a, b in ((3, 7), (7, 3), (5, 5)):
        one, other = judge.compare("p", str(a), str(b), form=form), judge.compare("p", str(b), str(a), form=form)
        assert one.margin == -other.margin
        assert one.winner == {"a": "b", "b": "a", "tie": "tie"}[other.winner]
        assert one.winner == ("tie" if a == b else "a" if a > b else "b")
        assert one.consistent is (a != b or form not in ("letter", "bracket"))


def test_margins_of_the_orders_are_averaged():
    judge = Judge(scripted(lambda text: "[[A>>B]]" if sized(text)[0] == "good" else "[[A=B]]"))
    verdict = judge.compare("p", "good", "bad")
    assert (verdict.margin, verdict.winner, verdict.consistent) == (1.0, "a", False)
    assert verdict.text == ("[[A>>B]]", "[[A=B]]")
    alone = judge.compare("p", "good", "bad", both_orders=False)
    assert (alone.margin, alone.consistent, len(alone.text)) == (2.0, None, 1)


def test_a_judge_that_always_says_a_ties_everything():
    verdict = Judge(scripted(lambda text: "A")).compare("p", "x", "y", form="letter")
    assert (verdict.winner, verdict.margin, verdict.consistent) == ("tie", 0.0, False)


def test_what_cannot_be_read_has_no_winner():
    judge = Judge(scripted(lambda text: "A" if text.startswith("A user") and sized(text)[0] == "x" else "hm"))
    verdict = judge.compare("p", "x", "y", form="letter")
    assert (verdict.winner, verdict.margin, verdict.consistent, verdict.outcome) == (None, None, None, "unparsed")
    failing = Judge(scripted(lambda text: UserError("gone")))
    assert failing.compare("p", "x", "y").outcome == "failed"
    assert failing.score("p", "x").total is None
    assert failing.critique("p", "x").outcome == "failed"


def test_scoring_puts_rubric_and_reference_in_the_question():
    chat = scripted(lambda text: '{"wit": 7, "depth": 3, "total": 5}')
    scores = Judge(chat).score("PROMPT", "ANSWER", rubric=["wit", "depth"], reference="REFERENCE")
    assert (dict(scores.dimensions), scores.total, scores.outcome) == ({"wit": 7, "depth": 3}, 5, "read")
    (request,) = chat._backend.requests
    for part in ("wit, depth", "PROMPT", "ANSWER", "REFERENCE", '"wit": 6'):
        assert part in request.messages[0]["content"]
    for wrong in ("wit", [], ["a", "a"], ["total"]):
        with pytest.raises(ValueError, match="rubric is"):
            Judge(chat).score("p", "a", rubric=wrong)


def test_critique_and_general():
    judge = Judge(scripted(lambda text: "## Comments\nshort\n## Revised answer\nlonger" if "Crit" in text else "hello"))
    critique = judge.critique("p", "a")
    assert (critique.comments, critique.revision) == ("short", "longer")
    assert judge.general("hi") == "hello"


def test_long_answers_are_cut_and_the_instruction_is_not():
    chat = scripted(lambda text: "[[A=B]]")
    judge = Judge(chat, longest_answer=4)
    judge.compare("p" * 50, "abcdefgh", "abcd")
    text = chat._backend.requests[0].messages[0]["content"]
    assert "abcd\n[... cut]" in text
    assert "p" * 50 in text
    assert "abcde" not in text
    assert text.rstrip().endswith("(B much better).")
    assert judge.answers_cut == 2  # in either order


def test_the_same_judge_by_its_settings():
    for wrong, says in (
        (lambda: Judge(), "give one of them"),
        (lambda: Judge(scripted(str), endpoint="http://x/v1"), "give one of them"),
        (lambda: Judge(scripted(str), cache="x"), "has its settings already; drop cache"),
        (
            lambda: Judge(scripted(str), templates={"letter": "x"}),
            "no template is called 'letter'; there are compass-letter",
        ),
        (lambda: Judge(scripted(str), reward_mode="logprob"), "need a model that runs here"),
    ):
        with pytest.raises(UserError, match=says):
            wrong()
    with pytest.raises(ValueError, match="form is 'word'"):
        Judge(scripted(str)).compare("p", "a", "b", form="word")
    with pytest.raises(UserError, match="log-probabilities need a model that runs here"):
        Judge(scripted(str)).margins(["p"], ["a"], ["b"])


# rewards


def test_rewards_by_score_and_by_letter():
    judge = Judge(scripted(lambda text: '{"accuracy": 7, "clarity": 7, "total": 8}' if "sound" in text else "?"))
    assert judge.reward(["p", "p"], ["sound", "bad"], completion_ids=[[1], [2]], trainer_state=None) == [8.0, None]
    letter = knows("letter")
    letter.reward_mode = "letter"
    assert letter.reward(["p", "p", "q"], ["3", "5", "1"], reference=["4", "4", "1"]) == [-1.0, 1.0, 0.0]
    # Against the others of the same prompt: 1 loses twice, 2 wins and loses, 3 wins twice.
    assert letter.reward(["p", "p", "p"], ["1", "2", "3"]) == [-1.0, 0.0, 1.0]
    messages = [[{"role": "assistant", "content": each}] for each in "12"]
    assert letter.reward([[{"role": "user", "content": "p"}]] * 2, messages) == [-1.0, 1.0]
    with pytest.raises(ValueError, match="completion 1 has nothing to be compared with"):
        letter.reward(["p", "q", "p"], ["1", "2", "3"])
    assert judge.reward.__name__ == "reward"  # TRL names a reward by it


WORDS = ["A", "B", "x", "y", "z", "?", "|"]
BARE = {"compass-letter": PromptTemplate("t", "{{prompt}} | {{answer_a}} | {{answer_b}} ?")}


def language():
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ m.content }} {% endfor %}{% if not add_generation_prompt %}</s>{% endif %}"
    )
    return Language(tiny_model(tokenizer, seed=3), tokenizer)


def next_token(lang, text):
    ids = lang.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return torch.log_softmax(lang.model(input_ids=ids).logits[0, -1].double(), 0)


def test_rewards_by_log_probability_are_those_of_the_logits():
    lang = language()
    judge = Judge(lang, templates=BARE, reward_mode="logprob")
    a, b = lang.tokenizer.convert_tokens_to_ids(["A", "B"])
    first, second = (next_token(lang, text) for text in ("x | y | z ?", "x | z | y ?"))
    expected = float(first[a] - first[b] - (second[a] - second[b])) / 2
    assert judge.margins(["x"], ["y"], ["z"])[0] == pytest.approx(expected, abs=1e-5)
    assert judge.margins(["x", "x"], ["y", "z"], ["z", "y"]) == pytest.approx([expected, -expected], abs=1e-5)
    assert judge.margins(["x"], ["y"], ["y"]) == [0.0]
    assert judge.reward(["x", "x"], ["y", "z"]) == pytest.approx([expected, -expected], abs=1e-5)
    assert judge.reward(["x"], ["y"], reference=["z"]) == pytest.approx([expected], abs=1e-5)


def test_a_shift_of_both_letters_cancels():
    lang = language()
    judge = Judge(lang, templates=BARE)
    before = judge.margins(["x"], ["y"], ["z"])
    for letter in ("A", "B"):  # another head for both, by the same vector: both logits move alike, at every state
        lang.model.lm_head.weight.data[lang.tokenizer.convert_tokens_to_ids(letter)] += 0.7
    assert judge.margins(["x"], ["y"], ["z"]) == pytest.approx(before, abs=1e-5)
    lang.model.lm_head.weight.data[lang.tokenizer.convert_tokens_to_ids("A")] += 0.1 * torch.randn(
        48, generator=torch.Generator().manual_seed(0)
    )
    assert judge.margins(["x"], ["y"], ["z"]) != pytest.approx(before, abs=1e-5)


def test_all_tokens_that_spell_a_letter_count():
    lang = language()
    judge = Judge(lang, templates=BARE)
    a, b, y = lang.tokenizer.convert_tokens_to_ids(["A", "B", "y"])
    judge._letters = ((a, y), (b,))  # as if y were another way to write A
    first, second = (next_token(lang, text).exp() for text in ("x | x | z ?", "x | z | x ?"))
    expected = [math.log(p[a] + p[y]) - math.log(p[b]) for p in (first, second)]
    assert judge.margins(["x"], ["x"], ["z"])[0] == pytest.approx((expected[0] - expected[1]) / 2, abs=1e-5)
    real = Judge(lang, templates=BARE)
    assert real._letter_tokens() == ((a,), (b,))


def test_a_tokenizer_without_the_letters_is_named():
    tokenizer = tiny_tokenizer(["x"])
    with pytest.raises(UserError, match="no token for A or for B"):
        Judge(Language(tiny_model(tokenizer, seed=0), tokenizer)).margins(["x"], ["x"], ["x"])


# the mixture


def material(n=60, ties=0, totals=True):
    pairs = [
        Pair(
            prompt=f"pair {i}", answer_a=f"good {i}", answer_b=f"bad {i}", model_a="x", model_b="y",
            winner="tie" if i < ties else "model_a" if i % 3 else "model_b", strength=1 + i % 2,
            totals=(5, 4) if totals and i % 2 else None,
        )
        for i in range(n)
    ]  # fmt: skip
    return {
        "pairs": pairs,
        "points": [Point(prompt=f"point {i}", answer="a", scores={"wit": 3}, total=4) for i in range(n // 2)],
        "critiques": [CritiquePoint(prompt=f"c {i}", answer="a", comments="no", revision="b") for i in range(n // 2)],
        "general": [
            [{"role": "user", "content": f"g {i}"}, {"role": "assistant", "content": "hi"}] for i in range(n)
        ],
    }  # fmt: skip


def pools(rows):
    return Counter(row["pool"] for row in rows)


@pytest.mark.parametrize("ratio", [(1, 3, 1), (2, 6, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 1, 2), (1, 1, 0)])
def test_the_ratio_is_exact(ratio):
    rows = judge_mixture(**material(), ratio=ratio)
    counts = pools(rows)
    parts = [counts[pool] for pool in ("critique", "reward", "general")]
    assert parts[0] * ratio[1] == parts[1] * ratio[0]
    assert parts[1] * ratio[2] == parts[2] * ratio[1]
    assert sum(parts) == len(rows) > 0
    assert [count > 0 for count in parts] == [part > 0 for part in ratio]


def test_as_many_rounds_as_there_are_prompts_for():
    # 60 pairs, 30 points, 30 critiques, 60 general: 1:3:1 is bound by the pairs, 20 rounds of 3 rewards.
    assert pools(judge_mixture(**material())) == {"critique": 20, "reward": 60, "general": 20}
    # Without points and critiques the pairs feed both pools: 15 rounds of 4.
    few = {**material(), "points": [], "critiques": []}
    assert pools(judge_mixture(**few)) == {"critique": 15, "reward": 45, "general": 15}
    # A tie cannot be answered with a letter: 24 decisive pairs, 8 rounds.
    assert pools(judge_mixture(**material(ties=36))) == {"critique": 8, "reward": 24, "general": 8}
    assert len(judge_mixture(**material(), size=50)) == 50


@pytest.mark.parametrize("seed", range(5))
def test_the_better_answer_is_a_as_often_as_b(seed):
    rows = judge_mixture(**material(n=61, ties=4), ratio=(2, 1, 1), seed=seed, forms=["bracket", "five-level", "json"])
    firsts = Counter()
    for row in rows:
        if row["form"] in ("letter", "bracket", "five-level", "json"):
            text, reply = row["messages"][-2]["content"], row["messages"][-1]["content"]
            margin = {"letter": read_letter, "bracket": read_bracket, "json": read_choice, "five-level": read_level}[
                row["form"]
            ](reply)
            shown = [answer.split()[0] for answer in sized(text)]
            number = int(sized(text)[0].split()[1])
            truth = 0 if number < 4 else 1 if number % 3 else -1  # of the "good" one
            assert np.sign(margin) == truth * (1 if shown[0] == "good" else -1)
            if row["form"] in ("five-level", "json") and truth:
                assert abs(margin) == 1 + number % 2
            firsts[row["form"], int(np.sign(margin))] += 1
    for form in ("letter", "bracket", "five-level", "json"):
        assert abs(firsts[form, 1] - firsts[form, -1]) <= 1
    total = {sign: sum(count for (_, s), count in firsts.items() if s == sign) for sign in (1, -1)}
    assert abs(total[1] - total[-1]) <= 1


def test_every_form_takes_its_turn_and_can_be_read_back():
    rows = judge_mixture(**material(), ratio=(3, 1, 0), size=32)
    counts = Counter(row["form"] for row in rows)
    assert set(counts) == set(FORMS)
    assert (
        max(counts[form] for form in FORMS if form != "letter")
        - min(counts[form] for form in FORMS if form != "letter")
        <= 1
    )
    readers = {
        "letter": read_letter, "bracket": read_bracket, "five-level": read_level, "json": read_choice,
        "scores": read_totals, "critique": read_critique, "point": lambda text: read_points(text, ("wit",)),
    }  # fmt: skip
    for row in rows:
        assert readers[row["form"]](row["messages"][-1]["content"]) is not None
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_totals_follow_their_answers():
    for row in judge_mixture(**material(), ratio=(1, 0, 0), forms=["scores"]):
        totals = json.loads(row["messages"][-1]["content"])
        shown = [answer.split()[0] for answer in sized(row["messages"][0]["content"])]
        assert [totals[side]["total"] for side in "AB"] == [{"good": 5, "bad": 4}[each] for each in shown]


def test_no_prompt_is_used_twice():
    double = material(30)
    double["pairs"] += [
        Pair(prompt="point 1", answer_a="u", answer_b="v", winner="model_a"),
        Pair(prompt="g 2", answer_a="u", answer_b="v", winner="model_a"),
        Pair(prompt="pair 3", answer_a="u", answer_b="v", winner="model_b"),
    ]
    for seed in range(5):
        rows = judge_mixture(**double, ratio=(2, 1, 1), seed=seed)
        found = [re.search(r"(pair|point|c|g) \d+\b", row["messages"][0]["content"])[0] for row in rows]
        assert len(set(found)) == len(found)


def test_the_mixture_follows_its_seed_and_leaves_what_it_is_given():
    given = material()
    before = json.dumps([str(each) for each in itertools.chain(*given.values())])
    assert judge_mixture(**given, seed=1) == judge_mixture(**given, seed=1)
    assert judge_mixture(**given, seed=1) != judge_mixture(**given, seed=2)
    assert json.dumps([str(each) for each in itertools.chain(*given.values())]) == before


def test_what_cannot_be_mixed():
    with pytest.raises(UserError, match=r"can be filled 20 times from 60 pairs.*30 times are needed"):
        judge_mixture(**material(), size=150)
    with pytest.raises(UserError, match="can be filled 0 times from 60 pairs"):
        judge_mixture(pairs=material()["pairs"])
    for wrong in ({"size": 7}, {"ratio": (0, 0, 0)}, {"ratio": (1, -1, 0)}, {"ratio": (1, 2)}, {"forms": ["word"]}):
        with pytest.raises(ValueError):
            judge_mixture(**material(), **wrong)
    with pytest.raises(UserError, match="pair 0 has no winner"):
        judge_mixture(pairs=[Pair(prompt="p", answer_a="1", answer_b="2")], ratio=(0, 1, 0))
    with pytest.raises(UserError, match="general item 0 does not end with an assistant's"):
        judge_mixture(general=[[{"role": "user", "content": "x"}]], ratio=(0, 0, 1))
    with pytest.raises(ValueError, match="wit is 11"):
        Point(prompt="p", answer="a", scores={"wit": 11}, total=3)
    with pytest.raises(ValueError, match="must not be empty"):
        CritiquePoint(prompt="p", answer="a", comments=" ", revision="x")


def test_own_templates_are_used():
    own = {"compass-letter": PromptTemplate("t", "{{prompt}}: {{answer_a}} or {{answer_b}}")}
    (row, *_) = judge_mixture(pairs=material()["pairs"], ratio=(0, 1, 0), templates=own)
    assert re.fullmatch(r"pair \d+: (good|bad) \d+ or (good|bad) \d+", row["messages"][0]["content"])


def test_only_the_reply_is_learnt():
    lang = language()
    row = [{"role": "user", "content": "x | y ?"}, {"role": "assistant", "content": "A B"}]
    ids, labels = reply_labels(lang.tokenizer, row)
    tokens = lang.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "x", "|", "y", "?", "A", "B", "</s>"]
    assert labels == [-100] * 5 + ids[5:]
    with pytest.raises(UserError, match="ends with the assistant's"):
        reply_labels(lang.tokenizer, row[:1])


def test_the_rows_are_what_trl_trains_on(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    lang = language()
    template = PromptTemplate("t", "{{prompt}} | {{answer_a}} | {{answer_b}} ?")
    pairs = [
        Pair(prompt=" ".join(p), answer_a="y", answer_b="z", winner="model_a")
        for p in itertools.product("xyz", repeat=2)
    ]
    rows = judge_mixture(pairs=pairs, ratio=(0, 1, 0), templates={"compass-letter": template})
    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    config = SFTConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    with torch.random.fork_rng():
        trainer = SFTTrainer(
            model=lang.model, args=config, train_dataset=Dataset.from_list(split), processing_class=lang.tokenizer
        )
        batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        learnt = lang.tokenizer.decode([t for t in labels if t != -100])
        assert learnt.split() in (["A", "</s>"], ["B", "</s>"]) or learnt in ("A</s>", "B</s>")
        assert len([t for t in labels if t == -100]) >= 6
        assert ids[0] == lang.tokenizer.bos_token_id


def test_the_consistency_filter_keeps_what_the_judge_names_in_both_orders():
    pairs = [
        Pair(prompt="p", answer_a="9", answer_b="1", winner="model_a"),
        Pair(prompt="q", answer_a="9", answer_b="1", winner="model_b"),
        Pair(prompt="r", answer_a="4", answer_b="4", winner="tie"),
        Pair(prompt="s", answer_a="4", answer_b="4", winner="model_a"),
    ]
    assert agreeing_pairs(pairs, knows("five-level")) == [pairs[0], pairs[2]]
    assert agreeing_pairs(pairs, knows("letter"), form="letter") == [pairs[0]]  # a letter cannot tie twice
    assert agreeing_pairs(pairs, Judge(scripted(lambda text: "?"))) == []


# JudgerBench


def item(truth, part="B", dataset="d", models=(("m", 1),), **more):
    return BenchItem(
        part=part, dataset=dataset, category=more.pop("category", ""), truth=truth, question=[], models=models, **more
    )


def pair_bench(rng, n=200, models=6):
    items = []
    for i in range(n):
        a, b = rng.choice(models, 2, replace=False)
        truth = float(rng.choice([-1, 1]))
        items.append(item(truth, "pairs", "pairs", ((f"m{a}", 1), (f"m{b}", -1)), swapped=[], prompt_id=str(i)))
    return JudgerBench(items)


def truths(bench):
    return np.array([each.truth for each in bench.items])


def test_a_perfect_a_constant_and_a_reversed_judge():
    bench = pair_bench(np.random.default_rng(0))
    truth = truths(bench)[:, None]
    always_a = np.repeat([[1.0, -1.0]], len(truth), 0)  # A in both orders; the second turned to the own order
    report = bench.evaluate({"perfect": truth * [1, 1], "always a": always_a, "reversed": -truth * [1, 1]}, rounds=100)
    perfect, constant, against = (report.judges[name] for name in ("perfect", "always a", "reversed"))
    value = lambda judge, name: judge.figures["pairs"][name].value  # noqa: E731
    assert value(perfect, "accuracy") == value(perfect, "both_orders_right") == value(perfect, "consistency") == 1
    assert perfect.correlations["pairs"]["pairs"].value == pytest.approx(1)
    assert value(constant, "accuracy") == 0.5
    assert value(constant, "both_orders_right") == value(constant, "consistency") == 0
    assert value(constant, "position_bias") == 1
    assert value(against, "accuracy") == 0
    assert value(against, "consistency") == 1
    assert against.correlations["pairs"]["pairs"].value == pytest.approx(-1)
    assert report.differences["pairs"]["always a"].value == -0.5


def test_part_b_by_counting_and_numpy():
    rng = np.random.default_rng(1)
    items, verdicts = [], []
    for i in range(300):
        dataset, swap = ("arenahard", "wildbench")[i % 2], bool(rng.integers(2))
        model = f"m{rng.integers(5)}"
        truth = int(rng.integers(-2, 3))
        said = float(rng.choice([truth, int(rng.integers(-2, 3)), np.nan], p=[0.5, 0.4, 0.1]))
        items.append(item(truth, dataset=dataset, models=((model, -1 if swap else 1),), prompt_id=str(i)))
        verdicts.append(said)
    bench = JudgerBench(items)
    result = bench.evaluate({"j": np.array(verdicts)}, rounds=200).judges["j"]
    right = [said == each.truth for said, each in zip(verdicts, items, strict=True)]  # unreadable: wrong
    assert result.figures["B"]["accuracy"].value == pytest.approx(sum(right) / 300)
    assert result.figures["B"]["unparsed"].value == pytest.approx(np.isnan(verdicts).mean())
    correlations = []
    for dataset in ("arenahard", "wildbench"):
        sums = {f"m{k}": [0.0, 0.0] for k in range(5)}
        for said, each in zip(verdicts, items, strict=True):
            if each.dataset == dataset:
                (model, sign) = each.models[0]
                sums[model][0] += sign * each.truth
                sums[model][1] += 0 if math.isnan(said) else sign * said  # unreadable: adds nothing
        correlations.append(np.corrcoef(np.array(list(sums.values())).T)[0, 1])
        assert result.correlations["B"][dataset].value == pytest.approx(correlations[-1])
        mine = [r for r, each in zip(right, items, strict=True) if each.dataset == dataset]
        assert result.figures["B"][f"accuracy of {dataset}"].value == pytest.approx(np.mean(mine))
    assert result.mean_correlation("B") == pytest.approx(np.mean(correlations))


def test_failures_are_left_out_and_unreadable_ones_are_wrong():
    bench = JudgerBench([item(1, prompt_id=str(i)) for i in range(4)])
    margins = np.array([[1, np.nan], [np.nan, np.nan], [np.nan, np.nan], [-1, np.nan]])
    failed = np.zeros((4, 2), dtype=bool)
    failed[1, 0] = True
    figures = bench.evaluate({"j": Verdicts(margins, failed)}).judges["j"].figures["B"]
    assert figures["accuracy"].value == pytest.approx(1 / 3)
    assert (figures["failed"].value, figures["unparsed"].value) == (0.25, 0.25)


def test_levels_count_in_part_b_and_winners_elsewhere():
    verdict = np.array([2.0])
    assert JudgerBench([item(1)]).evaluate({"j": verdict}).judges["j"].figures["B"]["accuracy"].value == 0
    one = JudgerBench([item(1, "pairs")]).evaluate({"j": verdict}).judges["j"]
    assert one.figures["pairs"]["accuracy"].value == 1


def test_a_correlation_that_is_not_defined_says_why_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = JudgerBench([item(1, prompt_id=str(i)) for i in range(5)]).evaluate({"j": np.ones(5)})
        flat = JudgerBench([item(1, models=((f"m{i}", 1),), prompt_id=str(i)) for i in range(5)])
        same = flat.evaluate({"j": np.arange(-2.0, 3.0)})
        two = JudgerBench([item(1, "pairs", "pairs", (("x", 1), ("y", -1)), prompt_id=str(i)) for i in range(5)])
        pair = two.evaluate({"j": np.ones(5)})
    said = one.judges["j"].correlations["B"]["d"]
    assert math.isnan(said.value)
    assert said.problem == "only one judged model"
    assert same.judges["j"].correlations["B"]["d"].problem == "all models have the same sum"
    assert math.isnan(same.judges["j"].mean_correlation("B"))
    assert "two models" in pair.judges["j"].correlations["pairs"]["pairs"].problem
    json.dumps(one.as_json(), allow_nan=False)


def test_differences_between_judges_are_paired():
    bench = pair_bench(np.random.default_rng(2), n=400)
    truth = truths(bench)
    rng = np.random.default_rng(3)
    hard = rng.random(400) < 0.4  # both judges fail on the same items, the second on a few more
    first = np.where(hard, -truth, truth)
    second = np.where(hard | (rng.random(400) < 0.05), -truth, truth)
    report = bench.evaluate({"first": np.stack([first] * 2, 1), "second": np.stack([second] * 2, 1)}, rounds=500)
    gap = report.differences["pairs"]["second"]
    assert gap.value == pytest.approx((second == truth).mean() - (first == truth).mean())
    own = report.judges["second"].figures["pairs"]["accuracy"]
    assert gap.high - gap.low < 0.6 * (own.high - own.low)
    assert gap.high < 0


def test_self_preference_is_what_exceeds_the_truth():
    kin = (("gpt-x", 1), ("other", -1))
    items = [item(1, "pairs", "pairs", kin, swapped=[], prompt_id="1"),
             item(-1, "pairs", "pairs", kin, swapped=[], prompt_id="2"),
             item(1, "pairs", "pairs", (("u", 1), ("v", -1)), swapped=[], prompt_id="3")]  # fmt: skip
    fond = np.array([[1, 1], [1, 1], [-1, -1]])
    report = JudgerBench(items).evaluate({"j": fond}, family={"j": "gpt"}).judges["j"].figures["pairs"]
    assert report["self_preference"].value == pytest.approx((0 + 2) / 2)
    assert report["self_preference"].count == 2
    assert "self_preference" not in JudgerBench(items).evaluate({"j": fond}).judges["j"].figures["pairs"]


def test_verdicts_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"verdicts of 'j' have shape \(3, 2\); expected \(5, 2\)"):
        JudgerBench([item(1)] * 5).evaluate({"j": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="rules is 'lax'"):
        JudgerBench([], rules="lax")


def test_labelled_pairs_are_asked_in_both_orders():
    pairs = [Pair(prompt=f"p{i}", answer_a=str(i), answer_b=str(3 - i), model_a="x", model_b="y", winner=w)
             for i, w in enumerate(["model_b", "model_b", "model_a", "model_b"])]  # fmt: skip

    def say(text):
        a, b = (int(found) for found in re.findall(r"<answer [AB]>\n(\d+)", text))
        return "[[A>B]]" if a > b else "[[B>>A]]"

    seen = []
    report = JudgerBench.from_pairs(pairs).run(
        [scripted(say), Judge(scripted(lambda text: "[[A=B]]"))], progress=lambda *at: seen.append(at)
    )
    first, second = report.judges.values()
    assert first.figures["pairs"]["accuracy"].value == 0.75
    assert first.figures["pairs"]["consistency"].value == 1
    assert first.verdicts.margins.tolist() == [[-2, -1], [-2, -1], [1, 2], [1, 2]]
    assert second.figures["pairs"]["accuracy"].value == 0
    assert seen[-1] == ("judge 1", 8, 8)
    with pytest.raises(UserError, match="pair 0 has no winner"):
        JudgerBench.from_pairs([Pair(prompt="p", answer_a="1", answer_b="2")])


# OpenCompass's files


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PART_A = [
    {"conversation_a": turns("U1", "a1", "U2", "a2"), "conversation_b": turns("U1", "b1", "U2", "b2"), "model_a": "x",
     "model_b": "y", "winner": "model_b", "category": "maths", "turn": 2},
    {"conversation_a": turns("U3", "a3"), "conversation_b": turns("U3", "b3"), "model_a": "z", "model_b": "x",
     "winner": "model_a", "category": "code", "turn": 1},
]  # fmt: skip
PREDICTIONS = {
    "alignment_bench_v1_1": "so [[B]]",
    "alpaca_eval": "m",
    "arenahard": "[[A>>B]]",
    "wildbench": '{"choice": "B++"}',
    "fofo_test_prompts": '[{"model": "model", "format_correctness": 1}]',
    "fofo_test_prompts_cn": "[{'format_correctness': 0}]",
}
TRUTH = {"alignment_bench_v1_1": -1, "alpaca_eval": 1, "arenahard": 2,
         "wildbench": -2, "fofo_test_prompts": 1, "fofo_test_prompts_cn": 0}  # fmt: skip


def part_b(dataset, said, model="m1", swap=False):
    record = {
        "dataset_name": dataset, "question": "QUESTION", "prediction": "PREDICTION", "gpt4o_pred": said,
        "others": {"model": model, "swap": swap, "ref": "REF", "checklist": ["check 1", "check 2"]},
    }  # fmt: skip
    if dataset == "wildbench":
        del record["question"]
        record["conversation"] = [*turns("first", "reply"), {"role": "HUMAN", "content": "QUESTION"}]
    return record


def test_part_a_interleaves_the_turns_of_both(tmp_path):
    (tmp_path / "judgerbench_A_en.json").write_text(json.dumps(PART_A))
    (tmp_path / "judgerbench_A_cn.json").write_text(json.dumps(PART_A[:1]))
    bench = JudgerBench.from_opencompass(tmp_path)
    assert [each.dataset for each in bench.items] == ["judgerbench_A_cn", *["judgerbench_A_en"] * 2]
    chinese, english = bench.items[0], bench.items[1]
    text = english.question[0]["content"]
    said = (
        "### User: U1\n### Assistant A: a1\n### Assistant B: b1\n### User: U2\n### Assistant A: a2\n### Assistant B: b2"
    )
    assert said in text
    assert (
        said.replace("a1", "~")
        .replace("b1", "a1")
        .replace("~", "b1")
        .replace("a2", "~")
        .replace("b2", "a2")
        .replace("~", "b2")
        in english.swapped[0]["content"]
    )
    assert "### 用户: U1" in chinese.question[0]["content"]
    assert [each.truth for each in bench.items] == [-1, -1, 1]
    assert english.models == (("x", 1), ("y", -1))
    alone = JudgerBench.from_opencompass(tmp_path / "judgerbench_A_en.json", both_orders=False)
    assert alone.items[0].swapped is None
    result = alone.run([scripted(lambda text: "B")]).judges["judge 0"].figures["A"]
    assert result["accuracy"].value == 0.5
    assert result["accuracy of maths (en)"].value == 1
    assert math.isnan(result["consistency"].value)


def test_the_official_rule_of_part_a_reads_an_a_in_assistant(tmp_path):
    (tmp_path / "judgerbench_A_en.json").write_text(json.dumps(PART_A))
    said = scripted(lambda text: "Assistant B is better")
    accuracy = {}
    for rules in ("strict", "official"):
        bench = JudgerBench.from_opencompass(tmp_path, both_orders=False, rules=rules)
        figures = bench.run([said]).judges["judge 0"].figures["A"]
        accuracy[rules] = (figures["accuracy"].value, figures["unparsed"].value)
    assert accuracy == {"strict": (0.0, 1.0), "official": (0.5, 0.0)}


def test_part_b_replays_every_data_set(tmp_path):
    records = [part_b(dataset, said) for dataset, said in PREDICTIONS.items()]
    records.append(part_b("arenahard", "no verdict"))
    (tmp_path / "judgerbench_B.json").write_text(json.dumps(records))
    bench = JudgerBench.from_opencompass(tmp_path / "judgerbench_B.json")
    assert {each.dataset: each.truth for each in bench.items} == TRUTH
    assert bench.skipped == 1
    for each in bench.items:
        text = each.question[-1]["content"]
        assert "QUESTION" in text
        assert "PREDICTION" in text
        assert ("REF" in text) is ("fofo" not in each.dataset)
        assert ("- check 1\n- check 2" in text) is (each.dataset == "wildbench")
    assert (
        "USER: first\n\nASSISTANT: reply"
        in next(e for e in bench.items if e.dataset == "wildbench").question[0]["content"]
    )
    by_text = {each.question[-1]["content"]: PREDICTIONS[each.dataset] for each in bench.items}
    perfect = bench.run([scripted(lambda text: by_text[text])]).judges["judge 0"]
    assert perfect.figures["B"]["accuracy"].value == 1
    (tmp_path / "judgerbench_B2.json").write_text(json.dumps([part_b("arenahard", "[[A>B]]", "m2", swap=True)]))
    (swapped,) = JudgerBench.from_opencompass(tmp_path / "judgerbench_B2.json").items
    assert swapped.models == (("m2", -1),)  # the judged model's answer was B
    assert bench.items[0].models == (("m1", 1),)
    official = JudgerBench.from_opencompass(tmp_path / "judgerbench_B.json", rules="official")
    assert {each.dataset: each.truth for each in official.items}["wildbench"] == -1  # B++ read as B+, truth and all


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([{**PART_A[0], "winner": "tie"}], r"x_A\.json, item 0: winner is 'tie'; expected model_a or model_b"),
        ([{**PART_A[0], "conversation_b": turns("U1", "b1")}], "item 0: the two conversations differ in their turns"),
        ([PART_A[0], {"conversation_a": []}], r"item 1: no field 'winner'"),
        ([part_b("mtbench", "A")], "unknown dataset_name 'mtbench'"),
        ([{**part_b("arenahard", "[[A>B]]"), "others": {"model": "m"}}], "item 0: no field 'ref'"),
        ([3], "item 0: 3 is not an object"),
        ({}, "is no list of items"),
    ],
)
def test_a_bad_item_is_named(tmp_path, records, says):
    path = tmp_path / "x_A.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match=says):
        JudgerBench.from_opencompass(path)


def test_files_that_are_no_bench(tmp_path):
    with pytest.raises(UserError, match="no file judgerbench_A"):
        JudgerBench.from_opencompass(tmp_path)
    (tmp_path / "judgerbench_B.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        JudgerBench.from_opencompass(tmp_path)
    with pytest.raises(UserError, match="no template is called"):
        JudgerBench.from_opencompass(tmp_path, templates={"arenahard": "x"})


def test_every_shipped_template_can_be_used():
    for name, places in TEMPLATES.items():
        PromptTemplate.read(name, needed=places, allowed=["reference"])
    for name, places, _ in REPLAYED.values():
        PromptTemplate.read(name, needed=places)
    for name in ("compass-dialogues", "compass-dialogues-cn"):
        PromptTemplate.read(name, needed=["dialogue"])


# the claims' tasks


def test_the_training_world_knows_its_truth():
    world = claims.World(np.random.default_rng(0))
    for _ in range(200):
        pair = world.pair(decisive=False)
        a, b = (sum(word in claims.ERRORS for word in answer.split()) for answer in (pair.answer_a, pair.answer_b))
        assert pair.totals == (10 - 3 * a, 10 - 3 * b)
        assert pair.winner == ("tie" if a == b else "model_a" if a < b else "model_b")
        assert pair.strength == (2 if abs(a - b) > 1 else 1)
        point, critique = world.point(), world.critique()
        assert point.total == point.scores["topic"] == 10 - 3 * sum(w in claims.ERRORS for w in point.answer.split())
        wrong = [word for word in critique.answer.split() if word in claims.ERRORS]
        assert critique.comments.split() == (wrong or ["fine"])
    assert len(world.seen) == 600


def test_both_arms_learn_from_the_same_number_of_tokens():
    rng = np.random.default_rng(0)
    totals = []
    for longest in (10, 40):  # rows of one arm are longer than those of the other
        rows = [([1] * int(rng.integers(5, longest)), []) for _ in range(50)]
        made = itertools.islice(claims.batches_of(rows, np.random.default_rng(1), 300), 200)
        totals.append(sum(len(ids) for batch in made for ids, _ in batch))
    assert all(abs(total - 200 * 300) < 40 for total in totals)


def test_every_row_comes_once_an_epoch():
    rows = [([i] * 4, []) for i in range(12)]
    made = list(itertools.islice(claims.batches_of(rows, np.random.default_rng(1), 16), 6))  # two epochs
    assert Counter(ids[0] for batch in made for ids, _ in batch) == dict.fromkeys(range(12), 2)


def test_a_short_training_gives_every_metric():
    settings = {**claims.TINY, "items": 200, "steps": 3, "start_steps": 2, "judged": 6, "hidden": 16, "layers": 1}
    mixed, reward = (
        claims.run_training(arm, Trial(seed=1000, settings=settings)) for arm in (claims.MIX, claims.REWARD_ONLY)
    )
    for found in (mixed, reward):
        assert set(found) == set(claims.JUDGE_TRAINING.metrics)
        assert all(map(math.isfinite, found.values()))
    assert claims.run_training(claims.REWARD_ONLY, Trial(seed=1000, settings=settings)) == reward


class Oracle:
    """Answers the tiny questions as the world knows them."""

    def __call__(self, text):
        form, _, rest = text.partition(" ")
        errors = [sum(w in claims.ERRORS for w in part.split()) for part in rest.rstrip(" =").split("|")[1:]]
        if form == "point":
            return json.dumps({"topic": 10 - 3 * errors[0], "total": 10 - 3 * errors[0]})
        if form == "critique":
            wrong = [w for w in rest.split("|")[1].split() if w in claims.ERRORS]
            return f"## Comments {' '.join(wrong) or 'fine'} ## Revised answer x"
        gap = errors[1] - errors[0]
        return {
            "letter": "A" if gap > 0 else "B",
            "bracket": "[[A]]" if gap > 0 else "[[B]]",
            "five-level": "[[A>B]]" if gap > 0 else "[[B>A]]",
            "json": json.dumps({"choice": "A+" if gap > 0 else "B+"}),
            "scores": json.dumps({"A": {"total": 10 - 3 * errors[0]}, "B": {"total": 10 - 3 * errors[1]}}),
        }[form]


@pytest.mark.parametrize(("say", "accuracy", "readable"), [(Oracle(), 1.0, 1.0), (lambda text: "A", 0.0, 0.0)])
def test_the_measurement_of_a_perfect_and_of_a_stubborn_judge(monkeypatch, say, accuracy, readable):
    world = claims.World(np.random.default_rng(0))
    tokenizer = tiny_tokenizer([*claims.TOPICS, *claims.PLAIN, ":"])
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m.content }} {% endfor %}"
    lang = Language(tiny_model(tokenizer, seed=0), tokenizer)
    monkeypatch.setattr("counterproof.judging.compass_judger.chat", lambda *args, **more: scripted(say))
    found = claims.measure(
        lang, claims.bare_templates(), [world.pair() for _ in range(8)], [world.point() for _ in range(8)],
        [world.critique() for _ in range(8)], [world.general() for _ in range(8)], claims.TINY,
    )  # fmt: skip
    assert (found["formats_accuracy"], found["formats_readable"]) == (accuracy, readable)
    assert found["letter_accuracy"] == (accuracy + 1) / 2  # always A is right half of the time
    assert found["letter_consistency"] == accuracy
    assert 0.5 * len(tokenizer) < found["perplexity"] < 2 * len(tokenizer)  # untrained: about uniform


def test_simulated_cells_are_what_they_are_said_to_be():
    from scipy.stats import spearmanr

    ranks, gaps, biases = [], [], []
    for seed in range(1000, 1020):
        table = claims.simulated(np.random.default_rng(seed), 6, 10)
        right = np.where(np.isnan(table.verdicts), np.nan, table.verdicts == table.truth[:, None])
        easy, hard = (np.nanmean(right[:, mask], axis=(1, 2)) for mask in (~table.hard, table.hard))
        ranks.append(spearmanr(easy, hard).statistic)
        gaps.append((easy - hard).mean())
        biases.append(
            spearmanr(
                np.nanmean(right, axis=(1, 2)),
                np.abs(np.nanmean(table.verdicts[..., 0] - table.verdicts[..., 1], axis=1)),
            ).statistic
        )
    assert 0.3 < np.mean(ranks) < 0.6
    assert np.mean(gaps) > 0.15
    assert abs(np.mean(biases)) < 0.2
    assert table.verdicts.shape == (60, 419, 2)


def test_the_ranking_task_sees_what_predicts_and_what_does_not():
    rng = np.random.default_rng(0)
    skill = np.linspace(0.5, 0.95, 30)
    truth, hard = rng.choice([-1.0, 1.0], 400), np.arange(400) >= 100
    right = rng.random((30, 400, 2)) < np.where(hard, skill[::-1, None], skill[:, None])[:, :, None]  # hard: reversed
    table = claims.Table(truth, hard, np.where(right, truth[:, None], -truth[:, None]), np.ones((30, 400), dtype=bool))
    assert np.allclose(claims.figures(table, "accuracy"), right.mean((1, 2)))
    easy = claims.ranked_by(table, rng, figure="accuracy", items="easy")
    assert np.allclose(easy, right[:, :100].mean((1, 2)))
    assert np.corrcoef(easy, right[:, 100:].mean((1, 2)))[0, 1] < -0.8
    mixed = claims.ranked_by(table, rng, figure="accuracy", items="mixed")
    assert np.corrcoef(mixed, right.mean((1, 2)))[0, 1] > 0.5


def judgments(path, *rows):
    path.write_text("\n".join([",".join(claims.FIELDS), *rows]) + "\n")
    return path


GOOD_ROWS = [f"{s},{i},{j},plain,{1 + i % 2},1,{w}" for s in ("Natural", "Adversarial_X") for i in range(4) for j, w in
             (("u", 1), ("v", 2), ("w", ""))]  # fmt: skip


def test_judgments_are_read_from_a_file(tmp_path):
    table, cells = claims.read_judgments(judgments(tmp_path / "j.csv", *GOOD_ROWS))
    assert cells == ["u plain", "v plain", "w plain"]
    assert table.hard.tolist() == [True] * 4 + [False] * 4
    assert table.truth.tolist() == [1, -1, 1, -1] * 2
    assert table.verdicts[1, 0].tolist() == [1, -1]
    assert np.isnan(table.verdicts[2, :, 1]).all()
    assert claims.describe_judgments(tmp_path / "j.csv") == "3 judge x prompting cells, 8 items (4 adversarial)"
    found = claims.run_ranking(claims.ACCURACY, Trial(seed=0, settings={"halves": 2}, data=tmp_path / "j.csv"))
    assert set(found) == set(claims.JUDGE_RANKING.metrics)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*GOOD_ROWS, "Natural,9,u,plain,3,1,1"], r"j\.csv:26: label is '3'; expected 1 or 2"),
        ([*GOOD_ROWS, "Natural,9,u,plain,1,1,3"], r"j\.csv:26: the winners are \('1', '3'\)"),
        ([*GOOD_ROWS, "Natural,0,u,plain,2,1,1"], r"j\.csv:26: item 0 of Natural has another label than before"),
        ([row for row in GOOD_ROWS if row.startswith("N")], "0 adversarial and 4 natural items"),
        ([], "has 0 cells"),
    ],
)
def test_judgments_that_cannot_be_used(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        claims.describe_judgments(judgments(tmp_path / "j.csv", *rows))
    (tmp_path / "k.csv").write_text("subset,item\n")
    with pytest.raises(UserError, match="has no column 'judge'"):
        claims.describe_judgments(tmp_path / "k.csv")
    with pytest.raises(UserError, match="cannot read"):
        claims.describe_judgments(tmp_path)


# real verdicts, where they are


@pytest.mark.skipif(not (DATA / "llmbar").exists(), reason="LLMBar's judgments are not here")
def test_llmbar_gives_the_figures_that_were_extracted_from_it():
    table, cells = claims.read_judgments(DATA / "llmbar" / "judgments.csv")
    assert (len(cells), len(table.truth)) == (65, 419)
    accuracy = dict(zip(cells, claims.figures(table, "accuracy"), strict=True))
    for cell, expected in {
        "GPT-4 Vanilla": 0.845, "GPT-4 Metrics_Reference": 0.872, "PaLM2 Vanilla": 0.698,
        "PaLM2 Metrics_Reference": 0.745, "ChatGPT Vanilla": 0.400, "LLaMA2 Vanilla": 0.442, "Falcon Vanilla": 0.564,
    }.items():  # fmt: skip
        assert accuracy[cell] == pytest.approx(expected, abs=6e-4)
    # Consistency as extracted counts unread replies too; JudgerBench's here is of pairs read in both orders.
    consistency = dict(zip(cells, claims.figures(table, "consistency"), strict=True))
    for cell, expected in {"GPT-4 Vanilla": 0.928, "GPT-4 Metrics_Reference": 0.916, "Falcon Vanilla": 0.415}.items():
        assert consistency[cell] == pytest.approx(expected, abs=6e-4)


@pytest.mark.skipif(not (DATA / "llmfao").exists(), reason="LLMFAO's votes are not here")
def test_llmfao_gives_the_figures_that_were_extracted_from_it():
    def read(name):
        with open(DATA / "llmfao" / name, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    votes, models, prompts = {}, {}, {}
    for row in read("crowd-comparisons.csv"):
        votes.setdefault(row["id"], Counter())[row["winner"]] += 1
        models[row["id"]], prompts[row["id"]] = (row["model_x"], row["model_y"]), row["prompt"]
    sign = {"left": 1.0, "right": -1.0, "tie": 0.0}
    # The winner with most votes; of several the one voted for first, as in the figures that were extracted.
    majority = {key: sign[own.most_common(1)[0][0]] for key, own in votes.items()}
    names = sorted(votes)
    items = [
        item(majority[k], "pairs", "llmfao", ((models[k][0], 1), (models[k][1], -1)), prompt_id=prompts[k])
        for k in names
    ]
    said = {}
    for judge, file in (("gpt-4", "gpt4-comparisons.csv"), ("gpt-3.5", "gpt3-comparisons.csv")):
        by_id = {row["id"]: sign[row["winner"]] for row in read(file)}
        said[judge] = np.array([by_id.get(key, np.nan) for key in names])
    assert len(items) == 2139
    report = JudgerBench(items).evaluate(said, rounds=50)
    accuracy = {name: judge.figures["pairs"]["accuracy"].value for name, judge in report.judges.items()}
    assert accuracy["gpt-4"] == pytest.approx(0.435, abs=6e-4)
    assert accuracy["gpt-3.5"] == pytest.approx(0.379, abs=6e-4)
    # Sums of verdicts over unequal numbers of games, one order only: by Pearson the judges are far apart.
    for name, judge in report.judges.items():
        sums = {}
        for each, own in zip(items, said[name], strict=True):
            for model, side in each.models:
                true, its = sums.setdefault(model, [0.0, 0.0])
                sums[model] = [true + side * each.truth, its + side * own]
        found = judge.correlations["pairs"]["llmfao"]
        assert found.models == len(sums) == 59
        assert found.value == pytest.approx(np.corrcoef(np.array(list(sums.values())).T)[0, 1])
