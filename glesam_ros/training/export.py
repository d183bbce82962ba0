"""Writes the four ONNX files of nano and checks them against torch.

    python -m glesam_ros.training.export --checkpoint runs/nano/decoder.pt --out glesam_ros/models/weights
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from glesam_ros.models.nano_net import HYPOTHESES, LATENT, NanoNet, kernel_weights, with_positions
from glesam_ros.training.graphs import simplify

OPSET = 17
SMALLEST_HALF = 256
"""Tensors with fewer numbers stay fp32: nothing to gain."""


class EncoderGraph(nn.Module):
    """image (1, H, W, 3) uint8 -> latent (1, C, H/8, W/8), level (1,)."""

    def __init__(self, net: NanoNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        latent, level = self.net.encoder(image.permute(0, 3, 1, 2).float())
        return latent, level


class DecoderGraph(nn.Module):
    """latent -> features with positions (1, F + 5, 2h, 2w), trunk, grid, weights (gh, gw, M, F + 5), their scores."""

    def __init__(self, net: NanoNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        features, trunk, grid, dense = self.net.decoder(latent)
        h, w = features.shape[2:]
        gh, gw = grid.shape[2:]
        flat = with_positions(features)
        weights = kernel_weights(dense[..., :-1])
        return (
            flat.reshape(1, -1, h, w), trunk, grid,
            weights.reshape(gh, gw, HYPOTHESES, -1), dense[..., -1].sigmoid().reshape(gh, gw, HYPOTHESES),
        )


class PromptGraph(nn.Module):
    """Outputs of `DecoderGraph` and prompts of O objects -> weights (1, O, 1 + M, F + 5), scores (1, O, 1 + M)."""

    def __init__(self, net: NanoNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, features: Tensor, trunk: Tensor, grid: Tensor, xy: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = self.net.decoder.prompt(features[:, :-5], trunk, grid, xy, labels)
        return kernel_weights(out[..., :-1]), out[..., -1].sigmoid()


def export(net: NanoNet, folder: Path) -> dict[str, float]:
    """Write the files; return the largest difference to torch of each part, relative to its largest output.

    The weights are stored as fp16 (half the size) and computed in fp32; torch is compared with the same rounded
    weights, so the difference is the graphs' alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    net = copy.deepcopy(net).eval()
    fold_batchnorm(net)
    for p in net.parameters():
        if p.numel() >= SMALLEST_HALF:
            p.data = p.data.half().float()
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 384, 512, 3), dtype=torch.uint8)
    latent = torch.randn(1, LATENT, 48, 64)
    decoder = DecoderGraph(net)
    with torch.no_grad():
        features, trunk, grid = decoder(latent)[:3]
    xy, labels = torch.rand(1, 3, 4, 2) * 2 - 1, torch.tensor([[[1, 0, 1, -1], [1, -1, -1, -1], [2, 3, 4, -1.0]]])
    latent_axes = {2: "h", 3: "w"}
    parts: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any], list[str]]] = {
        "encoder": (EncoderGraph(net), (image,), {"image": {1: "H", 2: "W"}}, ["latent", "level"]),
        "enhancer": (net.enhancer, (latent, torch.tensor([0.5])), {"latent": latent_axes, "level": {}}, ["restored"]),
        "decoder": (decoder, (latent,), {"latent": latent_axes}, ["features", "trunk", "grid", "weights", "scores"]),
        "prompt": (
            PromptGraph(net), (features, trunk, grid, xy, labels),
            {
                "features": {2: "h4", 3: "w4"}, "trunk": latent_axes, "grid": {2: "gh", 3: "gw"},
                "xy": {1: "objects", 2: "points"}, "labels": {1: "objects", 2: "points"},
            },
            ["prompt_weights", "prompt_scores"],
        ),
    }
    difference = {}
    for name, (module, inputs, axes, outputs) in parts.items():
        path = folder / f"nano_{name}.onnx"
        torch.onnx.export(
            module.eval(), inputs, str(path), input_names=list(axes), output_names=outputs,
            dynamic_axes=axes, opset_version=OPSET, dynamo=False,
        )
        onnx.save(simplify(onnx.load(path)), path)
        store_half(path)
        difference[name] = compare(path, module, inputs, list(axes))
    return difference


def fold_batchnorm(module: nn.Module) -> None:
    """Merge each batch normalisation into the convolution before it, so that what is rounded is what runs."""
    children = list(module.named_children())
    for (name, conv), (following, norm) in zip(children, children[1:], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, following, nn.Identity())
    for _, child in module.named_children():
        fold_batchnorm(child)


def store_half(path: Path) -> None:
    """Replace large fp32 weights of an ONNX file by fp16 with a cast, which the runtime folds when it loads."""
    model = onnx.load(str(path))
    casts = []
    for weight in list(model.graph.initializer):
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < SMALLEST_HALF:
            continue
        half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name + "_half")
        casts.append(helper.make_node("Cast", [half.name], [weight.name], to=TensorProto.FLOAT))
        model.graph.initializer.remove(weight)
        model.graph.initializer.append(half)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def compare(path: Path, module: nn.Module, inputs: tuple[Tensor, ...], names: list[str]) -> float:
    """Largest difference between the file and torch over all outputs, relative to the output's largest value."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    return max(
        float(np.abs(a - b.numpy()).max() / max(1e-6, float(b.abs().max())))
        for a, b in zip(got, expected, strict=True)
    )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="state dict that the training wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for nano_*.onnx")
    args = parser.parse_args()
    net = NanoNet()
    net.load_state_dict(torch.load(args.checkpoint, weights_only=True))
    difference = export(net, args.out)
    sizes = {p.name: p.stat().st_size for p in sorted(args.out.glob("nano_*.onnx"))}
    print(json.dumps({"relative_difference": difference, "bytes": sizes, "total": sum(sizes.values())}, indent=2))


if __name__ == "__main__":
    main()
