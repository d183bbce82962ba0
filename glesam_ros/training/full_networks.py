"""The networks of a run at full size: base and enhancer, from files or tiny and random."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glesam_ros.models.glesam import catalogue
from glesam_ros.models.glesam.base import BaseModel, Features
from glesam_ros.models.glesam.enhancer import (
    CONFIG_FILE,
    DECODER_FILE,
    TOKENS,
    Enhancer,
    EnhancerConfig,
    SmallEnhancer,
    UNet2DConditionModel,
    empty_prompt,
    load_unet,
    read_trained,
    save_enhancer,
)
from glesam_ros.models.glesam.enhancer import load_config as load_enhancer_config
from glesam_ros.models.glesam.model import build_base, load_base
from glesam_ros.models.glesam.weights import decoder_state, load_exactly, read_tensors
from glesam_ros.training.full_config import FullConfig

RANDOM_UNET: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
    "cross_attention_dim": 16, "use_linear_projection": True,
}
"""Where the U-Net of a `random` run differs from diffusers' defaults."""
RANDOM_VIT = (32, 2, 2, (1,))
"""`SamConfig` of a `random` run."""
RANDOM_HIERA = (
    "model.image_encoder.trunk.embed_dim=8", "model.image_encoder.trunk.stages=[1,1,2,1]",
    "model.image_encoder.trunk.global_att_blocks=[3]", "model.image_encoder.neck.backbone_channel_list=[64,32,16,8]",
    "model.memory_attention.num_layers=1",
)
"""Where the SAM 2 of a `random` run differs from the tiny one."""


class Networks(nn.Module):
    """A base, its enhancer, and a small enhancer where one is distilled.

    Attributes:
        side: of the square input in pixels.
    """

    def __init__(self, base: BaseModel, enhancer: Enhancer, side: int) -> None:
        super().__init__()
        self.base, self.enhancer, self.side = base, enhancer, side
        self.small: SmallEnhancer | None = None

    def features(self, images: Tensor) -> Features:
        """What the frozen encoder says of images (B, H, W, 3) uint8, in float32 and without gradient."""
        with torch.no_grad():
            features = self.base.encode(self.base.pixels(images, self.side))
        return Features(features.latent.float(), features.high)

    def level(self, features: Features) -> Tensor | None:
        """The level (B,) that the enhancer is told: the predicted one, as it will be on the robot; None without."""
        if self.enhancer.level is None:
            return None
        with torch.no_grad():
            return self.enhancer.predict_level(features)

    def add_small(self, timestep: int) -> SmallEnhancer:
        """Merge the enhancer, now a teacher, and add a small one that has its level predictor."""
        config = dataclasses.replace(self.enhancer.config, kind="small", timestep=timestep)
        if self.enhancer.lora_state():
            self.enhancer.merge_lora()
        self.small = SmallEnhancer(config)
        if self.small.level is not None and self.enhancer.level is not None:
            self.small.level.load_state_dict(self.enhancer.level.state_dict())
        return self.small


def load_networks(config: FullConfig) -> Networks:
    """Base and enhancer on the CPU, in float32; a fresh LoRA, or that of `config.start`.

    Raises:
        ValueError: the base is not known, weights do not fit, or `start` has another configuration.
        FileNotFoundError: weights are missing.
        ModuleNotFoundError: a package is missing.
    """
    if config.base not in catalogue.BASES:
        raise ValueError(f"base: expected one of {', '.join(catalogue.BASES)}, got {config.base!r}")
    base = _random_base(catalogue.BASES[config.base].family) if config.random else _base(config)
    unet, prompt = _unet(config)
    enhancer = Enhancer(
        EnhancerConfig(base=base.name, kind="lora", unet=config.unet, **dataclasses.asdict(config.enhancer)),
        unet, prompt,
    )
    networks = Networks(base, enhancer, config.side)
    if config.start is not None:
        _start(networks, Path(config.start))
    enhancer.set_gradient_checkpointing(config.gradient_checkpointing)
    return networks.eval().requires_grad_(False)


def write_enhancer(networks: Networks, out: Path, decoder: bool) -> Path:
    """Write the trained enhancer, the small one where there is one, so that its folder may be put into GLESAM_HOME.

    Args:
        decoder: write the mask decoder, too.

    Returns:
        `out`/BASE+ENHANCER.
    """
    enhancer = networks.small or networks.enhancer
    folder = out / enhancer.config.model
    save_enhancer(enhancer, folder, networks.base.mask_decoder.state_dict() if decoder else None)
    return folder


def _base(config: FullConfig) -> BaseModel:
    if config.base_file is None:
        return load_base(config.base, catalogue.home())
    state = read_tensors(Path(config.base_file))
    base = build_base(config.base)
    base.load_official(state)
    return base


def _random_base(family: str) -> BaseModel:
    if family == "sam2":
        from glesam_ros.models.glesam.sam2 import SAM2_SIZES, Sam2Config, build_sam2

        return build_sam2("sam2_random", Sam2Config(SAM2_SIZES["sam2.1_hiera_tiny"].file, RANDOM_HIERA))
    from glesam_ros.models.glesam.sam import SamConfig, build_sam

    return build_sam("sam_random", SamConfig(*RANDOM_VIT))


def _unet(config: FullConfig) -> tuple[UNet2DConditionModel, Tensor]:
    """The U-Net and its empty prompt."""
    if config.random and config.unet_folder is None:
        from diffusers import UNet2DConditionModel as Network

        return Network(**RANDOM_UNET), torch.randn(1, TOKENS, RANDOM_UNET["cross_attention_dim"])
    if config.unet_folder is None:
        folder = catalogue.unet_folder(config.unet, config.unet, catalogue.home()) / config.unet
    else:
        folder = Path(config.unet_folder)
    return load_unet(folder / "unet"), empty_prompt(folder)


def _start(networks: Networks, folder: Path) -> None:
    """Take over what another run wrote, or what was published."""
    enhancer, found = networks.enhancer, load_enhancer_config(folder)
    if found != enhancer.config:
        wanted, other = dataclasses.asdict(enhancer.config), dataclasses.asdict(found)
        keys = [key for key in wanted if wanted[key] != other[key]]
        faults = ", ".join(f"{key} {wanted[key]!r} as in this run, found {other[key]!r}" for key in keys)
        raise ValueError(f"start: {folder / CONFIG_FILE}: expected {faults}")
    read_trained(enhancer, folder)
    if (decoder := folder / DECODER_FILE).is_file():
        load_exactly(networks.base.mask_decoder, decoder_state(read_tensors(decoder)), str(decoder))
