"""The executor of the node: real callbacks of a real node, in threads."""

from __future__ import annotations

import threading
import time

import pytest
import rclpy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException
from ros_graph import wait_for
from std_msgs.msg import String

from glesam_ros.ros.executor import PooledExecutor


@pytest.fixture
def spun():
    """`spun(executor type, callbacks)` spins a node with one timer of 10 ms for each; all end with the test."""
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("timers", context=context)
    executors, spinners, ended = [], [], threading.Event()
    failures = []

    def start(make, *callbacks, group=None):
        executor = make(context)
        executors.append(executor)
        for callback in callbacks:
            node.create_timer(0.01, callback, callback_group=group or MutuallyExclusiveCallbackGroup())
        executor.add_node(node)

        def spin() -> None:
            while not ended.is_set():
                try:
                    executor.spin_once(timeout_sec=0.1)
                except ExternalShutdownException:
                    return
                except InvalidHandle:
                    continue  # destroyed while it was waited for

        spinners.append(threading.Thread(target=spin))
        spinners[-1].start()
        return executor

    start.failures = failures
    start.pooled = lambda context: PooledExecutor(4, failures.append, context)
    start.context, start.node = context, node
    yield start
    ended.set()
    for spinner in spinners:
        spinner.join()
    for executor in executors:
        executor.shutdown()
    node.destroy_node()
    rclpy.try_shutdown(context=context)


class Counted:
    """Counts how often an executor looks for work."""

    looks = 0

    def wait_for_ready_callbacks(self, *args, **kwargs):
        self.looks += 1
        return super().wait_for_ready_callbacks(*args, **kwargs)


class CountedPool(Counted, PooledExecutor):
    pass


def test_a_message_is_handed_over_once_while_all_threads_are_taken(spun):
    release, inside, messages = threading.Event(), [], []

    def wait() -> None:
        inside.append(0)
        release.wait(10)

    # a message that is not taken yet ends rclpy's waiting at once, again and again
    spun.node.create_subscription(String, "text", messages.append, 1, callback_group=ReentrantCallbackGroup())
    executor = spun(lambda context: CountedPool(2, spun.failures.append, context), wait, wait)
    publisher = spun.node.create_publisher(String, "text", 1)
    try:
        wait_for(lambda: len(inside) == 2 and publisher.get_subscription_count(), "two callbacks that wait")
        before = executor.looks
        publisher.publish(String(data="newest"))
        time.sleep(0.5)
        looks = executor.looks - before
    finally:
        release.set()
    assert looks <= 4
    wait_for(lambda: messages, "the message")
    assert not spun.failures


def test_long_callbacks_do_not_keep_others_waiting(spun):
    release, calls = threading.Event(), []
    spun(spun.pooled, lambda: release.wait(10), lambda: release.wait(10), lambda: calls.append(0))
    try:
        wait_for(lambda: len(calls) >= 20, "20 calls beside two that wait")
    finally:
        release.set()


class Turns:
    """A callback that counts its calls, and how many ran at once at most."""

    def __init__(self) -> None:
        self.inside, self.most, self.calls = [], 0, 0

    def __call__(self) -> None:
        self.inside.append(0)
        self.most = max(self.most, len(self.inside))
        time.sleep(0.002)
        self.inside.pop()
        self.calls += 1


def test_callbacks_of_one_group_take_turns(spun):
    turns = Turns()
    spun(spun.pooled, turns, turns, group=MutuallyExclusiveCallbackGroup())
    wait_for(lambda: turns.calls >= 20, "20 calls")
    assert turns.most == 1


def test_reentrant_callbacks_run_at_once(spun):
    together = threading.Barrier(2)
    met = []

    def callback() -> None:
        together.wait(5)
        met.append(0)

    spun(spun.pooled, callback, callback, group=ReentrantCallbackGroup())
    wait_for(lambda: len(met) >= 2, "two callbacks at once")


def test_a_callback_that_raises_is_reported_and_the_others_go_on(spun):
    calls = []

    def fails() -> None:
        raise LookupError("lost")

    spun(spun.pooled, fails, lambda: calls.append(0))
    wait_for(lambda: spun.failures and len(calls) >= 10, "a report and 10 calls")
    assert isinstance(spun.failures[0], LookupError)


class Destroying(PooledExecutor):
    """Destroys the subscription that it takes first; the fault leaves the handler, as it does in Humble."""

    has_destroyed = False

    def _take_subscription(self, subscription):
        if not self.has_destroyed:
            self.has_destroyed = True
            [node] = self.get_nodes()
            node.destroy_subscription(subscription)
            with subscription.handle:
                raise AssertionError("expected an invalid handle, this one can be used")
        return super()._take_subscription(subscription)


def two_of_a_group(spun, kind):
    """What the first of two subscriptions of a group got, and its publisher, when `kind` could not take one message."""
    group, one, other = MutuallyExclusiveCallbackGroup(), [], []
    spun.node.create_subscription(String, "one", one.append, 1, callback_group=group)
    spun.node.create_subscription(String, "other", other.append, 1, callback_group=group)
    publishers = [spun.node.create_publisher(String, name, 1) for name in ("one", "other")]
    spun(lambda context: kind(2, spun.failures.append, context))
    wait_for(lambda: all(p.get_subscription_count() for p in publishers), "the subscriptions")
    publishers[0].publish(String())
    wait_for(lambda: spun.failures, "the report")
    publishers[1].publish(String(data="newest"))
    wait_for(lambda: other, "a message of the other subscription of the group")
    return one, publishers[0]


def test_a_subscription_destroyed_before_it_is_taken_frees_its_group(spun):
    lost, _ = two_of_a_group(spun, Destroying)
    assert isinstance(spun.failures[0], InvalidHandle) and len(spun.failures) == 1
    assert not lost


class Refusing(PooledExecutor):
    """Cannot take the first message, as where it is not what its type says."""

    has_refused = False

    def _take_subscription(self, subscription):
        if not self.has_refused:
            self.has_refused = True
            raise RuntimeError("cannot be taken")
        return super()._take_subscription(subscription)


def test_a_message_that_cannot_be_taken_frees_its_group(spun):
    one, publisher = two_of_a_group(spun, Refusing)
    publisher.publish(String(data="again"))
    wait_for(lambda: one, "a message of the same subscription")
    assert [str(error) for error in spun.failures] == ["cannot be taken"]


def test_an_invalid_handle_in_a_callback_ends_its_turn_once(spun):
    turns = Turns()

    def callback() -> None:
        turns()
        raise InvalidHandle("a publisher that was destroyed")

    spun(spun.pooled, callback, callback, group=MutuallyExclusiveCallbackGroup())
    wait_for(lambda: turns.calls >= 20, "20 calls")
    assert turns.most == 1
    assert all(isinstance(error, InvalidHandle) for error in spun.failures)


def test_the_end_of_the_context_is_told_to_who_waits(spun):
    executor, raised = PooledExecutor(1, spun.failures.append, spun.context), []

    def spin() -> None:
        while not raised:
            try:
                executor.spin_once()
            except ExternalShutdownException as error:
                raised.append(error)

    waiting = threading.Thread(target=spin, daemon=True)
    waiting.start()
    rclpy.try_shutdown(context=spun.context)
    wait_for(lambda: raised, "the exception")
    executor.shutdown()


def test_nothing_is_handed_over_after_shutdown(spun):
    calls = []
    spun.node.create_timer(0.001, lambda: calls.append(0))
    executor = spun.pooled(spun.context)
    executor.add_node(spun.node)
    time.sleep(0.01)  # the timer is due
    assert executor.shutdown(timeout_sec=5)
    executor.spin_once(timeout_sec=0.1)
    assert not calls and not spun.failures
