"""Transitions over change_state, faults in them, and the end of the process."""

from __future__ import annotations

import signal
import time

import pytest
import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.qos import QoSDurabilityPolicy, QoSProfile
from ros_graph import LOST_ANSWER, TIMEOUT_S, image_message, picture, wait_for
from sensor_msgs.msg import Image
from std_srvs.srv import SetBool

OK, WARN, ERROR = b"\x00", b"\x01", b"\x02"
SQUARE = (20, 20, 60, 60)
CHANGE_STATE = "perception/change_state"


def frames(client):
    return lambda: image_message(picture((SQUARE,)), client.stamp())


def test_the_whole_circle_twice_by_a_lifecycle_manager(launch):
    client = launch(wait_active=False, autostart=False)
    for _ in range(2):
        assert client.state() == "unconfigured"
        assert client.change_state("configure") and client.state() == "inactive"
        assert client.change_state("activate") and client.state() == "active"
        masks = client.subscribe(Image, "masks")
        client.stream(frames(client), lambda masks=masks: masks.messages, "masks")
        assert client.change_state("deactivate") and client.state() == "inactive"
        assert client.change_state("cleanup")
        topic = f"/{client.namespace}/masks"
        wait_for(lambda topic=topic: not client.node.count_publishers(topic), "the end of the topic masks")


def test_deactivate_frees_the_model_and_activate_loads_it_again(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")
    client.stream(frames(client), lambda: masks.messages, "masks")
    assert client.change_state("deactivate")
    wait_for(lambda: not client.publisher(Image, "image").get_subscription_count(), "the end of the image subscription")
    loads = len(client.logged("model bright loaded"))
    assert client.change_state("activate")
    before = len(masks)
    # the old model refuses to work after close(), so a result proves a new one
    client.stream(frames(client), lambda: len(masks) > before, "masks after the second activate")
    wait_for(lambda: len(client.logged("model bright loaded")) == loads + 1, "a second load in the log")


@pytest.mark.parametrize(("device", "sizes"), [("cpu", ["640x480"]), ("cuda", ["640x480", "1280x720"])])
def test_warm_up_has_the_usual_sizes_then_that_of_the_camera(launch, device, sizes):
    client = launch(model="sized", device=device)
    client.wait_log("warm-up inference took", f"({', '.join(sizes)})")
    assert client.logged("encode ") == [f"encode {size}" for size in sizes]
    masks = client.subscribe(Image, "masks")
    client.stream(frames(client), lambda: masks.messages, "masks")
    assert client.change_state("deactivate")
    assert client.change_state("activate")
    client.wait_log("warm-up inference took", "(160x120)")
    assert all(len(client.logged(f"encode {size}")) == 1 for size in sizes)  # not again


@pytest.fixture
def stuck(launch, tmp_path, monkeypatch):
    """A node whose deactivate has given up on a frame, and the file that holds the frame up."""
    file = tmp_path / "stuck"
    file.touch()
    monkeypatch.setenv("STUCK", str(file))
    monkeypatch.setenv("STOP_TIMEOUT_S", "0.2")
    client = launch(model="stuck")
    client.subscribe(Image, "masks")
    client.stream(
        lambda: image_message(picture(ground=(255, 0, 0)), client.stamp()),
        lambda: client.counts()["dropped_overwritten"] >= 3, "frames behind the one that is stuck",
    )
    assert not client.change_state("deactivate")
    return client, file


def says(client, level, *texts):
    status = client.status("model")
    return status is not None and status.level == level and all(text in status.message for text in texts)


def test_no_second_model_is_loaded_beside_one_that_is_stuck(stuck):
    client, file = stuck
    assert client.state() == "unconfigured"  # by way of the error processing
    client.wait_log("error processing done")
    error = "deactivate: StuckInference: the model did not finish a frame within 0.2 s"
    wait_for(lambda: says(client, ERROR, error), "the error of deactivate in diagnostics")
    assert not client.change_state("configure") and client.state() == "unconfigured"
    client.wait_log("configure failed", "it is still with the one that deactivate gave up on; try again later")
    wait_for(lambda: says(client, ERROR, "configure: StuckInference: "), "the refusal in diagnostics")
    assert not client.logged("stuck closed") and len(client.logged("model stuck loaded")) == 1

    file.unlink()
    client.wait_log("the frame that deactivate gave up on has ended, its model is freed")
    assert len(client.logged("stuck closed")) == 1
    assert client.change_state("configure") and client.change_state("activate")
    wait_for(lambda: says(client, OK, "active"), "a good status")
    masks = client.subscribe(Image, "masks")
    client.stream(frames(client), lambda: masks.messages, "masks")
    assert len(client.logged("model stuck loaded")) == 2
    assert not client.logged("Traceback")


def test_the_process_ends_beside_an_inference_that_is_stuck(stuck):
    client, _ = stuck
    assert client.ros.end() == 0
    assert "Traceback" not in client.ros.output


def test_a_model_that_cannot_be_loaded_fails_configure_and_says_why(launch):
    client = launch(wait_active=False, autostart=False, model="absent")
    assert not client.change_state("configure")
    assert client.state() == "unconfigured"
    assert client.wait_log("configure failed", "expected weights beside the model")
    status = wait_for(lambda: client.values("model").get("last_error") and client.status("model"), "an error status")
    assert status.level == b"\x02" and "expected weights beside the model" in status.message
    # and it can be tried again
    assert not client.change_state("configure")


@pytest.mark.parametrize(("parameters", "text"), [
    ({"model": "absent"}, "expected weights beside the model"),
    ({"model": "nothing"}, "got 'nothing'"),
    ({"model": "nano", "device": "cpu", "precision": "bf16"}, "precision: nano has no bf16"),
    ({"semantic": "nothing"}, "got 'nothing'"),
    ({"restorer": "nothing"}, "got 'nothing'"),
])
def test_a_choice_that_cannot_be_loaded_is_one_line_and_a_traceback_at_debug_level_alone(launch, parameters, text):
    client = launch(wait_active=False, **parameters)
    assert "\n" not in client.wait_log("configure failed: ", text)
    client.wait_log("autostart stopped")
    assert "Traceback" not in client.ros.output


def test_at_debug_level_a_model_that_cannot_be_loaded_shows_its_traceback(launch):
    client = launch(wait_active=False, model="absent", arguments=["--log-level", "{namespace}.perception:=debug"])
    client.wait_log("configure failed: ")
    wait_for(lambda: "in _absent" in client.ros.output, "the traceback")


def test_autostart_with_a_model_that_cannot_be_loaded_says_what_to_call(launch):
    client = launch(wait_active=False, model="absent")
    line = client.wait_log("autostart stopped")
    assert f"ros2 lifecycle set /{client.namespace}/perception configure" in line
    assert "another value of a parameter that is read at start (model, device," in line
    assert "takes a new start of the node" in line
    assert client.state() == "unconfigured"


@pytest.mark.parametrize("number", [1, 3, 77])
def test_an_impossible_transition_is_answered_with_no(launch_shared, number):
    """rclpy raises in the service and never answers, so that a lifecycle manager would wait for ever."""
    client = launch_shared()
    answer = client.call(ChangeState, CHANGE_STATE, ChangeState.Request(transition=Transition(id=number)))
    assert not answer.success
    assert client.state() == "active" and not client.logged("a callback failed")


def lost(client):
    return client.ros.output.count(LOST_ANSWER)


def deaf(client, kind, name):
    """A client of the service to which the node loses every answer, as it may while it has not seen a client yet."""
    client.state()  # both sides know each other's processes; some answers may have been lost until then
    # a reader that wants late answers, too, never matches the writer of the node; the requests do
    profile = QoSProfile(depth=10, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
    return client.node.create_client(kind, name, qos_profile=profile)


def test_a_lost_answer_of_change_state_is_told_by_the_state(launch):
    client = launch(wait_active=False, autostart=False)
    client._services[CHANGE_STATE] = deaf(client, ChangeState, CHANGE_STATE)
    before = lost(client)
    for turn in (1, 2):
        assert client.change_state("configure") and client.state() == "inactive"
        assert client.change_state("cleanup") and client.state() == "unconfigured"
        assert lost(client) == before + 2 * turn
        assert client.ros.output.count("configure done") == turn  # not asked again


def test_a_lost_answer_of_a_transition_that_failed_is_told_by_the_state(launch):
    client = launch(wait_active=False, autostart=False, model="absent")
    client._services[CHANGE_STATE] = deaf(client, ChangeState, CHANGE_STATE)
    before = lost(client)
    assert not client.change_state("configure")
    assert lost(client) == before + 1


def test_a_transition_that_is_never_answered_is_not_taken_for_a_lost_answer(launch):
    client = launch(wait_active=False, autostart=False)
    client.service(ChangeState, CHANGE_STATE)
    client.ros.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(AssertionError, match=f"in vain for an answer of {CHANGE_STATE}"):
            client.change_state("configure", timeout_s=2)
    finally:
        client.ros.process.send_signal(signal.SIGCONT)


def test_a_request_whose_answer_was_lost_is_sent_again(launch, monkeypatch):
    client = launch()
    ends = iter([deaf(client, SetBool, "enable"), client.service(SetBool, "enable")])
    before = lost(client)
    monkeypatch.setattr(client, "service", lambda kind, name: next(ends))
    assert "paused" in client.call(SetBool, "enable", SetBool.Request(data=False)).message
    assert next(ends, None) is None and lost(client) == before + 1


def test_enable_pauses_and_resumes(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")
    client.stream(frames(client), lambda: masks.messages, "masks")
    paused = client.call(SetBool, "enable", SetBool.Request(data=False))
    assert paused.success and "paused" in paused.message
    before = client.wait_count("frames_processed", len(masks))["frames_processed"]
    client.stream(frames(client), lambda: client.counts()["dropped_disabled"] >= 10, "dropped_disabled")
    assert client.counts()["frames_processed"] <= before + 1  # one may have been on its way
    assert client.call(SetBool, "enable", SetBool.Request(data=True)).success
    before = len(masks)
    client.stream(frames(client), lambda: len(masks) > before, "masks after enable")


def test_a_pause_lasts_through_deactivate_and_ends_with_cleanup(launch):
    """Cleanup leaves a node as it was when it was made (design of managed nodes); nobody would look for a pause."""
    client = launch()
    masks = client.subscribe(Image, "masks")
    client.call(SetBool, "enable", SetBool.Request(data=False))
    assert client.change_state("deactivate") and client.change_state("activate")
    client.stream(frames(client), lambda: client.counts()["dropped_disabled"] >= 5, "dropped_disabled")
    assert not masks.messages
    assert client.change_state("deactivate") and client.change_state("cleanup")
    assert client.change_state("configure") and client.change_state("activate")
    client.stream(frames(client), lambda: masks.messages, "masks after cleanup")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("model", ["bright", "slow"])
def test_a_signal_ends_the_process_cleanly_also_in_the_middle_of_an_inference(launch, model, number):
    client = launch(model=model, max_frame_age_ms=5000)
    masks = client.subscribe(Image, "masks")
    client.stream(frames(client), lambda: client.counts()["frames_received"] >= 1, "a frame to arrive")
    assert client.ros.end(number) == 0
    assert "Traceback" not in client.ros.output
    if model == "slow":
        assert not masks.messages  # it did end inside the inference


def test_more_signals_while_the_process_ends_change_nothing(launch):
    # as launch does it: the terminal has told the whole group already
    process = launch().ros.process
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    assert process.returncode == 0


def test_a_library_that_locks_itself_up_as_the_process_ends_does_not_keep_it(launch, monkeypatch):
    monkeypatch.setenv("HOLD_AT_END", "1")
    client = launch()
    assert client.ros.end() == -signal.SIGALRM
    assert "ending" in client.ros.output and "Traceback" not in client.ros.output


def test_start_parameters_that_are_not_valid_end_the_process_with_a_reason(launch):
    client = launch(wait_active=False, enhancement="sometimes")
    assert client.ros.process.wait(15) == 1
    assert "expected one of off, always, auto; got 'sometimes'" in client.ros.output
    assert "Traceback" not in client.ros.output


@pytest.mark.parametrize(("argument", "hint"), [
    ("enhancement:=off", "'NAME:=\"off\"'"), ("enhance_above:=1", "1.0 for 1"),
])
def test_a_start_parameter_that_yaml_reads_otherwise_has_a_hint(launch, argument, hint):
    client = launch(wait_active=False, arguments=["-p", argument])
    assert client.ros.process.wait(15) == 1
    assert hint in client.ros.output
    assert "Traceback" not in client.ros.output


@pytest.mark.parametrize("arguments", [
    ["-r", "__ns:=/1bad"], ["-r", "image:=/a//b"], ["-r", "masks:=/a-b"], ["-r", "masks"], ["--foo"],
    ["--params-file", "/nowhere.yaml"],
])
def test_names_that_ros_refuses_end_the_process_with_one_line(launch, arguments):
    client = launch(wait_active=False, arguments=arguments)
    assert client.ros.process.wait(15) == 1
    assert "[FATAL]" in client.ros.output and arguments[-1] in client.ros.output
    assert "Traceback" not in client.ros.output


def test_a_second_node_of_the_same_name_is_a_warning_while_it_is_there(launch):
    client = launch()
    wait_for(lambda: client.model_status_is(OK, "active"), "an active node")
    twin = rclpy.create_node("perception", namespace=client.namespace)
    wait_for(lambda: client.model_status_is(WARN, "perception runs 2 times"), "a warning")
    client.wait_log(f"/{client.namespace}/perception runs 2 times", "another namespace")
    twin.destroy_node()
    wait_for(lambda: client.model_status_is(OK, "active"), "a node that is alone again")


def test_the_state_is_told_in_diagnostics(launch):
    client = launch(wait_active=False, autostart=False, model="slow")  # its warm-up takes 2 s or more
    wait_for(lambda: says(client, OK, "unconfigured"), "unconfigured")
    assert client.change_state("configure")
    wait_for(lambda: client.status("model").message == "inactive", "inactive")
    client.service(ChangeState, CHANGE_STATE).call_async(ChangeState.Request(transition=Transition(
        id=Transition.TRANSITION_ACTIVATE
    )))
    wait_for(lambda: says(client, OK, "activating: the model is being loaded and warmed up"), "activating")
    wait_for(lambda: client.status("model").message == "active", "active")
    assert client.change_state("deactivate")
    wait_for(lambda: client.status("model").message == "inactive", "inactive")
    client.service(ChangeState, CHANGE_STATE).call_async(ChangeState.Request(transition=Transition(
        id=Transition.TRANSITION_INACTIVE_SHUTDOWN
    )))
    wait_for(lambda: client.status("model").message == "finalized", "finalized")
