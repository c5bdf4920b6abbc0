"""The ResNet with which a report studied growing batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from students.blocks import conv3x3

__all__ = ["batch_doubling_resnet"]


def norm(channels: int) -> nn.BatchNorm2d:
    """BN with a momentum of 0.997 in TensorFlow's sense: the share of the old statistics."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.003)


class LeakyBlock(nn.Module):
    """``[B,inputs,H,W]`` to ``[B,outputs,H/stride,W/stride]``: two 3x3 convs, a shortcut, LeakyReLU (0.01)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs, stride), norm(outputs)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.leaky_relu(self.norm1(self.conv1(x)))))
        return F.leaky_relu(y + self.shortcut(x))


class BatchDoublingResNet(nn.Module):
    """``[B,3,32,32]`` to ``[B,K]``: the head's first layer fits this size alone."""

    def __init__(self, num_classes: int, widths: Sequence[int], blocks: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.conv, self.norm = conv3x3(3, widths[0]), norm(widths[0])
        layers, inputs = [], widths[0]
        for stage, (outputs, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(LeakyBlock(inputs, outputs, 2 if stage and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        side = 32 // 2 ** len(widths)
        self.hidden = nn.Linear(inputs * side * side, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.leaky_relu(self.norm(self.conv(x))))
        x = F.avg_pool2d(x, 2).flatten(1)
        return self.head(self.hidden(x).sigmoid())


def batch_doubling_resnet(
    num_classes: int,
    widths: Sequence[int] = (64, 128, 256),
    blocks: Sequence[int] = (6, 6, 6),
    hidden: int = 2048,
    image_size: int = 32,
) -> nn.Module:
    """A 38-layer ResNet with a head of two layers: 17,386,570 parameters, 1.3 G MACs at 32x32.

    Source: Anand: growing the batch instead of lowering the learning rate (93.56% on CIFAR-10)
    """
    if image_size != 32:
        raise ValueError(f"its head fits images of 32 pixels alone, not of {image_size}")
    return BatchDoublingResNet(num_classes, widths, blocks, hidden)
