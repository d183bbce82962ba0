"""A node whose device is short of memory: frames are lost only on the way down, and /diagnostics says what is left."""

from __future__ import annotations

from ros_graph import image_message, picture, wait_for
from sensor_msgs.msg import Image

SQUARE = (20, 20, 60, 60)
RED = (255, 0, 0)
OK, WARN, ERROR = b"\x00", b"\x01", b"\x02"
LEFT = "out of memory: processing size 768 of 1024, 16 of 64 prompts a batch"


def frames(client, ground=(30, 60, 90)):
    return lambda: image_message(picture((SQUARE,), ground=ground), client.stamp())


def test_down_while_memory_is_short_and_up_again(launch):
    client = launch(model="tight", max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    client.stream(
        frames(client), lambda: masks.messages and client.model_status_is(OK, "active"), "masks at the top rung"
    )
    assert client.values("model")["processing_size_now"] == "1024"

    client.stream(frames(client, RED), lambda: client.model_status_is(WARN, LEFT), "a warning that says what is left")
    counts = client.wait_count("dropped_out_of_memory", 4)
    assert counts["dropped_out_of_memory"] == 4  # 896, 768 px; 32, 16 prompts
    values = client.values("model")
    assert (values["processing_size_now"], values["points_per_batch_now"]) == ("768", "16")
    assert values["out_of_memory"] == "4" and values["processing_size"] == "0"
    for stage, left in (
        ("encode", "896 of 1024, 64 of 64"), ("encode", "768 of 1024, 64 of 64"),
        ("decode", "768 of 1024, 32 of 64"), ("decode", "768 of 1024, 16 of 64"),
    ):
        client.wait_log(f"out of memory in {stage}: processing size {left} prompts a batch from now on")
    assert "out_of_memory: expected room for" in client.values()["last_fault"]
    assert len(client.logged("frame dropped, out_of_memory")) == 1
    assert not client.logged("Traceback")
    before = len(masks)
    client.stream(frames(client, RED), lambda: len(masks) >= before + 3, "masks with what is left")

    client.stream(frames(client), lambda: client.model_status_is(OK, "active"), "the top rung again", rate_hz=80)
    assert client.wait_log("memory was enough for 30 frames: processing size 1024 of 1024, 64 of 64 prompts a batch")
    assert client.counts()["dropped_out_of_memory"] == 4


def test_a_live_change_of_size_or_batch_begins_anew(launch):
    client = launch(model="tight", max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    sent = []

    def next_frame():
        sent.append(frames(client, RED)())
        return sent[-1]

    client.stream(next_frame, lambda: client.model_status_is(WARN, LEFT), "a warning")
    # a frame that is still under way would take a rung again after the change
    last = sent[-1].header.stamp
    wait_for(lambda: masks.messages and masks.messages[-1].header.stamp == last, "masks of the last frame")
    assert all(result.successful for result in client.set_parameters(points_per_batch=8))
    wait_for(lambda: client.values("model").get("processing_size_now") == "1024", "the asked size")
    assert client.values("model")["points_per_batch_now"] == "8" and client.model_status_is(OK, "active")
    client.stream(
        frames(client, RED), lambda: client.model_status_is(WARN, "processing size 768 of 1024, 8 of 8 prompts"),
        "a warning",
    )
    assert all(result.successful for result in client.set_parameters(processing_size=640))
    wait_for(lambda: client.model_status_is(OK, "active"), "a status without warning")
    assert client.values("model")["processing_size_now"] == "640"


def test_activate_goes_down_until_the_warm_up_fits(launch):
    client = launch(model="scant")
    wait_for(lambda: client.model_status_is(WARN, LEFT), "a warning")
    masks = client.subscribe(Image, "masks")
    client.stream(frames(client), lambda: masks.messages, "masks with what is left")
    assert client.counts()["dropped_out_of_memory"] == 0


def test_activate_fails_where_nothing_fits_and_says_what_to_do(launch):
    client = launch(model="starved", autostart=False, wait_active=False)
    assert client.change_state("configure")
    assert not client.change_state("activate")
    assert client.state() == "inactive"
    wait_for(lambda: client.model_status_is(ERROR, "take a smaller model"), "an error")
    assert "at least processing size 512 of 1024" in client.status("model").message
    assert client.wait_log("activate failed", "expected memory for at least")
    assert "Traceback" not in client.ros.output


def test_room_for_nothing_is_an_error_until_there_is_room_again(launch):
    client = launch(model="hungry", max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    client.stream(
        frames(client, RED),
        lambda: client.status() and client.status().level == ERROR and "inference failed" in client.status().message
        and "take a smaller model" in client.values()["last_fault"],
        "an error status",
    )
    assert not masks.messages
    client.stream(frames(client), lambda: masks.messages and client.status().level != ERROR, "masks, and no error")
