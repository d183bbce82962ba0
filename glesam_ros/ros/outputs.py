"""Result topics of one camera; a message is made only when somebody subscribes to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.publisher import Publisher
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from glesam_ros.instances import Instances
from glesam_ros.overlay import draw_overlay
from glesam_ros.ros import qos
from glesam_ros.ros.conversions import array_to_image
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

LabelMap = np.ndarray[Any, np.dtype[np.uint16]]


class Outputs:
    """Publishers of one camera.

    Args:
        node: owner of the publishers.
        prefix: "" or the camera name and a slash.
        classes: class names of the model; published latched on `label_info`.
        score_threshold: written to `label_info`.
    """

    def __init__(self, node: Node, prefix: str, classes: tuple[str, ...], score_threshold: float) -> None:
        self._node = node
        self._classes = classes
        types: dict[str, Any] = {"masks": Image, "confidence": Image, "overlay": Image}
        if vision is not None:
            types |= {"detections": vision.Detection2DArray, "quality": vision.Classification}
        self._publishers: dict[str, Publisher] = {
            name: node.create_publisher(
                kind, prefix + name, qos.result_output(), qos_overriding_options=qos.overridable()
            )
            for name, kind in types.items()
        }
        self._label_info: Publisher | None = None
        if vision is not None:
            self._label_info = node.create_publisher(vision.LabelInfo, prefix + "label_info", qos.latched())
            self._label_info.publish(_label_info(classes, score_threshold, node.get_clock().now().to_msg()))

    def wanted(self) -> frozenset[str]:
        """Names of the outputs that have a subscriber now."""
        return frozenset(n for n, p in self._publishers.items() if p.get_subscription_count() > 0)

    def publish_masks(self, wanted: frozenset[str], header: Header, instances: Instances) -> LabelMap | None:
        """Publish `masks`, `confidence` and `detections` where wanted, with `header` as it came.

        Returns:
            The label map, None when it was not needed.
        """
        labels = None
        if wanted & {"masks", "confidence"}:
            labels = instances.label_map()
            if "masks" in wanted:
                self._publishers["masks"].publish(array_to_image(labels, "mono16", header))
            if "confidence" in wanted:
                confidence = instances.confidence_map(labels)
                self._publishers["confidence"].publish(array_to_image(confidence, "32FC1", header))
        if "detections" in wanted:
            self._publishers["detections"].publish(_detections(instances, header, self._classes[0]))
        return labels

    def publish_quality(self, wanted: frozenset[str], header: Header, degradation: float, enhanced: bool) -> None:
        """Publish `quality` where wanted: degradation 0 (clear) .. 1, and enhanced as 0 or 1."""
        if "quality" in wanted:
            message = vision.Classification(header=header)
            message.results = [
                vision.ObjectHypothesis(class_id="degradation", score=float(degradation)),
                vision.ObjectHypothesis(class_id="enhanced", score=float(enhanced)),
            ]
            self._publishers["quality"].publish(message)

    def publish_overlay(
        self,
        wanted: frozenset[str],
        header: Header,
        image: UInt8Array,
        instances: Instances,
        alpha: float,
        labels: LabelMap | None,
    ) -> None:
        """Publish `overlay` where wanted: the (H, W, 3) RGB `image` with the masks over it, as bgr8."""
        if "overlay" in wanted:
            picture = draw_overlay(image, instances, alpha, labels)
            self._publishers["overlay"].publish(array_to_image(picture, "bgr8", header))

    def destroy(self) -> None:
        """Remove the topics."""
        for publisher in self._publishers.values():
            self._node.destroy_publisher(publisher)
        self._publishers = {}
        if self._label_info is not None:
            self._node.destroy_publisher(self._label_info)
            self._label_info = None


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


def _label_info(classes: tuple[str, ...], threshold: float, stamp: Any) -> Any:
    # 0 is the background
    message = vision.LabelInfo(threshold=float(threshold))
    message.header.stamp = stamp
    message.class_map = [
        vision.VisionClass(class_id=number, class_name=name) for number, name in enumerate(classes, start=1)
    ]
    return message
