"""The prompts of one camera: kept until cleared, expired or outside of a new resolution."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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


class CameraPrompts:
    """Points (together one object) and boxes (one object each); safe to use from several threads.

    An object expires when its last point is too old. Times are of the steady clock, so a prompt also expires while a
    simulation is paused.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._points: list[_Point] = []
        self._points_since = 0.0
        self._boxes: list[tuple[float, float, float, float]] = []
        self._boxes_since = 0.0

    def add_point(self, x: float, y: float, positive: bool, size: tuple[int, int]) -> str:
        """Add a point to the camera's object.

        Args:
            x, y: pixels of the image of `size` (height, width).

        Returns:
            A warning when the point has no effect yet, else "".

        Raises:
            ValueError: outside of the image, not finite, or too many points.
        """
        check_points([[x, y]], [1], size)
        with self._lock:
            if len(self._points) >= MAX_POINTS:
                raise ValueError(
                    f"points: expected at most {MAX_POINTS} for one object, got one more; call clear_prompts first"
                )
            self._points.append(_Point(x, y, int(positive)))
            self._points_since = self._clock()
            if not any(p.label for p in self._points):
                return f"negative point ({x:g}, {y:g}) has no effect before a positive point (z >= 0) comes"
            return ""

    def set_boxes(self, boxes: Any, size: tuple[int, int]) -> None:
        """Replace all boxes; none clears them.

        Args:
            boxes: (M, 4) xyxy in pixels of the image of `size` (height, width).

        Raises:
            ValueError: a box that is empty or does not touch the image, or too many boxes.
        """
        if len(boxes) > MAX_BOXES:
            raise ValueError(f"boxes: expected at most {MAX_BOXES}, got {len(boxes)}")
        checked = check_boxes(boxes, size) if len(boxes) else np.zeros((0, 4), np.float32)
        with self._lock:
            self._boxes = [tuple(b) for b in checked.tolist()]
            self._boxes_since = self._clock()

    def clear(self) -> tuple[int, int]:
        """Forget everything; (points, boxes) that were held."""
        with self._lock:
            held = len(self._points), len(self._boxes)
            self._points, self._boxes = [], []
            return held

    def count(self) -> tuple[int, int]:
        """(points, boxes) that are held."""
        with self._lock:
            return len(self._points), len(self._boxes)

    def current(self, size: tuple[int, int], timeout_s: float) -> tuple[dict[str, Any], list[str]]:
        """Prompts for a frame of `size` (height, width), and warnings for prompts that were dropped.

        Args:
            timeout_s: age at which a prompt expires; 0 keeps it.

        Returns:
            Arguments for `Pipeline.decode` (empty: everything mode), and one text for each dropped prompt.
        """
        warnings: list[str] = []
        height, width = size
        now = self._clock()
        with self._lock:
            if timeout_s > 0:
                if now - self._points_since > timeout_s:
                    self._points = []
                if now - self._boxes_since > timeout_s:
                    self._boxes = []
            inside = [p for p in self._points if p.x < width and p.y < height]
            warnings += [
                f"point ({p.x:g}, {p.y:g}) dropped: the image is {width}x{height} now"
                for p in self._points if p not in inside
            ]
            self._points = inside
            touching = [b for b in self._boxes if b[0] < width and b[1] < height]
            warnings += [
                f"box ({b[0]:g}, {b[1]:g}, {b[2]:g}, {b[3]:g}) dropped: the image is {width}x{height} now"
                for b in self._boxes if b not in touching
            ]
            self._boxes = touching
            arguments: dict[str, Any] = {}
            if any(p.label for p in self._points):
                arguments["points"] = np.array([(p.x, p.y) for p in self._points], np.float32)
                arguments["labels"] = np.array([p.label for p in self._points], np.float32)
            if self._boxes:
                arguments["boxes"] = np.array(self._boxes, np.float32)
            return arguments, warnings
