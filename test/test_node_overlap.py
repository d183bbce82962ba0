"""Two threads where the model overlaps: one decodes and publishes a frame while the other is with the next."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
import weakref
from collections import deque

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.clock import Clock, ClockType
from ros_graph import image_message, picture, wait_for
from sensor_msgs.msg import Image

from glesam_ros import Pipeline, Settings
from glesam_ros.models import Candidates, Embedding, OutOfMemory
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.scheduling import Frame, HandOver
from glesam_ros.ros.worker import Worker

SQUARE = (20, 20, 60, 60)
TIMEOUT_S = 10.0


class TestHandOver:
    def test_the_giver_waits_until_the_taker_has_it(self):
        hand_over = HandOver()
        given = []
        giver = threading.Thread(target=lambda: given.append(hand_over.give("frame")))
        giver.start()
        giver.join(0.1)
        assert giver.is_alive() and not given
        assert hand_over.take() == "frame"
        giver.join(TIMEOUT_S)
        assert given == [True]

    def test_close_frees_a_waiting_giver_and_its_item(self):
        hand_over = HandOver()
        item = np.zeros(1)
        ref = weakref.ref(item)
        given = []
        giver = threading.Thread(target=lambda array: given.append(hand_over.give(array)), args=(item,))
        giver.start()
        giver.join(0.05)
        del item
        hand_over.close()
        giver.join(TIMEOUT_S)
        del giver
        assert given == [False] and ref() is None
        assert hand_over.take() is None and hand_over.give(1) is False

    def test_close_frees_a_waiting_taker(self):
        hand_over = HandOver()
        taken = []
        taker = threading.Thread(target=lambda: taken.append(hand_over.take()))
        taker.start()
        taker.join(0.05)
        hand_over.close()
        taker.join(TIMEOUT_S)
        assert taken == [None]


class Line:
    """Frames in a row, none replaced: in the place of `NewestFrames`."""

    def __init__(self):
        self._frames = deque()
        self._is_closed = False
        self._condition = threading.Condition()

    def put(self, number):
        message = image_message(np.full((8, 8, 3), number, np.uint8), Time(sec=number + 1))
        with self._condition:
            self._frames.append(Frame("", message))
            self._condition.notify_all()

    def take(self):
        with self._condition:
            self._condition.wait_for(lambda: self._frames or self._is_closed)
            return None if self._is_closed else self._frames.popleft()

    def close(self):
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()


class Sheet:
    """Outputs that note which frames were published."""

    def __init__(self):
        self.published = []
        self.fault_at = -1
        self.asked = frozenset({"masks", "quality"})

    def wanted(self):
        return self.asked

    def publish_masks(self, wanted, header, instances):
        if header.stamp.sec - 1 == self.fault_at:
            raise RuntimeError("no room in the middleware")

    def publish_quality(self, wanted, header, degradation, enhanced):
        self.published.append(header.stamp.sec - 1)

    def publish_detections(self, *_):
        pass

    def publish_overlay(self, *_):
        pass


class Numbered:
    """The number of a frame is its brightness; what is to happen to it is in `on_encode` and `on_decode`."""

    name, device, classes, own_size, thresholds = "numbered", "cpu", ("object",), 1024, (0.15, 0.5)

    def __init__(self, overlaps=True):
        self.overlaps = overlaps
        self.encoded, self.decoded = [], []
        self.threads = set()
        self.arrays = []
        self.on_encode = self.on_decode = lambda number: None

    def encode(self, image, budget):
        number = int(image[0, 0, 0])
        self.threads.add(("encode", threading.get_ident()))
        self.encoded.append(number)
        latent = np.full((1, 1, 1, 1), number, np.float32)
        self.arrays += [weakref.ref(latent), weakref.ref(image)]
        self.on_encode(number)
        return Embedding(latent, image.shape[:2], 0.0)

    def propose(self, embedding, score_threshold, limit, budget):
        number = int(embedding.latent[0, 0, 0, 0])
        self.threads.add(("decode", threading.get_ident()))
        self.decoded.append(number)
        self.on_decode(number)
        return Candidates(np.full((1, 8, 8), 5, np.float32), np.ones(1, np.float32))

    def free(self): ...

    def close(self): ...


class Bench:
    """A worker with one camera, in this process."""

    def __init__(self, model):
        self.model, self.line, self.sheet = model, Line(), Sheet()
        self.camera = Camera("", "/image", self.sheet)
        pipeline = Pipeline(model, Settings(enhancement="off", min_area=0, max_frame_age_ms=0))
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        self.warnings = []
        self.worker = Worker(pipeline, {"": self.camera}, self.line, clock, self.warnings.append)
        self.worker.start()

    def feed(self, *numbers):
        for number in numbers:
            self.line.put(number)

    def counts(self):
        status = self.camera.ledger.status("", "", time.monotonic(), {})
        return {v.key: int(v.value) for v in status.values if v.value.isdigit() and int(v.value)}


@pytest.fixture
def bench():
    benches = []

    def make(model):
        benches.append(Bench(model))
        return benches[-1]

    yield make
    for found in benches:
        assert found.worker.stop(TIMEOUT_S)


def test_a_frame_is_decoded_while_the_next_is_encoded(bench):
    model = Numbered()
    started = [threading.Event() for _ in range(11)]
    started[10].set()
    alone = []
    model.on_encode = lambda number: started[number].set()
    # with one thread the next encode could not begin before this returns
    model.on_decode = lambda number: started[number + 1].wait(TIMEOUT_S) or alone.append(number)
    found = bench(model)
    found.feed(*range(10))
    wait_for(lambda: len(found.sheet.published) == 10, "ten results")
    assert found.sheet.published == list(range(10)) and not alone
    assert found.counts() == {"frames_processed": 10}


def test_frames_that_are_dropped_take_no_turn_of_the_highest_rate(bench):
    found = bench(Numbered(overlaps=False))
    found.worker._pipeline.settings = found.worker._pipeline.settings.replace(max_rate_hz=0.01)
    found.sheet.asked = frozenset()
    found.feed(*range(3))
    wait_for(lambda: found.counts().get("dropped_no_subscriber") == 3, "three frames left out, not one in 100 s")


def test_without_overlap_one_thread_does_it_all(bench):
    model = Numbered(overlaps=False)
    before = threading.active_count()
    found = bench(model)
    assert threading.active_count() == before + 1
    found.feed(*range(5))
    wait_for(lambda: len(found.sheet.published) == 5, "five results")
    assert len({thread for _, thread in model.threads}) == 1
    assert model.encoded == model.decoded == found.sheet.published


def test_at_most_one_frame_waits_between_the_threads(bench):
    model = Numbered()
    go_on = threading.Event()
    model.on_decode = lambda number: go_on.wait(TIMEOUT_S)
    found = bench(model)
    found.feed(*range(6))
    wait_for(lambda: len(model.encoded) == 2, "the second encode")
    time.sleep(0.1)
    assert model.encoded == [0, 1] and model.decoded == [0]
    go_on.set()
    wait_for(lambda: len(found.sheet.published) == 6, "all results")
    assert found.sheet.published == list(range(6))


def test_a_fault_in_either_thread_costs_its_frame_only(bench):
    model = Numbered()

    def fail(numbers, error):
        def check(number):
            if number in numbers:
                raise error

        return check

    model.on_encode = fail({3}, RuntimeError("bad encode"))
    model.on_decode = fail({5}, RuntimeError("bad decode"))
    found = bench(model)
    found.sheet.fault_at = 7
    found.feed(*range(10))
    wait_for(lambda: 9 in found.sheet.published, "the last result")
    assert found.sheet.published == [0, 1, 2, 4, 6, 8, 9]
    assert found.counts() == {
        "frames_processed": 7, "frames_dropped": 3, "dropped_inference_error": 2, "dropped_internal_error": 1
    }
    assert found.worker.is_alive()


def test_lack_of_memory_in_either_thread_costs_its_frame_only(bench):
    model = Numbered()

    def lack(number_of):
        def check(number):
            if number == number_of:
                raise OutOfMemory("expected room")

        return check

    model.on_encode, model.on_decode = lack(2), lack(4)
    found = bench(model)
    found.feed(*range(8))
    wait_for(lambda: 7 in found.sheet.published, "the last result")
    assert found.sheet.published == [0, 1, 3, 5, 6, 7]
    assert found.counts() == {"frames_processed": 6, "frames_dropped": 2, "dropped_out_of_memory": 2}


@pytest.mark.parametrize("overlaps", [True, False])
def test_no_frame_is_kept_when_nothing_is_left_to_do(bench, overlaps):
    model = Numbered(overlaps)

    def fail(number):
        if number % 3 == 1:
            raise RuntimeError("bad") if number % 2 else OutOfMemory("expected room")

    model.on_decode = fail
    found = bench(model)
    for last in (9, 19):
        found.feed(*range(last - 9, last + 1))
        wait_for(lambda last=last: last in model.decoded, "the last decode")
        wait_for(lambda: not any(array() is not None for array in model.arrays), "the end of all embeddings and images")
        assert len(model.arrays) == 2 * (last + 1)


def test_frames_that_nobody_wants_masks_of_keep_the_order(bench):
    model = Numbered()
    found = bench(model)
    found.sheet.asked = frozenset({"quality"})
    found.feed(*range(10))
    wait_for(lambda: len(found.sheet.published) == 10, "ten results")
    assert found.sheet.published == list(range(10)) and not model.decoded


def test_many_frames_with_faults_stay_in_order_and_are_all_counted(bench):
    model = Numbered()
    dice = random.Random(1)
    bad = {k for k in range(250) if dice.random() < 0.2}
    pauses = [dice.random() / 500 for _ in range(500)]

    def on_encode(number):
        time.sleep(pauses[number])
        if number in bad and number % 2:
            raise RuntimeError("bad encode")

    def on_decode(number):
        time.sleep(pauses[250 + number])
        if number in bad:
            raise RuntimeError("bad decode")

    model.on_encode, model.on_decode = on_encode, on_decode
    found = bench(model)
    found.feed(*range(250))
    good = [k for k in range(250) if k not in bad]
    wait_for(lambda: sum(found.counts().get(k, 0) for k in ("frames_processed", "frames_dropped")) == 250, "all frames")
    assert found.sheet.published == good and len(good) > 150


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_stop_in_the_middle_of_an_inference(stage):
    model = Numbered()
    inside, go_on = threading.Event(), threading.Event()

    def stuck(number):
        inside.set()
        go_on.wait(TIMEOUT_S)

    setattr(model, f"on_{stage}", stuck)
    found = Bench(model)
    found.feed(0, 1, 2)
    assert inside.wait(TIMEOUT_S)
    if stage == "decode":
        wait_for(lambda: model.encoded == [0, 1], "a frame in the hand-over")
    assert found.worker.stop(0.05) is False  # still inside the model
    go_on.set()
    assert found.worker.stop(TIMEOUT_S) is True
    assert not found.worker.is_alive()
    assert found.sheet.published == []
    assert found.counts()["dropped_disabled"] == (2 if stage == "decode" else 1)


# The same in a real node.

def frames(client):
    return lambda: image_message(picture((SQUARE,)), client.stamp())


def intervals(client, stage):
    found = (re.search(rf"^{stage} from ([\d.]+) to ([\d.]+)$", line) for line in list(client.logs))
    return [(float(m[1]), float(m[2])) for m in found if m]


def overlapping(client):
    """How many decodes have an encode that began and one that ended in the middle of them, or an encode across."""
    return sum(
        any(a < end and start < b for a, b in intervals(client, "encode")) for start, end in intervals(client, "decode")
    )


@pytest.mark.parametrize(("model", "overlaps"), [("paired", True), ("single", False)])
def test_a_node_decodes_beside_the_next_encode_in_order_and_loses_nothing(launch, model, overlaps):
    client = launch(model=model, max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    sent = []

    def make():
        message = frames(client)()
        sent.append((message.header.stamp.sec, message.header.stamp.nanosec))
        return message

    client.stream(make, lambda: len(masks) >= 10, "ten results", rate_hz=40)
    stamps = [(m.header.stamp.sec, m.header.stamp.nanosec) for m in masks.messages]
    assert stamps == sorted(set(stamps)) and set(stamps) <= set(sent)

    def balanced():
        counts = client.counts()
        return counts["frames_received"] == counts["frames_processed"] + counts["frames_dropped"] >= 10 and counts

    counts = wait_for(balanced, "all frames to be counted")
    assert counts["frames_dropped"] == counts["dropped_overwritten"]
    wait_for(lambda: len(masks) == counts["frames_processed"], "a result for each processed frame")
    if overlaps:
        assert overlapping(client) >= 7
    else:
        assert overlapping(client) == 0


def test_a_node_with_two_threads_stops_starts_and_ends(launch):
    client = launch(model="paired", max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    for _ in range(2):
        before = len(masks)
        client.stream(frames(client), lambda before=before: len(masks) > before, "masks", rate_hz=40)
        assert client.change_state("deactivate")
        after = len(masks)
        assert client.change_state("activate")
        assert len(masks) <= after + 1  # one may have been on its way
    client.stream(frames(client), lambda: len(masks) > after + 1, "masks", rate_hz=40)
    assert client.ros.end(signal.SIGTERM) == 0
    assert "Traceback" not in client.ros.output
