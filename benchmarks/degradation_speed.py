"""Degraded images a second at 512x512, by kind and level, with several processes at once, as data sets are made.

Each process takes one core and degrades the photographs of the demo, one seed after another. images/s is the wall clock
of all processes together. CPU ms is the time of a core for one image; unlike the wall clock it hardly changes when
other programs want the cores, too. Without them images/s is about 1000 x processes / CPU ms.

    python benchmarks/degradation_speed.py --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glesam_ros.cli.machine import demo_photograph, load_frame, processor, usable_cores
from glesam_ros.degradation import degrade, degrade_lqseg_mixed, names

MIXED = "lq mixed"
"""LQSeg at the rates of mixed training; it has no levels."""


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="at once; default: 2")
    parser.add_argument("--images", type=int, default=48, help="timed images of each kind and level; default: 48")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels; default: 512")
    parser.add_argument("--kinds", nargs="+", choices=names(), default=names(), metavar="KIND", help="default: all")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the processes start afresh and read it
    machine = f"{processor()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f} before"
    print(f"{args.size}x{args.size}, {args.processes} processes, {args.images} images each row; {machine}, "
          f"OpenCV {cv2.__version__}, numpy {np.__version__}\n\n{'':<18}{'level':>6}{'images/s':>10}{'CPU ms':>9}")
    rows = [(kind, level) for kind in args.kinds for level in (1, 2, 3)]
    if "lq" in args.kinds:
        rows.append((MIXED, None))
    figures = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for kind, level in rows:
            pool.map(timed, [(kind, level, args.size, seed) for seed in range(2 * args.processes)], 1)  # warm-up
            start = time.perf_counter()
            seconds = pool.map(timed, [(kind, level, args.size, seed) for seed in range(args.images)], 2)
            rate = args.images / (time.perf_counter() - start)
            cpu = 1000 * float(np.mean(seconds))
            figures.append({"kind": kind, "level": level, "images_per_s": round(rate, 1), "cpu_ms": round(cpu, 1)})
            print(f"{kind:<18}{level or '-':>6}{rate:>10.1f}{cpu:>9.1f}", flush=True)
    if args.json is not None:
        report = {"size": args.size, "processes": args.processes, "images": args.images, "machine": machine,
                  "opencv": cv2.__version__, "numpy": np.__version__, "figures": figures}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def timed(task: tuple[str, Any, int, int]) -> float:
    """Seconds of a core that one image takes; the task is (kind, level, side, seed)."""
    kind, level, side, seed = task
    images = photographs(side)
    image = images[seed % len(images)]
    start = time.process_time()
    if kind == MIXED:
        degrade_lqseg_mixed(image, seed)
    else:
        degrade(image, kind, level, seed)
    return time.process_time() - start


@lru_cache(maxsize=1)
def photographs(side: int) -> list[Any]:
    """The photographs of the demo, square, (side, side, 3) uint8 RGB."""
    cv2.setNumThreads(1)  # one core a process
    return [load_frame(path, (side, side)) for path in sorted(demo_photograph().parent.glob("*.jpg"))]


if __name__ == "__main__":
    sys.exit(main())
