"""A decoder of queries that sample and mix features by filters of their own, and use earlier stages' filters again.

The forward pass of arXiv 2304.04978 (its labels are another module), read beside MCG-NJU/StageInteractor @477aa15.
Each stage lets the queries see one another, reads feature maps at points each query chooses, and mixes what was read
with filters that a linear layer makes out of the query. From the third stage on the channel filters of earlier stages,
each blended with the new one, mix once more, and half of the spatial filter is blended from that of the stage before:
later stages are deeper, and generate less. Without reuse it is the decoder of AdaMixer (arXiv 2203.16507), with
sub-points. The last linear layer of the mixing starts without its bias too, so that a query starts as it is.

A query's place is ``(x, y, z, r)``: centre in pixels, z the binary logarithm of the box's mean side, r that of its
height over its width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from counterproof.detection.set_prediction import SetLoss, corners
from counterproof.errors import extra

with extra("detection"):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

__all__ = [
    "CascadeDynamicMixing",
    "Filters",
    "MixingDetector",
    "MixingOutput",
    "StageInteractorDecoder",
    "SubQuerySampler",
    "boxes_to_xyzr",
    "xyzr_to_boxes",
]

PRIOR = 0.01  # of a class at a query, from the focal loss's paper


def boxes_to_xyzr(boxes: Tensor) -> Tensor:
    """Boxes ``(centre x, centre y, width, height)`` in pixels to ``(x, y, z, r)``; any leading shape.

    Raises:
        ValueError: a box that is not finite or has no area, with its number.
    """
    wrong = ~(boxes.isfinite().all(-1) & (boxes[..., 2:] > 0).all(-1))
    if bool(wrong.any()):
        number = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"box {number} is {boxes.reshape(-1, 4)[number].tolist()}; expected a finite centre and size > 0"
        )
    width, height = boxes[..., 2].log2(), boxes[..., 3].log2()
    return torch.stack([boxes[..., 0], boxes[..., 1], (width + height) / 2, height - width], -1)


def xyzr_to_boxes(xyzr: Tensor) -> Tensor:
    """``(x, y, z, r)`` to boxes ``(centre x, centre y, width, height)`` in pixels; any leading shape."""
    z, r = xyzr[..., 2], xyzr[..., 3]
    return torch.stack([xyzr[..., 0], xyzr[..., 1], 2 ** (z - r / 2), 2 ** (z + r / 2)], -1)


class SubQuerySampler(nn.Module):
    """Read feature maps at points that each query chooses: P anchors for each channel group, K sub-points around each.

    Args:
        width: C of queries and of feature maps.
        groups: G, groups of channels, each with its own anchors.
        points: P, anchors of a group.
        sub_points: K, points around an anchor, the same for all anchors and groups.
    """

    def __init__(self, width: int, *, groups: int = 4, points: int = 4, sub_points: int = 8) -> None:
        super().__init__()
        self.groups, self.points, self.sub_points = groups, points, sub_points
        self.anchors = nn.Linear(width, groups * points * 3)
        self.offsets = nn.Linear(width, sub_points * 3)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The start: the same points for every query, spread over its box, all on its own level."""
        for linear in (self.anchors, self.offsets):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.anchors.bias.view(-1, 3)[:, :2].uniform_(-0.5, 0.5)
        reach = 0.5 / math.sqrt(2)
        self.offsets.bias.view(-1, 3)[1:, :2].uniform_(-reach, reach)

    def forward(self, features: Sequence[Tensor], strides: Sequence[float], query: Tensor, xyzr: Tensor) -> Tensor:
        """Read.

        Args:
            features: maps (B, C, H_l, W_l), finest first.
            strides: pixels a step on each map stands for.
            query: (B, N, C).
            xyzr: (B, N, 4).

        Returns:
            (B, N, G, P*K, C/G), sub-points of one anchor one after another; 0 beside the maps.
        """
        batch = len(query)
        where, level = self._places(query, xyzr)
        weights = level_weights(level, strides)
        found: Tensor = query.new_zeros(())
        for place, (feature, stride) in enumerate(zip(features, strides, strict=True)):
            extent = where.new_tensor([feature.shape[-1] * stride, feature.shape[-2] * stride])
            grid = (where / extent * 2 - 1).flatten(0, 1).to(feature.dtype)
            parts = feature.reshape(batch * self.groups, -1, *feature.shape[-2:])
            read = F.grid_sample(parts, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            found = found + read * weights[..., place].flatten(0, 1)[:, None]
        parted: Tensor = found.unflatten(0, (batch, self.groups))  # (B, G, C/G, N, P*K)
        return parted.permute(0, 3, 1, 4, 2)

    def _places(self, query: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        """Points in pixels (B, G, N, P*K, 2) and their levels (B, G, N, P*K)."""
        batch, number = query.shape[:2]
        anchor = self.anchors(query).view(batch, number, self.groups, self.points, 1, 3)
        offset = self.offsets(query).view(batch, number, 1, 1, self.sub_points, 3)
        box = xyzr_to_boxes(xyzr)[:, :, None, None, None]
        scale = 2 ** anchor[..., 2:]
        where = box[..., :2] + box[..., 2:] * (anchor[..., :2] + scale * offset[..., :2])
        level = xyzr[:, :, None, None, None, 2] + anchor[..., 2] + offset[..., 2]
        return where.flatten(3, 4).transpose(1, 2), level.flatten(3, 4).transpose(1, 2)


def level_weights(level: Tensor, strides: Sequence[float]) -> Tensor:
    """How much each map counts for a point: softmax of -(z - 1 - log2 stride)^2 / 2, so z = 3 is at home on stride 4.

    Args:
        level: z of points, any shape.
        strides: of L maps.

    Returns:
        (..., L), summing to 1.
    """
    homes = torch.tensor([1 + math.log2(stride) for stride in strides], dtype=level.dtype, device=level.device)
    return (-((level[..., None] - homes) ** 2) / 2).softmax(-1)


class Filters(NamedTuple):
    """What a stage made out of its queries: channel filters (B*N*G, C/G, C/G), spatial ones (B*N*G, rows, P*K)."""

    channel: Tensor
    spatial: Tensor


class CascadeDynamicMixing(nn.Module):
    """Mix what a query has read, over channels and then over points, by filters made out of the query.

    Args:
        width: C of queries and features.
        groups: G.
        points, sub_points: P and K of the sampler before.
        out_points: rows of the spatial filter.
        reused: how many earlier stages' channel filters mix again, behind a light adapter each; with at least one, half
            of the spatial filter's rows are blended from the stage before.

    Raises:
        ValueError: a width that `groups` does not divide, or odd `out_points` with reuse.
    """

    def __init__(
        self,
        width: int,
        *,
        groups: int = 4,
        points: int = 4,
        sub_points: int = 8,
        out_points: int = 128,
        reused: int = 0,
    ) -> None:
        super().__init__()
        if width % groups or (reused and out_points % 2):
            raise ValueError(
                f"width={width}, groups={groups}, out_points={out_points}; groups divide the width, and with reuse "
                "out_points is even"
            )
        self.groups, self.points, self.sub_points, self.reused = groups, points, sub_points, reused
        self.channels = channels = width // groups
        self.rows = out_points // 2 if reused else out_points
        read = points * sub_points
        self.generate = nn.Linear(width, groups * (channels * channels + self.rows * read))
        self.channel_bias = nn.Linear(width, groups * channels)
        self.spatial_bias = nn.Linear(width, groups * out_points)
        if reused:
            self.along_sub_points = nn.ModuleList(
                nn.Linear(sub_points * channels, sub_points * channels) for _ in range(reused)
            )
            self.along_points = nn.ModuleList(nn.Linear(points * channels, points * channels) for _ in range(reused))
            self.channel_gates = nn.Linear(width, groups * reused * 2 * channels)
            self.reused_bias = nn.Linear(width, groups * reused * channels)
            self.row_gates = nn.Linear(width, groups * self.rows)
            self.column_gates = nn.Linear(width, groups * read)
        self.merge = nn.Linear(out_points * width, width)
        self.norm = nn.LayerNorm(width)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The start: the same filters for every query, adapters that do nothing, a query that stays what it is."""
        for linear in (self.generate, self.channel_bias, self.spatial_bias):
            nn.init.zeros_(linear.weight)
        idle: list[Any] = [self.merge]
        if self.reused:
            nn.init.zeros_(self.reused_bias.weight)
            idle += [*self.along_sub_points, *self.along_points, self.channel_gates, self.row_gates, self.column_gates]
        for linear in idle:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor, query: Tensor, stored: Sequence[Filters] = ()) -> tuple[Tensor, Filters]:
        """Mix.

        Args:
            features: (B, N, G, P*K, C/G).
            query: (B, N, C).
            stored: filters of earlier stages, oldest first, as many as `reused`; their points may be more than this
                stage's: the first ones count.

        Returns:
            the new queries (B, N, C), and this stage's own filters.

        Raises:
            ValueError: another number of stored filters.
        """
        if len(stored) != self.reused:
            raise ValueError(f"{len(stored)} stored filters; this stage was built to use {self.reused} again")
        batch, number = query.shape[:2]
        x = features.flatten(0, 2)
        own = self._filters(query)
        x_residual = x
        x = _normed(x @ own.channel + self.channel_bias(query).view(-1, 1, self.channels))
        if stored:
            gates = self.channel_gates(query).sigmoid().view(-1, self.reused, 2, self.channels)
            biases = self.reused_bias(query).view(-1, self.reused, 1, self.channels)
            for place, earlier in enumerate(stored):
                x = x_residual = self._adapted(x, place) + x_residual
                mixed = blend(earlier.channel, own.channel, gates[:, place, 0], gates[:, place, 1])
                x = _normed(x @ mixed + biases[:, place])
        spatial = own.spatial
        if stored:
            earlier_rows = stored[-1].spatial[:, : self.rows, : spatial.shape[-1]]
            row = self.row_gates(query).sigmoid().view(-1, self.rows)
            column = self.column_gates(query).sigmoid().view(-1, spatial.shape[-1])
            spatial = torch.cat([spatial, blend(earlier_rows, spatial, row, column)], 1)
        x = _normed(spatial @ x + self.spatial_bias(query).view(spatial.shape[0], -1, 1))
        mixed_query: Tensor = self.norm(query + self.merge(x.reshape(batch, number, -1)))
        return mixed_query, own

    def _filters(self, query: Tensor) -> Filters:
        made = self.generate(query).view(query.shape[0] * query.shape[1] * self.groups, -1)
        channel, spatial = made.split([self.channels**2, made.shape[-1] - self.channels**2], -1)
        return Filters(channel.unflatten(-1, (self.channels, -1)), spatial.unflatten(-1, (self.rows, -1)))

    def _adapted(self, x: Tensor, place: int) -> Tensor:
        """The light adapter before a filter that is used again: sub-points of an anchor mix, then anchors do."""
        apart: Tensor = x.unflatten(1, (self.points, self.sub_points))
        inner: Tensor = self.along_sub_points[place](apart.flatten(2)).view_as(apart)
        turned = apart.transpose(1, 2)
        outer: Tensor = self.along_points[place](turned.flatten(2)).view_as(turned).transpose(1, 2)
        return (inner + outer).flatten(1, 2)


def blend(old: Tensor, new: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Between two filters: first each row, then each column goes a share of the way from `new` towards `old`.

    Args:
        old, new: (X, R, S).
        rows, columns: (X, R) and (X, S), shares of the old; both at 1/2 leave a quarter of it.
    """
    first = torch.lerp(new, old, rows[:, :, None])
    return torch.lerp(new, first, columns[:, None, :])


def _normed(x: Tensor) -> Tensor:
    """ReLU of the layer norm over the last two dimensions, without weights."""
    return F.layer_norm(x, x.shape[-2:]).relu()


class _Stage(nn.Module):
    def __init__(self, num_labels: int, width: int, heads: int, ffn: int, mixing: dict[str, int]) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.overlap_weight = nn.Parameter(torch.empty(heads))
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.ReLU(), nn.Linear(ffn, width))
        self.ffn_norm = nn.LayerNorm(width)
        self.class_head = _head(width, num_labels)
        self.box_head = _head(width, 4)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.uniform_(self.overlap_weight, 0.0, 4.0)
        nn.init.constant_(_last(self.class_head).bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.zeros_(_last(self.box_head).weight)
        nn.init.zeros_(_last(self.box_head).bias)
        shape = {name: mixing[name] for name in ("groups", "points", "sub_points")}
        self.sampler = SubQuerySampler(width, **shape)
        self.mixing = CascadeDynamicMixing(width, **mixing)

    def forward(
        self, features: Sequence[Tensor], strides: Sequence[float], query: Tensor, xyzr: Tensor, stored: list[Filters]
    ) -> tuple[Tensor, Tensor, Tensor, Filters]:
        seen = query + place_encoding(xyzr, query.shape[-1]).to(query.dtype)
        overlap = (_share_inside(xyzr) + 1e-7).log()[:, None] * self.overlap_weight[:, None, None]
        talk, _ = self.attention(seen, seen, seen, attn_mask=overlap.flatten(0, 1).to(query.dtype), need_weights=False)
        query = self.attention_norm(seen + talk)
        query, own = self.mixing(self.sampler(features, strides, query, xyzr), query, stored)
        query = self.ffn_norm(query + self.ffn(query))
        return query, self.class_head(query), self.box_head(query), own


def _head(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out))


def _last(head: nn.Sequential) -> Any:
    return head[-1]


def place_encoding(xyzr: Tensor, width: int) -> Tensor:
    """(..., width) sines and cosines of (x, y, z, r), a quarter each; pixels count in thousands."""
    size = width // 4
    scaled = xyzr / xyzr.new_tensor([1000.0, 1000.0, 1.0, 1.0])
    powers = torch.arange(0, size, 2, device=xyzr.device, dtype=xyzr.dtype) / size
    angles = scaled[..., None] / 10000**powers
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def _share_inside(xyzr: Tensor) -> Tensor:
    """(B, N, N): the share of each query's box that lies inside each other's."""
    boxes = xyzr_to_boxes(xyzr)
    edges = corners(boxes)
    low = torch.maximum(edges[:, :, None, :2], edges[:, None, :, :2])
    high = torch.minimum(edges[:, :, None, 2:], edges[:, None, :, 2:])
    return (high - low).clamp(min=0).prod(-1) / boxes[:, :, 2:].prod(-1)[:, :, None]


class StageInteractorDecoder(nn.Module):
    """Stages of attention, sampling and mixing that turn queries into detections, over any feature maps.

    Args:
        num_labels: classes, with a sigmoid each.
        num_stages: L.
        width: C of queries and feature maps; a multiple of 8, of `groups` and of `heads`.
        groups: G of sampler and mixing.
        num_queries: N.
        heads: of the attention among queries.
        points: anchors P of a group, in the first stage and in the others.
        sub_points: K.
        out_points: rows of the spatial filters.
        ffn: hidden width of the feed-forward layers.
        reuse_start: first stage, counted from 0, that uses filters of earlier stages again: those from the stage
            before it on. None: no stage does, as in AdaMixer.

    Raises:
        ValueError: sizes that do not fit together, or a reuse that starts where there is nothing yet to reuse.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        num_stages: int = 6,
        width: int = 256,
        groups: int = 4,
        num_queries: int = 100,
        heads: int = 8,
        points: tuple[int, int] = (8, 4),
        sub_points: int = 8,
        out_points: int = 128,
        ffn: int = 2048,
        reuse_start: int | None = 2,
    ) -> None:
        super().__init__()
        if width % 8 or width % groups or width % heads:
            raise ValueError(f"width={width}; expected a multiple of 8, of groups={groups} and of heads={heads}")
        if reuse_start is not None and reuse_start < 1:
            raise ValueError(f"reuse_start={reuse_start}; the first stage has no earlier filters, expected 1 or more")
        if points[1] > points[0]:
            raise ValueError(f"points={points}; later stages have at most as many anchors as the first")
        self.reuse_start = reuse_start
        self.content = nn.Embedding(num_queries, width)
        nn.init.normal_(self.content.weight)
        self.stages = nn.ModuleList()
        for stage in range(num_stages):
            reused = 0 if reuse_start is None else max(0, stage - reuse_start + 1)
            mixing = dict(groups=groups, points=points[stage > 0], sub_points=sub_points)
            mixing |= dict(out_points=out_points, reused=reused)
            self.stages.append(_Stage(num_labels, width, heads, ffn, mixing))

    def forward(
        self,
        features: Sequence[Tensor],
        strides: Sequence[float],
        size: tuple[int, int],
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Detect.

        Args:
            features: maps (B, C, H_l, W_l), finest first.
            strides: pixels a step on each map stands for.
            size: height and width in pixels by which boxes are normalised.
            sizes: (B, 2) height and width of each picture inside it, where every query starts; None: all of `size`.

        Returns:
            logits (L, B, N, classes) and boxes (L, B, N, 4), normalised centre and size, of all stages.
        """
        batch = len(features[0])
        height, width = size
        whole = features[0].new_tensor([height, width]).expand(batch, 2) if sizes is None else sizes.to(features[0])
        start = boxes_to_xyzr(torch.cat([whole.flip(-1) / 2, whole.flip(-1)], -1))
        xyzr = start[:, None].expand(-1, self.content.num_embeddings, -1)
        query = F.layer_norm(self.content.weight, self.content.weight.shape[-1:]).expand(batch, -1, -1)
        scale = xyzr.new_tensor([width, height, width, height])
        logits, boxes, stored = [], [], list[Filters]()
        for number, stage in enumerate(self.stages):
            reuses = self.reuse_start is not None and number >= self.reuse_start
            query, scores, delta, own = stage(features, strides, query, xyzr, stored if reuses else [])
            stored = [*stored, own] if reuses else [own]
            side = xyzr_to_boxes(xyzr)[..., 2:]
            xyzr = xyzr + torch.cat([delta[..., :2] * side, delta[..., 2:]], -1)
            logits.append(scores)
            boxes.append(xyzr_to_boxes(xyzr) / scale)
            xyzr = xyzr.detach()  # a stage learns its own step only
        return torch.stack(logits), torch.stack(boxes)


@dataclass
class MixingOutput:
    """What a `MixingDetector` gives, named as in transformers.

    Attributes:
        logits, pred_boxes: (B, N, classes) and (B, N, 4), normalised centre and size, of the last stage.
        loss, loss_dict, auxiliary_outputs: with labels: the loss, its parts, outputs of the earlier stages.
    """

    logits: Tensor
    pred_boxes: Tensor
    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None


class MixingDetector(nn.Module):
    """A backbone of transformers and a `StageInteractorDecoder`: called as the detectors of transformers are.

    Args:
        backbone: gives ``.feature_maps``, finest first, and has ``.channels`` (``AutoBackbone``).
        num_labels: classes.
        loss_function: as a transformers detector's; the one-to-one `SetLoss` by default. May be set later.
        decoder: settings of the `StageInteractorDecoder`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_labels: int,
        *,
        loss_function: Callable[..., Any] | None = None,
        **decoder: Any,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = StageInteractorDecoder(num_labels, **decoder)
        channels: Any = backbone.channels
        self.projections = nn.ModuleList(nn.Conv2d(size, self.decoder.content.embedding_dim, 1) for size in channels)
        self.loss_function = loss_function or SetLoss()
        self.config: Any = SimpleNamespace(
            model_type="mixing",
            num_labels=num_labels,
            num_queries=self.decoder.content.num_embeddings,
            auxiliary_loss=True,
            class_cost=2.0,
            bbox_cost=5.0,
            giou_cost=2.0,
            bbox_loss_coefficient=5.0,
            giou_loss_coefficient=2.0,
            focal_alpha=0.25,
        )

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: list[dict[str, Tensor]] | None = None
    ) -> MixingOutput:
        """Detect, and measure the loss when there are labels.

        Args:
            pixel_values: (B, 3, H, W).
            pixel_mask: (B, H, W), 1 on the picture, 0 in the padding at right and bottom; None: no padding.
            labels: B targets: ``class_labels`` (T_b,) int64, ``boxes`` (T_b, 4) normalised centre and size.
        """
        maps: Any = self.backbone(pixel_values).feature_maps
        features = [project(found) for project, found in zip(self.projections, maps, strict=True)]
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        # A map's last step may reach beyond the picture: the stride is the power of two that its size comes nearest to.
        strides = [2.0 ** round(math.log2(size[1] / feature.shape[-1])) for feature in features]
        sizes = None
        if pixel_mask is not None:
            sizes = torch.stack([pixel_mask[:, :, 0].sum(-1), pixel_mask[:, 0].sum(-1)], -1)
        logits, boxes = self.decoder(features, strides, size, sizes)
        if labels is None:
            return MixingOutput(logits[-1], boxes[-1])
        loss = self.loss_function(logits[-1], labels, logits.device, boxes[-1], self.config, logits, boxes)
        return MixingOutput(logits[-1], boxes[-1], *loss)
