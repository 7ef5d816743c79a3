"""Curry-DPO: what is paired with what, in which stage, against which reference."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import expit
from transformers import GPT2Config, GPT2LMHeadModel

from counterproof.errors import UserError
from counterproof.language import Group, Language
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference import DPO, Curriculum, CurriculumTrainer, CurryDPO, SimPO
from counterproof.preference.data import Example, read, to_pairs
from counterproof.preference.forward import optimise, reference_logps, referenced
from counterproof.preference.objectives import Sample

WORDS = ["red", "blue", "green", "gold", "pink", "grey", "a", "b", "c", "d", ":"]


def language(seed=0):
    tokenizer = tiny_tokenizer(WORDS)
    return Language(tiny_model(tokenizer, seed=seed, hidden=16, layers=2), tokenizer)


def ranking(*scores, number=0, where=""):
    completions = tuple(f"{WORDS[place]} {WORDS[(place + number) % 6]}" for place in range(len(scores)))
    prompt = f"{WORDS[6 + number % 4]} :"
    return Example(
        prompt=prompt + " ", completions=completions, scores=tuple(map(float, scores)), kind="ranked", where=where
    )


def rankings(count=24, k=4, seed=0):
    rng = np.random.default_rng(seed)
    return [ranking(*rng.permutation(np.arange(k) * 2.0 + rng.random(k)), number=n) for n in range(count)]


def places(row, stage):
    """Per pair of a stage: which completions of the ranking are chosen and rejected."""
    return [tuple(row.completions.index(text) for text in pair.completions) for pair in stage]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def logps(model, samples):
    return reference_logps(referenced(model, samples)).sum()


def samples_of(lm, curriculum, stage):
    return CurriculumTrainer(lm, curriculum=curriculum)._samples(curriculum.stages[stage].pairs)


class Recorder:
    """Losses and metrics per stage."""

    def __init__(self):
        self.losses, self.metrics = {}, {}

    def __call__(self, stage, step, output):
        self.losses.setdefault(stage, []).append(float(output.loss.detach()))
        self.metrics.setdefault(stage, []).append(output.metrics)


# The curriculum


def test_the_best_meets_the_worst_first_and_the_second_last_ties_by_place():
    row = ranking(9, 7, 7, 2)
    made = Curriculum.from_ranked([row])
    assert [places(row, stage) for stage in made] == [[(0, 3)], [(0, 2)], [(0, 1)]]
    assert [stage.gaps for stage in made] == [(7.0,), (2.0,), (2.0,)]
    assert (made.dropped, made.ties) == (0, 0)
    shuffled = ranking(7, 2, 9, 7)
    assert [places(shuffled, stage) for stage in Curriculum.from_ranked([shuffled])] == [[(2, 1)], [(2, 3)], [(2, 0)]]


def test_equal_scores_make_no_pair_and_are_counted():
    made = Curriculum.from_ranked([ranking(5, 5, 5, 5), ranking(5, 5, 3, 1, number=1)])
    assert (made.dropped, made.ties) == (1, 3 + 1)
    assert [len(stage) for stage in made] == [1, 1]  # the hardest pair, (5, 5), is missing
    with pytest.raises(UserError, match="none of 1 rankings"):
        Curriculum.from_ranked([ranking(5, 5)])


@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy", "random"])
@pytest.mark.parametrize(("scope", "stages"), [("local", 3), ("global", 3), ("global", 4), ("local", 1)])
def test_every_pair_is_dealt_once_and_stages_are_level(order, scope, stages):
    data = rankings(25)
    made = Curriculum.from_ranked(data, order=order, scope=scope, stages=stages, seed=3)
    dealt = sorted((p.prompt, *p.completions) for stage in made for p in stage)
    assert dealt == sorted((p.prompt, *p.completions) for p in to_pairs(data, "best_vs_rest"))
    sizes = [len(stage) for stage in made]
    assert len(sizes) == stages
    assert max(sizes) - min(sizes) <= (0 if scope == "local" else 1)
    assert [stage.number for stage in made] == list(range(1, stages + 1))


def test_a_global_curriculum_sorts_by_gap_and_keeps_the_datas_order_among_equals():
    data = [ranking(gap, 0, number=n) for n, gap in enumerate([1, 3, 2, 3, 1, 3])]
    made = Curriculum.from_ranked(data, scope="global", stages=3)
    by_gap = sorted(range(6), key=lambda n: -data[n].scores[0])  # Python's sort is stable
    expected = [sorted(by_gap[start : start + 2]) for start in (0, 2, 4)]
    assert [[pair.completions for pair in stage] for stage in made] == [
        [data[n].completions for n in part] for part in expected
    ]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("criterion", ["score_gap", "logp_gap"])
def test_the_mean_gap_falls_from_stage_to_stage_or_rises_when_the_hard_come_first(scope, criterion):
    lm = language()
    data = rankings(30, k=5)
    gaps = [
        [s.mean_gap for s in Curriculum.from_ranked(data, scope=scope, criterion=criterion, order=order, language=lm)]
        for order in ("easy_to_hard", "hard_to_easy")
    ]
    assert gaps[0] == gaps[1][::-1]
    assert gaps[0][0] > gaps[0][1] > gaps[0][2]


def test_more_pairs_than_stages_share_them_fewer_leave_the_last_ones_empty():
    six = ranking(6, 5, 4, 3, 2, 1, number=1)
    assert [places(six, s) for s in Curriculum.from_ranked([six], stages=2)] == [
        [(0, 3), (0, 4), (0, 5)],
        [(0, 1), (0, 2)],
    ]
    assert len(Curriculum.from_ranked([ranking(1, 2), ranking(3, 1, number=1)])) == 1


def test_pairings_of_one_pair_take_the_worst_or_any_worse_one():
    data = rankings(200)
    worst = Curriculum.from_ranked(data, pairing="best_worst")
    assert [p.completions for p in worst.stages[0]] == [p.completions for p in to_pairs(data, "best_worst")]
    lot = Curriculum.from_ranked(data, pairing="best_random", seed=1).stages[0]
    ranks = [
        sum(score > pair.columns["score_rejected"] for score in row.scores) for row, pair in zip(data, lot, strict=True)
    ]
    counts = np.bincount(ranks, minlength=4)
    assert counts[0] == 0
    assert (abs(counts[1:] - 200 / 3) < 4 * math.sqrt(200 * 2 / 9)).all()


@pytest.mark.parametrize("per_token", [False, True])
def test_the_log_probability_gap_is_that_of_the_model(per_token):
    lm = language()
    row = Example(prompt="a : ", completions=("red", "blue gold pink", "green a"), scores=(3, 2, 1), kind="ranked")
    name = "logp_gap_per_token" if per_token else "logp_gap"
    made = Curriculum.from_ranked([row], criterion=name, scope="global", stages=1, language=lm)
    values = []
    for text in row.completions:
        ids = torch.tensor([lm.tokenizer(row.prompt + text + "</s>")["input_ids"]])
        with torch.no_grad():
            token = lm.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[2:, 0]  # after "<s> a :"
        values.append(float(token.mean() if per_token else token.sum()))
    assert made.stages[0].gaps == pytest.approx([values[0] - values[1], values[0] - values[2]], abs=1e-5)


def test_a_model_that_gives_all_the_same_falls_back_to_the_scores_and_says_so():
    lm = language()
    torch.nn.init.zeros_(lm.model.lm_head.weight)
    data = rankings(8)
    with pytest.warns(UserWarning, match="same log-probability gap"):
        made = Curriculum.from_ranked(data, criterion="logp_gap_per_token", language=lm)
    assert [s.gaps for s in made] == [s.gaps for s in Curriculum.from_ranked(data)]


def test_a_criterion_of_ones_own_decides():
    data = rankings(6)
    made = Curriculum.from_ranked(data, criterion=lambda row, chosen, rejected: -(row.scores[rejected] ** 2))
    assert [[p.completions for p in s] for s in made] == [
        [p.completions for p in s] for s in Curriculum.from_ranked(data)
    ]
    with pytest.raises(ValueError, match="row 1: the criterion gave nan"):
        Curriculum.from_ranked(data, criterion=lambda *_: math.nan)


def test_samples_rows_and_files_give_the_same_pairs(tmp_path):
    data = rankings(5)
    rows = [{"prompt": r.prompt, "completions": list(r.completions), "scores": list(r.scores)} for r in data]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [stage.rows() for stage in Curriculum.from_ranked(data)]
    assert [stage.rows() for stage in Curriculum.from_ranked(rows)] == expected
    assert [stage.rows() for stage in Curriculum.from_ranked(read(path))] == expected
    from datasets import Dataset

    assert [stage.rows() for stage in Curriculum.from_ranked(Dataset.from_list(rows))] == expected
    tokens = [Sample(Group((1,), tuple((5 + i,) for i in range(4))), r.scores, {"w": (1, 2, 3, 4)}) for r in data]
    stage = Curriculum.from_ranked(tokens).stages[0]
    for pair, row in zip(stage, data, strict=True):
        best, worst = int(np.argmax(row.scores)), int(np.argmin(row.scores))
        assert pair.group.completions == ((5 + best,), (5 + worst,))
        assert pair.columns == {"w": [best + 1, worst + 1]}
        assert pair.scores == (1.0, 0.0)
    with pytest.raises(TypeError, match="Examples"):
        stage.rows()


def test_bad_rankings_are_named():
    good = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}
    for change, problem in (
        ({"completions": ["b"], "scores": [1]}, "row 2 has 1 completions"),
        ({"scores": [1, math.nan]}, "row 2 has the score nan"),
        ({"scores": [1, 2, 3]}, "row 2 has 2 completions and 3 scores"),
        ({"scores": [1, "2"]}, "row 2 has the score '2'"),
    ):
        with pytest.raises(ValueError, match=problem):
            Curriculum.from_ranked([good, {**good, **change}])
    with pytest.raises(ValueError, match="row 1 has no 'scores'"):
        Curriculum.from_ranked([{"prompt": "a", "completions": ["b", "c"]}])
    with pytest.raises(ValueError, match=r"file\.jsonl:7 has the score inf"):
        Curriculum.from_ranked([ranking(math.inf, 1, where="file.jsonl:7")])
    with pytest.raises(ValueError, match="row 1 has 2 completions and 1 scores"):
        Curriculum.from_ranked([Sample(Group((1,), ((2,), (3,))), (1.0,))])
    with pytest.raises(UserError, match="row 1: prompt"):
        Curriculum.from_ranked([Example(prompt="a", completions=(), scores=(), kind="prompt")])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scope": "all"}, "scope is 'all'; expected one of 'local', 'global'"),
        ({"order": "up"}, "order is 'up'"),
        ({"pairing": "all"}, "pairing is 'all'"),
        ({"criterion": "length"}, "criterion is 'length'"),
        ({"stages": 0}, "stages is 0"),
        ({"criterion": "logp_gap"}, "give language="),
    ],
)
def test_bad_options_are_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        Curriculum.from_ranked([ranking(2, 1)], **options)


def test_bad_options_of_the_trainer_are_named():
    made = Curriculum.from_ranked(rankings(4))
    for options, problem in (
        ({"reference": "base"}, "reference is 'base'"),
        ({"within": "sort"}, "within is 'sort'"),
        ({"steps_per_stage": [1, 2]}, "2 numbers for 3 stages"),
        ({"batch": 0}, "batch 0"),
        ({"steps_per_stage": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=problem):
            CurriculumTrainer(language(), curriculum=made, **options)
    with pytest.raises(ValueError, match="contradicts"):
        CurriculumTrainer(language(), curriculum=Curriculum.from_ranked(rankings(4), order="random"), within="sorted")
    with pytest.raises(ValueError, match="2 steps for 3 stages"):
        CurryDPO().train(language(), rankings(4), steps=2, batch=2)


# Training


def plain_dpo(lm, examples, steps, batch, rate, rng, objective=None):
    """DPO without any curriculum: one optimizer, the initial model for reference."""
    pairs = CurriculumTrainer(lm, curriculum=Curriculum.from_ranked(examples, stages=1))._samples(examples)
    losses = []
    optimise(
        lm.model,
        objective or DPO(beta=0.1),
        referenced(lm.model, pairs),
        steps=steps,
        batch=batch,
        learning_rate=rate,
        rng=rng,
        watch=lambda step, output: losses.append(float(output.loss.detach())),
    )
    return losses


def test_rankings_of_two_give_plain_dpo():
    data, seen = rankings(20, k=2), Recorder()
    lm = language()
    plain = plain_dpo(language(), list(to_pairs(data)), 12, 8, 1e-2, np.random.default_rng([4, 1]))
    made = Curriculum.from_ranked(data)
    CurriculumTrainer(lm, curriculum=made, steps_per_stage=12, batch=8, learning_rate=1e-2, seed=4, watch=seen).train()
    assert seen.losses == {1: pytest.approx(plain, abs=1e-6)}


def test_one_random_pool_with_the_initial_reference_is_multi_pair_dpo():
    data, seen = rankings(10), Recorder()
    lm = language()
    pool = list(to_pairs(data, "best_vs_rest"))
    plain = plain_dpo(language(), pool, 12, 8, 1e-2, np.random.default_rng([4, 1]))
    made = Curriculum.from_ranked(data, order="random", stages=1)
    CurriculumTrainer(
        lm, curriculum=made, reference="initial", steps_per_stage=12, batch=8, learning_rate=1e-2, seed=4, watch=seen
    ).train()
    assert seen.losses == {1: pytest.approx(plain, abs=1e-6)}


def test_a_stage_begins_at_log_2_against_the_previous_one_and_not_against_the_first():
    made = Curriculum.from_ranked(rankings(16))
    for reference in ("previous_stage", "initial"):
        seen, lm = Recorder(), language()
        options = {"steps_per_stage": 8, "batch": 8, "learning_rate": 1e-2}
        reports = CurriculumTrainer(lm, curriculum=made, reference=reference, watch=seen, **options).train()
        for stage in (1, 2, 3):
            first = seen.metrics[stage][0]
            fresh = stage == 1 or reference == "previous_stage"
            assert (abs(seen.losses[stage][0] - math.log(2)) < 1e-5) == fresh
            assert (max(abs(first["rewards/chosen"]), abs(first["rewards/rejected"])) < 1e-5) == fresh
            assert reports[stage - 1].first_loss == seen.losses[stage][0]


def test_the_references_are_those_of_the_model_at_the_boundary():
    """Three stages by hand, from nothing but the objective's formula, end at the same weights."""
    data = rankings(8)
    made = Curriculum.from_ranked(data)
    trained, by_hand = language(), language()
    CurriculumTrainer(trained, curriculum=made, steps_per_stage=3, batch=8, learning_rate=1e-2, warmup=1).train()
    for number in range(3):
        stage = samples_of(by_hand, made, number)
        reference = logps(by_hand.model, stage).view(-1, 2)
        optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            sums = []
            for sample in stage:
                for ids in sample.group.completions:
                    whole = torch.tensor([[*sample.group.prompt, *ids]])
                    logits = by_hand.model(whole).logits[0, len(sample.group.prompt) - 1 : -1]
                    sums.append(logits.log_softmax(-1)[torch.arange(len(ids)), list(ids)].sum())
            ratios = torch.stack(sums).view(-1, 2) - reference
            loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
            optimizer.step()
    pairs = samples_of(trained, made, 2)
    start = logps(language().model, pairs)
    assert (logps(trained.model, pairs) - start).abs().max() > 0.1
    torch.testing.assert_close(logps(trained.model, pairs), logps(by_hand.model, pairs), atol=2e-3, rtol=0)


def test_reports_tell_how_far_the_model_is_from_its_start():
    made, lm = Curriculum.from_ranked(rankings(12)), language()
    pairs = samples_of(lm, made, 0)
    start = logps(lm.model, pairs)
    reports = CurriculumTrainer(lm, curriculum=made, steps_per_stage=5, batch=6, learning_rate=1e-2).train()
    drift = (logps(lm.model, pairs) - start).view(-1, 2).mean(0)
    assert [reports[-1].chosen_drift, reports[-1].rejected_drift] == pytest.approx(drift.tolist(), abs=1e-4)
    assert [(r.number, r.pairs, r.steps) for r in reports] == [(1, 12, 5), (2, 12, 5), (3, 12, 5)]
    assert drift[0] > drift[1]


def test_sorted_batches_follow_the_gaps():
    data = rankings(9)
    for order, sign in (("easy_to_hard", -1), ("hard_to_easy", 1)):
        made = Curriculum.from_ranked(data, stages=1, order=order)
        stage = made.stages[0].sorted(order)
        assert (np.diff(np.array(stage.gaps) * sign) >= 0).all()
        gap = {(*p.completions, p.prompt): g for p, g in zip(stage.pairs, stage.gaps, strict=True)}
        assert all(gap[(*p.completions, p.prompt)] == g for p, g in zip(made.stages[0].pairs, made.stages[0].gaps))
        lm, seen = language(), Recorder()
        trainer = CurriculumTrainer(lm, curriculum=made, within="sorted", batch=9, learning_rate=1e-9, watch=seen)
        trainer.train()
        sums = logps(lm.model, trainer._samples(stage.pairs)).view(3, 9, 2)
        expected = sums[:, :, 0].mean(1).tolist()
        assert [m["logps/chosen"] for m in seen.metrics[1]] == pytest.approx(expected, abs=1e-4)


def test_it_wraps_any_objective_of_pairs_and_any_causal_model():
    tokenizer = tiny_tokenizer(WORDS)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = Language(GPT2LMHeadModel(config).eval(), tokenizer)
    seen = Recorder()
    data = rankings(12)
    objective = SimPO(beta=2.0, gamma=0.5)
    made = Curriculum.from_ranked(data)
    pairs = samples_of(lm, made, 0)
    means = reference_logps(referenced(lm.model, pairs)).mean().view(-1, 2)
    first = -np.log(expit(2.0 * (means[:, 0] - means[:, 1]).numpy() - 0.5)).mean()
    CurryDPO(objective=objective).train(lm, data, steps=9, batch=12, learning_rate=1e-2, watch=seen)
    assert seen.losses[1][0] == pytest.approx(first, abs=1e-5)
    assert seen.losses[3][-1] < seen.losses[1][0]
    assert [len(losses) for losses in seen.losses.values()] == [3, 3, 3]


def test_a_stage_is_an_epoch_unless_steps_are_given():
    trainer = CurriculumTrainer(language(), curriculum=Curriculum.from_ranked(rankings(10)), batch=4, epochs=2)
    assert trainer.steps == [6, 6, 6]
    assert trainer.objective == DPO(beta=0.1)


# Adapters


def with_adapter(lm, seed=0, trained=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            copy.deepcopy(lm.model), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        if trained:
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(value, std=0.3)
    return Language(model, lm.tokenizer)


class Boundary(Exception):
    pass


def references_of_stage(trainer, wanted):
    """The reference log-probabilities that a trainer gives its stage, without training that stage."""
    got = {}

    original = trainer._train

    def catch(train_stage):
        def stage(number, samples, objective):
            got[number] = reference_logps(samples).sum()
            if number == wanted:
                raise Boundary
            return train_stage(number, samples, objective)

        return original(stage)

    trainer._train = catch
    with pytest.raises(Boundary):
        trainer.train()
    return got[wanted]


@pytest.mark.parametrize("trained", [False, True], ids=["fresh adapter", "loaded adapter"])
def test_with_an_adapter_the_reference_is_the_adapter_of_the_last_stage(trained):
    base = language()
    made = Curriculum.from_ranked(rankings(12))
    options = {"curriculum": made, "steps_per_stage": 6, "batch": 6, "learning_rate": 5e-2}
    lm = with_adapter(base, trained=trained)
    begun = with_adapter(base, trained=trained)
    moved = references_of_stage(CurriculumTrainer(lm, **options), 2)
    pairs = samples_of(lm, made, 1)
    torch.testing.assert_close(moved, logps(lm.model, pairs), atol=1e-5, rtol=0)  # lm stands at the boundary
    assert (moved - logps(base.model, pairs)).abs().max() > 0.1
    kept = references_of_stage(CurriculumTrainer(begun, reference="initial", **options), 2)
    initial = with_adapter(base, trained=trained)
    torch.testing.assert_close(kept, logps(initial.model, pairs), atol=1e-5, rtol=0)
    same_as_base = (kept - logps(base.model, pairs)).abs().max() < 1e-4
    assert same_as_base != trained


def test_a_new_adapter_on_a_merged_one_has_the_merged_model_for_its_reference():
    data, base = rankings(12), language()
    first = with_adapter(base, trained=True)
    CurryDPO(stages=1).train(first, data, steps=4, batch=6, learning_rate=5e-2)
    merged = Language(copy.deepcopy(first.model).merge_and_unload(), first.tokenizer)
    second = with_adapter(merged, seed=1)
    made = Curriculum.from_ranked(data)
    reference = references_of_stage(CurriculumTrainer(second, curriculum=made), 1)
    torch.testing.assert_close(reference, logps(first.model, samples_of(first, made, 0)), atol=1e-4, rtol=0)


# Interruptions


@pytest.mark.parametrize("reference", ["previous_stage", "initial"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, adapter, reference):
    made = Curriculum.from_ranked(rankings(12))

    def fresh():
        return with_adapter(language()) if adapter else language()

    def trainer(lm, out, watch=None):
        return CurriculumTrainer(
            lm,
            curriculum=made,
            reference=reference,
            steps_per_stage=3,
            batch=6,
            learning_rate=1e-2,
            out=out,
            watch=watch,
        )

    whole = fresh()
    expected = trainer(whole, None).train()

    def stop(stage, step, output):
        if stage == 2:
            raise KeyboardInterrupt

    cut = fresh()
    with pytest.raises(KeyboardInterrupt):
        trainer(cut, tmp_path, stop).train()
    again, seen = fresh(), Recorder()
    reports = trainer(again, tmp_path, seen).train()
    assert set(seen.losses) == {2, 3}
    assert same_weights(weights(whole.model), weights(again.model))
    assert reports == expected
    # A run that is done trains nothing, and gives the trained model.
    done, seen = fresh(), Recorder()
    assert trainer(done, tmp_path, seen).train() == expected
    assert not seen.losses
    assert same_weights(weights(whole.model), weights(done.model))


def test_the_stages_are_saved_as_models_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = language()
    CurriculumTrainer(
        lm, curriculum=Curriculum.from_ranked(rankings(6)), steps_per_stage=2, learning_rate=1e-2, out=tmp_path
    ).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stage-3")
    ids = AutoTokenizer.from_pretrained(tmp_path / "stage-3")("a : red", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, lm.model(ids).logits)


def test_another_runs_folder_is_refused(tmp_path):
    made = Curriculum.from_ranked(rankings(6))
    options = {"curriculum": made, "steps_per_stage": 1, "out": tmp_path}
    CurriculumTrainer(language(), **options).train()
    for lm, changed in (
        (language(seed=1), {}),
        (language(), {"objective": DPO(beta=0.2)}),
        (language(), {"seed": 1}),
        (language(), {"curriculum": Curriculum.from_ranked(rankings(7))}),
        (language(), {"reference": "initial"}),
    ):
        with pytest.raises(UserError, match="another run"):
            CurriculumTrainer(lm, **{**options, **changed}).train()
    (tmp_path / "curriculum.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        CurriculumTrainer(language(), **options).train()


# By name, on one's own data


def test_train_takes_it_by_name_and_writes_an_adapter(tmp_path):
    from peft import PeftModel

    from counterproof.preference.trainer import TrainSettings, train

    path = tmp_path / "ranked.jsonl"
    rows = [{"prompt": r.prompt, "completions": list(r.completions), "scores": list(r.scores)} for r in rankings(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = language()
    settings = TrainSettings(steps=6, batch=4, learning_rate=1e-2, lora=4, max_length=32, samples=0)
    done = train(lm, path, method="curry-dpo", out=tmp_path / "out", settings=settings)
    assert [row["stage"] for row in done.history] == [1, 1, 2, 2, 3, 3]
    assert [row["step"] for row in done.history] == [1, 2, 3, 4, 5, 6]
    assert [done.history[place]["loss"] for place in (0, 2, 4)] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert "3 stages" in " ".join(done.notes)
    loaded = PeftModel.from_pretrained(language().model, tmp_path / "out")
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, done.model(ids).logits)
    base = language().model(ids).logits
    assert (loaded(ids).logits - base).abs().max() > 1e-3
    assert json.loads((tmp_path / "out" / "result.json").read_text())["method"] == "curry-dpo"


def test_the_recipe_takes_an_objective_by_name():
    assert CurryDPO()._objective() == DPO(beta=0.1)
    assert isinstance(CurryDPO(objective="simpo")._objective(), SimPO)
    with pytest.raises(UserError, match="method of its own"):
        CurryDPO(objective="curry-dpo")
    with pytest.raises(UserError, match="no method 'dpoo'"):
        CurryDPO(objective="dpoo")
    with pytest.raises(ValueError, match="order is 'x'"):
        CurryDPO(order="x")


# TRL


def trl_stage(model, tokenizer, stage, folder, **config):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(folder),
        precompute_ref_log_probs=True,  # the model as it is now; without it TRL loads the model's own path anew
        max_steps=3,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **config,
    )
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(stage.rows()), processing_class=tokenizer
    )
    trainer.train()
    return trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_one_dpo_trainer_of_trl_per_stage_starts_each_at_log_2(tmp_path, adapter, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    lm = with_adapter(language()) if adapter else language()
    model = lm.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stage in Curriculum.from_ranked(rankings(6)):
            before = logps(model, samples_of(lm, Curriculum.from_ranked(rankings(6)), 0))
            if adapter and "ref" in model.peft_config:
                model.delete_adapter("ref")  # the last stage's reference, which TRL makes anew and does not remove
            model, losses = trl_stage(model, lm.tokenizer, stage, tmp_path / str(stage.number))
            assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
            assert losses[-1] < losses[0]
            after = logps(model, samples_of(lm, Curriculum.from_ranked(rankings(6)), 0))
            assert (after - before).abs().max() > 1e-2
