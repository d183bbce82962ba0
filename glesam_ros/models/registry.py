"""Models by name: instance masks, maps of classes, restored pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from glesam_ros.models.base import RestorerModel, SegmentationModel, SemanticModel
from glesam_ros.models.glesam import catalogue
from glesam_ros.optional import OPTIONAL

Factory = Callable[[str, str], SegmentationModel]
"""(device, precision) -> model."""
SemanticLoader = Callable[[str, str], SemanticModel]
"""(device, precision) -> model."""
RestorerLoader = Callable[[str, str], RestorerModel]
"""(device, precision) -> model."""

_Model = TypeVar("_Model")


def _nano(device: str, precision: str, folder: Path | None = None) -> SegmentationModel:
    from glesam_ros.models.nano import Nano  # onnxruntime is needed only here

    return Nano(device, precision, folder)


def _full_size(name: str, device: str, precision: str) -> SegmentationModel:
    from glesam_ros.models.glesam.model import load_glesam  # torch is needed only here

    return load_glesam(name, device, precision)


def _rass_nano(device: str, precision: str, folder: Path | None = None) -> SemanticModel:
    from glesam_ros.models.rass_nano import RassNano

    return RassNano(device, precision, folder)


def _rass(device: str, precision: str) -> SemanticModel:
    from glesam_ros.models.rass.rass import load_rass

    return load_rass(device, precision)


def _scr(device: str, precision: str) -> RestorerModel:
    from glesam_ros.models.rass.scr import load_scr

    return load_scr(device, precision)


_REGISTRY: dict[str, Factory] = {"nano": _nano, **{name: partial(_full_size, name) for name in catalogue.model_names()}}
_SEMANTIC: dict[str, SemanticLoader] = {"rass-nano": _rass_nano, "rass-sd21": _rass}
_RESTORERS: dict[str, RestorerLoader] = {"scr-sd21": _scr}


def register_model(name: str, factory: Factory) -> None:
    """Add a model of instance masks under `name`. Raises ValueError when the name is taken."""
    _register("model", _REGISTRY, name, factory)


def register_semantic(name: str, loader: SemanticLoader) -> None:
    """Add a model of classes under `name`. Raises ValueError when the name is taken."""
    _register("semantic model", _SEMANTIC, name, loader)


def register_restorer(name: str, loader: RestorerLoader) -> None:
    """Add a model that restores pictures under `name`. Raises ValueError when the name is taken."""
    _register("restorer", _RESTORERS, name, loader)


def model_names() -> tuple[str, ...]:
    """Names that `load_model` knows, sorted."""
    return tuple(sorted(_REGISTRY))


def semantic_names() -> tuple[str, ...]:
    """Names that `load_semantic_model` knows, sorted."""
    return tuple(sorted(_SEMANTIC))


def restorer_names() -> tuple[str, ...]:
    """Names that `load_restorer_model` knows, sorted."""
    return tuple(sorted(_RESTORERS))


def load_model(name: str, device: str = "auto", precision: str = "auto") -> SegmentationModel:
    """Load a registered model of instance masks; or, from a folder, nano with weights of one's own.

    Args:
        name: a registered name; for a model at full size a repository of Hugging Face, see `catalogue.HUB`; or a folder
            that `glesam train` wrote.
        device, precision: as in `glesam_ros.settings`.

    Raises:
        ValueError: unknown name; lists the known ones. Or weights that are damaged or do not fit; names the file.
        RuntimeError: the device asked for is not available.
        FileNotFoundError: weights are missing; names the file and how to get it.
        ModuleNotFoundError: a package that this model needs is missing; says how to install it.
    """
    if name not in _REGISTRY and name not in catalogue.HUB and _is_folder(name):
        return _made("model", name, lambda: _nano(device, precision, Path(name)))
    if name not in catalogue.HUB and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model: expected a folder with weights of nano, found no folder {name}; give its whole path")
    asked, name = name, name if name in _REGISTRY else catalogue.own_name(name)
    if name not in _REGISTRY:
        own = [known for known in model_names() if known not in catalogue.model_names()]
        raise ValueError(
            f"model: expected one of {', '.join([*own, *catalogue.BASES])}, SAM's also with "
            f"{', '.join(f'+{enhancer}' for enhancer in catalogue.ENHANCERS)}, or a folder with weights of nano; "
            f"got {asked!r}{_elsewhere(asked)}"
        )
    return _load("model", _REGISTRY, name, device, precision)


def load_semantic_model(name: str, device: str = "auto", precision: str = "auto") -> SemanticModel:
    """Load a registered model of classes; or, from a folder, rass-nano with weights of one's own.

    Args:
        name: a registered name, or a folder with `rass_nano.onnx` and `rass_nano.json`.
        device, precision: as for `load_model`.

    Raises:
        As `load_model`.
    """
    if name not in _SEMANTIC and _is_folder(name):
        return _made("semantic", name, lambda: _rass_nano(device, precision, Path(name)))
    return _load("semantic", _SEMANTIC, name, device, precision)


def load_restorer_model(name: str, device: str = "auto", precision: str = "auto") -> RestorerModel:
    """Load a registered model that restores pictures. Raises as `load_model`."""
    return _load("restorer", _RESTORERS, name, device, precision)


def _is_folder(name: str) -> bool:
    return name != "" and Path(name).is_dir()  # a path without a name would be the current folder


def _elsewhere(name: str) -> str:
    """The way to the model `name`, where it is of another kind than was asked for."""
    if name in _REGISTRY:
        return ", a model of masks: parameter model, `glesam segment`"
    if name in _SEMANTIC:
        return ", a model of classes: parameter semantic, `glesam semantic`"
    return ", a restorer: parameter restorer, `glesam restore`" if name in _RESTORERS else ""


def _register(
    what: str, registry: dict[str, Callable[[str, str], _Model]], name: str, loader: Callable[[str, str], _Model]
) -> None:
    if name in registry:
        raise ValueError(f"{what} {name!r} is registered already")
    registry[name] = loader


def _load(
    what: str, registry: dict[str, Callable[[str, str], _Model]], name: str, device: str, precision: str
) -> _Model:
    if name not in registry:
        folder = ", or a folder with weights of rass-nano" if what == "semantic" else ""
        raise ValueError(
            f"{what}: expected one of {', '.join(sorted(registry))}{folder}; got {name!r}{_elsewhere(name)}"
        )
    return _made(what, name, lambda: registry[name](device, precision))


def _made(what: str, name: str, make: Callable[[], _Model]) -> _Model:
    """What `make` gives; a package that it lacks is named with what brings it."""
    try:
        return make()
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        text = f"{what} {name}: {error}; install what it needs: {OPTIONAL[error.name]}"
        raise ModuleNotFoundError(text, name=error.name) from error
