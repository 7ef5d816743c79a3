import contextlib
import copy
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from counterproof.detection.annotations import DetectionData, Picture
from counterproof.detection.evaluation import evaluate, read_results, write_results
from counterproof.errors import UserError

SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")


def made(objects, category_ids=(2, 5, 11), pictures=None, side=400):
    """Data with objects of (picture id, category id, bbox, crowd, area); ids of annotations from 1."""
    ids = sorted({record[0] for record in objects} | set(pictures or ()))
    built = []
    for identity in ids:
        own = [(number, *record[1:]) for number, record in enumerate(objects, start=1) if record[0] == identity]
        boxes = np.array([record[2] for record in own], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        built.append(
            Picture(
                identity,
                f"{identity}.png",
                side,
                side,
                None,
                boxes,
                np.array([category_ids.index(record[1]) for record in own], np.int64),
                np.array([record[3] for record in own], bool),
                np.array([record[4] for record in own], np.float32),
                np.array([record[0] for record in own], np.int64),
            )
        )
    return DetectionData(tuple(built), tuple("abcdefgh"[: len(category_ids)]), category_ids, "made")


def simple(*objects, **options):
    """Objects of (picture, category, bbox), no crowds, their boxes' areas."""
    return made([(p, c, bbox, False, bbox[2] * bbox[3]) for p, c, bbox in objects], **options)


def detection(picture, category, bbox, score):
    return {"image_id": picture, "category_id": category, "bbox": list(bbox), "score": score}


def pycocotools_scores(data, results):
    """The summary's first nine, and AP and AP50 by category id, by the reference evaluator."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data.to_coco()
        truth.createIndex()
        if results:
            found = truth.loadRes(copy.deepcopy(results))
        else:
            found = COCO()
            found.dataset = {**data.to_coco(), "annotations": []}
            found.createIndex()
        judged = COCOeval(truth, found, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    shares = [math.nan if value == -1 else value for value in judged.stats[:9]]
    precision = judged.eval["precision"][:, :, :, 0, 2]
    by_class = [
        tuple(math.nan if part.size == 0 else part.mean() for part in (kept[kept > -1], fifty[fifty > -1]))
        for kept, fifty in ((precision[:, :, k], precision[0, :, k]) for k in range(len(data.category_ids)))
    ]
    return shares, by_class


def drawn(rng, pictures, most, crowds=0.15):
    """Random objects, and detections near them, doubled, mislabelled and elsewhere, many of equal score."""
    categories = (2, 5, 11)
    objects, results = [], []
    for picture in range(3, 3 + 2 * pictures, 2):
        for _ in range(rng.integers(0, most + 1)):
            x, y = rng.integers(0, 200, 2)
            w, h = rng.integers(4, rng.choice([20, 60, 190]), 2)
            area = float(w * h) * rng.choice([1, 0.6])  # an outline's area is less than its box's
            objects.append(
                (picture, int(rng.choice(categories)), [int(x), int(y), int(w), int(h)], rng.random() < crowds, area)
            )
            for _ in range(rng.integers(0, 4)):
                shifted = [float(v) for v in np.array([x, y, w, h]) + rng.integers(-2, 3, 4) * rng.integers(0, 2)]
                category = objects[-1][1] if rng.random() < 0.8 else int(rng.choice(categories))
                shifted[2:] = [max(value, 1.0) for value in shifted[2:]]
                results.append(detection(picture, category, shifted, float(rng.integers(0, 8) / 8)))
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = (float(v) for v in rng.uniform(1, 150, 4))
            results.append(detection(picture, int(rng.choice(categories)), [x, y, w, h], float(rng.random())))
    rng.shuffle(results)
    return made(objects, categories, pictures=range(3, 3 + 2 * pictures, 2)), results


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 6))
def test_values_are_those_of_pycocotools(seed, pictures, most):
    data, results = drawn(np.random.default_rng(seed), pictures, most)
    found = evaluate(data, results)
    shares, by_class = pycocotools_scores(data, results)
    np.testing.assert_allclose([getattr(found, name) for name in SUMMARY], shares, rtol=0, atol=1e-9)
    for row, expected in zip(found.per_class.values(), by_class, strict=True):
        np.testing.assert_allclose((row["ap"], row["ap50"]), expected, rtol=0, atol=1e-9)


def test_more_than_a_hundred_detections_a_picture():
    rng = np.random.default_rng(0)
    objects = [(1, 2, [int(x), int(y), 20, 20], False, 400.0) for x, y in rng.integers(0, 380, (120, 2))]
    results = [detection(1, 2, objects[i % 120][2], float(rng.random())) for i in range(260)]
    data = made(objects)
    shares, _ = pycocotools_scores(data, results)
    found = evaluate(data, results)
    np.testing.assert_allclose([getattr(found, name) for name in SUMMARY], shares, rtol=0, atol=1e-9)
    assert found.ar100 < 1


THREE = [(1, 2, [10, 10, 20, 20]), (1, 2, [60, 60, 20, 20]), (4, 2, [10, 10, 50, 50])]


def test_finding_everything_exactly_is_one():
    data = simple(*THREE, (4, 5, [200, 200, 120, 130]))
    found = evaluate(data, [detection(*record, 0.9) for record in (*THREE, (4, 5, [200, 200, 120, 130]))])
    for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar10", "ar100"):
        assert getattr(found, name) == 1
    assert found.ar1 == pytest.approx(
        (2 / 3 + 1) / 2
    )  # of picture 1's two objects of category 2, one; classes weigh alike
    assert found.per_class["a"] == {"ap": 1, "ap50": 1, "objects": 3}
    assert found.per_class["b"] == {"ap": 1, "ap50": 1, "objects": 1}
    assert math.isnan(found.per_class["c"]["ap"])
    assert (found.pictures, found.objects, found.detections) == (2, 4, 4)


def test_two_of_three_found_is_precise_up_to_two_thirds_of_recall():
    """Precision is 1 at the recalls 0, .01, ..., .66: 67 of COCO's 101 points."""
    found = evaluate(simple(*THREE), [detection(*record, 0.9) for record in THREE[:2]])
    assert found.ap == pytest.approx(67 / 101)
    assert found.ar100 == pytest.approx(2 / 3)
    assert found.ap_small == 1
    assert found.ap_medium == 0
    assert math.isnan(found.ap_large)


def test_a_second_detection_of_an_object_is_wrong():
    """Ranked first, its double, second: precision 1 to recall .5, then 2/3. Ranked last the double costs nothing."""
    data = simple(*THREE[:2])
    first, second = (detection(*record, 0.9) for record in THREE[:2])
    second["score"] = 0.5
    doubled = evaluate(data, [first, detection(*THREE[0], 0.7), second])
    assert doubled.ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert evaluate(data, [first, detection(*THREE[0], 0.1), second]).ap == 1


def test_iou_decides_at_each_threshold():
    """A box 20 wide shifted by 4 overlaps 16 of 24: IoU 2/3, right at .50, .55, .60 and .65."""
    found = evaluate(simple((1, 2, [10, 10, 20, 20])), [detection(1, 2, [14, 10, 20, 20], 0.5)])
    assert (found.ap, found.ap50, found.ap75) == (pytest.approx(0.4), 1, 0)


def test_detections_where_there_is_nothing_are_wrong():
    data = simple(THREE[0], pictures=[1, 8])
    right = detection(*THREE[0], 0.5)
    assert evaluate(data, [right, detection(8, 2, [1, 1, 5, 5], 0.9)]).ap == pytest.approx(0.5)
    assert evaluate(data, [right, detection(8, 5, [1, 1, 5, 5], 0.9)]).ap == 1  # a class of which there is none


def test_nothing_detected_is_zero_and_crowds_are_neither_found_nor_missed():
    data = made([(1, 2, [10, 10, 20, 20], False, 400), (1, 2, [100, 100, 90, 90], True, 8100)])
    nothing = evaluate(data, [])
    assert (nothing.ap, nothing.ar100, nothing.objects) == (0, 0, 1)
    assert math.isnan(nothing.ap_large)
    inside = [detection(1, 2, [110 + 9 * i, 110, 20, 20], 0.9) for i in range(3)]
    assert evaluate(data, [*inside, detection(1, 2, [10, 10, 20, 20], 0.1)]).ap == 1


def test_annotation_ids_do_not_matter():
    """An id of 0 is taken for no match by the evaluators; ids may also repeat where data sets are joined."""
    data = simple(*THREE)
    results = [detection(*record, 0.9) for record in THREE]
    for ids in ([0, 1, 2], [7, 7, 7], [-1, 0, 10**12]):
        numbers = iter(ids)
        pictures = tuple(
            replace(p, annotation_ids=np.array([next(numbers) for _ in p.boxes], np.int64)) for p in data.pictures
        )
        assert evaluate(replace(data, pictures=pictures), results).ap == 1


def test_pictures_outside_a_subset_do_not_count():
    data, results = drawn(np.random.default_rng(5), 6, 5)
    part = data.subset([1, 4])
    ids = {picture.id for picture in part.pictures}
    kept = [record for record in results if record["image_id"] in ids]
    np.testing.assert_allclose(evaluate(part, kept).ap, pycocotools_scores(part, kept)[0][0], atol=1e-9)
    with pytest.raises(UserError, match="of a picture that the data does not have"):
        evaluate(part, results)


def test_it_is_silent_and_changes_nothing(capfd, recwarn):
    data, results = drawn(np.random.default_rng(2), 4, 4)
    before = copy.deepcopy(results)
    boxes = [picture.boxes.copy() for picture in data.pictures]
    first = evaluate(data, results)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert results == before
    for old, picture in zip(boxes, data.pictures, strict=True):
        np.testing.assert_array_equal(old, picture.boxes)
    again = evaluate(data, results)
    assert again.as_json() == first.as_json()


def test_views():
    found = evaluate(simple(*THREE), [detection(*record, 0.9) for record in THREE[:2]])
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert plain["ap_large"] is None
    assert plain["per_class"]["b"] == {"ap": None, "ap50": None, "objects": 0}
    assert plain["ap"] == found.ap
    lines = found.text().splitlines()
    assert lines[0] == "2 pictures, 3 objects, 2 detections"
    assert any(line.split() == ["AP", "0.663"] for line in lines)
    assert any(line.split() == ["a", "0.663", "0.663", "3"] for line in lines)
    assert any(line.split() == ["b", "-", "-", "0"] for line in lines)
    assert "nan" not in found.text()


# The json


def test_results_are_written_as_plain_numbers_and_read_back(tmp_path):
    data = simple(*THREE)
    records = [
        {"image_id": np.int64(1), "category_id": np.int32(2), "bbox": np.array([1, 2, 3, 4.5], np.float32)}
        | {"score": np.float32(0.25), "extra": object()},
        detection(4, 11, (0, 0, 0, 5), 1),
    ]
    write_results(records, tmp_path / "r.json")
    read = read_results(tmp_path / "r.json", data)
    assert read == [detection(1, 2, [1, 2, 3, 4.5], 0.25), detection(4, 11, [0, 0, 0, 5], 1)]
    assert evaluate(data, records).as_json() == evaluate(data, read).as_json()
    write_results([], tmp_path / "none.json")
    assert read_results(tmp_path / "none.json", data) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results([detection(1, 2, [1, 2, 3, 4], math.nan)], tmp_path / "r.json")
    assert read_results(tmp_path / "r.json", data) == read  # what was there stays


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"image_id": 2}, "picture that the data does not have"),
        ({"image_id": "1"}, "picture that the data does not have"),
        ({"image_id": True}, "picture that the data does not have"),
        ({"category_id": 1}, "category that the data does not have"),
        ({"score": math.nan}, "score is not finite"),
        ({"score": None}, "score is not finite"),
        ({"score": "0.5"}, "score is not finite"),
        ({"bbox": [1, 2, 3]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, math.inf]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "bbox is not four finite numbers"),
        ({"bbox": "1234"}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox is not four finite numbers"),
    ],
)
def test_bad_results_are_named_by_record(tmp_path, change, part):
    data = simple(*THREE)
    records = [detection(*THREE[0], 0.5) for _ in range(9)]
    for index in range(1, 8):
        records[index].update(change)
    (tmp_path / "r.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=part) as caught:
        read_results(tmp_path / "r.json", data)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'r.json'}: 7 detections ")
    assert "record 2 (" in message
    assert "record 6 (" in message
    assert "record 7 (" not in message
    assert "and 2 more" in message
    with pytest.raises(UserError, match=f"results: 7 detections .*{part}"):
        evaluate(data, records)


def test_records_without_a_field_and_files_that_are_not_results(tmp_path):
    data = simple(*THREE)
    file = tmp_path / "r.json"
    with pytest.raises(UserError, match=r"r\.json cannot be read"):
        read_results(file, data)
    for content, part in (
        ("[{}]", r"1 detection without image_id, category_id, bbox, score: record 1"),
        ("[3]", r"1 detection without"),
        ("[", "not a COCO results json"),
        ('{"images": [], "annotations": []}', "looks like COCO annotations"),
        ('{"a": 1}', "holds a dict"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=part):
            read_results(file, data)
