"""Classes and restored pictures in the node: known answers, headers, laziness, faults that cost their own result."""

from __future__ import annotations

import functools
import math
import threading
import time

import cv2
import numpy as np
import pytest
from bright_model import BrightRegions
from builtin_interfaces.msg import Time
from rclpy.clock import Clock, ClockType
from rclpy.qos import QoSDurabilityPolicy, QoSProfile
from ros_graph import TIMEOUT_S, image_message, picture, wait_for
from sensor_msgs.msg import Image
from vision_msgs.msg import Classification, Detection2DArray, LabelInfo

from glesam_ros import Pipeline, Settings
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.scheduling import Frame, NewestFrames
from glesam_ros.ros.worker import Worker
from glesam_ros.semantic import SemanticMap

LARGE, SMALL = (20, 20, 60, 60), (100, 40, 40, 40)
RED, GREEN, GROUND = (255, 0, 0), (0, 255, 0), (30, 60, 90)
SKY, ROAD, PERSON = 0, 1, 2
SURE = math.exp(4) / (math.exp(4) + 2)
"""Softmax of logits 4, 0, 0, which the test model gives."""
LATCHED = QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
WARN, ERROR = b"\x01", b"\x02"
TOPICS = ("semantic", "semantic/confidence", "semantic/label_info", "enhanced")


def array_of(message: Image) -> np.ndarray:
    """Pixels by the plain rules of sensor_msgs/Image."""
    kind, channels = {
        "mono8": ("u1", 1), "mono16": ("<u2", 1), "32FC1": ("<f4", 1), "rgb8": ("u1", 3), "bgr8": ("u1", 3)
    }[message.encoding]
    assert message.step == message.width * channels * np.dtype(kind).itemsize and not message.is_bigendian
    return np.frombuffer(bytes(message.data), kind).reshape(message.height, message.width, channels).squeeze()


def truth(pixels: np.ndarray, person: int = PERSON) -> np.ndarray:
    """The class map that the test model has to give for a picture."""
    labels = np.full(pixels.shape[:2], SKY)
    labels[len(labels) // 2 :] = ROAD
    labels[(pixels == 255).all(2)] = person
    return labels


def frames(client, squares=(LARGE, SMALL), ground=GROUND, frame_id="good"):
    return lambda: image_message(picture(squares, ground=ground), client.stamp(), frame_id)


def calls(client, words="semantic call"):
    return len(client.logged(words))


class Steps:
    """Outputs, segmenter and restorer that note the order in which they are called."""

    def __init__(self, asked):
        self.asked, self.taken = frozenset(asked), []
        self.on_segment = lambda: None
        names = ("masks", "quality", "semantic", "detections", "overlay", "enhanced")
        for name in names:
            setattr(self, f"publish_{name}", functools.partial(self._publish, name))

    def wanted(self):
        return self.asked

    def _publish(self, name, *arguments):
        self.taken.append(name)

    def segment(self, image):
        self.taken.append("segment")
        self.on_segment()
        labels = np.zeros(image.shape[:2], np.uint8)
        return SemanticMap(labels, np.ones(labels.shape, np.float32), ("sky",), np.zeros((1, 3), np.uint8))

    def restore(self, image, classes):
        self.taken.append(f"restore {', '.join(classes)}")
        return image


@pytest.fixture
def work():
    """A worker on its own, with one camera and everything noted: `work(steps)` gives it and sends one frame."""
    workers = []

    def start(steps):
        clock, line = Clock(clock_type=ClockType.STEADY_TIME), NewestFrames([""])
        camera = Camera("", "/image", steps)
        pipeline = Pipeline(BrightRegions(), Settings(max_frame_age_ms=10_000))
        worker = Worker(pipeline, {"": camera}, line, clock, print, steps, steps)
        workers.append(worker)
        worker.start()
        line.put(Frame("", image_message(picture((LARGE,)), Time())))  # a stamp of 0 has no age
        return worker, camera

    yield start
    assert all(worker.stop(TIMEOUT_S) for worker in workers)


def values_of(camera):
    return {v.key: v.value for v in camera.ledger.status("", "", time.monotonic(), {}).values}


ALL = ("masks", "quality", "semantic", "detections", "overlay", "enhanced")


@pytest.mark.parametrize(("asked", "taken"), [
    (ALL, ["masks", "quality", "segment", "semantic", "detections", "overlay", "restore sky", "enhanced"]),
    (["semantic", "enhanced"], ["segment", "semantic", "restore sky", "enhanced"]),
    (["masks", "enhanced"], ["masks", "detections", "quality", "overlay", "restore ", "enhanced"]),
])
def test_masks_go_out_before_classes_are_found_and_the_restored_picture_is_last(work, asked, taken):
    steps = Steps(asked)
    _, camera = work(steps)
    wait_for(lambda: values_of(camera)["frames_processed"] == "1", "a result")
    assert steps.taken == taken


def test_a_worker_that_is_told_to_stop_restores_nothing_more(work):
    steps = Steps(["semantic", "enhanced"])
    begun, go_on = threading.Event(), threading.Event()
    steps.on_segment = lambda: begun.set() or go_on.wait(TIMEOUT_S)
    worker, camera = work(steps)
    assert begun.wait(TIMEOUT_S) and not worker.stop(0.05)
    go_on.set()
    assert worker.stop(TIMEOUT_S)
    assert steps.taken == ["segment", "semantic"] and values_of(camera)["frames_processed"] == "1"


@pytest.fixture(scope="module")
def node(launch_shared):
    """A node with classes and restored pictures."""
    return launch_shared(semantic="horizon", restorer="negative", max_frame_age_ms=10_000)


@pytest.fixture(scope="module")
def results(node):
    """One frame with two squares, and one message of every output."""
    kinds = dict.fromkeys(("masks", "semantic", "semantic/confidence", "enhanced", "overlay"), Image)
    inboxes = {name: node.subscribe(kind, name) for name, kind in (kinds | {"detections": Detection2DArray}).items()}
    sent = image_message(picture((LARGE, SMALL)), node.stamp(), "front_optical")
    node.stream(lambda: sent, lambda: all(inbox.messages for inbox in inboxes.values()), "a message of every output")
    return sent, {name: inbox.last for name, inbox in inboxes.items()}


def test_every_result_has_the_header_and_the_size_of_its_image(results):
    sent, found = results
    for name, message in found.items():
        assert message.header == sent.header, name
        if isinstance(message, Image):
            assert (message.height, message.width) == (sent.height, sent.width), name


def test_class_map_is_the_known_one_pixel_by_pixel(results):
    assert results[1]["semantic"].encoding == "mono8"
    np.testing.assert_array_equal(array_of(results[1]["semantic"]), truth(picture((LARGE, SMALL))))


def test_confidence_is_the_softmax_of_the_logits(results):
    assert results[1]["semantic/confidence"].encoding == "32FC1"
    np.testing.assert_allclose(array_of(results[1]["semantic/confidence"]), SURE, atol=1e-6)


def test_detections_keep_their_first_hypothesis_and_get_a_class_as_second(results):
    labels, found = array_of(results[1]["masks"]), results[1]["detections"].detections
    semantic = array_of(results[1]["semantic"])
    assert len(found) == 2
    for detection, score in zip(found, (0.95, 0.75)):
        first, second = (result.hypothesis for result in detection.results)
        assert (first.class_id, first.score) == ("object", pytest.approx(score))
        assert second.class_id == "person"
        # the mask is a little larger or smaller than the square
        share = (semantic[labels == int(detection.id)] == PERSON).mean()
        assert second.score == pytest.approx(share * SURE, abs=0.01)


def test_overlay_shows_the_colour_of_the_class_where_no_mask_is(results):
    overlay, labels = array_of(results[1]["overlay"]), array_of(results[1]["masks"])
    palette = np.random.default_rng(0).integers(0, 256, (3, 3), np.uint8).astype(float)
    far = cv2.dilate((labels > 0).astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
    far[:40] = far[58:62] = False  # the status line, and the edge of two classes
    for rows, index in ((slice(40, 58), SKY), (slice(62, 120), ROAD)):
        seen = overlay[rows][far[rows]][:, ::-1].astype(float)
        assert (seen == seen[0]).all()
        # between the ground and the colour of the class, on the line that joins them
        way = (seen[0] - GROUND) @ (palette[index] - GROUND) / ((palette[index] - GROUND) ** 2).sum()
        assert 0.1 < way <= 1
        np.testing.assert_allclose(seen[0], GROUND + way * (palette[index] - GROUND), atol=1)


def test_enhanced_is_what_the_restorer_made(results, node):
    assert results[1]["enhanced"].encoding == "rgb8"
    np.testing.assert_array_equal(array_of(results[1]["enhanced"]), 255 - picture((LARGE, SMALL)))
    # its prompt: classes by area
    node.wait_log("restorer call with ['road', 'sky', 'person']")


def test_label_info_of_the_class_map_waits_for_late_subscribers(results, node):
    inbox = node.subscribe(LabelInfo, "semantic/label_info", LATCHED)
    wait_for(lambda: inbox.messages, "label_info")
    assert [(c.class_id, c.class_name) for c in inbox.last.class_map] == [(0, "sky"), (1, "road"), (2, "person")]
    instances = node.subscribe(LabelInfo, "label_info", LATCHED)
    wait_for(lambda: instances.messages, "label_info of the masks")
    assert [(c.class_id, c.class_name) for c in instances.last.class_map] == [(1, "object")]
    # the threshold is that of the masks; every pixel has a class
    node.set_parameters(score_threshold=0.5)
    wait_for(lambda: instances.last.threshold == pytest.approx(0.5), "the new threshold")
    late = node.subscribe(LabelInfo, "semantic/label_info", LATCHED)
    wait_for(lambda: late.messages, "label_info")
    assert late.last.threshold == inbox.last.threshold == 0
    node.set_parameters(score_threshold=-1.0)


def test_diagnostics_have_own_times_and_name_the_models(results, node):
    wait_for(lambda: "semantic_p50_ms" in node.values() and "restore_p50_ms" in node.values(), "own times")
    for stage in ("semantic", "restore"):
        for percent in (50, 95, 99):
            assert 0 <= float(node.values()[f"{stage}_p{percent}_ms"]) < 10_000
    values = node.values("model")
    assert (values["semantic"], values["semantic_device"]) == ("horizon", "auto and auto")
    assert (values["restorer"], values["restorer_device"]) == ("negative", "cpu")


def test_models_run_only_for_the_outputs_that_show_them(launch):
    """One camera for each output, with frames only while it is asked."""
    semantic, restorer = {"semantic", "semantic/confidence", "overlay", "detections"}, {"enhanced"}
    topics = ("masks", "quality", *sorted(semantic | restorer))
    names = [topic.replace("/", "_") for topic in topics]
    client = launch(semantic="horizon", restorer="negative", cameras=names, max_frame_age_ms=10_000)
    client.wait_log("warm-up inference took")
    for topic, name in zip(topics, names):
        kind = {"detections": Detection2DArray, "quality": Classification}.get(topic, Image)
        inbox = client.subscribe(kind, f"{name}/{topic}")
        before = calls(client), calls(client, "restorer call")
        client.stream(frames(client), lambda i=inbox: len(i) >= 3, topic, f"{name}/image")
        if topic in semantic:
            wait_for(lambda b=before: calls(client) >= b[0] + 3, f"calls of the semantic model for {topic}")
        else:
            assert calls(client) == before[0], topic
        if topic in restorer:
            wait_for(lambda b=before: calls(client, "restorer call") >= b[1] + 3, "calls of the restorer")
        else:
            assert calls(client, "restorer call") == before[1], topic
    # a picture is encoded for outputs of masks only
    client.wait_count("frames_processed", 3, "camera semantic")
    assert client.values("camera semantic")["encode_p50_ms"] == "nan"
    client.wait_count("frames_processed", 3, "camera masks")
    assert client.values("camera masks")["encode_p50_ms"] != "nan"


def test_off_costs_nothing(launch):
    client = launch()
    overlay, detections = client.subscribe(Image, "overlay"), client.subscribe(Detection2DArray, "detections")
    client.stream(frames(client), lambda: overlay.messages and detections.messages, "results")
    for detection in detections.last.detections:
        assert [result.hypothesis.class_id for result in detection.results] == ["object"]
    for topic in TOPICS:
        assert not client.node.count_publishers(f"/{client.namespace}/{topic}")
    client.wait_count("frames_processed", 1)
    assert not [key for key in client.values() if key.startswith(("semantic", "restore"))]
    assert not client.logged("semantic loaded")
    assert client.ros.end() == 0
    modules = client.ros.output.split("modules:")[1].split()
    assert "glesam_ros.ros.node" in modules
    unasked = ("glesam_ros.models.rass", "onnxruntime", "torch", "diffusers", "transformers")
    assert not [module for module in modules if module.startswith(unasked)]


def test_more_than_256_classes_need_16_bit_and_each_camera_has_its_own_topics(launch):
    client = launch(semantic="horizon300", cameras=["left", "right"])
    for name, squares in (("left", (LARGE,)), ("right", (SMALL,))):
        semantic = client.subscribe(Image, f"{name}/semantic")
        client.stream(frames(client, squares), lambda s=semantic: s.messages, "a class map", f"{name}/image")
        assert semantic.last.encoding == "mono16"
        np.testing.assert_array_equal(array_of(semantic.last), truth(picture(squares), person=299))
        info = client.subscribe(LabelInfo, f"{name}/semantic/label_info", LATCHED)
        wait_for(lambda i=info: i.messages, "label_info")
        assert [c.class_id for c in info.last.class_map] == list(range(300))
        assert info.last.class_map[299].class_name == "person"


def test_a_picture_that_is_ready_after_deactivate_gave_up_on_it_is_no_fault(launch, tmp_path, monkeypatch):
    file = tmp_path / "stuck"
    monkeypatch.setenv("STUCK_RESTORER", str(file))
    monkeypatch.setenv("STOP_TIMEOUT_S", "0.2")
    client = launch(restorer="negative", max_frame_age_ms=10_000)
    enhanced, before = client.subscribe(Image, "enhanced"), calls(client, "restorer call")  # that of the warm-up
    file.touch()
    client.stream(frames(client), lambda: calls(client, "restorer call") > before, "a call of the restorer")
    assert not client.change_state("deactivate")
    client.wait_log("error processing done")
    file.unlink()
    client.wait_log("the frame that deactivate gave up on has ended")
    assert not enhanced.messages
    assert "Traceback" not in client.ros.output


def test_a_fault_beside_the_masks_costs_its_own_result_only(launch):
    client = launch(semantic="horizon", restorer="negative", max_frame_age_ms=10_000)
    inboxes = {name: client.subscribe(Image, name) for name in ("masks", "semantic", "overlay", "enhanced")}
    inboxes["detections"] = client.subscribe(Detection2DArray, "detections")

    def came(name, frame_id):
        return [message for message in list(inboxes[name].messages) if message.header.frame_id == frame_id]

    for ground, slug, text in (
        (RED, "error", "RuntimeError: red is too much"), (GREEN, "out_of_memory", "green takes all memory")
    ):
        client.stream(
            frames(client, ground=ground, frame_id=slug),
            lambda s=slug: all(len(came(name, s)) >= 3 for name in ("masks", "overlay", "detections")),
            "results without classes",
        )
        for message in came("detections", slug):
            assert [[r.hypothesis.class_id for r in d.results] for d in message.detections] == [["object"]] * 2
        for what in ("semantic", "restorer"):
            client.wait_count(f"noticed_{what}_{slug}", 3)
            assert text in client.wait_log(f"{what}_{slug}: ")
            assert len(client.logged(f"{what}_{slug}: ")) <= 2  # the first and the tenth
        assert not came("semantic", slug) and not came("enhanced", slug)
        assert client.status().level == WARN and text in client.values()["last_fault"]
        good = f"after {slug}"
        client.stream(
            frames(client, frame_id=good), lambda g=good: all(came(name, g) for name in inboxes),
            "all results of good frames",
        )
        for detection in came("detections", good)[0].detections:
            assert [r.hypothesis.class_id for r in detection.results] == ["object", "person"]
    dropped = {key for key, count in client.counts().items() if key.startswith("dropped_") and count}
    assert dropped <= {"dropped_overwritten"}


def test_a_semantic_model_that_never_works_does_not_stop_the_masks(launch):
    client = launch(semantic="starless", device="cpu", max_frame_age_ms=10_000)
    wait_for(lambda: client.values("model").get("semantic_device") == "cpu and auto", "the device")
    assert "never enough" in client.wait_log("warm-up of the semantic model failed")
    masks, detections = client.subscribe(Image, "masks"), client.subscribe(Detection2DArray, "detections")
    client.stream(frames(client), lambda: len(masks) >= 3 and len(detections) >= 3, "masks and detections")
    client.wait_count("noticed_semantic_out_of_memory", 3)


def test_a_frame_without_any_result_counts_as_failed(launch):
    client = launch(semantic="horizon")
    semantic = client.subscribe(Image, "semantic")
    client.stream(
        frames(client, ground=RED), lambda: client.status() and "inference failed" in client.status().message,
        "word of three failures in a row",
    )
    assert client.status().level == ERROR
    assert client.counts()["dropped_no_result"] >= 3 and client.counts()["frames_processed"] == 0
    client.stream(frames(client), lambda: semantic.messages and client.status().level != ERROR, "class maps, no error")


def test_the_whole_circle_frees_and_loads_again(launch):
    # tensorrt is for models that have it: the test model names what it was asked for
    client = launch(
        wait_active=False, autostart=False, semantic="horizon", restorer="negative", device="tensorrt", precision="int8"
    )
    for turn in (1, 2):
        assert client.change_state("configure") and client.change_state("activate")
        semantic, enhanced = client.subscribe(Image, "semantic"), client.subscribe(Image, "enhanced")
        client.stream(frames(client), lambda s=semantic, e=enhanced: s.messages and e.messages, "both results")
        wait_for(lambda: client.values("model").get("semantic_device") == "auto and auto", "the device")
        assert client.change_state("deactivate")
        wait_for(lambda n=turn: calls(client, "semantic closed") == calls(client, "restorer closed") == n, "closing")
        assert client.change_state("cleanup")
        for topic in TOPICS:
            name = f"/{client.namespace}/{topic}"
            wait_for(lambda n=name: not client.node.count_publishers(n), f"the end of {topic}")
    assert calls(client, "semantic loaded") == calls(client, "semantic horizon loaded on") == 2


def test_refusals_say_how_to_mend_them(launch, tmp_path, monkeypatch):
    weights = tmp_path / "horizon.onnx"
    monkeypatch.setenv("SEMANTIC_WEIGHTS", str(weights))
    client = launch(semantic="horizon-filed", autostart=False, wait_active=False)
    assert not client.change_state("configure") and client.state() == "unconfigured"
    words = str(weights), "glesam models get horizon"
    client.wait_log("configure failed", *words)
    wait_for(lambda: client.status("model") and client.status("model").level == ERROR, "an error in /diagnostics")
    assert all(word in client.status("model").message for word in words)
    assert "Traceback" not in client.ros.output
    weights.touch()
    assert client.change_state("configure") and client.change_state("activate")

    client = launch(semantic="off", wait_active=False)  # without quotes, as people type it
    assert client.ros.process.wait(TIMEOUT_S) == 1
    assert "'semantic'" in client.ros.output and "put it in quotes: -p 'NAME:=\"off\"'" in client.ros.output

    client = launch(restorer="negativ", autostart=False, wait_active=False)
    assert not client.change_state("configure") and client.state() == "unconfigured"
    client.wait_log("configure failed", "restorer: expected one of", "scr-sd21", "got 'negativ'")


def test_a_folder_is_rass_nano_with_classes_of_ones_own(launch, tmp_path):
    from test_rass_nano import COLOURS, write  # skips where onnx is missing

    client = launch(semantic=write(tmp_path / "mine"), max_frame_age_ms=10_000)
    pixels = picture(ground=COLOURS["grass"])
    pixels[:60], pixels[60:, 80:] = COLOURS["sky"], COLOURS["brick"]
    semantic = client.subscribe(Image, "semantic")
    client.stream(lambda: image_message(pixels, client.stamp()), lambda: semantic.messages, "a class map")
    labels = array_of(semantic.last)
    for rows, columns, name in ((slice(0, 56), slice(None), "sky"), (slice(64, 120), slice(0, 76), "grass"),
                                (slice(64, 120), slice(84, 160), "brick")):
        assert (labels[rows, columns] == list(COLOURS).index(name)).all(), name
    info = client.subscribe(LabelInfo, "semantic/label_info", LATCHED)
    wait_for(lambda: info.messages, "label_info")
    assert [(c.class_id, c.class_name) for c in info.last.class_map] == [*enumerate(COLOURS)]
    wait_for(lambda: client.values("model").get("semantic_device", "").startswith("cpu (fp32, onnxruntime"), "device")
