"""CUDA graphs and torch.compile around a function of tensors; both fall back to the function as it is written."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
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
"""Held during a capture, and where cached memory is given back, which torch forbids meanwhile."""
_BESIDE: dict[torch.cuda.Stream, torch.cuda.Stream] = {}
"""Streams for warm-up and capture, by the stream that graphs are replayed on: torch keeps a workspace of cuBLAS for
each stream, a graph remembers that of its capture, and graphs of two streams replay at the same time."""
ALLOCATION_FAILURES = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "NVML_SUCCESS",  # how torch reports it on Jetson
    "unable to find an engine",  # cuDNN, where no workspace fits
)
"""Parts of the messages of a RuntimeError that means: not enough memory."""

Function = Callable[..., tuple[Tensor, ...]]
"""Tensors -> tensors, without a side effect."""
Capture = Callable[[Function, tuple[Tensor, ...]], Function]
"""(function, inputs) -> the same function for inputs of these shapes and dtypes."""
Live = dict[torch.cuda.Stream, weakref.WeakSet[torch.cuda.CUDAGraph]]
"""Graphs of a model by the stream that they are replayed on."""


def means_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory did not suffice, on any device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in ALLOCATION_FAILURES)


def give_back() -> None:
    """Give cached memory of the GPU back to the device."""
    with _CAPTURING:
        torch.cuda.empty_cache()


class Replayed:
    """A function that is captured for the shapes that it is called with; for one thread at a time.

    Later calls with these shapes replay. Results are the caller's own. Where memory lacks for a capture, the function
    runs as it is with these shapes until `free`. A capture that fails otherwise is logged once, and the function runs
    as it is from then on.

    Args:
        function: what to call; inputs are told apart by shape, dtype and, on a GPU, the stream that the call is on.
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
        # on another stream the inputs of a graph would be overwritten while its last replay still reads them
        stream = torch.cuda.current_stream() if inputs[0].is_cuda else None
        key = (stream, *((x.shape, x.dtype) for x in inputs))
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
            if any(e is not None and means_out_of_memory(e) for e in (error, error.__context__)):
                _LOG.info("%s runs without a CUDA graph until memory is freed: %s", self._what, _reason(error))
                return self._function
            _LOG.warning("%s runs without CUDA graphs: %s", self._what, _reason(error))
            self._capture = None
            self._graphs.clear()
            return None

    def free(self) -> None:
        """Drop all graphs and their memory; shapes that come again are captured again."""
        self._graphs.clear()


def capturer() -> Capture:
    """Captures the functions of one model, which take turns on a stream: their graphs there share memory.

    Another model needs a capturer of its own. Its thread may replay between a replay here and the copy of its outputs,
    which lie in memory that was free to graphs of the same pool.
    """
    return functools.partial(capture_cuda, live={})


def capture_cuda(function: Function, inputs: tuple[Tensor, ...], live: Live) -> Function:
    """Capture `function` on the current device; see `Capture`.

    Args:
        live: graphs whose memory this one may use, by stream; it is added to them.
    """
    held = [x.clone() for x in inputs]
    here = torch.cuda.current_stream()
    if (beside := _BESIDE.get(here)) is None:
        beside = _BESIDE[here] = torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            function(*held)
    here.wait_stream(beside)
    graph, siblings = torch.cuda.CUDAGraph(), live.setdefault(here, weakref.WeakSet())
    pool = next((other.pool() for other in siblings), None)
    _forget_workspaces()
    # thread_local: the other thread may allocate and copy meanwhile; the outer context because torch stays on the
    # stream of the capture where that fails at its end
    try:
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool, beside, capture_error_mode="thread_local"):
            outputs = function(*held)
    finally:
        _forget_workspaces()
    siblings.add(graph)

    def replay(*fresh: Tensor) -> tuple[Tensor, ...]:
        for own, x in zip(held, fresh):
            own.copy_(x)
        graph.replay()
        # the next replay overwrites the graph's own
        return tuple(y.clone() for y in outputs)

    return replay


def _forget_workspaces() -> None:
    """Let cuBLAS take its workspace within a capture from the graph's own memory, and none of it outside.

    From torch 2.12 on the end of a graph takes the workspaces of the stream of its capture away from all other graphs.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        clear()


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
