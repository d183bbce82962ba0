"""What the overlay changes, and what it must leave alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import cv2
import numpy as np
import pytest

from glesam_ros.instances import Instances
from glesam_ros.overlay import PALETTE, draw_classes, draw_overlay, strip_height
from glesam_ros.semantic import SemanticMap

HEIGHT, WIDTH = 240, 400


Window = tuple[int, int, int, int]


def instances(windows: list[Window], size: tuple[int, int] = (HEIGHT, WIDTH), **given: Any) -> Instances:
    """Rectangles xyxy as instances, best first."""
    count = len(windows)
    masks = np.zeros((count, *size), np.bool_)
    for k, (x1, y1, x2, y2) in enumerate(windows):
        masks[k, y1:y2, x1:x2] = True
    return Instances(
        masks=masks,
        boxes=np.array(windows, np.float32).reshape(count, 4),
        scores=np.linspace(0.9, 0.6, count).astype(np.float32),
        stability=np.ones(count, np.float32),
        ids=np.array(given.get("ids", np.arange(1, count + 1)), np.int32),
        degradation=given.get("degradation", 0.25),
        enhanced=given.get("enhanced", False),
    )


def picture(size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


# one with room for a number, one small, one that touches the border, one that overlaps the first
WINDOWS = [(60, 60, 220, 160), (250, 70, 262, 80), (380, 200, 400, 240), (200, 100, 300, 200)]
SMALL = (slice(72, 78), slice(252, 260))  # inside of the small one, beyond its contour


def test_pixels_outside_masks_and_strip_are_untouched() -> None:
    image, found = picture(), instances(WINDOWS)
    out = draw_overlay(image, found, 0.7)
    outside = found.label_map() == 0
    outside[: strip_height(found.size)] = False
    assert outside.sum() > 1000
    np.testing.assert_array_equal(out[outside], image[outside])


def test_the_input_is_left_as_it_is() -> None:
    image, found = picture(), instances(WINDOWS)
    before, masks = image.copy(), found.masks.copy()
    out = draw_overlay(image, found, 1.0)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(found.masks, masks)
    assert not np.shares_memory(out, image)
    assert out.shape == image.shape and out.dtype == np.uint8
    image.setflags(write=False)
    np.testing.assert_array_equal(draw_overlay(image, found, 1.0), out)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_alpha_mixes_colour_into_the_inside(alpha: float) -> None:
    image, found = picture(), instances(WINDOWS)
    out = draw_overlay(image, found, alpha)
    expected = (1 - alpha) * image[SMALL].astype(float) + alpha * PALETTE[1]
    np.testing.assert_allclose(out[SMALL].astype(float), expected, atol=1)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_contours_are_crisp_and_inside(alpha: float) -> None:
    image, found = picture(), instances(WINDOWS[1:2])
    out = draw_overlay(image, found, alpha)
    ring = np.zeros((HEIGHT, WIDTH), np.bool_)
    ring[70:80, 250:262] = True
    ring[71:79, 251:261] = False
    np.testing.assert_array_equal(out[ring], np.broadcast_to(PALETTE[0], (ring.sum(), 3)))


def test_no_contour_along_the_image_border() -> None:
    image, found = picture(), instances(WINDOWS[2:3])
    out = draw_overlay(image, found, 0.0)
    np.testing.assert_array_equal(out[210:, -1], image[210:, -1])


def test_colour_follows_the_id_not_the_row() -> None:
    image = picture()
    one = draw_overlay(image, instances(WINDOWS, ids=[7, 2, 3, 4]), 1.0)
    other = draw_overlay(image, instances(WINDOWS[1:2], ids=[2]), 1.0)
    np.testing.assert_array_equal(one[SMALL], other[SMALL])
    far = draw_overlay(image, instances(WINDOWS[1:2], ids=[65534]), 1.0)
    np.testing.assert_array_equal(far[75, 255], PALETTE[65533 % len(PALETTE)])


def test_colours_are_told_apart() -> None:
    gaps = np.abs(PALETTE[:, None].astype(int) - PALETTE[None]).sum(-1)
    assert gaps[~np.eye(len(PALETTE), dtype=bool)].min() >= 60


def test_numbers_only_where_there_is_room() -> None:
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    out = draw_overlay(image, instances(WINDOWS[:2]), 0.0)
    assert (out[70:150, 70:210] != 90).any()  # white letters on the large one
    assert out[70:150, 70:210].max() > 200
    assert (out[SMALL] == 90).all()


def written(found: Instances, ground: int = 90) -> tuple[tuple[float, float], np.ndarray[Any, Any]] | None:
    """The middle xy of what is written into a lone instance on a flat picture, and its pixels; None for nothing."""
    image = np.full((*found.size, 3), ground, np.uint8)
    out = draw_overlay(image, found, 0.0)
    changed = (out != image).any(2) & (out != PALETTE[found.ids[0] - 1]).any(2)
    changed[: strip_height(found.size)] = False
    rows, cols = np.nonzero(changed)
    if not rows.size:
        return None
    x1, y1, x2, y2 = cols.min(), rows.min(), cols.max() + 1, rows.max() + 1
    return ((x1 + x2) / 2, (y1 + y2) / 2), out[y1:y2, x1:x2]


@pytest.mark.parametrize("window", [(20, 40, 200, 140), (250, 50, 390, 90), (300, 150, 400, 240), (0, 180, 120, 240)])
def test_a_number_stands_in_the_middle_of_its_mask(window: Window) -> None:
    found = instances([window])
    for box in (window, (0, 0, WIDTH, HEIGHT)):
        shown = written(dataclasses.replace(found, boxes=np.float32([box])))
        assert shown is not None
        np.testing.assert_allclose(shown[0], np.reshape(window, (2, 2)).mean(0), atol=6)


def test_a_number_says_id_and_score_and_is_whole_or_not_there() -> None:
    shown = written(instances([(20, 60, 380, 220)], ids=[7]))
    assert shown is not None
    _, letters = shown
    height, width = letters.shape[:2]
    there = []
    for step, across in enumerate(range(16, width + 24, 5)):
        for down in range(8, height + 24, 4):
            x, y = 40 + step % 4, 60 + down % 5
            small = written(instances([(x, y, x + across, y + down)], ids=[7]))
            assert small is None or np.array_equal(small[1], letters)
            assert small is not None or across < width + 20 or down < height + 20
            there.append(small is not None)
    assert any(there) and not all(there)
    for changes in ({"ids": np.int32([8])}, {"scores": np.float32([0.91])}):
        other = written(dataclasses.replace(instances([(20, 60, 380, 220)], ids=[7]), **changes))
        assert other is not None and not np.array_equal(other[1], letters)


def test_letters_are_white_with_a_dark_rim_of_a_pixel() -> None:
    found = instances([(20, 60, 380, 220)])
    dark, light = (draw_overlay(np.full((HEIGHT, WIDTH, 3), ground, np.uint8), found, 0.0) for ground in (0, 255))
    inside = slice(62, 218), slice(22, 378)
    letters, shown = dark[inside].max(2), light[inside].min(2)
    assert letters.max() == 255 and shown.min() == 0
    np.testing.assert_array_equal(shown, np.maximum(255 - cv2.dilate(letters, np.ones((3, 3), np.uint8)), letters))


@pytest.mark.parametrize(("size", "thick"), [((240, 400), 1), ((399, 500), 1), ((400, 500), 2), ((1080, 1920), 2)])
def test_contours_are_thicker_in_large_pictures(size: tuple[int, int], thick: int) -> None:
    out = draw_overlay(np.full((*size, 3), 90, np.uint8), instances([(50, 100, 70, 120)], size), 0.0)
    is_contour = (out == PALETTE[0]).all(2)
    assert np.flatnonzero(is_contour[110]).tolist() == [*range(50, 50 + thick), *range(70 - thick, 70)]
    assert is_contour.sum() == 400 - (20 - 2 * thick) ** 2


def test_letters_grow_with_the_picture() -> None:
    heights = [strip_height(size) for size in ((240, 400), (400, 240), (1100, 4000), (2200, 2200))]
    assert heights[0] == heights[1] < heights[2] < heights[3]


def test_a_thin_cross_gets_no_number() -> None:
    found = instances([(50, 50, 200, 200)])
    for rows in (slice(50, 121), slice(129, 200)):
        found.masks[0, rows, 50:121] = found.masks[0, rows, 129:200] = False
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    out = draw_overlay(image, found, 0.0)
    assert {tuple(p) for p in out[50:200, 50:200].reshape(-1, 3).tolist()} == {(90, 90, 90), tuple(PALETTE[0].tolist())}


def test_boxes_that_reach_beyond_the_image() -> None:
    """As models may give them; they are cut there."""
    masks = np.ones((1, 60, 90), np.bool_)
    shown = []
    for box in ((0, 0, 90, 60), (-5, -7, 200, 150)):
        found = dataclasses.replace(instances([(0, 0, 90, 60)], (60, 90)), masks=masks, boxes=np.float32([box]))
        shown.append(draw_overlay(np.zeros((60, 90, 3), np.uint8), found))
    np.testing.assert_array_equal(shown[0], shown[1])


def test_letters_stay_inside_of_a_mask_with_fine_holes() -> None:
    found = instances([(48, 48, 200, 200)])
    found.masks[0, :, 50::4] = False
    image = picture()
    out = draw_overlay(image, found, 0.0)
    outside = ~found.masks[0]
    outside[: strip_height(found.size)] = False
    np.testing.assert_array_equal(out[outside], image[outside])


def test_the_strip_tells_degradation_enhancement_and_count() -> None:
    image = picture()
    rows = strip_height((HEIGHT, WIDTH))
    strips = [
        draw_overlay(image, instances(WINDOWS[:count], degradation=level, enhanced=on), 0.5)[:rows]
        for count, level, on in ((0, 0.25, False), (0, 0.82, False), (0, 0.25, True), (1, 0.25, False))
    ]
    for a in range(4):
        for b in range(a):
            assert (strips[a] != strips[b]).any()


def test_the_strip_has_a_colour_of_its_own_for_enhanced_and_is_as_long_as_its_words() -> None:
    image, lengths = np.full((HEIGHT, WIDTH, 3), 200, np.uint8), {}
    for count, on in ((0, False), (0, True), (1, True), (2, True)):
        strip = draw_overlay(image, instances(WINDOWS[:count], enhanced=on), 0.5)[: strip_height((HEIGHT, WIDTH))]
        blue = (strip[..., 2] > strip[..., 0].astype(int) + 20).any()
        assert blue == on
        lengths[count, on] = int((strip != 200).any((0, 2)).sum())
        ground = strip[:, : lengths[count, on]]
        assert (ground[:, :4] == 50).all() and (ground[:, -4:] == 50).all() and ground.max() == 255  # no word is cut
    # "enhanced", "not enhanced"; "1 instance", "2 instances"
    assert lengths[0, True] < lengths[0, False] and lengths[1, True] < lengths[0, True] == lengths[2, True]


@pytest.mark.parametrize("size", [(40, 400), (240, 150)])
def test_a_thumbnail_without_room_for_the_words_has_no_strip(size: tuple[int, int]) -> None:
    image = picture(size)
    np.testing.assert_array_equal(draw_overlay(image, instances([], size)), image)


def test_no_instances() -> None:
    image = picture()
    out = draw_overlay(image, instances([]), 0.5)
    rows = strip_height((HEIGHT, WIDTH))
    np.testing.assert_array_equal(out[rows:], image[rows:])
    assert (out[:rows] != image[:rows]).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (40, 60), (1080, 1920)])
def test_any_size(size: tuple[int, int]) -> None:
    height, width = size
    found = instances([(0, 0, width, height)], size)
    image = picture(size)
    assert draw_overlay(image, found, 0.5).shape == image.shape


def test_labels_at_hand_give_the_same_picture() -> None:
    image, found = picture(), instances(WINDOWS)
    np.testing.assert_array_equal(draw_overlay(image, found, 0.5, found.label_map()), draw_overlay(image, found, 0.5))


@pytest.mark.parametrize(
    ("image", "alpha", "words"),
    [
        (picture((HEIGHT, WIDTH - 1)), 0.5, r"expected \(height, width\) \(240, 400\)"),
        (picture(), 1.5, "expected 0..1, got 1.5"),
        (picture(), 1.01, "expected 0..1, got 1.01"),
        (picture(), -0.01, "expected 0..1, got -0.01"),
        (picture(), float("nan"), "expected 0..1"),
        (picture()[..., 0], 0.5, "stack a grey image"),
    ],
)
def test_refusals(image: Any, alpha: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_overlay(image, instances(WINDOWS), alpha)


COLOURS = np.array([(128, 64, 128), (70, 130, 180), (0, 0, 0)], np.uint8)


def class_map(size: tuple[int, int] = (HEIGHT, WIDTH), dtype: Any = np.uint8) -> SemanticMap:
    labels = np.random.default_rng(1).integers(0, 3, size).astype(dtype)
    return SemanticMap(labels, np.ones(size, np.float32), ("road", "sky", "dark"), COLOURS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_class_colours_are_blended(alpha: float, dtype: Any) -> None:
    image, found = picture(), class_map(dtype=dtype)
    before = image.copy()
    out = draw_classes(image, found, alpha)
    expected = (1 - alpha) * image.astype(float) + alpha * COLOURS[found.labels]
    np.testing.assert_allclose(out.astype(float), expected, atol=0.51)
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(out, image) and out.dtype == np.uint8


def test_class_colours_show_inside_the_contours_too() -> None:
    image, found, classes = picture(), instances(WINDOWS), class_map()
    out = draw_overlay(image, found, 0.5, semantic_map=classes)
    ground = draw_classes(image, classes, 0.5)
    np.testing.assert_array_equal(out, draw_overlay(ground, found, 0.0))
    outside = found.label_map() == 0
    outside[: strip_height(found.size)] = False
    np.testing.assert_array_equal(out[outside], ground[outside])
    np.testing.assert_array_equal(out[SMALL], ground[SMALL])
    np.testing.assert_array_equal(out[70, 250:262], np.broadcast_to(PALETTE[1], (12, 3)))  # its contour


def test_class_colours_without_instances() -> None:
    image, classes = picture(), class_map()
    out = draw_overlay(image, instances([]), 0.5, semantic_map=classes)
    rows = strip_height((HEIGHT, WIDTH))
    np.testing.assert_array_equal(out[rows:], draw_classes(image, classes)[rows:])


def test_a_class_map_that_does_not_fit_is_refused() -> None:
    other = class_map((HEIGHT, WIDTH - 1))
    words = r"image: expected \(height, width\) \(240, 399\) of the semantic map, got \(240, 400\)"
    with pytest.raises(ValueError, match=words):
        draw_overlay(picture(), instances(WINDOWS), semantic_map=other)
    with pytest.raises(ValueError, match=words):
        draw_classes(picture(), other)
    with pytest.raises(ValueError, match="alpha: expected 0..1, got -0.1"):
        draw_classes(picture(), class_map(), -0.1)
