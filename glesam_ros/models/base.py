"""What the models are for those who run them: masks of instances, maps of classes, restored pictures."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from glesam_ros.validation import FloatArray, UInt8Array

STABILITY_OFFSET = 1.0
"""Shift of the mask threshold, in logits, whose effect is the stability (segment-anything's default)."""


class OutOfMemory(RuntimeError):
    """A call needed more memory than the device has; the model is still usable after its `free`."""


def check_finite(values: Any, of: str) -> None:
    """Refuse what overflowed: dropped silently, it would read as an empty scene or a clear picture.

    Args:
        values: an array or number.
        of: model and device, for the message.

    Raises:
        RuntimeError: NaN or infinity among them.
    """
    if not np.isfinite(values).all():
        raise RuntimeError(
            f"{of}: expected finite values, got NaN or infinity, as half precision may give; take precision fp32, or "
            "bf16 where it is to be had"
        )


def return_freed_memory() -> None:
    """Let glibc give the system what it keeps after loading or closing a model: hundreds of MB of a Jetson."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@dataclass(frozen=True)
class Budget:
    """How much work and memory a call may take, and what it need not return; a model ignores what it does not have.

    Attributes:
        processing_size: long side of the image inside the model in pixels, rounded to what it takes, at least 256; 0
            takes the model's own.
        points_per_side: everything mode prompts a grid of this many points a side (segment-anything).
        points_per_batch: prompts that are decoded at once; bounds memory, not the result.
        crop_layers: everything mode also looks into 2^k x 2^k crops for k = 1 .. crop_layers (segment-anything).
        stability_threshold: everything mode may drop less stable masks before it compares masks with each other.
        nms_iou: everything mode may drop masks whose box overlaps that of a better one by more than this.
        second_look: prompts on a bad frame may be answered by the mean of two looks at it.
    """

    processing_size: int = 0
    points_per_side: int = 32
    points_per_batch: int = 64
    crop_layers: int = 0
    stability_threshold: float = 0.0
    nms_iou: float = 0.7
    second_look: bool = True


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the encoder knows of one image; nobody changes it but its model, which may keep in `extra` what it computes.

    It may be decoded many times, by a `Pipeline` from any thread.

    Attributes:
        latent: (1, C, h, w), the image embedding, enhanced where `enhanced` says so; a numpy array or a torch tensor,
            on the device and in the precision of its model. None where `encode` left it out, because an enhanced image
            needs another one; then `finished` has it.
        size: (height, width) of the image in pixels.
        degradation: measured level, 0 (clear) .. 1 (LQ-3 or worse).
        enhanced: whether `latent` went through the denoising step.
        extra: further arrays of the model by name.
        finish: gives the embedding with its latent; None where it is there.
        adapt: gives the embedding with the latent that the enhancer starts from, at the cost of `finish`; None where
            that is the encoder's own.
    """

    latent: Any
    size: tuple[int, int]
    degradation: float
    enhanced: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[], Embedding] | None = None
    adapt: Callable[[], Embedding] | None = None

    def __repr__(self) -> str:
        enhanced = "enhanced" if self.enhanced else "not enhanced"
        return f"<embedding, {self.size[1]}x{self.size[0]} px, degradation {self.degradation:.2f}, {enhanced}>"

    def finished(self) -> Embedding:
        """The embedding with its latent: what `encode` left out is computed now."""
        return self if self.finish is None else self.finish()

    def adapted(self) -> Embedding:
        """What automatic mode takes of a frame that needs no denoising step."""
        return self.finished() if self.adapt is None else self.adapt()


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks before thresholds.

    Attributes:
        logits: (K, h, w) float32 mask logits at the model's own resolution, covering the whole image; 0 is the edge.
            Who gets them may write into them.
        scores: (K,) float32 in 0..1, predicted IoU.
        rank: (K,) float32, by which everything mode orders and suppresses, highest first; None: by the scores.
        islands: share of a mask's largest part, 0..1; separate parts that are smaller go from masks of everything mode.
    """

    logits: FloatArray
    scores: FloatArray
    rank: FloatArray | None = None
    islands: float = 0.0


class SegmentationModel(Protocol):
    """A model that the pipeline can run.

    Safe to call from one thread at a time; where `overlaps`, `encode` and `enhance` from one thread while `propose` and
    `prompt` are called from another.
    """

    name: str
    device: str
    """Where it runs, in words for logs and diagnostics, for example "cpu" or "cuda (onnxruntime)"."""
    classes: tuple[str, ...]
    """Class names of detections; class-agnostic models have ("object",)."""

    own_size: int
    """Long side of the image inside the model in pixels where the budget names none."""

    thresholds: tuple[float, float]
    """Score and stability below which everything mode drops masks where the settings name none, 0..1."""

    overlaps: bool
    """Whether decoding one embedding gains time beside encoding the next image, from another thread."""

    def encode(self, image: UInt8Array, budget: Budget) -> Embedding:
        """Embed an (H, W, 3) uint8 RGB image; its latent may be left to `Embedding.finished` and `adapted`.

        Raises:
            OutOfMemory: here and in all other calls; smaller numbers in the budget need less.
            RuntimeError: here and in all other calls; half precision overflowed, see `check_finite`.
        """
        ...

    def enhance(self, embedding: Embedding) -> Embedding:
        """Restore the latent of a degraded image by one denoising step."""
        ...

    def propose(self, embedding: Embedding, score_threshold: float, limit: int, budget: Budget) -> Candidates:
        """Everything mode: at most `limit` candidates with at least `score_threshold`, best rank first."""
        ...

    def prompt(self, embedding: Embedding, points: FloatArray, labels: FloatArray, budget: Budget) -> Candidates:
        """One candidate for each of B objects.

        Args:
            points: (B, N, 2) float32 xy in pixels of the image.
            labels: (B, N) float32: 1 inside, 0 outside, 2 top left and 3 bottom right corner of a box, -1 padding.
        """
        ...

    def free(self) -> None:
        """Give memory back that is kept for later calls only; never during another call, also where `overlaps`."""
        ...

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        ...


class SemanticModel(Protocol):
    """A model that says of every part of an image which class it shows; safe to call from one thread at a time."""

    name: str
    device: str
    """Where it runs, in words for logs and diagnostics, as for `SegmentationModel`."""
    classes: tuple[str, ...]
    """Names of the K classes, each once; index in `logits`."""
    palette: UInt8Array
    """(K, 3) uint8 RGB, the colour of each class."""

    def logits(self, image: UInt8Array) -> FloatArray:
        """Classify an image.

        Args:
            image: (H, W, 3) uint8 RGB with H, W >= 1; left as it is.

        Returns:
            (K, h, w) float32, finite, of any resolution h, w >= 1, covering the whole image: larger is likelier, and
            the softmax over K is the confidence. A model that knows probabilities returns their logarithms.

        Raises:
            OutOfMemory: the device lacked memory.
        """
        ...

    def free(self) -> None:
        """Give memory back that is kept for later calls only; never during another call."""
        ...

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        ...


class RestorerModel(Protocol):
    """A model that makes a clear picture of a bad one; safe to call from one thread at a time."""

    name: str
    device: str
    """Where it runs, in words for logs and diagnostics, as for `SegmentationModel`."""

    def restore(self, image: UInt8Array, classes: Sequence[str] = ()) -> UInt8Array:
        """Restore an image.

        Args:
            image: (H, W, 3) uint8 RGB with H, W >= 1; left as it is.
            classes: names of what the image shows, in words, where they are known.

        Returns:
            (H, W, 3) uint8 RGB, a new array.

        Raises:
            OutOfMemory: the device lacked memory.
        """
        ...

    def free(self) -> None:
        """Give memory back that is kept for later calls only; never during another call."""
        ...

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        ...
