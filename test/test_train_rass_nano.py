"""Training and export of rass-nano on pictures of coloured shapes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

missing = [name for name in ("torch", "accelerate", "peft", "onnx") if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"training rass-nano needs {', '.join(missing)}", allow_module_level=True)

import cv2  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from training_runs import stopped_after  # noqa: E402

from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.labelled import IGNORE, open_labelled  # noqa: E402
from glesam_ros.models.rass_nano import RassNano as Segmenter  # noqa: E402
from glesam_ros.models.rass_nano_net import ADAPTED, RassNano, features_of  # noqa: E402
from glesam_ros.semantic import load_semantic  # noqa: E402
from glesam_ros.training import checkpoint, rass_nano_export  # noqa: E402
from glesam_ros.training.adapters import add_adapters  # noqa: E402
from glesam_ros.training.config import load_any  # noqa: E402
from glesam_ros.training.labelled_crops import VOID, LabelledScenes, load_labelled  # noqa: E402
from glesam_ros.training.nano import pretrained_backbone  # noqa: E402
from glesam_ros.training.rass_config import LabelledSourceConfig  # noqa: E402
from glesam_ros.training.rass_nano import Scr, class_weights, draw_streets, make_stage, relative_error  # noqa: E402
from glesam_ros.training.rass_nano_config import RASS_NANO_STAGES, RassNanoConfig  # noqa: E402

COLOURS = {"ground": (40, 90, 40), "red": (220, 40, 40), "blue": (40, 60, 230)}
CHANGES = (
    "sources=[{path: toys}]", "workers=0", "precision=no", "crop.height=64", "crop.width=96", "base.steps=30",
    "scr.steps=6", "rass.steps=4", "scr.rank=2", *(f"{s}.batch=2" for s in RASS_NANO_STAGES),
    *(f"{s}.checkpoint_every=3" for s in RASS_NANO_STAGES), *(f"{s}.log_every=2" for s in RASS_NANO_STAGES),
    "base.warm_up=0", "scr.warm_up=0", "rass.warm_up=0",
)

State = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("own_precision", "one_thread")


def toy(rng: np.random.Generator, height: int = 96, width: int = 128) -> tuple[np.ndarray[Any, Any], ...]:
    """Red and blue boxes on the ground, and a column without class at the right."""
    colours = np.array(list(COLOURS.values()), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    for k in (1, 2):
        x, y = rng.integers(4, width // 2), rng.integers(4, height // 2)
        labels[y : y + height // 3, x : x + width // 3] = k
    image = colours[labels]
    labels[:, -8:] = IGNORE
    return image, labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    folder = data / "toys"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "classes.json").write_text(json.dumps({"classes": list(COLOURS), "palette": list(COLOURS.values())}))
    rng = np.random.default_rng(0)
    for k in range(6):
        image, labels = toy(rng)
        cv2.imwrite(str(folder / "images" / f"{k}.png"), image[..., ::-1])
        cv2.imwrite(str(folder / "labels" / f"{k}.png"), labels)
    (folder / "train.txt").write_text("0\n1\n2\n3\n")
    (folder / "test.txt").write_text("4\n5\n")
    return data


@pytest.fixture(scope="module")
def scenes(data: Path) -> LabelledScenes:
    return load_labelled([LabelledSourceConfig("toys")], data)


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    changes = [part for change in CHANGES for part in ("--set", change)]
    return ["train", "rass_nano", "--data", str(data), "--out", str(out), "--device", "cpu", *changes, *more]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(data, out)) == 0
    return out


def changed(before: State, after: State) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stages_change_what_they_say_and_nothing_else(whole: Path) -> None:
    base, scr, rass = (checkpoint.read(whole / f"{name}.pt") for name in RASS_NANO_STAGES)
    pretrained = pretrained_backbone()
    moved = {name for name in base if name.startswith("backbone.") and "num_batches" not in name}
    same = {name for name in moved if torch.equal(base[name], pretrained[name.removeprefix("backbone.")])}
    # of the backbone the statistics stay as pretrained, and all weights learn
    assert same == {name for name in moved if "running" in name}
    # SCR: the adapted layers alone, without a trace of the adapters
    layers = {name for name in base if any(part in name for part in ("_expand_conv", "_project_conv"))}
    assert changed(base, scr) == layers and len(layers) == 31
    assert {"classes.weight", "smooth.0.0.weight", "backbone._conv_stem.weight"} <= changed(scr, rass)
    assert not {name for name in changed(scr, rass) if name.startswith("backbone") and "running" in name}


def test_the_update_of_scr_has_the_rank_that_was_asked(whole: Path) -> None:
    base, scr = (checkpoint.read(whole / f"{name}.pt") for name in ("base", "scr"))
    name = "backbone._blocks.12._expand_conv.weight"
    update = (scr[name] - base[name]).double()[:, :, 0, 0]
    values = torch.linalg.svdvals(update)
    assert values[1] > 0 and values[2] < 1e-5 * base[name].abs().max()


def test_merged_equals_adapters() -> None:
    torch.manual_seed(0)
    net = RassNano(3).eval()
    images = torch.randint(0, 256, (1, 64, 96, 3))
    with torch.no_grad():
        before = features_of(net.backbone, images)
    tuner = add_adapters(net.backbone, ADAPTED, 4)
    for name, p in net.backbone.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    layer = net.backbone._blocks[3]._expand_conv
    down, up = (getattr(layer, f"lora_{x}")["adapters"].weight[:, :, 0, 0] for x in "AB")
    expected = layer.base_layer.weight[:, :, 0, 0] + up @ down  # W0 + alpha / r B A, alpha = r
    with torch.no_grad():
        adapted = features_of(net.backbone, images)
        net.backbone = tuner.merge_and_unload()
        merged = features_of(net.backbone, images)
    assert torch.allclose(net.backbone._blocks[3]._expand_conv.weight[:, :, 0, 0], expected, atol=1e-6)
    for one, other, first in zip(adapted, merged, before, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
        assert (one - first).abs().max() > 1e-2 * one.abs().max()
    assert not [name for name, _ in net.named_parameters() if "lora" in name]
    assert ADAPTED.startswith("_blocks")


def test_fresh_adapters_change_nothing() -> None:
    torch.manual_seed(0)
    net = RassNano(3).eval()
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = net(images)
        add_adapters(net.backbone, ADAPTED, 4)
        assert torch.equal(net(images), before)


def test_base_learns_the_toys(whole: Path, data: Path) -> None:
    net = RassNano(3)
    net.load_state_dict(checkpoint.read(whole / "base.pt"))
    net.eval()
    right = total = 0
    for picture in open_labelled(data / "toys", "test"):
        with torch.no_grad():
            logits = net(torch.from_numpy(picture.image[None]))
        found = F.interpolate(logits, picture.labels.shape, mode="bilinear").argmax(1)[0].numpy()
        known = picture.labels != IGNORE
        right += int((found == picture.labels)[known].sum())
        total += int(known.sum())
        shares = np.bincount(picture.labels[known]) / known.sum()
        assert shares.max() < 0.85
    assert right / total > 0.93


def test_a_stopped_run_goes_on_and_ends_bit_equal(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stopped"
    command = arguments(data, out, "--set", f"start={whole}/base.pt", "--set", "base.steps=0")
    stopped_after(Scr, 2, command, monkeypatch, capsys)
    saved = checkpoint.read(out / "checkpoint.pt")
    assert saved["stage"] == "scr" and saved["step"] == 2 and not (out / "scr.pt").exists()
    assert main(command) == 0
    for name in ("scr", "rass"):
        assert not changed(checkpoint.read(whole / f"{name}.pt"), checkpoint.read(out / f"{name}.pt")), name


def test_scr_learns_to_restore(scenes: LabelledScenes, whole: Path) -> None:
    config = load_any("rass_nano", [*CHANGES, "scr.clear=0", "degradation.levels=[0, 0, 1]"])
    net = RassNano(3)
    net.load_state_dict(checkpoint.read(whole / "base.pt"))
    stage = make_stage("scr", net, config, scenes, class_weights(scenes, 0.35))
    assert isinstance(stage, Scr)
    for p in stage.parameters():
        p.requires_grad_(False)
    trained = [p for group in stage.groups() for p in group.parameters]
    for p in trained:
        p.requires_grad_(True)
    frozen = {name: p.clone() for name, p in stage.named_parameters() if "lora_" not in name}
    stage.set_modes()
    batch = stage.batch(np.random.default_rng(0))
    optimizer = torch.optim.Adam(trained, 2e-3)
    seen = []
    for _ in range(8):
        losses = stage(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append({name: float(value.detach()) for name, value in losses.items()})
    assert seen[-1]["restoration"] < 0.9 * seen[0]["restoration"]
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert all(torch.equal(p, dict(stage.named_parameters())[name]) for name, p in frozen.items())


def test_relative_error_has_known_answers() -> None:
    torch.manual_seed(0)
    target = [torch.randn(2, 4, 16, 16) * torch.tensor([1.0, 10, 0.1, 3]).reshape(1, 4, 1, 1) for _ in range(2)]
    assert float(relative_error(target, target)) == 0
    # the mean of each channel in its place leaves its variance
    means = [x.mean((0, 2, 3), keepdim=True).expand_as(x) for x in target]
    variances = [x.var((0, 2, 3), unbiased=False) for x in target]
    expected = torch.stack([(v / (v + v.mean() * 1e-3)).mean() for v in variances]).mean()
    assert float(relative_error(means, target)) == pytest.approx(float(expected), rel=1e-4)
    alone = [x[:, 1:2] for x in target]
    assert float(relative_error([x.mean() + 0 * x for x in alone], alone)) == pytest.approx(1 / 1.001, rel=1e-4)


def test_class_weights_have_known_answers(data: Path, scenes: LabelledScenes) -> None:
    pixels = np.zeros(3)
    for picture in scenes.folders[0]:
        pixels += np.bincount(picture.labels[picture.labels < 3], minlength=3)
    share = pixels / pixels.sum()
    weights = class_weights(scenes, 0.5).double().numpy()
    assert weights @ share == pytest.approx(1, abs=1e-6)
    assert weights[1] / weights[0] == pytest.approx((share[0] / share[1]) ** 0.5, rel=1e-5)
    assert class_weights(scenes, 0.0).tolist() == pytest.approx([1, 1, 1])
    # a class that no picture shows weighs as the rarest that one shows
    four = open_labelled(data / "toys", "train", [*COLOURS, "nowhere"], [*COLOURS.values(), (1, 2, 3)])
    more = class_weights(LabelledScenes((four,), np.ones(1)), 0.5).double().numpy()
    assert more[3] == more[:3].max() and np.allclose(more[:3], weights)


def test_labels_without_a_class_are_named(scenes: LabelledScenes) -> None:
    nothing = replace(scenes.folders[0], values=np.full_like(scenes.folders[0].values, IGNORE))
    with pytest.raises(ValueError, match="sources: expected labels with a class, found none in .* of toys; take other"):
        class_weights(LabelledScenes((nothing,), np.ones(1)), 0.5)


def test_labels_of_a_crop_stay_with_its_pixels(scenes: LabelledScenes) -> None:
    config = load_any("rass_nano", [*CHANGES, "crop.gamma=1", "crop.colour=1"])
    colours = np.array(list(COLOURS.values()))
    flips = set()
    for seed in range(20):
        batch = draw_streets(scenes, np.random.default_rng(seed), config, 1, 1.0)
        image, labels = batch["clear"][0].numpy(), batch["labels"][0].numpy()
        assert image.shape == (64, 96, 3) and labels.shape == (64, 96)
        nearest = ((image[..., None, :].astype(int) - colours) ** 2).sum(-1).argmin(-1)
        known = labels != VOID
        assert (nearest == labels)[known].mean() > 0.96  # edges are blended
        flips.add(bool((labels[:, 0] == VOID).any()))
        again = draw_streets(scenes, np.random.default_rng(seed), config, 1, 1.0)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert flips == {True, False}


def test_colours_change_within_their_range(scenes: LabelledScenes) -> None:
    seen = {}
    for name, changes in {"none": ["crop.gamma=1", "crop.colour=1"], "some": []}.items():
        config = load_any("rass_nano", [*CHANGES, *changes])
        drawn = [draw_streets(scenes, np.random.default_rng(k), config, 1, 1.0) for k in range(10)]
        seen[name] = [batch["clear"][0].float().mean((0, 1)) for batch in drawn]
    ratios = torch.stack(seen["some"]) / torch.stack(seen["none"])
    assert ratios.min() < 0.9 and ratios.max() > 1.1
    # a pixel v in 0..1 becomes at most 1.2 v^(1 / 1.4), and the darkest mean here is 0.15
    assert ratios.max() < 1.2 * 0.15 ** (1 / 1.4 - 1) and ratios.min() > 0.15**0.4 / 1.2


def test_clear_is_the_share_of_clear_inputs(scenes: LabelledScenes) -> None:
    config = load_any("rass_nano", CHANGES)
    same = []
    for clear in (1.0, 0.0, 0.5):
        batch = draw_streets(scenes, np.random.default_rng(1), config, 40, clear)
        same.append(int((batch["clear"] == batch["input"]).flatten(1).all(1).sum()))
    assert same[0] == 40 and same[1] == 0 and 10 < same[2] < 30


def exported(checkpoint: Path, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command line of the export."""
    command = ["export", "--checkpoint", checkpoint, "--folder", folder, "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--licence", "none", "--trained-on", "toys"])
    rass_nano_export.main()


def test_the_export_gives_the_node_the_same_classes(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    exported(whole / "rass.pt", data / "toys", weights, monkeypatch)
    said = capsys.readouterr().out
    report = json.loads(said[said.index("{") :])
    assert report["torch"] < 5e-3  # weights are stored in two bytes
    assert report["bytes"]["rass_nano.onnx"] == (weights / "rass_nano.onnx").stat().st_size < 8e6
    card = json.loads((weights / "rass_nano.json").read_text())
    assert card["trained_on"] == "toys" and card["classes"] == list(COLOURS)
    with_onnx = Segmenter("cpu", weights=weights)
    assert np.array_equal(with_onnx.palette, list(COLOURS.values())) and with_onnx.licence == "none"
    net = RassNano(3)
    net.load_state_dict(checkpoint.read(whole / "rass.pt"))
    net.eval()
    picture = open_labelled(data / "toys", "test")[0]
    logits = with_onnx.logits(picture.image)
    with torch.no_grad():
        expected = net(torch.from_numpy(picture.image[None]))[0].numpy()
    assert logits.shape == expected.shape == (3, 24, 32)
    assert np.abs(logits - expected).max() < 1e-2 * np.abs(expected).max()
    assert (logits.argmax(0) == expected.argmax(0)).mean() > 0.99


def test_a_run_ends_with_a_folder_that_the_node_takes(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((whole / "rass_nano" / "rass_nano.json").read_text())
    assert card["trained_on"] == "toys (train)" and card["palette"] == [list(colour) for colour in COLOURS.values()]
    # what is finished stays, and is no more than said
    before = (whole / "rass_nano" / "rass_nano.onnx").stat().st_mtime_ns
    assert main(arguments(data, whole)) == 0
    folder = whole / "rass_nano"
    assert capsys.readouterr().out.splitlines() == [
        f"model folder: {folder}", f"ros2 launch glesam_ros perception.launch.py semantic:={folder}"
    ]
    assert (folder / "rass_nano.onnx").stat().st_mtime_ns == before
    semantic = load_semantic(str(folder))
    assert semantic.classes == tuple(COLOURS)
    assert semantic.segment(np.zeros((96, 128, 3), np.uint8)).labels.shape == (96, 128)
    # a run without its last stage has none
    out = tmp_path / "base"
    ending = ("--set", f"start={whole / 'base.pt'}", "--set", "base.steps=0", "--set", "scr.steps=1", "--until", "scr")
    assert main(arguments(data, out, *ending)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"weights: {out / 'scr.pt'}"
    assert not (out / "rass_nano").exists()


@pytest.mark.parametrize("layout", ["ade20k", "names alone"])
def test_what_training_takes_the_export_takes(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("images/training", "annotations/training") if layout == "ade20k" else ("images", "labels")
    for part, ending in zip(parts, ("jpg", "png"), strict=True):
        (tmp_path / "set" / part).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "set" / part / f"a.{ending}"), np.ones((32, 32), np.uint8))
    if layout == "names alone":
        (tmp_path / "set" / "classes.txt").write_text("ground\nred\n")
        (tmp_path / "set" / "train.txt").write_text("a\n")
    scenes = load_labelled([LabelledSourceConfig("set")], tmp_path)
    checkpoint.write(tmp_path / "rass.pt", RassNano(len(scenes.classes)).state_dict())
    exported(tmp_path / "rass.pt", tmp_path / "set", tmp_path / "out", monkeypatch)
    card = json.loads((tmp_path / "out" / "rass_nano.json").read_text())
    assert (card["classes"], card["palette"]) == (list(scenes.classes), scenes.palette.tolist())


@pytest.mark.parametrize(
    "folder, weights, expected",
    [
        ("nowhere", "rass.pt", "nowhere: expected classes.json or classes.txt"),
        ("toys", "nothing.pt", "nothing.pt, found no file"),
        ("toys", "other.pt", "other.pt: expected weights of rass-nano"),
    ],
)
def test_an_export_that_fails_says_why_in_one_line(
    folder: str, weights: str, expected: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint.write(tmp_path / "rass.pt", RassNano(3).state_dict())
    checkpoint.write(tmp_path / "other.pt", RassNano(5).state_dict())
    with pytest.raises(SystemExit) as ended:
        exported(tmp_path / weights, data / folder, tmp_path / "out", monkeypatch)
    assert ended.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing is trained on a test split"):
        load_any("rass_nano", ["sources=[{path: toys, split: test}]"])
    with pytest.raises(ValueError, match="scr.rank: expected"):
        load_any("rass_nano", ["scr.rank=0"])
    with pytest.raises(ValueError, match="sources.0.kind: unknown key, expected one of path, split, weight"):
        load_any("rass_nano", ["sources=[{path: toys, kind: coco}]"])
    assert load_any("rass_nano") == RassNanoConfig()
    wrong = tmp_path / "wrong.pt"
    checkpoint.write(wrong, RassNano(5).state_dict())
    assert main(arguments(data, tmp_path / "out", "--set", f"start={wrong}")) == 1
    said = capsys.readouterr().err
    assert "expected weights of rass-nano" in said and said.count("\n") == 1
    assert main(arguments(data, tmp_path / "out", "--until", "decode")) == 1
    assert "--until: expected one of base, scr, rass for rass_nano, got decode" in capsys.readouterr().err
