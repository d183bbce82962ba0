"""Photographs with ground-truth regions, from COCO instance files, BSDS500 region sets, CamVid and LQSeg data sets."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from glesam_ros.checksum import sha256
from glesam_ros.labelled import CAMVID_VOID, read_label_map, read_pixels
from glesam_ros.picture_files import listed, without_ending
from glesam_ros.validation import BoolArray

CAMVID_MIN_AREA = 192
"""Smaller parts of a class (px; 12 cells of 4 x 4) are left out: far poles and specks of the labelling."""
LQSEG_FORMAT = 1
"""Version of the layout that `glesam lqseg build` writes."""
LQSEG_INFO = "dataset.json"
LQSEG_MANIFEST = "manifest.jsonl"
MAX_NAME = 240
"""Bytes of a picture's name in a COCO file or a folder; file systems allow 255, and `glesam lqseg build` adds to it."""
_SKIPPED = "`glesam lqseg build` names what is malformed and leaves it out"


class Malformed(ValueError):
    """A picture or an annotation that cannot be used.

    Attributes:
        kind: short name of what is wrong, the same for all faults of a kind.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[Malformed], tuple[str, str]]:
        return type(self), (self.kind, str(self))


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
        """Raises FileNotFoundError when a file is missing or no whole picture."""
        layers = [read_pixels(path, cv2.IMREAD_UNCHANGED).astype(np.int16) for path in self.layers]
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


def load_coco(folder: Path, split: str, limit: int | None = None) -> list[Photograph]:
    """Photographs of `<folder>/<split>.json` (COCO or LVIS instances) with their non-crowd instances.

    Args:
        limit: first so many alone, at least 1; those behind them are not read.

    Raises:
        FileNotFoundError: the annotation file or an image is missing, or the image is no whole picture.
        ValueError: the file is no such JSON, an entry is malformed, or an image is of another size than its entry
            says; names file and entry.
    """
    path = folder / f"{split}.json"
    document = parse_coco(path.read_bytes(), path)
    by_image: dict[int | str, list[tuple[Any, Any]]] = {}
    for position, annotation in enumerate(_entries(document, "annotations", "image_id", path)):
        if not annotation.get("iscrowd"):
            named = annotation.get("id", f"annotations[{position}]"), annotation.get("segmentation")
            by_image.setdefault(annotation["image_id"], []).append(named)
    photographs: list[Photograph] = []
    for entry in _entries(document, "images", "id", path):
        if len(photographs) == limit:
            break
        own = by_image.get(entry["id"], [])
        try:
            name, file = str(coco_name(entry)), coco_picture(folder / "images", entry)
            image = read_rgb(file)
            if own:
                check_size(image, coco_size(entry))
        except Malformed as error:
            raise ValueError(f"{path}, image {entry['id']}: {error}; {_SKIPPED}") from error
        h, w = image.shape[:2]
        layers: list[np.ndarray[Any, Any]] = []
        for number, (identity, segmentation) in enumerate(own, 1):
            try:
                mask = decode_segmentation(segmentation, h, w)
            except Malformed as error:
                raise ValueError(f"{path}, annotation {identity}: {error}; {_SKIPPED}") from error
            layer = next((item for item in layers if not item[mask].any()), None)
            if layer is None:
                layer = np.zeros((h, w), np.int16)
                layers.append(layer)
            layer[mask] = number
        if layers:
            photographs.append(Photograph(name, image, layers, False))
    return photographs


def _entries(document: dict[str, Any], what: str, key: str, path: Path) -> list[dict[str, Any]]:
    """The list `what` of a COCO file, whose entries have the id of a picture as `key`. Raises ValueError else."""
    for position, entry in enumerate(document[what]):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), (int, str)):
            raise ValueError(
                f"{path}, {what}[{position}]: expected an object with {key}, a number or a text; {_SKIPPED}"
            )
    return list(document[what])


def coco_size(entry: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) that an image of a COCO file claims, None where it claims none.

    Raises:
        Malformed: it is no size.
    """
    size = (entry.get("height"), entry.get("width"))
    if size == (None, None):
        return None
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise Malformed("image_malformed", f"expected height and width of at least 1 pixel, got {size}")
    return size  # type: ignore[return-value]


def check_size(image: np.ndarray[Any, Any], size: tuple[int, int] | None) -> None:
    """Raises Malformed when (height, width) of a picture is not `size`: polygons are in the pixels of that."""
    if size and image.shape[:2] != size:
        raise Malformed("image_size", f"expected height and width {size}, got {image.shape[:2]}")


def _by_picture(regions: Path) -> dict[str, list[Path]]:
    """The label maps <picture>_<annotator>.png of a folder by picture, sorted."""
    found: dict[str, list[Path]] = {}
    for path in sorted(regions.glob("*.png")):
        picture, _, annotator = path.stem.rpartition("_")
        if re.fullmatch(r"\d+", annotator):
            found.setdefault(picture, []).append(path)
    return found


def load_bsds(folder: Path, split: str, limit: int | None = None) -> list[Photograph]:
    """Photographs of `<folder>/<split>.txt` with one label map for each annotator; `limit` as of `load_coco`.

    Raises:
        FileNotFoundError: the list, an image or all label maps of one are missing.
        ValueError: a label map is of another size than its image.
    """
    photographs = []
    found: dict[Path, dict[str, list[Path]]] = {}
    for name in map(without_ending, listed(folder / f"{split}.txt")[:limit]):
        image = read_rgb(folder / "images" / f"{name}.jpg")
        path = folder / "regions" / name
        if path.parent not in found:
            found[path.parent] = _by_picture(path.parent)
        paths = found[path.parent].get(path.name)
        if not paths:
            raise FileNotFoundError(
                f"expected label maps of {name} at {folder / 'regions' / name}_*.png, found none; add them, or take "
                f"{name} out of {folder / split}.txt"
            )
        layers = [read_pixels(p, cv2.IMREAD_UNCHANGED).astype(np.int16) for p in paths]
        for path, layer in zip(paths, layers):
            _check_layer(path, layer, image)
        photographs.append(Photograph(name, image, layers, True))
    return photographs


def load_camvid(folder: Path, split: str) -> list[Photograph]:
    """Frames of `<folder>/<split>.txt`; a region is a connected part of a class, so cars that touch are one.

    Raises:
        FileNotFoundError: the list, a frame or its labels are missing or cannot be read.
        ValueError: labels are of another size than their frame, or coloured.
    """
    photographs = []
    for name in map(without_ending, listed(folder / f"{split}.txt")):
        image = read_rgb(folder / "images" / f"{name}.jpg")
        path = folder / "labels" / f"{name}.png"
        classes = read_label_map(path)
        _check_layer(path, classes, image)
        layer = np.zeros(classes.shape, np.int16)
        regions = 0
        for value in np.unique(classes[classes != CAMVID_VOID]):
            count, parts, stats, _ = cv2.connectedComponentsWithStats((classes == value).astype(np.uint8))
            for part in range(1, count):
                if stats[part, cv2.CC_STAT_AREA] >= CAMVID_MIN_AREA:
                    regions += 1
                    layer[parts == part] = regions
        if regions:
            photographs.append(Photograph(name, image, [layer], False))
    return photographs


def _check_layer(path: Path, layer: np.ndarray[Any, Any], image: np.ndarray[Any, Any]) -> None:
    if layer.shape != image.shape[:2]:
        raise ValueError(f"{path}: expected (height, width) {image.shape[:2]} of its picture, got {layer.shape}")


def load_lqseg(folder: Path, level: int | None = None, kind: str | None = None) -> Iterator[LqsegPair]:
    """Pairs of an LQSeg data set, read one after the other in the order of its manifest.

    Args:
        folder: what `glesam lqseg build` wrote.
        level: 1, 2 or 3; None for all.
        kind: of the degradation; None for all.

    Raises:
        FileNotFoundError: there is no data set, or a file of it is missing.
        ValueError: the build was not finished, its manifest was changed, or it has no such level or kind.
    """
    settings = _opened_lqseg(folder)["settings"]
    for what, wanted, there in (("level", level, settings["levels"]), ("kind", kind, settings["kinds"])):
        if wanted is not None and wanted not in there:
            raise ValueError(f"{what}: expected one of {', '.join(map(str, there))} in {folder}, got {wanted!r}")
    return _lqseg_pairs(folder, level, kind)


def load_clear_lqseg(folder: Path) -> list[StoredPhotograph]:
    """The clear photographs of an LQSeg data set, not read yet.

    Raises:
        FileNotFoundError, ValueError: as `load_lqseg`.
    """
    _opened_lqseg(folder)
    with (folder / LQSEG_MANIFEST).open(encoding="utf-8") as lines:
        return [_stored(folder, entry) for entry in map(json.loads, lines)]


def _opened_lqseg(folder: Path) -> dict[str, Any]:
    """dataset.json, once the manifest has its checksum: of one that was shortened, a part would pass for the whole."""
    info, manifest = read_lqseg_info(folder), folder / LQSEG_MANIFEST
    if sha256(manifest) != info.get("manifest_sha256"):
        raise ValueError(
            f"{manifest}: expected the file as it was built, it was changed since the build; run "
            f"`glesam lqseg verify {folder}`"
        )
    return info


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
    """(H, W, 3) uint8 RGB. Raises FileNotFoundError when the file is missing or no whole picture."""
    return np.asarray(cv2.cvtColor(read_pixels(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def parse_coco(data: bytes, path: Path) -> dict[str, Any]:
    """The document of a COCO or LVIS file, with its lists "images" and "annotations"; their entries are unchecked.

    Args:
        data: of the file.
        path: for messages.

    Raises:
        ValueError: `data` is no such JSON.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: expected COCO or LVIS JSON: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(k), list) for k in ("images", "annotations")):
        raise ValueError(f'{path}: expected a COCO or LVIS JSON object with the lists "images" and "annotations"')
    return document


def coco_name(entry: dict[str, Any]) -> PurePosixPath:
    """File name of an image of a COCO file; LVIS has only the address.

    Raises:
        Malformed: there is none, or none that can be a file below a folder.
    """
    name = entry.get("file_name")
    if name is None and isinstance(entry.get("coco_url"), str):
        name = _url_path(entry).name
    if not isinstance(name, str) or not name:
        raise Malformed("image_malformed", f"expected file_name or coco_url, got {name!r}")
    # JSON can hold halves of characters, which no file name has
    if re.search("[\0\ud800-\udfff]", name) or len(name.encode()) > MAX_NAME:
        raise Malformed("image_malformed", f"expected a file_name of at most {MAX_NAME} bytes, got {name!r:.60}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise Malformed("image_malformed", f"expected a file_name below the folder of pictures, got {name!r}")
    return path


def coco_picture(images: Path, entry: dict[str, Any]) -> Path:
    """Path of an image of a COCO file, which need not be there. Raises as `coco_name`."""
    path = images / coco_name(entry)
    if entry.get("file_name") is None and not path.exists():  # COCO as downloaded: images/train2017/1.jpg
        address = _url_path(entry)
        return images / coco_name({"file_name": str(PurePosixPath(address.parent.name, address.name))})
    return path


def _url_path(entry: dict[str, Any]) -> PurePosixPath:
    try:
        return PurePosixPath(urlparse(entry["coco_url"]).path)
    except ValueError as error:
        raise Malformed("image_malformed", f"expected coco_url to be an address: {error}") from error


def decode_segmentation(segmentation: Any, height: int, width: int) -> BoolArray:
    """COCO polygons or RLE -> (H, W) bool, by pycocotools' rasterisation, which itself checks nothing.

    Args:
        segmentation: polygons [[x, y, ...], ...] in pixels, or RLE {"size", "counts"}, compressed or not.
        height, width: of the picture.

    Raises:
        Malformed: it is neither, or does not fit such a picture.
    """
    size = height, width
    if not segmentation:
        raise Malformed("segmentation_empty", f"expected polygons or RLE, got {segmentation!r}")
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, size)
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict):
        _check_rle(segmentation, size)
        uncompressed = isinstance(segmentation["counts"], list)
        rle = coco_mask.frPyObjects(segmentation, height, width) if uncompressed else segmentation
    else:
        raise Malformed("segmentation_malformed", f"expected polygons or RLE, got {type(segmentation).__name__}")
    return np.asarray(coco_mask.decode(rle), np.bool_)


def check_numbers(values: Any, what: str) -> list[float]:
    """`values`, a list of finite numbers. Raises Malformed when it is not."""
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and v is not True for v in values):
        raise Malformed("segmentation_malformed", f"{what}: expected a list of numbers, got {str(values)[:60]}")
    if not all(abs(v) <= sys.float_info.max for v in values):  # math.isfinite overflows with large integers
        raise Malformed("not_finite", f"{what}: expected finite numbers, got {str(values)[:60]}")
    return values


def _check_polygon(polygon: Any, size: tuple[int, int]) -> None:
    points = check_numbers(polygon, "polygon")
    if len(points) % 2:
        raise Malformed("polygon_odd", f"expected x, y pairs, got {len(points)} numbers")
    if len(points) < 6:
        raise Malformed("polygon_points", f"expected at least 3 points, got {len(points) // 2}")
    for values, side in ((points[::2], size[1]), (points[1::2], size[0])):
        if min(values) < -side or max(values) > 2 * side:  # far points also cost memory to rasterise
            raise Malformed("polygon_outside", f"expected points near a picture of {size[1]}x{size[0]}")


def _check_rle(rle: dict[str, Any], size: tuple[int, int]) -> None:
    if rle.get("size") != list(size):
        raise Malformed("rle_size", f"expected size {list(size)} (height, width), got {rle.get('size')!r}")
    counts = rle.get("counts")
    try:
        runs = rle_counts(counts) if isinstance(counts, (str, bytes)) else counts
    except ValueError as error:
        raise Malformed("rle_counts", f"expected compressed RLE counts: {error}") from error
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise Malformed("rle_counts", f"expected run lengths of at least 0, got {str(counts)[:60]}")
    if sum(runs) != size[0] * size[1]:
        raise Malformed("rle_size", f"expected runs over {size[0] * size[1]} pixels, got {sum(runs)}")


def rle_counts(text: str | bytes) -> list[int]:
    """Run lengths of a compressed COCO RLE, unchecked: pycocotools trusts them, so they are looked at before.

    Raises:
        ValueError: not such a text.
    """
    data = text.encode("ascii") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        code = byte - 48
        if not 0 <= code < 64:
            raise ValueError(f"character {chr(byte)!r}")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("cut short")
    return counts


def region_masks(photograph: Photograph, layer: int | None = None) -> BoolArray:
    """All regions as (R, H, W) bool; of one `layer` where the layers are alternatives."""
    layers = [photograph.layers[layer or 0]] if photograph.alternatives else photograph.layers
    masks = [item == number for item in layers for number in np.unique(item) if number > 0]
    return np.stack(masks) if masks else np.zeros((0, *photograph.image.shape[:2]), np.bool_)
