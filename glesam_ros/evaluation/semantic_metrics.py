"""Metrics of maps of classes: mean IoU, accuracies and a figure a class, with percentile bootstrap over pictures.

Figures are those of ADE20K and Cityscapes: one confusion matrix is added up over all pictures. In it, pixels without a
true class do not count. The mean IoU and the mean class accuracy leave out classes without a true pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glesam_ros.evaluation.metrics import RESAMPLES, Doubles

METRICS = ("miou", "pixel_accuracy", "class_accuracy")

_DRAWN_AT_ONCE = 1 << 22

Integers = NDArray[np.int64]


def confusion(truth: Any, predicted: Any, classes: int) -> Integers:
    """Count pixels by true and predicted class.

    Args:
        truth: (H, W) integers, 0..K - 1 a class; K and above, or below 0: does not count.
        predicted: (H, W) integers, 0..K - 1 a class, K another class, which is wrong whatever the truth.
        classes: K, at least 1.

    Returns:
        (K, K + 1) int64, true class by predicted class.

    Raises:
        ValueError: shapes differ, or a predicted class outside 0..K.
    """
    t, p = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    if t.shape != p.shape:
        raise ValueError(f"truth, predicted: expected the same shape, got {t.shape} and {p.shape}")
    counts = (t >= 0) & (t < classes)
    t, p = t[counts], p[counts]
    if p.size and (p.min() < 0 or p.max() > classes):
        raise ValueError(f"predicted: expected 0..{classes}, got {p.min()} .. {p.max()}")
    return np.bincount(t * (classes + 1) + p, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def class_counts(matrix: Integers) -> Integers:
    """(3, K) int64 of a `confusion` matrix: pixels hit, true and predicted of each class."""
    return np.stack([np.diagonal(matrix), matrix.sum(1), matrix.sum(0)[:-1]])


def class_ious(counts: Any) -> Doubles:
    """IoU of each class: hits / (true + predicted - hits).

    Args:
        counts: (..., 3, K) of `class_counts`, or sums of them.

    Returns:
        (..., K) float64 in 0..1; NaN where the class has pixels neither in truth nor in prediction.
    """
    hit, true, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    return ratio(hit, true + predicted - hit)


def figures(counts: Any) -> dict[str, Doubles]:
    """The `METRICS` of counts: mean IoU, pixel accuracy, mean class accuracy.

    Args:
        counts: (..., 3, K) of `class_counts`, or sums of them.

    Returns:
        metric -> (...) float64 in 0..1; NaN where no pixel counts.
    """
    hit, true, _ = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    return {
        # classes without a true pixel are left out, as in detectron2's evaluator, which RASS's tables come from
        "miou": _mean(np.where(true > 0, class_ious(counts), np.nan)),
        "pixel_accuracy": ratio(hit.sum(-1), true.sum(-1)),
        "class_accuracy": _mean(ratio(hit, true)),
    }


def resampled(rows: Any, seed: int, resamples: int = RESAMPLES) -> Doubles:
    """Sums over pictures drawn with replacement; the same seed and number of pictures draws the same ones.

    Args:
        rows: (N, ...) numbers, one row a picture.
        seed: of the drawing.
        resamples: how often N pictures are drawn.

    Returns:
        (resamples, ...) float64.

    Raises:
        ValueError: no rows.
    """
    r = np.asarray(rows, np.float64)
    if not len(r):
        raise ValueError("rows: expected at least one picture, got none")
    flat = r.reshape(len(r), -1)
    drawn = np.empty((resamples, flat.shape[1]))
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // len(r))
    for first in range(0, resamples, step):
        some = min(step, resamples - first)
        picked = rng.integers(0, len(r), (some, len(r))) + len(r) * np.arange(some)[:, None]
        times = np.bincount(picked.ravel(), minlength=some * len(r)).reshape(some, len(r))
        drawn[first : first + some] = times @ flat
    return drawn.reshape(resamples, *r.shape[1:])


def ratio(part: Any, whole: Any) -> Doubles:
    """part / whole, NaN where the whole is 0."""
    there = np.asarray(whole) > 0
    return np.where(there, part / np.where(there, whole, 1), np.nan)


def _mean(values: Doubles) -> Doubles:
    """Mean over the last axis of those that are numbers, NaN where none is."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1))
