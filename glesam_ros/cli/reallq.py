"""`glesam reallq`: a set of real bad pictures: the worst frames of a recording to label, and their labels read back."""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import (
    VALUE_SETTINGS,
    CommandError,
    add_action,
    add_settings,
    not_negative,
    open_pipeline,
    positive,
    progress,
)
from glesam_ros.value_range import ValueRange

if TYPE_CHECKING:
    from glesam_ros.cli.bagfile import BagSource, Frame
    from glesam_ros.reallq import Recording, Shot
    from glesam_ros.validation import UInt8Array

SETTINGS = ("device", "precision")
LEVEL_MODEL = "nano"
"""Predicts the degradation level, as in the node's `quality`."""
NAMED_FAULTS = 20
"""So many faults of labels are printed; all are counted."""

EPILOG = """\
examples:
  glesam reallq pick drive --topic /front/image_raw --count 50 --out set --classes road wall person
  glesam reallq pick drive.mcap --out set --gap 5 --ade20k
  glesam reallq pick photos/ --out set                        a folder of pictures, classes of rass-nano
  labelme set/images/validation --labels set/classes.txt      labels are saved beside the pictures
  glesam reallq read set                                      LabelMe's shapes become annotations
  glesam reallq read set --labels cvat_export                 or CVAT's "Segmentation mask 1.1", or indexed PNGs
  glesam evaluate-semantic --data set --out report

measures of a frame, which manifest.json has, and what makes it worse:
  level        degradation that nano predicts, 0 (clear) .. 1            more of it
  sharpness    variance of the Laplacian over that of the picture        less of it
  brightness   mean luma, 0..255                                         less of it
  noise        grey levels, median of the finest diagonal wavelet        more of it
  clipped      share of black and white pixels                           more of it
  blockiness   contrast of the 8x8 grid of JPEG and video                more of it
score = 1 - product of (1 - weight * badness), 0 (clear) .. 1: one kind of badness is enough, further ones add to it.
The worst are taken first, none within --gap seconds of a worse one of its topic; frames without contrast never.
A run that was stopped goes on with the same command."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "reallq", help="pick the worst frames of a recording, read their labels", epilog=EPILOG,
        description="A set of real low-quality pictures in the RealLQ (ADE20K) layout.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    pick = add_action(actions, "reallq", "pick", "export the worst frames for labelling")
    pick.add_argument(
        "source", type=Path, metavar="IN", help="recorded bag (folder, .mcap, .db3 or .bag), or folder of pictures"
    )
    pick.add_argument("--out", type=Path, required=True, metavar="SET", help="new folder, or one to go on with")
    pick.add_argument(
        "--topic", nargs="+", action="extend", default=[], metavar="T", help="image topics; default: every camera"
    )
    pick.add_argument("--count", type=positive(int), default=50, metavar="N", help="how many frames; default: 50")
    pick.add_argument(
        "--gap", type=not_negative("a number of at least 0"), default=1.0, metavar="S",
        help="seconds between frames of a topic; default: 1.0",
    )
    pick.add_argument(
        "--measure", type=not_negative("a number of at least 0"), default=5.0, metavar="HZ",
        help="look at so many frames a second of each topic, 0 at all; default: 5",
    )
    pick.add_argument(
        "--rate", type=positive(float), default=1.0, metavar="HZ",
        help="pictures a second that a folder was taken with, for --gap; default: 1",
    )
    pick.add_argument(
        "--ros-distro", choices=("humble", "jazzy", "kilted"), default="jazzy",
        help="whose types a bag without definitions has; default: jazzy",
    )
    names = pick.add_mutually_exclusive_group()
    names.add_argument("--classes", nargs="+", metavar="NAME", help="classes to label, in the order of their labels")
    names.add_argument("--ade20k", action="store_true", help="the 150 classes of ADE20K")
    names.add_argument(
        "--semantic", default="rass-nano", metavar="MODEL", help="the classes of a semantic model; default: rass-nano"
    )
    pick.add_argument(
        "--force", action="store_true", help="pick anew where SET has other settings; never where it has labels"
    )
    add_settings(pick, (*SETTINGS, *VALUE_SETTINGS))
    pick.set_defaults(func=run_pick, usage_error=pick.error, model=LEVEL_MODEL, enhancement="off")
    read = add_action(actions, "reallq", "read", "read the labels back as annotations")
    read.add_argument("folder", type=Path, metavar="SET", help="what `glesam reallq pick` made")
    read.add_argument(
        "--labels", type=Path, metavar="DIR",
        help="NAME.json of LabelMe, NAME.png (0 unlabelled, 1..K), or CVAT's labelmap.txt and SegmentationClass/; "
        "default: LabelMe's files beside the pictures",
    )
    read.add_argument("--force", action="store_true", help="replace annotations that differ")
    read.set_defaults(func=run_read)


def run_pick(args: argparse.Namespace) -> int:
    """Pick; 1 when no frame could be used."""
    if not args.source.exists():
        raise CommandError(f"{args.source}: no such bag or folder")
    values = ValueRange.of(args)
    if args.source.is_dir() and not (args.source / "metadata.yaml").is_file():
        if args.topic:
            args.usage_error(f"--topic: expected a bag, got a folder of pictures: {args.source}")
        return _pick(args, PictureFolder(args.source, args.rate, values), rate=0.0)
    from glesam_ros.cli.bagfile import open_bag

    with open_bag(args.source, args.ros_distro) as source:
        topics, notes = source.image_topics(args.topic, "/glesam")
        for note in notes:
            print(f"glesam reallq: {note}", file=sys.stderr)
        return _pick(args, BagRecording(source, topics, values), args.measure)


def run_read(args: argparse.Namespace) -> int:
    """Read labels; 1 when something was wrong, each fault is named."""
    from glesam_ros.reallq import read_labels

    try:
        summary = read_labels(args.folder, args.labels, args.force, progress("picture"))
    except ValueError as error:
        raise CommandError(str(error)) from error
    for fault in summary.faults[:NAMED_FAULTS]:
        print(f"glesam reallq: {fault.file}: {fault.message}", file=sys.stderr)
    if len(summary.faults) > NAMED_FAULTS:
        print(f"glesam reallq: {len(summary.faults) - NAMED_FAULTS} more faults", file=sys.stderr)
    shares = sorted(((share, name) for name, share in summary.shares.items() if share), reverse=True)
    print(
        f"{len(summary.written) + len(summary.unchanged)} of {summary.pictures} pictures labelled, "
        f"{len(summary.written)} new; {100 * summary.unlabelled:.1f} % of their pixels unlabelled; "
        f"{', '.join(f'{name} {100 * share:.1f} %' for share, name in shares) or 'no class'}; "
        f"annotations in {args.folder}"
    )
    return 1 if summary.faults else 0


class BagRecording:
    """Frames of a bag's topics, for `pick`.

    Args:
        source: an open bag.
        topics: image topics.
        values: what is black and white of images of 16 bits or floats.
    """

    def __init__(self, source: BagSource, topics: Sequence[str], values: ValueRange) -> None:
        self.source = source
        self.values = values
        self.topics = list(topics)
        counts = {topic: sum(c.msgcount for c in source.connections if c.topic == topic) for topic in topics}
        self.total = sum(counts.values())
        reader = source.reader
        self.identity: dict[str, Any] = {
            "bag": source.path.name, "topics": counts, "start": reader.start_time, "end": reader.end_time,
        }
        _note_range(self.identity, values)

    def shots(self) -> Iterator[Shot]:
        """All messages of the topics, the bad ones too."""
        from glesam_ros.reallq import Shot

        for number, (_, _, frame) in enumerate(self.source.frames(self.topics, copy_all=False)):
            header = None if frame.message is None else frame.message.header
            stamp = None if header is None else header.stamp.sec * 10**9 + header.stamp.nanosec
            moment = stamp or frame.log_time  # some drivers leave the stamp empty
            yield Shot(
                number, frame.topic, frame.topic, f"{frame.topic}_{moment // 10**9}_{moment % 10**9:09d}",
                frame.log_time, stamp, "" if header is None else header.frame_id, _reader(frame, self.values),
            )


class PictureFolder:
    """Pictures of a folder by name, as if a camera had taken them one after the other, for `pick`.

    Args:
        folder: with pictures.
        rate: pictures a second.
        values: as of `BagRecording`.

    Raises:
        CommandError: there is none.
    """

    def __init__(self, folder: Path, rate: float, values: ValueRange) -> None:
        from glesam_ros.cli.pictures import find_pictures

        self.paths = [path for path, _ in find_pictures([folder])]
        self.rate = rate
        self.total = len(self.paths)
        files = hashlib.sha256()
        for path in self.paths:
            files.update(f"{path.name} {path.stat().st_size}\n".encode())
        self.identity: dict[str, Any] = {
            "folder": folder.resolve().name, "pictures": self.total, "names_and_sizes": files.hexdigest(), "rate": rate,
        }
        self.values = values
        _note_range(self.identity, values)

    def shots(self) -> Iterator[Shot]:
        """All files, those that are no picture too."""
        from glesam_ros.cli.pictures import read_picture
        from glesam_ros.reallq import Shot

        for number, path in enumerate(self.paths):
            moment = round(number * 1e9 / self.rate)
            read = functools.partial(read_picture, path, self.values)
            yield Shot(number, path.name, "", path.stem, moment, None, "", read)


def _note_range(identity: dict[str, Any], values: ValueRange) -> None:
    if not values.is_own:  # sets that were picked before there was a choice go on
        identity["values"] = values._asdict()


def _reader(frame: Frame, values: ValueRange) -> Callable[[], UInt8Array]:
    from glesam_ros.ros.conversions import message_to_rgb

    def read() -> UInt8Array:
        if frame.error:
            raise frame.error
        return message_to_rgb(frame.message, values)

    return read


def _pick(args: argparse.Namespace, recording: Recording, rate: float) -> int:
    from glesam_ros.reallq import PickOptions, pick

    classes, palette = _classes(args)
    options = PickOptions(args.count, args.gap, rate, classes, palette, LEVEL_MODEL)
    pipeline = open_pipeline(args, ("model", "enhancement", *SETTINGS))
    try:
        summary = pick(
            recording, args.out, options, lambda image: pipeline.encode(image).degradation, args.force,
            progress("frame"),
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    finally:
        pipeline.close()
    for message in summary.messages:
        print(f"glesam reallq: bad frame {message}", file=sys.stderr)
    bad = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.bad.items()))
    scores = [entry["score"] for entry in summary.pictures]
    span = f", score {scores[-1]:.2f} .. {scores[0]:.2f}" if scores else ""
    print(
        f"{len(scores)} of {summary.measured} frames picked{span}; without contrast: {summary.empty}; "
        f"bad frames: {bad or 'none'}; set in {args.out}"
    )
    if len(scores) < args.count:
        print(
            f"glesam reallq: fewer than {args.count}: there are no more frames {args.gap:g} s apart; "
            "a smaller --gap or a larger --measure finds more", file=sys.stderr,
        )
    if not scores:
        raise CommandError("no frame could be used")
    return 0


def _classes(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of the classes that the options ask for."""
    from glesam_ros.labelled import default_palette

    if args.classes:
        names, colours = tuple(args.classes), default_palette(len(args.classes))
    elif args.ade20k:
        from glesam_ros.ade20k import CLASSES, PALETTE

        names, colours = CLASSES, PALETTE
    else:
        from glesam_ros.semantic import load_semantic

        try:
            with load_semantic(args.semantic) as model:
                names, colours = model.classes, model.palette
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise CommandError(f"--semantic {args.semantic}: {error}; or name --classes") from error
    return names, tuple((int(r), int(g), int(b)) for r, g, b in colours)
