"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from students.blocks import conv3x3, kaiming, stem_reduction

__all__ = ["wrn28"]


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv, dropout, BN-ReLU-conv: ``[B,inputs,H,W]`` to ``[B,outputs,H/stride,W/stride]``.

    Where shapes differ the 1x1 shortcut takes the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(torch.relu(self.norm2(self.conv1(y))))
        return self.conv2(y) + shortcut


class WideResNet(nn.Module):
    """``[B,3,H,W]`` to ``[B,K]``; ``depth`` is 6 n + 4 for n blocks in each of three stages, else ``ValueError``."""

    def __init__(self, num_classes: int, depth: int, width: int, dropout: float, image_size: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"`depth` (={depth}) must be 6 n + 4")
        stride, self.pools = stem_reduction(image_size)
        self.conv = conv3x3(3, 16, stride)
        layers, inputs = [], 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                layers.append(PreActivationBlock(inputs, outputs, 2 if stage and block == 0 else 1, dropout))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.blocks(self.pools(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def wrn28(num_classes: int, depth: int = 28, width: int = 10, dropout: float = 0.0, image_size: int = 32) -> nn.Module:
    """WRN-28-10 as in the paper: 36,479,194 parameters, 5.2 G MACs at 32x32.

    Source: Zagoruyko and Komodakis: Wide Residual Networks, arXiv 1605.07146 (96.00% on CIFAR-10)
    """
    return WideResNet(num_classes, depth, width, dropout, image_size)
