"""What a data set is built from: COCO and LVIS JSON, folders of masks, ADE20K label maps, BSDS region sets.

An index lists the pictures without opening them; `read_picture` and `read_truth` then read one at a time. Whatever is
malformed becomes a `Fault` that names its file and annotation, and the rest goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from glesam_ros.datasets import (
    Malformed,
    check_numbers,
    check_size,
    coco_name,
    coco_picture,
    coco_size,
    decode_segmentation,
    parse_coco,
)
from glesam_ros.labelled import IGNORE, read_label_map
from glesam_ros.masks import measure
from glesam_ros.picture_files import SUFFIXES, decoded, is_indexed, listed, without_ending
from glesam_ros.validation import BoolArray, UInt8Array

KINDS = ("coco", "folder", "ade20k", "bsds")
"""Sources that `read_index` knows; coco is LVIS, too."""
MAX_LABEL = 32767
"""Largest label; what reads the data set holds label maps as int16."""
BOX_TOLERANCE = 1.0
"""Pixels by which a COCO box may stick out: its numbers are rounded."""


@dataclass(frozen=True)
class Fault:
    """Something malformed in a source.

    Attributes:
        kind: short name, the same for all faults of a kind.
        file: file name.
        annotation: id in that file; None where the file as a whole is meant.
        message: what was expected and what came.
    """

    kind: str
    file: str
    annotation: int | str | None
    message: str


@dataclass(frozen=True)
class Source:
    """One picture and where its masks are.

    Attributes:
        id: name in the data set, unique, safe as a file name.
        source_id: its name in the source.
        image: path of the clear picture.
        annotations: entries of a COCO file.
        masks: label map files.
        size: (height, width) that the source claims.
        licence: as the source gives it.
    """

    id: str
    source_id: int | str
    image: Path
    annotations: tuple[dict[str, Any], ...] = ()
    masks: tuple[Path, ...] = ()
    size: tuple[int, int] | None = None
    licence: Any = None


@dataclass
class Index:
    """All pictures of a source.

    Attributes:
        kind: one of `KINDS`.
        annotations: name of the annotation file or folder.
        fingerprint: sha256 of the annotation file, or of the names of pictures and masks.
        split_list: name of the file that chose the pictures, None when all were taken.
        binary: masks are grey pictures of one object.
        sources: in the order of the source.
        faults: found so far.
        categories: {id: name}; None when the source names none, then none is checked.
        crowd: crowd annotations, which are left out.
        without_masks: pictures without annotations, which are left out.
    """

    kind: str
    annotations: str
    fingerprint: str = ""
    split_list: str | None = None
    binary: bool = False
    sources: list[Source] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    categories: dict[int, str] | None = None
    crowd: int = 0
    without_masks: int = 0


@dataclass(frozen=True)
class Truth:
    """The masks of one picture.

    Attributes:
        layers: label maps (H, W) uint16, 0 unlabeled.
        instances: for each label: label, layer, id, category, area in pixels, bbox [x, y, width, height].
        alternatives: each layer is a whole segmentation of its own.
        faults: annotations that are left out.
    """

    layers: list[np.ndarray[Any, Any]]
    instances: list[dict[str, Any]]
    alternatives: bool
    faults: list[Fault]


def read_index(kind: str, images: Path, annotations: Path, split: str, binary: bool = False) -> Index:
    """List the pictures of a source.

    Args:
        kind: one of `KINDS`.
        images: folder of the clear pictures.
        annotations: COCO file, or folder of masks.
        split: a file `<split>.txt` beside `images` chooses the pictures (not for coco); without it all are taken.
        binary: masks of `folder` are grey pictures, above 127 is the object.

    Raises:
        FileNotFoundError: `images` or `annotations` is missing.
        ValueError: unknown kind, or the annotation file as a whole cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"source: expected one of {', '.join(KINDS)}; got {kind!r}")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: expected a folder of pictures")
    if kind == "coco" and not annotations.is_file():
        raise FileNotFoundError(f"{annotations}: expected a COCO or LVIS JSON file")
    if kind != "coco" and not annotations.is_dir():
        raise FileNotFoundError(f"{annotations}: expected a folder of masks")
    index = Index(kind, annotations.name, binary=binary)
    if kind == "coco":
        _index_coco(index, images, annotations)
    else:
        _index_folder(index, images, annotations, split)
    return index


def read_picture(source: Source) -> tuple[bytes, UInt8Array]:
    """The bytes of the file and (H, W, 3) uint8 RGB.

    Raises:
        Malformed: missing, not a picture, cut short, or of another size than the source claims.
    """
    try:
        data = source.image.read_bytes()
    except FileNotFoundError as error:
        raise Malformed("image_missing", f"expected a picture at {source.image.name}, found none") from error
    except OSError as error:
        raise Malformed("image_unreadable", f"expected a picture: {error.strerror}") from error
    try:
        pixels = decoded(data, cv2.IMREAD_COLOR)
    except ValueError as error:
        raise Malformed("image_unreadable", str(error)) from error
    check_size(pixels, source.size)
    # not cv2.cvtColor: that of OpenCV 4.5 refuses a lone pixel
    return data, np.ascontiguousarray(pixels[..., ::-1], np.uint8)


def read_truth(index: Index, source: Source, size: tuple[int, int]) -> Truth:
    """Masks of one picture of `size` (height, width); what is malformed is left out and named in `faults`."""
    truth = Truth([], [], index.kind == "bsds", [])
    if index.kind == "coco":
        _read_annotations(index, source, size, truth)
    else:
        _read_label_maps(index, source, size, truth)
    return truth


def coco_mask(annotation: dict[str, Any], size: tuple[int, int], categories: dict[int, str] | None) -> BoolArray:
    """(H, W) bool of a COCO annotation, by pycocotools' rasterisation.

    Raises:
        Malformed: anything in the annotation that does not fit a picture of `size` (height, width).
    """
    category = annotation.get("category_id")
    if categories is not None and (not isinstance(category, int) or category not in categories):
        raise Malformed("category_unknown", f"expected a category_id of the categories, got {category!r}")
    if annotation.get("bbox") is not None:
        _check_box(annotation["bbox"], size)
    mask = decode_segmentation(annotation.get("segmentation"), *size)
    if not mask.any():
        raise Malformed("segmentation_empty", "expected at least one pixel inside the picture, got none")
    return mask


def _index_coco(index: Index, images: Path, path: Path) -> None:
    data = path.read_bytes()
    index.fingerprint = hashlib.sha256(data).hexdigest()
    document = parse_coco(data, path)
    try:
        if document.get("categories"):
            index.categories = {int(c["id"]): str(c.get("name", "")) for c in document["categories"]}
        licences = {str(item["id"]): item for item in document.get("licenses") or []}
    except (TypeError, ValueError, KeyError, OverflowError) as error:  # JSON of Python holds Infinity
        raise ValueError(f"{path}: expected categories and licenses with an id each: {error!r}") from error
    annotations = _annotations_by_image(index, path.name, document)
    seen: dict[str, PurePosixPath] = {}
    for entry in _unique_images(index, path.name, document["images"]):
        own = annotations.get(entry["id"], [])
        if not own:
            index.without_masks += 1
            continue
        try:
            name, image = coco_name(entry), coco_picture(images, entry)
            size = coco_size(entry)
        except Malformed as error:
            index.faults.append(Fault(error.kind, path.name, f"image {entry['id']}", str(error)))
            continue
        identity = _safe(str(name.with_suffix("")))
        if identity in seen:
            text = (
                "expected names that differ without their ending in letters, digits, '.', '-' or '_', got "
                f"{name} after {seen[identity]}"
            )
            index.faults.append(Fault("image_duplicate", path.name, f"image {entry['id']}", text))
            continue
        seen[identity] = name
        licence = licences.get(str(entry.get("license")), entry.get("license"))
        index.sources.append(
            Source(identity, entry["id"], image, annotations=tuple(own), size=size, licence=licence)
        )


def _unique_images(index: Index, file: str, entries: list[Any]) -> list[dict[str, Any]]:
    """Entries with an id of their own, the first of each."""
    unique: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), (int, str)):
            text = "expected an object with an id, a number or a text"
            index.faults.append(Fault("image_malformed", file, f"images[{position}]", text))
        elif entry["id"] in unique:
            text = f"expected each image id once, {entry['id']} is there again"
            index.faults.append(Fault("image_duplicate", file, f"image {entry['id']}", text))
        else:
            unique[entry["id"]] = entry
    return list(unique.values())


def _annotations_by_image(index: Index, file: str, document: dict[str, Any]) -> dict[Any, list[dict[str, Any]]]:
    images = {e.get("id") for e in document["images"] if isinstance(e, dict) and isinstance(e.get("id"), (int, str))}
    seen: set[Any] = set()
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for position, annotation in enumerate(document["annotations"]):
        place = f"annotations[{position}]"
        identity = annotation.get("id", place) if isinstance(annotation, dict) else place
        if not isinstance(annotation, dict) or not isinstance(identity, (int, str)):
            text = "expected an object with an id, a number or a text"
            index.faults.append(Fault("annotation_malformed", file, place, text))
        elif identity in seen:
            text = f"expected each annotation id once, {identity} is there again ({place}); the first is taken"
            index.faults.append(Fault("annotation_duplicate", file, identity, text))
        elif not isinstance(annotation.get("image_id"), (int, str)) or annotation["image_id"] not in images:
            text = f"expected the id of an image, got image_id {annotation.get('image_id')!r}"
            index.faults.append(Fault("annotation_image", file, identity, text))
        elif annotation.get("iscrowd"):
            index.crowd += 1
        else:
            by_image.setdefault(annotation["image_id"], []).append({**annotation, "id": identity})
        if isinstance(identity, (int, str)):
            seen.add(identity)
    return by_image


def _index_folder(index: Index, images: Path, annotations: Path, split: str) -> None:
    pictures, masks = _files(images), _files(annotations)
    if images.resolve() == annotations.resolve():  # MSRA10K: 1.jpg is the picture, 1.png its mask
        pictures = [p for p in pictures if p.suffix.lower() != ".png"]
        masks = [p for p in masks if p.suffix.lower() == ".png"]
    by_name: dict[str, list[Path]] = {}
    for mask in masks:
        name = mask.stem
        if index.kind == "bsds":
            match = re.fullmatch(r"(.+)_\d+", name)
            if not match:
                text = "expected a name such as 100007_0.png: picture, underscore, number of the annotator"
                index.faults.append(Fault("mask_name", mask.name, None, text))
                continue
            name = match[1]
        by_name.setdefault(name, []).append(mask)
    by_picture: dict[str, Path] = {}
    for picture in pictures:
        if picture.stem in by_picture:
            text = f"expected one picture of each name, {by_picture[picture.stem].name} is there, too"
            index.faults.append(Fault("image_duplicate", picture.name, None, text))
        by_picture.setdefault(picture.stem, picture)
    chosen_by = images.parent / f"{split}.txt"
    if chosen_by.is_file():
        index.split_list = chosen_by.name
        names = (name if name in by_picture else without_ending(name) for name in listed(chosen_by))
        chosen = list(dict.fromkeys(names))
    else:
        chosen = list(by_picture)
        for name in by_name.keys() - by_picture.keys():
            index.faults.append(Fault("image_missing", by_name[name][0].name, None, "expected a picture of this name"))
        index.faults.sort(key=lambda fault: fault.file)
    digest = hashlib.sha256()
    seen: set[str] = set()
    for name in chosen:
        own = sorted(by_name.get(name, []), key=lambda p: (len(p.name), p.name))  # 2 before 10
        digest.update(json.dumps([name, [p.name for p in own]]).encode())
        identity = _safe(name)
        if name not in by_picture:
            index.faults.append(Fault("image_missing", chosen_by.name, name, "expected a picture of this name"))
        elif not own:
            index.faults.append(Fault("mask_missing", by_picture[name].name, None, "expected a mask of this name"))
        elif len(own) > 1 and index.kind != "bsds":
            text = f"expected one mask of each name, got {', '.join(p.name for p in own)}"
            index.faults.append(Fault("mask_duplicate", by_picture[name].name, None, text))
        elif identity in seen:
            text = f"expected names that differ in letters, digits, '.', '-' or '_', {identity} is there again"
            index.faults.append(Fault("image_duplicate", by_picture[name].name, None, text))
        else:
            seen.add(identity)
            index.sources.append(Source(identity, name, by_picture[name], masks=tuple(own)))
    index.fingerprint = digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _read_annotations(index: Index, source: Source, size: tuple[int, int], truth: Truth) -> None:
    """Label maps, as many as overlapping instances need."""
    for annotation in source.annotations:
        try:
            mask = coco_mask(annotation, size, index.categories)
            if len(truth.instances) == MAX_LABEL:
                raise Malformed("too_many", f"expected at most {MAX_LABEL} instances in a picture")
        except Malformed as error:
            truth.faults.append(Fault(error.kind, index.annotations, annotation["id"], str(error)))
            continue
        instance = _measured(mask, len(truth.instances) + 1)
        x, y, width, height = instance["bbox"]
        inside = mask[y : y + height, x : x + width]
        free = (k for k, item in enumerate(truth.layers) if not item[y : y + height, x : x + width][inside].any())
        layer = next(free, len(truth.layers))
        if layer == len(truth.layers):
            truth.layers.append(np.zeros(size, np.uint16))
        truth.layers[layer][mask] = instance["label"]
        category = annotation.get("category_id")
        truth.instances.append({**instance, "layer": layer, "id": annotation["id"], "category": category})


def _read_label_maps(index: Index, source: Source, size: tuple[int, int], truth: Truth) -> None:
    for path in source.masks:
        try:
            labels = _label_map(path, size, index.kind == "folder", index.binary)
        except Malformed as error:
            truth.faults.append(Fault(error.kind, path.name, None, str(error)))
            continue
        for label in np.unique(labels[labels > 0]).tolist():
            category = label if index.kind == "ade20k" else None
            instance = _measured(labels == label, label)
            truth.instances.append({**instance, "layer": len(truth.layers), "id": label, "category": category})
        truth.layers.append(labels)


def _label_map(path: Path, size: tuple[int, int], may_be_binary: bool, binary: bool) -> np.ndarray[Any, Any]:
    """(H, W) uint16; a mask of one value besides 0, or with `binary` one above 127, gets the label 1."""
    try:
        data = path.read_bytes()
        labels = decoded(data, cv2.IMREAD_UNCHANGED)
        if is_indexed(data) and not binary:  # where grey counts, it is that of the colours
            labels = read_label_map(path)
            if may_be_binary and labels[labels != IGNORE].any():  # borders between objects, as in VOC
                labels = np.where(labels == IGNORE, 0, labels)
    except OSError as error:  # what PIL says has no strerror
        raise Malformed("mask_unreadable", f"expected a mask: {error.strerror or error.__cause__}") from error
    except ValueError as error:
        raise Malformed("mask_unreadable", str(error)) from error
    if labels.ndim == 3:
        if not (labels[..., :3] == labels[..., :1]).all():
            text = "expected grey or indexed labels, got colours; save the label numbers themselves"
            raise Malformed("mask_colour", text)
        labels = labels[..., 0]
    if labels.shape != size:
        raise Malformed("mask_size", f"expected height and width {size} as the picture, got {labels.shape}")
    if labels.dtype not in (np.uint8, np.uint16):
        raise Malformed("mask_values", f"expected labels of 8 or 16 bit, got {labels.dtype}")
    if binary:
        labels = labels > 127
    elif may_be_binary and len(np.unique(labels[labels > 0])) == 1:
        labels = labels > 0
    if labels.max() > MAX_LABEL:
        raise Malformed("mask_values", f"expected labels up to {MAX_LABEL}, got {labels.max()}")
    if not labels.any():
        raise Malformed("mask_empty", "expected at least one labeled pixel, got none")
    return labels.astype(np.uint16)


def _measured(mask: BoolArray, label: int) -> dict[str, Any]:
    (x1, y1, x2, y2), area = measure(mask)
    return {"label": label, "area": area, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def _check_box(box: Any, size: tuple[int, int]) -> None:
    x, y, width, height = check_numbers(box, "bbox") if isinstance(box, list) and len(box) == 4 else (0, 0, 0, 0)
    if width <= 0 or height <= 0:
        raise Malformed("bbox_malformed", f"expected bbox [x, y, width, height] with an area, got {str(box)[:60]}")
    if min(x, y) < -BOX_TOLERANCE or x + width > size[1] + BOX_TOLERANCE or y + height > size[0] + BOX_TOLERANCE:
        raise Malformed("bbox_outside", f"expected bbox inside a picture of {size[1]}x{size[0]}, got {box}")
