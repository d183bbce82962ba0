"""Which of many dense candidates become masks: coarse masks are compared, like ones vote for one.

A dense decoder gives a candidate at each point of a grid, most of them many times over. Taking local maxima of the
score on the grid (as detectors of centres do) loses good masks beside better ones of other objects. Here candidates
compete only where their masks are alike: greedy suppression on masks at a quarter of the resolution, in the order of
score times stability. A mask is linear in its weights, so those that are suppressed as nearly the same are not lost:
their mean is a better mask than the best of them (as box voting in detection, Gidaris and Komodakis, ICCV 2015).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glesam_ros.models.base import STABILITY_OFFSET
from glesam_ros.validation import FloatArray

Indices = np.ndarray[Any, np.dtype[np.intp]]

POOL = 4
"""Side of the cells of the features that are one cell of a coarse mask."""
MERGE = 0.8
"""Share of the threshold for whole masks at which coarse ones count as the same: small masks lose what differs."""
STABLE = 0.8
"""Share of the threshold for whole masks that coarse ones must reach: small masks are less stable there."""
VOTE_IOU = 0.6
"""Suppressed candidates with at least this overlap vote."""
BLOCK = 64
"""Candidates that are compared in one matrix product."""


def choose(
    weights: FloatArray, scores: FloatArray, features: FloatArray, score_threshold: float, stability_threshold: float,
    nms_iou: float, limit: int,
) -> tuple[FloatArray, FloatArray]:
    """The candidates that differ, each the mean of those that are nearly the same.

    Args:
        weights: (N, C) float32; times the features they are the mask logits.
        scores: (N,) float32 in 0..1, predicted IoU.
        features: (C, h, w) float32, h and w multiples of `POOL`.
        score_threshold: least score of what is returned, 0..1.
        stability_threshold: less stable masks are not wanted, 0..1.
        nms_iou: masks that overlap by more than this are not wanted, 0..1.
        limit: at most so many.

    Returns:
        Weights (K, C) and scores (K,) float32, best first: the score times the stability of the coarse mask, 0..1.
    """
    near = np.flatnonzero(scores >= score_threshold)
    coarse = weights[near] @ pooled(features)
    inner, outer = (np.count_nonzero(coarse > edge, axis=1) for edge in (STABILITY_OFFSET, -STABILITY_OFFSET))
    stability = inner / np.maximum(outer, 1)
    rank = (scores[near] * stability).astype(np.float32)
    # a candidate without a certain cell has stability 0 and is no mask
    fit = np.flatnonzero((stability >= STABLE * stability_threshold) & (rank >= score_threshold) & (rank > 0))
    order = fit[np.argsort(-rank[fit], kind="stable")]
    kept, voted = suppress((coarse[order] > 0).astype(np.float32), MERGE * nms_iou, VOTE_IOU, limit)
    votes = np.zeros((len(kept), len(order)), np.float32)
    voters = np.flatnonzero(voted >= 0)
    votes[voted[voters], voters] = rank[order[voters]]
    merged = votes @ weights[near[order]] / votes.sum(1, keepdims=True)
    return merged.astype(np.float32), rank[order[kept]]


def pooled(features: FloatArray) -> FloatArray:
    """Features (C, h, w) -> (C, h / POOL * w / POOL), means of cells."""
    c, h, w = features.shape
    # of rows first: numpy adds whole rows quickly, and groups of four slowly
    rows = features.reshape(c, h // POOL, POOL, w).sum(2)
    cells: FloatArray = rows.reshape(c, -1, POOL).sum(2) / np.float32(POOL * POOL)
    return cells


def suppress(masks: FloatArray, iou: float, vote_iou: float, limit: int) -> tuple[Indices, Indices]:
    """Greedy non-maximum suppression that says who was suppressed by whom.

    Args:
        masks: (N, P) float32 of 0 and 1, best first.
        iou: a mask that overlaps a better, kept one by more than this is suppressed.
        vote_iou: it votes for the first such one if it overlaps that by at least this.
        limit: stop after so many.

    Returns:
        kept (K,), indices of the kept masks, best first, and voted (N,), for each mask the place in `kept` that it
        votes for, -1 for none; a kept one votes for itself.
    """
    voted = np.full(len(masks), -1, np.intp)
    kept: list[int] = []
    # an IoU above t is an intersection above t / (1 + t) of the sum of both areas
    share, vote_share = (np.float32(t / (1 + t)) for t in (iou, vote_iou))
    # rows of `masks` are candidates `left`, those of them that are not `alive` were decided
    left, area, alive = np.arange(len(masks)), masks.sum(1), np.ones(len(masks), np.bool_)
    while alive.any() and len(kept) < limit:
        head = np.flatnonzero(alive)[:BLOCK]
        over = masks[head] @ masks[head].T > share * (area[head, None] + area[head])
        free = np.ones(len(head), np.bool_)
        heads: list[int] = []
        for k in range(len(head)):
            if free[k] and len(kept) + len(heads) < limit:
                heads.append(k)
                free &= ~over[k]
        new = head[heads]
        both, areas = masks @ masks[new].T, area[:, None] + area[new]
        over = both > share * areas
        # an empty mask does not overlap itself
        over[new] = np.eye(len(new), dtype=np.bool_)
        dead = np.flatnonzero(over.any(1) & alive)
        first = over[dead].argmax(1)
        votes = both[dead, first] >= vote_share * areas[dead, first]
        voted[left[dead[votes]]] = len(kept) + first[votes]
        voted[left[new]] = len(kept) + np.arange(len(new))
        kept += left[new].tolist()
        alive[dead] = False
        if 4 * np.count_nonzero(alive) < 3 * len(left):
            masks, left, area, alive = masks[alive], left[alive], area[alive], alive[alive]
    return np.array(kept, np.intp), voted
