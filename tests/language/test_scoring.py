"""log_probs and completion_logps against the plain computation: all logits of one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from counterproof.language import Group, Logps, batches, completion_logps, supports_packing

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": dict(SIZES, num_key_value_heads=2),
    "mistral": dict(SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": dict(SIZES, num_key_value_heads=2),
    "qwen3": dict(SIZES, num_key_value_heads=2, head_dim=4),
    "phi3": dict(SIZES, num_key_value_heads=2, pad_token_id=0),
    "gemma": dict(SIZES, num_key_value_heads=1, head_dim=4),
    "gemma2": dict(SIZES, num_key_value_heads=2, head_dim=4),
    "granite": dict(SIZES, num_key_value_heads=2, logits_scaling=3.0),
    "cohere": dict(SIZES, num_key_value_heads=2, logit_scale=0.25),
    "gpt_neox": SIZES,
    "gpt2": dict(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=128),
    "opt": dict(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=128, word_embed_proj_dim=16),
    "mamba": dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4),
}  # fmt: skip
PACKS = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite", "cohere", "gpt_neox", "gpt2", "opt"}


def random_model(name="llama", seed=0, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(name, **{**MODELS[name], **more})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # far from the small start, so that a slip shows
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_groups(count=5, most=3, seed=0, longest=12):
    draw = torch.Generator().manual_seed(seed)

    def some(low, high):
        size = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(3, 50, (size,), generator=draw).tolist())

    def number():
        return int(torch.randint(1, most + 1, (1,), generator=draw))

    return [Group(some(1, longest), tuple(some(1, longest) for _ in range(number()))) for _ in range(count)]


def naive(model, group):
    """Per completion: whole-sequence logits, log-softmax, gather."""
    for completion in group.completions:
        ids = torch.tensor([group.prompt + completion])
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(group.prompt)
        yield torch.stack([logps[start - 1 + i, token] for i, token in enumerate(completion)])


def reference(model, groups):
    return torch.cat([values for group in groups for values in naive(model, group)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("longest", [12, 60], ids=["side-by-side", "one-by-one"])
def test_it_equals_the_plain_computation(name, longest):
    model = random_model(name)
    groups = random_groups(longest=longest)
    assert supports_packing(model, 2 * longest) == (name in PACKS)
    found = completion_logps(model, groups)
    torch.testing.assert_close(found.token.double(), reference(model, groups), atol=1e-5, rtol=1e-5)
    padded = completion_logps(model, groups, packed=False)
    torch.testing.assert_close(padded.token, found.token, atol=1e-5, rtol=1e-5)
    assert model.config.get_text_config()._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("trained", ["all", "no-head", "tied", "bias"])
@pytest.mark.parametrize("longest", [12, 60])
def test_its_gradient_is_that_of_the_plain_computation(trained, longest):
    model = random_model("llama", tie_word_embeddings=trained == "tied").double()
    if trained == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    if trained == "no-head":
        model.lm_head.weight.requires_grad_(False)
    groups = random_groups(longest=longest)
    weights = torch.randn(sum(len(c) for g in groups for c in g.completions), dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad((weights * completion_logps(model, groups).token).sum(), parameters)
    plain = torch.autograd.grad((weights * reference(model, groups)).sum(), parameters)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)  # its norms are float32


def test_many_positions_pass_through_the_head_in_chunks():
    model = random_model().double()
    draw = torch.Generator().manual_seed(0)
    groups = [Group((5,), tuple(tuple(torch.randint(3, 50, (90,), generator=draw).tolist()) for _ in range(8)))]
    found = completion_logps(model, groups)
    torch.testing.assert_close(found.token, reference(model, groups), atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(found.token.square().sum(), model.lm_head.weight)
    plain = torch.autograd.grad(reference(model, groups).square().sum(), model.lm_head.weight)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_lora_adapters_take_part_and_the_base_stays_out_of_the_graph():
    from peft import LoraConfig, get_peft_model

    plain = random_model()
    model = get_peft_model(random_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    groups = random_groups()
    assert not torch.allclose(completion_logps(model, groups).token, completion_logps(plain, groups).token)
    with model.disable_adapter():
        torch.testing.assert_close(completion_logps(model, groups).token, completion_logps(plain, groups).token)
    torch.testing.assert_close(
        completion_logps(model, groups).token.double(), reference(model, groups), atol=1e-5, rtol=1e-5
    )
    completion_logps(model, groups).sum().sum().backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())


def test_a_prefix_of_embeddings_is_the_same_as_tokens_in_its_place():
    model = random_model()
    groups = random_groups(count=3)
    before = (7, 9, 11)
    longer = [Group(before + g.prompt, g.completions) for g in groups]
    prefix = model.get_input_embeddings()(torch.tensor(before)).detach().requires_grad_()
    for packed in (True, False):
        found = completion_logps(model, groups, prefixes=[prefix] * 3, packed=packed)
        torch.testing.assert_close(found.token, completion_logps(model, longer).token, atol=1e-5, rtol=1e-5)
    found = completion_logps(model, groups, prefixes=[None, prefix, None])
    expected = completion_logps(model, [groups[0], longer[1], groups[2]])
    torch.testing.assert_close(found.token, expected.token, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.token.sum(), prefix)
    assert gradient.abs().sum() > 0


def test_sums_means_and_hidden_states():
    model = random_model()
    groups = random_groups()
    found = completion_logps(model, groups, hidden=True)
    expected = [values.sum() for group in groups for values in naive(model, group)]
    torch.testing.assert_close(found.sum().double(), torch.stack(expected), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.mean(), found.sum() / found.lengths)
    assert found.lengths.tolist() == [len(c) for g in groups for c in g.completions]
    start = 0
    for length in found.lengths.tolist():
        assert found.position[start : start + length].tolist() == list(range(length))
        start += length
    logits = F.linear(found.hidden, model.lm_head.weight).log_softmax(-1)
    targets = torch.tensor([t for g in groups for c in g.completions for t in c])
    torch.testing.assert_close(logits.gather(1, targets[:, None])[:, 0], found.token, atol=1e-5, rtol=1e-5)


def test_companions_in_a_batch_change_nothing():
    model = random_model()
    groups = random_groups(count=6, longest=60)
    together = completion_logps(model, groups).token
    apart = torch.cat([completion_logps(model, [group]).token for group in groups])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_batches_keep_order_and_bound_tokens():
    groups = random_groups(count=20)
    runs = list(batches(groups, 30))
    assert [index for run in runs for index in run] == list(range(20))
    assert all(len(run) == 1 or sum(groups[i].tokens for i in run) <= 30 for run in runs)
    assert list(batches([], 30)) == []


def test_bfloat16_gives_float32_log_probabilities_near_the_exact_ones():
    model = random_model()
    groups = random_groups()
    found = completion_logps(model.bfloat16(), groups)
    assert found.token.dtype == torch.float32
    assert (found.sum() - completion_logps(model.float(), groups).sum()).abs().max() < 0.05 * found.sum().abs().max()


def test_a_group_needs_tokens_and_must_fit_the_context():
    with pytest.raises(ValueError, match="prompt has no token"):
        Group((), ((1,),))
    with pytest.raises(ValueError, match="at least one token"):
        Group((1,), ((1,), ()))
    model = random_model(max_position_embeddings=8)
    with pytest.raises(ValueError, match="12 tokens do not fit the model's context of 8"):
        completion_logps(model, [Group((1,) * 4, ((2,) * 8,))])
    with pytest.raises(ValueError, match="no group"):
        completion_logps(model, [])
    with pytest.raises(ValueError, match="2 prefixes for 1 groups"):
        completion_logps(model, [Group((1,), ((2,),))], prefixes=[None, None])


def test_logps_of_groups_hold_other_values():
    groups = random_groups()
    count = sum(len(c) for g in groups for c in g.completions)
    values = Logps.of(groups, torch.ones(count))
    assert values.sum().tolist() == values.lengths.tolist()
    assert values.with_tokens(torch.zeros(count)).sum().abs().max() == 0
