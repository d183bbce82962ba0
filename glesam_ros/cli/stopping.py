"""What stops a command from outside: Ctrl-C, or SIGTERM, which ends it the same way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def stop_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a command that was stopped: 143 by SIGTERM, 130 by Ctrl-C."""
    return 143 if isinstance(stop, Terminated) else 130


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, where it would end the process, and in the main thread: Python allows no other."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
