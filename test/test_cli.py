"""`glesam` from the outside: help, exit codes, segment, bench."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bright_model
import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from glesam_ros import __version__, models, settings
from glesam_ros.cli.main import main, make_parser
from glesam_ros.models import OutOfMemory, register_model, registry
from glesam_ros.picture_files import encoded, end_of_jpeg, is_cut_short

COMMANDS = (
    "bag", "bench", "degrade", "demo", "evaluate", "evaluate-semantic", "export", "lqseg", "models", "reallq",
    "restore", "segment", "semantic", "train",
)


def write(path: Path, rgb: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rgb if rgb.ndim == 2 else cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    assert cv2.imwrite(str(path), pixels)
    return path


def segment(*arguments: object) -> int:
    return main(["segment", *map(str, arguments), "--model", bright_model.register()])


def decoded(entries: list[dict]) -> np.ndarray:
    return np.array([coco.decode(e["segmentation"]) for e in entries]).astype(bool)


def sorted_masks(masks: np.ndarray) -> list[bytes]:
    return sorted(m.tobytes() for m in masks)


@pytest.mark.parametrize("command", [(), ("segment",), ("bag",), ("bench",), ("demo",)])
def test_help_teaches_by_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert "glesam " + " ".join(command) in text


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_the_help_parse(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = re.findall(rf"^  (glesam {command} .*?)(?:  .*)?$", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        words = words[: words.index(">")] if ">" in words else words
        assert make_parser().parse_args(words[1:]).command == command


def test_all_commands_are_looked_at(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert tuple(sorted(re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE))) == COMMANDS


@pytest.mark.parametrize("action", ["lqseg build", "lqseg info", "models get", "models where", "reallq pick"])
def test_the_help_of_an_action_says_what_it_does_and_where_its_examples_are(action, capsys):
    with pytest.raises(SystemExit):
        main([*action.split(), "--help"])
    text = capsys.readouterr().out
    about = text.split("\n\n")[1]
    assert about.endswith(".") and not about.startswith(("positional", "options"))
    assert text.rstrip().endswith(f"examples: glesam {action.split()[0]} --help")


def test_yes_or_no_is_the_default_of_a_switch(capsys):
    for command in ("segment", "evaluate", "restore"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert re.search(r"default:\s+(yes|no)\b", text) and not re.search(r"default:\s+(True|False)\b", text)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"glesam {__version__}\n"


def test_help_loads_neither_models_nor_bags_nor_ros():
    heavy = ("onnxruntime", "rosbags", "rclpy", "torch", "pycocotools")
    code = (
        "import sys; from glesam_ros.cli.main import make_parser; make_parser().format_help(); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# argparse itself ignores that its help goes nowhere, where that is not buffered
@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [("models", ""), ("models", "1"), ("--help", ""), ("train nano --print-config", "")]
)
def test_output_that_nobody_reads_is_no_failure(arguments, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "glesam_ros.cli.main", *arguments.split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_errors_that_nobody_reads_are_none_either():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "glesam_ros.cli.main", "segment", "nowhere.png", "--out", "nowhere"]
    try:
        assert subprocess.run(command, stdout=writing, stderr=writing).returncode == 141
    finally:
        os.close(writing)


@pytest.mark.parametrize(("where", "code", "expected"), [
    (">&-", 0, ""),
    (">/dev/full", 1, "glesam: error: the output cannot be written: [Errno 28] No space left on device\n"),
])
def test_output_that_is_closed_or_full(where, code, expected):
    command = f"{sys.executable} -m glesam_ros.cli.main models {where}"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (code, expected)


def test_a_broken_pipe_elsewhere_is_a_failure(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe", "a worker")

    monkeypatch.setattr(bright_model.BrightRegions, "encode", broken)
    picture = write(tmp_path / "a.png", bright_model.scene())
    monkeypatch.setattr("glesam_ros.cli.segment.FAILURES", (ValueError,))
    assert segment(picture, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err.endswith("glesam: error: [Errno 32] Broken pipe: 'a worker'\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required"),
        (["segment"], "--out"),
        (["segment", "a.png", "--out", "o", "--points", "3"], "X,Y"),
        (["segment", "a.png", "--out", "o", "--points", "3,4,7"], "1 (inside) or 0 (outside)"),
        (["segment", "a.png", "--out", "o", "--box", "1,2,3"], "X1,Y1,X2,Y2"),
        (["segment", "a.png", "--out", "o", "--score-threshold", "1.5"], "expected -1 .. 1, got 1.5"),
        (["segment", "a.png", "--out", "o", "--processing-size", "2000"], "expected 0 .. 1024 px, got 2000"),
        (["segment", "a.png", "--out", "o", "--enhancement", "sometimes"], "always"),
        (["bench", "--size", "640"], "WIDTHxHEIGHT"),
        (["bench", "--frames", "0"], "above 0"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_was_expected(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "nosuch"], "model: expected one of"),
        (["--device", "cpu", "--precision", "fp16"], "fp16 needs device tensorrt"),
    ],
)
def test_failures_are_one_line_without_traceback(arguments, expected, tmp_path, capsys):
    picture = write(tmp_path / "a.png", bright_model.scene())
    assert main(["segment", str(picture), "--out", str(tmp_path / "o"), *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("glesam segment: error: ")
    assert expected in lines[0]


def test_an_out_that_cannot_be_a_folder_is_named_with_the_remedy(tmp_path, capsys):
    picture, file = write(tmp_path / "a.png", bright_model.scene()), tmp_path / "file"
    file.write_text("")
    assert segment(picture, "--out", file) == 1
    assert capsys.readouterr().err == (
        f"glesam segment: error: {file}: expected a folder or a free name, got a file; give another name\n"
    )
    assert segment(picture, "--out", file / "below") == 1
    assert "expected a folder above it, got a file" in capsys.readouterr().err


def test_an_error_of_two_files_names_both(tmp_path, capsys, monkeypatch):
    def run(args):
        raise OSError(errno.EXDEV, "Invalid cross-device link", "a.part", None, "a")

    monkeypatch.setattr("glesam_ros.cli.segment.run", run)
    assert main(["segment", "x.png", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "glesam segment: error: a.part -> a: Invalid cross-device link\n"


@pytest.mark.parametrize(
    ("name", "expected"), [("a.mp4", "ffmpeg -i FILM"), ("a.MOV", "film"), ("b.mcap", "glesam bag")]
)
def test_a_film_or_a_bag_in_place_of_a_picture_is_named_with_the_way(name, expected, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"film")
    assert segment(tmp_path / name, "--out", tmp_path / "o") == 1
    assert re.search(f"skipped .*{name}: expected a picture, got .*{expected}", capsys.readouterr().err)


def test_missing_path_and_empty_folder_are_named(tmp_path, capsys):
    assert segment(tmp_path / "nowhere.png", "--out", tmp_path / "o") == 1
    assert "nowhere.png: no such picture or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert segment(tmp_path / "empty", "--out", tmp_path / "o") == 1
    said = capsys.readouterr().err
    assert "no picture" in said and "; -r looks into" in said
    # a command without -r does not name it
    assert main(["bag", "--from-images", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 1
    said = capsys.readouterr().err
    assert "no picture" in said and "looks into" not in said


def test_options_have_the_defaults_of_the_settings():
    args = make_parser().parse_args(["segment", "a.png", "--out", "o"])
    for name in ("model", "device", "enhancement", "score_threshold", "max_instances", "processing_size"):
        assert getattr(args, name) == settings.default(name)


def test_segment_writes_masks_overlay_and_rle_that_decode_to_the_truth(tmp_path):
    picture = write(tmp_path / "scene.png", bright_model.scene())
    assert segment(picture, "--out", tmp_path / "out") == 0
    entries = json.loads((tmp_path / "out/results.json").read_text())
    assert sorted_masks(decoded(entries)) == sorted_masks(bright_model.scene_masks())
    labels = cv2.imread(str(tmp_path / "out/scene_masks.png"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint16
    for entry, mask in zip(entries, decoded(entries)):
        np.testing.assert_array_equal(labels == entry["id"], mask)
        assert entry["bbox"] in ([10, 12, 30, 20], [60, 20, 20, 30])
        assert entry["area"] == 600 == mask.sum()
        assert isinstance(entry["segmentation"]["counts"], str)
        assert entry["file_name"] == str(picture)
        assert (entry["image_id"], entry["category_id"]) == (1, 1)
        assert (entry["degradation"], entry["enhanced"]) == (0, False)
        assert 0 < entry["score"] <= 1
        assert entry["stability"] == 1
    assert cv2.imread(str(tmp_path / "out/scene_overlay.jpg")).shape == (64, 96, 3)


def test_segment_enhances_a_dark_picture_and_says_so(tmp_path):
    picture = write(tmp_path / "dark.png", bright_model.scene(level=80))
    assert segment(picture, "--out", tmp_path / "auto") == 0
    entries = json.loads((tmp_path / "auto/results.json").read_text())
    assert len(entries) == 2
    assert all(e["enhanced"] and e["degradation"] == 1 for e in entries)
    assert segment(picture, "--out", tmp_path / "off", "--enhancement", "off") == 0
    assert json.loads((tmp_path / "off/results.json").read_text()) == []


@pytest.mark.parametrize("above", ["0.1", "1"])
def test_enhance_above_alone_says_when_a_picture_is_enhanced(tmp_path, above):
    picture = write(tmp_path / "dark.png", bright_model.scene(level=80))
    assert segment(picture, "--out", tmp_path / "out", "--enhance-above", above) == 0
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == (2 if above == "0.1" else 0)


def test_bad_pictures_are_named_and_the_others_are_done(tmp_path, capsys):
    folder = tmp_path / "in"
    good = write(folder / "b.png", bright_model.scene())
    write(folder / "c.jpg", bright_model.scene())
    whole = cv2.imencode(".jpg", bright_model.scene())[1].tobytes()
    (folder / "a_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "d_text.png").write_text("no picture")
    (folder / "e_empty.bmp").write_bytes(b"")
    (folder / "notes.txt").write_text("not looked at")
    assert segment(folder, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    for name in ("a_cut.jpg", "d_text.png", "e_empty.bmp"):
        assert re.search(rf"skipped .*{name}: expected a ", said.err)
    assert "notes.txt" not in said.err
    assert "3 of 5 pictures failed" in said.err
    assert "2 of 5 pictures, 4 instances" in said.out
    entries = json.loads((tmp_path / "out/results.json").read_text())
    assert {Path(e["file_name"]).name for e in entries} == {good.name, "c.jpg"}


def test_a_picture_that_memory_lacks_for_is_named_and_the_others_are_done(tmp_path, capsys):
    class Tight(bright_model.BrightRegions):
        def encode(self, image, budget):
            if image.shape[1] > 100:
                raise OutOfMemory("no room")
            return super().encode(image, budget)

    register_model("tight", lambda device, precision: Tight())
    write(tmp_path / "in/a_wide.png", bright_model.scene(width=120))
    write(tmp_path / "in/b.png", bright_model.scene())
    assert main(["segment", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--model", "tight"]) == 1
    assert re.search(r"skipped .*a_wide.png: no room; expected memory for at least", capsys.readouterr().err)
    entries = json.loads((tmp_path / "out/results.json").read_text())
    assert {Path(e["file_name"]).name for e in entries} == {"b.png"}


class Failing(bright_model.BrightRegions):
    """Fails on a picture by its width."""

    errors = {110: MemoryError(), 120: KeyboardInterrupt(), 130: TypeError("an error of the code")}

    def encode(self, image, budget):
        if image.shape[1] in self.errors:
            raise self.errors[image.shape[1]]
        return super().encode(image, budget)


@pytest.fixture
def failing(tmp_path, capsys):
    """Segments pictures of these widths, or files: exit code and what was said; that of width 96 is in the JSON."""
    register_model("failing", lambda device, precision: Failing())

    def run(*pictures: int | str):
        paths = [p if isinstance(p, str) else write(tmp_path / f"{p}.png", bright_model.scene(p)) for p in pictures]
        try:
            code = main(["segment", *map(str, paths), "--out", str(tmp_path / "out"), "--model", "failing"])
        finally:
            found = json.loads((tmp_path / "out/results.json").read_text())
            assert [Path(e["file_name"]).stem for e in found] == ["96", "96"]
        return code, capsys.readouterr().err

    return run


def test_a_picture_that_cannot_be_read_or_held_is_named_and_the_next_is_done(failing):
    code, said = failing("/proc/self/mem", 110, 96)
    assert code == 1 and "2 of 3 pictures failed" in said
    assert re.search(r"skipped /proc/self/mem: .*[Ee]rror", said) and re.search(r"110\.png: out of memory", said)


def test_what_was_done_is_in_the_json_of_a_run_that_was_stopped(failing):
    code, said = failing(96, 120, 140)
    assert code == 130 and "stopped" in said
    with pytest.raises(TypeError, match="of the code"):
        failing(96, 130)


def test_a_run_that_is_stopped_at_once_leaves_the_json_of_the_one_before(failing, tmp_path):
    file = tmp_path / "out" / "results.json"
    assert failing(96)[0] == 0
    before = file.read_text()
    assert failing(120, 96)[0] == 130 and file.read_text() == before


TERMINATED = """
import os, signal, sys
import bright_model
from glesam_ros.cli.main import main
from glesam_ros.models import register_model
class Terminated(bright_model.BrightRegions):
    def encode(self, image, budget):
        if image.shape[1] == 120:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().encode(image, budget)
register_model("terminated", lambda device, precision: Terminated())
code = main(sys.argv[1:])
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
sys.exit(code)
"""


def test_sigterm_stops_as_ctrl_c_does(tmp_path):
    pictures = [str(write(tmp_path / f"{width}.png", bright_model.scene(width))) for width in (96, 120, 140)]
    command = ["segment", *pictures, "--out", str(tmp_path / "out"), "--model", "terminated"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED, *command], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 143 and done.stderr.endswith("glesam segment: stopped\n")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert [Path(e["file_name"]).stem for e in found] == ["96", "96"]


def test_sigterm_is_left_to_who_handles_it_and_to_the_main_thread(monkeypatch):
    seen = []
    monkeypatch.setattr("glesam_ros.cli.bench.run", lambda args: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (lambda *_: None, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, handler)
            assert main(["bench"]) == 0 and seen.pop() == handler == signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert main(["bench"]) == 0 and callable(seen.pop()) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with ThreadPoolExecutor(1) as other:
            assert other.submit(main, ["bench"]).result() == 0 and seen.pop() == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_memory_that_lacks_elsewhere_is_one_line(monkeypatch, tmp_path, capsys):
    def lack(*_):
        raise MemoryError

    monkeypatch.setattr("glesam_ros.cli.segment.coco_results", lack)
    picture = write(tmp_path / "a.png", bright_model.scene())
    assert segment(picture, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == "glesam segment: error: out of memory\n"


@pytest.mark.parametrize("command", ["segment", "semantic", "restore"])
def test_a_missing_package_is_one_line_that_says_once_how_to_install_it(command, tmp_path, capsys, monkeypatch):
    def without(device, precision):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    for table in ("_REGISTRY", "_SEMANTIC", "_RESTORERS"):
        monkeypatch.setitem(getattr(registry, table), "without", without)
    picture = write(tmp_path / "a.png", bright_model.scene())
    assert main([command, str(picture), "--out", str(tmp_path / "out"), "--model", "without"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"glesam {command}: error: ") and line.count("install") == 2 == line.count("pip install") + 1


def test_training_asks_for_its_own_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("glesam_ros.training")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["train", "tiny", "--data", "nowhere"]) == 1
    assert capsys.readouterr().err.endswith("; install it: pip install 'glesam_ros[train]'\n")


def jpegs() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    small, plain = (cv2.imencode(".jpg", pixels)[1].tobytes() for pixels in (noise[:16, :16], noise))
    progressive = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    thumbnail = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    return {
        "plain": plain, "progressive": progressive, "with a thumbnail": plain[:2] + thumbnail + plain[2:],
        "filled": plain[:2] + b"\xff\xff\xff" + plain[2:],
    }


@pytest.mark.parametrize("kind", jpegs())
def test_a_jpeg_is_cut_short_wherever_it_ends_early_and_never_by_what_follows(kind):
    whole = jpegs()[kind]
    assert not is_cut_short(whole)
    assert all(is_cut_short(whole[:end]) for end in range(2, len(whole)))
    for seed in range(20):
        assert not is_cut_short(whole + np.random.default_rng(seed).bytes(20_000))
    assert not is_cut_short(whole + b"\xff\xda" + bytes(100))


def test_a_jpeg_of_nonsense_is_cut_short_or_not_but_never_hangs():
    rng = np.random.default_rng(1)
    for _ in range(200):
        is_cut_short(b"\xff\xd8" + rng.choice([0xFF, 0xE1, 0, 1, 0xD8], 300).astype(np.uint8).tobytes())
    assert is_cut_short(b"\xff\xd8\xff\xe1\x00\x00\xff\xe1\x00")


def test_a_png_is_whole_with_its_last_chunk_whatever_follows():
    whole = cv2.imencode(".png", bright_model.scene())[1].tobytes()
    assert not is_cut_short(whole) and not is_cut_short(whole + bytes(10_000))
    assert is_cut_short(whole[:-12])


def test_where_a_jpeg_ends_is_found_and_a_marker_in_a_later_segment_is_none():
    for whole in jpegs().values():
        assert end_of_jpeg(whole) == end_of_jpeg(whole + b"\xff\xd9") == len(whole) - 2
        assert end_of_jpeg(whole[:-2]) is None
    whole = jpegs()["progressive"]
    scan = whole.rindex(b"\xff\xda")
    remark = whole[:scan] + b"\xff\xfe\x00\x04\xff\xd9" + whole[scan:]
    assert end_of_jpeg(remark) == len(remark) - 2
    assert is_cut_short(remark[:-2])


def test_the_ending_of_a_file_is_its_format():
    pixels = bright_model.scene()
    assert encoded(Path("a.PNG"), pixels) == cv2.imencode(".png", pixels)[1].tobytes()
    assert encoded(Path("a.jpg"), pixels) == cv2.imencode(".jpg", pixels)[1].tobytes()
    worse = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()
    assert encoded(Path("a.JPEG"), pixels, 60) == worse


@pytest.mark.parametrize("raises", [False, True])
def test_a_picture_that_its_format_does_not_hold_is_named(raises, monkeypatch):
    def before_opencv_5(*_):
        raise cv2.error("Maximum supported image dimension is 65500 pixels")

    if raises:
        monkeypatch.setattr(cv2, "imencode", before_opencv_5)
    with pytest.raises(OSError, match=r"^out/wide\.jpg: expected .* got 70000x2 pixels.*; scale it down"):
        encoded(Path("out/wide.jpg"), np.zeros((2, 70_000, 3), np.uint8))


def test_a_photo_with_a_film_behind_it_is_segmented(tmp_path):
    photo = tmp_path / "motion.jpg"
    photo.write_bytes(cv2.imencode(".jpg", bright_model.scene())[1].tobytes() + b"\xff\xda" + bytes(9000))
    assert segment(photo, "--out", tmp_path / "out") == 0


def test_results_are_not_taken_for_pictures(tmp_path):
    folder = tmp_path / "in"
    write(folder / "a.png", bright_model.scene())
    write(folder / "below/b.png", bright_model.scene())
    for _ in range(2):
        assert segment(folder, "-r", "--out", folder / "results") == 0
        entries = json.loads((folder / "results/results.json").read_text())
        assert {Path(e["file_name"]).name for e in entries} == {"a.png", "b.png"}
    # a folder below that of the results is one of pictures all the same
    assert segment(folder / "below", "--out", folder) == 0


def test_pictures_are_not_replaced_by_results(tmp_path, capsys):
    folder = tmp_path / "in"
    write(folder / "a.png", bright_model.scene())
    own = write(folder / "a_overlay.jpg", bright_model.scene()).read_bytes()
    (tmp_path / "link").symlink_to(folder)
    for paths in ([folder], [folder / "a.png", folder / "a_overlay.jpg"]):
        for out in (folder, tmp_path / "link"):
            assert segment(*paths, "--out", out) == 1
            assert "expected another folder than that of" in capsys.readouterr().err
    assert (folder / "a_overlay.jpg").read_bytes() == own and len(list(folder.iterdir())) == 2
    assert segment(folder / "a.png", "--out", tmp_path) == 0


def test_help_of_what_runs_beside_masks_names_its_own_precisions(capsys):
    for command in ("semantic", "evaluate-semantic"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "no such model has int8" in text and "have auto always" not in text


def test_folders_below_and_equal_names_do_not_overwrite(tmp_path):
    for name in ("in/x.png", "in/x.bmp", "in/below/x.png"):
        write(tmp_path / name, bright_model.scene())
    assert segment(tmp_path / "in", "--out", tmp_path / "flat") == 0
    assert len(list((tmp_path / "flat").glob("**/*_masks.png"))) == 2
    assert segment(tmp_path / "in", tmp_path / "in/x.png", "-r", "--out", tmp_path / "deep") == 0
    assert len(list((tmp_path / "deep").glob("**/*_masks.png"))) == 4
    assert (tmp_path / "deep/below/x_masks.png").exists()


def test_grey_16_bit_and_alpha_pictures(tmp_path):
    rgb = bright_model.scene()
    grey = rgb.mean(2).astype(np.uint8)
    write(tmp_path / "in/grey.png", grey)
    write(tmp_path / "in/deep.png", grey.astype(np.uint16) * 257)
    alpha = np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 255, np.uint8)])
    assert cv2.imwrite(str(tmp_path / "in/alpha.png"), alpha)
    assert segment(tmp_path / "in", "--out", tmp_path / "out") == 0
    entries = json.loads((tmp_path / "out/results.json").read_text())
    for image_id in (1, 2, 3):
        masks = decoded([e for e in entries if e["image_id"] == image_id])
        assert sorted_masks(masks) == sorted_masks(bright_model.scene_masks())


def test_thermal_pictures_with_raw_counts_or_temperatures(tmp_path, capsys):
    """Black as they are; with what is black and white said, or found, the objects are there."""
    grey = bright_model.scene()[..., 0]
    counts = write(tmp_path / "in/counts.png", grey.astype(np.uint16) + 7000)
    kelvin = write(tmp_path / "in/kelvin.tiff", (grey / 10 + 280).astype(np.float32))
    assert segment(counts, "--out", tmp_path / "own") == 0
    assert not json.loads((tmp_path / "own/results.json").read_text())
    for picture, low, high in ((counts, 7000, 7255), (kelvin, 280, 305.5)):
        for options in (("--min-image-value", low, "--max-image-value", high), ("--do-dynamic-scaling",)):
            assert segment(picture, "--out", tmp_path / "out", *options) == 0
            entries = json.loads((tmp_path / "out/results.json").read_text())
            assert sorted_masks(decoded(entries)) == sorted_masks(bright_model.scene_masks())
    unit = write(tmp_path / "in/unit.tiff", (grey / 255).astype(np.float32))
    assert segment(unit, "--out", tmp_path / "out") == 0
    entries = json.loads((tmp_path / "out/results.json").read_text())
    assert sorted_masks(decoded(entries)) == sorted_masks(bright_model.scene_masks())
    write(kelvin, np.full((8, 9), np.nan, np.float32))
    assert segment(kelvin, "--out", tmp_path / "out", "--do-dynamic-scaling") == 1
    assert f"skipped {kelvin}: expected finite values, got NaN or infinity" in capsys.readouterr().err


def test_exif_orientation_is_applied(tmp_path):
    plain = cv2.imencode(".jpg", bright_model.scene(), [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    # APP1 with one IFD entry: tag 0x0112 orientation, type short, value 6 (turn 90 degrees clockwise)
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    exif = b"Exif\x00\x00" + tiff
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:])
    assert segment(turned, "--out", tmp_path / "out") == 0
    labels = cv2.imread(str(tmp_path / "out/turned_masks.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (96, 64)
    truth = np.rot90(bright_model.scene_masks().any(0), -1)
    assert (truth == (labels > 0)).mean() > 0.99  # JPEG edges


def test_points_and_boxes_prompt_their_objects(tmp_path):
    picture = write(tmp_path / "scene.png", bright_model.scene())
    prompts = ["--points", "70,30", "--points", "2,2,0", "--box", "10,12,40,32", "--box", "0,0,5,5"]
    assert segment(picture, "--out", tmp_path / "out", *prompts) == 0
    entries = json.loads((tmp_path / "out/results.json").read_text())
    truth = bright_model.scene_masks()
    masks = decoded(entries)
    assert [e["id"] for e in entries] == [1, 2, 3]
    np.testing.assert_array_equal(masks[:2], truth[::-1])
    assert entries[2]["bbox"] == [0, 0, 5, 5]


def test_prompt_outside_the_picture_names_the_numbers(tmp_path, capsys):
    picture = write(tmp_path / "scene.png", bright_model.scene())
    assert segment(picture, "--out", tmp_path / "out", "--points", "500,30") == 1
    assert "expected 0 <= x < 96 and 0 <= y < 64, got (500, 30)" in capsys.readouterr().err


def test_bench_measures_every_stage(tmp_path, capsys):
    picture = write(tmp_path / "scene.png", bright_model.scene())
    arguments = ["bench", "--model", bright_model.register(), "--image", str(picture), "--size", "160x120"]
    assert main([*arguments, "--frames", "4", "--json", str(tmp_path / "b.json")]) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "b.json").read_text())
    stages = ["encode", "finish", "enhance", "decode", "label map"]
    assert list(report["stages_ms"]) == [*stages, "whole frame", "not enhanced"]
    whole = report["stages_ms"]["whole frame"]
    assert 0 < whole["median"] <= whole["p95"]
    assert report["stages_ms"]["decode"]["median"] < whole["median"]
    assert report["fps"] == pytest.approx(1000 / whole["median"], rel=0.01)
    assert (report["model"], report["device"], report["size"], report["frames"]) == ("bright", "cpu", "160x120", 4)
    assert report["peak_rss_mb"] > 20
    for word in ("encode", "whole frame", "160x120", "MB"):
        assert word in table


def test_bench_refuses_a_place_that_cannot_be_written_before_it_measures(tmp_path, capsys):
    """Nobody waits for minutes to be told that."""
    for place, said in ((tmp_path, "expected a file, got a folder"), (tmp_path / "no" / "b.json", "No such file")):
        arguments = ["bench", "--model", bright_model.register(), "--frames", "1", "--json", str(place)]
        assert main(arguments) == 1
        streams = capsys.readouterr()
        assert said in streams.err and str(place) in streams.err and streams.out == ""


def test_bench_tells_the_size_of_the_weights_that_it_runs(tmp_path, capsys):
    shipped = Path(models.__file__).parent / "weights"
    own = shutil.copytree(shipped, tmp_path / "own", ignore=shutil.ignore_patterns("*_int8.onnx"))
    for model, folder in (("nano", shipped), (str(own), own)):
        assert main(["bench", "--model", model, "--frames", "1", "--size", "96x64", "--json", "-"]) == 0
        expected = sum(file.stat().st_size for file in folder.glob("nano_*")) / 1e6
        assert json.loads(capsys.readouterr().out)["weights_mb"] == pytest.approx(expected, abs=0.01)


def test_bench_list_names_models_and_devices(capsys):
    bright_model.register()
    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^cpu +yes$", text, re.MULTILINE)
    assert re.search(r"^cuda +(yes|no \(CUDAExecutionProvider)", text, re.MULTILINE)
    assert re.search(r"^models: bright, nano$", text, re.MULTILINE)
    # bases and enhancers, not each of their pairs
    assert "sam2.1_hiera_tiny" in text and "+glesam_small" in text and text.count("+glesam_small") == 1
    assert max(map(len, text.splitlines())) <= 100
