"""Semantic maps: of every pixel of a picture the class it shows, and restored pictures; any model, one result type.

>>> from glesam_ros import load_semantic
>>> with load_semantic("rass-nano") as segmenter:
...     found = segmenter.segment(image)  # image: (H, W, 3) uint8 RGB
>>> found.classes[found.labels[y, x]], found.confidence[y, x]
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.instances import Instances
from glesam_ros.models import (
    OutOfMemory,
    RestorerModel,
    SemanticModel,
    load_restorer_model,
    load_semantic_model,
)
from glesam_ros.validation import FloatArray, UInt8Array, check_classes, check_image

LabelArray = NDArray[np.uint8] | NDArray[np.uint16]
"""(H, W) of class indices."""
NO_CLASS = -1
"""What `class_of_instances` says of a mask without pixels or without any confidence."""
MAIN_SHARE = 0.01
"""Classes that cover less of an image are specks."""

_Model = TypeVar("_Model", SemanticModel, RestorerModel)
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """The class of every pixel of one image.

    Attributes:
        labels: (H, W) uint8 or uint16, index into `classes`; `SemanticSegmenter` gives uint16 beyond 256 classes.
        confidence: (H, W) float32 in 0..1, probability of that class.
        classes: names of the K classes.
        palette: (K, 3) uint8 RGB, the colour of each class.

    Raises:
        ValueError: on construction, when shapes or ranges do not fit; says which field, expected and actual.
    """

    labels: LabelArray
    confidence: FloatArray
    classes: tuple[str, ...]
    palette: UInt8Array

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"labels: expected (H, W) uint8 or uint16, got {self.labels.shape} {self.labels.dtype}")
        if self.confidence.shape != self.labels.shape or self.confidence.dtype != np.float32:
            raise ValueError(
                f"confidence: expected {self.labels.shape} float32, got {self.confidence.shape} {self.confidence.dtype}"
            )
        check_classes(self.classes, self.palette)
        count, largest = len(self.classes), int(self.labels.max(initial=0))
        if largest >= count:
            raise ValueError(f"labels: expected 0..{count - 1} for {count} classes, got {largest}")
        if self.confidence.size:
            low, high = float(self.confidence.min()), float(self.confidence.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"confidence: expected 0..1, got {low:g} .. {high:g}")

    def __repr__(self) -> str:
        height, width = self.size
        return f"<class map, {width}x{height} px, {len(self.classes)} classes>"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return int(self.labels.shape[0]), int(self.labels.shape[1])

    def main_classes(self) -> tuple[str, ...]:
        """Names of the classes that cover at least `MAIN_SHARE` of the image, largest first: words for a restorer."""
        pixels = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-pixels, kind="stable")
        return tuple(self.classes[k] for k in order if pixels[k] and pixels[k] >= MAIN_SHARE * self.labels.size)

    def colours(self) -> UInt8Array:
        """(H, W, 3) uint8 RGB, each pixel in the colour of its class."""
        if self.labels.dtype != np.uint8:
            return np.take(self.palette, self.labels, axis=0)
        table = np.zeros((256, 1, 3), np.uint8)
        table[: len(self.palette), 0] = self.palette
        return np.asarray(cv2.applyColorMap(self.labels, table), np.uint8)


class _Loaded(Generic[_Model]):
    """What segmenter and restorer share: turns, freeing where memory lacks, closing."""

    def __init__(self, model: _Model) -> None:
        self.model: _Model = model
        self._turn = threading.RLock()
        self._is_closed = False

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model.name

    @property
    def device(self) -> str:
        """Where the model runs, in words."""
        return self.model.device

    def free(self) -> None:
        """Give memory back that is kept for later calls only. Raises RuntimeError when the model was closed."""
        with self._turn:
            self._check_open()
            self.model.free()

    def close(self) -> None:
        """Free the model's memory; it cannot be used afterwards. `with` does it at its end; once more is harmless."""
        with self._turn:
            if not self._is_closed:
                self._is_closed = True
                self.model.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"expected an open model, {self.name} was closed; load it again")

    def _run(self, call: Callable[[], _Result]) -> _Result:
        """`call`, once more with kept memory freed where memory lacks."""
        with self._turn:
            self._check_open()
            try:
                return call()
            except OutOfMemory:
                pass  # a traceback keeps the arrays of all its frames alive, so nothing could be freed beside one
            gc.collect()
            self.model.free()
            try:
                return call()
            except OutOfMemory as error:
                text = f"{error}; {self.name} on {self.device}: free memory there, or take a smaller model or picture"
        raise OutOfMemory(text)


class SemanticSegmenter(_Loaded[SemanticModel]):
    """A model of classes, ready for pictures; safe to call from several threads, calls take turns.

    Args:
        model: what says the logits.

    Raises:
        ValueError: names and colours of the model's classes do not fit each other.
    """

    def __init__(self, model: SemanticModel) -> None:
        check_classes(model.classes, model.palette)
        super().__init__(model)

    def __enter__(self) -> SemanticSegmenter:
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.model.classes

    @property
    def palette(self) -> UInt8Array:
        """(K, 3) uint8 RGB, the colour of each class."""
        return self.model.palette

    def segment(self, image: Any) -> SemanticMap:
        """Classify every pixel.

        The logits are interpolated to the size of the image; there the largest is the label, its softmax the
        confidence.

        Args:
            image: (H, W, 3) uint8 RGB of any size.

        Raises:
            TypeError, ValueError: `image` is not such an array; or what the model says does not fit its classes or is
                not finite.
            OutOfMemory: the device lacked memory, also after kept memory was freed.
            RuntimeError: the model was closed.
        """
        image = check_image(image)
        logits = self._run(lambda: self.model.logits(image))
        labels, confidence = labels_of_logits(logits, (image.shape[0], image.shape[1]), len(self.classes))
        return SemanticMap(labels, confidence, self.classes, self.palette)


class Restorer(_Loaded[RestorerModel]):
    """A model that restores pictures; safe to call from several threads, calls take turns."""

    def __enter__(self) -> Restorer:
        return self

    def restore(self, image: Any, classes: Sequence[str] = ()) -> UInt8Array:
        """Make a clear picture of a bad one.

        Args:
            image: (H, W, 3) uint8 RGB of any size.
            classes: names of what it shows, in words, where they are known.

        Returns:
            (H, W, 3) uint8 RGB, a new array.

        Raises:
            TypeError, ValueError: `image` is not such an array, or `classes` is one string; or the model gave a
                picture of another size.
            OutOfMemory: the device lacked memory, also after kept memory was freed.
            RuntimeError: the model was closed.
        """
        image = check_image(image)
        if isinstance(classes, str):
            raise TypeError(f"classes: expected a sequence of names, got the string {classes!r}; put it into a list")
        restored = self._run(lambda: self.model.restore(image, classes))
        if restored.shape != image.shape or restored.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: expected a picture {image.shape} uint8, got {restored.shape} {restored.dtype}"
            )
        return restored


def device_beside(device: str) -> str:
    """The device for the models that run beside that of the masks, which has `device`.

    Torch models have no TensorRT; auto takes it where a model has it.
    """
    return "auto" if device == "tensorrt" else device


def load_semantic(name: str = "rass-nano", device: str = "auto", precision: str = "auto") -> SemanticSegmenter:
    """Load a model of classes by name.

    Args:
        name: a registered name, see `glesam_ros.models.semantic_names`; or a folder with `rass_nano.onnx` and
            `rass_nano.json`, weights of one's own.
        device: "auto", "cpu", "cuda" or "tensorrt"; a model refuses what it does not have.
        precision: "auto", "fp32", "fp16", "bf16" or "int8"; likewise.

    Raises:
        ValueError: unknown name, device or precision, or weights that do not fit.
        RuntimeError: the device asked for is not available.
        FileNotFoundError: weights are missing; names the file and how to get it.
        ModuleNotFoundError: a package of the extra `glesam` is missing.
    """
    return SemanticSegmenter(load_semantic_model(name, device, precision))


def load_restorer(name: str = "scr-sd21", device: str = "auto", precision: str = "auto") -> Restorer:
    """Load a model that restores pictures by name. Arguments and errors as of `load_semantic`."""
    return Restorer(load_restorer_model(name, device, precision))


def labels_of_logits(logits: Any, size: tuple[int, int], count: int) -> tuple[LabelArray, FloatArray]:
    """Labels and confidence at the size of the image, of logits at any resolution.

    Args:
        logits: (K, h, w) float32, covering the whole image.
        size: (height, width) of the image.
        count: K, the number of classes.

    Returns:
        labels: (H, W), the class whose bilinearly interpolated logit is largest, of several the first; uint8, beyond
            256 classes uint16.
        confidence: (H, W) float32 in 0..1, its softmax over the interpolated logits.

    Raises:
        ValueError: logits of another shape, or that are not finite.
    """
    logits = np.asarray(logits)
    if logits.ndim != 3 or logits.shape[0] != count or 0 in logits.shape:
        raise ValueError(f"logits: expected ({count}, h, w) for {count} classes, got {logits.shape}")
    planes = np.ascontiguousarray(logits, np.float32)
    if not np.isfinite(planes).all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity; try precision fp32")
    labels = np.zeros(size, np.uint8 if count <= 256 else np.uint16)
    best, plane, total = (np.zeros(size, np.float32) for _ in range(3))
    _interpolated(planes[0], best)
    for k in range(1, count):
        _interpolated(planes[k], plane)
        # five times as fast as np.putmask
        cv2.copyTo(np.full(size, k, labels.dtype), (plane > best).view(np.uint8), labels)
        cv2.max(plane, best, best)
    # interpolated a second time: three planes instead of K at the size of the image
    for k in range(count):
        cv2.subtract(_interpolated(planes[k], plane), best, plane)
        cv2.accumulate(cv2.exp(plane, plane), total)
    return labels, np.minimum(1 / total, 1)


def _interpolated(plane: FloatArray, out: FloatArray) -> FloatArray:
    return np.asarray(cv2.resize(plane, (out.shape[1], out.shape[0]), out, interpolation=cv2.INTER_LINEAR), np.float32)


def class_of_instances(
    instances: Instances, semantic_map: SemanticMap
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], FloatArray]:
    """The class of each instance.

    With the pixels p of a mask M, their labels l(p) and confidences c(p), the weight of class k is
    w_k = sum of c(p) over the p in M with l(p) = k. The class is the k with the largest share w_k / sum_j w_j, of
    several the first. Its score is that share times the mean confidence in the mask, which is w_k / |M|: 1 where all of
    the mask is surely of one class, lower where the classes in it are mixed or unsure. Masks may overlap; each counts
    all its pixels.

    Args:
        instances: N of them.
        semantic_map: of the same image.

    Returns:
        class_index: (N,) int64, index into `semantic_map.classes`; `NO_CLASS` (-1) for a mask without pixels, or where
            all confidences are 0.
        class_score: (N,) float32 in 0..1; 0 where there is no class.

    Raises:
        ValueError: the sizes differ.
    """
    if instances.size != semantic_map.size:
        raise ValueError(
            f"semantic_map: expected (height, width) {instances.size} of the instances, got {semantic_map.size}"
        )
    index = np.full(len(instances), NO_CLASS, np.int64)
    score = np.zeros(len(instances), np.float32)
    for k, mask in enumerate(instances.masks):
        window = instances.window(k)
        inside = mask[window]
        labels, confidence = semantic_map.labels[window][inside], semantic_map.confidence[window][inside]
        weights = np.bincount(labels, confidence, len(semantic_map.classes))
        best = int(weights.argmax())
        if weights[best] > 0:
            index[k], score[k] = best, min(1.0, weights[best] / len(labels))
    return index, score
