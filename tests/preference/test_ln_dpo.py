import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from counterproof.errors import UserError
from counterproof.language import Group, Logps, completion_logps
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference.data import Example, encode
from counterproof.preference.forward import objective_output, optimise, referenced
from counterproof.preference.ln_dpo import LNDPO
from counterproof.preference.objectives import CPO, DPO, Batch, Sample, SimPO

WORDS = ["a", "b", "c", "d", "e"]


def batch(pairs, where=()):
    """Pairs with the chosen completion first."""
    group = torch.arange(pairs).repeat_interleave(2)
    return Batch(group, torch.tensor([1.0, 0.0]).repeat(pairs), where=where)


def logps(lengths, seed=0, token=None):
    """Completions of so many tokens with random log-probabilities in float64."""
    lengths = torch.tensor(lengths)
    total = int(lengths.sum())
    if token is None:
        token = -3 * torch.rand(total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return Logps(token, owner, position, lengths)


def value(objective, lengths, policy_seed=1, reference_seed=2, where=()):
    """Losses and the gradient with respect to every token's log-probability."""
    policy, reference = logps(lengths, policy_seed), logps(lengths, reference_seed)
    policy.token.requires_grad_(True)
    output = objective(policy, reference, batch(len(lengths) // 2, where))
    (gradient,) = torch.autograd.grad(output.losses.sum(), policy.token)
    return output, gradient


# 1: DPO at equal lengths, TRL at unequal ones


@pytest.mark.parametrize("length", [1, 4, 13])
def test_with_equal_lengths_it_is_dpo_at_beta_over_length(length):
    lengths = [length] * 8
    own, own_gradient = value(LNDPO(beta=2.0), lengths)
    dpo, dpo_gradient = value(DPO(beta=2.0 / length), lengths)
    torch.testing.assert_close(own.losses, dpo.losses, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(own_gradient, dpo_gradient, atol=1e-12, rtol=1e-12)
    assert own.metrics == pytest.approx(dpo.metrics)


def test_the_loss_by_hand():
    """D = -1 - (-2) = 1 over 2 tokens, D = -3 - (-1) = -2 over 4: the logit is 3 (1/2 + 2/4) = 3."""
    policy = logps([2, 4], token=torch.tensor([-0.5, -0.5, -1.0, -1.0, -0.5, -0.5], dtype=torch.float64))
    reference = logps([2, 4], token=torch.tensor([-1.5, -0.5, -0.25, -0.25, -0.25, -0.25], dtype=torch.float64))
    output = LNDPO(beta=3.0)(policy, reference, batch(1))
    assert float(output.loss) == pytest.approx(math.log1p(math.exp(-3.0)), abs=1e-12)
    assert output.metrics == pytest.approx(
        {
            "rewards/chosen": 1.5,
            "rewards/rejected": -1.5,
            "rewards/margins": 3.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -1.0,
            "logps/rejected": -3.0,
        }
    )


@pytest.fixture(scope="module")
def llamas():
    """A policy and a reference: Llamas of two layers in random start."""

    def llama(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=len(tiny_tokenizer(WORDS)),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                initializer_range=0.5,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
            return LlamaForCausalLM(config).eval()

    return llama(0), llama(1)


TEXTS = [
    ("a b", "c", "d e d e a"),
    ("c", "a a a b c d", "e"),
    ("e d c", "b c", "a b c d e a b"),
]


def test_value_and_gradient_are_those_of_trl(llamas, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = llamas
    tokenizer = tiny_tokenizer(WORDS)
    examples = [
        Example(prompt=prompt + " ", completions=(chosen, rejected), scores=(1.0, 0.0), kind="pair")
        for prompt, chosen, rejected in TEXTS
    ]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type="sigmoid_norm",
        beta=3.0,
        per_device_train_batch_size=len(examples),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_dropout=True,
        max_length=None,
    )
    rows = [dict(zip(("prompt", "chosen", "rejected"), (e.prompt, *e.completions), strict=True)) for e in examples]
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    # The loader shuffles; the loss is a mean over the batch, so the order plays no part.
    assert len(inputs["input_ids"]) == 2 * len(examples)
    model = trainer.model
    model.zero_grad()
    theirs = trainer._compute_loss(model, inputs, return_outputs=False)
    theirs.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    samples = [Sample(encode(e, tokenizer, max_length=None).group, e.scores) for e in examples]
    assert [len(c) for sample in samples for c in sample.group.completions] == [2, 6, 7, 2, 3, 8]
    policy.zero_grad()
    ours = objective_output(policy, LNDPO(beta=3.0), referenced(reference, samples)).loss
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert float(ours.detach()) != pytest.approx(math.log(2), abs=1e-2)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-6, rtol=1e-4)


# 2 and 3: where it begins, and what length does


def test_a_policy_that_is_its_reference_loses_log_2_and_is_pushed_per_token():
    lengths = [3, 7, 10, 2]
    output, gradient = value(LNDPO(beta=1.7), lengths, policy_seed=5, reference_seed=5)
    torch.testing.assert_close(output.losses, torch.full((2,), math.log(2), dtype=torch.float64))
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    per_token = 1.7 / 2 * signs / torch.tensor(lengths)
    torch.testing.assert_close(gradient, torch.repeat_interleave(per_token, torch.tensor(lengths)))


def test_repeating_a_completion_changes_dpo_and_not_this():
    """Each token twice: the mean log-ratio stays, the summed one doubles."""
    once = logps([3, 5], 1), logps([3, 5], 2)

    def twice(given):
        return logps([6, 5], token=torch.cat([given.token[:3].repeat(2), given.token[3:]]))

    doubled = tuple(map(twice, once))
    assert float(LNDPO(beta=2.0)(*once, batch(1)).loss) == pytest.approx(
        float(LNDPO(beta=2.0)(*doubled, batch(1)).loss), abs=1e-12
    )
    assert abs(float(DPO(beta=0.5)(*once, batch(1)).loss - DPO(beta=0.5)(*doubled, batch(1)).loss)) > 1e-3


def test_the_gradient_by_finite_differences():
    lengths = [2, 5, 4, 1]
    objective, step = LNDPO(beta=2.5), 1e-6
    _, gradient = value(objective, lengths)
    policy, reference = logps(lengths, 1), logps(lengths, 2)
    for index in range(sum(lengths)):
        ends = []
        for sign in (1, -1):
            token = policy.token.clone()
            token[index] += sign * step
            ends.append(objective(logps(lengths, token=token), reference, batch(2)).losses.sum())
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(gradient[index]), abs=1e-8)


# 4: the end token


def test_the_end_token_counts():
    tokenizer = tiny_tokenizer(["yes", "no", "question"])
    group = encode(
        Example(prompt="question ", completions=("yes", "no no"), scores=(1.0, 0.0), kind="pair"),
        tokenizer,
        max_length=None,
    ).group
    assert [len(completion) for completion in group.completions] == [2, 3]
    model = tiny_model(tokenizer, seed=0)
    assert completion_logps(model, [group]).lengths.tolist() == [2, 3]


def test_what_a_template_renders_behind_the_end_token_counts_unless_it_is_trimmed():
    tokenizer = tiny_tokenizer(["yes", "no", "question", "newline", "user", "bot"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'user' if m.role == 'user' else 'bot' }} {{ m.content }} </s> newline "
        "{% endfor %}{% if add_generation_prompt %}bot {% endif %}"
    )
    example = Example(
        prompt=[{"role": "user", "content": "question"}],
        completions=([{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no no no"}]),
        scores=(1.0, 0.0),
        kind="pair",
    )

    def loss(trim):
        group = encode(example, tokenizer, max_length=None, trim_after_eos=trim).group
        lengths = [len(completion) for completion in group.completions]
        policy, start = tiny_model(tokenizer, seed=0), tiny_model(tokenizer, seed=1)
        return lengths, float(
            objective_output(policy, LNDPO(beta=50.0), referenced(start, [Sample(group, (1.0, 0.0))])).loss
        )

    whole, trimmed = loss(False), loss(True)
    assert whole[0] == [3, 5]
    assert trimmed[0] == [2, 4]
    assert whole[1] != pytest.approx(trimmed[1], abs=1e-3)


# 5: neighbours


def test_without_reference_it_is_simpo_without_margin():
    lengths = [3, 7, 10, 2]
    policy, none = logps(lengths, 1), logps(lengths, token=torch.zeros(22, dtype=torch.float64))
    own = LNDPO(beta=2.0)(policy, none, batch(2))
    simpo = SimPO(beta=2.0, gamma=0.0)(policy, None, batch(2))
    torch.testing.assert_close(own.losses, simpo.losses)
    dpo = DPO(beta=0.3)(policy, none, batch(2))
    torch.testing.assert_close(dpo.losses, CPO(beta=0.3, alpha=0.0)(policy, None, batch(2)).losses)


# 6: beta from DPO's


def test_a_matched_beta_is_dpos_times_the_mean_length():
    matched = LNDPO(beta="match:0.1").calibrated(37.5)
    assert matched == LNDPO(beta=3.75)
    assert LNDPO().beta == "match:0.1"
    assert LNDPO(beta=2.0).calibrated(37.5) == LNDPO(beta=2.0)
    own, _ = value(LNDPO(beta="match:0.1").calibrated(6.0), [6] * 4)
    dpo, _ = value(DPO(beta=0.1), [6] * 4)
    torch.testing.assert_close(own.losses, dpo.losses)


def test_a_matched_beta_that_was_not_calibrated_says_what_to_do():
    with pytest.raises(UserError, match=r"'match:0\.1' depends on the data; call calibrated"):
        value(LNDPO(), [3, 3])


# 9: bad input


@pytest.mark.parametrize(
    "beta", [0, -1.0, math.nan, math.inf, "match:", "match:0", "match:-1", "match:x", "0.1", "match:inf"]
)
def test_a_bad_beta_is_quoted(beta):
    with pytest.raises(ValueError, match="beta must be a positive number") as caught:
        LNDPO(beta=beta)
    assert repr(beta) in str(caught.value)


def test_it_has_no_margin():
    with pytest.raises(TypeError, match="gamma"):
        LNDPO(beta=2.0, gamma=0.5)


@pytest.mark.parametrize("length", [0.0, -3.0, math.nan])
def test_a_mean_length_that_is_none_is_refused(length):
    with pytest.raises(ValueError, match="mean_length must be a positive number"):
        LNDPO().calibrated(length)


def test_an_empty_completion_is_named():
    with pytest.raises(ValueError, match=r"pairs.jsonl:7: has a completion of 0 tokens"):
        value(LNDPO(beta=1.0), [2, 3, 4, 0], where=("pairs.jsonl:6", "pairs.jsonl:7"))
    with pytest.raises(ValueError, match="every completion at least one token"):
        Group((1,), ((3,), ()))


def test_it_needs_pairs_and_a_reference():
    assert LNDPO.needs == {"reference", "pairs"}
    policy = logps([2, 3])
    with pytest.raises(UserError, match="compares with a reference"):
        LNDPO(beta=1.0)(policy, None, batch(1))
    with pytest.raises(UserError, match="compares pairs"):
        LNDPO(beta=1.0)(policy, policy, Batch(torch.tensor([0, 1]), torch.tensor([1.0, 0.0])))


# on models


def test_it_trains_a_model_of_another_architecture_too():
    """GPT-2: after a few steps every chosen completion has gained per token on the rejected one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config).eval()
    samples = [
        Sample(
            encode(
                Example(prompt=p + " ", completions=(w, r), scores=(1.0, 0.0), kind="pair"), tokenizer, max_length=None
            ).group,
            (1.0, 0.0),
        )
        for p, w, r in TEXTS
    ]
    samples = referenced(model, samples)
    before = objective_output(model, LNDPO(beta=5.0), samples)
    optimise(model, LNDPO(beta=5.0), samples, steps=15, batch=3, learning_rate=0.01, rng=np.random.default_rng(0))
    after = objective_output(model, LNDPO(beta=5.0), samples)
    assert float(before.loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert float(after.loss.detach()) < 0.3
    assert after.metrics["rewards/accuracies"] == 1.0
