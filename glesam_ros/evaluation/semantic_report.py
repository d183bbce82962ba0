"""The figures of `glesam_ros.evaluation.semantic_summary` as tables and contact sheets for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from glesam_ros.evaluation.metrics import CONFIDENCE
from glesam_ros.evaluation.protocol import Condition
from glesam_ros.evaluation.report import TITLES, markdown, percent, with_interval
from glesam_ros.evaluation.semantic import SemanticPictures
from glesam_ros.evaluation.semantic_metrics import class_counts, confusion, figures
from glesam_ros.evaluation.semantic_summary import Tally
from glesam_ros.evaluation.sheet import Tile, fit, ranked
from glesam_ros.validation import UInt8Array

NAMES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "class_accuracy": "mean class accuracy"}
_ALPHA = 0.65
_NOTHING = (0, 0, 0)
"""Colour of what has no class."""


def semantic_tables(results: dict[str, Any]) -> str:
    """Markdown: mIoU, accuracies, differences, IoU of each class.

    Args:
        results: what `summarise_semantic` gives, with "settings".
    """
    cells = {(r["condition"], r["method"], r["metric"]): r for r in results["rows"]}
    conditions = list(dict.fromkeys(condition for condition, *_ in cells))
    methods = list(dict.fromkeys(method for _, method, _ in cells))
    parts = ["# Semantic segmentation", _about(results)]
    parts += ["## Mean IoU", _figures_table(cells, conditions, methods, "miou", True)]
    for metric in ("pixel_accuracy", "class_accuracy"):
        title = NAMES[metric]
        parts += [f"## {title[0].upper()}{title[1:]}", _figures_table(cells, conditions, methods, metric, False)]
    if results["differences"]:
        parts += ["## Differences in mean IoU", _differences_table(results)]
    direct = [method for method in methods if " + " not in method]
    parts += ["## IoU of each class", _classes_table(results, conditions, direct)]
    return "\n\n".join(parts) + "\n"


def _about(results: dict[str, Any]) -> str:
    counts, settings = results["counts"], results["settings"]
    text = (
        f"{settings['set']}: {counts['pictures']} pictures, {len(results['classes'])} classes (split "
        f"{settings['split']}, seed {settings['seed']}). In per cent, with {100 * CONFIDENCE:g} % bootstrap intervals "
        "over pictures; one confusion matrix over all pictures; a class without a true pixel is left out of the mean. "
        "clear: the pictures as they are."
    )
    if any(" + " in row["method"] for row in results["rows"]):
        text += (
            " A + B: the picture restored by A, then segmented by B; the learned restorers of one degradation are "
            "measured on it alone."
        )
    return text


def _figures_table(
    cells: Mapping[tuple[str, str, str], dict[str, Any]], conditions: Sequence[str], methods: Sequence[str],
    metric: str, interval: bool,
) -> str:
    lines = []
    for condition in conditions:
        line = [condition]
        for method in methods:
            cell = cells.get((condition, method, metric))
            text = "-" if cell is None else percent(cell["value"])
            if cell is not None and interval:
                text += f" [{percent(cell['low'])}, {percent(cell['high'])}]"
            line.append(text)
        lines.append(line)
    return markdown(["condition", *map(_title, methods)], lines)


def _differences_table(results: dict[str, Any]) -> str:
    found = [d for d in results["differences"] if d["metric"] == "miou"]
    pairs = list(dict.fromkeys((d["method"], d["over"]) for d in found))
    cells = {(d["condition"], d["method"], d["over"]): d for d in found}
    conditions = list(dict.fromkeys(d["condition"] for d in found))
    lines = [
        [f"{_title(method)} over {_title(over)}", *(with_interval(cells.get((c, method, over))) for c in conditions)]
        for method, over in pairs
    ]
    return "In points, in brackets relative; the pictures are paired.\n\n" + markdown(["", *conditions], lines)


def _classes_table(results: dict[str, Any], conditions: Sequence[str], methods: Sequence[str]) -> str:
    cells = {(r["condition"], r["method"], r["class"]): r for r in results["by_class"]}
    worst = conditions[-1]
    head = ["class", "pixels", *conditions, f"mistaken for in {worst}"]
    lines = []
    for name in results["classes"]:
        first = cells[worst, methods[0], name]
        mistaken = f"{first['mistaken_for']} {percent(first['mistaken_share'])}" if first["mistaken_for"] else "-"
        lines.append([
            name, percent(first["share"]),
            *(" / ".join(percent(cells[condition, m, name]["iou"]) for m in methods) for condition in conditions),
            mistaken,
        ])
    order = f"{' / '.join(methods)}. " if len(methods) > 1 else ""
    return (
        f"{order}Pixels: share of the class in the truth. Last column: the wrong class that most of its pixels got "
        f"from {methods[0]}, and how many of them.\n\n{markdown(head, lines)}"
    )


def choose_pictures(tally: Tally, condition: Condition, each: int = 2) -> list[tuple[str, int]]:
    """The pictures for a sheet: where the first method gains most over the second, about the median, and least.

    Args:
        tally: of all pictures.
        condition: at which is looked; one method alone is judged by its mean IoU.
        each: how many of each, fewer where there are not enough pictures.

    Returns:
        ("best", "median" or "worst", index of the picture), each picture once, by falling gain.
    """
    methods = [method for other, method in tally.rows if other == condition]
    values = [figures(np.stack(tally.rows[condition, method]))["miou"] for method in methods[:2]]
    gains = values[0] - values[1] if len(values) > 1 else values[0]
    numbered = {f"{index:09d}": float(gain) for index, gain in enumerate(gains) if np.isfinite(gain)}
    return [(word, int(name)) for word, name in ranked(numbered, each)]


def semantic_tiles(word: str, pictures: SemanticPictures, palette: UInt8Array) -> list[Tile]:
    """A row: frame, degraded frame, truth, and what each method finds.

    Args:
        word: before the name of the picture.
        pictures: what to show.
        palette: (K, 3) uint8 RGB.
    """
    tiles = [
        Tile(pictures.clear, f"{word}: {pictures.name}"), Tile(pictures.image, pictures.condition.name),
        Tile(paint_classes(pictures.clear, pictures.truth, palette), "truth"),
    ]
    for method, labels in pictures.predictions.items():
        value = float(figures(class_counts(confusion(pictures.truth, labels, len(palette))))["miou"])
        tiles.append(Tile(
            paint_classes(pictures.image, labels, palette), f"{_title(method.name)}: mIoU {percent(value)}"
        ))
    return tiles


def paint_classes(image: UInt8Array, labels: Any, palette: UInt8Array) -> UInt8Array:
    """Colours of the classes over their image, at the size of a tile.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers, index into `palette`; K and above has no class and is black.
        palette: (K, 3) uint8 RGB.

    Returns:
        (h, w, 3) uint8 RGB, fitted into `glesam_ros.evaluation.sheet.TILE`.
    """
    small = fit(image)
    colours = np.concatenate([palette, np.array([_NOTHING], np.uint8)])
    shown = np.minimum(labels, len(palette)).astype(np.int32)
    shown = cv2.resize(shown, small.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.addWeighted(small, 1 - _ALPHA, colours[shown], _ALPHA, 0), np.uint8)


def legend(classes: Sequence[str], palette: UInt8Array, width: int) -> UInt8Array:
    """A strip with a box of its colour before each class name; (H, `width`, 3) uint8 RGB on white."""
    step, box, line = 150, 14, 24
    across = max(1, width // step)
    rows = -(-len(classes) // across)
    paper = np.full((line * rows, width, 3), 255, np.uint8)
    for k, (name, colour) in enumerate(zip(classes, palette.tolist())):
        x, y = step * (k % across) + 10, line * (k // across)
        cv2.rectangle(paper, (x, y + 3), (x + box, y + 3 + box), colour, -1)
        cv2.putText(
            paper, name[:16], (x + box + 5, y + 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA
        )
    return paper


def _title(method: str) -> str:
    restorer, plus, model = method.rpartition(" + ")
    return f"{TITLES.get(restorer, restorer)}{plus}{model}"
