"""Relations between images: Park et al.: Relational Knowledge Distillation (arXiv 1904.05068)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from toolkit.recipe import FeatureMethod


class Params(FeatureMethod):
    maps: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("distance", "angle")

    distance: float = Field(25, ge=0, description="weight of the distances between two images")
    angle: float = Field(50, ge=0, description="weight of the angles between three images")
    group: int = Field(
        64,
        ge=3,
        description="images that are related to each other: a batch is taken in groups of so many (two are always "
        "alike: distances are relative)",
    )


class Term(nn.Module):
    """``distance mean_ij h(d(s_i, s_j), d(t_i, t_j)) + angle mean_ijk h(c(s_i, s_j, s_k), c(t_i, t_j, t_k))``.

    s and t ``[B,C]`` are embeddings, feature maps ``[B,C,H,W]`` being averaged over their positions; ``d`` is the L2
    distance divided by the mean of all that are not 0, ``c`` the cosine of the angle at the first of three, and ``h``
    Huber's loss; none has a unit. i, j and k run over groups of the batch, and the result is summed over the pairs of
    layers.
    """

    def __init__(self, params: Params, shapes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        super().__init__()
        self.distance, self.angle, self.group = params.distance, params.angle, params.group

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        loss = student[0].new_zeros(()).float()
        for s, t in zip(student, teacher, strict=True):
            groups = zip(embed(s).split(self.group), embed(t.detach()).split(self.group), strict=True)
            for one, other in groups:
                (distance_s, angle_s), (distance_t, angle_t) = relations(one), relations(other)
                relation = self.distance * F.smooth_l1_loss(distance_s, distance_t)
                relation = relation + self.angle * F.smooth_l1_loss(angle_s, angle_t)
                loss = loss + relation * (len(one) / len(s))
        return loss


def embed(features: Tensor) -> Tensor:
    """``[B,C,...]`` to its mean over all positions, float32 ``[B,C]``."""
    return features.float().flatten(2).mean(2) if features.ndim > 2 else features.float()


def relations(points: Tensor) -> tuple[Tensor, Tensor]:
    """Of points ``[G,C]`` the distances ``[G,G]``, relative to their mean, and the cosines ``[G,G,G]`` of angles."""
    difference = points[None] - points[:, None]
    distance = difference.norm(dim=2)
    direction = difference / distance.clamp_min(1e-6)[..., None]
    mean = distance.sum() / (distance > 0).sum().clamp_min(1)
    return distance / mean.clamp_min(1e-6), direction @ direction.mT
