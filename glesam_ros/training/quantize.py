"""8-bit graphs for CPUs: static, activations uint8, weights int8 by output channel (QDQ, which onnxruntime fuses).

Two things beyond onnxruntime's quantiser. The weights are scaled so that no CPU overflows: without VNNI, a CPU adds
two neighbouring products uint8 * int8 into 16 bits. And each bias takes back what rounding the weights adds on average
(Nagel et al., Data-Free Quantization, ICCV 2019, sec. 4.2).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from glesam_ros.training.graphs import attribute, constants, replace_constant

QUANTIZED = ("Conv", "Clip", "Relu", "Add")
"""Operators that run in 8 bits; the others keep fp32."""
LARGEST = 127
"""Largest weight, and largest sum of two neighbours: 2 * 127 rounded up by half each is 128, times 255 below 2^15."""
Feeds = Sequence[dict[str, Any]]
Grids = dict[str, tuple[np.float32, np.uint8]]
"""Scale and zero point of activations by name."""


def quantize(model: ModelProto, feeds: Feeds, keep: Sequence[str] = (), given: Grids | None = None) -> ModelProto:
    """The 8-bit version of a simplified graph.

    Args:
        model: in fp32, see `glesam_ros.training.graphs.simplify`.
        feeds: calibration inputs, by input name; their largest and smallest activations become the ranges.
        keep: nodes with one of these in their name stay fp32.
        given: inputs that come in 8 bits, as `hand_out_bytes` of the graph before made them.

    Returns:
        A graph whose weight W is the initialiser `W_quantized`, int8, times `W_scale`, one for each output channel.
    """
    model = _copy(model)
    chosen = [n for n in model.graph.node if n.op_type == "Conv" and not any(part in n.name for part in keep)]
    weights = constants(model)
    scales = {n.input[1]: channel_scales(weights[n.input[1]]) for n in chosen}
    correct_biases(model, chosen, scales, feeds)
    overrides: dict[str, list[dict[str, Any]]] = {
        name: [
            {"scale": np.array(scale), "zero_point": np.array(0, np.int8), "quant_type": QuantType.QInt8}
            | ({} if k else {"axis": 0})
            for k, scale in enumerate(values)
        ]
        for name, values in scales.items()
    }
    normalised = _normalised_bytes(model)
    if normalised:
        overrides[normalised] = [{"scale": np.array(1 / 128, np.float32), "zero_point": np.array(127, np.uint8)}]
    for name, (scale, zero) in (given or {}).items():
        overrides[name] = [{"scale": np.array(scale), "zero_point": np.array(zero)}]
    left = [n.name for n in model.graph.node if any(part in n.name for part in keep)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        _quietly(
            quantize_static, source, target, _Reader(feeds), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=left, extra_options={"TensorQuantOverrides": overrides},
        )
        model = onnx.load(target)
    if normalised:
        take_bytes(model, normalised)
    for name in given or {}:
        _take_input(model, name)
    onnx.checker.check_model(model)
    return model


def channel_scales(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(O,) float32: scale of each output channel of a convolution's weight (O, I, kh, kw).

    Of two weights that a CPU multiplies together, neighbours in the order (kh, kw, I), the sum stays within 128; so the
    sum of two products with uint8 stays within 16 bits. Depthwise kernels add in 32 bits and need no such care.
    """
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(rows).max(1)
    if weight.shape[1] > 1:
        even = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
        largest = np.maximum(largest, np.abs(even[:, ::2] + even[:, 1::2]).max(1))
    return np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)


def rounded(weight: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weight (O, I, kh, kw) as 8 bits have it."""
    step = scales[:, None, None, None]
    return np.asarray(np.rint(weight / step) * step)


def correct_biases(
    model: ModelProto, convolutions: Sequence[NodeProto], scales: dict[str, np.ndarray[Any, Any]], feeds: Feeds
) -> None:
    """Take the mean of what rounded weights add to each channel out of its bias, in place; no bias, no correction."""
    convolutions = [conv for conv in convolutions if len(conv.input) > 2]
    means = _channel_means(model, list(dict.fromkeys(n.input[0] for n in convolutions)), feeds)
    values = constants(model)
    for conv in convolutions:
        weight, mean = values[conv.input[1]], means[conv.input[0]]
        error = (rounded(weight, scales[conv.input[1]]) - weight).sum((2, 3))
        by_group = mean.reshape(attribute(conv, "group", 1), 1, -1)
        shift = (error.reshape(len(by_group), -1, error.shape[1]) * by_group).sum(2).ravel()
        replace_constant(model, conv.input[2], (values[conv.input[2]] - shift).astype(np.float32))


def take_bytes(model: ModelProto, normalised: str) -> None:
    """Hand the image's bytes to the first convolution: quantising the normalised image gives them back as they were.

    What else reads the image as numbers goes on doing so.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == normalised)
    gone, source = [quantizer], normalised
    while makers[source].op_type in ("Div", "Sub", "Cast"):
        gone.append(makers[source])
        source = makers[source].input[0]
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name == quantizer.output[0]:
                node.input[k] = source
    for node in gone:
        if not any(node.output[0] in other.input for other in model.graph.node):
            model.graph.node.remove(node)


def hand_out_bytes(model: ModelProto, names: Sequence[str]) -> Grids:
    """Make outputs of an 8-bit graph uint8, as they are before they become fp32 again, in place.

    What another 8-bit graph reads is then rounded once, and a quarter as large.

    Args:
        names: outputs that a node in 8 bits makes.

    Returns:
        What an output's numbers are: (number - zero point) * scale.
    """
    values, makers = constants(model), {output: node for node in model.graph.node for output in node.output}
    grids: Grids = {}
    for name in names:
        last = makers[name]
        quantizer = makers[last.input[0]]
        grids[name] = np.float32(values[last.input[1]]), np.uint8(values[last.input[2]])
        quantized = quantizer.output[0]
        for node in model.graph.node:
            for k, source in enumerate(node.input):
                if source in (name, quantized):
                    node.input[k] = name + "_float" if source == name else name
        quantizer.output[0], last.output[0] = name, name + "_float"
        _make_bytes(model.graph.output, name)
        if not any(name + "_float" in node.input for node in model.graph.node):
            model.graph.node.remove(last)
    onnx.checker.check_model(model)
    return grids


def _take_input(model: ModelProto, name: str) -> None:
    """Make the input `name` uint8: the nodes that quantised it go."""
    for quantizer in [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name]:
        for node in model.graph.node:
            for k, source in enumerate(node.input):
                if source == quantizer.output[0]:
                    node.input[k] = name
        model.graph.node.remove(quantizer)
    _make_bytes(model.graph.input, name)


def _make_bytes(values: Any, name: str) -> None:
    for value in values:
        if value.name == name:
            value.type.tensor_type.elem_type = TensorProto.UINT8


def _normalised_bytes(model: ModelProto) -> str:
    """Name of (uint8 image - 127) / 128, "" where the graph has none."""
    values = constants(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        before = makers.get(node.input[0])
        if node.op_type == "Div" and before is not None and before.op_type == "Sub":
            numbers = [values.get(n.input[1], np.float32(0)) for n in (before, node)]
            if [float(v) for v in numbers if v.size == 1] == [127.0, 128.0]:
                return str(node.output[0])
    return ""


def _channel_means(model: ModelProto, names: list[str], feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
    """(C,) mean of each named activation over all feeds and positions."""
    watched = _copy(model)
    present = {output.name for output in watched.graph.output}
    inputs = {value.name for value in watched.graph.input}
    inside = [name for name in names if name not in inputs]
    watched.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in inside if n not in present)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    for feed in feeds:
        # asked for no names, a session gives all outputs
        found = dict(zip(inside, session.run(inside, feed) if inside else (), strict=True)) | feed
        for name in names:
            sums[name] = sums[name] + found[name].mean((0, 2, 3), dtype=np.float64) / len(feeds)
    return sums


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Feeds for onnxruntime's calibration."""

    def __init__(self, feeds: Feeds) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _quietly(function: Any, *args: Any, **kwargs: Any) -> None:
    """Call without onnxruntime's advice to optimise the graph first, which `simplify` has done."""
    logging.disable(logging.WARNING)
    try:
        function(*args, **kwargs)
    finally:
        logging.disable(logging.NOTSET)
