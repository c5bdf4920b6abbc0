"""Three cuts of ResNet-18 below 5 million parameters, each with the quirks of its report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from students.blocks import conv3x3, stem_reduction

__all__ = ["resnet18_242_k3", "resnet18_242_k7", "resnet18_256_dropout"]


class BiasedBlock(nn.Module):
    """Two 3x3 convs with biases; ReLU stands before the addition as well as after it.

    ``[B,inputs,H,W]`` to ``[B,outputs,H/stride,W/stride]``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu(y + self.shortcut(x))


class DropoutBlock(nn.Module):
    """Two 3x3 convs without biases; dropout after each of the block's norms, the shortcut's too.

    ``[B,inputs,H,W]`` to ``[B,outputs,H/stride,W/stride]``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(inputs, outputs, stride), conv3x3(outputs, outputs)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs), nn.Dropout(dropout)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.dropout(self.norm1(self.conv1(x))))
        y = self.dropout(self.norm2(self.conv2(y)))
        return torch.relu(y + self.shortcut(x))


class CutResNet18(nn.Module):
    """A stem, then two blocks in each of four stages, mean, linear layer: ``[B,3,H,W]`` to ``[B,K]``."""

    def __init__(self, num_classes: int, stem: nn.Module, blocks: Sequence[nn.Module], outputs: int) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.head = nn.Linear(outputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _shapes(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Inputs, outputs and stride of the eight blocks; ``widths`` begins with the stem's."""
    shapes = []
    for stage, outputs in enumerate(widths[1:]):
        shapes += [(widths[stage], outputs, 1 if stage == 0 else 2), (outputs, outputs, 1)]
    return shapes


def _biased(num_classes: int, kernel: int, pool: nn.Module, widths: Sequence[int], image_size: int) -> nn.Module:
    stride, pools = stem_reduction(image_size)
    conv = nn.Conv2d(3, widths[0], kernel, stride, 1)
    stem = nn.Sequential(conv, pool, nn.BatchNorm2d(widths[0]), nn.ReLU(), *pools)
    return CutResNet18(num_classes, stem, [BiasedBlock(*shape) for shape in _shapes(widths)], widths[-1])


def resnet18_242_k3(
    num_classes: int, widths: Sequence[int] = (64, 64, 128, 256, 242), image_size: int = 32
) -> nn.Module:
    """ResNet-18 with a pooled 3x3 stem and a last stage of 242: 4,984,152 parameters, 0.06 G MACs at 32x32.

    Source: Chawla, Kataria, Kulkarni: three ResNet-18 variants, method 1 (86.44% on CIFAR-10)
    """
    return _biased(num_classes, 3, nn.MaxPool2d(5, 3, 1), widths, image_size)


def resnet18_242_k7(
    num_classes: int, widths: Sequence[int] = (64, 64, 128, 256, 242), image_size: int = 32
) -> nn.Module:
    """ResNet-18 with a pooled 7x7 stem and a last stage of 242: 4,991,832 parameters, 0.10 G MACs at 32x32.

    Source: Chawla, Kataria, Kulkarni: three ResNet-18 variants, method 2 (88.20% on CIFAR-10)
    """
    return _biased(num_classes, 7, nn.MaxPool2d(3, 2, 1), widths, image_size)


def resnet18_256_dropout(
    num_classes: int, widths: Sequence[int] = (64, 64, 128, 244, 256), dropout: float = 0.1, image_size: int = 32
) -> nn.Module:
    """ResNet-18 with a strided stem and dropout in its blocks: 4,996,866 parameters, 0.11 G MACs at 32x32.

    The report ends in log-softmax and the negative log-likelihood; logits and cross entropy are the same.

    Source: Chawla, Kataria, Kulkarni: three ResNet-18 variants, method 3 (90.80% on CIFAR-10)
    """
    stride, pools = stem_reduction(image_size, stride=2)
    stem = nn.Sequential(conv3x3(3, widths[0], stride), nn.BatchNorm2d(widths[0]), nn.ReLU(), *pools)
    blocks = [DropoutBlock(*shape, dropout) for shape in _shapes(widths)]
    return CutResNet18(num_classes, stem, blocks, widths[-1])
