"""SCR: merged LoRA against the formula and its adapters, files, text, the step, tiles, colours, faults."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("diffusers", "peft", "transformers"))):
    pytest.skip("expected diffusers, peft and transformers", allow_module_level=True)

from tiny_sd import UNET, tiny_unet, tiny_vae, write_text, write_tiny_scr, write_tiny_sd  # noqa: E402

from glesam_ros.models.base import OutOfMemory  # noqa: E402
from glesam_ros.models.glesam import catalogue  # noqa: E402
from glesam_ros.models.glesam.enhancer import LORA_TARGETS, UNETS, alpha_bar  # noqa: E402
from glesam_ros.models.rass import scr  # noqa: E402
from glesam_ros.models.rass.scr import (  # noqa: E402
    ClassPrompts,
    Scr,
    ScrRestorer,
    add_scr,
    feather,
    keep_colours,
    load_lora,
    load_scr,
    load_vae,
    lora_groups,
    merge_scr,
    read_scr,
    scr_weights,
    starts,
    tokenise,
    trained_parameters,
    write_scr,
)

SIZE = (70, 90)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_scr(tmp_path_factory.mktemp("scr") / "scr.pkl")


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_tiny_sd(tmp_path_factory.mktemp("home") / "sd21-base")


@pytest.fixture
def home(sd, checkpoint, monkeypatch):
    monkeypatch.setenv("GLESAM_HOME", str(sd.parent))
    target = sd.parent / catalogue.SCR_FILE
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(checkpoint.read_bytes())
    return sd.parent


def latent(dtype=torch.float32, batch=2, side=8):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)


def noise(unet, x):
    text = torch.randn(1, 77, UNET["cross_attention_dim"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(x, torch.tensor([1]), encoder_hidden_states=text.to(x.dtype).expand(len(x), -1, -1)).sample


def picture(size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


# LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_gives_what_the_adapters_give(checkpoint, dtype):
    plain, adapted, merged = (tiny_unet().to(dtype) for _ in range(3))
    load_lora(adapted, read_scr(checkpoint), "test")
    merge_scr(merged, checkpoint)
    x = latent(dtype)
    expected, found = noise(adapted, x), noise(merged, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (noise(plain, x) - found).abs().mean() > 0.01  # the adapters do something
    assert set(merged.state_dict()) == set(plain.state_dict())
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("group", scr.GROUPS)
def test_each_group_counts(checkpoint, group):
    weights = read_scr(checkpoint)
    only = {k: x if f".default_{group}." in k or ".lora_" not in k else 0 * x for k, x in weights.state.items()}
    unet, none = tiny_unet(), tiny_unet()
    load_lora(unet, scr.ScrWeights(weights.rank, weights.modules, only), "test")
    load_lora(none, scr.ScrWeights(weights.rank, weights.modules, {
        k: 0 * x if ".lora_" in k else x for k, x in weights.state.items()
    }), "test")
    assert (noise(unet, latent()) - noise(none, latent())).abs().mean() > 1e-4


def test_merged_weights_are_w0_plus_alpha_over_r_ba(checkpoint):
    weights = read_scr(checkpoint)
    plain, merged = tiny_unet().double(), tiny_unet().double()
    merge_scr(merged, checkpoint)
    before, after = plain.state_dict(), merged.state_dict()
    seen = {"conv_in.weight", "conv_in.bias"}
    torch.testing.assert_close(after["conv_in.bias"], weights.state["conv_in.base_layer.bias"].double())
    for group, names in weights.modules.items():
        assert names
        for name in names:
            a, b = (
                weights.state[f"{name}.lora_{end}.default_{group}.weight"].double() for end in "AB"
            )
            base = before[f"{name}.weight"]
            if name == "conv_in":
                base = weights.state["conv_in.base_layer.weight"].double()
            delta = (b.flatten(1) @ a.flatten(1)).reshape(base.shape)
            torch.testing.assert_close(after[f"{name}.weight"], base + 8 / weights.rank * delta, rtol=0, atol=1e-10)
            seen.add(f"{name}.weight")
    for key in before.keys() - seen:
        assert torch.equal(before[key], after[key]), key


def test_a_fresh_lora_changes_nothing_and_trains_alone():
    unet = tiny_unet()
    before = noise(unet, latent())
    add_scr(unet, 4)
    torch.testing.assert_close(noise(unet, latent()), before, rtol=0, atol=1e-6)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in unet.named_parameters() if ".lora_" in n or n.startswith("conv_in.")}
    assert len(trained_parameters(unet)) == len(trained)
    noise_of_all = unet(latent(), torch.tensor([1]), encoder_hidden_states=torch.zeros(2, 77, 12)).sample
    noise_of_all.square().mean().backward()
    assert all(p.grad is not None for p in trained_parameters(unet))


def test_groups_of_the_full_size():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["sd21-base"])
    groups = lora_groups(unet)
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names)) == 280 - 22  # GleSAM's but the projections of the timestep
    assert all(n == "conv_in" or n.startswith("down_blocks.") for n in groups["encoder"])
    assert all(n.startswith("up_blocks.") for n in groups["decoder"])
    assert "conv_out" in groups["others"] and any(n.startswith("mid_block.") for n in groups["others"])
    assert not set(scr.SCR_TARGETS) - set(LORA_TARGETS)
    assert sum(map(len, lora_groups(unet, ["conv_in"]).values())) == 1


# files


def test_a_checkpoint_survives_writing_and_reading(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    assert set(content) == {
        "rank_unet", "unet_lora_encoder_modules", "unet_lora_decoder_modules", "unet_lora_others_modules",
        "state_dict_unet",
    }
    assert "conv_in.base_layer.weight" in content["state_dict_unet"]
    unet = tiny_unet()
    load_lora(unet, read_scr(checkpoint), "test")
    write_scr(scr_weights(unet), tmp_path / "new" / "scr.pkl")
    again, first = read_scr(tmp_path / "new" / "scr.pkl"), read_scr(checkpoint)
    assert (again.rank, again.modules.keys()) == (first.rank, first.modules.keys())
    assert {g: sorted(n) for g, n in again.modules.items()} == {g: sorted(n) for g, n in first.modules.items()}
    assert again.state.keys() == first.state.keys()
    assert all(torch.equal(again.state[key], first.state[key]) for key in first.state)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["scr.pkl"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank_unet": None}, "rank_unet is missing"),
        ({"rank_unet": 0}, "rank_unet is int instead of a whole number >= 1"),
        ({"unet_lora_others_modules": None, "state_dict_unet": [1]},
         "unet_lora_others_modules is missing; state_dict_unet is list instead of a dict of tensors"),
        ({"unet_lora_decoder_modules": "conv_out"}, "unet_lora_decoder_modules is str instead of a list of names"),
    ],
)
def test_another_content_is_named(checkpoint, tmp_path, change, expected):
    content = {**torch.load(checkpoint, weights_only=True), **change}
    torch.save({key: x for key, x in content.items() if x is not None}, tmp_path / "scr.pkl")
    with pytest.raises(ValueError, match=expected):
        read_scr(tmp_path / "scr.pkl")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected weights at"):
        read_scr(tmp_path / "no.pkl")
    (tmp_path / "text.pkl").write_text("no")
    with pytest.raises(ValueError, match="expected a checkpoint of torch"):
        read_scr(tmp_path / "text.pkl")
    torch.save([1], tmp_path / "list.pkl")
    with pytest.raises(ValueError, match="expected a dict with rank_unet.*got list"):
        read_scr(tmp_path / "list.pkl")


def test_weights_of_another_unet_are_named(checkpoint):
    weights = read_scr(checkpoint)
    state = {key: x for key, x in weights.state.items() if "conv_in.base_layer.bias" not in key}
    with pytest.raises(ValueError, match="missing: conv_in.base_layer.bias"):
        load_lora(tiny_unet(), scr.ScrWeights(weights.rank, weights.modules, state), "that")
    with pytest.raises(ValueError, match="that: .*wrong shape"):
        load_lora(tiny_unet(cross_attention_dim=16), weights, "that")
    modules = {**weights.modules, "others": ["mid_block.attentions.7.proj_in"]}
    with pytest.raises(ValueError, match="that: expected names of layers of this U-Net, got mid_block.attentions.7"):
        load_lora(tiny_unet(), scr.ScrWeights(weights.rank, modules, weights.state), "that")
    with pytest.raises(ValueError, match="expected SCR's LoRA"):
        scr_weights(tiny_unet())
