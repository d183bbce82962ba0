"""Parameters over the parameter services: descriptors, refusals, live changes, answers while the model works."""

from __future__ import annotations

import gc
import time

import pytest
from rcl_interfaces.msg import ParameterEvent
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import qos_profile_parameter_events
from ros_graph import TIMEOUT_S, image_message, picture, pixels_of, wait_for
from sensor_msgs.msg import Image

from glesam_ros import settings

SQUARES = ((10, 10, 40, 40), (60, 10, 30, 30), (110, 10, 24, 24))


@pytest.fixture(scope="module")
def client(launch_shared):
    return launch_shared()


def values_of(client, *names):
    """What the node answers to `ros2 param get`."""
    answer = client.call(GetParameters, "perception/get_parameters", GetParameters.Request(names=names))
    return [parameter_value_to_python(value) for value in answer.values]


def test_descriptors_are_those_of_the_settings(client):
    for name, descriptor in zip(settings.names(), client.describe(*settings.names())):
        spec = settings.spec(name)
        assert descriptor.name == name
        assert descriptor.description.startswith(spec.help) and spec.unit in descriptor.description
        assert descriptor.read_only == spec.read_only
        assert all(choice in descriptor.additional_constraints for choice in spec.choices)
        ranges = list(descriptor.floating_point_range) + list(descriptor.integer_range)
        assert [(r.from_value, r.to_value) for r in ranges] == ([] if spec.low is None else [(spec.low, spec.high)])
        if descriptor.integer_range:
            assert descriptor.integer_range[0].step == 1


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("score_threshold", 1.5, "score_threshold"),
    ("processing_size", 1025, "processing_size"),
    ("max_instances", 0, "max_instances"),
    ("enhancement", "sometimes", "expected one of off, always, auto; got 'sometimes'"),
    ("score_threshold", "high", "Wrong parameter type"),
    ("model", "other", "read-only"),
    ("cameras", ["left"], "read-only"),
])
def test_a_wrong_value_is_refused_with_a_reason(client, name, value, reason):
    result = client.set_parameters(**{name: value})[0]
    assert not result.successful
    assert reason in result.reason


@pytest.mark.parametrize("name", [n for n in settings.names() if type(settings.default(n)) is int])
def test_every_stop_of_a_slider_is_taken(client, name):
    """rqt's slider ignores the step of a range while it is dragged."""
    spec = settings.spec(name)
    for value in (spec.low, spec.low + 1, spec.high // 2 + 1, spec.high - 1, spec.high):
        result = client.set_parameters(**{name: int(value)})[0]
        assert result.successful, result.reason
    assert client.set_parameters(**{name: settings.default(name)})[0].successful


def test_a_refusal_is_logged_for_those_who_do_not_see_the_answer(client):
    assert not client.set_parameters(enhancement="AUTO")[0].successful
    client.wait_log("parameters stay as they are", "enhancement: expected one of off, always, auto; got 'AUTO'")


def test_after_a_refusal_an_event_has_the_values_that_count(client):
    """rqt goes on showing what it sent until an event says otherwise."""
    events = client.subscribe(ParameterEvent, "/parameter_events", qos_profile_parameter_events)
    assert client.set_parameters(enhance_above=0.625)[0].successful
    assert not client.set_atomically(enhance_above=0.75, enhancement="AUTO").successful

    def told():
        return [
            {p.name: parameter_value_to_python(p.value) for p in event.changed_parameters}
            for event in list(events.messages) if event.node == f"/{client.namespace}/perception"
        ]

    wait_for(lambda: told()[-1:] == [{"enhance_above": 0.625, "enhancement": "auto"}], f"what counts; {told()}")
    assert told() == [{"enhance_above": 0.625}, {"enhance_above": 0.625, "enhancement": "auto"}]
    assert client.set_parameters(enhance_above=0.25)[0].successful


def test_a_set_is_taken_or_refused_as_a_whole(client):
    assert client.set_atomically(enhance_below=0.5, enhance_above=0.6).successful
    refused = client.set_atomically(enhance_above=0.05, enhancement="AUTO")
    assert not refused.successful and "'AUTO'" in refused.reason
    assert values_of(client, "enhance_below", "enhance_above") == [0.5, 0.6]


def test_a_file_is_loaded_whole_whatever_the_values_before(client):
    """`ros2 param load` and rqt set one parameter after the other, in the order of the names."""
    for above, below in ((0.6, 0.5), (0.25, 0.15)):
        results = client.set_parameters(enhance_above=above, enhance_below=below)
        assert all(result.successful for result in results)
        assert values_of(client, "enhance_above", "enhance_below") == [above, below]


def test_a_start_parameter_that_the_node_does_not_have_is_named_with_the_nearest(launch, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        "/**:\n  ros__parameters:\n    overlay_alfa: 0.8\n    use_sim_time: false\n    max_instances: 7\n"
        "    qos_overrides./image.subscription.depth: 2\n    start_type_description_service: true\n"
    )
    client = launch(colour="red", overlay_alpha=0.75, arguments=["--params-file", str(file)])
    line = client.wait_log("does not have are ignored: ")
    assert ": colour, overlay_alfa (did you mean overlay_alpha?); " in line
    assert f"`ros2 param list /{client.namespace}/perception`" in line
    assert len(client.logged("does not have")) == 1


def test_start_parameters_that_the_node_has_are_not_named(launch):
    client = launch(overlay_alpha=0.75, arguments=["-p", "qos_overrides./{namespace}/image.subscription.depth:=2"])
    client.wait_log("activate done")
    assert not client.logged("does not have")


@pytest.mark.parametrize(("given", "reason"), [
    ("semantic:=off", "expecting type 'STRING': semantic; ROS reads a plain off as a bool, put it in quotes: -p "
     "'NAME:=\"off\"'"),
    ("compressed:='true'", "expecting type 'BOOL': compressed; it is true or false: write it without quotes"),
    ("overlay_alpha:=1", "expecting type 'DOUBLE': overlay_alpha; write it with a point: 1.0 for 1"),
    ("min_area:=1.0", "expecting type 'INTEGER': min_area; it is a whole number: write it without a point, 1 for 1.0"),
    ("cameras:=off", "expecting type 'STRING_ARRAY': cameras"),
])
def test_a_start_value_of_a_wrong_type_is_refused_with_what_mends_it(launch, given, reason):
    client = launch(wait_active=False, arguments=["-p", given])
    assert client.ros.process.wait(TIMEOUT_S) == 1
    assert f"{reason}\n" in client.ros.output  # the end of a line: no other hint follows


@pytest.mark.parametrize(("line", "reason"), [
    ("cameras: []",
     "cameras: expected at least one camera name, got none; leave the line out for one camera without a name"),
    ("semantic: []", "semantic: expected a value, got none; leave the line out for the default"),
])
def test_an_empty_list_of_a_params_file_is_refused_with_what_mends_it(launch, tmp_path, line, reason):
    file = tmp_path / "my.yaml"
    file.write_text(f"/**:\n  ros__parameters:\n    {line}\n")
    client = launch(wait_active=False, arguments=["--params-file", str(file)])
    assert client.ros.process.wait(TIMEOUT_S) == 1
    assert reason in client.ros.output


def test_max_instances_takes_effect_on_the_next_frames(launch):
    client = launch()
    masks = client.subscribe(Image, "masks")

    def frame():
        return image_message(picture(SQUARES), client.stamp())

    client.stream(frame, lambda: masks.messages and pixels_of(masks.last).max() == 3, "three instances")
    assert client.set_parameters(max_instances=1)[0].successful
    client.stream(frame, lambda: pixels_of(masks.last).max() == 1, "one instance")


@pytest.mark.parametrize("model", ["slow", "busy"])
def test_set_parameters_answers_within_200_ms_while_inference_takes_2_s(launch, model):
    """`slow` sleeps as onnxruntime does (interpreter free), `busy` computes in Python (interpreter contended)."""
    client = launch(model=model, max_frame_age_ms=10_000)
    masks = client.subscribe(Image, "masks")
    assert client.set_parameters(score_threshold=0.3)[0].successful  # from here on the node knows the client
    service = client.service(SetParameters, "perception/set_parameters")
    client.stream(
        lambda: image_message(picture(SQUARES), client.stamp()),
        lambda: client.counts()["frames_received"] >= 1, "the first frame",
    )
    took = []
    before = len(masks)
    gc.disable()  # a full collection of this process, which has imported everything, takes longer than the bound
    try:
        while len(masks) == before:  # until the inference that runs now is done
            value = 0.3 + 0.01 * (len(took) % 10)
            request = SetParameters.Request(parameters=[Parameter("score_threshold", value=value).to_parameter_msg()])
            started = time.monotonic()
            future = service.call_async(request)
            wait_for(future.done, "set_parameters", 5)
            took.append(time.monotonic() - started)
            assert future.result().results[0].successful
            time.sleep(0.05)
    finally:
        gc.enable()
    assert len(took) >= 3, "too few calls happened while the model was at work"
    assert max(took) < 0.2
