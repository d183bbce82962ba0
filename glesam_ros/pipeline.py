"""Frames in, `Instances` out: encode, enhance when the picture is bad, decode."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from typing import Any, Literal

import numpy as np

from glesam_ros.instances import Instances
from glesam_ros.masks import Indices, areas, extents_of, mask_nms, measure, upsample_into
from glesam_ros.memory import MemoryLadder
from glesam_ros.models import Budget, Candidates, Embedding, OutOfMemory, SegmentationModel, load_model
from glesam_ros.models.base import STABILITY_OFFSET
from glesam_ros.models.shapes import drop_islands
from glesam_ros.pace import Pace
from glesam_ros.settings import Settings
from glesam_ros.validation import FloatArray, UInt8Array, check_boxes, check_image, check_points


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


def in_mode(model: SegmentationModel, seen: Embedding, mode: str) -> Embedding:
    """What is decoded of an image in a mode of enhancement; in "auto" of one that the gate takes for clear.

    Args:
        model: gave `seen`.
        seen: from its `encode`.
        mode: off, always or auto.
    """
    if mode == "always":
        return model.enhance(seen)
    return seen.adapted() if mode == "auto" else seen.finished()


class Pipeline:
    """A model with its thresholds; safe to call from several threads.

    Calls into the model take turns; where the model overlaps, those of `encode` and those of `decode` apart.

    Args:
        model: what embeds and proposes.
        settings: thresholds and enhancement mode; may be replaced at any time through `settings`.

    Attributes:
        memory: which part of `processing_size` and `points_per_batch` fits into the memory of the device.
        pace: which part of `processing_size` keeps frames within `frame_budget_ms`; `segment` tells it what a frame
            took, who calls `encode` and `decode` tells it by `pace.took`.
    """

    def __init__(self, model: SegmentationModel, settings: Settings | None = None) -> None:
        self.model = model
        self.memory = MemoryLadder(model.own_size)
        self.pace = Pace(model.own_size)
        self._setting = threading.Lock()
        self.settings = settings or Settings()
        self._encoding = threading.RLock()
        self._decoding = threading.RLock() if model.overlaps else self._encoding
        self._is_closed = False

    @property
    def settings(self) -> Settings:
        """Thresholds, enhancement mode, sizes; another size begins at the top of `memory` and `pace`."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        with self._setting:  # of two threads that set them, all is from the same one
            self._settings = settings
            self._resolved = resolved(settings, self.model)
            self.memory.ask(settings.processing_size, settings.points_per_batch)
            self.pace.ask(settings.processing_size, settings.frame_budget_ms)

    @property
    def resolved(self) -> Settings:
        """The settings with the model's own thresholds where they name none."""
        return self._resolved

    def encode(self, image: Any, gate: EnhancementGate | None = None) -> Embedding:
        """Embed an image and enhance its latent where the mode says so; the expensive half.

        Args:
            image: (H, W, 3) uint8 RGB.
            gate: the camera's gate for mode "auto"; without one the level is compared with `enhance_above` alone.

        Raises:
            TypeError, ValueError: `image` is not such an array.
            OutOfMemory: the device lacked memory; memory kept for later was freed, and the next call takes less.
            RuntimeError: the pipeline was closed.
        """
        return self._encode(check_image(image), gate, self.resolved)

    def decode(self, embedding: Embedding, points: Any = None, labels: Any = None, boxes: Any = None) -> Instances:
        """Masks for prompts, or for everything where there is none; the cheap half.

        Args:
            embedding: from `encode`.
            points: (N, 2) float32 xy in pixels, one object; or (B, N, 2), B objects.
            labels: (N,) of 1 (inside) and 0 (outside); or (B, N) with -1 for padding. None: all 1.
            boxes: (M, 4) float32 xyxy in pixels, M objects; with the batch form of points, B boxes, one for each.

        Returns:
            Prompted: one instance an object, in the order of the prompts (ids 1, 2, ...), no threshold applied.
            Everything: best first, by `Candidates.rank`.

        Raises:
            TypeError: `embedding` is no Embedding.
            ValueError: prompts of wrong shape, range or count.
            OutOfMemory, RuntimeError: as for `encode`.
        """
        s = self.resolved
        if not isinstance(embedding, Embedding):
            kind = type(embedding).__name__
            raise TypeError(f"embedding: expected what encode gives, got {kind}; segment does both for an image")
        if points is None and labels is not None:
            raise ValueError("labels: expected None without points, got labels; hand in the points they belong to")
        if points is None and boxes is None:
            return self._everything(embedding, self._candidates(embedding, None, s), s)
        prompts = _merge_prompts(points, labels, boxes, embedding.size)
        found = self._candidates(embedding, prompts, s)
        every, extents = np.arange(len(found.scores)), extents_of(found.logits > 0)
        instances = _to_instances(embedding, found, every, extents, _stability(found.logits), len(every), min_area=0)
        return dataclasses.replace(instances, prompted=True)

    def segment(
        self, image: Any, points: Any = None, labels: Any = None, boxes: Any = None, gate: EnhancementGate | None = None
    ) -> Instances:
        """`encode` and `decode` in one call, again with less where memory lacks, as long as there is less."""
        while True:
            started = time.perf_counter()
            try:
                found = self.decode(self.encode(image, gate), points, labels, boxes)
            except OutOfMemory:
                if self.memory.is_exhausted:
                    raise
            else:
                self.pace.took(time.perf_counter() - started)
                return found

    def warm_up(self, image: Any) -> None:
        """Go through all stages that frames may need, so that none pays for what a model does only at first.

        Args:
            image: (H, W, 3) uint8 RGB of the size to expect.

        Raises:
            OutOfMemory: memory lacks even for the least size and batch.
        """
        image, s = check_image(image), self.resolved
        if s.enhancement == "auto":
            s = s.replace(enhancement="always")
        while True:
            try:
                embedding = self._encode(image, None, s)
                self.decode(embedding)
                bad = dataclasses.replace(embedding, degradation=1.0)
                height, width = image.shape[:2]
                self.decode(bad, points=[[width // 2, height // 2]])
                self.decode(bad, boxes=[[0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height]])
                return
            except OutOfMemory:
                if self.memory.is_exhausted:
                    raise

    def close(self) -> None:
        """Free the model's memory; the pipeline cannot be used afterwards. Once more is harmless."""
        with self._encoding, self._decoding:
            if not self._is_closed:
                self._is_closed = True
                self.model.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"expected an open pipeline, that of {self.model.name} was closed; load it again")

    def _encode(self, image: UInt8Array, gate: EnhancementGate | None, s: Settings) -> Embedding:
        allowed = self.memory.fit(budget(s))
        try:
            # the ladder is told of its own rung, so that it goes on down where memory lacks at a size below that
            paced = dataclasses.replace(allowed, processing_size=self.pace.fit(allowed.processing_size))
            embedding = self._embed(image, gate, s, paced)
        except OutOfMemory as error:
            text = str(error)
        else:
            self.memory.went_well()
            return embedding
        raise self._lower("encode", allowed, text)

    def _embed(self, image: UInt8Array, gate: EnhancementGate | None, s: Settings, allowed: Budget) -> Embedding:
        with self._encoding:
            self._check_open()
            embedding = self.model.encode(image, allowed)
            mode = s.enhancement
            if mode == "auto":
                gate = gate or EnhancementGate()
                if gate.update(embedding.degradation, s.enhance_above, s.enhance_below):
                    mode = "always"
            return in_mode(self.model, embedding, mode)

    def _candidates(
        self, embedding: Embedding, prompts: tuple[FloatArray, FloatArray] | None, s: Settings
    ) -> Candidates:
        allowed = self.memory.fit(budget(s))
        try:
            with self._decoding:
                self._check_open()
                if prompts is None:
                    return self.model.propose(embedding, s.score_threshold, 4 * s.max_instances, allowed)
                return self.model.prompt(embedding, *prompts, allowed)
        except OutOfMemory as error:
            text = str(error)
        raise self._lower("decode", allowed, text)

    def _lower(self, stage: Literal["encode", "decode"], allowed: Budget, text: str) -> OutOfMemory:
        """One rung down, and what to tell the caller; to be called when the first error is gone.

        A traceback keeps the arrays of all its frames alive, so nothing could be freed beside one.
        """
        self.memory.lacked(stage, allowed)
        gc.collect()
        with self._encoding, self._decoding:
            self.model.free()
        if self.memory.is_exhausted:
            return OutOfMemory(
                f"{text}; expected memory for at least {self.memory} on {self.model.device}, and less is not possible: "
                "free memory there, or take a smaller model"
            )
        return OutOfMemory(f"{text}; next: {self.memory}")

    @staticmethod
    def _everything(embedding: Embedding, found: Candidates, s: Settings) -> Instances:
        stability = _stability(found.logits)
        binary = found.logits > 0
        height, width = embedding.size
        pixels = areas(binary) * (height * width / max(1, binary.shape[1] * binary.shape[2]))
        order = np.flatnonzero(
            (found.scores >= s.score_threshold)
            & (stability >= s.stability_threshold)
            # the exact area is known only at the size of the image, where interpolation makes at most fourfold of it
            # and rounding to whole pixels at most twofold of that
            & (pixels >= s.min_area / 8)
        )
        rank = found.scores if found.rank is None else found.rank
        order = order[np.argsort(-rank[order], kind="stable")]
        best = binary[order]
        extents = extents_of(best)
        if found.islands:  # before masks are compared: without their islands two may be the same
            for row, (k, extent) in enumerate(zip(order, extents.tolist())):
                if drop_islands(found.logits[k], found.islands, extent=extent):
                    np.greater(found.logits[k], 0, out=best[row])
                    extents[row] = measure(best[row])[0]
        kept = mask_nms(best, s.nms_iou, len(order), extents)
        return _to_instances(
            embedding, found, order[kept], extents[kept], stability, s.max_instances, max(1, s.min_area)
        )


def resolved(settings: Settings, model: SegmentationModel) -> Settings:
    """Settings with the model's own thresholds where they are below 0."""
    own = dict(zip(("score_threshold", "stability_threshold"), model.thresholds))
    return settings.replace(**{name: value for name, value in own.items() if getattr(settings, name) < 0})


def budget(s: Settings) -> Budget:
    """What the settings allow a call into the model; its own thresholds `resolved`."""
    return Budget(
        s.processing_size, s.points_per_side, s.points_per_batch, s.crop_layers, s.stability_threshold, s.nms_iou,
        s.second_look,
    )


def load_pipeline(
    model: str = "nano", *, enhancement: str = "auto", device: str = "auto", precision: str = "auto", **settings: Any
) -> Pipeline:
    """Load a model by name and make its pipeline.

    Args:
        model: a registered name, one of Hugging Face that stands for it, or a folder with weights of nano.
        enhancement: "off", "always" or "auto" (by the measured degradation).
        device: "auto", "cpu", "cuda" or "tensorrt".
        precision: "auto", "fp32", "fp16", "bf16" or "int8"; a model refuses what it does not have.
        **settings: any other field of `Settings`.

    Raises:
        ValueError: unknown model, unknown setting or a value out of range; or damaged weights, names the file.
        RuntimeError: the device asked for is not available.
        FileNotFoundError: weights are missing; names the file and the command that gets it.
        ModuleNotFoundError: a package of the extra `glesam` is missing.
    """
    try:
        chosen = Settings(model=model, enhancement=enhancement, device=device, precision=precision, **settings)
    except TypeError as error:
        raise ValueError(f"load_pipeline: {error}; see glesam_ros.Settings for the known ones") from error
    return Pipeline(load_model(model, device, precision), chosen)


def _stability(logits: FloatArray) -> FloatArray:
    inner, outer = areas(logits > STABILITY_OFFSET), areas(logits > -STABILITY_OFFSET)
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
    keep: Indices,
    extents: Indices,
    stability: FloatArray,
    limit: int,
    min_area: int,
) -> Instances:
    """The first `limit` candidates at `keep` that have `min_area` pixels at the size of the image, in that order.

    `extents` (len(keep), 4) are those of their positive logits, `stability` that of all candidates.
    """
    masks = np.zeros((min(limit, len(keep)), *embedding.size), np.bool_)
    boxes = np.zeros((len(masks), 4), np.float32)
    rows: list[int] = []
    for k, extent in zip(keep, extents.tolist()):
        row = len(rows)
        if row == limit:
            break
        box, area = upsample_into(masks[row], found.logits[k], extent)
        if area < min_area:
            masks[row, box[1] : box[3], box[0] : box[2]] = False
            continue
        boxes[row] = box
        rows.append(k)
    count = len(rows)
    return Instances(
        masks=masks[:count],
        boxes=boxes[:count],
        # an empty mask, which a prompt may have, is nothing to trust
        scores=np.where(boxes[:count, 2] > 0, np.clip(found.scores[rows], 0, 1), 0).astype(np.float32),
        stability=stability[rows],
        ids=np.arange(1, count + 1, dtype=np.int32),
        degradation=float(np.clip(embedding.degradation, 0, 1)),
        enhanced=embedding.enhanced,
    )
