"""LQSeg data sets on disk: known masks from every source, the same bytes after a kill, every malformed annotation."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from glesam_ros.cli.main import main, make_parser
from glesam_ros.datasets import load_clear_lqseg, load_lqseg, region_masks, rle_counts
from glesam_ros.degradation import degrade, names
from glesam_ros.labelled import write_label_map
from glesam_ros.lqseg.build import JOURNAL, BuildOptions, Summary, build, file_seed
from glesam_ros.lqseg.sources import MAX_LABEL, Index, Source, read_truth
from glesam_ros.lqseg.verify import verify

HEIGHT, WIDTH = 24, 32
SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]
"""Polygon of 8 x 8 pixels."""


def picture(path: Path, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Write a noise picture; (H, W, 3) uint8 RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return image


def label_map(path: Path, labels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), labels)
    return labels


def box(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def annotation(number: int, segmentation: Any = SQUARE, image: Any = 1, **other: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 3, "segmentation": segmentation, "iscrowd": 0, **other}


def coco_source(folder: Path, annotations: list[Any], images: list[Any] | None = None, **top: Any) -> BuildOptions:
    picture(folder / "images" / "a.png")
    if images is None:
        images = [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cup"}], **top}
    (folder / "ann.json").write_text(json.dumps(document))
    return BuildOptions("coco", folder / "images", folder / "ann.json", levels=(1,))


def many(folder: Path, count: int = 5) -> BuildOptions:
    """Pictures with a mask each, the third with a broken annotation beside."""
    images, annotations = [], []
    for n in range(1, count + 1):
        picture(folder / "images" / f"{n}.png", n)
        images.append({"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH})
        annotations.append(annotation(n, image=n))
    annotations.append(annotation(99, [[1, 2, 3]], image=3))
    options = coco_source(folder, annotations, images)
    return BuildOptions("coco", options.images, options.annotations, levels=(1, 3), kinds=("lq", "fog"), seed=5)


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def built_masks(out: Path) -> list[np.ndarray]:
    """Masks of the first picture in the order of its instances, from the files."""
    entry = entries(out)[0]
    layers = [cv2.imread(str(out / name), cv2.IMREAD_UNCHANGED) for name in entry["layers"]]
    assert all(layer.dtype == np.uint16 and layer.shape == (HEIGHT, WIDTH) for layer in layers)
    return [layers[i["layer"]] == i["label"] for i in entry["instances"]]


def kinds_of(summary: Summary) -> list[tuple[str, Any]]:
    return [(fault.kind, fault.annotation) for fault in summary.faults]


# sources


def test_box_of_a_narrow_mask(tmp_path: Path) -> None:
    """cv2.boundingRect of OpenCV 4.5 says that this one is 1 pixel wide."""
    labels = np.zeros((34, 2), np.uint8)
    labels[[3, 3, 20, 21], [0, 1, 0, 0]] = 5
    label_map(tmp_path / "a.png", labels)
    source = Source("a", "a", tmp_path / "a.jpg", masks=(tmp_path / "a.png",))
    [instance] = read_truth(Index("ade20k", "masks"), source, labels.shape).instances
    assert (instance["label"], instance["area"], instance["bbox"]) == (5, 4, [0, 3, 2, 19])


def test_coco_polygons_and_both_kinds_of_rle_give_their_masks(tmp_path: Path) -> None:
    ring = box(2, 2, 20, 20) & ~box(6, 6, 14, 14)
    compressed = coco.encode(np.asfortranarray(ring, np.uint8))
    columns = box(8, 0, 16, HEIGHT)
    annotations = [
        annotation(10, SQUARE, bbox=[4, 4, 8, 8]),
        annotation(11, {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}),
        annotation(12, {"size": [HEIGHT, WIDTH], "counts": [8 * HEIGHT, 8 * HEIGHT, 16 * HEIGHT]}),
        annotation(13, {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, iscrowd=1),
        annotation(14, [[20, 0, 24, 0, 24, 4, 20, 4], [26, 20, 30, 20, 30, 24, 26, 24]]),
    ]
    licences = [{"id": 4, "name": "CC BY 2.0"}]
    images = [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH, "license": 4}]
    summary = build(coco_source(tmp_path, annotations, images, licenses=licences), tmp_path / "out")
    assert summary.faults == []
    (entry,) = entries(tmp_path / "out")
    expected = [box(4, 4, 12, 12), ring, columns, box(20, 0, 24, 4) | box(26, 20, 30, 24)]
    np.testing.assert_array_equal(built_masks(tmp_path / "out"), expected)
    assert [i["id"] for i in entry["instances"]] == [10, 11, 12, 14]
    assert [i["area"] for i in entry["instances"]] == [64, 18 * 18 - 64, 8 * HEIGHT, 32]
    assert [i["bbox"] for i in entry["instances"]] == [[4, 4, 8, 8], [2, 2, 18, 18], [8, 0, 8, 24], [20, 0, 10, 24]]
    assert len(entry["layers"]) == 3  # the first three overlap one another
    assert {i["category"] for i in entry["instances"]} == {3}
    assert entry["licence"] == licences[0]
    assert (entry["id"], entry["source_id"], entry["height"], entry["width"]) == ("a", 1, HEIGHT, WIDTH)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["categories"] == [{"id": 3, "name": "cup"}]
    assert info["counts"]["crowd_left_out"] == 1 and info["counts"]["instances"] == 4


def test_boxes_are_rounded_and_pictures_without_masks_are_counted(tmp_path: Path) -> None:
    images = [{"id": k, "file_name": f"{k}.png", "height": HEIGHT, "width": WIDTH} for k in (1, 2, 3)]
    picture(tmp_path / "images" / "1.png")
    annotations = [
        annotation(1, bbox=[-1, -0.6, WIDTH + 2, HEIGHT + 1.6]), annotation(2, bbox=[-1.2, 0, 9, 9]),
        annotation(3, RLE, image=2, iscrowd=1),
    ]
    summary = build(coco_source(tmp_path, annotations, images), tmp_path / "out")
    assert kinds_of(summary) == [("bbox_outside", 2)]
    assert [i["id"] for i in entries(tmp_path / "out")[0]["instances"]] == [1]
    assert summary.counts["images_without_masks"] == 2 and summary.counts["crowd_left_out"] == 1


@pytest.mark.parametrize("folder", ["images", "images/val2017"])
def test_lvis_names_its_pictures_by_address(tmp_path: Path, folder: str) -> None:
    picture(tmp_path / folder / "7.jpg")
    entry = {"id": 7, "coco_url": "http://example.com/val2017/7.jpg", "height": HEIGHT, "width": WIDTH}
    build(coco_source(tmp_path, [annotation(1, image=7)], [entry]), tmp_path / "out")
    assert entries(tmp_path / "out")[0]["image"] == "images/7.jpg"


def test_masks_of_a_folder_are_binary_or_label_maps(tmp_path: Path) -> None:
    picture(tmp_path / "i" / "a.jpg")
    picture(tmp_path / "i" / "b.png")
    label_map(tmp_path / "m" / "a.png", box(3, 3, 9, 9).astype(np.uint8) * 255)
    label_map(tmp_path / "m" / "b.png", (box(0, 0, 4, 4) * 7 + box(8, 8, 12, 20) * 300).astype(np.uint16))
    summary = build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out")
    assert summary.faults == []
    binary, labels = entries(tmp_path / "out")
    assert [(i["label"], i["area"], i["bbox"]) for i in binary["instances"]] == [(1, 36, [3, 3, 6, 6])]
    assert [(i["label"], i["area"], i["bbox"]) for i in labels["instances"]] == [
        (7, 16, [0, 0, 4, 4]), (300, 48, [8, 8, 4, 12]),
    ]


def test_grey_masks_beside_their_pictures(tmp_path: Path) -> None:
    """The layout of MSRA10K: a.jpg and a.png in one folder, the mask with soft edges and three equal channels."""
    picture(tmp_path / "a.jpg")
    grey = box(3, 3, 9, 9) * 60 + box(4, 4, 8, 8) * 195
    label_map(tmp_path / "a.png", np.repeat(grey[..., None].astype(np.uint8), 3, axis=2))
    build(BuildOptions("folder", tmp_path, tmp_path, (1,), binary=True), tmp_path / "out")
    np.testing.assert_array_equal(built_masks(tmp_path / "out"), [box(4, 4, 8, 8)])


def test_of_a_grey_mask_what_is_above_127_is_the_object(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    label_map(tmp_path / "a.png", (box(0, 0, 32, 24) * 127 + box(3, 3, 9, 9)).astype(np.uint8))
    options = BuildOptions("folder", tmp_path, tmp_path, split="mine")
    assert command(options, tmp_path / "out", "--binary", "--split", "mine") == 0
    np.testing.assert_array_equal(built_masks(tmp_path / "out"), [box(3, 3, 9, 9)])
    settings = json.loads((tmp_path / "out" / "dataset.json").read_text())["settings"]
    assert settings["binary"] is True and settings["split"] == "mine"


def test_a_grey_mask_with_alpha_and_the_largest_label(tmp_path: Path) -> None:
    labels = box(3, 3, 9, 9) * 7 + box(10, 3, 12, 9) * MAX_LABEL
    picture(tmp_path / "i" / "a.jpg")
    label_map(tmp_path / "m" / "a.png", np.dstack([labels] * 3 + [np.full(labels.shape, 65535)]).astype(np.uint16))
    assert build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out").faults == []
    (pair,) = load_lqseg(tmp_path / "out")
    np.testing.assert_array_equal(pair.clear.layers, [labels])
    (entry,) = entries(tmp_path / "out")
    assert [i["category"] for i in entry["instances"]] == [None, None]


def test_labels_of_ade20k_are_categories(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "x.jpg")
    label_map(tmp_path / "annotations" / "x.png", (box(0, 0, 32, 10) * 3 + box(0, 10, 16, 24) * 150).astype(np.uint8))
    build(BuildOptions("ade20k", tmp_path / "images", tmp_path / "annotations", (1,)), tmp_path / "out")
    assert [i["category"] for i in entries(tmp_path / "out")[0]["instances"]] == [3, 150]
    np.testing.assert_array_equal(built_masks(tmp_path / "out"), [box(0, 0, 32, 10), box(0, 10, 16, 24)])


@pytest.mark.parametrize("palette", [
    [[0, 0, 0], [85, 85, 85], [170, 170, 170], [255, 255, 255]],
    [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]],
], ids=["grey", "coloured"])
def test_of_an_indexed_mask_the_index_counts(
    tmp_path: Path, palette: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="label maps need pillow; scripts/test.sh installs it")
    picture(tmp_path / "i" / "x.jpg")
    (tmp_path / "m").mkdir()
    labels = box(0, 0, 8, 8) * 1 + box(8, 0, 16, 12) * 2 + box(16, 0, 32, 24) * 3
    write_label_map(tmp_path / "m" / "x.png", labels.astype(np.uint8), np.array(palette, np.uint8))
    options = BuildOptions("ade20k", tmp_path / "i", tmp_path / "m", (1,))
    assert build(options, tmp_path / "out").faults == []
    (entry,) = entries(tmp_path / "out")
    assert [(i["category"], i["area"]) for i in entry["instances"]] == [(1, 64), (2, 96), (3, 384)]
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)  # OpenCV reads it, PIL does not
    (fault,) = build(options, tmp_path / "none").faults
    assert fault.kind == "mask_unreadable" and fault.message.startswith("expected a mask: Image size (768 pixels)")


@pytest.mark.parametrize(("inner", "areas"), [(7, [64]), (255, [64 + 32])])
def test_the_border_in_an_indexed_mask_is_no_object_unless_it_is_all_there_is(
    tmp_path: Path, inner: int, areas: list[int]
) -> None:
    pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")
    picture(tmp_path / "i" / "x.jpg")
    (tmp_path / "m").mkdir()
    labels = np.where(box(0, 0, 8, 8), inner, np.where(box(8, 0, 12, 8), 255, 0))
    write_label_map(tmp_path / "m" / "x.png", labels.astype(np.uint8), np.zeros((256, 3), np.uint8))
    assert build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out").faults == []
    (entry,) = entries(tmp_path / "out")
    assert [i["area"] for i in entry["instances"]] == areas


def test_of_an_indexed_binary_mask_the_grey_counts(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="label maps need pillow; scripts/test.sh installs it")
    picture(tmp_path / "a.jpg")
    write_label_map(tmp_path / "a.png", box(4, 4, 8, 8).astype(np.uint8), np.array([[0] * 3, [255] * 3], np.uint8))
    build(BuildOptions("folder", tmp_path, tmp_path, (1,), binary=True), tmp_path / "out")
    np.testing.assert_array_equal(built_masks(tmp_path / "out"), [box(4, 4, 8, 8)])


def bsds_source(folder: Path) -> BuildOptions:
    for name in ("1", "2"):
        picture(folder / "images" / f"{name}.jpg")
        for k in (0, 2, 10):
            label_map(folder / "regions" / f"{name}_{k}.png", (1 + box(0, 0, 5 + k, HEIGHT)).astype(np.uint8))
    (folder / "test.txt").write_text("2\n")
    return BuildOptions("bsds", folder / "images", folder / "regions", (2,), split="test")


def test_annotators_of_bsds_are_alternatives_and_the_list_chooses(tmp_path: Path) -> None:
    summary = build(bsds_source(tmp_path), tmp_path / "out")
    assert summary.faults == []
    (pair,) = load_lqseg(tmp_path / "out")
    assert pair.clear.name == "2" and pair.clear.alternatives
    areas = [region_masks(pair.clear, k).sum((1, 2)).tolist() for k in range(3)]
    assert [a[1] for a in areas] == [5 * HEIGHT, 7 * HEIGHT, 15 * HEIGHT]  # 10 comes after 2
    assert {i["category"] for i in entries(tmp_path / "out")[0]["instances"]} == {None}  # labels are no classes
    assert all(sum(a) == HEIGHT * WIDTH for a in areas)


def test_a_list_has_a_name_a_line_with_or_without_its_ending(tmp_path: Path) -> None:
    for name in ("my photo", "b", "2007.12", "left out"):
        picture(tmp_path / "i" / f"{name}.jpg")
        label_map(tmp_path / "m" / f"{name}.png", box(3, 3, 9, 9).astype(np.uint8))
    (tmp_path / "train.txt").write_text("my photo\n\n b.JPG \r\n2007.12\nb\n")
    assert build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out").faults == []
    assert [entry["source_id"] for entry in entries(tmp_path / "out")] == ["my photo", "b", "2007.12"]


def test_names_are_kept_as_far_as_a_file_may_have_them(tmp_path: Path) -> None:
    """Letters of any language stay; spaces, other signs and bytes that are no UTF-8 become "_", endings small."""
    images, masks = tmp_path / "i", tmp_path / "m"
    named = ["日本 語.PNG", "naïve ☃.JPG", os.fsdecode(b"f\xe9.tiff")]
    for name in named:
        picture(images / f"x{Path(name).suffix.lower()}")
        (images / f"x{Path(name).suffix.lower()}").rename(images / name)
        label_map(masks / "x.png", box(3, 3, 9, 9).astype(np.uint8))
        (masks / "x.png").rename(masks / f"{Path(name).stem}.PNG")
    assert build(BuildOptions("folder", images, masks, (1,)), tmp_path / "out").faults == []
    found = {entry["source_id"]: entry["image"] for entry in entries(tmp_path / "out")}
    assert found == {
        "日本 語": "images/日本_語.png", "naïve ☃": "images/naïve__.jpg", os.fsdecode(b"f\xe9"): "images/f_.tiff",
    }
    assert verify(tmp_path / "out") == []
    for pair in load_lqseg(tmp_path / "out"):
        np.testing.assert_array_equal(region_masks(pair.clear), [box(3, 3, 9, 9)])


# what is built


def test_degraded_pictures_are_bit_exact_and_their_seeds_in_the_manifest(tmp_path: Path) -> None:
    clear = many(tmp_path)
    build(clear, tmp_path / "out")
    for entry in entries(tmp_path / "out"):
        source = cv2.cvtColor(cv2.imread(str(tmp_path / "images" / f"{entry['id']}.png")), cv2.COLOR_BGR2RGB)
        assert (tmp_path / "out" / entry["image"]).read_bytes() == (
            tmp_path / "images" / f"{entry['id']}.png"
        ).read_bytes()
        assert [(d["kind"], d["level"]) for d in entry["degraded"]] == [("fog", 1), ("fog", 3), ("lq", 1), ("lq", 3)]
        for item in entry["degraded"]:
            assert item["seed"] == file_seed(5, entry["id"], item["kind"], item["level"])
            expected = degrade(source, item["kind"], item["level"], item["seed"])
            found = cv2.cvtColor(cv2.imread(str(tmp_path / "out" / item["file"])), cv2.COLOR_BGR2RGB)
            np.testing.assert_array_equal(found, expected.image)
            assert item["parameters"] == json.loads(json.dumps(expected.parameters))


def test_seeds_differ_in_each_part() -> None:
    base = (0, "1", "lq", 1)
    others = [(1, "1", "lq", 1), (0, "11", "lq", 1), (0, "1", "fog", 1), (0, "1", "lq", 2)]
    assert len({file_seed(*part) for part in (base, *others)}) == 5
    assert 0 <= file_seed(*base) < 2**53


def test_every_kind_can_be_written(tmp_path: Path) -> None:
    options = coco_source(tmp_path, [annotation(1)])
    summary = build(
        BuildOptions("coco", options.images, options.annotations, (2,), names()), tmp_path / "out"
    )
    assert summary.counts["degraded"] == len(names())
    assert verify(tmp_path / "out") == []


def test_a_limit_takes_the_first_pictures_alone(tmp_path: Path) -> None:
    options, out = many(tmp_path), tmp_path / "out"
    assert command(options, out, "--limit", "2") == 0
    assert [entry["id"] for entry in entries(out)] == ["1", "2"] and len(list((out / "images").iterdir())) == 2


def test_loader_gives_what_was_built(tmp_path: Path) -> None:
    build(many(tmp_path), tmp_path / "out")
    pairs = list(load_lqseg(tmp_path / "out", level=3, kind="lq"))
    assert [p.clear.name for p in pairs] == ["1", "2", "3", "4", "5"]
    for pair, entry in zip(pairs, entries(tmp_path / "out")):
        (item,) = [d for d in entry["degraded"] if (d["kind"], d["level"]) == ("lq", 3)]
        np.testing.assert_array_equal(pair.degraded.image, degrade(pair.clear.image, "lq", 3, item["seed"]).image)
        np.testing.assert_array_equal(region_masks(pair.degraded), [box(4, 4, 12, 12)])
        assert (pair.kind, pair.level, pair.degraded.layers[0].dtype) == ("lq", 3, np.int16)
    assert len(list(load_lqseg(tmp_path / "out"))) == 20
    with pytest.raises(ValueError, match="level: expected one of 1, 3 in .*, got 2"):
        load_lqseg(tmp_path / "out", level=2)
    with pytest.raises(ValueError, match="kind: expected one of fog, lq in .*, got 'snow'"):
        load_lqseg(tmp_path / "out", kind="snow")
    with pytest.raises(FileNotFoundError, match="no dataset.json"):
        load_lqseg(tmp_path / "images")
    info = tmp_path / "out" / "dataset.json"
    info.write_text(info.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="dataset.json: expected format 1, got 2; build it again"):
        load_lqseg(tmp_path / "out")


@pytest.mark.parametrize("cut", [1, 200, "line"])
def test_a_manifest_that_was_shortened_is_refused(tmp_path: Path, cut: Any) -> None:
    out = tmp_path / "out"
    build(many(tmp_path, 2), out)
    assert [clear.name for clear in load_clear_lqseg(out)] == ["1", "2"]
    manifest = out / "manifest.jsonl"
    data = manifest.read_bytes()
    manifest.write_bytes(data.splitlines(True)[0] if cut == "line" else data[:-cut])
    for load in (load_lqseg, load_clear_lqseg):
        with pytest.raises(ValueError, match=r"out/manifest\.jsonl: .* changed since the build; run `glesam lqseg ver"):
            load(out)


# resume


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    options = many(tmp_path)
    build(options, tmp_path / "one")
    build(options, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


KILL = """
import os, signal, sys
from pathlib import Path
from glesam_ros.lqseg import build as b
written = 0
def write_file(path, data, whole=b.write_file):
    global written
    written += 1
    if written == int(sys.argv[4]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + b.PART).write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, data)
b.write_file = write_file
b.build(b.BuildOptions("coco", Path(sys.argv[1]), Path(sys.argv[2]), (1, 3), ("lq", "fog"), 5), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("writes", [1, 2, 4, 21, 32, 33])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, writes: int) -> None:
    """Killed in the middle of a file: the description, of the first, a later and the last picture, the manifest."""
    options = many(tmp_path)
    build(options, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILL, str(options.images), str(options.annotations), str(out), str(writes)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    with pytest.raises((ValueError, FileNotFoundError)):
        load_lqseg(out)
    build(options, out)
    assert content(out) == content(tmp_path / "whole")


def test_a_picture_is_in_the_journal_before_the_next_is_waited_for(tmp_path: Path) -> None:
    """Or a kill would cost the work of all pictures since the last one that was."""
    journaled: list[list[str]] = []

    def track(items: Iterable[Any], total: int) -> Iterator[Any]:
        for item in items:
            yield item
            lines = (tmp_path / "out" / JOURNAL).read_text().splitlines()
            journaled.append([json.loads(line)["id"] for line in lines])

    build(many(tmp_path, 3), tmp_path / "out", track=track)
    assert journaled == [["1"], ["1", "2"], ["1", "2", "3"]]


@pytest.mark.parametrize("writes", [20, 21, 25])
def test_of_a_picture_that_a_kill_met_and_that_is_bad_now_nothing_is_left(tmp_path: Path, writes: int) -> None:
    """Killed at the picture, the mask or the last file of the fourth, which has no line yet; then it is taken away."""
    options, out = many(tmp_path), tmp_path / "out"
    command = [sys.executable, "-c", KILL, str(options.images), str(options.annotations), str(out), str(writes)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert any(path.name.startswith("4.") for path in (out / "images").iterdir())
    (options.images / "4.png").unlink()
    assert "image_missing" in [fault.kind for fault in build(options, out).faults]
    assert verify(out) == [] and [entry["id"] for entry in entries(out)] == ["1", "2", "3", "5"]


def test_of_a_picture_that_a_kill_met_no_layer_is_left_that_its_masks_no_longer_need(tmp_path: Path) -> None:
    options, out = bsds_source(tmp_path), tmp_path / "out"
    build(options, out)
    (out / "manifest.jsonl").unlink()  # as it is before the line of the only picture is written
    label_map(tmp_path / "regions" / "2_10.png", np.zeros((HEIGHT, WIDTH), np.uint8))  # no longer a segmentation
    build(options, out)
    build(options, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh") and verify(out) == []


@pytest.mark.parametrize("cut", [1, 200])
def test_what_is_there_is_not_built_again(tmp_path: Path, cut: int) -> None:
    options = many(tmp_path)
    build(options, tmp_path / "out")
    whole = content(tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines(True)
    (tmp_path / "out" / "manifest.jsonl").unlink()
    (tmp_path / "out" / JOURNAL).write_text("".join(lines[:3]) + lines[3][:-cut])
    (tmp_path / "out" / "masks" / "2_0.png").unlink()
    (tmp_path / "out" / "lq" / "lq-1" / "3.png").write_bytes(b"")
    build(options, tmp_path / "out")
    assert content(tmp_path / "out") == whole
    kept = {p.stem.split("_")[0] for p, stamp in stamps.items() if p.stat().st_mtime_ns == stamp}
    assert kept == {"1"}


def test_what_was_changed_in_the_source_is_built_again(tmp_path: Path) -> None:
    options, out = bsds_source(tmp_path), tmp_path / "out"
    (tmp_path / "test.txt").write_text("1\n2\n")
    build(options, out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.[pj]*g")}
    label_map(tmp_path / "regions" / "2_2.png", (1 + box(0, 0, 20, HEIGHT)).astype(np.uint8))
    build(options, out)
    assert {p.stem.split("_")[0] for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp} == {"2"}
    picture(tmp_path / "images" / "1.jpg", 7)
    label_map(tmp_path / "regions" / "1_10.png", np.zeros((HEIGHT, WIDTH), np.uint8))  # no longer a segmentation
    build(options, out)
    build(options, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh") and verify(out) == []
    # a manifest of before has no checksum of the masks
    lines = [{k: v for k, v in entry.items() if k != "masks_sha256"} for entry in entries(out)]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    label_map(tmp_path / "regions" / "2_0.png", (1 + box(0, 0, 9, HEIGHT)).astype(np.uint8))
    build(options, out)
    build(options, tmp_path / "again")
    assert content(out) == content(tmp_path / "again")


def test_a_changed_picture_of_coco_is_built_again(tmp_path: Path) -> None:
    options = many(tmp_path)
    build(options, tmp_path / "out")
    picture(tmp_path / "images" / "4.png", 9)
    (tmp_path / "images" / "5.png").unlink()
    assert [(f.kind, f.file) for f in build(options, tmp_path / "out").faults][-1] == ("image_missing", "5.png")
    built = (tmp_path / "out" / "images" / "4.png").read_bytes()
    assert built == (tmp_path / "images" / "4.png").read_bytes()
    assert [entry["id"] for entry in entries(tmp_path / "out")] == ["1", "2", "3", "4"]
    cut = tmp_path / "images" / "3.png"
    cut.write_bytes(cut.read_bytes()[:60])
    assert "image_unreadable" in [f.kind for f in build(options, tmp_path / "out").faults]
    assert verify(tmp_path / "out") == []  # nothing is left of 3 and 5


def test_a_stopped_build_of_what_was_changed_keeps_what_it_did(tmp_path: Path) -> None:
    options, out = many(tmp_path), tmp_path / "out"
    build(options, out)
    for number in (1, 2):
        picture(tmp_path / "images" / f"{number}.png", 9)

    def stop_after(count: int) -> None:
        def track(items: Iterable[Any], total: int) -> Iterator[Any]:
            yield from itertools.islice(items, count)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(options, out, track=track)
        with pytest.raises(ValueError, match="expected a finished data set; run its `glesam lqseg build` again"):
            load_lqseg(out)  # pictures of two states

    def stamps(names: str) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in out.rglob("*.png") if p.stem.split("_")[0] in names}

    stop_after(1)
    first = stamps("1")
    with (out / JOURNAL).open("a") as journal:
        journal.write('{"id": "2", "fil')  # cut by a kill; the next line must not be joined to it
    stop_after(2)
    both = stamps("12")
    assert stamps("1") == first
    build(options, out)
    assert stamps("12") == both
    build(options, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")


INTERRUPT = """
import os, signal, sys
from glesam_ros.cli.main import main
from glesam_ros.lqseg import build as b
def write_file(path, data, whole=b.write_file):
    whole(path, data)
    if path.match("images/4.png"):
        os.kill(os.getpid(), signal.SIGINT)
b.write_file = write_file
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_build_does_not_make_the_rest_first(tmp_path: Path) -> None:
    def track(items: Iterable[Any], total: int) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield from items

    with pytest.raises(KeyboardInterrupt):
        build(many(tmp_path, 60), tmp_path / "out", track=track)
    assert len(list(tmp_path.glob("out/images/*.png"))) < 60


def test_an_interrupted_command_goes_on(tmp_path: Path) -> None:
    options = many(tmp_path, 8)
    build(options, tmp_path / "whole")
    out = tmp_path / "out"
    command = [
        "lqseg", "build", "--from", "coco", "--images", str(options.images), "--annotations", str(options.annotations),
        "--levels", "3", "1", "--kinds", "lq", "fog", "--seed", "5", "--workers", "2", "--out", str(out),
    ]
    # the signal comes in the middle of a picture, which no other process can time
    interrupted = subprocess.run([sys.executable, "-c", INTERRUPT, *command], capture_output=True, text=True)
    assert interrupted.returncode == 130 and interrupted.stderr.endswith("glesam lqseg: stopped\n")
    assert json.loads((out / "dataset.json").read_text())["complete"] is False
    assert main(command) == 0
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 6}, "seed was 5, is 6"),
        ({"levels": (1,)}, "levels was [1, 3], is [1]"),
        ({"kinds": ("lq",)}, "kinds was ['fog', 'lq'], is ['lq']"),
        ({"limit": 2}, "limit was None, is 2"),
        ({"split": "test"}, "split was 'train', is 'test'"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    options = many(tmp_path, 1)
    build(options, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=re.escape(expected)):
        build(BuildOptions(**{**vars(options), **change}), tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_another_reading_of_masks_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    label_map(tmp_path / "a.png", box(3, 3, 9, 9).astype(np.uint8) * 255)
    build(BuildOptions("folder", tmp_path, tmp_path, (1,)), tmp_path / "out")
    with pytest.raises(ValueError, match="binary was False, is True"):
        build(BuildOptions("folder", tmp_path, tmp_path, (1,), binary=True), tmp_path / "out")


def test_a_second_build_of_a_folder_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    """They would write to the same names and lose each other's journal; what was killed holds nothing."""
    options, out = many(tmp_path), tmp_path / "out"
    second = [
        sys.executable, "-c", "import sys; from glesam_ros.cli.main import main; sys.exit(main(sys.argv[1:]))",
        "lqseg", "build", "--from", "coco", "--images", str(options.images), "--annotations", str(options.annotations),
        "--levels", "1", "3", "--kinds", "lq", "fog", "--seed", "5", "--out", str(out),
    ]
    answers: list[tuple[int, str]] = []

    def track(items: Iterable[Any], total: int) -> Iterator[Any]:
        for item in items:
            if not answers:
                run = subprocess.run(second, capture_output=True, text=True)
                answers.append((run.returncode, run.stderr))
            yield item

    build(options, out, track=track)
    text = f"glesam lqseg: error: {out}: another build writes there; wait for its end, or give another folder\n"
    assert answers == [(1, text)]
    assert verify(out) == [] and [entry["id"] for entry in entries(out)] == ["1", "2", "3", "4", "5"]
    assert subprocess.run(second, capture_output=True).returncode == 0


@pytest.mark.parametrize("description", ["{", "[]", "{}", '{"settings": null}', '{"settings": [1]}'])
def test_a_description_without_settings_is_refused(tmp_path: Path, description: str) -> None:
    options, out = many(tmp_path, 1), tmp_path / "out"
    out.mkdir()
    (out / "dataset.json").write_text(description)
    with pytest.raises(ValueError, match=r"dataset\.json: expected the settings of an earlier build; remove "):
        build(options, out)
    assert content(out) == {"dataset.json": description.encode()}


@pytest.mark.parametrize("name", ["version", "numpy", "opencv"])
def test_what_another_version_began_is_refused(tmp_path: Path, name: str) -> None:
    """Its bits may differ, and one data set would hold both."""
    options, out = many(tmp_path, 1), tmp_path / "out"
    build(options, out)
    info = json.loads((out / "dataset.json").read_text())
    now = info["settings"][name]
    info["settings"][name] = "0.0.1"
    (out / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=re.escape(f"{name} was '0.0.1', is '{now}'; build into another folder")):
        build(options, out)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"levels": ()}, "levels: expected some of 1, 2, 3; got ()"),
        ({"levels": (1, 4)}, "levels: expected some of 1, 2, 3; got (1, 4)"),
        ({"kinds": ()}, "; got none"),
        ({"kinds": ("fog", "dust")}, "; got dust"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"source": "bsds", "binary": True}, "binary: expected it with masks of a folder alone, got it with bsds"),
        ({"binary": True}, "binary: expected it with masks of a folder alone, got it with coco"),
        ({"source": "voc"}, "source: expected one of coco, folder, ade20k, bsds; got 'voc'"),
    ],
)
def test_options_that_do_not_exist_are_refused_before_the_folder_is_made(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    options = many(tmp_path, 1)
    with pytest.raises(ValueError, match=re.escape(expected)):
        build(BuildOptions(**{**vars(options), **change}), tmp_path / "out")
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        build(options, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_changed_source_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    options = many(tmp_path, 1)
    build(options, tmp_path / "out")
    options.annotations.write_text(options.annotations.read_text() + "\n")
    with pytest.raises(ValueError, match="fingerprint was"):
        build(options, tmp_path / "out")
    with pytest.raises(ValueError, match="expected an empty folder or an earlier build, found"):
        build(options, tmp_path / "images")
    regions = bsds_source(tmp_path / "b")
    build(regions, tmp_path / "bsds")
    label_map(tmp_path / "b" / "regions" / "2_3.png", np.ones((HEIGHT, WIDTH), np.uint8))  # one annotator more
    with pytest.raises(ValueError, match="fingerprint was"):
        build(regions, tmp_path / "bsds")


# malformed

RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 5, 5]}


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("polygon_points", annotation(9, [[1, 1, 5, 5]])),
        ("polygon_points", annotation(9, [*SQUARE, []])),
        ("polygon_odd", annotation(9, [[1, 1, 5, 5, 9, 1, 3]])),
        ("polygon_outside", annotation(9, [[1, 1, 5, 5, 1e9, 1]])),
        ("not_finite", annotation(9, [[1, 1, 5, float("nan"), 9, 1]])),
        ("not_finite", annotation(9, bbox=[1, 1, float("inf"), 4])),
        ("not_finite", annotation(9, bbox=[1, 1, 10**400, 4])),
        ("segmentation_malformed", annotation(9, [1, 1, 5, 5, 9, 1])),
        ("segmentation_malformed", annotation(9, [["1", 1, 5, 5, 9, 1]])),
        ("segmentation_malformed", annotation(9, "polygon")),
        ("segmentation_empty", annotation(9, [])),
        ("segmentation_empty", annotation(9, None)),
        ("segmentation_empty", annotation(9, {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})),
        ("segmentation_empty", annotation(9, [[-9, -9, -5, -9, -5, -5]])),
        ("rle_size", annotation(9, {**RLE, "size": [WIDTH, HEIGHT]})),
        ("rle_size", annotation(9, {"counts": RLE["counts"]})),
        ("rle_size", annotation(9, {**RLE, "counts": [5, 5]})),
        ("rle_size", annotation(9, {**RLE, "counts": "11"})),
        ("rle_counts", annotation(9, {**RLE, "counts": [-5, HEIGHT * WIDTH + 5]})),
        ("rle_counts", annotation(9, {**RLE, "counts": None})),
        ("rle_counts", annotation(9, {**RLE, "counts": "1 é"})),
        ("rle_counts", annotation(9, {**RLE, "counts": "oo"})),
        ("bbox_outside", annotation(9, bbox=[20, 4, 20, 4])),
        ("bbox_outside", annotation(9, bbox=[-3, 4, 8, 4])),
        ("bbox_malformed", annotation(9, bbox=[4, 4, 0, 4])),
        ("bbox_malformed", annotation(9, bbox=[4, 4, 8])),
        ("category_unknown", annotation(9, category_id=4)),
        ("category_unknown", annotation(9, category_id=[3])),
        ("annotation_image", annotation(9, image=2)),
        ("annotation_image", annotation(9, image=[1])),
        ("annotation_duplicate", annotation(1)),
        ("annotation_malformed", 17),
    ],
)
def test_a_malformed_annotation_is_named_and_the_rest_goes_on(tmp_path: Path, kind: str, bad: Any) -> None:
    summary = build(coco_source(tmp_path, [annotation(1), bad, annotation(2)]), tmp_path / "out")
    expected = bad["id"] if isinstance(bad, dict) else "annotations[1]"
    assert kinds_of(summary) == [(kind, expected)]
    (line,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(line) == vars(summary.faults[0])
    assert summary.faults[0].file == "ann.json" and summary.faults[0].message
    assert [i["id"] for i in entries(tmp_path / "out")[0]["instances"]] == [1, 2]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("image_missing", {"file_name": "nowhere.png"}),
        ("image_missing", {"file_name": "b" * 236 + ".png"}),
        ("image_unreadable", {"file_name": "text.png"}),
        ("image_unreadable", {"file_name": "empty.png"}),
        ("image_unreadable", {"file_name": "cut.jpg"}),
        ("image_unreadable", {"file_name": "folder"}),
        ("image_size", {"file_name": "b.png", "height": 99, "width": WIDTH}),
        ("image_malformed", {"file_name": "b.png", "height": -1, "width": WIDTH}),
        ("image_malformed", {"file_name": "../b.png"}),
        ("image_malformed", {"file_name": "."}),
        ("image_malformed", {"file_name": "b\0.png"}),
        ("image_malformed", {"file_name": "b\ud800.png"}),
        ("image_malformed", {"file_name": "b" * 237 + ".png"}),
        ("image_malformed", {"coco_url": "http://example.com/../c.png"}),
        ("image_malformed", {"coco_url": "http://[/c.png"}),
        ("image_malformed", {}),
        ("image_duplicate", {"file_name": "a.png"}),
        ("image_duplicate", {"id": 1, "file_name": "b.png"}),
    ],
)
def test_a_bad_picture_is_named_and_the_rest_goes_on(tmp_path: Path, kind: str, bad: dict[str, Any]) -> None:
    images = tmp_path / "images"
    picture(images / "b.png")
    picture(images / "cut.jpg", height=200, width=200)
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-200])
    (images / "text.png").write_text("not a picture")
    (images / "empty.png").touch()
    (images / "folder").mkdir()
    entries_ = [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}, {"id": 2, **bad}]
    annotations = [annotation(1), *([annotation(2, image=2)] if "id" not in bad else [])]
    summary = build(coco_source(tmp_path, annotations, entries_), tmp_path / "out")
    assert [fault.kind for fault in summary.faults] == [kind]
    assert [e["id"] for e in entries(tmp_path / "out")] == ["a"]


@pytest.mark.parametrize(("first", "second"), [("a.jpg", "a.png"), ("a b.png", "a_b.png"), ("a.png", "a.png")])
def test_pictures_of_coco_that_would_get_one_name_are_named(tmp_path: Path, first: str, second: str) -> None:
    for name in (first, second):
        picture(tmp_path / "images" / name)
    named = [{"id": k, "file_name": name} for k, name in enumerate((first, second), 1)]
    summary = build(coco_source(tmp_path, [annotation(1), annotation(2, image=2)], named), tmp_path / "out")
    [fault] = summary.faults
    assert fault.kind == "image_duplicate" and fault.annotation == "image 2"
    assert fault.message.startswith("expected names that differ without their ending in letters, digits")
    assert fault.message.endswith(f"got {second} after {first}")


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("mask_size", np.ones((HEIGHT, WIDTH + 1), np.uint8)),
        ("mask_empty", np.zeros((HEIGHT, WIDTH), np.uint8)),
        ("mask_colour", np.random.default_rng(0).integers(0, 9, (HEIGHT, WIDTH, 3), np.uint8)),
        ("mask_values", np.full((HEIGHT, WIDTH), MAX_LABEL + 1, np.uint16) + box(0, 0, 4, 4)),
        ("mask_unreadable", b"not a picture"),
        ("mask_missing", None),
        ("mask_duplicate", "bad.bmp"),
    ],
)
def test_a_bad_mask_is_named_and_the_rest_goes_on(tmp_path: Path, kind: str, mask: Any) -> None:
    for name in ("bad", "good"):
        picture(tmp_path / "i" / f"{name}.png")
        label_map(tmp_path / "m" / f"{name}.png", box(3, 3, 9, 9).astype(np.uint8))
    if isinstance(mask, np.ndarray):
        label_map(tmp_path / "m" / "bad.png", mask)
    elif mask is None:
        (tmp_path / "m" / "bad.png").unlink()
    elif isinstance(mask, str):
        label_map(tmp_path / "m" / mask, np.ones((HEIGHT, WIDTH), np.uint8))
    else:
        (tmp_path / "m" / "bad.png").write_bytes(mask)
    summary = build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out")
    assert [(fault.kind, fault.file) for fault in summary.faults] == [(kind, "bad.png")]
    assert [e["id"] for e in entries(tmp_path / "out")] == ["good"]


def test_a_mask_of_other_numbers_and_a_second_picture_for_a_name_are_named(tmp_path: Path) -> None:
    for name in ("a b", "a_b", "float"):
        picture(tmp_path / "i" / f"{name}.png")
        label_map(tmp_path / "m" / f"{name}.tiff", box(3, 3, 9, 9).astype(np.float32 if name == "float" else np.uint8))
    summary = build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out")
    assert [(fault.kind, fault.file) for fault in summary.faults] == [
        ("image_duplicate", "a_b.png"), ("mask_values", "float.tiff"),
    ]
    assert summary.faults[1].message == "expected labels of 8 or 16 bit, got float32"
    assert [e["source_id"] for e in entries(tmp_path / "out")] == ["a b"]


def test_a_name_too_long_for_what_is_made_of_it_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    for name in ("good", "é" * 125, "x" * 240):
        picture(tmp_path / "i" / f"{name}.png")
        label_map(tmp_path / "m" / f"{name}.png", mask)
    summary = build(BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,)), tmp_path / "out")
    assert [(fault.kind, fault.file) for fault in summary.faults] == [("name_long", f"{'é' * 125}.png")]
    assert [e["id"] for e in entries(tmp_path / "out")] == ["good", "x" * 240]


def test_a_picture_too_long_to_degrade_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    for name, size in {"good": (HEIGHT, WIDTH), "long": (2, 32767)}.items():
        picture(tmp_path / "i" / f"{name}.png", 0, *size)
        label_map(tmp_path / "m" / f"{name}.png", np.ones(size, np.uint8))
    options = BuildOptions("folder", tmp_path / "i", tmp_path / "m", (1,), ("rolling_shutter",))
    summary = build(options, tmp_path / "out")
    assert [(fault.kind, fault.file) for fault in summary.faults] == [("image_degrade", "long.png")]
    assert "'rolling_shutter', got 32767x2 pixels" in summary.faults[0].message
    assert [e["id"] for e in entries(tmp_path / "out")] == ["good"] and verify(tmp_path / "out") == []


def test_names_without_partner_are_named(tmp_path: Path) -> None:
    options = bsds_source(tmp_path)
    label_map(tmp_path / "regions" / "odd.png", np.ones((HEIGHT, WIDTH), np.uint8))
    (tmp_path / "test.txt").write_text("2\n3\n")
    assert kinds_of(build(options, tmp_path / "out")) == [("mask_name", None), ("image_missing", "3")]
    picture(tmp_path / "images" / "2.png")
    label_map(tmp_path / "regions" / "9_0.png", np.ones((HEIGHT, WIDTH), np.uint8))
    faults = build(BuildOptions("bsds", options.images, options.annotations), tmp_path / "all").faults
    assert sorted((f.kind, f.file) for f in faults) == [
        ("image_duplicate", "2.png"), ("image_missing", "9_0.png"), ("mask_name", "odd.png"),
    ]


@pytest.mark.parametrize("text", [
    "", "[]", '{"images": []}', "{", '{"images": [], "annotations": [], "categories": [1]}',
    '{"images": [], "annotations": [], "categories": [{"id": Infinity, "name": "cup"}]}',
])
def test_a_file_that_is_no_coco_is_refused(tmp_path: Path, text: str) -> None:
    options = coco_source(tmp_path, [])
    options.annotations.write_text(text)
    with pytest.raises(ValueError, match="ann.json: expected"):
        build(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_run_lengths_as_pycocotools_has_them() -> None:
    rng = np.random.default_rng(3)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((90, 70)) < share, np.uint8)
        counts = rle_counts(coco.encode(mask)["counts"])
        inside = np.arange(len(counts)) % 2
        np.testing.assert_array_equal(np.repeat(inside, counts), mask.reshape(-1, order="F"))


# verify and the command


def test_verify_finds_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    build(many(tmp_path), out)
    assert main(["lqseg", "verify", str(out)]) == 0
    path = out / "lq" / "fog-3" / "4.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (out / "masks" / "1_0.png").unlink()
    (out / "images" / "more.png").touch()
    (out / "manifest.jsonl").write_bytes((out / "manifest.jsonl").read_bytes() + b"{half")
    assert verify(out) == [
        "manifest.jsonl: changed since the build", "manifest.jsonl: line 6 cannot be read",
        "masks/1_0.png: missing", "lq/fog-3/4.png: changed, its checksum differs",
        "images/more.png: not in the manifest",
    ]
    capsys.readouterr()
    assert main(["lqseg", "verify", str(out)]) == 1
    assert "lq/fog-3/4.png: changed" in capsys.readouterr().err
    assert main(["lqseg", "verify", str(tmp_path / "images")]) == 1
    assert "expected an LQSeg data set" in capsys.readouterr().err


def command(options: BuildOptions, out: Path, *more: str) -> int:
    return main([
        "lqseg", "build", "--from", options.source, "--images", str(options.images), "--annotations",
        str(options.annotations), "--out", str(out), "--levels", "1", *more,
    ])


def test_command_reports_faults_and_strict_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = many(tmp_path)
    assert command(options, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("5 pictures, 5 degraded, 5 instances")
    assert "ann.json, 99: polygon_odd: expected x, y pairs, got 3 numbers" in captured.err
    assert "1 malformed: 1 polygon_odd; see" in captured.err
    assert command(options, tmp_path / "out", "--strict") == 1
    assert main(["lqseg", "info", str(tmp_path / "out")]) == 0
    assert re.search(r"faults +1 polygon_odd", capsys.readouterr().out)


def test_command_names_the_first_faults_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = coco_source(tmp_path, [annotation(1), *(annotation(k, []) for k in range(2, 9))])
    assert command(options, tmp_path / "out") == 0
    lines = capsys.readouterr().err.strip().splitlines()[-6:]
    assert [line.split(": ")[2] for line in lines[:5]] == [f"ann.json, {k}" for k in range(2, 7)]
    assert "7 malformed: 7 segmentation_empty; see" in lines[5]
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--kinds", "dust"], "kinds: expected some of low_light"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--images", "nowhere"], "nowhere: expected a folder of pictures"),
        (["--annotations", "nowhere"], "nowhere: expected a COCO or LVIS JSON file"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path, more: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(many(tmp_path, 1), tmp_path / "out", *more) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("glesam lqseg: error: ") and expected in line


def test_nothing_usable_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(coco_source(tmp_path, [annotation(1, [])]), tmp_path / "out") == 1
    assert "expected at least one picture with a mask, got none" in capsys.readouterr().err


def test_examples_of_the_help_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lqseg", "--help"])
    examples = re.findall(r"^  glesam (lqseg .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) == 5
    for example in examples:
        assert make_parser().parse_args(example.split()).command == "lqseg"
