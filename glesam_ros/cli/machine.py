"""What figures of speed are measured on and told with: the machine, a frame, quantiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from glesam_ros.cli.options import CommandError
from glesam_ros.cli.pictures import read_picture

if TYPE_CHECKING:
    from glesam_ros.validation import UInt8Array


def load_frame(path: Path | None, size: tuple[int, int]) -> UInt8Array:
    """The picture at `path`, or a photograph of the demo, scaled to `size` (width, height): (height, width, 3)
    uint8 RGB.

    Raises:
        CommandError: not a picture.
    """
    import cv2
    import numpy as np

    if path is None:
        path = demo_photograph()
    try:
        image = read_picture(path)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def demo_photograph() -> Path:
    """The first photograph that ships for the demo. Raises CommandError where none does."""
    photographs = sorted((Path(__file__).parents[1] / "demo").glob("**/*.jpg"))
    if not photographs:
        raise CommandError("no photograph ships with this installation; name one with --image")
    return photographs[0]


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile, rounded to 0.01."""
    import numpy as np

    median, p95 = np.percentile(values, [50, 95])
    return {"median": round(float(median), 2), "p95": round(float(p95), 2)}


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
