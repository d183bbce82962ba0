"""The process of the perception node: from its start to the signal that ends it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import rclpy
from rclpy.exceptions import InvalidHandle, InvalidParameterException, NameValidationException, ParameterException
from rclpy.executors import ExternalShutdownException
from rclpy.impl.implementation_singleton import rclpy_implementation as _rclpy
from rclpy.signals import SignalHandlerOptions

from glesam_ros import settings
from glesam_ros.ros import shared_memory, usage
from glesam_ros.ros.executor import PooledExecutor
from glesam_ros.ros.leaving import leave
from glesam_ros.ros.node import NODE_NAME, PerceptionNode

ABOUT = """\
Instance masks from cameras, also when the picture is bad: a lifecycle node, which activates itself unless autostart is
false. With launch: ros2 launch glesam_ros perception.launch.py (--show-args tells its arguments)"""
EXAMPLE = "-r image:=/camera/image_raw -p model:=nano -p 'enhancement:=\"off\"'"
CALLBACK_THREADS = 4
"""Callbacks that run at once; a transition and a prompt may take long."""
EXIT_TIMEOUT_S = 1.0
"""How long the process waits for a running inference when it is told to end."""


class NodeLog(logging.Handler):
    """What the ROS-free core logs, in the log of `node`."""

    def __init__(self, node: PerceptionNode) -> None:
        super().__init__()
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the text on; debug records are left out."""
        text = record.getMessage()
        # a line of code each: rclpy refuses another severity from the same one
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM.

    Args:
        args: command line with `--ros-args`; None takes that of the process.

    Returns:
        Exit code: 0, or 1 when the parameters, names or other arguments that it was started with are not valid.
        With `--help` there is no node, and what it takes is printed.
    """
    if usage.is_asked(args):
        known = {name: (settings.default(name), settings.spec(name)) for name in settings.names()}
        print(usage.text("perception_node", ABOUT, EXAMPLE, known))
        return 0
    with _end_requests() as (wait_for_end, request_end):
        shared_memory.enlarge()
        # rclpy's own handlers raise KeyboardInterrupt in the middle of callbacks; here a signal only asks to end
        try:
            rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
            node = PerceptionNode()
        except (ValueError, ParameterException, InvalidParameterException) as error:
            return _refuse(f"start parameters are not valid: {error}")
        except (_rclpy.RCLError, _rclpy.UnknownROSArgsError, NameValidationException) as error:
            return _refuse(f"ROS refuses what the node is started with; mend the argument, name or file: {error}")
        core, to_node = logging.getLogger("glesam_ros"), NodeLog(node)
        core.setLevel(logging.INFO)
        core.addHandler(to_node)
        ended = threading.Event()
        executor = PooledExecutor(CALLBACK_THREADS, functools.partial(_report, node, ended))
        executor.add_node(node)
        spin = functools.partial(_spin, executor, node, ended, request_end)
        spinner = threading.Thread(target=spin, name="executor", daemon=True)
        spinner.start()
        wait_for_end()
        ended.set()
        node.get_logger().info("ending")
        is_idle = node.close(EXIT_TIMEOUT_S)
        executor.shutdown(timeout_sec=EXIT_TIMEOUT_S)
        spinner.join(EXIT_TIMEOUT_S)
        core.removeHandler(to_node)
        leave()
    if not is_idle:
        # a thread is inside the model: the interpreter would wait for it, or tear the model down under it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _refuse(text: str) -> int:
    """Say why there is no node, and give the exit code."""
    rclpy.logging.get_logger(NODE_NAME).fatal(text)
    rclpy.try_shutdown()
    return 1


@contextlib.contextmanager
def _end_requests() -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """Functions that wait for, and that make, a request to end the process; SIGINT and SIGTERM are such requests."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        # a byte comes whichever thread the system hands the signal to; a lock wakes only if it is the main thread
        previous = signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        try:
            yield lambda: reader.recv(1), lambda: writer.send(b"\0")
        finally:
            signal.set_wakeup_fd(previous)
            # launch sends one more to what still runs; the interpreter, which takes the handlers away, would die of it
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _spin(
    executor: PooledExecutor, node: PerceptionNode, ended: threading.Event, request_end: Callable[[], Any]
) -> None:
    """Run callbacks until the end is asked for."""
    while not ended.is_set():
        try:
            executor.spin_once()
        except ExternalShutdownException:
            if not ended.is_set():
                request_end()
            return
        except Exception as error:  # whatever rclpy raises while it waits
            _report(node, ended, error)


def _report(node: PerceptionNode, ended: threading.Event, error: BaseException) -> None:
    """What a callback raised costs one log line and not the process."""
    if isinstance(error, InvalidHandle):
        # deactivate removed a subscription while the executor was about to wait for it; it goes on without
        node.get_logger().debug(f"a removed subscription was still waited for: {error}")
    elif not ended.is_set():
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        node.get_logger().error(f"a callback failed:\n{text.rstrip()}")
