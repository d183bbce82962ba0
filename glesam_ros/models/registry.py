"""Models by name."""

from __future__ import annotations

from collections.abc import Callable

from glesam_ros.models.base import SegmentationModel

Factory = Callable[[str, str], SegmentationModel]
"""(device, precision) -> model."""


def _nano(device: str, precision: str) -> SegmentationModel:
    from glesam_ros.models.nano import Nano  # onnxruntime is needed only here

    return Nano(device, precision)


_REGISTRY: dict[str, Factory] = {"nano": _nano}


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
    """
    if name not in _REGISTRY:
        raise ValueError(f"model: expected one of {', '.join(model_names())}; got {name!r}")
    return _REGISTRY[name](device, precision)
