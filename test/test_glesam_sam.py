"""SAM against the segment-anything package's own predictor, MobileSAM's encoder against its published layout.

The models here have the published decoder but a narrow encoder; every weight, also those that start at zero, is random.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators  # noqa: E402

allow_import_without_operators()
pytest.importorskip("segment_anything")

from segment_anything import SamAutomaticMaskGenerator, SamPredictor, modeling, sam_model_registry  # noqa: E402
from segment_anything.build_sam import _build_sam  # noqa: E402

from glesam_ros.models.glesam.base import Features  # noqa: E402
from glesam_ros.models.glesam.mobile_sam import TinyVit, TinyVitConfig, WindowAttention, WindowBlock  # noqa: E402
from glesam_ros.models.glesam.sam import (  # noqa: E402
    MEAN,
    SAM_SIZES,
    STD,
    EncoderAttention,
    Sam,
    SamConfig,
    build_sam,
    use_fast_attention,
)
from glesam_ros.models.glesam.weights import read_tensors  # noqa: E402

PHOTO = Path(__file__).parents[1] / "glesam_ros" / "demo" / "coffee.jpg"
NARROW = SamConfig(width=16, depth=2, heads=2, global_blocks=(1,))
NARROW_TINY = TinyVitConfig(widths=(8, 16, 20, 24), depths=(1, 1, 2, 1), heads=(2, 4, 3), windows=(7, 14, 7))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
POINTS = [[120.0, 90.0], [400.5, 310.25], [600.0, 20.0]]
BOX = [[100.0, 80.0], [420.0, 390.0]]


pytestmark = pytest.mark.usefixtures("one_thread")


def upstream() -> Any:
    """segment-anything's own narrow SAM."""
    return _build_sam(
        encoder_embed_dim=NARROW.width, encoder_depth=NARROW.depth, encoder_num_heads=NARROW.heads,
        encoder_global_attn_indexes=list(NARROW.global_blocks),
    )  # fmt: skip


@functools.cache
def official() -> Any:
    """Upstream with random weights, none of them zero throughout, and logits on both sides of the edge."""
    torch.manual_seed(0)
    net = upstream()
    with torch.no_grad():
        for value in net.parameters():
            if not value.any():
                value.normal_(std=0.3)
        for mlp in net.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= 30
    return net.requires_grad_(False)


@functools.cache
def model() -> Sam:
    loaded = build_sam("narrow", NARROW)
    loaded.load_official(official().state_dict())
    return loaded.requires_grad_(False)


@functools.cache
def photo(height: int = 768, width: int = 1024) -> np.ndarray:
    return cv2.resize(cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB), (width, height))


@functools.cache
@torch.no_grad()
def features(side: int = 1024) -> Features:
    return model().encode(model().pixels(torch.from_numpy(photo())[None], side))


@functools.cache
def predictor() -> Any:
    """Upstream's predictor with the photo set; the photo fits the square without resizing."""
    ready = SamPredictor(official())
    ready.set_image(photo())
    return ready


# ---- the image encoder


def test_the_latent_equals_the_predictors():
    assert features().latent.shape == (1, 256, 64, 64) and features().high == ()
    torch.testing.assert_close(features().latent, predictor().features, **TOLERANCE)


def test_images_of_a_batch_are_independent():
    pixels = torch.randn(3, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = model().encode(pixels)
        torch.testing.assert_close(together.pick(2).latent, model().encode(pixels[2:]).latent, **TOLERANCE)
    assert (together.latent[0] - together.latent[2]).abs().max() > 0.1


@pytest.mark.parametrize("side", [128, 384, 640])
def test_other_sides_equal_upstream_with_resized_absolute_positions(side):
    """Relative positions are upstream's own to interpolate, and it does; absolute ones it cannot."""
    encoder = copy.deepcopy(official().image_encoder)
    grid = encoder.pos_embed.permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (side // 16, side // 16), mode="bicubic").permute(0, 2, 3, 1)
    encoder.pos_embed = torch.nn.Parameter(resized)
    with torch.no_grad():
        wanted = encoder(model().pixels(torch.from_numpy(photo())[None], side))
    assert wanted.shape == (1, 256, side // 16, side // 16)
    torch.testing.assert_close(features(side).latent, wanted, **TOLERANCE)


def test_absolute_positions_of_another_side_lie_where_they_lay():
    """A ramp across the picture stays the same ramp, but for the margin where interpolation lacks neighbours."""
    net = copy.deepcopy(model()).requires_grad_(False)
    encoder = net.net.image_encoder
    ramp = (torch.arange(64.0) + 0.5) / 64
    encoder.pos_embed[:] = ramp[:, None, None]
    seen: list[torch.Tensor] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for bias in (encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias):
        bias.zero_()
    net.encode(torch.zeros(1, 3, 512, 512))
    wanted = ((torch.arange(32.0) + 0.5) / 32)[:, None, None].expand(32, 32, 16)
    torch.testing.assert_close(seen[0][0][2:-2], wanted[2:-2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(200, 200), (256, 384), (1024, 1000)])
def test_a_wrong_side_is_refused(shape):
    with pytest.raises(ValueError, match=rf"expected a square of 128k pixels, got {shape[0]}x{shape[1]}"):
        model().encode(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize(("grid", "table"), [((14, 14), 14), ((24, 24), 24), ((9, 9), 16), ((6, 10), 10)])
def test_fast_attention_equals_upstreams(grid, table):
    """Windows, the whole image, the whole image at another side, and a grid that is no square."""
    torch.manual_seed(2)
    layer = modeling.image_encoder.Attention(24, 3, use_rel_pos=True, input_size=(table, table))
    for positions in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(positions)
    x = torch.randn(2, *grid, 24)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(EncoderAttention(layer)(x), wanted, atol=1e-5, rtol=1e-5)
        layer.rel_pos_h.zero_()
        assert (layer(x) - wanted).abs().max() > 0.01, "the relative positions must matter here"


def test_fast_attention_keeps_keys_and_upstream_as_they_were():
    plain = Sam("plain", copy.deepcopy(official()))
    before = list(plain.net.state_dict())
    pixels = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        slow = plain.encode(pixels).latent
        use_fast_attention(plain)
        torch.testing.assert_close(plain.encode(pixels).latent, slow, **TOLERANCE)
    assert all(isinstance(block.attn, EncoderAttention) for block in plain.net.image_encoder.blocks)
    assert sorted(plain.net.state_dict()) == sorted(before)
    assert type(upstream().image_encoder.blocks[0].attn) is modeling.image_encoder.Attention


# ---- prompts

ALONE: dict[str, tuple[list[list[float]], list[int], list[list[float]] | None]] = {
    "point": (POINTS[:1], [1], None),
    "outside": (POINTS[1:2], [0], None),
    "points": (POINTS, [1, 1, 0], None),
    "box": ([], [], BOX),
    "box and points": (POINTS[:2], [1, 0], BOX),
}


@functools.cache
def theirs(kind: str, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (M, 256, 256) and scores (M,) of the predictor for one prompt alone."""
    points, labels, box = ALONE[kind]
    _, scores, logits = predictor().predict_torch(
        torch.tensor([points]) if points else None, torch.tensor([labels]) if labels else None,
        None if box is None else torch.tensor(box).reshape(1, 4), multimask_output=several,
    )  # fmt: skip
    return logits[0], scores[0]


def ours(kind: str) -> tuple[list[list[float]], list[int]]:
    """The prompt as points with labels."""
    points, labels, box = ALONE[kind]
    return (points, labels) if box is None else (points + box, labels + [2, 3])


@torch.no_grad()
def decode(xy: Any, labels: Any, several: bool, side: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    return model().decode(features(side), torch.tensor(xy), torch.tensor(labels, dtype=torch.float32), several)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ALONE)
def test_a_prompt_alone_equals_the_predictors(kind, several):
    xy, labels = ours(kind)
    logits, scores = decode([xy], [labels], several)
    assert logits.shape == (1, 3 if several else 1, 256, 256) and scores.shape == logits.shape[:2]
    torch.testing.assert_close(logits[0], theirs(kind, several)[0], **TOLERANCE)
    torch.testing.assert_close(scores[0], theirs(kind, several)[1], **TOLERANCE)


@pytest.mark.parametrize("several", [False, True])
def test_prompts_of_all_kinds_in_one_batch_equal_each_alone(several):
    width = 1 + max(len(ours(kind)[0]) for kind in ALONE)
    xy, labels = np.full((len(ALONE), width, 2), 333.0, np.float32), np.full((len(ALONE), width), -1)
    for row, kind in enumerate(ALONE):
        points, kinds = ours(kind)
        start = row % 2  # padding before the prompt is padding, too
        xy[row, start : start + len(points)], labels[row, start : start + len(points)] = points, kinds
    logits, scores = decode(xy, labels, several)
    for row, kind in enumerate(ALONE):
        torch.testing.assert_close(logits[row], theirs(kind, several)[0], **TOLERANCE)
        torch.testing.assert_close(scores[row], theirs(kind, several)[1], **TOLERANCE)
    unlike = [(a - b).abs().max() for a, b in itertools.combinations(logits, 2)]
    assert min(unlike) > 0.05, "the test needs prompts that differ by more than the tolerance"


def test_padding_would_matter_if_it_were_attended_to():
    """Guards the test above: upstream answers otherwise when a prompt has more padding than its own one."""
    padded = [[*POINTS[:1], [0.0, 0.0]]]
    _, _, logits = predictor().predict_torch(torch.tensor(padded), torch.tensor([[1, -1]]), multimask_output=False)
    assert (logits[0] - theirs("point", False)[0]).abs().max() > 0.01


@pytest.mark.parametrize("side", [256, 896])
def test_prompts_at_other_sides_equal_an_upstream_that_was_built_for_them(side):
    cells = side // 16
    prompts = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(cells, cells), input_image_size=(side, side), mask_in_chans=16
    )
    prompts.load_state_dict(official().prompt_encoder.state_dict())
    xy, labels = torch.tensor([POINTS]) * side / 1024, torch.tensor([[1, 0, 1]])
    with torch.no_grad():
        sparse, dense = prompts((xy, labels), None, None)
        wanted = official().mask_decoder(features(side).latent, prompts.get_dense_pe(), sparse, dense, True)
    logits, scores = decode(xy.tolist(), labels.tolist(), True, side)
    assert logits.shape == (1, 3, side // 4, side // 4)
    torch.testing.assert_close(logits, wanted[0], **TOLERANCE)
    torch.testing.assert_close(scores, wanted[1], **TOLERANCE)


def test_gradients_reach_the_latent_and_the_decoder_and_are_numbers():
    """Hidden tokens have a bias of minus infinity."""
    net = copy.deepcopy(model())
    net.mask_decoder.requires_grad_(True)
    latent = features(256).latent.clone().requires_grad_(True)
    xy = torch.tensor([POINTS, POINTS]) / 4
    logits, scores = net.decode(Features(latent), xy, torch.tensor([[1.0, -1, -1], [2, 3, 1]]), True)
    (logits.square().mean() + scores.square().mean()).backward()
    trained = [p.grad for name, p in net.mask_decoder.named_parameters() if "mlps.0" not in name]  # not for `several`
    for grad in (latent.grad, *trained):
        assert grad is not None and grad.isfinite().all() and grad.any()


# ---- where the picture lies

SIZES = [(480, 640), (1080, 1920), (1500, 1100), (1024, 1024), (301, 200), (37, 4000), (1, 5000)]


@pytest.mark.parametrize("side", [1024, 512])
@pytest.mark.parametrize("size", SIZES)
def test_the_picture_fills_the_square_with_its_aspect(size, side):
    from segment_anything.utils.transforms import ResizeLongestSide

    found = model().content(size, side)
    upstreams = ResizeLongestSide.get_preprocess_shape(*size, side)
    assert max(found) == side and all(length >= 4 and length % 4 == 0 for length in found)
    assert all(abs(a - b) <= 2 or a == 4 > b for a, b in zip(found, upstreams))


@pytest.mark.parametrize("size", [(768, 1024), (480, 640), (1600, 1200), (1024, 1024)])
def test_pixels_equal_the_predictors(size):
    """Sizes where both round to the same; upstream resizes in whole steps of 0..255."""
    image = photo(*size)
    pixels = model().pixels(torch.from_numpy(image)[None], 1024)
    small = torch.from_numpy(predictor().transform.apply_image(image)).permute(2, 0, 1)[None].float()
    wanted = official().preprocess(small)
    assert pixels.shape == wanted.shape == (1, 3, 1024, 1024) and pixels.dtype == torch.float32
    assert (pixels - wanted).abs().max() < 1.01 / min(model().std)


# ---- weights


@pytest.mark.parametrize("layout", ["sam", "mobile_sam"])
def test_a_checkpoint_loads_from_its_file(layout, tmp_path):
    if layout == "sam":
        state = official().state_dict()
        fresh = build_sam("narrow", NARROW)
    else:
        state = build_sam("narrow", NARROW_TINY).net.state_dict()
        state |= {f"image_encoder.{key}": torch.ones(2) for key in ("norm_head.weight", "head.weight", "head.bias")}
        fresh = build_sam("narrow", NARROW_TINY)
    torch.save(state, tmp_path / "official.pth")
    fresh.load_official(read_tensors(tmp_path / "official.pth"))
    loaded = fresh.net.state_dict()
    assert loaded and all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert {key for key in state if key not in loaded} == {key for key in state if "head." in key and "iou" not in key}


@functools.cache
def of_transformers() -> Any:
    """transformers' own narrow SamModel with random weights, none of them zero throughout."""
    transformers = pytest.importorskip("transformers")
    encoder = {
        "hidden_size": NARROW.width, "num_hidden_layers": NARROW.depth, "num_attention_heads": NARROW.heads,
        "mlp_dim": 4 * NARROW.width, "global_attn_indexes": list(NARROW.global_blocks),
    }
    torch.manual_seed(3)
    net = transformers.SamModel(transformers.SamConfig(vision_config=encoder)).eval().requires_grad_(False)
    for value in net.parameters():
        if not value.any():
            value.normal_(std=0.3)
    return net


def test_weights_in_the_layout_of_transformers_give_its_own_masks(tmp_path):
    theirs = of_transformers()
    theirs.save_pretrained(tmp_path)  # as the hub's repositories hold it
    net = build_sam("narrow", NARROW)
    net.load_official(read_tensors(tmp_path / "model.safetensors"))
    photo = cv2.resize(cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB), (1024, 1024))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (torch.from_numpy(photo).permute(2, 0, 1)[None].float() - mean) / std
    places, labels = torch.tensor([POINTS]), torch.tensor([[1, 1, 0]])
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels, input_points=places[None], input_labels=labels[None])
        features = net.encode(pixels)
        latent = theirs.get_image_embeddings(pixels)
        assert torch.allclose(features.latent, latent, **TOLERANCE)
        sparse, dense = net.net.prompt_encoder((places, labels), None, None)
        logits, scores = net.net.mask_decoder(
            features.latent, net.net.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
        )
    assert torch.allclose(scores, wanted.iou_scores[0], **TOLERANCE)
    assert torch.allclose(logits, wanted.pred_masks[0], **TOLERANCE)
    assert (logits > 0).any() and (logits < 0).any()


@pytest.mark.parametrize("twice", [True, False])
def test_the_matrix_of_positions_may_be_there_once_or_twice(twice):
    state = of_transformers().state_dict()
    kept = "shared_image_embedding.positional_embedding"
    if not twice:
        del state["prompt_encoder.shared_embedding.positional_embedding"]
    net = build_sam("narrow", NARROW)
    net.load_official(state)
    assert torch.equal(net.net.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, state[kept])


def test_a_key_that_transformers_lacks_is_said_by_our_name():
    state = of_transformers().state_dict()
    del state["mask_decoder.upscale_conv2.bias"], state["vision_encoder.layers.1.layer_norm2.weight"]
    with pytest.raises(ValueError, match=r"missing: image_encoder.blocks.1.norm2.weight, .*output_upscaling.3"):
        build_sam("narrow", NARROW).load_official(state)


@pytest.mark.parametrize("config", [NARROW, NARROW_TINY])
def test_a_wrong_checkpoint_is_refused_by_key_and_changes_nothing(config):
    net = build_sam("narrow", config)
    state = build_sam("narrow", config).net.state_dict()
    before = {key: value.clone() for key, value in net.net.state_dict().items()}
    neck = "image_encoder.neck.0.weight"
    for wrong, words in (
        ({key: value for key, value in state.items() if key != neck}, f"missing: {neck}"),
        ({**state, "image_encoder.extra": torch.zeros(1)}, "unexpected: image_encoder.extra"),
        ({**state, neck: torch.zeros(1, 2)}, rf"wrong shape: {neck} \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=words):
            net.load_official(wrong)
    assert all(torch.equal(value, before[key]) for key, value in net.net.state_dict().items())


def test_a_classifier_is_only_left_out_of_mobile_sam():
    with pytest.raises(ValueError, match="unexpected: image_encoder.head.weight"):
        model().load_official({**official().state_dict(), "image_encoder.head.weight": torch.ones(1)})


CLASSIFIER = 320 * 1000 + 1000 + 2 * 320
"""Parameters that mobile_sam.pt has and the encoder does not."""


@pytest.mark.parametrize(
    ("name", "megabytes", "extra"),
    [
        ("sam_vit_b", 375.042, 0), ("sam_vit_l", 1249.525, 0), ("sam_vit_h", 2564.551, 0),
        ("mobile_sam", 40.728, CLASSIFIER),
    ],
)  # fmt: skip
def test_published_sizes(name, megabytes, extra):
    """In float32 the weights fill the official files, but for the names; running statistics are weights there."""
    with torch.device("meta"):
        net = build_sam(name).net
    values = extra + sum(value.numel() for value in net.state_dict().values())
    assert 4e-6 * values == pytest.approx(megabytes, abs=0.25) and 4e-6 * values < megabytes


@pytest.mark.parametrize("name", ["sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_published_sizes_attend_to_the_whole_image_where_segment_anythings_do(name):
    """Which blocks do is in no file of weights: with others it would load all the same."""
    with torch.device("meta"):
        own, theirs = build_sam(name).net, sam_model_registry[name.removeprefix("sam_")]()
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (own, theirs)]
    assert shapes[0] == shapes[1]
    windows = [[block.window_size for block in net.image_encoder.blocks] for net in (own, theirs)]
    assert windows[0] == windows[1] and windows[0].count(0) == 4
    blocks = zip(own.image_encoder.blocks, theirs.image_encoder.blocks)
    assert all(ours.attn.heads == upstreams.attn.num_heads for ours, upstreams in blocks)


def test_thresholds_of_everything_mode_are_segment_anythings_own():
    defaults = inspect.signature(SamAutomaticMaskGenerator).parameters
    assert model().thresholds == (defaults["pred_iou_thresh"].default, defaults["stability_score_thresh"].default)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of sam_vit_b, .*mobile_sam, got 'sam_vit_t'"):
        build_sam("sam_vit_t")


# ---- precision, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [NARROW, NARROW_TINY])
def test_half_precision_keeps_positions_exact(dtype, config):
    torch.manual_seed(4)
    exact = build_sam("narrow", config).requires_grad_(False)
    net = copy.deepcopy(exact).to(dtype)
    matrices = (m.net.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix for m in (net, exact))
    assert torch.equal(*matrices)
    pixels = exact.pixels(torch.from_numpy(photo())[None], 256)
    prompts = torch.tensor([POINTS, POINTS]) / 4, torch.tensor([[1.0, 0, -1], [2, 3, -1]])
    with torch.no_grad():
        found = net.encode(pixels.to(dtype))
        logits, scores = net.decode(found, *prompts, True)
        wanted, _ = exact.decode(exact.encode(pixels), *prompts, True)
    assert {t.dtype for t in (found.latent, logits, scores)} == {dtype}
    assert (logits - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.parametrize("config", [NARROW, NARROW_TINY])
def test_a_model_of_the_meta_device_can_be_filled(config):
    torch.manual_seed(5)
    wanted = build_sam("narrow", config)
    with torch.device("meta"):
        empty = build_sam("narrow", config)
    filled = empty.to_empty(device="cpu")
    filled.load_official(wanted.net.state_dict())
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(filled.encode(pixels).latent, wanted.encode(pixels).latent)


class OnHost(TorchDispatchMode):
    """Notes operations on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and (result.device.type == "cpu" or "lift_fresh" in str(function)):
            self.seen.append(str(function))
        return result


@pytest.mark.parametrize("name", SAM_SIZES)
@pytest.mark.parametrize("side", [1024, 512])
def test_nothing_needs_the_host_or_the_values(name, side):
    """What a CUDA graph asks for; on the meta device, control flow by values raises and shapes come out."""
    net = build_sam("narrow", NARROW) if name != "mobile_sam" else build_sam("mobile_sam")
    net.to(torch.bfloat16).to("meta")
    pixels = torch.empty(1, 3, side, side, dtype=torch.bfloat16, device="meta")
    points, labels = torch.empty(64, 2, 2, device="meta"), torch.empty(64, 2, device="meta")
    with torch.inference_mode(), OnHost() as mode:
        found = net.encode(pixels)
        logits, scores = net.decode(found, points, labels, True)
    assert mode.seen == []
    assert found.latent.shape == (1, 256, side // 16, side // 16) and found.latent.dtype == torch.bfloat16
    assert logits.shape == (64, 3, side // 4, side // 4) and scores.shape == (64, 3)


# ---- MobileSAM's encoder


def published_layout() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the encoder in mobile_sam.pt: TinyViT-5M, with the neck of SAM."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, outside: int, inside: int, kernel: int) -> None:
        found[f"{name}.c.weight"] = (outside, inside, kernel, kernel)
        found.update({f"{name}.bn.{key}": (outside,) for key in ("weight", "bias", "running_mean", "running_var")})
        found[f"{name}.bn.num_batches_tracked"] = ()

    def pair(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    conv("patch_embed.seq.0", 32, 3, 3)
    conv("patch_embed.seq.2", 64, 32, 3)
    for block in ("layers.0.blocks.0", "layers.0.blocks.1"):
        conv(f"{block}.conv1", 256, 64, 1)
        conv(f"{block}.conv2", 256, 1, 3)
        conv(f"{block}.conv3", 64, 256, 1)
    for stage, (width, following) in enumerate(((64, 128), (128, 160), (160, 320))):
        conv(f"layers.{stage}.downsample.conv1", following, width, 1)
        conv(f"layers.{stage}.downsample.conv2", following, 1, 3)
        conv(f"layers.{stage}.downsample.conv3", following, following, 1)
    for stage, depth, width, heads, window in ((1, 2, 128, 4, 7), (2, 6, 160, 5, 14), (3, 2, 320, 10, 7)):
        for block in (f"layers.{stage}.blocks.{k}" for k in range(depth)):
            found[f"{block}.attn.attention_biases"] = (heads, window * window)
            pair(f"{block}.attn.norm", width)
            pair(f"{block}.attn.qkv", 3 * width, width)
            pair(f"{block}.attn.proj", width, width)
            pair(f"{block}.mlp.norm", width)
            pair(f"{block}.mlp.fc1", 4 * width, width)
            pair(f"{block}.mlp.fc2", width, 4 * width)
            conv(f"{block}.local_conv", width, 1, 3)
    found["neck.0.weight"] = (256, 320, 1, 1)
    pair("neck.1", 256)
    found["neck.2.weight"] = (256, 256, 3, 3)
    pair("neck.3", 256)
    return found


def test_tiny_vit_has_the_published_layout():
    with torch.device("meta"):
        encoder = TinyVit(TinyVitConfig())
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == published_layout()
    assert sum(p.numel() for p in encoder.parameters()) == 6_065_532 - CLASSIFIER


def test_window_attention_follows_the_bias_of_each_distance():
    """With queries and keys that are zero, the weights are the softmax of the biases alone."""
    torch.manual_seed(6)
    n, width = 3, 8
    layer = WindowAttention(width, heads=1, window=n).requires_grad_(False)
    layer.qkv.weight.zero_()
    layer.qkv.bias.zero_()
    layer.qkv.weight[2 * width :] = layer.proj.weight[:] = torch.eye(width)
    layer.proj.bias.zero_()
    layer.attention_biases.normal_()
    x = torch.randn(1, n * n, width)
    bias = torch.tensor([
        [float(layer.attention_biases[0, abs(a // n - b // n) * n + abs(a % n - b % n)]) for b in range(n * n)]
        for a in range(n * n)
    ])  # fmt: skip
    torch.testing.assert_close(layer(x)[0], bias.softmax(1) @ layer.norm(x)[0])


def test_windows_do_not_see_each_other_but_through_the_convolution():
    torch.manual_seed(7)
    block = WindowBlock(8, heads=2, window=7).requires_grad_(False).eval()
    with torch.no_grad():
        block.local_conv.c.weight[:] = 0
        block.local_conv.c.weight[:, :, 1, 1] = 1  # each cell by itself
        x = torch.randn(1, 8, 20, 20)
        changed = x.clone()
        changed[0, 0, 8, 15] += 1  # in the window of rows 7 .. 13 and columns 14 .. 19, cut off by the edge
        moved = (block(changed) - block(x)).abs().amax((0, 1)) > 1e-6
    wanted = torch.zeros(20, 20, dtype=torch.bool)
    wanted[7:14, 14:20] = True
    assert torch.equal(moved, wanted)


def test_mobile_sam_takes_any_multiple_of_128():
    net = build_sam("narrow", NARROW_TINY)
    for side in (128, 384):
        with torch.no_grad():
            found = net.encode(torch.zeros(2, 3, side, side))
        assert found.latent.shape == (2, 256, side // 16, side // 16)
    with pytest.raises(ValueError, match="expected a square of 128k pixels, got 100x100"):
        net.encode(torch.zeros(1, 3, 100, 100))
