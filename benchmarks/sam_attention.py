"""SAM's image encoder with the attention of this package beside segment-anything's own: same weights, taking turns.

The weights are random: the time does not depend on them, and nothing is downloaded. CPU ms is the time of all threads
together; unlike the wall clock it hardly changes when other programs want the cores, too. Memory is what a run takes
at its peak above what was taken before it, of the process (Linux) or of the GPU. Needs the extra `glesam`.

    python benchmarks/sam_attention.py                                      ViT-B at 1024 px
    python benchmarks/sam_attention.py --model sam_vit_l --side 512 --rounds 10
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from the checkout

import torch

from glesam_ros.cli.machine import processor, quantiles, usable_cores
from glesam_ros.models.glesam.base import SIDE
from glesam_ros.models.glesam.runtime import PRECISIONS, choose_device
from glesam_ros.models.glesam.sam import SAM_SIZES, Sam, SamConfig, build_sam


def pair(name: str) -> tuple[Sam, Sam]:
    """The same random weights with upstream's attention and with ours; relative positions, which start at 0, too."""
    from segment_anything.modeling.image_encoder import Attention

    fast = build_sam(name)
    for positions in (p for key, p in fast.net.image_encoder.named_parameters() if "pos" in key):
        torch.nn.init.normal_(positions, std=0.1)
    slow = Sam(name, copy.deepcopy(fast.net))
    for block in slow.net.image_encoder.blocks:
        ours = block.attn
        size = (len(ours.rel_pos_h) + 1) // 2
        block.attn = Attention(ours.proj.in_features, ours.heads, use_rel_pos=True, input_size=(size, size))
        block.attn.load_state_dict(ours.state_dict())
    return slow, fast


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [name for name, config in SAM_SIZES.items() if isinstance(config, SamConfig)]
    parser.add_argument("--model", choices=sizes, default="sam_vit_b", help="default: sam_vit_b")
    parser.add_argument("--side", type=int, default=SIDE, help=f"of the square, a multiple of 128; default: {SIDE}")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each; default: 5")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default: 2")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="default: fp32")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = choose_device(args.device), PRECISIONS[args.precision]
    slow, fast = (net.to(device, dtype) for net in pair(args.model))
    models = {"segment-anything": slow, "glesam_ros": fast}
    pixels = torch.randn(1, 3, args.side, args.side, device=device, dtype=dtype)

    wall: dict[str, list[float]] = {name: [] for name in models}
    cpu: dict[str, list[float]] = {name: [] for name in models}
    latents: dict[str, torch.Tensor] = {}
    memory: dict[str, float] = {}
    with torch.inference_mode():
        for number in range(args.rounds + 1):
            for name, net in models.items():
                before = reset_peak(device)
                latents[name], *times = timed(lambda net=net: net.encode(pixels).latent, device)
                memory[name] = peak(device) - before
                if number:  # the first round warms up
                    wall[name].append(times[0])
                    cpu[name].append(times[1])
    upstream, ours = latents.values()
    apart, spread = float((ours - upstream).abs().max()), float(upstream.float().std())
    rows = {
        name: {
            "median": quantiles(wall[name])["median"], "cpu": quantiles(cpu[name])["median"], "memory": memory[name],
        }
        for name in models
    }
    ratios = {key: rows["segment-anything"][key] / rows["glesam_ros"][key] for key in rows["glesam_ros"]}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {usable_cores()} cores"
    print(f"{where}, torch {torch.__version__}, {args.model}, {args.side} px, {args.precision}, {args.rounds} rounds\n")
    print(f"{'image encoder':<20}{'median ms':>11}{'CPU ms':>11}{'memory MB':>11}")
    for name, row in rows.items():
        print(f"{name:<20}{row['median']:>11.0f}{row['cpu']:>11.0f}{row['memory']:>11.0f}")
    print(f"{'ratio':<20}{ratios['median']:>11.2f}{ratios['cpu']:>11.2f}{ratios['memory']:>11.2f}")
    print(f"\nlargest difference {apart:.1e}, standard deviation of the latent {spread:.2f}")
    if args.json is not None:
        content = {"machine": where, "model": args.model, "side": args.side, "rows": rows, "ratios": ratios}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def reset_peak(device: torch.device) -> float:
    """Begin to watch the peak of memory anew; MB (10^6 bytes) that are taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed, but kept, would hide what a run takes
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> float:
    """Largest memory since `reset_peak` in MB, of the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) / 1e6


def timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float, float]:
    """What `call` returns, its milliseconds and its milliseconds of CPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call()
    wait()
    return result, 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu_start)


if __name__ == "__main__":
    sys.exit(main())
