"""Result topics of one camera; a message is made only when somebody subscribes to it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.publisher import Publisher
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from glesam_ros.instances import Instances
from glesam_ros.overlay import draw_overlay
from glesam_ros.ros import qos
from glesam_ros.ros.conversions import array_to_compressed, array_to_image
from glesam_ros.ros.names import beside
from glesam_ros.semantic import NO_CLASS, SemanticMap, class_of_instances
from glesam_ros.validation import UInt8Array

try:
    import vision_msgs.msg as vision
except ImportError as error:
    vision = None
    VISION_MSGS_MISSING = (
        f"vision_msgs cannot be imported ({error}): detections, quality, label_info and prompt/boxes are off. "
        "Install it: sudo apt install ros-$ROS_DISTRO-vision-msgs"
    )
else:
    VISION_MSGS_MISSING = ""

LabelMap = NDArray[np.uint16]

OF_INSTANCES = frozenset({"masks", "confidence", "detections", "overlay"})
"""Outputs for which masks are decoded."""
OF_EMBEDDING = OF_INSTANCES | {"quality"}
"""Outputs for which the picture is encoded."""
OF_CLASSES = frozenset({"semantic", "semantic/confidence"})
"""Outputs that show nothing but the class map."""
COMPRESSED = "/compressed"
"""Ends the topic of an output that is also there as JPEG or PNG, as image_transport names it."""
IN_BOTH = frozenset({"masks", "overlay", "semantic", "enhanced"})
"""Outputs that are. Those of confidence are not: PNG has no float."""
MOST_RESULTS = 16
"""Hypotheses of a box that go on to its detection."""
WITH_CLASSES = OF_CLASSES | {"detections", "overlay"}
"""Outputs for which, where a semantic model is loaded, classes are found."""


class Outputs:
    """Publishers of one camera.

    Args:
        node: owner of the publishers.
        prefix: "" or the camera name and a slash.
        classes: class names of the model; published latched on `label_info`.
        score_threshold: written to `label_info`.
        semantic_classes: class names of the class map; published latched on `semantic/label_info`. None where no
            semantic model is loaded; then there are no topics of it.
        restores: whether a restorer is loaded; else there is no topic `enhanced`.
    """

    def __init__(
        self,
        node: Node,
        prefix: str,
        classes: tuple[str, ...],
        score_threshold: float,
        semantic_classes: Sequence[str] | None = None,
        restores: bool = False,
    ) -> None:
        self._node = node
        self._classes = classes
        types: dict[str, Any] = {"masks": Image, "confidence": Image, "overlay": Image}
        if semantic_classes is not None:
            types |= dict.fromkeys(sorted(OF_CLASSES), Image)
        if restores:
            types["enhanced"] = Image
        if vision is not None:
            types |= {"detections": vision.Detection2DArray, "quality": vision.Classification}
        topics = {name: prefix + name for name in types}
        for name in sorted(IN_BOTH & types.keys()):
            types[name + COMPRESSED] = CompressedImage
            topics[name + COMPRESSED] = beside(node, topics[name], COMPRESSED)
        self._publishers: dict[str, Publisher] = {
            name: node.create_publisher(
                kind, topics[name], qos.result_output(), qos_overriding_options=qos.overridable()
            )
            for name, kind in types.items()
        }
        self._label_infos: list[tuple[Publisher, Any]] = []
        if vision is not None:
            # 0 is the background
            self._latch(prefix + "label_info", enumerate(classes, start=1), score_threshold)
            if semantic_classes is not None:
                self._latch(prefix + "semantic/label_info", enumerate(semantic_classes), 0.0)

    def tell_threshold(self, score_threshold: float) -> None:
        """Publish `label_info` again where it named another threshold."""
        for publisher, message in self._label_infos[:1]:
            if message.threshold != score_threshold:
                message.threshold = float(score_threshold)
                message.header.stamp = self._node.get_clock().now().to_msg()
                with contextlib.suppress(InvalidHandle):  # a transition may remove the topic at any time
                    publisher.publish(message)

    def wanted(self) -> frozenset[str]:
        """Names of the outputs that have a subscriber now, raw or compressed."""
        return frozenset(topic.removesuffix(COMPRESSED) for topic in self._publishers if self._is_heard(topic))

    def publish_masks(self, wanted: frozenset[str], header: Header, instances: Instances) -> LabelMap | None:
        """Publish `masks` and `confidence` where wanted, with `header` as it came.

        Returns:
            The label map, None when it was not needed.
        """
        labels = None
        if wanted & {"masks", "confidence"}:
            labels = instances.label_map()
            if "masks" in wanted:
                self._show("masks", labels, "mono16", header)
            if "confidence" in wanted:
                confidence = instances.confidence_map(labels)
                self._show("confidence", confidence, "32FC1", header)
        return labels

    def publish_detections(
        self,
        wanted: frozenset[str],
        header: Header,
        instances: Instances,
        semantic: SemanticMap | None,
        results: Mapping[int, Sequence[Any]],
    ) -> None:
        """Publish `detections` where wanted.

        The first hypothesis of each is that of the model: its class ("object") and the predicted IoU. Where there is a
        class map, a second one is the name of the class that fills the mask, and its score. Those of the box that
        prompted it come last, as `results` has them by id, but for classes that are there already: a tracker may hand
        our own detections back as boxes. `id` is the mask value.
        """
        if "detections" in wanted:
            message = _detections(instances, header, self._classes[0])
            if semantic is not None:
                _add_classes(message, instances, semantic)
            for detection, number in zip(message.detections, instances.ids.tolist()):
                there = {result.hypothesis.class_id for result in detection.results}
                said = (result for result in results.get(number, ()) if result.hypothesis.class_id not in there)
                detection.results.extend(itertools.islice(said, MOST_RESULTS))
            self._publish("detections", message)

    def publish_semantic(self, wanted: frozenset[str], header: Header, semantic: SemanticMap) -> None:
        """Publish `semantic` (mono8, or mono16 where there are more than 256 classes) and its confidence where wanted.

        A pixel is the index of its class in `semantic.classes`, the `class_id` of `semantic/label_info`.
        """
        if "semantic" in wanted:
            encoding = "mono8" if semantic.labels.dtype == np.uint8 else "mono16"
            self._show("semantic", semantic.labels, encoding, header)
        if "semantic/confidence" in wanted:
            self._show("semantic/confidence", semantic.confidence, "32FC1", header)

    def publish_enhanced(self, wanted: frozenset[str], header: Header, image: UInt8Array) -> None:
        """Publish `enhanced` where wanted: the restored picture, (H, W, 3) uint8 RGB, as rgb8."""
        if "enhanced" in wanted:
            self._show("enhanced", image, "rgb8", header)

    def publish_quality(self, wanted: frozenset[str], header: Header, degradation: float, enhanced: bool) -> None:
        """Publish `quality` where wanted: degradation 0 (clear) .. 1, and enhanced as 0 or 1."""
        if "quality" in wanted:
            message = vision.Classification(header=header)
            message.results = [
                vision.ObjectHypothesis(class_id="degradation", score=float(degradation)),
                vision.ObjectHypothesis(class_id="enhanced", score=float(enhanced)),
            ]
            self._publish("quality", message)

    def publish_overlay(
        self,
        wanted: frozenset[str],
        header: Header,
        image: UInt8Array,
        instances: Instances,
        alpha: float,
        labels: LabelMap | None,
        semantic: SemanticMap | None,
    ) -> None:
        """Publish `overlay` where wanted: the (H, W, 3) RGB `image`, class colours, the masks over it, as bgr8."""
        if "overlay" in wanted:
            picture = draw_overlay(image, instances, alpha, labels, semantic)
            self._show("overlay", picture, "bgr8", header)

    def _is_heard(self, topic: str) -> bool:
        with contextlib.suppress(InvalidHandle):
            publisher = self._publishers.get(topic)
            return publisher is not None and publisher.get_subscription_count() > 0
        return False

    def _publish(self, topic: str, message: Any) -> None:
        """Publish, unless the topics are gone: a frame that deactivate gave up on ends after them."""
        with contextlib.suppress(InvalidHandle):
            if (publisher := self._publishers.get(topic)) is not None:
                publisher.publish(message)

    def _show(self, name: str, array: np.ndarray[Any, Any], encoding: str, header: Header) -> None:
        """Publish an image, raw, compressed or both, as its subscribers have it."""
        if self._is_heard(name):
            self._publish(name, array_to_image(array, encoding, header))
        if name in IN_BOTH and self._is_heard(name + COMPRESSED):
            self._publish(name + COMPRESSED, array_to_compressed(array, encoding, header))

    def destroy(self) -> None:
        """Remove the topics."""
        gone = [*self._publishers.values(), *(publisher for publisher, _ in self._label_infos)]
        self._publishers, self._label_infos = {}, []
        for publisher in gone:
            self._node.destroy_publisher(publisher)

    def _latch(self, topic: str, classes: Iterable[tuple[int, str]], threshold: float) -> None:
        message = vision.LabelInfo(threshold=float(threshold))
        message.header.stamp = self._node.get_clock().now().to_msg()
        message.class_map = [vision.VisionClass(class_id=number, class_name=name) for number, name in classes]
        publisher = self._node.create_publisher(vision.LabelInfo, topic, qos.latched())
        publisher.publish(message)
        self._label_infos.append((publisher, message))


def _detections(instances: Instances, header: Header, class_id: str) -> Any:
    detections = []
    for (x1, y1, x2, y2), score, mask_value in zip(
        instances.boxes.tolist(), instances.scores.tolist(), instances.ids.tolist()
    ):
        detection = vision.Detection2D(header=header, id=str(mask_value))
        detection.bbox.center.position.x = (x1 + x2) / 2
        detection.bbox.center.position.y = (y1 + y2) / 2
        detection.bbox.size_x = x2 - x1
        detection.bbox.size_y = y2 - y1
        result = vision.ObjectHypothesisWithPose()
        result.hypothesis.class_id = class_id
        result.hypothesis.score = score
        detection.results = [result]
        detections.append(detection)
    return vision.Detection2DArray(header=header, detections=detections)


def _add_classes(message: Any, instances: Instances, semantic: SemanticMap) -> None:
    """A second hypothesis for each detection that has a class: the one that fills its mask."""
    indices, scores = class_of_instances(instances, semantic)
    for detection, index, score in zip(message.detections, indices.tolist(), scores.tolist()):
        if index == NO_CLASS:
            continue
        result = vision.ObjectHypothesisWithPose()
        result.hypothesis.class_id = semantic.classes[index]
        result.hypothesis.score = score
        detection.results.append(result)
