"""CUDA graphs and torch.compile around a function of tensors; both fall back to the function as it is written."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
MAX_GRAPHS = 8
"""Graphs of one function, the longest unused goes first; each holds the memory of its intermediate results."""
MAX_REASON = 300
"""Characters of an error that the log shows."""
WARM_UP = 3
"""Calls before a capture, so that libraries choose their kernels and reserve their memory outside of it."""
_CAPTURING = threading.Lock()
"""Held during a capture: CUDA graphs share torch's capture stream, so one at a time in a process."""

Function = Callable[..., tuple[Tensor, ...]]
"""Tensors -> tensors, without a side effect."""
Capture = Callable[[Function, tuple[Tensor, ...]], Function]
"""(function, inputs) -> the same function for inputs of these shapes and dtypes."""


class Replayed:
    """A function that is captured for the shapes that it is called with; for one thread at a time.

    Later calls with these shapes replay. Results are the caller's own. Where memory lacks for a capture, the function
    runs as it is with these shapes until `free`. A capture that fails otherwise is logged once, and the function runs
    as it is from then on.

    Args:
        function: what to call; inputs are told apart by shape and dtype.
        what: its name in the log.
        capture: how to capture; None leaves the function as it is.
        at_once: capture in the first call with new shapes; else in the second, for shapes that may not come again.
    """

    def __init__(self, function: Function, what: str, capture: Capture | None, *, at_once: bool) -> None:
        self._function, self._what, self._capture, self._at_once = function, what, capture, at_once
        self._graphs: OrderedDict[object, Function | None] = OrderedDict()  # None: the shapes were seen once

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._capture is None:
            return self._function(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        graph = self._graphs.get(key)
        if graph is None and (self._at_once or key in self._graphs):
            graph = self._try_capture(self._capture, inputs)
        if self._capture is not None:
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        return self._function(*inputs) if graph is None else graph(*inputs)

    def _try_capture(self, capture: Capture, inputs: tuple[Tensor, ...]) -> Function | None:
        try:
            with _CAPTURING:
                return capture(self._function, inputs)
        except RuntimeError as error:
            # torch may report the end of the capture that memory was lacking in
            if isinstance(error, torch.cuda.OutOfMemoryError) or isinstance(
                error.__context__, torch.cuda.OutOfMemoryError
            ):
                _LOG.info("%s runs without a CUDA graph until memory is freed: %s", self._what, _reason(error))
                return self._function
            _LOG.warning("%s runs without CUDA graphs: %s", self._what, _reason(error))
            self._capture = None
            self._graphs.clear()
            return None

    def free(self) -> None:
        """Drop all graphs and their memory; shapes that come again are captured again."""
        self._graphs.clear()


def capture_cuda(function: Function, inputs: tuple[Tensor, ...]) -> Function:
    """Capture `function` on the current device; see `Capture`."""
    held = [x.clone() for x in inputs]
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            function(*held)
    here.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the other thread may allocate and copy meanwhile; the outer context because torch stays on the
    # stream of the capture where that fails at its end
    with torch.cuda.stream(here), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(*held)

    def replay(*fresh: Tensor) -> tuple[Tensor, ...]:
        for own, x in zip(held, fresh):
            own.copy_(x)
        graph.replay()
        # the next replay overwrites the graph's own
        return tuple(y.clone() for y in outputs)

    return replay


class Compiled:
    """A function through torch.compile; where the compiler fails, the reason is logged and the function runs as it is.

    Args:
        function: what to call.
        what: its name in the log.
    """

    def __init__(self, function: Function, what: str) -> None:
        self._function, self._what = function, what
        self._fast: Function | None = torch.compile(function)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from torch._dynamo.exc import TorchDynamoException  # seconds, and only here

        if self._fast is not None:
            try:
                return self._fast(*inputs)
            except TorchDynamoException as error:
                _LOG.warning("%s runs without torch.compile: %s", self._what, _reason(error))
                self._fast = None
        return self._function(*inputs)


def _reason(error: BaseException) -> str:
    """What an error says, on one line of the log."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
