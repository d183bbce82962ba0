"""The full-size models in the pipeline: runtime, precision, lack of memory, prompts, levels, loading."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from glesam_ros import Pipeline, Settings, load_pipeline  # noqa: E402
from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.models import Budget, OutOfMemory, load_model, model_names  # noqa: E402
from glesam_ros.models.glesam import catalogue, everything, sam, sam2  # noqa: E402
from glesam_ros.models.glesam import model as models  # noqa: E402
from glesam_ros.models.glesam import runtime as runtimes  # noqa: E402
from glesam_ros.models.glesam.base import BaseModel, Features  # noqa: E402
from glesam_ros.models.glesam.enhancer import Enhancer, EnhancerConfig, SmallEnhancer, save_enhancer  # noqa: E402
from glesam_ros.models.glesam.model import GlesamModel, build_base, load_glesam  # noqa: E402
from glesam_ros.models.glesam.replay import MAX_GRAPHS, Compiled, Function, Replayed, capturer  # noqa: E402
from glesam_ros.models.glesam.runtime import TorchRuntime, choose_device, choose_precision  # noqa: E402
from glesam_ros.models.nano import Nano  # noqa: E402

CPU = torch.device("cpu")
SIZE = (96, 128)


class TinyBase(BaseModel):
    """Keeps the aspect as SAM; a mask is the disc around the mean of the points, its radius the sum of the labels."""

    name = "tiny"
    mean, std = (120.0, 110.0, 100.0), (60.0, 60.0, 60.0)
    thresholds = (0.7, 0.6)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = torch.nn.Conv2d(3, 256, 16, 16)
        self.mask_decoder = torch.nn.Linear(256, 1)
        self.calls: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def content(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        height, width = (max(4, round(s * side / max(size) / 4) * 4) for s in size)
        return height, width

    def encode(self, pixels: torch.Tensor) -> Features:
        return Features(self.patch(pixels))

    def decode(self, features: Features, points: torch.Tensor, labels: torch.Tensor, several: bool) -> Any:
        self.calls.append((points.clone(), labels.clone(), several))
        used = (labels >= 0).float()
        middle = (points * used[..., None]).sum(1) / used.sum(1, keepdim=True)
        cells = features.latent.shape[-1] * 4
        axis = torch.arange(cells) * 4 + 2
        away = ((axis - middle[:, :1]) ** 2)[:, None] + ((axis - middle[:, 1:]) ** 2)[:, :, None]
        count = 3 if several else 1
        radius = 4.0 * (1 + torch.arange(count))[:, None, None] + features.latent.float().mean()
        scores = torch.tensor([0.2, 0.9, 0.5])[:count] + 0.001 * used.sum(1, keepdim=True)
        return radius - away[:, None].sqrt(), scores


class Recorder:
    """A runtime that enhances by adding 1 and predicts a level; notes what it was asked."""

    device, overlaps, side = "a test", True, 256

    def __init__(self, level: float | None = 0.5) -> None:
        self.base, self.predicted = TinyBase(), level
        self.images: list[np.ndarray] = []
        self.enhanced: list[float] = []
        self.freed = self.closed = False

    def encode(self, image: np.ndarray, side: int) -> Features:
        self.images.append(image)
        return self.base.encode(self.base.pixels(torch.from_numpy(image)[None], side))

    def level(self, features: Features) -> float | None:
        return self.predicted

    def enhance(self, features: Features, level: float) -> Features:
        self.enhanced.append(level)
        return Features(features.latent + 1)

    def decode(self, features: Features, points: np.ndarray, labels: np.ndarray, several: bool) -> Any:
        with torch.no_grad():
            return self.base.decode(features, torch.from_numpy(points), torch.from_numpy(labels), several)

    def free(self) -> None:
        self.freed = True

    def close(self) -> None:
        self.closed = True


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def tiny_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def enhancer(levels: bool = False) -> Enhancer:
    """A tiny enhancer whose LoRA changes the output."""
    config = EnhancerConfig(base="sam_vit_b", kind="lora", unet="sd21-base", levels=levels, timestep=500)
    made = Enhancer(config, tiny_unet(), torch.randn(1, 77, 32, generator=torch.manual_seed(2))).eval()
    with torch.no_grad():
        for parameter in made.trained_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
        if levels:
            made.unet.class_embedding.last.weight.mul_(50)
    return made


def on_cpu(dtype: Any = torch.float32, made: Any = None) -> TorchRuntime:
    return TorchRuntime(TinyBase(), made, CPU, dtype, compile=False)


# ---- device and precision


def test_auto_takes_the_cpu_where_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(RuntimeError, match="needs a torch with CUDA.*set device to cpu"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="expected auto, cuda or cpu for torch, got 'tensorrt'"):
        choose_device("tensorrt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # with its index: "cuda" alone is in each thread the current device of that thread
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 7), torch.bfloat16)]
)
def test_auto_precision_is_the_widest_range_that_is_fast(
    capability: tuple[int, int], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) is dtype
    assert choose_precision("auto", CPU) is torch.float32
    assert choose_precision("fp16", CPU) is torch.float16


def test_precisions_that_full_size_models_lack_are_refused() -> None:
    with pytest.raises(ValueError, match="expected auto, fp32, fp16, bf16 for SAM and SAM 2, got 'int8'"):
        choose_precision("int8", CPU)


def test_nano_refuses_bf16() -> None:
    with pytest.raises(ValueError, match="nano has no bf16"):
        Nano("cpu", "bf16")


# ---- lack of memory


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(2**60),
        lambda: np.empty(2**48),
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")),
        lambda: (_ for _ in ()).throw(RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED")),
        lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")),
    ],
    ids=["torch on a CPU", "numpy", "Python, without a word", "CUDA", "Jetson", "cuBLAS"],
)
def test_lack_of_memory_is_one_error_on_every_device(
    fail: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heavy:
        pass

    held: list[weakref.ref[Heavy]] = []

    def encode(self: Any, pixels: Any) -> Any:
        activations = Heavy()
        held.append(weakref.ref(activations))
        fail()

    runtime = on_cpu()
    monkeypatch.setattr(TinyBase, "encode", encode)
    with pytest.raises(OutOfMemory) as raised:
        runtime.encode(picture(), 256)
    assert str(raised.value) and "\n" not in str(raised.value)
    # nothing of the failed call is kept by the error, so that freeing helps
    gc.collect()
    assert raised.value.__context__ is None and held[0]() is None
    monkeypatch.undo()
    runtime.free()
    assert runtime.encode(picture(), 256).latent.shape == (1, 256, 16, 16)


def test_other_errors_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = on_cpu()

    def encode(self: Any, pixels: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(TinyBase, "encode", encode)
    with pytest.raises(RuntimeError, match="shapes do not fit") as raised:
        runtime.encode(picture(), 256)
    assert not isinstance(raised.value, OutOfMemory)


@pytest.mark.parametrize(
    ("module", "name", "prompts"),
    [(everything, "_measured", {}), (models, "_best", {"points": [[40, 50]]})],
    ids=["everything mode", "a point"],
)
def test_lack_of_memory_between_the_stages_costs_a_rung_and_not_the_frame(
    module: Any, name: str, prompts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = on_cpu()
    pipe = Pipeline(GlesamModel("tiny", runtime, runtime._base, False), Settings(**{**EASY, "enhancement": "off"}))
    own, calls = getattr(module, name), []

    def lacks_once(*inputs: Any) -> Any:
        calls.append(len(inputs))
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 48 MiB")
        return own(*inputs)

    monkeypatch.setattr(module, name, lacks_once)
    assert len(pipe.segment(picture(), **prompts)) >= 1 and len(calls) > 1
    assert pipe.memory.failures == 1 and pipe.memory.now.batch == 32


def test_weights_that_do_not_fit_are_our_error() -> None:
    class Large(TinyBase):
        def to(self, *place: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 26 MiB")

    with pytest.raises(OutOfMemory, match="Tried to allocate 26 MiB"):
        TorchRuntime(Large(), None, CPU, torch.float32)


# ---- runtime


def test_runtime_is_the_modules_one_after_the_other() -> None:
    base, image, points, labels = TinyBase(), picture(), np.array([[[40, 60]]], np.float32), np.ones((1, 1), np.float32)
    plain, made = enhancer(), on_cpu(made=enhancer())
    with torch.no_grad():
        latent = base.encode(base.pixels(torch.from_numpy(image)[None], 256)).latent
        restored = plain(latent)
    features = made.encode(image, 256)
    assert torch.equal(features.latent, latent)
    assert made.level(features) is None
    better = made.enhance(features, 0.5)
    # LoRA is merged, constants are folded, and the weights lie in another order
    assert (better.latent - restored).abs().max() < 1e-4 < (better.latent - latent).abs().max()
    logits, scores = made.decode(better, points, labels, True)
    expected = base.decode(Features(restored), torch.from_numpy(points), torch.from_numpy(labels), True)
    assert torch.allclose(logits, expected[0], atol=1e-4) and torch.equal(scores, expected[1])
    assert made.device == "cpu (fp32, torch)" and not made.overlaps and made.side == 1024


def test_level_is_what_the_enhancer_with_levels_predicts_and_what_it_is_told() -> None:
    plain, made = enhancer(levels=True), on_cpu(made=enhancer(levels=True))
    features = made.encode(picture(), 256)
    with torch.no_grad():
        assert made.level(features) == pytest.approx(float(plain.predict_level(Features(features.latent))))
        told = [plain(features.latent, torch.tensor([level])) for level in (0.1, 0.9)]
    found = [made.enhance(features, level).latent for level in (0.1, 0.9)]
    assert (told[0] - told[1]).abs().max() > 1e-3
    for a, b in zip(found, told):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_precisions_stay_close_and_give_logits_in_fp32(dtype: Any) -> None:
    wide, narrow = on_cpu(made=enhancer(levels=True)), on_cpu(dtype, enhancer(levels=True))
    image, points, labels = picture(), np.zeros((2, 1, 2), np.float32), np.ones((2, 1), np.float32)
    a, b = (r.enhance(r.encode(image, 256), 0.5) for r in (wide, narrow))
    assert b.latent.dtype == dtype
    assert (a.latent - b.latent.float()).abs().max() < 0.05 * a.latent.abs().max()
    assert narrow.level(b) == pytest.approx(wide.level(a), abs=0.02)
    logits, scores = narrow.decode(b, points, labels, False)
    assert logits.dtype == scores.dtype == torch.float32


def test_small_enhancer_runs_in_the_same_runtime() -> None:
    config = EnhancerConfig(base="sam_vit_b", kind="small", unet="sd21-base")
    made = on_cpu(made=SmallEnhancer(config))
    features = made.encode(picture(), 256)
    # it begins as z / sqrt(abar)
    assert torch.allclose(made.enhance(features, 0.0).latent, features.latent / 0.998296**0.5, atol=1e-4)


def test_read_only_and_strided_images_are_taken_without_a_warning() -> None:
    runtime, image = on_cpu(), picture()
    expected = runtime.encode(image, 256).latent
    frozen = image.copy()
    frozen.flags.writeable = False
    wide = np.zeros((SIZE[0], 2 * SIZE[1], 3), np.uint8)
    wide[:, ::2] = image
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(runtime.encode(frozen, 256).latent, expected)
        assert torch.equal(runtime.encode(wide[:, ::2], 256).latent, expected)


def test_one_thread_encodes_while_another_decodes() -> None:
    runtime = on_cpu(made=enhancer())
    for stage in runtime._stages.values():
        stage._capture = imitated_capture  # static buffers, which a second thread would overwrite
    points, labels = np.full((2, 1, 2), 60, np.float32), np.ones((2, 1), np.float32)

    def encode(k: int) -> Features:
        return runtime.enhance(runtime.encode(picture(k), 256), 0.5)

    def decode(features: Features) -> Any:
        return runtime.decode(features, points, labels, True)[0]

    alone = [decode(encode(k)) for k in range(8)]
    with ThreadPoolExecutor(1) as decoder, ThreadPoolExecutor(2) as encoders:
        together = list(decoder.map(decode, encoders.map(encode, range(8))))
    for a, b in zip(alone, together):
        assert torch.equal(a, b)
    assert not torch.equal(alone[0], alone[1])


class FakeStream:
    """Notes what a CUDA stream is told to wait for."""

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: Any) -> None:
        self.waits.append(stream)


class FakeEvent:
    def record(self, stream: Any) -> None:
        self.stream = stream


class Level:
    """A tensor on CUDA, as far as streams go."""

    def __init__(self) -> None:
        self.used_on: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.used_on.append(stream)


def test_decoding_waits_for_its_features_and_not_for_the_next_image(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, own, here = on_cpu(), FakeStream(), FakeStream()
    monkeypatch.setattr(runtime, "_stream", own)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    first, second = (runtime._placed(Level(), Level()) for _ in range(2))  # type: ignore[arg-type]
    runtime._await(first)
    assert here.waits == [first.ready] != [second.ready] and first.ready.stream is own
    # memory of the features may be reused only when this stream is done with them
    assert all(level.used_on == [here] for level in (first.latent, *first.high))
    runtime._await(Features(Level()))  # type: ignore[arg-type]  # without an event: all that was queued
    assert here.waits[1:] == [own]


def test_a_thread_decodes_on_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a current device of its own, the first one unless it says otherwise; graphs belong to it."""
    runtime, current = on_cpu(), [torch.device("cuda", 0)]
    features = runtime.encode(picture(), 256)

    @contextlib.contextmanager
    def device(wanted: Any) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(runtime, "_place", torch.device("cuda", 1))
    used: list[Any] = []
    decode = runtime._stages["decode"]
    monkeypatch.setitem(runtime._stages, "decode", lambda *x: (used.append(current[-1]), decode(*x))[1])
    runtime.decode(features, np.zeros((1, 1, 2), np.float32), np.ones((1, 1), np.float32), False)
    assert used == [torch.device("cuda", 1)] and current == [torch.device("cuda", 0)]


# ---- CUDA graphs, with a capture that works as CUDA's does but on the CPU


def imitated_capture(function: Function, inputs: Any) -> Function:
    """Own inputs, own outputs that each replay overwrites."""
    held = [x.clone() for x in inputs]
    outputs = function(*held)

    def replay(*fresh: Any) -> Any:
        for own, x in zip(held, fresh):
            own.copy_(x)
        for own, x in zip(outputs, function(*held)):
            own.copy_(x)
        return tuple(y.clone() for y in outputs)

    return replay


def noted_captures() -> tuple[list[int], Callable[[Function, Any], Function]]:
    """Lengths of the inputs (N,) for which graphs were captured, and the capture that notes them."""
    captured: list[int] = []

    def capture(function: Function, inputs: Any) -> Function:
        [length] = inputs[0].shape
        captured.append(length)
        return imitated_capture(function, inputs)

    return captured, capture


def test_shapes_that_come_again_are_captured_once() -> None:
    captured, capture = noted_captures()
    call = Replayed(lambda x, y: (x + y, x * y), "a test", capture, at_once=False)
    results = []
    for k, n in enumerate((2, 3, 2, 2, 3, 2)):
        x = torch.full((n,), float(k))
        results.append((k, call(x, x)))
    assert captured == [2, 3]
    # earlier results are not overwritten by later replays
    for k, (total, product) in results:
        assert (total == 2 * k).all() and (product == k * k).all()
    call.free()
    call(torch.ones(2), torch.ones(2))
    assert captured == [2, 3]
    call(torch.ones(2), torch.ones(2))
    assert captured == [2, 3, 2]


def test_shapes_that_hardly_vary_are_captured_at_once() -> None:
    captured, capture = noted_captures()
    call = Replayed(lambda x: (x + 1,), "a test", capture, at_once=True)
    assert call(torch.zeros(2))[0].tolist() == [1, 1] and captured == [2]
    assert call(torch.ones(2))[0].tolist() == [2, 2] and captured == [2]


def test_graphs_are_few_and_the_longest_unused_goes() -> None:
    captured, capture = noted_captures()
    call = Replayed(lambda x: (x + 1,), "a test", capture, at_once=False)
    for n in range(1, MAX_GRAPHS + 2):
        call(torch.zeros(n))
        call(torch.zeros(n))
    assert captured == list(range(1, MAX_GRAPHS + 2))
    call(torch.zeros(MAX_GRAPHS + 1))
    assert len(captured) == MAX_GRAPHS + 1
    call(torch.zeros(1))
    call(torch.zeros(1))  # the oldest was dropped
    assert captured[-1] == 1


def test_as_many_graphs_as_promised_are_kept_and_use_counts_not_age() -> None:
    captured, capture = noted_captures()
    call = Replayed(lambda x: (x + 1,), "a test", capture, at_once=True)
    first = list(range(1, MAX_GRAPHS + 1))
    for n in (*first, *first):
        call(torch.zeros(n))
    assert captured == first  # all of them are still there
    call(torch.zeros(1))
    call(torch.zeros(MAX_GRAPHS + 1))  # takes the place of 2, the longest unused
    call(torch.zeros(1))
    assert captured == [*first, MAX_GRAPHS + 1]
    call(torch.zeros(2))
    assert captured == [*first, MAX_GRAPHS + 1, 2]


def test_a_capture_that_fails_frees_the_graphs_of_other_shapes() -> None:
    """They would hold memory that nothing replays."""
    held: list[weakref.ref[Function]] = []

    def capture(function: Function, inputs: Any) -> Function:
        if held:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = imitated_capture(function, inputs)
        held.append(weakref.ref(made))
        return made

    call = Replayed(lambda x: (x + 1,), "a test", capture, at_once=True)
    call(torch.zeros(2))
    assert held[0]() is not None
    call(torch.zeros(3))
    gc.collect()
    assert held[0]() is None and call(torch.zeros(2))[0].tolist() == [1, 1]


@pytest.mark.parametrize(("reason", "said"), [("", "RuntimeError"), ("graph " * 1000, ("graph " * 1000)[:300])])
def test_the_reason_in_the_log_is_neither_empty_nor_pages(
    reason: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch's errors of compilers bring their whole output; some errors bring no words."""

    def capture(function: Function, inputs: Any) -> Function:
        raise RuntimeError(reason)

    Replayed(lambda x: (x + 1,), "decode", capture, at_once=True)(torch.zeros(2))
    assert [r.getMessage() for r in caplog.records] == [f"decode runs without CUDA graphs: {said}"]


def test_a_capture_that_memory_lacks_for_is_tried_again_when_memory_was_freed() -> None:
    """So that a model that had to go down the memory ladder at its first frame has graphs on the rung that fits."""
    tried: list[int] = []

    def capture(function: Function, inputs: Any) -> Function:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise RuntimeError("CUDA error: out of memory")  # as where a graph is instantiated
        if len(tried) == 3:
            try:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return imitated_capture(function, inputs)

    call = Replayed(lambda x: (x + 1,), "encode", capture, at_once=True)
    for _ in range(3):
        assert call(torch.zeros(3))[0].tolist() == [1, 1, 1]
    assert tried == [3]
    for _ in range(2):
        assert call(torch.zeros(2))[0].tolist() == [1, 1]
    assert tried == [3, 2]
    for _ in range(2):
        call(torch.zeros(1))
    assert tried == [3, 2, 1]
    call.free()
    for _ in range(2):
        call(torch.zeros(1))
    assert tried == [3, 2, 1, 1]


def test_a_capture_that_fails_at_its_end_leaves_the_thread_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what runs after it in the same call would be on a stream that nobody waits for."""
    own, captured = FakeStream(), FakeStream()
    current = [own]

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        before = current[0]
        current[0] = stream
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(_: object, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert current == [own] and capture_error_mode == "thread_local" and pool is None and stream.waits == [own]
        current[0] = captured
        yield
        raise RuntimeError("operation failed due to a previous error during capture")  # as torch: the stream stays

    fakes = {"current_stream": lambda: current[0], "Stream": FakeStream, "stream": on, "CUDAGraph": object,
             "graph": graph}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    used: list[FakeStream] = []
    with pytest.raises(RuntimeError, match="previous error"):
        capturer()(lambda x: (used.append(current[0]), (x,))[1], (torch.zeros(2),))
    assert current == [own] and used[-1] is captured
    # three calls before it, on a stream that waits for the inputs and is waited for
    warm = used[0]
    assert used[:-1] == [warm] * 3 and warm not in (own, captured)
    assert warm.waits == [own] and own.waits == [warm]


def test_graphs_of_one_model_share_memory_on_a_stream_and_others_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's workspace belongs to the stream of the capture, and graphs of two streams replay at the same time."""
    current, captures = [FakeStream()], []

    class Graph:
        def __init__(self) -> None:
            self.own = object()

        def pool(self) -> object:
            return self.own

        def replay(self) -> None: ...

    @contextlib.contextmanager
    def graph(one: Graph, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        one.own = pool or one.own
        captures.append((pool, stream))
        yield

    fakes = {"current_stream": lambda: current[0], "Stream": FakeStream, "CUDAGraph": Graph, "graph": graph,
             "stream": lambda _: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture = capturer()
    encode = [capture(lambda x: (x + 1,), (torch.zeros(n),)) for n in (2, 3)]
    another_model = capturer()(lambda x: (x + 1,), (torch.zeros(2),))
    current[0] = FakeStream()
    decode = capture(lambda x: (x + 1,), (torch.zeros(2),))
    assert len(encode) == 2 and another_model and decode
    (first, beside), (second, again), (third, _), (fourth, other) = captures
    assert first is None and second is not None and third is None and fourth is None
    assert beside is again is not other


class PooledGraph:
    """A CUDA graph, as far as its memory goes: what is free in its pool, the next capture with this pool takes."""

    made: list[PooledGraph]
    captured: PooledGraph | None = None

    def __init__(self) -> None:
        self.made.append(self)
        self.free: list[Any] = []
        self.kernels: list[Callable[[], Any]] = []
        self.then: Callable[[], Any] = lambda: None

    def pool(self) -> Any:
        return self.free

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()
        self.then()

    @classmethod
    def run(cls, function: Callable[[Any], Any], x: Any) -> Any:
        """One kernel and its result."""
        graph = cls.captured
        y = graph.free.pop() if graph is not None and graph.free else torch.zeros_like(x)
        y.copy_(function(x))
        if graph is not None:
            graph.kernels.append(lambda: y.copy_(function(x)))
        return y

    @classmethod
    def release(cls, y: Any) -> None:
        if cls.captured is not None:
            cls.captured.free.append(y)


@pytest.mark.parametrize("apart", [True, False], ids=["a pool for each", "one pool"])
def test_a_model_that_replays_before_another_has_its_outputs_leaves_them(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads with two models on one stream: nothing makes replay and copy of the outputs one step."""

    @contextlib.contextmanager
    def graph(one: PooledGraph, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        one.free = one.free if pool is None else pool
        monkeypatch.setattr(PooledGraph, "captured", one)
        yield
        monkeypatch.setattr(PooledGraph, "captured", None)

    here = FakeStream()
    fakes = {"current_stream": lambda: here, "Stream": FakeStream, "CUDAGraph": PooledGraph, "graph": graph,
             "stream": lambda _: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(PooledGraph, "made", [], raising=False)

    def first(x: Any) -> Any:
        twice = PooledGraph.run(lambda a: 2 * a, x)
        found = PooledGraph.run(lambda a: a + 1, twice)
        PooledGraph.release(twice)
        return (found,)

    capture = capturer()
    one = capture(first, (torch.zeros(2),))
    other = (capturer() if apart else capture)(lambda x: (PooledGraph.run(lambda a: a + 100, x),), (torch.zeros(2),))
    answers: list[Any] = []

    def replayed_between() -> None:
        thread = threading.Thread(target=lambda: answers.extend(one(torch.full((2,), 3.0))))
        thread.start()
        thread.join()

    PooledGraph.made[-1].then = replayed_between
    (found,) = other(torch.full((2,), 5.0))
    assert answers[0].tolist() == [7, 7]
    assert (found.tolist() == [105, 105]) == apart


def test_few_shapes_serve_all_numbers_of_prompts() -> None:
    runtime, base = TorchRuntime(TinyBase(), None, CPU, torch.float32), TinyBase()
    runtime._on_cuda, runtime._upload = True, torch.from_numpy  # as on CUDA, but what is uploaded stays here
    features = runtime.encode(picture(), 256)
    rng, shapes = np.random.default_rng(0), set()
    for count in (*range(1, 18), 33, 63, 64, 65, 100):
        points = rng.uniform(0, 96, (count, 2, 2)).astype(np.float32)
        labels = np.ones((count, 2), np.float32)
        logits, scores = runtime.decode(features, points, labels, True)
        expected = base.decode(features, torch.from_numpy(points), torch.from_numpy(labels), True)
        assert torch.allclose(logits, expected[0], atol=1e-4) and torch.allclose(scores, expected[1])
        shapes.add(len(runtime._base.calls[-1][0]))
    assert shapes == {1, 2, 4, 8, 16, 32, 64, 65, 100}


def test_a_capture_that_fails_is_logged_once_and_the_stage_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("operation not permitted when stream is capturing\nmore")

    def capture(function: Function, inputs: Any) -> Function:
        raise error

    call = Replayed(lambda x: (x + 1,), "decode", capture, at_once=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert call(torch.zeros(2))[0].tolist() == [1, 1]
    said = f"decode runs without CUDA graphs: {' '.join(str(error).split())}"
    assert [r.getMessage() for r in caplog.records] == [said]


def test_a_runtime_with_graphs_gives_what_it_gives_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, graphs = on_cpu(made=enhancer(levels=True)), on_cpu(made=enhancer(levels=True))
    for stage in graphs._stages.values():
        monkeypatch.setattr(stage, "_capture", imitated_capture)
    for k in range(4):
        points = np.full((2, 1, 2), 20.0 + k, np.float32)
        found = []
        for r in (plain, graphs):
            better = r.enhance(r.encode(picture(k), 256), k / 4)
            found.append((better.latent, *r.decode(better, points, np.ones((2, 1), np.float32), bool(k % 2))))
        for a, b in zip(*found):
            assert torch.equal(a, b)


class Transfers(TorchDispatchMode):
    """Notes operations with a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        places = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if "cpu" in places:
            self.seen.append(str(function))
        return result


class Literals(TorchFunctionMode):
    """Notes tensors made of Python's numbers, which come from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def transfers(function: Callable[..., Any], *inputs: Any) -> list[str]:
    """Operations of `function` on the meta device that CUDA could not capture; values are not known there, so that
    control flow by values raises NotImplementedError or RuntimeError."""
    with torch.no_grad(), Literals() as literals, Transfers() as copies:
        function(*inputs)
    return literals.seen + copies.seen


def test_pixels_are_normalised_by_channel_without_numbers_from_the_host() -> None:
    """A copy of them would hold up the thread that encodes until the device has done all that is queued."""
    images = torch.from_numpy(picture(size=(256, 192)))[None]
    with Literals() as literals:
        pixels = TinyBase().pixels(images, 256)
    assert literals.seen == [] and pixels.shape == (1, 3, 256, 256) and pixels.dtype is torch.float32
    expected = (images.permute(0, 3, 1, 2) - torch.tensor([120.0, 110, 100]).view(3, 1, 1)) / 60
    assert torch.allclose(pixels[..., :192], expected) and (pixels[..., 192:] == 0).all()


def test_what_cannot_be_captured_is_noticed() -> None:
    x = torch.empty(2, device="meta")
    assert not transfers(lambda x: x + 1, x)
    assert transfers(lambda x: x + torch.tensor([1.0, 2.0], device=x.device), x)
    assert transfers(lambda x: x + torch.ones(2).to(x.device), x)
    for by_value in (lambda x: x[x > 0], lambda x: x.max().item()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            transfers(by_value, x)


@pytest.mark.parametrize("name", ["sam_vit_b", "sam2.1_hiera_tiny", "mobile_sam"])
def test_stages_can_be_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in FAMILIES:
        FAMILIES[name](monkeypatch)
    with torch.device("meta") if name == "mobile_sam" else contextlib.nullcontext():  # it has no narrow one
        base = build_base(name).to(torch.bfloat16).to("meta")
    pixels = torch.empty(1, 3, 1024, 1024, dtype=torch.bfloat16, device="meta")
    points, labels = torch.empty(64, 2, 2, device="meta"), torch.empty(64, 2, device="meta")
    assert transfers(base.encode, pixels) == []
    with torch.inference_mode():
        features = base.encode(pixels)
    for several in (False, True):
        assert transfers(base.decode, features, points, labels, several) == []


def test_enhancers_can_be_captured() -> None:
    latent = torch.empty(1, 256, 64, 64, dtype=torch.bfloat16, device="meta")
    small = SmallEnhancer(EnhancerConfig(base="sam_vit_b", kind="small", unet="sd21-base", levels=True))
    for made in (enhancer(levels=True), enhancer(), small):
        if isinstance(made, Enhancer):
            made.merge_lora()
            made.fold_constants()
        made.to(torch.bfloat16).to("meta")
        assert transfers(made, latent, torch.empty(1, device="meta")) == []


def test_restorer_and_segmenter_can_be_captured() -> None:
    pytest.importorskip("transformers")
    from tiny_sd import tiny_unet, tiny_vae

    from glesam_ros.models.rass.rass import RassConfig, RassNetwork
    from glesam_ros.models.rass.scr import Scr

    restorer = Scr(tiny_unet(), tiny_vae()).to(torch.bfloat16).to("meta")
    text = torch.empty(1, 77, 12, device="meta")
    assert transfers(restorer, torch.empty(1, 3, 256, 320, device="meta"), text) == []
    config = RassConfig(("road", "car"), projection=128, width=32, heads=4, queries=6, pixel_layers=1, layers=3)
    segmenter = RassNetwork(config, tiny_vae(), tiny_unet(), torch.zeros(1, 77, 12))
    segmenter.merge()
    for part in (segmenter.encoder, segmenter.quant_conv, segmenter.unet):
        part.to(torch.bfloat16)
    pixels = torch.empty(1, 512, 512, 3, dtype=torch.uint8, device="meta")
    assert transfers(segmenter.to("meta").features, pixels) == []


def test_a_compiler_that_fails_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def broken(*inputs: Any) -> Any:
        raise BackendCompilerFailed(broken, RuntimeError("no C++ compiler"), None)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    call = Compiled(lambda x: (x + 1,), "encode")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert call(torch.zeros(1))[0].tolist() == [1]
    (record,) = caplog.records
    assert "encode runs without torch.compile" in record.getMessage() and "no C++ compiler" in record.getMessage()


# ---- the model


def model(level: float | None = 0.5, enhances: bool = True) -> tuple[GlesamModel, Recorder]:
    runtime = Recorder(level)
    return GlesamModel("tiny+glesam", runtime, runtime.base, enhances), runtime


@pytest.mark.parametrize(
    ("processing_size", "side"), [(0, 256), (256, 256), (320, 256), (352, 384), (1000, 1024), (1024, 1024), (32, 256)]
)
def test_processing_size_is_the_nearest_side_that_the_model_has(processing_size: int, side: int) -> None:
    made, _ = model()
    embedding = made.encode(picture(), Budget(processing_size=processing_size))
    assert embedding.latent.shape == (1, 256, side // 16, side // 16)
    assert embedding.size == SIZE and not embedding.enhanced


def test_level_comes_from_the_enhancer_and_else_from_nano() -> None:
    assert model(level=0.7)[0].encode(picture(), Budget()).degradation == 0.7
    own = Nano("cpu", threads=1).encode(picture(), Budget()).degradation
    assert model(level=None)[0].encode(picture(), Budget()).degradation == pytest.approx(own, abs=1e-4)


def test_enhancing_restores_the_latent_once_and_leaves_the_embedding() -> None:
    made, runtime = model(level=0.7)
    embedding = made.encode(picture(), Budget())
    better = made.enhance(embedding)
    assert better.enhanced and not embedding.enhanced and runtime.enhanced == [0.7]
    assert torch.equal(better.latent, embedding.latent + 1) and better.degradation == 0.7


def test_a_base_alone_never_claims_to_have_enhanced() -> None:
    made, runtime = model(enhances=False)
    embedding = made.encode(picture(), Budget())
    assert made.enhance(embedding) is embedding and not embedding.enhanced and not runtime.enhanced


def test_prompts_are_told_apart_placed_and_batched() -> None:
    made, runtime = model()
    embedding = made.encode(picture(), Budget())
    points = np.array(
        [
            [[64, 48], [0, 0], [0, 0]],  # a lone point
            [[0, 0], [0, 0], [32, 24]],  # another, behind its padding
            [[20, 20], [60, 60], [0, 0]],  # two points
            [[10, 10], [30, 50], [0, 0]],  # a box
            [[10, 10], [30, 50], [20, 20]],  # a box with a point
        ],
        np.float32,
    )
    labels = np.array([[1, -1, -1], [-1, -1, 1], [1, 0, -1], [2, 3, -1], [2, 3, 1]], np.float32)
    found = made.prompt(embedding, points, labels, Budget(points_per_batch=2))
    shapes = [(tuple(p.shape), several) for p, _, several in runtime.base.calls]
    assert shapes == [((2, 1, 2), True), ((1, 2, 2), False), ((1, 2, 2), False), ((1, 3, 2), False)]
    assert all((kinds >= 0).all() for _, kinds, _ in runtime.base.calls)
    assert max(len(p) for p, _, _ in runtime.base.calls) <= 2
    # of three masks the second is the surest
    assert found.scores.tolist() == pytest.approx([0.901, 0.901, 0.202, 0.202, 0.203])
    assert found.logits.dtype == found.scores.dtype == np.float32
    # 128 x 96 fills 256 x 192 of the square, and the padding below is cut
    assert found.logits.shape == (5, 48, 64)
    for k, (x, y) in enumerate([(64, 48), (32, 24), (40, 40), (20, 30), (20, 80 / 3)]):
        top, left = np.unravel_index(found.logits[k].argmax(), (48, 64))
        assert abs(left * 2 + 1 - x) <= 1.1 and abs(top * 2 + 1 - y) <= 1.1
    one_by_one = [made.prompt(embedding, points[k : k + 1], labels[k : k + 1], Budget()) for k in range(5)]
    assert np.allclose(found.logits, np.concatenate([c.logits for c in one_by_one]), atol=1e-5)


@pytest.mark.parametrize("enhance", [False, True])
def test_crops_are_enhanced_where_the_image_was(enhance: bool) -> None:
    made, runtime = model(level=0.7)
    image = picture()
    embedding = made.encode(image, Budget(crop_layers=1))
    expected = image.copy()
    if enhance:
        embedding = made.enhance(embedding)
    image[:] = 0  # the camera's buffer is written anew
    made.propose(embedding, 0.5, 8, Budget(points_per_side=4, crop_layers=1))
    assert len(runtime.images) == 5 and runtime.enhanced == ([0.7] * 5 if enhance else [])
    heights = {i.shape[:2] for i in runtime.images[1:]}
    assert len(heights) <= 4 and all(h < SIZE[0] and w < SIZE[1] for h, w in heights)
    assert (runtime.images[-1] == expected[: runtime.images[-1].shape[0], : runtime.images[-1].shape[1]]).all()


def test_an_embedding_made_without_crops_is_decoded_without() -> None:
    made, runtime = model()
    embedding = made.encode(picture(), Budget())
    made.propose(embedding, 0.5, 8, Budget(points_per_side=4, crop_layers=2))
    assert len(runtime.images) == 1


def test_thresholds_are_those_of_the_base_and_lower_ones_with_an_enhancer() -> None:
    runtime = Recorder()
    assert GlesamModel("tiny", runtime, runtime.base, False).thresholds == TinyBase.thresholds
    assert GlesamModel("tiny+glesam", runtime, runtime.base, True).thresholds == (0.15, 0.5)
    # SamAutomaticMaskGenerator's and SAM2AutomaticMaskGenerator's
    with torch.device("meta"):
        for name, expected in (("sam_vit_b", (0.88, 0.95)), ("sam2.1_hiera_tiny", (0.8, 0.95))):
            assert build_base(name).thresholds == expected


@pytest.mark.parametrize("part", ["scores", "logits"])
def test_a_prompt_whose_answer_overflowed_is_an_error(part: str) -> None:
    class Overflows(Recorder):
        def decode(self, *arguments: Any) -> Any:
            logits, scores = super().decode(*arguments)
            return (logits, scores * float("nan")) if part == "scores" else (logits * float("inf"), scores)

    runtime = Overflows()
    made = GlesamModel("tiny", runtime, runtime.base, False)
    with pytest.raises(RuntimeError, match="tiny on a test: expected finite values, got .*take precision fp32"):
        made.prompt(made.encode(picture(), Budget()), np.float32([[[40, 50]]]), np.float32([[1]]), Budget())


def test_a_level_that_overflowed_does_not_pass_for_a_clear_picture() -> None:
    assert [runtimes.checked_level(level, "a test") for level in (-0.5, 0.25, 7.0)] == [0.0, 0.25, 1.0]
    for level in (float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="level on a test: expected finite values"):
            runtimes.checked_level(level, "a test")
    torch_runtime = TorchRuntime(TinyBase(), enhancer(levels=True), CPU, torch.float32)
    features = torch_runtime.encode(picture(), 256)
    assert 0 <= torch_runtime.level(features) <= 1
    with pytest.raises(RuntimeError, match="level on cpu"):
        torch_runtime.level(Features(features.latent * float("nan")))


def test_freeing_and_closing_reach_the_runtime() -> None:
    made, runtime = model()
    made.free()
    assert runtime.freed and not runtime.closed
    made.close()
    assert runtime.closed and made.own_size == 256 and made.overlaps and made.device == "a test"


def test_a_closed_model_holds_no_weights() -> None:
    base, made = TinyBase(), enhancer()
    runtime = TorchRuntime(base, made, CPU, torch.float32)
    closed = GlesamModel("tiny", runtime, base, True)
    weights = [weakref.ref(base.patch.weight), weakref.ref(made.unet.conv_in.weight)]
    del base, made
    closed.close()
    gc.collect()
    assert [ref() for ref in weights] == [None, None]


def test_allocation_failures_are_known_by_their_words() -> None:
    assert runtimes.means_out_of_memory(MemoryError())
    assert runtimes.means_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert not runtimes.means_out_of_memory(ValueError("out of memory"))


# ---- files in the real layout, through the front door


def tiny_sam2(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Register a narrow SAM 2 and give what lies in its official file."""
    trunk = "++model.image_encoder.trunk"
    narrow = (f"{trunk}.embed_dim=16", f"{trunk}.num_heads=1")
    neck = "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]"
    config = sam2.Sam2Config(sam2.SAM2_SIZES["sam2.1_hiera_tiny"].file, (*narrow, neck))
    monkeypatch.setitem(sam2.SAM2_SIZES, "sam2.1_hiera_tiny", config)
    torch.manual_seed(4)
    return {"model": sam2.build_sam2("sam2.1_hiera_tiny").net.state_dict()}


def tiny_sam(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Register a narrow SAM and give what lies in its official file."""
    monkeypatch.setitem(sam.SAM_SIZES, "sam_vit_b", sam.SamConfig(32, 2, 2, (1,)))
    torch.manual_seed(4)
    return sam.build_sam("sam_vit_b").net.state_dict()


FAMILIES = {"sam2.1_hiera_tiny": tiny_sam2, "sam_vit_b": tiny_sam}


@pytest.fixture(params=sorted(FAMILIES))
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A base's name, and a $GLESAM_HOME with its file, a U-Net, and its enhancers glesam and glesam++."""
    base, unet = request.param, tiny_unet()
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path))
    content = FAMILIES[base](monkeypatch)
    torch.save(content, tmp_path / catalogue.BASES[base].source.path)
    unet.save_pretrained(tmp_path / "sd21-base" / "unet")
    prompt = torch.randn(1, 77, 32, generator=torch.manual_seed(2))
    save_file({"prompt": prompt}, tmp_path / "sd21-base" / "empty_prompt.safetensors")
    for name, levels in (("glesam", False), ("glesam++", True)):
        config = EnhancerConfig(base=base, kind="lora", unet="sd21-base", levels=levels, timestep=500)
        made = Enhancer(config, tiny_unet(), prompt)
        with torch.no_grad():
            for parameter in made.trained_parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
        save_enhancer(made, tmp_path / f"{base}+{name}")
    return base, tmp_path


ONE_FAMILY = pytest.mark.parametrize("home", ["sam_vit_b"], indirect=True)
EASY = {"processing_size": 256, "points_per_side": 3, "score_threshold": 0.0, "stability_threshold": 0.0,
        "min_area": 0, "device": "cpu"}


@pytest.mark.parametrize("enhancer_name", ["glesam", "glesam++"])
def test_a_model_runs_from_its_files_in_every_mode(home: tuple[str, Path], enhancer_name: str) -> None:
    base, _ = home
    pipe = load_pipeline(f"{base}+{enhancer_name}", enhancement="always", **EASY)
    assert pipe.model.name == f"{base}+{enhancer_name}" and pipe.model.device == "cpu (fp32, torch)"
    image = picture()
    found = {}
    for mode in ("off", "always", "auto"):
        pipe.settings = pipe.settings.replace(enhancement=mode)
        everything_found = pipe.segment(image)
        point = pipe.segment(image, points=[[40, 50]])
        boxes = pipe.segment(image, boxes=[[10, 10, 60, 60], [5, 40, 90, 90]])
        both = pipe.segment(image, points=[[20, 20], [90, 70]], labels=[1, 0], boxes=[[10, 10, 60, 60]])
        assert (len(point), len(boxes), len(both)) == (1, 2, 2)
        assert everything_found.masks.shape[1:] == SIZE and len(everything_found) >= 1
        found[mode] = boxes
    assert not found["off"].enhanced and found["always"].enhanced
    level = found["off"].degradation
    assert found["auto"].enhanced == (level > pipe.settings.enhance_above)
    assert np.abs(found["off"].scores - found["always"].scores).max() > 0
    own = Nano("cpu", threads=1).encode(image, Budget()).degradation
    assert (level == pytest.approx(own, abs=1e-4)) == (enhancer_name == "glesam")
    pipe.close()


@ONE_FAMILY
def test_a_repository_of_hugging_face_stands_for_its_base(home: tuple[str, Path]) -> None:
    name = f"{home[0]}+glesam"
    pipe = load_pipeline("facebook/sam-vit-base+glesam", enhancement="always", **EASY)
    assert pipe.model.name == name and pipe.segment(picture()).enhanced
    assert load_glesam("facebook/sam-vit-base+glesam", "cpu").name == name
    with pytest.raises(FileNotFoundError, match="glesam models get sam2.1_hiera_large"):
        load_model("facebook/sam2.1-hiera-large", "cpu")
    for wrong, said in (
        ("facebook/sam3", "expected of Hugging Face's repositories one of .*; got 'facebook/sam3'"),
        ("stabilityai/stable-diffusion-2-1-base", "expected one of nano, .*; got 'stabilityai/stable-diffusion"),
    ):
        with pytest.raises(ValueError, match=said):
            load_model(wrong, "cpu")


def test_a_base_alone_runs_and_never_enhances(home: tuple[str, Path]) -> None:
    pipe = load_pipeline(home[0], enhancement="always", **EASY)
    assert not pipe.segment(picture()).enhanced


@ONE_FAMILY
def test_the_mask_decoder_of_stage_2_takes_the_place_of_the_official_one(
    home: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    base, folder = home
    name = f"{base}+glesam"
    before = load_glesam(name, "cpu")._base.mask_decoder.state_dict()
    assert "no fine-tuned mask decoder" in caplog.text
    tuned = {f"module.mask_decoder.{key}": value + 1 for key, value in before.items()}
    save_file(tuned, folder / name / catalogue.DECODER_FILE)
    after = load_glesam(name, "cpu")._base.mask_decoder.state_dict()
    assert all(torch.equal(after[key], before[key] + 1) for key in before)
    assert torch.equal(load_glesam(base, "cpu")._base.mask_decoder.state_dict()[key := next(iter(before))], before[key])


@ONE_FAMILY
def test_masks_that_stage_2_wore_away_are_the_official_ones(
    home: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The released recipe trains the first mask alone; its L2 term takes the layers of the others to nearly zero."""
    base, folder = home
    name, heads = f"{base}+glesam", "output_hypernetworks_mlps."
    before = load_glesam(name, "cpu")._base.mask_decoder.state_dict()
    worn = [key for key in before if key.startswith((f"{heads}1.", f"{heads}3."))]
    tuned = {key: value * (0.1 if key in worn else 0.9) for key, value in before.items()}
    save_file(tuned, folder / name / catalogue.DECODER_FILE)
    after = load_glesam(name, "cpu")._base.mask_decoder.state_dict()
    assert worn and all(torch.equal(after[key], before[key] if key in worn else tuned[key]) for key in before)
    assert "layers of masks [1, 3] are worn away" in caplog.text


@ONE_FAMILY
def test_lack_of_memory_at_load_says_what_to_do_and_leaves_nothing(
    home: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[BaseModel]] = []
    alive: list[BaseModel | None] = []

    def lacks(base: BaseModel, *place: Any) -> Any:
        held.append(weakref.ref(base))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 26 MiB\nmore")

    monkeypatch.setattr(sam.Sam, "to", lacks)
    monkeypatch.setattr(runtimes, "give_back", lambda: alive.append(held[0]()))
    with pytest.raises(OutOfMemory, match="allocate 26 MiB; expected memory .* take a smaller model or precision$"):
        load_model(home[0], "cpu")
    assert alive == [None]  # no weights are left when cached memory is given back


@ONE_FAMILY
def test_bench_times_a_full_size_model(home: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, folder = home
    sizes = {"processing-size": "256", "points-per-side": "2", "score-threshold": "0", "device": "cpu"}
    options = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    name = f"{base}+glesam"
    assert main(["bench", "--model", name, "--frames", "1", "--size", "96x64", "--json", "-", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == name and report["device"] == "cpu (fp32, torch)"
    # the base, the U-Net, LoRA; not the other enhancer, not the prompt
    files = [folder / catalogue.BASES[base].source.path, folder / "sd21-base" / "unet", folder / name]
    weights = [p for f in files for p in ([f] if f.is_file() else f.glob("*.safetensors"))]
    total = sum(p.stat().st_size for p in weights) / 1e6
    assert len(weights) == 3 and report["weights_mb"] == pytest.approx(total, abs=0.01)


@ONE_FAMILY
def test_a_missing_file_is_named_with_the_command_that_gets_it(
    home: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = home
    monkeypatch.setattr(torch, "load", None)  # it is said before anything large is read
    monkeypatch.setattr("glesam_ros.models.glesam.enhancer.load_unet", None)
    for missing, how in (
        ("sam_vit_b_01ec64.pth", "get them: glesam models get sam_vit_b"),
        ("sd21-base/unet/diffusion_pytorch_model.safetensors", "get it: glesam models get sam_vit_b+glesam++"),
        ("sd21-base/unet/config.json", "get it: glesam models get sam_vit_b+glesam++"),
        ("sd21-base/empty_prompt.safetensors", "get it: glesam models get sam_vit_b+glesam++"),
        ("sam_vit_b+glesam++/pytorch_lora_weights.safetensors", "glesam models get sam_vit_b+glesam++ --from RUN/"),
        ("sam_vit_b+glesam++/level.safetensors", "glesam models get sam_vit_b+glesam++ --from RUN/"),
        ("sam_vit_b+glesam++/glesam.json", "glesam models get sam_vit_b+glesam++ --from RUN/"),
        ("sam_vit_b+glesam/glesam.json", "get it: glesam models get sam_vit_b+glesam"),
        # `get` does not look into a folder with a glesam.json
        ("sam_vit_b+glesam/pytorch_lora_weights.safetensors", "+glesam, then: glesam models get sam_vit_b+glesam"),
    ):
        there = (folder / missing).rename(folder / "elsewhere")
        with pytest.raises(FileNotFoundError) as raised:
            load_model(f"{base}+glesam" if f"{base}+glesam/" in missing else f"{base}+glesam++", "cpu")
        # without the embedded prompt, what embeds it
        named = "sd21-base/tokenizer" if "empty_prompt" in missing else missing
        assert f"{folder / named}, found no file" in str(raised.value) and how in str(raised.value)
        there.rename(folder / missing)


@ONE_FAMILY
def test_an_enhancer_of_another_base_is_refused(home: tuple[str, Path]) -> None:
    base, folder = home
    file = folder / f"{base}+glesam" / "glesam.json"
    file.write_text(file.read_text().replace(base, "sam_vit_h"))
    with pytest.raises(ValueError, match=f"expected an enhancer of {base}, got one of sam_vit_h"):
        load_model(f"{base}+glesam", "cpu")


def test_every_name_of_the_catalogue_is_a_model() -> None:
    assert {"nano", *catalogue.model_names()} <= {*model_names()}
    with pytest.raises(ValueError, match=r"expected one of .*nano, sam_vit_b.*\+glesam, .*; got 'sam_vit_b\+nosuch'"):
        load_model("sam_vit_b+nosuch")
