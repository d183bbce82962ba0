"""The perception node, and on request a demo camera, rqt and RViz; `ros2 launch glesam_ros perception.launch.py -s`."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_prefix, get_package_share_directory
from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, TimerAction
from launch.logging import get_logger
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

from glesam_ros import settings
from glesam_ros.whole_files import write_whole

NODE_NAME = "perception"
VIEW_NAMESPACE = "/glesam"
"""Namespace of node and topics in the rqt perspective and the RViz view, replaced where the launch uses another."""
RESPAWN_DELAY_S = 2.0
RQT_DELAY_S = 5.0
"""rqt shows the sliders of the nodes that are there when it starts; later ones wait for its Refresh button."""
RQT_PACKAGES = ("rqt_gui", "rqt_image_view", "rqt_plot", "rqt_reconfigure", "rqt_runtime_monitor")
"""rqt and the plugins of our perspective; where one of them is missing it opens without the settings of the others."""
CONFIG = Path(get_package_share_directory("glesam_ros")) / "config"

MIRRORED = ("model", "device", "precision", "semantic", "restorer", "cameras", "compressed", "autostart")
"""Arguments that set a parameter of the node, when they are given; else params_file or a parent launch decides."""
CLOCK = "use_sim_time"
WIRED = ("cameras", "compressed", CLOCK)
"""Parameters of the node that topics, demo camera and views depend on, wherever they are set."""
_TOKEN = r"(?!\w*__)[A-Za-z_]\w*"
TOPIC = re.compile(rf"(?:~?/)?{_TOKEN}(?:/{_TOKEN})*", re.ASCII)
"""What a remapping rule of ROS takes as a topic: absolute, relative or below the node (~/), but no {node} and such."""
YES_NO = ("true", "false")
OR_NOT = f"{' or '.join(YES_NO)}, in any case."


def generate_launch_description() -> LaunchDescription:
    """Arguments, then the processes that they ask for."""
    return LaunchDescription([*_arguments(), OpaqueFunction(function=_start)])


def _arguments() -> list[DeclareLaunchArgument]:
    return [
        _argument(
            "namespace", "glesam",
            "Namespace of node and topics; where it does not begin with / it goes below that of a parent launch.",
        ),
        _argument(
            "params_file", "",
            f"YAML file of parameters of the node; {CONFIG / 'perception.yaml'} is a template with all defaults. "
            "It wins over what a parent launch sets (SetParameter, SetParametersFromFile). Empty: no file.",
        ),
        _argument(
            "image_topic", "",
            "Topic of the only camera; empty: image below the namespace. Where it does not begin with / it goes below "
            "the namespace, too.",
        ),
        _argument("image_topics", "", "As image_topic of several cameras, comma separated, in the order of cameras."),
        *(_argument(name, "", _mirrored_text(name)) for name in MIRRORED),
        _argument(
            CLOCK, "", f"Take the time from /clock. {OR_NOT} Empty: as in params_file or a parent launch."
        ),
        _argument("respawn", "false", f"Start the node again {RESPAWN_DELAY_S:g} s after it ended. {OR_NOT}"),
        _argument("log_level", "info", "Log level of the node.", ("debug", "info", "warn", "error", "fatal")),
        _argument(
            "demo_camera", "false", f"Start a camera that plays photographs, one for each camera name. {OR_NOT}"
        ),
        _argument("rqt", "false", f"Start rqt with sliders, overlay, quality and diagnostics. {OR_NOT}"),
        _argument("rviz", "false", f"Start RViz with the result images. {OR_NOT}"),
    ]


def _argument(name: str, default: str, text: str, choices: tuple[str, ...] | None = None) -> DeclareLaunchArgument:
    return DeclareLaunchArgument(name, default_value=default, description=text, choices=choices)


def _mirrored_text(name: str) -> str:
    spec, default = settings.spec(name), settings.default(name)
    choices = f" One of {', '.join(spec.choices)}." if spec.choices else ""
    shown = ",".join(default) if isinstance(default, tuple) else default
    form = " Comma separated." if isinstance(default, tuple) else f" {OR_NOT}" if isinstance(default, bool) else ""
    return f"{spec.help}{choices}{form} Empty: as in params_file or a parent launch, else {shown!r}."


def _start(context: LaunchContext) -> list[Action]:
    given = {each.name: LaunchConfiguration(each.name).perform(context).strip() for each in _arguments()}
    changes = {name: _value(name, given[name]) for name in MIRRORED if given[name]}
    # where it is not given nothing is passed on, not even false: that would win over a parent launch
    clock = {CLOCK: _flag(CLOCK, given[CLOCK])} if given[CLOCK] else {}
    asked = {name: _flag(name, given[name]) for name in ("respawn", "demo_camera", "rqt", "rviz")}
    base = make_namespace_absolute(
        prefix_namespace(context.launch_configurations.get("ros_namespace"), given["namespace"])
    )
    file = given["params_file"]
    own = {**changes, **clock}
    wired = _wired(context.launch_configurations.get("global_params", []), file, f"{base.rstrip('/')}/{NODE_NAME}", own)
    clock_of_all = {CLOCK: wired[CLOCK]} if CLOCK in wired else {}
    cameras = wired.get("cameras", list(settings.default("cameras")))
    topics = _topics(given["image_topic"], given["image_topics"], cameras)
    respawn = {"respawn": True, "respawn_delay": RESPAWN_DELAY_S} if asked["respawn"] else {}

    nodes: list[Action] = [
        # not LifecycleNode: the node starts by itself, and that action at times hangs launch after two quick Ctrl-C
        Node(
            package="glesam_ros",
            executable="perception_node",
            name=NODE_NAME,
            namespace=base,
            # all that is wired, too: launch writes a list of SetParameter in a way that no node reads
            parameters=[*([file] if file else []), *_some({**own, **wired})],
            remappings=[rule for camera, topic in topics.items() for rule in _remappings(camera, topic)],
            arguments=["--ros-args", "--log-level", given["log_level"]],
            output="screen",
            emulate_tty=True,
            **respawn,
        )
    ]
    if asked["demo_camera"]:
        compressed = wired.get("compressed", settings.default("compressed"))
        nodes += [
            Node(
                package="glesam_ros",
                executable="demo_camera",
                name=name,
                namespace=base,
                parameters=[{"compressed": compressed, "frame_id": name, **clock_of_all}],
                remappings=_remappings("", topics.get(camera) or (f"{camera}/image" if camera else "image")),
                output="screen",
                emulate_tty=True,
            )
            for camera in cameras
            for name in ["_".join(part for part in ("demo_camera", *camera.split("/")) if part)]
        ]
    shown = "/".join(part for part in (base.strip("/"), cameras[0]) if part)
    if asked["rqt"]:
        _require("rqt", *RQT_PACKAGES)
        view = _view("perception.perspective", base, shown)
        # rqt remembers which plugins there were: one that was installed since would stay "not available"
        arguments = ["--perspective-file", view, "--force-discover"]
        rqt = Node(package="rqt_gui", executable="rqt_gui", arguments=arguments)
        nodes.append(TimerAction(period=RQT_DELAY_S, actions=[rqt]))
    if asked["rviz"]:
        _require("rviz", "rviz2")
        view = _view("perception.rviz", base, shown)
        nodes.append(Node(package="rviz2", executable="rviz2", arguments=["-d", view], parameters=_some(clock_of_all)))
    return nodes


def _value(name: str, text: str) -> str | bool | list[str]:
    """The parameter `name` from the text of its argument.

    Raises:
        ValueError: not one of the allowed values; says which are.
    """
    default = settings.default(name)
    value: str | bool | list[str] = text
    if isinstance(default, bool):
        value = _flag(name, text)
    elif isinstance(default, tuple):
        value = [part.strip() for part in text.split(",")]
        if not all(value):
            raise ValueError(f"{name}: expected names joined by commas, got an empty one in {text!r}; leave it out")
    _check(name, value)
    return value


def _check(name: str, value: Any) -> None:
    """Refuse what the node would refuse for the parameter `name`.

    Raises:
        ValueError: with the parameter, what was expected and what came.
    """
    if name != CLOCK:
        settings.Settings(**{name: value})
    elif not isinstance(value, bool):
        raise ValueError(f"{CLOCK}: expected true or false, got {value!r}")


def _wired(of_parent: list[Any], file: str, node: str, own: dict[str, Any]) -> dict[str, Any]:
    """What `node`, its full name, gets of `WIRED`; the last value counts, as for the node.

    Args:
        of_parent: what a parent launch sets for every node, as launch_ros keeps it: (name, value) or a parameter file.
        file: the parameter file, "" for none; warns where it has sections, but none for `node`.
        own: from our arguments.

    Raises:
        ValueError: no such file, no YAML, or a value that the node would refuse.
    """
    sources = [_of_parent(entry) for entry in of_parent]
    if file:
        sections = _sections("params_file", file)
        if sections and not any(_is_of(section, node) for section in sections):
            # the node takes such a file without a word
            get_logger("launch.user").warning(
                f"params_file {file} has nothing for {node}; its sections: {', '.join(sections)}; "
                f"name the section {node}, or /** for every node"
            )
        sources.append((f"params_file {file}", sections))
    sources.append(("arguments", {node: own}))
    # as in rcl: sections of the same name become one, in the place of the first
    merged: dict[str, dict[str, tuple[str, Any]]] = {}
    for source, sections in sources:
        for section, values in sections.items():
            merged.setdefault(section, {}).update({name: (source, values[name]) for name in WIRED if name in values})
    found: dict[str, tuple[str, Any]] = {}
    for section, sourced in merged.items():
        if _is_of(section, node):
            found.update(sourced)
    for name, (source, value) in found.items():
        try:
            _check(name, value)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return {name: value for name, (_, value) in found.items()}


def _of_parent(entry: tuple[str, Any] | str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What sets the parameters of an entry of launch_ros's `global_params`, in words, and its sections.

    Raises:
        ValueError: no such file, or no YAML.
    """
    if isinstance(entry, str):
        action = "SetParametersFromFile of a parent launch"
        return f"{action}, {entry}", _sections(action, entry)
    name, value = entry
    if isinstance(value, str) and name in WIRED:
        # the node reads it from its command line; what is no YAML is refused with the rest
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    return "SetParameter of a parent launch", {"/**": {name: list(value) if isinstance(value, tuple) else value}}


def _sections(source: str, path: str) -> dict[str, dict[str, Any]]:
    """The sections of the parameter file `path` by their names there.

    Raises:
        ValueError: no such file, or no YAML; `source` says who named it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{source}: expected a YAML file of parameters, cannot read {path}: {error}") from error
    sections: dict[str, dict[str, Any]] = {}

    def search(tree: Any, keys: list[str]) -> None:
        for key, below in tree.items() if isinstance(tree, dict) else ():
            if key == "ros__parameters":
                sections["/".join(keys)] = below if isinstance(below, dict) else {}
            else:
                search(below, [*keys, str(key)])

    search(content, [])
    return sections


def _is_of(section: str, node: str) -> bool:
    """Is the `section` of a parameter file for `node`, its full name?"""
    return re.fullmatch("".join(_pattern(token) for token in section.split("/") if token), node) is not None


def _pattern(token: str) -> str:
    """One part of a node's name in a parameter file as a regular expression: * is any one part, ** any number."""
    return {"*": "/[^/]+", "**": "(/[^/]+)*"}.get(token, "/" + re.escape(token))


def _some(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """`parameters` for a node, nothing where there are none: not every parser takes an empty list of them."""
    return [parameters] if parameters else []


def _flag(name: str, text: str) -> bool:
    """True or false from the text of an argument, in any case: launch files in Python pass True.

    Raises:
        ValueError: something else.
    """
    if text.lower() not in YES_NO:
        raise ValueError(f"{name}: expected true or false, got {text!r}")
    return text.lower() == "true"


def _topics(one: str, several: str, cameras: list[str]) -> dict[str, str]:
    """Image topic of each camera name; empty where none is given, so that the topics keep their names.

    Raises:
        ValueError: both arguments are given, one is no name of a topic, or their number is not that of the cameras.
    """
    if one and several:
        raise ValueError(f"expected image_topic or image_topics, got both ({one!r} and {several!r}); leave one out")
    topics = [part.strip() for part in (one or several).split(",") if part.strip()]
    for topic in topics:
        if not TOPIC.fullmatch(topic.removesuffix("/compressed")):
            raise ValueError(
                f"{'image_topic' if one else 'image_topics'}: expected names of letters, digits and single _ that do "
                f"not begin with a digit, joined by single /, as /camera/image_raw; got {topic!r}"
            )
    if topics and len(topics) != len(cameras):
        raise ValueError(
            f"expected one image topic for each camera, got {len(topics)} topics ({', '.join(topics)}) for "
            f"{len(cameras)} cameras ({', '.join(cameras) or 'one without a name'}); name them: cameras:=front,rear"
        )
    return dict(zip(cameras, topics))


def _remappings(camera: str, topic: str) -> list[tuple[str, str]]:
    """Rules from a camera's raw and compressed input to `topic`, which may itself end in /compressed."""
    name = f"{camera}/image" if camera else "image"
    raw = topic[: -len("/compressed")] if topic.endswith("/compressed") else topic
    return [(old, new) for old, new in ((name, raw), (f"{name}/compressed", f"{raw}/compressed")) if old != new]


def _require(argument: str, *packages: str) -> None:
    """See that what `argument` starts is installed.

    Raises:
        RuntimeError: some of `packages` are not; says which, and how to install them.
    """
    missing = []
    for package in packages:
        try:
            get_package_prefix(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        apt = " ".join(f"ros-$ROS_DISTRO-{package.replace('_', '-')}" for package in missing)
        raise RuntimeError(f"{argument}:=true needs {', '.join(missing)}: sudo apt install {apt}")


def _view(name: str, base: str, shown: str) -> str:
    """Path of a view file of the package, or of a copy for the node below `base` and the topics below `shown`.

    The copy of a namespace has a place of its own, `~/.ros/glesam_ros` (`$ROS_HOME/glesam_ros`), as rqt keeps for ever
    what it was started with under the name of the file.

    Raises:
        RuntimeError: the copy cannot be written.
    """
    path = CONFIG / name
    if (base, f"/{shown}") == (VIEW_NAMESPACE, VIEW_NAMESPACE):
        return str(path)
    node = f"{base.rstrip('/')}/{NODE_NAME}"
    text = path.read_text(encoding="utf-8").replace(f"{VIEW_NAMESPACE}/{NODE_NAME}", "\0")
    text = text.replace(f"{VIEW_NAMESPACE}/", f"/{shown}/" if shown else "/")
    text = text.replace(f"'{VIEW_NAMESPACE}'", f"'{base}'").replace("\0", node)
    home = Path(os.environ.get("ROS_HOME") or Path.home() / ".ros")
    copy = home / "glesam_ros" / f"{base.strip('/').replace('/', '_') or 'root'}{path.suffix}"
    try:
        # whole, as an rqt of the same namespace may be reading it
        write_whole(copy, lambda beside: beside.write_text(text, encoding="utf-8"), sync=False)
    except OSError as error:
        raise RuntimeError(f"expected to write {copy}, got: {error}; set ROS_HOME to a folder of yours") from error
    return str(copy)
