"""Readers of annotated photographs: what they return is what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="readers need pycocotools; scripts/test.sh installs it")

from glesam_ros.datasets import load_bsds, load_camvid, load_coco, read_rgb, region_masks  # noqa: E402
from glesam_ros.labelled import default_palette, read_pixels, write_label_map  # noqa: E402


def test_readers_agree_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "regions").mkdir()
    image = np.zeros((20, 30, 3), np.uint8)
    image[..., 2] = 200  # red in OpenCV's order
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), image)
    square = {"image_id": 1, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]], "iscrowd": 0}
    overlapping = {"image_id": 1, "segmentation": [[10, 10, 20, 10, 20, 18, 10, 18]], "iscrowd": 0}
    crowd = {**square, "iscrowd": 1}
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [square, overlapping, crowd]}
    (tmp_path / "train.json").write_text(json.dumps(document))
    (photograph,) = load_coco(tmp_path, "train")
    assert photograph.image[0, 0].tolist() == [200, 0, 0]
    assert sorted(region_masks(photograph).sum((1, 2)).tolist()) == [80, 100]
    layer = np.zeros((20, 30), np.uint8)
    layer[:, :10], layer[:, 10:] = 1, 2
    cv2.imwrite(str(tmp_path / "regions" / "a_0.png"), layer)
    (tmp_path / "test.txt").write_text("a\n")
    (photograph,) = load_bsds(tmp_path, "test")
    assert region_masks(photograph, 0).sum((1, 2)).tolist() == [200, 400]
    with pytest.raises(FileNotFoundError):
        load_coco(tmp_path, "nowhere")


def test_camvid_regions_are_the_connected_parts_of_each_class(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    classes = np.full((60, 90), 11, np.uint8)  # void
    classes[:20] = 0  # sky is class 0, and a region all the same
    classes[30:50, :20], classes[30:50, 60:85] = 8, 8  # two cars apart
    classes[30:50, 20:40] = 9  # a pedestrian that touches the first
    classes[55:58, 50:53] = 2  # a speck
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), classes)
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), np.zeros((60, 90, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels" / "void.png"), np.full((60, 90), 11, np.uint8))
    cv2.imwrite(str(tmp_path / "images" / "void.jpg"), np.zeros((60, 90, 3), np.uint8))
    (tmp_path / "train.txt").write_text("a\nvoid\n")
    (photograph,) = load_camvid(tmp_path, "train")
    assert sorted(region_masks(photograph).sum((1, 2)).tolist()) == [400, 400, 500, 1800]
    assert photograph.name == "a" and not photograph.alternatives and photograph.layers[0].dtype == np.int16
    (tmp_path / "test.txt").write_text("b\n")
    cv2.imwrite(str(tmp_path / "images" / "b.jpg"), np.zeros((60, 90, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="b.png"):
        load_camvid(tmp_path, "test")
    for wrong in ((60, 91), (60, 90, 3)):
        cv2.imwrite(str(tmp_path / "labels" / "b.png"), np.zeros(wrong, np.uint8))
        with pytest.raises(ValueError, match=rf"b\.png: expected .* \(60, 90\) .*, got {re.escape(str(wrong))}"):
            load_camvid(tmp_path, "test")


def test_an_indexed_label_map_of_camvid_is_read_by_its_index(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    classes = np.full((60, 90), 11, np.uint8)
    classes[30:50, :20] = 8
    write_label_map(tmp_path / "labels" / "a.png", classes, default_palette(256))
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), np.zeros((60, 90, 3), np.uint8))
    (tmp_path / "train.txt").write_text("a\n")
    (photograph,) = load_camvid(tmp_path, "train")
    masks = region_masks(photograph)
    assert masks.dtype == np.bool_ and masks.sum((1, 2)).tolist() == [400]


SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]


def coco(folder: Path, annotation: dict[str, Any], image: dict[str, Any] | None = None) -> Path:
    """A picture of 30 x 20, and a file with one annotation of it beside one of a square."""
    (folder / "images").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "images" / "a.png"), np.zeros((20, 30, 3), np.uint8))
    square = {"id": 7, "image_id": 1, "segmentation": SQUARE}
    images = [{"id": 1, **({"file_name": "a.png"} if image is None else image)}]
    document = {"images": images, "annotations": [square, {**square, "id": 8, **annotation}]}
    (folder / "train.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("segmentation, expected", [
    ([], "expected polygons or RLE, got []"),
    (None, "expected polygons or RLE, got None"),
    ("polygon", "expected polygons or RLE, got str"),
    ([[1, 1, 9]], "expected x, y pairs, got 3 numbers"),
    ([[1, 1, 9, 9]], "expected at least 3 points, got 2"),
    ([[1, 1, 9, 1, 5e7, 9]], "expected points near a picture of 30x20"),
    ([[1, 1, 9, 1, 1e308, 9]], "expected points near a picture of 30x20"),
    ([[1, 1, 9, 1, float("nan"), 9]], "polygon: expected finite numbers"),
    ([[1, 1, 9, 1, 10**400, 9]], "polygon: expected finite numbers"),
    ([[1, 1, 9, True, 9, 9]], "polygon: expected a list of numbers"),
    ({"size": [30, 20], "counts": [0, 600]}, "expected size [20, 30] (height, width), got [30, 20]"),
    ({"size": [20, 30], "counts": [0, 500]}, "expected runs over 600 pixels, got 500"),
])
def test_a_malformed_segmentation_is_named(tmp_path: Path, segmentation: Any, expected: str) -> None:
    folder = coco(tmp_path, {"segmentation": segmentation})
    with pytest.raises(ValueError, match=re.escape(f"train.json, annotation 8: {expected}")) as caught:
        load_coco(folder, "train")
    assert str(caught.value).endswith("; `glesam lqseg build` names what is malformed and leaves it out")


def test_other_faults_of_a_coco_file_are_named(tmp_path: Path) -> None:
    for annotation, image, expected in (
        ({"image_id": [1]}, None, "annotations[1]: expected an object with image_id"),
        ({}, {"id": None}, "images[0]: expected an object with id"),
        ({}, {}, "image 1: expected file_name or coco_url, got None"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"train.json, {expected}")):
            load_coco(coco(tmp_path, annotation, image), "train")
    path = coco(tmp_path, {}) / "train.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"train\.json: expected COCO or LVIS JSON"):
        load_coco(tmp_path, "train")


def test_a_picture_of_another_size_than_its_entry_says_is_named(tmp_path: Path) -> None:
    same = {"file_name": "a.png", "height": 20, "width": 30}
    (photograph,) = load_coco(coco(tmp_path, {}, same), "train")
    assert region_masks(photograph).sum((1, 2)).tolist() == [100, 100]
    for image, expected in (
        ({**same, "height": 40, "width": 60}, "expected height and width (40, 60), got (20, 30)"),  # made smaller
        ({**same, "height": 30, "width": 20}, "expected height and width (30, 20), got (20, 30)"),  # turned
        ({**same, "height": None}, "expected height and width of at least 1 pixel, got (None, 30)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"train.json, image 1: {expected}; `glesam lqseg build`")):
            load_coco(coco(tmp_path, {}, image), "train")
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    assert load_coco(tmp_path, "train") == []  # nothing is in pixels of the picture


def test_lists_have_a_name_a_line_with_or_without_its_ending(tmp_path: Path) -> None:
    for name in ("images/my photo.jpg", "images/b.jpg", "regions/my photo_0.png", "regions/b_0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.ones((20, 30), np.uint8))
    (tmp_path / "test.txt").write_text("my photo\nb.jpg\n\n")
    assert [photograph.name for photograph in load_bsds(tmp_path, "test")] == ["my photo", "b"]


def test_regions_of_a_picture_are_not_those_of_one_with_a_longer_name(tmp_path: Path) -> None:
    for name, annotators in {"a": 2, "a_b": 1, "c[1]": 3}.items():
        for file in (f"images/{name}.jpg", *(f"regions/{name}_{k}.png" for k in range(annotators))):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / file), np.full((20, 30), annotators, np.uint8))
    (tmp_path / "test.txt").write_text("a\na_b\nc[1]\n")
    found = load_bsds(tmp_path, "test")
    assert [(one.name, len(one.layers)) for one in found] == [("a", 2), ("a_b", 1), ("c[1]", 3)]
    assert all((layer == len(one.layers)).all() for one in found for layer in one.layers)
    assert [one.name for one in load_bsds(tmp_path, "test", 2)] == ["a", "a_b"]


def test_pictures_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    path = coco(tmp_path, {}) / "train.json"
    document = json.loads(path.read_text())
    document["images"].append({"id": 2, "file_name": "nowhere.png"})
    document["annotations"].append({"id": 9, "image_id": 2, "segmentation": SQUARE})
    path.write_text(json.dumps(document))
    assert [one.name for one in load_coco(tmp_path, "train", 1)] == ["a.png"]
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        load_coco(tmp_path, "train", 2)


def test_parts_of_a_class_count_from_the_smallest_area_on(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    classes = np.full((60, 90), 11, np.uint8)
    classes[:12, :16], classes[20:32, :16] = 3, 3
    classes[20, 0] = 11  # a pixel less than 192
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), classes)
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), np.zeros((60, 90, 3), np.uint8))
    (tmp_path / "train.txt").write_text("a\n")
    (photograph,) = load_camvid(tmp_path, "train")
    assert region_masks(photograph).sum((1, 2)).tolist() == [192]


def test_lvis_names_its_pictures_by_address(tmp_path: Path) -> None:
    (photograph,) = load_coco(coco(tmp_path, {}, {"coco_url": "http://example.com/train2017/a.png"}), "train")
    assert photograph.name == "a.png" and region_masks(photograph).sum((1, 2)).tolist() == [100, 100]


def test_pictures_of_bsds_without_regions_of_their_size_are_named(tmp_path: Path) -> None:
    for folder in ("images", "regions"):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(FileNotFoundError, match=r"expected label maps of a at .*a_\*\.png, found none"):
        load_bsds(tmp_path, "train")
    cv2.imwrite(str(tmp_path / "regions" / "a_0.png"), np.ones((20, 31), np.uint8))
    with pytest.raises(ValueError, match=r"a_0\.png: expected \(height, width\) \(20, 30\) .* got \(20, 31\)"):
        load_bsds(tmp_path, "train")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_picture_that_is_cut_short_is_no_picture(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert read_rgb(path).shape == (64, 64, 3)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(FileNotFoundError, match=rf"expected a whole picture at .*{re.escape(name)}, .* cut short"):
        read_rgb(path)
    path.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="expected a picture at"):
        read_rgb(path)


def test_pictures_are_turned_as_their_camera_was_held_and_labels_are_not(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs pillow; scripts/test.sh installs it")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name in ("a.jpg", "a.png"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / name, exif=exif)
        for flags, shape in ((cv2.IMREAD_COLOR, (30, 20, 3)), (cv2.IMREAD_UNCHANGED, (20, 30, 3))):
            found = read_pixels(tmp_path / name, flags).shape
            assert found == cv2.imread(str(tmp_path / name), flags).shape
            assert found == shape or name == "a.png"  # OpenCV 4.5 does not read it of PNG
