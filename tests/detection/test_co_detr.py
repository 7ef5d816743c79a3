"""The host is left as it is; the queries know their targets and start where the heads found them; the sum adds up."""

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from transformers.loss.loss_for_object_detection import generalized_box_iou, sigmoid_focal_loss

from counterproof.detection.co_detr import (
    AtssHead,
    CoDetr,
    FasterRcnnHead,
    _masked,
    _recorded,
    positive_queries,
)
from counterproof.detection.dense_heads import Assigned
from counterproof.detection.set_prediction import corners
from counterproof.detection.tiny import tiny_detector
from counterproof.errors import UserError


def tiny(family="deformable", **settings):
    if family.startswith("rt"):
        return tiny_rt(family)
    if settings.pop("two_stage", False):
        settings |= {"two_stage": True, "two_stage_num_proposals": 9}
    return tiny_detector(family, num_queries=9, **settings)


def tiny_rt(family):
    backbone = transformers.ConvNextConfig(
        num_channels=3,
        patch_size=4,
        num_stages=2,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        out_features=["stage1", "stage2"],
    )
    sizes = dict(d_model=64, encoder_hidden_dim=64, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_layers=1)
    maps = dict(encoder_in_channels=[24, 48], feat_strides=[4, 8], num_feature_levels=2, decoder_in_channels=[64, 64])
    heads = dict(decoder_attention_heads=4, encoder_attention_heads=4, decoder_n_points=2, encode_proj_layers=[1])
    rest = dict(backbone_config=backbone, num_labels=3, decoder_layers=2, num_queries=9, num_denoising=0)
    settings = sizes | maps | heads | rest
    name = "RTDetr" if family == "rt_detr" else "RTDetrV2"
    if family == "rt_detr_v2":
        settings |= {"decoder_n_levels": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForObjectDetection")(getattr(transformers, f"{name}Config")(**settings))
    return model.train()


def small_rcnn(**settings):
    return FasterRcnnHead(3, **({"pool": 2, "hidden": 16, "before": 40, "proposals": 16, "samples": 16} | settings))


def labels_of(counts, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(3, (count,), generator=generator),
            "boxes": torch.cat(
                [
                    torch.rand(count, 2, generator=generator) * 0.5 + 0.25,
                    torch.rand(count, 2, generator=generator) * 0.2 + 0.25,
                ],
                -1,
            ).to(dtype),
        }
        for count in counts
    ]


def batch(counts=(3, 0, 2), seed=0, padded=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 50)
    result = {
        "pixel_values": torch.randn(len(counts), 3, 48, 64, generator=generator).to(dtype),
        "labels": labels_of(counts, seed, dtype),
    }
    if padded:
        mask = torch.ones(len(counts), 48, 64, dtype=torch.int64)
        mask[0, :, 40:] = 0
        mask[-1, 32:] = 0
        result["pixel_mask"] = mask
        result["pixel_values"] *= mask[:, None]
    return result


HOSTS = {
    "deformable": {},
    "deformable-2-maps": {"levels": 2},
    "deformable-no-refine": {"with_box_refine": False},
    "deformable-two-stage": {"two_stage": True},
    "conditional": {},
    "dab": {},
    "rt_detr": {},
    "rt_detr_v2": {},
}
hosts = pytest.mark.parametrize("host", HOSTS)


def wrapped(host="deformable", heads=None, **settings):
    model = tiny(host.partition("-")[0] if host.startswith("deformable") else host, **dict(HOSTS[host]))
    co = CoDetr(model, [AtssHead(3)] if heads is None else heads, **settings)
    co.fit_anchors(14.0)
    return co


def stirred(model):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("settings", [{"heads": []}, {"lambda1": 0.0, "lambda2": 0.0}])
def test_without_heads_or_weights_it_is_the_host(settings):
    inputs = batch(padded=True)
    plain = tiny()
    expected = plain(**inputs)
    expected.loss.backward()
    co = wrapped(**settings)
    out = co(**inputs)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert out.loss_dict.keys() == {f"main/{name}" for name in expected.loss_dict}
    wanted, found = gradients(plain), gradients(co.model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in co.heads.parameters())


def test_without_its_weight_a_heads_loss_reaches_nothing_but_its_queries_do():
    co = wrapped(lambda2=0.0)
    co(**batch()).loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in co.heads.parameters())
    assert all(parameter.grad.any() for parameter in co.queries.parameters())


@hosts
def test_the_host_keeps_its_weights_its_outputs_and_its_names(host):
    plain = wrapped(host).model
    twin = copy.deepcopy(plain)
    twin(**batch())  # a step of a model with batch norm moves its statistics
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    inputs = {"pixel_values": batch()["pixel_values"]}
    with torch.no_grad():
        expected = twin.eval()(**inputs)
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in plain.modules())
    heads = [AtssHead(3), small_rcnn()]
    co = CoDetr(plain, heads, use_zero_padding=True)
    co(**batch()).loss.backward()
    co.eval()
    with torch.no_grad():
        found = co(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert hooks == sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in plain.modules())


@hosts
def test_extra_queries_leave_the_main_predictions_alone(host):
    co = wrapped(host, [AtssHead(3), small_rcnn()])
    inputs = batch()
    expected = co.model(**inputs)
    out = co(**inputs)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.pred_boxes, expected.pred_boxes)
    assert torch.equal(out.host.loss, expected.loss)


@hosts
def test_the_hosts_own_queries_go_through_the_extra_pass_unchanged(host):
    """The pass reuses the host's decoder, refinement and heads: given the host's queries, it gives its predictions."""
    co = wrapped(host)
    stirred(co.model)  # box heads start at zero, and no box would move from layer to layer
    inputs = batch(padded=not host.startswith("rt"))
    with _recorded(co.model) as seen:
        expected = co.model(**inputs)
    position = seen.get("object_queries_position_embeddings")
    if host == "conditional":
        centre = co.model.model.decoder.ref_point_head(position).sigmoid()
        boxes = torch.cat([centre, torch.full_like(centre, 0.3)], -1)
    elif host == "dab":
        boxes = seen["query_position_embeddings"].sigmoid()
    elif host.startswith("rt"):
        boxes = seen["reference_points"].sigmoid()
    else:
        start = seen["reference_points"]
        boxes = start if start.shape[-1] == 4 else torch.cat([start, torch.full_like(start, 0.3)], -1)
    logits, found = co.family.decode(co.model, seen, position, seen["inputs_embeds"], boxes)
    torch.testing.assert_close(logits[-1], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-1], expected.pred_boxes, rtol=1e-4, atol=1e-5)
    assert len(logits) == co.model.config.decoder_layers
    if not host.startswith("rt"):
        for layer, earlier in enumerate(expected.auxiliary_outputs):
            torch.testing.assert_close(logits[layer], earlier["logits"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[layer], earlier["pred_boxes"], rtol=1e-4, atol=1e-5)


@hosts
def test_masked_queries_change_nothing_for_the_others(host):
    co = wrapped(host)
    inputs = batch()
    with _recorded(co.model) as seen, torch.no_grad():
        co.model(**inputs)
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 7, 4, generator=generator) * 0.4 + 0.2
    features = torch.randn(3, 7, 64, generator=generator)
    empty = torch.zeros(3, 7, dtype=torch.bool)
    empty[:, 4:] = True
    with torch.no_grad():
        position, content = co.queries[0](boxes, features)
        with _masked(co.model, empty, torch.float32):
            logits, found = co.family.decode(co.model, seen, position, content, boxes)
        fewer = co.family.decode(co.model, seen, position[:, :4], content[:, :4], boxes[:, :4])
        open_ = co.family.decode(co.model, seen, position, content, boxes)
    torch.testing.assert_close(logits[:, :, :4], fewer[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, :, :4], fewer[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(open_[0][:, :, :4], fewer[0], rtol=1e-4, atol=1e-5)  # they would, unmasked


def test_a_picture_with_masked_queries_only_stays_finite():
    co = wrapped(use_zero_padding=True)
    out = co(**batch((0, 2)))
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(co).values())


class Known(nn.Module):
    """A head whose priors are the objects themselves, which it gives to them; its loss is what a test wants."""

    num_classes = 3

    def build(self, width, levels, generator):
        self.loss = nn.Parameter(torch.zeros(()))

    def fit_anchors(self, side, stride):
        pass

    def forward(self, pyramid, objects, generator=None):
        number = max(objects.counts)
        priors = torch.rand(len(objects.counts), number, 4, dtype=objects.boxes.dtype) * 10
        priors[..., 2:] += priors[..., :2] + 1
        target = torch.full(priors.shape[:2], -1)
        for image, (boxes, start) in enumerate(zip(objects.split(), objects.starts())):
            priors[image, : len(boxes)] = boxes
            target[image, : len(boxes)] = torch.arange(len(boxes)) + start
        tokens = pyramid.tokens()[:, :number]
        return {"mine": self.loss**2}, Assigned(priors, target, tokens)


def silence(co):
    """Make every box head of the host predict no change."""
    model = co.model
    heads = [
        part
        for name, part in model.named_modules()
        if name.endswith(("bbox_predictor",)) or "bbox_embed." in f"{name}."
    ]
    for head in heads:
        for linear in getattr(head, "layers", [])[-1:]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


@pytest.mark.parametrize("host", ["dab", "deformable-two-stage", "rt_detr"])
@pytest.mark.parametrize("padded", [False, True])
def test_queries_that_start_on_their_targets_lose_nothing(host, padded):
    if padded and host == "rt_detr":
        pytest.skip("RT-DETR takes no pixel mask")
    co = wrapped(host, [Known()])
    silence(co)
    out = co(**batch((9, 9, 9), padded=padded))
    parts = {name: value for name, value in out.loss_dict.items() if name.startswith("query0/")}
    assert {"query0/loss_bbox", "query0/loss_giou", "query0/loss_bbox_0", "query0/loss_giou_0"} <= parts.keys()
    for name, value in parts.items():
        if "bbox" in name or "giou" in name:
            assert value.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("host", ["deformable", "conditional"])
def test_queries_of_a_host_of_points_start_at_the_centres(host):
    co = wrapped(host)
    silence(co)
    inputs = batch(padded=True)
    with _recorded(co.model) as seen:
        co.model(**inputs)
    boxes = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    position, content = co.queries[0](boxes, torch.zeros(3, 5, 64))
    _, found = co.family.decode(co.model, seen, position, content, boxes)
    assert len(found) == 2
    for layer in found:
        torch.testing.assert_close(layer[..., :2], boxes[..., :2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer[..., 2:], torch.full((3, 5, 2), 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", [False, True])
def test_the_query_loss_is_that_of_known_targets_in_every_layer(zero):
    """Against transformers' focal loss and GIoU, query by query; the decoder's answer is set by hand."""
    co = wrapped(use_zero_padding=zero)
    generator = torch.Generator().manual_seed(3)
    chosen = {}

    def decode(model, seen, position, content, boxes):
        chosen["boxes"] = boxes
        shape = (2, *boxes.shape[:2])
        chosen["logits"] = torch.randn(*shape, 3, generator=generator)
        chosen["found"] = torch.rand(*shape, 4, generator=generator) * 0.3 + 0.3
        return chosen["logits"], chosen["found"]

    co.family = dataclasses.replace(co.family, decode=decode)
    inputs = batch((3, 0, 2), padded=True)
    kept = {}
    original = co.heads[0].forward

    def watched(*given):
        kept["losses"], kept["assigned"] = original(*given)
        kept["sizes"] = given[0].sizes
        return kept["losses"], kept["assigned"]

    co.heads[0].forward = watched
    state = co._generator.get_state()
    out = co(**inputs)
    again = torch.Generator()
    again.set_state(state)
    queries = positive_queries(kept["assigned"], kept["sizes"], generator=again, use_zero_padding=zero)
    classes = torch.cat([target["class_labels"] for target in inputs["labels"]])
    boxes = torch.cat([target["boxes"] for target in inputs["labels"]])
    count = int((queries.target >= 0).sum())
    assert count >= 5
    for layer, suffix in ((0, "_0"), (1, "")):
        focal = distance = apart = torch.zeros(())
        for image in range(3):
            for query in range(queries.target.shape[1]):
                which = int(queries.target[image, query])
                if which == -2:
                    assert zero
                    continue
                target = torch.zeros(1, 3)
                if which >= 0:
                    target[0, classes[which]] = 1
                    mine = chosen["found"][layer, image, query]
                    distance = distance + (mine - boxes[which]).abs().sum()
                    overlap = generalized_box_iou(corners(mine)[None], corners(boxes[which])[None])
                    apart = apart + 1 - overlap[0, 0]
                focal = focal + 3 * sigmoid_focal_loss(chosen["logits"][layer, image, query][None], target, 1)
        torch.testing.assert_close(out.loss_dict[f"query0/loss_ce{suffix}"], focal / count)
        torch.testing.assert_close(out.loss_dict[f"query0/loss_bbox{suffix}"], distance / count)
        torch.testing.assert_close(out.loss_dict[f"query0/loss_giou{suffix}"], apart / count)


def total_of(out, prefix, config):
    weights = {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient, "loss_ce": 1}
    total = 0.0
    for name, value in out.loss_dict.items():
        place, _, part = name.partition("/")
        if place == prefix and not part.startswith("cardinality"):  # which transformers only reports
            total = total + value * next((w for word, w in weights.items() if part.startswith(word)), 1)
    return total


@pytest.mark.parametrize(("settings", "scale"), [({}, 4), ({"lambda2": 0.5}, 1), ({"head_loss_scale": 3.0}, 3)])
def test_the_loss_is_the_sum_of_its_parts(settings, scale):
    co = wrapped("deformable", [AtssHead(3), small_rcnn()], lambda1=0.7, **settings)
    out = co(**batch())
    config = co.model.config
    expected = total_of(out, "main", config)
    for head in range(2):
        expected = expected + scale * total_of(out, f"head{head}", config)
        expected = expected + 0.7 * total_of(out, f"query{head}", config)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(total_of(out, "main", config), out.host.loss)
    assert out.positives.shape == (2,)
    assert (out.positives > 0).all()


def memory_of(co, inputs):
    """A step, with the encoder's output kept for its gradient."""
    kept = {}

    def keep(_module, _args, output):
        kept["memory"] = output[0]
        kept["memory"].retain_grad()

    handle = co.model.model.encoder.register_forward_hook(keep)
    out = co(**inputs)
    handle.remove()
    return out, kept["memory"]


def test_a_heads_loss_reaches_the_encoder_at_every_positive():
    co = wrapped("deformable")
    kept = {}
    original = co.heads[0].forward

    def watched(*given):
        kept["result"] = original(*given)
        return kept["result"]

    co.heads[0].forward = watched
    out, memory = memory_of(co, batch())
    total = sum(value for name, value in out.loss_dict.items() if name.startswith("head0/"))
    (gradient,) = torch.autograd.grad(total, memory, retain_graph=True)
    positive = kept["result"][1].target[:, : memory.shape[1]] >= 0  # the first map is the encoder's own
    assert positive.any()
    assert (gradient.norm(dim=-1)[positive] > 0).all()
    queries = sum(value for name, value in out.loss_dict.items() if name.startswith("query0/"))
    (gradient,) = torch.autograd.grad(queries, memory)
    assert gradient.abs().sum() > 0


def test_queries_reach_the_encoder_by_their_features_as_well_as_by_cross_attention():
    """With the decoder's own view of the memory cut, a gradient is left: that of the features."""
    co = wrapped("deformable")
    decode = co.family.decode

    def blind(model, seen, *given):
        return decode(model, {**seen, "encoder_hidden_states": seen["encoder_hidden_states"].detach()}, *given)

    co.family = dataclasses.replace(co.family, decode=blind)
    out, memory = memory_of(co, batch())
    (gradient,) = torch.autograd.grad(out.loss_dict["query0/loss_ce"], memory)
    assert gradient.abs().sum() > 0


def test_every_new_weight_and_the_hosts_learn():
    co = wrapped("deformable", [AtssHead(3), small_rcnn()], finer_maps=1)
    before = {name: parameter.detach().clone() for name, parameter in co.named_parameters()}
    optimizer = torch.optim.AdamW(co.parameters(), lr=0.01, weight_decay=0.0)
    for seed in range(2):  # the last layers of box heads start at zero
        out = co(**batch(seed=seed))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    still = [name for name, parameter in co.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def assigned_of(positives, negatives, priors=400, images=2):
    """Priors of known places: (positives, negatives) of each image, the rest left out."""
    target = torch.full((images, priors), -2)
    for image in range(images):
        target[image, : positives[image]] = torch.arange(positives[image]) % 5
        target[image, positives[image] : positives[image] + negatives[image]] = -1
    low = torch.arange(priors, dtype=torch.float32)[None, :, None].expand(images, -1, 2)
    boxes = torch.cat([low, low + 2], -1)
    return Assigned(boxes, target, torch.arange(priors)[None, :, None].expand(images, -1, 6).float())


def made(assigned, **settings):
    generator = torch.Generator().manual_seed(0)
    return positive_queries(assigned, torch.tensor([[100.0, 50.0]] * 2), generator=generator, **settings)


@pytest.mark.parametrize(
    ("positives", "expected"), [((0, 0), 9), ((3, 5), 9), ((20, 5), 20), ((350, 2), 300), ((9, 9), 9)]
)
def test_the_number_of_queries_is_that_of_the_image_with_most_within_bounds(positives, expected):
    queries = made(assigned_of(positives, (50, 390), priors=400))
    assert queries.target.shape == (2, expected)
    for image in range(2):
        assert int((queries.target[image] >= 0).sum()) == min(positives[image], expected)
        wanted = min(50 if image == 0 else 390, expected - min(positives[image], expected))
        assert int((queries.target[image] == -1).sum()) == wanted


def test_queries_keep_prior_feature_and_target_together_and_none_comes_twice():
    assigned = assigned_of((20, 4), (30, 60))
    queries = made(assigned)
    centre = queries.boxes[..., 0] * 100 - 1  # the prior's place, by construction
    assert torch.equal(queries.features[..., 0].round(), centre.round())
    torch.testing.assert_close(queries.boxes[..., 1] * 50 - 1, centre)
    torch.testing.assert_close(queries.boxes[..., 2:], torch.tensor([0.02, 0.04]).expand(2, 20, 2))
    for image in range(2):
        places = centre[image].round().long()
        assert len(set(places.tolist())) == 20
        assert torch.equal(queries.target[image], assigned.target[image, places])
    assert not queries.boxes.requires_grad


def test_zero_padding_takes_no_negatives_and_a_shortage_is_filled_in_any_case():
    zeros = made(assigned_of((3, 12), (50, 50)), use_zero_padding=True)
    assert (zeros.target[0, 3:] == -2).all()
    assert not zeros.boxes[0, 3:].any()
    assert not zeros.features[0, 3:].any()
    short = made(assigned_of((3, 12), (4, 50)))
    assert short.target[0].tolist()[7:] == [-2] * 5
    assert int((short.target[0] == -1).sum()) == 4


def test_too_many_positives_are_thinned_at_random_by_the_generator():
    assigned = assigned_of((350, 340), (10, 10))
    first, again = made(assigned), made(assigned)
    assert torch.equal(first.boxes, again.boxes)
    other = positive_queries(assigned, torch.ones(2, 2), generator=torch.Generator().manual_seed(1), max_positives=300)
    assert not torch.equal(first.features, other.features)
    assert len(set(first.features[0, :, 0].tolist())) == 300
    assert first.features[0, :, 0].max() > 320  # not simply the first ones


def test_pictures_without_objects_train_on_negatives():
    co = wrapped("deformable", [AtssHead(3), small_rcnn()])
    out = co(**batch((0, 0, 0)))
    out.loss.backward()
    assert out.loss.isfinite()
    assert not out.positives.any()
    assert all(grad.isfinite().all() for grad in gradients(co).values())
    assert out.loss_dict["query0/loss_bbox"] == 0


def test_on_padded_pictures_the_queries_start_on_the_objects():
    """Objects are regions of the second head, so among its queries each one's own box must turn up."""
    co = wrapped("deformable", [small_rcnn(samples=32)], max_positives=300)
    inputs = batch(padded=True)
    seen = []
    original = co.queries[0].forward
    co.queries[0].forward = lambda boxes, features: seen.append(boxes) or original(boxes, features)
    co(**inputs)
    for image, target in enumerate(inputs["labels"]):
        for box in target["boxes"]:
            assert torch.isclose(seen[0][image], box, atol=1e-5).all(-1).any()


@hosts
def test_maps_are_cut_in_the_decoders_order_and_one_coarser_is_added(host):
    co = wrapped(host)
    inputs = batch(padded=not host.startswith("rt"))
    with _recorded(co.model) as seen:
        co.model(**inputs)
    pyramid = co.pyramid(seen, inputs["pixel_values"], None)
    shapes = [tuple(level.shape[-2:]) for level in pyramid.maps]
    expected = {
        "deformable-2-maps": [(12, 16), (6, 8), (3, 4)],
        "rt_detr": [(12, 16), (6, 8), (3, 4)],
        "rt_detr_v2": [(12, 16), (6, 8), (3, 4)],
        "conditional": [(24, 32), (12, 16), (6, 8), (3, 4)],
        "dab": [(24, 32), (12, 16), (6, 8), (3, 4)],
    }.get(host, [(6, 8), (3, 4)])
    assert shapes == expected
    own = len(co.finer)
    memory = seen["encoder_hidden_states"]
    start = 0
    for level in pyramid.maps[own:-1]:
        height, width = level.shape[-2:]
        for row, column in ((0, 0), (1, 2), (height - 1, width - 1)):
            assert torch.equal(level[0, :, row, column], memory[0, start + row * width + column])
        start += height * width
    assert start == memory.shape[1]
    assert pyramid.strides()[-1] == (16.0, 16.0)
    masked = co.pyramid(seen, inputs["pixel_values"], inputs.get("pixel_mask"))
    if "pixel_mask" in inputs:
        assert masked.sizes.tolist() == [[40, 48], [64, 48], [64, 32]]
        assert not masked.maps[own][0, :, :, -1].any()  # padding on the right of the first picture


def test_anchors_are_chosen_by_the_data():
    co = wrapped("deformable-2-maps", [AtssHead(3), FasterRcnnHead(3)])
    co.fit_anchors(14.0)
    assert co.heads[0].anchor_scale == pytest.approx(14 / 4)
    assert co.training
    assert co.model.training
    co.fit_anchors(1000.0)
    assert (co.heads[0].anchor_scale, co.heads[1].anchor_scale) == (8.0, 4.0)
    with pytest.raises(ValueError, match="median_side is nan"):
        co.fit_anchors(float("nan"))


def test_a_head_can_be_asked_for_its_own_detections():
    co = wrapped("deformable", [AtssHead(3), small_rcnn()])
    inputs = batch(padded=True)
    for head in range(2):
        found = co.detect(inputs["pixel_values"], inputs["pixel_mask"], head=head, keep=7)
        assert len(found) == 3
        assert co.training
        for image, (width, height) in enumerate(((40, 48), (64, 48), (64, 32))):
            boxes = found[image]["boxes"]
            assert 0 < len(boxes) <= 7
            assert (boxes >= 0).all()
            assert (boxes[:, 2] <= width).all()
            assert (boxes[:, 3] <= height).all()


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    def fresh():
        co = wrapped("deformable", [AtssHead(3), small_rcnn()], generator=torch.Generator().manual_seed(4))
        return co, torch.optim.AdamW(co.parameters(), lr=1e-3)

    def step(co, optimizer, seed):
        out = co(**batch(seed=seed))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        return out.loss.detach()

    co, optimizer = fresh()
    for seed in range(2):
        step(co, optimizer, seed)
    torch.save({"co": co.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = [step(co, optimizer, seed) for seed in (2, 3)]
    other, again = fresh()
    step(other, again, 9)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["co"])
    again.load_state_dict(state["optimizer"])
    assert [step(other, again, seed) for seed in (2, 3)] == expected


def test_transformers_trainer_trains_it_and_resumes(tmp_path):
    data = [{"pixel_values": torch.rand(3, 48, 48), "labels": labels_of([2], seed)[0]} for seed in range(12)]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [r["labels"] for r in rows],
        }

    def trained(resume=None):
        co = wrapped("deformable", [AtssHead(3), small_rcnn()], generator=torch.Generator().manual_seed(4))
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=3, save_steps=2, report_to="none", use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(co, arguments, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return co

    whole = trained()
    again = trained(str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
    one, other = whole.model.bbox_embed[0], whole.model.model.decoder.bbox_embed[0]
    assert one.layers[0].weight is other.layers[0].weight  # a weight with two names


def test_the_host_is_saved_as_a_plain_checkpoint(tmp_path):
    co = wrapped("deformable", [AtssHead(3), small_rcnn()])
    co(**batch()).loss.backward()
    co.model.save_pretrained(tmp_path)
    loaded, info = type(co.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    co.eval()
    loaded.eval()
    with torch.no_grad():
        inputs = {"pixel_values": batch()["pixel_values"]}
        assert torch.equal(loaded(**inputs).logits, co(**inputs).logits)


def test_randomness_is_the_generators_alone():
    state = torch.get_rng_state()
    losses = []
    for seed in (0, 0, 1):
        model = tiny()
        co = CoDetr(model, [AtssHead(3), small_rcnn()], generator=torch.Generator().manual_seed(seed))
        losses.append(co(**batch()).loss.detach())
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_it_takes_the_hosts_precision():
    model = tiny().double()
    co = CoDetr(model, [AtssHead(3), small_rcnn()])
    out = co(**batch(dtype=torch.float64))
    assert out.loss.dtype == torch.float64
    assert {parameter.dtype for parameter in co.parameters()} == {torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        assert wrapped("deformable", [AtssHead(3), small_rcnn()])(**batch()).loss.isfinite()


def test_what_it_cannot_take_is_said():
    with pytest.raises(UserError, match=r"DetrForObjectDetection \(detr\): its queries have no place to start from"):
        CoDetr(tiny("detr"), [AtssHead(3)])
    model = tiny()
    model.config.auxiliary_loss = False
    with pytest.raises(UserError, match="auxiliary_loss = True"):
        CoDetr(model, [AtssHead(3)])
    for settings, message in (
        ({"heads": [AtssHead(4)]}, r"heads\[0\] has 4 classes, the model 3"),
        ({"heads": [], "lambda1": -1.0}, "lambda1=-1.0"),
        ({"heads": [], "max_positives": 3}, "max_positives is 3"),
        ({"heads": [], "finer_maps": -1}, "finer_maps is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            CoDetr(tiny(), **settings)


@pytest.mark.parametrize(
    ("box", "message"),
    [([0.5, 0.5, 0.0, 0.2], r"labels\[2\]: box 1"), ([float("nan"), 0.5, 0.1, 0.2], r"labels\[2\]: box 1")],
)
def test_a_box_without_area_is_named(box, message):
    inputs = batch()
    inputs["labels"][2]["boxes"][1] = torch.tensor(box)
    with pytest.raises(ValueError, match=message):
        wrapped()(**inputs)


def test_masked_queries_and_gradient_checkpointing_are_refused_together():
    co = wrapped(use_zero_padding=True)
    co.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        co(**batch())


def test_a_step_with_gradient_checkpointing_is_the_same_step():
    losses, norms = [], []
    for checkpointed in (False, True):
        co = wrapped()
        if checkpointed:
            co.model.gradient_checkpointing_enable()
        out = co(**batch())
        out.loss.backward()
        losses.append(out.loss.detach())
        norms.append(sum(grad.norm() for grad in gradients(co).values()))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(norms[0], norms[1])


def test_the_adapter_of_the_claims_gives_a_trainee():
    from counterproof.detection.claims.co_detr import CLAIMS, attach

    for arm in {arm.name: arm for claim in CLAIMS for arm in (claim.baseline, claim.method)}.values():
        if arm.method is None:
            continue
        model = tiny()
        trainee = attach(model, median_side=14.0, **arm.settings)
        assert trainee.finish() is model
        assert trainee.module(**batch()).loss.isfinite()
        assert len(trainee.module.heads) == len(arm.settings.get("heads", ["atss"]))
        assert trainee.module.head_loss_scale == 4
    with pytest.raises(ValueError, match="heads fcos are not known"):
        attach(tiny(), median_side=14.0, heads=["fcos"])
    with pytest.raises(ValueError, match="no place to start from"):
        attach(tiny("detr"), median_side=14.0)
