"""`glesam degrade`: files, parameters, sheet, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from glesam_ros.cli.degrade import GAP, LABEL_HEIGHT
from glesam_ros.cli.main import main, make_parser
from glesam_ros.degradation import HELD_OUT_KINDS, TRAINING_KINDS, degrade, names


def picture(folder: Path, name: str, height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """Write a lossless picture; returns it as RGB."""
    rng = np.random.default_rng(seed)
    rgb = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    folder.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(folder / name), rgb[..., ::-1])
    return rgb


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def run(*arguments: object) -> int:
    return main(["degrade", *map(str, arguments)])


def test_writes_what_the_library_makes_with_its_parameters(tmp_path):
    rgb = picture(tmp_path, "photo.png")
    out = tmp_path / "out"
    assert run(tmp_path / "photo.png", "--kind", "rain", "--level", 3, "--seed", 7, "--out", out) == 0
    expected = degrade(rgb, "rain", 3, 7)
    assert sorted(p.name for p in out.iterdir()) == ["degraded.json", "photo_rain-3.png"]
    np.testing.assert_array_equal(read(out / "photo_rain-3.png"), expected.image)
    assert json.loads((out / "degraded.json").read_text()) == [{
        "picture": str(tmp_path / "photo.png"), "file": "photo_rain-3.png", "kind": "rain", "level": 3, "seed": 7,
        "parameters": expected.parameters,
    }]


def test_a_second_run_into_a_folder_keeps_the_parameters_of_the_first(tmp_path, capsys):
    picture(tmp_path, "photo.png")
    out = tmp_path / "out"

    def written(kind, seed):
        assert run(tmp_path / "photo.png", "--kind", kind, "--level", 1, "--seed", seed, "--out", out) == 0
        return [(e["file"], e["seed"]) for e in json.loads((out / "degraded.json").read_text())]

    written("fog", 1)
    assert written("rain", 2) == [("photo_fog-1.png", 1), ("photo_rain-1.png", 2)]
    assert written("fog", 3) == [("photo_rain-1.png", 2), ("photo_fog-1.png", 3)]
    (out / "photo_rain-1.png").unlink()
    assert written("jpeg", 4) == [("photo_fog-1.png", 3), ("photo_jpeg-1.png", 4)]
    (out / "degraded.json").write_text('{"mine": 1}')
    assert run(tmp_path / "photo.png", "--kind", "fog", "--level", 1, "--out", out) == 1
    assert "degraded.json: expected the list of an earlier run" in capsys.readouterr().err


def test_a_folder_and_several_kinds_and_levels(tmp_path):
    images = {f"{n}.png": picture(tmp_path / "in", f"{n}.png", seed=n) for n in range(2)}
    images["deep/c.png"] = picture(tmp_path / "in" / "deep", "c.png", 40, 30)
    out = tmp_path / "out"
    command = (tmp_path / "in", "-r", "--kinds", "fog", "lq", "fog", "--levels", 2, 1, "--out", out)
    assert run(*command) == 0
    entries = json.loads((out / "degraded.json").read_text())
    assert [(e["file"], e["kind"], e["level"]) for e in entries] == [
        (f"{Path(name).with_suffix('')}_{kind}-{level}.png", kind, level)
        for name in images for kind in ("fog", "lq") for level in (1, 2)
    ]
    for entry in entries:
        rgb = images[str(Path(entry["picture"]).relative_to(tmp_path / "in"))]
        expected = degrade(rgb, entry["kind"], entry["level"], entry["seed"])
        np.testing.assert_array_equal(read(out / entry["file"]), expected.image)


def test_sheet_shows_clear_first_then_every_kind_and_level(tmp_path):
    rgb = picture(tmp_path, "photo.png")
    assert run(tmp_path / "photo.png", "--sheet", tmp_path / "new" / "sheet.png", "--seed", 3) == 0
    sheet = read(tmp_path / "new" / "sheet.png")
    row, column = LABEL_HEIGHT + 60 + GAP, 80 + GAP
    assert sheet.shape[:2] == ((1 + len(names())) * row, 3 * column + GAP)
    np.testing.assert_array_equal(sheet[LABEL_HEIGHT : LABEL_HEIGHT + 60, :80], rgb)
    for r, kind in enumerate(names(), start=1):
        for level in (1, 2, 3):
            top, left = r * row, (level - 1) * column
            tile = sheet[top + LABEL_HEIGHT : top + LABEL_HEIGHT + 60, left : left + 80]
            np.testing.assert_array_equal(tile, degrade(rgb, kind, level, 3).image)
            assert (sheet[top : top + LABEL_HEIGHT, left : left + 80] < 100).any()  # a label stands above


def test_sheet_of_some_kinds_and_several_pictures(tmp_path):
    picture(tmp_path / "in", "a.png")
    picture(tmp_path / "in", "b.png", 100, 300)
    sheet = tmp_path / "sheet.png"
    assert run(tmp_path / "in", "--sheet", sheet, "--kinds", "rain", "--levels", 1, 3, "--size", 150) == 0
    widths = [2 * (80 + GAP) + GAP, 2 * (150 + GAP) + GAP]  # the small one is not enlarged, the large one is shrunk
    assert read(sheet).shape[:2] == (2 * (LABEL_HEIGHT + 60 + GAP), sum(widths))


def test_sheet_marks_what_is_held_out(tmp_path):
    picture(tmp_path, "photo.png", 20, 300)
    assert run(tmp_path / "photo.png", "--sheet", tmp_path / "sheet.png", "--kinds", "rain", "snow", "--level", 1) == 0
    row = LABEL_HEIGHT + 20 + GAP
    sheet = read(tmp_path / "sheet.png")
    rain, snow = (np.flatnonzero((sheet[r * row : r * row + LABEL_HEIGHT] < 100).any((0, 2)))[-1] for r in (1, 2))
    assert snow > 2 * rain  # "snow 1, held out" is longer than "rain 1"


def test_list_names_every_kind_and_what_is_held_out(capsys):
    assert run("--list") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.split("\n\n")[0].splitlines()}
    assert set(lines) == set(names())
    assert {kind for kind in lines if "held out" in lines[kind]} == set(HELD_OUT_KINDS)
    assert {kind for kind in lines if lines[kind].split()[1] == "training"} == set(TRAINING_KINDS)
    assert "Koschmieder" in lines["fog"]


def test_a_bad_picture_is_named_and_the_rest_goes_on(tmp_path, capsys):
    picture(tmp_path, "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert run(tmp_path, "--kind", "jpeg", "--level", 1, "--out", out) == 1
    errors = capsys.readouterr().err
    assert "bad.png: expected a picture" in errors and "error: 1 of 2 pictures failed" in errors
    assert [e["file"] for e in json.loads((out / "degraded.json").read_text())] == ["good_jpeg-1.png"]
    (tmp_path / "good.png").unlink()
    assert run(tmp_path / "bad.png", "--out", tmp_path / "none", "--sheet", tmp_path / "sheet.png") == 1
    assert not (tmp_path / "none").exists() and not (tmp_path / "sheet.png").exists()


def test_a_picture_too_long_for_a_kind_is_named_and_what_was_written_of_it_has_its_entry(tmp_path, capsys):
    picture(tmp_path, "good.png")
    picture(tmp_path, "long.png", 2, 32767)
    out = tmp_path / "out"
    assert run(tmp_path, "--kinds", "gaussian_noise", "rolling_shutter", "--level", 1, "--out", out) == 1
    errors = capsys.readouterr().err
    assert "long.png: image: expected a size" in errors and "error: 1 of 2 pictures failed" in errors
    written = ["good_gaussian_noise-1.png", "good_rolling_shutter-1.png", "long_gaussian_noise-1.png"]
    assert [e["file"] for e in json.loads((out / "degraded.json").read_text())] == written
    assert sorted(p.name for p in out.glob("*.png")) == written


def test_a_picture_that_memory_lacks_for_is_named_and_a_stopped_run_has_its_json(tmp_path, capsys, monkeypatch):
    for name, height in (("a.png", 20), ("b.png", 21), ("c.png", 22), ("d.png", 23)):
        picture(tmp_path / "in", name, height)

    def limited(image, *arguments):
        if image.shape[0] in (21, 23):
            raise MemoryError if image.shape[0] == 21 else KeyboardInterrupt
        return degrade(image, *arguments)

    monkeypatch.setattr("glesam_ros.degradation.degrade", limited)
    command = (tmp_path / "in", "/proc/self/mem", "--kind", "jpeg", "--level", 1, "--out", tmp_path / "out")
    assert run(*command) == 130
    entries = json.loads((tmp_path / "out" / "degraded.json").read_text())
    assert [e["file"] for e in entries] == ["a_jpeg-1.png", "c_jpeg-1.png"]
    assert "b.png: out of memory" in capsys.readouterr().err
    (tmp_path / "in" / "c.png").replace(tmp_path / "in" / "e.png")  # after the picture that stops the run
    assert run(*command) == 130
    entries = json.loads((tmp_path / "out" / "degraded.json").read_text())
    assert [e["file"] for e in entries] == ["c_jpeg-1.png", "a_jpeg-1.png"]
    capsys.readouterr()
    (tmp_path / "in" / "d.png").unlink()
    assert run(*command) == 1
    assert "skipped /proc/self/mem: " in (said := capsys.readouterr().err) and "2 of 4 pictures failed" in said


def test_results_are_neither_taken_for_pictures_nor_written_over_them(tmp_path, capsys):
    picture(tmp_path, "a.png")
    picture(tmp_path, "a_jpeg-1.png")
    command = (tmp_path, "--kind", "jpeg", "--level", 1)
    for _ in range(2):
        assert run(*command, "-r", "--out", tmp_path / "out") == 0
        assert len(list((tmp_path / "out").glob("*.png"))) == 2
    before = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert run(*command, "--out", tmp_path) == 1
    assert run(tmp_path / "a.png", tmp_path / "a_jpeg-1.png", *command[1:], "--out", tmp_path) == 1
    assert run(*command, "--sheet", tmp_path / "a.png") == 1
    assert capsys.readouterr().err.count("expected another folder than that of") == 3
    assert {path: path.read_bytes() for path in tmp_path.glob("*.png")} == before


def test_more_pictures_than_a_sheet_holds(tmp_path, capsys):
    for n in range(9):
        picture(tmp_path / "in", f"{n}.png")
    assert run(tmp_path / "in", "--sheet", tmp_path / "sheet.png") == 1
    assert "expected at most 8 pictures, got 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "expected pictures and --out DIR or --sheet FILE, or --list alone"),
        (("a.png",), "expected pictures and --out DIR or --sheet FILE"),
        (("--out", "out"), "expected pictures and --out DIR"),
        (("a.png", "--out", "out", "--kind", "hail"), "expected one of low_light, .*; got 'hail'"),
        (("--out", "out", "--kind", "rain", "/"), "got '/'; name pictures before --kind"),
        (("a.png", "--out", "out", "--level", "4"), "invalid choice: '?4'?"),
        (("a.png", "--out", "out", "--seed", "-1"), "expected an integer of at least 0, got -1"),
        (("a.png", "--sheet", "sheet.gif"), "expected a file that ends in .png or .jpg or .jpeg, got 'sheet.gif'"),
    ],
    ids=["nothing", "no output", "no picture", "kind", "picture taken for a kind", "level", "seed", "sheet"],
)
def test_wrong_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_missing_picture_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "none.png", "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == f"glesam degrade: error: {tmp_path / 'none.png'}: no such picture or folder\n"


def test_help_teaches_by_examples_that_parse_and_loads_no_opencv(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    examples = re.findall(r"^  (glesam degrade .*?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        assert make_parser().parse_args(example.split()[1:]).command == "degrade"
    code = "import sys, glesam_ros.cli.degrade; print('cv2' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "False False\n"
    )
