"""Decoupled distillation: Zhao et al.: Decoupled Knowledge Distillation (arXiv 2203.08679)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from toolkit.errors import RecipeError
from toolkit.recipe import Method, Ramp, Weight


class Params(Method):
    terms: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    weight: Weight = Field(
        Ramp(start=0, end=1, over=20 / 240),
        description="weight of this method among the methods; the paper warms it up over 20 of 240 epochs",
    )
    alpha: float = Field(1, ge=0, description="weight of how sure the teacher is of the target class")
    beta: float = Field(8, ge=0, description="weight of how the teacher ranks the other classes")


class Term(nn.Module):
    """``T^2 (alpha KL(b(t) || b(s)) + beta KL(o(t) || o(s)))``, in nats, the mean over the batch.

    For logits s and t ``[B,K]`` divided by the temperature T: ``b`` is the probabilities of the target class and of all
    others together, ``o`` those of the other classes among themselves. Soft targets are the case in which beta is the
    teacher's probability of the other classes. The target of a mixed image is the class that has most of it. Of two
    classes there is one other, whose ``o`` is 1: beta teaches nothing then, and ``RecipeError`` is raised where
    ``alpha`` is 0.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.alpha, self.beta = params.alpha, params.beta

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        if student.shape[1] < 3 and not self.alpha:
            raise RecipeError("loss.methods.dkd: beta teaches nothing of two classes: give an alpha above 0")
        target = labels.argmax(1, keepdim=True)
        binary_s, others_s = decouple(student.float() / temperature, target)
        binary_t, others_t = decouple(teacher.detach().float() / temperature, target)
        on_target, on_others = divergence(binary_t, binary_s), divergence(others_t, others_s)
        return (self.alpha * on_target + self.beta * on_others) * temperature**2


def decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities ``[B,2]`` of the target ``[B,1]`` and of the rest, and ``[B,K-1]`` of the rest's classes."""
    classes = logits.shape[1]
    others = (target + torch.arange(1, classes, device=logits.device)) % classes
    rest = logits.gather(1, others)
    binary = torch.cat([logits.gather(1, target), rest.logsumexp(1, keepdim=True)], dim=1)
    return binary.log_softmax(1), rest.log_softmax(1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)``, the mean over the rows."""
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()
