"""What nano's masks may look like: what is outside a box, and separate small parts."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from glesam_ros.models.base import Budget
from glesam_ros.models.nano import Nano
from glesam_ros.models.shapes import ISLAND, OUTSIDE, drop_islands, keep_to_boxes


def parts(*rectangles: tuple[int, int, int, int]) -> np.ndarray:
    """A mask (20, 30): 2 in each xyxy rectangle, -3 elsewhere."""
    logits = np.full((20, 30), -3, np.float32)
    for left, top, right, bottom in rectangles:
        logits[top:bottom, left:right] = 2
    return logits


def middle(x: int, y: int) -> np.ndarray:
    """The middle of a cell in -1..1: (2,)."""
    return np.float32([(x + 0.5) / 15 - 1, (y + 0.5) / 10 - 1])


def test_a_part_below_half_of_the_largest_becomes_background() -> None:
    logits = parts((0, 0, 10, 2), (20, 10, 30, 11), (0, 10, 9, 11))
    drop_islands(logits, 0.5, middle(15, 15))
    # 20 cells, 10, 9: the last is less than half of the first
    expected = parts((0, 0, 10, 2), (20, 10, 30, 11))
    expected[10, :9] = -2
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 36), (0.25, 36), (0.26, 31), (0.55, 31), (0.56, 20), (1.0, 20)])
def test_the_share_says_what_is_small(share: float, kept: int) -> None:
    logits = parts((0, 0, 10, 2), (12, 0, 23, 1), (25, 0, 30, 1))[:2, :30]
    is_mask = logits > 0
    assert drop_islands(logits, share, extent=(0, 0, 30, 2)) is (kept < 36)
    assert (logits > 0).sum() == kept
    assert (logits[~is_mask] == -3).all()


def test_the_background_is_no_small_part() -> None:
    logits = parts((0, 0, 20, 2), (21, 0, 30, 2))  # 40 cells and 18, between them 2
    before = logits.copy()
    assert not drop_islands(logits, 0.2, extent=(0, 0, 30, 2))
    np.testing.assert_array_equal(logits, before)


def test_only_the_extent_is_looked_at() -> None:
    logits = parts((2, 3, 12, 5), (20, 10, 22, 11))
    whole = logits.copy()
    drop_islands(whole, 0.5)
    drop_islands(logits, 0.5, extent=(2, 3, 22, 11))
    np.testing.assert_array_equal(logits, whole)
    assert (logits > 0).sum() == 20


def test_cells_that_touch_at_a_corner_are_apart() -> None:
    logits = parts((0, 0, 10, 2), (10, 2, 12, 3))
    drop_islands(logits, ISLAND, middle(0, 0))
    assert (logits > 0).sum() == 20


@pytest.mark.parametrize(("point", "kept"), [((25, 5), 22), ((3, 1), 20), ((15, 15), 20), ((24, 5), 22), ((23, 5), 20)])
def test_the_part_under_the_point_stays(point: tuple[int, int], kept: int) -> None:
    logits = parts((0, 0, 10, 2), (24, 5, 26, 6))
    drop_islands(logits, ISLAND, middle(*point))
    assert (logits > 0).sum() == kept


@pytest.mark.parametrize("point", [(3, 8), (26, 8), (25, 3), (25, 9), (4, 3), (29, 19)])
def test_a_point_beside_all_parts_keeps_none(point: tuple[int, int]) -> None:
    logits = parts((5, 4, 15, 6), (24, 8, 26, 9))
    assert drop_islands(logits, ISLAND, middle(*point))
    assert (logits > 0).sum() == 20


@pytest.mark.parametrize(
    ("xy", "corner"), [((-1.0, -1.0), (0, 0)), ((1.0, 1.0), (19, 29)), ((1.5, -2.0), (0, 29))]
)
def test_points_at_and_beyond_the_border_count_for_the_nearest_cell(xy, corner) -> None:
    logits = parts((5, 5, 15, 7), (0, 0, 1, 1), (29, 19, 30, 20), (29, 0, 30, 1))
    drop_islands(logits, ISLAND, np.float32(xy))
    assert logits[corner] == 2
    assert (logits > 0).sum() == 21


@pytest.mark.parametrize("rectangles", [(), ((9, 9, 10, 10),), ((0, 0, 30, 20),)])
def test_masks_in_one_piece_and_empty_ones_stay(rectangles: tuple[tuple[int, int, int, int], ...]) -> None:
    logits = parts(*rectangles)
    before = logits.copy()
    assert not drop_islands(logits, ISLAND, middle(3, 3))
    np.testing.assert_array_equal(logits, before)


def test_logits_fall_outside_a_box_by_the_share_of_its_side() -> None:
    # cells of 0.1: the box is cells 4..7 of 20 across (0.4 long) and 5..9 down (0.5)
    logits = np.zeros((2, 20, 20), np.float32)
    xy, labels = np.float32([[[-0.6, -0.5], [-0.2, 0.0]]] * 2), np.float32([[2, 3], [1, 1]])
    keep_to_boxes(logits, xy, labels)
    assert not logits[1].any()
    np.testing.assert_allclose(logits[0, 5:10, 4:8], 0, atol=1e-4)
    # half a cell and one and a half outside to the right, three and a half to the left
    for x, outside in ((8, 0.05), (9, 0.15), (0, 0.35)):
        np.testing.assert_allclose(logits[0, 5:10, x], -OUTSIDE * outside / 0.4, atol=1e-3)
    np.testing.assert_allclose(logits[0, 19, 4:8], -OUTSIDE * 0.95 / 0.5, atol=1e-3)
    # beyond a corner the larger of both counts
    np.testing.assert_allclose(logits[0, 10, 0], -OUTSIDE * 0.35 / 0.4, atol=1e-3)
    np.testing.assert_allclose(logits[0, 19, 8], -OUTSIDE * 0.95 / 0.5, atol=1e-3)


@pytest.mark.parametrize("left", [-1.0, -0.95, -0.31, 0.05, 0.999])
def test_a_box_thinner_than_a_cell_has_a_cell(left: float) -> None:
    logits = np.ones((1, 20, 20), np.float32)
    keep_to_boxes(logits, np.float32([[[left, -1], [left + 0.001, 1]]]), np.float32([[2, 3]]))
    columns = np.flatnonzero((logits[0] > 0).all(0))
    assert 1 <= len(columns) <= 2
    assert min(abs((column + 0.5) / 10 - 1 - left) for column in columns) <= 0.051
    assert (logits[0, :, np.abs(np.arange(20) - columns[0]) > 1] < -OUTSIDE / 3).all()


def test_corners_count_wherever_they_stand_among_the_prompts() -> None:
    logits = np.ones((2, 20, 20), np.float32)
    low, high, centre = (-0.6, -0.5), (-0.2, 0.0), (-0.4, -0.25)
    xy = np.float32([[(0.9, 0.9), low, high, centre], [low, high, centre, (0, 0)]])
    keep_to_boxes(logits, xy, np.float32([[1, 2, 3, 4], [2, 3, 4, -1]]))
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (logits[0] > 0).sum() == 20


@pytest.fixture(scope="module")
def seen():
    """Two like blocks of another colour than the ground, and the model's embedding of them."""
    image = np.full((240, 320, 3), 90, np.uint8)
    image[60:120, 30:110] = image[60:120, 200:280] = (210, 120, 60)
    cv2.GaussianBlur(image, (0, 0), 1, dst=image)
    model = Nano("cpu", "fp32", threads=1)
    return model, model.encode(image, Budget()).adapted()


def test_a_box_around_half_of_a_thing_gives_that_half(seen) -> None:
    model, embedding = seen
    found = model.prompt(embedding, np.float32([[[30, 60], [70, 120]]]), np.float32([[2, 3]]), Budget())
    mask = cv2.resize(found.logits[0], (320, 240), interpolation=cv2.INTER_LINEAR) > 0
    assert mask[65:115, 35:65].mean() > 0.9
    # a tenth of the box's side beyond it nothing is left, though the thing goes on
    assert not mask[:, 75:].any()


def test_masks_of_lone_points_are_in_one_piece_or_in_large_ones(seen) -> None:
    model, embedding = seen
    ys, xs = np.mgrid[20:230:30, 15:310:30]
    points = np.stack([xs, ys], -1).reshape(-1, 1, 2).astype(np.float32)
    small = {}
    # several points say themselves what belongs to the object
    for several in (1, 2):
        given = np.repeat(points, several, 1)
        logits = model.prompt(embedding, given, np.ones(given.shape[:2], np.float32), Budget()).logits
        small[several] = 0
        for mask, (x, y) in zip(logits > 0, points[:, 0]):
            count, labelled = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
            sizes = np.bincount(labelled.ravel(), minlength=count)
            sizes[[0, labelled[int(y * 0.4), int(x * 0.4)]]] = sizes[1:].max(initial=0)
            small[several] += int((sizes < ISLAND * sizes.max()).sum())
    assert small[1] == 0 < small[2]


def test_a_lone_point_outside_is_no_fault(seen) -> None:
    model, embedding = seen
    found = model.prompt(embedding, np.float32([[[160, 200], [0, 0]]]), np.float32([[0, -1]]), Budget())
    assert np.isfinite(found.logits).all()
