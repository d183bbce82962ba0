"""Plots of an evaluation as PNG files; the only module here that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glesam_ros.evaluation.protocol import MODES, PROMPTS, Measurement
from glesam_ros.evaluation.report import TITLES, title
from glesam_ros.evaluation.summary import MAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    # Okabe and Ito 2008
    "off": "#7f7f7f", "always": "#0072b2", "auto": "#e69f00", "classical": "#009e73", "zero_dce": "#cc79a7",
    "prenet": "#56b4e9", "grabcut": "#d55e00",
}
_DPI = 150


def draw_plots(results: dict[str, Any], measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Write `by_level.png`, `gains.png` and `levels.png`, each only where there is something to show.

    Args:
        results: see `glesam_ros.evaluation.summary.summarise`, with "settings".
        measurements: which they sum up.
        folder: for the files; must exist.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figures = {
        "by_level.png": _by_level(results), "gains.png": _gains(results), "levels.png": _levels(results, measurements)
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=_DPI, metadata={"Software": None})
            written.append(folder / name)
    return written


def draw_semantic_plot(results: dict[str, Any], file: Path) -> bool:
    """Mean IoU of every method by level, a panel a kind that has several levels; False where none has.

    Args:
        results: see `glesam_ros.evaluation.semantic_summary.summarise_semantic`.
        file: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    cells = {(r["condition"], r["method"]): r for r in results["rows"] if r["metric"] == "miou"}
    kinds = dict.fromkeys(name.rpartition("-")[0] for name, _ in cells if "-" in name)
    shown = {kind: steps for kind in kinds if len(steps := _steps(results, kind)) > 2}
    if not shown:
        return False
    figure = Figure(figsize=(3.8 * len(shown) + 0.8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for panel, (kind, steps) in zip(panels, shown.items()):
        methods = list(dict.fromkeys(method for name, method in cells if name == steps[-1]))
        for number, method in enumerate(methods):
            # a learned restorer is measured on its own kind alone, not on the clear pictures
            there = [k for k, step in enumerate(steps) if (step, method) in cells]
            found = [cells[steps[k], method] for k in there]
            offset = 0.06 * (number - (len(methods) - 1) / 2)
            panel.errorbar(
                [k + offset for k in there], [100 * r["value"] for r in found], _reach(found, "value", "low", "high"),
                label=method, marker="o", markersize=4, capsize=2, linewidth=1.5, elinewidth=1,
                linestyle="--" if " + " in method else "-",
            )
        panel.set_title(kind, fontsize=10)
        panel.set_xticks(range(len(steps)), steps)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("mean IoU, %")
    figure.savefig(file, dpi=_DPI, metadata={"Software": None})
    return True


def _by_level(results: dict[str, Any]) -> Figure | None:
    """IoU of each mode over the levels of the first kind that has several; a panel a set and kind of prompt."""
    from matplotlib.figure import Figure

    cells = {(r["set"], r["condition"], r["method"], r["metric"]): r for r in results["rows"]}
    kind = next((k for k in results["settings"]["kinds"] if len(_steps(results, k)) > 2), None)
    if kind is None:
        return None
    steps = _steps(results, kind)
    prompts, sets = _prompts(results), list(results["counts"])
    figure = Figure(figsize=(3.6 * len(prompts) + 0.4, 3.0 * len(sets) + 0.5), layout="constrained")
    panels = figure.subplots(len(sets), len(prompts), squeeze=False, sharex=True)
    for set_name, line in zip(sets, panels):
        for prompt, panel in zip(prompts, line):
            modes = [m for m in MODES if any((set_name, step, m, MAIN[prompt]) in cells for step in steps)]
            for number, mode in enumerate(modes):
                # sets may have been measured at different levels
                there = [k for k, step in enumerate(steps) if (set_name, step, mode, MAIN[prompt]) in cells]
                found = [cells[set_name, steps[k], mode, MAIN[prompt]] for k in there]
                mean = [100 * r["mean"] for r in found]
                # side by side, or the intervals would hide one another
                x = [k + 0.06 * (number - (len(modes) - 1) / 2) for k in there]
                panel.errorbar(
                    x, mean, _reach(found, "mean", "low", "high"), label=mode, color=COLOURS[mode], marker="o",
                    markersize=4, capsize=2, linewidth=1.5, elinewidth=1, linestyle="--" if mode == "auto" else "-",
                )
            panel.set_title(f"{set_name}: {title(prompt, results['settings']).lower()}", fontsize=10)
            panel.set_ylabel(f"{TITLES[MAIN[prompt]]}, %")
            panel.set_xticks(range(len(steps)), steps)
            panel.grid(alpha=0.3)
    panels[0][-1].legend(frameon=False, fontsize=9)
    return figure


def _gains(results: dict[str, Any]) -> Figure | None:
    """Relative gain over the network without enhancement, each kind at its highest level; a panel a set and prompt."""
    from matplotlib.figure import Figure

    gains = {
        (g["set"], g["condition"], g["metric"], g["method"]): g
        for g in results["gains"]
        if g["over"] == "off" and g["relative"] is not None
    }
    methods = [m for m in COLOURS if m not in ("off", "auto", "grabcut") and any(m == key[3] for key in gains)]
    if not methods:
        return None
    shown = ["clear", *(steps[-1] for k in results["settings"]["kinds"] if len(steps := _steps(results, k)) > 1)]
    prompts, sets = _prompts(results), list(results["counts"])
    height = 0.34 * len(shown) + 1.0
    figure = Figure(figsize=(3.6 * len(prompts) + 1.2, height * len(sets) + 0.4), layout="constrained")
    panels = figure.subplots(len(sets), len(prompts), squeeze=False, sharey=True, sharex="col")
    for set_name, line in zip(sets, panels):
        for prompt, panel in zip(prompts, line):
            for number, method in enumerate(methods):
                offset = 0.18 * (number - (len(methods) - 1) / 2)
                places = [k for k, c in enumerate(shown) if (set_name, c, MAIN[prompt], method) in gains]
                found = [gains[set_name, shown[k], MAIN[prompt], method] for k in places]
                panel.errorbar(
                    [100 * g["relative"] for g in found], [k + offset for k in places],
                    xerr=_reach(found, "relative", "relative_low", "relative_high"), fmt="o", color=COLOURS[method],
                    markersize=4, capsize=2, elinewidth=1,
                    label="enhancement (always)" if method == "always" else TITLES[method],
                )
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(f"{set_name}: {title(prompt, results['settings']).lower()}", fontsize=10)
            panel.set_yticks(range(len(shown)), shown)
            panel.set_ylim(len(shown) - 0.5, -0.5)
            panel.grid(alpha=0.3)
    for prompt, panel in zip(prompts, panels[-1]):
        panel.set_xlabel(f"gain in {TITLES[MAIN[prompt]]} over off, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.suptitle(" ")  # keeps the legend's place free, also before matplotlib 3.7
    figure.legend(handles, labels, loc="upper center", ncol=len(methods), frameon=False, fontsize=9)
    return figure


def _levels(results: dict[str, Any], measurements: Sequence[Measurement]) -> Figure | None:
    """What the model measures under each condition, all sets together, and the threshold of automatic mode."""
    from matplotlib.figure import Figure

    by_condition: dict[str, list[float]] = {}
    for m in measurements:
        by_condition.setdefault(m.condition.name, []).append(m.level)
    if not by_condition:
        return None
    figure = Figure(figsize=(7.5, 0.3 * len(by_condition) + 1.1), layout="constrained")
    panel = figure.subplots()
    for place, levels in enumerate(by_condition.values()):
        panel.plot(levels, [place] * len(levels), "|", color="#0072b2", alpha=0.35, markersize=10)
        panel.plot(float(np.median(levels)), place, "o", color="black", markersize=4)
    threshold = results["settings"]["pipeline"]["enhance_above"]
    panel.axvline(threshold, color="#d55e00", linestyle="--", linewidth=1)
    panel.set_title(f"dashed: automatic mode enhances above {threshold:g}", fontsize=9)
    panel.set_yticks(range(len(by_condition)), list(by_condition))
    panel.set_ylim(len(by_condition) - 0.5, -0.5)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xlabel("measured degradation level: a line a photograph, a dot the median")
    panel.grid(alpha=0.3, axis="x")
    return figure


def _reach(rows: Sequence[dict[str, Any]], middle: str, low: str, high: str) -> list[list[float]]:
    """How far the interval reaches below and above its middle, in per cent; rounding must not make it negative."""
    below = [max(0.0, 100 * (row[middle] - row[low])) for row in rows]
    return [below, [max(0.0, 100 * (row[high] - row[middle])) for row in rows]]


def _steps(results: dict[str, Any], kind: str) -> list[str]:
    """"clear" and the conditions of this kind that were measured, by level."""
    found = {r["condition"] for r in results["rows"]}
    return [name for name in ("clear", *(f"{kind}-{level}" for level in (1, 2, 3))) if name in found]


def _prompts(results: dict[str, Any]) -> list[str]:
    found = {r["metric"] for r in results["rows"]}
    return [prompt for prompt in PROMPTS if MAIN[prompt] in found]
