"""Degradation: image and seed in, worse image and what was sampled out. numpy and OpenCV only."""

from glesam_ros.degradation.lqseg import Degraded, degrade_lqseg, degrade_lqseg_mixed
from glesam_ros.degradation.robot import HELD_OUT_KINDS, TRAINING_KINDS, degrade, names

__all__ = [
    "HELD_OUT_KINDS", "TRAINING_KINDS", "Degraded", "degrade", "degrade_lqseg", "degrade_lqseg_mixed", "names",
]
