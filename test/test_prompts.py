"""The prompts of one camera: what holds, for how long, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from glesam_ros.ros.prompts import MAX_BOXES, MAX_POINTS, CameraPrompts

SIZE = 48, 64
A, B, C = (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0), (10.0, 10.0, 20.0, 30.0)
FOREVER = 0.0


class Clock:
    """Steady time that is set by hand, and does not begin at 0."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def prompts(clock: Clock) -> CameraPrompts:
    return CameraPrompts(clock)


def point(prompts: CameraPrompts, x: float, y: float, positive: bool = True, timeout_s: float = FOREVER) -> str:
    return prompts.add_point(x, y, positive, SIZE, timeout_s)


def held(prompts: CameraPrompts, size: tuple[int, int] = SIZE, timeout_s: float = FOREVER) -> tuple[Any, Any]:
    """What a frame is prompted with, as lists, and what is known of its objects; nothing is to be warned of."""
    arguments, objects, warnings = prompts.current(size, timeout_s)
    assert warnings == [] and all(value.dtype == "float32" for value in arguments.values())
    return {name: value.tolist() for name, value in arguments.items()}, objects


def test_without_prompts_there_are_none(prompts: CameraPrompts) -> None:
    assert held(prompts) == ({}, {})
    for timeout_s in (FOREVER, 5):
        assert prompts.count(timeout_s) == prompts.clear(timeout_s) == (0, 0)


def test_points_are_one_object_in_their_order(prompts: CameraPrompts) -> None:
    assert point(prompts, 3, 4) == point(prompts, 0, 0, False) == point(prompts, 63.5, 47) == ""
    assert held(prompts) == ({"points": [[3, 4], [0, 0], [63.5, 47]], "labels": [1, 0, 1]}, {1: ()})
    assert prompts.count(FOREVER) == (3, 0)


def test_negative_points_have_no_effect_before_a_positive_one(prompts: CameraPrompts) -> None:
    words = "negative point (3, 4) has no effect before a positive point (z >= 0) comes"
    assert point(prompts, 3, 4, False) == words
    assert held(prompts) == ({}, {}) and prompts.count(FOREVER) == (1, 0)
    prompts.set_boxes([A], SIZE, FOREVER)
    assert held(prompts) == ({"boxes": [[*A]]}, {1: ()})
    assert point(prompts, 5, 6) == ""
    assert held(prompts)[0]["labels"] == [0, 1]


def test_boxes_are_an_object_each_after_that_of_the_points(prompts: CameraPrompts) -> None:
    assert prompts.set_boxes([A, B], SIZE, FOREVER, [["first"], ["second"]]) == ""
    assert held(prompts) == ({"boxes": [[*A], [*B]]}, {1: ["first"], 2: ["second"]})
    point(prompts, 9, 9)
    arguments, objects = held(prompts)
    assert arguments == {"points": [[9, 9]], "labels": [1], "boxes": [[*A], [*B]]}
    assert objects == {1: (), 2: ["first"], 3: ["second"]} and prompts.count(FOREVER) == (1, 2)


def test_new_boxes_replace_all_before_and_none_clear_them(prompts: CameraPrompts) -> None:
    prompts.set_boxes([A, B], SIZE, FOREVER)
    prompts.set_boxes([C], SIZE, FOREVER)
    point(prompts, 9, 9)
    assert held(prompts)[0]["boxes"] == [[*C]]
    assert prompts.set_boxes([], SIZE, FOREVER) == ""
    assert list(held(prompts)[0]) == ["points", "labels"]


def test_boxes_are_cut_to_the_image(prompts: CameraPrompts) -> None:
    prompts.set_boxes([(-5, -6, 99, 98)], SIZE, FOREVER)
    assert held(prompts)[0]["boxes"] == [[0, 0, 64, 48]]


def test_a_bad_box_is_left_out_and_its_place_stays_free(prompts: CameraPrompts) -> None:
    bad = (70, 1, 80, 9)
    with pytest.raises(ValueError) as refused:
        prompts.set_boxes([A, bad, B, (9, 9, 9, 9)], SIZE, FOREVER, [["a"], ["bad"], ["b"], ["empty"]])
    fault, left_out = str(refused.value).split("; ")
    assert "touches the 64x48 image, got (70, 1, 80, 9)" in fault
    assert left_out == "2 of 4 boxes are left out, the others hold"
    assert held(prompts) == ({"boxes": [[*A], [*B]]}, {1: ["a"], 3: ["b"]})


def test_where_no_box_is_good_those_before_hold(prompts: CameraPrompts) -> None:
    prompts.set_boxes([A], SIZE, FOREVER, [["a"]])
    with pytest.raises(ValueError, match=r"^boxes: expected x1 < x2 and y1 < y2 \(xyxy\), got \(9, 9, 9, 9\)$"):
        prompts.set_boxes([(9, 9, 9, 9), (70, 1, 80, 9)], SIZE, FOREVER)
    assert held(prompts) == ({"boxes": [[*A]]}, {1: ["a"]})


def test_the_limits_are_those_of_the_readme() -> None:
    assert (MAX_POINTS, MAX_BOXES) == (32, 64)


def test_of_too_many_boxes_the_first_hold(prompts: CameraPrompts) -> None:
    boxes = [(0, 0, 1 + k / 2, 9) for k in range(MAX_BOXES + 2)]
    assert prompts.set_boxes(boxes[:MAX_BOXES], SIZE, FOREVER) == ""
    words = rf"^boxes: expected at most {MAX_BOXES}, got {MAX_BOXES + 2}; 2 of {MAX_BOXES + 2} boxes are left out, "
    with pytest.raises(ValueError, match=words):
        prompts.set_boxes(boxes, SIZE, FOREVER)
    assert held(prompts)[0]["boxes"] == [[*box] for box in boxes[:MAX_BOXES]]


def test_one_point_too_many_is_refused_and_the_others_hold(prompts: CameraPrompts) -> None:
    for k in range(MAX_POINTS):
        assert point(prompts, k, 1) == ""
    words = f"points: expected at most {MAX_POINTS} for one object, got one more; call clear_prompts first"
    with pytest.raises(ValueError, match=words):
        point(prompts, 40, 1)
    assert held(prompts)[0]["points"] == [[k, 1] for k in range(MAX_POINTS)]


@pytest.mark.parametrize("xy", [(64, 1), (1, 48), (-1, 1), (float("nan"), 1)])
def test_a_point_outside_is_refused_and_the_others_hold(prompts: CameraPrompts, xy: tuple[float, float]) -> None:
    point(prompts, 3, 4)
    with pytest.raises(ValueError, match="points: expected"):
        point(prompts, *xy)
    assert held(prompts)[0]["points"] == [[3, 4]]


def test_an_object_expires_when_its_last_prompt_is_older_than_the_timeout(
    prompts: CameraPrompts, clock: Clock
) -> None:
    point(prompts, 1, 1)
    clock.now += 4
    point(prompts, 2, 2, timeout_s=5)
    prompts.set_boxes([A], SIZE, 5)
    clock.now += 2
    prompts.set_boxes([B], SIZE, 5)
    clock.now += 3
    assert prompts.count(5) == (2, 1)  # just as old as the timeout
    clock.now += 2
    assert prompts.count(5) == (0, 1) and list(held(prompts, timeout_s=5)[0]) == ["boxes"]
    clock.now += 0.5
    assert held(prompts, timeout_s=5) == ({}, {})
    assert held(prompts) == ({}, {})  # gone for good


def test_without_a_timeout_prompts_hold(prompts: CameraPrompts, clock: Clock) -> None:
    point(prompts, 1, 1)
    prompts.set_boxes([A], SIZE, FOREVER)
    clock.now += 1e6
    assert prompts.count(FOREVER) == (1, 1) and len(held(prompts)[1]) == 2


def test_points_that_expired_do_not_come_back_with_a_new_one(prompts: CameraPrompts, clock: Clock) -> None:
    point(prompts, 1, 1)
    clock.now += 6
    point(prompts, 2, 2, timeout_s=5)
    assert held(prompts)[0]["points"] == [[2, 2]]


def test_clearing_tells_what_had_not_expired(prompts: CameraPrompts, clock: Clock) -> None:
    prompts.set_boxes([A, B], SIZE, 5)
    point(prompts, 1, 1)
    clock.now += 6
    assert prompts.clear(5) == (0, 0)
    prompts.set_boxes([A, B], SIZE, 5)
    assert prompts.clear(5) == (0, 2)
    assert prompts.clear(5) == (0, 0) and held(prompts) == ({}, {})
    point(prompts, 1, 1)
    point(prompts, 2, 2)
    assert prompts.clear(5) == (2, 0) and held(prompts) == ({}, {})


def test_another_resolution_drops_all_prompts_with_a_text_each(prompts: CameraPrompts) -> None:
    point(prompts, 3.5, 4)
    prompts.set_boxes([A], SIZE, FOREVER)
    dropped = [f"{what} dropped: the image is 80x60 now" for what in ("point (3.5, 4)", "box (1, 2, 3, 4)")]
    assert prompts.current((60, 80), FOREVER) == ({}, {}, dropped)
    assert held(prompts, (60, 80)) == ({}, {}) and prompts.count(FOREVER) == (0, 0)


def test_a_prompt_for_another_resolution_drops_those_before_and_says_so(prompts: CameraPrompts) -> None:
    point(prompts, 3, 4)
    prompts.set_boxes([A, C], SIZE, FOREVER)
    # new boxes replace the old ones anyway: of these nothing is to be said
    assert prompts.set_boxes([B], (60, 80), FOREVER) == "point (3, 4) dropped: the image is 80x60 now"
    assert held(prompts, (60, 80)) == ({"boxes": [[*B]]}, {1: ()})
    said = point(prompts, 1, 1, False).split("; ")
    assert said[0] == "box (5, 6, 7, 8) dropped: the image is 64x48 now" and said[1].startswith("negative point (1, 1)")
    words = "x1 < x2.*; 1 of 2 boxes are left out, the others hold; point .1, 1. dropped: the image is 80x60 now"
    with pytest.raises(ValueError, match=words):
        prompts.set_boxes([A, (9, 9, 9, 9)], (60, 80), FOREVER)


def test_what_expired_is_not_said_to_be_dropped(prompts: CameraPrompts, clock: Clock) -> None:
    point(prompts, 3, 4)
    clock.now += 6
    assert prompts.current((60, 80), 5) == ({}, {}, [])
