"""Mask metrics by the definitions of GleSAM (arXiv 2503.12507) and COCO, and the published prompt protocol."""

from __future__ import annotations

from typing import Any

import numpy as np

from glesam_ros.validation import BoolArray, FloatArray

COCO_THRESHOLDS = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2).tolist())
"""IoU thresholds of average recall, 0.5 .. 0.95."""

Doubles = np.ndarray[Any, np.dtype[np.float64]]


def iou(predicted: Any, truth: Any) -> Doubles:
    """Intersection over union of masks in pairs; report its mean over the objects.

    Args:
        predicted, truth: (..., H, W) bool of the same shape.

    Returns:
        (...) float64 in 0..1; 1 where both masks are empty.

    Raises:
        ValueError, TypeError: shapes differ, or not bool.
    """
    p, t = _pair(predicted, truth)
    return _ratio((p & t).sum((-2, -1)), (p | t).sum((-2, -1)))


def dice(predicted: Any, truth: Any) -> Doubles:
    """Dice coefficient 2 |P and T| / (|P| + |T|) of masks in pairs; arguments, result and errors as in `iou`."""
    p, t = _pair(predicted, truth)
    return _ratio(2 * (p & t).sum((-2, -1)), p.sum((-2, -1)) + t.sum((-2, -1)))


def pixel_accuracy(predicted: Any, truth: Any) -> Doubles:
    """Share of the pixels on which the masks agree; arguments, result and errors as in `iou`."""
    p, t = _pair(predicted, truth)
    return np.asarray((p == t).mean((-2, -1)), np.float64)


def pairwise_iou(predicted: Any, truth: Any) -> Doubles:
    """IoU of each predicted mask with each true one.

    Args:
        predicted: (K, H, W) bool.
        truth: (M, H, W) bool.

    Returns:
        (K, M) float64; 1 where both masks are empty.

    Raises:
        ValueError, TypeError: not three axes, sizes differ, or not bool.
    """
    p, t = _masks(predicted, "predicted"), _masks(truth, "truth")
    if p.ndim != 3 or t.ndim != 3 or p.shape[1:] != t.shape[1:]:
        raise ValueError(
            f"predicted, truth: expected (K, H, W) and (M, H, W) of one image, got {p.shape} and {t.shape}"
        )
    pixels = p.shape[1] * p.shape[2]
    a, b = p.reshape(len(p), pixels).astype(np.float32), t.reshape(len(t), pixels).astype(np.float32)
    both = (a @ b.T).astype(np.float64)  # float32 counts pixels exactly up to 2**24
    return _ratio(both, a.sum(1, dtype=np.float64)[:, None] + b.sum(1, dtype=np.float64)[None, :] - both)


def best_iou(predicted: Any, truth: Any) -> Doubles:
    """For each true region the IoU of the predicted mask that fits it best.

    Args:
        predicted: (K, H, W) bool; K may be 0.
        truth: (M, H, W) bool.

    Returns:
        (M,) float64, zeros where nothing was predicted. Errors as in `pairwise_iou`.
    """
    return np.asarray(pairwise_iou(predicted, truth).max(0, initial=0.0))


def mean_best_iou(predicted: Any, truth: Any) -> float:
    """Mean of `best_iou` over the true regions of one image.

    Raises:
        ValueError: there is no true region, or as in `pairwise_iou`.
    """
    return float(_some(best_iou(predicted, truth)).mean())


def average_recall(predicted: Any, truth: Any, k: int, thresholds: tuple[float, ...] = COCO_THRESHOLDS) -> float:
    """COCO's average recall at K in one image; over a data set, weigh images by their true regions.

    Args:
        predicted: (N, H, W) bool, best score first; the first `k` count.
        truth: (M, H, W) bool.
        k: at least 1.
        thresholds: a region is found by a mask that has at least this IoU; each mask finds one region only.

    Returns:
        Share of the regions found, 0..1, mean over the thresholds.

    Raises:
        ValueError: no true region, k below 1, or as in `pairwise_iou`.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    overlap = pairwise_iou(predicted, truth)[:k]
    regions = overlap.shape[1]
    if not regions:
        raise ValueError("truth: expected at least one region, got none; leave such images out")
    found = 0
    for threshold in thresholds:
        free = np.ones(regions, np.bool_)
        for row in overlap:
            candidates = np.where(free, row, -1.0)
            best = int(candidates.argmax())
            if candidates[best] >= threshold:
                free[best] = False
        found += regions - int(free.sum())
    return found / (regions * len(thresholds))


def sample_points(mask: Any, n: int = 3, seed: int | np.random.Generator = 0) -> FloatArray:
    """Positive point prompts by the published protocol: random distinct pixels of the true mask.

    Args:
        mask: (H, W) bool with at least one pixel.
        n: how many, at least 1; where the mask has fewer pixels its last drawn one repeats.
        seed: an integer or a generator.

    Returns:
        (n, 2) float32, xy in pixels.

    Raises:
        ValueError, TypeError: not two axes, an empty mask, n below 1, or not bool.
    """
    m = _masks(mask, "mask")
    if m.ndim != 2:
        raise ValueError(f"mask: expected shape (H, W), got {m.shape}")
    if n < 1:
        raise ValueError(f"n: expected at least 1 point, got {n}")
    inside = np.flatnonzero(m)
    if not inside.size:
        raise ValueError("mask: expected at least one pixel inside, got an empty mask")
    drawn = np.random.default_rng(seed).choice(inside, min(n, inside.size), replace=False)
    drawn = np.pad(drawn, (0, n - drawn.size), mode="edge")
    return np.stack([drawn % m.shape[1], drawn // m.shape[1]], 1).astype(np.float32)


def bootstrap_interval(
    values: Any, seed: int, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: (N,) numbers, one an image or object; hand in differences for a paired comparison.
        seed: of the resampling.
        confidence: between 0 and 1.
        resamples: number of bootstrap samples.

    Returns:
        (low, high).

    Raises:
        ValueError: no values, values that are not finite, or a confidence outside 0..1.
    """
    v = _some(np.asarray(values, np.float64))
    if v.ndim != 1 or not np.isfinite(v).all():
        raise ValueError(f"values: expected (N,) finite numbers, got shape {v.shape} with {v[~np.isfinite(v)]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}")
    rng = np.random.default_rng(seed)
    means = [v[rng.integers(0, v.size, v.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _masks(value: Any, name: str) -> BoolArray:
    array = np.asarray(value)
    if array.dtype != np.bool_:
        raise TypeError(f"{name}: expected dtype bool, got {array.dtype}; compare with a threshold first")
    return array


def _pair(predicted: Any, truth: Any) -> tuple[BoolArray, BoolArray]:
    p, t = _masks(predicted, "predicted"), _masks(truth, "truth")
    if p.shape != t.shape or p.ndim < 2:
        raise ValueError(f"predicted, truth: expected the same shape (..., H, W), got {p.shape} and {t.shape}")
    return p, t


def _some(values: Doubles) -> Doubles:
    if not values.size:
        raise ValueError("expected at least one value, got none; leave images without regions out")
    return values


def _ratio(part: Any, whole: Any) -> Doubles:
    """part / whole, and 1 where the whole is 0: nothing to find and nothing found."""
    return np.where(np.asarray(whole) > 0, part / np.maximum(whole, 1), 1.0)
