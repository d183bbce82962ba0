"""The processing size that keeps frames within a time: where it settles, and when a larger one is tried again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from bright_model import BrightRegions

from glesam_ros import Settings
from glesam_ros.models import OutOfMemory
from glesam_ros.pace import FRAMES, GOOD_FRAMES, MOST_GOOD_FRAMES, SETTLING, Pace, smaller
from glesam_ros.pipeline import Pipeline


def paced(limit_ms: int, own_size: int = 512, asked: int = 0) -> Pace:
    pace = Pace(own_size)
    pace.ask(asked, limit_ms)
    return pace


def run(pace: Pace, seconds: Callable[[int], float], frames: int) -> list[int]:
    """The size of each of so many frames, of which one takes `seconds(size)`."""
    sizes = []
    for _ in range(frames):
        sizes.append(pace.now)
        pace.took(seconds(pace.now))
    return sizes


def square(at_512: float) -> Callable[[int], float]:
    return lambda size: at_512 * (size / 512) ** 2


@pytest.mark.parametrize(("size", "own", "step", "lower"), [
    (512, 512, 64, 448), (400, 512, 64, 384), (300, 512, 64, 256), (256, 512, 64, 256), (200, 512, 64, 200),
    (512, 512, 128, 384), (1024, 1024, 128, 896), (1000, 1024, 128, 896), (640, 1024, 128, 512), (400, 1024, 128, 400),
    (449, 512, 64, 448),
])
def test_sizes_below(size: int, own: int, step: int, lower: int) -> None:
    assert smaller(size, own, step) == lower


@pytest.mark.parametrize(("at_512", "limit_ms", "settles_at"), [
    (0.05, 60, 512), (0.06, 60, 512), (0.075, 60, 448), (0.1, 60, 384), (0.15, 60, 320), (0.9, 60, 256), (0.2, 0, 512),
])
def test_it_settles_at_the_largest_size_that_keeps_within_the_limit(
    at_512: float, limit_ms: int, settles_at: int
) -> None:
    sizes = run(paced(limit_ms), square(at_512), 2000)
    assert set(sizes[4 * (SETTLING + FRAMES):]) == {settles_at}


def test_a_few_frames_are_enough_for_a_step_down() -> None:
    sizes = run(paced(60), square(0.2), 100)
    assert [sizes.index(size) for size in (448, 384, 320)] == [k * (SETTLING + FRAMES) for k in (1, 2, 3)]


def test_single_slow_frames_change_nothing() -> None:
    pace = paced(60)
    for k in range(1000):
        pace.took(0.5 if k % 3 == 0 else 0.04)
    assert pace.now == 512


def test_it_grows_back_when_there_is_time_again_a_step_at_a_time() -> None:
    pace = paced(60)
    run(pace, square(0.4), 100)
    assert pace.now == 256
    sizes = run(pace, square(0.04), 300)
    ups = [sizes.index(size) for size in (320, 384, 448, 512)]
    # the last slow frames leave the median first
    assert GOOD_FRAMES <= ups[0] <= GOOD_FRAMES + FRAMES
    assert np.diff(ups).tolist() == 3 * [SETTLING + FRAMES - 1 + GOOD_FRAMES]
    assert set(sizes[ups[3]:]) == {512}


def test_the_next_size_is_not_tried_where_it_would_not_fit() -> None:
    pace = paced(60)
    run(pace, square(0.4), 100)
    # 320 would take 0.061 s
    assert set(run(pace, lambda size: 0.039, 5 * GOOD_FRAMES)) == {256}
    assert 320 in run(pace, lambda size: 0.038, 2 * GOOD_FRAMES)


def test_frames_that_leave_time_count_in_a_row_only() -> None:
    pace = paced(60)
    run(pace, square(0.9), 100)
    for _ in range(4):
        # of each run of frames that would leave time the medians are good but for the first two
        assert set(run(pace, lambda size: 0.03, GOOD_FRAMES - 5)) == {256}
        run(pace, lambda size: 0.9, FRAMES)
    run(pace, lambda size: 0.05, GOOD_FRAMES)  # within the limit, but no time for more
    assert run(pace, lambda size: 0.03, 2 * GOOD_FRAMES).index(320) == GOOD_FRAMES + 2


@pytest.mark.parametrize(("held", "wait"), [
    (2, 2 * GOOD_FRAMES), (GOOD_FRAMES - 1, 2 * GOOD_FRAMES), (GOOD_FRAMES, GOOD_FRAMES),
])
def test_a_trial_has_failed_where_it_held_for_less_than_the_wait(held: int, wait: int) -> None:
    pace = paced(60)
    run(pace, square(0.07), 30)
    while pace.now == 448:
        pace.took(0.04)
    # two slow frames do not change the median yet
    run(pace, lambda size: 0.04, SETTLING + FRAMES - 1 + held - 2)
    assert run(pace, lambda size: 0.2, 3) == [512] * 3 and pace.now == 448
    assert run(pace, lambda size: 0.04, 4 * GOOD_FRAMES).index(512) == SETTLING + FRAMES - 1 + wait


def test_trials_that_fail_become_rare() -> None:
    # grows faster than the square, so that the forecast is wrong each time
    sizes = run(paced(60), lambda size: 0.02 if size <= 448 else 0.2, 4 * MOST_GOOD_FRAMES)
    trials = [k for k in range(1, len(sizes)) if (sizes[k - 1], sizes[k]) == (448, 512)]
    waits = np.diff(trials) - 2 * (SETTLING + FRAMES) + 1
    assert waits[:3].tolist() == [GOOD_FRAMES * 2**k for k in (1, 2, 3)]
    assert len(trials) < 12


def test_a_step_down_long_after_a_trial_does_not_make_the_next_one_late() -> None:
    pace = paced(60)
    for _ in range(4):
        run(pace, square(0.07), 30)
        assert pace.now == 448
        sizes = run(pace, square(0.04), 200)
        assert sizes.index(512) <= GOOD_FRAMES + 2 * FRAMES + SETTLING


def test_too_slow_even_at_the_least_size_is_said_until_it_is_not() -> None:
    pace = paced(60)
    run(pace, square(0.9), 200)
    assert pace.is_late and str(pace) == "processing size 256 of 512"
    run(pace, square(0.1), FRAMES)
    assert not pace.is_late


def test_without_a_limit_no_frame_is_late() -> None:
    pace = paced(0)
    assert not pace.is_late
    run(pace, square(9.0), 200)
    assert not pace.is_late and pace.now == 512


def test_a_log_line_at_each_step_and_none_at_other_frames(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pace = paced(60)
    # down by two steps, then up by one; a message of what was at its time
    for at_512, frames, expected in ((0.1, 200, ["448", "384"]), (0.07, 200, ["448"])):
        caplog.clear()
        run(pace, square(at_512), frames)
        sizes = [record.message.partition("processing size ")[2] for record in caplog.records]
        assert sizes == [f"{size} of 512 from now on" for size in expected]
    # at the least size there is no step left
    pace, _ = paced(1), caplog.clear()
    run(pace, square(1.0), 200)
    assert pace.now == 256 and len(caplog.records) == 4


def test_other_numbers_begin_anew_the_same_ones_do_not() -> None:
    pace = paced(60)
    run(pace, square(0.9), 200)
    pace.ask(0, 60)
    assert pace.now == 256 and pace.is_late
    pace.ask(0, 70)
    assert pace.now == pace.full == 512 and not pace.is_late
    run(pace, square(0.9), 200)
    pace.ask(400, 70)
    assert run(pace, square(0.9), 200)[0] == 400 and pace.now == 256
    pace.ask(400, 0)
    assert pace.now == 400


def test_what_is_asked_is_passed_on_as_it_is_where_time_is_plenty() -> None:
    pace = paced(60)
    assert [pace.fit(size) for size in (0, 300, 512)] == [0, 300, 512]
    run(pace, square(0.1), 30)
    assert [pace.fit(size) for size in (0, 300, 384, 512)] == [384, 300, 384, 384]


class Slow(BrightRegions):
    """Remembers the sizes that it was asked for; lacks memory above `room`."""

    own_size = 512
    thresholds = (0.15, 0.5)

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.room = 1024

    def encode(self, image, budget):  # type: ignore[no-untyped-def]
        self.sizes.append(budget.processing_size)
        if (budget.processing_size or self.own_size) > self.room:
            raise OutOfMemory("expected room")
        return super().encode(image, budget)


IMAGE = np.zeros((48, 64, 3), np.uint8)


def test_segment_tells_what_a_frame_took_and_takes_the_size() -> None:
    pipe = Pipeline(Slow(), Settings(frame_budget_ms=1))
    pipe.pace.took = lambda seconds: Pace.took(pipe.pace, seconds + 1)  # type: ignore[method-assign]
    for _ in range(4 * (SETTLING + FRAMES) + 1):
        assert pipe.segment(IMAGE).masks.shape[1:] == (48, 64)
    assert list(dict.fromkeys(pipe.model.sizes)) == [0, 448, 384, 320, 256]  # type: ignore[attr-defined]
    pipe.settings = pipe.settings.replace(frame_budget_ms=0)
    pipe.segment(IMAGE)
    assert pipe.model.sizes[-1] == 0  # type: ignore[attr-defined]


def test_what_a_frame_took_is_its_own_time_without_that_of_failed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = [100.0], []

    class Timed(Slow):
        def encode(self, image, budget):  # type: ignore[no-untyped-def]
            clock[0] += 2
            return super().encode(image, budget)

        def propose(self, *arguments):  # type: ignore[no-untyped-def]
            clock[0] += 0.5
            return super().propose(*arguments)

    monkeypatch.setattr("glesam_ros.pipeline.time.perf_counter", lambda: clock[0])
    pipe = Pipeline(model := Timed(), Settings(frame_budget_ms=60))
    pipe.pace.took = told.append  # type: ignore[method-assign]
    pipe.segment(IMAGE)
    model.room = 384
    pipe.segment(IMAGE)
    assert model.sizes == [0, 0, 384] and told == [2.5, 2.5]


def test_where_memory_and_time_lack_the_smaller_size_holds_and_the_ladder_ends() -> None:
    pipe = Pipeline(model := Slow(), Settings(frame_budget_ms=60, points_per_batch=1))
    for _ in range(SETTLING + FRAMES):
        pipe.pace.took(0.1)
    pipe.segment(IMAGE)
    assert model.sizes == [448]
    model.room = 320
    pipe.segment(IMAGE)
    # the ladder's first step, 384, is not enough
    assert model.sizes == [448, 448, 384, 256]
    model.room = 200
    with pytest.raises(OutOfMemory, match="take a smaller model"):
        pipe.segment(IMAGE)
