"""From samples to an objective's value under a model, and plain loops around it.

Everything that trains here, the trainer included, goes through `objective_output`: one place where policy, reference
and mismatched completions are scored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from counterproof.errors import extra

with extra("preference"):
    import numpy as np
    import torch
    from torch import Tensor, nn

from counterproof.language import Group, Logps, batches, completion_logps
from counterproof.preference.objectives import Batch, Objective, Output, Sample

__all__ = ["mean_ratio", "mismatched", "objective_output", "optimise", "reference_logps", "referenced"]


def objective_output(
    model: nn.Module,
    objective: Objective,
    samples: Sequence[Sample],
    *,
    baseline: Tensor | None = None,
    **scoring: Any,
) -> Output:
    """Score samples under the model and let the objective judge them; differentiable.

    Args:
        model: the policy.
        objective: its `needs` are met, or said to be missing.
        samples: with their references where the objective needs one, see `referenced`.
        baseline: (), KTO's reference point: the `mean_ratio` of the batch's `mismatched` samples.
        scoring: of `completion_logps`, such as ``prefixes``.

    Raises:
        UserError: a column that the objective needs is not there.
        ValueError: a sample without reference, naming the row.
    """
    scoring.setdefault("hidden", "hidden" in objective.needs)
    policy = completion_logps(model, [sample.group for sample in samples], **scoring)
    reference = None
    if "reference" in objective.needs:
        missing = next((sample for sample in samples if sample.reference is None), None)
        if missing is not None:
            raise ValueError(f"{missing.where or 'a sample'} has no reference log-probabilities; call referenced first")
        reference = policy.with_tokens(torch.cat([sample.reference for sample in samples]))  # type: ignore[misc]
    return objective(policy, reference, Batch.of(samples, policy.token.device, baseline))


def referenced(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_tokens: int = 4096,
    watch: Callable[[int], None] | None = None,
    **scoring: Any,
) -> list[Sample]:
    """The samples with the model's log-probabilities as their reference, on the processor; in eval mode, no gradient.

    Args:
        model: the reference as it is now. For a peft model call this inside ``model.disable_adapter()``.
        samples: any reference they have is replaced.
        batch_tokens: tokens in one forward pass, about.
        watch: is told after each pass how many samples are done.
        scoring: of `completion_logps`.
    """
    training = model.training
    model.eval()
    done: list[Sample] = []
    try:
        with torch.no_grad():
            for run in batches([sample.group for sample in samples], batch_tokens):
                part = [samples[index] for index in run]
                token = completion_logps(model, [sample.group for sample in part], **scoring).token.cpu()
                sizes = [sum(map(len, sample.group.completions)) for sample in part]
                done += [
                    replace(sample, reference=own.clone()) for sample, own in zip(part, token.split(sizes), strict=True)
                ]
                if watch is not None:
                    watch(len(done))
    finally:
        model.train(training)
    return done


def mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample's first completion under the next sample's prompt: what KTO measures its reference point on."""
    following = [*samples[1:], samples[0]]
    return [
        Sample(Group(after.group.prompt, sample.group.completions[:1]), (0.0,), where=sample.where)
        for sample, after in zip(samples, following, strict=True)
    ]


def mean_ratio(model: nn.Module, samples: Sequence[Sample], *, batch_tokens: int = 4096) -> Tensor:
    """(): the mean of ``D`` over the completions of samples that have references; no gradient."""
    now = reference_logps(referenced(model, samples, batch_tokens=batch_tokens))
    ratio: Tensor = (now.sum() - reference_logps(samples).sum()).mean()
    return ratio


def optimise(
    model: nn.Module,
    objective: Objective,
    samples: Sequence[Sample],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    rng: np.random.Generator,
    warmup: int = 5,
    watch: Callable[[int, Output], None] | None = None,
) -> None:
    """Minimise an objective over samples by AdamW, in place: the plain loop, for models that need nothing more.

    Batches walk through the samples in an order that is shuffled for every pass; the rate warms up and stays; gradients
    are clipped to norm 1. Dropout is off.

    Args:
        model: the policy; its parameters that require gradients are trained.
        objective, samples: see `objective_output`. KTO's mismatched samples take the model as it comes for reference.
        steps, batch, learning_rate, warmup: batch counts samples.
        rng: for the order of the samples.
        watch: is told after each step its number, from 1, and the output.

    Raises:
        ArithmeticError: a loss or gradient that is not finite, naming the step and the batch's first row.
    """
    strangers: list[Sample] = []
    if "baseline" in objective.needs:
        strangers = referenced(model, mismatched(samples))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    training = model.training
    model.eval()
    order: list[int] = []
    try:
        for step in range(1, steps + 1):
            while len(order) < batch:
                order += rng.permutation(len(samples)).tolist()
            picked, order = order[:batch], order[batch:]
            baseline = mean_ratio(model, [strangers[index] for index in picked]) if strangers else None
            output = objective_output(model, objective, [samples[index] for index in picked], baseline=baseline)
            optimizer.zero_grad()
            output.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            value = float(output.loss.detach())
            if not (math.isfinite(float(norm)) and math.isfinite(value)):
                raise ArithmeticError(f"step {step}: the loss is {value}, its gradient's norm {float(norm)}")
            optimizer.step()
            rate.step()
            if watch is not None:
                watch(step, output)
    finally:
        model.train(training)


def reference_logps(samples: Sequence[Sample]) -> Logps:
    """The references of samples as one `Logps`."""
    groups = [sample.group for sample in samples]
    return Logps.of(groups, torch.cat([sample.reference for sample in samples]))  # type: ignore[misc]
