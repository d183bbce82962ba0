"""What robots see: night, weather, blur, noise and compression, each a function with three severities.

One table, `EFFECTS`, holds them all; a new degradation is one function and one row. Light adds up in linear light, so
everything optical happens there and goes back through the sRGB curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.degradation.h264 import h264
from glesam_ros.degradation.lqseg import LONE, Degraded, degrade_lqseg, jpeg
from glesam_ros.validation import UInt8Array, check_image

Array = NDArray[Any]
"""Working array, float32 unless said otherwise; the stubs of OpenCV know no dtype."""
Rng = np.random.Generator
Effect = Callable[[UInt8Array, int, Rng, Rng], tuple[UInt8Array, dict[str, Any]]]
"""(image, level, scene, frame) -> (worse image, what was sampled, as plain numbers and lists of them).

Both images are (H, W, 3) uint8 RGB of one size, the level is 1..3; neither is checked, `degrade` does that. `scene`
draws what stays through a film (wind, drops on the lens), `frame` what differs from frame to frame (noise). The first
line of an effect's docstring is what `glesam degrade --list` says of it.
"""

LEVELS = (1, 2, 3)
TRAINING_KINDS = ("lq", "low_light", "motion_blur", "defocus", "rain", "fog")
"""What training may show to a network."""
HELD_OUT_KINDS = (
    "snow", "glare", "lens_drops", "iso_noise", "gaussian_noise", "jpeg", "rolling_shutter", "dead_pixels", "h264",
)
"""What training never shows, so that tests on it say how far a network carries over."""


def degrade(
    image: Any, name: str, level: int, seed: int, frame: int = 0, *, depth: np.ndarray[Any, Any] | None = None
) -> Degraded:
    """Degrade an image as a camera on a robot would see it.

    Strength depends on `level` alone. In a film keep `seed` and count `frame`: the weather stays (wind, fog banks,
    drops on the lens), noise, streaks and flakes change.

    Args:
        image: (H, W, 3) uint8 RGB.
        name: one of `names()`; "lq" is the LQSeg chain with LQ-1..LQ-3.
        level: 1 (light), 2, 3 (severe).
        seed: of the scene, >= 0. The same seed and frame give the same bits.
        frame: number of the frame in a film, >= 0.
        depth: for "fog" only: (H, W) distance in metres, not finite or 0 where the sensor saw nothing (taken as
            infinitely far). Without it a flat ground below a horizon stands in.

    Raises:
        TypeError, ValueError: `image` or `depth` is not such an array, or name, level, seed or frame do not exist, or
            the image is too large for what OpenCV does with it.
    """
    image = check_image(image)
    if name not in EFFECTS:
        raise ValueError(f"name: expected one of {', '.join(names())}; got {name!r}")
    if isinstance(level, bool) or level not in LEVELS:
        raise ValueError(f"level: expected 1, 2 or 3, got {level!r}")
    for what, value in (("seed", seed), ("frame", frame)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{what}: expected an integer of at least 0, got {value!r}")
    scene, noise = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1, frame])
    try:
        if depth is None:
            out, parameters = EFFECTS[name](image, level, scene, noise)
        elif name == "fog":
            out, parameters = fog(image, level, scene, noise, _check_depth(depth, image.shape[:2]))
        else:
            raise ValueError(f"depth: expected None for {name!r}, only fog depends on it")
    except cv2.error as error:  # cv2.remap takes sides up to 32766, JPEG up to 65500
        height, width = image.shape[:2]
        raise ValueError(
            f"image: expected a size that OpenCV can degrade by {name!r}, got {width}x{height} pixels: "
            f"{str(error).strip()}; scale it down, or take another kind"
        ) from error
    return Degraded(np.ascontiguousarray(out, np.uint8), level, {"name": name, **parameters})


def names() -> tuple[str, ...]:
    """Names that `degrade` knows."""
    return tuple(EFFECTS)


def low_light(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """Night: few electrons, shot and read noise, row noise, a 10 bit converter, gain that brings back only a part.

    Arguments and result: see `Effect`.
    """
    exposure, brightness = {1: (0.06, 0.35), 2: (0.025, 0.2), 3: (0.01, 0.12)}[level]
    full_well, read_noise = 6000.0, 3.0
    electrons = _to_linear(image) * np.float32(exposure * full_well)
    noisy = electrons + _normal(frame, image.shape) * np.sqrt(electrons + np.float32(read_noise**2))
    noisy += _normal(frame, (image.shape[0], 1, 1)) * np.float32(0.25 * read_noise)
    step = exposure * full_well / 1023.0 * 4.0  # the converter's range covers four times the dark scene's white
    digital = np.floor(noisy / np.float32(step) + 0.5) * np.float32(step)
    gain = brightness / (exposure * full_well)
    tint = np.array([1.05, 0.95, 0.85], np.float32)  # lamps are warm
    out = cv2.GaussianBlur(digital, (3, 3), 0.6) * (tint * np.float32(gain))  # demosaicing spreads the noise
    return _to_srgb(out), {"exposure": exposure, "brightness": brightness, "read_noise": read_noise}


def motion_blur(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """The camera moves while the shutter is open: a slightly bent path, a little different in each frame.

    Arguments and result: see `Effect`.
    """
    length = max(3.0, {1: 10, 2: 20, 3: 36}[level] * _scale(image))
    angle = float(scene.uniform(0, math.pi) + frame.normal(0, 0.08))
    bend = float(scene.normal(0, 0.15) + frame.normal(0, 0.05))
    return _filter_linear(image, trajectory_psf(length, angle, bend)), {"length": length, "angle": angle, "bend": bend}


def trajectory_psf(length: float, angle: float, bend: float) -> Array:
    """Point spread function of a bent path.

    Args:
        length: in pixels.
        angle: in radians.
        bend: height of the arc over its length.

    Returns:
        (n, n) float32, n odd, sum 1.
    """
    t = np.linspace(-0.5, 0.5, max(32, int(8 * length)))
    along, across = t * length, bend * length * (4 * t**2 - 1 / 3)
    half = math.ceil(max(length / 2, np.hypot(along, across).max())) + 1
    x = along * math.cos(angle) - across * math.sin(angle) + half
    y = along * math.sin(angle) + across * math.cos(angle) + half
    psf = np.zeros((2 * half + 1, 2 * half + 1))
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.add.at(psf, (i + di, j + dj), np.abs(1 - di - (y - i)) * np.abs(1 - dj - (x - j)))
    return np.asarray(psf / psf.sum(), np.float32)


def defocus(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """Out of focus: a disc, so that lights become discs too.

    Arguments and result: see `Effect`.
    """
    radius = max(1.0, {1: 2.0, 2: 4.0, 3: 7.0}[level] * _scale(image))
    return _filter_linear(image, disc_psf(radius)), {"radius": radius}


def disc_psf(radius: float) -> Array:
    """Disc of `radius` pixels with a soft edge; (n, n) float32, n odd, sum 1."""
    axis = np.arange(-math.ceil(radius) - 1, math.ceil(radius) + 2)
    psf = np.clip(radius + 0.5 - np.hypot(axis[None, :], axis[:, None]), 0, 1)
    return np.asarray(psf / psf.sum(), np.float32)


def rain(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """Streaks of three distances, bright against the scene, and the veil of the far drops.

    Arguments and result: see `Effect`.
    """
    count, veil = {1: (150, 0.08), 2: (400, 0.18), 3: (900, 0.3)}[level]
    tilt = float(scene.uniform(-0.3, 0.3))
    height, width = image.shape[:2]
    scale = _scale(image)
    linear = _to_linear(image)
    sky = _sky(linear)
    linear = linear * np.float32((1 - veil) * (1 - 0.4 * veil)) + np.float32(0.7 * veil * sky)
    streaks = np.zeros((height, width), np.float32)
    for share, length, thickness, opacity in ((0.6, 14, 1, 0.25), (0.3, 30, 1, 0.4), (0.1, 60, 2, 0.45)):
        layer = np.zeros((height, width), np.uint8)
        n = int(count * share)
        start = frame.uniform((-0.1 * width, -0.2 * height), (1.1 * width, height), (n, 2))
        size = frame.uniform(0.6, 1.3, n) * length * scale
        end = start + np.stack([math.sin(tilt) * size, math.cos(tilt) * size], 1)
        strength = frame.integers(110, 255, n)
        for a, b, s in zip((start * 16).astype(int), (end * 16).astype(int), strength):
            width_px = max(1, round(thickness * scale))
            cv2.line(layer, a.tolist(), b.tolist(), int(s), width_px, cv2.LINE_AA, 4)
        blurred = cv2.GaussianBlur(layer, (0, 0), 0.6 * thickness * max(scale, 0.7))
        streaks += blurred * np.float32(opacity / 255.0)
    # a drop shows the bright sky, whatever is behind it
    alpha = np.minimum(streaks, 0.85)[..., None]
    return _to_srgb(linear + (np.float32(1.1 * sky) - linear) * alpha), {"streaks": count, "veil": veil, "tilt": tilt}


def lens_drops(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """Water on the lens: each drop is a small strong lens that shows the scene upside down, out of focus.

    Arguments and result: see `Effect`.
    """
    count = {1: 12, 2: 28, 3: 55}[level]
    height, width = image.shape[:2]
    scale = _scale(image)
    soft = cv2.GaussianBlur(image, (0, 0), 3.0 * max(scale, 0.5))
    out = image.copy()
    centres = scene.uniform((0, 0), (width, height), (count, 2))
    radii = np.minimum(scene.gamma(3.0, 6.0, count) + 6, 55) * scale
    stretch, angles = scene.uniform(0.75, 1.0, count), scene.uniform(0, math.pi, count)
    for (cx, cy), radius, squeeze, angle in zip(centres, radii, stretch, angles):
        x1, x2 = max(0, int(cx - radius) - 1), min(width, int(cx + radius) + 2)
        y1, y2 = max(0, int(cy - radius) - 1), min(height, int(cy + radius) + 2)
        dx = np.arange(x1, x2, dtype=np.float32)[None, :] - np.float32(cx)
        dy = np.arange(y1, y2, dtype=np.float32)[:, None] - np.float32(cy)
        u = (dx * np.float32(math.cos(angle)) + dy * np.float32(math.sin(angle))) / np.float32(radius)
        v = (dy * np.float32(math.cos(angle)) - dx * np.float32(math.sin(angle))) / np.float32(radius * squeeze)
        d = np.sqrt(u * u + v * v)
        bulge = np.float32(3.0) * (1 + d * d)  # wide-angle, more so at the rim
        seen = cv2.remap(
            soft, (cx - dx * bulge).astype(np.float32), (cy - dy * bulge).astype(np.float32), cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        shade = 1.12 - 0.6 * np.clip(d, 0, 1) ** 5 + 0.25 * np.exp(-((u + 0.35) ** 2 + (v + 0.4) ** 2) * 18)
        alpha = np.clip((1 - d) * np.float32(radius / 2.5), 0, 1)[..., None] * np.float32(0.93)
        patch = out[y1:y2, x1:x2]
        mixed = patch + (np.minimum(seen * shade[..., None], 255) - patch) * alpha
        out[y1:y2, x1:x2] = mixed.astype(np.uint8)
    return out, {"drops": count}


def fog(
    image: UInt8Array, level: int, scene: Rng, frame: Rng, depth: Array | None = None
) -> tuple[UInt8Array, dict[str, Any]]:
    """Koschmieder's law, I = J t + A (1 - t) with t = exp(-beta d); far is up, and the fog has banks.

    With `depth`, (H, W) in metres, beta is per metre: a dark thing at the `visibility` keeps 2 % of its contrast.

    Arguments and result: see `Effect`.
    """
    height, width = image.shape[:2]
    horizon = float(scene.uniform(0.25, 0.45))
    small = (max(2, height // 4), max(2, width // 4))
    banks = np.clip(1 + 0.3 * _smooth_noise(scene, small, 2), 0.4, 1.8)
    if depth is None:
        beta = {1: 0.6, 2: 1.1, 3: 2.0}[level]
        parameters = {"beta": beta, "horizon": horizon}
        row = np.linspace(0, 1, small[0], dtype=np.float32)[:, None]
        # a flat ground seen from above: distance goes with one over the height below the horizon
        ground = np.minimum(1.0, 0.1 / np.maximum(row - np.float32(horizon), 0.01) + 0.05).astype(np.float32)
        distance = cv2.GaussianBlur(np.repeat(ground, small[1], 1), (0, 0), max(1.0, small[0] / 24))
        thickness = cv2.resize((np.float32(beta) * distance * banks).astype(np.float32), (width, height))
    else:
        visibility = {1: 60.0, 2: 30.0, 3: 12.0}[level]
        beta = -math.log(0.02) / visibility
        parameters = {"beta": beta, "visibility": visibility}
        thickness = np.float32(beta) * depth * cv2.resize(banks.astype(np.float32), (width, height))
    t = np.exp(-thickness)[..., None]
    linear = _to_linear(image)
    air = np.array([0.97, 1.0, 1.04], np.float32) * np.float32(_sky(linear))
    linear += (cv2.GaussianBlur(linear, (0, 0), 2.0 * _scale(image)) - linear) * (1 - t)  # light scattered forward
    return _to_srgb(linear * t + air * (1 - t)), parameters


def _check_depth(depth: Any, size: tuple[int, ...]) -> Array:
    """`depth` as float32 metres, infinite where nothing was seen; refuses what is no distance for each pixel."""
    if not isinstance(depth, np.ndarray) or depth.dtype.kind not in "fiu":
        raise TypeError(f"depth: expected a numpy array of metres, got {getattr(depth, 'dtype', type(depth).__name__)}")
    if depth.shape != size:
        raise ValueError(f"depth: expected shape {size} as the image, got {depth.shape}; resize it first")
    metres = depth.astype(np.float32)
    if (metres < 0).any():
        raise ValueError(f"depth: expected metres of at least 0, got {np.nanmin(metres):g}")
    metres[~(metres > 0)] = np.inf
    return metres


def snow(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """Flakes of three distances, near ones large and out of focus, and a pale veil.

    Arguments and result: see `Effect`.
    """
    count, veil = {1: (250, 0.08), 2: (700, 0.18), 3: (1500, 0.3)}[level]
    tilt = float(scene.uniform(-0.8, 0.8))
    height, width = image.shape[:2]
    scale = _scale(image)
    linear = _to_linear(image)
    sky = _sky(linear)
    linear = linear * np.float32(1 - veil) + np.float32(veil * sky)
    flakes = np.zeros((height, width), np.float32)
    for share, radius, sigma, opacity in ((0.75, 0.6, 0.6, 0.9), (0.21, 1.4, 0.9, 0.9), (0.04, 4.5, 2.5, 0.7)):
        layer = np.zeros((height, width), np.uint8)
        n = int(count * share)
        centre = frame.uniform((0, 0), (width, height), (n, 2))
        size = frame.uniform(0.6, 1.4, n) * radius * scale
        fall = np.array([math.sin(tilt), math.cos(tilt)]) * radius * scale * 1.2
        for a, b, r, s in zip(
            (centre * 16).astype(int), ((centre + fall) * 16).astype(int), size, frame.integers(70, 255, n)
        ):
            cv2.line(layer, a.tolist(), b.tolist(), int(s), max(1, round(2 * r)), cv2.LINE_AA, 4)
        flakes = np.maximum(flakes, cv2.GaussianBlur(layer, (0, 0), sigma * scale) * np.float32(opacity / 255.0))
    return _to_srgb(linear + (np.float32(min(1.0, 1.4 * sky)) - linear) * flakes[..., None]), {
        "flakes": count, "veil": veil, "tilt": tilt,
    }


def glare(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """A lamp or the low sun in view: a burnt-out core, a halo, rays, ghosts, and lost contrast everywhere.

    Arguments and result: see `Effect`.
    """
    power = {1: 0.5, 2: 1.3, 3: 3.0}[level]
    height, width = image.shape[:2]
    cx, cy = float(scene.uniform(0.15, 0.85)), float(scene.uniform(0.08, 0.45))
    small = (max(1, height // 4), max(1, width // 4))
    aspect = width / height
    x = (np.linspace(0, 1, small[1], dtype=np.float32)[None, :] - np.float32(cx)) * np.float32(aspect)
    y = np.linspace(0, 1, small[0], dtype=np.float32)[:, None] - np.float32(cy)
    r2 = x * x + y * y
    halo = 0.02 / (r2 + 0.01) + 4.0 * np.exp(-r2 / (0.0035 * (1 + power)))
    angle = np.arctan2(y, x)
    rays = (0.5 + 0.5 * np.cos(6 * angle + np.float32(scene.uniform(0, 6.28)))) ** 24 * 0.05 / (np.sqrt(r2) + 0.06)
    light = (halo + rays)[..., None] * np.array([1.0, 0.93, 0.8], np.float32)
    ghosts = ((0.6, 0.05, (0.2, 0.5, 0.3)), (1.3, 0.09, (0.5, 0.25, 0.35)), (1.7, 0.04, (0.2, 0.3, 0.6)))
    for along, radius, colour in ghosts:
        gx, gy = (0.5 - cx) * along * aspect, (0.5 - cy) * along  # ghosts lie on the line through the centre
        ghost = np.clip((radius - np.hypot(x - gx, y - gy)) / 0.012, 0, 1)
        light += ghost[..., None] * np.array(colour, np.float32) * 0.15
    light = light.astype(np.float32)
    if light.shape[:2] != LONE:  # else it is the same everywhere
        light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
    exposure = 1 / (1 + 0.25 * power)  # the automatic exposure closes down
    out = (_to_linear(image) + light * np.float32(power * 0.6)) * np.float32(exposure)
    return _to_srgb(out), {"power": power, "x": cx * width, "y": cy * height}


def jpeg_blocks(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """A starved video link: JPEG of low quality, its 8x8 blocks in sight.

    Arguments and result: see `Effect`.
    """
    quality = {1: 25, 2: 12, 3: 6}[level]
    return jpeg(np.ascontiguousarray(image[..., ::-1]), quality)[..., ::-1], {"quality": quality}


def h264_blocks(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """A starved video link: H.264 at a high QP, its macroblocks smeared from their neighbours.

    Arguments and result: see `Effect`.
    """
    qp = {1: 40, 2: 45, 3: 50}[level]
    return h264(image, qp), {"qp": qp}


def rolling_shutter(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """Wobble: the camera shakes while the rows are read one after another, and each frame meets the shake elsewhere.

    No pixel moves farther than `shift`, at most 5 pixels at a long side of 640: masks of the still picture nearly hold.

    Arguments and result: see `Effect`.
    """
    shift = {1: 1.5, 2: 3.0, 3: 5.0}[level] * _scale(image)
    direction = float(scene.uniform(-0.4, 0.4))  # mostly sideways, where it shows
    waves = scene.uniform((1.0, 2.5, 5.0), (2.0, 4.0, 8.0))  # in the time that a frame is read
    phases = scene.uniform(0, 1, 3)
    start = float(frame.uniform(0, 20))
    height, width = image.shape[:2]
    time = start + np.arange(height) / height
    path = shift * np.sin(2 * math.pi * (time[:, None] * waves + phases)) @ np.array([0.5, 0.3, 0.2])
    x = np.arange(width)[None, :] + math.cos(direction) * path[:, None]
    y = np.broadcast_to((np.arange(height) + math.sin(direction) * path)[:, None], x.shape)
    out = cv2.remap(
        image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(out, np.uint8), {"shift": shift, "direction": direction, "waves": waves.tolist(), "start": start}


def dead_pixels(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """A worn sensor: dead, hot and stuck photosites, faulty columns, spread by demosaicing; the noise stays small.

    Arguments and result: see `Effect`.
    """
    share, per_width = {1: (0.0005, 2), 2: (0.002, 5), 3: (0.008, 12)}[level]
    height, width = image.shape[:2]
    sites, columns = max(1, round(share * height * width)), max(1, round(per_width * width / 640))
    value, weight = np.zeros((2, height, width), np.float32)
    for x, top, strength in zip(
        scene.integers(0, width, columns), scene.integers(0, height, columns), scene.uniform(0.3, 0.8, columns)
    ):
        column = slice(0 if scene.random() < 0.5 else top, None), x  # a broken line is lost from there on
        value[column], weight[column] = 255.0 * scene.integers(0, 2), strength
    where = scene.integers(0, height, sites), scene.integers(0, width, sites)
    stuck = scene.uniform(0, 255, sites)
    value[where] = np.choose(scene.choice(3, sites, p=(0.4, 0.35, 0.25)), (0.0, 255.0, stuck))
    weight[where] = 1.0
    out = image + _normal(frame, image.shape) * np.float32(1.5)
    for channel, own in enumerate(_bayer(height, width)):
        # bilinear demosaicing: a site tells the pixels around it what lies between it and the next of its colour
        kernel = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]] if channel == 1 else [[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
        faulty = cv2.filter2D(weight * own, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
        seen = cv2.filter2D(weight * own * value, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
        out[..., channel] += seen - faulty * out[..., channel]
    return _to_uint8(out), {"sites": sites, "columns": columns}


def _bayer(height: int, width: int) -> Array:
    """Which photosites see red, green and blue, (3, H, W) bool, in the order RGGB."""
    odd_row, odd_column = (np.arange(n) % 2 == 1 for n in (height, width))
    blue, red = odd_row[:, None] & odd_column, ~odd_row[:, None] & ~odd_column
    return np.stack([red, ~(red | blue), blue])


def gaussian_noise(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """White Gaussian noise, the same in all channels' strength.

    Arguments and result: see `Effect`.
    """
    sigma = {1: 12.0, 2: 25.0, 3: 45.0}[level]
    return _to_uint8(image + _normal(frame, image.shape) * np.float32(sigma)), {"sigma": sigma}


def iso_noise(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """High gain: shot noise that grows with the light, and coarse blotches of colour.

    Arguments and result: see `Effect`.
    """
    electrons, chroma = {1: (350.0, 5.0), 2: (110.0, 9.0), 3: (40.0, 15.0)}[level]
    linear = _to_linear(image)
    noisy = linear + _normal(frame, image.shape) * np.sqrt(linear / np.float32(electrons) + np.float32(1e-5))
    height, width = image.shape[:2]
    small = _normal(frame, (max(2, height // 3), max(2, width // 3), 3))
    small -= small.mean(2, keepdims=True)  # colour without brightness
    blotches = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return _to_uint8(_to_srgb(noisy) + blotches * np.float32(chroma)), {"electrons": electrons, "chroma": chroma}


def lq(image: UInt8Array, level: int, scene: Rng, frame: Rng) -> tuple[UInt8Array, dict[str, Any]]:
    """LQ-1..LQ-3 of LQSeg; through a film the chain stays and the noise changes.

    Arguments and result: see `Effect`.
    """
    degraded = degrade_lqseg(image, level, scene, noise=frame)
    return degraded.image, degraded.parameters


EFFECTS: dict[str, Effect] = {
    "low_light": low_light,
    "motion_blur": motion_blur,
    "defocus": defocus,
    "rain": rain,
    "lens_drops": lens_drops,
    "fog": fog,
    "snow": snow,
    "glare": glare,
    "jpeg": jpeg_blocks,
    "gaussian_noise": gaussian_noise,
    "iso_noise": iso_noise,
    "rolling_shutter": rolling_shutter,
    "dead_pixels": dead_pixels,
    "h264": h264_blocks,
    "lq": lq,
}

_CODES = np.arange(256) / 255.0
_LINEAR = np.where(_CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4).astype(np.float32)
_STEPS = np.linspace(0, 1, 1 << 14)
_SRGB = np.rint(
    255 * np.where(_STEPS <= 0.0031308, 12.92 * _STEPS, 1.055 * _STEPS ** (1 / 2.4) - 0.055)
).astype(np.uint8)


def _to_linear(image: UInt8Array) -> Array:
    return cv2.LUT(image, _LINEAR)


def _to_srgb(linear: Array) -> UInt8Array:
    top = len(_SRGB) - 1
    return _SRGB.take((np.clip(linear, 0, 1) * np.float32(top) + np.float32(0.5)).astype(np.uint16))


def _to_uint8(image: Array) -> UInt8Array:
    return np.asarray(cv2.convertScaleAbs(np.maximum(image, 0)), np.uint8)


def _normal(rng: Rng, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def _scale(image: UInt8Array) -> float:
    """Strengths in pixels are meant for a long side of 640."""
    return max(image.shape[:2]) / 640.0


def _sky(linear: Array) -> float:
    """How bright lit air or water is in this scene: as its brightest part, in linear light."""
    return float(np.clip(np.quantile(linear[::8, ::8].mean(2), 0.95), 0.1, 0.65))


def _smooth_noise(rng: Rng, size: tuple[int, int], cells: int) -> Array:
    """Clouds of about unit deviation: three octaves, from `cells` waves across the picture."""
    out: Array = np.zeros(size, np.float32)
    for octave in range(3):
        n = cells * 2**octave
        out += cv2.resize(_normal(rng, (n, n)), (size[1], size[0]), interpolation=cv2.INTER_CUBIC) * 0.7 ** (octave + 1)
    return out


def _filter_linear(image: UInt8Array, psf: Array) -> UInt8Array:
    linear = _to_linear(image)
    lone = image.shape[:2] == LONE
    return _to_srgb(linear if lone else cv2.filter2D(linear, -1, psf, borderType=cv2.BORDER_REFLECT))
