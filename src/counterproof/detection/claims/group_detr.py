"""Claims of "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment" (arXiv 2207.13085)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Claim, Task
from counterproof.detection.task import BASELINE, DETECTION, DETECTION_BY_TIME

if TYPE_CHECKING:
    from counterproof.detection.training import Trainee

HERE = "counterproof.detection.claims.group_detr"


def grouped(model: Any, *, median_side: float, **settings: Any) -> "Trainee":
    """A detector with groups; `settings` are those of `GroupDetr`."""
    from counterproof.detection.group_detr import GroupDetr
    from counterproof.detection.training import Trainee

    GroupDetr(**settings).apply(model, _generator())
    return Trainee(model, model, lambda: GroupDetr.strip(model))


def one_group(model: Any, *, median_side: float) -> "Trainee":
    """The detector as it is, with the loss code that groups have: transformers' value in less time."""
    from counterproof.detection.set_prediction import SetLoss
    from counterproof.detection.training import Trainee

    model.loss_function = SetLoss(classes="softmax" if model.config.model_type == "detr" else "focal")

    def finish() -> Any:
        del model._loss_function  # what the setter left: the class's own loss counts again
        return model

    return Trainee(model, model, finish)


def more_queries(model: Any, *, median_side: float, num_groups: int) -> "Trainee":
    """As many queries as all groups have, as one set: trained and used as DETR does, one to one."""
    from counterproof.detection.training import Trainee

    _widen(model, num_groups)
    return Trainee(model, model, lambda: model)


def one_to_many(model: Any, *, median_side: float, num_groups: int) -> "Trainee":
    """As many queries as all groups have, as one set, and every object to as many of them as there are groups.

    One matching with copies of each object; read without suppression of duplicates, as DETR is.
    """
    from counterproof.detection.training import Trainee

    _widen(model, num_groups)
    own = model.loss_function

    def loss(logits: Any, labels: Sequence[Mapping[str, Any]], *rest: Any, **more: Any) -> Any:
        copies = [
            {
                "class_labels": target["class_labels"].repeat(num_groups),
                "boxes": target["boxes"].repeat(num_groups, 1),
            }
            for target in labels
        ]
        return own(logits, copies, *rest, **more)

    model.loss_function = loss

    def finish() -> Any:
        del model._loss_function
        return model

    return Trainee(model, model, finish)


def _widen(model: Any, num_groups: int) -> None:
    """Give a detector the queries that `GroupDetr` draws, all of one set and for good."""
    from torch import nn

    from counterproof.detection.group_detr import GroupDetr

    body = model.model
    name = next(name for name in ("query_position_embeddings", "query_refpoint_embeddings") if hasattr(body, name))
    GroupDetr(num_groups).apply(model, _generator())
    rows = getattr(body.train(), name).weight.detach().clone()
    GroupDetr.strip(model)
    setattr(body, name, nn.Embedding.from_pretrained(rows, freeze=False))
    model.config.num_queries = len(rows)


def _generator() -> Any:
    """The same draws in every arm of a trial's seed; the global generator is read, not moved."""
    import torch

    return torch.Generator().manual_seed(torch.initial_seed())


GROUPED = Arm("group-detr", f"{HERE}:grouped", {"num_groups": 3})
ONE_GROUP = Arm("one-group", f"{HERE}:one_group")
MORE_QUERIES = Arm("more-queries", f"{HERE}:more_queries", {"num_groups": 3})
ONE_TO_MANY = Arm("one-to-many", f"{HERE}:one_to_many", {"num_groups": 3})

REPORTED = (
    "COCO val, ResNet-50, 12 epochs, 11 groups: Conditional DETR 32.6 (unverified) -> 37.6 AP; DAB-DETR 35.2 -> 39.1 "
    "(unverified)"
)


def _claim(
    name: str,
    says: str,
    *,
    reported: str,
    baseline: Arm = BASELINE,
    method: Arm = GROUPED,
    metric: str = "ap",
    task: Task = DETECTION,
) -> Claim:
    return Claim(
        paper="group-detr",
        name=name,
        says=says,
        task=task,
        baseline=baseline,
        method=method,
        metric=metric,
        better="higher",
        smallest=0.01,
        reported=reported,
    )


CLAIMS = (
    _claim("main", "after equally many steps, three groups of queries in training give more AP", reported=REPORTED),
    _claim(
        "curve",
        "three groups of queries in training give more AP on the way, averaged over four looks",
        reported=REPORTED,
        metric="ap_curve",
    ),
    _claim(
        "equal-compute",
        "after equal processor time, three groups of queries in training give more AP",
        reported="not reported: the paper counts epochs, and its decoder is a small part of the cost",
        baseline=ONE_GROUP,
        task=DETECTION_BY_TIME,
    ),
    _claim(
        "apart",
        "groups that are kept apart give more AP than as many queries in one set, each object given to three of them",
        reported="the paper's reason for groups: one-to-many within one set needs suppression of duplicates",
        baseline=ONE_TO_MANY,
    ),
    _claim(
        "one-to-many",
        "one query for each object gives more AP than one-to-many assignment within one set of queries",
        reported="the paper's reason for groups: one-to-many within one set needs suppression of duplicates",
        baseline=ONE_TO_MANY,
        method=BASELINE,
    ),
    _claim(
        "more-queries",
        "three groups of queries in training give more AP than three times as many queries in training and in use",
        reported="not reported in what was read; the paper's gain is said to come from supervision, not from queries",
        baseline=MORE_QUERIES,
    ),
)
