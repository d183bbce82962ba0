"""The labelled pictures that a run draws from, and augmented crops of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.labelled import EVERY, LabelledFolder, LabelledPicture, open_labelled
from glesam_ros.training.crops import jitter
from glesam_ros.training.rass_config import LabelledCropConfig, LabelledSourceConfig

Array = NDArray[Any]
VOID = -1
"""Label of a pixel of a crop that has no class."""
TRIES = 100
"""Crops that may have no class in a row."""
MEASURED = ("test", "val", "validation")
"""Splits that "all" would take in, too."""


@dataclass(frozen=True)
class LabelledScenes:
    """Folders with the same classes, and how often each of their pictures is drawn.

    Attributes:
        folders: at least one; pictures are read when they are drawn.
        upto: (F,) cumulated weights of the folders, the last is their sum.
    """

    folders: tuple[LabelledFolder, ...]
    upto: Array

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.folders[0].classes

    @property
    def palette(self) -> Array:
        """(K, 3) uint8 RGB."""
        return self.folders[0].palette

    @property
    def ignore(self) -> int:
        """Label of a pixel without a class, in `draw`."""
        return self.folders[0].ignore

    def draw(self, rng: np.random.Generator) -> LabelledPicture:
        """A picture, by weight."""
        folder = self.folders[int(np.searchsorted(self.upto, rng.random() * self.upto[-1], side="right"))]
        return folder[int(rng.integers(len(folder)))]


def load_labelled(sources: Sequence[LabelledSourceConfig], data: Path) -> LabelledScenes:
    """All sources together.

    Raises:
        FileNotFoundError: a folder, its list of classes or its labels are missing.
        ValueError: two sources have different classes, or "all" is asked of a folder that has a test split.
    """
    folders: list[LabelledFolder] = []
    for number, source in enumerate(sources):
        path = data / source.path
        if not path.is_dir():
            raise FileNotFoundError(
                f"sources.{number}.path: expected a folder {path}, found none; --data is the folder that holds it"
            )
        measured = [name for name in MEASURED if (path / f"{name}.txt").exists() or (path / "images" / name).exists()]
        if source.split == EVERY and measured:
            raise ValueError(
                f"sources.{number}.split: expected a split for training, got {EVERY!r} of {path}, which has the split "
                f"{measured[0]!r}: nothing is trained on a test split"
            )
        folder = open_labelled(path, source.split)
        if folders and folder.classes != folders[0].classes:
            other = sorted(set(folder.classes) ^ set(folders[0].classes)) or ["another order"]
            raise ValueError(
                f"sources.{number}: expected the classes of {folders[0].name} in their order, {folder.name} differs in "
                f"{', '.join(other[:5])}; give both the same classes.txt"
            )
        folders.append(folder)
    weights = [source.weight * len(folder) for source, folder in zip(sources, folders, strict=True)]
    return LabelledScenes(tuple(folders), np.cumsum(weights))


def draw_labelled(
    scenes: LabelledScenes, rng: np.random.Generator, height: int, width: int, scale: tuple[float, float],
    flip: float = 0.5,
) -> tuple[Array, Array]:
    """A random crop of a random picture, mirrored now and then.

    Args:
        rng: all chance comes from it.
        height, width: of the crop in pixels.
        scale: range of its scale, 1 is that at which the picture just covers the crop.
        flip: share of crops that are mirrored.

    Returns:
        image (height, width, 3) uint8 RGB, and labels (height, width) int16 or, of many classes, int32, `VOID` where
        there is no class: at least one pixel has one. Beyond the picture its edge is repeated, without class.

    Raises:
        ValueError: 100 crops in a row have no class.
    """
    for _ in range(TRIES):
        image, labels = _crop(scenes.draw(rng), scenes.ignore, rng, (height, width), scale, flip)
        if (labels != VOID).any():
            return image, labels
    raise ValueError(
        f"sources: expected pictures with classes, found {TRIES} crops in a row without; take other labels or a larger "
        "crop.scale"
    )


def draw_labelled_crop(
    scenes: LabelledScenes, rng: np.random.Generator, crop: LabelledCropConfig
) -> tuple[Array, Array]:
    """As `draw_labelled`, square and recoloured a little."""
    image, labels = draw_labelled(scenes, rng, crop.side, crop.side, crop.scale, crop.flip)
    return jitter(image, rng), labels


def _crop(
    picture: LabelledPicture, ignore: int, rng: np.random.Generator, size: tuple[int, int],
    scales: tuple[float, float], flip: float,
) -> tuple[Array, Array]:
    (h, w), (height, width) = picture.labels.shape, size
    scale = max(height / h, width / w) * rng.uniform(*scales)
    mirrored = rng.random() < flip
    # of a picture that is smaller than the crop the place within it is as random
    x0, y0 = (rng.uniform(*sorted((0.0, whole - part / scale))) for whole, part in ((w, width), (h, height)))
    first = 0.5 / scale - 0.5
    to_source = np.array([[1 / scale, 0, x0 + first], [0, 1 / scale, y0 + first]])
    if mirrored:
        to_source[0] = -1 / scale, 0, x0 + width / scale - 1 - first
    source: Array = picture.image
    if scale < 0.75:
        source = cv2.GaussianBlur(source, (0, 0), 0.4 / scale)  # against aliasing
    image = cv2.warpAffine(
        source, to_source, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    labels = cv2.warpAffine(
        picture.labels, to_source, (width, height), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT, borderValue=ignore,
    )
    signed = labels.astype(np.int16 if labels.dtype == np.uint8 else np.int32)
    signed[labels == ignore] = VOID
    return image, signed
