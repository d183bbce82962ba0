"""What enhancement in the latent must beat: restore the picture, then segment it; and GrabCut from the box.

Restorers take and give (H, W, 3) uint8 RGB. Weights of the learned ones are never shipped; torch is imported only for
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from glesam_ros.validation import BoolArray, UInt8Array, check_boxes, check_image

if TYPE_CHECKING:
    import torch

Restorer = Callable[[UInt8Array], UInt8Array]

GRABCUT = "grabcut"
LEARNED = {"zero_dce": "zero_dce.pth", "prenet": "prenet_r_rain100h.pth"}
"""Learned restorers and the files of their state dicts."""
BASELINES = ("classical", *LEARNED, GRABCUT)
_ONLY_FOR = {"zero_dce": "low_light", "prenet": "rain"}

ZERO_DCE_CURVES = 8
PRENET_STAGES, PRENET_BLOCKS = 6, 5

_DARK, _MIDDLE = 0.3, 0.45
"""Mean lightness below which `classical` brightens, and what it aims at."""
_NOISE_SEEN = 2.0
_GRABCUT_SIDE = 384


def applies(name: str, kind: str) -> bool:
    """Whether baseline `name` is meant for degradation `kind` ("" is clear): the learned ones for their own only."""
    return _ONLY_FOR.get(name, kind) == kind


def load_restorers(names: Sequence[str], folder: Path) -> dict[str, Restorer]:
    """The restorers among `names`; `grabcut` is none, see the function.

    Args:
        names: of `BASELINES`.
        folder: with the state dicts of the learned ones.

    Raises:
        ValueError: unknown name, or a state dict that does not fit.
        FileNotFoundError: the state dict is missing.
        ModuleNotFoundError: a learned one was asked for without torch.
    """
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise ValueError(f"baselines: expected some of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    found: dict[str, Restorer] = {"classical": classical} if "classical" in names else {}
    for name in LEARNED:
        if name in names:
            found[name] = load_learned(name, folder / LEARNED[name])
    return found


def classical(image: Any) -> UInt8Array:
    """OpenCV's classical methods in one chain, each only as strong as the picture needs.

    1. Non-local means, strength 0.8 of the measured noise (Immerkaer 1996), left out below 2 grey levels.
    2. In pictures with a mean lightness below 0.3: gamma that brings it to 0.45, then CLAHE (clip 2, 8x8 tiles).
    3. Unsharp mask: Gaussian of 2 pixels, amount 0.7.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        TypeError, ValueError: `image` is not such an array.
    """
    out: Any = check_image(image)
    noise = noise_level(out)
    if noise > _NOISE_SEEN:
        strength = 0.8 * noise
        # it takes BGR
        bgr = cv2.fastNlMeansDenoisingColored(cv2.cvtColor(out, cv2.COLOR_RGB2BGR), None, strength, strength, 5, 11)
        out = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    lightness, a, b = cv2.split(cv2.cvtColor(out, cv2.COLOR_RGB2LAB))
    mean = float(lightness.mean()) / 255
    if mean < _DARK:
        gamma = np.log(_MIDDLE) / np.log(max(mean, 1 / 255))
        brighter = cv2.LUT(lightness, np.round(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8))
        brighter = cv2.createCLAHE(2.0, (8, 8)).apply(brighter)
        out = cv2.cvtColor(cv2.merge([brighter, a, b]), cv2.COLOR_LAB2RGB)
    return np.asarray(cv2.addWeighted(out, 1.7, cv2.GaussianBlur(out, (0, 0), 2), -0.7, 0), np.uint8)


def noise_level(image: UInt8Array) -> float:
    """Standard deviation of the noise in grey levels of an (H, W, 3) uint8 RGB image, by Immerkaer (CVIU 1996)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel)).mean())


def grabcut(image: Any, boxes: Any) -> BoolArray:
    """GrabCut (Rother et al. 2004) from each box, on the box and half its size around it, one iteration.

    Where these are larger than 384 pixels they are scaled down to that. On 66 boxes of training photographs, half of
    them degraded, neither more iterations nor more pixels gave a better IoU.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4) float xyxy in pixels.

    Returns:
        (M, H, W) bool; the whole box where there is nothing outside it to learn the background from.

    Raises:
        TypeError, ValueError: `image` or `boxes` are not such arrays.
    """
    image = check_image(image)
    height, width = image.shape[:2]
    masks = np.zeros((len(boxes), height, width), np.bool_)
    for mask, (x1, y1, x2, y2) in zip(masks, np.round(check_boxes(boxes, (height, width))).astype(int)):
        dx, dy = (x2 - x1) // 2 + 1, (y2 - y1) // 2 + 1
        left, top = max(0, x1 - dx), max(0, y1 - dy)
        around = image[top : y2 + dy, left : x2 + dx]
        inside = np.zeros(around.shape[:2], np.uint8)
        inside[y1 - top : y2 - top, x1 - left : x2 - left] = 1
        mask[top : y2 + dy, left : x2 + dx] = _cut(around, inside)
    return masks


def _cut(around: UInt8Array, inside: UInt8Array) -> BoolArray:
    """GrabCut on a window: `inside` (h, w) is 1 in the box."""
    size = around.shape[1::-1]
    scale = min(1.0, _GRABCUT_SIDE / max(size))
    small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    picture = cv2.resize(around, small, interpolation=cv2.INTER_AREA)
    box = cv2.resize(inside, small, interpolation=cv2.INTER_NEAREST)
    if box.all() or not box.any():
        return np.asarray(inside > 0)
    state = np.where(box > 0, np.uint8(cv2.GC_PR_FGD), np.uint8(cv2.GC_BGD))
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # its k-means starts at random
    cv2.grabCut(picture, state, (0, 0, 0, 0), background, foreground, 1, cv2.GC_INIT_WITH_MASK)
    found = np.where((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD), np.uint8(1), np.uint8(0))
    return np.asarray(cv2.resize(found, size, interpolation=cv2.INTER_NEAREST) > 0)


def load_learned(name: str, path: Path) -> Restorer:
    """A learned restorer ("zero_dce" or "prenet") with the state dict at `path`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a state dict of this network: keys or shapes differ.
        ModuleNotFoundError: torch is not installed.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the weights of {name}, found no such file")
    network = {"zero_dce": zero_dce, "prenet": prenet_r}[name]()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:  # torch raises RuntimeError, pickle and zip errors of many kinds
        lines = " ".join(str(error).split())
        raise ValueError(f"{path}: expected the state dict of {name}; {lines}") from error
    network.eval()

    def restore(image: UInt8Array) -> UInt8Array:
        pixels = torch.from_numpy(np.ascontiguousarray(check_image(image))).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            restored = network(pixels)[0].clamp(0, 1)
        return np.asarray((255 * restored).round().byte().permute(1, 2, 0).numpy())

    return restore


def zero_dce() -> torch.nn.Module:
    """Zero-DCE (Guo et al., CVPR 2020): seven convolutions estimate eight curves a pixel; 79,416 parameters.

    It maps (B, 3, H, W) float in 0..1 to the same, brighter. Names of the parameters as in the authors' code.
    """
    import torch
    from torch import nn

    class ZeroDce(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = [(3, 32), (32, 32), (32, 32), (32, 32), (64, 32), (64, 32), (64, 3 * ZERO_DCE_CURVES)]
            for number, (before, after) in enumerate(channels, 1):
                self.add_module(f"e_conv{number}", nn.Conv2d(before, after, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            conv = [getattr(self, f"e_conv{number}") for number in range(1, 8)]
            x1 = conv[0](x).relu()
            x2 = conv[1](x1).relu()
            x3 = conv[2](x2).relu()
            x4 = conv[3](x3).relu()
            x5 = conv[4](torch.cat([x3, x4], 1)).relu()
            x6 = conv[5](torch.cat([x2, x5], 1)).relu()
            for curve in conv[6](torch.cat([x1, x6], 1)).tanh().split(3, 1):
                x = x + curve * (x * x - x)
            return x

    return ZeroDce()


def prenet_r() -> torch.nn.Module:
    """PReNet_r (Ren et al., CVPR 2019): six stages with one LSTM and one residual block, used again; 94,979 parameters.

    It maps (B, 3, H, W) float in 0..1 to the same without rain. Names of the parameters as in the authors' code.
    """
    import torch
    from torch import nn

    def conv(before: int, after: int, *activation: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), *activation)

    class PReNetR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv0 = conv(6, 32, nn.ReLU())
            self.res_conv1 = nn.Sequential(*conv(32, 32, nn.ReLU()), *conv(32, 32, nn.ReLU()))
            self.conv_i = conv(64, 32, nn.Sigmoid())
            self.conv_f = conv(64, 32, nn.Sigmoid())
            self.conv_g = conv(64, 32, nn.Tanh())
            self.conv_o = conv(64, 32, nn.Sigmoid())
            self.conv = conv(32, 3)

        def forward(self, rainy: torch.Tensor) -> torch.Tensor:
            clean = rainy
            hidden = cell = rainy.new_zeros(rainy.shape[0], 32, *rainy.shape[2:])
            for _ in range(PRENET_STAGES):
                x = torch.cat([self.conv0(torch.cat([rainy, clean], 1)), hidden], 1)
                cell = self.conv_f(x) * cell + self.conv_i(x) * self.conv_g(x)
                x = hidden = self.conv_o(x) * cell.tanh()
                for _ in range(PRENET_BLOCKS):
                    x = (self.res_conv1(x) + x).relu()
                clean = rainy + self.conv(x)
            return clean

    return PReNetR()
