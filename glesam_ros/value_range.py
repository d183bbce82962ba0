"""What is black and white of pictures with more than 8 bits a channel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glesam_ros.validation import UInt8Array

TAIL = 0.005
"""Share of the values at each end that a dynamic range leaves out, such as dead pixels."""
SAMPLES = 1 << 16
"""Pixels that are enough to find the ends of a dynamic range."""


class ValueRange(NamedTuple):
    """What becomes black and white of channels of 16 bits or floats; as cv_bridge's CvtColorForDisplayOptions.

    Attributes:
        low, high: black and white; where high is not larger, the picture's own: 0 and 65535 of 16 bits, 0 and 1 of
            floats.
        dynamic: from the values of the picture instead: `TAIL` of them are darker, as many lighter.
    """

    low: float = 0.0
    high: float = 0.0
    dynamic: bool = False

    @classmethod
    def of(cls, settings: Any) -> ValueRange:
        """That of `Settings`, or of the options of a command, which have the same names."""
        return cls(settings.min_image_value, settings.max_image_value, settings.do_dynamic_scaling)

    @property
    def is_own(self) -> bool:
        """Whether it is the picture's own."""
        return not self.dynamic and self.high <= self.low

    def to_byte(self, channels: NDArray[Any]) -> UInt8Array:
        """(H, W[, C]) of finite numbers -> uint8: ``round(255 * (value - low) / (high - low))``, clipped.

        By its own range ``value >> 8`` of uint16, and 0..1 of others.
        """
        import numpy as np  # the help of commands needs none

        rows = channels.reshape(len(channels), -1)
        low, high = self.low, self.high
        if self.dynamic:
            low, high = (float(end) for end in np.quantile(_sample(channels), (TAIL, 1 - TAIL)))
        elif self.is_own:
            if rows.dtype == np.uint16:
                return np.asarray(channels >> 8, np.uint8)
            low, high = 0.0, 1.0
        scaled = np.subtract(rows, np.float32(low), dtype=np.float32)
        scaled *= np.float32(255 / (high - low) if high > low else 0)
        return np.asarray(np.rint(np.clip(scaled, 0, 255, out=scaled)), np.uint8).reshape(channels.shape)


OWN_RANGE = ValueRange()


def _sample(channels: NDArray[Any]) -> NDArray[Any]:
    """About `SAMPLES` pixels from all over (H, W[, C]), without their alpha."""
    height, width = channels.shape[:2]
    every = math.isqrt(height * width // SAMPLES) | 1  # odd, as rows and columns of a Bayer mosaic take turns
    rows, cols = (slice(min(every, side) // 2, None, every) for side in (height, width))
    return channels[rows, cols, :3] if channels.ndim == 3 else channels[rows, cols]
