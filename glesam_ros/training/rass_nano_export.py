"""Writes the files of rass-nano: the graph, checked against torch, and the card with the names of its classes.

    python -m glesam_ros.training.rass_nano_export --checkpoint runs/rass_nano/rass.pt --folder DATA/camvid \\
        --out glesam_ros/models/weights --licence "CC BY-NC 4.0, from CamVid" --trained-on "CamVid, train split"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from glesam_ros.labelled import classes_of
from glesam_ros.models.rass_nano_net import RassNano
from glesam_ros.training.export import OPSET, compare
from glesam_ros.training.graphs import simplify
from glesam_ros.training.rass_nano import load_weights
from glesam_ros.training.storage import store_half

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
    torch.onnx.export(
        module, (image,), str(files[0]), input_names=["image"], output_names=["logits"], opset_version=OPSET,
        dynamo=False,
        dynamic_axes={"image": {1: "H", 2: "W"}, "logits": {2: "h", 3: "w"}},
    )
    graph = simplify(onnx.load(files[0]))
    store_half(graph)
    onnx.save(graph, files[0])
    onnx.checker.check_model(str(files[0]))
    files[1].write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return {
        "torch": compare(files[0], module, (image,), ["image"]), "bytes": {f.name: f.stat().st_size for f in files},
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
        load_weights(net, args.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    card = {
        "classes": list(listed.classes), "palette": listed.shown.tolist(), "long_side": LONG_SIDE,
        "licence": args.licence, "trained_on": args.trained_on,
    }
    print(json.dumps(export(net, card, args.out), indent=2))


if __name__ == "__main__":
    main()
