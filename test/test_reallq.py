"""RealLQ sets: measures with known answers, frames spread over time, labels drawn and read back pixel by pixel."""

from __future__ import annotations

import base64
import json
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from glesam_ros import load_pipeline
from glesam_ros.degradation import degrade
from glesam_ros.labelled import open_labelled, write_label_map
from glesam_ros.reallq import PickOptions, Shot, measure, pick, read_labels, score, select
from glesam_ros.reallq.labels import draw_shapes
from glesam_ros.reallq.pick import file_name
from glesam_ros.reallq.quality import (
    NOISE_GAIN,
    TERMS,
    Quality,
    blockiness,
    clipped_share,
    noise_sigma,
    sharpness,
    worst_measure,
)

DEMO = Path(__file__).parents[1] / "glesam_ros/demo"
CLASSES = ("road", "wall", "person")
PALETTE = ((128, 64, 128), (102, 102, 156), (220, 20, 60))
GOOD = Quality(level=0.0, sharpness=0.04, brightness=120.0, noise=1.0, clipped=0.0, blockiness=0.0, contrast=60.0)


def photograph(name: str = "coffee", long_side: int = 384) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(DEMO / f"{name}.jpg")), cv2.COLOR_BGR2RGB)
    scale = long_side / max(image.shape)
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def no_level(image: Any) -> float:
    return 0.0


# --- measures


@pytest.mark.parametrize("w", [np.pi / 16, np.pi / 4, np.pi / 2, 3 * np.pi / 4])
@pytest.mark.parametrize(("gain", "offset"), [(100, 128), (3, 20)])
@pytest.mark.parametrize("turn", [False, True])
def test_sharpness_of_a_wave_is_that_of_its_frequency_whatever_its_contrast(w, gain, offset, turn):
    wave = (offset + gain * np.cos(w * np.arange(512))).astype(np.float32)
    grey = np.tile(wave, (64, 1))
    assert sharpness(grey.T.copy() if turn else grey) == pytest.approx(np.sin(w) ** 4, rel=0.02)


def test_sharpness_of_nothing_and_of_ramps():
    assert sharpness(np.full((32, 32), 77, np.float32)) == 0
    ramp = np.tile(np.arange(64, dtype=np.float32), (64, 1))
    assert sharpness(ramp) == pytest.approx(0, abs=1e-6)


def test_sharpness_of_noise_is_its_gain_and_is_taken_away():
    noise = np.random.default_rng(0).normal(0, 10, (400, 400)).astype(np.float32)
    assert sharpness(noise) == pytest.approx(NOISE_GAIN, rel=0.02)
    assert sharpness(noise, noise_sigma(noise)) < 0.03 * NOISE_GAIN


def test_noise_does_not_hide_blur():
    grey = cv2.cvtColor(photograph(), cv2.COLOR_RGB2GRAY).astype(np.float32)
    blurred = cv2.GaussianBlur(grey, (0, 0), 3)
    noisy = blurred + np.random.default_rng(0).normal(0, 8, grey.shape).astype(np.float32)
    assert sharpness(noisy, noise_sigma(noisy)) < 0.1 * sharpness(grey)


@pytest.mark.parametrize("sigma", [1.0, 5.0, 20.0])
def test_noise_is_found_beside_ramps_and_edges(sigma):
    clean = np.tile(np.linspace(0, 200, 256, dtype=np.float32), (192, 1))
    clean[60:120, 80:170] = 240
    assert noise_sigma(clean) < 1e-4
    noisy = clean + np.random.default_rng(1).normal(0, sigma, clean.shape).astype(np.float32)
    assert noise_sigma(noisy) == pytest.approx(sigma, rel=0.03)


def test_clipped_share_counts_black_and_white():
    grey = np.full((10, 10), 100, np.uint8)
    grey[0], grey[1, :5] = 0, 255
    assert clipped_share(grey) == pytest.approx(0.15)
    assert clipped_share(np.full((4, 4), 128, np.uint8)) == 0


def test_blockiness_of_blocks_ramps_and_shifted_blocks():
    blocks = np.kron(np.random.default_rng(2).integers(0, 256, (12, 16)), np.ones((8, 8))).astype(np.float32)
    assert blockiness(blocks) == 1
    assert blockiness(blocks[4:, 4:]) == 0  # a grid elsewhere is no work of a codec
    ramp = np.add.outer(np.arange(64.0), np.arange(64.0)).astype(np.float32)
    assert blockiness(ramp) == 0
    assert blockiness(np.zeros((16, 16), np.float32)) == 0
    noise = np.random.default_rng(3).normal(0, 20, (400, 400)).astype(np.float32)
    assert blockiness(noise) < 0.02


def test_blockiness_rises_as_jpeg_quality_falls():
    bgr = cv2.cvtColor(photograph(), cv2.COLOR_RGB2BGR)

    def at(quality: int) -> float:
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return blockiness(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE).astype(np.float32))

    values = [at(quality) for quality in (95, 60, 30, 10)]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.2


def test_measures_of_a_plain_picture_and_the_level_of_the_model():
    colour = np.zeros((48, 64, 3), np.uint8)
    colour[:] = (200, 100, 50)
    seen = []
    found = measure(colour, lambda image: seen.append(image) or 0.75)
    assert seen[0] is colour
    assert found.level == 0.75
    assert found.brightness == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=0.5)
    assert (found.sharpness, found.noise, found.clipped, found.blockiness) == (0, 0, 0, 0)
    assert found.contrast == pytest.approx(0, abs=1e-3)


def test_measures_do_not_depend_on_the_resolution():
    small = photograph("astronaut", 512)
    small = small[:480, :480]
    at_640 = cv2.resize(small, (640, 640), interpolation=cv2.INTER_CUBIC)
    large = cv2.resize(at_640, (1280, 1280), interpolation=cv2.INTER_NEAREST)
    one, other = measure(at_640, no_level), measure(large, no_level)
    for name in ("sharpness", "brightness", "noise", "clipped", "contrast"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=0.01, abs=0.01)


@pytest.mark.parametrize("shape", [(15, 64, 3), (64, 8, 3)])
def test_too_small_to_measure(shape):
    with pytest.raises(ValueError, match="at least 16 pixels a side"):
        measure(np.zeros(shape, np.uint8), no_level)


def test_score_rises_with_every_kind_of_badness_and_stays_below_one():
    rng = np.random.default_rng(4)
    high = {"level": 1.0, "sharpness": 0.1, "brightness": 255.0, "noise": 60.0, "clipped": 1.0, "blockiness": 1.0}
    for _ in range(200):
        values = {name: float(rng.uniform(0, top)) for name, top in high.items()}
        quality = Quality(**values, contrast=50.0)
        assert 0 <= score(quality) < 1
        for name, top in high.items():
            worse = min(top, values[name] * 1.2) if TERMS[name].more_is_worse else values[name] * 0.8
            assert score(Quality(**{**values, name: worse}, contrast=50.0)) > score(quality)


def test_score_by_hand():
    parts = {"level": 0.25, "noise": 10.0}  # both at their half points, the rest as good as it gets
    quality = Quality(**{**GOOD.__dict__, "sharpness": 1e9, "brightness": 1e9, **parts})
    assert score(quality) == pytest.approx(1 - (1 - 0.9 / 2) * (1 - 0.5 / 2))
    assert worst_measure(quality) == "level"


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"noise": 30.0}, "noise"), ({"brightness": 5.0}, "brightness"), ({"sharpness": 0.001}, "sharpness"),
     ({"clipped": 0.9}, "clipped"), ({"blockiness": 0.8}, "blockiness"), ({"level": 0.9}, "level")],
)
def test_the_worst_measure_says_what_is_wrong(change, expected):
    assert worst_measure(Quality(**{**GOOD.__dict__, **change})) == expected


@pytest.fixture(scope="module")
def nano_level() -> Iterator[Callable[[Any], float]]:
    pipeline = load_pipeline("nano", device="cpu", enhancement="off")
    yield lambda image: pipeline.encode(image).degradation
    pipeline.close()


@pytest.mark.parametrize("kind", ["low_light", "motion_blur", "defocus", "gaussian_noise", "jpeg", "lq"])
def test_heavier_degradation_is_a_worse_score(kind, nano_level):
    clear = photograph()
    pictures = [clear, *(degrade(clear, kind, level, seed=3).image for level in (1, 2, 3))]
    for level in (nano_level, no_level):  # the simple measures alone say it too
        scores = [score(measure(picture, level)) for picture in pictures]
        assert scores == sorted(scores) and len(set(scores)) == 4, scores


@pytest.mark.parametrize("kind", ["fog", "rain"])
def test_weather_is_seen_by_the_model(kind, nano_level):
    clear = photograph()
    pictures = [clear, *(degrade(clear, kind, level, seed=3).image for level in (1, 2, 3))]
    scores = [score(measure(picture, nano_level)) for picture in pictures]
    assert scores == sorted(scores) and len(set(scores)) == 4, scores


@pytest.mark.parametrize(
    ("kind", "measure_name"),
    [("low_light", "brightness"), ("defocus", "sharpness"), ("gaussian_noise", "noise"), ("jpeg", "blockiness")],
)
def test_each_degradation_moves_its_own_measure(kind, measure_name):
    clear = photograph()
    values = [getattr(measure(degrade(clear, kind, n, seed=3).image, no_level), measure_name) for n in (1, 2, 3)]
    values.insert(0, getattr(measure(clear, no_level), measure_name))
    assert values == sorted(values, reverse=not TERMS[measure_name].more_is_worse)
    assert len(set(values)) == 4


# --- spread over time


@pytest.mark.parametrize(
    ("times", "scores", "groups", "count", "gap", "expected"),
    [
        ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1], "aaaaa", 3, 2, [0, 2, 4]),
        ([0, 1, 2, 3, 4], [1, 2, 5, 2, 1], "aaaaa", 3, 2, [2, 0, 4]),
        ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], "aaaaa", 9, 3, [4, 1]),  # no more are far enough apart
        ([0, 1, 2], [1, 1, 1], "aaa", 3, 1, [0, 1, 2]),  # exactly the gap is enough; equal: the earlier first
        ([0, 0, 0], [1, 3, 2], "aba", 3, 5, [1, 2]),  # topics do not hinder each other
        ([0, 0, 7], [1, 2, 3], "aaa", 3, 0, [2, 1, 0]),
        ([5, 1, 9], [1, 2, 3], "aaa", 1, 0, [2]),
        ([], [], "", 3, 1, []),
    ],
)
def test_select_known_answers(times, scores, groups, count, gap, expected):
    assert select(times, scores, list(groups), count, gap) == expected


def test_select_holds_its_promise_on_random_frames():
    rng = np.random.default_rng(5)
    for _ in range(50):
        n, gap = int(rng.integers(1, 80)), int(rng.integers(0, 30))
        times, scores = rng.integers(0, 300, n).tolist(), rng.random(n).tolist()
        groups = rng.choice(list("ab"), n).tolist()
        chosen = select(times, scores, groups, n, gap)
        assert [scores[k] for k in chosen] == sorted((scores[k] for k in chosen), reverse=True)
        for k in range(n):  # whoever was not taken has a worse one nearby that was, and nobody taken has
            near = [j for j in chosen if j != k and groups[j] == groups[k] and abs(times[j] - times[k]) < gap]
            assert not near if k in chosen else any(scores[j] >= scores[k] for j in near)


# --- picking


class Film:
    """A recording of dark and bright frames in memory of the test; counts how many of its pictures are alive."""

    def __init__(self, levels: list[int], seconds: float = 1.0, group: str = "/cam", bad: tuple[int, ...] = ()) -> None:
        self.levels, self.seconds, self.group, self.bad = levels, seconds, group, bad
        self.identity: dict[str, Any] = {"film": levels}
        self.total = len(levels)
        self.alive, self.most, self.reads = 0, 0, []

    def picture(self, number: int) -> np.ndarray:
        stripes = 10 * (np.arange(48) // 3 % 2)  # something to see, the same in all
        image = np.minimum(stripes[None, :, None] + self.levels[number], 255).repeat(32, 0).repeat(3, 2)
        image[0, 0] = number, 0, 0
        return image.astype(np.uint8)

    def shots(self) -> Iterator[Shot]:
        for n in range(self.total):
            time = round((100 + n * self.seconds) * 1e9)
            yield Shot(n, self.group, self.group, f"{self.group}_{time}", time, time - 5, "lens", partial(self.read, n))

    def read(self, number: int) -> np.ndarray:
        self.reads.append(number)
        if number in self.bad:
            raise ValueError("expected a picture, got noise")
        image = self.picture(number)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self.died)
        return image

    def died(self) -> None:
        self.alive -= 1


def options(**changes: Any) -> PickOptions:
    return PickOptions(**{
        "count": 3, "gap": 2.0, "rate": 0.0, "classes": CLASSES, "palette": PALETTE, "model": "dark", **changes
    })


def dark(image: np.ndarray) -> float:
    return 1 - float(image.mean()) / 255


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def test_the_darkest_frames_apart_in_time_are_written(tmp_path):
    film = Film([200, 10, 20, 150, 60, 220, 30, 240])
    summary = pick(film, tmp_path / "set", options(), dark)
    assert [entry["number"] for entry in summary.pictures] == [1, 6, 4]  # 2 lies too near to 1
    assert (summary.measured, summary.empty, sum(summary.bad.values())) == (8, 0, 0)
    assert manifest(tmp_path / "set")["pictures"] == summary.pictures
    assert manifest(tmp_path / "set")["complete"] is True
    folder = tmp_path / "set/images/validation"
    stems = [f"cam_{second}000000000" for second in (101, 104, 106)]
    assert sorted(p.name for p in folder.iterdir()) == [f"{s}.{end}" for s in stems for end in ("json", "png")]
    for entry in summary.pictures:
        written = cv2.cvtColor(cv2.imread(str(folder / f"{entry['name']}.png")), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(written, film.picture(entry["number"]))  # without loss
        label = json.loads((folder / f"{entry['name']}.json").read_text())
        assert label["imagePath"] == f"{entry['name']}.png"
        assert (label["shapes"], label["imageHeight"], label["imageWidth"]) == ([], 32, 48)
        assert entry["source"] == "/cam" and entry["frame_id"] == "lens"
        assert entry["stamp"] == entry["recorded"] - 5 == (100 + entry["number"]) * 10**9 - 5
        assert set(entry["measures"]) == set(Quality.__dataclass_fields__)
        assert entry["score"] == score(Quality(**entry["measures"]))
    scores = [entry["score"] for entry in summary.pictures]
    assert scores == sorted(scores, reverse=True)
    listed = json.loads((tmp_path / "set/classes.json").read_text())
    assert listed == {"classes": list(CLASSES), "palette": [list(c) for c in PALETTE]}
    assert (tmp_path / "set/classes.txt").read_text().split() == list(CLASSES)


def test_one_picture_at_a_time_is_in_memory(tmp_path):
    film = Film([10 + n for n in range(200)])
    pick(film, tmp_path / "set", options(count=50, gap=0.0), dark)
    assert film.most <= 2  # one, and the one before until its name is bound again


def test_checksums_are_those_of_the_files(tmp_path):
    import hashlib

    pick(Film([9, 90, 180]), tmp_path / "set", options(count=2), dark)
    for entry in manifest(tmp_path / "set")["pictures"]:
        data = (tmp_path / f"set/images/validation/{entry['name']}.png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_fewer_than_asked_when_the_film_is_short(tmp_path):
    summary = pick(Film([10, 20, 30]), tmp_path / "set", options(count=50, gap=2.0), dark)
    assert [entry["number"] for entry in summary.pictures] == [0, 2]


def test_frames_that_show_nothing_or_cannot_be_read_are_left_out(tmp_path):
    class Closed(Film):
        def picture(self, number: int) -> np.ndarray:
            return np.zeros((32, 48, 3), np.uint8) if number == 1 else super().picture(number)

    summary = pick(Closed([50] * 5, bad=(2,)), tmp_path / "set", options(count=9, gap=0.0), dark)
    assert {entry["number"] for entry in summary.pictures} == {0, 3, 4}
    assert (summary.measured, summary.empty, dict(summary.bad)) == (4, 1, {"unreadable": 1})
    assert summary.messages == ["/cam at 102.000 s: unreadable: expected a picture, got noise"]


def test_a_frame_that_the_disk_or_memory_fails_for_is_named_and_read_again_by_the_next_run(tmp_path):
    class Failing(Film):
        errors = {1: OSError(5, "Input/output error"), 3: MemoryError()}

        def read(self, number: int) -> np.ndarray:
            if number in self.errors:
                raise self.errors[number]
            return super().read(number)

    film = Failing([50, 10, 60, 20])
    summary = pick(film, tmp_path / "set", options(count=1, gap=0.0), dark)
    assert [entry["number"] for entry in summary.pictures] == [0]
    assert (summary.measured, dict(summary.bad)) == (2, {"not_read": 2})
    assert summary.messages == [
        "/cam at 101.000 s: not_read: [Errno 5] Input/output error", "/cam at 103.000 s: not_read: out of memory"
    ]
    film.errors = {}
    summary = pick(film, tmp_path / "set", options(count=1, gap=0.0), dark)
    assert [entry["number"] for entry in summary.pictures] == [1] and not summary.bad


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("expected a picture, got noise")])
def test_a_frame_that_cannot_be_read_again_to_be_written_is_named(error, tmp_path):
    class Once(Film):
        def read(self, number: int) -> np.ndarray:
            if number in self.reads:
                raise error
            return super().read(number)

    with pytest.raises(ValueError, match=r"^/cam: expected to read it as before, got: .*; pick again"):
        pick(Once([50, 60]), tmp_path / "set", options(count=1), dark)


def test_rate_bounds_how_many_frames_are_measured(tmp_path):
    film = Film([100] * 40, seconds=0.1, bad=(10,))
    summary = pick(film, tmp_path / "set", options(count=1, rate=2.0), dark)
    assert summary.measured == 8
    assert film.reads[:-1] == [0, 5, 10, 11, 15, 20, 25, 30, 35]  # a bad frame does not take a good one's place


def test_a_run_that_was_stopped_goes_on(tmp_path):
    levels = [200, 10, 20, 150, 60, 220, 30, 240]
    straight = pick(Film(levels), tmp_path / "straight", options(), dark)

    class Stopped(Film):
        def read(self, number: int) -> np.ndarray:
            if number == 5:
                raise KeyboardInterrupt
            return super().read(number)

    with pytest.raises(KeyboardInterrupt):
        pick(Stopped(levels), tmp_path / "set", options(), dark)
    assert manifest(tmp_path / "set")["complete"] is False
    with (tmp_path / "set/measures.jsonl").open("a") as journal:
        journal.write('{"number": 5, "sour')  # cut in the middle of a line
    film = Film(levels)
    resumed = pick(film, tmp_path / "set", options(), dark)
    assert film.reads == [5, 6, 7, 1, 4, 6]  # the rest is measured, then the chosen ones are written
    assert resumed == straight
    names = sorted(p.relative_to(tmp_path / "set").as_posix() for p in (tmp_path / "set").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_the_same_again_changes_nothing_and_keeps_what_was_labelled(tmp_path):
    out = tmp_path / "set"
    first = pick(Film([10, 200, 20]), out, options(), dark)
    label = out / f"images/validation/{first.pictures[0]['name']}.json"
    label.write_text(json.dumps({"shapes": [{"label": "road"}]}))
    film = Film([10, 200, 20])
    assert pick(film, out, options(), dark) == first
    assert sorted(film.reads) == [0, 2]
    assert json.loads(label.read_text()) == {"shapes": [{"label": "road"}]}


def test_a_class_that_was_appended_while_labelling_stays(tmp_path):
    out = tmp_path / "set"
    [entry] = pick(Film([10]), out, options(count=1), dark).pictures
    listed = json.loads((out / "classes.json").read_text())
    (out / "classes.json").write_text(json.dumps({
        "classes": [*listed["classes"], "puddle"], "palette": [*listed["palette"], [0, 0, 255]],
    }))
    pick(Film([10]), out, options(count=1), dark)
    label(out, entry["name"], box("puddle", 0, 0, 48, 32))
    assert read_labels(out).faults == []
    assert (open_labelled(out, "test")[0].labels == 3).all()
    (out / f"images/validation/{entry['name']}.json").unlink()
    (out / f"annotations/validation/{entry['name']}.png").unlink()
    pick(Film([10]), out, options(count=1, classes=("a", "b", "c")), dark, force=True)
    assert json.loads((out / "classes.json").read_text())["classes"] == ["a", "b", "c"]
    assert (out / "classes.txt").read_text() == "a\nb\nc\n"


def test_other_settings_need_force_and_labels_are_never_lost(tmp_path):
    out = tmp_path / "set"
    pick(Film([10, 200, 20]), out, options(), dark)
    with pytest.raises(ValueError, match=r"other settings: count was 3, is 1; .*--force"):
        pick(Film([10, 200, 20]), out, options(count=1), dark)
    film = Film([10, 200, 20])
    pick(film, out, options(count=1), dark, force=True)
    assert film.reads == [0]  # nothing was measured again
    assert len(list((out / "images/validation").iterdir())) == 2
    other = Film([30, 20, 10])
    pick(other, out, options(count=1), dark, force=True)
    assert other.reads == [0, 1, 2, 2]  # another film is
    [label] = (out / "images/validation").glob("*.json")
    label.write_text(json.dumps({"shapes": [{"label": "road"}]}))
    with pytest.raises(ValueError, match=f"expected no labels to pick anew, found {label.name}"):
        pick(other, out, options(count=2), dark, force=True)
    assert label.exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"expected an empty folder or an earlier set, found thesis\.tex"):
        pick(Film([1]), tmp_path, options(), dark, force=True)
    (tmp_path / "thesis.tex").rename(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="expected the manifest of a set"):
        pick(Film([1]), tmp_path, options(), dark, force=True)
    assert (tmp_path / "manifest.json").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"count": 0}, "count: expected at least 1"), ({"gap": -1.0}, "gap: expected at least 0"),
     ({"rate": float("nan")}, "rate: expected"), ({"classes": ("a", "a")}, "each once, got a"),
     ({"classes": ()}, "at least one name"), ({"palette": ()}, "palette: expected 3 colours, got 0")],
)
def test_options_out_of_range(changes, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        pick(Film([1]), tmp_path / "set", options(**changes), dark)
    assert not (tmp_path / "set").exists()


def test_names_of_files_are_safe_and_differ():
    taken: set[str] = set()
    given = ("/front/image_raw_1", "/front/image_raw 1", "../../etc", "a.png", "...", "Ü")
    assert [file_name(name, taken) for name in given] == [
        "front_image_raw_1", "front_image_raw_1_2", "etc", "a_png", "frame", "frame_2",
    ]


# --- labels


def picked(tmp_path: Path, count: int = 2) -> tuple[Path, list[str]]:
    out = tmp_path / "set"
    summary = pick(Film([10 + n for n in range(count)]), out, options(count=count, gap=0.0), dark)
    return out, sorted(entry["name"] for entry in summary.pictures)


def label(out: Path, name: str, *shapes: dict[str, Any], **changes: Any) -> Path:
    path = out / f"images/validation/{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shapes": list(shapes), **changes}))
    return path


def polygon(name: str, *points: tuple[float, float], kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": name, "points": [list(p) for p in points], "shape_type": kind, "group_id": None, **more}


def box(name: str, x1: float, y1: float, x2: float, y2: float) -> dict[str, Any]:
    return polygon(name, (x1, y1), (x2, y1), (x2, y2), (x1, y2))


def test_round_trip_of_a_drawn_picture(tmp_path):
    """Drawn, read, opened by the reader of ADE20K's layout: every pixel where it was drawn."""
    out, names = picked(tmp_path)
    label(
        out, names[0], box("road", 0, 16, 48, 32), box("person", 10, 8, 14, 24),
        polygon("wall", (30, 20), (40, 10), kind="rectangle"), box("_background_", 0, 30, 48, 32),
    )
    label(out, names[1], polygon("wall", (0, 0), (48, 32), kind="rectangle"))
    expected = np.full((32, 48), 255, np.uint8)
    expected[16:] = 0
    expected[8:24, 10:14] = 2
    expected[10:20, 30:40] = 1
    expected[30:] = 255
    summary = read_labels(out)
    assert (summary.pictures, summary.written, summary.unchanged, summary.faults) == (2, names, [], [])
    for split in ("test", "val"):
        folder = open_labelled(out, split)
        assert (folder.classes, folder.palette.tolist()) == (CLASSES, [list(c) for c in PALETTE])
        assert len(folder) == 2
        np.testing.assert_array_equal(folder[0].labels, expected)
        np.testing.assert_array_equal(folder[1].labels, np.full((32, 48), 1))
        for item, picture in zip(folder, sorted((out / "images/validation").glob("*.png"))):
            np.testing.assert_array_equal(item.image, cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB))
    there = np.concatenate([expected.ravel(), np.full(32 * 48, 1)])
    assert summary.unlabelled == pytest.approx((there == 255).mean())
    assert summary.shares == pytest.approx({n: (there[there < 255] == k).mean() for k, n in enumerate(CLASSES)})


def test_shapes_known_answers():
    size = (40, 50)
    found = draw_shapes([polygon("wall", (20, 15), (20, 5), kind="circle")], CLASSES, size)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    np.testing.assert_array_equal(found == 2, np.hypot(x - 20, y - 15) <= 10)
    assert abs((found == 2).sum() - np.pi * 100) < 8
    triangle = draw_shapes([polygon("road", (5, 5), (45, 5), (5, 35))], CLASSES, size) == 1
    clear = (x - 5) / 40 + (y - 5) / 30
    assert triangle[(x > 5) & (y > 5) & (clear < 0.97)].all()
    assert not triangle[(x < 5) | (y < 5) | (clear > 1.03)].any()
    old = {"label": "road", "points": [[5, 5], [45, 5], [5, 35]], "shape_type": None}  # LabelMe 3 wrote no type
    np.testing.assert_array_equal(draw_shapes([old], CLASSES, size) == 1, triangle)
    diamond = polygon("road", (25, 10), (35, 20), (25, 30), (15, 20), kind="oriented_rectangle")
    found = draw_shapes([diamond], CLASSES, size) == 1
    distance = np.abs(x - 25) + np.abs(y - 20)
    assert found[distance < 9.5].all() and not found[distance > 10.5].any()
    outside = draw_shapes([box("road", -10, -10, 10, 10)], CLASSES, size)
    assert outside[:10, :10].all() and outside.sum() == 100


def test_polygons_that_share_an_edge_share_no_pixel():
    rng = np.random.default_rng(6)
    for _ in range(40):
        middle = [(rng.uniform(5, 45), 0), (rng.uniform(5, 45), rng.uniform(5, 30)), (rng.uniform(5, 45), 40)]
        left = draw_shapes([polygon("road", (0, 0), *middle, (0, 40))], CLASSES, (40, 50)) > 0
        right = draw_shapes([polygon("road", (50, 0), *middle, (50, 40))], CLASSES, (40, 50)) > 0
        assert (left ^ right).all()


def test_masks_of_labelme_lie_in_their_box():
    drawn = np.random.default_rng(7).integers(0, 2, (6, 9)).astype(np.uint8)
    text = base64.b64encode(cv2.imencode(".png", drawn * 255)[1].tobytes()).decode()
    found = draw_shapes([polygon("person", (4, 3), (12, 8), kind="mask", mask=text)], CLASSES, (20, 30))
    expected = np.zeros((20, 30), np.uint16)
    expected[3:9, 4:13] = drawn * 3
    np.testing.assert_array_equal(found, expected)


PNG = base64.b64encode(cv2.imencode(".png", np.ones((2, 2), np.uint8))[1].tobytes()).decode()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (box("raod", 0, 0, 5, 5), r"shape 2: expected one of the classes road, wall, person; got 'raod'"),
        (polygon("road", (0, 0), (5, 5)), r"shape 2 \(road\): expected 3 points for a polygon, got 2"),
        (polygon("road", (0, 0), (5, 5), kind="line"), "expected a shape with an area .* got a line"),
        (polygon("road", (0, 0), (5, 5), (9, 9), kind="circle"), "expected 2 points for a circle, got 3"),
        (polygon("road", (0, 0), (5, 5), (9, float("nan"))), "expected points"),
        ({"label": "road", "points": [[1, 2], [3]]}, r"shape 2 \(road\)"),
        ({"label": "road"}, r"shape 2 \(road\)"),
        ("road", "shape 2: expected one of the classes"),
        ({"label": ["road"], "points": [[0, 0], [5, 5], [9, 9]]}, r"shape 2: expected one of the .*; got \['road'\]"),
        (polygon("road", (0, 0), (5, 5), (5e7, 9)), "expected points near the 30x20 picture, got .*50000000.0, 9"),
        (polygon("road", (0, 0), (5, 5), (9, -1e308)), "expected points near the 30x20 picture"),
        (polygon("road", (0, 0), (1e308, 5), kind="rectangle"), "expected points near the 30x20 picture"),
        (polygon("road", (0, 0), (5, 5), (10**400, 9)), r"shape 2 \(road\): int too large"),
        (polygon("road", (0, 0), (5, 5), kind="mask", mask="!!"), "expected a PNG in base64"),
        (polygon("road", (0, 0), (5, 5), kind="mask"), "expected a PNG in base64"),
        (polygon("road", (0, 0), (5, 5), kind="mask", mask=PNG), "expected 6x6 pixels of its box, got \\(2, 2\\)"),
        (polygon("road", (29, 0), (30, 1), kind="mask", mask=PNG), "expected a box inside 30x20"),
    ],
)
def test_faults_of_shapes(shape, expected):
    with pytest.raises(ValueError, match=expected):
        draw_shapes([box("road", 0, 0, 5, 5), shape], CLASSES, (20, 30))


def test_faults_are_named_with_their_file_and_the_rest_goes_on(tmp_path):
    out, names = picked(tmp_path, 10)
    label(out, names[0], box("road", 0, 0, 48, 32))
    wrong_class = label(out, names[1], box("lava", 0, 0, 48, 32))
    wrong_size = label(out, names[2], box("road", 0, 0, 9, 9), imageWidth=640)
    no_text = label(out, names[6], {**box("road", 0, 0, 48, 32), "label": ["road"]})
    far = label(out, names[7], polygon("road", (0, 0), (5, 5), (1e308, 9)))
    empty = out / f"images/validation/{names[3]}.json"
    (out / f"images/validation/{names[8]}.json").unlink()
    cut = out / f"images/validation/{names[9]}.png"
    cut.write_bytes(cut.read_bytes()[:-12])
    of_cut = label(out, names[9], box("road", 0, 0, 48, 32))
    (out / f"images/validation/{names[4]}.json").unlink()
    broken = out / f"images/validation/{names[5]}.json"
    broken.write_text("{")
    folder = out / f"images/validation/{names[4]}.json"
    folder.mkdir()
    stray = out / "images/validation/someone.json"
    stray.write_text("{}")
    summary = read_labels(out)
    assert summary.written == names[:1]
    found = {fault.file: fault.message for fault in summary.faults}
    assert "got 'lava'" in found.pop(wrong_class)
    assert "got ['road']" in found.pop(no_text)
    assert "expected points near the 48x32 picture" in found.pop(far)
    assert "expected labels of its 48x32 picture, got 640x32" in found.pop(wrong_size)
    assert "not labelled yet" in found.pop(empty)
    assert "expected one file of labels" in found.pop(out / f"images/validation/{names[8]}.png")
    assert "Is a directory" in found.pop(folder)
    assert f"{cut}: expected a whole picture, got one cut short" in found.pop(of_cut)
    assert "expected a file of LabelMe" in found.pop(broken)
    assert "no picture of this name" in found.pop(stray)
    assert not found
    assert [p.stem for p in (out / "annotations/validation").iterdir()] == names[:1]
    assert open_labelled(out, "test").names == (f"validation/{names[0]}",)  # the set opens with what is labelled


def test_reading_again_is_quiet_and_changes_need_force(tmp_path):
    out, names = picked(tmp_path, 1)
    label(out, names[0], box("road", 0, 0, 48, 32))
    assert read_labels(out).written == names
    again = read_labels(out)
    assert (again.written, again.unchanged, again.faults) == ([], names, [])
    label(out, names[0], box("wall", 0, 0, 48, 32))
    refused = read_labels(out)
    assert [fault.file for fault in refused.faults] == [out / f"annotations/validation/{names[0]}.png"]
    assert "--force" in refused.faults[0].message
    assert (open_labelled(out, "test")[0].labels == 0).all()
    assert read_labels(out, force=True).written == names
    assert (open_labelled(out, "test")[0].labels == 1).all()


@pytest.mark.parametrize("indexed", [False, True])
def test_indexed_pngs(indexed, tmp_path):
    out, names = picked(tmp_path)
    labels = np.random.default_rng(8).integers(0, 4, (32, 48)).astype(np.uint8)
    folder = tmp_path / "labels"
    folder.mkdir()
    if indexed:
        write_label_map(folder / f"{names[0]}.png", labels, np.array([(0, 0, 0), (9, 9, 9), *PALETTE[:2]], np.uint8))
    else:
        cv2.imwrite(str(folder / f"{names[0]}.png"), labels)
    cv2.imwrite(str(folder / f"{names[1]}.png"), labels + 1)
    summary = read_labels(out, folder)
    assert summary.written == names[:1]
    assert [(f.file.stem, f.message) for f in summary.faults] == [(names[1], "expected labels 0..3, got 4")]
    expected = np.where(labels == 0, 255, labels.astype(int) - 1)
    np.testing.assert_array_equal(open_labelled(out, "test")[0].labels, expected)


def cvat(folder: Path, lines: str) -> Path:
    (folder / "SegmentationClass").mkdir(parents=True)
    (folder / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + lines)
    return folder / "SegmentationClass"


def test_masks_of_cvat(tmp_path):
    out, names = picked(tmp_path, 4)
    masks = cvat(tmp_path / "cvat", "background:0,0,0::\nperson:10,20,30::\nroad:200,0,0::\ncat:1,2,3::\n")
    labels = np.random.default_rng(9).integers(0, 3, (32, 48))  # background, person, road
    colours = np.array([(0, 0, 0), (10, 20, 30), (200, 0, 0)], np.uint8)[labels]
    for name, rgb in zip(names, (colours, colours + np.uint8(1), np.full_like(colours, (1, 2, 3)), colours[:9])):
        cv2.imwrite(str(masks / f"{name}.png"), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    summary = read_labels(out, tmp_path / "cvat")
    assert summary.written == names[:1]
    np.testing.assert_array_equal(open_labelled(out, "test")[0].labels, np.array([255, 2, 0])[labels])
    said = [fault.message for fault in summary.faults]
    assert said[0].startswith("expected colours of labelmap.txt, got 0x0")
    assert said[1:] == [
        "expected one of the classes road, wall, person; got 'cat'", "expected 48x32 pixels of its picture, got 48x9",
    ]


def test_grey_masks_of_cvat_count_the_lines(tmp_path):
    out, names = picked(tmp_path, 1)
    masks = cvat(tmp_path / "cvat", "background:0,0,0::\nperson:10,20,30::\nroad:200,0,0::\n")
    labels = np.random.default_rng(10).integers(0, 3, (32, 48)).astype(np.uint8)
    cv2.imwrite(str(masks / f"{names[0]}.png"), labels)
    assert read_labels(out, tmp_path / "cvat").faults == []
    np.testing.assert_array_equal(open_labelled(out, "test")[0].labels, np.array([255, 2, 0])[labels])


def test_what_is_no_set_and_no_labels(tmp_path):
    with pytest.raises(ValueError, match="expected a set that `glesam reallq pick` made, found no manifest.json"):
        read_labels(tmp_path)
    out, names = picked(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="expected a folder of labels"):
        read_labels(out, tmp_path / "nowhere")
    masks = cvat(tmp_path / "cvat", "person 10 20 30\n")
    assert masks.is_dir()
    with pytest.raises(ValueError, match=r'labelmap\.txt: expected lines "name:r,g,b::", got'):
        read_labels(out, tmp_path / "cvat")


@pytest.mark.parametrize(("count", "dtype", "ignore"), [(255, np.uint8, 255), (256, np.uint16, 65535)])
def test_beyond_255_classes_labels_have_16_bits(count, dtype, ignore, tmp_path):
    names = tuple(f"class {n}" for n in range(count))
    palette = tuple((n % 256, n // 256, 7) for n in range(count))
    out = tmp_path / "set"
    pick(Film([10]), out, options(count=1, classes=names, palette=palette), dark)
    [path] = (out / "images/validation").glob("*.json")
    label(out, path.stem, box(names[-1], 0, 0, 48, 16), box("class 0", 0, 16, 48, 30))
    assert read_labels(out).faults == []
    labels = open_labelled(out, "test")[0].labels
    assert labels.dtype == dtype
    assert (labels[:16] == count - 1).all() and (labels[16:30] == 0).all() and (labels[30:] == ignore).all()
