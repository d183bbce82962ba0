"""The embedded model "nano": GleSAM in small, by onnxruntime on CPU, CUDA or TensorRT.

Training and network: `glesam_ros.models.nano_net`; what it was trained on and its figures: docs/models.md.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glesam_ros.checksum import sha256
from glesam_ros.masks import extents_of
from glesam_ros.models import second_look, shapes
from glesam_ros.models.base import Budget, Candidates, Embedding, check_finite
from glesam_ros.models.onnx_session import AGAIN, engine_cache, on_device, open_session, run_session
from glesam_ros.models.proposals import choose, with_votes
from glesam_ros.validation import FloatArray, UInt8Array

_LOG = logging.getLogger(__name__)
WEIGHTS = Path(__file__).parent / "weights"
TENSORS = "nano_weights.bin"
"""What the graphs hold, each tensor once."""
CHECKSUM = "nano_weights.sha256"
"""Of `TENSORS`, as `sha256sum --check` reads it; folders without one are not checked."""
OWN_SIZE = 512
"""Long side of the image inside the model where the budget names none."""
THRESHOLDS = (0.15, 0.5)
"""Score and stability below which everything mode drops masks where the settings name none."""
LEAST_SIZE = 256
"""Smaller long sides inside the model are taken as this."""
MULTIPLE = 32
"""Height and width inside the model are multiples of this, the encoder's coarsest stride."""
PARTS = {
    "stem": (("image",), ("s4", "s8", "level")),
    "trunk": (("s4", "s8"), ("latent",)),
    "adapted": (("s4", "s8"), ("latent",)),
    "enhancer": (("latent", "level"), ("restored",)),
    "decoder": (("latent",), ("features", "trunk", "grid", "weights", "scores")),
    "prompt": (("features", "trunk", "grid", "xy", "labels"), ("prompt_weights", "prompt_scores")),
}
"""Names of inputs and outputs of each part, in their order."""
IN_8_BITS = tuple(part for part in PARTS if part != "prompt")
"""Parts that have an 8-bit file; the prompt part is small."""
DISTINCT = 0.375
"""Share of the candidates asked for in everything mode that become masks: they differ already, so few are dropped."""
BOX_CENTRE = 4
"""Label of the point that is added in the middle of each box."""


class Nano:
    """Model for the pipeline; see `glesam_ros.models.base.SegmentationModel`.

    Args:
        device: "auto", "cpu", "cuda" or "tensorrt".
        precision: "auto" (int8 on the CPU where the folder has its files, else fp32), "fp32", "int8" (CPU only) or
            "fp16" (TensorRT only).
        weights: folder with the ONNX files; the shipped one where None.
        threads: of each operator on the CPU; 0 is one a core.

    Raises:
        FileNotFoundError: a model file is missing.
        RuntimeError: the device is not available.
        ValueError: a precision that the device does not have; or a file is damaged or of another part, names it.
    """

    name = "nano"
    classes: tuple[str, ...] = ("object",)
    own_size = OWN_SIZE
    thresholds = THRESHOLDS
    overlaps = False

    def __init__(
        self, device: str = "auto", precision: str = "auto", weights: Path | None = None, threads: int = 0
    ) -> None:
        folder = WEIGHTS if weights is None else weights
        _check_tensors(folder)
        self.device = on_device(device, functools.partial(self._open, folder, precision, threads))
        _LOG.info("nano runs on %s", self.device)

    def _open(self, folder: Path, precision: str, threads: int, device: str) -> str:
        """Open all parts on `device`; answers where they run, in words."""
        if precision == "auto":
            there = all((folder / f"nano_{part}_int8.onnx").is_file() for part in IN_8_BITS)
            precision = "int8" if device == "cpu" and there else "fp32"
        if precision == "bf16":
            raise ValueError("precision: nano has no bf16; use auto, fp32, int8 (CPU) or fp16 (TensorRT)")
        needed = {"fp16": "tensorrt", "int8": "cpu"}.get(precision, device)
        if device != needed:
            raise ValueError(f"precision: {precision} needs device {needed}, got {device}; use auto or fp32")
        cache = engine_cache(folder.glob("nano_*")) if device == "tensorrt" else None

        def open_part(part: str) -> Any:
            kind = "_int8" if precision == "int8" and part in IN_8_BITS else ""
            file = folder / f"nano_{part}{kind}.onnx"
            session = open_session(file, device, precision == "fp16", cache, threads)
            names = tuple(tuple(end.name for end in ends) for ends in (session.get_inputs(), session.get_outputs()))
            if names != PARTS[part]:
                expected, got = (f"{', '.join(x)} -> {', '.join(y)}" for x, y in (PARTS[part], names))
                raise ValueError(f"{file}: expected a graph {expected}, got {got}; {AGAIN}")
            return session

        self._stem, self._trunk, self._adapted, self._enhancer, self._decoder, self._prompt = map(open_part, PARTS)
        return f"{device} ({precision}, onnxruntime, {self._stem.get_providers()[0]})"

    def encode(self, image: UInt8Array, budget: Budget) -> Embedding:
        """Features of the stem and the level; one of the two trunks runs later, in `finished`, `adapted` or `enhance`.

        Raises:
            OutOfMemory: the device lacked memory.
        """
        size = (int(image.shape[0]), int(image.shape[1]))
        inside = resized(image, model_size(size, max(LEAST_SIZE, budget.processing_size or OWN_SIZE)))
        s4, s8, level = run_session(self._stem, {"image": inside[None]})
        check_finite(level, f"level of nano on {self.device}")
        seen = Embedding(None, size, float(level[0]), extra={"image": image, "s4": s4, "s8": s8})
        finish, adapt = (functools.partial(self._finish, seen, trunk) for trunk in (self._trunk, self._adapted))
        return dataclasses.replace(seen, finish=finish, adapt=adapt)

    def enhance(self, embedding: Embedding) -> Embedding:
        """As `SegmentationModel.enhance`: the latent (1, 96, h / 8, w / 8) float32. Raises OutOfMemory."""
        seen = self._finish(embedding, self._adapted)
        level = np.array([embedding.degradation], np.float32)
        (latent,) = run_session(self._enhancer, {"latent": seen.latent, "level": level})
        if second_look.share(seen.degradation) > 0:
            seen.extra["image"] = seen.extra["image"].copy()  # its owner may write the next one into it
        return dataclasses.replace(seen, latent=latent, enhanced=True)

    def propose(self, embedding: Embedding, score_threshold: float, limit: int, budget: Budget) -> Candidates:
        """As `SegmentationModel.propose`: logits (K, h / 4, w / 4) float32. Raises OutOfMemory."""
        features, _, _, weights, scores = self._shared(embedding)
        chosen, found, rank = choose(
            weights.reshape(-1, weights.shape[-1]), scores.ravel(), features[0],
            score_threshold, budget.stability_threshold, budget.nms_iou, math.ceil(DISTINCT * limit),
        )
        return Candidates(_masks(chosen, features), found, rank, islands=shapes.SPECK)

    def prompt(self, embedding: Embedding, points: FloatArray, labels: FloatArray, budget: Budget) -> Candidates:
        """As `SegmentationModel.prompt`: logits (B, h / 4, w / 4) float32. Raises OutOfMemory.

        Of an enhanced frame that is bad the logits are the mean of two looks (`budget.second_look`, `second_look.py`).
        They come in pieces of `budget.points_per_batch` objects: only the answer takes memory for all.
        """
        height, width = embedding.size
        # a point names a pixel, so its centre is meant; box corners lie between pixels
        centred = points + 0.5 * (labels < 2)[..., None]
        xy, labels = _with_box_centres((centred / (width, height) * 2 - 1).astype(np.float32), labels)
        pieces = [slice(start, start + budget.points_per_batch) for start in range(0, len(xy), budget.points_per_batch)]
        features = self._shared(embedding)[0]
        weights, scores = self._kernels(embedding, xy, labels, pieces)
        # a lone point may mean several things, the most convincing wins; anything more has one answer
        is_lone = (labels >= 0).sum(1) == 1
        share = second_look.share(embedding.degradation) if budget.second_look and embedding.enhanced else 0.0
        window, is_near = second_look.whole(features.shape[2:]), False
        if share > 0:
            if not is_lone.any():  # what a lone point means is seen best from afar
                extents = [extents_of(_masks(weights[piece, 0], features) > 0) for piece in pieces]
                window = second_look.around(window.grid, np.concatenate(extents), xy, labels)
                is_near = len(xy) == 1 or not window.is_whole
            second = self._second(embedding, window, is_near)
            others, their_scores = self._kernels(second, *window.prompts(xy, labels), pieces)
            scores = (1 - share) * scores + share * their_scores
        chosen = np.arange(len(xy)), np.where(is_lone, 1 + scores[:, 1:].argmax(1), 0)
        scores = scores[chosen]
        weights = self._with_votes(embedding, weights[chosen], xy, labels, budget.points_per_batch)
        logits = np.empty((len(xy), *window.grid), np.float32)
        for piece in pieces:
            logits[piece] = _masks(weights[piece], features)
        if share > 0:
            others = self._with_votes(second, others[chosen], *window.prompts(xy, labels), budget.points_per_batch)
            second_features = self._shared(second)[0]
            part = logits[(slice(None), *window.cells)]
            for piece in pieces:
                seen = _masks(others[piece], second_features)[..., ::-1]
                part[piece] += share * (_enlarged(seen, part.shape[1:]) - part[piece])
        shapes.keep_to_boxes(logits, xy, labels)
        for k in np.flatnonzero(is_lone):
            shapes.drop_islands(logits[k], shapes.ISLAND, xy[k][labels[k] >= 0][0])
        return Candidates(logits, scores)

    def free(self) -> None:
        """onnxruntime keeps its arena; there is nothing to give back."""

    def close(self) -> None:
        del self._stem, self._trunk, self._adapted, self._enhancer, self._decoder, self._prompt

    @staticmethod
    def _finish(seen: Embedding, trunk: Any) -> Embedding:
        """The embedding with the latent of a trunk; of what was computed of another latent, nothing stays."""
        (latent,) = run_session(trunk, {name: seen.extra[name] for name in ("s4", "s8")})
        kept = {name: seen.extra[name] for name in ("image", "s4", "s8")}
        return dataclasses.replace(seen, latent=latent, enhanced=False, extra=kept, finish=None, adapt=None)

    def _shared(self, embedding: Embedding) -> tuple[Any, ...]:
        """What all masks of an embedding need, computed once and kept with it."""
        if "shared" not in embedding.extra:
            found = run_session(self._decoder, {"latent": embedding.finished().latent})
            check_finite(found[-1], f"scores of nano on {self.device}")
            embedding.extra["shared"] = found
        shared: tuple[Any, ...] = tuple(embedding.extra["shared"])
        return shared

    def _second(self, embedding: Embedding, window: second_look.Window, is_near: bool) -> Embedding:
        """That of a part of the image, mirrored, the last one kept: another opinion, whose errors are others."""
        image, first = embedding.extra["image"], 4 * max(embedding.extra["s4"].shape[2:])
        look = window, second_look.long_side(first, is_near)
        kept: tuple[tuple[second_look.Window, int], Embedding] | None = embedding.extra.get("second")
        if kept is None or kept[0] != look:
            size = model_size(image.shape[:2], look[1])
            seen = self.encode(resized(window.mirrored(image), size), Budget(processing_size=max(size)))
            # measured: the denoising step changes nothing here
            kept = embedding.extra["second"] = look, seen.adapted()
        return kept[1]

    def _kernels(
        self, embedding: Embedding, xy: FloatArray, labels: FloatArray, pieces: list[slice]
    ) -> tuple[FloatArray, FloatArray]:
        """Weights (B, 1 + M, F + 5) and scores (B, 1 + M) of prompts (B, N) in -1..1, run in pieces of B."""
        features, trunk, grid, _, _ = self._shared(embedding)
        seen = {"features": features, "trunk": trunk, "grid": grid}
        found = [
            run_session(self._prompt, {**seen, "xy": xy[None, part], "labels": labels[None, part]}) for part in pieces
        ]
        weights, scores = (np.concatenate([part[0] for part in parts]) for parts in zip(*found))
        check_finite(scores, f"scores of nano on {self.device}")
        return weights, scores

    def _with_votes(
        self, embedding: Embedding, weights: FloatArray, xy: FloatArray, labels: FloatArray, at_once: int
    ) -> FloatArray:
        """Weights (B, C) of masks of points (B, N) in -1..1, moved by what everything mode finds there."""
        # measured: a box says so much that others have nothing to add
        of_points = np.flatnonzero((labels == 1).any(1) & (labels < 2).all(1))
        features, _, _, candidates, scores = self._shared(embedding)
        candidates, moved = candidates.reshape(-1, weights.shape[1]), weights.copy()
        for start in range(0, len(of_points), at_once):
            some = of_points[start : start + at_once]
            moved[some] = with_votes(weights[some], candidates, scores.ravel(), features[0], xy[some], labels[some])
        return moved


def _check_tensors(folder: Path) -> None:
    """Refuse tensors of a disk that failed or lost power: to onnxruntime all bytes are numbers. Raises ValueError."""
    tensors, listing = folder / TENSORS, folder / CHECKSUM
    if tensors.is_file() and listing.is_file():
        expected, got = listing.read_text(encoding="utf-8").partition(" ")[0], sha256(tensors)
        if got != expected:
            raise ValueError(f"{tensors}: expected SHA-256 {expected or 'in ' + CHECKSUM}, got {got}; {AGAIN}")


def model_size(size: tuple[int, int], processing_size: int) -> tuple[int, int]:
    """(height, width) inside the model: the long side `processing_size`, both multiples of 32, aspect kept nearly."""
    scale = processing_size / max(size)
    height, width = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in size)
    return height, width


def resized(image: UInt8Array, inside: tuple[int, int]) -> UInt8Array:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 of the (height, width) `inside`, contiguous."""
    size = image.shape[:2]
    if size == (1, 1):  # which OpenCV 4.5 cannot resize
        image = np.broadcast_to(image, (*inside, 3))
    elif inside != size:
        # bilinear alone would alias below about half the size
        shrink = inside[0] < 0.6 * size[0] or inside[1] < 0.6 * size[1]
        mode = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        image = cv2.resize(image, (inside[1], inside[0]), interpolation=mode)  # type: ignore[assignment]
    return np.ascontiguousarray(image)


def _masks(weights: FloatArray, features: FloatArray) -> FloatArray:
    """Kernels (K, F + 5) times features (1, F + 5, h, w) -> logits (K, h, w)."""
    _, f, h, w = features.shape
    masks: FloatArray = (weights @ features.reshape(f, h * w)).reshape(len(weights), h, w)
    return masks


def _with_box_centres(xy: FloatArray, labels: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Append the centre of each object's box (corners have labels 2 and 3) as one more point."""
    boxed = (labels == 3).any(1)
    if not boxed.any():
        return xy, labels
    corner = (labels >= 2)[..., None]
    centre = (xy * corner).sum(1, keepdims=True) / np.maximum(corner.sum(1, keepdims=True), 1)
    extra = np.where(boxed, BOX_CENTRE, -1).astype(np.float32)[:, None]
    return np.concatenate([xy, centre.astype(np.float32)], 1), np.concatenate([labels, extra], 1)


def _enlarged(logits: FloatArray, size: tuple[int, ...]) -> FloatArray:
    """(K, h, w) -> (K, *size), bilinear; K at least 1."""
    height, width = size
    return np.stack([cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) for one in logits])
