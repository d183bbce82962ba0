"""Degradation: image and seed in, worse image and what was sampled out. numpy and OpenCV only."""

from glesam_ros.degradation.lqseg import Degraded, degrade_lqseg

__all__ = ["Degraded", "degrade_lqseg"]
