"""QoS of the topics, and a mismatch in words."""

from __future__ import annotations

from typing import Any

from rclpy.node import Node
from rclpy.qos import (
    QoSDurabilityPolicy,
    QoSHistoryPolicy,
    QoSPolicyKind,
    QoSProfile,
    QoSReliabilityPolicy,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

__all__ = ["SubscriptionEventCallbacks", "image_input", "latched", "mismatch", "overridable", "result_output"]

OUTPUT_DEPTH = 2
"""Results kept for a reliable subscriber that is slow; masks are large, and only the newest ones matter."""

_MENDING_VALUE = {"reliability": "best_effort", "durability": "volatile"}


def image_input(reliability: str) -> QoSProfile:
    """Newest frame only; `reliability` is best_effort (matches every publisher) or reliable."""
    is_reliable = reliability == "reliable"
    return QoSProfile(
        history=QoSHistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=QoSReliabilityPolicy.RELIABLE if is_reliable else QoSReliabilityPolicy.BEST_EFFORT,
        durability=QoSDurabilityPolicy.VOLATILE,
    )


def result_output() -> QoSProfile:
    """Reliable, so that it matches every subscriber."""
    return QoSProfile(
        history=QoSHistoryPolicy.KEEP_LAST, depth=OUTPUT_DEPTH, reliability=QoSReliabilityPolicy.RELIABLE
    )


def latched() -> QoSProfile:
    """Transient local: who subscribes late still gets the last message."""
    return QoSProfile(
        history=QoSHistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=QoSReliabilityPolicy.RELIABLE,
        durability=QoSDurabilityPolicy.TRANSIENT_LOCAL,
    )


def overridable() -> QoSOverridingOptions:
    """History, depth, reliability and durability may be overridden by `qos_overrides` parameters."""
    return QoSOverridingOptions(
        (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
    )


def mismatch(node: Node, topic: str, profile: QoSProfile, policy_kind: Any) -> str:
    """Why a publisher on `topic` does not reach us, and the override line that mends it.

    Args:
        topic: full name.
        profile: what our subscription requests.
        policy_kind: the policy that does not match (QoSPolicyKind or its number).
    """
    policy = qos_policy_name_from_kind(policy_kind).lower()
    requested = _policy_text(profile, policy)
    offered = sorted({_policy_text(info.qos_profile, policy) for info in node.get_publishers_info_by_topic(topic)})
    mend = _MENDING_VALUE.get(policy)
    shorter = f"-p input_reliability:={mend} or " if policy == "reliability" else ""
    cure = (
        f"start the node with: {shorter}-p qos_overrides.{topic}.subscription.{policy}:={mend}, or have it in "
        "params_file"
        if mend
        else f"make the publisher offer at least the {policy} that the node requests"
    )
    return (
        f"QoS mismatch on {topic}: the node requests {policy} {requested}, publishers offer "
        f"{', '.join(offered) or 'something else'}; no frame can arrive. Mend it: {cure}"
    )


def _policy_text(profile: QoSProfile, policy: str) -> str:
    value = getattr(profile, policy, "unknown")
    return str(getattr(value, "name", value)).lower()
