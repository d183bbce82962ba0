"""What executes a base model and its enhancer: torch here, onnxruntime in `onnx_runtime`."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from glesam_ros.models.base import OutOfMemory, check_finite
from glesam_ros.models.glesam.base import SIDE, BaseModel, Features
from glesam_ros.models.glesam.enhancer import Enhancer, SmallEnhancer
from glesam_ros.models.glesam.replay import Compiled, Function, Replayed, capturer, give_back, means_out_of_memory
from glesam_ros.validation import FloatArray, UInt8Array

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions of torch models by their name in the settings."""
FEW_PROMPTS = 64
"""Up to here the number of prompts is rounded up; more come in batches of one size."""

Call = TypeVar("Call", bound=Callable[..., Any])


class Runtime(Protocol):
    """The four stages of a frame, on a device and in a precision.

    Attributes:
        device: where and how it runs, in words for logs and diagnostics.
        overlaps: whether `decode` gains time beside `encode` of the next image, from another thread.
        side: default side of the square input.
    """

    device: str
    overlaps: bool
    side: int

    def encode(self, image: UInt8Array, side: int) -> Features:
        """(H, W, 3) uint8 RGB -> features of a batch of one."""
        ...

    def level(self, features: Features) -> float | None:
        """Degradation 0 (clear) .. 1 (LQ-3) as GleSAM++ predicts it; None where the enhancer has no predictor."""
        ...

    def enhance(self, features: Features, level: float) -> Features:
        """Features with a restored latent; the enhancer uses `level` where it was trained with levels."""
        ...

    def decode(
        self, features: Features, points: FloatArray, labels: FloatArray, several: bool
    ) -> tuple[Tensor, Tensor]:
        """As `BaseModel.decode`, float32 on any device."""
        ...

    def free(self) -> None:
        """Give cached memory back."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...



def choose_device(device: str) -> torch.device:
    """The device of torch for "auto" (CUDA where torch has it, else the CPU), "cuda" or "cpu".

    Of several CUDA devices the current one of this thread, by its index: other threads have a current one of their own.

    Raises:
        ValueError: another name.
        RuntimeError: this torch has no CUDA device.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: expected auto, cuda or cpu for torch, got {device!r}")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        why = "finds no CUDA device" if torch.version.cuda else "is built without CUDA"
        raise RuntimeError(
            f"device: 'cuda' needs a torch with CUDA, this torch {torch.__version__} {why}; install one "
            "(Jetson: NVIDIA's wheel for your JetPack) or set device to cpu"
        )
    return torch.device("cuda", torch.cuda.current_device()) if there and device != "cpu" else torch.device("cpu")


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device that of this thread, whose streams and graphs are meant meanwhile; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for a precision of the settings; "auto" is bf16 on CUDA from capability 8.0, fp16 below, fp32 on a CPU.

    Raises:
        ValueError: int8, which full-size models do not have, or an unknown name.
    """
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        # earlier cards emulate bf16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision: expected auto, {', '.join(PRECISIONS)} for SAM and SAM 2, got {precision!r}; nano has int8"
        )
    return PRECISIONS[precision]


def precision_name(dtype: torch.dtype) -> str:
    """Name of a dtype in the settings."""
    return next(name for name, known in PRECISIONS.items() if known is dtype)


def device_in_words(device: torch.device, dtype: torch.dtype, *more: str) -> str:
    """Where and how a model of torch runs, for logs and diagnostics: "cpu (fp32, torch)"."""
    card = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return f"{device.type} ({', '.join([precision_name(dtype), 'torch', *card, *more])})"


def memory_errors(call: Call) -> Call:
    """The same call that raises `OutOfMemory` for lack of memory."""

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, OutOfMemory) or not means_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or ["MemoryError"])[0]
        # outside of the handler: the traceback of the failed call would keep its tensors alive
        raise OutOfMemory(reason)

    return checked  # type: ignore[return-value]


def loading(call: Call) -> Call:
    """The same call, which loads a model: lack of memory is `OutOfMemory` that says what to do, all is given back."""
    checked = memory_errors(call)

    @functools.wraps(call)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        try:
            return checked(*args, **kwargs)
        except OutOfMemory as error:
            reason = str(error)
        gc.collect()  # what was loaded until then
        give_back()
        raise OutOfMemory(
            f"{reason}; expected memory for the weights: free some on the device, or take a smaller model or precision"
        )

    return loaded  # type: ignore[return-value]


def checked_level(level: float, device: str) -> float:
    """A predicted level as 0..1. Raises RuntimeError where it is not finite: a clamp would make "clear" of that."""
    check_finite(level, f"level on {device}")
    return min(1.0, max(0.0, level))


def rounded_up(rows: FloatArray) -> FloatArray:
    """(K, ...), K > 0 -> the last row again until their number is a power of two; above 64 as they are."""
    count = len(rows)
    missing = 0 if count > FEW_PROMPTS else (1 << (count - 1).bit_length()) - count
    return np.concatenate([rows, np.repeat(rows[-1:], missing, 0)]) if missing else rows


class OnStream(Features):
    """Features of `TorchRuntime` on CUDA; decoding waits for `ready`, not for whatever is queued behind them."""

    ready: torch.cuda.Event | None = None


class TorchRuntime:
    """See `Runtime`. Weights in one precision, LoRA merged, constants folded.

    On CUDA, encode and enhance run on a stream of their own and decode on the stream of the caller, so that decoding
    one image runs beside encoding the next; each stage becomes a CUDA graph for the shapes that come again. So that few
    graphs serve all numbers of prompts, fewer than 64 are decoded as the next power of two, and what is too many is
    cut. Read features on another stream only after `torch.cuda.synchronize`. On the CPU the same code runs without
    streams, and decodes as many as there are.

    Args:
        base: image encoder, prompt encoder and mask decoder; taken over, not copied.
        enhancer: restores latents; taken over; None where there is none.
        device: of torch.
        dtype: of weights and activations: float32, float16 or bfloat16. Mask logits and scores are float32.
        compile: torch.compile for each stage: faster, minutes at the first call, and needs a compiler on the machine.

    Raises:
        OutOfMemory: the weights do not fit; as all calls.
    """

    @memory_errors
    def __init__(
        self,
        base: BaseModel,
        enhancer: Enhancer | SmallEnhancer | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
    ) -> None:
        self.side = SIDE
        self._place, self._dtype = device, dtype
        self._on_cuda = device.type == "cuda"
        self.overlaps = self._on_cuda
        self._stream = torch.cuda.Stream(device) if self._on_cuda else None
        capture = capturer() if self._on_cuda else None
        # crops are encoded by the thread that decodes, and memory is freed from either
        self._encoding, self._decoding = threading.Lock(), threading.Lock()
        self._base = base.to(device, dtype).eval().requires_grad_(False)
        self._enhancer = enhancer
        if enhancer is not None:
            enhancer.for_inference(dtype)
            enhancer.to(device)
            enhancer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own hints lack it

        def stage(function: Function, what: str) -> Replayed:
            fast = Compiled(function, what) if compile else function
            # the number of prompts varies, the size of the square hardly does
            return Replayed(fast, what, capture, at_once=what != "decode")

        self._stages = {
            "encode": stage(self._encode, "encode"),
            "enhance": stage(self._enhance, "enhance"),
            "decode": stage(partial(self._decode, False), "decode"),
            "decode several": stage(partial(self._decode, True), "decode"),
        }
        self.device = device_in_words(device, dtype, *(["compiled"] if compile else []))

    @memory_errors
    def encode(self, image: UInt8Array, side: int) -> Features:
        """(H, W, 3) uint8 RGB -> features of a batch of one. Raises OutOfMemory, as all calls."""
        with self._encoding, torch.inference_mode(), torch.cuda.stream(self._stream):
            pixels = self._base.pixels(self._upload(image)[None], side).to(self._dtype)
            return self._placed(*self._stages["encode"](pixels))

    @memory_errors
    def level(self, features: Features) -> float | None:
        """Degradation 0 .. 1 where the enhancer predicts it, else None."""
        if self._enhancer is None or self._enhancer.level is None:
            return None
        with self._encoding, torch.inference_mode(), torch.cuda.stream(self._stream):
            return checked_level(float(self._enhancer.predict_level(features)[0]), self.device)

    @memory_errors
    def enhance(self, features: Features, level: float) -> Features:
        """Features with a restored latent; as they came where there is no enhancer."""
        if self._enhancer is None:
            return features
        with self._encoding, torch.inference_mode(), torch.cuda.stream(self._stream):
            levels = self._upload(np.array([level], np.float32))
            (latent,) = self._stages["enhance"](features.latent, levels)
            return self._placed(latent, *features.high)

    @memory_errors
    def decode(
        self, features: Features, points: FloatArray, labels: FloatArray, several: bool
    ) -> tuple[Tensor, Tensor]:
        """As `BaseModel.decode`, float32, on the caller's stream."""
        with self._decoding, torch.inference_mode(), made_current(self._place):
            self._await(features)
            count = len(points)
            if self._on_cuda:  # few shapes, few graphs
                points, labels = rounded_up(points), rounded_up(labels)
            inputs = features.latent, *features.high, self._upload(points), self._upload(labels)
            logits, scores = self._stages["decode several" if several else "decode"](*inputs)
            return logits[:count], scores[:count]

    def free(self) -> None:
        """Drop captured graphs and give cached device memory back."""
        with self._encoding, self._decoding:
            for stage in self._stages.values():
                stage.free()
            if self._on_cuda:
                give_back()

    def close(self) -> None:
        """Free everything; the runtime cannot be used afterwards."""
        self.free()
        self._stages.clear()
        del self._base, self._enhancer
        if self._on_cuda:
            give_back()

    def _encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self._base.encode(pixels)
        return features.latent, *features.high

    def _enhance(self, latent: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        if self._enhancer is None:
            return (latent,)
        fast = latent.contiguous(memory_format=torch.channels_last)
        return (self._enhancer(fast, level).to(self._dtype).contiguous(),)

    def _decode(self, several: bool, latent: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *high, points, labels = rest
        logits, scores = self._base.decode(Features(latent, tuple(high)), points, labels, several)
        return logits.float(), scores.float()

    def _upload(self, array: UInt8Array | FloatArray) -> Tensor:
        # torch warns of arrays that it must not write
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return tensor.pin_memory().to(self._place, non_blocking=True) if self._on_cuda else tensor

    def _placed(self, latent: Tensor, *high: Tensor) -> Features:
        features = OnStream(latent, high)
        if self._stream is not None:
            features.ready = torch.cuda.Event()
            features.ready.record(self._stream)
        return features

    def _await(self, features: Features) -> None:
        """Let the caller's stream wait for features, and their memory wait for that stream."""
        if self._stream is None:
            return
        here = torch.cuda.current_stream(self._place)
        ready = getattr(features, "ready", None)
        if ready is None:
            here.wait_stream(self._stream)
        else:
            here.wait_event(ready)
        for tensor in (features.latent, *features.high):
            tensor.record_stream(here)
