"""Builds an LQSeg data set: clear pictures, degraded versions, masks, and a manifest that says how each came about.

    dataset.json               settings, versions, counts, categories
    manifest.jsonl             one line a picture
    errors.jsonl               one line for each malformed picture or annotation
    images/<id>.<ext>          clear, the bytes of the source
    lq/<kind>-<level>/<id>.png degraded, 8 bit RGB
    masks/<id>_<layer>.png     label maps, 16 bit, 0 unlabeled

Each picture's line is appended to a journal once its files are there, so a build that was killed goes on; a picture
whose source was changed since is built again. What a file holds depends on the settings and the picture alone, so the
result is the same byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glesam_ros import __version__
from glesam_ros.checksum import sha256
from glesam_ros.datasets import LQSEG_FORMAT, LQSEG_INFO, LQSEG_MANIFEST, MAX_NAME
from glesam_ros.degradation import degrade, names
from glesam_ros.lqseg.sources import KINDS, Fault, Index, Malformed, Source, read_index, read_picture, read_truth
from glesam_ros.whole_files import PART, lock, write_bytes

JOURNAL = "manifest.journal"
ERRORS = "errors.jsonl"
FOLDERS = ("images", "lq", "masks")

Track = Callable[[Iterable[Any], int], Iterable[Any]]
"""(items, how many) -> the same items, with their progress shown."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        source: one of `sources.KINDS`.
        images: folder of the clear pictures.
        annotations: COCO file, or folder of masks.
        levels: of degradation, 1..3.
        kinds: of degradation, names of `glesam_ros.degradation.names()`.
        seed: of the data set, at least 0.
        split: name of the split; a list `<split>.txt` beside `images` chooses its pictures.
        limit: take the first pictures only.
        binary: masks of a folder are grey pictures, above 127 is the object.
    """

    source: str
    images: Path
    annotations: Path
    levels: tuple[int, ...] = (1, 2, 3)
    kinds: tuple[str, ...] = ("lq",)
    seed: int = 0
    split: str = "train"
    limit: int | None = None
    binary: bool = False


@dataclass(frozen=True)
class Summary:
    """What was built: the counts of dataset.json, and all faults in the order of the source."""

    counts: dict[str, Any]
    faults: list[Fault]


def build(options: BuildOptions, out: Path, workers: int = 1, track: Track = lambda items, total: items) -> Summary:
    """Build a data set in the folder `out`, or go on with one that was stopped.

    Args:
        options: what to build.
        out: new or empty folder, or one of a build with the same options.
        workers: threads; OpenCV and numpy release the interpreter.
        track: shows the progress.

    Raises:
        ValueError: an option that does not exist, a source that cannot be read as a whole, a folder with something
            else in it, one built with other settings (says which), or one that another build writes to.
        OSError: a source is missing, or `out` cannot be written.
    """
    _check(options, workers)
    index = read_index(options.source, options.images, options.annotations, options.split, options.binary)
    with _alone(out):
        return _build(options, index, out, workers, track)


def _build(options: BuildOptions, index: Index, out: Path, workers: int, track: Track) -> Summary:
    sources = index.sources[: options.limit]
    settings = _settings(options, index)
    known = _prepare(out, settings)

    def entry_of(source: Source) -> str | Fault:
        line = known.get(source.id)
        entry = json.loads(line) if line else {"files": {}}
        if line and _is_intact(out, entry) and _is_of(source, entry):
            return line
        built = _build_one(options, index, source, out)
        kept = json.loads(built)["files"].keys() if isinstance(built, str) else set()
        _remove(out, (entry["files"].keys() | _traces(options, source, out)) - kept)
        return built

    faults = list(index.faults)
    counts: Counter[str] = Counter(images=0, degraded=0, instances=0)
    digest = hashlib.sha256()
    part = out / (LQSEG_MANIFEST + PART)  # in the order of the source; the journal is what outlives a kill
    pool = ThreadPoolExecutor(workers)
    try:
        with part.open("w", encoding="utf-8") as manifest, (out / JOURNAL).open("a", encoding="utf-8") as journal:
            for result in track(pool.map(entry_of, sources), len(sources)):
                if isinstance(result, Fault):
                    faults.append(result)
                    continue
                entry = json.loads(result)
                faults += [Fault(**item) for item in entry["left_out"]]
                if known.get(entry["id"]) != result:
                    journal.write(result)
                    journal.flush()
                if entry["instances"]:
                    manifest.write(result)
                    digest.update(result.encode())
                    counts.update(images=1, degraded=len(entry["degraded"]), instances=len(entry["instances"]))
    finally:
        pool.shutdown(cancel_futures=True)
    os.replace(part, out / LQSEG_MANIFEST)
    write_file(out / ERRORS, "".join(json.dumps(asdict(fault)) + "\n" for fault in faults).encode())
    summary = Summary(
        {
            **counts, "crowd_left_out": index.crowd, "images_without_masks": index.without_masks,
            "faults": dict(sorted(Counter(fault.kind for fault in faults).items())),
        },
        faults,
    )
    categories = [{"id": number, "name": name} for number, name in (index.categories or {}).items()]
    document = {"settings": settings, "complete": True, "counts": summary.counts, "manifest_sha256": digest.hexdigest()}
    write_file(out / LQSEG_INFO, _pretty({**document, "categories": categories}))
    (out / JOURNAL).unlink()
    return summary


def file_seed(seed: int, image_id: str, kind: str, level: int) -> int:
    """Seed of one degraded file, 0 .. 2**53 - 1 (what any JSON reader holds); nothing else goes into it."""
    digest = hashlib.sha256(json.dumps([seed, image_id, kind, level]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; makes its folder. Without waiting for the disk: there are thousands."""
    write_bytes(path, data, sync=False, is_shared=False)


def _check(options: BuildOptions, workers: int) -> None:
    unknown = [kind for kind in options.kinds if kind not in names()]
    if unknown or not options.kinds:
        raise ValueError(f"kinds: expected some of {', '.join(names())}; got {', '.join(unknown) or 'none'}")
    if not options.levels or not set(options.levels) <= {1, 2, 3}:
        raise ValueError(f"levels: expected some of 1, 2, 3; got {options.levels}")
    if options.seed < 0:
        raise ValueError(f"seed: expected at least 0, got {options.seed}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit: expected at least 1, got {options.limit}")
    # elsewhere it would make one object of all labels
    if options.binary and options.source in KINDS and options.source != "folder":
        raise ValueError(f"binary: expected it with masks of a folder alone, got it with {options.source}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")


def _settings(options: BuildOptions, index: Index) -> dict[str, Any]:
    """All that the bytes of the data set depend on; no paths, a source may move."""
    return {
        "format": LQSEG_FORMAT, "version": __version__, "numpy": np.__version__, "opencv": cv2.__version__,
        "source": options.source, "annotations": index.annotations, "fingerprint": index.fingerprint,
        "split": options.split, "split_list": index.split_list, "levels": sorted(set(options.levels)),
        "kinds": sorted(set(options.kinds)), "seed": options.seed, "limit": options.limit, "binary": options.binary,
    }


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Make the folder and hold it: two builds would write to the same names and lose each other's journal.

    Raises:
        ValueError: another build holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        if not lock(folder):
            raise ValueError(f"{out}: another build writes there; wait for its end, or give another folder")
        yield
    finally:
        os.close(folder)


def _prepare(out: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Make the folder ready; lines of an earlier build by picture.

    Raises:
        ValueError: there is something else in it, or a build with other settings.
    """
    info = out / LQSEG_INFO
    if not info.exists():
        foreign = [p.name for p in out.iterdir() if p.name != LQSEG_INFO + PART]
        if foreign:
            raise ValueError(f"{out}: expected an empty folder or an earlier build, found {sorted(foreign)[0]}")
        write_file(info, _pretty({"settings": settings, "complete": False}))
        return {}
    try:
        earlier = dict(json.loads(info.read_bytes())["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{info}: expected the settings of an earlier build; remove {out}") from error
    changed = [
        f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}"
        for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"{out}: built with other settings: {'; '.join(changed)}; build into another folder")
    known: dict[str, str] = {}
    for name in (LQSEG_MANIFEST, JOURNAL):
        path = out / name
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(True) if path.exists() else ():
            identity = _identity(line)
            if identity is not None:
                known[identity] = line
    write_file(out / JOURNAL, "".join(known.values()).encode())  # without a line that was cut
    write_file(info, _pretty({"settings": settings, "complete": False}))
    return known


def _identity(line: str) -> str | None:
    """The picture of a manifest line; None when the line was cut or changed."""
    try:
        entry = json.loads(line)
        whole = line.endswith("\n") and {"files", "left_out", "instances"} <= entry.keys()
        return str(entry["id"]) if whole else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_intact(out: Path, entry: dict[str, Any]) -> bool:
    """Whether all files of a line are there in full size; `glesam lqseg verify` reads them."""
    try:
        return all((out / name).stat().st_size == file["bytes"] for name, file in entry["files"].items())
    except OSError:
        return False


def _is_of(source: Source, entry: dict[str, Any]) -> bool:
    """Whether a line was made of the files of `source` as they are now; settings hold the checksum of a COCO file."""
    try:
        image = entry["files"][entry["image"]]["sha256"]
        return bool(entry.get("masks_sha256", []) == _checksums(source) and sha256(source.image) == image)
    except (OSError, KeyError, TypeError):  # a picture without masks has no files, and is quickly read again
        return False


def _checksums(source: Source) -> list[str | None]:
    """Of the files of masks; None for one that cannot be read."""
    found: list[str | None] = []
    for path in source.masks:
        try:
            found.append(sha256(path))
        except OSError:
            found.append(None)
    return found


def _traces(options: BuildOptions, source: Source, out: Path) -> set[str]:
    """Files of a picture that a build may have left that was killed before it wrote the line."""
    if len(source.id.encode()) > MAX_NAME:  # nothing has such a name
        return set()
    layers = list(takewhile(lambda name: (out / name).exists(), (f"masks/{source.id}_{k}.png" for k in count())))
    layers.append(f"masks/{source.id}_{len(layers)}.png")  # a half of it may be there
    degraded = [f"lq/{kind}-{level}/{source.id}.png" for kind in options.kinds for level in options.levels]
    names = [f"images/{source.id}{source.image.suffix.lower()}", *layers, *degraded]
    return {name + ending for name in names for ending in ("", PART)}


def _remove(out: Path, names: Iterable[str]) -> None:
    """Remove files that a picture had of its source as it was before, a layer of its masks for example."""
    for name in names:
        if name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and ".." not in name.split("/"):
            (out / name).unlink(missing_ok=True)


def _build_one(options: BuildOptions, index: Index, source: Source, out: Path) -> str | Fault:
    """Write the files of one picture; its line of the manifest, or why there is none."""
    try:
        if len(source.id.encode()) > MAX_NAME:
            raise Malformed("name_long", f"expected a name of at most {MAX_NAME} bytes; rename picture and masks")
        data, image = read_picture(source)
    except Malformed as error:
        return Fault(error.kind, source.image.name, source.source_id, str(error))
    height, width = image.shape[:2]
    masks = _checksums(source)  # before they are read: one that changes meanwhile differs the next time
    truth = read_truth(index, source, (height, width))
    files: dict[str, bytes] = {}
    entry: dict[str, Any] = {
        "id": source.id, "source_id": source.source_id, "height": height, "width": width, "licence": source.licence,
        "alternatives": truth.alternatives, "instances": truth.instances,
        "left_out": [asdict(fault) for fault in truth.faults],
    }
    if masks:
        entry["masks_sha256"] = masks
    if truth.instances:
        entry["image"] = f"images/{source.id}{source.image.suffix.lower()}"
        files[entry["image"]] = data
        entry["layers"] = [f"masks/{source.id}_{k}.png" for k in range(len(truth.layers))]
        files |= {name: _png(layer) for name, layer in zip(entry["layers"], truth.layers)}
        entry["degraded"] = []
        for kind in sorted(set(options.kinds)):
            for level in sorted(set(options.levels)):
                seed = file_seed(options.seed, source.id, kind, level)
                try:
                    degraded = degrade(image, kind, level, seed)
                except ValueError as error:
                    return Fault("image_degrade", source.image.name, source.source_id, str(error))
                name = f"lq/{kind}-{level}/{source.id}.png"
                files[name] = _png(cv2.cvtColor(degraded.image, cv2.COLOR_RGB2BGR))
                entry["degraded"].append(
                    {"kind": kind, "level": level, "seed": seed, "file": name, "parameters": degraded.parameters}
                )
    entry["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in files.items()
    }
    for name, content in files.items():
        write_file(out / name, content)
    return json.dumps(entry) + "\n"


def _png(image: np.ndarray[Any, Any]) -> bytes:
    done, data = cv2.imencode(".png", image)
    if not done:
        raise OSError("OpenCV could not encode a PNG")
    return data.tobytes()


def _pretty(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
