"""`glesam models`: the weights of the full-size models, where they come from and whether they are here."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import CommandError, add_action

if TYPE_CHECKING:
    from glesam_ros.models.glesam.catalogue import Source

EPILOG = """\
examples:
  glesam models                                          names, what is here, sizes, licences
  glesam models get sam2.1_hiera_tiny                    download a base
  glesam models get sam_vit_h+glesam                     SAM, Stable Diffusion's U-Net, the released GleSAM weights
  glesam models get sd21-base                            the U-Net alone, for `glesam train`
  glesam models get facebook/sam2.1-hiera-tiny           a name of Hugging Face: the same as sam2.1_hiera_tiny
  glesam models get sam_vit_b --from sam_vit_b_01ec64.pth        a file that is on this machine already
  glesam models get sam2.1_hiera_tiny+glesam --from runs/it/sam2.1_hiera_tiny+glesam      what `glesam train` wrote
  glesam models get sd21-base --from stable-diffusion-2-1-base   a folder of diffusers; copies of other repositories too
  glesam models get scr-sd21                             Stable Diffusion, and SCR, which restores pictures
  glesam models get rass-sd21 --from rass.pth            RASS, which has to be fetched by hand, and all it needs
  glesam models where sam_vit_h+glesam                   every file with its path
  glesam models verify                                   checksums of all files

NAME is BASE, BASE+ENHANCER, scr-sd21, rass-sd21, or a diffusion model; `glesam models` lists the repositories of
Hugging Face that may stand for one. Files lie in $GLESAM_HOME, or in glesam_ros/models of $XDG_CACHE_HOME or ~/.cache.
A download that was cut goes on with the same command. Files are held against their published SHA-256; where none is
published, against that of the first download."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "models", help="list, download and verify the full-size models", epilog=EPILOG,
        description="The weights of SAM, SAM 2, GleSAM, SCR and RASS: list, download, take over, verify.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run_list)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    listing = add_action(actions, "models", "list", "names, what is here, sizes, licences; the default")
    listing.set_defaults(func=run_list)
    get = add_action(actions, "models", "get", "download what a model needs")
    get.add_argument("name", metavar="NAME", help="for example sam2.1_hiera_tiny+glesam")
    get.add_argument(
        "--from", dest="source", type=Path, metavar="PATH",
        help="take this instead of a download: the checkpoint of the base, a folder of GleSAM weights (released, or of "
        "`glesam train`), scr.pkl, rass.pth or a folder with them, a diffusers folder of Stable Diffusion, or a copy "
        "of one of their repositories on Hugging Face",
    )
    get.set_defaults(func=run_get)
    where = add_action(actions, "models", "where", "print the path of each file of a model; 1 when one is missing")
    where.add_argument("name", metavar="NAME", help="for example sam2.1_hiera_tiny+glesam")
    where.set_defaults(func=run_where)
    verify = add_action(actions, "models", "verify", "compare files with their checksums; 1 when one is not as it was")
    verify.add_argument("name", metavar="NAME", nargs="?", help="for example sam2.1_hiera_tiny+glesam; default: all")
    verify.set_defaults(func=run_verify)


def run_list(args: argparse.Namespace) -> int:
    """Print what there is."""
    from glesam_ros.models.glesam import catalogue, download

    home = catalogue.home()
    print(f"files in {home}\n\n{'base':<24}{'here':<6}{'MB':>6}  licence of the weights")
    for name, base in catalogue.BASES.items():
        source = base.source
        print(f"{name:<24}{_here(home / source.path):<6}{source.megabytes or '':>6}  {source.licence}")
    print(f"\n{'diffusion model':<24}{'here':<6}{'MB':>6}")
    for unet, sources in catalogue.UNETS.items():
        here = _here(home / unet / "unet" / "diffusion_pytorch_model.safetensors")
        print(f"{unet:<24}{here:<6}{sum(s.megabytes or 0 for s in sources):>6}  {sources[0].licence}")
    print(f"\n{'enhanced model':<34}{'here':<6}")
    own = {path.parent.name for path in home.glob(f"*/{catalogue.CONFIG_FILE}")}
    for name in sorted({*catalogue.RELEASED, *own}):
        licence = catalogue.RELEASED[name][0].licence if name in catalogue.RELEASED else "trained here, or taken over"
        print(f"{name:<34}{_here(home / name / catalogue.CONFIG_FILE):<6}{licence}")
    print(f"\n{'restorer, segmenter':<34}{'here':<6}")
    for name, sources in catalogue.SYSTEMS.items():
        files = download.needed(name, home)
        print(f"{name:<34}{'yes' if all((home / f.path).is_file() for f in files) else 'no':<6}{sources[-1].licence}")
    print("\nother names are any BASE+ENHANCER that you train; enhancers:")
    for name, text in catalogue.ENHANCERS.items():
        print(f"  +{name:<15}{text}")
    print("\nrepositories of Hugging Face whose names may stand for what they hold:")
    for repository, held in catalogue.HUB.items():
        print(f"  {repository:<47}{', '.join(held)}")
    return 0


def run_get(args: argparse.Namespace) -> int:
    """Bring the files of a model into place."""
    from glesam_ros.models.glesam import catalogue, download

    home = catalogue.home()
    try:
        name = catalogue.own_name(args.name)
        if args.source is not None:
            _take(name, args.source, home)
        _fetch(download.needed(name, home), home)
        if "+" in name and not (home / name / catalogue.CONFIG_FILE).is_file():
            if name not in catalogue.RELEASED:
                raise CommandError(
                    f"nobody published {name}: train it (glesam train), then: {catalogue.get(name)} --from RUN/{name}"
                )
            download.adopt(name, home)
            _fetch(download.needed(name, home), home)
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(f"{name} is complete in {home}{_use(name)}")
    return 0


def run_where(args: argparse.Namespace) -> int:
    """Print the files of a model; 1 when one is missing."""
    from glesam_ros.models.glesam import catalogue, download

    home = catalogue.home()
    try:
        name = catalogue.own_name(args.name)
        paths = [home / source.path for source in download.needed(name, home)]
    except ValueError as error:
        raise CommandError(str(error)) from error
    if "+" in name:
        paths += [home / name / catalogue.CONFIG_FILE, *sorted((home / name).glob("*.safetensors"))]
    for path in dict.fromkeys(paths):
        print(f"{'here' if path.is_file() else 'missing':<9}{path}")
    return 0 if all(path.is_file() for path in paths) else 1


def run_verify(args: argparse.Namespace) -> int:
    """Compare checksums; 1 when a file changed or is gone."""
    from glesam_ros.models.glesam import catalogue, download

    home, states = catalogue.home(), []
    try:
        for file, state in download.verify(home, args.name and catalogue.own_name(args.name)):
            print(f"{state:<9}{file}", flush=True)
            states.append(state)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not states:
        raise CommandError(f"found no files{f' of {args.name}' if args.name else ''} to verify in {home}")
    return int(set(states) != {"ok"})


def _use(name: str) -> str:
    """How a model that is complete is used, for the end of a sentence."""
    from glesam_ros.models.glesam import catalogue
    from glesam_ros.models.registry import restorer_names

    if name in catalogue.UNETS:
        return ""
    if name in restorer_names():
        return f"; use it: restorer:={name}, or glesam restore --model {name}"
    if name in catalogue.SYSTEMS:
        return f"; use it: semantic:={name}"
    return f"; use it: model:={name}, or glesam segment --model {name}"


def _here(path: Path) -> str:
    return "yes" if path.is_file() else "no"


def _fetch(sources: Sequence[Source], home: Path) -> None:
    """Download what is missing, with a progress bar, and say under which licence it comes."""
    from tqdm import tqdm

    from glesam_ros.models.glesam import download

    for source in sources:
        if (home / source.path).is_file():
            continue
        print(f"{source.path}: {source.url}, licence {source.licence}", flush=True)
        with contextlib.ExitStack() as stack:

            def started(name: str, total: int | None, have: int, stack: contextlib.ExitStack = stack) -> Any:
                bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, disable=None, leave=False)
                return stack.enter_context(bar).update

            download.fetch(source, home, started)


def _take(name: str, path: Path, home: Path) -> None:
    """Copy what `path` is, a checkpoint or one of three kinds of folder, to where the model `name` has it.

    Raises:
        CommandError, ValueError: it is nothing that this model consists of.
    """
    from glesam_ros.models.glesam import catalogue, download

    base = None if name in (*catalogue.UNETS, *catalogue.SYSTEMS) else catalogue.split_name(name)[0]
    if (path / "unet" / "config.json").is_file():
        return _take_diffusion(name, path, home)
    if name in catalogue.SYSTEMS:
        if path.exists() and download.take_system(path, name, home):
            return None
        kinds = [Path(source.path).name for source in catalogue.SYSTEMS[name]]
        raise CommandError(
            f"{path}: expected for {name} {' or '.join(kinds)}, a folder with it, or a folder of diffusers with "
            "unet/config.json; found none of them"
        )
    if "+" in name and (path / catalogue.CONFIG_FILE).is_file():
        return download.take_enhancer(path, name, home)
    if (released := _released_folder(name, path)) is not None:
        return download.take_released(released, name, home)
    if base is not None and (file := _checkpoint(base, path)).is_file():
        return _take_checkpoint(base, file, home)
    files = [] if base is None else [_file_name(base)]
    files += [catalogue.TRANSFORMERS_FILE] if base in catalogue.TRANSFORMERS else []
    kinds = [f"a checkpoint file of {base} or a folder with {' or '.join(files)}"] if files else []
    kinds += [f"a folder with {catalogue.CONFIG_FILE} or {catalogue.LORA_FILE}"] if "+" in name else []
    kinds += ["a folder of diffusers with unet/config.json"] if base != name else []
    raise CommandError(f"{path}: expected for {name} {', or '.join(kinds)}; found none of them")


def _take_checkpoint(base: str, file: Path, home: Path) -> None:
    """Copy the checkpoint of a base, and say where it is not the published one."""
    from glesam_ros.models.glesam import catalogue, download
    from glesam_ros.models.glesam.weights import read_tensors

    read_tensors(file)  # refuses what is no file of tensors
    source = catalogue.BASES[base].source
    found = download.take(file, home / source.path, home)
    if source.sha256 not in (None, found):
        print(f"note: {file} has another SHA-256 than the published {base}, {source.sha256}", file=sys.stderr)


def _checkpoint(base: str, path: Path) -> Path:
    """The checkpoint of a base: `path` itself, or in a folder the file of the published name or of transformers."""
    from glesam_ros.models.glesam import catalogue

    if not path.is_dir():
        return path
    published, in_hub = path / _file_name(base), path / catalogue.TRANSFORMERS_FILE
    is_copy = base in catalogue.TRANSFORMERS and in_hub.is_file() and not published.is_file()
    return in_hub if is_copy else published


def _file_name(base: str) -> str:
    """As the checkpoint of a base is published."""
    from glesam_ros.models.glesam import catalogue

    return Path(catalogue.BASES[base].source.path).name


def _released_folder(name: str, path: Path) -> Path | None:
    """The folder of released LoRA weights: `path` itself, or where a copy of their repository has those of `name`."""
    from glesam_ros.models.glesam import catalogue

    published = [catalogue.in_repository(source) for source in catalogue.RELEASED.get(name, ())[:1]]
    inside = [catalogue.LORA_FILE, *filter(None, published)] if "+" in name else []
    return next((file.parent for part in inside if (file := path / part).is_file()), None)


def _take_diffusion(name: str, path: Path, home: Path) -> None:
    """Copy the files of a diffusion model that are in a folder of diffusers, those of its autoencoder if they count."""
    from glesam_ros.models.glesam import catalogue, download
    from glesam_ros.models.glesam.weights import read_tensors

    file = path / "unet" / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{file}: expected JSON: {error}") from error
    width = about.get("cross_attention_dim") if isinstance(about, dict) else None
    unet = download.WIDTHS.get(width) if isinstance(width, int) else None
    own = name in catalogue.UNETS or name in catalogue.SYSTEMS
    wanted = [catalogue.SYSTEM_SD if name in catalogue.SYSTEMS else name] if own else list(catalogue.UNETS)
    if unet is None or unet not in wanted:
        raise CommandError(f"{path}: expected the diffusion model {' or '.join(wanted)}, got {unet or 'another one'}")
    sources = (*catalogue.UNETS[unet], *(catalogue.VAES.get(unet, ()) if own else ()))
    parts = {source: path / source.path.removeprefix(f"{unet}/") for source in sources}
    there = {source: part for source, part in parts.items() if part.is_file()}
    for part in (part for part in there.values() if part.suffix == ".safetensors"):
        read_tensors(part)  # refuses what is no file of tensors, such as a pointer of Git LFS
    for source, part in there.items():
        download.take(part, home / source.path, home)
