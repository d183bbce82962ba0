"""Ids that stay with their objects: known scenes that move, swap ranks, vanish and come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from glesam_ros import identity
from glesam_ros.identity import LOST, IdKeeper
from glesam_ros.instances import MAX_ID, Instances

SIZE = 240, 320
Box = tuple[int, int, int, int]
LEFT, RIGHT = (40, 60, 100, 120), (200, 80, 260, 140)


def seen(*boxes: Box, size: tuple[int, int] = SIZE) -> Instances:
    """Rectangles xyxy, best first, with the ids of a single frame: 1, 2, ..."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    count = len(boxes)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    return Instances(
        masks, np.array(boxes, np.float32).reshape(count, 4), scores, scores, np.arange(1, count + 1, dtype=np.int32),
        0.25, True,
    )


def moved(box: Box, x: int, y: int = 0) -> Box:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def ids(keeper: IdKeeper, *boxes: Box, size: tuple[int, int] = SIZE) -> list[int]:
    found: list[int] = keeper.update(seen(*boxes, size=size)).ids.tolist()
    return found


def test_ids_follow_objects_that_move_and_not_their_rank() -> None:
    keeper = IdKeeper()
    assert ids(keeper, LEFT, RIGHT) == [1, 2]
    for step in range(1, 8):
        left, right = moved(LEFT, 10 * step), moved(RIGHT, -5 * step, 3 * step)
        boxes = (right, left) if step % 2 else (left, right)
        assert ids(keeper, *boxes) == ([2, 1] if step % 2 else [1, 2])


@pytest.mark.parametrize("wide", [1, 4, 6])
def test_a_thin_object_of_a_large_image_keeps_its_id_wherever_it_stands(wide: int) -> None:
    for x in (900, 901, 905, 908, 1920 - wide):
        keeper = IdKeeper()
        pole = (x, 300, x + wide, 800)
        assert [ids(keeper, pole, size=(1080, 1920)) for _ in range(3)] == [[1]] * 3


def a_pole(x: int) -> list[Box]:
    return [(x, 300, x + 6, 800)]


def three_poles(x: int) -> list[Box]:
    return [(x + 43 * k, 300, x + 43 * k + 6, 800) for k in range(3)]


def a_frame(x: int) -> list[Box]:
    y, width, height, thick = 200, 607, 600, 5
    return [
        (x, y, x + width, y + thick), (x, y + height - thick, x + width, y + height),
        (x, y, x + thick, y + height), (x + width - thick, y, x + width, y + height),
    ]


@pytest.mark.parametrize("parts", [a_pole, three_poles, a_frame])
def test_a_thin_object_of_a_large_image_keeps_its_id_while_it_moves(parts: Callable[[int], list[Box]]) -> None:
    keeper = IdKeeper()
    for x in range(899, 920):
        whole = seen(*parts(x), size=(1080, 1920))
        edges = [whole.boxes[:, :2].min(0), whole.boxes[:, 2:].max(0)]
        one = dataclasses.replace(
            seen((0, 0, 1, 1), size=(1080, 1920)), masks=whole.masks.any(0, keepdims=True),
            boxes=np.concatenate(edges)[None],
        )
        assert keeper.update(one).ids.tolist() == [1]


def test_a_thin_bar_of_a_large_image_keeps_its_id_while_it_falls() -> None:
    keeper = IdKeeper()
    for y in range(300, 330):
        assert ids(keeper, (700, y, 1200, y + 6), size=(1080, 1920)) == [1]


@pytest.mark.parametrize("edge", [(0, 2, 1, 6), (3, 0, 7, 1)])
def test_what_stands_at_the_edge_of_a_small_image_keeps_its_id(edge: Box) -> None:
    keeper = IdKeeper()
    assert [ids(keeper, edge, size=(8, 8)) for _ in range(2)] == [[1]] * 2
    # a box may begin before the image
    keeper, inside = IdKeeper(), seen((0, 0, 5, 5), size=(8, 8))
    inside = dataclasses.replace(inside, boxes=np.float32([[-2, -3, 5, 5]]))
    assert [keeper.update(inside).ids.tolist() for _ in range(2)] == [[1]] * 2


def test_a_low_wide_image_is_compared_as_finely_as_its_short_side_asks_for() -> None:
    keeper, size = IdKeeper(), (130, 1920)
    assert ids(keeper, (101, 20, 102, 90), size=size) == [1]
    assert ids(keeper, (101, 20, 102, 90), size=size) == [1]
    assert ids(keeper, (103, 20, 104, 90), size=size) == [2]


def test_the_place_where_an_object_was_before_the_last_frame_is_free() -> None:
    keeper = IdKeeper()
    for step in range(3):
        assert ids(keeper, moved(LEFT, 20 * step)) == [1]
    # another one comes to the first place, the object is still near its last one
    assert ids(keeper, LEFT, moved(LEFT, 50)) == [2, 1]


def test_masks_count_and_not_their_boxes() -> None:
    keeper, box = IdKeeper(), (40, 40, 140, 140)
    y, x = np.mgrid[:SIZE[0], :SIZE[1]] - 40
    upper, lower = seen(box), seen(box)
    # halves of a square that share a band along its diagonal: IoU about 0.2
    upper.masks[0] &= x + y < 110
    lower.masks[0] &= x + y > 90
    assert keeper.update(upper).ids.tolist() == [1]
    assert keeper.update(lower).ids.tolist() == [2]
    assert keeper.update(upper).ids.tolist() == [1]


@pytest.mark.parametrize(("rows", "expected"), [(66, 2), (68, 2), (70, 1)])
def test_masks_with_the_same_box_are_one_object_above_an_overlap_of_four_tenths(rows: int, expected: int) -> None:
    keeper, box = IdKeeper(), (40, 40, 140, 140)
    upper, lower = seen(box), seen(box)
    # each reaches from edge to edge of the box, all 100 rows are in one of them: IoU 0.36, 0.4 and 0.44
    upper.masks[0, 40 + rows : 138] = False
    lower.masks[0, 42 : 140 - rows] = False
    both, either = (upper.masks & lower.masks).sum(), (upper.masks | lower.masks).sum()
    assert both / either == (2 * rows - 96) / 100
    assert keeper.update(upper).ids.tolist() == [1]
    assert keeper.update(lower).ids.tolist() == [expected]


def test_nothing_but_ids_changes() -> None:
    keeper = IdKeeper()
    keeper.update(seen(RIGHT))
    before = seen(LEFT, RIGHT)
    after = keeper.update(before)
    assert after.ids.tolist() == [2, 1] and before.ids.tolist() == [1, 2]
    for name in ("masks", "boxes", "scores", "stability"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert (after.degradation, after.enhanced) == (0.25, True)


def test_an_object_that_jumps_further_than_its_masks_overlap_is_a_new_one() -> None:
    keeper = IdKeeper()
    ids(keeper, LEFT)
    # IoU of two squares of 60, x apart: (60 - x) / (60 + x)
    assert ids(keeper, moved(LEFT, 24)) == [1]  # 0.43
    assert ids(keeper, moved(LEFT, 24 + 28)) == [2]  # 0.36


@pytest.mark.parametrize(("gone", "expected"), [(1, 1), (LOST, 1), (LOST + 1, 3)])
def test_an_object_is_remembered_for_a_while(gone: int, expected: int) -> None:
    keeper = IdKeeper()
    ids(keeper, LEFT, RIGHT)
    for _ in range(gone):
        assert ids(keeper, RIGHT) == [2]
    assert ids(keeper, LEFT, RIGHT) == [expected, 2]


@pytest.mark.parametrize("size", [SIZE, (1080, 1920)])
def test_instances_without_a_pixel_are_the_same_as_no_other(size: tuple[int, int]) -> None:
    keeper, nothing = IdKeeper(), (0, 0, 0, 0)
    assert ids(keeper, nothing, LEFT, size=size) == [1, 2]
    assert ids(keeper, LEFT, nothing, size=size) == [2, 3]


def test_frames_without_an_object_count_as_gone() -> None:
    keeper = IdKeeper()
    assert ids(keeper) == []
    ids(keeper, LEFT)
    for _ in range(LOST):
        assert ids(keeper) == []
    assert ids(keeper, LEFT) == [1]


def test_a_part_does_not_take_the_id_of_its_whole() -> None:
    keeper = IdKeeper()
    whole, part = (40, 40, 140, 140), (50, 50, 120, 130)
    assert ids(keeper, whole, part) == [1, 2]
    assert ids(keeper, part, whole) == [2, 1]
    assert ids(IdKeeper(), part) == [1]
    # of two that overlap one known object enough, the one that overlaps it more has its id
    keeper = IdKeeper()
    ids(keeper, whole)
    assert ids(keeper, part, moved(whole, 2)) == [2, 1]
    # and of two known ones the one that overlaps the object more gives its id
    for known in ((whole, part), (part, whole)):
        keeper = IdKeeper()
        ids(keeper, *known)
        assert ids(keeper, moved(whole, 2)) == [1 + known.index(whole)]


def test_another_size_of_the_image_begins_anew() -> None:
    keeper = IdKeeper()
    ids(keeper, RIGHT)
    assert ids(keeper, LEFT, RIGHT) == [2, 1]
    assert ids(keeper, LEFT, size=(241, 320)) == [1]


def test_forgetting_begins_anew() -> None:
    keeper = IdKeeper()
    ids(keeper, RIGHT)
    keeper.forget()
    assert ids(keeper, LEFT, RIGHT) == [1, 2]


def test_after_the_last_id_the_first_free_one_comes() -> None:
    keeper = IdKeeper()
    ids(keeper, LEFT)
    keeper._next = MAX_ID
    far = (10, 150, 30, 200)
    assert ids(keeper, LEFT, far) == [1, MAX_ID]
    assert ids(keeper, LEFT, far, RIGHT) == [1, MAX_ID, 2]


def test_small_objects_and_small_images_keep_their_ids() -> None:
    keeper = IdKeeper()
    size, tiny = (1080, 1920), (903, 505, 925, 527)
    assert ids(keeper, tiny, size=size) == [1]
    assert ids(keeper, moved(tiny, 3, 2), size=size) == [1]
    keeper = IdKeeper()
    assert ids(keeper, (2, 2, 5, 5), size=(8, 8)) == [1]
    assert ids(keeper, (2, 2, 5, 6), size=(8, 8)) == [1]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MOST", 4)
    keeper = IdKeeper()
    places: Sequence[Box] = [(20 * k, 10, 20 * k + 15, 25) for k in range(12)]
    for place in places:
        ids(keeper, place)
    assert len(keeper._ids) == len(keeper._bits) == len(keeper._extents) == len(keeper._unseen) == 4
    # the three seen last beside the newest are known, older ones are not
    assert ids(keeper, places[11], places[10], places[9], places[8]) == [12, 11, 10, 9]
    assert ids(keeper, places[0]) == [13]
    # more objects in one frame are all known, and nothing besides
    assert len(ids(keeper, *places[:6])) == len(keeper._ids) == 6
