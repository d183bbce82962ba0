"""The training loop: against the same steps written out, stopped and gone on with, in several processes."""

from __future__ import annotations

import csv
import math
import os
import resource
import signal
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")
pytest.importorskip("accelerate", reason="training needs accelerate; scripts/test.sh installs it")

from accelerate import Accelerator  # noqa: E402
from torch import nn  # noqa: E402
from training_runs import run_in_two_processes  # noqa: E402

from glesam_ros.training import checkpoint, loop  # noqa: E402
from glesam_ros.training.config import Config, StageConfig  # noqa: E402
from glesam_ros.training.full_config import FullConfig  # noqa: E402
from glesam_ros.training.log import Log  # noqa: E402
from glesam_ros.training.loop import (  # noqa: E402
    Adapting,
    Group,
    Run,
    Stage,
    Stop,
    Stopped,
    complete,
    make_accelerator,
    rate_share,
    settled,
    train,
)
from glesam_ros.training.rass_config import RassTrainingConfig  # noqa: E402
from glesam_ros.training.rass_nano_config import RassNanoConfig  # noqa: E402

SEED = 5


class Line(Stage):
    """A line through points, with dropout so that chance matters; `frozen` is not trained."""

    name = "line"

    def __init__(self, dropout: float = 0.0, norm: bool = True, **settings: Any) -> None:
        torch.manual_seed(1)
        model = nn.ModuleDict({
            "slope": nn.Linear(3, 1), "drop": nn.Dropout(dropout), "frozen": nn.Linear(1, 1),
            "norm": nn.BatchNorm1d(3) if norm else nn.Identity(),
        })
        super().__init__(model, StageConfig(**{
            "batch": 4, "warm_up": 2, "clip": 0.5, "ema": 0.9, "checkpoint_every": 1000, "log_every": 2,
            "pictures_every": 0, **settings,
        }))
        self.stop_at, self.calls, self.stop = -1, 0, Stop()

    def groups(self) -> list[Group]:
        return [Group("slope", list(self.model["slope"].parameters()), 0.05)]

    def set_modes(self) -> None:
        self.train()

    def batch(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        x = rng.normal(size=(self.settings.batch, 3)).astype(np.float32)
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(x.sum(1, keepdims=True))}

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.stop_at:
            self.stop.requested = True
        guess = self.model["slope"](self.model["drop"](self.model["norm"](batch["x"])))
        return {"loss": ((self.model["frozen"](guess) - batch["y"]) ** 2).mean()}

    def pictures(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        torch.rand(3), self.model["norm"](batch["x"])
        return {"grey": torch.full((4, 5, 3), 99, dtype=torch.uint8)}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def run_of(folder: Path, accelerator: Accelerator, stage: Line, workers: int = 0) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, SEED, workers, accelerator, stage.stop)


def trained(folder: Path, accelerator: Accelerator, workers: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    stage = Line(**settings)
    train(stage, 3, run_of(folder, accelerator, stage, workers))
    return stage.model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_hand(processes: int = 1, **settings: Any) -> Line:
    """The same steps without the loop: micro-batches of all processes make one gradient."""
    stage = Line(**settings)
    s = stage.settings
    parameters = list(stage.model["slope"].parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=s.weight_decay)
    mean = [p.detach().clone() for p in parameters]
    stage.train()
    for step in range(s.steps):
        warm = min(1.0, (step + 1) / s.warm_up)
        cosine = s.final + (1 - s.final) * (1 + math.cos(math.pi * step / s.steps)) / 2
        optimizer.param_groups[0]["lr"] = 0.05 * warm * cosine
        optimizer.zero_grad()
        for micro in range(s.accumulate):
            for rank in range(processes):
                losses = stage(stage.batch(np.random.default_rng([SEED, 3, 0, step, micro, rank])))
                (losses["loss"] / (s.accumulate * processes)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, s.clip)
        optimizer.step()
        decay = min(s.ema, (step + 1) / (step + 11))
        mean = [decay * m + (1 - decay) * p.detach() for m, p in zip(mean, parameters)]
    for p, m in zip(parameters, mean):
        p.data.copy_(m)
    return stage


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_adamw_with_accumulation_clipping_schedule_and_average(
    accumulate: int, tmp_path: Path, accelerator: Accelerator
) -> None:
    got = trained(tmp_path, accelerator, steps=7, accumulate=accumulate)
    expected = by_hand(steps=7, accumulate=accumulate).model.state_dict()
    assert all(torch.allclose(got[k], expected[k], atol=1e-6) for k in got)
    first = Line(steps=1).model.state_dict()
    assert not torch.equal(got["slope.weight"], first["slope.weight"])
    assert torch.equal(got["frozen.weight"], first["frozen.weight"])


def test_rates_warm_up_and_end_where_they_should() -> None:
    settings = StageConfig(steps=1000, warm_up=10, final=0.01)
    assert rate_share(0, settings) == pytest.approx(0.1, rel=1e-3)
    assert rate_share(500, settings) == pytest.approx(0.505)
    assert rate_share(1000, settings) == pytest.approx(0.01)
    constant = StageConfig(steps=10, warm_up=0, final=1.0)
    assert {rate_share(step, constant) for step in range(10)} == {1.0}


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"ema": 0.0}])
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_run_that_goes_on_ends_bit_equal(
    settings: dict[str, Any], stop_after: int, tmp_path: Path, accelerator: Accelerator
) -> None:
    settings = {"steps": 9, "dropout": 0.3, **settings}
    whole = trained(tmp_path / "whole", accelerator, **settings)
    stage = Line(**settings)
    stage.stop_at = stop_after * stage.settings.accumulate
    run = run_of(tmp_path / "cut", accelerator, stage)
    with pytest.raises(Stopped):
        train(stage, 3, run)
    saved = checkpoint.read(run.checkpoint)
    assert (saved["stage"], saved["step"]) == ("line", stop_after)
    again = Line(**settings)
    train(again, 3, run_of(tmp_path / "cut", accelerator, again), saved)
    assert equal(again.model.state_dict(), whole)
    assert again.calls == (9 - stop_after) * again.settings.accumulate
    tables = [list(csv.DictReader((tmp_path / name / "line.csv").open())) for name in ("whole", "cut")]
    assert [[(r["step"], r["loss"]) for r in t] for t in tables][0] == [(r["step"], r["loss"]) for r in tables[1]]
    assert [r["step"] for r in tables[1]] == ["2", "4", "6", "8", "9"]


def test_periodic_checkpoints_go_on_bit_equal_too(tmp_path: Path, accelerator: Accelerator) -> None:
    settings = {"steps": 8, "dropout": 0.3, "checkpoint_every": 3}
    whole = trained(tmp_path, accelerator, **settings)
    saved = checkpoint.read(tmp_path / "checkpoint.pt")
    assert saved["step"] == 6
    stage = Line(**settings)
    train(stage, 3, run_of(tmp_path, accelerator, stage), saved)
    assert equal(stage.model.state_dict(), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_after_the_step_and_the_old_handlers_come_back(
    number: signal.Signals, tmp_path: Path, accelerator: Accelerator
) -> None:
    class Signalled(Line):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if self.calls == 2:
                os.kill(os.getpid(), number)
            return super().forward(batch)

    before = signal.getsignal(number)
    stage = Signalled(steps=9)
    with stage.stop.signals(), pytest.raises(Stopped):
        train(stage, 3, run_of(tmp_path, accelerator, stage))
    assert checkpoint.read(tmp_path / "checkpoint.pt")["step"] == 3
    assert signal.getsignal(number) == before


def test_batches_drawn_ahead_are_the_same(tmp_path: Path, accelerator: Accelerator) -> None:
    inline = trained(tmp_path / "0", accelerator, steps=5, accumulate=2)
    assert equal(trained(tmp_path / "2", accelerator, workers=2, steps=5, accumulate=2), inline)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [FileNotFoundError("a.png: found none"), ValueError("sources: expected classes")])
def test_what_is_wrong_with_the_data_is_said_alike_by_drawing_processes(
    workers: int, error: Exception, tmp_path: Path, accelerator: Accelerator
) -> None:
    class Spoilt(Line):
        def batch(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
            raise error

    stage = Spoilt(steps=3)
    with pytest.raises(type(error)) as caught:
        train(stage, 3, run_of(tmp_path, accelerator, stage, workers))
    assert str(caught.value) == str(error)


def test_pictures_and_logs_change_nothing(tmp_path: Path, accelerator: Accelerator) -> None:
    plain = trained(tmp_path / "plain", accelerator, steps=4, dropout=0.3)
    pictures = trained(tmp_path / "pictures", accelerator, steps=4, dropout=0.3, pictures_every=1, log_every=1)
    assert equal(plain, pictures)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "pictures" / "tensorboard")).Reload()
    assert {"line/loss", "line/rate/slope", "line/seconds"} <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Scalars("line/loss")] == [1, 2, 3, 4]
    assert board.Scalars("line/rate/slope")[0].value == pytest.approx(0.05 / 2)
    assert [e.step for e in board.Images("line/grey")] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path: Path, accelerator: Accelerator) -> None:
    class Broken(Line):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            losses = super().forward(batch)
            return {"loss": losses["loss"] * (math.nan if self.calls > 5 else 1)}

    stage = Broken(steps=20, checkpoint_every=2, log_every=20)
    with pytest.raises(FloatingPointError, match=r"line: expected finite losses, loss is nan; lower line\.rates"):
        train(stage, 3, run_of(tmp_path, accelerator, stage))
    assert checkpoint.read(tmp_path / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("steps, broken", [(3, 3), (3, 1), (25, 25), (25, 21)])
def test_a_loss_after_the_last_whole_row_is_looked_at_too(
    steps: int, broken: int, tmp_path: Path, accelerator: Accelerator
) -> None:
    class Broken(Line):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            losses = super().forward(batch)
            return {"loss": losses["loss"] * (math.nan if self.calls == broken else 1)}

    stage = Broken(steps=steps, log_every=10)
    with pytest.raises(FloatingPointError, match="line: expected finite losses, loss is nan"):
        train(stage, 3, run_of(tmp_path, accelerator, stage))


@pytest.mark.parametrize("steps, broken, kept", [(20, 6, 4), (6, 6, 4), (2, 2, None)])
def test_weights_that_are_no_numbers_are_not_saved(
    steps: int, broken: int, kept: int | None, tmp_path: Path, accelerator: Accelerator
) -> None:
    class Broken(Line):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            losses = super().forward(batch)
            if self.calls < broken:
                return losses
            # a root has no gradient at 0
            return {"loss": losses["loss"] + (0 * self.model["slope"].weight).sqrt().sum()}

    stage = Broken(steps=steps, checkpoint_every=2, log_every=1)
    run = run_of(tmp_path, accelerator, stage)
    with pytest.raises(FloatingPointError, match=r"line: expected finite weights, those of slope are not; lower line"):
        complete(stage, 3, run)
    assert not (tmp_path / "line.pt").exists()
    assert (checkpoint.read(run.checkpoint)["step"] if run.checkpoint.exists() else None) == kept


def test_a_stage_shorter_than_a_row_has_one_all_the_same(tmp_path: Path, accelerator: Accelerator) -> None:
    trained(tmp_path / "short", accelerator, steps=3, log_every=10)
    (row,) = csv.DictReader((tmp_path / "short" / "line.csv").open())
    trained(tmp_path / "each", accelerator, steps=3, log_every=1)
    each = [float(r["loss"]) for r in csv.DictReader((tmp_path / "each" / "line.csv").open())]
    assert row["step"] == "3" and float(row["loss"]) == pytest.approx(sum(each) / 3, abs=2e-5)


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"a": torch.ones(3)})
    save = torch.save

    def half(content: Any, file: Any) -> None:
        save(content, file)
        os.truncate(file.fileno(), file.tell() // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {"a": torch.zeros(3)})
    assert checkpoint.read(path)["a"].tolist() == [1, 1, 1]
    monkeypatch.undo()
    checkpoint.write(path, {"a": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("numbers", [10, 100_000, 3_000_000])
def test_a_full_disk_is_said_in_the_words_of_the_system(numbers: int, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"a": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoint.write(path, {"a": torch.zeros(numbers)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(path)
    assert checkpoint.read(path)["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match=r"c\.pt"):
        checkpoint.read(path)
    checkpoint.write(path, {"a": torch.ones(1000)})
    whole = path.read_bytes()
    for size in (500, 1, 0):  # of an empty file torch says nothing
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"c\.pt: expected a checkpoint of torch, cannot read it: ."):
            checkpoint.read(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a dictionary of tensors, got list"):
        checkpoint.read(path)
    torch.save({"a": Stop()}, path)  # a pickle could run code; only tensors and plain values are read
    with pytest.raises(ValueError, match=r"c\.pt: expected tensors only"):
        checkpoint.read(path)


def test_rows_after_the_checkpoint_and_torn_rows_go(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("step,seconds,loss\n10,1.0,0.5\n20,2.0,0.4\n3")
    state = {"sums": {"loss": 1.0}, "count": 4, "seconds": 9.0}
    log = Log(tmp_path, "x", every=10, steps=100, first=14, state=state)
    for step in range(14, 20):
        log.add(step, {"loss": torch.tensor(0.5)}, {})
    log.close()
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [(r["step"], r["loss"]) for r in rows] == [("10", "0.5"), ("20", "0.4")]
    assert float(rows[1]["seconds"]) >= 9.0


@pytest.mark.parametrize("capability, precision, said", [
    ("AVX2", "bf16", True), ("DEFAULT", "bf16", True), ("AVX512", "bf16", False), ("AVX2", "no", False),
])
def test_emulated_bf16_is_said(
    capability: str, precision: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    # a second one of another precision is refused in one process
    monkeypatch.setattr(loop, "Accelerator", dict)
    make_accelerator("cpu", precision)
    assert ("may emulate bf16" in caplog.text) == said


@pytest.mark.parametrize("kind", [Config, FullConfig, RassTrainingConfig, RassNanoConfig])
@pytest.mark.parametrize("device, gpu, capability, precision", [
    ("cpu", (8, 0), "AVX2", "no"), ("cpu", None, "AVX512", "bf16"), ("auto", None, "AVX2", "no"),
    ("cpu", None, "DEFAULT", "no"), ("auto", None, "SVE256", "no"),
    ("auto", (7, 5), "AVX512", "no"), ("auto", (8, 0), "AVX2", "bf16"), ("cuda", (9, 0), "AVX2", "bf16"),
])
def test_auto_is_what_the_device_computes_in(
    kind: Any, device: str, gpu: tuple[int, int] | None, capability: str, precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    assert (config := kind()).precision == "auto"
    assert settled(config, device) == replace(config, precision=precision)
    own = replace(config, precision="no")
    assert settled(own, device) is own


def test_only_what_is_trained_has_gradients_and_nothing_has_afterwards(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    seen: set[tuple[str, bool]] = set()

    class Watched(Line):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            seen.update((name.split(".")[0], p.requires_grad) for name, p in self.model.named_parameters())
            return super().forward(batch)

    stage = Watched(steps=2)
    train(stage, 3, run_of(tmp_path, accelerator, stage))
    assert seen == {("slope", True), ("frozen", False), ("norm", False)}
    assert not any(p.requires_grad for p in stage.model.parameters()) and not stage.model.training


def test_each_micro_batch_has_chance_of_its_own(tmp_path: Path, accelerator: Accelerator) -> None:
    class Rolling(Line):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.rolled = [*getattr(self, "rolled", []), float(torch.rand(1))]
            return super().forward(batch)

    first, again, other = Rolling(steps=3, accumulate=2), Rolling(steps=3, accumulate=2), Rolling(steps=1)
    for number, stage in ((3, first), (3, again), (4, other)):
        train(stage, number, run_of(tmp_path, accelerator, stage))
    assert len({*first.rolled, *other.rolled}) == 7 and first.rolled == again.rolled


def test_a_finished_stage_is_taken_over_and_leaves_no_checkpoint(tmp_path: Path, accelerator: Accelerator) -> None:
    first, again = Line(steps=4, checkpoint_every=2), Line(steps=4, checkpoint_every=2)
    complete(first, 3, run_of(tmp_path, accelerator, first))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["line.pt"]
    complete(again, 3, run_of(tmp_path, accelerator, again))
    assert again.calls == 0 and equal(again.model.state_dict(), first.model.state_dict())


def test_the_checkpoint_of_another_stage_is_not_gone_on_with(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = Line(steps=3)
    run = run_of(tmp_path, accelerator, stage)
    checkpoint.write(run.checkpoint, {"stage": "other", "step": 2})
    complete(stage, 3, run)
    assert stage.calls == 3


def test_a_signal_in_the_last_step_ends_the_run_after_the_stage(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = Line(steps=3)
    stage.stop_at = 3
    with pytest.raises(Stopped):
        complete(stage, 3, run_of(tmp_path, accelerator, stage))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["line.pt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_is_that_of_the_system(number: signal.Signals) -> None:
    stop = Stop()
    with stop.signals():
        os.kill(os.getpid(), number)
        assert stop.requested and signal.getsignal(number) == signal.SIG_DFL


def test_what_is_prepared_is_drawn_apart_from_training_and_may_be_stopped(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    class Preparing(Line):
        def prepare(self, drawn: Any) -> None:
            self.seen = [batch["x"] for batch in drawn(self.batch, 3)]

    stages = [Preparing(steps=3), Preparing(steps=3)]
    for stage in stages:
        train(stage, 3, run_of(tmp_path, accelerator, stage))
    first, again = (stage.seen for stage in stages)
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    trained_on = [stages[0].batch(np.random.default_rng([SEED, 3, 0, step, 0, 0]))["x"] for step in range(3)]
    assert not any(torch.equal(a, b) for a in first for b in [*trained_on, *[x for x in first if x is not a]])
    stopped = Preparing(steps=3)
    stopped.stop.requested = True
    with pytest.raises(Stopped):
        train(stopped, 3, run_of(tmp_path, accelerator, stopped))
    assert stopped.calls == 0


class Few(Adapting, Line):
    """Trains a slope of the model, and something beside it."""

    def __init__(self, width: int = 1) -> None:
        super().__init__(steps=1)
        self.beside = nn.Linear(width, 1)

    def groups(self) -> list[Group]:
        trained = [*self.model["slope"].parameters(), *self.beside.parameters()]
        return [Group("slope", trained, 0.05)]


def test_an_adapting_stage_keeps_what_it_trains_and_hands_on_what_is_of_its_model() -> None:
    stage, other = Few(), Few()
    kept = {"model.slope.weight", "model.slope.bias", "beside.weight", "beside.bias"}
    assert set(stage.weights()) == kept
    assert set(stage.finished()) == {"model.slope.weight", "model.slope.bias"}
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    frozen = stage.model["frozen"].weight.clone()
    stage.load_weights(other.weights())
    assert equal(stage.weights(), other.weights()) and torch.equal(stage.model["frozen"].weight, frozen)
    missing = {name: value for name, value in other.weights().items() if name != "beside.bias"}
    for wrong in (Few(2).weights(), missing, {**other.weights(), "more": torch.ones(1)}):
        before = {name: value.clone() for name, value in stage.weights().items()}
        with pytest.raises(ValueError, match="line: expected the weights of this stage, .* does not fit"):
            stage.load_weights(wrong)
        assert equal(stage.weights(), before)
    with pytest.raises(ValueError, match=r"expected the weights of this stage, beside\.weight"):
        stage.load_finished(other.weights())


def test_another_number_of_processes_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    trained(tmp_path, accelerator, steps=4, checkpoint_every=2)
    saved = {**checkpoint.read(tmp_path / "checkpoint.pt"), "processes": 4}
    stage = Line(steps=4)
    with pytest.raises(ValueError, match="expected 4 processes, with which the run was begun, got 1"):
        train(stage, 3, run_of(tmp_path, accelerator, stage), saved)


def test_two_processes_make_one_gradient(tmp_path: Path) -> None:
    """Over gloo; without the batch normalisation, whose statistics are those of the first process."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from accelerate import Accelerator
        import test_train_loop as t
        out = Path(sys.argv[1])
        accelerator = Accelerator(cpu=True)
        stage = t.Line(steps=3, accumulate=2, norm=False)
        stage.stop_at = 4 if accelerator.process_index else -1  # the signal reaches one of them
        try:
            t.train(stage, 3, t.run_of(out, accelerator, stage))
        except t.Stopped:
            accelerator.wait_for_everyone()
            saved = t.checkpoint.read(out / "checkpoint.pt")
            assert saved["step"] == 2 and saved["processes"] == 2
            stage = t.Line(steps=3, accumulate=2, norm=False)
            t.train(stage, 3, t.run_of(out, accelerator, stage), saved)
        torch.save(stage.model.state_dict(), out / f"{accelerator.process_index}.pt")
    """)
    run_in_two_processes(program, str(tmp_path))
    expected = by_hand(2, steps=3, accumulate=2, norm=False).model.state_dict()
    for rank in range(2):
        got = checkpoint.read(tmp_path / f"{rank}.pt")
        assert all(torch.allclose(got[k], expected[k], atol=1e-6) for k in got)
    assert [row["step"] for row in csv.DictReader((tmp_path / "line.csv").open())] == ["2", "3"]
