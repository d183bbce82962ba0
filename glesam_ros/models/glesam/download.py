"""Model files from where they are published to `catalogue.home()`: resumed, verified, never half there."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros import __version__
from glesam_ros.checksum import sha256
from glesam_ros.models.glesam.catalogue import (
    BASES,
    CONFIG_FILE,
    DECODER_FILE,
    LORA_FILE,
    PROMPT_FILE,
    RASS_FILE,
    RELEASED,
    RELEASED_DECODER,
    SCR_FILE,
    SYSTEM_SD,
    SYSTEMS,
    TEXT_WIDTHS,
    UNETS,
    VAES,
    Source,
    split_name,
)
from glesam_ros.whole_files import lock, write_text, write_together, write_whole

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUMS = "checksums.json"
"""SHA-256 of each file as it first came; where none is published, later copies are held against it."""
TAG = "X-Linked-Etag"
"""Header in which the Hugging Face hub names the SHA-256 of a large file."""
CHUNK = 1 << 20
BYTES_SHOWN = 40
"""Of an answer that is not the file, for the error."""
TIMEOUT_S = 60
GAMMAS = {"sd21-base": 5.0, "sd15": 3.0}
"""FDA scale of the released weights: that of the demo script for SD 1.5; for SD 2.1 none is named, 5 is that of the
paper and of the training scripts."""
LORA_OF_TEXT = tuple(f".attn2.to_k.{name}.weight" for name in ("lora.down", "lora_A", "lora_A.default"))
"""Ends the names of the matrices that read the text embedding: (rank, width of the embedding)."""
WIDTHS = {width: unet for unet, width in TEXT_WIDTHS.items()}
"""Width of the embedded text to the diffusion model that takes it."""

Progress = Callable[[int], Any]
"""Takes the number of bytes that came."""


class DownloadError(OSError):
    """A file could not be downloaded, or is not the one that is expected."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; keeps the SHA-256 that the Hugging Face hub names on the way to a large file."""

    sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        self.sha256 = self.sha256 or named_sha256(headers.get(TAG))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def named_sha256(tag: str | None) -> str | None:
    """The SHA-256 in the header `TAG`; that of a small file is another checksum."""
    found = re.fullmatch('(?:W/)?"?([0-9a-f]{64})"?', tag or "")
    return found and found[1]


def fetch(source: Source, folder: Path, started: Callable[[str, int | None, int], Progress]) -> Path:
    """Download a file, or go on with a part of it that is there from before.

    Args:
        folder: `catalogue.home()`.
        started: called with the name, the size in bytes if it is known, and the bytes that are there already; what it
            returns is called with the size of each piece that comes.

    Raises:
        DownloadError: no program gets this file, the server refuses, the connection breaks (the part stays, the same
            call goes on), there is not enough space, the size or the checksum is another or, where none is published,
            something else came, such as a page (the part is removed); or another process downloads it just now.
    """
    path = folder / source.path
    if path.is_file():
        return path
    if source.by_hand:
        raise DownloadError(f"{source.path}: get it by hand from {source.url} and name it with --from")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with _alone(source, partial):
        if not path.is_file():  # the other may have ended since
            _complete(source, path, partial, folder, started)
    return path


def _complete(
    source: Source, path: Path, partial: Path, folder: Path, started: Callable[[str, int | None, int], Progress]
) -> None:
    """Download what `partial` lacks, check it and give it its name."""
    named = _receive(source, partial, started)
    published, found = source.sha256 or named, sha256(partial)
    if published is None:
        _check_kind(source, partial)
    expected = published or _checksums(folder).get(source.path, found)
    if found != expected:
        partial.unlink()
        how = "try again" if published else (
            f"that is what it had the first time; if the new one is right, remove the entry from {folder / CHECKSUMS}"
        )
        raise DownloadError(f"{source.url}: expected SHA-256 {expected}, got {found}; {how}")
    os.replace(partial, path)
    _record(path, folder, found)


@contextmanager
def _alone(source: Source, partial: Path) -> Iterator[None]:
    """Hold `partial`, which is made for that: two downloads would write into each other's part.

    Raises:
        DownloadError: another process holds it.
    """
    while True:
        held = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock(held):
                raise DownloadError(f"{source.url}: another process downloads it to {partial}; wait for its end")
            # the one that held it may have renamed or removed it between our opening and our lock
            if not _is_at(partial, held):
                continue
            try:
                yield
            finally:
                if _is_at(partial, held) and not os.fstat(held).st_size:
                    partial.unlink()
            return
        finally:
            os.close(held)


def _is_at(path: Path, opened: int) -> bool:
    """Whether `path` is the file that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def _check_kind(source: Source, partial: Path) -> None:
    """Refuse what cannot be the file, before its checksum becomes the one that later copies are held against."""
    # by its format alone: who downloads may have no torch
    try:
        if source.path.endswith(".safetensors"):
            with partial.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > partial.stat().st_size:
                    raise ValueError(f"a header of {length} bytes")
                json.loads(file.read(length))
        elif source.path.endswith(".json"):
            json.loads(partial.read_text(encoding="utf-8"))
        elif source.path == SCR_FILE and not _is_checkpoint(partial):
            raise ValueError("no checkpoint of torch")
    except (ValueError, struct.error) as error:
        with partial.open("rb") as file:
            start = file.read(BYTES_SHOWN)
        size = partial.stat().st_size
        partial.unlink()
        raise DownloadError(
            f"{source.url}: expected {partial.stem}, got {size} bytes that begin with {start!r} and are none; "
            "get it by hand and name it with --from"
        ) from error


def _is_checkpoint(path: Path) -> bool:
    """Whether torch wrote it, as a ZIP file, or as pickles before 1.6."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(2) == b"\x80\x02"


def _receive(source: Source, partial: Path, started: Callable[[str, int | None, int], Progress]) -> str | None:
    """Bring `partial` to its full size; returns the SHA-256 that the server names."""
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"User-Agent": f"glesam_ros/{__version__}", **({"Range": f"bytes={have}-"} if have else {})}
    redirects = _Redirects()
    ask = urllib.request.build_opener(redirects).open
    try:
        with ask(urllib.request.Request(source.url, headers=headers), timeout=TIMEOUT_S) as answer:
            named = redirects.sha256 or named_sha256(answer.headers.get(TAG))
            resumed = answer.status == 206
            have = have if resumed else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else source.size
            if source.size is not None and total != source.size:
                partial.unlink(missing_ok=True)
                raise DownloadError(f"{source.url}: expected {source.size} bytes, the server has {total}")
            free = shutil.disk_usage(partial.parent).free
            if total is not None and free < total - have:
                raise DownloadError(
                    f"{source.url}: expected {total - have} bytes free in {partial.parent}, found {free}; "
                    "make room, or set GLESAM_HOME"
                )
            moved = started(source.path, total, have)
            with partial.open("ab" if resumed else "wb") as file:
                while piece := answer.read(CHUNK):
                    file.write(piece)
                    moved(len(piece))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return redirects.sha256 or named_sha256(error.headers.get(TAG))  # all of it was there already
        if error.code == 416:
            partial.unlink()
            raise DownloadError(f"{source.url}: a part from before did not fit and was removed; try again") from error
        raise DownloadError(
            f"{source.url}: expected the file, the server answered {error.code} {error.reason}; "
            "get it by hand and name it with --from"
        ) from error
    except DownloadError:
        raise
    except (OSError, ValueError, HTTPException) as error:  # URLError, time-outs, broken connections
        raise DownloadError(f"{source.url}: {error}; the same command goes on where it stopped") from error
    size = partial.stat().st_size
    if total is not None and size != total:
        raise DownloadError(f"{source.url}: got {size} of {total} bytes; the same command goes on where it stopped")
    return named


def take(file: Path, path: Path, folder: Path) -> str:
    """Copy a local file, which the user vouches for, into place; returns its SHA-256."""
    found = write_whole(path, lambda beside: _copied(file, beside))
    _record(path, folder, found)
    return found


def take_enhancer(source: Path, name: str, folder: Path) -> None:
    """Copy an enhancer, as `save_enhancer` writes it, to where the model `name` has it, in place of one there.

    Raises:
        ValueError: it is one of another base or of another kind, or a file is missing or cannot be read; the model that
            is there stays.
    """
    from glesam_ros.models.glesam.enhancer import load_config
    from glesam_ros.models.glesam.weights import read_tensors

    config, own = load_config(source), folder / name
    if name != config.model:
        raise ValueError(f"{source}: holds the enhancer of {config.model}, expected that of {name}")
    if source.resolve() == own.resolve():
        raise ValueError(f"{source}: is the folder of {name} already; nothing to copy")
    missing = [file for file in config.files if not (source / file).is_file()]
    if missing:
        raise ValueError(
            f"{source}: expected {', '.join(missing)} beside {CONFIG_FILE}, found none; take the folder {name} that "
            "glesam train wrote, whole"
        )
    files = sorted(source.glob("*.safetensors"))
    for file in files:
        read_tensors(file)  # refuses what is no file of tensors
    # glesam.json last: with it the model is there
    every = (*files, source / CONFIG_FILE)
    _exchange(own, folder, {file.name: functools.partial(shutil.copyfile, file) for file in every})


def take_released(source: Path, name: str, folder: Path) -> None:
    """Copy GleSAM weights, as their authors publish them, and make a model of them, see `adopt`.

    The decoder may have any name, if it is the only .pth file.

    Raises:
        ValueError: a file is missing, or they are no such files.
    """
    decoders = [file for file in [source / RELEASED_DECODER] if file.is_file()] or sorted(source.glob("*.pth"))
    if len(decoders) != 1:
        raise ValueError(
            f"{source}: expected released GleSAM weights, {LORA_FILE} and {RELEASED_DECODER} or one other .pth file, "
            f"found {', '.join(file.name for file in decoders) or 'no .pth file'}"
        )
    made = _adopted(name, source / LORA_FILE, decoders[0])
    published = {
        LORA_FILE: functools.partial(shutil.copyfile, source / LORA_FILE),
        RELEASED_DECODER: functools.partial(shutil.copyfile, decoders[0]),
    }
    _exchange(folder / name, folder, {**published, **made})


def take_system(source: Path, name: str, folder: Path) -> list[str]:
    """Copy what is trained of the system `name`: a file, or a folder with scr.pkl or rass.pth, or both.

    Args:
        source: a file that ends in .pkl is SCR's; any other file is that of the system itself.

    Returns:
        Paths below `folder` of what was copied; none where a folder has no such file.

    Raises:
        ValueError: it is no such file.
    """
    from glesam_ros.models.rass.scr import read_scr

    paths = [file.path for file in SYSTEMS[name]]
    if source.is_dir():
        files = {path: source / Path(path).name for path in paths if (source / Path(path).name).is_file()}
    else:
        files = {SCR_FILE if source.suffix == Path(SCR_FILE).suffix else paths[-1]: source}
    # both refuse what is none
    if SCR_FILE in files:
        read_scr(files[SCR_FILE])
    if RASS_FILE in files:
        from glesam_ros.models.rass.rass import read_rass

        read_rass(files[RASS_FILE])
    for path, file in files.items():
        if file.resolve() == (folder / path).resolve():
            raise ValueError(f"{file}: is the file of {name} already; nothing to copy")
        take(file, folder / path, folder)
    return list(files)


def _exchange(own: Path, folder: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """Put `files` in place of the enhancer in `own`, see `write_together`, and record their checksums."""
    write_together(own, files, clear=functools.partial(_clear, own, folder))
    found = {(own / name).relative_to(folder).as_posix(): sha256(own / name) for name in files}
    _change_checksums(folder, lambda known: {**known, **found})


def _clear(own: Path, folder: Path) -> None:
    """Take an enhancer away: files of the old one beside those of a new one would be read with them."""
    for file in (own / CONFIG_FILE, own / RELEASED_DECODER, *own.glob("*.safetensors")):
        file.unlink(missing_ok=True)
    start = f"{own.name}/"
    _change_checksums(folder, lambda known: {k: v for k, v in known.items() if not k.startswith(start)})


def _copied(file: Path, to: Path) -> str:
    """Copy a file; the SHA-256 of the copy."""
    shutil.copyfile(file, to)
    return sha256(to)


def _record(path: Path, folder: Path, checksum: str) -> None:
    _change_checksums(folder, lambda known: {**known, path.relative_to(folder).as_posix(): checksum})


def verify(folder: Path, name: str | None = None) -> Iterator[tuple[str, str]]:
    """Each file with "ok", "missing" or "changed", of all models or of the one `name`.

    Those that came by `fetch` or `take` are held against their record, others against what is published.
    """
    known = {
        source.path: source.sha256 for base in BASES.values() for source in [base.source]
        if source.sha256 and (folder / source.path).is_file()
    }
    known |= _checksums(folder)
    if name is not None:
        paths = [source.path for source in needed(name, folder)]
        known = {file: value for file, value in known.items() if file in paths or file.startswith(f"{name}/")}
    for file, expected in sorted(known.items()):
        path = folder / file
        yield file, "missing" if not path.is_file() else "ok" if sha256(path) == expected else "changed"


def needed(name: str, folder: Path) -> list[Source]:
    """The files of a model, as far as they are known, or of a diffusion model by its own name, with its autoencoder.

    Which diffusion model an enhancer needs shows once its `glesam.json` is there.

    Raises:
        ValueError: unknown name, or a `glesam.json` that is none.
    """
    if name in UNETS:
        return [*unet_files(name, folder), *VAES.get(name, ())]
    if name in SYSTEMS:
        return [*UNETS[SYSTEM_SD], *VAES[SYSTEM_SD], *SYSTEMS[name]]
    base, enhancer = split_name(name)
    files = [BASES[base].source]
    if enhancer is None:
        return files
    config = folder / name / CONFIG_FILE
    if not config.is_file():
        return [*files, *RELEASED.get(name, ())]
    try:
        about = json.loads(config.read_text(encoding="utf-8"))
        return files if about["kind"] == "small" else [*files, *unet_files(about["unet"], folder)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{config}: expected "kind" and "unet", as save_enhancer writes them: {error!r}') from error


def unet_files(unet: str, folder: Path) -> list[Source]:
    """Files of a diffusion model; without the text encoder where the empty prompt is embedded already."""
    there = (folder / unet / PROMPT_FILE).is_file()
    return [source for source in UNETS[unet] if not there or source.path.startswith(f"{unet}/unet/")]


def adopt(name: str, folder: Path) -> None:
    """Make released GleSAM weights, LoRA and fine-tuned decoder in the folder `name`, a model of ours.

    The decoder is taken out of the state dict of SAM that it is published in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: they are no such files.
    """
    own = folder / name
    for key, write in _adopted(name, own / LORA_FILE, own / RELEASED_DECODER).items():
        write(own / key)
    _record(own / DECODER_FILE, folder, sha256(own / DECODER_FILE))


def _adopted(name: str, lora: Path, decoder: Path) -> dict[str, Callable[[Path], Any]]:
    """By name, what writes each file that makes a model of released weights. Raises as `adopt`."""
    from glesam_ros.models.glesam.enhancer import write_tensors

    about, state = _released_parts(lora, decoder)
    config = {"base": split_name(name)[0], **about}
    return {DECODER_FILE: functools.partial(write_tensors, state), CONFIG_FILE: lambda path: _write_json(path, config)}


def _released_parts(lora: Path, decoder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`glesam.json` without the base, and the decoder; which diffusion model the LoRA is of shows in its shapes."""
    from safetensors import SafetensorError, safe_open

    from glesam_ros.models.glesam.weights import decoder_state, read_tensors

    if not lora.is_file():
        raise FileNotFoundError(f"expected LoRA weights at {lora}, found no file")
    try:
        with safe_open(lora, "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{lora}: expected a safetensors file, cannot read it: {error}") from error
    # endings: blocks of the U-Net are called down, too
    keys = [shape for key, shape in shapes.items() if key.endswith(LORA_OF_TEXT)]
    ranks, widths = {shape[0] for shape in keys}, {shape[1] for shape in keys}
    if len(ranks) != 1 or len(widths) != 1 or not widths <= set(WIDTHS):
        raise ValueError(
            f"{lora}: expected LoRA of one rank for text embeddings of 768 or 1024, got ranks {sorted(ranks)}, "
            f"widths {sorted(widths)}"
        )
    unet, rank = WIDTHS[widths.pop()], ranks.pop()
    about = {
        "kind": "lora", "unet": unet, "gamma": GAMMAS[unet], "timestep": 1, "rank": rank, "alpha": rank,
        "levels": False, "channels": 256,
    }
    return about, decoder_state(read_tensors(decoder))


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _change_checksums(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Read, change and write them, one process after the other: an entry that is lost would not be verified."""
    held = os.open(folder, os.O_RDONLY)
    try:
        lock(held, wait=True)
        _write_json(folder / CHECKSUMS, change(_checksums(folder)))
    finally:
        os.close(held)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
