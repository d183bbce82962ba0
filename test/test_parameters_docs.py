"""config/perception.yaml, the README table, the launch file and `Settings` say the same."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from glesam_ros import settings
from glesam_ros.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
YAML = "config/perception.yaml"


def generate(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts/generate_parameters.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that the generator reads and writes, to be spoiled."""
    for name in ("scripts/generate_parameters.py", YAML, "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "glesam_ros").symlink_to(ROOT / "glesam_ros")
    return tmp_path


def test_yaml_and_readme_are_up_to_date():
    done = generate(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [YAML, "README.md"])
def test_a_changed_default_is_found_and_mended(copy, name):
    file = copy / name
    original = file.read_text()
    number = str(settings.default("max_frame_age_ms"))
    # the table's row in the README, the value's own line in the YAML
    lines = original.splitlines(keepends=True)
    starts = ("max_frame_age_ms:", "| `max_frame_age_ms`")
    [row] = [k for k, line in enumerate(lines) if line.lstrip().startswith(starts)]
    assert number in lines[row]
    lines[row] = lines[row].replace(number, "123")
    file.write_text("".join(lines))
    done = generate(copy, "--check")
    assert done.returncode == 1 and done.stdout.startswith(name)
    assert generate(copy).returncode == 0
    assert file.read_text() == original


def test_missing_markers_are_refused(copy):
    (copy / "README.md").write_text("# no table\n")
    done = generate(copy)
    assert done.returncode != 0 and "put the markers back" in done.stderr


def test_yaml_holds_every_default_in_its_own_type():
    [(wildcard, content)] = yaml.safe_load((ROOT / YAML).read_text()).items()
    values = content["ros__parameters"]
    expected = dataclasses.asdict(Settings())
    expected["cameras"] = list(expected["cameras"])
    assert wildcard == "/**"
    assert values == expected
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in expected.items()}


def test_readme_has_one_row_for_each_parameter_and_nothing_else():
    table = (ROOT / "README.md").read_text().split("<!-- parameters:begin -->")[1].split("<!-- parameters:end -->")[0]
    rows = [line.split("|")[1].strip(" `") for line in table.strip().splitlines()[2:]]
    assert rows == list(settings.names())


def test_ros_reads_the_yaml_as_the_defaults():
    pytest.importorskip("rclpy", reason="needs rclpy (scripts/setup.sh, or a sourced ROS 2)")
    program = (
        "import rclpy; from rclpy.node import Node; from glesam_ros.ros import parameters\n"
        "rclpy.init(); print(parameters.declare(Node('perception', namespace='/anywhere')) == parameters.Settings())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--ros-args", "--params-file", str(ROOT / YAML)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": _path()},
    )
    assert done.stdout.strip() == "True", done.stdout + done.stderr


def _path() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
