"""Train a detector: one loop for every method, resumable to the bit."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterproof.detection.batches import Batches, to_device
from counterproof.errors import UserError, extra

with extra("detection"):
    import torch
    from torch import Tensor, nn
    from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["Recipe", "Trainee", "fit"]


@dataclass
class Trainee:
    """A detector with a method on it.

    Attributes:
        module: what is trained: ``module(pixel_values=, pixel_mask=, labels=)`` returns something with ``.loss``.
        detector: what predicts in eval mode: ``.logits`` (B, N, C) and ``.pred_boxes`` (B, N, 4).
        finish: takes the method off again and returns the plain detector, which is what is saved.
    """

    module: nn.Module
    detector: nn.Module
    finish: Callable[[], nn.Module]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimizer steps.
        seconds: processor seconds instead (`steps` is then only the most); the schedule follows their share.
        learning_rate: at its highest, of AdamW.
        backbone_rate: what the backbone's learning rate is multiplied by; 0 leaves it as it is.
        weight_decay: of AdamW; none on biases, norms and embeddings' vectors of one dimension.
        warmup: steps over which the rate rises.
        decay: share of the training, at its end, over which the rate falls linearly to 0.
        clip: greatest norm of the gradient.
        ema: decay of the exponential moving average of the weights, which is then what is evaluated and kept; 0: none.
            Early steps use ``(1 + step) / (10 + step)`` where that is less.
        precision: ``"fp32"`` or ``"bf16"`` (autocast; weights stay float32).
        workers: processes that prepare batches.
    """

    steps: int = 1200
    seconds: float | None = None
    learning_rate: float = 1e-3
    backbone_rate: float = 1.0
    weight_decay: float = 1e-4
    warmup: int = 50
    decay: float = 0.4
    clip: float = 0.1
    ema: float = 0.0
    precision: str = "fp32"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.seconds is not None and not self.seconds > 0):
            raise ValueError(f"steps={self.steps}, seconds={self.seconds}; expected at least a step and time above 0")
        if not 0 <= self.decay <= 1 or not 0 <= self.ema < 1:
            raise ValueError(f"decay={self.decay}, ema={self.ema}; expected shares")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} is neither fp32 nor bf16")

    def factor(self, step: int, share: float) -> float:
        """What the learning rate is multiplied by at a step, with that share of the training behind it."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        return rising * (1.0 if share < 1 - self.decay else max(0.0, (1 - share) / self.decay) if self.decay else 1.0)


def fit(
    trainee: Trainee,
    batches: Batches,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "cpu",
    looks: Sequence[float] = (),
    look: Callable[[int, float], None] | None = None,
    watch: Callable[[int, float, float], None] | None = None,
    clock: Callable[[], float] = time.process_time,
    checkpoint: Path | None = None,
    every: int = 500,
) -> int:
    """Train a detector in place; the weights it ends with are the averaged ones where the recipe has an average.

    Args:
        trainee: on `device`.
        batches: what step s sees.
        recipe: how.
        seed: of dropout and of what a method draws from torch's global generator; each step has its own state of it,
            and the caller's is left as it was.
        looks: shares of the training, ascending, after which `look` is called, once for a step; 1 for the end.
        look: ``look(step, share)``, with the detector in eval mode and, if so, the averaged weights.
        watch: ``watch(step, share, loss)`` after every step.
        clock: processor seconds spent so far, for ``recipe.seconds`` and the method's own time.
        checkpoint: file to go on from, if it is there, and to write every `every` steps and at the end.
        every: see there.

    Returns:
        the number of steps trained.

    Raises:
        FloatingPointError: the loss is not finite; the step and its pictures are named.
        UserError: a checkpoint of another training.
    """
    groups = _parameter_groups(trainee.module, recipe)
    fused = torch.device(device).type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=fused)
    parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
    average = [parameter.detach().clone() for parameter in parameters] if recipe.ema else []
    began = clock()
    done, spent = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        done, spent = _restore(checkpoint, trainee.module, optimizer, average, recipe, seed, device)
    trainee.module.train()
    pending = [share for share in looks if share > _share(recipe, done, spent)]

    def seen(step: int, share: float) -> None:
        if look is not None:
            with _averaged(trainee, parameters, average):
                look(step, min(share, 1.0))

    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        for step, batch in _loaded(batches, done, recipe):
            share = _share(recipe, step, spent + clock() - began)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * recipe.factor(step, share)
            torch.manual_seed((seed * 1_000_003 + step) % 2**63)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss: Tensor = trainee.module(**to_device(batch, device)).loss
            value = float(loss.detach())
            if not math.isfinite(value):
                names = [batches.data.pictures[index].name for index in batches.indices(step)]
                raise FloatingPointError(f"the loss is {value} at step {step}, on {', '.join(names)}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            if average:
                get_ema_multi_avg_fn(min(recipe.ema, (1 + step) / (10 + step)))(average, parameters, step)
            done = step + 1
            share = _share(recipe, done, spent + clock() - began)
            if watch is not None:
                watch(done, share, value)
            if pending and share >= pending[0] - 1e-9:
                paused = clock()
                pending = [later for later in pending if later > share + 1e-9]
                seen(done, share)
                began += clock() - paused
            if checkpoint is not None and (done % every == 0 or share >= 1):
                _save(checkpoint, trainee.module, optimizer, average, recipe, seed, done, spent + clock() - began)
    if pending:  # the time ran out between two steps
        seen(done, 1.0)
    if average:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    trainee.module.eval()
    return done


def _share(recipe: Recipe, step: int, seconds: float) -> float:
    """How much of the training is behind."""
    share = step / recipe.steps
    return share if recipe.seconds is None else max(share, seconds / recipe.seconds)


def _loaded(batches: Batches, start: int, recipe: Recipe) -> Iterator[tuple[int, dict[str, Any]]]:
    steps = range(start, recipe.steps)
    if recipe.workers == 0:
        for step in steps:
            yield step, batches[step]
        return
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.Subset(batches, steps), batch_size=None, shuffle=False, num_workers=recipe.workers
    )
    try:
        yield from zip(steps, loader)
    except UserError as problem:  # the loader puts the worker's traceback before the message
        message = str(problem).splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
        raise UserError(message) from None


def _parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Backbone and the rest, with and without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        backbone = ".backbone." in f".{name}."
        if parameter.requires_grad and (recipe.backbone_rate > 0 or not backbone):
            groups.setdefault((backbone, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": members,
            "highest": recipe.learning_rate * (recipe.backbone_rate if backbone else 1.0),
            "weight_decay": recipe.weight_decay if wide else 0.0,
        }
        for (backbone, wide), members in groups.items()
    ]


@contextmanager
def _averaged(trainee: Trainee, parameters: list[Tensor], average: list[Tensor]) -> Iterator[None]:
    """Inside, the detector is in eval mode with the averaged weights."""
    kept = [parameter.detach().clone() for parameter in parameters] if average else []
    trainee.module.eval()
    try:
        with torch.no_grad():
            if average:
                torch._foreach_copy_(parameters, average)
            yield
    finally:
        if average:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)
        trainee.module.train()


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    recipe: Recipe,
    seed: int,
    step: int,
    seconds: float,
) -> None:
    """Write the state beside the file, then in its place: a kill leaves the old one or the new one."""
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "settings": {**_settings(recipe), "seed": seed},
        "step": step,
        "seconds": seconds,
    }
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)


def _restore(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    recipe: Recipe,
    seed: int,
    device: str,
) -> tuple[int, float]:
    # Our own file, and read as tensors and numbers only: nothing in it is executed.
    state = torch.load(path, map_location=device, weights_only=True)
    wanted = {**_settings(recipe), "seed": seed}
    if state["settings"] != wanted:
        changed = [f"{name} {state['settings'].get(name)} then, {wanted[name]} now" for name in wanted]
        changed = [text for text, name in zip(changed, wanted) if state["settings"].get(name) != wanted[name]]
        raise UserError(f"{path} is of a training with other settings ({'; '.join(changed)}); name another folder")
    try:
        module.load_state_dict(state["module"])
    except RuntimeError as problem:
        raise UserError(f"{path} is of another model: {str(problem).splitlines()[-1].strip()}") from None
    optimizer.load_state_dict(state["optimizer"])
    for ours, theirs in zip(average, state["average"]):
        ours.copy_(theirs)
    return state["step"], state["seconds"]


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in vars(recipe).items() if name != "workers"}
