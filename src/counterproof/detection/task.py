"""What the papers of this room are compared on: a DETR trained on generated scenes, or on the user's pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Budget, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    from counterproof.detection.annotations import DetectionData
    from counterproof.detection.batches import Pixels
    from counterproof.detection.training import Trainee

# A user's own pictures or model, in place of what the scenes need.
OWN: Mapping[str, Any] = {
    "side": 320,
    "batch": 8,
    "scales": (0.75, 1.0),
    "evaluated": 500,
    "queries": 50,
    "channels": (24, 48, 96),
    "levels": 2,
}

QUICK: Mapping[str, Any] = {
    "family": "deformable",
    "side": 48,
    "scenes": 3000,
    "evaluated": 300,
    "objects": (1, 4),
    "overlap": 0.2,
    "width": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "queries": 16,
    "levels": 1,
    "channels": (24, 48),
    "steps": 1200,
    "seconds": None,
    "batch": 16,
    "learning_rate": 1e-3,
    "backbone_rate": 1.0,
    "warmup": 50,
    "decay": 0.4,
    "clip": 0.1,
    "ema": 0.0,
    "flips": True,
    "scales": (1.0, 1.0),
    "precision": "fp32",
    "workers": 0,
    "looks": (0.25, 0.5, 0.75, 1.0),
    "own": OWN,
    # A model that has been trained before is trained on as its paper does.
    "own_model": {"learning_rate": 1e-4, "backbone_rate": 0.1},
}

STANDARD: Mapping[str, Any] = {
    **QUICK,
    "side": 64,
    "scenes": 6000,
    "objects": (1, 6),
    "decoder_layers": 3,
    "queries": 24,
    "steps": 4000,
    "own": {**OWN, "side": 480, "evaluated": 2000},
}

# Deformable DETR's own schedule; meant for COCO with --data on a GPU, where the scenes only stand in for it.
FULL: Mapping[str, Any] = {
    **STANDARD,
    "side": 128,
    "scenes": 20_000,
    "evaluated": 1000,
    "objects": (1, 10),
    "width": 256,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "queries": 300,
    "levels": 3,
    "channels": (96, 192, 384, 768),
    "steps": 88_000,
    "learning_rate": 2e-4,
    "warmup": 500,
    "decay": 0.1,
    "precision": "bf16",
    "workers": 8,
    "own": {
        "side": 800,
        "batch": 16,
        "scales": (0.6, 1.0),
        "evaluated": 5000,
        "queries": 300,
        "channels": (96, 192, 384, 768),
        "levels": 3,
    },
    "own_model": {"learning_rate": 2e-4, "backbone_rate": 0.1},
}

METRICS = {
    "ap": Metric("higher", says="COCO AP on held-out pictures: mean over IoU thresholds .50 to .95 and classes"),
    "ap50": Metric("higher", says="AP at IoU .50"),
    "ap75": Metric("higher", says="AP at IoU .75"),
    "ap_curve": Metric("higher", says="mean AP after 25, 50, 75 and 100 % of the training"),
    "train_seconds": Metric("lower", "s", "processor time of the training, the method's own included"),
}

DETECTION = Task(
    name="detection",
    says=(
        "a small Deformable DETR of transformers trained from scratch on scenes of shapes, or a detector of yours on "
        "your pictures, for so many steps: COCO AP on held-out pictures"
    ),
    run="counterproof.detection.task:run_detection",
    metrics=METRICS,
    budgets={
        "quick": Budget(settings=QUICK, seeds=(4, 8), minutes=5.0, trial_minutes=15.0),
        "standard": Budget(settings=STANDARD, seeds=(4, 12), minutes=40.0, trial_minutes=60.0),
        "full": Budget(settings=FULL, seeds=(3, 5), minutes=None, trial_minutes=3000.0, trial_memory=64.0),
    },
    plug=(
        "method(model, *, median_side, **settings) -> Trainee: puts a method on a transformers detector; median_side "
        "is the objects' median side in pixels. None: the detector is trained as it is."
    ),
    data="counterproof.detection.annotations:describe_data",
    model="a detector of transformers: a local folder or a hub id",
)

# The same with as much processor time for every arm; the schedule follows the share of it.
DETECTION_BY_TIME = replace(
    DETECTION,
    name="detection-by-time",
    says=DETECTION.says.replace("for so many steps", "for so much processor time"),
    budgets={
        level: replace(budget, settings={**budget.settings, "steps": 10**6, "seconds": seconds})
        for (level, budget), seconds in zip(DETECTION.budgets.items(), (60.0, 600.0, 86_400.0))
    },
)

BASELINE = Arm("baseline")


@dataclass
class Outcome:
    """What a trial leaves: its metrics, the detector in eval mode, and what it was measured on."""

    metrics: dict[str, float]
    trainee: "Trainee"
    held_out: "DetectionData"
    pixels: "Pixels"


def run_detection(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Train a detector with the arm's method on it; COCO AP on held-out pictures.

    Weights at the start, pictures, their order, flips and sizes are the same for every arm.
    """
    return train_detector(arm, trial).metrics


def train_detector(arm: Arm, trial: Trial) -> Outcome:
    """The training behind `run_detection`, for tasks that measure more of the detector."""
    import numpy as np

    from counterproof.detection.batches import Batches, median_side
    from counterproof.detection.detectors import check_queries, predict
    from counterproof.detection.evaluation import evaluate
    from counterproof.detection.training import Recipe, Trainee, fit

    own = trial.data is not None or trial.model is not None
    settings = dict(trial.settings)
    if own:
        settings |= settings["own"]
    if trial.model is not None:
        settings |= settings["own_model"]
    method = arm.load()
    curve: list[float] = []
    with trial.off_clock():
        train, held_out = load_data(trial, settings)
        model, pixels = load_model(trial, settings, train)
        for data in (train, held_out):
            check_queries(model, data)
        seed = int(trial.rng("training").integers(2**31))
        batches = Batches(
            train, settings["batch"], pixels, seed=seed, flips=settings["flips"], scales=tuple(settings["scales"])
        )
        side = median_side(train, pixels)
    if method is None:
        trainee = Trainee(model, model, lambda: model)
    else:
        trainee = method(model, median_side=side, **arm.settings)
        trainee.module.to(trial.device)
    chosen = {name: settings[name] for name in ("steps", "seconds", "learning_rate", "backbone_rate", "warmup")}
    chosen |= {name: settings[name] for name in ("decay", "clip", "ema", "precision", "workers")}
    began = trial.cost()

    def look(step: int, share: float) -> None:
        with trial.off_clock():
            found = predict(
                trainee.detector,
                held_out,
                pixels,
                model_type=model.config.model_type,
                device=trial.device,
                precision=settings["precision"],
            )
            scores = evaluate(held_out, found)
            curve.append(scores.ap)
            last.update(ap=scores.ap, ap50=scores.ap50, ap75=scores.ap75)
        trial.log(0.98 * share, step=step, ap=scores.ap, ap50=scores.ap50)

    def watch(step: int, share: float, loss: float) -> None:
        if step % 20 == 0:
            trial.log(0.98 * share)

    last: dict[str, float] = {}
    try:
        fit(
            trainee,
            batches,
            Recipe(**chosen),
            seed=seed,
            device=trial.device,
            looks=settings["looks"],
            look=look,
            watch=watch,
            clock=trial.cost,
        )
    except FloatingPointError as problem:
        raise Diverged(str(problem)) from None
    metrics = {**last, "ap_curve": float(np.mean(curve)), "train_seconds": trial.cost() - began}
    return Outcome(metrics, trainee, held_out, pixels)


def load_data(trial: Trial, settings: Mapping[str, Any]) -> "tuple[DetectionData, DetectionData]":
    """Scenes drawn from the trial's seed, or the user's pictures, split by it: to train on, and held out."""
    from counterproof.detection.annotations import HELD_OUT, read_data, split_data
    from counterproof.detection.batches import scene_data
    from counterproof.detection.scenes import draw_scenes

    if trial.data is not None:
        train, held_out = split_data(read_data(trial.data), HELD_OUT, trial.rng("split"))
        return train, held_out.subset(range(min(settings["evaluated"], len(held_out.pictures))))
    look: dict[str, Any] = dict(side=settings["side"], objects=tuple(settings["objects"]), overlap=settings["overlap"])
    return (
        scene_data(draw_scenes(settings["scenes"], trial.rng("scenes"), **look)),
        scene_data(draw_scenes(settings["evaluated"], trial.rng("held-out scenes"), **look)),
    )


def load_model(trial: Trial, settings: Mapping[str, Any], data: "DetectionData") -> tuple[Any, "Pixels"]:
    """The user's detector with the classes of the data, or a tiny one; and how it wants its pictures."""
    from counterproof.detection.batches import Pixels
    from counterproof.detection.detectors import load_detector, pixels_of
    from counterproof.detection.tiny import tiny_detector

    seed = int(trial.rng("start").integers(2**31))
    own = trial.data is not None or trial.model is not None
    if trial.model is not None:
        loaded = load_detector(trial.model, data.classes, device=trial.device, seed=seed)
        return loaded, pixels_of(trial.model, loaded, settings["side"])
    model: Any = tiny_detector(
        settings["family"],
        num_labels=len(data.classes),
        width=settings["width"],
        encoder_layers=settings["encoder_layers"],
        decoder_layers=settings["decoder_layers"],
        num_queries=settings["queries"],
        levels=settings["levels"],
        channels=tuple(settings["channels"]),
        seed=seed,
    )
    return model.to(trial.device), Pixels(side=settings["side"] if own else None)
