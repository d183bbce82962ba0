"""Work shared by several processes, with results that do not depend on how many there are."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

import cv2

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT = 3
"""Tasks a process that wait or run, so that a long data set is never in memory as a whole."""
_state: Any = None


def share(
    open_state: Callable[[], State], work: Callable[[State, Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Yield `work(state, task)` for all tasks, in their order.

    Args:
        open_state: makes what a process needs, once in each; where there are several, it is pickled.
        work: a function of a module; tasks and results are pickled, too.
        tasks: taken only as fast as they are worked off.
        workers: processes; 1 works in this one.

    Raises:
        ValueError: workers below 1.
        concurrent.futures.process.BrokenProcessPool: a process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if workers == 1:
        state = open_state()
        for task in tasks:
            yield work(state, task)
        return
    # not fork: the libraries behind the model run threads, which do not survive it
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (open_state,))
    try:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            with _interrupts_wait():  # processes begin here, and never see Ctrl-C: who started this one stops them
                waiting.append(pool.submit(_work, work, task))
            if len(waiting) >= _IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """SIGINT comes after the block; processes that begin in it inherit that it is blocked."""
    is_main = threading.current_thread() is threading.main_thread()
    came: list[int] = []
    # another thread may take the signal, and Python then handles it in the main one
    own = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if is_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main:
            signal.signal(signal.SIGINT, own or signal.SIG_DFL)
            if came:
                signal.raise_signal(signal.SIGINT)


def _start(open_state: Callable[[], Any]) -> None:
    global _state
    cv2.setNumThreads(1)
    _state = open_state()


def _work(work: Callable[[Any, Any], Any], task: Any) -> Any:
    return work(_state, task)
