"""Frames in, `Instances` out: encode, enhance when the picture is bad, decode."""

from __future__ import annotations

import math
import threading
from typing import Any

import cv2
import numpy as np

from glesam_ros.instances import Instances
from glesam_ros.models import Budget, Candidates, Embedding, SegmentationModel, load_model
from glesam_ros.models.base import STABILITY_OFFSET
from glesam_ros.settings import Settings
from glesam_ros.validation import BoolArray, FloatArray, check_boxes, check_image, check_points


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
            embedding = self.model.encode(image, budget(s))
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
                found = self.model.propose(embedding, s.score_threshold, 4 * s.max_instances, budget(s))
            return self._everything(embedding, found, s)
        prompt_points, prompt_labels = _merge_prompts(points, labels, boxes, embedding.size)
        with self._lock:
            found = self.model.prompt(embedding, prompt_points, prompt_labels, budget(s))
        every = np.arange(len(found.scores))
        return _to_instances(embedding, found, every, _stability(found.logits), limit=len(every), min_area=0)

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
        binary = found.logits > 0
        height, width = embedding.size
        pixels = _areas(binary) * (height * width / max(1, binary.shape[1] * binary.shape[2]))
        order = np.flatnonzero(
            (found.scores >= s.score_threshold)
            & (stability >= s.stability_threshold)
            # the exact area is known only at the size of the image, where interpolation makes at most fourfold of it
            # and rounding to whole pixels at most twofold of that
            & (pixels >= s.min_area / 8)
        )
        order = order[np.argsort(-found.scores[order], kind="stable")]
        keep = order[mask_nms(binary[order], s.nms_iou, len(order))]
        return _to_instances(embedding, found, keep, stability, s.max_instances, max(1, s.min_area))


def budget(s: Settings) -> Budget:
    """What the settings allow a call into the model."""
    return Budget(
        s.processing_size, s.points_per_side, s.points_per_batch, s.crop_layers, s.stability_threshold, s.nms_iou
    )


def load_pipeline(
    model: str = "nano", *, enhancement: str = "auto", device: str = "auto", precision: str = "auto", **settings: Any
) -> Pipeline:
    """Load a model by name and make its pipeline.

    Args:
        model: a registered name.
        enhancement: "off", "always" or "auto" (by the measured degradation).
        device: "auto", "cpu", "cuda" or "tensorrt".
        precision: "auto", "fp32", "fp16", "bf16" or "int8"; a model refuses what it does not have.
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
    if not len(masks):
        return np.zeros(0, np.intp)
    area = _areas(masks)
    bits = np.packbits(masks.reshape(len(masks), -1), axis=1)
    near = _may_overlap(masks, area, iou_threshold)
    alive = np.ones(len(masks), np.bool_)
    kept: list[int] = []
    for k in range(len(masks)):
        if not alive[k]:
            continue
        if len(kept) == limit:
            break
        kept.append(k)
        rest = np.flatnonzero(alive & near[k])
        if rest.size:
            differing = np.array([cv2.norm(bits[k], bits[j], cv2.NORM_HAMMING) for j in rest])
            both = (area[k] + area[rest] - differing) / 2
            alive[rest[both / np.maximum(both + differing, 1) > iou_threshold]] = False
    return np.array(kept, np.intp)


def _may_overlap(masks: BoolArray, area: np.ndarray[Any, np.dtype[np.int64]], iou_threshold: float) -> BoolArray:
    """(K, K): whether mask j > k can overlap mask k by more than the threshold, from boxes and areas alone."""
    x1, y1, x2, y2 = np.array([_extent(mask) for mask in masks], np.float32).T
    across = np.minimum.outer(x2, x2) - np.maximum.outer(x1, x1)
    down = np.minimum.outer(y2, y2) - np.maximum.outer(y1, y1)
    both = np.minimum(np.maximum(across, 0) * np.maximum(down, 0), np.minimum.outer(area, area))
    return np.triu(both > iou_threshold * (np.add.outer(area, area) - both), 1)


def _areas(masks: BoolArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    # count_nonzero of one mask is vectorised, a sum over axes of all of them is not
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


def _stability(logits: FloatArray) -> FloatArray:
    inner, outer = _areas(logits > STABILITY_OFFSET), _areas(logits > -STABILITY_OFFSET)
    return (inner / np.maximum(outer, 1)).astype(np.float32)


def _merge_prompts(
    points: Any, labels: Any, boxes: Any, size: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Prompts of all objects as points (B, N, 2) and labels (B, N); a box is two points with labels 2 and 3."""
    if boxes is None:
        return check_points(points, labels, size)
    batched = np.ndim(points) == 3
    b = check_boxes(boxes, size).reshape(-1, 2, 2)
    corners = np.tile(np.array([2, 3], np.float32), (len(b), 1))
    if points is None:
        return b, corners
    p, y = check_points(points, labels, size, need_inside=not batched)
    if batched:
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
    embedding: Embedding,
    found: Candidates,
    keep: np.ndarray[Any, np.dtype[np.intp]],
    stability: FloatArray,
    limit: int,
    min_area: int,
) -> Instances:
    """The first `limit` candidates at `keep` that have `min_area` pixels at the size of the image, in that order."""
    masks = np.zeros((min(limit, len(keep)), *embedding.size), np.bool_)
    boxes = np.zeros((len(masks), 4), np.float32)
    rows: list[int] = []
    for k in keep:
        row = len(rows)
        if row == limit:
            break
        box = upsample_into(masks[row], found.logits[k])
        window = masks[row, box[1] : box[3], box[0] : box[2]]
        if np.count_nonzero(window) < min_area:
            window[:] = False
            continue
        boxes[row] = box
        rows.append(k)
    count = len(rows)
    return Instances(
        masks=masks[:count],
        boxes=boxes[:count],
        scores=np.clip(found.scores[rows], 0, 1).astype(np.float32),
        stability=stability[rows],
        ids=np.arange(1, count + 1, dtype=np.int32),
        degradation=float(np.clip(embedding.degradation, 0, 1)),
        enhanced=embedding.enhanced,
    )


def upsample_into(mask: BoolArray, logits: FloatArray) -> tuple[int, int, int, int]:
    """Threshold logits at the size of the image, at the cost of the object's window only.

    Equal to ``cv2.resize(logits, (W, H), interpolation=cv2.INTER_LINEAR) > 0``.

    Args:
        mask: (H, W) bool, all False; written in place.
        logits: (h, w) float32 that cover the whole image.

    Returns:
        The extent of the mask, xyxy with x2 and y2 exclusive; zeros where it is empty.
    """
    left, top, right, bottom = _extent(logits > 0)
    if left == right:
        return 0, 0, 0, 0
    left, x, right, scale_x = _window(left, right, logits.shape[1], mask.shape[1])
    top, y, bottom, scale_y = _window(top, bottom, logits.shape[0], mask.shape[0])
    cells = logits[top:bottom, left:right]
    fine = cv2.resize(cells, None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_LINEAR)
    window = mask[y : y + fine.shape[0], x : x + fine.shape[1]]
    np.greater(fine, 0, out=window)
    x1, y1, x2, y2 = _extent(window)
    return (x + x1, y + y1, x + x2, y + y2) if x1 < x2 else (0, 0, 0, 0)


def _extent(mask: BoolArray) -> tuple[int, int, int, int]:
    """xyxy with x2 and y2 exclusive, zeros where nothing is set."""
    # not cv2.boundingRect: that of OpenCV 4.5 is wrong for narrow arrays
    rows, cols = np.logical_or.reduce(mask, 1), np.logical_or.reduce(mask, 0)
    y1, x1 = int(rows.argmax()), int(cols.argmax())
    if not rows[y1]:
        return 0, 0, 0, 0
    return x1, y1, len(cols) - int(cols[::-1].argmax()), len(rows) - int(rows[::-1].argmax())


def _window(first: int, last: int, cells: int, pixels: int) -> tuple[int, int, int, float]:
    """Window around the positive cells first..last (exclusive) along one axis of `cells` scaled to `pixels`.

    It begins where a cell and a pixel begin together, so that it is sampled where the whole image would be.

    Returns:
        First cell, first pixel, last cell (exclusive), pixels a cell.
    """
    # interpolation reaches one cell; the rest makes up for the rounding of the window to whole pixels
    margin = math.ceil(cells / pixels + 0.5)
    unit = cells // math.gcd(cells, pixels)
    start = max(0, first - margin) // unit * unit
    return start, start * pixels // cells, min(cells, last + margin), pixels / cells
