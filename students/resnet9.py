"""A residual network for training without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from students.blocks import PoolFirstNet

__all__ = ["resnet9"]


def resnet9(
    num_classes: int,
    widths: Sequence[int] = (64, 256, 256),
    stochastic_depth: float = 0.0,
    resize: int | None = None,
    image_size: int = 32,
) -> nn.Module:
    """Ten convs, most of the work at 16x16 and below: 3,190,456 parameters, 0.16 G MACs at 32x32.

    Source: after Page's DAWNBench ResNet-9 (2018) and Jordan's airbench96 (arXiv 2404.00498)
    """
    return PoolFirstNet(num_classes, widths, stochastic_depth=stochastic_depth, image_size=image_size, resize=resize)
