"""The one result type: a struct of arrays, one row an instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from glesam_ros.validation import BoolArray, FloatArray

MAX_ID = 65534
"""Largest instance id; 65535 means "unlabeled" in mask images (vision_msgs convention)."""


@dataclass(frozen=True, eq=False)
class Instances:
    """Instances of one image, best first; those of prompts in the order of these.

    Attributes:
        masks: (K, H, W) bool, in pixels of the image.
        boxes: (K, 4) float32, xyxy in pixels, each around its whole mask; x2 and y2 are exclusive, so an area is
            (x2 - x1) * (y2 - y1).
        scores: (K,) float32 in 0..1, the predicted IoU of each mask.
        stability: (K,) float32 in 0..1, IoU of the mask under a raised and a lowered threshold (segment-anything).
        ids: (K,) int32 in 1..65534, unique; the value of the instance in `label_map`.
        degradation: 0 (clear) .. 1 (LQ-3 or worse), measured on the image.
        enhanced: whether the latent enhancement ran.
        prompted: whether prompts asked for them; then smaller ones lie on top in `label_map`, else better ones.

    Raises:
        ValueError: on construction, when shapes or ranges do not fit; says which field, expected and actual.
    """

    masks: BoolArray
    boxes: FloatArray
    scores: FloatArray
    stability: FloatArray
    ids: np.ndarray[Any, np.dtype[np.int32]]
    degradation: float
    enhanced: bool
    prompted: bool = False

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != np.bool_:
            raise ValueError(f"masks: expected (K, H, W) bool, got {self.masks.shape} {self.masks.dtype}")
        k = self.masks.shape[0]
        for name, shape, dtype in (
            ("boxes", (k, 4), np.float32),
            ("scores", (k,), np.float32),
            ("stability", (k,), np.float32),
            ("ids", (k,), np.int32),
        ):
            value = getattr(self, name)
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {shape} {np.dtype(dtype)} for {k} masks, got {value.shape} {value.dtype}"
                )
        if not np.isfinite(self.boxes).all():
            raise ValueError("boxes: expected finite numbers, got NaN or infinity")
        for name in ("scores", "stability"):
            value = getattr(self, name)
            if not ((value >= 0) & (value <= 1)).all():
                raise ValueError(f"{name}: expected 0..1, got {value.min():g} .. {value.max():g}")
        if k and (self.ids.min() < 1 or self.ids.max() > MAX_ID or len(set(self.ids.tolist())) != k):
            raise ValueError(f"ids: expected unique values in 1..{MAX_ID}, got {self.ids.tolist()}")
        if not 0.0 <= self.degradation <= 1.0:
            raise ValueError(f"degradation: expected 0..1, got {self.degradation}")

    @classmethod
    def empty(cls, size: tuple[int, int], degradation: float = 0.0, enhanced: bool = False) -> Instances:
        """No instance in an image of `size` (height, width)."""
        none = np.zeros(0, np.float32)
        masks, boxes = np.zeros((0, *size), np.bool_), np.zeros((0, 4), np.float32)
        return cls(masks, boxes, none, none, np.zeros(0, np.int32), degradation, enhanced)

    def __len__(self) -> int:
        return int(self.masks.shape[0])

    def __repr__(self) -> str:
        height, width = self.masks.shape[1:]
        enhanced = "enhanced" if self.enhanced else "not enhanced"
        return f"<{len(self)} instances, {width}x{height} px, degradation {self.degradation:.2f}, {enhanced}>"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return int(self.masks.shape[1]), int(self.masks.shape[2])

    @property
    def areas(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(K,) int64, pixels of each mask."""
        return np.array([np.count_nonzero(self.masks[(k, *self.window(k))]) for k in range(len(self))], np.int64)

    def select(self, keep: Any) -> Instances:
        """The instances at `keep` (bool mask or indices), ids unchanged."""
        return Instances(
            self.masks[keep], self.boxes[keep], self.scores[keep], self.stability[keep], self.ids[keep],
            self.degradation, self.enhanced, self.prompted,
        )

    def window(self, k: int) -> tuple[slice, slice]:
        """Rows and columns of the box of instance `k`, within the image: around its whole mask."""
        x1, y1, x2, y2 = self.boxes[k]
        height, width = self.size
        return (
            slice(max(0, int(np.floor(y1))), min(height, int(np.ceil(y2)))),
            slice(max(0, int(np.floor(x1))), min(width, int(np.ceil(x2)))),
        )

    def label_map(self) -> np.ndarray[Any, np.dtype[np.uint16]]:
        """(H, W) uint16 of instance ids, 0 background; where masks overlap the one that comes first wins.

        Of prompted ones the smaller wins, so that a part is there beside its whole; then the better, then the first.
        """
        order = self._back_to_front()
        kind = np.uint8 if len(order) < 256 else np.uint16
        ranks = np.zeros(self.size, kind)
        for rank, k in enumerate(order, 1):
            rows, cols = self.window(k)
            window = ranks[rows, cols]
            # a maximum takes half the time of writing through the mask
            np.maximum(window, self.masks[k, rows, cols].view(np.uint8) * kind(rank), out=window)
        table = np.zeros(max(256, len(order) + 1), np.uint16)
        table[1 : len(order) + 1] = self.ids[order]
        return np.asarray(cv2.LUT(ranks, table) if kind is np.uint8 else np.take(table, ranks), np.uint16)

    def confidence_map(self, labels: np.ndarray[Any, np.dtype[np.uint16]] | None = None) -> FloatArray:
        """(H, W) float32 in 0..1: score times stability of the instance that owns the pixel, 0 where none does.

        Args:
            labels: a label map of these instances already at hand, to save making it again.
        """
        labels = self.label_map() if labels is None else labels
        largest = int(self.ids.max(initial=0))
        table = np.zeros(max(256, largest + 1), np.float32)
        table[self.ids] = self.scores * self.stability
        if largest < 256:
            # twice as fast as np.take
            return np.asarray(cv2.LUT(labels.astype(np.uint8), table[:256]), np.float32)
        return np.take(table, labels)

    def _back_to_front(self) -> list[int]:
        first_last = -np.arange(len(self))
        return np.lexsort((first_last, self.scores, -self.areas) if self.prompted else (first_last,)).tolist()
