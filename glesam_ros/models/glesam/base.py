"""What SAM and SAM 2 are for the enhancer, the pipeline, training and export: one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glesam_ros.models.glesam.one_step import SIDE_MULTIPLE

STRIDE = 16
"""Pixels of the model's input a cell of the latent."""
SIDE = 1024
"""Side of the square input that SAM and SAM 2 were trained with; others are multiples of `SIDE_MULTIPLE`."""
LATENT_CHANNELS = 256
LOGIT_STRIDE = 4
"""Pixels of the model's input a cell of the mask logits."""


class Features(NamedTuple):
    """What the image encoder says of B images.

    Attributes:
        latent: (B, 256, S / 16, S / 16), what the enhancer restores: SAM's embedding, or the top level of SAM 2.
        high: levels at S / 4 (B, 32, ...) and S / 8 (B, 64, ...) for the mask decoder of SAM 2, none for SAM.
    """

    latent: Tensor
    high: tuple[Tensor, ...] = ()

    def pick(self, k: int) -> Features:
        """Image k alone, as a batch of one."""
        return Features(self.latent[k : k + 1], tuple(level[k : k + 1] for level in self.high))


class BaseModel(nn.Module, ABC):
    """A frozen image encoder with its prompt encoder and mask decoder.

    Attributes:
        name: of `glesam_ros.models.glesam.catalogue`, for example "sam_vit_b" or "sam2.1_hiera_tiny".
        mean, std: (3,) of the input, for values 0..255.
        thresholds: score and stability below which upstream's automatic masks are dropped, 0..1.
        mask_decoder: what stage 2 of GleSAM trains.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    thresholds: tuple[float, float]
    mask_decoder: nn.Module

    @abstractmethod
    def content(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """(height, width) of an image of `size` inside the square of `side` pixels, from the top left corner.

        SAM keeps the aspect and pads, SAM 2 squashes. Both are multiples of `LOGIT_STRIDE`, so that the padding can be
        cut from the logits.
        """

    @abstractmethod
    def encode(self, pixels: Tensor) -> Features:
        """Normalised pixels (B, 3, S, S), S a multiple of `SIDE_MULTIPLE` -> features."""

    @abstractmethod
    def decode(self, features: Features, points: Tensor, labels: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        """Masks for the prompts of one image.

        Args:
            features: of one image (B = 1); its latent raw or enhanced.
            points: (K, N, 2) float xy in pixels of the square.
            labels: (K, N) float: 1 inside, 0 outside, 2 and 3 corners of a box, -1 padding.
            several: three masks for an ambiguous prompt instead of one.

        Returns:
            Logits (K, M, S / 4, S / 4) and predicted IoU (K, M) in 0..1, M = 3 if `several` else 1.
        """

    def pixels(self, images: Tensor, side: int) -> Tensor:
        """Images (B, H, W, 3) uint8 RGB -> normalised, resized and padded pixels (B, 3, side, side) float32."""
        height, width = self.content((images.shape[1], images.shape[2]), side)
        x = images.permute(0, 3, 1, 2).float()
        if x.shape[2:] != (height, width):
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
        # by numbers: tensors of them would be copied to the device in each call, and wait for what is queued there
        scaled = [(x[:, k] - mean) / std for k, (mean, std) in enumerate(zip(self.mean, self.std))]
        return F.pad(torch.stack(scaled, 1), (0, side - width, 0, side - height))


def check_square(name: str, pixels: Tensor) -> None:
    """Refuse an input (B, 3, H, W) of the model `name` that is no square of a side that it can take.

    Raises:
        ValueError: the input is no square, or its side no multiple of `SIDE_MULTIPLE`.
    """
    height, width = pixels.shape[2:]
    if height != width or height % SIDE_MULTIPLE:
        raise ValueError(f"{name}: expected a square of {SIDE_MULTIPLE}k pixels, got {height}x{width}")


@contextmanager
def exact_places(layer: Any) -> Iterator[None]:
    """While a model changes its type: positions of prompts stay float32, in half precision they would be off by pixels.

    Args:
        layer: PositionEmbeddingRandom of a prompt encoder, the same class in both packages.
    """
    exact = layer.positional_encoding_gaussian_matrix
    yield
    moved = layer.positional_encoding_gaussian_matrix
    layer.positional_encoding_gaussian_matrix = moved.float() if exact.is_meta else exact.to(moved.device)
