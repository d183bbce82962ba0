"""Milliseconds of each stage of a full-size model: this package beside the straightforward eager fp32 pipeline.

Both run in this process, one after the other, on the same image. The weights are random: the time does not depend on
them, and nothing is downloaded. The peer is the same networks, called as published: fp32 without TF32, LoRA as
adapters, the text embedding through every cross-attention, the time embedding computed in each call. SAM's attention is
ours in both; `sam_attention.py` compares it with upstream's.

The floor is a roofline: the larger of operations / peak and bytes / bandwidth, where weights are read once; peak and
bandwidth are what a large matrix product in the same precision and a large copy reach here, in this run.

    python benchmarks/glesam_speed.py                                        SAM 2.1 tiny and the U-Net of SD 2.1
    python benchmarks/glesam_speed.py --models sam2.1_hiera_tiny sam2.1_hiera_large --rounds 50      on a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from the checkout

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from glesam_ros.cli.machine import load_frame, processor, usable_cores
from glesam_ros.models.glesam.base import SIDE, BaseModel, Features
from glesam_ros.models.glesam.enhancer import UNETS, Enhancer, EnhancerConfig, SmallEnhancer
from glesam_ros.models.glesam.runtime import TorchRuntime, choose_device, choose_precision, precision_name

STAGES = ("encode", "enhance", "decode", "camera to masks")
WARM_UP = 3
LEVEL = 0.8
"""Degradation that the enhancer is told."""


def build(name: str, unet: str) -> tuple[BaseModel, Enhancer | SmallEnhancer]:
    """Base and enhancer with random weights; `unet` is a name of `UNETS`, or "small"."""
    from diffusers import UNet2DConditionModel

    from glesam_ros.models.glesam.sam import build_sam
    from glesam_ros.models.glesam.sam2 import build_sam2

    base: BaseModel = build_sam2(name) if name.startswith("sam2") else build_sam(name)
    if unet == "small":
        small = SmallEnhancer(EnhancerConfig(base=name, kind="small", unet="sd21-base"))
        return base.eval(), small.eval()
    config = EnhancerConfig(base=name, kind="lora", unet=unet)
    network = UNet2DConditionModel(**UNETS[unet])
    prompt = torch.zeros(1, 77, network.config.cross_attention_dim)
    return base.eval(), Enhancer(config, network, prompt).eval()


class Eager:
    """The peer: the published networks, called as they are."""

    def __init__(self, base: BaseModel, enhancer: torch.nn.Module, device: torch.device) -> None:
        self.base, self.enhancer, self.device = base.to(device), enhancer.to(device), device

    def encode(self, image: Any, side: int) -> Features:
        images = torch.from_numpy(image)[None].to(self.device)
        return self.base.encode(self.base.pixels(images, side))

    def enhance(self, features: Features, level: float) -> Features:
        return features._replace(latent=self.enhancer(features.latent))

    def decode(self, features: Features, points: Any, labels: Any, several: bool) -> tuple[Tensor, Tensor]:
        xy, kinds = (torch.from_numpy(x).to(self.device) for x in (points, labels))
        return self.base.decode(features, xy, kinds, several)


def measure(runtime: Any, image: Any, points: Any, labels: Any, side: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each stage and of all of them, a value a round, after a warm-up."""
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for k in range(rounds + WARM_UP):
        marks = [clock()]
        features = runtime.encode(image, side)
        marks.append(clock())
        features = runtime.enhance(features, LEVEL)
        marks.append(clock())
        logits, _ = runtime.decode(features, points, labels, False)
        masks = (logits > 0).cpu()
        marks.append(clock())
        del masks
        if k >= WARM_UP:
            spans = [1e3 * (b - a) for a, b in zip(marks, marks[1:])]
            for stage, span in zip(STAGES, [*spans, sum(spans)]):
                times[stage].append(span)
    return times


def clock() -> float:
    """Seconds, with all work of the device done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes a second that a large matrix product and a large copy reach."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    c = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    best_product, best_copy = float("inf"), float("inf")
    for _ in range(5):
        start = clock()
        a @ a
        middle = clock()
        c.clone()
        best_product, best_copy = min(best_product, middle - start), min(best_copy, clock() - middle)
    return 2 * n**3 / best_product, 2 * c.numel() / best_copy


def floors(
    eager: Eager, image: Any, points: Any, labels: Any, side: int, item: int, rates: tuple[float, float]
) -> list[float]:
    """Roofline milliseconds of each stage and of all of them; `item` bytes a weight."""
    found: list[float] = []
    features = eager.encode(image, side)
    restored = eager.enhance(features, LEVEL)
    parts: list[tuple[Callable[[], Any], torch.nn.Module]] = [
        (lambda: eager.encode(image, side), eager.base),
        (lambda: eager.enhance(features, LEVEL), eager.enhancer),
        (lambda: eager.decode(restored, points, labels, False), eager.base.mask_decoder),
    ]
    for call, module in parts:
        with FlopCounterMode(display=False) as counter:
            call()
        weights = item * sum(p.numel() for p in module.parameters())
        found.append(1e3 * max(counter.get_total_flops() / rates[0], weights / rates[1]))
    return [*found, sum(found)]


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 as it is written."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def measure_model(
    name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row for each stage of one model."""
    torch.manual_seed(0)
    base, enhancer = build(name, args.unet)
    image = load_frame(args.image, (640, 480))
    rng = np.random.default_rng(0)
    points = rng.uniform(0, args.side, (args.prompts, 1, 2)).astype(np.float32)
    labels = np.ones((args.prompts, 1), np.float32)
    prompts = (points, labels)
    with torch.inference_mode(), without_tf32():
        eager = Eager(base, enhancer, device)
        floor = floors(eager, image, *prompts, args.side, dtype.itemsize, peaks(device, dtype))
        reset_memory()
        slow = measure(eager, image, *prompts, args.side, args.rounds)
        slow_memory = peak_memory()
    # the runtime takes base and enhancer over, so the peer cannot run after it
    runtime = TorchRuntime(eager.base, enhancer, device, dtype, compile=args.compile)
    reset_memory()
    fast = measure(runtime, image, *prompts, args.side, args.rounds)
    memory = {"eager_mb": slow_memory, "mb": peak_memory()}
    rows = []
    for stage, least in zip(STAGES, floor):
        before, now = float(np.median(slow[stage])), float(np.median(fast[stage]))
        ratio = round(before / now, 2)
        rows.append({
            "model": name, "stage": stage, "eager_fp32_ms": round(before, 2), "ms": round(now, 2), "ratio": ratio,
            "floor_ms": round(least, 2), **(memory if stage == STAGES[-1] else {}),
        })
    runtime.close()
    return rows


def reset_memory() -> None:
    """Begin to watch the peak of the GPU's memory anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Peak of the GPU's memory in MB (10^6 bytes), None without a GPU."""
    return round(torch.cuda.max_memory_reserved() / 1e6) if torch.cuda.is_available() else None


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sam2.1_hiera_tiny"], help="bases; default: sam2.1_hiera_tiny")
    parser.add_argument("--unet", choices=(*UNETS, "small"), default="sd21-base", help="default: sd21-base")
    parser.add_argument("--prompts", type=int, default=64, help="points that are decoded at once; default: 64")
    parser.add_argument("--side", type=int, default=SIDE, help=f"of the square input; default: {SIDE}")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each; default: 3")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile, minutes at the start")
    parser.add_argument("--image", type=Path, help="picture; default: a photograph of the demo")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    rows = [row for name in args.models for row in measure_model(name, args, device, dtype)]
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    machine = gpu or f"{processor()}, {usable_cores()} cores"
    print(f"{machine}, torch {torch.__version__}, {precision_name(dtype)} against eager fp32, U-Net {args.unet}, "
          f"{args.side} px, {args.prompts} prompts, {args.rounds} rounds, medians\n")
    print(f"{'model':<22}{'stage':<17}{'eager ms':>10}{'ms':>10}{'ratio':>8}{'floor ms':>10}{'GPU MB':>16}")
    for row in rows:
        memory = f"{row['eager_mb']} -> {row['mb']}" if row.get("mb") else ""
        print(f"{row['model']:<22}{row['stage']:<17}{row['eager_fp32_ms']:>10.1f}{row['ms']:>10.1f}"
              f"{row['ratio']:>8.2f}{row['floor_ms']:>10.1f}{memory:>16}")
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
