import itertools
import json
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.language import Group, Language, completion_logps
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference.data import Example
from counterproof.preference.objectives import DPO, KTO, Objective, Output, Sample, SimPO
from counterproof.preference.study import (
    GridPoint,
    Measured,
    Question,
    RobustnessStudy,
    Start,
    StudyResult,
    WinRate,
    at_quality,
    best_of,
    first_reached,
    grid,
    grid_statistics,
    objective_class,
    summary_of_arms,
    win_rate,
)

WORDS = ["good", "bad", "say"]
values = st.lists(st.floats(-10, 10), min_size=1, max_size=7)


def language(seed=0):
    """A random model, sharpened: as it comes it is so near to uniform that no two differ."""
    tokenizer = tiny_tokenizer(WORDS)
    model = tiny_model(tokenizer, seed=seed, hidden=16)
    with torch.no_grad():
        model.lm_head.weight *= 15
    return Language(model, tokenizer)


def reward(prompt, answer):
    words = answer.split()
    return words.count("good") / len(words) if words else 0.0


def example(chosen="good", rejected="bad", prompt="say "):
    return Example(prompt=prompt, completions=(chosen, rejected), scores=(1.0, 0.0), kind="pair", where="x:1")


PAIRS = [example(f"good {word}", f"bad {word}") for word in ("good", "bad", "say")]
PROMPTS = [" ".join(words) + " " for n in (1, 2, 3) for words in itertools.product(WORDS, repeat=n)]


def study(methods=None, **changes):
    settings = {
        "model": language(),
        "pairs": PAIRS,
        "prompts": PROMPTS,
        "methods": {"dpo": grid(beta=[0.1, 1.0])} if methods is None else methods,
        "reward": reward,
        "budget_steps": 4,
        "batch": 3,
        "learning_rate": 0.01,
        "max_new_tokens": 6,
    }
    return RobustnessStudy(**{**settings, **changes})


# Grids and statistics


def test_a_grid_is_all_combinations_the_last_axis_fastest():
    assert grid(beta=[1, 2], gamma=[0.5, 1.5]) == [
        {"beta": 1, "gamma": 0.5},
        {"beta": 1, "gamma": 1.5},
        {"beta": 2, "gamma": 0.5},
        {"beta": 2, "gamma": 1.5},
    ]


def test_an_axis_that_is_none_is_refused():
    with pytest.raises(ValueError, match="at least one axis"):
        grid()
    with pytest.raises(TypeError, match=r"axis beta is 0\.1; give a list"):
        grid(beta=0.1)
    with pytest.raises(TypeError, match="axis beta is 'match:1'; give a list"):
        grid(beta="match:1")
    for bad in ([], [0.1, 0.2, 0.1]):
        with pytest.raises(ValueError, match="one or more different values"):
            grid(beta=bad)


@given(values, st.integers(1, 9))
def test_the_best_of_k_is_the_mean_over_all_draws(found, k):
    draws = [max(drawn) for drawn in itertools.combinations(found, min(k, len(found)))]
    assert best_of(found, k) == pytest.approx(fmean(draws), abs=1e-9)


def test_the_best_of_one_is_the_mean_and_of_all_the_best():
    found = [0.3, 0.9, 0.1, 0.5]
    assert best_of(found, 1) == pytest.approx(0.45)
    assert best_of(found, 4) == 0.9
    assert best_of(found, 2) == pytest.approx((0.9 * 3 + 0.5 * 2 + 0.3) / 6)
    for bad in (([], 1), (found, 0)):
        with pytest.raises(ValueError, match="one value or more and k >= 1"):
            best_of(*bad)


def test_what_a_grid_is_worth():
    found = grid_statistics([0.2, 0.4, 0.9, 0.5], start=0.4)
    assert found["mean"] == pytest.approx(np.mean([0.2, 0.4, 0.9, 0.5]))
    assert found["sd"] == pytest.approx(np.std([0.2, 0.4, 0.9, 0.5]))
    assert (found["worst"], found["best"]) == (0.2, 0.9)
    assert found["median"] == pytest.approx(0.45)
    assert found["best_of_4"] == 0.9
    assert found["above_start"] == 0.5  # one that equals the start is not above it


def test_a_quality_is_reached_between_two_measurements():
    path = [(0.4, 8.0), (0.6, 10.0), (0.5, 11.0), (0.8, 14.0)]
    assert first_reached(path, 0.5) == pytest.approx(9.0)
    assert first_reached(path, 0.4) == 8.0
    assert first_reached(path, 0.7) == pytest.approx(11.0 + 3.0 * 2 / 3)
    assert first_reached(path, 0.81) is None
    assert at_quality([path, [(0.4, 8.0), (0.5, 12.0)], [(0.4, 8.0)]], 0.5) == (
        pytest.approx(10.5),
        pytest.approx(2 / 3),
    )
    assert at_quality([path], 0.9) == (None, 0.0)


# Win rates


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_win_rates_count_ties_half_and_add_up_to_one(pairs):
    own, other = zip(*pairs, strict=True)
    rate, low, high = win_rate(own, other)
    assert rate == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert win_rate(other, own).rate == pytest.approx(1 - rate)
    assert 0 <= low <= rate <= high <= 1
    itself = win_rate(own, own)
    assert itself.rate == 0.5
    assert itself.low <= 0.5 <= itself.high


def test_the_interval_of_a_win_rate_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = win_rate(rng.choice([0.0, 1.0, 2.0], size=200, p=[0.2, 0.3, 0.5]), np.ones(200))
        covered += found.low <= 0.65 <= found.high
    assert 920 <= covered <= 975
    with pytest.raises(ValueError, match="not 1 with 2"):
        win_rate([1.0], [1.0, 2.0])


# Measuring


def start(policy_seed=0, questions=None, **more):
    given = language(policy_seed)
    group = Group((1, 5), ((3, 2), (4, 2)))
    settings = {"reward": reward, "max_new_tokens": 3, "seed": 0, **more}
    questions = questions or [Question("say", (1, 5), "good")]
    return Start.of(given, [Sample(group, (1.0, 0.0))], questions, **settings)


def every_answer(model, prompt, longest):
    """All answers of at most so many tokens with their exact log-probabilities."""
    vocabulary, end = model.config.vocab_size, 2
    found = []
    for length in range(1, longest + 1):
        for body in itertools.product([t for t in range(vocabulary) if t != end], repeat=length - 1):
            found.append((*body, end))
    found += list(itertools.product([t for t in range(vocabulary) if t != end], repeat=longest))
    with torch.no_grad():
        logps = completion_logps(model, [Group(prompt, tuple(found))]).sum().double()
    return found, logps


def test_kl_is_that_of_the_policys_own_answers():
    """Against the exact sum over all 1 + 5 + 25 + 125 answers; the standard error is exact too."""
    count = 3000
    questions = [Question("say", (1, 5), "good")] * count
    began = start(0, questions, batch_size=1500)
    policy = language(7)
    measured = began.measure(policy, lambda: nullcontext(began.language.model))
    answers, own = every_answer(policy.model, (1, 5), 3)
    _, reference = every_answer(began.language.model, (1, 5), 3)
    probability = own.exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-5)
    ratio = own - reference
    exact = float((probability * ratio).sum())
    error = math.sqrt(float((probability * ratio.square()).sum()) - exact**2) / math.sqrt(count)
    assert exact > 20 * error
    assert abs(measured.kl - exact) < 3 * error
    # From the start's answers instead it would be another number.
    assert abs(float((reference.exp() * -ratio).sum()) - exact) > 6 * error
    length = sum(p * len(a) for p, a in zip(probability.tolist(), answers, strict=True))
    assert measured.length == pytest.approx(length, abs=0.05)
    capped = sum(p for p, a in zip(probability.tolist(), answers, strict=True) if a[-1] != 2)
    assert measured.capped == pytest.approx(capped, abs=0.03)
    assert measured.kl_per_token == pytest.approx(measured.kl / measured.length)


def test_a_model_beside_itself_has_no_kl_and_wins_half():
    began = start()
    again = began.measure(began.language, lambda: nullcontext(began.language.model), first=began)
    assert again.kl == began.before.kl == 0.0
    assert again.win_start == WinRate(0.5, 0.0, 1.0)
    assert again.rewards == began.before.rewards
    assert again.quality == fmean(again.rewards)


def test_accuracy_is_of_the_gain_since_the_start_with_ties_half():
    held_out = [
        Sample(Group((1, 5), ((3, 2), (4, 2))), (1.0, 0.0)),
        Sample(Group((1, 5), ((3, 2), (4, 2))), (0.0, 1.0)),  # the same with the second chosen
        Sample(Group((1, 5), ((3, 3, 2), (4, 2))), (1.0, 0.0)),
    ]
    began = start(held_out=held_out, reward=None)
    assert began.before.quality == began.before.accuracy == 0.5
    assert began.before.margin == 0.0
    policy = language(3)
    measured = began.measure(policy, lambda: nullcontext(began.language.model))
    groups = [sample.group for sample in held_out]
    with torch.no_grad():
        gain = completion_logps(policy.model, groups).sum() - completion_logps(began.language.model, groups).sum()
    margins = [float(gain[0] - gain[1]), float(gain[3] - gain[2]), float(gain[4] - gain[5])]
    assert margins[0] == pytest.approx(-margins[1], abs=1e-6)
    assert measured.quality == pytest.approx(fmean(margin > 0 for margin in margins))
    assert measured.margin == pytest.approx(fmean(margins), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"samples": []}, "no pair to train on"),
        ({"questions": []}, "no held-out prompt"),
        ({"reward": None}, "nothing says what quality is"),
        ({"held_out": [Sample(Group((1, 5), ((3, 2), (4, 2))), (1.0, 1.0), where="x:9")]}, "x:9: not a pair"),
    ],
)
def test_a_start_without_what_it_needs_says_so(changes, problem):
    settings = {
        "samples": [Sample(Group((1, 5), ((3, 2), (4, 2))), (1.0, 0.0))],
        "questions": [Question("say", (1, 5))],
        "reward": reward,
        **changes,
    }
    with pytest.raises(UserError, match=problem):
        Start.of(language(), settings.pop("samples"), settings.pop("questions"), **settings)


# Training points


def test_a_point_learns_and_the_start_stays():
    given = language()
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    result = study(methods={DPO: grid(beta=[0.1])}, model=given, budget_steps=25, looks=5, held_out=PAIRS).run()
    (point,) = result.points
    assert (result.starts[0].accuracy, point.measured.accuracy) == (0.5, 1.0)
    assert point.measured.margin > 5.0
    assert point.measured.kl > 0.1
    assert [step for step, *_ in point.path] == [0, 5, 10, 15, 20, 25]
    assert point.path[-1][1:] == (point.measured.quality, point.measured.length, point.measured.kl)
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


def test_with_lora_only_the_adapter_learns_and_it_is_gone_afterwards():
    given = language()
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in given.model.named_parameters()}
    result = study(model=given, lora=2, budget_steps=25, learning_rate=0.05).run()
    assert all(point.measured.kl > 0.1 for point in result.points)
    after = given.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: parameter.requires_grad for name, parameter in given.model.named_parameters()} == flags
    again = study(model=given, lora=2, budget_steps=25, learning_rate=0.05).run()
    assert [point.measured for point in again.points] == [point.measured for point in result.points]


def test_axes_of_the_loop_go_to_the_loop():
    found = study(methods={DPO: grid(beta=[0.1], learning_rate=[1e-6, 0.02], steps=[2, 6])}, looks=2).run().points
    assert [point.path[-1][0] for point in found] == [2, 6, 2, 6]
    assert all(abs(point.measured.kl) < 1e-3 for point in found[:2])
    assert found[3].measured.kl > 0.01
    assert found[3].numeric == {"beta": 0.1, "learning_rate": 0.02, "steps": 6.0}
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        study(methods={DPO: grid(gamma=[1.0])}).run()
    with pytest.raises(ValueError, match="beta must be a positive number"):
        study(methods={DPO: grid(beta=[0.1, -1.0])}).run()


@dataclass(frozen=True)
class Scaled(DPO):
    """DPO whose beta grows with the data's mean length."""

    name: ClassVar[str] = "scaled-dpo"

    def calibrated(self, mean_length):
        return DPO(beta=self.beta * mean_length)


def test_an_objective_is_calibrated_by_the_mean_training_length():
    """Completions "good good</s>" and so on have three tokens each."""
    (point,) = study(methods={"scaled_dpo": grid(beta=[0.1])}).run().points
    assert point.numeric["beta"] == pytest.approx(0.3)
    assert point.setting == {"beta": 0.1}
    (plain,) = study(methods={DPO: grid(beta=[0.30000000000000004])}).run().points
    assert plain.measured == point.measured


@dataclass(frozen=True)
class Explosive(Objective):
    """Not finite after `good` calls."""

    beta: float = 1.0
    name: ClassVar[str] = "explosive"

    def __call__(self, policy, reference, batch):
        return Output(policy.sum() * math.inf, {})


def test_a_run_that_diverges_is_a_result():
    result = study(methods={Explosive: grid(beta=[1.0]), DPO: grid(beta=[1.0])}, floor=-1.0).run()
    point = result.points[0]
    assert point.measured is None
    assert "step 1: the loss is" in point.problem
    rows = {row["arm"]: row for row in result.table()}
    assert rows["explosive"]["worst"] == -1.0
    assert rows["explosive"]["kl"] is None
    assert result.summary.recommended == "dpo"
    assert "explosive" in result.report()


def test_single_completions_of_pairs_can_be_learnt_from():
    (point,) = study(methods={KTO: grid(beta=[0.5])}, budget_steps=20, held_out=PAIRS).run().points
    assert point.measured.accuracy == 1.0


def test_methods_are_found_by_class_or_name():
    assert objective_class("simpo") is SimPO
    assert objective_class("robust_dpo").name == "robust-dpo"
    assert objective_class(DPO) is DPO
    with pytest.raises(UserError, match=r"no imported objective is called .depo.[^;]*; .*dpo"):
        objective_class("depo")
    with pytest.raises(TypeError, match="class or its name"):
        objective_class(DPO())


def test_the_same_seed_gives_the_same_result_and_another_another():
    first, again = (
        study(methods={DPO: grid(beta=[0.1])}, seeds=[0, 1]).run(),
        study(methods={DPO: grid(beta=[0.1])}).run(),
    )
    assert first.points[0].measured == again.points[0].measured
    assert first.points[1].measured != first.points[0].measured
    assert list(first.starts) == [0, 1]


def test_a_study_takes_chat_messages_and_functions_of_the_seed():
    tokenizer = tiny_tokenizer([*WORDS, "user", "bot"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'user' if m.role == 'user' else 'bot' }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}bot {% endif %}"
    )
    prompt = [{"role": "user", "content": "say"}]
    pair = Example(
        prompt=prompt,
        completions=([{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad bad"}]),
        scores=(1.0, 0.0),
        kind="pair",
    )
    asked = []

    def judged(prompt, answer):
        asked.append(prompt)
        return reward(prompt, answer)

    def model(seed):
        return Language(tiny_model(tokenizer, seed=seed, hidden=16), tokenizer)

    result = study(
        model=model, pairs=lambda seed, language: [pair] * (seed + 1), prompts=[pair], reward=judged, seeds=[1]
    ).run()
    assert all(one == prompt for one in asked)
    assert result.points[0].measured.win_chosen is not None
    assert result.points[0].measured.win_chosen.rate <= 0.5  # nothing beats "good"


def test_data_that_can_be_read_once_serve_every_seed():
    methods = {DPO: grid(beta=[0.1])}
    once = study(methods, pairs=iter(PAIRS), prompts=iter(PROMPTS), seeds=[0, 1]).run()
    assert [p.measured for p in once.points] == [p.measured for p in study(methods, seeds=[0, 1]).run().points]


# Resuming


def test_a_study_goes_on_from_the_points_in_its_folder(tmp_path):
    methods = {DPO: grid(beta=[0.1, 1.0]), SimPO: grid(beta=[2.0])}
    seen = []

    def stop(done, total, point):
        seen.append((done, total, point.method))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(methods, out=tmp_path, watch=stop).run()
    assert seen == [(1, 3, "dpo"), (2, 3, "dpo")]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("dpo-*.json")}
    assert len(kept) == 2
    assert not list(tmp_path.glob(".*"))  # nothing half written
    result = study(methods, out=tmp_path).run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("dpo-*.json")} == kept
    whole = study(methods).run()
    assert [(p.method, p.point, p.measured, p.path) for p in result.points] == [
        (p.method, p.point, p.measured, p.path) for p in whole.points
    ]
    assert "quality" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["recommended"] in ("dpo", "simpo")


def test_a_point_found_again_may_stand_elsewhere_in_the_grid(tmp_path):
    study({DPO: grid(beta=[0.1])}, out=tmp_path).run()
    result = study({DPO: grid(beta=[1.0, 0.1])}, out=tmp_path).run()
    assert [(point.point, point.setting["beta"]) for point in result.points] == [(0, 1.0), (1, 0.1)]
    assert len(list(tmp_path.glob("dpo-*.json"))) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"model": language(1)},
        {"pairs": PAIRS[:2]},
        {"prompts": PROMPTS[:3]},
        {"reward": lambda prompt, answer: float(len(answer))},
        {"budget_steps": 5},
        {"max_new_tokens": 5},
        {"seeds": [1]},
        {"lora": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_would_change_a_point_is_not_answered_from_the_folder(tmp_path, change):
    methods = {DPO: grid(beta=[0.1])}
    study(methods, out=tmp_path).run()
    study(methods, out=tmp_path, **change).run()
    assert len(list(tmp_path.glob("dpo-*.json"))) == 2


def test_a_file_is_no_folder_for_points(tmp_path):
    (tmp_path / "points").touch()
    with pytest.raises(UserError, match="points is a file; name a folder"):
        study(out=tmp_path / "points").run()


def test_a_damaged_point_is_made_again(tmp_path):
    methods = {DPO: grid(beta=[0.1])}
    whole = study(methods, out=tmp_path).run()
    (file,) = tmp_path.glob("dpo-*.json")
    file.write_text(file.read_text()[:100])
    assert study(methods, out=tmp_path).run().points[0].measured == whole.points[0].measured


def test_a_point_survives_json():
    for measured in (
        None,
        Measured(0.5, 1.0, 0.1, 9.0, 0.0, accuracy=0.6, win_start=WinRate(0.5, 0.4, 0.6), rewards=(0.0, 1.0)),
    ):
        point = GridPoint(
            "dpo", 1, 2, {"beta": "match:0.1"}, {"beta": 0.8}, measured, ((0, 0.4, 8.0, 0.0),), "why", 1.5
        )
        assert GridPoint.from_json(json.loads(json.dumps(point.as_json()))) == point


# Arms side by side


def trial(seed, qualities, start=0.4, **more):
    curve = [{"progress": 0.1, "cost": 1.0, "quality": start, "kl": 0.0, "length": 8.0}]
    for point, quality in enumerate(qualities):
        values = {"quality": quality, "kl": 2.0 + point, "length": 9.0 + point, "beta": 0.1 * (point + 1)}
        curve.append({"progress": 1.0, "cost": 2.0, "point": float(point), **values})
    return {"seed": seed, "curve": curve, **more}


ARMS: Mapping[str, list] = {
    "even": [trial(0, [0.7, 0.7, 0.7]), trial(1, [0.72, 0.7, 0.71])],
    "peaky": [trial(0, [0.3, 0.6, 0.9]), trial(1, [0.3, 0.62, 0.95])],
}


def test_the_arm_to_take_has_the_best_mean_and_the_evidence_is_paired():
    found = summary_of_arms(ARMS)
    assert found.recommended == "even"
    rows = {row["arm"]: row for row in found.rows}
    assert rows["peaky"]["mean"] == pytest.approx(fmean([0.6, 1.87 / 3]))
    assert rows["peaky"]["worst"] == pytest.approx(0.3)
    assert rows["peaky"]["above_start"] == pytest.approx(2 / 3)
    assert rows["peaky"]["best_of_2"] == pytest.approx(
        fmean([best_of([0.3, 0.6, 0.9], 2), best_of([0.3, 0.62, 0.95], 2)])
    )
    assert rows["even"]["kl"] == pytest.approx(3.0)
    gaps = np.array([0.1, 0.71 - 1.87 / 3])
    against = found.against["peaky"]
    assert against["difference"] == pytest.approx(gaps.mean())
    half = 12.706204736 * gaps.std(ddof=1) / math.sqrt(2)
    assert against["interval"] == pytest.approx([gaps.mean() - half, gaps.mean() + half], abs=1e-6)
    assert (against["wins"], against["seeds"]) == (2, 2)
    text = found.text()
    assert "take even: mean quality 0.705" in text
    assert "but peaky has the highest best point: 0.925, against 0.710" in text
    assert "(95 % interval +0.009 to +0.178), ahead on 2 of 2 seeds" in text
    assert "before training: quality 0.400, length 8.0" in text


def test_failed_trials_count_against_an_arm():
    broken = trial(1, [], outcome="raised")
    found = summary_of_arms({"even": ARMS["even"], "best": [trial(0, [0.99, 0.99]), broken]})
    assert found.recommended == "even"
    assert "seeds do not separate" not in found.text()
    assert "1 (1 failed)" in found.text()
    assert "1 of its trials failed" in found.text()
    with pytest.raises(ValueError, match="no trial of these arms"):
        summary_of_arms({"best": [broken]})


def test_one_seed_and_one_arm_and_no_start_will_do():
    alone = trial(0, [0.5, 0.6])
    alone["curve"] = alone["curve"][1:]
    found = summary_of_arms({"only": [alone]})
    assert found.rows[0]["above_start"] is None
    assert found.start == {}
    assert found.against == {}
    assert "above start" not in found.text()
    two = summary_of_arms({"even": ARMS["even"][:1], "peaky": ARMS["peaky"][1:]})
    assert two.against["peaky"]["difference"] is None or two.against["even"]["difference"] is None
    assert "no seed in common" in two.text()


def test_everything_is_json_and_the_plots_are_drawn_with_what_they_show():
    found = summary_of_arms({**ARMS, "a<b": ARMS["even"]})
    assert json.loads(json.dumps(found.as_json()))["recommended"] == found.recommended
    for name, svg in found.plots().items():
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
        marks = [title for title in titles if title and title.startswith("peaky, beta")]
        assert len(marks) == 3
        assert marks[2] == f"peaky, beta 0.3: quality 0.925, {name} {4 if name == 'kl' else 11}"
        assert titles.count("before training") == 1
    page = found.html()
    assert "<script" not in page
    assert "a&lt;b" in page
    assert not re.search(r"(src|href)=", page)


def test_a_study_reports_what_its_points_say(tmp_path):
    def point(method, number, seed, quality, kl):
        measured = Measured(quality, kl, kl / 10, 10.0, 0.0)
        path = ((0, 0.4, 8.0, 0.0), (10, quality, 10.0, kl))
        return GridPoint(method, number, seed, {"beta": number}, {"beta": float(number)}, measured, path, "", 0.1)

    before = Measured(0.4, 0.0, 0.0, 8.0, 0.0)
    result = StudyResult((point("dpo", 0, 0, 0.6, 2.0), point("dpo", 1, 0, 0.8, 4.0)), {0: before})
    assert result.table()[0]["mean"] == pytest.approx(0.7)
    assert result.length_at_quality("dpo", 0.7) == (pytest.approx(8.0 + 2.0 * 0.75), 0.5)
    assert result.kl_at_quality("dpo", 0.5) == (pytest.approx((1.0 + 1.0) / 2), 1.0)
    with pytest.raises(ValueError, match="no method 'kto'; there are dpo"):
        result.kl_at_quality("kto", 0.5)
    assert result.report(tmp_path / "report.html") == result.summary.text()
    assert (tmp_path / "report.html").read_text().count("<svg") == 2
    assert result.as_json()["starts"]["0"]["quality"] == 0.4
