"""`glesam semantic` and `glesam evaluate-semantic` from the outside."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx", reason="the test makes its own weights with onnx: pip install 'glesam_ros[train]'")
Image = pytest.importorskip("PIL.Image", reason="label maps need pillow; scripts/test.sh installs it")

import test_rass_nano as tiny_rass_nano  # noqa: E402

from glesam_ros.cli.main import main, make_parser  # noqa: E402
from glesam_ros.cli.pictures import read_picture  # noqa: E402
from glesam_ros.evaluation import semantic  # noqa: E402
from glesam_ros.models import onnx_session, registry  # noqa: E402

CLASSES = list(tiny_rass_nano.COLOURS)
SIZE = (64, 96)


def scene(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Four upright stripes in the colours of the classes, and their labels; the lowest rows have no class."""
    labels = np.roll(np.repeat(np.arange(4, dtype=np.uint8), SIZE[1] // 4)[None].repeat(SIZE[0], 0), shift, 1)
    image = np.array(list(tiny_rass_nano.COLOURS.values()), np.uint8)[labels]
    labels[-8:] = 255
    return image, labels


def write(path: Path, rgb: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb if rgb.ndim == 2 else cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    return path


class Stopping:
    """A function that is stopped by Ctrl-C once it was called so often."""

    def __init__(self, function: Callable[..., Any], after: int) -> None:
        self.function, self.after, self.calls = function, after, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return self.function(*arguments)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tiny_rass_nano.write(tmp_path / "weights")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures to test, one to train."""
    root = tmp_path / "street"
    for number in range(4):
        image, labels = scene(8 * number)
        write(root / "images" / f"{number}.png", image)
        write(root / "labels" / f"{number}.png", labels)
    (root / "test.txt").write_text("0\n1\n2\n")
    (root / "train.txt").write_text("3\n")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return root


def evaluate(*arguments: object) -> int:
    return main(["evaluate-semantic", "--workers", "1", *map(str, arguments)])


def values(out: Path) -> dict[tuple[str, str, str], float]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {(row["condition"], row["method"], row["metric"]): row["value"] for row in rows}


def one_line(capsys, command: str) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"glesam {command}: error: ")
    return lines[0]


@pytest.mark.parametrize("command", ["semantic", "evaluate-semantic"])
def test_help_teaches_by_examples_that_parse(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    examples = re.findall(rf"^  (glesam {command} .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        assert make_parser().parse_args(example.split()[1:]).command == command


def test_everything_is_written_and_said(data: Path, weights: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert evaluate("--data", data, "--out", out, "--model", weights, "--kinds", "lq", "--levels", 1, 3,
                    "--baselines", "classical") == 0
    written = {path.name for path in out.iterdir()}
    # two levels and clear make a curve; without matplotlib there is none
    assert written - {"by_level.png"} == {"table.md", "results.json", "pictures.csv", "sheet.jpg"}
    if importlib.util.find_spec("matplotlib"):
        assert cv2.imread(str(out / "by_level.png")) is not None
    found = values(out)
    assert {condition for condition, *_ in found} == {"clear", "lq-1", "lq-3"}
    assert {method for _, method, _ in found} == {"weights", "classical + weights"}
    # labels are found at a quarter of the size, and stripes end at multiples of 4
    assert found["clear", "weights", "pixel_accuracy"] > 0.99
    assert found["clear", "weights", "miou"] > found["lq-1", "weights", "miou"] > found["lq-3", "weights", "miou"]
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "street: 3 pictures, 4 classes (split test, seed 0)" in text
    assert f"| {100 * found['lq-3', 'weights', 'miou']:.1f} [" in text
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"settings", "versions", "counts", "classes", "rows", "by_class", "differences"}
    assert results["counts"]["pixels"] == 3 * 56 * 96 and results["classes"] == CLASSES
    assert set(results["settings"]["weights"]) == {"weights"}
    assert str(tmp_path) not in (out / "results.json").read_text()  # it may be published
    with (out / "pictures.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["picture"] for line in lines} == {"0", "1", "2"} and len(lines) == 3 * 3 * 2 * 3
    height, width = cv2.imread(str(out / "sheet.jpg")).shape[:2]
    assert width > 5 * 360 and height > 3 * 250  # frame, degraded, truth, two methods; three pictures


def test_a_model_trained_otherwise_stands_in_the_same_table(data: Path, weights: Path, tmp_path: Path) -> None:
    # the same graph with the names of two classes exchanged: half of its pixels are wrong
    turned = [CLASSES[1], CLASSES[0], *CLASSES[2:]]
    other = tiny_rass_nano.write(tmp_path / "clear_only", classes=turned)
    out = tmp_path / "out"
    assert evaluate("--data", data, "--out", out, "--model", weights, "--compare", other, "--kinds", "none",
                    "--no-sheet") == 0
    found = values(out)
    assert found["clear", "clear_only", "pixel_accuracy"] == pytest.approx(0.5, abs=0.03)
    [difference] = [d for d in json.loads((out / "results.json").read_text())["differences"] if d["metric"] == "miou"]
    assert (difference["method"], difference["over"]) == ("weights", "clear_only")
    assert difference["low"] > 0.3 and not (out / "sheet.jpg").exists()


class Always:
    """A model that takes every pixel for the second class, and restores every picture to white."""

    name, device = "always", "cpu"
    classes = tuple(CLASSES)
    palette = np.arange(12, dtype=np.uint8).reshape(4, 3)

    def logits(self, image: np.ndarray) -> np.ndarray:
        white = float((image == 255).all())
        return np.array([0.0, 1.0, 0.0, 2 * white], np.float32)[:, None, None]

    def restore(self, image: np.ndarray, classes: tuple[str, ...] = ()) -> np.ndarray:
        return np.full_like(image, 255)

    def free(self) -> None: ...

    def close(self) -> None: ...


def test_registered_models_and_restorers_are_measured(data: Path, weights: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_SEMANTIC", {"always": lambda device, precision: Always()})
    monkeypatch.setattr(registry, "_RESTORERS", {"white": lambda device, precision: Always()})
    out = tmp_path / "out"
    assert evaluate("--data", data, "--out", out, "--model", "always", "--compare", weights, "--kinds", "none",
                    "--baselines", "white", "--no-sheet") == 0
    found = {method: value for (_, method, metric), value in values(out).items() if metric == "pixel_accuracy"}
    assert list(found) == ["always", "weights", "white + always", "white + weights"]
    # each class has a quarter of the pixels: always sky, and snow where all is white
    assert [found[name] for name in ("always", "white + always", "white + weights")] == [0.25, 0.25, 0.25]
    rows = json.loads((out / "results.json").read_text())["by_class"]
    ious = {(row["method"], row["class"]): row["iou"] for row in rows}
    assert ious["always", "sky"] == ious["white + always", "snow"] == ious["white + weights", "snow"] == 0.25
    assert ious["always", "snow"] == 0


def test_figures_do_not_depend_on_the_number_of_processes(data: Path, weights: Path, tmp_path: Path) -> None:
    common = ("--data", data, "--model", weights, "--kinds", "lq", "--levels", 3, "--no-sheet")
    for workers in (1, 2):
        assert evaluate(*common, "--out", tmp_path / str(workers), "--workers", workers) == 0
    for name in ("results.json", "pictures.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("device, gpu, several", [
    ("auto", False, True), ("auto", True, False), ("cpu", True, True), ("cuda", True, False),
])
def test_processes_share_no_gpu_unless_told(device, gpu, several, data: Path, tmp_path: Path, monkeypatch) -> None:
    def opened(options: semantic.SemanticOptions) -> None:
        asked.append(options.threads)
        raise ValueError("enough")

    asked: list[int] = []
    providers = [*(["CUDAExecutionProvider"] if gpu else []), "CPUExecutionProvider"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(onnx_session.ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(semantic, "open_semantic_evaluator", opened)
    command = ["evaluate-semantic", "--data", str(data), "--out", str(tmp_path / "out"), "--device", device]
    assert main(command) == main([*command, "--workers", "2"]) == 1
    assert asked == [1 if several else 0, 1]  # of several processes each has one thread


def test_figures_of_a_picture_do_not_depend_on_the_others(data: Path, weights: Path, tmp_path: Path) -> None:
    common = ("--data", data, "--model", weights, "--kinds", "lq", "--levels", 3, "--no-sheet")
    found = []
    for name, more in (("all", ()), ("one", ("--limit", 1))):
        assert evaluate(*common, "--out", tmp_path / name, *more) == 0
        lines = (tmp_path / name / "pictures.csv").read_text().splitlines()
        found.append([line for line in lines if line.startswith("0,")])
    assert found[0] == found[1] and len(found[0]) == 6


def test_classes_that_the_model_names_otherwise(data: Path, weights: Path, tmp_path: Path, capsys) -> None:
    names = ["lawn", "sky", "brick", "snow"]
    (data / "classes.json").write_text(json.dumps({"classes": names}))
    out = tmp_path / "out"
    common = ("--data", data, "--out", out, "--model", weights, "--kinds", "none")
    assert evaluate(*common) == 1
    message = one_line(capsys, "evaluate-semantic")
    assert "lawn missing" in message and "grass, sky, brick, snow" in message and "classes map" in message
    assert not out.exists()
    (tmp_path / "map.json").write_text(json.dumps({"lawn": "grass", "snow": None}))
    assert evaluate(*common, "--classes-map", tmp_path / "map.json") == 0
    results = json.loads((out / "results.json").read_text())
    assert results["classes"] == ["grass", "sky", "brick"] and results["counts"]["pixels"] == 3 * 56 * 72
    assert values(out)["clear", "weights", "pixel_accuracy"] > 0.95


@pytest.mark.parametrize("arguments, expected", [
    (["--kinds", "hail"], "lq, or none; got hail"),
    (["--baselines", "prenet"], "give --restorers"),
    (["--baselines", "grabcut"], "baselines: expected some of classical"),
    (["--split", "val"], "there: test, train, all"),
    (["--model", "nowhere"], "rass-nano, rass-sd21, or a folder with weights"),
    (["--compare", "nowhere/rass_nano.onnx"], "got 'nowhere/rass_nano.onnx'"),
    (["--precision", "int8"], "precision"),
])
def test_failures_are_one_line(data: Path, weights: Path, tmp_path: Path, capsys, arguments, expected) -> None:
    assert evaluate("--data", data, "--out", tmp_path / "out", "--model", weights, *arguments) == 1
    assert expected in one_line(capsys, "evaluate-semantic")
    assert not (tmp_path / "out").exists()


def test_faults_of_the_data_are_one_line(data: Path, weights: Path, tmp_path: Path, capsys) -> None:
    common = ("--out", tmp_path / "out", "--model", weights, "--kinds", "none")
    assert evaluate("--data", tmp_path / "nowhere", *common) == 1
    assert "expected a folder of labelled pictures" in one_line(capsys, "evaluate-semantic")
    labels = np.full(SIZE, 255, np.uint8)
    for number in range(3):
        write(data / "labels" / f"{number}.png", labels)
    assert evaluate("--data", data, *common) == 1
    assert "a pixel that has a class" in capsys.readouterr().err
    labels[3, 3] = 9
    write(data / "labels" / "1.png", labels)
    assert evaluate("--data", data, *common) == 1
    assert re.search(r"1\.png: expected labels of 4 classes or ignored ones, got 9", capsys.readouterr().err)


def test_semantic_writes_maps_overlay_and_shares(weights: Path, tmp_path: Path, capsys) -> None:
    image, _ = scene(0)
    image[:, :48] = tiny_rass_nano.COLOURS["snow"]
    write(tmp_path / "photos" / "a.png", image)
    write(tmp_path / "photos" / "deep" / "b.png", scene(0)[0])
    out = tmp_path / "out"
    assert main(["semantic", str(tmp_path / "photos"), "-r", "--out", str(out), "--model", str(weights)]) == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    with Image.open(out / "a_classes.png") as picture:
        assert picture.mode == "P" and picture.size == (96, 64)
        assert picture.getpalette()[:12] == [c for colour in tiny_rass_nano.COLOURS.values() for c in colour]
        labels = np.asarray(picture)
    assert labels[10, [4, 44, 60, 90]].tolist() == [3, 3, 2, 3]
    confidence = cv2.imread(str(out / "a_confidence.png"), cv2.IMREAD_UNCHANGED)
    assert confidence.shape == (64, 96) and confidence.min() > 0
    assert cv2.imread(str(out / "deep" / "b_overlay.jpg")).shape == (64, 96, 3)
    document = json.loads((out / "semantic.json").read_text())
    assert document["classes"] == CLASSES and len(document["palette"]) == 4
    a, b = document["pictures"]
    assert a["file_name"].endswith("a.png") and a["size"] == [96, 64]
    assert [entry["class"] for entry in a["classes"]][0] == "snow"
    assert a["classes"][0]["share"] == pytest.approx(0.75, abs=0.02)
    for entry in (a, b):
        shares = [found["share"] for found in entry["classes"]]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and shares == sorted(shares, reverse=True)
        mean = sum(found["share"] * found["confidence"] for found in entry["classes"])
        assert entry["confidence"] == pytest.approx(mean, abs=1e-3)
    assert a["confidence"] == pytest.approx(confidence.mean() / 255, abs=0.01)


def test_maps_that_semantic_writes_can_be_labels_of_an_evaluation(data: Path, weights: Path, tmp_path: Path) -> None:
    assert main(["semantic", str(data / "images"), "--out", str(tmp_path / "maps"), "--model", str(weights)]) == 0
    for number in range(4):
        (tmp_path / "maps" / f"{number}_classes.png").rename(data / "labels" / f"{number}.png")
    assert evaluate("--data", data, "--out", tmp_path / "out", "--model", weights, "--kinds", "none") == 0
    assert values(tmp_path / "out")["clear", "weights", "miou"] == 1.0


def test_semantic_goes_on_after_a_picture_that_is_broken(weights: Path, tmp_path: Path, capsys) -> None:
    write(tmp_path / "b.png", scene(0)[0])
    (tmp_path / "a.png").write_bytes(b"no picture")
    arguments = ["semantic", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--model", str(weights), "--no-confidence"]) == 1
    said = capsys.readouterr()
    assert "skipped" in said.err and "a.png" in said.err and "1 of 2 pictures failed" in said.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b_classes.png", "b_overlay.jpg", "semantic.json"}


def test_semantic_names_what_it_cannot_read_and_a_stopped_run_has_its_json(weights: Path, tmp_path: Path, capsys,
                                                                           monkeypatch) -> None:
    monkeypatch.setattr("glesam_ros.cli.semantic.read_picture", stopping := Stopping(read_picture, after=2))
    write(tmp_path / "in/b.png", scene(0)[0])
    write(tmp_path / "in/c.png", scene(0)[0])
    arguments = ["semantic", "/proc/self/mem", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--model", str(weights)]) == 130
    assert "skipped /proc/self/mem: " in capsys.readouterr().err and stopping.calls == 3
    pictures = json.loads((tmp_path / "out" / "semantic.json").read_text())["pictures"]
    assert [Path(entry["file_name"]).name for entry in pictures] == ["b.png"]


def test_semantic_takes_no_results_for_pictures(weights: Path, tmp_path: Path, capsys) -> None:
    write(tmp_path / "in/a.png", scene(0)[0])
    arguments = ["semantic", str(tmp_path / "in"), "-r", "--model", str(weights), "--out"]
    for _ in range(2):
        assert main([*arguments, str(tmp_path / "in/out")]) == 0
        assert "1 of 1 pictures" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "in")]) == 1
    assert "expected another folder" in one_line(capsys, "semantic")
    own = write(tmp_path / "in/a_overlay.jpg", scene(0)[0])
    assert main(["semantic", str(own), str(tmp_path / "in/a.png"), *arguments[2:], str(tmp_path / "in")]) == 1
    assert "a_overlay.jpg, which would be replaced" in one_line(capsys, "semantic")


def test_semantic_names_what_it_cannot_load(weights: Path, tmp_path: Path, capsys) -> None:
    picture = write(tmp_path / "a.png", scene(0)[0])
    assert main(["semantic", str(picture), "--out", str(tmp_path / "out"), "--model", "nosuch"]) == 1
    assert "expected one of rass-nano, rass-sd21" in one_line(capsys, "semantic")
    (weights / "rass_nano.json").unlink()
    assert main(["semantic", str(picture), "--out", str(tmp_path / "out"), "--model", str(weights)]) == 1
    assert "rass_nano.json" in one_line(capsys, "semantic")
    assert not (tmp_path / "out").exists()
