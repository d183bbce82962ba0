"""Figures of maps of classes: known answers, properties, and the protocol on pictures whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")

from glesam_ros.degradation import degrade  # noqa: E402
from glesam_ros.evaluation.protocol import CLEAR, Condition, photograph_seed  # noqa: E402
from glesam_ros.evaluation.semantic import (  # noqa: E402
    OTHER,
    ClassMatch,
    Method,
    SemanticEvaluator,
    SemanticMeasurement,
    SemanticOptions,
    model_labels,
    open_semantic_evaluator,
    read_classes_map,
)
from glesam_ros.evaluation.semantic_metrics import (  # noqa: E402
    METRICS,
    class_counts,
    class_ious,
    confusion,
    figures,
    resampled,
)
from glesam_ros.evaluation.semantic_report import choose_pictures, legend, paint_classes, semantic_tables  # noqa: E402
from glesam_ros.evaluation.semantic_summary import Tally, summarise_semantic  # noqa: E402
from glesam_ros.labelled import LabelledFolder, open_labelled  # noqa: E402
from glesam_ros.models import registry  # noqa: E402
from glesam_ros.semantic import SemanticSegmenter  # noqa: E402

NIGHT, RAIN = Condition("low_light", 3), Condition("rain", 2)
COLOURS = {"road": (120, 60, 120), "car": (20, 40, 220), "tree": (30, 200, 40)}


class NearestColour:
    """A model that takes each pixel for the class of the nearest colour; it remembers what it saw."""

    name, device = "nearest", "cpu"

    def __init__(self, colours: dict[str, tuple[int, int, int]] = COLOURS, scale: float = 1.0) -> None:
        self.classes = tuple(colours)
        self.palette = np.array(list(colours.values()), np.uint8)
        self.scale = scale
        self.seen: list[np.ndarray] = []

    def logits(self, image: np.ndarray) -> np.ndarray:
        self.seen.append(image)
        distance = image[..., None, :] * self.scale - self.palette.astype(np.float32)
        return np.moveaxis(-(distance**2).sum(-1), -1, 0).astype(np.float32) / 1000

    def free(self) -> None: ...

    def close(self) -> None: ...


def segmenter(**more: object) -> SemanticSegmenter:
    return SemanticSegmenter(NearestColour(**more))


def picture(shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three stripes in the colours of their classes, and a column without a class."""
    labels = np.repeat(np.arange(3), 20)[:, None].repeat(64, 1).astype(np.uint8)
    labels = np.roll(labels, shift, 0)
    image = np.array(list(COLOURS.values()), np.uint8)[labels]
    labels[:, 0] = 255
    return image, labels


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    """Four pictures."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.json").write_text(json.dumps({
        "classes": list(COLOURS), "palette": [[200, 0, 0], [0, 200, 0], [0, 0, 200]],
    }))
    for number in range(4):
        image, labels = picture(6 * number)
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        cv2.imwrite(str(tmp_path / "labels" / f"{number}.png"), labels)
    return open_labelled(tmp_path, "all")


def tally_of(evaluator: SemanticEvaluator) -> Tally:
    tally = Tally(evaluator.classes)
    for index in range(len(evaluator.folder)):
        for measurement in evaluator.measure(index):
            tally.add(measurement)
    return tally


def made(*rows: dict[str, list[list[int]]], condition: Condition = CLEAR) -> Tally:
    """A tally of a dict a picture, method -> (K, K) or (K, K + 1) matrix."""
    tally = Tally(tuple("abc"[: len(next(iter(rows[0].values())))]))
    for number, row in enumerate(rows):
        full = {}
        for name, matrix in row.items():
            m = np.array(matrix, np.int64)
            full[Method(*name.split(" + ")[::-1])] = np.pad(m, ((0, 0), (0, len(m) + 1 - m.shape[1])))
        tally.add(SemanticMeasurement(str(number), condition, full, 0.0))
    return tally


def test_confusion_counts_pixels_by_true_and_predicted_class() -> None:
    truth = [[0, 0, 1], [1, 255, 2]]
    predicted = [[0, 1, 1], [2, 0, 0]]  # 2 is another class, and so is the truth 2: it does not count
    assert confusion(truth, predicted, 2).tolist() == [[1, 1, 0], [0, 1, 1]]
    assert confusion(np.array(truth, np.uint8), np.array(predicted, np.uint16), 2).sum() == 4
    assert confusion([[255]], [[0]], 2).sum() == 0
    with pytest.raises(ValueError, match=r"expected 0\.\.2, got 0 \.\. 3"):
        confusion([[0, 0]], [[0, 3]], 2)
    with pytest.raises(ValueError, match="same shape"):
        confusion([[0, 0]], [[0]], 2)


def test_figures_of_a_matrix_worked_out_by_hand() -> None:
    # true a: 6 hit, 2 taken for b, 2 for no class of the set; true b: 3 hit, 1 taken for a; c is nowhere
    matrix = np.array([[6, 2, 0, 2], [1, 3, 0, 0], [0, 0, 0, 0]])
    counts = class_counts(matrix)
    assert counts.tolist() == [[6, 3, 0], [10, 4, 0], [7, 5, 0]]
    ious = class_ious(counts)
    assert ious[:2].tolist() == pytest.approx([6 / 11, 3 / 6]) and np.isnan(ious[2])
    found = figures(counts)
    assert found["miou"] == pytest.approx((6 / 11 + 3 / 6) / 2)  # c is left out
    assert found["pixel_accuracy"] == pytest.approx(9 / 14)
    assert found["class_accuracy"] == pytest.approx((6 / 10 + 3 / 4) / 2)


def test_a_class_that_is_only_predicted_counts_in_no_mean() -> None:
    """As in detectron2's SemSegEvaluator; its pixels lower the class that they belong to."""
    found = figures(class_counts(np.array([[5, 5, 0], [0, 0, 0]])))
    assert (found["miou"], found["class_accuracy"]) == (0.5, 0.5)


def test_no_pixels_no_figures() -> None:
    assert all(np.isnan(value) for value in figures(np.zeros((3, 2))).values())


def test_figures_agree_with_masks_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 6, (2, 40, 50))
    predicted[:, :25] = truth[:, :25]
    truth[rng.random(truth.shape) < 0.1] = 255
    known = truth != 255
    ious, accuracies = [], []
    for k in range(6):
        t, p = (truth == k) & known, (predicted == k) & known
        ious.append((t & p).sum() / (t | p).sum())
        accuracies.append((t & p).sum() / t.sum())
    found = figures(class_counts(confusion(truth, predicted, 6)))
    assert found["miou"] == pytest.approx(np.mean(ious))
    assert found["class_accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["pixel_accuracy"] == pytest.approx((truth == predicted)[known].mean())


def test_pictures_are_added_up_before_the_division() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, (2, 8, 10, 12))
    tally = Tally(("a", "b", "c"))
    for k, (t, p) in enumerate(zip(truth, predicted)):
        tally.add(SemanticMeasurement(str(k), CLEAR, {Method("m"): confusion(t, p, 3)}, 0.0))
    whole = figures(class_counts(confusion(truth.reshape(80, 12), predicted.reshape(80, 12), 3)))
    rows = {row["metric"]: row for row in summarise_semantic(tally, 0)["rows"]}
    for metric in METRICS:
        assert rows[metric]["value"] == pytest.approx(float(whole[metric]))
        assert rows[metric]["low"] <= rows[metric]["value"] <= rows[metric]["high"]
    assert tally.pictures == [str(k) for k in range(8)]


def test_resampling_draws_the_same_pictures_whatever_the_columns() -> None:
    rows = np.arange(12.0).reshape(6, 2)
    both, one = resampled(rows, 3, 500), resampled(rows[:, 1], 3, 500)
    assert both.shape == (500, 2) and np.array_equal(both[:, 1], one)
    assert np.array_equal(both[:, 1] - both[:, 0], np.full(500, 6.0))  # six drawn, each with a difference of one
    assert both[:, 0].mean() == pytest.approx(rows[:, 0].sum(), rel=0.1) and both[:, 0].std() > 1
    assert np.array_equal(resampled(rows, 3, 500), both) and not np.array_equal(resampled(rows, 4, 500), both)
    assert np.array_equal(resampled(np.ones((5, 3, 2)), 0, 7), np.full((7, 3, 2), 5.0))
    with pytest.raises(ValueError, match="at least one picture"):
        resampled(np.zeros((0, 3)), 0)


def test_interval_of_a_mean_is_that_of_the_bootstrap_of_masks() -> None:
    from glesam_ros.evaluation.metrics import bootstrap_interval

    rng = np.random.default_rng(5)
    hits = rng.integers(20, 100, 40)
    # of 100 pixels each, so that the pixel accuracy of a draw is the mean of those of its pictures
    found = summarise_semantic(made(*({"m": [[int(h), 100 - int(h)], [0, 0]]} for h in hits)), 9)
    row = next(row for row in found["rows"] if row["metric"] == "pixel_accuracy")
    low, high = bootstrap_interval(hits / 100, 9)
    # the same method, other draws
    assert (row["low"], row["high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(2)
    pictures = []
    for hit in rng.integers(10, 80, 30).tolist():  # easy and hard pictures; the first is always 10 pixels better
        pictures.append({"first": [[hit + 10, 90 - hit]] + [[0, 0]], "other": [[hit, 100 - hit]] + [[0, 0]]})
    found = summarise_semantic(made(*pictures), 0)
    row = {(r["method"], r["metric"]): r for r in found["rows"]}["first", "pixel_accuracy"]
    assert row["high"] - row["low"] > 0.08
    [difference] = [d for d in found["differences"] if d["metric"] == "pixel_accuracy"]
    assert (difference["method"], difference["over"]) == ("first", "other")
    for name in ("difference", "low", "high"):
        assert difference[name] == pytest.approx(0.1)
    other = {(r["method"], r["metric"]): r for r in found["rows"]}["other", "pixel_accuracy"]
    assert difference["relative"] == pytest.approx(0.1 / other["value"])
    assert difference["relative_low"] < difference["relative"] < difference["relative_high"]


def test_every_method_is_compared_with_the_first_and_every_restorer_of_another_model_with_that() -> None:
    good, bad = [[9, 1], [1, 9]], [[5, 5], [5, 5]]
    found = summarise_semantic(made({"m": good, "clear": bad, "r + m": bad, "r + clear": good}), 0)
    pairs = {(d["method"], d["over"]): d["difference"] for d in found["differences"] if d["metric"] == "miou"}
    gain = 9 / 11 - 1 / 3
    assert pairs == {
        ("m", "clear"): pytest.approx(gain), ("m", "r + m"): pytest.approx(gain), ("m", "r + clear"): pytest.approx(0),
        ("r + clear", "clear"): pytest.approx(gain),
    }


def test_a_class_row_says_what_the_class_was_taken_for() -> None:
    found = summarise_semantic(made({"m": [[7, 1, 2, 0], [0, 0, 0, 5], [0, 0, 0, 0]]}), 0)
    a, b, c = found["by_class"]
    assert (a["class"], a["share"], a["mistaken_for"], a["mistaken_share"]) == ("a", 10 / 15, "c", 0.2)
    assert a["iou"] == pytest.approx(0.7) and a["low"] == a["high"] == pytest.approx(0.7)
    assert (b["mistaken_for"], b["mistaken_share"], b["iou"]) == (OTHER, 1.0, 0.0)
    assert (c["share"], c["mistaken_for"], c["iou"]) == (0.0, None, 0.0)  # predicted, never there
    json.dumps(found, allow_nan=False)


def test_a_class_that_is_nowhere_has_no_figure() -> None:
    found = summarise_semantic(made({"m": [[3, 0], [0, 0]]}), 0)
    assert [row["iou"] for row in found["by_class"]] == [1.0, None]
    assert found["by_class"][1]["low"] is None
    with pytest.raises(ValueError, match="pixel that has a class"):
        summarise_semantic(made({"m": [[0, 0], [0, 0]]}), 0)


def test_classes_are_matched_by_name() -> None:
    match = ClassMatch(("road", "car", "tree"))
    assert match.table("m", ("tree", "sky", "road", "car")).tolist() == [2, 3, 0, 1]
    with pytest.raises(ValueError, match=r"^m: expected all classes of the data set, car, tree missing; .* road, sky"):
        match.table("m", ("road", "sky"))
    assert match.truth(np.array([[2, 0, 255]], np.uint8)).tolist() == [[2, 0, 3]]
    with pytest.raises(ValueError, match="car, tree, clock.* and 128 more missing"):  # of 150, two are there
        ClassMatch(("road", "car", "tree", "clock", *(f"c{k}" for k in range(146)))).table("m", ("road", "c0"))


def test_classes_map_renames_joins_and_leaves_out() -> None:
    match = ClassMatch(("road", "pavement", "car", "wire"), {"road": "ground", "pavement": "ground", "wire": None})
    assert match.classes == ("ground", "car")
    assert match.truth(np.array([[0, 1, 2, 3, 255]], np.uint8)).tolist() == [[0, 0, 1, 2, 2]]
    assert match.table("m", ("car", "ground", "wire")).tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match=r"classes of the data set \(road\), got street"):
        ClassMatch(("road",), {"street": "road"})
    with pytest.raises(ValueError, match="at least one class"):
        ClassMatch(("road",), {"road": None})


@pytest.mark.parametrize("text", ['["road"]', '{"road": 1}', "{"])
def test_classes_map_file_that_is_wrong(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ValueError, match="map.json: expected"):
        read_classes_map(tmp_path / "map.json")


def test_a_perfect_model_gets_full_marks_also_with_other_classes_in_another_order(folder: LabelledFolder) -> None:
    turned = {"sky": (250, 250, 250), **dict(reversed(COLOURS.items()))}
    evaluator = SemanticEvaluator(folder, {"own": segmenter(), "turned": segmenter(colours=turned)})
    results = summarise_semantic(tally_of(evaluator), 0)
    assert {row["value"] for row in results["rows"]} == {1.0} and len(results["rows"]) == 2 * len(METRICS)
    assert results["counts"] == {"pictures": 4, "pixels": 4 * 60 * 63}
    assert np.array_equal(evaluator.palette, folder.palette)


def test_the_degraded_picture_is_the_same_for_every_model_and_in_every_run(folder: LabelledFolder) -> None:
    found = []
    for order in (["a", "b"], ["b"]):
        models = {name: NearestColour() for name in order}
        evaluator = SemanticEvaluator(
            folder, {name: SemanticSegmenter(model) for name, model in models.items()}, conditions=(CLEAR, NIGHT),
            seed=5,
        )
        evaluator.measure(2)
        found += [model.seen for model in models.values()]
    expected = degrade(picture(12)[0], "low_light", 3, photograph_seed(5, "semantic", "2")).image
    for clear, dark in found:
        assert np.array_equal(clear, picture(12)[0]) and np.array_equal(dark, expected)


def test_restorers_come_before_every_model_and_only_where_they_are_made_for(folder: LabelledFolder) -> None:
    def inverted(image: np.ndarray) -> np.ndarray:
        return 255 - image

    models = {"m": NearestColour(), "n": NearestColour()}
    evaluator = SemanticEvaluator(
        folder, {name: SemanticSegmenter(model) for name, model in models.items()},
        {"classical": inverted, "prenet": lambda image: image}, (CLEAR, RAIN),
    )
    clear, rain = evaluator.measure(0)
    assert list(clear.matrices) == [Method("m"), Method("n"), Method("m", "classical"), Method("n", "classical")]
    assert {method.restorer for method in rain.matrices} == {"", "classical", "prenet"}
    assert Method("m", "prenet").name == "prenet + m"
    assert np.array_equal(models["n"].seen[1], 255 - picture()[0])
    assert clear.matrices[Method("m")].trace() == 60 * 63 > clear.matrices[Method("m", "classical")].trace()
    assert np.array_equal(rain.matrices[Method("m", "prenet")], rain.matrices[Method("m")])


def test_models_and_restorers_are_closed(folder: LabelledFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(NearestColour):
        def restore(self, image: np.ndarray, classes: tuple[str, ...] = ()) -> np.ndarray:
            return image

        def close(self) -> None:
            closed.append(self)

    closed: list[Closing] = []
    model, restorer = Closing(), Closing()
    monkeypatch.setattr(registry, "_SEMANTIC", {"model": lambda device, precision: model})
    monkeypatch.setattr(registry, "_RESTORERS", {"restorer": lambda device, precision: restorer})
    data = folder.images[0].parents[1]
    evaluator = open_semantic_evaluator(
        SemanticOptions(data, "all", ("model",), restorers=("restorer", "classical"))
    )
    assert list(evaluator.restorers) == ["restorer", "classical"]
    evaluator.close()
    assert closed == [model, restorer]


def test_report_shows_the_figures_of_the_results(folder: LabelledFolder) -> None:
    blind = segmenter(scale=0.2)
    evaluator = SemanticEvaluator(
        folder, {"good": segmenter(), "blind": blind}, {"classical": lambda image: image}, (CLEAR, NIGHT)
    )
    results = {"settings": {"set": "made", "split": "all", "seed": 0}, **summarise_semantic(tally_of(evaluator), 0)}
    text = semantic_tables(results)
    assert "made: 4 pictures, 3 classes (split all, seed 0)" in text
    cells = {(row["condition"], row["method"], row["metric"]): row["value"] for row in results["rows"]}
    assert cells["clear", "good", "miou"] == 1.0 > cells["clear", "blind", "miou"]
    iou = f"{100 * cells['low_light-3', 'blind', 'miou']:.1f}"
    assert any(line.startswith("| low_light-3") and f" {iou} [" in line for line in text.splitlines())
    assert "classical (OpenCV) + blind over blind" in text and "good over blind" in text
    assert [line.split("|")[1].strip() for line in text.splitlines()[-3:]] == list(COLOURS)


def test_pictures_for_the_sheet_are_ordered_by_gain() -> None:
    rows = [{"m": [[5 + k, 5 - k], [0, 10]], "n": [[5, 5], [0, 10]]} for k in (1, 4, 0, 3, 2)]
    tally = made(*rows, {"m": [[0, 0], [0, 0]], "n": [[0, 0], [0, 0]]})  # the last has no class anywhere
    assert choose_pictures(tally, CLEAR, 1) == [("best", 1), ("median", 4), ("worst", 2)]
    alone = made(*({"m": row["n"] if k else row["m"]} for k, row in enumerate(rows)))
    assert choose_pictures(alone, CLEAR, 1)[0] == ("best", 0)


def test_pictures_show_truth_and_every_method(folder: LabelledFolder) -> None:
    evaluator = SemanticEvaluator(folder, {"m": segmenter()}, {"classical": lambda image: image}, (CLEAR, NIGHT))
    shown = evaluator.pictures(1, NIGHT)
    assert shown.name == "1" and list(shown.predictions) == [Method("m"), Method("m", "classical")]
    assert np.array_equal(shown.clear, picture(6)[0]) and shown.image.mean() < shown.clear.mean()
    assert (shown.truth[:, 0] == 3).all() and shown.truth[0, 5] in (0, 1, 2)
    image = np.full((60, 64, 3), 100, np.uint8)
    painted = paint_classes(image, shown.truth, np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8))
    assert painted[5, 1].tolist() == [35, 35, 35]  # no class: darker
    assert sorted(painted[5, 100].tolist()) == [35, 35, 201]
    strip = legend(("road", "car"), np.array([[255, 0, 0], [0, 255, 0]], np.uint8), 400)
    assert strip.shape == (24, 400, 3)
    assert strip[10, 17].tolist() == [255, 0, 0] and strip[10, 167].tolist() == [0, 255, 0]


def test_models_are_named_so_that_the_tables_can_tell_them_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "clear" / "export", tmp_path / "mixed" / "export"
    assert model_labels(["rass-nano", str(one)]) == {"rass-nano": "rass-nano", "export": str(one)}
    file = str(two / "rass_nano.onnx")
    assert model_labels([str(one), file]) == {"clear/export": str(one), "mixed/export": file}
    with pytest.raises(ValueError, match="each once"):
        model_labels(["rass-nano", "rass-nano"])
