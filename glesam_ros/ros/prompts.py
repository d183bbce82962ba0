"""The prompts of one camera: kept until cleared, expired, or the resolution changes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glesam_ros.validation import check_boxes, check_points

MAX_POINTS = 32
MAX_BOXES = 64


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    label: int


@dataclass(frozen=True)
class _Box:
    xyxy: tuple[float, float, float, float]
    results: Sequence[Any]


class CameraPrompts:
    """Points (together one object) and boxes (one object each); safe to use from several threads.

    An object expires when its last point is too old. Times are of the steady clock, so a prompt also expires while a
    simulation is paused. Prompts are pixels of one resolution, so another one drops them all.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._points: list[_Point] = []
        self._points_since = 0.0
        self._boxes: dict[int, _Box] = {}
        self._boxes_since = 0.0
        self._size = 0, 0

    def add_point(self, x: float, y: float, positive: bool, size: tuple[int, int], timeout_s: float) -> str:
        """Add a point to the camera's object.

        Args:
            x, y: pixels of the image of `size` (height, width).
            timeout_s: age at which earlier points expire; 0 keeps them.

        Returns:
            A warning when the point has no effect yet, or dropped others, else "".

        Raises:
            ValueError: outside of the image, not finite, or too many points.
        """
        check_points([[x, y]], [1], size)
        with self._lock:
            warnings = self._forget_gone(size, timeout_s)
            if len(self._points) >= MAX_POINTS:
                raise ValueError(
                    f"points: expected at most {MAX_POINTS} for one object, got one more; call clear_prompts first"
                )
            self._points.append(_Point(x, y, int(positive)))
            self._points_since = self._clock()
            if not any(p.label for p in self._points):
                warnings.append(f"negative point ({x:g}, {y:g}) has no effect before a positive point (z >= 0) comes")
            return "; ".join(warnings)

    def set_boxes(
        self, boxes: Any, size: tuple[int, int], timeout_s: float, results: Sequence[Sequence[Any]] = ()
    ) -> str:
        """Replace all boxes; none clears them. A bad one is left out, and the others keep their places in the order.

        Args:
            boxes: (M, 4) xyxy in pixels of the image of `size` (height, width).
            timeout_s: as of `add_point`.
            results: what else is known of each box, such as its classes; `current` gives it back. None: nothing.

        Returns:
            A warning when prompts of another resolution were dropped, else "".

        Raises:
            ValueError: some were refused, and the others hold: empty, not finite, beside the image, or one too many.
                Where none is good, those before hold.
        """
        good, faults = _accepted(boxes, size, results)
        if faults and not good:
            raise ValueError(faults[0])
        with self._lock:
            self._boxes = {}
            warnings = self._forget_gone(size, timeout_s)
            self._boxes = good
            self._boxes_since = self._clock()
        if faults:
            raise ValueError("; ".join([*faults, *warnings]))
        return "; ".join(warnings)

    def clear(self, timeout_s: float) -> tuple[int, int]:
        """Forget everything; (points, boxes) that were held and had not expired."""
        with self._lock:
            self._forget_expired(timeout_s)
            held = len(self._points), len(self._boxes)
            self._points, self._boxes = [], {}
            return held

    def count(self, timeout_s: float) -> tuple[int, int]:
        """(points, boxes) that are held and have not expired."""
        with self._lock:
            self._forget_expired(timeout_s)
            return len(self._points), len(self._boxes)

    def current(
        self, size: tuple[int, int], timeout_s: float
    ) -> tuple[dict[str, Any], dict[int, Sequence[Any]], list[str]]:
        """Prompts for a frame of `size` (height, width), and warnings for prompts that were dropped.

        Args:
            timeout_s: age at which a prompt expires; 0 keeps it.

        Returns:
            Arguments for `Pipeline.decode` (empty: everything mode); the id of each object in their order, with the
            `results` of its box: 1 is that of the points, where there are any, and then come the places of the boxes;
            and one text for each dropped prompt.
        """
        arguments: dict[str, Any] = {}
        objects: dict[int, Sequence[Any]] = {}
        with self._lock:
            warnings = self._forget_gone(size, timeout_s)
            if any(p.label for p in self._points):
                objects[1] = ()
                arguments["points"] = np.array([(p.x, p.y) for p in self._points], np.float32)
                arguments["labels"] = np.array([p.label for p in self._points], np.float32)
            _add_boxes(arguments, objects, self._boxes)
        return arguments, objects, warnings

    def _forget_gone(self, size: tuple[int, int], timeout_s: float) -> list[str]:
        """Forget what expired and, with a text each, what was for an image of another size than (height, width)."""
        self._forget_expired(timeout_s)
        gone: list[str] = []
        if size != self._size:
            gone = [f"point ({p.x:g}, {p.y:g})" for p in self._points]
            gone += ["box ({:g}, {:g}, {:g}, {:g})".format(*box.xyxy) for box in self._boxes.values()]
            self._points, self._boxes, self._size = [], {}, size
        return [f"{prompt} dropped: the image is {size[1]}x{size[0]} now" for prompt in gone]

    def _forget_expired(self, timeout_s: float) -> None:
        now = self._clock()
        if timeout_s > 0:
            if now - self._points_since > timeout_s:
                self._points = []
            if now - self._boxes_since > timeout_s:
                self._boxes = {}


def boxes_of(
    message: Any, size: tuple[int, int]
) -> tuple[dict[str, Any], dict[int, Sequence[Any]], str]:
    """Prompts for the frame of `size` (height, width) that a vision_msgs/Detection2DArray was found in.

    Returns:
        As `CameraPrompts.current`; but of the boxes alone, and in place of the texts one for what is left out, or "".
    """
    boxes, results = corners_of(message)
    good, faults = _accepted(boxes, size, results)
    arguments: dict[str, Any] = {}
    objects: dict[int, Sequence[Any]] = {}
    _add_boxes(arguments, objects, good)
    return arguments, objects, "; ".join(faults)


def corners_of(message: Any) -> tuple[list[tuple[float, float, float, float]], list[Sequence[Any]]]:
    """Boxes xyxy of a vision_msgs/Detection2DArray, of rotated ones the upright boxes around them; their `results`."""
    return [_corners(d.bbox) for d in message.detections], [d.results for d in message.detections]


def _corners(box: Any) -> tuple[float, float, float, float]:
    theta = box.center.theta if math.isfinite(box.center.theta) else math.nan  # math refuses infinity
    cos, sin = abs(math.cos(theta)), abs(math.sin(theta))
    half_x, half_y = (box.size_x * cos + box.size_y * sin) / 2, (box.size_x * sin + box.size_y * cos) / 2
    x, y = box.center.position.x, box.center.position.y
    return x - half_x, y - half_y, x + half_x, y + half_y


def _accepted(
    boxes: Sequence[Any], size: tuple[int, int], results: Sequence[Sequence[Any]]
) -> tuple[dict[int, _Box], list[str]]:
    """The good ones of boxes xyxy by their places, at most `MAX_BOXES`; and what is wrong with the others."""
    good: dict[int, _Box] = {}
    faults: list[str] = []
    for place, box in enumerate(boxes[:MAX_BOXES]):
        try:
            xyxy = tuple(check_boxes([box], size)[0].tolist())
            good[place] = _Box(xyxy, results[place] if results else ())
        except ValueError as error:
            faults = faults or [str(error)]
    if len(boxes) > MAX_BOXES:
        faults.append(f"boxes: expected at most {MAX_BOXES}, got {len(boxes)}")
    if faults and good:
        faults.append(f"{len(boxes) - len(good)} of {len(boxes)} boxes are left out, the others hold")
    return good, faults


def _add_boxes(arguments: dict[str, Any], objects: dict[int, Sequence[Any]], boxes: dict[int, _Box]) -> None:
    """Boxes by their places, as `CameraPrompts.current` gives them, behind what is there."""
    if boxes:
        arguments["boxes"] = np.array([box.xyxy for box in boxes.values()], np.float32)
        first = 1 + len(objects)
        objects |= {first + place: box.results for place, box in boxes.items()}
