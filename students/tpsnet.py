"""TPSNet: deep, thin, post-activation residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from students.blocks import ResidualBlock, conv3x3, kaiming

__all__ = ["tpsnet"]


class ResNet(nn.Module):
    """A 3x3 stem and stages of residual blocks; each stage after the first halves the resolution.

    ``[B,3,H,W]`` to ``[B,K]``.
    """

    def __init__(
        self, num_classes: int, stem: int, widths: Sequence[int], blocks: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv, self.norm = conv3x3(3, stem), nn.BatchNorm2d(stem)
        stages, inputs = [], stem
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layers = []
            for stride in strides:
                layers.append(ResidualBlock(inputs, width, stride, dropout))
                inputs = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def tpsnet(
    num_classes: int,
    blocks: Sequence[int] = (13, 13, 13),
    base: int = 16,
    width: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """An 82-layer residual network of 4,959,770 parameters; 0.74 G MACs at 32x32.

    Stem of ``base`` channels, stages of ``base * width`` times 1, 2, 4; ``blocks`` residual blocks in each;
    ``dropout`` between the convs of a block.

    Source: Rao, Pan, Ananth: TPSNet (94.84% on CIFAR-10)
    """
    widths = [base * width * 2**stage for stage in range(len(blocks))]
    return ResNet(num_classes, base, widths, blocks, dropout)
