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
TRIES = 10_000
"""Crops without such a region that are drawn in a row."""


def draw_crop(
    draw: Callable[[np.random.Generator], Photograph], rng: np.random.Generator, height: int, width: int,
    zoom: tuple[float, float] = (1.0, 2.0), paste: float = 0.6, stride: int = STRIDE,
    detail: float = 1.0, turn: float = 0.0, stretch: float = 1.0,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A random crop of a random photograph, with regions of another pasted in now and then.

    Args:
        draw: gives a photograph, for example `Scenes.draw`.
        rng: all chance comes from it.
        height, width: of the crop in pixels, multiples of `stride`.
        zoom: range of the scale, 1 is the largest crop that fits into the photograph.
        paste: share of the crops that get regions of another one.
        stride: pixels of the crop a cell of the regions.
        detail: pixels of the returned image a pixel of the crop: what a camera of more pixels takes of the same scene.
        turn: largest angle in degrees to either side; what lies beyond the photograph's edge is its reflection.
        stretch: largest factor by which a crop is wider, or higher, than it should be, at least 1.

    Returns:
        image (height * detail, width * detail, 3) uint8 RGB, sides rounded, and regions (R, height / stride, width /
        stride) bool, R >= 1.

    Raises:
        ValueError: `TRIES` crops in a row have no region of `MIN_AREA` pixels.
    """
    shape = (height, width, zoom, stride, detail, turn, stretch)
    for _ in range(TRIES):
        image, regions = _crop(draw(rng), rng, *shape)
        if rng.random() < paste:
            other, objects = _crop(draw(rng), rng, *shape)
            image, regions = _paste(image, regions, other, objects, rng)
        regions = regions[regions.sum((1, 2)) * stride**2 >= MIN_AREA]
        if len(regions):
            return image, regions
    raise ValueError(
        f"sources: expected regions of at least {MIN_AREA} pixels in crops of {width}x{height}, found {TRIES} crops in "
        "a row without; raise crop.zoom or the sides of the crop"
    )


def _crop(
    photograph: Photograph, rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float], stride: int,
    detail: float, turn: float, stretch: float,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    h, w = photograph.image.shape[:2]
    scale = max(height / h, width / w) * rng.uniform(*zoom)
    flip = rng.random() < 0.5
    # rounding may take a side that fits exactly below zero
    x0, y0 = (rng.uniform(0, max(0.0, whole - part / scale)) for whole, part in ((w, width), (h, height)))
    centre = np.array([x0 + width / scale / 2, y0 + height / scale / 2]) - 0.5
    # chance is asked for what is wanted alone, so that seeds mean what they meant before
    angle = np.deg2rad(rng.uniform(-turn, turn)) if turn else 0.0
    wider = stretch ** (0.5 * rng.uniform(-1, 1)) if stretch > 1 else 1.0
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def matrix(across: int, down: int) -> np.ndarray[Any, Any]:
        """Cell of a grid of so many over the crop -> source pixel."""
        sides = np.array([(-1 if flip else 1) * width / wider, height * wider]) / scale
        steps = turned * (sides / (across, down))
        return np.column_stack([steps, centre - steps @ ((across - 1) / 2, (down - 1) / 2)])

    source, size = photograph.image, (round(width * detail), round(height * detail))
    if scale * detail < 0.75:
        source = cv2.GaussianBlur(source, (0, 0), 0.4 / (scale * detail))  # against aliasing
    image = cv2.warpAffine(
        source, matrix(*size), size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    layers, cells = photograph.layers, (width // stride, height // stride)
    if photograph.alternatives:
        layers = [layers[rng.integers(len(layers))]]
    regions = []
    for layer in layers:
        small = cv2.warpAffine(
            layer, matrix(*cells), cells,
            flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101,
        )
        regions += [small == number for number in np.unique(small) if number > 0]
    empty = np.zeros((0, *cells[::-1]), bool)
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


def recoloured(
    image: np.ndarray[Any, Any], rng: np.random.Generator, gamma: float, colour: float
) -> np.ndarray[Any, Any]:
    """Other light and another camera.

    Args:
        image: (H, W, 3) uint8.
        gamma: largest exponent of the brightness, at least 1; the smallest is its inverse.
        colour: largest gain of each colour, at least 1; the smallest is its inverse.

    Returns:
        (H, W, 3) uint8.
    """
    exponent = gamma ** rng.uniform(-1, 1)
    gain = colour ** rng.uniform(-1, 1, 3)
    table = np.clip(255 * (np.arange(256)[:, None] / 255) ** exponent * gain, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])


def jitter(image: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Small changes of brightness, contrast and colour: other cameras, not bad pictures."""
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    table = np.clip((np.arange(256)[:, None] - 128) * gain + 128 + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])
