"""Memory that loading a full-size model takes: the peak of the process, and what is left when it is ready.

Weights are random, of full size, in the files and layouts that are published; SD 2.1-base takes 3.5 GB of a temporary
folder, and nothing is downloaded. Each model is loaded in a process of its own, on the CPU. Anonymous memory is what
must be there; pages of the files are counted apart, because the system takes them back when it needs them.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --models sam_vit_b+glesam --precisions bf16
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from the checkout

EVERY_S = 0.005
"""How often memory is read while a model loads."""


def write_random(name: str, home: Path) -> None:
    """Files of the model `name`, base and enhancer, below `home`."""
    import torch

    from glesam_ros.models.glesam import catalogue
    from glesam_ros.models.glesam.enhancer import (
        TOKENS,
        UNETS,
        Enhancer,
        EnhancerConfig,
        SmallEnhancer,
        save_enhancer,
        write_tensors,
    )
    from glesam_ros.models.glesam.model import build_base

    base_name, kind = catalogue.split_name(name)
    base = build_base(base_name)
    file = home / catalogue.BASES[base_name].source.path
    file.parent.mkdir(parents=True, exist_ok=True)
    official = base.net.state_dict()
    torch.save({"model": official} if catalogue.BASES[base_name].family == "sam2" else official, file)
    if kind is None:
        return
    unet = "sd21-base"
    if kind == "glesam_small":
        save_enhancer(SmallEnhancer(EnhancerConfig(base_name, "small", unet)), home / name)
        return
    from diffusers import UNet2DConditionModel  # after enhancer.py, which makes it importable

    network = UNet2DConditionModel(**UNETS[unet])
    prompt = torch.randn(1, TOKENS, network.config.cross_attention_dim)
    if not (home / unet).is_dir():
        network.save_pretrained(home / unet / "unet")
        write_tensors({"prompt": prompt}, home / unet / catalogue.PROMPT_FILE)
    config = EnhancerConfig(base_name, "lora", unet, levels=kind == "glesam++")
    save_enhancer(Enhancer(config, network, prompt), home / name)


def memory() -> tuple[float, float]:
    """MB (10^6 bytes) of this process: anonymous, and pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (1.024e-3 * int(lines[key].split()[0]) for key in ("RssAnon", "RssFile"))
    return anonymous, files


def load(name: str, precision: str) -> dict[str, float]:
    """Load in this process: MB over what the imports take, and seconds."""
    from glesam_ros.models.glesam import catalogue
    from glesam_ros.models.glesam.model import load_glesam

    family = catalogue.BASES[catalogue.split_name(name)[0]].family
    importlib.import_module(f"glesam_ros.models.glesam.{'sam2' if family == 'sam2' else 'sam'}")  # no part of it
    seen: list[tuple[float, float]] = [memory()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_S):
            seen.append(memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_glesam(name, "cpu", precision)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    first, last = seen[0], memory()
    model.close()
    return {
        "peak": max(anonymous for anonymous, _ in seen) - first[0],
        "peak with files": max(map(sum, seen)) - sum(first), "after": last[0] - first[0], "seconds": seconds,
    }


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sam2.1_hiera_tiny+glesam", "sam2.1_hiera_tiny+glesam_small"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--load", nargs=2, metavar=("NAME", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(*args.load)))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        print("MB (10^6 bytes) over an idle process: peak of anonymous memory, with pages of files, after loading\n")
        print(f"{'model':<34}{'precision':<11}{'peak':>8}{'with files':>12}{'after':>8}{'seconds':>9}")
        for name in args.models:
            write_random(name, Path(folder))
            for precision in args.precisions:
                command = [sys.executable, __file__, "--load", name, precision]
                answer = subprocess.run(
                    command, env={**os.environ, "GLESAM_HOME": folder}, stdout=subprocess.PIPE, text=True, check=True
                )
                row = found[f"{name} {precision}"] = json.loads(answer.stdout.splitlines()[-1])
                print(
                    f"{name:<34}{precision:<11}{row['peak']:>8.0f}{row['peak with files']:>12.0f}{row['after']:>8.0f}"
                    f"{row['seconds']:>9.1f}", flush=True,
                )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
