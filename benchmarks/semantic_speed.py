"""A semantic model on one frame: network, labels and confidence, the whole call, and what the node makes of the map.

Wall and CPU milliseconds; on a busy machine only the latter say something.

    python benchmarks/semantic_speed.py --size 640x480
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2

from glesam_ros import load_pipeline, load_semantic
from glesam_ros.cli.machine import load_frame, processor, quantiles, usable_cores
from glesam_ros.models.rass_nano import RassNano
from glesam_ros.overlay import draw_classes
from glesam_ros.semantic import SemanticSegmenter, class_of_instances, labels_of_logits


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rass-nano", help="registered name; default: rass-nano")
    parser.add_argument("--weights", type=Path, help="folder with other weights of rass-nano")
    parser.add_argument("--size", default="640x480", help="of the frame; default: 640x480")
    parser.add_argument("--frames", type=int, default=100, help="timed frames; default: 100")
    parser.add_argument("--threads", type=int, default=2, help="of rass-nano and OpenCV; default: 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image", type=Path, help="picture; default: a photograph of the demo")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    width, height = (int(side) for side in args.size.split("x"))
    cv2.setNumThreads(args.threads)
    image = load_frame(args.image, (width, height))
    if args.model == RassNano.name:
        segmenter = SemanticSegmenter(RassNano(args.device, weights=args.weights, threads=args.threads))
    else:
        segmenter = load_semantic(args.model, args.device)
    instances = load_pipeline("nano").segment(image)

    logits, found = segmenter.model.logits(image), segmenter.segment(image)
    steps: dict[str, Callable[[], Any]] = {
        "network": lambda: segmenter.model.logits(image),
        "labels and confidence": lambda: labels_of_logits(logits, (height, width), len(segmenter.classes)),
        "whole call: segment": lambda: segmenter.segment(image),
        f"classes of {len(instances)} instances": lambda: class_of_instances(instances, found),
        "class colours": lambda: draw_classes(image, found),
    }
    rows = {name: measure(step, args.frames) for name, step in steps.items()}
    print(
        f"{segmenter.name} on {segmenter.device}, {len(segmenter.classes)} classes, {args.size}, {args.frames} frames, "
        f"{args.threads} threads\n{processor()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}\n\n"
        f"{'':<26}{'median ms':>11}{'p95 ms':>9}{'CPU ms':>9}"
    )
    for name, row in rows.items():
        print(f"{name:<26}{row['median']:>11.2f}{row['p95']:>9.2f}{row['cpu']:>9.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps({"model": segmenter.name, "size": args.size, "ms": rows}, indent=1) + "\n")
    return 0


def measure(step: Callable[[], Any], frames: int) -> dict[str, float]:
    """Median and 95th percentile of wall milliseconds, median of CPU milliseconds; five frames warm up."""
    wall, cpu = [], []
    for _ in range(frames + 5):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        wall.append(1000 * (time.perf_counter() - start))
        cpu.append(1000 * (time.process_time() - cpu_start))
    return {**quantiles(wall[5:]), "cpu": quantiles(cpu[5:])["median"]}


if __name__ == "__main__":
    sys.exit(main())
