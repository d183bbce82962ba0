"""LQSeg: the published second-order degradation chain of GleSAM (arXiv 2503.12507, after Real-ESRGAN).

Blur, resize, noise, JPEG; then blur, resize by the rate of the level, noise, JPEG and a final sinc filter in either
order, back at the input size. All ranges are those of the authors' training configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.validation import FloatArray, UInt8Array, check_image

Picture = NDArray[Any]
"""(H, W, 3) float32 BGR in 0..255; the stubs of OpenCV know no dtype."""

RATES = {1: 1, 2: 2, 3: 4}
"""Down-sampling rate of LQ-1, LQ-2, LQ-3."""
MIXED_RATES = (1, 2, 3, 3, 4, 4, 4, 4)
"""Rates that the released training code draws from, each entry as likely; 3 is of no level."""
KERNEL_SIZES = tuple(range(7, 22, 2))
FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
FAMILY_PROBABILITIES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
SINC_PROBABILITY = 0.1
FINAL_SINC_PROBABILITY = 0.8
GENERALIZED_BETA = (0.5, 4.0)
PLATEAU_BETA = (1.0, 2.0)
INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}

LONE = (1, 1)
"""A picture of one pixel, which OpenCV 4.5 can neither convert nor resize nor filter; mirrored, it lies amid itself."""
_MANY_TAPS = 130  # of a kernel; from here on OpenCV's own filter would go by Fourier transforms, too
_NEGLIGIBLE_MASS = 2e-4  # of a kernel's margin; shifts a pixel by less than 0.1 of 255


@dataclass(frozen=True)
class Order:
    """Ranges of one round of the chain.

    Attributes:
        blur_probability: chance that the round blurs.
        sigma: standard deviation of the blur kernels in pixels.
        resize_probabilities: of up, down, keep.
        resize_range: smallest and largest factor.
        gaussian_probability: of Gaussian noise, else Poisson.
        gaussian_sigma: standard deviation in grey levels of 255.
        poisson_scale: factor on the Poisson deviation.
        gray_probability: chance that one noise field serves all channels.
        jpeg_quality: range of the quality, 0..100.
    """

    blur_probability: float
    sigma: tuple[float, float]
    resize_probabilities: tuple[float, float, float]
    resize_range: tuple[float, float]
    gaussian_probability: float
    gaussian_sigma: tuple[float, float]
    poisson_scale: tuple[float, float]
    gray_probability: float
    jpeg_quality: tuple[float, float]


FIRST = Order(1.0, (0.2, 3.0), (0.1, 0.2, 0.7), (0.5, 1.5), 0.5, (1.0, 30.0), (0.05, 3.0), 0.4, (30.0, 95.0))
FIRST_OFFLINE = replace(FIRST, resize_probabilities=(0.2, 0.7, 0.1), resize_range=(0.15, 1.5))
"""First round of the script that made the published test sets, and of RASS's training."""
SECOND = Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), 0.5, (1.0, 25.0), (0.05, 2.5), 0.4, (30.0, 95.0))


@dataclass(frozen=True, eq=False)
class Degraded:
    """A worse image and how it came about.

    Attributes:
        image: (H, W, 3) uint8 RGB, the size of the input.
        level: severity 1..3.
        parameters: everything that was sampled, as plain numbers and strings.
    """

    image: UInt8Array
    level: int
    parameters: dict[str, Any] = field(default_factory=dict)


def degrade_lqseg(
    image: Any, level: int, seed: int | np.random.Generator, *, noise: np.random.Generator | None = None,
    first: Order = FIRST,
) -> Degraded:
    """Degrade an image to LQ-1, LQ-2 or LQ-3.

    Where the authors' released code departs from its own configuration, the configuration is followed: the second blur
    has its own kernel (the code reuses the first), and the rate is the one of the level (the offline script has 2 hard
    coded). As in their training code the clear image is not sharpened first. The ranges are meant for pictures of about
    512 pixels.

    Args:
        image: (H, W, 3) uint8 RGB.
        level: 1, 2 or 3.
        seed: an integer, or a generator to draw from. One seed gives the same bits on the same numpy and OpenCV.
        noise: draws the noise fields instead, so that the frames of a film differ in nothing else.
        first: ranges of the first round; `FIRST_OFFLINE` for those of the published test sets, which shrink more.

    Raises:
        TypeError, ValueError: `image` is not such an array, or `level` not such a number.
    """
    image = check_image(image)
    if isinstance(level, bool) or level not in RATES:
        raise ValueError(f"level: expected 1, 2 or 3, got {level!r}")
    rng = np.random.default_rng(seed)
    degraded, parameters = _chain(image, RATES[level], rng, noise or rng, first)
    return Degraded(degraded, level, parameters)


def degrade_lqseg_mixed(image: Any, seed: int | np.random.Generator) -> Degraded:
    """Degrade an image as mixed training does: the rate is drawn from `MIXED_RATES`, then the chain runs with it.

    Args:
        image: (H, W, 3) uint8 RGB.
        seed: as in `degrade_lqseg`; draws the rate, too.

    Returns:
        `parameters["rate"]` is the drawn rate, 1 to 4; `level` is 1, 2, 3, 3 for it (3 lies between LQ-2 and LQ-3,
        nearer to LQ-3 in octaves).

    Raises:
        TypeError, ValueError: `image` is not such an array.
    """
    image = check_image(image)
    rng = np.random.default_rng(seed)
    rate = MIXED_RATES[int(rng.integers(len(MIXED_RATES)))]
    degraded, parameters = _chain(image, rate, rng, rng, FIRST)
    return Degraded(degraded, min(rate, 3), parameters)


def _chain(
    image: UInt8Array, rate: int, rng: np.random.Generator, noise: np.random.Generator, first: Order
) -> tuple[UInt8Array, dict[str, Any]]:
    height, width = image.shape[:2]
    parameters: dict[str, Any] = {"rate": rate}
    out: Picture = _swapped(image).astype(np.float32)  # BGR, 0..255: what the JPEG codec takes
    for name, order, divisor in (("first", first, 1), ("second", SECOND, rate)):
        sampled: dict[str, Any] = {}
        parameters[name] = sampled
        out = _blur(out, order, rng, sampled)
        out = _resize(out, order, (height, width), divisor, rng, sampled)
        out = _noise(out, order, rng, noise, sampled)
        if name == "first":
            out = _jpeg(out, order, rng, sampled).astype(np.float32)
    sampled["jpeg_last"] = bool(rng.random() < 0.5)
    if sampled["jpeg_last"]:
        result = _jpeg(_resize_back(out, (height, width), rng, sampled), SECOND, rng, sampled)
    else:
        compressed = _jpeg(out, SECOND, rng, sampled).astype(np.float32)
        result = _to_uint8(_resize_back(compressed, (height, width), rng, sampled))
    return _swapped(result), parameters


def _swapped(image: UInt8Array) -> UInt8Array:
    """RGB (H, W, 3) uint8 -> BGR, and back."""
    if image.shape[:2] == LONE:
        return image[..., ::-1].copy()
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)


def gaussian_kernel(
    size: int, sigma: tuple[float, float], rotation: float, family: str = "iso", beta: float = 1.0
) -> FloatArray:
    """Blur kernel of one of `FAMILIES`, sum 1.

    Args:
        size: odd side in pixels.
        sigma: standard deviations along the two axes in pixels.
        rotation: of the axes, in radians.
        family: with m the squared Mahalanobis distance: exp(-m / 2); generalized: exp(-m ** beta / 2);
            plateau: 1 / (m ** beta + 1).
        beta: shape of the last two.

    Returns:
        (size, size) float32.
    """
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = axis[None, :], axis[:, None]
    c, s = math.cos(rotation), math.sin(rotation)
    m = ((c * x + s * y) / sigma[0]) ** 2 + ((c * y - s * x) / sigma[1]) ** 2
    if family.startswith("plateau"):
        kernel = 1.0 / (m**beta + 1.0)
    else:
        kernel = np.exp(-0.5 * (m if family in ("iso", "aniso") else m**beta))
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(size: int, cutoff: float) -> FloatArray:
    """Circular low-pass kernel, w * J1(w * r) / (2 pi r), sum 1; rings like an over-sharpened picture.

    Args:
        size: odd side in pixels.
        cutoff: w in radians a pixel, up to pi.

    Returns:
        (size, size) float32.
    """
    axis = np.arange(size, dtype=np.float64) - size // 2
    r = np.hypot(axis[None, :], axis[:, None])
    radii, where = np.unique(r, return_inverse=True)
    values = np.empty_like(radii)
    values[0] = cutoff**2 / (4 * math.pi)  # the limit at r = 0
    values[1:] = cutoff * bessel_j1(cutoff * radii[1:]) / (2 * math.pi * radii[1:])
    kernel = values[where.reshape(r.shape)]
    return (kernel / kernel.sum()).astype(np.float32)


def bessel_j1(x: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Bessel function of the first kind, order 1, for |x| <= 60, to 1e-12.

    The trapezoidal rule on its integral over one period, which converges faster than any power.
    """
    t = (np.arange(128) + 0.5) * (2 * math.pi / 128)
    x = np.asarray(x, np.float64)
    return np.asarray(np.cos(t - x[..., None] * np.sin(t)).mean(-1))


def _sample_kernel(order: Order, rng: np.random.Generator, sampled: dict[str, Any]) -> FloatArray:
    size = int(rng.choice(KERNEL_SIZES))
    sampled["kernel_size"] = size
    if rng.random() < SINC_PROBABILITY:
        sampled["kernel"] = "sinc"
        sampled["cutoff"] = float(rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi))
        return sinc_kernel(size, sampled["cutoff"])
    family = str(rng.choice(FAMILIES, p=FAMILY_PROBABILITIES))
    sigma_x = float(rng.uniform(*order.sigma))
    isotropic = not family.endswith("aniso")
    sigma_y = sigma_x if isotropic else float(rng.uniform(*order.sigma))
    rotation = 0.0 if isotropic else float(rng.uniform(-math.pi, math.pi))
    beta = 1.0
    if family.startswith(("generalized", "plateau")):
        low, high = GENERALIZED_BETA if family.startswith("generalized") else PLATEAU_BETA
        beta = float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high))
    sampled.update(kernel=family, sigma=(sigma_x, sigma_y), rotation=rotation, beta=beta)
    return gaussian_kernel(size, (sigma_x, sigma_y), rotation, family, beta)


def _filter(image: Picture, kernel: FloatArray) -> Picture:
    """Correlate each channel; margins that hold nothing are cut and separable kernels run as two passes."""
    if image.shape[:2] == LONE:
        return image
    mass = np.abs(kernel)
    for margin in range(kernel.shape[0] // 2, 0, -1):
        inner = mass[margin:-margin, margin:-margin]
        if mass.sum() - inner.sum() < _NEGLIGIBLE_MASS:
            kernel = kernel[margin:-margin, margin:-margin] / kernel[margin:-margin, margin:-margin].sum()
            break
    row, column = kernel.sum(0), kernel.sum(1)
    if np.abs(np.outer(column, row) - kernel).max() < 1e-6:
        return cv2.sepFilter2D(image, -1, row, column)
    return cv2.filter2D(image, -1, kernel) if kernel.size < _MANY_TAPS else _filter_by_dft(image, kernel)


def _filter_by_dft(image: Picture, kernel: FloatArray) -> Picture:
    """`cv2.filter2D` by one Fourier transform a channel; OpenCV's own, of many small tiles, takes twice as long."""
    reach = kernel.shape[0] // 2
    height, width = image.shape[:2]
    rows, columns = (cv2.getOptimalDFTSize(side + 2 * reach) for side in (height, width))
    padded = cv2.copyMakeBorder(
        image, reach, rows - height - reach, reach, columns - width - reach, cv2.BORDER_REFLECT_101
    )
    response = np.zeros((rows, columns), np.float32)
    response[: kernel.shape[0], : kernel.shape[1]] = kernel / (rows * columns)
    spectrum = cv2.dft(response, nonzeroRows=kernel.shape[0])
    channels = cv2.split(padded)
    for channel in channels:
        cv2.dft(channel, dst=channel)
        cv2.mulSpectrums(channel, spectrum, 0, c=channel, conjB=True)
        cv2.dft(channel, dst=channel, flags=cv2.DFT_INVERSE | cv2.DFT_REAL_OUTPUT)
    return cv2.merge([channel[:height, :width] for channel in channels])


def _to_size(image: Picture, size: tuple[int, int], interpolation: int) -> Picture:
    """`cv2.resize` of an image (H, W, 3) float32 to the (width, height) `size`, also of a lone pixel."""
    if image.shape[1::-1] == size:
        return image
    if image.shape[:2] == LONE:
        return np.tile(image, (size[1], size[0], 1))
    return cv2.resize(image, size, interpolation=interpolation)


def _blur(image: Picture, order: Order, rng: np.random.Generator, sampled: dict[str, Any]) -> Picture:
    sampled["blur"] = bool(rng.random() < order.blur_probability)
    return _filter(image, _sample_kernel(order, rng, sampled)) if sampled["blur"] else image


def _resize(
    image: Picture, order: Order, size: tuple[int, int], divisor: int, rng: np.random.Generator,
    sampled: dict[str, Any],
) -> Picture:
    kind = str(rng.choice(("up", "down", "keep"), p=order.resize_probabilities))
    low, high = {"up": (1.0, order.resize_range[1]), "down": (order.resize_range[0], 1.0), "keep": (1.0, 1.0)}[kind]
    factor = float(rng.uniform(low, high))
    mode = str(rng.choice(tuple(INTERPOLATIONS)))
    sampled.update(resize=kind, factor=factor, interpolation=mode)
    height, width = (max(1, int(side / divisor * factor)) for side in size)
    return _to_size(image, (width, height), interpolation=INTERPOLATIONS[mode])


def _resize_back(
    image: Picture, size: tuple[int, int], rng: np.random.Generator, sampled: dict[str, Any]
) -> Picture:
    mode = str(rng.choice(tuple(INTERPOLATIONS)))
    sampled["last_interpolation"] = mode
    out = _to_size(image, (size[1], size[0]), interpolation=INTERPOLATIONS[mode])
    sampled["final_sinc"] = bool(rng.random() < FINAL_SINC_PROBABILITY)
    if not sampled["final_sinc"]:
        return out
    kernel_size = int(rng.choice(KERNEL_SIZES))
    cutoff = float(rng.uniform(math.pi / 3, math.pi))
    sampled.update(final_kernel_size=kernel_size, final_cutoff=cutoff)
    return _filter(out, sinc_kernel(kernel_size, cutoff))


def _noise(
    image: Picture, order: Order, rng: np.random.Generator, noise: np.random.Generator, sampled: dict[str, Any]
) -> Picture:
    gaussian = bool(rng.random() < order.gaussian_probability)
    strength = float(rng.uniform(*(order.gaussian_sigma if gaussian else order.poisson_scale)))
    gray = bool(rng.random() < order.gray_probability)
    sampled.update(noise="gaussian" if gaussian else "poisson", noise_strength=strength, gray_noise=gray)
    if gaussian:
        field_ = noise.standard_normal(image.shape[:2] if gray else image.shape, dtype=np.float32)
        field_ *= strength
    else:
        field_ = poisson_noise(_to_uint8(image), gray, noise)
        field_ *= strength
    spread = cv2.merge([field_] * 3).reshape(image.shape) if gray else field_
    return np.clip(np.add(image, spread, out=spread), 0.0, 255.0, out=spread)


def poisson_noise(image: UInt8Array, gray: bool, rng: np.random.Generator) -> FloatArray:
    """Deviation of a Poisson draw from the image, with as many counts at white as the image has grey values.

    Args:
        image: (H, W, 3) uint8 BGR.
        gray: draw once on the grey image.

    Returns:
        (H, W) float32 where gray, else (H, W, 3), in grey levels of 255, mean 0. With c counts at white (the number of
        grey values, rounded up to a power of two) a pixel v has the variance v * 255 / c.
    """
    if gray:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
    values = cv2.countNonZero(cv2.calcHist([image.reshape(-1)], [0], None, [256], [0, 256]))
    counts = 2 ** math.ceil(math.log2(values))
    low = np.uint32(_COLUMNS - 1)
    bits = rng.integers(0, 1 << 32, image.shape, np.uint32)
    cell = image.astype(np.uint32)
    cell <<= np.uint32(_COLUMN_BITS)
    cell |= bits & low
    entry = _poisson_table(counts).take(cell.view(np.int32), mode="clip")  # all are inside; to check that takes a copy
    bits |= low + np.uint32(1)  # odd high bits never equal an even threshold: the smaller one has the outcome
    outcome = np.minimum(bits, entry, out=bits)
    outcome &= low
    drawn = outcome.astype(np.float32)
    drawn *= np.float32(255.0 / counts)
    return np.subtract(drawn, image, out=drawn, dtype=np.float32)


_COLUMN_BITS = 9
_COLUMNS = 1 << _COLUMN_BITS  # outcomes 0..511; with a mean of at most 256 no draw ever comes near the end


_NEVER = 1e-300
"""Probability of outcomes that are left out."""


@lru_cache(maxsize=9)
def _poisson_table(counts: int) -> np.ndarray[Any, Any]:
    """Alias tables (Walker) of the Poisson laws with the means v * counts / 255, v = 0..255.

    Only 256 means occur, so a table draws three times as fast as `Generator.poisson`; exact to 2**-23.

    Returns:
        (256 * 512,) uint32, an entry a column: the high 23 bits are the threshold, an even number, of 23 random bits
        below which it keeps its own outcome, the low 9 bits its other outcome. One that always keeps its own has it as
        the other, too.
    """
    outcomes = np.arange(_COLUMNS)
    mean = np.arange(256)[:, None] * (counts / 255.0)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(outcomes[1:]))])
    p = np.exp(outcomes * np.log(np.maximum(mean, 1e-300)) - mean - log_factorial)
    p[p < _NEVER] = 0.0  # training flushes denormal numbers to zero, and the tables must not depend on that
    p *= _COLUMNS / p.sum(1, keepdims=True)
    accept, alias = np.ones_like(p), np.tile(outcomes, (256, 1))
    row = np.arange(256)
    for _ in outcomes:  # the poorest column is filled up by the richest, then done
        poor, rich = p.argmin(1), np.where(np.isinf(p), -1.0, p).argmax(1)
        accept[row, poor], alias[row, poor] = np.minimum(p[row, poor], 1.0), rich
        p[row, rich] -= 1.0 - accept[row, poor]
        p[row, poor] = np.inf  # done
    scale = 1 << (32 - _COLUMN_BITS)
    threshold = 2 * (accept * (scale // 2)).round().astype(np.uint32)
    alias = np.where(threshold == scale, outcomes, alias).astype(np.uint32)
    return (np.minimum(threshold, scale - 2) << np.uint32(_COLUMN_BITS) | alias).reshape(-1)


def _jpeg(image: Picture, order: Order, rng: np.random.Generator, sampled: dict[str, Any]) -> UInt8Array:
    sampled["jpeg_quality"] = int(rng.uniform(*order.jpeg_quality))
    return jpeg(_to_uint8(image), sampled["jpeg_quality"])


def jpeg(image: UInt8Array, quality: int) -> UInt8Array:
    """Compress and decompress an (H, W, 3) uint8 image; channels are taken as BGR."""
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)


def _to_uint8(image: Picture) -> UInt8Array:
    positive = cv2.threshold(image, 0.0, 0.0, cv2.THRESH_TOZERO)[1]
    return np.asarray(cv2.convertScaleAbs(positive), np.uint8)  # rounds and saturates
