"""A detector trained on one's own pictures, by any method of the room.

A training keeps its state in the folder it writes to, so that it goes on from there after a kill; what it leaves is a
plain transformers checkpoint, loadable without Counterproof.
"""

import hashlib
import inspect
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from counterproof.detection import task
from counterproof.detection.annotations import (
    HELD_OUT,
    DetectionData,
    Spec,
    _locate,
    _yaml_of_folder,
    read_data,
    split_data,
    write_coco,
)
from counterproof.detection.batches import Batches, Pixels, fitted, median_side
from counterproof.detection.detectors import (
    check_queries,
    classes_of,
    load_detector,
    pixels_of,
    predict,
    save_detector,
)
from counterproof.detection.drawing import draw_pairs
from counterproof.detection.evaluation import DetectionScores, evaluate
from counterproof.detection.outputs import (
    check_device,
    folder_of,
    save_picture,
    shown,
    some_of,
    spaced,
    write_bytes,
    write_json,
)
from counterproof.detection.tiny import tiny_detector
from counterproof.detection.training import Recipe, Trainee, fit
from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("detection"):
    import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "TrainSettings",
    "Trained",
    "detection_methods",
    "train",
]

RUN = "training.json"  # what a training's folder says of itself
CHECKPOINT = "checkpoint.pt"
PROGRESS = "progress.json"
HELD_OUT_JSON = "held-out.json"
EVALUATED = 500  # held-out pictures, at most, that the looks during a training are at
POINTS = 200  # of the curve of losses, at most
PAPERS = "counterproof.papers"  # entry points of third parties' papers

Watch = Callable[[str, int, int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a detector is trained. None stands for what suits a model that was trained before, or a new one.

    Args:
        epochs: passes over the pictures, when `steps` is None; 30, or 100 for a new model.
        steps: optimizer steps.
        batch: pictures a step.
        learning_rate: of AdamW at its highest; 1e-4, or 1e-3 for a new model. It rises over the first 20th of the
            steps, 500 at most, and falls to 0 over the last 40 %.
        backbone_rate: what the backbone's is multiplied by; 0.1, or 1 for a new model.
        side: longest side of the pictures in pixels; 640, or 320 for a new model.
        scales: least and greatest share of `side`, drawn for each batch.
        weight_decay, clip: of AdamW, and the greatest norm of the gradient.
        held_out: share of the pictures that is kept for evaluation when no data for it are given; a fifth, unless a
            YOLO folder has train and val of its own, which are then kept apart.
        ema: decay of the moving average of the weights, which is what is evaluated and saved; 0 for none. In a short
            training it averages over about the last ninth of the steps.
        precision: ``"fp32"`` or ``"bf16"``.
        looks: evaluations over the training, the last one at its end.
        seed: of a new model or class head, of the split, and of the pictures' order, flips and sizes.

    Raises:
        UserError: a value out of range.
    """

    epochs: float | None = None
    steps: int | None = None
    batch: int = 8
    learning_rate: float | None = None
    backbone_rate: float | None = None
    side: int | None = None
    scales: tuple[float, float] = (0.75, 1.0)
    weight_decay: float = 1e-4
    clip: float = 0.1
    held_out: float | None = None
    ema: float = 0.9997
    precision: str = "fp32"
    looks: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch", "learning_rate", "side", "clip", "looks"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}; expected a number above 0")
        if self.side is not None and self.side < 32:
            raise UserError(f"side is {self.side}; expected 32 pixels or more")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; expected a share between 0 and 1")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; expected a decay from 0 to below 1")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision {self.precision!r} is neither fp32 nor bf16")
        for name in ("backbone_rate", "weight_decay", "seed"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}; expected a number from 0")
        if not 0 < self.scales[0] <= self.scales[1]:
            raise UserError(f"scales are {self.scales}; expected the least and the greatest share of the side")

    def filled(self, pretrained: bool) -> "TrainSettings":
        """With a value for all that depends on the model."""
        chosen = (30.0, 1e-4, 0.1, 640) if pretrained else (100.0, 1e-3, 1.0, 320)
        names = ("epochs", "learning_rate", "backbone_rate", "side")
        missing: dict[str, Any] = {name: value for name, value in zip(names, chosen) if getattr(self, name) is None}
        if self.steps is not None:
            missing["epochs"] = None
        return replace(self, **missing)


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        model: the detector, plain and in eval mode.
        out: the folder it was saved to.
        steps: optimizer steps.
        scores: on all held-out pictures.
        curve: mappings with step, ap, ap50 and ap75, on at most 500 held-out pictures.
        losses: (step, mean loss up to it since the one before).
        held_out: the data they are of.
        notes: what a reader has to know, in words.
    """

    model: "PreTrainedModel"
    out: Path
    steps: int
    scores: DetectionScores
    curve: tuple[Mapping[str, float | None], ...]
    losses: tuple[tuple[int, float], ...]
    held_out: DetectionData
    notes: tuple[str, ...]

    @property
    def held_out_spec(self) -> str:
        """What reads the held-out pictures again; empty when they were held in memory."""
        return f"coco:{self.out / HELD_OUT_JSON},{folder_of(self.held_out)}" if self.held_out.images is None else ""

    def as_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "steps": self.steps,
            "scores": self.scores.as_json(),
            "curve": [dict(point) for point in self.curve],
            "held_out": self.held_out_spec or None,
            "notes": list(self.notes),
        }


# methods


def detection_methods() -> dict[str, Any]:
    """The arms of the task `detection` by name, ``"baseline"`` first: what `counterproof compare detection` takes.

    Raises:
        UserError: claims of an installed paper that cannot be imported.
    """
    found = {task.BASELINE.name: task.BASELINE}
    found |= {arm.name: arm for arm in getattr(task, "ARMS", {}).get(task.DETECTION.name, ())}
    points = entry_points(group=PAPERS)
    for package in ("counterproof.detection", *(point.value for point in points)):
        try:
            claims = import_module(f"{package}.claims")
            for module in iter_modules(claims.__path__, f"{package}.claims."):
                paper = import_module(module.name)
                arms = list(getattr(paper, "ARMS", {}).get(task.DETECTION.name, ()))
                for claim in getattr(paper, "CLAIMS", ()):
                    if claim.task.name == task.DETECTION.name:
                        arms += [claim.baseline, claim.method]
                for arm in arms:
                    found.setdefault(arm.name, arm)
        except ImportError as problem:
            raise UserError(f"the claims in {package} cannot be read: {problem}") from problem
    return found


def find_method(name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A method (None for the plain detector) and its settings, those of its arm with others in their place.

    Raises:
        UserError: no such method, or a setting that it does not have, naming what there is.
    """
    known = detection_methods()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
        raise UserError(f"no method {name!r}{hint}")
    method = known[name].load()
    settings = {**known[name].settings, **options}
    if method is None:
        if options:
            raise UserError(f"{name} trains the detector as it is and has no settings; leave out {', '.join(options)}")
        return None, {}
    parameters = inspect.signature(method).parameters.values()
    taken = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    taken = sorted({*taken, *known[name].settings} - {"median_side"})
    for option in options:
        if option not in taken and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise UserError(f"method {name} has no setting {option!r}; it has {', '.join(taken) or 'none'}")
    return method, settings


# train


def train(
    data: Spec | DetectionData,
    out: Path | str,
    *,
    model: str | Path | None = None,
    method: str = "baseline",
    options: Mapping[str, Any] | None = None,
    settings: TrainSettings | None = None,
    val: Spec | DetectionData | None = None,
    device: str = "cpu",
    workers: int = 0,
    watch: Watch | None = None,
) -> Trained:
    """Train a detector on one's own pictures and save it; go on where the same call was stopped.

    Args:
        data: what to train on, as `read_data` takes it.
        out: a new or empty folder, or the one where the same training was stopped. It gets the checkpoint
            (config.json, model.safetensors, preprocessor_config.json), training.json (settings, data, curve, scores),
            held-out.json (COCO), curve.png and detections.png.
        model: a detector's folder or hub id; None builds a small Deformable DETR.
        method: of `detection_methods`.
        options: the method's settings, over those of its arm.
        settings: see there.
        val: data to evaluate on; None holds out a share.
        device: of torch.
        workers: processes that prepare batches.
        watch: ``watch(what, done, of, values)``: steps of "training" with their loss, pictures "searched", and for
            each look "look" with its step and its ap, ap50 and ap75.

    Raises:
        UserError: data, model, method or settings that will not do; a folder that holds something else; a launcher of
            several processes.
        FloatingPointError: the loss is not finite.
    """
    out = Path(out)
    tell = watch or (lambda what, done, of, values: None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "this training works in one process; for several, put the method on a model and train that with "
            "transformers' Trainer: counterproof show group-detr says how"
        )
    check_device(device)
    _check_free(out)
    wanted = (settings or TrainSettings()).filled(model is not None)
    attach, chosen = find_method(method, options or {})
    tell("reading", 0, 0, {})
    learnt, held_out, notes = _parts(data, val, wanted)
    if model is None:
        detector = _new_detector(learnt, wanted.seed)
    else:
        detector = load_detector(model, learnt.classes, device=device, seed=wanted.seed)
        known = named_classes(model)
        if known != learnt.classes:
            notes.append(
                f"{model} was trained for {len(known)} other classes ({some_of(known)}): its class head starts anew"
            )
    pixels = pixels_of(model, detector, wanted.side)
    for part in (learnt, held_out):
        check_queries(detector, part)
    classes = classes_of(detector, held_out, model or "the detector")
    batches = Batches(learnt, wanted.batch, pixels, seed=wanted.seed, scales=wanted.scales)
    steps = wanted.steps or max(1, math.ceil((wanted.epochs or 0) * len(learnt.pictures) / batches.size))
    identity = {
        "method": method,
        "method_settings": chosen,
        "settings": {**asdict(wanted), "steps": steps, "epochs": None},
        "model": _digest_model(detector),
        "data": _digest_data(learnt),
        "held_out": _digest_data(held_out),
    }
    about = {
        "model": None if model is None else str(model),
        "data": {
            "source": learnt.source,
            "pictures": len(learnt.pictures),
            "objects": learnt.objects,
            "held_out": {"source": held_out.source, "pictures": len(held_out.pictures), "objects": held_out.objects},
            "classes": list(learnt.classes),
            "category_ids": list(learnt.category_ids),
        },
        "versions": {name: version(name) for name in ("counterproof", "torch", "transformers")},
    }
    identity = json.loads(json.dumps(identity))
    trainee = _trainee(detector, method, attach, chosen, median_side(learnt, pixels), wanted.seed)
    _claim(out, {"finished": False, "identity": identity, **about})

    detector.to(device)
    trainee.module.to(device)
    sample = held_out.subset(spaced(len(held_out.pictures), EVALUATED))
    diary = _Diary(out / PROGRESS, steps)

    def search(data: DetectionData, model: Any, done: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        return predict(
            model,
            data,
            pixels,
            model_type=detector.config.model_type,
            classes=classes,
            batch=wanted.batch,
            device=device,
            precision=wanted.precision,
            watch=done,
        )

    def look(step: int, share: float) -> None:
        diary.look(step, evaluate(sample, search(sample, trainee.detector)))
        tell("look", step, steps, diary.looks[step])

    def after(step: int, share: float, loss: float) -> None:
        diary.step(step, loss)
        tell("training", step, steps, {"loss": loss})

    warmup = max(1, min(500, round(0.05 * steps)))
    recipe = Recipe(
        steps=steps,
        learning_rate=float(wanted.learning_rate or 0),
        backbone_rate=float(wanted.backbone_rate or 0),
        weight_decay=wanted.weight_decay,
        warmup=warmup,
        clip=wanted.clip,
        ema=wanted.ema,
        precision=wanted.precision,
        workers=workers,
    )
    try:
        fit(
            trainee,
            batches,
            recipe,
            seed=wanted.seed,
            device=device,
            looks=[number / wanted.looks for number in range(1, wanted.looks)],
            look=look,
            watch=after,
            checkpoint=out / CHECKPOINT,
            every=diary.every,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"batches of {batches.size} pictures of {wanted.side} pixels do not fit on {device}; give fewer with "
            "--batch, or smaller ones with --side"
        ) from None

    plain: Any = trainee.finish()
    plain.eval()
    results = search(held_out, plain, lambda done: tell("searched", done, len(held_out.pictures), {}))
    scores = evaluate(held_out, results)
    ids = {picture.id for picture in sample.pictures}
    diary.look(steps, evaluate(sample, [record for record in results if record["image_id"] in ids]))
    tell("look", steps, steps, diary.looks[steps])
    done = Trained(plain, out, steps, scores, diary.curve, diary.points, held_out, tuple(notes))
    _write(done, pixels, results, {"finished": True, "identity": identity, **about})
    return done


def _parts(
    data: Spec | DetectionData, val: Spec | DetectionData | None, settings: TrainSettings
) -> tuple[DetectionData, DetectionData, list[str]]:
    """What is learnt, what is held out, and notes."""

    def read(source: Spec | DetectionData, split: str | None = None) -> DetectionData:
        return source if isinstance(source, DetectionData) else read_data(source, split=split, check_pictures=True)

    if val is not None and settings.held_out is not None:
        raise UserError("held-out pictures come from --val or are a share (--held-out) of the data; give one of them")
    notes: list[str] = []
    if val is not None:
        learnt, held_out = read(data), read(val)
    else:
        own = settings.held_out is None and not isinstance(data, DetectionData) and has_own_split(data)
        if own:
            learnt, held_out = read(data, "train"), read(data, "val")
            shared = _shared(learnt, held_out)
            own = not shared
            notes.append(
                f"train and val of {data} share {shared} pictures: a fifth of all is held out instead"
                if shared
                else "evaluated on the data's own val pictures"
            )
        if not own:
            whole = read(data)
            if len(whole.pictures) < 2:
                raise UserError(f"{whole.source} has one picture only; give two or more, or others with --val")
            share = settings.held_out or HELD_OUT
            learnt, held_out = split_data(whole, share, np.random.default_rng([settings.seed, 7]))
            if not held_out.objects:
                notes.append("no object is in the held-out pictures: AP is undefined; hold out more with --held-out")
    if not learnt.objects:
        raise UserError(f"{learnt.source} has no objects in the pictures to train on; hold out fewer, or add labels")
    if val is not None and (shared := _shared(learnt, held_out)):
        notes.append(f"{shared} pictures of --val are trained on too: its scores flatter the detector")
    absent = sorted(set(held_out.classes) - set(learnt.classes))
    if absent:
        notes.append(f"held-out classes that are not trained on, AP 0: {some_of(absent)}")
    return learnt, held_out, [*learnt.notes, *notes]


def has_own_split(spec: Spec) -> bool:
    """Whether data are a YOLO folder that names pictures to train on and others to evaluate on."""
    found = _locate(spec)
    if not found.yolo:
        return False
    described = found.path if found.path.is_file() else _yaml_of_folder(found.path)
    if described is None:
        return all((found.path / "images" / name).is_dir() for name in ("train", "val"))
    try:
        content = yaml.safe_load(described.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # reading it says what is wrong
    return isinstance(content, dict) and bool(content.get("train") and content.get("val"))


def named_classes(model: str | Path) -> tuple[str, ...]:
    """The classes of a detector that has been loaded before, by number."""
    from transformers import AutoConfig

    labels = AutoConfig.from_pretrained(model).id2label
    return tuple(str(labels[number]) for number in sorted(labels))


def _shared(first: DetectionData, second: DetectionData) -> int:
    """How many files both have."""
    sets = [{picture.file.resolve() for picture in data.pictures if picture.file} for data in (first, second)]
    return len(sets[0] & sets[1])


def _new_detector(data: DetectionData, seed: int) -> Any:
    """A small Deformable DETR for these classes, with queries for the fullest picture twice over."""
    own = task.OWN
    most = max(int((~picture.crowd).sum()) for picture in data.pictures)
    labels = dict(enumerate(data.classes))
    return tiny_detector(
        "deformable",
        num_labels=len(labels),
        num_queries=max(own["queries"], 2 * most),
        levels=own["levels"],
        channels=tuple(own["channels"]),
        seed=seed,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )


def _trainee(detector: Any, method: str, attach: Any, settings: dict[str, Any], side: float, seed: int) -> Trainee:
    """The detector with the method on it; what the method draws follows from the seed."""
    if attach is None:
        return Trainee(detector, detector, lambda: detector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            trainee: Trainee = attach(detector, median_side=side, **settings)
        except UserError:
            raise
        except (TypeError, ValueError) as problem:
            raise UserError(f"method {method}: {problem}") from problem
    return trainee


class _Diary:
    """Losses and looks of a training, kept on disk as often as its checkpoint.

    A step that is trained again after a kill, from the checkpoint on, overwrites what it had left.
    """

    def __init__(self, file: Path, steps: int) -> None:
        self.file = file
        self.window = max(1, math.ceil(steps / POINTS))
        self.every = self.window * max(1, math.ceil(10 / self.window), round(steps / 25 / self.window))
        self.steps = steps
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"losses": {}, "looks": {}}
        self.losses: dict[int, float] = {int(step): value for step, value in kept["losses"].items()}
        self.looks: dict[int, dict[str, Any]] = {int(step): value for step, value in kept["looks"].items()}
        self.recent: list[float] = []

    def step(self, step: int, loss: float) -> None:
        self.recent.append(loss)
        if step % self.window == 0 or step == self.steps:
            self.losses[step] = float(np.mean(self.recent))
            self.recent.clear()
        if step % self.every == 0 or step == self.steps:  # before the checkpoint is
            self.keep()

    def look(self, step: int, scores: DetectionScores) -> None:
        found = scores.as_json()
        self.looks[step] = {name: found[name] for name in ("ap", "ap50", "ap75")}
        self.keep()

    def keep(self) -> None:
        with replacing(self.file) as stream:
            json.dump({"losses": self.losses, "looks": self.looks}, stream)

    @property
    def curve(self) -> tuple[dict[str, Any], ...]:
        return tuple({"step": step, **self.looks[step]} for step in sorted(self.looks))

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        return tuple(sorted(self.losses.items()))


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RUN).is_file():
        raise UserError(f"{out} is not empty and not a training of ours; name a new folder")


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Make the folder this training's, or find that it is.

    Raises:
        UserError: it is another's, naming what differs; or this one has finished.
    """
    mark = out / RUN
    if mark.is_file():
        try:
            known = json.loads(mark.read_text(encoding="utf-8"))
            theirs, finished = known["identity"], known["finished"]
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{mark} is not of a training of ours ({problem}); name a new folder") from None
        changed = list(_differences(theirs, about["identity"]))
        if changed:
            raise UserError(f"{out} holds another training ({'; '.join(changed)}); name a new folder")
        if finished:
            raise UserError(f"{out} holds this training, finished; name a new folder, or delete it to train again")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot make the folder {out}: {problem.strerror}; name another") from None
    write_json(mark, about)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for name in now:
        old = then.get(name)
        if old == now[name]:
            continue
        if isinstance(old, Mapping) and isinstance(now[name], Mapping):
            for inner in sorted({*old, *now[name]}):
                if old.get(inner) != now[name].get(inner):
                    yield f"{inner} {old.get(inner)} then, {now[name].get(inner)} now"
        elif name in ("model", "data", "held_out"):
            yield {"model": "another model", "data": "other data", "held_out": "other held-out data"}[name]
        else:
            yield f"{name} {old} then, {now[name]} now"


def _digest_model(model: Any) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_data(data: DetectionData) -> str:
    return hashlib.sha256(json.dumps(data.to_coco()).encode()).hexdigest()


def _write(done: Trained, pixels: Pixels, results: Sequence[Mapping[str, Any]], about: dict[str, Any]) -> None:
    """All that a training leaves; that it is finished last, so that a kill before it loses nothing."""
    out = done.out
    if pixels.stretch:  # squares are rounded on reading: what is saved says what was trained on
        pixels = replace(pixels, side=fitted(1, 1, pixels.side, stretch=True)[0])
    save_detector(done.model, out, pixels)
    if done.held_out.images is None:
        write_coco(done.held_out, out / HELD_OUT_JSON)
    save_picture(draw_pairs(done.held_out, results, shown(done.held_out)), out / "detections.png")
    _draw_curve(done, out / "curve.png")
    found = {name: value for name, value in done.as_json().items() if name != "out"}
    write_json(out / RUN, {**about, **found, "losses": [list(point) for point in done.losses]})
    for name in (CHECKPOINT, f"{CHECKPOINT}.part", PROGRESS):
        (out / name).unlink(missing_ok=True)


def _draw_curve(done: Trained, file: Path) -> None:
    """AP on held-out pictures, and the loss, over the steps."""
    with extra("detection"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    lines = right.plot(*zip(*done.losses), color="0.6", lw=1, label="loss")
    at = [float(point["step"] or 0) for point in done.curve]
    for name, colour in (("ap", "#0072b2"), ("ap50", "#d55e00")):
        values = [math.nan if (value := point[name]) is None else value for point in done.curve]
        lines += left.plot(at, values, "o-", color=colour, ms=4, label=name.upper())
    left.set_xlabel("step")
    left.set_ylabel("AP on held-out pictures")
    left.set_ylim(bottom=0)
    right.set_ylabel("loss in training")
    right.set_ylim(bottom=0)
    left.set_zorder(1)
    left.patch.set_visible(False)
    left.grid(axis="y", color="0.92")
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside upper center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(file, buffer.getvalue())
