"""`--help` of the executables, which are nodes: what they take they take from ROS."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from glesam_ros.settings import Spec

WIDTH = 100


def is_asked(args: Sequence[str] | None) -> bool:
    """Whether help is asked for, before what is for ROS; None are the arguments of the process."""
    own = list(sys.argv[1:] if args is None else args)
    if "--ros-args" in own:
        own = own[: own.index("--ros-args")]
    return not {"-h", "--help"}.isdisjoint(own)


def text(executable: str, about: str, example: str, parameters: Mapping[str, tuple[Any, Spec]]) -> str:
    """Help for a terminal.

    Args:
        executable: its name.
        about: what it does, a line or two.
        example: arguments behind `--ros-args`.
        parameters: by name, default and what else is known of each.
    """
    start = f"ros2 run glesam_ros {executable}"
    lines = [f"usage: {start} [--ros-args [-p NAME:=VALUE ...] [--params-file FILE] [-r FROM:=TO ...]]", "", about, ""]
    lines += ["example:", f"  {start} --ros-args {example}", "", "parameters:"]
    for name, (default, spec) in parameters.items():
        known = spec.values_in_words(default), f"default: {json.dumps(default)}"
        lines.append(f"  {name} ({'; '.join(filter(None, known))})")
        lines += textwrap.wrap(spec.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
