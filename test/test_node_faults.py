"""Bad input: counted and named in /diagnostics, logged once, and the next good frame is processed."""

from __future__ import annotations

import array
import time

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from ros_graph import image_message, picture, pixels_of, wait_for
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import SetBool

from glesam_ros.ros.diagnostics import CameraLedger

SQUARE = (20, 20, 60, 60)
OK, WARN, ERROR, STALE = b"\x00", b"\x01", b"\x02", b"\x03"


def good(client):
    return image_message(picture((SQUARE,)), client.stamp())


def zero_width(client):
    message = good(client)
    message.width, message.step, message.data = 0, 0, array.array("B")
    return message


def zero_height(client):
    message = good(client)
    message.height, message.data = 0, array.array("B")
    return message


def wrong_step(client):
    message = good(client)
    message.step = 100
    return message


def short_data(client):
    message = good(client)
    message.data = message.data[:1000]
    return message


def unknown_encoding(client):
    message = good(client)
    message.encoding = "rgb9"
    return message


def nan_floats(client):
    pixels = np.full((120, 160), 0.5, np.float32)
    pixels[3, 4] = np.nan
    message = Image(height=120, width=160, encoding="32FC1", step=640, data=pixels.tobytes())
    message.header.stamp = client.stamp()
    return message


@pytest.fixture(scope="module")
def seen(launch_shared):
    """A node and its masks."""
    client = launch_shared(max_frame_age_ms=10_000)
    return client, client.subscribe(Image, "masks")


@pytest.mark.parametrize(("make", "reason"), [
    (zero_width, "zero_size"),
    (zero_height, "zero_size"),
    (wrong_step, "bad_step"),
    (short_data, "short_data"),
    (unknown_encoding, "unknown_encoding"),
    (nan_floats, "not_finite"),
])
def test_a_bad_image_is_counted_named_logged_once_and_survived(seen, make, reason):
    client, masks = seen
    key = f"dropped_{reason}"
    before = client.counts()[key]
    client.stream(lambda: make(client), lambda: client.counts()[key] >= before + 5, key)
    assert len(client.logged(f"frame dropped, {reason}: ")) <= 2  # the first and the tenth
    assert client.logged(f"frame dropped, {reason}: ")
    assert reason in client.values()["last_fault"]
    assert client.status().level in (WARN, ERROR)
    masks.messages.clear()
    message = good(client)
    client.stream(lambda: message, lambda: masks.messages, "the masks of the next good frame")
    assert masks.last.header == message.header


def test_a_truncated_jpeg_is_counted_and_survived(launch):
    client = launch(compressed=True)
    masks = client.subscribe(Image, "masks")
    noisy = np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8)
    data = cv2.imencode(".jpg", noisy)[1].tobytes()

    def jpeg(content):
        message = CompressedImage(format="jpeg", data=content)
        message.header.stamp = client.stamp()
        return message

    client.stream(
        lambda: jpeg(data[: len(data) // 2]), lambda: client.counts()["dropped_corrupt_image"] >= 3,
        "dropped_corrupt_image", "image/compressed",
    )
    assert len(client.logged("frame dropped, corrupt_image: ")) <= 2
    assert not masks.messages
    client.stream(lambda: jpeg(data), lambda: masks.messages, "masks of the whole picture", "image/compressed")


def test_a_zero_stamp_is_processed_and_noticed(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")
    client.stream(
        lambda: image_message(picture((SQUARE,)), Time()),
        lambda: client.counts()["noticed_zero_stamp"] >= 3, "a notice",
    )
    assert masks.last.header.stamp == Time()
    assert client.counts()["frames_processed"] >= 3
    assert 0 <= float(client.values()["latency_p50_ms"]) < 5000  # from arrival, not from 1970
    assert len(client.logged("zero_stamp: ")) <= 2


def test_a_backward_stamp_is_dropped_once_and_time_goes_on_from_there(launch):
    client = launch(max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    client.stream(lambda: good(client), lambda: masks.messages, "masks")
    client.wait_count("frames_processed", len(masks))

    def five_seconds_ago():
        message = good(client)
        message.header.stamp.sec -= 5
        return message

    masks.messages.clear()
    stamps = []

    def sent():
        message = five_seconds_ago()
        stamps.append(message.header.stamp)
        return message

    client.stream(sent, lambda: len(masks) >= 3, "masks after the jump")
    assert masks.messages[0].header.stamp != stamps[0]
    client.wait_count("dropped_backward_stamp", 1)
    assert client.counts()["dropped_backward_stamp"] == 1
    assert len(client.logged("frame dropped, backward_stamp: ")) == 1


def test_an_old_frame_is_not_processed(launch):
    client = launch(max_frame_age_ms=300)
    masks = client.subscribe(Image, "masks")

    def old():
        message = good(client)
        message.header.stamp.sec -= 2
        return message

    client.stream(old, lambda: client.counts()["dropped_stale"] >= 3, "dropped_stale")
    assert not masks.messages
    line = client.wait_log("frame dropped, stale: ", "at most 300 ms")
    assert "too slow for this machine" in line and "use_sim_time" not in line
    client.stream(lambda: good(client), lambda: masks.messages, "masks of a fresh frame")


def shifted(client, seconds):
    message = good(client)
    message.header.stamp.sec += seconds
    return message


def test_stamps_of_another_time_are_told_from_a_slow_model(launch):
    client = launch()
    client.subscribe(Image, "masks")
    client.stream(lambda: shifted(client, -3600), lambda: client.counts()["dropped_stale"], "dropped_stale")
    line = client.wait_log("frame dropped, stale: ", "the stamps are of another time; of a bag: ros2 bag play --clock")
    assert "use_sim_time:=true" in line and "too slow" not in line


def test_masks_that_come_later_than_a_frame_may_are_noticed(launch):
    client = launch(model="steady", max_frame_age_ms=90)
    masks = client.subscribe(Image, "masks")
    client.stream(lambda: good(client), lambda: masks.messages, "masks")
    client.wait_log("late_result: expected masks at most 90 ms after the stamp (max_frame_age_ms), they came after ")
    client.stream(
        lambda: good(client), lambda: client.status() and client.status().level == DiagnosticStatus.WARN, "a warning"
    )


def test_a_stamp_ahead_of_the_clock_is_noticed(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")
    client.stream(lambda: shifted(client, 5), lambda: masks.messages, "masks of frames that are ahead")
    client.wait_log("future_stamp: the stamp is ", "synchronise the clocks, or set use_sim_time for a simulation")


def test_without_a_limit_frames_of_any_age_are_processed(launch):
    client = launch(max_frame_age_ms=0)
    masks = client.subscribe(Image, "masks")
    client.stream(lambda: shifted(client, -3600), lambda: len(masks) >= 3, "masks of old frames")
    assert not client.logged("stale")


def test_simulated_time_without_a_clock_is_named(launch):
    client = launch(use_sim_time=True)
    masks = client.subscribe(Image, "masks")
    client.stream(lambda: good(client), lambda: masks.messages, "masks without a clock")
    line = client.wait_log("future_stamp: use_sim_time is set and nothing came on /clock yet")
    assert "ros2 bag play --clock" in line


@pytest.mark.parametrize(("second", "text"), [(100, "stale: "), (10_000, "future_stamp: ")])
def test_stamps_of_another_time_than_the_simulation(launch, second, text):
    client = launch(use_sim_time=True)
    client.subscribe(Image, "masks")

    def frame():
        client.send(Clock(clock=Time(sec=1000)), "/clock")
        return image_message(picture((SQUARE,)), Time(sec=second))

    # the node may get the first pictures before it gets the first /clock
    client.stream(frame, lambda: client.logged(text, "let what publishes the images have use_sim_time, too"), text)
    assert not client.logged("too slow") and not client.logged("or set use_sim_time for")


def test_a_camera_that_stops_and_returns(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")
    wait_for(lambda: client.status(), "diagnostics")
    topic = f"/{client.namespace}/image"
    cure = "start the camera, or set image_topic (compressed:=true for JPEG)"
    assert (client.status().level, client.status().message) == (WARN, f"no publisher on {topic}: {cure}")
    client.publisher(Image, "image")
    wait_for(lambda: client.status().message == f"no frame yet on {topic}", "a status that knows the publisher")
    assert client.status().level == WARN
    client.stream(lambda: good(client), lambda: masks.messages and client.status().level == OK, "a good status")
    wait_for(lambda: client.status().level == STALE, "a stale status")
    assert "camera stopped" in client.status().message and "no publisher" not in client.status().message
    client.wait_log("camera stopped: no frame on", "/image")
    client.node.destroy_publisher(client.publisher(Image, "image"))
    wait_for(lambda: f"; no publisher on {topic}: {cure}" in client.status().message, "a status that misses it")
    assert client.status().level == STALE and "camera stopped" in client.status().message
    client._publishers.clear()
    before = len(masks)
    client.stream(lambda: good(client), lambda: len(masks) > before and client.status().level == OK, "masks again")
    client.wait_log("camera is back")


def test_a_camera_that_never_came_is_told_once_each(launch):
    client = launch(cameras=["front", "rear", "side"])
    front, rear, side = (f"/{client.namespace}/{name}/image" for name in ("front", "rear", "side"))
    assert f"listening to {front}, {rear}, {side} (raw images)" in client.wait_log("listening to ")
    client.node.create_publisher(Image, rear, 1)
    client.send(good(client), "side/image")
    client.wait_log(f"camera 'front': no publisher on {front}: start the camera, or set image_topics (")
    client.wait_log(f"camera 'rear': no frame yet on {rear}")
    client.wait_log("camera 'side' stopped")  # some 2 s after its only frame
    time.sleep(2.5)
    assert len(client.logged("no publisher on")) == len(client.logged("no frame yet on")) == 1


@pytest.mark.parametrize(("compressed", "kind", "has", "lacks"), [
    (False, CompressedImage, "image/compressed", "image"),
    (True, Image, "image", "image/compressed"),
])
def test_a_publisher_of_the_other_transport_is_named_with_the_switch(launch, compressed, kind, has, lacks):
    client = launch(compressed=compressed)
    client.node.create_publisher(kind, has, 1)
    here, there = (f"/{client.namespace}/{name}" for name in (lacks, has))
    text = f"no publisher on {here}, but one on {there}: set compressed:={str(not compressed).lower()}"
    wait_for(lambda: client.status() and client.status().message == text, text)
    assert client.status().level == WARN


def test_frames_that_nobody_wants_are_told_in_the_status(launch):
    client = launch()
    client.stream(
        lambda: good(client),
        lambda: client.status() and client.status().message.endswith(" Hz in, 0.0 Hz processed, no subscriber"),
        "a status that says so",
    )
    assert client.status().level == OK
    masks = client.subscribe(Image, "masks")
    client.stream(
        lambda: good(client), lambda: masks.messages and client.status().message.endswith(" Hz processed"),
        "a status without it",
    )


def test_a_camera_that_changes_its_resolution(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")
    for size in ((120, 160), (90, 200), (240, 320)):
        client.stream(
            lambda size=size: image_message(picture((SQUARE,), size=size), client.stamp()),
            lambda size=size: masks.messages and pixels_of(masks.last).shape == size, f"masks of {size}",
        )
        assert pixels_of(masks.last)[50, 50] == 1
    wait_for(lambda: client.values().get("image_size") == "320x240", "the new size in diagnostics")


def test_a_failing_model_is_an_error_in_diagnostics_and_not_the_end(launch):
    client = launch(model="fragile")
    masks = client.subscribe(Image, "masks")
    client.stream(
        lambda: image_message(picture(ground=(255, 0, 0)), client.stamp()),
        lambda: client.status() and client.status().level == ERROR and "inference failed" in client.status().message,
        "an error status that says so",
    )
    assert "RuntimeError: red is too much" in client.values()["last_fault"]
    assert len(client.logged("inference_error")) <= 2
    # what failed before a pause is not what happens now
    client.call(SetBool, "enable", SetBool.Request(data=False))
    client.stream(
        lambda: image_message(picture(ground=(255, 0, 0)), client.stamp()),
        lambda: "inference failed" not in client.status().message, "another status while the node is paused",
    )
    client.call(SetBool, "enable", SetBool.Request(data=True))
    client.stream(lambda: good(client), lambda: masks.messages, "masks of a good frame")


def test_what_is_only_noticed_is_no_error_while_no_frame_is_lost():
    ledger = CameraLedger("/image")
    ledger.arrived(0.0)
    ledger.noticed("refused_prompt", "outside")
    status = ledger.status("camera", "", 1.0, {})
    assert (status.level, status.message) == (WARN, "faults: 1 refused_prompt")
    ledger.dropped("stale", "too old")
    status = ledger.status("camera", "", 1.5, {})
    assert (status.level, status.message) == (ERROR, "no frame could be processed: 1 refused_prompt, 1 stale")


def test_every_received_frame_is_accounted_for(seen):
    client, _ = seen
    client.stream(lambda: good(client), lambda: client.counts()["frames_received"] > 10, "frames received", rate_hz=100)

    def balanced():
        counts = client.counts()
        return counts["frames_received"] == counts["frames_processed"] + counts["frames_dropped"] > 10

    wait_for(balanced, f"received = processed + dropped; {client.values()}")


def test_simulated_time_that_jumps_back(launch):
    client = launch(use_sim_time=True)
    masks = client.subscribe(Image, "masks")

    def frame_at(second, nanosec=0):
        def make():
            client.send(Clock(clock=Time(sec=second, nanosec=nanosec)), "/clock")
            return image_message(picture((SQUARE,)), Time(sec=second, nanosec=nanosec))
        return make

    # several: the node may get the first pictures before it gets the first /clock
    client.stream(frame_at(1000), lambda: len(masks) >= 10, "masks at 1000 s")
    client.stream(frame_at(5), lambda: masks.last.header.stamp.sec == 5, "masks after the jump to 5 s")
    client.wait_log("the clock jumped")
