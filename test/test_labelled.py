"""Folders of labelled pictures: what is read is what the files say, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")

from PIL import Image  # noqa: E402

from glesam_ros import ade20k  # noqa: E402
from glesam_ros.labelled import (  # noqa: E402
    CAMVID_CLASSES,
    IGNORE,
    IGNORE_16,
    LabelledFolder,
    default_palette,
    open_labelled,
    read_label_map,
    write_label_map,
)


def put(folder: Path, name: str, labels: np.ndarray, where: str = "labels", ending: str = ".png") -> None:
    """A picture that is red 200 throughout, and its labels as they are."""
    image = np.zeros((*labels.shape[:2], 3), np.uint8)
    image[..., 2] = 200  # red in OpenCV's order
    for path, pixels in ((folder / "images" / f"{name}{ending}", image), (folder / where / f"{name}.png", labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), pixels)


def grey(*values: int, dtype: type = np.uint8) -> np.ndarray:
    """A label map whose columns have these values."""
    return np.tile(np.array(values, dtype), (4, 1))


def own(folder: Path, labels: np.ndarray | None = None, **document: object) -> LabelledFolder:
    """A folder of one picture with classes.json."""
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": ["road", "car", "tree"], **document}))
    put(folder, "a", grey(0, 1, 2, 255) if labels is None else labels)
    return open_labelled(folder, "all")


def test_ade20k_shifts_labels_by_one_and_has_its_classes_unless_the_folder_names_its_own(tmp_path: Path) -> None:
    put(tmp_path, "validation/v", grey(0, 1, 2, 150), "annotations", ".jpg")
    put(tmp_path, "training/t", grey(3, 3, 1, 0), "annotations", ".jpg")
    # the table that comes with ADE20K has other first words here and there; models have those of ade20k
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n" + "".join(f"{k}\tname {k}\n" for k in range(1, 151)))
    folder = open_labelled(tmp_path, "val")
    assert folder.classes == ade20k.CLASSES and np.array_equal(folder.palette, ade20k.PALETTE)
    assert len(folder) == 1
    image, labels, name = folder[0]
    assert name == "validation/v" and image.dtype == np.uint8 and image.shape == (4, 4, 3)
    assert abs(int(image[0, 0, 0]) - 200) < 8 and image[0, 0, 2] < 8  # RGB
    assert labels.dtype == np.uint8 and labels[0].tolist() == [IGNORE, 0, 1, 149] and folder.classes[149] == "flag"
    assert open_labelled(tmp_path, "train")[0].labels[0].tolist() == [2, 2, 0, IGNORE]
    assert open_labelled(tmp_path, "test").names == folder.names
    assert len(open_labelled(tmp_path, "all")) == 2
    with pytest.raises(FileNotFoundError, match="there: training, validation, all"):
        open_labelled(tmp_path, "objectInfo150")
    named = open_labelled(tmp_path, "train", classes=["wall", "building", "sky"], palette=[[1, 2, 3]] * 3)
    assert named.classes == ("wall", "building", "sky") and named.palette.tolist() == [[1, 2, 3]] * 3
    with pytest.raises(ValueError, match="got 3"):  # class 2 of two classes
        open_labelled(tmp_path, "train", classes=["wall", "building"])[0]
    (tmp_path / "classes.txt").write_text("\n".join(f"own {k}" for k in range(150)))
    assert open_labelled(tmp_path, "val").classes[149] == "own 149"


def test_camvid_has_eleven_classes_and_void(tmp_path: Path) -> None:
    folder = tmp_path / "CamVid"
    put(folder, "0001_1", grey(0, 3, 10, 11))
    put(folder, "0002_1", grey(0, 0, 0, 0))
    (folder / "train.txt").write_text("0002_1\n")
    (folder / "test.txt").write_text("0001_1.png\n")
    test = open_labelled(folder, "test")
    assert test.classes == CAMVID_CLASSES and test.palette.shape == (11, 3) and test.name == "CamVid"
    assert [tuple(one.labels[0]) for one in test] == [(0, 3, 10, IGNORE)]
    assert test.names == ("0001_1",) and open_labelled(folder, "train").names == ("0002_1",)
    with pytest.raises(FileNotFoundError, match="there: test, train, all"):
        open_labelled(folder, "val")


def test_the_same_layout_elsewhere_needs_a_class_list(tmp_path: Path) -> None:
    put(tmp_path, "a", grey(0, 1))
    with pytest.raises(FileNotFoundError, match="classes.txt, a name a line"):
        open_labelled(tmp_path, "all")
    (tmp_path / "classes.txt").write_text("# mine\nroad 128 64 128\ntraffic light: 1, 2, 3\n\n")
    folder = open_labelled(tmp_path, "all")
    assert folder.classes == ("road", "traffic light")
    assert folder.palette.tolist() == [[128, 64, 128], [1, 2, 3]]
    assert folder[0].labels[0].tolist() == [0, 1]
    (tmp_path / "classes.txt").write_text("road 128 64 128\ncar\n")
    with pytest.raises(ValueError, match="expected 2 colours"):
        open_labelled(tmp_path, "all")


def test_ignored_values(tmp_path: Path) -> None:
    assert own(tmp_path / "default")[0].labels[0].tolist() == [0, 1, 2, IGNORE]
    named = own(tmp_path / "named", grey(0, 1, 2, 9), ignore=[9, 1])
    assert named[0].labels[0].tolist() == [0, IGNORE, 2, IGNORE]  # what is ignored on purpose wins over a class
    with pytest.raises(ValueError, match=r"a\.png: expected labels of 3 classes.*got 7, 255; list .*ignore"):
        own(tmp_path / "wrong", grey(0, 7, 255, 2), ignore=9)[0]


def test_indexed_and_coloured_label_maps(tmp_path: Path) -> None:
    palette = [[10, 0, 0], [20, 0, 0], [0, 0, 30]]
    folder = own(tmp_path, palette=palette, ignore=[255, [1, 1, 1]])
    file = tmp_path / "labels" / "a.png"
    # colours of the indexed picture are not those of the classes: the index counts
    write_label_map(file, grey(2, 0, 1, 255), default_palette(256))
    with Image.open(file) as picture:
        assert picture.mode == "P"
    assert read_label_map(file)[0].tolist() == [2, 0, 1, 255]
    assert folder[0].labels[0].tolist() == [2, 0, 1, IGNORE]
    Image.fromarray(np.tile(np.array([*palette[::-1], [1, 1, 1]], np.uint8), (4, 1, 1))).save(file)
    assert folder[0].labels[0].tolist() == [2, 1, 0, IGNORE]
    Image.fromarray(np.tile(np.array([*palette, [11, 0, 0]], np.uint8), (4, 1, 1))).save(file)
    with pytest.raises(ValueError, match="#0b0000"):
        folder[0]
    bare = own(tmp_path / "bare", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="give each class its colour"):
        bare[0]


def test_a_colour_is_of_one_class_and_ignored_on_purpose(tmp_path: Path) -> None:
    palette = [[10, 0, 0], [20, 0, 0], [30, 0, 0]]
    coloured = np.tile(np.array(palette, np.uint8)[:, ::-1], (4, 1, 1))  # in OpenCV's order
    folder = own(tmp_path / "ignored", coloured, palette=palette, ignore=[[20, 0, 0]])
    assert folder[0].labels[0].tolist() == [0, IGNORE, 2]
    folder = own(tmp_path / "twice", coloured, palette=[*palette[:2], palette[0]], ignore=[[30, 0, 0]])
    with pytest.raises(ValueError, match=r"a\.png: expected colours of one class each, got #0a0000; "):
        folder[0]
    put(tmp_path / "twice", "a", grey(0, 1, 2))  # values tell classes of one colour apart
    assert folder[0].labels[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name, text, classes", [
    ("classes.txt", "road\ncar\n", ("road", "car")),
    ("classes.txt", "# mine\nStraße 1 2 3\n", ("Straße",)),
    ("classes.json", '{"classes": ["Straße"], "palette": [1, 2, 3]}', ("Straße",)),
])
def test_class_files_of_windows_begin_with_a_mark(
    tmp_path: Path, name: str, text: str, classes: tuple[str, ...]
) -> None:
    put(tmp_path, "a", grey(0, 0))
    for mark in ("", "\ufeff"):
        (tmp_path / name).write_text(mark + text, encoding="utf-8")
        assert open_labelled(tmp_path, "all").classes == classes


def test_more_than_255_classes_are_16_bit(tmp_path: Path) -> None:
    classes = [f"c{k}" for k in range(300)]
    folder = own(tmp_path, grey(0, 255, 299, 65535, dtype=np.uint16), classes=classes)
    labels = folder[0].labels
    assert labels.dtype == np.uint16 and labels[0].tolist() == [0, 255, 299, IGNORE_16] == [0, 255, 299, folder.ignore]
    write_label_map(tmp_path / "labels" / "a.png", labels, folder.palette)
    assert np.array_equal(folder[0].labels, labels)
    last = own(tmp_path, grey(0, 254, 255, 255), classes=classes[:255])[0].labels  # the most that 8 bits hold
    assert last.dtype == np.uint8 and last[0].tolist() == [0, 254, IGNORE, IGNORE]
    more = own(tmp_path, grey(0, 254, 255, 255), classes=classes[:256])[0].labels
    assert more.dtype == np.uint16 and more[0].tolist() == [0, 254, 255, 255]


def test_classes_that_are_given_keep_the_colours_of_the_folder_where_there_are_as_many(tmp_path: Path) -> None:
    palette = [[10, 0, 0], [20, 0, 0], [30, 0, 0]]
    own(tmp_path, palette=palette)
    (tmp_path / "classes.txt").write_text("other\n")  # classes.json is asked first
    assert open_labelled(tmp_path, "all").classes == ("road", "car", "tree")
    assert open_labelled(tmp_path, "all", classes=["a", "b", "c"]).palette.tolist() == palette
    two = open_labelled(tmp_path, "all", classes=["a", "b"])
    assert two.classes == ("a", "b") and np.array_equal(two.palette, default_palette(2)) and two.colours is None


def test_endings_in_capitals_and_grey_label_maps_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    put(tmp_path, "a", grey(0, 1), ending=".png")
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "a.PNG")
    file = tmp_path / "labels" / "a.png"
    for split in ("all", "mine"):
        (tmp_path / "mine.txt").write_text("a.PNG\n")
        assert open_labelled(tmp_path, split).images == (tmp_path / "images" / "a.PNG",)
    alpha = Image.merge("LA", [Image.fromarray(grey(0, 1)), Image.fromarray(grey(255, 0))])
    for picture in (Image.fromarray(grey(0, 1) > 0), alpha):
        picture.save(file)
        assert open_labelled(tmp_path, "all")[0].labels[0].tolist() == [0, 1], picture.mode


def test_splits_by_folder_and_choice_of_pictures(tmp_path: Path) -> None:
    for name in ("day/a", "day/b", "night/a"):
        put(tmp_path, name, grey(0, 1))
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    assert open_labelled(tmp_path, "day").names == ("day/a", "day/b")
    chosen = open_labelled(tmp_path, "all").select([2, 0])
    assert chosen.names == ("night/a", "day/a") == tuple(one.name for one in chosen)
    with pytest.raises(IndexError):
        chosen[2]
    with pytest.raises(FileNotFoundError, match="there: day, night, all"):
        open_labelled(tmp_path, "dusk")


def test_names_of_ade20ks_splits_are_its_own_and_so_are_its_classes_in_other_colours(tmp_path: Path) -> None:
    put(tmp_path / "mine", "train/a", grey(0, 1))
    (tmp_path / "mine" / "classes.txt").write_text("road\ncar\n")
    assert open_labelled(tmp_path / "mine", "train").names == ("train/a",)
    put(tmp_path / "ade", "training/a", grey(0, 1), "annotations")
    colours = default_palette(150)
    found = open_labelled(tmp_path / "ade", "train", palette=colours)
    assert found.classes == ade20k.CLASSES and np.array_equal(found.palette, colours)


def test_label_maps_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    for labels in (np.zeros((4, 4), np.int32), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"labels: expected \(H, W\) uint8 or uint16, got \(4, 4"):
            write_label_map(tmp_path / "a.png", labels, default_palette(3))
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match="expected at most 65535 classes, got 65536"):
        own(tmp_path, classes=[str(k) for k in range(65536)])


def test_a_picture_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    for name, ending in (("a", ".jpg"), ("a", ".png"), ("b", ".png")):
        put(tmp_path, name, grey(0, 1), ending=ending)
    with pytest.raises(ValueError, match="each picture once in the split all, got a twice, as a.jpg and a.png; take"):
        open_labelled(tmp_path, "all")
    (tmp_path / "test.txt").write_text("a.png\nb\n")
    assert open_labelled(tmp_path, "test").names == ("a", "b")
    (tmp_path / "test.txt").write_text("b\na.png\nb.png\n")
    with pytest.raises(ValueError, match="got b twice, as b.png and b.png"):
        open_labelled(tmp_path, "test")


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        open_labelled(tmp_path / "nowhere", "all")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match="found pictures"):
        open_labelled(tmp_path, "all")
    folder = own(tmp_path)
    file = tmp_path / "labels" / "a.png"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(FileNotFoundError, match=r"label map at .*a\.png"):
        folder[0]
    cv2.imwrite(str(file), grey(0, 1, 2))
    with pytest.raises(ValueError, match=r"\(4, 4\) of its picture, got \(4, 3\)"):
        folder[0]
    picture = tmp_path / "images" / "a.png"
    picture.write_bytes(picture.read_bytes()[:-12])
    with pytest.raises(FileNotFoundError, match=r"expected a whole picture at .*a\.png, found one cut short"):
        folder[0]
    picture.write_bytes(b"no picture")
    with pytest.raises(FileNotFoundError, match="expected a picture"):
        folder[0]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png: expected labels.*1 missing"):
        open_labelled(tmp_path, "all")


def test_a_label_map_that_pil_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    cv2.imwrite(str(file), grey(0, 1, 2))
    data = file.read_bytes()
    expected = r"expected a label map at .*a\.png, found none that can be read: "
    pixels = data.index(b"IDAT")
    file.write_bytes(data[: pixels - 4] + b"\0\0\0\1" + data[pixels:])  # the next chunk begins amid the pixels
    with pytest.raises(FileNotFoundError, match=f"{expected}broken PNG file"):
        read_label_map(file)
    file.write_bytes(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # twelve are more than twice as many
    with pytest.raises(FileNotFoundError, match=f"{expected}Image size"):
        read_label_map(file)


@pytest.mark.parametrize("text, match", [
    ('{"classes": "road"}', "list of names"),
    ('{"classes": []}', "at least one"),
    ('{"classes": ["a", "a"]}', "each once, got a"),
    ('{"names": ["a"]}', "classes"),
    ('{"classes": ["a"], "palette": [[1, 2]]}', "palette"),
    ('{"classes": ["a"], "palette": [[1, 2, 256]]}', r"0\.\.255"),
    ('{"classes": ["a"], "palette": [[0.2, 0.4, 1.0]]}', r"whole numbers 0\.\.255 .* got \[\[0\.2, 0\.4, 1"),
    ('{"classes": ["a", "b"], "palette": [[1, 2], [3, 4], [5, 6]]}', r"\[r, g, b\] of whole numbers"),
    ('{"classes": ["a"], "palette": [[1, 2, 1e30]]}', r"0\.\.255"),
    ('{"classes": ["a"], "palette": [[1, 2, NaN]]}', "whole numbers"),
    (f'{{"classes": ["a"], "palette": [[1, 2, {10**400}]]}}', "palette"),
    ('{"classes": ["a"], "ignore": true}', "ignore"),
    ('{"classes": ["a"], "ignore": "void"}', "ignore"),
    ("[1]", "list of classes"),
    ("{", "classes.json"),
])
def test_class_files_that_are_wrong(tmp_path: Path, text: str, match: str) -> None:
    put(tmp_path, "a", grey(0, 0))
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        open_labelled(tmp_path, "all")


def test_default_palette_is_the_published_one_and_tells_classes_apart() -> None:
    # PASCAL VOC: aeroplane, bicycle, bird, boat ... tv/monitor (20)
    voc = default_palette(20).tolist()
    assert voc[:4] == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]] and voc[19] == [0, 64, 128]
    assert len(np.unique(default_palette(1000), axis=0)) == 1000
