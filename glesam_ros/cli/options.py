"""What the commands share: options made from `Settings`, loading a pipeline, the error a user sees."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from glesam_ros import __version__, settings

if TYPE_CHECKING:
    from glesam_ros.pipeline import Pipeline

_Model = TypeVar("_Model")

VALUE_SETTINGS = ("min_image_value", "max_image_value", "do_dynamic_scaling")
"""Settings that say what is black and white."""
MODEL_SETTINGS = (
    "model", "device", "precision", "enhancement", "processing_size", "points_per_side", "points_per_batch",
    "crop_layers", "second_look",
)
"""Settings that choose and drive the model."""
SELECTION_SETTINGS = (
    "enhance_above", "enhance_below", "score_threshold", "stability_threshold", "nms_iou", "max_instances", "min_area",
)
"""Settings that choose among its instances."""
BESIDE_TEXTS = {
    "device": "Where the model runs; tensorrt: rass-nano alone.",
    "precision": "Arithmetic; no such model has int8; rass-nano: fp32, on TensorRT also fp16.",
}
"""Help for commands whose model is a semantic one."""


class CommandError(Exception):
    """Something a user can mend; `main` prints it as one line and exits with 1."""


def add_settings(
    parser: argparse.ArgumentParser, names: Sequence[str], defaults: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Add an option for each of the parameters `names`, with help, range, choices and default from its `Spec`.

    Args:
        parser: gets the options.
        names: of parameters.
        defaults: of the command, where they are not the node's.
        texts: help by name, where that of the node's parameter does not fit.
    """
    group = parser.add_argument_group("model options", "names and ranges are those of the node's parameters")
    for name in names:
        spec, default = settings.spec(name), (defaults or {}).get(name, settings.default(name))
        flag = "--" + name.replace("_", "-")
        about = [(texts or {}).get(name, spec.help).replace("%", "%%")]
        if spec.low is not None:
            about.append(f"{spec.low} .. {spec.high}{' ' + spec.unit if spec.unit else ''};")
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        about.append(f"default: {shown}")
        text = " ".join(about)
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif spec.choices:
            group.add_argument(flag, choices=spec.choices, default=default, help=text)
        else:
            metavar = {int: "N", float: "X", str: "NAME"}[type(default)]
            group.add_argument(flag, type=_checked(name, type(default)), default=default, metavar=metavar, help=text)


def add_action(actions: Any, command: str, name: str, text: str) -> argparse.ArgumentParser:
    """Add the action `name` of `command` to its sub-parsers; `text` says in both helps what it does."""
    return actions.add_parser(  # type: ignore[no-any-return]
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"examples: glesam {command} --help"
    )


def chosen_settings(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The values of the options that `add_settings` made, by parameter name."""
    return {name: getattr(args, name) for name in names}


def open_pipeline(args: argparse.Namespace, names: Sequence[str]) -> Pipeline:
    """Load the pipeline that the options ask for.

    Args:
        args: of the command.
        names: of the parameters that have an option.

    Raises:
        CommandError: unknown model, device not available, values that contradict, weights missing or damaged.
    """
    from glesam_ros.pipeline import load_pipeline

    return opened(load_pipeline, **chosen_settings(args, names))


def opened(load: Callable[..., _Model], *args: Any, **more: Any) -> _Model:
    """The model that `load` gives for these arguments; what it logs is shown.

    Raises:
        CommandError: as of `open_pipeline`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return load(*args, **more)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error


def not_negative(expected: str) -> Callable[[str], float]:
    """A converter for argparse of numbers of at least 0; `expected` says so in its error."""

    def convert(text: str) -> float:
        value = float(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    convert.__name__ = "float"  # argparse names it in "invalid float value"
    return convert


def progress(unit: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A bar for work that takes it: (items, how many) -> the items, counted as they are taken."""
    from tqdm import tqdm

    return lambda items, total: tqdm(items, total=total, unit=unit, disable=None)


def numbers(text: str, allowed: Sequence[int], what: str) -> tuple[float, ...]:
    """Comma separated numbers of an option, as many as `allowed` says.

    Raises:
        argparse.ArgumentTypeError: not numbers, or too few or too many; names `what` was expected.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in allowed:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return values


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type for numbers above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def seed(text: str) -> int:
    """An argparse type for seeds: integers of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text}")
    return value


def degradation(text: str) -> str:
    """An argparse type for names of degradations."""
    from glesam_ros.degradation import names  # only when asked for: it takes longer to import than --help may take

    if text not in names():
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names())}; got {text!r}")
    return text


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, Python, numpy, OpenCV and those of `packages` that are installed under these names."""
    import cv2
    import numpy as np

    found = {
        "glesam_ros": __version__, "python": platform.python_version(), "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # for example onnxruntime-gpu, which has another name
            continue
    return found


def _checked(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        try:
            settings.check_value(name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    parse.__name__ = kind.__name__
    return parse
