"""Measures a model on held-out photographs: clear and degraded, without and with enhancement.

Protocol of GleSAM: three random positive points from each true mask, IoU, Dice and pixel accuracy; and everything mode:
for each true region the best predicted mask. Points, degradations and bootstrap come from fixed seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from glesam_ros.datasets import Photograph, load_bsds, load_coco, region_masks
from glesam_ros.degradation import degrade, names
from glesam_ros.evaluation.metrics import best_iou, bootstrap_interval, dice, iou, pixel_accuracy, sample_points
from glesam_ros.models import Embedding
from glesam_ros.pipeline import Pipeline, load_pipeline

MIN_AREA = 1000
"""Smaller true regions (in pixels) are left out."""
MODES = ("off", "always", "auto")
Scores = dict[tuple[str, str, str, str], list[float]]
"""(data set, condition, mode, metric) -> one value a mask."""


def conditions(kinds: list[str], levels: list[int]) -> list[tuple[str, str, int]]:
    """("clear", "", 0) and each kind at each level, with a name for the table."""
    return [("clear", "", 0)] + [(f"{kind}-{level}", kind, level) for kind in kinds for level in levels]


def evaluate_photograph(
    pipe: Pipeline, photograph: Photograph, truths: list[Any], condition: tuple[str, str, int], seed: int
) -> tuple[dict[tuple[str, str], list[float]], float]:
    """All metrics of one photograph under one condition.

    Args:
        truths: alternatives of (R, H, W) bool true regions (annotators); points come from the first.

    Returns:
        (mode, metric) -> one value a true mask, and the measured degradation level.
    """
    name, kind, level = condition
    image = photograph.image if name == "clear" else degrade(photograph.image, kind, level, seed).image
    raw = pipe.model.encode(image, pipe.settings.processing_size)
    by_mode: dict[str, Embedding] = {"off": raw, "always": pipe.model.enhance(raw)}
    by_mode["auto"] = by_mode["always" if raw.degradation > pipe.settings.enhance_above else "off"]
    rng = np.random.default_rng([seed, 7])
    points = np.stack([sample_points(mask, 3, rng) for mask in truths[0]])
    labels = np.ones(points.shape[:2], np.float32)
    values: dict[tuple[str, str], list[float]] = {}
    done: dict[int, str] = {}
    for mode, embedding in by_mode.items():
        if id(embedding) in done:
            same = done[id(embedding)]
            values |= {(mode, metric): v for (m, metric), v in list(values.items()) if m == same}
            continue
        done[id(embedding)] = mode
        prompted = pipe.decode(embedding, points, labels).masks
        for metric, function in (("iou", iou), ("dice", dice), ("accuracy", pixel_accuracy)):
            values[mode, metric] = function(prompted, truths[0]).tolist()
        found = pipe.decode(embedding).masks
        best = max((best_iou(found, truth) for truth in truths), key=lambda scores: float(scores.mean()))
        values[mode, "everything"] = best.tolist()
    return values, raw.degradation


def evaluate(
    pipe: Pipeline, sets: dict[str, list[Photograph]], kinds: list[str], levels: list[int], seed: int = 0
) -> dict[str, Any]:
    """Run every photograph under every condition.

    Returns:
        "rows": for each data set, condition, mode and metric the mean, its 95 % bootstrap interval and the count;
        "levels": for each condition the mean measured degradation; "rank_correlation" of measured and true level.
    """
    scores: Scores = {}
    measured: dict[str, list[float]] = {}
    for set_name, photographs in sets.items():
        for index, photograph in enumerate(tqdm(photographs, desc=set_name, unit="photograph")):
            layers = range(len(photograph.layers)) if photograph.alternatives else [None]
            truths = [region_masks(photograph, layer) for layer in layers]
            truths = [t[t.sum((1, 2)) > MIN_AREA] for t in truths]
            truths = [t for t in truths if len(t)]
            if not truths:
                continue
            for condition in conditions(kinds, levels):
                values, level = evaluate_photograph(pipe, photograph, truths, condition, seed + index)
                measured.setdefault(condition[0], []).append(level)
                for (mode, metric), numbers in values.items():
                    scores.setdefault((set_name, condition[0], mode, metric), []).extend(numbers)
    rows = []
    for (set_name, condition_name, mode, metric), numbers in scores.items():
        low, high = bootstrap_interval(numbers, seed)
        rows.append(
            {"set": set_name, "condition": condition_name, "mode": mode, "metric": metric,
             "mean": float(np.mean(numbers)), "low": low, "high": high, "count": len(numbers)}
        )
    level_means = {name: float(np.mean(numbers)) for name, numbers in measured.items()}
    return {"rows": rows, "levels": level_means, "rank_correlation": rank_correlation(measured)}


def rank_correlation(measured: dict[str, list[float]]) -> float:
    """Spearman's correlation of measured level and true level (0 clear, 1..3) over the clear and "lq" conditions.

    0 where either does not vary.
    """
    wanted = {"clear": 0, "lq-1": 1, "lq-2": 2, "lq-3": 3}
    true = np.concatenate([np.full(len(measured[n]), k) for n, k in wanted.items() if n in measured])
    seen = np.concatenate([measured[n] for n in wanted if n in measured])
    if len(set(true.tolist())) == 1 or len(set(seen.tolist())) == 1:
        return 0.0
    return float(np.corrcoef(mean_ranks(true), mean_ranks(seen))[0, 1])


def mean_ranks(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) ranks from 0, ties share their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return np.asarray((first + (counts - 1) / 2)[group], np.float64)


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each data set and condition, off / always / auto of each metric in per cent."""
    cells = {(r["set"], r["condition"], r["mode"], r["metric"]): r for r in result["rows"]}
    lines = [
        "| set | condition | level | 3 points IoU off / always / auto | Dice | pixel accuracy "
        "| everything, mean best IoU |",
        "|---|---|---|---|---|---|---|",
    ]
    for set_name, condition in dict.fromkeys((r["set"], r["condition"]) for r in result["rows"]):
        columns = [
            " / ".join(f"{100 * cells[set_name, condition, mode, metric]['mean']:.1f}" for mode in MODES)
            for metric in ("iou", "dice", "accuracy", "everything")
        ]
        level = result["levels"][condition]
        lines.append(f"| {set_name} | {condition} | {level:.2f} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line of `python -m glesam_ros.evaluation`."""
    parser = argparse.ArgumentParser(prog="python -m glesam_ros.evaluation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with coco_small/ and bsds500/")
    parser.add_argument("--model", default="nano", help="registered model")
    parser.add_argument("--weights", type=Path, help="folder with other weights of nano, for comparing checkpoints")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which split to measure")
    parser.add_argument("--kinds", nargs="*", default=["lq"], choices=names(), help="degradations")
    parser.add_argument("--levels", nargs="*", type=int, default=[1, 2, 3], help="levels of each degradation")
    parser.add_argument("--limit", type=int, help="first so many photographs of each set")
    parser.add_argument("--json", type=Path, help="write all figures with their intervals here")
    args = parser.parse_args()
    pipe = load_pipeline(args.model, enhancement="off", max_instances=100)
    if args.weights is not None:
        from glesam_ros.models.nano import Nano

        pipe = Pipeline(Nano(weights=args.weights), pipe.settings)
    sets = {
        "coco": load_coco(args.data / "coco_small", args.split)[: args.limit],
        "bsds": load_bsds(args.data / "bsds500", args.split)[: args.limit],
    }
    result = evaluate(pipe, sets, args.kinds, args.levels)
    print(table(result))
    print(f"rank correlation of measured and true level: {result['rank_correlation']:.3f}")
    if args.json:
        result["settings"] = dataclasses.asdict(pipe.settings)
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
