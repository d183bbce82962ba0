"""Weights of nano's ONNX files back in torch, to train on from what is shipped: `start: shipped`.

The graphs have neither the names of the parameters nor normalisation of their own: export folds it into convolutions.
So a network of random numbers is exported in the same way, and tells which constant of which node is which parameter;
and normalisation is made anew of what the convolutions give on pictures. The network computes the same as the files.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glesam_ros.models.nano import PARTS
from glesam_ros.models.nano_net import NanoNet
from glesam_ros.training.export import export
from glesam_ros.training.graphs import constants, fold_constants

Array = NDArray[Any]
NEAR = 1e-3
"""Share of the largest number by which what two bytes store may differ."""


@dataclass(frozen=True)
class Found:
    """A parameter in a graph: its name, whether transposed, and times which factor."""

    name: str
    turned: bool
    factor: float


def read_shipped(folder: Path) -> NanoNet:
    """The network that the fp32 files of a folder were exported from; normalisation is in its convolutions.

    Args:
        folder: has `nano_<part>.onnx` and `nano_weights.bin`, as `export` writes them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are of another network.
    """
    net, shapes, names = _random_net(), *_probe()
    found: dict[str, Tensor] = {}
    own = net.state_dict()
    for part in PARTS:
        given = _constants(folder, part)
        if [x.shape for x in given] != shapes[part]:
            raise ValueError(f"{folder / f'nano_{part}.onnx'}: expected the network of this version, found another")
        for k, value in enumerate(given):
            for one in names.get((part, k), ()):
                array = np.array(value.T if one.turned else value) / one.factor
                found[one.name] = torch.from_numpy(array).reshape(own[one.name].shape)
    net.load_state_dict({**own, **found})
    return net.eval()


def renormalise(net: NanoNet, look: Callable[[], None]) -> None:
    """Give each normalisation after a convolution the statistics of what it gets; the network computes the same.

    Channels of the convolutions are scaled as fresh ones are, which changes nothing but the pace of training.

    Args:
        net: of `read_shipped`; is in evaluation mode afterwards.
        look: sends pictures through all of its parts.
    """
    pairs = _normalised(net)
    sums = {name: torch.zeros(2, len(conv.weight), dtype=torch.float64) for name, (conv, _) in pairs.items()}
    counts = dict.fromkeys(pairs, 0)

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
            values = output.detach().double().transpose(0, 1).flatten(1)
            sums[name] += torch.stack([values.sum(1), (values * values).sum(1)]).cpu()
            counts[name] += values.shape[1]

        return add

    hooks = [conv.register_forward_hook(watch(name)) for name, (conv, _) in pairs.items()]
    net.eval()
    try:
        with torch.no_grad():
            look()
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for name, (conv, norm) in pairs.items():
            mean, square = sums[name] / max(counts[name], 1)
            size = conv.weight[0].numel()
            usual = (3 * size) ** -0.5
            share = conv.weight.double().flatten(1).square().mean(1).sqrt().cpu() / usual
            share = torch.where(share > 1e-6, share, torch.ones_like(share))
            variance = (square - mean * mean).clamp_min(0) / share**2
            conv.weight.div_(share.to(conv.weight)[:, None, None, None])
            norm.weight.copy_(share * (variance + norm.eps).sqrt())
            norm.bias.add_(mean.to(norm.bias))
            norm.running_mean.copy_(mean / share)  # type: ignore[union-attr]  # it tracks them
            norm.running_var.copy_(variance)  # type: ignore[union-attr]


def _normalised(net: NanoNet) -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each normalisation with the convolution before it, by the name of the latter."""
    pairs = {}
    last: tuple[str, nn.Conv2d] | None = None
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name, module
        elif isinstance(module, nn.BatchNorm2d) and last is not None:
            pairs[last[0]] = last[1], module
    return pairs


@functools.cache
def _probe() -> tuple[dict[str, list[tuple[int, ...]]], dict[tuple[str, int], list[Found]]]:
    """Shapes of the constants of each part, and which parameters they are; takes some seconds, once."""
    net = _random_net()
    with tempfile.TemporaryDirectory() as place:
        export(net, Path(place), check=False)
        found = {part: _constants(Path(place), part) for part in PARTS}
    return {part: [x.shape for x in arrays] for part, arrays in found.items()}, _names(net, found)


def _random_net() -> NanoNet:
    """Every number its own, and normalisation that does nothing but add its bias."""
    net, source = NanoNet().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=source))
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for x, number in ((norm.running_mean, 0.0), (norm.running_var, 1 - norm.eps), (norm.weight, 1.0)):
                    x.fill_(number)  # type: ignore[union-attr]  # it tracks them
        net.stem.level.norm.running_var.abs_()  # type: ignore[union-attr]
    return net


def _constants(folder: Path, part: str) -> list[Array]:
    """Constants of a graph in the order of its nodes and their inputs; one that several read comes several times."""
    path = folder / f"nano_{part}.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"expected the file {path}, as glesam_ros.training.export writes it, found none")
    model = fold_constants(onnx.load(path))
    values = constants(model)
    read = [values[name] for node in model.graph.node for name in node.input if name in values]
    return [value for value in read if value.dtype == np.float32]


def _names(net: NanoNet, probe: dict[str, list[Array]]) -> dict[tuple[str, int], list[Found]]:
    """Which parameters the constant k of a part is, by its numbers.

    Raises:
        RuntimeError: export makes a constant of a parameter that is not told by its numbers.
    """
    known: dict[int, list[tuple[str, Array]]] = {}
    for name, value in net.state_dict().items():
        if value.is_floating_point() and value.any():
            known.setdefault(value.numel(), []).append((name, value.numpy().ravel()))
    found: dict[tuple[str, int], list[Found]] = {}
    for part, arrays in probe.items():
        for k, array in enumerate(arrays):
            for name, value in known.get(array.size, ()):
                for turned in (False, True)[: 1 + (array.ndim == 2)]:
                    flat = (array.T if turned else array).ravel()
                    # a constant that it is multiplied with afterwards may be in it
                    factor = float(flat @ value / (value @ value))
                    if factor and np.abs(flat - factor * value).max() <= NEAR * np.abs(flat).max():
                        found.setdefault((part, k), []).append(Found(name, turned, factor))
                        break
    told = {one.name for several in found.values() for one in several}
    norms = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d))
    missing = [
        name for names in known.values() for name, _ in names
        if name not in told and not (name.startswith(norms) and not name.endswith(".bias"))
    ]
    if missing:
        raise RuntimeError(f"expected every parameter in the exported graphs, found none for {', '.join(missing)}")
    return found
