"""rass-nano by RASS's recipe (IJCV 2026): base on clear pictures, SCR on features, merged; RASS on degraded pictures.

What differs from the paper, besides the networks: SCR restores features of the backbone and not a picture, since a
small network has no decoder to one, and RASS trains all of the network and not a second set of adapters, since rank 4
of so narrow layers changes too little.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from glesam_ros.models.rass_nano_net import ADAPTED, RassNano, features_of
from glesam_ros.training import checkpoint
from glesam_ros.training.adapters import add_adapters
from glesam_ros.training.batches import draw_levels, worsen
from glesam_ros.training.config import StageConfig
from glesam_ros.training.crops import recoloured
from glesam_ros.training.labelled_crops import VOID, LabelledScenes, draw_labelled, load_labelled
from glesam_ros.training.loop import (
    Batch,
    Group,
    Run,
    Stage,
    Stop,
    beside,
    claim,
    complete,
    make_accelerator,
    settled,
    sow,
)
from glesam_ros.training.nano import pretrained_backbone
from glesam_ros.training.rass_nano_config import (
    RASS_NANO_STAGES,
    NanoScrConfig,
    NanoSegmentConfig,
    RassNanoConfig,
)

Array = NDArray[Any]
COUNTED = 200
"""Pictures of a folder whose labels are counted for the weights of the classes."""


def draw_streets(
    scenes: LabelledScenes, rng: np.random.Generator, config: RassNanoConfig, count: int, clear: float
) -> Batch:
    """Crops, and what the network gets in their place: degraded, or with the probability `clear` the same.

    Returns:
        "clear" and "input" (B, H, W, 3) uint8, "labels" (B, H, W) int64 with `VOID`.
    """
    crop = config.crop
    drawn = [draw_labelled(scenes, rng, crop.height, crop.width, crop.zoom) for _ in range(count)]
    images = [recoloured(image, rng, crop.gamma, crop.colour) for image, _ in drawn]
    levels = draw_levels(config.degradation, rng, count, clear)
    inputs = [
        worsen(image, int(level), config.degradation, rng) if level else image
        for image, level in zip(images, levels, strict=True)
    ]
    return {
        "clear": torch.from_numpy(np.stack(images)), "input": torch.from_numpy(np.stack(inputs)),
        "labels": torch.from_numpy(np.stack([labels for _, labels in drawn])).long(),
    }


def class_weights(scenes: LabelledScenes, balance: float) -> Tensor:
    """(K,) weights of the classes, with the mean 1 over pixels: share of the pixels to the power -balance.

    Classes that no counted picture shows get the weight of the rarest that one shows.

    Raises:
        ValueError: no counted picture shows a class.
    """
    count = len(scenes.classes)
    pixels = np.zeros(count)
    for folder in scenes.folders:
        for index in np.linspace(0, len(folder) - 1, min(len(folder), COUNTED)).astype(int):
            labels = folder.labels(int(index))
            pixels += np.bincount(labels[labels < count], minlength=count)
    if not pixels.any():
        raise ValueError(
            f"sources: expected labels with a class, found none in up to {COUNTED} pictures of "
            f"{', '.join(folder.name for folder in scenes.folders)}; take other labels, or see what is ignored"
        )
    share = np.maximum(pixels, pixels[pixels > 0].min()) / pixels.sum()
    weights = share**-balance
    return torch.from_numpy(weights / (weights * pixels / pixels.sum()).sum()).float()


class RassNanoStage(Stage):
    """What the stages share."""

    model: RassNano
    class_weights: Tensor

    def __init__(
        self, net: RassNano, config: RassNanoConfig, settings: StageConfig, scenes: LabelledScenes, weights: Tensor
    ) -> None:
        super().__init__(net, settings)
        self.config, self.scenes = config, scenes
        self.register_buffer("class_weights", weights, persistent=False)

    def set_modes(self) -> None:
        """The backbone's normalisation stays as pretrained."""
        self.train()
        self.model.backbone.eval()

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits (B, K, h, w) at the size of the labels (B, H, W)."""
        logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, weight=self.class_weights, ignore_index=VOID)


class Segment(RassNanoStage):
    """Backbone and decoder by weighted cross-entropy: `base` on clear crops, `rass` on degraded and clear ones."""

    settings: NanoSegmentConfig

    def groups(self) -> list[Group]:
        rates, backbone = self.settings.rates, self.model.backbone
        return [
            Group("backbone", list(backbone.parameters()), rates.backbone),
            Group("decoder", beside(backbone, self.model), rates.decoder),
        ]

    def batch(self, rng: np.random.Generator) -> Batch:
        batch = draw_streets(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)
        return {"input": batch["input"], "labels": batch["labels"]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.cross_entropy(self.model(batch["input"]), batch["labels"])}


class Base(Segment):
    """The network on clear crops."""

    name = "base"


class Rass(Segment):
    """The network, adapters merged, on degraded crops."""

    name = "rass"


class Scr(RassNanoStage):
    """Adapters restore the features of degraded crops to those that the frozen network has of the clear ones.

    Restoration: squared error of each level, relative to the variance of its clear features. Semantic constraint: the
    scores of the class embeddings at each position, which are the frozen decoder's logits, must single out the pixels
    of their class.
    """

    name = "scr"
    settings: NanoScrConfig

    def __init__(
        self, net: RassNano, config: RassNanoConfig, settings: NanoScrConfig, scenes: LabelledScenes, weights: Tensor
    ) -> None:
        super().__init__(net, config, settings, scenes, weights)
        self.clear = copy.deepcopy(net.backbone).requires_grad_(False)
        self.adapters = add_adapters(net.backbone, ADAPTED, settings.rank)

    def groups(self) -> list[Group]:
        adapters = [p for name, p in self.model.backbone.named_parameters() if "lora_" in name]
        return [Group("adapters", adapters, self.settings.rates.adapters)]

    def set_modes(self) -> None:
        self.eval()

    def batch(self, rng: np.random.Generator) -> Batch:
        return draw_streets(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = features_of(self.clear, batch["clear"])
        restored = features_of(self.model.backbone, batch["input"])
        restoration = relative_error(restored, target)
        constraint = self.cross_entropy(self.model.decode(restored), batch["labels"])
        return {
            "loss": restoration + self.settings.constraint * constraint, "restoration": restoration,
            "constraint": constraint,
        }

    def conclude(self) -> None:
        """Merge."""
        self.model.backbone = self.adapters.merge_and_unload()
        self.model.requires_grad_(False)


def relative_error(features: list[Tensor], target: list[Tensor]) -> Tensor:
    """Mean over levels of the squared error (B, C, h, w) relative to the target's variance in its channel."""
    errors = []
    for x, y in zip(features, target, strict=True):
        y = y.float()
        variance = y.var((0, 2, 3), keepdim=True, unbiased=False)
        errors.append(((x.float() - y) ** 2 / (variance + variance.mean() * 1e-3)).mean())
    return torch.stack(errors).mean()


def make_stage(
    name: str, net: RassNano, config: RassNanoConfig, scenes: LabelledScenes, weights: Tensor
) -> RassNanoStage:
    """The stage `name` of `RASS_NANO_STAGES`; what it adds to the network depends on seed and stage alone."""
    sow(config.seed, RASS_NANO_STAGES.index(name))
    kinds: dict[str, type[RassNanoStage]] = {kind.name: kind for kind in (Base, Scr, Rass)}
    return kinds[name](net, config, getattr(config, name), scenes, weights)


def train_rass_nano(
    config: RassNanoConfig, data: Path, out: Path, device: Literal["auto", "cpu", "cuda"] = "auto",
    until: str = RASS_NANO_STAGES[-1],
) -> list[Path]:
    """Train, or go on with what `out` holds.

    Args:
        config: the recipe.
        data: folder that the paths of the sources are relative to.
        out: gets `config.yaml`, `<stage>.csv`, `tensorboard/`, `checkpoint.pt` while a stage is under way, and
            `<stage>.pt` of each finished one: a state dict of `RassNano`.
        device: auto takes a GPU where there is one.
        until: last stage to run.

    Returns:
        The state dict of the last stage, which `glesam_ros.training.rass_nano_export` makes a model folder of.

    Raises:
        Stopped: SIGINT or SIGTERM came; the same call goes on.
        ValueError: the device or precision is not there, `out` was begun with another configuration, weights that do
            not fit, labels that cannot be read.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: the loss or a weight is infinite or not a number.
    """
    config = settled(config, device)
    accelerator = make_accelerator(device, config.precision)
    scenes = load_labelled(config.sources, data)
    claim(out, config, accelerator)
    torch.set_flush_denormal(True)  # computing with denormal numbers is many times slower on CPUs
    torch.manual_seed(config.seed)
    net = RassNano(len(scenes.classes))
    if config.start is None:
        net.backbone.load_state_dict({
            name: value for name, value in pretrained_backbone().items() if name in net.backbone.state_dict()
        })
    else:
        checkpoint.load_into(net, Path(config.start), "rass-nano")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword alone
    net = net.to(accelerator.device)
    weights = class_weights(scenes, config.balance)
    last = out / f"{until}.pt"
    with (stop := Stop()).signals():
        shared = Run(out, config.seed, config.workers, accelerator, stop)
        for number, name in enumerate(RASS_NANO_STAGES[: RASS_NANO_STAGES.index(until) + 1]):
            if getattr(config, name).steps:
                complete(make_stage(name, net, config, scenes, weights), number, shared)
    return [last] if last.exists() else []
