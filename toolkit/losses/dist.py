"""DIST, correlations: Huang et al.: Knowledge Distillation from A Stronger Teacher (arXiv 2205.10536)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from toolkit.errors import RecipeError
from toolkit.recipe import Method


class Params(Method):
    terms: ClassVar[tuple[str, ...]] = ("beta", "gamma")

    beta: float = Field(2, ge=0, description="weight of the relations between the classes of an image")
    gamma: float = Field(2, ge=0, description="weight of the relations between the images, for each class")


class Term(nn.Module):
    """``T^2 (beta mean_i (1 - r(s_i, t_i)) + gamma mean_k (1 - r(s^k, t^k)))``.

    For probabilities s and t ``[B,K]`` at the temperature T: ``r`` is Pearson's correlation, ``s_i`` a row (one image),
    ``s^k`` a column (one class). A correlation has no unit, and does not ask for the teacher's scale. The factor T
    squared is the authors'. The images are those of one part of a batch where it is taken in parts; a single one has no
    relations between images, and the second term is left out. The first one needs three classes: two numbers are always
    correlated by 1 or -1, which has no gradient. With two ``RecipeError`` is raised where ``gamma`` is 0.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.beta, self.gamma = params.beta, params.gamma

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        if student.shape[1] < 3 and not self.gamma:
            raise RecipeError("loss.methods.dist: beta teaches nothing of two classes: give a gamma above 0")
        s = (student.float() / temperature).softmax(1)
        t = (teacher.detach().float() / temperature).softmax(1)
        loss = self.beta * (1 - correlation(s, t)).mean()
        if len(s) > 1:
            loss = loss + self.gamma * (1 - correlation(s.T, t.T)).mean()
        return loss * temperature**2


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of ``[M,N]`` with that of the other, ``[M]``; 0 with a constant row."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-12)
