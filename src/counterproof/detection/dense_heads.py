"""Detectors of the years before DETR as heads on a feature pyramid: ATSS, and Faster R-CNN (RPN and RoI head).

Papers: ATSS arXiv 1912.02424, Faster R-CNN arXiv 1506.01497.  Read beside: open-mmlab/mmdetection and Sense-X/Co-DETR
(anchor_generator, delta_xywh_bbox_coder, atss_head, rpn_head, standard_roi_head and their configs).
A head gives its loss, and says which prior (anchor or proposal) it gave to which object: what a DETR can learn from.
Convolutions and losses run over the whole batch; only the assignment goes image by image.
Deviations from those configs: an anchor's centre is its cell's centre, (i + 0.5) * stride, where a DETR's reference
points lie (mmdetection: i * stride); anchors centred in a batch's padding learn nothing; at inference candidates are
limited before suppression, class by class, to the best `before` pairs of box and class.

Boxes are corners ``(x1, y1, x2, y2)`` in pixels of the padded picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterproof.assign import atss_assign, max_iou_assign
from counterproof.detection.regions import nms, roi_align, suppress
from counterproof.detection.set_prediction import class_loss, corners, generalized_iou
from counterproof.errors import extra

with extra("detection"):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

__all__ = [
    "Assigned",
    "AtssHead",
    "FasterRcnnHead",
    "Objects",
    "Pyramid",
    "anchor_boxes",
    "decode_boxes",
    "encode_boxes",
]

STDS = (0.1, 0.1, 0.2, 0.2)  # of the deltas of ATSS and of the RoI head
PRIOR = 0.01  # of a class at an anchor, from the focal loss's paper
CLIP = math.log(1000 / 16)  # of the logarithm of a side's change
BACKGROUND, LEFT_OUT = -1, -2


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of a batch, the finest first, and the pictures they cover.

    Attributes:
        maps: (B, d, h, w) each; a map covers the padded picture evenly.
        height, width: of the padded picture in pixels.
        sizes: (B, 2) width and height of each picture without its padding.
    """

    maps: Sequence[Tensor]
    height: int
    width: int
    sizes: Tensor

    def strides(self) -> list[tuple[float, float]]:
        """Pixels from cell to cell along x and y, for each map."""
        return [(self.width / level.shape[-1], self.height / level.shape[-2]) for level in self.maps]

    def tokens(self) -> Tensor:
        """(B, cells of all maps, d)."""
        return torch.cat([level.flatten(2).transpose(1, 2) for level in self.maps], 1)


@dataclass(frozen=True)
class Objects:
    """The objects of a batch.

    Attributes:
        boxes: (T, 4) of all images, one image after another.
        classes: (T,) int64.
        counts: objects of each image.
    """

    boxes: Tensor
    classes: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, labels: Sequence[Mapping[str, Tensor]], sizes: Tensor) -> "Objects":
        """From a DETR's targets, whose boxes are centre and size as shares of the picture; `sizes` as in `Pyramid`."""
        scale = torch.cat([sizes, sizes], -1)
        boxes = [corners(target["boxes"].to(sizes)) * scale[image] for image, target in enumerate(labels)]
        classes = torch.cat([target["class_labels"] for target in labels]).to(sizes.device)
        return cls(torch.cat(boxes), classes, tuple(len(part) for part in boxes))

    def split(self) -> tuple[Tensor, ...]:
        """Boxes of each image."""
        return self.boxes.split(self.counts)

    def starts(self) -> Tensor:
        """(B,) place of each image's first object."""
        counts = torch.tensor(self.counts, device=self.boxes.device)
        return counts.cumsum(0) - counts


@dataclass(frozen=True)
class Assigned:
    """Which prior of a head learns which object.

    Attributes:
        priors: (B, P, 4) anchors or proposals; no gradient.
        target: (B, P) int64: place among all objects of the batch, -1 background, -2 neither.
        features: (B, P, d) what the head saw there; with gradient.
    """

    priors: Tensor
    target: Tensor
    features: Tensor


def anchor_boxes(
    pyramid: Pyramid, scale: float, *, ratios: Sequence[float] = (1.0,), octaves: Sequence[float] = (1.0,)
) -> tuple[Tensor, list[int]]:
    """Anchors at the centre of every cell of every map.

    Args:
        pyramid: B, sizes and values do not matter.
        scale: side of a square anchor, in strides (the geometric mean of the two) of its map.
        ratios: height over width; the area stays.
        octaves: what the side is multiplied by.

    Returns:
        (P, 4) boxes, map after map, row after row, the anchors of a cell (ratio by ratio, then octave) side by side;
        and their number on each map.
    """
    like = pyramid.sizes
    high = torch.tensor([math.sqrt(ratio) * octave for ratio in ratios for octave in octaves]).to(like)
    wide = torch.tensor([octave / math.sqrt(ratio) for ratio in ratios for octave in octaves]).to(like)
    levels = []
    for level, (across, down) in zip(pyramid.maps, pyramid.strides()):
        side = scale * math.sqrt(across * down)
        half = torch.stack([wide, high], -1) * side / 2
        x = (torch.arange(level.shape[-1]).to(like) + 0.5) * across
        y = (torch.arange(level.shape[-2]).to(like) + 0.5) * down
        centre = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).reshape(-1, 1, 2)
        levels.append(torch.cat([centre - half, centre + half], -1).reshape(-1, 4))
    return torch.cat(levels), [len(level) for level in levels]


def encode_boxes(priors: Tensor, boxes: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """What turns priors into boxes: shift of the centre in sides of the prior, logarithm of the sides' ratios.

    Args:
        priors, boxes: (..., 4), each of some width and height.
        stds: what the four numbers are divided by.

    Returns:
        (..., 4) in the order x, y, width, height.
    """
    size, wanted = priors[..., 2:] - priors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (priors[..., :2] + priors[..., 2:])) / 2 / size
    return torch.cat([shift, (wanted / size).log()], -1) / shift.new_tensor(stds)


def decode_boxes(priors: Tensor, deltas: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The inverse of `encode_boxes`; a side changes by a factor of 62.5 at the most, either way."""
    deltas = deltas * deltas.new_tensor(stds)
    size = priors[..., 2:] - priors[..., :2]
    centre = (priors[..., :2] + priors[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-CLIP, CLIP).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


class AtssHead(nn.Module):
    """One anchor per cell, positives by adaptive training sample selection (ATSS).

    `build` makes the layers once the width is known; until then it has no parameters.

    Args:
        num_classes: C.
        anchor_scale: side of an anchor in strides of its map. The default is meant for large pictures.
        stacked_convs: convolutions before the outputs, in both towers (0 to 5 differ by 0.5 AP in the paper).
        topk: candidates per object and map.
    """

    def __init__(self, num_classes: int, *, anchor_scale: float = 8.0, stacked_convs: int = 1, topk: int = 9) -> None:
        super().__init__()
        if num_classes < 1 or not anchor_scale > 0 or stacked_convs < 0:
            raise ValueError(
                f"num_classes={num_classes}, anchor_scale={anchor_scale}, stacked_convs={stacked_convs}; "
                "expected at least 1, a positive number, at least 0"
            )
        self.num_classes, self.anchor_scale = num_classes, anchor_scale
        self.stacked_convs, self.topk = stacked_convs, topk

    def build(self, width: int, levels: int, generator: torch.Generator) -> None:
        """Make the layers for maps of `width` channels; convolutions start from N(0, 0.01).

        Raises:
            ValueError: it has layers already.
        """
        _refuse_twice(self)
        with torch.random.fork_rng(devices=[]):
            self.class_tower, self.box_tower = (
                nn.Sequential(*(layer for _ in range(self.stacked_convs) for layer in _stage(width))) for _ in range(2)
            )
            self.class_output = nn.Conv2d(width, self.num_classes, 3, padding=1)
            self.box_output = nn.Conv2d(width, 4, 3, padding=1)
            self.centerness_output = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))
        _draw(self, generator)
        nn.init.constant_(self.class_output.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def fit_anchors(self, side: float, stride: float) -> None:
        """Make anchors on the finest map, of that stride in pixels, `side` pixels wide; never more than 8 strides."""
        self.anchor_scale = min(8.0, side / stride)

    def forward(
        self, pyramid: Pyramid, objects: Objects, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Assigned]:
        """Losses ``class`` (focal, weight 1), ``box`` (GIoU, 2) and ``centerness`` (1), weights included; the anchors.

        Args:
            pyramid: as many maps as the head was built for.
            objects: of the batch.
            generator: not used: nothing is drawn.
        """
        logits, deltas, centerness = self._outputs(pyramid)
        priors, numbers = anchor_boxes(pyramid, self.anchor_scale)
        real = _on_picture(priors, pyramid)
        rows = []
        for on, boxes, start in zip(real, objects.split(), objects.starts()):
            rows.append(_spread(on, start, atss_assign(priors[on], _present(on, numbers), boxes, self.topk)))
        target = torch.stack(rows)
        positive, known = target >= 0, target >= BACKGROUND
        image, place = positive.nonzero(as_tuple=True)
        which = target[image, place]
        # As in mmdetection, an image without a positive counts as one.
        count = _shared(positive.sum(1).clamp(min=1).sum().to(deltas)).clamp(min=1)
        wanted = torch.zeros_like(logits)
        wanted[image, place, objects.classes[which]] = 1
        own, boxes = priors[place], objects.boxes[which]
        quality = _centerness(own, boxes)
        apart = 1 - generalized_iou(decode_boxes(own, deltas[image, place], STDS), boxes)
        asked = F.binary_cross_entropy_with_logits(centerness[image, place], quality, reduction="sum")
        losses = {
            "class": class_loss(logits[known][None], wanted[known][None], count)[0],
            "box": 2 * (apart * quality).sum() / _shared(quality.sum()).clamp(min=1),
            "centerness": asked / count,
        }
        return losses, Assigned(priors.expand(len(target), -1, -1), target, pyramid.tokens())

    @torch.no_grad()
    def detect(
        self, pyramid: Pyramid, *, threshold: float = 0.6, before: int = 1000, keep: int = 100
    ) -> list[dict[str, Tensor]]:
        """What the head itself finds, suppressed class by class.

        Args:
            pyramid: the maps.
            threshold: IoU of the suppression.
            before: best pairs of anchor and class that take part, per map.
            keep: detections of an image at the most.

        Returns:
            for each image ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), best first.
        """
        logits, deltas, centerness = self._outputs(pyramid)
        priors, numbers = anchor_boxes(pyramid, self.anchor_scale)
        scores = logits.sigmoid() * centerness.sigmoid()[..., None] * _on_picture(priors, pyramid)[..., None]
        boxes = _clipped(decode_boxes(priors, deltas, STDS), pyramid)
        found = []
        for image in range(len(scores)):
            parts = []
            for level, corner in zip(scores[image].split(numbers), boxes[image].split(numbers)):
                best, pair = level.flatten().topk(min(before, level.numel()))
                parts.append((best, pair % self.num_classes, corner[pair // self.num_classes]))
            best, label, corner = (torch.cat(column) for column in zip(*parts))
            found.append(_detections(best, label, corner, threshold, keep))
        return found

    def _outputs(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P, C), (B, P, 4) and (B, P), in float32 at least."""
        if len(pyramid.maps) != len(self.scales):
            raise ValueError(f"{len(pyramid.maps)} maps; the head was built for {len(self.scales)}")
        logits, deltas, centerness = [], [], []
        for level, scale in zip(pyramid.maps, self.scales):
            seen, bounded = self.class_tower(level), self.box_tower(level)
            logits.append(_rows(self.class_output(seen), self.num_classes))
            deltas.append(_rows(self.box_output(bounded) * scale, 4))
            centerness.append(_rows(self.centerness_output(bounded), 1))
        return torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(centerness, 1)[..., 0]


class FasterRcnnHead(nn.Module):
    """Region proposals and their classification, positives by greatest IoU at each of the two stages.

    `build` makes the layers once the width is known; until then it has no parameters.

    Args:
        num_classes: C.
        anchor_scale: side of the smallest anchor in strides of its map; each cell has 3 octave scales and 3 ratios.
        pool: bins of a region's height and width.
        hidden: width of the two linear layers.
        finest: region side, in strides of the finest map, up to which twice over that map is read (112 pixels at 8).
        before: anchors of a map that take part in the suppression.
        proposals: left over of an image after it.
        rpn_samples, samples: anchors and regions of an image in the loss, a half and a quarter positive at the most.
        sampling_ratio: see `roi_align`.
    """

    RATIOS = (0.5, 1.0, 2.0)
    OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))

    def __init__(
        self,
        num_classes: int,
        *,
        anchor_scale: float = 4.0,
        pool: int = 7,
        hidden: int = 1024,
        finest: float = 14.0,
        before: int = 4000,
        proposals: int = 1000,
        rpn_samples: int = 256,
        samples: int = 512,
        sampling_ratio: int = 0,
    ) -> None:
        super().__init__()
        least = {"num_classes": num_classes, "pool": pool, "hidden": hidden, "before": before, "proposals": proposals}
        least |= {"rpn_samples": rpn_samples, "samples": samples}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if not anchor_scale > 0 or not finest > 0:
            raise ValueError(f"anchor_scale={anchor_scale}, finest={finest}; expected positive numbers")
        self.num_classes, self.anchor_scale, self.pool, self.hidden = num_classes, anchor_scale, pool, hidden
        self.finest, self.before, self.proposals = finest, before, proposals
        self.rpn_samples, self.samples, self.sampling_ratio = rpn_samples, samples, sampling_ratio

    def build(self, width: int, levels: int, generator: torch.Generator) -> None:
        """Make the layers for maps of `width` channels; the maps but the coarsest are what regions are cut from.

        Raises:
            ValueError: it has layers already.
        """
        _refuse_twice(self)
        anchors = len(self.RATIOS) * len(self.OCTAVES)
        with torch.random.fork_rng(devices=[]):
            self.rpn_tower = nn.Conv2d(width, width, 3, padding=1)
            self.rpn_class = nn.Conv2d(width, anchors, 1)
            self.rpn_box = nn.Conv2d(width, anchors * 4, 1)
            self.shared = nn.Sequential(
                nn.Linear(width * self.pool**2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU()
            )
            self.class_output = nn.Linear(self.hidden, self.num_classes + 1)
            self.box_output = nn.Linear(self.hidden, self.num_classes * 4)
        _draw(self, generator)
        for layer in self.shared:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.normal_(self.box_output.weight, std=0.001, generator=generator)

    def fit_anchors(self, side: float, stride: float) -> None:
        """Make the middle octave on the finest map, of that stride, `side` pixels wide; never more than by default."""
        self.anchor_scale = min(4.0, side / stride / self.OCTAVES[1])

    def forward(
        self, pyramid: Pyramid, objects: Objects, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Assigned]:
        """Losses ``rpn_class``, ``rpn_box`` (L1), ``class`` (cross-entropy) and ``box`` (GIoU, 10); sampled regions.

        Args:
            pyramid: the maps.
            objects: of the batch; they are regions of their own beside the proposals.
            generator: of what is sampled; None: seeded with 0.
        """
        generator = generator or torch.Generator().manual_seed(0)
        scores, deltas = self._anchors(pyramid)
        priors, numbers = self._priors(pyramid)
        real = _on_picture(priors, pyramid)
        chosen = []
        for number, (boxes, start) in enumerate(zip(objects.split(), objects.starts())):
            on = real[number]
            found = max_iou_assign(priors[on], boxes, pos=0.7, neg=0.3, low_quality=True, min_pos=0.3)
            target = _spread(on, start, found)
            places = _sample(target, self.rpn_samples, 0.5, generator)
            chosen.append((torch.full_like(places, number), places, target[places]))
        image, place, which = (torch.cat(column) for column in zip(*chosen))
        count = _shared(scores.new_tensor(float(len(place)))).clamp(min=1)
        positive = which >= 0
        asked = F.binary_cross_entropy_with_logits(scores[image, place], positive.to(scores), reduction="sum")
        own, boxes = priors[place[positive]], objects.boxes[which[positive]]
        off = (deltas[image[positive], place[positive]] - encode_boxes(own, boxes)).abs().sum()
        losses = {"rpn_class": asked / count, "rpn_box": off / count}
        regions = self._proposals(pyramid, priors, numbers, real, scores, deltas, self.before)
        more, assigned = self._regions(pyramid, objects, regions, generator)
        return losses | more, assigned

    def _regions(
        self, pyramid: Pyramid, objects: Objects, proposals: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Assigned]:
        """The second stage."""
        priors, targets = [], []
        for own, start, found in zip(objects.split(), objects.starts(), proposals):
            regions = torch.cat([own, found])
            best = max_iou_assign(regions, own, pos=0.5, neg=0.5, low_quality=False)
            target = torch.where(best >= 0, best + start, best)
            places = _sample(target, self.samples, 0.25, generator)
            priors.append(regions[places])
            targets.append(target[places])
        sizes = [len(part) for part in priors]
        image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(pyramid.sizes.device)
        flat, which = torch.cat(priors), torch.cat(targets)
        cut = self._cut(pyramid, flat, image)
        logits, deltas = self._classified(cut)
        count = _shared(logits.new_tensor(float(len(flat)))).clamp(min=1)
        positive = which >= 0
        classes = torch.full_like(which, self.num_classes)
        classes[positive] = objects.classes[which[positive]]
        moved = decode_boxes(flat[positive], deltas[positive, classes[positive]], STDS)
        apart = 1 - generalized_iou(moved, objects.boxes[which[positive]])
        losses = {
            "class": F.cross_entropy(logits, classes, reduction="sum") / count,
            "box": 10 * apart.sum() / count,
        }
        # Side by side again, image by image; what is added is neither positive nor negative.
        most = max(sizes)
        padded = flat.new_zeros(len(sizes), most, 4)
        target = torch.full((len(sizes), most), LEFT_OUT, device=flat.device)
        features = cut.new_zeros(len(sizes), most, cut.shape[1])
        slot = torch.cat([torch.arange(size) for size in sizes]).to(image.device)
        padded[image, slot] = flat
        target[image, slot] = which
        features = features.index_put((image, slot), cut.mean((2, 3)))
        return losses, Assigned(padded, target, features)

    @torch.no_grad()
    def detect(
        self, pyramid: Pyramid, *, threshold: float = 0.5, before: int = 1000, keep: int = 100
    ) -> list[dict[str, Tensor]]:
        """What the head itself finds; see `AtssHead.detect`. `before` goes for anchors of a map and for pairs."""
        scores, deltas = self._anchors(pyramid)
        priors, numbers = self._priors(pyramid)
        real = _on_picture(priors, pyramid)
        found = []
        for image, regions in enumerate(self._proposals(pyramid, priors, numbers, real, scores, deltas, before)):
            whose = torch.full((len(regions),), image, device=regions.device)
            logits, moves = self._classified(self._cut(pyramid, regions, whose))
            probability = logits.softmax(-1)[:, :-1]
            best, pair = probability.flatten().topk(min(before, probability.numel()))
            region, label = pair // self.num_classes, pair % self.num_classes
            boxes = decode_boxes(regions[region], moves[region, label], STDS)
            boxes = torch.minimum(boxes.clamp(min=0), pyramid.sizes[image].repeat(2))
            found.append(_detections(best, label, boxes, threshold, keep))
        return found

    def _priors(self, pyramid: Pyramid) -> tuple[Tensor, list[int]]:
        return anchor_boxes(pyramid, self.anchor_scale, ratios=self.RATIOS, octaves=self.OCTAVES)

    def _anchors(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """(B, P) scores and (B, P, 4) deltas of the anchors."""
        scores, deltas = [], []
        for level in pyramid.maps:
            seen = self.rpn_tower(level).relu()
            scores.append(_rows(self.rpn_class(seen), 1))
            deltas.append(_rows(self.rpn_box(seen), 4))
        return torch.cat(scores, 1)[..., 0], torch.cat(deltas, 1)

    @torch.no_grad()
    def _proposals(
        self,
        pyramid: Pyramid,
        priors: Tensor,
        numbers: Sequence[int],
        real: Tensor,
        scores: Tensor,
        deltas: Tensor,
        before: int,
    ) -> list[Tensor]:
        """The best anchors of every map, moved and suppressed: (n, 4) for each image."""
        lowest = -float("inf")
        ranked, moved = [], []
        scores = scores.masked_fill(~real, lowest)
        sizes = list(numbers)
        for own, level, delta in zip(priors.split(sizes), scores.split(sizes, 1), deltas.split(sizes, 1)):
            best, place = level.topk(min(before, level.shape[1]))
            boxes = decode_boxes(own[place], delta.gather(1, place[..., None].expand(-1, -1, 4)))
            boxes = _clipped(boxes, pyramid)
            sound = (boxes[..., 2:] > boxes[..., :2]).all(-1) & (best > lowest)
            stays = sound & _suppressed(boxes, 0.7)
            ranked.append(best.masked_fill(~stays, lowest))
            moved.append(boxes)
        every, boxes = torch.cat(ranked, 1), torch.cat(moved, 1)
        best, place = every.topk(min(self.proposals, every.shape[1]))
        chosen = boxes.gather(1, place[..., None].expand(-1, -1, 4))
        return [rows[good] for rows, good in zip(chosen, best > lowest)]

    def _cut(self, pyramid: Pyramid, boxes: Tensor, image: Tensor) -> Tensor:
        """(R, d, pool, pool): each region from the map that fits its size."""
        maps = pyramid.maps[:-1] or pyramid.maps
        strides = pyramid.strides()
        finest = self.finest * math.sqrt(strides[0][0] * strides[0][1])
        side = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sqrt()
        level = (side / finest + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        parts, places = [], []
        for number, (features, (across, down)) in enumerate(zip(maps, strides)):
            chosen = (level == number).nonzero()[:, 0]
            cells = boxes[chosen] / boxes.new_tensor([across, down, across, down])
            ratio = self.sampling_ratio
            parts.append(roi_align(features, cells, image[chosen], size=self.pool, sampling_ratio=ratio))
            places.append(chosen)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _classified(self, cut: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C + 1) logits and (R, C, 4) deltas of regions."""
        seen = self.shared(cut.flatten(1))
        return _wide(self.class_output(seen)), _wide(self.box_output(seen)).unflatten(-1, (self.num_classes, 4))


def _stage(width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(math.gcd(32, width), width), nn.ReLU()]


def _refuse_twice(head: nn.Module) -> None:
    if next(head.parameters(), None) is not None:
        raise ValueError(f"{type(head).__name__} has its layers already; give every detector a head of its own")


def _draw(head: nn.Module, generator: torch.Generator) -> None:
    for layer in head.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.01, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _rows(maps: Tensor, numbers: int) -> Tensor:
    """(B, A * numbers, h, w) to (B, h * w * A, numbers)."""
    return _wide(maps).permute(0, 2, 3, 1).reshape(len(maps), -1, numbers)


def _on_picture(priors: Tensor, pyramid: Pyramid) -> Tensor:
    """(B, P): the prior's centre does not lie in the padding."""
    return (((priors[:, :2] + priors[:, 2:]) / 2)[None] < pyramid.sizes[:, None]).all(-1)


def _present(real: Tensor, numbers: Sequence[int]) -> list[int]:
    return [int(part.sum()) for part in real.split(list(numbers))]


def _spread(real: Tensor, start: Tensor, assigned: Tensor) -> Tensor:
    """Assignments of the priors on the picture to all priors, with objects counted over the batch."""
    target = torch.full(real.shape, LEFT_OUT, device=real.device)
    target[real] = torch.where(assigned >= 0, assigned + start, assigned)
    return target


def _sample(target: Tensor, number: int, share: float, generator: torch.Generator) -> Tensor:
    """Places of up to `number` priors, at most that share positive and those first; the rest negative, at random."""
    positive = _some((target >= 0).nonzero()[:, 0], int(number * share), generator)
    negative = _some((target == BACKGROUND).nonzero()[:, 0], number - len(positive), generator)
    return torch.cat([positive, negative])


def _some(places: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """A random choice, in random order, where there are more than wanted."""
    if len(places) <= number:
        return places
    return places[torch.randperm(len(places), generator=generator)[:number].to(places.device)]


def _centerness(priors: Tensor, boxes: Tensor) -> Tensor:
    """How central a prior lies in its object: root of the product of the ratios of opposite distances."""
    centre = (priors[:, :2] + priors[:, 2:]) / 2
    before, behind = centre - boxes[:, :2], boxes[:, 2:] - centre
    return (torch.minimum(before, behind) / torch.maximum(before, behind)).prod(-1).sqrt()


def _shared(value: Tensor) -> Tensor:
    """The mean over the processes of a distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        return value / torch.distributed.get_world_size()
    return value.detach()


def _clipped(boxes: Tensor, pyramid: Pyramid) -> Tensor:
    """Boxes (B, n, 4) cut at the edges of their pictures."""
    return torch.minimum(boxes.clamp(min=0), pyramid.sizes.repeat(1, 2)[:, None])


def _suppressed(boxes: Tensor, threshold: float) -> Tensor:
    """`suppress` for a batch, image by image where all at once would take much memory."""
    if len(boxes) * boxes.shape[1] ** 2 <= 2**24:
        return suppress(boxes, threshold)
    return torch.stack([suppress(rows, threshold) for rows in boxes])


def _detections(scores: Tensor, labels: Tensor, boxes: Tensor, threshold: float, keep: int) -> dict[str, Tensor]:
    sound = (scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(-1)
    scores, labels, boxes = scores[sound], labels[sound], boxes[sound]
    stays = nms(boxes, scores, threshold, labels)[:keep]
    return {"scores": scores[stays], "labels": labels[stays], "boxes": boxes[stays]}
