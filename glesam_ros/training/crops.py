"""Augmented crops of photographs with their regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from glesam_ros.datasets import Photograph

STRIDE = 4
"""Masks are made at this stride of the crop: the decoder's own resolution."""
MIN_AREA = 192
"""Smaller regions of a crop (in pixels; 12 cells of STRIDE) are not trained on."""


def draw_crop(
    draw: Callable[[np.random.Generator], Photograph], rng: np.random.Generator, height: int, width: int,
    zoom: tuple[float, float] = (1.0, 1.8), paste: float = 0.4, stride: int = STRIDE,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A random crop of a random photograph, with regions of another pasted in now and then.

    Args:
        draw: gives a photograph, for example `Scenes.draw`.
        rng: all chance comes from it.
        height, width: of the crop in pixels, multiples of `stride`.
        zoom: range of the scale, 1 is the largest crop that fits into the photograph.
        paste: share of the crops that get regions of another one.
        stride: pixels of the crop a cell of the regions.

    Returns:
        image (height, width, 3) uint8 RGB and regions (R, height / stride, width / stride) bool, R >= 1.
    """
    while True:
        image, regions = _crop(draw(rng), rng, height, width, zoom, stride)
        if rng.random() < paste:
            other, objects = _crop(draw(rng), rng, height, width, zoom, stride)
            image, regions = _paste(image, regions, other, objects, rng)
        regions = regions[regions.sum((1, 2)) * stride**2 >= MIN_AREA]
        if len(regions):
            return jitter(image, rng), regions


def _crop(
    photograph: Photograph, rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float], stride: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    h, w = photograph.image.shape[:2]
    scale = max(height / h, width / w) * rng.uniform(*zoom)
    flip = rng.random() < 0.5
    # rounding may take a side that fits exactly below zero
    x0, y0 = (rng.uniform(0, max(0.0, whole - part / scale)) for whole, part in ((w, width), (h, height)))

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
            layer, matrix(stride), (width // stride, height // stride),
            flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT,
        )
        regions += [small == number for number in np.unique(small) if number > 0]
    empty = np.zeros((0, height // stride, width // stride), bool)
    return image, np.stack(regions) if regions else empty


def _paste(
    image: np.ndarray[Any, Any], regions: np.ndarray[Any, Any], other: np.ndarray[Any, Any],
    objects: np.ndarray[Any, Any], rng: np.random.Generator,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    sizes = objects.mean((1, 2))
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


def jitter(image: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Small changes of brightness, contrast and colour: other cameras, not bad pictures."""
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    table = np.clip((np.arange(256)[:, None] - 128) * gain + 128 + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])
