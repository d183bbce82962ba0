"""The choice of everything mode among dense candidates."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest

from glesam_ros.masks import column_bits, packed, row_sums, set_bits
from glesam_ros.models.proposals import (
    ALIKE,
    BLOCK,
    MERGE,
    POOL,
    STABLE,
    VOTE_IOU,
    choose,
    pooled,
    suppress,
    with_votes,
)

SIZE = 16
"""Cells of a coarse mask a side."""


def random_masks(seed: int, count: int) -> np.ndarray[Any, Any]:
    """(count, SIZE * SIZE) bool rectangles, many of them nearly the same."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, SIZE, SIZE), np.bool_)
    for mask in masks:
        y, x = rng.integers(0, 10, 2) // 3 * 3 + rng.integers(0, 2, 2)
        h, w = rng.integers(2, 7, 2)
        mask[y : y + h, x : x + w] = True
    return masks.reshape(count, -1)


def overlap(a: Any, b: Any) -> float:
    return float(np.logical_and(a, b).sum() / max(1, np.logical_or(a, b).sum()))


def plain(masks: Any, iou: float, vote_iou: float, limit: int) -> tuple[list[int], list[int]]:
    """Greedy suppression as in the textbook: one mask after the other."""
    kept: list[int] = []
    voted = [-1] * len(masks)
    for k, mask in enumerate(masks):
        by = next((place for place, j in enumerate(kept) if overlap(mask, masks[j]) > iou), None)
        if by is None:
            if len(kept) == limit:
                continue
            voted[k] = len(kept)
            kept.append(k)
        elif overlap(mask, masks[kept[by]]) >= vote_iou:
            voted[k] = by
    return kept, voted


def plain_novelty(masks: Any) -> list[float]:
    return [math.prod(1 - ALIKE * overlap(mask, better) ** 2 for better in masks[:k]) for k, mask in enumerate(masks)]


@pytest.mark.parametrize("iou", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 63, 200, 300])
def test_suppression_equals_the_plain_algorithm(iou: float, count: int) -> None:
    masks = random_masks(count, count)
    kept, voted, novelty = suppress(packed(masks), iou, 0.7, count)
    expected, votes = plain(masks, iou, 0.7, count)
    assert kept.tolist() == expected and voted.tolist() == votes
    np.testing.assert_allclose(novelty, plain_novelty(masks[kept]), rtol=1e-5)


def test_the_limit_keeps_the_best() -> None:
    masks = packed(random_masks(0, 300))
    whole, _, _ = suppress(masks, 0.5, 0.7, 300)
    assert len(whole) > 70
    for limit in (0, 1, 5, 63, 64, 65, len(whole)):
        kept, voted, _ = suppress(masks, 0.5, 0.7, limit)
        assert kept.tolist() == whole[:limit].tolist()
        assert voted[kept].tolist() == list(range(limit)) and voted.max() == limit - 1


def test_what_nothing_overlaps_is_kept() -> None:
    masks = packed(np.eye(200, SIZE * SIZE, dtype=np.bool_))
    kept, voted, novelty = suppress(masks, 0.0, 0.7, 200)
    assert kept.tolist() == voted.tolist() == list(range(200)) and (novelty == 1).all()


@pytest.mark.parametrize("vote_iou", [0.0, 0.7])
def test_empty_masks_are_kept_and_overlap_nothing(vote_iou: float) -> None:
    masks = np.zeros((4, SIZE * SIZE), np.bool_)
    masks[1, :9] = True
    kept, voted, novelty = suppress(packed(masks), 0.0, vote_iou, 4)
    assert kept.tolist() == voted.tolist() == list(range(4)) and (novelty == 1).all()


@pytest.mark.parametrize("cells", [1, 7, 64, 65, 704, 1000])
@pytest.mark.parametrize("numpy_counts", [True, False])
def test_bits_of_masks(cells: int, numpy_counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not numpy_counts:
        monkeypatch.delattr(np, "bitwise_count", raising=False)  # as in numpy 1
    masks = np.random.default_rng(cells).random((9, cells)) < np.linspace(0, 1, 9)[:, None]
    words = packed(masks)
    assert words.shape == (9, -(-cells // 64)) and words.dtype == np.uint64
    assert set_bits(words).tolist() == row_sums(masks).tolist() == masks.sum(1).tolist()
    assert set_bits(words & words[4]).tolist() == (masks & masks[4]).sum(1).tolist()
    assert column_bits(words.T).tolist() == masks.sum(1).tolist() and column_bits(words.T).dtype == np.int32
    nothing = packed(masks[:0])
    assert column_bits(nothing.T).shape == set_bits(nothing).shape == row_sums(masks[:0]).shape == (0,)


def plain_choice(weights: Any, scores: Any, features: Any, limits: tuple[float, float, float, int]) -> Any:
    """Weights, scores and ranks by the description: whole arrays, one mask after the other."""
    score_threshold, stability_threshold, iou, limit = limits
    c, h, w = features.shape
    coarse = weights @ features.reshape(c, h // POOL, POOL, w // POOL, POOL).mean((2, 4)).reshape(c, -1)
    stability = (coarse > 1).sum(1) / np.maximum((coarse > -1).sum(1), 1)
    rank = scores * stability**2
    order = [k for k in np.argsort(-rank, kind="stable") if stability[k] >= STABLE * stability_threshold]
    order = [k for k in order if scores[k] >= score_threshold and rank[k] > 0]
    kept, voted = plain(coarse[order] > 0, MERGE * iou, VOTE_IOU, limit)
    voters = [[order[j] for j in np.flatnonzero(np.array(voted) == place)] for place in range(len(kept))]
    best = [order[k] for k in kept]
    lowered = rank[best] * plain_novelty(coarse[best] > 0)
    places = np.argsort(-lowered, kind="stable")
    merged = np.array([np.average(weights[v], 0, rank[v]) for v in voters])
    return merged[places], scores[best][places], lowered[places]


@pytest.mark.parametrize("seed, size, limit", [(0, (32, 48), 400), (1, (32, 48), 20), (2, (36, 44), 400)])
def test_the_choice_equals_its_description(seed: int, size: tuple[int, int], limit: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(40, 6)).repeat(10, 0) + 0.2 * rng.normal(size=(400, 6))
    # one candidate more than full blocks have, and coarse features that are not all alike
    weights = np.concatenate([weights, weights])[: BLOCK + 1].astype(np.float32)
    features = rng.normal(size=(6, size[0] // POOL, size[1] // POOL)).astype(np.float32)
    features = 3 * features.repeat(POOL, 1).repeat(POOL, 2) + rng.normal(size=(6, *size)).astype(np.float32)
    scores = rng.random(len(weights), dtype=np.float32)
    chosen, *got = choose(weights, scores, features, 0.1, 0.3, 0.7, limit)
    expected, *numbers = plain_choice(weights, scores, features, (0.1, 0.3, 0.7, limit))
    assert len(got[1]) > 15
    np.testing.assert_allclose(got, numbers, rtol=1e-5)
    np.testing.assert_allclose(chosen, expected, rtol=1e-3, atol=1e-4)


def test_coarse_features_are_means() -> None:
    features = np.random.default_rng(0).random((3, 2 * POOL, 3 * POOL), dtype=np.float32)
    cells = pooled(features).reshape(3, 2, 3)
    assert cells[1, 1, 2] == pytest.approx(features[1, POOL:, 2 * POOL :].mean(), rel=1e-5)
    assert cells[2, 0, 1] == pytest.approx(features[2, :POOL, POOL : 2 * POOL].mean(), rel=1e-5)


def candidates(
    rows: list[tuple[slice, slice]], edge: float = 0.0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Weights that make just these rectangles of coarse cells, and the features: one a rectangle.

    Logits are 8 inside, `edge` on the first row of cells of the rectangle where that is not 0, -8 outside.
    """
    features = np.full((len(rows), SIZE, SIZE), -8.0, np.float32)
    for feature, (y, x) in zip(features, rows):
        feature[y, x] = 8
        if edge:
            feature[y.start, x] = edge
    return np.eye(len(rows), dtype=np.float32), features.repeat(POOL, 1).repeat(POOL, 2)


APART = [(slice(0, 6), slice(0, 6)), (slice(8, 14), slice(0, 6)), (slice(8, 14), slice(8, 14))]


def test_different_masks_come_back_as_they_were_best_first() -> None:
    weights, features = candidates(APART)
    scores = np.array([0.5, 0.9, 0.7], np.float32)
    chosen, got, rank = choose(weights, scores, features, 0.2, 0.5, 0.7, 10)
    assert got.tolist() == rank.tolist() == pytest.approx([0.9, 0.7, 0.5]) and got.dtype == chosen.dtype == np.float32
    assert chosen.tolist() == weights[[1, 2, 0]].tolist()


def test_like_masks_become_their_mean() -> None:
    # 36 and 30 cells of which 30 are shared: 0.83
    weights, features = candidates([APART[0], (slice(0, 5), slice(0, 6)), APART[2]])
    assert 30 / 36 > max(VOTE_IOU, MERGE * 0.7)
    chosen, scores, _ = choose(weights, np.array([0.8, 0.4, 0.6], np.float32), features, 0.2, 0.5, 0.7, 10)
    assert chosen == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [0, 0, 1]], np.float32), abs=1e-6)
    assert scores.tolist() == pytest.approx([0.8, 0.6])


def test_neighbours_that_are_not_like_it_are_dropped_without_a_vote() -> None:
    # 36 and 18 cells of which 18 are shared
    weights, features = candidates([APART[0], (slice(0, 3), slice(0, 6))])
    assert VOTE_IOU > 0.5
    scores = np.array([0.8, 0.4], np.float32)
    chosen, got, _ = choose(weights, scores, features, 0.2, 0.5, 0.51 / MERGE, 10)
    assert chosen.tolist() == [[1, 0], [0, 1]] and got.tolist() == pytest.approx([0.8, 0.4])
    chosen, got, _ = choose(weights, scores, features, 0.2, 0.5, 0.49 / MERGE, 10)
    assert chosen.tolist() == [[1, 0]] and got.tolist() == pytest.approx([0.8])


def test_a_place_goes_to_another_object_before_one_more_version_of_the_same() -> None:
    # 36 and 18 cells of which 18 are shared
    weights, features = candidates([APART[0], (slice(0, 3), slice(0, 6)), APART[2]])
    scores = np.array([0.8, 0.6, 0.55], np.float32)
    chosen, got, rank = choose(weights, scores, features, 0.2, 0.5, 0.7, 10)
    assert chosen.argmax(1).tolist() == [0, 2, 1] and got.tolist() == pytest.approx([0.8, 0.55, 0.6])
    assert rank.tolist() == pytest.approx([0.8, 0.55, 0.6 * (1 - ALIKE * 0.25)])


def test_unstable_masks_come_later_or_not_at_all() -> None:
    # the first of three rows is inside of the wider threshold only: two thirds of the cells are stable
    _, features = candidates([(slice(0, 3), slice(0, 6))], edge=0.5)
    steady, other = candidates(APART)
    features = np.concatenate([features, other[1:2]])
    scores = np.array([0.8, 0.7], np.float32)
    chosen, got, rank = choose(steady[:2, :2], scores, features, 0.2, 0.5, 0.7, 10)
    assert got.tolist() == pytest.approx([0.7, 0.8]) and rank.tolist() == pytest.approx([0.7, 0.8 * (2 / 3) ** 2])
    assert chosen.argmax(1).tolist() == [1, 0]
    _, got, _ = choose(steady[:2, :2], scores, features, 0.2, 2 / 3 / STABLE + 0.01, 0.7, 10)
    assert got.tolist() == pytest.approx([0.7])


def test_the_threshold_is_of_the_score_alone() -> None:
    steady, features = candidates([(slice(0, 3), slice(0, 6))], edge=0.5)
    for threshold, count in ((0.79, 1), (float(np.float32(0.8)), 1), (0.81, 0)):
        _, got, rank = choose(steady, np.array([0.8], np.float32), features, threshold, 0.0, 0.7, 10)
        assert len(got) == len(rank) == count and (rank < threshold).all()


def test_the_same_input_gives_the_same_and_is_left_as_it_was() -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(600, 12)).astype(np.float32)
    features, scores = rng.normal(size=(12, 32, 48)).astype(np.float32), rng.random(600, dtype=np.float32)
    before = weights.copy(), scores.copy(), features.copy()
    first, second = (choose(weights, scores, features, 0.1, 0.0, 0.3, 50) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert all(np.array_equal(a, b) for a, b in zip(before, (weights, scores, features)))
    assert 1 < len(first[1]) <= 50 and (np.diff(first[2]) <= 0).all() and first[1].min() >= 0.1 and first[1].max() <= 1
    assert (first[2] <= first[1]).all()


@pytest.mark.parametrize("scores, limit", [([], 5), ([0.1, 0.1], 5), ([0.9, 0.9], 0)])
def test_nothing_comes_of_nothing(scores: list[float], limit: int) -> None:
    weights, features = candidates(APART[:2])
    chosen, got, rank = choose(weights[: len(scores)], np.array(scores, np.float32), features, 0.2, 0.5, 0.7, limit)
    assert chosen.shape == (0, 2) and got.shape == rank.shape == (0,)


def test_masks_of_a_single_cell_are_stable_and_compared_like_others() -> None:
    cell = slice(3, 4), slice(5, 6)
    weights, features = candidates([cell, cell, APART[2]])
    chosen, got, rank = choose(weights, np.array([0.6, 0.9, 0.7], np.float32), features, 0.2, 0.9, 0.7, 10)
    assert got.tolist() == rank.tolist() == pytest.approx([0.9, 0.7])
    assert chosen == pytest.approx(np.float32([[0.4, 0.6, 0], [0, 0, 1]]), abs=1e-6)


def test_candidates_without_a_mask_are_left_out() -> None:
    weights, features = candidates(APART[:2])
    chosen, got, _ = choose(-weights * [[0], [1]], np.ones(2, np.float32), -np.abs(features), 0.0, 0.0, 0.7, 5)
    assert len(got) == 1 and chosen.argmin() == 1


FIRST, SHORTER, OTHER = APART[0], (slice(0, 5), slice(0, 6)), APART[2]
IN_FIRST, IN_LAST_ROW, IN_OTHER = (2.5, 2.5), (2.5, 5.5), (10.5, 10.5)
"""xy in coarse cells; the last row of the first rectangle is not in the shorter one."""


def voted(
    rows: list[tuple[slice, slice]], scores: list[float], points: list[tuple[float, float]], labels: list[float],
    edge: float = 0.0,
) -> list[float]:
    """The kernel of the first rectangle after the candidates, of which each makes one of `rows`, have voted."""
    kernels, features = candidates([FIRST, *rows], edge)
    xy = np.array(points, np.float32) / SIZE * 2 - 1
    kernel = kernels[0].copy()
    [found] = with_votes(
        kernel[None], kernels[1:], np.array(scores, np.float32), features, xy[None], np.array(labels, np.float32)[None]
    )
    assert kernel.tolist() == kernels[0].tolist() and found.dtype == np.float32
    result: list[float] = found.tolist()
    return result


def test_a_prompted_mask_is_half_the_mean_of_candidates_by_score_and_overlap() -> None:
    # 36 and 30 cells of which 30 are shared
    found = voted([FIRST, SHORTER, OTHER], [0.6, 0.9, 1.0], [IN_FIRST], [1])
    total = 0.6 + 0.9 * 30 / 36
    assert found == pytest.approx([0.5, 0.5 * 0.6 / total, 0.5 * 0.75 / total, 0])


@pytest.mark.parametrize(
    "points, labels, votes",
    [
        ([IN_FIRST, IN_LAST_ROW], [1, 1], False),
        ([IN_FIRST, IN_LAST_ROW], [1, 0], True),
        ([IN_FIRST, (3.5, 3.5)], [1, 0], False),
        ([IN_FIRST, IN_OTHER], [1, 0], True),
        ([IN_FIRST, IN_LAST_ROW], [1, -1], True),
    ],
    ids=["beside it", "background beside it", "background inside", "background far away", "padding"],
)
def test_candidates_vote_where_they_hold_the_object_and_not_the_background(points, labels, votes: bool) -> None:
    assert voted([SHORTER], [0.9], points, labels) == ([0.5, 0.5] if votes else [1, 0])


def test_candidates_that_mean_something_else_do_not_vote() -> None:
    # 18 of 36 cells, and nothing at all
    assert VOTE_IOU > 0.5
    assert voted([(slice(0, 3), slice(0, 6))], [0.9], [IN_FIRST], [1]) == [1, 0]
    assert voted([SHORTER], [0.0], [IN_FIRST], [1]) == [1, 0]
    assert voted([], [], [IN_FIRST], [1]) == [1]


def test_unstable_candidates_have_less_of_the_vote() -> None:
    # the first of six rows, then the first of five, is inside of the wider threshold only
    found = voted([FIRST, SHORTER], [0.6, 0.9], [IN_FIRST], [1], edge=0.5)
    first, shorter = 0.6 * (5 / 6) ** 2, 0.9 * (4 / 5) ** 2 * 30 / 36
    assert found == pytest.approx([0.5, 0.5 * first / (first + shorter), 0.5 * shorter / (first + shorter)])


def test_many_objects_get_what_each_gets_alone() -> None:
    rng = np.random.default_rng(4)
    weights, features = rng.normal(size=(400, 12)).astype(np.float32), rng.normal(size=(12, 32, 48)).astype(np.float32)
    weights[:, 0], features[0] = rng.uniform(4, 8, 400), cv2.GaussianBlur(rng.normal(size=(32, 48)), (0, 0), 5) * 30
    scores, points = rng.random(400, dtype=np.float32), rng.uniform(-1, 1, (40, 3, 2)).astype(np.float32)
    labels = rng.choice(np.float32([1, 1, 0, -1]), (40, 3))
    kernels = (weights[:40] + rng.normal(size=(40, 12)) * 0.1).astype(np.float32)
    together = with_votes(kernels, weights, scores, features, points, labels)
    alone = [
        with_votes(kernels[k : k + 1], weights, scores, features, points[k : k + 1], labels[k : k + 1])[0]
        for k in range(40)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    moved = np.abs(together - kernels).max(1) > 0
    assert moved.any() and not moved.all()
    nothing = with_votes(kernels[:0], weights, scores, features, points[:0], labels[:0])
    assert nothing.shape == (0, 12)
