"""Tiny detectors of transformers' own DETR classes, built from a config, that learn from scratch.

A DETR built naively from a small config never learns, for reasons that are traps rather than capacity: transformers
freezes every parameter of a ResNet backbone built from a config, draws all weights and the object queries from
N(0, 0.02), and has neither the prior of the focal loss nor boxes that start at their reference. `tiny_detector` avoids
the first, `initialize` mends the others. The classes are transformers' own throughout, so what works on these models
works on a checkpoint of the same family.
"""

import math
from typing import TYPE_CHECKING, Any

from counterproof.errors import extra

with extra("detection"):
    import torch
    from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TINY_FAMILIES", "initialize", "tiny_detector"]

TINY_FAMILIES = ("deformable", "conditional", "dab", "detr")
PRIOR = 0.01  # of a class at a query, from the focal loss's paper
START = -1.2  # logit of a box's sides at the start: 0.23 of the picture


def tiny_detector(
    family: str = "deformable",
    *,
    num_labels: int = 3,
    width: int = 64,
    encoder_layers: int = 1,
    decoder_layers: int = 2,
    num_queries: int = 16,
    levels: int = 1,
    channels: tuple[int, ...] = (24, 48),
    seed: int = 0,
    **config: Any,
) -> "PreTrainedModel":
    """A small DETR with a small ConvNeXt backbone, random weights, ready to be trained from scratch.

    Args:
        family: ``"deformable"`` (with box refinement; much the fastest to learn), ``"conditional"``, ``"dab"`` or
            ``"detr"``.
        num_labels: classes.
        width: d of encoder and decoder; for ``"deformable"`` a multiple of 32.
        encoder_layers, decoder_layers, num_queries: as they say.
        levels: feature maps that a deformable encoder reads, the coarsest ones of the backbone.
        channels: of the backbone's stages; the first has stride 4, each further one doubles it.
        seed: of the weights; the global generator is left as it was.
        config: more fields of the family's config, over the ones chosen here.

    Returns:
        the model in train mode, float32, all parameters trainable, dropout 0, losses of all decoder layers on.

    Raises:
        ValueError: an unknown family, or more levels than stages.
    """
    import transformers

    if family not in TINY_FAMILIES:
        raise ValueError(f"family {family!r} is none of {', '.join(TINY_FAMILIES)}")
    if not 1 <= levels <= len(channels):
        raise ValueError(f"levels={levels}; the backbone has {len(channels)} stages")
    stages = [f"stage{number}" for number in range(len(channels) - levels + 1, len(channels) + 1)]
    convnext: Any = transformers.ConvNextConfig  # whose annotations lack out_features
    backbone = convnext(
        num_channels=3,
        patch_size=4,
        num_stages=len(channels),
        hidden_sizes=list(channels),
        depths=[1] * len(channels),
        out_features=stages if family == "deformable" else stages[-1:],
    )
    size = "hidden_size" if family == "dab" else "d_model"
    common = {
        "backbone_config": backbone,
        "num_labels": num_labels,
        size: width,
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * width,
        "decoder_ffn_dim": 2 * width,
        "num_queries": num_queries,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "auxiliary_loss": True,
    }
    if family == "deformable":
        common |= {"num_feature_levels": levels, "with_box_refine": True}
    names = {"deformable": "DeformableDetr", "conditional": "ConditionalDetr", "dab": "DabDetr", "detr": "Detr"}
    config_class = getattr(transformers, f"{names[family]}Config")
    model_class = getattr(transformers, f"{names[family]}ForObjectDetection")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config_class(**(common | config)))
        initialize(model)
    return model.train()


def initialize(model: "PreTrainedModel") -> None:
    """Draw the weights of a DETR anew, as the papers' own code does and a model built from a config does not.

    Xavier in encoder and decoder (sampling offsets and attention weights of deformable attention stay), object queries
    from N(0, 1), class bias at the focal prior of 0.01, box heads that start at their reference with sides of 0.23 of
    the picture, reference points of Deformable DETR on a grid. The backbone stays. Uses torch's global generator.

    Args:
        model: a DETR, Conditional DETR, DAB-DETR or Deformable DETR of transformers.
    """
    body: Any = model.model
    for part in (body.encoder, body.decoder):
        for name, parameter in part.named_parameters():
            kept = ("sampling_offsets", "attention_weights", "bbox_embed", "class_embed")
            if parameter.dim() > 1 and not any(word in name for word in kept):
                nn.init.xavier_uniform_(parameter)
    kind = model.config.model_type
    absolute = kind in ("detr", "conditional_detr") or not getattr(model.config, "with_box_refine", True)
    whole: Any = model
    boxes = list(whole.bbox_embed) if hasattr(model, "bbox_embed") else [whole.bbox_predictor]
    for number, head in enumerate(boxes):
        *inner, last = head.layers
        for linear in inner:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # A refining head adds to the box before it: only the first one says how large a box starts.
        if absolute or (number == 0 and kind == "deformable_detr"):
            with torch.no_grad():
                last.bias[2:] = START
    classes: Any = whole.class_embed if hasattr(model, "class_embed") else whole.class_labels_classifier
    for head in classes if isinstance(classes, nn.ModuleList) else [classes]:
        nn.init.xavier_uniform_(head.weight)  # type: ignore[arg-type]
        nn.init.constant_(head.bias, 0.0 if kind == "detr" else -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
    if kind == "dab-detr":
        with torch.no_grad():
            body.query_refpoint_embeddings.weight[:, :2] = torch.logit(_grid(model.config.num_queries))
            body.query_refpoint_embeddings.weight[:, 2:] = START
    elif not getattr(model.config, "two_stage", False):
        nn.init.normal_(body.query_position_embeddings.weight)
        if kind == "deformable_detr":
            _spread(body.reference_points, body.query_position_embeddings.weight)


def _spread(reference: nn.Linear, queries: torch.Tensor) -> None:
    """Reference points on a grid: two dimensions of the query hold the logits of a place, which `reference` reads."""
    with torch.no_grad():
        reference.weight.zero_()
        reference.bias.zero_()
        reference.weight[0, 0] = reference.weight[1, 1] = 1.0
        queries[:, :2] = torch.logit(_grid(len(queries))).to(queries)


def _grid(number: int) -> torch.Tensor:
    """(number, 2) places in the unit square, x and y, in rows of equal distance."""
    columns = math.ceil(math.sqrt(number))
    places = torch.arange(number)
    return torch.stack(
        [(places % columns + 0.5) / columns, (places // columns + 0.5) / math.ceil(number / columns)], -1
    )
