"""Attention: Zagoruyko, Komodakis: Paying More Attention to Attention (arXiv 1612.03928)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from toolkit.errors import RecipeError
from toolkit.features import same_size
from toolkit.recipe import FeatureMethod, Weight


class Params(FeatureMethod):
    weight: Weight = Field(1000, description="weight of this method among the methods")


class Term(nn.Module):
    """``mean((a(s) - a(t))^2)`` over images and positions, summed over the pairs of maps s and t ``[B,C,H,W]``.

    ``a(x)``, ``[B,HW]``, is the mean of ``x^2`` over the channels, divided by its L2 norm: where the net looks, not how
    strongly; neither has a unit. Of two maps of different size the larger one is averaged to the other's. Mean and
    weight are those of the authors' code, whose beta is the weight. Raises ``RecipeError`` for a map of one position,
    at which every net looks.
    """

    def __init__(self, params: Params, shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        super().__init__()
        for pair in shapes:
            if min(pair[0][1:] + pair[1][1:]) == 1:
                raise RecipeError(
                    f"loss.methods.attention_transfer.layers: maps of one position have nowhere else to look: "
                    f"{list(pair[0])} of the student, {list(pair[1])} of the teacher"
                )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        pairs = [same_size(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
        return sum((F.mse_loss(attention(s), attention(t)) for s, t in pairs), student[0].new_zeros(()).float())


def attention(maps: Tensor) -> Tensor:
    """``[B,C,H,W]`` to ``[B,HW]`` of norm 1."""
    return F.normalize(maps.square().mean(1).flatten(1), dim=1)
