"""Readers of annotated photographs: what they return is what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="readers need pycocotools; scripts/test.sh installs it")

from glesam_ros.datasets import load_bsds, load_camvid, load_coco, region_masks  # noqa: E402


def test_readers_agree_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "regions").mkdir()
    image = np.zeros((20, 30, 3), np.uint8)
    image[..., 2] = 200  # red in OpenCV's order
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), image)
    square = {"image_id": 1, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]], "iscrowd": 0}
    overlapping = {"image_id": 1, "segmentation": [[10, 10, 20, 10, 20, 18, 10, 18]], "iscrowd": 0}
    crowd = {**square, "iscrowd": 1}
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [square, overlapping, crowd]}
    (tmp_path / "train.json").write_text(json.dumps(document))
    (photograph,) = load_coco(tmp_path, "train")
    assert photograph.image[0, 0].tolist() == [200, 0, 0]
    assert sorted(region_masks(photograph).sum((1, 2)).tolist()) == [80, 100]
    layer = np.zeros((20, 30), np.uint8)
    layer[:, :10], layer[:, 10:] = 1, 2
    cv2.imwrite(str(tmp_path / "regions" / "a_0.png"), layer)
    (tmp_path / "test.txt").write_text("a\n")
    (photograph,) = load_bsds(tmp_path, "test")
    assert region_masks(photograph, 0).sum((1, 2)).tolist() == [200, 400]
    with pytest.raises(FileNotFoundError):
        load_coco(tmp_path, "nowhere")


def test_camvid_regions_are_the_connected_parts_of_each_class(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    classes = np.full((60, 90), 11, np.uint8)  # void
    classes[:20] = 0  # sky is class 0, and a region all the same
    classes[30:50, :20], classes[30:50, 60:85] = 8, 8  # two cars apart
    classes[30:50, 20:40] = 9  # a pedestrian that touches the first
    classes[55:58, 50:53] = 2  # a speck
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), classes)
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), np.zeros((60, 90, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels" / "void.png"), np.full((60, 90), 11, np.uint8))
    (tmp_path / "train.txt").write_text("a\nvoid\n")
    (photograph,) = load_camvid(tmp_path, "train")
    assert sorted(region_masks(photograph).sum((1, 2)).tolist()) == [400, 400, 500, 1800]
    assert photograph.name == "a" and not photograph.alternatives and photograph.layers[0].dtype == np.int16
    (tmp_path / "test.txt").write_text("b\n")
    with pytest.raises(FileNotFoundError, match="b.png"):
        load_camvid(tmp_path, "test")
