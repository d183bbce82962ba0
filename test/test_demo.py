"""The demo: camera and command line as processes of their own, over real ROS."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, qos_profile_sensor_data
from ros_graph import ROOT, wait_for
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from glesam_ros import degradation
from glesam_ros.cli import demo as cli
from glesam_ros.ros import demo_camera

SMALL = {"width": 160, "height": 120}
START_S = 60.0
_numbers = itertools.count(1)


@pytest.fixture
def start(tmp_path):
    """`start(module, *arguments)` runs `python -m module`; its output is in `process.log`. All end with the test."""
    processes = []

    def launch(module: str, *arguments: str) -> subprocess.Popen:
        log = tmp_path / f"output_{len(processes)}.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            )
        process.log = log
        processes.append(process)
        return process

    yield launch
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(10)
        print(process.log.read_text())


@pytest.fixture
def camera(start, _ros):
    """`camera(type, topic, qos, **parameters)` starts a demo camera and gives it and its messages on the topic."""
    namespace = f"test_demo_{os.getpid()}_{next(_numbers)}"
    node = rclpy.create_node("listener", namespace=namespace)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=spin)
    thread.start()

    def launch(kind, topic, qos=qos_profile_sensor_data, **parameters):
        messages = []
        node.create_subscription(kind, topic, messages.append, qos)
        arguments = ["-r", f"__ns:=/{namespace}"]
        for name, value in {**SMALL, **parameters}.items():
            arguments += ["-p", f"{name}:={value}"]
        return start("glesam_ros.ros.demo_camera", "--ros-args", *arguments), messages

    yield launch
    ended.set()
    thread.join()
    executor.shutdown()
    node.destroy_node()


def test_camera_publishes_moving_pictures_with_stamps_and_frame_id(camera):
    process, images = camera(Image, "image", degradation="clear", frame_id="front_optical")
    wait_for(lambda: len(images) >= 20, "20 images", START_S)
    now = rclpy.clock.Clock().now().nanoseconds
    stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in images]
    assert all(a < b for a, b in zip(stamps, stamps[1:]))
    assert 0 <= now - stamps[-1] < 60e9
    for message in images[:20]:
        assert (message.width, message.height, message.encoding, message.step) == (160, 120, "rgb8", 480)
        assert len(message.data) == 160 * 120 * 3 and message.header.frame_id == "front_optical"
    pictures = [np.frombuffer(m.data, np.uint8).reshape(120, 160, 3) for m in images]
    assert any(np.abs(a.astype(int) - pictures[0]).mean() > 2 for a in pictures[1:])
    # the first photograph is the cup: its saucer is red, so red and blue are not swapped
    assert pictures[0][..., 0].mean() > 1.5 * pictures[0][..., 2].mean()
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0


def test_camera_publishes_jpeg_when_asked(camera):
    _, images = camera(CompressedImage, "image/compressed", degradation="clear", compressed="true")
    wait_for(lambda: images, "a compressed image", START_S)
    assert images[0].format == "jpeg"
    picture = cv2.imdecode(np.frombuffer(images[0].data, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (120, 160, 3) and picture[..., 2].mean() > 1.5 * picture[..., 0].mean()


def test_scenes_cycle_and_their_name_is_published(camera):
    latched = QoSProfile(depth=50, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
    _, names = camera(String, "demo_camera/scene", latched, seconds_per_scene=1.0)
    order = [name for name, _ in demo_camera.SCENES]
    wait_for(lambda: {m.data for m in names} == set(order), "every scene", START_S)
    played = [m.data for m in names]
    for before, after in zip(played, played[1:]):
        # back at the first one early where the next is not rendered yet
        assert after in (order[0], order[(order.index(before) + 1) % len(order)])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("degradation:=hail", "expected one of cycle, clear, low_light.*got 'hail'"),
        ("level:=4", "Max: 3, value: 4"),
        ("rate:=0.0", "Min: 0.1"),
        ("rate:=10", r"'rate'.*'INTEGER'.*write it with a point: 1\.0 for 1"),
        ("compressed:='true'", "'compressed'.*'STRING'.*true or false: write it without quotes"),
    ],
)
def test_camera_refuses_wrong_parameters(start, argument, words):
    process = start("glesam_ros.ros.demo_camera", "--ros-args", "-p", argument)
    assert process.wait(30) == 1
    assert re.search(words, process.log.read_text())


@pytest.mark.parametrize("arguments", [("--params-file", "nowhere.yaml"), ("-r", "__ns:=/2cam"), ("-p", "rate")])
def test_camera_refuses_wrong_arguments_of_ros(start, arguments):
    process = start("glesam_ros.ros.demo_camera", "--ros-args", *arguments)
    assert process.wait(30) == 1
    said = process.log.read_text()
    assert "the demo camera cannot start: " in said and "Traceback" not in said


def test_a_library_that_locks_itself_up_does_not_keep_the_camera(start, tmp_path, monkeypatch):
    # as the node's process, in test_node_lifecycle.py: the interpreter's lock stays taken once main is over
    (tmp_path / "held.py").write_text(
        "import ctypes\nfrom glesam_ros.ros import demo_camera\ndemo_camera.main()\nctypes.PyDLL(None).pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    process = start("held", "--ros-args", "-p", "width:=160", "-p", "height:=120")
    wait_for(lambda: "scene " in process.log.read_text(), "a first scene", START_S)
    process.terminate()
    assert process.wait(30) == -signal.SIGALRM


def _decode(frames: list[np.ndarray]) -> np.ndarray:
    return np.stack([cv2.imdecode(f, cv2.IMREAD_COLOR) for f in frames])


def test_render_repeats_and_degrades(monkeypatch):
    monkeypatch.setattr(demo_camera, "SWEEP_FRAMES", 3)
    going = threading.Event()
    scene = [_decode(demo_camera.render(name, "coffee", 3, (160, 120), 1, going)) for name in ("clear", "low_light")]
    assert scene[0].shape == (3, 120, 160, 3) and scene[1].mean() < 0.5 * scene[0].mean()
    again = _decode(demo_camera.render("low_light", "coffee", 3, (160, 120), 1, going))
    np.testing.assert_array_equal(scene[1], again)


def test_every_photograph_of_the_cycle_ships_with_its_licence():
    licences = (demo_camera.PHOTOGRAPHS / "LICENSES.md").read_text()
    for name, photograph in demo_camera.SCENES:
        path = demo_camera.PHOTOGRAPHS / f"{photograph}.jpg"
        assert cv2.imread(str(path)) is not None and path.stat().st_size < 150_000
        assert f"`{photograph}.jpg`" in licences
        assert name in ("clear", *degradation.names())


@pytest.mark.parametrize("size", [(640, 480), (320, 320), (1280, 400)])
def test_window_never_leaves_the_photograph(size):
    # ramps along both axes: outside the photograph they would stand still
    photo = np.zeros((200, 250, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.arange(250)[None, :], np.arange(200)[:, None]
    for progress in np.linspace(0, 1, 9):
        window = demo_camera._window(photo, size, float(progress)).astype(int)
        across, down = window[0, -1, 0] - window[0, 0, 0], window[-1, 0, 1] - window[0, 0, 1]
        assert down / (size[1] - 1) == pytest.approx(across / (size[0] - 1), rel=0.04)
        assert across > 0.8 * 250 or down > 0.8 * 200


def test_sweep_goes_forth_and_back():
    assert [demo_camera.forth_and_back(k, 4) for k in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert demo_camera.forth_and_back(5, 1) == 0


# glesam demo


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def demo(start, tmp_path):
    """A running `glesam demo` without end, its folder, and its children."""
    out = tmp_path / "show"
    process = start("glesam_ros.cli.main", "demo", "--out", str(out))
    wait_for(lambda: len(_children(process.pid)) == 2, "node and camera")
    return process, out, _children(process.pid)


def details(picture):
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.float32)
    return cv2.Laplacian(cv2.GaussianBlur(grey, (0, 0), 1.5), cv2.CV_32F)


def test_demo_shows_rates_writes_pictures_and_ends_its_children(demo):
    process, out, children = demo
    wait_for(lambda: list(out.glob("*.jpg")), f"a picture\n{process.log.read_text()}", 120)
    pattern = (
        r"in +([\d.]+) Hz, out +([\d.]+) Hz \| latency (\d+) ms, p95 (\d+) ms \| (\w+): degradation ([\d.]+), "
        r"(?:not )?enhanced, \d+ instances \| skipped \d+, faults \d+ \| node (\d+) MB"
    )
    wait_for(lambda: re.search(pattern, process.log.read_text()), "a line with all figures", 60)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    text = process.log.read_text()
    line = re.search(pattern, text)
    assert line, text
    assert float(line[2]) > 0 and int(line[3]) <= int(line[4]) and 0 <= float(line[6]) <= 1 and int(line[7]) > 10
    assert "contact_sheet.jpg" in text
    [pair] = [p for p in out.glob("*.jpg") if p.stem in dict(demo_camera.SCENES)][:1]
    picture = cv2.imread(str(pair))
    assert picture.shape[1] > 2 * 640 and picture.shape[0] > 480
    # same frame on both sides: its details show through the masks' colours; those of other frames correlate below 0.02
    left, right = (details(side[60:]) for side in (picture[-480:, :640], picture[-480:, -640:]))
    assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.05
    assert cv2.imread(str(out / "contact_sheet.jpg")) is not None
    assert not any(map(_is_running, children))


def test_children_end_even_when_the_demo_is_killed(demo):
    process, _, children = demo
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(_is_running, children)), "the end of node and camera")


def test_demo_ends_by_itself_after_the_time(start, tmp_path):
    process = start("glesam_ros.cli.main", "demo", "--out", str(tmp_path / "show"), "--seconds", "1")
    assert process.wait(120) == 0
    assert "frames segmented" in process.log.read_text()


def test_demo_says_why_the_node_cannot_work(start, tmp_path):
    process = start("glesam_ros.cli.main", "demo", "--out", str(tmp_path / "show"), "--model", "nothing")
    assert process.wait(60) == 1
    text = process.log.read_text()
    assert "expected one of" in text and "got 'nothing'" in text and "node.log" in text


def test_pictures_that_the_disk_has_no_room_for_end_the_demo(tmp_path):
    pixels = np.zeros((120, 160, 3), np.uint8)
    cli._write_pair(tmp_path / "rain.jpg", "rain", pixels, pixels)
    full = tmp_path / "full.jpg"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        cli._write_pair(full, "rain", pixels, pixels)
    with pytest.raises(OSError, match="No space left"):
        cli._write_sheet(full, [tmp_path / "rain.jpg"])


def test_demo_without_ros_says_how_to_get_it(tmp_path):
    code = "import sys; sys.modules['rclpy'] = None\nfrom glesam_ros.cli.main import main\nsys.exit(main(['demo']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "rclpy" in result.stderr and "pip install" in result.stderr and "setup.bash" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("seconds", ["-1", "inf", "soon"])
def test_demo_refuses_times_that_are_none(seconds, capsys):
    from glesam_ros.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(["demo", "--seconds", seconds])
    assert stop.value.code == 2
    assert seconds in capsys.readouterr().err


def test_time_of_the_demo_may_be_zero():
    from glesam_ros.cli.main import make_parser

    assert math.isclose(make_parser().parse_args(["demo"]).seconds, 0)
