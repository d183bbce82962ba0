"""Photographs with ground-truth regions, from COCO instance files, BSDS500 region sets, CamVid and LQSeg data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CAMVID_VOID = 11
"""Class of CamVid that is no thing."""
CAMVID_MIN_AREA = 192
"""Smaller parts of a class (px; 12 cells of 4 x 4) are left out: far poles and specks of the labelling."""
LQSEG_FORMAT = 1
"""Version of the layout that `glesam lqseg build` writes."""
LQSEG_INFO = "dataset.json"
LQSEG_MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Photograph:
    """One image and its ground truth.

    Attributes:
        name: file name, for messages.
        image: (H, W, 3) uint8 RGB.
        layers: ground truth as label maps (H, W) int16, 0 unlabeled; BSDS500: one layer an annotator, COCO: as many
            layers as overlapping instances need, CamVid: one.
        alternatives: True when each layer is a whole segmentation of its own (one is drawn at a time).
    """

    name: str
    image: np.ndarray[Any, Any]
    layers: list[np.ndarray[Any, Any]]
    alternatives: bool


@dataclass(frozen=True)
class StoredPhotograph:
    """A photograph on disk; sets of many do not fit into memory.

    Attributes:
        name, alternatives: as of `Photograph`.
        image, layers: files.
    """

    name: str
    image: Path
    layers: tuple[Path, ...]
    alternatives: bool

    def read(self) -> Photograph:
        """Raises FileNotFoundError when a file is missing or no picture."""
        layers = [_read(path, cv2.IMREAD_UNCHANGED).astype(np.int16) for path in self.layers]
        return Photograph(self.name, read_rgb(self.image), layers, self.alternatives)


@dataclass(frozen=True)
class LqsegPair:
    """A photograph, clear and degraded.

    Attributes:
        clear, degraded: the same name, size and layers.
        kind: of the degradation.
        level: 1..3.
    """

    clear: Photograph
    degraded: Photograph
    kind: str
    level: int


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


def load_camvid(folder: Path, split: str) -> list[Photograph]:
    """Frames of `<folder>/<split>.txt`; a region is a connected part of a class, so cars that touch are one.

    Raises:
        FileNotFoundError: the list, a frame or its labels are missing.
    """
    photographs = []
    for name in (folder / f"{split}.txt").read_text().split():
        classes = _read(folder / "labels" / f"{name}.png", cv2.IMREAD_UNCHANGED)
        layer = np.zeros(classes.shape[:2], np.int16)
        regions = 0
        for value in np.unique(classes[classes != CAMVID_VOID]):
            count, parts, stats, _ = cv2.connectedComponentsWithStats((classes == value).astype(np.uint8))
            for part in range(1, count):
                if stats[part, cv2.CC_STAT_AREA] >= CAMVID_MIN_AREA:
                    regions += 1
                    layer[parts == part] = regions
        if regions:
            photographs.append(Photograph(name, read_rgb(folder / "images" / f"{name}.jpg"), [layer], False))
    return photographs


def load_lqseg(folder: Path, level: int | None = None, kind: str | None = None) -> Iterator[LqsegPair]:
    """Pairs of an LQSeg data set, read one after the other in the order of its manifest.

    Args:
        folder: what `glesam lqseg build` wrote.
        level: 1, 2 or 3; None for all.
        kind: of the degradation; None for all.

    Raises:
        FileNotFoundError: there is no data set, or a file of it is missing.
        ValueError: the build was not finished, or it has no such level or kind.
    """
    settings = read_lqseg_info(folder)["settings"]
    for what, wanted, there in (("level", level, settings["levels"]), ("kind", kind, settings["kinds"])):
        if wanted is not None and wanted not in there:
            raise ValueError(f"{what}: expected one of {', '.join(map(str, there))} in {folder}, got {wanted!r}")
    return _lqseg_pairs(folder, level, kind)


def load_clear_lqseg(folder: Path) -> list[StoredPhotograph]:
    """The clear photographs of an LQSeg data set, not read yet.

    Raises:
        FileNotFoundError, ValueError: as `read_lqseg_info`.
    """
    read_lqseg_info(folder)
    with (folder / LQSEG_MANIFEST).open(encoding="utf-8") as lines:
        return [_stored(folder, entry) for entry in map(json.loads, lines)]


def _stored(folder: Path, entry: dict[str, Any]) -> StoredPhotograph:
    layers = tuple(folder / name for name in entry["layers"])
    return StoredPhotograph(entry["id"], folder / entry["image"], layers, entry["alternatives"])


def _lqseg_pairs(folder: Path, level: int | None, kind: str | None) -> Iterator[LqsegPair]:
    with (folder / LQSEG_MANIFEST).open(encoding="utf-8") as lines:
        for entry in map(json.loads, lines):
            clear = _stored(folder, entry).read()
            for item in entry["degraded"]:
                if level in (None, item["level"]) and kind in (None, item["kind"]):
                    degraded = replace(clear, image=read_rgb(folder / item["file"]))
                    yield LqsegPair(clear, degraded, item["kind"], item["level"])


def read_lqseg_info(folder: Path) -> dict[str, Any]:
    """dataset.json of a finished LQSeg data set.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, is of another format, or the build was not finished.
    """
    path = folder / LQSEG_INFO
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected an LQSeg data set, found no {LQSEG_INFO}")
    try:
        info: dict[str, Any] = json.loads(path.read_bytes())
        version, complete = info["settings"]["format"], info["complete"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the description of a data set; build it again") from error
    if version != LQSEG_FORMAT:
        raise ValueError(f"{path}: expected format {LQSEG_FORMAT}, got {version}; build it again")
    if not complete:
        raise ValueError(f"{folder}: expected a finished data set; run its `glesam lqseg build` again, it goes on")
    return info


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
