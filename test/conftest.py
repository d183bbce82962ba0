"""Fixtures for tests that run the perception node in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
from pathlib import Path

import pytest

# before rclpy starts: a domain of this test run, and no traffic beyond this machine (Humble knows no such range)
os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")

# without ROS the rest can still be tested; the summary says so
HAS_ROS = importlib.util.find_spec("rclpy") is not None
collect_ignore_glob = [] if HAS_ROS else ["test_node_*.py", "test_demo.py", "test_executor.py"]

_numbers = itertools.count(1)


def pytest_terminal_summary(terminalreporter):
    if not HAS_ROS:
        terminalreporter.write_line(
            f"NOT RUN, rclpy is missing: {', '.join(collect_ignore_glob)}; scripts/setup.sh or a sourced ROS 2 has it",
            red=True, bold=True,
        )


def _registries():
    """What is registered in a test is gone after it."""
    from glesam_ros.models import registry

    tables = [registry._REGISTRY, registry._SEMANTIC, registry._RESTORERS]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


_of_module = pytest.fixture(scope="module", autouse=True, name="_registries_of_module")(_registries)
_of_test = pytest.fixture(autouse=True, name="_registries_of_test")(_registries)


@pytest.fixture(scope="module")
def one_thread():
    """Sums of torch depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def own_precision():
    """Accelerate keeps the precision that the process first asked for, that of another test file or of this one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def _ros():
    import rclpy

    rclpy.init()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
            patch.setenv(name, str(Path(__file__).with_name("discovery.xml")))
        # read by the first node of a process; those under test must not inherit it
        first = rclpy.create_node("first")
    yield
    first.destroy_node()
    rclpy.shutdown()


def _launcher():
    from ros_graph import Client, NodeProcess

    processes, clients = [], []

    def launch(*, wait_active=True, arguments=(), **parameters):
        namespace = f"test_{os.getpid()}_{next(_numbers)}"
        processes.append(NodeProcess(namespace, parameters, [a.format(namespace=namespace) for a in arguments]))
        clients.append(Client(namespace, processes[-1]))
        if wait_active:
            clients[-1].wait_state("active")
        return clients[-1]

    yield launch
    with contextlib.ExitStack() as ends:  # all of them, also where one fails
        for process in processes:
            ends.callback(lambda process=process: print(process.output))  # pytest shows it when the test fails
        for client in clients:
            ends.callback(client.close)
        for process in processes:
            ends.callback(process.end)


@pytest.fixture
def launch(_ros):
    """Start a node with the test models: `launch(model="bright", cameras=["left"], ...)` gives its `Client`.

    Every node has a namespace of its own. `wait_active=False` returns at once, `arguments` are further ROS
    arguments, in which {namespace} stands for the namespace.
    """
    yield from _launcher()


@pytest.fixture(scope="module")
def launch_shared(_ros):
    """As `launch`, for nodes that all tests of a module share."""
    yield from _launcher()
