"""Measurements of many photographs as figures: means with intervals, gains, degradation level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glesam_ros.evaluation.baselines import GRABCUT
from glesam_ros.evaluation.metrics import Doubles, bootstrap_interval, mean_gains, spearman
from glesam_ros.evaluation.protocol import MODES, Condition, Measurement

MAIN = {"points": "points_iou", "boxes": "boxes_iou", "everything": "everything_best_iou"}
"""The metric of each kind of prompt by which gains and baselines are compared."""
ALL_SETS = "all"
GAIN_FIGURES = ("difference", "low", "high", "relative", "relative_low", "relative_high")


@dataclass(frozen=True)
class Series:
    """One value a true region, and the number of its photograph."""

    values: Doubles
    groups: np.ndarray[Any, np.dtype[np.int64]]


def summarise(measurements: Sequence[Measurement], seed: int) -> dict[str, Any]:
    """All figures of an evaluation, ready for JSON.

    Means are over true regions; intervals are those of `bootstrap_interval`, over photographs.

    Args:
        measurements: in any order; figures come in the order in which sets and conditions first appear.
        seed: of the bootstrap.

    Returns:
        "counts": photographs and regions of each set.
        "rows": set, condition, method, metric, mean, low, high, regions, photographs; all shares, 0..1.
        "gains": set, condition, metric, method, over (the method it is compared with): difference, low, high of the
        means, and relative, relative_low, relative_high (None where the other is 0); the photographs are paired.
        "levels": set, condition, mean, low, high of the measured level, enhanced (share in automatic mode).
        "rank_correlation": Spearman's, of measured and true level (clear is 0), set, kind, value; set "all" is all.
    """
    cells: dict[tuple[str, Condition], list[Measurement]] = {}
    for measurement in measurements:
        cells.setdefault((measurement.set_name, measurement.condition), []).append(measurement)
    rows: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    levels: list[dict[str, Any]] = []
    counts: dict[str, dict[str, int]] = {}
    for (set_name, condition), found in cells.items():
        place = {"set": set_name, "condition": condition.name}
        series = collect(found)
        for (method, metric), s in series.items():
            low, high = bootstrap_interval(s.values, seed, groups=s.groups)
            photographs = len(set(s.groups.tolist()))
            rows.append({
                **place, "method": method, "metric": metric, "mean": float(s.values.mean()), "low": low, "high": high,
                "regions": s.values.size, "photographs": photographs,
            })
            most = counts.setdefault(set_name, {"photographs": 0, "regions": 0})
            most["photographs"] = max(most["photographs"], photographs)
            if not metric.startswith("everything"):
                most["regions"] = max(most["regions"], s.values.size)
        gains += [{**place, **gain} for gain in _gains(series, seed)]
        measured = [m.level for m in found]
        low, high = bootstrap_interval(measured, seed)
        enhanced = float(np.mean([m.enhanced for m in found]))
        levels.append({**place, "mean": float(np.mean(measured)), "low": low, "high": high, "enhanced": enhanced})
    return {
        "counts": counts, "rows": rows, "gains": gains, "levels": levels,
        "rank_correlation": rank_correlations(measurements),
    }


def collect(measurements: Sequence[Measurement]) -> dict[tuple[str, str], Series]:
    """(method, metric) -> the values of all measurements; the group is the number of the measurement."""
    values: dict[tuple[str, str], list[float]] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for number, measurement in enumerate(measurements):
        for key, numbers in measurement.values.items():
            values.setdefault(key, []).extend(numbers)
            groups.setdefault(key, []).extend([number] * len(numbers))
    return {key: Series(np.array(v, np.float64), np.array(groups[key], np.int64)) for key, v in values.items()}


def rank_correlations(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Spearman's correlation of measured and true level for each set, all sets, and each kind with the clear ones."""
    found = []
    kinds = list(dict.fromkeys(m.condition.kind for m in measurements if m.condition.kind))
    set_names = list(dict.fromkeys(m.set_name for m in measurements))
    for set_name in [*set_names, ALL_SETS] if len(set_names) > 1 else set_names:
        for kind in kinds:
            chosen = [
                m for m in measurements if set_name in (m.set_name, ALL_SETS) and m.condition.kind in ("", kind)
            ]
            value = spearman([m.condition.level for m in chosen], [m.level for m in chosen])
            found.append({"set": set_name, "kind": kind, "value": value, "photographs": len(chosen)})
    return found


def restored(methods: Sequence[str]) -> list[str]:
    """Those of `methods` that restore the picture and then segment it."""
    return [method for method in methods if method not in (*MODES, GRABCUT)]


def _gains(series: dict[tuple[str, str], Series], seed: int) -> list[dict[str, Any]]:
    methods = list(dict.fromkeys(method for method, _ in series))
    pairs = [("always", "off"), ("auto", "off"), ("auto", "always")]
    others = [method for method in methods if method not in MODES]
    pairs += [(mode, other) for mode in ("always", "auto") for other in others] + [(other, "off") for other in others]
    gains = []
    for metric in dict.fromkeys(metric for _, metric in series):
        for method, over in pairs:
            if (method, metric) not in series or (over, metric) not in series:
                continue
            after, before = series[method, metric], series[over, metric]
            # in everything mode the annotator that fits best may differ, and with it the regions
            difference, relative = mean_gains(after.values, before.values, after.groups, before.groups, seed)
            figures = dict(zip(GAIN_FIGURES, (*difference, *relative)))
            gains.append({
                "metric": metric, "method": method, "over": over,
                **{name: value if np.isfinite(value) else None for name, value in figures.items()},
            })
    return gains
