"""glesam export: graphs that give what torch gives, for any number of prompts, through the pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sam2")

from test_glesam_model import home, picture  # noqa: E402, F401

from glesam_ros import Settings  # noqa: E402
from glesam_ros.cli.main import main  # noqa: E402
from glesam_ros.models import OutOfMemory  # noqa: E402
from glesam_ros.models.glesam import catalogue, onnx_export, onnx_runtime  # noqa: E402
from glesam_ros.models.glesam.model import GlesamModel, build_base, load_glesam, load_parts  # noqa: E402
from glesam_ros.pipeline import Pipeline  # noqa: E402

SIDE = 256
SAM2 = pytest.mark.parametrize("home", ["sam2.1_hiera_tiny"], indirect=True)
SAM = pytest.mark.parametrize("home", ["sam_vit_b"], indirect=True)
EASY = {"processing_size": SIDE, "points_per_side": 3, "points_per_batch": 4, "score_threshold": 0.0,
        "stability_threshold": 0.0, "min_area": 0, "enhancement": "always"}


def opened(name, **options):
    base = build_base(catalogue.split_name(name)[0])
    return onnx_runtime.open_onnx_runtime(name, "cpu", base=base, **options), base


@SAM2
def test_exported_graphs_equal_torch_stage_by_stage_and_through_the_pipeline(home, capsys, monkeypatch):  # noqa: F811
    base_name, folder = home
    name = f"{base_name}+glesam++"
    assert main(["export", name, "--size", str(SIDE)]) == 0
    table = capsys.readouterr().out
    for output in ("latent", "high0", "high1", "level", "restored latent", "logits", "scores", "masks, 1 - IoU"):
        assert output in table
    manifest = json.loads((folder / name / "onnx" / "export.json").read_text())
    assert manifest["levels"] and manifest["enhances"] and manifest["side"] == SIDE and manifest["opset"] == 18
    graphs = {f"{part}.onnx" for part in ("encoder", "enhancer", "level", "decoder_one", "decoder_three")}
    assert graphs <= set(manifest["files"])

    runtime, base = opened(name)
    exported = Pipeline(GlesamModel(name, runtime, base, True), Settings(model=name, **EASY))
    native = Pipeline(load_glesam(name, "cpu"), Settings(model=name, **EASY))
    image = picture()
    assert exported.model.own_size == SIDE
    for prompts in ({}, {"points": [[40, 50]]}, {"boxes": [[10, 10, 60, 60], [5, 40, 90, 90]], "points": [[20, 20]]}):
        ours, theirs = native.segment(image, **prompts), exported.segment(image, **prompts)
        assert theirs.enhanced and theirs.degradation == pytest.approx(ours.degradation, abs=1e-4)
        assert len(ours) == len(theirs) and np.allclose(ours.scores, theirs.scores, atol=1e-4)
        assert (ours.masks != theirs.masks).mean() < 1e-3
    exported.close()

    # device:=tensorrt, as far as it goes without TensorRT: the base needs no file and no memory
    monkeypatch.setattr(onnx_runtime, "choose_device", lambda device: "cpu")
    (folder / catalogue.BASES[base_name].source.path).unlink()
    onboard = load_glesam(name, "tensorrt", "fp32")
    assert onboard.own_size == SIDE and {p.device.type for p in onboard._base.parameters()} == {"meta"}
    onboard.close()

    # what is on disk changed
    graph = folder / name / "onnx" / "level.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="level.onnx: is not what was exported; make it again: glesam export"):
        opened(name)
    graph.unlink()
    with pytest.raises(FileNotFoundError, match=r"level.onnx, found no file; make it again: glesam export"):
        opened(name)


@SAM
def test_large_weights_lie_beside_the_graph_and_prompts_come_in_batches(
    home, tmp_path, monkeypatch, caplog,  # noqa: F811
):
    name, folder = home
    base, _ = load_parts(name, folder)
    out = tmp_path / "graphs"
    manifest = onnx_export.export_model(name, base, None, out, SIDE, external_from=0)
    assert not manifest.enhances and len([file for file in manifest.files if file.endswith(".data")]) == 3
    assert (out / "encoder.onnx").stat().st_size < sum(p.numel() for p in base.net.image_encoder.parameters())
    runtime, _ = opened(name, folder=out)
    features = runtime.encode(picture(), SIDE)
    for _ in range(2):
        assert runtime.encode(picture(), 2 * SIDE).latent.shape == features.latent.shape
    assert caplog.text.count("processing size of 512 is not taken") == 1
    assert runtime.level(features) is None and runtime.enhance(features, 0.5) is features
    rng = np.random.default_rng(0)
    points, labels = rng.uniform(0, SIDE, (7, 2, 2)).astype(np.float32), np.ones((7, 2), np.float32)
    with torch.no_grad():
        expected = base.decode(base.encode(base.pixels(torch.from_numpy(picture())[None], SIDE)),
                               torch.from_numpy(points), torch.from_numpy(labels), True)
    monkeypatch.setattr(onnx_runtime, "MOST_PROMPTS", 3)
    found = runtime.decode(features, points, labels, True)
    for ours, theirs in zip(expected, found):
        assert torch.allclose(ours, theirs, atol=1e-3)
    with pytest.raises(ValueError, match=r"at most 16 points each on cpu \(.*\), .*, got 17; give fewer"):
        runtime.decode(features, np.zeros((1, 17, 2), np.float32), np.ones((1, 17), np.float32), False)

    def lacking(*_):
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setitem(runtime._sessions, "encoder", type("Session", (), {"run": lacking})())
    with pytest.raises(OutOfMemory, match="encoder: BFCArena"):
        runtime.encode(picture(), SIDE)
    with pytest.raises(ValueError, match="expected graphs of sam_vit_l, got those of sam_vit_b"):
        onnx_export.read_manifest(out, "sam_vit_l")


@SAM
def test_engines_of_other_weights_are_neither_found_nor_left(home, tmp_path, monkeypatch):  # noqa: F811
    """onnxruntime names TensorRT's engines by the layout of a graph, which training again does not change."""
    name, folder = home
    base, _ = load_parts(name, folder)
    monkeypatch.setattr(onnx_export, "_write", lambda path, module, *_: path.write_bytes(
        module.state_dict()["base.mask_decoder.iou_token.weight"].numpy().tobytes()
    ))
    caches = []
    session = type("Session", (), {"get_outputs": lambda _: [], "get_providers": lambda _: ["a test"]})
    monkeypatch.setattr(onnx_runtime, "open_session", lambda *args, **_: (caches.append(args[3]), session())[1])

    def engines():
        opened(name, folder=tmp_path)
        assert len(set(caches[-3:])) == 1
        caches[-1].mkdir(parents=True, exist_ok=True)
        return caches[-1]

    (tmp_path / "tensorrt" / "of the user").mkdir(parents=True)
    onnx_export.export_model(name, base, None, tmp_path, SIDE)
    first = engines()
    assert engines() == first and (tmp_path / "tensorrt" / "of the user").is_dir()
    (tmp_path / "level.onnx").touch()  # of an export with an enhancer
    with torch.no_grad():
        base.mask_decoder.iou_token.weight.mul_(2)
    manifest = onnx_export.export_model(name, base, None, tmp_path, SIDE)
    assert set(manifest.files) == {f"{part}.onnx" for part in ("encoder", "decoder_one", "decoder_three")}
    assert set(manifest.files) == {path.name for path in tmp_path.glob("*.onnx")}
    assert not first.exists() and engines() != first


@SAM
def test_what_cannot_be_exported_or_opened_says_why(home, tmp_path, capsys):  # noqa: F811
    name, folder = home
    for arguments, words in (
        (["nano"], "nano needs none: its graphs ship"),
        (["sam_vit_x"], "expected one of sam_vit_b"),
        ([name, "--size", "100"], "expected a multiple of 128, got 100"),
        ([name, "--images", str(tmp_path / "none.jpg")], "none.jpg"),
        (["sam_vit_l"], "glesam models get sam_vit_l"),
        (["facebook/sam-vit-large"], "glesam models get sam_vit_l"),
        (["facebook/sam3"], "got 'facebook/sam3'"),
    ):
        assert main(["export", *arguments]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=f"make them: glesam export {name}"):
        opened(name)
