"""Training for INT8: what is rounded, to what, and how gradients pass."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from small_net import small_images, small_metadata, small_net

from export import quantise
from export.onnx_export import build
from toolkit.rounding import Int8, rounded, rounded_channels


def test_inputs_are_rounded_to_256_steps_that_hold_zero() -> None:
    x = torch.cat([torch.zeros(1), torch.linspace(-1, 3, 999)])
    result = rounded(x)
    assert result.unique().numel() <= 256
    assert result[0] == 0
    assert (result - x).abs().max() <= 4 / 255 / 2 + 1e-6
    positive = rounded(torch.linspace(1, 2, 100))  # 0 belongs to the range, for the padding of convs
    torch.testing.assert_close(positive * 255 / 2, (positive * 255 / 2).round())


def test_weights_are_rounded_per_channel_and_symmetric() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    scaled = weight * torch.tensor([0.0, 1.0, 10.0, 1000.0])[:, None, None, None]
    result = rounded_channels(scaled)
    torch.testing.assert_close(result, -rounded_channels(-scaled))
    steps = scaled.flatten(1).abs().amax(1) / 127
    assert ((result - scaled).flatten(1).abs().amax(1) <= steps / 2 + 1e-6).all()
    assert (result[0] == 0).all()


@pytest.mark.parametrize(("function", "shape"), [(F.conv2d, (4, 3, 3, 3)), (F.linear, (4, 8))])
def test_convs_and_products_see_rounded_numbers_and_gradients_go_straight_through(
    function: Callable[..., torch.Tensor], shape: tuple[int, ...]
) -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(shape, requires_grad=True)
    with Int8():
        y = function(x, weight)
        assert torch.equal(F.relu(x), x.relu())
    torch.testing.assert_close(y, function(rounded(x), rounded_channels(weight)))
    assert not torch.equal(y, function(x, weight))
    y.sum().backward()
    assert x.grad is not None
    expected = torch.autograd.grad(function(x, rounded_channels(weight)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_the_quantised_graph_rounds_to_the_same_numbers() -> None:
    """Its weights, and inputs over the range that it was calibrated for."""
    whole = build(small_net(), small_metadata())
    graph = quantise.int8(whole, small_images(64).permute(0, 2, 3, 1).numpy(), "MinMax", quantise.X86).graph
    exact, rough = (
        {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in each.initializer}
        for each in (whole.graph, graph)
    )
    kinds = []
    for node in graph.node:
        kinds.append(node.op_type)
        name = node.input[0]
        if node.op_type == "DequantizeLinear" and name.endswith(".weight_quantized"):
            weight = exact[name.removesuffix("_quantized")]
            found = rough[name].movedim(0, -1) * rough[node.input[1]]
            torch.testing.assert_close(found.movedim(-1, 0), rounded_channels(weight))
        if node.op_type == "QuantizeLinear":
            scale, zero = rough[node.input[1]], rough[node.input[2]].int()
            steps = torch.linspace(-int(zero), 255 - int(zero), 1000)
            torch.testing.assert_close(steps.round() * scale, rounded(steps * scale))
    assert kinds.count("Conv") + kinds.count("Gemm") == 3
    assert kinds.count("QuantizeLinear") > 3
