"""The losses of SCR: restored pixels, and cross-attention that lies where the named classes are.

    L = L_res + lambda L_SCL

L_res (`restoration_loss`) compares pictures. L_SCL (`semantic_constraint`) compares the cross-attention of the class
names in the prompt, which `AttentionMaps` reads while the U-Net runs, with the label map. Neither formula is public;
these are ours, and their functions say why they are as they are.

Source of the idea: RASS (IJCV 2026, arXiv 2602.14042), section on SCR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glesam_ros.models.glesam.enhancer import UNet2DConditionModel

DETAIL = 0.1
"""Weight of gradients beside pixels in `restoration_loss`."""
LAYERS = ("down_blocks.2.", "up_blocks.1.", "up_blocks.2.")
"""Beginnings of the names of the layers whose cross-attention counts: 16 x 16 and 32 x 32 places of a picture of 512
pixels. The coarser ones have too few places for a mask, the finer ones follow texture more than meaning."""
EPSILON = 1e-8
"""Added to attention, so that logarithms and gradients stay finite where there is none."""


def restoration_loss(restored: Tensor, clear: Tensor, detail: float = DETAIL) -> Tensor:
    """L_res: squared error of pixels, and absolute error of their gradients.

    Squared errors alone favour the mean of all pictures that could have been, which is blurred. A gradient (Sobel, both
    directions) is large where an edge is, and its absolute error does not weigh one sharp edge against many faint ones.
    No weights of a perceptual network are needed for it. The optimum, 0, is the clear picture alone.

    Args:
        restored, clear: (B, 3, H, W) in -1..1, float.
        detail: weight of the gradients.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError: shapes differ.
    """
    if restored.shape != clear.shape:
        raise ValueError(f"restored: expected the shape of clear, {tuple(clear.shape)}, got {tuple(restored.shape)}")
    error = restored.to(torch.promote_types(restored.dtype, torch.float32)) - clear
    return error.square().mean() + detail * _gradients(error).abs().mean()


def _gradients(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B C, 2, H, W): Sobel's change a pixel to the right and downwards; the border repeats."""
    ramp = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=x.dtype, device=x.device) / 8
    kernels = torch.stack([ramp, ramp.T])[:, None]
    return F.conv2d(F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate"), kernels)


# cross-attention


class AttentionMaps:
    """Reads the cross-attention of a U-Net while it runs; until `close` the chosen layers compute it in the open.

    All other layers keep the fused attention of torch, and so do all of them after `close`. With gradient
    checkpointing the layers run again during the backward pass, so close after it.

    Args:
        unet: of diffusers; with or without LoRA.
        layers: beginnings of the names of the layers.

    Raises:
        ValueError: no cross-attention has such a name.
    """

    def __init__(self, unet: UNet2DConditionModel, layers: Sequence[str] = LAYERS) -> None:
        self._found: dict[str, Tensor] = {}
        self._before: list[tuple[Any, Any]] = []
        for name, module in unet.named_modules():
            if name.startswith(tuple(layers)) and name.endswith(".attn2"):
                self._before.append((module, module.processor))
                module.set_processor(_Reader(name, self._found))
        if not self._before:
            raise ValueError(f"layers: expected beginnings of names of layers with cross-attention, got {list(layers)}")

    def take(self, size: tuple[int, int]) -> Tensor:
        """What the last pass attended to; each pass is taken once.

        Args:
            size: (h, w) of the latent that the U-Net got.

        Returns:
            (B, T, h', w') float32 in 0..1: for each place how much it attends to each of the T tokens, the mean of all
            heads and layers; the sum over T is 1. h' and w' are those of the finest layer.

        Raises:
            RuntimeError: no pass since the last call.
        """
        if not self._found:
            raise RuntimeError("take: expected a pass of the U-Net since the last call")
        grids = []
        for attention in self._found.values():
            stride = round((size[0] * size[1] / attention.shape[1]) ** 0.5)
            grids.append(attention.transpose(1, 2).unflatten(2, (-(-size[0] // stride), -(-size[1] // stride))))
        self._found.clear()
        finest = max((grid.shape[2:] for grid in grids), key=lambda shape: shape[0] * shape[1])
        fitted = [
            grid if grid.shape[2:] == finest else F.interpolate(grid, finest, mode="bilinear", align_corners=False)
            for grid in grids
        ]
        return torch.stack(fitted).mean(0)

    def close(self) -> None:
        """Give the layers back what computed their attention before."""
        for module, processor in self._before:
            module.set_processor(processor)
        self._before.clear()
        self._found.clear()


class _Reader:
    """What diffusers calls an attention processor: the same output as by default, and the probabilities kept."""

    def __init__(self, name: str, found: dict[str, Tensor]) -> None:
        self._name, self._found = name, found

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, C) and the prompt (B, T, D) -> (B, N, C)."""
        if attention_mask is not None:
            raise ValueError("attention_mask: expected none, a prompt is attended to as a whole")
        parts = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in parts)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        attention = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        self._found[self._name] = attention.mean(1)
        output = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](output))
        return output / attn.rescale_output_factor


# the semantic constraint


class Constraint(NamedTuple):
    """The two terms of L_SCL, scalars of at least 0; their sum is the loss.

    Attributes:
        place: where each class is attended to.
        choice: which class each place attends to.
    """

    place: Tensor
    choice: Tensor


def semantic_constraint(
    attention: Tensor, spans: Sequence[Sequence[tuple[int, int]]], named: Sequence[Sequence[int]], labels: Tensor,
    void: int,
) -> Constraint:
    """L_SCL: the attention to the name of a class has the shape of that class's mask.

    Let A_c(p) be the attention of place p to all tokens of the name of class c, M_c(p) the share of c among the
    labelled pixels of p, v(p) the share of labelled pixels. Two conditional distributions of the same attention are
    matched with the same two of the label map:

        place   mean over named classes c with pixels of KL(P_c || Q_c),
                P_c(p) = v M_c(p) / sum over p', Q_c(p) = v A_c(p) / sum over p'
        choice  mean over places p, weighted by v(p) M(p), of KL(T_p || R_p), M the sum of M_c over named classes,
                T_p(c) = M_c(p) / M(p), R_p(c) = A_c(p) / sum over c'

    Why both. `place` is the same when the attention to one class is multiplied by a number: a class that outshouts all
    others satisfies it. `choice` is the same when the attention to all classes at one place is multiplied by a number:
    a class that is attended to at one of its pixels alone satisfies it. Both are 0 if and only if A_c(p) = s_c M_c(p)
    with a number s_c for each class that is the same for classes which share a place. How much of its attention a place
    spends on class names, and how much on the start and the padding of the prompt, is left free: Stable Diffusion
    spends most on those, and forcing that would fight what it learned.

    Why this direction of KL: the mask is the truth, and missing a part of it costs without bound. The gradient for
    logits is the difference Q - P, R - T, which does not vanish where attention is wrong.

    Cases: a named class without pixels has no `place`, and `choice` drives its attention away from all others. Pixels
    of classes that are not named count against all names in `place`, and not at all in `choice`, where no name is
    right. Void pixels count nowhere. The tokens of a name of several words count together.

    Args:
        attention: (B, T, h, w) as `AttentionMaps.take` gives it.
        spans: for each picture the range [first, end) of the tokens of each name, as `scr.tokenise` gives them.
        named: for each picture the class indices of the names in that order; those beyond the spans are not used.
        labels: (B, H, W) integers, class indices; H and W any.
        void: the value of pixels without a class.

    Returns:
        Both terms, the mean over pictures, in float32 at least.

    Raises:
        ValueError: numbers of pictures differ, a class is named twice or is void, or a range lies outside of the
            prompt.
    """
    count, tokens = attention.shape[:2]
    if not len(spans) == len(named) == len(labels) == count:
        raise ValueError(
            f"expected spans, named and labels of {count} pictures, got {len(spans)}, {len(named)} and {len(labels)}"
        )
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    place, choice = [], []
    for maps, ranges, classes, picture in zip(attention, spans, named, labels):
        classes = list(classes)[: len(ranges)]
        if len(set(classes)) != len(ranges) or void in classes:
            raise ValueError(f"named: expected {len(ranges)} different classes other than {void}, got {classes}")
        if any(not 0 <= first < end <= tokens for first, end in ranges):
            raise ValueError(f"spans: expected ranges of tokens within 0..{tokens}, got {list(ranges)}")
        if ranges:
            heard = torch.stack([maps[first:end].sum(0) for first, end in ranges]) + EPSILON
            terms = _terms(heard, *_shares(picture, classes, void, maps.shape[1:], maps.dtype))
            place.append(terms.place)
            choice.append(terms.choice)
    if not place:
        return Constraint(attention.sum() * 0, attention.sum() * 0)
    return Constraint(torch.stack(place).sum() / count, torch.stack(choice).sum() / count)


def _shares(
    labels: Tensor, classes: list[int], void: int, size: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shares of all pixels of a place: (K, h, w) of each class, (h, w) of those that are labelled."""
    masks = torch.stack([*(labels == k for k in classes), labels != void]).to(dtype)
    found = F.adaptive_avg_pool2d(masks[None], (size[0], size[1]))[0]
    return found[:-1], found[-1]


def _terms(heard: Tensor, masks: Tensor, labelled: Tensor) -> Constraint:
    """The terms of one picture: attention (K, h, w), above 0; shares as of `_shares`."""
    seen = masks.sum((1, 2))
    there = seen > 0
    wanted = masks / seen.clamp(min=EPSILON)[:, None, None]
    weighted = heard * labelled
    got = weighted / weighted.sum((1, 2), keepdim=True).clamp(min=EPSILON)
    places = _divergence(wanted, got).sum((1, 2))
    place = (places * there).sum() / there.sum().clamp(min=1)
    named = masks.sum(0)
    right = masks / named.clamp(min=EPSILON)
    choices = _divergence(right, heard / heard.sum(0)).sum(0)
    choice = (choices * named).sum() / named.sum().clamp(min=EPSILON)
    return Constraint(place, choice)


def _divergence(truth: Tensor, found: Tensor) -> Tensor:
    """truth log(truth / found), 0 where truth is 0."""
    least = torch.finfo(found.dtype).tiny
    return torch.where(truth > 0, truth * (truth.clamp(min=least).log() - found.clamp(min=least).log()), 0.0)
