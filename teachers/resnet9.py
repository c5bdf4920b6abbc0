"""A fast residual teacher for machines without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from students.blocks import PoolFirstNet

__all__ = ["resnet9_wide"]


def resnet9_wide(num_classes: int, widths: Sequence[int] = (128, 384, 512), image_size: int = 32) -> nn.Module:
    """``resnet9`` of the students, wider: 9,918,776 parameters, 0.45 G MACs at 32x32.

    Source: after Page's DAWNBench ResNet-9 (2018) and Jordan's airbench96 (arXiv 2404.00498)
    """
    return PoolFirstNet(num_classes, widths, image_size=image_size)
