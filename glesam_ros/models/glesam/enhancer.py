"""GleSAM's enhancer: one denoising step of a Stable Diffusion U-Net restores the latent of a bad picture.

Read top to bottom: the configuration, the step and its checks (`OneStep`), the level of GleSAM++ (`LevelPredictor`,
`LevelEmbedding`), the published enhancer (`Enhancer`), the small one that learns from it (`SmallEnhancer`), files.

    z_hat = (gamma z_L - sqrt(1 - abar_T) eps(gamma z_L, T)) / (gamma sqrt(abar_T))

z_L is what SAM's image encoder says of the degraded picture; it takes the place of a noisy latent, no noise is added.
eps is the noise that the U-Net predicts, T a fixed timestep, abar the schedule of Stable Diffusion. gamma brings the
latent to the scale that the U-Net was trained on (FDA, feature distribution alignment). The U-Net knows 4 channels, the
latent has 256: the first and the last convolution are replicated 64 times (CRE, channel replication and expansion).
Only LoRA matrices are trained.

Source: GleSAM (CVPR 2025, arXiv 2503.12507), section 3; GleSAM++ (arXiv 2601.02018).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.models.glesam.base import LATENT_CHANNELS, Features
from glesam_ros.models.glesam.catalogue import (
    CONFIG_FILE,
    DECODER_FILE,
    LEVEL_FILE,
    LORA_FILE,
    PROMPT_FILE,
    SMALL_FILE,
    TEXT_WIDTHS,
    text_paths,
)
from glesam_ros.models.glesam.one_step import SIDE_DIVISOR, SIDE_MULTIPLE, TIMESTEPS, alpha_bar, one_step
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators
from glesam_ros.models.glesam.weights import load_exactly, lora_to_diffusers, lora_to_peft, read_tensors
from glesam_ros.whole_files import write_bytes, write_together

allow_import_without_operators()  # diffusers and peft, which are imported below, want torchvision

UNet2DConditionModel = Any
"""diffusers' class; what it consists of is made at run time, and no checker of types sees it."""

UNETS: dict[str, dict[str, Any]] = {
    "sd21-base": {
        "sample_size": 64,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": TEXT_WIDTHS["sd21-base"],
        "use_linear_projection": True,
    },
    "sd15": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": TEXT_WIDTHS["sd15"]},
}
"""Where the U-Nets of Stable Diffusion 2.1-base and 1.5 differ from `diffusers.UNet2DConditionModel`'s defaults."""

UNET_CHANNELS = 4
"""Channels of the latent that Stable Diffusion was trained with."""
TOKENS = 77
"""Length of a prompt in tokens, the empty one too."""
LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    "conv_in", "conv_out",
]
"""Endings of the names of the adapted layers, as published: 280 of them in either U-Net."""
SAM2_HIGH_CHANNELS = (32, 64)
"""Channels of `Features.high` of SAM 2, at stride 4 and 8."""


@dataclass(frozen=True)
class EnhancerConfig:
    """What an enhancer is; the content of `glesam.json`.

    Attributes:
        base: model whose latent is restored, a name of `catalogue.BASES`.
        kind: "lora" (`Enhancer`) or "small" (`SmallEnhancer`).
        unet: name in `UNETS`; of a small enhancer, the U-Net of its teacher.
        gamma: factor of the latent before the U-Net, > 0.
        timestep: T in 0..999.
        rank, alpha: of LoRA; the update is alpha / rank * B A.
        levels: GleSAM++: predicts the degradation level and is told it.
        channels: of the latent, a multiple of 4.

    Raises:
        ValueError: a value is out of its range.
    """

    base: str
    kind: str
    unet: str
    gamma: float = 5.0
    timestep: int = 1
    rank: int = 8
    alpha: int = 8
    levels: bool = False
    channels: int = LATENT_CHANNELS

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "small"):
            raise ValueError(f"kind: expected lora or small, got {self.kind!r}")
        if self.unet not in UNETS:
            raise ValueError(f"unet: expected one of {', '.join(UNETS)}, got {self.unet!r}")
        if not (isinstance(self.gamma, (int, float)) and math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma: expected a number > 0, got {self.gamma!r}")
        if not (isinstance(self.timestep, int) and 0 <= self.timestep < TIMESTEPS):
            raise ValueError(f"timestep: expected a whole number in 0..{TIMESTEPS - 1}, got {self.timestep!r}")
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if not isinstance(self.levels, bool):
            raise ValueError(f"levels: expected true or false, got {self.levels!r}")
        if not (isinstance(self.channels, int) and self.channels > 0 and self.channels % UNET_CHANNELS == 0):
            raise ValueError(f"channels: expected a multiple of {UNET_CHANNELS}, got {self.channels!r}")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files beside `glesam.json`; that of the mask decoder may be missing."""
        network = LORA_FILE if self.kind == "lora" else SMALL_FILE
        return (network, LEVEL_FILE) if self.levels else (network,)

    @property
    def model(self) -> str:
        """Name of the base with this enhancer, as in `catalogue`."""
        return f"{self.base}+{'glesam_small' if self.kind == 'small' else 'glesam++' if self.levels else 'glesam'}"


class OneStep(nn.Module, ABC):
    """What both enhancers share: the step, its checks, the level predictor of GleSAM++.

    Nothing depends on the values of a tensor, so that the forward pass can be captured as a CUDA graph, compiled and
    exported. Convolutions run fastest after `to(memory_format=torch.channels_last)`.
    """

    def __init__(self, config: EnhancerConfig) -> None:
        super().__init__()
        self.config = config
        self.share = alpha_bar(config.timestep)
        self.level = LevelPredictor(config) if config.levels else None

    @abstractmethod
    def predict_noise(self, scaled: Tensor, level: Tensor | None) -> Tensor:
        """gamma z (B, C, h, w) float32 or float64 and the level (B,), None without levels -> noise of that shape."""

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]:
        """What an optimiser gets; all else is frozen."""

    @abstractmethod
    def files(self) -> dict[str, nn.Module]:
        """Modules whose weights are files of their own, whole, by the name of the file."""

    def fuse(self, dtype: torch.dtype | None = None) -> None:
        """Take out what inference does not need apart, with the same output; a second time nothing happens.

        Args:
            dtype: what is fused may take it at once, so that less memory is needed; None leaves the type as it is.
        """

    def for_inference(self, dtype: torch.dtype) -> None:
        """Make it fast, in place: fuse it in float32, narrow it to `dtype`; the level predictor stays float32.

        Raises:
            ValueError: LoRA is not finite.
        """
        self.fuse(dtype)
        predictor, self.level = self.level, None
        self.to(dtype)
        self.level = predictor
        self.eval().requires_grad_(False)

    def forward(self, latent: Tensor, level: Tensor | None = None) -> Tensor:
        """Restore latents.

        Args:
            latent: (B, C, h, w), h and w multiples of 8, float of any width.
            level: (B,) degradation in 0 (clear) .. 1 (LQ-3); a model without levels ignores it.

        Returns:
            (B, C, h, w) in the type of `latent`. The network runs in the type of its weights (or of autocast), the
            step in float32 at least.

        Raises:
            ValueError: a shape is wrong, or the level is missing where the model needs it.
        """
        channels = self.config.channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(f"latent: expected shape (B, {channels}, h, w), got {tuple(latent.shape)}")
        if latent.shape[2] % SIDE_DIVISOR or latent.shape[3] % SIDE_DIVISOR:
            raise ValueError(
                f"latent: expected sides that are multiples of {SIDE_DIVISOR}, got {latent.shape[2]} x "
                f"{latent.shape[3]}; take a processing size that is a multiple of {SIDE_MULTIPLE}"
            )
        if not self.config.levels:
            level = None
        elif level is None:
            raise ValueError("level: expected a tensor (B,), got None; this enhancer was trained with levels")
        elif level.shape != latent.shape[:1]:
            raise ValueError(f"level: expected shape ({latent.shape[0]},), got {tuple(level.shape)}")
        scaled = self.config.gamma * latent.to(torch.promote_types(latent.dtype, torch.float32))
        noise = self.predict_noise(scaled, level).to(scaled.dtype)
        return one_step(scaled, noise, self.config.gamma, self.share).to(latent.dtype)

    def predict_level(self, features: Features) -> Tensor:
        """Degradation (B,) float32 in 0 (clear) .. 1 (LQ-3) of B images.

        Raises:
            ValueError: the enhancer was made without levels.
        """
        if self.level is None:
            raise ValueError("predict_level: expected an enhancer with levels (GleSAM++), got one without")
        return self.level(features)


class LevelPredictor(nn.Module):
    """Degradation-level prediction of GleSAM++: how bad the picture is, from what the encoder says of it.

    The paper's details are not public; this is our design. Blur, noise and blocks change the statistics of features
    more than their layout, so the mean and the deviation of each channel over all positions are enough: of the latent,
    and of the levels at stride 4 and 8 where the encoder gives them (SAM 2), which are closest to the pixels. The
    logarithm of a deviation needs no normalisation, which would take out what noise does to all of them at once. It is
    trained on LQSeg, level k as k / 3, and clear pictures as 0. The pipeline's auto mode skips the enhancer on a frame
    whose level is low.
    """

    def __init__(self, config: EnhancerConfig) -> None:
        super().__init__()
        self.high = len(SAM2_HIGH_CHANNELS) if config.base.startswith("sam2") else 0
        statistics = 2 * (config.channels + sum(SAM2_HIGH_CHANNELS[: self.high]))
        self.first = nn.Linear(statistics, 128)
        self.last = nn.Linear(128, 1)

    def forward(self, features: Features) -> Tensor:
        """Features -> level (B,) float32 in 0..1.

        Raises:
            ValueError: features of another base model.
        """
        if len(features.high) != self.high:
            raise ValueError(f"features: expected {self.high} high levels, got {len(features.high)}")
        parts = []
        for x in (features.latent, *features.high):
            deviation, mean = torch.std_mean(x.float(), (2, 3), correction=0)
            parts += [mean, (deviation + 1e-5).log()]
        statistics = torch.cat(parts, 1).to(self.first.weight.dtype)
        return torch.sigmoid(self.last(F.silu(self.first(statistics))).float().squeeze(1))


class LevelEmbedding(nn.Module):
    """Level (B,) -> (B, width), what the U-Net adds to the embedding of its timestep: GleSAM++'s condition.

    Sines and cosines of the level, then an MLP, as for the timestep. The fastest turns 1.5 times between clear and
    LQ-3: LQSeg's levels stand 1/3 apart, and nothing is learnt of what turns faster. The last layer begins at zero, so
    that a model that gets levels begins as it was without. At level 0 it may learn to leave a latent as it is.
    """

    FREQUENCIES = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * self.FREQUENCIES, width)
        self.last = nn.Linear(width, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, level: Tensor) -> Tensor:
        """(B,) -> (B, width) in the type of the weights."""
        turns = torch.arange(1, self.FREQUENCIES + 1, device=level.device, dtype=torch.float32)
        angles = math.pi * level.float()[:, None] * turns
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(self.first.weight.dtype)
        return self.last(F.silu(self.first(waves)))


class Enhancer(OneStep):
    """GleSAM's enhancer: a frozen U-Net of Stable Diffusion with replicated channels (CRE) and LoRA.

    With `config.levels` it is GleSAM++'s: the level joins the embedding of the timestep by diffusers' way of class
    embeddings.

    For inference see `for_inference`.
    """

    def __init__(self, config: EnhancerConfig, unet: UNet2DConditionModel, prompt: Tensor) -> None:
        """Adapt a U-Net, in place.

        Args:
            unet: plain, 4 channels in and out.
            prompt: (1, 77, C) float, what the text encoder of that U-Net says of the empty prompt.

        Raises:
            ValueError: the U-Net has other channels, or the prompt another shape.
        """
        super().__init__(config)
        from peft import LoraConfig

        width = unet.config.cross_attention_dim
        if prompt.shape != (1, TOKENS, width):
            raise ValueError(f"prompt: expected shape (1, {TOKENS}, {width}) of this U-Net, got {tuple(prompt.shape)}")
        replicate_channels(unet, config.channels)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=LORA_TARGETS))
        if config.levels:
            unet.class_embedding = LevelEmbedding(unet.time_embedding.linear_2.out_features)
        self.unet = unet
        self.register_buffer("prompt", prompt.detach().clone(), persistent=False)
        # a tensor on the device: a number would be copied there in every call
        self.register_buffer("step", torch.tensor([config.timestep], device=prompt.device), persistent=False)
        self.prompt: Tensor
        self.step: Tensor

    def predict_noise(self, scaled: Tensor, level: Tensor | None) -> Tensor:
        x = scaled.to(self.unet.conv_in.weight.dtype)
        prompt = self.prompt.to(x.dtype).expand(len(x), -1, -1)
        return self.unet(x, self.step, encoder_hidden_states=prompt, class_labels=level, return_dict=False)[0]

    def lora_state(self) -> dict[str, Tensor]:
        """The LoRA matrices in peft's key layout, "<module>.lora_A.default.weight"; empty once they are merged."""
        return {key: x for key, x in self.unet.state_dict().items() if is_lora(key)}

    def trained_parameters(self) -> list[nn.Parameter]:
        """LoRA, and what GleSAM++ adds."""
        lora = [p for name, p in self.unet.named_parameters() if is_lora(name)]
        return [*lora, *(p for module in self.files().values() for p in module.parameters())]

    def load_lora(self, state: Mapping[str, Tensor], what: str) -> None:
        """Take LoRA matrices in the layout of `lora_state`; `what` they are, for errors.

        Raises:
            ValueError: a matrix is missing, left over, or of another shape.
        """
        trained = self.lora_state()
        frozen = [key for key in self.unet.state_dict() if key not in trained]
        load_exactly(self.unet, state, what, ignore=frozen)

    def files(self) -> dict[str, nn.Module]:
        """As above; of the level, keys "predictor.*" and "embedding.*"."""
        if self.level is None:
            return {}
        return {LEVEL_FILE: nn.ModuleDict({"predictor": self.level, "embedding": self.unet.class_embedding})}

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Training takes less memory and more time."""
        if on:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

    def fuse(self, dtype: torch.dtype | None = None) -> None:
        """Merge LoRA, then fold constants."""
        if self.lora_state():
            self.merge_lora(dtype)
            self.fold_constants()

    def merge_lora(self, dtype: torch.dtype | None = None) -> None:
        """W0 + alpha / r B A takes the place of each adapted layer: the same output without the cost of LoRA.

        Merge while the weights are float32. There is no way back.

        Args:
            dtype: of each layer once it is merged, see `merge_layers`; what `fold_constants` reads is left as it is.

        Raises:
            ValueError: LoRA is not finite.
        """
        merge_layers(self.unet, lambda name: None if self._becomes_constant(name) else dtype)

    def _becomes_constant(self, name: str) -> bool:
        """Whether `fold_constants` reads the layer `name` of the U-Net and drops it."""
        ends = ("attn2.to_k", "attn2.to_v") if self.config.levels else ("attn2.to_k", "attn2.to_v", "time_emb_proj")
        return name.endswith(ends)

    def fold_constants(self) -> None:
        """Compute once what is the same in every call, with the same output.

        T and the empty prompt never change: the embedding of T, and the keys and values of the prompt in each cross
        attention become constants; without levels, the shift of each residual block by the embedding does, too. Their
        layers are dropped (of SD 2.1-base 53 million parameters).

        Raises:
            ValueError: LoRA is not merged yet.
        """
        if self.lora_state():
            raise ValueError("fold_constants: expected merged weights, got LoRA; call merge_lora() first")
        unet = self.unet
        with torch.no_grad():
            embedding = unet.time_embedding(unet.time_proj(self.step).to(unet.time_embedding.linear_1.weight.dtype))
            inputs = {"time_emb_proj": F.silu(embedding), "to_k": self.prompt, "to_v": self.prompt}
            for name, module in list(unet.named_modules()):
                if self._becomes_constant(name):
                    parent, _, own = name.rpartition(".")
                    block = unet.get_submodule(parent)
                    block.register_module(own, Constant(module(inputs[own].to(module.weight.dtype))))
                    if own == "time_emb_proj":
                        block.skip_time_act = True
        unet.time_proj = nn.Identity()
        unet.time_embedding = Constant(embedding)


def merge_layers(unet: UNet2DConditionModel, dtype_of: Callable[[str], torch.dtype | None]) -> None:
    """Merge the LoRA of a U-Net layer by layer, so that no second network is ever in memory, and freeze it.

    Args:
        dtype_of: says of the name of an adapted layer which type its weight takes once it is merged; None: its own.

    Raises:
        ValueError: LoRA is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            try:
                layer.merge(safe_merge=True)  # in a copy: the weight may be a view of its file
            except ValueError as error:
                raise ValueError(f"unet.{name}: expected finite LoRA weights: {error}") from error
            weight: Any = layer.get_base_layer().weight
            weight.data = weight.data.to(dtype_of(name) or weight.dtype)
    unet.unload_lora()
    unet.requires_grad_(False)


def is_lora(key: str) -> bool:
    """Whether a parameter of the U-Net is of LoRA, by its name."""
    return ".lora_A." in key or ".lora_B." in key


class Constant(nn.Module):
    """A layer whose output does not depend on its input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.value: Tensor

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, ...) -> the value, B times."""
        return self.value.expand(len(x), *self.value.shape[1:])


def replicate_channels(unet: UNet2DConditionModel, channels: int) -> None:
    """CRE: give the U-Net `channels` in and out, in place, by copies of what it has for 4.

    Copies are not scaled: the first convolution of a latent of equal groups gives 64 times what it gave for one, which
    the group norms after it take out.

    Raises:
        ValueError: the U-Net has not 4 channels in and out.
    """
    found = (unet.conv_in.in_channels, unet.conv_out.out_channels)
    if found != (UNET_CHANNELS, UNET_CHANNELS):
        raise ValueError(f"unet: expected 4 channels in and out, got {found[0]} and {found[1]}")
    copies = channels // UNET_CHANNELS
    with torch.no_grad():
        unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.repeat(1, copies, 1, 1))
        unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.repeat(copies, 1, 1, 1))
        unet.conv_out.bias = nn.Parameter(unet.conv_out.bias.repeat(copies))
    unet.conv_in.in_channels = unet.conv_out.out_channels = channels
    unet.register_to_config(in_channels=channels, out_channels=channels)


class SmallEnhancer(OneStep):
    """A U-Net of 30 million parameters that learns from an `Enhancer`, for computers on board.

    The same step around a network of our own: 256 channels in and out, trained from nothing. `config.timestep` may be
    larger than the teacher's: at T = 1 the noise is 24 gamma times the error of the latent, at T = 100 2.9 gamma times,
    which a network from nothing learns faster. The last convolution begins at zero, the output thus as z / sqrt(abar).
    """

    def __init__(self, config: EnhancerConfig) -> None:
        super().__init__(config)
        self.unet = SmallUNet(config.channels, config.levels)

    def predict_noise(self, scaled: Tensor, level: Tensor | None) -> Tensor:
        return self.unet(scaled.to(self.unet.conv_in.weight.dtype), level)

    def trained_parameters(self) -> list[nn.Parameter]:
        """All of it."""
        return list(self.parameters())

    def files(self) -> dict[str, nn.Module]:
        level = {} if self.level is None else {LEVEL_FILE: nn.ModuleDict({"predictor": self.level})}
        return {SMALL_FILE: self.unet, **level}


class SmallUNet(nn.Module):
    """Three scales of plain 3 x 3 convolutions, attention at the coarsest only.

    Depthwise convolutions would have fewer operations and be no faster: they are bound by memory and leave the tensor
    cores of a Jetson idle. At the full resolution of the latent, where pixels are many, the width is smallest; most
    parameters are at a quarter of it, where an attention over all positions is cheap (256 for an image of 1024).
    """

    WIDTHS = (128, 256, 512)
    CONDITION = 256
    """Width of the level's embedding."""

    def __init__(self, channels: int, levels: bool) -> None:
        super().__init__()
        fine, middle, coarse = self.WIDTHS
        condition = self.CONDITION if levels else 0
        self.level = LevelEmbedding(condition) if levels else None
        self.conv_in = nn.Conv2d(channels, fine, 3, padding=1)
        self.down_fine = nn.ModuleList(ResidualBlock(fine, fine, condition) for _ in range(2))
        self.to_middle = nn.Conv2d(fine, middle, 3, 2, 1)
        self.down_middle = nn.ModuleList(ResidualBlock(middle, middle, condition) for _ in range(2))
        self.to_coarse = nn.Conv2d(middle, coarse, 3, 2, 1)
        self.before = nn.ModuleList(ResidualBlock(coarse, coarse, condition) for _ in range(2))
        self.attention = SelfAttention(coarse)
        self.after = nn.ModuleList(ResidualBlock(coarse, coarse, condition) for _ in range(2))
        self.from_coarse = nn.Conv2d(coarse, middle, 3, padding=1)
        self.up_middle = nn.ModuleList(ResidualBlock(width, middle, condition) for width in (2 * middle, middle))
        self.from_middle = nn.Conv2d(middle, fine, 3, padding=1)
        self.up_fine = nn.ModuleList(ResidualBlock(width, fine, condition) for width in (2 * fine, fine))
        self.norm_out = nn.GroupNorm(32, fine)
        self.conv_out = nn.Conv2d(fine, channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        """gamma z (B, C, h, w), level (B,) where the network has levels -> noise (B, C, h, w)."""
        condition = self.level(level) if self.level is not None else None

        def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, condition)
            return x

        fine = run(self.down_fine, self.conv_in(x))
        middle = run(self.down_middle, self.to_middle(fine))
        x = run(self.before, self.to_coarse(middle))
        x = run(self.after, self.attention(x))
        x = self.from_coarse(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = run(self.up_middle, torch.cat([x, middle], 1))
        x = self.from_middle(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = run(self.up_fine, torch.cat([x, fine], 1))
        return self.conv_out(F.silu(self.norm_out(x)))


class ResidualBlock(nn.Module):
    """Norm, activation, convolution, twice; the level scales and shifts in between."""

    def __init__(self, inside: int, outside: int, condition: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * outside, bias=False) if condition else None
        self.norm2 = nn.GroupNorm(32, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """(B, inside, h, w), embedded level (B, condition) where there is one -> (B, outside, h, w)."""
        y = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.condition is not None:
            scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
            y = y * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class SelfAttention(nn.Module):
    """Every position sees every other."""

    HEADS = 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.HEADS, c // self.HEADS, h * w).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file that others may read as the umask allows; safetensors' own are for their owner alone.

    Whole or not at all: a computer that is switched off meanwhile leaves the file as it was.
    """
    from safetensors.torch import save

    content = save({key: x.detach().cpu().contiguous() for key, x in tensors.items()})
    write_bytes(file, content)


def save_enhancer(
    enhancer: Enhancer | SmallEnhancer, folder: Path, decoder: Mapping[str, Tensor] | None = None
) -> None:
    """Write what was trained: `glesam.json` and safetensors files; LoRA in diffusers' key layout.

    Args:
        folder: made if missing; files of the same names are replaced, once all of them are written beside. While they
            are, it has no `glesam.json`.
        decoder: weights of the mask decoder after stage 2; None leaves a file of them as it is.

    Raises:
        ValueError: LoRA is merged already.
    """
    states: dict[str, Mapping[str, Tensor]] = {name: m.state_dict() for name, m in enhancer.files().items()}
    if isinstance(enhancer, Enhancer):
        lora = enhancer.lora_state()
        if not lora:
            raise ValueError("save_enhancer: expected LoRA, got merged weights; save before merge_lora()")
        states[LORA_FILE] = lora_to_diffusers(lora)
    if decoder is not None:
        states[DECODER_FILE] = decoder
    files: dict[str, Callable[[Path], Any]] = {name: partial(write_tensors, state) for name, state in states.items()}
    config = json.dumps(asdict(enhancer.config), indent=2) + "\n"
    files[CONFIG_FILE] = partial(Path.write_text, data=config, encoding="utf-8")
    write_together(folder, files, clear=partial((folder / CONFIG_FILE).unlink, missing_ok=True))


def load_unet(folder: Path) -> UNet2DConditionModel:
    """A U-Net as published, from `config.json` and `diffusion_pytorch_model.safetensors`, on the CPU in float32.

    Its matrices are views of the file, which has to stay as it is until they are replaced.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the weights do not fit the configuration.
    """
    from diffusers import UNet2DConditionModel as Network

    config = read_object(folder / "config.json")
    file = folder / "diffusion_pytorch_model.safetensors"
    with torch.device("meta"):  # its random weights would take many seconds
        unet = Network.from_config(config)
    # no second copy in memory; what is small is copied, so that the file can be let go when the rest is merged
    state = {key: x.to(torch.float32, copy=x.ndim < 2) for key, x in read_tensors(file).items()}
    load_exactly(unet, state, str(file), assign=True)
    return unet


def empty_prompt(folder: Path) -> Tensor:
    """What the text encoder of a Stable Diffusion says of the empty prompt: (1, 77, C) float32.

    Computed once with `folder`/tokenizer and `folder`/text_encoder, then read from `folder`/empty_prompt.safetensors.

    Raises:
        FileNotFoundError: neither that file nor tokenizer and text encoder are there.
        ValueError: weights of the text encoder are missing or too many, or the file holds something else.
    """

    def embed() -> Tensor:
        tokenizer, encoder = load_text_encoder(folder)
        # 2.1 pads with "!", 1.5 with its end token: the tokenizer's files say so
        ids = tokenizer("", padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            prompt: Tensor = encoder(ids).last_hidden_state
        return prompt

    return embedded_once(folder / PROMPT_FILE, embed)


def embedded_once(file: Path, embed: Callable[[], Tensor]) -> Tensor:
    """The prompt (1, 77, C) float32 in a file; `embed` makes it where there is none yet.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.is_file():
        write_tensors({"prompt": embed()}, file)
    found = read_tensors(file)
    if "prompt" not in found:
        raise ValueError(f"{file}: expected the key prompt, got {', '.join(sorted(found)) or 'none'}; remove it")
    return found["prompt"]


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and CLIP text encoder of a Stable Diffusion, from `folder`/tokenizer and `folder`/text_encoder.

    Returns:
        transformers' CLIPTokenizer, and its CLIPTextModel on the CPU, in float32, for inference.

    Raises:
        FileNotFoundError: one of the folders, or a file of the tokenizer is missing.
        ValueError: tokenizer or weights of the text encoder cannot be read, or weights are missing, or too many.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    for path in text_paths(folder):
        if not path.exists():
            part = path.relative_to(folder).parts[0]
            raise FileNotFoundError(f"expected the {part} of a Stable Diffusion at {path}, found none")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # of a broken file tokenizers raises just that
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder / 'tokenizer'}: expected a tokenizer of CLIP, cannot read it: {reason}") from error
    if (weights := folder / "text_encoder" / "model.safetensors").is_file():
        read_tensors(weights)  # transformers does not say which file is cut or none of tensors
    found: Any = CLIPTextModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, output_loading_info=True
    )
    encoder, report = found
    # transformers takes random numbers for what is missing, and leaves out what it does not know
    faults = [
        f"{name}: {', '.join(sorted(keys)[:8])}"
        for name in ("missing", "unexpected") if (keys := report[f"{name}_keys"])
    ]
    if faults:
        raise ValueError(f"{folder / 'text_encoder'}: expected the weights of a CLIP text encoder; {'; '.join(faults)}")
    return tokenizer, encoder.float().eval().requires_grad_(False)


def load_config(folder: Path) -> EnhancerConfig:
    """What `glesam.json` says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or a field is missing, unknown or out of range.
    """
    file = folder / CONFIG_FILE
    fields = read_object(file)
    try:
        return EnhancerConfig(**fields)
    except TypeError as error:  # of a missing or an unknown field
        raise ValueError(f"{file}: expected the fields of EnhancerConfig: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def load_enhancer(folder: Path, unets: Path) -> Enhancer | SmallEnhancer:
    """Read what `save_enhancer` wrote, or the LoRA file that the paper's authors published beside a `glesam.json`.

    Args:
        unets: holds `<unet>/unet/config.json` and `diffusion_pytorch_model.safetensors` as published by Stable
            Diffusion, and what `empty_prompt` needs; a small enhancer does not read it.

    Returns:
        The enhancer on the CPU, in float32, for inference.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights do not fit, or as `load_config`.
    """
    config = load_config(folder)
    enhancer: Enhancer | SmallEnhancer
    if config.kind == "small":
        enhancer = SmallEnhancer(config)
    else:
        enhancer = Enhancer(config, load_unet(unets / config.unet / "unet"), empty_prompt(unets / config.unet))
    read_trained(enhancer, folder)
    return enhancer.eval()


def read_trained(enhancer: Enhancer | SmallEnhancer, folder: Path) -> None:
    """Read into an enhancer what was trained of it: LoRA, and the files of `files`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights do not fit.
    """
    if isinstance(enhancer, Enhancer):
        file = folder / LORA_FILE
        enhancer.load_lora(lora_to_peft(read_tensors(file)), str(file))
    for name, module in enhancer.files().items():
        load_exactly(module, read_tensors(folder / name), str(folder / name))
