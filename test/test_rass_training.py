"""The recipe of SCR and RASS on tiny networks: crops, what a stage learns and leaves alone, stops, files."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")
NEEDED = ("accelerate", "diffusers", "peft", "PIL", "pydantic", "scipy", "tensorboard", "transformers")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(f"training RASS needs {', '.join(missing)}", allow_module_level=True)

import yaml  # noqa: E402
from torch import nn  # noqa: E402
from training_runs import run_in_two_processes, same_tensors, stopped_after, trained_on_one_batch  # noqa: E402

from glesam_ros import ade20k  # noqa: E402
from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.labelled import IGNORE, LabelledPicture, open_labelled  # noqa: E402
from glesam_ros.models.glesam.enhancer import load_text_encoder, load_unet  # noqa: E402
from glesam_ros.models.rass import rass as rass_model  # noqa: E402
from glesam_ros.models.rass.rass import load_rass, masks_of, read_rass  # noqa: E402
from glesam_ros.models.rass.scr import ClassPrompts, Scr, load_vae, merge_lora, read_scr, tokenise  # noqa: E402
from glesam_ros.training import checkpoint, labelled_crops, rass  # noqa: E402
from glesam_ros.training import config as configs  # noqa: E402
from glesam_ros.training.config import load_any  # noqa: E402
from glesam_ros.training.labelled_crops import (  # noqa: E402
    VOID,
    LabelledScenes,
    draw_labelled,
    draw_labelled_crop,
    load_labelled,
)
from glesam_ros.training.random_sd import write_random_sd  # noqa: E402
from glesam_ros.training.rass_config import (  # noqa: E402
    RASS_STAGES,
    LabelledCropConfig,
    LabelledSourceConfig,
    RassTrainingConfig,
)
from glesam_ros.training.semantic_constraint import (  # noqa: E402
    AttentionMaps,
    restoration_loss,
    semantic_constraint,
)

COLOURS = {"sky": (120, 170, 240), "red board": (210, 40, 40), "ground": (70, 90, 40)}
SOURCES = "sources=[{path: shapes, split: train}]"
Array = np.ndarray[Any, Any]


pytestmark = pytest.mark.usefixtures("own_precision", "one_thread")


def shapes(seed: int) -> tuple[Array, Array]:
    """A picture (96, 128, 3) uint8 RGB of a board before sky and ground, and its classes; a strip has none."""
    rng = np.random.default_rng(seed)
    labels = np.full((96, 128), 2, np.uint8)
    labels[: int(rng.integers(24, 56))] = 0
    x, y = int(rng.integers(8, 70)), int(rng.integers(20, 50))
    labels[y : y + 40, x : x + 50] = 1
    image = np.array(list(COLOURS.values()), np.int64)[labels] + rng.integers(-20, 21, (96, 128, 3))
    labels[:, :6] = IGNORE
    return np.clip(image, 0, 255).astype(np.uint8), labels


def write_folder(folder: Path, splits: dict[str, list[int]], classes: Any = None) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for split, seeds in splits.items():
        for seed in seeds:
            image, labels = shapes(seed)
            cv2.imwrite(str(folder / "images" / f"{seed}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            cv2.imwrite(str(folder / "labels" / f"{seed}.png"), labels)
        (folder / f"{split}.txt").write_text("\n".join(map(str, seeds)))
    listed = {"classes": list(COLOURS), "palette": list(COLOURS.values())} if classes is None else classes
    (folder / "classes.json").write_text(json.dumps(listed))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a labelled folder: pictures to train on, and to test on."""
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "shapes", {"train": [0, 1, 2, 3, 4, 5], "test": [6, 7, 8]})
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Stable Diffusion of a `random` run."""
    return write_random_sd(tmp_path_factory.mktemp("sd"), 10)


def tiny(*changes: str) -> RassTrainingConfig:
    config = load_any("rass_tiny", [SOURCES, *changes])
    assert isinstance(config, RassTrainingConfig)
    return config


def plain(sd: Path) -> Scr:
    return Scr(load_unet(sd / "unet"), load_vae(sd / "vae"))


def scr_stage(sd: Path, data: Path, *changes: str) -> rass.Restore:
    config = tiny(*changes)
    return rass.make_scr(plain(sd), load_text_encoder(sd), config, load_labelled(config.sources, data))


def rass_stage(sd: Path, data: Path, *changes: str) -> rass.Segment:
    config = tiny(*changes)
    scenes = load_labelled(config.sources, data)
    return rass.make_rass(plain(sd), ClassPrompts(sd)(scenes.classes), config, scenes)


STAGE = {"scr": scr_stage, "rass": rass_stage}


def as_trained(stage: rass.RassStage) -> None:
    """What `train` does before the first step."""
    stage.model.requires_grad_(False)
    for group in stage.groups():
        for p in group.parameters:
            p.requires_grad_(True)
    stage.set_modes()


# configurations


def test_the_defaults_are_the_published_ones_and_written_out() -> None:
    config = RassTrainingConfig()
    assert load_any("rass_ade20k") == config

    def keys(tree: Any, prefix: str = "") -> set[str]:
        if not isinstance(tree, dict):
            return {prefix}
        return {key for name, value in tree.items() for key in keys(value, f"{prefix}.{name}")}

    written = yaml.safe_load((configs.CONFIGS / "rass_ade20k.yaml").read_text())
    assert keys(written) == keys(configs.to_dict(config))
    stage = config.rass
    assert (stage.steps, stage.batch * stage.accumulate, stage.rank, config.crop.side) == (160_000, 16, 4, 512)
    assert (stage.weight_decay, stage.clip, stage.rates.head) == (0.05, 0.01, 1e-4)
    assert stage.rates.backbone == pytest.approx(0.1 * stage.rates.head)
    assert (config.scr.rank, config.scr.rates.adapters) == (4, 5e-5)
    assert rass.stages_of(config) == ["scr", "rass"] and rass.stages_of(load_any("rass_scr")) == ["scr"]
    assert configs.differences(configs.to_dict(config), configs.to_dict(load_any("rass_scr"))) == ["rass.steps"]


@pytest.mark.parametrize(
    "change, expected",
    [
        ("crop.side=100", "crop.side: expected a multiple of 64, got 100"),
        ("crop.scale=[2, 1]", "crop.scale: expected the smaller number first, got [2.0, 1.0]"),
        ("rass.rates.heads=1", "rass.rates.heads: unknown key, expected one of head, backbone"),
        ("scr.rank=0", "scr.rank: expected greater than or equal to 1, got 0"),
        ("scr.semantic=-1", "scr.semantic: expected greater than or equal to 0, got -1"),
        ("precision=fp16", "precision: expected 'auto', 'no' or 'bf16', got 'fp16'"),
        ("sources=[]", "sources: expected at least 1 entry, found 0"),
        ("sources=[{path: x, split: test}]", "sources.0.split: expected a split for training, got 'test'"),
        ("sources=[{path: x, split: validation}]", "sources.0.split: expected a split for training, got 'validation'"),
        ("sources=[{path: x, split: val}]", "sources.0.split: expected a split for training, got 'val'"),
    ],
)
def test_what_does_not_fit_is_named(change: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        load_any("rass_tiny", [change])
    assert expected in str(error.value) and "\n" not in str(error.value)


# crops


class One(LabelledScenes):
    """Always the same picture."""

    def __init__(self, image: Array, labels: Array, ignore: int = IGNORE) -> None:
        object.__setattr__(self, "picture", LabelledPicture(image, labels, "one"))
        object.__setattr__(self, "void", ignore)

    @property
    def ignore(self) -> int:
        return self.void

    def draw(self, rng: np.random.Generator) -> LabelledPicture:
        return self.picture


@pytest.fixture
def true_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_crops, "jitter", lambda image, rng: image)


def test_a_crop_at_scale_1_is_the_picture_or_its_mirror_image(true_colours: None) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (64, 64), dtype=np.uint8)
    labels[rng.random((64, 64)) < 0.1] = IGNORE
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    wanted = np.where(labels == IGNORE, VOID, labels.astype(int))
    seen = set()
    for seed in range(12):
        found, classes = draw_labelled_crop(
            One(image, labels), np.random.default_rng(seed), LabelledCropConfig(64, (1.0, 1.0))
        )
        mirrored = not np.array_equal(found, image)
        step = -1 if mirrored else 1
        assert np.array_equal(found, image[:, ::step]) and np.array_equal(classes, wanted[:, ::step])
        seen.add(mirrored)
    assert seen == {True, False}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_picture_half_as_large_is_made_larger_about_its_centre(flip: float) -> None:
    rng = np.random.default_rng(0)
    labels, image = rng.integers(0, 3, (32, 32), np.uint8), rng.integers(0, 256, (32, 32, 3), np.uint8)
    step = -1 if flip else 1
    for seed in range(5):
        found, classes = draw_labelled(One(image, labels), np.random.default_rng(seed), 64, 64, (1.0, 1.0), flip)
        assert np.array_equal(classes, labels.repeat(2, 0).repeat(2, 1)[:, ::step])
        expected = cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)[:, ::step]
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_fine_texture_is_smoothed_before_a_crop_is_made_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    image, _ = draw_labelled(
        One(noise, np.zeros((512, 512), np.uint8)), np.random.default_rng(1), 64, 64, (1.0, 1.0)
    )
    # a Gaussian of sigma s leaves 1 / (2 s sqrt(pi)) of white noise
    assert image.std() == pytest.approx(noise.std() / (2 * 0.4 * 8 * np.sqrt(np.pi)), rel=0.25)


def test_beyond_the_picture_its_edge_is_repeated_and_crops_for_training_are_recoloured() -> None:
    one = One(np.full((50, 50, 3), 99, np.uint8), np.full((50, 50), 7, np.uint8))
    plain = [draw_labelled(one, np.random.default_rng(k), 64, 64, (0.5, 0.5))[0] for k in range(5)]
    assert all((image == 99).all() for image in plain)
    crop = LabelledCropConfig(64, (0.5, 0.5))
    recoloured = [draw_labelled_crop(one, np.random.default_rng(k), crop)[0] for k in range(5)]
    assert all((image == image[0, 0]).all() for image in recoloured)
    assert len({tuple(image[0, 0]) for image in recoloured}) == 5


@pytest.mark.parametrize("size", [(96, 128), (200, 70)])
def test_labels_lie_on_what_they_name(size: tuple[int, int], true_colours: None) -> None:
    rng = np.random.default_rng(1)
    labels = cv2.resize(rng.integers(0, 3, (6, 6), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    palette = np.array(list(COLOURS.values()), np.uint8)
    for seed in range(8):
        image, classes = draw_labelled_crop(
            One(palette[labels], labels), np.random.default_rng(seed), LabelledCropConfig(64, (0.7, 2.0))
        )
        named = np.abs(image[..., None, :].astype(int) - palette).sum(-1).argmin(-1)
        inside = classes != VOID
        # colours of the border between two classes are mixed
        assert inside.any() and (named == classes)[inside].mean() > 0.9
        edge = cv2.morphologyEx(named.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
        assert (named == classes)[inside & ~edge].all()


def test_beyond_the_picture_nothing_has_a_class() -> None:
    image, labels = np.full((50, 50, 3), 99, np.uint8), np.full((50, 50), 7, np.uint8)
    corners = set()
    for seed in range(10):
        _, classes = draw_labelled_crop(
            One(image, labels), np.random.default_rng(seed), LabelledCropConfig(64, (0.5, 0.5))
        )
        assert set(np.unique(classes)) == {VOID, 7}
        rows, columns = np.nonzero(classes == 7)
        assert np.ptp(rows) in (31, 30) and len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        corners.add((rows[0], columns[0]))
    assert len(corners) > 5


def test_many_classes_and_none(true_colours: None) -> None:
    image, labels = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 40_000, np.uint16)
    labels[:32] = 65535
    _, classes = draw_labelled_crop(
        One(image, labels, 65535), np.random.default_rng(0), LabelledCropConfig(64, (1.0, 1.0))
    )
    assert set(np.unique(classes)) == {VOID, 40_000} and classes.dtype == np.int32
    with pytest.raises(ValueError, match="expected pictures with classes, found 100 crops in a row without"):
        draw_labelled_crop(
            One(image, np.full_like(labels, 65535), 65535), np.random.default_rng(0), LabelledCropConfig(64)
        )


def test_sources(data: Path, tmp_path: Path) -> None:
    scenes = load_labelled((LabelledSourceConfig("shapes"),), data)
    assert scenes.classes == tuple(COLOURS) and len(scenes.folders[0]) == 6  # the training split alone
    names = {scenes.draw(np.random.default_rng(seed)).name for seed in range(60)}
    assert names == {"0", "1", "2", "3", "4", "5"}
    write_folder(tmp_path / "few", {"train": [9]})
    (tmp_path / "shapes").symlink_to(data / "shapes")
    both = load_labelled((LabelledSourceConfig("few", weight=20.0), LabelledSourceConfig("shapes")), tmp_path)
    share = np.mean([both.draw(np.random.default_rng(seed)).name == "9" for seed in range(400)])
    assert share == pytest.approx(20 / 26, abs=0.07)
    write_folder(tmp_path / "other", {"train": [10]}, {"classes": ["road", *list(COLOURS)[1:]]})
    write_folder(tmp_path / "turned", {"train": [10]}, {"classes": list(COLOURS)[::-1]})
    for path, expected in (("other", "differs in road, sky"), ("turned", "turned differs in another order")):
        with pytest.raises(ValueError, match=expected):
            load_labelled((LabelledSourceConfig("few"), LabelledSourceConfig(path)), tmp_path)
    with pytest.raises(ValueError, match=r"got 'all' of .*shapes, which has the split 'test'"):
        load_labelled((LabelledSourceConfig("shapes", "all"),), data)
    assert len(load_labelled((LabelledSourceConfig("few", "all"),), tmp_path).folders[0]) == 1
    for k, name in enumerate(("validation.txt", "images/val")):
        write_folder(tmp_path / str(k), {"train": [9]})
        (tmp_path / str(k) / name).touch() if k == 0 else (tmp_path / str(k) / name).mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match="which has the split 'val"):
            load_labelled((LabelledSourceConfig(str(k), "all"),), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sources\.0\.path: expected a folder .*nowhere, found none; --data"):
        load_labelled((LabelledSourceConfig("nowhere"),), data)


def test_ade20k_without_a_list_has_its_own_classes(tmp_path: Path) -> None:
    for part, ending in (("images", "jpg"), ("annotations", "png")):
        (tmp_path / "ade" / part / "training").mkdir(parents=True)
        picture = np.full((64, 64, 3) if part == "images" else (64, 64), 5, np.uint8)
        cv2.imwrite(str(tmp_path / "ade" / part / "training" / f"a.{ending}"), picture)
    scenes = load_labelled((LabelledSourceConfig("ade", "training"),), tmp_path)
    assert scenes.classes == ade20k.CLASSES and np.array_equal(scenes.palette, ade20k.PALETTE)
    _, classes = draw_labelled_crop(scenes, np.random.default_rng(0), LabelledCropConfig(64, (1.0, 1.0)))
    assert set(np.unique(classes)) == {4}  # 0 is unlabelled, 5 the fifth class


def test_inputs_are_degraded_but_for_the_clear_share(data: Path) -> None:
    config = tiny("crop.scale=[0.8, 1.5]")
    scenes = load_labelled(config.sources, data)
    batch = rass.draw_crops(scenes, np.random.default_rng(3), config, 24, 0.4)
    again = rass.draw_crops(scenes, np.random.default_rng(3), config, 24, 0.4)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    same = (batch["clear"] == batch["input"]).flatten(1).all(1)
    assert 4 <= same.sum() <= 16
    assert all(batch[key].shape == (24, 64, 64, 3) for key in ("clear", "input"))
    assert batch["labels"].dtype == torch.int16 and set(batch["labels"].unique().tolist()) == {VOID, 0, 1, 2}


# SCR


def test_a_prompt_names_the_classes_of_its_crop(sd: Path, data: Path) -> None:
    stage = scr_stage(sd, data)
    labels = torch.full((8, 8), VOID)
    labels[:2], labels[2:5], labels[5, 0] = 0, 2, 1
    assert rass.classes_of(labels) == [2, 0, 1]
    prompt, spans = stage.prompts([[2, 0, 1], [1]])
    for k, names in enumerate((["ground", "sky", "red board"], ["red board"])):
        ids, places = tokenise(stage.tokenizer, names)
        assert spans[k] == places
        with torch.no_grad():
            torch.testing.assert_close(prompt[k : k + 1], stage.text(ids).last_hidden_state)
    with pytest.raises(ValueError, match="expected names in words"):
        config = tiny()
        scenes = load_labelled(config.sources, data)
        odd = copy.copy(scenes.folders[0])
        object.__setattr__(odd, "classes", (*scenes.classes[:2], "_"))
        rass.make_scr(plain(sd), load_text_encoder(sd), config, LabelledScenes((odd,), scenes.upto))


def test_the_loss_of_scr_is_restoration_and_constraint(sd: Path, data: Path) -> None:
    stage = scr_stage(sd, data, "scr.semantic=0.3")
    batch = stage.batch(np.random.default_rng(2))
    with torch.no_grad():
        losses = stage(batch)
    stage.close()
    scr = stage.model
    maps = AttentionMaps(scr.unet)
    clear, bad = (batch[key].permute(0, 3, 1, 2).float() / 127.5 - 1 for key in ("clear", "input"))
    named = [rass.classes_of(x) for x in batch["labels"]]
    with torch.no_grad():
        prompt, spans = stage.prompts(named)
        restored = scr(bad, prompt)
    constraint = semantic_constraint(maps.take((8, 8)), spans, named, batch["labels"], VOID)
    wanted = restoration_loss(restored, clear) + 0.3 * (constraint.place + constraint.choice)
    assert losses["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert losses["unrestored"].item() == pytest.approx(restoration_loss(bad, clear).item(), rel=1e-5)
    assert constraint.place > 0 and constraint.choice > 0


def test_without_a_weight_nothing_reads_the_attention(sd: Path, data: Path) -> None:
    stage = scr_stage(sd, data, "scr.semantic=0.0")
    assert stage.attention is None
    with torch.no_grad():
        losses = stage(stage.batch(np.random.default_rng(2)))
    assert set(losses) == {"loss", "restoration", "unrestored"} and losses["loss"] == losses["restoration"]


@pytest.mark.parametrize("name", RASS_STAGES)
def test_gradient_checkpointing_changes_no_gradient(name: str, sd: Path, data: Path) -> None:
    found = []
    for on in (False, True):
        stage = STAGE[name](sd, data, "scr.semantic=0.3")
        as_trained(stage)
        if on:
            stage.model.unet.enable_gradient_checkpointing()
            if name == "scr":
                stage.model.vae.enable_gradient_checkpointing()
        for _ in range(2):  # the second pass finds what the backward pass of the first left
            torch.manual_seed(0)  # points at which masks are compared
            stage(stage.batch(np.random.default_rng(2)))["loss"].backward()
        found.append([p.grad for group in stage.groups() for p in group.parameters])
    assert all(x is not None for x in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert sum(x.abs().sum() for x in found[0]) > 0


# stages


LEARNING = {
    # changes, losses that fall with the share of the first that is left at most
    "scr": (
        ("scr.steps=10", "scr.warm_up=0", "scr.rates.adapters=1.0e-2", "scr.semantic=0.05"),
        {"loss": 0.95, "restoration": 0.97, "place": 0.8, "choice": 0.8},
    ),
    "rass": (
        ("rass.steps=12", "rass.clip=1.0", "rass.rates.head=5.0e-3", "rass.rates.backbone=1.0e-3"),
        {"loss": 0.8, "class": 0.8, "dice": 0.9},
    ),
}


@pytest.mark.parametrize("name", RASS_STAGES)
def test_a_stage_learns_and_leaves_alone_what_it_freezes(
    name: str, sd: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, falling = LEARNING[name]
    stage = STAGE[name](sd, data, *changes)
    before = {key: p.clone() for key, p in stage.named_parameters()}
    buffers = copy.deepcopy(dict(stage.named_buffers()))
    trained = set(stage.weights())
    losses = trained_on_one_batch(stage, tmp_path, monkeypatch)
    for loss, left in falling.items():
        assert np.mean([row[loss] for row in losses[-3:]]) < left * np.mean([row[loss] for row in losses[:3]]), loss
    moved = {key for key, p in stage.named_parameters() if not torch.equal(p, before[key])}
    # the middle of this small U-Net has one position, over which attention has no choice: no gradient but rounding
    idle = {key for key in trained if re.search(r"mid_block.*\.attn1\.to_[qk]\.lora_B\.", key)}
    assert trained - idle <= moved <= trained
    assert all(torch.equal(value, buffers[key]) for key, value in stage.named_buffers())
    own = {"scr": ("model.unet.",), "rass": ("model.unet.", "model.projections.", "model.head.")}[name]
    assert all(key.startswith(own) for key in moved)
    unet = {key for key in moved if key.startswith("model.unet.")}
    ends = ("_encoder", "_decoder", "_others") if name == "scr" else ("_encoder_s2", "_decoder_s2", "_others_s2")
    groups = {key.split(".")[-2] for key in unet if ".lora_" in key}
    assert groups == {f"default{end}" for end in ends}
    assert all(".lora_" in key or ".conv_in." in key for key in unet)


def test_merged_scr_is_what_was_trained(sd: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = scr_stage(sd, data, "scr.steps=3", "scr.warm_up=0", "scr.rates.adapters=3.0e-2")
    trained_on_one_batch(stage, tmp_path, monkeypatch)
    stage.close()
    scr = stage.model
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompt, _ = stage.prompts([[0, 1], [2]])
        before = scr.restore(x, prompt)
        fresh = plain(sd).restore(x, prompt)
        merge_lora(scr.unet)
        after = scr.restore(x, prompt)
    assert not any(".lora_" in key for key, _ in scr.unet.named_parameters())
    assert (after - before).abs().max() < 1e-5 < (before - fresh).abs().max()


def test_optimiser_of_rass(sd: Path, data: Path) -> None:
    stage = rass_stage(sd, data)
    as_trained(stage)
    settings = load_any("rass_ade20k").rass
    stage.settings = settings
    optimizer = stage.optimizer([{"params": group.parameters, "lr": group.rate} for group in stage.groups()])
    assert isinstance(optimizer, torch.optim.AdamW)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    norms = [m for m in stage.model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.Embedding))]
    apart = {id(p) for m in norms for p in m.parameters()}
    for key, p in stage.model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in found
            continue
        rate = 1e-4 if key.startswith("head.") else 1e-5
        assert found[id(p)] == (pytest.approx(rate), 0.0 if id(p) in apart else 0.05), key
    assert {rate for rate, _ in found.values()} == {1e-4, 1e-5} and {decay for _, decay in found.values()} == {0, 0.05}


def test_the_loss_of_rass_is_that_of_its_network(sd: Path, data: Path) -> None:
    stage = rass_stage(sd, data)
    stage.set_modes()
    batch = stage.batch(np.random.default_rng(2))
    with torch.no_grad():
        torch.manual_seed(1)
        losses = stage(batch)
        torch.manual_seed(1)
        masks, classes = masks_of(batch["labels"], VOID)
        wanted = stage.model.loss(batch["input"], masks, classes)
    assert {key: losses[key] for key in wanted} == wanted
    assert losses["loss"].item() == pytest.approx(sum(x.item() for x in wanted.values()), rel=1e-6)
    assert all(VOID not in x for x in classes)


def losses_of_head(masks: int) -> dict[str, float]:
    """Of a random answer, with `masks` masks in its picture; the same in every call."""
    torch.manual_seed(0)
    config = rass_model.RassConfig(
        ("a", "b", "c"), projection=128, width=32, queries=4, heads=4, pixel_layers=1, layers=2, feedforward=32,
        points=64,
    )
    head = rass_model.Head(config)
    found = rass_model.Prediction((torch.randn(1, 4, 4),) * 2, (torch.randn(1, 4, 16, 16),) * 2)
    truth = (torch.arange(64)[:, None] // 16 == torch.arange(masks)[:, None, None]).expand(-1, -1, 64).float()
    return {name: value.item() for name, value in head.loss(found, [truth], [torch.arange(masks)]).items()}


def test_losses_of_masks_are_relative_to_the_masks_of_all_processes(tmp_path: Path) -> None:
    """Two processes with equal data have the loss of one; with 3 masks and 1, both divide by 2."""
    run_in_two_processes(textwrap.dedent("""
        import json, sys
        from pathlib import Path
        from accelerate import Accelerator
        from test_rass_training import losses_of_head
        rank = Accelerator(cpu=True).process_index
        found = {"equal": losses_of_head(3), "other": losses_of_head((3, 1)[rank])}
        Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    """), str(tmp_path))
    for rank, masks in enumerate((3, 1)):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["equal"] == pytest.approx(losses_of_head(3))
        shares = {"class": 1, "mask": masks / 2, "dice": masks / 2}
        alone = losses_of_head(masks)
        assert found["other"] == pytest.approx({name: share * alone[name] for name, share in shares.items()})


@pytest.mark.parametrize("name", RASS_STAGES)
def test_bf16_reaches_the_unet_and_not_the_head(name: str, sd: Path, data: Path) -> None:
    stage = STAGE[name](sd, data)
    as_trained(stage)
    batch = stage.batch(np.random.default_rng(2))
    exact = stage(batch)["loss"].item()
    seen: dict[str, torch.dtype] = {}
    parts = {"unet": stage.model.unet.mid_block.resnets[0].conv1}
    if name == "rass":
        parts |= {"projection": stage.model.projections[2].conv1, "head": stage.model.head.class_predictor}
    for key, part in parts.items():
        part.register_forward_hook(lambda m, args, out, key=key: seen.update({key: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage(batch)["loss"]
    assert seen.pop("unet") == torch.bfloat16 and set(seen.values()) <= {torch.float32}
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.15)
    loss.backward()
    assert all(p.grad.isfinite().all() for group in stage.groups() for p in group.parameters)


@pytest.mark.parametrize("name", RASS_STAGES)
def test_pictures_for_the_log(name: str, sd: Path, data: Path) -> None:
    stage = STAGE[name](sd, data).eval()
    batch = stage.batch(np.random.default_rng(2))
    with torch.no_grad():
        (picture,) = stage.pictures(batch).values()
    assert picture.shape == (128, 192, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture[64:, :64], batch["input"][1])
    if name == "scr":
        assert torch.equal(picture[64:, 128:], batch["clear"][1])
    else:
        truth, labels = picture[64:, 64:128], batch["labels"][1]
        assert not truth[labels == VOID].any()
        assert torch.equal(truth[labels == 2], torch.tensor([COLOURS["ground"]]).expand((labels == 2).sum(), 3))


# runs


SHORT = tuple(f"{name}.{change}" for name in RASS_STAGES for change in ("steps=2", "batch=1", "log_every=1"))


def arguments(data: Path, out: Path, *changes: str) -> list[str]:
    return ["train", "rass_tiny", "--data", str(data), "--out", str(out), "--device", "cpu",
            *(part for change in (SOURCES, *SHORT, *changes) for part in ("--set", change))]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(data, out)) == 0
    return out


def test_a_run_leaves_logs_and_weights(whole: Path) -> None:
    files = {f"{stage}.{end}" for stage in RASS_STAGES for end in ("csv", "pt")}
    assert {path.name for path in whole.iterdir()} == {"config.yaml", "tensorboard", "rass", "sd21-base"} | files
    assert {path.name for path in (whole / "rass").iterdir()} == {"scr.pkl", "rass.pth"}
    scr, finished = read_scr(whole / "rass" / "scr.pkl"), checkpoint.read(whole / "scr.pt")
    assert scr.rank == 4 and {f"model.unet.{key}" for key in scr.state} == set(finished)
    assert all(torch.equal(value, finished[f"model.unet.{key}"]) for key, value in scr.state.items())
    trained, finished = read_rass(whole / "rass" / "rass.pth"), checkpoint.read(whole / "rass.pt")
    assert trained.config.classes == tuple(COLOURS) and trained.palette.tolist() == [*map(list, COLOURS.values())]
    assert {f"model.{key}" for key in trained.state} == set(finished)
    assert all(torch.equal(value, finished[f"model.{key}"]) for key, value in trained.state.items())


def test_a_finished_run_is_left_as_it_is(whole: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [whole / "rass" / name for name in ("scr.pkl", "rass.pth")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert main(arguments(data, whole)) == 0
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert capsys.readouterr().out.splitlines()[-2:] == [f"weights: {path}" for path in files]
    assert main(arguments(data, whole, "scr.rank=2")) == 1
    assert "begun with other values of scr.rank" in capsys.readouterr().err


@pytest.mark.parametrize("stage, step", [("scr", 1), ("rass", 1)])
def test_a_stopped_run_goes_on_and_ends_bit_equal(
    stage: str, step: int, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(data, tmp_path / "out")
    stopped_after({"scr": rass.Restore, "rass": rass.Segment}[stage], step, command, monkeypatch, capsys)
    saved = checkpoint.read(tmp_path / "out" / "checkpoint.pt")
    assert (saved["stage"], saved["step"]) == (stage, step)
    assert main(command) == 0
    for name in RASS_STAGES:
        assert same_tensors(whole / f"{name}.pt", tmp_path / "out" / f"{name}.pt"), name


def test_the_trained_segmenter_segments(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCR of one run is merged by another, whose weights then stand in GLESAM_HOME as the segmenter reads them."""
    assert main([*arguments(data, tmp_path / "first"), "--until", "scr"]) == 0
    scr, out = tmp_path / "first" / "rass" / "scr.pkl", tmp_path / "second"
    assert not (tmp_path / "first" / "rass.pt").exists()
    learning = (
        "scr.steps=0", f"scr_file={scr}", "crop.scale=[1, 1]", "rass.steps=16", "rass.batch=2", "rass.clear=0.7",
        "rass.rates.head=5.0e-3", "rass.rates.backbone=1.0e-3", "rass.clip=1.0", "rass.warm_up=5", "rass.log_every=4",
    )
    assert main(arguments(data, out, *learning)) == 0
    assert not (out / "scr.pt").exists() and (out / "rass" / "scr.pkl").read_bytes() == scr.read_bytes()
    monkeypatch.setenv("GLESAM_HOME", str(out))
    monkeypatch.setattr(rass_model, "WINDOW", 64)  # the crops of the run are that small
    model = load_rass("cpu", "fp32")
    assert model.classes == tuple(COLOURS)
    found, wanted = [], []
    for image, labels, _ in open_labelled(data / "shapes", "test"):
        logits = np.stack([cv2.resize(x, (128, 96)) for x in model.logits(image)])
        found.append(logits.argmax(0)[labels != IGNORE])
        wanted.append(labels[labels != IGNORE])
    right = (np.concatenate(found) == np.concatenate(wanted)).mean()
    chance = np.bincount(np.concatenate(wanted)).max() / len(np.concatenate(wanted))
    assert right > 0.85 > 0.6 > chance


def test_errors_are_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path / "home"))
    out = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", "--set", SOURCES]
    for given, expected in (
        (["rass_tiny", "--until", "restore"], "--until: expected one of scr, rass"),
        (["rass_ade20k", "--set", "precision=no"], "sd_folder: expected the folder"),
        (["rass_ade20k", "--set", "precision=no"], "get it: glesam models get scr-sd21"),
        (["rass_tiny", "--set", "scr.steps=0"], "scr_file: expected the weights of SCR at"),
        (["rass_tiny", "--set", "sources=[{path: nowhere}]"], "sources.0.path: expected a folder"),
        (["rass_tiny", "--set", f"sd_folder={tmp_path}"], f"sd_folder: expected the folder {tmp_path / 'unet'}"),
    ):
        assert main(["train", *given[:1], *out, *given[1:]]) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
        assert not (tmp_path / "out" / "config.yaml").exists()
