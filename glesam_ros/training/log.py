"""Losses of a stage: printed, in a CSV and in TensorBoard."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Log:
    """Means of losses over `every` steps, and over those that are left at the end.

    Args:
        folder: gets `<stage>.csv` and `tensorboard/`; None keeps the sums only (processes but the first).
        stage: name of the stage.
        every: steps between two rows.
        steps: of the stage; the last one gets a row, too.
        first: steps that were done before; later rows of an earlier run are dropped.
        state: of `state()`, to go on with.
    """

    def __init__(
        self, folder: Path | None, stage: str, every: int, steps: int, first: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.stage, self.every, self.steps = stage, every, steps
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._count = int(state["count"]) if state else 0
        self._before = float(state["seconds"]) if state else 0.0
        self._start = time.monotonic()
        self._pending: list[dict[str, Tensor]] = []
        self._path = folder / f"{stage}.csv" if folder else None
        self._board: SummaryWriter | None = None
        self._rows: list[dict[str, str]] = []
        if folder and self._path:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first if first else None)
            self._rows = _rows_until(self._path, first)
            self._write(self._rows)

    def add(self, step: int, losses: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Losses of step `step` (from 0) and the learning rates that it had.

        Raises:
            FloatingPointError: a loss since the last row was infinite or not a number.
        """
        self._pending.append({name: value.detach() for name, value in losses.items()})
        if (step + 1) % self.every and step + 1 < self.steps:
            return
        self._settle()
        row: dict[str, Any] = {"step": step + 1, "seconds": round(self._seconds(), 1)}
        row |= {name: round(value / self._count, 5) for name, value in self._sums.items()}
        if self._board:
            for name, value in self._sums.items():
                self._board.add_scalar(f"{self.stage}/{name}", value / self._count, step + 1)
            for name, rate in rates.items():
                self._board.add_scalar(f"{self.stage}/rate/{name}", rate, step + 1)
            self._board.add_scalar(f"{self.stage}/seconds", self._seconds() / (step + 1), step + 1)
            self._rows.append({name: str(value) for name, value in row.items()})
            self._write(self._rows[-1:], append=len(self._rows) > 1)
            print(self.stage, *(f"{name} {value}" for name, value in row.items()), flush=True)
        self._sums, self._count = {}, 0

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Pictures (H, W, 3) uint8 of step `step` (from 0)."""
        if self._board:
            for name, picture in pictures.items():
                self._board.add_image(f"{self.stage}/{name}", picture.cpu().numpy(), step + 1, dataformats="HWC")

    def state(self) -> dict[str, Any]:
        """Sums since the last row, for a checkpoint. Raises FloatingPointError as `add`."""
        self._settle()
        return {"sums": dict(self._sums), "count": self._count, "seconds": self._seconds()}

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board:
            self._board.close()

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def _settle(self) -> None:
        """Add what came since; not at every step, a GPU would have to be waited for."""
        for losses in self._pending:
            for name, value in losses.items():
                number = float(value)
                if not math.isfinite(number):
                    raise FloatingPointError(
                        f"{self.stage}: expected finite losses, {name} is {number}; "
                        f"lower {self.stage}.rates, or set precision=no"
                    )
                self._sums[name] = self._sums.get(name, 0.0) + number
            self._count += 1
        self._pending = []

    def _write(self, rows: list[dict[str, str]], append: bool = False) -> None:
        if self._path is None:
            return
        with self._path.open("a" if append else "w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, list(rows[0]))
                if not append:
                    writer.writeheader()
                writer.writerows(rows)


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    """Whole rows of `path` up to `step`."""
    if not step or not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [row for row in rows if int(row["step"]) <= step]
