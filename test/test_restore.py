"""glesam restore: names, formats, broken pictures, classes, wrong usage."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from glesam_ros.cli.main import main
from glesam_ros.models import registry


class Inverter:
    """A restorer that inverts pictures and remembers what it was told."""

    name, device = "inverter", "cpu"

    def __init__(self):
        self.told, self.closed = [], False

    def restore(self, image, classes=()):
        self.told.append(tuple(classes))
        if image.shape[0] == 13:
            raise RuntimeError("thirteen rows")
        return 255 - image

    def free(self):
        """Nothing is kept."""

    def close(self):
        self.closed = True


@pytest.fixture
def inverter(monkeypatch):
    model = Inverter()
    monkeypatch.setitem(registry._RESTORERS, "inverter", lambda device, precision: model)
    return model


def picture(seed, size=(40, 60)):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return cv2.GaussianBlur(image, (0, 0), 5)  # JPEG keeps it


def restore(*arguments):
    return main(["restore", "--model", "inverter", *map(str, arguments)])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, seed in (("a.JPG", 0), ("b.png", 1), ("below/c.bmp", 2)):
        cv2.imwrite(str(folder / name), picture(seed))
    cv2.imwrite(str(folder / "grey.pgm"), picture(3)[..., 0])
    return folder


def test_results_keep_names_sizes_and_colours(inverter, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert restore(photos, "-r", "--out", out) == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert names == {"a.JPG", "b.png", "below/c.bmp", "grey.png"}
    for name in ("a.JPG", "b.png", "below/c.bmp"):
        before, after = cv2.imread(str(photos / name)), cv2.imread(str(out / name))
        error = np.abs(after.astype(int) - (255 - before.astype(int)))
        assert error.max() <= (12 if name == "a.JPG" else 0)  # red and blue in their places
    grey = cv2.imread(str(photos / "grey.pgm"))
    assert np.array_equal(cv2.imread(str(out / "grey.png")), 255 - grey)
    assert inverter.told == [()] * 4 and inverter.closed
    assert "4 of 4 pictures" in capsys.readouterr().out


def test_a_broken_picture_is_reported_and_the_rest_restored(inverter, photos, tmp_path, capsys):
    (photos / "empty.png").write_bytes(b"")
    (photos / "cut.jpg").write_bytes((photos / "a.JPG").read_bytes()[:-200])
    cv2.imwrite(str(photos / "odd.png"), picture(4, (13, 20)))
    out = tmp_path / "out"
    assert restore(photos, "--out", out) == 1
    assert {path.name for path in out.iterdir()} == {"a.JPG", "b.png", "grey.png"}
    said = capsys.readouterr()
    assert "3 of 6 pictures" in said.out
    for name, reason in (("empty.png", "empty file"), ("cut.jpg", "cut short"), ("odd.png", "thirteen rows")):
        assert f"{name}: " in said.err and reason in said.err
    assert "error: 3 of 6 pictures failed, named above" in said.err


def test_classes_reach_the_model(inverter, photos, tmp_path):
    assert restore(photos / "b.png", "--out", tmp_path / "out", "--classes", "road", "traffic light") == 0
    assert inverter.told == [("road", "traffic light")]
    for wordless in (" ", " ,_"):  # commas and underscores stand for spaces
        with pytest.raises(SystemExit) as stop:
            restore(photos / "b.png", "--out", tmp_path / "out", "--classes", wordless)
        assert stop.value.code == 2


def test_black_and_white_of_16_bits_are_those_of_the_options(inverter, tmp_path):
    deep = np.full((8, 8), 3000, np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    ends = ["--min-image-value", "2000", "--max-image-value", "4000"]
    for options, expected in (([], 255 - (3000 >> 8)), (ends, 127)):
        assert restore(tmp_path / "deep.png", "--out", tmp_path / "out", *options) == 0
        assert (cv2.imread(str(tmp_path / "out" / "deep.png")) == expected).all()


def test_originals_are_not_replaced(inverter, photos, capsys):
    before = (photos / "b.png").read_bytes()
    assert restore(photos / "b.png", "--out", photos) == 1
    assert "expected another folder than that of" in capsys.readouterr().err
    assert (photos / "b.png").read_bytes() == before and not inverter.told


def test_originals_of_the_same_name_in_another_folder_are_not_replaced_either(inverter, photos, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    cv2.imwrite(str(other / "b.png"), picture(5))
    assert restore(other / "b.png", photos / "b.png", "--out", photos) == 1
    assert "b.png, which would be replaced" in capsys.readouterr().err and not inverter.told


def test_results_are_not_restored_again_and_what_cannot_be_read_is_named(inverter, photos, capsys):
    for _ in range(2):
        assert restore(photos, "/proc/self/mem", "-r", "--out", photos / "out") == 1
        said = capsys.readouterr()
        assert "4 of 5 pictures" in said.out and "skipped /proc/self/mem: " in said.err


def test_what_cannot_be_restored_is_said_in_one_line(inverter, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path / "none"))
    for arguments, expected in (
        ([tmp_path / "no.png"], "no such picture or folder"),
        ([photos, "--model", "nobody"], "restorer: expected one of .*scr-sd21; got 'nobody'"),
    ):
        assert restore(*arguments, "--out", tmp_path / "out") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("glesam restore: error: ")
        assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def test_the_restorer_that_is_the_default(photos, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("glesam_ros.models.glesam.torchvision_ops").allow_import_without_operators()
    for package in ("diffusers", "peft", "transformers"):
        pytest.importorskip(package)
    from tiny_sd import write_tiny_scr, write_tiny_sd

    monkeypatch.setenv("GLESAM_HOME", str(tmp_path / "home"))
    arguments = ["restore", str(photos / "b.png"), "--out", str(tmp_path / "out"), "--classes", "road", "car"]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glesam restore: error: ") and "glesam models get scr-sd21" in line
    write_tiny_sd(tmp_path / "home" / "sd21-base")
    write_tiny_scr(tmp_path / "home" / "rass" / "scr.pkl")
    assert main(arguments) == 0
    before, after = cv2.imread(str(photos / "b.png")), cv2.imread(str(tmp_path / "out" / "b.png"))
    assert after.shape == before.shape and not np.array_equal(after, before)
    np.testing.assert_allclose(after.mean((0, 1)), before.mean((0, 1)), atol=2)
