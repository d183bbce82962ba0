"""Parameters and memory of the weights of every full-size model, as the node has them: LoRA merged, constants folded.

The weights are random or on torch's meta device: nothing is downloaded. Activations, CUDA itself and the desktop come
on top; `glesam_speed.py` measures the peak on a GPU.

    python benchmarks/model_memory.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from the checkout

import torch
from torch import nn

from glesam_ros.models.glesam.catalogue import BASES
from glesam_ros.models.glesam.enhancer import TOKENS, UNETS, Enhancer, EnhancerConfig, SmallEnhancer
from glesam_ros.models.glesam.model import build_base


def million(module: nn.Module) -> float:
    """Parameters and buffers in 10^6."""
    return sum(x.numel() for x in (*module.parameters(), *module.buffers())) / 1e6


def base_million(name: str) -> float:
    """A base without what only videos need."""
    base = build_base(name)
    if name.startswith("sam2"):
        base.load_official(base.net.state_dict())
    return million(base)


def enhancer_million(unet: str) -> float:
    """An enhancer as it runs; `unet` is a name of `UNETS`, or "small"."""
    if unet == "small":
        return million(SmallEnhancer(EnhancerConfig(base="sam_vit_b", kind="small", unet="sd21-base")))
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**UNETS[unet])
    prompt = torch.zeros(1, TOKENS, network.config.cross_attention_dim)
    enhancer = Enhancer(EnhancerConfig(base="sam_vit_b", kind="lora", unet=unet), network, prompt)
    enhancer.fuse()
    return million(enhancer)


def main() -> int:
    """Count and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    bases = {name: base_million(name) for name in BASES}
    with torch.device("meta"):
        enhancers = {"alone": 0.0, **{f"+ {unet}": enhancer_million(unet) for unet in ("small", *UNETS)}}
    print("parameters in millions, and MB (10^6 bytes) of weights in 16 bits, alone and with an enhancer\n")
    print(f"{'base':<24}{'M':>8}" + "".join(f"{name:>14}" for name in enhancers))
    for name, count in bases.items():
        print(f"{name:<24}{count:>8.1f}" + "".join(f"{2 * (count + more):>14.0f}" for more in enhancers.values()))
    print("\nenhancers, millions: " + ", ".join(f"{k} {v:.1f}" for k, v in enhancers.items() if v))
    if args.json is not None:
        args.json.write_text(json.dumps({"bases": bases, "enhancers": enhancers}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
