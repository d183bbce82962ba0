"""The image encoder of MobileSAM: a TinyViT of 5 M parameters with SAM's neck.

Read top to bottom: the blocks of convolutions, the blocks of attention, the encoder. Names of modules are those of the
official checkpoint, `mobile_sam.pt`.

Source: MobileSAM (arXiv 2306.14289); TinyViT (arXiv 2207.10666).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.base import LATENT_CHANNELS

EXPANSION = 4
"""Hidden channels of inverted bottlenecks and MLPs, for each channel outside."""
CLASSIFIER = ("norm_head.", "head.")
"""Beginnings of keys of a checkpoint that belong to TinyViT's classifier on ImageNet; SAM has no use for it."""


@dataclass(frozen=True)
class TinyVitConfig:
    """Four stages: one of convolutions, three of attention; the default is TinyViT-5M.

    Attributes:
        widths: channels of each stage.
        depths: blocks of each stage.
        heads: of attention, from the second stage.
        windows: side of the attention windows in cells, from the second stage.
    """

    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int] = (4, 5, 10)
    windows: tuple[int, int, int] = (7, 14, 7)


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size, or halves it with stride 2, and its batch norm."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outside)


class Bottleneck(nn.Module):
    """Inverted bottleneck with a residual: widen, convolve each channel by itself, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = EXPANSION * width
        self.conv1 = ConvNorm(width, hidden, 1)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Downsample(nn.Module):
    """Between two stages: other channels, and half the size with stride 2."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, outside, 1)
        self.conv2 = ConvNorm(outside, outside, 3, stride, groups=outside)
        self.conv3 = ConvNorm(outside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, h, w) -> (B, outside, h / stride, w / stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Attention among the n x n cells of a window, with a learnt bias for each distance in x and y."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, x: Tensor) -> Tensor:
        """(windows, n * n, C) -> (windows, n * n, C)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (self.heads, 3, -1)).transpose(1, 2).unbind(3)
        at = torch.arange(self.window, device=x.device)
        apart = (at[:, None] - at).abs()  # the bias of a distance (dy, dx) is number dy * n + dx
        offsets = apart[:, None, :, None] * self.window + apart[None, :, None, :]
        bias = self.attention_biases[:, offsets].flatten(3).flatten(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), -1, -1, -1))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, EXPANSION * width)
        self.fc2 = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class WindowBlock(nn.Module):
    """Attention in windows, a convolution of each channel across their edges, an MLP."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.local_conv(x + self._attend(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        """(B, h, w, C), padded with zeros to whole windows and cut again, as the weights were trained."""
        batch, height, width, channels = x.shape
        n = self.window
        x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
        rows, columns = x.shape[1] // n, x.shape[2] // n
        x = x.reshape(batch, rows, n, columns, n, channels).transpose(2, 3).reshape(-1, n * n, channels)
        x = self.attn(x).reshape(batch, rows, columns, n, n, channels).transpose(2, 3)
        return x.reshape(batch, rows * n, columns * n, channels)[:, :height, :width]


class Stage(nn.Module):
    """Blocks at one size, and the way to the next."""

    def __init__(self, blocks: list[nn.Module], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C of the next stage, its h, its w)."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyVit(nn.Module):
    """Pixels to a latent at stride 16.

    Trained at 1024 px. Positions enter as biases of distances within a window and by convolutions, never as absolute
    ones, so that any side that is a multiple of 16 works with the same weights and without interpolation.

    Args:
        config: widths and depths.
    """

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__()
        first, *_, last = config.widths
        stem = nn.Sequential(ConvNorm(3, first // 2, 3, 2), nn.GELU(), ConvNorm(first // 2, first, 3, 2))
        self.patch_embed = nn.ModuleDict({"seq": stem})
        self.layers = nn.ModuleList()
        # the last step keeps the size, unlike TinyViT's, so that the stride is 16
        for index, (width, depth, stride) in enumerate(zip(config.widths, config.depths, (2, 2, 1, 0))):
            blocks: list[nn.Module] = [
                WindowBlock(width, config.heads[index - 1], config.windows[index - 1]) if index else Bottleneck(width)
                for _ in range(depth)
            ]
            self.layers.append(Stage(blocks, Downsample(width, config.widths[index + 1], stride) if stride else None))
        self.neck = nn.Sequential(
            nn.Conv2d(last, LATENT_CHANNELS, 1, bias=False), ChannelNorm(LATENT_CHANNELS, eps=1e-6),
            nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(LATENT_CHANNELS, eps=1e-6),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        x = self.patch_embed["seq"](pixels)
        for stage in self.layers:
            x = stage(x)
        return self.neck(x)
