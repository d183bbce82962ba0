"""The released RASS checkpoint: detectron2's names, against Mask2Former's head written here by its own names."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("diffusers", "peft", "transformers"))):
    pytest.skip("expected diffusers, peft and transformers", allow_module_level=True)

from tiny_sd import tiny_unet, tiny_vae, write_tiny_scr, write_tiny_sd  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from glesam_ros import ade20k  # noqa: E402
from glesam_ros.models.glesam.enhancer import write_tensors  # noqa: E402
from glesam_ros.models.glesam.weights import read_tensors  # noqa: E402
from glesam_ros.models.rass import rass  # noqa: E402
from glesam_ros.models.rass.checkpoint import from_released, released_sizes  # noqa: E402
from glesam_ros.models.rass.rass import RassConfig, RassNetwork, RassWeights, read_rass  # noqa: E402
from glesam_ros.models.rass.scr import ClassPrompts  # noqa: E402

CONFIG = RassConfig(
    ade20k.CLASSES, projection=128, width=32, queries=5, pixel_layers=2, layers=4, feedforward=48,
)
HEADS, LEVELS, POINTS = 8, 3, 4
SIDES = (16, 8, 4, 2)
"""Of res2 .. res5 of a picture of 64 pixels."""


# Mask2Former's head after its papers, with the names that detectron2's modules give


def sine(x):
    """Positions (1, C, h, w) of Deformable DETR: rows in the first half of the channels, columns in the second."""
    h, w, half = *x.shape[2:], x.shape[1] // 2
    wave = 10000 ** (2 * (torch.arange(half) // 2) / half)
    rows = (torch.arange(1, h + 1) / (h + 1e-6) * 2 * math.pi)[:, None] / wave
    columns = (torch.arange(1, w + 1) / (w + 1e-6) * 2 * math.pi)[:, None] / wave

    def turn(angle):
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)

    y, x = turn(rows)[:, None].expand(h, w, half), turn(columns)[None].expand(h, w, half)
    return torch.cat([y, x], 2).permute(2, 0, 1)[None]


class Normed(nn.Conv2d):
    def __init__(self, inside, outside, kernel):
        super().__init__(inside, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(32, outside)

    def forward(self, x):
        return self.norm(super().forward(x))


class DeformableAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.sampling_offsets = nn.Linear(width, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(width, HEADS * LEVELS * POINTS)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query, places, source, shapes):
        n = query.shape[1]
        offsets = self.sampling_offsets(query)[0].view(n, HEADS, LEVELS, POINTS, 2)
        weights = self.attention_weights(query)[0].view(n, HEADS, LEVELS * POINTS).softmax(-1)
        weights = weights.view(n, HEADS, LEVELS, POINTS)
        values = self.value_proj(source)[0].split([h * w for h, w in shapes])
        heads = []
        for head in range(HEADS):
            total = torch.zeros(n, query.shape[2] // HEADS)
            for level, ((h, w), value) in enumerate(zip(shapes, values)):
                own = value.view(h, w, HEADS, -1)[:, :, head].permute(2, 0, 1)[None]
                where = places + offsets[:, head, level] / torch.tensor([w, h])  # (n, points, xy)
                sampled = F.grid_sample(own, 2 * where[None] - 1, align_corners=False)[0]  # (c, n, points)
                total = total + (sampled * weights[:, head, level]).sum(-1).T
            heads.append(total)
        return self.output_proj(torch.cat(heads, 1))[None]


class PixelLayer(nn.Module):
    def __init__(self, width, feedforward):
        super().__init__()
        self.self_attn = DeformableAttention(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)

    def forward(self, x, position, places, shapes):
        x = self.norm1(x + self.self_attn(x + position, places, x, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class PixelDecoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c.projection, c.width, 1), nn.GroupNorm(32, c.width)) for _ in range(LEVELS)
        )
        self.transformer = nn.Module()
        self.transformer.level_embed = nn.Parameter(torch.randn(LEVELS, c.width))
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            PixelLayer(c.width, c.feedforward // 2) for _ in range(c.pixel_layers)
        )
        self.mask_features = nn.Conv2d(c.width, c.width, 1)
        self.adapter_1, self.layer_1 = Normed(c.projection, c.width, 1), Normed(c.width, c.width, 3)

    def forward(self, levels):
        inputs = [p(x) for p, x in zip(self.input_proj, levels[::-1])]  # the coarsest first
        shapes = [tuple(x.shape[2:]) for x in inputs]
        flat = torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], 1)
        position = torch.cat(
            [
                sine(x).flatten(2).transpose(1, 2) + own
                for x, own in zip(inputs, self.transformer.level_embed)
            ], 1,
        )
        places = torch.cat(
            [
                torch.stack(
                    torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
                ).view(-1, 1, 2)
                for h, w in shapes
            ]
        )
        for layer in self.transformer.encoder.layers:
            flat = layer(flat, position, places, shapes)
        parts = flat.split([h * w for h, w in shapes], 1)
        scales = [x.transpose(1, 2).reshape(1, -1, *shape) for x, shape in zip(parts, shapes)]
        fine = self.adapter_1(levels[0])
        fine = fine + F.interpolate(scales[-1], size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.layer_1(fine).relu()), scales


class SelfAttentionLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self_attn, self.norm = nn.MultiheadAttention(width, HEADS), nn.LayerNorm(width)

    def forward(self, x, position):
        q = x + position
        return self.norm(x + self.self_attn(q, q, x)[0])


class CrossAttentionLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.multihead_attn, self.norm = nn.MultiheadAttention(width, HEADS), nn.LayerNorm(width)

    def forward(self, x, memory, hidden, places, position):
        return self.norm(x + self.multihead_attn(x + position, memory + places, memory, attn_mask=hidden)[0])


class FeedForwardLayer(nn.Module):
    def __init__(self, width, feedforward):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class Predictor(nn.Module):
    def __init__(self, c):
        super().__init__()
        layers = range(c.layers - 1)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(c.width) for _ in layers)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(c.width) for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(FeedForwardLayer(c.width, c.feedforward) for _ in layers)
        self.decoder_norm = nn.LayerNorm(c.width)
        self.query_feat, self.query_embed = nn.Embedding(c.queries, c.width), nn.Embedding(c.queries, c.width)
        self.level_embed = nn.Embedding(LEVELS, c.width)
        self.class_embed = nn.Linear(c.width, len(c.classes) + 1)
        self.mask_embed = nn.Module()
        self.mask_embed.layers = nn.ModuleList(nn.Linear(c.width, c.width) for _ in range(3))

    def forward(self, mask_features, scales):
        memory = [x.flatten(2).permute(2, 0, 1) + e for x, e in zip(scales, self.level_embed.weight)]
        places = [sine(x).flatten(2).permute(2, 0, 1) for x in scales]
        x, position = self.query_feat.weight[:, None], self.query_embed.weight[:, None]
        found = [self.predict(x, mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        )
        for k, (cross, own, feedforward) in enumerate(layers):
            level = k % LEVELS
            masks = F.interpolate(found[-1][1], size=scales[level].shape[2:], mode="bilinear", align_corners=False)
            hidden = masks[0].flatten(1).sigmoid() < 0.5
            hidden[hidden.all(1)] = False  # a query that sees nothing sees all
            x = own(cross(x, memory[level], hidden, places[level], position), position)
            x = feedforward(x)
            found.append(self.predict(x, mask_features))
        return found

    def predict(self, x, mask_features):
        x = self.decoder_norm(x)[:, 0]
        a, b, c = self.mask_embed.layers
        return self.class_embed(x)[None], torch.einsum("qc,bchw->bqhw", c(b(a(x).relu()).relu()), mask_features)


class DetectronHead(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.pixel_decoder, self.predictor = PixelDecoder(c), Predictor(c)

    def forward(self, levels):
        return self.predictor(*self.pixel_decoder(levels))


def randomise(module, seed, noise):
    """Norms and biases begin as ones and zeros; random ones tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@functools.cache
def made():
    return RassNetwork(CONFIG, tiny_vae(), tiny_unet(), torch.ones(1, 77, 12))


def network(seed):
    return randomise(copy.deepcopy(made()), seed, 0.02)


def released_state(network, head):
    """What detectron2 would save of `network` with the head `head`."""
    state = {f"sem_seg_head.{key}": x for key, x in head.state_dict().items()}
    extractor = "backbone.feature_extractor"
    for key, x in network.state_dict().items():
        if key.startswith("unet."):
            state[f"{extractor}.sd.{key}"] = x
        elif key.startswith("projections."):
            number, rest = key.removeprefix("projections.").split(".", 1)
            state[f"{extractor}.feature_projections.{number}.0.{rest}"] = x
    for key in ("sd.vae.encoder.conv_in.weight", "sd.text_encoder.x", "ram.visual_encoder.x", "dape.x"):
        state[f"{extractor}.{key}"] = torch.ones(1)
    return {**state, "criterion.empty_weight": torch.ones(151)}


@pytest.fixture
def head():
    torch.manual_seed(3)
    return randomise(DetectronHead(CONFIG), 3, 0.2)


def test_the_head_says_the_same_by_both_names(head):
    """Every layer's classes and masks: pixel decoder, attention, norms and queries are what their names say."""
    own = network(0)
    mapped = from_released(released_state(own, head), own.state_dict())
    part = {key.removeprefix("head."): x for key, x in mapped.items() if key.startswith("head.")}
    assert {key: x.shape for key, x in part.items()} == {key: x.shape for key, x in own.head.state_dict().items()}
    own.head.load_state_dict(part)
    generator = torch.Generator().manual_seed(4)
    levels = [torch.randn(1, CONFIG.projection, side, side, generator=generator) for side in SIDES]
    with torch.no_grad():
        found, wanted = own.head(levels), head(levels)
    assert len(wanted) == CONFIG.layers
    for classes, masks, (other_classes, other_masks) in zip(*found, wanted):
        assert classes.std() > 0.1 and masks.std() > 0.1
        torch.testing.assert_close(classes, other_classes, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(masks, other_masks, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("old_peft", [False, True])
def test_a_released_file_makes_the_network_it_is_of(tmp_path, head, old_peft):
    source, target = network(1), network(2)
    state = released_state(source, head)
    if old_peft:
        state = {key.replace(".base_layer.", "."): x for key, x in state.items()}
    torch.save({"model": state, "iteration": 159999, "optimizer": {"state": {}}}, tmp_path / "rass.pth")
    weights = read_rass(tmp_path / "rass.pth")
    assert weights.config == CONFIG and weights.prompt is None and (weights.palette == ade20k.PALETTE).all()
    source.head.load_state_dict(
        {k.removeprefix("head."): x for k, x in from_released(state, source.state_dict()).items() if "head." in k}
    )
    target.encoder.load_state_dict(source.encoder.state_dict())
    target.quant_conv.load_state_dict(source.quant_conv.state_dict())
    weights.load_into(target, "rass.pth")
    found, wanted = target.state_dict(), source.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[key], wanted[key]) for key in found)
    image = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(target(image).masks[-1], source(image).masks[-1])


def test_without_the_frozen_unet_the_one_at_hand_stays(head):
    source, target = network(1), network(2)
    whole = released_state(source, head)
    state = {key: x for key, x in whole.items() if ".unet." not in key or ".lora_" in key or ".conv_in." in key}
    frozen = target.unet.mid_block.resnets[0].conv1.base_layer.weight.clone()
    RassWeights(CONFIG, ade20k.PALETTE, state).load_into(target, "rass.pth")
    assert torch.equal(target.unet.mid_block.resnets[0].conv1.base_layer.weight, frozen)
    assert torch.equal(target.projections[0].conv1.weight, source.projections[0].conv1.weight)


def test_sizes_are_read_from_shapes(head):
    sizes = released_sizes(released_state(network(0), head))
    assert sizes == {
        "classes": 150, "rank": 4, "projection": 128, "width": 32, "queries": 5, "feedforward": 48, "layers": 4,
        "pixel_layers": 2,
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.update({"sem_seg_head.predictor.odd": torch.ones(1)}), "sem_seg_head.predictor.odd"),
        (
            lambda s: s.update({"backbone.feature_extractor.sd.unet.odd.weight": torch.ones(1)}),
            "unet.odd.base_layer.weight",
        ),
        (lambda s: s.pop("sem_seg_head.pixel_decoder.mask_features.bias"), "missing: head.pixel_decoder.mask_projec"),
        (
            lambda s: s.pop("sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_bias"),
            "missing: .*layers.1.self_attn.k_proj.bias",
        ),
        (
            lambda s: s.pop("backbone.feature_extractor.feature_projections.2.0.conv1.weight"),
            "missing: projections.2.conv1.weight",
        ),
        (lambda s: s.pop("sem_seg_head.predictor.query_feat.weight"), "missing: .*query_feat.weight"),
    ],
)
def test_keys_that_are_missing_or_unknown_are_named(tmp_path, head, change, text):
    state = released_state(network(1), head)
    change(state)
    torch.save({"model": state}, tmp_path / "rass.pth")
    with pytest.raises(ValueError, match=text):
        read_rass(tmp_path / "rass.pth").load_into(network(2), "rass.pth")


def test_other_classes_have_no_names(tmp_path, head):
    state = released_state(network(1), head)
    for end in ("weight", "bias"):
        state[f"sem_seg_head.predictor.class_embed.{end}"] = state[f"sem_seg_head.predictor.class_embed.{end}"][:20]
    torch.save({"model": state}, tmp_path / "rass.pth")
    with pytest.raises(ValueError, match="150 classes of ADE20K, got 19"):
        read_rass(tmp_path / "rass.pth")


def test_the_prompt_of_a_released_file_is_computed_once(tmp_path, head, monkeypatch):
    write_tiny_sd(tmp_path / "sd21-base")
    write_tiny_scr(tmp_path / "rass" / "scr.pkl")
    torch.save({"model": released_state(network(1), head)}, tmp_path / "rass" / "rass.pth")
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path))
    monkeypatch.setattr(rass, "WINDOW", 64)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    model = rass.load_rass("cpu", "fp32")
    assert model.classes == ade20k.CLASSES and (model.palette == ade20k.PALETTE).all()
    found = model.logits(image)
    assert found.shape == (150, 16, 16)
    names = read_tensors(tmp_path / "rass" / "prompt.safetensors")["prompt"]
    torch.testing.assert_close(names, ClassPrompts(tmp_path / "sd21-base")(ade20k.CLASSES))

    def refuse(*args):
        raise AssertionError("the prompt is there")

    monkeypatch.setattr(rass, "ClassPrompts", refuse)
    assert (rass.load_rass("cpu", "fp32").logits(image) == found).all()
    write_tensors({"odd": names}, tmp_path / "rass" / "prompt.safetensors")
    with pytest.raises(ValueError, match="expected the key prompt, got odd; remove it"):
        rass.load_rass("cpu", "fp32")
