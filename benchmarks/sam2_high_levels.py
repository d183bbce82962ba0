"""What the mask decoder of SAM 2 should get as high-resolution levels when the latent is restored.

GleSAM2 restores the top level of SAM 2's feature pyramid. The levels at 1/4 and 1/8 of the picture reach the decoder,
too, and in a bad picture they are bad. This trains a small SAM 2-like base on the clear pictures of the train split
(frozen EfficientNet-Lite0, then the sam2 package's own pyramid, prompt encoder and mask decoder at their published
width), takes the latent raw or from the clear picture (a perfect enhancer), and tries what to do with the levels.

    keep        as the encoder gave them
    half, zero  times 0.5, times 0 (attenuation by the degradation level ends there)
    blur        Gaussian, sigma of one cell
    project     a linear map of the upsampled latent, fitted to clear train pictures, instead of them
    mean        of keep and project
    oracle      of the clear picture: the bound

Pictures are squashed to a square, as SAM 2 does, and degraded at that size. Prompts are three random points, one mask.
With --tune the decoder then learns, from the clear latent, with each choice for the levels of mixed LQ pictures, as in
stage 2 of GleSAM, which keeps the encoder and with it the levels as they are.

    python benchmarks/sam2_high_levels.py --data DATA --tune 300 --images 80
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from the checkout, beside an environment with torch

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.backbones.image_encoder import FpnNeck
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from torch import Tensor, nn

from glesam_ros.cli.machine import processor, usable_cores
from glesam_ros.datasets import Photograph, load_coco, region_masks
from glesam_ros.degradation import degrade_lqseg, degrade_lqseg_mixed
from glesam_ros.evaluation.metrics import bootstrap_interval, boundary_iou, iou, sample_points
from glesam_ros.models.glesam.base import LATENT_CHANNELS, LOGIT_STRIDE, STRIDE, Features
from glesam_ros.models.nano_net import Backbone
from glesam_ros.training.losses import windowed_loss, windows
from glesam_ros.training.nano import pretrained_backbone

REGIONS = 8
"""Prompts of one picture in a step of training."""
LEAST_AREA = 0.01
"""Smaller regions, as a share of the picture, are left out."""
Levels = Callable[[Features, Features, Tensor], tuple[Tensor, ...]]
"""(features of the picture, of the clear picture, latent in use) -> levels for the decoder."""
CONDITIONS = ("clear", "LQ-1", "LQ-2", "LQ-3")


class Sample(NamedTuple):
    """A picture (S, S, 3) uint8 and regions (R, S, S) bool."""

    image: np.ndarray[Any, Any]
    masks: np.ndarray[Any, Any]


class Base(nn.Module):
    """SAM 2 with EfficientNet-Lite0 in place of Hiera."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.backbone.load_state_dict(pretrained_backbone(), strict=False)
        self.backbone.eval().requires_grad_(False)
        channels = [Backbone.channels[stride] for stride in (32, 16, 8, 4)]
        self.neck = FpnNeck(nn.Identity(), LATENT_CHANNELS, channels, fpn_interp_model="nearest",
                            fpn_top_down_levels=[2, 3])
        cells = side // STRIDE
        self.prompts = PromptEncoder(LATENT_CHANNELS, (cells, cells), (side, side), mask_in_chans=16)
        transformer = TwoWayTransformer(depth=2, embedding_dim=LATENT_CHANNELS, num_heads=8, mlp_dim=2048)
        self.decoder = MaskDecoder(transformer_dim=LATENT_CHANNELS, transformer=transformer, use_high_res_features=True,
                                   iou_prediction_use_sigmoid=True)

    def encode(self, images: Sequence[np.ndarray[Any, Any]]) -> Features:
        """(S, S, 3) uint8 each -> features as of SAM 2."""
        rgb = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            pyramid = self.backbone((rgb - 127.0) / 128.0)[1:]
        fine, middle, top, _ = self.neck(pyramid)[0]
        return Features(top, (self.decoder.conv_s0(fine), self.decoder.conv_s1(middle)))

    def decode(self, features: Features, points: Tensor) -> Tensor:
        """(K, N, 2) points inside, of one image -> (K, S / 4, S / 4) logits."""
        sparse, dense = self.prompts(points=(points, torch.ones(points.shape[:2])), boxes=None, masks=None)
        logits, _, _, _ = self.decoder(features.latent, self.prompts.get_dense_pe(), sparse, dense, False, True,
                                       list(features.high))
        return logits[:, 0]


def main() -> int:
    """Train, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with coco_small/")
    parser.add_argument("--side", type=int, default=256, help="of the square pictures, a multiple of 32; default: 256")
    parser.add_argument("--steps", type=int, default=4500, help="training steps of one picture; default: 4500")
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="of the decoder; default: 0, none")
    parser.add_argument("--images", type=int, default=40, help="of the test split; default: 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    cv2.setNumThreads(1)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    train = [s for p in load_coco(args.data / "coco_small", "train") if len((s := squashed(p, args.side)).masks)]
    test = [s for p in load_coco(args.data / "coco_small", "test") if len((s := squashed(p, args.side)).masks)]
    test = test[: args.images]
    base = Base(args.side)
    fit(base, train, args.steps, args.seed)
    choices = all_choices(projections(base, train[::5]))
    tuned: dict[str, Base] = {}
    for name in ("keep", "half", "zero", "project") if args.tune else ():
        tuned[name] = tune(base, train, args.tune, args.seed, choices[name])
    figures = measure(base, tuned, choices, test, args.seed)
    regions = sum(len(s.masks) for s in test)
    print(f"\n{len(train)} train pictures, {args.steps} steps at {args.side}x{args.side}; {len(test)} test pictures, "
          f"{regions} regions\n{processor()}, {usable_cores()} cores, {args.threads} threads, "
          f"torch {torch.__version__}, {(time.perf_counter() - start) / 60:.0f} minutes\n\n"
          "mean IoU / boundary IoU in %\n")
    show(figures)
    if args.json is not None:
        args.json.write_text(json.dumps({"steps": args.steps, "tune": args.tune, "side": args.side, "test": len(test),
                                         "regions": regions, "seed": args.seed, "figures": figures}, indent=1) + "\n")
    return 0


def squashed(photograph: Photograph, side: int) -> Sample:
    """The photograph and its regions as a square, without regions that are too small."""
    image = cv2.resize(photograph.image, (side, side), interpolation=cv2.INTER_AREA)
    masks = [cv2.resize(m.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0
             for m in region_masks(photograph)]
    kept = [m for m in masks if m.mean() >= LEAST_AREA]
    return Sample(image, np.stack(kept) if kept else np.zeros((0, side, side), bool))


def cropped(sample: Sample, rng: np.random.Generator) -> Sample:
    """A random crop of 60 to 100 % of the sides, enlarged, mirrored half of the time; all where it is empty."""
    side = len(sample.image)
    h, w = (int(side * rng.uniform(0.6, 1)) for _ in range(2))
    y, x = int(rng.integers(side - h + 1)), int(rng.integers(side - w + 1))
    step = -1 if rng.random() < 0.5 else 1
    masks = [cv2.resize(m[y : y + h, x : x + w].astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0
             for m in sample.masks]
    kept = [m[:, ::step] for m in masks if m.mean() >= LEAST_AREA]
    if not kept:
        return sample
    image = cv2.resize(sample.image[y : y + h, x : x + w], (side, side), interpolation=cv2.INTER_LINEAR)
    return Sample(np.ascontiguousarray(image[:, ::step]), np.stack(kept))


def prompts(masks: np.ndarray[Any, Any], n: int, rng: np.random.Generator) -> Tensor:
    """(K, n, 2) random points inside each."""
    return torch.from_numpy(np.stack([sample_points(m, n, rng) for m in masks]))


def loss(logits: Tensor, masks: np.ndarray[Any, Any]) -> Tensor:
    """Dice and cross-entropy at the size of the logits; from nothing they learn in fewer steps than Dice and focal."""
    truth = torch.from_numpy(masks).float()[None]
    truth = (F.avg_pool2d(truth, LOGIT_STRIDE)[0] > 0.5).float()
    return windowed_loss(logits.flatten(1), truth.flatten(1), windows(truth).flatten(1)).mean()


def run(
    parameters: Sequence[nn.Parameter], steps: int, rate: float, step_loss: Callable[[], Tensor], what: str
) -> None:
    """AdamW, warm-up and cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(20, steps), pct_start=0.1)
    total, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        value = step_loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += value.item()
        if step % 100 == 0:
            print(f"{what} {step}/{steps}  loss {total / 100:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
            total = 0.0


def fit(base: Base, train: Sequence[Sample], steps: int, seed: int) -> None:
    """Train everything but the backbone on clear pictures, one to three points inside."""
    rng = np.random.default_rng(seed)
    parameters = [*base.neck.parameters(), *base.prompts.parameters(), *base.decoder.parameters()]

    def step_loss() -> Tensor:
        sample = cropped(train[rng.integers(len(train))], rng)
        masks = sample.masks[rng.permutation(len(sample.masks))[:REGIONS]]
        return loss(base.decode(base.encode([sample.image]), prompts(masks, int(rng.integers(1, 4)), rng)), masks)

    run(parameters, steps, 3e-4, step_loss, "base")
    base.eval().requires_grad_(False)


def tune(base: Base, train: Sequence[Sample], steps: int, seed: int, choice: Levels) -> Base:
    """A copy whose decoder knows the clear latent with `choice` for the levels of mixed LQ pictures."""
    tuned = copy.deepcopy(base)
    # the encoder's own two convolutions live in the decoder's module; they stay
    trained = [p for name, p in tuned.decoder.named_parameters() if not name.startswith("conv_s")]
    for parameter in trained:
        parameter.requires_grad_(True)
    rng = np.random.default_rng(seed)

    def step_loss() -> Tensor:
        sample = cropped(train[rng.integers(len(train))], rng)
        masks = sample.masks[rng.permutation(len(sample.masks))[:REGIONS]]
        with torch.no_grad():
            both = base.encode([sample.image, degrade_lqseg_mixed(sample.image, rng).image])
            clear, bad = both.pick(0), both.pick(1)
            levels = choice(bad, clear, clear.latent)
        return loss(tuned.decode(Features(clear.latent, levels), prompts(masks, 3, rng)), masks)

    run(trained, steps, 1e-4, step_loss, "decoder")
    return tuned.eval().requires_grad_(False)


@torch.no_grad()
def projections(base: Base, samples: Sequence[Sample]) -> list[Tensor]:
    """Least squares from the latent, upsampled to each level, and a one to the level: (257, C) each."""
    solved = []
    for k in range(2):
        left, right = torch.zeros(LATENT_CHANNELS + 1, LATENT_CHANNELS + 1), torch.tensor(0.0)
        for sample in samples:
            features = base.encode([sample.image])
            x, y = upsampled(features.latent, features.high[k]), features.high[k].flatten(2)[0].T
            left, right = left + x.T @ x, right + x.T @ y
        ridge = 1e-4 * left.diagonal().mean() * torch.eye(len(left))
        solved.append(torch.linalg.solve(left + ridge, right))
    return solved


def upsampled(latent: Tensor, level: Tensor) -> Tensor:
    """(1, 256, h, w) -> (positions of the level, 257)."""
    x = F.interpolate(latent, level.shape[2:], mode="bilinear", align_corners=False).flatten(2)[0].T
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def blurred(level: Tensor) -> Tensor:
    """Gaussian, sigma of one cell."""
    taps = torch.exp(-0.5 * torch.arange(-3.0, 4) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(level, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(padded, kernel.expand(level.shape[1], 1, 7, 7), groups=level.shape[1])


def all_choices(maps: Sequence[Tensor]) -> dict[str, Levels]:
    """The candidates by name."""

    def project(latent: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple((upsampled(latent, h) @ m).T.reshape(h.shape) for h, m in zip(like, maps))

    def mean(bad: Features, clear: Features, latent: Tensor) -> tuple[Tensor, ...]:
        return tuple((a + b) / 2 for a, b in zip(bad.high, project(latent, bad.high)))

    return {
        "keep": lambda bad, clear, latent: bad.high,
        "half": lambda bad, clear, latent: tuple(h / 2 for h in bad.high),
        "zero": lambda bad, clear, latent: tuple(h * 0 for h in bad.high),
        "blur": lambda bad, clear, latent: tuple(map(blurred, bad.high)),
        "project": lambda bad, clear, latent: project(latent, bad.high),
        "mean": mean,
        "oracle": lambda bad, clear, latent: clear.high,
    }


@torch.no_grad()
def measure(
    base: Base, tuned: dict[str, Base], choices: dict[str, Levels], test: Sequence[Sample], seed: int
) -> list[dict[str, Any]]:
    """Rows of the table: mean over regions by condition; 95 % interval of the gain of IoU over "keep" at LQ-3."""
    rows: list[tuple[str, str, str, Base]] = [
        (latent, "as trained", name, base) for latent in ("raw", "restored") for name in choices
    ]
    rows += [("restored", "tuned", name, net) for name, net in tuned.items()]
    found: dict[tuple[int, str], list[np.ndarray[Any, Any]]] = {}
    for number, sample in enumerate(test):
        points = prompts(sample.masks, 3, np.random.default_rng([seed, number]))
        clear = base.encode([sample.image])
        for condition in CONDITIONS:
            bad = clear
            if condition != "clear":
                rng = np.random.default_rng([seed, number, int(condition[-1])])
                bad = base.encode([degrade_lqseg(sample.image, int(condition[-1]), rng).image])
            for k, (latent, _, name, net) in enumerate(rows):
                z = clear.latent if latent == "restored" else bad.latent
                logits = net.decode(Features(z, choices[name](bad, clear, z)), points)
                predicted = F.interpolate(logits[None], sample.masks.shape[1:], mode="bilinear")[0].numpy() > 0
                scores = np.stack([iou(predicted, sample.masks), boundary_iou(predicted, sample.masks)], 1)
                found.setdefault((k, condition), []).append(scores)
    figures = []
    images = np.repeat(np.arange(len(test)), [len(sample.masks) for sample in test])
    worst = [np.concatenate(found[k, CONDITIONS[-1]])[:, 0] for k in range(len(rows))]
    for k, (latent, decoder, name, _) in enumerate(rows):
        keep = next(i for i, other in enumerate(rows) if other[:3] == (latent, decoder, "keep"))
        gain = [100 * v for v in bootstrap_interval(worst[k] - worst[keep], seed, groups=images)]
        row: dict[str, Any] = {"latent": latent, "decoder": decoder, "levels": name, "gain": gain}
        for condition in CONDITIONS:
            row[condition] = [round(100 * float(v), 1) for v in np.concatenate(found[k, condition]).mean(0)]
        figures.append(row)
    return figures


def show(figures: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    print(f"{'latent':<10}{'decoder':<12}{'levels':<9}{''.join(f'{c:>14}' for c in CONDITIONS)}{'LQ-3 over keep':>18}")
    for row in figures:
        cells = "".join(f"{row[c][0]:>7.1f} /{row[c][1]:>5.1f}" for c in CONDITIONS)
        gain = "" if row["levels"] == "keep" else "{:+.1f} .. {:+.1f}".format(*row["gain"])
        print(f"{row['latent']:<10}{row['decoder']:<12}{row['levels']:<9}{cells}{gain:>18}")


if __name__ == "__main__":
    sys.exit(main())
