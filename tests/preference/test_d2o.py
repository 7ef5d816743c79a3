"""D2O: hand-computed values, DPO and TRL as limits, Jensen's inequality, two references; self-samples and cache."""

import json
import math
import sqlite3
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rouge_score import rouge_scorer
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from counterproof.errors import UserError
from counterproof.language import Group, Language, Logps, completion_logps, tokenize
from counterproof.language.tiny import TinyWorld, tiny_model, tiny_tokenizer
from counterproof.preference import d2o as module
from counterproof.preference.d2o import (
    D2O,
    D2OTraining,
    GradientAscent,
    OnlineSamples,
    Unlikelihood,
    self_sample,
    two_references,
)
from counterproof.preference.data import Example, read
from counterproof.preference.forward import objective_output, optimise
from counterproof.preference.objectives import DPO, Batch, Sample
from counterproof.preference.trainer import PreferenceTrainer, TrainSettings, find_method, train

WORLD = TinyWorld()
LENGTHS = [(3, 5, 2, 4), (2, 6), (1, 1, 7)]  # the negative is the second, the first, the last
SCORES = [(0.0, -1.0, 0.0, 0.0), (-1.0, 0.0), (0.0, 0.0, -1.0)]


def groups_of(lengths):
    return [Group((1,), tuple((2,) * n for n in own)) for own in lengths]


def logps(groups, seed):
    draw = torch.Generator().manual_seed(seed)
    count = sum(len(c) for g in groups for c in g.completions)
    return Logps.of(groups, -2 * torch.rand(count, generator=draw, dtype=torch.float64) - 0.05)


def batch_of(groups, scores, **more):
    return Batch.of([Sample(g, s, **more) for g, s in zip(groups, scores, strict=True)])


def ratios_of(groups, scores, policy, reference):
    """Per group the negative's log-ratio and those of the self-samples, in plain Python."""
    ratios = iter((policy.sum() - reference.sum()).tolist())
    found = []
    for own in scores:
        values = [(score, next(ratios)) for score in own]
        found.append((next(d for s, d in values if s == -1), [d for s, d in values if s == 0]))
    return found


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def language(seed=0, context=32):
    """A model in a random start, three times larger than usual, so that two of them differ by nats."""
    tokenizer = WORLD.tokenizer()
    model = tiny_model(tokenizer, seed=seed, context=context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    return Language(model, tokenizer)


def negatives(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(prompt=p, completions=(WORLD.answer(rng, p),), scores=(0.0,), kind="unpaired", where=f"mine.jsonl:{i}")
        for i, p in enumerate(WORLD.prompts(rng, count), 1)
    ]


def draw(spoken, examples, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths differ: a model that knows nothing stops anywhere
        return self_sample(spoken, examples, **{"k": 3, "max_new_tokens": 24, **options})


def tokens(samples):
    return [sample.group for sample in samples]


# the objective


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.3, 0.05), (0.0, 0.2), (0.2, 0.0)])
def test_losses_and_metrics_equal_those_computed_by_hand_whatever_the_number_and_order_of_samples(alpha, beta):
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    output = D2O(alpha, beta)(policy, reference, batch_of(groups, SCORES))
    known = ratios_of(groups, SCORES, policy, reference)
    margins = [beta * np.mean(samples) - alpha * bad for bad, samples in known]
    np.testing.assert_allclose(output.losses.tolist(), [softplus(-m) for m in margins], rtol=1e-12)
    assert output.metrics["rewards/margins"] == pytest.approx(np.mean(margins))
    assert output.metrics["rewards/chosen"] == pytest.approx(beta * np.mean([np.mean(s) for _, s in known]))
    assert output.metrics["rewards/rejected"] == pytest.approx(alpha * np.mean([bad for bad, _ in known]))
    assert output.metrics["rewards/accuracies"] == pytest.approx(np.mean([m > 0 for m in margins]))
    assert output.metrics["self_samples/log_ratio"] == pytest.approx(np.mean([np.mean(s) for _, s in known]))
    sums = policy.sum().tolist()
    bad = [sums[1], sums[4], sums[8]]
    assert output.metrics["logps/rejected"] == pytest.approx(np.mean(bad))


def test_what_is_forgotten_shows_per_token():
    groups = groups_of([(2, 4, 3)])
    reference = logps(groups, 1)
    lost = torch.tensor([3.0] * 2 + [0.5] * 4 + [9.0] * 3, dtype=torch.float64)
    metrics = D2O()(
        reference.with_tokens(reference.token - lost), reference, batch_of(groups, [(0.0, 0.0, -1.0)])
    ).metrics
    assert metrics["self_samples/log_ratio_per_token"] == pytest.approx(-(3 + 0.5) / 2)
    assert metrics["self_samples/forgotten"] == pytest.approx(0.5)
    assert metrics["self_samples/log_ratio"] == pytest.approx(-(6 + 2) / 2)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_where_policy_is_both_references_the_loss_is_log_2(k):
    rows = two_references(language().model, draw(language(), negatives(4), k=k))
    for alpha, beta in ((0.1, 0.1), (3.0, 0.2), (0.0, 1.0)):
        output = objective_output(language().model, D2O(alpha, beta), rows)
        torch.testing.assert_close(output.losses, torch.full((4,), math.log(2)), atol=2e-4, rtol=0)


def test_one_sample_and_equal_weights_are_dpo():
    model = language(1).model
    rows = two_references(language().model, draw(language(), negatives(6), k=1))
    parameters = list(model.parameters())
    found = [objective_output(model, objective, rows).loss for objective in (D2O(0.3, 0.3), DPO(0.3))]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    for mine, other in zip(*(torch.autograd.grad(loss, parameters) for loss in found), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_one_sample_and_equal_weights_are_trls_sigmoid_loss(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rng = np.random.default_rng(0)
    rows = [
        {"prompt": p, "chosen": WORLD.answer(rng, p), "rejected": WORLD.answer(rng, p)} for p in WORLD.prompts(rng, 6)
    ]
    start, policy = language(0), language(1)
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        beta=0.3,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_dropout=True,
    )
    trainer = DPOTrainer(
        policy.model, start.model, arguments, train_dataset=Dataset.from_list(rows), processing_class=start.tokenizer
    )
    theirs, _ = trainer._compute_loss(policy.model, next(iter(trainer.get_train_dataloader())), True)
    samples = [
        Sample(tokenize(start.tokenizer, row["prompt"], [row["chosen"], row["rejected"]]), (0.0, -1.0)) for row in rows
    ]
    ours = objective_output(policy.model, D2O(0.3, 0.3), two_references(start.model, samples)).loss
    assert abs(float(ours.detach()) - math.log(2)) > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    parameters = list(policy.model.parameters())
    for mine, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", [D2O(0.3, 0.2), GradientAscent(), Unlikelihood()], ids=lambda o: o.name)
def test_gradients_equal_finite_differences(objective):
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    batch = batch_of(groups, SCORES)
    assert torch.autograd.gradcheck(
        lambda token: objective(Logps.of(groups, token), reference, batch).loss, policy.token.clone().requires_grad_()
    )


def test_each_weight_alone_pushes_its_own_side_the_right_way():
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    batch = batch_of(groups, SCORES)
    negative = (batch.score == -1)[policy.owner]

    def slope(alpha, beta):
        token = policy.token.clone().requires_grad_()
        loss = D2O(alpha, beta)(Logps.of(groups, token), reference, batch).losses.sum()
        return torch.autograd.grad(loss, token)[0]

    forgetting, anchor = slope(0.2, 0.0), slope(0.0, 0.2)
    assert (forgetting[negative] > 0).all()
    assert (forgetting[~negative] == 0).all()
    assert (anchor[negative] == 0).all()
    assert (anchor[~negative] < 0).all()
    # A distributional weight: every sample of a prompt is pulled by sigmoid(-z) beta / K, whatever its own log-ratio.
    for group, (bad, samples) in enumerate(ratios_of(groups, SCORES, policy, reference)):
        z = 0.1 * np.mean(samples) - 0.1 * bad
        weight = 1 / (1 + math.exp(z)) * 0.1
        of_group = (batch.group == group)[policy.owner]
        both = slope(0.1, 0.1)
        np.testing.assert_allclose(both[of_group & negative], weight, rtol=1e-9)
        np.testing.assert_allclose(both[of_group & ~negative], -weight / len(samples), rtol=1e-9)


def test_order_and_repetition_of_the_samples_change_nothing():
    lengths, scores = (3, 5, 2, 4), (0.0, 0.0, 0.0, -1.0)
    groups = groups_of([lengths])
    policy, reference = logps(groups, 0), logps(groups, 1)
    expected = D2O(0.3, 0.2)(policy, reference, batch_of(groups, [scores])).loss
    parts = [(values.split(list(lengths))) for values in (policy.token, reference.token)]
    for order in ([3, 0, 1, 2], [2, 1, 3, 0], [0, 1, 2, 0, 1, 2, 3], [1, 1, 0, 0, 2, 2, 3]):
        changed = groups_of([tuple(lengths[i] for i in order)])
        now, then = (Logps.of(changed, torch.cat([part[i] for i in order])) for part in parts)
        found = D2O(0.3, 0.2)(now, then, batch_of(changed, [tuple(scores[i] for i in order)])).loss
        torch.testing.assert_close(found, expected)


def test_the_loss_is_at_most_the_mean_of_those_with_single_samples():
    rng = np.random.default_rng(0)
    for _ in range(50):
        beta, alpha = float(rng.uniform(0.01, 2)), float(rng.uniform(0, 2))
        ks = rng.integers(1, 12, size=20).tolist()
        groups, scores = groups_of([(1,) * (k + 1) for k in ks]), [(0.0,) * k + (-1.0,) for k in ks]
        values = torch.from_numpy(rng.normal(scale=8, size=sum(ks) + 20))
        zeros = Logps.of(groups, torch.zeros_like(values))
        whole = D2O(alpha, beta)(Logps.of(groups, values), zeros, batch_of(groups, scores)).losses.tolist()
        own = [part.tolist() for part in values.split([k + 1 for k in ks])]
        single = [[softplus(-(beta * d - alpha * bad)) for d in good] for *good, bad in own]
        assert all(one <= np.mean(each) + 1e-12 for one, each in zip(whole, single, strict=True))
        alike = torch.tensor([d for good in own for d in (*([good[0]] * (len(good) - 1)), good[-1])])
        equal = D2O(alpha, beta)(Logps.of(groups, alike), zeros, batch_of(groups, scores)).losses.tolist()
        np.testing.assert_allclose(equal, [each[0] for each in single], rtol=1e-5)


def test_baselines_equal_their_sums_over_tokens():
    groups = groups_of([(3, 5), (2, 6, 1), (4,)])
    scores = [(1.0, 0.0), (0.3, -0.2, 0.9), (0.0,)]  # a pair, a ranking, a bad single one
    policy = logps(groups, 0)
    batch = batch_of(groups, scores)
    bad = [1, 3, 5]
    torch.testing.assert_close(GradientAscent()(policy, None, batch).losses, policy.sum()[bad])
    found = Unlikelihood()(policy, None, batch).losses.tolist()
    for value, own in zip(found, bad, strict=True):
        rows = policy.token[policy.owner == own]
        assert value == pytest.approx(-sum(math.log(1 - math.exp(p)) for p in rows.tolist()), rel=1e-9)
    certain = policy.with_tokens(torch.zeros_like(policy.token))
    assert bool(Unlikelihood()(certain, None, batch).losses.isfinite().all())
    for objective in (GradientAscent(), Unlikelihood()):
        with pytest.raises(UserError, match=r"a\.jsonl:3: .* good"):
            objective(logps(groups_of([(2,)]), 0), None, batch_of(groups_of([(2,)]), [(1.0,)], where="a.jsonl:3"))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ((1.0, 0.0), "marked good"),
        ((0.0, 1.0, -1.0), "marked good"),
        ((0.0, 0.0), "0 negatives"),
        ((-1.0, -1.0, 0.0), "2 negatives"),
        ((-1.0,), r"0 self-samples"),
    ],
)
def test_groups_that_are_not_one_negative_and_self_samples_are_refused_by_name(scores, message):
    groups = groups_of([(2,) * len(scores)])
    policy = logps(groups, 0)
    with pytest.raises(ValueError, match=rf"a\.jsonl:7: .*{message}"):
        D2O()(policy, policy, batch_of(groups, [scores], where="a.jsonl:7"))
    if "good" not in message:
        with pytest.raises(ValueError, match=r"a\.jsonl:7"):
            two_references(language().model, [Sample(groups[0], scores, where="a.jsonl:7")])


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 0.1), (0.1, math.nan), (math.inf, 0.1), (0, 0)])
def test_weights_out_of_range_are_refused(alpha, beta):
    with pytest.raises(ValueError, match=r"alpha|beta"):
        D2O(alpha, beta)
    with pytest.raises(ValueError, match=r"alpha|beta"):
        D2OTraining(alpha, beta)


# two references


def test_two_references_enter_as_the_formula_says_and_a_missing_one_is_the_start():
    start, other, third = (language(seed).model for seed in range(3))
    policy = language(3).model
    samples = draw(language(), negatives(5), k=3)

    def sums(model):
        with torch.no_grad():
            return completion_logps(model, tokens(samples)).sum().double().view(5, 4)

    def expected(minus, plus):
        s, anchor, bad = sums(policy), sums(minus), sums(plus)
        z = 0.2 * (s - anchor)[:, :3].mean(1) - 0.3 * (s - bad)[:, 3]
        return torch.nn.functional.softplus(-z)

    for minus, plus in ((other, third), (third, other), (other, None), (None, third), (None, None)):
        rows = two_references(start, samples, minus=minus, plus=plus)
        found = objective_output(policy, D2O(0.3, 0.2), rows).losses.double()
        torch.testing.assert_close(found, expected(minus or start, plus or start), atol=1e-4, rtol=1e-4)
    assert all(sample.reference is None for sample in samples)


def test_with_peft_the_missing_reference_is_the_model_without_its_adapters():
    samples = draw(language(), negatives(4), k=2)
    expected = torch.cat([row.reference for row in two_references(language().model, samples)])
    adapted = get_peft_model(language().model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    found = torch.cat([row.reference for row in two_references(adapted, samples)])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert (completion_logps(adapted, tokens(samples)).token - expected).abs().max() > 1e-2


def test_other_architectures_are_scored_and_sampled_too():
    tokenizer = WORLD.tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    spoken = Language(GPT2LMHeadModel(config).eval(), tokenizer)
    rows = two_references(spoken.model, draw(spoken, negatives(3)))
    loss = objective_output(spoken.model, D2O(), rows).loss
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in spoken.model.parameters())


# self-samples


def test_samples_are_the_models_own_distribution():
    """A model of one known distribution: its draws follow it."""
    tokenizer = tiny_tokenizer(["a", "b", "c"])
    model = tiny_model(tokenizer, seed=0)
    examples = [Example(prompt="a ", completions=("c c c",), scores=(0.0,), kind="unpaired", where="x:1")]
    (row,) = draw(Language(model, tokenizer), examples, k=4000, max_new_tokens=1, batch_size=4000)
    with torch.no_grad():
        expected = model(torch.tensor([row.group.prompt])).logits[0, -1].softmax(0).tolist()
    drawn = np.bincount([c[0] for c in row.group.completions[:-1]], minlength=6) / 4000
    np.testing.assert_allclose(drawn, expected, atol=0.035)


def test_rows_are_samples_then_the_negative_and_depend_on_seed_and_prompt_alone():
    spoken = language()
    samples = draw(spoken, negatives(6))
    assert all(sample.scores == (0.0, 0.0, 0.0, -1.0) for sample in samples)
    assert [sample.where for sample in samples] == [f"mine.jsonl:{i}" for i in range(1, 7)]
    for sample, example in zip(samples, negatives(6), strict=True):
        negative = spoken.tokenizer(example.completions[0])["input_ids"][1:]
        assert sample.group.completions[-1] == (*negative, spoken.tokenizer.eos_token_id)
        assert all(len(c) <= 24 for c in sample.group.completions[:-1])
    assert tokens(draw(spoken, negatives(6))) == tokens(samples)
    assert tokens(draw(spoken, negatives(6)[::-1], batch_size=5)) == tokens(samples)[::-1]
    assert tokens(draw(spoken, negatives(6)[2:4])) == tokens(samples)[2:4]
    assert tokens(draw(spoken, negatives(6), seed=1)) != tokens(samples)
    assert len({c for sample in samples for c in sample.group.completions[:-1]}) > 12
    # A model to which all prompts are the same says different things to each of them.
    with torch.no_grad():
        spoken.model.lm_head.weight.zero_()
    deaf = draw(spoken, negatives(6))
    assert len({sample.group.completions[:-1] for sample in deaf}) == 6


def test_only_negatives_are_read(tmp_path):
    rng = np.random.default_rng(0)
    prompts = WORLD.prompts(rng, 4)
    good, bad = ([WORLD.answer(rng, p) for p in prompts] for _ in range(2))
    path = tmp_path / "mine.jsonl"

    def samples_of(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return draw(language(), list(read(path)))

    unpaired = [{"prompt": p, "completion": c, "label": False} for p, c in zip(prompts, bad, strict=True)]
    liked = [{"prompt": p, "completion": c, "label": True} for p, c in zip(prompts, good, strict=True)]
    only = samples_of(unpaired)
    mixed = samples_of([row for both in zip(liked, unpaired, strict=True) for row in both])
    assert (only.report.ignored, mixed.report.ignored) == (0, 4)
    assert tokens(only) == tokens(mixed)
    assert [sample.where for sample in mixed] == [f"{path}:{i}" for i in (2, 4, 6, 8)]
    paired = [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in zip(prompts, good, bad, strict=True)]
    garbage = [{**row, "chosen": "damn fool " * 5} for row in paired]
    ranked = [
        {"prompt": p, "completions": [g, b], "scores": [3, 1]} for p, g, b in zip(prompts, good, bad, strict=True)
    ]
    model = language(1).model
    losses = []
    for rows in (paired, garbage, ranked):
        assert tokens(samples_of(rows)) == tokens(only)
        losses.append(objective_output(model, D2O(), two_references(language().model, samples_of(rows))).losses)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    with pytest.raises(UserError, match="no negative"):
        samples_of(liked)


def test_likeness_is_rouge_l_of_the_tokens():
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (tuple(rng.integers(4, size=rng.integers(0, 9)).tolist()) for _ in range(2))
        if a or b:
            texts = [" ".join(f"w{token}" for token in own) for own in (a, b)]
            assert module._likeness(a, b) == pytest.approx(scorer.score(*texts)["rougeL"].fmeasure)
    assert module._likeness((), ()) == module._likeness((1, 2), (1, 2)) == 1


def parrot(word):
    """A language that says one word, and nothing else, for certain."""
    tokenizer = tiny_tokenizer(["a", "b", "c"])
    model = tiny_model(tokenizer, seed=0)
    ids = tokenizer.convert_tokens_to_ids([word, "</s>"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 1  # says the word, unless it has just said it
        model.model.embed_tokens.weight[ids[0], 0] = -1
        model.lm_head.weight[ids[0], 0], model.lm_head.weight[ids[1], 0] = 50, -50
    return Language(model, tokenizer)


def test_samples_equal_or_near_to_the_negative_are_dropped_and_a_row_without_any_is_named():
    spoken = parrot("a")

    def row(text, where="x:1"):
        return Example(prompt="b ", completions=(text,), scores=(0.0,), kind="unpaired", where=where)

    with pytest.raises(ValueError, match=r"bad\.jsonl:2: all 4 self-samples"):
        self_sample(spoken, [row("b b"), row("a", "bad.jsonl:2")], k=4)
    with pytest.warns(UserWarning, match="tokens on average"):
        kept = self_sample(spoken, [row("a a a a")], k=4, near=0.5)  # 2 * 1 / 5
    assert len(kept[0].group.completions) == 5
    with pytest.raises(ValueError, match=r"x:1: all 4"):
        self_sample(spoken, [row("a a a a")], k=4, near=0.4)
    # Different rows of one prompt share its samples, and drop each its own.
    samples = self_sample(language(), negatives(3), k=6, max_new_tokens=9)
    told = samples[0].group.completions[0]
    same = Example(
        prompt=negatives(3)[0].prompt,
        completions=(language().tokenizer.decode(told, skip_special_tokens=True),),
        scores=(0.0,),
        kind="unpaired",
        where="x:9",
    )
    if told[-1] == 2 and len(told) > 1:
        again = self_sample(language(), [*negatives(3), same], k=6, max_new_tokens=9)
        assert told not in again[3].group.completions[:-1]
        assert again.report.equal == 1
        assert again.report.prompts == 3


def test_lengths_that_differ_and_samples_cut_off_are_reported():
    long = [
        Example(prompt=p, completions=("wave " * 12,), scores=(0.0,), kind="unpaired", where="x:1")
        for p in WORLD.prompts(np.random.default_rng(0), 3)
    ]
    with pytest.warns(UserWarning, match=r"1\.0 tokens on average, negatives 13\.0"):
        samples = self_sample(language(), long, k=4, max_new_tokens=1)
    sizes = [c[-1] != 2 for sample in samples for c in sample.group.completions[:-1]]
    assert samples.report.capped == pytest.approx(np.mean(sizes))
    assert samples.report.sample_length == 1
    assert samples.report.negative_length == 13
    assert samples.report.generated == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike = self_sample(language(), negatives(6), k=4, max_new_tokens=9)
    report = alike.report
    assert abs(report.sample_length - report.negative_length) <= 0.3 * max(report.sample_length, report.negative_length)
    assert "6 negatives (6 prompts" in report.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"near": 0.0}, "near"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        self_sample(language(), negatives(1), **options)
    with pytest.raises(ValueError, match=message):
        D2OTraining(**options)


def test_rows_without_a_usable_negative_are_refused_by_name():
    def one(kind, completions, scores):
        return [
            Example(prompt="sea cow hay : ", completions=completions, scores=scores, kind=kind, where="mine.jsonl:4")
        ]

    for examples, message in (
        (one("unpaired", ("",), (0.0,)), "empty"),
        (one("completion", ("wave",), (1.0,)), "bad"),
        (one("ranked", ("wave", "tide"), (2.0, 2.0)), "all scores are 2"),
    ):
        with pytest.raises(ValueError, match=rf"mine\.jsonl:4: .*{message}"):
            self_sample(language(), examples)


def test_an_instruction_is_sampled_under_and_not_scored_under():
    plain = draw(language(), negatives(4))
    told = draw(language(), negatives(4), instruction="farm lamp ")
    assert [s.group.prompt for s in told] == [s.group.prompt for s in plain]
    assert tokens(told) != tokens(plain)
    asked = [
        Example(prompt="farm lamp " + e.prompt, completions=e.completions, scores=e.scores, kind=e.kind, where=e.where)
        for e in negatives(4)
    ]
    for row, other in zip(told, draw(language(), asked), strict=True):
        assert row.group.completions == other.group.completions


def test_chats_end_as_their_samples_do():
    spoken = language(context=64)
    spoken.tokenizer.chat_template = (
        "{% for m in messages %}: {{ m['content'] }} </s> moon {% endfor %}{% if add_generation_prompt %}: {% endif %}"
    )
    chat = Example(
        prompt=[{"role": "user", "content": "sea cow"}],
        completions=([{"role": "assistant", "content": "damn fool"}],),
        scores=(0.0,),
        kind="unpaired",
        where="x:1",
    )
    ids = spoken.tokenizer.convert_tokens_to_ids
    (row,) = draw(spoken, [chat])
    assert row.group.completions[-1] == tuple(ids(["damn", "fool", "</s>"]))
    assert row.group.prompt[-1] == ids(":")
    told = module._instructed(chat.prompt, "be kind")
    assert [m["role"] for m in told] == ["system", "user"]
    assert module._instructed(told, "and brief")[0]["content"] == "and brief\n\nbe kind"
    assert len(chat.prompt) == 1


# the cache


def test_a_cache_answers_by_content(tmp_path, monkeypatch):
    path = tmp_path / "samples.sqlite"
    first = draw(language(), negatives(6), cache=path)
    calls = []
    monkeypatch.setattr(module, "generate", lambda *a, real=module.generate, **k: calls.append(1) or real(*a, **k))
    again = draw(language(), negatives(6)[::-1], cache=path)
    assert tokens(again) == tokens(first)[::-1]
    assert not calls
    assert (again.report.cached, again.report.generated, again.report.prompts) == (6, 0, 6)
    assert tokens(draw(language(), negatives(6), cache=path, near=0.5)) == tokens(
        draw(language(), negatives(6), near=0.5)
    )
    calls.clear()
    for options in ({"k": 2}, {"seed": 1}, {"temperature": 0.7}, {"top_p": 0.9}, {"max_new_tokens": 9}):
        found = draw(language(), negatives(6), cache=path, **options)
        assert found.report.cached == 0, options
        assert tokens(found) == tokens(draw(language(), negatives(6), **options))
    other = draw(language(1), negatives(6), cache=path)
    assert other.report.cached == 0
    assert tokens(other) == tokens(draw(language(1), negatives(6)))


def test_an_interrupted_drawing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "samples.sqlite"
    real, calls = module.generate, []

    def cut_short(*arguments, **options):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "generate", cut_short)
    with pytest.raises(KeyboardInterrupt):
        draw(language(), negatives(10), cache=path, batch_size=2)
    seen = []
    resumed = draw(language(), negatives(10), cache=path, batch_size=2, progress=lambda *now: seen.append(now))
    assert resumed.report.cached == sum(calls[:2]) > 0
    assert sum(calls[:2]) + sum(calls[3:]) == 10
    assert seen[-1] == (10, 10)
    assert tokens(resumed) == tokens(draw(language(), negatives(10)))


def test_a_cache_that_is_not_one_is_left_as_it_is(tmp_path):
    text, other = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("my notes, which are longer than a header of a database would be\n" * 20)
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE mine (x)")
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(UserError, match=path.name):
            draw(language(), negatives(2), cache=path)
        assert path.read_bytes() == before
    with pytest.raises(UserError, match="no folder"):
        draw(language(), negatives(2), cache=tmp_path / "absent" / "samples.sqlite")


# in training


def test_samples_stay_those_of_the_initial_model_unless_drawn_again():
    samples = draw(language(), negatives(8))
    for every, drawings in ((None, 0), (4, 2)):
        spoken = language()
        online = OnlineSamples(spoken, samples, every)
        start = [row.reference for row in online]
        optimise(
            spoken.model,
            D2O(),
            online,
            steps=9,
            batch=4,
            learning_rate=3e-3,
            rng=np.random.default_rng(0),
            watch=online,
        )
        assert online.drawings == drawings
        if every is None:
            assert tokens(online) == tokens(samples)
            assert all(torch.equal(a, row.reference) for a, row in zip(start, online, strict=True))
    assert tokens(online) != tokens(samples)
    assert [row.group.completions[-1] for row in online] == [row.group.completions[-1] for row in samples]
    # The reference is still the model before training.
    for row, expected in zip(online, two_references(language().model, list(online)), strict=True):
        torch.testing.assert_close(row.reference, expected.reference)
    # The second drawing was from the policy as it was after step 8.
    policy = language()
    replayed = OnlineSamples(policy, samples, 4)
    rng = np.random.default_rng(0)
    optimise(policy.model, D2O(), replayed, steps=8, batch=4, learning_rate=3e-3, rng=rng, watch=replayed)
    assert tokens(replayed) == tokens(samples.redrawn(policy, 2)) == tokens(online)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every"):
            OnlineSamples(language(), samples, wrong)
        with pytest.raises(ValueError, match="every"):
            D2OTraining(resample_every=wrong)


def test_a_row_keeps_its_samples_when_all_new_ones_are_dropped():
    spoken = language()
    samples = draw(spoken, negatives(2))
    (first, second), seen = samples, samples.redrawn(spoken, 1)
    stuck = module._assembled(
        samples._rows,
        {row.ask: [row.negative] * 3 for row in samples._rows[:1]}
        | {samples._rows[1].ask: seen[1].group.completions[:3]},
        {"prompts": 2, "cached": 0, "generated": 0, "end": 2},
        samples._how,
        0,
        before=samples,
    )
    assert stuck.report.kept == 1
    assert stuck[0].group == first.group
    assert stuck[1].group.completions[-1] == second.group.completions[-1]


def test_the_whole_method_trains_saves_and_keeps_its_samples(tmp_path):
    settings = TrainSettings(steps=4, batch=4, learning_rate=3e-3, lora=4, max_length=32, held_out=0.0)
    method = find_method("d2o", k=3, max_new_tokens=9, resample_every=2)
    assert isinstance(method, D2OTraining)
    good = Example(
        prompt="sky cow hay : ", completions=("moon",), scores=(1.0,), kind="unpaired", where="mine.jsonl:99"
    )
    done = train(language(), [*negatives(8), good], method=method, out=tmp_path / "run", settings=settings)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert any("1 rows marked good ignored" in note for note in done.notes)
    assert {"loss", "self_samples/log_ratio_per_token", "self_samples/forgotten"} <= set(done.final)
    losses = [row["loss"] for row in done.history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    kept = self_sample(language(), negatives(8), k=3, max_new_tokens=9, cache=tmp_path / "run" / "self-samples.sqlite")
    assert kept.report.cached == 8
    # Drawn anew after steps 2 and 4, so another end than without.
    other = train(
        language(),
        [*negatives(8), good],
        method=D2OTraining(k=3, max_new_tokens=9),
        out=tmp_path / "off",
        settings=settings,
    )
    first = [row["loss"] for row in other.history if "loss" in row]
    assert losses[:2] == pytest.approx(first[:2], abs=1e-6)
    assert losses[2:] != pytest.approx(first[2:], abs=1e-6)


def test_the_trainer_takes_self_samples_and_refuses_pairs(tmp_path):
    samples = draw(language(), negatives(8))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-3, logging_steps=1,
    )  # fmt: skip
    spoken = language()
    rows = two_references(spoken.model, samples)
    trainer = PreferenceTrainer(spoken.model, D2O(), arguments, rows, processing_class=spoken.tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[1]["loss"] < math.log(2)
    pairs = [
        Example(prompt=e.prompt, completions=("moon", e.completions[0]), scores=(1.0, 0.0), kind="pair", where=e.where)
        for e in negatives(4)
    ]
    with pytest.raises(UserError, match=r"mine\.jsonl:\d: .*self_sample"):
        PreferenceTrainer(spoken.model, D2O(), arguments, pairs, processing_class=spoken.tokenizer).train()
