"""Model files from where they are published to `catalogue.home()`: resumed, verified, never half there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glesam_ros import __version__
from glesam_ros.models.glesam.catalogue import (
    BASES,
    CONFIG_FILE,
    DECODER_FILE,
    LORA_FILE,
    RELEASED,
    RELEASED_DECODER,
    UNETS,
    Source,
    split_name,
)

CHECKSUMS = "checksums.json"
"""SHA-256 of each file as it first came; nobody publishes them, so this is what later copies are held against."""
CHUNK = 1 << 20
TIMEOUT_S = 60
PROMPT_FILE = "empty_prompt.safetensors"
"""What a text encoder says of the empty prompt; once it is there, the text encoder is not needed."""
GAMMAS = {"sd21-base": 5.0, "sd15": 3.0}
"""FDA scale of the released weights: of the paper and the README, and of the demo script for SD 1.5."""
WIDTHS = {1024: "sd21-base", 768: "sd15"}
"""Width of the text embedding to the diffusion model that has it."""

Progress = Callable[[int], Any]
"""Takes the number of bytes that came."""


class DownloadError(OSError):
    """A file could not be downloaded, or is not the one that is expected."""


def fetch(source: Source, folder: Path, started: Callable[[str, int | None, int], Progress]) -> Path:
    """Download a file, or go on with a part of it that is there from before.

    Args:
        folder: `catalogue.home()`.
        started: called with the name, the size in bytes if it is known, and the bytes that are there already; what it
            returns is called with the size of each piece that comes.

    Raises:
        DownloadError: the server refuses, the connection breaks (the part stays, the same call goes on), the size or
            the checksum is another.
    """
    path = folder / source.path
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"User-Agent": f"glesam_ros/{__version__}", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(source.url, headers=headers), timeout=TIMEOUT_S) as answer:
            resumed = answer.status == 206
            have = have if resumed else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else source.size
            if source.size is not None and total != source.size:
                raise DownloadError(f"{source.url}: expected {source.size} bytes, the server has {total}")
            moved = started(path.name, total, have)
            with partial.open("ab" if resumed else "wb") as file:
                while piece := answer.read(CHUNK):
                    file.write(piece)
                    moved(len(piece))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is no part of what the server has
            partial.unlink()
            raise DownloadError(f"{source.url}: a part from before did not fit and was removed; try again") from error
        raise DownloadError(
            f"{source.url}: expected the file, the server answered {error.code} {error.reason}; "
            "get it by hand and name it with --from"
        ) from error
    except DownloadError:
        raise
    except (OSError, ValueError) as error:  # URLError, time-outs, broken connections
        raise DownloadError(f"{source.url}: {error}; the same command goes on where it stopped") from error
    size = partial.stat().st_size
    if total is not None and size != total:
        raise DownloadError(f"{source.url}: got {size} of {total} bytes; the same command goes on where it stopped")
    found = sha256(partial)
    if _checksums(folder).get(source.path, found) != found:
        raise DownloadError(
            f"{partial}: expected SHA-256 {_checksums(folder)[source.path]}, as {source.path} had at first, got "
            f"{found}; if the new one is right, remove the entry from {folder / CHECKSUMS}"
        )
    _place(partial, path, folder, found)
    return path


def take(file: Path, path: Path, folder: Path) -> None:
    """Copy a local file, which the user vouches for, into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path) as partial:
        shutil.copyfile(file, partial)
        _place(partial, path, folder, sha256(partial))


def _place(file: Path, path: Path, folder: Path, checksum: str) -> None:
    os.replace(file, path)
    _write_json(folder / CHECKSUMS, {**_checksums(folder), path.relative_to(folder).as_posix(): checksum})


def verify(folder: Path) -> Iterator[tuple[str, str]]:
    """Each recorded file with "ok", "missing" or "changed"."""
    for name, expected in sorted(_checksums(folder).items()):
        path = folder / name
        yield name, "missing" if not path.is_file() else "ok" if sha256(path) == expected else "changed"


def sha256(path: Path) -> str:
    """Checksum in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def needed(name: str, folder: Path) -> list[Source]:
    """The files of a model, as far as they are known: those of the diffusion model once the enhancer is there.

    Raises:
        ValueError: unknown name.
    """
    base, enhancer = split_name(name)
    files = [BASES[base].source]
    if enhancer is None:
        return files
    config = folder / name / CONFIG_FILE
    if not config.is_file():
        return [*files, *RELEASED.get(name, ())]
    about = json.loads(config.read_text(encoding="utf-8"))
    return files if about["kind"] == "small" else [*files, *unet_files(about["unet"], folder)]


def unet_files(unet: str, folder: Path) -> list[Source]:
    """Files of a diffusion model; without the text encoder where the empty prompt is embedded already."""
    there = (folder / unet / PROMPT_FILE).is_file()
    return [source for source in UNETS[unet] if not there or source.path.startswith(f"{unet}/unet/")]


def adopt(name: str, folder: Path) -> None:
    """Make released GleSAM weights, LoRA and fine-tuned decoder in the folder `name`, a model of ours.

    Which diffusion model the LoRA is of shows in its shapes. The decoder is taken out of the state dict of SAM that it
    is published in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: they are no such files.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from glesam_ros.models.glesam.weights import decoder_state, read_tensors

    own = folder / name
    lora = own / LORA_FILE
    if not lora.is_file():
        raise FileNotFoundError(f"expected LoRA weights at {lora}, found no file")
    with safe_open(lora, "np") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    keys = [shape for key, shape in shapes.items() if "attn2.to_k." in key and ("down" in key or "lora_A" in key)]
    ranks, widths = {shape[0] for shape in keys}, {shape[1] for shape in keys}
    if len(ranks) != 1 or len(widths) != 1 or not widths <= set(WIDTHS):
        raise ValueError(
            f"{lora}: expected LoRA of one rank for text embeddings of 768 or 1024, got ranks {ranks}, widths {widths}"
        )
    unet = WIDTHS[widths.pop()]
    decoder = decoder_state(read_tensors(own / RELEASED_DECODER))
    with _partial(own / DECODER_FILE) as partial:
        save_file({key: value.contiguous() for key, value in decoder.items()}, partial)
        os.replace(partial, own / DECODER_FILE)
    rank = ranks.pop()
    _write_json(own / CONFIG_FILE, {
        "base": split_name(name)[0], "kind": "lora", "unet": unet, "gamma": GAMMAS[unet], "timestep": 1, "rank": rank,
        "alpha": rank, "levels": False, "channels": 256,
    })


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with _partial(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is left under it at the end is removed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
