"""Reads labels back into a set: LabelMe's shapes, indexed PNGs, or what CVAT exports as "Segmentation mask 1.1"."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.datasets import decode_segmentation
from glesam_ros.labelled import read_class_list, read_label_map
from glesam_ros.lqseg.build import Track, write_file
from glesam_ros.picture_files import decoded, encoded
from glesam_ros.reallq.pick import ANNOTATIONS, IMAGES, read_manifest

LABEL_MAP = "labelmap.txt"
"""CVAT's colours; where it lies beside the labels, they are taken for CVAT's."""
SPLIT = "test.txt"
"""Names of the labelled pictures, so that a set that is labelled in part opens as the split "test"."""
POINTS = {"polygon": 3, "rectangle": 2, "oriented_rectangle": 4, "circle": 2, "mask": 2}
"""LabelMe's shapes that have an area, and how many points they have; a polygon at least so many."""
UNLABELLED = ("_background_", "__ignore__", "background")
"""Names that mean "no class", of LabelMe and CVAT; drawn over another shape they take it away."""

Labels = NDArray[Any]
"""(H, W) uint8 or uint16, 0 unlabelled, k is class k - 1."""


@dataclass(frozen=True)
class LabelFault:
    """What was wrong with one file; the others were read all the same.

    Attributes:
        file: path.
        message: what was expected and what came.
    """

    file: Path
    message: str


@dataclass(frozen=True)
class ReadSummary:
    """What was read.

    Attributes:
        pictures: how many the set has.
        written: names of those whose annotation is new.
        unchanged: names of those whose annotation was there already.
        shares: class name -> share of the labelled pixels, 0..1; classes that are nowhere have 0.
        unlabelled: share of the pixels of these pictures without a class.
        faults: in the order of the pictures.
    """

    pictures: int
    written: list[str]
    unchanged: list[str]
    shares: dict[str, float]
    unlabelled: float
    faults: list[LabelFault] = field(default_factory=list)


Decode = Callable[[Path, tuple[int, int]], Labels]
"""(file, (height, width)) -> labels. Raises ValueError when they cannot be read."""


def read_labels(
    folder: Path, labels: Path | None = None, force: bool = False, track: Track = lambda items, total: items
) -> ReadSummary:
    """Read the labels of all pictures of a set into annotations/validation/NAME.png.

    Args:
        folder: a set that `pick` made.
        labels: folder with NAME.json (LabelMe), NAME.png (grey or indexed: 0 unlabelled, k is class k - 1), or an
            unpacked export of CVAT: labelmap.txt and SegmentationClass/NAME.png. None: LabelMe's files beside the
            pictures.
        force: replace annotations that differ from what is read.
        track: shows the progress.

    Raises:
        ValueError: `folder` is no such set, its class list or labelmap.txt cannot be read.
        FileNotFoundError: one of the folders is missing.
    """
    read_manifest(folder)
    classes = read_class_list(folder).classes
    images = folder / IMAGES
    where = images if labels is None else labels
    if not where.is_dir():
        raise FileNotFoundError(f"{where}: expected a folder of labels, found none")
    pictures = sorted(images.glob("*.png"))
    if not pictures:
        raise FileNotFoundError(f"{images}: expected pictures, found none")
    found, decode_png = _label_files(where, images, classes)
    dtype = np.uint8 if len(classes) < 256 else np.uint16
    counts = np.zeros(len(classes) + 1, np.int64)
    written: list[str] = []
    unchanged: list[str] = []
    faults: list[LabelFault] = []
    for picture in track(pictures, len(pictures)):
        files = found.pop(picture.stem, [])
        if len(files) != 1:
            got = " and ".join(file.name for file in files) or "none"
            faults.append(LabelFault(picture, f"expected one file of labels in {where}, got {got}"))
            continue
        [file] = files
        try:
            size = _size_of(picture)
            decode: Decode = decode_png if file.suffix == ".png" else _from_labelme(classes)
            map_ = decode(file, size).astype(dtype)
        except (ValueError, OSError) as error:
            faults.append(LabelFault(file, str(error)))
            continue
        target = folder / ANNOTATIONS / picture.name
        data = encoded(target, map_)
        if not target.exists() or (force and target.read_bytes() != data):
            write_file(target, data)
            written.append(picture.stem)
        elif target.read_bytes() == data:
            unchanged.append(picture.stem)
        else:
            faults.append(LabelFault(target, f"differs from {file}; --force replaces it"))
            continue
        counts += np.bincount(map_.ravel(), minlength=len(counts))
    for files in found.values():
        faults += [LabelFault(file, f"no picture of this name in {images}") for file in files]
    there = sorted(p.stem for p in pictures if (folder / ANNOTATIONS / p.name).is_file())
    write_file(folder / SPLIT, "".join(f"{IMAGES.name}/{name}\n" for name in there).encode())
    labelled = max(1, int(counts[1:].sum()))
    shares = {name: int(n) / labelled for name, n in zip(classes, counts[1:])}
    return ReadSummary(
        len(pictures), written, unchanged, shares, int(counts[0]) / max(1, int(counts.sum())), faults
    )


def draw_shapes(shapes: Any, classes: tuple[str, ...], size: tuple[int, int]) -> Labels:
    """Labels of LabelMe's shapes, drawn in their order, a later one over an earlier.

    Coordinates are pixels with (0, 0) at the corner of the picture, as LabelMe has them. Polygons and rectangles are
    filled by pycocotools: those that share an edge share no pixel and leave none out, where LabelMe's own export takes
    the pixels under the outline too. To a circle belongs what is not further from its middle than its second point.

    Args:
        shapes: list of {"label", "points", "shape_type"}; polygon, rectangle (two corners), oriented_rectangle
            (four), circle (middle and a point on it), mask (corners of its box, both within it, and a PNG in "mask").
        classes: names in the order of their labels.
        size: (height, width) in pixels.

    Returns:
        (H, W) uint16, 0 unlabelled, k is class k - 1.

    Raises:
        ValueError: an unknown class, a shape without an area, coordinates that are none.
    """
    if not isinstance(shapes, list):
        raise ValueError('"shapes": expected a list')
    values = {name: k for k, name in enumerate(classes, 1)}
    values.update({name: 0 for name in UNLABELLED if name not in values})
    out = np.zeros(size, np.uint16)
    for number, shape in enumerate(shapes, 1):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or label not in values:
            raise ValueError(f"shape {number}: expected one of the classes {_some(classes)}; got {label!r}")
        try:
            out[_inside(shape, size)] = values[label]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"shape {number} ({label}): {error}") from error
    return out


def _inside(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    kind = shape.get("shape_type") or "polygon"
    points = np.asarray(shape["points"], np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"expected points [[x, y], ...], got {shape['points']!r:.80}")
    side = max(size)
    # pycocotools walks along every edge pixel by pixel, however long it is
    if not ((points >= -side) & (points <= 2 * side)).all():
        raise ValueError(f"expected points near the {size[1]}x{size[0]} picture, got {shape['points']!r:.80}")
    if kind not in POINTS:
        raise ValueError(f"expected a shape with an area ({', '.join(POINTS)}), got a {kind}")
    if len(points) < POINTS[kind] or (kind != "polygon" and len(points) > POINTS[kind]):
        raise ValueError(f"expected {POINTS[kind]} points for a {kind}, got {len(points)}")
    if kind == "circle":
        y, x = np.ogrid[: size[0], : size[1]]
        (cx, cy), rim = points
        return np.asarray((x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 <= ((points[0] - rim) ** 2).sum())
    if kind == "mask":
        return _pasted(shape.get("mask"), points, size)
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    return np.asarray(decode_segmentation([points.ravel().tolist()], *size), np.bool_)


def _pasted(mask: Any, points: Any, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The mask of a shape at its place: its box includes both corners."""
    try:
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(mask, validate=True), np.uint8), cv2.IMREAD_GRAYSCALE)
    except (TypeError, binascii.Error, cv2.error):
        pixels = None
    if pixels is None:
        raise ValueError('"mask": expected a PNG in base64')
    (x1, y1), (x2, y2) = points.min(0).astype(int), points.max(0).astype(int)
    if pixels.shape != (y2 - y1 + 1, x2 - x1 + 1):
        raise ValueError(f'"mask": expected {x2 - x1 + 1}x{y2 - y1 + 1} pixels of its box, got {pixels.shape[::-1]}')
    if x1 < 0 or y1 < 0 or x2 >= size[1] or y2 >= size[0]:
        raise ValueError(f'"mask": expected a box inside {size[1]}x{size[0]}, got ({x1}, {y1}) .. ({x2}, {y2})')
    out = np.zeros(size, np.bool_)
    out[y1 : y2 + 1, x1 : x2 + 1] = pixels > 0
    return out


def _label_files(where: Path, images: Path, classes: tuple[str, ...]) -> tuple[dict[str, list[Path]], Decode]:
    """Files of labels by name of their picture, and what reads the PNGs among them."""
    if (where / LABEL_MAP).is_file():
        masks = where / "SegmentationClass"
        files = list((masks if masks.is_dir() else where).rglob("*.png"))
        decode = _from_colours(where / LABEL_MAP, classes)
    else:
        files = list(where.glob("*.json"))
        if where.resolve() != images.resolve():  # there the PNGs are the pictures
            files += where.glob("*.png")
        decode = _from_indices(classes)
    found: dict[str, list[Path]] = {}
    for file in sorted(files):
        found.setdefault(file.stem, []).append(file)
    return found, decode


def _from_labelme(classes: tuple[str, ...]) -> Decode:
    def decode(file: Path, size: tuple[int, int]) -> Labels:
        try:
            document = json.loads(file.read_bytes())
            shapes, said = document["shapes"], (document.get("imageHeight"), document.get("imageWidth"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a file of LabelMe, cannot read it: {error}") from error
        if None not in said and said != size:
            raise ValueError(f"expected labels of its {size[1]}x{size[0]} picture, got {said[1]}x{said[0]}")
        if shapes == []:
            raise ValueError("expected shapes, got none: this picture is not labelled yet")
        return draw_shapes(shapes, classes, size)

    return decode


def _from_indices(classes: tuple[str, ...]) -> Decode:
    def decode(file: Path, size: tuple[int, int]) -> Labels:
        labels = _sized(read_label_map(file), size)
        if labels.ndim != 2:
            raise ValueError(
                f"expected a grey or indexed PNG, got a coloured one; CVAT's have their {LABEL_MAP} beside them"
            )
        wrong = np.unique(labels[labels > len(classes)])
        if wrong.size:
            raise ValueError(f"expected labels 0..{len(classes)}, got {_some(wrong.tolist())}")
        return labels

    return decode


def _from_colours(file: Path, classes: tuple[str, ...]) -> Decode:
    """What reads CVAT's masks: colours of labelmap.txt, or in a grey mask the number of its line.

    Raises:
        ValueError: labelmap.txt cannot be read.
    """
    names, colours = _read_label_map_file(file)
    values = [classes.index(name) + 1 if name in classes else 0 if name in UNLABELLED else -1 for name in names]

    def decode(path: Path, size: tuple[int, int]) -> Labels:
        picture = _sized(read_label_map(path), size)
        if picture.ndim == 2:
            picture, known = picture.astype(np.int64), list(range(len(names)))
        else:
            picture, known = picture.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]), colours
        there, inverse = np.unique(picture, return_inverse=True)
        table = dict(zip(known, values))
        indices = [table.get(int(value), 0 if value == 0 else None) for value in there]
        if None in indices:
            lost = int(there[indices.index(None)])
            raise ValueError(f"expected colours of {LABEL_MAP}, got {lost:#08x} (RGB)")
        if -1 in indices:
            name = names[known.index(int(there[indices.index(-1)]))]
            raise ValueError(f"expected one of the classes {_some(classes)}; got {name!r}")
        return np.array(indices, np.uint16)[inverse.reshape(size)]

    return decode


def _read_label_map_file(file: Path) -> tuple[list[str], list[int]]:
    """Names and 0xRRGGBB of the lines "name:r,g,b:parts:actions"; # begins a comment."""
    names, colours = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, colour = line.split(":")[:2]
            red, green, blue = (int(part) for part in colour.split(","))
        except ValueError as error:
            raise ValueError(f'{file}: expected lines "name:r,g,b::", got {line!r}') from error
        names.append(name.strip())
        colours.append(red << 16 | green << 8 | blue)
    return names, colours


def _sized(labels: Labels, size: tuple[int, int]) -> Labels:
    if labels.shape[:2] != size:
        raise ValueError(f"expected {size[1]}x{size[0]} pixels of its picture, got {labels.shape[1]}x{labels.shape[0]}")
    return labels


def _size_of(picture: Path) -> tuple[int, int]:
    try:
        height, width = decoded(picture.read_bytes(), cv2.IMREAD_UNCHANGED).shape[:2]
    except (ValueError, OSError) as error:
        raise ValueError(f"{picture}: {error}") from error
    return height, width


def _some(names: Any) -> str:
    shown = ", ".join(map(str, names[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
