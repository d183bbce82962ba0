"""Losses of masks, and the IoU that scores learn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - Dice of each mask: logits and target (..., P) -> (...)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * target).sum(-1) + smooth) / (p.sum(-1) + target.sum(-1) + smooth)


def windowed_loss(logits: Tensor, target: Tensor, window: Tensor) -> Tensor:
    """Dice, cross-entropy averaged over the window around the region, half as heavy over the rest: (..., P) -> (...).

    Inside and outside weigh the same in the window: averaged apart, the few pixels of a small region outweigh what lies
    around them, and its mask grows too large.
    """
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    near = (ce * window).sum(-1) / window.sum(-1).clamp_min(1)
    far = (ce * (1 - window)).sum(-1) / (1 - window).sum(-1).clamp_min(1)
    return dice_loss(logits, target) + near + 0.5 * far


def windows(regions: Tensor) -> Tensor:
    """1 in the box of each region and half its size around it, else 0: (..., h, w) -> (..., h, w) float."""

    def inside(line: Tensor) -> Tensor:
        n = line.shape[-1]
        at = torch.arange(n, device=line.device)
        first = line.float().argmax(-1, keepdim=True)
        last = n - 1 - line.flip(-1).float().argmax(-1, keepdim=True)
        margin = 0.5 * (last - first + 1)
        return ((at >= first - margin) & (at <= last + margin)).float()

    filled = regions > 0
    return inside(filled.any(-1))[..., :, None] * inside(filled.any(-2))[..., None, :]


def focal_loss(
    logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25, balanced: bool = True
) -> Tensor:
    """Mean of -alpha_t (1 - p_t)^gamma log p_t over the positions of each mask: (..., P) -> (...).

    `balanced`: alpha_t is alpha inside and 1 - alpha outside (Lin et al. 2017); else alpha everywhere, as in the code
    that GleSAM released.
    """
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = 1 - torch.exp(-ce)
    weight = alpha * target + (1 - alpha) * (1 - target) if balanced else alpha
    return (weight * missed**gamma * ce).mean(-1)


def dice_focal_loss(logits: Tensor, target: Tensor, window: Tensor | None = None) -> Tensor:
    """Dice and (balanced) focal loss one to one, (..., P) -> (...); there is no use for `window`."""
    return dice_loss(logits, target) + focal_loss(logits, target)


def soft_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of thresholded logits with every target: (..., K, P) and (..., R, P) -> (..., K, R); no gradient."""
    with torch.no_grad():
        binary = (logits > 0).to(target.dtype)
        common = binary @ target.transpose(-1, -2)
        union = binary.sum(-1)[..., :, None] + target.sum(-1)[..., None, :] - common
        return common / union.clamp_min(1)
