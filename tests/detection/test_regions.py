"""RoIAlign against its definition and maps with a known answer; suppression against the greedy loop."""

import math

import pytest
import torch

from counterproof.assign import box_iou
from counterproof.detection import regions
from counterproof.detection.regions import nms, roi_align, suppress


def by_definition(features, box, image, size, ratio):
    """One region, sample by sample."""
    channels, height, width = features.shape[1:]
    x1, y1, x2, y2 = box.tolist()
    down = ratio or max(1, math.ceil((y2 - y1) / size))
    across = ratio or max(1, math.ceil((x2 - x1) / size))
    result = torch.zeros(channels, size, size, dtype=features.dtype)
    for row in range(size):
        for column in range(size):
            for i in range(down):
                for j in range(across):
                    y = y1 - 0.5 + (y2 - y1) / size * (row + (i + 0.5) / down)
                    x = x1 - 0.5 + (x2 - x1) / size * (column + (j + 0.5) / across)
                    if y < -1 or y > height or x < -1 or x > width:
                        continue
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    low_y, low_x = int(y), int(x)
                    high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
                    fy, fx = y - low_y, x - low_x
                    here = features[image]
                    result[:, row, column] += (
                        (1 - fy) * (1 - fx) * here[:, low_y, low_x]
                        + (1 - fy) * fx * here[:, low_y, high_x]
                        + fy * (1 - fx) * here[:, high_y, low_x]
                        + fy * fx * here[:, high_y, high_x]
                    )
    return result / (down * across)


def random_regions(number=12, height=9, width=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 4, height, width, generator=generator, dtype=torch.float64)
    low = torch.rand(number, 2, generator=generator, dtype=torch.float64) * 9 - 2
    boxes = torch.cat([low, low + torch.rand(number, 2, generator=generator, dtype=torch.float64) * 9 + 0.1], -1)
    return features, boxes, torch.randint(3, (number,), generator=generator)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_regions_are_cut_as_defined(ratio):
    features, boxes, image = random_regions()
    cut = roi_align(features, boxes, image, size=3, sampling_ratio=ratio)
    expected = torch.stack([by_definition(features, box, number, 3, ratio) for box, number in zip(boxes, image)])
    torch.testing.assert_close(cut, expected)


def test_a_constant_map_gives_the_constant_and_a_ramp_the_bins_centres():
    x = torch.arange(12.0, dtype=torch.float64) + 0.5
    ramp = (2 * x[None, :] - 3 * x[:, None] + 5)[None, None]
    boxes = torch.tensor([[2.0, 3.0, 8.0, 9.0]], dtype=torch.float64)
    image = torch.zeros(1, dtype=torch.int64)
    constant = roi_align(torch.full_like(ramp, 7.0), boxes, image, size=3)
    torch.testing.assert_close(constant, torch.full((1, 1, 3, 3), 7.0, dtype=torch.float64))
    middle = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    expected = 2 * (2 + middle)[None, :] - 3 * (3 + middle)[:, None] + 5
    for ratio in (0, 1, 4):
        torch.testing.assert_close(roi_align(ramp, boxes, image, size=3, sampling_ratio=ratio)[0, 0], expected)


def test_far_outside_is_zero_and_no_region_is_none():
    features = torch.ones(2, 3, 5, 5)
    far = roi_align(features, torch.tensor([[20.0, 20.0, 24.0, 24.0]]), torch.tensor([1]), size=2)
    assert torch.equal(far, torch.zeros(1, 3, 2, 2))
    none = roi_align(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), size=2)
    assert none.shape == (0, 3, 2, 2)


def test_the_gradient_reaches_the_map_but_not_the_boxes():
    features, boxes, image = random_regions(number=3)
    features.requires_grad_()
    boxes.requires_grad_()
    roi_align(features, boxes, image, size=2).sum().backward()
    assert boxes.grad is None
    assert features.grad.abs().sum() > 0
    given = (features.detach().requires_grad_(),)
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, image, size=2, sampling_ratio=1), given)


def test_halves_are_placed_as_exactly_as_floats():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2, 90, 90, generator=generator).to(torch.bfloat16)
    boxes = torch.tensor([[80.3, 71.2, 84.1, 75.4]])
    cut = roi_align(features, boxes, torch.tensor([0]), size=2)
    assert cut.dtype == torch.bfloat16
    whole = roi_align(features.float(), boxes, torch.tensor([0]), size=2)
    torch.testing.assert_close(cut, whole.to(torch.bfloat16))


def greedy(boxes, scores, threshold, groups):
    order = sorted(range(len(boxes)), key=lambda place: (-scores[place], place))
    kept = []
    for place in order:
        for other in kept:
            overlap = box_iou(boxes[place : place + 1], boxes[other : other + 1]).item()
            if groups[place] == groups[other] and overlap > threshold:
                break
        else:
            kept.append(place)
    return kept


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_is_the_greedy_one(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(40, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([low, low + torch.rand(40, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.05], -1)
    scores = (torch.rand(40, generator=generator, dtype=torch.float64) * 10).round() / 10  # with ties
    groups = torch.randint(2, (40,), generator=generator)
    found = nms(boxes, scores, threshold, groups).tolist()
    assert found == greedy(boxes, scores.tolist(), threshold, groups.tolist())
    alone = nms(boxes, scores, threshold).tolist()
    assert alone == greedy(boxes, scores.tolist(), threshold, [0] * 40)


def test_a_long_chain_keeps_every_other_box():
    """Each box overlaps only its neighbours: the first suppresses the second, which then spares the third."""
    left = torch.arange(50.0) * 0.5
    boxes = torch.stack([left, torch.zeros(50), left + 1, torch.ones(50)], -1)
    assert suppress(boxes, 0.3).tolist() == [True, False] * 25


def test_a_batch_is_its_images():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 3, 20, 2, generator=generator)
    boxes = torch.cat([low, low + 0.5], -1)
    whole = suppress(boxes, 0.4)
    for i in range(2):
        for j in range(3):
            assert torch.equal(whole[i, j], suppress(boxes[i, j], 0.4))
    assert suppress(torch.zeros(3, 0, 4), 0.5).shape == (3, 0)
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_boxes_without_area_suppress_nothing():
    boxes = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.0).tolist() == [0, 1, 2]


def test_torchvisions_operators_agree_where_they_run(monkeypatch):
    operators = regions._operators()
    if operators is None:
        pytest.skip("torchvision's operators do not run here")
    features, boxes, image = random_regions(number=30)
    scores = torch.linspace(1, 0, 30, dtype=torch.float64)
    fast = roi_align(features, boxes, image), suppress(boxes, 0.3)
    monkeypatch.setattr(regions, "_operators", lambda: None)
    torch.testing.assert_close(roi_align(features, boxes, image), fast[0])
    assert torch.equal(nms(boxes, scores, 0.3), fast[1].nonzero()[:, 0])


def test_a_torchvision_without_operators_is_passed_over(monkeypatch, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in __import__("sys").modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(__import__("sys").modules, name)
    regions._operators.cache_clear()
    try:
        assert regions._operators() is None
    finally:
        regions._operators.cache_clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: roi_align(torch.zeros(2, 3, 4), torch.zeros(1, 4), torch.zeros(1).long()),
            "expected \\(B, C, H, W\\)",
        ),
        (lambda: roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(2, 4), torch.zeros(1).long()), "boxes \\(2, 4\\)"),
        (lambda: roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4), torch.zeros(1).long(), size=0), "size=0"),
        (lambda: nms(torch.zeros(2, 4), torch.zeros(3), 0.5), "scores \\(3,\\)"),
        (lambda: nms(torch.zeros(2, 4), torch.zeros(2), 1.5), "threshold 1.5"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
