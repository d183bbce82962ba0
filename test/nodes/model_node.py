"""The perception node with small numpy models, so that the tests of the ROS layer need no weights.

Models: `bright` finds connected bright regions; `steady` sleeps 0.1 s in each encode, `slow` 2 s; `busy` holds the
interpreter for 2 s in each encode; `fragile` raises on a red image; `absent` cannot be loaded; `filed` can where the
file that WEIGHTS names is there. `bright2.1_tiny+glesam` is `bright` with a name like those of full-size models.

Short of memory, own size 1024: `tight` has room for 768 pixels and 16 prompts a batch while the picture is red, `scant`
has it always; `hungry` has room for nothing while the picture is red, `starved` always.

Each half takes 0.1 s and is logged with its times: `paired`, which overlaps, and `single`, which does not.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from glesam_ros.models import Candidates, Embedding, OutOfMemory, register_model

SCALE = 4
SLOW_S = 2.0
PAUSE_S = 0.1
ROOM = 768, 16
DOTTED = "bright2.1_tiny+glesam"
LOG = logging.getLogger("glesam_ros.test_model")


class Bright:
    """Connected regions brighter than 128 are objects; a dark image is a degraded one."""

    classes = ("object",)
    own_size = 512
    overlaps = False

    def __init__(self, device: str, precision: str) -> None:
        self.name, self.device = "bright", "cpu"
        self.is_closed = False

    def encode(self, image, budget):
        if self.is_closed:
            raise RuntimeError("the model was used after close()")
        height, width = image.shape[:2]
        small = cv2.resize(image, (max(1, width // SCALE), max(1, height // SCALE)), interpolation=cv2.INTER_AREA)
        latent = small.mean(2, dtype=np.float32)[None, None]
        return Embedding(latent, (height, width), float(1 - image[::8, ::8].max() / 255))

    def enhance(self, embedding):
        return Embedding(embedding.latent, embedding.size, embedding.degradation, True)

    def _regions(self, embedding):
        bright = (embedding.latent[0, 0] > 128).astype(np.uint8)
        count, labels = cv2.connectedComponents(bright)
        areas = np.bincount(labels.ravel(), minlength=count)
        order = sorted(range(1, count), key=lambda k: -areas[k])
        return labels, order

    def propose(self, embedding, score_threshold, limit, budget):
        labels, order = self._regions(embedding)
        order = order[:limit]
        logits = np.array([np.where(labels == k, 8, -8) for k in order], np.float32).reshape(-1, *labels.shape)
        return Candidates(logits, np.linspace(0.95, 0.75, len(order), dtype=np.float32))

    def prompt(self, embedding, points, labels, budget):
        """An object is the region under its positive points, or the filled box."""
        regions, _ = self._regions(embedding)
        height, width = regions.shape
        logits = np.full((len(points), height, width), -8, np.float32)
        for row, (xy, kinds) in enumerate(zip(points / SCALE, labels)):
            if 2 in kinds:
                (x1, y1), (x2, y2) = xy[kinds >= 2].astype(int)
                logits[row, y1:y2, x1:x2] = 8
            for (x, y), kind in zip(xy.astype(int), kinds):
                region = regions[min(y, height - 1), min(x, width - 1)]
                if kind in (0, 1) and region:
                    logits[row][regions == region] = 8 if kind == 1 else -8
        return Candidates(logits, np.full(len(points), 0.9, np.float32))

    def free(self): ...

    def close(self):
        self.is_closed = True


class Steady(Bright):
    pause_s = 0.1

    def encode(self, image, budget):
        time.sleep(self.pause_s)
        return super().encode(image, budget)


class Slow(Steady):
    pause_s = SLOW_S


class Busy(Bright):
    def encode(self, image, budget):
        until = time.monotonic() + SLOW_S
        while time.monotonic() < until:
            sum(range(1000))
        return super().encode(image, budget)


def is_red(image):
    return image[0, 0, 0] == 255 and image[0, 0, 1] == 0


class Fragile(Bright):
    def encode(self, image, budget):
        if is_red(image):
            raise RuntimeError("red is too much")
        return super().encode(image, budget)


class Tight(Bright):
    own_size = 1024
    room = ROOM

    def is_short(self, image):
        return is_red(image)

    def encode(self, image, budget):
        self.has_room = not self.is_short(image)
        size = budget.processing_size or self.own_size
        if not self.has_room and size > self.room[0]:
            raise OutOfMemory(f"expected room for {size} px, got {self.room[0]}")
        return super().encode(image, budget)

    def propose(self, embedding, score_threshold, limit, budget):
        if not self.has_room and budget.points_per_batch > self.room[1]:
            raise OutOfMemory(f"expected room for {budget.points_per_batch} prompts, got {self.room[1]}")
        return super().propose(embedding, score_threshold, limit, budget)


class Hungry(Tight):
    room = 0, 0


class Scant(Tight):
    def is_short(self, image):
        return True


class Starved(Scant):
    room = 0, 0


class Paired(Bright):
    overlaps = True

    def encode(self, image, budget):
        return timed("encode", super().encode, image, budget)

    def propose(self, *arguments):
        return timed("decode", super().propose, *arguments)


class Single(Paired):
    overlaps = False


def timed(stage, call, *arguments):
    start = time.monotonic()
    time.sleep(PAUSE_S)
    found = call(*arguments)
    LOG.info("%s from %.4f to %.4f", stage, start, time.monotonic())
    return found


def _absent(device: str, precision: str):
    raise RuntimeError("expected weights beside the model, found none; train it first")


def _filed(device: str, precision: str):
    path = Path(os.environ["WEIGHTS"])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: weights of filed are missing; get them: glesam models get filed")
    return Bright(device, precision)


if __name__ == "__main__":
    from glesam_ros.ros.node import main

    for model in (Bright, Steady, Slow, Busy, Fragile, Tight, Hungry, Scant, Starved, Paired, Single):
        register_model(model.__name__.lower(), model)
    register_model(DOTTED, Bright)
    register_model("absent", _absent)
    register_model("filed", _filed)
    sys.exit(main())
