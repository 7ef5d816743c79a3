"""Co-DETR: dense heads with one-to-many rules train a DETR's encoder, their positives its decoder.

Paper: arXiv 2211.12860.
Read beside: Sense-X/Co-DETR at 2665352, projects/models (co_detr, co_deformable_detr_head, co_atss_head, co_roi_head,
transformer) and the config co_deformable_detr_r50_1x; its heads are in `counterproof.detection.dense_heads`.
Deviations: the vector added per head is one of d numbers (the repository's is a single number, by a mistake it keeps);
positive queries enter the decoder in the form the host's own have: as boxes where those are boxes (DAB-DETR, two-stage
Deformable DETR, RT-DETR; the repository's hosts are such), as the boxes' centres where those are points (one-stage
Deformable DETR, Conditional DETR), since the first layer's box head, which both kinds of queries share, then predicts a
size and not a change of size; an image with fewer negatives than it lacks positives is filled up with masked queries;
masked queries can be attended to by none, and attend to the others (in the repository their softmax is empty).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from counterproof.detection.dense_heads import Assigned, AtssHead, FasterRcnnHead, Objects, Pyramid
from counterproof.detection.set_prediction import Matches, box_losses, check_labels, class_loss
from counterproof.errors import UserError, extra

with extra("detection"):
    import torch
    from torch import Tensor, nn
    from transformers.utils import ModelOutput  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AtssHead", "CoDetr", "CoDetrOutput", "FasterRcnnHead", "PositiveQueries", "positive_queries"]

Labels = Sequence[Mapping[str, Tensor]]
FEWEST = 9  # positive queries of an image
EPSILON = 1e-5  # of the inverse sigmoid, as in transformers


@dataclass
class CoDetrOutput(ModelOutput):  # type: ignore[misc]
    """What a training step gives, as transformers' Trainer takes it.

    Attributes:
        loss: main + lambda1 * queries + head_loss_scale * heads.
        logits, pred_boxes: the host's: (B, N, C), and (B, N, 4), centre and size as shares of the picture.
        loss_dict: the parts before these three weights: ``main/...`` as the host names them, ``head0/...`` (each head's
            own weights included), ``query0/...`` as the host names its own.
        positives: (heads,) priors that a head made positive, per object of the batch.
        host: what the host gave.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    positives: Tensor | None = None
    host: Any = None


@dataclass(frozen=True)
class PositiveQueries:
    """Extra queries of one head whose targets are known.

    Attributes:
        boxes: (B, m, 4) where they start: priors as centre and size, in shares of the picture; no gradient.
        features: (B, m, d) what the head saw there.
        target: (B, m) int64: place among all objects of the batch, -1 background, -2 filling that is masked out.
    """

    boxes: Tensor
    features: Tensor
    target: Tensor


def positive_queries(
    assigned: Assigned,
    sizes: Tensor,
    *,
    generator: torch.Generator,
    max_positives: int = 300,
    use_zero_padding: bool = False,
) -> PositiveQueries:
    """Priors that a head made positive, as many for each image of the batch.

    Their number m is that of the image with the most, but 9 at least and `max_positives` at most: where there are more,
    some are left out at random; where there are fewer, random negatives follow, or zeros that nobody attends to.

    Args:
        assigned: a head's priors.
        sizes: (B, 2) width and height of the pictures without padding.
        generator: a CPU generator.
        max_positives: of an image; 9 at least.
        use_zero_padding: zeros instead of negatives. An image without enough negatives gets them in any case.

    Raises:
        ValueError: `max_positives` < 9.
    """
    if max_positives < FEWEST:
        raise ValueError(f"max_positives is {max_positives}; expected at least {FEWEST}")
    target = assigned.target
    number = int((target >= 0).sum(1).max().clamp(FEWEST, max_positives))
    places, filled = [], []
    for row in target:
        chosen = _some((row >= 0).nonzero()[:, 0], number, generator)
        if not use_zero_padding:
            negative = _some((row == -1).nonzero()[:, 0], number - len(chosen), generator)
            chosen = torch.cat([chosen, negative])
        places.append(torch.cat([chosen, chosen.new_zeros(number - len(chosen))]))
        filled.append(torch.arange(number, device=row.device) >= len(chosen))
    place, empty = torch.stack(places), torch.stack(filled)
    priors = assigned.priors.gather(1, place[..., None].expand(-1, -1, 4))
    centred = torch.cat([(priors[..., :2] + priors[..., 2:]) / 2, priors[..., 2:] - priors[..., :2]], -1)
    boxes = centred / sizes.repeat(1, 2)[:, None]
    features = assigned.features.gather(1, place[..., None].expand(-1, -1, assigned.features.shape[-1]))
    return PositiveQueries(
        boxes=boxes.masked_fill(empty[..., None], 0.0).detach(),
        features=features.masked_fill(empty[..., None], 0.0),
        target=target.gather(1, place).masked_fill(empty, -2),
    )


def _some(places: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """A random choice of up to `number`."""
    return places[torch.randperm(len(places), generator=generator)[:number].to(places.device)]


class CoDetr(nn.Module):
    """A DETR of transformers with dense heads on its encoder for the time of its training.

    ``co(pixel_values=, pixel_mask=, labels=)`` in train mode gives a `CoDetrOutput` whose loss is

        sum over decoder layers of (main + lambda1 * positive queries of every head) + head_loss_scale * heads

    and in eval mode, or without labels, what the host gives. The host itself (`model`) is never changed: heads, the
    further feature map and the queries' embeddings are this module's.

    Args:
        model: Deformable DETR (one or two stages), Conditional DETR, DAB-DETR, RT-DETR or RT-DETRv2 of transformers,
            with ``config.auxiliary_loss``. Targets are shares of the picture without its padding.
        heads: `AtssHead`, `FasterRcnnHead`, or any module with their ``build``, ``forward`` and ``detect``.
        lambda1: weight of the positive queries' loss; 0 leaves their decoder passes out.
        lambda2: weight of the heads' losses, before the next.
        head_loss_scale: what the heads' losses are multiplied by; None: decoder layers times `lambda2`, as the official
            configurations have it.
        max_positives: positive queries of an image and head at the most.
        use_zero_padding: see `positive_queries`.
        finer_maps: maps added below the encoder's finest by transposed convolutions; None: 0, or 2 for an encoder that
            is never multi-scale (Conditional DETR, DAB-DETR).
        generator: of the new weights and of all sampling, on the CPU; None: seeded with 0. Its state is part of
            ``state_dict()``.

    Raises:
        UserError: a host of another family (the message says why it is none), no `auxiliary_loss`.
        ValueError: a head of another number of classes, negative weights.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        heads: Sequence[nn.Module],
        *,
        lambda1: float = 1.0,
        lambda2: float = 2.0,
        head_loss_scale: float | None = None,
        max_positives: int = 300,
        use_zero_padding: bool = False,
        finer_maps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        config: Any = model.config
        self.family = _family(model)
        if not config.auxiliary_loss:
            raise UserError(
                "every decoder layer needs its loss; set model.config.auxiliary_loss = True (and in DAB-DETR "
                "model.auxiliary_loss) before wrapping"
            )
        if min(lambda1, lambda2, head_loss_scale or 0.0) < 0:
            raise ValueError(f"lambda1={lambda1}, lambda2={lambda2}, head_loss_scale={head_loss_scale}; none below 0")
        if max_positives < FEWEST:
            raise ValueError(f"max_positives is {max_positives}; expected at least {FEWEST}")
        for number, head in enumerate(heads):
            if head.num_classes != config.num_labels:
                raise ValueError(f"heads[{number}] has {head.num_classes} classes, the model {config.num_labels}")
        if finer_maps is None:
            finer_maps = 0 if self.family.maps is not None else 2
        if finer_maps < 0:
            raise ValueError(f"finer_maps is {finer_maps}; expected at least 0")
        self.model = model
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.head_loss_scale = config.decoder_layers * lambda2 if head_loss_scale is None else head_loss_scale
        self.max_positives, self.use_zero_padding = max_positives, use_zero_padding
        self._generator = generator or torch.Generator().manual_seed(0)
        width = config.hidden_size if self.family.kind == "dab-detr" else config.d_model
        levels = 1 if self.family.maps is None else getattr(config, self.family.maps)
        self.heads = nn.ModuleList(heads)
        with torch.random.fork_rng(devices=[]):
            self.finer = nn.ModuleList(_rescaled(width, finer=True) for _ in range(finer_maps))
            self.coarser = _rescaled(width, finer=False)
            # No pass, no parameters: a distributed training waits for the gradient of every one.
            embedded = len(heads) if lambda1 else 0
            self.queries = nn.ModuleList(_QueryEmbedding(width, self.family.boxed) for _ in range(embedded))
        for part in (self.finer, self.coarser, self.queries):
            for layer in part.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.xavier_uniform_(layer.weight, generator=self._generator)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
                elif isinstance(layer, _QueryEmbedding):
                    nn.init.normal_(layer.head, generator=self._generator)
        for head in self.heads:
            head.build(width, finer_maps + levels + 1, self._generator)  # type: ignore[operator]
        like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        for part in (self.heads, self.finer, self.coarser, self.queries):
            part.to(device=like.device, dtype=like.dtype)
        # A detector's layers may share their weights under several names, which safetensors refuses to write.
        self.register_state_dict_post_hook(_without_twins)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_twins)  # type: ignore[no-untyped-call]
        self.train(model.training)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Labels | None = None, **inputs: Any
    ) -> Any:
        """A step.

        Args:
            pixel_values: (B, 3, H, W).
            pixel_mask: (B, H, W), 1 on the picture, 0 in the padding below and to the right of it; None: no padding.
            labels: for each image ``class_labels`` (T,) int64 and ``boxes`` (T, 4), centre and size as shares.
            inputs: further arguments of the host.

        Raises:
            ValueError: labels that no image can have (image and box are named).
        """
        if labels is None or not self.training:
            return self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels, **inputs)
        config: Any = self.model.config
        check_labels(labels, len(pixel_values), config.num_labels)
        with _recorded(self.model) as seen:
            host = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels, **inputs)
        loss: Tensor = host.loss
        parts = {f"main/{name}": value for name, value in host.loss_dict.items()}
        counts = []
        if len(self.heads) and (self.lambda1 or self.head_loss_scale):
            pyramid = self.pyramid(seen, pixel_values, pixel_mask)
            objects = Objects.of(labels, pyramid.sizes)
            for number, head in enumerate(self.heads):
                losses, assigned = head(pyramid, objects, self._generator)
                parts |= {f"head{number}/{name}": value for name, value in losses.items()}
                loss = loss + self.head_loss_scale * sum(losses.values())
                counts.append((assigned.target >= 0).sum() / max(1, len(objects.classes)))
                if self.lambda1:
                    extra_loss, named = self._query_loss(number, seen, pyramid, assigned, labels)
                    parts |= {f"query{number}/{name}": value for name, value in named.items()}
                    loss = loss + self.lambda1 * extra_loss
        positives = torch.stack(counts).to(loss.dtype) if counts else loss.new_zeros(0)
        return CoDetrOutput(
            loss=loss,
            logits=host.logits,
            pred_boxes=host.pred_boxes,
            loss_dict=parts,
            positives=positives,
            host=host,
        )

    @torch.no_grad()
    def detect(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, *, head: int = 0, **settings: Any
    ) -> list[dict[str, Tensor]]:
        """What one of the heads finds by itself, with suppression: how good it is, not what is shipped.

        Args:
            pixel_values, pixel_mask: as in `forward`.
            head: which.
            settings: of the head's own ``detect``.

        Returns:
            for each image ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), corners in pixels, best first.
        """
        training = self.training
        self.eval()
        try:
            with _recorded(self.model) as seen:
                self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
            pyramid = self.pyramid(seen, pixel_values, pixel_mask)
            found: list[dict[str, Tensor]] = self.heads[head].detect(pyramid, **settings)  # type: ignore[operator]
        finally:
            self.train(training)
        return found

    @torch.no_grad()
    def fit_anchors(self, median_side: float, side: int = 128) -> None:
        """Choose the heads' anchors by the data: on the finest map as large as the objects, never above the defaults.

        Args:
            median_side: median of the objects' sqrt(width * height), in pixels of the training pictures.
            side: of a blank picture on which the finest map's stride is found.

        Raises:
            ValueError: a median that is not positive and finite.
        """
        if not 0 < median_side < math.inf:
            raise ValueError(f"median_side is {median_side}; expected a positive number of pixels")
        like = next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())
        blank = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
        training = self.training
        self.eval()
        try:
            with _recorded(self.model) as seen:
                self.model(pixel_values=blank)
            across, down = self.pyramid(seen, blank, None).strides()[0]
        finally:
            self.train(training)
        for head in self.heads:
            head.fit_anchors(median_side, math.sqrt(across * down))  # type: ignore[operator]

    def pyramid(self, seen: Mapping[str, Any], pixel_values: Tensor, pixel_mask: Tensor | None) -> Pyramid:
        """The encoder's output as feature maps, finer and coarser ones added; not detached.

        Args:
            seen: what the host's decoder was called with, and ``shapes``: height and width of each map.
            pixel_values, pixel_mask: as in `forward`.
        """
        memory: Tensor = seen["encoder_hidden_states"]
        mask = seen.get(self.family.mask)
        if pixel_mask is not None and mask is not None:
            memory = memory * mask[..., None].to(memory)  # what the encoder made of padding means nothing
        cells = [height * width for height, width in seen["shapes"]]
        maps = [
            part.transpose(1, 2).unflatten(-1, shape) for part, shape in zip(memory.split(cells, 1), seen["shapes"])
        ]
        for layer in self.finer:
            maps.insert(0, layer(maps[0]))
        maps.append(self.coarser(maps[-1]))
        batch, _, height, width = pixel_values.shape
        wide = torch.promote_types(memory.dtype, torch.float32)
        if pixel_mask is None or not self.family.masked:
            sizes = torch.tensor([width, height], dtype=wide, device=memory.device).repeat(batch, 1)
        else:
            sizes = torch.stack([pixel_mask[:, 0].sum(-1), pixel_mask[:, :, 0].sum(-1)], -1).to(memory.device, wide)
        return Pyramid(maps=maps, height=height, width=width, sizes=sizes)

    def _query_loss(
        self, number: int, seen: Mapping[str, Any], pyramid: Pyramid, assigned: Assigned, labels: Labels
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One head's positive queries through the decoder, and their loss in every layer."""
        queries = positive_queries(
            assigned,
            pyramid.sizes,
            generator=self._generator,
            max_positives=self.max_positives,
            use_zero_padding=self.use_zero_padding,
        )
        memory: Tensor = seen["encoder_hidden_states"]
        position, content = self.queries[number](queries.boxes.to(memory), queries.features)
        empty = queries.target == -2
        with _masked(self.model, empty, memory.dtype):
            logits, boxes = self.family.decode(self.model, seen, position, content, queries.boxes.to(memory))
        wide = torch.promote_types(memory.dtype, torch.float32)  # of a loss, under autocast as well
        logits, boxes = logits.to(wide), boxes.to(wide)
        ids = torch.cat([target["class_labels"] for target in labels]).to(logits.device)
        wanted = torch.cat([target["boxes"] for target in labels]).to(boxes)
        image, place = (queries.target >= 0).nonzero(as_tuple=True)
        which = queries.target[image, place]
        layers = torch.arange(len(logits), device=logits.device)
        matches = Matches(
            layers.repeat_interleave(len(which)), *(part.repeat(len(logits)) for part in (image, place, which))
        )
        count = _averaged(logits.new_tensor(float(len(which)))).clamp(min=1)
        own = torch.zeros_like(logits)
        own[matches.layer, matches.image, matches.query, ids[matches.object]] = 1
        c: Any = self.model.config
        weights = self.family.weights
        labelled = class_loss(logits[:, ~empty], own[:, ~empty], count, getattr(c, weights[0]))
        distance, apart = box_losses(boxes, matches, wanted, count)
        total = (labelled + getattr(c, weights[1]) * distance + getattr(c, weights[2]) * apart).sum()
        named: dict[str, Tensor] = {}
        for layer in range(len(logits)):
            suffix = "" if layer == len(logits) - 1 else f"_{layer}"
            named |= {f"loss_ce{suffix}": labelled[layer], f"loss_bbox{suffix}": distance[layer]}
            named[f"loss_giou{suffix}"] = apart[layer]
        return total, named

    def get_extra_state(self) -> Tensor:
        """The generator's state, so that a resumed training samples on where it stopped; safetensors keeps tensors."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """See `get_extra_state`."""
        self._generator.set_state(state.cpu())


def _twins(module: nn.Module) -> dict[str, str]:
    """Further names of weights that have several, each with the first."""
    first: dict[int, str] = {}
    names = {}
    for name, value in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        known = first.setdefault(id(value), name)
        if known != name:
            names[name] = known
    return names


def _without_twins(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in _twins(module):
        state.pop(prefix + name, None)


def _with_twins(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    for name, first in _twins(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


class _QueryEmbedding(nn.Module):
    """Boxes and features of priors to what a decoder takes: an embedding of the place, and a content."""

    def __init__(self, width: int, boxed: bool) -> None:
        super().__init__()
        # A decoder that embeds boxes itself only takes the content.
        out = width if boxed else 2 * width
        self.place = nn.Sequential(nn.Linear(2 * width, out), nn.LayerNorm(out))
        self.content = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.head = nn.Parameter(torch.empty(width))
        self.boxed = boxed

    def forward(self, boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.place(_sine(boxes.clamp(0, 1), self.head.shape[0] // 2))
        content = self.content(features)
        if self.boxed:
            return self.head.expand_as(content), embedded + content + self.head
        position, start = embedded.chunk(2, -1)
        return position + self.head, start + content


def _sine(boxes: Tensor, features: int) -> Tensor:
    """Sine embedding of four coordinates, one after another: (..., 4) to (..., 4 * features)."""
    wide = torch.promote_types(boxes.dtype, torch.float32)
    pair = torch.arange(features, device=boxes.device) // 2
    waves = boxes.to(wide)[..., None] * 2 * math.pi / 10000 ** (2 * pair.to(wide) / features)
    return torch.stack([waves[..., 0::2].sin(), waves[..., 1::2].cos()], -1).flatten(-3).to(boxes.dtype)


def _rescaled(width: int, finer: bool) -> nn.Sequential:
    """A map of twice or half the height and width."""
    conv = nn.ConvTranspose2d(width, width, 2, stride=2) if finer else nn.Conv2d(width, width, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, width), width))


def _logit(boxes: Tensor) -> Tensor:
    boxes = boxes.clamp(0, 1)
    return (boxes.clamp(min=EPSILON) / (1 - boxes).clamp(min=EPSILON)).log()


def _averaged(value: Tensor) -> Tensor:
    """The mean over the processes of a distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        return value / torch.distributed.get_world_size()
    return value


Decode = Callable[[Any, Mapping[str, Any], Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Family:
    """How a kind of host is spoken to.

    `decode` takes the host, what its decoder was called with, the queries' embeddings of place and content and their
    boxes, and returns (L, B, m, C) logits and (L, B, m, 4) boxes. `maps` names the config's number of feature maps,
    `mask` the decoder's argument that masks padding; `boxed`: its decoder embeds the boxes of queries itself; `masked`:
    its boxes are shares of the picture without padding; `weights`: names of focal alpha and the two box weights.
    """

    kind: str
    decode: Decode
    maps: str | None
    mask: str = "encoder_attention_mask"
    boxed: bool = False
    masked: bool = True
    weights: tuple[str, str, str] = ("focal_alpha", "bbox_loss_coefficient", "giou_loss_coefficient")


def _deformable(
    model: Any, seen: Mapping[str, Any], position: Tensor, content: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    start = boxes if model.config.two_stage else boxes[..., :2]
    kept = ("encoder_hidden_states", "encoder_attention_mask", "spatial_shapes", "spatial_shapes_list")
    out = model.model.decoder(
        inputs_embeds=content,
        object_queries_position_embeddings=position,
        reference_points=start,
        **{name: seen[name] for name in (*kept, "level_start_index", "valid_ratios")},
    )
    logits, found = [], []
    for layer in range(out.intermediate_hidden_states.shape[1]):
        hidden = out.intermediate_hidden_states[:, layer]
        before = start if layer == 0 else out.intermediate_reference_points[:, layer - 1]
        logits.append(model.class_embed[layer](hidden))
        found.append(_moved(before, model.bbox_embed[layer](hidden)))
    return torch.stack(logits), torch.stack(found)


def _conditional(
    model: Any, seen: Mapping[str, Any], position: Tensor, content: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    decoder = model.model.decoder
    centre = _logit(boxes[..., :2])
    # The decoder reads a query's place out of its embedding; here the place is known.
    known = decoder.ref_point_head.register_forward_hook(lambda *_: centre)
    try:
        out = decoder(
            inputs_embeds=content,
            attention_mask=None,
            object_queries_position_embeddings=position,
            **{
                name: seen[name]
                for name in ("spatial_position_embeddings", "encoder_hidden_states", "encoder_attention_mask")
            },
        )
    finally:
        known.remove()
    # The host reads its last layer after one more norm than the earlier ones.
    hidden = torch.cat([out.intermediate_hidden_states[:-1], out.last_hidden_state[None]])
    return model.class_labels_classifier(hidden), _moved(boxes[None, ..., :2], model.bbox_predictor(hidden))


def _dab(
    model: Any, seen: Mapping[str, Any], position: Tensor, content: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    out = model.model.decoder(
        inputs_embeds=content,
        query_position_embeddings=_logit(boxes),
        return_dict=True,
        **{name: seen[name] for name in ("encoder_hidden_states", "memory_key_padding_mask", "object_queries")},
    )
    hidden = out.intermediate_hidden_states
    return model.class_embed(hidden), _moved(out.reference_points, model.bbox_predictor(hidden))


def _rt(model: Any, seen: Mapping[str, Any], position: Tensor, content: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    kept = ("encoder_hidden_states", "spatial_shapes", "spatial_shapes_list", "level_start_index")
    out = model.model.decoder(
        inputs_embeds=content,
        encoder_attention_mask=None,
        reference_points=_logit(boxes),
        **{name: seen[name] for name in kept},
    )
    return out.intermediate_logits.transpose(0, 1), out.intermediate_reference_points.transpose(0, 1)


def _moved(reference: Tensor, change: Tensor) -> Tensor:
    """Boxes that start at references, which hold a centre or a whole box."""
    known = reference.shape[-1]
    start = _logit(reference).expand(*change.shape[:-1], known)
    return torch.cat([change[..., :known] + start, change[..., known:]], -1).sigmoid()


_FAMILIES = (
    _Family("deformable_detr", _deformable, "num_feature_levels"),
    _Family("conditional_detr", _conditional, None),
    _Family("dab-detr", _dab, None, mask="memory_key_padding_mask", boxed=True),
    *(
        _Family(
            kind,
            _rt,
            "num_feature_levels",
            boxed=True,
            masked=False,
            weights=("focal_loss_alpha", "weight_loss_bbox", "weight_loss_giou"),
        )
        for kind in ("rt_detr", "rt_detr_v2")
    ),
)
_WHY_NOT = {
    "detr": "its queries have no place to start from: a DETR's decoder knows neither reference points nor boxes",
    "d_fine": "its decoder refines distributions of edges, and positive queries would train only their means",
    "deimv2": "its decoder refines distributions of edges, and positive queries would train only their means",
    "lw_detr": "its decoder cuts the queries into groups in training, and positive queries are none",
    "rf_detr": "its decoder cuts the queries into groups in training, and positive queries are none",
}


def _family(model: "PreTrainedModel") -> _Family:
    kind = model.config.model_type
    for family in _FAMILIES:
        if family.kind == kind and hasattr(model, "model") and hasattr(model.model, "decoder"):
            return family
    known = ", ".join(family.kind for family in _FAMILIES)
    why = _WHY_NOT.get(kind, "expected a detection model of one of these families")
    raise UserError(f"CoDetr takes {known}, not {type(model).__name__} ({kind}): {why}")


@contextmanager
def _recorded(model: "PreTrainedModel") -> Iterator[dict[str, Any]]:
    """While the host runs once: what its decoder is called with, and the shapes of the maps behind it."""
    body: Any = model.model
    seen: dict[str, Any] = {}

    def decoder(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen.update(given)
        if "spatial_shapes_list" in given:
            seen["shapes"] = [tuple(shape) for shape in given["spatial_shapes_list"]]

    def projection(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        seen["shapes"] = [tuple(output.shape[-2:])]

    with ExitStack() as hooks:
        hooks.callback(body.decoder.register_forward_pre_hook(decoder, with_kwargs=True).remove)
        if hasattr(body, "input_projection"):
            hooks.callback(body.input_projection.register_forward_hook(projection).remove)
        yield seen


@contextmanager
def _masked(model: "PreTrainedModel", empty: Tensor, kind: torch.dtype) -> Iterator[None]:
    """Inside, no query of the decoder attends to the empty ones (B, m).

    Raises:
        ValueError: gradient checkpointing, which runs the layers again when the mask is gone.
    """
    if not bool(empty.any()):
        yield
        return
    if model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise ValueError(
            "masked queries do not go with gradient checkpointing; call model.gradient_checkpointing_disable(), or "
            "leave use_zero_padding off and give each picture more priors than positives"
        )
    # A finite minimum: an image without any real query attends to all of its empty ones alike.
    mask = torch.zeros(empty.shape, dtype=kind, device=empty.device).masked_fill(empty, torch.finfo(kind).min)
    mask = mask[:, None, None, :].expand(-1, 1, empty.shape[1], -1)

    def hide(mask: Tensor, _module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**given, "attention_mask": mask}

    body: Any = model.model
    with ExitStack() as hooks:
        for layer in body.decoder.layers:
            hooks.callback(layer.self_attn.register_forward_pre_hook(partial(hide, mask), with_kwargs=True).remove)
        yield
