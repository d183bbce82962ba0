"""sync_boxes: each frame is answered with the boxes that a detector found in it, however late they come."""

from __future__ import annotations

import time

import pytest
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, PointStamped
from ros_graph import image_message, picture, pixels_of, wait_for
from sensor_msgs.msg import Image
from std_srvs.srv import SetBool
from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesis, ObjectHypothesisWithPose

from glesam_ros.ros.pairing import BOXES_KEPT

LEFT, RIGHT = (20, 20, 40, 60), (100, 20, 40, 60)
IN_LEFT, IN_RIGHT = (50, 40), (50, 120)


class Detector:
    """A camera that sees one moving square, and a detector that is later than it."""

    def __init__(self, client):
        self.client = client
        self.masks = client.subscribe(Image, "masks")
        self.detections = client.subscribe(Detection2DArray, "detections")
        self.sent = 0

    def frame(self, square):
        """Send a frame and wait until the node has it; its stamp."""
        stamp = self.client.stamp()
        self.client.send(image_message(picture((square,)), stamp))
        self.sent += 1
        self.client.wait_count("frames_received", self.sent)
        return stamp

    def boxes(self, stamp, *squares, frame_id="optical", name="cup"):
        message = Detection2DArray()
        message.header.stamp, message.header.frame_id = stamp, frame_id
        for x, y, width, height in squares:
            said = ObjectHypothesis(class_id=name, score=0.75)
            one = Detection2D(results=[ObjectHypothesisWithPose(hypothesis=said)])
            one.bbox.center.position.x, one.bbox.center.position.y = x + width / 2, y + height / 2
            one.bbox.size_x, one.bbox.size_y = float(width), float(height)
            message.detections.append(one)
        self.client.send(message, "prompt/boxes")

    def answer(self, stamp):
        """The masks of the frame of `stamp`."""
        return pixels_of(wait_for(
            lambda: next((m for m in self.masks.messages if m.header.stamp == stamp), None), "masks of that frame"
        ))


@pytest.fixture
def detector(launch):
    return Detector(launch(sync_boxes=True, max_frame_age_ms=10_000))


def test_late_boxes_answer_the_frame_that_they_were_found_in(detector):
    first, second = detector.frame(LEFT), detector.frame(RIGHT)
    detector.boxes(first, LEFT)
    masks = detector.answer(first)
    assert masks[IN_LEFT] == 1 and not masks[IN_RIGHT]
    detector.boxes(second, RIGHT)
    masks = detector.answer(second)
    assert masks[IN_RIGHT] == 1 and not masks[IN_LEFT]
    wait_for(lambda: len(detector.detections) == 2, "detections of both")
    assert [m.detections[0].results[-1].hypothesis.class_id for m in detector.detections.messages] == ["cup", "cup"]
    assert len(detector.masks) == 2 and not detector.client.counts()["frames_dropped"]


def test_a_frame_without_an_object_has_empty_masks(detector):
    stamp = detector.frame(LEFT)
    detector.boxes(stamp)
    assert not detector.answer(stamp).any()
    wait_for(lambda: len(detector.detections) == 1, "detections of it")
    assert not detector.detections.last.detections


def test_frames_between_those_of_a_slow_detector_are_no_fault(detector):
    stamps = [detector.frame(square) for square in (LEFT, RIGHT, LEFT)]
    detector.boxes(stamps[-1], LEFT)
    assert detector.answer(stamps[-1])[IN_LEFT] == 1
    assert detector.client.wait_count("dropped_passed_over", 2)["dropped_passed_over"] == 2
    detector.client.wait_count("frames_processed", 1)
    assert not detector.client.values()["last_fault"]


def test_a_detector_with_stamps_of_its_own_is_named_in_log_and_diagnostics(detector):
    detector.client.set_parameters(max_frame_age_ms=200)
    for _ in range(3):
        detector.frame(LEFT)
        detector.boxes(detector.client.stamp(), LEFT)
        time.sleep(0.25)  # the time that frames wait is what is tested
    assert detector.client.wait_count("dropped_no_boxes", 2)
    assert "has to copy header.stamp of its image" in detector.client.wait_log("no_boxes")
    assert not detector.masks.messages


def test_boxes_of_another_camera_cost_their_frame_and_name_both(detector):
    stamp = detector.frame(LEFT)
    detector.boxes(stamp, LEFT, frame_id="rear")
    assert "'optical' of the image, got 'rear'" in detector.client.wait_log("no_boxes")
    stamp = detector.frame(RIGHT)
    detector.boxes(stamp, RIGHT, frame_id="")
    assert detector.answer(stamp)[IN_RIGHT] == 1


def test_a_bad_box_is_left_out_and_the_others_keep_their_ids(detector):
    stamp = detector.frame(RIGHT)
    detector.boxes(stamp, (500, 500, 20, 20), RIGHT)
    assert detector.answer(stamp)[IN_RIGHT] == 2
    detector.client.wait_count("noticed_refused_prompt", 1)
    assert detector.client.wait_log("refused_prompt", "1 of 2 boxes are left out")


def test_points_are_refused_and_boxes_of_a_paused_node_are_no_fault(detector):
    point = PointStamped(point=Point(x=120.0, y=50.0))
    detector.client.send(point, "prompt/point")
    assert "answered with boxes of their stamp alone" in detector.client.wait_log("refused")
    detector.client.call(SetBool, "enable", SetBool.Request(data=False))
    for _ in range(BOXES_KEPT + 2):
        detector.boxes(detector.frame(LEFT), LEFT)
    counts = detector.client.counts()
    assert counts["dropped_disabled"] == BOXES_KEPT + 2 and not counts["noticed_unmatched_boxes"]
    detector.client.call(SetBool, "enable", SetBool.Request(data=True))
    stamp = detector.frame(RIGHT)
    detector.boxes(stamp, RIGHT)
    assert detector.answer(stamp)[IN_RIGHT] == 1


def test_frames_without_stamps_are_refused(detector):
    detector.client.send(image_message(picture((LEFT,)), Time()))
    assert "frames need stamps, got 0" in detector.client.wait_log("no_boxes")
    detector.client.wait_count("dropped_no_boxes", 1)


def test_switched_off_every_frame_is_answered_again(detector):
    waiting = detector.frame(LEFT)
    detector.client.set_parameters(sync_boxes=False)
    detector.client.wait_count("dropped_passed_over", 1)
    detector.boxes(waiting, LEFT)
    detector.client.stream(
        lambda: image_message(picture((LEFT,)), detector.client.stamp()),
        lambda: detector.masks.messages and pixels_of(detector.masks.last)[IN_LEFT] == 1, "boxes that hold",
    )
