"""Bags through the `rosbags` library: reading images, writing copies and results. No ROS needed."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from rosbags.convert.converter import create_connections_converters
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.rosbag2.enums import CompressionFormat, CompressionMode
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from glesam_ros.cli.options import CommandError
from glesam_ros.cli.result_topics import ALL_RESULTS, COMPRESSED, IMAGE, LABEL_INFO
from glesam_ros.identity import IdKeeper
from glesam_ros.instances import Instances
from glesam_ros.models import OutOfMemory
from glesam_ros.overlay import draw_overlay
from glesam_ros.picture_files import encoded
from glesam_ros.pipeline import EnhancementGate, Pipeline
from glesam_ros.ros.conversions import ConversionError, message_to_rgb
from glesam_ros.semantic import NO_CLASS, Restorer, SemanticMap, SemanticSegmenter, class_of_instances
from glesam_ros.validation import UInt8Array
from glesam_ros.value_range import ValueRange

NOT_A_PICTURE = ("16UC1", "32FC1", "32FC2", "64FC1", "16SC1", "32SC1")
"""Encodings of distances, flow and the like; a topic that starts with one is not taken by itself."""

# vision_msgs 4.x, field for field: rosbags ships the common interfaces only
_VISION_MSGS = {
    "Point2D": "float64 x\nfloat64 y\n",
    "Pose2D": "vision_msgs/Point2D position\nfloat64 theta\n",
    "BoundingBox2D": "vision_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y\n",
    "ObjectHypothesis": "string class_id\nfloat64 score\n",
    "ObjectHypothesisWithPose": "vision_msgs/ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose\n",
    "Detection2D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\nvision_msgs/BoundingBox2D bbox\n"
        "string id\n"
    ),
    "Detection2DArray": "std_msgs/Header header\nvision_msgs/Detection2D[] detections\n",
    "Classification": "std_msgs/Header header\nvision_msgs/ObjectHypothesis[] results\n",
    "VisionClass": "uint16 class_id\nstring class_name\n",
    "LabelInfo": "std_msgs/Header header\nvision_msgs/VisionClass[] class_map\nfloat32 threshold\n",
}

_WITH_CLASSES = {"semantic", "semantic/confidence", LABEL_INFO, "detections", "overlay"}

BAG_SUFFIXES = (".mcap", ".db3", ".bag")
UNREADABLE = (AnyReaderError, ValueError, IndexError, AssertionError, struct.error)
"""What the versions of rosbags raise for a message whose bytes do not fit its type."""
_ENDLESS = QosTime(9223372036, 854775807)  # as rosbag2 records it
RESULT_QOS = Qos(
    QosHistory.KEEP_LAST, 5, QosReliability.RELIABLE, QosDurability.VOLATILE, _ENDLESS, _ENDLESS,
    QosLiveliness.AUTOMATIC, _ENDLESS, avoid_ros_namespace_conventions=False,
)
"""Offered by the player for result topics; reliable, so every subscriber matches."""
LATCHED_QOS = RESULT_QOS._replace(depth=1, durability=QosDurability.TRANSIENT_LOCAL)
"""Offered for the names of classes, which who subscribes late needs, too."""


def message_types(distro: str) -> Typestore:
    """Definitions of the ROS 2 distribution `distro` ("humble", "jazzy", "kilted") and vision_msgs."""
    store = get_typestore(Stores[f"ROS2_{distro.upper()}"])
    types = {}
    for name, text in _VISION_MSGS.items():
        types.update(get_types_from_msg(text, f"vision_msgs/msg/{name}"))
    store.register(types)
    return store


@contextlib.contextmanager
def new_bag(path: Path, storage: str, distro: str) -> Iterator[Writer]:
    """Write a new bag; mcap is compressed by chunk, which every player reads. After a failure nothing is left of it.

    Raises:
        CommandError: `path` exists already.
    """
    if path.exists():
        raise CommandError(f"{path} exists already; remove it or give another --out")
    version: Literal[8, 9] = 8 if distro == "humble" else 9  # Humble reads QoS profiles as text only
    writer = Writer(path, version=version, storage_plugin=StoragePlugin[storage.upper()])
    if storage == "mcap":
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    try:
        with writer:
            yield writer
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, sqlite3.Error):  # a full disk, for example
            raise CommandError(f"{path}: cannot be written: {error}") from error
        raise


class BagBreaksOff(CommandError):
    """A bag whose rest cannot be read."""


class Frame(NamedTuple):
    """One message of a bag.

    Attributes:
        topic: its topic.
        log_time: nanoseconds, when it was recorded.
        message: the sensor_msgs Image or CompressedImage, None for messages of topics that are only copied.
        error: why the message of an image topic could not be read, None where it could.
    """

    topic: str
    log_time: int
    message: Any
    error: ConversionError | None = None


@contextlib.contextmanager
def open_bag(path: Path, distro: str) -> Iterator[BagSource]:
    """Open a recorded bag: ROS 2 folder, .mcap, .db3, or a ROS 1 .bag.

    Args:
        path: where it lies.
        distro: whose definitions to take where the bag carries none.

    Raises:
        CommandError: missing, broken or unreadable bag.
    """
    if not path.exists():
        raise CommandError(f"{path}: no such bag")
    if path.is_dir() and not (path / "metadata.yaml").exists():
        raise CommandError(
            f"{path}: expected a bag, got a folder without metadata.yaml; of a recording that was cut off name the "
            ".mcap or .db3 in it, of pictures make a bag with glesam bag --from-images"
        )
    if path.is_file() and path.suffix not in BAG_SUFFIXES:
        raise CommandError(f"{path}: expected a bag (folder, {', '.join(BAG_SUFFIXES)}), got another file")
    types = message_types(distro)
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(AnyReader([path], default_typestore=types))
        except Exception as error:  # each storage and compression raises its own
            raise CommandError(f"{path}: cannot be read as a bag: {_named(error)}") from error
        yield BagSource(path, reader, types)


class BagSource:
    """An open bag to read from, see `open_bag`.

    Args:
        path: where it lies, for messages.
        reader: the open reader.
        types: definitions of the distribution and vision_msgs.
    """

    def __init__(self, path: Path, reader: AnyReader, types: Typestore) -> None:
        self.path = path
        self.reader = reader
        self.types = types

    @property
    def connections(self) -> list[Connection]:
        """All connections of the bag."""
        return self.reader.connections

    def image_topics(self, wanted: Sequence[str], namespace: str) -> tuple[list[str], list[str]]:
        """Topics to segment, and sentences on topics that were left out.

        Without `wanted` these are all camera pictures: no distances, no results of an earlier run under `namespace`,
        and of a raw and a compressed form of one camera the raw one.

        Raises:
            CommandError: a wanted topic is not there or carries no pictures, or there is none at all.
        """
        kinds = {c.topic: c.msgtype for c in self.connections}
        # of a topic with several types the pictures count
        images = {c.topic: c.msgtype for c in self.connections if c.msgtype in (IMAGE, COMPRESSED)}
        there = ", ".join(sorted(images)) or "none"
        for topic in wanted:
            if topic not in kinds:
                raise CommandError(f"--topic {topic}: not in {self.path}; its image topics: {there}")
            if topic not in images:
                raise CommandError(
                    f"--topic {topic}: expected sensor_msgs/Image or CompressedImage, got {kinds[topic]}; "
                    f"image topics: {there}"
                )
        if wanted:
            return list(dict.fromkeys(wanted)), []
        chosen, notes = [], []
        for topic in sorted(images):
            if topic.startswith(namespace + "/") if namespace else topic[1:] in ALL_RESULTS:
                where = f"it is under {namespace}, where results go" if namespace else "results have that name"
                notes.append(f"{topic}: left out, {where}; --topic takes it anyway")
            elif topic.endswith("/compressed") and topic[: -len("/compressed")] in images:
                notes.append(f"{topic}: left out, the raw pictures of this camera are taken; --topic takes it anyway")
            elif (encoding := self._first_encoding(topic, images[topic])) in NOT_A_PICTURE:
                notes.append(f"{topic}: left out, {encoding} is no camera picture; --topic takes it anyway")
            else:
                chosen.append(topic)
        if not chosen:
            raise CommandError(f"{self.path}: no camera pictures to segment; image topics: {there}")
        return chosen, notes

    def frames(self, topics: Sequence[str], copy_all: bool) -> Iterator[tuple[Connection, bytes, Frame]]:
        """Messages in the order of recording, with connection and raw data; images of `topics` are read.

        Raises:
            BagBreaksOff: the rest of it cannot be read.
        """
        connections = [c for c in self.connections if copy_all or c.topic in topics]
        for connection, log_time, raw in self._messages(connections):
            message, error = None, None
            if connection.topic in topics and connection.msgtype not in (IMAGE, COMPRESSED):
                error = ConversionError(
                    "wrong_type", f"expected sensor_msgs/Image or CompressedImage, got {connection.msgtype}"
                )
            elif connection.topic in topics:
                try:
                    message = self.reader.deserialize(raw, connection.msgtype)
                except UNREADABLE as cause:
                    error = ConversionError(
                        "broken_message",
                        f"expected a {connection.msgtype}, got {len(raw)} bytes that do not read: {cause}",
                    )
            yield connection, raw, Frame(connection.topic, log_time, message, error)

    def copier(self, writer: Writer, connections: Sequence[Connection]) -> Callable[[Connection, int, bytes], str]:
        """Make a function that copies a message; those of ROS 1 become messages of ROS 2.

        It returns why a message could not be copied, "" where it could.
        """
        with contextlib.redirect_stdout(sys.stderr):  # the converter tells there what it migrates
            copies, convert = create_connections_converters(
                connections, None if self.reader.is2 else self.types, self.reader, writer
            )

        def copy(connection: Connection, log_time: int, raw: bytes) -> str:
            try:
                converted = convert[connection.msgtype](raw)
            except (SerdeError, *UNREADABLE) as error:
                return f"expected a {connection.msgtype}, got {len(raw)} bytes that do not read: {error}"
            writer.write(copies[(connection.id, connection.owner)], log_time, converted)
            return ""

        return copy

    def known(self, connection: Connection) -> bool:
        """Whether the type of the connection is defined, in the bag or in the distribution."""
        return connection.msgtype in self.reader.typestore.fielddefs

    def _messages(self, connections: Sequence[Connection]) -> Iterator[tuple[Connection, int, bytes]]:
        messages = self.reader.messages(connections=connections)
        while True:
            try:
                found = next(messages, None)
            except Exception as error:  # each storage and compression raises its own
                raise BagBreaksOff(f"{self.path} breaks off, it is damaged: {_named(error)}") from error
            if found is None:
                return
            yield found

    def _first_encoding(self, topic: str, kind: str) -> str:
        connections = [c for c in self.connections if c.topic == topic and c.msgtype == kind]
        for _, _, raw in self._messages(connections):
            try:
                message: Any = self.reader.deserialize(raw, kind)
            except UNREADABLE:
                continue  # broken messages are counted when they are segmented
            if kind == COMPRESSED:
                return "32FC1" if "compresseddepth" in message.format.lower() else ""
            return str(message.encoding)
        return ""


@dataclass
class Tally:
    """What happened to the messages of a bag.

    Attributes:
        not_copied: messages of other topics that could not be copied.
        frames: image messages met.
        instances: instances found in all.
        seconds: inference time of each good frame.
        bad: bad frames by reason.
    """

    not_copied: int = 0
    frames: int = 0
    instances: int = 0
    seconds: list[float] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)


class ResultWriter:
    """Segments frames and writes the result topics into a bag.

    Args:
        writer: an open bag.
        pipeline: what segments.
        topics: image topics; the results of a single one go to <namespace>/masks ..., those of several to
            <namespace>/<image topic>/masks ...
        types: definitions, from `message_types`.
        namespace: absolute name above the result topics.
        results: which of `ALL_RESULTS` to write.
        segmenter: finds the class of each pixel; needed for the results of classes, and adds them to detections and
            overlay.
        restorer: restores pictures, needed for `enhanced`.
    """

    def __init__(
        self, writer: Writer, pipeline: Pipeline, topics: Sequence[str], types: Typestore, namespace: str,
        results: Sequence[str], segmenter: SemanticSegmenter | None = None, restorer: Restorer | None = None,
    ) -> None:
        self.writer = writer
        self.pipeline = pipeline
        self.types = types
        self.tally = Tally()
        self._segmenter = segmenter if set(results) & _WITH_CLASSES else None
        self._restorer = restorer if "enhanced" in results else None
        self._gates = {topic: EnhancementGate() for topic in topics}
        self._identities = {topic: IdKeeper() for topic in topics}
        self._named: set[str] = set()  # image topics whose names of classes are written
        self._connections: dict[tuple[str, str], Connection] = {}
        for topic in topics:
            prefix = namespace if len(topics) == 1 else namespace + topic
            for name in results:
                self._connections[topic, name] = writer.add_connection(
                    f"{prefix}/{name}", ALL_RESULTS[name], typestore=types,
                    offered_qos_profiles=[LATCHED_QOS if name == LABEL_INFO else RESULT_QOS],
                )

    def segment(self, frame: Frame) -> ConversionError | None:
        """Segment one frame and write its results; a bad frame is counted, and its fault comes back.

        Raises:
            CommandError: a model lacks memory even for the least that it can take.
        """
        self.tally.frames += 1
        try:
            if frame.error:
                raise frame.error
            image = message_to_rgb(frame.message, ValueRange.of(self.pipeline.settings))
        except ConversionError as error:
            self.tally.bad[error.reason] += 1
            return error
        start = time.perf_counter()
        semantic = restored = None
        try:
            instances = self.pipeline.segment(image, gate=self._gates[frame.topic])
            if self.pipeline.settings.stable_ids:
                instances = self._identities[frame.topic].update(instances)
            if self._segmenter is not None:
                semantic = self._segmenter.segment(image)
            if self._restorer is not None:
                restored = self._restorer.restore(image, semantic.main_classes() if semantic is not None else ())
        except OutOfMemory as error:
            raise CommandError(str(error)) from error
        self.tally.seconds.append(time.perf_counter() - start)
        self.tally.instances += len(instances)
        self._write(frame, image, instances, semantic, restored)
        return None

    def _write(
        self, frame: Frame, image: UInt8Array, instances: Instances, semantic: SemanticMap | None,
        restored: UInt8Array | None,
    ) -> None:
        stamp = frame.message.header.stamp
        header = self._new(
            "std_msgs/msg/Header",
            stamp=self._new("builtin_interfaces/msg/Time", sec=stamp.sec, nanosec=stamp.nanosec),
            frame_id=frame.message.header.frame_id,
        )
        labels = instances.label_map()
        alpha = self.pipeline.settings.overlay_alpha
        classes = self.pipeline.model.classes
        make: dict[str, Callable[[], Any]] = {
            "masks": lambda: image_message(self.types, labels, "mono16", header),
            "confidence": lambda: image_message(self.types, instances.confidence_map(labels), "32FC1", header),
            "overlay": lambda: image_message(
                self.types, cv2.cvtColor(draw_overlay(image, instances, alpha, labels, semantic), cv2.COLOR_RGB2BGR),
                "bgr8", header,
            ),
            "detections": lambda: self._detections(instances, header, classes[0], semantic),
            "quality": lambda: self._quality(instances, header),
        }
        if semantic is not None:
            encoding = "mono8" if semantic.labels.dtype == np.uint8 else "mono16"
            make["semantic"] = lambda: image_message(self.types, semantic.labels, encoding, header)
            make["semantic/confidence"] = lambda: image_message(self.types, semantic.confidence, "32FC1", header)
            if frame.topic not in self._named:
                self._named.add(frame.topic)
                make[LABEL_INFO] = lambda: self._label_info(semantic.classes, header)
        if restored is not None:
            make["enhanced"] = lambda: image_message(self.types, restored, "rgb8", header)
        for name, message in make.items():
            connection = self._connections.get((frame.topic, name))
            if connection is not None:
                self.writer.write(connection, frame.log_time, self.types.serialize_cdr(message(), ALL_RESULTS[name]))

    def _detections(self, instances: Instances, header: Any, class_id: str, semantic: SemanticMap | None) -> Any:
        pose = self._new(
            "geometry_msgs/msg/PoseWithCovariance",
            pose=self._new(
                "geometry_msgs/msg/Pose",
                position=self._new("geometry_msgs/msg/Point", x=0.0, y=0.0, z=0.0),
                orientation=self._new("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=0.0, w=1.0),
            ),
            covariance=np.zeros(36),
        )
        hypotheses = [[(class_id, score)] for score in instances.scores.tolist()]
        if semantic is not None:
            for found, index, score in zip(hypotheses, *(a.tolist() for a in class_of_instances(instances, semantic))):
                if index != NO_CLASS:
                    found.append((semantic.classes[index], score))
        detections = []
        for (x1, y1, x2, y2), found, number in zip(instances.boxes.tolist(), hypotheses, instances.ids.tolist()):
            results = [
                self._new(
                    "vision_msgs/msg/ObjectHypothesisWithPose", pose=pose,
                    hypothesis=self._new("vision_msgs/msg/ObjectHypothesis", class_id=name, score=score),
                )
                for name, score in found
            ]
            position = self._new("vision_msgs/msg/Point2D", x=(x1 + x2) / 2, y=(y1 + y2) / 2)
            center = self._new("vision_msgs/msg/Pose2D", position=position, theta=0.0)
            detections.append(self._new(
                "vision_msgs/msg/Detection2D",
                header=header,
                results=results,
                bbox=self._new("vision_msgs/msg/BoundingBox2D", center=center, size_x=x2 - x1, size_y=y2 - y1),
                id=str(number),
            ))
        return self._new("vision_msgs/msg/Detection2DArray", header=header, detections=detections)

    def _quality(self, instances: Instances, header: Any) -> Any:
        kind = "vision_msgs/msg/ObjectHypothesis"
        results = [
            self._new(kind, class_id="degradation", score=instances.degradation),
            self._new(kind, class_id="enhanced", score=float(instances.enhanced)),
        ]
        return self._new("vision_msgs/msg/Classification", header=header, results=results)

    def _label_info(self, classes: Sequence[str], header: Any) -> Any:
        class_map = [
            self._new("vision_msgs/msg/VisionClass", class_id=k, class_name=name) for k, name in enumerate(classes)
        ]
        return self._new("vision_msgs/msg/LabelInfo", header=header, class_map=class_map, threshold=0.0)

    def _new(self, kind: str, **fields: Any) -> Any:
        return self.types.types[kind](**fields)


def image_message(types: Typestore, pixels: np.ndarray[Any, Any], encoding: str, header: Any) -> Any:
    """A sensor_msgs/Image of rosbags with the `pixels` as they lie in memory.

    Args:
        types: definitions, from `message_types`.
        pixels: (H, W) or (H, W, 3), dtype and channel order as `encoding` says.
        encoding: name for the message.
        header: std_msgs/Header of rosbags.
    """
    pixels = np.ascontiguousarray(pixels)
    return types.types[IMAGE](
        header=header, height=pixels.shape[0], width=pixels.shape[1], encoding=encoding,
        is_bigendian=int(sys.byteorder == "big"), step=pixels.strides[0], data=pixels.reshape(-1).view(np.uint8),
    )


def write_pictures(
    path: Path, pictures: Iterator[UInt8Array], rate: float, topic: str, storage: str, distro: str,
    compressed: bool = False,
) -> int:
    """Write a bag of pictures as a camera with `rate` pictures a second would have recorded it, from now on.

    Args:
        path: the new bag.
        pictures: (H, W, 3) uint8 RGB each.
        rate: Hz.
        topic: image topic; with `compressed`, topic + "/compressed".
        storage: "mcap" or "sqlite3".
        distro: ROS 2 distribution.
        compressed: JPEG of quality 95 instead of raw rgb8.

    Returns:
        How many pictures it wrote.

    Raises:
        CommandError: `path` exists already.
        OSError: a picture is too large for JPEG.
    """
    types = message_types(distro)
    kind = COMPRESSED if compressed else IMAGE
    start, count = time.time_ns(), 0
    with new_bag(path, storage, distro) as writer:
        name = topic + "/compressed" if compressed else topic
        connection = writer.add_connection(name, kind, typestore=types, offered_qos_profiles=[RESULT_QOS])
        for image in pictures:
            stamp = start + round(count * 1e9 / rate)
            time_message = types.types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
            header = types.types["std_msgs/msg/Header"](stamp=time_message, frame_id="camera")
            if compressed:
                data = np.frombuffer(encoded(Path("frame.jpg"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)), np.uint8)
                message = types.types[COMPRESSED](header=header, format="jpeg", data=data)
            else:
                message = image_message(types, image, "rgb8", header)
            writer.write(connection, stamp, types.serialize_cdr(message, kind))
            count += 1
    return count


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
