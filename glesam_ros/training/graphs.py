"""Passes over exported ONNX graphs: same outputs, less work on CPUs.

What lies between two convolutions costs twice: by itself, and because onnxruntime then leaves its blocked layout and
comes back to it. So what can be part of a convolution becomes part of it.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper, numpy_helper

UNSHUFFLE = ["Squeeze", "Reshape", "Transpose", "Reshape", "Reshape", "Unsqueeze"]
"""What torch 2 makes of `pixel_unshuffle`, last node first."""


@contextlib.contextmanager
def quiet_onnxruntime() -> Iterator[None]:
    """onnxruntime says errors alone: it warns of each constant that a pass left unused, with every session."""
    ort.set_default_logger_severity(3)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def simplify(model: ModelProto) -> ModelProto:
    """All passes; the result is checked.

    Args:
        model: with its weights, of one opset of the standard domain.

    Raises:
        onnx.checker.ValidationError: a pass left an invalid graph.
    """
    model = fold_constants(model)
    fold_pads(model)
    unshuffle_by_convolution(model)
    pool_over_positions(model)
    onnx.checker.check_model(model)
    return model


def fold_constants(model: ModelProto) -> ModelProto:
    """The graph with everything computed that does not depend on the input, by onnxruntime's basic optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        with quiet_onnxruntime():
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(options.optimized_model_filepath)
    # onnxruntime declares every domain that it knows; the checker then proves that the standard one is enough
    opsets = list(model.opset_import)
    del folded.opset_import[:]
    folded.opset_import.extend(opsets)
    return folded


def fold_pads(model: ModelProto) -> int:
    """Make zero padding of height and width part of the convolutions that it feeds; returns how many went."""
    weights = constants(model)
    gone = []
    for pad in model.graph.node:
        if pad.op_type != "Pad" or attribute(pad, "mode", b"constant") != b"constant":
            continue
        users = [node for node in model.graph.node if pad.output[0] in node.input]
        value = weights.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.float32(0)
        amount = weights.get(pad.input[1])
        if amount is None or value is None or value != 0 or len(amount) != 8 or amount[[0, 1, 4, 5]].any():
            continue
        if any(user.op_type != "Conv" or attribute(user, "auto_pad", b"NOTSET") != b"NOTSET" for user in users):
            continue
        for user in users:
            before = attribute(user, "pads", [0, 0, 0, 0])
            set_attribute(user, "pads", [int(a + b) for a, b in zip(before, amount[[2, 3, 6, 7]], strict=True)])
            user.input[0] = pad.input[0]
        gone.append(pad)
    for pad in gone:
        model.graph.node.remove(pad)
    return len(gone)


def unshuffle_by_convolution(model: ModelProto) -> int:
    """Pixel unshuffle by r and a 1x1 convolution are one convolution r x r of stride r; returns how many became so."""
    weights = constants(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    count = 0
    for conv in model.graph.node:
        if conv.op_type != "Conv" or list(attribute(conv, "kernel_shape", [])) != [1, 1]:
            continue
        chain: list[NodeProto] = []
        source = conv.input[0]
        while source in makers and len(chain) < len(UNSHUFFLE):
            chain.append(makers[source])
            source = chain[-1].input[0]
        if [node.op_type for node in chain] != UNSHUFFLE or attribute(conv, "group", 1) != 1:
            continue
        split = weights[chain[3].input[1]]
        outside, inside = weights[conv.input[1]].shape[:2]
        r = int(split[-1])
        kernel = weights[conv.input[1]].reshape(outside, inside // (r * r), r, r)
        replace_constant(model, conv.input[1], np.ascontiguousarray(kernel))
        conv.input[0] = source
        set_attribute(conv, "kernel_shape", [r, r])
        set_attribute(conv, "strides", [r, r])
        for node in chain:
            model.graph.node.remove(node)
        count += 1
    return count


def pool_over_positions(model: ModelProto) -> int:
    """Means over height and width that drop both become GlobalAveragePool, which knows the blocked layout."""
    count = 0
    for index, mean in enumerate(list(model.graph.node)):
        # attributes up to opset 17
        over_positions = mean.op_type == "ReduceMean" and sorted(attribute(mean, "axes", [])) == [2, 3]
        if not over_positions or attribute(mean, "keepdims", 1):
            continue
        pooled = mean.output[0] + "_pooled"
        model.graph.node.remove(mean)
        model.graph.node.insert(index + count, helper.make_node("GlobalAveragePool", [mean.input[0]], [pooled], pooled))
        flat = helper.make_node("Flatten", [pooled], [mean.output[0]], mean.output[0])
        model.graph.node.insert(index + count + 1, flat)
        count += 1
    return count


def shorten_names(model: ModelProto) -> None:
    """Number everything but inputs and outputs, in place: torch's names are half of a file whose weights lie elsewhere.

    The graph must have no sub-graphs. What is known of shapes inside goes, too; the runtime finds it again.
    """
    graph = model.graph
    names = {"": "", **{value.name: value.name for value in (*graph.input, *graph.output)}}
    free = (name for name in (f"v{k:x}" for k in itertools.count()) if name not in names)
    del graph.value_info[:]
    for tensor in graph.initializer:
        names.setdefault(tensor.name, next(free))
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.name = ""
        for values in (node.input, node.output):
            for k, name in enumerate(values):
                names.setdefault(name, next(free))
                values[k] = names[name]


def constants(model: ModelProto) -> dict[str, Any]:
    """Initialisers by name, as arrays."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def replace_constant(model: ModelProto, name: str, value: Any) -> None:
    """Give the initialiser `name` a new array."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value, name))


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute, `default` where the node has none."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set an attribute, whether the node has it or not."""
    for a in node.attribute:
        if a.name == name:
            node.attribute.remove(a)
            break
    node.attribute.append(helper.make_attribute(name, value))
