"""`glesam reallq` from the outside: bags and folders in, a set to label out, labels in, a set to evaluate out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import bright_model
import cv2
import numpy as np
import pytest

pytest.importorskip("PIL.Image", reason="label maps need pillow; scripts/test.sh installs it")

from test_bag import COMPRESSED, FRAME, IMAGE, START, header, image, jpeg, note, write_bag  # noqa: E402

from glesam_ros.cli.main import main, make_parser  # noqa: E402
from glesam_ros.degradation import degrade  # noqa: E402
from glesam_ros.labelled import open_labelled  # noqa: E402

DEMO = Path(__file__).parents[1] / "glesam_ros/demo"
CLASSES = ("--classes", "road", "wall", "person")


def clear() -> np.ndarray:
    picture = cv2.cvtColor(cv2.imread(str(DEMO / "coffee.jpg")), cv2.COLOR_BGR2RGB)
    return cv2.resize(picture, (240, 160), interpolation=cv2.INTER_AREA)


def bad(kind: str, level: int = 3) -> np.ndarray:
    return degrade(clear(), kind, level, seed=1).image


def reallq(*arguments: object) -> int:
    return main(["reallq", *map(str, arguments)])


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def stamp(number: int) -> int:
    taken = header(number).stamp
    return taken.sec * 10**9 + taken.nanosec


def drive() -> list[tuple[str, str, int, Any]]:
    """Front: clear, dark, dark a frame later, clear, one that cannot be read; rear: blurred, clear."""
    front, rear = "/front/image_raw", "/rear/image_raw/compressed"
    return [
        note(0),
        (front, IMAGE, 0, image(0, clear())),
        (rear, COMPRESSED, 15, jpeg(15, bad("motion_blur"))),
        (front, IMAGE, 30, image(30, bad("low_light"))),
        (front, IMAGE, 32, image(32, bad("low_light", 2))),
        (front, IMAGE, 60, image(60, clear())),
        (rear, COMPRESSED, 75, jpeg(75, clear())),
        (front, IMAGE, 90, image(90, clear(), data=np.zeros(10, np.uint8))),
    ]


@pytest.fixture(autouse=True)
def _quick_level(monkeypatch):
    """The level of a model without weights: 1 for what is nowhere bright, else 0."""
    monkeypatch.setattr("glesam_ros.cli.reallq.LEVEL_MODEL", bright_model.register())


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_worst_frames_of_a_bag(storage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("glesam_ros.cli.reallq.LEVEL_MODEL", "nano")
    bag, out = write_bag(tmp_path / "drive", drive(), storage), tmp_path / "set"
    arguments = ("pick", bag, "--out", out, "--count", 2, "--gap", 0.5, "--measure", 0, *CLASSES)
    assert reallq(*arguments) == 0
    said = capsys.readouterr()
    assert re.search(r"^2 of 6 frames picked, score 0\.\d\d \.\. 0\.\d\d; without contrast: 0; ", said.out)
    assert "bad frames: short_data 1; set in" in said.out
    assert "bad frame /front/image_raw at 1700000003.000 s: short_data: expected" in said.err
    entries = {entry["source"]: entry for entry in manifest(out)["pictures"]}
    assert set(entries) == {"/front/image_raw", "/rear/image_raw/compressed"}
    for topic, number, expected in (
        ("/front/image_raw", 30, bad("low_light")), ("/rear/image_raw/compressed", 15, None)
    ):
        entry, moment = entries[topic], stamp(number)
        base = topic.strip("/").replace("/", "_")
        assert entry["name"] == f"{base}_{moment // 10**9}_{moment % 10**9:09d}"
        assert (entry["stamp"], entry["recorded"]) == (moment, START + number * FRAME)
        assert (entry["frame_id"], entry["height"], entry["width"]) == ("front_optical", 160, 240)
        written = cv2.cvtColor(cv2.imread(str(out / f"images/validation/{entry['name']}.png")), cv2.COLOR_BGR2RGB)
        if expected is None:  # what the JPEG in the bag holds, without loss from there on
            stored = jpeg(15, bad("motion_blur")).data
            expected = cv2.cvtColor(cv2.imdecode(stored, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(written, expected)
    assert entries["/front/image_raw"]["measures"]["level"] > 0.5  # of nano
    recording = manifest(out)["settings"]["measure"]["recording"]
    assert recording["bag"] == "drive"
    assert recording["topics"] == {"/front/image_raw": 5, "/rear/image_raw/compressed": 2}
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert reallq(*arguments) == 0
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_camera_that_fills_12_of_16_bits(tmp_path, capsys):
    grey = clear()[..., :1]
    frames = [("/cam", IMAGE, 30 * n, image(30 * n, grey.astype(np.uint16) << 4, "mono16")) for n in range(2)]
    bag, out = write_bag(tmp_path / "drive", frames), tmp_path / "set"
    arguments = ("pick", bag, "--out", out, "--count", 1, "--measure", 0, *CLASSES)
    assert reallq(*arguments, "--max-image-value", 255 << 4) == 0
    (entry,) = manifest(out)["pictures"]
    written = cv2.imread(str(out / f"images/validation/{entry['name']}.png"))
    np.testing.assert_array_equal(written, np.repeat(grey, 3, 2))
    assert reallq(*arguments) == 1  # that would be other pictures
    assert "--force" in capsys.readouterr().err


def test_a_folder_of_thermal_pictures(tmp_path, capsys):
    folder, out = tmp_path / "thermal", tmp_path / "set"
    folder.mkdir()
    grey = clear()[..., 0]
    cv2.imwrite(str(folder / "a.png"), grey.astype(np.uint16) + 7000)
    arguments = ("pick", folder, "--out", out, "--count", 1, "--measure", 0, *CLASSES)
    assert reallq(*arguments, "--min-image-value", 7000, "--max-image-value", 7255) == 0
    (entry,) = manifest(out)["pictures"]
    written = cv2.imread(str(out / f"images/validation/{entry['name']}.png"))
    np.testing.assert_array_equal(written, np.dstack([grey] * 3))
    assert reallq(*arguments, "--do-dynamic-scaling") == 1  # that would be other pictures
    assert "--force" in capsys.readouterr().err


def test_one_topic_and_fewer_frames_than_asked(tmp_path, capsys):
    bag, out = write_bag(tmp_path / "drive", drive()), tmp_path / "set"
    assert reallq("pick", bag, "--topic", "/front/image_raw", "--out", out, "--count", 9, "--gap", 0.9, *CLASSES) == 0
    entries = manifest(out)["pictures"]
    assert [entry["recorded"] for entry in entries][0] == START + 30 * FRAME
    assert {entry["recorded"] for entry in entries} == {START + n * FRAME for n in (0, 30, 60)}
    assert "fewer than 9: there are no more frames 0.9 s apart" in capsys.readouterr().err


def test_a_folder_of_pictures(tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "set"
    folder.mkdir()
    for name, picture in (("a", clear()), ("b.x", bad("gaussian_noise", 1)), ("c", bad("lq")), ("d", clear())):
        cv2.imwrite(str(folder / f"{name}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    (folder / "e.jpg").write_bytes(b"no picture")
    (folder / "f.jpg").symlink_to("/proc/self/mem")  # a file that gives an I/O error
    assert reallq("pick", folder, "--out", out, "--count", 2, "--gap", 1.5, *CLASSES) == 0
    entries = manifest(out)["pictures"]
    assert (entries[0]["source"], entries[0]["stamp"], entries[0]["recorded"]) == ("c.png", None, 2 * 10**9)
    assert entries[1]["source"] == "a.png"  # b is a second away, d too
    said = capsys.readouterr()
    assert "bad frame e.jpg at 4.000 s: unreadable" in said.err
    assert "bad frame f.jpg at 5.000 s: not_read: [Errno 5]" in said.err
    assert "bad frames: not_read 1, unreadable 1; set in" in said.out
    out = tmp_path / "faster"
    assert reallq("pick", folder, "--out", out, "--count", 2, "--gap", 0.5, "--rate", 2, *CLASSES) == 0
    assert [entry["name"] for entry in manifest(out)["pictures"]] == ["c", "b_x"]


def test_classes_of_ade20k_and_of_a_semantic_model(tmp_path, capsys):
    from glesam_ros.ade20k import CLASSES as ADE20K
    from glesam_ros.models.registry import register_semantic, semantic_names

    class Two:
        name, device = "reallq-two", "cpu"
        classes = ("ground", "rest")
        palette = np.array([(1, 2, 3), (200, 100, 0)], np.uint8)

        def free(self) -> None: ...

        def close(self) -> None: ...

    if Two.name not in semantic_names():
        register_semantic(Two.name, lambda device, precision: Two())
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), clear())
    assert reallq("pick", folder, "--out", tmp_path / "ade", "--ade20k") == 0
    assert (tmp_path / "ade/classes.txt").read_text().splitlines() == list(ADE20K)
    assert reallq("pick", folder, "--out", tmp_path / "two", "--semantic", Two.name) == 0
    listed = json.loads((tmp_path / "two/classes.json").read_text())
    assert listed == {"classes": ["ground", "rest"], "palette": [[1, 2, 3], [200, 100, 0]]}
    capsys.readouterr()
    assert reallq("pick", folder, "--out", tmp_path / "none", "--semantic", "nosuch") == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "--semantic nosuch: " in line and line.endswith("or name --classes")


def shape(name: str, kind: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {"label": name, "points": [list(point) for point in points], "shape_type": kind}


def test_labels_come_back_and_the_set_is_evaluated(tmp_path, capsys):
    """From a bag to a mean IoU of 1: frames of two colours, labelled by hand, segmented by colour."""
    pytest.importorskip("onnx", reason="the test makes its own weights with onnx: pip install 'glesam_ros[train]'")
    import test_rass_nano as tiny_rass_nano

    colours = list(tiny_rass_nano.COLOURS.items())
    messages = []
    for number in range(3):
        scene = np.empty((64, 96, 3), np.uint8)
        scene[:] = colours[0][1]
        scene[:, 48:] = colours[1 + number % 2][1]
        messages.append(("/cam", IMAGE, 60 * number, image(60 * number, scene)))
    bag, out = write_bag(tmp_path / "drive", messages), tmp_path / "set"
    names = list(tiny_rass_nano.COLOURS)
    assert reallq("pick", bag, "--out", out, "--count", 3, "--measure", 0, "--classes", *names) == 0
    files = sorted((out / "images/validation").glob("*.json"))
    assert len(files) == 3
    assert reallq("read", out) == 1  # nothing is labelled yet
    said = capsys.readouterr()
    assert said.err.count("this picture is not labelled yet") == 3
    assert "0 of 3 pictures labelled" in said.out
    for number, file in enumerate(files):
        shapes = [
            shape(names[0], "rectangle", (0, 0), (96, 64)),
            shape(names[1 + number % 2], "polygon", (48, 0), (96, 0), (96, 64), (48, 64)),
        ]
        file.write_text(json.dumps({**json.loads(file.read_text()), "shapes": shapes}))
    assert reallq("read", out) == 0
    said = capsys.readouterr()
    assert "3 of 3 pictures labelled, 3 new; 0.0 % of their pixels unlabelled" in said.out
    assert f"{names[0]} 50.0 %" in said.out
    assert open_labelled(out, "test")[1].labels[0].tolist() == [0] * 48 + [2] * 48
    weights = tiny_rass_nano.write(tmp_path / "weights")
    assert main([
        "evaluate-semantic", "--workers", "1", "--data", str(out), "--out", str(tmp_path / "report"), "--model",
        str(weights), "--kinds", "none", "--no-sheet",
    ]) == 0
    rows = json.loads((tmp_path / "report/results.json").read_text())["rows"]
    assert [row["value"] for row in rows if row["metric"] == "miou"] == [1.0]


def test_faults_of_labels_are_named_and_counted(tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "set"
    folder.mkdir()
    for number in range(22):
        cv2.imwrite(str(folder / f"{number:02}.png"), clear()[: 40 + number])
    assert reallq("pick", folder, "--out", out, *CLASSES) == 0
    file = out / "images/validation/07.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shapes": [shape("sky", "circle", (9, 9), (5, 5))]}))
    capsys.readouterr()
    assert reallq("read", out) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 21
    assert lines[7] == f"glesam reallq: {file}: shape 1: expected one of the classes road, wall, person; got 'sky'"
    assert lines[-1] == "glesam reallq: 2 more faults"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pick", "nowhere", "--out", "set", *CLASSES], "nowhere: no such bag or folder"),
        (["pick", "empty", "--out", "set", *CLASSES], "no picture .* in empty"),
        (["pick", "text.mcap", "--out", "set", *CLASSES], "cannot be read as a bag"),
        (["pick", "drive", "--out", "set", "--topic", "/side", *CLASSES], "--topic /side: not in drive"),
        (["pick", "drive", "--out", "full", *CLASSES], "expected an empty folder or an earlier set, found keep"),
        (["pick", "drive", "--out", "set", "--classes", "a", "a"], "each once, got a"),
        (["read", "full"], "expected a set that `glesam reallq pick` made, found no manifest.json"),
        (["read", "nowhere"], "nowhere"),
    ],
)
def test_failures_are_one_line(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bag(Path("drive"), drive()[:2])
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/keep").write_text("")
    Path("text.mcap").write_text("this is no bag")
    assert reallq(*arguments) == 1
    [line] = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("nano runs on")]
    assert line.startswith("glesam reallq: error: ")
    assert re.search(expected, line)
    assert not Path("set").exists()


def test_a_bag_of_bad_frames_fails(tmp_path, capsys):
    bag = write_bag(tmp_path / "drive", [("/cam", IMAGE, n, image(n, clear(), step=1)) for n in range(8)])
    assert reallq("pick", bag, "--out", tmp_path / "set", "--measure", 0, *CLASSES) == 1
    said = capsys.readouterr()
    assert "bad_step 8" in said.out
    assert said.err.count("bad frame /cam") == 5
    assert "no frame could be used" in said.err


def test_other_settings_are_refused_without_force(tmp_path, capsys):
    bag, out = write_bag(tmp_path / "drive", drive()), tmp_path / "set"
    assert reallq("pick", bag, "--out", out, "--count", 1, *CLASSES) == 0
    assert reallq("pick", bag, "--out", out, "--count", 2, *CLASSES) == 1
    assert "count was 1, is 2" in capsys.readouterr().err
    assert reallq("pick", bag, "--out", out, "--count", 2, *CLASSES, "--force") == 0
    assert len(manifest(out)["pictures"]) == 2


def test_without_the_library_of_bags(tmp_path, capsys, monkeypatch):
    bag = write_bag(tmp_path / "drive", drive()[:2])
    for name in [name for name in sys.modules if name.split(".")[0] == "rosbags" or name.endswith("cli.bagfile")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "rosbags").is_dir()])
    said = []
    for command in (["bag", str(bag), "--out", "o"], ["reallq", "pick", str(bag), "--out", "o"]):
        assert main(command) == 1
        said.append(capsys.readouterr().err.replace(f"glesam {command[0]}: ", ""))
    assert said[0] == said[1]
    assert "No module named 'rosbags'; install it: pip install 'glesam_ros[cli]'" in said[0]


@pytest.mark.parametrize(
    "arguments",
    [["pick", "x", "--out", "o", "--gap", "-1"], ["pick", "x", "--out", "o", "--count", "0"], ["pick", "x"], [],
     ["pick", "x", "--out", "o", "--ade20k", "--classes", "a"], ["pick", "x", "--out", "o", "--measure", "nan"],
     ["pick", "photos", "--out", "o", "--topic", "/cam"]],
)
def test_wrong_usage(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with pytest.raises(SystemExit) as stop:
        reallq(*arguments)
    assert stop.value.code == 2


def test_examples_of_the_help_parse(capsys):
    with pytest.raises(SystemExit) as stop:
        reallq("--help")
    assert stop.value.code == 0
    examples = re.findall(r"^  glesam ((?:reallq|evaluate-semantic) .*?)(?:  .*)?$", capsys.readouterr().out, re.M)
    assert len(examples) == 6
    for example in examples:
        assert make_parser().parse_args(example.split()).command == example.split()[0]
