"""The module that is trained, saved and exported: a network that normalises its own input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.choices import Views


class Classifier(nn.Module):
    """Images ``[B,3,H,W]`` in [0,1] to logits ``[B,K]``.

    The normalisation travels with the weights, so that teacher and student may differ in it and the exported
    graph needs nothing beside it. ``mean`` and ``std`` are per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)

    def prepare(self, images: Tensor) -> None:
        """Show a new network training images ``[N,3,H,W]`` in [0,1], where it starts from data."""
        prepare = getattr(self.network, "prepare", None)
        if prepare is not None:
            prepare((images - self.mean) / self.std)


class Ensemble(nn.Module):
    """Several classifiers as one: images ``[B,3,H,W]`` in [0,1] to the logarithm of their mean probabilities."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        log_probabilities = torch.stack([member(images).float().log_softmax(1) for member in self.members])
        return log_probabilities.logsumexp(0) - math.log(len(self.members))


def members(net: nn.Module) -> list[nn.Module]:
    """An ensemble's classifiers, or the classifier alone, as they are without test-time augmentation."""
    found = net.members if isinstance(net, Ensemble) else [net]
    return [member.classifier if isinstance(member, TestTimeAugmentation) else member for member in found]


def with_views(classifier: nn.Module, views: Views | None) -> nn.Module:
    """The classifier's mean over these views of each image, or without any the classifier itself."""
    return TestTimeAugmentation(classifier, views).eval() if views else classifier


class TestTimeAugmentation(nn.Module):
    """A classifier's mean logits over views of each image: ``[B,3,H,W]`` in [0,1] to ``[B,K]``.

    ``flip``: the image and its mirror image. ``flip_and_shift``: these two, and with half of the weight both of them
    shifted by a pixel up and left, and down and right, filled by reflection (airbench's, arXiv 2404.00498). The
    classifier sees all views as one batch of 2 B or 6 B images, so that an exported graph holds it once.
    """

    __test__ = False  # no test, whatever pytest takes the name for
    weights: Tensor

    def __init__(self, classifier: nn.Module, views: Views = "flip_and_shift") -> None:
        super().__init__()
        if views not in get_args(Views):
            raise ValueError(f"views (={views}) must be one of {', '.join(get_args(Views))}")
        self.classifier = classifier
        self.shifts = ((1, 1), (0, 0), (2, 2)) if views == "flip_and_shift" else ((1, 1),)
        shares = (1 / 2, 1 / 4, 1 / 4) if views == "flip_and_shift" else (1.0,)
        self.register_buffer("weights", torch.tensor(shares).repeat_interleave(2)[:, None, None] / 2)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[:, :, top : top + height, left : left + width] for top, left in self.shifts]
        views = torch.cat([view for image in shifted for view in (image, image.flip(3))])
        logits = self.classifier(views)
        return (logits.unflatten(0, (len(self.weights), -1)) * self.weights).sum(0)
