"""The arrows of docs/design.md, read from the imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "glesam_ros"
ROS_PACKAGES = {
    "rclpy", "sensor_msgs", "std_msgs", "std_srvs", "geometry_msgs", "vision_msgs", "diagnostic_msgs", "lifecycle_msgs",
    "rcl_interfaces", "ament_index_python", "launch", "launch_ros",
}


class Room:
    """One row of the table: its names, its paths, and the words of what it may import."""

    def __init__(self, row: str) -> None:
        names, paths, _, allowed = (cell.strip() for cell in row.strip().strip("|").split("|"))
        self.names = names.split(", ")
        self.paths = [p if p.startswith("glesam_ros/") else f"glesam_ros/{p}" for p in re.findall(r"`([^`]+)`", paths)]
        self.allowed = re.split(r",\s*", allowed)

    def holds(self, path: str) -> bool:
        return any(path == p or (p.endswith("/") and path.startswith(p)) for p in self.paths)


def rooms() -> list[Room]:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("## Rooms and who may import whom")[1].split("\n## ")[0]
    return [Room(line) for line in table.splitlines() if line.startswith("|") and "`" in line]


ROOMS = rooms()


def reachable(room: Room) -> set[str]:
    """Names of the rooms that `room` may import: those its row names, what those may import, and itself."""
    if "everything" in room.allowed:
        return {name for r in ROOMS for name in r.names}
    named = [r for r in ROOMS if set(r.names) & set(room.allowed)]
    return set(room.names).union(*(reachable(r) for r in named))


def room_of(path: str) -> Room:
    found = [r for r in ROOMS if r.holds(path)]
    assert len(found) == 1, f"{path}: expected one room of docs/design.md to hold it, got {[r.names for r in found]}"
    return found[0]


def imports(file: Path) -> set[str]:
    """Dotted names of all imported modules, also of imports inside functions; names of `from x import y` as x.y."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: expected absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def path_of(name: str) -> str:
    """File, relative to the repository, of the module in which the dotted `name` of ours lies."""
    parts = name.split(".")
    while parts:
        base = ROOT.joinpath(*parts)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file.relative_to(ROOT).as_posix()
        parts.pop()
    raise AssertionError(f"{name}: expected a module of the package")


FILES = sorted(p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py"))


def test_the_plan_was_read() -> None:
    known = {name for room in ROOMS for name in room.names}
    assert {"settings", "models", "pipeline", "ros", "cli", "degradation", "training"} <= known
    assert "training" not in reachable(room_of("glesam_ros/ros/node.py"))
    assert reachable(room_of("glesam_ros/settings.py")) == {"settings"}


@pytest.mark.parametrize("file", FILES)
def test_arrows(file: str) -> None:
    if file == "glesam_ros/__init__.py":
        may = reachable(room_of("glesam_ros/pipeline.py"))  # the front door shows the pipeline, nothing else
    else:
        may = reachable(room_of(file))
    for name in imports(ROOT / file):
        if name.split(".")[0] != "glesam_ros" or name == "glesam_ros.__version__":  # a number, no room's work
            continue
        target = path_of(name)
        # what the front door shows comes from the pipeline
        room = room_of("glesam_ros/pipeline.py" if target == "glesam_ros/__init__.py" else target)
        assert set(room.names) <= may, f"{file} imports {name}: the plan allows {sorted(may)}"


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_stay_in_their_rooms(file: str) -> None:
    top = {name.split(".")[0] for name in imports(ROOT / file)}
    with_torch = (
        "glesam_ros/training/", "glesam_ros/evaluation/", "glesam_ros/models/glesam/", "glesam_ros/models/rass/",
        "glesam_ros/models/nano_net.py", "glesam_ros/models/rass_nano_net.py",
    )
    if not file.startswith(with_torch):
        assert not top & {"torch", "torchvision"}, f"{file}: torch belongs to {with_torch}"
        modules = {name.rsplit(".", 1)[0] for name in imports(ROOT / file)}
        assert not modules & {"glesam_ros.models.nano_net", "glesam_ros.models.rass_nano_net"}
    if not file.startswith(("glesam_ros/ros/", "glesam_ros/cli/")):
        assert not top & ROS_PACKAGES, f"{file}: ROS belongs to glesam_ros/ros"


def evaluated(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of annotations, which nothing evaluates (`from __future__ import annotations`)."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from evaluated(child)


@pytest.mark.parametrize("file", FILES)
def test_types_of_arrays_are_made_as_the_numpy_of_humble_can(file: str) -> None:
    """Ubuntu 22.04 has numpy 1.21, where numpy.typing.NDArray can be subscripted, np.ndarray and np.dtype cannot."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in evaluated(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            assert node.value.attr not in ("ndarray", "dtype"), f"{file}:{node.lineno}: expected NDArray[...]"


def test_import_is_light() -> None:
    modules = "print(' '.join({m.split('.')[0] for m in sys.modules}))"
    code = f"import sys, glesam_ros.overlay, glesam_ros.semantic; {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "glesam_ros" in loaded
    assert not loaded & (ROS_PACKAGES | {"torch", "onnxruntime", "rosbags", "pycocotools"})


@pytest.mark.parametrize("module, given, expected", [
    ("glesam_ros.ros", None, "1"), ("glesam_ros.cli", None, "1"), ("glesam_ros.ros", "4", "4"),
    ("glesam_ros.cli", "4", "4"), ("glesam_ros", None, "None"),  # the library leaves it to the program
])
def test_programs_keep_openblas_on_one_thread_before_numpy_is_there(
    module: str, given: str | None, expected: str
) -> None:
    said = f"import os, sys, {module}; print(os.environ.get('OPENBLAS_NUM_THREADS'), 'numpy' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    if given:
        environment["OPENBLAS_NUM_THREADS"] = given
    done = subprocess.run([sys.executable, "-c", said], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [expected, "False"], done.stderr
