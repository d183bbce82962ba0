"""The other side of the perception node: its process, and a client that talks to it over real ROS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Log
from rcl_interfaces.srv import DescribeParameters, SetParameters, SetParametersAtomically
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSDurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image

TIMEOUT_S = 15.0
"""Longest wait for anything; reached only when a test fails."""
TRANSITIONS = {
    "configure": (Transition.TRANSITION_CONFIGURE, "inactive"),
    "cleanup": (Transition.TRANSITION_CLEANUP, "unconfigured"),
    "activate": (Transition.TRANSITION_ACTIVATE, "active"),
    "deactivate": (Transition.TRANSITION_DEACTIVATE, "inactive"),
}
"""Number of each, and the state that it leads to where it succeeds."""
LOST_ANSWER = "client will not receive response"
"""Words of rclpy's warning that rmw_fastrtps dropped an answer, as the node had not seen the client within 0.1 s."""
ROOT = Path(__file__).resolve().parent.parent


def wait_for(condition, what: str, timeout_s: float = TIMEOUT_S) -> Any:
    """The first truthy value of `condition()`; fails with `what` after the timeout."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")


class Inbox:
    """Messages of one subscription, in order."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def last(self) -> Any:
        return self.messages[-1]


class LoggedProcess:
    """A process with its output kept in a file; `paths` go before what the variables of its environment hold.

    With `own_session` it is not of the group of processes that the test is of.
    """

    def __init__(self, command: list[str], paths: dict[str, Path], own_session: bool = False) -> None:
        self._log = tempfile.TemporaryFile()  # lives as long as the process
        # Python shows a warning once only: every lost answer has to be seen
        environment = {**os.environ, "PYTHONWARNINGS": "always::RuntimeWarning"}
        for name, path in paths.items():
            environment[name] = os.pathsep.join(p for p in (str(path), environment.get(name, "")) if p)
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=own_session
        )

    @property
    def output(self) -> str:
        # without a seek, which would move the place where the process writes
        data = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0)
        return data.decode(errors="replace")


class NodeProcess(LoggedProcess):
    """A perception node in its own process."""

    def __init__(self, namespace: str, parameters: dict[str, Any], arguments: list[str]) -> None:
        command = [sys.executable, str(ROOT / "test/nodes/model_node.py"), "--ros-args", "-r", f"__ns:=/{namespace}"]
        for name, value in {"model": "bright", **parameters}.items():
            command += ["-p", f"{name}:={_yaml(value)}"]
        super().__init__(command + arguments, {"PYTHONPATH": ROOT})

    def end(self, number: int = signal.SIGINT) -> int:
        """Send the signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the node did not end within {TIMEOUT_S:g} s\n{self.output}") from None


class Client:
    """Publishes, subscribes and calls in the namespace of one node under test."""

    def __init__(self, namespace: str, node_process: NodeProcess) -> None:
        self.namespace = namespace
        self.ros = node_process
        self.node = rclpy.create_node("client", namespace=namespace)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._is_closed = False
        self._publishers: dict[str, Any] = {}
        self._services: dict[str, Any] = {}
        self._diagnostics: dict[str, Any] = {}
        self.logs: list[str] = []
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        self.node.create_subscription(
            Log, "/rosout", self._on_log, QoSProfile(depth=1000, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
        )
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._is_closed:
            try:
                self._executor.spin_once(timeout_sec=0.2)
            except ExternalShutdownException:
                return

    def close(self) -> None:
        self._is_closed = True
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()

    def _on_log(self, message: Log) -> None:
        if message.name.startswith(self.namespace + "."):
            self.logs.append(message.msg)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.startswith(f"{self.namespace}/"):
                self._diagnostics[status.name.partition(": ")[2]] = status

    # Topics.

    def subscribe(self, kind: Any, topic: str, profile: Any = 10) -> Inbox:
        """Subscribe and wait until the node has seen it."""
        inbox = Inbox()
        subscription = self.node.create_subscription(kind, topic, inbox.messages.append, profile)
        wait_for(lambda: self.node.count_publishers(subscription.topic_name), f"a publisher of {topic}")
        # lets the node discover us too, else it takes us for absent and drops the first frames
        time.sleep(0.3)
        return inbox

    def publisher(self, kind: Any, topic: str, profile: Any = 5) -> Any:
        """A publisher that the node is subscribed to."""
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(kind, topic, profile)
            wait_for(self._publishers[topic].get_subscription_count, f"a subscriber of {topic}")
            time.sleep(0.1)
        return self._publishers[topic]

    def send(self, message: Any, topic: str = "image") -> None:
        self.publisher(type(message), topic).publish(message)

    def stream(self, make, until, what: str, topic: str = "image", rate_hz: float = 20) -> Any:
        """Send `make()` at `rate_hz` until `until()` is truthy; returns that value."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            self.send(make(), topic)
            if value := until():
                return value
            time.sleep(1 / rate_hz)
        raise AssertionError(f"sent {topic} for {TIMEOUT_S:g} s and waited in vain for {what}\n{self.ros.output}")

    def stamp(self) -> Any:
        return self.node.get_clock().now().to_msg()

    # Services.

    def call(self, kind: Any, name: str, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer; a request whose answer was lost is sent again, so it has to be one that may be repeated."""
        return wait_for(lambda: self._ask(kind, name, request, timeout_s), f"an answer of {name}", timeout_s)

    def _ask(self, kind: Any, name: str, request: Any, timeout_s: float) -> Any:
        """The answer, or None where the node says that it could send it to nobody."""
        lost = self.ros.output.count(LOST_ANSWER)
        future = self.service(kind, name).call_async(request)
        wait_for(
            lambda: future.done() or self.ros.output.count(LOST_ANSWER) > lost, f"an answer of {name}", timeout_s
        )
        return future.result() if future.done() else None

    def service(self, kind: Any, name: str) -> Any:
        """A client of the service that sees the node; the node may still lose its first answer (`LOST_ANSWER`)."""
        if name not in self._services:
            client = self.node.create_client(kind, name)
            assert client.wait_for_service(TIMEOUT_S), f"service {name} did not appear\n{self.ros.output}"
            self._services[name] = client
        return self._services[name]

    def state(self) -> str:
        return self.call(GetState, "perception/get_state", GetState.Request()).current_state.label

    def wait_state(self, label: str) -> None:
        wait_for(lambda: self.state() == label, f"state {label}\n{self.ros.output}")

    def change_state(self, name: str, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the transition succeeded: by its answer, or by the state if the answer was lost."""
        number, goal = TRANSITIONS[name]
        request = ChangeState.Request(transition=Transition(id=number))
        answer = self._ask(ChangeState, "perception/change_state", request, timeout_s)
        return self.state() == goal if answer is None else answer.success

    def set_parameters(self, **values: Any) -> list[Any]:
        request = SetParameters.Request(parameters=[_parameter(*item) for item in values.items()])
        return self.call(SetParameters, "perception/set_parameters", request).results

    def set_atomically(self, **values: Any) -> Any:
        request = SetParametersAtomically.Request(parameters=[_parameter(*item) for item in values.items()])
        return self.call(SetParametersAtomically, "perception/set_parameters_atomically", request).result

    def describe(self, *names: str) -> list[Any]:
        request = DescribeParameters.Request(names=list(names))
        return self.call(DescribeParameters, "perception/describe_parameters", request).descriptors

    # What the node says of itself.

    def status(self, task: str = "camera") -> Any:
        """Newest diagnostic status of a task, for example "camera", "camera left" or "model"; None before it came."""
        return self._diagnostics.get(task)

    def model_status_is(self, level: bytes, text: str) -> bool:
        """Whether the newest status of the model has this level, and the text in its message."""
        status = self.status("model")
        return status is not None and status.level == level and text in status.message

    def values(self, task: str = "camera") -> dict[str, str]:
        """Key values of the newest diagnostic status, empty before it came."""
        status = self.status(task)
        return {v.key: v.value for v in status.values} if status else {}

    def counts(self, task: str = "camera") -> Counter:
        return Counter({key: int(value) for key, value in self.values(task).items() if value.isdigit()})

    def wait_count(self, key: str, at_least: int, task: str = "camera") -> Counter:
        """All counts of the camera once `key` has reached `at_least`."""
        wait_for(lambda: self.counts(task)[key] >= at_least, f"{key} >= {at_least} in {task}; {self.values(task)}")
        return self.counts(task)

    def logged(self, *parts: str) -> list[str]:
        """Log lines that contain all `parts`."""
        return [line for line in list(self.logs) if all(part in line for part in parts)]

    def wait_log(self, *parts: str) -> str:
        return wait_for(lambda: self.logged(*parts), f"a log line with {parts}\n{self.ros.output}")[0]


def picture(squares: tuple[tuple[int, int, int, int], ...] = (), size=(120, 160), ground=(30, 60, 90)) -> np.ndarray:
    """(H, W, 3) uint8 RGB: white squares (x, y, width, height) on a plain ground."""
    image = np.full((*size, 3), ground, np.uint8)
    for x, y, w, h in squares:
        image[y : y + h, x : x + w] = 255
    return image


def image_message(pixels: np.ndarray, stamp: Any, frame_id: str = "optical") -> Image:
    """An rgb8 message of (H, W, 3) uint8 `pixels`."""
    height, width = pixels.shape[:2]
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width, data=pixels.tobytes())
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    return message


def pixels_of(message: Image) -> np.ndarray:
    """The pixels of a mono16, 32FC1 or bgr8 message, read by the plain rules of sensor_msgs/Image."""
    dtype, channels = {"mono16": ("u2", 1), "32FC1": ("f4", 1), "bgr8": ("u1", 3)}[message.encoding]
    dtype = np.dtype((">" if message.is_bigendian else "<") + dtype)
    assert message.step == message.width * channels * dtype.itemsize
    array = np.frombuffer(bytes(message.data), dtype).reshape(message.height, message.width, channels)
    return array[..., 0] if channels == 1 else array


def _parameter(name: str, value: Any) -> Any:
    return Parameter(name, value=value).to_parameter_msg()


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f"'{v}'" for v in value) + "]"
    return str(value)
