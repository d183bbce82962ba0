"""What executes a base model and its enhancer: torch here, onnxruntime in `onnx_runtime`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from glesam_ros.models.glesam.base import Features
from glesam_ros.validation import FloatArray, UInt8Array


class Runtime(Protocol):
    """The four stages of a frame, on a device and in a precision.

    Attributes:
        device: where and how it runs, in words for logs and diagnostics.
        overlaps: whether `decode` gains time beside `encode` of the next image, from another thread.
        side: default side of the square input.
    """

    device: str
    overlaps: bool
    side: int

    def encode(self, image: UInt8Array, side: int) -> Features:
        """(H, W, 3) uint8 RGB -> features of a batch of one."""
        ...

    def level(self, features: Features) -> float | None:
        """Degradation 0 (clear) .. 1 (LQ-3) as GleSAM++ predicts it; None where the enhancer has no predictor."""
        ...

    def enhance(self, features: Features, level: float) -> Features:
        """Features with a restored latent; the enhancer uses `level` where it was trained with levels."""
        ...

    def decode(
        self, features: Features, points: FloatArray, labels: FloatArray, several: bool
    ) -> tuple[Tensor, Tensor]:
        """As `BaseModel.decode`, float32 on any device."""
        ...

    def free(self) -> None:
        """Give cached memory back."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
