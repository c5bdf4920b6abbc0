"""Standardised logits: Sun et al.: Logit Standardization in Knowledge Distillation (arXiv 2403.01427)."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from toolkit.errors import RecipeError
from toolkit.losses.soft_targets import soft_targets
from toolkit.recipe import Method, Weight


class Params(Method):
    weight: Weight = Field(9, description="weight of this method among the methods, in the paper beside ce_weight 0.1")
    base_temperature: float = Field(
        2, gt=0, description="what standardised logits, of standard deviation 1, are divided by; not loss.temperature"
    )


class Term(nn.Module):
    """Soft targets at ``base_temperature`` of ``z(s)`` and ``z(t)``, for logits s and t ``[B,K]``, in nats.

    ``z(x) = (x - mean(x)) / std(x)`` over the classes of each image, so that the student is asked for the teacher's
    relations between classes and not for the size of its logits; ``std`` is that of all K, as in the paper (its code
    divides by K - 1). Raises ``RecipeError`` for two classes, which have no relations but that one is larger.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.base_temperature = params.base_temperature

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        if student.shape[1] < 3:
            raise RecipeError(
                "loss.methods.standardised_logits: two standardised logits are always 1 and -1, which teaches nothing: "
                "take soft_targets"
            )
        return soft_targets(standardise(student), standardise(teacher.detach()), self.base_temperature)


def standardise(logits: Tensor) -> Tensor:
    """``[B,K]`` with mean 0 and variance 1 over the classes; logits that are all the same become 0."""
    return F.layer_norm(logits.float(), logits.shape[1:], eps=1e-7)
