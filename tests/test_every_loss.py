"""Each distillation loss against a straightforward computation of its own in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.losses.soft_targets import SoftTargets


def soft_targets_by_hand(student, teacher, temperature):
    """Sum over classes of p (log p - log q), mean over images, times T squared."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = s / temperature, t / temperature
        log_q = s - s.max() - np.log(np.exp(s - s.max()).sum())
        log_p = t - t.max() - np.log(np.exp(t - t.max()).sum())
        total += (np.exp(log_p) * (log_p - log_q)).sum()
    return temperature**2 * total / len(student)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 100), st.floats(0.5, 20), st.integers(0, 2**31))
def test_value_and_gradient(batch, classes, temperature, seed):
    random = np.random.default_rng(seed)
    student, teacher = random.normal(size=(2, batch, classes)) * 5
    ours = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = SoftTargets(temperature)(ours, torch.tensor(teacher, dtype=torch.float32))
    assert loss.item() == pytest.approx(soft_targets_by_hand(student, teacher, temperature), rel=1e-4, abs=1e-5)
    loss.backward()
    # d/ds = T (softmax(s/T) - softmax(t/T)) / B
    q, p = (np.exp(x / temperature - (x / temperature).max(1, keepdims=True)) for x in (student, teacher))
    expected = temperature * (q / q.sum(1, keepdims=True) - p / p.sum(1, keepdims=True)) / batch
    np.testing.assert_allclose(ours.grad.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_zero_where_student_equals_teacher_and_no_gradient_to_the_teacher():
    logits = torch.randn(4, 10, requires_grad=True)
    teacher = logits.detach().clone().requires_grad_()
    loss = SoftTargets(4)(logits, teacher)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    loss = SoftTargets(1)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
