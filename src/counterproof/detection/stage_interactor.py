"""StageInteractor: decoder stages of a detector lend each other class labels.

Paper: arXiv 2304.04978.
Read beside: MCG-NJU/StageInteractor @477aa15 (stageinteractor_decoder.py, stageinteractor_head.py, configs).
Deviations: the L1 loss is on centre and size of boxes, as in transformers, not on their corners; the class loss is
divided by 1 where nothing is positive; matching is on the final outputs of all stages at once, which is the same.
`own_threshold` and `warmup` are ours, and off. The decoder that reuses dynamic filters is `StageInteractorDecoder`.

A DETR matches queries and objects anew in every decoder stage, and the matching jumps: a query that owns an object in
stage 4 is called background in stage 3 although its box lies on that object already. Here a stage borrows, for the same
query, the class of what the query owns in the stage before it and in all later ones, if its present box fits; and a
query whose own box does not fit loses its class. Boxes are learnt from the stage's own matching as ever.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from counterproof.detection.set_prediction import (
    Labels,
    Matches,
    box_losses,
    check_labels,
    class_loss,
    corners,
    match_queries,
    summed,
)
from counterproof.errors import UserError, extra

with extra("detection"):
    import torch
    from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["CrossStageLabelAssigner", "CrossStageLoss", "check_detector", "matching_instability", "orphaned_labels"]

FAMILIES = ("conditional_detr", "dab-detr", "deformable_detr")  # a sigmoid for each class; all layers in the loss
TAKE = "take a Conditional, DAB or Deformable DETR"
ALL_LAYERS = "labels across stages need the outputs of all decoder layers: set model.config.auxiliary_loss = True"


@dataclass(frozen=True)
class CrossStageLabelAssigner:
    """Class labels of every decoder stage out of the matchings of its neighbours in time.

    Stage i looks at the stages ``i - back .. i + forward``. A query that stage j matched with an object of class c is
    labelled c in stage i when its box *of stage i* overlaps that object by `iou_threshold`. A query may get several
    classes, and an object several queries.

    With ``back=0, forward=0, own_threshold=0`` the labels are the plain one-to-one labels.

    Args:
        back: stages before that are looked at.
        forward: stages after; None: all.
        iou_threshold: intersection over union (eta) at which a label is taken over.
        own_threshold: the same for a query's match in the very stage; None: as `iou_threshold`; 0: all labels stay.

    Raises:
        ValueError: a negative number of stages, or a threshold outside [0, 1].
    """

    back: int = 1
    forward: int | None = None
    iou_threshold: float = 0.5
    own_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.back < 0 or (self.forward is not None and self.forward < 0):
            raise ValueError(f"back={self.back}, forward={self.forward}; expected numbers of stages >= 0")
        for name in ("iou_threshold", "own_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}; an intersection over union lies in [0, 1]")

    def __call__(self, pred_boxes: Tensor, matches: Matches, labels: Labels, num_classes: int) -> Tensor:
        """The labels.

        Args:
            pred_boxes: (L, B, N, 4) boxes of all stages, normalised centre and size.
            matches: of `match_queries`, all stages.
            labels: B targets: ``class_labels`` (T_b,) int64 and ``boxes`` (T_b, 4).
            num_classes: C.

        Returns:
            (L, B, N, C) of 0 and 1, dtype and device of `pred_boxes`, without a gradient.

        Raises:
            ValueError: boxes of another shape; targets, see `check_labels`.
        """
        if pred_boxes.dim() != 4 or pred_boxes.shape[-1] != 4:
            raise ValueError(f"pred_boxes of shape {tuple(pred_boxes.shape)}; expected (stages, batch, queries, 4)")
        check_labels(labels, pred_boxes.shape[1], num_classes)
        return self._targets(pred_boxes, matches, labels, num_classes)

    @torch.no_grad()
    def _targets(self, pred_boxes: Tensor, matches: Matches, labels: Labels, num_classes: int) -> Tensor:
        stages, _, queries = pred_boxes.shape[:3]
        overlap = _overlaps(pred_boxes, matches, labels)
        distance = matches.layer - torch.arange(stages, device=pred_boxes.device)[:, None]
        own = self.iou_threshold if self.own_threshold is None else self.own_threshold
        least = torch.where(distance == 0, own, self.iou_threshold)
        seen = (distance >= -self.back) & (distance <= (stages if self.forward is None else self.forward))
        classes = torch.cat([target["class_labels"] for target in labels]).to(pred_boxes.device)
        place = (matches.image * queries + matches.query) * num_classes + classes[matches.object]
        targets = pred_boxes.new_zeros(*pred_boxes.shape[:3], num_classes)
        # A match from another stage can only add a class: the largest of 0 and 1 that fall on a place counts.
        positive = (seen & (overlap >= least)).to(targets.dtype)
        targets.flatten(1).scatter_reduce_(1, place.expand(stages, -1), positive, "amax")
        return targets


def _overlaps(pred_boxes: Tensor, matches: Matches, labels: Labels) -> Tensor:
    """(L, M): IoU of the object of every match, whichever stage it is of, with its query's box in stage i."""
    wide = torch.float64 if pred_boxes.dtype == torch.float64 else torch.float32
    objects = torch.cat([target["boxes"] for target in labels]).to(pred_boxes.device, wide)
    first = corners(pred_boxes[:, matches.image, matches.query].to(wide))
    second = corners(objects[matches.object])
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


@dataclass
class CrossStageLoss:
    """The loss of a DETR with labels across stages, for ``model.loss_function``.

    For the families of transformers with a sigmoid for each class whose loss gets all decoder layers at once:
    Conditional, DAB and Deformable DETR. Nothing of it remains at inference.

    For every stage: focal loss (gamma 2, alpha from ``config.focal_alpha``) against the assigner's labels, divided by
    the number of positive labels or of own matches, whichever is larger; L1 and GIoU loss of the stage's own matches,
    divided by their number. The matching costs are the same three weights.

    Args:
        assigner: who is labelled what.
        class_weight, box_weight, giou_weight: of the focal, the L1 and the GIoU loss, and of the matching cost; the
            coefficients and costs of the model's config are not read.
        warmup: training steps over which a query's own match must overlap more and more to keep its class, from 0 to
            the assigner's threshold: from random weights few boxes reach it. 0: from the start, as in the paper.
        step: training calls so far; to be set when a training with a warm-up is resumed.
    """

    assigner: CrossStageLabelAssigner
    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    warmup: int = 0
    step: int = 0

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
            logits: (B, N, C) of the last layer.
            labels: B targets: ``class_labels`` (T_b,) int64, ``boxes`` (T_b, 4) normalised centre and size.
            device: not used; the predictions say where they are.
            pred_boxes: (B, N, 4) of the last layer.
            config: ``num_labels``, ``focal_alpha`` and ``auxiliary_loss`` are read from it.
            outputs_class, outputs_coord: (L, B, N, C) and (L, B, N, 4), all layers, the last included.

        Raises:
            ValueError: a model without the other layers' outputs, with a softmax over classes, or with outputs in
                another order; targets, see `check_labels`.
        """
        c: Any = config
        scores, boxes = _all_layers(logits, pred_boxes, c, outputs_class, outputs_coord)
        check_labels(labels, len(logits), c.num_labels)
        weights: dict[str, Any] = dict(
            class_cost=self.class_weight, bbox_cost=self.box_weight, giou_cost=self.giou_weight
        )
        matches = match_queries(scores, boxes, labels, **weights)
        targets = self._assigner(logits)._targets(boxes, matches, labels, c.num_labels)
        objects = torch.cat([target["boxes"] for target in labels]).to(boxes.device)
        own = torch.bincount(matches.layer, minlength=len(scores)).to(torch.float32)
        positives = targets.to(torch.float32).flatten(1).sum(-1)
        labelled = class_loss(scores, targets, _shared(torch.maximum(positives, own)), c.focal_alpha)
        distance, apart = box_losses(boxes, matches, objects, _shared(own))
        total = self.class_weight * labelled + self.box_weight * distance + self.giou_weight * apart
        parts, earlier = summed(labelled, distance, apart, config, scores, boxes)[1:]
        return total.sum(), parts, earlier

    def _assigner(self, logits: Tensor) -> CrossStageLabelAssigner:
        """The assigner of this step; counts it when there is something to learn from it."""
        found = self.assigner
        if self.step < self.warmup:
            own = found.iou_threshold if found.own_threshold is None else found.own_threshold
            found = replace(found, own_threshold=own * self.step / self.warmup)
        self.step += torch.is_grad_enabled() and logits.requires_grad
        return found


def _all_layers(
    logits: Tensor, pred_boxes: Tensor, config: Any, scores: Tensor | None, boxes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs of all layers, once it is sure that they are those."""
    if not config.auxiliary_loss or scores is None or boxes is None:
        raise ValueError(ALL_LAYERS)
    kind = getattr(config, "model_type", "this model")
    if logits.shape[-1] == config.num_labels + 1:
        raise ValueError(
            f"{kind} has a softmax over {config.num_labels} classes and 'no object': a query cannot carry several "
            f"classes; {TAKE}, whose classes have a sigmoid each"
        )
    # Models that choose their queries in the encoder stack (B, L, N, C): read as (L, B, N, C) it would train nonsense.
    alike = scores.shape[1:] == logits.shape and boxes.shape[1:] == pred_boxes.shape and len(scores) == len(boxes)
    if not alike or (len(scores) > 1 and torch.equal(scores[:, -1], logits)):
        raise ValueError(
            f"{kind} gives the loss class outputs of shape {tuple(scores.shape)} beside logits of "
            f"{tuple(logits.shape)}; expected (layers, *logits.shape): {TAKE}"
        )
    # The last layer is the logits themselves: Conditional DETR lists it with one normalisation less.
    return torch.cat([scores[:-1], logits[None]]), torch.cat([boxes[:-1], pred_boxes[None]])


def _shared(count: Tensor) -> Tensor:
    """Counts averaged over processes, at least 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.clone()
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1.0)


def check_detector(model: "PreTrainedModel") -> None:
    """Raise before training what `CrossStageLoss` would raise at its first step.

    Args:
        model: a detector of transformers.

    Raises:
        UserError: another family than Conditional, DAB and Deformable DETR, or a model that hands over its last layer
            only; with the remedy.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{config.model_type} has no sigmoid for each class, or no loss that gets all decoder layers in order; "
            f"labels across stages need both: {TAKE}"
        )
    if not config.auxiliary_loss:
        raise UserError(ALL_LAYERS)


def matching_instability(matches: Matches) -> float:
    """How often the query of an object changes from one stage to the next.

    Args:
        matches: of `match_queries`, all stages.

    Returns:
        the share of (object, pair of consecutive stages) whose matched query differs, 0 to 1; an object that only one
        of the two stages matches counts as changed. Not a number without objects, or with one stage.
    """
    if len(matches) == 0:
        return float("nan")
    stages, objects = int(matches.layer.max()) + 1, int(matches.object.max()) + 1
    owner = matches.query.new_full((stages, objects), -1)
    owner[matches.layer, matches.object] = matches.query
    there = (owner[1:] >= 0) | (owner[:-1] >= 0)
    return float(((owner[1:] != owner[:-1]) & there).sum() / there.sum())


@torch.no_grad()
def orphaned_labels(
    targets: Tensor, pred_boxes: Tensor, matches: Matches, labels: Labels, iou_threshold: float = 0.5
) -> float:
    """How many background labels lie on a box that fits an object which the same query owns in another stage.

    Args:
        targets: (L, B, N, C) labels of 0 and 1, of a `CrossStageLabelAssigner`.
        pred_boxes: (L, B, N, 4).
        matches: of `match_queries`, all stages.
        labels: B targets.
        iou_threshold: from where on a box fits.

    Returns:
        the share of the (stage, query) without a class, 0 to 1; not a number when there are none.
    """
    stages, batch, queries = pred_boxes.shape[:3]
    elsewhere = matches.layer != torch.arange(stages, device=pred_boxes.device)[:, None]
    fits = (elsewhere & (_overlaps(pred_boxes, matches, labels) >= iou_threshold)).to(torch.int64)
    owned = fits.new_zeros(stages, batch * queries)
    owned.scatter_reduce_(1, (matches.image * queries + matches.query).expand(stages, -1), fits, "amax")
    background = targets.flatten(1, 2).amax(-1) == 0
    return float((owned[background] > 0).to(torch.float32).mean())
