"""Who goes with whom: every pairing algorithm of the page. NumPy in, NumPy out; torch in, torch out, on the same
device.

| question | function |
|---|---|
| one-to-one, a rectangle | `linear_assignment` |
| many of them, padded or of unequal sizes | `linear_assignment_batch` |
| one-to-many by groups of rows (Group DETR) | `group_assignment` |
| one-to-many, so many rows per column at most | `capacity_assignment` |
| the k best rows of every column | `topk_assign` |
| anchors to objects: IoU thresholds, ATSS, SimOTA | `max_iou_assign`, `atss_assign`, `simota_assign` |
| relaxed one-to-one, with gradients | `sinkhorn`, `dual_softmax` |
| samples to noise, fast (Immiscible Diffusion) | `quantized_assignment` |
"""

from counterproof.assign.boxes import atss_assign, box_iou, max_iou_assign, simota_assign, topk_assign
from counterproof.assign.linear import (
    capacity_assignment,
    group_assignment,
    linear_assignment,
    linear_assignment_batch,
)
from counterproof.assign.noise import quantized_assignment
from counterproof.assign.soft import dual_softmax, sinkhorn

__all__ = [
    "atss_assign",
    "box_iou",
    "capacity_assignment",
    "dual_softmax",
    "group_assignment",
    "linear_assignment",
    "linear_assignment_batch",
    "max_iou_assign",
    "quantized_assignment",
    "simota_assign",
    "sinkhorn",
    "topk_assign",
]
