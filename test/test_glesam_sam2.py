"""SAM 2 against the sam2 package's own image predictor: features, prompts, sizes, checkpoints, precision.

The models here have the published decoder but a tiny Hiera; every weight, also those that start at zero, is random.
"""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sam2")

from glesam_ros.models.glesam.base import Features  # noqa: E402
from glesam_ros.models.glesam.sam2 import SAM2_SIZES, Sam2Config, build_sam2  # noqa: E402
from glesam_ros.models.glesam.torchvision_ops import allow_import_without_operators  # noqa: E402
from glesam_ros.models.glesam.weights import SAM2_VIDEO_PARTS  # noqa: E402

PHOTO = Path(__file__).parents[1] / "glesam_ros" / "demo" / "coffee.jpg"
NARROW = (
    "model.image_encoder.trunk.embed_dim=8",
    "model.image_encoder.trunk.stages=[1,1,2,1]",
    "model.image_encoder.trunk.global_att_blocks=[3]",
    "model.image_encoder.neck.backbone_channel_list=[64,32,16,8]",
    "model.memory_attention.num_layers=1",
)
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
POINTS = np.array([[120.0, 90.0], [400.5, 310.25], [600.0, 20.0]])
INSIDE = np.array([1, 1, 0])
BOX = np.array([100.0, 80.0, 420.0, 390.0])


pytestmark = pytest.mark.usefixtures("one_thread")


def narrow(*overrides, name="sam2.1_hiera_tiny"):
    return build_sam2(name, Sam2Config(SAM2_SIZES[name].file, NARROW + overrides))


@functools.cache
def weights():
    """Weights of one narrow model, none of them zero throughout."""
    torch.manual_seed(0)
    state = narrow().net.state_dict()
    for value in state.values():
        if not value.any():
            value.normal_(std=0.3)
    return state


@functools.cache
def model():
    loaded = narrow()
    loaded.load_official(weights())
    return loaded.requires_grad_(False)


@functools.cache
def photo(height=480, width=640):
    return cv2.resize(cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB), (width, height))


@functools.cache
def predictor():
    """The sam2 package's predictor over a model of its own with the same weights, and with the photo set."""
    allow_import_without_operators()
    from sam2.build_sam import build_sam2 as build
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    net = build(SAM2_SIZES["sam2.1_hiera_tiny"].file, device="cpu", hydra_overrides_extra=list(NARROW))
    net.load_state_dict(weights())
    ready = SAM2ImagePredictor(net)
    ready.set_image(photo())
    return ready


@functools.cache
@torch.no_grad()
def features(side=1024):
    return model().encode(model().pixels(torch.from_numpy(photo())[None], side))


def in_square(xy, side=1024):
    """Pixels of the photo -> pixels of the square."""
    height, width = photo().shape[:2]
    return torch.tensor(np.reshape(xy, (1, -1, 2)) * [side / width, side / height], dtype=torch.float32)


@torch.no_grad()
def decode(xy, labels, several, side=1024):
    labels = torch.tensor(np.reshape(labels, (1, -1)), dtype=torch.float32)
    return model().decode(features(side), in_square(xy, side), labels, several)


def test_features_equal_the_predictors():
    theirs = predictor()._features
    torch.testing.assert_close(features().latent, theirs["image_embed"], **TOLERANCE)
    assert len(features().high) == len(theirs["high_res_feats"]) == 2
    for ours, level in zip(features().high, theirs["high_res_feats"]):
        torch.testing.assert_close(ours, level, **TOLERANCE)


PROMPTS = {
    "point": (POINTS[:1], INSIDE[:1], None),
    "points": (POINTS, INSIDE, None),
    "box": (None, None, BOX),
    "box and points": (POINTS, INSIDE, BOX),
    "padded": (np.vstack([POINTS, [[0, 0], [7, 9]]]), np.append(INSIDE, [-1, -1]), None),
    "padded box": (np.zeros((1, 2)), np.array([-1]), BOX),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_equal_the_predictors(kind, several):
    xy, labels, box = PROMPTS[kind]
    _, scores, logits = predictor().predict(xy, labels, box, multimask_output=several, return_logits=True)
    ours = [(xy, labels)] if xy is not None else []
    if box is not None:
        ours.append((box.reshape(2, 2), np.array([2, 3])))
    mine, quality = decode(np.vstack([p for p, _ in ours]), np.concatenate([k for _, k in ours]), several)
    assert mine.shape == (1, 3 if several else 1, 256, 256)
    torch.testing.assert_close(mine[0].clamp(-32, 32), torch.from_numpy(logits), **TOLERANCE)
    torch.testing.assert_close(quality[0], torch.from_numpy(scores), **TOLERANCE)


def test_prompts_of_a_batch_are_independent():
    xy = torch.cat([in_square(POINTS), in_square(POINTS[::-1].copy() * 0.7), in_square(POINTS + 30)])
    labels = torch.tensor([[1.0, 1, 0], [0, 1, -1], [2, 3, 1]])
    with torch.no_grad():
        together, scores = model().decode(features(), xy, labels, True)
        for k in range(3):
            alone, score = model().decode(features(), xy[k : k + 1], labels[k : k + 1], True)
            torch.testing.assert_close(together[k], alone[0], **TOLERANCE)
            torch.testing.assert_close(scores[k], score[0], **TOLERANCE)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_decoding_reads_the_latent_and_both_levels():
    """Guards against features that are ignored: each of the three changes the masks."""
    xy, labels = in_square(POINTS), torch.tensor(INSIDE[None], dtype=torch.float32)
    small = model().encode(model().pixels(torch.from_numpy(photo())[None], 256))
    before, _ = model().decode(small, xy / 4, labels, True)
    for change in (
        Features(small.latent * 0, small.high),
        Features(small.latent, (small.high[0] * 0, small.high[1])),
        Features(small.latent, (small.high[0], small.high[1] * 0)),
    ):
        after, _ = model().decode(change, xy / 4, labels, True)
        assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("stable", [True, False])
def test_an_unstable_single_mask_gives_way_to_the_best_of_three(stable):
    net = copy.deepcopy(model())
    last = net.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    # logits of the single mask far from the edge everywhere, or within the 0.05 around it everywhere
    factor = 1e5 if stable else 1e-6
    with torch.no_grad():
        last.weight *= factor
        last.bias *= factor
        small = net.encode(net.pixels(torch.from_numpy(photo())[None], 256))
        prompt = torch.tensor([[[100.0, 90.0]]]), torch.tensor([[1.0]])
        single, score = net.decode(small, *prompt, False)
        three, scores = net.decode(small, *prompt, True)
        net.mask_decoder.train()  # upstream: without the fallback
        first, _ = net.decode(small, *prompt, False)
    expected = first[0, 0] if stable else three[0, scores[0].argmax()]
    torch.testing.assert_close(single[0, 0], expected)
    if not stable:
        torch.testing.assert_close(score[0, 0], scores[0].max())


@pytest.mark.parametrize("side", [256, 384, 640])
def test_other_sides_equal_a_model_that_was_built_for_them(side):
    from sam2.build_sam import build_sam2 as build

    net = build(
        SAM2_SIZES["sam2.1_hiera_tiny"].file, device="cpu",
        hydra_overrides_extra=[*NARROW, f"model.image_size={side}"],
    )  # fmt: skip
    net.load_state_dict(weights())
    with torch.no_grad():
        levels = net.forward_image(model().pixels(torch.from_numpy(photo())[None], side))["backbone_fpn"]
        top = levels[-1] + net.no_mem_embed.reshape(1, -1, 1, 1)
        prompt = in_square(POINTS, side), torch.tensor(INSIDE[None])
        sparse, dense = net.sam_prompt_encoder(points=prompt, boxes=None, masks=None)
        logits, scores, _, _ = net.sam_mask_decoder(
            top, net.sam_prompt_encoder.get_dense_pe(), sparse, dense, True, False, levels[:2]
        )
    ours, quality = decode(POINTS, INSIDE, True, side)
    assert features(side).latent.shape == (1, 256, side // 16, side // 16)
    assert [tuple(level.shape[1:]) for level in features(side).high] == [
        (32, side // 4, side // 4), (64, side // 8, side // 8)
    ]  # fmt: skip
    torch.testing.assert_close(features(side).latent, top, **TOLERANCE)
    torch.testing.assert_close(ours, logits, **TOLERANCE)
    torch.testing.assert_close(quality, scores, **TOLERANCE)


@pytest.mark.parametrize("file", [SAM2_SIZES["sam2.1_hiera_tiny"].file, SAM2_SIZES["sam2.1_hiera_large"].file])
@pytest.mark.parametrize("side", [128, 896])
def test_windows_of_either_width_take_any_multiple_of_128(file, side):
    """Windows are 14 and 7 in all sizes but large, which has 16 and 8."""
    net = build_sam2("narrow", Sam2Config(file, NARROW))
    with torch.no_grad():
        found = net.encode(torch.zeros(2, 3, side, side))
    assert found.latent.shape == (2, 256, side // 16, side // 16)


@pytest.mark.parametrize("shape", [(200, 200), (256, 384), (1024, 1000)])
def test_a_wrong_side_is_refused(shape):
    with pytest.raises(ValueError, match=rf"expected a square of 128k pixels, got {shape[0]}x{shape[1]}"):
        model().encode(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("size", [(480, 640), (1500, 1100), (1024, 1024), (300, 1400)])
def test_pixels_equal_the_transforms_of_the_package(size):
    allow_import_without_operators()
    from sam2.utils.transforms import SAM2Transforms

    image = photo(*size)
    ours = model().pixels(torch.from_numpy(image)[None], 1024)
    theirs = SAM2Transforms(1024, 0.0)(image)
    assert ours.shape == (1, 3, 1024, 1024) and ours.dtype == torch.float32
    assert (ours[0] - theirs).abs().max() < 1 / 255


def test_a_checkpoint_leaves_no_video_parts_and_its_weights():
    fresh = narrow()
    assert all(hasattr(fresh.net, part) for part in SAM2_VIDEO_PARTS)
    fresh.load_official(weights())
    kept = fresh.net.state_dict()
    assert kept.keys() == {k for k in weights() if k.split(".")[0] not in SAM2_VIDEO_PARTS}
    assert all(torch.equal(kept[k], weights()[k]) for k in kept)


def test_a_wrong_checkpoint_is_refused_by_key():
    lacking = {k: v for k, v in weights().items() if k != "no_mem_embed"}
    with pytest.raises(ValueError, match="no_mem_embed"):
        narrow().load_official(lacking)
    with pytest.raises(ValueError, match="image_encoder.extra"):
        narrow().load_official({**weights(), "image_encoder.extra": torch.zeros(1)})
    key = "image_encoder.trunk.pos_embed"
    before = narrow()
    kept = {k: v.clone() for k, v in before.net.state_dict().items()}
    with pytest.raises(ValueError, match=key):
        before.load_official({**weights(), key: torch.zeros(1, 8, 9, 9)})
    assert all(torch.equal(v, kept[k]) for k, v in before.net.state_dict().items()), "nothing may be loaded in part"


def test_checkpoints_of_sam2_and_sam21_are_not_mistaken_for_each_other():
    with pytest.raises(ValueError, match="no_obj_embed_spatial"):
        narrow(name="sam2_hiera_tiny").load_official(weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_positions_exact(dtype):
    net = copy.deepcopy(model()).to(dtype)
    prompts, exact = net.net.sam_prompt_encoder, model().net.sam_prompt_encoder
    matrix = prompts.pe_layer.positional_encoding_gaussian_matrix
    assert torch.equal(matrix, exact.pe_layer.positional_encoding_gaussian_matrix)
    with torch.no_grad():
        found = net.encode(net.pixels(torch.from_numpy(photo())[None], 256).to(dtype))
        logits, scores = net.decode(found, in_square(POINTS, 256), torch.tensor(INSIDE[None]).float(), False)
        wanted, _ = decode(POINTS, INSIDE, False, 256)
    assert {t.dtype for t in (found.latent, *found.high, logits, scores)} == {dtype}
    assert (logits - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.fixture
def meta(monkeypatch):
    """The device without memory; Hiera reads numbers out of a linspace, which has to exist."""
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    return torch.device("meta")


def test_a_model_of_the_meta_device_can_be_filled(meta):
    with meta:
        empty = narrow()
    filled = empty.to_empty(device="cpu")
    filled.load_official(weights())
    prompt = in_square(POINTS, 256), torch.tensor(INSIDE[None]).float()
    with torch.no_grad():
        logits, _ = filled.decode(filled.encode(model().pixels(torch.from_numpy(photo())[None], 256)), *prompt, True)
    torch.testing.assert_close(logits, decode(POINTS, INSIDE, True, 256)[0])


@pytest.mark.parametrize("name", SAM2_SIZES)
def test_published_sizes(name, meta):
    """Millions of parameters as in the tables of the official repository."""
    with meta:
        net = build_sam2(name)
    published = {"tiny": 38.9, "small": 46.0, "base_plus": 80.8, "large": 224.4}
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(published[name.split("hiera_")[1]], abs=0.1)


def test_nothing_of_the_sides_that_were_encoded_is_kept():
    """The package remembers sine encodings for each side; those of 1024 take 85 MB, for the memory of videos alone."""
    net = narrow()
    net.load_official(weights())
    with torch.no_grad():
        for side in (128, 256):
            net.encode(torch.zeros(1, 3, side, side))
    assert not [side for module in net.modules() for side in getattr(module, "cache", {})]


def test_thresholds_of_everything_mode_are_those_of_the_package():
    allow_import_without_operators()
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    defaults = inspect.signature(SAM2AutomaticMaskGenerator).parameters
    assert model().thresholds == (defaults["pred_iou_thresh"].default, defaults["stability_score_thresh"].default)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of .*sam2\.1_hiera_large, got 'sam3'"):
        build_sam2("sam3")


def test_without_weights_a_model_still_says_how_pictures_become_pixels():
    with torch.device("meta"):
        plan = narrow()
    assert all(x.is_meta for x in (*plan.parameters(), *plan.buffers()))
    images = torch.from_numpy(photo())[None]
    assert torch.equal(plan.pixels(images, 256), model().pixels(images, 256))
    assert plan.content((480, 640), 256) == (256, 256)
