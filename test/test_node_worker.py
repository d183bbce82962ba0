"""What the worker notices, forgets and lets pass, frame by frame, without a node."""

from __future__ import annotations

import dataclasses
import time
from collections import deque

import cv2
import numpy as np
import pytest
from bright_model import BrightRegions
from builtin_interfaces.msg import Time
from rclpy.clock import Clock, ClockType
from ros_graph import image_message, picture, wait_for
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import Header

from glesam_ros import Pipeline, Settings
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.conversions import array_to_image
from glesam_ros.ros.scheduling import Frame
from glesam_ros.ros.worker import Worker

LARGE, SMALL = (20, 20, 40, 40), (100, 60, 20, 20)


class Given:
    """These frames and no more: in the place of `NewestFrames`."""

    def __init__(self, messages):
        self._frames = deque(Frame("", message) for message in messages)

    def take(self):
        return self._frames.popleft() if self._frames else None

    def close(self): ...


class Results:
    """Outputs that keep masks and quality."""

    def __init__(self):
        self.ids, self.enhanced = [], []

    def wanted(self):
        return frozenset({"masks", "quality"})

    def publish_masks(self, wanted, header, instances):
        self.ids.append(instances.ids.tolist())

    def publish_quality(self, wanted, header, degradation, enhanced):
        self.enhanced.append(enhanced)

    def publish_detections(self, *_): ...

    def publish_overlay(self, *_): ...


def done(messages, model=None, **settings):
    """A worker that went through all of the messages: results, counts of the ledger, log lines."""
    results, log = Results(), []
    camera = Camera("", "/image", results)
    pipeline = Pipeline(model or BrightRegions(), Settings(**{"min_area": 0, "max_frame_age_ms": 0, **settings}))
    worker = Worker(pipeline, {"": camera}, Given(messages), Clock(clock_type=ClockType.STEADY_TIME), log.append)
    worker.start()
    wait_for(lambda: not worker.is_alive(), "the last frame")
    status = camera.ledger.status("", "", time.monotonic(), {})
    return results, {pair.key: int(pair.value) for pair in status.values if pair.value.isdigit()}, log


def at(sec, *squares, ground=(30, 60, 90)):
    return image_message(picture(squares, ground=ground), Time(sec=sec))


def test_without_a_limit_no_result_is_late():
    results, counts, log = done([at(1, LARGE), at(2, LARGE)])
    assert results.ids == [[1], [1]] and counts["frames_processed"] == 2
    assert log == [] and not any(key.startswith("noticed") for key in counts)


def test_after_a_backward_stamp_nothing_is_known_of_before():
    frames = [at(10, LARGE, SMALL), at(11, SMALL), at(12, SMALL), at(5, SMALL), at(6, SMALL), at(6, SMALL)]
    results, counts, log = done(frames)
    # the frame that goes back is dropped, two of one time are not
    assert results.ids == [[1, 2], [2], [2], [1], [1]]
    assert counts["dropped_backward_stamp"] == counts["frames_dropped"] == 1
    [line] = log
    assert "backward_stamp: expected a stamp after 12.000 s, got 5.000 s" in line


def test_a_gate_that_was_open_before_a_backward_stamp_is_closed_after_it():
    class Between(BrightRegions):
        """Bad at first, then between the two levels."""

        def __init__(self):
            self.levels = deque([0.9, 0.5, 0.5, 0.5])

        def encode(self, image, budget):
            return dataclasses.replace(super().encode(image, budget), degradation=self.levels.popleft())

    frames = [at(sec, LARGE) for sec in (10, 11, 5, 6, 7)]
    results, _, _ = done(frames, Between(), enhance_above=0.6, enhance_below=0.4)
    assert results.enhanced == [True, True, False, False]


def grey(low, high, format=None):
    """A picture of 16 bits between two values: mono16, or compressed as `format` says."""
    pixels = np.full((40, 60), low, np.uint16)
    pixels[10:30, 10:30] = high
    header = Header(stamp=Time(sec=1))
    if format is None:
        return array_to_image(pixels, "mono16", header)
    kind, pixels = (".jpg", (pixels >> 8).astype(np.uint8)) if "jpeg" in format else (".png", pixels)
    return CompressedImage(header=header, format=format, data=cv2.imencode(kind, pixels)[1].tobytes())


@pytest.mark.parametrize(("message", "settings", "is_noticed"), [
    (grey(0, 4095), {}, True),  # 12 bits that nobody shifted up
    (grey(0, 65535), {}, False),
    (grey(30000, 31000), {}, True),  # bright and flat
    (grey(30000, 40000), {}, False),
    (grey(0, 4095), {"max_image_value": 4095.0}, False),
    (grey(30000, 31000), {"do_dynamic_scaling": True}, False),
    (grey(0, 4095, "mono16; png compressed "), {}, True),
    (grey(0, 4095, "mono16; jpeg compressed mono8"), {}, False),  # a JPEG has 8 bits, whatever it was made of
    (at(1, ground=(5, 5, 5)), {}, False),  # dark, but of 8 bits
])
def test_pictures_of_16_bits_that_use_few_of_them_are_noticed(message, settings, is_noticed):
    _, counts, log = done([message], **settings)
    assert counts.get("noticed_few_values", 0) == len(log) == is_noticed
    assert counts["frames_processed"] == 1
