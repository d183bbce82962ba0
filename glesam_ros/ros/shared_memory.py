"""Shared memory of Fast DDS that holds whole images."""

from __future__ import annotations

import os
from pathlib import Path

PROFILE = Path(__file__).parents[1] / "demo" / "fastdds.xml"
FAST_DDS_2, FAST_DDS_3 = VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
WITH_FAST_DDS_2 = (None, "humble", "iron", "jazzy")
"""$ROS_DISTRO there; it is not set where ROS is wheels."""


def enlarge() -> None:
    """Give publishers of this process and its children room for images; call before `rclpy.init`.

    Fast DDS's own segment of 512 kB is smaller than a 640x480 rgb8 image, so that best-effort subscribers lose frames
    as soon as the machine is busy. A profile or a network that the user has chosen stays.
    """
    if not any(name in os.environ for name in VARIABLES) and not _is_network_chosen():
        os.environ[FAST_DDS_3] = str(PROFILE)
        # Fast DDS 3 reads this one, too, and warns each time
        if os.environ.get("ROS_DISTRO") in WITH_FAST_DDS_2:
            os.environ[FAST_DDS_2] = str(PROFILE)


def _is_network_chosen() -> bool:
    """Whether the environment names transports, or this machine alone; the profile's UDP would reach beyond it."""
    return bool(os.environ.get("FASTDDS_BUILTIN_TRANSPORTS")) or os.environ.get("ROS_LOCALHOST_ONLY") == "1"
