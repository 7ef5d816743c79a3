"""MEET: tune a control for each preference while the model is frozen, then fine-tune the model under the controls.

Paper: arXiv 2310.00819 (abstract and first page; withdrawn from ICLR 2024).
Read beside: no official code was found; peft 0.21 (prompt tuning, LoRA) is what holds the controls.
Deviations: whether the paper goes on training the controls in stage 2, its prompt length and its learning rates are not
    known: `train_control_in_stage2`, `num_virtual_tokens` and `lr` are arguments. The loss is the mean over rows of the
    negative log-likelihood per token. `ControlTuning.combine` (mixtures of controls) is ours.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, overload

from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("preference"):
    import numpy as np
    import torch
    from peft import LoraConfig, LoraModel, PeftModelForCausalLM, PromptTuningConfig
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights, set_peft_model_state_dict
    from tokenizers import AddedToken
    from torch import Tensor, nn

from counterproof.language import Group, Language, LogProb, Logps, batches, completion_logps, tokenize
from counterproof.language.models import load
from counterproof.language.sampling import Generation, Prompt, generate
from counterproof.language.sampling import encode as prompt_tokens
from counterproof.preference.data import Example, encode
from counterproof.preference.objectives import Sample
from counterproof.preference.trainer import Trained, TrainingDiverged, TrainSettings

__all__ = ["ControlReport", "ControlTraining", "ControlTuning", "Labelled"]

Control = Literal["prompt", "lora", "text", "token"]
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
ABOUT = "controls.json"
MODEL = "counterproof_model"  # name of the adapter that stands for the model in stage 2
USUAL = 10  # virtual tokens, where nothing says how many


class Labelled(NamedTuple):
    """A prompt with one completion, as token ids, and the label whose control it is learnt under."""

    group: Group
    label: str
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class ControlReport:
    """What `ControlTuning.fit` did.

    Attributes:
        counts: rows of each label.
        dropped: completions between two thresholds, which no label claims.
        cut: prompts that lost their beginning to fit `max_length`.
        history: for each step its ``stage`` (1 or 2), ``step`` in the stage from 1, ``loss``, and ``loss/LABEL`` of the
            labels in its batch; nats per token.
    """

    counts: Mapping[str, int]
    dropped: int
    cut: int
    history: tuple[Mapping[str, float], ...]

    @property
    def text(self) -> str:
        """The data in words."""
        rows = sum(self.counts.values())
        parts = ["; ".join(f"{count:,} {label} ({count / rows:.0%})" for label, count in self.counts.items())]
        if self.dropped:
            parts.append(f"{self.dropped:,} completions between the thresholds left out")
        if self.cut:
            parts.append(f"{self.cut:,} prompts cut at their beginning")
        return "; ".join(parts)


class ControlTuning:
    """A language model that answers as its control says: one control for each label of the training data.

    `fit` maximises the likelihood of labelled responses, each under its own label's control: first over the controls
    with the model frozen, then over the model. Afterwards the model is asked under the control that is wanted. Pairs
    are not needed; there is no reference, and no likelihood is pushed down.

    Args:
        model: a causal language model of transformers; it is trained in place. Stage 2 trains its parameters that
            require gradients now. LoRA controls become part of its layers.
        tokenizer: the model's.
        labels: two or more names, letters, digits, ``-`` and ``_``; of pairs and good-or-bad data the first is good.
        control: ``"prompt"``: virtual tokens before the prompt, as embeddings (peft's prompt tuning). ``"lora"``: an
            adapter on all linear layers. For comparison, and trained with the model only: ``"text"``, `init_text`
            written before the prompt, and ``"token"``, a new special token before the prompt.
        num_virtual_tokens: of a soft prompt. None: as many as the label's `init_text` has, or 10.
        init_text: by label, what a soft prompt starts from; cut or repeated to `num_virtual_tokens`.
        init: of a soft prompt without `init_text`: rows of the vocabulary at random, or a normal distribution with the
            mean and standard deviation of each dimension of the embeddings.
        rank: of a LoRA control; its scale is 2.
        max_length: tokens of prompt and completion, without the control; a longer prompt loses its beginning. None: no
            limit but the model's context.
        seed: of the controls' start.

    Attributes:
        model: a peft model with an adapter for each label, or the model itself for ``"text"`` and ``"token"``.
        tokenizer: with the special tokens for ``"token"``.

    Raises:
        ValueError: an argument that is out of range or does not go with the control.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        labels: Sequence[str] = ("good", "bad"),
        control: Control = "prompt",
        num_virtual_tokens: int | None = None,
        init_text: Mapping[str, str] | None = None,
        init: Literal["vocabulary", "normal"] = "vocabulary",
        rank: int = 8,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        init_text = dict(init_text or {})
        _check(labels, control, num_virtual_tokens, init_text, init, rank)
        if hasattr(model, "peft_config"):
            raise ValueError("the model has adapters already; merge them first (model.merge_and_unload())")
        self.labels, self.control, self.max_length = tuple(labels), control, max_length
        self.tokenizer = tokenizer
        self._core: Any = model
        self._texts = init_text
        self._controls: dict[str, list[nn.Parameter]] = {label: [] for label in self.labels}
        self._ids: dict[str, tuple[int, ...]] = dict.fromkeys(self.labels, ())  # before the prompt
        generator = torch.Generator().manual_seed(seed)
        self.model: Any = model
        if control == "text":
            self._ids = {label: self._tokens(label) for label in self.labels}
        elif control == "token":
            self._add_tokens(generator)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._trained = trained  # peft freezes the model; what it had trainable is what stage 2 trains
        if control == "prompt":
            for label in self.labels:
                self._add_prompt(label, self._initial(label, num_virtual_tokens, init, generator))
        elif control == "lora":
            for label in self.labels:
                self._add_lora(label, rank, generator)
        self._rest()

    # the controls

    @property
    def controls(self) -> tuple[str, ...]:
        """What can be asked for: the labels, and what `combine` has made of them."""
        return tuple(self._controls)

    def parameters(self, label: str) -> list[nn.Parameter]:
        """The parameters of a label's control: virtual tokens (m, d), or the factors of its adapter; may be none."""
        return list(self._controls[self._known(label)])

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Add a control that is a weighted sum of others, to be asked for by `name`; ours, not in the paper.

        ``{"good": 1.5, "bad": -0.5}`` goes beyond good, away from bad. Virtual tokens are added up as embeddings, the
        products of LoRA's factors as matrices; the weights need not sum to 1. The new control is not trained further.

        Raises:
            ValueError: a name that is taken, an unknown control, soft prompts of different lengths.
            TypeError: controls that are words.
        """
        if self.control not in ("prompt", "lora"):
            raise TypeError(f"a control that is a {self.control} cannot be weighted; take prompt or lora")
        _check_label(name)
        if name in self._controls:
            raise ValueError(f"there is a control {name!r} already; choose another name")
        parts = [self._known(label) for label in weights]
        if not parts or not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"weights is {dict(weights)!r}; give a finite number for one control or more")
        if self.control == "prompt":
            lengths = {label: len(self._controls[label][0]) for label in parts}
            if len(set(lengths.values())) > 1:
                raise ValueError(
                    f"soft prompts of different lengths cannot be added: {lengths}; set num_virtual_tokens"
                )
            with torch.no_grad():
                summed = [weight * self._controls[label][0] for label, weight in weights.items()]
                self._add_prompt(name, torch.stack(summed).sum(0))
        else:
            with torch.random.fork_rng(devices=[]):  # peft starts the adapter at random before it fills it
                self.model.base_model.add_weighted_adapter(parts, list(weights.values()), name, combination_type="cat")
            self._controls[name] = self._factors(name)
        self._rest()

    def _tokens(self, label: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer(self._texts[label], add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"init_text of {label!r} has no token: {self._texts[label]!r}")
        return ids

    def _initial(self, label: str, length: int | None, init: str, generator: torch.Generator) -> Tensor:
        """(m, d): where a soft prompt begins."""
        table: Tensor = self._core.get_input_embeddings().weight.detach()
        if label in self._texts:
            ids = self._tokens(label)
            length = length or len(ids)
            return table[torch.tensor([ids[at % len(ids)] for at in range(length)], device=table.device)]
        length = length or USUAL
        if init == "vocabulary":
            return table[torch.randint(len(table), (length,), generator=generator).to(table.device)]
        noise = torch.randn((length, table.shape[1]), generator=generator, dtype=torch.float32).to(table.device)
        wide = table.double()
        return wide.mean(0) + noise * wide.std(0)

    def _add_prompt(self, label: str, value: Tensor) -> None:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(value), prompt_tuning_init="RANDOM")
        with torch.random.fork_rng(devices=[]):  # of a start that is replaced at once
            if self.model is self._core:
                self.model = PeftModelForCausalLM(self._core, config, adapter_name=label)
            else:
                self.model.add_adapter(label, config)
        # A control in half precision would lose the small steps it is trained by.
        dtype = torch.promote_types(self._core.get_input_embeddings().weight.dtype, torch.float32)
        embedding = self.model.prompt_encoder[label].embedding
        embedding.weight = nn.Parameter(value.detach().clone().to(dtype))
        self._controls[label] = [embedding.weight]

    def _add_lora(self, label: str, rank: int, generator: torch.Generator) -> None:
        config = _lora(rank)
        with torch.random.fork_rng(devices=[]):
            if self.model is self._core:
                self.model = PeftModelForCausalLM(self._core, config, adapter_name=label)
            else:
                self.model.add_adapter(label, config)
        self._controls[label] = self._factors(label)
        _start_lora(self._core, label, generator)

    def _factors(self, label: str) -> list[nn.Parameter]:
        return [p for name, p in self._core.named_parameters() if "lora_" in name and f".{label}." in f"{name}."]

    def _add_tokens(self, generator: torch.Generator) -> None:
        tokenizer = copy.deepcopy(self.tokenizer)
        words = {label: f"<|{label}|>" for label in self.labels}
        tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words.values()])
        self.tokenizer = tokenizer
        self._ids = {label: (tokenizer.convert_tokens_to_ids(word),) for label, word in words.items()}
        known = self._core.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:
            with torch.random.fork_rng(devices=[]):  # the new rows are written below
                self._core.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        first = min(ids[0] for ids in self._ids.values())
        if first < known and len(tokenizer) == known:
            return  # a model that had them before
        with torch.no_grad():
            head = self._core.get_output_embeddings().weight
            table = self._core.get_input_embeddings().weight
            for (new,) in self._ids.values():
                head[new] = head[:first].mean(0)
                table[new] = table[int(torch.randint(first, (), generator=generator))]

    def _rest(self) -> None:
        """Nothing is trained between the stages; the first label is active."""
        for parameters in self._controls.values():
            for parameter in parameters:
                parameter.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._activate(self.labels[0])

    def _activate(self, label: str) -> None:
        """Make a control that is held by peft the active one; what requires gradients stays as it is."""
        if self.control == "lora":
            flags = [(p, p.requires_grad) for name, p in self._core.named_parameters() if "lora_" in name]
            shared = [MODEL] if MODEL in self.model.peft_config else []
            self.model.base_model.set_adapter([label, *shared])
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        if self.control in ("prompt", "lora"):
            self.model.active_adapter = label

    def _known(self, label: str) -> str:
        if label not in self._controls:
            raise UserError(f"no control {label!r}; there are {', '.join(self._controls)}")
        return label

    @contextmanager
    def _under(self, label: str | None) -> Iterator[None]:
        """LoRA's adapter of the label active, or none."""
        if label is None and self.control == "lora":
            try:
                with self.model.disable_adapter():
                    yield
            finally:
                self._rest()  # peft makes an adapter trainable when it is enabled again
            return
        if label is not None:
            self._activate(label)
        yield

    # scoring

    def _logps(self, groups: Sequence[Group], labels: Sequence[str | None]) -> Logps:
        """Score groups, each under its control; of LoRA's, one for all of them."""
        groups = [self._written(group, label) for group, label in zip(groups, labels, strict=True)]
        if self.control != "prompt" or not any(labels):
            return completion_logps(self._core, groups)
        prefixes = [None if label is None else self._controls[label][0] for label in labels]
        return completion_logps(self._core, groups, prefixes=prefixes)

    def _written(self, group: Group, label: str | None) -> Group:
        ids = self._ids.get(label or "", ())
        return replace(group, prompt=ids + group.prompt) if ids else group

    def _means(self, rows: Sequence[Labelled]) -> Tensor:
        """(n,): log-likelihood per token of each row under its own control, differentiable."""
        if self.control != "lora":
            return self._logps([row.group for row in rows], [row.label for row in rows]).mean()
        # An adapter acts on a whole pass, so that rows are passed by label.
        pieces, order = [], []
        for label in dict.fromkeys(row.label for row in rows):
            own = [place for place, row in enumerate(rows) if row.label == label]
            with self._under(label):
                pieces.append(self._logps([rows[place].group for place in own], [label] * len(own)).mean())
            order += own
        return torch.cat(pieces)[torch.tensor(order).argsort().to(pieces[0].device)]

    def loss(self, data: Iterable[Any], *, threshold: float | Sequence[float] | None = None) -> Tensor:
        """(): what `fit` minimises, differentiable: the mean over rows of the negative log-likelihood per token.

        Rows weigh the same whatever their length; only completion tokens count. Raises what `rows` raises.
        """
        means: Tensor = self._means(self.rows(data, threshold=threshold))
        return -means.mean()

    @torch.no_grad()
    def log_probs(
        self,
        prompts: Iterable[Any],
        completions: Iterable[Sequence[Any]],
        *,
        label: str | None,
        eos: bool = True,
        batch_tokens: int = 4096,
    ) -> list[list[LogProb]]:
        """`counterproof.language.log_probs` under a label's control; with None under the model alone.

        Args:
            prompts: texts, or chat messages.
            completions: for each prompt its completions, of the same kind.
            label: a label, or a control that `combine` made.
            eos: end plain completions with the end token, and score it.
            batch_tokens: tokens in one forward pass, about.
        """
        if label is not None:
            self._known(label)
        groups = [
            tokenize(self.tokenizer, prompt, list(own), eos=eos)
            for prompt, own in zip(prompts, completions, strict=True)
        ]
        found = []
        with self._evaluating(), self._under(label):
            for run in batches(groups, batch_tokens):
                part = [groups[index] for index in run]
                values = iter(self._logps(part, [label] * len(part)).token.tolist())
                found += [[LogProb(c, tuple(next(values) for _ in c)) for c in group.completions] for group in part]
        return found

    @torch.no_grad()
    def label_accuracy(
        self, data: Iterable[Any], *, threshold: float | Sequence[float] | None = None, batch_tokens: int = 4096
    ) -> float:
        """How well the controls tell the labels apart, without sampling.

        The share of the rows whose completion is likeliest under its own label's control, of all labels; ties count in
        part. Chance is one over the number of labels.

        Args:
            data, threshold: as for `fit`; a label may have no row.
            batch_tokens: tokens in one forward pass, about.
        """
        rows = self.rows(data, threshold=threshold)
        groups = [row.group for row in rows]
        table = []
        with self._evaluating():
            for label in self.labels:
                with self._under(label):
                    parts = [
                        self._logps([groups[index] for index in run], [label] * len(run)).sum()
                        for run in batches(groups, batch_tokens)
                    ]
                table.append(torch.cat(parts))
        sums = torch.stack(table, 1)
        best = (sums == sums.amax(1, keepdim=True)).double()
        own = torch.tensor([self.labels.index(row.label) for row in rows], device=sums.device)
        return float((best.gather(1, own[:, None])[:, 0] / best.sum(1)).mean())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self._core.training
        self._core.eval()
        try:
            yield
        finally:
            self._core.train(training)

    # data

    def rows(self, data: Iterable[Any], *, threshold: float | Sequence[float] | None = None) -> list[Labelled]:
        """Labelled rows of token ids: of preference data what `fit` learns from.

        Args:
            data: any of: Examples of `counterproof.preference.data` (of a pair the chosen completion gets the first
                label and the rejected one the second, likewise good and bad single ones; rankings are cut by
                `threshold`; a column ``control`` names the label itself); mappings in TRL's formats (prompt, completion
                and label, which is a label, True or False, or a number for `threshold`; or prompt, chosen, rejected);
                Samples; rows made before.
            threshold: of scores. One number: from it on the first label, below it the second. Two, with two labels:
                from the higher on the first, up to the lower the second; between them nothing. With more labels: one
                number fewer than labels, increasing, between the bins, of which the highest gets the first label.

        Raises:
            UserError: an unknown label, scores without threshold, data without label, by file and line.
            ValueError: thresholds that do not go with the labels.
            TypeError: data of another kind.
        """
        return self._rows(data, threshold)[0]

    def _rows(self, data: Iterable[Any], threshold: float | Sequence[float] | None) -> tuple[list[Labelled], int, int]:
        cuts = _cuts(threshold, len(self.labels))
        rows: list[Labelled] = []
        dropped = cut = 0
        for number, item in enumerate(data):
            if isinstance(item, Labelled):
                self._check_named(item.label, item.where or f"row {number}")
                rows.append(item)
                continue
            if isinstance(item, Sample):
                where = item.where or f"sample {number}"
                group, labels = item.group, self._of_scores(item.scores, cuts, where, graded=False)
            else:
                example, labels = self._example(item, cuts, f"row {number}")
                where = example.where
                encoded = encode(example, self.tokenizer, max_length=self.max_length, trim_after_eos=True)
                group, cut = encoded.group, cut + bool(encoded.cut)
            for completion, label in zip(group.completions, labels, strict=True):
                if label is None:
                    dropped += 1
                else:
                    rows.append(Labelled(Group(group.prompt, (completion,)), label, where))
        if not rows:
            raise UserError("there are no data with a label; nothing can be learnt from none")
        return rows, dropped, cut

    def _example(self, item: Any, cuts: Sequence[float] | None, where: str) -> tuple[Example, list[str | None]]:
        """An example, and the label of each of its completions."""
        if isinstance(item, Example):
            item = item if item.where else replace(item, where=where)
            if "control" in item.columns:
                self._check_named(item.columns["control"], item.where)
                return item, [item.columns["control"]] * len(item.completions)
            if item.kind in ("completion", "prompt"):
                raise UserError(
                    f"{item.where}: nothing says which label it has; give it a column 'control' with one of "
                    f"{', '.join(self.labels)}"
                )
            return item, self._of_scores(item.scores, cuts, item.where, graded=item.kind == "ranked")
        if not isinstance(item, Mapping):
            raise TypeError(f"{where} is a {type(item).__name__}; give Examples, Samples or mappings with a prompt")
        if {"prompt", "chosen", "rejected"} <= set(item):
            pair = Example(
                prompt=item["prompt"],
                completions=(item["chosen"], item["rejected"]),
                scores=(1.0, 0.0),
                kind="pair",
                where=where,
            )
            return pair, self._of_scores(pair.scores, cuts, where, graded=False)
        if not {"prompt", "completion", "label"} <= set(item):
            raise UserError(
                f"{where} has the fields {', '.join(map(str, item)) or 'none'}; it needs prompt, completion and "
                "label, or prompt, chosen and rejected"
            )
        example = Example(
            prompt=item["prompt"], completions=(item["completion"],), scores=(1.0,), kind="completion", where=where
        )
        label = item["label"]
        if isinstance(label, str):
            self._check_named(label, where)
            return example, [label]
        if not isinstance(label, bool | np.bool_ | int | float | np.number):
            raise UserError(f"{where}: label {label!r} is neither a label nor a number")
        graded = not isinstance(label, bool | np.bool_)
        return example, self._of_scores((float(label),), cuts, where, graded=graded)

    def _check_named(self, label: Any, where: str) -> None:
        if label not in self.labels:
            raise UserError(f"{where}: unknown label {label!r}; the labels are {', '.join(self.labels)}")

    def _of_scores(
        self, scores: Sequence[float], cuts: Sequence[float] | None, where: str, *, graded: bool
    ) -> list[str | None]:
        """The label of each score; None for one between two thresholds."""
        if graded or not set(scores) <= {0.0, 1.0}:
            if cuts is None:
                raise UserError(
                    f"{where}: scores {tuple(scores)} say what is better, not what is good; give a threshold"
                )
            if not all(math.isfinite(score) for score in scores):
                raise UserError(f"{where}: scores {tuple(scores)} are not all numbers")
            if len(self.labels) == 2 and len(cuts) == 2:
                low, high = cuts
                good, bad = self.labels
                return [good if score >= high else bad if score <= low else None for score in scores]
            return [self.labels[sum(score < cut for cut in cuts)] for score in scores]
        if len(self.labels) != 2:
            raise UserError(
                f"{where}: good and bad make two labels, and there are {len(self.labels)}; name each row's label"
            )
        return [self.labels[0] if score == 1.0 else self.labels[1] for score in scores]

    # training

    def fit(
        self,
        data: Iterable[Any],
        *,
        stage1_steps: int = 100,
        stage2_steps: int = 100,
        lr: tuple[float, float] = (5e-3, 1e-5),
        train_control_in_stage2: bool = True,
        stage2_control_lr: float | None = None,
        threshold: float | Sequence[float] | None = None,
        lora: int = 0,
        batch: int = 8,
        warmup: int = 5,
        max_grad_norm: float = 1.0,
        micro_tokens: int = 4096,
        seed: int = 0,
        watch: Callable[[int, int, float], None] | None = None,
    ) -> ControlReport:
        """Learn the controls with the model frozen, then the model, in place.

        AdamW in both stages, started anew; rates warm up and stay. Batches walk through the data in an order that is
        shuffled for every pass; a control without row in a batch is left as it is by that step. Dropout is off.

        Args:
            data: see `rows`; every label needs a row.
            stage1_steps: 0 trains controls and model together from the start: the joint baseline.
            stage2_steps: 0 leaves the model as it is: the controls alone.
            lr: of the controls in stage 1, and of the model in stage 2.
            train_control_in_stage2: let the controls move with the model.
            stage2_control_lr: their rate in stage 2; None is the model's.
            threshold: see `rows`.
            lora: rank of an adapter that is trained in the model's place in stage 2 and merged into it at the end; 0
                trains the model itself.
            batch: rows per step.
            warmup: steps over which a stage's rates rise.
            max_grad_norm: that the norm of all gradients together is clipped to.
            micro_tokens: tokens in memory at a time; a batch of more is passed through in parts, with the same result.
            seed: of order and stage 2's adapter.
            watch: is told after each step the stage, the step in it from 1, and the loss.

        Raises:
            UserError: data that cannot be used, a label without row.
            ValueError: an argument out of range or one that the control does not have.
            ArithmeticError: a loss or gradient that is not finite, naming stage and step.
        """
        self._check_fit(stage1_steps, stage2_steps, lr, stage2_control_lr, lora, batch)
        rows, dropped, cut = self._rows(data, threshold)
        counts = Counter(row.label for row in rows)
        for label in self.labels:
            if not counts[label]:
                raise UserError(f"label {label!r} has no row; its control would learn nothing (rows: {dict(counts)})")
        # A stream of its own for each stage: as many steps of stage 1 as you like leave stage 2's order as it is.
        order1, order2 = (np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(2))
        loop = _Loop(self, rows, batch, warmup, max_grad_norm, micro_tokens, watch)
        controls = [parameter for label in self.labels for parameter in self._controls[label]]
        with self._evaluating():
            try:
                if stage1_steps:
                    loop.train(1, stage1_steps, [(controls, lr[0])], order1)
                if stage2_steps:
                    rate = lr[1] if stage2_control_lr is None else stage2_control_lr
                    moving = [(controls, rate)] if train_control_in_stage2 and controls else []
                    with self._model(lora, seed) as parameters:
                        loop.train(2, stage2_steps, [(parameters, lr[1]), *moving], order2)
            finally:
                self._rest()
        return ControlReport(
            counts={label: counts[label] for label in self.labels},
            dropped=dropped,
            cut=cut,
            history=tuple(loop.history),
        )

    def _check_fit(
        self,
        stage1_steps: int,
        stage2_steps: int,
        lr: tuple[float, float],
        stage2_control_lr: float | None,
        lora: int,
        batch: int,
    ) -> None:
        for name, value, least in (
            ("stage1_steps", stage1_steps, 0),
            ("stage2_steps", stage2_steps, 0),
            ("batch", batch, 1),
            ("lora", lora, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value!r}; expected at least {least}")
        if stage1_steps + stage2_steps == 0:
            raise ValueError("stage1_steps and stage2_steps are both 0, which trains nothing")
        if stage1_steps and self.control in ("text", "token"):
            raise ValueError(f"a control that is a {self.control} is learnt with the model only; set stage1_steps=0")
        if stage2_control_lr is not None and self.control in ("text", "token"):
            raise ValueError(f"a control that is a {self.control} has no learning rate of its own; leave it out")
        if lora and self.control == "token":
            raise ValueError("a new token's embedding is trained with the whole model; set lora=0")
        if len(lr) != 2:
            raise ValueError(f"lr is {lr!r}; expected two rates, of the controls and of the model")
        for rate in (*lr, *([] if stage2_control_lr is None else [stage2_control_lr])):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"a learning rate is {rate!r}; expected a positive number")

    @contextmanager
    def _model(self, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
        """The parameters that stand for the model in stage 2; an adapter's are merged into the model at the end."""
        if not rank:
            yield self._trained
            return
        config = _lora(rank)
        tuner: Any = None
        with torch.random.fork_rng(devices=[]):
            if self.control == "lora":
                self.model.add_adapter(MODEL, config)
            else:
                tuner = LoraModel(self._core, {MODEL: config}, MODEL)
        _start_lora(self._core, MODEL, torch.Generator().manual_seed(seed))
        finished = False
        try:
            yield self._factors(MODEL)
            finished = True
        finally:
            if tuner is not None:
                _ = tuner.merge_and_unload() if finished else tuner.unload()
            else:
                # The controls stay beside it: only this adapter goes into the weights.
                for module in _lora_layers(self._core, MODEL) if finished else ():
                    with torch.no_grad():
                        weight = module.get_base_layer().weight
                        weight += module.get_delta_weight(MODEL).to(weight)
                self.model.base_model.set_adapter(self.labels[0])
                self.model.delete_adapter(MODEL)

    # use

    @overload
    def generate(self, prompts: str, label: str | None, **options: Any) -> list[Generation]: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], label: str | None, **options: Any) -> list[list[Generation]]: ...
    def generate(
        self, prompts: str | Sequence[Prompt], label: str | None, **options: Any
    ) -> list[Generation] | list[list[Generation]]:
        """Continue prompts under a label's control.

        Args:
            prompts: a text, or a list of texts, chat messages or token ids.
            label: a label, or a control that `combine` made; None for the model without control.
            options: of `counterproof.language.sampling`: ``max_new_tokens``, ``temperature``, ``seed``, ...

        Returns:
            For each prompt its continuations; for a single text, its own.
        """
        if label is not None:
            self._known(label)
        given: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        bare = Language(self._core, self.tokenizer)
        before = self._ids.get(label or "", ())
        ids = [before + prompt_tokens(bare, prompt, f"prompt {number}") for number, prompt in enumerate(given)]
        alone = label is None and self.control == "prompt"
        with self._under(label):
            found = generate(bare if alone else Language(self.model, self.tokenizer), ids, **options)
        return found[0] if isinstance(prompts, str) else found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and its tokenizer to a folder, and in it a peft adapter folder for each control.

        Plain transformers and peft load them: ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder),
        f"{folder}/good")``. Words as controls need the model alone. `from_pretrained` loads all at once.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self._core.state_dict()
        if self.control == "lora":
            state = {name.replace(".base_layer.", "."): value for name, value in state.items() if "lora_" not in name}
        self._core.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        if self.model is not self._core:
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = str(folder.resolve())
            self.model.save_pretrained(str(folder))
        about = {"control": self.control, "labels": self.labels, "controls": self.controls, "init_text": self._texts}
        with replacing(folder / ABOUT) as stream:
            json.dump({**about, "max_length": self.max_length}, stream, indent=1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            folder: that was written.
            device, dtype: see `counterproof.language.load`.

        Raises:
            UserError: a folder that holds no controls.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no controls ({ABOUT} is missing); save them with save_pretrained"
            ) from None
        model, tokenizer = load(folder, device=device, dtype=dtype)
        found = cls(
            model,
            tokenizer,
            labels=about["labels"],
            control=about["control"],
            init_text=about["init_text"],
            num_virtual_tokens=1 if about["control"] == "prompt" else None,
            max_length=about["max_length"],
            rank=1,
        )
        if found.model is not found._core:
            found._read(folder, about["controls"], device)
        return found

    def _read(self, folder: Path, controls: Sequence[str], device: str) -> None:
        """Put saved controls in the place of those that are there."""
        for label in controls:
            weights = load_peft_weights(str(folder / label), device=device)
            if self.control == "prompt":
                self._add_read_prompt(label, weights["prompt_embeddings"])
                continue
            if label in self.model.peft_config:
                self._activate(next(other for other in self.labels if other != label))
                self.model.delete_adapter(label)
            with torch.random.fork_rng(devices=[]):
                self.model.add_adapter(label, LoraConfig.from_pretrained(str(folder / label)))
            set_peft_model_state_dict(self.model, weights, adapter_name=label)
            self._controls[label] = self._factors(label)
        self._rest()

    def _add_read_prompt(self, label: str, value: Tensor) -> None:
        if label in self.model.peft_config:
            del self.model.prompt_encoder[label]
            del self.model.peft_config[label]
        self._add_prompt(label, value)


class _Loop:
    """A stage's steps."""

    def __init__(
        self,
        tuning: ControlTuning,
        rows: Sequence[Labelled],
        batch: int,
        warmup: int,
        max_grad_norm: float,
        micro_tokens: int,
        watch: Callable[[int, int, float], None] | None,
    ) -> None:
        self.tuning, self.rows, self.batch, self.warmup = tuning, rows, batch, warmup
        self.max_grad_norm, self.micro_tokens, self.watch = max_grad_norm, micro_tokens, watch
        self.history: list[dict[str, float]] = []

    def train(
        self, stage: int, steps: int, groups: Sequence[tuple[list[nn.Parameter], float]], rng: np.random.Generator
    ) -> None:
        """Minimise over these parameters, at these rates, and no others."""
        trained = [parameter for parameters, _ in groups for parameter in parameters]
        for parameter in self.tuning.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], weight_decay=0.0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup)))
        order: list[int] = []
        for step in range(1, steps + 1):
            while len(order) < self.batch:
                order += rng.permutation(len(self.rows)).tolist()
            picked, order = [self.rows[index] for index in order[: self.batch]], order[self.batch :]
            optimizer.zero_grad()
            losses = self._backward(picked)
            norm = torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
            loss = sum(losses) / len(losses)
            if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
                raise ArithmeticError(
                    f"stage {stage}, step {step}: the loss is {loss}, its gradient's norm {float(norm)}"
                )
            optimizer.step()
            rates.step()
            by_label: dict[str, list[float]] = {}
            for row, value in zip(picked, losses, strict=True):
                by_label.setdefault(row.label, []).append(value)
            means = {f"loss/{label}": sum(values) / len(values) for label, values in sorted(by_label.items())}
            self.history.append({"stage": stage, "step": step, "loss": loss, **means})
            if self.watch is not None:
                self.watch(stage, step, loss)

    def _backward(self, picked: Sequence[Labelled]) -> list[float]:
        """Add up the gradient of the batch's loss in parts; the loss of each row."""
        losses: list[float] = []
        for run in batches([row.group for row in picked], self.micro_tokens):
            part = -self.tuning._means([picked[index] for index in run])
            (part.sum() / len(picked)).backward()
            losses += part.detach().tolist()
        return losses


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _lora_layers(model: nn.Module, adapter: str) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]


def _start_lora(model: nn.Module, adapter: str, generator: torch.Generator) -> None:
    """LoRA's start, from our generator: A uniform as a linear layer's weights, B zero."""
    for module in _lora_layers(model, adapter):
        factor = module.lora_A[adapter].weight
        drawn = torch.rand(factor.shape, generator=generator, dtype=torch.float32) * 2 - 1
        with torch.no_grad():
            factor.copy_(drawn / math.sqrt(factor.shape[1]))
            module.lora_B[adapter].weight.zero_()


def _check(
    labels: Sequence[str],
    control: str,
    num_virtual_tokens: int | None,
    init_text: Mapping[str, str],
    init: str,
    rank: int,
) -> None:
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels is {labels!r}; expected a list of two or more different names")
    for label in labels:
        _check_label(label)
    if control not in get_args(Control):
        raise ValueError(f"control is {control!r}; expected one of {', '.join(get_args(Control))}")
    if init not in ("vocabulary", "normal"):
        raise ValueError(f"init is {init!r}; expected 'vocabulary' or 'normal'")
    if strange := [label for label in init_text if label not in labels]:
        raise ValueError(f"init_text has {strange[0]!r}, which is no label; the labels are {', '.join(labels)}")
    if control == "text" and (missing := [label for label in labels if label not in init_text]):
        raise ValueError(f"control 'text' needs an init_text for every label; {missing[0]!r} has none")
    if num_virtual_tokens is not None and (num_virtual_tokens < 1 or control != "prompt"):
        raise ValueError(
            f"num_virtual_tokens is {num_virtual_tokens!r} with control {control!r}; expected 1 or more, of a prompt"
        )
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; expected 1 or more")


def _check_label(label: str) -> None:
    # A label is the name of a folder and of a peft adapter; peft keeps "default" for the folder above.
    if not LABEL.fullmatch(label) or label in ("default", MODEL):
        raise ValueError(f"label {label!r}; expected letters, digits, '-' and '_', and not 'default'")


def _cuts(threshold: float | Sequence[float] | None, labels: int) -> tuple[float, ...] | None:
    if threshold is None:
        return None
    cuts = tuple(map(float, threshold)) if isinstance(threshold, Sequence) else (float(threshold),)
    rising = all(low < high for low, high in pairwise(cuts))
    if (
        not all(map(math.isfinite, cuts))
        or not rising
        or not (len(cuts) == labels - 1 or (labels, len(cuts)) == (2, 2))
    ):
        raise ValueError(
            f"threshold is {threshold!r} with {labels} labels; expected {labels - 1} increasing numbers"
            + (", or two to leave out what is between them" if labels == 2 else "")
        )
    return cuts


@dataclass(frozen=True, kw_only=True)
class ControlTraining:
    """Control first, model second: method ``meet`` of `counterproof.preference.train`.

    Args:
        labels, control, num_virtual_tokens, init_text, rank: see `ControlTuning`; of data with the column ``control``
            that column names the label.
        threshold, train_control_in_stage2: see `ControlTuning.fit`.
        stage1_share: share of the steps that train the controls alone, in [0, 1]; 0 is the joint baseline.
        control_learning_rate: in stage 1. In stage 2 controls and model have the rate of the settings.
    """

    labels: tuple[str, ...] = ("good", "bad")
    control: Control = "prompt"
    num_virtual_tokens: int | None = None
    init_text: Mapping[str, str] | None = None
    rank: int = 8
    threshold: float | tuple[float, ...] | None = None
    stage1_share: float = 0.5
    control_learning_rate: float = 5e-3
    train_control_in_stage2: bool = True
    name: ClassVar[str] = "meet"

    def __post_init__(self) -> None:
        _check(self.labels, self.control, self.num_virtual_tokens, dict(self.init_text or {}), "vocabulary", self.rank)
        _cuts(self.threshold, len(self.labels))
        if not 0 <= self.stage1_share <= 1:
            raise ValueError(f"stage1_share is {self.stage1_share!r}; expected a number from 0 to 1")
        if not (math.isfinite(self.control_learning_rate) and self.control_learning_rate > 0):
            raise ValueError(f"control_learning_rate is {self.control_learning_rate!r}; expected a positive number")

    def fit(self, language: Language, examples: Sequence[Example], *, settings: TrainSettings, out: Path) -> Trained:
        """Train and save: the model, with stage 2's adapter merged, and in it an adapter folder for each label.

        Args:
            language: model and tokenizer; the model is trained in place.
            examples: see `ControlTuning.rows`.
            settings: see `TrainSettings`. `batch` and `epochs` count completions; `warmup` is a share of each stage.
                Rates stay after the warm-up; schedule, weight decay, dropout, evaluations and checkpoints play no part,
                so that a run which was stopped starts anew.
            out: the folder that is written.

        Raises:
            UserError: data that cannot be used.
            TrainingDiverged: a loss that is not finite.
        """
        tuning = ControlTuning(
            language.model,
            language.tokenizer,
            labels=self.labels,
            control=self.control,
            num_virtual_tokens=self.num_virtual_tokens,
            init_text=self.init_text,
            rank=self.rank,
            max_length=settings.max_length,
            seed=settings.seed,
        )
        rows, dropped, cut = tuning._rows(examples, self.threshold)
        total = settings.steps or math.ceil(settings.epochs * math.ceil(len(rows) / settings.batch))
        first = round(self.stage1_share * total) if self.control in ("prompt", "lora") else 0
        try:
            report = tuning.fit(
                rows,
                stage1_steps=first,
                stage2_steps=total - first,
                lr=(self.control_learning_rate, settings.learning_rate),
                train_control_in_stage2=self.train_control_in_stage2,
                lora=settings.lora if self.control != "token" else 0,
                batch=settings.batch,
                warmup=math.ceil(settings.warmup * total / 2),
                max_grad_norm=settings.max_grad_norm,
                micro_tokens=settings.micro_tokens,
                seed=settings.seed,
            )
        except ArithmeticError as problem:
            raise TrainingDiverged(str(problem)) from None
        report = replace(report, dropped=dropped, cut=cut)
        tuning.save_pretrained(out)
        history = [{**row, "step": row["step"] + (first if row["stage"] == 2 else 0)} for row in report.history]
        notes = (report.text,)
        with replacing(out / "history.json") as stream:
            json.dump(history, stream, indent=1)
        with replacing(out / "result.json") as stream:  # the last: it marks a run that is finished
            about = {"method": self.name, "objective": repr(self), "final": {}, "notes": list(notes)}
            json.dump(about, stream, indent=1)
        return Trained(tuning.model, tuning.tokenizer, out, tuple(history), {}, notes)
