"""`glesam bag`: real bags in both storages written, segmented and read back with rosbags."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import bright_model
import cv2
import numpy as np
import pytest
import yaml
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from glesam_ros.cli import bag as cli_bag
from glesam_ros.cli.bagfile import message_types
from glesam_ros.cli.main import main
from glesam_ros.cli.result_topics import RESULTS
from glesam_ros.cli.stopping import Terminated
from glesam_ros.models import OutOfMemory, register_model, register_restorer, register_semantic, semantic_names

TYPES = get_typestore(Stores.ROS2_JAZZY)
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
START = 1_700_000_000_000_000_000
FRAME = 33_333_333


def new(kind: str, **fields: Any) -> Any:
    return TYPES.types[kind](**fields)


def header(number: int) -> Any:
    stamp = START - 5_000_000 + number * FRAME  # taken 5 ms before it was recorded
    return new(
        "std_msgs/msg/Header",
        stamp=new("builtin_interfaces/msg/Time", sec=stamp // 10**9, nanosec=stamp % 10**9),
        frame_id="front_optical",
    )


def image(number: int, rgb: np.ndarray, encoding: str = "bgr8", **changes: Any) -> Any:
    pixels = np.ascontiguousarray(rgb[..., ::-1] if encoding == "bgr8" else rgb)
    fields = {
        "header": header(number), "height": rgb.shape[0], "width": rgb.shape[1], "encoding": encoding,
        "is_bigendian": 0, "step": pixels.strides[0], "data": pixels.reshape(-1).view(np.uint8),
    }
    return new(IMAGE, **{**fields, **changes})


def jpeg(number: int, rgb: np.ndarray, keep: float = 1.0) -> Any:
    data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 100])[1].reshape(-1)
    return new(COMPRESSED, header=header(number), format="jpeg", data=data[: int(keep * len(data))])


def write_bag(path: Path, messages: list[tuple[str, str, int, Any]], storage: str = "mcap") -> Path:
    with Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()]) as writer:
        connections: dict[tuple[str, str], Any] = {}
        for topic, kind, number, message in messages:
            if (topic, kind) not in connections:
                connections[topic, kind] = writer.add_connection(topic, kind, typestore=TYPES)
            raw = message if isinstance(message, bytes) else TYPES.serialize_cdr(message, kind)
            writer.write(connections[topic, kind], START + number * FRAME, raw)
    return path


def read(path: Path) -> dict[str, list[tuple[int, Any]]]:
    found: dict[str, list[tuple[int, Any]]] = {}
    with AnyReader([path]) as reader:  # no typestore: the definitions must be in the bag
        for connection, log_time, raw in reader.messages():
            found.setdefault(connection.topic, []).append((log_time, reader.deserialize(raw, connection.msgtype)))
    return found


def bag(*arguments: object) -> int:
    return main(["bag", *map(str, arguments), "--model", bright_model.register()])


def pixels(message: Any, dtype: str) -> np.ndarray:
    return message.data.view(dtype).reshape(message.height, message.width, -1).squeeze()


def stamp_of(message: Any) -> tuple[int, int, str]:
    return message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id


def note(number: int) -> tuple[str, str, int, Any]:
    return "/notes", "std_msgs/msg/String", number, new("std_msgs/msg/String", data=f"note {number}")


def drive() -> list[tuple[str, str, int, Any]]:
    """Four good frames, the third of them dark, four bad ones, and a topic that is no camera."""
    scene = bright_model.scene()
    topic = "/front/image_raw"
    return [
        note(0),
        (topic, IMAGE, 0, image(0, scene)),
        (topic, IMAGE, 1, image(1, scene, data=np.zeros(10, np.uint8))),
        (topic, IMAGE, 2, image(2, scene, "rgb8")),
        (topic, IMAGE, 3, image(3, scene, encoding="klingon8")),
        (topic, IMAGE, 4, image(4, bright_model.scene(level=80))),
        (topic, IMAGE, 5, image(5, scene, width=0)),
        (topic, IMAGE, 6, b"\x00\x01\x00\x00\x01\x02\x03"),
        (topic, IMAGE, 7, image(7, np.zeros_like(scene))),
        note(8),
    ]


def twelve_bits(number: int) -> Any:
    """The scene in the lower 12 of 16 bits."""
    return image(number, bright_model.scene()[..., :1].astype(np.uint16) << 4, "mono16")


def test_a_camera_that_fills_12_of_16_bits(tmp_path):
    source = write_bag(tmp_path / "drive", [("/cam", IMAGE, n, twelve_bits(n)) for n in range(2)])
    for white, expected in ((0, 0), (4095, bright_model.scene_masks().any(0))):
        out = tmp_path / str(white)
        assert bag(source, "--out", out, "--max-image-value", white) == 0
        for _, message in read(out)["/glesam/masks"]:
            np.testing.assert_array_equal(pixels(message, "u2") > 0, expected)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_results_fit_their_frames(storage, tmp_path, capsys):
    source = write_bag(tmp_path / "drive", drive(), storage)
    assert bag(source, "--out", tmp_path / "out", "--storage", storage) == 0
    before, after = read_raw(source), read_raw(tmp_path / "out")
    for topic in ("/front/image_raw", "/notes"):
        assert after[topic] == before[topic]  # byte for byte, bad frames too
    with AnyReader([tmp_path / "out"]) as reader:
        kinds = {c.topic: c.msgtype for c in reader.connections}
        found = {f"/glesam/{name}": [] for name in RESULTS}
        for connection, log_time, raw in reader.messages():
            if connection.topic in found:
                found[connection.topic].append((log_time, reader.deserialize(raw, connection.msgtype)))
    assert kinds == {
        "/notes": "std_msgs/msg/String", "/front/image_raw": IMAGE,
        "/glesam/masks": IMAGE, "/glesam/confidence": IMAGE, "/glesam/overlay": IMAGE,
        "/glesam/detections": "vision_msgs/msg/Detection2DArray", "/glesam/quality": "vision_msgs/msg/Classification",
    }
    good = [0, 2, 4, 7]
    for rows in found.values():
        assert [t for t, _ in rows] == [START + n * FRAME for n in good]
        expected = [(h.stamp.sec, h.stamp.nanosec, "front_optical") for h in map(header, good)]
        assert [stamp_of(m) for _, m in rows] == expected
    masks, confidences, overlays, detections, quality = ([m for _, m in found[f"/glesam/{n}"]] for n in RESULTS)
    truth = bright_model.scene_masks()
    for mask, confidence, overlay, detected in zip(masks[:3], confidences, overlays, detections):
        assert (mask.encoding, confidence.encoding, overlay.encoding) == ("mono16", "32FC1", "bgr8")
        labels, sureness = pixels(mask, "u2"), pixels(confidence, "f4")
        np.testing.assert_array_equal(labels > 0, truth.any(0))
        assert sorted(d.id for d in detected.detections) == ["1", "2"]
        for detection in detected.detections:
            own = labels == int(detection.id)
            assert any((own == t).all() for t in truth)
            rows, columns = np.nonzero(own)
            assert detection.bbox.center.position.x == (columns.min() + columns.max() + 1) / 2
            assert detection.bbox.center.position.y == (rows.min() + rows.max() + 1) / 2
            assert (detection.bbox.size_x, detection.bbox.size_y) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
            hypothesis = detection.results[0].hypothesis
            assert hypothesis.class_id == "object"
            np.testing.assert_allclose(sureness[own], hypothesis.score, rtol=1e-6)  # the stability is 1
            assert stamp_of(detection) == stamp_of(detected)
        assert not sureness[labels == 0].any()
        assert pixels(overlay, "u1").shape == (64, 96, 3)
    assert not pixels(masks[3], "u2").any()
    assert detections[3].detections == []
    levels = [{r.class_id: r.score for r in q.results} for q in quality]
    clear, dark = {"degradation": 0, "enhanced": 0}, {"degradation": 1, "enhanced": 1}
    assert levels == [clear, clear, dark, dark]
    said = capsys.readouterr()
    assert "4 of 8 frames of /front/image_raw, 6 instances" in said.out
    assert "bad frames: broken_message 1, short_data 1, unknown_encoding 1, zero_size 1" in said.out
    assert "bad frame /front/image_raw at 1700000000.033 s: short_data: expected" in said.err


def read_raw(path: Path) -> dict[str, list[tuple[int, bytes]]]:
    found: dict[str, list[tuple[int, bytes]]] = {}
    with AnyReader([path]) as reader:
        for connection, log_time, raw in reader.messages():
            found.setdefault(connection.topic, []).append((log_time, bytes(raw)))
    return found


def test_players_find_type_hash_and_reliable_qos_in_the_metadata(tmp_path):
    source = write_bag(tmp_path / "drive", drive())
    assert bag(source, "--out", tmp_path / "out") == 0
    metadata = yaml.safe_load((tmp_path / "out/metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert metadata["storage_identifier"] == "mcap"
    topics = {t["topic_metadata"]["name"]: t["topic_metadata"] for t in metadata["topics_with_message_count"]}
    assert topics["/glesam/masks"]["offered_qos_profiles"][0]["reliability"] == "reliable"
    assert topics["/glesam/detections"]["type_description_hash"].startswith("RIHS01_")
    assert (tmp_path / "out/out.mcap").read_bytes().startswith(b"\x89MCAP0\r\n")
    assert bag(source, "--out", tmp_path / "humble", "--ros-distro", "humble") == 0
    metadata = yaml.safe_load((tmp_path / "humble/metadata.yaml").read_text())["rosbag2_bagfile_information"]
    for topic in metadata["topics_with_message_count"]:
        assert isinstance(topic["topic_metadata"]["offered_qos_profiles"], str)  # all that Humble can read
    with AnyReader([tmp_path / "humble"]) as reader:
        profile = next(c for c in reader.connections if c.topic == "/glesam/masks").ext.offered_qos_profiles[0]
    assert profile.reliability is QosReliability.RELIABLE


def test_vision_msgs_definitions_agree_with_the_interface_files():
    """The same fields in the same order as the text that the pip-only build compiles."""
    types = message_types("jazzy")
    folder = Path(__file__).parents[1] / "scripts/vision_msgs/msg"
    files = sorted(folder.glob("*.msg"))
    assert files
    for file in files:
        if f"vision_msgs/msg/{file.stem}" not in types.fielddefs:
            continue
        lines = [line.split("#")[0].split() for line in file.read_text().splitlines()]
        assert [name for name, _ in types.fielddefs[f"vision_msgs/msg/{file.stem}"][1]] == [w[1] for w in lines if w]


class Halves:
    """The left half of a picture is "wall", the right one "floor"."""

    name, device, classes = "halves", "cpu", ("floor", "wall", "nothing")
    palette = np.array([(10, 20, 30), (200, 100, 0), (0, 0, 0)], np.uint8)

    def logits(self, image: Any) -> Any:
        if image.max() == 0:
            raise OutOfMemory("black takes all memory")
        planes = np.zeros((3, *image.shape[:2]), np.float32)
        planes[1, :, : image.shape[1] // 2] = planes[0, :, image.shape[1] // 2 :] = 3
        return planes

    def free(self) -> None: ...

    def close(self) -> None: ...


class Inverse:
    """The negative; notes what it was told of the picture."""

    name, device = "inverse", "cpu"
    told: list[tuple[str, ...]] = []

    def restore(self, image: Any, classes: Any = ()) -> Any:
        self.told.append(tuple(classes))
        return 255 - image

    def free(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def beside():
    """Options that load a semantic model and a restorer."""
    if "halves" not in semantic_names():
        register_semantic("halves", lambda device, precision: Halves())
        register_restorer("inverse", lambda device, precision: Inverse())
    Inverse.told.clear()
    return ["--semantic", "halves", "--restorer", "inverse"]


def test_classes_and_restored_pictures(beside, tmp_path):
    source = write_bag(tmp_path / "drive", drive()[:6])
    assert bag(source, "--out", tmp_path / "out", *beside) == 0
    found = read(tmp_path / "out")
    scene, good = bright_model.scene(), [0, 2, 4]
    for name in ("semantic", "semantic/confidence", "enhanced"):
        rows = found[f"/glesam/{name}"]
        assert [t for t, _ in rows] == [START + n * FRAME for n in good]
        assert [stamp_of(m) for _, m in rows] == [stamp_of(image(n, scene)) for n in good]
    wall = np.zeros(scene.shape[:2], bool)
    wall[:, : scene.shape[1] // 2] = True
    semantic, confidence, enhanced = (
        found[f"/glesam/{name}"][0][1] for name in ("semantic", "semantic/confidence", "enhanced")
    )
    assert (semantic.encoding, confidence.encoding, enhanced.encoding) == ("mono8", "32FC1", "rgb8")
    np.testing.assert_array_equal(pixels(semantic, "u1"), wall)
    sure = np.exp(3) / (np.exp(3) + 2)
    np.testing.assert_allclose(pixels(confidence, "f4"), sure, rtol=1e-5)
    np.testing.assert_array_equal(pixels(enhanced, "u1"), 255 - scene)
    assert Inverse.told == [("floor", "wall")] * 3

    [(when, info)] = found["/glesam/semantic/label_info"]
    assert when == START and [(c.class_id, c.class_name) for c in info.class_map] == [*enumerate(Halves.classes)]
    with AnyReader([tmp_path / "out"]) as reader:
        profile = next(c for c in reader.connections if c.topic.endswith("/semantic/label_info")).ext
    assert profile.offered_qos_profiles[0].durability is QosDurability.TRANSIENT_LOCAL

    masks, detections = found["/glesam/masks"][0][1], found["/glesam/detections"][0][1].detections
    labels = pixels(masks, "u2")
    assert len(detections) == 2
    for detection in detections:
        own = labels == int(detection.id)
        first, second = (result.hypothesis for result in detection.results)
        assert first.class_id == "object"
        assert second.class_id == ("wall" if wall[own].mean() > 0.5 else "floor")
        assert second.score == pytest.approx(max(wall[own].mean(), 1 - wall[own].mean()) * sure, rel=1e-4)
    overlay = pixels(found["/glesam/overlay"][0][1], "u1")[..., ::-1]
    assert (overlay[-2:, :2] == Halves.palette[1] / 2).all() and (overlay[-2:, -2:] == Halves.palette[0] / 2).all()


def test_models_beside_run_only_for_their_results(beside, tmp_path):
    black = write_bag(tmp_path / "drive", [("/cam", IMAGE, 0, image(0, np.zeros((64, 96, 3), np.uint8)))])
    chosen = ["--results-only", "--result", "masks", "--result", "enhanced"]
    assert bag(black, "--out", tmp_path / "out", *beside, *chosen) == 0  # classes would take all memory
    assert set(read(tmp_path / "out")) == {"/glesam/masks", "/glesam/enhanced"}
    assert Inverse.told == [()]
    assert bag(black, "--out", tmp_path / "masks", *beside, *chosen[:3]) == 0
    assert len(Inverse.told) == 1


def test_a_lack_of_memory_is_one_line(beside, tmp_path, capsys):
    source = write_bag(tmp_path / "drive", [("/cam", IMAGE, 0, image(0, np.zeros((64, 96, 3), np.uint8)))])
    assert bag(source, "--out", tmp_path / "out", *beside) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glesam bag: error: ")]
    assert len(said) == 1 and "black takes all memory" in said[0] and "halves on cpu" in said[0]
    assert not (tmp_path / "out").exists()


class Tight(bright_model.BrightRegions):
    """Has memory for a long side of 384; begins with 512."""

    def encode(self, image: Any, budget: Any) -> Any:
        if (budget.processing_size or self.own_size) > 384:
            raise OutOfMemory("no room")
        return super().encode(image, budget)


def test_a_model_short_of_memory_goes_on_with_less(tmp_path):
    register_model("tight", lambda device, precision: Tight())
    source = write_bag(tmp_path / "drive", drive()[:6])
    assert bag(source, "--out", tmp_path / "whole", "--results-only") == 0
    tight = ["bag", source, "--out", tmp_path / "tight", "--results-only", "--model", "tight"]
    assert main([*map(str, tight)]) == 0
    whole, found = read(tmp_path / "whole"), read(tmp_path / "tight")
    assert [t for t, _ in found["/glesam/masks"]] == [t for t, _ in whole["/glesam/masks"]] != []
    # where even the least is too much, one line says so
    Tight.own_size = 1024
    assert main([*map(str, tight[:3]), str(tmp_path / "none"), *map(str, tight[4:])]) == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--semantic", "halfs"], "semantic: expected one of .*rass-nano"),
    (["--restorer", "invers"], "restorer: expected one of .*scr-sd21"),
])
def test_unknown_models_beside_are_refused_with_the_known_ones(arguments, expected, tmp_path, capsys):
    assert bag(write_bag(tmp_path / "drive", drive()), "--out", tmp_path / "out", *arguments) == 1
    assert re.search(f"glesam bag: error: {expected}", capsys.readouterr().err)


@pytest.mark.parametrize(("result", "option"), [("semantic/confidence", "--semantic"), ("enhanced", "--restorer")])
def test_a_result_needs_its_model(result, option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bag("drive", "--out", tmp_path / "out", "--result", result)
    assert stop.value.code == 2
    assert f"--result {result}: expected {option} NAME with it" in capsys.readouterr().err


def test_results_only_and_chosen_results(tmp_path):
    source = write_bag(tmp_path / "drive", drive())
    arguments = ["--results-only", "--result", "masks", "--result", "detections", "--namespace", "seen/"]
    assert bag(source / "drive.mcap", "--out", tmp_path / "out", *arguments) == 0  # the file does as well as its folder
    assert set(read(tmp_path / "out")) == {"/seen/masks", "/seen/detections"}


def two_cameras() -> list[tuple[str, str, int, Any]]:
    scene = bright_model.scene()
    depth = np.full((64, 96), 1500, np.uint16)
    messages = []
    for n in range(3):
        messages += [
            ("/left/image", IMAGE, n, image(n, scene)),
            ("/left/image/compressed", COMPRESSED, n, jpeg(n, scene)),
            ("/left/depth", IMAGE, n, image(n, depth[..., None], "16UC1")),
            ("/right/compressed", COMPRESSED, n, jpeg(n, scene, keep=0.5 if n == 1 else 1)),
            ("/glesam/overlay", IMAGE, n, image(n, scene)),
        ]
    return messages


def test_cameras_are_found_and_kept_apart(tmp_path, capsys):
    source = write_bag(tmp_path / "drive", two_cameras())
    assert bag(source, "--out", tmp_path / "out", "--results-only") == 0
    found = read(tmp_path / "out")
    assert len(found["/glesam/left/image/masks"]) == 3
    assert len(found["/glesam/right/compressed/masks"]) == 2
    assert len(found) == 2 * len(RESULTS)
    said = capsys.readouterr()
    assert "corrupt_image 1" in said.out
    for topic in ("/left/depth: left out, 16UC1", "/left/image/compressed: left out", "/glesam/overlay: left out"):
        assert topic in said.err
    truth = bright_model.scene_masks().any(0)
    assert ((pixels(found["/glesam/right/compressed/masks"][0][1], "u2") > 0) == truth).mean() > 0.99


def test_old_results_are_replaced(tmp_path, capsys):
    source = write_bag(tmp_path / "drive", two_cameras())
    assert bag(source, "--out", tmp_path / "out", "--topic", "/left/image") == 0
    found = read(tmp_path / "out")
    assert len(found["/glesam/overlay"]) == 3
    assert found["/glesam/overlay"][0][1].encoding == "bgr8"
    assert len(found["/left/depth"]) == 3
    assert "/glesam/overlay: not copied, the new results take its place" in capsys.readouterr().err


def test_one_gate_for_each_camera(tmp_path):
    """A dark camera does not switch enhancement on for a clear one."""
    messages = []
    for n in range(3):
        messages += [
            ("/clear", IMAGE, n, image(n, bright_model.scene())),
            ("/dark", IMAGE, n, image(n, bright_model.scene(level=80))),
        ]
    source = write_bag(tmp_path / "drive", messages)
    assert bag(source, "--out", tmp_path / "out", "--results-only", "--result", "quality") == 0
    found = read(tmp_path / "out")
    for topic, expected in (("clear", 0), ("dark", 1)):
        assert [m.results[1].score for _, m in found[f"/glesam/{topic}/quality"]] == [expected] * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "--out", "out"], "nowhere: no such bag$"),
        ([".", "--out", "out"], "a folder without metadata.yaml; .* --from-images"),
        (["film.avi", "--out", "out"], r"film.avi: expected a bag \(folder, .mcap, .db3, .bag\)"),
        (["drive", "--out", "drive"], "exists already"),
        (["drive", "--out", "out", "--topic", "/rear"], "not in .*; its image topics: /front/image_raw"),
        (["drive", "--out", "out", "--topic", "/notes"], "expected sensor_msgs/Image or CompressedImage, got std_msgs"),
        (["text.mcap", "--out", "out"], "cannot be read as a bag"),
    ],
)
def test_failures_are_one_line(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bag(Path("drive"), drive())
    for name in ("text.mcap", "film.avi"):
        Path(name).write_text("this is no bag")
    assert bag(*arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("glesam bag: error: ")
    assert re.search(expected, lines[0])
    assert not Path("out").exists()


def test_bag_without_a_usable_frame_fails(tmp_path, capsys):
    broken = [("/cam", IMAGE, n, image(n, bright_model.scene(), step=1)) for n in range(8)]
    source = write_bag(tmp_path / "drive", broken)
    assert bag(source, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "bad_step 8" in said.out
    assert said.err.count("bad frame /cam") == 5  # named at first, counted always
    assert "no frame could be used" in said.err


def test_ros_1_bag_becomes_a_ros_2_bag(tmp_path):
    old = get_typestore(Stores.ROS1_NOETIC)
    kinds = old.types
    scene = bright_model.scene()
    with Writer1(tmp_path / "old.bag") as writer:
        connection = writer.add_connection("/cam", IMAGE, typestore=old)
        for n in range(2):
            stamp = kinds["builtin_interfaces/msg/Time"](sec=100 + n, nanosec=7)
            message = kinds[IMAGE](
                header=kinds["std_msgs/msg/Header"](seq=n, stamp=stamp, frame_id="old"), height=64, width=96,
                encoding="rgb8", is_bigendian=0, step=288, data=scene.reshape(-1),
            )
            writer.write(connection, (100 + n) * 10**9, old.serialize_ros1(message, IMAGE))
    assert bag(tmp_path / "old.bag", "--out", tmp_path / "out", "--storage", "sqlite3") == 0
    found = read(tmp_path / "out")
    assert [stamp_of(m) for _, m in found["/glesam/masks"]] == [(100, 7, "old"), (101, 7, "old")]
    assert [stamp_of(m) for _, m in found["/cam"]] == [(100, 7, "old"), (101, 7, "old")]
    np.testing.assert_array_equal(pixels(found["/cam"][1][1], "u1"), scene)
    np.testing.assert_array_equal(pixels(found["/glesam/masks"][1][1], "u2") > 0, bright_model.scene_masks().any(0))


def test_broken_messages_of_a_ros_1_bag_are_named_and_the_others_are_copied(tmp_path, capsys):
    old = get_typestore(Stores.ROS1_NOETIC)
    kinds = old.types
    stamp = kinds["builtin_interfaces/msg/Time"](sec=100, nanosec=7)
    scene = bright_model.scene()
    whole = old.serialize_ros1(kinds[IMAGE](
        header=kinds["std_msgs/msg/Header"](seq=0, stamp=stamp, frame_id="old"), height=64, width=96, encoding="rgb8",
        is_bigendian=0, step=288, data=scene.reshape(-1),
    ), IMAGE)
    note = old.serialize_ros1(kinds["std_msgs/msg/String"](data="hello"), "std_msgs/msg/String")
    with Writer1(tmp_path / "old.bag") as writer:
        camera = writer.add_connection("/cam", IMAGE, typestore=old)
        notes = writer.add_connection("/notes", "std_msgs/msg/String", typestore=old)
        for n, (image_bytes, note_bytes) in enumerate(((whole, note), (whole[:20], note[:3]), (whole, note))):
            writer.write(camera, (100 + n) * 10**9, image_bytes)
            writer.write(notes, (100 + n) * 10**9, note_bytes)
    assert bag(tmp_path / "old.bag", "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "bad frame /cam at 101.000 s: broken_message" in said.err
    assert "not copied /notes at 101.000 s: expected a std_msgs/msg/String, got 3 bytes" in said.err
    assert "2 of 3 frames" in said.out and "1 other messages not copied" in said.out
    found = read(tmp_path / "out")
    assert [len(found[topic]) for topic in ("/cam", "/notes", "/glesam/masks")] == [2, 2, 2]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_a_topic_with_two_types_the_pictures_count(order, tmp_path, capsys):
    messages = [("/cam", IMAGE, 1, image(1, bright_model.scene())), ("/cam", *note(2)[1:])]
    source = write_bag(tmp_path / "drive", [messages[k] for k in order])
    assert bag(source, "--out", tmp_path / "out", "--results-only") == 0
    said = capsys.readouterr()
    assert "1 of 2 frames" in said.out and "bad frames: wrong_type 1" in said.out
    assert "expected sensor_msgs/Image or CompressedImage, got std_msgs/msg/String" in said.err
    assert len(read(tmp_path / "out")["/glesam/masks"]) == 1


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    source = write_bag(tmp_path / "drive", drive())
    monkeypatch.setattr(Writer, "write", full)
    assert bag(source, "--out", tmp_path / "out", "--storage", "sqlite3") == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line == f"glesam bag: error: {tmp_path}/out: cannot be written: database or disk is full"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_pictures_become_a_bag_that_can_be_segmented(compressed, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(4):
        cv2.imwrite(str(folder / f"{n:03d}.png"), cv2.cvtColor(bright_model.scene(level=200 + n), cv2.COLOR_RGB2BGR))
    arguments = ["--from-images", folder, "--rate", 20, "--out", tmp_path / "film"]
    assert bag(*arguments, *(["--compressed"] if compressed else [])) == 0
    topic = "/camera/image_raw" + ("/compressed" if compressed else "")
    rows = read(tmp_path / "film")[topic]
    times = [t for t, _ in rows]
    assert np.diff(times).tolist() == [50_000_000] * 3
    assert [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for _, m in rows] == times
    if not compressed:
        for n, (_, message) in enumerate(rows):
            np.testing.assert_array_equal(pixels(message, "u1"), bright_model.scene(level=200 + n))
    assert bag(tmp_path / "film", "--out", tmp_path / "out") == 0
    assert len(read(tmp_path / "out")["/glesam/masks"]) == 4


def test_thermal_pictures_become_a_bag(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    counts = np.tile(np.arange(7000, 8000, 20, dtype=np.uint16), (60, 1))
    cv2.imwrite(str(folder / "a.png"), counts)
    limits = "--min-image-value", 7000, "--max-image-value", 8020
    assert bag("--from-images", folder, "--out", tmp_path / "film", *limits) == 0
    ((_, message),) = read(tmp_path / "film")["/camera/image_raw"]
    np.testing.assert_array_equal(pixels(message, "u1")[..., 1], (counts - 7000) // 4)  # of 1020 to 255


def test_pictures_that_cannot_be_read_are_named_and_the_others_become_a_bag(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "b.png").symlink_to("/proc/self/mem")  # a file that gives an I/O error
    cv2.imwrite(str(folder / "c.png"), bright_model.scene())
    cv2.imwrite(str(folder / "d.png"), np.zeros((2, 32767, 3), np.uint8))  # too long for this kind
    assert bag("--from-images", folder, "--out", tmp_path / "film", "--degrade", "rolling_shutter") == 1
    said = capsys.readouterr()
    assert "1 of 4 pictures" in said.out
    assert f"skipped {folder}/a.png: expected a picture" in said.err
    assert f"skipped {folder}/b.png: [Errno 5]" in said.err
    assert f"skipped {folder}/d.png: image: expected a size that OpenCV can degrade" in said.err


def test_degraded_pictures_are_worse_and_repeat_by_seed(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(2):
        cv2.imwrite(str(folder / f"{n}.png"), cv2.cvtColor(bright_model.scene(), cv2.COLOR_RGB2BGR))
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        options = ["--degrade", "lq", "--level", 3, "--seed", seed]
        assert bag("--from-images", folder, "--out", tmp_path / name, *options) == 0
    one, same, other = (
        [pixels(m, "u1") for _, m in read(tmp_path / name)["/camera/image_raw"]] for name in ("one", "same", "other")
    )
    np.testing.assert_array_equal(one, same)
    assert (one[0] != bright_model.scene()).any()
    assert (one[0] != one[1]).any()  # each picture has its own draw
    assert (one[0] != other[0]).any()


def test_unknown_degradation_is_refused_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bag("--from-images", tmp_path, "--out", tmp_path / "out", "--degrade", "frogs")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "frogs" in said and "low_light" in said


def test_nothing_is_left_of_a_bag_that_failed(tmp_path, capsys):
    source = write_bag(tmp_path / "drive", drive())
    assert main(["bag", str(source), "--out", str(tmp_path / "out"), "--model", "nosuch"]) == 1
    assert "model: expected one of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_what_came_before_it_was_stopped_stays(stop, code, tmp_path, capsys, monkeypatch):
    def segment(frame, results):
        if results.tally.frames == 4:
            raise stop
        whole(frame, results)

    source = write_bag(tmp_path / "drive", drive())
    whole = cli_bag._segment
    monkeypatch.setattr(cli_bag, "_segment", segment)
    assert bag(source, "--out", tmp_path / "out", "--results-only") == code
    assert "stopped early" in capsys.readouterr().out
    assert len(read(tmp_path / "out")["/glesam/masks"]) == 2


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_what_came_before_a_bag_breaks_off_stays(storage, tmp_path, capsys, monkeypatch):
    """Whatever its reader raises: a chunk that does not decompress, a page of the data base that is torn."""
    class Torn(Exception):
        pass

    def messages(self, connections=()):
        for number, found in enumerate(whole(self, connections)):
            if number == 5:
                raise Torn("page 7")
            yield found

    source = write_bag(tmp_path / "drive", drive(), storage)
    whole = AnyReader.messages
    monkeypatch.setattr(AnyReader, "messages", messages)
    assert bag(source, "--out", tmp_path / "out", "--results-only") == 1
    monkeypatch.undo()
    said = capsys.readouterr()
    assert f"glesam bag: {source} breaks off, it is damaged: Torn: page 7" in said.err and "stopped early" in said.out
    assert len(read(tmp_path / "out")["/glesam/masks"]) == 3  # of four good ones


@pytest.mark.parametrize("damage", [slice(300, 400), slice(-400, -300)], ids=["begin", "end"])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_damaged_bag_ends_in_one_line(storage, damage, tmp_path, capsys):
    source = write_bag(tmp_path / "drive", drive(), storage)
    file, = (path for path in source.iterdir() if path.suffix in (".mcap", ".db3"))
    data = bytearray(file.read_bytes())
    data[damage] = bytes(range(155, 255))
    file.write_bytes(data)
    code = bag(source, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert code == 0 or "cannot be read as a bag" in said or "breaks off" in said


@pytest.mark.parametrize(("namespace", "topic"), [("/", "/masks"), ("//a/b_1/", "/a/b_1/masks")])
def test_namespaces_are_those_of_ros(namespace, topic, tmp_path):
    source = write_bag(tmp_path / "drive", drive()[:2])
    for out in ("one", "two"):  # the second time without its own results of the first
        assert bag(source, "--out", tmp_path / out, "--namespace", namespace) == 0
        source = tmp_path / out
        found = read(source)
        assert topic in found and not [name for name in found if "//" in name or name.endswith("/masks/masks")]


@pytest.mark.parametrize("namespace", ["my results", "/1st", "a//b", "a-b"])
def test_a_namespace_that_ros_would_refuse_is_refused(namespace, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bag(tmp_path, "--out", tmp_path / "out", "--namespace", namespace)
    assert stop.value.code == 2
    assert "--namespace" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--out", "o"], ["a", "--from-images", "b", "--out", "o"]])
def test_either_a_bag_or_pictures(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bag", *arguments])
    assert stop.value.code == 2
    assert "either a bag IN or --from-images" in capsys.readouterr().err


def test_objects_keep_their_ids_when_their_ranks_change(tmp_path):
    frames = []
    for number, (left, right) in enumerate((((36, 30), (24, 24)), ((26, 26), (28, 28)))):
        picture = np.zeros((64, 128, 3), np.uint8)
        picture[12 : 12 + left[1], 10 : 10 + left[0]] = 220
        picture[20 : 20 + right[1], 80 : 80 + right[0]] = 220
        frames.append(("/front/image_raw", IMAGE, number, image(number, picture)))
    source = write_bag(tmp_path / "drive", frames)
    assert bag(source, "--out", tmp_path / "out", "--results-only", "--result", "masks", "--result", "detections") == 0
    found = read(tmp_path / "out")
    # best first: the right one is larger in the second frame
    assert [[d.id for d in m.detections] for _, m in found["/glesam/detections"]] == [["1", "2"], ["2", "1"]]
    for _, mask in found["/glesam/masks"]:
        assert (pixels(mask, "u2")[30, 20], pixels(mask, "u2")[30, 90]) == (1, 2)
