"""Trains and exports the runs of an ablation one after the other; what is done already is not done again.

    python -m glesam_ros.training.ablation --data DATA --start runs/nano/level.pt --out runs/ablation
    python -m glesam_ros.training.ablation --data DATA --start shipped --out runs/ablation

The weights of each run end in OUT/<run>/weights, and the commands that evaluate them are printed.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from glesam_ros.models.nano_net import Enhancer
from glesam_ros.training import checkpoint
from glesam_ros.training.config import Config, load_config, to_dict
from glesam_ros.training.export import export, read_net
from glesam_ros.training.loop import Stopped, sow
from glesam_ros.training.nano import SHIPPED, shipped_net, train_nano
from glesam_ros.training.sources import load_scenes

DEFAULT = Path(__file__).with_name("ablation.yaml")
PARTS = {"config", "common", "runs"}


def read_runs(path: Path, start: Path) -> dict[str, Config]:
    """The configurations of an ablation by name; all are checked before the first is trained.

    Args:
        path: YAML with `config` (of `load_config`), `common` (changes of all runs) and `runs` (changes by name).
        start: weights that all runs begin with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another layout, or a change that does not fit; the message names the run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected an ablation at {path}, found no file")
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or set(data) != PARTS or not isinstance(data["runs"], dict):
        raise ValueError(f"{path}: expected the keys config, common and runs (changes by name), found something else")
    runs = {}
    for name, changes in data["runs"].items():
        try:
            runs[str(name)] = load_config(data["config"], [f"start={start}", *data["common"], *changes])
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: runs.{name}: {error}") from error
    return runs


def train_runs(runs: dict[str, Config], data: Path, out: Path, device: str = "auto") -> None:
    """Train and export each run that has no weights yet.

    Raises:
        Stopped, ValueError, FileNotFoundError, FloatingPointError: as `train_nano`.
    """
    for name, config in runs.items():
        folder = out / name
        if (folder / "weights").is_dir():
            continue
        print(f"ablation: {name}", flush=True)
        _share_stage_1(runs, name, out)
        (trained,) = train_nano(config, data, folder, device)  # type: ignore[arg-type]  # argparse checked it
        export(read_net(trained), folder / "partial")
        (folder / "partial").rename(folder / "weights")


def write_base(config: Config, data: Path, path: Path) -> Path:
    """Encoder, decoder and level head of the package with an enhancer that has learned nothing yet.

    Args:
        config: whose sources give the statistics of normalisation, and whose seed the enhancer's first weights.
        data: folder that the paths of the sources are relative to.
        path: gets the weights; what is there stays.

    Returns:
        `path`.

    Raises:
        ValueError, FileNotFoundError: as `load_scenes`.
    """
    if not path.is_file():
        net = shipped_net(load_scenes(config.sources, data), config)
        sow(config.seed, 0)
        net.enhancer = Enhancer()
        # a run without stage 1 begins with the encoder's trunk, too
        net.enhancer.trunk.load_state_dict(net.trunk.state_dict())
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, net.state_dict())
    return path


def _share_stage_1(runs: dict[str, Config], name: str, out: Path) -> None:
    """Where a run before differs in its stage 2 alone, its stage 1 is taken over."""
    folder, ours = out / name, to_dict(runs[name]) | {"decode": None}
    if (folder / "config.yaml").exists():
        return
    for other in itertools.takewhile(lambda before: before != name, runs):
        finished = out / other / "restore.pt"
        if to_dict(runs[other]) | {"decode": None} == ours and finished.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(finished, folder / finished.name)
            return


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets of the configuration")
    parser.add_argument(
        "--start", type=Path, required=True, help="weights that all runs begin with: level.pt of a run, or shipped"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--runs", type=Path, default=DEFAULT, help="YAML file; default: the one of the package")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    args = parser.parse_args()
    try:
        if str(args.start) == SHIPPED:
            args.start = write_base(load_config("nano", []), args.data, args.out / "base.pt")
        runs = read_runs(args.runs, args.start)
        train_runs(runs, args.data, args.out, args.device)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"ablation: error: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("ablation: stopped; the same command goes on", file=sys.stderr)
        return 130
    for name in runs:
        folder = args.out / name
        command = ["glesam", "evaluate", "--data", args.data, "--weights", folder / "weights", "--out", folder / "test"]
        print(shlex.join(map(str, command)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
