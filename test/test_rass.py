"""RASS: published counts and shapes, features, adapters, losses of known value, the sliding window, files, faults."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import math
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("diffusers", "peft", "scipy", "transformers"))):
    pytest.skip("expected diffusers, peft, scipy and transformers", allow_module_level=True)

from tiny_sd import tiny_unet, tiny_vae, write_tiny_scr, write_tiny_sd  # noqa: E402

from glesam_ros import ade20k  # noqa: E402
from glesam_ros.checksum import sha256  # noqa: E402
from glesam_ros.models.base import OutOfMemory  # noqa: E402
from glesam_ros.models.glesam.enhancer import UNETS, is_lora  # noqa: E402
from glesam_ros.models.rass import rass as module  # noqa: E402
from glesam_ros.models.rass.rass import (  # noqa: E402
    ADAPTERS,
    STRIDES,
    Head,
    Prediction,
    RassConfig,
    RassModel,
    RassNetwork,
    adapted_layers,
    load_rass,
    masks_of,
    outputs_of,
    read_rass,
    window_starts,
    working_size,
    write_rass,
)

CONFIG = RassConfig(
    ("road", "car", "sky"), projection=128, width=32, heads=4, queries=6, pixel_layers=1, layers=3, feedforward=32,
    points=64,
)
PALETTE = ade20k.class_colours(3)


@functools.cache
def made(config):
    torch.manual_seed(0)
    return RassNetwork(config, tiny_vae(), tiny_unet(), torch.randn(1, 77, 12)).eval()


def tiny(trained=False, config=CONFIG):
    """A network of random weights, the same in every call; `trained` gives the adapters an effect."""
    network = copy.deepcopy(made(config))
    torch.manual_seed(0)
    if trained:
        with torch.no_grad():
            for name, parameter in network.unet.named_parameters():
                if is_lora(name):
                    parameter.normal_(std=0.3)
    return network


def pictures(batch=1, height=64, width=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)


def photo(height, width, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# the published numbers


def test_full_size_counts_and_shapes():
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def count(parameters):
        return sum(p.numel() for p in parameters)

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )
        unet = UNet2DConditionModel(**UNETS["sd21-base"])
        whole = count(vae.parameters()) + count(unet.parameters())
        assert [len(names) for names in adapted_layers(unet)] == [94, 147, 16]
        network = RassNetwork(RassConfig(ade20k.CLASSES), vae, unet, torch.zeros(1, 77, 1024))
        parts = {name: count(parameters) for name, parameters in network.trainable_parameters().items()}
        # the paper: 27.9 million trained
        assert sum(parts.values()) == 27_905_063 and parts["head"] == 20_074_583
        assert count(p for name, p in network.unet.named_parameters() if is_lora(name)) == 4_044_176
        # the paper: 1788.7 million in all; 340.4 of them are the text encoder, the rest a tagger, which we lack
        ours = whole + sum(parts.values()) - count(unet.conv_in.base_layer.parameters())
        assert ours == 977_457_810 and 1_788_700_000 - ours - 340_387_840 == pytest.approx(470.9e6, abs=0.1e6)
        image = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)
        with outputs_of([vae.encoder.down_blocks[1], vae.encoder.down_blocks[3], *unet.up_blocks]) as raw:
            levels = network.features(image)
        channels, strides = [256, 512, 1280, 1280, 640, 320], [4, 8, 32, 16, 8, 8]
        assert [tuple(x.shape) for x in raw] == [(1, c, 512 // s, 512 // s) for c, s in zip(channels, strides)]
        assert [tuple(x.shape) for x in levels] == [(1, 512, 512 // s, 512 // s) for s in STRIDES]
        # one parameter ignores the device of the context, and in training the head looks for infinite values
        found = network.head.to("meta").eval()(levels)
    assert len(found.classes) == len(found.masks) == 10
    assert found.classes[-1].shape == (1, 100, 151) and found.masks[-1].shape == (1, 100, 128, 128)


def test_classes_and_colours_of_ade20k():
    names = ade20k.CLASSES
    assert len(names) == len(set(names)) == 150 and all(name == name.strip() for name in names)
    assert (names[0], names[6], names[12], names[20], names[149]) == ("wall", "road", "person", "car", "flag")
    assert ade20k.PALETTE.shape == (150, 3) and ade20k.PALETTE.dtype == np.uint8
    assert len({tuple(colour) for colour in ade20k.class_colours(200).tolist()}) == 200
    assert (ade20k.class_colours(7) == ade20k.PALETTE[:7]).all()
    assert ade20k.PALETTE.sum(1).min() > 0
    with pytest.raises(ValueError, match="1..200"):
        ade20k.class_colours(201)


# features and adapters


def test_adapters_are_on_the_published_layers():
    unet = tiny_unet()
    encoder, decoder, others = adapted_layers(unet)
    assert "conv_in" in encoder and all(name == "conv_in" or name.startswith("down_blocks.") for name in encoder)
    assert all(name.startswith("up_blocks.") for name in decoder)
    assert others and all(name.startswith("mid_block.") for name in others)
    adapted = {*encoder, *decoder, *others}
    assert len(adapted) == len(encoder) + len(decoder) + len(others)
    rest = {n for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))} - adapted
    assert rest and all("time_emb" in name or name == "conv_out" for name in rest)
    there = {name for name, _ in tiny().unet.named_parameters() if ".lora_A." in name}
    groups = zip(ADAPTERS, (encoder, decoder, others))
    assert there == {f"{layer}.lora_A.{name}.weight" for name, layers in groups for layer in layers}


def test_new_adapters_change_nothing():
    vae, unet = tiny_vae(), tiny_unet()
    x = pictures()
    pixels = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    prompt = torch.randn(1, 77, 12)
    with torch.no_grad():
        latent = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        noise = unet(latent, 1, encoder_hidden_states=prompt, return_dict=False)[0]
    network = RassNetwork(CONFIG, vae, unet, prompt).eval()
    with torch.no_grad():
        with outputs_of([network.unet.conv_out]) as found:
            network.features(x)
    torch.testing.assert_close(found[0], noise)


def test_features_are_projected_and_summed_by_stride():
    network, x = tiny(trained=True), pictures(2, 64, 128)
    with torch.no_grad():
        with outputs_of([network.encoder.down_blocks[1], network.encoder.down_blocks[3], *network.unet.up_blocks]) as f:
            found = network.features(x)
        p = network.projections
        wanted = (p[0](f[0]), p[1](f[1]) + p[4](f[4]) + p[5](f[5]), p[3](f[3]), p[2](f[2]))
    for level, other, stride in zip(found, wanted, STRIDES):
        assert level.shape == (2, 128, 64 // stride, 128 // stride)
        torch.testing.assert_close(level, other)


def test_pixels_are_normalised():
    network, seen = tiny(), []
    network.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    x[..., 0], x[..., 1] = 255, 51
    network.features(x)
    assert seen[0].shape == (1, 3, 64, 64)
    for channel, value in enumerate((1.0, -0.6, -1.0)):
        torch.testing.assert_close(seen[0][0, channel], torch.full((64, 64), value))


def test_merged_output_equals_the_adapters_output():
    network, plain, x = tiny(trained=True), tiny(), pictures()
    with torch.no_grad():
        before, without = network.features(x), plain.features(x)
        network.merge()
        after = network.features(x)
    # what comes from the U-Net has an effect of the adapters in it
    assert all((a - b).abs().max() > 0.1 for a, b in zip(before[1:], without[1:]))
    for found, wanted in zip(after, before):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not any(is_lora(name) or "base_layer" in name for name in network.state_dict())


def test_half_precision_keeps_projections_and_head_exact():
    network, x = tiny(trained=True), pictures()
    with torch.no_grad():
        exact = network(x)
        network.autocast = torch.bfloat16
        mixed = network(x)
        network.autocast = None
        for part in (network.encoder, network.quant_conv, network.unet):
            part.to(torch.bfloat16)
        half = network(x)
    for found in (mixed, half):
        assert found.masks[-1].dtype == found.classes[-1].dtype == torch.float32
        assert 0 < (found.masks[-1] - exact.masks[-1]).abs().max() < 0.1 * exact.masks[-1].abs().max()


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(1, 64, 64, 3), "uint8, got .* torch.float32"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "H, W, 3"),
        (torch.zeros(1, 64, 96, 3, dtype=torch.uint8), "multiples of 64, got 64 x 96"),
    ],
)
def test_pictures_that_do_not_fit(images, text):
    with pytest.raises(ValueError, match=text):
        tiny().features(images)


def test_networks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"prompt: expected shape \(1, 77, 12\)"):
        RassNetwork(CONFIG, tiny_vae(), tiny_unet(), torch.zeros(1, 77, 8))
    with pytest.raises(ValueError, match="merge SCR first"):
        RassNetwork(CONFIG, tiny_vae(), tiny().unet, torch.zeros(1, 77, 12))
    for field, value in (("classes", ()), ("classes", ("a", "a")), ("rank", 0), ("width", 40), ("heads", 5)):
        with pytest.raises(ValueError, match=field if field != "heads" else "width"):
            dataclasses.replace(CONFIG, **{field: value})


# losses


def labels_of_two_halves(side=64):
    labels = torch.full((1, side, side), 255)
    labels[0, : side // 2], labels[0, side // 2 :] = 0, 2
    return labels


def test_masks_of_labels():
    labels = torch.tensor([[[0, 0], [2, 255]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    masks, classes = masks_of(labels, 255)
    assert [x.tolist() for x in classes] == [[0, 2], []]
    assert masks[0].tolist() == [[[1, 1], [0, 0]], [[0, 0], [1, 0]]] and masks[1].shape == (0, 2, 2)
    assert masks[0].dtype == torch.float32 and classes[0].dtype == torch.int64


def test_losses_of_a_perfect_answer():
    labels = torch.tensor([2, 0])[:, None, None].expand(2, 64, 64)  # whole pictures of one class
    logits = torch.full((2, 6, 4), -20.0)
    logits[..., 3] = 20.0
    shapes = torch.full((2, 6, 16, 16), -20.0)
    for picture, (query, kind) in enumerate(((4, 2), (1, 0))):
        logits[picture, query, 3], logits[picture, query, kind], shapes[picture, query] = -20.0, 20.0, 20.0
    head, targets = Head(CONFIG), masks_of(labels, 255)
    found = head.loss(Prediction((logits,), (shapes,)), *targets)
    assert set(found) == {"class", "mask", "dice"} and found["class"] < 1e-6
    wrong = head.loss(Prediction((logits.roll(1, 2),), (torch.full_like(shapes, -20.0),)), *targets)
    assert wrong["class"] > 10 and wrong["mask"] > 50 and wrong["dice"] > 4
    # not zero: points at the border see half of a mask
    assert found["mask"] < 0.1 * wrong["mask"] and found["dice"] < 0.05 * wrong["dice"]


def test_losses_of_an_answer_that_says_nothing():
    """Logits of zero: cross entropy log 4, of a mask log 2; dice of a half everywhere with a mask of all ones."""
    whole = torch.zeros(1, 64, 64, dtype=torch.long)
    layers = 3
    found = Prediction((torch.zeros(1, 6, 4),) * layers, (torch.zeros(1, 6, 16, 16),) * layers)
    losses = Head(CONFIG).loss(found, *masks_of(whole, 255))
    points = CONFIG.points
    assert losses["class"].item() == pytest.approx(2 * layers * math.log(4), rel=1e-5)
    assert losses["mask"].item() == pytest.approx(5 * layers * math.log(2), rel=1e-5)
    # points at the border see part of the mask
    assert losses["dice"].item() == pytest.approx(5 * layers * (1 - (points + 1) / (1.5 * points + 1)), rel=0.03)


def test_gradients_reach_what_is_trained_and_nothing_else():
    network = tiny()
    labels = torch.cat([labels_of_two_halves(), torch.full((1, 64, 64), 255)])  # the second shows no class
    losses = network.loss(pictures(2), *masks_of(labels, 255))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    trained = {id(p) for parameters in network.trainable_parameters().values() for p in parameters}
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained) == parameter.requires_grad, name
    names = [name for name, p in network.named_parameters() if p.requires_grad and not name.startswith("head.")]
    assert {name.split(".")[0] for name in names} == {"unet", "projections"}
    assert {"unet.conv_in.base_layer.weight", "unet.conv_in.base_layer.bias"} <= set(names)
    assert all(is_lora(name) or ".conv_in." in name for name in names if name.startswith("unet."))


def test_a_picture_is_learned():
    network = tiny(config=dataclasses.replace(CONFIG, layers=2, points=256))
    x = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    x[:, 32:] = 255
    labels = labels_of_two_halves()
    parameters = [p for group in network.trainable_parameters().values() for p in group]
    optimizer = torch.optim.AdamW(parameters, 5e-3)
    torch.manual_seed(0)
    for _ in range(20):
        optimizer.zero_grad()
        sum(network.loss(x, *masks_of(labels, 255)).values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = network(x).shares().argmax(1)
    assert (found == labels[:, ::4, ::4]).float().mean() > 0.95


def test_labels_that_do_not_fit():
    network, x = tiny(), pictures()
    masks, classes = masks_of(labels_of_two_halves(), 255)
    with pytest.raises(ValueError, match="of 1 pictures, got 2 and 1"):
        network.loss(x, masks * 2, classes)
    with pytest.raises(ValueError, match=r"\(1, 64, 64\), as many masks as classes, got \(2, 64, 64\)"):
        network.loss(x, masks, [classes[0][:1]])


# a map of classes


def test_shares_of_two_queries():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.6, 0.4]]]).clamp_min(1e-30))  # two classes, no object
    masks = torch.logit(torch.tensor([[[[0.8]], [[0.5]]]]))
    shares = Prediction((torch.zeros(0), logits), (torch.zeros(0), masks)).shares()
    assert shares.shape == (1, 2, 1, 1)
    torch.testing.assert_close(shares.flatten(), torch.tensor([0.5 * 0.8, 0.25 * 0.8 + 0.6 * 0.5]))
    torch.testing.assert_close(shares.log().softmax(1).flatten(), torch.tensor([0.4, 0.5]) / 0.9)


@pytest.mark.parametrize(
    ("length", "side", "starts"), [(64, 64, [0]), (128, 64, [0, 64]), (160, 64, [0, 64, 96]), (65, 64, [0, 1])]
)
def test_windows_side_by_side_the_last_at_the_border(length, side, starts):
    assert window_starts(length, side) == starts


@pytest.mark.parametrize("size", [(64, 160), (224, 64), (64, 128)])
def test_weights_of_windows_are_one_everywhere(size):
    """Features that depend on their own pixels alone are the same by windows as of the whole picture."""

    def local(images):
        x = images.permute(0, 3, 1, 2).float()
        return tuple(torch.nn.functional.avg_pool2d(x, s) for s in STRIDES)

    x = pictures(2, *size)
    for found, wanted, stride in zip(tiny().slide(x, local), local(x), STRIDES):
        assert found.shape == (2, 3, size[0] // stride, size[1] // stride)
        torch.testing.assert_close(found, wanted)


def test_overlaps_are_averaged():
    calls = []

    def numbered(images):
        calls.append(images.shape)
        return tuple(torch.full((1, 1, 64 // s, 64 // s), float(len(calls))) for s in STRIDES)

    found = tiny().slide(pictures(1, 64, 160), numbered)  # windows at 0, 64 and 96
    assert calls == [(1, 64, 64, 3)] * 3
    assert found[3][0, 0, 0].tolist() == [1, 1, 2, 2.5, 3]  # columns of 32 pixels


def test_a_picture_of_one_window_is_looked_at_whole():
    network, x = tiny(), pictures(1, 128, 128)
    for found, wanted in zip(network.slide(x), network.features(x)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="multiple of 32, got 64 x 100"):
        network.slide(pictures(1, 64, 100))


def test_working_sizes():
    assert working_size(480, 640) == (512, 672) and working_size(640, 480) == (672, 512)
    assert working_size(512, 512) == (512, 512) and working_size(1, 1) == (512, 512)
    assert working_size(360, 1280) == (512, 1824)
    assert working_size(100, 5000) == (64, 2048)
    for height, width in np.random.default_rng(0).integers(1, 3000, (200, 2)):
        sides = working_size(int(height), int(width))
        assert min(sides) % 64 == 0 and max(sides) % 32 == 0 and max(sides) <= 2048 and min(sides) <= 512
        assert (sides[0] <= sides[1]) == (height <= width) or sides[0] == sides[1]


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 64)
    monkeypatch.setattr(module, "LONGEST", 256)


def segmenter():
    return RassModel(tiny(trained=True), PALETTE, torch.device("cpu"), torch.float32)


def test_logits_are_those_of_the_network(small_windows):
    image, network = photo(64, 64), tiny(trained=True)
    with torch.no_grad():
        wanted = network(torch.from_numpy(image)[None]).shares()[0]
    before = image.copy()
    model = segmenter()
    found = model.logits(image)
    assert found.dtype == np.float32 and found.shape == (3, 16, 16) and (image == before).all()
    np.testing.assert_allclose(np.exp(found), wanted.numpy(), rtol=1e-4)
    assert (model.logits(image) == found).all()  # nothing is drawn by chance
    assert model.name == "rass-sd21" and model.classes == CONFIG.classes and "cpu" in model.device
    assert (model.palette == PALETTE).all()


@pytest.mark.parametrize("size", [(48, 100), (100, 48), (1, 1), (64, 500)])
def test_pictures_of_any_size(small_windows, size):
    found = segmenter().logits(photo(*size))
    height, width = working_size(*size)
    assert found.shape == (3, height // 4, width // 4) and np.isfinite(found).all()


def test_faults_of_the_model(small_windows, monkeypatch):
    model = segmenter()
    with pytest.raises(TypeError, match="uint8"):
        model.logits(photo(64, 64).astype(np.float32))
    with torch.no_grad():
        model._network.head.class_predictor.bias[0] = math.nan
    with pytest.raises(RuntimeError, match="take precision fp32, or bf16"):
        model.logits(photo(64, 64))

    def full(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(model._network.head, "forward", full)
    with pytest.raises(OutOfMemory, match="out of memory"):
        model.logits(photo(64, 64))
    model.free()
    model.close()
    with pytest.raises(AttributeError):
        model.logits(photo(64, 64))


def test_windows_are_looked_at_on_the_device_of_the_weights(small_windows, monkeypatch):
    """Each thread has a current device of its own, whose streams and graphs are meant."""
    model, current, used = segmenter(), [], []
    features = model._features

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(module, "made_current", made_current)
    monkeypatch.setattr(model, "_features", lambda x: (used.extend(current), features(x))[1])
    model.logits(photo(64, 64))
    assert used == [torch.device("cpu")] and not current


# files


def test_files_give_the_same_network_back(tmp_path):
    network, file = tiny(trained=True), tmp_path / "new" / "rass.pth"
    write_rass(network, file, PALETTE, scr="abc")
    weights = read_rass(file)
    assert weights.config == CONFIG and (weights.palette == PALETTE).all() and weights.scr == "abc"
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in weights.state)
    other = RassNetwork(CONFIG, tiny_vae(), tiny_unet(), weights.prompt).eval()  # the frozen parts are the same
    weights.load_into(other, "rass.pth")
    with torch.no_grad():
        torch.testing.assert_close(other(pictures()).masks[-1], network(pictures()).masks[-1], rtol=0, atol=0)
    assert sum(x.numel() for x in weights.state.values()) == sum(
        p.numel() for parameters in network.trainable_parameters().values() for p in parameters
    )
    assert [path.name for path in file.parent.iterdir()] == ["rass.pth"]
    written = file.read_bytes()
    write_rass(network, file, PALETTE, scr="abc")
    assert file.read_bytes() == written


def test_files_that_do_not_fit(tmp_path):
    file = tmp_path / "rass.pth"
    with pytest.raises(FileNotFoundError, match="rass.pth"):
        read_rass(file)
    network = tiny()
    with pytest.raises(ValueError, match=r"palette: expected shape \(3, 3\)"):
        write_rass(network, file, ade20k.PALETTE)
    write_rass(network, file, PALETTE)
    content = torch.load(file, weights_only=True)
    for change, text in (
        ({"state": {}}, "missing: "),
        ({"state": {**content["state"], "odd": torch.ones(1)}}, "unexpected: odd"),
        ({"state": {**content["state"], "head.class_predictor.bias": torch.ones(9)}}, r"\(9,\) instead of \(4,\)"),
    ):
        torch.save({**content, **change}, file)
        with pytest.raises(ValueError, match=text):
            read_rass(file).load_into(network, "rass.pth")
    for odd, text in (
        ([1], "something else"), ({"a": 1}, "something else"), ({**content, "palette": [[1, 2, 3]]}, "3 colours"),
        ({**content, "state": {"a": 1}}, "dict of tensors"), ({**content, "config": {"rank": 4}}, "classes"),
        ({**content, "config": {"new": 1}}, "new"), ({**content, "prompt": [1]}, "prompt: expected a tensor, got list"),
        ({**content, "palette": [[0, 0, 256], [1, 2, 3], [4, 5, 6]]}, "palette: expected whole numbers in 0..255"),
    ):
        torch.save(odd, file)
        with pytest.raises(ValueError, match=text) as error:
            read_rass(file)
        assert str(file) in str(error.value)
    network.merge()
    with pytest.raises(ValueError, match="write before merge"):
        write_rass(network, file, PALETTE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All files of the model, tiny."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_sd(folder / "sd21-base")
    write_tiny_scr(folder / "rass" / "scr.pkl")
    write_rass(tiny(trained=True), folder / "rass" / "rass.pth", PALETTE, sha256(folder / "rass" / "scr.pkl"))
    return folder


@pytest.fixture
def home(written, tmp_path, monkeypatch):
    folder = tmp_path / "home"
    shutil.copytree(written, folder)
    monkeypatch.setenv("GLESAM_HOME", str(folder))
    return folder


def test_loads_from_its_files(home, small_windows):
    from glesam_ros.models.rass.scr import merge_scr

    found = load_rass("cpu", "auto").logits(photo(64, 64))
    unet = tiny_unet()
    merge_scr(unet, home / "rass" / "scr.pkl")
    weights = read_rass(home / "rass" / "rass.pth")
    network = RassNetwork(CONFIG, tiny_vae(), unet, weights.prompt).eval()
    weights.load_into(network, "")
    with torch.no_grad():
        wanted = network(torch.from_numpy(photo(64, 64))[None]).shares()[0].log()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4)
    # another SCR than that of the training
    write_tiny_scr(home / "rass" / "scr.pkl", seed=9)
    with pytest.raises(ValueError, match="trained with"):
        load_rass("cpu", "auto")


def test_weights_are_views_of_their_file_and_the_model_keeps_none(home, small_windows):
    """The released file has gigabytes that are not read here; a training may write a new file over that of a model."""
    file = home / "rass" / "rass.pth"
    model, weights = load_rass("cpu", "auto"), read_rass(file)
    found, prompt = model.logits(photo(64, 64)), weights.prompt.clone()
    with file.open("r+b") as over:
        over.write(bytes(file.stat().st_size))
    assert not any(x.any() for x in weights.state.values())
    assert torch.equal(weights.prompt, prompt) and (model.logits(photo(64, 64)) == found).all()


def test_lack_of_memory_at_load_says_what_to_do(home, monkeypatch):
    def lacks(network, *place):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 26 MiB")

    monkeypatch.setattr(RassNetwork, "to", lacks)
    with pytest.raises(OutOfMemory, match="allocate 26 MiB; expected memory .* take a smaller model or precision$"):
        load_rass("cpu", "auto")
    with pytest.raises(OutOfMemory, match="allocate 26 MiB$"):
        segmenter()


@pytest.mark.parametrize("part", ["sd21-base/vae", "sd21-base/unet", "rass/scr.pkl", "rass/rass.pth"])
def test_what_is_missing_is_named_with_the_command(home, part):
    path = home / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match="glesam models get rass-sd21") as error:
        load_rass("cpu", "auto")
    assert part in str(error.value)


def test_names_of_devices_and_precisions(home):
    with pytest.raises(ValueError, match="device"):
        load_rass("tpu", "auto")
    with pytest.raises(ValueError, match="precision"):
        load_rass("cpu", "int8")
