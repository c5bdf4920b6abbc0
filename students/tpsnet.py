"""TPSNet: deep, thin, post-activation residual networks, and their siblings from the same search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from students.resnet import ResNet

__all__ = ["tpsnet", "tpsnet_17", "tpsnet_23", "tpsnet_333", "tpsnet_777"]


def tpsnet(
    num_classes: int,
    blocks: Sequence[int] = (13, 13, 13),
    base: int = 16,
    width: int = 2,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    image_size: int = 32,
) -> nn.Module:
    """An 82-layer residual network of 4,959,770 parameters; 0.72 G MACs at 32x32.

    Stem of ``base`` channels, stages of ``base * width`` times 1, 2, 4; ``blocks`` residual blocks in each;
    ``dropout`` between the convs of a block; ``stochastic_depth`` leaves blocks out in training, the last with this
    probability, the others' rise to it.

    Source: Rao, Pan, Ananth: TPSNet (94.84% on CIFAR-10)
    """
    widths = [base * width * 2**stage for stage in range(len(blocks))]
    return ResNet(num_classes, base, widths, blocks, dropout, stochastic_depth=stochastic_depth, image_size=image_size)


def _sibling(blocks: int, base: int, doc: str) -> Callable[..., nn.Module]:
    """``tpsnet`` with other defaults: as many ``blocks`` in each of three stages."""
    builder = partial(tpsnet, blocks=(blocks,) * 3, base=base)
    builder.__doc__ = doc
    return builder


tpsnet_333 = _sibling(
    3,
    34,
    """``tpsnet`` with 3 blocks a stage, wider: 4,865,580 parameters, 0.71 G MACs at 32x32.

    Source: Rao, Pan, Ananth: TPSNet, model 1 (94.02% on CIFAR-10)
    """,
)
tpsnet_777 = _sibling(
    7,
    22,
    """``tpsnet`` with 7 blocks a stage: 4,971,680 parameters, 0.73 G MACs at 32x32.

    Source: Rao, Pan, Ananth: TPSNet, model 2 (94.24% on CIFAR-10)
    """,
)
tpsnet_17 = _sibling(
    17,
    14,
    """``tpsnet`` with 17 blocks a stage, thinner: 4,987,384 parameters, 0.73 G MACs at 32x32.

    Source: Rao, Pan, Ananth: TPSNet, table 1 (84.09% on CIFAR-10 after 30 epochs)
    """,
)
tpsnet_23 = _sibling(
    23,
    12,
    """``tpsnet`` with 23 blocks a stage, thinner still: 4,976,470 parameters, 0.73 G MACs at 32x32.

    Source: Rao, Pan, Ananth: TPSNet, table 1 (81.32% on CIFAR-10 after 30 epochs)
    """,
)
