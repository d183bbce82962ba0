"""The newest frame of each camera, taken in turns."""

from __future__ import annotations

import threading
import time

import pytest

from glesam_ros.ros.scheduling import Frame, NewestFrames

TIMEOUT_S = 10.0


def taken(frames: NewestFrames, count: int) -> list[tuple[str, int]]:
    """Camera and message of so many frames that are there."""
    found = [frames.take() for _ in range(count)]
    return [(frame.camera, frame.message) for frame in found if frame is not None]


def test_the_newest_frame_replaces_an_older_one_which_is_told() -> None:
    frames = NewestFrames(["left", "right"])
    assert [frames.put(Frame("left", 1)), frames.put(Frame("right", 2)), frames.put(Frame("left", 3))] == [
        "", "", "overwritten"
    ]
    assert taken(frames, 2) == [("left", 3), ("right", 2)]
    assert frames.put(Frame("left", 4)) == ""  # the one before was taken


def test_cameras_take_turns_however_fast_one_is() -> None:
    frames = NewestFrames(["a", "b", "c"])
    for number in range(3):
        for camera in ("c", "b", "a"):
            frames.put(Frame(camera, number))
    order = []
    for number in range(3, 9):
        order += taken(frames, 1)
        frames.put(Frame(order[-1][0], number))
    assert order == [("a", 2), ("b", 2), ("c", 2), ("a", 3), ("b", 4), ("c", 5)]


def test_a_camera_without_a_frame_is_passed_over_and_loses_no_turn_later() -> None:
    frames = NewestFrames(["a", "b", "c"])
    for camera in ("a", "c"):
        frames.put(Frame(camera, 1))
    assert taken(frames, 1) == [("a", 1)]
    frames.put(Frame("a", 2))
    assert taken(frames, 1) == [("c", 1)]
    frames.put(Frame("b", 3))
    assert taken(frames, 2) == [("a", 2), ("b", 3)]


def test_clearing_names_the_cameras_that_lost_a_frame() -> None:
    frames = NewestFrames(["a", "b", "c"])
    for camera in ("c", "a"):
        frames.put(Frame(camera, 1))
    assert sorted(frames.clear()) == ["a", "c"] and frames.clear() == []
    assert frames.put(Frame("a", 2)) == "" and taken(frames, 1) == [("a", 2)]


def test_taking_waits_for_a_frame() -> None:
    frames = NewestFrames(["a"])
    found: list[tuple[str, int]] = []
    taker = threading.Thread(target=lambda: found.extend(taken(frames, 1)))
    taker.start()
    taker.join(0.05)
    assert taker.is_alive()
    frames.put(Frame("a", 1))
    taker.join(TIMEOUT_S)
    assert found == [("a", 1)]


def test_closing_ends_all_who_wait_and_nothing_is_taken_any_more() -> None:
    frames = NewestFrames(["a"])
    found: list[Frame | None] = []
    takers = [threading.Thread(target=lambda: found.append(frames.take())) for _ in range(2)]
    for taker in takers:
        taker.start()
    frames.close()
    for taker in takers:
        taker.join(TIMEOUT_S)
    assert found == [None, None]
    assert frames.put(Frame("a", 1)) == "disabled" and frames.take() is None
    left = NewestFrames(["a"])
    left.put(Frame("a", 1))
    left.close()
    assert left.take() is None and left.clear() == ["a"]


def test_a_frame_of_an_unknown_camera_is_an_error_that_names_both() -> None:
    frames = NewestFrames(["a", "b"])
    frames.put(Frame("c", 1))
    with pytest.raises(KeyError, match=r"expected one of \('a', 'b'\), got \['c'\]"):
        frames.take()


def test_a_frame_knows_when_it_came() -> None:
    before = time.monotonic()
    assert before <= Frame("a", 1).arrival <= time.monotonic()
