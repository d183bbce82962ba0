"""A model for tests without weights: every bright region is an object, and a dark picture counts as degraded."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from glesam_ros.models import Candidates, Embedding, model_names, register_model

NAME = "bright"


class BrightRegions:
    """Connected bright regions, best score for the largest; prompts get the region under their first point."""

    name = NAME
    device = "cpu"
    classes = ("object",)
    own_size = 512
    thresholds = (0.15, 0.5)
    overlaps = False

    def encode(self, image: Any, budget: Any) -> Embedding:
        grey = image.mean(2).astype(np.float32)
        return Embedding(grey[None, None], image.shape[:2], degradation=1.0 if grey.max() < 120 else 0.0)

    def enhance(self, embedding: Embedding) -> Embedding:
        brighter = np.minimum(embedding.latent * 2.5, 255)
        return Embedding(brighter, embedding.size, embedding.degradation, enhanced=True)

    def propose(self, embedding: Embedding, score_threshold: float, limit: int, budget: Any) -> Candidates:
        count, regions = cv2.connectedComponents((embedding.latent[0, 0] > 100).astype(np.uint8))
        masks = sorted((regions == k for k in range(1, count)), key=lambda m: -int(m.sum()))[:limit]
        logits = np.array([np.where(m, 5, -5) for m in masks], np.float32).reshape(len(masks), *embedding.size)
        return Candidates(logits, np.linspace(0.95, 0.6, len(masks), dtype=np.float32))

    def prompt(self, embedding: Embedding, points: Any, labels: Any, budget: Any) -> Candidates:
        height, width = embedding.size
        logits = np.full((len(points), height, width), -5, np.float32)
        for k, (xy, kinds) in enumerate(zip(points, labels)):
            if 2 in kinds:
                (x1, y1), (x2, y2) = xy[kinds == 2][0].astype(int), xy[kinds == 3][0].astype(int)
                logits[k, y1:y2, x1:x2] = 5
            else:
                _, regions = cv2.connectedComponents((embedding.latent[0, 0] > 100).astype(np.uint8))
                x, y = xy[kinds == 1][0].astype(int)
                logits[k][regions == regions[y, x]] = 5
        return Candidates(logits, np.full(len(points), 0.9, np.float32))

    def free(self) -> None: ...

    def close(self) -> None: ...


def register() -> str:
    """Register the model once and return its name."""
    if NAME not in model_names():
        register_model(NAME, lambda device, precision: BrightRegions())
    return NAME


def scene(width: int = 96, height: int = 64, level: int = 220) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Black picture with a rectangle of 30x20 at (10, 12) and one of 20x30 at (60, 20), RGB of brightness `level`."""
    image = np.zeros((height, width, 3), np.uint8)
    image[12:32, 10:40] = level
    image[20:50, 60:80] = (level, level, level // 2)
    return image


def scene_masks(width: int = 96, height: int = 64) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(2, H, W) bool, the truth of `scene`."""
    masks = np.zeros((2, height, width), bool)
    masks[0, 12:32, 10:40] = masks[1, 20:50, 60:80] = True
    return masks
