"""Prompts and grid points drawn from ground-truth regions, as a person or GleSAM's protocol would give them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SLOTS = 4
"""Prompt points of one object at most, box corners and box centre included."""


def draw_prompt(region: Array, rng: np.random.Generator) -> tuple[Array, Array, bool]:
    """One simulated prompt for a region.

    Args:
        region: (h, w) bool with at least one cell.

    Returns:
        xy (SLOTS, 2) float32 in -1..1, labels (SLOTS,) float32 (0, 1, 2, 3, 4, -1 padding), and whether the prompt is
        ambiguous (a single point), for which any of several masks may be right.
    """
    xy = np.zeros((SLOTS, 2), np.float32)
    labels = np.full(SLOTS, -1, np.float32)
    kind = rng.random()
    if kind < 0.3:
        xy[:3], labels[:3] = box_prompt(jittered_box(region, rng), region.shape)
    elif kind < 0.5:
        xy[:1], labels[0] = draw_points(region, 1, rng), 1
    else:
        positive = int(rng.integers(2, 4))
        xy[:positive], labels[:positive] = draw_points(region, positive, rng), 1
        if rng.random() < 0.4 and not region.all():
            xy[positive : positive + 1], labels[positive] = draw_points(~region, 1, rng), 0
    return xy, labels, kind >= 0.3 and kind < 0.5


def draw_points(region: Array, n: int, rng: np.random.Generator) -> Array:
    """(n, 2) float32 random positions inside the region, in -1..1."""
    rows, cols = np.nonzero(region)
    chosen = rng.integers(len(rows), size=n)
    h, w = region.shape
    offset = rng.random((2, n))
    return np.stack([2 * (cols[chosen] + offset[0]) / w - 1, 2 * (rows[chosen] + offset[1]) / h - 1], 1).astype(
        np.float32
    )


def jittered_box(region: Array, rng: np.random.Generator) -> Array:
    """(4,) float box xyxy of the region in cells, each side moved by up to 10 % of the box."""
    rows, cols = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    box = np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], np.float64)
    size = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    return box + np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * size


def box_prompt(box: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Box xyxy in cells of `shape` (h, w) -> its corners and centre (3, 2) in -1..1 and their labels 2, 3, 4."""
    h, w = shape[:2]
    scaled = np.asarray(box, np.float64) / np.array([w, h, w, h]) * 2 - 1
    return np.stack([scaled[:2], scaled[2:], (scaled[:2] + scaled[2:]) / 2]), np.array([2, 3, 4], np.float64)


def draw_cells(region: Array, n: int, rng: np.random.Generator, stride: int = 4) -> Array:
    """(n,) indices of grid cells (`stride` cells of the region wide) whose centre lies inside, -1 where none does."""
    centres = region[stride // 2 :: stride, stride // 2 :: stride]
    inside = np.flatnonzero(centres)
    return rng.choice(inside, n) if len(inside) else np.full(n, -1)
