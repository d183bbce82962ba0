"""The embedded semantic model "rass-nano": classes straight from bad pictures, by onnxruntime on CPU, CUDA or TensorRT.

Training and network: `glesam_ros.models.rass_nano_net`; what it was trained on, its figures and its licence:
docs/models.md. Weights of one's own classes are two files: a graph and what it knows of its classes (`RassNano`).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glesam_ros.models.nano import MULTIPLE, WEIGHTS, model_size, resized
from glesam_ros.models.onnx_session import AGAIN, engine_cache, on_device, open_session, run_session
from glesam_ros.validation import FloatArray, UInt8Array, check_classes

_LOG = logging.getLogger(__name__)
GRAPH_FILE, CARD_FILE = "rass_nano.onnx", "rass_nano.json"


@dataclass(frozen=True, eq=False)
class Card:
    """What `rass_nano.json` says of the graph beside it.

    Attributes:
        classes: names of the K classes, in the order of the logits.
        palette: (K, 3) uint8 RGB, the colour of each class.
        long_side: of the largest picture inside the model in pixels, a multiple of 32; larger ones are scaled down.
        licence: of the weights, in words.
    """

    classes: tuple[str, ...]
    palette: UInt8Array
    long_side: int
    licence: str


class RassNano:
    """A semantic model; see `glesam_ros.models.base.SemanticModel`.

    A picture is scaled so that its long side is at most `long_side`, never enlarged; both sides are rounded to the
    nearest multiple of 32, at least 32. The logits of that cover the whole picture at a quarter of its size.

    Args:
        device: "auto", "cpu", "cuda" or "tensorrt".
        precision: "auto" (fp32), "fp32" or "fp16" (TensorRT only).
        weights: folder with `rass_nano.onnx`, which turns "image" (1, H, W, 3) uint8 RGB into "logits"
            (1, K, H/4, W/4) float32, and `rass_nano.json`, read by `read_card`; the shipped one where None.
        threads: of each operator on the CPU; 0 is one a core.

    Attributes:
        licence: of the weights, in words.

    Raises:
        FileNotFoundError: one of the files is missing; names it.
        ValueError: a file is damaged or does not fit the other; or a precision that the device does not have.
        RuntimeError: the device is not available.
    """

    name = "rass-nano"

    def __init__(
        self, device: str = "auto", precision: str = "auto", weights: Path | None = None, threads: int = 0
    ) -> None:
        folder = WEIGHTS if weights is None else weights
        if precision == "auto":
            precision = "fp32"
        if precision not in ("fp32", "fp16"):
            raise ValueError(f"precision: expected auto, fp32 or fp16 (TensorRT) for {self.name}, got {precision!r}")
        card = read_card(folder / CARD_FILE)
        self.classes, self.palette, self.long_side, self.licence = (
            card.classes, card.palette, card.long_side, card.licence
        )
        self._session, self.device = on_device(
            device, functools.partial(_open_on, folder / GRAPH_FILE, len(self.classes), precision, threads)
        )
        _LOG.info("%s runs on %s; licence of its weights: %s", self.name, self.device, self.licence)

    def logits(self, image: UInt8Array) -> FloatArray:
        """As `SemanticModel.logits`, at a quarter of the size inside the model. Raises OutOfMemory."""
        size = (int(image.shape[0]), int(image.shape[1]))
        inside = model_size(size, min(self.long_side, max(size)))
        (logits,) = run_session(self._session, {"image": resized(image, inside)[None]}, ["logits"])
        found: FloatArray = logits[0]
        return found

    def free(self) -> None:
        """onnxruntime keeps its arena; there is nothing to give back."""

    def close(self) -> None:
        del self._session


def read_card(file: Path) -> Card:
    """Read `rass_nano.json`: an object with `classes`, `palette` ([r, g, b] each), `long_side`, `licence`, and others.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; names the file, what was expected and what came.
    """
    if not file.is_file():
        raise FileNotFoundError(f"expected {file}, which names the classes; {AGAIN}")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}; {AGAIN}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(read).__name__}; {AGAIN}")
    for key, kind in (("classes", list), ("palette", list), ("long_side", int), ("licence", str)):
        if not isinstance(read.get(key), kind):
            raise ValueError(f"{file}: {key}: expected {kind.__name__}, got {read.get(key)!r:.80}; {AGAIN}")
    if read["long_side"] < MULTIPLE or read["long_side"] % MULTIPLE:
        raise ValueError(f"{file}: long_side: expected a multiple of {MULTIPLE}, got {read['long_side']}")
    try:
        palette = _colours(read["palette"])
        check_classes(tuple(read["classes"]), palette)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Card(tuple(read["classes"]), palette, read["long_side"], read["licence"])


def _colours(rows: Sequence[Any]) -> UInt8Array:
    for row in rows:
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(c, int) and 0 <= c <= 255 for c in row)):
            raise ValueError(f"palette: expected [r, g, b] of whole numbers in 0..255, got {row!r}")
    return np.array(rows, np.uint8).reshape(-1, 3)


def _open_on(path: Path, count: int, precision: str, threads: int, device: str) -> tuple[Any, str]:
    """The session on `device`, and where it runs in words."""
    if precision == "fp16" and device != "tensorrt":
        raise ValueError(f"precision: fp16 needs device tensorrt, got {device}; use auto or fp32")
    session = _open(path, count, device, precision == "fp16", threads)
    return session, f"{device} ({precision}, onnxruntime, {session.get_providers()[0]})"


def _open(path: Path, count: int, device: str, fp16: bool, threads: int) -> Any:
    cache = engine_cache([path]) if device == "tensorrt" and path.is_file() else None
    session = open_session(path, device, fp16, cache, threads)
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    if list(inputs) != ["image"] or inputs["image"].type != "tensor(uint8)" or len(inputs["image"].shape) != 4:
        got = ", ".join(f"{value.name} {value.shape} {value.type}" for value in inputs.values())
        raise ValueError(f"{path}: expected the input image (1, H, W, 3) uint8, got {got or 'none'}; {AGAIN}")
    if "logits" not in outputs:
        raise ValueError(f"{path}: expected the output logits, got {', '.join(outputs)}; {AGAIN}")
    shape = outputs["logits"].shape
    # a size that is not fixed is a word or None; then the first picture tells
    if len(shape) != 4 or isinstance(shape[1], int) and shape[1] != count:
        raise ValueError(
            f"{path}: expected logits (1, {count}, h, w) for the {count} classes of {CARD_FILE} beside it, "
            f"got {shape}; {AGAIN}"
        )
    return session
