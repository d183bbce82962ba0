"""A model whose files are missing: configure fails with their name and the command, and works once they are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from ros_graph import image_message, picture, wait_for
from sensor_msgs.msg import Image

SQUARE = (20, 20, 60, 60)
ERROR = b"\x02"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """The file that the test model `filed` needs, not there yet."""
    path = tmp_path / "filed.safetensors"
    monkeypatch.setenv("WEIGHTS", str(path))
    return path


def error_of(client, *words):
    status = client.status("model")
    return status is not None and status.level == ERROR and all(word in status.message for word in words)


def test_configure_names_file_and_command_and_works_once_the_file_is_there(launch, weights):
    client = launch(model="filed", autostart=False, wait_active=False)
    words = str(weights), "glesam models get filed"
    for _ in range(2):
        assert not client.change_state("configure")
        assert client.state() == "unconfigured"
    client.wait_log("configure failed", *words)
    wait_for(lambda: error_of(client, *words), "an error in /diagnostics")
    weights.touch()
    assert client.change_state("configure") and client.change_state("activate")
    masks = client.subscribe(Image, "masks")
    client.stream(
        lambda: image_message(picture((SQUARE,)), client.stamp()), lambda: masks.messages, "masks of the loaded model"
    )
    wait_for(lambda: not error_of(client), "an end of the error")


def test_autostart_leaves_a_node_that_can_be_configured_by_hand(launch, weights):
    client = launch(model="filed", wait_active=False)
    client.wait_log("autostart stopped", "configure")
    client.wait_log("configure failed", str(weights))
    assert client.state() == "unconfigured"
    weights.touch()
    assert client.change_state("configure") and client.change_state("activate")


def test_a_name_with_a_dot_and_a_plus_is_a_model_name(launch):
    client = launch(model="bright2.1_tiny+glesam")
    client.wait_log("model bright2.1_tiny+glesam loaded on cpu")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch (extra glesam)")
def test_a_full_size_model_without_weights(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path))
    client = launch(model="sam2.1_hiera_tiny+glesam", autostart=False, wait_active=False)
    assert not client.change_state("configure")
    words = str(tmp_path / "sam2.1_hiera_tiny+glesam"), "glesam models get sam2.1_hiera_tiny+glesam"
    client.wait_log("configure failed", *words)
    wait_for(lambda: error_of(client, *words), "an error in /diagnostics")
    assert client.state() == "unconfigured"
    assert "Traceback" not in client.ros.output


def test_a_full_size_model_without_its_packages(launch, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    client = launch(model="sam_vit_b", autostart=False, wait_active=False)
    assert not client.change_state("configure")
    words = "model sam_vit_b: No module named 'torch'", "pip install 'glesam_ros[glesam]'"
    client.wait_log("configure failed", *words)
    wait_for(lambda: error_of(client, *words), "an error in /diagnostics")
    assert client.state() == "unconfigured"
    assert "Traceback" not in client.ros.output
