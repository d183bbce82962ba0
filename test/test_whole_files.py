"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from glesam_ros.whole_files import PART, write_bytes, write_text, write_together, write_whole


def test_the_folder_is_made_and_the_result_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    assert write_whole(path, lambda beside: beside.write_text("new")) == 3
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    write_text(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"


@pytest.mark.parametrize("sync", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def half(beside: Path) -> None:
        assert beside.parent == tmp_path and beside != path
        beside.write_text("n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half, sync=sync)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in its order: bytes of a file, the folder, or the name that a file gets."""
    noted: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(opened: int) -> None:
        noted.append("folder" if stat.S_ISDIR(os.fstat(opened).st_mode) else f"{os.fstat(opened).st_size} bytes")
        fsync(opened)

    def noted_replace(source: Path, target: Path) -> None:
        noted.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return noted


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_at_the_end(tmp_path: Path, steps: list[str]) -> None:
    write_bytes(tmp_path / "x", b"12345")
    assert steps == ["5 bytes", "name x", "folder"]
    steps.clear()
    write_bytes(tmp_path / "x", b"1", sync=False)
    assert steps == ["name x"]


def test_of_files_that_belong_together_all_are_on_the_disk_before_the_first_has_its_name(
    tmp_path: Path, steps: list[str]
) -> None:
    files = {name: lambda path, text=text: path.write_text(text) for name, text in (("z", "1"), ("a", "22"))}
    write_together(tmp_path / "new", files, lambda: steps.append("clear"))
    # what tells that all are there, the last that was given, gets its name last
    assert steps == ["1 bytes", "2 bytes", "clear", "name z", "name a", "folder"]


def test_what_a_kill_left_of_a_file_of_one_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.with_name(f"x{PART}").write_text("a longer half of a file")
    write_bytes(path, b"new", is_shared=False)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_processes_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    other = (
        "import pathlib, sys; from glesam_ros.whole_files import write_text; "
        "write_text(pathlib.Path(sys.argv[1]), 'b')"
    )

    def write(beside: Path) -> None:
        beside.write_text("a")
        subprocess.run([sys.executable, "-c", other, str(path)], check=True)
        assert path.read_text() == "b" and beside.suffix == PART

    write_whole(path, write)
    assert path.read_text() == "a" and list(tmp_path.iterdir()) == [path]


def test_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    """Nor do those of two containers, whose processes may have the same number."""
    path = tmp_path / "x"

    def write(beside: Path) -> None:
        beside.write_text("a")
        write_bytes(path, b"b")
        assert beside.read_text() == "a"

    write_whole(path, write)
    assert path.read_text() == "a" and list(tmp_path.iterdir()) == [path]


def test_files_that_belong_together_take_the_place_of_others_when_all_are_written(tmp_path: Path) -> None:
    old, steps = tmp_path / "old", []
    old.write_text("old")

    def clear() -> None:
        steps.append(sorted(path.name for path in tmp_path.iterdir()))
        old.unlink()

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_together(tmp_path, {"a": lambda path: path.write_text("1"), "b": full}, clear)
    assert list(tmp_path.iterdir()) == [old] and not steps
    write_together(tmp_path, {name: lambda path: path.write_text("2") for name in "ab"}, clear)
    assert steps == [[f"a{PART}", f"b{PART}", "old"]]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "2", "b": "2"}
