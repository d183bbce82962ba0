"""Every refusal says what was expected, what came and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glesam_ros.validation import check_boxes, check_classes, check_image, check_points

SIZE = (48, 64)


def test_a_good_image_is_returned_uncopied() -> None:
    image = np.zeros((1, 1, 3), np.uint8)
    assert check_image(image) is image


IMAGES = {
    "list": ([[[0, 0, 0]]], TypeError, "expected a numpy array .* got list"),
    "none": (None, TypeError, "got NoneType; cv2.imread gives None"),
    "name": ("a.jpg", TypeError, "got str; read the file first"),
    "path": (Path("a.jpg"), TypeError, "got PosixPath; read the file first"),
    "nothing in an array": (np.array(None), ValueError, r"\(H, W, 3\), got \(\)$"),
    "grey": (np.zeros((4, 5), np.uint8), ValueError, r"got \(4, 5\); stack a grey image three times"),
    "alpha": (np.zeros((4, 5, 4), np.uint8), ValueError, r"\(H, W, 3\), got \(4, 5, 4\); leave the alpha out"),
    "one channel": (np.zeros((4, 5, 1), np.uint8), ValueError, r"got \(4, 5, 1\); stack a grey image three times"),
    "channels first": (np.zeros((3, 4, 5), np.uint8), ValueError, r"got \(3, 4, 5\); .* image.transpose\(1, 2, 0\)"),
    "batch": (np.zeros((1, 4, 5, 3), np.uint8), ValueError, r"got \(1, 4, 5, 3\); hand in one image at a time"),
    "float": (np.zeros((4, 5, 3)), TypeError, "expected dtype uint8 .* got float64; scale and convert first"),
    "no rows": (np.zeros((0, 5, 3), np.uint8), ValueError, r"at least 1 pixel, got \(0, 5\)"),
    "no columns": (np.zeros((5, 0, 3), np.uint8), ValueError, "at least 1 pixel"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_refused(name: str) -> None:
    image, kind, words = IMAGES[name]
    with pytest.raises(kind, match=words):
        check_image(image)


def test_a_picture_of_pil_is_refused_with_the_way_to_an_array() -> None:
    pil = pytest.importorskip("PIL.Image")
    with pytest.raises(TypeError, match=r"got Image; .* np.asarray\(image.convert\('RGB'\)\)"):
        check_image(pil.new("RGB", (4, 5)))


def test_a_tensor_is_refused_with_the_way_to_an_array() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"got Tensor; .* image.permute\(1, 2, 0\)"):
        check_image(torch.zeros(3, 4, 5))


def test_points_of_one_object() -> None:
    points, labels = check_points([(0, 0), (63.5, 47.9)], [1, 0], SIZE)
    assert points.dtype == labels.dtype == np.float32
    assert points.tolist() == [[[0, 0], [63.5, np.float32(47.9)]]] and labels.tolist() == [[1, 0]]


def test_points_without_labels_are_inside() -> None:
    assert check_points(np.ones((3, 2)), None, SIZE)[1].tolist() == [[1, 1, 1]]
    assert check_points(np.ones((2, 3, 2)), None, SIZE)[1].tolist() == [[1, 1, 1]] * 2


def test_padding_may_lie_anywhere() -> None:
    points = np.array([[[1, 1], [2, 2]], [[3, 3], [-99, 1e6]]])
    checked, labels = check_points(points, [[1, 0], [1, -1]], SIZE)
    assert checked.shape == (2, 2, 2) and labels.tolist() == [[1, 0], [1, -1]]


def test_a_box_replaces_the_inside_point() -> None:
    assert check_points([(1, 1)], [0], SIZE, need_inside=False)[1].tolist() == [[0]]


POINTS = {
    "flat": ([1, 2], None, r"expected shape \(N, 2\) or \(B, N, 2\).* got \(2,\)"),
    "none": (np.zeros((0, 2)), None, r"got \(0, 2\)"),
    "xyz": ([(1, 2, 3)], None, r"got \(1, 3\)"),
    "beyond all floats": ([(10**400, 1)], None, "points: expected numbers"),
    "words": ("here", None, "points: expected numbers"),
    "ragged": ([(1, 2), (3,)], None, "points: expected numbers"),
    "nan": ([(1, np.nan)], None, "points: expected finite"),
    "infinity": ([(np.inf, 1)], None, "points: expected finite"),
    "right of the image": ([(64, 1)], [1], r"0 <= x < 64 and 0 <= y < 48, got \(64, 1\)"),
    "below the image": ([(1, 1), (1, 48)], [1, 1], r"got \(1, 48\)"),
    "left of the image": ([(-0.5, 1)], [1], r"got \(-0.5, 1\)"),
    "above the image": ([(1, -0.5)], [1], r"got \(1, -0.5\)"),
    "outside by an outside point": ([(1, 1), (70, 1)], [1, 0], r"got \(70, 1\)"),
    "too many labels": ([(1, 1)], [1, 0], r"labels: expected shape \(1,\) to match points \(1, 2\), got \(2,\)"),
    "label 2": ([(1, 1)], [2], r"expected 1 \(inside\) or 0 \(outside\), got \[2.0\]"),
    "label 2 beside others": ([(1, 1), (2, 2)], [1, 2], r"or 0 \(outside\), got \[2.0\]"),
    "padding of one object": ([(1, 1)], [-1], r"expected 1 \(inside\) or 0 \(outside\), got \[-1.0\]"),
    "label 3 in a batch": ([[(1, 1)]], [[3]], r"1, 0 or -1 \(padding\), got \[3.0\]"),
    "label nan": ([(1, 1)], [np.nan], "labels: expected finite"),
    "only outside": ([(1, 1)], [0], "at least one 1 .* add a point on the object"),
    "object of padding": ([[(1, 1)], [(1, 1)]], [[1], [-1]], "for object 1"),
    "second object outside": ([[(1, 1)] * 2] * 2, [[1, 0], [0, -1]], r"got \[0.0, -1.0\] for object 1"),
}


@pytest.mark.parametrize("name", POINTS)
def test_points_refused(name: str) -> None:
    points, labels, words = POINTS[name]
    with pytest.raises(ValueError, match=words):
        check_points(points, labels, SIZE)


def test_boxes_that_reach_into_the_image_by_a_part_of_a_pixel_are_taken() -> None:
    given = [(-9, -9, 0.5, 0.5), (63.5, 47.5, 99, 99)]
    assert check_boxes(given, SIZE).tolist() == [[0, 0, 0.5, 0.5], [63.5, 47.5, 64, 48]]


def test_boxes_are_cut_to_the_image() -> None:
    given = np.array([[-5, -5, 10, 10], [60, 40, 999, 999], [1.5, 2.5, 3.5, 4.5]])
    boxes = check_boxes(given, SIZE)
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[0, 0, 10, 10], [60, 40, 64, 48], [1.5, 2.5, 3.5, 4.5]]
    assert given[0, 0] == -5


BOXES: dict[str, tuple[Any, str]] = {
    "flat": ([1, 2, 3, 4], r"expected shape \(M, 4\) .* got \(4,\)"),
    "none": (np.zeros((0, 4)), r"got \(0, 4\)"),
    "three numbers": ([(1, 2, 3)], r"got \(1, 3\)"),
    "corners": (np.zeros((1, 2, 2)), r"got \(1, 2, 2\)"),
    "xywh": ([(20, 20, 10, 10)], r"x1 < x2 and y1 < y2 \(xyxy\), got \(20, 20, 10, 10\)"),
    "no height": ([(1, 5, 9, 5)], "x1 < x2 and y1 < y2"),
    "no width": ([(5, 1, 5, 9)], "x1 < x2 and y1 < y2"),
    "right of the image": ([(64, 1, 70, 9)], r"touches the 64x48 image, got \(64, 1, 70, 9\)"),
    "above the image": ([(1, -9, 5, 0)], "touches the 64x48 image"),
    "left of the image": ([(-9, 1, 0, 5)], "touches the 64x48 image"),
    "below the image": ([(1, 48, 5, 50)], "touches the 64x48 image"),
    "nan": ([(1, 2, np.nan, 4)], "boxes: expected finite"),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxes_refused(name: str) -> None:
    boxes, words = BOXES[name]
    with pytest.raises(ValueError, match=words):
        check_boxes(boxes, SIZE)


def test_a_label_map_of_16_bits_has_room_for_65535_classes_and_a_void() -> None:
    names, palette = [f"class {k}" for k in range(65536)], np.zeros((65536, 3), np.uint8)
    check_classes(names[:65535], palette[:65535])
    with pytest.raises(ValueError, match=r"classes: expected 1\.\.65535 names, got 65536"):
        check_classes(names, palette)
