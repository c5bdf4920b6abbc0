"""Post-activation residual networks of one shape: stem, stages of residual blocks, mean, linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from students.blocks import ResidualBlock, SqueezeExcitation, conv3x3, kaiming, rising, stem_reduction

__all__ = ["resnet18_42", "resnet_large", "se_resnet_443"]


class ResNet(nn.Module):
    """A 3x3 stem and stages of residual blocks; each stage after the first halves the resolution.

    ``[B,3,H,W]`` to ``[B,K]``. ``dropout`` is between the convs of a block, ``dropout_after`` behind its last ReLU;
    ``squeeze`` is the reduction of one squeeze-and-excitation after the stem; ``stochastic_depth`` the probability of
    leaving out the last block, the others' rise to it. Raises ``ValueError`` for a stage without blocks.
    """

    def __init__(
        self,
        num_classes: int,
        stem: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        dropout: float = 0.0,
        dropout_after: float = 0.0,
        squeeze: int | None = None,
        stochastic_depth: float = 0.0,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if min(blocks, default=0) < 1:
            raise ValueError(f"blocks (={list(blocks)}) must each be at least 1")
        stride, self.pools = stem_reduction(image_size)
        self.conv, self.norm = conv3x3(3, stem, stride), nn.BatchNorm2d(stem)
        self.squeeze = SqueezeExcitation(stem, squeeze) if squeeze else nn.Identity()
        stages, inputs, left_out = [], stem, iter(rising(stochastic_depth, sum(blocks)))
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layers: list[nn.Module] = []
            for stride in strides:
                layers.append(ResidualBlock(inputs, width, stride, dropout, next(left_out)))
                if dropout_after:
                    layers.append(nn.Dropout(dropout_after))
                inputs = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.squeeze(self.pools(torch.relu(self.norm(self.conv(x))))))
        return self.head(x.mean((2, 3)))


def resnet18_42(
    num_classes: int,
    stem: int = 42,
    widths: Sequence[int] = (42, 84, 168, 336),
    blocks: Sequence[int] = (2, 2, 2, 2),
    dropout: float = 0.15,
    image_size: int = 32,
) -> nn.Module:
    """ResNet-18 with 42 channels where the original has 64: 4,815,940 parameters, 0.24 G MACs at 32x32.

    Source: Xu, Tariq, Ahmed: ResNet18_42 and ResNetLarge (93.02% on CIFAR-10)
    """
    return ResNet(num_classes, stem, widths, blocks, dropout, image_size=image_size)


def resnet_large(
    num_classes: int,
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (1, 1, 1, 1),
    dropout: float = 0.0,
    image_size: int = 32,
) -> nn.Module:
    """ResNet-18's widths with one block a stage: 4,903,242 parameters, 0.25 G MACs at 32x32.

    Source: Xu, Tariq, Ahmed: ResNet18_42 and ResNetLarge (92.73% on CIFAR-10)
    """
    return ResNet(num_classes, stem, widths, blocks, dropout, image_size=image_size)


def se_resnet_443(
    num_classes: int,
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256),
    blocks: Sequence[int] = (4, 4, 3),
    dropout: float = 0.0,
    reduction: int = 16,
    stochastic_depth: float = 0.0,
    image_size: int = 32,
) -> nn.Module:
    """Three stages behind one squeeze-and-excitation: 4,697,742 parameters, 0.80 G MACs at 32x32.

    ``dropout`` follows each block's last ReLU (0.1 in the report's text, 0 in its final run).

    Source: Lakkimsetty, Kanamarla, Aravind: SE-ResNet with Lookahead and CutMix (93.67% on CIFAR-10)
    """
    return ResNet(
        num_classes,
        stem,
        widths,
        blocks,
        dropout_after=dropout,
        squeeze=reduction,
        stochastic_depth=stochastic_depth,
        image_size=image_size,
    )
