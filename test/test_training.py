"""Training: losses by known answers, prompts and crops by property, and the whole recipe in tiny."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; scripts/test.sh installs it")

from glesam_ros.datasets import Photograph, load_bsds, load_coco, region_masks  # noqa: E402
from glesam_ros.models.nano_net import NanoNet  # noqa: E402
from glesam_ros.training import losses, prompts  # noqa: E402
from glesam_ros.training.crops import MIN_CELLS, draw_crop  # noqa: E402
from glesam_ros.training.nano import Recipe, stages  # noqa: E402


@pytest.fixture
def photographs() -> list[Photograph]:
    """Bright shapes on dark ground, with their truth."""
    drawn = []
    for k in range(3):
        image, layer = np.full((120, 160, 3), 30, np.uint8), np.zeros((120, 160), np.int16)
        for number, (x, y) in enumerate(((40, 40 + 5 * k), (110, 70)), 1):
            cv2.circle(image, (x, y), 24, (200, 60 * number, 90), -1)
            cv2.circle(layer, (x, y), 24, number, -1)
        drawn.append(Photograph(str(k), image, [layer], False))
    return drawn


def test_dice_loss_known_answer() -> None:
    logits = torch.tensor([20.0, 20.0, -20.0, -20.0])
    target = torch.tensor([1.0, 0.0, 1.0, 0.0])
    # overlap 1, sizes 2 and 2: Dice = 2 * 1 / 4
    assert float(losses.dice_loss(logits, target, smooth=0)) == pytest.approx(0.5, abs=1e-6)


def test_mask_loss_known_answer_whatever_the_size_of_the_object() -> None:
    # p = 0.5 everywhere: each pixel costs ln 2, and inside and outside are averaged apart
    for inside in (1, 30):
        target = (torch.arange(100) < inside).float()
        dice = 1 - (inside + 1) / (50 + inside + 1)
        assert float(losses.mask_loss(torch.zeros(100), target)) == pytest.approx(dice + math.log(2), rel=1e-5)


def test_soft_iou_known_answer() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    target = torch.tensor([[1.0, 1.0, 0, 0], [0, 1.0, 1.0, 1.0]])
    assert losses.soft_iou(logits, target).tolist() == [[1.0, 0.25]]


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


def test_grid_cells_are_inside_and_absent_regions_give_none() -> None:
    region = np.zeros((16, 16), bool)
    region[0:8, 8:16] = True
    assert set(prompts.draw_cells(region, 50, np.random.default_rng(0)).tolist()) == {2, 3, 6, 7}
    assert prompts.draw_cells(np.zeros((16, 16), bool), 3, np.random.default_rng(0)).tolist() == [-1] * 3


def test_crops_keep_picture_and_regions_together(photographs: list[Photograph]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        image, regions = draw_crop(photographs, rng, 96, 128)
        assert image.shape == (96, 128, 3) and image.dtype == np.uint8
        assert regions.shape[1:] == (24, 32) and (regions.sum((1, 2)) >= MIN_CELLS).all()
        small = cv2.resize(image, (32, 24), interpolation=cv2.INTER_AREA)[..., 0]
        eroded = cv2.erode(regions.any(0).astype(np.uint8), np.ones((3, 3))) > 0
        outside = cv2.dilate(regions.any(0).astype(np.uint8), np.ones((3, 3))) == 0
        if eroded.any() and outside.any():
            assert small[eroded].mean() > small[outside].mean() + 60


def test_readers_agree_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "regions").mkdir()
    image = np.zeros((20, 30, 3), np.uint8)
    image[..., 2] = 200  # red in OpenCV's order
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), image)
    square = {"image_id": 1, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]], "iscrowd": 0}
    overlapping = {"image_id": 1, "segmentation": [[10, 10, 20, 10, 20, 18, 10, 18]], "iscrowd": 0}
    crowd = {**square, "iscrowd": 1}
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [square, overlapping, crowd]}
    (tmp_path / "train.json").write_text(json.dumps(document))
    (photograph,) = load_coco(tmp_path, "train")
    assert photograph.image[0, 0].tolist() == [200, 0, 0]
    assert sorted(region_masks(photograph).sum((1, 2)).tolist()) == [80, 100]
    layer = np.zeros((20, 30), np.uint8)
    layer[:, :10], layer[:, 10:] = 1, 2
    cv2.imwrite(str(tmp_path / "regions" / "a_0.png"), layer)
    (tmp_path / "test.txt").write_text("a\n")
    (photograph,) = load_bsds(tmp_path, "test")
    assert region_masks(photograph, 0).sum((1, 2)).tolist() == [200, 400]
    with pytest.raises(FileNotFoundError):
        load_coco(tmp_path, "nowhere")


def test_the_recipe_lowers_its_losses_and_freezes_what_it_says(photographs: list[Photograph], tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = Recipe(
        height=64, width=96, batch=2, objects=2, base_steps=3, pairs=4, level_steps=20, enhance_steps=40,
        decoder_steps=3, seed=1, log_every=10,
    )
    net = NanoNet()
    states = []
    for name, run in stages(net, photographs, recipe, tmp_path):
        run()
        states.append((name, {k: v.clone() for k, v in net.state_dict().items()}))
    base, enhanced, decoded = (state for _, state in states)
    assert [name for name, _ in states] == ["base", "enhancer", "decoder"]

    def changed(before: dict, after: dict) -> set[str]:
        return {".".join(k.split(".")[:2]) for k in before if not torch.equal(before[k], after[k])}

    assert changed(base, enhanced) and all(
        part.startswith(("enhancer.", "encoder.level")) for part in changed(base, enhanced)
    )
    assert changed(enhanced, decoded) and all(
        part.startswith(("decoder.", "enhancer.")) for part in changed(enhanced, decoded)
    )
    rows = list(csv.DictReader((tmp_path / "enhancer.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
