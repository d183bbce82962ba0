#!/usr/bin/env python3
"""Write config/perception.yaml and the parameter table of README.md from `glesam_ros.settings`.

python scripts/generate_parameters.py           write both
python scripts/generate_parameters.py --check   exit with 1 and name the files that differ, write nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glesam_ros import settings  # noqa: E402  # the copy beside this script, installed or not

YAML = ROOT / "config" / "perception.yaml"
README = ROOT / "README.md"
BEGIN, END = "<!-- parameters:begin -->", "<!-- parameters:end -->"

YAML_HEAD = """\
# Parameters of the perception node with their defaults; copy the lines that you change, and start with
#   ros2 launch glesam_ros perception.launch.py params_file:=my.yaml
# Made from glesam_ros/settings.py by scripts/generate_parameters.py.
/**:
  ros__parameters:
"""
TABLE_HEAD = "| Parameter | Default | Values | Live | Meaning |\n|---|---|---|---|---|\n"


def plain(value: Any) -> str:
    """A value as YAML and JSON both read it; strings are quoted, so `off` stays a string."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def yaml_text() -> str:
    """config/perception.yaml, whole."""
    lines = []
    for name in settings.names():
        spec = settings.spec(name)
        lines.append(f"    # {spec.help}")
        facts = [values] if (values := spec.values_in_words(settings.default(name))) else []
        facts += ["only at start"] if spec.read_only else []
        if facts:
            lines.append(f"    # ({'; '.join(facts)})")
        lines.append(f"    {name}: {plain(settings.default(name))}")
    return YAML_HEAD + "\n".join(lines) + "\n"


def table_text() -> str:
    """The table of the README, between the markers."""
    rows = ""
    for name in settings.names():
        spec = settings.spec(name)
        live = "at start" if spec.read_only else "live"
        default = settings.default(name)
        rows += f"| `{name}` | `{plain(default)}` | {spec.values_in_words(default)} | {live} | {spec.help} |\n"
    return TABLE_HEAD + rows


def readme_text(readme: str) -> str:
    """`readme` with the table between its markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f"README.md: expected {BEGIN} and {END} once each, in this order; put the markers back")
    return f"{before}{BEGIN}\n{table_text()}{END}{after}"


def main() -> int:
    """Write, or with --check compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing, exit with 1 on a difference")
    check = parser.parse_args().check
    expected = {YAML: yaml_text(), README: readme_text(README.read_text(encoding="utf-8"))}
    stale = [p for p, text in expected.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} differs from glesam_ros/settings.py; run {Path(__file__).name}")
        else:
            path.write_text(expected[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
