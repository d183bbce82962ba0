"""The loop of every stage: batches, steps, moving average, log, checkpoints. It knows of no network.

What a step does depends on the seed, the stage, the step, the micro-batch and the process alone, so a run that was
stopped and goes on ends as one that was not: bit-equal on the same CPU with the same number of threads.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol, TypeVar

import cv2
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, KwargsHandler, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from glesam_ros.training import checkpoint
from glesam_ros.training.config import StageConfig, differences, to_dict, to_yaml
from glesam_ros.training.log import Log
from glesam_ros.whole_files import write_text

_LOG = logging.getLogger(__name__)
WITH_BF16 = ("AVX512",)
"""CPUs, as torch names them, on which 16-bit arithmetic is not emulated; of others torch does not say it."""
Batch = dict[str, Tensor]
Draw = Callable[[np.random.Generator], Batch]
TRAINING, PREPARATION, CHANCE = range(3)
"""What random numbers are for; each has its own."""


class Stopped(Exception):
    """A signal asked for the end; what was done is in the checkpoint."""


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate of their own."""

    name: str
    parameters: list[nn.Parameter]
    rate: float


def beside(part: nn.Module, *wholes: nn.Module) -> list[nn.Parameter]:
    """Parameters of `wholes` that are not in `part`."""
    inside = {id(p) for p in part.parameters()}
    return [p for whole in wholes for p in whole.parameters() if id(p) not in inside]


class Stage(nn.Module, ABC):
    """What is trained, on which batches and by which loss.

    Attributes:
        name: of its files.
        model: the network.
        settings: steps, batch and so on.
        step: the one under way, from 0.
    """

    name: str

    def __init__(self, model: nn.Module, settings: StageConfig) -> None:
        super().__init__()
        self.model, self.settings, self.step = model, settings, 0

    @abstractmethod
    def groups(self) -> list[Group]:
        """What is trained; all other parameters are frozen."""

    @abstractmethod
    def set_modes(self) -> None:
        """Put the parts of the model into training or evaluation mode."""

    @abstractmethod
    def batch(self, rng: np.random.Generator) -> Batch:
        """A micro-batch on the CPU, drawn from `rng` alone; may run in another process."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses by name; "loss" is what is minimised, the others are logged."""

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """What takes the steps, of torch's parameter groups with their peak rates."""
        return torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay, fused=True)

    def clipped(self, groups: list[Group]) -> list[list[nn.Parameter]]:
        """Sets of parameters whose gradients are clipped by their common norm."""
        return [[p for group in groups for p in group.parameters]]

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the network."""
        return self.model.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over what `weights` gave."""
        self.model.load_state_dict(weights)

    def prepare(self, drawn: Callable[[Draw, int], Iterator[Batch]]) -> None:  # noqa: B027  # most need nothing
        """Before the first step, also when a run goes on: `drawn(draw, n)` gives n batches on the device."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures (H, W, 3) uint8 for TensorBoard, by name; called without gradient in evaluation mode."""
        return {}

    def conclude(self) -> None:  # noqa: B027  # most need nothing
        """After the last step: make the model what later stages expect."""

    def finished(self) -> dict[str, Tensor]:
        """What later stages need, once it is concluded."""
        return self.weights()

    def load_finished(self, weights: dict[str, Tensor]) -> None:
        """Conclude, and take over what `finished` gave. Raises ValueError where it is of another network."""
        self.conclude()
        try:
            self.load_weights(weights)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{self.name}: expected the weights of this stage, {said}") from error


class Adapting(Stage):
    """A stage that trains few of many parameters: its checkpoints hold those alone, all else is as in its file."""

    def set_modes(self) -> None:
        self.eval()

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters by their name in the stage."""
        trained = {id(p) for group in self.groups() for p in group.parameters}
        return {name: p.detach() for name, p in self.named_parameters() if id(p) in trained}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over what `weights` gave. Raises ValueError where it is of other networks."""
        self._take(self.weights(), weights)

    def finished(self) -> dict[str, Tensor]:
        """Of `weights`, what later stages need."""
        return {name: value for name, value in self.weights().items() if name.startswith("model.")}

    def load_finished(self, weights: dict[str, Tensor]) -> None:
        """Take over what `finished` gave. Raises ValueError where it is of other networks."""
        self._take(self.finished(), weights)

    def _take(self, own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        wrong = [
            name for name in {**own, **weights}
            if name not in own or name not in weights or own[name].shape != weights[name].shape
        ]
        if wrong:
            raise ValueError(f"{self.name}: expected the weights of this stage, {', '.join(wrong[:3])} does not fit")
        for name, value in weights.items():
            own[name].copy_(value)


class Stop:
    """Whether a signal came: SIGINT or SIGTERM; the second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take the signals over; Python allows that in the main thread only, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request(number: int, frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(number, signal.SIG_DFL)

        try:
            for number in before:
                signal.signal(number, request)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        out: folder of checkpoints and logs.
        seed: of the run.
        workers: processes that draw batches ahead, 0 for none.
    """

    out: Path
    seed: int
    workers: int
    accelerator: Accelerator
    stop: Stop

    @property
    def checkpoint(self) -> Path:
        """Where the stage that is under way is kept."""
        return self.out / "checkpoint.pt"

    def stopping(self) -> bool:
        """Whether a signal came, to any of the processes."""
        if self.accelerator.num_processes == 1:
            return self.stop.requested
        flag = torch.tensor(float(self.stop.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


class Precise(Protocol):
    """A configuration that says how to compute; a dataclass."""

    @property
    def precision(self) -> str: ...

    __dataclass_fields__: ClassVar[dict[str, Any]]


Configured = TypeVar("Configured", bound=Precise)


def settled(config: Configured, device: str) -> Configured:
    """`config` with what precision `auto` stands for here: bf16 where `device` has it, else no.

    What is trained is then said by its `config.yaml`, and goes on the same way on another machine, or not at all.

    Raises:
        ValueError: there is no such device.
    """
    if config.precision != "auto":
        return config
    precision = "bf16" if _has_bf16(_is_cpu(device)) else "no"
    _LOG.info("precision: auto is %s here", precision)
    return dataclasses.replace(config, precision=precision)


def _is_cpu(device: str) -> bool:
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("device: expected a GPU that torch can use, found none; take --device cpu")
    return device == "cpu" or not gpu


def _has_bf16(cpu: bool) -> bool:
    """Whether 16-bit arithmetic is the device's own; GPUs have it from compute capability 8.0 on."""
    if cpu:
        return torch.backends.cpu.get_cpu_capability() in WITH_BF16
    return torch.cuda.get_device_capability() >= (8, 0)


def make_accelerator(device: str, precision: str, unused: bool = False) -> Accelerator:
    """What runs the steps: one process, or those that `accelerate launch` started.

    Args:
        device: auto, cpu or cuda.
        precision: no, bf16 or fp16.
        unused: there are trained parameters that not every step uses.

    Raises:
        ValueError: there is no such device, or it cannot compute in `precision`.
    """
    cpu = _is_cpu(device)
    if cpu and precision == "fp16":
        raise ValueError("precision: expected no or bf16 on a CPU, got fp16")
    if cpu and precision == "bf16" and not _has_bf16(cpu):
        _LOG.warning("precision: a CPU without AVX-512 may emulate bf16, many times as slow as fp32; take precision=no")
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused else []
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def claim(out: Path, config: Any, accelerator: Accelerator) -> None:
    """Make the folder of a run this configuration's.

    Raises:
        ValueError: the folder holds checkpoints of another configuration.
    """
    path = out / "config.yaml"
    # a run that left no checkpoint, as one whose data was not found, has nothing that other values would spoil
    if path.is_file() and any(out.glob("*.pt")):
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: expected the configuration of the run, cannot read it") from error
        changed = differences(before, to_dict(config)) if isinstance(before, dict) else ["every key"]
        if changed:
            raise ValueError(
                f"{out}: begun with other values of {', '.join(changed)} (see {path}); take another --out, "
                f"and start=STAGE.pt to begin with weights of this one"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(path, to_yaml(config))
    accelerator.wait_for_everyone()


class Average:
    """Exponential moving average of the trained parameters, quicker in the first steps."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.live, self.decay, self.steps = list(parameters), decay, 0
        self.mean = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    def store(self) -> None:
        """Write the averages into the parameters."""
        for p, mean in zip(self.live, self.mean, strict=True):
            p.data.copy_(mean)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"steps": self.steps, "mean": self.mean}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.steps = state["steps"]
        for mean, saved in zip(self.mean, state["mean"], strict=True):
            mean.copy_(saved)


def sow(*numbers: int) -> None:
    """Make torch's random numbers depend on `numbers` alone."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def rate_share(step: int, settings: StageConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, cosine to `settings.final`."""
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return warm * (settings.final + (1 - settings.final) * cosine)


class _Draws(Dataset[Batch | Exception]):
    """Batch k of a stage, whoever asks for it and when; or what is wrong with the data, for `_batches` to raise.

    Raised in a process of a DataLoader, it would come with the traceback of that process as its message.
    """

    def __init__(self, draw: Draw, seed: tuple[int, ...], rank: int, numbers: Sequence[tuple[int, int]]) -> None:
        self.draw, self.seed, self.rank, self.numbers = draw, seed, rank, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, k: int) -> Batch | Exception:
        try:
            return self.draw(np.random.default_rng([*self.seed, *self.numbers[k], self.rank]))
        except (OSError, ValueError) as error:
            return error


def _start_worker(_: int) -> None:
    """A drawing process: stopping is the parent's business, and one thread is its share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)


def _batches(
    run: Run, draw: Draw, seed: tuple[int, ...], numbers: Sequence[tuple[int, int]]
) -> Generator[Batch, None, None]:
    device = run.accelerator.device
    loader = DataLoader(
        _Draws(draw, seed, run.accelerator.process_index, numbers), batch_size=None, num_workers=run.workers,
        worker_init_fn=_start_worker, pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield send_to_device(batch, device)


class _Course:
    """A stage under way: model, optimiser, moving average, log and batches, from the step `first` on."""

    def __init__(self, stage: Stage, number: int, run: Run, saved: dict[str, Any] | None) -> None:
        """Make all ready for the first step; see `train`."""
        settings, accelerator = stage.settings, run.accelerator
        device = accelerator.device
        self.stage, self.number, self.run = stage, number, run
        # constants that a model makes on its way (grids, filters) are made where the model is
        self.there = device if device.type != "cpu" else nullcontext()
        stage.model.requires_grad_(False)
        self.groups = stage.groups()
        trained = [p for group in self.groups for p in group.parameters]
        for p in trained:
            p.requires_grad_(True)
        stage.to(device)
        # before the checkpoint's weights: what is prepared belongs to the weights that the stage began with
        with self.there, accelerator.autocast():
            stage.prepare(partial(_prepared, run, number))
        optimizer = stage.optimizer([{"params": group.parameters, "lr": group.rate} for group in self.groups])
        self.average = Average(trained, settings.ema) if settings.ema else None
        self.first = self._restore(saved, optimizer) if saved else 0
        self.log = Log(
            run.out if accelerator.is_main_process else None, stage.name, settings.log_every, settings.steps,
            self.first, saved["log"] if saved else None,
        )
        self.clipped = stage.clipped(self.groups)
        self.optimizer: Any
        self.model, self.optimizer = accelerator.prepare(stage, optimizer)
        accelerator.gradient_accumulation_steps, accelerator.step = settings.accumulate, 0
        stage.set_modes()
        numbers = [(step, micro) for step in range(self.first, settings.steps) for micro in range(settings.accumulate)]
        self.batches = _batches(run, stage.batch, (run.seed, number, TRAINING), numbers)

    def take(self, step: int) -> None:
        """One step of the optimiser, by all micro-batches of it; into the moving average and the log."""
        self.stage.step, settings = step, self.stage.settings
        rates = {group.name: group.rate * rate_share(step, settings) for group in self.groups}
        for entry, rate in zip(self.optimizer.param_groups, rates.values(), strict=True):
            entry["lr"] = rate
        sums: dict[str, Tensor] = {}
        for micro in range(settings.accumulate):
            for name, value in self._micro_step(step, micro).items():
                sums[name] = sums.get(name, 0) + value / settings.accumulate
        if self.average:
            self.average.update()
        self.log.add(step, sums, rates)

    def _micro_step(self, step: int, micro: int) -> dict[str, Tensor]:
        """Forward and backward; the last one of a step clips and moves the weights. Returns the losses."""
        accelerator, settings = self.run.accelerator, self.stage.settings
        self.batch = next(self.batches)
        sow(self.run.seed, self.number, CHANCE, step, micro, accelerator.process_index)
        with accelerator.accumulate(self.model), self.there:
            losses = self.model(self.batch)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and settings.clip:
                for together in self.clipped:
                    accelerator.clip_grad_norm_(together, settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: value.detach() for name, value in losses.items()}

    def show(self, step: int) -> None:
        """Pictures of the last batch, every so many steps."""
        every, accelerator = self.stage.settings.pictures_every, self.run.accelerator
        if not every or (step + 1) % every or not accelerator.is_main_process:
            return
        self.stage.eval()
        with torch.no_grad(), self.there, accelerator.autocast():
            self.log.pictures(step, self.stage.pictures(self.batch))
        self.stage.set_modes()

    def keep(self, step: int) -> None:
        """Write a checkpoint, every so many steps and where a signal came, but not after the last step.

        Raises:
            Stopped: a signal came.
            FloatingPointError: losses or weights are infinite or not a number.
        """
        settings, stopping = self.stage.settings, self.run.stopping()
        if step + 1 == settings.steps or not (stopping or (step + 1) % settings.checkpoint_every == 0):
            return
        log = self.log.state()
        self._check_weights()
        if self.run.accelerator.is_main_process:
            self._save(step + 1, log)
        if stopping:
            raise Stopped

    def close(self) -> None:
        """End the log and the drawing processes; let the accelerator's memory go."""
        self.log.close()
        self.batches.close()
        self.run.accelerator.free_memory()

    def conclude(self) -> None:
        """Leave the weights that are to be saved in the model. Raises FloatingPointError as `keep`."""
        self._check_weights()
        if self.average:
            self.average.store()
        self.stage.model.requires_grad_(False)
        self.stage.model.eval()

    def _check_weights(self) -> None:
        """A gradient may be no number where its loss was one, and only the next loss would show it."""
        for group in self.groups:
            if not all(bool(p.isfinite().all()) for p in group.parameters):
                raise FloatingPointError(
                    f"{self.stage.name}: expected finite weights, those of {group.name} are not; "
                    f"lower {self.stage.name}.rates, or set precision=no"
                )

    def _save(self, step: int, log: dict[str, Any]) -> None:
        scaler = self.run.accelerator.scaler
        content = {
            "stage": self.stage.name, "step": step, "processes": self.run.accelerator.num_processes,
            "model": self.stage.weights(), "optimizer": self.optimizer.state_dict(),
            "average": self.average.state() if self.average else None,
            "scaler": scaler.state_dict() if scaler else None, "log": log,
        }
        checkpoint.write(self.run.checkpoint, content)

    def _restore(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
        """Take over a checkpoint; the number of steps that were done."""
        accelerator = self.run.accelerator
        if saved["processes"] != accelerator.num_processes:
            raise ValueError(
                f"expected {saved['processes']} processes, with which the run was begun, got "
                f"{accelerator.num_processes}"
            )
        self.stage.load_weights(saved["model"])
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"{self.run.checkpoint}: expected the optimiser of this version: {error}; remove the file, and the "
                "stage begins anew"
            ) from error
        if self.average:
            self.average.load(saved["average"])
        if accelerator.scaler and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        return int(saved["step"])


def train(stage: Stage, number: int, run: Run, saved: dict[str, Any] | None = None) -> None:
    """All steps of a stage; at the end its model holds the weights that are to be saved.

    Args:
        stage: its model may be on any device, and is on the run's afterwards.
        number: of the stage in its recipe; makes its random numbers its own.
        run: where and by what.
        saved: the checkpoint of this stage, to go on with.

    Raises:
        Stopped: a signal came; the checkpoint is written.
        FloatingPointError: a loss or a weight is infinite or not a number; the last checkpoint was before that.
        ValueError: `saved` is of a run with another number of processes.
    """
    course = _Course(stage, number, run, saved)
    try:
        for step in range(course.first, stage.settings.steps):
            course.take(step)
            course.show(step)
            course.keep(step)
    finally:
        course.close()
    course.conclude()


def complete(stage: Stage, number: int, run: Run) -> None:
    """Train a stage, go on with it, or take over what it left in `run.out`/<stage>.pt.

    Raises: as `train`; FileNotFoundError and ValueError where a file of the run cannot be read or does not fit.
    """
    finished = run.out / f"{stage.name}.pt"
    if finished.exists():
        stage.load_finished(checkpoint.read(finished))
        return
    saved = checkpoint.read(run.checkpoint) if run.checkpoint.exists() else {"stage": None}
    train(stage, number, run, saved if saved["stage"] == stage.name else None)
    stage.conclude()
    if run.accelerator.is_main_process:
        checkpoint.write(finished, stage.finished())
        run.checkpoint.unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()
    if run.stopping():
        raise Stopped


def _prepared(run: Run, number: int, draw: Draw, count: int) -> Iterator[Batch]:
    for batch in _batches(run, draw, (run.seed, number, PREPARATION), [(k, 0) for k in range(count)]):
        if run.stopping():
            raise Stopped
        yield batch
