"""Regions of feature maps and of pictures in plain torch: RoIAlign, and non-maximum suppression without a loop.

Read beside: torchvision.ops (roi_align with ``aligned=True``, nms), whose operators do the work where they are
installed and run. A torchvision built for another torch imports but has no operators: then the code here does.
Boxes are corners ``(x1, y1, x2, y2)``.
"""

import functools
import importlib
import importlib.util
from typing import Any

from counterproof.errors import extra

with extra("detection"):
    import torch
    from torch import Tensor
    from torch.nn import functional as F

__all__ = ["nms", "roi_align", "suppress"]


@functools.cache
def _operators() -> Any:
    """``torchvision.ops``, or None where it is missing or does not fit the torch that is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        operators = importlib.import_module("torchvision.ops")
        operators.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError):
        return None
    return operators


def roi_align(features: Tensor, boxes: Tensor, image: Tensor, *, size: int = 7, sampling_ratio: int = 0) -> Tensor:
    """Cut regions out of feature maps: each a grid of bins, each bin the mean of bilinear samples (arXiv 1703.06870).

    Args:
        features: (B, C, H, W); the centre of cell i lies at i + 0.5.
        boxes: (R, 4) corners in cells of the map, so pixels divided by the stride. No gradient flows to them.
        image: (R,) int64, whose map each box is cut from.
        size: bins of height and width.
        sampling_ratio: samples of a bin along each side; 0: as many as the bin has cells, rounded up.

    Returns:
        (R, C, size, size). A sample more than a cell outside the map counts as 0; nearer ones take the border's value.

    Raises:
        ValueError: shapes that do not fit, `size` < 1, `sampling_ratio` < 0.
    """
    if features.dim() != 4 or boxes.shape != (len(image), 4):
        raise ValueError(
            f"features {tuple(features.shape)}, boxes {tuple(boxes.shape)}, image {tuple(image.shape)}; "
            "expected (B, C, H, W), (R, 4), (R,)"
        )
    if size < 1 or sampling_ratio < 0:
        raise ValueError(f"size={size}, sampling_ratio={sampling_ratio}; expected at least 1 and 0")
    boxes = boxes.detach()
    operators = _operators()
    if operators is not None:
        rows = torch.cat([image[:, None].to(features), boxes.to(features)], -1)
        cut: Tensor = operators.roi_align(features, rows, size, 1.0, sampling_ratio or -1, True)
        return cut
    result = features.new_zeros(len(boxes), features.shape[1], size, size)
    if len(boxes) == 0:
        return result
    kind = features.dtype
    if kind not in (torch.float32, torch.float64):
        features = features.float()  # halves cannot tell neighbouring places of a large map apart
    if sampling_ratio:
        return _sampled(features, boxes, image, size, sampling_ratio, sampling_ratio).to(kind)
    samples = ((boxes[:, 2:] - boxes[:, :2]) / size).ceil().clamp(min=1).long()
    counts, group = samples.unique(dim=0, return_inverse=True)
    parts, places = [], []
    for number, (across, down) in enumerate(counts.tolist()):
        chosen = (group == number).nonzero()[:, 0]
        parts.append(_sampled(features, boxes[chosen], image[chosen], size, across, down))
        places.append(chosen)
    return torch.cat(parts)[torch.cat(places).argsort()].to(kind)


def _sampled(features: Tensor, boxes: Tensor, image: Tensor, size: int, across: int, down: int) -> Tensor:
    """RoIAlign with ``across x down`` samples in every bin."""
    batch, _, height, width = features.shape
    boxes = boxes.to(features.dtype)
    x = _ticks(boxes[:, 0], boxes[:, 2], size, across)  # (R, size * across), in cells, the first cell's centre at 0
    y = _ticks(boxes[:, 1], boxes[:, 3], size, down)
    inside = ((x >= -1) & (x <= width))[:, None, :] & ((y >= -1) & (y <= height))[:, :, None]
    x = (2 * x.clamp(0, width - 1) + 1) / width - 1  # grid_sample's coordinates, of a map from -1 to 1
    y = (2 * y.clamp(0, height - 1) + 1) / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], -1)
    # The boxes of an image side by side, so that every map is read once and never copied.
    counts = torch.bincount(image, minlength=batch)
    order = image.argsort(stable=True)
    slot = torch.empty_like(image)
    starts = counts.cumsum(0) - counts
    slot[order] = torch.arange(len(image), device=image.device) - starts[image[order]]
    packed = grid.new_zeros(batch, int(counts.max()), *grid.shape[1:])
    packed[image, slot] = grid
    read = F.grid_sample(features, packed.flatten(2, 3), mode="bilinear", padding_mode="border", align_corners=False)
    found = read.transpose(1, 2)[image, slot] * inside.flatten(1)[:, None]
    if across == down == 1:
        return found.unflatten(-1, (size, size))
    return found.unflatten(-1, (size, down, size, across)).mean((3, 5))


def _ticks(low: Tensor, high: Tensor, size: int, samples: int) -> Tensor:
    """Where the samples of boxes lie along one side, (R, size * samples)."""
    places = (torch.arange(size * samples, device=low.device, dtype=low.dtype) + 0.5) / (size * samples)
    return low[:, None] - 0.5 + (high - low)[:, None] * places


def nms(boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression: a box goes when a better one that stays overlaps it by more than `threshold`.

    Args:
        boxes: (N, 4).
        scores: (N,); among equal scores the box given first is the better one.
        threshold: IoU in [0, 1].
        groups: (N,); boxes of different groups (classes, levels) leave each other alone.

    Returns:
        int64 places of the boxes that stay, best first.

    Raises:
        ValueError: shapes that do not fit, a threshold outside [0, 1].
    """
    if boxes.shape != (len(scores), 4) or scores.dim() != 1 or not 0 <= threshold <= 1:
        raise ValueError(
            f"boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)}, threshold {threshold}; "
            "expected (N, 4), (N,), a number in [0, 1]"
        )
    order = scores.argsort(descending=True, stable=True)
    return order[suppress(boxes[order], threshold, None if groups is None else groups[order])]


@torch.no_grad()
def suppress(boxes: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    """Which of boxes in order of falling score stay; the batched core of `nms`.

    The greedy answer is the only solution of "a box stays when no better box that stays overlaps it", so it is found
    by applying that sentence to all boxes at once until nothing changes: as many rounds as the longest chain of boxes
    that suppress one another, not as many as there are boxes.

    Args:
        boxes: (..., N, 4), the best first.
        threshold: IoU above which the worse box goes.
        groups: (..., N); boxes of different groups leave each other alone.

    Returns:
        (..., N) booleans.
    """
    *leading, number, _ = boxes.shape
    if number == 0:
        return torch.ones(*leading, 0, dtype=torch.bool, device=boxes.device)
    operators = _operators()
    if operators is not None and not leading:
        falling = torch.arange(number, 0, -1, device=boxes.device, dtype=torch.float32)
        names = torch.zeros(number, dtype=torch.int64, device=boxes.device) if groups is None else groups
        kept = torch.zeros(number, dtype=torch.bool, device=boxes.device)
        kept[operators.batched_nms(boxes.float(), falling, names, threshold)] = True
        return kept
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    low = torch.maximum(boxes[..., :, None, :2], boxes[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], boxes[..., None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    over = shared > threshold * (area[..., :, None] + area[..., None, :] - shared)
    if groups is not None:
        over &= groups[..., :, None] == groups[..., None, :]
    over = over.triu(1)
    keep = torch.ones(*leading, number, dtype=torch.bool, device=boxes.device)
    while True:
        now = ~(over & keep[..., None]).any(-2)
        if torch.equal(now, keep):
            return keep
        keep = now
