"""A full-size model as ONNX graphs for TensorRT and CUDA, held against torch on real pictures.

| Graph | Inputs | Outputs |
|---|---|---|
| encoder | pixels (1, 3, S, S) | latent (1, 256, S / 16, S / 16); SAM 2: high0 (1, 32, S / 4, S / 4), high1 at S / 8 |
| enhancer | latent; GleSAM++: level (1,) | restored latent |
| level (GleSAM++) | latent, high0, high1 | level (1,) |
| decoder_one | points (K, N, 2), labels (K, N), latent, high0, high1 | logits (K, 1, S / 4, S / 4), scores (K, 1) |
| decoder_three | the same | the same for three masks |

Inputs and outputs are float32. So is what lies between, where a runtime may choose to narrow it; or it is fp16, in half
the bytes: onnxruntime hands a graph to TensorRT as one protobuf message, which ends at 2 GB, and the U-Net of Stable
Diffusion has 3.3 GB in float32. S is fixed at export, K and N are dynamic. Pixels are what `BaseModel.pixels` makes.
Opset 18, by torch's exporter on `torch.export`. Care was needed in three places: the length
of a tensor must be read as `shape[0]` to stay dynamic, relative positions of SAM's encoder are part of a fused
attention (`sam.EncoderAttention`), and graphs beyond protobuf's 2 GB keep their weights in a file beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glesam_ros.checksum import sha256
from glesam_ros.models.glesam.base import BaseModel, Features
from glesam_ros.models.glesam.enhancer import Enhancer, SmallEnhancer
from glesam_ros.models.glesam.runtime import Runtime, TorchRuntime
from glesam_ros.validation import UInt8Array

MANIFEST = "export.json"
ENGINES = "tensorrt"
"""Folder of TensorRT's engines, beside the graphs that they were built from."""
PARTS = ("encoder", "enhancer", "level", "decoder_one", "decoder_three")
"""Graphs that an export may have."""
OPSET = 18
EXTERNAL_FROM = 1_800_000_000
"""Bytes of weights from which they go into a file of their own; protobuf ends at 2 GB."""
EXAMPLES = (3, 2)
"""Prompts and points of the trace; both are dynamic in the graph."""
LEVEL = 0.7
"""Degradation that the enhancer is told in the comparison."""
GRID = 4
"""Points a side that are decoded in the comparison."""


@dataclass(frozen=True)
class Manifest:
    """What an export is; the content of `export.json`.

    Attributes:
        name: of the model.
        side: of the square input.
        opset: of the graphs.
        levels: whether the enhancer predicts and takes levels.
        enhances: whether there is an enhancer.
        fp16: whether the graphs compute in fp16.
        files: SHA-256 by file name.
        torch: version that exported.
    """

    name: str
    side: int
    opset: int
    levels: bool
    enhances: bool
    fp16: bool
    files: dict[str, str]
    torch: str


@dataclass(frozen=True)
class Difference:
    """How far two runtimes are apart in one output.

    Attributes:
        output: what was compared.
        largest, mean: of the absolute difference, as a share of the output's deviation (logits, latents) or as it is
            (scores, level); for masks 1 - IoU.
    """

    output: str
    largest: float
    mean: float


class _Encode(nn.Module):
    def __init__(self, base: BaseModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.dtype = base, dtype

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.base.encode(pixels.to(self.dtype))
        return features.latent.float(), *(level.float() for level in features.high)


class _Level(nn.Module):
    def __init__(self, enhancer: Enhancer | SmallEnhancer) -> None:
        super().__init__()
        self.enhancer = enhancer

    def forward(self, latent: Tensor, high0: Tensor | None = None, high1: Tensor | None = None) -> Tensor:
        return self.enhancer.predict_level(_features(latent, high0, high1))


class _Decode(nn.Module):
    def __init__(self, base: BaseModel, dtype: torch.dtype, several: bool) -> None:
        super().__init__()
        self.base, self.dtype, self.several = base, dtype, several

    def forward(
        self, points: Tensor, labels: Tensor, latent: Tensor, high0: Tensor | None = None, high1: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = _features(latent, high0, high1)
        narrow = Features(latent.to(self.dtype), tuple(level.to(self.dtype) for level in features.high))
        logits, scores = self.base.decode(narrow, points, labels, self.several)
        return logits.float(), scores.float()


def _features(latent: Tensor, high0: Tensor | None, high1: Tensor | None) -> Features:
    return Features(latent) if high0 is None or high1 is None else Features(latent, (high0, high1))


def export_model(
    name: str,
    base: BaseModel,
    enhancer: Enhancer | SmallEnhancer | None,
    out: Path,
    side: int,
    fp16: bool = False,
    external_from: int = EXTERNAL_FROM,
) -> Manifest:
    """Write the graphs and `export.json` into `out`, in place of an export that is there, and of its engines.

    Args:
        base, enhancer: on the CPU in float32; taken over: LoRA is merged, constants are folded, weights are narrowed.
        side: of the square input, a multiple of 128.
        fp16: graphs compute in fp16; the level of GleSAM++ and the places of prompts stay float32.
        external_from: see `EXTERNAL_FROM`.

    Raises:
        ModuleNotFoundError: torch's exporter lacks onnxscript.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).is_file():  # of an export before; a folder that is not ours is left as it is
        (out / MANIFEST).unlink()
        shutil.rmtree(out / ENGINES, ignore_errors=True)
    for old in (old for part in PARTS for old in out.glob(f"{part}.onnx*")):
        old.unlink()
    base.eval()
    levels = enhancer is not None and enhancer.level is not None
    pixels = torch.zeros(1, 3, side, side)
    with torch.no_grad():
        features = base.encode(pixels)
    dtype = torch.float16 if fp16 else torch.float32
    base.to(dtype)
    if enhancer is not None:
        enhancer.for_inference(dtype)
    names = ["latent", *(f"high{k}" for k in range(len(features.high)))]
    seen = (features.latent, *features.high)
    fixed: dict[str, Any] = dict.fromkeys(names)
    prompts = torch.rand(*EXAMPLES, 2) * side, torch.ones(EXAMPLES)
    many, points = torch.export.Dim("K", min=1, max=4096), torch.export.Dim("N", min=1, max=1024)
    dynamic = {"points": {0: many, 1: points}, "labels": {0: many, 1: points}, **fixed}
    graphs: list[tuple[str, nn.Module, tuple[Tensor, ...], list[str], list[str], dict[str, Any] | None]] = [
        ("encoder", _Encode(base, dtype), (pixels,), ["pixels"], names, None)
    ]
    if enhancer is not None:
        level = torch.tensor([LEVEL])
        told = (features.latent, level) if levels else (features.latent,)
        graphs.append(("enhancer", enhancer, told, ["latent", "level"][: len(told)], ["restored"], None))
    if enhancer is not None and levels:
        graphs.append(("level", _Level(enhancer), seen, names, ["level"], None))
    for several in (False, True):
        part = "decoder_three" if several else "decoder_one"
        decode, given = _Decode(base, dtype, several), (*prompts, *seen)
        graphs.append((part, decode, given, list(dynamic), ["logits", "scores"], dynamic))
    for part, module, inputs, inside, outside, shapes in graphs:
        _write(out / f"{part}.onnx", module, inputs, inside, outside, shapes, external_from)
    files = {path.name: sha256(path) for part, *_ in graphs for path in sorted(out.glob(f"{part}.onnx*"))}
    manifest = Manifest(name, side, OPSET, levels, enhancer is not None, fp16, files, torch.__version__)
    (out / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def _write(
    path: Path,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    inside: list[str],
    outside: list[str],
    shapes: dict[str, Any] | None,
    external_from: int,
) -> None:
    weights = sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, input_names=inside, output_names=outside, dynamic_shapes=shapes,
            opset_version=OPSET, verbose=False,
        )
    if program is None:
        raise RuntimeError(f"{path.name}: torch's exporter gave nothing")
    program.save(path, external_data=weights >= external_from)


def read_manifest(folder: Path, name: str) -> Manifest:
    """The manifest of an export of the model `name`, whose files are all there and whole.

    Raises:
        FileNotFoundError: nothing was exported, or a file is missing; names the command.
        ValueError: it is of another model, or a file changed.
    """
    path = folder / MANIFEST
    command = f"glesam export {name}"
    if not path.is_file():
        raise FileNotFoundError(f"expected exported graphs of {name} at {path}, found no file; make them: {command}")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected what {command} writes, cannot read it: {error}") from error
    if manifest.name != name:
        raise ValueError(f"{path}: expected graphs of {name}, got those of {manifest.name}; make them: {command}")
    for file, checksum in manifest.files.items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"expected {folder / file}, found no file; make it again: {command}")
        if sha256(folder / file) != checksum:
            raise ValueError(f"{folder / file}: is not what was exported; make it again: {command}")
    return manifest


def compare(ours: TorchRuntime, theirs: Runtime, images: Sequence[UInt8Array], side: int) -> list[Difference]:
    """How far an exported model is from torch on pictures (H, W, 3) uint8; each stage gets the same inputs in both."""
    rows: dict[str, list[tuple[float, float]]] = {}

    def note(output: str, expected: Tensor, found: Tensor, scaled: bool = True) -> None:
        expected, found = expected.float().cpu(), found.float().cpu()
        error = (expected - found).abs() / (expected.std().clamp_min(1e-6) if scaled else 1)
        rows.setdefault(output, []).append((float(error.max()), float(error.mean())))

    steps = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID * side
    points = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 1, 2).astype(np.float32)
    labels = np.ones(points.shape[:2], np.float32)
    for image in images:
        features, exported = ours.encode(image, side), theirs.encode(image, side)
        note("latent", features.latent, exported.latent)
        for k, (own, other) in enumerate(zip(features.high, exported.high)):
            note(f"high{k}", own, other)
        level, other_level = ours.level(features), theirs.level(features)
        if level is not None and other_level is not None:
            note("level", torch.tensor([level]), torch.tensor([other_level]), scaled=False)
        restored = ours.enhance(features, LEVEL)
        note("restored latent", restored.latent, theirs.enhance(features, LEVEL).latent)
        for several in (False, True):
            logits, scores = ours.decode(restored, points, labels, several)
            other_logits, other_scores = theirs.decode(restored, points, labels, several)
            note("logits", logits, other_logits)
            note("scores", scores, other_scores, scaled=False)
            own, other = logits.cpu() > 0, other_logits.cpu() > 0
            lost = (own ^ other).sum((2, 3)) / (own | other).sum((2, 3)).clamp_min(1)  # 0 of two empty masks
            rows.setdefault("masks, 1 - IoU", []).append((float(lost.max()), float(lost.mean())))
    return [
        Difference(output, max(high for high, _ in values), float(np.mean([mean for _, mean in values])))
        for output, values in rows.items()
    ]
