"""Lower precisions of an fp32 graph: fp16, and INT8 by ONNX Runtime's static quantisation (QDQ).

Preprocessing and the softmax stay in fp32: a quantised image costs accuracy and, on the CPU, most of the gain.
"""

from __future__ import annotations

import contextlib
import copy
import io
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from export.artifact import IMAGE, type_of
from toolkit import machine as machines
from toolkit.errors import DataError

# What ONNX and ONNX Runtime raise for a graph that one of them refuses; ONNX Runtime's errors share no base class.
REFUSED = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
METHODS = ("MinMax", "Percentile", "Entropy")
PERCENTILE = 99.99  # of the activations that keep their range, by the method of that name
BATCH = 32  # calibration images at a time: all batches are equal, as a smaller one would weigh as much as they
FEWEST = 64
OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool")
HEAVY = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Scheme:
    """How numbers become 8 bits. Weights are always signed, symmetric and per output channel."""

    name: str
    activations: Literal["QUInt8", "QInt8"]
    reduce_range: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# What each kind of hardware is fast with, after ONNX Runtime's guide to quantisation.
X86 = Scheme("U8S8", "QUInt8")
X86_WITHOUT_VNNI = Scheme("U8S8 with weights of 7 bits", "QUInt8", reduce_range=True)  # sums of 16 bits overflow else
ARM = Scheme("S8S8", "QInt8")
GPU = Scheme(
    "S8S8 symmetric",
    "QInt8",
    options={
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "DedicatedQDQPair": True,
    },
)


def scheme_for(gpu: bool, machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> Scheme:
    """The scheme of a provider on this machine; an x86 core counts as one with VNNI only where it says so."""
    if gpu:
        return GPU
    if (machine or platform.machine()).lower() in machines.ARM:
        return ARM
    return X86_WITHOUT_VNNI if machines.lacks_vnni(machine, cpuinfo) else X86


def half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in fp16; inputs and outputs stay as they are."""
    proto = onnx.shape_inference.infer_shapes(proto)
    light = set(_light(proto))
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    values = (*proto.graph.value_info, *proto.graph.output)
    floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {name for name, tensor in constants.items() if tensor.data_type == TensorProto.FLOAT}
    wanted = {name for node in proto.graph.node if node.name in light for name in node.input}
    halves: dict[str, str] = {}  # tensor to its fp16 twin
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.name in light:
            nodes.append(node)
            continue
        inputs = node.input[:1] if node.op_type == "Resize" else node.input  # its scales are fp32 in any graph
        for index, name in enumerate(inputs):
            if name in floats and name not in halves:
                halves[name] = f"{name}_fp16"
                if name in constants:
                    value = numpy_helper.to_array(constants[name]).astype(np.float16)
                    proto.graph.initializer.append(numpy_helper.from_array(value, halves[name]))
                else:
                    nodes.append(_cast(name, halves[name], TensorProto.FLOAT16))
            node.input[index] = halves.get(name, name)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in floats:
                halves[name] = node.output[index] = f"{name}_fp16"
                if name in wanted:
                    nodes.append(_cast(halves[name], name, TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    for part, content in ((proto.graph.node, nodes), (proto.graph.initializer, kept), (proto.graph.value_info, [])):
        del part[:]
        part.extend(content)
    return proto


def _cast(name: str, result: str, kind: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [result], f"cast_{result}", to=kind)


def int8(proto: onnx.ModelProto, images: NDArray[np.uint8], method: str, scheme: Scheme) -> onnx.ModelProto:
    """The graph in INT8; ``images`` uint8 ``[N,S,S,3]`` are training images, of which whole batches of 32 are used.

    ``method`` is one of ``METHODS``. The same input gives the same bytes. Raises ``DataError`` for images of another
    type or size than the graph takes, and for fewer than 64.
    """
    sides = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:3]]  # 0 for any size
    fits = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not fits or (sides != [0, 0] and list(images.shape[1:3]) != sides):
        raise DataError(
            f"calibration images must be as the artifact takes them, {type_of(proto.graph.input[0])}, not "
            f"{images.dtype} {list(images.shape)}"
        )
    if len(images) < FEWEST:
        raise DataError(f"{len(images)} calibration images are too few: INT8 needs at least {FEWEST}")
    source = copy.deepcopy(proto)
    add_pre_process_metadata(source)  # constants are folded already
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "int8.onnx")
        quantize_static(
            source,
            path,
            _Batches(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            reduce_range=scheme.reduce_range,
            activation_type=QuantType[scheme.activations],
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_light(proto),
            calibrate_method=CalibrationMethod[method],
            # MinMax holds one batch in memory at a time.
            extra_options={"CalibStridedMinMax": 1, "CalibPercentile": PERCENTILE} | scheme.options,
        )
        return onnx.load(path)


class _Batches(CalibrationDataReader):
    """Calibration images, in equal batches."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.batches = [images[start : start + BATCH] for start in range(0, len(images) - BATCH + 1, BATCH)]
        self.set_range(0, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:  # type: ignore[override]  # None at the end
        batch = next(self.left, None)
        return None if batch is None else {IMAGE: batch}


def _light(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes before the first and after the last convs and products: pre- and postprocessing."""
    nodes = proto.graph.node

    def beyond(ordered: Iterable[onnx.NodeProto], forward: bool) -> set[str]:
        reached: set[str] = set()
        light = set()
        for node in ordered:
            into, out = (node.input, node.output) if forward else (node.output, node.input)
            if node.op_type in HEAVY or reached.intersection(into):
                reached.update(out)
            else:
                light.add(node.name)
        return light

    return sorted(beyond(nodes, True) | beyond(reversed(nodes), False))
