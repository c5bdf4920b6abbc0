"""Blocks that teachers and students share. Torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANCE_FLOOR = 5e-4  # added to the variances that patches are whitened by (airbench)
LOGIT_SCALE = 1 / 9  # of PoolFirstNet (airbench)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def stem_reduction(image_size: int, stride: int = 1) -> tuple[int, nn.Sequential]:
    """How a stem brings images of ``image_size`` pixels near those that the stages were made for, of 32 to 63.

    It halves them once from 64 pixels on and twice from 128 on: first by a stride of 2 in its first conv, where that
    has none of its own (``stride`` above 1), then by 3x3 max-pools behind it, as ResNet's stem for ImageNet does
    (arXiv 1512.03385). No parameter is added or changed. Returns the first conv's stride and the pools.
    """
    halvings = sum(image_size >= size for size in (64, 128))
    if halvings and stride == 1:
        stride, halvings = 2, halvings - 1
    return stride, nn.Sequential(*(nn.MaxPool2d(3, 2, padding=1) for _ in range(halvings)))


def kaiming(model: nn.Module) -> None:
    """He et al.'s fan-out initialisation of all convs (arXiv 1502.01852), zero biases of the linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class StochasticDepth(nn.Module):
    """In training, the residual branch of some images left out: each ``[...]`` of ``[B,...]`` 0 with ``probability``.

    The others are divided by what is left of 1, so that the mean stays (Huang et al., arXiv 1603.09382; there for whole
    batches, here image by image as ``torchvision.ops.StochasticDepth``'s rows).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"the probability of leaving a branch out (={probability:g}) must be in 0 to below 1")
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return branch
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= self.probability
        return branch * kept / (1 - self.probability)


class ResidualBlock(nn.Module):
    """Two 3x3 convs and a shortcut, activation after each normalisation (arXiv 1512.03385).

    ``[B,inputs,H,W]`` to ``[B,outputs,H/stride,W/stride]``; the shortcut is a 1x1 conv where shapes differ.
    ``left_out`` is the probability of stochastic depth.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dropout: float = 0.0, left_out: float = 0.0) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.depth = StochasticDepth(left_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(torch.relu(self.norm1(self.conv1(x))))
        return torch.relu(self.depth(self.norm2(self.conv2(y))) + self.shortcut(x))


def rising(probability: float, blocks: int) -> list[float]:
    """Stochastic depth's probability for each of the blocks: in a straight line up to that of the last one."""
    return [probability * block / blocks for block in range(1, blocks + 1)]


class SqueezeExcitation(nn.Module):
    """Each channel of ``[B,C,H,W]`` times a gate in 0..1 that its mean over the image decides (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.excite(torch.relu(self.squeeze(mean))).sigmoid()


def quick_norm(channels: int) -> nn.BatchNorm2d:
    """BN without a trained weight, whose statistics keep up with the steep schedules of short trainings (airbench)."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class WhiteningConv(nn.Conv2d):
    """The 12 principal components of 2x2 patches, each scaled to variance 1, and their negatives; not trained.

    ``[B,3,H,W]`` to ``[B,24,H-1,W-1]``, or at a stride of 2 to half of H and W. Of all of airbench's means this one
    saves the most steps (arXiv 2404.00498). Random until ``whiten`` has seen images.
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__(3, 24, 2, stride)
        self.weight.requires_grad_(False)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Take the filters from normalised images ``[N,3,H,W]``."""
        patches = F.unfold(images.float(), 2).transpose(1, 2).reshape(-1, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variances + VARIANCE_FLOOR).sqrt()).T.reshape(12, 3, 2, 2)
        self.weight.copy_(torch.cat([filters, -filters]))


class PoolFirstNet(nn.Module):
    """Whitened 2x2 patches and stages (``widths``) that pool right after their first conv: most work at low resolution.

    The shape of DAWNBench's ResNet-9 (David Page, 2018) and of airbench96 (arXiv 2404.00498): each stage is
    conv, 2x2 max-pool, BN, GELU, then two convs with a shortcut around them. Global max-pool, a linear layer
    without bias, logits times 1/9. ``[B,3,H,W]`` to ``[B,K]``, H and W at least 16. ``stochastic_depth`` is the
    probability of leaving out the last stage's pair, the others' rise to it. ``resize`` is the side that images are
    brought to first: a larger one gives the stages more positions to look at, and costs time but no parameters. Raises
    ``ValueError`` for a smaller one than 16, and for more stages than the images can be halved.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        stochastic_depth: float = 0.0,
        image_size: int = 32,
        resize: int | None = None,
    ) -> None:
        super().__init__()
        if resize is not None and resize < 16:
            raise ValueError(f"resize (={resize}) must be at least 16 pixels")
        self.resize = resize
        side = resize or image_size
        stride, self.pools = stem_reduction(side)
        left = (side - 2) // stride + 1  # pixels that come to the stages, each of which halves them
        for _ in self.pools:
            left = (left + 1) // 2
        if not 0 < len(widths) <= int(math.log2(left)):
            raise ValueError(
                f"widths (={list(widths)}) must be 1 to {int(math.log2(left))} for images of {side} pixels"
            )
        self.first = WhiteningConv(stride)
        inputs = (self.first.out_channels, *widths[:-1])
        left_out = rising(stochastic_depth, len(widths))
        self.stages = nn.Sequential(*map(PoolStage, inputs, widths, left_out))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):  # begin by passing on what comes in (airbench)
                with torch.no_grad():
                    nn.init.dirac_(module.weight[: module.in_channels])

    def prepare(self, images: Tensor) -> None:
        """Start from data: normalised training images ``[N,3,H,W]``, before the first step."""
        enlarged = 1 if self.resize is None else (self.resize / images.shape[-1]) ** 2
        self.first.whiten(self.resized(images[:: max(1, math.ceil(enlarged))]))  # as many pixels at once

    def resized(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return x
        return F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.pools(F.gelu(self.first(self.resized(x))))).amax((2, 3))
        return self.head(features) * LOGIT_SCALE


class PoolStage(nn.Module):
    """``[B,inputs,H,W]`` to ``[B,outputs,H/2,W/2]``: conv, max-pool, BN, GELU, residual pair of convs."""

    def __init__(self, inputs: int, outputs: int, left_out: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs), quick_norm(outputs)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), quick_norm(outputs)
        self.conv3, self.norm3 = conv3x3(outputs, outputs), quick_norm(outputs)
        self.depth = StochasticDepth(left_out)
        self.pool = nn.MaxPool2d(2)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        y = self.activation(self.norm2(self.conv2(x)))
        return self.activation(x + self.depth(self.norm3(self.conv3(y))))
