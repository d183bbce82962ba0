"""Exported graphs: fp16, what TensorRT is given, lack of memory, models opened by name, the published sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sam2")

from onnx import TensorProto, helper  # noqa: E402
from test_glesam_model import TinyBase, home, picture  # noqa: E402, F401

from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.models import Budget, OutOfMemory, onnx_session  # noqa: E402
from glesam_ros.models.glesam import model as models  # noqa: E402
from glesam_ros.models.glesam import onnx_export, onnx_runtime  # noqa: E402
from glesam_ros.models.glesam.base import Features  # noqa: E402
from glesam_ros.models.glesam.model import load_glesam, load_parts  # noqa: E402
from glesam_ros.models.glesam.onnx_export import Difference, Manifest  # noqa: E402
from glesam_ros.models.glesam.runtime import TorchRuntime  # noqa: E402

SIDE = 256
SAM2 = pytest.mark.parametrize("home", ["sam2.1_hiera_tiny"], indirect=True)
MANIFEST = Manifest("sam_vit_b", SIDE, 18, False, False, False, {}, torch.__version__)


def types(path: Path) -> set[int]:
    """Element types of the large weights of a graph; what places prompts is small."""
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer if np.prod(tensor.dims) >= 2**16}


@SAM2
def test_fp16_graphs_have_half_the_bytes_and_take_the_place_of_torch(home, monkeypatch):  # noqa: F811
    base_name, folder = home
    name = f"{base_name}+glesam++"
    image = picture()
    native = load_glesam(name, "cpu")
    expected = native.enhance(native.encode(image, Budget(processing_size=SIDE)))
    write, out = onnx_export._write, folder / name / "onnx"

    def write_once(path: Path, *rest: Any) -> None:
        if path.stem == "decoder_three":  # a decoder takes its time, and its graph is of no interest here
            path.write_bytes((out / "decoder_one.onnx").read_bytes())
        else:
            write(path, *rest)

    monkeypatch.setattr(onnx_export, "_write", write_once)
    onnx_export.export_model(name, *load_parts(name, folder), out, SIDE, fp16=True)
    assert types(out / "enhancer.onnx") == types(out / "decoder_one.onnx") == {TensorProto.FLOAT16}
    assert types(out / "level.onnx") == {TensorProto.FLOAT}  # the statistics of a level need float32
    for graph in out.glob("*.onnx"):
        loaded = onnx.load(graph).graph
        assert {end.type.tensor_type.elem_type for end in (*loaded.input, *loaded.output)} == {TensorProto.FLOAT}

    # by name, with the CPU in TensorRT's place; files of torch are not needed any more
    for file in (*folder.glob("*.pt"), *folder.glob("sd21-base/unet/*")):
        file.unlink()
    monkeypatch.setattr(onnx_runtime, "choose_device", lambda device: {"tensorrt": "cpu"}[device])
    model = load_glesam(name, "tensorrt")
    assert model.device == "cpu (fp16, onnxruntime, CPUExecutionProvider)"
    found = model.enhance(model.encode(image, Budget()))
    assert model.own_size == SIDE and found.enhanced
    assert found.degradation == pytest.approx(expected.degradation, abs=0.02)
    assert (found.latent - expected.latent).abs().mean() < 0.02 * expected.latent.std()
    with pytest.raises(ValueError, match="expected auto or fp16 on cpu for graphs in fp16, got 'fp32'.*without --fp16"):
        load_glesam(name, "tensorrt", "fp32")


class Session:
    """Stands for onnxruntime's; notes how it was opened."""

    opened: list[tuple[str, dict[str, dict[str, Any]]]] = []

    def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, Any]]]) -> None:
        self.opened.append((Path(path).name, dict(providers)))

    def get_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider"]

    def get_outputs(self) -> list[Any]:
        latent = ("latent", [1, 256, 16, 16]), ("high0", [1, 32, 64, 64])
        return [dataclasses.make_dataclass("Value", ["name", "shape"])(*value) for value in latent]


def test_tensorrt_gets_one_profile_for_all_prompts_and_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_session.ort, "InferenceSession", Session)
    monkeypatch.setattr(Session, "opened", [])
    everywhere = [*onnx_session.PROVIDERS.values()]
    monkeypatch.setattr(onnx_session.ort, "get_available_providers", lambda: everywhere)
    for part in ("encoder", "level", "decoder_one", "decoder_three"):
        (tmp_path / f"{part}.onnx").touch()
    manifest = dataclasses.replace(MANIFEST, levels=True)
    runtime = onnx_runtime.OnnxRuntime(tmp_path, manifest, TinyBase(), "tensorrt", "fp16")
    assert runtime.device == "tensorrt (fp16, onnxruntime, TensorrtExecutionProvider)"
    settings = {file: providers["TensorrtExecutionProvider"] for file, providers in Session.opened}
    assert list(settings) == ["encoder.onnx", "level.onnx", "decoder_one.onnx", "decoder_three.onnx"]
    for file, given in settings.items():
        assert given["trt_fp16_enable"] is (file != "level.onnx")  # the statistics of a level need float32
        assert given["trt_engine_cache_enable"] is True
        assert Path(given["trt_engine_cache_path"]).parent == tmp_path / "tensorrt"
    assert not any("profile" in key for key in settings["encoder.onnx"])
    fixed = "latent:1x256x16x16,high0:1x32x64x64"
    for part in ("decoder_one.onnx", "decoder_three.onnx"):
        given = settings[part]
        assert given["trt_profile_min_shapes"] == f"points:1x1x2,labels:1x1,{fixed}"
        assert given["trt_profile_opt_shapes"] == f"points:64x1x2,labels:64x1,{fixed}"
        assert given["trt_profile_max_shapes"] == f"points:64x16x2,labels:64x16,{fixed}"


@pytest.mark.parametrize(
    ("name", "device", "fp16", "asked", "taken"),
    [
        ("mobile_sam+glesam_small", "tensorrt", False, "auto", "fp32"),
        ("mobile_sam", "tensorrt", False, "fp32", "fp32"),
        ("mobile_sam", "tensorrt", False, "fp16", "fp16"),
        ("mobile_sam", "tensorrt", True, "auto", "fp16"),
        ("mobile_sam", "cuda", True, "auto", "fp16"),
        ("sam_vit_b", "tensorrt", False, "auto", "fp16"),
    ],
)
def test_tensorrt_takes_mobile_sam_in_fp16_only_where_told_and_warns(
    name, device, fp16, asked, taken, tmp_path, monkeypatch, caplog
):
    manifest = dataclasses.replace(MANIFEST, name=name, fp16=fp16)
    monkeypatch.setattr(onnx_runtime, "read_manifest", lambda folder, name: manifest)
    monkeypatch.setattr(onnx_runtime, "choose_device", lambda device: device)
    monkeypatch.setattr(onnx_runtime, "OnnxRuntime", lambda *arguments: arguments[3:])
    assert onnx_runtime.open_onnx_runtime(name, device, asked, tmp_path, base=TinyBase()) == (device, taken)
    doubtful = name.startswith("mobile_sam") and (device, taken) == ("tensorrt", "fp16")
    assert ("found its output wrong in fp16 with TensorRT; take precision fp32" in caplog.text) == doubtful


def test_graphs_too_large_for_tensorrt_are_refused_before_it_fails(tmp_path, monkeypatch):
    files = {"enhancer.onnx": 60, "enhancer.onnx.data": 60, "decoder_one.onnx": 90}
    for file, size in files.items():
        (tmp_path / file).write_bytes(bytes(size))
    manifest = dataclasses.replace(MANIFEST, files=dict.fromkeys(files, ""))
    monkeypatch.setattr(onnx_runtime, "read_manifest", lambda folder, name: manifest)
    monkeypatch.setattr(onnx_runtime, "choose_device", lambda device: device)
    monkeypatch.setattr(onnx_runtime, "OnnxRuntime", lambda *arguments: arguments[3:])

    def opened(device: str) -> Any:
        return onnx_runtime.open_onnx_runtime("sam_vit_b", device, folder=tmp_path, base=TinyBase())

    assert opened("tensorrt") == ("tensorrt", "fp16")
    monkeypatch.setattr(onnx_runtime, "MOST_BYTES", 100)  # the weights of the enhancer count, in whatever file they are
    with pytest.raises(ValueError, match="enhancer.onnx: expected at most 2 GB.*glesam export sam_vit_b --fp16"):
        opened("tensorrt")
    assert opened("cuda") == ("cuda", "fp32")


def graph(path: Path, *nodes: onnx.NodeProto) -> None:
    """A graph from pixels to a latent of the same shape; `side` is the shape of a square of 4 TB."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, SIDE, SIDE]) for n in ("pixels", "latent")]
    side = helper.make_tensor("side", TensorProto.INT64, [2], [2**20, 2**20])
    made = helper.make_graph(nodes, "test", ends[:1], ends[1:], [side])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_lack_of_memory_in_onnxruntime_is_our_error_and_the_runtime_lives_on(tmp_path):
    widened = [
        helper.make_node("ReduceMax", ["pixels"], ["top"], keepdims=0),
        helper.make_node("Expand", ["top", "side"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["most"], keepdims=0),
        helper.make_node("Add", ["pixels", "most"], ["latent"]),
    ]
    graph(tmp_path / "encoder.onnx", *widened)
    for part in ("decoder_one", "decoder_three"):
        graph(tmp_path / f"{part}.onnx", helper.make_node("Identity", ["pixels"], ["latent"]))
    runtime = onnx_runtime.OnnxRuntime(tmp_path, MANIFEST, TinyBase(), "cpu", "fp32")
    with pytest.raises(OutOfMemory, match="encoder: .*Failed to allocate memory"):
        runtime.encode(picture(), SIDE)
    runtime.free()
    assert runtime._run("decoder_one", {"pixels": torch.ones(1, 3, SIDE, SIDE)})[0].min() == 1
    with pytest.raises(Exception, match="Invalid input name|Required inputs") as raised:  # not for lack of memory
        runtime._run("decoder_one", {"picture": torch.ones(1)})
    assert not isinstance(raised.value, OutOfMemory)


@pytest.mark.parametrize(
    ("fp16", "mean", "code"), [(False, 9e-4, 0), (False, 2e-3, 1), (True, 2e-3, 0), (True, 0.06, 1), (True, np.nan, 1)]
)
def test_graphs_that_differ_fail_with_what_to_do(fp16, mean, code, tmp_path, monkeypatch, capsys):
    manifest = dataclasses.replace(MANIFEST, fp16=fp16)
    rows = [Difference("latent", 9.0, mean), Difference("scores", 0.0, 0.0)]
    monkeypatch.setattr(models, "load_parts", lambda *_: (TinyBase(), None))
    exports: list[Any] = []
    monkeypatch.setattr(onnx_export, "export_model", lambda *given: exports.append(given) or manifest)
    runtime = type("Runtime", (), {"device": "cpu (fp16)" if fp16 else "cpu (fp32)"})()
    monkeypatch.setattr(onnx_runtime, "open_onnx_runtime", lambda *_, **__: runtime)
    monkeypatch.setattr(onnx_export, "compare", lambda *_: rows)
    assert main(["export", "sam_vit_b", "--out", str(tmp_path), *(["--fp16"] if fp16 else [])]) == code
    assert exports[0][3:] == (tmp_path, 1024, fp16)
    said = capsys.readouterr().err
    assert not said if code == 0 else "error: latent: expected a mean difference of at most 0.0" in said
    assert ("without --fp16" in said) == (fp16 and code == 1)


def test_a_comparison_names_what_differs_and_by_how_much():
    class Shifted(TorchRuntime):
        def decode(self, features: Features, *prompts: Any) -> Any:
            logits, scores = super().decode(features, *prompts)
            return logits, scores + 0.25

    ours, theirs = (kind(TinyBase(), None, torch.device("cpu"), torch.float32) for kind in (TorchRuntime, Shifted))
    rows = {row.output: row for row in onnx_export.compare(ours, theirs, [picture()], SIDE)}
    assert [rows["scores"].largest, rows["scores"].mean] == pytest.approx([0.25, 0.25], abs=1e-6)
    assert all(row.largest == 0 for output, row in rows.items() if output != "scores")
    assert set(rows) == {"latent", "restored latent", "logits", "scores", "masks, 1 - IoU"}


def test_masks_that_are_empty_in_both_are_the_same():
    """Points on nothing would fail each export, whose tolerance is on the mean of 1 - IoU."""

    class Shifted(TinyBase):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def decode(self, *given: Any) -> Any:
            logits, scores = super().decode(*given)
            return logits.clamp(-1, 1) + self.by, scores

    def lost(*shifts: float) -> tuple[float, float]:
        runtimes = (TorchRuntime(Shifted(by), None, torch.device("cpu"), torch.float32) for by in shifts)
        rows = onnx_export.compare(*runtimes, [picture()], SIDE)
        return next((row.largest, row.mean) for row in rows if row.output == "masks, 1 - IoU")

    assert lost(-2, -2) == (0, 0)
    assert lost(-2, 2) == lost(2, -2) == (1, 1)
