"""Names and types of the topics in a bag."""

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
RESULTS = {
    "masks": IMAGE,
    "confidence": IMAGE,
    "overlay": IMAGE,
    "detections": "vision_msgs/msg/Detection2DArray",
    "quality": "vision_msgs/msg/Classification",
}
"""Result topics, as the node publishes them, with their types."""
LABEL_INFO = "semantic/label_info"
SEMANTIC_RESULTS = {"semantic": IMAGE, "semantic/confidence": IMAGE, LABEL_INFO: "vision_msgs/msg/LabelInfo"}
"""Those that a semantic model adds; the last has one message, the names of the classes."""
RESTORER_RESULTS = {"enhanced": IMAGE}
"""Those that a restorer adds."""
ALL_RESULTS = {**RESULTS, **SEMANTIC_RESULTS, **RESTORER_RESULTS}
