"""The out-of-memory ladder, alone and in the pipeline, with a model whose memory is a number."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from glesam_ros import Pipeline, Settings
from glesam_ros.memory import GOOD_FRAMES, MOST_GOOD_FRAMES, MemoryLadder
from glesam_ros.models import Budget, Candidates, Embedding, OutOfMemory

IMAGE = np.zeros((48, 64, 3), np.uint8)


def ladder(size: int = 0, batch: int = 64, own: int = 1024) -> MemoryLadder:
    found = MemoryLadder(own)
    found.ask(size, batch)
    return found


def now(memory: MemoryLadder) -> tuple[int, int]:
    return memory.now.size, memory.now.batch


def lack(memory: MemoryLadder, stage: Any, times: int = 1) -> list[tuple[int, int]]:
    """Let memory lack so often, in calls that take what they may; the rungs after each."""
    rungs = []
    for _ in range(times):
        memory.lacked(stage, Budget(memory.now.size, points_per_batch=memory.now.batch))
        rungs.append(now(memory))
    return rungs


class Simulated:
    """A device where only some rungs fit; `frame` is what the pipeline does with one."""

    def __init__(self, memory: MemoryLadder, fits: Any) -> None:
        self.memory, self.fits = memory, fits
        self.failures: list[int] = []
        self.frames = 0

    def frame(self) -> None:
        self.frames += 1
        if self.fits(*now(self.memory)):
            self.memory.went_well()
        else:
            self.failures.append(self.frames)
            lack(self.memory, "encode")


class TestRungs:
    def test_encoding_shrinks_the_image_then_the_batch(self) -> None:
        memory = ladder()
        assert lack(memory, "encode", 7) == [
            (896, 64), (768, 64), (640, 64), (512, 64), (512, 32), (512, 16), (512, 8)
        ]
        assert not memory.is_exhausted
        assert lack(memory, "encode") == [(512, 8)]
        assert memory.is_exhausted and memory.failures == 8

    def test_decoding_halves_the_batch_then_shrinks_the_image(self) -> None:
        memory = ladder(batch=50)
        assert lack(memory, "decode", 7) == [
            (1024, 25), (1024, 12), (1024, 8), (896, 8), (768, 8), (640, 8), (512, 8)
        ]
        lack(memory, "decode")
        assert memory.is_exhausted

    @pytest.mark.parametrize(("size", "own", "sizes"), [
        (992, 1024, [896, 768, 640, 512]),
        (768, 1024, [640, 512]),
        (512, 1024, []),
        (320, 1024, []),
        (0, 512, [384, 256]),
        (1024, 512, [896, 768, 640, 512, 384, 256]),
    ])
    def test_sizes_go_by_128_down_to_half_of_the_own_one(self, size: int, own: int, sizes: list[int]) -> None:
        memory = ladder(size, 8, own)
        assert [s for s, _ in lack(memory, "encode", len(sizes))] == sizes
        assert not memory.is_exhausted
        assert lack(memory, "encode") == [(sizes[-1] if sizes else size, 8)]
        assert memory.is_exhausted

    def test_a_small_batch_is_not_raised(self) -> None:
        assert lack(ladder(batch=3), "decode", 2) == [(896, 3), (768, 3)]

    def test_two_calls_at_once_cost_one_rung_of_a_kind(self) -> None:
        memory = ladder()
        memory.lacked("decode", Budget(0, points_per_batch=64))
        memory.lacked("decode", Budget(0, points_per_batch=64))
        assert now(memory) == (1024, 32) and memory.failures == 2
        memory.lacked("encode", Budget(0, points_per_batch=64))  # its size is still that of now
        assert now(memory) == (896, 32)
        memory.lacked("encode", Budget(0, points_per_batch=32))
        assert now(memory) == (896, 32)

    def test_in_words(self) -> None:
        memory = ladder()
        lack(memory, "decode", 2)
        lack(memory, "encode", 2)
        assert str(memory) == "processing size 768 of 1024, 16 of 64 prompts a batch"


class TestBudgets:
    def test_at_the_top_a_budget_stays_as_it_is(self) -> None:
        allowed = Budget(0, 16, 64, 1, 0.9, 0.5)
        assert ladder().fit(allowed) is allowed

    def test_below_only_size_and_batch_change(self) -> None:
        memory = ladder()
        lack(memory, "encode")
        lack(memory, "decode")
        allowed = Budget(0, 16, 64, 1, 0.9, 0.5)
        assert memory.fit(allowed) == replace(allowed, processing_size=896, points_per_batch=32)

    def test_a_budget_of_other_settings_is_left_alone(self) -> None:
        memory = ladder(512)
        lack(memory, "decode")
        assert memory.fit(Budget(1024, points_per_batch=64)) == Budget(1024, points_per_batch=64)


class TestClimbing:
    def test_the_last_step_is_taken_back_first_each_after_enough_good_frames(self) -> None:
        memory = ladder()
        lack(memory, "encode")
        lack(memory, "decode")
        for rung in ((896, 64), (1024, 64)):
            for _ in range(GOOD_FRAMES - 1):
                memory.went_well()
            assert now(memory) != rung
            memory.went_well()
            assert now(memory) == rung
        for _ in range(10 * GOOD_FRAMES):
            memory.went_well()
        assert now(memory) == (1024, 64)

    def test_a_lack_in_between_begins_the_count_anew(self) -> None:
        memory = ladder()
        lack(memory, "decode", 2)
        for _ in range(GOOD_FRAMES - 1):
            memory.went_well()
        lack(memory, "encode")
        for _ in range(GOOD_FRAMES - 1):
            memory.went_well()
        assert now(memory) == (896, 16)

    def test_trials_that_fail_at_once_become_rare(self) -> None:
        device = Simulated(ladder(), lambda size, _: size <= 768)
        for _ in range(20 * MOST_GOOD_FRAMES):
            device.frame()
        first, second, *trials = device.failures
        assert (first, second) == (1, 2)
        waits = np.diff([second, *trials]).tolist()
        # each wait is followed by the frame that fails
        doubling = [GOOD_FRAMES * 2**k + 1 for k in range(7)]
        assert waits[:7] == doubling
        assert set(waits[6:]) == {MOST_GOOD_FRAMES + 1} and len(waits) > 20

    def test_after_the_top_has_held_the_wait_is_short_again(self) -> None:
        room = 768
        device = Simulated(ladder(), lambda size, _: size <= room)
        for _ in range(20 * GOOD_FRAMES):
            device.frame()
        assert len(device.failures) > 4
        room = 1024
        while now(device.memory) != (1024, 64):
            device.frame()
        for _ in range(MOST_GOOD_FRAMES):
            device.frame()
        lack(device.memory, "encode")
        for _ in range(GOOD_FRAMES):
            device.frame()
        assert now(device.memory) == (1024, 64)

    def test_a_lack_long_after_a_climb_is_no_failed_trial(self) -> None:
        memory = ladder()
        lack(memory, "encode")
        for _ in range(2 * GOOD_FRAMES):
            memory.went_well()
        lack(memory, "encode")
        for _ in range(GOOD_FRAMES):
            memory.went_well()
        assert now(memory) == (1024, 64)

    def test_a_trial_that_costs_several_rungs_has_failed_once(self) -> None:
        memory = ladder()
        lack(memory, "encode", 2)
        for _ in range(GOOD_FRAMES):
            memory.went_well()
        # back from the trial of 896 and further down
        assert lack(memory, "encode", 3) == [(768, 64), (640, 64), (512, 64)]
        for _ in range(2 * GOOD_FRAMES):
            memory.went_well()
        assert now(memory) == (640, 64)

    def test_other_numbers_begin_anew_the_same_ones_do_not(self) -> None:
        memory = ladder()
        lack(memory, "encode", 3)
        memory.ask(0, 64)
        assert now(memory) == (640, 64)
        memory.ask(0, 32)
        assert now(memory) == (1024, 32)
        lack(memory, "decode")
        memory.ask(768, 32)
        assert now(memory) == (768, 32) and memory.full == memory.now


class Tight:
    """A model with room for so many pixels and prompts; every answer is a mask of the whole image."""

    name, device = "tight", "a device"
    classes: tuple[str, ...] = ("object",)
    own_size = 1024
    thresholds = (0.15, 0.5)

    def __init__(self, size: int = 1024, batch: int = 1024, *, overlaps: bool = False) -> None:
        self.room, self.batch, self.overlaps = size, batch, overlaps
        self.enhance_room = 1024
        self.budgets: list[tuple[str, int, int]] = []
        self.degradation = 1.0
        self.inside = 0
        self.freed: list[int] = []
        self.arrays: list[weakref.ref[Any]] = []

    def _array(self) -> Any:
        array = np.zeros((1, 1, 4, 4), np.float32)
        self.arrays.append(weakref.ref(array))
        return array

    def alive(self) -> int:
        return sum(array() is not None for array in self.arrays)

    def encode(self, image: Any, budget: Budget) -> Embedding:
        self.budgets.append(("encode", budget.processing_size, budget.points_per_batch))
        self.size = budget.processing_size or self.own_size
        activations = self._array()
        if self.size > self.room:
            raise OutOfMemory(f"expected room for {self.size} px, got {self.room}")
        return Embedding(activations, image.shape[:2], self.degradation)

    def enhance(self, embedding: Embedding) -> Embedding:
        if self.size > self.enhance_room:
            raise OutOfMemory("expected room to enhance")
        return replace(embedding, enhanced=True)

    def propose(self, embedding: Embedding, score_threshold: float, limit: int, budget: Budget) -> Candidates:
        return self._decode(embedding, 1, budget)

    def prompt(self, embedding: Embedding, points: Any, labels: Any, budget: Budget) -> Candidates:
        return self._decode(embedding, len(points), budget)

    def _decode(self, embedding: Embedding, count: int, budget: Budget) -> Candidates:
        self.budgets.append(("decode", budget.processing_size, budget.points_per_batch))
        activations = self._array()
        if budget.points_per_batch > self.batch:
            raise OutOfMemory(f"expected room for {budget.points_per_batch} prompts, got {self.batch}")
        return Candidates(activations[0].repeat(count, 0) + 5, np.ones(count, np.float32))

    def free(self) -> None:
        self.freed.append(self.alive())

    def close(self) -> None: ...


def pipeline(model: Tight, **settings: Any) -> Pipeline:
    return Pipeline(model, Settings(**{"min_area": 0, "enhancement": "off", **settings}))


class TestPipeline:
    def test_a_lack_costs_a_frame_and_the_next_takes_less(self) -> None:
        model = Tight(size=768)
        pipe = pipeline(model)
        for size in (896, 768):
            with pytest.raises(OutOfMemory, match=f"expected room for .*; next: processing size {size} of 1024, 64 of"):
                pipe.encode(IMAGE)
        embedding = pipe.encode(IMAGE)
        assert [size for _, size, _ in model.budgets] == [0, 896, 768]
        assert len(pipe.decode(embedding)) == 1

    @pytest.mark.parametrize("prompts", [{}, {"points": [(3, 3)]}, {"boxes": [(1, 1, 9, 9), (2, 2, 8, 8)]}])
    def test_a_lack_in_decode_halves_the_batch(self, prompts: dict[str, Any]) -> None:
        model = Tight(batch=16)
        pipe = pipeline(model)
        embedding = pipe.encode(IMAGE)
        for _ in range(2):
            with pytest.raises(OutOfMemory):
                pipe.decode(embedding, **prompts)
        assert len(pipe.decode(embedding, **prompts)) == len(prompts.get("boxes", [0]))
        assert model.budgets[1:] == [("decode", 0, 64), ("decode", 1024, 32), ("decode", 1024, 16)]

    def test_a_lack_in_enhancement_shrinks_the_image(self) -> None:
        model = Tight()
        model.enhance_room = 896
        pipe = pipeline(model, enhancement="always")
        with pytest.raises(OutOfMemory):
            pipe.encode(IMAGE)
        assert pipe.encode(IMAGE).enhanced and now(pipe.memory) == (896, 64)

    def test_what_the_failed_frame_held_is_gone_before_the_model_frees(self) -> None:
        model = Tight(size=512, batch=32)
        model.enhance_room = 256
        pipe = pipeline(model, enhancement="always")
        # a wrapper that keeps an error in its own frame makes a cycle, as torch's do
        encode = model.encode

        def keeping(image: Any, budget: Budget) -> Embedding:
            kept = None
            try:
                return encode(image, budget)
            except OutOfMemory as error:
                kept = error
            raise kept

        model.encode = keeping  # type: ignore[method-assign]
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(OutOfMemory):
                    pipe.encode(IMAGE)
        finally:
            gc.enable()
        assert model.freed == [0] * 5

    def test_the_model_is_not_freed_during_another_call(self) -> None:
        model = Tight(size=896, overlaps=True)
        pipe = pipeline(model)
        decoding, go_on = threading.Event(), threading.Event()
        order: list[str] = []
        propose, free = model.propose, model.free

        def slowly(*arguments: Any) -> Candidates:
            decoding.set()
            assert go_on.wait(10)
            order.append("decoded")
            return propose(*arguments)

        def noting() -> None:
            order.append("freed")
            free()

        model.propose, model.free = slowly, noting  # type: ignore[method-assign]
        embedding = Embedding(np.zeros((1, 1, 4, 4), np.float32), (48, 64), 0.0)
        decoder = threading.Thread(target=pipe.decode, args=(embedding,))
        decoder.start()
        assert decoding.wait(10)
        failed: list[str] = []

        def encode() -> None:
            try:
                pipe.encode(IMAGE)
            except OutOfMemory as error:
                failed.append(str(error))

        encoder = threading.Thread(target=encode)
        encoder.start()
        encoder.join(0.1)
        assert encoder.is_alive() and order == []
        go_on.set()
        encoder.join(10)
        decoder.join(10)
        assert order == ["decoded", "freed"] and len(failed) == 1

    def test_both_halves_may_lack_at_the_same_time(self) -> None:
        model = Tight(size=512, batch=8, overlaps=True)
        pipe = pipeline(model)
        embedding = Embedding(np.zeros((1, 1, 4, 4), np.float32), (48, 64), 0.0)

        def until_it_fits(call: Any, argument: Any) -> None:
            for _ in range(20):
                try:
                    call(argument)
                    return
                except OutOfMemory:
                    pass

        threads = [
            threading.Thread(target=until_it_fits, args=arguments)
            for arguments in ((pipe.encode, IMAGE), (pipe.decode, embedding))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert now(pipe.memory) == (512, 8)

    def test_segment_goes_down_until_it_fits(self) -> None:
        pipe = pipeline(Tight(size=640, batch=32))
        assert len(pipe.segment(IMAGE)) == 1
        assert now(pipe.memory) == (640, 32) and pipe.memory.failures == 4

    @pytest.mark.parametrize("room", [{"size": 0}, {"batch": 0}])
    @pytest.mark.parametrize("call", [Pipeline.segment, Pipeline.warm_up])
    def test_where_nothing_fits_the_error_says_what_to_do(self, room: dict[str, int], call: Any) -> None:
        pipe = pipeline(Tight(**room))
        with pytest.raises(OutOfMemory, match="at least processing size 512 of 1024, 8 of 64 .* on a device.*smaller"):
            call(pipe, IMAGE)
        assert pipe.memory.failures == 8
        with pytest.raises(OutOfMemory):
            call(pipe, IMAGE)
        assert pipe.memory.failures == 9

    @pytest.mark.parametrize(("mode", "enhanced"), [("off", 0), ("auto", 1), ("always", 1)])
    def test_warm_up_enhances_whatever_the_level_and_goes_down_until_it_fits(self, mode: str, enhanced: int) -> None:
        model = Tight(batch=16)
        model.degradation, model.enhance_room = 0.0, 896
        pipe = pipeline(model, enhancement=mode)
        pipe.warm_up(IMAGE)
        assert now(pipe.memory) == ((896, 16) if enhanced else (1024, 16))
        assert pipe.settings.enhancement == mode

    def test_live_settings(self) -> None:
        pipe = pipeline(Tight(size=768))
        pipe.segment(IMAGE)
        pipe.settings = pipe.settings.replace(score_threshold=0.5, crop_layers=1)
        assert now(pipe.memory) == (768, 64)
        pipe.settings = pipe.settings.replace(points_per_batch=32)
        assert now(pipe.memory) == (1024, 32)
        pipe.segment(IMAGE)
        assert now(pipe.memory) == (768, 32)
        pipe.settings = pipe.settings.replace(processing_size=640)
        assert now(pipe.memory) == (640, 32)

    def test_frames_that_are_only_encoded_climb_frames_that_fail_to_decode_do_not(self) -> None:
        model = Tight(size=896)
        pipe = pipeline(model)
        pipe.segment(IMAGE)
        model.room, model.batch = 1024, 0
        for _ in range(2 * GOOD_FRAMES):
            with pytest.raises(OutOfMemory):
                pipe.segment(IMAGE)
        assert now(pipe.memory) == (512, 8)
        for _ in range(GOOD_FRAMES):
            pipe.encode(IMAGE)
        assert now(pipe.memory) == (640, 8)

    def test_a_log_line_at_each_step_and_none_at_other_frames(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Tight(size=768)
        pipe = pipeline(model)
        with caplog.at_level(logging.INFO, "glesam_ros"):
            pipe.segment(IMAGE)
            model.room = 1024
            for _ in range(3 * GOOD_FRAMES):
                pipe.segment(IMAGE)
        assert [(r.levelname, r.getMessage().split(": ", 1)[1].split(",")[0]) for r in caplog.records] == [
            ("WARNING", "processing size 896 of 1024"),
            ("WARNING", "processing size 768 of 1024"),
            ("INFO", "processing size 896 of 1024"),
            ("INFO", "processing size 1024 of 1024"),
        ]

    def test_other_faults_are_no_lack_of_memory(self) -> None:
        model = Tight()
        pipe = pipeline(model)

        def fail(*_: Any) -> Any:
            raise RuntimeError("broken")

        model.encode = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="broken"):
            pipe.segment(IMAGE)
        assert pipe.memory.failures == 0 and model.freed == []


class TestOverlap:
    @pytest.mark.parametrize("overlaps", [True, False])
    def test_decoding_goes_on_beside_encoding_only_where_the_model_overlaps(self, overlaps: bool) -> None:
        model = Tight(overlaps=overlaps)
        pipe = pipeline(model)
        embedding = pipe.encode(IMAGE)
        encoding, go_on = threading.Event(), threading.Event()
        encode = model.encode

        def slowly(*arguments: Any) -> Embedding:
            encoding.set()
            go_on.wait(10)
            return encode(*arguments)

        model.encode = slowly  # type: ignore[method-assign]
        encoder = threading.Thread(target=pipe.encode, args=(IMAGE,))
        encoder.start()
        assert encoding.wait(10)
        decoder = threading.Thread(target=pipe.decode, args=(embedding,))
        decoder.start()
        decoder.join(10 if overlaps else 0.1)
        assert decoder.is_alive() is not overlaps
        go_on.set()
        encoder.join(10)
        decoder.join(10)
