"""Evaluation: masks against truth, baselines, figures and pictures of the result."""

from glesam_ros.evaluation.metrics import (
    average_recall,
    best_iou,
    bootstrap_interval,
    boundary,
    boundary_iou,
    dice,
    iou,
    mask_boxes,
    mean_best_iou,
    mean_gains,
    mean_ranks,
    pairwise_iou,
    pixel_accuracy,
    region_recall,
    sample_points,
    spearman,
)

__all__ = [
    "average_recall",
    "best_iou",
    "bootstrap_interval",
    "boundary",
    "boundary_iou",
    "dice",
    "iou",
    "mask_boxes",
    "mean_best_iou",
    "mean_gains",
    "mean_ranks",
    "pairwise_iou",
    "pixel_accuracy",
    "region_recall",
    "sample_points",
    "spearman",
]
