"""Passes over ONNX graphs: what they fold, what they must leave, and that outputs stay."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="export needs onnx; scripts/test.sh installs it")

import onnxruntime as ort  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from glesam_ros.training import graphs  # noqa: E402

RNG = np.random.default_rng(2)


def model_of(nodes: list, shape: tuple, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from x to y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def padded_convolution(amount: list[int], value: float = 0.0, mode: str = "constant") -> onnx.ModelProto:
    return model_of(
        [
            helper.make_node("Pad", ["x", "amount", "value"], ["padded"], mode=mode),
            helper.make_node("Conv", ["padded", "w"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 0, 0]),
        ],
        (1, 2, 8, 10),
        amount=np.array(amount, np.int64), value=np.array(value, np.float32),
        w=RNG.standard_normal((4, 2, 3, 3)).astype(np.float32),
    )


def test_zero_padding_becomes_part_of_the_convolution_side_by_side() -> None:
    model = padded_convolution([0, 0, 1, 2, 0, 0, 3, 4])
    x = RNG.standard_normal((1, 2, 8, 10)).astype(np.float32)
    before = run(model, x)
    assert graphs.fold_pads(model) == 1 and kinds(model) == ["Conv"]
    assert graphs.attribute(model.graph.node[0], "pads", None) == [1, 3, 3, 4]
    after = run(model, x)
    assert after.shape == before.shape and np.allclose(after, before, atol=1e-6)


@pytest.mark.parametrize(
    ("amount", "value", "mode"),
    [([0, 0, 1, 1, 0, 0, 1, 1], 1.0, "constant"), ([0, 0, 1, 1, 0, 0, 1, 1], 0.0, "edge"),
     ([0, 1, 1, 1, 0, 0, 1, 1], 0.0, "constant")],
    ids=["not zero", "edge", "channels"],
)
def test_other_padding_stays(amount: list[int], value: float, mode: str) -> None:
    model = padded_convolution(amount, value, mode)
    assert graphs.fold_pads(model) == 0 and kinds(model) == ["Pad", "Conv"]


def test_padding_that_something_else_reads_stays() -> None:
    model = padded_convolution([0, 0, 1, 1, 0, 0, 1, 1])
    model.graph.node.append(helper.make_node("Relu", ["padded"], ["z"]))
    assert graphs.fold_pads(model) == 0


def test_unshuffle_before_a_1x1_convolution_becomes_a_strided_convolution(tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="the pattern is torch's; scripts/test.sh installs it")
    net = torch.nn.Sequential(torch.nn.PixelUnshuffle(2), torch.nn.Conv2d(12, 5, 1)).eval()
    x = torch.randn(1, 3, 8, 6)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), str(path), input_names=["x"], opset_version=17, dynamo=False,
                      dynamic_axes={"x": {2: "h", 3: "w"}})
    model = graphs.simplify(onnx.load(path))
    assert kinds(model) == ["Conv"]
    wider = torch.randn(1, 3, 12, 16)
    assert np.allclose(run(model, wider.numpy()), net(wider).detach().numpy(), atol=1e-5)


def test_means_over_positions_become_poolings_and_others_stay() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["a"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["x"], ["b"], axes=[1], keepdims=0),
        helper.make_node("ReduceMean", ["b"], ["c"], axes=[1, 2], keepdims=1),
        helper.make_node("ReduceMean", ["c"], ["d"], axes=[1], keepdims=0),
        helper.make_node("Add", ["a", "d"], ["y"]),
    ]
    model = model_of(nodes, (1, 3, 4, 5))
    x = RNG.standard_normal((1, 3, 4, 5)).astype(np.float32)
    before = run(model, x)
    assert graphs.pool_over_positions(model) == 1
    assert kinds(model) == ["GlobalAveragePool", "Flatten", "ReduceMean", "ReduceMean", "ReduceMean", "Add"]
    assert np.allclose(run(model, x), before, atol=1e-6)


def test_what_does_not_depend_on_the_input_is_computed_once() -> None:
    nodes = [
        helper.make_node("Concat", ["half", "half"], ["amount"], axis=0),
        helper.make_node("Pad", ["x", "amount", "zero"], ["padded"]),
        helper.make_node("Conv", ["padded", "w"], ["y"], kernel_shape=[3, 3]),
    ]
    model = model_of(nodes, (1, 2, 4, 4), half=np.array([0, 0, 1, 1], np.int64), zero=np.float32(0),
                     w=RNG.standard_normal((3, 2, 3, 3)).astype(np.float32))
    x = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
    simple = graphs.simplify(model)
    assert kinds(simple) == ["Conv"] and [o.domain for o in simple.opset_import] == [""]
    assert np.allclose(run(simple, x), run(model, x), atol=1e-6)


def test_short_names_leave_inputs_outputs_and_what_is_computed() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "/a/very/long/weight"], ["/a/very/long/product"], "/a/very/long/Mul"),
        # an empty name is an input that is left out, "v0" an output that must stay itself
        helper.make_node("Clip", ["/a/very/long/product", "", "v2"], ["v0"], "/a/very/long/Clip"),
        helper.make_node("Add", ["v0", "x"], ["y"], "/a/very/long/Add"),
    ]
    model = model_of(nodes, (1, 3), **{"/a/very/long/weight": np.float32([2, -1, 3]), "v2": np.float32(4)})
    model.graph.output.append(helper.make_tensor_value_info("v0", TensorProto.FLOAT, None))
    model.graph.value_info.append(helper.make_tensor_value_info("/a/very/long/product", TensorProto.FLOAT, [1, 3]))
    x = np.float32([[1, 2, 3]])
    before, size = run(model, x), model.ByteSize()
    graphs.shorten_names(model)
    np.testing.assert_array_equal(run(model, x), before)
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["x", "y", "v0"]
    assert model.graph.node[1].input[1] == "" and b"/a/very/long" not in model.SerializeToString()
    assert model.ByteSize() < size
