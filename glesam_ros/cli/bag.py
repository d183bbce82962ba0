"""`glesam bag`: a recorded bag in, the bag with result topics out; or a bag made of pictures."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import (
    MODEL_SETTINGS,
    SELECTION_SETTINGS,
    VALUE_SETTINGS,
    CommandError,
    add_settings,
    degradation,
    open_pipeline,
    opened,
    positive,
    seed,
)
from glesam_ros.cli.result_topics import ALL_RESULTS, RESTORER_RESULTS, RESULTS, SEMANTIC_RESULTS
from glesam_ros.cli.stopping import stop_code
from glesam_ros.settings import OFF
from glesam_ros.value_range import ValueRange

if TYPE_CHECKING:
    from glesam_ros.cli.bagfile import BagSource, Frame, ResultWriter, Tally
    from glesam_ros.semantic import Restorer, SemanticSegmenter
    from glesam_ros.validation import UInt8Array

SETTINGS = (*VALUE_SETTINGS, *MODEL_SETTINGS, "semantic", "restorer", *SELECTION_SETTINGS, "overlay_alpha")
NAMESPACE = re.compile(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)
"""Names that ROS takes, joined by /."""
NAMED_FRAMES = 5
"""So many bad frames are named for each reason; all are counted."""

EPILOG = """\
examples:
  glesam bag drive --out drive_masks                          all cameras of a recorded bag (folder, .mcap or .db3)
  glesam bag drive --out masks --topic /front/image_raw --results-only
  glesam bag drive --out classes --semantic rass-nano         also the class of every pixel
  glesam bag old.bag --out new --storage sqlite3              a ROS 1 bag becomes a ROS 2 bag
  glesam bag --from-images photos --rate 30 --out film        pictures become a bag
  glesam bag --from-images photos --rate 30 --out dark --degrade low_light --level 2

result topics, with the header and the recording time of their picture:
  /glesam/masks       sensor_msgs/Image mono16, the value is the instance id, 0 background
  /glesam/confidence  sensor_msgs/Image 32FC1, 0..1
  /glesam/overlay     sensor_msgs/Image bgr8, for people
  /glesam/detections  vision_msgs/Detection2DArray, id = value in masks
  /glesam/quality     vision_msgs/Classification, degradation 0..1 and whether enhancement ran
with --semantic:
  /glesam/semantic             sensor_msgs/Image mono8 (beyond 256 classes mono16), the value is the class
  /glesam/semantic/confidence  sensor_msgs/Image 32FC1, 0..1
  /glesam/semantic/label_info  vision_msgs/LabelInfo, once: names of the classes; detections have the class as second
                               hypothesis, the overlay its colours
with --restorer:
  /glesam/enhanced    sensor_msgs/Image rgb8, the picture restored
with several cameras /glesam/<image topic>/masks and so on.
Play it with `ros2 bag play drive_masks`, or open it in Foxglove.
Bad frames are named and counted by reason; exit code 1 only when no frame could be used, or where the bag breaks off:
what came before that stays."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "bag", help="result topics for a recorded bag, or a bag made of pictures", epilog=EPILOG,
        description="Segment the cameras of a recorded bag (mcap, sqlite3, ROS 1) and write a bag that RViz and "
        "Foxglove play. Needs no ROS.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", nargs="?", type=Path, metavar="IN", help="recorded bag: folder, .mcap, .db3 or .bag")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the new bag; must not exist")
    parser.add_argument(
        "--topic", action="append", default=[], metavar="T",
        help="image topic to segment, repeat for more; default: every camera in the bag (with --from-images: the topic "
        "to write, default /camera/image_raw)",
    )
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="of the new bag; default: mcap")
    parser.add_argument(
        "--ros-distro", choices=("humble", "jazzy", "kilted"), default="jazzy",
        help="distribution that shall play the bag, and whose types a bag without definitions has; default: jazzy",
    )
    parser.add_argument("--results-only", action="store_true", help="leave the messages of IN out")
    parser.add_argument(
        "--result", action="append", choices=tuple(ALL_RESULTS), default=[],
        help="write this result, repeat for more; default: all that the models give",
    )
    parser.add_argument("--namespace", default="/glesam", metavar="NS", help="of the result topics; default: /glesam")
    pictures = parser.add_argument_group("a bag made of pictures")
    pictures.add_argument("--from-images", type=Path, metavar="FOLDER", help="instead of IN: pictures, sorted by name")
    pictures.add_argument(
        "--rate", type=positive(float), default=30.0, metavar="HZ", help="pictures a second; default: 30"
    )
    pictures.add_argument("--compressed", action="store_true", help="write CompressedImage (JPEG) instead of Image")
    pictures.add_argument(
        "--degrade", type=degradation, metavar="NAME",
        help="make the pictures worse: low_light, rain, fog, motion_blur, lq, ...; a wrong name is answered with all",
    )
    pictures.add_argument("--level", type=int, choices=(1, 2, 3), default=2, help="how much worse; default: 2")
    pictures.add_argument("--seed", type=seed, default=0, metavar="N", help="of the degradation; default: 0")
    add_settings(parser, SETTINGS)
    parser.set_defaults(func=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Segment a bag, or make one of pictures."""
    if (args.bag is None) == (args.from_images is None):
        args.usage_error("expected either a bag IN or --from-images FOLDER")
    return _segment_bag(args) if args.from_images is None else _bag_of_pictures(args)


def _segment_bag(args: argparse.Namespace) -> int:
    from glesam_ros.cli.bagfile import ResultWriter, new_bag, open_bag

    below = args.namespace.strip("/")
    if below and not NAMESPACE.fullmatch(below):
        args.usage_error(
            f"--namespace {args.namespace!r}: expected names of letters, digits and _ that begin with no digit, "
            "joined by /"
        )
    namespace = f"/{below}" if below else ""
    offered = dict(RESULTS)
    for option, added in (("semantic", SEMANTIC_RESULTS), ("restorer", RESTORER_RESULTS)):
        if getattr(args, option) != OFF:
            offered |= added
        elif asked := [name for name in args.result if name in added]:
            args.usage_error(f"--result {asked[0]}: expected --{option} NAME with it, got none")
    with open_bag(args.bag, args.ros_distro) as source:
        topics, notes = source.image_topics(args.topic, namespace)
        copied = []
        for connection in source.connections if not args.results_only else ():
            if source.known(connection):
                copied.append(connection)
            else:
                notes.append(f"{connection.topic}: not copied, the bag does not define {connection.msgtype}")
        taken = {f"{namespace}/{name}" if len(topics) == 1 else f"{namespace}{topic}/{name}"
                 for topic in topics for name in ALL_RESULTS}
        for connection in [c for c in copied if c.topic in taken]:
            copied.remove(connection)
            notes.append(f"{connection.topic}: not copied, the new results take its place")
        for note in notes:
            print(f"glesam bag: {note}", file=sys.stderr)
        with new_bag(args.out, args.storage, args.ros_distro) as writer:
            pipeline = open_pipeline(args, SETTINGS)
            segmenter, restorer = _open_beside(args)
            copy = source.copier(writer, copied) if copied else None
            results = ResultWriter(
                writer, pipeline, topics, source.types, namespace, args.result or tuple(offered), segmenter, restorer
            )
            code = _go_through(source, results, topics, {(c.id, id(c.owner)) for c in copied}, copy)
        for model in (pipeline, segmenter, restorer):
            if model is not None:
                model.close()
    return _report(args.out, topics, results, code)


def _open_beside(args: argparse.Namespace) -> tuple[SemanticSegmenter | None, Restorer | None]:
    """The semantic model and the restorer, None where off."""
    from glesam_ros.semantic import device_beside, load_restorer, load_semantic

    device = device_beside(args.device)
    segmenter = opened(load_semantic, args.semantic, device) if args.semantic != OFF else None
    restorer = opened(load_restorer, args.restorer, device) if args.restorer != OFF else None
    return segmenter, restorer


def _go_through(source: BagSource, results: ResultWriter, topics: list[str], copied: set[Any], copy: Any) -> int:
    """Copy and segment; the exit code: 130 or 143 where it was stopped, 1 where the bag breaks off."""
    from tqdm import tqdm

    from glesam_ros.cli.bagfile import BagBreaksOff

    total = sum(c.msgcount for c in source.connections if copied or c.topic in topics)
    with tqdm(total=total, unit="msg", disable=None) as bar:
        try:
            for connection, raw, frame in source.frames(topics, copy_all=bool(copied)):
                if (connection.id, id(connection.owner)) in copied:
                    fault = copy(connection, frame.log_time, raw)
                    if fault and frame.topic not in topics:  # a frame is named below
                        _name_uncopied(frame, fault, results.tally)
                if frame.topic in topics:
                    _segment(frame, results)
                bar.update()
        except KeyboardInterrupt as stop:
            return stop_code(stop)
        except BagBreaksOff as error:
            tqdm.write(f"glesam bag: {error}", file=sys.stderr)
            return 1
    return 0


def _name_uncopied(frame: Frame, fault: str, tally: Tally) -> None:
    from tqdm import tqdm

    tally.not_copied += 1
    if tally.not_copied <= NAMED_FRAMES:
        tqdm.write(
            f"glesam bag: not copied {frame.topic} at {frame.log_time / 1e9:.3f} s: {fault}", file=sys.stderr
        )


def _segment(frame: Frame, results: ResultWriter) -> None:
    """Segment one frame; a bad one is named, unless there were many of its kind."""
    from tqdm import tqdm

    fault = results.segment(frame)
    if fault is not None and results.tally.bad[fault.reason] <= NAMED_FRAMES:
        text = f"glesam bag: bad frame {frame.topic} at {frame.log_time / 1e9:.3f} s: {fault.reason}: {fault}"
        tqdm.write(text, file=sys.stderr)


def _report(out: Path, topics: list[str], results: ResultWriter, code: int) -> int:
    import numpy as np

    tally = results.tally
    speed = ""
    if tally.seconds:
        median, slow = 1000 * np.percentile(tally.seconds, [50, 95])
        speed = f", {median:.0f} ms a frame (p95 {slow:.0f} ms)"
    bad = ", ".join(f"{reason} {count}" for reason, count in sorted(tally.bad.items()))
    print(
        f"{len(tally.seconds)} of {tally.frames} frames of {', '.join(topics)}, {tally.instances} instances{speed}; "
        f"bad frames: {bad or 'none'}; {f'{tally.not_copied} other messages not copied; ' if tally.not_copied else ''}"
        f"{'stopped early, ' if code else ''}bag in {out}"
    )
    if code:
        return code
    if not tally.seconds:
        raise CommandError("no frame could be used")
    return 0


def _bag_of_pictures(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from glesam_ros.cli.bagfile import write_pictures
    from glesam_ros.cli.pictures import FAILURES, find_pictures, read_picture, say_skipped

    if len(args.topic) > 1:
        args.usage_error(f"--topic: expected one topic with --from-images, got {len(args.topic)}")
    if not args.from_images.is_dir():
        raise CommandError(f"{args.from_images}: expected a folder of pictures")
    paths = [path for path, _ in find_pictures([args.from_images])]
    values, failures = ValueRange.of(args), 0

    def pictures() -> Iterator[UInt8Array]:
        nonlocal failures
        for number, path in enumerate(tqdm(paths, unit="picture", disable=None)):
            try:
                image = _degraded(read_picture(path, values), args, number)
            except FAILURES as error:
                failures += 1
                say_skipped("bag", path, error)
                continue
            yield image

    topic = args.topic[0] if args.topic else "/camera/image_raw"
    count = write_pictures(
        args.out, pictures(), args.rate, topic, args.storage, args.ros_distro, compressed=args.compressed
    )
    print(f"{count} of {len(paths)} pictures at {args.rate:g} Hz; bag in {args.out}")
    return 1 if failures else 0


def _degraded(image: UInt8Array, args: argparse.Namespace, number: int) -> UInt8Array:
    if args.degrade is None:
        return image
    from glesam_ros.degradation import degrade

    return degrade(image, args.degrade, args.level, args.seed, frame=number).image
