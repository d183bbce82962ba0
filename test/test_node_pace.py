"""A node whose model is too slow for the time that a frame may take: the processing size gives way, and comes back."""

from __future__ import annotations

from ros_graph import image_message, picture, wait_for
from sensor_msgs.msg import Image
from vision_msgs.msg import Classification

OK, WARN = b"\x00", b"\x01"


def test_the_size_gives_way_to_the_budget_and_comes_back_with_it(launch):
    client = launch(model="laborious", max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")

    def until(condition, what):
        client.stream(lambda: image_message(picture(((20, 20, 60, 60),)), client.stamp()), condition, what)

    def size_is(size):
        return client.values("model").get("processing_size_now") == size

    until(lambda: masks.messages and client.model_status_is(OK, "active"), "masks at the model's own size")
    assert size_is("512")

    # 0.2 s at 512 px, 0.153 at 448, 0.112 at 384, 0.05 at 256; the next larger size would take more than the limit
    assert all(result.successful for result in client.set_parameters(frame_budget_ms=140))
    smaller = "active, processing size 384 of 512 to keep to frame_budget_ms"
    until(lambda: client.model_status_is(OK, smaller), "a step down")
    assert size_is("384") and client.values("model")["processing_size"] == "0"
    assert client.wait_log("limit 140 ms: processing size 384 of 512 from now on")

    assert all(result.successful for result in client.set_parameters(frame_budget_ms=20))
    too_slow = "longer than frame_budget_ms, 20 ms, even at processing size 256"
    until(lambda: client.model_status_is(WARN, too_slow), "a warning")
    assert size_is("256")
    before = len(masks)
    until(lambda: len(masks) >= before + 3, "masks all the same")
    assert (masks.messages[-1].height, masks.messages[-1].width) == picture(()).shape[:2]

    # while no frame comes, none is too slow
    wait_for(lambda: client.model_status_is(OK, "active, processing size 256 of 512"), "no warning any more")

    assert all(result.successful for result in client.set_parameters(frame_budget_ms=0))
    wait_for(lambda: client.model_status_is(OK, "active") and size_is("512"), "the model's own size")
    assert "processing size" not in client.status("model").message
    assert client.counts()["dropped_internal_error"] == client.counts()["dropped_inference_error"] == 0


def test_frames_of_which_only_the_quality_is_wanted_keep_to_the_budget_too(launch):
    client = launch(model="laborious", max_frame_age_ms=10_000, frame_budget_ms=20)
    quality = client.subscribe(Classification, "quality")
    client.stream(
        lambda: image_message(picture(((20, 20, 60, 60),)), client.stamp()),
        lambda: quality.messages and client.values("model").get("processing_size_now") == "256", "a step down",
    )
