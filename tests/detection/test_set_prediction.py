"""The same matchings and losses as transformers' own, layer by layer and group by group; gradients; bad targets."""

import pytest
import torch
from transformers import DeformableDetrConfig, DetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss, DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, HungarianMatcher
from transformers.loss.loss_for_object_detection import generalized_box_iou as reference_giou
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

from counterproof.detection.set_prediction import (
    Matches,
    SetLoss,
    box_losses,
    class_loss,
    corners,
    generalized_iou,
    match_cost,
    match_queries,
)


def predictions(layers=3, batch=4, queries=12, classes=5, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, batch, queries, classes, generator=generator, dtype=dtype)
    boxes = torch.rand(layers, batch, queries, 4, generator=generator, dtype=dtype) * 0.4 + 0.2
    return logits, boxes


def targets(sizes, classes=4, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 100)
    return [
        {
            "class_labels": torch.randint(classes, (size,), generator=generator),
            "boxes": torch.rand(size, 4, generator=generator, dtype=dtype) * 0.4 + 0.2,
        }
        for size in sizes
    ]


def as_pairs(matches, sizes, layer):
    starts = [sum(sizes[:image]) for image in range(len(sizes))]
    chosen = matches.of_layer(layer)
    return [
        sorted(
            (query, thing - starts[image])
            for where, query, thing in zip(chosen.image.tolist(), chosen.query.tolist(), chosen.object.tolist())
            if where == image
        )
        for image in range(len(sizes))
    ]


def theirs_as_pairs(pairs):
    return [sorted(zip(rows.tolist(), columns.tolist())) for rows, columns in pairs]


@pytest.mark.parametrize("sizes", [(3, 1, 5, 2), (0, 4, 0, 1), (15, 2, 1, 0)])
@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_matches_are_those_of_transformers(sizes, kind):
    logits, boxes = predictions()
    labels = targets(sizes)
    reference = (DeformableDetrHungarianMatcher if kind == "focal" else HungarianMatcher)(1.5, 4, 3)
    found = match_queries(logits, boxes, labels, class_cost=1.5, bbox_cost=4, giou_cost=3, classes=kind)
    for layer in range(len(logits)):
        expected = reference({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)
        assert as_pairs(found, sizes, layer) == theirs_as_pairs(expected)


def test_groups_are_matched_like_lw_detr():
    sizes = (3, 0, 5, 2)
    logits, boxes = predictions(queries=18)
    config = type("Config", (), {"class_cost": 2, "bbox_cost": 5, "giou_cost": 2})
    reference = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    found = match_queries(logits, boxes, targets(sizes), num_groups=3)
    for layer in range(len(logits)):
        expected = reference({"logits": logits[layer], "pred_boxes": boxes[layer]}, targets(sizes), 3)
        assert as_pairs(found, sizes, layer) == theirs_as_pairs(expected)


def test_the_cost_is_that_of_every_single_pair():
    logits, boxes = predictions(dtype=torch.float64)
    labels = targets((2, 3, 0, 1), dtype=torch.float64)
    cost = match_cost(logits, boxes, labels, class_cost=1, bbox_cost=2, giou_cost=3)
    assert cost.shape == (3, 4, 12, 3)
    for image, target in enumerate(labels):
        for number, (label, box) in enumerate(zip(target["class_labels"], target["boxes"])):
            p = logits[1, image, 7, label].sigmoid()
            focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            overlap = reference_giou(corners(boxes[1, image, 7])[None], corners(box)[None])[0, 0]
            expected = focal + 2 * (boxes[1, image, 7] - box).abs().sum() - 3 * overlap
            torch.testing.assert_close(cost[1, image, 7, number], expected)


@pytest.mark.parametrize("sizes", [(3, 1, 5, 2), (0, 4, 0, 1), (0, 0, 0, 0), (15, 2, 1, 0)])
@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_loss_parts_and_gradients_are_those_of_transformers(sizes, kind):
    labels = targets(sizes)
    config = (DeformableDetrConfig if kind == "focal" else DetrConfig)(
        num_labels=5 if kind == "focal" else 4, auxiliary_loss=True, decoder_layers=3
    )
    reference = DeformableDetrForObjectDetectionLoss if kind == "focal" else ForObjectDetectionLoss
    results = []
    for loss in (SetLoss(classes=kind), reference):
        logits, boxes = (part.requires_grad_() for part in predictions())
        value, parts, earlier = loss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)
        value.backward()
        results.append((value.detach(), parts, logits.grad, boxes.grad, earlier))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=1e-5, atol=1e-6)
    assert set(theirs[1]) - set(ours[1]) == {"cardinality_error", "cardinality_error_0", "cardinality_error_1"}
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[3], theirs[3], rtol=1e-5, atol=1e-7)
    assert len(ours[4]) == len(theirs[4]) == 2
    assert torch.equal(ours[4][1]["pred_boxes"], theirs[4][1]["pred_boxes"])


def test_the_last_layer_is_the_logits_and_not_what_is_listed_last():
    # DETR and Conditional DETR predict from the last layer normalised once more than the list of layers has it.
    logits, boxes = predictions()
    labels = targets((2, 1, 0, 3))
    config = DeformableDetrConfig(num_labels=5, auxiliary_loss=True, decoder_layers=3)
    last, box = logits[-1] * 1.7, boxes[-1] * 0.9
    ours = SetLoss()(last, labels, logits.device, box, config, logits, boxes)
    theirs = DeformableDetrForObjectDetectionLoss(last, labels, logits.device, box, config, logits, boxes)
    torch.testing.assert_close(ours[0], theirs[0])


def test_half_precision_parts_are_taken_as_they_come():
    logits, boxes = predictions()
    labels = targets((2, 1, 0, 3))
    config = DeformableDetrConfig(num_labels=5, auxiliary_loss=True, decoder_layers=3)
    half = logits.bfloat16().requires_grad_()
    loss = SetLoss()(half[-1], labels, logits.device, boxes[-1], config, half, boxes)[0]
    whole = SetLoss()(half[-1].float(), labels, logits.device, boxes[-1], config, half.float(), boxes)[0]
    torch.testing.assert_close(loss, whole)
    loss.backward()
    assert half.grad.isfinite().all()


def test_only_the_last_layer_counts_without_auxiliary_loss():
    logits, boxes = predictions()
    labels = targets((2, 1, 0, 3))
    config = DeformableDetrConfig(num_labels=5, auxiliary_loss=False, decoder_layers=3)
    ours = SetLoss()(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)
    theirs = DeformableDetrForObjectDetectionLoss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[2] is None


def test_the_loss_of_groups_is_the_mean_of_their_losses():
    logits, boxes = predictions(queries=12)
    labels = targets((3, 1, 0, 2))
    config = DeformableDetrConfig(num_labels=5, auxiliary_loss=True, decoder_layers=3)

    def loss(groups, part):
        s, b = logits[:, :, part], boxes[:, :, part]
        return SetLoss(groups)(s[-1], labels, s.device, b[-1], config, s, b)[0]

    apart = [loss(1, slice(start, start + 4)) for start in (0, 4, 8)]
    torch.testing.assert_close(loss(3, slice(None)), sum(apart) / 3)


def test_finite_differences_of_class_and_box_loss():
    logits, boxes = predictions(2, 1, 3, 2, dtype=torch.float64)
    wanted = torch.zeros_like(logits)
    wanted[:, 0, 1, 1] = 1
    wanted[0, 0, 1, 0] = 1
    matches = Matches(*(torch.tensor(v) for v in ([0, 1, 1], [0, 0, 0], [1, 0, 2], [0, 1, 0])))
    things = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.3
    count = torch.tensor([2.0, 3.0])
    assert torch.autograd.gradcheck(lambda x: class_loss(x, wanted, count), logits.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: torch.stack(box_losses(x, matches, things, count)), boxes.requires_grad_()
    )


def test_generalized_iou_against_transformers_and_by_hand():
    _, boxes = predictions()
    first, second = corners(boxes[0, 0]), corners(boxes[0, 1])
    torch.testing.assert_close(generalized_iou(first[:, None], second[None]), reference_giou(first, second))
    apart = generalized_iou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1]))
    assert apart.item() == pytest.approx(-1 / 3)


def test_a_prediction_that_is_not_finite_is_matched_last():
    logits, boxes = predictions(1, 1, 4)
    boxes[0, 0, 2] = float("nan")
    assert 2 not in match_queries(logits, boxes, targets((3,))).query.tolist()
    assert 2 in match_queries(logits, boxes, targets((4,))).query.tolist()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda labels: labels[:1], "1 images"),
        (lambda labels: [labels[0], {**labels[1], "class_labels": torch.tensor([5])}], r"labels\[1\]: classes 5 to 5"),
        (lambda labels: [labels[0], {**labels[1], "boxes": torch.rand(2, 4)}], r"labels\[1\].*\(2, 4\)"),
        (
            lambda labels: [labels[0], {**labels[1], "boxes": torch.tensor([[0.5, 0.5, 0.0, 0.1]])}],
            r"labels\[1\]: box 0",
        ),
        (
            lambda labels: [{**labels[0], "boxes": labels[0]["boxes"] * float("nan")}, labels[1]],
            r"labels\[0\]: box 0",
        ),
    ],
)
def test_bad_targets_are_named(change, says):
    logits, boxes = predictions(batch=2)
    config = DeformableDetrConfig(num_labels=5, auxiliary_loss=True, decoder_layers=3)
    with pytest.raises(ValueError, match=says):
        SetLoss()(logits[-1], change(targets((2, 1))), logits.device, boxes[-1], config, logits, boxes)
    with pytest.raises(ValueError, match="num_groups=5"):
        match_queries(logits, boxes, targets((2, 1)), num_groups=5)
