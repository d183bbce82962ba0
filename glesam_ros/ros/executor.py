"""Callbacks in a pool of threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rclpy.context import Context
from rclpy.executors import Executor, ShutdownException, TimeoutException


class PooledExecutor(Executor):
    """Runs callbacks in a pool of threads, and waits for the next one only when the last has begun.

    rclpy's `MultiThreadedExecutor` hands a callback that no thread has begun to its pool again and again (rclpy issue
    1452: Humble, Jazzy, Kilted), and a message that nobody has taken yet ends its waiting at once. Beside a thread that
    computes in Python that was thousands of times a second, each with the interpreter's lock, and inference stood still
    for up to two seconds.

    Args:
        threads: callbacks that run at once.
        failed: called, in a thread of the pool, with what a callback raised.
        context: None is the default one.
    """

    def __init__(self, threads: int, failed: Callable[[BaseException], Any], context: Context | None = None) -> None:
        super().__init__(context=context)
        self._pool, self._failed = ThreadPoolExecutor(threads, "callback"), failed

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for a callback that is due, and until a thread of the pool has begun it.

        Args:
            timeout_sec: how long to wait for one, in seconds; None waits for ever.

        Raises:
            ExternalShutdownException: the context was shut down.
            InvalidHandle: what was waited for was destroyed meanwhile; the next call goes on without it.
        """
        entity: Any
        try:
            task, entity, _ = self.wait_for_ready_callbacks(timeout_sec)
        except (ShutdownException, TimeoutException):
            return
        begun = threading.Event()
        try:
            self._pool.submit(self._run, task, entity, begun)
        except RuntimeError:  # shut down since
            return
        begun.wait()

    def _run(self, task: Any, entity: Any, begun: threading.Event) -> None:
        begun.set()
        task()
        if task.done() and (error := task.exception()) is not None:
            self._end_turn(entity)
            self._failed(error)

    def _end_turn(self, entity: Any) -> None:
        """Free the callback group of what could not be taken, because it was destroyed before or anything else failed.

        rclpy does not: of messages, timers and services in Humble (rclpy issue 1150), of QoS events in Jazzy, too, and
        with another fault than an invalid handle of none of them in any.

        Args:
            entity: subscription, timer, event or the like; None of a task that belongs to none.
        """
        # rclpy marks it until it is taken; afterwards the turn ends by itself
        if entity is None or not entity._executor_event:
            return
        entity._executor_event = False  # else it would not be waited for again
        with contextlib.suppress(AssertionError):  # its turn has ended
            entity.callback_group.ending_execution(entity)
        self.wake()

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        """As `Executor.shutdown`; nothing is handed over any more, and threads end with what they run."""
        ended: bool = super().shutdown(timeout_sec)
        self._pool.shutdown(wait=False)
        return ended
