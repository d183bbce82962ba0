"""Thresholds, gate, prompts and masks of the pipeline, with a small model whose answers are known."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from glesam_ros import EnhancementGate, Pipeline, Settings, load_pipeline
from glesam_ros.masks import mask_nms, upsample_into
from glesam_ros.models import Candidates, Embedding, register_model

HEIGHT, WIDTH = 48, 64


class Known:
    """Proposes given candidates; degradation is the mean of the picture; remembers what it was asked."""

    name = "known"
    device = "cpu"
    classes: tuple[str, ...] = ("object",)
    own_size = 512
    thresholds = (0.15, 0.5)
    overlaps = False

    def __init__(self, logits: Any = None, scores: Any = None, pause: float = 0.0) -> None:
        self.logits = np.zeros((0, HEIGHT, WIDTH), np.float32) if logits is None else np.asarray(logits, np.float32)
        self.scores = np.asarray([] if scores is None else scores, np.float32)
        self.rank: Any = None
        self.islands = 0.0
        self.pause = pause
        self.inside = 0
        self.most_inside = 0
        self.asked: list[Any] = []
        self.is_closed = False

    def _work(self) -> None:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(self.pause)
        self.inside -= 1

    def encode(self, image: Any, budget: Any) -> Embedding:
        self._work()
        self.asked.append(budget.processing_size)
        latent = np.full((1, 1, 1, 1), image.mean(), np.float32)
        return Embedding(latent, image.shape[:2], float(image.mean()) / 100)

    def enhance(self, embedding: Embedding) -> Embedding:
        self._work()
        return Embedding(-embedding.latent, embedding.size, embedding.degradation, enhanced=True)

    def propose(self, embedding: Embedding, score_threshold: float, limit: int, budget: Any) -> Candidates:
        self._work()
        self.asked.append((score_threshold, limit))
        return Candidates(self.logits.copy(), self.scores, self.rank, self.islands)

    def prompt(self, embedding: Embedding, points: Any, labels: Any, budget: Any) -> Candidates:
        self._work()
        self.asked.append((points, labels))
        height, width = embedding.size
        logits = np.full((len(points), height, width), -5, np.float32)
        for k, (xy, kinds) in enumerate(zip(points, labels)):
            for x, y in xy[kinds == 1].astype(int):
                logits[k, y, x] = 5
        return Candidates(logits, np.linspace(0.1, 0.9, len(points), dtype=np.float32))

    def free(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


def picture(level: float = 0.0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A flat picture whose degradation, for `Known`, is `level`."""
    return np.full((*size, 3), round(100 * level), np.uint8)


def rectangles(*windows: tuple[int, int, int, int], high: float = 5.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of rectangles xyxy at the size of the image."""
    logits = np.full((len(windows), HEIGHT, WIDTH), -5, np.float32)
    for k, (x1, y1, x2, y2) in enumerate(windows):
        logits[k, y1:y2, x1:x2] = high
    return logits


def pipeline(model: Known, **settings: Any) -> Pipeline:
    return Pipeline(model, Settings(**{"min_area": 0, **settings}))


class TestGate:
    # was on, level, is on; above 0.6, below 0.4
    TABLE = [
        (False, 0.0, False), (False, 0.4, False), (False, 0.5, False), (False, 0.6, False), (False, 0.61, True),
        (True, 0.61, True), (True, 0.6, True), (True, 0.5, True), (True, 0.4, True), (True, 0.39, False),
        (True, 0.0, False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("was", "level", "expected"), TABLE)
    def test_truth_table(self, was: bool, level: float, expected: bool) -> None:
        gate = EnhancementGate()
        gate.is_on = was
        assert gate.update(level, above=0.6, below=0.4) is expected
        assert gate.is_on is expected

    def test_a_level_that_wavers_between_does_not_flicker(self) -> None:
        gate = EnhancementGate()
        levels = [0.5, 0.59, 0.7, 0.5, 0.41, 0.55, 0.3, 0.5, 0.59]
        assert [gate.update(v, 0.6, 0.4) for v in levels] == [False] * 2 + [True] * 4 + [False] * 3

    def test_where_below_is_larger_above_alone_decides(self) -> None:
        gate = EnhancementGate()
        levels = [0.3, 0.5, 0.7, 0.5, 0.4, 0.5]
        assert [gate.update(v, 0.4, 0.6) for v in levels] == [v > 0.4 for v in levels]


class TestEnhancement:
    @pytest.mark.parametrize(
        ("mode", "level", "expected"),
        [("off", 1.0, False), ("always", 0.0, True), ("auto", 0.2, False), ("auto", 0.3, True)],
    )
    def test_modes(self, mode: str, level: float, expected: bool) -> None:
        embedding = pipeline(Known(), enhancement=mode).encode(picture(level))
        assert embedding.enhanced is expected
        assert (embedding.latent.item() < 0) is (expected and level > 0)
        assert embedding.degradation == pytest.approx(level)

    @pytest.mark.parametrize(("mode", "level", "expected"), [("off", 0.2, 0), ("auto", 0.2, 1), ("auto", 0.9, 0)])
    def test_auto_takes_for_a_clear_frame_what_the_enhancer_starts_from(
        self, mode: str, level: float, expected: int
    ) -> None:
        class Adapting(Known):
            adapted = 0

            def encode(self, image: Any, budget: Any) -> Embedding:
                seen = super().encode(image, budget)
                return dataclasses.replace(seen, adapt=lambda: self.adapt(seen))

            def adapt(self, seen: Embedding) -> Embedding:
                self.adapted += 1
                return seen

        model = Adapting()
        assert pipeline(model, enhancement=mode).encode(picture(level)).enhanced is (level > 0.5)
        assert model.adapted == expected

    def test_auto_remembers_by_camera(self) -> None:
        pipe = pipeline(Known(), enhancement="auto", enhance_above=0.6, enhance_below=0.4)
        left, right = EnhancementGate(), EnhancementGate()
        assert pipe.encode(picture(0.7), left).enhanced
        assert not pipe.encode(picture(0.5), right).enhanced
        assert pipe.encode(picture(0.5), left).enhanced
        assert not pipe.encode(picture(0.5)).enhanced  # no gate, no memory

    def test_settings_may_change_between_frames(self) -> None:
        pipe = pipeline(Known(), enhancement="off")
        assert not pipe.encode(picture(0.9)).enhanced
        pipe.settings = pipe.settings.replace(enhancement="always", processing_size=256)
        assert pipe.encode(picture(0.9)).enhanced
        assert pipe.model.asked == [0, 256]  # type: ignore[attr-defined]

    def test_instances_tell_degradation_and_enhancement(self) -> None:
        found = pipeline(Known(), enhancement="always").segment(picture(0.9))
        assert (found.degradation, found.enhanced) == (pytest.approx(0.9), True)
        assert pipeline(Known(), enhancement="off").segment(picture(2.0)).degradation == 1.0


class TestEverything:
    def test_known_masks(self) -> None:
        model = Known(rectangles((1, 2, 11, 12), (20, 20, 64, 48)), [0.7, 0.9])
        found = pipeline(model).segment(picture())
        assert found.ids.tolist() == [1, 2]
        np.testing.assert_allclose(found.scores, [0.9, 0.7])
        assert found.boxes.tolist() == [[20, 20, 64, 48], [1, 2, 11, 12]]
        assert found.areas.tolist() == [44 * 28, 100]
        assert found.stability.tolist() == [1, 1]
        assert found.masks[1, 2:12, 1:11].all()

    def test_the_model_is_asked_for_enough(self) -> None:
        model = Known()
        pipeline(model, score_threshold=0.4, max_instances=8).segment(picture())
        assert model.asked[-1] == (0.4, 32)

    def test_nothing_found(self) -> None:
        found = pipeline(Known()).segment(picture())
        assert len(found) == 0 and found.size == (HEIGHT, WIDTH)
        assert not found.label_map().any()

    def test_nothing_left(self) -> None:
        found = pipeline(Known(rectangles((1, 2, 11, 12)), [0.3]), score_threshold=0.5).segment(picture())
        assert len(found) == 0 and found.boxes.shape == (0, 4)

    def test_thresholds_are_inclusive(self) -> None:
        model = Known(rectangles((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9)), [0.75, 0.5, 0.499])
        assert pipeline(model, score_threshold=0.5).segment(picture()).scores.tolist() == [0.75, 0.5]

    def test_stability_is_the_iou_of_shifted_thresholds(self) -> None:
        logits = rectangles((10, 10, 20, 20))
        logits[0, 10:15, 10:20] = 0.5  # half of it falls to the raised threshold
        logits[0, 20:30, 10:20] = -0.5  # as much again comes with the lowered one
        found = pipeline(Known(logits, [0.9]), stability_threshold=0.25).segment(picture())
        assert found.stability.tolist() == [0.25]
        assert found.areas.tolist() == [100]
        assert len(pipeline(Known(logits, [0.9]), stability_threshold=0.26).segment(picture())) == 0

    def test_thresholds_below_0_are_those_of_the_model(self) -> None:
        logits = rectangles((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9))
        logits[2, 3:9, 40:49] = 0.5  # of stability a third
        model = Known(logits, [0.75, 0.5, 0.9])
        model.thresholds = (0.6, 0.4)
        pipe = pipeline(model)
        assert pipe.segment(picture()).scores.tolist() == [0.75]
        assert model.asked[-1][0] == 0.6
        for asked, expected, kept in (
            ((0.0, -1.0), (0.0, 0.4), [0.75, 0.5]),
            ((-0.5, 0.0), (0.6, 0.0), [0.9, 0.75]),
            ((0.0, 0.0), (0.0, 0.0), [0.9, 0.75, 0.5]),
        ):
            pipe.settings = pipe.settings.replace(**dict(zip(("score_threshold", "stability_threshold"), asked)))
            assert (pipe.resolved.score_threshold, pipe.resolved.stability_threshold) == expected
            assert pipe.segment(picture()).scores.tolist() == pytest.approx(kept)
        assert (pipe.settings.score_threshold, pipe.settings.stability_threshold) == (0.0, 0.0)

    def test_small_separate_parts_go_where_the_model_says_so(self) -> None:
        logits = rectangles((0, 0, 20, 10))
        logits[0, 20:24, 40:50] = logits[0, 30:32, 40:50] = 1e3  # a fifth and a tenth of the other
        model = Known(logits, [0.9])
        sizes = {}
        for share in (0.0, 0.2, 0.21):
            model.islands = share
            found = pipeline(model).segment(picture())
            sizes[share] = found.areas.tolist(), found.boxes[0].tolist()
        assert sizes == {
            0.0: ([260], [0, 0, 50, 32]), 0.2: ([240], [0, 0, 50, 24]), 0.21: ([200], [0, 0, 20, 10])
        }

    @pytest.mark.parametrize("high", [5.0, 0.5])
    def test_masks_that_are_alike_without_their_small_parts_are_one(self, high: float) -> None:
        logits = rectangles((0, 0, 20, 10), (0, 0, 20, 11), (30, 20, 40, 30), high=high)
        logits[0, 26:30, 40:50] = 1e3  # with it they overlap by 200 of 260
        model = Known(logits, [0.9, 0.8, 0.7])
        model.islands = 0.5
        found = pipeline(model, nms_iou=0.8, stability_threshold=0.0).segment(picture())
        assert found.scores.tolist() == pytest.approx([0.9, 0.7])
        assert found.areas.tolist() == [200, 100]

    def test_settings_of_two_threads_do_not_mix(self) -> None:
        """What is derived of settings is of the same ones, whoever sets others meanwhile."""
        pipe = pipeline(Known(rectangles((0, 0, 20, 10)), [0.9]))
        first, second = (pipe.settings.replace(processing_size=size) for size in (300, 400))
        other = threading.Thread(target=lambda: setattr(pipe, "settings", second))
        ask = pipe.memory.ask

        def slow(size: int, batch: int) -> None:
            if not other.ident:
                other.start()
                other.join(0.3)  # it may get in between, or has to wait
            ask(size, batch)

        pipe.memory.ask = slow  # type: ignore[method-assign]
        pipe.settings = first
        other.join()
        held = pipe.settings.processing_size, pipe.resolved.processing_size, pipe.memory.full.size
        assert held == (400, 400, 400)

    def test_min_area_is_in_pixels_of_the_image(self) -> None:
        logits = np.full((3, 12, 16), -1e-3, np.float32)
        logits[0, 2:5, 2:5] = logits[1, 8:10, 8:10] = logits[2, 8, 2] = 1e3
        areas = pipeline(Known(logits, [0.9, 0.8, 0.7]), stability_threshold=0.0).segment(picture()).areas.tolist()
        for smallest in (*areas, areas[1] + 1):
            pipe = pipeline(Known(logits, [0.9, 0.8, 0.7]), min_area=smallest, stability_threshold=0.0)
            assert pipe.segment(picture()).areas.tolist() == [a for a in areas if a >= smallest]

    def test_an_empty_mask_of_a_prompt_is_nothing_to_trust(self) -> None:
        logits = rectangles((1, 2, 11, 12), (1, 1, 1, 1))

        class Prompted(Known):
            def prompt(self, *_: Any) -> Candidates:
                return Candidates(logits, np.float32([0.7, 0.9]))

        found = pipeline(Prompted()).segment(picture(), boxes=[[1, 2, 11, 12], [40, 5, 41, 6]])
        assert found.areas.tolist() == [100, 0] and found.boxes[1].tolist() == [0, 0, 0, 0]
        assert found.scores.tolist() == pytest.approx([0.7, 0])

    def test_a_mask_of_one_pixel_is_an_instance_where_all_sizes_are_wanted(self) -> None:
        found = pipeline(Known(rectangles((5, 6, 6, 7)), [0.9])).segment(picture())
        assert (found.areas.tolist(), found.stability.tolist()) == ([1], [1])

    def test_of_equal_rank_the_first_of_the_model_comes_first(self) -> None:
        windows = [(x, y, x + 3, y + 3) for y in range(0, 40, 8) for x in range(0, 60, 6)]
        found = pipeline(Known(rectangles(*windows), [0.9, 0.5] * 25)).segment(picture())
        assert found.boxes.tolist() == [[*window] for window in windows[::2] + windows[1::2]]

    def test_a_mask_without_a_pixel_is_no_instance(self) -> None:
        logits = np.full((1, 12, 16), -1000, np.float32)
        logits[0, 5, 5] = 1e-3  # positive in its cell, nowhere at the pixels around it
        assert len(pipeline(Known(logits, [0.9]), stability_threshold=0.0).segment(picture())) == 0

    def test_small_ones_do_not_take_the_places_of_others(self) -> None:
        model = Known(rectangles((0, 0, 2, 2), (10, 10, 30, 30)), [0.9, 0.8])
        found = pipeline(model, max_instances=1, min_area=5).segment(picture())
        assert found.areas.tolist() == [400]
        assert found.masks.sum() == 400

    @pytest.mark.parametrize("small", [(40, 2, 44, 3), (3, 30, 4, 34), (60, 44, 63, 45)])
    def test_of_a_small_one_that_is_left_out_no_pixel_stays(self, small: tuple[int, int, int, int]) -> None:
        model = Known(rectangles(small, (10, 10, 30, 30)), [0.9, 0.8])
        found = pipeline(model, min_area=5).segment(picture())
        assert found.boxes.tolist() == [[10, 10, 30, 30]]
        assert found.masks.sum() == found.masks[0, 10:30, 10:30].sum() == 400

    def test_at_most_max_instances_best_first(self) -> None:
        windows = [(8 * k, 0, 8 * k + 6, 6) for k in range(6)]
        scores = [0.6, 0.9, 0.7, 0.95, 0.8, 0.65]
        found = pipeline(Known(rectangles(*windows), scores), max_instances=3).segment(picture())
        np.testing.assert_allclose(found.scores, [0.95, 0.9, 0.8])
        assert found.boxes[:, 0].tolist() == [24, 8, 32]

    def test_duplicates_go(self) -> None:
        model = Known(rectangles((0, 0, 20, 20), (0, 0, 20, 19), (0, 0, 20, 10)), [0.8, 0.9, 0.7])
        found = pipeline(model, nms_iou=0.7).segment(picture())
        assert found.areas.tolist() == [380, 200]

    def test_a_rank_of_its_own_orders_and_suppresses(self) -> None:
        model = Known(rectangles((0, 0, 20, 20), (0, 0, 20, 19), (30, 0, 40, 9), (50, 0, 60, 9)), [0.8, 0.9, 0.7, 0.3])
        model.rank = np.array([0.6, 0.5, 0.1, 0.7], np.float32)
        pipe = pipeline(model, score_threshold=0.5)  # of the scores
        found = pipe.segment(picture())
        assert found.areas.tolist() == [400, 90]
        np.testing.assert_allclose(found.scores, [0.8, 0.7])
        pipe.settings = pipe.settings.replace(max_instances=1, score_threshold=0.2)
        assert pipe.segment(picture()).boxes[:, 0].tolist() == [50]

    def test_scores_beyond_one_are_cut(self) -> None:
        assert pipeline(Known(rectangles((0, 0, 9, 9)), [1.02])).segment(picture()).scores.tolist() == [1]


def plain_nms(masks: np.ndarray[Any, Any], threshold: float, limit: int) -> list[int]:
    """The definition, one pair at a time."""
    kept: list[int] = []
    for k, mask in enumerate(masks):
        overlaps = [(mask & masks[j]).sum() / max(1, (mask | masks[j]).sum()) for j in kept]
        if len(kept) < limit and all(iou <= threshold for iou in overlaps):
            kept.append(k)
    return kept


class TestNms:
    def test_known_answers(self) -> None:
        masks = rectangles((0, 0, 10, 10), (0, 0, 10, 5), (0, 0, 10, 9), (30, 30, 40, 40), (0, 0, 10, 10)) > 0
        # IoU with the first: 0.5, 0.9, 0, 1
        assert mask_nms(masks, 0.89, 9).tolist() == [0, 1, 3]
        assert mask_nms(masks, 0.9, 9).tolist() == [0, 1, 2, 3]  # exactly the threshold stays
        assert mask_nms(masks, 0.5, 9).tolist() == [0, 1, 3]
        assert mask_nms(masks, 0.4, 9).tolist() == [0, 3]
        assert mask_nms(masks, 1.0, 9).tolist() == [0, 1, 2, 3, 4]
        assert mask_nms(masks, 0.89, 2).tolist() == [0, 1]

    def test_exactly_the_threshold_stays_whatever_the_shape(self) -> None:
        masks = np.zeros((2, 3, 3), np.bool_)
        for k, corner in enumerate([(0, 2), (2, 0)]):
            masks[k, [0, 2, corner[0]], [0, 2, corner[1]]] = True  # 2 pixels in common, 4 in all
        assert mask_nms(masks, 0.5, 9).tolist() == [0, 1]
        assert mask_nms(masks, 0.49, 9).tolist() == [0]

    def test_a_dropped_mask_drops_nothing(self) -> None:
        masks = rectangles((0, 0, 10, 10), (0, 3, 10, 13), (0, 6, 10, 16)) > 0
        assert mask_nms(masks, 0.5, 9).tolist() == [0, 2]

    def test_no_masks_and_empty_masks(self) -> None:
        assert mask_nms(np.zeros((0, 5, 7), np.bool_), 0.5, 9).tolist() == []
        assert mask_nms(np.zeros((3, 5, 7), np.bool_), 0.5, 9).tolist() == [0, 1, 2]

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.8, 1.0])
    def test_against_the_definition(self, seed: int, threshold: float) -> None:
        rng = np.random.default_rng(seed)
        masks = np.zeros((60, 13, 19), np.bool_)
        for mask in masks:
            y, x = rng.integers(0, 8), rng.integers(0, 12)
            mask[y : y + rng.integers(1, 7), x : x + rng.integers(1, 8)] = True
        for limit in (4, 60):
            assert mask_nms(masks, threshold, limit).tolist() == plain_nms(masks, threshold, limit)


def smooth_logits(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> np.ndarray[Any, Any]:
    field = cv2.GaussianBlur(rng.normal(size=size).astype(np.float32), (0, 0), sigma)
    return (field / (field.std() + 1e-6) - rng.uniform(0, 2)).astype(np.float32)


class TestUpsampling:
    @pytest.mark.parametrize(
        ("cells", "pixels"),
        [
            ((96, 128), (480, 640)),  # whole ratio
            ((72, 128), (480, 848)),  # ratios with a common divisor
            ((96, 128), (481, 641)),  # ratios without one
            ((30, 41), (97, 131)),
            ((64, 64), (333, 100)),
            ((24, 32), (24, 32)),
            ((24, 32), (25, 31)),
            ((96, 128), (47, 63)),  # smaller than the logits
            ((96, 128), (20, 17)),
            ((1, 1), (20, 30)),
            ((10, 10), (1, 1)),
        ],
    )
    def test_equals_the_full_bilinear_resize(self, cells: tuple[int, int], pixels: tuple[int, int]) -> None:
        rng = np.random.default_rng(cells[0] + pixels[0])
        for sigma in (0.5, 2.0, 6.0) * 3:
            logits = smooth_logits(rng, cells, sigma)
            full = cv2.resize(logits, pixels[::-1], interpolation=cv2.INTER_LINEAR)
            mask = np.zeros(pixels, np.bool_)
            box, area = upsample_into(mask, logits)
            assert area == mask.sum()
            given = np.zeros(pixels, np.bool_)
            y, x = np.nonzero(logits > 0)
            inside = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1) if len(x) else (0, 0, 0, 0)
            assert upsample_into(given, logits, inside) == (box, area) and np.array_equal(given, mask)
            # a logit of 1e-5 may round to either side
            np.testing.assert_array_equal(mask | (np.abs(full) < 1e-5), (full > 0) | (np.abs(full) < 1e-5))
            rows, cols = np.nonzero(mask)
            extent = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1) if rows.size else (0, 0, 0, 0)
            assert box == extent

    def test_a_positive_cell_that_no_pixel_is_near_enough_to_is_an_empty_mask(self) -> None:
        logits = np.full((12, 16), -1000, np.float32)
        logits[5, 5] = 1e-3
        mask = np.zeros((HEIGHT, WIDTH), np.bool_)
        assert upsample_into(mask, logits) == ((0, 0, 0, 0), 0) and not mask.any()

    def test_small_objects_everywhere(self) -> None:
        for cells, pixels in (((12, 16), (61, 83)), ((12, 16), (60, 80)), ((12, 16), (9, 7))):
            for y in range(cells[0]):
                for x in range(cells[1]):
                    logits = np.full(cells, -1, np.float32)
                    logits[y, x] = 3
                    mask = np.zeros(pixels, np.bool_)
                    upsample_into(mask, logits)
                    full = cv2.resize(logits, pixels[::-1], interpolation=cv2.INTER_LINEAR)
                    np.testing.assert_array_equal(mask, full > 0, err_msg=f"{cells} {pixels} {y} {x}")

    def test_boxes_are_the_extents_of_the_masks(self) -> None:
        rng = np.random.default_rng(0)
        logits = np.stack([smooth_logits(rng, (24, 32), 3.0) for _ in range(12)])
        pipe = pipeline(Known(logits, np.linspace(0.9, 0.6, 12)), stability_threshold=0.0, nms_iou=1.0)
        found = pipe.segment(picture(size=(101, 133)))
        assert len(found) == 12
        for mask, box in zip(found.masks, found.boxes):
            rows, cols = np.nonzero(mask)
            assert box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        np.testing.assert_array_equal(found.areas, found.masks.sum((1, 2)))
        np.testing.assert_array_equal(found.label_map() > 0, found.masks.any(0))


class TestPrompts:
    @pytest.fixture()
    def model(self) -> Known:
        return Known()

    def asked(self, model: Known, **prompts: Any) -> tuple[list[Any], list[Any]]:
        pipe = pipeline(model)
        found = pipe.decode(pipe.encode(picture()), **prompts)
        points, labels = model.asked[-1]
        assert points.dtype == labels.dtype == np.float32
        assert len(found) == len(points)
        return points.tolist(), labels.tolist()

    def test_points_are_one_object(self, model: Known) -> None:
        points, labels = self.asked(model, points=[(1, 2), (3, 4), (5, 6)], labels=[1, 0, 1])
        assert points == [[[1, 2], [3, 4], [5, 6]]] and labels == [[1, 0, 1]]

    def test_boxes_are_an_object_each(self, model: Known) -> None:
        points, labels = self.asked(model, boxes=[(1, 2, 3, 4), (5, 6, 7, 8)])
        assert points == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]] and labels == [[2, 3], [2, 3]]

    def test_points_and_boxes_are_objects_beside_each_other(self, model: Known) -> None:
        points, labels = self.asked(model, points=[(9, 9), (8, 8), (7, 7)], labels=[1, 1, 0], boxes=[(1, 2, 3, 4)])
        assert points == [[[9, 9], [8, 8], [7, 7]], [[1, 2], [3, 4], [0, 0]]]
        assert labels == [[1, 1, 0], [2, 3, -1]]

    def test_one_point_is_padded_to_the_boxes(self, model: Known) -> None:
        points, labels = self.asked(model, points=[(9, 9)], labels=[1], boxes=[(1, 2, 3, 4)])
        assert points == [[[9, 9], [0, 0]], [[1, 2], [3, 4]]] and labels == [[1, -1], [2, 3]]

    def test_batch_of_objects(self, model: Known) -> None:
        points, labels = self.asked(model, points=[[(1, 1), (2, 2)], [(3, 3), (0, 0)]], labels=[[1, 0], [1, -1]])
        assert points == [[[1, 1], [2, 2]], [[3, 3], [0, 0]]] and labels == [[1, 0], [1, -1]]

    def test_batch_of_objects_with_their_boxes(self, model: Known) -> None:
        points, labels = self.asked(
            model, points=[[(1, 1)], [(3, 3)]], labels=[[0], [-1]], boxes=[(0, 0, 5, 5), (2, 2, 9, 9)]
        )
        assert points == [[[1, 1], [0, 0], [5, 5]], [[3, 3], [2, 2], [9, 9]]]
        assert labels == [[0, 2, 3], [-1, 2, 3]]

    def test_answers_keep_the_order_and_see_no_threshold(self, model: Known) -> None:
        pipe = pipeline(model, score_threshold=1.0, stability_threshold=1.0, min_area=1000, max_instances=1)
        found = pipe.segment(picture(), points=[[(60, 40)], [(1, 1)], [(60, 40)]], labels=[[1], [1], [1]])
        assert found.ids.tolist() == [1, 2, 3]
        np.testing.assert_allclose(found.scores, [0.1, 0.5, 0.9])
        assert found.boxes.tolist() == [[60, 40, 61, 41], [1, 1, 2, 2], [60, 40, 61, 41]]

    def test_an_empty_answer_is_an_instance_without_pixels(self, model: Known) -> None:
        found = pipeline(model).segment(picture(), boxes=[(1, 2, 30, 40)])
        assert (len(found), found.areas.tolist(), found.boxes.tolist()) == (1, [0], [[0, 0, 0, 0]])
        assert found.stability.tolist() == [0]
        assert not found.label_map().any()

    @pytest.mark.parametrize("height", [0.5, 3.0, 1e3])
    def test_an_answer_is_the_whole_mask_however_faint(self, height: float) -> None:
        logits = np.full((2, 12, 16), -0.1, np.float32)
        logits[0] = height  # the whole image
        logits[1, 3:9, 2:14] = 1e-3  # a faint part beside a certain one
        logits[1, 5, 5] = height

        class Prompted(Known):
            def prompt(self, *_: Any) -> Candidates:
                return Candidates(logits.copy(), np.float32([0.7, 0.9]))

        found = pipeline(Prompted()).segment(picture(), boxes=[[1, 2, 11, 12], [40, 5, 41, 6]])
        for mask, expected in zip(found.masks, logits):
            full = cv2.resize(expected, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
            np.testing.assert_array_equal(mask, full > 0)

    def test_of_prompted_objects_the_smaller_lies_on_top_of_others_the_better(self) -> None:
        logits, scores = rectangles((0, 0, 20, 20), (5, 5, 10, 10)), [0.9, 0.8]

        class Both(Known):
            def prompt(self, *_: Any) -> Candidates:
                return Candidates(self.logits.copy(), self.scores)

        pipe = pipeline(Both(logits, scores))
        for boxes, on_top in ((None, 1), ([(1, 2, 3, 4)] * 2, 2)):
            assert pipe.segment(picture(), boxes=boxes).label_map()[7, 7] == on_top

    @pytest.mark.parametrize(
        ("prompts", "words"),
        [
            ({"labels": [1]}, "labels: expected None without points"),
            ({"labels": [1], "boxes": [(1, 2, 3, 4)]}, "labels: expected None without points"),
            ({"points": [(1, 1)], "labels": [0]}, "at least one 1"),
            ({"points": [(1, 1)], "labels": [0], "boxes": [(1, 2, 3, 4)]}, "at least one 1"),
            ({"points": [(WIDTH, 1)], "labels": [1]}, f"0 <= x < {WIDTH}"),
            ({"points": [[(1, 1)]], "labels": [[1]], "boxes": [(1, 2, 3, 4)] * 2}, "expected 1 boxes, .* got 2"),
            ({"boxes": np.zeros((0, 4))}, "M >= 1"),
        ],
    )
    def test_refused(self, model: Known, prompts: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            pipeline(model).segment(picture(), **prompts)
        assert model.most_inside == 1 and len(model.asked) == 1  # the picture was encoded, nothing decoded


class TestThreads:
    def test_calls_into_the_model_take_turns_and_answers_stay_apart(self) -> None:
        model = Known(pause=0.002)
        pipe = pipeline(model, enhancement="always")
        faults: list[str] = []

        def work(number: int) -> None:
            for _ in range(10):
                embedding = pipe.encode(picture(number / 10))
                found = pipe.decode(embedding, points=[(number, number)])
                if found.boxes.tolist() != [[number, number, number + 1, number + 1]]:
                    faults.append(f"thread {number} got {found.boxes.tolist()}")
                if abs(found.degradation - number / 10) > 1e-6:
                    faults.append(f"thread {number} got degradation {found.degradation}")

        threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert model.most_inside == 1

    def test_one_embedding_decodes_the_same_many_times(self) -> None:
        pipe = pipeline(Known(rectangles((1, 1, 9, 9), (20, 20, 40, 40)), [0.9, 0.8]))
        embedding = pipe.encode(picture())
        first = pipe.decode(embedding)
        first.masks[:] = False
        assert pipe.decode(embedding).areas.tolist() == [64, 400]


class TestLoading:
    def test_three_lines(self) -> None:
        register_model("known", lambda device, precision: Known(rectangles((1, 1, 30, 30)), [0.9]))
        pipe = load_pipeline("known", enhancement="always", max_instances=5)
        assert pipe.settings.max_instances == 5
        assert pipe.segment(picture()).enhanced
        pipe.close()
        assert pipe.model.is_closed  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="'known' is registered already"):
            register_model("known", lambda device, precision: Known())

    def test_the_model_and_the_settings_get_what_was_asked_for(self) -> None:
        asked = []
        register_model("known", lambda *arguments: asked.append(arguments) or Known())
        chosen = load_pipeline("known", enhancement="off", device="cpu", precision="fp32").settings
        assert asked == [("cpu", "fp32")]
        assert (chosen.model, chosen.enhancement, chosen.device, chosen.precision) == ("known", "off", "cpu", "fp32")

    def test_a_pipeline_of_a_model_alone_has_the_settings_of_the_package(self) -> None:
        assert Pipeline(Known()).settings == Settings()

    def test_warm_up_goes_through_everything_mode_a_point_and_a_box_inside_the_image(self) -> None:
        pipe = pipeline(model := Known(), score_threshold=0.4, max_instances=8)
        pipe.warm_up(picture())
        size, everything, (points, labels), (corners, kinds) = model.asked
        assert size == 0 and everything == (0.4, 32)
        assert points.shape == (1, 1, 2) and (points < (WIDTH, HEIGHT)).all() and labels.tolist() == [[1]]
        assert kinds.tolist() == [[2, 3]]
        np.testing.assert_allclose(corners[0] / (WIDTH, HEIGHT), [[0.4, 0.4], [0.6, 0.6]], rtol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"model": "nanoo"}, "model: expected one of .*nano.*; got 'nanoo'$"),
            ({"model": "rass-nano"}, "got 'rass-nano', a model of classes: parameter semantic, `glesam semantic`"),
            ({"model": "~/export"}, "model: expected a folder with weights of nano, found no folder ~/export"),
            ({"model": "runs/no/export"}, "found no folder runs/no/export; give its whole path"),
            ({"model": ""}, "model: expected one of .*nano.*; got ''"),
            ({"enhancement": "on"}, "expected one of off, always, auto"),
            ({"colour": 1}, "load_pipeline: .*colour.* see glesam_ros.Settings"),
            ({"nms_iou": 2}, "nms_iou: expected 0 .. 1, got 2"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            load_pipeline(**arguments)

    def test_closed(self) -> None:
        pipe = pipeline(model := Known(rectangles((1, 1, 30, 30)), [0.9]))
        embedding = pipe.encode(picture())
        pipe.close()
        model.close = lambda: pytest.fail("closed again")  # type: ignore[method-assign]
        pipe.close()
        for call in (pipe.encode, pipe.segment, pipe.warm_up):
            with pytest.raises(RuntimeError, match="expected an open pipeline, that of .* was closed; load it again"):
                call(picture())
        for prompts in ({}, {"points": [[3, 3]]}):
            with pytest.raises(RuntimeError, match="was closed; load it again"):
                pipe.decode(embedding, **prompts)

    def test_closed_by_a_with_statement(self) -> None:
        with pipeline(Known(rectangles((1, 1, 30, 30)), [0.9])) as pipe:
            assert len(pipe.segment(picture())) == 1
        with pytest.raises(RuntimeError, match="was closed"):
            pipe.segment(picture())

    def test_an_image_is_not_decoded(self) -> None:
        with pytest.raises(TypeError, match="expected what encode gives, got ndarray; segment does both for an image"):
            pipeline(Known(rectangles((1, 1, 30, 30)), [0.9])).decode(picture())

    @pytest.mark.parametrize(
        ("missing", "helps"),
        [
            ("torch", "; install what it needs: pip install 'glesam_ros[glesam]'"),
            ("sam2", "; install what it needs: SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2"),
            ("onnxruntime", "; install what it needs: pip install onnxruntime (with a GPU onnxruntime-gpu)"),
            ("glesam_ros.typo", ""),
        ],
    )
    def test_a_missing_package_is_named_with_what_brings_it(self, missing: str, helps: str) -> None:
        def factory(device: str, precision: str) -> Any:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

        register_model(f"without_{missing}", factory)
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{missing}'") as caught:
            load_pipeline(f"without_{missing}")
        assert caught.value.name == missing
        assert str(caught.value).endswith(f"No module named '{missing}'{helps}")

    def test_a_missing_package_of_weights_of_ones_own_is_named_as_well(self, tmp_path: Path, monkeypatch: Any) -> None:
        def lacks(*_: Any) -> Any:
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

        monkeypatch.setattr("glesam_ros.models.registry._nano", lacks)
        with pytest.raises(ModuleNotFoundError, match="; install what it needs: pip install onnxruntime"):
            load_pipeline(str(tmp_path))

    def test_images_are_checked(self) -> None:
        with pytest.raises(ValueError, match="stack a grey image"):
            pipeline(Known()).encode(np.zeros((4, 5), np.uint8))
