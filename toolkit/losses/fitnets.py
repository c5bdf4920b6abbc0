"""Hints: Romero et al.: FitNets: Hints for Thin Deep Nets (arXiv 1412.6550)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.features import same_size
from toolkit.recipe import FeatureMethod


class Params(FeatureMethod):
    """The weight is ours: the paper trains on hints alone, of one pair, before it turns to the labels."""


class Term(nn.Module):
    """``mean((r(s) - t)^2)``, summed over the pairs of feature maps s and t ``[B,C,H,W]``.

    ``r`` is a regressor for each pair, a 1x1 conv from the student's channels to the teacher's and BN. It is trained
    with the student and is no part of it (the paper's has no BN, and its loss is half of the sum instead of the mean).
    The unit is that of the teacher's features, squared. Of two maps of different size the larger one is averaged to
    the other's.
    """

    def __init__(self, params: Params, shapes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        super().__init__()
        self.regressors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student[0], teacher[0], 1, bias=False), nn.BatchNorm2d(teacher[0]))
            for student, teacher in shapes
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        loss = student[0].new_zeros(()).float()
        for regressor, s, t in zip(self.regressors, student, teacher, strict=True):
            loss = loss + F.mse_loss(*same_size(regressor(s.float()), t.detach().float()))
        return loss
