"""Lets torchvision be imported where its compiled operators do not fit the torch at hand.

That is so beside a CPU build of torch where torchvision is PyPI's, and on many a Jetson. segment-anything and diffusers
import torchvision, but what we use of them needs none of its operators. torchvision's import then fails because it
describes two operators that were never defined; defining them, without an implementation, mends it.
"""

from __future__ import annotations

import importlib

from torch import library

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARY: list[library.Library] = []  # a library that is collected takes its operators with it


def allow_import_without_operators() -> None:
    """Import torchvision, or where its operators are missing make that possible; call before what imports it.

    A torchvision that is not installed is left to whoever needs it. Its operators, where they are missing, still raise
    when they are called.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _LIBRARY:
            raise
        operators = library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            operators.define(schema)
        _LIBRARY.append(operators)
        importlib.import_module("torchvision")
