#!/usr/bin/env python3
"""Draw the losses that a training run wrote: draw_curves.py runs/nano docs/images/nano_losses.png."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the choice of the backend

STAGES = {"base": ("prompt", "dense", "iou"), "level": ("loss",), "restore": ("restoration", "iou"),
          "decode": ("prompt", "dense", "iou"), "tune": ("prompt", "dense", "iou"),
          "decoder": ("prompt", "dense"), "agreement": ("prompt", "dense"),
          "enhancer": ("prompt", "dense"), "turned": ("prompt", "dense"), "enhancer_again": ("prompt", "dense"),
          "lq3": ("prompt", "dense"), "adapted": ("prompt", "dense"), "enhancer_alone": ("prompt", "dense"),
          "refit": ("prompt", "dense")}
"""CSV file stem to the columns that are drawn, where there is such a file; "loss" where it has none of them."""
COLUMNS = 4
"""Stages beside each other."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with the CSV files of stages")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    found = {stage: columns for stage, columns in STAGES.items() if (args.folder / f"{stage}.csv").is_file()}
    if not found:
        parser.error(f"expected {', '.join(f'{stage}.csv' for stage in STAGES)} in {args.folder}, found none of them")
    height, width = -(-len(found) // COLUMNS), min(len(found), COLUMNS)
    figure, axes = plt.subplots(
        height, width, figsize=(4 * width, 3.6 * height), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (stage, columns) in zip(axes.flat, found.items()):
        rows = list(csv.DictReader((args.folder / f"{stage}.csv").open()))
        for column in [name for name in columns if rows and name in rows[0]] or ["loss"]:
            axis.plot([int(r["step"]) for r in rows], [float(r[column]) for r in rows], label=column)
        axis.set(title=stage, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
