"""GleSAM's enhancer: the published counts and formulas, the step against diffusers, merging, files, faults."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import stat

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("diffusers", "peft", "transformers"))):
    pytest.skip("expected diffusers, peft and transformers", allow_module_level=True)

from glesam_ros.models.glesam import catalogue  # noqa: E402
from glesam_ros.models.glesam.base import Features  # noqa: E402
from glesam_ros.models.glesam.download import take_enhancer, verify  # noqa: E402
from glesam_ros.models.glesam.enhancer import (  # noqa: E402
    UNETS,
    Enhancer,
    EnhancerConfig,
    SelfAttention,
    SmallEnhancer,
    empty_prompt,
    load_config,
    load_enhancer,
    load_unet,
    replicate_channels,
    save_enhancer,
    write_tensors,
)
from glesam_ros.models.glesam.one_step import alpha_bar, one_step  # noqa: E402
from glesam_ros.whole_files import PART  # noqa: E402

LORA = EnhancerConfig(base="sam_vit_b", kind="lora", unet="sd21-base", channels=8)
SMALL = EnhancerConfig(base="sam_vit_b", kind="small", unet="sd21-base", channels=8)
TINY = {
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}


def tiny_unet(**other):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{**TINY, **other})


def tiny_enhancer(config=LORA, seed=0, trained=False):
    torch.manual_seed(seed)
    enhancer = Enhancer(config, tiny_unet(), torch.randn(1, 77, 12)).eval()
    if trained:
        with torch.no_grad():
            for parameter in enhancer.trained_parameters():
                parameter.normal_(std=0.1)
    return enhancer


def latent(batch=2, channels=8, side=16, seed=1):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


# the published numbers


def test_what_a_file_does_not_say_is_as_published():
    """The best of the paper's ablations: gamma 5, and the scripts: T = 1, LoRA of rank 8 with alpha 8."""
    config = EnhancerConfig("sam_vit_l", "lora", "sd21-base")
    assert (config.gamma, config.timestep, config.rank, config.alpha, config.channels) == (5, 1, 8, 8, 256)
    assert not config.levels


@pytest.mark.parametrize(
    ("name", "width", "parameters", "unet_parameters"),
    [("sd21-base", 1024, 8_518_144, 865_910_724), ("sd15", 768, 8_452_608, 859_520_964)],
)
def test_full_size_counts(name, width, parameters, unet_parameters):
    from diffusers import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
        assert sum(p.numel() for p in unet.parameters()) == unet_parameters
        enhancer = Enhancer(EnhancerConfig("sam_vit_h", "lora", name), unet, torch.zeros(1, 77, width))
    assert sum(isinstance(m, LoraLayer) for m in enhancer.modules()) == 280
    trained = enhancer.trained_parameters()
    assert sum(p.numel() for p in trained) == parameters == sum(x.numel() for x in enhancer.lora_state().values())
    assert all(p.requires_grad for p in trained) and len(trained) == 560
    assert sum(p.requires_grad for p in enhancer.parameters()) == 560
    assert enhancer.unet.conv_in.weight.shape == (320, 256, 3, 3)
    assert enhancer.unet.conv_out.weight.shape == (256, 320, 3, 3)
    assert enhancer.unet.conv_out.base_layer.bias.shape == (256,)


def test_schedule():
    import diffusers

    assert alpha_bar(0) == pytest.approx(1 - 0.00085, abs=1e-15)
    assert alpha_bar(1) == pytest.approx(0.998296, abs=5e-7)
    assert math.sqrt(1 - alpha_bar(1)) == pytest.approx(0.041279, abs=5e-7)
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(torch.tensor([alpha_bar(t) for t in range(1000)]), theirs, rtol=1e-4, atol=0)


def test_attention_of_the_small_one_is_that_of_torch_with_eight_heads():
    """Files of weights do not say how many heads they are of."""
    torch.manual_seed(0)
    own, theirs = SelfAttention(64), torch.nn.MultiheadAttention(64, 8, batch_first=True)
    with torch.no_grad():
        out = theirs.out_proj
        for ours, weight, bias in (
            (own.qkv, theirs.in_proj_weight, theirs.in_proj_bias), (own.out, out.weight, out.bias)
        ):
            weight.copy_(ours.weight.flatten(1).mul_(3))
            bias.copy_(ours.bias)
        z = latent(2, 64, 4)
        tokens = own.norm(z).flatten(2).transpose(1, 2)
        expected = z + theirs(tokens, tokens, tokens)[0].transpose(1, 2).reshape(z.shape)
        torch.testing.assert_close(own(z), expected)


def test_small_is_small():
    config = EnhancerConfig("sam2.1_hiera_tiny", "small", "sd21-base", levels=True)
    assert 25e6 < sum(p.numel() for p in SmallEnhancer(config).parameters()) < 40e6


# channel replication


def test_replicated_channels():
    unet = tiny_unet().double()
    first, last = unet.conv_in.weight.clone(), unet.conv_out.weight.clone()
    first_bias, last_bias = unet.conv_in.bias.clone(), unet.conv_out.bias.clone()
    x = latent(channels=4).double()
    before = torch.nn.functional.conv2d(x, first, padding=1)
    h = latent(channels=8).double()
    narrow = unet.conv_out(h)
    replicate_channels(unet, 256)
    torch.testing.assert_close(unet.conv_in.bias, first_bias)
    torch.testing.assert_close(unet.conv_in(x.repeat(1, 64, 1, 1)) - first_bias[:, None, None], 64 * before)
    torch.testing.assert_close(unet.conv_out(h), narrow.repeat(1, 64, 1, 1))
    for k in (0, 17, 63):
        torch.testing.assert_close(unet.conv_in.weight[:, 4 * k : 4 * k + 4], first)
        torch.testing.assert_close(unet.conv_out.weight[4 * k : 4 * k + 4], last)
        torch.testing.assert_close(unet.conv_out.bias[4 * k : 4 * k + 4], last_bias)
    assert (unet.config.in_channels, unet.config.out_channels) == (256, 256)


# the step


def test_step_undoes_the_noise():
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 8, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    for timestep in (0, 1, 500, 999):
        for gamma in (1.0, 5.0):
            share = alpha_bar(timestep)
            noisy = math.sqrt(share) * clean + math.sqrt(1 - share) * noise / gamma
            restored = one_step(gamma * noisy, noise, gamma, share)
            torch.testing.assert_close(restored, clean, rtol=0, atol=1e-12 if timestep < 999 else 1e-10)


def test_no_noise_only_divides():
    enhancer = tiny_enhancer()
    with torch.no_grad():
        enhancer.unet.conv_out.weight.zero_()
        enhancer.unet.conv_out.base_layer.bias.zero_()
        out = enhancer(latent())
    torch.testing.assert_close(out, latent() / math.sqrt(0.9982960278384514))
    torch.testing.assert_close(SmallEnhancer(SMALL)(latent()), out)


@pytest.mark.parametrize(("timestep", "scheduler"), [(1, "DDPMScheduler"), (321, "DDIMScheduler")])
def test_step_is_that_of_diffusers(timestep, scheduler):
    import diffusers

    gamma = 3.0
    enhancer = tiny_enhancer(dataclasses.replace(LORA, timestep=timestep, gamma=gamma), trained=True)
    schedule = getattr(diffusers, scheduler)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    schedule.set_timesteps(1000)
    with torch.no_grad():
        out = enhancer(latent())
        noise = enhancer.unet(gamma * latent(), timestep, encoder_hidden_states=enhancer.prompt.repeat(2, 1, 1)).sample
    assert noise.std() > 0.1
    expected = schedule.step(noise, timestep, gamma * latent()).pred_original_sample / gamma
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step_is_computed_in_float32(dtype):
    enhancer = SmallEnhancer(SMALL).eval()
    with torch.no_grad():
        torch.nn.init.normal_(enhancer.unet.conv_out.weight, std=0.05)
    enhancer = enhancer.to(dtype)
    z = latent().to(dtype)
    seen = []
    enhancer.unet.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out)))
    with torch.no_grad():
        out = enhancer(z)
    assert out.dtype == dtype and seen[0][0] == dtype
    exact = one_step(5.0 * z.double(), seen[0][1].double(), 5.0, alpha_bar(1))
    # one rounding at the very end
    torch.testing.assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_batch_is_as_one_by_one():
    enhancer = tiny_enhancer(trained=True)
    with torch.no_grad():
        torch.testing.assert_close(enhancer(latent())[1:], enhancer(latent()[1:]), rtol=1e-4, atol=1e-5)


# LoRA


def test_only_lora_is_trained():
    enhancer = tiny_enhancer().train()
    names = {name for name, p in enhancer.unet.named_parameters() if p.requires_grad}
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    before = {k: v.clone() for k, v in enhancer.state_dict().items()}
    optimiser = torch.optim.SGD(enhancer.trained_parameters(), lr=0.1)
    enhancer(latent()).square().mean().backward()
    optimiser.step()
    changed = {k for k, v in enhancer.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(".lora_B." in k for k in changed)  # B begins at zero, so A has no gradient yet


def test_fresh_lora_changes_nothing():
    enhancer = tiny_enhancer()
    torch.manual_seed(0)
    plain = tiny_unet().eval()
    replicate_channels(plain, 8)
    with torch.no_grad():
        noise = plain(5 * latent(), 1, encoder_hidden_states=enhancer.prompt.repeat(2, 1, 1)).sample
        torch.testing.assert_close(enhancer(latent()), one_step(5 * latent(), noise, 5.0, alpha_bar(1)))


def test_checkpointing_keeps_gradients():
    gradients = []
    for on in (False, True):
        enhancer = tiny_enhancer(trained=True).train()
        enhancer.set_gradient_checkpointing(on)
        enhancer(latent()).square().mean().backward()
        gradients.append([p.grad for p in enhancer.trained_parameters()])
        assert any(getattr(m, "gradient_checkpointing", False) for m in enhancer.unet.modules()) is on
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("levels", [False, True])
def test_merged_and_folded_equal_the_adapters(levels):
    enhancer = tiny_enhancer(dataclasses.replace(LORA, levels=levels, rank=4, alpha=6), trained=True)
    level = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected = enhancer(latent(), level)
        assert (expected - tiny_enhancer(dataclasses.replace(LORA, levels=levels))(latent(), level)).abs().max() > 1e-3
        enhancer.merge_lora()
        torch.testing.assert_close(enhancer(latent(), level), expected, rtol=1e-5, atol=1e-5)
        assert not enhancer.lora_state() and not any("lora" in name for name, _ in enhancer.named_modules())
        parameters = sum(p.numel() for p in enhancer.parameters())
        enhancer.fold_constants()
        torch.testing.assert_close(enhancer(latent(), level), expected, rtol=1e-5, atol=1e-5)
        assert sum(p.numel() for p in enhancer.parameters()) < parameters


def test_folded_does_not_run_what_it_dropped():
    enhancer = tiny_enhancer(trained=True)
    enhancer.merge_lora()
    enhancer.fold_constants()
    with torch.no_grad():
        expected = enhancer(latent())
        enhancer.prompt.fill_(math.nan)
        enhancer.step.fill_(7)
        torch.testing.assert_close(enhancer(latent()), expected)


@pytest.mark.parametrize("config", [LORA, SMALL])
def test_inference_keeps_the_level_wide_and_may_be_asked_for_twice(config):
    config = dataclasses.replace(config, levels=True)
    enhancer = tiny_enhancer(config, trained=True) if config.kind == "lora" else SmallEnhancer(config)
    expected = enhancer.eval()(latent(), torch.tensor([0.2, 0.9])).detach()
    for _ in range(2):
        enhancer.for_inference(torch.float32)
        torch.testing.assert_close(enhancer(latent(), torch.tensor([0.2, 0.9])), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in enhancer.parameters())
    assert not any("lora" in key for key in enhancer.state_dict())
    enhancer.for_inference(torch.bfloat16)
    assert {p.dtype for p in enhancer.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in enhancer.level.parameters()} == {torch.float32}


@pytest.mark.parametrize("levels", [False, True])
def test_layers_narrowed_one_by_one_are_what_all_narrowed_at_once_would_be(levels):
    config = dataclasses.replace(LORA, levels=levels)
    fast, whole = (tiny_enhancer(config, trained=True) for _ in range(2))
    fast.for_inference(torch.bfloat16)
    whole.merge_lora()
    whole.fold_constants()  # in float32: constants are computed with all digits
    whole.unet.to(torch.bfloat16)
    expected = whole.unet.state_dict()
    for key, tensor in fast.unet.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[key]), key


def test_lora_that_is_not_finite_is_refused_with_its_name():
    enhancer = tiny_enhancer(trained=True)
    with torch.no_grad():
        enhancer.unet.mid_block.resnets[0].conv1.lora_B["default"].weight[3] = math.nan
    with pytest.raises(ValueError, match=r"unet\.mid_block\.resnets\.0\.conv1: expected finite LoRA weights"):
        enhancer.for_inference(torch.float32)


def test_fold_wants_merged_weights():
    with pytest.raises(ValueError, match="merge_lora"):
        tiny_enhancer().fold_constants()


@pytest.mark.parametrize("kind", ["lora", "small"])
def test_exports_as_one_graph(kind):
    """torch.export refuses what depends on values: what it takes can be compiled, captured and exported to ONNX."""
    levels = True
    if kind == "lora":
        enhancer = tiny_enhancer(dataclasses.replace(LORA, levels=levels), trained=True)
        enhancer.merge_lora()
        enhancer.fold_constants()
    else:
        enhancer = SmallEnhancer(dataclasses.replace(SMALL, levels=levels)).eval()
        with torch.no_grad():
            torch.nn.init.normal_(enhancer.unet.conv_out.weight, std=0.05)
    args = (latent(1), torch.tensor([0.5]))
    with torch.no_grad():
        exported = torch.export.export(enhancer, args)
        torch.testing.assert_close(exported.module()(*args), enhancer(*args), rtol=1e-4, atol=1e-5)


# levels


def test_fresh_levels_change_nothing():
    plain, levelled = tiny_enhancer(), tiny_enhancer(dataclasses.replace(LORA, levels=True))
    with torch.no_grad():
        torch.testing.assert_close(levelled(latent(), torch.tensor([0.0, 0.7])), plain(latent()))


@pytest.mark.parametrize("kind", ["lora", "small"])
def test_the_level_can_be_learnt(kind):
    config = dataclasses.replace(LORA if kind == "lora" else SMALL, levels=True)
    enhancer = tiny_enhancer(config) if kind == "lora" else SmallEnhancer(config)
    network = enhancer.unet
    embedding = network.class_embedding if kind == "lora" else network.level
    with torch.no_grad():
        network.conv_out.weight.normal_(std=0.05)
    z, level = latent(), torch.tensor([0.0, 1.0])
    optimiser = torch.optim.Adam(embedding.parameters(), 0.1)
    enhancer(z, level).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        assert (enhancer(z, level) - enhancer(z, 1 - level)).abs().max() > 1e-4
    trained = {id(p) for p in enhancer.trained_parameters()}
    assert all(id(p) in trained for p in [*embedding.parameters(), *enhancer.level.parameters()])


@pytest.mark.parametrize(("base", "high"), [("sam_vit_b", ()), ("sam2.1_hiera_tiny", (32, 64))])
def test_predictor_learns_noise(base, high):
    enhancer = SmallEnhancer(EnhancerConfig(base, "small", "sd15", levels=True, channels=8))

    def features(noise, seed):
        generator = torch.Generator().manual_seed(seed)
        levels = [(8, 8), *((c, 8) for c in high)]
        maps = [torch.randn(len(noise), c, s, s, generator=generator) for c, s in levels]
        maps = [(1 + noise[:, None, None, None]) * m for m in maps]
        return Features(maps[0], tuple(maps[1:]))

    truth = torch.tensor([0, 1 / 3, 2 / 3, 1.0]).repeat(4)
    optimiser = torch.optim.Adam(enhancer.level.parameters(), 3e-3)
    for seed in range(100):
        loss = (enhancer.predict_level(features(truth, seed)) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        predicted = enhancer.predict_level(features(truth, 1000))
    assert predicted.shape == (16,) and predicted.min() >= 0 and predicted.max() <= 1
    assert (predicted - truth).abs().mean() < 0.12
    with pytest.raises(ValueError, match="high levels"):
        enhancer.predict_level(Features(latent(), () if high else (latent(),)))


def test_predictor_reads_means_then_logarithms_of_deviations():
    """What the weights in files are of: were it read otherwise, they would still load and predict something else."""
    predictor = SmallEnhancer(dataclasses.replace(SMALL, levels=True)).level
    z = latent(2)
    values = z.double().numpy().reshape(2, 8, -1)
    statistics = np.concatenate([values.mean(2), np.log(values.std(2) + 1e-5)], 1)
    with torch.no_grad():
        # the first hidden unit passes one statistic on, and the last layer that unit
        for parameter in predictor.parameters():
            parameter.zero_()
        predictor.last.weight[0, 0] = 1
        for k in range(16):
            predictor.first.weight.zero_()
            predictor.first.weight[0, k] = 1
            x = statistics[:, k]
            expected = 1 / (1 + np.exp(-x / (1 + np.exp(-x))))
            assert predictor(Features(z)).numpy() == pytest.approx(expected, abs=1e-6)


def test_the_level_is_embedded_as_three_sines_and_cosines():
    embedding = SmallEnhancer(dataclasses.replace(SMALL, levels=True)).unet.level
    level = torch.tensor([0.0, 1 / 3, 1.0])
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.zero_()
        embedding.first.weight[:6, :6] = torch.eye(6)
        embedding.last.weight[:6, :6] = torch.eye(6)
        found = embedding(level)
    angles = [[np.pi * k * x for k in (1, 2, 3)] for x in level.tolist()]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    assert found[:, :6].numpy() == pytest.approx(waves / (1 + np.exp(-waves)), abs=1e-6)
    assert (found[:, 6:] == 0).all()


def test_level_of_a_half_precision_model_does_not_overflow():
    enhancer = SmallEnhancer(dataclasses.replace(SMALL, levels=True)).half()
    level = enhancer.predict_level(Features(torch.full((1, 8, 16, 16), 3e4, dtype=torch.float16)))
    assert level.dtype == torch.float32 and torch.isfinite(level).all()


# files


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """A folder as published by Stable Diffusion 2.1, at tiny width: U-Net in fp16, text encoder, tokenizer."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("unets") / "sd21-base"
    torch.manual_seed(0)
    tiny_unet().half().save_pretrained(folder / "unet")
    text = CLIPTextConfig(
        vocab_size=4, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights = {f"text_model.{key.removeprefix('text_model.')}": x for key, x in weights.items()}  # as published
    save_file(weights, folder / "text_encoder" / "model.safetensors")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    words = {"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "!</w>": 3}
    (tokenizer / "vocab.json").write_text(json.dumps(words))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {key: value for key, value in settings.items() if key.endswith("_token")}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    return folder.parent


def test_empty_prompt_is_computed_once(unets):
    from transformers import CLIPTextModel

    folder = unets / "sd21-base"
    prompt = empty_prompt(folder)
    ids = torch.tensor([[1, 2] + [0] * 75])  # begin, end, and SD 2's padding "!"
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(ids).last_hidden_state
    assert prompt.shape == (1, 77, 12)
    torch.testing.assert_close(prompt, expected)
    (folder / "text_encoder").rename(folder / "away")
    try:
        assert torch.equal(empty_prompt(folder), prompt)
        (folder / "empty_prompt.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="text_encoder"):
            empty_prompt(folder)
    finally:
        (folder / "away").rename(folder / "text_encoder")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    write_tensors({"x": torch.ones(3)}, file)
    whole = file.read_bytes()

    def cut_short(path, content):
        with open(path, "wb") as half:
            half.write(content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(type(file), "write_bytes", cut_short)
    with pytest.raises(OSError, match="no space left"):
        write_tensors({"x": torch.zeros(3)}, file)
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_no_embedded_prompt_is_refused(tmp_path):
    write_tensors({"embedding": torch.zeros(1, 77, 12)}, tmp_path / "empty_prompt.safetensors")
    with pytest.raises(ValueError, match=r"empty_prompt.safetensors: expected the key prompt, got embedding; remove"):
        empty_prompt(tmp_path)


def test_empty_prompt_wants_all_weights_and_no_others(unets, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(unets / "sd21-base", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("empty_prompt*"))
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    # older files of Stable Diffusion have these numbers, too
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    norm = weights.pop("text_model.final_layer_norm.weight")
    odd = {"text_model.odd.weight": norm.clone()}
    for wrong, said in (
        (weights, "missing: .*final_layer_norm.weight"),
        ({**weights, "text_model.final_layer_norm.weight": norm, **odd}, "encoder; unexpected: .*odd.weight$"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=said):
            empty_prompt(tmp_path)
        assert not (tmp_path / "empty_prompt.safetensors").exists()
    save_file({**weights, "text_model.final_layer_norm.weight": norm}, file)
    assert empty_prompt(tmp_path).shape == (1, 77, 12)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_that_is_not_there_whole_embeds_no_prompt(unets, tmp_path, missing):
    """A download that was cut: without its last file the prompt would be padded otherwise, and kept for good."""
    folder = tmp_path / "sd21-base"
    shutil.copytree(unets / "sd21-base", folder, ignore=shutil.ignore_patterns("empty_prompt*"))
    (folder / "tokenizer" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"tokenizer of a Stable Diffusion at .*{missing}, found none"):
        empty_prompt(folder)
    with pytest.raises(FileNotFoundError, match=f"{missing}, found no file; get it: glesam models get sam_vit_b"):
        catalogue.unet_folder("sd21-base", "sam_vit_b+glesam", tmp_path)
    assert not (folder / "empty_prompt.safetensors").exists()


def test_a_tokenizer_of_the_newer_layout_needs_no_other_file(unets, tmp_path):
    from transformers import CLIPTokenizer

    folder = tmp_path / "sd21-base"
    shutil.copytree(unets / "sd21-base", folder, ignore=shutil.ignore_patterns("empty_prompt*"))
    expected = empty_prompt(folder)
    (folder / "empty_prompt.safetensors").unlink()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        pytest.skip("this transformers writes the older layout")
    assert not (folder / "tokenizer" / "special_tokens_map.json").is_file()
    assert catalogue.unet_folder("sd21-base", "sd21-base", tmp_path) == tmp_path
    assert torch.equal(empty_prompt(folder), expected)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer/vocab.json", b"<html>", "tokenizer: expected a tokenizer of CLIP, cannot read it"),
        ("text_encoder/model.safetensors", b"version https://git", "model.safetensors: expected a safetensors file"),
        ("text_encoder/model.safetensors", None, "model.safetensors: expected a safetensors file"),
    ],
)
def test_a_broken_text_encoder_is_named(unets, tmp_path, file, content, said):
    shutil.copytree(unets / "sd21-base", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("empty_prompt*"))
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(ValueError, match=said) as raised:
        empty_prompt(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("levels", [False, True])
def test_saved_lora_comes_back(unets, tmp_path, levels):
    from safetensors.torch import load_file

    config = dataclasses.replace(LORA, levels=levels, gamma=3.0, rank=4)
    network = type(tiny_unet()).from_pretrained(unets / "sd21-base" / "unet", low_cpu_mem_usage=False).float()
    enhancer = Enhancer(config, network, empty_prompt(unets / "sd21-base")).eval()
    with torch.no_grad():
        for parameter in enhancer.trained_parameters():
            parameter.normal_(std=0.1)
    folder = tmp_path / "sam_vit_b+glesam"
    save_enhancer(enhancer.to(memory_format=torch.channels_last), folder, {"a.weight": torch.ones(2)})
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    assert len(lora) == len(enhancer.lora_state()) and lora["unet.conv_in.lora.down.weight"].shape == (4, 8, 3, 3)
    assert lora["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.up.weight"].shape == (8, 4)
    assert load_file(folder / "mask_decoder.safetensors")["a.weight"].tolist() == [1, 1]
    assert (folder / "level.safetensors").is_file() is levels
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert len(modes) == 1  # weights are as readable as their glesam.json
    again = load_enhancer(folder, unets)
    assert again.config == config and not again.training
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    level, features = torch.tensor([0.3, 0.8]), Features(latent())
    with torch.no_grad():
        torch.testing.assert_close(again(latent(), level), enhancer(latent(), level), rtol=1e-5, atol=1e-5)
        if levels:
            torch.testing.assert_close(again.predict_level(features), enhancer.predict_level(features))
    # trained on: what is loaded can be trained and saved again
    assert len(again.trained_parameters()) == len(enhancer.trained_parameters())
    again.merge_lora()
    with pytest.raises(ValueError, match="before merge_lora"):
        save_enhancer(again, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("failing", ["unet.safetensors", "level.safetensors"])
def test_a_save_that_was_cut_leaves_the_model_that_was_there_or_none(tmp_path, monkeypatch, failing):
    from glesam_ros.models.glesam import enhancer as module

    small, write = SmallEnhancer(dataclasses.replace(SMALL, levels=True)), write_tensors
    save_enhancer(small, tmp_path)

    def cut(tensors, file):
        if file.name == failing + PART:
            raise KeyboardInterrupt
        write(tensors, file)

    monkeypatch.setattr(module, "write_tensors", cut)
    there = content(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save_enhancer(small, tmp_path)
    assert content(tmp_path) == there
    with pytest.raises(KeyboardInterrupt):
        save_enhancer(small, tmp_path / "new")
    assert not (tmp_path / "new" / "glesam.json").exists()
    monkeypatch.undo()
    save_enhancer(small, tmp_path / "new")
    assert load_enhancer(tmp_path / "new", tmp_path).config == small.config


def test_while_files_take_the_place_of_others_no_model_is_there(tmp_path, monkeypatch):
    """A kill between two of them would leave the network of one model with the level of another."""
    small = SmallEnhancer(dataclasses.replace(SMALL, levels=True))
    save_enhancer(small, tmp_path)
    replace, seen, targets = os.replace, [], {str(path) for path in tmp_path.iterdir()}

    def watched(old, new):
        if str(new) in targets:
            seen.append((tmp_path / "glesam.json").exists())
        replace(old, new)

    monkeypatch.setattr(os, "replace", watched)
    save_enhancer(small, tmp_path)
    assert seen == [False] * 3 and load_enhancer(tmp_path, tmp_path).config == small.config


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("kind", ["lora", "small"])
def test_a_folder_that_lacks_a_file_of_its_kind_does_not_take_the_place_of_a_model(tmp_path, kind, levels):
    config = dataclasses.replace(LORA if kind == "lora" else SMALL, levels=levels)
    made = tiny_enhancer(config) if kind == "lora" else SmallEnhancer(config)
    folder, home = tmp_path / "run", tmp_path / "home"
    save_enhancer(made, folder)
    take_enhancer(folder, config.model, home)
    own = home / config.model
    there = content(own)
    assert set(there) == {"glesam.json", *config.files} and there == content(folder)
    for name in config.files:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"run: expected .*{name}.* beside glesam.json, found none; take the"):
            take_enhancer(folder, config.model, home)
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{name}: expected a safetensors file, cannot read it"):
            take_enhancer(folder, config.model, home)
        (folder / name).write_bytes(whole)
        assert content(own) == there
    assert set(dict(verify(home)).values()) == {"ok"}


def test_a_disk_that_fills_up_leaves_the_model_that_is_there(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, levels=True)
    save_enhancer(SmallEnhancer(config), tmp_path / "run")
    take_enhancer(tmp_path / "run", config.model, tmp_path / "home")
    own = tmp_path / "home" / config.model
    there, copy, copies = content(own), shutil.copyfile, []

    def full(source, target):
        if copies:
            raise OSError("no space left")
        copies.append(copy(source, target))

    save_enhancer(SmallEnhancer(config), tmp_path / "run")  # other random weights
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        take_enhancer(tmp_path / "run", config.model, tmp_path / "home")
    assert content(own) == there and set(dict(verify(tmp_path / "home")).values()) == {"ok"}


@pytest.mark.parametrize("levels", [False, True])
def test_saved_small_comes_back_without_a_unet(tmp_path, levels):
    enhancer = SmallEnhancer(dataclasses.replace(SMALL, levels=levels)).eval()
    with torch.no_grad():
        enhancer.unet.conv_out.weight.normal_(std=0.05)
    save_enhancer(enhancer, tmp_path)
    again = load_enhancer(tmp_path, tmp_path / "nowhere")
    level = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        torch.testing.assert_close(again(latent(), level), enhancer(latent(), level))
    if levels:
        assert torch.equal(again.predict_level(Features(latent())), enhancer.predict_level(Features(latent())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_of_the_file_of_the_unet_is_left_where_it_runs(unets, tmp_path, dtype):
    """While it loads, matrices are views of the file; later that may be replaced, or lie on a disk that goes away."""
    shutil.copytree(unets, tmp_path / "unets")
    folder = tmp_path / "unets" / "sd21-base" / "unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    load_unet(folder).to(dtype).save_pretrained(folder)  # as SD 2.1's file is, in float32, and half as large
    save_enhancer(tiny_enhancer(trained=True), tmp_path / "mine")
    enhancer = load_enhancer(tmp_path / "mine", tmp_path / "unets")
    enhancer.for_inference(torch.float32)
    with torch.no_grad():
        expected = enhancer(latent())
        with file.open("r+b") as writer:
            writer.write(bytes(file.stat().st_size))
        assert torch.equal(enhancer(latent()), expected)
    with pytest.raises(ValueError, match="safetensors"):
        load_enhancer(tmp_path / "mine", tmp_path / "unets")


def test_files_that_do_not_fit(unets, tmp_path):
    from safetensors.torch import load_file, save_file

    save_enhancer(tiny_enhancer(), tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_enhancer(tmp_path, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    lora = load_file(file)
    key = "unet.conv_in.lora.up.weight"
    for change in ({}, {key: lora[key][:, :4].clone()}, {key: lora[key], "unet.other.lora.up.weight": torch.ones(1)}):
        save_file({**{k: v for k, v in lora.items() if k != key}, **change}, file)
        with pytest.raises(ValueError, match="conv_in.lora_B|other.lora_B"):
            load_enhancer(tmp_path, unets)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights"):
        load_enhancer(tmp_path, unets)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"base": "a"}', "missing .* 'kind'"),
        ('{"base": "a", "kind": "lora", "unet": "sd15", "depth": 3}', "unexpected .* 'depth'"),
        ('{"base": "a", "kind": "lora", "unet": "sd15", "gamma": "5"}', "gamma: expected a number > 0, got '5'"),
        ('{"base": "a", "kind": "lora", "unet": "sd15", "levels": 1}', "levels: expected true or false, got 1"),
    ],
)
def test_config_file_that_is_none(tmp_path, text, words):
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path)
    (tmp_path / "glesam.json").write_text(text)
    with pytest.raises(ValueError, match=f"glesam.json: .*{words}"):
        load_config(tmp_path)


# faults


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "large"}, "kind: expected lora or small, got 'large'"),
        ({"unet": "sdxl"}, "unet: expected one of sd21-base, sd15"),
        ({"gamma": 0.0}, "gamma: expected a number > 0"),
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": math.inf}, "gamma"),
        ({"timestep": -1}, "timestep: expected a whole number in 0..999, got -1"),
        ({"timestep": 1000}, "got 1000"),
        ({"rank": 0}, "rank"),
        ({"channels": 6}, "channels: expected a multiple of 4, got 6"),
    ],
)
def test_config_refuses(values, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(LORA, **values)


@pytest.mark.parametrize("make", [tiny_enhancer, lambda config=SMALL: SmallEnhancer(config)])
def test_forward_refuses(make):
    enhancer = make()
    with pytest.raises(ValueError, match=r"expected shape \(B, 8, h, w\), got \(2, 4, 16, 16\)"):
        enhancer(latent(channels=4))
    with pytest.raises(ValueError, match="got .8, 16, 16."):
        enhancer(latent()[0])
    with pytest.raises(ValueError, match="multiples of 8, got 12 x 12"):
        enhancer(latent(side=12))
    with pytest.raises(ValueError, match="without"):
        enhancer.predict_level(Features(latent()))
    levelled = make(dataclasses.replace(enhancer.config, levels=True))
    with pytest.raises(ValueError, match="trained with levels"):
        levelled(latent())
    with pytest.raises(ValueError, match=r"level: expected shape \(2,\), got \(1,\)"):
        levelled(latent(), torch.zeros(1))


def test_enhancer_refuses_a_foreign_prompt_and_unet():
    with pytest.raises(ValueError, match=r"prompt: expected shape \(1, 77, 12\) of this U-Net, got \(1, 77, 16\)"):
        Enhancer(LORA, tiny_unet(), torch.zeros(1, 77, 16))
    with pytest.raises(ValueError, match="expected 4 channels in and out, got 9 and 4"):
        Enhancer(LORA, tiny_unet(in_channels=9), torch.zeros(1, 77, 12))
