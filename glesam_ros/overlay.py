"""Results drawn for people: class colours; instances stable in colour, crisp contours, a number; one status line."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from glesam_ros.instances import Instances
from glesam_ros.semantic import SemanticMap
from glesam_ros.validation import UInt8Array, check_image

PALETTE: UInt8Array = np.array(
    [
        # Okabe and Ito 2008, without black: told apart with every common colour vision
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
        # from Tol's light and IBM's schemes those that stay apart from the first seven and show in the dark
        (187, 204, 51), (220, 38, 127), (153, 221, 255), (170, 170, 0), (255, 170, 187), (120, 94, 240), (68, 187, 153),
        (238, 136, 102), (221, 221, 221),
    ],
    np.uint8,
)
"""(16, 3) uint8 RGB; instance `id` has the colour ``PALETTE[(id - 1) % 16]``."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MARGIN = 3
_COARSE = 4
_WHITE, _ENHANCED = (255, 255, 255), (153, 221, 255)


def draw_overlay(
    image: UInt8Array,
    instances: Instances,
    alpha: float = 0.5,
    labels: np.ndarray[Any, np.dtype[np.uint16]] | None = None,
    semantic_map: SemanticMap | None = None,
) -> UInt8Array:
    """Draw instances over their image; pixels outside the masks and the status strip stay as they are.

    With a semantic map, contours and numbers are drawn over what `draw_classes` makes of the image, and masks are not
    filled: in everything mode they cover nearly all of it, and the classes could not be told apart.

    Contours lie inside the masks. "id score" is written into those instances that have room for it. The status strip,
    top left and `strip_height` high, says degradation level, whether enhancement ran, and the number of instances.

    Args:
        image: (H, W, 3) uint8 RGB; left as it is.
        instances: of this image.
        alpha: opacity of the fill, or of the class colours; 0 (contours only) .. 1 (flat colour).
        labels: `instances.label_map()` when it is already at hand.
        semantic_map: of this image.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        TypeError, ValueError: `image` is no RGB image, its size is not that of the instances or of the semantic map, or
            alpha is not in 0..1.
    """
    image = _check(image, instances.size, "instances", alpha)
    out = image.copy() if semantic_map is None else draw_classes(image, semantic_map, alpha)
    if len(instances):
        labels = instances.label_map() if labels is None else labels
        _draw_masks(out, labels, alpha if semantic_map is None else 0.0)
        _draw_numbers(out, labels, instances)
    _draw_strip(out, instances)
    return out


def draw_classes(image: UInt8Array, semantic_map: SemanticMap, alpha: float = 0.5) -> UInt8Array:
    """Blend the colour of each pixel's class into the image.

    Args:
        image: (H, W, 3) uint8 RGB; left as it is.
        semantic_map: of this image.
        alpha: opacity of the colours, 0 (the image alone) .. 1 (flat colour).

    Returns:
        (H, W, 3) uint8 RGB, a new array: (1 - alpha) image + alpha colour, rounded.

    Raises:
        TypeError, ValueError: `image` is no RGB image, its size is not that of the map, or alpha is not in 0..1.
    """
    image = _check(image, semantic_map.size, "semantic map", alpha)
    return np.asarray(cv2.addWeighted(image, 1 - alpha, semantic_map.colours(), alpha, 0), np.uint8)


def strip_height(size: tuple[int, int]) -> int:
    """Height in pixels of the status strip in an image of `size` (height, width)."""
    return cv2.getTextSize("0", _FONT, _scale(size), 1)[0][1] + 4 * _MARGIN


def _check(image: UInt8Array, size: tuple[int, int], of: str, alpha: float) -> UInt8Array:
    image = check_image(image)
    if image.shape[:2] != size:
        raise ValueError(f"image: expected (height, width) {size} of the {of}, got {image.shape[:2]}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected 0..1, got {alpha}")
    return image


def _scale(size: tuple[int, int]) -> float:
    return max(0.4, min(size) / 1100)


def _draw_masks(out: UInt8Array, labels: np.ndarray[Any, np.dtype[np.uint16]], alpha: float) -> None:
    table = np.zeros(int(labels.max()) + 1, np.uint8)
    table[1:] = np.arange(len(table) - 1) % len(PALETTE)
    lut = np.zeros((256, 1, 3), np.uint8)
    lut[: len(PALETTE), 0] = PALETTE
    colour = cv2.applyColorMap(np.take(table, labels), lut)
    inside = (labels > 0).view(np.uint8)
    if alpha > 0:
        cv2.copyTo(cv2.addWeighted(out, 1 - alpha, colour, alpha, 0), inside, out)
    # a contour pixel sees another label in its neighbourhood; beyond the image there is none
    reach = 3 if min(out.shape[:2]) < 400 else 5
    around = np.ones((reach, reach), np.uint8)
    edge = (cv2.dilate(labels, around) != cv2.erode(labels, around)).view(np.uint8) & inside
    cv2.copyTo(colour, edge, out)


def _draw_numbers(
    out: UInt8Array, labels: np.ndarray[Any, np.dtype[np.uint16]], instances: Instances
) -> None:
    scale = _scale(instances.size)
    boxes = instances.boxes.clip(0, 2 * instances.size[::-1]).astype(int)  # they may reach beyond the image
    for (x1, y1, x2, y2), number, score in zip(boxes, instances.ids, instances.scores):
        text = f"{number} {score:.2f}"
        (width, height), below = cv2.getTextSize(text, _FONT, scale, 1)
        width, height = width + 2 * _MARGIN, height + below + 2 * _MARGIN
        if x2 - x1 < width or y2 - y1 < height:
            continue
        place = _room(labels[y1:y2, x1:x2] == number, width, height)
        if place is None:
            continue
        x, y = x1 + place[0], y1 + place[1]
        area = out[y : y + height, x : x + width]
        glyphs = np.zeros((height, width), np.uint8)
        cv2.putText(glyphs, text, (_MARGIN, height - below - _MARGIN), _FONT, scale, (255,), 1, cv2.LINE_AA)
        # a halo by dilation: OpenCV 5 spaces thick letters differently from thin ones
        halo = cv2.dilate(glyphs, np.ones((3, 3), np.uint8))
        drawn = cv2.max(cv2.subtract(area, cv2.merge([halo] * 3)), cv2.merge([glyphs] * 3))
        own = labels[y : y + height, x : x + width] == number
        area[own] = drawn[own]


def _room(mask: np.ndarray[Any, np.dtype[np.bool_]], width: int, height: int) -> tuple[int, int] | None:
    """Left top corner of a width x height window that lies in the mask, the nearest to its middle; None for none."""
    coarse = np.ascontiguousarray(mask[::_COARSE, ::_COARSE]).view(np.uint8)
    across, down = -(-width // _COARSE) + 1, -(-height // _COARSE) + 1
    filled = cv2.boxFilter(
        coarse, cv2.CV_16U, (across, down), anchor=(0, 0), normalize=False, borderType=cv2.BORDER_CONSTANT
    )
    rows, cols = np.nonzero(filled == across * down)
    if not rows.size:
        return None
    moments = cv2.moments(coarse, binaryImage=True)
    middle_x, middle_y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    best = int(np.argmin((cols + across / 2 - middle_x) ** 2 + (rows + down / 2 - middle_y) ** 2))
    return int(cols[best]) * _COARSE, int(rows[best]) * _COARSE


def _draw_strip(out: UInt8Array, instances: Instances) -> None:
    size = instances.size
    scale, height = _scale(size), strip_height(size)
    count = f"{len(instances)} instance{'' if len(instances) == 1 else 's'}"
    words = (
        (f"degradation {instances.degradation:.2f}", _WHITE),
        ("enhanced" if instances.enhanced else "not enhanced", _ENHANCED if instances.enhanced else _WHITE),
        (count, _WHITE),
    )
    widths = [cv2.getTextSize(word, _FONT, scale, 1)[0][0] for word, _ in words]
    gap = 4 * _MARGIN
    total = sum(widths) + gap * (len(words) - 1) + 4 * _MARGIN
    if total > size[1] or 4 * height > size[0]:
        return  # a thumbnail has no room for words
    strip = out[:height, :total]
    strip[:] = strip // 4
    x = 2 * _MARGIN
    for (word, colour), width in zip(words, widths):
        cv2.putText(strip, word, (x, height - 2 * _MARGIN), _FONT, scale, colour, 1, cv2.LINE_AA)
        x += width + gap
