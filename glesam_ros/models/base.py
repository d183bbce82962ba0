"""What a segmentation model is for the pipeline: encode, enhance, propose, prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from glesam_ros.validation import FloatArray, UInt8Array


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the encoder knows of one image; immutable, so it may be decoded many times and from any thread.

    Attributes:
        latent: (1, C, h, w) float32, the image embedding, enhanced where `enhanced` says so.
        size: (height, width) of the image in pixels.
        degradation: measured level, 0 (clear) .. 1 (LQ-3 or worse).
        enhanced: whether `latent` went through the enhancer.
        extra: further arrays of the model by name.
    """

    latent: FloatArray
    size: tuple[int, int]
    degradation: float
    enhanced: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks before thresholds.

    Attributes:
        logits: (K, h, w) float32 mask logits at the model's own resolution, covering the whole image; 0 is the edge.
        scores: (K,) float32 in 0..1, predicted IoU.
    """

    logits: FloatArray
    scores: FloatArray


class SegmentationModel(Protocol):
    """A model that the pipeline can run. Implementations are safe to call from one thread at a time."""

    name: str
    device: str
    """Where it runs, in words for logs and diagnostics, for example "cpu" or "cuda (onnxruntime)"."""
    classes: tuple[str, ...]
    """Class names of detections; class-agnostic models have ("object",)."""

    def encode(self, image: UInt8Array, processing_size: int) -> Embedding:
        """Embed an (H, W, 3) uint8 RGB image, its long side scaled to `processing_size` pixels."""
        ...

    def enhance(self, embedding: Embedding) -> Embedding:
        """Restore the latent of a degraded image by one denoising step."""
        ...

    def propose(self, embedding: Embedding, score_threshold: float, limit: int) -> Candidates:
        """Everything mode: at most `limit` candidates with at least `score_threshold`, best first."""
        ...

    def prompt(self, embedding: Embedding, points: FloatArray, labels: FloatArray) -> Candidates:
        """One candidate for each of B objects.

        Args:
            points: (B, N, 2) float32 xy in pixels of the image.
            labels: (B, N) float32: 1 inside, 0 outside, 2 top left and 3 bottom right corner of a box, -1 padding.
        """
        ...

    def close(self) -> None:
        """Free memory; the model cannot be used afterwards."""
        ...
