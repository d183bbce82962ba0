"""The package as pip and colcon install it."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

import glesam_ros
from glesam_ros.cli.main import OPTIONAL, TRAIN

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("package.xml", "setup.py", "setup.cfg", "pyproject.toml", "colcon.pkg")
FOLDERS = ("glesam_ros", "resource", "launch", "config")
WEIGHTS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("glesam_ros/models/weights/*") if p.suffix != ".md")
SCRIPTS = {"glesam", "perception_node", "demo_camera"}


def run(*command: str, **options) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def copy_sources(to: Path) -> Path:
    """The package's sources without what git ignores, so that a build leaves nothing in the repository."""
    to.mkdir(parents=True)
    for name in SOURCES:
        shutil.copy(ROOT / name, to)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip in this environment")
    out = tmp_path_factory.mktemp("wheel")
    source = copy_sources(out / "source")
    offline = ["--no-build-isolation"] if _builds_wheels() else []
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *offline, "--wheel-dir", str(out), str(source))
    [path] = out.glob("*.whl")
    return path


def _builds_wheels() -> bool:
    """Whether this environment's setuptools makes wheels by itself; else pip fetches a newer one."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) > 70
    except importlib.metadata.PackageNotFoundError:
        return False


def test_version_is_the_same_everywhere(wheel):
    declared = ElementTree.parse(ROOT / "package.xml").findtext("version")
    assert declared == glesam_ros.__version__
    assert wheel.name.startswith(f"glesam_ros-{declared}-py3-none-any")


def test_wheel_has_weights_photographs_launch_and_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    share = f"glesam_ros-{glesam_ros.__version__}.data/data/share"
    assert len(WEIGHTS) >= 4
    assert set(WEIGHTS) <= names
    shared = [p.relative_to(ROOT) for folder in ("launch", "config") for p in (ROOT / folder).glob("*.*")]
    assert {f"{share}/glesam_ros/{path}" for path in shared} <= names
    assert f"{share}/ament_index/resource_index/packages/glesam_ros" in names
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("glesam_ros/**/*.jpg")} <= names
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("glesam_ros/training/**/*.yaml")} <= names
    assert "glesam_ros/py.typed" in names


def test_wheel_is_small(wheel):
    # 20 MB of weights of nano at most, 7 of rass-nano, some photographs, text; they compress a little
    assert wheel.stat().st_size < 27e6


def test_every_module_ships(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("glesam_ros/**/*.py")} <= names


def requirements(wheel: Path) -> dict[str, set[str]]:
    """Names of the distributions that each extra asks for; those of the package itself under ""."""
    text = zipfile.ZipFile(wheel).read(f"glesam_ros-{glesam_ros.__version__}.dist-info/METADATA").decode()
    found: dict[str, set[str]] = {name: set() for name in ("", *re.findall(r"^Provides-Extra: (.+)$", text, re.M))}
    for line in re.findall(r"^Requires-Dist: (.+)$", text, re.M):
        extra = re.search(r"extra == ['\"](.+?)['\"]", line)
        found[extra[1] if extra else ""].add(re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"))
    return found


def test_the_extra_glesam_has_every_import_of_the_full_size_models(wheel):
    files = [file for room in ("glesam", "rass") for file in ROOT.glob(f"glesam_ros/models/{room}/*.py")]
    nodes = [n for f in files for n in ast.walk(ast.parse(f.read_text()))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"glesam_ros"}
    assert {"torch", "diffusers", "peft", "segment_anything", "sam2"} <= tops
    found = requirements(wheel)
    names = {{"cv2": "opencv-python-headless"}.get(top, top.replace("_", "-")) for top in tops}
    # sam2 is no requirement: to build it, pip would download a second torch
    assert names - found[""] - found["glesam"] == {"sam2"}
    assert "--no-build-isolation sam2" in (ROOT / "scripts/setup.sh").read_text()


def test_a_missing_package_is_named_with_an_extra_that_has_it(wheel):
    found = requirements(wheel)
    names = {"yaml": "pyyaml", "PIL": "pillow"}
    for module, hint in OPTIONAL.items():
        if extra := re.fullmatch(r"pip install 'glesam_ros\[(\w+)\]'", hint):
            assert names.get(module, module).replace("_", "-") in found[extra[1]], module
    assert "torch" in found[re.fullmatch(r"pip install 'glesam_ros\[(\w+)\]'", TRAIN)[1]]
    asked = re.search(r"setup\.sh (.+)", (ROOT / "scripts/test.sh").read_text())[1].split()
    assert set(asked) <= set(found) and "glesam" in asked


def test_console_scripts_exist_and_point_at_functions(wheel):
    text = zipfile.ZipFile(wheel).read(f"glesam_ros-{glesam_ros.__version__}.dist-info/entry_points.txt").decode()
    parser = configparser.ConfigParser()
    parser.read_string(text)
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == SCRIPTS
    for target in scripts.values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_pip_puts_glesam_into_bin(wheel, tmp_path):
    options = ("--no-deps", "--no-index", "--ignore-installed", "--prefix", str(tmp_path))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel))
    [site] = {p.parent.parent for p in tmp_path.rglob("glesam_ros/__init__.py")}
    # setup.cfg names lib/glesam_ros for colcon; pip must not follow it
    assert SCRIPTS <= {p.name for p in (tmp_path / "bin").iterdir()}
    environment = {**os.environ, "PYTHONPATH": str(site)}
    said = run(str(tmp_path / "bin/glesam"), "--version", env=environment, cwd=tmp_path)
    assert said.split() == ["glesam", glesam_ros.__version__]


@pytest.fixture(scope="module")
def install(tmp_path_factory) -> Path:
    """The install folder of `colcon build`."""
    needed = ("colcon_core", "colcon_metadata", "colcon_ros")
    missing = [m for m in needed if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(
            f"needs {' and '.join(missing)}: pip install colcon-ros colcon-metadata, "
            "or apt: python3-colcon-common-extensions"
        )
    workspace = tmp_path_factory.mktemp("workspace")
    copy_sources(workspace / "src" / "glesam_ros")
    output = run(sys.executable, "-m", "colcon", "build", cwd=workspace)
    assert "Finished <<< glesam_ros" in output
    return workspace / "install"


def test_colcon_makes_an_ament_prefix(install):
    prefix = install / "glesam_ros"
    assert {p.name for p in (prefix / "lib/glesam_ros").iterdir() if os.access(p, os.X_OK)} >= SCRIPTS
    assert (prefix / "share/glesam_ros/package.xml").is_file()
    assert (prefix / "share/glesam_ros/launch/perception.launch.py").is_file()
    [site] = {p.parent.parent for p in prefix.rglob("glesam_ros/models/__init__.py")}
    assert {p.name for p in site.glob("models/weights/*")} >= {Path(w).name for w in WEIGHTS}


def test_ament_index_finds_the_package_in_a_sourced_workspace(install):
    pytest.importorskip("ament_index_python", reason="needs ament_index_python (scripts/setup.sh, or a sourced ROS 2)")
    program = "import ament_index_python as a; print(a.get_package_share_directory('glesam_ros'))"
    shell = f'. "{install}/setup.sh"; command -v glesam; "{sys.executable}" -c "{program}"'
    glesam, share = run("sh", "-c", shell).split()
    assert Path(glesam) == install / "glesam_ros/lib/glesam_ros/glesam"
    assert Path(share) == install / "glesam_ros/share/glesam_ros"


def test_manifest_is_valid():
    package = pytest.importorskip("catkin_pkg.package", reason="needs catkin_pkg (comes with colcon-ros)")
    manifest, warnings = package.parse_package(str(ROOT)), []
    manifest.validate(warnings=warnings)
    assert warnings == []
    assert (manifest.package_format, manifest.get_build_type()) == (3, "ament_python")
    assert manifest.licenses == ["Apache-2.0"]
