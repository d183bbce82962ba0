"""One slot for the newest frame of each camera, taken in turns; one for a frame between two threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Frame:
    """A camera message as it came.

    Attributes:
        camera: name of the camera.
        message: sensor_msgs Image or CompressedImage.
        arrival: `time.monotonic()` when it came, seconds.
        boxes: vision_msgs/Detection2DArray that was found in it; None: what the camera is prompted with counts.
    """

    camera: str
    message: Any
    arrival: float = field(default_factory=time.monotonic)
    boxes: Any = None


class NewestFrames:
    """Newest frame of each camera; `put` never waits for `take`, `take` serves the cameras in turns.

    Args:
        cameras: names of all cameras.
    """

    def __init__(self, cameras: Sequence[str]) -> None:
        self._order = tuple(cameras)
        self._slots: dict[str, Frame] = {}
        self._next = 0
        self._is_closed = False
        self._condition = threading.Condition()

    def put(self, frame: Frame) -> str:
        """Store `frame`; why a frame was lost by that, as the ledger counts it, "" where none was.

        "overwritten": an older one that nobody took made room. "disabled": this one, nobody takes any more.
        """
        with self._condition:
            if self._is_closed:
                return "disabled"
            replaced = frame.camera in self._slots
            self._slots[frame.camera] = frame
            self._condition.notify()
            return "overwritten" if replaced else ""

    def take(self) -> Frame | None:
        """Wait for a frame; the camera served last comes last. None when closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._slots or self._is_closed)
            if self._is_closed:
                return None
            for offset in range(len(self._order)):
                index = (self._next + offset) % len(self._order)
                if self._order[index] in self._slots:
                    self._next = (index + 1) % len(self._order)
                    return self._slots.pop(self._order[index])
            raise KeyError(f"frame of an unknown camera: expected one of {self._order}, got {list(self._slots)}")

    def clear(self) -> list[str]:
        """Empty all slots; names of the cameras that lost a frame."""
        with self._condition:
            lost = list(self._slots)
            self._slots.clear()
            return lost

    def close(self) -> None:
        """Let every `take` return None, now and later."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()


class HandOver(Generic[Item]):
    """From one thread to another without a queue: the giver waits until the taker has it, so nothing grows old."""

    def __init__(self) -> None:
        self._slot: list[Item] = []
        self._is_closed = False
        self._condition = threading.Condition()

    def give(self, item: Item) -> bool:
        """Wait until the other thread takes `item`; False when it was closed before."""
        with self._condition:
            if self._is_closed:
                return False
            self._slot.append(item)
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._slot or self._is_closed)
            was_taken = not self._slot
            self._slot.clear()
            return was_taken

    def take(self) -> Item | None:
        """Wait for an item; None when closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._slot or self._is_closed)
            if self._is_closed:
                return None
            self._condition.notify_all()
            return self._slot.pop()

    def close(self) -> None:
        """Let every `give` return False and every `take` None, now and later."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
