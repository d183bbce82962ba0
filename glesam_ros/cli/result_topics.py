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
