"""QoS of the topics: what matches, and what a mismatch says."""

from __future__ import annotations

import os

import pytest
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, QoSReliabilityPolicy
from ros_graph import image_message, picture, wait_for
from sensor_msgs.msg import Image

BEST_EFFORT = QoSProfile(depth=1, reliability=QoSReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=5, reliability=QoSReliabilityPolicy.RELIABLE)


def test_the_default_input_matches_best_effort_and_reliable_publishers(launch):
    client = launch()
    masks = client.subscribe(Image, "masks", BEST_EFFORT)
    for profile in (BEST_EFFORT, RELIABLE):
        client._publishers.clear()
        client.publisher(Image, "image", profile)
        before = len(masks)
        client.stream(
            lambda: image_message(picture(), client.stamp()), lambda before=before: len(masks) > before, "masks"
        )
    endpoint = client.node.get_subscriptions_info_by_topic(f"/{client.namespace}/image")[0]
    assert endpoint.qos_profile.durability == QoSDurabilityPolicy.VOLATILE


def test_a_mismatch_is_an_error_with_the_line_that_mends_it(launch):
    client = launch(input_reliability="reliable")
    publisher = client.node.create_publisher(Image, "image", BEST_EFFORT)
    topic = f"/{client.namespace}/image"
    line = client.wait_log("QoS mismatch on " + topic)
    assert "requests reliability reliable, publishers offer best_effort" in line
    assert "input_reliability:=best_effort" in line
    mend = f"-p qos_overrides.{topic}.subscription.reliability:=best_effort"
    assert f"{mend}, or have it in params_file" in line
    wait_for(lambda: client.status() and "QoS mismatch" in client.status().message, "the mismatch in diagnostics")
    assert client.status().level == b"\x02"
    assert len(client.logged("QoS mismatch")) == 1
    client.node.destroy_publisher(publisher)
    wait_for(lambda: "no publisher on" in client.status().message, "that there is no publisher any more")
    assert client.status().level == b"\x01"


@pytest.mark.parametrize("where", ["argument", "params_file"])
def test_the_override_line_mends_it(launch, tmp_path, where):
    topic = f"/test_qos_{os.getpid()}/{where}"
    name, file = f"qos_overrides.{topic}.subscription.reliability", tmp_path / "my.yaml"
    file.write_text(f"/**:\n  ros__parameters:\n    {name}: best_effort\n")
    arguments = {"argument": ["-p", f"{name}:=best_effort"], "params_file": ["--params-file", str(file)]}
    client = launch(input_reliability="reliable", arguments=["-r", f"image:={topic}", *arguments[where]])
    masks = client.subscribe(Image, "masks")
    client.publisher(Image, topic, BEST_EFFORT)
    client.stream(lambda: image_message(picture(), client.stamp()), lambda: masks.messages, "masks", topic)
    assert not client.logged("QoS mismatch")
