import copy
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from counterproof.detection.annotations import (
    DetectionData,
    Picture,
    describe_data,
    read_data,
    split_data,
    write_coco,
)
from counterproof.errors import UserError

CONTENT = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "b.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "a.png", "width": 50, "height": 30},
        {"id": 9, "file_name": "empty.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 100, "image_id": 3, "category_id": 18, "bbox": [5, 6, 10, 12.5], "area": 80.5, "iscrowd": 0},
        {"id": 5, "image_id": 7, "category_id": 2, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 1},
        {"id": 42, "image_id": 7, "category_id": 90, "bbox": [1.25, 2.5, 3.07, 4.01]},
        {"id": 41, "image_id": 7, "category_id": 2, "bbox": [50, 30, 20, 10.5], "area": 200, "iscrowd": 0},
    ],
    "categories": [{"id": 90, "name": "cup"}, {"id": 2, "name": "cat"}, {"id": 18, "name": "dog"}],
}


def pixels(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coco(folder, content=CONTENT, name="annotations.json", images="images"):
    """A folder with pictures in images/ and the json."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    for image in CONTENT["images"]:
        Image.fromarray(pixels(image["width"], image["height"], image["id"])).save(folder / images / image["file_name"])
    (folder / name).write_text(json.dumps(content))
    return folder / name


def changed(**sections):
    """CONTENT with records appended, or with keys of the records of an id changed."""
    content = copy.deepcopy(CONTENT)
    for name, change in sections.items():
        if isinstance(change, list):
            content[name] += change
        else:
            for record in content[name]:
                record.update(change.get(record["id"], {}))
    return content


def refused(path, *parts, **options):
    with pytest.raises(UserError) as caught:
        read_data(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


# COCO, read


def test_boxes_labels_crowds_and_areas(tmp_path):
    file = coco(tmp_path)
    data = read_data(f"coco:{file},{tmp_path / 'images'}")
    assert data.classes == ("cat", "dog", "cup")
    assert data.category_ids == (2, 18, 90)
    assert [(p.id, p.name, p.width, p.height) for p in data.pictures] == [
        (7, "b.png", 60, 40),
        (3, "a.png", 50, 30),
        (9, "empty.png", 20, 20),
    ]
    first, second, empty = data.pictures
    np.testing.assert_array_equal(first.annotation_ids, [5, 42, 41])
    np.testing.assert_array_equal(first.labels, [0, 2, 0])
    np.testing.assert_array_equal(first.crowd, [True, False, False])
    np.testing.assert_allclose(first.boxes, [[0, 0, 60, 40], [1.25, 2.5, 4.32, 6.51], [50, 30, 60, 40]], rtol=1e-6)
    np.testing.assert_allclose(first.areas, [2400, 3.07 * 4.01, 200], rtol=1e-6)
    np.testing.assert_array_equal(second.boxes, [[5, 6, 15, 18.5]])
    assert first.clipped == 1
    assert second.clipped == 0
    assert empty.boxes.shape == (0, 4)
    assert data.objects == 3
    for picture in data.pictures:
        dtypes = [getattr(picture, n).dtype for n in ("boxes", "labels", "crowd", "areas", "annotation_ids")]
        assert dtypes == [np.float32, np.int64, np.bool_, np.float32, np.int64]
    for index, picture in enumerate(data.pictures):
        np.testing.assert_array_equal(data.pixels(index), pixels(picture.width, picture.height, picture.id))
    assert data.notes == ()


@pytest.mark.parametrize("shape", ["folder", "json", "beside", "coco", "roboflow", "mscoco", "only"])
def test_every_layout_reads_the_same(tmp_path, shape, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = {
        "folder": lambda: coco(tmp_path).parent,
        "json": lambda: coco(tmp_path, name="anything.json"),
        "beside": lambda: coco(tmp_path, images="."),
        "coco": lambda: (coco(tmp_path, images="pics"), Path("coco:annotations.json,pics/"))[1],
        "roboflow": lambda: coco(tmp_path, name="_annotations.coco.json", images=".").parent,
        "mscoco": lambda: (
            (tmp_path / "annotations").mkdir(),
            coco(tmp_path, name="annotations/instances_val2017.json", images="val2017"),
        )[1],
        "only": lambda: coco(tmp_path, name="mine.json").parent,
    }[shape]()
    data = read_data(spec, check_pictures=True)
    assert [picture.file.is_file() for picture in data.pictures] == [True] * 3
    assert data.objects == 3


def test_a_folder_with_several_jsons_names_them(tmp_path):
    coco(tmp_path, name="instances_train.json")
    coco(tmp_path, name="instances_val.json")
    refused(tmp_path, "instances_train.json", "instances_val.json", "coco:")


def test_a_folder_that_only_holds_folders_of_data_names_them(tmp_path):
    coco(tmp_path / "train", name="_annotations.coco.json", images=".")
    coco(tmp_path / "valid", name="_annotations.coco.json", images=".")
    refused(tmp_path, tmp_path / "train", tmp_path / "valid")


def test_a_width_that_is_not_stated_is_read_from_the_picture(tmp_path):
    content = changed()
    del content["images"][0]["width"]
    assert read_data(coco(tmp_path, content)).pictures[0].width == 60


def test_what_pycocotools_reads_back_is_what_was_read(tmp_path, capsys):
    file = coco(tmp_path, changed(annotations={41: {"bbox": [473.07 - 450, 5.04, 38.65 - 20, 28.01]}}))
    data = read_data(file)
    write_coco(data, tmp_path / "out.json")
    theirs, ours = COCO(str(file)), COCO(str(tmp_path / "out.json"))
    for identity, annotation in theirs.anns.items():
        written = ours.anns[identity]
        assert written["category_id"] == annotation["category_id"]
        assert written["image_id"] == annotation["image_id"]
        assert written["iscrowd"] == annotation.get("iscrowd", 0)
        assert written["bbox"] == pytest.approx(annotation["bbox"], abs=5e-6)
    assert ours.anns[42]["bbox"] == [1.25, 2.5, 3.07, 4.01]  # decimals as they were, not as float32 has them
    assert {c["id"]: c["name"] for c in ours.loadCats(ours.getCatIds())} == {2: "cat", 18: "dog", 90: "cup"}
    again = read_data(f"coco:{tmp_path / 'out.json'},{tmp_path / 'images'}")
    for before, after in zip(data.pictures, again.pictures, strict=True):
        np.testing.assert_array_equal(before.boxes, after.boxes)
        np.testing.assert_array_equal(before.areas, after.areas)
        np.testing.assert_array_equal(before.crowd, after.crowd)
        np.testing.assert_array_equal(before.labels, after.labels)
    capsys.readouterr()


QUARTERS = st.tuples(*[st.integers(-120, 200)] * 2, *[st.integers(1, 300)] * 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(QUARTERS, min_size=1))
def test_clipping_is_the_intersection_with_the_picture(tmp_path_factory, quarters):
    """Box by box, in quarters of a pixel, which float32 holds exactly."""
    width, height = 50, 30
    boxes = [[value / 4 for value in box] for box in quarters]
    boxes = [(x, y, w, h) for x, y, w, h in boxes if x < width and y < height and x + w > 0 and y + h > 0]
    if not boxes:
        return
    content = {
        "images": [CONTENT["images"][1]],
        "categories": CONTENT["categories"],
        "annotations": [
            {"id": i, "image_id": 3, "category_id": 2, "bbox": list(box)} for i, box in enumerate(boxes, start=1)
        ],
    }
    (picture,) = read_data(coco(tmp_path_factory.mktemp("clip"), content)).pictures
    expected = [[max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)] for x, y, w, h in boxes]
    np.testing.assert_array_equal(picture.boxes, expected)
    assert picture.clipped == sum(max(-x, -y, x + w - width, y + h - height) > 1 for x, y, w, h in boxes)


# COCO, refused

DROPPABLE = {
    "outside": ([70, 10, 5, 5], "lies outside the picture"),
    "left of it": ([-9, 3, 9, 5], "lies outside the picture"),
    "no width": ([5, 5, 0, 5], "has no area"),
    "negative": ([5, 5, 5, -2], "has no area"),
    "thinner than float32": ([40, 5, 1e-12, 5], "has no area"),
    "nan": ([float("nan"), 5, 5, 5], "is not finite"),
    "inf": ([5, 5, float("inf"), 5], "is not finite"),
    "too large": ([5, 5, 1e300, 5], "is not finite"),
}


@pytest.mark.parametrize("bbox", DROPPABLE)
def test_bad_boxes_are_named_or_left_out_with_a_note(tmp_path, bbox):
    box, reason = DROPPABLE[bbox]
    file = coco(tmp_path, changed(annotations={42: {"bbox": box}}))
    refused(
        file, file, "1 annotation whose box " + reason, "id 42 (image 7, bbox", "counterproof detection convert", file
    )
    data = read_data(file, drop_bad_boxes=True)
    np.testing.assert_array_equal(data.pictures[0].annotation_ids, [5, 41])
    (note,) = data.notes
    assert "id 42" in note
    assert reason in note
    write_coco(data, tmp_path / "clean.json")
    assert read_data(f"coco:{tmp_path / 'clean.json'},{tmp_path / 'images'}").notes == ()


def test_bad_records_are_counted_and_five_are_listed(tmp_path):
    more = [{"id": 1000 + i, "image_id": 3, "category_id": 2, "bbox": [1, 1, 0, 0]} for i in range(8)]
    message = refused(coco(tmp_path, changed(annotations=more)), "8 annotations whose box has no area", "and 3 more")
    assert re.findall(r"id (10\d\d)", message) == ["1000", "1001", "1002", "1003", "1004"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (changed(annotations={42: {"category_id": 3}}), ["a category that is not there", "id 42", "2, 18, 90"]),
        (changed(annotations={42: {"category_id": True}}), ["a category that is not there", "id 42"]),
        (changed(annotations={42: {"image_id": 8}}), ["an image that is not there", "id 42"]),
        (changed(annotations={42: {"image_id": [7]}}), ["an image that is not there", "id 42"]),
        (changed(annotations={42: {"id": 5}}), ["annotation id used more than once", ": 5"]),
        (changed(annotations={42: {"id": "x"}}), ["whole number as id", "'x'"]),
        (changed(annotations={42: {"bbox": [1, 2, 3]}}), ["not four numbers", "id 42", "[1, 2, 3]"]),
        (changed(annotations={42: {"bbox": ["1", 2, 3, 4]}}), ["not four numbers", "id 42"]),
        (changed(annotations={42: {"bbox": [None, 2, 3, 4]}}), ["not four numbers", "id 42"]),
        (changed(annotations={42: {"bbox": [10**400, 2, 3, 4]}}), ["not four numbers", "id 42"]),
        (changed(annotations={42: {"bbox": None}}), ["not four numbers", "id 42"]),
        (changed(annotations={42: {"area": "big"}}), ["area", "id 42"]),
        (changed(annotations={42: {"area": float("nan")}}), ["area", "id 42"]),
        (changed(annotations={42: {"iscrowd": 2}}), ["iscrowd", "id 42"]),
        (changed(images={9: {"id": 7}}), ["image id used more than once", ": 7"]),
        (changed(images={9: {"id": "9"}}), ["whole number as id", "'9'"]),
        (changed(images={9: {"file_name": None}}), ["file_name", "id 9"]),
        (changed(images={9: {"width": 0}}), ["width or height", "id 9"]),
        (changed(images={9: {"file_name": "a\0b/" + "c" * 300}}), ["1 picture that is missing", "id 9"]),
        (changed(images={9: {"file_name": "gone.png"}}), ["1 picture that is missing", "id 9 (gone.png)", "images"]),
        (changed(categories={18: {"id": 2}}), ["several categories have the id 2"]),
        (changed(categories={18: {"name": "cup"}}), ["18, 90 are all called 'cup'"]),
        (changed(categories={18: {"name": ""}}), ["category number 3"]),
        ({**CONTENT, "images": []}, ["holds no images"]),
        ({**CONTENT, "annotations": []}, ["holds no annotations"]),
        (changed(annotations={i: {"iscrowd": 1} for i in (5, 41, 42, 100)}), ["only crowds"]),
        ({**CONTENT, "categories": None}, ["'categories'"]),
        ({"images": CONTENT["images"]}, ["'annotations'", "only 'images'"]),
        ({}, ["'images'"]),
        ([{"image_id": 3, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}], ["looks like COCO results"]),
        ([{"data": 3}], ["a list of records with data"]),
        ([], ["a list of 0 entries"]),
        (3, ["holds a int"]),
        ({"shapes": [], "imagePath": "a.png"}, ["labelme"]),
        ({"_via_img_metadata": {}}, ["VIA"]),
        (
            {"images": CONTENT["images"], "annotations": [{"id": 1, "image_id": 3, "caption": "a cat"}]},
            ["captions"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else "",
)
def test_what_is_refused(tmp_path, content, parts):
    file = coco(tmp_path, content)
    refused(file, file.name, *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<annotation><object/></annotation>", "Pascal VOC"),
        ("0 .5 .5 .25 .25\n1 .5 .5 .1 .1\n", "YOLO labels"),
        ('{"id": 1}\n{"id": 2}\n', "JSON lines"),
        ("{", "not a COCO json"),
    ],
)
def test_other_formats_are_recognised(tmp_path, text, part):
    (tmp_path / "a.json").write_text(text)
    refused(tmp_path / "a.json", "a.json", part)


def test_pascal_voc_and_pictures_and_nothing(tmp_path):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "a.xml").write_text("<annotation/>")
    refused(tmp_path / "voc", "Pascal VOC")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "neither a COCO json", "data.yaml")
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "a.png", "looks like a picture")
    refused(tmp_path / "gone.json", "gone.json is not there")
    refused(f"coco:{coco(tmp_path)},{tmp_path / 'gone'}", "gone")
    refused(coco(tmp_path), "no splits", split="val")


def test_pictures_in_another_folder_are_asked_for(tmp_path):
    file = coco(tmp_path, images="elsewhere")
    refused(file, "none of its 3 pictures", f"coco:{file},FOLDER")


def test_roboflows_empty_category_of_the_same_name_is_left_out(tmp_path):
    data = read_data(coco(tmp_path, changed(categories=[{"id": 0, "name": "cat"}])))
    assert data.classes == ("cat", "dog", "cup")
    assert "category 0" in data.notes[0]


# Pictures


def test_a_picture_of_another_size_and_a_damaged_one_are_named(tmp_path):
    file = coco(tmp_path)
    other = tmp_path / "images" / "a.png"
    Image.fromarray(pixels(49, 30)).save(other)
    refused(file, "1 picture of another size", other, "49x30", "50x30", check_pictures=True)
    data = read_data(file)
    with pytest.raises(UserError, match=r"a\.png \(image 3\) is 49x30, stated 50x30"):
        data.pixels(1)
    other.write_text("no picture")
    refused(file, "1 picture that cannot be read", other, check_pictures=True)
    with pytest.raises(UserError, match=r"a\.png is not a picture"):
        data.pixels(1)
    other.unlink()
    with pytest.raises(UserError, match=r"a\.png is not there"):
        data.pixels(1)
    Image.fromarray(pixels(50, 30)).save(other)
    other.write_bytes(other.read_bytes()[:-2000])  # the header is whole
    assert read_data(file, check_pictures=True).objects == 3
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        data.pixels(1)
    Image.fromarray(np.zeros((30, 50), np.uint16)).save(other)
    with pytest.raises(UserError, match="8 bits"):
        data.pixels(1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stated", ["stored", "turned"])
def test_a_picture_is_turned_when_the_stated_size_says_so(tmp_path, orientation, stated):
    """A 40 x 20 picture whose left upper corner is white, in every EXIF orientation; where white must be then."""
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    swaps = orientation >= 5
    size = (20, 40) if swaps and stated == "turned" else (40, 20)
    record = {"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    content = {"images": [record], "annotations": [annotation], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    seen = read_data(tmp_path / "a.json", check_pictures=True).pixels(0)
    assert seen.shape == (size[1], size[0], 3)
    # where the stored corner comes to lie in the upright picture (EXIF 2.3, the tag's table)
    upright = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    corner = "tl" if swaps and stated == "stored" else upright
    rows = slice(0, 6) if corner[0] == "t" else slice(-6, None)
    columns = slice(0, 6) if corner[1] == "l" else slice(-6, None)
    assert seen[rows, columns].mean() > 230
    assert seen.mean() < 60


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pixels_are_rgb(tmp_path, mode):
    file = coco(tmp_path)
    suffix = "tif" if mode == "CMYK" else "png"
    stored = Image.fromarray(pixels(50, 30, 3)).convert(mode)
    stored.save(tmp_path / "images" / f"x.{suffix}")
    file.write_text(json.dumps(changed(images={3: {"file_name": f"x.{suffix}"}})))
    seen = read_data(file).pixels(1)
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, np.asarray(stored.convert("RGB")))
    seen[:] = 0  # a copy that may be written to


# YOLO


def yolo(folder, labels, yaml="names: [cat, dog]\ntrain: images/train\nval: images/val\n", size=(50, 40)):
    """Labels by split/name; a picture for each, a label file unless None."""
    for key, text in labels.items():
        picture = folder / "images" / f"{key}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(*size)).save(picture)
        label = folder / "labels" / f"{key}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_text(text)
    if yaml:
        (folder / "data.yaml").write_text(yaml)
    return folder


LABELS = {
    "train/a": "0 .5 .5 .2 .5\n1 0.9 0.5 0.2 0.1\n",
    "train/none": None,
    "val/b": "\n1 0.1 0.2 0.5 0.1 0.3 0.9\n",
    "val/empty": "",
}


def test_yolo_boxes_and_outlines(tmp_path):
    data = read_data(yolo(tmp_path, LABELS))
    assert data.classes == ("cat", "dog")
    assert [picture.name for picture in data.pictures] == [
        f"images/{n}.png" for n in ("train/a", "train/none", "val/b", "val/empty")
    ]
    first, none, outline, empty = data.pictures
    np.testing.assert_allclose(first.boxes, [[20, 10, 30, 30], [40, 18, 50, 22]], atol=1e-5)
    np.testing.assert_allclose(outline.boxes, [[5, 4, 25, 36]], atol=1e-5)
    np.testing.assert_array_equal(first.labels, [0, 1])
    np.testing.assert_array_equal(outline.labels, [1])
    np.testing.assert_allclose(first.areas, [200, 40], rtol=1e-5)
    assert none.boxes.shape == empty.boxes.shape == (0, 4)
    assert (first.width, first.height) == (50, 40)
    assert data.pixels(0).shape == (40, 50, 3)


@pytest.mark.parametrize(
    "yaml",
    [
        "names: {0: cat, 1: dog}\npath: .\ntrain: images/train\nval: [images/val]\nnc: 2\n",
        "names: [cat, dog]\npath: /gone/on/this/machine\ntrain: ../images/train\nval: ../images/val\n",
        "names: [cat, dog]\ntrain: list.txt\nval: images/val\n",
        "names: [cat, dog]\ntrain: images\nval: images/val\n",
    ],
)
def test_yolo_yamls_of_every_kind(tmp_path, yaml):
    folder = yolo(tmp_path, LABELS, yaml)
    (folder / "list.txt").write_text("./images/train/a.png\nimages/train/none.png\n")
    expected = {"a", "none", "b", "empty"}
    for spec in (folder, f"yolo:{folder}", folder / "data.yaml"):
        data = read_data(spec)
        assert {picture.file.stem for picture in data.pictures} == expected
        assert len(data.pictures) == 4  # a picture of two splits counts once
        assert data.objects == 3


def test_yolo_splits(tmp_path):
    folder = yolo(tmp_path, {**LABELS, "test/t": "0 .5 .5 .5 .5"}, yaml=None)
    (folder / "classes.txt").write_text("cat\ndog\n\n")
    names = {
        split: [picture.file.stem for picture in read_data(folder, split=split).pictures] for split in ("train", "test")
    }
    assert names == {"train": ["a", "none"], "test": ["t"]}
    assert [picture.file.stem for picture in read_data(folder).pictures] == ["a", "none", "b", "empty"]
    refused(folder, "'dev' is none of", split="dev")
    (folder / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\n")
    assert len(read_data(folder).pictures) == 2
    refused(folder, "names no val pictures, only train", split="val")


def test_yolo_labels_beside_pictures(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 .5 .5 1 1")
    (tmp_path / "data.yaml").write_text("names: [x]\ntrain: .\n")
    np.testing.assert_array_equal(read_data(tmp_path).pictures[0].boxes, [[0, 0, 10, 10]])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("0 .5 .5 .2", "not `class x y width height`"),
        ("0 .5 .5 .2 .2 .9", "not `class x y width height`"),
        ("0 a .5 .2 .2", "not `class x y width height`"),
        ("2 .5 .5 .2 .2", "class that is not there"),
        ("0.5 .5 .5 .2 .2", "class that is not there"),
        ("cat .5 .5 .2 .2", "class that is not there"),
    ],
)
def test_yolo_lines_that_are_refused(tmp_path, line, part):
    folder = yolo(tmp_path, {**LABELS, "train/a": f"0 .5 .5 .2 .2\n\n{line}\n"})
    refused(folder, f"{folder / 'labels' / 'train' / 'a.txt'}, line 3", part)
    refused(folder, part, drop_bad_boxes=True)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("0 30 20 10 10", "shares of the picture's width and height, not pixels"),
        ("0 .5 .5 0 .2", "has no area"),
        ("0 nan .5 .2 .2", "is not finite"),
        ("0 .1 nan .2 .2 .3 .3", "is not finite"),
    ],
)
def test_yolo_boxes_that_are_refused_or_left_out(tmp_path, line, part):
    folder = yolo(tmp_path, {**LABELS, "train/a": f"0 .5 .5 .2 .2\n{line}\n"})
    refused(folder, "1 label whose box", "a.txt, line 2", part, "counterproof detection convert")
    data = read_data(folder, drop_bad_boxes=True)
    assert len(data.pictures[0].boxes) == 1
    assert "a.txt, line 2" in data.notes[0]


def test_yolo_folders_that_are_refused(tmp_path):
    folder = yolo(tmp_path, LABELS)
    yaml = folder / "data.yaml"
    for text, part in (
        ("names: [cat, dog]\nnc: 3\ntrain: images\n", "nc is 3"),
        ("names: [cat, cat]\ntrain: images\n", "'cat'"),
        ("train: images\n", "no `names`"),
        ("names: 3\ntrain: images\n", "names is 3"),
        ("names: [cat, dog]\ntrain: gone\n", "train is gone"),
        ("names: [cat, dog]\n", "no train or val pictures"),
        ("names: [cat, dog\n", "cannot be read as YAML"),
        ("names: [cat, dog]\ntrain: labels\n", "holds no pictures"),
    ):
        yaml.write_text(text)
        refused(folder, part)
    yaml.unlink()
    refused(folder, "no classes", "classes.txt")
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "results.json").write_text("[]")  # is no reason to ask
    assert read_data(folder).classes == ("cat", "dog")
    coco(tmp_path)
    refused(folder, "coco:", f"yolo:{folder}")
    assert read_data(f"yolo:{folder}").classes == ("cat", "dog")
    (folder / "images" / "val" / "b.png").write_text("x")
    refused(f"yolo:{folder}", "1 picture that cannot be read", "b.png")


def test_yolo_without_objects_and_label_files_alone(tmp_path):
    folder = yolo(tmp_path, dict.fromkeys(LABELS))
    refused(folder, "holds no objects", "labels")
    folder = yolo(tmp_path, LABELS)
    (folder / "labels" / "train" / "gone.txt").write_text("0 .5 .5 .5 .5")
    assert "1 label file without a picture" in read_data(folder).notes[0]
    assert "gone.txt" in read_data(folder).notes[0]


def test_yolo_turned_pictures_are_upright(tmp_path):
    folder = yolo(tmp_path, {"train/a": None, "val/b": "0 .5 .5 .5 .5"})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(50, 40)).save(folder / "images" / "train" / "c.jpg", exif=exif)
    (folder / "labels" / "train" / "c.txt").write_text("0 .5 .5 .5 .5")
    picture = read_data(folder).pictures[1]
    assert (picture.width, picture.height) == (40, 50)
    np.testing.assert_allclose(picture.boxes, [[10, 12.5, 30, 37.5]])


def test_yolo_becomes_coco(tmp_path):
    data = read_data(yolo(tmp_path, LABELS))
    write_coco(data, tmp_path / "out.json")
    again = read_data(f"coco:{tmp_path / 'out.json'},{tmp_path}", check_pictures=True)
    assert again.classes == data.classes
    for before, after in zip(data.pictures, again.pictures, strict=True):
        assert before.file == after.file
        np.testing.assert_array_equal(before.boxes, after.boxes)
        np.testing.assert_array_equal(before.labels, after.labels)


# What is done with data


def many(pictures=25, held=True):
    rng = np.random.default_rng(1)
    boxes = np.array([[1, 2, 9, 8]], np.float32)
    return DetectionData(
        tuple(
            Picture(
                10 + index,
                f"{index}.png",
                12,
                10,
                None,
                boxes,
                np.array([index % 2]),
                np.zeros(1, bool),
                np.array([48], np.float32),
                np.array([index]),
            )
            for index in range(pictures)
        ),
        ("a", "b"),
        (4, 6),
        "made",
        [rng.integers(0, 256, (10, 12, 3), dtype=np.uint8) for _ in range(pictures)] if held else None,
    )


def test_subsets_keep_pixels_with_their_pictures():
    data = many()
    part = data.subset([3, 20])
    assert [picture.id for picture in part.pictures] == [13, 30]
    np.testing.assert_array_equal(part.pixels(1), data.pixels(20))
    part.pixels(1)[:] = 0
    np.testing.assert_array_equal(part.images[1], data.images[20])
    assert data.images[20].any()
    with pytest.raises(ValueError, match="1 images for 25 pictures"):
        DetectionData(data.pictures, data.classes, data.category_ids, "made", data.images[:1])
    with pytest.raises(ValueError, match="not ascending"):
        DetectionData(data.pictures, data.classes, (6, 4), "made")


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_splits_are_a_partition(pictures, share, seed):
    data = many(pictures, held=False)
    train, held_out = split_data(data, share, np.random.default_rng(seed))
    ids = [picture.id for part in (train, held_out) for picture in part.pictures]
    assert sorted(ids) == [picture.id for picture in data.pictures]
    assert len(held_out.pictures) == min(max(round(share * pictures), 1), pictures - 1)
    again = split_data(data, share, np.random.default_rng(seed))[1]
    assert [p.id for p in again.pictures] == [p.id for p in held_out.pictures]


def test_splits_differ_by_seed_and_refuse_nonsense():
    data = many(40)
    ids = {tuple(p.id for p in split_data(data, 0.25, np.random.default_rng(s))[1].pictures) for s in range(4)}
    assert len(ids) == 4
    for share in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            split_data(data, share, np.random.default_rng(0))
    with pytest.raises(ValueError, match="1 pictures"):
        split_data(data.subset([0]), 0.5, np.random.default_rng(0))


def test_description(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = many().to_coco()
    content["images"] += [{"id": 500, "file_name": "wide.png", "width": 30, "height": 10}]
    content["annotations"][0]["bbox"] = [-3, 0, 9, 9]
    content["annotations"][1]["bbox"] = [-0.5, 0, 9, 9]
    content["annotations"] += [{"id": 99, "image_id": 10, "category_id": 4, "bbox": [1, 1, 2, 2], "iscrowd": 1}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "pics").mkdir()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "pics" / image["file_name"])
    assert describe_data(Path("coco:a.json,pics")) == (
        "26 pictures, 25 objects of 2 classes (a, b), 12x10 to 30x10, 1 crowd, 1 box clipped at the edge, "
        "1 without objects; a fifth of the pictures (5) is held out"
    )
    content["annotations"] = content["annotations"][:19]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="objects in 19 of its 26 pictures; give at least 20"):
        describe_data(Path("coco:a.json,pics"))
    os.truncate(tmp_path / "pics" / "3.png", 0)
    with pytest.raises(UserError, match=r"3\.png"):
        describe_data(Path("coco:a.json,pics"))


def test_inputs_are_not_changed(tmp_path):
    data = many()
    before = copy.deepcopy(data)
    data.to_coco()["annotations"][0]["bbox"][0] = 99
    write_coco(data, tmp_path / "a.json")
    split_data(data, 0.5, np.random.default_rng(0))
    for old, new in zip(before.pictures, data.pictures, strict=True):
        np.testing.assert_array_equal(old.boxes, new.boxes)
