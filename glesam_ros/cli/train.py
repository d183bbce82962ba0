"""`glesam train`: train nano or a full-size model by the recipe of GleSAM or RASS, or go on with a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glesam_ros.cli.options import CommandError
from glesam_ros.training.recipes import RECIPES, recipe_of

EPILOG = """\
examples:
  glesam train tiny --data DATA --out runs/tiny                    the whole recipe in seconds, to try it out
  glesam train nano --data DATA --out runs/nano                    the recipe in hours, on a CPU or GPU
  glesam train nano --data DATA --out runs/nano                    again: goes on where it was stopped or killed
  glesam train nano_tune --data DATA --out runs/tuned              from the shipped weights
  glesam train nano --data DATA --out runs/big --set base.steps=20000 --set crop.width=512
  glesam train nano --data DATA --out runs/one --set start=runs/nano/restore.pt \\
      --set base.steps=0 --set level.steps=0 --set restore.steps=0 --set decode.loss=focal
  glesam train glesam_tiny --data DATA --out runs/tiny             every stage of the full size, random weights
  glesam train glesam_sam_vit_b --data DATA --out runs/b           GleSAM on SAM ViT-B
  glesam train glesam_sam_vit_b --data DATA --out runs/plus --set enhancer.levels=true         GleSAM++
  glesam train rass_ade20k --data DATA --out runs/rass             SCR and RASS at full size, 150 classes
  glesam train rass_ade20k --data DATA --out runs/mine --set scr.steps=0 --set 'sources=[{path: mine, split: train}]'
  glesam train --print-config nano > mine.yaml                     every key; train it with: glesam train mine.yaml ...
  accelerate launch -m glesam_ros.cli.main train nano --data DATA --out runs/nano      on several GPUs

stages: base (encoder and decoder on clear crops), level (degradation-level head), restore (stage 1, latent
reconstruction), decode (stage 2), refit (the encoder's trunk once more, on clear crops); at full size: level (GleSAM++
only), restore, decode, distill (a small enhancer learns from the large one); of RASS: scr (a restorer that knows the
classes), rass (the segmenter on its features).
DATA is the folder that the paths of the sources are relative to. The full size reads the weights of SAM and Stable
Diffusion that `glesam models get` brings.
--out holds the losses (CSV, tensorboard/), checkpoint.pt of the stage under way, STAGE.pt of each finished one, and at
the end a folder: nano or rass_nano, which node and commands take as it is (model:=, semantic:=); at full size
BASE+ENHANCER: glesam models get BASE+ENHANCER --from FOLDER; of RASS rass: glesam models get rass-sd21 --from FOLDER.
Ctrl-C finishes the step, writes the checkpoint and exits with 130; after a kill the last periodic checkpoint counts.
Either way the result is that of a run that was not stopped."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "train", help="train the model", epilog=EPILOG,
        description="Train nano or a full-size model by the recipe of GleSAM or RASS, on a GPU where there is one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="nano, tiny, glesam_sam_vit_b (a wrong name lists all), or a YAML file"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the data sets that CONFIG names")
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoints and losses; default: runs/CONFIG")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="another value for a key of CONFIG, for example base.steps=100; may be repeated",
    )
    stages = dict.fromkeys(stage for recipe in RECIPES.values() for stage in recipe.stages)
    parser.add_argument("--until", choices=stages, help="last stage to run")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one"
    )
    parser.add_argument("--print-config", action="store_true", help="print every key of CONFIG as YAML instead")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Train; 130 when a signal stopped it."""
    from glesam_ros.training.config import load_any, to_yaml

    try:
        config = load_any(args.config, args.changes)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.data is None:
        raise CommandError("expected --data DIR, the folder with the data sets that the configuration names")
    recipe = recipe_of(config)
    until = args.until or recipe.stages[-1]
    if until not in recipe.stages:
        raise CommandError(f"--until: expected one of {', '.join(recipe.stages)} for {args.config}, got {until}")
    out = args.out or Path("runs") / Path(args.config).stem

    from glesam_ros.training.loop import Stopped

    try:
        written = recipe.train_function()(config, args.data, out, args.device, until)
        folder = None
        if recipe.export and written and until == recipe.stages[-1]:
            folder = recipe.export_function()(config, args.data, out)
    except (ValueError, FloatingPointError) as error:
        raise CommandError(str(error)) from error
    except Stopped:
        print(f"glesam train: stopped; go on with: {_again(args, out)}", file=sys.stderr)
        return 130
    if folder is not None:
        print(f"model folder: {folder}\n{recipe.use.format(path=shlex.quote(str(folder.resolve())))}")
        return 0
    print("\n".join(f"{recipe.result}: {path}" for path in written) or f"done until {until}: {out}")
    return 0


def _again(args: argparse.Namespace, out: Path) -> str:
    """The command that goes on."""
    command: Sequence[str] = ["glesam", "train", args.config, "--data", str(args.data), "--out", str(out)]
    command = [*command, *(part for change in args.changes for part in ("--set", change))]
    if args.until:
        command = [*command, "--until", args.until]
    if args.device != "auto":
        command = [*command, "--device", args.device]
    return shlex.join(command)
