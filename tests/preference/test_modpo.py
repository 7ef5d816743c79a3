"""MODPO: its loss and its optimum, margins, the baselines, and fronts."""

import copy
import itertools
import json
import logging
import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from counterproof.errors import UserError
from counterproof.language import Group, Language, Logps
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference import (
    DPO,
    MODPO,
    Batch,
    ClassifierReward,
    Front,
    FrontPoint,
    WeightedDPO,
    adapter_soup,
    add_margins,
    best_of_n,
    bradley_terry_scale,
    hypervolume,
    implicit_reward,
    loss_weighting_policies,
    mix_for_weighting,
    modpo_policies,
    modpo_trl_trainer,
    objective_output,
    optimise,
    pareto_sweep,
    referenced,
    simplex_grid,
    soup,
    soup_policies,
)
from counterproof.preference.data import Example, read, write
from counterproof.preference.trainer import prepare

WORDS = ("red", "blue", "green", "one", "two", "three", "?")
CHAT = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' else '</s>' }}{% endfor %}"


def language(seed=0, dtype=torch.float32):
    tokenizer = tiny_tokenizer(WORDS)
    model = tiny_model(tokenizer, seed=seed, hidden=16, layers=1)
    # Far from uniform, so that models differ.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return Language(model.to(dtype), tokenizer)


def pairs(count=8, seed=0, margins=1):
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        completions = tuple(" ".join(rng.choice(WORDS[:6], size=rng.integers(1, 5))) for _ in range(2))
        columns = {"margins": tuple(tuple(rng.normal(size=margins)) for _ in range(2))} if margins else {}
        found.append(
            Example(
                prompt=f"{rng.choice(WORDS[:6])} ? ",
                completions=completions,
                scores=(1.0, 0.0),
                kind="pair",
                columns=columns,
                where=f"pairs.jsonl:{index + 1}",
            )
        )
    return found


def samples(of, examples, objective):
    return referenced(of.model, prepare(examples, of.tokenizer, max_length=64, objective=objective)[0])


def logps(values):
    """One token per completion."""
    count = len(values)
    return Logps(
        values, torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    )


def batch(count, margins=None, flip=False):
    columns = {} if margins is None else {"margins": margins}
    score = torch.tensor([0.0, 1.0] if flip else [1.0, 0.0]).repeat(count)
    return Batch(torch.arange(count).repeat_interleave(2), score, columns)


def drawn(count=16, margins=1, seed=0):
    """Policy, reference and margins of pairs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 2 * count, generator=generator, dtype=torch.float64)
    given = torch.randn(2 * count, margins, generator=generator, dtype=torch.float64)
    return policy, reference, given


TWO = {"better": 0.3, "safer": 0.7}


# the loss


@pytest.mark.parametrize("junk", [torch.randn(32, 1), torch.full((32, 1), math.nan), None], ids=["any", "nan", "none"])
def test_all_weight_on_the_trained_objective_is_dpo_whatever_the_margins_are(junk):
    policy, reference, _ = drawn()
    results = []
    for objective in (MODPO({"better": 1.0, "safer": 0.0}, "better", beta=0.2), DPO(beta=0.2)):
        own = policy.clone().requires_grad_()
        output = objective(logps(own), logps(reference), batch(16, junk))
        output.loss.backward()
        results.append((output.losses.detach(), own.grad, output.metrics))
    (losses, grad, metrics), (expected, expected_grad, expected_metrics) = results
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_loss_rewards_and_metrics_are_those_of_the_formula(loss_type):
    policy, reference, margins = drawn(margins=2)
    weights = {"better": 0.5, "a": 0.2, "b": 0.3}
    output = MODPO(weights, "better", beta=0.4, loss_type=loss_type)(
        logps(policy), logps(reference), batch(16, margins)
    )
    reward = [
        (0.4 * float(policy[i] - reference[i]) - 0.2 * float(margins[i, 0]) - 0.3 * float(margins[i, 1])) / 0.5
        for i in range(32)
    ]
    logits = [reward[i] - reward[i + 1] for i in range(0, 32, 2)]
    expected = [math.log1p(math.exp(-x)) if loss_type == "sigmoid" else max(0.0, 1 - x) for x in logits]
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert output.metrics["rewards/chosen"] == pytest.approx(np.mean(reward[::2]))
    assert output.metrics["rewards/margins"] == pytest.approx(np.mean(logits))
    assert output.metrics["saturated"] == np.mean([1 / (1 + math.exp(x)) < 0.01 for x in logits])


def test_equal_margins_of_both_completions_leave_dpo_with_beta_over_the_weight():
    policy, reference, _ = drawn()
    equal = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)
    objective = MODPO(TWO, "better", beta=0.2)
    assert objective.dpo_beta == 0.2 / 0.3
    losses = objective(logps(policy), logps(reference), batch(16, equal)).losses
    torch.testing.assert_close(losses, DPO(0.2 / 0.3)(logps(policy), logps(reference), batch(16)).losses)


def test_dpo_whose_reference_is_tilted_by_the_margins_is_modpo():
    policy, reference, margins = drawn()
    objective = MODPO(TWO, "better", beta=0.2)
    tilted = reference + 0.7 * margins[:, 0] / 0.2
    torch.testing.assert_close(
        objective(logps(policy), logps(reference), batch(16, margins)).losses,
        DPO(objective.dpo_beta)(logps(policy), logps(tilted), batch(16)).losses,
    )


def test_a_margin_may_be_shifted_per_prompt_and_its_scale_is_that_of_its_weight():
    policy, reference, margins = drawn()

    def losses(given, weights=TWO, beta=0.2):
        return MODPO(weights, "better", beta, normalize=True)(logps(policy), logps(reference), batch(16, given)).losses

    shift = torch.arange(16.0, dtype=torch.float64).repeat_interleave(2)[:, None]
    torch.testing.assert_close(losses(margins + shift), losses(margins))
    # Weights are normalised: (0.3, 0.7 c) / total with beta / total has the same ratios w_j / w_k and beta / w_k.
    total = 0.3 + 0.7 * 3
    scaled = losses(margins, {"better": 0.3, "safer": 0.7 * 3}, beta=0.2 / total)
    torch.testing.assert_close(losses(3 * margins), scaled)


def test_the_order_of_weights_and_columns_does_not_matter():
    policy, reference, margins = drawn(margins=2)
    first = MODPO({"c": 0.5, "a": 0.2, "b": 0.3}, "c")
    second = MODPO({"b": 0.3, "c": 0.5, "a": 0.2}, "c")
    renamed = MODPO({"c": 0.5, "b": 0.2, "a": 0.3}, "c")  # columns are alphabetical, so they change places
    assert first.others == second.others == ("a", "b")
    given = logps(policy), logps(reference)
    torch.testing.assert_close(
        first(*given, batch(16, margins)).losses, second(*given, batch(16, margins)).losses, rtol=0, atol=0
    )
    torch.testing.assert_close(
        first(*given, batch(16, margins)).losses, renamed(*given, batch(16, margins.flip(1))).losses
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_gradient_by_finite_differences(loss_type):
    policy, reference, margins = drawn(4)
    objective = MODPO(TWO, "better", beta=0.5, loss_type=loss_type)
    assert torch.autograd.gradcheck(
        lambda own: objective(logps(own), logps(reference), batch(4, margins)).losses, policy.clone().requires_grad_()
    )


def test_gradient_of_a_models_parameters_by_finite_differences():
    tiny = language(dtype=torch.float64)
    objective = MODPO(TWO, "better", beta=0.5)
    rows = samples(language(1, torch.float64), pairs(4), objective)
    parameter = tiny.model.lm_head.weight
    loss = objective_output(tiny.model, objective, rows).loss
    (grad,) = torch.autograd.grad(loss, parameter)
    for place in ((3, 0), (5, 7)):
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter[place] += step
                values.append(float(objective_output(tiny.model, objective, rows).loss))
            parameter[place] += 1e-6
        assert float(grad[place]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_margins_stay_finite(size):
    policy, reference, _ = drawn()
    margins = torch.tensor([[size], [-size]]).repeat(16, 1)
    own = policy.float().requires_grad_()
    output = MODPO(TWO, "better")(logps(own), logps(reference.float()), batch(16, margins))
    output.loss.backward()
    assert bool(output.losses.isfinite().all())
    assert bool(own.grad.isfinite().all())
    assert output.losses.dtype == torch.float32
    assert output.metrics["saturated"] == (size < 0)


def test_numbers_do_for_a_single_margin_and_integers_too():
    policy, reference, _ = drawn()
    ints = torch.tensor([1, -1]).repeat(16)
    objective = MODPO(TWO, "better")
    a = objective(logps(policy), logps(reference), batch(16, ints)).losses
    b = objective(logps(policy), logps(reference), batch(16, ints[:, None].double())).losses
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weights": {"better": 0.0, "safer": 1.0}}, "weight 0"),
        ({"weights": {"better": 1.5, "safer": -0.5}}, "-0.5"),
        ({"weights": {"better": 0.5, "safer": 0.4}}, "0.9"),
        ({"weights": {"better": math.nan, "safer": 0.4}}, "nan"),
        ({"weights": {"safer": 1.0}}, "better"),
        ({"weights": {"better": 0.0}, "normalize": True}, "0"),
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "ipo"}, "ipo"),
    ],
)
def test_bad_weights_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        MODPO(**{"weights": TWO, "trained": "better", **arguments})


def test_weights_that_do_not_sum_to_one_can_be_normalised():
    assert MODPO({"better": 3, "safer": 1}, "better", normalize=True) == MODPO(
        {"better": 0.75, "safer": 0.25}, "better"
    )


def test_bad_margins_are_refused_naming_the_row():
    policy, reference, margins = drawn(2)
    objective = MODPO(TWO, "better")
    with pytest.raises(UserError, match="margins"):
        objective(logps(policy), logps(reference), batch(2))
    with pytest.raises(UserError, match=r"expected a column for each of safer: \(4, 1\)"):
        objective(logps(policy), logps(reference), batch(2, margins.repeat(1, 2)))
    margins[3] = math.nan
    named = Batch(
        *[getattr(batch(2), name) for name in ("group", "score")], {"margins": margins}, ["a.jsonl:1", "a.jsonl:2"]
    )
    with pytest.raises(UserError, match=r"a.jsonl:2: .*nan"):
        objective(logps(policy), logps(reference), named)


# the optimum


class Categorical:
    """One prompt, 32 answers, exact Bradley-Terry probabilities in place of labels."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.start = torch.randn(32, generator=generator, dtype=torch.float64).log_softmax(0)
        self.rewards = torch.randn(2, 32, generator=generator, dtype=torch.float64)
        self.first, self.second = torch.tensor(list(itertools.combinations(range(32), 2))).T
        self.places = torch.stack([self.first, self.second], 1).flatten()

    def loss(self, policy, objective, labels, columns):
        """Both orders of each pair, each as probable as the Bradley-Terry model says."""
        likely = torch.sigmoid(labels[self.first] - labels[self.second])
        count = len(self.first)
        given = logps(policy[self.places]), logps(self.start[self.places])
        known = {name: value[self.places] for name, value in columns.items()}
        plain, swapped = (
            objective(*given, Batch(own.group, own.score, known)).losses
            for own in (batch(count), batch(count, flip=True))
        )
        return (likely * plain + (1 - likely) * swapped).mean()

    def minimise(self, loss):
        logits = self.start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            value = loss(logits.log_softmax(0))
            value.backward()
            return value

        optimizer.step(closure)
        return logits.detach().log_softmax(0)

    def optimum(self, share, beta=0.5):
        return (self.start + (share * self.rewards[0] + (1 - share) * self.rewards[1]) / beta).log_softmax(0)


def distance(a, b):
    return float((a.exp() - b.exp()).abs().sum() / 2)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_its_optimum_is_that_of_multi_objective_reinforcement_learning(share):
    world = Categorical()
    objective = MODPO({"k": share, "j": 1 - share}, "k", beta=0.5)
    margins = {"margins": world.rewards[1][:, None]}
    found = world.minimise(lambda policy: world.loss(policy, objective, world.rewards[0], margins))
    assert distance(found, world.optimum(share)) < 1e-6


def test_loss_weighting_has_another_optimum_and_log_linear_soups_the_same():
    world = Categorical()
    single = [world.minimise(lambda p, r=r: world.loss(p, DPO(0.5), r, {})) for r in world.rewards]
    for share in (0.25, 0.5, 0.75):

        def weighted(policy, share=share):
            return sum(
                world.loss(policy, WeightedDPO(0.5), r, {"weight": torch.full((32,), w, dtype=torch.float64)})
                for r, w in zip(world.rewards, (share, 1 - share), strict=True)
            )

        assert distance(world.minimise(weighted), world.optimum(share)) > 0.003
        mixed = (share * single[0] + (1 - share) * single[1]).log_softmax(0)
        assert distance(mixed, world.optimum(share)) < 1e-6


def test_mixed_pairs_weigh_as_much_as_their_objective():
    tiny, start = language(), language(1)
    data = {
        "a": samples(start, pairs(6, 1), None),
        "b": samples(start, pairs(3, 2), None),
        "c": samples(start, pairs(2, 3), None),
    }
    mixed = mix_for_weighting(data, {"b": 0.25, "a": 0.75, "c": 0.0})
    assert len(mixed) == 9
    loss = objective_output(tiny.model, WeightedDPO(0.2), mixed).loss.item()
    parts = {name: objective_output(tiny.model, DPO(0.2), own).loss.item() for name, own in data.items()}
    assert loss == pytest.approx(0.75 * parts["a"] + 0.25 * parts["b"], rel=1e-5)
    with pytest.raises(ValueError, match="same objectives"):
        mix_for_weighting(data, {"a": 1.0})


# margins


def plain_logp(model, tokenizer, example, index):
    """Sum over the completion, by the model's own forward and nothing of ours."""
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = [*tokenizer(example.prompt + example.completions[index])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))


def gpt2(seed):
    tokenizer = tiny_tokenizer(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
        )
        return Language(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.mark.parametrize("make", [language, gpt2])
def test_an_implicit_reward_is_that_of_plain_forwards(make):
    policy, start, examples = make(0), make(1), pairs(5)
    reward = implicit_reward(policy, reference=start.model, beta=0.3)
    for example, values in zip(examples, reward.scores(examples), strict=True):
        for index, value in enumerate(values):
            ours = plain_logp(policy.model, policy.tokenizer, example, index)
            theirs = plain_logp(start.model, policy.tokenizer, example, index)
            assert value == pytest.approx(0.3 * (ours - theirs), abs=1e-4)
            assert reward(example.prompt, example.completions[index]) == pytest.approx(value, abs=1e-5)


def adapted():
    """A peft model with two adapters that do something; "policy" is the one in training."""
    tiny = language()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(tiny.model, config, adapter_name="policy")
        model.add_adapter("safer", config)
    model.set_adapter("policy")
    return Language(model, tiny.tokenizer)


def test_an_adapters_reward_leaves_the_trained_adapter_alone():
    both, examples = adapted(), pairs(4)
    merged = copy.deepcopy(both.model)
    merged.set_adapter("safer")
    merged = merged.merge_and_unload()
    base = language().model
    before = copy.deepcopy(both.model.state_dict())
    flags = {name: p.requires_grad for name, p in both.model.named_parameters()}
    both.model.train()
    both.model(torch.tensor([[1, 3, 4]])).logits.sum().backward()
    grads = {name: p.grad.clone() for name, p in both.model.named_parameters() if p.grad is not None}
    assert grads
    assert all("policy" in name for name in grads)

    for reference in ("base", base):
        values = implicit_reward(both, adapter="safer", reference=reference, beta=0.5).scores(examples)
        for example, own in zip(examples, values, strict=True):
            for index, value in enumerate(own):
                expected = 0.5 * (
                    plain_logp(merged, both.tokenizer, example, index)
                    - plain_logp(base, both.tokenizer, example, index)
                )
                assert value == pytest.approx(expected, abs=1e-4)
    assert max(abs(v) for own in values for v in own) > 0.01
    relative = implicit_reward(both, adapter="safer", reference="policy").of_groups([Group((1,), ((3, 2),))])
    assert relative.requires_grad is False

    assert both.model.training
    assert both.model.active_adapter == "policy"
    assert both.model.active_adapters == ["policy"]
    assert {name: p.requires_grad for name, p in both.model.named_parameters()} == flags
    assert all(torch.equal(value, before[name]) for name, value in both.model.state_dict().items())
    after = {name: p.grad for name, p in both.model.named_parameters() if p.grad is not None}
    assert after.keys() == grads.keys()
    assert all(torch.equal(after[name], grads[name]) for name in grads)


def test_training_one_adapter_against_the_margin_of_another_moves_only_the_first():
    both = adapted()
    marked = add_margins(pairs(8, margins=0), {"safer": implicit_reward(both, adapter="safer")})
    objective = MODPO(TWO, "better")
    rows = prepare(marked, both.tokenizer, max_length=64, objective=objective)[0]
    with both.model.disable_adapter():
        rows = referenced(both.model, rows)
        with pytest.raises(ValueError, match="switched off"):
            implicit_reward(both, adapter="safer").scores(marked)
    before = copy.deepcopy(both.model.state_dict())
    optimise(both.model, objective, rows, steps=3, batch=4, learning_rate=1e-2, rng=np.random.default_rng(0))
    for name, value in both.model.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora" not in name or "safer" in name), name
    assert all(p.grad is None for name, p in both.model.named_parameters() if "safer" in name)


def test_an_implicit_reward_needs_adapters_that_are_there():
    plain, both = language(), adapted()
    with pytest.raises(ValueError, match="no adapters"):
        implicit_reward(plain)
    with pytest.raises(ValueError, match=r"'kinder'.*policy, safer"):
        implicit_reward(both, adapter="kinder")
    with pytest.raises(ValueError, match="'kinder'"):
        implicit_reward(both, reference="kinder")
    with pytest.raises(ValueError, match="beta"):
        implicit_reward(both, beta=-1)


def test_a_classifier_scores_like_its_own_forward_row_by_row():
    tiny = language()
    config = LlamaConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).train()
    examples = pairs(5)
    values = ClassifierReward(model, tiny.tokenizer, batch_size=3).scores(examples)
    assert model.training
    model.eval()
    for example, own in zip(examples, values, strict=True):
        for text, value in zip(example.completions, own, strict=True):
            ids = [*tiny.tokenizer(example.prompt + text)["input_ids"], 2]
            with torch.no_grad():
                assert value == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-5)
    config.num_labels = 3
    with pytest.raises(ValueError, match="3 outputs"):
        ClassifierReward(LlamaForSequenceClassification(config), tiny.tokenizer)


def brevity(prompt, completion):
    return -0.5 * len(completion.split())


def test_margins_are_kept_with_the_data_and_read_back(tmp_path):
    examples = pairs(6, margins=0)
    marked = add_margins(examples, {"short": brevity, "blue": lambda prompt, text: text.split().count("blue")})
    assert "margins" not in examples[0].columns
    for example in marked:
        expected = tuple((float(text.split().count("blue")), brevity("", text)) for text in example.completions)
        assert example.columns["margins"] == expected
    write(marked, tmp_path / "marked.jsonl")
    again = list(read(tmp_path / "marked.jsonl"))
    weights = {"better": 0.5, "short": 0.2, "blue": 0.3}
    tiny, objective = language(), MODPO(weights, "better")
    a, b = (
        objective_output(language(1).model, objective, samples(tiny, own, objective)).losses for own in (marked, again)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    row = json.loads((tmp_path / "marked.jsonl").read_text().splitlines()[0])
    assert np.array(row["margins"]).shape == (2, 2)


def test_rules_see_chat_messages_as_they_are():
    example = Example(
        prompt=[{"role": "user", "content": "red"}],
        completions=([{"role": "assistant", "content": "one two"}], [{"role": "assistant", "content": "one"}]),
        scores=(1.0, 0.0),
        kind="pair",
    )
    marked = add_margins([example], {"short": lambda prompt, text: float(len(text[0]["content"].split()))})
    assert marked[0].columns["margins"] == ((2.0,), (1.0,))


def test_bad_margins_never_reach_the_data():
    with pytest.raises(UserError, match=r"pairs.jsonl:1: the margin short"):
        add_margins(pairs(1), {"short": lambda prompt, text: math.nan})
    with pytest.raises(ValueError, match="no margins"):
        add_margins(pairs(1), {})
    with pytest.raises(ValueError, match="'long'"):
        add_margins(pairs(1), {"short": brevity}, calibrate={"long": pairs(2)})


def labelled(reward, scale, count, seed=0):
    """Pairs whose labels follow the Bradley-Terry model at a scale."""
    rng, found = np.random.default_rng(seed), []
    for example in pairs(count, seed):
        gap = reward(example.prompt, example.completions[0]) - reward(example.prompt, example.completions[1])
        if rng.random() > 1 / (1 + math.exp(-scale * gap)):
            example = Example(
                prompt=example.prompt, completions=example.completions[::-1], scores=(1.0, 0.0), kind="pair"
            )
        found.append(example)
    return found


def test_the_scale_of_a_margin_is_that_of_logistic_regression(caplog):
    from sklearn.linear_model import LogisticRegression

    own = labelled(brevity, 1.7, 300)
    scale = bradley_terry_scale(brevity, own)
    gaps = np.array([brevity("", e.completions[0]) - brevity("", e.completions[1]) for e in own])
    # Both signs of every gap, so that there are two classes and no intercept is needed.
    model = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10)
    model.fit(np.concatenate([gaps, -gaps])[:, None], np.repeat([1, 0], len(gaps)))
    assert scale == pytest.approx(float(model.coef_[0, 0]), rel=1e-4)
    assert scale == pytest.approx(1.7, abs=0.7)
    with caplog.at_level(logging.INFO, "counterproof.preference.modpo"):
        marked = add_margins(pairs(3), {"short": brevity}, calibrate={"short": own})
    assert f"{scale:.6g}" in caplog.text
    plain = add_margins(pairs(3), {"short": brevity})
    np.testing.assert_allclose(
        [e.columns["margins"] for e in marked], scale * np.array([e.columns["margins"] for e in plain])
    )


def test_a_scale_that_does_not_exist_is_refused():
    sure = [e for e in labelled(brevity, 100.0, 40) if len(e.completions[0].split()) < len(e.completions[1].split())]
    with pytest.raises(ValueError, match="every larger scale"):
        bradley_terry_scale(brevity, sure)
    with pytest.raises(ValueError, match="no higher for chosen"):
        bradley_terry_scale(lambda prompt, text: -brevity(prompt, text), sure)
    single = Example(prompt="red", completions=("one",), scores=(1.0,), kind="completion")
    with pytest.raises(ValueError, match="completion"):
        bradley_terry_scale(brevity, [single])


# in TRL


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_in_trl_the_loss_is_the_same(loss_type, tmp_path):
    import datasets
    from trl import DPOConfig

    policy, start, examples = language(0), language(1), pairs(4, margins=2)
    objective = MODPO({"better": 0.4, "a": 0.5, "b": 0.1}, "better", beta=0.3, loss_type=loss_type)
    rows = [
        {"prompt": e.prompt, "chosen": e.completions[0], "rejected": e.completions[1], "margins": e.columns["margins"]}
        for e in examples
    ]
    config = partial(
        DPOConfig,
        output_dir=str(tmp_path),
        beta=objective.dpo_beta,
        loss_type=[loss_type],
        precompute_ref_log_probs=True,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        max_steps=1,
        disable_tqdm=True,
    )
    trainer = modpo_trl_trainer(objective)
    made = trainer(
        copy.deepcopy(policy.model),
        start.model,
        config(),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    inputs = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(4)]))
    theirs = made.compute_loss(made.model, inputs).item()
    ours = objective_output(policy.model, objective, samples(start, examples, objective)).loss.item()
    assert ours == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(ValueError, match=r"beta=0.7499"):
        trainer(policy.model, start.model, config(beta=0.1), train_dataset=datasets.Dataset.from_list(rows))


# baselines


def test_a_soup_is_the_mean_of_the_parameters_and_leaves_its_ingredients():
    a, b = language(0).model, language(1).model
    before = copy.deepcopy(a.state_dict())
    mixed = soup([a, b], [0.25, 0.75])
    for name, value in mixed.state_dict().items():
        torch.testing.assert_close(value, 0.25 * a.state_dict()[name] + 0.75 * b.state_dict()[name])
        assert value.dtype == before[name].dtype
    assert all(torch.equal(value, before[name]) for name, value in a.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(soup([a, b], [0, 1]).parameters(), b.parameters(), strict=True))


def test_only_models_of_one_make_are_mixed():
    small = language().model
    with pytest.raises(ValueError, match="same make"):
        soup([small, tiny_model(tiny_tokenizer(WORDS), seed=0, hidden=32, layers=1)], [0.5, 0.5])
    for order in ((0, 1), (1, 0)):
        models = [small, tiny_model(tiny_tokenizer(WORDS), seed=0, hidden=16, layers=2)]
        with pytest.raises(ValueError, match="same make"):
            soup([models[i] for i in order], [0.5, 0.5])
    with pytest.raises(ValueError, match="2 weights for 1"):
        soup([small], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"1\.2"):
        soup([small, small], [0.6, 0.6])


def test_a_soup_of_adapters_is_the_soup_of_the_merged_models():
    both = adapted()
    merged = []
    for name in ("policy", "safer"):
        one = copy.deepcopy(both.model)
        one.set_adapter(name)
        merged.append(one.merge_and_unload())
    flags = {name: p.requires_grad for name, p in both.model.named_parameters()}
    adapter_soup(both.model, {"policy": 0.3, "safer": 0.7})
    assert both.model.active_adapter == "policy"
    assert {n: p.requires_grad for n, p in both.model.named_parameters() if n in flags} == flags
    both.model.set_adapter("soup")
    ids = torch.tensor([[1, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(both.model(ids).logits, soup(merged, [0.3, 0.7])(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="already"):
        adapter_soup(both.model, {"policy": 0.3, "safer": 0.7})
    with pytest.raises(ValueError, match="'kinder'"):
        adapter_soup(both.model, {"policy": 0.3, "kinder": 0.7}, "other")


def test_best_of_n_takes_the_best():
    tiny = language()
    rewards = {"short": brevity, "blue": lambda prompt, text: float(text.split().count("blue"))}
    prompts = ["red ? ", "one ? "]
    few = best_of_n(tiny, prompts, rewards, {"short": 0.5, "blue": 0.5}, n=1, max_new_tokens=6)
    many = best_of_n(tiny, prompts, rewards, {"short": 0.5, "blue": 0.5}, n=12, max_new_tokens=6)
    for prompt, a, b in zip(prompts, few, many, strict=True):
        assert sum(r(prompt, b) for r in rewards.values()) >= sum(r(prompt, a) for r in rewards.values())
    with pytest.raises(ValueError, match="expected the same"):
        best_of_n(tiny, prompts, rewards, {"short": 1.0})


# policies and fronts


def fit(model, objective, rows):
    optimise(model, objective, rows, steps=4, batch=4, learning_rate=1e-2, rng=np.random.default_rng(0))


def test_policies_for_any_weights_start_afresh_and_leave_the_start_alone():
    tiny, examples = language(), pairs(8)
    rows = prepare(examples, tiny.tokenizer, max_length=64, objective=MODPO())[0]
    data = {"a": rows, "b": rows[::-1]}
    before = copy.deepcopy(tiny.model.state_dict())
    for policies in (
        modpo_policies(tiny, rows, trained="a", fit=fit),
        loss_weighting_policies(tiny, data, fit=fit),
        soup_policies(tiny, data, fit=fit),
    ):
        first, other, again = (policies({"a": w, "b": 1 - w}).model.state_dict() for w in (0.75, 0.25, 0.75))
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    # With all weight on one objective, all of them are DPO on it.
    dpo = copy.deepcopy(tiny.model)
    fit(dpo, DPO(0.1), referenced(tiny.model, rows))
    for policies in (
        modpo_policies(tiny, rows, trained="a", fit=fit),
        loss_weighting_policies(tiny, data, fit=fit),
        soup_policies(tiny, data, fit=fit),
    ):
        for x, y in zip(policies({"a": 1.0, "b": 0.0}).model.parameters(), dpo.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="same objectives"):
        soup_policies(tiny, data, fit=fit)({"a": 1.0})


def test_the_grid_of_weights():
    assert simplex_grid(2, 5) == [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1, 0)]
    assert len(simplex_grid(3, 5)) == math.comb(6, 2)
    assert len(set(simplex_grid(3, 5))) == 15
    assert simplex_grid(3, 4, interior=True) == [(1 / 3, 1 / 3, 1 / 3)]
    assert simplex_grid(1, 2) == [(1.0,)]
    assert all(sum(vector) == pytest.approx(1) for vector in simplex_grid(4, 6))
    with pytest.raises(ValueError, match="1 points"):
        simplex_grid(2, 1)


def inclusion_exclusion(points, reference):
    """The volume of a union of boxes, from those of all intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            sides = np.maximum(np.min(chosen, axis=0) - reference, 0)
            total += (-1) ** (size + 1) * sides.prod()
    return total


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_is_that_of_inclusion_and_exclusion(dimensions, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(6, dimensions)).round(1)  # rounded, so that there are ties
    reference = np.full(dimensions, -0.7)
    volume = hypervolume(points, reference)
    assert volume == pytest.approx(inclusion_exclusion(points, reference))
    dominated = points - rng.random(points.shape)
    assert hypervolume(np.concatenate([points, dominated, [reference]]), reference) == pytest.approx(volume)
    assert hypervolume(points[::-1], reference) == pytest.approx(volume)


def test_hypervolume_by_hand_and_of_nothing():
    assert hypervolume([(2, 1), (1, 3)], (0, 0)) == 4  # 2 x 1 and 1 x 2 on top of it
    assert hypervolume([], (0, 0)) == 0
    assert hypervolume([(1, -1)], (0, 0)) == 0
    with pytest.raises(ValueError, match="finite"):
        hypervolume([(math.nan, 1)], (0, 0))
    with pytest.raises(ValueError, match="3 coordinates"):
        hypervolume([(1, 1)], (0, 0, 0))


def test_a_sweep_measures_every_policy_against_the_reference(tmp_path):
    tiny = language()
    rewards = {"short": brevity, "blue": lambda prompt, text: float(text.split().count("blue"))}
    other = language(1)
    front = pareto_sweep(
        lambda weights: other,
        ["red ? ", "one ? "],
        rewards,
        weights=simplex_grid(2, 3),
        reference=tiny.model,
        baselines={"start <&>": lambda weights: tiny},
        samples=8,
        max_new_tokens=6,
    )
    assert front.arms() == ("modpo", "start <&>")
    assert [tuple(p.weights.values()) for p in front.points] == simplex_grid(2, 3) * 2
    assert all(p.kl == pytest.approx(0, abs=1e-6) for p in front.points[3:])
    assert all(p.kl > 0.1 for p in front.points[:3])
    # Points of one arm are the same policy with the same noise.
    assert len({tuple(p.rewards.values()) for p in front.points[:3]}) == 1
    assert front.rows()[0].keys() == {
        "arm",
        "kl",
        "length",
        "weight short",
        "weight blue",
        "reward short",
        "reward blue",
    }
    worst = {"blue": -1.0, "short": -4.0}
    point = front.points[0].rewards
    assert front.hypervolume(worst, "modpo") == pytest.approx((point["short"] + 4) * (point["blue"] + 1))
    assert front.hypervolume((-4.0, -1.0)) >= front.hypervolume(worst, "modpo")
    front.plot(tmp_path / "front.svg")
    drawn = (tmp_path / "front.svg").read_text()
    from xml.etree import ElementTree

    marks = [e for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("circle")]
    assert len(marks) == 6
    with pytest.raises(UserError, match=r"\.svg"):
        front.plot(tmp_path / "front.png")
    with pytest.raises(ValueError, match="'kind'"):
        front.plot(tmp_path / "front.svg", "kind")
    with pytest.raises(ValueError, match="no points"):
        front.hypervolume(worst, "ppo")


def test_undominated_points():
    def point(arm, a, b):
        return FrontPoint(arm, {"a": 1.0, "b": 0.0}, {"a": a, "b": b}, 0.0, 1.0)

    front = Front((point("x", 1, 1), point("x", 0, 2), point("y", 2, 0), point("y", 1, 0), point("y", 1, 1)))
    assert [(p.arm, *p.rewards.values()) for p in front.undominated()] == [
        ("x", 1, 1), ("x", 0, 2), ("y", 2, 0), ("y", 1, 1)
    ]  # fmt: skip
    assert [tuple(p.rewards.values()) for p in front.undominated("y")] == [(2, 0), (1, 1)]


def test_a_sweep_takes_chat_prompts_and_model_rewards():
    tiny = language()
    tiny.tokenizer.chat_template = CHAT
    judge = implicit_reward(language(1), reference=tiny.model, beta=1.0)
    judge.language.tokenizer.chat_template = CHAT
    prompts = [[{"role": "user", "content": "red ?"}]]
    front = pareto_sweep(
        lambda weights: tiny,
        prompts,
        {"judge": judge, "short": brevity},
        weights=[(0.5, 0.5)],
        reference=tiny.model,
        samples=4,
        max_new_tokens=5,
    )
    assert math.isfinite(front.points[0].rewards["judge"])
    with pytest.raises(ValueError, match="3"):
        pareto_sweep(lambda w: tiny, prompts, {"short": brevity}, weights=[(1, 0, 0)], reference=tiny.model)
    with pytest.raises(ValueError, match="two arms"):
        pareto_sweep(
            lambda w: tiny, prompts, {"short": brevity}, weights=[(1,)], reference=tiny.model, baselines={"modpo": None}
        )


def test_trained_policies_charge_for_length_by_its_weight():
    """Random labels, a margin of -1 a word: beta log pi / pi_0 must fall by about the margin's weight a word."""
    tiny = language()
    examples = add_margins(pairs(256, margins=0), {"short": lambda prompt, text: -1.0 * len(text.split())})
    rows = prepare(examples, tiny.tokenizer, max_length=64, objective=MODPO())[0]

    def longer(model, objective, samples):
        rng = np.random.default_rng(0)
        optimise(model, objective, samples, steps=60, batch=32, learning_rate=3e-3, rng=rng)

    policies = modpo_policies(tiny, rows, trained="better", fit=longer, beta=0.5)
    prices = []
    for share in (0.2, 0.8):
        reward = implicit_reward(policies({"better": 1 - share, "short": share}), reference=tiny.model, beta=0.5)
        values = [value for own in reward.scores(examples) for value in own]
        words = [len(text.split()) for example in examples for text in example.completions]
        prices.append(-np.polyfit(words, values, 1)[0])
    assert 0.05 < prices[0] < 0.4
    assert 0.5 < prices[1] < 1.1


# the world of the claims


def test_the_claims_measure_of_a_front_is_the_hypervolume():
    from counterproof.preference.claims.modpo import area

    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(5, 2))
        assert area([tuple(p) for p in points], (-0.5, -0.6)) == pytest.approx(hypervolume(points, (-0.5, -0.6)))


def test_the_claims_optimum_is_the_closed_form_of_normal_rewards():
    """log E exp of a standard normal is 1/2; 100 samples alone are low by (e - 1) / 200."""
    from counterproof.preference.claims.modpo import optimum

    values = np.random.default_rng(0).normal(size=(20_000, 100))
    plain = np.log(np.exp(values).mean(1)).mean()
    assert plain == pytest.approx(0.5 - (math.e - 1) / 200, abs=2e-3)
    assert optimum(values) == pytest.approx(0.5, abs=2.5e-3)


@pytest.mark.parametrize("name", ["RULE", "LEARNED", "LOSS_WEIGHTING", "SOUPS"])
def test_the_task_runs_every_arm(name):
    from counterproof.bench.task import Trial
    from counterproof.preference.claims import modpo as claims

    small = {
        **claims.TWO_REWARDS.budgets["quick"].settings,
        **{"texts": 256, "pretraining": 20, "hidden": 16, "layers": 1, "pairs": 64, "steps": 3, "batch": 8},
        **{"test_prompts": 4, "reference_samples": 8, "test_samples": 4},
    }
    trial = Trial(seed=1000, settings=small)
    metrics = claims.run_two_rewards(getattr(claims, name), trial)
    assert metrics.keys() == claims.TWO_REWARDS.metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    fits = {"RULE": 3, "LEARNED": 4, "LOSS_WEIGHTING": 3, "SOUPS": 2}[name]
    assert metrics["gradient_steps"] == 3 * fits
    assert metrics["regret"] == pytest.approx(np.mean([metrics[f"regret_{n}"] for n in (25, 50, 75)]))
