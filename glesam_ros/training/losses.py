"""Losses of masks, and the IoU that scores learn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - Dice of each mask: logits and target (..., P) -> (...)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * target).sum(-1) + smooth) / (p.sum(-1) + target.sum(-1) + smooth)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice and cross-entropy balanced between inside and outside, (..., P) -> (...)."""
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = (ce * target).sum(-1) / target.sum(-1).clamp_min(1)
    outside = (ce * (1 - target)).sum(-1) / (1 - target).sum(-1).clamp_min(1)
    return dice_loss(logits, target) + 0.3 * inside + 0.7 * outside


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Mean of -alpha_t (1 - p_t)^gamma log p_t over the positions of each mask (Lin et al. 2017): (..., P) -> (...)."""
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = 1 - torch.exp(-ce)
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * missed**gamma * ce).mean(-1)


def dice_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice and focal loss one to one, as GleSAM's stage 2 has it: (..., P) -> (...)."""
    return dice_loss(logits, target) + focal_loss(logits, target)


def soft_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of thresholded logits with every target: (..., K, P) and (..., R, P) -> (..., K, R); no gradient."""
    with torch.no_grad():
        binary = (logits > 0).to(target.dtype)
        common = binary @ target.transpose(-1, -2)
        union = binary.sum(-1)[..., :, None] + target.sum(-1)[..., None, :] - common
        return common / union.clamp_min(1)
