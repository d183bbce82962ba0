"""The shipped model: what it promises on a picture that anyone can check by eye."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from glesam_ros import load_pipeline
from glesam_ros.cli.machine import load_frame
from glesam_ros.cli.main import main
from glesam_ros.degradation import degrade
from glesam_ros.models import onnx_session, shapes
from glesam_ros.models.base import Budget, Candidates, OutOfMemory
from glesam_ros.models.nano import IN_8_BITS, PARTS, WEIGHTS, Nano, model_size
from glesam_ros.models.onnx_session import DeviceUnusable, choose_device, engine_cache
from glesam_ros.models.rass_nano import RassNano
from glesam_ros.models.second_look import UNCLEAR, Window, around, long_side, share, whole


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """A rendered picture of two discs and a bar on a soft ground, with their masks."""
    rng = np.random.default_rng(5)
    ground = cv2.resize(rng.integers(90, 130, (6, 8, 3)).astype(np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
    masks = np.zeros((3, 480, 640), np.uint8)
    cv2.circle(masks[0], (170, 160), 80, 1, -1)
    cv2.circle(masks[1], (460, 300), 110, 1, -1)
    cv2.rectangle(masks[2], (80, 330), (260, 420), 1, -1)
    for mask, colour in zip(masks, ((200, 60, 40), (40, 80, 190), (230, 210, 60))):
        ground[mask > 0] = colour
    noisy = np.clip(ground + rng.normal(0, 3, ground.shape), 0, 255).astype(np.uint8)
    return noisy, masks.astype(bool)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_weights_fit_the_promised_size() -> None:
    files = list(WEIGHTS.glob("nano_*"))
    parts = {"stem", "trunk", "adapted", "enhancer", "decoder", "prompt"}
    allowed = {f"nano_{p}{kind}.onnx" for p in parts for kind in ("", "_int8")}
    allowed |= {"nano_weights.bin", "nano_weights.sha256"}
    assert {f"nano_{p}.onnx" for p in parts} <= {p.name for p in files} <= allowed
    assert sum(p.stat().st_size for p in files) <= 20_000_000


def test_weights_of_a_folder_run_by_its_name(scene, tmp_path) -> None:
    image, _ = scene
    folder = tmp_path / "own"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("*_int8*", "rass*"))
    own, ours = (load_pipeline(name, device="cpu", precision="fp32").segment(image) for name in (str(folder), "nano"))
    assert len(own) and np.array_equal(own.masks, ours.masks)
    (folder / "nano_trunk.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="nano_trunk.onnx.*export them again"):
        load_pipeline(str(folder), device="cpu")
    with pytest.raises(ValueError, match="expected a folder with weights of nano, found no folder /nowhere;"):
        load_pipeline("/nowhere")
    with pytest.raises(ValueError, match="expected one of nano, .* or a folder with weights of nano; got 'nanoo'"):
        load_pipeline("nanoo")


@pytest.mark.parametrize("part", ["stem", "trunk", "adapted", "enhancer", "decoder", "prompt"])
def test_a_lack_of_memory_in_any_part_is_said_as_such(part: str, scene, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lacking:
        def run(self, *args: Any) -> Any:
            raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")

    image, _ = scene
    pipe = load_pipeline("nano", device="cpu", enhancement="always" if part in ("adapted", "enhancer") else "off")
    monkeypatch.setattr(pipe.model, f"_{part}", Lacking())
    with pytest.raises(OutOfMemory, match="Failed to allocate.*at least processing size 256 of 512"):
        pipe.segment(image, points=[[170, 160]])


@pytest.mark.parametrize("enhancement", ["off", "always", "auto"])
def test_everything_mode_finds_plain_objects(scene, enhancement: str) -> None:
    image, masks = scene
    found = load_pipeline("nano", enhancement=enhancement).segment(image).masks
    for mask in masks:
        assert max(iou(mask, m) for m in found) > 0.75


def test_points_and_boxes_find_their_object(scene) -> None:
    image, masks = scene
    pipe = load_pipeline("nano", enhancement="auto")
    embedding = pipe.encode(image)
    inst = pipe.decode(embedding, points=[[170, 375], [145, 362], [195, 387]], labels=[1, 1, 1],
                       boxes=[[90, 80, 250, 240], [350, 190, 570, 410]])
    assert len(inst) == 3
    assert iou(inst.masks[0], masks[2]) > 0.6
    # boxes are the weak point: docs/models.md
    assert iou(inst.masks[1], masks[0]) > 0.75 and iou(inst.masks[2], masks[1]) > 0.85


def test_degradation_level_rises_with_the_degradation_and_drives_auto() -> None:
    image = load_frame(None, (640, 480))
    pipe = load_pipeline("nano", enhancement="auto")
    worse = cv2.GaussianBlur(image, (0, 0), 4)
    worse = np.clip(worse + np.random.default_rng(0).normal(0, 25, image.shape), 0, 255).astype(np.uint8)
    clear, bad = pipe.encode(image), pipe.encode(worse)
    assert bad.degradation > clear.degradation + 0.3
    assert bad.enhanced and pipe.settings.enhance_above < bad.degradation


@pytest.mark.parametrize("size", [(1, 1), (33, 20), (200, 900), (1080, 1920), (10, 4000)])
def test_any_picture_size_gives_masks_of_that_size(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    inst = load_pipeline("nano", enhancement="always").segment(image)
    assert inst.masks.shape[1:] == size
    assert len(load_pipeline("nano").segment(image, points=[[0, 0]])) == 1


@pytest.mark.parametrize(
    ("size", "long", "expected"),
    [
        ((480, 640), 512, (384, 512)), ((720, 1280), 512, (288, 512)), ((640, 480), 256, (256, 192)),
        ((5, 4000), 512, (32, 512)),
    ],
)
def test_size_inside_the_model(size, long, expected) -> None:
    assert model_size(size, long) == expected


@pytest.mark.parametrize(("asked", "long"), [(0, 512), (1, 256), (255, 256), (500, 512), (536, 544), (1024, 1024)])
def test_any_processing_size_is_the_nearest_that_the_model_has(asked: int, long: int) -> None:
    nano = Nano()
    image = np.zeros((240, 320, 3), np.uint8)
    width, own_width = (nano.encode(image, Budget(processing_size=s)).finished().latent.shape[3] for s in (asked, 512))
    assert width * 512 == own_width * long


class Counted:
    """A session that counts its runs."""

    def __init__(self, session: Any) -> None:
        self.session, self.runs = session, 0

    def run(self, *args: Any) -> Any:
        self.runs += 1
        return self.session.run(*args)


class Kept:
    """A session that keeps what it gave."""

    def __init__(self, session: Any) -> None:
        self.session, self.results = session, []

    def run(self, *args: Any) -> Any:
        self.results.append(self.session.run(*args))
        return self.results[-1]


@pytest.mark.parametrize(
    ("enhancement", "runs"),
    [
        ("off", {"stem": 1, "trunk": 1, "adapted": 0, "enhancer": 0}),
        ("always", {"stem": 1, "trunk": 0, "adapted": 1, "enhancer": 1}),
        ("auto", {"stem": 1, "trunk": 0, "adapted": 1, "enhancer": 0}),
    ],
)
def test_a_frame_runs_one_trunk_and_a_clear_one_no_step(scene, enhancement: str, runs: dict[str, int]) -> None:
    pipe = load_pipeline("nano", enhancement=enhancement, enhance_above=1.0, enhance_below=1.0)
    counted = {part: Counted(getattr(pipe.model, f"_{part}")) for part in (*runs, "decoder")}
    for part, session in counted.items():
        setattr(pipe.model, f"_{part}", session)
    embedding = pipe.encode(scene[0])
    assert {part: counted[part].runs for part in runs} == runs and counted["decoder"].runs == 0
    for _ in range(2):
        pipe.decode(embedding)
    pipe.decode(embedding, points=[[170, 160]])
    assert {part: counted[part].runs for part in counted} == {**runs, "decoder": 1}


def test_what_encode_left_out_is_computed_where_it_is_decoded_and_stays_what_it_was(scene) -> None:
    pipe = load_pipeline("nano")
    raw = pipe.model.encode(scene[0], Budget())
    assert raw.latent is None and raw.finished().latent is not None
    enhanced = pipe.model.enhance(raw)
    assert enhanced.finished() is enhanced and enhanced.enhanced and not raw.finished().enhanced
    assert np.abs(enhanced.latent - raw.finished().latent).max() > 0.01
    # enhanced before or after it was finished, or once more: the same latent
    for other in (pipe.model.enhance(raw.finished()), pipe.model.enhance(raw.adapted()), pipe.model.enhance(enhanced)):
        np.testing.assert_array_equal(other.latent, enhanced.latent)
    # what the step starts from is neither its result nor the encoder's own latent, and says that it is not enhanced
    adapted = raw.adapted()
    assert not adapted.enhanced and adapted.adapted() is adapted
    for other in (enhanced, raw.finished()):
        assert np.abs(adapted.latent - other.latent).max() > 0.01
    plain, late = pipe.decode(raw.finished()), pipe.decode(raw)
    np.testing.assert_array_equal(plain.masks, late.masks)
    assert len(plain) and not np.array_equal(plain.scores, pipe.decode(enhanced).scores)


@pytest.fixture(scope="module")
def bad() -> np.ndarray:
    """A photograph at LQ-3, of a size that the model takes as it is."""
    return degrade(load_frame(None, (512, 384)), "lq", 3, seed=4).image


@pytest.mark.parametrize(
    ("enhancement", "second_look", "looks"),
    [("always", True, 2), ("auto", True, 2), ("always", False, 1), ("off", True, 1)],
)
def test_prompts_on_a_bad_frame_get_a_second_look_once(bad, enhancement: str, second_look: bool, looks: int) -> None:
    pipe = load_pipeline("nano", device="cpu", enhancement=enhancement, second_look=second_look)
    embedding = pipe.encode(bad)
    assert embedding.degradation >= UNCLEAR[1]
    pipe.decode(embedding)  # everything mode takes none
    parts = ("stem", "adapted", "enhancer", "decoder", "prompt")
    counted = {part: Counted(getattr(pipe.model, f"_{part}")) for part in parts}
    for part, session in counted.items():
        setattr(pipe.model, f"_{part}", session)
    for decoded in (1, 2):
        pipe.decode(embedding, points=[[100, 100], [300, 200]])
        assert counted["prompt"].runs == decoded * looks
        assert {counted[part].runs for part in ("stem", "adapted", "decoder")} == {looks - 1}
        assert counted["enhancer"].runs == 0


def test_a_clear_frame_gets_no_second_look() -> None:
    image = load_frame(None, (512, 384))
    found = []
    for second_look in (True, False):
        pipe = load_pipeline("nano", device="cpu", enhancement="always", second_look=second_look)
        embedding = pipe.encode(image)
        assert embedding.enhanced and embedding.degradation <= UNCLEAR[0]
        found.append(pipe.decode(embedding, points=[[200, 150]]))
    np.testing.assert_array_equal(found[0].masks, found[1].masks)


@pytest.fixture
def any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks as the looks give them; what becomes of their shape: test_shapes.py."""
    for name in ("keep_to_boxes", "drop_islands"):
        monkeypatch.setattr(shapes, name, lambda logits, *prompts: None)


@pytest.mark.usefixtures("any_shape")
def test_the_second_look_is_at_the_mirrored_frame_and_the_masks_are_the_mean(bad) -> None:
    model = Nano("cpu", "fp32", threads=1)
    width = bad.shape[1]
    once = Budget(second_look=False)
    points = np.float32([[[100, 90], [140, 120]], [[60, 40], [400, 300]], [[220, 200], [0, 0]]])
    labels = np.float32([[1, 0], [2, 3], [1, -1]])
    embedding = model.enhance(model.encode(bad, Budget()))
    # the same by hand: a model that is shown the mirrored frame, prompted where the objects are there
    there = points.copy()
    there[[0, 2], :, 0] = width - 1 - points[[0, 2], :, 0]
    there[1, :, 0] = width - points[1, ::-1, 0]
    small = cv2.resize(bad, (384, 288), interpolation=cv2.INTER_LINEAR)[:, ::-1]
    other = model.encode(np.ascontiguousarray(small), Budget(processing_size=384)).adapted()
    other = dataclasses.replace(other, size=bad.shape[:2])
    first, second = model.prompt(embedding, points, labels, once), model.prompt(other, there, labels, once)
    found = model.prompt(embedding, points, labels, Budget())
    np.testing.assert_allclose(found.scores[:2], (first.scores + second.scores)[:2] / 2, atol=1e-5)
    for k in (0, 1):
        mirrored = cv2.resize(second.logits[k, :, ::-1], (128, 96), interpolation=cv2.INTER_LINEAR)
        expected = (first.logits[k] + mirrored) / 2
        np.testing.assert_allclose(found.logits[k], expected, atol=1e-3 * np.abs(expected).max())
        assert np.abs(expected - first.logits[k]).max() > 0.1


def test_both_looks_answer_a_lone_point_with_the_same_of_its_meanings(bad) -> None:
    model = Nano("cpu", "fp32", threads=1)
    points, labels = np.float32([[[x, y]] for x in (90, 230, 400) for y in (60, 190, 310)]), np.ones((9, 1), np.float32)
    embedding = model.enhance(model.encode(bad, Budget()))
    model._prompt = kept = Kept(model._prompt)
    found = model.prompt(embedding, points, labels, Budget())
    first, second = (scores[0, :, 1:] for _, scores in kept.results)
    assert (first.argmax(1) != second.argmax(1)).any()
    np.testing.assert_allclose(found.scores, ((first + second) / 2).max(1), atol=1e-5)


def test_what_everything_mode_finds_moves_masks_of_points_and_not_those_of_boxes(scene) -> None:
    model = Nano("cpu", "fp32", threads=1)
    embedding = model.encode(scene[0], Budget()).finished()
    points, one = np.float32([[[170, 375], [145, 362]]]), np.float32([[1, 1]])
    box, corners = np.float32([[[120, 310], [240, 420]]]), np.float32([[2, 3]])
    found = [model.prompt(embedding, *prompt, Budget()).logits for prompt in ((points, one), (box, corners))]
    *shared, scores = model._shared(embedding)
    embedding.extra["shared"] = (*shared, np.zeros_like(scores))  # it finds nothing
    alone = [model.prompt(embedding, *prompt, Budget()).logits for prompt in ((points, one), (box, corners))]
    assert np.abs(found[0] - alone[0]).max() > 0.1 and iou(found[0][0] > 0, alone[0][0] > 0) > 0.6
    assert np.array_equal(found[1], alone[1])


@pytest.mark.usefixtures("any_shape")
def test_a_second_look_at_a_small_thing_goes_near(bad) -> None:
    """The same by hand: a model that is shown the mirrored part of the frame, prompted where the object is there."""
    model = Nano("cpu", "fp32", threads=1)
    once = Budget(second_look=False)
    embedding = model.enhance(model.encode(bad, Budget()))
    box, labels = np.float32([[[200, 120], [260, 180]]]), np.float32([[2, 3]])
    # half as much again as 60 px, but at least 0.3 of the sides: 38 of 128 and 29 of 96 cells of 4 px, at (230, 150)
    x, y, width, height = 38 * 4, 23 * 4, 38 * 4, 29 * 4
    near = cv2.resize(bad[y : y + height, x : x + width], (320, 256), interpolation=cv2.INTER_LINEAR)[:, ::-1]
    other = model.encode(np.ascontiguousarray(near), Budget(processing_size=320)).adapted()
    there = box - np.float32([x, y])
    there[..., 0] = width - there[:, ::-1, 0]
    there *= np.float32([320 / width, 256 / height])
    first, second = model.prompt(embedding, box, labels, once), model.prompt(other, there, labels, once)
    found = model.prompt(embedding, box, labels, Budget())
    expected = first.logits.copy()
    part = expected[0, y // 4 : (y + height) // 4, x // 4 : (x + width) // 4]
    mirrored = cv2.resize(second.logits[0, :, ::-1], (38, 29), interpolation=cv2.INTER_LINEAR)
    assert np.abs(mirrored - part).max() > 0.2
    part += (mirrored - part) / 2
    np.testing.assert_allclose(found.logits, expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(found.scores, (first.scores + second.scores) / 2, atol=1e-4)


def test_the_last_second_look_is_kept(bad) -> None:
    model = Nano("cpu", "fp32", threads=1)
    embedding = model.enhance(model.encode(bad, Budget()))
    model._stem = counted = Counted(model._stem)
    here, there = ((np.float32([[[x, 60], [x + 50, 110]]]), np.float32([[2, 3]]), Budget()) for x in (60, 300))
    first = model.prompt(embedding, *here)
    assert counted.runs == 1
    again = model.prompt(embedding, *here)
    assert counted.runs == 1 and np.array_equal(first.logits, again.logits)
    model.prompt(embedding, *there)
    assert counted.runs == 2


def test_a_second_look_sees_the_frame_that_was_encoded(bad) -> None:
    """Cameras write the next picture into the same memory."""
    pipe = load_pipeline("nano", device="cpu", enhancement="always")
    box = [[200, 120, 260, 180]]
    expected = pipe.decode(pipe.encode(bad), boxes=box)
    buffer = bad.copy()
    embedding = pipe.encode(buffer)
    buffer[:] = 0
    np.testing.assert_array_equal(pipe.decode(embedding, boxes=box).masks, expected.masks)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 2), (700, 30)])
def test_frames_of_any_shape_get_a_second_look(size: tuple[int, int]) -> None:
    model = Nano("cpu", threads=1)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    embedding = dataclasses.replace(model.enhance(model.encode(image, Budget())), degradation=1.0)
    height, width = size
    for centre in (0.1, 0.5, 0.9):
        box = np.float32([[[centre * width, centre * height], [centre * width + 0.1, centre * height + 0.1]]])
        found = model.prompt(embedding, box, np.float32([[2, 3]]), Budget())
        assert np.isfinite(found.logits).all() and np.isfinite(found.scores).all()


GRID = (90, 120)


def in_frame(*pixels: tuple[float, float]) -> np.ndarray:
    """Points in cells of `GRID` -> (1, N, 2) in -1..1."""
    return (np.float32(pixels) / (GRID[1], GRID[0]) * 2 - 1)[None]


@pytest.mark.parametrize(("extent", "prompts", "labels", "expected"), [
    # a mask of 40x30 cells with its point inside: 1.5 times 40 of 120 is half of the sides
    ((40, 30, 80, 60), [(50, 40), (60, 50)], [1, 1], (30, 22, 60, 45)),
    # a point beside the mask counts, one that is not of the object does not
    ((40, 30, 80, 60), [(94, 40), (60, 50)], [1, 1], (26, 14, 81, 61)),
    ((40, 30, 80, 60), [(119, 89), (60, 50)], [0, 1], (30, 22, 60, 45)),
    # a box says all, whatever the mask; its centre lies inside
    ((0, 0, 120, 90), [(60, 45), (80, 60), (70, 52)], [2, 3, 4], (52, 39, 36, 27)),
    ((0, 0, 120, 90), [(60, 45), (80, 60), (100, 52)], [2, 3, 1], (50, 30, 60, 45)),
    # at the edge it is moved inwards
    ((0, 70, 20, 90), [(5, 80), (6, 81)], [1, 1], (0, 60, 40, 30)),
    ((100, 10, 120, 30), [(110, 20), (111, 21)], [1, 1], (80, 5, 40, 30)),
    ((40, 0, 80, 30), [(50, 10), (60, 20)], [1, 1], (30, 0, 60, 45)),
    # an empty mask leaves the points
    ((0, 0, 0, 0), [(60, 45), (66, 45)], [1, 1], (45, 32, 36, 27)),
    # more than 0.8 of the sides
    ((10, 10, 80, 20), [(20, 15), (30, 15)], [1, 1], (0, 0, 120, 90)),
    # nothing says where it is
    ((0, 0, 0, 0), [(5, 80), (6, 81)], [0, 0], (0, 0, 120, 90)),
])
def test_where_the_second_look_goes(
    extent: tuple[int, ...], prompts: list[tuple[float, float]], labels: list[int], expected: tuple[int, ...]
) -> None:
    found = around(GRID, np.array([extent]), in_frame(*prompts), np.float32([labels]))
    assert found == Window(GRID, *expected)
    assert found.is_whole == (expected == (0, 0, 120, 90)) == (found == whole(GRID))


def test_several_objects_are_in_one_part() -> None:
    extents = np.array([(10, 10, 20, 20), (40, 40, 50, 50)])
    xy = np.concatenate([in_frame((12, 12), (15, 15)), in_frame((44, 44), (45, 45))])
    left, top, width, height = around(GRID, extents, xy, np.ones((2, 2), np.float32))[1:]
    assert left <= 10 and top <= 10 and left + width >= 50 and top + height >= 50
    assert (width, height) == (80, 60)  # 1.5 times 40 of 90 rows, and the frame's aspect


def test_prompts_are_where_they_were_in_the_mirrored_part() -> None:
    window = Window(GRID, 30, 22, 60, 45)
    xy = in_frame((30, 22), (60, 44.5), (90, 67), (29, 40), (40, 30), (50, 50))
    labels = np.float32([[1, 0, 1, 0, 2, 3]])
    moved, told = window.prompts(xy, labels)
    outside, top_left, bottom_right = (
        [1 - 2 * x / 60, 2 * y / 45 - 1] for x, y in ((-1, 18), (20, 8), (10, 28))  # corners change sides
    )
    expected = [[1, -1], [0, 0], [-1, 1], outside, top_left, bottom_right]
    np.testing.assert_allclose(moved[0], expected, atol=1e-5)
    assert told.tolist() == [[1, 0, 1, -1, 2, 3]]  # one point is outside and says nothing there
    assert np.array_equal(whole(GRID).prompts(xy, labels)[1], labels)
    image = np.arange(180 * 240 * 3, dtype=np.int64).astype(np.uint8).reshape(180, 240, 3)
    np.testing.assert_array_equal(window.mirrored(image), image[44:134, 60:180][:, ::-1])


@pytest.mark.parametrize(("pixel", "told"), [
    ((29, 40), -1), ((91, 40), -1), ((50, 21), -1), ((50, 68), -1), ((29, 21), -1), ((30, 40), 0), ((90, 40), 0),
])
def test_background_on_no_side_of_the_part_says_anything_there(pixel: tuple[int, int], told: int) -> None:
    for label, expected in ((0, told), (1, 1)):
        _, labels = Window(GRID, 30, 22, 60, 45).prompts(in_frame(pixel), np.float32([[label]]))
        assert labels.tolist() == [[expected]]


def test_the_second_look_comes_and_goes_with_the_level_by_degrees(bad) -> None:
    """So that the masks of a camera near the level where it begins do not flicker."""
    assert [share(level) for level in (0.0, 0.15, 0.2, 0.25, 1.0)] == pytest.approx([0, 0, 0.25, 0.5, 0.5])
    model = Nano("cpu", "fp32", threads=1)
    points, labels = np.float32([[[100, 90], [140, 120]]]), np.ones((1, 2), np.float32)
    embedding = model.enhance(model.encode(bad, Budget()))

    def at(level: float) -> Candidates:
        return model.prompt(dataclasses.replace(embedding, degradation=level), points, labels, Budget())

    one, half, two = at(0.15), at(0.2), at(0.25)
    assert np.abs(two.logits - one.logits).max() > 0.1
    np.testing.assert_allclose(half.logits, (one.logits + two.logits) / 2, atol=1e-3)
    np.testing.assert_allclose(half.scores, (one.scores + two.scores) / 2, atol=1e-6)
    np.testing.assert_allclose(at(0.15001).logits, one.logits, atol=0.01)


@pytest.mark.parametrize("second_look", [True, False])
def test_many_prompts_go_in_pieces_that_give_what_one_piece_gives(bad, second_look: bool) -> None:
    model = Nano("cpu", "fp32", threads=1)
    rng = np.random.default_rng(3)
    corners = rng.uniform(10, 300, (7, 1, 2))
    # boxes, of two objects with a point besides; and lone points
    points = np.concatenate([corners, corners + rng.uniform(20, 80, (7, 1, 2)), corners + 10], 1).astype(np.float32)
    labels = np.float32([[2, 3, -1]] * 3 + [[2, 3, 1]] * 2 + [[1, -1, -1]] * 2)
    embedding = model.enhance(model.encode(bad, Budget()))
    assert share(embedding.degradation) > 0
    model._prompt = counted = Counted(model._prompt)
    looks = 2 if second_look else 1
    found = {}
    for size, pieces in ((64, 1), (7, 1), (3, 3), (1, 7)):
        counted.runs = 0
        found[size] = model.prompt(embedding, points, labels, Budget(points_per_batch=size, second_look=second_look))
        assert counted.runs == pieces * looks
    for size in (7, 3, 1):
        np.testing.assert_allclose(found[size].logits, found[64].logits, atol=1e-3)
        np.testing.assert_allclose(found[size].scores, found[64].scores, atol=1e-5)


def test_warm_up_goes_through_the_second_looks(scene) -> None:
    for enhancement, looks in (("off", 1), ("auto", 2)):
        pipe = load_pipeline("nano", device="cpu", enhancement=enhancement)
        pipe.model._prompt = counted = Counted(pipe.model._prompt)
        pipe.model._stem = kept = Kept(pipe.model._stem)
        pipe.warm_up(scene[0])
        assert counted.runs == 2 * looks  # for a point and a box
        widths = [4 * s4.shape[3] for s4, _, _ in kept.results]
        assert widths == ([512] if looks == 1 else [512, 384, 320])  # of all, and near


@pytest.mark.parametrize(
    ("first", "afar", "near"), [(1024, 768, 640), (512, 384, 320), (384, 320, 320), (320, 320, 320), (256, 256, 256)]
)
def test_size_of_the_second_look(bad, first: int, afar: int, near: int) -> None:
    model = Nano("cpu", threads=1)
    embedding = model.enhance(model.encode(bad, Budget(processing_size=first)))
    embedding = dataclasses.replace(embedding, degradation=1.0)
    model._stem = kept = Kept(model._stem)
    model.prompt(embedding, np.float32([[[9, 9]]]), np.float32([[1]]), Budget())
    model.prompt(embedding, np.float32([[[9, 9], [40, 40]]]), np.float32([[2, 3]]), Budget())
    assert [4 * s4.shape[3] for s4, _, _ in kept.results] == [afar, near]
    assert (long_side(first, False), long_side(first, True)) == (afar, near)


def test_what_fills_the_frame_is_looked_at_as_what_is_near(bad) -> None:
    model = Nano("cpu", threads=1)
    embedding = dataclasses.replace(model.enhance(model.encode(bad, Budget())), degradation=1.0)
    model._stem = kept = Kept(model._stem)
    height, width = bad.shape[:2]
    large, small = [[5, 5], [width - 5, height - 5]], [[0, 0], [20, 20]]
    for boxes in ([large], [large], [large, small], [small, [[width - 20, height - 20], [width, height]]], [large]):
        model.prompt(embedding, np.float32(boxes), np.float32([[2, 3]] * len(boxes)), Budget())
    # several may be small, so they are seen in more detail; the same look is not taken twice
    assert [4 * s4.shape[3] for s4, _, _ in kept.results] == [320, 384, 320]


@pytest.mark.parametrize(("part", "call"), [
    ("_stem", lambda model, image, seen: model.encode(image, Budget())),
    ("_decoder", lambda model, image, seen: model.propose(seen, 0.1, 64, Budget())),
    ("_prompt", lambda model, image, seen: model.prompt(seen, np.float32([[[9, 9]]]), np.float32([[1]]), Budget())),
])
def test_what_overflows_is_an_error_and_no_empty_scene(scene, part: str, call: Any) -> None:
    class Overflows(Kept):
        def run(self, *args: Any) -> Any:
            *others, last = super().run(*args)
            return [*others, np.full_like(last, np.nan)]

    model = Nano("cpu", threads=1)
    seen = model.encode(scene[0], Budget()).finished()
    setattr(model, part, Overflows(getattr(model, part)))
    with pytest.raises(RuntimeError, match="of nano on cpu .*: expected finite values, got NaN or infinity.*precision"):
        call(model, scene[0], seen)


def test_specks_of_everything_mode_go(scene) -> None:
    pipe = load_pipeline("nano", device="cpu", enhancement="off")
    embedding = pipe.encode(scene[0])
    found = pipe.model.propose(embedding, 0.15, 256, Budget(stability_threshold=0.5))
    least = {}
    for islands in (0.0, found.islands):
        shown = pipe._everything(embedding, dataclasses.replace(found, islands=islands), pipe.resolved)
        shares = []
        for mask in shown.masks:
            sizes = np.bincount(cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1].ravel())[1:]
            shares.append(sizes.min() / sizes.max())
        least[islands] = min(shares)
    # interpolation changes the sizes of small parts
    assert least[0.0] < 0.05 < 0.5 * shapes.SPECK < least[shapes.SPECK]


def test_two_threads_may_decode_an_embedding(scene) -> None:
    pipe = load_pipeline("nano")
    raw = pipe.model.encode(scene[0], Budget())
    with ThreadPoolExecutor(2) as pool:
        # past the pipeline's lock, so that both may find nothing computed yet
        found = list(pool.map(lambda _: pipe.model.propose(raw, 0.1, 50, Budget()), range(2)))
    assert len(found[0].scores)
    np.testing.assert_array_equal(found[0].logits, found[1].logits)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_an_embedding_can_be_decoded_again_with_the_same_result(scene) -> None:
    image, _ = scene
    pipe = load_pipeline("nano", enhancement="always")
    embedding = pipe.encode(image)
    first, again = pipe.decode(embedding), pipe.decode(embedding)
    assert len(first) and np.array_equal(first.masks, again.masks) and np.array_equal(first.scores, again.scores)


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (["CPUExecutionProvider"], "cpu"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
        (["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], "tensorrt"),
    ],
)
def test_auto_takes_the_fastest_device_at_hand(available: list[str], expected: str) -> None:
    assert choose_device("auto", available) == expected


class Opened:
    """Stands for the session of a part."""

    def __init__(self, part: str) -> None:
        inputs, outputs = PARTS[part]
        self.get_inputs, self.get_outputs = (lambda ends=ends: [SimpleNamespace(name=name) for name in ends]
                                             for ends in (inputs, outputs))

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("device", "precision", "files", "expected"),
    [
        ("cpu", "auto", True, ["stem_int8", "trunk_int8", "adapted_int8", "enhancer_int8", "decoder_int8", "prompt"]),
        ("cpu", "int8", True, ["stem_int8", "trunk_int8", "adapted_int8", "enhancer_int8", "decoder_int8", "prompt"]),
        ("cpu", "auto", False, ["stem", "trunk", "adapted", "enhancer", "decoder", "prompt"]),
        ("cpu", "fp32", True, ["stem", "trunk", "adapted", "enhancer", "decoder", "prompt"]),
        ("cuda", "auto", True, ["stem", "trunk", "adapted", "enhancer", "decoder", "prompt"]),
    ],
)
def test_8_bits_are_for_the_cpu(monkeypatch, tmp_path, device, precision, files, expected) -> None:
    for part in IN_8_BITS if files else ():
        (tmp_path / f"nano_{part}_int8.onnx").touch()
    opened = []

    def open_session(path: Path, *_: Any) -> Opened:
        opened.append(path.stem)
        return Opened(path.stem.split("_")[1])

    monkeypatch.setattr(onnx_session, "choose_device", lambda name: name)
    monkeypatch.setattr("glesam_ros.models.nano.open_session", open_session)
    model = Nano(device, precision, tmp_path)
    assert opened == [f"nano_{name}" for name in expected]
    assert model.device.startswith(f"{device} ({'int8' if 'int8' in expected[0] else 'fp32'}, ")


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that was built with CUDA on a machine without it: sessions fall back to the CPU."""
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_session.ort, "get_available_providers", lambda: offered)
    real = onnx_session.ort.InferenceSession

    def fall_back(path: str, options: Any, providers: list[Any]) -> Any:
        return real(path, options, providers=[(name, s) for name, s in providers if name == "CPUExecutionProvider"])

    monkeypatch.setattr(onnx_session.ort, "InferenceSession", fall_back)


@pytest.mark.parametrize("load", [Nano, RassNano])
def test_a_gpu_that_cannot_be_used_is_an_error_and_auto_takes_the_next(load, broken_cuda, caplog) -> None:
    with pytest.raises(DeviceUnusable, match="device cuda: .* fell back to CPUExecutionProvider; check driver"):
        load("cuda")
    model = load("auto")
    assert model.device.startswith("cpu (int8" if load is Nano else "cpu (fp32")
    assert "fell back to CPUExecutionProvider" in caplog.text and "the next device is tried" in caplog.text


def refusing(monkeypatch: pytest.MonkeyPatch, error: Exception, refuses: str) -> None:
    """An onnxruntime with CUDA whose sessions fail with `error` where they may take the provider `refuses`."""
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_session.ort, "get_available_providers", lambda: offered)
    real = onnx_session.ort.InferenceSession

    def fail(path: str, options: Any, providers: list[Any]) -> Any:
        if refuses in dict(providers):
            raise error
        return real(path, options, providers=providers)

    monkeypatch.setattr(onnx_session.ort, "InferenceSession", fail)


@pytest.mark.parametrize("load", [Nano, RassNano])
def test_a_gpu_that_opens_no_graph_is_an_error_of_the_device_and_auto_takes_the_next(load, monkeypatch, caplog) -> None:
    refusing(monkeypatch, Exception("CUDA failure 999: unknown error\nat line 7"), "CUDAExecutionProvider")
    with pytest.raises(DeviceUnusable, match="device cuda: .*nano.*: CUDA failure 999: unknown error; set device to c"):
        load("cuda")
    assert load("auto").device.startswith("cpu") and "the next device is tried" in caplog.text


@pytest.mark.parametrize("load", [Nano, RassNano])
def test_a_lack_of_memory_while_loading_is_said_as_such(load, monkeypatch) -> None:
    for error in (MemoryError(), RuntimeError("Failed to allocate memory for requested buffer")):
        with monkeypatch.context() as context:
            refusing(context, error, "CPUExecutionProvider")
            with pytest.raises(OutOfMemory, match="out of memory|Failed to allocate"):
                load("cpu")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("nano_stem.onnx", b"", "expected an ONNX graph, onnxruntime cannot open it: .*export them again"),
        ("nano_prompt.onnx", b"no graph at all", "expected an ONNX graph, onnxruntime cannot open it"),
        ("nano_decoder.onnx", -500, "expected an ONNX graph, onnxruntime cannot open it"),
        ("nano_weights.bin", 1000, "expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}; reinstall the package"),
        ("nano_weights.bin", bytes(19_316_736), "expected SHA-256 "),
        ("nano_stem.onnx", "nano_decoder.onnx", "expected a graph image -> s4, s8, level, got latent -> features, "),
        ("nano_enhancer.onnx", "nano_trunk.onnx", "expected a graph latent, level -> restored, got s4, s8 -> latent"),
    ],
)
def test_damaged_weights_are_named(tmp_path, capsys, file: str, content: bytes | int | str, words: str) -> None:
    folder = tmp_path / "own"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("*_int8*", "rass*"))
    damaged = folder / file
    if isinstance(content, str):
        shutil.copy(folder / content, damaged)
    else:
        damaged.write_bytes(damaged.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=f"^{damaged}: {words}"):
        load_pipeline(str(folder), device="cpu")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), np.uint8))
    command = ["segment", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--model", str(folder)]
    assert main([*command, "--device", "cpu"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"glesam segment: error: {damaged}: ")


def test_tensors_that_are_cut_are_named_without_their_checksum_too(tmp_path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("*_int8*", "rass*", "*.sha256"))
    (folder / "nano_weights.bin").write_bytes((folder / "nano_weights.bin").read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"^{folder}/nano_stem.onnx: expected an ONNX graph, onnxruntime cannot"):
        load_pipeline(str(folder), device="cpu")


def test_new_weights_meet_no_old_engines(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    first = engine_cache(tmp_path.glob("[ab]"))
    assert first.parent == tmp_path / "glesam_ros" / "tensorrt"
    assert first == engine_cache([tmp_path / "b", tmp_path / "a"])
    (tmp_path / "b").write_text("3")
    assert engine_cache(tmp_path.glob("[ab]")) != first
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert engine_cache([]).is_absolute()


def test_refusals_say_what_was_expected(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="onnxruntime-gpu"):
        choose_device("cuda", ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="expected auto"):
        choose_device("tpu")
    with pytest.raises(ValueError, match="fp16 needs device tensorrt"):
        Nano("cpu", "fp16")
    monkeypatch.setattr(onnx_session, "choose_device", lambda name: name)
    with pytest.raises(ValueError, match="int8 needs device cpu, got cuda; use auto or fp32"):
        Nano("cuda", "int8")


def test_missing_weights_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nano_stem.onnx"):
        Nano("cpu", weights=tmp_path)
    with pytest.raises(FileNotFoundError, match="nano_stem_int8.onnx"):
        Nano("cpu", "int8", weights=tmp_path)
