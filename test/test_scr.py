"""SCR: merged LoRA against the formula and its adapters, files, text, the step, tiles, colours, faults."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import math
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("diffusers", "peft", "transformers"))):
    pytest.skip("expected diffusers, peft and transformers", allow_module_level=True)

from tiny_sd import END, PAD, START, UNET, tiny_unet, tiny_vae, write_tiny_scr, write_tiny_sd  # noqa: E402

from glesam_ros.models import registry  # noqa: E402
from glesam_ros.models.base import OutOfMemory  # noqa: E402
from glesam_ros.models.glesam import catalogue  # noqa: E402
from glesam_ros.models.glesam.enhancer import LORA_TARGETS, UNETS, load_unet  # noqa: E402
from glesam_ros.models.glesam.one_step import alpha_bar  # noqa: E402
from glesam_ros.models.rass import scr  # noqa: E402
from glesam_ros.models.rass.scr import (  # noqa: E402
    PROMPTS_KEPT,
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
    merge_lora,
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
def adapted(checkpoint):
    """A U-Net with the adapters of the checkpoint; tests leave it as it is."""
    unet = tiny_unet()
    load_lora(unet, read_scr(checkpoint), "test")
    return unet.requires_grad_(False)


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
def test_merged_gives_what_the_adapters_give(adapted, dtype):
    plain, own, merged = tiny_unet().to(dtype), copy.deepcopy(adapted).to(dtype), copy.deepcopy(adapted).to(dtype)
    merge_lora(merged)
    x = latent(dtype)
    expected, found = noise(own, x), noise(merged, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (noise(plain, x) - found).abs().mean() > 0.01  # the adapters do something
    assert set(merged.state_dict()) == set(plain.state_dict())
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("group", scr.GROUPS)
def test_each_group_counts(adapted, group):
    with_all = noise(adapted, latent())
    silent = copy.deepcopy(adapted)
    for name, parameter in silent.named_parameters():
        if f".lora_B.default_{group}." in name:
            parameter.zero_()
    assert (noise(silent, latent()) - with_all).abs().mean() > 1e-4


def test_merged_weights_are_w0_plus_alpha_over_r_ba(checkpoint):
    weights = read_scr(checkpoint)
    plain, merged = tiny_unet().double(), tiny_unet().double()
    merge_scr(merged, checkpoint)
    assert not any(p.requires_grad for p in merged.parameters())
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


def test_layers_narrowed_one_by_one_are_what_all_narrowed_at_once_would_be(checkpoint):
    fast, whole = tiny_unet(), tiny_unet()
    merge_scr(fast, checkpoint, torch.bfloat16)
    merge_scr(whole, checkpoint)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    expected = whole.to(torch.bfloat16).state_dict()
    for key, x in fast.state_dict().items():
        assert x.dtype == torch.bfloat16 and torch.equal(x, expected[key]), key


def test_merged_weights_are_no_views_of_the_file(sd, checkpoint, tmp_path):
    """Some layers have no adapter: they have to be copied, too, before the file may go."""
    shutil.copytree(sd / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    unet = load_unet(tmp_path / "unet")
    merge_scr(unet, checkpoint)
    expected = {key: x.clone() for key, x in unet.state_dict().items()}
    with file.open("r+b") as writer:
        writer.write(bytes(file.stat().st_size))
    for key, x in unet.state_dict().items():
        assert torch.equal(x, expected[key]), key


def test_a_broken_lora_is_not_merged(adapted):
    broken = copy.deepcopy(adapted)
    next(p for n, p in broken.named_parameters() if ".lora_B.default_others." in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="default_others seems to be broken"):
        merge_lora(broken)


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
    assert {group: len(found) for group, found in groups.items()} == {"encoder": 94, "decoder": 147, "others": 17}
    shapes = [unet.get_submodule(name).weight.shape for name in names]
    assert sum(4 * (shape[0] + shape[1:].numel()) for shape in shapes) == 4_055_712  # LoRA of rank 4
    assert not set(scr.SCR_TARGETS) - set(LORA_TARGETS)
    assert sum(map(len, lora_groups(unet, ["conv_in"]).values())) == 1


# files


def test_a_checkpoint_survives_writing_and_reading(checkpoint, adapted, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    assert set(content) == {
        "rank_unet", "unet_lora_encoder_modules", "unet_lora_decoder_modules", "unet_lora_others_modules",
        "state_dict_unet",
    }
    assert "conv_in.base_layer.weight" in content["state_dict_unet"]
    write_scr(scr_weights(adapted), tmp_path / "new" / "scr.pkl")
    again, first = read_scr(tmp_path / "new" / "scr.pkl"), read_scr(checkpoint)
    assert (again.rank, again.modules.keys()) == (first.rank, first.modules.keys())
    assert {g: sorted(n) for g, n in again.modules.items()} == {g: sorted(n) for g, n in first.modules.items()}
    assert again.state.keys() == first.state.keys()
    assert all(torch.equal(again.state[key], first.state[key]) for key in first.state)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["scr.pkl"]
    write_scr(scr_weights(adapted), tmp_path / "other" / "scr.pkl")
    assert (tmp_path / "other" / "scr.pkl").read_bytes() == (tmp_path / "new" / "scr.pkl").read_bytes()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank_unet": None}, "rank_unet is missing"),
        ({"rank_unet": 0}, "rank_unet is int instead of a whole number >= 1"),
        ({"rank_unet": True}, "rank_unet is bool instead of a whole number >= 1"),
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
    with pytest.raises(ValueError, match="that: .*missing: conv_in.base_layer.bias; wrong shape: .*attn2.to_k"):
        other = tiny_unet(cross_attention_dim=16)
        load_lora(other, scr.ScrWeights(weights.rank, weights.modules, state), "that")
    modules = {**weights.modules, "others": ["mid_block.attentions.7.proj_in"]}
    with pytest.raises(ValueError, match="that: expected names of layers of this U-Net, got mid_block.attentions.7"):
        load_lora(tiny_unet(), scr.ScrWeights(weights.rank, modules, weights.state), "that")
    with pytest.raises(ValueError, match="expected SCR's LoRA"):
        scr_weights(tiny_unet())


# text


@pytest.fixture(scope="module")
def tokenizer(sd):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(sd / "tokenizer")


def test_names_lie_where_their_spans_say(tokenizer, sd):
    vocabulary = json.loads((sd / "tokenizer" / "vocab.json").read_text())
    ids, spans = tokenise(tokenizer, ["Road", "traffic_light", "car"])
    words = ["road</w>", *"traffi", "c</w>", *"ligh", "t</w>", "car</w>"]
    expected = [START, *words, END, *[PAD] * (77 - 2 - len(words))]
    assert ids.tolist() == [[vocabulary[word] for word in expected]]
    assert spans == [(1, 2), (2, 14), (14, 15)]
    assert tokenise(tokenizer, ["door, double door"])[1] == [(1, 1 + 4 + 6 + 4)]  # the comma is no token


def test_names_that_do_not_fit_are_left_out(tokenizer):
    ids, spans = tokenise(tokenizer, ["road"] * 70 + ["abcdef", "car"])  # 70 + 6 > 75
    assert len(spans) == 70 and spans[-1] == (70, 71)
    assert ids.shape == (1, 77)
    assert torch.equal(ids, tokenise(tokenizer, ["road"] * 70)[0])
    ids, spans = tokenise(tokenizer, ["road"] * 75)
    assert spans[-1] == (75, 76) and ids[0, 76] == tokenizer.eos_token_id
    assert tokenise(tokenizer, [])[1] == []
    with pytest.raises(ValueError, match="expected names in words, got ' , '"):
        tokenise(tokenizer, ["road", " , "])


def test_prompts_are_embedded_once(sd, tokenizer, tmp_path):
    from transformers import CLIPTextModel

    folder = shutil.copytree(sd, tmp_path / "sd")
    prompts = ClassPrompts(folder)
    found = prompts(["road", "car"])
    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(tokenise(tokenizer, ["road", "car"])[0]).last_hidden_state
        empty = encoder(tokenise(tokenizer, [])[0]).last_hidden_state
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(prompts(), empty)
    assert not torch.allclose(found, empty)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    assert torch.equal(prompts(["road", "car"]), found) and torch.equal(prompts(), empty)
    fresh = ClassPrompts(folder)
    assert torch.equal(fresh(), empty)
    with pytest.raises(FileNotFoundError, match="expected the tokenizer.*glesam models get scr-sd21"):
        fresh(["road"])


def test_the_last_lists_of_names_are_remembered(sd):
    prompts = ClassPrompts(sd)
    lists = [["road"] * k for k in range(1, PROMPTS_KEPT + 1)]
    found = [prompts(names) for names in lists]
    assert all(prompts(names) is x for names, x in zip(lists, found))
    prompts(lists[0])
    prompts(["car"])  # takes the place of the second, the longest unused
    assert prompts(lists[0]) is found[0]
    again = prompts(lists[1])
    assert again is not found[1] and torch.equal(again, found[1])


# the network


def test_vae_with_older_names(sd, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(sd / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, x in load_file(file).items():
        name = next((name for name in older if f".attentions.0.{name}." in key), None)
        state[key.replace(name, older[name]) if name else key] = x.half()
    assert any(".query." in key for key in state)
    save_file(state, file, metadata={"format": "pt"})
    vae = load_vae(folder)
    expected = tiny_vae().state_dict()
    assert vae.dtype == torch.float32 and not any(p.requires_grad for p in vae.parameters())
    for key, x in vae.state_dict().items():
        torch.testing.assert_close(x, expected[key], rtol=0, atol=1e-3)
    del state["decoder.conv_in.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected all weights.*decoder.conv_in.bias"):
        load_vae(folder)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="expected a VAE of diffusers, cannot read it"):
        load_vae(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="expected a VAE of diffusers at .*safetensors"):
        load_vae(folder)


def zero_noise(unet):
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    return unet


def test_the_step_is_the_formula():
    unet, vae = tiny_unet(), tiny_vae()
    x = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 77, 12, generator=torch.Generator().manual_seed(1))
    for timestep in (1, 999):
        network = Scr(unet, vae, timestep)
        with torch.no_grad():
            latent = 0.18215 * vae.encode(x).latent_dist.mode()
            torch.testing.assert_close(network.encode(x), latent)
            eps = unet(latent, torch.tensor([timestep]), encoder_hidden_states=text).sample
            share = alpha_bar(timestep)
            expected = (latent - math.sqrt(1 - share) * eps) / math.sqrt(share)
            torch.testing.assert_close(network.restore(latent, text), expected)
            torch.testing.assert_close(network(x, text), vae.decode(expected / 0.18215).sample)


def test_half_precision_takes_the_step_in_float32():
    network = Scr(zero_noise(tiny_unet()), tiny_vae()).to(torch.bfloat16)
    latent = torch.randn(1, 4, 8, 8).to(torch.bfloat16)
    with torch.no_grad():
        found = network.restore(latent, torch.zeros(1, 77, 12))
    torch.testing.assert_close(found, latent.float() / math.sqrt(alpha_bar(1)))
    assert network.decode(found).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 64, 65), (1, 4, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\) with sides that are multiples of 64"):
        Scr(tiny_unet(), tiny_vae()).encode(torch.zeros(shape))


def test_networks_that_do_not_fit():
    with pytest.raises(ValueError, match="timestep: expected 0..999, got 1000"):
        Scr(tiny_unet(), tiny_vae(), 1000)
    with pytest.raises(ValueError, match="expected 4 channels"):
        Scr(tiny_unet(in_channels=8), tiny_vae())


# pictures


@pytest.mark.parametrize("size", [(40, 60), (200, 130), (1, 1), (7, 300)])
def test_the_mean_colour_stays(size):
    image = picture(size)
    restored = np.random.default_rng(1).normal(90, 40, (*size, 3)).astype(np.float32)
    found = keep_colours(restored, image)
    np.testing.assert_allclose(found.mean((0, 1)), image.mean((0, 1)), atol=0.02)
    shifted = keep_colours(restored + np.float32([30, -20, 5]), image)
    np.testing.assert_allclose(shifted, found, atol=1e-3)  # a cast of the network is taken out
    same = image.astype(np.float32)
    np.testing.assert_allclose(keep_colours(same, image), same)


def test_the_gaussian_is_that_of_five_wavelet_levels():
    rng = np.random.default_rng(0)
    image, restored = rng.integers(0, 256, (120, 160, 3), np.uint8), rng.uniform(0, 255, (120, 160, 3))
    restored[:, 80:] *= 0.3  # an edge in colour
    blurred = image - restored
    for level in range(5):  # the mean with weights 1 2 1 of what lies 2^level pixels apart, in both directions
        for axis in (0, 1):
            pad = [(0, 0)] * 3
            pad[axis] = (2**level,) * 2
            x = np.moveaxis(np.pad(blurred, pad, mode="symmetric"), axis, 0)
            step = 2**level
            blurred = np.moveaxis((x[: -2 * step] + 2 * x[step:-step] + x[2 * step :]) / 4, 0, axis)
    found = keep_colours(restored.astype(np.float32), image)
    assert np.abs(found - (restored + blurred))[40:-40, 40:-40].max() < 3  # of 90 at the edge


def test_detail_is_of_the_restored_picture_and_noise_hardly_passes():
    columns = np.arange(200)
    stripes = np.where(columns // 2 % 2, 160, 96).astype(np.float32)
    restored = np.repeat(np.repeat(stripes[None, :, None], 150, 0), 3, 2)
    noisy = np.clip(128 + np.random.default_rng(0).normal(0, 30, restored.shape), 0, 255).astype(np.uint8)
    found = keep_colours(restored, noisy)
    assert np.abs(found - restored)[40:-40, 40:-40].max() < 5


@pytest.mark.parametrize("length", [1, 63, 256, 257, 300, 511, 512, 1000, 4000])
@pytest.mark.parametrize(("tile", "overlap"), [(256, 64), (768, 64)])
def test_tiles_cover_with_enough_in_common(length, tile, overlap):
    found = starts(length, tile, overlap)
    assert found[0] == 0 and found[-1] + tile >= length
    assert all(a + tile - b >= overlap for a, b in zip(found, found[1:]))
    assert all(b > a for a, b in zip(found, found[1:]))
    assert found == [0] if length <= tile else found[-1] + tile == length


def test_weights_rise_from_the_edges():
    weights = feather(256, 64)
    assert (weights > 0).all() and (weights <= 1).all() and np.array_equal(weights, weights[::-1])
    assert (np.diff(weights[:64]) > 0).all() and (weights[64:-64] == 1).all()
    # two neighbours that share 64 pixels add up to one: no seam in brightness
    np.testing.assert_allclose(weights[-64:] + weights[:64], 1, atol=1e-6)


class Fake(torch.nn.Module):
    """A network that gives what `function` makes of its pixels; it counts calls and the largest tile."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls, self.largest = function, 0, 0

    def forward(self, pixels, prompt):
        self.calls += 1
        self.largest = max(self.largest, *pixels.shape[2:])
        assert all(side % 64 == 0 for side in pixels.shape[2:])
        return self.function(pixels)


def restorer_of(function, tile=256):
    network = Fake(function)
    prompt = torch.zeros(1, 77, 12)
    return ScrRestorer(network, lambda classes: prompt, torch.device("cpu"), torch.float32, tile), network


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 3), (240, 320), (300, 700)])
def test_a_network_that_changes_nothing_gives_the_picture(size):
    restorer, network = restorer_of(lambda x: x)
    image = picture(size)
    before = image.copy()
    found = restorer.restore(image)
    assert np.array_equal(found, image) and found is not image and np.array_equal(image, before)
    assert network.largest <= 256
    assert network.calls == 1 if max(size) <= 256 else network.calls > 1


def test_tiles_leave_no_seam():
    # the network darkens each tile differently, by its mean: blending has to be smooth
    restorer, network = restorer_of(lambda x: x + 0.2 * torch.sin(torch.tensor(float(network.calls))))
    image = np.full((256, 1000, 3), 128, np.uint8)
    found = restorer.restore(image)[:, :, 0].astype(int)
    assert network.calls > 3
    assert np.abs(np.diff(found, axis=1)).max() <= 2


def test_where_memory_lacks_tiles_shrink():
    def hungry(x):
        if x.shape[2] * x.shape[3] > 320 * 320:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return x

    restorer, network = restorer_of(hungry, tile=768)
    image = picture((500, 700))
    assert np.array_equal(restorer.restore(image), image)
    tried = network.calls
    assert np.array_equal(restorer.restore(image), image)
    assert network.calls - tried == len(starts(512, 256, 64)) * len(starts(704, 256, 64))  # nothing is tried again

    def starving(x):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    restorer, _ = restorer_of(starving, tile=512)
    with pytest.raises(OutOfMemory, match="out of memory"):
        restorer.restore(image)


def test_tiles_are_restored_on_the_device_of_the_weights(monkeypatch):
    """Each thread has a current device of its own, whose streams and graphs are meant."""
    current, used = [], []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(scr, "made_current", made_current)
    restorer, _ = restorer_of(lambda x: (used.extend(current), x)[1])
    restorer.restore(picture())
    assert used == [torch.device("cpu")] and not current


def test_lack_of_memory_at_load_says_what_to_do(home, monkeypatch):
    def lacks(network, *place):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 26 MiB")

    monkeypatch.setattr(Scr, "to", lacks)
    with pytest.raises(OutOfMemory, match="allocate 26 MiB; expected memory .* take a smaller model or precision$"):
        load_scr("cpu", "auto")
    with pytest.raises(OutOfMemory, match="allocate 26 MiB$"):
        ScrRestorer(Scr(tiny_unet(), tiny_vae()), ClassPrompts(home), torch.device("cpu"), torch.float32)


def test_other_errors_pass():
    def broken(x):
        raise RuntimeError("a kernel is missing")

    restorer, _ = restorer_of(broken)
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        restorer.restore(picture())
    restorer, _ = restorer_of(lambda x: x * float("nan"))
    with pytest.raises(RuntimeError, match="expected finite values.*take precision fp32, or bf16"):
        restorer.restore(picture())
    with pytest.raises(TypeError, match="expected dtype uint8"):
        restorer.restore(picture().astype(np.float32))
    for tile in (0, 300, 128):
        with pytest.raises(ValueError, match="tile: expected a multiple of 64, at least 256"):
            restorer_of(broken, tile)


def test_the_restorer_from_files(home, adapted):
    model = registry.load_restorer_model("scr-sd21", "cpu", "auto")
    assert (model.name, model.device) == ("scr-sd21", "cpu (fp32, torch)")
    image = picture()
    found = model.restore(image)
    assert found.shape == image.shape and found.dtype == np.uint8
    assert np.array_equal(model.restore(image), found)  # nothing is drawn
    unet = copy.deepcopy(adapted)
    merge_lora(unet)
    padded = np.pad(image, ((0, 58), (0, 38), (0, 0)), mode="symmetric")
    x = torch.from_numpy(padded).permute(2, 0, 1)[None] / 127.5 - 1
    prompts = ClassPrompts(home / "sd21-base")
    for classes in ((), ("road", "car")):
        with torch.no_grad():
            y = 127.5 * (Scr(unet, tiny_vae())(x, prompts(classes)).clamp(-1, 1) + 1)
        expected = keep_colours(y[0].permute(1, 2, 0).numpy()[:70, :90], image)
        difference = model.restore(image, classes) - np.clip(expected, 0, 255)
        assert np.abs(difference).max() <= 0.51
    half = load_scr("cpu", "bf16")
    assert half.device == "cpu (bf16, torch)"
    assert np.abs(half.restore(image).astype(int) - found).mean() < 8
    model.free()
    model.close()


def test_missing_files_name_the_command(home, sd):
    for part in (catalogue.SCR_FILE, "sd21-base/vae/config.json", "sd21-base/unet/config.json"):
        file = home / part
        away = file.with_name("away")
        file.rename(away)
        try:
            with pytest.raises(FileNotFoundError, match=f"{file.name}.*glesam models get scr-sd21"):
                load_scr("cpu", "auto")
        finally:
            away.rename(file)
    with pytest.raises(ValueError, match="precision: expected auto"):
        load_scr("cpu", "int8")
    with pytest.raises(FileNotFoundError, match="rass.pth.*--from FILE, which is published at https://drive.google"):
        catalogue.system_folder("rass-sd21", home)
