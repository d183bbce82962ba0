"""Nano next to the image encoder of SAM 2.1 tiny: same machine, same run, taking turns.

SAM 2.1 tiny has random weights here: its time does not depend on them. It gets the 1024x1024 that it is made for, nano
the camera frame, which it scales by itself. CPU ms is the time of all threads together; unlike the wall clock it hardly
changes when other programs want the cores, too. Needs the `sam2` package, see benchmarks/README.md.

    python benchmarks/encoder_vs_sam2.py --rounds 10
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from the checkout, beside an environment with torch

import cv2
import torch
from sam2.build_sam import build_sam2

from glesam_ros import load_pipeline
from glesam_ros.cli.machine import load_frame, processor, quantiles, usable_cores
from glesam_ros.pipeline import budget

SAM2_SIDE = 1024
NANO_FRAMES = 10
"""Frames of nano for each run of the SAM 2 encoder, so that both get about the same time."""


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of the SAM 2 encoder; default: 10")
    parser.add_argument("--threads", type=int, default=2, help="threads of both; default: 2")
    parser.add_argument("--image", type=Path, help="picture; default: a photograph of the demo")
    parser.add_argument("--processing-size", type=int, default=512, help="of nano; default: 512")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    limit_cores(args.threads)
    frame = load_frame(args.image, (640, 480))
    pipeline = load_pipeline("nano", device="cpu", enhancement="always", processing_size=args.processing_size)
    encoder = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", ckpt_path=None, device="cpu").image_encoder
    batch = torch.randn(1, 3, SAM2_SIDE, SAM2_SIDE, generator=torch.Generator().manual_seed(0))

    def sam2() -> None:
        with torch.inference_mode():
            encoder(batch)

    steps: dict[str, tuple[Callable[[], Any], int]] = {
        "SAM 2.1 tiny, image encoder alone, 1024x1024": (sam2, 1),
        "nano, encoder alone, 640x480": (
            lambda: pipeline.model.encode(frame, budget(pipeline.settings)).finished(), NANO_FRAMES
        ),
        "nano, whole frame (encode, enhance, everything masks)": (
            lambda: pipeline.segment(frame), NANO_FRAMES
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, (step, repeats) in steps.items():
            for _ in range(repeats):
                start, cpu_start = time.perf_counter(), time.process_time()
                step()
                if number:  # the first round warms up
                    times[name].append(1000 * (time.perf_counter() - start))
                    cpu_times[name].append(1000 * (time.process_time() - cpu_start))
    medians = {name: quantiles(values) for name, values in times.items()}
    cpu = {name: quantiles(values)["median"] for name, values in cpu_times.items()}
    reference, alone, whole = (m["median"] for m in medians.values())
    cpu_reference, cpu_alone, cpu_whole = cpu.values()
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    report = {
        "machine": f"{processor()}, {usable_cores()} cores, {args.threads} threads",
        "torch": torch.__version__,
        "sam2_encoder_parameters_millions": round(parameters, 1),
        "sam2_weights": "random",
        "instances_of_nano": len(pipeline.segment(frame)),
        "ms": medians,
        "cpu_ms": cpu,
        "ratio_encoder_alone": round(reference / alone, 1),
        "ratio_whole_frame": round(reference / whole, 1),
        "cpu_ratio_encoder_alone": round(cpu_reference / cpu_alone, 1),
        "cpu_ratio_whole_frame": round(cpu_reference / cpu_whole, 1),
    }
    print(f"{report['machine']}, torch {torch.__version__}; SAM 2.1 tiny encoder: {parameters:.1f} M parameters, "
          f"random weights\n\n{'':<55}{'median ms':>10}{'p95 ms':>10}{'ratio':>7}{'CPU ms':>10}{'ratio':>7}")
    for name, q in medians.items():
        print(f"{name:<55}{q['median']:>10.1f}{q['p95']:>10.1f}{reference / q['median']:>7.1f}"
              f"{cpu[name]:>10.1f}{cpu_reference / cpu[name]:>7.1f}")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def limit_cores(count: int) -> None:
    """Bind this process to `count` of its cores, where the system can; onnxruntime follows that."""
    import os

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


if __name__ == "__main__":
    sys.exit(main())
