"""Sampling, mixing and the decoder around them: against loops over single queries, points, groups; at their start."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import ConvNextBackbone, ConvNextConfig

from counterproof.detection.cascade_mixing import (
    CascadeDynamicMixing,
    Filters,
    MixingDetector,
    StageInteractorDecoder,
    SubQuerySampler,
    blend,
    boxes_to_xyzr,
    level_weights,
    place_encoding,
    xyzr_to_boxes,
)
from counterproof.detection.set_prediction import SetLoss
from counterproof.detection.stage_interactor import CrossStageLabelAssigner, CrossStageLoss

C, G, P, K = 16, 2, 3, 4


@pytest.fixture(autouse=True)
def _exact():
    """Weights from one seed, in double precision; the global generator and dtype go back to what they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def randomized(module):
    """Weights as training may leave them, none at the zeros it starts from."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


# Places.


def test_places_and_boxes_are_each_others_inverse():
    boxes = torch.rand(3, 5, 4) * 40 + 1
    torch.testing.assert_close(xyzr_to_boxes(boxes_to_xyzr(boxes)), boxes)
    assert boxes_to_xyzr(torch.tensor([10.0, 20.0, 4.0, 16.0])).tolist() == [10.0, 20.0, 3.0, 2.0]
    x, y, z, r = 1.0, 2.0, 3.5, -0.7
    expected = torch.tensor([x, y, 2 ** (z - r / 2), 2 ** (z + r / 2)])
    torch.testing.assert_close(xyzr_to_boxes(torch.tensor([x, y, z, r])), expected)


@pytest.mark.parametrize("bad", [[1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 2.0, -1.0], [float("nan"), 1.0, 2.0, 2.0]])
def test_boxes_without_area_or_not_finite_are_quoted(bad):
    boxes = torch.tensor([[[5.0, 5.0, 2.0, 2.0]], [bad]])
    with pytest.raises(ValueError, match=r"box 1 is .*size > 0"):
        boxes_to_xyzr(boxes)


def test_the_encoding_of_places_is_sine_and_cosine_of_each_number():
    place = torch.tensor([300.0, 40.0, 5.0, -0.5])
    expected = []
    for number, unit in zip(place.tolist(), (1000, 1000, 1, 1)):
        for feature in range(8):
            angle = number / unit / 10000 ** (2 * (feature // 2) / 8)
            expected.append(math.cos(angle) if feature % 2 else math.sin(angle))
    torch.testing.assert_close(place_encoding(place, 32), torch.tensor(expected))


# Sampling.


def sampled(sampler, features, strides, query, xyzr):
    """Point by point, group by group, with a bilinear read of our own."""
    batch, number, width = query.shape
    size = width // sampler.groups
    out = torch.zeros(batch, number, sampler.groups, sampler.points * sampler.sub_points, size)
    for b in range(batch):
        for n in range(number):
            x, y, z, r = xyzr[b, n].tolist()
            wide, high = 2 ** (z - r / 2), 2 ** (z + r / 2)
            anchors = sampler.anchors(query[b, n]).view(sampler.groups, sampler.points, 3)
            offsets = sampler.offsets(query[b, n]).view(sampler.sub_points, 3)
            for g in range(sampler.groups):
                for p in range(sampler.points):
                    for k in range(sampler.sub_points):
                        dx0, dy0, dz0 = anchors[g, p].tolist()
                        dx1, dy1, dz1 = offsets[k].tolist()
                        px, py = x + wide * (dx0 + 2**dz0 * dx1), y + high * (dy0 + 2**dz0 * dy1)
                        homes = [-((z + dz0 + dz1 - 3 - math.log2(stride / 4)) ** 2) / 2 for stride in strides]
                        share = torch.tensor(homes).softmax(0)
                        for weight, feature, stride in zip(share, features, strides):
                            part = feature[b, g * size : (g + 1) * size]
                            out[b, n, g, p * sampler.sub_points + k] += weight * bilinear(part, px, py, stride)
    return out


def bilinear(part, x, y, stride):
    """Value at a pixel place of a map whose cells have their centres at (i + 1/2) * stride; 0 outside."""
    column, row = x / stride - 0.5, y / stride - 0.5
    found = torch.zeros(len(part))
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < part.shape[1] and 0 <= j < part.shape[2]:
                found += (1 - abs(row - i)) * (1 - abs(column - j)) * part[:, i, j]
    return found


def scene(batch=2, number=3):
    features = [torch.randn(batch, C, 8, 6), torch.randn(batch, C, 4, 3)]
    query = torch.randn(batch, number, C)
    boxes = torch.cat([torch.rand(batch, number, 2) * 24, torch.rand(batch, number, 2) * 20 + 4], -1)
    return features, [4, 8], query, boxes_to_xyzr(boxes)


def test_samples_are_those_of_every_single_point():
    sampler = randomized(SubQuerySampler(C, groups=G, points=P, sub_points=K))
    features, strides, query, xyzr = scene()
    found = sampler(features, strides, query, xyzr)
    assert found.shape == (2, 3, G, P * K, C // G)
    torch.testing.assert_close(found, sampled(sampler, features, strides, query, xyzr))


def test_shares_of_the_levels_sum_to_one_and_z_3_is_at_home_on_stride_4():
    z = torch.linspace(-3, 12, 40)
    shares = level_weights(z, [4, 8, 16, 32])
    torch.testing.assert_close(shares.sum(-1), torch.ones(40))
    by_hand = [math.exp(-((4.2 - 3 - level) ** 2) / 2) for level in range(4)]
    found = level_weights(torch.tensor(4.2), [4, 8, 16, 32])
    torch.testing.assert_close(found, torch.tensor(by_hand) / sum(by_hand))
    assert level_weights(torch.tensor(3.0), [4, 8, 16, 32]).argmax() == 0


def test_a_constant_map_gives_its_constant_inside_and_nothing_outside():
    sampler = SubQuerySampler(C, groups=G, points=P, sub_points=K)
    features = [torch.full((1, C, 16, 16), 3.0), torch.full((1, C, 8, 8), 3.0)]
    boxes = torch.tensor([[[32.0, 32.0, 20.0, 20.0], [200.0, 32.0, 20.0, 20.0]]])
    found = sampler(features, [4, 8], torch.randn(1, 2, C), boxes_to_xyzr(boxes))
    torch.testing.assert_close(found[0, 0], torch.full_like(found[0, 0], 3.0))
    assert not found[0, 1].any()


def test_a_picture_twice_as_large_gives_the_same_features():
    sampler = randomized(SubQuerySampler(C, groups=G, points=P, sub_points=K))
    features, strides, query, xyzr = scene()
    larger = xyzr * torch.tensor([2.0, 2.0, 1.0, 1.0]) + torch.tensor([0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(
        sampler(features, [2 * stride for stride in strides], query, larger), sampler(features, strides, query, xyzr)
    )


def test_sampling_starts_on_the_same_points_of_every_box():
    sampler = SubQuerySampler(C, groups=G, points=40, sub_points=40)
    anchors, offsets = sampler.anchors.bias.view(G, 40, 3), sampler.offsets.bias.view(40, 3)
    assert not sampler.anchors.weight.any()
    assert not sampler.offsets.weight.any()
    assert not anchors[..., 2].any()
    assert not offsets[:, 2].any()
    assert not offsets[0].any()
    assert 0.4 < anchors.abs().max() <= 0.5
    assert 0.3 < offsets.abs().max() <= 0.5 / math.sqrt(2)


# Mixing.


def mixer(reused, *, out_points=6, points=P):
    return CascadeDynamicMixing(C, groups=G, points=points, sub_points=K, out_points=out_points, reused=reused)


def earlier_filters(number, batch=2, queries=3, *, read=P * K, rows=6):
    size = C // G
    count = batch * queries * G
    return [Filters(torch.randn(count, size, size), torch.randn(count, rows, read)) for _ in range(number)]


def normed(x):
    return torch.relu((x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5))


def mixed(module, features, query, stored):
    """One query and one group after another."""
    batch, number = query.shape[:2]
    size, read, rows = C // G, module.points * module.sub_points, module.rows
    out = torch.zeros(batch, number, C)
    for b in range(batch):
        for n in range(number):
            q, flat = query[b, n], []
            for g in range(G):
                place = (b * number + n) * G + g
                made = module.generate(q).view(G, -1)[g]
                m, s = made[: size * size].view(size, size), made[size * size :].view(rows, read)
                x = residual = features[b, n, g]
                x = normed(x @ m + module.channel_bias(q).view(G, size)[g])
                for number_of, earlier in enumerate(stored):
                    rows_of_anchors = module.along_sub_points[number_of](x.reshape(module.points, -1)).view(read, size)
                    turned = x.view(module.points, module.sub_points, size).transpose(0, 1)
                    across = module.along_points[number_of](turned.reshape(module.sub_points, -1))
                    across = across.view(module.sub_points, module.points, size).transpose(0, 1).reshape(read, size)
                    x = residual = rows_of_anchors + across + residual
                    gates = module.channel_gates(q).view(G, len(stored), 2, size)[g, number_of].sigmoid()
                    m1 = gates[0][:, None] * earlier.channel[place] + (1 - gates[0][:, None]) * m
                    m1 = gates[1] * m1 + (1 - gates[1]) * m
                    x = normed(x @ m1 + module.reused_bias(q).view(G, len(stored), size)[g, number_of])
                if stored:
                    old = stored[-1].spatial[place, :rows, :read]
                    a = module.row_gates(q).view(G, rows)[g].sigmoid()[:, None]
                    c = module.column_gates(q).view(G, read)[g].sigmoid()
                    s1 = a * old + (1 - a) * s
                    s = torch.cat([s, c * s1 + (1 - c) * s])
                flat.append(normed(s @ x + module.spatial_bias(q).view(G, -1)[g][:, None]).flatten())
            out[b, n] = q + module.merge(torch.cat(flat))
    return F.layer_norm(out, (C,), module.norm.weight, module.norm.bias)


@pytest.mark.parametrize("reused", [0, 1, 3])
def test_mixing_is_that_of_every_single_query_and_group(reused):
    module = randomized(mixer(reused))
    features, query = torch.randn(2, 3, G, P * K, C // G), torch.randn(2, 3, C)
    stored = earlier_filters(reused)
    found, own = module(features, query, stored)
    torch.testing.assert_close(found, mixed(module, features, query, stored))
    assert own.channel.shape == (12, C // G, C // G)
    assert own.spatial.shape == (12, 3 if reused else 6, P * K)


def test_of_filters_for_more_points_the_first_count():
    module = randomized(mixer(1, points=2))
    features, query = torch.randn(2, 3, G, 2 * K, C // G), torch.randn(2, 3, C)
    stored = earlier_filters(1)  # of three anchors
    cut = [Filters(stored[0].channel, stored[0].spatial[:, :, : 2 * K])]
    torch.testing.assert_close(module(features, query, stored)[0], mixed(module, features, query, stored))
    assert torch.equal(module(features, query, stored)[0], module(features, query, cut)[0])


@pytest.mark.parametrize("reused", [0, 2])
def test_at_the_start_a_query_stays_what_it_is_up_to_its_norm(reused):
    features, query = torch.randn(2, 3, G, P * K, C // G), torch.randn(2, 3, C)
    found, own = mixer(reused)(features, query, earlier_filters(reused))
    assert torch.equal(found, F.layer_norm(query, (C,)))
    assert torch.equal(own.channel[:G], own.channel[G : 2 * G]), "filters differ between queries"


def test_at_the_start_a_quarter_of_the_old_filter_is_left():
    module = mixer(1)
    query = torch.randn(1, 2, C)
    old, new = torch.randn(4, 5, 7), torch.randn(4, 5, 7)
    half = module.channel_gates(query).sigmoid()
    assert torch.equal(half, torch.full_like(half, 0.5))
    assert torch.equal(module.row_gates(query).sigmoid(), torch.full((1, 2, G * 3), 0.5))
    assert torch.equal(module.column_gates(query).sigmoid(), torch.full((1, 2, G * P * K), 0.5))
    rows, columns = torch.full((4, 5), 0.5), torch.full((4, 7), 0.5)
    torch.testing.assert_close(blend(old, new, rows, columns), old / 4 + 3 * new / 4)
    torch.testing.assert_close(blend(old, new, rows * 0, columns), new)
    torch.testing.assert_close(blend(old, new, rows * 2, columns * 2), old)
    one_row = rows * 0
    one_row[:, 2] = 1
    assert torch.equal(blend(old, new, one_row, columns * 2)[:, 2], old[:, 2])


def test_finite_differences_of_sampling_and_mixing():
    sampler = randomized(SubQuerySampler(4, groups=2, points=1, sub_points=2))
    module = randomized(CascadeDynamicMixing(4, groups=2, points=1, sub_points=2, out_points=2, reused=1))
    features = [torch.randn(1, 4, 4, 4), torch.randn(1, 4, 2, 2)]
    xyzr = boxes_to_xyzr(torch.tensor([[[8.0, 8.0, 5.0, 7.0]]]))
    channel, spatial = torch.randn(2, 2, 2), torch.randn(2, 2, 2)

    def run(first, second, query, where, m, s):
        read = sampler([first, second], [4, 8], query, where)
        out, own = module(read, query, [Filters(m, s)])
        return out, own.channel, own.spatial

    inputs = [*features, torch.randn(1, 1, 4), xyzr, channel, spatial]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


def test_bad_mixings_are_quoted():
    with pytest.raises(ValueError, match="groups=3"):
        CascadeDynamicMixing(16, groups=3)
    with pytest.raises(ValueError, match="out_points=5"):
        CascadeDynamicMixing(16, out_points=5, reused=1)
    module = mixer(2)
    with pytest.raises(ValueError, match=r"1 stored filters.*use 2"):
        module(torch.randn(2, 3, G, P * K, C // G), torch.randn(2, 3, C), earlier_filters(1))


# The decoder.


def decoder(**changes):
    settings = dict(
        num_stages=6, width=C, groups=G, num_queries=5, heads=2, points=(4, 3), sub_points=2, out_points=6, ffn=8
    )
    return StageInteractorDecoder(4, **(settings | changes))


@pytest.mark.parametrize(
    ("start", "counts"),
    [(2, [0, 0, 1, 2, 3, 4]), (None, [0] * 6), (1, [0, 1, 2, 3, 4, 5]), (4, [0, 0, 0, 0, 1, 2])],
)
def test_filters_are_used_again_as_scheduled(start, counts):
    """Those of the stages start - 1 .. i - 1, the oldest first: object identity, as each stage was handed them."""
    module = decoder(reuse_start=start)
    handed, made = [], []

    def note(_, given, out):
        handed.append(given[2])
        made.append(out[1])

    for stage in module.stages:
        stage.mixing.register_forward_hook(note)
    logits, boxes = module(scene()[0], [4, 8], (32, 24))
    assert [len(filters) for filters in handed] == counts == [stage.mixing.reused for stage in module.stages]
    for number, filters in enumerate(handed):
        expected = made[start - 1 : number] if start is not None and number >= start else []
        assert all(found is wanted for found, wanted in zip(filters, expected, strict=True))
    assert logits.shape == (6, 2, 5, 4)
    assert boxes.shape == (6, 2, 5, 4)
    rows = [own.spatial.shape[1:] for own in made]
    assert rows == [(6 if count == 0 else 3, 8 if number == 0 else 6) for number, count in enumerate(counts)]


def test_it_starts_from_the_whole_picture():
    module = decoder()
    sizes = torch.tensor([[32, 24], [16, 12]])
    _, boxes = module(scene()[0], [4, 8], (32, 24), sizes)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(5, 4))
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(5, 4))
    torch.testing.assert_close(boxes, boxes[:1].expand_as(boxes))  # no step is taken yet
    assert all(torch.allclose(stage.class_head[-1].bias.sigmoid(), torch.tensor(0.01)) for stage in module.stages)


def test_a_stage_is_attention_sampling_mixing_and_heads():
    """The first two stages in steps, from parts that are tested above and an attention written out."""
    module = randomized(decoder(num_stages=2))
    features, strides, _, _ = scene()
    logits, boxes = module(features, strides, (32, 24))
    query = F.layer_norm(module.content.weight, (C,)).expand(2, -1, -1)
    xyzr = boxes_to_xyzr(torch.tensor([12.0, 16.0, 24.0, 32.0])).expand(2, 5, 4)
    for number, stage in enumerate(module.stages):
        seen = query + place_encoding(xyzr, C)
        talk = attended(stage, seen, xyzr_to_boxes(xyzr))
        query = F.layer_norm(seen + talk, (C,), stage.attention_norm.weight, stage.attention_norm.bias)
        query, _ = stage.mixing(stage.sampler(features, strides, query, xyzr), query)
        query = stage.ffn_norm(query + stage.ffn[2](stage.ffn[0](query).relu()))
        delta = stage.box_head(query)
        old = xyzr_to_boxes(xyzr)
        xyzr = torch.cat([xyzr[..., :2] + delta[..., :2] * old[..., 2:], xyzr[..., 2:] + delta[..., 2:]], -1)
        torch.testing.assert_close(logits[number], stage.class_head(query))
        torch.testing.assert_close(boxes[number], xyzr_to_boxes(xyzr) / torch.tensor([24.0, 32.0, 24.0, 32.0]))


def attended(stage, seen, boxes):
    """Two heads; a query listens more to those whose boxes hold its own."""
    batch, number, _ = seen.shape
    weights, bias = stage.attention.in_proj_weight, stage.attention.in_proj_bias
    q, k, v = ((seen @ weights[i * C : (i + 1) * C].T + bias[i * C : (i + 1) * C]) for i in range(3))
    out = torch.zeros_like(seen)
    for b in range(batch):
        inside = torch.zeros(number, number)
        for i in range(number):
            for j in range(number):
                sides = []
                for axis in (0, 1):
                    low = max(boxes[b, n, axis] - boxes[b, n, axis + 2] / 2 for n in (i, j))
                    high = min(boxes[b, n, axis] + boxes[b, n, axis + 2] / 2 for n in (i, j))
                    sides.append(max(high - low, torch.tensor(0.0)))
                inside[i, j] = sides[0] * sides[1] / (boxes[b, i, 2] * boxes[b, i, 3])
        for head, part in enumerate((slice(0, C // 2), slice(C // 2, C))):
            scores = q[b][:, part] @ k[b][:, part].T / math.sqrt(C // 2)
            scores = scores + stage.overlap_weight[head] * torch.log(inside + 1e-7)
            out[b][:, part] = scores.softmax(-1) @ v[b][:, part]
    return out @ stage.attention.out_proj.weight.T + stage.attention.out_proj.bias


def test_pictures_of_a_batch_do_not_touch_and_queries_have_no_order():
    module = randomized(decoder(num_stages=3))
    features, strides, _, _ = scene()
    logits, boxes = module(features, strides, (32, 24))
    alone = module([feature[1:] for feature in features], strides, (32, 24))
    torch.testing.assert_close(alone[0], logits[:, 1:])
    torch.testing.assert_close(alone[1], boxes[:, 1:])
    with torch.no_grad():
        module.content.weight.copy_(module.content.weight.flip(0))
    torch.testing.assert_close(module(features, strides, (32, 24))[0], logits.flip(2))


def test_a_stage_learns_its_own_step_only():
    module = randomized(decoder(num_stages=3))
    _, boxes = module(*scene()[:2], (32, 24))
    boxes[2].sum().backward()
    assert module.stages[2].box_head[-1].weight.grad.any()
    assert not module.stages[1].box_head[-1].weight.grad.any()
    assert module.stages[1].mixing.generate.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 12}, "width=12"),
        ({"heads": 3}, "heads=3"),
        ({"reuse_start": 0}, "reuse_start=0"),
        ({"points": (2, 4)}, r"points=\(2, 4\)"),
    ],
)
def test_bad_decoders_are_quoted(changes, says):
    with pytest.raises(ValueError, match=says):
        decoder(**changes)


# The detector.


def detector(**changes):
    backbone = ConvNextBackbone(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage1", "stage2"])
    )
    settings = dict(
        num_stages=3, width=C, groups=G, num_queries=5, heads=2, points=(4, 3), sub_points=2, out_points=6, ffn=8
    )
    return MixingDetector(backbone, 3, **(settings | changes))


def batch():
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.3, 0.3], [0.7, 0.6, 0.2, 0.4]])},
        {"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)},
    ]
    return {"pixel_values": torch.randn(2, 3, 32, 40), "labels": labels}


@pytest.mark.parametrize("reuse", [2, None])
@pytest.mark.parametrize("loss", [None, CrossStageLoss(CrossStageLabelAssigner())])
def test_it_learns_a_picture_and_every_weight_moves(reuse, loss):
    model = detector(reuse_start=reuse, loss_function=loss)
    data = batch()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(25):
        found = model(**data)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # All boxes of the first stage are the whole picture: how much overlap weighs there makes no difference.
    assert still == ["decoder.stages.0.overlap_weight"]
    assert losses[-1] < 0.7 * losses[0]
    assert len(found.auxiliary_outputs) == 2
    assert {"loss_ce", "loss_bbox_1"} <= set(found.loss_dict)


def test_it_answers_like_a_detector_of_transformers():
    model = detector().eval()
    data = batch()
    found = model(pixel_values=data["pixel_values"])
    assert found.logits.shape == (2, 5, 3)
    assert found.pred_boxes.shape == (2, 5, 4)
    assert found.loss is None
    whole = torch.ones(2, 32, 40, dtype=torch.int64)
    torch.testing.assert_close(model(data["pixel_values"], whole).logits, found.logits)
    labelled = model(**data)
    outputs = [*labelled.auxiliary_outputs, {"logits": labelled.logits, "pred_boxes": labelled.pred_boxes}]
    logits, boxes = (torch.stack([output[name] for output in outputs]) for name in ("logits", "pred_boxes"))
    by_hand = SetLoss()(logits[-1], data["labels"], logits.device, boxes[-1], model.config, logits, boxes)[0]
    torch.testing.assert_close(labelled.loss, by_hand)


def test_padding_moves_the_start_of_a_picture_s_queries():
    model = detector().eval()
    mask = torch.zeros(2, 32, 40, dtype=torch.int64)
    mask[0] = 1
    mask[1, :16, :20] = 1
    boxes = model(batch()["pixel_values"], mask).pred_boxes
    torch.testing.assert_close(boxes[0], torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(5, 4))
    torch.testing.assert_close(boxes[1], torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(5, 4))
