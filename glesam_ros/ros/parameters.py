"""ROS parameters made from `Settings`: descriptors, declaration, live changes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, ParameterUninitializedException
from rclpy.node import Node
from rclpy.parameter import Parameter

from glesam_ros import settings as catalogue
from glesam_ros.settings import Settings, Spec

OF_RCLPY = frozenset({"use_sim_time", "start_type_description_service"})
"""Declared by rclpy, the second one not by all of its versions."""
HINTS = {
    ("BOOL", "STRING"): "ROS reads a plain off as a bool, put it in quotes: -p 'NAME:=\"off\"'",
    ("STRING", "BOOL"): "it is true or false: write it without quotes",
    ("INTEGER", "DOUBLE"): "write it with a point: 1.0 for 1",
    ("DOUBLE", "INTEGER"): "it is a whole number: write it without a point, 1 for 1.0",
}
"""How to mend a start value, by the type that came and the one that is expected, in rclpy's words."""


def descriptor(name: str) -> ParameterDescriptor:
    """Description, range and constraints of the parameter `name`, as rqt and `ros2 param describe` show them."""
    return described(name, catalogue.default(name), catalogue.spec(name))


def described(name: str, default: Any, spec: Spec) -> ParameterDescriptor:
    """What `descriptor` gives, of a parameter of any node."""
    result = ParameterDescriptor(
        name=name,
        description=f"{spec.help} [{spec.unit}]" if spec.unit else spec.help,
        additional_constraints=f"one of: {', '.join(spec.choices)}" if spec.choices else "",
        read_only=spec.read_only,
    )
    if spec.low is not None and spec.high is not None:
        if isinstance(default, float):
            # step 0.0: any value in the range; rqt's slider disagrees with rclpy about other steps
            result.floating_point_range = [FloatingPointRange(from_value=spec.low, to_value=spec.high, step=0.0)]
        else:
            # step 1: rqt's slider stops at every integer, and rclpy refuses what is off the step
            result.integer_range = [IntegerRange(from_value=int(spec.low), to_value=int(spec.high), step=1)]
    return result


def declare(node: Node) -> Settings:
    """Declare every parameter on `node` and read the values it was started with.

    Raises:
        ValueError: a camera that is named twice, an empty list, a plain `off` where a string belongs, or 1 for 1.0.
        rclpy.exceptions.ParameterException, InvalidParameterException: a start value of wrong type or out of range.
    """
    try:
        node.declare_parameters(
            "", [(name, _ros_value(catalogue.default(name)), descriptor(name)) for name in catalogue.names()]
        )
    except InvalidParameterTypeException as error:
        raise ValueError(with_hint(error)) from error
    return Settings(**{name: _start_value(node, name) for name in catalogue.names()})


def with_hint(error: InvalidParameterTypeException) -> str:
    """What rclpy says of a start value of the wrong type, and how to mend it."""
    for (came, expected), hint in HINTS.items():
        if f"of type '{came}', expecting type '{expected}'" in str(error):
            return f"{error}; {hint}"
    return str(error)


def unknown(node: Node) -> str:
    """What `node` was started with and does not have, with the nearest names that it has; "" where there is nothing.

    rclpy drops such values in silence. Those of topics (`qos_overrides`) are declared with their topics, later.
    """
    names = sorted(
        name for name in node._parameter_overrides
        if not (node.has_parameter(name) or name in OF_RCLPY or name.startswith("qos_overrides."))
    )
    if not names:
        return ""
    near = {name: difflib.get_close_matches(name, catalogue.names(), 1) for name in names}
    listed = ", ".join(f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in names)
    return (
        f"parameters that this node does not have are ignored: {listed}; `ros2 param list "
        f"{node.get_fully_qualified_name()}` has all of its names"
    )


def changed(settings: Settings, parameters: Iterable[Parameter]) -> Settings:
    """`settings` with all of `parameters` that are ours.

    Raises:
        ValueError: a value that breaks its range or choices; the text is the reason.
    """
    known = set(catalogue.names())
    return settings.replace(**{p.name: p.value for p in parameters if p.name in known})


def _start_value(node: Node, name: str) -> Any:
    try:
        return node.get_parameter(name).value
    except ParameterUninitializedException as error:
        # an empty list has no type: rclpy takes it for no value
        expected, otherwise = "a value", "the default"
        if name == "cameras":
            expected, otherwise = "at least one camera name", "one camera without a name"
        raise ValueError(f"{name}: expected {expected}, got none; leave the line out for {otherwise}") from error


def _ros_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
