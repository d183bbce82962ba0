"""Frames of one camera and the boxes that were found in them, brought together by their stamps."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple

from glesam_ros.ros.scheduling import Frame

BYTES_KEPT = 256 * 2**20
"""Of frames that wait for their boxes: ten seconds of 640x480 at 30 Hz, one and a half of 1920x1080."""
BOXES_KEPT = 8
"""Messages of boxes that wait for their frame, which a detector may have had earlier."""
LATELY_S = 10.0
"""While boxes met a frame within this time, the detector works, and frames that expire are those that it left out."""

Stamp = tuple[int, int]


class Paired(NamedTuple):
    """What a frame or boxes brought about.

    Attributes:
        frame: with its boxes, where both are there now, else None.
        passed: frames that a working detector left out.
        expired: frames that no boxes came for, nor for others around them.
        unmatched: messages of boxes whose frame did not come.
    """

    frame: Frame | None = None
    passed: int = 0
    expired: int = 0
    unmatched: int = 0


class Pairing:
    """Waiting frames and waiting boxes of one camera; safe to use from several threads.

    Exact stamps, as message_filters.TimeSynchronizer has it; but here every frame that is lost can be counted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: dict[Stamp, Frame] = {}
        self._boxes: dict[Stamp, Any] = {}
        self._last_answered: float | None = None

    def put_frame(self, frame: Frame, limit_ms: int) -> Paired:
        """Take in a frame.

        Args:
            frame: as it came.
            limit_ms: frames that wait for longer expire; 0 is no limit but that of memory, `BYTES_KEPT`.
        """
        stamp = _stamp(frame.message)
        with self._lock:
            before = len(self._frames)
            self._frames = {
                key: held for key, held in self._frames.items()
                if key != stamp and not 0 < limit_ms < 1e3 * (frame.arrival - held.arrival)
            }
            self._frames[stamp] = frame
            size = sum(len(held.message.data) for held in self._frames.values())
            while size > BYTES_KEPT and len(self._frames) > 1:
                size -= len(self._frames.pop(next(iter(self._frames))).message.data)
            lost = before + 1 - len(self._frames)
            works = self._last_answered is not None and frame.arrival - self._last_answered <= LATELY_S
            found = self._match(stamp, self._boxes[stamp]) if stamp in self._boxes else Paired()
            return found._replace(passed=found.passed + lost) if works else found._replace(expired=lost)

    def put_boxes(self, message: Any) -> Paired:
        """Take in a vision_msgs/Detection2DArray."""
        stamp = _stamp(message)
        with self._lock:
            if stamp in self._frames:
                return self._match(stamp, message)
            self._boxes[stamp] = message
            unmatched = max(0, len(self._boxes) - BOXES_KEPT)
            for key in list(self._boxes)[:unmatched]:
                del self._boxes[key]
            return Paired(unmatched=unmatched)

    def clear(self) -> int:
        """Forget all; how many frames were waiting."""
        with self._lock:
            count = len(self._frames)
            self._frames, self._boxes, self._last_answered = {}, {}, None
            return count

    def _match(self, stamp: Stamp, message: Any) -> Paired:
        """The frame of `stamp` with its boxes; what came before it is over."""
        keys = list(self._frames)
        passed = keys.index(stamp)
        frame = dataclasses.replace(self._frames[stamp], boxes=message)
        self._last_answered = frame.arrival
        for key in keys[: passed + 1]:
            del self._frames[key]
        late = [key for key in self._boxes if key < stamp]
        for key in [*late, stamp]:
            self._boxes.pop(key, None)
        return Paired(frame, passed=passed, unmatched=len(late))


def _stamp(message: Any) -> Stamp:
    stamp = message.header.stamp
    return stamp.sec, stamp.nanosec
