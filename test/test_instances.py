"""The result struct: what it refuses, who owns a pixel, what the maps say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glesam_ros import Instances
from glesam_ros.models import Embedding
from glesam_ros.semantic import SemanticMap


def fields(**changes: Any) -> dict[str, Any]:
    """Two 4x4 squares on 8x10 that overlap in 2x2."""
    masks = np.zeros((2, 8, 10), np.bool_)
    masks[0, 1:5, 1:5] = True
    masks[1, 3:7, 3:7] = True
    made = {
        "masks": masks,
        "boxes": np.array([[1, 1, 5, 5], [3, 3, 7, 7]], np.float32),
        "scores": np.array([0.9, 0.8], np.float32),
        "stability": np.array([0.5, 1.0], np.float32),
        "ids": np.array([1, 2], np.int32),
        "degradation": 0.3,
        "enhanced": True,
    }
    return {**made, **changes}


def test_length_size_areas() -> None:
    found = Instances(**fields())
    assert (len(found), found.size) == (2, (8, 10))
    assert found.areas.tolist() == [16, 16]
    assert found.areas.dtype == np.int64


def test_what_a_notebook_shows_is_one_line() -> None:
    assert repr(Instances(**fields())) == "<2 instances, 10x8 px, degradation 0.30, enhanced>"
    assert repr(Instances.empty((8, 10))) == "<0 instances, 10x8 px, degradation 0.00, not enhanced>"
    embedding = Embedding(np.zeros((1, 9, 2, 3)), (8, 10), 0.5)
    assert repr(embedding) == "<embedding, 10x8 px, degradation 0.50, not enhanced>"
    labels = np.zeros((8, 10), np.uint8)
    seen = SemanticMap(labels, labels.astype(np.float32), ("road",), np.zeros((1, 3), np.uint8))
    assert repr(seen) == "<class map, 10x8 px, 1 classes>"


def test_empty() -> None:
    none = Instances.empty((8, 10), 0.5, True)
    assert (len(none), none.size, none.degradation, none.enhanced) == (0, (8, 10), 0.5, True)
    assert none.areas.shape == (0,) and none.areas.dtype == np.int64
    assert none.label_map().shape == (8, 10) and not none.label_map().any()
    assert none.confidence_map().dtype == np.float32 and not none.confidence_map().any()
    plain = Instances.empty((8, 10))
    assert (plain.degradation, plain.enhanced) == (0.0, False)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "masks of numbers": ({"masks": np.zeros((2, 8, 10), np.uint8)}, r"masks: expected \(K, H, W\) bool, got .*uint8"),
    "one mask": ({"masks": np.zeros((8, 10), np.bool_)}, r"got \(8, 10\)"),
    "too few boxes": ({"boxes": np.zeros((1, 4), np.float32)}, r"boxes: expected \(2, 4\) float32 for 2 masks"),
    "double boxes": ({"boxes": np.zeros((2, 4))}, "got .*float64"),
    "nan box": ({"boxes": np.full((2, 4), np.nan, np.float32)}, "boxes: expected finite"),
    "scores column": ({"scores": np.zeros((2, 1), np.float32)}, r"scores: expected \(2,\)"),
    "score above 1": ({"scores": np.array([1.5, 0], np.float32)}, r"scores: expected 0..1, got 0 .. 1.5"),
    "score nan": ({"scores": np.array([np.nan, 0], np.float32)}, "scores: expected 0..1"),
    "stability below 0": ({"stability": np.array([-0.1, 0], np.float32)}, "stability: expected 0..1, got -0.1"),
    "id twice": ({"ids": np.array([3, 3], np.int32)}, "ids: expected unique values"),
    "id 0 is background": ({"ids": np.array([0, 1], np.int32)}, r"1\.\.65534"),
    "id 65535 is unlabeled": ({"ids": np.array([1, 65535], np.int32)}, r"1\.\.65534"),
    "degradation": ({"degradation": 1.2}, "degradation: expected 0..1, got 1.2"),
    "degradation nan": ({"degradation": float("nan")}, "degradation: expected 0..1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    changes, words = REFUSALS[name]
    with pytest.raises(ValueError, match=words):
        Instances(**fields(**changes))


@pytest.mark.parametrize(
    ("scores", "ids", "winner"),
    [
        ((0.9, 0.8), (1, 2), 1),
        ((0.8, 0.9), (1, 2), 2),
        ((0.7, 0.7), (1, 2), 1),  # equal scores
        ((0.7, 0.7), (2, 1), 2),
        ((0.7, 0.7), (65534, 300), 65534),
    ],
)
def test_overlap_of_prompted_objects_of_one_size_belongs_to_the_higher_score_then_the_first(
    scores: tuple[float, float], ids: tuple[int, int], winner: int
) -> None:
    found = Instances(**fields(scores=np.array(scores, np.float32), ids=np.array(ids, np.int32), prompted=True))
    labels = found.label_map()
    assert labels.dtype == np.uint16
    assert (labels[3:5, 3:5] == winner).all()
    assert (labels[1:3, 1:5] == ids[0]).all() and (labels[5:7, 3:7] == ids[1]).all()
    assert ((labels > 0) == found.masks.any(0)).all()


def test_boxes_may_have_fractions_and_leave_the_image() -> None:
    found = Instances(**fields(boxes=np.array([[1.5, 1.5, 4.5, 4.5], [-9, 2.9, 70, 7.1]], np.float32)))
    np.testing.assert_array_equal(found.label_map(), Instances(**fields()).label_map())
    assert found.areas.tolist() == [16, 16]


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((1, 2, 5, 6), (2, 6), (1, 5)),
        ((1.5, 2.5, 4.5, 5.5), (2, 6), (1, 5)),
        ((-2, -3, 4, 5), (0, 5), (0, 4)),
        ((3, 4, 70, 80), (4, 8), (3, 10)),
        ((0, 0, 0, 0), (0, 0), (0, 0)),
    ],
)
def test_a_window_is_the_whole_pixels_of_a_box_within_the_image(box: Any, rows: Any, columns: Any) -> None:
    found = Instances(**fields(boxes=np.array([[1, 1, 5, 5], box], np.float32)))
    assert found.window(1) == (slice(*rows), slice(*columns))


@pytest.mark.parametrize(("count", "share"), [(7, 0.3), (255, 0.02), (256, 0.02), (700, 0.01)])
@pytest.mark.parametrize("prompted", [False, True])
def test_random_label_maps_against_the_definition(prompted: bool, count: int, share: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20 if count < 10 else 2):
        height, width = 9, 11
        masks = rng.random((count, height, width)) < share
        scores = (rng.integers(0, 4, count) / 4).astype(np.float32)
        ids = (1 + rng.permutation(count)).astype(np.int32)
        boxes = np.tile(np.array([0, 0, width, height], np.float32), (count, 1))
        labels = Instances(masks, boxes, scores, scores, ids, 0.0, False, prompted).label_map()
        sizes = masks.sum((1, 2))
        for y in range(height):
            for x in range(width):
                owners = [(sizes[k], -scores[k], k) if prompted else (k,) for k in np.flatnonzero(masks[:, y, x])]
                assert labels[y, x] == (ids[min(owners)[-1]] if owners else 0)


def test_confidence_is_score_times_stability_of_the_owner() -> None:
    found = Instances(**fields())
    confidence = found.confidence_map()
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence[3:5, 3:5], 0.45)
    np.testing.assert_allclose(confidence[5:7, 3:7], 0.8)
    assert (confidence[found.label_map() == 0] == 0).all()
    np.testing.assert_array_equal(found.confidence_map(found.label_map()), confidence)


def test_select_keeps_ids_and_facts() -> None:
    found = Instances(**fields())
    for keep in (np.array([False, True]), [1], np.array([1])):
        chosen = found.select(keep)
        assert chosen.ids.tolist() == [2]
        assert (chosen.degradation, chosen.enhanced) == (0.3, True)
        np.testing.assert_array_equal(chosen.masks[0], found.masks[1])
        assert set(np.unique(chosen.label_map())) == {0, 2}
    assert found.select([1, 0]).ids.tolist() == [2, 1]
    assert len(found.select(np.zeros(2, np.bool_))) == 0


def test_fields_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError):
        Instances(**fields()).degradation = 0.9  # type: ignore[misc]


@pytest.mark.parametrize("count", [3, 255, 256, 300])
def test_confidence_is_right_for_few_and_for_more_than_255_instances(count: int) -> None:
    # one row of pixels an instance
    masks = np.eye(count, dtype=bool)[:, :, None].repeat(4, 2)
    rows = np.arange(count, dtype=np.float32)
    boxes = np.stack([0 * rows, rows, 0 * rows + 4, rows + 1], 1).astype(np.float32)
    scores = np.linspace(0.2, 0.9, count, dtype=np.float32)
    ids = np.arange(1, count + 1, dtype=np.int32)
    found = Instances(masks, boxes, scores, np.full(count, 0.5, np.float32), ids, 0.0, False)
    np.testing.assert_allclose(found.confidence_map(), (scores * 0.5)[:, None].repeat(4, 1), rtol=1e-6)
