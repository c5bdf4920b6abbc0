"""Training for INT8: a forward pass that rounds as the quantised graph will."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROUNDED = (F.conv2d, F.linear)


class Int8(TorchFunctionMode):
    """Within it, inputs and weights of convs and products are rounded as ``export.quantise`` does it (U8S8).

    Inputs per tensor, over the range of the batch and 0; weights symmetric and per output channel, which BN behind
    them leaves as it is. Gradients go straight through, as Jacob et al. train (arXiv 1712.05877).
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in ROUNDED:
            args = (rounded(args[0]), rounded_channels(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


def rounded(x: Tensor) -> Tensor:
    """The nearest of 256 equal steps from the least (or 0) to the largest value (or 0); float32."""
    x = x.float()
    least, most = x.detach().aminmax()
    low, high = least.clamp(max=0), most.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def rounded_channels(weight: Tensor) -> Tensor:
    """The nearest of 255 equal steps between plus and minus the largest value of each output channel; float32."""
    weight = weight.float()
    scale = (weight.detach().flatten(1).abs().amax(1) / 127).clamp(min=1e-12)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
