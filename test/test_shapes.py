"""What nano's masks may look like: separate small parts, and what is outside a box."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from glesam_ros.models.base import Budget
from glesam_ros.models.nano import Nano
from glesam_ros.models.shapes import INSIDE, ISLAND, OUTSIDE, drop_islands, keep_to_boxes


def parts(*rectangles: tuple[int, int, int, int]) -> np.ndarray:
    """One mask (1, 20, 30): 2 in each xyxy rectangle, -3 elsewhere."""
    logits = np.full((1, 20, 30), -3, np.float32)
    for left, top, right, bottom in rectangles:
        logits[0, top:bottom, left:right] = 2
    return logits


def middle(x: int, y: int) -> np.ndarray:
    """The middle of a cell in -1..1: (1, 2)."""
    return np.float32([[(x + 0.5) / 15 - 1, (y + 0.5) / 10 - 1]])


def test_a_part_below_half_of_the_largest_becomes_background() -> None:
    logits = parts((0, 0, 10, 2), (20, 10, 30, 11), (0, 10, 9, 11))
    drop_islands(logits)
    assert ISLAND == 0.5
    # 20 cells, 10, 9: the last is less than half of the first
    expected = parts((0, 0, 10, 2), (20, 10, 30, 11))
    expected[0, 10, :9] = -1 - 2
    np.testing.assert_array_equal(logits, expected)


def test_cells_that_touch_at_a_corner_are_apart() -> None:
    logits = parts((0, 0, 10, 2), (10, 2, 12, 3))
    drop_islands(logits)
    assert (logits > 0).sum() == 20


@pytest.mark.parametrize(("point", "kept"), [((25, 5), 22), ((3, 1), 20), ((15, 15), 20), ((24, 5), 22), ((23, 5), 20)])
def test_the_part_under_the_point_stays(point: tuple[int, int], kept: int) -> None:
    logits = parts((0, 0, 10, 2), (24, 5, 26, 6))
    drop_islands(logits, middle(*point))
    assert (logits > 0).sum() == kept


@pytest.mark.parametrize("xy", [(-1.0, -1.0), (1.0, 1.0), (1.5, -2.0)])
def test_points_at_and_beyond_the_border_count_for_the_nearest_cell(xy: tuple[float, float]) -> None:
    logits = parts((5, 5, 15, 7), (0, 0, 1, 1), (29, 19, 30, 20), (29, 0, 30, 1))
    drop_islands(logits, np.float32([xy]))
    corner = {-1.0: (0, 0), 1.0: (19, 29), 1.5: (0, 29)}[xy[0]]
    assert logits[0][corner] == 2
    assert (logits > 0).sum() == 21


def test_each_mask_has_its_own_largest_part_and_whole_and_empty_ones_stay() -> None:
    logits = np.concatenate(
        [parts((0, 0, 3, 1), (9, 9, 10, 10)), parts((9, 9, 10, 10)), parts(), parts((0, 0, 30, 20))]
    )
    before = logits.copy()
    drop_islands(logits)
    np.testing.assert_array_equal(logits[1:], before[1:])
    assert (logits > 0).sum((1, 2)).tolist() == [3, 1, 0, 600]
    drop_islands(logits[:0])


def test_logits_fall_outside_a_box_by_the_share_of_its_side_and_gain_inside() -> None:
    # cells of 0.1: the box is cells 4..7 of 20 across (0.4 long) and 5..9 down (0.5)
    logits = np.zeros((2, 20, 20), np.float32)
    xy, labels = np.float32([[[-0.6, -0.5], [-0.2, 0.0]]] * 2), np.float32([[2, 3], [1, 1]])
    keep_to_boxes(logits, xy, labels)
    assert not logits[1].any()
    np.testing.assert_allclose(logits[0, 5:10, 4:8], INSIDE, atol=1e-4)
    # half a cell and one and a half outside to the right, three and a half to the left
    for x, outside in ((8, 0.05), (9, 0.15), (0, 0.35)):
        np.testing.assert_allclose(logits[0, 5:10, x], INSIDE - OUTSIDE * outside / 0.4, atol=1e-3)
    np.testing.assert_allclose(logits[0, 19, 4:8], INSIDE - OUTSIDE * 0.95 / 0.5, atol=1e-3)
    # beyond a corner the larger of both counts
    np.testing.assert_allclose(logits[0, 10, 0], INSIDE - OUTSIDE * 0.35 / 0.4, atol=1e-3)
    np.testing.assert_allclose(logits[0, 19, 8], INSIDE - OUTSIDE * 0.95 / 0.5, atol=1e-3)


@pytest.mark.parametrize("left", [-1.0, -0.95, -0.31, 0.05, 0.999])
def test_a_box_thinner_than_a_cell_has_a_cell(left: float) -> None:
    logits = np.zeros((1, 20, 20), np.float32)
    keep_to_boxes(logits, np.float32([[[left, -1], [left + 0.001, 1]]]), np.float32([[2, 3]]))
    columns = np.flatnonzero((logits[0] > 0).all(0))
    assert 1 <= len(columns) <= 2
    assert min(abs((column + 0.5) / 10 - 1 - left) for column in columns) <= 0.051
    assert (logits[0, :, np.abs(np.arange(20) - columns[0]) > 1] < -OUTSIDE / 3).all()


def test_corners_count_wherever_they_stand_among_the_prompts() -> None:
    logits = np.zeros((2, 20, 20), np.float32)
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


def test_masks_of_everything_mode_and_of_lone_points_are_in_one_piece_or_in_large_ones(seen) -> None:
    model, embedding = seen
    ys, xs = np.mgrid[20:230:30, 15:310:30]
    points = np.stack([xs, ys], -1).reshape(-1, 1, 2).astype(np.float32)
    every = model.propose(embedding, 0.05, 400, Budget()).logits
    lone = model.prompt(embedding, points, np.ones(points.shape[:2], np.float32), Budget()).logits
    several = model.prompt(embedding, np.repeat(points, 2, 1), np.ones((len(points), 2), np.float32), Budget()).logits
    small = {}
    for name, masks in (("every", every), ("lone", lone), ("several", several)):
        small[name] = 0
        for k, mask in enumerate(masks > 0):
            count, labelled = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
            sizes = np.bincount(labelled.ravel(), minlength=count)[1:]
            hit = labelled[int(points[k, 0, 1] * 0.4), int(points[k, 0, 0] * 0.4)] if name == "lone" else 0
            small[name] += sum(
                size < ISLAND * sizes.max() for part, size in enumerate(sizes, 1) if part != hit
            )
    # several points say themselves what belongs to the object
    assert small["every"] == small["lone"] == 0 < small["several"]
