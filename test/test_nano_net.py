"""The network in torch: published numbers, the one-step formula, and what export must keep."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training and export need torch; scripts/test.sh installs it")

from glesam_ros.models import nano_net  # noqa: E402
from glesam_ros.models.glesam.one_step import alpha_bar  # noqa: E402
from glesam_ros.models.nano_net import FEATURES, KERNEL, Enhancer, NanoNet  # noqa: E402


@pytest.fixture(scope="module")
def net() -> NanoNet:
    torch.manual_seed(3)
    return NanoNet().eval()


def test_schedule_has_the_published_value_at_timestep_1() -> None:
    # GleSAM's scripts use T = 1 of Stable Diffusion's schedule: abar = 0.998296, sqrt(1 - abar) = 0.041279
    assert alpha_bar(1) == pytest.approx(0.998296, abs=1e-6)
    assert math.sqrt(1 - alpha_bar(1)) == pytest.approx(0.041279, abs=1e-6)


def test_zero_noise_gives_the_scaled_latent_and_the_exact_noise_gives_the_clear_one() -> None:
    enhancer = Enhancer().double().eval()
    clear, noise = torch.randn(2, 1, nano_net.LATENT, 8, 8, dtype=torch.float64).unbind(0)
    degraded = math.sqrt(enhancer.share) * clear + math.sqrt(1 - enhancer.share) * noise
    enhancer.predict_noise = lambda z, level: torch.zeros_like(z)  # type: ignore[method-assign]
    level = torch.zeros(1, dtype=torch.float64)
    assert torch.allclose(enhancer.denoise(degraded, level), degraded / math.sqrt(alpha_bar(100)), atol=1e-12)
    enhancer.predict_noise = lambda z, level: noise  # type: ignore[method-assign]
    assert torch.allclose(enhancer.denoise(degraded, level), clear, atol=1e-12)


def test_kernel_product_equals_the_formula_of_the_decoder() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, FEATURES, 6, 10, dtype=torch.float64)
    kernel = torch.randn(KERNEL, dtype=torch.float64)
    logits = (nano_net.kernel_weights(kernel) @ nano_net.with_positions(features)[0]).reshape(6, 10)
    k, bias, cx, cy, ex, ey = kernel.split([FEATURES, 1, 1, 1, 1, 1])
    for row, col in ((0, 0), (5, 9), (2, 7)):
        x, y = (col + 0.5) / 10 * 2 - 1, (row + 0.5) / 6 * 2 - 1
        expected = k @ features[0, :, row, col] + bias - ex.exp() * (x - cx) ** 2 - ey.exp() * (y - cy) ** 2
        assert torch.allclose(logits[row, col], expected[0], atol=1e-9)


def test_padding_points_change_nothing(net: NanoNet) -> None:
    with torch.no_grad():
        features, trunk, grid, _ = net.decoder(torch.randn(1, nano_net.LATENT, 16, 24))
        xy = torch.tensor([[[[0.2, -0.3]]]])
        padded = torch.tensor([[[[0.2, -0.3], [0.9, 0.9]]]])
        alone = net.decoder.prompt(features, trunk, grid, xy, torch.tensor([[[1.0]]]))
        beside = net.decoder.prompt(features, trunk, grid, padded, torch.tensor([[[1.0, -1.0]]]))
    assert torch.allclose(alone, beside, atol=1e-5)


def test_objects_of_one_call_do_not_influence_each_other(net: NanoNet) -> None:
    with torch.no_grad():
        features, trunk, grid, _ = net.decoder(torch.randn(1, nano_net.LATENT, 16, 24))
        xy, labels = torch.rand(1, 3, 2, 2) * 2 - 1, torch.ones(1, 3, 2)
        together = net.decoder.prompt(features, trunk, grid, xy, labels)
        apart = [net.decoder.prompt(features, trunk, grid, xy[:, k : k + 1], labels[:, k : k + 1]) for k in range(3)]
    assert torch.allclose(together, torch.cat(apart, 1), atol=1e-5)


def test_backbone_takes_the_published_key_layout_and_names_what_is_missing() -> None:
    torch.manual_seed(4)
    state = {**nano_net.Backbone().state_dict(), "_fc.weight": torch.zeros(1000, 1280)}
    assert "_blocks.15._project_conv.weight" in state and "_conv_stem.weight" in state
    loaded = NanoNet()
    loaded.load_backbone(state)
    for block, part in (("0", loaded.stem.backbone), ("4", loaded.stem.backbone), ("5", loaded.trunk),
                        ("15", loaded.trunk), ("15", loaded.enhancer.trunk)):
        key = f"_blocks.{block}._project_conv.weight"
        assert torch.equal(part.state_dict()[key], state[key])
    # one of the stem, one of the trunk
    for key in ("_blocks.3._bn1.running_var", "_blocks.9._expand_conv.weight"):
        with pytest.raises(RuntimeError, match=re.escape(key)):
            NanoNet().load_backbone({k: v for k, v in state.items() if k != key})


def test_same_padding_matches_tensorflow_on_even_sizes() -> None:
    # TensorFlow pads a 3x3 stride-2 convolution of an even size by 0 before and 1 behind
    padded = nano_net.same_pad(torch.ones(1, 1, 4, 4), 3, 2)
    assert padded.shape[2:] == (5, 5)
    assert padded[0, 0, 0, 0] == 1 and padded[0, 0, -1, -1] == 0


PARTS = ("stem", "trunk", "adapted", "enhancer", "decoder")
"""Parts that have an 8-bit file."""


@pytest.fixture(scope="module")
def exported(net: NanoNet, tmp_path_factory) -> tuple[Path, dict[str, dict[str, float]]]:
    """All files of an untrained net, and what the export says of them."""
    pytest.importorskip("onnx", reason="export needs onnx; scripts/test.sh installs it")
    from glesam_ros.training.export import export

    folder = tmp_path_factory.mktemp("weights")
    (folder / "nano_old_int8.onnx").touch()
    rng = np.random.default_rng(1)
    return folder, export(net, folder, [rng.integers(0, 256, (64, 96, 3), np.uint8) for _ in range(2)])


def outputs(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_exported_files_agree_with_torch_to_1e_3(net: NanoNet, exported, size: tuple[int, int]) -> None:
    from glesam_ros.training.export import DecoderGraph, StemGraph

    folder, report = exported
    assert set(report["torch"]) == {*PARTS, "prompt"} and max(report["torch"].values()) < 1e-3

    def agree(found: list[np.ndarray], wanted: tuple[torch.Tensor, ...]) -> None:
        for got, expected in zip(found, wanted, strict=True):
            assert got.shape == tuple(expected.shape)
            assert np.abs(got - expected.numpy()).max() < 1e-3 * float(expected.abs().max())

    # the files are dynamic in size: compare on one that export did not trace
    image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
    s4, s8, level = outputs(folder / "nano_stem.onnx", image=image.numpy())
    assert s4.shape[2] * 4 == s8.shape[2] * 8 == size[0] and level.shape == (1,)
    (latent,) = outputs(folder / "nano_trunk.onnx", s4=s4, s8=s8)
    features = torch.from_numpy(s4), torch.from_numpy(s8)
    with torch.no_grad():
        agree([s4, s8, level], StemGraph(net)(image))
        agree([latent], (net.trunk(*features),))
        [adapted] = found = outputs(folder / "nano_adapted.onnx", s4=s4, s8=s8)
        agree(found, (net.enhancer.trunk(*features),))
        agree(outputs(folder / "nano_enhancer.onnx", latent=adapted, level=np.float32([0.3])),
              (net.enhancer(*features, torch.tensor([0.3])),))
        agree(outputs(folder / "nano_decoder.onnx", latent=latent), DecoderGraph(net)(torch.from_numpy(latent)))


def test_export_leaves_nothing_between_convolutions_and_stores_all_weights_once(exported) -> None:
    import onnx

    folder, _ = exported
    files = {f"nano_{part}{kind}.onnx" for part in PARTS for kind in ("", "_int8")}
    assert {p.name for p in folder.iterdir()} == files | {"nano_prompt.onnx", "nano_weights.bin", "nano_weights.sha256"}
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20_000_000
    # a Pad by itself between convolutions costs a third of the encoder's time
    for part in PARTS:
        nodes = onnx.load(folder / f"nano_{part}.onnx", load_external_data=False).graph.node
        read = {name for node in nodes if node.op_type == "Conv" for name in node.input}
        assert not [node.name for node in nodes if node.op_type == "Pad" and node.output[0] in read]
    # the 8-bit graphs add nothing to the bytes that the fp32 graphs need: two a weight
    for part in PARTS:
        plain, small = (
            {entry.value for tensor in onnx.load(folder / f"nano_{part}{kind}.onnx", load_external_data=False)
             .graph.initializer for entry in tensor.external_data if entry.key == "offset"
             and tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4}
            for kind in ("", "_int8")
        )
        assert len(small) > 5 and small <= plain


def test_bytes_of_the_image_and_of_the_stems_features_are_taken_as_they_are(exported) -> None:
    import onnx

    folder, _ = exported
    graphs = {part: onnx.load(folder / f"nano_{part}_int8.onnx", load_external_data=False).graph for part in PARTS}
    kinds = {part: {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
             for part, graph in graphs.items()}
    for part in ("stem", "trunk", "adapted"):
        assert kinds[part]["s4"] == kinds[part]["s8"] == onnx.TensorProto.UINT8
    assert kinds["stem"]["image"] == onnx.TensorProto.UINT8
    for part in ("stem", "trunk", "adapted"):
        graph = graphs[part]
        sources = {value.name for value in graph.input}
        readers = [node for node in graph.node if sources & set(node.input) and node.op_type != "Transpose"]
        assert "QuantizeLinear" not in [node.op_type for node in readers]
        assert not {"Sub", "Div"} & {node.op_type for node in readers}


def test_8_bit_files_are_near_fp32_and_keep_the_scores_of_the_grid_smooth(exported) -> None:
    folder, report = exported
    # an untrained net is worse than a trained one: nothing in its activations is alike
    assert set(report["int8"]) == set(PARTS) and max(report["int8"].values()) < 0.2
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), np.uint8)
    s4, s8, level = outputs(folder / "nano_stem_int8.onnx", image=image)
    assert s4.shape == (1, 24, 16, 24) and s8.shape == (1, 40, 8, 12) and level.shape == (1,)
    (latent,) = outputs(folder / "nano_trunk_int8.onnx", s4=s4, s8=s8)
    (adapted,) = outputs(folder / "nano_adapted_int8.onnx", s4=s4, s8=s8)
    (restored,) = outputs(folder / "nano_enhancer_int8.onnx", latent=adapted, level=level)
    assert adapted.shape == latent.shape == restored.shape == (1, nano_net.LATENT, 8, 12)
    scores = outputs(folder / "nano_decoder_int8.onnx", latent=restored)[-1]
    assert len(np.unique(scores)) > 0.9 * scores.size


def test_the_8_bit_trunk_reads_the_bytes_of_the_8_bit_stem_as_they_were_meant(exported) -> None:
    folder, _ = exported
    image = np.random.default_rng(3).integers(0, 256, (1, 64, 96, 3), np.uint8)
    plain = outputs(folder / "nano_stem.onnx", image=image)
    small = outputs(folder / "nano_stem_int8.onnx", image=image)
    expected = outputs(folder / "nano_trunk.onnx", s4=plain[0], s8=plain[1])[0]
    found = outputs(folder / "nano_trunk_int8.onnx", s4=small[0], s8=small[1])[0]
    assert np.sqrt(np.square(found - expected).mean()) < 0.2 * np.sqrt(np.square(expected).mean())


def test_8_bit_kernels_reach_the_border_of_a_grid_larger_than_that_of_the_calibration(exported) -> None:
    folder, _ = exported
    latent = np.random.default_rng(2).standard_normal((1, nano_net.LATENT, 32, 48)).astype(np.float32)
    plain, small = (outputs(folder / f"nano_decoder{kind}.onnx", latent=latent)[3] for kind in ("", "_int8"))
    # twice the sharpness times the centre, x and y; the untrained net leaves the centre at its grid point
    x, y = plain[..., FEATURES + 1], plain[..., FEATURES + 2]
    assert np.abs(small[..., FEATURES + 1] - x).max() < 0.05 * np.abs(x).max()
    assert np.abs(small[..., FEATURES + 2] - y).max() < 0.05 * np.abs(y).max()
