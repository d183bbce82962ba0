"""What of the asked size and batch fits into a device's memory: down where it lacks, up again after good frames."""

from __future__ import annotations

import dataclasses
import logging
import threading
from dataclasses import dataclass
from typing import Literal

from glesam_ros.models.base import Budget
from glesam_ros.pace import smaller

_LOG = logging.getLogger(__name__)
SIZE_STEP = 128
"""Pixels of processing size between two rungs: large steps, because each costs a frame."""
LEAST_BATCH = 8
"""Prompts a batch below which little memory is won."""
GOOD_FRAMES = 30
"""Frames in a row that must succeed before a rung is tried again."""
MOST_GOOD_FRAMES = 64 * GOOD_FRAMES
"""The same after trials that failed, each of which doubles it."""


@dataclass(frozen=True)
class Rung:
    """What a frame may take: processing size in pixels, prompts a batch."""

    size: int
    batch: int


class MemoryLadder:
    """How much of the asked size and batch fits: each lack of memory costs a rung, good frames win it back.

    A lack in `decode` halves the batch, down to `LEAST_BATCH`; one in `encode`, or with the least batch, takes the
    processing size to the next multiple of `SIZE_STEP` below, down to half of the model's own. After `GOOD_FRAMES` good
    frames the last step is taken back. If memory lacks again before as many frames went well, the wait doubles, up to
    `MOST_GOOD_FRAMES`; it starts anew once the top has held. Thread-safe.

    Args:
        own_size: the model's own processing size, which 0 stands for.

    Attributes:
        failures: how often memory was lacking.
        is_exhausted: whether it was lacking on the lowest rung, the last time.
    """

    def __init__(self, own_size: int) -> None:
        self._own_size = own_size
        self._asked = (0, 0)
        self._rungs = [Rung(own_size, 0)]
        self._lock = threading.Lock()
        self._good = 0
        self._wait = GOOD_FRAMES
        self._is_trial = False
        self.is_exhausted = False
        self.failures = 0

    def __str__(self) -> str:
        full, now = self.full, self.now
        return f"processing size {now.size} of {full.size}, {now.batch} of {full.batch} prompts a batch"

    @property
    def full(self) -> Rung:
        """What is asked for."""
        return self._rungs[0]

    @property
    def now(self) -> Rung:
        """What fits, as far as is known."""
        return self._rungs[-1]

    def ask(self, processing_size: int, points_per_batch: int) -> None:
        """What a frame may take where memory is plenty; others than before begin anew."""
        with self._lock:
            if (processing_size, points_per_batch) != self._asked:
                self._asked = processing_size, points_per_batch
                self._rungs = [Rung(processing_size or self._own_size, points_per_batch)]
                self._begin()

    def fit(self, allowed: Budget) -> Budget:
        """`allowed`, lowered to the rung of now."""
        with self._lock:
            # a budget of older settings is not what the rungs are of
            if len(self._rungs) == 1 or (allowed.processing_size, allowed.points_per_batch) != self._asked:
                return allowed
            return dataclasses.replace(allowed, processing_size=self.now.size, points_per_batch=self.now.batch)

    def lacked(self, stage: Literal["encode", "decode"], allowed: Budget) -> None:
        """Memory was lacking in a call that had the budget `allowed`: one rung down."""
        with self._lock:
            self.failures += 1
            self._good = 0
            now = self.now
            can_shrink, can_split = now.size > self._own_size // 2, now.batch > LEAST_BATCH
            self.is_exhausted = not (can_shrink or can_split)
            if self.is_exhausted:
                return
            split = can_split and (stage == "decode" or not can_shrink)
            had = Rung(allowed.processing_size or self._own_size, allowed.points_per_batch)
            # a call that began before the last step says nothing of the rung of now
            if (had.batch != now.batch) if split else (had.size != now.size):
                return
            if self._is_trial:
                self._wait = min(2 * self._wait, MOST_GOOD_FRAMES)
                self._is_trial = False
            if split:
                lower = dataclasses.replace(now, batch=max(LEAST_BATCH, now.batch // 2))
            else:
                lower = dataclasses.replace(now, size=smaller(now.size, self._own_size, SIZE_STEP))
            self._rungs.append(lower)
            text = str(self)
        _LOG.warning("out of memory in %s: %s from now on", stage, text)

    def went_well(self) -> None:
        """A frame was encoded; after enough of them one rung up."""
        with self._lock:
            if len(self._rungs) == 1 and not self._is_trial:
                return
            self._good += 1
            if self._good < self._wait:
                return
            self._good = 0
            if len(self._rungs) == 1:
                self._begin()
                return
            self._rungs.pop()
            self._is_trial = True
            wait, text = self._wait, str(self)
        _LOG.info("memory was enough for %d frames: %s is tried again", wait, text)

    def _begin(self) -> None:
        self._good, self._wait, self._is_trial, self.is_exhausted = 0, GOOD_FRAMES, False, False
