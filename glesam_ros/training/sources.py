"""The photographs that a run draws from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glesam_ros.datasets import (
    Photograph,
    StoredPhotograph,
    load_bsds,
    load_camvid,
    load_clear_lqseg,
    load_coco,
    read_lqseg_info,
)
from glesam_ros.training.config import SourceConfig

READERS = {"coco": load_coco, "bsds": load_bsds, "camvid": load_camvid}


@dataclass(frozen=True)
class Scenes:
    """Photographs and how often each is drawn.

    Attributes:
        photographs: at least one; those of LQSeg sets are read when they are drawn.
        upto: (P,) cumulated weights, the last is their sum.
    """

    photographs: list[Photograph | StoredPhotograph]
    upto: np.ndarray[Any, Any]

    def draw(self, rng: np.random.Generator) -> Photograph:
        """A photograph, by weight."""
        found = self.photographs[int(np.searchsorted(self.upto, rng.random() * self.upto[-1], side="right"))]
        return found.read() if isinstance(found, StoredPhotograph) else found


def load_scenes(sources: Sequence[SourceConfig], data: Path) -> Scenes:
    """All sources together.

    Raises:
        FileNotFoundError: a folder, a list or a picture of a source is missing.
        ValueError: a source has no annotated photograph, or an LQSeg set is of another split.
    """
    photographs: list[Photograph | StoredPhotograph] = []
    weights: list[float] = []
    for number, source in enumerate(sources):
        folder = data / source.path
        if not folder.is_dir():
            raise FileNotFoundError(
                f"sources.{number}.path: expected a folder {folder}, found none; --data is the folder that holds it"
            )
        found: Sequence[Photograph | StoredPhotograph]
        if source.kind == "lqseg":
            found = _clear_of_lqseg(folder, source.split)
        else:
            found = READERS[source.kind](folder, source.split)
        if not found:
            raise ValueError(f"sources.{number}: expected annotated photographs in {folder}, found none")
        photographs += found
        weights += [source.weight] * len(found)
    return Scenes(photographs, np.cumsum(weights))


def _clear_of_lqseg(folder: Path, split: str) -> list[StoredPhotograph]:
    """The clear pictures; training degrades anew for every crop."""
    built = read_lqseg_info(folder)["settings"]["split"]
    if built != split:
        raise ValueError(f"{folder}: expected a data set of the split {split!r}, it is of {built!r}")
    return load_clear_lqseg(folder)
