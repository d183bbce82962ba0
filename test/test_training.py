"""Training: losses by known answers, prompts and crops by property."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")

from glesam_ros.datasets import Photograph  # noqa: E402
from glesam_ros.training import losses, prompts  # noqa: E402
from glesam_ros.training.crops import MIN_AREA, STRIDE, draw_crop, jitter, recoloured  # noqa: E402
from glesam_ros.training.sources import Scenes  # noqa: E402


@pytest.fixture
def scenes() -> Scenes:
    """Bright shapes on dark ground, with their truth."""
    drawn = []
    for k in range(3):
        image, layer = np.full((120, 160, 3), 30, np.uint8), np.zeros((120, 160), np.int16)
        for number, (x, y) in enumerate(((40, 40 + 5 * k), (110, 70)), 1):
            cv2.circle(image, (x, y), 24, (200, 60 * number, 90), -1)
            cv2.circle(layer, (x, y), 24, number, -1)
        drawn.append(Photograph(str(k), image, [layer], False))
    return Scenes(drawn, np.array([1.0, 2.0, 3.0]))


def test_dice_loss_known_answer() -> None:
    logits = torch.tensor([20.0, 20.0, -20.0, -20.0])
    target = torch.tensor([1.0, 0.0, 1.0, 0.0])
    # overlap 1, sizes 2 and 2: Dice = 2 * 1 / 4
    assert float(losses.dice_loss(logits, target, smooth=0)) == pytest.approx(0.5, abs=1e-6)


def test_windowed_loss_known_answer_whatever_the_size_of_the_object() -> None:
    # p = 0.5 everywhere: each pixel costs ln 2, averaged over the window and, half as heavy, over the rest
    for inside in (1, 30):
        target = (torch.arange(100) < inside).float()
        window = (torch.arange(100) < 2 * inside).float()
        dice = 1 - (inside + 1) / (50 + inside + 1)
        loss = float(losses.windowed_loss(torch.zeros(100), target, window))
        assert loss == pytest.approx(dice + 1.5 * math.log(2), rel=1e-5)


def test_in_the_window_a_pixel_too_much_costs_as_much_as_one_too_few() -> None:
    target = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    window = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    logits = torch.where(target > 0, 9.0, -9.0)

    def cross_entropy(wrong: int) -> float:
        faulty = logits.clone()
        faulty[wrong] *= -1
        return float(losses.windowed_loss(faulty, target, window) - losses.dice_loss(faulty, target))

    assert cross_entropy(1) == pytest.approx(cross_entropy(2), rel=1e-5)
    assert cross_entropy(5) == pytest.approx(0.5 * cross_entropy(2), rel=1e-3)


def test_windows_are_boxes_with_half_their_size_around_them() -> None:
    regions = torch.zeros(2, 10, 12)
    regions[0, 4:6, 4:8] = 1
    regions[1, 0, 11] = 1
    expected = torch.zeros(2, 10, 12)
    expected[0, 3:7, 2:10] = 1
    expected[1, 0, 11] = 1
    assert torch.equal(losses.windows(regions), expected)


def test_focal_loss_known_answer() -> None:
    # p = 0.5 everywhere: alpha_t * 0.5^2 * ln 2, with alpha 0.25 inside and 0.75 outside
    target = torch.tensor([1.0, 0, 0, 0])
    expected = (0.25 + 3 * 0.75) / 4 * 0.25 * math.log(2)
    assert float(losses.focal_loss(torch.zeros(4), target)) == pytest.approx(expected, rel=1e-6)
    # as GleSAM released it: 0.25 everywhere
    everywhere = losses.focal_loss(torch.zeros(4), target, balanced=False)
    assert float(everywhere) == pytest.approx(0.25 * 0.25 * math.log(2), rel=1e-6)
    # Lin et al. 2017: p_t = 0.9 costs 100 times less than with cross-entropy (gamma 2)
    logit = torch.tensor([math.log(9.0)])
    sure = losses.focal_loss(logit, torch.ones(1), gamma=2, alpha=0.5)
    assert float(losses.focal_loss(logit, torch.ones(1), gamma=0, alpha=0.5) / sure) == pytest.approx(100, rel=1e-4)


def test_dice_focal_loss_is_their_sum_for_each_mask() -> None:
    logits, target = torch.randn(2, 3, 20), (torch.rand(2, 3, 20) < 0.4).float()
    both = losses.dice_focal_loss(logits, target)
    assert both.shape == (2, 3)
    assert torch.allclose(both, losses.dice_loss(logits, target) + losses.focal_loss(logits, target))


def test_soft_iou_known_answer() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    target = torch.tensor([[1.0, 1.0, 0, 0], [0, 1.0, 1.0, 1.0]])
    assert losses.soft_iou(logits, target).tolist() == [[1.0, 0.25]]


def test_a_logit_of_0_is_outside_and_the_iou_of_nothing_is_0_and_has_no_gradient() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    found = losses.soft_iou(logits, torch.tensor([[0.0, 0, 0], [1, 1, 1]]))
    assert found.tolist() == [[0.0, 0.0]] and not found.requires_grad


def test_prompts_lie_where_their_label_says() -> None:
    region = np.zeros((40, 60), bool)
    region[10:30, 20:50] = True
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(200):
        xy, labels, single = prompts.draw_prompt(region, rng)
        kinds.add(tuple(sorted(labels.tolist())))
        cells = np.floor((xy + 1) / 2 * np.array([60, 40])).astype(int)
        for (x, y), label in zip(cells, labels):
            if label in (0, 1):
                assert region[y, x] == bool(label)
        assert single == (sorted(labels.tolist()) == [-1, -1, -1, 1])
        if 2 in labels:
            assert (xy[0] < xy[1]).all() and np.allclose(xy[2], (xy[0] + xy[1]) / 2, atol=1e-6)
    assert len(kinds) >= 5


def test_shares_of_the_kinds_of_prompts() -> None:
    region, rng = np.zeros((40, 60), bool), np.random.default_rng(0)
    region[10:30, 20:50] = True
    drawn = [tuple(int(label) for label in prompts.draw_prompt(region, rng)[1]) for _ in range(4000)]
    shares = {kind: drawn.count(kind) / 4000 for kind in set(drawn)}
    # of the half with several points, two or three alike, 0.4 have one outside
    assert shares == pytest.approx({
        (2, 3, 4, -1): 0.3, (1, -1, -1, -1): 0.2, (1, 1, -1, -1): 0.15, (1, 1, 1, -1): 0.15, (1, 1, 0, -1): 0.1,
        (1, 1, 1, 0): 0.1,
    }, abs=0.025)


def test_a_region_of_the_whole_crop_has_no_point_outside() -> None:
    rng = np.random.default_rng(0)
    assert all(0 not in prompts.draw_prompt(np.ones((6, 8), bool), rng)[1] for _ in range(100))


def test_boxes_are_those_of_the_region_but_for_a_tenth_of_their_size() -> None:
    region, rng = np.zeros((40, 60), bool), np.random.default_rng(0)
    region[10:20, 12:52] = True
    moved = np.array([prompts.jittered_box(region, rng) for _ in range(2000)]) - [12, 10, 52, 20]
    moved /= [40, 10, 40, 10]
    assert np.abs(moved).max() == pytest.approx(0.1)
    assert np.abs(moved.mean(0)).max() < 0.005 and moved.std(0) == pytest.approx([0.05] * 4, rel=0.1)
    xy, labels = prompts.box_prompt(np.array([15, 10, 45, 40]), (40, 60))
    assert xy.tolist() == [[-0.5, -0.5], [0.5, 1], [0, 0.25]] and labels.tolist() == [2, 3, 4]


def test_grid_cells_count_by_their_centre() -> None:
    region, rng = np.zeros((16, 16), bool), np.random.default_rng(0)
    region[:2] = True  # the upper half of cells
    assert prompts.draw_cells(region, 2, rng).tolist() == [-1, -1]
    region[6, 10] = True
    assert prompts.draw_cells(region, 2, rng).tolist() == [6, 6]


def test_grid_cells_are_inside_and_absent_regions_give_none() -> None:
    region = np.zeros((16, 16), bool)
    region[0:8, 8:16] = True
    assert set(prompts.draw_cells(region, 50, np.random.default_rng(0)).tolist()) == {2, 3, 6, 7}
    assert prompts.draw_cells(np.zeros((16, 16), bool), 3, np.random.default_rng(0)).tolist() == [-1] * 3


@pytest.mark.parametrize(("turn", "stretch"), [(0.0, 1.0), (30.0, 1.5)])
def test_crops_keep_picture_and_regions_together(scenes: Scenes, turn: float, stretch: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        image, regions = draw_crop(scenes.draw, rng, 96, 128, turn=turn, stretch=stretch)
        assert image.shape == (96, 128, 3) and image.dtype == np.uint8
        assert regions.shape[1:] == (24, 32) and (regions.sum((1, 2)) * STRIDE**2 >= MIN_AREA).all()
        small = cv2.resize(image, (32, 24), interpolation=cv2.INTER_AREA)[..., 0]
        eroded = cv2.erode(regions.any(0).astype(np.uint8), np.ones((3, 3))) > 0
        outside = cv2.dilate(regions.any(0).astype(np.uint8), np.ones((3, 3))) == 0
        if eroded.any() and outside.any():
            assert small[eroded].mean() > small[outside].mean() + 60


def test_a_crop_at_scale_1_is_the_photograph_or_its_mirror_image() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), np.uint8)
    cells = rng.integers(1, 3, (16, 24), np.int16)
    photograph = Photograph("x", image, [cells.repeat(4, 0).repeat(4, 1)], False)
    mirrored = []
    for _ in range(100):
        found, regions = draw_crop(lambda _: photograph, rng, 64, 96, (1.0, 1.0), paste=0.0)
        step = 1 if np.array_equal(found, image) else -1
        mirrored.append(step < 0)
        assert np.array_equal(found, image[:, ::step])
        assert np.array_equal(regions, cells[:, ::step] == np.array([1, 2])[:, None, None])
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.15)


def test_regions_of_12_cells_are_the_smallest() -> None:
    layer = np.zeros((64, 64), np.int16)
    layer[4:16, 4:20] = 1  # 3 x 4 cells
    layer[40:44, 8:52] = 2  # 11 cells
    photograph = Photograph("x", np.zeros((64, 64, 3), np.uint8), [layer], False)
    _, regions = draw_crop(lambda _: photograph, np.random.default_rng(0), 64, 64, (1.0, 1.0), paste=0.0)
    assert regions.sum((1, 2)).tolist() == [12]


@pytest.mark.parametrize("detail", [1.0, 2.0])
def test_fine_texture_is_smoothed_before_it_is_made_smaller(detail: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    photograph = Photograph("x", noise, [np.ones((512, 512), np.int16)], False)
    image, _ = draw_crop(
        lambda _: photograph, np.random.default_rng(1), 64, 64, (1.0, 1.0), paste=0.0, detail=detail
    )
    # a Gaussian of sigma s leaves 1 / (2 s sqrt(pi)) of white noise
    expected = noise.std() / (2 * 0.4 * 8 / detail * math.sqrt(math.pi))
    assert image.shape == (64 * detail, 64 * detail, 3) and image.std() == pytest.approx(expected, rel=0.25)


def test_what_a_turned_crop_shows_beyond_the_photograph_is_its_reflection() -> None:
    photograph = Photograph("x", np.full((64, 64, 3), 200, np.uint8), [np.ones((64, 64), np.int16)], False)
    for seed in range(5):
        image, regions = draw_crop(
            lambda _: photograph, np.random.default_rng(seed), 64, 64, (1.0, 1.0), paste=0.0, turn=45.0
        )
        assert (image == 200).all() and regions.all()


def test_a_square_that_fits_exactly_is_drawn_from_pictures_of_any_size() -> None:
    """The largest square at zoom 1: for some sizes rounding makes it larger than the picture."""
    rng = np.random.default_rng(0)
    for side in range(100, 700):
        labels = [np.ones((side, 640), np.int16)]
        photograph = Photograph("x", np.zeros((side, 640, 3), np.uint8), labels, False)
        image, _ = draw_crop(lambda _, p=photograph: p, rng, 64, 64, (1.0, 1.0), paste=0.0)
        assert image.shape == (64, 64, 3)


def test_pictures_without_a_region_that_is_large_enough_end_the_drawing() -> None:
    labels = np.zeros((48, 64), np.int16)
    labels[20:26, 20:26] = 1
    photograph = Photograph("x", np.zeros((48, 64, 3), np.uint8), [labels], False)
    with pytest.raises(ValueError, match=r"at least 192 pixels in crops of 64x48, found 10000 .* crop\.zoom"):
        draw_crop(lambda _: photograph, np.random.default_rng(0), 48, 64, (1.0, 1.0))
    draw_crop(lambda _: photograph, np.random.default_rng(0), 96, 128, (1.0, 2.0))


def test_zoom_is_how_much_of_the_photograph_a_crop_shows(scenes: Scenes) -> None:
    sizes = []
    for zoom in ((1.0, 1.0), (4.0, 4.0)):
        rng = np.random.default_rng(0)
        drawn = [draw_crop(scenes.draw, rng, 96, 128, zoom, paste=0.0)[1] for _ in range(20)]
        sizes.append(np.mean([regions.sum((1, 2)).max() for regions in drawn]))
    # two circles of radius 24 in 160 x 120 fill 9 % each at zoom 1; at 4 the crop is 40 x 30 of those pixels
    assert sizes[0] == pytest.approx(math.pi * 24**2 * 0.8**2 / 16, rel=0.1)
    assert sizes[1] > 2.8 * sizes[0]


def shapes(turn: float, stretch: float) -> np.ndarray:
    """Angle in degrees of a bar through a disc, and width of the disc by its height: (60, 2), a row a crop."""
    disc, bar = np.zeros((2, 160, 160), np.int16)
    cv2.circle(disc, (80, 80), 40, 1, -1)
    bar[78:83, 30:130] = 1
    photograph = Photograph("x", np.zeros((160, 160, 3), np.uint8), [disc, bar], False)
    found, rng = [], np.random.default_rng(3)
    for _ in range(60):
        _, (round_, long) = draw_crop(
            lambda _: photograph, rng, 640, 640, (1.0, 1.0), paste=0.0, stride=2, turn=turn, stretch=stretch
        )
        y, x = np.nonzero(long)
        height, width = (np.ptp(axis) for axis in np.nonzero(round_))
        found.append((np.rad2deg(np.arctan(np.polyfit(x - x.mean(), y - y.mean(), 1)[0])), width / height))
    return np.array(found)


def test_turn_and_stretch_reach_their_range_and_no_further() -> None:
    still = shapes(0.0, 1.0)
    assert np.allclose(still, [0, 1], atol=0.02)
    angles, widths = shapes(20.0, 1.0).T
    assert -21 < angles.min() < -15 and 15 < angles.max() < 21 and np.allclose(widths, 1, atol=0.03)
    angles, widths = shapes(0.0, 1.5).T
    assert 1 / 1.55 < widths.min() < 1 / 1.3 and 1.3 < widths.max() < 1.55 and np.allclose(angles, 0, atol=0.5)


def test_pasted_objects_hide_what_is_behind_them(scenes: Scenes) -> None:
    rng, without = np.random.default_rng(2), np.random.default_rng(2)
    pasted = [len(draw_crop(scenes.draw, rng, 96, 128, (1.0, 1.0), paste=1.0)[1]) for _ in range(20)]
    plain = [len(draw_crop(scenes.draw, without, 96, 128, (1.0, 1.0), paste=0.0)[1]) for _ in range(20)]
    assert max(plain) == 2 and max(pasted) > 2
    for _ in range(20):
        _, regions = draw_crop(scenes.draw, rng, 96, 128, (1.0, 1.0), paste=1.0)
        assert regions.sum(0).max() == 1


def test_paste_is_the_share_of_crops_with_regions_of_another() -> None:
    photograph = Photograph("x", np.zeros((32, 32, 3), np.uint8), [np.ones((32, 32), np.int16)], False)
    drawn = []
    rng = np.random.default_rng(0)
    for _ in range(600):
        draw_crop(lambda _: drawn.append(1) or photograph, rng, 32, 32, paste=0.3)  # type: ignore[func-returns-value]
    assert len(drawn) == pytest.approx(600 * 1.3, rel=0.05)


def test_what_is_pasted_is_neither_tiny_nor_large_and_looks_as_it_did() -> None:
    ground = Photograph("a", np.full((256, 256, 3), 50, np.uint8), [np.ones((256, 256), np.int16)], False)
    layer = np.zeros((256, 256), np.int16)
    layer[:160, :160], layer[168:248, 8:88], layer[200:216, 200:220] = 1, 2, 3  # 39 %, 9.8 % and 0.5 %
    other = Photograph("b", np.full((256, 256, 3), 200, np.uint8), [layer], False)
    for seed in range(6):
        both = iter((ground, other))
        image, (rest, pasted) = draw_crop(
            lambda _, both=both: next(both), np.random.default_rng(seed), 256, 256, (1.0, 1.0), paste=1.0
        )
        assert any(np.array_equal(pasted, (layer[::4, ::4] == 2)[:, ::step]) for step in (1, -1))
        assert np.array_equal(rest, ~pasted)
        row, inside = image[208, :, 0], pasted[52].repeat(4)
        # seen through at the border alone, by two pixels on each side
        assert (row[inside] == 200).sum() == 78 and (row[~inside] == 50).sum() == 256 - 82


def test_one_to_three_objects_are_pasted() -> None:
    ground = Photograph("a", np.zeros((128, 128, 3), np.uint8), [np.ones((128, 128), np.int16)], False)
    quarters = np.zeros((128, 128), np.int16)
    for number, (y, x) in enumerate(((0, 0), (0, 64), (64, 0), (64, 64)), 1):
        quarters[y : y + 48, x : x + 48] = number
    other = Photograph("b", np.zeros((128, 128, 3), np.uint8), [quarters], False)
    rng, counts = np.random.default_rng(0), []
    for _ in range(150):
        both = iter((ground, other))
        _, regions = draw_crop(lambda _, both=both: next(both), rng, 128, 128, (1.0, 1.0), paste=1.0)
        counts.append(len(regions) - 1)
    assert [counts.count(k) / 150 for k in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.12)


def test_other_light_and_another_camera_reach_their_range_and_no_further() -> None:
    grey, rng = np.full((1, 1, 3), 64, np.uint8), np.random.default_rng(0)
    light = np.array([recoloured(grey, rng, 2.0, 1.0)[0, 0] for _ in range(300)])
    assert (light == light[:, :1]).all()
    assert 16 <= light.min() < 18 and 120 < light.max() <= 127  # 64^2 / 255 and (64 * 255)^0.5
    assert np.median(light) == pytest.approx(64, abs=8)
    camera = np.array([recoloured(grey, rng, 1.0, 1.5)[0, 0] for _ in range(300)])
    assert 42 <= camera.min() < 45 and 92 < camera.max() <= 96
    assert np.abs(np.corrcoef(camera.T) - np.eye(3)).max() < 0.25  # each colour by itself
    light = np.array([recoloured(np.full((1, 1, 3), 240, np.uint8), rng, 1.0, 1.5) for _ in range(50)])
    assert light.max() == 255 and light.min() >= 160  # no number beyond white begins again at black


def test_jitter_reaches_its_range_and_no_further() -> None:
    rng = np.random.default_rng(0)
    pair = np.array([[[128] * 3, [198] * 3]], np.uint8)
    middle, bright = np.array([jitter(pair, rng)[0] for _ in range(300)]).astype(float).transpose(1, 0, 2)
    assert (middle == middle[:, :1]).all()  # contrast turns around the middle
    assert 116 <= middle.min() < 118 and 138 < middle.max() <= 140
    gain = (bright - middle) / 70
    mean = gain.mean(1)
    assert 0.85 * 0.95 - 0.02 < gain.min() and gain.max() < 1.15 * 1.05 + 0.02
    assert mean.min() < 0.88 and mean.max() > 1.12
    spread = gain.max(1) / gain.min(1)
    assert 1.04 < spread.max() < 1.05 / 0.95 + 0.03


def test_scenes_are_drawn_by_weight(scenes: Scenes) -> None:
    rng = np.random.default_rng(0)
    drawn = [scenes.draw(rng).name for _ in range(3000)]
    # cumulated 1, 2, 3: each a third
    assert all(drawn.count(name) == pytest.approx(1000, rel=0.1) for name in "012")
    first = Scenes(scenes.photographs, np.array([0.0, 3.0, 4.0]))
    drawn = [first.draw(rng).name for _ in range(1000)]
    assert drawn.count("0") == 0 and drawn.count("1") == pytest.approx(750, rel=0.1)


def test_curves_of_a_run_at_full_size_are_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'glesam_ros[evaluate]'")
    (tmp_path / "restore.csv").write_text("step,seconds,loss\n10,1.0,0.5\n20,2.0,0.4\n")
    (tmp_path / "decode.csv").write_text("step,seconds,loss,prompt,dense,iou\n10,1.0,0.5,0.3,0.1,0.1\n")
    (tmp_path / "level.csv").write_text("")
    script = Path(__file__).parents[1] / "scripts" / "draw_curves.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), str(tmp_path / "out.png")])
    runpy.run_path(str(script), run_name="__main__")
    assert cv2.imread(str(tmp_path / "out.png")) is not None
