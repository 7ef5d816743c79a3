"""Gradient entanglement: when a loss on the margin moves chosen and rejected log-probabilities the same way.

Paper: arXiv 2410.13828 (ICLR 2025).
Read beside: HumainLab/Understand_MarginPO (analysis/grad_plot.py, analysis/grad_heatmap_1.py, dpo.py, cpo.py); neither
    of the two remedies is in it.
Deviations: the slopes of the loss come from automatic differentiation, not from a table of losses; the ratio divides by
    the smaller of both squared norms, where the official script takes the chosen one twice. Ours: the length of the
    normalised step (geometric mean of the two halves), the mask head (linear, on detached states, cut to [0, 1],
    trained in the backward pass) since the paper leaves it open, the mask by common subsequence, sketches, Adam's
    weights.
"""

import html
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import UserError, extra

with extra("preference"):
    import torch
    from torch import Tensor, nn
    from transformers import TrainerCallback

from counterproof.language import Language, Logps, completion_logps
from counterproof.preference.data import Example, encode
from counterproof.preference.forward import mean_ratio, mismatched, referenced
from counterproof.preference.objectives import (
    DPO,
    IPO,
    SFT,
    Batch,
    Hinge,
    Objective,
    Output,
    RobustDPO,
    Sample,
    not_negative,
)

__all__ = [
    "CommonTokenMask",
    "Entanglement",
    "EntanglementCallback",
    "HeatMap",
    "PairEntanglement",
    "PairwiseNormalized",
    "SparseMask",
    "diagnose",
    "mark_different",
    "token_heatmap",
]

Regime = Literal["desired", "both up", "both down", "opposite", "still"]
Pair = Sample | Example | Mapping[str, Any]
REGIMES: tuple[Regime, ...] = ("desired", "both up", "both down", "opposite", "still")
CHUNK = 1 << 20  # coordinates of a sketch that are hashed at a time
logger = logging.getLogger(__name__)


# the numbers


@dataclass(frozen=True)
class PairEntanglement:
    """First-order consequences of a gradient step for the two log-probabilities of a pair.

    With ``a`` and ``b`` the gradients of the chosen and the rejected log-probability (summed over tokens), a loss of
    the pair has the gradient ``-(d_w a - d_l b)``. A step of size eta against it changes the chosen log-probability by
    ``eta (d_w |a|^2 - d_l <a, b>)`` and the rejected one by ``eta (d_w <a, b> - d_l |b|^2)`` (arXiv 2410.13828).

    Attributes:
        chosen_norm, rejected_norm: ``|a|`` and ``|b|``.
        inner: ``<a, b>``.
        chosen_weight, rejected_weight: ``d_w = -dloss/ds_w`` and ``d_l = dloss/ds_l``; means over tokens for objectives
            that weigh tokens.
        chosen_change, rejected_change: of the log-probabilities, in nats per unit of eta.
        standard_error: of `inner`, for sketches; 0 when it is exact.
        resolution: changes no larger than this cannot be told from rounding.
        where: what was compared.
    """

    chosen_norm: float
    rejected_norm: float
    inner: float
    chosen_weight: float
    rejected_weight: float
    chosen_change: float
    rejected_change: float
    standard_error: float = 0.0
    resolution: float = 0.0
    where: str = ""

    @classmethod
    def of(
        cls,
        chosen_norm: float,
        rejected_norm: float,
        inner: float,
        chosen_weight: float = 1.0,
        rejected_weight: float = 1.0,
        **more: Any,
    ) -> "PairEntanglement":
        """From the two norms, the inner product, and the loss's weights ``d_w`` and ``d_l``."""
        up = chosen_weight * chosen_norm**2 - rejected_weight * inner
        down = chosen_weight * inner - rejected_weight * rejected_norm**2
        return cls(chosen_norm, rejected_norm, inner, chosen_weight, rejected_weight, up, down, **more)

    @property
    def cosine(self) -> float:
        """Of the angle between the two gradients; 0 when one of them is zero."""
        lengths = self.chosen_norm * self.rejected_norm
        return self.inner / lengths if lengths else 0.0

    @property
    def ratio(self) -> float:
        """``<a, b> / min(|a|^2, |b|^2)``: up to 1 the pair moves as desired, if ``d_w = d_l``; 0 for zero gradients."""
        least = min(self.chosen_norm, self.rejected_norm) ** 2
        return self.inner / least if least else 0.0

    @property
    def margin_change(self) -> float:
        """Of chosen minus rejected log-probability, in nats per unit of eta."""
        return self.chosen_change - self.rejected_change

    @property
    def regime(self) -> Regime:
        """``"desired"`` (chosen does not fall, rejected does not rise), ``"both up"``, ``"both down"``, ``"opposite"``
        (never for a loss whose weights are positive and equal), or ``"still"`` when neither moves."""
        up, down = (
            0.0 if abs(change) <= self.resolution else change for change in (self.chosen_change, self.rejected_change)
        )
        if up == down == 0:
            return "still"
        if up >= 0 >= down:
            return "desired"
        if up <= 0 <= down:
            return "opposite"
        return "both up" if up > 0 else "both down"

    @property
    def synchronised(self) -> bool:
        """Whether both log-probabilities move the same way."""
        return self.regime in ("both up", "both down")

    def as_json(self) -> dict[str, Any]:
        """All figures by name, as what `json.dumps` takes."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "resolution"}
        derived = ("cosine", "ratio", "margin_change", "regime")
        return {**fields, **{name: getattr(self, name) for name in derived}}


class HeatMap(NamedTuple):
    """Inner products of the gradients of single tokens' log-probabilities.

    Attributes:
        inner: (chosen tokens, rejected tokens), float64; they sum to the pair's inner product.
        cosines: the same over the gradients' norms; 0 where one is zero.
        chosen, rejected: token ids.
    """

    inner: NDArray[np.float64]
    cosines: NDArray[np.float64]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    def svg(self, tokenizer: Any = None) -> str:
        """The cosines as a picture: red 1, white 0, blue -1; rows are chosen tokens, columns rejected ones.

        Args:
            tokenizer: to write tokens instead of their numbers.
        """
        cell, left, top = 28, 110, 110
        rows, columns = self.cosines.shape
        names = [
            [
                html.escape(repr(tokenizer.decode([token]))[1:-1] if tokenizer is not None else str(token))
                for token in ids
            ]
            for ids in (self.chosen, self.rejected)
        ]
        width, height = left + cell * columns + 10, top + cell * rows + 10
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12" role="img">'
            "<title>Cosines of token gradients: rows are chosen tokens, columns rejected tokens</title>"
        ]
        for i, name in enumerate(names[0]):
            parts.append(f'<text x="{left - 6}" y="{top + cell * i + 18}" text-anchor="end">{name}</text>')
        for j, name in enumerate(names[1]):
            x = left + cell * j + 18
            parts.append(f'<text transform="translate({x} {top - 6}) rotate(-90)">{name}</text>')
        for i in range(rows):
            for j in range(columns):
                value = float(np.clip(self.cosines[i, j], -1, 1))
                fade = round(255 * (1 - abs(value)))
                colour = f"rgb(255,{fade},{fade})" if value >= 0 else f"rgb({fade},{fade},255)"
                parts.append(
                    f'<rect x="{left + cell * j}" y="{top + cell * i}" width="{cell}" height="{cell}" fill="{colour}" '
                    f'stroke="#ccc"><title>{names[0][i]} / {names[1][j]}: {value:.3f}</title></rect>'
                )
        return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Entanglement:
    """What `diagnose` found.

    Attributes:
        pairs: one for each sample.
        batch: the same for the mean gradients, ``A = mean a`` and ``B = mean b``, under a step on the mean loss: what
            the two mean log-probabilities do. None when it was not asked for.
        objective: its name.
    """

    pairs: tuple[PairEntanglement, ...]
    batch: PairEntanglement | None
    objective: str
    _heatmap: Any = field(repr=False, compare=False, default=None)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pairs in each regime."""
        counts = Counter(pair.regime for pair in self.pairs)
        return {regime: counts[regime] / len(self.pairs) for regime in REGIMES}

    @property
    def synchronised(self) -> float:
        """Share of the pairs whose log-probabilities move the same way."""
        return sum(pair.synchronised for pair in self.pairs) / len(self.pairs)

    def table(self) -> str:
        """A line for each pair, one for the batch, and the shares of the regimes; changes are per unit of step size."""
        heads = ("|a|", "|b|", "<a,b>", "cosine", "I/min", "d_w", "d_l", "chosen", "rejected", "regime")
        rows: list[tuple[str, ...]] = [("pair", *heads)]
        named = [(str(index), pair) for index, pair in enumerate(self.pairs)]
        for name, pair in [*named, *([("batch", self.batch)] if self.batch is not None else [])]:
            values = (
                pair.chosen_norm,
                pair.rejected_norm,
                pair.inner,
                pair.cosine,
                pair.ratio,
                pair.chosen_weight,
                pair.rejected_weight,
                pair.chosen_change,
                pair.rejected_change,
            )
            rows.append((name, *(f"{value:.4g}" for value in values), pair.regime))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if errors := [pair.standard_error for pair in self.pairs if pair.standard_error]:
            lines.append(f"<a,b> is estimated; mean standard error {np.mean(errors):.3g}")
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: the shares of the regimes, and the mean cosine."""
        told = ", ".join(f"{share:.0%} {regime}" for regime, share in self.shares.items() if share)
        cosine = np.mean([pair.cosine for pair in self.pairs])
        return f"{len(self.pairs)} pairs under {self.objective}: {told}; mean cosine {cosine:.3f}"

    def as_json(self) -> dict[str, Any]:
        """Everything but heat maps, as what `json.dumps` takes."""
        return {
            "objective": self.objective,
            "shares": self.shares,
            "synchronised": self.synchronised,
            "pairs": [pair.as_json() for pair in self.pairs],
            "batch": self.batch and self.batch.as_json(),
        }

    def heatmap(self, index: int) -> HeatMap:
        """Token by token, for one of the pairs: see `token_heatmap`. Computed now, with the model that was diagnosed.

        Raises:
            RuntimeError: the model's parameters have changed since.
        """
        heatmap: HeatMap = self._heatmap(index)
        return heatmap


# gradients as vectors


class _Space:
    """The vectors that gradients are: of which parameters, weighed by an optimizer or not, whole or sketched.

    A vector is a list of tensors, one for each parameter; a sketch is a list of one tensor (sketch_dim,) in float64.
    """

    def __init__(
        self, model: nn.Module, params: str, optimizer: torch.optim.Optimizer | None, sketch_dim: int | None, seed: int
    ) -> None:
        if sketch_dim is not None and sketch_dim < 1:
            raise ValueError(f"sketch_dim must be a positive whole number, not {sketch_dim!r}")
        self.parameters = _chosen_parameters(model, params)
        self.scales = None if optimizer is None else [_adam_scale(optimizer, p) for p in self.parameters]
        self.sketch_dim, self.seed = sketch_dim, seed

    def gradient(self, outputs: Tensor, weights: Tensor, *, keep: bool) -> list[Tensor]:
        """Of ``sum(weights * outputs)``."""
        found = torch.autograd.grad(
            outputs, self.parameters, weights.to(outputs), retain_graph=keep, materialize_grads=True
        )
        vectors = list(found)
        if self.scales is not None:
            vectors = [vector * scale for vector, scale in zip(vectors, self.scales, strict=True)]
        return vectors if self.sketch_dim is None else [self._sketch(vectors)]

    def _sketch(self, vectors: list[Tensor]) -> Tensor:
        """Count sketch: each coordinate, with a random sign, into a random one of `sketch_dim` sums."""
        assert self.sketch_dim is not None
        sums = torch.zeros(self.sketch_dim, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)  # the same hash for every vector
        for vector in vectors:
            for part in torch.split(vector.detach().flatten(), CHUNK):
                drawn = torch.randint(2 * self.sketch_dim, part.shape, generator=generator)
                signed = part.cpu().double() * (1 - 2 * (drawn & 1))
                sums.index_add_(0, drawn >> 1, signed)
        return sums

    def standard_error(self, first: float, second: float, inner: float) -> float:
        """Of an inner product, at most: ``sqrt((|a|^2 |b|^2 + <a, b>^2) / sketch_dim)``."""
        return 0.0 if self.sketch_dim is None else math.sqrt((first**2 * second**2 + inner**2) / self.sketch_dim)

    @property
    def rounding(self) -> float:
        """Relative size of what a gradient step's prediction cannot resolve."""
        return 8 * max(torch.finfo(parameter.dtype).eps for parameter in self.parameters)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    total = 0.0
    for left, right in zip(a, b, strict=True):
        for x, y in zip(torch.split(left.flatten(), CHUNK), torch.split(right.flatten(), CHUNK), strict=True):
            total += float(x.double() @ y.double())
    return total


def _norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(a, a))


def _chosen_parameters(model: nn.Module, params: str) -> list[nn.Parameter]:
    """Parameters that require a gradient and that `params` means.

    Raises:
        ValueError: there are none.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; call model.requires_grad_(True)")
    if params == "trainable":
        return list(trained.values())
    if params == "lm_head":
        head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}  # type: ignore[operator]
        found = [parameter for parameter in trained.values() if id(parameter) in head]
    else:
        try:
            pattern = re.compile("lora_" if params == "lora" else params)
        except re.error as problem:
            raise ValueError(f"params {params!r} is no regular expression: {problem}") from None
        found = [parameter for name, parameter in trained.items() if pattern.search(name)]
    if not found:
        some = ", ".join(list(trained)[:3])
        raise ValueError(f"params {params!r} fits none of the {len(trained)} trainable parameters ({some}, ...)")
    return found


def _adam_scale(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """``sqrt(1 / (sqrt(v) + eps))``, v the bias-corrected second moment: both sides of an inner product get one."""
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    state = optimizer.state.get(parameter, {})
    if group is None or "exp_avg_sq" not in state:
        raise ValueError(
            "optimizer holds no second moment of a parameter that is diagnosed; give a torch.optim.Adam or AdamW of "
            "this model that has made a step"
        )
    moment = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    scale: Tensor = (moment.sqrt() + group["eps"]).rsqrt()
    return scale


# a pair under a model


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)


def _samples(pairs: Sequence[Pair], tokenizer: Any) -> list[Sample]:
    """Tokenised pairs.

    Raises:
        ValueError: no pairs; what has to be tokenised, and no tokenizer; what cannot be.
        TypeError: another kind of pair.
    """
    found = []
    for pair in pairs:
        if isinstance(pair, Mapping) and {"prompt", "chosen", "rejected"} <= set(pair):
            completions = (pair["chosen"], pair["rejected"])
            pair = Example(prompt=pair["prompt"], completions=completions, scores=(1.0, 0.0), kind="pair")
        if isinstance(pair, Example):
            if tokenizer is None:
                raise ValueError(
                    "text has to be tokenised: give a Language (model and tokenizer) in place of the model"
                )
            pair = Sample(encode(pair, tokenizer, max_length=None).group, pair.scores, where=pair.where)
        if not isinstance(pair, Sample):
            raise TypeError(
                f"expected Samples, Examples, or rows with prompt, chosen, rejected, not {type(pair).__name__}"
            )
        found.append(pair)
    if not found:
        raise ValueError("no pair to look at")
    Batch.of(found).pairs()  # says which is not a pair
    return found


def _with_references(
    model: nn.Module, objective: Objective, samples: list[Sample], reference: nn.Module | None
) -> list[Sample]:
    if not {"reference", "baseline"} & objective.needs or all(sample.reference is not None for sample in samples):
        return samples
    adapted = reference is None and hasattr(model, "disable_adapter")
    with model.disable_adapter() if adapted else nullcontext():  # type: ignore[operator]
        return referenced(reference if reference is not None else model, samples)


class _Scored(NamedTuple):
    """One pair: its tokens' log-probabilities with their graph, and what the loss wants of them."""

    policy: Logps
    slopes: Tensor  # (tokens,): dloss / dtoken
    chosen: int
    rejected: int
    output: Output

    def weights(self, completion: int) -> Tensor:
        """(tokens,): the slopes of one completion, 0 elsewhere."""
        return torch.where(self.policy.owner == completion, self.slopes, 0.0)

    def only(self, completion: int) -> Tensor:
        """(tokens,): 1 for the tokens of one completion."""
        return torch.where(self.policy.owner == completion, 1.0, 0.0)

    def slope(self, completion: int) -> float:
        """Mean over the tokens of one completion, and so dloss / ds for losses of sums and means."""
        return float(self.slopes[self.policy.owner == completion].double().mean())

    @property
    def even(self) -> bool:
        """Whether all tokens of a completion have the same slope."""
        return all(
            bool(torch.allclose(own, own[:1].expand_as(own), rtol=1e-5, atol=0))
            for completion in (self.chosen, self.rejected)
            for own in [self.slopes[self.policy.owner == completion]]
        )


def _score(model: nn.Module, objective: Objective, sample: Sample, baseline: Tensor | None) -> _Scored:
    policy = completion_logps(model, [sample.group], hidden="hidden" in objective.needs)
    hidden = None if policy.hidden is None else policy.hidden.detach()
    leaf = replace(policy, token=policy.token.detach().requires_grad_(), hidden=hidden)
    reference = None
    if sample.reference is not None and "reference" in objective.needs:
        reference = leaf.with_tokens(sample.reference)
    batch = Batch.of([sample], policy.token.device, baseline)
    output = objective(leaf, reference, batch)
    (slopes,) = torch.autograd.grad(output.loss, leaf.token, materialize_grads=True)
    chosen, rejected = (int(index) for index in batch.pairs())
    return _Scored(policy, slopes, chosen, rejected, output)


def diagnose(
    model: nn.Module | Language,
    samples: Sequence[Pair],
    *,
    objective: Objective | None = None,
    params: str = "trainable",
    reference: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    sketch_dim: int | None = None,
    batch: bool = True,
    seed: int = 0,
) -> Entanglement:
    """Predict, to first order, what a step on an objective does to chosen and rejected log-probabilities, pair by pair.

    Works for any objective on pairs: the weights ``d_w`` and ``d_l`` are derivatives of its loss. One forward and two
    backward passes a pair (three for objectives that weigh tokens); dropout is off, ``.grad`` is left alone, inner
    products are summed in float64. The prediction is exact for small steps of plain gradient descent.

    Args:
        model: a causal language model, or a Language when the pairs are texts.
        samples: pairs, as Samples, Examples, or rows with ``prompt``, ``chosen``, ``rejected``.
        objective: None is ``DPO(beta=0.1)``.
        params: whose gradients: ``"trainable"`` (all that require one), ``"lora"``, ``"lm_head"``, or a regular
            expression for names. The step that is predicted moves these parameters alone.
        reference: for samples that have no reference log-probabilities. None is the model as it is, a peft model
            without its adapters.
        optimizer: an Adam or AdamW that has made steps; inner products become ``<a, P b>`` with ``P = 1 / (sqrt(v) +
            eps)``, the step along the preconditioned gradient. Momentum and decay are not part of it.
        sketch_dim: compare count sketches of this dimension; inner products and squared norms are then unbiased
            estimates, whose standard error is told. Saves memory, not time.
        batch: also compare the mean gradients, which takes memory for three more vectors.
        seed: of the sketch's hash.

    Raises:
        ValueError: no pairs, an empty completion, no parameter to differentiate by, a bad option.
        UserError: a sample that is no pair, or lacks a column that the objective needs.
    """
    network, tokenizer = model if isinstance(model, Language) else (model, None)
    objective = DPO() if objective is None else objective
    space = _Space(network, params, optimizer, sketch_dim, seed)
    pairs = _with_references(network, objective, _samples(samples, tokenizer), reference)
    baseline = None
    if "baseline" in objective.needs:
        strangers = _with_references(network, objective, mismatched(pairs), reference)
        baseline = mean_ratio(network, strangers)
    found, sums, weights = [], [[], [], []], np.zeros(2)  # type: ignore[var-annotated]
    with _without_dropout(network):
        for sample in pairs:
            scored = _score(network, objective, sample, baseline)
            a = space.gradient(scored.policy.token, scored.only(scored.chosen), keep=True)
            b = space.gradient(scored.policy.token, scored.only(scored.rejected), keep=not scored.even)
            d_w, d_l = -scored.slope(scored.chosen), scored.slope(scored.rejected)
            norms, inner = (_norm(a), _norm(b)), _dot(a, b)
            known: dict[str, Any] = {
                "standard_error": space.standard_error(*norms, inner),
                "resolution": space.rounding * max(abs(d_w), abs(d_l)) * max(norms) ** 2,
                "where": sample.where,
            }
            step = None
            if scored.even:
                found.append(PairEntanglement.of(*norms, inner, d_w, d_l, **known))
            else:
                step = space.gradient(scored.policy.token, -scored.slopes, keep=False)
                found.append(PairEntanglement(*norms, inner, d_w, d_l, _dot(a, step), _dot(b, step), **known))
            if batch:
                if step is None:
                    step = [d_w * x - d_l * y for x, y in zip(a, b, strict=True)]
                for total, vectors in zip(sums, (a, b, step), strict=True):
                    if not total:
                        total += [vector / len(pairs) for vector in vectors]
                    else:
                        for kept, vector in zip(total, vectors, strict=True):
                            kept.add_(vector, alpha=1 / len(pairs))
                weights += np.array([d_w, d_l]) / len(pairs)
    mean = None
    if batch:
        A, B, G = sums
        norms, inner = (_norm(A), _norm(B)), _dot(A, B)
        mean = PairEntanglement(
            *norms,
            inner,
            float(weights[0]),
            float(weights[1]),
            chosen_change=_dot(A, G),
            rejected_change=_dot(B, G),
            standard_error=space.standard_error(*norms, inner),
            resolution=space.rounding * float(np.abs(weights).max()) * max(norms) ** 2,
            where=f"mean of {len(pairs)} pairs",
        )
    versions = [parameter._version for parameter in space.parameters]

    def heatmap(index: int) -> HeatMap:
        if versions != [parameter._version for parameter in space.parameters]:
            raise RuntimeError("the model has changed since it was diagnosed; call diagnose again, or token_heatmap")
        return token_heatmap(network, pairs[index], params=params, sketch_dim=sketch_dim, seed=seed)

    return Entanglement(tuple(found), mean, objective.name, heatmap)


def token_heatmap(
    model: nn.Module | Language,
    sample: Pair,
    *,
    params: str = "trainable",
    sketch_dim: int | None = None,
    seed: int = 0,
) -> HeatMap:
    """Inner products and cosines between the gradients of every chosen and every rejected token's log-probability.

    One backward pass for each token of both completions. The gradients of the shorter completion's tokens are held at
    once: on a large model take ``params="lm_head"`` or a sketch.

    Args:
        model, params, sketch_dim, seed: as for `diagnose`.
        sample: one pair.

    Raises:
        ValueError: as `diagnose`.
    """
    network, tokenizer = model if isinstance(model, Language) else (model, None)
    space = _Space(network, params, None, sketch_dim, seed)
    (pair,) = _samples([sample], tokenizer)
    chosen, rejected = (int(index) for index in Batch.of([pair]).pairs())
    ids = pair.group.completions[chosen], pair.group.completions[rejected]
    with _without_dropout(network):
        policy = completion_logps(network, [pair.group])

        def gradients(completion: int) -> Iterator[list[Tensor]]:
            for place in (policy.owner == completion).nonzero()[:, 0].tolist():
                one = torch.zeros_like(policy.token)
                one[place] = 1
                yield space.gradient(policy.token, one, keep=True)

        swapped = len(ids[0]) < len(ids[1])
        held = list(gradients(chosen if swapped else rejected))
        inner = np.zeros((max(map(len, ids)), len(held)))
        norms = np.array([_norm(vector) for vector in held])
        others = np.zeros(len(inner))
        for i, vector in enumerate(gradients(rejected if swapped else chosen)):
            others[i] = _norm(vector)
            inner[i] = [_dot(vector, other) for other in held]
    lengths = np.outer(others, norms)
    cosines = np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)
    return HeatMap(inner.T, cosines.T, *ids) if swapped else HeatMap(inner, cosines, *ids)


# in a trainer


class EntanglementCallback(TrainerCallback):
    """Diagnoses some pairs while a transformers or TRL trainer runs, and says when chosen log-probs fall with rejected.

    Measures before the first step and every so many steps; `history` keeps ``step``, the mean log-probabilities, the
    shares of the regimes, and the batch's regime, and the trainer's ``log_history`` gets the same under
    ``entanglement/...``. The reference is the model as it is when training begins (a peft model without adapters). Not
    for parameters that are sharded over processes.

    Args:
        pairs: held-out pairs, as for `diagnose`; a dozen is enough. Texts are tokenised with the trainer's tokenizer.
        every: steps between measurements.
        objective: what is trained; None takes it from the arguments of TRL's DPOTrainer (loss types sigmoid, hinge,
            ipo, robust, sft), DPO with beta 0.1 for arguments without a loss type.
        params, sketch_dim, seed: as for `diagnose`.

    Raises:
        ValueError: `every` below 1; when training begins: a loss type that has no objective here, bad pairs.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        every: int = 50,
        objective: Objective | None = None,
        params: str = "trainable",
        sketch_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every!r}")
        self.pairs, self.every, self.objective = list(pairs), every, objective
        self.params, self.sketch_dim, self.seed = params, sketch_dim, seed
        self.history: list[dict[str, Any]] = []
        self._samples: list[Sample] = []
        self._used: Objective = DPO()
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tokenise, score under the reference, and measure."""
        model = given["model"]
        self._used = self.objective if self.objective is not None else _trl_objective(args)
        if not self._samples:  # a second call of train() keeps the first one's reference
            samples = _samples(self.pairs, given.get("processing_class"))
            adapted = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
            with adapted:
                self._samples = referenced(model, samples)
        self._measure(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure, when it is time."""
        if state.global_step % self.every == 0:
            self._measure(given["model"], state)

    def _measure(self, model: nn.Module, state: Any) -> None:
        report = diagnose(
            model,
            self._samples,
            objective=self._used,
            params=self.params,
            sketch_dim=self.sketch_dim,
            seed=self.seed,
        )
        logps = _pair_means(model, self._samples)
        assert report.batch is not None
        row = {
            "step": state.global_step,
            **logps,
            "synchronised": report.synchronised,
            **report.shares,
            "cosine": float(np.mean([pair.cosine for pair in report.pairs])),
            "batch": report.batch.regime,
        }
        self.history.append(row)
        state.log_history.append(
            {"step": row["step"], **{f"entanglement/{k}": v for k, v in row.items() if k != "step"}}
        )
        if not getattr(state, "is_world_process_zero", True):
            return
        logger.info("step %d: %s", state.global_step, report.summary())
        regime = max(report.shares, key=report.shares.__getitem__)
        fallen = row["chosen_gain"] < 0 and row["rejected_gain"] < 0
        kind = "fallen" if fallen else regime
        if kind in ("fallen", "both down", "both up") and kind not in self._warned:
            self._warned.add(kind)
            logger.warning(_message(row, kind, report))


def _pair_means(model: nn.Module, samples: list[Sample]) -> dict[str, float]:
    now = referenced(model, samples)
    chosen, rejected = Batch.of(samples).pairs()
    sums = []
    for rows in (now, samples):
        values = Logps.of([sample.group for sample in rows], torch.cat([row.reference for row in rows])).sum()  # type: ignore[misc]
        sums.append((float(values[chosen].double().mean()), float(values[rejected].double().mean())))
    (up, down), (was_up, was_down) = sums
    return {"chosen": up, "rejected": down, "chosen_gain": up - was_up, "rejected_gain": down - was_down}


def _message(row: Mapping[str, Any], kind: str, report: Entanglement) -> str:
    what = {
        "fallen": "chosen log-probs fall (rewards/chosen and logps/chosen go down together with the rejected ones)",
        "both down": "a step now lowers chosen and rejected log-probs alike (rewards/chosen is about to be negative)",
        "both up": "a step now raises chosen and rejected log-probs alike (rejected answers become more likely)",
    }[kind]
    return (
        f"step {row['step']}: {what}: chosen {row['chosen_gain']:+.2f}, rejected {row['rejected_gain']:+.2f} nats "
        f"since the start; {report.summary()}. This is gradient entanglement (arXiv 2410.13828; "
        "huggingface/trl issue 800), not a bug of the loop: the margin grows all the same. If the chosen answers must "
        "not lose: a loss with a likelihood term (CPO, DPOP, SFT beside DPO), SparseMask, or PairwiseNormalized."
    )


def _trl_objective(args: Any) -> Objective:
    """The objective of a TRL config, where the room has the same.

    Raises:
        ValueError: it has not.
    """
    kinds = getattr(args, "loss_type", None)
    beta = float(getattr(args, "beta", 0.1))
    smoothing = float(getattr(args, "label_smoothing", 0.0) or 0.0)
    if kinds is None:
        return DPO(beta=beta)
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    known: dict[str, Any] = {
        "sigmoid": lambda: DPO(beta=beta, label_smoothing=smoothing),
        "hinge": lambda: Hinge(beta=beta),
        "ipo": lambda: IPO(tau=beta, length_normalize=True),
        "robust": lambda: RobustDPO(beta=beta, label_smoothing=smoothing),
        "sft": SFT,
    }
    if len(names) != 1 or names[0] not in known:
        raise ValueError(
            f"loss_type {kinds!r} has no counterpart that EntanglementCallback knows ({', '.join(known)}); pass "
            "objective=..., any Objective on pairs"
        )
    objective: Objective = known[names[0]]()
    return objective


# remedy: normalise the two gradients of a pair


class PairwiseNormalized:
    """Gradients whose chosen and rejected halves have the same length, pair by pair: `backward` in place of ``loss``'s.

    The gradient of a pair's loss is the sum of what comes through the chosen and through the rejected one, ``-d_w a``
    and ``d_l b``. Both halves are scaled to the geometric mean of their lengths, so the step is along
    ``a/|a| - b/|b|``: to first order the chosen log-probability never falls and the rejected one never rises, by
    Cauchy-Schwarz.
    That holds for each pair's own step of plain gradient descent; in a batch, and under Adam, pairs act on one another.
    Where one half is zero (a likelihood term beside an inactive hinge) the other passes as it is.

    Two backward passes a pair, one pair at a time. Dropout is off.

    Args:
        model: a causal language model; its parameters that require gradients get them.
        objective: on pairs; None is ``DPO(beta=0.1)``. For DPO the step is ``d sqrt(|a| |b|) (a/|a| - b/|b|)``.

    Raises:
        ValueError: no parameter of the model requires a gradient.
    """

    def __init__(self, model: nn.Module, objective: Objective | None = None) -> None:
        self.model = model
        self.objective = DPO() if objective is None else objective
        _chosen_parameters(model, "trainable")

    def backward(self, samples: Sequence[Sample], *, scale: float = 1.0) -> Output:
        """Add the mean over pairs of the normalised gradients to the parameters' ``.grad``.

        Args:
            samples: pairs, with references where the objective needs them (`referenced`).
            scale: multiplies the gradients, as for accumulation.

        Returns:
            The objective's losses (pairs,), detached, and its metrics.

        Raises:
            ValueError: no samples, or one without the reference that the objective needs.
            UserError: a sample that is no pair.
        """
        pairs = _samples(samples, None)
        if "reference" in self.objective.needs:
            missing = next((sample for sample in pairs if sample.reference is None), None)
            if missing is not None:
                raise ValueError(
                    f"{missing.where or 'a sample'} has no reference log-probabilities; call referenced first"
                )
        if "baseline" in self.objective.needs:
            raise ValueError(f"{self.objective.name} judges completions one by one; there is no pair to balance")
        space = _Space(self.model, "trainable", None, None, 0)
        losses, metrics = [], Counter[str]()
        with _without_dropout(self.model):
            for sample in pairs:
                scored = _score(self.model, self.objective, sample, None)
                halves = [
                    space.gradient(scored.policy.token, scored.weights(completion), keep=keep)
                    for completion, keep in ((scored.chosen, True), (scored.rejected, False))
                ]
                lengths = [_norm(half) for half in halves]
                common = math.sqrt(lengths[0] * lengths[1])
                for half, length in zip(halves, lengths, strict=True):
                    factor = scale / len(pairs) * (common / length if common else 1.0)
                    for parameter, part in zip(space.parameters, half, strict=True):
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                        parameter.grad.add_(part, alpha=factor)
                losses.append(scored.output.losses.detach())
                for name, value in scored.output.metrics.items():
                    metrics[name] += value / len(pairs)  # type: ignore[assignment]
        return Output(torch.cat(losses), dict(metrics))


# remedy: masks over tokens


def _masked(objective: Objective, policy: Logps, reference: Logps | None, mask: Tensor, batch: Batch) -> Output:
    """The objective on masked log-ratios ``mask * D_t``; on masked log-probabilities where it has no reference."""
    if reference is None:
        return objective(replace(policy, token=mask * policy.token), None, batch)
    token = reference.token + mask * (policy.token - reference.token)
    return objective(replace(policy, token=token), reference, batch)


@dataclass(frozen=True)
class SparseMask(Objective):
    """A pairwise objective in which a learned mask in [0, 1] says how much each token's log-ratio counts.

    ``loss(sum_t u_t D_t(w), sum_t v_t D_t(l)) + l1 (|u|_1 + |v|_1)``: the penalty switches tokens off that do not tell
    the two answers apart. The mask of a token is a linear function of the hidden state that it was predicted from,
    without gradient to the model. All masks are one at the start, so training begins with the wrapped objective.

    The head is no part of the model: it takes a step of Adam of its own in every backward pass, unless
    `head_learning_rate` is 0; then optimise `parameters` yourself. It is made at the first call, is not saved, and is
    not synchronised between processes. Log-probabilities without hidden states that carry no gradient (as in an
    evaluation) are judged unmasked.

    Args:
        objective: on pairs, of summed or mean log-probabilities; a mean still divides by all tokens. Default DPO.
        l1: price of a mask of one, per token.
        head: ``"relu"``: the linear function cut to [0, 1]; ``"sigmoid"``, which starts at 0.88 instead; or a module
            from states (tokens, d) to (tokens, 1) whose output is cut to [0, 1].
        head_learning_rate: of the head's Adam.
    """

    objective: Objective = field(default_factory=DPO)
    l1: float = 1e-3
    head: str | nn.Module = "relu"
    head_learning_rate: float = 1e-2
    name: ClassVar[str] = "sparse-mask"
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(f"objective must be an Objective such as DPO(), not {self.objective!r}")
        not_negative(self.l1, "l1")
        not_negative(self.head_learning_rate, "head_learning_rate")
        if not isinstance(self.head, nn.Module) and self.head not in ("relu", "sigmoid"):
            raise ValueError(f"head must be 'relu', 'sigmoid' or a module, not {self.head!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the wrapped objective needs, and the hidden states."""
        return self.objective.needs | {"hidden"}

    def calibrated(self, mean_length: float) -> "SparseMask":
        """With the wrapped objective for such data."""
        inner = self.objective.calibrated(mean_length)
        return self if inner == self.objective else replace(self, objective=inner)

    def parameters(self) -> list[nn.Parameter]:
        """Of the head; none before the first call."""
        return list(self._made["head"].parameters()) if self._made else []

    def mask(self, policy: Logps) -> Tensor:
        """(tokens,) in [0, 1], differentiable with respect to the head.

        Raises:
            UserError: the log-probabilities come without hidden states.
        """
        if policy.hidden is None:
            raise UserError("SparseMask needs hidden states; score with completion_logps(..., hidden=True)")
        states = policy.hidden.detach()
        if not self._made:
            self._make(states)
        values = self._made["head"](states)[:, 0].to(policy.token)
        return torch.sigmoid(values) if self.head == "sigmoid" else values.clamp(0, 1)

    def _make(self, states: Tensor) -> None:
        if isinstance(self.head, nn.Module):
            head = self.head
        else:
            head = nn.Linear(states.shape[1], 1, device="meta", dtype=states.dtype).to_empty(device=states.device)
            nn.init.zeros_(head.weight)  # made on "meta", so that no generator is drawn from
            nn.init.constant_(head.bias, 2.0 if self.head == "sigmoid" else 1.0)
        self._made["head"] = head
        if self.head_learning_rate:
            for parameter in head.parameters():
                optimizer = torch.optim.Adam([parameter], lr=self.head_learning_rate)

                def learn(parameter: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                    optimizer.step()
                    optimizer.zero_grad()

                parameter.register_post_accumulate_grad_hook(learn)

    def __call__(self, policy: Logps, reference: Logps | None, batch: Batch) -> Output:
        """Losses (groups,); metrics of the wrapped objective on masked values, and mean masks of the two sides."""
        if policy.hidden is None and not policy.token.requires_grad:
            return self.objective(policy, reference, batch)
        mask = self.mask(policy)
        output = _masked(self.objective, policy, reference, mask, batch)
        chosen, rejected = batch.pairs()
        sizes = policy.total(mask)
        shares = sizes.detach() / policy.lengths
        metrics = {"masks/chosen": float(shares[chosen].mean()), "masks/rejected": float(shares[rejected].mean())}
        return Output(output.losses + self.l1 * (sizes[chosen] + sizes[rejected]), output.metrics | metrics)


@dataclass(frozen=True)
class CommonTokenMask(Objective):
    """A pairwise objective on the tokens alone that chosen and rejected do not share: a mask without parameters (ours).

    Tokens of a longest common subsequence of the two completions are left out; `mark_different` finds them and adds the
    column ``different`` that this objective needs.

    Args:
        objective: as for `SparseMask`.
    """

    objective: Objective = field(default_factory=DPO)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The wrapped objective's, with a suffix. No class attribute: the command line cannot supply the column."""
        return f"{self.objective.name}-common-token-mask"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the wrapped objective needs, and the column."""
        return self.objective.needs | {"different"}

    def calibrated(self, mean_length: float) -> "CommonTokenMask":
        """With the wrapped objective for such data."""
        inner = self.objective.calibrated(mean_length)
        return self if inner == self.objective else replace(self, objective=inner)

    def __call__(self, policy: Logps, reference: Logps | None, batch: Batch) -> Output:
        """Losses (groups,)."""
        marks = batch.column("different")
        longest = int(policy.lengths.max())
        if marks.ndim != 2 or marks.shape[1] < longest:
            raise UserError(
                f"the column 'different' does not cover completions of {longest} tokens; call mark_different"
            )
        return _masked(self.objective, policy, reference, marks[policy.owner, policy.position].to(policy.token), batch)


def mark_different(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with a column ``different``: 1 for tokens outside a longest common subsequence of the pair, else 0.

    Args:
        samples: pairs; all that are trained on together, since the column is padded to the longest completion.

    Raises:
        UserError: a sample that is no pair.
        ValueError: no samples.
    """
    pairs = _samples(samples, None)
    longest = max(len(completion) for sample in pairs for completion in sample.group.completions)
    found = []
    for sample in pairs:
        marks = []
        for own, common in zip(sample.group.completions, _common(*sample.group.completions), strict=True):
            kept = [float(index not in common) for index in range(len(own))]
            marks.append(tuple(kept + [0.0] * (longest - len(own))))
        found.append(replace(sample, columns={**sample.columns, "different": tuple(marks)}))
    return found


def _common(first: Sequence[int], second: Sequence[int]) -> tuple[set[int], set[int]]:
    """Places in both of a longest common subsequence."""
    lengths = np.zeros((len(first) + 1, len(second) + 1), dtype=np.int64)  # of what is left from (i, j)
    for i in reversed(range(len(first))):
        for j in reversed(range(len(second))):
            lengths[i, j] = (
                1 + lengths[i + 1, j + 1] if first[i] == second[j] else max(lengths[i + 1, j], lengths[i, j + 1])
            )
    places: tuple[set[int], set[int]] = (set(), set())
    i = j = 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            places[0].add(i)
            places[1].add(j)
            i, j = i + 1, j + 1
        elif lengths[i + 1, j] >= lengths[i, j + 1]:
            i += 1
        else:
            j += 1
    return places
