"""Metrics by known answers."""

from __future__ import annotations

import numpy as np
import pytest

from glesam_ros.evaluation import (
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


def box(x1: int, y1: int, x2: int, y2: int, size: int = 10) -> np.ndarray:
    mask = np.zeros((size, size), np.bool_)
    mask[y1:y2, x1:x2] = True
    return mask


EMPTY = box(0, 0, 0, 0)
# 20 pixels each, 10 shared
LEFT, RIGHT = box(0, 0, 4, 5), box(2, 0, 6, 5)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected_iou", "expected_dice", "expected_accuracy"),
    [
        (LEFT, LEFT, 1.0, 1.0, 1.0),
        (LEFT, RIGHT, 10 / 30, 20 / 40, 0.8),
        (LEFT, box(6, 6, 8, 8), 0.0, 0.0, 0.76),
        (EMPTY, LEFT, 0.0, 0.0, 0.8),
        (LEFT, EMPTY, 0.0, 0.0, 0.8),
        (EMPTY, EMPTY, 1.0, 1.0, 1.0),
    ],
    ids=["same", "half", "apart", "missed", "invented", "both empty"],
)
def test_pairs(predicted, truth, expected_iou: float, expected_dice: float, expected_accuracy: float) -> None:
    assert iou(predicted, truth) == pytest.approx(expected_iou)
    assert dice(predicted, truth) == pytest.approx(expected_dice)
    assert pixel_accuracy(predicted, truth) == pytest.approx(expected_accuracy)


def test_dice_and_iou_are_tied_and_batches_equal_singles() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 20, 30)) > 0.4, rng.random((5, 20, 30)) > 0.6
    np.testing.assert_allclose(dice(a, b), 2 * iou(a, b) / (1 + iou(a, b)))
    np.testing.assert_allclose(iou(a, b), [float(iou(p, t)) for p, t in zip(a, b)])
    np.testing.assert_allclose(iou(a, b), np.diagonal(pairwise_iou(a, b)))
    np.testing.assert_allclose(iou(a, b), iou(b, a))


def test_best_iou_takes_the_best_mask_for_each_region() -> None:
    predicted = np.stack([LEFT, box(6, 6, 8, 8)])
    truth = np.stack([RIGHT, box(6, 6, 8, 9), box(0, 9, 1, 10)])
    np.testing.assert_allclose(best_iou(predicted, truth), [1 / 3, 4 / 6, 0])
    assert mean_best_iou(predicted, truth) == pytest.approx(1 / 3)
    assert mean_best_iou(np.zeros((0, 10, 10), np.bool_), truth) == 0


def test_average_recall_by_hand() -> None:
    truth = np.stack([box(0, 0, 5, 2), box(0, 5, 5, 7)])
    predicted = np.stack([box(0, 0, 5, 2), box(0, 5, 4, 7)])  # IoU 1.0 and 0.8
    # thresholds .5 .. .8 find both (7 of 10), the rest one
    assert average_recall(predicted, truth, 10) == pytest.approx((7 * 1.0 + 3 * 0.5) / 10)
    assert average_recall(predicted, truth, 1) == pytest.approx(0.5)
    assert average_recall(np.zeros((0, 10, 10), np.bool_), truth, 10) == 0


def test_one_mask_finds_one_region_only() -> None:
    truth = np.stack([box(0, 0, 5, 2), box(0, 0, 5, 2)])
    assert average_recall(truth[:1], truth, 10) == pytest.approx(0.5)
    assert average_recall(truth, truth, 10) == 1


def test_average_recall_equals_coco() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(4)
    truth = np.stack([box(x, y, x + 12, y + 12, 64) for x, y in rng.integers(0, 50, (9, 2))])
    predicted = np.stack([np.roll(truth[i % 9], rng.integers(-3, 4, 2), (0, 1)) for i in range(14)])
    encode = lambda mask: coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))  # noqa: E731
    common = {"image_id": 1, "category_id": 1}
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "height": 64, "width": 64}], "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {**common, "id": i + 1, "segmentation": encode(m), "area": int(m.sum()), "iscrowd": 0, "bbox": [0, 0, 1, 1]}
            for i, m in enumerate(truth)
        ],
    }
    coco.createIndex()
    found = coco.loadRes([{**common, "segmentation": encode(m), "score": 1 - i / 20} for i, m in enumerate(predicted)])
    evaluation = COCOeval(coco, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    for column, k in enumerate((1, 10, 100)):
        expected = evaluation.eval["recall"][:, 0, 0, column].mean()
        assert average_recall(predicted, truth, k) == pytest.approx(expected)


def test_points_are_distinct_inside_and_repeat_by_seed() -> None:
    mask = box(3, 5, 6, 7)
    points = sample_points(mask, 6, seed=1)
    assert points.shape == (6, 2) and points.dtype == np.float32
    assert {tuple(p) for p in points.tolist()} == {(x, y) for x in (3, 4, 5) for y in (5, 6)}
    np.testing.assert_array_equal(points, sample_points(mask, 6, seed=1))
    assert any(not np.array_equal(sample_points(mask, 3, 0), sample_points(mask, 3, s)) for s in range(1, 5))


def test_points_repeat_where_the_mask_is_too_small() -> None:
    np.testing.assert_array_equal(sample_points(box(2, 8, 3, 9), 3), np.array([[2, 8]] * 3, np.float32))


def test_points_cover_the_mask_evenly() -> None:
    drawn = np.concatenate([sample_points(box(0, 0, 10, 10), 3, seed) for seed in range(1000)])
    assert drawn.mean(0) == pytest.approx([4.5, 4.5], abs=0.25)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 60), trial, resamples=400)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_known_answers() -> None:
    assert bootstrap_interval([0.7] * 5, 0) == pytest.approx((0.7, 0.7))
    values = np.random.default_rng(1).normal(0, 1, 400)
    low, high = bootstrap_interval(values, 3)
    half = 1.96 * values.std() / 20  # the normal interval
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert (low, high) == bootstrap_interval(values, 3)
    wider = bootstrap_interval(values, 3, confidence=0.99)
    assert wider[0] < low < high < wider[1]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: iou(LEFT.astype(float), LEFT), TypeError, "expected dtype bool, got float64"),
        (lambda: iou(LEFT, LEFT[:5]), ValueError, r"got \(10, 10\) and \(5, 10\)"),
        (lambda: pairwise_iou(LEFT, LEFT), ValueError, r"expected \(K, H, W\)"),
        (lambda: mean_best_iou(LEFT[None], EMPTY[None][:0]), ValueError, "expected at least one value"),
        (lambda: average_recall(LEFT[None], EMPTY[None][:0], 5), ValueError, "at least one region"),
        (lambda: average_recall(LEFT[None], LEFT[None], 0), ValueError, "k: expected at least 1, got 0"),
        (lambda: sample_points(EMPTY), ValueError, "empty mask"),
        (lambda: sample_points(LEFT, 0), ValueError, "at least 1 point, got 0"),
        (lambda: bootstrap_interval([], 0), ValueError, "at least one value"),
        (lambda: bootstrap_interval([1.0, np.nan], 0), ValueError, "finite"),
        (lambda: bootstrap_interval([1.0], 0, confidence=95), ValueError, "got 95"),
    ],
)
def test_refusals(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
