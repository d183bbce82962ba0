"""The perception node with small numpy models, so that the tests of the ROS layer need no weights.

Models: `bright` finds connected bright regions; `steady` sleeps 0.1 s in each encode, `slow` 2 s; `busy` holds the
interpreter for 2 s in each encode; `fragile` raises on a red image; `absent` cannot be loaded; `filed` can where the
file that WEIGHTS names is there; `stuck` encodes a red image as long as the file that STUCK names is there, and logs
that it was closed; `sized` logs the sizes that it encodes, and says that it runs on the device that was asked for.
`bright2.1_tiny+glesam` is `bright` with a name like those of full-size models.

Short of memory, own size 1024: `tight` has room for 768 pixels and 16 prompts a batch while the picture is red, `scant`
has it always; `hungry` has room for nothing while the picture is red, `starved` always.

`laborious` sleeps 0.2 s in each encode at its own size, less at others as the square of the size.

Each half takes 0.1 s and is logged with its times: `paired`, which overlaps, and `single`, which does not.

Semantic models: `horizon` says white is "person", the rest "sky" in the upper half and "road" in the lower one, sure as
`SURE` says; it raises on a red picture, lacks memory for a green one. `horizon300` has its classes at 0, 1 and 299 of
300; `starless` never has memory; `horizon-filed` can be loaded where the file that SEMANTIC_WEIGHTS names is there.
Restorer: `negative`, which raises on a red picture and lacks memory for a green one, and is busy as long as the file
that STUCK_RESTORER names is there. Their calls are logged.

HOLD_AT_END, where it is set, lets no other thread run once the node has ended.
STOP_TIMEOUT_S, where it is set, is how long the node waits for an inference that should end.
At its end the process prints which modules of ours and which libraries of networks it has imported.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from glesam_ros.models import (
    Candidates,
    Embedding,
    OutOfMemory,
    register_model,
    register_restorer,
    register_semantic,
)

SCALE = 4
SLOW_S = 2.0
PAUSE_S = 0.1
LABORIOUS_S = 0.2
ROOM = 768, 16
DOTTED = "bright2.1_tiny+glesam"
SURE = 4.0
"""Logit of the class that a pixel shows; that of all others is 0."""
NETWORK_LIBRARIES = ("onnxruntime", "torch", "diffusers", "transformers")
LOG = logging.getLogger("glesam_ros.test_model")


class Bright:
    """Connected regions brighter than 128 are objects; a dark image is a degraded one."""

    classes = ("object",)
    own_size = 512
    thresholds = (0.15, 0.5)
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


class Stuck(Bright):
    def encode(self, image, budget):
        while is_red(image) and Path(os.environ["STUCK"]).exists():
            time.sleep(0.01)
        return super().encode(image, budget)

    def close(self):
        super().close()
        LOG.info("stuck closed")


class Sized(Bright):
    def __init__(self, device: str, precision: str) -> None:
        super().__init__(device, precision)
        self.device = device

    def encode(self, image, budget):
        LOG.info("encode %dx%d", image.shape[1], image.shape[0])
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


class Laborious(Bright):
    def encode(self, image, budget):
        time.sleep(LABORIOUS_S * ((budget.processing_size or self.own_size) / self.own_size) ** 2)
        return super().encode(image, budget)


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


def refuse(image):
    """Red and green pictures are too much."""
    if is_red(image):
        raise RuntimeError("red is too much")
    if image[0, 0, 1] == 255 and image[0, 0, 0] == 0:
        raise OutOfMemory("green takes all memory")


class Horizon:
    places = 0, 1, 2

    def __init__(self, device: str, precision: str) -> None:
        self.name, self.device = "horizon", f"{device} and {precision}"
        count = max(3, self.places[-1] + 1)
        names = {k: f"class {k}" for k in range(count)} | dict(zip(self.places, ("sky", "road", "person")))
        self.classes = tuple(names.values())
        self.palette = np.random.default_rng(0).integers(0, 256, (count, 3), np.uint8)
        self.is_closed = False
        LOG.info("semantic loaded")

    def logits(self, image):
        if self.is_closed:
            raise RuntimeError("the semantic model was used after close()")
        LOG.info("semantic call")
        refuse(image)
        sky, road, person = self.places
        logits = np.zeros((len(self.classes), *image.shape[:2]), np.float32)
        middle, is_white = image.shape[0] // 2, (image == 255).all(2)
        logits[sky, :middle] = logits[road, middle:] = logits[person] = SURE
        logits[[sky, road]] *= ~is_white
        logits[person] *= is_white
        return logits

    def free(self): ...

    def close(self):
        LOG.info("semantic closed")
        self.is_closed = True


class Starless(Horizon):
    def logits(self, image):
        raise OutOfMemory("never enough")


class Horizon300(Horizon):
    places = 0, 1, 299


def _horizon_filed(device: str, precision: str):
    path = Path(os.environ["SEMANTIC_WEIGHTS"])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: weights of horizon are missing; get them: glesam models get horizon")
    return Horizon(device, precision)


class Negative:
    def __init__(self, device: str, precision: str) -> None:
        self.name, self.device = "negative", "cpu"
        self.is_closed = False

    def restore(self, image, classes=()):
        if self.is_closed:
            raise RuntimeError("the restorer was used after close()")
        LOG.info("restorer call with %s", list(classes))
        while "STUCK_RESTORER" in os.environ and Path(os.environ["STUCK_RESTORER"]).exists():
            time.sleep(0.01)
        refuse(image)
        return 255 - image

    def free(self): ...

    def close(self):
        LOG.info("restorer closed")
        self.is_closed = True


def _absent(device: str, precision: str):
    raise RuntimeError("expected weights beside the model, found none; train it first")


def _filed(device: str, precision: str):
    path = Path(os.environ["WEIGHTS"])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: weights of filed are missing; get them: glesam models get filed")
    return Bright(device, precision)


if __name__ == "__main__":
    from glesam_ros.ros import node, process

    node.STOP_TIMEOUT_S = float(os.environ.get("STOP_TIMEOUT_S", node.STOP_TIMEOUT_S))
    for model in (
        Bright, Steady, Slow, Busy, Fragile, Stuck, Sized, Tight, Hungry, Scant, Starved, Laborious, Paired, Single,
    ):
        register_model(model.__name__.lower(), model)
    register_model(DOTTED, Bright)
    register_model("absent", _absent)
    register_model("filed", _filed)
    register_semantic("horizon", Horizon)
    register_semantic("horizon300", Horizon300)
    register_semantic("starless", Starless)
    register_semantic("horizon-filed", _horizon_filed)
    register_restorer("negative", Negative)
    code = process.main()
    print("modules:", *sorted(m for m in sys.modules if m.startswith("glesam_ros.") or m in NETWORK_LIBRARIES))
    if "HOLD_AT_END" in os.environ:
        ctypes.PyDLL(None).pause()  # as a library that locks itself up: the interpreter's lock stays taken
    sys.exit(code)
