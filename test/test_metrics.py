"""Metrics by known answers."""

from __future__ import annotations

import numpy as np
import pytest

from glesam_ros.evaluation.metrics import (
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


def test_pairwise_counts_windows_as_whole_images() -> None:
    rng = np.random.default_rng(2)
    masks = np.stack([box(x, y, x + w, y + h, 40) for x, y, w, h in rng.integers(1, 20, (12, 4))])
    masks &= rng.random(masks.shape) > 0.3
    masks[3] = False
    a, b = masks[:7], masks[2:]
    whole = [[(p & t).sum() / max(1, (p | t).sum()) if (p | t).any() else 1.0 for t in b] for p in a]
    np.testing.assert_allclose(pairwise_iou(a, b), whole)
    assert pairwise_iou(a[:0], b).shape == (0, 10)


def test_boundary_is_the_ring_inside_the_mask() -> None:
    # 2 % of the diagonal of 20x20 is 0.57, so one pixel; 10 % is 2.8, so three
    square = box(4, 4, 14, 14, 20)
    assert boundary(square).sum() == 10 * 10 - 8 * 8
    assert boundary(square, 0.1).sum() == 10 * 10 - 4 * 4
    assert boundary(box(0, 0, 20, 20, 20)).sum() == 20 * 20 - 18 * 18  # the image ends, so does the mask
    assert not boundary(box(0, 0, 0, 0, 20)).any()


def test_boundary_by_the_definition() -> None:
    """A pixel of the mask whose square neighbourhood leaves the mask or the image."""
    rng = np.random.default_rng(5)
    masks = np.stack([box(x, y, x + w, y + h, 50) for x, y, w, h in rng.integers(0, 30, (6, 4))])
    masks[:3] |= masks[3:]
    for share, width in ((0.02, 1), (0.05, 4)):
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(masks, ((0, 0), (width, width), (width, width))), (2 * width + 1, 2 * width + 1), (1, 2)
        )
        np.testing.assert_array_equal(boundary(masks, share), masks & ~windows.all((-1, -2)))


def test_boundary_iou_sees_the_edge_where_iou_sees_the_area() -> None:
    square, smaller = box(4, 4, 14, 14, 20), box(5, 5, 13, 13, 20)
    assert iou(square, smaller) == pytest.approx(0.64)
    assert boundary_iou(square, smaller) == 0  # their rings of one pixel do not touch
    assert boundary_iou(square, square) == 1
    assert boundary_iou(square, box(4, 4, 14, 14, 20)[::-1]) == pytest.approx(16 / 56)


def test_boxes_are_tight() -> None:
    masks = np.stack([box(2, 3, 7, 5), box(0, 0, 10, 10), box(9, 9, 10, 10)])
    np.testing.assert_array_equal(mask_boxes(masks), [[2, 3, 7, 5], [0, 0, 10, 10], [9, 9, 10, 10]])
    assert mask_boxes(masks).dtype == np.float32


def test_best_iou_takes_the_best_mask_for_each_region() -> None:
    predicted = np.stack([LEFT, box(6, 6, 8, 8)])
    truth = np.stack([RIGHT, box(6, 6, 8, 9), box(0, 9, 1, 10)])
    np.testing.assert_allclose(best_iou(predicted, truth), [1 / 3, 4 / 6, 0])
    assert mean_best_iou(predicted, truth) == pytest.approx(1 / 3)
    assert mean_best_iou(np.zeros((0, 10, 10), np.bool_), truth) == 0


def test_average_recall_by_hand() -> None:
    truth = np.stack([box(0, 0, 5, 2), box(0, 5, 5, 7)])
    predicted = np.stack([box(0, 0, 5, 2), box(0, 5, 4, 7)])  # IoU 1.0 and 0.8
    overlap = pairwise_iou(predicted, truth)
    # thresholds .5 .. .8 find both (7 of 10), the rest one
    assert region_recall(overlap, 10).mean() == pytest.approx((7 * 1.0 + 3 * 0.5) / 10)
    assert region_recall(overlap, 1).mean() == pytest.approx(0.5)
    assert region_recall(pairwise_iou(np.zeros((0, 10, 10), np.bool_), truth), 10).mean() == 0


def test_one_mask_finds_one_region_only() -> None:
    truth = np.stack([box(0, 0, 5, 2), box(0, 0, 5, 2)])
    assert region_recall(pairwise_iou(truth[:1], truth), 10).mean() == pytest.approx(0.5)
    assert region_recall(pairwise_iou(truth, truth), 10).mean() == 1


def test_recall_by_region() -> None:
    overlap = np.array([[0.95, 0.0], [0.9, 0.62]])
    # the first mask takes region one at every threshold, the second finds region two up to 0.6
    np.testing.assert_allclose(region_recall(overlap, 10), [1.0, 0.3])
    np.testing.assert_allclose(region_recall(overlap, 1), [1.0, 0.0])
    np.testing.assert_allclose(region_recall(np.zeros((0, 2)), 10), [0.0, 0.0])


def test_mean_recall_by_region_is_that_of_coco() -> None:
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
        assert region_recall(pairwise_iou(predicted, truth), k).mean() == pytest.approx(expected)


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


def test_bootstrap_draws_whole_images() -> None:
    values, images = [0.0] * 50 + [1.0] * 50, [3] * 50 + [8] * 50
    assert bootstrap_interval(values, 0, groups=images) == (0.0, 1.0)  # two images: both alike in half of the draws
    low, high = bootstrap_interval(values, 0)
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65
    assert bootstrap_interval(values, 0, groups=range(100)) == (low, high)


def test_images_with_more_objects_weigh_more() -> None:
    # 9 objects of 1 in one image, 1 object of 0 in the other: drawn means are 0, 0.9 and 1
    low, high = bootstrap_interval([1.0] * 9 + [0.0], 0, confidence=0.4, groups=[0] * 9 + [1])
    assert (low, high) == pytest.approx((0.9, 0.9))


def test_mean_gains_known_answers_also_where_the_regions_differ() -> None:
    images = np.array([0, 0, 1, 2])
    before = np.array([1.0, 2.0, 3.0, 4.0])
    difference, share = mean_gains(before + 0.5, before, images, images, 0)
    assert difference == pytest.approx((0.5, 0.5, 0.5))
    assert share[0] == pytest.approx(0.2) and share[1] < 0.2 < share[2]
    paired = bootstrap_interval(before**2 - before, 3, groups=images)
    assert mean_gains(before**2, before, images, images, 3)[0][1:] == pytest.approx(paired)
    # one image has another annotator: three regions after, two before
    difference, share = mean_gains([4.0, 4.0, 4.0], [2.0, 2.0], [0, 1, 1], [0, 1], 0)
    assert difference == pytest.approx((2.0, 2.0, 2.0)) and share == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="same images"):
        mean_gains([1.0], [1.0], [0], [1], 0)


def test_relative_gains_known_answers() -> None:
    before, images = np.random.default_rng(0).random(40), np.arange(40)
    assert mean_gains(1.1 * before, before, images, images, 0)[1] == pytest.approx((0.1, 0.1, 0.1))
    gain, low, high = mean_gains([2.0, 4.0, 1.0], [1.0, 2.0, 3.0], images[:3], images[:3], 0)[1]
    assert gain == pytest.approx(7 / 6 - 1)
    assert low == pytest.approx(1 / 3 - 1) and high == pytest.approx(1.0)  # all draws from the worst, the best two
    assert np.isnan(mean_gains([1.0], [0.0], [0], [0], 0)[1]).all()


def test_ranks_share_ties() -> None:
    assert mean_ranks([10, 30, 10, 20]).tolist() == [0.5, 3.0, 0.5, 2.0]


def test_spearman_known_answers() -> None:
    x, y = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(x, y) == pytest.approx(1 - 6 * 194 / (10 * 99))  # the formula without ties
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)  # with a tie
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: iou(LEFT.astype(float), LEFT), TypeError, "expected dtype bool, got float64"),
        (lambda: iou(LEFT, LEFT[:5]), ValueError, r"got \(10, 10\) and \(5, 10\)"),
        (lambda: pairwise_iou(LEFT, LEFT), ValueError, r"expected \(K, H, W\)"),
        (lambda: pairwise_iou(LEFT[None], LEFT[None, :5]), ValueError, r"of one image, got \(1, 10, 10\) and \(1, 5"),
        (lambda: mean_best_iou(LEFT[None], EMPTY[None][:0]), ValueError, "expected at least one value"),
        (lambda: region_recall(np.ones((1, 1)), 0), ValueError, "k: expected at least 1, got 0"),
        (lambda: sample_points(EMPTY), ValueError, "empty mask"),
        (lambda: sample_points(LEFT[None]), ValueError, r"expected shape \(H, W\), got \(1, 10, 10\)"),
        (lambda: sample_points(LEFT, 0), ValueError, "at least 1 point, got 0"),
        (lambda: bootstrap_interval([], 0), ValueError, "at least one value"),
        (lambda: bootstrap_interval([1.0, np.nan], 0), ValueError, "finite"),
        (lambda: bootstrap_interval([1.0], 0, confidence=95), ValueError, "got 95"),
        (lambda: bootstrap_interval([1.0, 2.0], 0, groups=[1]), ValueError, "one for each of the 2 values"),
        (lambda: mean_gains([1.0], [1.0, 2.0], [0], [0, 1], 0), ValueError, "same images"),
        (lambda: boundary(LEFT, 0), ValueError, "share: expected above 0, got 0"),
        (lambda: boundary(LEFT[0]), ValueError, r"expected shape \(\.\.\., H, W\)"),
        (lambda: mask_boxes(LEFT), ValueError, r"expected shape \(K, H, W\)"),
        (lambda: mask_boxes(np.stack([LEFT, EMPTY])), ValueError, "an empty mask"),
        (lambda: region_recall(np.zeros(3), 10), ValueError, r"expected shape \(N, M\)"),
    ],
)
def test_refusals(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
