"""Group DETR: train a DETR with K groups of queries, each matched one-to-one, and keep the first group.

Paper: arXiv 2207.13085.
Read beside: Atten4Vis/ConditionalDETR, branch GroupDETR (the reference); Atten4Vis/LW-DETR; transformers 5.23,
    loss/loss_lw_detr.py.
Deviations: extra groups are drawn from the distribution of the model's own queries, which for the reference's N(0, 1)
    is the same; the weights of matching and loss are those of the model's config (the reference weighs the class loss
    2, transformers 1); no two-stage models, which would need an encoder head for each group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from counterproof.assign import group_assignment
from counterproof.detection.set_prediction import SetLoss
from counterproof.errors import UserError, extra

with extra("detection"):
    import torch
    from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["GroupDetr", "block_diagonal_mask", "group_match", "group_merge", "group_split"]

Init = Literal["resample", "jitter"]
Model = TypeVar("Model", bound=nn.Module)

# Where the models keep their learned queries.
QUERIES = {
    "DetrForObjectDetection": "query_position_embeddings",
    "ConditionalDetrForObjectDetection": "query_position_embeddings",
    "DabDetrForObjectDetection": "query_refpoint_embeddings",
    "DeformableDetrForObjectDetection": "query_position_embeddings",
}
BUILT_IN = ("LwDetr", "RfDetr")
FROM_ENCODER = ("RTDetr", "DFine", "Deimv2")
JITTER = 0.1  # of the queries' own standard deviation


def group_split(x: Tensor, num_groups: int) -> Tensor:
    """Move groups to the batch: what attends within a row of the batch then stays within a group.

    Args:
        x: (B, K*N, ...), the groups one after another: group g has rows ``g*N`` to ``(g+1)*N - 1``.
        num_groups: K.

    Returns:
        (B*K, N, ...); group g of image b stands at ``b*K + g``, so labels are to be repeated image by image. A view
        where the memory of `x` allows one.

    Raises:
        ValueError: rows that cannot be cut into K equal groups.
    """
    size, rest = divmod(x.shape[1], num_groups)
    if rest:
        raise ValueError(f"{x.shape[1]} rows cannot be cut into num_groups={num_groups} equal groups")
    return x.reshape(x.shape[0] * num_groups, size, *x.shape[2:])


def group_merge(x: Tensor, num_groups: int) -> Tensor:
    """The inverse of `group_split`: (B*K, N, ...) to (B, K*N, ...).

    Raises:
        ValueError: a first dimension that K does not divide.
    """
    batch, rest = divmod(x.shape[0], num_groups)
    if rest:
        raise ValueError(f"a batch of {x.shape[0]} does not hold num_groups={num_groups} groups of each image")
    return x.reshape(batch, num_groups * x.shape[1], *x.shape[2:])


def group_match(cost: Tensor, num_groups: int, sizes: Sequence[int] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Match each group's queries one-to-one with all objects of the image.

    Args:
        cost: (B, K*N, T) of every query with every object of its own image.
        num_groups: K.
        sizes: T_b, the objects of each image; columns from T_b on are padding. None: all T.

    Returns:
        for each image ``(queries, objects)``, int64 of length ``K * min(N, T_b)`` on the cost's device, queries
        ascending and counted over all groups. Costs that are not finite are matched only when nothing else is left.

    Raises:
        ValueError: a cost of other than three dimensions, rows that cannot be cut into K equal groups, sizes that do
            not fit.
    """
    if cost.dim() != 3:
        raise ValueError(f"cost has {cost.dim()} dimensions; expected (images, queries, objects)")
    pairs: Any = group_assignment(cost, num_groups, sizes=sizes, on_invalid="last")
    return pairs  # type: ignore[no-any-return]


def block_diagonal_mask(num_groups: int, num_queries: int, device: torch.device | str | None = None) -> Tensor:
    """Which query may attend to which: (K*N, K*N) booleans, True within a group.

    For a decoder that takes a mask. `group_split` gives the same attention for K*N^2 instead of (K*N)^2 products.
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(num_queries)
    return group[:, None] == group[None]


@dataclass(frozen=True)
class GroupDetr:
    """Group DETR for a detector of transformers: DETR, Conditional DETR, DAB-DETR or one-stage Deformable DETR.

    In train mode K*N queries run through the decoder, self-attention stays within a group of N, each group is matched
    to all objects for itself, and the loss is the mean over the groups. In eval mode, and for good after `strip`, the
    model is the plain one with the N queries of the first group. Modules, config and the names of all parameters stay;
    one parameter of (K-1)*N rows comes along. Its state dict is that of the plain model and this parameter, so a
    checkpoint saved without `strip` loads into the plain class as well, which reports ``extra_groups`` as unexpected.

    Args:
        num_groups: K; 1 leaves a model as it is. The paper takes 11.
        init: how the extra groups start. ``"resample"``: drawn, column by column, from a normal distribution with mean
            and deviation of the model's own queries (training from scratch). ``"jitter"``: copies with noise of a tenth
            of that deviation (for a detector that is trained already).

    Raises:
        ValueError: `num_groups` below 1, an unknown `init`.

    Example:
        >>> model = GroupDetr(num_groups=11).apply(model)  # before the optimizer is made
        >>> model.train()(pixel_values=pixels, labels=labels).loss.backward()
        >>> GroupDetr.strip(model).save_pretrained("detector")
    """

    num_groups: int = 11
    init: Init = "resample"

    def __post_init__(self) -> None:
        if isinstance(self.num_groups, bool) or not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise ValueError(f"num_groups is {self.num_groups!r}; expected a whole number, at least 1")
        if self.init not in ("resample", "jitter"):
            raise ValueError(f"init is {self.init!r}; expected 'resample' or 'jitter'")

    def apply(self, model: Model, generator: torch.Generator | None = None) -> Model:
        """Give a model its groups, in place. A model that has them already is left as it is.

        Apply before making the optimizer and before wrapping the model (DistributedDataParallel, accelerate): the
        extra groups are a parameter. The first group stays the parameter it was.

        The model's loss is replaced in train mode by `counterproof.detection.SetLoss` with K groups, when it is one of
        transformers' own (or a `SetLoss`): the same value without their cost, which grows with the square of K. Any
        other ``model.loss_function`` is called on predictions with the groups in the batch (B*K, N, ...) and each
        image's labels K times; it must be a mean over objects to stay one over groups. Eval mode has the model's own.

        Args:
            model: one of the four families, in any mode, dtype and on any device.
            generator: draws the extra groups; None is torch's default generator.

        Returns:
            the model.

        Raises:
            UserError: a model of another class or with queries that are not learned, one with another number of
                groups, or one whose queries are all alike, from which no different groups can be drawn.
        """
        body, name = _place(model)
        queries = getattr(body, name)
        if isinstance(queries, _GroupQueries):
            if queries.num_groups != self.num_groups:
                raise UserError(
                    f"this model has {queries.num_groups} groups, not num_groups={self.num_groups}; take them off "
                    "with GroupDetr.strip first"
                )
            return model
        if self.num_groups == 1:
            return model
        grouped = _GroupQueries(queries, _drawn(queries.weight, self.num_groups - 1, self.init, generator))
        for layer in body.decoder.layers:
            apart = _Apart(self.num_groups, grouped.num_embeddings)
            grouped.handles += [
                layer.self_attn.register_forward_pre_hook(apart.split, with_kwargs=True),
                layer.self_attn.register_forward_hook(apart.merge),
            ]
        setattr(body, name, grouped)
        own: Any = model
        own.loss_function = _GroupLoss(
            self.num_groups, grouped.num_embeddings, own.loss_function, "_loss_function" in vars(model)
        )
        return model

    @staticmethod
    def strip(model: Model) -> Model:
        """Take the groups off again, in place: the plain model with the first group's queries and its own loss.

        A model without groups is left as it is. A ``loss_function`` that was set after `apply` stays.

        Returns:
            the model.

        Raises:
            UserError: a model that cannot have groups.
        """
        body, name = _place(model)
        queries = getattr(body, name)
        if not isinstance(queries, _GroupQueries):
            return model
        for handle in queries.handles:
            handle.remove()
        setattr(body, name, queries.plain())
        loss = vars(model).get("_loss_function")
        if isinstance(loss, _GroupLoss):
            del model._loss_function
            if loss.was_set:
                own: Any = model
                own.loss_function = loss.own
        return model


def _place(model: nn.Module) -> tuple[Any, str]:
    """The part of a model that holds its queries, and under which name.

    Raises:
        UserError: a model whose queries are not learned, or of another class.
    """
    kinds = [kind.__name__ for kind in type(model).__mro__]
    kind = kinds[0]
    config: Any = getattr(model, "config", None)
    name = next((QUERIES[kind] for kind in kinds if kind in QUERIES), None)
    if name is None:
        if kind.startswith(BUILT_IN):
            raise UserError(f"{kind} has groups built in: set config.group_detr; GroupDetr is for models without")
        if kind.startswith(FROM_ENCODER):
            raise UserError(
                f"{kind} chooses its queries among the encoder's tokens; groups of them would need an encoder head "
                "each. GroupDetr is for learned queries"
            )
        raise UserError(f"GroupDetr fits {', '.join(QUERIES)} of transformers, not wrapped; got {kind}")
    if getattr(config, "two_stage", False):
        raise UserError(
            f"this {kind} is two-stage: it chooses its queries among the encoder's tokens, and groups of them would "
            "need an encoder head each. Use config.two_stage=False"
        )
    if getattr(config, "num_patterns", 0):
        raise UserError(f"this {kind} has {config.num_patterns} patterns, which count its queries; use num_patterns=0")
    return model.model, name


def _drawn(first: Tensor, groups: int, init: Init, generator: torch.Generator | None) -> Tensor:
    """(groups*N, d) queries like those of the first group (N, d), but others."""
    wide = first.detach().to(torch.promote_types(first.dtype, torch.float32))
    spread = wide.std(0, correction=0)
    if not bool((spread > 0).any()):
        raise UserError(
            "the queries of this model are all alike: groups drawn like them would be one and the same for ever; draw "
            "its queries anew, e.g. from N(0, 1)"
        )
    device = wide.device if generator is None else generator.device
    shape = (groups * len(first), first.shape[1])
    noise = torch.randn(shape, generator=generator, dtype=wide.dtype, device=device).to(wide.device)
    if init == "jitter":
        return (wide.repeat(groups, 1) + JITTER * spread * noise).to(first.dtype)
    return (wide.mean(0) + spread * noise).to(first.dtype)


class _GroupQueries(nn.Embedding):
    """The learned queries, in place of the model's: all groups in train mode, the first in eval mode.

    The models read ``.weight`` only. The parameter of that name stays the first group's, so that optimizers, averages
    and checkpoints see the plain model and one parameter more.
    """

    def __init__(self, first: nn.Embedding, extra_groups: Tensor) -> None:
        super().__init__(first.num_embeddings, first.embedding_dim, _weight=first.weight)
        own: Any = first.weight
        self.register_parameter("weight", own)  # the parameter itself, not the copy that was just made
        self.extra_groups = nn.Parameter(extra_groups, requires_grad=first.weight.requires_grad)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.train(first.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        first: Any = super().__getattr__("weight")  # the parameter, which this property hides
        return torch.cat([first, self.extra_groups]) if self.training else first

    @property
    def num_groups(self) -> int:
        return 1 + len(self.extra_groups) // self.num_embeddings

    def plain(self) -> nn.Embedding:
        """An ordinary embedding of the first group's parameter."""
        first: Any = super().__getattr__("weight")
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=first)
        embedding.weight = first
        return embedding.train(self.training)


class _Apart:
    """Hooks around a self-attention: groups to the batch, and back.

    Whether there are groups is seen from the number of queries, not from a module's mode: parts of a model may be in
    another mode than the queries.
    """

    def __init__(self, num_groups: int, num_queries: int) -> None:
        self.num_groups = num_groups
        self.rows = num_groups * num_queries
        self.split_now = False  # what `split` did, for `merge`, which cannot see it

    def split(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.split_now = hidden.shape[1] == self.rows
        if not self.split_now:
            return None
        if kwargs.get("attention_mask") is not None:
            raise ValueError("decoder_attention_mask cannot be used in training with groups")
        return tuple(self._moved(value) for value in args), {name: self._moved(value) for name, value in kwargs.items()}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == self.rows:
            return group_split(value, self.num_groups)
        return value

    def merge(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        return (group_merge(output[0], self.num_groups), *output[1:]) if self.split_now else None


@dataclass(frozen=True)
class _GroupLoss:
    """A model's loss function while it has groups; `own` is what it had, `was_set` whether by hand."""

    num_groups: int
    num_queries: int
    own: Callable[..., Any]
    was_set: bool

    def __call__(
        self,
        logits: Tensor,
        labels: Sequence[dict[str, Tensor]],
        device: torch.device,
        pred_boxes: Tensor,
        config: "PreTrainedConfig",
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        **more: Any,
    ) -> Any:
        layers = (outputs_class, outputs_coord)
        if logits.shape[1] != self.num_groups * self.num_queries:
            return self.own(logits, labels, device, pred_boxes, config, *layers, **more)
        loss = _of_groups(self.own, self.num_groups)
        if loss is not None:
            return loss(logits, labels, device, pred_boxes, config, *layers, **more)
        if len(labels) != len(logits):
            raise ValueError(f"labels are for {len(labels)} images, the batch has {len(logits)}")
        repeated = [target for target in labels for _ in range(self.num_groups)]
        logits, pred_boxes = group_split(logits, self.num_groups), group_split(pred_boxes, self.num_groups)
        moved = [
            None if x is None else torch.stack([group_split(layer, self.num_groups) for layer in x]) for x in layers
        ]
        total, parts, earlier = self.own(logits, repeated, device, pred_boxes, config, *moved, **more)
        if earlier is not None:
            earlier = [{name: group_merge(x, self.num_groups) for name, x in layer.items()} for layer in earlier]
        return total, parts, earlier


def _of_groups(own: Callable[..., Any], num_groups: int) -> SetLoss | None:
    """The same loss for groups, where we have it."""
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    if own is DeformableDetrForObjectDetectionLoss:
        return SetLoss(num_groups, "focal")
    if own is ForObjectDetectionLoss:
        return SetLoss(num_groups, "softmax")
    if isinstance(own, SetLoss) and own.num_groups == 1:
        return SetLoss(num_groups, own.classes)
    return None
