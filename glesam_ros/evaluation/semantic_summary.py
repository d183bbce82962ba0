"""Measurements of many pictures as figures: the metrics with intervals, a row a class, differences of methods.

Methods are compared on the same drawn pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glesam_ros.evaluation.metrics import Doubles, percentiles
from glesam_ros.evaluation.protocol import Condition
from glesam_ros.evaluation.semantic import OTHER, Method, SemanticMeasurement
from glesam_ros.evaluation.semantic_metrics import (
    METRICS,
    Integers,
    class_counts,
    class_ious,
    figures,
    ratio,
    resampled,
)


@dataclass(eq=False)
class Tally:
    """Measurements added up: one matrix a condition and method, and the counts of each picture for the intervals.

    Attributes:
        classes: K names.
        pictures: names, in the order of their first measurement.
        matrices: (condition, method) -> (K, K + 1) int64.
        rows: (condition, method) -> a (3, K) uint32 a picture, see `class_counts`.
    """

    classes: tuple[str, ...]
    pictures: list[str] = field(default_factory=list)
    matrices: dict[tuple[Condition, Method], Integers] = field(default_factory=dict)
    rows: dict[tuple[Condition, Method], list[Any]] = field(default_factory=dict)

    def add(self, measurement: SemanticMeasurement) -> None:
        """Add a picture under a condition; all conditions of a picture come one after the other."""
        if not self.pictures or self.pictures[-1] != measurement.picture:
            self.pictures.append(measurement.picture)
        for method, matrix in measurement.matrices.items():
            key = measurement.condition, method
            self.matrices[key] = self.matrices.get(key, 0) + matrix
            self.rows.setdefault(key, []).append(class_counts(matrix).astype(np.uint32))

    def picture_figures(self) -> dict[tuple[Condition, Method], dict[str, Doubles]]:
        """metric -> (N,) of the single pictures; NaN for one without a pixel that counts."""
        return {key: figures(np.stack(rows)) for key, rows in self.rows.items()}


def summarise_semantic(tally: Tally, seed: int) -> dict[str, Any]:
    """All figures of an evaluation, ready for JSON; all are shares, 0..1.

    Args:
        tally: of all pictures.
        seed: of the bootstrap.

    Returns:
        "counts": pictures, pixels that count.
        "classes": names.
        "rows": condition, method, metric, value, low, high.
        "by_class": condition, method, class, iou, low, high (None for a class without pixels), share (of the true
        pixels), mistaken_for, mistaken_share (the wrong class that most of its pixels got, and how many of them).
        "differences": condition, metric, method, over: difference, low, high, relative, relative_low, relative_high
        (None where the other is 0); of the first model over all other methods, and of another model with a restorer
        over itself without.

    Raises:
        ValueError: no measurement, or no pixel that counts.
    """
    if not tally.matrices or not any(matrix.sum() for matrix in tally.matrices.values()):
        raise ValueError("expected at least one picture with a pixel that has a class, got none")
    rows: list[dict[str, Any]] = []
    by_class: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    first = next(iter(tally.matrices))[1]
    for condition in dict.fromkeys(condition for condition, _ in tally.matrices):
        methods = [method for other, method in tally.matrices if other == condition]
        drawn: dict[Method, dict[str, Doubles]] = {}
        for method in methods:
            key = condition, method
            place = {"condition": condition.name, "method": method.name}
            sums = resampled(np.stack(tally.rows[key]), seed)
            drawn[method] = figures(sums)
            whole = figures(class_counts(tally.matrices[key]))
            for metric in METRICS:
                low, high = _interval(drawn[method][metric])
                rows.append({**place, "metric": metric, "value": float(whole[metric]), "low": low, "high": high})
            by_class += [{**place, **found} for found in _by_class(tally, key, sums)]
        pairs = [(first, method) for method in methods if method != first]
        others = [method for method in methods if method.restorer and method.model != first.model]
        pairs += [(method, Method(method.model)) for method in others]
        for method, over in pairs:
            differences += [
                {"condition": condition.name, "method": method.name, "over": over.name, **found}
                for found in _differences(tally, condition, method, over, drawn)
            ]
    pixels = int(next(iter(tally.matrices.values())).sum())
    return {
        "counts": {"pictures": len(tally.pictures), "pixels": pixels}, "classes": list(tally.classes), "rows": rows,
        "by_class": by_class, "differences": differences,
    }


def _by_class(tally: Tally, key: tuple[Condition, Method], sums: Doubles) -> Iterable[dict[str, Any]]:
    matrix = tally.matrices[key]
    true = matrix.sum(1)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    others = [*tally.classes, OTHER]
    for k, (iou, drawn) in enumerate(zip(class_ious(class_counts(matrix)), class_ious(sums).T)):
        low, high = _interval(drawn)
        most = int(wrong[k].argmax())
        mistaken = bool(wrong[k, most])
        yield {
            "class": tally.classes[k], "iou": _or_none(iou), "low": low, "high": high,
            "share": float(true[k] / true.sum()), "mistaken_for": others[most] if mistaken else None,
            "mistaken_share": float(wrong[k, most] / true[k]) if mistaken else 0.0,
        }


def _differences(
    tally: Tally, condition: Condition, method: Method, over: Method, drawn: dict[Method, dict[str, Doubles]]
) -> Iterable[dict[str, Any]]:
    after, before = (figures(class_counts(tally.matrices[condition, one])) for one in (method, over))
    for metric in METRICS:
        a, b = drawn[method][metric], drawn[over][metric]
        low, high = _interval(a - b)
        relative = ratio(after[metric], before[metric]) - 1
        relative_low, relative_high = _interval(ratio(a, b) - 1)
        yield {
            "metric": metric, "difference": float(after[metric] - before[metric]), "low": low, "high": high,
            "relative": _or_none(relative), "relative_low": relative_low, "relative_high": relative_high,
        }


def _interval(estimates: Doubles) -> tuple[float | None, float | None]:
    """Percentile interval of those estimates that are numbers; None where none is."""
    known = estimates[np.isfinite(estimates)]
    return percentiles(known) if known.size else (None, None)


def _or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
