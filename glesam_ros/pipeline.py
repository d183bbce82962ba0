"""Frames in, `Instances` out: encode, enhance when the picture is bad, decode."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from glesam_ros.instances import Instances
from glesam_ros.models import Candidates, Embedding, SegmentationModel, load_model
from glesam_ros.settings import Settings
from glesam_ros.validation import BoolArray, FloatArray, check_boxes, check_image, check_points

STABILITY_OFFSET = 1.0
"""Shift of the mask threshold, in logits, whose effect is the stability (segment-anything's default)."""


class EnhancementGate:
    """Automatic enhancement with hysteresis, one gate for each camera.

    On when the degradation level rises above `above`, off when it falls below `below`, unchanged between.
    """

    def __init__(self) -> None:
        self.is_on = False

    def update(self, level: float, above: float, below: float) -> bool:
        """Take the newest level (0..1) and answer whether to enhance this frame."""
        self.is_on = level > above or (self.is_on and level >= below)
        return self.is_on


class Pipeline:
    """A model with its thresholds; safe to call from several threads (calls into the model take turns).

    Args:
        model: what embeds and proposes.
        settings: thresholds and enhancement mode; may be replaced at any time through `settings`.
    """

    def __init__(self, model: SegmentationModel, settings: Settings | None = None) -> None:
        self.model = model
        self.settings = settings or Settings()
        self._lock = threading.Lock()

    def encode(self, image: Any, gate: EnhancementGate | None = None) -> Embedding:
        """Embed an image and enhance its latent where the mode says so; the expensive half.

        Args:
            image: (H, W, 3) uint8 RGB.
            gate: the camera's gate for mode "auto"; without one the level is compared with `enhance_above` alone.

        Raises:
            TypeError, ValueError: `image` is not such an array.
        """
        image = check_image(image)
        s = self.settings
        with self._lock:
            embedding = self.model.encode(image, s.processing_size)
            if s.enhancement == "auto":
                gate = gate or EnhancementGate()
                wanted = gate.update(embedding.degradation, s.enhance_above, s.enhance_below)
            else:
                wanted = s.enhancement == "always"
            return self.model.enhance(embedding) if wanted else embedding

    def decode(self, embedding: Embedding, points: Any = None, labels: Any = None, boxes: Any = None) -> Instances:
        """Masks for prompts, or for everything where there is none; the cheap half.

        Args:
            embedding: from `encode`.
            points: (N, 2) float32 xy in pixels, one object; or (B, N, 2), B objects.
            labels: (N,) of 1 (inside) and 0 (outside); or (B, N) with -1 for padding. None: all 1.
            boxes: (M, 4) float32 xyxy in pixels, M objects; with the batch form of points, B boxes, one for each.

        Returns:
            Prompted: one instance an object, in the order of the prompts (ids 1, 2, ...), no threshold applied.
            Everything: best score first.

        Raises:
            ValueError: prompts of wrong shape, range or count.
        """
        s = self.settings
        if points is None and labels is not None:
            raise ValueError("labels: expected None without points, got labels; hand in the points they belong to")
        if points is None and boxes is None:
            with self._lock:
                found = self.model.propose(embedding, s.score_threshold, 4 * s.max_instances)
            return self._everything(embedding, found, s)
        prompt_points, prompt_labels = _merge_prompts(points, labels, boxes, embedding.size)
        with self._lock:
            found = self.model.prompt(embedding, prompt_points, prompt_labels)
        keep = np.arange(len(found.scores))
        return _to_instances(embedding, found, keep, _stability(found.logits))

    def segment(self, image: Any, points: Any = None, labels: Any = None, boxes: Any = None) -> Instances:
        """`encode` and `decode` in one call."""
        return self.decode(self.encode(image), points, labels, boxes)

    def close(self) -> None:
        """Free the model's memory."""
        with self._lock:
            self.model.close()

    @staticmethod
    def _everything(embedding: Embedding, found: Candidates, s: Settings) -> Instances:
        stability = _stability(found.logits)
        height, width = embedding.size
        binary = found.logits > 0
        areas = binary.sum((1, 2)) * (height * width / max(1, binary[0].size if len(binary) else 1))
        order = np.flatnonzero(
            (found.scores >= s.score_threshold) & (stability >= s.stability_threshold) & (areas >= max(1, s.min_area))
        )
        order = order[np.argsort(-found.scores[order], kind="stable")]
        keep = order[mask_nms(binary[order], s.nms_iou, s.max_instances)]
        return _to_instances(embedding, found, keep, stability)


def load_pipeline(
    model: str = "nano", *, enhancement: str = "auto", device: str = "auto", precision: str = "auto", **settings: Any
) -> Pipeline:
    """Load a model by name and make its pipeline.

    Args:
        model: a registered name.
        enhancement: "off", "always" or "auto" (by the measured degradation).
        device: "auto", "cpu", "cuda" or "tensorrt".
        precision: "auto", "fp32" or "fp16".
        **settings: any other field of `Settings`.

    Raises:
        ValueError: unknown model, unknown setting or a value out of range.
        RuntimeError: the device asked for is not available.
    """
    try:
        chosen = Settings(model=model, enhancement=enhancement, device=device, precision=precision, **settings)
    except TypeError as error:
        raise ValueError(f"load_pipeline: {error}; see glesam_ros.Settings for the known ones") from error
    return Pipeline(load_model(model, device, precision), chosen)


def mask_nms(masks: BoolArray, iou_threshold: float, limit: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Greedy non-maximum suppression by mask IoU.

    Args:
        masks: (K, h, w) bool, best first.
        iou_threshold: a mask that overlaps a better one by more than this is dropped.
        limit: stop after so many.

    Returns:
        Indices of the kept masks, best first.
    """
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.float32)  # -1 fails on no masks
    overlap = flat @ flat.T
    area = np.diagonal(overlap)
    iou = overlap / np.maximum(area[:, None] + area[None, :] - overlap, 1)
    kept: list[int] = []
    for k in range(len(masks)):
        if len(kept) == limit:
            break
        if not kept or iou[k, kept].max() <= iou_threshold:
            kept.append(k)
    return np.array(kept, np.intp)


def _stability(logits: FloatArray) -> FloatArray:
    inner = (logits > STABILITY_OFFSET).sum((1, 2))
    outer = (logits > -STABILITY_OFFSET).sum((1, 2))
    return (inner / np.maximum(outer, 1)).astype(np.float32)


def _merge_prompts(
    points: Any, labels: Any, boxes: Any, size: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Prompts of all objects as points (B, N, 2) and labels (B, N); a box is two points with labels 2 and 3."""
    if boxes is None:
        return check_points(points, labels, size)
    b = check_boxes(boxes, size).reshape(-1, 2, 2)
    corners = np.tile(np.array([2, 3], np.float32), (len(b), 1))
    if points is None:
        return b, corners
    p, y = check_points(points, labels, size)
    if np.ndim(points) == 3:
        if len(p) != len(b):
            raise ValueError(f"boxes: expected {len(p)} boxes, one for each of the {len(p)} objects, got {len(b)}")
        return np.concatenate([p, b], 1), np.concatenate([y, corners], 1)
    n = max(p.shape[1], 2)
    all_points = np.zeros((1 + len(b), n, 2), np.float32)
    all_labels = np.full((1 + len(b), n), -1, np.float32)
    all_points[:1, : p.shape[1]], all_labels[:1, : p.shape[1]] = p, y
    all_points[1:, :2], all_labels[1:, :2] = b, corners
    return all_points, all_labels


def _to_instances(
    embedding: Embedding, found: Candidates, keep: np.ndarray[Any, Any], stability: FloatArray
) -> Instances:
    """Upsample the kept logits to the image, each only inside the window where it can be positive."""
    height, width = embedding.size
    masks = np.zeros((len(keep), height, width), np.bool_)
    boxes = np.zeros((len(keep), 4), np.float32)
    for row, k in enumerate(keep):
        boxes[row] = _upsample_into(masks[row], found.logits[k])
    return Instances(
        masks=masks,
        boxes=boxes,
        scores=np.clip(found.scores[keep], 0, 1).astype(np.float32),
        stability=stability[keep],
        ids=np.arange(1, len(keep) + 1, dtype=np.int32),
        degradation=float(np.clip(embedding.degradation, 0, 1)),
        enhanced=embedding.enhanced,
    )


def _upsample_into(mask: BoolArray, logits: FloatArray) -> tuple[float, float, float, float]:
    """Write the mask of (h, w) `logits` into the (H, W) `mask`; return its box xyxy, zeros where it is empty."""
    height, width = mask.shape
    rows, cols = np.flatnonzero((logits > 0).any(1)), np.flatnonzero((logits > 0).any(0))
    if not rows.size:
        return 0.0, 0.0, 0.0, 0.0
    h, w = logits.shape
    # two cells of margin: bilinear interpolation reaches no further than one
    top, bottom = max(0, rows[0] - 2), min(h, rows[-1] + 3)
    left, right = max(0, cols[0] - 2), min(w, cols[-1] + 3)
    y1, y2 = int(np.ceil(top * height / h)), int(np.floor(bottom * height / h))
    x1, x2 = int(np.ceil(left * width / w)), int(np.floor(right * width / w))
    if y2 <= y1 or x2 <= x1:
        return 0.0, 0.0, 0.0, 0.0
    # pixel centres of the window, in cells of the logits
    to_cells = np.array(
        [[w / width, 0, (x1 + 0.5) * w / width - 0.5 - left], [0, h / height, (y1 + 0.5) * h / height - 0.5 - top]],
        np.float64,
    )
    window = cv2.warpAffine(
        logits[top:bottom, left:right], to_cells, (x2 - x1, y2 - y1),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE,
    ) > 0
    mask[y1:y2, x1:x2] = window
    rows, cols = np.flatnonzero(window.any(1)), np.flatnonzero(window.any(0))
    if not rows.size:
        return 0.0, 0.0, 0.0, 0.0
    return float(x1 + cols[0]), float(y1 + rows[0]), float(x1 + cols[-1] + 1), float(y1 + rows[-1] + 1)
