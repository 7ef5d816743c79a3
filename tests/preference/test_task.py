import json
import math

import pytest

from counterproof.bench.task import Arm, Diverged, Trial
from counterproof.errors import UserError
from counterproof.language import Language
from counterproof.language.tiny import TinyWorld, tiny_model, tiny_tokenizer
from counterproof.preference.objectives import DPO, Objective, Output
from counterproof.preference.study import best_of
from counterproof.preference.task import ARMS, PREFERENCE, describe_preferences, run_preference

SMALL = {
    **PREFERENCE.budgets["quick"].settings,
    "pairs": 12,
    "prompts": 10,
    "steps": 2,
    "batch": 4,
    "looks": 1,
    "max_new_tokens": 8,
}
OWN = {
    **SMALL,
    "own": {
        **PREFERENCE.budgets["quick"].settings["own"],
        "steps": 3,
        "points": 2,
        "learning_rate": 0.02,
        "lora": 2,
        "max_new_tokens": 6,
    },
}
ARM = Arm("dpo", "counterproof.preference.objectives:DPO", {"beta": [0.1, 0.5], "learning_rate": [1e-4, 1e-2]})


@pytest.fixture(autouse=True)
def untrained_world(monkeypatch):
    """The world's model as it starts: training it takes seconds, and nothing here is about what it knows."""

    def language(self, seed, *, device="cpu"):
        tokenizer = self.tokenizer()
        return Language(tiny_model(tokenizer, seed=seed, context=32).to(device), tokenizer)

    monkeypatch.setattr(TinyWorld, "language", language)


def run(arm=ARM, seed=1000, settings=SMALL, **more):
    curve = []
    metrics = run_preference(arm, Trial(seed=seed, settings=settings, listener=curve.append, **more))
    return metrics, [point for point in curve if "quality" in point]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count, **changes):
    return [
        {"prompt": f"say {'good ' * (i % 7)}{'bad ' * (i // 7)}", "chosen": "good good", "rejected": "bad", **changes}
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    """A model of the user's."""
    tokenizer = tiny_tokenizer(["good", "bad", "say"])
    tiny_model(tokenizer, seed=0, hidden=16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# The tiny world


def test_metrics_are_statistics_of_the_logged_grid():
    metrics, curve = run()
    assert set(metrics) == set(PREFERENCE.metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    start, *points = curve
    assert "point" not in start
    assert start["kl"] == 0.0
    assert [(p["point"], p["beta"], p["learning_rate"]) for p in points] == [
        (0, 0.1, 1e-4),
        (1, 0.1, 1e-2),
        (2, 0.5, 1e-4),
        (3, 0.5, 1e-2),
    ]
    quality = [point["quality"] for point in points]
    assert metrics["quality_mean"] == pytest.approx(sum(quality) / 4)
    assert (metrics["quality_worst"], metrics["quality_best"]) == (min(quality), max(quality))
    assert metrics["quality_best_of_2"] == pytest.approx(best_of(quality, 2))
    assert metrics["above_start"] == sum(q > start["quality"] for q in quality) / 4
    assert metrics["kl_mean"] == pytest.approx(sum(point["kl"] for point in points) / 4)
    assert metrics["length_mean"] == pytest.approx(sum(point["length"] for point in points) / 4)


def test_a_quality_that_no_point_reaches_counts_as_badly_as_can_be():
    metrics, _ = run(settings={**SMALL, "target": 1.0})
    assert metrics["reached"] == 0.0
    assert metrics["length_at_quality"] == SMALL["max_new_tokens"]
    assert metrics["kl_at_quality"] == pytest.approx(SMALL["max_new_tokens"] * math.log(len(TinyWorld().tokenizer())))
    metrics, (start, *_) = run(settings={**SMALL, "target": 0.0})  # where it begins
    assert metrics["reached"] == 1.0
    assert metrics["length_at_quality"] == pytest.approx(start["length"])
    assert metrics["kl_at_quality"] == 0.0


def test_a_trial_repeats_and_arms_share_what_they_start_from():
    first, again = run(), run()
    assert first[0] == again[0]
    other = run(Arm("simpo", "counterproof.preference.objectives:SimPO", {"gamma": [0.5]}))
    start = {name: value for name, value in other[1][0].items() if name != "cost"}
    assert start == {name: value for name, value in first[1][0].items() if name != "cost"}
    assert run(seed=1001)[1][0]["quality"] != first[1][0]["quality"]


@pytest.mark.parametrize("labeller", ["neutral", "likes-length", "longer-says-more"])
def test_labellers_label_the_same_answers(labeller):
    metrics, curve = run(settings={**SMALL, "labeller": labeller})
    assert curve[0]["quality"] == run()[1][0]["quality"]
    if labeller != "neutral":
        assert metrics != run()[0]


def test_few_points_are_drawn_by_seed_the_same_for_grids_of_a_size():
    settings = {**SMALL, "points": 2, "steps": 1}
    drawn = {}
    for seed in range(1000, 1003):
        _, (_, *points) = run(seed=seed, settings=settings)
        drawn[seed] = [point["point"] for point in points]
        assert len(points) == 2
        other = Arm("kto", "counterproof.preference.objectives:KTO", ARM.settings)
        assert [point["point"] for point in run(other, seed=seed, settings=settings)[1][1:]] == drawn[seed]
    assert len(set(map(tuple, drawn.values()))) > 1


class Broken(Objective):
    """Finite from beta 1 on."""

    name = "broken"

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, policy, reference, batch):
        return Output(policy.sum() * (1.0 if self.beta >= 1 else math.inf), {})


def test_points_that_diverge_count_as_nothing_and_a_grid_of_them_diverges(monkeypatch):
    monkeypatch.setattr("counterproof.preference.objectives.DPO", Broken)
    metrics, curve = run(Arm("dpo", ARM.method, {"beta": [0.1, 1.0]}))
    assert metrics["quality_worst"] == 0.0
    assert curve[1]["diverged"] == 1.0
    assert curve[1]["quality"] == 0.0
    assert metrics["length_mean"] == curve[2]["length"]
    with pytest.raises(Diverged, match="every point of the grid diverged, the first with step 1"):
        run(Arm("dpo", ARM.method, {"beta": [0.1, 0.2]}))


def test_an_arm_without_an_objective_is_refused():
    with pytest.raises(UserError, match=r"arm none: .* needs an objective"):
        run(Arm("none"))


def test_the_arms_that_any_comparison_may_use_are_there():
    arms = {arm.name: arm for arm in ARMS["preference"]}
    assert set(arms) >= {"dpo", "simpo", "ipo", "kto", "orpo", "cpo", "r-dpo", "slic", "hinge", "robust-dpo"}
    for name, arm in arms.items():
        assert arm.load().name == name
        assert math.prod(map(len, arm.settings.values())) == 8
        for axis, values in arm.settings.items():
            for value in values:
                if axis != "learning_rate":
                    arm.load()(**{axis: value})
    assert arms["dpo"].load() is DPO


# The user's own


def test_own_pairs_and_model_are_judged_by_held_out_pairs(tmp_path, folder):
    data = write(tmp_path / "pairs.jsonl", rows(30))
    assert describe_preferences(data) == (
        "30 pairs on 30 prompts, plain text, the chosen answer is longer in 100%; a fifth of the prompts is held out"
    )
    metrics, (start, *points) = run(settings=OWN, data=data, model=folder)
    assert set(metrics) == set(PREFERENCE.metrics)
    assert len(points) == 2
    assert start["quality"] == start["accuracy"] == 0.5
    assert all(point["quality"] == point["accuracy"] for point in points)
    assert max(point["accuracy"] for point in points) > 0.5
    assert "win_start" not in points[0]


def test_no_prompt_is_on_both_sides(tmp_path, folder, monkeypatch):
    from counterproof.preference.study import Start

    given = {}
    monkeypatch.setattr(
        Start,
        "of",
        classmethod(
            lambda cls, language, samples, questions, **more: given.update(train=samples, test=questions, **more)
        ),
    )
    data = write(tmp_path / "pairs.jsonl", rows(40))
    with pytest.raises(AttributeError):
        run(settings=OWN, data=data, model=folder)
    train = {sample.group.prompt for sample in given["train"]}
    assert train.isdisjoint(question.tokens for question in given["test"])
    assert train.isdisjoint(sample.group.prompt for sample in given["held_out"])
    assert given["lora"] == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (rows(19), "makes 19 pairs on 19 prompts; give 20 of each"),
        (rows(40, prompt="say "), "makes 40 pairs on 1 prompts"),
        ([{"prompt": "say ", "completion": "good", "label": True}] * 30, ":1: no pair can be made of one unpaired"),
        ([*rows(30), {"prompt": "say ", "chosen": "good"}], ":31: rejected missing"),
    ],
)
def test_data_that_will_not_do_are_named(tmp_path, content, problem):
    data = write(tmp_path / "pairs.jsonl", content)
    with pytest.raises(UserError, match=problem) as caught:
        describe_preferences(data)
    assert str(data) in str(caught.value)


def test_rankings_make_pairs_of_best_and_worst(tmp_path):
    ranked = [
        {"prompt": f"say {'good ' * i}", "completions": ["bad", "good", "bad bad"], "scores": [0.2, 0.9, 0.1]}
        for i in range(25)
    ]
    ranked[0]["scores"] = [0.5, 0.5, 0.5]
    assert describe_preferences(write(tmp_path / "ranked.jsonl", ranked)).startswith("24 pairs on 24 prompts")
