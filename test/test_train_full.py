"""The recipe of the full size on tiny networks: what a stage learns and leaves alone, stops, files, DMD2's terms."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")
NEEDED = ("accelerate", "diffusers", "peft", "pycocotools", "pydantic", "sam2", "segment_anything", "tensorboard")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(f"training at full size needs {', '.join(missing)}", allow_module_level=True)

import yaml  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from training_runs import same_tensors, stopped_after, trained_on_one_batch  # noqa: E402

from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.degradation import degrade_lqseg, degrade_lqseg_mixed  # noqa: E402
from glesam_ros.degradation.lqseg import FIRST_OFFLINE  # noqa: E402
from glesam_ros.models.glesam.enhancer import UNETS, Enhancer, EnhancerConfig, SmallUNet, load_enhancer  # noqa: E402
from glesam_ros.models.glesam.model import build_base, load_parts  # noqa: E402
from glesam_ros.models.glesam.weights import decoder_state, read_tensors  # noqa: E402
from glesam_ros.training import checkpoint, full  # noqa: E402
from glesam_ros.training import config as configs  # noqa: E402
from glesam_ros.training.config import load_any  # noqa: E402
from glesam_ros.training.full_config import FULL_STAGES, FullConfig, FullDegradationConfig  # noqa: E402
from glesam_ros.training.full_networks import RANDOM_UNET, Networks, load_networks, write_enhancer  # noqa: E402
from glesam_ros.training.loop import Run, Stop, make_accelerator, train  # noqa: E402
from glesam_ros.training.matching import FIRST, LAST, Guide, carried, is_adapted, matching_gradient  # noqa: E402
from glesam_ros.training.sources import load_scenes  # noqa: E402

SHIPPED = [name for name in configs.shipped() if name.startswith("glesam")]
GUIDED = ("restore.distribution_matching=1.0", "restore.adversarial=5.0e-3", "restore.generator_every=2")
SHORT = tuple(f"{name}.steps=2" for name in FULL_STAGES) + tuple(f"{name}.batch=1" for name in FULL_STAGES)
UNET = {
    **RANDOM_UNET, "down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
}


pytestmark = pytest.mark.usefixtures("own_precision", "one_thread")


@pytest.fixture(scope="module", autouse=True)
def narrow_small_enhancer() -> Iterator[None]:
    """30 million parameters are too many for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallUNet, "WIDTHS", (32, 32, 64))
        yield


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


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny U-Net and an empty prompt, laid out as Stable Diffusion is."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("unets")
    torch.manual_seed(3)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "sd21-base" / "unet")
    prompt = torch.randn(1, 77, UNET["cross_attention_dim"])
    save_file({"prompt": prompt}, folder / "sd21-base" / "empty_prompt.safetensors")
    return folder


def tiny(unets: Path, *changes: str) -> FullConfig:
    config = load_any("glesam_tiny", [f"unet_folder={unets / 'sd21-base'}", *changes])
    assert isinstance(config, FullConfig)
    return config


def networks_of(config: FullConfig) -> Networks:
    torch.manual_seed(config.seed)
    return load_networks(config)


def latents(seed: int, batch: int = 2, side: int = 8) -> Tensor:
    return torch.randn(batch, 256, side, side, generator=torch.Generator().manual_seed(seed))


# configurations


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_survive_writing_and_reading(name: str, tmp_path: Path) -> None:
    config = load_any(name)
    assert isinstance(config, FullConfig)
    (tmp_path / "again.yaml").write_text(configs.to_yaml(config))
    assert load_any(tmp_path / "again.yaml") == config


def test_names_of_hugging_face_stand_for_ours() -> None:
    names = ["base=facebook/sam2.1-hiera-tiny", "unet=runwayml/stable-diffusion-v1-5"]
    config = load_any("glesam_sam_vit_b", names)
    assert config == load_any("glesam_sam_vit_b", ["base=sam2.1_hiera_tiny", "unet=sd15"])
    with pytest.raises(ValueError, match="base: .*expected of Hugging Face's repositories one of facebook/sam2"):
        load_any("glesam_sam_vit_b", ["base=facebook/sam3"])


def test_the_defaults_are_the_papers_and_written_out() -> None:
    config = FullConfig()
    assert load_any("glesam_sam_vit_b") == config

    def keys(tree: Any, prefix: str = "") -> set[str]:
        if not isinstance(tree, dict):
            return {prefix}
        return {key for name, value in tree.items() for key in keys(value, f"{prefix}.{name}")}

    written = yaml.safe_load((configs.CONFIGS / "glesam_sam_vit_b.yaml").read_text())
    assert keys(written) == keys(configs.to_dict(config))
    restore, decode = config.restore, config.decode
    assert (config.enhancer.gamma, config.enhancer.timestep, config.enhancer.rank, config.seed) == (5.0, 1, 8, 10)
    assert (restore.steps, restore.rates.enhancer, restore.weight_decay, restore.clip) == (100_000, 1e-4, 0.01, 10)
    assert (restore.warm_up, restore.final, restore.batch, restore.guided) == (500, 1.0, 1, False)
    assert (decode.rates.decoder, decode.weight_decay, config.objects) == (1e-4, 1e-5, 1)


@pytest.mark.parametrize(
    "change, expected",
    [
        ("side=1000", "side: expected a multiple of 128, got 1000"),
        ("crop.side=510", "crop.side: expected a multiple of 4, got 510"),
        ("enhancer.timestep=1000", "enhancer.timestep: expected less than or equal to 999, got 1000"),
        ("restore.rates.lora=1", "restore.rates.lora: unknown key, expected one of enhancer, fake"),
        ("unet=sdxl", "unet: expected 'sd21-base' or 'sd15', got 'sdxl'"),
        ("precision=fp16", "precision: expected 'auto', 'no' or 'bf16', got 'fp16'"),
        ("degradation.rates=all", "degradation.rates: expected 'mixed', 'levels' or 'x1', got 'all'"),
        ("sources=[{kind: coco, path: x, split: test}]", "nothing is trained on a test split"),
        ("model=sam", "model: expected one of nano, glesam"),
    ],
)
def test_what_does_not_fit_is_named(change: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        load_any("glesam_tiny", [change])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_each_recipe_has_its_own_reader() -> None:
    assert load_any("nano", ["model=nano"]) == configs.load_config("nano") == load_any("nano")
    with pytest.raises(ValueError, match="expected a configuration of nano, got one of 'glesam'"):
        configs.load_config("glesam_tiny")


# data


def test_rates_of_mixed_training_become_levels(unets: Path) -> None:
    assert [full.level_of_rate(rate) for rate in (1, 2, 4)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert 2 / 3 < full.level_of_rate(3) < 1
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    mix = FullConfig().degradation
    seen = set()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        degraded, level = full.worsen(image, mix, rng)
        again = np.random.default_rng(seed)
        again.random()
        published = degrade_lqseg_mixed(image, again)
        assert np.array_equal(degraded, published.image)
        assert level == full.level_of_rate(published.parameters["rate"])
        seen.add(published.parameters["rate"])
    assert seen == {1, 2, 3, 4}


def test_rate_1_with_the_wide_first_resize_as_rass_trains() -> None:
    mix, rng = FullDegradationConfig(rates="x1"), np.random.default_rng(0)
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    worse, level = full.worsen(image, mix, rng)
    rng = np.random.default_rng(0)
    rng.random()
    assert np.array_equal(worse, degrade_lqseg(image, 1, rng, first=FIRST_OFFLINE).image) and level == 1 / 3
    assert load_any("rass_ade20k").degradation.rates == "x1"


def test_levels_and_kinds_instead_of_mixed_rates() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for changes in (["degradation.rates=levels"], ["degradation.lq=0.0"]):
        config = load_any("glesam_tiny", [*changes, "degradation.levels=[0, 1, 0]"])
        assert isinstance(config, FullConfig)
        degraded, level = full.worsen(image, config.degradation, np.random.default_rng(0))
        assert level == pytest.approx(2 / 3) and not np.array_equal(degraded, image)


def test_crops_of_stage_2_have_points_inside_their_regions(data: Path, unets: Path) -> None:
    config = tiny(unets, "objects=3", "decode.clear=0.5", "decode.batch=6")
    scenes = load_scenes(config.sources, data)
    stage = full.Decode(networks_of(config), config, config.decode, scenes)
    batch = stage.batch(np.random.default_rng(1))
    assert batch["input"].shape == (6, 64, 64, 3) and batch["regions"].shape == (6, 3, 64, 64)
    assert batch["points"].shape == (6, 3, 3, 2)
    cells = ((batch["points"] + 0.5) * 64 / config.side).long()
    for b, o in np.ndindex(6, 3):
        assert all(batch["regions"][b, o, y, x] for x, y in cells[b, o])
    drawn, _ = full.draw_crops(scenes, np.random.default_rng(1), config, 20, 0.5)
    same = (drawn["clear"] == drawn["input"]).flatten(1).all(1)
    assert torch.equal(same, drawn["level"] == 0) and 0 < same.sum() < 20


# the terms of DMD2


def test_the_matching_gradient_vanishes_where_real_and_fake_agree() -> None:
    x, seen = latents(0), latents(1)
    assert not matching_gradient(x, seen, seen).any()
    assert torch.isfinite(matching_gradient(x, x, x)).all()


def test_the_matching_gradient_leads_to_what_is_real() -> None:
    # each U-Net of a distribution that is one point sees that point in everything
    real, x = latents(0, 3), latents(1, 3)
    for _ in range(400):
        gradient = matching_gradient(x, real, fake=x)
        assert ((real - x) * -gradient).sum() > 0
        assert gradient.abs().mean((1, 2, 3)).tolist() == pytest.approx([1, 1, 1])  # the weight of DMD2
        x = x - 0.01 * gradient
    assert (x - real).abs().mean() < 0.02


def test_carried_gradients() -> None:
    x = latents(0).requires_grad_()
    loss = carried(2 * x, latents(1))
    assert loss == 0
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * latents(1))


@pytest.fixture(scope="module")
def adapted(unets: Path) -> Networks:
    return networks_of(tiny(unets))


def perturbed(guide: Guide, seed: int = 0) -> Guide:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in guide.trained_parameters():
            p.add_(0.05 * torch.randn_like(p))
    return guide


def test_the_fake_begins_as_the_real_and_shares_its_weights(adapted: Networks) -> None:
    for p in adapted.enhancer.trained_parameters():
        assert not p.isnan().any()
    lora = [p for name, p in adapted.enhancer.unet.named_parameters() if "lora_B" in name]
    before = [p.clone() for p in lora]
    with torch.no_grad():
        for p in lora:
            p.normal_()  # a trained enhancer is not where the fake begins
    guide = Guide(adapted.enhancer)
    gradient, sizes = guide.gradients(latents(0), matching=1.0, adversarial=0.0)
    assert not gradient.any() and sizes["matching"] == 0
    own = {id(p): name for name, p in guide.unet.named_parameters()}
    theirs = {id(p): name for name, p in adapted.enhancer.unet.named_parameters()}
    common = own.keys() & theirs.keys()
    assert {own[k] for k in common} == {n for n in own.values() if not is_adapted(n)}
    with torch.no_grad():
        for p, saved in zip(lora, before, strict=True):
            p.copy_(saved)


def test_the_gradients_are_those_of_the_formulas(adapted: Networks) -> None:
    guide = perturbed(Guide(adapted.enhancer))
    for p in guide.trained_parameters():
        p.requires_grad_(True)
    x = latents(0)

    def draws(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        t, noise = torch.randint(first, last + 1, (2,)), torch.randn_like(x)
        share = guide.bars[t].view(-1, 1, 1, 1)
        return t, share, noise

    torch.manual_seed(5)
    gradient, sizes = guide.gradients(x, matching=0.5, adversarial=0.25)
    torch.manual_seed(5)
    t, share, noise = draws(FIRST, LAST)
    noised = share.sqrt() * x + (1 - share).sqrt() * noise

    def clean(unet: Any) -> Tensor:
        eps = unet(noised, t, guide.prompt.expand(2, -1, -1)).sample
        return (noised - (1 - share).sqrt() * eps) / share.sqrt()

    bare = copy.deepcopy(guide.unet)
    bare.unload_lora()
    with torch.no_grad():
        fake, real = clean(guide.unet), clean(bare)
    wanted = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    assert wanted.abs().mean() > 1e-3
    t, share, noise = draws(0, 999)
    seen = x.clone().requires_grad_()
    loss = F.softplus(-guide.judge(share.sqrt() * seen + (1 - share).sqrt() * noise, t)).mean()
    loss.backward()
    torch.testing.assert_close(sizes["adversarial"], loss.detach())
    torch.testing.assert_close(sizes["matching"], 0.5 * wanted.square().mean(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradient, 0.5 * wanted / x.numel() + 0.25 * seen.grad, rtol=1e-3, atol=1e-7)


def test_distributions_are_compared_where_dmd2_compares_them() -> None:
    # 0.02 and 0.98 of all timesteps
    assert (FIRST, LAST) == (20, 980)


def test_what_the_adversaries_learn_are_the_noise_and_who_is_clear(adapted: Networks) -> None:
    guide = perturbed(Guide(adapted.enhancer))
    x, clear = latents(0), latents(1)

    def noised(latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, noise = torch.randint(0, 1000, (2,)), torch.randn_like(latent)
        share = guide.bars[t].view(-1, 1, 1, 1)
        return share.sqrt() * latent + (1 - share).sqrt() * noise, t, noise

    with torch.no_grad():
        torch.manual_seed(5)
        losses = guide.losses(x, clear)
        torch.manual_seed(5)
        seen, t, noise = noised(x)
        eps = guide.unet(seen, t, guide.prompt.expand(2, -1, -1)).sample
        restored = guide.judge(*noised(x)[:2])
        real = guide.judge(*noised(clear)[:2])
    torch.testing.assert_close(losses["fake"], (eps - noise).square().mean())
    # cross-entropy of "clear", of both halves
    wanted = -(real.sigmoid().log() + (1 - restored.sigmoid()).log()).mean()
    torch.testing.assert_close(losses["classifier"], wanted)
    assert (real + restored).abs().max() > 1e-3  # the other way round would be another number


@pytest.mark.parametrize("precision, checkpointing", [("no", False), ("no", True), ("bf16", True)])
def test_adversaries_do_not_train_each_other(adapted: Networks, precision: str, checkpointing: bool) -> None:
    guide = perturbed(Guide(adapted.enhancer))
    if checkpointing:
        guide.unet.enable_gradient_checkpointing()
    trained = guide.trained_parameters()
    for p in trained:
        p.requires_grad_(True)
    x = latents(0, 1, 16).requires_grad_()  # attention over a single position would learn nothing
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        gradient, _ = guide.gradients(x, matching=1.0, adversarial=1.0)
        assert all(p.grad is None for p in trained) and gradient.abs().sum() > 0
        losses = guide.losses(x, latents(1, 1, 16))
    (losses["fake"] + losses["classifier"]).backward()
    assert x.grad is None
    learnt = {name for name, p in guide.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert {name for name, p in guide.named_parameters() if p.requires_grad} == learnt


def test_the_classifier_learns_to_tell_restored_from_clear(adapted: Networks) -> None:
    torch.manual_seed(0)
    guide = Guide(adapted.enhancer)
    for p in guide.trained_parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(guide.classifier.parameters(), 1e-3)
    x, clear = latents(0, 1), 3 + latents(1, 1)
    seen = []
    for _ in range(12):
        loss = guide.losses(x, clear)["classifier"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert np.mean(seen[-4:]) < 0.6 * np.mean(seen[:4])


# stages


STAGES = {
    # changes, loss that falls, share of the first that is left at most
    "level": (("level.steps=60", "level.warm_up=0", "level.clear=0.5", "level.ema=0.0"), "loss", 0.5),
    "restore": (("restore.steps=12", "restore.rates.enhancer=5.0e-3", "restore.warm_up=0", "enhancer.timestep=200"),
                "reconstruction", 0.9),
    "decode": (("decode.steps=12", "decode.rates.decoder=1.0e-3"), "loss", 0.9),
    "distill": (("distill.steps=12", "distill.rates.small=2.0e-3", "distill.warm_up=0",
                 "distill.ema=0.0"), "loss", 0.9),
}


@pytest.mark.parametrize("name", FULL_STAGES)
def test_a_stage_learns_and_leaves_alone_what_it_freezes(
    name: str, data: Path, unets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, loss, left = STAGES[name]
    config = tiny(unets, *changes)
    networks = networks_of(config)
    stage = full.make_stage(name, networks, config, load_scenes(config.sources, data))
    before = {key: p.clone() for key, p in networks.named_parameters()}
    buffers = copy.deepcopy(dict(networks.named_buffers()))
    trained = {key.removeprefix("model.") for key in stage.weights()}
    losses = trained_on_one_batch(stage, tmp_path, monkeypatch)
    few = max(2, len(losses) // 6)
    assert np.mean([row[loss] for row in losses[-few:]]) < left * np.mean([row[loss] for row in losses[:few]])
    moved = {key for key, p in networks.named_parameters() if not torch.equal(p, before[key])}
    assert moved and moved <= trained and not any("iou" in key for key in moved)
    assert all(torch.equal(value, buffers[key]) for key, value in networks.named_buffers())
    parts = {
        "level": "enhancer.level", "restore": "enhancer.unet", "distill": "small.unet",
        "decode": "base.net.sam_mask_decoder",
    }
    assert all(key.startswith(parts[name]) for key in moved)


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_is_at_work_in_stage_1(on: bool, data: Path, unets: Path) -> None:
    """All of the network is in evaluation mode there, in which older diffusers keep every activation all the same."""
    config = tiny(unets, f"gradient_checkpointing={str(on).lower()}")
    networks = networks_of(config)
    stage = full.make_stage("restore", networks, config, load_scenes(config.sources, data))
    for p in stage.groups()[0].parameters:
        p.requires_grad_(True)
    stage.set_modes()
    runs: list[None] = []
    for block in (networks.enhancer.unet.down_blocks[0], networks.enhancer.unet.up_blocks[0]):
        block.resnets[0].register_forward_pre_hook(lambda *_: runs.append(None))
    loss = stage(stage.batch(np.random.default_rng(1)))["loss"]
    assert len(runs) == 2
    loss.backward()
    assert len(runs) == (4 if on else 2)


@pytest.mark.parametrize(
    "name, kind, decay", [("restore", torch.optim.AdamW, 0.01), ("decode", torch.optim.AdamW, 1e-5)]
)
def test_optimisers(name: str, kind: type, decay: float, adapted: Networks, data: Path) -> None:
    stage = full.make_stage(name, adapted, FullConfig(), load_scenes((), data))
    groups = [{"params": group.parameters, "lr": group.rate} for group in stage.groups()]
    for p in groups[0]["params"]:
        p.requires_grad_(True)
    optimizer = stage.optimizer(groups)
    assert type(optimizer) is kind and [group["lr"] for group in optimizer.param_groups] == [1e-4]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {decay}
    adapted.requires_grad_(False)


def test_stage_2_leaves_the_further_masks_their_weights(adapted: Networks, data: Path) -> None:
    """They have no gradient here; an L2 term inside Adam would take about the rate off each weight in each step."""
    networks = copy.deepcopy(adapted)
    stage = full.make_stage("decode", networks, FullConfig(), load_scenes((), data))
    further = networks.base.mask_decoder.output_hypernetworks_mlps[1:]
    before = [p.clone() for p in further.parameters()]
    groups = [{"params": group.parameters, "lr": group.rate} for group in stage.groups()]
    optimizer = stage.optimizer(groups)
    for _ in range(100):
        for p in groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for old, new in zip(before, further.parameters(), strict=True):
        assert torch.allclose(old, new, rtol=1e-5, atol=0)


def test_the_loss_of_stage_2_is_dice_and_focal(adapted: Networks, data: Path, unets: Path) -> None:
    config = tiny(unets, "objects=2")
    stage = full.make_stage("decode", adapted, config, load_scenes(config.sources, data))
    stage.set_modes()
    batch = stage.batch(np.random.default_rng(2))
    with torch.no_grad():
        losses = stage(batch)
        features = adapted.features(batch["input"])
        latent = adapted.enhancer(features.latent, adapted.level(features))
        logits = []
        for k in range(2):
            one = features.pick(k)._replace(latent=latent[k : k + 1])
            logits.append(adapted.base.decode(one, batch["points"][k], torch.ones(2, 3), False)[0])
    up = F.interpolate(torch.cat(logits), (64, 64), mode="bilinear", align_corners=False).flatten(1).double()
    y = batch["regions"].reshape(4, -1).double()
    p = up.sigmoid()
    dice = 1 - (2 * (p * y).sum(1) + 1e-6) / (p.sum(1) + y.sum(1) + 1e-6)
    right = torch.where(y > 0, p, 1 - p)
    focal = -(0.25 * (1 - right) ** 2 * right.log()).mean(1)
    assert losses["loss"].item() == pytest.approx((dice.mean() + focal.mean()).item(), rel=1e-5)
    stage.eval()


def test_stage_1_compares_latents_at_the_scale_of_the_unet(adapted: Networks, data: Path, unets: Path) -> None:
    config = tiny(unets)
    stage = full.make_stage("restore", adapted, config, load_scenes(config.sources, data))
    batch = stage.batch(np.random.default_rng(2))
    with torch.no_grad():
        losses = stage(batch)
        clear, features = (adapted.features(batch[key]) for key in ("clear", "input"))
        restored = adapted.enhancer(features.latent, adapted.enhancer.predict_level(features))
    wanted = ((5 * restored - 5 * clear.latent) ** 2).mean().item()
    assert losses["loss"].item() == pytest.approx(wanted, rel=1e-4) and wanted > 0
    assert losses["unrestored"].item() == pytest.approx(25 * F.mse_loss(features.latent, clear.latent).item(), rel=1e-4)


def test_with_dmd2_the_enhancer_is_trained_at_its_turns_only(
    data: Path, unets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(unets, *GUIDED, "restore.steps=4", "restore.batch=1")
    networks = networks_of(config)
    stage = full.make_stage("restore", networks, config, load_scenes(config.sources, data))
    lora = [p for name, p in networks.enhancer.unet.named_parameters() if "lora_B" in name]
    fake = [p for name, p in stage.guide.unet.named_parameters() if "lora_B" in name]
    seen: list[tuple[float, float]] = []
    forward = stage.forward

    def spy(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tuple(sum(float(p.detach().abs().sum()) for p in ps) for ps in (lora, fake)))
        return forward(batch)

    monkeypatch.setattr(stage, "forward", spy)
    train(stage, 0, Run(tmp_path, 1, 0, make_accelerator("cpu", "no"), Stop()))
    enhancer, guide = zip(*seen, strict=True)
    assert enhancer[0] == 0 < enhancer[1] == enhancer[2] != enhancer[3]
    assert len(set(guide)) == 4


def test_checkpoints_hold_lora_alone_of_the_real_unet(adapted: Networks, data: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = FullConfig()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["sd21-base"])
        enhancer = Enhancer(EnhancerConfig("sam_vit_b", "lora", "sd21-base"), unet, torch.zeros(1, 77, 1024))
        stage = full.Restore(Networks(adapted.base, enhancer, 1024), config, config.restore, load_scenes((), data))
    held = stage.weights()
    assert all(".lora_" in name for name in held) and len(held) == 560
    assert sum(value.numel() * value.element_size() for value in held.values()) == 34_072_576
    assert stage.finished().keys() == held.keys()


# runs


def arguments(data: Path, unets: Path, out: Path, *changes: str) -> list[str]:
    # of stage 1 the enhancer trains in the first and the third step
    given = [f"unet_folder={unets / 'sd21-base'}", *SHORT, *GUIDED, "restore.steps=3", *changes]
    return ["train", "glesam_tiny", "--data", str(data), "--out", str(out), "--device", "cpu",
            *(part for change in given for part in ("--set", change))]


@pytest.fixture(scope="module")
def whole(data: Path, unets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(data, unets, out)) == 0
    return out


def test_a_run_leaves_logs_weights_and_folders(whole: Path) -> None:
    files = {f"{stage}.{end}" for stage in FULL_STAGES for end in ("csv", "pt")}
    folders = {"sam2_random+glesam++", "sam2_random+glesam_small"}
    assert {path.name for path in whole.iterdir()} == {"config.yaml", "tensorboard"} | files | folders
    assert {path.name for path in (whole / "sam2_random+glesam++").iterdir()} == {
        "glesam.json", "pytorch_lora_weights.safetensors", "level.safetensors", "mask_decoder.safetensors"
    }
    assert all(".lora_" in name or ".class_embedding." in name for name in checkpoint.read(whole / "restore.pt"))


def test_the_written_folders_load_again_with_the_same_output(whole: Path, unets: Path) -> None:
    config = load_any(whole / "config.yaml")
    assert isinstance(config, FullConfig)
    networks = networks_of(config)
    base = networks.base.mask_decoder.state_dict()
    for name in ("level", "restore", "decode"):
        full.make_stage(name, networks, config, load_scenes((), whole)).load_finished(
            checkpoint.read(whole / f"{name}.pt")
        )
    x, level = latents(0), torch.tensor([0.2, 0.9])
    features = networks.features(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    large = load_enhancer(whole / "sam2_random+glesam++", unets)
    small = load_enhancer(whole / "sam2_random+glesam_small", unets)
    with torch.no_grad():
        wanted = networks.enhancer(x, level)
        assert torch.equal(large(x, level), wanted)
        for enhancer in (large, small):
            assert torch.equal(enhancer.predict_level(features), networks.enhancer.predict_level(features))
    fresh = networks_of(config)
    assert not torch.equal(wanted, fresh.enhancer(x, level))
    stage = full.make_stage("distill", networks, config, load_scenes((), whole))
    stage.load_finished(checkpoint.read(whole / "distill.pt"))
    with torch.no_grad():
        assert torch.equal(networks.small(x, level), small(x, level))
    for folder in ("sam2_random+glesam++", "sam2_random+glesam_small"):
        decoder = decoder_state(read_tensors(whole / folder / "mask_decoder.safetensors"))
        assert decoder.keys() == base.keys()
        for name, value in networks.base.mask_decoder.state_dict().items():
            assert torch.equal(decoder[name], value)


@pytest.mark.parametrize("stage, step", [("restore", 1), ("distill", 1)])
def test_a_stopped_run_goes_on_and_ends_bit_equal(
    stage: str, step: int, data: Path, unets: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = arguments(data, unets, out)
    before = FULL_STAGES.index(stage)
    out.mkdir()
    # stages before the one that is stopped were trained by the other run
    for file in ("config.yaml", *(f"{name}.pt" for name in FULL_STAGES[:before])):
        shutil.copy(whole / file, out / file)
    stopped_after({"restore": full.Restore, "distill": full.Distill}[stage], step, command, monkeypatch, capsys)
    assert checkpoint.read(out / "checkpoint.pt")["step"] == step
    assert main(command) == 0
    for name in FULL_STAGES[before:]:
        assert same_tensors(whole / f"{name}.pt", out / f"{name}.pt"), name


def test_a_command_that_failed_at_its_start_may_be_corrected(data: Path, unets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(data, unets, out, "sources=[{kind: coco, path: coco_smal}]")) == 1
    assert main([*arguments(data, unets, out, "level.steps=1"), "--until", "level"]) == 0
    assert (out / "level.pt").is_file() and load_any(out / "config.yaml").level.steps == 1


def test_a_run_begins_with_the_folder_of_another(whole: Path, data: Path, unets: Path) -> None:
    folder = whole / "sam2_random+glesam++"
    networks = networks_of(tiny(unets, f"start={folder}"))
    enhancer = load_enhancer(folder, unets)
    x, level = latents(0), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.equal(networks.enhancer(x, level), enhancer(x, level))
    decoder = read_tensors(folder / "mask_decoder.safetensors")
    assert all(torch.equal(decoder[name], value) for name, value in networks.base.mask_decoder.state_dict().items())
    with pytest.raises(ValueError, match=r"start: .*glesam\.json: expected gamma 2.0 as in this run, found 5.0"):
        networks_of(tiny(unets, f"start={folder}", "enhancer.gamma=2.0"))


def test_a_run_from_files_becomes_a_model(
    data: Path, unets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    monkeypatch.setenv("GLESAM_HOME", str(home))
    shutil.copytree(unets, home)
    torch.manual_seed(0)
    base = build_base("mobile_sam")
    torch.save(base.net.state_dict(), home / "mobile_sam.pt")
    changes = ["random=false", "unet_folder=null", "base=mobile_sam", "enhancer.levels=false", "distill.steps=0"]
    given = [part for change in (*SHORT[1:2], *changes, "decode.steps=1") for part in ("--set", change)]
    assert main(["train", "glesam_tiny", "--data", str(data), "--out", str(out), "--device", "cpu", *given]) == 0
    assert main(["models", "get", "mobile_sam+glesam", "--from", str(out / "mobile_sam+glesam")]) == 0
    loaded, enhancer = load_parts("mobile_sam+glesam", home)
    lora = checkpoint.read(out / "restore.pt")
    assert len(lora) == len(enhancer.lora_state())
    assert all(torch.equal(lora[f"model.enhancer.unet.{key}"], value) for key, value in enhancer.lora_state().items())
    trained = loaded.mask_decoder.state_dict()
    moved = {key for key, value in base.mask_decoder.state_dict().items() if not torch.equal(value, trained[key])}
    assert moved and not any("iou" in key for key in moved)


def test_sam_too_and_without_levels(data: Path, unets: Path, tmp_path: Path) -> None:
    networks = networks_of(tiny(unets, "base=sam_vit_b", "enhancer.levels=false"))
    folder = write_enhancer(networks, tmp_path, decoder=False)
    assert folder == tmp_path / "sam_random+glesam"
    assert {path.name for path in folder.iterdir()} == {"glesam.json", "pytorch_lora_weights.safetensors"}
    config = tiny(unets, "base=sam_vit_b", "enhancer.levels=false", "decode.batch=1")
    assert full.stages_of(config) == ["restore", "decode", "distill"]
    stage = full.make_stage("decode", networks, config, load_scenes(config.sources, data))
    loss = stage(stage.batch(np.random.default_rng(0)))["loss"]
    assert torch.isfinite(loss)


def test_errors_are_one_line(
    data: Path, unets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path / "home"))
    out = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for given, expected in (
        (["glesam_tiny", "--until", "base"], "--until: expected one of level, restore, decode, distill"),
        (["tiny", "--until", "distill"], "--until: expected one of base, level, restore, decode"),
        (["glesam_sam_vit_b", "--set", "precision=no"], "glesam models get sam_vit_b"),
        (["glesam_tiny", "--set", "base=sam3"], "base: expected one of sam_vit_b"),
        (["glesam_tiny", "--set", "base=facebook/sam3"], "expected of Hugging Face's repositories one of"),
        (["glesam_tiny", "--set", f"unet_folder={tmp_path}"], f"{tmp_path}"),
        # the weights of its base are not there, either
        (["glesam_distill"], "distill: expected a trained enhancer to learn from, got restore.steps=0 and no start"),
    ):
        assert main(["train", *given, *out]) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
