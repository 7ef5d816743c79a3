"""Anchors, box coding, and the two heads' targets and losses, against loops written from the definitions."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_for_object_detection import generalized_box_iou, sigmoid_focal_loss

from counterproof.assign import box_iou
from counterproof.detection.dense_heads import (
    STDS,
    AtssHead,
    FasterRcnnHead,
    Objects,
    Pyramid,
    anchor_boxes,
    decode_boxes,
    encode_boxes,
)
from counterproof.detection.regions import roi_align

SIZES = [[64.0, 48.0], [40.0, 48.0], [64.0, 30.0]]


def make_pyramid(width=32, sizes=SIZES, levels=((6, 8), (3, 4)), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(len(sizes), width, *shape, generator=generator, dtype=dtype) for shape in levels]
    return Pyramid(maps=maps, height=48, width=64, sizes=torch.tensor(sizes, dtype=dtype))


def make_objects(counts=(3, 0, 2), seed=0, sizes=SIZES):
    """Objects that lie on their pictures, in shares, as a DETR is given them."""
    generator = torch.Generator().manual_seed(seed + 7)
    labels = []
    for count in counts:
        centre = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 0.5 + 0.25
        size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 0.2 + 0.25
        classes = torch.randint(3, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([centre, size], -1)})
    return Objects.of(labels, torch.tensor(sizes, dtype=torch.float64))


def built(head, width=32, levels=2, seed=0):
    head.build(width, levels, torch.Generator().manual_seed(seed))
    return head.double()


def test_objects_are_placed_on_the_picture_without_its_padding():
    labels = [{"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 1.0]])}]
    objects = Objects.of(labels, torch.tensor([[40.0, 30.0]]))
    assert objects.boxes.tolist() == [[10.0, 0.0, 30.0, 30.0]]
    assert objects.counts == (1,)


def test_anchors_stand_in_the_middle_of_their_cells():
    pyramid = make_pyramid()
    boxes, numbers = anchor_boxes(pyramid, 2.0, ratios=(0.5, 2.0), octaves=(1.0, 1.5))
    assert numbers == [6 * 8 * 4, 3 * 4 * 4]
    expected = []
    for height, width, stride in ((6, 8, 8), (3, 4, 16)):
        for row in range(height):
            for column in range(width):
                for ratio in (0.5, 2.0):
                    for octave in (1.0, 1.5):
                        area = (2.0 * stride * octave) ** 2
                        high, wide = math.sqrt(area * ratio), math.sqrt(area / ratio)
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        expected.append([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2])
    torch.testing.assert_close(boxes, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_boxes_survive_encoding_and_decoding():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 50, 2, generator=generator, dtype=torch.float64) * 40
    priors, boxes = torch.cat([low, low + 1 + torch.rand(2, 50, 2, generator=generator) * 30], -1)
    for stds in ((1.0, 1.0, 1.0, 1.0), STDS):
        torch.testing.assert_close(decode_boxes(priors, encode_boxes(priors, boxes, stds), stds), boxes)
    # By hand: prior 10 x 20 at (5, 10), box 20 x 20 at (10, 10): half a side to the right, twice as wide.
    deltas = encode_boxes(torch.tensor([0.0, 0.0, 10.0, 20.0]), torch.tensor([0.0, 0.0, 20.0, 20.0]), STDS)
    torch.testing.assert_close(deltas, torch.tensor([5.0, 0.0, math.log(2) / 0.2, 0.0]))


def test_a_side_changes_by_a_factor_of_62_5_at_the_most():
    prior = torch.tensor([0.0, 0.0, 16.0, 16.0], dtype=torch.float64)
    grown = decode_boxes(prior, torch.tensor([0.0, 0.0, 50.0, -50.0], dtype=torch.float64))
    torch.testing.assert_close(grown[2] - grown[0], torch.tensor(1000.0, dtype=torch.float64))
    torch.testing.assert_close(grown[3] - grown[1], torch.tensor(16 / 62.5, dtype=torch.float64))


def slow_atss(priors, numbers, boxes, topk):
    """ATSS from its definition, for one image; priors that stand in the padding are not given."""
    result = [-1] * len(priors)
    best = [0.0] * len(priors)
    centres = (priors[:, :2] + priors[:, 2:]) / 2
    for number, box in enumerate(boxes):
        candidates, start = [], 0
        for count in numbers:
            distances = ((centres[start : start + count] - (box[:2] + box[2:]) / 2) ** 2).sum(-1).tolist()
            ranked = sorted(range(count), key=lambda place, d=distances: (d[place], place))
            candidates += [start + place for place in ranked[:topk]]
            start += count
        overlaps = torch.stack([box_iou(priors[place][None], box[None])[0, 0] for place in candidates])
        limit = overlaps.mean() + (overlaps.std() if len(overlaps) > 1 else 0.0)
        for place, overlap in zip(candidates, overlaps):
            x, y = centres[place].tolist()
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if overlap >= limit and inside and overlap > best[place]:
                result[place], best[place] = number, float(overlap)
    return result


def test_atss_targets_are_those_of_the_definition():
    head = built(AtssHead(3, anchor_scale=1.75))
    pyramid, objects = make_pyramid(), make_objects((3, 0, 2))
    _, assigned = head(pyramid, objects)
    priors, numbers = anchor_boxes(pyramid, 1.75)
    assert torch.equal(assigned.priors, priors.expand(3, -1, -1))
    starts = [0, 3, 3]
    positives = 0
    for image, boxes in enumerate(objects.split()):
        width, height = SIZES[image]
        centre = (priors[:, :2] + priors[:, 2:]) / 2
        real = [x < width and y < height for x, y in centre.tolist()]
        level = [sum(real[: numbers[0]]), sum(real[numbers[0] :])]
        found = slow_atss(priors[torch.tensor(real)], level, boxes, 9)
        expected = torch.full((len(priors),), -2)
        expected[torch.tensor(real)] = torch.tensor([place if place < 0 else place + starts[image] for place in found])
        assert assigned.target[image].tolist() == expected.tolist()
        positives += int((expected >= 0).sum())
    assert positives >= 5  # every object has one at least
    features = torch.cat([level.flatten(2).transpose(1, 2) for level in pyramid.maps], 1)
    assert torch.equal(assigned.features, features)


def test_atss_losses_are_those_of_a_loop(monkeypatch):
    head = built(AtssHead(3, anchor_scale=1.75))
    pyramid, objects = make_pyramid(), make_objects((3, 0, 2))
    generator = torch.Generator().manual_seed(1)
    cells = 60
    logits = torch.randn(3, cells, 3, generator=generator, dtype=torch.float64)
    deltas = torch.randn(3, cells, 4, generator=generator, dtype=torch.float64)
    centerness = torch.randn(3, cells, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(head, "_outputs", lambda _: (logits, deltas, centerness))
    losses, assigned = head(pyramid, objects)
    classes = boxes = centres = quality_sum = torch.zeros((), dtype=torch.float64)
    count = 0
    for image in range(3):
        count += max(1, int((assigned.target[image] >= 0).sum()))
        for cell, which in enumerate(assigned.target[image].tolist()):
            if which == -2:
                continue
            target = torch.zeros(1, 3, dtype=torch.float64)
            if which >= 0:
                target[0, objects.classes[which]] = 1
                x, y = ((assigned.priors[image, cell, :2] + assigned.priors[image, cell, 2:]) / 2).tolist()
                x1, y1, x2, y2 = objects.boxes[which].tolist()
                horizontal = min(x - x1, x2 - x) / max(x - x1, x2 - x)
                vertical = min(y - y1, y2 - y) / max(y - y1, y2 - y)
                quality = math.sqrt(horizontal * vertical)
                moved = decode_boxes(assigned.priors[image, cell], deltas[image, cell], STDS)
                overlap = generalized_box_iou(moved[None], objects.boxes[which][None])[0, 0]
                boxes = boxes + quality * (1 - overlap)
                quality_sum = quality_sum + quality
                wanted = torch.tensor(quality, dtype=torch.float64)
                centres = centres + F.binary_cross_entropy_with_logits(centerness[image, cell], wanted)
            classes = classes + sigmoid_focal_loss(logits[image, cell][None], target, 1) * 3  # a mean over classes
    torch.testing.assert_close(losses["class"], classes / count)
    torch.testing.assert_close(losses["box"], 2 * boxes / max(1.0, float(quality_sum)))
    torch.testing.assert_close(losses["centerness"], centres / count)


def test_a_head_that_is_right_loses_nothing_on_boxes(monkeypatch):
    head = built(AtssHead(3, anchor_scale=1.75))
    pyramid, objects = make_pyramid(), make_objects((3, 0, 2))
    _, assigned = head(pyramid, objects)
    deltas = torch.zeros(3, 60, 4, dtype=torch.float64)
    positive = assigned.target >= 0
    deltas[positive] = encode_boxes(assigned.priors[positive], objects.boxes[assigned.target[positive]], STDS)
    logits = torch.full((3, 60, 3), -30.0, dtype=torch.float64)
    logits[(*positive.nonzero(as_tuple=True), objects.classes[assigned.target[positive]])] = 30.0
    monkeypatch.setattr(head, "_outputs", lambda _: (logits, deltas, torch.zeros(3, 60, dtype=torch.float64)))
    losses, _ = head(pyramid, objects)
    assert losses["box"].item() == pytest.approx(0, abs=1e-9)
    assert losses["class"].item() == pytest.approx(0, abs=1e-9)
    found = head.detect(pyramid)
    for image, boxes in enumerate(objects.split()):
        sure = found[image]["scores"] > 0.4
        assert int(sure.sum()) == len(boxes)
        torch.testing.assert_close(
            found[image]["boxes"][sure].sort(0).values, boxes.sort(0).values, rtol=1e-6, atol=1e-6
        )
    labels = found[0]["labels"][found[0]["scores"] > 0.4]
    assert sorted(labels.tolist()) == sorted(objects.classes[:3].tolist())


def test_no_object_at_all_is_only_background():
    pyramid = make_pyramid()
    for head in (AtssHead(3, anchor_scale=1.75), FasterRcnnHead(3, pool=2, hidden=8, anchor_scale=1.4)):
        losses, assigned = built(head)(pyramid, make_objects((0, 0, 0)), torch.Generator().manual_seed(0))
        assert all(loss.isfinite() for loss in losses.values())
        assert not (assigned.target >= 0).any()
        sum(losses.values()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def rcnn(**settings):
    return built(FasterRcnnHead(3, **({"pool": 3, "hidden": 16, "anchor_scale": 1.4} | settings)))


def test_proposals_are_the_best_anchors_of_each_map_after_suppression():
    head = rcnn(before=80, proposals=60)
    pyramid = make_pyramid()
    priors, numbers = head._priors(pyramid)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, len(priors), generator=generator, dtype=torch.float64)
    deltas = torch.randn(3, len(priors), 4, generator=generator, dtype=torch.float64) * 0.3
    centre = (priors[:, :2] + priors[:, 2:]) / 2
    real = (centre[None] < pyramid.sizes[:, None]).all(-1)
    found = head._proposals(pyramid, priors, numbers, real, scores, deltas, 80)
    for image in range(3):
        width, height = SIZES[image]
        kept = []
        for start, end in ((0, numbers[0]), (numbers[0], len(priors))):
            places = [place for place in range(start, end) if real[image, place]]
            places = sorted(places, key=lambda place: -scores[image, place])[:80]
            mine = []
            for place in places:
                box = decode_boxes(priors[place], deltas[image, place])
                box = torch.stack(
                    [box[0].clamp(0, width), box[1].clamp(0, height), box[2].clamp(0, width), box[3].clamp(0, height)]
                )
                if box[2] <= box[0] or box[3] <= box[1]:
                    continue
                if not mine or box_iou(box[None], torch.stack([other for _, other in mine])).max() <= 0.7:
                    mine.append((scores[image, place], box))
            kept += mine
        kept = sorted(kept, key=lambda pair: -pair[0])[:60]
        torch.testing.assert_close(found[image], torch.stack([box for _, box in kept]))
        assert not found[image].requires_grad


def test_the_first_stage_learns_a_sample_of_half_positives_at_the_most(monkeypatch):
    head = rcnn(rpn_samples=8, anchor_scale=3.4)  # too large: some objects only have their best anchor
    pyramid, objects = make_pyramid(), make_objects((3, 0, 2))
    priors, _ = head._priors(pyramid)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, len(priors), generator=generator, dtype=torch.float64)
    deltas = torch.randn(3, len(priors), 4, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(head, "_anchors", lambda _: (scores, deltas))
    drawn = []
    from counterproof.detection import dense_heads

    sample = dense_heads._sample

    def watched(target, number, share, generator):
        places = sample(target, number, share, generator)
        drawn.append((target, places))
        return places

    monkeypatch.setattr(dense_heads, "_sample", watched)
    losses, _ = head(pyramid, objects, torch.Generator().manual_seed(0))
    asked = off = torch.zeros((), dtype=torch.float64)
    count = 0
    for image, (target, places) in enumerate(drawn[:3]):
        positive = target[places] >= 0
        assert len(places) == 8
        assert len(set(places.tolist())) == 8
        assert positive.sum() == min(4, int((target >= 0).sum()))
        assert positive.tolist() == sorted(positive.tolist(), reverse=True)  # positives first
        overlap = box_iou(priors, objects.split()[image]) if objects.counts[image] else None
        if overlap is not None:
            on = ((priors[:, :2] + priors[:, 2:]) / 2 < pyramid.sizes[image]).all(-1)
            for own in range(objects.counts[image]):
                best = overlap[on, own].max()
                if best >= 0.3:  # then its best anchor is some object's, whatever the threshold
                    assert (target[on][overlap[on, own] == best] >= 0).all()
        for place in places.tolist():
            count += 1
            wanted = torch.tensor(float(target[place] >= 0), dtype=torch.float64)
            asked = asked + F.binary_cross_entropy_with_logits(scores[image, place], wanted)
            if target[place] >= 0:
                own = int(target[place]) - sum(objects.counts[:image])
                # Above .7, or the best anchor there is for some object of at least .3.
                best = overlap[:, own].max()
                assert overlap[place, own] >= 0.7 or (overlap[place, own] == best and best >= 0.3)
                off = (
                    off + (deltas[image, place] - encode_boxes(priors[place], objects.boxes[target[place]])).abs().sum()
                )
            elif overlap is not None:
                assert overlap[place].max() < 0.3
    torch.testing.assert_close(losses["rpn_class"], asked / count)
    torch.testing.assert_close(losses["rpn_box"], off / count)


def test_regions_and_their_losses_are_those_of_a_loop():
    head = rcnn(samples=12, proposals=30)
    with torch.no_grad():
        for parameter in head.parameters():  # at the start all deltas are nearly 0, and a wrong class would not show
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.05)
    pyramid, objects = make_pyramid(), make_objects((3, 0, 2))
    losses, assigned = head(pyramid, objects, torch.Generator().manual_seed(0))
    starts = [0, 3, 3]
    asked = apart = torch.zeros((), dtype=torch.float64)
    count = 0
    for image, own in enumerate(objects.split()):
        for place, which in enumerate(assigned.target[image].tolist()):
            if which == -2:
                continue
            count += 1
            box = assigned.priors[image, place]
            overlaps = box_iou(box[None], own)[0] if len(own) else torch.zeros(1)
            assert (overlaps.max() >= 0.5) == (which >= 0)
            if which >= 0:
                assert int(overlaps.argmax()) + starts[image] == which
            cut = roi_align(pyramid.maps[0], box[None] / 8, torch.tensor([image]), size=3)
            torch.testing.assert_close(assigned.features[image, place], cut.mean((2, 3))[0])
            hidden = head.shared(cut.flatten(1))
            target = torch.tensor([objects.classes[which] if which >= 0 else 3])
            asked = asked + F.cross_entropy(head.class_output(hidden), target)
            if which >= 0:
                deltas = head.box_output(hidden).view(3, 4)[target[0]]
                moved = decode_boxes(box, deltas, STDS)
                apart = apart + 1 - generalized_box_iou(moved[None], objects.boxes[which][None])[0, 0]
        positives = int((assigned.target[image] >= 0).sum())
        assert positives <= 3  # a quarter of 12
        assert positives >= (1 if len(own) else 0)  # objects are regions of their own
        assert assigned.target[image].tolist()[:positives] == [w for w in assigned.target[image].tolist() if w >= 0]
    torch.testing.assert_close(losses["class"], asked / count)
    torch.testing.assert_close(losses["box"], 10 * apart / count)


def test_objects_are_regions_of_their_own():
    head = rcnn(samples=64)
    objects = make_objects((3, 0, 2))
    _, assigned = head(make_pyramid(), objects, torch.Generator().manual_seed(0))
    for image, boxes in enumerate(objects.split()):
        for box in boxes:
            assert (assigned.priors[image] == box).all(-1).any()


def test_large_regions_are_read_from_coarse_maps():
    head = built(FasterRcnnHead(3, pool=2, hidden=8), levels=4)
    levels = ((240, 320), (120, 160), (60, 80), (30, 40))
    maps = [torch.full((1, 1, *shape), float(number), dtype=torch.float64) for number, shape in enumerate(levels)]
    pyramid = Pyramid(maps=maps, height=1920, width=2560, sizes=torch.tensor([[2560.0, 1920.0]], dtype=torch.float64))
    sides = torch.tensor([20.0, 111.0, 223.0, 225.0, 447.0, 449.0, 1800.0], dtype=torch.float64)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], -1)
    read = head._cut(pyramid, boxes, torch.zeros(7, dtype=torch.int64))
    # Stride 8, finest 112: below 224 the first map, below 448 the second, then the third; never the coarsest.
    assert read.mean((1, 2, 3)).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_the_second_stages_detections_are_moved_cut_and_suppressed_class_by_class(monkeypatch):
    head = rcnn()
    pyramid = make_pyramid(sizes=[[60.0, 48.0]])
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(25, 2, generator=generator, dtype=torch.float64) * 30
    regions = torch.cat([low, low + 10 + torch.rand(25, 2, generator=generator, dtype=torch.float64) * 20], -1)
    logits = torch.randn(25, 4, generator=generator, dtype=torch.float64) * 2
    deltas = torch.randn(25, 3, 4, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(head, "_proposals", lambda *_: [regions])
    monkeypatch.setattr(head, "_classified", lambda _: (logits, deltas))
    (found,) = head.detect(pyramid, threshold=0.4, keep=1000)
    scores = logits.softmax(-1)
    pairs = sorted(((region, label) for region in range(25) for label in range(3)), key=lambda pair: -scores[pair])
    kept = []
    for region, label in pairs:
        box = decode_boxes(regions[region], deltas[region, label], STDS).clamp(min=0)
        box = torch.minimum(box, torch.tensor([60.0, 48.0, 60.0, 48.0], dtype=torch.float64))
        rivals = [other for _, name, other in kept if name == label]
        if not rivals or box_iou(box[None], torch.stack(rivals)).max() <= 0.4:
            kept.append((scores[region, label], label, box))
    assert 10 < len(kept) < 75
    assert found["labels"].tolist() == [label for _, label, _ in kept]
    torch.testing.assert_close(found["scores"], torch.stack([score for score, _, _ in kept]))
    torch.testing.assert_close(found["boxes"], torch.stack([box for _, _, box in kept]))
    (fewer,) = head.detect(pyramid, threshold=0.4, keep=5)
    assert torch.equal(fewer["boxes"], found["boxes"][:5])


def test_anchors_follow_the_objects_but_stay_below_the_papers():
    atss, faster = AtssHead(3), FasterRcnnHead(3)
    for head in (atss, faster):
        head.fit_anchors(14.0, 8.0)
    assert atss.anchor_scale == pytest.approx(1.75)
    assert faster.anchor_scale * 2 ** (1 / 3) == pytest.approx(1.75)
    for head in (atss, faster):
        head.fit_anchors(500.0, 8.0)
    assert (atss.anchor_scale, faster.anchor_scale) == (8.0, 4.0)


def test_sampling_comes_from_the_generator_and_building_from_none_but_it():
    state = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        head = rcnn(samples=6, rpn_samples=6)
        _, assigned = head(make_pyramid(), make_objects(), torch.Generator().manual_seed(seed))
        results.append(assigned.priors)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(results[0], results[1])
    assert results[0].shape != results[2].shape or not torch.equal(results[0], results[2])


def test_a_head_belongs_to_one_detector():
    head = built(AtssHead(3))
    with pytest.raises(ValueError, match="a head of its own"):
        head.build(32, 2, torch.Generator())
    with pytest.raises(ValueError, match="3 maps; the head was built for 2"):
        head(make_pyramid(levels=((6, 8), (3, 4), (2, 2))), make_objects())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AtssHead(0), "num_classes=0"),
        (lambda: AtssHead(3, anchor_scale=0), "anchor_scale=0"),
        (lambda: FasterRcnnHead(3, samples=0), "samples=0"),
        (lambda: FasterRcnnHead(3, finest=-1.0), "finest=-1.0"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
