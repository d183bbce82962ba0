"""`perception.launch.py`, run by the real launch: names, topics, parameters, refusals, respawn."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs rclpy (scripts/setup.sh, or a sourced ROS 2)")
pytest.importorskip("launch_ros", reason="needs launch_ros, which has no wheel: ROS 2 from apt or source")

from rcl_interfaces.srv import GetParameters  # noqa: E402
from ros_graph import Client, LoggedProcess, image_message, picture, wait_for  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_FILE = ROOT / "launch/perception.launch.py"
RQT_PLUGINS = ("rqt_image_view", "rqt_plot", "rqt_reconfigure", "rqt_runtime_monitor")
SQUARE = (20, 20, 60, 60)
DEMO = {"demo_camera": "true"}
RUNNER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import PushRosNamespace, SetParameter, SetParametersFromFile
arguments = [a.split(":=", 1) for a in sys.argv[2:]]
service = LaunchService()
service.include_launch_description(LaunchDescription([
    *PARENT,
    IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments)
]))
sys.exit(service.run())
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """An ament prefix of the package whose node has the test models as well."""
    root = tmp_path_factory.mktemp("prefix")
    index = root / "share/ament_index/resource_index/packages"
    programs = root / "lib/glesam_ros"
    for folder in (index, programs, root / "share/glesam_ros"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "resource/glesam_ros", index)
    for folder in ("launch", "config"):
        (root / "share/glesam_ros" / folder).symlink_to(ROOT / folder)
    for name, program in (
        ("perception_node", f"{ROOT}/test/nodes/model_node.py"),
        ("demo_camera", f"{ROOT}/glesam_ros/ros/demo_camera.py"),
    ):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
        script.chmod(0o755)
    return root


def pretend_installed(prefix: Path, *packages: str) -> None:
    """Name `packages` in the index of an ament prefix."""
    index = prefix / "share/ament_index/resource_index/packages"
    index.mkdir(parents=True, exist_ok=True)
    for package in packages:
        (index / package).touch()


@pytest.fixture(scope="module")
def viewers(tmp_path_factory) -> Path:
    """An ament prefix of an RViz and an rqt that write their arguments, and the files in them, to `seen/<package>`."""
    root = tmp_path_factory.mktemp("viewers")
    (root / "seen").mkdir()
    pretend_installed(root, *RQT_PLUGINS, "rviz2", "rqt_gui")
    for package in ("rviz2", "rqt_gui"):
        programs = root / "lib" / package
        programs.mkdir(parents=True)
        script, seen = programs / package, root / "seen" / package
        # moved when it is whole, as a test waits for it
        script.write_text(
            f'#!/bin/sh\n{{ echo "$@"; for file in "$@"; do [ -f "$file" ] && cat "$file"; done; }} >"{seen}.part"\n'
            f'mv "{seen}.part" "{seen}"\n'
        )
        script.chmod(0o755)
    return root


class LaunchProcess(LoggedProcess):
    """A launch in its own process; `parent` are actions of a launch file that includes ours.

    `prefix` may be several prefixes, in the form of AMENT_PREFIX_PATH.
    """

    def __init__(self, prefix: Path | str, arguments: dict[str, str], parent: str = "") -> None:
        runner = RUNNER.replace("PARENT", f"[{parent}]")
        command = [sys.executable, "-c", runner, str(LAUNCH_FILE), *(f"{k}:={v}" for k, v in arguments.items())]
        super().__init__(command, {"AMENT_PREFIX_PATH": prefix, "PYTHONPATH": ROOT}, own_session=True)

    def wait(self) -> int:
        return self.process.wait(60)

    def end(self) -> None:
        """As Ctrl-C in a terminal: launch takes for granted that what it started has got the signal, too."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        self.wait()


@pytest.fixture
def launched(_ros, prefix):
    """`launched(namespace, argument=value, ...)` starts the launch file and gives a `Client` of the namespace.

    `parent` as for `LaunchProcess`; `below` is the namespace that comes of it.
    """
    clients = []

    def start(namespace: str, parent: str = "", below: str | None = None, **arguments: str) -> Client:
        process = LaunchProcess(prefix, {"model": "bright", "namespace": namespace, **arguments}, parent)
        clients.append(Client(below or namespace, process))
        return clients[-1]

    yield start
    for client in clients:
        client.ros.end()
        client.close()
        print(client.ros.output)


def parameters(client: Client, *names: str, node: str = "perception") -> list:
    request = GetParameters.Request(names=list(names))
    return client.call(GetParameters, f"{node}/get_parameters", request).values


def test_two_cameras_are_remapped_and_answer_under_their_names(launched):
    client = launched(
        "launch_two", cameras="front,rear", image_topics="/launch_two_front/image_raw,/launch_two_rear/image_raw"
    )
    client.wait_state("active")
    for camera in ("front", "rear"):
        masks = client.subscribe(Image, f"{camera}/masks")
        client.stream(
            lambda frame=camera: image_message(picture((SQUARE,)), client.stamp(), frame),
            lambda inbox=masks: inbox.messages, f"{camera}/masks", f"/launch_two_{camera}/image_raw",
        )
        assert masks.last.header.frame_id == camera


def test_arguments_win_over_params_file_and_the_rest_of_it_counts(launched, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("/**:\n  ros__parameters:\n    model: absent\n    score_threshold: 0.25\n    compressed: true\n")
    client = launched("launch_file", params_file=str(file), image_topic="/launch_file_camera/image_raw/compressed")
    client.wait_state("active")
    model, score, compressed, sim = parameters(client, "model", "score_threshold", "compressed", "use_sim_time")
    assert model.string_value == "bright"
    assert score.double_value == 0.25
    assert compressed.bool_value is True
    assert sim.bool_value is False
    # the compressed topic of the camera is the one that the node listens to
    client.publisher(CompressedImage, "/launch_file_camera/image_raw/compressed")


@pytest.mark.parametrize("key", ["/**", "/launch_file/perception", "/launch_file/*"])
def test_cameras_and_compressed_of_the_params_file_wire_topics_and_demo_camera(launched, tmp_path, key):
    file = tmp_path / "my.yaml"
    file.write_text(
        f"{key}:\n  ros__parameters:\n    cameras: [left, arm/wrist]\n    compressed: true\n"
        "/elsewhere/perception:\n  ros__parameters:\n    cameras: [other]\n"
    )
    client = launched("launch_file", params_file=str(file), image_topics="/launch_l/image,/launch_r/image", **DEMO)
    client.wait_state("active")
    for camera, topic in (("left", "/launch_l"), ("arm/wrist", "/launch_r")):
        masks = client.subscribe(Image, f"{camera}/masks")
        wait_for(lambda inbox=masks: inbox.messages, f"masks of {camera}")
        assert masks.last.header.frame_id == f"demo_camera_{camera.replace('/', '_')}"
        kinds = dict(client.node.get_topic_names_and_types())
        assert kinds[f"{topic}/image/compressed"] == ["sensor_msgs/msg/CompressedImage"]
    assert {"demo_camera_left", "demo_camera_arm_wrist"} <= set(client.node.get_node_names())


@pytest.mark.parametrize(("text", "sections"), [
    ("perception:\n  ros__parameters:\n    model: absent\n", "perception"),
    ("perception_node:\n  ros__parameters: {}\n", "perception_node"),
    ("/glesam/perception:\n  ros__parameters: {}\nfront:\n  camera:\n    ros__parameters: {}\n",
     "/glesam/perception, front/camera"),
    ("/front/camera:\n  ros__parameters: {}\n/*/perception:\n  ros__parameters: {}\n", None),
    ("launch_robot2:\n  perception:\n    ros__parameters: {}\n", None),
    ("", None),
    ("perception:\n", None),
])
def test_a_params_file_without_a_section_for_the_node_is_warned_of(_ros, prefix, tmp_path, text, sections):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    process = LaunchProcess(prefix, {"model": "bright", "namespace": "launch_robot2", "params_file": str(file)})
    try:
        # not "process started": a Ctrl-C in that moment may find launch half-way, and it never ends
        wait_for(lambda: "activate done" in process.output or process.process.poll() is not None, "a start")
        if sections:
            warning = f"params_file {file} has nothing for /launch_robot2/perception; its sections: {sections}; name"
            assert warning in process.output
        else:
            assert "has nothing for" not in process.output
    finally:
        process.end()


def test_autostart_off_waits_and_use_sim_time_is_passed_on(launched):
    client = launched("launch_wait", autostart="false", use_sim_time="true")
    client.wait_state("unconfigured")
    [sim] = parameters(client, "use_sim_time")
    assert sim.bool_value is True
    assert client.change_state("configure") and client.state() == "inactive"


@pytest.mark.parametrize("given", ["True", "FALSE"])
def test_true_and_false_are_taken_in_any_case_and_demo_camera_has_the_same_time(launched, given):
    client = launched("launch_case", use_sim_time=given, autostart=given, demo_camera="True")
    client.wait_state("active" if given == "True" else "unconfigured")
    for node in ("perception", "demo_camera"):
        [sim] = parameters(client, "use_sim_time", node=node)
        assert sim.bool_value is (given == "True"), node


def test_use_sim_time_of_a_parent_launch_counts_unless_it_is_given(launched):
    parent = "SetParameter('use_sim_time', True)"
    client = launched("launch_parent", parent, autostart="false", demo_camera="true")
    other = launched("launch_child", parent, autostart="false", use_sim_time="false")
    for node in ("perception", "demo_camera"):
        [sim] = parameters(client, "use_sim_time", node=node)
        assert sim.bool_value is True, node
    [sim] = parameters(other, "use_sim_time")
    assert sim.bool_value is False


@pytest.mark.parametrize(("given", "expected"), [({}, True), ({"use_sim_time": "false"}, False)])
def test_use_sim_time_of_the_params_file_counts_for_node_and_demo_camera(launched, tmp_path, given, expected):
    file = tmp_path / "mine.yaml"
    file.write_text("/launch_time/perception:\n  ros__parameters:\n    use_sim_time: true\n    autostart: false\n")
    client = launched("launch_time", params_file=str(file), demo_camera="true", **given)
    for node in ("perception", "demo_camera"):
        [sim] = parameters(client, "use_sim_time", node=node)
        assert sim.bool_value is expected, node


@pytest.mark.parametrize("parent", [
    "SetParametersFromFile(FILE)",
    # a list of SetParameter comes in a form that the node alone cannot read, "true" as text
    "SetParameter('cameras', ['left', 'arm/wrist']), SetParameter('compressed', 'true'), "
    "SetParameter('max_instances', 7)",
])
def test_what_a_parent_launch_sets_counts_for_node_topics_and_demo_camera(launched, tmp_path, parent):
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "/**:\n  ros__parameters:\n    cameras: [left, arm/wrist]\n    compressed: true\n    max_instances: 7\n"
        "/elsewhere/perception:\n  ros__parameters:\n    cameras: [other]\n"
    )
    parent = parent.replace("FILE", repr(str(file)))
    client = launched("launch_fleet", parent, image_topics="/launch_fl/image,/launch_fr/image", **DEMO)
    client.wait_state("active")
    cameras, most = parameters(client, "cameras", "max_instances")
    assert (cameras.string_array_value, most.integer_value) == (["left", "arm/wrist"], 7)
    for camera, topic in (("left", "/launch_fl"), ("arm/wrist", "/launch_fr")):
        masks = client.subscribe(Image, f"{camera}/masks")
        wait_for(lambda inbox=masks: inbox.messages, f"masks of {camera}")
        assert masks.last.header.frame_id == f"demo_camera_{camera.replace('/', '_')}"
        kinds = dict(client.node.get_topic_names_and_types())
        assert kinds[f"{topic}/image/compressed"] == ["sensor_msgs/msg/CompressedImage"]
    assert "has nothing for" not in client.ros.output


def test_params_file_wins_over_a_parent_launch_and_arguments_over_both(launched, tmp_path):
    fleet, mine = tmp_path / "fleet.yaml", tmp_path / "mine.yaml"
    fleet.write_text("/**:\n  ros__parameters: {max_instances: 7, min_area: 8, cameras: [a, b], overlay_alpha: 0.25}\n")
    mine.write_text("/**:\n  ros__parameters: {max_instances: 9, compressed: false, cameras: [c, d]}\n")
    file = f"SetParametersFromFile({str(fleet)!r})"
    parent = f"{file}, SetParameter('overlay_alpha', 0.75), SetParameter('compressed', True)"
    client = launched("launch_wins", parent, params_file=str(mine), cameras="front", **DEMO)
    client.wait_state("active")
    values = parameters(client, "max_instances", "min_area", "overlay_alpha", "compressed", "cameras")
    most, area, alpha, compressed, cameras = values
    assert (most.integer_value, area.integer_value, alpha.double_value) == (9, 8, 0.75)
    assert (compressed.bool_value, cameras.string_array_value) == (False, ["front"])
    masks = client.subscribe(Image, "front/masks")
    wait_for(lambda: masks.messages, "masks of front")


@pytest.mark.parametrize(("parent", "mine", "expected"), [
    ("SetParametersFromFile(FILE), SetParameter('compressed', False)", None, False),
    ("SetParameter('compressed', False), SetParametersFromFile(FILE)", None, True),
    ("SetParametersFromFile(FILE)", False, False),
    # for ROS the file goes where /** is named first, which is before the section of the node
    ("SetParameter('compressed', False), SetParametersFromFile(FILE)", False, True),
])
def test_node_and_demo_camera_agree_whatever_the_order_of_sections(launched, tmp_path, parent, mine, expected):
    fleet, own = tmp_path / "fleet.yaml", tmp_path / "mine.yaml"
    fleet.write_text("/launch_order/perception:\n  ros__parameters:\n    compressed: true\n")
    own.write_text(f"/**:\n  ros__parameters:\n    compressed: {str(mine).lower()}\n")
    given = {} if mine is None else {"params_file": str(own)}
    client = launched("launch_order", parent.replace("FILE", repr(str(fleet))), autostart="false", **DEMO, **given)
    for node in ("perception", "demo_camera"):
        [compressed] = parameters(client, "compressed", node=node)
        assert compressed.bool_value is expected, node


@pytest.mark.parametrize(("parent", "reason"), [
    ("SetParameter('cameras', ['a', 'a'])",
     "SetParameter of a parent launch: cameras: expected at least one name and no name twice, got ['a', 'a']"),
    ("SetParameter('compressed', '[a')", "SetParameter of a parent launch: compressed: expected a bool, got '[a'"),
    ("SetParametersFromFile('FOLDER/mine.yaml')",
     "SetParametersFromFile of a parent launch, FOLDER/mine.yaml: use_sim_time: expected true or false, got 1"),
    ("SetParametersFromFile('FOLDER/none.yaml')",
     "SetParametersFromFile of a parent launch: expected a YAML file of parameters, cannot read FOLDER/none.yaml"),
])
def test_a_value_of_a_parent_launch_that_the_node_cannot_take_is_refused_with_its_place(
    prefix, tmp_path, parent, reason
):
    (tmp_path / "mine.yaml").write_text("/**:\n  ros__parameters:\n    use_sim_time: 1\n")
    process = LaunchProcess(prefix, {}, parent.replace("FOLDER", str(tmp_path)))
    assert process.wait() != 0
    assert reason.replace("FOLDER", str(tmp_path)) in process.output
    assert "process started" not in process.output


@pytest.mark.parametrize(("line", "reason"), [
    ("use_sim_time: 1", "use_sim_time: expected true or false, got 1"),
    ("cameras: []", "cameras: expected at least one name and no name twice, got []"),
    ("cameras: [a, a]", "cameras: expected at least one name and no name twice, got ['a', 'a']"),
    ("cameras: front", "cameras: expected a list of strings, got 'front'"),
    ("compressed: 1", "compressed: expected a bool, got 1"),
])
def test_a_value_of_the_params_file_that_the_node_cannot_take_is_refused_with_the_file(prefix, tmp_path, line, reason):
    file = tmp_path / "mine.yaml"
    file.write_text(f"/**:\n  ros__parameters:\n    {line}\n")
    process = LaunchProcess(prefix, {"params_file": str(file)})
    assert process.wait() != 0
    assert f"params_file {file}: {reason}" in process.output
    assert "process started" not in process.output


@pytest.mark.parametrize(("namespace", "below"), [
    ("inner", "launch_push/inner"),
    ("", "launch_push"),
    ("/launch_absolute", "launch_absolute"),
])
def test_a_namespace_of_a_parent_launch_is_kept_unless_ours_is_absolute(launched, namespace, below):
    client = launched(namespace, "PushRosNamespace('launch_push')", below, demo_camera="true")
    client.wait_state("active")
    assert parameters(client, "compressed", node="demo_camera")
    assert client.node.count_publishers(f"/{below}/masks")


@pytest.mark.parametrize(("parent", "arguments", "names"), [
    ("PushRosNamespace('robot')", {}, ("/robot/glesam", "/robot/glesam")),
    ("PushRosNamespace('robot')", {"namespace": "/mine", "cameras": "front,rear"}, ("/mine", "/mine/front")),
    ("", {"namespace": "/"}, ("", "")),
    ("", {}, ("/glesam", "/glesam")),
])
def test_views_show_the_resulting_names(_ros, prefix, viewers, tmp_path, monkeypatch, parent, arguments, names):
    monkeypatch.setenv("ROS_HOME", str(tmp_path))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "log"))
    base, shown = names
    for seen in (viewers / "seen").iterdir():
        seen.unlink()
    process = LaunchProcess(
        os.pathsep.join((str(viewers), str(prefix))),
        {"model": "bright", "autostart": "false", "use_sim_time": "true", "rqt": "true", "rviz": "true", **arguments},
        parent,
    )
    try:
        rviz, rqt = (
            wait_for((viewers / "seen" / name).is_file, f"{name}\n{process.output}")
            and (viewers / "seen" / name).read_text()
            for name in ("rviz2", "rqt_gui")
        )
        # launch can hang for ever where Ctrl-C comes while it is starting a process
        wait_for(lambda: process.output.count("process has finished") == 2, f"the viewers' end\n{process.output}")
    finally:
        process.end()
    assert f"Value: {shown}/overlay\n" in rviz and "use_sim_time: true" in rviz
    assert f"'{shown}/overlay'" in rqt and f"'{shown}/quality/results[0]/score'" in rqt
    assert "--force-discover" in rqt.splitlines()[0]
    assert f"['{base}/perception']" in rqt and f"['{base or '/'}']" in rqt
    if "/glesam" not in base:
        assert "/glesam" not in (rviz + rqt).replace("/glesam_ros/", "")
    written = sorted(file.name for file in (tmp_path / "glesam_ros").glob("*"))
    if base == "/glesam":
        assert written == []
    else:
        name = base.strip("/").replace("/", "_") or "root"
        assert written == [f"{name}.perspective", f"{name}.rviz"]
        assert str(tmp_path / "glesam_ros" / f"{name}.rviz") in rviz.splitlines()[0]


def test_a_view_that_cannot_be_written_is_refused_with_the_place(prefix, viewers, tmp_path, monkeypatch):
    (tmp_path / "glesam_ros").touch()
    monkeypatch.setenv("ROS_HOME", str(tmp_path))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "log"))
    arguments = {"namespace": "/robot2", "rviz": "true"}
    process = LaunchProcess(os.pathsep.join((str(viewers), str(prefix))), arguments)
    assert process.wait() != 0
    assert f"expected to write {tmp_path}/glesam_ros/robot2.rviz" in process.output and "set ROS_HOME" in process.output


@pytest.mark.parametrize(("topic", "full"), [
    ("cam_1/image", "/launch_topic/cam_1/image"),
    ("~/image", "/launch_topic/perception/image"),
    ("/cam/_image2/compressed", "/cam/_image2"),
])
def test_a_topic_is_taken_by_the_rules_of_ros(launched, topic, full):
    client = launched("launch_topic", image_topic=topic)
    client.wait_state("active")
    wait_for(lambda: client.node.count_subscribers(full), f"a subscriber of {full}")


def test_a_model_name_with_a_dot_and_a_plus_arrives_as_it_is(launched):
    client = launched("launch_name", model="bright2.1_tiny+glesam")
    client.wait_state("active")
    [model] = parameters(client, "model")
    assert model.string_value == "bright2.1_tiny+glesam"


def test_demo_camera_feeds_the_node(launched):
    client = launched("launch_demo", demo_camera="true")
    client.wait_state("active")
    masks = client.subscribe(Image, "masks")
    wait_for(lambda: masks.messages, f"masks of the demo camera\n{client.ros.output}", 60)
    assert (masks.last.width, masks.last.height) == (640, 480)


def test_launch_has_no_ros_node_that_could_hold_up_its_end(launched):
    client = launched("launch_plain")
    client.wait_state("active")
    assert client.node.count_publishers("/launch_plain/perception/transition_event") == 1
    assert client.node.count_subscribers("/launch_plain/perception/transition_event") == 0


def test_respawn_brings_the_node_back(launched):
    client = launched("launch_again", respawn="true")
    client.wait_state("active")
    started = "process started with pid ["
    assert client.ros.output.count(started) == 1
    pid = int(client.ros.output.split(started)[1].split("]")[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: client.ros.output.count(started) == 2, f"a second start\n{client.ros.output}")
    wait_for(lambda: client.ros.output.count("activate done") == 2, f"a second activation\n{client.ros.output}")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"image_topics": "/a,/b"}, "got 2 topics (/a, /b) for 1 cameras"),
        ({"image_topic": "/a", "image_topics": "/b"}, "leave one out"),
        ({"cameras": "front,"}, "cameras: expected names joined by commas, got an empty one in 'front,'"),
        ({"cameras": "front,front"}, "no name twice, got ['front', 'front']"),
        ({"image_topic": "bad topic"}, "as /camera/image_raw; got 'bad topic'"),
        ({"image_topic": "/a//b"}, "image_topic: expected names of letters, digits and single _ that do not begin"),
        ({"image_topic": "/1a"}, "got '/1a'"),
        ({"image_topic": "/a/"}, "got '/a/'"),
        ({"image_topic": "{ns}/a"}, "got '{ns}/a'"),
        ({"image_topic": "/a__b"}, "got '/a__b'"),
        ({"image_topic": "/compressed"}, "got '/compressed'"),
        ({"cameras": "a,b", "image_topics": "/a,/b-c"}, "got '/b-c'"),
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda, tensorrt; got 'tpu'"),
        ({"compressed": "perhaps"}, "compressed: expected true or false, got 'perhaps'"),
        ({"use_sim_time": "1"}, "use_sim_time: expected true or false, got '1'"),
        ({"params_file": "nowhere.yaml"}, "params_file: expected a YAML file of parameters, cannot read nowhere.yaml"),
        ({"rviz": "maybe"}, "rviz: expected true or false, got 'maybe'"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(prefix, arguments, reason):
    process = LaunchProcess(prefix, arguments)
    assert process.wait() != 0
    assert reason in process.output
    assert "process started" not in process.output


@pytest.mark.parametrize(("argument", "there", "missing"), [
    ("rqt", (), ("rqt_gui", *RQT_PLUGINS)),
    ("rqt", ("rqt_gui", "rqt_plot", "rqt_image_view"), ("rqt_reconfigure", "rqt_runtime_monitor")),
    ("rviz", (), ("rviz2",)),
])
def test_missing_packages_of_a_viewer_are_named(prefix, tmp_path, argument, there, missing):
    from ament_index_python.packages import get_packages_with_prefixes

    if installed := set(missing) & set(get_packages_with_prefixes()):
        pytest.skip(f"installed: {', '.join(sorted(installed))}")
    pretend_installed(tmp_path, *there)
    process = LaunchProcess(os.pathsep.join((str(tmp_path), str(prefix))), {argument: "true"})
    assert process.wait() != 0
    apt = " ".join(f"ros-$ROS_DISTRO-{package.replace('_', '-')}" for package in missing)
    assert f"{argument}:=true needs {', '.join(missing)}: sudo apt install {apt}\n" in process.output


def test_the_plugins_of_the_perspective_are_those_that_are_required():
    perspective = json.loads((ROOT / "config/perception.perspective").read_text())
    running = perspective["groups"]["pluginmanager"]["keys"]["running-plugins"]["repr"]
    assert sorted(name.split("/")[0] for name in ast.literal_eval(running)) == sorted(RQT_PLUGINS)
