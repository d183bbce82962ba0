"""The degradation level of nano: statistics and loss by known answers, frames by property."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")

from glesam_ros.datasets import Photograph  # noqa: E402
from glesam_ros.models.nano_net import (  # noqa: E402
    LAGS,
    LEVELS,
    POOLED,
    STATISTICS,
    LevelHead,
    pooled_statistics,
    repetition,
)
from glesam_ros.training import batches, level  # noqa: E402
from glesam_ros.training.config import make_config  # noqa: E402
from glesam_ros.training.sources import Scenes  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_precision", "one_thread")
CHANNELS = (16, 24, 40)


def ramps(height: int, width: int) -> Scenes:
    """One photograph: red tells the column, green the row, both in 0..255 over the long side."""
    step = 255 / (max(height, width) - 1)
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * step, y * step, np.full((height, width), 90)], -1).round().astype(np.uint8)
    return Scenes([Photograph("ramps", image, [np.zeros((height, width), np.int16)], False)], np.array([1.0]))


def features(height: int, width: int, seed: int = 0) -> list[Any]:
    """Random features of stride 2, 4 and 8 of a picture of so many pixels."""
    torch.manual_seed(seed)
    return [torch.randn(1, c, height // s, width // s) for c, s in zip(CHANNELS, (2, 4, 8), strict=True)]


@pytest.mark.parametrize("size", [(300, 400), (450, 400), (300, 900)])
def test_clear_frames_are_the_photograph_not_stretched(size: tuple[int, int]) -> None:
    config = make_config({"crop": {"gamma": 1, "colour": 1}})
    clear = level.draw_frames(ramps(*size), np.random.default_rng(0), config, 6)["clear"].numpy().astype(float)
    assert clear.shape == (6, *level.INSIDE, 3)
    part = min(size[0] / level.INSIDE[0], size[1] / level.INSIDE[1]) * 255 / (max(size) - 1)
    across, down = np.diff(clear[:, 100, :, 0]), np.diff(clear[:, :, 100, 1])
    assert np.abs(across.mean(1)) == pytest.approx(part, rel=0.03) and down.mean(1) == pytest.approx(part, rel=0.03)
    assert {True, False} == set(across.mean(1) > 0)  # mirrored, or not


def test_frames_are_degraded_as_the_camera_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, tuple[int, ...]]] = []

    class Result:
        def __init__(self, image: Any) -> None:
            self.image = 255 - image

    def lqseg(image: Any, number: int, rng: np.random.Generator) -> Result:
        seen.append(("lq", number, image.shape))
        return Result(image)

    def other(image: Any, kind: str, number: int, seed: int) -> Result:
        seen.append((kind, number, image.shape))
        return Result(image)

    monkeypatch.setattr(batches, "degrade_lqseg", lqseg)
    monkeypatch.setattr(batches, "degrade", other)
    config = make_config({"degradation": {"lq": 0.6, "kinds": ["fog", "rain"], "levels": [1, 0, 0]}})
    batch = level.draw_frames(ramps(300, 400), np.random.default_rng(0), config, 120)
    kinds, levels, shapes = zip(*seen, strict=True)
    assert set(kinds) == {"lq", "fog", "rain"} and kinds.count("lq") / 120 == pytest.approx(0.6, abs=0.12)
    assert batch["levels"].tolist() == list(levels)
    assert all(levels.count(k) / 120 == pytest.approx(1 / 3, abs=0.12) for k in (1, 2, 3))
    sides = np.array([width for _, width, _ in shapes])
    assert all(abs(height - 0.75 * width) <= 0.9 for height, width, _ in shapes)
    # half of them are as large as the photograph
    assert (sides == 400).mean() == pytest.approx(level.AS_TAKEN, abs=0.12)
    sides = sides[sides != 400]
    assert sides.min() < 520 and sides.max() > 900
    assert level.SIDES[0] <= sides.min() and sides.max() <= level.SIDES[1]
    # what became of the frame at camera size is made smaller with it, the clear frame on the same way without it
    assert (batch["degraded"].int() - (255 - batch["clear"].int())).abs().max() <= 1


def test_sides_of_cameras_are_even_on_a_logarithmic_scale_and_frames_lie_anywhere() -> None:
    (photograph,) = ramps(300, 900).photographs
    rng = np.random.default_rng(0)
    frames = [level._frame(photograph.image, rng) for _ in range(1000)]
    sides = np.array([frame.shape[1] for frame in frames if frame.shape[1] != 400])
    assert (sides < math.sqrt(480 * 960)).mean() == pytest.approx(0.5, abs=0.04)
    # 400 columns of 900, from any place of 0 to 500
    first = np.array([float(frame[..., 0].min()) * 899 / 255 for frame in frames])
    assert first.min() < 10 and first.max() > 490 and first.mean() == pytest.approx(250, abs=20)


def test_half_of_the_frames_are_in_another_light() -> None:
    photograph = Photograph("grey", np.full((30, 40, 3), 90, np.uint8), [np.zeros((30, 40), np.int16)], False)
    config = make_config({"degradation": {"lq": 0, "kinds": ["fog"]}})
    batch = level.draw_frames(Scenes([photograph], np.array([1.0])), np.random.default_rng(1), config, 40)
    changed = (batch["clear"] != 90).flatten(1).any(1)
    assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.2)


def test_frames_depend_on_their_seed_alone() -> None:
    first, again, other = (
        level.draw_frames(ramps(300, 400), np.random.default_rng(seed), make_config({}), 2) for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["degraded"], other["degraded"])
    assert not torch.equal(first["degraded"], first["clear"]) and first["degraded"].dtype == torch.uint8


def by_statistic(values: Any) -> list[Any]:
    """(1, POOLED) -> mean, log variance, logs of across, down, flattest, liveliest: each of all channels."""
    scales = [s.unflatten(0, (6, -1)) for s in values[0].split([6 * c for c in CHANNELS])]
    return [torch.cat([scale[k] for scale in scales]) for k in range(6)]


def test_statistics_known_answers() -> None:
    # 32 x 64 pixels, the least height; columns rise by 0.5
    sizes = [(c, 32 // s, 64 // s) for c, s in zip(CHANNELS, (2, 4, 8), strict=True)]
    ramp = [(0.5 * torch.arange(w).float()).expand(1, c, h, w) for c, h, w in sizes]
    found = pooled_statistics(ramp)
    assert found.shape == (1, POOLED)
    mean, spread, across, down, flattest, liveliest = by_statistic(found)
    half, least = torch.tensor(math.log(0.5)), torch.tensor(math.log(1e-4))
    for k, (_, _, w) in enumerate(sizes):
        assert torch.allclose(mean.split(CHANNELS)[k], torch.tensor(0.25 * (w - 1)))
        assert torch.allclose(spread.split(CHANNELS)[k], torch.tensor(math.log(0.25 * (w * w - 1) / 12)), atol=1e-4)
    assert all(torch.allclose(part, half) for part in (across, flattest, liveliest))
    assert torch.allclose(down, least)
    # turned, it is the rows that differ
    turned = [(0.5 * torch.arange(h).float())[:, None].expand(1, c, h, w) for c, h, w in sizes]
    _, _, across, down, flattest, liveliest = by_statistic(pooled_statistics(turned))
    assert torch.allclose(down, half)
    assert all(torch.allclose(part, least) for part in (across, flattest, liveliest))


def test_a_noisy_corner_is_the_liveliest_block_and_leaves_the_flattest() -> None:
    noisy = features(192, 256)
    for f in noisy:
        f[..., f.shape[2] // 4 :, :] = 0
        f[..., f.shape[3] // 4 :] = 0
    _, _, across, _, flattest, liveliest = by_statistic(pooled_statistics(noisy))
    # the mean difference of two standard normal numbers is 2 / sqrt(pi); a sixteenth is noise
    assert torch.allclose(across.exp(), torch.tensor(2 / math.sqrt(math.pi) / 16), rtol=0.6)
    assert torch.allclose(flattest.exp(), torch.tensor(1e-4)) and (liveliest.exp() > 0.5).all()


def test_statistics_tell_blur_from_low_contrast() -> None:
    sharp = features(192, 256)
    pale = by_statistic(pooled_statistics([0.5 * f for f in sharp]))
    blurred = by_statistic(pooled_statistics([torch.nn.functional.avg_pool2d(f, 3, 1, 1) for f in sharp]))
    own = by_statistic(pooled_statistics(sharp))
    for k in (2, 3, 4, 5):
        # half the contrast halves difference and deviation alike; blur takes more from the difference
        assert torch.allclose(pale[k] - 0.5 * pale[1], own[k] - 0.5 * own[1], atol=1e-3)
        assert (blurred[k] - 0.5 * blurred[1] - own[k] + 0.5 * own[1]).mean() < -0.2


def test_statistics_hardly_depend_on_the_size_of_the_picture() -> None:
    once = features(192, 256)
    often = [f.repeat(1, 1, 2, 3) for f in once]
    pairs = zip(by_statistic(pooled_statistics(once))[:4], by_statistic(pooled_statistics(often))[:4], strict=True)
    assert all(torch.allclose(a, b, atol=0.05) for a, b in pairs)


def as_rgb(green: np.ndarray[Any, Any]) -> Any:
    """(H, W) -> (1, 3, H, W) with other numbers in red and blue."""
    return torch.from_numpy(np.stack([255 - green, green, 0.3 * green])[None].astype(np.float32))


def test_repetition_known_answer() -> None:
    green = np.random.default_rng(0).integers(0, 256, (50, 90)).astype(np.float64)
    expected = []
    for rows in (green[::2], green[:, ::2].T):
        profile = np.minimum(np.abs(np.diff(rows, 2, axis=1)), 3).mean(0)
        near = [profile[max(0, k - 15) : k + 16].mean() for k in range(len(profile))]
        rest = profile - near
        lagged = [float((rest[k:] * rest[: len(rest) - k]).sum() / len(rest)) for k in range(LAGS + 1)]
        expected += [value / lagged[0] for value in lagged[1:]] + [math.log(lagged[0])]
    found = repetition(as_rgb(green))
    assert found.shape == (1, 2 * (LAGS + 1)) and POOLED + 2 * (LAGS + 1) == STATISTICS
    assert found[0].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("smaller", [1, 2, 4])
def test_blocks_of_jpeg_are_seen_at_the_size_that_was_coded(smaller: int) -> None:
    rng = np.random.default_rng(1)
    noise = cv2.GaussianBlur(rng.normal(size=(384 // smaller, 512 // smaller, 3)), (0, 0), 3)
    scene = np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)
    _, coded = cv2.imencode(".jpg", scene, [cv2.IMWRITE_JPEG_QUALITY, 30])
    frame = cv2.resize(cv2.imdecode(coded, cv2.IMREAD_COLOR), (512, 384), interpolation=cv2.INTER_LINEAR)
    both = repetition(as_rgb(frame[..., 1]))[0].split(LAGS + 1)
    for numbers in both:
        # neighbours are alike in any picture
        far = numbers[5:LAGS]
        assert 6 + int(far.argmax()) in range(8 * smaller, LAGS + 1, 8 * smaller)
    # and the other way round where the picture lies on its side
    turned = repetition(as_rgb(frame[..., 1].T))[0].split(LAGS + 1)
    assert torch.allclose(torch.stack(turned[::-1]), torch.stack(both), atol=1e-4)


def test_repetition_of_little_pictures_and_of_flat_ones_is_finite() -> None:
    grey = repetition(torch.full((2, 3, 32, 256), 100.0))
    assert grey.shape == (2, 2 * (LAGS + 1)) and bool(grey.isfinite().all())
    assert not grey[:, :LAGS].any()


def test_level_loss_known_answer() -> None:
    # level 1 of 3: "worse than 0" is true, "worse than 1" and "worse than 2" are not
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    expected = (math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.exp(-1))) / 3
    assert float(level.level_loss(logits, torch.tensor([1]))) == pytest.approx(expected, abs=1e-6)
    sure = 30 * (2.0 * (torch.tensor([[0], [1], [2], [3]]) > torch.arange(LEVELS)) - 1)
    assert float(level.level_loss(sure, torch.arange(4))) == pytest.approx(0, abs=1e-6)


def test_a_frame_that_is_most_likely_clear_reads_0() -> None:
    head = LevelHead().eval()
    sure, less = (torch.logit(torch.tensor([p, p, p])) for p in (0.049, 0.051))
    for bias, expected in ((sure, 0.0), (less, 0.051)):
        with torch.no_grad():
            head.mlp[3].weight.zero_()
            head.mlp[3].bias.copy_(bias)
            assert float(head(torch.zeros(1, STATISTICS))) == pytest.approx(expected, abs=1e-6)


def test_a_head_learns_an_order() -> None:
    torch.manual_seed(0)
    levels = torch.arange(4).repeat(32)
    statistics = torch.randn(128, STATISTICS)
    statistics[:, :100] += 3 * levels[:, None]
    head = LevelHead()
    optimiser = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(100):
        optimiser.zero_grad()
        level.level_loss(head.logits(statistics), levels).backward()
        optimiser.step()
    fresh = torch.randn(40, STATISTICS)
    fresh[:, :100] += 3 * torch.arange(4).repeat(10)[:, None]
    found = head.eval()(fresh).detach()
    assert found.shape == (40,) and found.min() >= 0 and found.max() <= 1
    means = found.reshape(10, 4).mean(0)
    assert (means.diff() > 0.03).all() and means[0] < 0.1 and means[3] > 0.9
