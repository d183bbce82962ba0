"""What `glesam train` trains: for each value of a configuration's key `model`, its stages and where its code is.

Light: nothing of it is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One kind of model.

    Attributes:
        stages: names in the order in which they run.
        config, train: module:name, below `glesam_ros.training`, of the dataclass of its configuration and of the
            function (config, data, out, device, until) -> paths of what it wrote.
        result: what those paths are.
    """

    stages: tuple[str, ...]
    config: str
    train: str
    result: str

    def config_class(self) -> Any:
        """The dataclass."""
        return _named(self.config)

    def train_function(self) -> Callable[..., Sequence[Path]]:
        """The function."""
        found: Callable[..., Sequence[Path]] = _named(self.train)
        return found


RECIPES = {
    "nano": Recipe(
        ("base", "level", "restore", "decode", "refit"), "config:Config", "nano:train_nano", "weights for export"
    ),
    "glesam": Recipe(
        ("level", "restore", "decode", "distill"), "full_config:FullConfig", "full:train_full", "enhancer"
    ),
    "rass": Recipe(("scr", "rass"), "rass_config:RassTrainingConfig", "rass:train_rass", "weights"),
    "rass_nano": Recipe(
        ("base", "scr", "rass"), "rass_nano_config:RassNanoConfig", "rass_nano:train_rass_nano", "weights for export"
    ),
}


def recipe_of(config: Any) -> Recipe:
    """The recipe of a configuration that `load_any` gave."""
    return RECIPES[getattr(config, "model", "nano")]


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"glesam_ros.training.{module}"), name)
