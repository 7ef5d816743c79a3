"""Tiny detectors: all trainable, started as the papers' code starts them, and able to learn."""

import pytest
import torch
from transformers import AutoModelForObjectDetection

from counterproof.detection.tiny import TINY_FAMILIES, initialize, tiny_detector


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def family(request):
    return request.param


def test_every_parameter_is_trainable_and_gets_a_gradient(family):
    model = tiny_detector(family)
    assert all(parameter.requires_grad for parameter in model.parameters())
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]])}
    ]
    # A box head whose last layer starts at 0 passes no gradient on: one step first.
    for _ in range(2):
        model(pixel_values=torch.randn(1, 3, 48, 48), labels=labels).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_boxes_start_at_their_reference_with_a_sensible_size_and_classes_at_the_prior(family):
    model = tiny_detector(family, num_queries=9, decoder_layers=3).eval()
    with torch.no_grad():
        out = model(pixel_values=torch.randn(2, 3, 48, 48))
    torch.testing.assert_close(out.pred_boxes[..., 2:], torch.full((2, 9, 2), 0.2315), atol=1e-3, rtol=0)
    if family in ("deformable", "dab"):
        third = torch.tensor([1 / 6, 1 / 2, 5 / 6])
        grid = torch.cartesian_prod(third, third)[:, [1, 0]]
        torch.testing.assert_close(out.pred_boxes[0, :, :2], grid, atol=1e-3, rtol=0)
    if family != "detr":
        assert 0.001 < out.logits.sigmoid().mean() < 0.05
    assert out.logits.shape == (2, 9, 4 if family == "detr" else 3)


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone(family):
    before = torch.random.get_rng_state()
    first, second, other = (tiny_detector(family, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_queries_differ_from_one_another_as_in_the_papers_code(family):
    body = tiny_detector(family).model
    weight = (body.query_refpoint_embeddings if family == "dab" else body.query_position_embeddings).weight
    assert weight.detach().std() > 0.5 * (0.3 if family == "dab" else 1)
    distance = torch.cdist(weight.detach(), weight.detach())
    assert (distance + torch.eye(len(weight)) > 0.1).all()


def test_it_is_a_plain_checkpoint_of_transformers(family, tmp_path):
    model = tiny_detector(family, levels=2 if family == "deformable" else 1, channels=(16, 32)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    pixels = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels).pred_boxes, model(pixel_values=pixels).pred_boxes)


def test_deformable_heads_refine_layer_by_layer():
    model = tiny_detector("deformable", decoder_layers=3)
    heads = [head.layers[-1].bias.detach() for head in model.bbox_embed]
    assert heads[0][2:].tolist() == pytest.approx([-1.2, -1.2])
    assert all(float(bias.abs().max()) == 0 for bias in heads[1:])
    unrefined = tiny_detector("deformable", decoder_layers=3, with_box_refine=False).eval()
    with torch.no_grad():
        boxes = unrefined(pixel_values=torch.randn(1, 3, 48, 48)).pred_boxes
    torch.testing.assert_close(boxes[..., 2:], torch.full((1, 16, 2), 0.2315), atol=1e-3, rtol=0)


def test_the_backbone_stays_as_it_was():
    model = tiny_detector("deformable", seed=1)
    backbone = {name: value.clone() for name, value in model.model.backbone.state_dict().items()}
    initialize(model)
    assert all(torch.equal(value, model.model.backbone.state_dict()[name]) for name, value in backbone.items())


@pytest.mark.parametrize("wrong", [{"family": "yolo"}, {"levels": 3}, {"levels": 0}])
def test_what_does_not_exist_is_refused(wrong):
    with pytest.raises(ValueError, match=r"yolo|levels"):
        tiny_detector(**wrong)
