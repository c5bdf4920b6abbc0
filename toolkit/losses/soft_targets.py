"""Soft targets: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (arXiv 1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.recipe import Method


class Params(Method):
    """The temperature is ``loss.temperature``; the paper has no other setting."""


class Term(nn.Module):
    """``T^2 KL(softmax(t / T) || softmax(s / T))``, in nats, the mean over the batch, for logits s and t ``[B,K]``.

    The factor T squared keeps the gradient's size independent of the temperature T, as in the paper.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return soft_targets(student.float(), teacher.detach().float(), temperature)


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The formula of ``Term``."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
