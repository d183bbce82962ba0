"""Files that are there whole or not at all: written beside, brought to the disk, then given their name."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

PART = ".part"
"""Ending of a file that is being written."""

Result = TypeVar("Result")


def write_whole(
    path: Path, write: Callable[[Path], Result], *, sync: bool = True, is_shared: bool = True
) -> Result:
    """Let `write` fill a file beside `path`, which then takes its name; makes the folder.

    Whatever ends it, an error, a kill or a computer that is switched off: the old file is there, or the new one.

    Args:
        write: gets the path to write to; what it leaves there when it fails is removed.
        sync: wait for the disk. Of thousands of small files, which can be made again, each would take longer to reach
            it than to be made; without, all holds but for the computer that is switched off.
        is_shared: several processes may write the file at once. Where that cannot be, the name of the file beside is
            the same each time, so that the next try overwrites what a kill left.

    Returns:
        What `write` returned.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not the process: those of two containers may have the same number
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}" if is_shared else path.name + PART)
    try:
        result = write(beside)
        if sync:
            bring_to_disk(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if sync:
        bring_to_disk(path.parent)
    return result


def write_together(folder: Path, files: Mapping[str, Callable[[Path], Any]], clear: Callable[[], Any]) -> None:
    """Write files that belong together, in place of others; makes the folder.

    Until all are written beside, nothing changes: a full disk costs nothing. What tells that all are there comes last.

    Args:
        folder: gets them; one process writes there at a time.
        files: by name, in the order in which they get it, what writes each to the path that it is given.
        clear: takes the others away, when all is written and before the first has its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f"{name}{PART}" for name in files}
    try:
        for name, write in files.items():
            write(beside[name])
            bring_to_disk(beside[name])
        clear()
        for name, path in beside.items():
            os.replace(path, folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
    bring_to_disk(folder)


def write_bytes(path: Path, content: bytes, *, sync: bool = True, is_shared: bool = True) -> None:
    """As `write_whole`, of bytes."""
    write_whole(path, lambda beside: beside.write_bytes(content), sync=sync, is_shared=is_shared)


def write_text(path: Path, content: str) -> None:
    """As `write_whole`, of text in UTF-8."""
    write_bytes(path, content.encode())


def bring_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def lock(opened: int, wait: bool = False) -> bool:
    """Lock an open file or folder against other processes until it is closed, as also the end of a process does.

    Args:
        opened: its descriptor.
        wait: until another lets go.

    Returns:
        False where another has it. A file system that cannot lock, as NFS may not, is as if nobody had it.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
