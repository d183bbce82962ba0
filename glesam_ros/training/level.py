"""The degradation-level head: whole frames as a camera takes them, and its loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from glesam_ros.models.nano import OWN_SIZE, resized
from glesam_ros.models.nano_net import LEVELS
from glesam_ros.training.batches import worsen
from glesam_ros.training.config import Config
from glesam_ros.training.crops import recoloured
from glesam_ros.training.loop import Batch
from glesam_ros.training.sources import Scenes

Array = NDArray[Any]
SIDES = (480, 960)
"""Long sides of a camera's frames (px). What blur and noise of a larger frame leave at `INSIDE` is another level."""
AS_TAKEN = 0.5
"""Share of frames that keep the photograph's own size, where the blocks of its own file are those of a camera's."""
INSIDE = (3 * OWN_SIZE // 4, OWN_SIZE)
"""(height, width) that the head sees frames at: that of a 4:3 camera in the node."""
RECOLOURED = 0.5
"""Share of frames in another light: the level must not follow from brightness."""


def draw_frames(scenes: Scenes, rng: np.random.Generator, config: Config, count: int) -> Batch:
    """Frames, clear and degraded, as the node hands them to the network.

    A crop cut to size before it is degraded has another sharpness and another noise than a frame that is degraded at
    the camera's resolution and then made smaller, so here the order is the camera's.

    Args:
        scenes: the photographs.
        rng: all chance comes from it.
        config: `degradation` says how often LQSeg is drawn, and which other kinds; levels 1..3 are drawn evenly.
        count: frames, B.

    Returns:
        clear, degraded (B, *INSIDE, 3) uint8 RGB, and levels (B,) int64 of the degraded in 1..3.
    """
    clear, worse = [], []
    levels = rng.integers(1, 4, count)
    for level in levels:
        frame = _frame(scenes.draw(rng).image, rng)
        if rng.random() < RECOLOURED:
            frame = recoloured(frame, rng, config.crop.gamma, config.crop.colour)
        clear.append(resized(frame, INSIDE))
        worse.append(resized(worsen(frame, int(level), config.degradation, rng), INSIDE))
    return {
        "clear": torch.from_numpy(np.stack(clear)), "degraded": torch.from_numpy(np.stack(worse)),
        "levels": torch.from_numpy(levels),
    }


def level_loss(logits: Tensor, levels: Tensor) -> Tensor:
    """Cross-entropy of "worse than level k", the ordinal regression of cumulative logits.

    Args:
        logits: (B, LEVELS), of `LevelHead.logits`.
        levels: (B,) true levels in 0..LEVELS.

    Returns:
        The mean, a scalar.
    """
    worse = levels[:, None] > torch.arange(LEVELS, device=levels.device)
    return F.binary_cross_entropy_with_logits(logits, worse.to(logits.dtype))


def _frame(photograph: Array, rng: np.random.Generator) -> Array:
    """The largest part with the shape of `INSIDE`, as a camera of some size takes it, mirrored half of the time."""
    h, w = photograph.shape[:2]
    part = min(h / INSIDE[0], w / INSIDE[1])
    height, width = round(part * INSIDE[0]), round(part * INSIDE[1])
    y, x = rng.integers(h - height + 1), rng.integers(w - width + 1)
    frame = photograph[y : y + height, x : x + width]
    # evenly on a logarithmic scale
    side = SIDES[0] * (SIDES[1] / SIDES[0]) ** rng.random()
    if rng.random() >= AS_TAKEN:
        frame = resized(frame, (round(side * INSIDE[0] / INSIDE[1]), round(side)))
    return np.ascontiguousarray(frame[:, ::-1]) if rng.random() < 0.5 else frame
