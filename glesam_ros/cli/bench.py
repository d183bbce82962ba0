"""`glesam bench`: how fast a model is on this machine, stage by stage."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.machine import load_frame, processor, quantiles, usable_cores
from glesam_ros.cli.options import MODEL_SETTINGS, SELECTION_SETTINGS, add_settings, open_pipeline, positive

if TYPE_CHECKING:
    from glesam_ros.pipeline import Pipeline
    from glesam_ros.validation import UInt8Array

SETTINGS = tuple(
    name for name in (*MODEL_SETTINGS, *SELECTION_SETTINGS) if not name.startswith(("enhance", "second_look"))
)
STAGES = ("encode", "finish", "enhance", "decode", "label map")
WARM_UP = 3

EPILOG = """\
examples:
  glesam bench                                    the default model on a photograph of 640x480
  glesam bench --image street.jpg --size 1280x720 --frames 100
  glesam bench --list                             models, and devices that can run them here
  glesam bench --json speed.json

stages: encode (image to embedding, degradation level), finish (the part of encode that an enhanced frame does without),
enhance (one-step latent restoration), decode (everything mode to instances), label map (instances to the mask image).
whole frame is an enhanced one, all but finish; not enhanced is all but enhance."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "bench", help="how fast a model is on this machine", epilog=EPILOG,
        description="Time a model stage by stage on a real photograph.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list models and devices instead")
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture to run on; default: one of the demo's")
    parser.add_argument("--size", type=_size, default=(640, 480), metavar="WxH", help="of the frame; default: 640x480")
    parser.add_argument("--frames", type=positive(int), default=50, metavar="N", help="timed frames; default: 50")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too; - is standard output")
    add_settings(parser, SETTINGS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Time the stages and print the table."""
    if args.list:
        return _list_models()
    if args.json is not None and str(args.json) != "-":
        args.json.open("a").close()  # what cannot be written is said before the minutes that it takes
    image = load_frame(args.image, args.size)
    pipeline = open_pipeline(args, SETTINGS)
    stages = time_stages(pipeline, image, args.frames)
    report = {
        "model": pipeline.model.name,
        "device": pipeline.model.device,
        "size": f"{args.size[0]}x{args.size[1]}",
        "processing_size": args.processing_size,
        "frames": args.frames,
        "stages_ms": {name: quantiles(values) for name, values in stages.items()},
        "fps": round(1000 / quantiles(stages["whole frame"])["median"], 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "weights_mb": round(weights_mb(pipeline.model.name, args.model), 2),
        "machine": f"{platform.machine()}, {processor()}, {usable_cores()} cores, Python {platform.python_version()}",
    }
    pipeline.close()
    if args.json is not None and str(args.json) == "-":
        print(json.dumps(report, indent=1))
        return 0
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def now() -> float:
    """Seconds, when all work that was given to a GPU through torch is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_stages(pipeline: Pipeline, image: UInt8Array, frames: int) -> dict[str, list[float]]:
    """Milliseconds of `STAGES`, of the whole frame and of one not enhanced, one value a frame, after a warm-up."""
    from glesam_ros.pipeline import budget

    model, allowed = pipeline.model, budget(pipeline.resolved)
    marks = []
    for _ in range(frames + WARM_UP):
        start = now()
        embedding = model.encode(image, allowed)
        encoded = now()
        embedding.finished()
        finished = now()
        embedding = model.enhance(embedding)
        enhanced = now()
        instances = pipeline.decode(embedding)
        decoded = now()
        instances.label_map()
        marks.append((start, encoded, finished, enhanced, decoded, now()))
    stages: dict[str, list[float]] = {}
    for number, name in enumerate(STAGES):
        stages[name] = [1000 * (mark[number + 1] - mark[number]) for mark in marks[WARM_UP:]]
    for name, left in (("whole frame", "finish"), ("not enhanced", "enhance")):
        parts = [stages[stage] for stage in STAGES if stage != left]
        stages[name] = [sum(frame) for frame in zip(*parts)]
    return stages


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    what = f"{report['model']} on {report['device']}"
    lines = [
        f"{what}, {report['size']}, processing size {report['processing_size'] or 'own'}, {report['frames']} frames",
        report["machine"],
        "",
        f"{'stage':<14}{'median ms':>10}{'p95 ms':>10}",
    ]
    lines += [f"{name:<14}{q['median']:>10.2f}{q['p95']:>10.2f}" for name, q in report["stages_ms"].items()]
    lines += ["", f"{report['fps']} FPS, peak memory {report['peak_rss_mb']} MB, weights {report['weights_mb']} MB"]
    return "\n".join(lines)


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def weights_mb(model: str, asked: str) -> float:
    """Size of the files of a model in MB (10^6 bytes), of all precisions; 0 for a model without files.

    Args:
        model: its name.
        asked: what it was loaded by: a registered name, a repository of Hugging Face or a folder.
    """
    from glesam_ros import models
    from glesam_ros.models.glesam import catalogue

    if model not in catalogue.model_names():
        shipped = Path(models.__file__).parent / "weights"
        files = list((shipped if asked in models.model_names() else Path(asked)).glob(f"{model}_*"))
    else:
        home, (base, _) = catalogue.home(), catalogue.split_name(model)
        files = [home / catalogue.BASES[base].source.path, *(home / model).glob("*.safetensors")]
        config = home / model / catalogue.CONFIG_FILE
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if fields.get("kind") == "lora":
            files += (home / fields["unet"] / "unet").glob("*.safetensors")
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


def _list_models() -> int:
    import onnxruntime

    from glesam_ros.models import model_names
    from glesam_ros.models.glesam.catalogue import BASES, ENHANCERS
    from glesam_ros.models.glesam.catalogue import model_names as full_size_names
    from glesam_ros.models.onnx_session import PROVIDERS

    # whether the driver plays along shows on loading
    available = onnxruntime.get_available_providers()
    print(f"{'device':<10}here")
    for device, provider in PROVIDERS.items():
        print(f"{device:<10}{'yes' if provider in available else f'no ({provider} is not in this onnxruntime)'}")
    print("\nmodels: " + ", ".join(sorted({*model_names()} - {*full_size_names()})))
    print(textwrap.fill(f"at full size: {', '.join(BASES)}", 100, subsequent_indent="  "))
    print(f"  each alone or with {', '.join(f'+{name}' for name in ENHANCERS)}, as {next(iter(BASES))}+glesam")
    print("  `glesam models` says which are here and gets the others")
    return 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, as 640x480, got {text!r}")
    return int(width), int(height)
