"""Weights that come back from ONNX files: the same function, and normalisation that can be trained on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")
for needed in ("accelerate", "onnx", "pycocotools", "tensorboard"):
    pytest.importorskip(needed, reason=f"training needs {needed}; scripts/test.sh installs it")

from glesam_ros.datasets import Photograph  # noqa: E402
from glesam_ros.models.nano import WEIGHTS  # noqa: E402
from glesam_ros.models.nano_net import STATISTICS, NanoNet  # noqa: E402
from glesam_ros.training import nano  # noqa: E402
from glesam_ros.training.config import load_config  # noqa: E402
from glesam_ros.training.export import export, open_graph  # noqa: E402
from glesam_ros.training.shipped import read_shipped, renormalise  # noqa: E402
from glesam_ros.training.sources import Scenes  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_precision", "one_thread")


def picture(seed: int) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 64, 96, 3), np.uint8))


def parts_of(net: NanoNet, images: Any) -> dict[str, Any]:
    """What each part gives."""
    with torch.no_grad():
        s4, s8, statistics = nano.see(net, images)
        level = net.stem.level(statistics)
        restored = net.enhancer(s4, s8, level)
        features, trunk, grid, dense = net.decoder(restored)
        count = len(images)
        xy, labels = torch.tensor([[[[0.1, -0.3], [0.5, 0.2]]]] * count), torch.tensor([[[1, 0]]] * count)
        prompted = net.decoder.prompt(features, trunk, grid, xy, labels)
        return {
            "s4": s4, "s8": s8, "level": level, "plain": net.trunk(s4, s8),
            "adapted": net.enhancer.trunk(s4, s8), "restored": restored, "features": features, "dense": dense,
            "prompted": prompted,
        }


def assert_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, expected in one.items():
        assert float((other[name] - expected).abs().max()) <= 2e-3 * float(expected.abs().max()), name


@pytest.fixture(scope="module")
def trained() -> NanoNet:
    """Random weights, and normalisation whose every number matters."""
    torch.manual_seed(3)
    net = NanoNet()
    net.load_backbone(nano.pretrained_backbone())
    torch.nn.init.normal_(net.enhancer.conv_out.weight, std=0.02)
    torch.nn.init.normal_(net.enhancer.conv_out.bias, std=0.1)
    for overview in (*net.trunk.overview, *net.enhancer.trunk.overview):
        torch.nn.init.normal_(overview.attention.out.weight, std=0.05)
        torch.nn.init.normal_(overview.mlp[2].weight, std=0.05)
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d) and norm.eps == 1e-5:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, std=0.2)
            torch.nn.init.normal_(norm.running_mean, std=0.3)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    with torch.no_grad():
        net.stem.level.norm.running_mean.normal_()
    assert net.stem.level.norm.running_mean.shape == (STATISTICS,)
    return net.eval()


@pytest.fixture(scope="module")
def files(trained: NanoNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    assert export(trained, folder, check=False) == {}
    return folder


def test_what_was_exported_comes_back(trained: NanoNet, files: Path) -> None:
    assert_the_same(parts_of(trained, picture(0)), parts_of(read_shipped(files), picture(0)))


def test_another_process_writes_the_same_bytes(files: Path, tmp_path: Path) -> None:
    # strings have other hashes there, so that a set would be gone through in another order
    for seed in ("1", "2"):
        code = (
            "import sys, pathlib, torch; from glesam_ros.models.nano_net import NanoNet\n"
            "from glesam_ros.training.export import export; torch.manual_seed(0)\n"
            "export(NanoNet(), pathlib.Path(sys.argv[1]), check=False)"
        )
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=environment)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert set(first) == {p.name for p in files.iterdir()}
    assert first == second


def test_the_files_of_the_package_come_back() -> None:
    net, image = read_shipped(WEIGHTS), picture(1)[:1]
    s4, s8, level = open_graph(str(WEIGHTS / "nano_stem.onnx")).run(None, {"image": image.numpy()})
    (plain,) = open_graph(str(WEIGHTS / "nano_trunk.onnx")).run(None, {"s4": s4, "s8": s8})
    (adapted,) = open_graph(str(WEIGHTS / "nano_adapted.onnx")).run(None, {"s4": s4, "s8": s8})
    (restored,) = open_graph(str(WEIGHTS / "nano_enhancer.onnx")).run(None, {"latent": adapted, "level": level})
    expected = {"s4": s4, "s8": s8, "level": level, "plain": plain, "adapted": adapted, "restored": restored}
    got = parts_of(net, image)
    assert_the_same({name: torch.from_numpy(value) for name, value in expected.items()}, got)


def test_new_normalisation_changes_nothing_and_has_the_statistics_of_its_inputs(files: Path) -> None:
    net = read_shipped(files)
    before = parts_of(net, picture(2))

    def look() -> None:
        parts_of(net, picture(2))

    renormalise(net, look)
    assert_the_same(before, parts_of(net, picture(2)))
    # on the very pictures that gave the statistics, those of the batch are no others
    conv, norm = net.decoder.trunk[0][0], net.decoder.trunk[0][1]
    assert bool((norm.weight > 0).all()) and not torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    size = conv.weight[0].numel()
    assert torch.allclose(conv.weight.flatten(1).square().mean(1).sqrt(), torch.tensor((3 * size) ** -0.5))
    net.decoder.train()
    assert_the_same(before, parts_of(net, picture(2)))


def test_other_files_are_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nano_stem.onnx"):
        read_shipped(tmp_path)
    shutil.copytree(files, tmp_path / "swapped")
    shutil.copy(files / "nano_decoder.onnx", tmp_path / "swapped" / "nano_trunk.onnx")
    with pytest.raises(ValueError, match=r"nano_trunk.onnx: expected the network of this version, found another"):
        read_shipped(tmp_path / "swapped")


def test_tuning_begins_with_the_weights_of_the_package() -> None:
    rng = np.random.default_rng(0)
    layer = np.zeros((96, 128), np.int16)
    layer[20:70, 30:90] = 1
    photograph = Photograph("a", rng.integers(0, 256, (96, 128, 3), np.uint8), [layer], False)
    changes = ["crop.height=64", "crop.width=96", "objects=2"]
    config = load_config("nano_tune", changes)
    assert config.start == nano.SHIPPED and config.base.steps == config.restore.steps == 0
    net = nano.shipped_net(Scenes([photograph], np.ones(1)), config)
    assert_the_same(parts_of(read_shipped(WEIGHTS), picture(4)), parts_of(net, picture(4)))
