"""A PyTorch classifier to an artifact: one ONNX file, the same bytes each time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.artifact import IMAGE, LOGITS, PROBABILITIES, Metadata
from toolkit.files import write_bytes

OPSET = 20


class Deployed(nn.Module):
    """What ships: uint8 ``[N,S,S,3]`` to probabilities and logits, float32 ``[N,K]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # contiguous: strides of channels_last would be traced into the graph (pooling becomes as_strided).
        logits = self.model(image.permute(0, 3, 1, 2).contiguous().float() / 255)
        return logits.softmax(dim=1), logits


def export(model: nn.Module, metadata: Metadata, path: Path) -> None:
    """Write ``model`` to ``path`` in fp32.

    ``model`` takes float images ``[B,3,S,S]`` in [0,1], normalises inside, and gives logits ``[B,K]``; it is
    left as it is. The file appears whole or not at all. Raises ``UserError`` where it cannot be written.
    """
    size = metadata.image_size
    deployed = Deployed(fp32_copy(model)).eval()
    # A batch of 1 would be taken for a constant.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        classes = deployed(example)[1].shape[1]
    if classes != len(metadata.labels):
        raise ValueError(f"the model has {classes} outputs, the metadata {len(metadata.labels)} labels")
    program = torch.onnx.export(
        deployed,
        (example,),
        input_names=[IMAGE],
        output_names=[PROBABILITIES, LOGITS],
        dynamic_shapes={IMAGE: {0: "batch"}},
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for part in _parts(proto):
        # Stack traces of this machine: they give its paths away and change from export to export.
        del part.metadata_props[:]
        part.ClearField("doc_string")
    onnx.helper.set_model_props(proto, metadata.to_properties())
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(path, proto.SerializeToString(deterministic=True))


def fp32_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU, in float32 and in inference mode: what an artifact is compared with."""
    return copy.deepcopy(model).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()


def _parts(proto: onnx.ModelProto) -> Iterator[Any]:
    """Everything in the file that can carry notes of the exporter."""
    yield proto
    for graph in (proto.graph, *proto.functions):
        yield graph
        yield from graph.node
        yield from graph.value_info
    yield from (*proto.graph.input, *proto.graph.output)
