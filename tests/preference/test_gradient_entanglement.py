import copy
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from counterproof.errors import UserError
from counterproof.language import Group, Language, Logps, completion_logps
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference import objectives
from counterproof.preference.data import Example
from counterproof.preference.forward import objective_output, referenced
from counterproof.preference.gradient_entanglement import (
    CommonTokenMask,
    EntanglementCallback,
    PairEntanglement,
    PairwiseNormalized,
    SparseMask,
    diagnose,
    mark_different,
    token_heatmap,
)
from counterproof.preference.objectives import (
    CPO,
    DPO,
    DPOP,
    IPO,
    KTO,
    ORPO,
    RDPO,
    Batch,
    Hinge,
    Objective,
    Sample,
    SimPO,
    SLiC,
)

WORDS = [f"w{i}" for i in range(20)]
TOKENIZER = tiny_tokenizer(WORDS)


def model(seed=0, double=True, **shape):
    made = tiny_model(TOKENIZER, seed=seed, hidden=16, **shape)
    return made.double() if double else made


def pairs(count=4, seed=0, chosen=5, rejected=3):
    rng = np.random.default_rng(seed)

    def ids(n):
        return tuple(rng.integers(3, 23, n).tolist())

    return [Sample(Group((1, *ids(4)), (ids(chosen), ids(rejected))), (1.0, 0.0)) for _ in range(count)]


def plain_gradient(net, prompt, completion, names=None):
    """One float64 vector by transformers' own forward pass of one sequence."""
    net.zero_grad()
    ids = torch.tensor([[*prompt, *completion]])
    logps = log_softmax(net(ids).logits[0].double(), -1)
    at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    sum(logps[i, token] for i, token in zip(at, completion, strict=True)).backward()
    parts = [p.grad for n, p in net.named_parameters() if names is None or n in names]
    return torch.cat([part.flatten() for part in parts]).clone()


def sequence_logps(net, sample):
    with torch.no_grad():
        return completion_logps(net, [sample.group]).sum()


def step(net, direction_of, size):
    """Change of two log-probabilities by one step of plain gradient descent on a loss."""
    sample, backward = direction_of
    before = sequence_logps(net, sample)
    moved = copy.deepcopy(net)
    moved.zero_grad()
    backward(moved)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter -= size * parameter.grad
    return (sequence_logps(moved, sample) - before).tolist()


# the identities


def test_norms_inner_product_and_changes_are_those_of_a_plain_backward_pass_for_each_sequence():
    net = model()
    report = diagnose(net, pairs())
    for sample, found in zip(pairs(), report.pairs, strict=True):
        a, b = (plain_gradient(net, sample.group.prompt, completion) for completion in sample.group.completions)
        assert found.chosen_norm == pytest.approx(float(a.norm()), rel=1e-9)
        assert found.rejected_norm == pytest.approx(float(b.norm()), rel=1e-9)
        assert found.inner == pytest.approx(float(a @ b), rel=1e-8)
        assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-8)
        assert found.ratio == pytest.approx(float(a @ b / min(a @ a, b @ b)), rel=1e-8)
        assert found.chosen_change == pytest.approx(0.05 * float(a @ (a - b)), rel=1e-8)
        assert found.rejected_change == pytest.approx(0.05 * float(b @ (a - b)), rel=1e-8)
        assert found.margin_change == pytest.approx(0.05 * float((a - b) @ (a - b)), rel=1e-8)


def test_float32_gradients_agree_with_the_plain_ones_to_1e_4():
    net = model(double=False)
    (found,) = diagnose(net, pairs(1)).pairs
    group = pairs(1)[0].group
    a, b = (plain_gradient(net, group.prompt, completion).double() for completion in group.completions)
    assert found.inner == pytest.approx(float(a @ b), rel=1e-4)
    assert found.chosen_norm == pytest.approx(float(a.norm()), rel=1e-4)


@pytest.mark.parametrize(
    "objective", [DPO(), DPO(beta=0.5, label_smoothing=0.2), SimPO(), CPO(), IPO(), ORPO(), SLiC()]
)
def test_what_is_foretold_happens_in_one_small_step(objective):
    net = model(1)
    for sample in referenced(model(2), pairs(3)):
        (found,) = diagnose(net, [sample], objective=objective).pairs
        size = 1e-4 / max(abs(found.margin_change), 1e-9)
        up, down = step(net, (sample, lambda m, s=sample: objective_output(m, objective, [s]).loss.backward()), size)
        assert up - down == pytest.approx(1e-4 * np.sign(found.margin_change), rel=0.02)
        assert up == pytest.approx(size * found.chosen_change, abs=2e-6)
        assert down == pytest.approx(size * found.rejected_change, abs=2e-6)


def angle_cases():
    for degrees in (0, 60, 90, 120, 180):
        for long_a, long_b in ((1, 1), (1, 3), (3, 1)):
            yield degrees, long_a, long_b


@pytest.mark.parametrize(("degrees", "long_a", "long_b"), list(angle_cases()))
def test_the_table_of_signs(degrees, long_a, long_b):
    cosine = {0: 1.0, 60: 0.5, 90: 0.0, 120: -0.5, 180: -1.0}[degrees]
    found = PairEntanglement.of(long_a, long_b, cosine * long_a * long_b)
    if degrees == 0 and long_a == long_b:
        expected = "still"
    elif degrees in (0, 60) and long_a > long_b:  # <a, b> = 3 or 1.5, above |b|^2 = 1 and below |a|^2 = 9
        expected = "both up"
    elif degrees in (0, 60) and long_a < long_b:
        expected = "both down"
    else:
        expected = "desired"
    assert found.regime == expected
    assert found.synchronised == expected.startswith("both")
    assert found.margin_change == pytest.approx(long_a**2 + long_b**2 - 2 * cosine * long_a * long_b, abs=1e-12)


def test_no_pair_goes_the_wrong_way_on_both_sides_and_the_condition_is_the_papers():
    rng = np.random.default_rng(0)
    for _ in range(500):
        a, b = rng.normal(size=(2, 3)) * rng.lognormal(size=(2, 1))
        found = PairEntanglement.of(np.linalg.norm(a), np.linalg.norm(b), a @ b)
        assert found.regime in ("desired", "both up", "both down")
        assert (found.regime == "desired") == (a @ b <= min(a @ a, b @ b))
        d_w, d_l = rng.uniform(0.1, 2, 2)
        found = PairEntanglement.of(np.linalg.norm(a), np.linalg.norm(b), a @ b, d_w, d_l)
        assert (found.chosen_change >= 0) == (a @ b <= d_w / d_l * (a @ a))
        assert (found.rejected_change <= 0) == (a @ b <= d_l / d_w * (b @ b))


# the weights of the loss


class LengthNormalised(Objective):
    name = "length-normalised"
    needs = frozenset({"reference", "pairs"})

    def __call__(self, policy, reference, batch):
        chosen, rejected = batch.pairs()
        mean = (policy.sum() - reference.sum()) / policy.lengths
        return objectives.pair_output(
            -torch.nn.functional.logsigmoid(mean[chosen] - mean[rejected]), mean, policy, batch
        )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_weights_equal_closed_forms():
    net = model(3)
    (sample,) = referenced(model(4), pairs(1, seed=5))
    w, l = sequence_logps(net, sample).tolist()  # noqa: E741
    r_w, r_l = (float(part.sum()) for part in sample.reference.split([5, 3]))
    D_w, D_l, gap = w - r_w, l - r_l, (w - r_w) - (l - r_l)
    below = 0.1 * (D_w - D_l - 50 * max(0, -D_w))
    odds = [w / 5 - math.log(1 - math.exp(w / 5)), l / 3 - math.log(1 - math.exp(l / 3))]
    chance = [math.exp(w / 5), math.exp(l / 3)]
    pull = 0.1 * sigmoid(odds[1] - odds[0])
    expected = {
        DPO(beta=0.1): [0.1 * sigmoid(-0.1 * gap)] * 2,
        RDPO(beta=0.1, alpha=0.2): [0.1 * sigmoid(-(0.1 * gap + 0.2 * 2))] * 2,
        IPO(tau=0.1): [-2 * (gap - 5)] * 2,
        IPO(tau=0.1, length_normalize=True): [-2 * (D_w / 5 - D_l / 3 - 5) / n for n in (5, 3)],
        SimPO(beta=2.0, gamma=1.0): [2 * sigmoid(-(2 * (w / 5 - l / 3) - 1)) / n for n in (5, 3)],
        CPO(beta=0.1, alpha=1.0): [0.1 * sigmoid(-0.1 * (w - l)) + 1 / 5, 0.1 * sigmoid(-0.1 * (w - l))],
        SLiC(delta=50.0, weight=0.5): [1 + 0.5 / 5, 1.0],
        Hinge(beta=0.1): [0.1, 0.1],
        DPOP(beta=0.1, weight=50.0): [0.1 * sigmoid(-below) * (51 if D_w < 0 else 1), 0.1 * sigmoid(-below)],
        ORPO(weight=0.1): [1 / 5 + pull / (1 - chance[0]) / 5, pull / (1 - chance[1]) / 3],
    }
    for objective, (d_w, d_l) in expected.items():
        (found,) = diagnose(net, [sample], objective=objective).pairs
        assert found.chosen_weight == pytest.approx(d_w, rel=1e-6), objective
        assert found.rejected_weight == pytest.approx(d_l, rel=1e-6), objective
    (found,) = diagnose(net, [sample], objective=LengthNormalised()).pairs
    assert found.chosen_weight / found.rejected_weight == pytest.approx(3 / 5)


def test_kto_judges_each_answer_by_its_own_log_ratio():
    net = model(3)
    sample = referenced(model(4), pairs(2, seed=5))
    strangers = [Sample(Group(sample[1 - i].group.prompt, sample[i].group.completions[:1]), (0.0,)) for i in (0, 1)]
    z = np.mean([float(sequence_logps(net, s) - sequence_logps(model(4), s)) for s in strangers])
    for one, found in zip(sample, diagnose(net, sample, objective=KTO(), reference=model(4)).pairs, strict=True):
        D = (sequence_logps(net, one) - torch.stack([p.sum() for p in one.reference.split([5, 3])])).tolist()
        slopes = [0.5 * 0.1 * sigmoid(g) * sigmoid(-g) for g in (0.1 * (d - max(0, z)) for d in D)]
        assert [found.chosen_weight, found.rejected_weight] == pytest.approx(slopes, rel=1e-5)


# the paper's toy cases, by autograd on free logits


def toy(logits, chosen, rejected):
    """Gradients of two answers' log-probabilities; logits(answer) gives a row for each token."""
    leaves = logits["leaves"]
    vectors = []
    for answer in (chosen, rejected):
        total = sum(log_softmax(row, 0)[token] for row, token in zip(logits["rows"](answer), answer, strict=True))
        grads = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
        vectors.append(torch.cat([g.flatten() for g in grads]))
    a, b = vectors
    return PairEntanglement.of(float(a.norm()), float(b.norm()), float(a @ b))


def test_single_tokens_with_free_logits_always_move_as_desired():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        head = torch.tensor(rng.normal(size=(6, 3)) * 2, requires_grad=True)
        state = torch.tensor(rng.normal(size=3))
        w, l = rng.choice(6, 2, replace=False).tolist()  # noqa: E741
        found = toy({"leaves": [head], "rows": lambda answer, h=head, s=state: [h @ s]}, [w], [l])
        assert found.regime == "desired"


def test_single_tokens_of_a_model_with_a_trained_head_alone_move_as_desired():
    different = [s for s in pairs(20, chosen=1, rejected=1) if len(set(s.group.completions)) == 2]
    report = diagnose(model(6), different, params="lm_head")
    assert report.shares["desired"] == 1


def test_a_difference_in_the_last_token_alone_always_moves_as_desired():
    rng = np.random.default_rng(1)
    for _ in range(300):
        table = torch.tensor(rng.normal(size=(4, 6)) * 2, requires_grad=True)  # free logits at each place
        start = rng.integers(0, 6, 3).tolist()
        w, l = rng.choice(6, 2, replace=False).tolist()  # noqa: E741
        found = toy({"leaves": [table], "rows": lambda answer, t=table: list(t)}, [*start, w], [*start, l])
        assert found.chosen_change > 0 > found.rejected_change


def test_a_shared_suffix_can_pull_both_down():
    """The suffix is foreseen after the chosen label and comes as a surprise after the rejected one, whose gradient is
    therefore longer, in almost the same direction."""
    head = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    first, after_w, after_l = torch.eye(3, dtype=torch.float64)[0], *torch.tensor([[0, 0.3, 0], [0, 1.0, 0]]).double()
    suffix = 5

    def rows(answer):
        return [head @ first, *[head @ (after_w if answer[0] == 0 else after_l)] * suffix]

    found = toy({"leaves": [head], "rows": rows}, [0, *[2] * suffix], [1, *[2] * suffix])
    assert found.regime == "both down"
    alone = toy({"leaves": [head], "rows": lambda answer: [head @ first]}, [0], [1])
    assert alone.regime == "desired"


def test_equal_answers_stand_still_and_are_normalised_without_nan():
    (sample,) = pairs(1)
    same = Sample(Group(sample.group.prompt, (sample.group.completions[0],) * 2), (1.0, 0.0))
    net = model()
    (found,) = diagnose(net, [same]).pairs
    assert found.regime == "still"
    assert found.cosine == pytest.approx(1)
    assert diagnose(model(double=False), [same]).pairs[0].regime == "still"
    PairwiseNormalized(net).backward(referenced(net, [same]))
    assert all(float(p.grad.abs().max()) < 1e-12 for p in net.parameters())


# batch, sketch, optimizer, parameters


def test_the_batch_is_the_mean_of_the_gradients_and_moves_the_mean_log_probabilities():
    net = model()
    samples = referenced(net, pairs(4))
    report = diagnose(net, samples)
    gradients = [[plain_gradient(net, s.group.prompt, c) for c in s.group.completions] for s in samples]
    A, B = (torch.stack([g[i] for g in gradients]).mean(0) for i in (0, 1))
    assert report.batch.inner == pytest.approx(float(A @ B), rel=1e-8)
    assert report.batch.chosen_change == pytest.approx(0.05 * float(A @ (A - B)), rel=1e-8)
    assert report.batch.inner != pytest.approx(np.mean([pair.inner for pair in report.pairs]), rel=0.1)
    moved = copy.deepcopy(net)
    objective_output(moved, DPO(), samples).loss.backward()
    size = 1e-5
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter -= size * parameter.grad
    change = torch.stack([sequence_logps(moved, s) - sequence_logps(net, s) for s in samples]).mean(0)
    assert float(change[0]) == pytest.approx(size * report.batch.chosen_change, rel=0.02)
    assert float(change[1]) == pytest.approx(size * report.batch.rejected_change, rel=0.02)
    assert diagnose(net, samples, batch=False).batch is None


def test_sketches_are_unbiased_and_their_standard_error_is_right():
    net = model()
    exact = diagnose(net, pairs(1)).pairs[0]
    found = [diagnose(net, pairs(1), sketch_dim=64, seed=s, batch=False).pairs[0] for s in range(80)]
    inner = np.array([pair.inner for pair in found])
    spread = math.sqrt((exact.chosen_norm**2 * exact.rejected_norm**2 + exact.inner**2) / 64)
    assert abs(inner.mean() - exact.inner) < 4 * spread / math.sqrt(80)
    assert inner.std() == pytest.approx(spread, rel=0.35)
    assert np.mean([pair.standard_error for pair in found]) == pytest.approx(spread, rel=0.1)
    assert exact.standard_error == 0
    assert "standard error" in diagnose(net, pairs(1), sketch_dim=64).table()
    again = diagnose(net, pairs(1), sketch_dim=64, seed=3, batch=False).pairs[0]
    assert again.inner == found[3].inner


def test_adams_weights_foretell_a_step_along_the_preconditioned_gradient():
    net = model()
    samples = referenced(net, pairs(3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        objective_output(net, DPO(), samples).loss.backward()
        optimizer.step()
    (found,) = diagnose(net, samples[:1], optimizer=optimizer).pairs
    moved = copy.deepcopy(net)
    objective_output(moved, DPO(), samples[:1]).loss.backward()
    size = 1e-4 / found.margin_change
    with torch.no_grad():
        for parameter, own in zip(moved.parameters(), net.parameters(), strict=True):
            v = optimizer.state[own]["exp_avg_sq"] / (1 - 0.999**3)
            parameter -= size * (parameter.grad if parameter.grad is not None else 0) / (v.sqrt() + 1e-8)
    change = sequence_logps(moved, samples[0]) - sequence_logps(net, samples[0])
    assert float(change[0] - change[1]) == pytest.approx(1e-4, rel=0.05)
    assert float(change[0]) == pytest.approx(size * found.chosen_change, abs=5e-6)
    with pytest.raises(ValueError, match="has made a step"):
        diagnose(net, samples, optimizer=torch.optim.AdamW(net.parameters()))


def test_params_choose_whose_gradients():
    net = model()
    everything = diagnose(net, pairs(1)).pairs[0]
    head = diagnose(net, pairs(1), params="lm_head").pairs[0]
    rest = diagnose(net, pairs(1), params="^model").pairs[0]
    assert head.inner + rest.inner == pytest.approx(everything.inner, rel=1e-9)
    group = pairs(1)[0].group
    a, b = (plain_gradient(net, group.prompt, c, {"lm_head.weight"}) for c in group.completions)
    assert head.inner == pytest.approx(float(a @ b), rel=1e-8)


def test_a_peft_model_is_compared_by_its_adapter_and_with_itself_without_it():
    from peft import LoraConfig, get_peft_model

    base = model(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double()
    report = diagnose(net, pairs(2))
    assert report.as_json() == diagnose(net, pairs(2), params="lora").as_json()
    (sample,) = pairs(1)
    with torch.no_grad(), net.disable_adapter():
        before = sequence_logps(net, sample)
    gap = sequence_logps(net, sample) - before
    assert report.pairs[0].chosen_weight == pytest.approx(0.1 * sigmoid(-0.1 * float(gap[0] - gap[1])), rel=1e-8)


def test_models_that_cannot_be_packed_and_dropout():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=2, n_head=2)).double()
    net.train()  # GPT-2 has dropout
    before = torch.get_rng_state()
    report = diagnose(net, pairs(2))
    assert torch.equal(before, torch.get_rng_state())
    assert net.training
    net.eval()
    group = pairs(1)[0].group
    a, b = (plain_gradient(net, group.prompt, completion) for completion in group.completions)
    assert report.pairs[0].inner == pytest.approx(float(a @ b), rel=1e-8)


def test_gradients_in_grad_stay_and_the_model_is_as_before():
    net = model()
    objective_output(net, SimPO(), pairs(2)).loss.backward()
    grads = [p.grad.clone() for p in net.parameters()]
    weights = copy.deepcopy(net.state_dict())
    diagnose(net, pairs(2)).heatmap(0)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


# report


def test_the_heat_maps_inner_products_sum_to_the_pairs():
    net = model()
    for sample in (pairs(1)[0], pairs(1, chosen=2, rejected=6)[0]):
        report = diagnose(net, [sample])
        found = report.heatmap(0)
        assert found.inner.shape == found.cosines.shape == tuple(map(len, sample.group.completions))
        assert found.inner.sum() == pytest.approx(report.pairs[0].inner, rel=1e-8)
        assert (found.chosen, found.rejected) == sample.group.completions
        assert np.abs(found.cosines).max() <= 1 + 1e-12
        # The first tokens alone, as answers of one token.
        short = Sample(Group(sample.group.prompt, tuple(c[:1] for c in sample.group.completions)), (1.0, 0.0))
        (alone,) = diagnose(net, [short]).pairs
        assert found.inner[0, 0] == pytest.approx(alone.inner, rel=1e-8)
        assert found.cosines[0, 0] == pytest.approx(alone.cosine, rel=1e-8)
        picture = found.svg(TOKENIZER)
        assert picture.count("<rect") == found.inner.size
        assert TOKENIZER.decode([found.chosen[0]]) in picture
    report = diagnose(net, pairs(1))
    with torch.no_grad():
        net.lm_head.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="changed"):
        report.heatmap(0)
    assert token_heatmap(net, pairs(1)[0]).inner.shape == (5, 3)


def test_the_report_reads_and_is_json():
    report = diagnose(model(), pairs(3))
    assert len(report.table().splitlines()) == 6
    assert sum(report.shares.values()) == pytest.approx(1)
    read = json.loads(json.dumps(report.as_json()))
    assert read["pairs"][0]["inner"] == report.pairs[0].inner
    assert read["batch"]["regime"] == report.batch.regime
    assert read["objective"] == "dpo"


def test_texts_are_tokenised_with_the_languages_tokenizer_and_the_order_of_scores_does_not_matter():
    net = model()
    example = Example(prompt="w1 w2 ", completions=("w3 w4", "w5"), scores=(1.0, 0.0), kind="pair")
    row = {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"}
    plain = Sample(Group((1, 4, 5), ((6, 7, 2), (8, 2))), (1.0, 0.0))
    swapped = Sample(Group((1, 4, 5), ((8, 2), (6, 7, 2))), (0.0, 1.0))
    found = [diagnose(Language(net, TOKENIZER), [pair]).pairs[0].inner for pair in (example, row, plain, swapped)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-9)
    assert diagnose(net, [swapped]).pairs[0].chosen_norm == pytest.approx(diagnose(net, [plain]).pairs[0].chosen_norm)


# normalised pairs


def test_the_normalised_step_never_goes_the_wrong_way_for_any_pair():
    for sample in referenced(model(9), pairs(8, seed=3, chosen=4, rejected=4)):
        net = model(8)
        PairwiseNormalized(net).backward([sample])
        direction = -torch.cat([p.grad.flatten() for p in net.parameters()])
        a, b = (plain_gradient(net, sample.group.prompt, c) for c in sample.group.completions)
        weight = diagnose(net, [sample]).pairs[0].chosen_weight
        expected = weight * (a.norm() * b.norm()).sqrt() * (a / a.norm() - b / b.norm())
        # Llama's norms compute in float32, whatever the weights are.
        assert torch.allclose(direction, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert direction @ a >= 0
        assert direction @ b <= 0


def test_normalised_gradients_add_up_over_pairs_and_calls():
    samples = referenced(model(9), pairs(3))
    net = model(8)
    output = PairwiseNormalized(net, SimPO()).backward(samples)
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for sample in samples:
        PairwiseNormalized(net, SimPO()).backward([sample], scale=1 / 3)
    assert all(torch.allclose(p.grad, g, atol=1e-12) for p, g in zip(net.parameters(), whole, strict=True))
    expected = objective_output(net, SimPO(), samples)
    assert torch.allclose(output.losses, expected.losses)
    assert output.metrics == pytest.approx(expected.metrics)


def test_halves_of_equal_length_give_the_plain_gradient_and_a_missing_half_changes_nothing():
    net = model(8)
    (sample,) = pairs(1)
    PairwiseNormalized(net, SLiC(delta=1e-6, weight=0.5)).backward(
        [Sample(Group(sample.group.prompt, ((5,), sample.group.completions[0])), (1.0, 0.0))]
    )
    inactive = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    one = Sample(Group(sample.group.prompt, ((5,), sample.group.completions[0])), (1.0, 0.0))
    objective_output(net, SLiC(delta=1e-6, weight=0.5), [one]).loss.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-12) for p, g in zip(net.parameters(), inactive, strict=True))
    uniform = model(8)  # in which the two single tokens' gradients of the head are equally long
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    uniform.requires_grad_(False)
    uniform.lm_head.weight.requires_grad_(True)
    pair = Sample(Group(sample.group.prompt, ((5,), (6,))), (1.0, 0.0))
    (pair,) = referenced(uniform, [pair])
    PairwiseNormalized(uniform).backward([pair])
    normalised = uniform.lm_head.weight.grad.clone()
    uniform.zero_grad()
    objective_output(uniform, DPO(), [pair]).loss.backward()
    assert torch.allclose(normalised, uniform.lm_head.weight.grad, atol=1e-12)


# masks


def masked_loss(net, mask, samples, **more):
    return objective_output(net, mask, samples, hidden=True, **more)


@pytest.mark.parametrize("objective", [DPO(), SimPO(), IPO(), CPO()])
def test_masks_of_one_without_price_are_the_wrapped_objective(objective):
    samples = referenced(model(9), pairs(3))
    values = []
    for judge in (objective, SparseMask(objective, l1=0.0, head_learning_rate=0.0)):
        net = model(8)
        output = masked_loss(net, judge, samples)
        output.loss.backward()
        values.append((output.loss, torch.cat([p.grad.flatten() for p in net.parameters()])))
    assert values[0][0].item() == pytest.approx(values[1][0].item(), abs=1e-6)
    assert torch.allclose(values[0][1], values[1][1], atol=1e-9)


def test_a_high_price_closes_all_masks_and_leaves_log_2():
    samples = referenced(model(9), pairs(3))
    net = model(8)
    mask = SparseMask(l1=10.0, head_learning_rate=0.1)
    for _ in range(60):
        net.zero_grad()
        output = masked_loss(net, mask, samples)
        output.loss.backward()
    assert output.metrics["masks/chosen"] == output.metrics["masks/rejected"] == 0
    assert float(output.loss) == pytest.approx(math.log(2), abs=1e-9)
    assert all(float(p.grad.abs().max()) == 0 for p in net.parameters())


@pytest.mark.parametrize("head", ["relu", "sigmoid"])
def test_the_heads_gradient_agrees_with_finite_differences_and_stays_off_the_states(head):
    samples = referenced(model(9), pairs(2))
    net = model(8)
    mask = SparseMask(DPO(beta=0.7), l1=0.05, head=head, head_learning_rate=0.0)
    masked_loss(net, mask, samples)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mask.parameters()[0].copy_(0.1 * torch.randn(1, 16, generator=rng, dtype=torch.float64))
        mask.parameters()[1].fill_(0.4)

    def loss():
        return masked_loss(net, mask, samples).loss

    loss().backward()
    for parameter in mask.parameters():
        for place in range(0, parameter.numel(), 5):
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-6
                up = loss()
                parameter.view(-1)[place] -= 2e-6
                down = loss()
                parameter.view(-1)[place] += 1e-6
            assert float(parameter.grad.view(-1)[place]) == pytest.approx(float(up - down) / 2e-6, abs=1e-7)
    # By hand: masked log-ratios, the masks taken as constants.
    logps = completion_logps(net, [s.group for s in samples], hidden=True)
    with torch.no_grad():
        u = mask.mask(logps)
    D = u * (logps.token - torch.cat([s.reference for s in samples]))
    sums, sizes = logps.total(D), logps.total(u)
    by_hand = -torch.nn.functional.logsigmoid(0.7 * (sums[::2] - sums[1::2])) + 0.05 * (sizes[::2] + sizes[1::2])
    assert float(loss()) == pytest.approx(float(by_hand.mean()), abs=1e-12)
    net.zero_grad()
    loss().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    by_hand.mean().backward()
    assert all(torch.allclose(p.grad, g, atol=1e-10) for p, g in zip(net.parameters(), got, strict=True))


def test_what_a_masked_objective_does_is_foretold():
    net = model(8)
    samples = referenced(model(9), pairs(2))
    mask = SparseMask(l1=0.01, head=torch.nn.Sequential(torch.nn.Linear(16, 1), torch.nn.Sigmoid()).double(),
                      head_learning_rate=0.0)  # fmt: skip
    for sample in samples:
        (found,) = diagnose(net, [sample], objective=mask).pairs
        size = 1e-4 / abs(found.margin_change)
        up, down = step(net, (sample, lambda m, s=sample: masked_loss(m, mask, [s]).loss.backward()), size)
        assert up == pytest.approx(size * found.chosen_change, abs=2e-6)
        assert down == pytest.approx(size * found.rejected_change, abs=2e-6)


def test_log_probabilities_without_a_graph_are_judged_unmasked_and_states_are_asked_for():
    samples = referenced(model(9), pairs(2))
    net = model(8)
    with pytest.raises(UserError, match="hidden=True"):
        objective_output(net, SparseMask(), samples, hidden=False)
    with torch.no_grad():
        assert torch.equal(
            objective_output(net, SparseMask(), samples, hidden=False).losses,
            objective_output(net, DPO(), samples).losses,
        )


def common_length(a, b):
    """Of a longest common subsequence, by trying all subsequences."""
    from itertools import combinations

    def inside(part, whole):
        rest = iter(whole)
        return all(token in rest for token in part)

    return max(n for n in range(len(a) + 1) for part in combinations(a, n) if inside(part, b))


def test_common_tokens_are_a_longest_common_subsequence():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (tuple(rng.integers(3, 7, rng.integers(1, 8)).tolist()) for _ in range(2))
        (marked,) = mark_different([Sample(Group((1,), (a, b)), (1.0, 0.0))])
        kept = [
            [token for token, mark in zip(own, marks, strict=False) if not mark]
            for own, marks in zip((a, b), marked.columns["different"], strict=True)
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == common_length(a, b)


def test_the_common_token_mask_judges_by_the_tokens_that_differ():
    prompt = (1, 4, 5)
    samples = [
        Sample(Group(prompt, ((6, 9, 10, 11), (7, 9, 10, 11))), (1.0, 0.0)),
        Sample(Group(prompt, ((6, 8), (6, 9, 8))), (1.0, 0.0)),
    ]
    marked = mark_different(referenced(model(9), samples))
    assert marked[0].columns["different"] == ((1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))
    assert marked[1].columns["different"] == ((0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0))
    assert samples[0].columns == {}
    net, judge = model(8), CommonTokenMask(DPO(beta=0.3))
    losses = objective_output(net, judge, marked).losses
    now, then = (
        completion_logps(net, [s.group for s in samples]),
        completion_logps(model(9), [s.group for s in samples]),
    )
    D = (now.token - then.token).detach()
    expected = [-torch.nn.functional.logsigmoid(0.3 * (D[0] - D[4])), -torch.nn.functional.logsigmoid(-0.3 * D[11])]
    assert torch.allclose(losses.detach(), torch.stack(expected), atol=1e-9)
    assert judge.name == "dpo-common-token-mask"
    with pytest.raises(UserError, match="different"):
        objective_output(net, judge, referenced(net, samples))


# trainers


def rows(count=16):
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(f"w{i}" for i in rng.integers(20, size=n))

    return [{"prompt": text(3) + " ", "chosen": text(4), "rejected": text(3)} for _ in range(count)]


def ids(text):
    return [3 + int(word[1:]) for word in text.split()]


def test_the_callback_measures_in_trls_dpo_trainer_and_says_what_falls(tmp_path, caplog):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    net = model(2, double=False)
    start = copy.deepcopy(net)
    callback = EntanglementCallback(rows()[:4], every=2)
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=3e-2, beta=0.2, bf16=False,
        gradient_checkpointing=False, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=100,
        save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        net,
        ref_model=copy.deepcopy(net),
        args=arguments,
        train_dataset=Dataset.from_list(rows()),
        processing_class=TOKENIZER,
        callbacks=[callback],
    )
    with caplog.at_level(logging.WARNING, logger="counterproof.preference.gradient_entanglement"):
        trainer.train()
    assert [row["step"] for row in callback.history] == [0, 2, 4]
    assert callback.history[0]["chosen_gain"] == pytest.approx(0, abs=1e-5)
    tokenised = [
        Sample(Group((1, *ids(row["prompt"])), ((*ids(row["chosen"]), 2), (*ids(row["rejected"]), 2))), (1.0, 0.0))
        for row in rows()[:4]
    ]
    now = np.mean([sequence_logps(trainer.model, s).tolist() for s in tokenised], axis=0)
    then = np.mean([sequence_logps(start, s).tolist() for s in tokenised], axis=0)
    last = callback.history[-1]
    assert [last["chosen_gain"], last["rejected_gain"]] == pytest.approx((now - then).tolist(), abs=1e-3)
    kept = [row for row in trainer.state.log_history if "entanglement/synchronised" in row]
    assert [row["step"] for row in kept] == [0, 2, 4]
    json.dumps(trainer.state.log_history)


def test_the_callbacks_message_has_the_words_that_users_search_for(caplog):
    net = model(2)
    callback = EntanglementCallback(pairs(3), every=1, objective=SimPO())
    state = SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True)
    callback.on_train_begin(None, state, None, model=net)
    with torch.no_grad():
        net.lm_head.weight.mul_(200)  # certain of something, which random answers are not
    state.global_step = 1
    with caplog.at_level(logging.WARNING, logger="counterproof.preference.gradient_entanglement"):
        callback.on_step_end(None, state, None, model=net)
        callback.on_step_end(None, state, None, model=net)
    assert callback.history[-1]["chosen_gain"] < 0
    assert callback.history[-1]["rejected_gain"] < 0
    (message,) = [r.message for r in caplog.records]  # once
    assert "chosen log-probs fall" in message
    assert "rewards/chosen" in message
    assert "2410.13828" in message


def test_the_callback_takes_the_loss_from_trls_arguments_or_asks_for_it():
    for kind, expected in {"sigmoid": DPO, "hinge": Hinge, "ipo": IPO, "robust": objectives.RobustDPO}.items():
        callback = EntanglementCallback(pairs(1))
        arguments = SimpleNamespace(loss_type=[kind], beta=0.3, label_smoothing=0.1)
        state = SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True)
        callback.on_train_begin(arguments, state, None, model=model())
        assert type(callback._used) is expected
        assert getattr(callback._used, "beta", 0.3) == 0.3
    with pytest.raises(ValueError, match="exo_pair"):
        EntanglementCallback(pairs(1)).on_train_begin(
            SimpleNamespace(loss_type=["exo_pair"], beta=0.1, label_smoothing=0.1), None, None, model=model()
        )
    with pytest.raises(ValueError, match="every"):
        EntanglementCallback(pairs(1), every=0)


def test_trls_robust_and_ipo_losses_have_our_weights():
    """The weights of a margin loss come out of TRL's own formula, evaluated on two free numbers."""
    D = torch.tensor([-0.4, 0.9], dtype=torch.float64, requires_grad=True)
    logps = Logps(D, torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    reference = logps.with_tokens(torch.zeros(2))
    batch = Batch(torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    delta = D[0] - D[1]
    robust = (
        -0.9 * torch.nn.functional.logsigmoid(0.3 * delta) + 0.1 * torch.nn.functional.logsigmoid(-0.3 * delta)
    ) / 0.8
    ours = objectives.RobustDPO(beta=0.3, label_smoothing=0.1)(logps, reference, batch).loss
    assert float(ours) == pytest.approx(float(robust))


# bad input


def test_bad_input_is_named():
    net = model()
    with pytest.raises(ValueError, match="at least one token"):
        Sample(Group((1,), ((5,), ())), (1.0, 0.0))
    with pytest.raises(ValueError, match="no pair"):
        diagnose(net, [])
    with pytest.raises(UserError, match="completions"):
        diagnose(net, [Sample(Group((1,), ((5,),)), (1.0,))])
    with pytest.raises(UserError, match="same score"):
        diagnose(net, [Sample(Group((1,), ((5,), (6,))), (1.0, 1.0))])
    with pytest.raises(ValueError, match="Language"):
        diagnose(net, rows(1))
    with pytest.raises(TypeError, match="int"):
        diagnose(net, [3])
    with pytest.raises(ValueError, match="fits none of the"):
        diagnose(net, pairs(1), params="lora")
    with pytest.raises(ValueError, match="regular expression"):
        diagnose(net, pairs(1), params="(")
    with pytest.raises(ValueError, match="sketch_dim"):
        diagnose(net, pairs(1), sketch_dim=0)
    with pytest.raises(ValueError, match="call referenced"):
        PairwiseNormalized(net).backward(pairs(1))
    with pytest.raises(ValueError, match="one by one"):
        PairwiseNormalized(net, KTO()).backward(referenced(net, pairs(1)))
    with pytest.raises(ValueError, match="requires a gradient"):
        diagnose(model().requires_grad_(False), pairs(1))
    with pytest.raises(ValueError, match="requires a gradient"):
        PairwiseNormalized(model().requires_grad_(False))
    with pytest.raises(ValueError, match="l1"):
        SparseMask(l1=-1.0)
    with pytest.raises(ValueError, match="head"):
        SparseMask(head="softmax")
    with pytest.raises(TypeError, match="Objective"):
        SparseMask("dpo")
    empty = Example(prompt="w1 ", completions=("w2", ""), scores=(1.0, 0.0), kind="pair")
    bare = tiny_tokenizer(WORDS)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no token of its own"):
        diagnose(Language(net, bare), [empty])
