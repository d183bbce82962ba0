"""What the node knows of a camera and says of it in /diagnostics, from times and counts whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glesam_ros import Instances
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.diagnostics import CameraLedger, Ring, no_publisher, worth_a_log_line

OK, WARN, ERROR, STALE = b"\x00", b"\x01", b"\x02", b"\x03"


def values(ledger, now):
    return {pair.key: pair.value for pair in ledger.status("camera", "id", now, {}).values}


def verdict(ledger, now):
    status = ledger.status("camera", "id", now, {})
    return status.level, status.message


def working(now=0.0):
    """A camera one of whose frames was just processed."""
    ledger = CameraLedger("/image")
    ledger.arrived(now)
    ledger.processed()
    return ledger


def test_a_ring_keeps_the_last_values():
    ring = Ring(4)
    assert not ring and [math.isnan(value) for value in ring.percentiles(50, 95)] == [True, True]
    ring.add(7)
    assert ring and ring.percentiles(50) == [7]
    for value in (1, 3):
        ring.add(value)
    assert ring.percentiles(0, 50, 100) == [1, 3, 7]
    for value in (100, 20, 40):
        ring.add(value)
    assert ring.percentiles(0, 50, 100) == [3, 30, 100]


def test_rates_are_means_over_the_last_five_seconds():
    ledger = CameraLedger("/image")
    frames = 0

    def second(rate, now):
        nonlocal frames
        for k in range(rate):
            ledger.arrived(now - 1 + k / rate)
            frames += 1
            if frames % 2:
                ledger.processed()
        found = values(ledger, now)
        return found["input_rate_hz"], found["processed_rate_hz"]

    for now in range(1, 11):
        assert second(10, now) == ("10.00", "5.00")
    assert verdict(ledger, 10.0) == (OK, "10.0 Hz in, 5.0 Hz processed")
    ledger = CameraLedger("/image")
    frames = 0
    rates = [second(10, now)[0] for now in range(1, 6)] + [second(20, now)[0] for now in range(6, 12)]
    assert rates[4:] == ["10.00", "12.00", "14.00", "16.00", "18.00", "20.00", "20.00"]


@pytest.mark.parametrize("before", [0.01, 0.0, -0.001])
def test_a_first_frame_just_before_the_first_second_is_no_rate(before):
    """It may come after the second was read, too, from another thread."""
    ledger = CameraLedger("/image")
    ledger.arrived(5.0 - before)
    assert float(values(ledger, 5.0)["input_rate_hz"]) <= 1.0


def test_fewer_frames_than_are_expected_are_a_warning_once_rates_are_known():
    ledger = CameraLedger("/image")

    def second(now, processed, reason="overwritten"):
        for k in range(4):
            ledger.arrived(now - 1 + k / 4)
            ledger.processed() if k < processed else ledger.dropped(reason)
        found = ledger.status("camera", "id", now, {}, min_rate_hz=2.0)
        return found.level, found.message

    assert [second(now, 1)[0] for now in range(1, 5)] == [OK] * 4
    slow = (WARN, "4.0 Hz in, 1.0 Hz processed: expected at least 2 Hz (min_rate_hz)")
    assert second(5, 1) == second(6, 1) == slow
    assert [second(now, 3)[0] for now in range(7, 13)][-1] == OK
    # nobody asked
    assert {second(now, 1, "no_subscriber")[0] for now in range(13, 20)} == {OK}
    assert [second(now, 1) for now in range(20, 26)][-1] == slow
    assert [second(now, 2)[0] for now in range(26, 32)][-1] == OK  # just what is expected


def test_a_silence_is_told_once_and_its_length_when_it_ends():
    ledger = CameraLedger("/image")
    assert ledger.stopped(50.0) is None  # one that has not begun has not stopped
    assert ledger.arrived(100.0) is None
    assert ledger.stopped(102.0) is None
    assert ledger.stopped(102.5) == 2.5
    assert ledger.stopped(103.0) is None
    assert ledger.arrived(104.0) == 4.0
    assert ledger.arrived(104.1) is None
    assert ledger.arrived(110.0) is None  # nobody had looked


def test_level_and_message_of_a_camera_without_frames():
    ledger = CameraLedger("/image")
    assert verdict(ledger, 1.0) == (WARN, "no frame yet on /image")
    ledger.no_publisher = "no publisher on /image"
    assert verdict(ledger, 2.0) == (WARN, "no publisher on /image")
    ledger.qos_mismatch = "reliability differs"
    assert verdict(ledger, 3.0) == (WARN, "no publisher on /image")
    ledger.no_publisher = ""
    assert verdict(ledger, 4.0) == (ERROR, "reliability differs")
    ledger.arrived(5.0)
    ledger.processed()
    assert verdict(ledger, 5.5)[0] == OK
    assert verdict(ledger, 7.0)[0] == OK
    assert verdict(ledger, 7.5) == (STALE, "camera stopped: no frame for 2.5 s")
    ledger.no_publisher = "no publisher on /image"
    assert verdict(ledger, 8.0) == (STALE, "camera stopped: no frame for 3.0 s; no publisher on /image")


@pytest.mark.parametrize("reason", ["inference_error", "out_of_memory", "no_result"])
def test_three_failed_inferences_in_a_row_are_an_error(reason):
    ledger = working()
    for count in (1, 2, 3):
        assert ledger.dropped(reason, "red") == count
        ledger.dropped("overwritten")
        level, message = verdict(ledger, 1.0 + count / 10)
        assert (level == ERROR) is (count == 3)
    assert message == "inference failed 3 times in a row"
    ledger.processed()
    assert verdict(ledger, 1.5) == (WARN, f"faults: 3 {reason}")
    assert values(ledger, 1.6)["last_fault"] == f"{reason}: red"


@pytest.mark.parametrize("forget", [
    lambda ledger: ledger.dropped("disabled"), lambda ledger: ledger.dropped("no_subscriber"),
    lambda ledger: (ledger.rest(), ledger.arrived(1.0)),
])
def test_failures_before_a_pause_say_nothing_of_now(forget):
    ledger = working()
    for _ in range(3):
        ledger.dropped("inference_error")
    forget(ledger)
    assert "in a row" not in verdict(ledger, 1.5)[1]
    for _ in range(2):
        ledger.dropped("inference_error")
    assert "in a row" not in verdict(ledger, 1.7)[1]


@pytest.mark.parametrize("reason", ["overwritten", "no_subscriber", "disabled", "clock_jump"])
def test_drops_that_are_the_design_at_work_are_no_faults(reason):
    ledger = working()
    ledger.dropped(reason)
    assert verdict(ledger, 1.0)[0] == OK
    found = values(ledger, 1.1)
    assert (found["frames_dropped"], found[f"dropped_{reason}"], found["last_fault"]) == ("1", "1", "")


def test_what_is_noticed_is_counted_and_told_and_costs_no_frame():
    ledger = working()
    assert [ledger.noticed("zero_stamp", "set it") for _ in range(2)] == [1, 2]
    assert verdict(ledger, 1.0) == (WARN, "faults: 2 zero_stamp")
    found = values(ledger, 1.1)
    assert (found["noticed_zero_stamp"], found["frames_dropped"]) == ("2", "0")
    assert found["last_fault"] == "zero_stamp: set it"


def test_faults_of_which_no_frame_gets_through_are_an_error():
    ledger = CameraLedger("/image")
    ledger.arrived(0.0)
    ledger.noticed("zero_stamp", "set it")
    assert verdict(ledger, 0.5) == (WARN, "faults: 1 zero_stamp")  # cost no frame
    ledger.dropped("bad_step", "step 3")
    ledger.dropped("overwritten")
    assert verdict(ledger, 1.0) == (ERROR, "no frame could be processed: 1 bad_step, 1 zero_stamp")
    ledger.processed()
    assert verdict(ledger, 1.5) == (WARN, "faults: 1 bad_step, 1 zero_stamp")


def test_what_nobody_subscribes_to_is_said_where_nothing_is_processed():
    ledger = CameraLedger("/image")
    ledger.arrived(0.0)
    assert verdict(ledger, 0.5) == (OK, "1.0 Hz in, 0.0 Hz processed")
    ledger.dropped("no_subscriber")
    assert verdict(ledger, 1.0) == (OK, "1.0 Hz in, 0.0 Hz processed, no subscriber")
    ledger.processed()
    assert verdict(ledger, 1.0) == (OK, "1.0 Hz in, 1.0 Hz processed")


def test_a_first_frame_that_does_not_come_is_told_once():
    ledger = CameraLedger("/image")
    assert ledger.missed(100.0) == ""  # nothing is expected yet
    ledger.listens(100.0)
    assert [ledger.missed(now) for now in (104.9, 105.0, 106.0)] == ["", "no frame yet on /image", ""]
    ledger.listens(110.0)
    ledger.no_publisher = "no publisher on /image"
    assert [ledger.missed(now) for now in (114.0, 116.0)] == ["", "no publisher on /image"]
    for forget in (ledger.rest, lambda: ledger.arrived(121.0)):
        ledger.listens(120.0)
        forget()
        assert ledger.missed(130.0) == ""


@pytest.mark.parametrize(("publishers", "compressed", "several", "expected"), [
    ({"/a/image": 1}, False, False, ""),
    ({"/a/image/compressed": 2}, True, False, ""),
    ({"/a/image/compressed": 1}, False, False,
     "no publisher on /a/image, but one on /a/image/compressed: set compressed:=true"),
    ({"/a/image": 1}, True, False, "no publisher on /a/image/compressed, but one on /a/image: set compressed:=false"),
    ({}, False, False,
     "no publisher on /a/image: start the camera, or set image_topic (compressed:=true for JPEG)"),
    ({}, True, True,
     "no publisher on /a/image/compressed: start the camera, or set image_topics (compressed:=false for raw images)"),
])
def test_why_no_frame_can_come(publishers, compressed, several, expected):
    topic = "/a/image/compressed" if compressed else "/a/image"
    assert no_publisher(topic, compressed, lambda name: publishers.get(name, 0), several) == expected


def test_a_fault_is_told_until_the_window_has_gone_by():
    ledger = working()
    ledger.dropped("stale", "too old")
    told = []
    for now in range(1, 10):
        ledger.arrived(now - 0.5)
        ledger.processed()
        told.append(verdict(ledger, float(now))[0])
    assert told == 5 * [WARN] + 4 * [OK]


def test_rest_forgets_rates_and_silence_and_keeps_the_counts():
    ledger = working()
    ledger.dropped("stale", "too old")
    ledger.qos_mismatch = "reliability differs"
    values(ledger, 1.0)
    ledger.rest()
    assert ledger.stopped(60.0) is None
    assert verdict(ledger, 60.0)[0] == WARN and "no frame yet" in verdict(ledger, 60.0)[1]
    ledger.rest()
    assert ledger.arrived(100.0) is None
    ledger.processed()
    found = values(ledger, 101.0)
    assert (found["input_rate_hz"], found["processed_rate_hz"]) == ("1.00", "1.00")
    assert (found["frames_received"], found["frames_processed"], found["dropped_stale"]) == ("2", "2", "1")
    assert verdict(ledger, 101.5)[0] == OK


def test_values_of_the_newest_frame():
    ledger = working()
    found = values(ledger, 1.0)
    assert (found["image_size"], found["degradation"], found["enhanced"]) == ("", "", "")
    assert "semantic_p50_ms" not in found and "restore_p50_ms" not in found
    ledger.size, ledger.degradation, ledger.enhanced = (480, 640), 0.25, False
    for ring in (ledger.latency_ms, ledger.semantic_ms):
        for value in range(101):
            ring.add(value)
    status = ledger.status("front", "serial", 2.0, {"more": 7})
    found = {pair.key: pair.value for pair in status.values}
    assert (status.name, status.hardware_id, found["more"], found["topic"]) == ("front", "serial", "7", "/image")
    assert (found["image_size"], found["degradation"], found["enhanced"]) == ("640x480", "0.250", "False")
    for key in ("latency", "semantic"):
        assert [found[f"{key}_p{percent}_ms"] for percent in (50, 95, 99)] == ["50.0", "95.0", "99.0"]
    assert found["encode_p50_ms"] == "nan"


def test_log_lines_of_a_kind_become_rare():
    assert [count for count in range(1, 20000) if worth_a_log_line(count)] == [1, 10, 100, 1000, 10000]


def square(x):
    masks = np.zeros((1, 40, 60), bool)
    masks[0, 10:20, x : x + 10] = True
    one = np.ones(1, np.float32)
    return Instances(masks, np.float32([[x, 10, x + 10, 20]]), one, one, np.int32([1]), 0.0, False)


def test_after_a_jump_of_time_a_camera_knows_nothing_of_before():
    camera = Camera("front", "/front/image", None)
    assert camera.last_stamp_ns == 0
    camera.last_stamp_ns = 10**9
    camera.ledger.arrived(1.0)
    assert camera.gate.update(0.9, above=0.5, below=0.3) and camera.gate.update(0.4, above=0.5, below=0.3)
    assert [camera.identity.update(square(x)).ids.tolist() for x in (5, 45)] == [[1], [2]]
    camera.forget_time()
    assert camera.last_stamp_ns == 0
    assert not camera.gate.update(0.4, above=0.5, below=0.3)
    assert camera.identity.update(square(45)).ids.tolist() == [1]
    assert values(camera.ledger, 2.0)["frames_received"] == "1"


def test_a_camera_in_words():
    assert [Camera(name, "/image", None).label for name in ("", "front")] == ["camera", "camera 'front'"]
