"""Frames and the boxes that were found in them come together by their stamps, and what stays alone is counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from glesam_ros.ros.pairing import BOXES_KEPT, BYTES_KEPT, LATELY_S, Paired, Pairing
from glesam_ros.ros.scheduling import Frame

NONE = Paired()


def message(seconds, nanoseconds=0):
    stamp = SimpleNamespace(sec=seconds, nanosec=nanoseconds)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), data=b"")


def frame(seconds, nanoseconds=0, arrival=0.0):
    return Frame("front", message(seconds, nanoseconds), arrival)


@pytest.mark.parametrize("boxes_first", [False, True])
def test_a_frame_and_its_boxes_meet_whoever_comes_first(boxes_first):
    pairing, boxes, one = Pairing(), message(5, 7), frame(5, 7)
    if boxes_first:
        assert pairing.put_boxes(boxes) == NONE
        found = pairing.put_frame(one, 500)
    else:
        assert pairing.put_frame(one, 500) == NONE
        found = pairing.put_boxes(boxes)
    assert found.frame is not None and found.frame.message is one.message and found.frame.boxes is boxes
    assert found[1:] == (0, 0, 0) and pairing.clear() == 0


def test_stamps_that_differ_by_a_nanosecond_do_not_meet():
    pairing = Pairing()
    pairing.put_frame(frame(5, 7), 500)
    assert pairing.put_boxes(message(5, 8)) == NONE
    assert pairing.put_boxes(message(6, 7)) == NONE
    assert pairing.clear() == 1


def test_frames_before_the_one_that_is_answered_are_passed_over_and_later_ones_wait_on():
    pairing = Pairing()
    for seconds in (1, 2, 3, 4):
        pairing.put_frame(frame(seconds), 0)
    found = pairing.put_boxes(message(3))
    assert found.frame is not None and found.frame.message.header.stamp.sec == 3
    assert found.passed == 2
    assert pairing.put_boxes(message(4)).passed == 0


def test_frames_expire_after_the_limit_when_the_next_one_comes():
    pairing = Pairing()
    pairing.put_frame(frame(1, arrival=10.0), 500)
    assert pairing.put_frame(frame(2, arrival=10.5), 500).expired == 0
    assert pairing.put_frame(frame(3, arrival=10.75), 500).expired == 1
    assert pairing.put_boxes(message(1)).frame is None
    assert pairing.put_boxes(message(2)).frame is not None


@pytest.mark.parametrize("limit_ms", [0, 10_000])
def test_the_oldest_frames_expire_where_they_would_take_too_much_memory(limit_ms):
    pairing, expired = Pairing(), []
    for seconds in range(6):
        one = frame(seconds, arrival=1.0 * seconds)
        one.message.data = range(BYTES_KEPT // 4)
        expired.append(pairing.put_frame(one, limit_ms).expired)
    assert expired == [0, 0, 0, 0, 1, 1]
    assert pairing.put_boxes(message(1)).frame is None
    assert pairing.put_boxes(message(2)).frame is not None
    alone = frame(7, arrival=7.0)
    alone.message.data = range(2 * BYTES_KEPT)
    assert pairing.put_frame(alone, limit_ms).passed == 3
    assert pairing.put_boxes(message(7)).frame is not None


def test_frames_that_a_working_detector_leaves_out_are_passed_over():
    """30 Hz, of which a detector that takes 0.45 s finds one after the other; frames wait for half a second."""
    pairing, passed, expired, answered, busy = Pairing(), 0, 0, 0, None
    for k in range(300):
        now = k / 30
        met = pairing.put_frame(frame(k + 1, arrival=now), 500)
        passed, expired = passed + met.passed, expired + met.expired
        if busy is None:
            busy = k
        elif now >= busy / 30 + 0.45:
            met = pairing.put_boxes(message(busy + 1))
            passed, answered, busy = passed + met.passed, answered + (met.frame is not None), None
    assert answered > 15 and expired == 0
    assert passed + answered + pairing.clear() == 300


def test_frames_expire_again_when_the_detector_has_stopped():
    pairing = Pairing()
    pairing.put_frame(frame(1, arrival=10.0), 500)
    pairing.put_boxes(message(1))
    pairing.put_frame(frame(2, arrival=10.5), 500)
    assert pairing.put_frame(frame(3, arrival=10.0 + LATELY_S), 500) == Paired(passed=1)
    assert pairing.put_frame(frame(4, arrival=10.75 + LATELY_S), 500) == Paired(expired=1)


def test_a_second_frame_with_the_same_stamp_takes_the_place_of_the_first():
    pairing, second = Pairing(), frame(1)
    pairing.put_frame(frame(1), 0)
    assert pairing.put_frame(second, 0) == Paired(expired=1)
    found = pairing.put_boxes(message(1)).frame
    assert found is not None and found.message is second.message


def test_boxes_whose_frame_never_comes_are_counted():
    pairing = Pairing()
    unmatched = [pairing.put_boxes(message(seconds)).unmatched for seconds in range(1, BOXES_KEPT + 3)]
    assert unmatched == [0] * BOXES_KEPT + [1, 1]
    # those of the newest frame are there, and the ones before it are over
    found = pairing.put_frame(frame(BOXES_KEPT + 2), 0)
    assert found.frame is not None and found.unmatched == BOXES_KEPT - 1


def test_newer_boxes_with_the_same_stamp_count():
    pairing, newer = Pairing(), message(1)
    pairing.put_boxes(message(1))
    pairing.put_boxes(newer)
    found = pairing.put_frame(frame(1), 0)
    assert found.frame is not None and found.frame.boxes is newer and found.unmatched == 0


def test_clear_forgets_frames_and_boxes():
    pairing = Pairing()
    pairing.put_frame(frame(1), 0)
    pairing.put_frame(frame(2), 0)
    pairing.put_boxes(message(3))
    assert pairing.clear() == 2
    assert pairing.put_boxes(message(1)).frame is None
    assert pairing.put_frame(frame(3), 0).frame is None
