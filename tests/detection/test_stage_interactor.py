"""Labels across stages: against the definition in loops, by hand, and against transformers' loss; the claim's parts."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from counterproof.bench.task import Trial
from counterproof.detection.batches import Batches, Pixels, scene_data
from counterproof.detection.claims.stage_interactor import (
    CASCADE_MIXING,
    CLAIMS,
    CROSS_STAGE,
    MIXING,
    _disagreement,
    cross_stage,
    run_cross_stage,
)
from counterproof.detection.scenes import draw_scenes
from counterproof.detection.set_prediction import Matches, match_queries
from counterproof.detection.stage_interactor import (
    CrossStageLabelAssigner,
    CrossStageLoss,
    check_detector,
    matching_instability,
    orphaned_labels,
)
from counterproof.detection.task import DETECTION, Outcome
from counterproof.detection.tiny import tiny_detector
from counterproof.detection.training import Trainee
from counterproof.errors import UserError
from counterproof.page.catalogue import arms_of

OWN = CrossStageLabelAssigner(back=0, forward=0, own_threshold=0)
PAPER = CrossStageLabelAssigner()


def config(**changes):
    return DeformableDetrConfig(num_labels=5, auxiliary_loss=True, class_cost=1, bbox_cost=5, giou_cost=2, **changes)


def case(sizes=(3, 1, 5, 2), *, layers=4, queries=12, classes=5, seed=0, dtype=torch.float64):
    """Predictions that hover over the objects, so that matchings jump and many boxes fit; their targets and matches."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    labels = [
        {
            "class_labels": torch.randint(classes, (size,), generator=generator),
            "boxes": torch.cat([0.35 + 0.3 * random(size, 2), 0.3 + 0.2 * random(size, 2)], -1),
        }
        for size in sizes
    ]
    logits = torch.randn(layers, len(sizes), queries, classes, generator=generator, dtype=dtype)
    boxes = torch.cat(
        [0.35 + 0.3 * random(layers, len(sizes), queries, 2), 0.3 + 0.2 * random(layers, len(sizes), queries, 2)], -1
    )
    return logits, boxes, labels, match_queries(logits, boxes, labels)


def loss_of(loss, logits, boxes, labels, about=None):
    return loss(logits[-1], labels, logits.device, boxes[-1], about or config(), logits, boxes)


def iou(first, second):
    """Of two boxes as centre and size, in plain numbers."""
    sides = []
    for axis in (0, 1):
        low = max(first[axis] - first[axis + 2] / 2, second[axis] - second[axis + 2] / 2)
        high = min(first[axis] + first[axis + 2] / 2, second[axis] + second[axis + 2] / 2)
        sides.append(max(0.0, high - low))
    shared = sides[0] * sides[1]
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


def as_rows(matches):
    return list(zip(matches.layer.tolist(), matches.image.tolist(), matches.query.tolist(), matches.object.tolist()))


def everything(labels):
    return (
        torch.cat([target["class_labels"] for target in labels]).tolist(),
        torch.cat([target["boxes"] for target in labels]).tolist(),
    )


def by_definition(boxes, matches, labels, classes, back=1, forward=None, eta=0.5, own=None):
    targets = torch.zeros(*boxes.shape[:3], classes, dtype=boxes.dtype)
    ids, objects = everything(labels)
    for stage in range(len(boxes)):
        last = len(boxes) - 1 if forward is None else stage + forward
        for other, image, query, thing in as_rows(matches):
            if not stage - back <= other <= last:
                continue
            fits = iou(boxes[stage, image, query].tolist(), objects[thing])
            if fits >= (own if own is not None and other == stage else eta):
                targets[stage, image, query, ids[thing]] = 1
    return targets


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"back": 0},
        {"forward": 0},
        {"back": 2, "forward": 1, "iou_threshold": 0.3},
        {"own_threshold": 0.0},
        {"back": 9, "forward": 9, "iou_threshold": 0.0},
    ],
)
@pytest.mark.parametrize("sizes", [(3, 1, 5, 2), (0, 4, 0, 1), (15, 2, 0, 3)])
def test_labels_are_those_of_the_definition(settings, sizes):
    _, boxes, labels, matches = case(sizes)
    found = CrossStageLabelAssigner(**settings)(boxes, matches, labels, 5)
    names = {"iou_threshold": "eta", "own_threshold": "own"}
    expected = by_definition(boxes, matches, labels, 5, **{names.get(k, k): v for k, v in settings.items()})
    assert torch.equal(found, expected)
    assert found.dtype == boxes.dtype
    assert found.sum() > 0


@pytest.mark.parametrize("own", [{"own_threshold": 0}, {"iou_threshold": 0}])
@pytest.mark.parametrize("sizes", [(3, 1, 5, 2), (0, 4, 0, 1), (0, 0, 0, 0)])
def test_alone_and_with_class_weight_1_it_is_the_loss_of_transformers(own, sizes):
    results = []
    one_to_one = CrossStageLoss(CrossStageLabelAssigner(back=0, forward=0, **own), class_weight=1.0)
    for loss in (one_to_one, DeformableDetrForObjectDetectionLoss):
        logits, boxes, labels, matches = case(sizes, dtype=torch.float32)
        logits.requires_grad_()
        boxes.requires_grad_()
        value, parts, earlier = loss_of(loss, logits, boxes, labels)
        value.backward()
        results.append((value.detach(), parts, logits.grad, boxes.grad, earlier))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[3], theirs[3], rtol=1e-5, atol=1e-7)
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=1e-5, atol=1e-6)
    assert len(ours[4]) == len(theirs[4]) == 3
    expected = torch.zeros_like(logits)
    for layer, image, query, thing in as_rows(matches):
        expected[layer, image, query, everything(labels)[0][thing]] = 1
    assert torch.equal(OWN(boxes, matches, labels, 5), expected)


def test_the_same_outputs_in_all_stages_give_the_same_labels_the_own_ones_that_fit():
    logits, boxes, labels, _ = case()
    logits, boxes = logits[:1].expand(4, -1, -1, -1), boxes[:1].expand(4, -1, -1, -1)
    matches = match_queries(logits, boxes, labels)
    found = PAPER(boxes, matches, labels, 5)
    assert all(torch.equal(found[0], found[stage]) for stage in range(1, 4))
    assert torch.equal(found, CrossStageLabelAssigner(back=0, forward=0)(boxes, matches, labels, 5))
    assert 0 < found.sum() < len(matches)


def matched(*rows):
    return Matches(*(torch.tensor(column) for column in zip(*rows)))


def shifted(box, overlap):
    """A box moved to the right until its IoU with `box` is `overlap`."""
    x, y, width, height = box
    return [x + width * (1 - overlap) / (1 + overlap), y, width, height]


def test_one_object_whose_query_changes():
    """Queries 0, 1, 1 own it in stages 0, 1, 2; query 1's box of stage 0 fits by .6, its own one by .7."""
    box = [0.4, 0.5, 0.3, 0.3]
    labels = [{"class_labels": torch.tensor([2]), "boxes": torch.tensor([box])}]
    matches = matched((0, 0, 0, 0), (1, 0, 1, 0), (2, 0, 1, 0))
    boxes = torch.tensor([0.9, 0.9, 0.1, 0.1]).repeat(3, 1, 2, 1)
    boxes[0, 0, 0] = torch.tensor(shifted(box, 0.7))
    boxes[0, 0, 1] = torch.tensor(shifted(box, 0.6))
    boxes[2, 0, 0] = torch.tensor(box)  # two stages after query 0 owned the object

    def labelled(threshold):
        return {
            (stage, query)
            for stage, _, query, label in CrossStageLabelAssigner(iou_threshold=threshold)(boxes, matches, labels, 3)
            .nonzero()
            .tolist()
            if label == 2
        }

    assert labelled(0.5) == {(0, 0), (0, 1)}
    assert labelled(0.61) == {(0, 0)}
    assert labelled(0.71) == set()
    assert CrossStageLabelAssigner(back=2)(boxes, matches, labels, 3)[2, 0, 0, 2] == 1


def test_a_threshold_that_is_just_reached_counts():
    """Half of a box is an IoU of .5 to the bit; boxes apart overlap by 0, which keeps an own label at 0."""
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}]
    matches = matched((0, 0, 0, 0))
    half, apart = torch.tensor([[[[0.5, 0.5, 0.5, 0.25]]]]), torch.tensor([[[[0.1, 0.1, 0.1, 0.1]]]])
    assert PAPER(half, matches, labels, 1).item() == 1
    assert OWN(apart, matches, labels, 1).item() == 1


def test_a_query_of_two_objects_has_two_classes_or_the_same_one_once():
    near = [[0.4, 0.5, 0.3, 0.3], [0.42, 0.5, 0.3, 0.3]]
    boxes = torch.tensor(near[0]).expand(2, 1, 3, 4)
    matches = matched((0, 0, 1, 0), (1, 0, 1, 1))
    for classes, row in (([0, 2], [1, 0, 1]), ([2, 2], [0, 0, 1])):
        labels = [{"class_labels": torch.tensor(classes), "boxes": torch.tensor(near)}]
        found = PAPER(boxes, matches, labels, 3)
        assert found[0, 0].tolist() == found[1, 0].tolist() == [[0, 0, 0], row, [0, 0, 0]]


def test_thresholds_only_take_labels_away_and_stages_only_add_some():
    _, boxes, labels, matches = case()
    loose, strict = (CrossStageLabelAssigner(iou_threshold=eta)(boxes, matches, labels, 5) for eta in (0.4, 0.6))
    assert torch.all(strict <= loose)
    assert strict.sum() < loose.sum()
    widths = [(0, 0), (1, 0), (1, 1), (1, None), (3, None)]
    sums = []
    for (back, forward), (more_back, more_forward) in itertools.pairwise(widths):
        few = CrossStageLabelAssigner(back, forward)(boxes, matches, labels, 5)
        many = CrossStageLabelAssigner(more_back, more_forward)(boxes, matches, labels, 5)
        assert torch.all(few <= many)
        sums += [int(few.sum()), int(many.sum())]
    assert sums[0] < sums[1] < sums[3] < sums[5]


def test_labels_go_with_their_query():
    logits, boxes, labels, matches = case()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved = match_queries(logits[:, :, order], boxes[:, :, order], labels)
    assert torch.equal(PAPER(boxes[:, :, order], moved, labels, 5), PAPER(boxes, matches, labels, 5)[:, :, order])


def test_boxes_learn_from_the_stage_alone_and_labels_pass_no_gradient():
    logits, boxes, labels, matches = case()
    boxes.requires_grad_()
    assert not PAPER(boxes, matches, labels, 5).requires_grad
    losses = [loss_of(CrossStageLoss(assigner), logits, boxes, labels)[1] for assigner in (OWN, PAPER)]
    for name in losses[0]:
        same = torch.equal(losses[0][name], losses[1][name])
        assert same == ("ce" not in name)
    class_only = CrossStageLoss(PAPER, box_weight=0.0, giou_weight=0.0)
    value = loss_of(class_only, logits.requires_grad_(), boxes, labels)[0]
    value.backward()
    assert not boxes.grad.any()
    assert logits.grad.any()


@pytest.mark.parametrize("sizes", [(3, 1, 5, 2), (15, 2, 0, 30), (0, 0, 0, 0)])
@pytest.mark.parametrize("assigner", [PAPER, CrossStageLabelAssigner(iou_threshold=0.95), OWN])
def test_the_loss_is_its_formula(sizes, assigner):
    """Focal loss of every (query, class) over max(labels, own matches, 1); boxes over max(own matches, 1)."""
    logits, boxes, labels, matches = case(sizes)
    targets = by_definition(boxes, matches, labels, 5, assigner.back, assigner.forward, 0.5, assigner.own_threshold)
    if assigner.iou_threshold != 0.5:
        targets = by_definition(boxes, matches, labels, 5, eta=assigner.iou_threshold)
    own = sum(min(size, 12) for size in sizes)
    objects = everything(labels)[1]
    p = logits.sigmoid()
    focal = torch.where(targets > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    total, counts = 0.0, []
    for stage in range(4):
        counts.append(max(float(targets[stage].sum()), own, 1))
        total += 2.0 * float(focal[stage].sum()) / counts[-1]
        for _, image, query, thing in filter(lambda row: row[0] == stage, as_rows(matches)):
            box = boxes[stage, image, query].tolist()
            total += 5.0 * sum(abs(a - b) for a, b in zip(box, objects[thing])) / max(own, 1)
            total += 2.0 * (1 - giou(box, objects[thing])) / max(own, 1)
    value, parts, _ = loss_of(CrossStageLoss(assigner), logits, boxes, labels)
    assert float(value) == pytest.approx(total, rel=1e-6)
    assert float(parts["loss_ce_1"]) == pytest.approx(float(focal[1].sum()) / counts[1], rel=1e-6)
    if assigner == PAPER and sum(sizes):
        assert max(counts) > own, "no stage with more labels than matches: the case shows nothing"


def giou(first, second):
    width, height = (
        max(first[axis] + first[axis + 2] / 2, second[axis] + second[axis + 2] / 2)
        - min(first[axis] - first[axis + 2] / 2, second[axis] - second[axis + 2] / 2)
        for axis in (0, 1)
    )
    found = iou(first, second)
    union = (first[2] * first[3] + second[2] * second[3]) / (1 + found)
    return found - (width * height - union) / (width * height)


def test_counts_are_averaged_over_processes(monkeypatch):
    logits, boxes, labels, _ = case()
    alone = loss_of(CrossStageLoss(OWN), logits, boxes, labels)[0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.mul_(4))
    together = loss_of(CrossStageLoss(OWN), logits, boxes, labels)[0]
    assert float(together) == pytest.approx(float(alone) / 2)


def test_the_warm_up_lets_own_labels_go_little_by_little():
    logits, boxes, labels, matches = case()
    logits.requires_grad_()
    loss = CrossStageLoss(PAPER, warmup=4)
    for step in range(6):
        own = 0.5 * min(1, step / 4)
        expected = CrossStageLoss(replace(PAPER, own_threshold=own))
        with torch.no_grad():  # measuring counts no step
            assert loss_of(loss, logits, boxes, labels)[0] == loss_of(expected, logits, boxes, labels)[0]
        loss_of(loss, logits, boxes, labels)
        assert loss.step == step + 1
    kept = by_definition(boxes, matches, labels, 5, own=0.0)
    assert kept.sum() > by_definition(boxes, matches, labels, 5).sum()
    start = loss_of(CrossStageLoss(PAPER, warmup=4), logits, boxes, labels)[1]["loss_ce"]
    by_hand = loss_of(CrossStageLoss(CrossStageLabelAssigner(own_threshold=0)), logits, boxes, labels)[1]["loss_ce"]
    assert torch.equal(start, by_hand)


def pictures(number=2):
    values = torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.4, 0.4, 0.3, 0.3], [0.6, 0.5, 0.4, 0.4]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])},
    ]
    return {"pixel_values": values, "pixel_mask": torch.ones(number, 32, 32, dtype=torch.int64), "labels": labels}


@pytest.mark.parametrize("family", ["deformable", "conditional", "dab"])
def test_it_trains_the_sigmoid_families_and_leaves_them_as_they_were(family):
    batch = pictures()
    model = tiny_detector(family, decoder_layers=3, num_queries=9)
    plain = copy.deepcopy(model)
    trainee = cross_stage(model, median_side=10.0)
    found = trainee.module(**batch)
    found.loss.backward()
    assert {"loss_ce", "loss_ce_0", "loss_ce_1", "loss_giou_1"} <= set(found.loss_dict)
    assert len(found.auxiliary_outputs) == 2
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "class" in name)
    finished = trainee.finish()
    assert finished is model
    assert type(finished.loss_function) is type(plain.loss_function)
    assert torch.equal(finished(**batch).loss, plain(**batch).loss)
    assert finished.state_dict().keys() == plain.state_dict().keys()


def test_a_softmax_over_classes_is_refused():
    model = tiny_detector("detr", decoder_layers=2)
    model.loss_function = CrossStageLoss(PAPER)
    with pytest.raises(ValueError, match=r"detr has a softmax over 3 classes.*Conditional, DAB or Deformable"):
        model(**pictures())


def test_without_the_other_layers_the_error_says_what_to_set():
    model = tiny_detector("deformable", decoder_layers=2, auxiliary_loss=False)
    model.loss_function = CrossStageLoss(PAPER)
    with pytest.raises(ValueError, match=r"set model\.config\.auxiliary_loss = True"):
        model(**pictures())
    model.config.auxiliary_loss = True
    assert model(**pictures()).loss.isfinite()


def test_a_detector_that_will_not_do_is_refused_before_training():
    with pytest.raises(UserError, match=r"detr has no sigmoid.*Conditional, DAB or Deformable"):
        cross_stage(tiny_detector("detr"), median_side=10.0)
    model = tiny_detector("dab", auxiliary_loss=False)
    with pytest.raises(UserError, match=r"set model\.config\.auxiliary_loss = True"):
        check_detector(model)
    model.config.auxiliary_loss = True
    check_detector(model)


def test_a_trained_conditional_detr_learns_from_what_it_predicts():
    """It lists its last layer with one normalisation less, which shows once the norm has learnt."""
    model = tiny_detector("conditional", channels=(8, 16), width=32, num_queries=6)
    with torch.no_grad():
        model.model.decoder.layernorm.weight.mul_(1.5)
    seen = {}

    def spy(logits, labels, device, boxes, config, *stages):
        seen.update(logits=logits, last=stages[0][-1])
        return CrossStageLoss(PAPER)(logits, labels, device, boxes, config, *stages)

    model.loss_function = spy
    batch = pictures()
    out = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
    assert not torch.allclose(seen["logits"], seen["last"])
    model.loss_function = lambda logits, labels, device, boxes, config, scores, places: CrossStageLoss(PAPER)(
        logits, labels, device, boxes, config,
        torch.cat([scores[:-1], logits[None]]), torch.cat([places[:-1], boxes[None]]),
    )  # fmt: skip
    told = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
    torch.testing.assert_close(out.loss, told.loss)


def test_outputs_with_the_pictures_first_are_refused():
    backbone = transformers.ConvNextConfig(
        num_stages=3, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], out_features=["stage1", "stage2", "stage3"]
    )
    about = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 32],
        feat_strides=[4, 8, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=5,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        num_denoising=0,
        num_labels=3,
        auxiliary_loss=True,
    )
    model = transformers.RTDetrForObjectDetection(about)
    model.loss_function = CrossStageLoss(PAPER)
    batch = pictures()
    with pytest.raises(ValueError, match=r"rt_detr gives the loss class outputs of shape \(2, 2, 5, 3\)"):
        model(pixel_values=batch["pixel_values"], labels=batch["labels"])


def test_numbers_that_are_not_finite_end_in_a_loss_that_is_not():
    logits, boxes, labels, _ = case()
    logits[:, 1] = float("nan")
    assert not loss_of(CrossStageLoss(PAPER), logits, boxes, labels)[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_stay_and_the_dtype_is_kept(dtype):
    logits, boxes, labels, _ = case(dtype=torch.float32)
    boxes = boxes.to(dtype)
    matches = match_queries(logits, boxes, labels)
    given = copy.deepcopy((boxes, matches, labels))
    assert PAPER(boxes, matches, labels, 5).dtype == dtype
    assert torch.equal(given[0], boxes)
    assert torch.equal(given[1].query, matches.query)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(given[2], labels))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"back": -1}, "back=-1"),
        ({"forward": -2}, "forward=-2"),
        ({"iou_threshold": 1.5}, "iou_threshold=1.5"),
        ({"own_threshold": float("nan")}, "own_threshold=nan"),
    ],
)
def test_bad_settings_are_quoted(settings, says):
    with pytest.raises(ValueError, match=says):
        CrossStageLabelAssigner(**settings)


def test_bad_boxes_and_targets_are_quoted():
    _, boxes, labels, matches = case()
    with pytest.raises(ValueError, match=r"\(4, 12, 4\)"):
        PAPER(boxes[0], matches, labels, 5)
    with pytest.raises(ValueError, match="the model has 2"):
        PAPER(boxes, matches, labels, 2)


def test_instability_counts_objects_whose_query_changes():
    """Object 0: 3, 3, 5; object 1: 4, 6, and none in stage 2: three changes of four."""
    rows = [(0, 0, 3, 0), (0, 0, 4, 1), (1, 0, 3, 0), (1, 0, 6, 1), (2, 0, 5, 0)]
    assert matching_instability(matched(*rows)) == pytest.approx(3 / 4)
    assert matching_instability(matched(*rows[:2], (1, 0, 3, 0), (1, 0, 4, 1))) == 0.0
    logits, boxes, _, _ = case()
    nothing = match_queries(logits, boxes, [{"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)}] * 4)
    assert matching_instability(nothing) != matching_instability(nothing)


@pytest.mark.parametrize("assigner", [OWN, PAPER, CrossStageLabelAssigner(back=9)])
def test_orphans_are_counted_as_defined_and_vanish_when_all_stages_are_seen(assigner):
    _, boxes, labels, matches = case((5, 4, 6, 3))
    targets = assigner(boxes, matches, labels, 5)
    objects = everything(labels)[1]
    orphans = background = 0
    for stage, image, query in itertools.product(range(4), range(4), range(12)):
        if targets[stage, image, query].any():
            continue
        background += 1
        orphans += any(
            iou(boxes[stage, image, query].tolist(), objects[thing]) >= 0.5
            for other, where, who, thing in as_rows(matches)
            if other != stage and (where, who) == (image, query)
        )
    assert orphaned_labels(targets, boxes, matches, labels) == pytest.approx(orphans / background)
    assert (orphans > 0) == (assigner.back < 9)
    assert orphans >= 20 or assigner != OWN


# The claims.

TINY = dict(
    side=32,
    scenes=24,
    evaluated=12,
    width=32,
    decoder_layers=3,
    queries=8,
    channels=(8, 16),
    steps=2,
    batch=4,
    warmup=1,
    looks=(1.0,),
)


def trial(seed=1000, **settings):
    budget = CROSS_STAGE.budgets["quick"].settings
    return Trial(seed=seed, settings={**budget, **CLAIMS[0].settings, **TINY, **settings})


def arms():
    return [*arms_of(CROSS_STAGE).values(), *arms_of(CASCADE_MIXING).values()]


@pytest.mark.parametrize("arm", arms(), ids=lambda arm: arm.name)
def test_every_arm_gives_the_metrics_of_the_task(arm):
    settings = {"levels": MIXING["levels"]} if arm.name.startswith("mixing") else {}
    found = run_cross_stage(arm, trial(**settings))
    assert set(found) == set(CROSS_STAGE.metrics)
    assert all(0 <= found[name] <= 1 for name in ("ap", "instability", "orphaned"))
    assert found["instability"] > 0


def test_arms_see_the_same_start_and_the_own_labels_are_the_plain_ones_up_to_weights():
    """Before a step is taken every arm has the same matchings; only the labels differ."""
    frozen = dict(steps=1, learning_rate=0.0)
    by_name = {arm.name: arm for arm in arms()}
    found = {
        name: run_cross_stage(by_name[name], trial(**frozen))
        for name in ("baseline", "own-labels", "filter-only", "stage-interactor")
    }
    assert len({(run["ap"], run["instability"]) for run in found.values()}) == 1
    assert found["baseline"]["orphaned"] == found["own-labels"]["orphaned"]


class Hovering(torch.nn.Module):
    """A detector of three stages whose boxes lie about the objects; the same for a picture in any batch."""

    def stages(self, pixel_values, labels):
        logits, boxes = [], []
        for picture, target in zip(pixel_values, labels):
            generator = torch.Generator().manual_seed(int(picture.abs().sum() * 1000) % 2**31)
            noise = torch.randn(3, 8, 4, generator=generator) * 0.03
            around = target["boxes"][torch.arange(8) % len(target["boxes"])]
            boxes.append((around + noise).clamp(0.01, 0.99))
            logits.append(torch.randn(3, 8, 3, generator=generator))
        return torch.stack(logits, 1), torch.stack(boxes, 1)

    def forward(self, pixel_values, pixel_mask, labels):
        logits, boxes = self.stages(pixel_values, labels)
        self.loss_function(logits[-1], labels, logits.device, boxes[-1], None, logits, boxes)


def test_the_claims_measures_are_those_of_all_held_out_pictures_at_once():
    held_out = scene_data(draw_scenes(40, np.random.default_rng(0), objects=(2, 6), overlap=0.5))  # 32 and 8 of them
    detector = Hovering()
    batch = Batches(held_out, 40, Pixels(), seed=0, flips=False)[0]
    logits, boxes = detector.stages(batch["pixel_values"], batch["labels"])
    matches = match_queries(logits, boxes, batch["labels"])
    for arm in arms_of(CROSS_STAGE).values():
        assigner = CrossStageLabelAssigner(**arm.settings)
        orphaned = orphaned_labels(assigner(boxes, matches, batch["labels"], 3), boxes, matches, batch["labels"])
        trainee = Trainee(detector, detector, lambda: detector)
        measured = _disagreement(arm, Outcome({}, trainee, held_out, Pixels()), "cpu")
        assert measured["instability"] == pytest.approx(matching_instability(matches))
        assert measured["orphaned"] == pytest.approx(orphaned)
        assert orphaned > 0
        assert measured["instability"] > 0.1


def test_the_main_arm_is_the_papers_and_known_to_the_rooms_own_task():
    arm = arms_of(DETECTION)["stage-interactor"]
    trainee = arm.load()(tiny_detector(), median_side=10.0, **arm.settings)
    assert trainee.module.loss_function == CrossStageLoss(CrossStageLabelAssigner())
    assert set(arms_of(CROSS_STAGE)) == {"baseline", "own-labels", "filter-only", "stage-interactor"}
    assert (CLAIMS[0].metric, CLAIMS[0].baseline.name, CLAIMS[0].method) == ("ap", "own-labels", arm)
