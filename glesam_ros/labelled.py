"""Folders of pictures with a class for every pixel: ADE20K, CamVid, and any folder with label maps and a class list."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.picture_files import SUFFIXES, is_cut_short, listed
from glesam_ros.validation import UInt8Array

IGNORE = 255
"""Label of a pixel without a class, in label maps of uint8."""
IGNORE_16 = 65535
"""The same in label maps of uint16, which data sets of more than 255 classes have."""
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)
"""Classes of CamVid as distributed with SegNet (Brostow et al. 2008), in the order of its label values."""
CAMVID_PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)
CAMVID_VOID = 11
"""Its label of a pixel without a class."""
CLASS_FILES = ("classes.json", "classes.txt")
"""Where a folder's own names of its classes may stand."""
ADE_TABLE = "objectInfo150.txt"
"""Table of classes that comes with ADE20K; no list of a split. Models name some of its classes otherwise."""
EVERY = "all"
"""The split that takes every picture of a folder without splits."""

_ADE_SPLITS = {"train": "training", "val": "validation", "test": "validation"}
_NOT_A_CLASS = -1

Labels = NDArray[Any]
"""(H, W) uint8 or uint16."""


class LabelledPicture(NamedTuple):
    """One picture and its classes.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 class indices, `IGNORE` where there is none; beyond 255 classes uint16 with `IGNORE_16`.
        name: path below the folder of pictures without its ending, with "/" between its parts.
    """

    image: UInt8Array
    labels: Labels
    name: str


class ClassList(NamedTuple):
    """What a class file says.

    Attributes:
        classes: K names, unique.
        palette: (K, 3) uint8 RGB, or None where the file has no colours.
        ignore: label values without a class; None where the file does not say.
        ignore_colours: the same for label maps that are coloured, RGB.
    """

    classes: tuple[str, ...]
    palette: UInt8Array | None = None
    ignore: tuple[int, ...] | None = None
    ignore_colours: tuple[tuple[int, int, int], ...] = ()

    @property
    def shown(self) -> UInt8Array:
        """(K, 3) uint8 RGB, colours to draw the classes in: the palette, else `default_palette`."""
        return default_palette(len(self.classes)) if self.palette is None else self.palette


@dataclass(frozen=True, eq=False)
class LabelledFolder:
    """Labelled pictures on disk, read one by one; `open_labelled` makes it.

    Attributes:
        name: of the folder.
        classes: K names.
        palette: (K, 3) uint8 RGB.
        names: of the pictures.
        images, label_files: as many files.
        values: (65536,) int32, label value in a file -> class index, `ignore`, or -1 for a value that must not be.
        colours: 0xRRGGBB -> the same, for label maps in colour; None where the data set names no colours.
    """

    name: str
    classes: tuple[str, ...]
    palette: UInt8Array
    names: tuple[str, ...]
    images: tuple[Path, ...]
    label_files: tuple[Path, ...]
    values: np.ndarray[Any, np.dtype[np.int32]]
    colours: dict[int, int] | None = None

    @property
    def ignore(self) -> int:
        """`IGNORE`, or `IGNORE_16` beyond 255 classes."""
        return _ignore_of(len(self.classes))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[LabelledPicture]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> LabelledPicture:
        """Read one picture.

        Raises:
            IndexError: there are not so many.
            FileNotFoundError: a file is missing or no whole picture.
            ValueError: picture and labels differ in size, or there is a label that is no class and not ignored.
        """
        image = read_pixels(self.images[index], cv2.IMREAD_COLOR)
        labels = self.labels(index)
        if labels.shape != image.shape[:2]:
            raise ValueError(
                f"{self.label_files[index]}: expected (height, width) {image.shape[:2]} of its picture, "
                f"got {labels.shape}"
            )
        return LabelledPicture(np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8), labels, self.names[index])

    def labels(self, index: int) -> Labels:
        """Labels of one picture, as in `LabelledPicture`. Raises as `[index]`."""
        path = self.label_files[index]
        found = read_label_map(path)
        if found.ndim == 3:
            indices = self._from_colours(found, path)
        else:
            indices = self.values[found]
            wrong = np.unique(found[indices == _NOT_A_CLASS])
            if wrong.size:
                raise ValueError(
                    f"{path}: expected labels of {len(self.classes)} classes or ignored ones, got "
                    f"{some_of(wrong.tolist())}; list what has no class under \"ignore\" in classes.json"
                )
        return indices.astype(np.uint8 if self.ignore == IGNORE else np.uint16)

    def select(self, keep: Sequence[int]) -> LabelledFolder:
        """The folder with the pictures at the indices `keep` only, in that order."""
        return replace(
            self, names=tuple(self.names[k] for k in keep), images=tuple(self.images[k] for k in keep),
            label_files=tuple(self.label_files[k] for k in keep),
        )

    def _from_colours(self, found: UInt8Array, path: Path) -> np.ndarray[Any, np.dtype[np.int32]]:
        if self.colours is None:
            raise ValueError(
                f"{path}: expected label values in a grey or indexed picture, got a coloured one; give each class its "
                "colour in classes.json or classes.txt"
            )
        codes = found.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        there, inverse = np.unique(codes, return_inverse=True)
        indices = np.array([self.colours.get(int(code), _NOT_A_CLASS) for code in there], np.int32)
        if (indices == _NOT_A_CLASS).any():
            wrong = [f"#{code:06x}" for code in there[indices == _NOT_A_CLASS]]
            raise ValueError(
                f"{path}: expected colours of one class each, got {some_of(wrong)}; save label maps as PNG without "
                "smoothing, and list colours that have no class under \"ignore\" in classes.json"
            )
        return indices[inverse.reshape(codes.shape)]


def open_labelled(
    path: Path | str, split: str, classes: Sequence[str] | None = None, palette: Any = None
) -> LabelledFolder:
    """Open a folder of labelled pictures; nothing is read yet.

    Layouts, told apart by what is there:
      ADE20K: images/{training,validation}/, annotations/{training,validation}/; 0 is unlabelled, k is class k - 1.
        Splits "train" and "val" or "test" are its training and validation. Where nothing names its classes they are
        those of `glesam_ros.ade20k`.
      CamVid with SegNet's classes: a folder named camvid, with train.txt, test.txt, images/, labels/ and no list
        of classes; 11 is void.
      Any other: images/, labels/ and classes.json or classes.txt; value k is class k.
    Names of classes come from `classes`, else from classes.json or classes.txt.
    The pictures of a split: those that <split>.txt lists (a name a line), else all of images/<split>/, else, for
    the split "all", all of images/. Labels lie at the same place below labels/ (ADE20K: annotations/) as PNG, grey
    (8 or 16 bits), indexed (the index counts) or, where the classes have colours, RGB.

    classes.json: {"classes": [name, ...], "palette": [[r, g, b], ...], "ignore": [value or [r, g, b], ...]}; palette
    and ignore may be missing. classes.txt: a name a line, with its colour behind it or without ("road 128 64 128"); #
    begins a comment. Ignored where nothing is said: 255 and 65535.

    Args:
        path: of the folder.
        split: "train", "test", "val", "all" or a name of the folder's own.
        classes: names of the classes in the order of their labels, instead of those of the folder.
        palette: (K, 3) uint8 RGB, instead of the folder's.

    Raises:
        FileNotFoundError: no such folder, layout, split, class list, or a label file is missing.
        ValueError: the class list cannot be read, palette and classes differ in number, or a picture is there twice.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of labelled pictures, found none")
    ade = (root / "annotations").is_dir()
    labels_folder = root / ("annotations" if ade else "labels")
    if not (root / "images").is_dir() or not labels_folder.is_dir():
        raise FileNotFoundError(
            f"{root}: expected images/ with labels/, or images/ with annotations/ (ADE20K), found "
            f"{', '.join(sorted(p.name for p in root.iterdir() if p.is_dir())) or 'no folder'}"
        )
    class_list = classes_of(root, classes, palette)
    names, images = _pictures(root, split, _ADE_SPLITS if ade else {})
    label_files = tuple(labels_folder / f"{name}.png" for name in names)
    missing = [file for file in label_files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: expected labels, found no such file ({len(missing)} missing)")
    values, colours = _tables(class_list, 1 if ade else 0)
    return LabelledFolder(
        root.resolve().name, class_list.classes, class_list.shown, names, images, label_files, values, colours,
    )


def classes_of(root: Path, classes: Sequence[str] | None = None, palette: Any = None) -> ClassList:
    """The classes of a folder in any layout of `open_labelled`, which see.

    Raises:
        FileNotFoundError: nothing says what the classes are.
        ValueError: the class file cannot be read or names a class twice, or palette and classes differ in number.
    """
    if (root / "annotations").is_dir() and classes is None and not _class_file(root):
        from glesam_ros import ade20k  # makes its 150 colours

        classes, palette = ade20k.CLASSES, ade20k.PALETTE if palette is None else palette
    class_list = read_class_list(root, classes)
    if palette is not None:
        class_list = class_list._replace(palette=check_palette(palette, len(class_list.classes)))
    return class_list


def read_class_list(root: Path, classes: Sequence[str] | None = None) -> ClassList:
    """The classes of a folder: those given, else those of its class file, else CamVid's.

    Raises:
        FileNotFoundError: nothing says what the classes are.
        ValueError: the class file cannot be read, or names a class twice.
    """
    file = _class_file(root)
    if file is None and "camvid" in root.resolve().name.lower():
        found = ClassList(CAMVID_CLASSES, np.array(CAMVID_PALETTE, np.uint8), (CAMVID_VOID,))
    elif file is None and classes is None:
        raise FileNotFoundError(
            f"{root}: expected {' or '.join(CLASS_FILES)} with the names of the classes, found none; write "
            "classes.txt, a name a line in the order of the label values"
        )
    elif file is None:
        found = ClassList(())
    else:
        try:
            found = _read_json(file) if file.suffix == ".json" else _read_text(file)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{file}: expected a list of classes, cannot read it: {error}") from error
    if classes is not None:
        same = found.palette is not None and len(found.palette) == len(classes)
        found = found._replace(classes=tuple(classes), palette=found.palette if same else None)
    twice = sorted(name for name, times in Counter(found.classes).items() if times > 1)
    if twice or not found.classes:
        raise ValueError(f"{root}: expected at least one class, each once, got {', '.join(twice) or 'none'}")
    if len(found.classes) > IGNORE_16:
        raise ValueError(f"{root}: expected at most {IGNORE_16} classes, got {len(found.classes)}")
    return found


def read_pixels(path: Path, flags: int) -> Labels:
    """A picture file as OpenCV reads it with `flags` (cv2.IMREAD_...): (H, W, 3) uint8 BGR, or what is in the file.

    Raises:
        FileNotFoundError: the file is missing or no picture, or is cut short, which OpenCV reads with grey rows.
    """
    data = path.read_bytes() if path.is_file() else b""
    if is_cut_short(data):
        raise FileNotFoundError(
            f"expected a whole picture at {path}, found one cut short after {len(data)} bytes; copy it again"
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise FileNotFoundError(f"expected a picture at {path}, found none that can be read")
    return image


def read_label_map(path: Path) -> Labels:
    """A label map as it is in the file: (H, W) uint8 or uint16 values or indices, or (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: the file is missing or no picture, is damaged or cut short, or larger than PIL opens.
        ValueError: values beyond 16 bits.
    """
    from PIL import Image  # OpenCV turns an indexed picture into colours

    try:
        with Image.open(path) as picture:
            if picture.mode in ("RGB", "RGBA"):
                return np.asarray(picture.convert("RGB"))
            if picture.mode == "1":
                return np.asarray(picture).astype(np.uint8)
            found = np.asarray(picture.convert("L") if picture.mode == "LA" else picture)
    except Exception as error:  # PIL raises SyntaxError, ValueError and errors of its own beside OSError
        raise FileNotFoundError(f"expected a label map at {path}, found none that can be read: {error}") from error
    if found.dtype == np.uint8:
        return found
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer) or found.min() < 0 or found.max() > IGNORE_16:
        raise ValueError(f"{path}: expected grey values of 8 or 16 bits, indices or RGB, got {found.dtype}")
    return found.astype(np.uint16)


def write_label_map(path: Path, labels: Labels, palette: UInt8Array) -> None:
    """Write class indices as PNG: indexed with the colours of the classes, or 16 bit grey beyond 8 bits.

    Args:
        path: of the file.
        labels: (H, W) uint8 or uint16; uint16 is written as grey, since an indexed picture has at most 256 colours.
        palette: (K, 3) uint8 RGB, K at most 256 where labels are uint8.

    Raises:
        ValueError, OSError: labels of another type or shape; the file cannot be written.
    """
    from PIL import Image

    if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"labels: expected (H, W) uint8 or uint16, got {labels.shape} {labels.dtype}")
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette(palette[:256].tobytes())
    picture.save(path, "PNG")


def default_palette(count: int) -> UInt8Array:
    """(count, 3) uint8 RGB, all different up to 65535 classes: PASCAL VOC's colour of index k + 1 for class k.

    The three lowest bits of an index are the highest bits of red, green and blue, the next three the next lower ones
    (VOC development kit).
    """
    index = np.arange(1, count + 1)
    colours = np.zeros((count, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def check_palette(palette: Any, count: int) -> UInt8Array:
    """(count, 3) uint8 RGB of whole numbers 0..255. Raises ValueError when it is not."""
    try:
        given = np.array(palette, np.float64)
        found = given.reshape(-1, 3)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"palette: expected [r, g, b] for each of {count} classes, got {palette!r}") from error
    if (given.size and given.ndim > 1 and given.shape[-1] != 3) or (given != np.rint(given)).any():  # 0..1, for example
        raise ValueError(f"palette: expected [r, g, b] of whole numbers 0..255 for each class, got {str(palette)[:60]}")
    if len(found) != count or found.min(initial=0) < 0 or found.max(initial=0) > 255:
        raise ValueError(f"palette: expected {count} colours of three numbers 0..255, got {len(found)}")
    return found.astype(np.uint8)


def some_of(values: Sequence[Any], most: int = 10) -> str:
    """The first `most` values, for a message, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def _class_file(root: Path) -> Path | None:
    return next((root / name for name in CLASS_FILES if (root / name).is_file()), None)


def _read_json(file: Path) -> ClassList:
    document = json.loads(file.read_bytes())
    classes = document["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
        raise ValueError('"classes": expected a list of names')
    palette = check_palette(document["palette"], len(classes)) if document.get("palette") is not None else None
    if document.get("ignore") is None:
        return ClassList(tuple(classes), palette)
    ignore = document["ignore"] if isinstance(document["ignore"], list) else [document["ignore"]]
    colours = [item for item in ignore if isinstance(item, list)]
    values = [item for item in ignore if not isinstance(item, list)]
    if not all(type(value) is int and 0 <= value <= IGNORE_16 for value in values):  # true is no label value
        raise ValueError(f'"ignore": expected label values 0..{IGNORE_16} or [r, g, b], got {ignore}')
    r_g_b = [tuple(colour) for colour in check_palette(colours, len(colours)).tolist()]
    return ClassList(tuple(classes), palette, tuple(values), tuple(r_g_b))


def _read_text(file: Path) -> ClassList:
    names, colours = [], []
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        parts = re.fullmatch(r"(.*\S)\s+(\d+)[\s,]+(\d+)[\s,]+(\d+)", text)
        names.append(parts[1].rstrip(",:") if parts else text)
        if parts:
            colours.append([int(parts[k]) for k in (2, 3, 4)])
    return ClassList(tuple(names), check_palette(colours, len(names)) if colours else None)


def _pictures(root: Path, split: str, aliases: dict[str, str]) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Names and files of the pictures of a split."""
    images = root / "images"
    listing = root / f"{split}.txt"
    lists = (*CLASS_FILES, ADE_TABLE)
    if listing.is_file() and listing.name not in lists:
        files = [_picture(images, name) for name in listed(listing)]
    else:
        folder = images / (aliases.get(split, split) if split != EVERY else "")
        if not folder.is_dir():
            there = sorted(
                [p.stem for p in root.glob("*.txt") if p.name not in lists]
                + [p.name for p in images.iterdir() if p.is_dir()]
            )
            raise FileNotFoundError(
                f"{root}: expected {listing.name} or images/{split}/, found neither; splits that are there: "
                f"{', '.join([*there, EVERY])}"
            )
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise FileNotFoundError(f"{root}: expected pictures in the split {split}, found none")
    by_name: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(images).with_suffix("").as_posix()
        if name in by_name:
            raise ValueError(
                f"{root}: expected each picture once in the split {split}, got {name} twice, as {by_name[name].name} "
                f"and {file.name}; take one of them out"
            )
        by_name[name] = file
    return tuple(by_name), tuple(by_name.values())


def _picture(images: Path, name: str) -> Path:
    """The file of a picture that a list names, with or without its ending."""
    path = images / name
    if path.suffix.lower() in SUFFIXES:
        if path.is_file():
            return path
    else:
        for suffix in SUFFIXES:
            file = path.with_name(path.name + suffix)
            if file.is_file():
                return file
    raise FileNotFoundError(f"{path}: expected a picture ({' '.join(SUFFIXES)}), found none")


def _tables(class_list: ClassList, first: int) -> tuple[np.ndarray[Any, np.dtype[np.int32]], dict[int, int] | None]:
    """`LabelledFolder.values` and `.colours`; `first` is the label value of class 0, those below it are ignored."""
    count = len(class_list.classes)
    ignore = _ignore_of(count)
    values = np.full(IGNORE_16 + 1, _NOT_A_CLASS, np.int32)
    values[[IGNORE, IGNORE_16] if class_list.ignore is None else list(class_list.ignore)] = ignore
    values[:first] = ignore
    # of the values and colours that both lists have, "ignore" was written on purpose
    classes = np.arange(count)
    free = np.ones(count, bool) if class_list.ignore is None else ~np.isin(classes + first, class_list.ignore)
    values[classes[free] + first] = classes[free]
    if class_list.palette is None:
        return values, None
    colours: dict[int, int] = {}
    for index, colour in enumerate(class_list.palette.tolist()):
        # that of two classes is of neither
        colours[_code(colour)] = _NOT_A_CLASS if _code(colour) in colours else index
    colours.update({_code(colour): ignore for colour in class_list.ignore_colours})
    return values, colours


def _code(colour: Sequence[int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _ignore_of(classes: int) -> int:
    return IGNORE if classes <= IGNORE else IGNORE_16
