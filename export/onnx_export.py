"""A PyTorch classifier to an artifact: one ONNX file, the same bytes each time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx.parser
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.artifact import IMAGE, LOGITS, PROBABILITIES, Metadata
from toolkit.errors import ArtifactError
from toolkit.files import write_bytes

OPSET = 20
OPSETS = range(18, 26)  # what torch's exporter converts to; an older torch may know fewer, and that is told then

# ``export.preprocess.fit`` in the graph: ONNX Runtime's antialiased resize of integers counts as Pillow does.
FIT = """<ir_version: {ir_version}, opset_import: ["" : {opset}]>
fit (uint8[batch, height, width, 3] {image}) => (uint8[batch, {size}, {size}, 3] square)
<int64[1] two = {{2}}, int64[2] axes = {{1, 2}}, int64[3] size = {{{size}, {size}, 3}}>
{{
  shape = Shape <start = 1, end = 3> ({image})
  count = Shape <start = 0, end = 1> ({image})
  side = ReduceMin (shape)
  margin = Sub (shape, side)
  start = Div (margin, two)
  end = Add (start, side)
  crop = Slice ({image}, start, end, axes)
  sizes = Concat <axis = 0> (count, size)
  square = Resize <mode = "linear", antialias = 1, exclude_outside = 1> (crop, , , sizes)
}}"""


class Deployed(nn.Module):
    """What ships: uint8 ``[N,S,S,3]`` to probabilities and logits, float32 ``[N,K]``; logits over ``temperature``."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # contiguous: strides of channels_last would be traced into the graph (pooling becomes as_strided).
        logits = self.model(image.permute(0, 3, 1, 2).contiguous().float() / 255)
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits.softmax(dim=1), logits


def deployed(model: nn.Module, metadata: Metadata) -> Deployed:
    """The module that the artifact with this metadata holds, in fp32 on the CPU; ``model`` is left as it is."""
    temperature = metadata.temperature if metadata.calibrated else None
    return Deployed(fp32_copy(model), temperature or 1.0).eval()


def build(model: nn.Module, metadata: Metadata, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of ``model`` in fp32, with the preprocessing and the temperature that ``metadata`` speaks of.

    ``model`` takes float images ``[B,3,S,S]`` in [0,1], normalises inside, and gives logits ``[B,K]``; a copy of
    it in inference mode is exported. Raises ``ArtifactError`` for an opset that cannot be written, ``ValueError`` where
    K is not the number of labels.
    """
    check_opset(opset)
    size = metadata.image_size
    module = deployed(model, metadata)
    # A batch of 1 would be taken for a constant.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        classes = module(example)[1].shape[1]
    if classes != len(metadata.labels):
        raise ValueError(f"the model has {classes} outputs, the metadata {len(metadata.labels)} labels")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)  # of PyTorch 2.11, about its own code
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[IMAGE],
            output_names=[PROBABILITIES, LOGITS],
            dynamic_shapes={IMAGE: {0: "batch"}},
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    written = next(item.version for item in proto.opset_import if not item.domain)
    if written != opset:
        raise ArtifactError(f"--opset {opset} cannot be written here: PyTorch's exporter gives {written}")
    for part in _parts(proto):
        # Stack traces of this machine: they give its paths away and change from export to export.
        del part.metadata_props[:]
        part.ClearField("doc_string")
    fold_norms_behind_pools(proto)
    resize_by_constants(proto)
    return _of_any_size(proto, size, opset) if metadata.any_size else proto


def check_opset(opset: int) -> None:
    """Raise ``ArtifactError`` for an opset that PyTorch's exporter does not write."""
    if opset not in OPSETS:
        raise ArtifactError(f"--opset {opset} cannot be written: choose one of {OPSETS[0]} to {OPSETS[-1]}")


def save(proto: onnx.ModelProto, metadata: Metadata, path: Path) -> None:
    """Write a graph with its metadata; the file appears whole or not at all. ``UserError`` where it cannot."""
    write_bytes(path, to_bytes(proto, metadata))


def to_bytes(proto: onnx.ModelProto, metadata: Metadata) -> bytes:
    """The content of an artifact; the same graph and metadata give the same bytes."""
    onnx.helper.set_model_props(proto, metadata.to_properties())
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def fp32_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU, in float32 and in inference mode: what an artifact is compared with."""
    return copy.deepcopy(model).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()


def fold_norms_behind_pools(proto: onnx.ModelProto) -> None:
    """Fold each BN that follows conv and max-pool into the conv, where its factors are positive.

    A maximum commutes with what grows; the exporter itself folds only a BN that follows a conv directly.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    uses = [name for node in graph.node for name in node.input]
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        pool = makers.get(norm.input[0])
        conv = makers.get(pool.input[0]) if pool is not None and pool.op_type == "MaxPool" else None
        if pool is None or conv is None or conv.op_type != "Conv":
            continue
        if uses.count(pool.input[0]) > 1 or uses.count(norm.input[0]) > 1:
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(constants[name]).astype(float) for name in norm.input[1:])
        epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        if not (factor > 0).all():
            continue
        weight = numpy_helper.to_array(constants[conv.input[1]]) * factor[:, None, None, None]
        bias = numpy_helper.to_array(constants[conv.input[2]]) if len(conv.input) > 2 else 0
        for index, value in ((1, weight), (2, (bias - mean) * factor + shift)):
            name = f"{conv.output[0]}_{('weight', 'bias')[index - 1]}"
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
            conv.input[index:] = [name]
        pool.output[0] = norm.output[0]
        graph.node.remove(norm)
    drop_unused(graph)


def resize_by_constants(proto: onnx.ModelProto) -> None:
    """Let each resize know its factors: sizes that the graph computes keep ONNX Runtime from running all on CUDA."""
    graph = proto.graph
    sides = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim][2:]
        for value in graph.value_info
    }
    for node in [node for node in graph.node if node.op_type == "Resize" and len(node.input) == 4]:
        before, after = sides[node.input[0]], sides[node.output[0]]
        factors = np.array([1, 1, *map(_factor, before, after)], np.float32)
        graph.initializer.append(numpy_helper.from_array(factors, f"{node.output[0]}_scales"))
        node.input[2:] = [f"{node.output[0]}_scales"]
    drop_unused(graph)


def _factor(before: int, after: int) -> np.float32:
    """What ``before`` is multiplied by in fp32 to be ``after``, rounded down."""
    factor = np.float32(after / before)
    return factor if int(factor * np.float32(before)) >= after else np.nextafter(factor, np.float32(np.inf))


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that nothing reads any more."""
    outputs = {output.name for output in graph.output}
    while True:
        used = outputs | {name for node in graph.node for name in node.input}
        unused = [node for node in graph.node if not used & set(node.output)]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _of_any_size(proto: onnx.ModelProto, size: int, opset: int) -> onnx.ModelProto:
    """The graph behind crop and resize."""
    text = FIT.format(ir_version=proto.ir_version, opset=opset, image=IMAGE, size=size)
    first = onnx.parser.parse_model(text)
    for node in first.graph.node:
        node.name = f"fit_{node.output[0]}"
    proto = onnx.compose.add_prefix(proto, "network_", rename_inputs=True, rename_outputs=False)
    merged = onnx.compose.merge_models(first, proto, io_map=[("square", f"network_{IMAGE}")])
    del merged.opset_import[:]  # it stands there twice
    merged.opset_import.append(onnx.helper.make_opsetid("", opset))
    return merged


def _parts(proto: onnx.ModelProto) -> Iterator[Any]:
    """Everything in the file that can carry notes of the exporter."""
    yield proto
    for graph in (proto.graph, *proto.functions):
        yield graph
        yield from graph.node
        yield from graph.value_info
    yield from (*proto.graph.input, *proto.graph.output)
