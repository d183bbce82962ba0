"""Picks the worst frames of a recording, spread over time, and lays them out for labelling.

Two passes: the first measures frames one by one and appends a line for each to measures.jsonl, the second writes the
frames that were chosen. No picture stays in memory, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2

from glesam_ros import __version__
from glesam_ros.lqseg.build import PART, Track, write_file
from glesam_ros.picture_files import encoded
from glesam_ros.reallq.quality import Level, Quality, measure, score, worst_measure
from glesam_ros.validation import UInt8Array

FORMAT = 1
"""Version of the layout."""
MANIFEST = "manifest.json"
MEASURES = "measures.jsonl"
CLASS_FILES = ("classes.json", "classes.txt")
IMAGES = Path("images", "validation")
ANNOTATIONS = Path("annotations", "validation")
LEAST_CONTRAST = 2.0
"""A frame whose luma deviates by less (grey levels) shows nothing to label: a closed lens, a white sky."""
NAMED_FRAMES = 5
"""So many bad frames are named for each reason; all are counted."""
NOT_READ = "not_read"
"""Reason of a bad frame that disk or memory failed for; the next run tries it again."""
LABELME_VERSION = "5.4.1"
"""Version of LabelMe whose file format the templates have."""


@dataclass(frozen=True)
class Shot:
    """One frame of a recording, not decoded yet.

    Attributes:
        number: its place in the recording, the same each time the recording is read.
        source: topic, or name of the file.
        group: frames of different groups may lie as close in time as they like: the topic, "" for a folder.
        name: what its picture will be called, without ending; made unique where it is not.
        time: nanoseconds, when it was recorded.
        stamp: nanoseconds, of its header; None where there is none.
        frame_id: of its header, "" where there is none.
        read: decodes it to (H, W, 3) uint8 RGB. Raises ValueError where it is no picture, with an attribute `reason`
            where it has a slug; OSError where the file cannot be read; MemoryError where it is too large.
    """

    number: int
    source: str
    group: str
    name: str
    time: int
    stamp: int | None
    frame_id: str
    read: Callable[[], UInt8Array]


class Recording(Protocol):
    """Where frames come from.

    Attributes:
        identity: JSON that tells this recording from another; no paths, it may move.
        total: how many shots there are.
    """

    identity: dict[str, Any]
    total: int

    def shots(self) -> Iterator[Shot]:
        """All shots in the order of recording, each time the same."""
        ...


@dataclass(frozen=True)
class PickOptions:
    """What to pick.

    Attributes:
        count: how many frames.
        gap: seconds that frames of one topic lie apart at least, 0 or more.
        rate: frames a second of each topic that are measured at most; 0 for all.
        classes: names for labelling, unique.
        palette: (K, 3) of 0..255, RGB of each class.
        model: name of the model that predicts the level.
    """

    count: int
    gap: float
    rate: float
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    model: str


@dataclass(frozen=True)
class PickSummary:
    """What was done.

    Attributes:
        pictures: entries of the manifest, worst first.
        measured: frames that were measured, those of an earlier run included.
        empty: frames among them without contrast, which are never picked.
        bad: frames that could not be read, by reason.
        messages: the first `NAMED_FRAMES` of each reason in words.
    """

    pictures: list[dict[str, Any]]
    measured: int
    empty: int
    bad: Counter[str]
    messages: list[str]


class _Candidate(NamedTuple):
    number: int
    group: str
    time: int
    score: float


def select(
    times: Sequence[int], scores: Sequence[float], groups: Sequence[str], count: int, gap: int
) -> list[int]:
    """Greedy non-maximum suppression in time: the worst first, none within `gap` of a worse one of its group.

    Args:
        times: of the frames, nanoseconds.
        scores: of as many frames; the higher, the worse. Of equal ones the earlier in the list comes first.
        groups: of as many frames.
        count: at most so many.
        gap: nanoseconds; exactly `gap` apart is far enough.

    Returns:
        Indices of the chosen frames, the highest score first; fewer than `count` where no more are far enough apart.
    """
    chosen: list[int] = []
    taken: dict[str, list[int]] = {}
    for k in sorted(range(len(times)), key=lambda k: -scores[k]):
        if len(chosen) == count:
            break
        near = taken.setdefault(groups[k], [])
        place = bisect.bisect(near, times[k])
        if any(abs(times[k] - other) < gap for other in near[max(0, place - 1) : place + 1]):
            continue
        near.insert(place, times[k])
        chosen.append(k)
    return chosen


def pick(
    recording: Recording, out: Path, options: PickOptions, level: Level, force: bool = False,
    track: Track = lambda items, total: items,
) -> PickSummary:
    """Pick the worst frames of `recording` into the set `out`, or go on with a run that was stopped.

    Args:
        recording: what to pick from.
        out: new or empty folder, or one of a run with the same options.
        options: what to pick.
        level: predicts the degradation level of a picture.
        force: pick anew over a set of other options; its measures are kept where they are of the same frames.
        track: shows the progress of measuring.

    Raises:
        ValueError: an option out of range, a folder with something else in it, one of other options without `force`,
            one with labels that `force` would lose, or the recording changed meanwhile.
        OSError: `out` cannot be written.
    """
    _check(options)
    measuring = _measuring(recording, options)
    settings = {
        "format": FORMAT, "measure": measuring, "count": options.count, "gap": options.gap,
        "classes": list(options.classes), "palette": [list(colour) for colour in options.palette],
    }
    _prepare(out, settings, force)
    bad: Counter[str] = Counter()
    messages: list[str] = []
    candidates, measured, empty = [], 0, 0
    for line in _measure_all(recording, out / MEASURES, measuring, options.rate, level, track):
        if "bad" in line:
            bad[line["bad"]] += 1
            if bad[line["bad"]] <= NAMED_FRAMES:
                messages.append(f"{line['source']} at {line['time'] / 1e9:.3f} s: {line['bad']}: {line['message']}")
            continue
        measured += 1
        if line["measures"]["contrast"] < LEAST_CONTRAST:
            empty += 1
        else:
            candidates.append(_Candidate(line["number"], line["group"], line["time"], line["score"]))
    order = select(
        [c.time for c in candidates], [c.score for c in candidates], [c.group for c in candidates], options.count,
        round(options.gap * 1e9),
    )
    chosen = {candidates[k].number: place for place, k in enumerate(order)}
    pictures = _write_pictures(recording, out, chosen)
    _write_classes(out, options)
    (out / ANNOTATIONS).mkdir(parents=True, exist_ok=True)
    write_file(out / MANIFEST, _pretty({"settings": settings, "complete": True, "pictures": pictures}))
    return PickSummary(pictures, measured, empty, bad, messages)


def template(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """LabelMe's file of a picture without shapes.

    Args:
        name: of the picture file beside it.
        size: (height, width) in pixels.
    """
    return {
        "version": LABELME_VERSION, "flags": {}, "shapes": [], "imagePath": name, "imageData": None,
        "imageHeight": size[0], "imageWidth": size[1],
    }


def _check(options: PickOptions) -> None:
    if options.count < 1:
        raise ValueError(f"count: expected at least 1, got {options.count}")
    for name in ("gap", "rate"):
        value = getattr(options, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected at least 0, got {value}")
    twice = sorted({name for name in options.classes if options.classes.count(name) > 1})
    if not options.classes or twice:
        raise ValueError(f"classes: expected at least one name, each once, got {', '.join(twice) or 'none'}")
    if len(options.palette) != len(options.classes):
        raise ValueError(f"palette: expected {len(options.classes)} colours, got {len(options.palette)}")


def _measuring(recording: Recording, options: PickOptions) -> dict[str, Any]:
    """All that the lines of measures.jsonl depend on."""
    return {
        "version": __version__, "recording": recording.identity, "rate": options.rate, "model": options.model,
    }


def _prepare(out: Path, settings: dict[str, Any], force: bool) -> None:
    """Make the folder ready for these settings.

    Raises:
        ValueError: something else lies there.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / MANIFEST
    if not manifest.exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name != MANIFEST + PART)
        if foreign:
            raise ValueError(f"{out}: expected an empty folder or an earlier set, found {foreign[0]}")
        write_file(manifest, _pretty({"settings": settings, "complete": False, "pictures": []}))
        return
    document = read_manifest(out)
    earlier = document["settings"]
    changed = [
        f"{name} was {_short(earlier.get(name))}, is {_short(settings.get(name))}"
        for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)
    ]
    if not changed:
        return
    if not force:
        raise ValueError(f"{out}: picked with other settings: {'; '.join(changed)}; take another --out, or --force")
    labelled = [path for path in sorted((out / IMAGES).glob("*.json")) if _has_shapes(path)]
    labelled += sorted((out / ANNOTATIONS).glob("*.png"))
    if labelled:
        raise ValueError(f"{out}: expected no labels to pick anew, found {labelled[0].name}; take another --out")
    for path in sorted((out / IMAGES).glob("*")):
        if path.suffix in (".png", ".json", PART):
            path.unlink()
    for name in CLASS_FILES:
        (out / name).unlink(missing_ok=True)
    write_file(manifest, _pretty({"settings": settings, "complete": False, "pictures": []}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a set.

    Raises:
        ValueError: it is none, or of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder}: expected a set that `glesam reallq pick` made, found no {MANIFEST}")
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        version = document["settings"]["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the manifest of a set that glesam reallq picked") from error
    if version != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {version}; pick into another folder")
    return document


def _has_shapes(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes())["shapes"])
    except (ValueError, KeyError, TypeError):
        return True  # not ours, so not to be thrown away


def _measure_all(
    recording: Recording, path: Path, header: dict[str, Any], rate: float, level: Level, track: Track
) -> Iterator[dict[str, Any]]:
    """Lines of measures.jsonl, one for each frame looked at; those of an earlier run are not measured again."""
    known = _known_lines(path, header)
    slots: dict[str, int] = {}
    with path.open("a", encoding="utf-8") as journal:
        for shot in track(recording.shots(), recording.total):
            slot = int(shot.time / 1e9 * rate) if rate else shot.number
            if slots.get(shot.group) == slot:
                continue
            if shot.number in known:
                line = json.loads(known[shot.number])
            else:
                line = _measure_one(shot, level)
                if line.get("bad") != NOT_READ:
                    journal.write(json.dumps(line) + "\n")
                    journal.flush()
            if "bad" not in line:  # a bad frame does not take the place of a good one
                slots[shot.group] = slot
            yield line


def _measure_one(shot: Shot, level: Level) -> dict[str, Any]:
    line: dict[str, Any] = {
        "number": shot.number, "source": shot.source, "group": shot.group, "time": shot.time,
    }
    try:
        quality = measure(shot.read(), level)
    except ValueError as error:
        return {**line, "bad": getattr(error, "reason", "unreadable"), "message": str(error)}
    except (OSError, MemoryError) as error:
        return {**line, "bad": NOT_READ, "message": str(error) or "out of memory"}
    return {**line, "score": score(quality), "worst": worst_measure(quality), "measures": asdict(quality)}


def _known_lines(path: Path, header: dict[str, Any]) -> dict[int, str]:
    """Lines of an earlier run by number, if it measured the same; leaves the file with whole lines only."""
    first = json.dumps(header) + "\n"
    known: dict[int, str] = {}
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            if next(lines, "") == first:
                known = {number: line for line in lines if (number := _number_of(line)) is not None}
    write_file(path, (first + "".join(known.values())).encode())
    return known


def _number_of(line: str) -> int | None:
    """Number of the frame of a line; None when the line was cut or changed."""
    try:
        entry = json.loads(line)
        whole = line.endswith("\n") and ("message" in entry if "bad" in entry else bool(Quality(**entry["measures"])))
        return int(entry["number"]) if whole else None
    except (ValueError, KeyError, TypeError):
        return None


def _write_pictures(recording: Recording, out: Path, chosen: dict[int, int]) -> list[dict[str, Any]]:
    """The second pass: writes the frames `chosen` (number -> place); their manifest entries by place."""
    lines = {}
    with (out / MEASURES).open(encoding="utf-8") as journal:
        next(journal)  # what they depend on
        for line in map(json.loads, journal):
            if line["number"] in chosen:
                lines[line["number"]] = line
    entries: list[dict[str, Any]] = [{}] * len(chosen)
    names: set[str] = set()
    missing = set(chosen)
    for shot in recording.shots():
        if not missing:
            break
        if shot.number not in missing:
            continue
        missing.discard(shot.number)
        try:
            image, line = shot.read(), lines[shot.number]
        except (ValueError, OSError) as error:
            raise ValueError(f"{shot.source}: expected to read it as before, got: {error}; pick again") from error
        name = file_name(shot.name, names)
        picture, label = out / IMAGES / f"{name}.png", out / IMAGES / f"{name}.json"
        data = encoded(picture, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if not picture.exists() or picture.read_bytes() != data:
            write_file(picture, data)
        size = (int(image.shape[0]), int(image.shape[1]))
        if not label.exists():  # it may have shapes by now
            write_file(label, _pretty(template(picture.name, size)))
        entries[chosen[shot.number]] = {
            "name": name, "source": shot.source, "number": shot.number, "stamp": shot.stamp, "recorded": shot.time,
            "frame_id": shot.frame_id, "height": size[0], "width": size[1], "score": line["score"],
            "worst": line["worst"], "measures": line["measures"], "sha256": hashlib.sha256(data).hexdigest(),
        }
    if missing:
        raise ValueError(f"expected the same recording in both passes, frame {min(missing)} is gone; pick again")
    return entries


def file_name(name: str, taken: set[str]) -> str:
    """`name` with letters, digits, "_" and "-" only, and not yet in `taken`, to which it is added."""
    base = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_") or "frame"
    unique, number = base, 1
    while unique in taken:
        number += 1
        unique = f"{base}_{number}"
    taken.add(unique)
    return unique


def _write_classes(out: Path, options: PickOptions) -> None:
    """Write the class files that are not there; a class may have been appended while labelling."""
    document = {"classes": list(options.classes), "palette": [list(colour) for colour in options.palette]}
    names = "".join(f"{name}\n" for name in options.classes)
    for file, data in zip(CLASS_FILES, (_pretty(document), names.encode())):
        if not (out / file).exists():
            write_file(out / file, data)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pretty(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
