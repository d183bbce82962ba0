"""All weights of a model's ONNX files in one file beside them, each once, those of convolutions in two bytes a number.

The first byte is what 8-bit graphs compute with, the second what that leaves. The fp32 graph puts both together when it
is loaded, the 8-bit graph reads the first alone. Other large weights are fp16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from glesam_ros.training.graphs import constants
from glesam_ros.training.quantize import channel_scales

SMALLEST_HALF = 256
"""Tensors with fewer numbers stay fp32: nothing to gain. A number a channel does, too: few, and all depends on them."""
SMALLEST_OUTSIDE = 1024
"""Tensors with fewer bytes stay in their ONNX file."""
STEPS = 254
"""Steps of the second byte in one step of the first: -127 .. 127 are -1/2 .. 1/2."""
ALIGNMENT = 64


def split_convolutions(model: ModelProto, small: ModelProto | None = None) -> None:
    """Make the weight of each convolution of `model` two bytes a number and the few nodes that join them, in place.

    The joined weight differs by at most 1/508 of an 8-bit step, so by 1/64,000 of the largest one of its channel.

    Args:
        model: in fp32.
        small: its 8-bit version, whose bytes become the first ones; else they are rounded here.
    """
    values, given = constants(model), constants(small) if small is not None else {}
    # in the order of the nodes, each once: a set's order, and with it the files, would differ from run to run
    for name in dict.fromkeys(node.input[1] for node in model.graph.node if node.op_type == "Conv"):
        if name not in values:
            continue
        scale = channel_scales(values[name])[:, None, None, None]
        first = given.get(f"{name}_quantized", np.rint(values[name] / scale))
        # half a step may have been rounded either way
        rest = np.clip(np.rint((values[name].astype(np.float64) / scale - first) * STEPS), -127, 127)
        arrays = {
            "quantized": first.astype(np.int8), "rest": rest.astype(np.int8),
            "step": np.float32(1 / STEPS), "steps": scale,
        }
        tensors = [numpy_helper.from_array(np.asarray(array), f"{name}_{key}") for key, array in arrays.items()]
        high, low, step, steps = (tensor.name for tensor in tensors)
        stages = [f"{name}_{key}" for key in ("high", "low", "part", "sum")]
        nodes = [
            helper.make_node("Cast", [high], [stages[0]], stages[0], to=TensorProto.FLOAT),
            helper.make_node("Cast", [low], [stages[1]], stages[1], to=TensorProto.FLOAT),
            helper.make_node("Mul", [stages[1], step], [stages[2]], stages[2]),
            helper.make_node("Add", [stages[0], stages[2]], [stages[3]], stages[3]),
            helper.make_node("Mul", [stages[3], steps], [name], f"{name}_joined"),
        ]
        _replace(model, name, tensors, nodes)


def store_half(model: ModelProto) -> None:
    """Replace large fp32 weights by fp16 with a cast, which the runtime folds when it loads, in place."""
    for name, weight in constants(model).items():
        if weight.dtype == np.float32 and weight.size >= SMALLEST_HALF and weight.squeeze().ndim > 1:
            half = numpy_helper.from_array(weight.astype(np.float16), name + "_half")
            cast = helper.make_node("Cast", [half.name], [name], name + "_cast", to=TensorProto.FLOAT)
            _replace(model, name, [half], [cast])


def save(models: dict[str, ModelProto], folder: Path, weights: str) -> None:
    """Write each model to `folder`/name, large tensors to the file `weights` beside them; equal ones once.

    Raises:
        onnx.checker.ValidationError: a model is invalid.
    """
    places: dict[bytes, int] = {}
    with (folder / weights).open("wb") as data:
        for model in models.values():
            for tensor in model.graph.initializer:
                array = numpy_helper.to_array(tensor)
                content = array.tobytes()
                if len(content) < SMALLEST_OUTSIDE:
                    continue
                if content not in places:
                    data.write(bytes(-data.tell() % ALIGNMENT))
                    places[content] = data.tell()
                    data.write(content)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
                set_external_data(tensor, weights, places[content], len(content))
                tensor.ClearField("raw_data")
    for name, model in models.items():
        onnx.save(model, folder / name)
        onnx.checker.check_model(str(folder / name))


def _replace(model: ModelProto, name: str, tensors: list[TensorProto], nodes: list[NodeProto]) -> None:
    """Make the initialiser `name` the output of `nodes` over `tensors`."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *tensors])
    following = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *following])
