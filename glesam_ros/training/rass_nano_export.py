"""Writes the files of rass-nano: the graph, checked against torch, and the card with the names of its classes.

`glesam train` ends with it; by hand, to say a licence:

    python -m glesam_ros.training.rass_nano_export --checkpoint runs/rass_nano/rass.pt --folder DATA/camvid \\
        --out glesam_ros/models/weights --licence "CC BY-NC 4.0, from CamVid" --trained-on "CamVid, train split"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from glesam_ros.labelled import classes_of
from glesam_ros.models.rass_nano_net import RassNano
from glesam_ros.training.checkpoint import load_into
from glesam_ros.training.export import compare, trace, write_once
from glesam_ros.training.graphs import simplify
from glesam_ros.training.labelled_crops import load_labelled
from glesam_ros.training.rass_nano_config import RassNanoConfig
from glesam_ros.training.storage import store_half
from glesam_ros.validation import UInt8Array

LONG_SIDE = 640
"""Larger pictures are scaled down inside the model."""
EXAMPLE = (96, 128)
"""Height and width of the picture that torch and graph are compared on."""


class SemanticGraph(nn.Module):
    """image (1, H, W, 3) uint8 -> logits (1, K, H/4, W/4)."""

    def __init__(self, net: RassNano) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image)
        return logits


def export(net: RassNano, card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write `rass_nano.onnx` and `rass_nano.json`; older ones there are replaced.

    Args:
        net: trained, of as many classes as the card names.
        card: what the JSON file says: classes, palette, long_side, licence; more where it is wanted.
        folder: is made.

    Returns:
        "torch": largest difference of the graph to torch, relative to the largest output; "bytes" of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = SemanticGraph(net.to(memory_format=torch.contiguous_format)).eval()  # type: ignore[call-overload]
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, *EXAMPLE, 3), np.uint8))
    files = folder / "rass_nano.onnx", folder / "rass_nano.json"
    axes = {"image": {1: "H", 2: "W"}, "logits": {2: "h", 3: "w"}}
    trace(module, (image,), files[0], ["image"], ["logits"], axes)
    graph = simplify(onnx.load(files[0]))
    store_half(graph)
    onnx.save(graph, files[0])
    onnx.checker.check_model(str(files[0]))
    files[1].write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return {
        "torch": compare(files[0], module, (image,), ["image"]), "bytes": {f.name: f.stat().st_size for f in files},
    }


def export_run(config: RassNanoConfig, data: Path, out: Path) -> Path:
    """The model folder of a finished run: its `rass.pt`, exported with the classes of its sources.

    Args:
        config: of the run.
        data: folder that the paths of its sources are relative to.
        out: the run's folder, gets `rass_nano/`. What an earlier call wrote there stays, unless a stage was finished
            later.

    Raises:
        FileNotFoundError: `data` lacks one of the sources, or the run trained no `rass`.
        ValueError: labels that cannot be read.
    """
    folder = out / "rass_nano"

    def write() -> None:
        scenes = load_labelled(config.sources, data)
        net = RassNano(len(scenes.classes))
        load_into(net, out / "rass.pt", "rass-nano")
        trained_on = ", ".join(f"{source.path} ({source.split})" for source in config.sources)
        export(net, card(scenes.classes, scenes.palette, "that of the training data", trained_on), folder)

    write_once(write, folder / "rass_nano.json", out)
    return folder


def card(classes: Sequence[str], palette: UInt8Array, licence: str, trained_on: str) -> dict[str, Any]:
    """What `rass_nano.json` says of K classes with the colours `palette` (K, 3)."""
    return {
        "classes": list(classes), "palette": palette.tolist(), "long_side": LONG_SIDE, "licence": licence,
        "trained_on": trained_on,
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="state dict that the training wrote")
    parser.add_argument("--folder", type=Path, required=True, help="labelled pictures: names and colours of classes")
    parser.add_argument("--out", type=Path, required=True, help="folder for rass_nano.onnx and rass_nano.json")
    parser.add_argument("--licence", required=True, help="of the weights, as their data demands")
    parser.add_argument("--trained-on", required=True, help="data sets and splits")
    args = parser.parse_args()
    try:
        listed = classes_of(args.folder)
        net = RassNano(len(listed.classes))
        load_into(net, args.checkpoint, "rass-nano")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    written = card(listed.classes, listed.shown, args.licence, args.trained_on)
    print(json.dumps(export(net, written, args.out), indent=2))


if __name__ == "__main__":
    main()
