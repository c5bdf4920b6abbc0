"""Training for INT8: what is rounded, to what, and how gradients pass."""

import torch
import torch.nn.functional as F

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


def test_convs_and_products_see_rounded_numbers_and_gradients_go_straight_through() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, generator=generator, requires_grad=True)
    with Int8():
        y = F.conv2d(x, weight)
        torch.testing.assert_close(F.relu(x), x.relu())
    torch.testing.assert_close(y, F.conv2d(rounded(x), rounded_channels(weight)))
    assert not torch.equal(y, F.conv2d(x, weight))
    y.sum().backward()
    assert x.grad is not None
    expected = torch.autograd.grad(F.conv2d(x, rounded_channels(weight)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
