"""The room's objectives: hand-computed values, finite differences, TRL's own losses, limits."""

import math

import numpy as np
import pytest
import torch
from trl import DPOConfig, DPOTrainer

from counterproof.errors import UserError
from counterproof.language import Group, Logps
from counterproof.language.tiny import TinyWorld, tiny_model
from counterproof.preference import (
    CPO,
    DPO,
    DPOP,
    IPO,
    KTO,
    ORPO,
    RDPO,
    RRHF,
    SFT,
    Batch,
    Hinge,
    RobustDPO,
    Sample,
    SimPO,
    SLiC,
)
from counterproof.preference.data import Example
from counterproof.preference.forward import mean_ratio, mismatched, objective_output, optimise, referenced
from counterproof.preference.trainer import methods, prepare

PAIRWISE = [DPO(0.3), DPO(0.3, 0.1), RobustDPO(0.3, 0.2), Hinge(0.3), SLiC(1.0, 0.2), IPO(0.2), IPO(0.2, True),
            RDPO(0.2, 0.05), DPOP(0.2, 5.0), SimPO(2.0, 0.5), CPO(0.2, 0.7), ORPO(0.3)]  # fmt: skip
names = pytest.mark.parametrize("objective", PAIRWISE, ids=lambda o: str(o))


def sig(x):
    return 1 / (1 + math.exp(-x))


def groups_of(lengths):
    """One group for each tuple of completion lengths; what the tokens are does not matter."""
    return [Group((1,), tuple((2,) * n for n in own)) for own in lengths]


def logps(groups, seed):
    draw = torch.Generator().manual_seed(seed)
    count = sum(len(c) for g in groups for c in g.completions)
    return Logps.of(groups, -torch.rand(count, generator=draw, dtype=torch.float64) * 2 - 0.05)


def batch_of(groups, scores):
    return Batch.of([Sample(g, s) for g, s in zip(groups, scores, strict=True)])


LENGTHS = [(3, 5), (2, 2), (6, 1), (4, 7)]
SCORES = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, 1.0)]


def by_hand(objective, policy, reference):
    """Each objective's loss, pair by pair, in plain Python."""
    s, r = policy.sum().tolist(), reference.sum().tolist()
    n = policy.lengths.tolist()
    losses = []
    for index, (first, _) in enumerate(SCORES):
        w, l = (2 * index, 2 * index + 1) if first == 1.0 else (2 * index + 1, 2 * index)  # noqa: E741
        dw, dl, mw, ml = s[w] - r[w], s[l] - r[l], s[w] / n[w], s[l] / n[l]
        match objective:
            case RobustDPO(beta, eps):
                x = beta * (dw - dl)
                losses.append((-(1 - eps) * math.log(sig(x)) + eps * math.log(sig(-x))) / (1 - 2 * eps))
            case DPO(beta, eps):
                x = beta * (dw - dl)
                losses.append(-(1 - eps) * math.log(sig(x)) - eps * math.log(sig(-x)))
            case Hinge(beta):
                losses.append(max(0.0, 1 - beta * (dw - dl)))
            case SLiC(delta, weight):
                losses.append(max(0.0, delta - s[w] + s[l]) - weight * mw)
            case IPO(tau, mean):
                gap = dw / n[w] - dl / n[l] if mean else dw - dl
                losses.append((gap - 1 / (2 * tau)) ** 2)
            case RDPO(beta, alpha):
                losses.append(-math.log(sig(beta * (dw - dl) + alpha * (n[w] - n[l]))))
            case DPOP(beta, weight):
                losses.append(-math.log(sig(beta * (dw - dl - weight * max(0.0, -dw)))))
            case SimPO(beta, gamma):
                losses.append(-math.log(sig(beta * (mw - ml) - gamma)))
            case CPO(beta, alpha):
                losses.append(-math.log(sig(beta * (s[w] - s[l]))) - alpha * mw)
            case ORPO(weight):
                odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in (mw, ml)]
                losses.append(-mw - weight * math.log(sig(odds[0] - odds[1])))
    return losses


@names
def test_losses_equal_those_computed_by_hand(objective):
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    output = objective(policy, reference, batch_of(groups, SCORES))
    np.testing.assert_allclose(output.losses.tolist(), by_hand(objective, policy, reference), rtol=1e-9)
    assert float(output.loss) == pytest.approx(np.mean(by_hand(objective, policy, reference)))
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= set(output.metrics)


@pytest.mark.parametrize("objective", [*PAIRWISE, KTO(0.3, 1.2, 0.8), SFT(), RRHF()], ids=lambda o: str(o))
def test_gradients_equal_finite_differences(objective):
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    baseline = torch.tensor(0.1, dtype=torch.float64)
    batch = batch_of(groups, SCORES)
    batch = Batch(batch.group, batch.score, baseline=baseline)

    def loss(token):
        return objective(Logps.of(groups, token), reference, batch).loss

    assert torch.autograd.gradcheck(loss, policy.token.clone().requires_grad_())


@names
def test_padding_order_and_companions_do_not_matter(objective):
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    whole = objective(policy, reference, batch_of(groups, SCORES)).losses
    at = 0
    for index, own in enumerate(LENGTHS):
        size = sum(own)
        part = [groups[index]]
        one = objective(
            Logps.of(part, policy.token[at : at + size]),
            Logps.of(part, reference.token[at : at + size]),
            batch_of(part, SCORES[index : index + 1]),
        )
        torch.testing.assert_close(one.losses, whole[index : index + 1])
        at += size


def test_where_policy_and_reference_agree_dpo_is_log_2_and_its_gradient_half_beta():
    groups = groups_of(LENGTHS)
    reference = logps(groups, 1)
    token = reference.token.clone().requires_grad_()
    output = DPO(0.3)(Logps.of(groups, token), reference, batch_of(groups, SCORES))
    assert float(output.loss.detach()) == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(output.loss, token)
    owner = reference.owner
    for index, (first, _) in enumerate(SCORES):
        chosen, rejected = (2 * index, 2 * index + 1) if first == 1.0 else (2 * index + 1, 2 * index)
        torch.testing.assert_close(
            gradient[owner == chosen], torch.full((int((owner == chosen).sum()),), -0.15 / 4).double()
        )
        torch.testing.assert_close(
            gradient[owner == rejected], torch.full((int((owner == rejected).sum()),), 0.15 / 4).double()
        )


def test_relations_between_objectives():
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    nothing = policy.with_tokens(torch.zeros_like(policy.token))
    batch = batch_of(groups, SCORES)

    def losses(objective, reference=reference):
        return objective(policy, reference, batch).losses

    torch.testing.assert_close(losses(CPO(0.2, 0.0)), losses(DPO(0.2), nothing))
    torch.testing.assert_close(losses(RDPO(0.2, 0.0)), losses(DPO(0.2)))
    torch.testing.assert_close(losses(DPOP(0.2, 0.0)), losses(DPO(0.2)))
    torch.testing.assert_close(losses(RobustDPO(0.2, 0.0)), losses(DPO(0.2)))
    # The mean of robust DPO over flips of known probability is DPO on the clean labels.
    flipped = batch_of(groups, [(b, a) for a, b in SCORES])
    robust = RobustDPO(0.2, 0.3)
    mixed = 0.7 * robust(policy, reference, batch).losses + 0.3 * robust(policy, reference, flipped).losses
    torch.testing.assert_close(mixed, losses(DPO(0.2)))


def test_kto_by_hand_and_its_reference_point_carries_no_gradient():
    groups = groups_of(LENGTHS)
    policy, reference = logps(groups, 0), logps(groups, 1)
    batch = batch_of(groups, SCORES)
    for point in (-0.4, 0.3):
        baseline = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        output = KTO(0.5, 1.5, 0.5)(policy, reference, Batch(batch.group, batch.score, baseline=baseline))
        z = max(point, 0.0)
        ratio = (policy.sum() - reference.sum()).tolist()
        flat = [score for own in SCORES for score in own]
        expected = [
            1.5 * (1 - sig(0.5 * (d - z))) if score == 1.0 else 0.5 * (1 - sig(0.5 * (z - d)))
            for d, score in zip(ratio, flat, strict=True)
        ]
        np.testing.assert_allclose(output.losses.tolist(), expected, rtol=1e-9)
        assert not output.loss.requires_grad
    with pytest.raises(UserError, match="mismatched"):
        KTO()(policy, reference, batch)


def test_rrhf_and_sft_by_hand_with_unequal_numbers_and_ties():
    groups = groups_of([(3, 2, 4), (5, 1), (2, 2, 2, 2)])
    scores = [(0.2, 0.9, 0.2), (3.0, 1.0), (1.0, 1.0, 0.0, 2.0)]
    policy = logps(groups, 2)
    mean, sums, at, ranking, likelihood = policy.mean().tolist(), policy.sum().tolist(), 0, [], []
    for own in scores:
        k = len(own)
        total = sum(max(0.0, mean[at + j] - mean[at + i]) for i in range(k) for j in range(k) if own[i] > own[j])
        best = at + own.index(max(own))
        ranking.append(total - sums[best])
        likelihood.append(-mean[best])
        at += k
    batch = batch_of(groups, scores)
    np.testing.assert_allclose(RRHF()(policy, None, batch).losses.tolist(), ranking, rtol=1e-9)
    np.testing.assert_allclose(SFT()(policy, None, batch).losses.tolist(), likelihood, rtol=1e-9)


@names
def test_extreme_log_probabilities_stay_finite(objective):
    groups = groups_of([(2, 2), (2, 2)])
    for first, second in ((-1e4, -1e-9), (-1e-9, -1e4), (0.0, 0.0)):
        token = torch.tensor([first, first, second, second] * 2, requires_grad=True)
        reference = Logps.of(groups, torch.full((8,), -1.0))
        output = objective(Logps.of(groups, token), reference, batch_of(groups, [(1.0, 0.0), (0.0, 1.0)]))
        (gradient,) = torch.autograd.grad(output.loss, token)
        assert bool(torch.isfinite(output.loss))
        assert bool(torch.isfinite(gradient).all())


# TRL's own losses


def world_data(count=12):
    world = TinyWorld()
    rng = np.random.default_rng(0)
    return [
        {"prompt": prompt, "chosen": world.answer(rng, prompt), "rejected": world.answer(rng, prompt)}
        for prompt in world.prompts(rng, count)
    ]


def trl_loss(rows, tmp_path, **settings):
    """TRL's loss on one batch, for two random models; and ours on the same rows."""
    from datasets import Dataset

    tokenizer = TinyWorld().tokenizer()
    policy, reference = tiny_model(tokenizer, seed=1), tiny_model(tokenizer, seed=2)
    for model in (policy, reference):
        for parameter in model.parameters():
            parameter.data *= 3  # so that the two differ by nats
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_dropout=True,
        **settings,
    )
    trainer = DPOTrainer(
        policy, reference, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, _ = trainer._compute_loss(policy.train(), inputs, True)
    examples = [
        Example(prompt=r["prompt"], completions=(r["chosen"], r["rejected"]), scores=(1.0, 0.0), kind="pair")
        for r in rows
    ]
    samples, notes = prepare(examples, tokenizer, max_length=64)
    assert not notes
    return loss, policy, referenced(reference, samples), trainer


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        (dict(loss_type="sigmoid", beta=0.2), DPO(0.2)),
        (dict(loss_type="robust", beta=0.2, label_smoothing=0.1), RobustDPO(0.2, 0.1)),
        (dict(loss_type="hinge", beta=0.2), Hinge(0.2)),
        (dict(loss_type="ipo", beta=0.2), IPO(0.2, length_normalize=True)),
    ],
    ids=lambda value: str(value),
)
def test_loss_and_gradient_equal_trls(settings, objective, tmp_path):
    theirs, policy, samples, _ = trl_loss(world_data(), tmp_path, **settings)
    output = objective_output(policy, objective, samples)
    torch.testing.assert_close(output.loss, theirs, atol=1e-5, rtol=1e-5)
    parameters = list(policy.parameters())
    ours, expected = (torch.autograd.grad(loss, parameters) for loss in (output.loss, theirs))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_cpo_simpo_and_orpo_equal_trls_formulas():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    groups = groups_of(LENGTHS)
    policy = logps(groups, 0)
    batch = batch_of(groups, SCORES)
    chosen, rejected = batch.pairs()

    class Shell:
        """What their loss functions read of a trainer."""

        alpha, label_smoothing = 0.0, 0.0
        accelerator = type("", (), {"device": "cpu"})()

        def __init__(self, **settings):
            self.__dict__.update(settings)

    sums, mean = policy.sum(), policy.mean()
    theirs = CPOTrainer.cpo_loss(Shell(loss_type="sigmoid", beta=0.2), sums[chosen], sums[rejected])[0]
    ours = CPO(0.2, 0.0)(policy, None, batch)
    torch.testing.assert_close(ours.losses, theirs)
    theirs = CPOTrainer.cpo_loss(Shell(loss_type="simpo", beta=2.0, simpo_gamma=0.5), mean[chosen], mean[rejected])[0]
    torch.testing.assert_close(SimPO(2.0, 0.5)(policy, None, batch).losses, theirs)
    theirs = ORPOTrainer.odds_ratio_loss(Shell(beta=0.3), mean[chosen], mean[rejected])[0]
    found = ORPO(0.3)(policy, None, batch).losses
    torch.testing.assert_close(found.float(), (-mean[chosen] - theirs).float(), atol=1e-6, rtol=1e-6)


# what is given


def test_the_loop_trains_and_a_bad_number_stops_it():
    world = TinyWorld()
    tokenizer = world.tokenizer()
    model = tiny_model(tokenizer, seed=0)
    rows = world_data(16)
    examples = [
        Example(prompt=r["prompt"], completions=(r["chosen"], r["rejected"]), scores=(1.0, 0.0), kind="pair")
        for r in rows
    ]
    samples = referenced(model, prepare(examples, tokenizer, max_length=64)[0])
    first = float(objective_output(model, DPO(0.5), samples).loss.detach())
    state = torch.get_rng_state()
    optimise(model, DPO(0.5), samples, steps=20, batch=8, learning_rate=3e-3, rng=np.random.default_rng(0))
    assert torch.equal(state, torch.get_rng_state())
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert float(objective_output(model, DPO(0.5), samples).loss.detach()) < 0.5
    optimise(model, KTO(0.5), samples, steps=2, batch=8, learning_rate=1e-3, rng=np.random.default_rng(0))
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="step 1: the loss is nan"):
        optimise(model, DPO(0.5), samples, steps=2, batch=8, learning_rate=1e-3, rng=np.random.default_rng(0))


def test_the_mismatched_ratio_is_zero_at_the_start_and_prompts_move_by_one():
    tokenizer = TinyWorld().tokenizer()
    model = tiny_model(tokenizer, seed=0)
    samples = [Sample(Group((i + 3,), ((i + 4, 2), (5, 2))), (1.0, 0.0)) for i in range(4)]
    strangers = mismatched(samples)
    assert [s.group.prompt for s in strangers] == [(4,), (5,), (6,), (3,)]
    assert [s.group.completions for s in strangers] == [((i + 4, 2),) for i in range(4)]
    assert float(mean_ratio(model, referenced(model, strangers))) == pytest.approx(0.0, abs=1e-6)


def test_what_is_missing_or_does_not_fit_is_named():
    groups = groups_of([(1, 2, 3), (1, 2)])
    policy = logps(groups, 0)
    three = Batch.of([Sample(groups[0], (3.0, 2.0, 1.0), where="a.jsonl:7"), Sample(groups[1], (1.0, 0.0))])
    with pytest.raises(UserError, match=r"a.jsonl:7: has 3 completions.*to_pairs"):
        SimPO()(policy, None, three)
    tie = Batch.of([Sample(groups[1], (1.0, 1.0), where="b.jsonl:2")])
    with pytest.raises(UserError, match=r"b.jsonl:2: has two completions with the same score"):
        tie.pairs()
    pair = Batch.of([Sample(groups[1], (1.0, 0.0))])
    with pytest.raises(UserError, match="reference"):
        DPO()(logps([groups[1]], 0), None, pair)
    with pytest.raises(UserError, match=r"needs the column 'margins'.*columns: none"):
        pair.column("margins")
    with pytest.raises(UserError, match=r"c.jsonl:1: no column 'weight'"):
        Batch.of([Sample(groups[1], (1.0, 0.0), {"weight": (1, 2)}), Sample(groups[1], (1.0, 0.0), where="c.jsonl:1")])
    model = tiny_model(TinyWorld().tokenizer(), seed=0)
    with pytest.raises(ValueError, match="no reference"):
        objective_output(model, DPO(), [Sample(Group((3,), ((4,), (5,))), (1.0, 0.0))])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPO(0.0), lambda: DPO(float("nan")), lambda: DPO(0.1, 0.5), lambda: Hinge(-1.0), lambda: SLiC(0.0),
        lambda: IPO(0.0), lambda: RDPO(0.1, -1.0), lambda: DPOP(0.1, -1.0), lambda: SimPO(0.0),
        lambda: SimPO(2.0, -0.1),        lambda: CPO(0.1, -1.0), lambda: ORPO(0.0), lambda: KTO(0.0),
    ],
)  # fmt: skip
def test_hyper_parameters_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_every_objective_is_a_method():
    assert {
        "dpo",
        "ipo",
        "kto",
        "slic",
        "simpo",
        "orpo",
        "cpo",
        "r-dpo",
        "robust-dpo",
        "hinge",
        "dpop",
        "rrhf",
        "sft",
    } <= set(methods())
