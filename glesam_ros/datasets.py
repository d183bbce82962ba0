"""Photographs with ground-truth regions, from COCO instance files and BSDS500-style region sets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class Photograph:
    """One image and its ground truth.

    Attributes:
        name: file name, for messages.
        image: (H, W, 3) uint8 RGB.
        layers: ground truth as label maps (H, W) int16, 0 unlabeled; BSDS500: one layer an annotator, COCO: as many
            layers as overlapping instances need.
        alternatives: True when each layer is a whole segmentation of its own (one is drawn at a time).
    """

    name: str
    image: np.ndarray[Any, Any]
    layers: list[np.ndarray[Any, Any]]
    alternatives: bool


def load_coco(folder: Path, split: str) -> list[Photograph]:
    """Photographs of `<folder>/<split>.json` (COCO instances) with their non-crowd instances.

    Raises:
        FileNotFoundError: the annotation file or an image is missing.
    """
    document = json.loads((folder / f"{split}.json").read_text())
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in document["annotations"]:
        if not annotation.get("iscrowd"):
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    photographs = []
    for entry in document["images"]:
        image = read_rgb(folder / "images" / entry["file_name"])
        h, w = image.shape[:2]
        layers: list[np.ndarray[Any, Any]] = []
        for number, annotation in enumerate(by_image.get(entry["id"], []), 1):
            mask = decode_segmentation(annotation["segmentation"], h, w)
            layer = next((item for item in layers if not item[mask].any()), None)
            if layer is None:
                layer = np.zeros((h, w), np.int16)
                layers.append(layer)
            layer[mask] = number
        if layers:
            photographs.append(Photograph(entry["file_name"], image, layers, False))
    return photographs


def load_bsds(folder: Path, split: str) -> list[Photograph]:
    """Photographs of `<folder>/<split>.txt` with one label map for each annotator.

    Raises:
        FileNotFoundError: the list or an image is missing.
    """
    photographs = []
    for name in (folder / f"{split}.txt").read_text().split():
        paths = sorted((folder / "regions").glob(f"{name}_*.png"))
        layers = [_read(p, cv2.IMREAD_UNCHANGED).astype(np.int16) for p in paths]
        photographs.append(Photograph(name, read_rgb(folder / "images" / f"{name}.jpg"), layers, True))
    return photographs


def read_rgb(path: Path) -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8 RGB. Raises FileNotFoundError when the file is missing or no picture."""
    return np.asarray(cv2.cvtColor(_read(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def _read(path: Path, flags: int) -> np.ndarray[Any, Any]:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise FileNotFoundError(f"expected a picture at {path}, found none that can be read")
    return image


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray[Any, Any]:
    """COCO polygons or RLE -> (H, W) bool."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle).astype(bool)


def region_masks(photograph: Photograph, layer: int | None = None) -> np.ndarray[Any, Any]:
    """All regions as (R, H, W) bool; of one `layer` where the layers are alternatives."""
    layers = [photograph.layers[layer or 0]] if photograph.alternatives else photograph.layers
    masks = [item == number for item in layers for number in np.unique(item) if number > 0]
    return np.stack(masks) if masks else np.zeros((0, *photograph.image.shape[:2]), bool)
