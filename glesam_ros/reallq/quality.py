"""How bad a frame is: six measures of one picture and one score, 0 (clear) .. 1.

Every measure is a number with a published or closed form, so each can be checked on pictures whose answer is known. The
score takes them together so that each kind of badness is enough alone and none can hide another:

    score = 1 - product over measures of (1 - weight * badness)

with badness = 1 / (1 + (half / value)^2) where more is worse, 1 / (1 + (value / half)^2) where less is worse. It rises
with every badness and does not saturate, so that the worst of many bad frames still has its place. It does not depend
on the other frames of a bag as ranks would, so frames of several bags can be compared, and one picture can be measured
by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from glesam_ros.validation import FloatArray, UInt8Array, check_image

LONG_SIDE = 640
"""Larger pictures are measured at this long side (px), so that the measures do not depend on the resolution."""
BLOCK = 8
"""Side of the blocks (px) of JPEG and most video codecs."""
BLACK, WHITE = 4, 251
"""Grey levels from which on a pixel counts as clipped."""
BINOMIAL = np.array([0.25, 0.5, 0.25], np.float32)
NOISE_GAIN = 0.40625
"""Variance of white noise of variance 1 after the binomial filter and the Laplacian: sum of their squared weights."""

Level = Callable[[UInt8Array], float]
"""(H, W, 3) uint8 RGB -> degradation level, 0 (clear) .. 1 (LQ-3), for example of the model "nano"."""


@dataclass(frozen=True)
class Quality:
    """Measures of one picture.

    Attributes:
        level: predicted degradation, 0 (clear) .. 1 (LQ-3).
        sharpness: variance of the smoothed Laplacian without the noise's share over that of the picture, 0..1.41.
        brightness: mean luma, 0..255.
        noise: standard deviation of the noise in grey levels.
        clipped: share of pixels without detail because they are black or white, 0..1.
        blockiness: contrast of the 8x8 grid, 0 (none) .. 1 (nothing but blocks).
        contrast: standard deviation of the luma in grey levels; in no score, but where it is 0 nothing can be seen.
    """

    level: float
    sharpness: float
    brightness: float
    noise: float
    clipped: float
    blockiness: float
    contrast: float


@dataclass(frozen=True)
class Term:
    """One measure in the score.

    Attributes:
        weight: what it counts at most, 0..1 exclusive.
        half: its value at which it counts half.
        more_is_worse: False for sharpness and brightness.
    """

    weight: float
    half: float
    more_is_worse: bool = True

    def badness(self, value: float) -> float:
        """0 (good) .. 1, strictly monotonic."""
        ratio = value / self.half
        return ratio**2 / (1 + ratio**2) if self.more_is_worse else 1 / (1 + ratio**2)


TERMS = {
    "level": Term(0.9, 0.25),
    "sharpness": Term(0.5, 0.006, more_is_worse=False),
    "brightness": Term(0.5, 30.0, more_is_worse=False),
    "noise": Term(0.5, 10.0),
    "clipped": Term(0.5, 0.5),
    "blockiness": Term(0.5, 0.25),
}
"""The model knows more kinds of badness than the simple measures, so it counts most, and half where the node begins to
enhance. The simple ones see neither fog nor rain, the level alone hardly light JPEG and dim photographs; the halves lie
beyond what clear photographs have. How well all that tells bad from clear: benchmarks/reallq_score.py."""


def measure(image: UInt8Array, level: Level) -> Quality:
    """Measure one picture.

    Args:
        image: (H, W, 3) uint8 RGB, at least 16 pixels a side.
        level: predicts the degradation.

    Raises:
        TypeError, ValueError: not such a picture.
    """
    height, width = check_image(image).shape[:2]
    if min(height, width) < 2 * BLOCK:
        raise ValueError(f"image: expected at least {2 * BLOCK} pixels a side to measure, got {width}x{height}")
    predicted = float(level(image))
    full = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    scale = LONG_SIDE / max(height, width)
    if scale < 1:
        size = max(2, round(width * scale)), max(2, round(height * scale))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    # in floats, since luma rounded to whole grey levels would leave the noise in steps
    grey = np.asarray(cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY), np.float32)
    noise = noise_sigma(grey)
    return Quality(
        level=predicted,
        sharpness=sharpness(grey, noise),
        brightness=float(full.mean()),
        noise=noise,
        clipped=clipped_share(full),
        blockiness=blockiness(full.astype(np.float32)),
        contrast=float(grey.std()),
    )


def score(quality: Quality) -> float:
    """All measures in one number, 0 (clear) .. 1; see the top of this file."""
    return 1 - math.prod(1 - t.weight * t.badness(getattr(quality, name)) for name, t in TERMS.items())


def worst_measure(quality: Quality) -> str:
    """Name of the measure that counts most in the score."""
    return max(TERMS, key=lambda name: TERMS[name].weight * TERMS[name].badness(getattr(quality, name)))


def sharpness(grey: FloatArray, noise: float = 0.0) -> float:
    """Variance of the Laplacian of the picture, smoothed a little, over the variance of the picture.

    The variance of the Laplacian (Pertuz et al., "Analysis of focus measure operators", Pattern Recognition 2013) alone
    grows with the square of the contrast; the quotient does not, so that a dark or a foggy picture is not called
    blurred. The 3x3 binomial filter before it lets a fiftieth of the noise through, and what is left is subtracted. A
    wave along one axis with w radians a pixel has sin(w)^4.

    Args:
        grey: (H, W) float32, at least 5 pixels a side.
        noise: standard deviation of the white noise that it has, in grey levels.

    Returns:
        0 (no edge) .. 1.41 (diagonal waves of 5 pixels); 0 for a picture of one value.
    """
    smooth = cv2.sepFilter2D(grey, cv2.CV_32F, BINOMIAL, BINOMIAL)
    edges = cv2.Laplacian(smooth, cv2.CV_32F)[2:-2, 2:-2]
    total = float(grey.var())
    return max(0.0, float(edges.var()) - NOISE_GAIN * noise**2) / total if total > 0 else 0.0


def noise_sigma(grey: FloatArray) -> float:
    """Standard deviation of white noise from the diagonal Haar wavelet: median |HH| / 0.6745.

    Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994: the median looks past the
    few coefficients that edges make. Ramps and straight vertical or horizontal edges have none at all.

    Args:
        grey: (H, W) float32, at least 2 pixels a side.
    """
    height, width = grey.shape[0] // 2 * 2, grey.shape[1] // 2 * 2
    a, b = grey[0:height:2, 0:width:2], grey[0:height:2, 1:width:2]
    c, d = grey[1:height:2, 0:width:2], grey[1:height:2, 1:width:2]
    return float(np.median(np.abs(a - b - c + d)) / 2 / 0.6745)


def clipped_share(grey: UInt8Array) -> float:
    """Share of the pixels of (H, W) uint8 that are as good as black or white, 0..1."""
    return float(((grey <= BLACK) | (grey >= WHITE)).mean())


def blockiness(grey: FloatArray) -> float:
    """How much more neighbours differ across the 8x8 grid than within it: (across - within) / (across + within).

    After the blockiness term of Wang, Sheikh and Bovik, "No-reference perceptual quality assessment of JPEG compressed
    images", ICIP 2002, as a contrast so that it has a range.

    Args:
        grey: (H, W) float32 at the size that it was compressed at, more than 8 pixels a side.

    Returns:
        0..1; 0 for a picture of one value.
    """
    across = within = 0.0
    for steps in (np.abs(np.diff(grey, axis=1)).mean(0), np.abs(np.diff(grey, axis=0)).mean(1)):
        on_grid = np.arange(len(steps)) % BLOCK == BLOCK - 1
        across += float(steps[on_grid].mean())
        within += float(steps[~on_grid].mean())
    return max(0.0, across - within) / (across + within) if across + within > 0 else 0.0
