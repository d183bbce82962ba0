"""LQSeg and robot weather: known answers, published ranges, reproducibility, refusals."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest

from glesam_ros.degradation import degrade, degrade_lqseg, lqseg, names, robot


def scene(seed: int, height: int = 192, width: int = 256) -> np.ndarray:
    """A picture with edges, texture and all brightnesses."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = np.linspace(30, 220, width)[None, :, None]
    for _ in range(25):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.circle(image, centre, int(rng.integers(5, 40)), rng.integers(0, 256, 3).tolist(), -1)
    return image


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(np.mean((a.astype(float) - b) ** 2))))


# kernels


@pytest.mark.parametrize("family", lqseg.FAMILIES)
@pytest.mark.parametrize("size", lqseg.KERNEL_SIZES)
def test_blur_kernels_sum_to_one_and_are_symmetric(family: str, size: int) -> None:
    kernel = lqseg.gaussian_kernel(size, (2.1, 0.9), 0.6, family, 1.4)
    assert kernel.shape == (size, size) and kernel.dtype == np.float32
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
    assert kernel.argmax() == size * size // 2


def test_isotropic_kernel_is_opencvs_gaussian() -> None:
    one_dimension = cv2.getGaussianKernel(13, 1.7)
    np.testing.assert_allclose(
        lqseg.gaussian_kernel(13, (1.7, 1.7), 0.0), one_dimension @ one_dimension.T, atol=1e-7
    )


def test_kernel_families_by_hand() -> None:
    # one pixel along the first axis is m = 1 / 4, two are m = 1
    for family, at_one_quarter, at_one in (
        ("aniso", math.exp(-1 / 8), math.exp(-1 / 2)),
        ("generalized_aniso", math.exp(-0.5 * 0.25**3), math.exp(-0.5)),
        ("plateau_aniso", 1 / (1 + 0.25**3), 1 / 2),
    ):
        kernel = lqseg.gaussian_kernel(7, (2.0, 0.5), 0.0, family, 3.0)
        assert kernel[3, 4] / kernel[3, 3] == pytest.approx(at_one_quarter, rel=1e-5)
        assert kernel[3, 5] / kernel[3, 3] == pytest.approx(at_one, rel=1e-5)


def test_rotation_turns_the_long_axis() -> None:
    lying = lqseg.gaussian_kernel(11, (3.0, 0.7), 0.0, "aniso")
    standing = lqseg.gaussian_kernel(11, (3.0, 0.7), math.pi / 2, "aniso")
    np.testing.assert_allclose(standing, lying.T, atol=1e-7)
    assert lying[5, 8] > 10 * lying[8, 5]


@pytest.mark.parametrize(
    ("x", "j1"),
    [(0.0, 0.0), (1.0, 0.4400505857449335), (5.0, -0.3275791375914652), (3.8317059702075123, 0.0),
     (44.0, -0.08280335937602906), (60.0, 0.046598383758166224)],
)
def test_bessel_known_values(x: float, j1: float) -> None:
    assert float(lqseg.bessel_j1(x)) == pytest.approx(j1, abs=1e-12)


def test_sinc_kernel_follows_the_formula() -> None:
    cutoff, size = 1.3, 9
    kernel = lqseg.sinc_kernel(size, cutoff)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    # ratios are free of the normalisation: J1(w r) / (w r) against its limit of 1/2 at the centre
    for dy, dx, j1 in ((0, 1, 0.5220232474146604), (0, 2, 0.4708182665175787), (3, 0, -0.027244039620779877)):
        r = math.hypot(dy, dx)
        expected = 2 * j1 / (cutoff * r)
        assert kernel[4 + dy, 4 + dx] / kernel[4, 4] == pytest.approx(expected, abs=1e-6)


def test_filter_shortcuts_agree_with_the_plain_filter() -> None:
    image = scene(1).astype(np.float32)
    for kernel in (
        lqseg.gaussian_kernel(21, (1.0, 1.0), 0.0),  # separable, most of it margin
        lqseg.gaussian_kernel(21, (0.8, 2.5), 0.5, "aniso"),
        lqseg.gaussian_kernel(15, (3.0, 3.0), 0.0, "plateau_iso", 1.5),
        lqseg.sinc_kernel(17, 1.0),
    ):
        assert np.abs(lqseg._filter(image, kernel) - cv2.filter2D(image, -1, kernel)).max() < 0.1


# noise and compression


@pytest.mark.parametrize("value", [3, 40, 200])
def test_poisson_noise_has_the_mean_and_variance_of_the_law(value: int) -> None:
    image = np.full((400, 256, 3), value, np.uint8)
    image[0, :, :] = np.arange(256)[:, None]  # all 256 grey values, so 256 counts at white
    noise = lqseg.poisson_noise(image, False, np.random.default_rng(2))[1:]
    rate = value * 256 / 255
    assert noise.mean() == pytest.approx(0, abs=5 * math.sqrt(rate / noise.size))
    assert noise.var() == pytest.approx(rate * (255 / 256) ** 2, rel=0.02)
    third = ((noise - noise.mean()) ** 3).mean() / noise.std() ** 3
    assert third == pytest.approx(1 / math.sqrt(rate), abs=0.03)  # skew: a normal law would have none


def test_poisson_counts_follow_the_grey_values_in_the_picture() -> None:
    image = np.full((300, 300, 3), 128, np.uint8)
    image[:10] = 0  # two values: two counts at white
    noise = lqseg.poisson_noise(image, False, np.random.default_rng(0))[10:]
    drawn = (noise + 128) * 2 / 255
    np.testing.assert_allclose(drawn, np.rint(drawn), atol=1e-4)
    assert drawn.var() == pytest.approx(128 * 2 / 255, rel=0.03)


@pytest.mark.parametrize("counts", [1, 2, 16, 256])
def test_poisson_tables_hold_the_exact_law(counts: int) -> None:
    accept, alias = (table.reshape(256, 512) for table in lqseg._poisson_tables(counts))
    for value in (0, 1, 77, 255):
        kept = accept[value] / 2**23
        law = np.bincount(alias[value], 1 - kept, 512) + kept
        mean = value * counts / 255
        expected = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if mean else k == 0 for k in range(512)]
        np.testing.assert_allclose(law / 512, expected, atol=1e-8)


def test_gray_noise_is_the_same_in_all_channels() -> None:
    image = np.full((64, 64, 3), 120, np.uint8)
    assert lqseg.poisson_noise(image, True, np.random.default_rng(0)).shape == (64, 64)
    assert lqseg.poisson_noise(image, False, np.random.default_rng(0)).shape == (64, 64, 3)


def test_jpeg_settles() -> None:
    once = lqseg.jpeg(scene(3), 40)
    twice = lqseg.jpeg(once, 40)
    assert psnr(once, twice) > 38 > psnr(scene(3), once)  # the second pass finds little left to quantise


# the chain


@pytest.mark.parametrize("level", [1, 2, 3])
def test_chain_is_reproducible_bit_by_bit(level: int) -> None:
    image = scene(0)
    first, second = degrade_lqseg(image, level, 11), degrade_lqseg(image, level, np.random.default_rng(11))
    np.testing.assert_array_equal(first.image, second.image)
    assert first.parameters == second.parameters
    assert not np.array_equal(first.image, degrade_lqseg(image, level, 12).image)
    np.testing.assert_array_equal(image, scene(0))  # the input is left alone


@pytest.mark.parametrize("size", [(192, 256), (37, 53), (1, 1), (512, 16)])
def test_chain_keeps_size_and_type(size: tuple[int, int]) -> None:
    for seed in range(6):
        degraded = degrade_lqseg(scene(0, *size), 3, seed)
        assert degraded.image.shape == (*size, 3) and degraded.image.dtype == np.uint8 and degraded.level == 3


def test_levels_get_worse() -> None:
    images = [scene(s) for s in range(4)]
    means = [
        np.mean([psnr(degrade_lqseg(i, level, seed).image, i) for i in images for seed in range(15)])
        for level in (1, 2, 3)
    ]
    assert means[0] > means[1] > means[2]


def test_colours_keep_their_channels() -> None:
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    for seed in range(5):
        mean = degrade_lqseg(red, 1, seed).image.mean((0, 1))
        assert mean[0] > 2 * max(mean[1], mean[2])


def _inside(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def test_sampled_parameters_are_in_the_published_ranges_and_shares() -> None:
    image = scene(0, 16, 16)
    drawn = [degrade_lqseg(image, 2, seed).parameters for seed in range(600)]
    for p in drawn:
        assert p["rate"] == 2
        for name, sigma, resize, gaussian, poisson in (
            ("first", (0.2, 3), (0.5, 1.5), (1, 30), (0.05, 3)),
            ("second", (0.2, 1.5), (0.3, 1.2), (1, 25), (0.05, 2.5)),
        ):
            q = p[name]
            assert _inside(q["jpeg_quality"], (30, 95)) and _inside(q["factor"], resize)
            assert q["resize"] == ("up" if q["factor"] > 1 else "down" if q["factor"] < 1 else "keep")
            assert _inside(q["noise_strength"], gaussian if q["noise"] == "gaussian" else poisson)
            if q["blur"]:
                assert q["kernel_size"] in range(7, 22, 2)
                if q["kernel"] == "sinc":
                    assert _inside(q["cutoff"], (math.pi / (3 if q["kernel_size"] < 13 else 5), math.pi))
                else:
                    assert all(_inside(s, sigma) for s in q["sigma"])
                    assert _inside(q["beta"], (1, 2) if q["kernel"].startswith("plateau") else (0.5, 4))
    first, second = [p["first"] for p in drawn], [p["second"] for p in drawn]
    blurred = [q for q in second if q["blur"]]
    for share, published in (
        (np.mean([q["blur"] for q in second]), 0.8),
        (np.mean([q["kernel"] == "sinc" for q in first]), 0.1),
        (np.mean([q["kernel"] == "iso" for q in first]), 0.9 * 0.45),
        (np.mean([q["kernel"] == "aniso" for q in blurred]), 0.9 * 0.25),
        (np.mean([q["kernel"].startswith("plateau") for q in first]), 0.9 * 0.15),
        (np.mean([q["resize"] == "keep" for q in first]), 0.7),
        (np.mean([q["resize"] == "down" for q in second]), 0.4),
        (np.mean([q["noise"] == "gaussian" for q in first]), 0.5),
        (np.mean([q["gray_noise"] for q in second]), 0.4),
        (np.mean([q["jpeg_last"] for q in second]), 0.5),
        (np.mean([q["final_sinc"] for q in second]), 0.8),
    ):
        assert share == pytest.approx(published, abs=4 * math.sqrt(published * (1 - published) / 450))
    assert any(a["kernel_size"] != b["kernel_size"] for a, b in zip(first, second) if b["blur"])  # kernel of its own


# robot weather


@pytest.mark.parametrize("name", names())
def test_effect_keeps_size_type_and_input_and_repeats_bit_by_bit(name: str) -> None:
    for size in ((192, 256), (61, 47), (1, 1)):
        image = scene(5, *size)
        for level in robot.LEVELS:
            degraded = degrade(image, name, level, 7, frame=2)
            assert degraded.image.shape == image.shape and degraded.image.dtype == np.uint8
            np.testing.assert_array_equal(degraded.image, degrade(image, name, level, 7, frame=2).image)
            json.dumps(degraded.parameters)  # plain numbers and strings
            assert degraded.parameters["name"] == name and degraded.level == level
        np.testing.assert_array_equal(image, scene(5, *size))


@pytest.mark.parametrize("name", names())
def test_effect_gets_worse_with_the_level(name: str) -> None:
    pairs = [(scene(s), s) for s in range(8)]
    means = [np.mean([psnr(degrade(i, name, level, s).image, i) for i, s in pairs]) for level in robot.LEVELS]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("name", names())
def test_weather_of_a_film_is_stable(name: str) -> None:
    image = scene(1)
    first, second = (degrade(image, name, 2, 3, frame=f) for f in (0, 1))
    moving = {"motion_blur": {"angle", "bend"}}.get(name, set())
    assert {k: v for k, v in first.parameters.items() if k not in moving} == {
        k: v for k, v in second.parameters.items() if k not in moving
    }
    assert abs(psnr(first.image, image) - psnr(second.image, image)) < 1.5
    still = name in ("defocus", "lens_drops", "fog", "glare", "jpeg")
    assert np.array_equal(first.image, second.image) == still


def test_point_spread_functions_sum_to_one() -> None:
    for psf in (robot.disc_psf(3.3), robot.trajectory_psf(21.0, 0.7, 0.2), robot.trajectory_psf(3.0, 2.0, -0.3)):
        assert psf.sum() == pytest.approx(1, abs=1e-5)
        assert psf.min() >= 0 and psf.shape[0] == psf.shape[1] and psf.shape[0] % 2 == 1
    line = robot.trajectory_psf(21.0, 0.0, 0.0)
    assert line.sum(1).argmax() == line.shape[0] // 2
    assert np.count_nonzero(line.sum(0) > 1e-6) == pytest.approx(22, abs=2)


def test_gaussian_noise_has_its_sigma() -> None:
    grey = np.full((300, 300, 3), 128, np.uint8)
    degraded = degrade(grey, "gaussian_noise", 2, 0)
    difference = degraded.image.astype(float) - 128
    assert difference.std() == pytest.approx(degraded.parameters["sigma"], rel=0.02)


def test_low_light_darkens_and_its_noise_grows_relative_to_the_signal() -> None:
    grey = np.full((300, 300, 3), 180, np.uint8)
    means, ratios = [], []
    for level in robot.LEVELS:
        out = robot._to_linear(degrade(grey, "low_light", level, 0).image)[..., 1]
        means.append(out.mean())
        ratios.append(out.mean() / out.std())
    assert means[0] > means[1] > means[2] and ratios[0] > ratios[1] > ratios[2]
    assert means[0] < 0.5 * robot._to_linear(grey).mean()


def test_fog_goes_to_the_air_light_and_hides_the_far_more() -> None:
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 220
    out = degrade(stripes, "fog", 3, 1).image[..., 1].astype(float)
    assert out[:40].std(1).mean() < 0.5 * out[-40:].std(1).mean()


def test_linear_light_and_back_is_the_identity() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, -1)
    np.testing.assert_array_equal(robot._to_srgb(robot._to_linear(codes)), codes)


# refusals


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: degrade_lqseg(scene(0), 4, 0), ValueError, "expected 1, 2 or 3, got 4"),
        (lambda: degrade_lqseg(scene(0), True, 0), ValueError, "got True"),
        (lambda: degrade_lqseg(scene(0)[..., 0], 1, 0), ValueError, r"expected shape \(H, W, 3\), got \(192, 256\)"),
        (lambda: degrade_lqseg(scene(0).astype(float), 1, 0), TypeError, "expected dtype uint8"),
        (lambda: degrade(scene(0), "hail", 1, 0), ValueError, "expected one of low_light.*got 'hail'"),
        (lambda: degrade(scene(0), "rain", 0, 0), ValueError, "expected 1, 2 or 3, got 0"),
        (lambda: degrade(scene(0), "rain", 1, -1), ValueError, "seed: expected an integer of at least 0, got -1"),
        (lambda: degrade(scene(0), "rain", 1, 0, frame=1.5), ValueError, "frame: expected an integer"),
    ],
    ids=["level", "bool", "grey", "dtype", "name", "severity", "seed", "frame"],
)
def test_refusals(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
