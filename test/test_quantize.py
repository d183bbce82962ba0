"""8-bit graphs: exact where they can be, near where not, never over 16 bits; weights stored once and put together."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="export needs onnx; scripts/test.sh installs it")

import onnxruntime as ort  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from glesam_ros.training import quantize, storage  # noqa: E402
from glesam_ros.training.graphs import attribute, constants  # noqa: E402

RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (1, 16, 24, 3), np.uint8) for _ in range(3)]


def small_network() -> onnx.ModelProto:
    """An image to a stem, ReLU6, a depthwise convolution and a projection, as nano's encoder begins."""
    tensors = {
        "mean": np.float32(127), "range": np.float32(128), "low": np.float32(0), "high": np.float32(6),
        "w0": RNG.standard_normal((8, 3, 3, 3)) * 0.4, "b0": RNG.standard_normal(8) * 0.2,
        "w1": RNG.standard_normal((8, 1, 3, 3)) * 0.4, "b1": RNG.standard_normal(8) * 0.2,
        "w2": RNG.standard_normal((6, 8, 1, 1)) * 0.4, "b2": RNG.standard_normal(6) * 0.2,
    }
    nodes = [
        helper.make_node("Transpose", ["image"], ["nchw"], "t", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["float"], "c", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"], "s"),
        helper.make_node("Div", ["centred", "range"], ["normal"], "d"),
        helper.make_node("Conv", ["normal", "w0", "b0"], ["y0"], "stem", strides=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("Clip", ["y0", "low", "high"], ["z0"], "clip0"),
        helper.make_node("Conv", ["z0", "w1", "b1"], ["y1"], "depthwise", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["y1", "low", "high"], ["z1"], "clip1"),
        helper.make_node("Conv", ["z1", "w2", "b2"], ["y"], "project"),
    ]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, "h", "w", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, "h2", "w2"])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return small_network()


@pytest.fixture(scope="module")
def in_8_bits(network) -> onnx.ModelProto:
    return quantize.quantize(network, [{"image": picture} for picture in PICTURES])


def run(model: onnx.ModelProto | Path, image: np.ndarray) -> np.ndarray:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]


def pair_sums(q: np.ndarray) -> np.ndarray:
    """Sums of neighbours in the order in which a CPU multiplies: kernel row, column, channel."""
    rows = q.transpose(0, 2, 3, 1).reshape(len(q), -1).astype(int)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return rows[:, ::2] + rows[:, 1::2]


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (16, 24, 1, 1), (4, 7, 5, 5)])
def test_two_neighbours_never_overflow_16_bits(shape: tuple[int, ...]) -> None:
    weight = RNG.standard_t(3, shape).astype(np.float32)
    scales = quantize.channel_scales(weight)
    q = np.rint(weight / scales[:, None, None, None])
    assert np.abs(q).max() <= 127
    assert 255 * pair_sums(q).max() <= 32767 and 255 * pair_sums(q).min() >= -32768
    # and no coarser than that asks for: each channel uses a weight of 127, or a pair near it
    assert (np.maximum(np.abs(q).max((1, 2, 3)), np.abs(pair_sums(q)).max(1)) >= 126).all()


def test_depthwise_weights_use_all_8_bits_and_a_channel_of_zeros_is_no_fault() -> None:
    weight = np.full((2, 1, 3, 3), 0.5, np.float32)
    weight[1] = 0
    assert quantize.channel_scales(weight) == pytest.approx([0.5 / 127, 1])


def test_the_8_bit_graph_is_near_and_its_weights_are_what_the_scales_say(network, in_8_bits) -> None:
    picture = RNG.integers(0, 256, (1, 32, 16, 3), np.uint8)
    expected, got = run(network, picture), run(in_8_bits, picture)
    assert got.shape == expected.shape
    assert np.sqrt(np.square(got - expected).mean()) < 0.03 * np.sqrt(np.square(expected).mean())
    plain, small = constants(network), constants(in_8_bits)
    for name in ("w0", "w1", "w2"):
        scales = quantize.channel_scales(plain[name])
        assert small[name + "_quantized"].dtype == np.int8
        assert np.array_equal(small[name + "_scale"], scales)
        assert np.array_equal(small[name + "_quantized"], np.rint(plain[name] / scales[:, None, None, None]))


def test_the_first_convolution_reads_the_bytes_of_the_image(in_8_bits) -> None:
    kinds = [node.op_type for node in in_8_bits.graph.node]
    assert not {"Cast", "Sub", "Div", "Clip"} & set(kinds)
    values = constants(in_8_bits)
    makers = {output: node for node in in_8_bits.graph.node for output in node.output}
    stem = next(node for node in in_8_bits.graph.node if node.op_type == "Conv")
    first = makers[stem.input[0]]
    assert first.op_type == "DequantizeLinear" and makers[first.input[0]].op_type == "Transpose"
    assert values[first.input[1]] == np.float32(1 / 128) and values[first.input[2]] == 127


def test_what_else_reads_the_image_gets_its_numbers(network, in_8_bits) -> None:
    model = copy.deepcopy(network)
    model.graph.node.append(helper.make_node("ReduceMax", ["float"], ["brightest"], "m", axes=[2, 3], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("brightest", TensorProto.FLOAT, [1, 3]))
    small = quantize.quantize(model, [{"image": picture} for picture in PICTURES])
    assert [node.op_type for node in small.graph.node if node.op_type in ("Cast", "Sub", "Div")] == ["Cast"]
    session = ort.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    y, brightest = session.run(None, {"image": PICTURES[0]})
    assert np.array_equal(brightest[0], PICTURES[0].max((0, 1, 2)))
    assert np.array_equal(y, run(in_8_bits, PICTURES[0]))


def test_kept_convolutions_stay_fp32(network) -> None:
    small = quantize.quantize(network, [{"image": PICTURES[0]}], keep=("project",))
    assert "w2" in constants(small) and "w2_quantized" not in constants(small)
    assert "w1_quantized" in constants(small)


def test_corrected_biases_take_out_the_mean_error_of_rounded_weights() -> None:
    model = small_network()
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and not attribute(node, "pads", None)]
    scales = {"w2": np.full(6, 0.2, np.float32)}  # coarse, so that the error is large
    feeds = [{"image": picture} for picture in PICTURES]

    def mean_error(corrected: bool) -> np.ndarray:
        changed = small_network()
        changed.CopyFrom(model)
        if corrected:
            quantize.correct_biases(changed, [changed.graph.node[-1]], scales, feeds)
        for tensor in changed.graph.initializer:
            if tensor.name == "w2":
                coarse = quantize.rounded(numpy_helper.to_array(tensor), scales["w2"]).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(coarse, "w2"))
        return np.mean([(run(changed, p) - run(model, p)).mean((0, 2, 3)) for p in PICTURES], axis=0)

    assert len(convolutions) == 1
    assert np.abs(mean_error(False)).max() > 0.02
    assert np.abs(mean_error(True)).max() < 1e-5


def test_corrected_biases_of_groups_are_those_of_their_own_channels() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 2, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w", "b"], ["y"], "groups", group=2)], "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, "h", "w"])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(6, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    pictures = [(rng.random((1, 4, 5, 7)) + np.arange(4).reshape(4, 1, 1)).astype(np.float32) for _ in range(3)]
    scales = np.full(6, 0.3, np.float32)
    changed = copy.deepcopy(model)
    quantize.correct_biases(changed, [changed.graph.node[0]], {"w": scales}, [{"image": x} for x in pictures])
    changed.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(quantize.rounded(weight, scales).astype(np.float32), "w")
    )
    assert np.abs(constants(changed)["b"]).max() > 0.1
    error = np.mean([(run(changed, x) - run(model, x)).mean((0, 2, 3)) for x in pictures], axis=0)
    assert np.abs(error).max() < 1e-5


def test_a_graph_without_biases_becomes_8_bit_too() -> None:
    model = small_network()
    for node in model.graph.node:
        if node.op_type == "Conv":
            del node.input[2]
    small = quantize.quantize(model, [{"image": picture} for picture in PICTURES])
    assert {"w0_quantized", "w1_quantized", "w2_quantized"} <= set(constants(small))
    expected, got = run(model, PICTURES[0]), run(small, PICTURES[0])
    assert np.sqrt(np.square(got - expected).mean()) < 0.1 * np.sqrt(np.square(expected).mean())


def test_sums_are_8_bit_too_and_a_convolution_without_bias_is_no_fault() -> None:
    model = small_network()
    del model.graph.node[-1].input[2]
    model.graph.node[-1].output[0] = "projected"
    model.graph.node.extend([
        helper.make_node("Conv", ["z0", "w2", "b2"], ["beside"], "beside"),
        helper.make_node("Add", ["projected", "beside"], ["y"], "add"),
    ])
    small = quantize.quantize(model, [{"image": picture} for picture in PICTURES])
    makers = {output: node for node in small.graph.node for output in node.output}
    add = next(node for node in small.graph.node if node.op_type == "Add")
    assert [makers[name].op_type for name in add.input] == ["DequantizeLinear"] * 2
    assert [node.op_type for node in small.graph.node if add.output[0] in node.input] == ["QuantizeLinear"]
    expected, got = run(model, PICTURES[0]), run(small, PICTURES[0])
    assert np.sqrt(np.square(got - expected).mean()) < 0.05 * np.sqrt(np.square(expected).mean())


def test_stored_weights_come_back_to_a_64000th_and_equal_ones_are_stored_once(network, in_8_bits, tmp_path) -> None:
    split, small = onnx.ModelProto(), onnx.ModelProto()
    split.CopyFrom(network)
    small.CopyFrom(in_8_bits)
    wide = RNG.standard_normal((64, 8, 3, 3)).astype(np.float32)
    first = np.rint(wide / quantize.channel_scales(wide)[:, None, None, None]).astype(np.int8)
    split.graph.initializer.append(numpy_helper.from_array(wide, "large"))
    small.graph.initializer.append(numpy_helper.from_array(first, "large_quantized"))
    split.graph.node.append(helper.make_node("Conv", ["y0", "large"], ["unused"], "large"))
    storage.split_convolutions(split)
    storage.save({"a.onnx": split, "b.onnx": small}, tmp_path, "weights.bin")
    # both bytes of the large weight; the 8-bit model adds nothing
    assert (tmp_path / "weights.bin").stat().st_size == 2 * wide.size
    assert np.allclose(run(tmp_path / "a.onnx", PICTURES[0]), run(network, PICTURES[0]), atol=2e-4)
    joined = {node.output[0] for node in split.graph.node if node.name.endswith("_joined")}
    assert joined == {"w0", "w1", "w2", "large"}
    parts = constants(onnx.load(tmp_path / "a.onnx"))
    again = (parts["large_quantized"] + parts["large_rest"] / 254.0) * parts["large_steps"]
    channel = np.abs(wide).max((1, 2, 3), keepdims=True)
    assert np.abs(again - wide).max() > 0 and (np.abs(again - wide) <= 2 * channel / 64_000).all()


def test_half_stored_weights_leave_numbers_of_channels_alone() -> None:
    tensors = {"w": RNG.standard_normal((300, 2)), "s": np.full(300, 0.1), "steps": np.full((300, 1), 0.1)}
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["q", "s", "z8"], ["d"], axis=0),
         helper.make_node("Mul", ["w", "steps"], ["scaled"]), helper.make_node("MatMul", ["d", "scaled"], ["y"])],
        "graph", [helper.make_tensor_value_info("q", TensorProto.INT8, [300, 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensors["w"].astype(np.float32), "w"),
         numpy_helper.from_array(tensors["s"].astype(np.float32), "s"),
         numpy_helper.from_array(tensors["steps"].astype(np.float32), "steps"),
         numpy_helper.from_array(np.zeros(300, np.int8), "z8")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    storage.store_half(model)
    values = constants(model)
    assert values["w_half"].dtype == np.float16 and "w" not in values
    assert values["s"].dtype == values["steps"].dtype == np.float32


def test_features_handed_on_in_8_bits_are_rounded_once() -> None:
    whole = small_network()
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    cut = "y0"
    for model in (whole, first, second):
        # what is handed on is signed, as the bottlenecks of nano's stem
        model.graph.node.remove(next(node for node in model.graph.node if node.name == "clip0"))
        next(node for node in model.graph.node if node.name == "depthwise").input[0] = cut
    del first.graph.node[5:], second.graph.node[:5]
    first.graph.output[0].CopyFrom(helper.make_tensor_value_info(cut, TensorProto.FLOAT, [1, 8, "h2", "w2"]))
    second.graph.input[0].CopyFrom(helper.make_tensor_value_info(cut, TensorProto.FLOAT, [1, 8, "h2", "w2"]))
    feeds = [{"image": picture} for picture in PICTURES]
    passed = [{cut: run(first, picture)} for picture in PICTURES]
    small_first = quantize.quantize(first, feeds)
    grids = quantize.hand_out_bytes(small_first, [cut])
    small_second = quantize.quantize(second, passed, given=grids)
    assert small_first.graph.node[-1].op_type == "QuantizeLinear"
    middle = run(small_first, PICTURES[0])
    scale, zero = grids[cut]
    assert middle.dtype == np.uint8 and zero > 0
    exact = run(first, PICTURES[0])
    assert np.abs((middle - float(zero)) * scale - exact).max() < 0.05 * np.abs(exact).max()
    session = ort.InferenceSession(small_second.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {cut: middle})
    expected = run(whole, PICTURES[0])
    assert np.sqrt(np.square(found - expected).mean()) < 0.03 * np.sqrt(np.square(expected).mean())
    # on the border nothing is rounded again
    assert [n.op_type for n in small_second.graph.node if cut in n.input] == ["DequantizeLinear"]


def test_what_is_handed_out_in_8_bits_may_be_read_inside_too(network) -> None:
    model = small_network()
    model.graph.output.append(helper.make_tensor_value_info("y0", TensorProto.FLOAT, [1, 8, "h2", "w2"]))
    small = quantize.quantize(model, [{"image": picture} for picture in PICTURES])
    before = run(small, PICTURES[0])
    quantize.hand_out_bytes(small, ["y0"])
    assert small.graph.output[1].type.tensor_type.elem_type == TensorProto.UINT8
    np.testing.assert_allclose(run(small, PICTURES[0]), before, atol=1e-6)
