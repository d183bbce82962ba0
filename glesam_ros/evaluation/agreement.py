"""Photographs without masks: do those of the photograph and of the same photograph degraded further agree?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glesam_ros.degradation import degrade
from glesam_ros.evaluation.metrics import bootstrap_interval, mean_best_iou, mean_gains, pairwise_iou
from glesam_ros.evaluation.protocol import Condition, Evaluator, by_mode, photograph_seed
from glesam_ros.evaluation.sheet import UNMATCHED, Tile, paint
from glesam_ros.models import Embedding
from glesam_ros.overlay import PALETTE
from glesam_ros.pipeline import budget
from glesam_ros.validation import BoolArray, UInt8Array

SET_NAME = "agreement"
METRICS = ("own", "plain")
"""Masks of the degraded photograph against those of the photograph: by the same mode ("own"), or, in each mode, by
the network without enhancement ("plain")."""
_MATCHED = 0.5


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """A photograph without masks, (H, W, 3) uint8 RGB, and how it is degraded further."""

    name: str
    image: UInt8Array
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Agreement:
    """One photograph.

    Attributes:
        name: of the photograph.
        level: measured degradation of the photograph as it is, 0..1.
        values: (condition, mode, metric) -> mean over the photograph's masks of the best IoU, 0..1; None where the
            network finds no mask in the photograph to compare with.
    """

    name: str
    level: float
    values: dict[tuple[str, str, str], float] | None


def agree(evaluator: Evaluator, photograph: Unlabelled) -> Agreement:
    """Measure one photograph under all its conditions, in the evaluator's modes."""
    modes = evaluator.options.modes
    raw, reference = _everything(evaluator, photograph.image, modes)
    plain = evaluator.pipe.decode(raw).masks
    if not all(len(masks) for masks in (plain, *reference.values())):
        return Agreement(photograph.name, raw.degradation, None)
    values: dict[tuple[str, str, str], float] = {}
    for condition in photograph.conditions:
        _, found = _everything(evaluator, _degraded(evaluator, photograph, condition), modes)
        for mode in modes:
            values[condition.name, mode, "own"] = mean_best_iou(found[mode], reference[mode])
            values[condition.name, mode, "plain"] = mean_best_iou(found[mode], plain)
    return Agreement(photograph.name, raw.degradation, values)


def summarise_agreement(found: Sequence[Agreement], modes: Sequence[str], seed: int) -> dict[str, Any]:
    """Means over photographs with bootstrap intervals, and the gain of `always` over `off`, ready for JSON.

    Args:
        found: of all photographs.
        modes: that were measured.
        seed: of the bootstrap.

    Returns:
        "photographs", "left_out" (names without a mask to compare with), "modes", "rows" (condition, metric, method,
        mean, low, high), "gains" (condition, metric, difference, low, high, relative, share of the photographs where
        it is above 0), "values" (each photograph).
    """
    counted = [a for a in found if a.values is not None]
    series: dict[tuple[str, str, str], list[float]] = {}
    for one in counted:
        for key, value in (one.values or {}).items():
            series.setdefault(key, []).append(value)
    rows, gains = [], []
    for (condition, mode, metric), values in series.items():
        low, high = bootstrap_interval(values, seed)
        rows.append({
            "condition": condition, "metric": metric, "method": mode, "mean": float(np.mean(values)), "low": low,
            "high": high,
        })
    for condition, mode, metric in series:
        if mode == "always" and (condition, "off", metric) in series:
            after, before = np.array(series[condition, mode, metric]), np.array(series[condition, "off", metric])
            photographs = np.arange(len(after))
            (difference, low, high), (relative, *_) = mean_gains(after, before, photographs, photographs, seed)
            gains.append({
                "condition": condition, "metric": metric, "difference": difference, "low": low, "high": high,
                "relative": relative if np.isfinite(relative) else None,
                "share_better": float((after > before).mean()),
            })
    listed = [
        {"photograph": a.name, "level": a.level, "values": [[*key, v] for key, v in (a.values or {}).items()]}
        for a in counted
    ]
    return {
        "photographs": len(counted), "left_out": [a.name for a in found if a.values is None], "modes": list(modes),
        "rows": rows, "gains": gains, "values": listed,
    }


def agreement_tiles(
    evaluator: Evaluator, word: str, photograph: Unlabelled, condition: Condition, alone: bool = False
) -> list[Tile]:
    """A row: photograph, its masks, degraded further, masks of that without and with enhancement.

    A mask has the colour of the photograph's mask that it overlaps by an IoU of at least 0.5, or is grey.

    Args:
        alone: masks on black, no photograph.
    """
    image = _degraded(evaluator, photograph, condition)
    raw, found = _everything(evaluator, image, ("off", "always"))
    _, reference = _everything(evaluator, photograph.image, ("off",))
    plain = reference["off"]
    colours = PALETTE[np.arange(len(plain)) % len(PALETTE)]
    masks, count = paint(_ground(photograph.image, alone), plain, colours), f"{len(plain)} masks of the photograph"
    if alone:
        tiles = [Tile(masks, f"{word}: {photograph.name}, {count}")]
    else:
        tiles = [
            Tile(photograph.image, f"{word}: {photograph.name}"), Tile(masks, count),
            Tile(image, f"{condition.name}, measured level {raw.degradation:.2f}"),
        ]
    for mode, caption in (("off", "off"), ("always", "enhanced")):
        share = mean_best_iou(found[mode], plain) if len(plain) else 0.0
        matched = _matched_colours(found[mode], plain, colours)
        painted = paint(_ground(image, alone), found[mode], matched)
        tiles.append(Tile(painted, f"{caption}: agreement {100 * share:.1f}"))
    return tiles


def _ground(image: UInt8Array, alone: bool) -> UInt8Array:
    """What masks are painted on."""
    return np.zeros_like(image) if alone else image


def _matched_colours(masks: BoolArray, reference: BoolArray, colours: UInt8Array) -> UInt8Array:
    out = np.tile(np.array(UNMATCHED, np.uint8), (len(masks), 1))
    if len(reference) and len(masks):
        overlap = pairwise_iou(masks, reference)
        matched = overlap.max(1) >= _MATCHED
        out[matched] = colours[overlap.argmax(1)[matched]]
    return out


def _degraded(evaluator: Evaluator, photograph: Unlabelled, condition: Condition) -> UInt8Array:
    seed = photograph_seed(evaluator.options.seed, SET_NAME, photograph.name)
    return degrade(photograph.image, condition.kind, condition.level, seed).image


def _everything(
    evaluator: Evaluator, image: UInt8Array, modes: Sequence[str]
) -> tuple[Embedding, dict[str, BoolArray]]:
    """The embedding without enhancement, and the masks of each mode."""
    pipe = evaluator.pipe
    raw = pipe.model.encode(image, budget(pipe.resolved))
    decode = functools.cache(pipe.decode)
    return raw, {mode: decode(embedding).masks for mode, embedding in by_mode(pipe, raw, modes).items()}
