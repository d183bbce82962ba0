"""Checks an LQSeg data set on disk against its manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from glesam_ros.checksum import sha256
from glesam_ros.datasets import LQSEG_MANIFEST, read_lqseg_info
from glesam_ros.lqseg.build import FOLDERS, Track


def verify(folder: Path, track: Track = lambda items, total: items) -> list[str]:
    """Everything that is wrong, a line each; empty when each file has its checksum and no other file is there.

    Raises:
        FileNotFoundError: `folder` holds no data set.
        ValueError: its dataset.json cannot be read, or its build was not finished.
    """
    info = read_lqseg_info(folder)
    manifest = (folder / LQSEG_MANIFEST).read_bytes()
    problems: list[str] = []
    if hashlib.sha256(manifest).hexdigest() != info.get("manifest_sha256"):
        problems.append(f"{LQSEG_MANIFEST}: changed since the build")
    checksums: dict[str, str] = {}
    for number, line in enumerate(manifest.splitlines(), 1):
        try:
            checksums |= {name: file["sha256"] for name, file in json.loads(line)["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{LQSEG_MANIFEST}: line {number} cannot be read")
    for name, checksum in track(checksums.items(), len(checksums)):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256(path) != checksum:
            problems.append(f"{name}: changed, its checksum differs")
    present = {p.relative_to(folder).as_posix() for top in FOLDERS for p in (folder / top).rglob("*") if p.is_file()}
    return problems + [f"{name}: not in the manifest" for name in sorted(present - checksums.keys())]
