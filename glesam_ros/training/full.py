"""GleSAM at full size by the paper's recipe: stage 1 restores latents, stage 2 tunes the mask decoder.

GleSAM++ begins with a stage for its level predictor; a small enhancer may learn from the finished one at the end.

Source: GleSAM (CVPR 2025, arXiv 2503.12507), section 3, and its released code where the paper is silent.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from glesam_ros.degradation import degrade, degrade_lqseg, degrade_lqseg_mixed
from glesam_ros.degradation.lqseg import FIRST_OFFLINE
from glesam_ros.models.glesam.base import Features
from glesam_ros.training.config import StageConfig
from glesam_ros.training.crops import draw_crop, jitter
from glesam_ros.training.full_config import (
    FULL_STAGES,
    DistillConfig,
    FullConfig,
    FullDecodeConfig,
    FullDegradationConfig,
    FullLevelConfig,
    FullRestoreConfig,
)
from glesam_ros.training.full_networks import Networks, load_networks, write_enhancer
from glesam_ros.training.loop import (
    Adapting,
    Batch,
    Group,
    Run,
    Stop,
    claim,
    complete,
    make_accelerator,
    settled,
    sow,
)
from glesam_ros.training.losses import dice_loss, focal_loss, soft_iou
from glesam_ros.training.matching import Guide, carried, is_adapted
from glesam_ros.training.prompts import draw_points
from glesam_ros.training.sources import Scenes, load_scenes

Array = NDArray[Any]
POINTS = 3
"""Random points of a prompt in stage 2 (released code)."""
SMOOTH = 1e-6
"""Of the Dice loss (released code)."""
LEVELS = 3
"""LQ-3 is level 1."""


def level_of_rate(rate: int) -> float:
    """Degradation in 0..1 of a downsampling rate of LQSeg: 1, 2 and 4 are LQ-1, 2 and 3, what is between in octaves."""
    return (1 + math.log2(rate)) / LEVELS


def worsen(image: Array, mix: FullDegradationConfig, rng: np.random.Generator) -> tuple[Array, float]:
    """A crop (H, W, 3) uint8 degraded, and its level in 0..1."""
    lqseg = rng.random() < mix.lq
    if lqseg and mix.rates == "mixed":
        mixed = degrade_lqseg_mixed(image, rng)
        return mixed.image, level_of_rate(mixed.parameters["rate"])
    if lqseg and mix.rates == "x1":
        return degrade_lqseg(image, 1, rng, first=FIRST_OFFLINE).image, 1 / LEVELS
    level = int(rng.choice(np.arange(1, LEVELS + 1), p=np.asarray(mix.levels) / sum(mix.levels)))
    if lqseg:
        return degrade_lqseg(image, level, rng).image, level / LEVELS
    kind = mix.kinds[rng.integers(len(mix.kinds))]
    return degrade(image, kind, level, int(rng.integers(2**31))).image, level / LEVELS


def draw_crops(
    scenes: Scenes, rng: np.random.Generator, config: FullConfig, count: int, clear: float
) -> tuple[Batch, list[Array]]:
    """Clear crops, and what the model gets in their place: degraded, or with the probability `clear` the same.

    Returns:
        "clear" and "input" (B, S, S, 3) uint8 and "level" (B,) float32 of the input in 0..1; and the regions
        (R, S, S) bool of each crop.
    """
    crop = config.crop
    drawn = [draw_crop(scenes.draw, rng, crop.side, crop.side, crop.zoom, crop.paste, 1) for _ in range(count)]
    images = [jitter(image, rng) if crop.jitter else image for image, _ in drawn]
    inputs = [
        (image, 0.0) if rng.random() < clear else worsen(image, config.degradation, rng) for image in images
    ]
    batch = {
        "clear": torch.from_numpy(np.stack(images)),
        "input": torch.from_numpy(np.stack([image for image, _ in inputs])),
        "level": torch.tensor([level for _, level in inputs]),
    }
    return batch, [regions for _, regions in drawn]


class FullStage(Adapting):
    """What the stages share."""

    model: Networks

    def __init__(self, networks: Networks, config: FullConfig, settings: StageConfig, scenes: Scenes) -> None:
        super().__init__(networks, settings)
        self.config, self.scenes = config, scenes
        self.gamma = config.enhancer.gamma

    def scaled_error(self, a: Tensor, b: Tensor) -> Tensor:
        """MSE of two latents at the scale that the U-Net sees, gamma z."""
        return self.gamma**2 * F.mse_loss(a.float(), b.float())


class Level(FullStage):
    """The level predictor of GleSAM++ on features of the frozen encoder: MSE to k / 3 of LQ-k, 0 of clear crops."""

    name = "level"
    settings: FullLevelConfig

    def groups(self) -> list[Group]:
        level = self.model.enhancer.level
        return [Group("predictor", [] if level is None else list(level.parameters()), self.settings.rates.predictor)]

    def batch(self, rng: np.random.Generator) -> Batch:
        batch, _ = draw_crops(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)
        return {"input": batch["input"], "level": batch["level"]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.model.features(batch["input"])
        return {"loss": F.mse_loss(self.model.enhancer.predict_level(features), batch["level"])}


class Restore(FullStage):
    """Stage 1: LoRA learns to restore the latent of the clear crop; the level embedding of GleSAM++ with it.

    The level is the predicted one, not the true one: so it is later, and the enhancer learns to live with its errors.
    """

    name = "restore"
    settings: FullRestoreConfig

    def __init__(self, networks: Networks, config: FullConfig, settings: FullRestoreConfig, scenes: Scenes) -> None:
        super().__init__(networks, config, settings, scenes)
        self.guide = Guide(networks.enhancer) if settings.guided else None

    def groups(self) -> list[Group]:
        rates, unet = self.settings.rates, self.model.enhancer.unet
        groups = [Group("enhancer", [p for name, p in unet.named_parameters() if is_adapted(name)], rates.enhancer)]
        if self.guide is not None:
            groups.append(Group("fake", self.guide.trained_parameters(), rates.fake))
        return groups

    def clipped(self, groups: list[Group]) -> list[list[nn.Parameter]]:
        """Enhancer and fake U-Net are adversaries, each with its own norm."""
        return [group.parameters for group in groups]

    def batch(self, rng: np.random.Generator) -> Batch:
        batch, _ = draw_crops(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)
        return {"clear": batch["clear"], "input": batch["input"]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        count = len(batch["clear"])
        both = self.model.features(torch.cat([batch["clear"], batch["input"]]))
        target = both.latent[:count]
        features = Features(both.latent[count:], tuple(high[count:] for high in both.high))
        level = self.model.level(features)
        turn = self.guide is None or self.step % self.settings.generator_every == 0
        with torch.set_grad_enabled(turn):
            restored = self.model.enhancer(features.latent, level)
        reconstruction = self.scaled_error(restored, target)
        losses = {"reconstruction": reconstruction, "unrestored": self.scaled_error(features.latent, target)}
        loss = reconstruction if turn else torch.zeros_like(reconstruction)
        if self.guide is not None:
            weights = {"matching": self.settings.distribution_matching, "adversarial": self.settings.adversarial}
            scaled = self.gamma * restored.float()
            if turn:
                gradient, sizes = self.guide.gradients(scaled, **weights)
                loss = loss + carried(scaled, gradient)
            told = self.guide.losses(scaled, self.gamma * target)
            loss = loss + told["fake"] + self.settings.classification * told["classifier"]
            # so that the mean over all steps is that over the steps that have them
            every = self.settings.generator_every
            shown = {name: every * sizes[name] if turn else torch.zeros_like(loss) for name in weights if weights[name]}
            losses |= {**told, **shown}
        return {"loss": loss, **losses}


class Decode(FullStage):
    """Stage 2: the mask decoder on restored latents, from three random points; its IoU head stays as it is.

    Dice and focal loss one to one at the resolution of the crop. The released code takes Adam with an L2 term: layers
    that only further masks use, which have no gradient here, would lose their weights to it, and with them everything
    mode. AdamW, whose decay is a share of the weight, leaves them as they are.
    """

    name = "decode"
    settings: FullDecodeConfig

    def groups(self) -> list[Group]:
        decoder = [p for name, p in self.model.base.mask_decoder.named_parameters() if "iou" not in name]
        return [Group("decoder", decoder, self.settings.rates.decoder)]

    def set_modes(self) -> None:
        self.eval()
        self.model.base.mask_decoder.train()

    def batch(self, rng: np.random.Generator) -> Batch:
        """O objects a crop: "regions" (B, O, S, S) bool and "points" (B, O, 3, 2) float32 in pixels of the square."""
        batch, regions = draw_crops(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)
        chosen = [found[np.resize(rng.permutation(len(found)), self.config.objects)] for found in regions]
        xy = [[draw_points(region, POINTS, rng) for region in found] for found in chosen]
        # of pixel centres, to which decode adds a half
        points = 0.5 * (np.asarray(xy, np.float32) + 1) * self.config.side - 0.5
        return {
            "input": batch["input"], "regions": torch.from_numpy(np.stack(chosen)), "points": torch.from_numpy(points),
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.model.features(batch["input"])
        with torch.no_grad():
            latent = self.model.enhancer(features.latent, self.model.level(features))
        restored = Features(latent, features.high)
        logits = torch.cat([self._logits(restored.pick(k), points) for k, points in enumerate(batch["points"])])
        target = batch["regions"].flatten(0, 1).float()
        logits = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=False)
        logits, target = logits.flatten(1), target.flatten(1)
        dice, focal = dice_loss(logits, target, SMOOTH).mean(), focal_loss(logits, target, balanced=False).mean()
        iou = soft_iou(logits[:, None], target[:, None]).mean()
        return {"loss": dice + focal, "dice": dice, "focal": focal, "iou": iou}

    def _logits(self, features: Features, points: Tensor) -> Tensor:
        """(O, 1, h, w) of the prompts (O, 3, 2) of one crop."""
        return self.model.base.decode(features, points, torch.ones_like(points[..., 0]), several=False)[0]


class Distill(FullStage):
    """A small enhancer learns the output of the finished one, whose LoRA is merged; MSE of gamma z."""

    name = "distill"
    settings: DistillConfig

    def __init__(self, networks: Networks, config: FullConfig, settings: DistillConfig, scenes: Scenes) -> None:
        super().__init__(networks, config, settings, scenes)
        self.small = networks.add_small(settings.timestep)

    def groups(self) -> list[Group]:
        return [Group("small", list(self.small.unet.parameters()), self.settings.rates.small)]

    def batch(self, rng: np.random.Generator) -> Batch:
        batch, _ = draw_crops(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)
        return {"input": batch["input"]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.model.features(batch["input"])
        level = self.model.level(features)
        with torch.no_grad():
            target = self.model.enhancer(features.latent, level)
        loss = self.scaled_error(self.small(features.latent, level), target)
        return {"loss": loss, "unrestored": self.scaled_error(features.latent, target)}


def make_stage(name: str, networks: Networks, config: FullConfig, scenes: Scenes) -> FullStage:
    """The stage `name` of `FULL_STAGES`; what it adds to the networks depends on seed and stage alone."""
    sow(config.seed, FULL_STAGES.index(name))
    kinds: dict[str, type[FullStage]] = {kind.name: kind for kind in (Level, Restore, Decode, Distill)}
    return kinds[name](networks, config, getattr(config, name), scenes)


def stages_of(config: FullConfig) -> list[str]:
    """The stages that a run has, in their order."""
    return [
        name for name in FULL_STAGES
        if getattr(config, name).steps and (name != "level" or config.enhancer.levels)
    ]


def train_full(
    config: FullConfig, data: Path, out: Path, device: Literal["auto", "cpu", "cuda"] = "auto",
    until: str = FULL_STAGES[-1],
) -> list[Path]:
    """Train, or go on with what `out` holds.

    Args:
        config: the recipe.
        data: folder that the paths of the sources are relative to.
        out: gets `config.yaml`, `<stage>.csv`, `tensorboard/`, `checkpoint.pt` while a stage is under way, `<stage>.pt`
            of each finished one, and at the end a folder BASE+ENHANCER for `glesam models get`.
        device: auto takes a GPU where there is one.
        until: last stage to run.

    Returns:
        The folders of enhancers: the large one once stage 1 and 2 are done, and the small one where one is distilled.

    Raises:
        Stopped: SIGINT or SIGTERM came; the same call goes on.
        ValueError: the device is not there, `out` was begun with another configuration, weights that do not fit, or
            there is no trained enhancer to distil.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: the loss is infinite or not a number.
    """
    stages = stages_of(config)
    asked = [name for name in stages if FULL_STAGES.index(name) <= FULL_STAGES.index(until)]
    if "distill" in asked and "restore" not in asked and config.start is None:
        raise ValueError(
            "distill: expected a trained enhancer to learn from, got restore.steps=0 and no start; give its folder, "
            "start=BASE+ENHANCER, or train it with restore.steps"
        )
    config = settled(config, device)
    accelerator = make_accelerator(device, config.precision, unused=True)
    # gradients of pixels far from a region are denormal, which CPUs compute many times slower
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    networks = load_networks(config).to(accelerator.device)
    claim(out, config, accelerator)  # not before the weights are known to be there
    scenes: Scenes | None = None
    folders: list[Path] = []

    def write() -> None:
        if accelerator.is_main_process:
            folders.append(write_enhancer(networks, out, decoder="decode" in stages or config.start is not None))

    with (stop := Stop()).signals():
        shared = Run(out, config.seed, config.workers, accelerator, stop)
        for name in asked:
            if name == "distill":
                write()  # the next stage merges its LoRA
            scenes = scenes or load_scenes(config.sources, data)
            complete(make_stage(name, networks, config, scenes), FULL_STAGES.index(name), shared)
    if FULL_STAGES.index(until) >= FULL_STAGES.index("decode"):
        write()
    accelerator.wait_for_everyone()
    return folders
