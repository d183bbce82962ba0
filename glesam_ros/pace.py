"""Frames within a time: the processing size shrinks while they take longer, and grows back when there is time again."""

from __future__ import annotations

import logging
import statistics
import threading
from collections import deque

_LOG = logging.getLogger(__name__)
STEPS = 8
"""A step of processing size is this part of a model's own: 64 px for nano, 128 for SAM models, multiples they take."""
FRAMES = 5
"""Frames whose median counts: one slow frame says nothing."""
SETTLING = 3
"""Frames after a change that do not count: some were begun before it, and the first of a size may be slow."""
GOOD_FRAMES = 30
"""Frames in a row that must leave time for the next size before it is tried."""
MOST_GOOD_FRAMES = 64 * GOOD_FRAMES
"""The same after trials that failed, each of which doubles it."""


def smaller(size: int, own_size: int, step: int) -> int:
    """The next multiple of `step` below `size`, at least half of a model's own; `size` where there is none."""
    return min(size, max(own_size // 2, (size - 1) // step * step))


class Pace:
    """The largest processing size at which frames keep within a limit of time.

    Down a step when the median of the last `FRAMES` frames is over the limit. Up a step when `GOOD_FRAMES` frames in a
    row would leave time for the next size, if all of their time grew with its square (some of it does not, so that the
    next size takes less). A step up that has to be taken back before as many frames kept within the limit doubles the
    wait, up to `MOST_GOOD_FRAMES`. Thread-safe.

    Args:
        own_size: the model's own processing size, which 0 stands for.

    Attributes:
        is_late: whether frames are over the limit even at the least size.
    """

    def __init__(self, own_size: int) -> None:
        self._own_size = own_size
        self._asked = (0, 0)
        self._lock = threading.Lock()
        self._sizes = [own_size]
        self._times: deque[float] = deque(maxlen=FRAMES)
        self._settling = self._held = self._fitting = 0
        self._wait, self._is_trial, self.is_late = GOOD_FRAMES, False, False

    def __str__(self) -> str:
        return f"processing size {self.now} of {self.full}"

    @property
    def full(self) -> int:
        """The size that is asked for, in pixels."""
        return self._sizes[0]

    @property
    def now(self) -> int:
        """The size that keeps within the limit, as far as is known, in pixels."""
        return self._sizes[-1]

    def ask(self, processing_size: int, limit_ms: int) -> None:
        """The size and the time that a frame may take; others than before begin anew.

        Args:
            processing_size: in pixels; 0 takes the model's own.
            limit_ms: 0 is no limit.
        """
        with self._lock:
            if (processing_size, limit_ms) != self._asked:
                self._asked = processing_size, limit_ms
                self._begin()

    def fit(self, processing_size: int) -> int:
        """`processing_size` (0 takes the model's own), lowered to what keeps within the limit."""
        with self._lock:
            # another size than a model's own is never made of 0 without need
            return processing_size if len(self._sizes) == 1 else min(processing_size or self._own_size, self.now)

    def took(self, seconds: float) -> None:
        """A frame was made in `seconds`, at the size of now."""
        with self._lock:
            limit = self._asked[1] / 1e3
            if not limit:
                return
            if self._settling:
                self._settling -= 1
                return
            self._times.append(seconds)
            if len(self._times) < FRAMES:
                return
            typical = statistics.median(self._times)
            changed = self._slower() if typical > limit else self._faster(typical, limit)
            text = str(self)
        if changed:
            _LOG.info("frames of %.0f ms, limit %.0f ms: %s from now on", 1e3 * typical, 1e3 * limit, text)

    def _slower(self) -> bool:
        lower = smaller(self.now, self._own_size, self._own_size // STEPS)
        self.is_late = lower == self.now
        self._held = self._fitting = 0
        if self.is_late:
            return False
        if self._is_trial:
            self._wait = min(2 * self._wait, MOST_GOOD_FRAMES)
        self._change([*self._sizes, lower], is_trial=False)
        return True

    def _faster(self, typical: float, limit: float) -> bool:
        self.is_late = False
        self._held += 1
        if self._is_trial and self._held >= self._wait:
            self._is_trial, self._wait = False, GOOD_FRAMES
        has_time = len(self._sizes) > 1 and typical * (self._sizes[-2] / self.now) ** 2 <= limit
        self._fitting = self._fitting + 1 if has_time else 0
        if self._fitting < self._wait:
            return False
        self._change(self._sizes[:-1], is_trial=True)
        return True

    def _begin(self) -> None:
        self._wait, self.is_late = GOOD_FRAMES, False
        self._change([self._asked[0] or self._own_size], is_trial=False)

    def _change(self, sizes: list[int], is_trial: bool) -> None:
        """Other sizes from the one asked for to that of now."""
        self._sizes, self._is_trial = sizes, is_trial
        self._times.clear()
        self._settling, self._held, self._fitting = SETTLING, 0, 0
