"""LQSeg, robot weather, H.264: known answers, published ranges, reproducibility, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

from glesam_ros.degradation import (
    HELD_OUT_KINDS,
    TRAINING_KINDS,
    degrade,
    degrade_lqseg,
    degrade_lqseg_mixed,
    h264,
    lqseg,
    names,
    robot,
)
from glesam_ros.degradation.lqseg import FIRST_OFFLINE


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


@pytest.mark.parametrize("size", [(97, 130), (40, 9), (1, 40), (40, 1), (2, 3)])
@pytest.mark.parametrize("taps", [13, 21])
def test_large_kernels_filter_as_opencv_does(size: tuple[int, int], taps: int) -> None:
    rng = np.random.default_rng(taps)
    image = rng.uniform(0, 255, (*size, 3)).astype(np.float32)
    kernel = rng.uniform(-1, 1, (taps, taps)).astype(np.float32)  # not symmetric: which way round it lies counts
    kernel /= np.abs(kernel).sum()
    before = image.copy()
    filtered = lqseg._filter(image, kernel)
    assert filtered.shape == image.shape and np.array_equal(image, before)
    np.testing.assert_allclose(filtered, cv2.filter2D(image, -1, kernel), atol=2e-3)


def test_poisson_counts_follow_the_grey_values_in_the_picture() -> None:
    image = np.full((300, 300, 3), 128, np.uint8)
    image[:10] = 0  # two values: two counts at white
    noise = lqseg.poisson_noise(image, False, np.random.default_rng(0))[10:]
    drawn = (noise + 128) * 2 / 255
    np.testing.assert_allclose(drawn, np.rint(drawn), atol=1e-4)
    assert drawn.var() == pytest.approx(128 * 2 / 255, rel=0.03)


@pytest.mark.parametrize("counts", [1, 2, 16, 256])
def test_poisson_table_holds_the_exact_law(counts: int) -> None:
    table = lqseg._poisson_table(counts).reshape(256, 512)
    for value in (0, 1, 77, 255):
        kept = (table[value] >> 9) / 2**23
        law = np.bincount(table[value] & 511, 1 - kept, 512) + kept
        mean = value * counts / 255
        expected = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if mean else k == 0 for k in range(512)]
        np.testing.assert_allclose(law / 512, expected, atol=1e-8)


@pytest.mark.parametrize("counts", [2, 16, 256])
def test_poisson_table_is_the_same_where_denormal_numbers_are_flushed(counts: int) -> None:
    torch = pytest.importorskip("torch", reason="the switch is torch's")
    table = lqseg._poisson_table.__wrapped__
    try:
        torch.set_flush_denormal(False)
        kept = table(counts)
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush them")
        flushed = table(counts)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(kept, flushed)


def test_poisson_noise_is_drawn_by_the_law_of_each_value() -> None:
    image = np.full((700, 1000, 3), 6, np.uint8)
    image[0, :256, 0] = np.arange(256)  # 256 counts at white, so a value of 6 has the mean 6 * 256 / 255
    noise = lqseg.poisson_noise(image, False, np.random.default_rng(5))[1:]
    drawn = np.rint((noise + 6) * 256 / 255).astype(int).reshape(-1)
    np.testing.assert_allclose(drawn * 255 / 256 - 6, noise.reshape(-1), atol=1e-4)
    mean, counts = 6 * 256 / 255, np.bincount(drawn, minlength=30)
    law = np.array([math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(counts.size)])
    deviation = np.sqrt(law * (1 - law) * drawn.size)
    assert (np.abs(counts - law * drawn.size) < 5 * deviation + 1).all()


@pytest.mark.parametrize("gaussian", [0.0, 1.0], ids=["poisson", "gaussian"])
@pytest.mark.parametrize("gray", [0.0, 1.0], ids=["colour", "gray"])
def test_noise_is_as_strong_as_was_drawn(gaussian: float, gray: float) -> None:
    image = np.full((40, 50, 3), 128, np.float32)
    deviations = []
    for strength in (0.5, 1.0):
        order = replace(
            lqseg.FIRST, gaussian_probability=gaussian, gaussian_sigma=(strength, strength),
            poisson_scale=(strength / 8, strength / 8), gray_probability=gray,
        )
        sampled: dict[str, float] = {}
        noise = np.random.default_rng(1)
        deviations.append(lqseg._noise(image, order, np.random.default_rng(0), noise, sampled) - image)
    np.testing.assert_allclose(deviations[1], 2 * deviations[0], atol=1e-3)
    assert deviations[1].std() > 0.5 and (np.ptp(deviations[1], 2).max() < 1e-3) == bool(gray)


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


@pytest.mark.parametrize("size", [(192, 256), (37, 53), (1, 1), (5, 3), (512, 16)])
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
    turned = [q["rotation"] for q in (*first, *blurred) if q["kernel"].endswith("aniso")]
    assert min(turned) >= -math.pi and max(turned) <= math.pi and len(turned) > 200
    assert np.mean(turned) == pytest.approx(0, abs=0.5) and np.std(turned) == pytest.approx(math.pi / 3**0.5, rel=0.15)
    assert {q["rotation"] for q in first if q["kernel"].endswith("_iso") or q["kernel"] == "iso"} == {0.0}
    shapes = {
        family: [q["beta"] for q in (*first, *blurred) if q["kernel"].startswith(family)]
        for family in ("generalized", "plateau")
    }
    # half of them below 1, where that is allowed, and half above
    assert np.mean(np.array(shapes["generalized"]) < 1) == pytest.approx(0.5, abs=0.15)
    assert np.mean(np.array(shapes["plateau"]) == 1) == pytest.approx(0.5, abs=0.15)
    assert any(a["kernel_size"] != b["kernel_size"] for a, b in zip(first, second) if b["blur"])  # kernel of its own


def test_the_first_round_of_the_published_test_sets_shrinks_more() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    drawn = [degrade_lqseg(image, 1, seed, first=FIRST_OFFLINE).parameters["first"] for seed in range(600)]
    shares = [np.mean([q["resize"] == name for q in drawn]) for name in ("up", "down", "keep")]
    assert shares == pytest.approx([0.2, 0.7, 0.1], abs=0.06)
    factors = [q["factor"] for q in drawn]
    assert 0.15 <= min(factors) < 0.2 and 1.4 < max(factors) <= 1.5


def test_the_final_filter_is_the_sinc_that_was_drawn() -> None:
    image = scene(0, 40, 60).astype(np.float32)
    seen = set()
    for seed in range(12):
        sampled: dict[str, float] = {}
        found = lqseg._resize_back(image, (40, 60), np.random.default_rng(seed), sampled)
        expected = image
        if sampled["final_sinc"]:
            kernel = lqseg.sinc_kernel(sampled["final_kernel_size"], sampled["final_cutoff"])
            expected = cv2.filter2D(image, -1, kernel)
        np.testing.assert_allclose(found, expected, atol=0.1)
        seen.add(sampled["final_sinc"])
    assert seen == {True, False}


def test_frames_of_a_film_differ_in_their_noise_alone() -> None:
    first, again, other = (degrade_lqseg(scene(0), 2, 5, noise=np.random.default_rng(k)) for k in (1, 1, 2))
    assert first.parameters == other.parameters
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_mixed_rates_have_the_published_shares() -> None:
    image = scene(0, 16, 16)
    drawn = [degrade_lqseg_mixed(image, seed) for seed in range(400)]
    rates = np.bincount([d.parameters["rate"] for d in drawn], minlength=6)
    for rate, share in enumerate((0, 1 / 8, 1 / 8, 2 / 8, 4 / 8, 0)):
        assert rates[rate] / 400 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 400))
    assert {(d.parameters["rate"], d.level) for d in drawn} == {(1, 1), (2, 2), (3, 3), (4, 3)}
    assert len({d.parameters["second"]["factor"] for d in drawn}) > 200  # the rest of the chain is drawn, too


def test_mixed_is_the_chain_at_the_drawn_rate() -> None:
    image = scene(0)
    for seed in range(12):
        mixed = degrade_lqseg_mixed(image, seed)
        np.testing.assert_array_equal(mixed.image, degrade_lqseg_mixed(image, np.random.default_rng(seed)).image)
        if mixed.parameters["rate"] == 3:
            continue
        rng = np.random.default_rng(seed)
        rng.integers(8)  # the rate
        same = degrade_lqseg(image, mixed.level, rng)
        np.testing.assert_array_equal(mixed.image, same.image)
        assert mixed.parameters == same.parameters


# robot weather


def test_training_and_held_out_kinds_split_the_names() -> None:
    assert sorted((*TRAINING_KINDS, *HELD_OUT_KINDS)) == sorted(names())  # also: none is in both
    assert TRAINING_KINDS == ("lq", "low_light", "motion_blur", "defocus", "rain", "fog")


@pytest.mark.parametrize("name", names())
def test_effect_keeps_size_type_and_input_and_repeats_bit_by_bit(name: str) -> None:
    for size in ((192, 256), (61, 47), (5, 3), (1, 1)):
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


STRENGTHS = {
    "low_light": ((12.8, -52.3), (10.2, -71.0), (8.7, -84.6)),
    "motion_blur": ((27.6, 0.9), (24.7, 1.6), (22.3, 2.7)),
    "defocus": ((30.6, 0.5), (27.7, 0.9), (25.4, 1.5)),
    "rain": ((24.2, 7.3), (19.2, 13.5), (16.1, 20.1)),
    "lens_drops": ((25.6, -0.4), (22.0, 0.4), (18.6, 0.3)),
    "fog": ((14.3, 33.6), (12.0, 45.4), (10.3, 56.8)),
    "snow": ((21.8, 13.5), (16.9, 25.5), (13.9, 37.3)),
    "glare": ((19.4, 8.2), (15.7, 12.4), (12.9, 15.4)),
    "jpeg": ((27.1, 0.0), (25.6, -0.1), (23.6, 0.2)),
    "gaussian_noise": ((26.7, 0.0), (20.5, 0.0), (15.8, -0.1)),
    "iso_noise": ((29.8, -0.4), (24.9, -1.1), (20.6, -2.5)),
    "rolling_shutter": ((35.4, 0.0), (29.5, -0.1), (26.4, -0.1)),
    "dead_pixels": ((35.2, 0.0), (32.3, 0.0), (26.2, -0.1)),
    "h264": ((27.8, -0.1), (26.3, 0.0), (24.9, -0.8)),
    "lq": ((24.1, -0.3), (23.4, -0.2), (22.0, -0.2)),
}
"""By kind, for each level: mean PSNR in dB and how much brighter the mean is, of four scenes."""


@pytest.mark.parametrize("name", names())
def test_each_level_is_as_strong_as_when_the_figures_of_the_docs_were_measured(name: str) -> None:
    for level, (decibels, brighter) in zip(robot.LEVELS, STRENGTHS[name]):
        scenes = [scene(seed, 240, 320) for seed in range(4)]
        pairs = [(image, degrade(image, name, level, seed).image) for seed, image in enumerate(scenes)]
        assert np.mean([psnr(worse, image) for image, worse in pairs]) == pytest.approx(decibels, abs=0.4)
        assert np.mean([worse.mean() - image.mean() for image, worse in pairs]) == pytest.approx(brighter, abs=1.0)


@pytest.mark.parametrize("name", names())
def test_weather_of_a_film_is_stable(name: str) -> None:
    image = scene(1)
    first, second = (degrade(image, name, 2, 3, frame=f) for f in (0, 1))
    moving = {"motion_blur": {"angle", "bend"}, "rolling_shutter": {"start"}}.get(name, set())
    assert {k: v for k, v in first.parameters.items() if k not in moving} == {
        k: v for k, v in second.parameters.items() if k not in moving
    }
    assert abs(psnr(first.image, image) - psnr(second.image, image)) < 1.5
    still = name in ("defocus", "lens_drops", "fog", "glare", "jpeg", "h264")
    assert np.array_equal(first.image, second.image) == still


def test_point_spread_functions_sum_to_one() -> None:
    for psf in (robot.disc_psf(3.3), robot.trajectory_psf(21.0, 0.7, 0.2), robot.trajectory_psf(3.0, 2.0, -0.3)):
        assert psf.sum() == pytest.approx(1, abs=1e-5)
        assert psf.min() >= 0 and psf.shape[0] == psf.shape[1] and psf.shape[0] % 2 == 1
    line = robot.trajectory_psf(21.0, 0.0, 0.0)
    assert line.sum(1).argmax() == line.shape[0] // 2
    assert np.count_nonzero(line.sum(0) > 1e-6) == pytest.approx(22, abs=2)


@pytest.mark.parametrize(
    ("name", "key"), [("motion_blur", "length"), ("defocus", "radius"), ("rolling_shutter", "shift")]
)
def test_strengths_in_pixels_grow_with_the_long_side(name: str, key: str) -> None:
    wide, tall, large = (
        degrade(scene(0, *size), name, 3, 1).parameters[key] for size in ((90, 640), (640, 320), (180, 1280))
    )
    assert tall == pytest.approx(wide) and large == pytest.approx(2 * wide)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("name", ["rain", "snow"])
def test_rain_and_snow_veil_what_is_between_their_drops(name: str, level: int) -> None:
    image = np.full((240, 320, 3), 60, np.uint8)
    image[:, 160:] = 150
    degraded = degrade(image, name, level, 3)
    veil = degraded.parameters["veil"]
    kept = (1 - veil) * (1 - 0.4 * veil if name == "rain" else 1)
    dark, bright = (np.median(robot._to_linear(degraded.image)[:, part]) for part in np.s_[:160, 160:])
    full = robot._to_linear(image)[0, 200, 0] - robot._to_linear(image)[0, 0, 0]
    assert bright - dark == pytest.approx(kept * full, rel=0.06)
    if name == "snow":  # the veil is as bright as the brightest of the scene, which stays
        assert bright == pytest.approx(robot._to_linear(image)[0, 200, 0], rel=0.06)


@pytest.mark.parametrize("name", ["gaussian_noise", "dead_pixels"])
def test_black_stays_black_where_noise_would_make_it_darker(name: str) -> None:
    out = degrade(np.zeros((200, 200, 3), np.uint8), name, 1, 0).image
    assert 0.5 < (out == 0).mean() < 0.7


@pytest.mark.parametrize("radius", [2.0, 4.0, 7.0])
def test_a_point_out_of_focus_is_a_disc_of_the_radius(radius: float) -> None:
    psf = robot.disc_psf(radius)
    assert psf.max() == pytest.approx(1 / (math.pi * radius**2), rel=0.05)
    assert np.count_nonzero(psf) == pytest.approx(math.pi * (radius + 0.5) ** 2, rel=0.1)


@pytest.mark.parametrize(("length", "angle", "bend"), [(21.0, 0.7, 0.2), (36.0, 2.0, -0.3), (10.0, 0.0, 0.15)])
def test_blur_by_motion_leaves_the_picture_where_it_is(length: float, angle: float, bend: float) -> None:
    psf = robot.trajectory_psf(length, angle, bend)
    place = np.arange(len(psf)) - len(psf) // 2
    assert (psf.sum(0) @ place, psf.sum(1) @ place) == pytest.approx((0, 0), abs=0.15)


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


@pytest.mark.parametrize("level", robot.LEVELS)
@pytest.mark.parametrize(("name", "is_warm"), [("low_light", True), ("glare", True), ("fog", False)])
def test_lamps_are_warm_and_fog_is_cold(name: str, is_warm: bool, level: int) -> None:
    red, green, blue = degrade(np.full((120, 160, 3), 128, np.uint8), name, level, 0).image.mean((0, 1))
    assert red > green > blue if is_warm else red < green < blue


def test_even_black_has_the_read_noise_of_the_sensor() -> None:
    for level in robot.LEVELS:
        out = degrade(np.zeros((200, 200, 3), np.uint8), "low_light", level, 0).image.astype(float)
        assert (out - out.mean(1, keepdims=True)).std() > 2 > out.mean(1).std()  # of pixels more than of rows


def test_coarse_noise_of_high_gain_is_of_colour_and_not_of_brightness() -> None:
    for level in robot.LEVELS:
        out = degrade(np.full((240, 320, 3), 128, np.uint8), "iso_noise", level, 0).image.astype(np.float32)
        coarse = cv2.GaussianBlur(out, (0, 0), 4)
        brightness = coarse.mean(2, keepdims=True)
        assert (coarse - brightness).std() > 2.5 * brightness.std()


def test_fog_goes_to_the_air_light_and_hides_the_far_more() -> None:
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 220
    out = degrade(stripes, "fog", 3, 1).image[..., 1].astype(float)
    assert out[:40].std(1).mean() < 0.5 * out[-40:].std(1).mean()


@pytest.mark.parametrize("level", robot.LEVELS)
def test_fog_by_depth_is_koschmieders_law(level: int) -> None:
    # grey stripes in two colours; contrast in linear light falls by exp(-beta d), 2 % is left at the visibility
    visibility = degrade(scene(0), "fog", level, 1, depth=np.ones((192, 256))).parameters["visibility"]
    image = np.full((160, 160, 3), 60, np.uint8)
    image[:, 80:] = 200
    contrast = []
    for distance in (0.1, 0.2 * visibility, np.inf):
        out = robot._to_linear(degrade(image, "fog", level, 1, depth=np.full((160, 160), distance)).image)
        contrast.append(float(out[:, 150].mean() - out[:, 10].mean()))
    clear = robot._to_linear(image)
    full = float(clear[0, 150].mean() - clear[0, 10].mean())
    assert contrast[0] == pytest.approx(full, rel=0.05)
    assert full * 0.02**0.3 < contrast[1] < full * 0.02**0.1  # 0.02 ** 0.2, in banks of fog
    assert contrast[2] == pytest.approx(0, abs=0.004)


def test_fog_takes_what_the_depth_sensor_missed_as_infinitely_far() -> None:
    depth = np.full((192, 256), 3.0)
    far = depth.copy()
    far[:50] = np.inf
    for nothing in (0.0, np.nan):
        holes = depth.copy()
        holes[:50] = nothing
        np.testing.assert_array_equal(
            degrade(scene(1), "fog", 2, 0, depth=holes).image, degrade(scene(1), "fog", 2, 0, depth=far).image
        )
    assert not np.array_equal(
        degrade(scene(1), "fog", 2, 0, depth=depth).image, degrade(scene(1), "fog", 2, 0, depth=far).image
    )


def _edges(seed: int, level: int, frame: int = 0) -> np.ndarray:
    """Column of an upright edge at 320 in each row, to a part of a pixel, after the rolling shutter."""
    image = np.zeros((480, 640, 3), np.uint8)
    image[:, 320:] = 255
    return 640 - degrade(image, "rolling_shutter", level, seed, frame).image[..., 0].sum(1) / 255.0


@pytest.mark.parametrize(("level", "largest"), [(1, 1.5), (2, 3.0), (3, 5.0)])
def test_rolling_shutter_shifts_rows_smoothly_and_by_the_documented_pixels(level: int, largest: float) -> None:
    moved = np.array([_edges(seed, level) - 320 for seed in range(6)])
    assert np.abs(moved).max() <= largest + 0.3  # the rounding of cubic interpolation
    assert np.abs(moved).max() > 0.6 * largest
    assert np.abs(np.diff(moved)).max() < 0.5
    assert all(np.count_nonzero(np.diff(np.sign(row))) >= 2 for row in moved)  # wobble, not a slant


def test_rolling_shutter_of_a_film_is_one_shake_met_at_other_times() -> None:
    first, second = _edges(3, 3, 0) - 320, _edges(3, 3, 1) - 320
    assert np.abs(first - second).max() > 1
    assert 0.5 < first.std() / second.std() < 2


def test_defects_of_a_sensor_stay_and_keep_their_colours() -> None:
    grey = np.full((240, 320, 3), 100, np.uint8)
    frames = np.stack([degrade(grey, "dead_pixels", 2, 4, frame=f).image for f in range(12)]).astype(float)
    defect = np.abs(frames.mean(0) - 100) > 20
    assert 0.001 < defect.any(-1).mean() < 0.1
    assert frames.std(0)[~defect].mean() == pytest.approx(math.sqrt(1.5**2 + 1 / 12), rel=0.1)  # small, and rounded
    assert np.abs(frames - frames.mean(0))[:, defect].max() < 12  # what is bright stays bright
    other = np.abs(degrade(grey, "dead_pixels", 2, 5).image.astype(float) - 100) > 20
    assert (defect & other).sum() < 0.3 * defect.sum()  # another sensor


def test_a_hot_site_is_seen_through_its_colour_filter_and_spread_by_demosaicing() -> None:
    np.testing.assert_array_equal(robot._bayer(2, 2).argmax(0), [[0, 1], [1, 2]])  # RGGB
    assert (robot._bayer(5, 4).sum(0) == 1).all()
    grey = np.full((320, 320, 3), 100, np.uint8)
    out = degrade(grey, "dead_pixels", 1, 2).image.astype(float)
    own = robot._bayer(320, 320)
    seen = set()
    for y, x, channel in np.argwhere(out == 255):
        assert own[channel, y, x]
        if 0 < y < 319 and 0 < x < 319:
            share = {0: 0.5, 1: 0.25, 2: 0.5}[int(channel)]
            assert out[y, x - 1, channel] == pytest.approx(100 + 155 * share, abs=8)
            assert out[y - 1, x - 1, channel] == pytest.approx(100 if channel == 1 else 100 + 155 / 4, abs=8)
            assert np.abs(np.delete(out[y, x], channel) - 100).max() < 8  # the other colours come from sound sites
            seen.add(int(channel))
    assert seen == {0, 1, 2}


# H.264


def test_quantisation_steps_are_those_of_the_standard() -> None:
    for qp, step in ((0, 0.625), (4, 1.0), (5, 1.125), (24, 10.0), (36, 40.0), (51, 224.0)):
        # the table is scaled by 16 where both indices are even
        assert h264.quantisation_steps(qp)[0, 0] / 16 == step
    np.testing.assert_array_equal(h264.quantisation_steps(17) * 2, h264.quantisation_steps(23))
    assert [h264.chroma_qp(qp) for qp in (0, 29, 30, 39, 51)] == [0, 29, 29, 35, 39]


def _coefficients(block: np.ndarray) -> np.ndarray:
    forward = np.array([[1, 1, 1, 1], [2, 1, -1, -2], [1, -1, -1, 1], [1, -2, 2, -1]])
    return forward @ block.astype(int) @ forward.T


def test_residual_follows_the_integer_arithmetic_of_the_standard() -> None:
    """The multipliers and shifts of the reference encoder and of the standard's decoder, one macroblock of luma."""
    factors = ((13107, 5243, 8066), (11916, 4660, 7490), (10082, 4194, 6554), (9362, 3647, 5825), (8192, 3355, 5243),
               (7282, 2893, 4559))
    scales = ((10, 16, 13), (11, 18, 14), (13, 20, 16), (14, 23, 18), (16, 25, 20), (18, 29, 23))
    kinds = np.array([[0, 2, 0, 2], [2, 1, 2, 1]] * 2)
    inverse = np.array([[1, 1, 1, 0.5], [1, 0.5, -1, -1], [1, -0.5, -1, 1], [1, -1, 1, -0.5]])
    hadamard = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]])
    for qp in range(30, 36):
        residual = np.random.default_rng(qp).integers(-255, 256, (16, 16))
        shift = 15 + qp // 6
        multiplier = np.array(factors[qp % 6])[kinds]
        scale = np.array(scales[qp % 6])[kinds] << (qp // 6)
        cells = [(4 * i, 4 * j) for i in range(4) for j in range(4)]
        blocks = {(y, x): _coefficients(residual[y : y + 4, x : x + 4]) for y, x in cells}
        means = hadamard @ np.array([blocks[cell][0, 0] for cell in cells]).reshape(4, 4) @ hadamard / 2
        levels = np.sign(means) * np.floor((np.abs(means) * multiplier[0, 0] + 2 * 2**shift / 3) / 2 ** (shift + 1))
        means = hadamard @ levels @ hadamard * scale[0, 0] / 4
        expected = np.zeros((16, 16))
        for n, (y, x) in enumerate(cells):
            w = blocks[y, x]
            kept = np.sign(w) * np.floor((np.abs(w) * multiplier + 2**shift / 3) / 2**shift) * scale
            kept[0, 0] = means[n // 4, n % 4]
            expected[y : y + 4, x : x + 4] = np.floor((inverse @ kept @ inverse.T + 32) / 64)
        coded = h264.code_residual(residual[None].astype(np.float32), qp)[0]
        assert (coded != expected).mean() < 0.1  # the reference rounds its multipliers, so a level may fall apart
        assert psnr(coded, expected) > 40


def test_codec_at_the_finest_step_is_nearly_lossless_and_gets_worse_by_qp() -> None:
    grey = np.repeat(scene(2)[..., :1], 3, 2)  # without colours, which 4:2:0 halves
    quality = [psnr(h264.h264(grey, qp), grey) for qp in (0, 12, 24, 36, 48)]
    assert quality[0] > 48
    # the step grows 4-fold each time: 12 dB where every coefficient is coded, less where they are lost altogether
    assert all(6 < a - b < 14 for a, b in zip(quality[1:], quality[2:]))


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (8, 100), (1, 1)])
def test_codec_keeps_size_and_flat_colours(size: tuple[int, int]) -> None:
    flat = np.full((*size, 3), (200, 60, 30), np.uint8)
    coded = h264.h264(flat, 36)
    assert coded.shape == flat.shape and coded.dtype == np.uint8
    assert np.abs(coded.astype(int) - flat).max() < 12
    assert np.ptp(coded, axis=(0, 1)).max() <= 4


def test_prediction_takes_the_closest_mode() -> None:
    above, left = np.arange(16.0) * 8, np.arange(16.0) * 5 + 100
    for wanted, name in (
        (np.tile(above, (16, 1)) + 3, "vertical"), (np.tile(left, (16, 1)).T - 3, "horizontal"),
        (np.full((16, 16), 99.0), "mean"),
    ):
        got = h264._predict(*(a[None, None].astype(np.float32) for a in (wanted, above, left)))[0, 0]
        mean = math.floor((above.sum() + left.sum() + 16) / 32)
        expected = {"vertical": above[None, :], "horizontal": left[:, None], "mean": np.array([[mean]])}[name]
        np.testing.assert_array_equal(got, np.broadcast_to(expected, (16, 16)), err_msg=name)


def test_neighbours_are_the_decoded_edges_or_the_mean_of_what_there_is() -> None:
    decoded = np.random.default_rng(0).integers(0, 256, (2, 2, 1, 16, 16)).astype(np.float32)
    above, left = h264._neighbours(decoded, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert above.shape == left.shape == (4, 1, 16)
    assert (above[0] == 128).all() and (left[0] == 128).all()
    np.testing.assert_array_equal(left[1], decoded[0, 0, :, :, 15])
    np.testing.assert_array_equal(above[1], np.full((1, 16), math.floor(left[1].mean() + 0.5)))
    np.testing.assert_array_equal(above[2], decoded[0, 0, :, 15, :])
    np.testing.assert_array_equal(left[2], np.full((1, 16), math.floor(above[2].mean() + 0.5)))
    np.testing.assert_array_equal(above[3], decoded[0, 1, :, 15, :])
    np.testing.assert_array_equal(left[3], decoded[1, 0, :, :, 15])


def test_blocks_without_a_residual_repeat_the_edge_of_their_neighbour() -> None:
    plane = np.full((1, 16, 64), 60, np.uint8)
    plane[0, 8:] = 180
    texture = np.random.default_rng(0).integers(-6, 7, (16, 48))  # below the step
    plane[0, :, 16:] = plane[0, :, 16:] + texture
    coded = h264.code_planes(plane, 16, 46)[0].astype(int)
    np.testing.assert_array_equal(coded[:, 16:], np.repeat(coded[:, 15:16], 48, 1))
    assert coded[12, 40] - coded[4, 40] > 90


def test_colours_are_coded_with_their_own_qp() -> None:
    # stripes of equal luma whose coefficient, 8 * 16, is above the step of QP 39 (56) and lost at 51 (224)
    colour = np.full((64, 64, 3), 128, np.uint8)
    colour[..., 1] = np.where(np.arange(64) // 8 % 2, 112, 144)
    stripes = cv2.cvtColor(colour, cv2.COLOR_YCrCb2RGB)
    coded = h264.h264(stripes, 51).astype(int)
    assert np.ptp(coded[32, 8:56, 0]) > 20


def test_edges_are_filtered_in_both_directions() -> None:
    ramp = np.repeat(np.tile(np.linspace(60, 120, 160).astype(np.uint8), (160, 1))[..., None], 3, 2)
    across = h264.h264(ramp, 45)[80, :, 1].astype(int)
    down = h264.h264(np.ascontiguousarray(ramp.transpose(1, 0, 2)), 45)[:, 80, 1].astype(int)
    for line in (across, down):
        assert np.ptp(line) > 40 and np.abs(np.diff(line)).max() <= 4  # unfiltered, the steps at the edges are larger
    unfiltered = h264.code_planes(ramp[None, ..., 0], 16, 45)[0, 80].astype(int)
    assert np.abs(np.diff(unfiltered)).max() > 5


def test_edge_filter_mends_the_steps_of_coding_and_leaves_real_edges() -> None:
    plane = np.zeros((1, 4, 48), np.uint8)
    plane[..., :16], plane[..., 16:32], plane[..., 32:] = 100, 106, 220
    h264.smooth_edges(plane, 16, 36)
    # the strong filter of the standard by hand: p2..p0 and q0..q2 across a step of 6
    assert plane[0, 0, 12:20].tolist() == [100, 101, 102, 102, 104, 105, 105, 106]
    assert plane[0, 0, 28:36].tolist() == [106] * 4 + [220] * 4
    unfiltered = plane.copy()
    h264.smooth_edges(plane, 16, 10)  # so fine a step makes none
    np.testing.assert_array_equal(plane, unfiltered)


@pytest.mark.parametrize(("step", "changed"), [
    (13, [102, 103, 105, 108, 110, 111]),  # strong: three pixels of each side
    (14, [100, 100, 104, 111, 114, 114]),  # no longer small: one pixel of each side
    (49, [100, 100, 112, 137, 149, 149]),
    (50, [100, 100, 100, 150, 150, 150]),  # an edge of the picture
])
def test_thresholds_of_the_edge_filter_are_those_of_the_qp(step: int, changed: list[int]) -> None:
    plane = np.full((1, 2, 32), 100, np.uint8)
    plane[..., 16:] += step
    h264.smooth_edges(plane, 16, 36)  # alpha 50, beta 11
    assert plane[0, 1, 13:19].tolist() == changed
    for slope, filtered in ((10, True), (11, False)):  # beta: beside a slope, a step belongs to the picture
        plane = np.full((1, 2, 32), 100, np.uint8)
        plane[..., 15:] += slope
        plane[..., 16:] += 2
        before = plane.copy()
        h264.smooth_edges(plane, 16, 36)
        assert np.array_equal(plane, before) != filtered


def test_edges_of_colours_are_filtered_too() -> None:
    colour = np.full((64, 64, 3), 128, np.uint8)
    colour[..., 1] = np.linspace(110, 146, 64).astype(np.uint8)
    decoded = cv2.cvtColor(h264.h264(cv2.cvtColor(colour, cv2.COLOR_YCrCb2RGB), 45), cv2.COLOR_RGB2YCrCb)
    line = decoded[32, :, 1].astype(int)
    assert np.ptp(line) > 20 and np.abs(np.diff(line)).max() <= 3


def test_qp_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="qp: expected 0 to 51, got 52"):
        h264.h264(scene(0), 52)


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
        (lambda: degrade(scene(0), "rain", 1, 0, depth=np.ones((192, 256))), ValueError, "only fog depends on it"),
        (lambda: degrade(scene(0), "fog", 1, 0, depth=np.ones((2, 3))), ValueError, r"\(192, 256\).*got \(2, 3\)"),
        (lambda: degrade(scene(0), "fog", 1, 0, depth=3.0), TypeError, "expected a numpy array of metres, got float"),
        (lambda: degrade(scene(0), "fog", 1, 0, depth=-np.ones((192, 256))), ValueError, "at least 0, got -1"),
        (lambda: degrade_lqseg_mixed(scene(0)[..., 0], 0), ValueError, r"expected shape \(H, W, 3\)"),
        (lambda: degrade(scene(0, 1, 32767), "lens_drops", 1, 0), ValueError, "by 'lens_drops', got 32767x1 pixels"),
        (lambda: degrade(scene(0, 65501, 1), "jpeg", 1, 0), ValueError, "by 'jpeg', got 1x65501 pixels.*scale it down"),
    ],
    ids=["level", "bool", "grey", "dtype", "name", "severity", "seed", "frame",
         "depth of rain", "depth size", "depth type", "depth sign", "mixed", "long", "long jpeg"],
)
def test_refusals(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
