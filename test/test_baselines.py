"""Restorers and GrabCut by known answers; the learned networks by their published sizes and formulas."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from glesam_ros.evaluation import baselines
from glesam_ros.evaluation.metrics import iou


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch: pip install 'glesam_ros[train]'")


def noisy(grey: int, deviation: float, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, size)
    return np.repeat(np.clip(np.round(grey + noise), 0, 255).astype(np.uint8)[..., None], 3, 2)


def test_learned_restorers_are_measured_on_what_they_are_for() -> None:
    kinds = ("", "lq", "low_light", "rain")
    assert [baselines.applies("zero_dce", kind) for kind in kinds] == [False, False, True, False]
    assert [baselines.applies("prenet", kind) for kind in kinds] == [False, False, False, True]
    assert all(baselines.applies(name, kind) for name in ("classical", "grabcut") for kind in kinds)


@pytest.mark.parametrize("deviation", [3.0, 10.0])
def test_noise_is_measured_as_it_was_added(deviation: float) -> None:
    assert baselines.noise_level(noisy(128, deviation)) == pytest.approx(deviation, rel=0.05)
    assert baselines.noise_level(np.full((50, 50, 3), 128, np.uint8)) == 0


def test_classical_leaves_a_flat_bright_picture_as_it_is() -> None:
    flat = np.full((60, 80, 3), 150, np.uint8)
    np.testing.assert_array_equal(baselines.classical(flat), flat)


def test_classical_takes_noise_away() -> None:
    assert baselines.classical(noisy(128, 12)).std() < 0.5 * noisy(128, 12).std()


def test_classical_brings_the_dark_to_the_middle() -> None:
    ramp = np.repeat(np.linspace(5, 45, 160).astype(np.uint8)[None, :, None], 120, 0).repeat(3, 2)
    lightness = cv2.cvtColor(baselines.classical(ramp), cv2.COLOR_RGB2LAB)[..., 0]
    assert 0.35 < lightness.mean() / 255 < 0.6
    assert lightness[:, -20:].mean() > lightness[:, :20].mean()


def test_classical_sharpens_an_edge() -> None:
    step = np.full((40, 80, 3), 100, np.uint8)
    step[:, 40:] = 160
    blurred = cv2.GaussianBlur(step, (0, 0), 1)
    steepest = [int(np.abs(np.diff(p[20, :, 0].astype(int))).max()) for p in (blurred, baselines.classical(blurred))]
    assert steepest[1] > 1.2 * steepest[0]


def test_classical_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(H, W, 3\)"):
        baselines.classical(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("scale", [1, 5], ids=["as it is", "scaled down inside"])
def test_grabcut_finds_a_disc_in_its_box(scale: int) -> None:
    image = noisy(60, 8, (120 * scale, 160 * scale))
    truth = np.zeros(image.shape[:2], np.uint8)
    cv2.circle(truth, (80 * scale, 60 * scale), 30 * scale, 1, -1)
    image[truth > 0] = (220, 60, 50)
    # with room on all sides: 0.56 of the box is disc
    found = baselines.grabcut(image, [[40 * scale, 20 * scale, 120 * scale, 100 * scale]])
    assert found.shape == (1, *image.shape[:2]) and found.dtype == np.bool_
    assert iou(found[0], truth > 0) > 0.95


def test_grabcut_gives_the_box_where_nothing_is_outside() -> None:
    image = noisy(100, 5)
    assert baselines.grabcut(image, [[0, 0, 160, 120]]).all()


def test_grabcut_repeats() -> None:
    image = noisy(100, 40)
    boxes = [[10, 10, 60, 60], [50, 30, 150, 110]]
    np.testing.assert_array_equal(baselines.grabcut(image, boxes), baselines.grabcut(image, boxes))


def test_unknown_and_missing_restorers_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected some of classical.*got retinex"):
        baselines.load_restorers(["classical", "retinex"], tmp_path)
    assert list(baselines.load_restorers(["classical", "grabcut"], tmp_path)) == ["classical"]


def test_missing_weights_are_named(torch, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="zero_dce.pth: expected the weights of zero_dce"):
        baselines.load_restorers(["zero_dce"], tmp_path)


def test_weights_of_another_network_are_refused(torch, tmp_path) -> None:
    path = tmp_path / "zero_dce.pth"
    torch.save(baselines.prenet_r().state_dict(), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected the state dict of zero_dce")) as error:
        baselines.load_learned("zero_dce", path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="expected the state dict of zero_dce"):
        baselines.load_learned("zero_dce", path)


def zeroed(network):
    for parameter in network.parameters():
        parameter.data.zero_()
    return network.eval()


@pytest.mark.parametrize(("name", "count"), [("zero_dce", 79_416), ("prenet_r", 94_979)])
def test_networks_have_the_published_size(torch, name: str, count: int) -> None:
    assert sum(p.numel() for p in getattr(baselines, name)().parameters()) == count


def test_zero_dce_applies_its_curve_eight_times(torch) -> None:
    network = zeroed(baselines.zero_dce())
    network.e_conv7.bias.data[:] = 0.3  # so every curve is tanh(0.3)
    x = torch.rand(1, 3, 6, 7)
    expected = x.clone()
    for _ in range(8):
        expected = expected + float(np.tanh(0.3)) * (expected**2 - expected)  # the authors' sign of the curve
    with torch.inference_mode():
        torch.testing.assert_close(network(x), expected)


def test_prenet_takes_its_last_stage(torch) -> None:
    network = zeroed(baselines.prenet_r())
    # all gates are 1, so the cell grows by one each stage; the picture is the first hidden channel
    for gate in (network.conv_i, network.conv_f, network.conv_g, network.conv_o):
        gate[0].bias.data[:] = 100
    network.conv[0].weight.data[:, 0, 1, 1] = 1
    rainy = torch.rand(1, 3, 5, 5)
    with torch.inference_mode():
        restored = network(rainy)
    # 6 after six stages; the residual blocks add nothing; what is found is added to the rainy picture
    torch.testing.assert_close(restored, rainy + float(np.tanh(6.0)))


def test_prenet_with_nothing_to_say_leaves_the_picture(torch) -> None:
    rainy = torch.rand(1, 3, 5, 7)
    with torch.inference_mode():
        torch.testing.assert_close(zeroed(baselines.prenet_r())(rainy), rainy)


def test_a_restorer_takes_and_gives_pictures(torch, tmp_path) -> None:
    torch.save(zeroed(baselines.zero_dce()).state_dict(), tmp_path / "zero_dce.pth")
    restore = baselines.load_restorers(["zero_dce"], tmp_path)["zero_dce"]
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3)).astype(np.uint8)
    np.testing.assert_array_equal(restore(image), image)  # curves of zero change nothing
    with pytest.raises(TypeError, match="expected dtype uint8"):
        restore(image.astype(np.float32))
