"""The one step of Stable Diffusion that all enhancers take: its schedule, its formula, sides that fit; no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TIMESTEPS = 1000
"""Length of the schedule."""
SIDE_DIVISOR = 8
"""Sides of a latent are multiples of this: the U-Net halves it three times."""
SIDE_MULTIPLE = 16 * SIDE_DIVISOR
"""Sides of the square input of SAM and SAM 2 are multiples of this: its latent has stride 16."""
PICTURE_MULTIPLE = 8 * SIDE_DIVISOR
"""Sides of the input of SCR and RASS are multiples of this: the latent of Stable Diffusion's own VAE has stride 8."""


def alpha_bar(timestep: int) -> float:
    """Share of the signal at `timestep` in 0..999 of Stable Diffusion's schedule: scaled linear, 0.00085 to 0.012."""
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (first + (last - first) * t / (TIMESTEPS - 1)) ** 2 for t in range(timestep + 1))


def one_step(scaled: Tensor, noise: Tensor, gamma: float, share: float) -> Tensor:
    """Restored z of gamma z and the predicted noise, `share` the alpha bar; in the precision of its inputs.

    Source: GleSAM, section 3; with gamma = 1 the prediction of x_0 in DDPM and DDIM.
    """
    return (scaled - math.sqrt(1 - share) * noise) / (gamma * math.sqrt(share))
