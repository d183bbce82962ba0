"""Which of many dense candidates become masks: coarse masks are compared, like ones vote for one.

A dense decoder gives a candidate at each point of a grid, most of them many times over. Taking local maxima of the
score on the grid (as detectors of centres do) loses good masks beside better ones of other objects. Here candidates
compete only where their masks are alike: greedy suppression on masks at a quarter of the resolution, in the order of
score times the square of stability. A mask is linear in its weights, so those that are suppressed as nearly the same
are not lost: their mean is a better mask than the best of them (as box voting in detection, Gidaris and Komodakis, ICCV
2015). More masks differ than there are places, so one ranks lower, too, the more it overlaps better ones (as in soft
suppression, Bodla et al., ICCV 2017): a place goes to another object rather than to one more version of the same.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from glesam_ros.masks import Bits, Indices, column_bits, packed, row_sums, set_bits
from glesam_ros.models.base import STABILITY_OFFSET
from glesam_ros.models.shapes import grid_cells
from glesam_ros.validation import FloatArray

POOL = 4
"""Side of the cells of the features that are one cell of a coarse mask."""
MERGE = 0.8
"""Share of the threshold for whole masks at which coarse ones count as the same: small masks lose what differs."""
STABLE = 0.8
"""Share of the threshold for whole masks that coarse ones must reach: small masks are less stable there."""
VOTE_IOU = 0.6
"""Suppressed candidates with at least this overlap vote."""
ALIKE = 0.5
"""Share of its rank that a mask loses to each better one, times the square of their IoU."""
BLOCK = 256
"""Candidates whose coarse masks are made at once: they fit into the processor's cache."""


def choose(
    weights: FloatArray, scores: FloatArray, features: FloatArray, score_threshold: float, stability_threshold: float,
    nms_iou: float, limit: int,
) -> tuple[FloatArray, FloatArray, FloatArray]:
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
        Weights (K, C), scores (K,) and ranks (K,) float32, best rank first. The rank, 0..1, is the score times the
        square of the coarse mask's stability, less for one that overlaps better ones.
    """
    near = np.flatnonzero(scores >= score_threshold)
    bits, stability = _coarse(weights[near], pooled(features))
    rank = (scores[near] * stability * stability).astype(np.float32)
    # a candidate without a certain cell has stability 0 and is no mask
    fit = np.flatnonzero((stability >= STABLE * stability_threshold) & (rank > 0))
    order = fit[np.argsort(-rank[fit], kind="stable")]
    kept, voted, novelty = suppress(bits[order], MERGE * nms_iou, VOTE_IOU, limit)
    votes = np.zeros((len(kept), len(order)), np.float32)
    voters = np.flatnonzero(voted >= 0)
    votes[voted[voters], voters] = rank[order[voters]]
    merged = votes @ weights[near[order]] / votes.sum(1, keepdims=True)
    lowered = rank[order[kept]] * novelty
    best = np.argsort(-lowered, kind="stable")
    return merged[best].astype(np.float32), scores[near[order[kept[best]]]], lowered[best]


def with_votes(
    kernels: FloatArray, candidates: FloatArray, scores: FloatArray, features: FloatArray, points: FloatArray,
    labels: FloatArray,
) -> FloatArray:
    """Kernels (B, C) of prompted masks, half of each the mean of those candidates that mean the same.

    These hold all points of the object and none of the background, and overlap its mask by `VOTE_IOU`.

    Args:
        kernels: (B, C) float32 of the prompted masks.
        candidates: (N, C) float32, dense.
        scores: (N,) float32 in 0..1, predicted IoU.
        features: (C, h, w) float32, h and w multiples of `POOL`.
        points: (B, P, 2) xy in -1..1 of the frame.
        labels: (B, P) 1 the object, 0 the background; others do not count.
    """
    cells = pooled(features)
    x, y = grid_cells(points, features.shape[1:]).reshape(-1, 2).T
    is_in = (candidates @ features[:, y, x] > 0).reshape(len(candidates), *labels.shape)
    means = ((is_in == (labels == 1)) | ((labels != 0) & (labels != 1))).all(2)
    # coarse masks once, of all that any object needs
    some = np.flatnonzero(means.any(1))
    bits, stability = _coarse(candidates[some], cells)
    areas, rank = set_bits(bits), scores[some] * stability * stability
    own = packed(kernels @ cells > 0)
    own_areas, voted = set_bits(own), kernels.copy()
    for k, kernel in enumerate(kernels):
        alike = np.flatnonzero(means[some, k])
        overlap = _overlap(set_bits(bits[alike] & own[k]), areas[alike], own_areas[k])
        votes = np.where(overlap >= VOTE_IOU, rank[alike] * overlap, 0)
        if votes.any():
            voted[k] = (kernel + votes @ candidates[some[alike]] / votes.sum()) / 2
    return voted


def _coarse(weights: FloatArray, cells: FloatArray) -> tuple[Bits, FloatArray]:
    """Kernels (N, C) times cells (C, P) -> `packed` masks and their stability (N,)."""
    bits, stability = [packed(np.zeros((0, cells.shape[1]), np.bool_))], [np.zeros(0, np.float32)]
    for start in range(0, len(weights), BLOCK):
        coarse = weights[start : start + BLOCK] @ cells
        inner, outer = (row_sums(coarse > edge) for edge in (STABILITY_OFFSET, -STABILITY_OFFSET))
        stability.append((inner / np.maximum(outer, 1)).astype(np.float32))
        bits.append(packed(coarse > 0))
    return np.concatenate(bits), np.concatenate(stability)


def pooled(features: FloatArray) -> FloatArray:
    """Features (C, h, w) -> (C, h / POOL * w / POOL), means of cells."""
    c, h, w = features.shape
    # one tall picture: as h is a multiple of the cells' side, no cell reaches over two features
    cells = cv2.resize(features.reshape(c * h, w), (w // POOL, c * h // POOL), interpolation=cv2.INTER_AREA)
    return np.asarray(cells, np.float32).reshape(c, -1)


def suppress(masks: Bits, iou: float, vote_iou: float, limit: int) -> tuple[Indices, Indices, FloatArray]:
    """Greedy non-maximum suppression that says who was suppressed by whom.

    Args:
        masks: (N, W) uint64, see `packed`, best first.
        iou: a mask that overlaps a better, kept one by more than this is suppressed.
        vote_iou: it votes for the first such one if it overlaps that by at least this.
        limit: stop after so many.

    Returns:
        kept (K,), indices of the kept masks, best first; voted (N,), for each mask the place in `kept` that it votes
        for, -1 for none, a kept one votes for itself; novelty (K,) float32 in 0..1, the product of 1 - `ALIKE` IoU^2
        over the kept masks before.
    """
    voted = np.full(len(masks), -1, np.intp)
    kept: list[int] = []
    # a word of all masks in a row: numpy runs over rows much faster than over the few words of a mask
    columns, left, areas = np.ascontiguousarray(masks.T), np.arange(len(masks)), set_bits(masks)
    while len(left) and len(kept) < limit:
        overlap = _overlap(column_bits(columns & columns[:, :1]), areas, areas[0])
        over = overlap > iou
        # said for an empty mask, which does not overlap itself
        over[0] = True
        gone, stay = np.flatnonzero(over), np.flatnonzero(~over)
        voted[left[gone[overlap[gone] >= vote_iou]]] = len(kept)
        voted[left[0]] = len(kept)
        kept.append(int(left[0]))
        columns, left, areas = columns.take(stay, 1), left.take(stay), areas.take(stay)
    return np.array(kept, np.intp), voted, _novelty(masks[kept])


def _novelty(masks: Bits) -> FloatArray:
    """(K,) float32 of `packed` masks (K, W), best first: the product of 1 - `ALIKE` IoU^2 over those before."""
    cells = np.unpackbits(masks.view(np.uint8), axis=1).astype(np.float32)
    both = (cells @ cells.T).astype(np.float64)
    areas = both.diagonal()
    overlap = np.triu(_overlap(both, areas, areas[:, None]), 1)
    novelty: FloatArray = (1 - ALIKE * overlap * overlap).prod(0).astype(np.float32)
    return novelty


def _overlap(both: Any, areas: Any, others: Any) -> Any:
    """IoU of masks, from what they have in common and the areas of the ones and of the others."""
    return both / np.maximum(areas + others - both, 1)
