"""Images in, results out: headers, encodings, known answers, lazy topics, several cameras."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
import rclpy
from geometry_msgs.msg import Point
from rclpy.qos import QoSDurabilityPolicy, QoSProfile
from ros_graph import image_message, picture, pixels_of, wait_for
from sensor_msgs.msg import CompressedImage, Image
from vision_msgs.msg import Classification, Detection2DArray, LabelInfo

from glesam_ros.ros.names import beside

LARGE, SMALL = (20, 20, 60, 60), (100, 40, 40, 40)


@pytest.fixture(scope="module")
def results(launch_shared):
    """One frame with two squares, and one message of every output."""
    client = launch_shared(max_frame_age_ms=10_000)
    inboxes = {
        "masks": client.subscribe(Image, "masks"),
        "confidence": client.subscribe(Image, "confidence"),
        "overlay": client.subscribe(Image, "overlay"),
        "detections": client.subscribe(Detection2DArray, "detections"),
        "quality": client.subscribe(Classification, "quality"),
    }
    sent = image_message(picture((LARGE, SMALL)), client.stamp(), "front_optical")
    client.stream(lambda: sent, lambda: all(inbox.messages for inbox in inboxes.values()), "a message of every output")
    return sent, {name: inbox.last for name, inbox in inboxes.items()}


@pytest.mark.parametrize("name", ["masks", "confidence", "overlay", "detections", "quality"])
def test_header_of_every_output_is_that_of_the_image(results, name):
    sent, out = results
    assert out[name].header == sent.header


@pytest.mark.parametrize(("name", "encoding"), [("masks", "mono16"), ("confidence", "32FC1"), ("overlay", "bgr8")])
def test_pictures_have_the_size_of_the_image(results, name, encoding):
    sent, out = results
    assert (out[name].height, out[name].width, out[name].encoding) == (sent.height, sent.width, encoding)


def test_masks_number_the_squares_by_score(results):
    labels = pixels_of(results[1]["masks"])
    assert labels[50, 50] == 1 and labels[60, 120] == 2
    assert labels[5, 5] == 0
    assert abs(int((labels == 1).sum()) - 3600) < 150
    assert abs(int((labels == 2).sum()) - 1600) < 100


def test_confidence_is_score_times_stability_inside_and_zero_outside(results):
    confidence, labels = pixels_of(results[1]["confidence"]), pixels_of(results[1]["masks"])
    np.testing.assert_allclose(confidence[labels == 1], 0.95, atol=1e-6)
    np.testing.assert_allclose(confidence[labels == 2], 0.75, atol=1e-6)
    assert (confidence[labels == 0] == 0).all()


def test_detections_name_the_mask_value_and_its_box(results):
    labels, found = pixels_of(results[1]["masks"]), results[1]["detections"].detections
    assert [d.id for d in found] == ["1", "2"]
    for detection in found:
        rows, cols = np.nonzero(labels == int(detection.id))
        box = detection.bbox
        assert box.center.position.x == pytest.approx((cols.min() + cols.max() + 1) / 2)
        assert box.center.position.y == pytest.approx((rows.min() + rows.max() + 1) / 2)
        assert (box.size_x, box.size_y) == (cols.max() + 1 - cols.min(), rows.max() + 1 - rows.min())
        assert detection.results[0].hypothesis.class_id == "object"
    assert [d.results[0].hypothesis.score for d in found] == pytest.approx([0.95, 0.75])


def test_overlay_is_bgr_and_leaves_the_ground_alone(results):
    overlay, labels = pixels_of(results[1]["overlay"]), pixels_of(results[1]["masks"])
    near = cv2.dilate((labels > 0).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    near[:40] = True  # the status line is drawn there
    assert (overlay[~near] == (90, 60, 30)).all()
    assert (overlay[50, 50] != 255).any()


def test_quality_carries_the_level_and_whether_enhancement_ran(results):
    # the brightest pixel is 255, which the test model takes for a clear picture
    assert {r.class_id: r.score for r in results[1]["quality"].results} == {"degradation": 0.0, "enhanced": 0.0}


def test_a_dark_image_is_enhanced(launch):
    client = launch(enhancement="auto")
    quality = client.subscribe(Classification, "quality")
    client.stream(
        lambda: image_message(picture(ground=(51, 51, 51)), client.stamp()), lambda: quality.messages, "quality"
    )
    scores = {r.class_id: r.score for r in quality.last.results}
    assert scores["degradation"] == pytest.approx(0.8)
    assert scores["enhanced"] == 1.0


def test_cameras_that_fill_12_of_16_bits(launch):
    """Their pictures are black but for the parameter that says so, and a notice names it."""
    client = launch(max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    grey = picture(((40, 30, 40, 40),), ground=(20, 20, 20))[..., 0].astype(np.uint16) << 4

    def frame():
        height, width = grey.shape
        message = Image(height=height, width=width, encoding="mono16", step=2 * width, data=grey.tobytes())
        message.header.stamp = client.stamp()
        return message

    client.stream(frame, lambda: masks.messages, "masks")
    line = client.wait_log("few_values: of 16 bits the upper 8 count", "1 to 15 of 255", "set max_image_value (4095")
    assert "[1 so far" in line and not pixels_of(masks.last).any()
    client.set_parameters(max_image_value=4095.0)
    client.stream(frame, lambda: pixels_of(masks.last)[50, 60] == 1, "the object")
    noticed = client.wait_count("noticed_few_values", 1)["noticed_few_values"]
    processed = client.counts()["frames_processed"]
    client.stream(frame, lambda: client.counts()["frames_processed"] > processed + 20, "more")
    # of what was under way when the parameter came, a few
    assert client.counts()["noticed_few_values"] < noticed + 10


def test_label_info_has_the_threshold_of_the_model_where_none_is_set(launch):
    client = launch()
    inbox = client.subscribe(LabelInfo, "label_info", QoSProfile(
        depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL
    ))
    wait_for(lambda: inbox.messages, "label_info")
    assert inbox.last.threshold == pytest.approx(0.15)
    client.set_parameters(score_threshold=0.5)
    wait_for(lambda: inbox.last.threshold == pytest.approx(0.5), "the threshold that is set")
    client.set_parameters(score_threshold=-1.0)
    wait_for(lambda: inbox.last.threshold == pytest.approx(0.15), "that of the model")
    assert client.change_state("deactivate")
    client.set_parameters(score_threshold=0.25)
    assert client.change_state("activate")
    wait_for(lambda: inbox.last.threshold == pytest.approx(0.25), "what was set while no model was there")


def test_label_info_waits_for_late_subscribers(launch):
    client = launch(score_threshold=0.25)
    latched = QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
    inbox = client.subscribe(LabelInfo, "label_info", latched)
    wait_for(lambda: inbox.messages, "label_info")
    assert [(c.class_id, c.class_name) for c in inbox.last.class_map] == [(1, "object")]
    assert inbox.last.threshold == pytest.approx(0.25)
    before = inbox.last.header.stamp
    client.set_parameters(score_threshold=0.5)
    wait_for(lambda: inbox.last.threshold == pytest.approx(0.5), "the new threshold")
    after = inbox.last.header.stamp
    assert (after.sec, after.nanosec) > (before.sec, before.nanosec) > (0, 0)
    assert [(c.class_id, c.class_name) for c in inbox.last.class_map] == [(1, "object")]
    client.set_parameters(max_instances=7)
    time.sleep(0.3)
    assert len(inbox) == 2


def test_compressed_input(launch):
    client = launch(compressed=True, max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    data = cv2.imencode(".png", picture((LARGE,))[..., ::-1])[1].tobytes()
    message = CompressedImage(format="png", data=data)
    message.header.stamp, message.header.frame_id = client.stamp(), "jpeg_camera"
    client.stream(lambda: message, lambda: masks.messages, "masks", "image/compressed")
    assert masks.last.header == message.header
    assert pixels_of(masks.last)[50, 50] == 1


@pytest.mark.parametrize("stable_ids", [True, False])
def test_objects_keep_their_ids_when_their_ranks_change(launch, stable_ids):
    client = launch(max_frame_age_ms=10_000, stable_ids=stable_ids)
    masks = client.subscribe(Image, "masks")
    detections = client.subscribe(Detection2DArray, "detections")
    for number, squares in enumerate(((LARGE, SMALL), ((22, 22, 50, 50), (96, 36, 56, 56)))):
        client.stream(
            lambda: image_message(picture(squares), client.stamp(), str(number)),  # noqa: B023  # used at once
            lambda: all(x.messages and x.last.header.frame_id == str(number) for x in (masks, detections)),  # noqa: B023
            f"results of picture {number}",
        )
    labels, kept = pixels_of(masks.last), (1, 2) if stable_ids else (2, 1)
    assert (labels[50, 50], labels[60, 120]) == kept
    # best first: the right one is larger now
    assert [d.id for d in detections.last.detections] == [str(kept[1]), str(kept[0])]


def test_compressed_results_come_without_a_subscriber_of_the_raw_ones(launch):
    client = launch(max_frame_age_ms=10_000)
    masks, overlay = (client.subscribe(CompressedImage, f"{name}/compressed") for name in ("masks", "overlay"))
    sent = image_message(picture((LARGE, SMALL)), client.stamp(), "front_optical")
    client.stream(lambda: sent, lambda: masks.messages and overlay.messages, "compressed masks and overlay")
    assert masks.last.header == overlay.last.header == sent.header
    labels = cv2.imdecode(np.frombuffer(masks.last.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint16
    assert labels[50, 50] == 1 and labels[60, 120] == 2 and labels[5, 5] == 0
    drawn = cv2.imdecode(np.frombuffer(overlay.last.data, np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape[:2] == (sent.height, sent.width)
    assert np.abs(drawn[-8:, -8:].astype(int) - (90, 60, 30)).max() <= 6  # the ground, BGR


def test_what_belongs_to_a_topic_goes_where_it_is_remapped_to(launch):
    """Clicks of rqt_image_view and image_transport's JPEG, of the input, too, unless they have a rule of their own."""
    client = launch(compressed=True, max_frame_age_ms=10_000, arguments=[
        "-r", "image:=/{namespace}/cam/raw", "-r", "overlay:=view", "-r", "masks/compressed:=packed",
    ])
    view, packed = (client.subscribe(CompressedImage, name) for name in ("view/compressed", "packed"))
    client.publisher(Point, "view_mouse_left")
    coded = cv2.imencode(".png", picture((LARGE, SMALL))[..., ::-1])[1].tobytes()

    def frame():
        message = CompressedImage(format="png", data=coded)
        message.header.stamp = client.stamp()
        return message

    client.stream(frame, lambda: view.messages and packed.messages, "an overlay and masks", "cam/raw/compressed")
    client.send(Point(x=120.0, y=60.0), "view_mouse_left")

    def only_small():
        labels = cv2.imdecode(np.frombuffer(packed.last.data, np.uint8), cv2.IMREAD_UNCHANGED)
        return labels[60, 120] == 1 and not labels[50, 50]

    client.stream(frame, only_small, "what was clicked", "cam/raw/compressed")


@pytest.mark.parametrize(("rules", "expected"), [
    ([], "/cam/masks/compressed"),
    (["masks:=/seen"], "/seen/compressed"),
    (["masks:=seen"], "/cam/seen/compressed"),
    (["masks/compressed:=packed"], "/cam/packed"),
    (["masks:=/seen", "masks/compressed:=packed"], "/cam/packed"),
    (["overlay:=/seen"], "/cam/masks/compressed"),
])
def test_a_topic_beside_another_goes_along_unless_it_has_a_rule_of_its_own(_ros, rules, expected):
    arguments = ["--ros-args", *(word for rule in rules for word in ("-r", rule))]
    node = rclpy.create_node("names", namespace="cam", cli_args=arguments)
    try:
        assert node.resolve_topic_name(beside(node, "masks", "/compressed")) == expected
    finally:
        node.destroy_node()


def test_cameras_whose_topics_are_exchanged(launch):
    """A name is remapped once, not again where it leads to."""
    client = launch(cameras=["left", "right"], max_frame_age_ms=10_000, arguments=[
        "-r", "left/image:=/{namespace}/right/image", "-r", "right/image:=/{namespace}/left/image",
    ])
    left = client.subscribe(Image, "left/masks")
    right = client.subscribe(Image, "right/masks")
    client.stream(
        lambda: image_message(picture((LARGE,)), client.stamp()), lambda: left.messages, "masks of left", "right/image"
    )
    assert not right.messages
    where = f"/{client.namespace}/right/image"
    wait_for(lambda: client.values("camera left").get("topic") == where, f"{where} in the diagnostics")


def test_a_rate_next_to_nothing_ends_with_the_next_value(launch):
    client = launch(max_rate_hz=1e-10)
    masks = client.subscribe(Image, "masks")
    frame = lambda: image_message(picture((LARGE,)), client.stamp())  # noqa: E731
    client.stream(frame, lambda: masks.messages, "the first masks")
    client.set_parameters(max_rate_hz=0.0)
    before = len(masks)
    client.stream(frame, lambda: len(masks) > before + 3, "more")


def test_frames_are_processed_at_most_so_often(launch):
    client = launch(max_rate_hz=4.0)
    masks = client.subscribe(Image, "masks")
    began = time.monotonic()
    client.stream(
        lambda: image_message(picture((LARGE,)), client.stamp()), lambda: time.monotonic() > began + 3, "3 s",
        rate_hz=40,
    )
    assert 0 < len(masks) <= 4 * (time.monotonic() - began) + 1
    client.wait_count("dropped_overwritten", 10)
    client.set_parameters(max_rate_hz=0.0)
    before = client.counts()["frames_processed"]
    client.stream(
        lambda: image_message(picture((LARGE,)), client.stamp()),
        lambda: client.counts()["frames_processed"] > before + 30, "many more", rate_hz=40,
    )


def test_nothing_is_inferred_without_a_subscriber_and_only_what_is_subscribed_is_published(launch):
    client = launch()
    client.stream(
        lambda: image_message(picture((LARGE,)), client.stamp()),
        lambda: client.counts()["dropped_no_subscriber"] >= 5, "dropped_no_subscriber",
    )
    assert client.counts()["frames_processed"] == 0

    quality = client.subscribe(Classification, "quality")
    client.stream(
        lambda: image_message(picture((LARGE,)), client.stamp()), lambda: len(quality) >= 3, "quality"
    )
    client.wait_count("frames_processed", 3)
    # without a topic that shows masks the mask decoder does not run
    assert client.values()["decode_p50_ms"] == "0.0"


def test_without_vision_msgs_the_rest_runs_and_one_warning_says_what_to_install(launch, tmp_path, monkeypatch):
    package = tmp_path / "vision_msgs"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not on this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    client = launch()
    client.wait_log("vision_msgs cannot be imported", "apt install ros-$ROS_DISTRO-vision-msgs")
    assert len(client.logged("vision_msgs")) == 1
    assert not client.node.count_publishers(f"/{client.namespace}/detections")
    masks = client.subscribe(Image, "masks")
    client.stream(lambda: image_message(picture((LARGE,)), client.stamp()), lambda: masks.messages, "masks")


def test_two_cameras_take_turns_though_one_is_much_faster(launch):
    client = launch(model="steady", cameras=["left", "right"])
    order = []
    inboxes = {name: client.subscribe(Image, f"{name}/masks") for name in ("left", "right")}
    for name, inbox in inboxes.items():
        inbox.messages = order  # one list for both, in order of arrival
        assert client.publisher(Image, f"{name}/image").get_subscription_count() == 1
    end = time.monotonic() + 3
    step = 0
    while time.monotonic() < end:
        client.send(image_message(picture((LARGE,)), client.stamp(), "left"), "left/image")
        if step % 4 == 0:
            client.send(image_message(picture((LARGE,)), client.stamp(), "right"), "right/image")
        step += 1
        time.sleep(0.02)
    left = client.wait_count("frames_processed", 3, "camera left")["frames_processed"]
    right = client.wait_count("frames_processed", 3, "camera right")["frames_processed"]
    # the model takes 10 frames a second: fair turns give each camera half of them, arrival order would give left 4 of 5
    assert 0.6 < left / right < 1.7
    assert client.counts("camera left")["dropped_overwritten"] > left
