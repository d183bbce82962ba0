"""Batches of crops for the stages of nano: pictures, clear and degraded, their regions, prompts and grid points."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from glesam_ros.degradation import degrade, degrade_lqseg
from glesam_ros.models.nano import resized
from glesam_ros.training.config import Config, DegradationConfig
from glesam_ros.training.crops import draw_crop, recoloured
from glesam_ros.training.loop import Batch
from glesam_ros.training.prompts import draw_cells, draw_prompt
from glesam_ros.training.sources import Scenes

Array = NDArray[Any]


def draw_scenes(
    scenes: Scenes, rng: np.random.Generator, config: Config, count: int, clear: float | None = None
) -> Batch:
    """Crops with regions, prompts and grid points; R regions and O prompted objects a crop, padded.

    Args:
        clear: share of the crops that stay clear, the others are degraded; None: all stay clear.

    Returns:
        images (B, H, W, 3) uint8, regions (B, R, H / 4 * W / 4) float (zero rows are padding), target (B, O) index of
        the region of each object, xy (B, O, N, 2) in -1..1, labels (B, O, N), single (B, O) bool (one ambiguous point),
        cells (B, O * C) grid indices, -1 none; unless `clear` is None also levels (B,) in 0..3 and clear, the images as
        they were before they were degraded.
    """
    crop, size = config.crop, (config.crop.height, config.crop.width)
    levels = None if clear is None else draw_levels(config.degradation, rng, count, clear)
    images: list[Array] = []
    clears: list[Array] = []
    found = []
    for k in range(count):
        detail = 1.0 if levels is None else float(np.exp(rng.uniform(*np.log(crop.detail))))
        drawn, regions = draw_crop(
            scenes.draw, rng, crop.height, crop.width, crop.zoom, crop.paste, detail=detail, turn=crop.turn,
            stretch=crop.stretch,
        )
        image: Array = recoloured(drawn, rng, crop.gamma, crop.colour)
        if rng.random() < crop.grey:
            image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
        level = 0 if levels is None else int(levels[k])
        clears.append(resized(image, size))
        images.append(resized(worsen(image, level, config.degradation, rng), size) if level else clears[-1])
        found.append(regions)
    batch = {**_targets(found, rng, config), "images": torch.from_numpy(np.stack(images))}
    if levels is not None:
        batch |= {"levels": torch.from_numpy(levels), "clear": torch.from_numpy(np.stack(clears))}
    return batch


def _targets(found: list[Array], rng: np.random.Generator, config: Config) -> Batch:
    """What `draw_scenes` says of regions (R, h, w) bool of each crop."""
    count, most = len(found), max(len(regions) for regions in found)
    h, w = found[0].shape[1:]
    padded = np.zeros((count, most, h * w), np.float32)
    target = np.zeros((count, config.objects), np.int64)
    rows: list[list[Any]] = [[], [], [], []]
    for b, regions in enumerate(found):
        padded[b, : len(regions)] = regions.reshape(len(regions), -1)
        target[b] = rng.permutation(np.resize(rng.permutation(len(regions)), config.objects))
        drawn = [draw_prompt(regions[k], rng) for k in target[b]]
        for row, values in zip(rows[:3], zip(*drawn), strict=True):
            row.append(np.stack(values))
        rows[3].append(np.concatenate([draw_cells(regions[k], config.cells, rng) for k in target[b]]))
    xy, labels, single, cells = (torch.from_numpy(np.stack(row)) for row in rows)
    return {
        "regions": torch.from_numpy(padded), "target": torch.from_numpy(target), "xy": xy, "labels": labels,
        "single": single, "cells": cells,
    }


def draw_levels(mix: DegradationConfig, rng: np.random.Generator, count: int, clear: float = 0.0) -> Array:
    """(count,) levels 0..3: 0, clear, with the probability `clear`, the others by the weights of `mix`."""
    weights = np.asarray(mix.levels) / sum(mix.levels)
    return np.where(rng.random(count) < clear, 0, rng.choice([1, 2, 3], count, p=weights))


def worsen(image: Array, level: int, mix: DegradationConfig, rng: np.random.Generator) -> Array:
    """A crop (H, W, 3) uint8 degraded to `level` 1..3 by LQSeg or by something that robots see."""
    if rng.random() < mix.lq:
        return degrade_lqseg(image, level, rng).image
    return degrade(image, mix.kinds[rng.integers(len(mix.kinds))], level, int(rng.integers(2**31))).image


def draw_pairs(scenes: Scenes, rng: np.random.Generator, config: Config, count: int) -> Batch:
    """Clear crops, the same degraded (B, H, W, 3) uint8, and the levels (B,) in 1..3."""
    drawn = draw_scenes(scenes, rng, config, count, clear=0.0)
    return {"clear": drawn["clear"], "degraded": drawn["images"], "levels": drawn["levels"]}
