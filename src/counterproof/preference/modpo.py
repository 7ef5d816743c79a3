"""MODPO: DPO for a weighted sum of rewards, of which one is known by its preferences and the others by a fixed margin.

Paper: arXiv 2310.03708.
Read beside: ZHZisZZ/modpo (the trainer's modpo_loss, scripts/modpo, README, issue 4).
Deviations: margins are computed once and kept as a column, where the official loop asks the margin models at every
    step; the calibration of a margin's scale is ours; soups of adapters average the weight updates, so that they equal
    the soup of the merged models.
"""

import copy
import html
import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from scipy.optimize import brentq

from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("preference"):
    import torch
    from torch import Tensor, nn

from counterproof.language import Group, Language, batches, completion_logps
from counterproof.language.sampling import encode as encode_prompt
from counterproof.language.sampling import generate
from counterproof.preference.data import Example, Text, encode
from counterproof.preference.forward import referenced
from counterproof.preference.objectives import DPO, Batch, Objective, Output, Sample, log_ratios, pair_output, positive

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from counterproof.language import Logps

__all__ = [
    "MODPO",
    "ClassifierReward",
    "Front",
    "FrontPoint",
    "ImplicitReward",
    "WeightedDPO",
    "adapter_soup",
    "add_margins",
    "best_of_n",
    "bradley_terry_scale",
    "hypervolume",
    "implicit_reward",
    "loss_weighting_policies",
    "mix_for_weighting",
    "modpo_policies",
    "modpo_trl_trainer",
    "pareto_sweep",
    "simplex_grid",
    "soup",
    "soup_policies",
]

log = logging.getLogger(__name__)

Loss = Literal["sigmoid", "hinge"]
Reward: TypeAlias = "Callable[[Text, Text], float] | Scorer"
Fit: TypeAlias = Callable[[nn.Module, Objective, Sequence[Sample]], Any]
Policies: TypeAlias = Callable[[Mapping[str, float]], Language]


def _check_weights(weights: Mapping[str, float], *, normalize: bool = False) -> dict[str, float]:
    found = {name: float(value) for name, value in weights.items()}
    for name, value in found.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"the weight of {name!r} is {value!r}; weights are numbers >= 0")
    total = sum(found.values())
    if normalize and total > 0:
        return {name: value / total for name, value in found.items()}
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the weights {found} sum to {total:g}, not 1; scale them, or pass normalize=True")
    return found


# objectives


@dataclass(frozen=True)
class MODPO(Objective):
    """DPO on the preferences of one objective, with the other objectives' rewards as a fixed margin.

    ``-log sigmoid((beta (D_w - D_l) - sum_j w_j (g_j(y_w) - g_j(y_l))) / w_k)`` (arXiv 2310.03708): k is the objective
    that the labels are of, j the others. At its optimum the policy is that of reinforcement learning on
    ``sum_i w_i r_i`` with a KL penalty of `beta`. With ``w_k = 1`` it is DPO. The logits grow as ``1 / w_k``: watch the
    metric ``saturated``, the share of pairs that have less than 1 % of their gradient left.

    The column ``margins`` of the data has ``g_j`` of every completion, (n, N - 1), see `add_margins`: in the
    alphabetical order of the other objectives' names, whatever the order of `weights`. A number will do for one.

    Args:
        weights: of all N objectives by name; not negative, sum 1.
        trained: the name of the objective k that the pairs are labelled by; its weight must not be 0.
        beta: as in DPO.
        loss_type: ``"sigmoid"``, or ``"hinge"``: ``max(0, 1 - logit)``.
        normalize: divide the weights by their sum.

    Raises:
        ValueError: weights or another argument out of their range.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"better": 0.5, "safer": 0.5}, hash=False)
    trained: str = "better"
    beta: float = 0.1
    loss_type: Loss = "sigmoid"
    normalize: bool = field(default=False, compare=False, repr=False)
    name: ClassVar[str] = "modpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs", "margins"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")
        object.__setattr__(self, "weights", _check_weights(self.weights, normalize=self.normalize))
        if self.trained not in self.weights:
            raise ValueError(
                f"no weight for the trained objective {self.trained!r}; weights: {', '.join(self.weights)}"
            )
        if self.weights[self.trained] == 0:
            raise ValueError(
                f"the trained objective {self.trained!r} has weight 0, by which the loss divides; train on preferences "
                "of an objective that counts"
            )
        if self.loss_type not in ("sigmoid", "hinge"):
            raise ValueError(f"loss_type is {self.loss_type!r}; expected 'sigmoid' or 'hinge'")

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the objectives that enter as margins, in the order of the columns."""
        return tuple(sorted(self.weights.keys() - {self.trained}))

    @property
    def dpo_beta(self) -> float:
        """``beta / w_k``: DPO with it, on a reference that is ``w . g / beta`` more likely, is MODPO."""
        return self.beta / self.weights[self.trained]

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,).

        Raises:
            UserError: no margins, another number of them than of other objectives, or one that is not finite.
        """
        chosen, rejected = batch.pairs()
        ratios = self.beta * log_ratios(policy, reference)
        others = self._weighted_margins(batch).to(ratios)
        own = self.weights[self.trained]
        logits = (ratios[chosen] - ratios[rejected] - (others[chosen] - others[rejected])) / own
        losses = -nn.functional.logsigmoid(logits) if self.loss_type == "sigmoid" else nn.functional.relu(1 - logits)
        output = pair_output(losses, (ratios - others) / own, policy, batch)
        output.metrics["saturated"] = float((torch.sigmoid(-logits.detach()) < 0.01).double().mean())
        return output

    def _weighted_margins(self, batch: Batch) -> Tensor:
        """(n,): ``sum_j w_j g_j``."""
        weights = [self.weights[name] for name in self.others]
        used = [index for index, weight in enumerate(weights) if weight > 0]
        if not used:  # plain DPO, whatever the margins are
            return torch.zeros(len(batch.group), device=batch.group.device)
        margins = batch.column("margins")
        margins = margins[:, None] if margins.ndim == 1 else margins
        if margins.ndim != 2 or margins.shape[1] != len(weights):
            raise UserError(
                f"margins are {tuple(margins.shape)}; expected a column for each of {', '.join(self.others)}: "
                f"({len(batch.group)}, {len(weights)})"
            )
        margins = margins[:, used]
        bad = ~margins.isfinite().all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise UserError(
                f"{batch.name(int(batch.group[row]))}has the margin {margins[row].tolist()}; it must be finite"
            )
        margins = margins if margins.is_floating_point() else margins.to(torch.float64)
        return margins @ torch.tensor([weights[index] for index in used], dtype=torch.float64).to(margins)


@dataclass(frozen=True)
class WeightedDPO(Objective):
    """DPO loss weighting, the baseline: DPO on the mixed pairs of all objectives, each loss times a ``weight``.

    With the column ``weight`` that `mix_for_weighting` gives it is ``sum_k w_k L_DPO(D_k)``. A sum of logistic losses
    is not the logistic loss of the sum: its optimum is not that of the weighted reward, however many data there are.

    Args:
        beta: as in DPO.
    """

    beta: float = 0.1
    name: ClassVar[str] = "dpo-lw"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs", "weight"})

    def __post_init__(self) -> None:
        positive(self.beta, "beta")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,)."""
        chosen, rejected = batch.pairs()
        rewards = self.beta * log_ratios(policy, reference)
        weight = batch.column("weight").to(rewards)[chosen]
        losses = -weight * nn.functional.logsigmoid(rewards[chosen] - rewards[rejected])
        return pair_output(losses, rewards, policy, batch)


def mix_for_weighting(data: Mapping[str, Sequence[Sample]], weights: Mapping[str, float]) -> list[Sample]:
    """The pairs of all objectives with the column ``weight``, for `WeightedDPO`.

    Args:
        data: per objective its pairs.
        weights: per objective; not negative, sum 1.

    Returns:
        The pairs, one objective after another; the mean of their losses is ``sum_k w_k L_DPO(D_k)``. Objectives of
        weight 0 are left out.

    Raises:
        ValueError: weights out of their range, or of other objectives than the data.
    """
    weights = _check_weights(weights)
    if weights.keys() != data.keys():
        raise ValueError(f"weights for {', '.join(weights)}, data for {', '.join(data)}; expected the same objectives")
    kept = {name: samples for name, samples in data.items() if weights[name] > 0}
    total = sum(map(len, kept.values()))
    return [
        replace(sample, columns={**sample.columns, "weight": [weights[name] * total / len(samples)] * 2})
        for name, samples in kept.items()
        for sample in samples
    ]


# rewards that serve as margins


class Scorer(ABC):
    """A reward that scores many completions at once. Called with a prompt and a completion it gives one number."""

    @abstractmethod
    def scores(self, examples: Sequence[Example]) -> list[tuple[float, ...]]:
        """The reward of every completion of every example."""

    def __call__(self, prompt: Text, completion: Text) -> float:
        """The reward of one completion."""
        example = Example(prompt=prompt, completions=(completion,), scores=(1.0,), kind="completion")
        return self.scores([example])[0][0]


@dataclass(frozen=True, eq=False)
class ImplicitReward(Scorer):
    """``beta (log pi - log reference)``: the reward that a DPO policy stands for. Made by `implicit_reward`."""

    language: Language
    adapter: str | None
    reference: str | nn.Module
    beta: float
    max_length: int | None = None
    batch_tokens: int = 4096

    def of_groups(self, groups: Sequence[Group]) -> Tensor:
        """(n,): rewards of all completions, in order; on the model's device, without gradient."""
        model = self.language.model
        with _switched(model, self.adapter):
            policy = self._logps(model, groups)
        if isinstance(self.reference, nn.Module):
            reference = self._logps(self.reference, groups).to(policy)
        else:
            with _switched(model, self.reference):
                reference = self._logps(model, groups)
        return self.beta * (policy - reference)

    def _logps(self, model: nn.Module, groups: Sequence[Group]) -> Tensor:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                runs = batches(groups, self.batch_tokens)
                return torch.cat([completion_logps(model, [groups[i] for i in run]).sum() for run in runs])
        finally:
            model.train(training)

    def scores(self, examples: Sequence[Example]) -> list[tuple[float, ...]]:
        """The reward of every completion of every example."""
        groups = [encode(each, self.language.tokenizer, max_length=self.max_length).group for each in examples]
        values = iter(self.of_groups(groups).tolist() if groups else [])
        return [tuple(itertools.islice(values, len(group.completions))) for group in groups]


def implicit_reward(
    language: Language,
    *,
    adapter: str | None = None,
    reference: str | nn.Module = "base",
    beta: float = 0.1,
    max_length: int | None = None,
    batch_tokens: int = 4096,
) -> ImplicitReward:
    """The reward that a policy trained by DPO implies, ``beta log pi / pi_0`` (arXiv 2305.18290, eq. 5), as a margin.

    Not divided by length and not centred: what depends on the prompt alone cancels.

    Args:
        language: the policy with its tokenizer, or a peft model that has the policy as an adapter. Adapters are
            switched while it scores and put back; weights and gradients stay as they are.
        adapter: the adapter's name; None scores with the model as it is.
        reference: ``"base"``: the peft model without adapters; the name of another adapter; or a model.
        beta: of the DPO that the policy was trained by.
        max_length: as in training; a longer prompt loses its beginning. None: no limit.
        batch_tokens: tokens in one forward pass, about.

    Raises:
        ValueError: an adapter that the model does not have, or ``"base"`` and a model without adapters.
    """
    positive(beta, "beta")
    adapters: Sequence[str] = list(getattr(language.model, "peft_config", ()))
    if adapter is not None and adapter not in adapters:
        raise ValueError(f"the model has no adapter {adapter!r}; it has: {', '.join(adapters) or 'none'}")
    if isinstance(reference, str):
        if not adapters:
            raise ValueError(
                f"reference is {reference!r}, and the model has no adapters; give the reference model itself"
            )
        if reference != "base" and reference not in adapters:
            raise ValueError(f"no adapter {reference!r} for a reference; there are 'base', {', '.join(adapters)}")
    return ImplicitReward(language, adapter, reference, beta, max_length, batch_tokens)


@contextmanager
def _switched(model: Any, adapter: str | None) -> Iterator[None]:
    """With one adapter active, or none for ``"base"``; None leaves the model alone."""
    if adapter is None:
        yield
        return
    status = model.get_model_status()
    if status.enabled is not True:
        raise ValueError(
            f"the model's adapters are switched off (or partly: {status.enabled}); score outside disable_adapter"
        )
    if adapter == "base":
        with model.disable_adapter():
            yield
        return
    active = list(model.active_adapters)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(adapter)
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = active[0]
        # peft freezes what it switches off.
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


@dataclass(frozen=True, eq=False)
class ClassifierReward(Scorer):
    """An ordinary reward model: a transformers sequence classifier with one output.

    Args:
        model: such as ``AutoModelForSequenceClassification`` with ``num_labels=1``.
        tokenizer: its own; it may differ from the policy's. Plain texts are ended with its end token, as TRL trains.
        batch_size: completions in one pass.

    Raises:
        ValueError: a model with another number of outputs.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.model.config.num_labels != 1:
            raise ValueError(f"the reward model has {self.model.config.num_labels} outputs; expected num_labels=1")

    def scores(self, examples: Sequence[Example]) -> list[tuple[float, ...]]:
        """The reward of every completion of every example."""
        rows, training = [], self.model.training
        for example in examples:
            group = encode(example, self.tokenizer, max_length=None).group
            rows += [[*group.prompt, *completion] for completion in group.completions]
        values: list[float] = []
        self.model.train(False)
        try:
            with torch.no_grad():
                for at in range(0, len(rows), self.batch_size):
                    part = [torch.tensor(row) for row in rows[at : at + self.batch_size]]
                    pad = self.tokenizer.pad_token_id or 0
                    ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad)
                    lengths = torch.tensor([len(row) for row in part])
                    mask = torch.arange(ids.shape[1]) < lengths[:, None]
                    device = self.model.device
                    values += self.model(ids.to(device), attention_mask=mask.long().to(device)).logits[:, 0].tolist()
        finally:
            self.model.train(training)
        flat = iter(values)
        return [tuple(itertools.islice(flat, len(example.completions))) for example in examples]


def add_margins(
    examples: Iterable[Example],
    margins: Mapping[str, Reward],
    *,
    calibrate: Mapping[str, Iterable[Example]] | None = None,
) -> list[Example]:
    """The examples with the column ``margins``: their completions' rewards under the other objectives, once for all.

    Args:
        examples: pairs labelled by the objective that is trained.
        margins: per other objective its reward: `implicit_reward`, `ClassifierReward`, or any function of prompt and
            completion as they stand in the data, such as a rule. In units of log-odds of a preference, or else:
        calibrate: per objective pairs of its own; its reward is multiplied by their `bradley_terry_scale`, which is
            logged.

    Returns:
        New examples; of each ``margins`` has a tuple for every completion, in the alphabetical order of the names. They
        can be written by `counterproof.preference.data.write` and serve every weight vector.

    Raises:
        UserError: a margin that is not finite, naming the example.
        ValueError: no margins, a calibration for another objective, or one that fails, see `bradley_terry_scale`.
    """
    if not margins:
        raise ValueError("no margins; give a reward for every objective but the trained one")
    calibrate = calibrate or {}
    if unknown := calibrate.keys() - margins.keys():
        raise ValueError(f"calibration for {min(unknown)!r}, which is no margin; margins: {', '.join(margins)}")
    examples = list(examples)
    columns = []
    for name in sorted(margins):
        scale = 1.0
        if name in calibrate:
            scale = bradley_terry_scale(margins[name], calibrate[name])
            log.info("margin %s: multiplied by %.6g, the Bradley-Terry scale of its own pairs", name, scale)
        values = _scores(margins[name], examples)
        for example, own in zip(examples, values, strict=True):
            if not all(map(math.isfinite, own)):
                raise UserError(f"{example.where or 'an example'}: the margin {name} is {own}; it must be finite")
        columns.append([tuple(scale * value for value in own) for own in values])
    return [
        replace(example, columns={**example.columns, "margins": tuple(zip(*own, strict=True))})
        for example, own in zip(examples, zip(*columns, strict=True), strict=True)
    ]


def _scores(reward: Reward, examples: Sequence[Example]) -> list[tuple[float, ...]]:
    if isinstance(reward, Scorer):
        return reward.scores(examples)
    return [tuple(float(reward(each.prompt, text)) for text in each.completions) for each in examples]


def bradley_terry_scale(reward: Reward, pairs: Iterable[Example]) -> float:
    """The scale c > 0 for which ``sigmoid(c (g(y_w) - g(y_l)))`` fits pairs best (maximum likelihood).

    Args:
        reward: g.
        pairs: preferences by the objective that g is to stand for.

    Raises:
        ValueError: g ranks no pair wrong (no scale is large enough), or does not agree with the pairs on the whole.
    """
    examples = list(pairs)
    if odd := next((each for each in examples if each.kind != "pair"), None):
        raise ValueError(f"{odd.where or 'an example'} is {odd.kind}; a scale is fitted to pairs")
    gaps = np.array([chosen - rejected for chosen, rejected in _scores(reward, examples)])
    if not np.isfinite(gaps).all():
        raise ValueError("the reward is not finite on all pairs")
    if gaps.sum() <= 0:
        raise ValueError(
            "the reward is on average no higher for chosen than for rejected completions; no scale above 0 fits"
        )
    if (gaps >= 0).all():
        raise ValueError(
            "the reward ranks every pair as labelled, so every larger scale fits better; do without calibration"
        )

    def slope(scale: float) -> float:
        return float((gaps / (1 + np.exp(np.minimum(scale * gaps, 700.0)))).sum())

    high = 1 / np.abs(gaps).max()
    while slope(high) > 0:
        high *= 2
    return float(brentq(slope, 0.0, high, xtol=1e-12 * high))


# in TRL


def modpo_trl_trainer(objective: MODPO) -> type:
    """A subclass of TRL's DPOTrainer that minimises MODPO on data with the column ``margins``.

    DPO with ``beta / w_k``, whose reference is ``w . g / beta`` nats more likely, is MODPO; so the margins are added to
    the reference log-probabilities that TRL computes beforehand. Pass ``DPOConfig(beta=objective.dpo_beta,
    loss_type=[objective.loss_type], precompute_ref_log_probs=True, ...)``. Written for TRL 1.16.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        ValueError: from the trainer, for other settings than these.
    """
    from trl import DPOTrainer  # type: ignore[attr-defined]  # lazily, and not in its stubs

    class MODPOTrainer(DPOTrainer):
        def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **more: Any) -> None:
            kinds = (
                [args.loss_type]
                if args is not None and isinstance(args.loss_type, str)
                else getattr(args, "loss_type", None)
            )
            if (
                args is None
                or not math.isclose(args.beta, objective.dpo_beta, rel_tol=1e-9)
                or list(kinds or ()) != [objective.loss_type]
                or not args.precompute_ref_log_probs
            ):
                raise ValueError(
                    f"MODPO in TRL needs DPOConfig(beta={objective.dpo_beta!r}, loss_type=[{objective.loss_type!r}], "
                    "precompute_ref_log_probs=True)"
                )
            super().__init__(model, ref_model, args, **more)

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
            weights = np.array([objective.weights[other] for other in objective.others])
            if not weights.any():
                return dataset
            if "margins" not in dataset.column_names:
                raise UserError(
                    "the data have no column 'margins', one row for each of chosen and rejected; see add_margins"
                )

            def shifted(row: dict[str, Any]) -> dict[str, float]:
                chosen, rejected = np.reshape(row["margins"], (2, len(weights))) @ weights / objective.beta
                return {
                    "ref_chosen_logps": row["ref_chosen_logps"] + chosen,
                    "ref_rejected_logps": row["ref_rejected_logps"] + rejected,
                }

            return dataset.map(shifted, desc=f"Adding margins to the reference of {name}")

    return MODPOTrainer


# baselines


def soup(models: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """A model whose parameters are the weighted mean of those of models of the same make (DPO soups).

    For policies that are log-linear in their parameters it is exactly the optimum of the weighted reward.

    Args:
        models: one or more; they stay as they are.
        weights: one each; not negative, sum 1.

    Returns:
        A copy of the first, with its device and dtypes.

    Raises:
        ValueError: weights out of their range or number, or parameters that differ in name or shape.
    """
    if len(models) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(models)} models")
    shares = list(_check_weights({str(index): value for index, value in enumerate(weights)}).values())
    mixed = copy.deepcopy(models[0])
    parts = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if any(name not in part or part[name].shape != parameter.shape for part in parts):
                raise ValueError(
                    f"the models are not of the same make: {name} is not in all of them, or of another shape"
                )
            total = sum(
                share * part[name].to(parameter.device, torch.float64)
                for share, part in zip(shares, parts, strict=True)
            )
            parameter.copy_(total)  # type: ignore[arg-type]
    if odd := next((part.keys() - parts[0].keys() for part in parts if part.keys() != parts[0].keys()), None):
        raise ValueError(f"the models are not of the same make: {min(odd)} is not in the first")
    return mixed


def adapter_soup(model: "PeftModel", weights: Mapping[str, float], name: str = "soup") -> None:
    """Add a LoRA adapter whose weight update is the weighted mean of those of other adapters; in place.

    It is the soup of the merged models, of rank the sum of the ranks. Which adapter is active does not change.

    Args:
        model: a peft model with LoRA adapters.
        weights: per adapter; not negative, sum 1.
        name: of the new adapter.

    Raises:
        ValueError: weights out of their range, an adapter that is not there, or a name that is.
    """
    weights = {adapter: value for adapter, value in _check_weights(weights).items() if value > 0}
    if unknown := weights.keys() - model.peft_config.keys():
        raise ValueError(f"the model has no adapter {min(unknown)!r}; it has: {', '.join(model.peft_config)}")
    if name in model.peft_config:
        raise ValueError(f"the model already has an adapter {name!r}; choose another name")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)


def best_of_n(
    language: Language,
    prompts: Sequence[Text],
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    *,
    n: int = 16,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> list[str]:
    """For each prompt the best of n answers by the weighted reward. Judged by the same rewards it is an unfair oracle.

    Args:
        language: who answers.
        prompts: texts or chat messages.
        rewards, weights: per objective; the weights are not negative and sum to 1.
        n: answers to choose from.
        seed, max_new_tokens: of `counterproof.language.sampling`.

    Raises:
        ValueError: weights out of their range, or of other objectives than the rewards.
    """
    weights = _check_weights(weights)
    if weights.keys() != rewards.keys():
        raise ValueError(f"weights for {', '.join(weights)}, rewards for {', '.join(rewards)}; expected the same")
    drawn = generate(
        language, list(prompts), samples=n, seed=seed, max_new_tokens=max_new_tokens, batch_size=max(16, n)
    )
    best = []
    for prompt, own in zip(prompts, drawn, strict=True):
        answers = [one.text for one in own]
        values = sum(
            weights[name] * np.array(_answer_rewards(rewards[name], [prompt], [answers])[0]) for name in rewards
        )
        best.append(answers[int(np.argmax(values))])
    return best


def _answer_rewards(
    reward: Reward, prompts: Sequence[Text], answers: Sequence[Sequence[str]]
) -> list[tuple[float, ...]]:
    """Rewards of answers as text; to chat messages they are the assistant's."""
    if not isinstance(reward, Scorer):
        return [
            tuple(float(reward(prompt, text)) for text in own) for prompt, own in zip(prompts, answers, strict=True)
        ]
    examples = []
    for prompt, own in zip(prompts, answers, strict=True):
        completions: list[Text] = list(own)
        if not isinstance(prompt, str):
            completions = [[{"role": "assistant", "content": text}] for text in own]
        for completion in completions:
            examples.append(Example(prompt=prompt, completions=(completion,), scores=(1.0,), kind="completion"))
    values = (value for (value,) in reward.scores(examples))
    return [tuple(itertools.islice(values, len(own))) for own in answers]


# policies for any weights


def modpo_policies(
    language: Language,
    samples: Sequence[Sample],
    *,
    trained: str,
    fit: Fit,
    beta: float = 0.1,
    loss_type: Loss = "sigmoid",
) -> Policies:
    """What trains a policy by `MODPO` for any weights: ``policies({"better": 0.7, "safer": 0.3}) -> Language``.

    Args:
        language: pi_0, what every policy starts from and is held to; it stays as it is.
        samples: pairs with the column ``margins``; their references are computed once if they have none.
        trained: the objective that the pairs are labelled by.
        fit: ``fit(model, objective, samples)`` trains a model in place, such as `optimise` with its settings bound.
        beta, loss_type: of `MODPO`.
    """
    known = _with_reference(language, samples)

    def policies(weights: Mapping[str, float]) -> Language:
        model = copy.deepcopy(language.model)
        fit(model, MODPO(weights, trained, beta, loss_type), known)
        return Language(model, language.tokenizer)

    return policies


def loss_weighting_policies(
    language: Language, data: Mapping[str, Sequence[Sample]], *, fit: Fit, beta: float = 0.1
) -> Policies:
    """What trains a policy by DPO loss weighting for any weights, see `WeightedDPO`.

    Args:
        language: pi_0; it stays as it is.
        data: per objective its pairs.
        fit, beta: see `modpo_policies`.
    """
    known = {name: _with_reference(language, samples) for name, samples in data.items()}

    def policies(weights: Mapping[str, float]) -> Language:
        model = copy.deepcopy(language.model)
        fit(model, WeightedDPO(beta), mix_for_weighting(known, weights))
        return Language(model, language.tokenizer)

    return policies


def soup_policies(language: Language, data: Mapping[str, Sequence[Sample]], *, fit: Fit, beta: float = 0.1) -> Policies:
    """What mixes a policy for any weights from DPO policies of the single objectives, trained once, see `soup`.

    Args:
        language: pi_0; it stays as it is.
        data: per objective its pairs.
        fit, beta: see `modpo_policies`.
    """
    single: dict[str, nn.Module] = {}

    def policies(weights: Mapping[str, float]) -> Language:
        if weights.keys() != data.keys():
            raise ValueError(
                f"weights for {', '.join(weights)}, data for {', '.join(data)}; expected the same objectives"
            )
        for name, samples in data.items():
            if name not in single:
                model = copy.deepcopy(language.model)
                fit(model, DPO(beta), _with_reference(language, samples))
                single[name] = model
        mixed: Any = soup([single[name] for name in data], [weights[name] for name in data])
        return Language(mixed, language.tokenizer)

    return policies


def _with_reference(language: Language, samples: Sequence[Sample]) -> list[Sample]:
    if all(sample.reference is not None for sample in samples):
        return list(samples)
    return referenced(language.model, samples)


# fronts


def simplex_grid(objectives: int, points: int, *, interior: bool = False) -> list[tuple[float, ...]]:
    """Weight vectors evenly over the simplex, in lexicographic order.

    Args:
        objectives: N, at least 1.
        points: on an edge, its two ends included; at least 2.
        interior: only those without a zero, which MODPO can train.

    Example:
        >>> simplex_grid(2, 5, interior=True)
        [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    """
    if objectives < 1 or points < 2:
        raise ValueError(f"{objectives} objectives and {points} points; expected at least 1 and 2")
    steps = points - 1
    every = itertools.product(range(steps + 1), repeat=objectives)
    least = 1 if interior else 0
    return [tuple(part / steps for part in parts) for parts in every if sum(parts) == steps and min(parts) >= least]


def hypervolume(points: Sequence[Sequence[float]], ref_point: Sequence[float]) -> float:
    """Volume that points dominate above a reference point, exactly; more of every coordinate is better.

    Args:
        points: (n, d); those that are not above the reference point in all coordinates add nothing.
        ref_point: (d,).

    Raises:
        ValueError: points of another dimension, or that are not finite.
    """
    reference = np.asarray(ref_point, dtype=np.float64)
    values = (
        np.asarray(points, dtype=np.float64).reshape(-1, len(reference))
        if len(points) == 0
        else np.asarray(points, float)
    )
    if values.ndim != 2 or values.shape[1] != len(reference):
        raise ValueError(f"points are {values.shape}, the reference point has {len(reference)} coordinates")
    if not (np.isfinite(values).all() and np.isfinite(reference).all()):
        raise ValueError("points and reference point must be finite")
    return _volume(values[(values > reference).all(1)], reference)


def _volume(points: np.ndarray, reference: np.ndarray) -> float:
    """By slices along the last coordinate."""
    if not len(points):
        return 0.0
    if len(reference) == 1:
        return float(points.max() - reference[0])
    points = points[np.argsort(-points[:, -1], kind="stable")]
    below = [*points[1:, -1], reference[-1]]
    total = 0.0
    for count, (top, bottom) in enumerate(zip(points[:, -1], below, strict=True), 1):
        if top > bottom:
            total += (top - bottom) * _volume(points[:count, :-1], reference[:-1])
    return float(total)


class FrontPoint(NamedTuple):
    """What the policy for one weight vector does.

    Attributes:
        arm: what trained it.
        weights: per objective.
        rewards: mean reward of its answers, per objective.
        kl: from the reference, nats per answer: compare points of about the same.
        length: mean tokens of its answers, the end included.
    """

    arm: str
    weights: Mapping[str, float]
    rewards: Mapping[str, float]
    kl: float
    length: float


@dataclass(frozen=True)
class Front:
    """Points of a sweep over weights."""

    points: tuple[FrontPoint, ...]

    def arms(self) -> tuple[str, ...]:
        """What trained the points, in order."""
        return tuple(dict.fromkeys(point.arm for point in self.points))

    def rows(self) -> list[dict[str, Any]]:
        """A flat mapping for each point: arm, kl, length, ``weight NAME``, ``reward NAME``; for a table."""
        return [
            {"arm": p.arm, "kl": p.kl, "length": p.length}
            | {f"weight {name}": value for name, value in p.weights.items()}
            | {f"reward {name}": value for name, value in p.rewards.items()}
            for p in self.points
        ]

    def undominated(self, arm: str | None = None) -> tuple[FrontPoint, ...]:
        """Points that no other point equals or beats in all rewards and beats in one; of one arm, or of all."""
        points = self._of(arm)
        values = np.array([list(point.rewards.values()) for point in points])
        return tuple(
            point
            for point, own in zip(points, values, strict=True)
            if not ((values >= own).all(1) & (values > own).any(1)).any()
        )

    def hypervolume(self, ref_point: Sequence[float] | Mapping[str, float], arm: str | None = None) -> float:
        """`hypervolume` of the rewards above a reference point, given by name or in the rewards' order."""
        points = self._of(arm)
        names = list(points[0].rewards)
        reference = [ref_point[name] for name in names] if isinstance(ref_point, Mapping) else list(ref_point)
        return hypervolume([[point.rewards[name] for name in names] for point in points], reference)

    def _of(self, arm: str | None) -> list[FrontPoint]:
        points = [point for point in self.points if arm in (None, point.arm)]
        if not points:
            raise ValueError(f"no points of {arm!r}; there are: {', '.join(self.arms()) or 'none'}")
        return points

    def plot(self, path: str | Path, x: str | None = None, y: str | None = None) -> None:
        """Draw two rewards against each other, a line for each arm; an SVG file.

        Args:
            path: ends in ``.svg``.
            x, y: names of rewards; None: the first two.

        Raises:
            UserError: another kind of file, or one that cannot be written.
            ValueError: no points, one reward only, or a name that is none.
        """
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise UserError(f"{path}: a front is drawn as SVG; name a file that ends in .svg")
        names = list(self._of(None)[0].rewards)
        if len(names) < 2:
            raise ValueError(f"one reward only ({names[0]}); a front is drawn of two")
        x, y = x or names[0], y or names[1]
        if unknown := {x, y} - set(names):
            raise ValueError(f"no reward {min(unknown)!r}; there are: {', '.join(names)}")
        with replacing(path) as stream:
            stream.write(_drawn(self, x, y))


COLOURS = ("#0b6e99", "#d1495b", "#6a994e", "#8d6a9f", "#b5838d", "#555555")


def _drawn(front: Front, x: str, y: str) -> str:
    width, height, left, bottom, top, right = 560, 400, 64, 48, 16, 150
    xs, ys = (np.array([point.rewards[name] for point in front.points]) for name in (x, y))

    def scale(values: np.ndarray, low: float, high: float) -> Callable[[float], float]:
        least, most = float(values.min()), float(values.max())
        pad = 0.08 * (most - least) or 0.5
        return lambda value: low + (value - least + pad) / (most - least + 2 * pad) * (high - low)

    at_x, at_y = scale(xs, left, width - right), scale(ys, height - bottom, top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" stroke="black"/>',
    ]
    for value in np.linspace(xs.min(), xs.max(), 4):
        parts.append(f'<text x="{at_x(value):.1f}" y="{height - bottom + 16}" text-anchor="middle">{value:.3g}</text>')
    for value in np.linspace(ys.min(), ys.max(), 4):
        parts.append(f'<text x="{left - 6}" y="{at_y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    middle_x, middle_y = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(f'<text x="{middle_x}" y="{height - 10}" text-anchor="middle">{html.escape(x)}</text>')
    turned = f'text-anchor="middle" transform="rotate(-90 14 {middle_y})"'
    parts.append(f'<text x="14" y="{middle_y}" {turned}>{html.escape(y)}</text>')
    for number, arm in enumerate(front.arms()):
        colour = COLOURS[number % len(COLOURS)]
        own = sorted((point for point in front.points if point.arm == arm), key=lambda point: point.rewards[x])
        line = " ".join(f"{at_x(p.rewards[x]):.1f},{at_y(p.rewards[y]):.1f}" for p in own)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        for point in own:
            about = ", ".join(f"{name} {value:g}" for name, value in point.weights.items())
            tip = html.escape(f"{arm}: {about}; KL {point.kl:.3g}")
            at = f'cx="{at_x(point.rewards[x]):.1f}" cy="{at_y(point.rewards[y]):.1f}"'
            parts.append(f'<circle {at} r="4" fill="{colour}"><title>{tip}</title></circle>')
        parts.append(
            f'<text x="{width - right + 12}" y="{top + 14 + 18 * number}" fill="{colour}">{html.escape(arm)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def pareto_sweep(
    model_fn: Policies,
    prompts: Sequence[Text],
    rewards: Mapping[str, Reward],
    *,
    weights: Iterable[Sequence[float]],
    reference: nn.Module,
    baselines: Mapping[str, Policies] | None = None,
    arm: str = "modpo",
    samples: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 64,
) -> Front:
    """Make a policy for every weight vector, let it answer, and reward its answers.

    Rewards should not be the margins that a policy was trained with; those flatter it. All arms should have the same
    beta; each point has its KL.

    Args:
        model_fn: weights by name -> policy: `modpo_policies`, or any function.
        prompts: texts or chat messages that were not trained on.
        rewards: per objective.
        weights: vectors in the rewards' order, such as `simplex_grid`.
        reference: pi_0, for the KL.
        baselines: further functions by name: `loss_weighting_policies`, `soup_policies`, ...
        arm: what `model_fn` is called.
        samples, max_new_tokens, seed, batch_size: of `counterproof.language.sampling`; the same noise for every policy.

    Raises:
        ValueError: a weight vector of another length than there are rewards, or two arms of one name.
    """
    baselines = baselines or {}
    if arm in baselines:
        raise ValueError(f"two arms are called {arm!r}; give arm= another name")
    vectors = [tuple(vector) for vector in weights]
    for vector in vectors:
        if len(vector) != len(rewards):
            raise ValueError(
                f"the weights {vector} are {len(vector)}, the rewards {len(rewards)}: {', '.join(rewards)}"
            )
    points = []
    for name, policies in {arm: model_fn, **baselines}.items():
        for vector in vectors:
            named = dict(zip(rewards, vector, strict=True))
            policy = policies(named)
            starts = [encode_prompt(policy, prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
            drawn = generate(
                policy, starts, samples=samples, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size
            )
            texts = [[one.text for one in own] for own in drawn]
            groups = [Group(start, (one.tokens,)) for start, own in zip(starts, drawn, strict=True) for one in own]
            ratios = ImplicitReward(policy, None, reference, 1.0).of_groups(groups)
            points.append(
                FrontPoint(
                    name,
                    named,
                    {key: float(np.mean(_answer_rewards(reward, prompts, texts))) for key, reward in rewards.items()},
                    float(ratios.double().mean()),
                    float(np.mean([len(group.completions[0]) for group in groups])),
                )
            )
    return Front(tuple(points))
