"""onnxruntime sessions on the best device at hand."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime as ort

from glesam_ros.checksum import sha256
from glesam_ros.models.base import OutOfMemory

_LOG = logging.getLogger(__name__)
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Device name to onnxruntime provider, in the order that "auto" tries."""

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape of an input by its name."""

LACKS = (
    "Failed to allocate", "bad allocation", "bad_alloc", "out of memory", "cudaErrorMemoryAllocation", "ALLOC_FAILED",
)
"""Parts of onnxruntime's messages that mean: not enough memory."""
OF_THE_FILE = ("InvalidProtobuf", "InvalidGraph")
"""Names of onnxruntime's exceptions that blame the file on any device; others may come of the device."""
AGAIN = "reinstall the package (weights of your own: export them again)"


_Model = TypeVar("_Model")


class DeviceUnusable(RuntimeError):
    """onnxruntime offers the device but cannot use it: driver, CUDA, cuDNN or TensorRT are missing or do not fit."""


def engine_cache(weights: Iterable[Path]) -> Path:
    """Folder of the engines that TensorRT builds of these files, below $XDG_CACHE_HOME or ~/.cache.

    onnxruntime names an engine by the nodes of its graph, so without a folder of their own new weights in an old layout
    would meet old engines.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glesam_ros" / "tensorrt"
    return base / hashlib.sha256("".join(map(sha256, sorted(weights))).encode()).hexdigest()[:16]


def on_device(device: str, open_on: Callable[[str], _Model]) -> _Model:
    """What `open_on(name)` gives for the device; for "auto" for the first one that can be used.

    Raises:
        DeviceUnusable, and as `choose_device`.
    """
    if device != "auto":
        return open_on(choose_device(device))
    available = ort.get_available_providers()
    for name in (name for name, provider in PROVIDERS.items() if provider in available and name != "cpu"):
        try:
            return open_on(name)
        except DeviceUnusable as error:
            _LOG.warning("%s; the next device is tried", error)
    return open_on("cpu")


def choose_device(device: str, available: list[str] | None = None) -> str:
    """The device to run on: `device` itself, or the first available one for "auto".

    Args:
        device: "auto", "cpu", "cuda" or "tensorrt".
        available: providers of this onnxruntime; asked of it where None.

    Raises:
        ValueError: unknown device.
        RuntimeError: this onnxruntime does not offer the device.
    """
    available = ort.get_available_providers() if available is None else available
    if device == "auto":
        return next(name for name, provider in PROVIDERS.items() if provider in available)
    if device not in PROVIDERS:
        raise ValueError(f"device: expected auto, {', '.join(PROVIDERS)}; got {device!r}")
    if PROVIDERS[device] not in available:
        raise RuntimeError(
            f"device: {device!r} needs {PROVIDERS[device]}, this onnxruntime offers {', '.join(available)}; "
            "install onnxruntime-gpu (Jetson: NVIDIA's wheel for your JetPack) or set device to cpu"
        )
    return device


def open_session(
    path: Path, device: str, fp16: bool, cache: Path | None = None, threads: int = 0, shapes: Shapes | None = None
) -> ort.InferenceSession:
    """Open an ONNX file on `device` ("cpu", "cuda", "tensorrt"); operators that it lacks fall back step by step.

    Args:
        fp16: half precision, for TensorRT.
        cache: folder for TensorRT engines, so that only the first start builds them.
        threads: of an operator on the CPU; 0 is one a core.
        shapes: of dynamic inputs, all of them, for TensorRT; without them it builds an engine for each new shape.

    Raises:
        FileNotFoundError: the model file is missing.
        ValueError: it is damaged; names it.
        DeviceUnusable: onnxruntime fell back to another device, or cannot open the file on this one.
        OutOfMemory: the device lacks memory.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the model file {path}; reinstall the package, its weights are missing "
            "(weights of your own: export them again, 8-bit files with --calibration)"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # idle threads that spin would take the cores of the other sessions and of the rest of the robot
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    names = list(PROVIDERS)
    chain: list[Any] = []
    for name in names[names.index(device) :]:
        if PROVIDERS[name] not in ort.get_available_providers():
            continue
        settings: dict[str, Any] = {}
        if name == "tensorrt":
            settings = {"trt_fp16_enable": fp16, "trt_engine_cache_enable": cache is not None}
            if cache is not None:
                cache.mkdir(parents=True, exist_ok=True)
                settings |= {"trt_engine_cache_path": str(cache), "trt_timing_cache_enable": True}
            for k, which in enumerate(("min", "opt", "max") if shapes else ()):
                settings[f"trt_profile_{which}_shapes"] = ",".join(
                    f"{name}:{'x'.join(map(str, shape[k]))}" for name, shape in (shapes or {}).items()
                )
        elif name == "cuda" and _version() >= (1, 18):
            settings = {"use_tf32": 0}  # fp32 as it is written: TF32 has 10 bits, the level is measured with more
        chain.append((PROVIDERS[name], settings))
    try:
        session = ort.InferenceSession(str(path), options, providers=chain)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        if _is_lack(error):
            raise OutOfMemory(_first_line(error)) from None
        if device != "cpu" and type(error).__name__ not in OF_THE_FILE:
            text = f"device {device}: expected onnxruntime to open {path} there: {_first_line(error)}"
            raise DeviceUnusable(f"{text}; set device to cpu, which tells whether the file is damaged") from error
        text = f"{path}: expected an ONNX graph, onnxruntime cannot open it: {_first_line(error)}"
        raise ValueError(f"{text}; {AGAIN}") from error
    if (got := session.get_providers()[0]) != PROVIDERS[device]:
        raise DeviceUnusable(
            f"device {device}: expected onnxruntime to use {PROVIDERS[device]}, it fell back to {got}; check driver, "
            "CUDA, cuDNN and TensorRT, and that onnxruntime and onnxruntime-gpu are not both installed; or set device "
            "to cpu"
        )
    _LOG.debug("%s runs on %s", path.name, ", ".join(session.get_providers()))
    return session


def _version() -> tuple[int, int]:
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def run_session(session: ort.InferenceSession, feed: dict[str, Any], outputs: Sequence[str] | None = None) -> list[Any]:
    """What `session` computes, all of it or the named `outputs`.

    Raises:
        OutOfMemory: the device lacks memory.
    """
    try:
        return list(session.run(outputs, feed))
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        if _is_lack(error):
            raise OutOfMemory(_first_line(error)) from None
        raise


def _is_lack(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(lack in str(error) for lack in LACKS)


def _first_line(error: Exception) -> str:
    """What an error says, in one line; Python's own MemoryError says nothing."""
    return (str(error).splitlines() or ["out of memory"])[0]
