"""What `glesam evaluate` and `glesam evaluate-semantic` share: checks, work for several processes, results on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from glesam_ros.cli.options import CommandError, progress
from glesam_ros.cli.pictures import write_picture

if TYPE_CHECKING:
    from glesam_ros.evaluation.protocol import Condition
    from glesam_ros.validation import UInt8Array

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")


def check_kinds(kinds: Iterable[str]) -> None:
    """Raises CommandError where one of --kinds is no degradation, nor "none"."""
    from glesam_ros.degradation import names

    wrong = sorted(set(kinds) - {*names(), "none"})
    if wrong:
        raise CommandError(f"--kinds: expected some of {', '.join(names())}, or none; got {', '.join(wrong)}")


def check_baselines(baselines: Iterable[str], restorers: Path | None) -> None:
    """Raises CommandError where one of --baselines is learned and --restorers was not given."""
    from glesam_ros.evaluation.baselines import LEARNED

    learned = [name for name in baselines if name in LEARNED]
    if learned and restorers is None:
        raise CommandError(f"--baselines {' '.join(learned)}: expected the folder of their weights, give --restorers")


def wanted_conditions(kinds: Iterable[str], levels: Iterable[int]) -> list[Condition]:
    """The clear picture, and each of --kinds at each of --levels."""
    from glesam_ros.evaluation.protocol import conditions

    return conditions([kind for kind in dict.fromkeys(kinds) if kind != "none"], sorted(set(levels)))


def sheet_condition(there: Sequence[Condition], wanted: str) -> Condition:
    """What a contact sheet shows: the condition that --sheet-condition names, else the last."""
    return next((condition for condition in there if condition.name == wanted), there[-1])


def shared(
    open_state: Callable[[], State], opened: State, work: Callable[[State, Task], Result], tasks: Iterable[Task],
    total: int, workers: int, unit: str,
) -> Iterator[Result]:
    """`glesam_ros.evaluation.pool.share` with a progress bar; one process takes the state that is open already.

    Raises:
        CommandError: a task failed, or a process was killed.
    """
    from concurrent.futures.process import BrokenProcessPool

    from glesam_ros.evaluation.pool import share

    workers = max(1, min(workers, total))
    state = open_state if workers > 1 else lambda: opened
    try:
        yield from progress(unit)(share(state, work, tasks, workers), total)
    except BrokenProcessPool as error:
        raise CommandError("a process ended by itself, perhaps for want of memory; try fewer --workers") from error
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def plotted(command: str, plot: Callable[[], list[Path]]) -> list[Path]:
    """The files that `plot` draws; none, which is said, where matplotlib is missing."""
    try:
        return plot()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        print(f"glesam {command}: no plots: matplotlib is missing; pip install 'glesam_ros[evaluate]'", file=sys.stderr)
        return []


def write_sheet(path: Path, pixels: UInt8Array) -> Path:
    """Write a contact sheet, (H, W, 3) uint8 RGB, as JPEG. Raises OSError where OpenCV cannot."""
    write_picture(path, pixels, quality=90)
    return path


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write results, which hold no NaN."""
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def interval(drawn: str) -> str:
    """How the intervals of the results are made, in words: `drawn` is what the bootstrap draws."""
    from glesam_ros.evaluation.metrics import CONFIDENCE, RESAMPLES

    return f"{100 * CONFIDENCE:g} % percentile bootstrap over {drawn}, {RESAMPLES} resamples"
