"""What the methods of the detection room cost: matching, training steps, and inference after them.

    python benchmarks/detection.py [--quick] [--json FILE]

Everything runs in this process on one thread; the contestants take turns and each one's fastest turn counts, in CPU
time. Ratio = peer / ours.

matching: tensors in, indices out, of all decoder layers; above 1 we are faster. The peers are transformers' own
matchers, called for each layer or for each layer and group, and ours called so. All find the same pairs.
step: forward, loss, backward, clipping and optimizer of a method; the peer is the plain step with
transformers' own loss: a ratio of 0.8 is a step that takes 1.25 times as long.
step by FLOPs: Group DETR's step; the peer is the plain step (with our loss) times what torch counts of products and
convolutions with groups over without. The goal is an overhead of no more than that and 5 % of the plain step; the last
column has the difference. Torch does not count the sampling of deformable attention, nor what is not a product.
inference: a detector that was trained with groups and stripped; the peer is its checkpoint in the plain class. Both
give the same bits, or this stops.
"""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from _contest import Row, contest, run  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher  # noqa: E402
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher  # noqa: E402

from counterproof.detection.group_detr import GroupDetr  # noqa: E402
from counterproof.detection.set_prediction import Matches, SetLoss, match_queries  # noqa: E402
from counterproof.detection.tiny import tiny_detector  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
GROUPS = 11
COSTS = {"class_cost": 2, "bbox_cost": 5, "giou_cost": 2}

# Name, image side, batch, detector.
SIZES: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("small", 48, 16, dict(width=64, encoder_layers=1, decoder_layers=2, num_queries=16, channels=(24, 48))),
    ("medium", 128, 4, dict(width=128, encoder_layers=2, decoder_layers=3, num_queries=100, channels=(48, 96))),
    ("large", 256, 2, dict(width=256, encoder_layers=6, decoder_layers=6, num_queries=300, channels=(96, 192, 384))),
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def targets(images: int, fewest: int, most: int, classes: int) -> list[dict[str, torch.Tensor]]:
    draw = generator()
    sizes = torch.randint(fewest, most + 1, (images,), generator=draw).tolist()
    return [
        {
            "class_labels": torch.randint(classes, (size,), generator=draw),
            "boxes": torch.rand(size, 4, generator=draw) * 0.3 + 0.2,
        }
        for size in sizes
    ]


def pairs_of(matches: Matches, labels: list[dict[str, torch.Tensor]]) -> set[tuple[int, int, int, int]]:
    """(layer, image, query, object of the image)."""
    starts = torch.tensor([0, *(len(target["boxes"]) for target in labels)]).cumsum(0)
    columns = (matches.layer, matches.image, matches.query, matches.object - starts[matches.image])
    return set(zip(*(column.tolist() for column in columns)))


def matching(quick: bool, seconds: float) -> Iterator[Row]:
    layers, queries, classes = 6, 300, 80
    for batch, groups in ((16, 1), (4 if quick else 16, GROUPS)):
        draw = generator()
        logits = torch.randn(layers, batch, groups * queries, classes, generator=draw) - 2
        boxes = torch.rand(layers, batch, groups * queries, 4, generator=draw) * 0.3 + 0.2
        labels = targets(batch, 10, 30, classes)
        objects = sum(len(target["boxes"]) for target in labels)
        size = f"{layers} x {batch} x {f'{groups}x' if groups > 1 else ''}{queries}x~{round(objects / batch)}"

        def ours(logits: Any = logits, boxes: Any = boxes, labels: Any = labels, groups: int = groups) -> Matches:
            return match_queries(logits, boxes, labels, num_groups=groups)

        def theirs(
            logits: Any = logits, boxes: Any = boxes, labels: Any = labels, groups: int = groups
        ) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
            if groups == 1:
                plain = DeformableDetrHungarianMatcher(**COSTS)
                return [plain({"logits": x, "pred_boxes": y}, labels) for x, y in zip(logits, boxes)]
            matcher = LwDetrHungarianMatcher(**COSTS)
            return [matcher({"logits": x, "pred_boxes": y}, labels, groups) for x, y in zip(logits, boxes)]

        def theirs_apart(
            logits: Any = logits, boxes: Any = boxes, labels: Any = labels
        ) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
            matcher = DeformableDetrHungarianMatcher(**COSTS)
            found = []
            for x, y in zip(logits, boxes):
                parts = [
                    matcher({"logits": a, "pred_boxes": b}, labels)
                    for a, b in zip(x.split(queries, 1), y.split(queries, 1))
                ]
                found.append(
                    [
                        (
                            torch.cat([part[image][0] + queries * g for g, part in enumerate(parts)]),
                            torch.cat([part[image][1] for part in parts]),
                        )
                        for image in range(len(labels))
                    ]
                )
            return found

        def ours_apart(
            logits: Any = logits, boxes: Any = boxes, labels: Any = labels
        ) -> list[tuple[int, int, Matches]]:
            return [
                (layer, group, match_queries(a[None], b[None], labels))
                for layer, (x, y) in enumerate(zip(logits, boxes))
                for group, (a, b) in enumerate(zip(x.split(queries, 1), y.split(queries, 1)))
            ]

        def same(found: Matches, other: Any, labels: Any = labels) -> bool:
            if isinstance(other[0], tuple):
                expected = {
                    (layer, image, query + queries * group, thing)
                    for layer, group, matches in other
                    for _, image, query, thing in pairs_of(matches, labels)
                }
            else:
                expected = {
                    (layer, image, query, thing)
                    for layer, images in enumerate(other)
                    for image, (rows, columns) in enumerate(images)
                    for query, thing in zip(rows.tolist(), columns.tolist())
                }
            return pairs_of(found, labels) == expected

        peers: dict[str, Callable[[], Any]] = {"transformers, a call for each layer": theirs}
        if groups > 1:
            peers["transformers, a call for each layer and group"] = theirs_apart
        peers["ours, a call for each layer" + (" and group" if groups > 1 else "")] = ours_apart
        for name, peer in peers.items():
            yield contest("matching", size, ours, peer, name, same=same, seconds=seconds)


class Training:
    """Steps of one detector on one batch."""

    def __init__(self, module: torch.nn.Module, side: int, images: int) -> None:
        self.module = module.train()
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.batch: dict[str, Any] = {
            "pixel_values": torch.rand(images, 3, side, side, generator=generator()),
            "pixel_mask": torch.ones(images, side, side, dtype=torch.int64),
            "labels": targets(images, 1, 8, 3),
        }

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.module(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()


def convolution_backward(grad: Any, pixels: Any, weight: Any, *rest: Any, **more: Any) -> int:
    """Torch's own formula takes a convolution by channels for a full one, and counts it as often as it has channels."""
    mask = rest[7]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(mask[:2])


def flops(model: Any, side: int, images: int) -> int:
    """Of a step; by the attention that is written out, since torch does not count the fused one on CPUs."""
    written = copy.deepcopy(model)
    written.set_attn_implementation("eager")
    formulas = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        Training(written, side, images).step()
    return int(counter.get_total_flops())


def steps(quick: bool, seconds: float) -> Iterator[Row]:
    for family in ("deformable", "conditional"):
        for name, side, images, settings in SIZES:
            batch = 1 if quick and name == "large" else images
            size = f"{family}, {name}"
            plain = tiny_detector(family, **settings)
            ours = copy.deepcopy(plain)
            ours.loss_function = SetLoss()
            grouped = GroupDetr(GROUPS).apply(copy.deepcopy(plain), generator())
            share = flops(grouped, side, batch) / flops(plain, side, batch)
            base, fast, groups = (Training(model, side, batch) for model in (plain, ours, grouped))
            long = 10 * seconds
            yield contest(f"step, {GROUPS} groups", size, groups.step, base.step, "plain step", seconds=long)
            row = contest(f"step, {GROUPS} groups, by FLOPs", size, groups.step, fast.step, "", seconds=long)
            times = 1 / row.ratio
            note = f"plain step x {share:.2f} (FLOPs); it took x {times:.2f}: {100 * (times - share):+.0f} %"
            yield replace(row, peer=row.peer * share, ratio=row.ratio * share, peer_name=note)
            if family == "deformable":
                for method, module in others(plain).items():
                    other = Training(module, side, batch)
                    yield contest(f"step, {method}", size, other.step, base.step, "plain step", seconds=long)


def others(plain: Any) -> dict[str, torch.nn.Module]:
    from counterproof.detection.co_detr import AtssHead, CoDetr, FasterRcnnHead
    from counterproof.detection.stage_interactor import CrossStageLabelAssigner, CrossStageLoss

    labels = plain.config.num_labels
    crossed = copy.deepcopy(plain)
    crossed.loss_function = CrossStageLoss(CrossStageLabelAssigner())
    heads: dict[str, list[torch.nn.Module]] = {
        "co-detr, ATSS": [AtssHead(num_classes=labels)],
        "co-detr, both heads": [AtssHead(num_classes=labels), FasterRcnnHead(num_classes=labels)],
    }
    found: dict[str, torch.nn.Module] = {name: CoDetr(copy.deepcopy(plain), heads=own) for name, own in heads.items()}
    return {**found, "stage-interactor": crossed}


def inference(quick: bool, seconds: float) -> Iterator[Row]:
    for family in ("deformable", "conditional", "dab", "detr"):
        name, side, images, settings = SIZES[0 if quick else 1]
        model: Any = GroupDetr(GROUPS).apply(tiny_detector(family, **settings), generator())
        training = Training(model, side, images)
        for _ in range(3):
            training.step()
        GroupDetr.strip(model).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            plain = type(model).from_pretrained(folder).eval()
        pixels = training.batch["pixel_values"]

        @torch.inference_mode()
        def predict(detector: Any, pixels: Any = pixels) -> tuple[torch.Tensor, torch.Tensor]:
            output = detector(pixel_values=pixels)
            return output.logits, output.pred_boxes

        yield contest(
            "inference, stripped",
            f"{family}, {name}",
            lambda model=model, predict=predict: predict(model),
            lambda plain=plain, predict=predict: predict(plain),
            "plain class, equal bits",
            same=lambda one, other: all(map(torch.equal, one, other)),
            seconds=5 * seconds,
        )


def contests(quick: bool, seconds: float) -> Iterator[Row]:
    yield from matching(quick, seconds)
    yield from steps(quick, seconds)
    yield from inference(quick, seconds)


if __name__ == "__main__":
    run(__doc__ or "", contests)
