"""Detectors in transformers' own classes: load them, let them predict, save them so that they load without us."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterproof.detection.annotations import DetectionData
from counterproof.detection.batches import Pixels, collate, resized
from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("detection"):
    import torch
    from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_queries", "classes_of", "load_detector", "pixels_of", "predict", "save_detector", "side_of"]

SOFTMAX = ("detr", "table-transformer", "yolos")  # their last class is "no object"
# No pixel mask: squares, as most of their own processors make.
STRETCHED = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "yolos")
MOST = 100  # detections of a picture, as COCO counts them


def load_detector(
    name: str | Path, classes: tuple[str, ...] | None = None, *, device: str = "cpu", seed: int = 0
) -> "PreTrainedModel":
    """A detector from a local folder or a hub id, in eval mode; safetensors only.

    Args:
        name: of the folder or on the hub.
        classes: what it shall be trained for. A model that names other classes gets a new class head, drawn at random;
            None keeps it as it is.
        device: where it goes.
        seed: of a new class head; the global generator is left as it was.

    Returns:
        the model; losses of all decoder layers are on (``config.auxiliary_loss``), as in the papers. All parameters are
        trainable, the backbone's too (transformers freezes a ResNet's only in models built from a config).

    Raises:
        UserError: no such model, no safetensors weights, or a checkpoint that is no detector.
    """
    from transformers import AutoConfig, AutoModelForObjectDetection
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(f"{name} is no model folder or hub id: {str(problem).splitlines()[0]}") from None
    if config.model_type not in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        raise UserError(
            f"{name} is a {config.model_type} checkpoint, not a detector; transformers detects objects with "
            f"{', '.join(sorted(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES))}"
        )
    options: dict[str, Any] = {"use_safetensors": True}
    named = tuple(config.id2label[number] for number in sorted(config.id2label))
    if classes is not None and named != classes:
        options |= {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {label: number for number, label in enumerate(classes)},
            "ignore_mismatched_sizes": True,
        }
    if hasattr(config, "auxiliary_loss") and config.model_type != "yolos":  # there it fails for want of hidden states
        options["auxiliary_loss"] = True
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForObjectDetection.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(f"{name} cannot be loaded: {str(problem).splitlines()[0]}") from None
    if "labels" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{name} is a {config.model_type} checkpoint, which finds no objects of classes; name a DETR")
    return model.to(device).eval()


def pixels_of(name: str | Path | None, model: "PreTrainedModel", side: int | None) -> Pixels:
    """How a detector wants its pictures: mean and deviation from its preprocessor_config.json, or ImageNet's.

    Raises:
        UserError: a file that does not say them.
    """
    stretch = model.config.model_type in STRETCHED
    file = _processor_file(name)
    if file is None:
        return Pixels(side=side, stretch=stretch)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not found.get("do_normalize", True):
            return Pixels(side=side, stretch=stretch, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        mean, std = (tuple(float(value) for value in found[key]) for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{file} does not say image_mean and image_std: {problem}") from None
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{file} has means for {len(mean)} channels; expected 3")
    return Pixels(side=side, stretch=stretch, mean=mean, std=std)


def side_of(name: str | Path) -> int | None:
    """The longest side in pixels that a detector's preprocessor_config.json asks for; None: pictures as they are.

    Where it asks for a shortest side and a greater longest one, that of a picture of 4 by 3, as most of COCO's are.

    Raises:
        UserError: a file that is no JSON, or whose size is neither edges nor height and width.
    """
    file = _processor_file(name)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        size = found.get("size")
        if size is None or not found.get("do_resize", True):
            return None
        if "height" in size:
            return max(int(size["height"]), int(size["width"]))
        if "max_height" in size:
            return max(int(size["max_height"]), int(size["max_width"]))
        longest = size.get("longest_edge")
        shortest = size.get("shortest_edge", longest)
        wide = round(4 / 3 * int(shortest))
        return wide if longest is None else min(wide, int(longest))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{file} does not say the pictures' size: {problem}; give it with --side") from None


def _processor_file(name: str | Path | None) -> Path | None:
    """The preprocessor_config.json of a folder or of a model on the hub, if it has one."""
    from transformers.utils.hub import cached_file

    if name is None or Path(name).is_dir():
        file = None if name is None else Path(name) / "preprocessor_config.json"
        return file if file is not None and file.is_file() else None
    try:
        found = cached_file(str(name), "preprocessor_config.json")
    except OSError:  # the model has none, or it was never fetched
        return None
    return None if found is None else Path(found)


def classes_of(model: "PreTrainedModel", data: DetectionData, source: object) -> list[int | None]:
    """For each class of the model the index of the data's class of the same name; None where the data has none.

    Names that differ in case only are the same where no other name is nearer.

    Raises:
        UserError: they have no class in common.
    """
    exact = {name: number for number, name in enumerate(data.classes)}
    folded = {name.casefold(): number for name, number in exact.items()}
    labels: Any = model.config.id2label
    named = [str(labels[number]) for number in sorted(labels)]
    taken = {exact[name] for name in named if name in exact}
    near = [folded.get(name.casefold()) for name in named]
    found = [exact.get(name, None if other in taken else other) for name, other in zip(named, near)]
    if not any(number is not None for number in found):
        raise UserError(
            f"{source} detects {_some(labels.values())}, {data.source} has {_some(data.classes)}: no class in common; "
            "train the model on this data, or name its classes in config.json (id2label)"
        )
    return found


def _some(names: Any) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def check_queries(model: "PreTrainedModel", data: DetectionData) -> None:
    """Raise when a picture has more objects than the detector has queries: some could never be learnt.

    Raises:
        UserError: naming the picture.
    """
    queries = getattr(model.config, "num_queries", None) or model.config.num_detection_tokens  # YOLOS calls them so
    for picture in data.pictures:
        count = int((~picture.crowd).sum())
        if count > queries:
            raise UserError(
                f"{data.source}: image {picture.id} ({picture.name}) has {count} objects, the detector only {queries} "
                "queries; take a model with more (num_queries), or leave the picture out"
            )


@torch.no_grad()
def predict(
    detector: nn.Module,
    data: DetectionData,
    pixels: Pixels,
    *,
    model_type: str = "",
    classes: list[int | None] | None = None,
    batch: int = 32,
    device: str = "cpu",
    precision: str = "fp32",
    watch: Any = None,
) -> list[dict[str, Any]]:
    """Detections of every picture as COCO results: image_id, category_id, bbox (x, y, w, h in pixels), score.

    Args:
        detector: gives ``.logits`` (B, N, C) and ``.pred_boxes`` (B, N, 4); is in eval mode afterwards.
        data: the pictures.
        pixels: how they become tensors.
        model_type: of the detector's config; says whether scores are a softmax with "no object" last.
        classes: of `classes_of`; None: the detector's classes are the data's.
        batch, device, precision: of the forward passes.
        watch: ``watch(pictures done)``.

    Returns:
        at most 100 of each picture, best first: the highest of all scores of all queries (a query may count for
        several classes), or of the best class of each query under softmax.
    """
    detector.eval()
    results: list[dict[str, Any]] = []
    for start in range(0, len(data.pictures), batch):
        chosen = range(start, min(start + batch, len(data.pictures)))
        shrunk = [resized(data.pixels(index), pixels.side, pixels.stretch)[0] for index in chosen]
        empty = [np.zeros((0, 4), dtype=np.float32)] * len(shrunk)
        inputs = collate(shrunk, empty, [np.zeros(0, dtype=np.int64)] * len(shrunk), pixels)
        values, mask = inputs["pixel_values"].to(device), inputs["pixel_mask"].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            found: Any = detector(pixel_values=values, pixel_mask=mask)
        scores, labels, boxes = best(found.logits.float(), found.pred_boxes.float(), model_type in SOFTMAX)
        sizes = [(data.pictures[index].width, data.pictures[index].height) for index in chosen]
        scale = torch.tensor([[w, h, w, h] for w, h in sizes], dtype=torch.float32)
        corners = boxes.cpu() * scale[:, None]
        corners[..., :2] -= corners[..., 2:] / 2
        for place, index in enumerate(chosen):
            for score, label, box in zip(scores[place].tolist(), labels[place].tolist(), corners[place].tolist()):
                known = label if classes is None else classes[label]
                if known is not None:
                    results.append(
                        {
                            "image_id": data.pictures[index].id,
                            "category_id": data.category_ids[known],
                            "bbox": box,
                            "score": score,
                        }
                    )
        if watch is not None:
            watch(chosen[-1] + 1)
    return results


def best(logits: Tensor, boxes: Tensor, softmax: bool, most: int = MOST) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, n) in descending order, classes (B, n) and boxes (B, n, 4) of the n best detections of a picture."""
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        order, scores = order[:, :most], scores[:, :most]
        return scores, labels.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    flat = logits.sigmoid().flatten(1)
    scores, places = flat.topk(min(most, flat.shape[1]), dim=1)
    query = places // logits.shape[-1]
    return scores, places % logits.shape[-1], boxes.gather(1, query[..., None].expand(-1, -1, 4))


def save_detector(model: "PreTrainedModel", folder: Path, pixels: Pixels) -> None:
    """Write a transformers checkpoint: config.json, model.safetensors, preprocessor_config.json.

    ``AutoModelForObjectDetection.from_pretrained`` and ``AutoImageProcessor.from_pretrained`` read it.
    """
    model.save_pretrained(folder)
    names = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}
    family = names.get(model.config.model_type, "RTDetr" if pixels.stretch else "Detr")
    size: dict[str, int] = {}
    if pixels.side is not None:
        kind = ("height", "width") if pixels.stretch else ("shortest_edge", "longest_edge")
        size = dict.fromkeys(kind, pixels.side)
    about = {
        "image_processor_type": f"{family}ImageProcessor",
        "do_resize": pixels.side is not None,
        **({"size": size} if size else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "do_pad": not pixels.stretch,
    }
    with replacing(folder / "preprocessor_config.json") as stream:
        json.dump(about, stream, indent=2)
        stream.write("\n")
