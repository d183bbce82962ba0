"""Mask metrics by the definitions of GleSAM (arXiv 2503.12507), COCO and Boundary IoU, and the published prompts."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.validation import BoolArray, FloatArray

COCO_THRESHOLDS = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2).tolist())
"""IoU thresholds of average recall, 0.5 .. 0.95."""
BOUNDARY_SHARE = 0.02
"""Width of the boundary band as a share of the image diagonal (Cheng et al., CVPR 2021)."""
CONFIDENCE, RESAMPLES = 0.95, 2000
"""Of the intervals of all results: percentile bootstrap."""

_DRAWN_AT_ONCE = 1 << 20

Doubles = NDArray[np.float64]


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
    return _ratio(_count(p & t), _count(p | t))


def dice(predicted: Any, truth: Any) -> Doubles:
    """Dice coefficient 2 |P and T| / (|P| + |T|) of masks in pairs; arguments, result and errors as in `iou`."""
    p, t = _pair(predicted, truth)
    return _ratio(2 * _count(p & t), _count(p) + _count(t))


def pixel_accuracy(predicted: Any, truth: Any) -> Doubles:
    """Share of the pixels on which the masks agree; arguments, result and errors as in `iou`."""
    p, t = _pair(predicted, truth)
    return _count(p == t) / max(1, p.shape[-2] * p.shape[-1])


def boundary(masks: Any, share: float = BOUNDARY_SHARE) -> BoolArray:
    """The pixels of each mask that lie near its edge; the border of the image is an edge, too.

    Args:
        masks: (..., H, W) bool.
        share: width of the band as a share of the image diagonal, above 0; at least one pixel.

    Returns:
        (..., H, W) bool, inside the masks. As the authors' code: the mask less its erosion by a square.

    Raises:
        ValueError, TypeError: fewer than two axes, a share that is not above 0, or not bool.
    """
    m = _masks(masks, "masks")
    if m.ndim < 2:
        raise ValueError(f"masks: expected shape (..., H, W), got {m.shape}")
    if not share > 0:
        raise ValueError(f"share: expected above 0, got {share}")
    width = max(1, round(share * float(np.hypot(*m.shape[-2:]))))
    bands = np.zeros_like(m)
    for mask, band in zip(m.reshape(-1, *m.shape[-2:]), bands.reshape(-1, *m.shape[-2:])):
        x1, y1, x2, y2 = _window(mask)
        if x1 < x2:
            inside = np.ascontiguousarray(mask[y1:y2, x1:x2])
            core = cv2.erode(
                inside.view(np.uint8), np.ones((3, 3), np.uint8), iterations=width,
                borderType=cv2.BORDER_CONSTANT, borderValue=(0,),
            )
            band[y1:y2, x1:x2] = inside & (core == 0)
    return bands


def boundary_iou(predicted: Any, truth: Any) -> Doubles:
    """Boundary IoU of masks in pairs (Cheng et al., CVPR 2021): `iou` of their `boundary`.

    Arguments, result and errors as in `iou`.
    """
    p, t = _pair(predicted, truth)
    return iou(boundary(p), boundary(t))


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
    areas_p, areas_t = _count(p), _count(t)
    windows_p, windows_t = [_window(mask) for mask in p], [_window(mask) for mask in t]
    both = np.zeros((len(p), len(t)), np.int64)
    for i, (x1, y1, x2, y2) in enumerate(windows_p):
        for j, (u1, v1, u2, v2) in enumerate(windows_t):
            rows, columns = slice(max(y1, v1), min(y2, v2)), slice(max(x1, u1), min(x2, u2))
            if rows.start < rows.stop and columns.start < columns.stop:
                both[i, j] = np.count_nonzero(p[i, rows, columns] & t[j, rows, columns])
    return _ratio(both, areas_p[:, None] + areas_t[None, :] - both)


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


def region_recall(overlap: Any, k: int, thresholds: tuple[float, ...] = COCO_THRESHOLDS) -> Doubles:
    """For each true region the share of the thresholds at which the best `k` masks find it, matched as COCO does.

    Args:
        overlap: (N, M) IoU of N predicted masks, best score first, with M true regions; see `pairwise_iou`.
        k: at least 1.
        thresholds: a region is found by a mask that has at least this IoU; each mask finds one region only.

    Returns:
        (M,) float64 in 0..1; the mean over all regions of a data set is COCO's average recall at K.

    Raises:
        ValueError: not two axes, or k below 1.
    """
    rows = np.asarray(overlap, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"overlap: expected shape (N, M), got {rows.shape}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    least = np.array(thresholds)
    free = np.ones((len(least), rows.shape[1]), np.bool_)
    # a mask below the lowest threshold finds nothing
    for row in rows[:k][rows[:k].max(1, initial=-1.0) >= least.min()]:
        candidates = np.where(free, row, -1.0)
        best = candidates.argmax(1)
        hit = np.flatnonzero(candidates[np.arange(len(least)), best] >= least)
        free[hit, best[hit]] = False
    return np.asarray((~free).mean(0), np.float64)


def mask_boxes(masks: Any) -> FloatArray:
    """The tight box of each mask, as a box prompt.

    Args:
        masks: (K, H, W) bool, each with at least one pixel.

    Returns:
        (K, 4) float32 xyxy in pixels, x2 and y2 exclusive.

    Raises:
        ValueError, TypeError: not three axes, an empty mask, or not bool.
    """
    m = _masks(masks, "masks")
    if m.ndim != 3:
        raise ValueError(f"masks: expected shape (K, H, W), got {m.shape}")
    windows = np.array([_window(mask) for mask in m], np.float32).reshape(-1, 4)
    if not windows[:, 2].all():
        raise ValueError("masks: expected at least one pixel in each, got an empty mask")
    return windows


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
    values: Any, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, groups: Any = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: (N,) numbers, one an image or object; hand in differences for a paired comparison.
        seed: of the resampling.
        confidence: between 0 and 1.
        resamples: number of bootstrap samples.
        groups: (N,) integers, the image of each object: objects of one image are alike, so whole images are drawn.
            None: each value is drawn for itself.

    Returns:
        (low, high).

    Raises:
        ValueError: no values, values that are not finite, another number of groups, or a confidence outside 0..1.
    """
    v = _series(values, "values")
    sums, counts = _drawn_sums([v, np.ones_like(v)], groups, seed, resamples)
    return percentiles(sums / counts, confidence)


def percentiles(estimates: Any, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high) between which the share `confidence` of (N,) bootstrap estimates lies, as much below as above.

    Raises:
        ValueError: a confidence outside 0..1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}")
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_gains(
    after: Any, before: Any, after_groups: Any, before_groups: Any, seed: int
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """How much larger the mean of `after` is than that of `before`; the images are the same, their objects need not be.

    Args:
        after, before: (N,) and (M,) numbers.
        after_groups, before_groups: (N,) and (M,) integers, the image of each object; images are drawn, the same for
            both.
        seed: of the resampling.

    Returns:
        (difference, low, high), and the same as a share of the mean of `before`; NaN, all three, where that is 0.

    Raises:
        ValueError: no values, values that are not finite, or other images.
    """
    a, b = _series(after, "after"), _series(before, "before")
    if set(np.unique(after_groups)) != set(np.unique(before_groups)):
        raise ValueError("after_groups, before_groups: expected the same images in both")
    no_a, no_b, one_a, one_b = np.zeros_like(a), np.zeros_like(b), np.ones_like(a), np.ones_like(b)
    columns = [np.concatenate(pair) for pair in ((a, no_b), (one_a, no_b), (no_a, b), (no_a, one_b))]
    groups = np.concatenate([after_groups, before_groups])
    more, more_count, base, base_count = _drawn_sums(columns, groups, seed, RESAMPLES)
    more, base = more / more_count, base / base_count
    difference = (float(a.mean() - b.mean()), *percentiles(more - base))
    if not b.sum():
        return difference, (float("nan"), float("nan"), float("nan"))
    share = percentiles(more[base > 0] / base[base > 0] - 1)
    return difference, (float(a.mean() / b.mean() - 1), *share)


def mean_ranks(values: Any) -> Doubles:
    """(N,) ranks from 0, ties share their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return np.asarray((first + (counts - 1) / 2)[group], np.float64)


def spearman(first: Any, second: Any) -> float:
    """Spearman's rank correlation of two (N,) series, -1..1; 0 where either does not vary."""
    a, b = mean_ranks(first), mean_ranks(second)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _series(values: Any, name: str) -> Doubles:
    v = _some(np.asarray(values, np.float64))
    if v.ndim != 1 or not np.isfinite(v).all():
        raise ValueError(f"{name}: expected (N,) finite numbers, got shape {v.shape} with {v[~np.isfinite(v)]}")
    return v


def _drawn_sums(series: list[Doubles], groups: Any, seed: int, resamples: int) -> Doubles:
    """(len(series), resamples): the sum of each series over whole groups drawn with replacement, the same for all."""
    size = series[0].size
    if groups is not None and np.shape(groups) != (size,):
        raise ValueError(f"groups: expected one for each of the {size} values, got shape {np.shape(groups)}")
    _, group = np.unique(np.arange(size) if groups is None else groups, return_inverse=True)
    sums = [np.bincount(group, values) for values in series]
    drawn = np.empty((len(series), resamples))
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // sums[0].size)
    for first in range(0, resamples, step):
        picked = rng.integers(0, sums[0].size, (min(step, resamples - first), sums[0].size))
        for row, one in zip(drawn, sums):
            row[first : first + step] = one[picked].sum(1)
    return drawn


def _window(mask: BoolArray) -> tuple[int, int, int, int]:
    """xyxy around the mask, x2 and y2 exclusive, zeros where it is empty."""
    columns, rows = np.logical_or.reduce(mask, 0), np.logical_or.reduce(mask, 1)
    if not rows.any():
        return 0, 0, 0, 0
    return (
        int(columns.argmax()), int(rows.argmax()),
        len(columns) - int(columns[::-1].argmax()), len(rows) - int(rows[::-1].argmax()),
    )


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


def _count(masks: BoolArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    # count_nonzero of one mask is vectorised, a sum over axes of all of them is not
    flat = masks.reshape(-1, *masks.shape[-2:])
    return np.array([np.count_nonzero(mask) for mask in flat], np.int64).reshape(masks.shape[:-2])


def _ratio(part: Any, whole: Any) -> Doubles:
    """part / whole, and 1 where the whole is 0: nothing to find and nothing found."""
    return np.where(np.asarray(whole) > 0, part / np.maximum(whole, 1), 1.0)
