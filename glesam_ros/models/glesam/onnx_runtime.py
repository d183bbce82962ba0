"""Runs what `glesam export` wrote, by onnxruntime with TensorRT, CUDA or on the CPU."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glesam_ros.models.base import OutOfMemory
from glesam_ros.models.glesam import catalogue
from glesam_ros.models.glesam.base import BaseModel, Features
from glesam_ros.models.glesam.onnx_export import ENGINES, Manifest, read_manifest
from glesam_ros.models.glesam.runtime import checked_level
from glesam_ros.models.onnx_session import Shapes, choose_device, open_session, run_session
from glesam_ros.validation import FloatArray, UInt8Array

_LOG = logging.getLogger(__name__)
FOLDER = "onnx"
"""Of the graphs, in the folder of the model below `catalogue.home()`."""
MOST_PROMPTS, MOST_POINTS = 64, 16
"""Largest batch that a TensorRT engine is built for; more prompts are decoded in several batches. An engine takes the
memory of its largest batch from the start, in fp16 at 1024 4 MB a prompt for the finest features alone."""
MOST_BYTES = 2**31 - 1
"""Of a graph with its weights, for TensorRT: onnxruntime passes them on as one protobuf message."""
WRONG_IN_FP16 = ("mobile_sam",)
"""Bases that TensorRT gives wrong output of in fp16, as the authors of NanoSAM found."""
PROFILE: Shapes = {
    "points": ((1, 1, 2), (64, 1, 2), (MOST_PROMPTS, MOST_POINTS, 2)),
    "labels": ((1, 1), (64, 1), (MOST_PROMPTS, MOST_POINTS)),
}
"""Smallest, usual and largest shapes of prompts, so that one engine serves all."""


def export_folder(name: str, home: Path) -> Path:
    """Where the graphs of a model lie."""
    return home / name / FOLDER


def open_onnx_runtime(
    name: str, device: str, precision: str = "auto", folder: Path | None = None, *, base: BaseModel
) -> OnnxRuntime:
    """Open the exported graphs of a model.

    Args:
        device: "tensorrt", "cuda" or "cpu".
        precision: "auto" (fp16 with TensorRT, but for `WRONG_IN_FP16` where the graphs allow it; else that of the
            graphs), "fp32", or "fp16" (TensorRT, or fp16 graphs).
        folder: with the graphs; None takes what `glesam export` fills.
        base: says how pictures become pixels; its weights are not used.

    Raises:
        FileNotFoundError: nothing was exported; names the command.
        ValueError: files that do not fit, or are too large for TensorRT, or a precision that is not to be had.
        RuntimeError: this onnxruntime does not offer the device.
    """
    device = choose_device(device)
    folder = export_folder(name, catalogue.home()) if folder is None else folder
    manifest = read_manifest(folder, name)
    possible = ("fp16",) if manifest.fp16 else ("fp16", "fp32") if device == "tensorrt" else ("fp32",)
    if precision not in ("auto", *possible):
        raise ValueError(
            f"precision: expected auto or {' or '.join(possible)} on {device} for graphs in "
            f"{'fp16' if manifest.fp16 else 'fp32'}, got {precision!r}; export them again, with or without --fp16"
        )
    doubtful = device == "tensorrt" and catalogue.split_name(name)[0] in WRONG_IN_FP16
    if precision == "auto":
        precision = possible[-1 if doubtful else 0]
    if doubtful and precision == "fp16":
        _LOG.warning(
            "%s: others found its output wrong in fp16 with TensorRT; take precision fp32, of graphs exported without "
            "--fp16, or compare first: glesam export %s --device tensorrt --precision fp16", name, name,
        )
    if device == "tensorrt":
        _check_bytes(folder, manifest)
    return OnnxRuntime(folder, manifest, base, device, precision)


class OnnxRuntime:
    """See `glesam_ros.models.glesam.runtime.Runtime`.

    The side is that of the export, whatever is asked for. Engines of TensorRT are cached beside the graphs, apart for
    each export; the first start builds them, which takes minutes.
    """

    overlaps = False

    def __init__(self, folder: Path, manifest: Manifest, base: BaseModel, device: str, precision: str) -> None:
        self.side = manifest.side
        self._base = base
        self._asked_in_vain: set[int] = set()
        self._manifest = manifest
        # onnxruntime names an engine by the nodes of its graph, so new weights in an old layout would meet old engines
        cache = folder / ENGINES / hashlib.sha256("".join(manifest.files.values()).encode()).hexdigest()[:16]

        def open_part(part: str, shapes: Shapes | None = None) -> Any:
            fp16 = precision == "fp16" and part != "level"  # the statistics of a level need float32
            return open_session(folder / f"{part}.onnx", device, fp16, cache, shapes=shapes)

        parts = ["encoder", *(["enhancer"] if manifest.enhances else []), *(["level"] if manifest.levels else [])]
        self._sessions = {part: open_part(part) for part in parts}
        high = {
            value.name: (tuple(value.shape),) * 3
            for value in self._sessions["encoder"].get_outputs()
        }
        for part in ("decoder_one", "decoder_three"):
            self._sessions[part] = open_part(part, {**PROFILE, **high})
        provider = self._sessions["encoder"].get_providers()[0]
        self.device = f"{device} ({precision}, onnxruntime, {provider})"

    def encode(self, image: UInt8Array, side: int) -> Features:
        """(H, W, 3) uint8 RGB -> features of a batch of one; `side` gives way to that of the export."""
        if side != self.side and side not in self._asked_in_vain:
            self._asked_in_vain.add(side)
            _LOG.warning("exported graphs have %d px a side; the processing size of %d is not taken", self.side, side)
        images = torch.from_numpy(np.require(image, requirements=["C", "W"]))[None]
        latent, *high = self._run("encoder", {"pixels": self._base.pixels(images, self.side)})
        return Features(latent, tuple(high))

    def level(self, features: Features) -> float | None:
        """Degradation 0 .. 1 where the enhancer predicts it, else None."""
        if not self._manifest.levels:
            return None
        (level,) = self._run("level", _named(features))
        return checked_level(float(level[0]), self.device)

    def enhance(self, features: Features, level: float) -> Features:
        """Features with a restored latent; as they came where there is no enhancer."""
        if not self._manifest.enhances:
            return features
        levels = {"level": torch.tensor([level], dtype=torch.float32)} if self._manifest.levels else {}
        (latent,) = self._run("enhancer", {"latent": features.latent, **levels})
        return features._replace(latent=latent)

    def decode(
        self, features: Features, points: FloatArray, labels: FloatArray, several: bool
    ) -> tuple[Tensor, Tensor]:
        """As `BaseModel.decode`, on the CPU.

        Raises:
            ValueError: more points a prompt than the engines are built for.
        """
        if labels.shape[1] > MOST_POINTS:
            raise ValueError(
                f"prompts: expected at most {MOST_POINTS} points each on {self.device}, a box counts as two, got "
                f"{labels.shape[1]}; give fewer, or take the model itself instead of its export"
            )
        part = "decoder_three" if several else "decoder_one"
        found = []
        for first in range(0, len(points), MOST_PROMPTS):
            batch = slice(first, first + MOST_PROMPTS)
            prompts = {"points": torch.from_numpy(points[batch]), "labels": torch.from_numpy(labels[batch])}
            found.append(self._run(part, {**prompts, **_named(features)}))
        logits, scores = (torch.cat(column) for column in zip(*found))
        return logits, scores

    def free(self) -> None:
        """onnxruntime keeps its arena; there is nothing to give back."""

    def close(self) -> None:
        """Free everything; the runtime cannot be used afterwards."""
        self._sessions.clear()

    def _run(self, part: str, feed: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: np.ascontiguousarray(x.float().cpu().numpy()) for name, x in feed.items()}
        try:
            return [torch.from_numpy(array) for array in run_session(self._sessions[part], arrays)]
        except OutOfMemory as error:
            raise OutOfMemory(f"{part}: {error}") from None


def _check_bytes(folder: Path, manifest: Manifest) -> None:
    for graph in (file for file in manifest.files if file.endswith(".onnx")):
        size = sum((folder / file).stat().st_size for file in manifest.files if file.startswith(graph))
        if size > MOST_BYTES:
            raise ValueError(
                f"{folder / graph}: expected at most 2 GB with its weights for TensorRT, got {size / 1e9:.1f} GB; "
                f"halve it: glesam export {manifest.name} --fp16"
            )


def _named(features: Features) -> dict[str, Tensor]:
    return {"latent": features.latent, **{f"high{k}": level for k, level in enumerate(features.high)}}
