"""`glesam export`: a full-size model as ONNX graphs for TensorRT and CUDA, compared with torch on pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import CommandError

if TYPE_CHECKING:
    from glesam_ros.validation import UInt8Array

TOLERANCES = {"fp32": 1e-3, "fp16": 0.05}
"""Largest mean difference that passes, of each output; see `--tolerance`."""
PICTURES = 4
"""Pictures of a folder that are compared on."""

EPILOG = """\
examples:
  glesam export sam2.1_hiera_tiny+glesam                       into the folder of the model, compared on the CPU
  glesam export sam2.1_hiera_tiny+glesam --fp16 --device tensorrt      for TensorRT: half the bytes, engines built
  glesam export sam_vit_b --size 512 --images night/ --out graphs
  ros2 launch glesam_ros perception.launch.py model:=sam2.1_hiera_tiny+glesam device:=tensorrt

Opset 18; the side of the square input is fixed, prompts are dynamic. TensorRT computes in fp16, but MobileSAM, whose
output in fp16 others found wrong, in fp32, unless --precision says otherwise; its engines are cached beside the graphs.
What it makes of a graph depends on the GPU: compare on the robot itself, with --device tensorrt. With --fp16 the graphs
themselves are in fp16: TensorRT needs that with +glesam and +glesam++, whose U-Net is larger than its 2 GB in float32.
The comparison gives both the same inputs stage by stage: the largest and the mean absolute difference, of latents and
logits as a share of their deviation."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "export", help="full-size model to ONNX and TensorRT", epilog=EPILOG,
        description="Export a full-size model to ONNX and compare it with torch on pictures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="for example sam2.1_hiera_tiny+glesam")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the graphs; default: the model's own")
    parser.add_argument("--size", type=int, default=1024, metavar="PX", help="side of the square input; default: 1024")
    parser.add_argument("--fp16", action="store_true", help="graphs that compute in fp16, in half the bytes")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="PATH", help="pictures or folders to compare on; default: the demo's"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "tensorrt"), default="cpu", help="of onnxruntime, to compare; default: cpu"
    )
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "fp16"), default="auto",
        help="of onnxruntime; auto: fp16 with TensorRT (MobileSAM: fp32), else that of the graphs",
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help=f"largest mean difference that passes; default: {TOLERANCES['fp32']}, in fp16 {TOLERANCES['fp16']}",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Export and compare; 1 when the graphs differ from torch by more than the tolerance."""
    from glesam_ros.models.glesam import catalogue

    if args.name == "nano":
        raise CommandError("nano needs none: its graphs ship with the package, those of a run glesam train writes")
    try:
        name = catalogue.own_name(args.name)
        catalogue.split_name(name)
    except ValueError as error:
        raise CommandError(str(error)) from error
    images = _pictures(args.images)

    from glesam_ros.models.glesam import onnx_export, onnx_runtime
    from glesam_ros.models.glesam.base import SIDE_MULTIPLE
    from glesam_ros.models.glesam.model import load_parts
    from glesam_ros.models.glesam.runtime import TorchRuntime, choose_device, choose_precision

    if args.size <= 0 or args.size % SIDE_MULTIPLE:
        raise CommandError(f"--size: expected a multiple of {SIDE_MULTIPLE}, got {args.size}")
    home = catalogue.home()
    out = args.out or onnx_runtime.export_folder(name, home)
    try:
        manifest = onnx_export.export_model(name, *load_parts(name, home), out, args.size, args.fp16)
        base, enhancer = load_parts(name, home)  # the export took the first ones over
        theirs = onnx_runtime.open_onnx_runtime(name, args.device, args.precision, out, base=base)
        place = choose_device("cpu")
        ours = TorchRuntime(base, enhancer, place, choose_precision("fp32", place))
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    size = sum((out / file).stat().st_size for file in manifest.files) / 1e6
    files = f"{len(manifest.files)} files, {size:.0f} MB"
    print(f"{name} in {out}: {files}, side {manifest.side}, opset {manifest.opset}")
    rows = onnx_export.compare(ours, theirs, images, args.size)
    print(f"\n{theirs.device} against {ours.device}, {len(images)} pictures")
    print(f"\n{'output':<20}{'largest':>12}{'mean':>12}")
    for row in rows:
        print(f"{row.output:<20}{row.largest:>12.2e}{row.mean:>12.2e}")
    fp16 = "fp16" in theirs.device
    tolerance = args.tolerance if args.tolerance is not None else TOLERANCES["fp16" if fp16 else "fp32"]
    apart = [row.output for row in rows if not row.mean <= tolerance]
    if apart:
        hint = "try without --fp16, or --precision fp32" if fp16 else "please report it with this table"
        print(
            f"glesam export: error: {', '.join(apart)}: expected a mean difference of at most {tolerance:g}; do not "
            f"use the graphs in {out}; {hint}", file=sys.stderr,
        )
        return 1
    return 0


def _pictures(paths: list[Path] | None) -> list[UInt8Array]:
    """Pictures (H, W, 3) uint8 RGB, the demo's where none are named; the first few of a folder."""
    from glesam_ros.cli.machine import demo_photograph
    from glesam_ros.cli.pictures import read_picture
    from glesam_ros.picture_files import SUFFIXES

    named = [demo_photograph().parent] if paths is None else paths
    found = []
    for path in named:
        files = sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        for file in files[:PICTURES]:
            try:
                found.append(read_picture(file))
            except ValueError as error:
                raise CommandError(f"{file}: {error}") from error
    if not found:
        raise CommandError(f"expected pictures, found none in {', '.join(map(str, named))}")
    return found
