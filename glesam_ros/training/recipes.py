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
        export: module:name of a function (config, data, out) -> the model folder that it makes of a finished run; empty
            where what `train` writes is one.
        use: the command that takes that folder, with `{path}` in its place.
    """

    stages: tuple[str, ...]
    config: str
    train: str
    result: str
    export: str = ""
    use: str = ""

    def config_class(self) -> Any:
        """The dataclass."""
        return _named(self.config)

    def train_function(self) -> Callable[..., Sequence[Path]]:
        """The function."""
        found: Callable[..., Sequence[Path]] = _named(self.train)
        return found

    def export_function(self) -> Callable[..., Path]:
        """The function; ask for it only where `export` names one."""
        found: Callable[..., Path] = _named(self.export)
        return found


RECIPES = {
    "nano": Recipe(
        ("base", "level", "restore", "decode", "refit"), "config:Config", "nano:train_nano", "weights",
        "export:export_run", "ros2 launch glesam_ros perception.launch.py model:={path}",
    ),
    "glesam": Recipe(
        ("level", "restore", "decode", "distill"), "full_config:FullConfig", "full:train_full", "enhancer"
    ),
    "rass": Recipe(("scr", "rass"), "rass_config:RassTrainingConfig", "rass:train_rass", "weights"),
    "rass_nano": Recipe(
        ("base", "scr", "rass"), "rass_nano_config:RassNanoConfig", "rass_nano:train_rass_nano", "weights",
        "rass_nano_export:export_run", "ros2 launch glesam_ros perception.launch.py semantic:={path}",
    ),
}


def recipe_of(config: Any) -> Recipe:
    """The recipe of a configuration that `load_any` gave."""
    return RECIPES[getattr(config, "model", "nano")]


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"glesam_ros.training.{module}"), name)
