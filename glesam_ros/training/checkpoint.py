"""Files of tensors that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from glesam_ros.models.glesam.weights import read_checkpoint, write_checkpoint


def write(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers and texts (nested) to `path`; a kill at any moment leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    write_checkpoint(path, content, is_shared=False)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of torch, it is cut short, or it holds something else.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content


def load_into(net: nn.Module, path: Path, model: str) -> None:
    """Give `net` the weights in `path`.

    Args:
        model: its name, for what is said of weights that do not fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none, or of another network.
    """
    try:
        net.load_state_dict(read(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: expected weights of {model}, {' '.join(str(error).split())}") from error
