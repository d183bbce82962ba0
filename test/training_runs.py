"""What tests of several recipes do with a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glesam_ros.cli.main import main
from glesam_ros.training import checkpoint
from glesam_ros.training.loop import Run, Stage, Stop, make_accelerator, train


def killed_at_first_checkpoint(command: list[str], out: Path) -> dict[str, Any]:
    """Start a command that trains into `out`, kill it once it wrote a checkpoint, and give what that holds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 600
        while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        said = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, said
    return checkpoint.read(out / "checkpoint.pt")


def run_in_two_processes(program: str, *arguments: str) -> None:
    """Run Python code as `torchrun --nproc_per_node 2` does; it can import the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
        }
        command = [sys.executable, "-c", program, *arguments]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said


def trained_on_one_batch(stage: Stage, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Losses of all steps on the same batch."""
    batch = stage.batch(np.random.default_rng(4))
    losses: list[dict[str, float]] = []
    forward = stage.forward

    def spy(given: dict[str, Tensor]) -> dict[str, Tensor]:
        found = forward(given)
        losses.append({name: value.item() for name, value in found.items()})
        return found

    monkeypatch.setattr(stage, "batch", lambda rng: batch)
    monkeypatch.setattr(stage, "forward", spy)
    out.mkdir(exist_ok=True)
    train(stage, 0, Run(out, 1, 0, make_accelerator("cpu", "no"), Stop()))
    return losses


def stopped_after(
    kind: type[Stage], step: int, command: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run a command that trains, with a signal after `step` steps of the stage `kind`; it says how to go on."""
    stopping, forward = Run.stopping, kind.forward
    asked: list[bool] = []

    def spy(self: Stage, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.step + 1 == step:
            asked.append(True)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", spy)
        patch.setattr(Run, "stopping", lambda self: bool(asked) or stopping(self))
        assert main(command) == 130
        assert "go on with" in capsys.readouterr().err


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same names and bits."""
    before, after = checkpoint.read(one), checkpoint.read(other)
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
