"""The evaluation protocol on pictures whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import re
import signal
import sys
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
from bright_model import BrightRegions

from glesam_ros import Settings
from glesam_ros.datasets import Photograph
from glesam_ros.evaluation import agreement, plots, pool, protocol, report, sheet, summary
from glesam_ros.evaluation.protocol import CLEAR, Case, Condition, Evaluator, Measurement, Options
from glesam_ros.instances import Instances
from glesam_ros.overlay import PALETTE
from glesam_ros.pipeline import Pipeline

NIGHT = Condition("low_light", 3)
METRICS = {f"{prompt}_{metric}" for prompt, metrics in protocol.METRICS.items() for metric in metrics}
SCORES = {"points_score", "boxes_score"}
"""What the model says of itself: 0.9 of whatever it is asked for."""
MARKS = METRICS - SCORES


class Blind(BrightRegions):
    """Finds bright things; in the dark nothing unless it enhances."""

    def encode(self, image, budget):
        found = super().encode(image, budget)
        dark = float(image.max()) < 200
        return type(found)(found.latent * (0.3 if dark else 1.0), found.size, degradation=1.0 if dark else 0.0)

    def enhance(self, embedding):
        return type(embedding)(embedding.latent * 10, embedding.size, embedding.degradation, enhanced=True)


def rectangles(name: str = "rectangles") -> Photograph:
    """Two bright rectangles on black: 80x50 pixels, and one of 20x20 that is too small to count."""
    image, layer = np.zeros((160, 200, 3), np.uint8), np.zeros((160, 200), np.int16)
    image[20:70, 30:110], layer[20:70, 30:110] = 230, 1
    image[100:120, 20:40], layer[100:120, 20:40] = 230, 2
    return Photograph(name, image, [layer], False)


def evaluator(model=None, restorers=None, **options) -> Evaluator:
    pipe = Pipeline(model or BrightRegions(), Settings(enhancement="off", max_instances=100))
    return Evaluator(pipe, Options(**options), restorers)


def case(photograph: Photograph, *conditions: Condition) -> Case:
    return Case("made", photograph, tuple((c, None) for c in conditions or (CLEAR,)))


def measurement(level: float, condition: Condition, values: dict, name: str = "a", set_name: str = "made"):
    return Measurement(set_name, name, condition, level, level > 0.25, values, seconds=0.0)


def as_instances(masks: np.ndarray) -> Instances:
    count, height, width = masks.shape
    boxes, ones = np.tile(np.float32([0, 0, width, height]), (count, 1)), np.ones(count, np.float32)
    return Instances(masks, boxes, ones, ones, np.arange(1, count + 1, dtype=np.int32), 0.0, False)


def test_clear_picture_gets_full_marks_from_every_metric_in_every_mode() -> None:
    [found] = evaluator().measure(case(rectangles()))
    assert set(found.values) == {(mode, metric) for mode in ("off", "always", "auto") for metric in METRICS}
    # one region counts; everything mode's second mask is of the small one
    expected = {True: 0.9, False: 1.0}
    assert all(values == [pytest.approx(expected[name in SCORES])] for (_, name), values in found.values.items())
    assert (found.level, found.enhanced) == (0.0, False)


def test_auto_is_off_on_clear_and_always_on_degraded_pictures() -> None:
    clear, dark = evaluator(Blind()).measure(case(rectangles(), CLEAR, NIGHT))
    for metric in MARKS:
        assert clear.values["auto", metric] == clear.values["off", metric] == [1.0]
        assert dark.values["auto", metric] == dark.values["always", metric]
    assert dark.values["off", "everything_best_iou"] == dark.values["off", "everything_ar100"] == [0.0]
    assert dark.values["always", "everything_best_iou"][0] > 0.9
    assert (dark.level, dark.enhanced) == (1.0, True)


def test_the_threshold_of_automatic_mode_is_that_of_the_settings() -> None:
    class Middling(BrightRegions):
        def encode(self, image, budget):
            found = super().encode(image, budget)
            return type(found)(found.latent, found.size, degradation=0.4)

    for threshold, expected in ((0.5, False), (0.3, True)):
        pipe = Pipeline(Middling(), Settings(enhance_above=threshold, enhance_below=0.1))
        [found] = Evaluator(pipe, Options()).measure(case(rectangles()))
        assert found.enhanced is expected


def test_automatic_mode_is_measured_as_the_pipeline_runs_it() -> None:
    class Adapting(Blind):
        """Of a picture that needs no step it takes another latent, which finds nothing."""

        def encode(self, image, budget):
            found = super().encode(image, budget)
            return dataclasses.replace(found, adapt=lambda: dataclasses.replace(found, latent=found.latent * 0.1))

    clear, dark = evaluator(Adapting()).measure(case(rectangles(), CLEAR, NIGHT))
    for metric in METRICS:
        assert dark.values["auto", metric] == dark.values["always", metric]
    for metric in ("points_iou", "everything_best_iou"):
        assert clear.values["off", metric] == clear.values["always", metric] == [1.0]
        assert clear.values["auto", metric][0] < 1
    pipe = Pipeline(Adapting(), Settings(enhancement="auto", max_instances=100))
    assert len(pipe.segment(rectangles().image)) == 0
    result = agreement.agree(evaluator(Adapting(), modes=("off", "auto")), unlabelled())
    assert result.values is None  # automatic mode finds no mask in the photograph


def test_only_what_was_asked_for_is_measured() -> None:
    [found] = evaluator(modes=("always",), prompts=("boxes",)).measure(case(rectangles()))
    assert set(found.values) == {("always", f"boxes_{m}") for m in ("iou", "dice", "accuracy", "boundary", "score")}


def test_the_annotator_that_fits_best_counts_in_everything_mode() -> None:
    photograph = rectangles()
    halves = np.zeros((160, 200), np.int16)
    halves[:80], halves[80:] = 1, 2
    twice = Photograph("two annotators", photograph.image, [halves, photograph.layers[0]], True)
    [found] = evaluator().measure(case(twice))
    assert found.values["off", "everything_best_iou"] == found.values["off", "everything_ar10"] == [1.0]
    # points come from the first annotator, whose halves this model cannot give
    assert len(found.values["off", "points_iou"]) == 2 and np.mean(found.values["off", "points_iou"]) < 0.9


def test_the_tenth_mask_counts_for_the_smaller_recall_and_the_hundredth_for_the_larger() -> None:
    photograph = rectangles()
    region = photograph.layers[0] == 1
    for place, ar10, ar100 in ((10, 1.0, 1.0), (11, 0.0, 1.0), (100, 0.0, 1.0), (101, 0.0, 0.0)):
        found = np.zeros((101, *region.shape), bool)
        found[:, 150, :3], found[place - 1] = True, region
        target = protocol.make_target(case(photograph), seed=0)
        scores = protocol._everything_scores(as_instances(found), target)
        assert scores == {
            "everything_best_iou": [1.0], "everything_map_iou": [1.0], "everything_ar10": [ar10],
            "everything_ar100": [ar100],
        }


def test_of_the_label_map_what_it_shows_counts() -> None:
    """The right mask behind another is as good as that leaves it; in front of it, as good as it is."""
    photograph = rectangles()
    region = photograph.layers[0] == 1
    half = region.copy()
    half[:, np.flatnonzero(region.any(0))[region.any(0).sum() // 2 :]] = False
    target = protocol.make_target(case(photograph), seed=0)
    for masks, expected in (([half, region], 0.5), ([region, half], 1.0)):
        scores = protocol._everything_scores(as_instances(np.array(masks)), target)
        assert scores["everything_best_iou"] == [1.0]
        assert scores["everything_map_iou"] == [pytest.approx(expected, abs=0.02)]


def test_regions_of_exactly_a_thousand_pixels_count() -> None:
    photograph = rectangles()
    for width, counts in ((50, True), (49, False)):
        layer = np.zeros((160, 200), np.int16)
        layer[20:40, 30 : 30 + width] = 1
        found = evaluator().measure(case(Photograph("one", photograph.image, [layer], False)))
        assert bool(found) is counts


def test_points_lie_in_the_regions_and_follow_the_name_alone() -> None:
    first, again, other = (
        protocol.make_target(case(rectangles(name)), protocol.photograph_seed(0, "made", name))
        for name in ("a", "a", "b")
    )
    assert first.points.shape == (1, 3, 2)
    assert all(first.masks[0, int(y), int(x)] for x, y in first.points[0])
    np.testing.assert_array_equal(first.points, again.points)
    assert not np.array_equal(first.points, other.points)


def test_fewer_points_are_the_first_of_three() -> None:
    three, one = (protocol.make_target(case(rectangles()), 5, Options(points=n)).points for n in (3, 1))
    assert three.shape[1] == 3
    np.testing.assert_array_equal(one, three[:, :1])


def test_boxes_err_by_the_share_of_their_sides_within_the_frame() -> None:
    rng = np.random.default_rng(0)
    boxes = np.tile(np.float32([40, 30, 140, 80]), (4000, 1))
    moves = (protocol.moved_boxes(boxes, 0.05, (100, 200), rng) - boxes) / np.float32([100, 50, 100, 50])
    # a normal distribution cut at two standard deviations, where 4.6 % of it gather, has 0.96 of its deviation
    np.testing.assert_allclose(moves.std(0), 0.048, atol=0.002)
    np.testing.assert_allclose(moves.mean(0), 0, atol=0.004)
    assert np.abs(moves).max() == pytest.approx(0.1, abs=1e-4)
    whole = np.tile(np.float32([0, 0, 200, 100]), (500, 1))
    moved = protocol.moved_boxes(whole, protocol.MOST_BOX_ERROR, (100, 200), rng)
    assert moved.dtype == np.float32 and (moved[:, :2] >= 0).all() and (moved[:, 2:] <= (200, 100)).all()
    assert ((moved[:, 2:] - moved[:, :2]) >= (0.19 * 200, 0.19 * 100)).all()


def test_the_error_of_boxes_moves_boxes_alone_and_by_the_seed() -> None:
    tight, moved, again, other = (
        protocol.make_target(case(rectangles()), seed, Options(box_error=error))
        for seed, error in ((5, 0.0), (5, 0.1), (5, 0.1), (6, 0.1))
    )
    np.testing.assert_array_equal(tight.points, moved.points)
    np.testing.assert_array_equal(moved.boxes, again.boxes)
    assert (tight.boxes != moved.boxes).all() and (moved.boxes != other.boxes).all()
    scores = [evaluator(box_error=error).measure(case(rectangles()))[0].values for error in (0.0, 0.1)]
    assert scores[0]["off", "points_iou"] == scores[1]["off", "points_iou"]


def test_degradations_follow_seed_set_and_name() -> None:
    def picture(seed: int, name: str, set_name: str = "made") -> bytes:
        one = Case(set_name, rectangles(name), ((NIGHT, None),))
        return evaluator(seed=seed).pictures(one, NIGHT, "points").image.tobytes()

    assert picture(1, "a") == picture(1, "a")
    assert len({picture(1, "a"), picture(2, "a"), picture(1, "b"), picture(1, "a", "other")}) == 4


def test_a_picture_that_is_given_is_not_made_again() -> None:
    photograph = rectangles()
    black = np.zeros_like(photograph.image)
    [found] = evaluator(prompts=("everything",)).measure(Case("made", photograph, ((NIGHT, black),)))
    assert found.values["off", "everything_best_iou"] == [0.0]


def test_restorers_segment_the_restored_picture_without_enhancement() -> None:
    photograph = rectangles()
    seen = []

    def undo(image):
        seen.append(image)
        return photograph.image

    restorers = {"classical": undo, "zero_dce": undo, "prenet": undo}
    clear, dark = evaluator(Blind(), restorers, baselines=("classical", "zero_dce", "prenet")).measure(
        case(photograph, CLEAR, NIGHT)
    )
    assert {method for method, _ in clear.values} == {"off", "always", "auto", "classical"}
    assert {method for method, _ in dark.values} == {"off", "always", "auto", "classical", "zero_dce"}
    assert all(dark.values["zero_dce", metric] == [1.0] for metric in MARKS)
    assert dark.values["off", "everything_best_iou"] == [0.0]
    assert [image.max() > 200 for image in seen] == [True, False, False]  # the clear one, then the dark one twice


def test_grabcut_gets_the_box_and_nothing_else() -> None:
    found = evaluator(baselines=("grabcut",)).measure(case(rectangles()))[0].values
    assert {metric for method, metric in found if method == "grabcut"} == {m for m in MARKS if m.startswith("boxes")}
    assert found["grabcut", "boxes_iou"][0] > 0.95
    without = evaluator(baselines=("grabcut",), prompts=("points",)).measure(case(rectangles()))[0].values
    assert "grabcut" not in {method for method, _ in without}


def test_conditions_and_their_names() -> None:
    names = [condition.name for condition in protocol.conditions(["lq", "rain"], [1, 3])]
    assert names == ["clear", "lq-1", "lq-3", "rain-1", "rain-3"]


def test_weights_of_nano_are_not_for_other_models(tmp_path) -> None:
    import bright_model

    with pytest.raises(ValueError, match="expected the model nano, which they are for, got bright"):
        protocol.open_evaluator(Settings(model=bright_model.register()), Options(), weights=tmp_path)


def test_torch_is_needed_for_learned_baselines_only(monkeypatch) -> None:
    import bright_model

    monkeypatch.setitem(sys.modules, "torch", None)
    name = bright_model.register()
    opened = protocol.open_evaluator(Settings(model=name), Options(baselines=("classical", "grabcut")))
    assert opened.pipe.model.name == name and set(opened.restorers) == {"classical"}
    with pytest.raises(ModuleNotFoundError, match="torch"):
        protocol.open_evaluator(Settings(model=name), Options(baselines=("zero_dce",)))


# what the measurements add up to


def two_photographs() -> list[Measurement]:
    """Regions of 0.2, 0.4 and 0.6 without, and 0.1 more with enhancement; the first two are of one photograph."""
    lq3 = Condition("lq", 3)
    return [
        measurement(0.9, lq3, {("off", "points_iou"): [0.2, 0.4], ("always", "points_iou"): [0.3, 0.5]}, "a"),
        measurement(0.2, lq3, {("off", "points_iou"): [0.6], ("always", "points_iou"): [0.7]}, "b"),
    ]


def test_summary_by_hand() -> None:
    found = summary.summarise(two_photographs(), seed=0)
    off, always = found["rows"]
    assert off["mean"] == pytest.approx(0.4) and always["mean"] == pytest.approx(0.5)
    # two photographs: the draws are a and a, a and b, b and b
    assert (off["low"], off["high"]) == pytest.approx((0.3, 0.6))
    assert (off["regions"], off["photographs"]) == (3, 2)
    assert found["counts"] == {"made": {"photographs": 2, "regions": 3}}
    [gain] = found["gains"]
    assert (gain["method"], gain["over"]) == ("always", "off")
    assert (gain["difference"], gain["low"], gain["high"]) == pytest.approx((0.1, 0.1, 0.1))  # paired
    assert (gain["relative"], gain["relative_low"], gain["relative_high"]) == pytest.approx((1 / 4, 1 / 6, 1 / 3))
    [level] = found["levels"]
    assert level["mean"] == pytest.approx(0.55) and level["enhanced"] == 0.5
    json.dumps(found, allow_nan=False)


def test_regions_of_everything_mode_alone_are_not_counted() -> None:
    # which annotator's they are is not said
    found = summary.summarise([measurement(1, NIGHT, {("off", "everything_best_iou"): [0.5, 0.7]})], 0)
    assert found["counts"] == {"made": {"photographs": 1, "regions": 0}}


def test_a_gain_over_nothing_has_no_relative_figure() -> None:
    values = {("off", "points_iou"): [0.0], ("always", "points_iou"): [0.5]}
    [gain] = summary.summarise([measurement(1, NIGHT, values)], 0)["gains"]
    assert gain["difference"] == 0.5 and gain["relative"] is None


def test_baselines_are_compared_with_both_sides() -> None:
    values = {(m, "boxes_iou"): [v] for m, v in (("off", 0.5), ("always", 0.6), ("classical", 0.4))}
    gains = summary.summarise([measurement(1, NIGHT, values)], 0)["gains"]
    assert {(g["method"], g["over"]): round(g["difference"], 6) for g in gains} == {
        ("always", "off"): 0.1, ("always", "classical"): 0.2, ("classical", "off"): -0.1,
    }


def test_rank_correlation_of_levels() -> None:
    rising = {0: [0.0, 0.1], 1: [0.3, 0.2], 2: [0.5, 0.6], 3: [0.8, 0.9]}
    found = [
        measurement(sign * level + (sign < 0), Condition("lq", true) if true else CLEAR, {}, set_name=set_name)
        for set_name, sign in (("up", 1), ("down", -1))
        for true, levels in rising.items()
        for level in levels
    ]
    values = {(r["set"], r["kind"]): r["value"] for r in summary.rank_correlations(found)}
    # true ranks tie in pairs: by Pearson on ranks 0.9759
    assert values["up", "lq"] == pytest.approx(0.9759, abs=1e-4)
    assert values["down", "lq"] == pytest.approx(-0.9759, abs=1e-4)
    assert abs(values["all", "lq"]) < 0.1
    # where there is one set, all sets are no row of their own
    assert [row["set"] for row in summary.rank_correlations(found[:8])] == ["up"]


def reported(measurements: list[Measurement]) -> str:
    settings = {"split": "test", "seed": 0, "pipeline": {"model": "nano"}, "min_region_area": 1000}
    return report.tables({"settings": settings, **summary.summarise(measurements, 0)})


def rows_of(text: str, title: str) -> list[list[str]]:
    lines = text.split(f"{title}\n\n")[1].split("\n\n")
    table = next(part for part in lines if part.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_a_row_a_condition_and_all_modes() -> None:
    # clear and lq-3, one region each
    measurements = evaluator(Blind()).measure(case(rectangles(), CLEAR, NIGHT))
    text = reported(measurements)
    rows = rows_of(text, "## Everything mode")
    assert rows[0][:3] == ["set", "condition", "mean best IoU off / always / auto"]
    assert [row[:2] for row in rows[2:]] == [["made", "clear"], ["made", "low_light-3"]]
    assert rows[3][2].startswith("0.0 / 9")
    for title in ("## Three random points", "## Box"):
        assert rows_of(text, title)[2][2] == "100.0 / 100.0 / 100.0"
    assert rows_of(text, "## Degradation level")[3][2:4] == ["1.00 [1.00, 1.00]", "100 %"]
    assert "At worst automatic mode is +0.00 points from always: made, clear, three random points." in text


class StartsInterrupted:
    """Work that a process is told of in the moment of a Ctrl-C, while it starts."""

    def __reduce__(self) -> Any:
        return _after_an_interrupt, ()


def _after_an_interrupt() -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    return partial(int, 10)


def test_an_interrupt_does_not_reach_the_processes_while_they_start() -> None:
    assert list(pool.share(StartsInterrupted(), operator.add, range(5), 2)) == [10, 11, 12, 13, 14]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class InterruptsItsParent:
    """Work that is handed to a process in the moment of a Ctrl-C."""

    def __init__(self) -> None:
        self.handed_over: list[bool] = []

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000):  # Python looks for signals between two instructions
            pass
        self.handed_over.append(True)
        return partial, (int, 10)


def test_an_interrupt_waits_until_a_process_has_begun_whichever_thread_takes_it() -> None:
    ended = threading.Event()
    idle = threading.Thread(target=ended.wait, daemon=True)
    idle.start()
    work, own = InterruptsItsParent(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(pool.share(work, operator.add, range(5), 2))  # type: ignore[arg-type]
    finally:
        ended.set()
        idle.join()
    assert work.handed_over == [True] and signal.getsignal(signal.SIGINT) is own


def test_table_says_gain_with_interval_and_share() -> None:
    assert rows_of(reported(two_photographs()), "## Three random points")[2][-1] == "+10.0 [+10.0, +10.0] (+25 %)"


def test_table_of_baselines_names_the_best_restorer() -> None:
    values = {
        (m, "points_iou"): [v] for m, v in (("off", 0.3), ("always", 0.5), ("classical", 0.2), ("zero_dce", 0.4))
    }
    others = {key: value for key, value in values.items() if key[0] != "zero_dce"}
    text = reported([measurement(1, NIGHT, values), measurement(0, CLEAR, others)])
    dark, clear = rows_of(text, "### Three random points, IoU")[2:]
    assert dark == ["made", "low_light-3", "30.0", "50.0", "20.0", "40.0", "Zero-DCE", "+10.0 [+10.0, +10.0] (+25 %)"]
    assert clear[5:7] == ["-", "classical (OpenCV)"]


def test_where_no_restorer_was_measured_the_table_names_none() -> None:
    clear = {("off", "points_iou"): [0.3], ("always", "points_iou"): [0.5]}
    rain = {**clear, ("prenet", "points_iou"): [0.4]}
    text = reported([measurement(1, Condition("rain", 1), rain), measurement(0, CLEAR, clear)])
    first, second = rows_of(text, "### Three random points, IoU")[2:]
    assert first[4:] == ["40.0", "PReNet", "+10.0 [+10.0, +10.0] (+25 %)"]
    assert second == ["made", "clear", "30.0", "50.0", "-", "-", "-"]


# plots


def test_sets_of_different_levels_share_the_plots(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'glesam_ros[evaluate]'")
    values = {(mode, "points_iou"): [0.5] for mode in ("off", "always")}
    levels = {"coco": (1, 2, 3), "lqseg": (3,), "low": (1,)}
    found = [
        measurement(1, condition, values, set_name=name)
        for name, some in levels.items() for condition in (CLEAR, *(Condition("lq", level) for level in some))
    ]
    settings = {"kinds": ["lq"], "pipeline": {"enhance_above": 0.25}}
    results = {"settings": settings, **summary.summarise(found, 0)}
    assert [path.name for path in plots.draw_plots(results, found, tmp_path)] == [
        "by_level.png", "gains.png", "levels.png"
    ]
    figure = plots._by_level(results)
    drawn = [np.rint(np.asarray(panel.containers[0].lines[0].get_xdata(), float)).tolist() for panel in figure.axes]
    assert drawn == [[0, 1, 2, 3], [0, 3], [0, 1]]


# contact sheets


def test_best_median_and_worst_by_gain() -> None:
    gains = {name: value for name, value in zip("abcdefg", (0.3, -0.2, 0.1, 0.0, 0.5, 0.2, -0.1))}
    # falling: e a f c d g b
    assert sheet.ranked(gains, 1) == [("best", "e"), ("median", "c"), ("worst", "b")]
    assert [n for _, n in sheet.ranked(gains, 2)] == ["e", "a", "f", "c", "g", "b"]
    assert [n for _, n in sheet.ranked(gains, 5)] == ["e", "a", "f", "c", "g", "b"]  # none twice
    assert sheet.ranked({"x": 0.1, "y": 0.2}, 1) == [("case", "y"), ("case", "x")]


def test_choice_looks_at_one_condition() -> None:
    def at(name: str, condition: Condition, gain: float) -> Measurement:
        return measurement(1, condition, {("off", "points_iou"): [0.2], ("always", "points_iou"): [0.2 + gain]}, name)

    found = [at(name, NIGHT, gain) for name, gain in (("a", 0.1), ("b", 0.3), ("c", 0.2))]
    found += [at(name, CLEAR, 0.5) for name in "abc"]
    assert sheet.choose(found, NIGHT, "points_iou", 1) == [("best", "b"), ("median", "c"), ("worst", "a")]


def test_masks_are_painted_in_their_colours_small_ones_on_top() -> None:
    image = np.zeros((sheet.TILE[1], sheet.TILE[0], 3), np.uint8)
    masks = np.zeros((2, *image.shape[:2]), np.bool_)
    masks[0, 100:150, 100:150] = True
    masks[1, 50:200, 50:250] = True
    out = sheet.paint(image, masks, PALETTE[:2])
    assert out.shape == image.shape
    np.testing.assert_allclose(out[125, 125], PALETTE[0] / 2 + PALETTE[1] / 4, atol=1.5)  # half over half of the other
    np.testing.assert_array_equal(out[100, 120], PALETTE[0])  # contours are opaque
    np.testing.assert_allclose(out[60, 60], PALETTE[1] / 2, atol=1)
    assert not out[10, 10].any()


def test_a_row_of_a_case_and_the_sheet() -> None:
    pictures = evaluator(Blind(), prompts=("points",)).pictures(case(rectangles(), CLEAR, NIGHT), NIGHT, "points")
    row = sheet.case_tiles("best", pictures)
    assert [tile.caption.split(":")[0] for tile in row] == ["best", "low_light-3", "off", "enhanced", "truth"]
    assert re.fullmatch(r"enhanced: IoU [\d.]+ \([+-][\d.]+\)", row[3].caption)
    drawn = sheet.sheet([row, row], "a title")
    assert drawn.dtype == np.uint8 and drawn.shape[1] > 5 * sheet.TILE[0] and drawn.shape[0] > 2 * sheet.TILE[1]
    with pytest.raises(ValueError, match="all of the same length, got \\[5, 4\\]"):
        sheet.sheet([row, row[:4]], "a title")


# photographs without masks


def unlabelled(name: str = "night") -> agreement.Unlabelled:
    return agreement.Unlabelled(name, rectangles().image, (NIGHT,))


def test_agreement_by_hand() -> None:
    found = agreement.agree(evaluator(Blind()), unlabelled())
    values = found.values
    # the photograph is bright, so all find both rectangles there; degraded, only the enhanced one does
    assert values["low_light-3", "off", "own"] == values["low_light-3", "off", "plain"] == 0
    assert values["low_light-3", "always", "plain"] > 0.9
    assert values["low_light-3", "auto", "own"] == values["low_light-3", "always", "plain"]
    result = agreement.summarise_agreement([found, found], ("off", "always", "auto"), 0)
    gain = next(g for g in result["gains"] if g["metric"] == "plain")
    assert gain["difference"] == pytest.approx(values["low_light-3", "always", "plain"])
    assert gain["relative"] is None and gain["share_better"] == 1.0
    assert result["photographs"] == 2 and result["left_out"] == []
    json.dumps(result, allow_nan=False)


def test_photographs_without_any_mask_are_left_out_and_named() -> None:
    black = agreement.Unlabelled("black", np.zeros((60, 80, 3), np.uint8), (NIGHT,))
    one = evaluator(Blind())
    result = agreement.summarise_agreement([agreement.agree(one, p) for p in (black, unlabelled())], ("off",), 0)
    assert result["photographs"] == 1 and result["left_out"] == ["black"]


def test_a_mask_that_was_found_again_keeps_its_colour() -> None:
    tiles = agreement.agreement_tiles(evaluator(Blind()), "best", unlabelled(), NIGHT)
    assert [t.caption for t in tiles[1:3]] == ["2 masks of the photograph", "low_light-3, measured level 1.00"]
    assert tiles[3].caption == "off: agreement 0.0"
    inside = tiles[4].image.shape[0] * 45 // 160, tiles[4].image.shape[1] * 70 // 200
    colour = tiles[4].image[inside] - 0.5 * sheet.fit(tiles[2].image)[inside]
    np.testing.assert_allclose(colour, 0.5 * PALETTE[0], atol=1.5)


def test_masks_alone_show_nothing_of_the_photograph() -> None:
    tiles = agreement.agreement_tiles(evaluator(Blind()), "best", unlabelled(), NIGHT, alone=True)
    captions = [t.caption for t in tiles]
    assert captions[:2] == ["best: night, 2 masks of the photograph", "off: agreement 0.0"] and len(tiles) == 3
    assert not tiles[1].image.any()
    shown = {tuple(pixel) for tile in tiles for pixel in tile.image.reshape(-1, 3).tolist()}
    halved = np.round(PALETTE[:2].astype(np.float32) * 0.5).astype(int)
    assert shown <= {(0, 0, 0), *map(tuple, PALETTE[:2].tolist()), *map(tuple, halved.tolist())}


# several processes


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    found = pool.share(partial(int, 10), operator.add, range(20), workers)
    assert list(found) == list(range(10, 30))


def test_a_failure_in_another_process_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        list(pool.share(partial(int, 10), operator.truediv, [5, 0, 2], 2))


def test_tasks_are_taken_as_they_are_worked_off() -> None:
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield number

    results = pool.share(partial(int, 0), operator.add, tasks(), 1)
    assert next(results) == 0 and taken == [0]


def test_no_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        next(pool.share(partial(int, 0), operator.add, [1], 0))
