"""Names of topics that belong to another one."""

from __future__ import annotations

from rclpy.node import Node


def beside(node: Node, base: str, suffix: str) -> str:
    """Full name of the topic `base` + `suffix`: a remapping of `base` moves it, too, unless it has one of its own."""
    name = base + suffix
    own = node.resolve_topic_name(name)
    return own if own != node.resolve_topic_name(name, only_expand=True) else node.resolve_topic_name(base) + suffix
