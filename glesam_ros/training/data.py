"""Photographs with regions, from COCO instance files and BSDS500-style region sets, as augmented crops."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

STRIDE = 4
"""Masks are made at this stride of the crop: the decoder's own resolution."""
MIN_CELLS = 12
"""Smaller regions of a crop (in cells of STRIDE) are not trained on."""


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
        layers = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED).astype(np.int16) for p in paths]
        photographs.append(Photograph(name, read_rgb(folder / "images" / f"{name}.jpg"), layers, True))
    return photographs


def read_rgb(path: Path) -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8 RGB. Raises FileNotFoundError when the file is missing or no picture."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(f"expected a picture at {path}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


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


def draw_crop(
    photographs: list[Photograph], rng: np.random.Generator, height: int, width: int, paste: float = 0.4
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A random crop of a random photograph, with regions of another pasted in now and then.

    Returns:
        image (height, width, 3) uint8 RGB and regions (R, height / 4, width / 4) bool, R >= 1.
    """
    while True:
        image, regions = _crop(photographs[rng.integers(len(photographs))], rng, height, width, 1.0)
        if rng.random() < paste:
            other, objects = _crop(photographs[rng.integers(len(photographs))], rng, height, width, 1.0)
            image, regions = _paste(image, regions, other, objects, rng)
        regions = regions[regions.sum((1, 2)) >= MIN_CELLS]
        if len(regions):
            return _jitter(image, rng), regions


def _crop(
    photograph: Photograph, rng: np.random.Generator, height: int, width: int, smallest: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    h, w = photograph.image.shape[:2]
    scale = max(height / h, width / w) * smallest * rng.uniform(1.0, 1.8)
    flip = rng.random() < 0.5
    x0, y0 = rng.uniform(0, w - width / scale), rng.uniform(0, h - height / scale)

    def matrix(step: float) -> np.ndarray[Any, Any]:
        """Crop cell of `step` pixels -> source pixel."""
        s = step / scale
        first = 0.5 * s - 0.5
        if flip:
            return np.array([[-s, 0, x0 + width / scale - 0.5 - 0.5 * s], [0, s, y0 + first]])
        return np.array([[s, 0, x0 + first], [0, s, y0 + first]])

    source = photograph.image
    if scale < 0.75:
        source = cv2.GaussianBlur(source, (0, 0), 0.4 / scale)  # against aliasing
    image = cv2.warpAffine(
        source, matrix(1), (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    layers = photograph.layers
    if photograph.alternatives:
        layers = [layers[rng.integers(len(layers))]]
    regions = []
    for layer in layers:
        small = cv2.warpAffine(
            layer, matrix(STRIDE), (width // STRIDE, height // STRIDE),
            flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT,
        )
        regions += [small == number for number in np.unique(small) if number > 0]
    empty = np.zeros((0, height // STRIDE, width // STRIDE), bool)
    return image, np.stack(regions) if regions else empty


def _paste(
    image: np.ndarray[Any, Any], regions: np.ndarray[Any, Any], other: np.ndarray[Any, Any],
    objects: np.ndarray[Any, Any], rng: np.random.Generator,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    area = image.shape[0] * image.shape[1] / STRIDE**2
    sizes = objects.sum((1, 2)) / area
    fit = np.flatnonzero((sizes > 0.01) & (sizes < 0.25))
    if not len(fit):
        return image, regions
    for k in rng.choice(fit, min(len(fit), int(rng.integers(1, 4))), replace=False):
        small = objects[k]
        soft = cv2.resize(small.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
        soft = np.clip(soft * 2 - 0.5, 0, 1)
        image = (image * (1 - soft) + other * soft).astype(np.uint8)
        regions = np.concatenate([regions & ~small, small[None]])
    return image, regions


def _jitter(image: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Small changes of brightness, contrast and colour: other cameras, not bad pictures."""
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    table = np.clip((np.arange(256)[:, None] - 128) * gain + 128 + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])
