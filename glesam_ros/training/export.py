"""Writes the ONNX files of nano, in fp32 and for CPUs in 8 bits, and checks them against torch.

`glesam train` ends with it; by hand, for example of one stage:

    python -m glesam_ros.training.export --checkpoint runs/nano/nano.pt --out glesam_ros/models/weights \\
        --calibration DATA
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from accelerate import PartialState
from torch import Tensor, nn

from glesam_ros.checksum import sha256
from glesam_ros.models.nano import CHECKSUM, PARTS, TENSORS
from glesam_ros.models.nano_net import HYPOTHESES, NanoNet, kernel_weights, with_positions
from glesam_ros.training.batches import draw_pairs
from glesam_ros.training.checkpoint import load_into
from glesam_ros.training.config import Config, SourceConfig, load_config
from glesam_ros.training.graphs import quiet_onnxruntime, shorten_names, simplify
from glesam_ros.training.quantize import Grids, hand_out_bytes, quantize
from glesam_ros.training.recipes import RECIPES
from glesam_ros.training.sources import load_scenes
from glesam_ros.training.storage import save, split_convolutions, store_half

_LOG = logging.getLogger(__name__)
RESULT = "nano.pt"
"""What a whole run leaves: weights in which `enhancer` of its configuration is folded."""
OPSET = 17
KEPT = {"decoder": ("/dense/", "Add", "Clip")}
"""Nodes that stay fp32. Scores of the grid: in 8 bits neighbours would be equal, a peak have several tops. Sums and
limits: they are those of mask kernels, whose centres reach further on a larger grid than on that of the calibration."""
SHARPNESS = 3.0
"""Factor on mask logits: training leaves them small, and stability is measured by shifts of 1. Masks stay the same."""
ALL_STAGES = frozenset(stage for recipe in RECIPES.values() for stage in recipe.stages)
PAIRS = 16
"""Crops for calibration, each clear and degraded."""


class StemGraph(nn.Module):
    """image (1, H, W, 3) uint8 -> s4 (1, 24, H/4, W/4), s8 (1, 40, H/8, W/8), level (1,)."""

    def __init__(self, net: NanoNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s4, s8, level = self.net.stem(image.permute(0, 3, 1, 2).float())
        return s4, s8, level


class StepGraph(nn.Module):
    """latent (1, C, h, w) of the adapted trunk, level (1,) -> restored (1, C, h, w): the denoising step."""

    def __init__(self, net: NanoNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent: Tensor, level: Tensor) -> Tensor:
        return self.net.enhancer.denoise(latent, level)


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
        weights = SHARPNESS * kernel_weights(dense[..., :-1])
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
        return SHARPNESS * kernel_weights(out[..., :-1]), out[..., -1].sigmoid()


class Part(NamedTuple):
    """What a part is exported from: network, inputs to trace it with, and by input the axes of any length."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    axes: dict[str, dict[int, str]]


def export(
    net: NanoNet, folder: Path, pictures: Sequence[np.ndarray[Any, Any]] = (), check: bool = True
) -> dict[str, dict[str, float]]:
    """Write the files: fp32 graphs, with `pictures` also 8-bit graphs of all but the prompt, and all their weights.

    Args:
        net: trained.
        folder: gets `nano_<part>.onnx`, `nano_<part>_int8.onnx`, `nano_weights.bin` and its checksum; older ones there
            are replaced.
        pictures: (H, W, 3) uint8 RGB each, sides multiples of 32, the first half clear, the others degraded; the ranges
            of the 8-bit graphs come from them.
        check: run the files for the report.

    Returns:
        "torch": largest difference of each fp32 file to torch, relative to the largest output; with pictures "int8":
        root mean square of the difference of each 8-bit file to fp32, relative to that of the output, on `pictures`.
        Nothing without `check`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("nano_*.onnx"), folder / CHECKSUM, folder / TENSORS):
        old.unlink(missing_ok=True)
    parts = parts_of(copy.deepcopy(net).eval())
    graphs = {name: _traced(name, part, folder / f"nano_{name}.onnx") for name, part in parts.items()}
    with quiet_onnxruntime():
        feeds = calibration(graphs, pictures) if len(pictures) else {}
        small, grids = _in_8_bits(graphs, feeds)
    for name, graph in graphs.items():
        split_convolutions(graph, small.get(name))
    files = {f"nano_{name}_int8.onnx": graph for name, graph in small.items()}
    files |= {f"nano_{name}.onnx": graph for name, graph in graphs.items()}
    for graph in files.values():
        store_half(graph)
        shorten_names(graph)
    save(files, folder, TENSORS)
    (folder / CHECKSUM).write_text(f"{sha256(folder / TENSORS)}  {TENSORS}\n", encoding="utf-8")
    with quiet_onnxruntime():
        return _report(folder, parts, feeds, grids) if check else {}


def parts_of(net: NanoNet) -> dict[str, Part]:
    """The parts of a network in evaluation mode, by their names in `glesam_ros.models.nano.PARTS`."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 384, 512, 3), dtype=torch.uint8)
    stem, decoder = StemGraph(net), DecoderGraph(net)
    with torch.no_grad():
        s4, s8, level = stem(image)
        latent = net.trunk(s4, s8)
        features, trunk, grid = decoder(latent)[:3]
    xy, labels = torch.rand(1, 3, 4, 2) * 2 - 1, torch.tensor([[[1, 0, 1, -1], [1, -1, -1, -1], [2, 3, 4, -1.0]]])
    latent_axes = {2: "h", 3: "w"}
    stem_axes = {"s4": {2: "h4", 3: "w4"}, "s8": {2: "h8", 3: "w8"}}
    prompt_axes = {
        "features": {2: "h4", 3: "w4"}, "trunk": latent_axes, "grid": {2: "gh", 3: "gw"},
        "xy": {1: "objects", 2: "points"}, "labels": {1: "objects", 2: "points"},
    }
    return {
        "stem": Part(stem, (image,), {"image": {1: "H", 2: "W"}}),
        "trunk": Part(net.trunk, (s4, s8), stem_axes),
        "adapted": Part(net.enhancer.trunk, (s4, s8), stem_axes),
        "enhancer": Part(StepGraph(net), (latent, level), {"latent": latent_axes}),
        "decoder": Part(decoder, (latent,), {"latent": latent_axes}),
        "prompt": Part(PromptGraph(net), (features, trunk, grid, xy, labels), prompt_axes),
    }


def _traced(name: str, part: Part, path: Path) -> onnx.ModelProto:
    """The fp32 graph of a part; torch writes it to `path` on the way."""
    taken, made = map(list, PARTS[name])
    trace(part.module, part.inputs, path, taken, made, part.axes)
    return simplify(onnx.load(path))


def trace(
    module: nn.Module, inputs: tuple[Tensor, ...], path: Path, taken: list[str], made: list[str],
    axes: dict[str, dict[int, str]],
) -> None:
    """Write the graph of `module` to `path`, with names of inputs and outputs, and the axes of any length by name."""
    with warnings.catch_warnings():
        # that tracing fixes what depends on numbers: tests compare graphs and torch at other sizes
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), inputs, str(path), input_names=taken, output_names=made, dynamic_axes=axes,
            opset_version=OPSET, dynamo=False,
        )


def _in_8_bits(
    graphs: dict[str, onnx.ModelProto], feeds: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, onnx.ModelProto], Grids]:
    """8-bit graphs of the parts in `feeds`, and the grids of what the stem hands to the others in 8 bits."""
    small: dict[str, onnx.ModelProto] = {}
    grids: Grids = {}
    for name, feed in feeds.items():
        given = {key: grid for key, grid in grids.items() if key in feed[0]}
        small[name] = quantize(graphs[name], feed, KEPT.get(name, ()), given)
        if name == "stem":
            grids = hand_out_bytes(small[name], list(PARTS["trunk"][0]))
    return small, grids


def _report(
    folder: Path, parts: dict[str, Part], feeds: dict[str, list[dict[str, Any]]], grids: Grids
) -> dict[str, dict[str, float]]:
    """What `export` returns, of the files in `folder`."""
    report = {"torch": {
        name: compare(folder / f"nano_{name}.onnx", part.module, part.inputs, list(PARTS[name][0]))
        for name, part in parts.items()
    }}
    if feeds:
        report["int8"] = {name: drift(folder, name, feed, grids) for name, feed in feeds.items()}
    return report


def calibration(
    graphs: dict[str, onnx.ModelProto], pictures: Sequence[np.ndarray[Any, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Inputs of each part but the prompt: what it gets of `pictures` where the runtime has them."""
    stem, trunk, adapted, enhancer = (
        open_graph(graphs[name].SerializeToString()) for name in ("stem", "trunk", "adapted", "enhancer")
    )
    feeds: dict[str, list[dict[str, Any]]] = {name: [] for name in graphs if name != "prompt"}
    clear = len(pictures) - len(pictures) // 2
    for number, picture in enumerate(pictures):
        feeds["stem"].append({"image": np.ascontiguousarray(picture)[None]})
        s4, s8, level = stem.run(None, feeds["stem"][-1])
        for name in ("trunk", "adapted"):
            feeds[name].append({"s4": s4, "s8": s8})
        # the decoder seldom gets what was not adapted: each fourth time here
        if number % 4 == 3:
            feeds["decoder"].append({"latent": trunk.run(None, feeds["trunk"][-1])[0]})
        (latent,) = adapted.run(None, feeds["adapted"][-1])
        feeds["enhancer"].append({"latent": latent, "level": level})
        if number >= clear:
            (latent,) = enhancer.run(None, feeds["enhancer"][-1])
        feeds["decoder"].append({"latent": latent})
    return feeds


def drift(folder: Path, name: str, feeds: list[dict[str, Any]], grids: Grids) -> float:
    """Root mean square of int8 minus fp32, relative to fp32's, of the first output over all feeds.

    Args:
        grids: of what the 8-bit files hand to each other in 8 bits.
    """
    plain, small = (open_graph(str(folder / f"nano_{name}{kind}.onnx")) for kind in ("", "_int8"))
    first = small.get_outputs()[0].name
    squares = np.zeros(2)
    for feed in feeds:
        a = plain.run([first], feed)[0].astype(np.float64)
        rounded = {key: in_bytes(x, *grids[key]) if key in grids else x for key, x in feed.items()}
        b = small.run([first], rounded)[0].astype(np.float64)
        if first in grids:
            scale, zero = grids[first]
            b = (b - float(zero)) * float(scale)
        squares += np.square(a - b).sum(), np.square(a).sum()
    return float(np.sqrt(squares[0] / max(squares[1], 1e-12)))


def in_bytes(x: np.ndarray[Any, Any], scale: np.float32, zero: np.uint8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What an 8-bit graph takes for the numbers x."""
    return np.clip(np.rint(x / scale) + float(zero), 0, 255).astype(np.uint8)


def open_graph(source: str | bytes) -> ort.InferenceSession:
    """A session on the CPU of an ONNX file or its bytes."""
    return ort.InferenceSession(source, providers=["CPUExecutionProvider"])


def compare(path: Path, module: nn.Module, inputs: tuple[Tensor, ...], names: list[str]) -> float:
    """Largest difference between the file and torch over all outputs, relative to the output's largest value."""
    session = open_graph(str(path))
    got = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    return max(
        float(np.abs(a - b.numpy()).max() / max(1e-6, float(b.abs().max())))
        for a, b in zip(got, expected, strict=True)
    )


def read_net(checkpoint: Path) -> NanoNet:
    """The network of a state dict that a run wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another network, or of a stage of a run whose `enhancer` the weights do not hold yet.
    """
    beside = checkpoint.with_name("config.yaml")
    if checkpoint.name != RESULT and beside.is_file():
        enhancer = load_config(beside).enhancer
        if enhancer != Config().enhancer:
            raise ValueError(
                f"{checkpoint}: expected {RESULT} of this run, the only weights that have its enhancer.gamma="
                f"{enhancer.gamma:g} and enhancer.condition={enhancer.condition} in them; finish the run"
            )
    net = NanoNet()
    load_into(net, checkpoint, "nano")
    return net


def export_run(config: Config, data: Path, out: Path) -> Path:
    """The model folder of a finished run: its `nano.pt`, exported and calibrated by its own sources.

    Args:
        config: of the run.
        data: folder that the paths of its sources are relative to.
        out: the run's folder, gets `nano/`. What an earlier call wrote there stays, unless a stage was finished later.

    Raises:
        FileNotFoundError: `data` lacks one of the sources.
    """
    folder = out / "nano"

    def write() -> None:
        export(read_net(out / RESULT), folder, calibration_pictures(data, sources=config.sources), check=False)

    write_once(write, folder / CHECKSUM, out)
    return folder


def write_once(write: Callable[[], object], last: Path, out: Path) -> None:
    """Call `write` in the main process of a run, unless `last`, what it writes last, came after all stages in `out`."""
    stages = [path.stat().st_mtime_ns for path in out.glob("*.pt") if path.stem in ALL_STAGES]
    state = PartialState()
    if state.is_main_process and not (last.is_file() and last.stat().st_mtime_ns > max(stages, default=0)):
        _LOG.info("writing %s", last.parent)
        write()
    state.wait_for_everyone()


def sources_of(checkpoint: Path) -> tuple[SourceConfig, ...]:
    """What the run trained on, by the `config.yaml` beside its checkpoint; the recipe's sources where there is none."""
    beside = checkpoint.with_name("config.yaml")
    return (load_config(beside) if beside.is_file() else Config()).sources


def calibration_pictures(
    data: Path, pairs: int = PAIRS, sources: Sequence[SourceConfig] = Config().sources
) -> list[np.ndarray[Any, Any]]:
    """Crops of training photographs as the default recipe draws them: all of them clear, then the same degraded.

    Returns:
        2 * `pairs` crops (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: `data` lacks one of the sources.
    """
    config = Config()
    drawn = draw_pairs(load_scenes(tuple(sources), data), np.random.default_rng(0), config, pairs)
    return [picture for kind in ("clear", "degraded") for picture in drawn[kind].numpy()]


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="state dict that the training wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for nano_*.onnx and nano_weights.bin")
    parser.add_argument(
        "--calibration", type=Path, metavar="DATA",
        help="data of the training (train splits only), for the 8-bit graphs; without it there are none",
    )
    args = parser.parse_args()
    try:
        net = read_net(args.checkpoint)
        sources = sources_of(args.checkpoint)
        pictures = calibration_pictures(args.calibration, sources=sources) if args.calibration else []
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    report: dict[str, Any] = {**export(net, args.out, pictures)}
    report["bytes"] = {p.name: p.stat().st_size for p in sorted(args.out.glob("nano_*"))}
    report["total"] = sum(report["bytes"].values())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
