"""The module that is trained, saved and exported: a network that normalises its own input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
