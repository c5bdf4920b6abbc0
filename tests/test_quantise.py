"""fp16 and INT8 of one small graph."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_net import SIZE, small_images, small_metadata, small_net
from torch import nn

from export import quantise
from export.onnx_export import build, save
from serve.session import Session
from toolkit.errors import DataError

IMAGES = small_images(300).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build(small_net(), small_metadata())


def answers(proto: onnx.ModelProto, folder: Path) -> np.ndarray:
    save(proto, small_metadata(), folder / "a.onnx")
    return Session(folder / "a.onnx", "cpu").run(IMAGES)[0]


def operators(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    return [node.op_type for node in nodes]


@pytest.mark.parametrize("method", quantise.METHODS)
def test_int8_answers_as_fp32_and_is_the_same_twice(method: str, graph: onnx.ModelProto, tmp_path: Path) -> None:
    quantised = [quantise.int8(graph, IMAGES[:64], method, quantise.X86) for _ in range(2)]
    assert quantised[0].SerializeToString(deterministic=True) == quantised[1].SerializeToString(deterministic=True)
    assert str(tmp_path.parent).encode() not in quantised[0].SerializeToString()
    assert b"/tmp" not in quantised[0].SerializeToString()
    same = answers(quantised[0], tmp_path).argmax(1) == answers(graph, tmp_path).argmax(1)
    assert same.mean() > 0.95


def test_int8_is_u8s8_per_channel_and_leaves_both_ends_alone(graph: onnx.ModelProto) -> None:
    quantised = quantise.int8(graph, IMAGES[:64], "MinMax", quantise.X86)
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    kernels = [tensor for name, tensor in constants.items() if tensor.data_type == TensorProto.INT8 and tensor.dims]
    scales = {node.input[0]: constants[node.input[1]] for node in quantised.graph.node if "Dequant" in node.op_type}
    weights = [kernel for kernel in kernels if len(kernel.dims) == 4]
    assert [list(scales[kernel.name].dims) for kernel in weights] == [[16], [24]]
    zeros = [constants[node.input[2]] for node in quantised.graph.node if node.op_type == "QuantizeLinear"]
    assert {zero.data_type for zero in zeros} == {TensorProto.UINT8}
    ordered = operators(quantised.graph.node)
    before = ordered[: ordered.index("QuantizeLinear")]
    assert {"Cast", "Transpose", "Div"} <= set(before)
    assert ordered[-1] == "Softmax"
    half_sums = quantise.int8(graph, IMAGES[:64], "MinMax", quantise.X86_WITHOUT_VNNI)
    largest = [abs(numpy_helper.to_array(t).astype(int)).max() for t in half_sums.graph.initializer if len(t.dims) == 4]
    assert max(largest) <= 64


def test_fp16_keeps_inputs_outputs_and_answers(graph: onnx.ModelProto, tmp_path: Path) -> None:
    before = graph.SerializeToString()
    halved = quantise.half(graph)
    assert graph.SerializeToString() == before
    kernels = [tensor for tensor in halved.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1]
    assert {tensor.data_type for tensor in kernels} == {TensorProto.FLOAT16}
    np.testing.assert_allclose(answers(halved, tmp_path), answers(graph, tmp_path), atol=0.05)


def test_fp16_of_a_net_that_resizes_within(tmp_path: Path) -> None:
    """The scales of ONNX's Resize are fp32 in any graph."""
    net = small_net()
    net.net.insert(3, nn.Upsample(scale_factor=2, mode="bilinear"))
    whole = build(net, small_metadata())
    assert "Resize" in operators(whole.graph.node)
    np.testing.assert_allclose(answers(quantise.half(whole), tmp_path), answers(whole, tmp_path), atol=0.05)


class Gate(nn.Module):
    """A ReLU by a comparison."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (values > 0).float() * values


def test_fp16_of_a_net_that_casts_within(graph: onnx.ModelProto, tmp_path: Path) -> None:
    net = small_net()
    net.net[2] = Gate()
    whole = build(net, small_metadata())
    assert operators(whole.graph.node).count("Cast") == operators(graph.graph.node).count("Cast") + 1
    np.testing.assert_allclose(answers(quantise.half(whole), tmp_path), answers(graph, tmp_path), atol=0.05)


def test_calibration_takes_whole_batches() -> None:
    assert [len(batch) for batch in quantise._Batches(IMAGES[:100]).batches] == [32, 32, 32]
    assert [len(batch) for batch in quantise._Batches(IMAGES[:96]).batches] == [32, 32, 32]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:63], "63 calibration images are too few: INT8 needs at least 64"),
        (IMAGES[:, :8], r"as the artifact takes them, uint8 \[batch, 16, 16, 3\], not uint8 \[300, 8, 16, 3\]"),
        (IMAGES.astype(np.float32), "not float32"),
        (IMAGES[..., :1], r"not uint8 \[300, 16, 16, 1\]"),
        (np.zeros((64, SIZE), np.uint8), r"not uint8 \[64, 16\]"),
    ],
)
def test_calibration_images_that_cannot_be_used(images: np.ndarray, message: str, graph: onnx.ModelProto) -> None:
    with pytest.raises(DataError, match=message):
        quantise.int8(graph, images, "MinMax", quantise.X86)


def test_the_scheme_follows_the_hardware(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("flags : fpu avx512_vnni")
    old.write_text("flags : fpu avx2")
    assert quantise.scheme_for(False, "x86_64", new) == quantise.X86
    assert quantise.scheme_for(False, "x86_64", old) == quantise.X86_WITHOUT_VNNI
    assert quantise.scheme_for(False, "AMD64", tmp_path / "none") == quantise.X86_WITHOUT_VNNI
    assert quantise.scheme_for(False, "arm64", new) == quantise.ARM
    assert quantise.scheme_for(True, "x86_64", new) == quantise.GPU


@pytest.mark.parametrize("scheme", [quantise.ARM, quantise.GPU])
def test_other_schemes_make_graphs_that_run(scheme: quantise.Scheme, graph: onnx.ModelProto, tmp_path: Path) -> None:
    quantised = quantise.int8(graph, IMAGES[:64], "MinMax", scheme)
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    assert TensorProto.UINT8 not in {tensor.data_type for tensor in constants.values()}
    zeros = [constants[node.input[2]] for node in quantised.graph.node if "Linear" in node.op_type]
    assert zeros
    if scheme == quantise.GPU:  # TensorRT takes no others, and no INT32
        assert not any(numpy_helper.to_array(zero).any() for zero in zeros)
        assert {zero.data_type for zero in zeros} == {TensorProto.INT8}
    same = answers(quantised, tmp_path).argmax(1) == answers(graph, tmp_path).argmax(1)
    assert same.mean() > 0.95
