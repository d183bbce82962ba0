"""Checks of what users hand in; every refusal says what was expected, what came and how to mend it."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
UInt8Array = NDArray[np.uint8]
MOST_CLASSES = 65535
"""Of a label map of 16 bits, whose largest value means void."""


def check_image(image: Any) -> UInt8Array:
    """Return `image` if it is (H, W, 3) uint8 RGB with H, W >= 1.

    Raises:
        TypeError: not a numpy array, or not uint8.
        ValueError: wrong shape or no pixels.
    """
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a numpy array (H, W, 3) uint8 RGB, got {type(image).__name__}{_way(image)}")
    if image.ndim != 3 or image.shape[2] != 3:
        hint = ""
        if image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 1):
            hint = "; stack a grey image three times: np.dstack([image] * 3)"
        elif image.ndim == 3 and image.shape[-1] == 4:
            hint = "; leave the alpha out: image[..., :3]"
        elif image.ndim == 3 and image.shape[0] == 3:
            hint = "; put the channels last: image.transpose(1, 2, 0)"
        elif image.ndim == 4:
            hint = "; hand in one image at a time"
        raise ValueError(f"image: expected shape (H, W, 3), got {image.shape}{hint}")
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected dtype uint8 (0..255), got {image.dtype}; scale and convert first")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"image: expected height and width of at least 1 pixel, got {image.shape[:2]}")
    return image


def _way(image: Any) -> str:
    """How to make an array of what is taken for one by mistake."""
    if image is None:
        return "; cv2.imread gives None where it finds no picture"
    if isinstance(image, (str, PurePath)):
        return "; read the file first: cv2.imread(image)[..., ::-1]"
    if hasattr(image, "permute"):  # a tensor; torch is not imported for it
        return "; of a tensor (3, H, W): image.permute(1, 2, 0).cpu().numpy()"
    if hasattr(image, "convert"):  # a picture of PIL
        return "; of a picture of PIL: np.asarray(image.convert('RGB'))"
    return ""


def check_classes(classes: Any, palette: Any) -> None:
    """Refuse names and colours of classes that do not fit each other.

    Args:
        classes: expected: K names, 1 <= K <= 65535, none empty, each once.
        palette: expected: (K, 3) uint8 RGB.

    Raises:
        ValueError: they are something else; a label map of 16 bits holds no more classes and a void.
    """
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"classes: expected names, none empty, got {classes!r}")
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"classes: expected 1..{MOST_CLASSES} names, got {len(classes)}")
    if len(set(classes)) != len(classes):
        twice = sorted(name for name, count in Counter(classes).items() if count > 1)
        raise ValueError(f"classes: expected each name once, got {', '.join(twice)} again; give each a name of its own")
    if not isinstance(palette, np.ndarray) or palette.shape != (len(classes), 3) or palette.dtype != np.uint8:
        got = f"{palette.shape} {palette.dtype}" if isinstance(palette, np.ndarray) else type(palette).__name__
        raise ValueError(f"palette: expected ({len(classes)}, 3) uint8 RGB, a colour for each class, got {got}")


def check_points(
    points: Any, labels: Any, size: tuple[int, int], need_inside: bool = True
) -> tuple[FloatArray, FloatArray]:
    """Return points (B, N, 2) float32 and labels (B, N) float32 (1 inside, 0 outside, -1 padding).

    Args:
        points: (N, 2) of one object or (B, N, 2) of B objects; xy in pixels of the image.
        labels: (N,) or (B, N); 1, 0, and -1 for padding in the batch form. None means all 1.
        size: (height, width) of the image.
        need_inside: refuse an object without a point of label 1; False where a box says what the object is.

    Raises:
        ValueError: wrong shapes, values that are not finite, labels that do not exist, a point outside the image,
            or an object without any point of label 1.
    """
    p = _floats(points, "points")
    if p.ndim not in (2, 3) or p.shape[-1] != 2 or 0 in p.shape:
        raise ValueError(f"points: expected shape (N, 2) or (B, N, 2) with N >= 1, xy in pixels, got {p.shape}")
    y = np.ones(p.shape[:-1], np.float32) if labels is None else _floats(labels, "labels")
    if y.shape != p.shape[:-1]:
        raise ValueError(f"labels: expected shape {p.shape[:-1]} to match points {p.shape}, got {y.shape}")
    batched = p.ndim == 3
    allowed = (1.0, 0.0, -1.0) if batched else (1.0, 0.0)
    if not np.isin(y, allowed).all():
        raise ValueError(
            f"labels: expected {'1, 0 or -1 (padding)' if batched else '1 (inside) or 0 (outside)'}, "
            f"got {sorted(set(y.ravel().tolist()) - set(allowed))}"
        )
    if not batched:
        p, y = p[None], y[None]
    used = y >= 0
    height, width = size
    outside = used & ~((p[..., 0] >= 0) & (p[..., 0] < width) & (p[..., 1] >= 0) & (p[..., 1] < height))
    if outside.any():
        x0, y0 = p[outside][0]
        raise ValueError(f"points: expected 0 <= x < {width} and 0 <= y < {height}, got ({x0:g}, {y0:g})")
    if need_inside and not (y == 1).any(1).all():
        row = int((y == 1).any(1).argmin())
        raise ValueError(
            f"labels: expected at least one 1 (inside) for each object, got {y[row].tolist()} for object {row}; "
            "add a point on the object or a box around it"
        )
    return p, y


def check_boxes(boxes: Any, size: tuple[int, int]) -> FloatArray:
    """Return boxes (M, 4) float32 xyxy in pixels, M >= 1.

    Raises:
        ValueError: wrong shape, values that are not finite, x2 <= x1 or y2 <= y1, or a box that does not touch the
            image of `size` (height, width).
    """
    b = _floats(boxes, "boxes")
    if b.ndim != 2 or b.shape[1] != 4 or b.shape[0] == 0:
        raise ValueError(f"boxes: expected shape (M, 4) with M >= 1, xyxy in pixels, got {b.shape}")
    height, width = size
    for x1, y1, x2, y2 in b:
        if x2 <= x1 or y2 <= y1:
            raise ValueError(f"boxes: expected x1 < x2 and y1 < y2 (xyxy), got ({x1:g}, {y1:g}, {x2:g}, {y2:g})")
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise ValueError(
                f"boxes: expected a box that touches the {width}x{height} image, got ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
            )
    limit = np.array([width, height, width, height], np.float32)
    return np.clip(b, 0, limit).astype(np.float32)


def _floats(values: Any, name: str) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers that make a float32 array, got {values!r}") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array
