"""`--help` of the executables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: the executables are nodes")

from glesam_ros import settings  # noqa: E402
from glesam_ros.ros import demo_camera, usage  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def printed(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""  # a node would have logged
    return done.stdout


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_node_explains_every_parameter_and_does_not_start(flag: str) -> None:
    text = printed("glesam_ros.ros", flag, "--ros-args", "-p", "model:=nano")
    assert text.startswith("usage: ros2 run glesam_ros perception_node ")
    assert re.findall(r"^  (\w+) \(", text, re.MULTILINE) == list(settings.names())
    assert '  enhancement (off, always, auto; default: "auto")\n' in text
    assert "  max_instances (1 .. " in text and "  compressed (true, false; default: false)\n" in text
    words = " ".join(text.split())
    for name in settings.names():
        assert " ".join(settings.spec(name).help.split()) in words
    assert max(map(len, text.splitlines())) <= 120


def test_the_demo_camera_explains_every_parameter_and_does_not_start() -> None:
    text = printed("glesam_ros.ros.demo_camera", "--help")
    assert text.startswith("usage: ros2 run glesam_ros demo_camera ")
    assert re.findall(r"^  (\w+) \(", text, re.MULTILINE) == list(demo_camera.PARAMETERS)
    assert "  rate (0.1 .. 120.0; default: 30.0)\n" in text


def test_what_is_for_ros_asks_for_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage.is_asked(["-h"]) and usage.is_asked(["x", "--help", "--ros-args"])
    assert not usage.is_asked(["--ros-args", "-p", "frame_id:=x", "--help"]) and not usage.is_asked([])
    monkeypatch.setattr(sys, "argv", ["perception_node", "--help"])
    assert usage.is_asked(None)
    monkeypatch.setattr(sys, "argv", ["--help", "--ros-args"])  # the program's own name is no argument
    assert not usage.is_asked(None)
