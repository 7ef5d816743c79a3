"""What to optimise: the common interface of the room's objectives, and those of the field that others are compared
with.

An objective is a pure function of the log-probabilities of some completions of some prompts, under the policy and,
where it needs one, under a frozen reference. It knows no trainer, no model and no text. With ``s`` the summed
log-probability of a completion under the policy, ``r`` under the reference, ``n`` its number of tokens (the end token
included), ``m = s / n`` and ``D = s - r``; w is the chosen completion, l the rejected one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from counterproof.errors import UserError, extra

with extra("preference"):
    import torch
    import torch.nn.functional as F
    from torch import Tensor

if TYPE_CHECKING:
    from counterproof.language import Group, Logps

__all__ = [
    "CPO",
    "DPO",
    "DPOP",
    "IPO",
    "KTO",
    "ORPO",
    "RDPO",
    "RRHF",
    "SFT",
    "Batch",
    "Hinge",
    "Objective",
    "Output",
    "RobustDPO",
    "SLiC",
    "Sample",
    "SimPO",
    "implicit_rewards",
]


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt with its completions, ready to be scored.

    Attributes:
        group: their tokens.
        scores: one for each completion; higher is better. See `Batch`.
        columns: further values, one for each completion: numbers, or equally long tuples of them.
        where: where it was read ("file.jsonl:12").
        reference: (tokens,): log-probabilities of the completions' tokens under the reference, once they are known.
    """

    group: "Group"
    scores: tuple[float, ...]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    where: str = ""
    reference: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """What is known of the n completions of a batch of groups (a prompt with its completions), beside their tokens.

    Attributes:
        group: (n,), int64; the group of each completion, from 0, in order.
        score: (n,), float; higher is better. A pair has 1 (chosen) and 0 (rejected), an unpaired completion 1 (good)
            or 0 (bad), a ranked one the score it was given.
        columns: further values per completion by name, (n, ...): ``margins``, ``weight``, ...
        where: per group, where it was read ("file.jsonl:12"), for messages.
        baseline: KTO's reference point: (), the mean log-ratio of completions under prompts they do not belong to.
    """

    group: Tensor
    score: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    where: Sequence[str] = ()
    baseline: Tensor | None = None

    @classmethod
    def of(
        cls, samples: "Sequence[Sample]", device: "torch.device | str" = "cpu", baseline: Tensor | None = None
    ) -> Self:
        """What is known of the completions of samples, in order.

        Raises:
            UserError: a column that some samples have and others do not, by name.
        """
        group = torch.tensor([i for i, sample in enumerate(samples) for _ in sample.scores])
        score = torch.tensor([value for sample in samples for value in sample.scores], dtype=torch.float32)
        columns = {}
        for name in dict.fromkeys(name for sample in samples for name in sample.columns):
            for sample in samples:
                if name not in sample.columns:
                    raise UserError(f"{sample.where or 'a row'}: no column {name!r}, which other rows have")
            values = [value for sample in samples for value in sample.columns[name]]
            columns[name] = torch.tensor(values, device=device)
        where = [sample.where for sample in samples]
        return cls(group.to(device), score.to(device), columns, where, baseline)

    @property
    def groups(self) -> int:
        """How many groups."""
        return int(self.group[-1]) + 1

    def column(self, name: str) -> Tensor:
        """A further column.

        Raises:
            UserError: the data do not have it.
        """
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise UserError(f"this objective needs the column {name!r}, which the data do not have (columns: {known})")
        return self.columns[name]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices (groups,) of the chosen and of the rejected completions.

        Raises:
            UserError: a group that is not a pair with one completion better than the other, by name.
        """
        counts = torch.bincount(self.group, minlength=self.groups)
        if not bool((counts == 2).all()):
            odd = int((counts != 2).nonzero()[0, 0])
            raise UserError(
                f"{self.name(odd)}has {int(counts[odd])} completions, and this objective compares pairs; make pairs of "
                "ranked data with to_pairs"
            )
        score = self.score.view(-1, 2)
        if not bool((score[:, 0] != score[:, 1]).all()):
            odd = int((score[:, 0] == score[:, 1]).nonzero()[0, 0])
            raise UserError(f"{self.name(odd)}has two completions with the same score; there is nothing to prefer")
        first = torch.arange(0, len(self.group), 2, device=self.group.device)
        better = (score[:, 1] > score[:, 0]).to(first)
        return first + better, first + 1 - better

    def best(self) -> Tensor:
        """Indices (groups,) of the completion with the highest score of each group, the first of equals."""
        highest = self.score.new_full((self.groups,), -math.inf).scatter_reduce(0, self.group, self.score, "amax")
        order = torch.arange(len(self.score), device=self.score.device)
        candidates = torch.where(self.score == highest[self.group], order, len(order))
        return candidates.new_full((self.groups,), len(order)).scatter_reduce(0, self.group, candidates, "amin")

    def name(self, group: int) -> str:
        """How a message begins that is about a group."""
        return f"{self.where[group]}: " if group < len(self.where) and self.where[group] else f"group {group} "


@dataclass(frozen=True)
class Output:
    """An objective's value.

    Attributes:
        losses: (groups,), or (n,) for objectives of single completions; each weighs the same.
        metrics: means under TRL's names, detached.
    """

    losses: Tensor
    metrics: dict[str, float]

    @property
    def loss(self) -> Tensor:
        """(): the mean, what is minimised."""
        return self.losses.mean()


class Objective(ABC):
    """An objective: ``objective(policy, reference, batch) -> Output``.

    A subclass is a frozen dataclass of its hyper-parameters and says in `needs` what it is to be given: ``"reference"``
    (log-probabilities under the frozen reference), ``"pairs"`` (two completions a group), ``"baseline"`` (KTO's), or
    the name of a column."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """The losses, differentiable through `policy`."""

    def calibrated(self, mean_length: float) -> "Objective":
        """The objective for data whose completions have so many tokens on average; itself, unless it depends on
        that."""
        return self


def positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def not_negative(value: float, name: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number >= 0, not {value!r}")


def log_ratios(policy: "Logps", reference: "Logps | None") -> Tensor:
    """(n,): ``D``.

    Raises:
        UserError: there is no reference.
    """
    if reference is None:
        raise UserError("this objective compares with a reference; give its log-probabilities")
    return policy.sum() - reference.sum()


def implicit_rewards(policy: "Logps", reference: "Logps | None", beta: float) -> Tensor:
    """(n,): ``beta D``, the reward that the policy implies (Rafailov et al. 2023, arXiv 2305.18290, eq. 5),
    detached."""
    return beta * log_ratios(policy.detach(), reference)


def pair_output(losses: Tensor, rewards: Tensor, policy: "Logps", batch: Batch) -> Output:
    """Losses of pairs with the metrics that TRL logs; `rewards` (n,) is what the objective takes for a reward."""
    chosen, rejected = batch.pairs()
    rewards, sums = rewards.detach(), policy.sum().detach()
    margins = rewards[chosen] - rewards[rejected]
    metrics = {
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins),
        "logps/chosen": sums[chosen],
        "logps/rejected": sums[rejected],
    }
    return Output(losses, {name: float(value.mean()) for name, value in metrics.items()})


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp x)``, also where F.softplus turns linear."""
    return -F.logsigmoid(-x)


@dataclass(frozen=True)
class SFT(Objective):
    """Likelihood of the best completion of each group per token: ``-m`` (the usual supervised fine-tuning)."""

    name: ClassVar[str] = "sft"

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        best = batch.best()
        mean = policy.mean()[best]
        return Output(-mean, {"logps/chosen": float(policy.sum().detach()[best].mean())})


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation, ``-log sigmoid(beta (D_w - D_l))`` (arXiv 2305.18290, eq. 7).

    Args:
        beta: inverse temperature of the implied reward; the smaller, the further the policy may move.
        label_smoothing: cDPO's probability that a label is wrong, in [0, 0.5).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    name: ClassVar[str] = "dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), not {self.label_smoothing!r}")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * log_ratios(policy, reference)
        logits = rewards[chosen] - rewards[rejected]
        eps = self.label_smoothing
        losses = -(1 - eps) * F.logsigmoid(logits) - eps * F.logsigmoid(-logits)
        return pair_output(losses, rewards, policy, batch)


@dataclass(frozen=True)
class RobustDPO(DPO):
    """DPO unbiased for labels flipped with a known probability (arXiv 2403.00409).

    Args:
        beta: as in DPO.
        label_smoothing: the flip probability, in [0, 0.5).
    """

    label_smoothing: float = 0.1
    name: ClassVar[str] = "robust-dpo"

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,); they may be negative."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * log_ratios(policy, reference)
        logits = rewards[chosen] - rewards[rejected]
        eps = self.label_smoothing
        losses = (-(1 - eps) * F.logsigmoid(logits) + eps * F.logsigmoid(-logits)) / (1 - 2 * eps)
        return pair_output(losses, rewards, policy, batch)


@dataclass(frozen=True)
class Hinge(Objective):
    """DPO with a hinge, ``max(0, 1 - beta (D_w - D_l))`` (RSO, arXiv 2309.06657)."""

    beta: float = 0.1
    name: ClassVar[str] = "hinge"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * log_ratios(policy, reference)
        return pair_output(F.relu(1 - (rewards[chosen] - rewards[rejected])), rewards, policy, batch)


@dataclass(frozen=True)
class SLiC(Objective):
    """Calibration by a hinge on the log-probabilities themselves, ``max(0, delta - s_w + s_l) - weight m_w``.

    SLiC-HF, arXiv 2305.10425; its regulariser is taken on the chosen completion.

    Args:
        delta: the margin, in nats.
        weight: of the likelihood of the chosen completion, per token.
    """

    delta: float = 1.0
    weight: float = 0.5
    name: ClassVar[str] = "slic"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    def __post_init__(self) -> None:
        positive(self.delta, "delta")
        not_negative(self.weight, "weight")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        sums = policy.sum()
        losses = F.relu(self.delta - sums[chosen] + sums[rejected]) - self.weight * policy.mean()[chosen]
        return pair_output(losses, sums, policy, batch)


@dataclass(frozen=True)
class IPO(Objective):
    """Squared distance of the log-ratio gap from a target, ``(D_w - D_l - 1 / (2 tau))**2`` (arXiv 2310.12036, eq. 17).

    Args:
        tau: regularisation; TRL and the literature's tables call it beta.
        length_normalize: take ``D / n`` in place of ``D``, as TRL does; the paper sums.
    """

    tau: float = 0.1
    length_normalize: bool = False
    name: ClassVar[str] = "ipo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs"})

    def __post_init__(self) -> None:
        positive(self.tau, "tau")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        ratios = log_ratios(policy, reference)
        if self.length_normalize:
            ratios = ratios / policy.lengths
        losses = (ratios[chosen] - ratios[rejected] - 1 / (2 * self.tau)).square()
        return pair_output(losses, self.tau * ratios, policy, batch)


@dataclass(frozen=True)
class RDPO(Objective):
    """DPO with a price on length, ``-log sigmoid(beta (D_w - D_l) + alpha (n_w - n_l))``.

    Length-regularised DPO, arXiv 2403.19159, with the sign that the paper's derivation and the code of the
    gradient-entanglement study have: a chosen answer that is longer counts as already preferred, so it is pushed less.

    Args:
        beta: as in DPO.
        alpha: nats per token of difference in length.
    """

    beta: float = 0.1
    alpha: float = 0.01
    name: ClassVar[str] = "r-dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        not_negative(self.alpha, "alpha")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * log_ratios(policy, reference)
        longer = (policy.lengths[chosen] - policy.lengths[rejected]).to(rewards)
        losses = -F.logsigmoid(rewards[chosen] - rewards[rejected] + self.alpha * longer)
        return pair_output(losses, rewards, policy, batch)


@dataclass(frozen=True)
class DPOP(Objective):
    """DPO that fines a chosen completion for becoming less likely (DPO-Positive, arXiv 2402.13228).

    ``-log sigmoid(beta (D_w - D_l - weight max(0, -D_w)))``.

    Args:
        beta: as in DPO.
        weight: of the fine (lambda).
    """

    beta: float = 0.1
    weight: float = 50.0
    name: ClassVar[str] = "dpop"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        not_negative(self.weight, "weight")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        ratios = log_ratios(policy, reference)
        gap = ratios[chosen] - ratios[rejected] - self.weight * F.relu(-ratios[chosen])
        return pair_output(-F.logsigmoid(self.beta * gap), self.beta * ratios, policy, batch)


@dataclass(frozen=True)
class SimPO(Objective):
    """Mean log-probabilities with a margin and no reference, ``-log sigmoid(beta (m_w - m_l) - gamma)``.

    arXiv 2405.14734, eq. 6.

    Args:
        beta: scale of the mean log-probability; the paper's values are 2 to 2.5.
        gamma: margin; the paper's are 0.3 to 1.6.
    """

    beta: float = 2.0
    gamma: float = 1.0
    name: ClassVar[str] = "simpo"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        not_negative(self.gamma, "gamma")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * policy.mean()
        losses = -F.logsigmoid(rewards[chosen] - rewards[rejected] - self.gamma)
        return pair_output(losses, rewards, policy, batch)


@dataclass(frozen=True)
class CPO(Objective):
    """DPO with a uniform reference, and the likelihood of the chosen: ``-log sigmoid(beta (s_w - s_l)) - alpha m_w``.

    arXiv 2401.08417; the likelihood per token, as TRL has it.

    Args:
        beta: as in DPO.
        alpha: weight of the likelihood.
    """

    beta: float = 0.1
    alpha: float = 1.0
    name: ClassVar[str] = "cpo"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        not_negative(self.alpha, "alpha")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * policy.sum()
        losses = -F.logsigmoid(rewards[chosen] - rewards[rejected]) - self.alpha * policy.mean()[chosen]
        return pair_output(losses, rewards, policy, batch)


@dataclass(frozen=True)
class ORPO(Objective):
    """Likelihood of the chosen with an odds ratio, ``-m_w - weight log sigmoid(o_w - o_l)`` (arXiv 2403.07691, eq.
    6-7).

    ``o = m - log(1 - exp m)``: the log-odds of the geometric mean of a completion's token probabilities.

    Args:
        weight: of the odds ratio (lambda).
    """

    weight: float = 0.1
    name: ClassVar[str] = "orpo"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    def __post_init__(self) -> None:
        positive(self.weight, "weight")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        mean = policy.mean()
        # A completion the model is certain of has odds beyond any number: kept finite, a hair below certainty.
        odds = mean - torch.log(-torch.expm1(mean.clamp(max=-torch.finfo(mean.dtype).eps)))
        losses = -mean[chosen] - self.weight * F.logsigmoid(odds[chosen] - odds[rejected])
        return pair_output(losses, self.weight * mean, policy, batch)


@dataclass(frozen=True)
class RRHF(Objective):
    """Ranking by mean log-probabilities with the likelihood of the best (arXiv 2304.05302, eq. 2-3).

    ``sum over i better than j of max(0, m_j - m_i)  -  s_best``, for any number of completions a group; equal scores
    are not compared."""

    name: ClassVar[str] = "rrhf"

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        mean, best = policy.mean(), batch.best()
        better = (batch.group[:, None] == batch.group) & (batch.score[:, None] > batch.score)
        pushed = (F.relu(mean[None, :] - mean[:, None]) * better).sum(1)
        ranking = mean.new_zeros(batch.groups).index_add(0, batch.group, pushed)
        sums = policy.sum()
        return Output(ranking - sums[best], {"logps/chosen": float(sums.detach()[best].mean())})


@dataclass(frozen=True)
class KTO(Objective):
    """Single completions marked good or bad, as gains and losses from a reference point (arXiv 2402.01306).

    ``good_weight (1 - sigmoid(beta (D - z)))`` for a good completion, ``bad_weight (1 - sigmoid(beta (z - D)))`` for a
    bad one; ``z``, no gradient, is the mean log-ratio of completions under prompts that are not theirs, at least 0.

    Args:
        beta: as in DPO.
        good_weight, bad_weight: to balance unequal numbers of good and bad.
    """

    beta: float = 0.1
    good_weight: float = 1.0
    bad_weight: float = 1.0
    name: ClassVar[str] = "kto"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "baseline"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        not_negative(self.good_weight, "good_weight")
        not_negative(self.bad_weight, "bad_weight")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (n,), one for each completion; a pair is a good and a bad one."""
        if batch.baseline is None:
            raise UserError("KTO needs the mean log-ratio of mismatched prompts and completions (Batch.baseline)")
        ratios = log_ratios(policy, reference)
        gain = self.beta * (ratios - batch.baseline.detach().to(ratios).clamp(min=0))
        good = batch.score > 0.5
        losses = torch.where(good, self.good_weight * torch.sigmoid(-gain), self.bad_weight * torch.sigmoid(gain))
        rewards, sums = self.beta * ratios.detach(), policy.sum().detach()
        metrics: dict[str, Any] = {"kl": float(batch.baseline.detach().clamp(min=0))}
        for word, chosen in (("chosen", good), ("rejected", ~good)):
            if bool(chosen.any()):
                metrics[f"rewards/{word}"] = float(rewards[chosen].mean())
                metrics[f"logps/{word}"] = float(sums[chosen].mean())
        return Output(losses, metrics)
