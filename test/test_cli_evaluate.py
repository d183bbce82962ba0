"""`glesam evaluate` from the outside."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import bright_model
import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from glesam_ros.cli.main import main, make_parser
from glesam_ros.evaluation import pool, protocol, semantic

SIZE = (160, 200)


def picture(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Two bright rectangles on black, and their label map."""
    image, labels = np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8)
    for number, (x, y) in enumerate(((20 + shift, 15), (110 - shift, 80)), 1):
        image[y : y + 60, x : x + 70] = 230
        labels[y : y + 60, x : x + 70] = number
    return image, labels


@pytest.fixture
def data(tmp_path) -> Path:
    """Three photographs of COCO and one of BSDS500."""
    coco, bsds = tmp_path / "data" / "coco_small", tmp_path / "data" / "bsds500"
    for folder in (coco / "images", bsds / "images", bsds / "regions"):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        image, labels = picture(4 * number)
        cv2.imwrite(str(coco / "images" / f"{number}.png"), image)
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        for label in (1, 2):
            rle = coco_mask.encode(np.asfortranarray(labels == label))
            rle["counts"] = rle["counts"].decode()
            annotations.append({"id": len(annotations), "image_id": number, "segmentation": rle, "iscrowd": 0})
    (coco / "test.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    image, labels = picture(0)
    cv2.imwrite(str(bsds / "images" / "77.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    cv2.imwrite(str(bsds / "regions" / "77_1.png"), labels)
    (bsds / "test.txt").write_text("77\n")
    return tmp_path / "data"


def evaluate(*arguments: object, model: str | None = None, workers: int = 1) -> int:
    model = model or bright_model.register()
    return main(["evaluate", *map(str, arguments), "--model", model, "--workers", str(workers)])


def means(folder: Path) -> dict[tuple[str, str, str, str], float]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {(r["set"], r["condition"], r["method"], r["metric"]): r["mean"] for r in rows}


def test_help_teaches_by_examples_that_parse(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    examples = re.findall(r"^  (glesam evaluate .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 5
    for example in examples:
        assert make_parser().parse_args(example.split()[1:]).command == "evaluate"


def test_everything_is_written_and_said(data, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'glesam_ros[evaluate]'")
    out = tmp_path / "out"
    assert evaluate("--data", data, "--out", out, "--kinds", "low_light", "--levels", 1, 3,
                    "--baselines", "classical", "grabcut") == 0
    written = {path.name for path in out.iterdir()}
    plots = {"by_level.png", "gains.png", "levels.png"}
    assert written == {"table.md", "results.json", "photographs.csv", "sheet_coco.jpg", "sheet_bsds.jpg", *plots}
    assert all(cv2.imread(str(out / name)) is not None for name in written if name.endswith(("png", "jpg")))
    found = means(out)
    for method in ("off", "always", "auto"):
        assert found["coco", "clear", method, "points_iou"] == 1.0
        assert found["coco", "clear", method, "everything_ar100"] == 1.0
    assert ("coco", "low_light-3", "grabcut", "boxes_iou") in found
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "coco: 3 photographs, 6 regions; bsds: 1 photographs, 2 regions" in text
    assert "| coco | clear " in text and "| bsds | low_light-3 " in text
    with (out / "photographs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["photograph"] for line in lines} == {"0.png", "1.png", "2.png", "77"}
    assert {line["condition"] for line in lines} == {"clear", "low_light-1", "low_light-3"}


def test_results_say_what_they_depend_on(data, tmp_path) -> None:
    out = tmp_path / "out"
    assert evaluate("--data", data, "--sets", "bsds", "--out", out, "--kinds", "none", "--seed", 7, "--no-sheet",
                    "--enhance-above", "0.1", "--prompts", "everything") == 0
    results = json.loads((out / "results.json").read_text())
    settings = results["settings"]
    assert (settings["seed"], settings["split"], settings["prompts"]) == (7, "test", ["everything"])
    assert settings["pipeline"]["enhance_above"] == 0.1 and settings["pipeline"]["max_instances"] == 100
    assert {"glesam_ros", "python", "numpy", "opencv"} <= set(results["versions"])
    row = results["rows"][0]
    assert set(row) == {"set", "condition", "method", "metric", "mean", "low", "high", "regions", "photographs"}
    assert not list(out.glob("sheet*"))
    assert str(tmp_path) not in (out / "results.json").read_text()  # it may be published


def test_masks_of_everything_mode_may_be_more_or_fewer(data, tmp_path) -> None:
    common = ("--data", data, "--sets", "bsds", "--kinds", "none", "--no-sheet", "--prompts", "everything")
    assert evaluate(*common, "--out", tmp_path / "all") == 0
    assert evaluate(*common, "--out", tmp_path / "one", "--max-instances", 1) == 0
    every, one = (means(tmp_path / name)["bsds", "clear", "off", "everything_best_iou"] for name in ("all", "one"))
    assert every == 1.0 and one < 0.8  # two regions


def test_boxes_may_err_as_those_of_a_detector(data, tmp_path, capsys) -> None:
    common = ("--data", data, "--sets", "coco", "--limit", 2, "--kinds", "none", "--prompts", "boxes", "--no-sheet")
    found = {}
    for error in (0, 0.1):
        assert evaluate(*common, "--out", tmp_path / "out", "--box-error", error, "--modes", "off") == 0
        found[error] = json.loads((tmp_path / "out" / "results.json").read_text())
        assert ("The sides of boxes err by 10 %." in capsys.readouterr().out) == bool(error)
        assert found[error]["settings"]["box_error"] == error
    assert found[0]["rows"] != found[0.1]["rows"]


def test_points_may_be_fewer_than_three(data, tmp_path, capsys) -> None:
    common = ("--data", data, "--sets", "coco", "--limit", 2, "--kinds", "lq", "--levels", 3, "--prompts", "points")
    for points in (3, 1):
        assert evaluate(*common, "--out", tmp_path / str(points), "--points", points) == 0
        assert f"## {'One random point' if points == 1 else 'Three random points'}\n" in capsys.readouterr().out
        assert json.loads((tmp_path / str(points) / "results.json").read_text())["settings"]["points"] == points


def test_results_do_not_depend_on_the_number_of_processes(data, tmp_path) -> None:
    common = ("--data", data, "--sets", "coco", "--limit", 2, "--kinds", "lq", "--levels", 3, "--no-sheet")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert evaluate(*common, "--processing-size", 256, "--out", out, model="nano", workers=workers) == 0
    for name in ("results.json", "photographs.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("model, device, expected", [
    ("nano", "cpu (int8, onnxruntime, CPUExecutionProvider)", 3), ("nano", "cuda (fp32, onnxruntime)", 1),
    ("sam_vit_b+glesam", "cuda (bf16)", 1), ("sam_vit_b+glesam", "cpu (fp32)", 1),
])
def test_processes_are_as_many_as_help_unless_told(model, device, expected, data, tmp_path, monkeypatch) -> None:
    def share(open_state, work, tasks, workers):
        asked.append(workers)
        raise ValueError("enough")

    asked: list[int] = []
    opened = SimpleNamespace(pipe=SimpleNamespace(model=SimpleNamespace(device=device)))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 5}, raising=False)  # as taskset says
    monkeypatch.setattr(protocol, "open_evaluator", lambda *_: opened)
    monkeypatch.setattr(pool, "share", share)
    command = ["evaluate", "--data", str(data), "--out", str(tmp_path / "out"), "--model", model]
    assert main(command) == main([*command, "--workers", "2"]) == 1
    assert asked == [expected, 2]


@pytest.mark.parametrize("cores, threads", [({0}, 0), ({0, 1}, 1)])
def test_maps_of_classes_are_measured_by_as_many_processes_as_cores_may_be_used(
    cores, threads, tmp_path, monkeypatch
) -> None:
    def opened(options: semantic.SemanticOptions) -> None:
        asked.append(options.threads)  # of several processes each has one thread
        raise ValueError("enough")

    asked: list[int] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda process: cores, raising=False)
    monkeypatch.setattr(semantic, "open_semantic_evaluator", opened)
    assert main(["evaluate-semantic", "--data", "street", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert asked == [threads]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_what_fails_while_measuring_is_one_line(error, data, tmp_path, monkeypatch, capsys) -> None:
    def measure(self: protocol.Evaluator, case: protocol.Case) -> None:
        raise error("the device lacks memory")

    monkeypatch.setattr(protocol.Evaluator, "measure", measure)
    assert evaluate("--data", data, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == "glesam evaluate: error: the device lacks memory\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--agreement", "nowhere"], "nowhere: no such picture or folder"),
        (["--agreement", "DATA", "--kinds", "none"], "--agreement: expected at least one kind of degradation"),
    ],
)
def test_what_is_wrong_with_the_agreement_is_said_before_the_work(
    arguments, expected, data, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(protocol.Evaluator, "measure", lambda self, case: pytest.fail("measured"))
    more = [data if word == "DATA" else word for word in arguments]
    assert evaluate("--data", data, "--out", tmp_path / "out", *more) == 1
    assert expected in capsys.readouterr().err


def test_a_place_that_takes_no_results_is_said_before_maps_of_classes_are_measured(
    tmp_path, monkeypatch, capsys
) -> None:
    opened = SimpleNamespace(folder=[0], classes=("road",))
    monkeypatch.setattr(semantic, "open_semantic_evaluator", lambda options: opened)
    monkeypatch.setattr(semantic.SemanticEvaluator, "measure", lambda self, index: pytest.fail("measured"))
    (tmp_path / "out").touch()
    arguments = ["--data", "street", "--out", str(tmp_path / "out"), "--device", "cpu", "--workers", "1"]
    assert main(["evaluate-semantic", *arguments]) == 1
    assert "out: expected a folder or a free name, got a file" in capsys.readouterr().err


def test_figures_of_a_photograph_do_not_depend_on_the_others(data, tmp_path) -> None:
    common = ("--data", data, "--kinds", "lq", "--levels", 3, "--no-sheet")
    found = []
    for name, more in (("all", ()), ("first", ("--limit", 1, "--sets", "coco"))):
        assert evaluate(*common, "--out", tmp_path / name, *more) == 0
        lines = (tmp_path / name / "photographs.csv").read_text().splitlines()
        found.append([line for line in lines if line.startswith("coco,0.png")])
    assert found[0] == found[1] and len(found[0]) > 10


def test_photographs_beyond_the_limit_are_not_read(data, tmp_path) -> None:
    (data / "coco_small" / "images" / "1.png").unlink()
    with (data / "bsds500" / "test.txt").open("a") as file:
        file.write("nowhere\n")
    assert evaluate("--data", data, "--out", tmp_path / "out", "--kinds", "none", "--limit", 1, "--no-sheet") == 0
    lines = (tmp_path / "out" / "photographs.csv").read_text().splitlines()
    assert {line.split(",")[1] for line in lines[1:]} == {"0.png", "77"}


def test_data_set_of_glesam_lqseg(data, tmp_path, capsys) -> None:
    built, out = tmp_path / "built", tmp_path / "out"
    assert main(["lqseg", "build", "--from", "coco", "--images", str(data / "coco_small" / "images"),
                 "--annotations", str(data / "coco_small" / "test.json"), "--out", str(built), "--levels", "3",
                 "--kinds", "low_light"]) == 0
    capsys.readouterr()
    assert evaluate("--lqseg", built, "--out", out, "--limit", 2) == 0
    captured = capsys.readouterr()
    assert f"{built} was built as the split 'train'" in captured.err
    assert "lqseg: 2 photographs, 4 regions (split train, seed 0" in captured.out
    found = means(out)
    assert {condition for _, condition, _, _ in found} == {"clear", "low_light-3"}
    assert found["lqseg", "clear", "off", "points_iou"] == 1.0
    results = json.loads((out / "results.json").read_text())
    assert results["counts"]["lqseg"] == {"photographs": 2, "regions": 4}
    settings = json.loads((built / "dataset.json").read_text())["settings"]
    manifest = hashlib.sha256((built / "manifest.jsonl").read_bytes()).hexdigest()
    assert results["settings"]["lqseg"] == {**settings, "manifest_sha256": manifest}
    assert str(tmp_path) not in (out / "results.json").read_text()  # it may be published


def test_splits_of_both_sources_are_said(data, tmp_path, capsys) -> None:
    built = tmp_path / "built"
    main(["lqseg", "build", "--from", "coco", "--images", str(data / "coco_small" / "images"), "--annotations",
          str(data / "coco_small" / "test.json"), "--out", str(built), "--levels", "3", "--split", "val"])
    capsys.readouterr()
    common = ("--prompts", "points", "--limit", 1, "--levels", 3, "--no-sheet")
    assert evaluate("--data", data, "--sets", "bsds", "--lqseg", built, "--out", tmp_path / "out", *common) == 0
    captured = capsys.readouterr()
    assert "(split test, of lqseg val, seed 0" in captured.out and "was built as" not in captured.err
    assert evaluate("--data", data, "--sets", "bsds", "--out", tmp_path / "data", *common) == 0
    assert "(split test, seed 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "data" / "results.json").read_text())["settings"]["lqseg"] is None


def test_lqseg_data_set_without_the_kind_is_refused(data, tmp_path, capsys) -> None:
    built = tmp_path / "built"
    main(["lqseg", "build", "--from", "coco", "--images", str(data / "coco_small" / "images"),
          "--annotations", str(data / "coco_small" / "test.json"), "--out", str(built), "--levels", "1"])
    capsys.readouterr()
    assert evaluate("--lqseg", built, "--out", tmp_path / "out", "--kinds", "rain") == 1
    assert "--kinds: expected some of lq, which" in capsys.readouterr().err


def test_agreement_on_photographs_without_masks(tmp_path, capsys) -> None:
    photographs, out = tmp_path / "night", tmp_path / "out"
    photographs.mkdir()
    for number in range(3):
        cv2.imwrite(str(photographs / f"{number}.png"), picture(3 * number)[0])
    cv2.imwrite(str(photographs / "black.png"), np.zeros((60, 80, 3), np.uint8))
    modes = ("--modes", "off", "always", "auto", "always")  # one of them twice
    assert evaluate("--agreement", photographs, "--out", out, "--kinds", "low_light", "--levels", 1, *modes) == 0
    found = json.loads((out / "agreement.json").read_text())["agreement"]
    assert found["modes"] == ["off", "always", "auto"]
    assert found["photographs"] == 3 and found["left_out"] == ["black"]
    assert {(r["condition"], r["metric"]) for r in found["rows"]} == {("low_light-1", "own"), ("low_light-1", "plain")}
    assert cv2.imread(str(out / "agreement_low_light-1.jpg")) is not None
    assert "## Agreement on photographs without masks" in (out / "table.md").read_text()
    assert "## Box" not in capsys.readouterr().out
    rows = cv2.imread(str(out / "agreement_low_light-1.jpg")).shape
    alone = ("--kinds", "low_light", "--levels", 1, "--masks-alone", "--workers", 1)
    assert evaluate("--agreement", photographs, "--out", out, *alone) == 0
    assert cv2.imread(str(out / "agreement_low_light-1.jpg")).shape[1] < rows[1]


def test_without_matplotlib_there_are_no_plots_and_it_says_so(data, tmp_path, monkeypatch, capsys) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "out"
    assert evaluate("--data", data, "--sets", "bsds", "--out", out, "--levels", 3, "--prompts", "points") == 0
    assert "no plots: matplotlib is missing; pip install 'glesam_ros[evaluate]'" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"table.md", "results.json", "photographs.csv", "sheet_bsds.jpg"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected --data, --lqseg or --agreement, got none"),
        (["--data", "DATA", "--kinds", "lq", "hail"], "--kinds: expected some of low_light, .*; got hail"),
        (["--data", "DATA", "--baselines", "prenet"], "--baselines prenet: expected the folder of their weights"),
        (["--data", "DATA", "--baselines", "retinex"], "baselines: expected some of classical, .*, got retinex"),
        (["--data", "DATA", "--weights", "nowhere"], "--weights: expected a folder .*, got nowhere"),
        (["--data", "DATA", "--weights", "DATA"], "weights: expected the model nano, which they are for, got bright"),
        (["--data", "."], "expected a folder with coco_small or bsds500, found neither"),
        (["--data", "DATA", "--split", "train"], "train.json"),
        (["--sets", "coco", "--agreement", "DATA"], "--sets: expected --data with it"),
        (["--lqseg", "DATA"], "expected an LQSeg data set, found no dataset.json"),
        (["--agreement", "DATA"], "no picture"),
        (["--data", "DATA", "--sets", "coco", "--model", "nosuch"], "model: expected one of"),
    ],
)
def test_failures_are_one_line(arguments, expected, data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(data) if word == "DATA" else word for word in arguments]
    if "--model" not in arguments:
        arguments += ["--model", bright_model.register()]
    assert main(["evaluate", *arguments, "--out", "out", "--workers", "1"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("glesam evaluate: error: ")
    assert re.search(expected, lines[0])


def test_a_broken_photograph_is_named(tmp_path, capsys) -> None:
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "cut.jpg").write_bytes(b"\xff\xd8 no picture")
    assert evaluate("--agreement", tmp_path / "night", "--out", tmp_path / "out") == 1
    assert "cut.jpg: expected" in capsys.readouterr().err


def test_a_coco_file_that_is_none_is_named(data, tmp_path, capsys) -> None:
    (data / "coco_small" / "test.json").write_text("{}")
    assert evaluate("--data", data, "--sets", "coco", "--out", tmp_path / "out") == 1
    assert "coco_small: expected the test split of coco, cannot read it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--levels", "4"], "invalid choice: 4"),
        (["--modes", "sometimes"], "invalid choice: 'sometimes'"),
        (["--workers", "0"], "above 0"),
        (["--seed", "-1"], "expected an integer of at least 0, got -1"),
        (["--box-error", "0.3"], "expected a share in 0 .. 0.2, got 0.3"),
        (["--box-error", "nan"], "expected a share in 0 .. 0.2, got nan"),
        (["--limit", "0"], "above 0"),
        (["--max-instances", "257"], "256"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, expected, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--data", "d", "--out", "o", *arguments])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
