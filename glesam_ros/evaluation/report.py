"""The figures of an evaluation as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glesam_ros.evaluation.metrics import CONFIDENCE
from glesam_ros.evaluation.protocol import METRICS, MODES, POINTS, PROMPTS
from glesam_ros.evaluation.summary import MAIN, restored

TITLES = {
    "points": "Three random points", "boxes": "Box", "everything": "Everything mode",
    "points_iou": "IoU", "points_dice": "Dice", "points_accuracy": "pixel accuracy", "points_boundary": "boundary IoU",
    "points_score": "predicted IoU", "boxes_score": "predicted IoU",
    "boxes_iou": "IoU", "boxes_dice": "Dice", "boxes_accuracy": "pixel accuracy", "boxes_boundary": "boundary IoU",
    "everything_best_iou": "mean best IoU", "everything_map_iou": "in the label map",
    "everything_ar10": "AR@10", "everything_ar100": "AR@100",
    "classical": "classical (OpenCV)", "zero_dce": "Zero-DCE", "prenet": "PReNet", "grabcut": "GrabCut",
}
"""Words for the names in the results."""
_FEWER = {1: "One random point", 2: "Two random points"}


def title(prompt: str, settings: dict[str, Any]) -> str:
    """Words for a kind of prompt, of the "settings" of the results."""
    return _FEWER.get(settings.get("points", POINTS), TITLES[prompt]) if prompt == "points" else TITLES[prompt]


def tables(results: dict[str, Any]) -> str:
    """Markdown: for each kind of prompt a row a set and condition, then baselines, then the degradation level.

    Args:
        results: what `glesam_ros.evaluation.summary.summarise` gives, with "settings" and, where it was measured,
            "agreement".
    """
    parts = ["# Evaluation", _about(results)] if results["rows"] else ["# Evaluation"]
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    baselines = [method for method in methods if method not in MODES]
    modes = [mode for mode in MODES if mode in methods]
    means = {(r["set"], r["condition"], r["method"], r["metric"]): r["mean"] for r in results["rows"]}
    places = list(dict.fromkeys((r["set"], r["condition"]) for r in results["rows"]))
    for prompt in PROMPTS:
        if any(metric == MAIN[prompt] for *_, metric in means):
            parts += [f"## {title(prompt, results['settings'])}", _modes_table(results, prompt, modes, means, places)]
    if baselines:
        parts += ["## Baselines", "The same network; `off` is without enhancement. " + _BASELINES]
        for prompt in PROMPTS:
            if any(metric == MAIN[prompt] and method in baselines for *_, method, metric in means):
                parts.append(f"### {title(prompt, results['settings'])}, {TITLES[MAIN[prompt]]}")
                parts.append(_baselines_table(results, prompt, modes, baselines, means, places))
    if results["levels"]:
        parts += ["## Degradation level", _levels_table(results)]
    if results.get("agreement"):
        parts += ["## Agreement on photographs without masks", _agreement_table(results["agreement"])]
    return "\n\n".join(parts) + "\n"


_BASELINES = (
    "Restore-then-segment: the picture is restored, then segmented without enhancement; the learned restorers are "
    "measured on the degradation that they are made for. GrabCut gets the box. The last columns: `always` against "
    "the best of restore-then-segment."
)


def _about(results: dict[str, Any]) -> str:
    counts = "; ".join(
        f"{name}: {c['photographs']} photographs, {c['regions']} regions" if c["regions"]
        else f"{name}: {c['photographs']} photographs"
        for name, c in results["counts"].items()
    )
    s = results["settings"]
    splits = [s["split"]] if s["split"] else []
    if s.get("lqseg"):
        splits.append(f"{'of lqseg ' if splits else ''}{s['lqseg']['split']}")
    boxes = f" The sides of boxes err by {100 * s['box_error']:g} %." if s.get("box_error") else ""
    return (
        f"{counts} (split {', '.join(splits)}, seed {s['seed']}, model {s['pipeline']['model']}). Regions of at least "
        f"{s['min_region_area']} pixels.{boxes} In per cent, means over regions; gains in points with a "
        f"{100 * CONFIDENCE:g} % bootstrap interval over photographs, in brackets relative."
    )


def _modes_table(
    results: dict[str, Any], prompt: str, modes: Sequence[str],
    means: dict[tuple[str, str, str, str], float], places: Sequence[tuple[str, str]],
) -> str:
    metrics = [f"{prompt}_{metric}" for metric in METRICS[prompt]]
    head = ["set", "condition", f"{TITLES[metrics[0]]} {' / '.join(modes)}", *(TITLES[m] for m in metrics[1:])]
    compared = {"off", "always"} <= set(modes)
    if compared:
        head.append(f"gain in {TITLES[metrics[0]]}, always over off")
    lines = []
    for place in places:
        cells = [" / ".join(percent(means.get((*place, mode, metric))) for mode in modes) for metric in metrics]
        lines.append([*place, *cells, *([_gain(results, place, metrics[0], "always", "off")] if compared else [])])
    return markdown(head, lines)


def _baselines_table(
    results: dict[str, Any], prompt: str, modes: Sequence[str], baselines: Sequence[str],
    means: dict[tuple[str, str, str, str], float], places: Sequence[tuple[str, str]],
) -> str:
    metric = MAIN[prompt]
    shown = [b for b in baselines if any((*place, b, metric) in means for place in places)]
    head = ["set", "condition", *modes, *(TITLES[b] for b in shown)]
    compared = "always" in modes and bool(restored(shown))
    if compared:
        head += ["best restore-then-segment", "gain over it"]
    lines = []
    for place in places:
        line = [*place, *(percent(means.get((*place, method, metric))) for method in [*modes, *shown])]
        if compared:
            others = [b for b in restored(shown) if (*place, b, metric) in means]
            # learned restorers are measured on their own kind alone, so a condition may have none
            best = max(others, key=lambda b: means[(*place, b, metric)], default=None)
            line += [TITLES[best], _gain(results, place, metric, "always", best)] if best else ["-", "-"]
        lines.append(line)
    return markdown(head, lines)


def _levels_table(results: dict[str, Any]) -> str:
    head = ["set", "condition", "measured level", "enhanced in automatic mode", "auto against always, points"]
    lines = []
    gains = {(g["set"], g["condition"], g["metric"], g["method"], g["over"]): g for g in results["gains"]}
    for level in results["levels"]:
        place = (level["set"], level["condition"])
        against = [gains.get((*place, metric, "auto", "always")) for metric in MAIN.values()]
        mean, low, high = level["mean"], level["low"], level["high"]
        lines.append([
            *place, f"{mean:.2f} [{low:.2f}, {high:.2f}]", f"{100 * level['enhanced']:.0f} %",
            " / ".join(f"{100 * g['difference']:+.1f}" for g in against if g) or "-",
        ])
    correlations = ", ".join(f"{r['set']} {r['kind']} {r['value']:.3f}" for r in results["rank_correlation"])
    text = markdown(head, lines) + "\n\nLast column: " + " / ".join(TITLES[p].lower() for p in PROMPTS) + "."
    main = set(MAIN.values())
    behind = [g for g in results["gains"] if (g["method"], g["over"]) == ("auto", "always") and g["metric"] in main]
    if behind:
        worst = min(behind, key=lambda g: g["difference"])
        text += (
            f" At worst automatic mode is {100 * worst['difference']:+.2f} points from always: {worst['set']}, "
            f"{worst['condition']}, {TITLES[worst['metric'].split('_')[0]].lower()}."
        )
    if correlations:
        text += f"\n\nRank correlation (Spearman) of measured and true level, clear is 0: {correlations}."
    return text


def _agreement_table(agreement: dict[str, Any]) -> str:
    head = ["condition", "masks compared with", *agreement["modes"], "gain, always over off"]
    lines = []
    gains = {(g["condition"], g["metric"]): g for g in agreement["gains"]}
    means = {(r["condition"], r["metric"], r["method"]): r["mean"] for r in agreement["rows"]}
    for condition, metric in dict.fromkeys((c, m) for c, m, _ in means):
        lines.append([
            condition, AGREEMENT_TITLES[metric],
            *(percent(means.get((condition, metric, mode))) for mode in agreement["modes"]),
            with_interval(gains.get((condition, metric))),
        ])
    about = (
        f"{agreement['photographs']} photographs. For each mask of the photograph the best IoU with a mask of the same "
        "photograph degraded further, everything mode; in per cent, mean over photographs."
    )
    return f"{about}\n\n{markdown(head, lines)}"


AGREEMENT_TITLES = {
    "own": "of the photograph, same mode", "plain": "of the photograph, without enhancement",
}


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the columns are as wide as their widest cell, so that it reads well as text, too."""
    widths = [max(len(row[k]) for row in (head, *lines)) for k in range(len(head))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (head, *lines)]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def percent(share: float | None) -> str:
    """A share in per cent, "-" for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def with_interval(gain: dict[str, Any] | None) -> str:
    """A gain in points with its interval and, where it is known, relative in brackets; "-" for None."""
    if gain is None:
        return "-"
    low, high = f"{100 * gain['low']:+.1f}", f"{100 * gain['high']:+.1f}"
    relative = "" if gain["relative"] is None else f" ({100 * gain['relative']:+.0f} %)"
    return f"{100 * gain['difference']:+.1f} [{low}, {high}]{relative}"


def _gain(results: dict[str, Any], place: tuple[str, str], metric: str, method: str, over: str) -> str:
    wanted = (*place, metric, method, over)
    for g in results["gains"]:
        if (g["set"], g["condition"], g["metric"], g["method"], g["over"]) == wanted:
            return with_interval(g)
    return "-"
