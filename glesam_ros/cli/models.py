"""`glesam models`: the weights of the full-size models, where they come from and whether they are here."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from glesam_ros.cli.options import CommandError

EPILOG = """\
examples:
  glesam models                                          names, what is here, sizes, licences
  glesam models get sam2.1_hiera_tiny                    download a base
  glesam models get sam_vit_h+glesam                     SAM, Stable Diffusion's U-Net, the released GleSAM weights
  glesam models get sam_vit_b --from sam_vit_b_01ec64.pth        a file that is on this machine already
  glesam models get sam2.1_hiera_tiny+glesam --from runs/it/sam2.1_hiera_tiny+glesam      what `glesam train` wrote
  glesam models get sam2.1_hiera_tiny+glesam --from stable-diffusion-2-1-base             a folder of diffusers
  glesam models where sam_vit_h+glesam                   every file with its path
  glesam models verify                                   checksums of all files

A name is BASE or BASE+ENHANCER. Files lie in $GLESAM_HOME, or in glesam_ros/models of $XDG_CACHE_HOME or ~/.cache. A
download that was cut goes on with the same command. Nobody publishes checksums of these files: the one of the first
download is kept, and later copies are held against it."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "models", help="list, download and verify the full-size models", epilog=EPILOG,
        description="The weights of SAM, SAM 2 and GleSAM: list, download, take over, verify.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run_list)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    actions.add_parser("list", help="names, what is here, sizes, licences; the default").set_defaults(func=run_list)
    get = actions.add_parser("get", help="download what a model needs")
    get.add_argument("name", metavar="NAME", help="for example sam2.1_hiera_tiny+glesam")
    get.add_argument(
        "--from", dest="source", type=Path, metavar="PATH",
        help="take this instead of a download: the checkpoint of the base, a folder of GleSAM weights (released, or of "
        "`glesam train`), or a diffusers folder of Stable Diffusion",
    )
    get.set_defaults(func=run_get)
    where = actions.add_parser("where", help="print the path of each file of a model")
    where.add_argument("name", metavar="NAME", help="for example sam2.1_hiera_tiny+glesam")
    where.set_defaults(func=run_where)
    verify = actions.add_parser("verify", help="compare all files with their checksums")
    verify.set_defaults(func=run_verify)


def run_list(args: argparse.Namespace) -> int:
    """Print what there is."""
    from glesam_ros.models.glesam import catalogue

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
    print("\nother names are any BASE+ENHANCER that you train; enhancers:")
    for name, text in catalogue.ENHANCERS.items():
        print(f"  +{name:<15}{text}")
    return 0


def run_get(args: argparse.Namespace) -> int:
    """Bring the files of a model into place."""
    from glesam_ros.models.glesam import catalogue, download

    name, home = args.name, catalogue.home()
    base, enhancer = _split(name)
    if args.source is not None:
        _take(name, args.source, home)
    try:
        for source in download.needed(name, home):
            _fetch(source, home)
        config = home / name / catalogue.CONFIG_FILE
        if enhancer is not None and not config.is_file():
            if name not in catalogue.RELEASED:
                raise CommandError(
                    f"nobody published {name}: train it (glesam train), then: {catalogue.get(name)} --from RUN/{name}"
                )
            download.adopt(name, home)
            for source in download.needed(name, home):
                _fetch(source, home)
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(f"{name} is complete in {home}; use it: model:={name}, or glesam segment --model {name}")
    return 0


def run_where(args: argparse.Namespace) -> int:
    """Print the files of a model; 1 when one is missing."""
    from glesam_ros.models.glesam import catalogue, download

    home = catalogue.home()
    _, enhancer = _split(args.name)
    paths = [home / source.path for source in download.needed(args.name, home)]
    if enhancer is not None:
        paths.append(home / args.name / catalogue.CONFIG_FILE)
    for path in paths:
        print(f"{'here' if path.is_file() else 'missing':<9}{path}")
    return 0 if all(path.is_file() for path in paths) else 1


def run_verify(args: argparse.Namespace) -> int:
    """Compare checksums; 1 when a file changed or is gone."""
    from glesam_ros.models.glesam import catalogue, download

    worst = 0
    for name, state in download.verify(catalogue.home()):
        print(f"{state:<9}{name}")
        worst = max(worst, int(state != "ok"))
    return worst


def _split(name: str) -> tuple[str, str | None]:
    from glesam_ros.models.glesam.catalogue import split_name

    try:
        return split_name(name)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _here(path: Path) -> str:
    return "yes" if path.is_file() else "no"


def _fetch(source: Any, home: Path) -> None:
    """Download with a progress bar."""
    from tqdm import tqdm

    from glesam_ros.models.glesam import download

    bars: list[Any] = []

    def started(name: str, total: int | None, have: int) -> Any:
        bars.append(tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, leave=False))
        return bars[-1].update

    try:
        download.fetch(source, home, started)
    except download.DownloadError as error:
        raise CommandError(str(error)) from error
    finally:
        for bar in bars:
            bar.close()


def _take(name: str, path: Path, home: Path) -> None:
    """Copy what `path` is, a checkpoint or one of three kinds of folder, to where the model `name` has it."""
    from glesam_ros.models.glesam import catalogue, download
    from glesam_ros.models.glesam.weights import read_tensors

    base, enhancer = _split(name)
    try:
        if path.is_file():
            read_tensors(path)  # refuses what is no file of tensors
            download.take(path, home / catalogue.BASES[base].source.path, home)
        elif (path / catalogue.CONFIG_FILE).is_file():
            if enhancer is None:
                raise CommandError(f"{path}: holds an enhancer; name the model {base}+ENHANCER")
            about = json.loads((path / catalogue.CONFIG_FILE).read_text(encoding="utf-8"))
            if about.get("base") != base:
                raise CommandError(f"{path}: expected an enhancer of {base}, got one of {about.get('base')!r}")
            shutil.copytree(path, home / name, dirs_exist_ok=True)
        elif (path / catalogue.LORA_FILE).is_file():
            for file in (catalogue.LORA_FILE, catalogue.RELEASED_DECODER):
                if not (path / file).is_file():
                    raise CommandError(f"{path}: expected released GleSAM weights, found no {file}")
                download.take(path / file, home / name / file, home)
            download.adopt(name, home)
        elif (path / "unet" / "config.json").is_file():
            about = json.loads((path / "unet" / "config.json").read_text(encoding="utf-8"))
            unet = download.WIDTHS.get(about.get("cross_attention_dim"))
            if unet is None:
                raise CommandError(f"{path}: expected Stable Diffusion 2.1-base or 1.5, got another diffusion model")
            for source in catalogue.UNETS[unet]:
                part = path / source.path.removeprefix(f"{unet}/")
                if part.is_file():
                    download.take(part, home / source.path, home)
        else:
            raise CommandError(
                f"{path}: expected a checkpoint file, or a folder with {catalogue.CONFIG_FILE}, {catalogue.LORA_FILE} "
                "or unet/config.json; found none of them"
            )
    except ValueError as error:
        raise CommandError(str(error)) from error
