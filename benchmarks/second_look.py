"""What the second look of nano costs: prompted frames with it, without it, and frames of everything mode, in turns.

    python benchmarks/second_look.py --frames 25

The frame is a photograph of the demo at LQ-3, 640x480, and enhanced; the prompt is one object under three points.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from glesam_ros.cli.machine import load_frame, processor, quantiles, usable_cores  # first: OpenBLAS on one thread
from glesam_ros.degradation import degrade
from glesam_ros.pipeline import load_pipeline

WARM_UP = 3
PROMPT = {"points": [[300, 220], [320, 240], [340, 260]], "labels": [1, 1, 1]}


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=25, help="timed frames of each; default: 25")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    image = degrade(load_frame(None, (640, 480)), "lq", 3, seed=0).image
    pipeline = load_pipeline("nano", enhancement="always")
    ways = {"one look": (False, PROMPT), "two looks": (True, PROMPT), "everything mode": (True, {})}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.frames + WARM_UP):
        for name, (second_look, prompt) in ways.items():
            pipeline.settings = pipeline.settings.replace(second_look=second_look)
            start = time.perf_counter()
            pipeline.segment(image, **prompt)
            taken[name].append(1000 * (time.perf_counter() - start))
    rows = {name: quantiles(values[WARM_UP:]) for name, values in taken.items()}
    print(
        f"nano on {pipeline.model.device}, {args.frames} frames of each\n"
        f"{processor()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}\n\n"
        f"{'':<18}{'median ms':>11}{'p95 ms':>9}{'ratio':>8}"
    )
    for name, row in rows.items():
        ratio = row["median"] / rows["one look"]["median"]
        print(f"{name:<18}{row['median']:>11.2f}{row['p95']:>9.2f}{ratio:>8.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps({"ms": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
