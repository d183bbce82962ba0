"""Names of topics that belong to another one."""

from __future__ import annotations

from rclpy.node import Node


def beside(node: Node, base: str, suffix: str) -> str:
    """Name, before remapping, of `base` + `suffix`: it goes where `base` goes, unless it has a rule of its own."""
    name, moved = base + suffix, node.resolve_topic_name(base)
    is_own = node.resolve_topic_name(name) != node.resolve_topic_name(name, only_expand=True)
    is_moved = moved != node.resolve_topic_name(base, only_expand=True)
    # a full name would be remapped once more where it is used
    return moved + suffix if is_moved and not is_own else name
