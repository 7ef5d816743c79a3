"""Set prediction: matching and loss of a DETR over all its decoder layers at once.

The same numbers as transformers' own matchers and losses, without their waste: those build one cost matrix of all
queries of a batch against all objects of a batch, and one GIoU matrix of all matched boxes against all matched boxes,
layer by layer. Here a query meets the objects of its own image only, all layers and query groups in one go, and only
the matchings themselves are solved one by one (`counterproof.assign`).

Boxes are normalised ``(centre x, centre y, width, height)`` throughout, as transformers' DETRs predict them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from counterproof.assign import linear_assignment_batch
from counterproof.errors import extra

with extra("detection"):
    import torch
    from torch import Tensor
    from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Matches",
    "SetLoss",
    "box_losses",
    "check_labels",
    "class_loss",
    "corners",
    "generalized_iou",
    "match_cost",
    "match_queries",
    "object_count",
]

Labels = Sequence[Mapping[str, Tensor]]
Classes = Literal["focal", "softmax"]


def corners(boxes: Tensor) -> Tensor:
    """``(cx, cy, w, h)`` to ``(x1, y1, x2, y2)``; any leading shape."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes as corners, element by element with broadcasting, in [-1, 1].

    Not a number where both boxes have no area, as in transformers.
    """
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - shared
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    area = hull.clamp(min=0).prod(-1)
    return shared / union - (area - union) / area


@dataclass(frozen=True)
class Matches:
    """Who was matched with whom: int64 tensors of one length, on the predictions' device.

    Attributes:
        layer, image, query: places in the predictions (L, B, N, ...); sorted in this order.
        object: places in the concatenated objects of the batch.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    object: Tensor

    def __len__(self) -> int:
        return len(self.query)

    def of_layer(self, layer: int) -> "Matches":
        """The matches of one layer."""
        chosen = self.layer == layer
        return Matches(self.layer[chosen], self.image[chosen], self.query[chosen], self.object[chosen])


def check_labels(labels: Labels, batch: int, num_labels: int) -> None:
    """Raise what a wrong target would otherwise turn into an index error deep inside, or into NaN.

    Raises:
        ValueError: not one target per image, lengths that differ, a class outside ``0 .. num_labels - 1``, a box that
            is not finite or has no area; image and object are named.
    """
    if len(labels) != batch:
        raise ValueError(f"labels are for {len(labels)} images, the batch has {batch}")
    for image, target in enumerate(labels):
        classes, boxes = target["class_labels"], target["boxes"]
        if boxes.shape != (len(classes), 4):
            raise ValueError(
                f"labels[{image}]: boxes of shape {tuple(boxes.shape)} for {len(classes)} class labels; "
                "expected (objects, 4)"
            )
        if len(classes) == 0:
            continue
        wrong = ~(boxes.isfinite().all(-1) & (boxes[:, 2:] > 0).all(-1))
        if bool(wrong.any()):
            number = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels[{image}]: box {number} is {boxes[number].tolist()}; expected a finite centre and size > 0"
            )
        if not 0 <= int(classes.min()) <= int(classes.max()) < num_labels:
            raise ValueError(
                f"labels[{image}]: classes {int(classes.min())} to {int(classes.max())}; the model has {num_labels}"
            )


@torch.no_grad()
def match_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Labels,
    *,
    class_cost: float = 2.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    classes: Classes = "focal",
) -> Tensor:
    """Cost of every query with every object of its image.

    Args:
        logits: (..., B, N, C).
        boxes: (..., B, N, 4), normalised centre and size.
        labels: B targets with ``class_labels`` (T_b,) and ``boxes`` (T_b, 4).
        class_cost, bbox_cost, giou_cost: weights of class, L1 and negative GIoU.
        classes: ``"focal"``: alpha 0.25, gamma 2, as Deformable DETR's matcher; ``"softmax"``: minus the probability,
            the last class being "no object", as DETR's.

    Returns:
        (..., B, N, T) with T the most objects of an image; columns from T_b on are padding. float32, or float64 for
        float64 inputs.
    """
    logits, boxes = wide(logits), wide(boxes)
    ids, targets = _padded(labels, boxes)
    index = ids[:, None, :].expand(*logits.shape[:-1], ids.shape[-1])
    if classes == "softmax":
        price = -logits.softmax(-1).gather(-1, index)
    else:
        probability = logits.gather(-1, index).sigmoid()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        price = positive - negative
    cost = class_cost * price
    if bbox_cost:
        cost += bbox_cost * torch.cdist(boxes, targets.expand(*boxes.shape[:-2], *targets.shape[-2:]), p=1)
    if giou_cost:
        overlap = generalized_iou(corners(boxes)[..., :, None, :], corners(targets)[:, None])
        cost -= giou_cost * overlap
    return cost


def _padded(labels: Labels, like: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) class ids and (B, T, 4) boxes; padding is class 0 and the whole picture."""
    widest = max((len(target["class_labels"]) for target in labels), default=0)
    ids = torch.zeros(len(labels), widest, dtype=torch.int64, device=like.device)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=like.dtype, device=like.device).repeat(len(labels), widest, 1)
    for image, target in enumerate(labels):
        size = len(target["class_labels"])
        ids[image, :size] = target["class_labels"].to(like.device)
        boxes[image, :size] = target["boxes"].to(boxes)
    return ids, boxes


@torch.no_grad()
def match_queries(
    logits: Tensor,
    boxes: Tensor,
    labels: Labels,
    *,
    num_groups: int = 1,
    class_cost: float = 2.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    classes: Classes = "focal",
) -> Matches:
    """Hungarian matching of the queries of every layer, image and group with the objects of the image.

    Args:
        logits: (L, B, K*N, C), the K groups of queries one after another.
        boxes: (L, B, K*N, 4).
        labels: B targets.
        num_groups: K, blocks of queries that are matched each on its own (Group DETR); 1 is a plain DETR.
        class_cost, bbox_cost, giou_cost, classes: see `match_cost`.

    Returns:
        the matches, ``min(N, T_b)`` for each layer, image and group. A prediction that is not finite is matched only
        when none else is left, as in transformers.

    Raises:
        ValueError: queries that cannot be cut into `num_groups` equal groups.
    """
    layers, batch, queries = logits.shape[:3]
    step, rest = divmod(queries, num_groups)
    if rest:
        raise ValueError(f"{queries} queries cannot be cut into num_groups={num_groups} equal groups")
    sizes = [len(target["class_labels"]) for target in labels]
    weights: dict[str, Any] = dict(class_cost=class_cost, bbox_cost=bbox_cost, giou_cost=giou_cost, classes=classes)
    # A layer at a time: the costs of all at once would not fit the processor's cache, and take twice as long.
    cost = torch.stack([match_cost(score, box, labels, **weights) for score, box in zip(logits, boxes)]).cpu().numpy()
    problems = cost.reshape(layers * batch * num_groups, step, cost.shape[-1])
    repeated = [size for _ in range(layers) for size in sizes for _ in range(num_groups)]
    pairs = linear_assignment_batch(problems, sizes=repeated, on_invalid="last")
    counts = torch.tensor([len(rows) for rows, _ in pairs])
    number = torch.arange(len(pairs)).repeat_interleave(counts)
    rows = torch.cat([torch.from_numpy(rows) for rows, _ in pairs])
    columns = torch.cat([torch.from_numpy(columns) for _, columns in pairs])
    image = number // num_groups % batch
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    found = (number // (num_groups * batch), image, rows + number % num_groups * step, columns + starts[image])
    return Matches(*(part.to(logits.device, non_blocking=True) for part in found))


def object_count(labels: Labels, device: torch.device, repeat: int = 1) -> float:
    """What a set loss is divided by: objects of the batch, averaged over processes as transformers does; at least 1."""
    number = sum(len(target["class_labels"]) for target in labels) * repeat
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = torch.tensor(float(number), device=device)
        torch.distributed.all_reduce(total)
        return max(total.item() / torch.distributed.get_world_size(), 1.0)
    return max(float(number), 1.0)


def class_loss(logits: Tensor, target: Tensor, count: float | Tensor, alpha: float = 0.25) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002, gamma 2) summed over all but the first dimension, divided by `count`.

    Args:
        logits: (L, ..., C).
        target: the same shape, 0 or 1; more than one class of a query may be 1.
        count: a number, or one for each of the L.
        alpha: weight of the positives; negative: no weights.

    Returns:
        (L,), one loss for each layer.
    """
    target = target.to(logits.dtype)
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target  # 1 - p_t
    loss = plain * wrong**2
    if alpha >= 0:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss.flatten(1).sum(-1) / count


def box_losses(boxes: Tensor, matches: Matches, targets: Tensor, count: float | Tensor) -> tuple[Tensor, Tensor]:
    """L1 and GIoU loss of matched boxes, (L,) each.

    Args:
        boxes: (L, B, N, 4) predictions.
        matches: who is whose.
        targets: (objects of the batch, 4).
        count: what the sums are divided by; a number, or one for each layer.
    """
    found = boxes[matches.layer, matches.image, matches.query]
    wanted = targets[matches.object].to(found.dtype)
    distance = (found - wanted).abs().sum(-1)
    apart = 1 - generalized_iou(corners(found), corners(wanted))
    zero = boxes.new_zeros(len(boxes))
    return (zero.index_add(0, matches.layer, distance) / count, zero.index_add(0, matches.layer, apart) / count)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class SetLoss:
    """The loss of a DETR, for ``model.loss_function``: one-to-one within each of K groups of queries.

    With one group the value is that of transformers' ``DeformableDetrForObjectDetectionLoss`` (focal; Conditional, DAB
    and Deformable DETR) or ``ForObjectDetectionLoss`` (softmax; DETR). With K groups it is the mean of the K groups'
    losses: the objects are counted K times (Group DETR, arXiv 2207.13085).

    Args:
        num_groups: K.
        classes: ``"focal"`` or ``"softmax"``.
    """

    num_groups: int = 1
    classes: Classes = "focal"

    def __call__(
        self,
        logits: Tensor,
        labels: Labels,
        device: torch.device,
        pred_boxes: Tensor,
        config: "PreTrainedConfig",
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        """What transformers' loss functions take and give: loss, its parts by name, outputs of the earlier layers.

        Args:
            logits: (B, K*N, C) of the last layer.
            labels: B targets: ``class_labels`` (T_b,) int64, ``boxes`` (T_b, 4) normalised centre and size.
            device: not used; the predictions say where they are.
            pred_boxes: (B, K*N, 4) of the last layer.
            config: costs, loss coefficients and ``auxiliary_loss`` are read from it.
            outputs_class, outputs_coord: (L, B, K*N, C) and (L, B, K*N, 4), all layers, the last included.

        Raises:
            ValueError: see `check_labels`.
        """
        c: Any = config
        check_labels(labels, len(logits), c.num_labels)
        # Under autocast the parts come in different types. The last layer is the logits themselves: DETR and
        # Conditional DETR predict from it normalised twice, and list it normalised once.
        scores, boxes = wide(logits)[None], wide(pred_boxes)[None]
        if c.auxiliary_loss and outputs_class is not None and outputs_coord is not None:
            scores, boxes = (
                torch.cat([wide(early[:-1]), last]) for early, last in ((outputs_class, scores), (outputs_coord, boxes))
            )
        weights: dict[str, Any] = dict(class_cost=c.class_cost, bbox_cost=c.bbox_cost, giou_cost=c.giou_cost)
        matches = match_queries(scores, boxes, labels, num_groups=self.num_groups, classes=self.classes, **weights)
        ids = torch.cat([target["class_labels"] for target in labels]).to(scores.device)
        targets = torch.cat([target["boxes"] for target in labels]).to(boxes.device)
        count = object_count(labels, scores.device, self.num_groups)
        own = scores.new_zeros(scores.shape)
        if self.classes == "focal":
            own[matches.layer, matches.image, matches.query, ids[matches.object]] = 1
            labelled = class_loss(scores, own, count, c.focal_alpha)
        else:
            labelled = _cross_entropy(scores, matches, ids, c.eos_coefficient)
        distance, apart = box_losses(boxes, matches, targets, count)
        return summed(labelled, distance, apart, config, scores, boxes)


def summed(
    labelled: Tensor, distance: Tensor, apart: Tensor, config: "PreTrainedConfig", scores: Tensor, boxes: Tensor
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Losses of all layers (L,) to what a transformers loss function returns; class weight 1, as everywhere there."""
    c: Any = config
    total = (labelled + c.bbox_loss_coefficient * distance + c.giou_loss_coefficient * apart).sum()
    parts = {"loss_ce": labelled[-1], "loss_bbox": distance[-1], "loss_giou": apart[-1]}
    for layer in range(len(labelled) - 1):
        parts |= {
            f"loss_ce_{layer}": labelled[layer],
            f"loss_bbox_{layer}": distance[layer],
            f"loss_giou_{layer}": apart[layer],
        }
    earlier = None
    if c.auxiliary_loss:
        earlier = [{"logits": score, "pred_boxes": box} for score, box in zip(scores[:-1], boxes[:-1])]
    return total, parts, earlier


def _cross_entropy(scores: Tensor, matches: Matches, ids: Tensor, background: float) -> Tensor:
    """DETR's class loss, (L,): weighted mean over queries, "no object" (the last class) weighing `background`."""
    wanted = torch.full(scores.shape[:3], scores.shape[-1] - 1, device=scores.device)
    wanted[matches.layer, matches.image, matches.query] = ids[matches.object]
    weight = scores.new_ones(scores.shape[-1])
    weight[-1] = background
    loss = F.cross_entropy(scores.flatten(0, 2), wanted.flatten(), weight, reduction="none")
    return loss.view(len(scores), -1).sum(-1) / weight[wanted].flatten(1).sum(-1)
