"""Degradation: image and seed in, worse image and what was sampled out. numpy and OpenCV only."""

from glesam_ros.degradation.lqseg import Degraded, degrade_lqseg
from glesam_ros.degradation.robot import degrade, names

__all__ = ["Degraded", "degrade", "degrade_lqseg", "names"]
