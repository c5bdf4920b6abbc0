"""A teacher from elsewhere: an ONNX file that knows colours."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolkit import external
from toolkit.recipe import Teacher

SIDE = 16
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


def colour_net(
    path: Path,
    order: tuple[str, ...] = tuple(COLOURS),
    *,
    layout: str = "nchw",
    kind: int = TensorProto.FLOAT,
    batch: int | str = "batch",
    softmax: bool = False,
    white: float = 1.0,
    size: int | str | tuple[int, int] = SIDE,
    **told: str,
) -> Path:
    """An ONNX file that knows colours: the mean of each channel of what it wants, where white is ``white``."""
    channel = {"red": 0, "green": 1, "blue": 2}
    weights = np.zeros((3, len(order)), np.float32)
    for column, name in enumerate(order):
        weights[channel.get(name, 0), column] = 30 / white if name in channel else -30 / white
    bias = np.array([-6.0] * len(order), np.float32)
    sides = size if isinstance(size, tuple) else (size, size)
    shape = [batch, 3, *sides] if layout == "nchw" else [batch, *sides, 3]
    axes = [2, 3] if layout == "nchw" else [1, 2]
    nodes = [
        helper.make_node("Cast", ["input"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Gemm", ["means", "weights", "bias"], ["sums"]),
        helper.make_node("Relu", ["sums"], ["raw"]),
        helper.make_node("Softmax" if softmax else "Identity", ["raw"], ["answer"]),
    ]
    values = {"axes": np.array(axes), "weights": weights, "bias": bias}
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, [batch, len(order)])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, told)
    onnx.save(model, path)
    return path


def loaded(path: Path, **fields: Any) -> external.External:
    return external.load(Teacher.model_validate({"name": str(path), **fields}), tuple(COLOURS), "cpu", True)[0]
