"""rass-nano by onnxruntime: a tiny graph whose classes are colours, sizes, faults of its files, memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the tiny graph needs onnx; scripts/test.sh installs it")

from onnx import TensorProto, helper  # noqa: E402

from glesam_ros import load_semantic  # noqa: E402
from glesam_ros.models import OutOfMemory, rass_nano  # noqa: E402
from glesam_ros.models.rass_nano import RassNano  # noqa: E402
from glesam_ros.semantic import SemanticSegmenter  # noqa: E402

COLOURS = {"grass": (40, 160, 40), "sky": (90, 150, 250), "brick": (180, 60, 50), "snow": (240, 240, 240)}


def card(**changed: Any) -> dict[str, Any]:
    """What `rass_nano.json` holds; a value of None takes its key away."""
    fields: dict[str, Any] = {
        "classes": list(COLOURS), "palette": [list(c) for c in COLOURS.values()], "licence": "none", "long_side": 640,
    }
    return {key: value for key, value in {**fields, **changed}.items() if value is not None}


def expected_logits(average: np.ndarray) -> np.ndarray:
    """(h, w, 3) averaged colours in 0..255 -> (K, h, w): minus half the squared distance to each colour, and what all
    of them share."""
    colours = np.array(list(COLOURS.values()), np.float64) / 255
    return np.moveaxis(average / 255 @ colours.T - (colours**2).sum(1) / 2, 2, 0)


def graph(**changed: Any) -> Any:
    """`expected_logits` as a graph.

    Args:
        **changed: `input` and `output` name them, `dtype` is of the input, `count` is how many classes, `extra` are
            nodes between pixels "image" and floats "float".
    """
    name, out = changed.get("input", "image"), changed.get("output", "logits")
    count = changed.get("count", len(COLOURS))
    colours = np.resize(np.array(list(COLOURS.values()), np.float64) / 255, (count, 3))
    weight = (colours / 255).astype(np.float32).reshape(count, 3, 1, 1)
    bias = (-(colours**2).sum(1) / 2).astype(np.float32)
    nodes = changed.get("extra") or [helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT)]
    nodes = [
        *nodes,
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["average"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["average", "weight", "bias"], [out]),
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, changed.get("dtype", TensorProto.UINT8), [1, "H", "W", 3])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [1, count, "h", "w"])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def declared(picture: Any = (1, "H", "W", 3), shape: Any = (1, "K", "h", "w"), extra: bool = False) -> Any:
    """A graph of these shapes, whose logits are the picture cast and reshaped to them, or the first K of its numbers.

    Args:
        extra: another output comes before the logits.
    """
    size = [1, -1, *([1] * (len(shape) - 2))]  # nothing tells how many there are before a picture comes
    constants = {"flat": [-1], "start": [0], "end": [len(COLOURS)], "size": size}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["numbers"]),
        helper.make_node("Slice", ["numbers", "start", "end"], ["few"]),
        helper.make_node("Reshape", ["few", "size"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]
    if extra:
        outputs.insert(0, helper.make_tensor_value_info("few", TensorProto.FLOAT, ["n"]))
    made = helper.make_graph(
        nodes, "declared", [helper.make_tensor_value_info("image", TensorProto.UINT8, picture)], outputs,
        [onnx.numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(folder: Path, graph_changed: dict[str, Any] | None = None, **card_changed: Any) -> Path:
    """Both files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph(**(graph_changed or {})), folder / "rass_nano.onnx")
    (folder / "rass_nano.json").write_text(json.dumps(card(**card_changed)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> Path:
    return write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def segmenter(weights: Path) -> SemanticSegmenter:
    return SemanticSegmenter(RassNano("cpu", weights=weights))


def bilinear(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolation between centres of cells, held beyond the outermost; by another way than OpenCV's."""
    rows, cols = ((np.arange(to) + 0.5) * have / to - 0.5 for to, have in zip(size, plane.shape))
    across = np.array([np.interp(cols, np.arange(plane.shape[1]), row) for row in plane])
    return np.array([np.interp(rows, np.arange(plane.shape[0]), column) for column in across.T]).T


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


# --- what it computes ---


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (47, 201), (480, 640), (719, 1281), (2000, 3)])
@pytest.mark.parametrize("index", range(len(COLOURS)))
def test_one_colour_is_its_class_everywhere_at_any_size(
    segmenter: SemanticSegmenter, size: tuple[int, int], index: int
) -> None:
    colour = list(COLOURS.values())[index]
    found = segmenter.segment(np.full((*size, 3), colour, np.uint8))
    assert found.size == size and found.classes == tuple(COLOURS)
    assert (found.labels == index).all()
    sure = softmax(expected_logits(np.array([[colour]], np.float64)))[index, 0, 0]
    np.testing.assert_allclose(found.confidence, sure, atol=1e-5)


@pytest.mark.parametrize("size", [(101, 203), (333, 517), (480, 640), (900, 1201)])
def test_borders_between_classes_are_where_the_colours_change(
    segmenter: SemanticSegmenter, size: tuple[int, int]
) -> None:
    height, width = size
    truth = np.zeros(size, np.uint8)
    truth[: height // 2, width // 3 :] = 1
    truth[height // 2 :, width // 4 :] = 2
    truth[height // 2 :, width // 2 :] = 3
    image = np.array(list(COLOURS.values()), np.uint8)[truth]
    found = segmenter.segment(image)
    # a cell of the logits is 4 pixels of the picture inside, between whose borders its neighbours mix
    reach = 2 * int(np.ceil(8 * max(1.0, max(size) / 640))) + 1
    window = np.ones((reach, reach), np.uint8)
    plain = cv2.dilate(truth, window) == cv2.erode(truth, window)
    assert plain.mean() > 0.5
    np.testing.assert_array_equal(found.labels[plain], truth[plain])


@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
def test_confidence_is_the_softmax_of_interpolated_logits(
    segmenter: SemanticSegmenter, size: tuple[int, int]
) -> None:
    height, width = size
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = segmenter.segment(image)
    average = image.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))
    full = softmax(np.array([bilinear(plane, size) for plane in expected_logits(average)]))
    ordered = np.sort(full, 0)
    clear = ordered[-1] - ordered[-2] > 1e-4
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(found.labels[clear], full.argmax(0)[clear])
    np.testing.assert_allclose(found.confidence, full.max(0), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "inside"),
    [
        ((480, 640), (480, 640)), ((1080, 1920), (352, 640)), ((1280, 720), (640, 352)), ((100, 100), (96, 96)),
        ((33, 50), (32, 64)), ((1, 1), (32, 32)), ((3, 4000), (32, 640)), ((641, 481), (640, 480)),
    ],
)
def test_size_inside(weights: Path, size: tuple[int, int], inside: tuple[int, int]) -> None:
    model = RassNano("cpu", weights=weights)
    assert model.logits(np.zeros((*size, 3), np.uint8)).shape == (len(COLOURS), inside[0] // 4, inside[1] // 4)


def test_the_long_side_is_that_of_the_card(tmp_path: Path) -> None:
    model = RassNano("cpu", weights=write(tmp_path, long_side=320))
    assert model.logits(np.zeros((512, 640, 3), np.uint8)).shape[1:] == (64, 80)
    assert model.logits(np.zeros((64, 96, 3), np.uint8)).shape[1:] == (16, 24)


def test_views_and_read_only_pictures_are_taken_and_left_alone(segmenter: SemanticSegmenter) -> None:
    whole = np.random.default_rng(5).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    mirrored = whole[:, ::-1]
    mirrored.setflags(write=False)
    before = whole.copy()
    found = segmenter.segment(mirrored)
    np.testing.assert_array_equal(whole, before)
    np.testing.assert_array_equal(found.labels, segmenter.segment(mirrored.copy()).labels)
    assert (found.labels != segmenter.segment(whole).labels).any()


def test_by_name(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rass_nano, "WEIGHTS", weights)
    with load_semantic("rass-nano", device="cpu") as segmenter:
        assert segmenter.name == "rass-nano" and segmenter.classes == tuple(COLOURS)
        assert segmenter.device.startswith("cpu (fp32, onnxruntime, CPUExecutionProvider")
        assert segmenter.palette.tolist() == [list(colour) for colour in COLOURS.values()]
        assert segmenter.segment(np.zeros((48, 64, 3), np.uint8)).size == (48, 64)
    assert RassNano("cpu", "fp32").licence == "none"


def test_a_folder_takes_the_place_of_the_name(weights: Path, tmp_path: Path) -> None:
    with load_semantic(str(weights), device="cpu") as segmenter:
        assert segmenter.name == "rass-nano" and segmenter.classes == tuple(COLOURS)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'rass_nano.json'}"):
        load_semantic(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="semantic: expected one of .*got '.*nowhere'"):
        load_semantic(str(tmp_path / "nowhere"), device="cpu")


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "behind another output"])
def test_logits_are_found_by_name_and_their_count_may_be_open(tmp_path: Path, extra: bool) -> None:
    """A graph may leave its sizes open: then the first picture tells. The brightest value of a colour is 255."""
    write(tmp_path, palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    onnx.save(declared(extra=extra), tmp_path / "rass_nano.onnx")
    model = RassNano("cpu", weights=tmp_path)
    assert model.logits(np.full((32, 32, 3), 7, np.uint8)).tolist() == [[[7.0]]] * 4
    assert model.palette.max() == 255


def test_threads_and_licence_are_passed_on(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model = RassNano("cpu", weights=weights, threads=1)
    assert model._session.get_session_options().intra_op_num_threads == 1
    assert "licence of its weights: none" in caplog.text


# --- what ships ---


def test_shipped_weights_fit_the_promised_size() -> None:
    files = sorted(rass_nano.WEIGHTS.glob("rass_nano*"))
    assert [file.name for file in files] == ["rass_nano.json", "rass_nano.onnx"]
    assert sum(file.stat().st_size for file in files) <= 25_000_000


def test_shipped_weights_tell_houses_from_the_sky() -> None:
    """A rendered street: two houses with windows, a bright sky between and above them."""
    image = np.empty((360, 480, 3), np.uint8)
    image[:160], image[160:] = (205, 210, 220), (95, 95, 100)
    cv2.rectangle(image, (0, 60), (150, 170), (120, 80, 60), -1)
    cv2.rectangle(image, (330, 40), (480, 170), (140, 110, 90), -1)
    for x in (*range(10, 140, 30), *range(340, 470, 30)):
        for y in (80, 120):
            cv2.rectangle(image, (x, y), (x + 14, y + 22), (40, 40, 50), -1)
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    image = np.clip(cv2.GaussianBlur(image, (0, 0), 1) + noise, 0, 255).astype(np.uint8)
    with load_semantic(device="cpu") as segmenter:
        for size in ((480, 360), (640, 480)):
            found = segmenter.segment(cv2.resize(image, size))
            width, height = size
            sky = found.labels[: int(0.3 * height), int(0.4 * width) : int(0.6 * width)]
            house = found.labels[int(0.2 * height) : int(0.45 * height), : int(0.28 * width)]
            assert (sky == found.classes.index("sky")).mean() > 0.9
            assert (house == found.classes.index("building")).mean() > 0.8
    assert "CC BY-NC" in RassNano("cpu").licence  # CamVid's


# --- faults ---


@pytest.mark.parametrize("missing", ["rass_nano.onnx", "rass_nano.json"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / missing}.*reinstall the package"):
        RassNano("cpu", weights=tmp_path)


@pytest.mark.parametrize("content", [b"", b"no graph at all", None])
def test_a_damaged_graph_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = write(tmp_path) / "rass_nano.onnx"
    file.write_bytes(file.read_bytes()[:-50] if content is None else content)
    with pytest.raises(ValueError, match=f"{file}: expected an ONNX graph, onnxruntime cannot open it.*reinstall"):
        RassNano("cpu", weights=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON.*reinstall the package"),
        ("[1]", "expected a JSON object, got list"),
        (json.dumps(card(classes=None)), "classes: expected list, got None"),
        (json.dumps(card(long_side="640")), "long_side: expected int, got '640'; reinstall"),
        (json.dumps(card(long_side=650)), "long_side: expected a multiple of 32, got 650"),
        (json.dumps(card(long_side=0)), "long_side: expected a multiple of 32, got 0"),
        (json.dumps(card(palette=[[1, 2, 3]])), r"palette: expected \(4, 3\) uint8 RGB.*got \(1, 3\)"),
        (json.dumps(card(palette=[[1, 2, 3]] * 3 + [[1, 2, 256]])), r"whole numbers in 0..255, got \[1, 2, 256\]"),
        (json.dumps(card(palette=[[1, 2, 3]] * 3 + [[1, 2, 3.5]])), r"whole numbers in 0..255, got \[1, 2, 3.5\]"),
        (json.dumps(card(palette=[[1, 2]] * 4)), r"expected \[r, g, b\].*got \[1, 2\]"),
        (json.dumps(card(classes=["a", "b", "a", "c"])), "classes: expected each name once, got a again"),
        (json.dumps(card(classes=["a", "b", 3, "c"])), "classes: expected names"),
    ],
)
def test_a_card_that_does_not_fit_is_named(tmp_path: Path, content: str, words: str) -> None:
    file = write(tmp_path) / "rass_nano.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file}: .*{words}"):
        RassNano("cpu", weights=tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"count": 3}, r"expected logits \(1, 4, h, w\) for the 4 classes of rass_nano.json beside it, got \[1, 3"),
        ({"input": "picture"}, r"expected the input image \(1, H, W, 3\) uint8, got picture"),
        ({"dtype": TensorProto.FLOAT}, r"expected the input image \(1, H, W, 3\) uint8, got image .*tensor\(float\)"),
        ({"output": "scores"}, "expected the output logits, got scores"),
        ({"picture": [1, "H", "W"]}, r"expected the input image \(1, H, W, 3\) uint8, got image \[1, 'H', 'W'\]"),
        ({"shape": [1, 4, "h"]}, r"expected logits \(1, 4, h, w\) for .*, got \[1, 4, 1\]"),
    ],
)
def test_a_graph_that_does_not_fit_is_named(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    folder = write(tmp_path, changed)
    if changed.keys() & {"picture", "shape"}:
        onnx.save(declared(**changed), folder / "rass_nano.onnx")
    with pytest.raises(ValueError, match=f"{folder / 'rass_nano.onnx'}: {words}"):
        RassNano("cpu", weights=folder)


@pytest.mark.parametrize(
    ("device", "precision", "words"),
    [
        ("gpu", "auto", "device: expected auto, tensorrt, cuda, cpu; got 'gpu'"),
        ("cpu", "int8", "precision: expected auto, fp32 or fp16 .* for rass-nano, got 'int8'"),
        ("cpu", "fp16", "precision: fp16 needs device tensorrt, got cpu"),
    ],
)
def test_what_the_device_does_not_have_is_refused(weights: Path, device: str, precision: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RassNano(device, precision, weights)


def test_lack_of_memory_is_our_error_and_the_model_lives_on(tmp_path: Path) -> None:
    """A bright corner asks for 4 TB."""
    made = graph(
        extra=[
            helper.make_node("Cast", ["image"], ["plain"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["plain"], ["top"], keepdims=0),
            helper.make_node("Greater", ["top", "limit"], ["bright"]),
            helper.make_node("Where", ["bright", "huge", "one"], ["side"]),
            helper.make_node("Expand", ["zero", "side"], ["wide"]),
            helper.make_node("ReduceMax", ["wide"], ["nothing"], keepdims=0),
            helper.make_node("Add", ["plain", "nothing"], ["float"]),
        ]
    )
    constants = {
        "limit": np.float32(200), "huge": np.array([2**20, 2**20], np.int64), "one": np.array([1, 1], np.int64),
        "zero": np.zeros((1, 1), np.float32),
    }
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), name) for name, v in constants.items())
    onnx.save(made, write(tmp_path) / "rass_nano.onnx")
    segmenter = SemanticSegmenter(RassNano("cpu", weights=tmp_path))
    image = np.full((32, 32, 3), COLOURS["brick"], np.uint8)
    with pytest.raises(OutOfMemory, match="Failed to allocate memory.*rass-nano on cpu.*free memory there"):
        segmenter.segment(np.full((32, 32, 3), 255, np.uint8))
    assert (segmenter.segment(image).labels == 2).all()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which only Linux has")
def test_memory_stays_flat(segmenter: SemanticSegmenter) -> None:
    image = np.random.default_rng(6).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    for _ in range(20):
        segmenter.segment(image)
    before = resident()
    for _ in range(100):
        segmenter.segment(image)
    # one map a call kept would be 38 MB
    assert resident() - before < 8_000_000
