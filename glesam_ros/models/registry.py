"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from glesam_ros.models.base import SegmentationModel
from glesam_ros.models.glesam import catalogue

Factory = Callable[[str, str], SegmentationModel]
"""(device, precision) -> model."""


def _nano(device: str, precision: str) -> SegmentationModel:
    from glesam_ros.models.nano import Nano  # onnxruntime is needed only here

    return Nano(device, precision)


def _full_size(name: str, device: str, precision: str) -> SegmentationModel:
    from glesam_ros.models.glesam.model import load_glesam  # torch is needed only here

    return load_glesam(name, device, precision)


_REGISTRY: dict[str, Factory] = {"nano": _nano, **{name: partial(_full_size, name) for name in catalogue.model_names()}}


def register_model(name: str, factory: Factory) -> None:
    """Add a model under `name`. Raises ValueError when the name is taken."""
    if name in _REGISTRY:
        raise ValueError(f"model {name!r} is registered already")
    _REGISTRY[name] = factory


def model_names() -> tuple[str, ...]:
    """Names that `load_model` knows, sorted."""
    return tuple(sorted(_REGISTRY))


def load_model(name: str, device: str = "auto", precision: str = "auto") -> SegmentationModel:
    """Load a registered model.

    Raises:
        ValueError: unknown name; lists the known ones.
        RuntimeError: the device asked for is not available.
        FileNotFoundError: weights are missing; names the file and how to get it.
        ModuleNotFoundError: a package that this model needs is missing.
    """
    if name not in _REGISTRY:
        own = [known for known in model_names() if known not in catalogue.model_names()]
        raise ValueError(
            f"model: expected one of {', '.join([*own, *catalogue.BASES])}, SAM's also with "
            f"{', '.join(f'+{enhancer}' for enhancer in catalogue.ENHANCERS)}; got {name!r}"
        )
    return _REGISTRY[name](device, precision)
