"""Train a model on preferences: transformers' Trainer around the room's objectives.

What is done once is done once: completions are tokenised and their reference log-probabilities computed before the
first step, and kept on disk by content. What is shared is shared: a prompt is read once for all its completions. A
step holds at most `micro_tokens` tokens in memory at a time, whatever its batch. The rest - optimizer, schedule,
accumulation, several processes by accelerate, logging, callbacks, exact resume - is transformers'."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import platformdirs

from counterproof.errors import UserError, extra
from counterproof.exports import exported_names
from counterproof.files import replacing

with extra("preference"):
    import numpy as np
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from counterproof.language import Group, Language, Logps, batches, completion_logps
from counterproof.language.models import load
from counterproof.language.sampling import generate
from counterproof.language.scoring import causal_model
from counterproof.preference.data import Example, encode, read, split
from counterproof.preference.forward import mean_ratio, mismatched, objective_output, reference_logps, referenced
from counterproof.preference.objectives import Batch, Objective, Sample, implicit_rewards

__all__ = [
    "PreferenceTrainer",
    "TrainSettings",
    "Trained",
    "TrainingDiverged",
    "find_method",
    "methods",
    "prepare",
    "train",
]

FOLDER = Path(__file__).parent
RUN = "counterproof.json"  # what a run's folder says of itself
EVALUATED = 256  # held-out rows, at most: an evaluation costs a forward pass over them


class TrainingDiverged(ArithmeticError):
    """A loss or gradient that is not finite: training has stopped, the last good checkpoint stands."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is trained.

    Args:
        epochs: passes over the data, when `steps` is None.
        steps: optimizer steps.
        batch: prompts, with their completions, per optimizer step and process.
        learning_rate: at its highest; the default is for LoRA. Full fine-tuning wants a tenth or less.
        schedule: after the warm-up.
        warmup: share of the steps over which the rate rises.
        weight_decay, max_grad_norm: AdamW's, and the norm that gradients are clipped to.
        lora: rank of the adapter on all linear layers; 0 trains all parameters.
        lora_alpha: its scale is ``lora_alpha / lora``; None is twice the rank.
        lora_dropout: on the adapters' input.
        max_length: tokens of prompt and completion; a longer prompt loses its beginning, and that is said.
        micro_tokens: tokens in memory at a time; a step of more is passed through in parts, with the same result.
        evaluate_every: steps between evaluations; None: ten times in all.
        checkpoint_every: steps between checkpoints; None: as often as it is evaluated.
        samples: held-out prompts that are answered at each evaluation, for KL and length; 0 for none.
        sample_tokens: longest of these answers.
        held_out: share of the prompts that is kept for evaluation when no such data are given.
        seed: of adapter, data order, dropout and answers.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 8
    learning_rate: float = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    max_length: int = 1024
    micro_tokens: int = 2048
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    samples: int = 16
    sample_tokens: int = 64
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch", "learning_rate", "max_grad_norm", "max_length", "micro_tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be positive, not {value!r}")
        for name in ("warmup", "held_out", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}")
        for name in ("lora", "samples", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        model: the trained model; with LoRA a peft model.
        tokenizer: as it was.
        out: the folder it was saved to.
        history: what was logged, a mapping per log with its ``step``.
        final: the last evaluation.
        notes: what was cut, dropped or resumed, in words.
    """

    model: nn.Module
    tokenizer: Any
    out: Path | None
    history: tuple[Mapping[str, float], ...]
    final: Mapping[str, float]
    notes: tuple[str, ...]


@runtime_checkable
class Method(Protocol):
    """A method that is more than an objective: it trains in its own way."""

    name: str

    def fit(self, language: Language, examples: Sequence[Example], *, settings: TrainSettings, out: Path) -> Trained:
        """Train, and save to the folder `out`."""


def methods() -> dict[str, type]:
    """All methods of the room by name: its objectives, and classes with a `name` and a `fit`."""
    import counterproof.preference as room

    found: dict[str, type] = {}
    for exported in exported_names(FOLDER):
        thing = getattr(room, exported)
        if isinstance(thing, type) and thing not in (Objective, Method):
            name = thing.__dict__.get("name")
            if isinstance(name, str) and (issubclass(thing, Objective) or hasattr(thing, "fit")):
                found[name] = thing
    return dict(sorted(found.items()))


def find_method(name: str, **options: Any) -> Any:
    """A method by name, with its hyper-parameters.

    Raises:
        UserError: no such method, or an option that it does not have or that is out of range.
    """
    known = methods()
    if name not in known:
        raise UserError(f"no method {name!r}; known: {', '.join(known)}")
    try:
        return known[name](**options)
    except (TypeError, ValueError) as problem:
        raise UserError(f"method {name}: {problem}") from None


# data


def prepare(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, objective: Objective | None = None
) -> tuple[list[Sample], list[str]]:
    """Tokenise examples; say what was cut.

    Args:
        examples: from `counterproof.preference.data`; those without completion are refused.
        tokenizer: a transformers tokenizer.
        max_length: see `TrainSettings`.
        objective: decides which columns are carried along: those its `needs` name.

    Returns:
        Samples in order, and notes.

    Raises:
        UserError: an example without what the objective needs, by file and line.
    """
    wanted = (objective.needs if objective is not None else frozenset()) - {"reference", "pairs", "baseline"}
    pairs = objective.name if objective is not None and "pairs" in objective.needs else None
    samples, cut, most = [], 0, 0
    for example in examples:
        if not example.completions:
            raise UserError(f"{example.where}: a prompt without completion; there is nothing to train on")
        if pairs and len(example.completions) != 2:
            raise UserError(
                f"{example.where}: {len(example.completions)} completion(s), and {pairs} compares pairs; "
                "use a method for such data (kto for single ones), or make pairs of ranked ones with to_pairs"
            )
        encoded = encode(example, tokenizer, max_length=max_length)
        if encoded.cut:
            cut, most = cut + 1, max(most, encoded.cut)
        columns = {name: _column(example, name) for name in sorted(wanted) if name in example.columns}
        samples.append(Sample(encoded.group, example.scores, columns, example.where))
    notes = []
    if cut:
        notes.append(
            f"{cut} of {len(samples)} prompts were cut at their beginning to fit {max_length} tokens (at most {most} "
            "tokens); completions are whole"
        )
    return samples, notes


def _column(example: Example, name: str) -> Sequence[Any]:
    """A column's values, one for each completion; a single number holds for all of them."""
    value = example.columns[name]
    count = len(example.completions)
    if isinstance(value, int | float):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise UserError(
            f"{example.where}: {name} is {value!r:.60}; give a number, or a list of {count}, one for each completion"
        )
    return value


# references, kept by content


def reference_cache() -> Path:
    """The folder that reference log-probabilities are kept in."""
    return Path(platformdirs.user_cache_dir("counterproof")) / "references"


def cached_references(
    model: nn.Module, samples: Sequence[Sample], *, batch_tokens: int, watch: Callable[[int], None] | None = None
) -> list[Sample]:
    """`referenced`, answered from disk when the same model has scored the same tokens before.

    The key is a digest of all weights that matter and of all tokens; a file that is damaged is made again.
    """
    digest = hashlib.sha256(_fingerprint(model))
    for sample in samples:
        digest.update(repr((sample.group.prompt, sample.group.completions)).encode())
    path = reference_cache() / f"{digest.hexdigest()}.safetensors"
    sizes = [sum(map(len, sample.group.completions)) for sample in samples]
    try:
        token = load_file(path)["token"]
    except (FileNotFoundError, KeyError, SafetensorError):
        token = torch.empty(0)
    if len(token) == sum(sizes) > 0:
        return [replace(sample, reference=own.clone()) for sample, own in zip(samples, token.split(sizes), strict=True)]
    done = referenced(model, samples, batch_tokens=batch_tokens, watch=watch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        temporary = Path(part.name)
    try:
        save_file({"token": torch.cat([sample.reference for sample in done])}, temporary)  # type: ignore[misc]
        temporary.replace(path)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk only costs the next run some time
    finally:
        temporary.unlink(missing_ok=True)
    return done


def _fingerprint(model: nn.Module) -> bytes:
    """Digest of the weights, without adapters that are still without effect (whose second factor is zero)."""
    digest = hashlib.sha256()
    state = model.state_dict()
    idle = all(not bool(value.any()) for name, value in state.items() if "lora_B" in name)
    for name, value in sorted(state.items()):
        if idle and "lora_" in name:
            continue
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


# the trainer


class PreferenceTrainer(Trainer):
    """transformers' Trainer for objectives on preferences.

    Args:
        model: a causal language model, or a peft one.
        objective: what is minimised.
        args: transformers' TrainingArguments; ``per_device_train_batch_size`` counts prompts.
        train_dataset, eval_dataset: Examples, or Samples that are tokenised already.
        processing_class: the tokenizer.
        peft_config: wraps the model before training.
        max_length, micro_tokens, samples, sample_tokens: see `TrainSettings`.
        watch: is told ("references", done, of) while they are computed.
        more: further arguments of transformers' Trainer, such as ``callbacks``.

    The reference is the model as it comes. With full fine-tuning and `samples`, a frozen copy of it is kept for the KL.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        args: TrainingArguments,
        train_dataset: Sequence[Example] | Sequence[Sample],
        eval_dataset: Sequence[Example] | Sequence[Sample] = (),
        processing_class: Any = None,
        peft_config: LoraConfig | None = None,
        *,
        max_length: int = 1024,
        micro_tokens: int = 2048,
        samples: int = 0,
        sample_tokens: int = 64,
        watch: Callable[[str, int, int], None] | None = None,
        **more: Any,
    ) -> None:
        if peft_config is not None:
            model = with_adapter(model, peft_config, args.seed)
        args.remove_unused_columns = False
        self.notes: list[str] = []
        self.micro_tokens, self.samples, self.sample_tokens = micro_tokens, samples, sample_tokens
        rows = self._tokenised(train_dataset, processing_class, max_length, objective)
        held_out = self._tokenised(eval_dataset, processing_class, max_length, objective)
        if not rows:
            raise UserError("there is nothing to train on")
        lengths = [len(c) for sample in rows for c in sample.group.completions]
        self.objective: Objective = objective.calibrated(sum(lengths) / len(lengths))
        if self.objective != objective:
            self.notes.append(
                f"{objective.name}: {self.objective}, for completions of {sum(lengths) / len(lengths):.1f} tokens"
            )
        model.to(args.device)
        # Every evaluation reports KL and the usual rewards, so held-out data always have a reference.
        needs_reference = "reference" in self.objective.needs
        rows = self._referenced(model, rows, watch, "references") if needs_reference else rows
        held_out = self._referenced(model, held_out, watch, "held-out references")
        strangers: list[Sample | None] = [None] * len(rows)
        self.held_out_strangers: list[Sample] = []
        if "baseline" in self.objective.needs:
            strangers = [*self._referenced(model, mismatched(rows), watch, "mismatched references")]
            if held_out:
                self.held_out_strangers = self._referenced(model, mismatched(held_out), None, "")
        self.start: nn.Module | None = None
        if samples and held_out and not isinstance(model, PeftModel):
            import copy

            self.start = copy.deepcopy(model).eval().requires_grad_(False)
        self._sums: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            data_collator=_rows,
            train_dataset=list(zip(rows, strangers, strict=True)),
            eval_dataset=held_out or None,
            processing_class=processing_class,
            **more,
        )
        self.held_out = held_out
        self.out = Path(str(self.args.output_dir))
        self.remove_callback(PrinterCallback)

    def _tokenised(self, data: Any, tokenizer: Any, max_length: int, objective: Objective) -> list[Sample]:
        samples: list[Sample] = list(data)
        if samples and isinstance(samples[0], Sample):
            return samples
        samples, notes = prepare(list(data), tokenizer, max_length=max_length, objective=objective)
        self.notes += notes
        return samples

    def _referenced(
        self, model: nn.Module, rows: list[Sample], watch: Callable[[str, int, int], None] | None, what: str
    ) -> list[Sample]:
        if not rows or all(sample.reference is not None for sample in rows):
            return rows

        def told(done: int) -> None:
            if watch is not None:
                watch(what, done, len(rows))

        return cached_references(model, rows, batch_tokens=self.micro_tokens, watch=told)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one batch, in parts of at most `micro_tokens` tokens."""
        model.train()
        rows: list[Sample] = inputs["samples"]
        policy = self.accelerator.unwrap_model(model)
        baseline = None
        if "baseline" in self.objective.needs:
            baseline = mean_ratio(policy, inputs["strangers"], batch_tokens=self.micro_tokens)
        runs = list(batches([sample.group for sample in rows], self.micro_tokens))
        values, count = [], 0
        for run in runs:
            part = [rows[index] for index in run]
            with self.compute_loss_context_manager():
                output = objective_output(policy, self.objective, part, baseline=baseline)
                # A sum over parts, so that the parts' gradients add up to those of the whole batch's mean.
                loss = output.losses.sum()
            if not bool(torch.isfinite(loss.detach())):
                self._diverged(f"the loss is {float(loss.detach())}", part)
            self.accelerator.backward(loss / self._weight(rows) / self.current_gradient_accumulation_steps)
            values.append(loss.detach())
            count += len(output.losses)
            for name, value in output.metrics.items():
                self._sums[name].append(value)
        if self.accelerator.num_processes > 1:
            self._share_gradients(policy)
        norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            self._diverged("a gradient is not finite", rows)
        return torch.stack(values).sum() / count / self.current_gradient_accumulation_steps

    def _weight(self, rows: Sequence[Sample]) -> int:
        """How many losses a batch has: one for each prompt, or for objectives of single completions one for each."""
        return sum(len(sample.scores) for sample in rows) if "baseline" in self.objective.needs else len(rows)

    def _share_gradients(self, policy: nn.Module) -> None:
        """The mean over processes: parts are scored past accelerate's wrapper, which would have done it."""
        if not self.accelerator.sync_gradients:
            return
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _diverged(self, what: str, rows: Sequence[Sample]) -> None:
        last = last_checkpoint(self.out)
        where = ", ".join(sample.where for sample in rows[:4] if sample.where) or "rows without a name"
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise TrainingDiverged(
            f"step {self.state.global_step + 1}: {what}, on a batch with {where}; training stopped, {kept}. Lower the "
            "learning rate, or look at these rows"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the objective's metrics, averaged since the last log."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
            self._sums.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the policy on held-out data.

        Returns:
            ``eval_loss``; ``eval_accuracy``: share of pairs whose chosen completion has gained more log-probability
            than the rejected one; ``eval_margin``: by how many nats; ``eval_chosen`` and ``eval_rejected``: mean
            log-probabilities now, ``..._gain`` what they have gained; with `samples`, ``eval_kl`` and
            ``eval_kl_per_token`` from the start, ``eval_length`` and ``eval_capped`` of its own answers.
        """
        rows: list[Sample] = list(eval_dataset) if eval_dataset is not None else self.held_out
        if not rows:
            raise UserError("there are no held-out data to evaluate on")
        model = self.accelerator.unwrap_model(self.model)
        now = reference_logps(referenced(model, rows, batch_tokens=self.micro_tokens))
        then = reference_logps(rows)
        metrics = pair_metrics(now, then, rows)
        batch = Batch.of(rows)
        if self.held_out_strangers:
            batch = replace(batch, baseline=mean_ratio(model, self.held_out_strangers, batch_tokens=self.micro_tokens))
        if "hidden" not in self.objective.needs:  # a loss on hidden states is not a function of these alone
            metrics["loss"] = float(self.objective(now, then, batch).loss)
        if self.samples:
            metrics |= self._answers(model, rows)
        found = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @contextmanager
    def _initial(self, model: nn.Module) -> Any:
        """The model as it was before training: adapters off, or the copy that was kept."""
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield model
        else:
            assert self.start is not None
            yield self.start

    def _answers(self, model: nn.Module, rows: Sequence[Sample]) -> dict[str, float]:
        """What the policy says on held-out prompts: distance from the start, and length."""
        prompts = list(dict.fromkeys(sample.group.prompt for sample in rows))[: self.samples]
        drawn = generate(
            Language(cast(Any, model), self.processing_class),
            [list(prompt) for prompt in prompts],
            max_new_tokens=self.sample_tokens,
            seed=self.args.seed,
            batch_size=16,
        )
        groups = [Group(prompt, (own[0].tokens,)) for prompt, own in zip(prompts, drawn, strict=True)]
        training = model.training
        model.eval()
        with torch.no_grad():
            policy = torch.cat([self._sum(model, groups, run) for run in batches(groups, self.micro_tokens)])
            with self._initial(model) as start:
                initial = torch.cat([self._sum(start, groups, run) for run in batches(groups, self.micro_tokens)])
        model.train(training)
        lengths = [len(group.completions[0]) for group in groups]
        kl = float((policy - initial).mean())
        return {
            "kl": kl,
            "kl_per_token": float((policy - initial).sum()) / sum(lengths),
            "length": sum(lengths) / len(lengths),
            "capped": sum(own[0].finish == "length" for own in drawn) / len(drawn),
        }

    @staticmethod
    def _sum(model: nn.Module, groups: Sequence[Group], run: range) -> Tensor:
        total: Tensor = completion_logps(model, [groups[index] for index in run]).sum()
        return total

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Whole or not at all: written beside, then renamed.

        Raises:
            UserError: the disk is full; earlier checkpoints are untouched.
        """
        out = self.out
        staging = out / ".checkpoint.part"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        own = self._get_output_dir

        def beside(trial: Any = None) -> str:
            return str(staging)

        self._get_output_dir = beside  # type: ignore[method-assign]
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = f"checkpoint-{self.state.global_step}"
                shutil.rmtree(out / folder, ignore_errors=True)
                (staging / folder).rename(out / folder)
        except Exception as problem:  # safetensors and torch report a full disk as errors of their own
            full = "No space left" in str(problem) or getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if not full and "os error 28" not in str(problem) and "iostream error" not in str(problem):
                raise
            last = last_checkpoint(out)
            raise UserError(
                f"the disk is full: no checkpoint could be written at step {self.state.global_step}; "
                + (f"the last good one is {last}. " if last else "there is none yet. ")
                + "Free some space and run the same command again"
            ) from None
        finally:
            self._get_output_dir = own  # type: ignore[method-assign]
            if self.args.should_save:  # another process would take away what is about to be renamed
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save and self.args.save_total_limit:
            rotate_checkpoints(output_dir=str(out), save_total_limit=self.args.save_total_limit, use_mtime=False)


def last_checkpoint(out: Path) -> str | None:
    """The newest whole checkpoint of a run's folder."""
    return get_last_checkpoint(str(out)) if out.is_dir() else None


def _rows(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Transformers' collator: nothing is padded, so there is nothing to do."""
    if rows and isinstance(rows[0], tuple):
        return {"samples": [sample for sample, _ in rows], "strangers": [stranger for _, stranger in rows]}
    return {"samples": list(rows)}


def pair_metrics(now: Logps, then: Logps, rows: Sequence[Sample]) -> dict[str, float]:
    """Held-out metrics from log-probabilities now and at the start; those of pairs where there are pairs.

    Of a ranked group the best and the worst completion count as the pair.
    """
    rewards = implicit_rewards(now, then, 1.0)
    sums = now.sum()
    chosen, rejected, at = [], [], 0
    for sample in rows:
        scores = sample.scores
        best, worst = max(range(len(scores)), key=scores.__getitem__), min(range(len(scores)), key=scores.__getitem__)
        if scores[best] > scores[worst]:
            chosen.append(at + best)
            rejected.append(at + worst)
        at += len(scores)
    if not chosen:
        return {"logps": float(sums.mean()), "logps_gain": float(rewards.mean())}
    margins = rewards[chosen] - rewards[rejected]
    return {
        "accuracy": float((margins > 0).double().mean() + 0.5 * (margins == 0).double().mean()),
        "margin": float(margins.mean()),
        "chosen": float(sums[chosen].mean()),
        "rejected": float(sums[rejected].mean()),
        "chosen_gain": float(rewards[chosen].mean()),
        "rejected_gain": float(rewards[rejected].mean()),
    }


def training_arguments(
    settings: TrainSettings, model: nn.Module, out: Path, steps: int, **more: Any
) -> TrainingArguments:
    """Transformers' arguments for settings, on the device that the model is on; `more` are further ones, or others."""
    on_cpu = causal_model(model).get_input_embeddings().weight.device.type == "cpu"
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": settings.batch,
        "max_steps": steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": math.ceil(settings.warmup * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": max(1, steps // 100),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    return TrainingArguments(**{**arguments, **more})


def rows_per_step(settings: TrainSettings) -> int:
    """Rows of an optimizer step, over all processes that torchrun or accelerate launched."""
    return settings.batch * int(os.environ.get("WORLD_SIZE", "1"))


def lora_config(settings: TrainSettings, model: nn.Module) -> LoraConfig | None:
    """The adapter that settings ask for; None for full fine-tuning, and for a model that has one."""
    if not settings.lora or isinstance(model, PeftModel):
        return None
    return LoraConfig(
        r=settings.lora,
        lora_alpha=cast(Any, settings.lora_alpha if settings.lora_alpha is not None else 2 * settings.lora),
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def with_adapter(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft still calls what transformers has renamed; the warning is not for our users.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted: nn.Module = get_peft_model(cast(Any, model), config)
    return adapted


# one call


def train(
    model: Language | str | Path | None,
    data: str | Path | Sequence[Example],
    *,
    method: Objective | Method | str = "dpo",
    out: str | Path,
    held_out: str | Path | Sequence[Example] | None = None,
    settings: TrainSettings | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    limit: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    watch: Callable[[str, int, int], None] | None = None,
) -> Trained:
    """Train a model on preferences and save what comes out: with LoRA an ordinary peft adapter folder.

    A run that was stopped goes on from its last checkpoint when the same call is made again, to the weights that an
    uninterrupted run would have had.

    Args:
        model: model and tokenizer, or what `counterproof.language.models` takes.
        data: preference file or folder, or Examples.
        method: an objective or method, or its name.
        out: folder to write; it must be new, empty, or hold this very run.
        held_out: the same for evaluation; None keeps back a share of the prompts.
        settings: see `TrainSettings`.
        device, dtype: where and in what a model that is loaded here is held.
        limit: read so many examples only.
        callbacks: transformers' TrainerCallbacks.
        watch: is told ("references", done, of).

    Raises:
        UserError: data, model, method or folder that cannot be used.
        TrainingDiverged: a loss that is not finite.
    """
    settings = settings or TrainSettings()
    chosen = find_method(method) if isinstance(method, str) else method
    out = Path(out)
    examples = list(islice(read(data), limit)) if isinstance(data, str | Path) else list(data)[:limit]
    if not isinstance(chosen, Objective):
        # It trains in its own way and evaluates nothing, so it gets every row.
        if held_out:
            raise UserError(f"{chosen.name} evaluates nothing while it trains; leave out the held-out data")
        test: list[Example] = []
    elif held_out is not None:
        test = list(read(held_out)) if isinstance(held_out, str | Path) else list(held_out)
    else:
        kept, aside = split(examples, settings.held_out, settings.seed)
        examples, test = list(kept), list(aside)
    _claim_folder(out, _identity(chosen, settings, examples, model))
    language = model if isinstance(model, Language) else load(model, device=device, dtype=dtype)
    if not isinstance(chosen, Objective):
        return chosen.fit(language, examples, settings=settings, out=out)
    notes = []
    if len(test) > EVALUATED:
        notes.append(f"evaluated on {EVALUATED} of {len(test)} held-out rows")
        test = test[:EVALUATED]
    batch = rows_per_step(settings)
    total = settings.steps or math.ceil(settings.epochs * math.ceil(len(examples) / batch))
    if total * batch < len(examples):
        # Rows that no step will see need no reference.
        order = np.random.default_rng(settings.seed).permutation(len(examples))[: total * batch]
        notes.append(f"{total} steps of {batch} see {len(order)} of {len(examples)} rows")
        examples = [examples[index] for index in sorted(order)]
    every = settings.evaluate_every or max(1, total // 10)
    arguments = training_arguments(
        settings,
        language.model,
        out,
        total,
        eval_strategy="steps" if test else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=settings.checkpoint_every or every,
        save_total_limit=2,
    )
    lora = lora_config(settings, language.model)
    trainer = PreferenceTrainer(
        language.model,
        chosen,
        arguments,
        examples,
        test,
        language.tokenizer,
        lora,
        max_length=settings.max_length,
        micro_tokens=settings.micro_tokens,
        samples=settings.samples if test else 0,
        sample_tokens=settings.sample_tokens,
        watch=watch,
        callbacks=list(callbacks),
    )
    trainer.notes[:0] = notes
    last = last_checkpoint(out)
    if last is not None:
        trainer.notes.append(f"resumed from {last}")
    trainer.train(resume_from_checkpoint=last)
    measured = [row for row in trainer.state.log_history if "eval_loss" in row and row["step"] == total]
    final = dict(measured[-1] if measured else trainer.evaluate()) if test else {}
    finished = Trained(
        trainer.accelerator.unwrap_model(trainer.model),
        language.tokenizer,
        out,
        tuple(trainer.state.log_history),
        final,
        tuple(trainer.notes),
    )
    if trainer.args.should_save:
        save(finished, out, {"method": chosen.name, "objective": repr(trainer.objective)})
    return finished


def save(finished: Trained, out: Path, about: Mapping[str, Any]) -> None:
    """Write model or adapter, tokenizer, and what was measured, into a run's folder; checkpoints go.

    Raises:
        UserError: the disk is full; the checkpoints stay.
    """
    staging = out / ".final.part"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        finished.model.save_pretrained(staging)  # type: ignore[operator]
        finished.tokenizer.save_pretrained(staging)
        (staging / "history.json").write_text(json.dumps([dict(row) for row in finished.history], indent=1))
        (staging / "result.json").write_text(
            json.dumps({**about, "final": dict(finished.final), "notes": list(finished.notes)}, indent=1)
        )
        for path in sorted(staging.iterdir()):
            path.replace(out / path.name)
    except Exception as problem:
        if "No space left" not in str(problem) and "os error 28" not in str(problem):
            raise
        raise UserError(
            f"the disk is full: the model could not be written to {out}; its checkpoints are kept"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _identity(method: Any, settings: TrainSettings, examples: Sequence[Example], model: Any) -> dict[str, Any]:
    """What makes a run the same run."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.prompt, example.completions, example.scores, sorted(example.columns))).encode())
    return {
        "method": repr(method),
        "settings": asdict(settings),
        "model": "given" if isinstance(model, Language) else str(model or "smollm2"),
        "examples": digest.hexdigest(),
    }


def _claim_folder(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder ours, or find that it is.

    Raises:
        UserError: it holds something else, or another run, naming what differs.
    """
    identity = json.loads(json.dumps(identity))
    mark = out / RUN
    if mark.is_file():
        known = json.loads(mark.read_text())
        if known != identity:
            parts = ", ".join(name for name in identity if known.get(name) != identity[name])
            raise UserError(f"{out} holds another run (its {parts} differ); choose another folder")
        if (out / "result.json").exists():
            raise UserError(f"{out} holds this run, finished; choose another folder, or delete it to train again")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a run of ours; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(mark) as stream:
        json.dump(identity, stream, indent=1)
