"""Semantic maps, whatever the model: known answers, softmax, classes of instances, faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import glesam_ros
from glesam_ros import SemanticMap, load_restorer, load_semantic
from glesam_ros.instances import Instances
from glesam_ros.models import (
    OutOfMemory,
    register_restorer,
    register_semantic,
    restorer_names,
    semantic_names,
)
from glesam_ros.semantic import NO_CLASS, Restorer, SemanticSegmenter, class_of_instances, labels_of_logits

PALETTE = np.array([(128, 64, 128), (70, 130, 180), (220, 20, 60)], np.uint8)
CLASSES = ("road", "sky", "person")


class Given:
    """Says what it is given, and fails as often as it is told."""

    name, device = "given", "cpu"
    classes: tuple[str, ...] = CLASSES
    palette = PALETTE

    def __init__(self, logits: Any = None, lacks: int = 0) -> None:
        self.given = np.zeros((3, 2, 2), np.float32) if logits is None else logits
        self.lacks = lacks
        self.calls: list[str] = []

    def logits(self, image: Any) -> Any:
        self._call("logits")
        return self.given

    def restore(self, image: Any, classes: Sequence[str] = ()) -> Any:
        self._call("restore " + " ".join(classes))
        return 255 - image

    def free(self) -> None:
        self.calls.append("free")

    def close(self) -> None:
        self.calls.append("close")

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.lacks:
            self.lacks -= 1
            raise OutOfMemory("lack")


def picture(height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bilinear(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolation between centres of cells, held beyond the outermost; by another way than OpenCV's."""
    rows, cols = ((np.arange(to) + 0.5) * have / to - 0.5 for to, have in zip(size, plane.shape))
    across = np.array([np.interp(cols, np.arange(plane.shape[1]), row) for row in plane])
    return np.array([np.interp(rows, np.arange(plane.shape[0]), column) for column in across.T]).T


# --- SemanticMap ---


def semantic_map(labels: Any = ((0, 1, 2), (2, 2, 0)), **changed: Any) -> SemanticMap:
    """Lists become uint8."""
    array = labels if isinstance(labels, np.ndarray) else np.array(labels, np.uint8)
    fields: dict[str, Any] = {"labels": array, "classes": CLASSES, "palette": PALETTE}
    fields["confidence"] = np.full(fields["labels"].shape, 0.5, np.float32)
    return SemanticMap(**{**fields, **changed})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_each_pixel_has_the_colour_of_its_class(dtype: Any) -> None:
    found = semantic_map(np.array([[0, 1, 2], [2, 2, 0]], dtype))
    colours = found.colours()
    assert colours.dtype == np.uint8
    assert colours.tolist() == PALETTE[np.array([[0, 1, 2], [2, 2, 0]])].tolist()
    assert found.size == (2, 3)


def test_more_than_256_classes() -> None:
    many = tuple(f"class {k}" for k in range(300))
    palette = np.random.default_rng(1).integers(0, 256, (300, 3), dtype=np.uint8)
    logits = np.zeros((300, 1, 2), np.float32)
    logits[299, 0, 0] = logits[255, 0, 1] = 9
    labels, confidence = labels_of_logits(logits, (1, 2), 300)
    assert labels.dtype == np.uint16 and labels.tolist() == [[299, 255]]
    found = SemanticMap(labels, confidence, many, palette)
    assert found.colours().tolist() == [[palette[299].tolist(), palette[255].tolist()]]


@pytest.mark.parametrize(("count", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_labels_are_as_narrow_as_the_last_class_allows(count: int, dtype: Any) -> None:
    logits = np.zeros((count, 1, 1), np.float32)
    logits[-1] = 1
    labels, _ = labels_of_logits(logits, (2, 2), count)
    assert labels.dtype == dtype and (labels == count - 1).all()


def test_main_classes_are_the_largest_without_specks() -> None:
    labels = np.zeros((10, 100), np.uint8)
    labels[:6] = 2
    labels[9, :9] = 1  # 0.9 %
    assert semantic_map(labels).main_classes() == ("person", "road")
    labels[9, :10] = 1
    assert semantic_map(labels).main_classes() == ("person", "road", "sky")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": np.zeros((2, 3), np.int64)}, r"labels: expected \(H, W\) uint8 or uint16, got \(2, 3\) int64"),
        ({"labels": np.zeros((2, 3, 1), np.uint8)}, r"labels: expected \(H, W\)"),
        ({"labels": np.full((2, 3), 3, np.uint8)}, r"labels: expected 0..2 for 3 classes, got 3"),
        ({"confidence": np.zeros((3, 2), np.float32)}, r"confidence: expected \(2, 3\) float32, got \(3, 2\)"),
        ({"confidence": np.zeros((2, 3))}, "confidence: expected .* float32, got .* float64"),
        ({"confidence": np.full((2, 3), 1.01, np.float32)}, "confidence: expected 0..1, got 1.01 .. 1.01"),
        ({"confidence": np.full((2, 3), np.nan, np.float32)}, "confidence: expected 0..1, got nan"),
        ({"palette": PALETTE[:2]}, r"palette: expected \(3, 3\) uint8 RGB.*got \(2, 3\) uint8"),
        ({"palette": PALETTE.astype(float)}, r"palette: expected \(3, 3\) uint8 RGB.*got \(3, 3\) float64"),
        ({"palette": PALETTE.tolist()}, "palette: expected .*got list"),
        ({"classes": ("road", "sky")}, r"palette: expected \(2, 3\) uint8 RGB.*got \(3, 3\)"),
        ({"classes": ("road", "sky", "road")}, "classes: expected each name once, got road again"),
        ({"classes": ("road", "sky", "")}, "classes: expected names, none empty"),
        ({"classes": "abc"}, "classes: expected names"),
        ({"classes": ()}, "classes: expected 1..65535 names, got 0"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        semantic_map(**changed)


# --- labels and confidence of logits ---


@pytest.mark.parametrize("size", [(480, 640), (37, 53), (16, 20), (3, 5), (1, 1)])
def test_labels_and_softmax_of_interpolated_logits(size: tuple[int, int]) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (5, 16, 20)).astype(np.float32)
    before = logits.copy()
    labels, confidence = labels_of_logits(logits, size, 5)
    full = np.array([bilinear(plane.astype(np.float64), size) for plane in logits])
    softmax = np.exp(full - full.max(0)) / np.exp(full - full.max(0)).sum(0)
    ordered = np.sort(full, 0)
    clear = ordered[-1] - ordered[-2] > 1e-2  # OpenCV's own weights differ in the fifth digit
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], full.argmax(0)[clear])
    np.testing.assert_allclose(confidence, softmax.max(0), atol=1e-3)
    assert labels.shape == confidence.shape == size and labels.dtype == np.uint8 and confidence.dtype == np.float32
    np.testing.assert_array_equal(logits, before)


def test_known_confidences() -> None:
    logits = np.log(np.array([[[0.7, 0.1]], [[0.2, 0.1]], [[0.1, 0.8]]], np.float32))
    labels, confidence = labels_of_logits(logits, (1, 2), 3)
    assert labels.tolist() == [[0, 2]]
    np.testing.assert_allclose(confidence, [[0.7, 0.8]], atol=1e-6)
    # the softmax knows differences only
    _, shifted = labels_of_logits(logits + 50, (1, 2), 3)
    np.testing.assert_allclose(shifted, confidence, atol=1e-4)


def test_equal_logits_are_the_first_class_with_an_equal_share() -> None:
    labels, confidence = labels_of_logits(np.full((4, 3, 3), -7, np.float32), (5, 5), 4)
    assert (labels == 0).all() and (confidence == 0.25).all()


def test_far_apart_logits_neither_overflow_nor_vanish() -> None:
    logits = np.zeros((2, 1, 2), np.float32)
    logits[0], logits[1] = (1e6, -1e6), (-1e6, 1e6)
    labels, confidence = labels_of_logits(logits, (1, 8), 2)
    assert labels[0].tolist() == [0] * 4 + [1] * 4
    assert (confidence == 1).all()


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (np.zeros((2, 4, 4), np.float32), r"logits: expected \(3, h, w\) for 3 classes, got \(2, 4, 4\)"),
        (np.zeros((1, 3, 4, 4), np.float32), r"logits: expected \(3, h, w\)"),
        (np.zeros((3, 0, 4), np.float32), r"logits: expected \(3, h, w\)"),
        (np.full((3, 4, 4), np.nan, np.float32), "logits: expected finite numbers, got NaN or infinity; try precision"),
        (np.full((3, 4, 4), -np.inf, np.float32), "logits: expected finite numbers"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SemanticSegmenter(Given(logits)).segment(picture())


# --- segmenter and restorer ---


def test_a_segmenter_gives_a_map_of_the_size_of_the_picture() -> None:
    logits = np.zeros((3, 1, 2), np.float32)
    logits[1, 0, 0] = logits[2, 0, 1] = 4
    with SemanticSegmenter(Given(logits)) as segmenter:
        found = segmenter.segment(picture(4, 6))
    assert found.labels.tolist() == [[1, 1, 1, 2, 2, 2]] * 4
    assert found.classes == segmenter.classes == CLASSES and found.palette is segmenter.palette
    assert (segmenter.name, segmenter.device) == ("given", "cpu")
    assert segmenter.model.calls == ["logits", "close"]


def test_classes_and_palette_of_a_model_must_fit() -> None:
    model = Given()
    model.classes = ("road", "sky")
    with pytest.raises(ValueError, match=r"palette: expected \(2, 3\) uint8 RGB.*each class, got \(3, 3\) uint8"):
        SemanticSegmenter(model)


@pytest.mark.parametrize("image", [np.zeros((4, 5), np.uint8), np.zeros((0, 5, 3), np.uint8), [[1]], picture() / 255])
def test_pictures_are_checked(image: Any) -> None:
    for call in (SemanticSegmenter(Given()).segment, Restorer(Given()).restore):
        with pytest.raises((TypeError, ValueError), match="image: expected"):
            call(image)


def test_lack_of_memory_frees_and_tries_once_more() -> None:
    model = Given(lacks=1)
    SemanticSegmenter(model).segment(picture())
    assert model.calls == ["logits", "free", "logits"]
    model = Given(lacks=2)
    segmenter = SemanticSegmenter(model)
    with pytest.raises(OutOfMemory, match="lack; given on cpu: free memory there, or take a smaller"):
        segmenter.segment(picture())
    assert model.calls == ["logits", "free", "logits"]
    segmenter.segment(picture())  # lives on


def test_a_restorer_restores() -> None:
    image, model = picture(), Given(lacks=1)
    before = image.copy()
    with Restorer(model) as restorer:
        np.testing.assert_array_equal(restorer.restore(image, ["road", "sky"]), 255 - before)
        with pytest.raises(TypeError, match="classes: expected a sequence of names, got the string 'road'"):
            restorer.restore(image, "road")
    np.testing.assert_array_equal(image, before)
    assert model.calls == ["restore road sky", "free", "restore road sky", "close"]


@pytest.mark.parametrize("load", [SemanticSegmenter, Restorer])
def test_what_was_closed_says_so_and_may_be_closed_again(load: Any) -> None:
    model = Given()
    with load(model) as loaded:
        loaded.close()
    assert model.calls == ["close"]
    call = loaded.segment if load is SemanticSegmenter else loaded.restore
    for refused in (loaded.free, lambda: call(picture())):
        with pytest.raises(RuntimeError, match="given was closed; load it again"):
            refused()
    assert model.calls == ["close"]


def test_a_restored_picture_of_another_size_is_refused() -> None:
    model = Given()
    model.restore = lambda image, classes: image[:-1]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"given: expected a picture \(4, 6, 3\) uint8, got \(3, 6, 3\) uint8"):
        Restorer(model).restore(picture())
    model.restore = lambda image, classes: image / np.float32(255)  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match=r"given: expected a picture \(4, 6, 3\) uint8, got \(4, 6, 3\) float32"):
        Restorer(model).restore(picture())


def test_threads_take_turns() -> None:
    class Alone(Given):
        inside, most = 0, 0

        def logits(self, image: Any) -> Any:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.005)
            self.inside -= 1
            return self.given

    model = Alone()
    segmenter = SemanticSegmenter(model)
    threads = [threading.Thread(target=lambda: [segmenter.segment(picture()) for _ in range(4)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.most == 1


# --- registry ---


def test_models_of_ones_own_by_name() -> None:
    asked: list[tuple[str, str]] = []

    def loader(device: str, precision: str) -> Given:
        asked.append((device, precision))
        return Given()

    register_semantic("test-semantic", loader)
    register_restorer("test-restorer", loader)
    assert {"rass-nano", "rass-sd21", "test-semantic"} <= set(semantic_names())
    assert {"scr-sd21", "test-restorer"} <= set(restorer_names())
    assert load_semantic("test-semantic", precision="fp32").segment(picture()).size == (4, 6)
    assert load_restorer("test-restorer", device="cpu").restore(picture()).shape == (4, 6, 3)
    assert asked == [("auto", "fp32"), ("cpu", "auto")]
    with pytest.raises(ValueError, match="semantic model 'test-semantic' is registered already"):
        register_semantic("test-semantic", loader)
    with pytest.raises(ValueError, match="restorer 'test-restorer' is registered already"):
        register_restorer("test-restorer", loader)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="semantic: expected one of .*rass-sd21.*, or a folder .*; got 'rass'$"):
        load_semantic("rass")
    with pytest.raises(ValueError, match="semantic: expected one of .*; got ''"):
        load_semantic("")
    with pytest.raises(ValueError, match="expected one of scr-sd21.*; got 'rass-nano', a model of classes: .*`glesam"):
        load_restorer("rass-nano")


@pytest.mark.parametrize(("missing", "helps"), [("diffusers", True), ("glesam_ros.typo", False)])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(missing: str, helps: bool) -> None:
    def loader(device: str, precision: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    register_semantic(f"without-{missing}", loader)
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{missing}'") as caught:
        load_semantic(f"without-{missing}")
    assert caught.value.name == missing
    assert ("pip install 'glesam_ros[glesam]'" in str(caught.value)) is helps


def test_the_front_door() -> None:
    assert {"SemanticMap", "load_semantic", "load_restorer"} <= set(glesam_ros.__all__)
    assert all(getattr(glesam_ros, name) for name in glesam_ros.__all__)


# --- classes of instances ---


def instances(*masks: Any) -> Instances:
    stack = np.array(masks, np.bool_)
    boxes = []
    for mask in stack:
        rows, cols = np.nonzero(mask)
        empty = not len(rows)
        boxes.append([0, 0, 0, 0] if empty else [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    count = len(stack)
    scores = np.full(count, 0.5, np.float32)
    ids = np.arange(1, count + 1, dtype=np.int32)
    return Instances(stack, np.array(boxes, np.float32).reshape(count, 4), scores, scores, ids, 0.0, False)


def test_class_of_instances_known_answer() -> None:
    labels = np.array([[0, 0, 0, 2], [0, 0, 1, 2]], np.uint8)
    confidence = np.array([[0.3, 0.3, 0.3, 0.9], [0.3, 0.3, 1.0, 0.8]], np.float32)
    found = semantic_map(labels, confidence=confidence)
    left, right, whole = np.zeros((3, 2, 4), np.bool_)
    left[:, :3] = right[:, 3] = whole[:] = True
    index, score = class_of_instances(instances(left, right, whole), found)
    assert index.dtype == np.int64 and score.dtype == np.float32
    # left: 5 x 0.3 of road against 1.0 of sky; whole: 1.7 of person beats 1.5 of road though it has fewer pixels
    assert index.tolist() == [0, 2, 2]
    np.testing.assert_allclose(score, [1.5 / 6, 1.7 / 2, 1.7 / 8], rtol=1e-6)


def test_the_score_is_share_times_mean_confidence() -> None:
    rng = np.random.default_rng(4)
    labels, confidence = rng.integers(0, 3, (40, 50)).astype(np.uint8), rng.random((40, 50), np.float32)
    masks = rng.random((6, 40, 50)) < 0.3
    index, score = class_of_instances(instances(*masks), semantic_map(labels, confidence=confidence))
    for k, mask in enumerate(masks):
        shares = np.array([confidence[mask & (labels == c)].sum() for c in range(3)]) / confidence[mask].sum()
        assert index[k] == shares.argmax()
        np.testing.assert_allclose(score[k], shares.max() * confidence[mask].mean(), rtol=1e-5)


def test_a_sure_uniform_mask_scores_one() -> None:
    found = semantic_map(np.ones((5, 5), np.uint8), confidence=np.ones((5, 5), np.float32))
    index, score = class_of_instances(instances(np.ones((5, 5))), found)
    assert index.tolist() == [1] and score.tolist() == [1.0]


def test_a_mask_without_pixels_or_confidence_has_no_class() -> None:
    found = semantic_map(np.zeros((5, 5), np.uint8), confidence=np.zeros((5, 5), np.float32))
    index, score = class_of_instances(instances(np.zeros((5, 5)), np.ones((5, 5))), found)
    assert index.tolist() == [NO_CLASS, NO_CLASS] and score.tolist() == [0, 0]
    none = Instances(
        np.zeros((0, 5, 5), np.bool_), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32),
        np.zeros(0, np.int32), 0.0, False,
    )
    index, score = class_of_instances(none, found)
    assert index.shape == score.shape == (0,)


def test_a_map_of_another_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"semantic_map: expected \(height, width\) \(5, 5\) of the instances"):
        class_of_instances(instances(np.ones((5, 5))), semantic_map(np.zeros((5, 6), np.uint8)))
