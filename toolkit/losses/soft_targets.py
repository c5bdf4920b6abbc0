"""Soft targets: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (arXiv 1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SoftTargets(nn.Module):
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, in nats, the mean over the batch.

    The factor T squared keeps the gradient's size independent of ``temperature``, as in the paper. Computed in
    float32; no gradient reaches the teacher. Logits ``[B,K]`` twice, result a scalar.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student.float() / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher.detach().float() / self.temperature, dim=1)
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2
