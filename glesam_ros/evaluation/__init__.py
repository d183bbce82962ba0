"""Evaluation: masks against truth. numpy only."""

from glesam_ros.evaluation.metrics import (
    average_recall,
    best_iou,
    bootstrap_interval,
    dice,
    iou,
    mean_best_iou,
    pairwise_iou,
    pixel_accuracy,
    sample_points,
)

__all__ = [
    "average_recall",
    "best_iou",
    "bootstrap_interval",
    "dice",
    "iou",
    "mean_best_iou",
    "pairwise_iou",
    "pixel_accuracy",
    "sample_points",
]
