"""Schedules against PyTorch's own, parameter groups, averages of weights, BN's statistics and SAM."""

import pytest
import torch
from torch import nn

from toolkit.optim import (
    ascended,
    estimate_norms,
    lr_factor,
    make_average,
    make_optimizer,
    orthogonal,
    set_lr,
)
from toolkit.recipe import Optimizer, Schedule, resolve


def torchs(scheduler, steps, **arguments):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = scheduler(optimizer, **arguments)
    factors = []
    for _ in range(steps):
        factors.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return factors


def ours(steps, per_epoch=10, **config):
    return [lr_factor(Schedule(**config), step / per_epoch, steps // per_epoch) for step in range(steps)]


def test_cosine_is_pytorchs():
    expected = torchs(torch.optim.lr_scheduler.CosineAnnealingLR, 50, T_max=50)
    assert ours(50, name="cosine") == pytest.approx(expected)


def test_step_is_pytorchs():
    expected = torchs(torch.optim.lr_scheduler.MultiStepLR, 50, milestones=[20, 40], gamma=0.2)
    assert ours(50, name="step", milestones=(2, 4), gamma=0.2) == pytest.approx(expected)


def test_triangular_is_two_straight_lines():
    expected = torchs(torch.optim.lr_scheduler.LinearLR, 10, start_factor=0.2, end_factor=1.0, total_iters=10)
    expected += torchs(torch.optim.lr_scheduler.LinearLR, 40, start_factor=1.0, end_factor=0.1, total_iters=40)
    config = {"name": "triangular", "warmup_epochs": 1, "initial_fraction": 0.2, "final_fraction": 0.1}
    assert ours(50, **config) == pytest.approx(expected)


def test_constant_stays_after_its_warm_up():
    assert ours(30, name="constant", warmup_epochs=2)[:3] == pytest.approx([0, 0.05, 0.1])
    assert set(ours(30, name="constant", warmup_epochs=2)[20:]) == {1.0}


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("decay_norm", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_every_parameter_is_in_one_group_with_its_decay_and_rate(name, decay_norm):
    model = net()
    config = Optimizer(
        name=name, lr=0.5, momentum=0.8, weight_decay=0.1, decay_norm=decay_norm, norm_bias_lr=8, filter_lr=0.3
    )
    optimizer = make_optimizer(config, model)
    assert type(optimizer).__name__.lower() == name
    assert optimizer.defaults.get("betas", (config.momentum,))[0] == optimizer.defaults.get("momentum", 0.8) == 0.8
    set_lr(optimizer, 0.25)
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group["weight_decay"], group["lr"])
    small = 0.1 if decay_norm else 0.0
    expected = {
        model[0].weight: (0.0, 0.15) if name == "muon" else (0.1, 0.25),
        model[0].bias: (small, 0.25),
        model[1].weight: (small, 0.25),
        model[1].bias: (small / 8, 2.0),
        model[4].weight: (0.1, 0.25),
        model[4].bias: (small, 0.25),
    }
    assert seen == {id(parameter): values for parameter, values in expected.items()}


def test_the_average_holds_the_buffers_of_batch_norm_too():
    model = net()
    average = make_average(model, resolve({"student": {"name": "tpsnet"}, "average_decay": 0.8}, "distill"))
    average.update_parameters(model)  # the first update copies
    parts = [(model[1].running_mean, average.module[1].running_mean), (model[0].weight, average.module[0].weight)]
    expected = [0.8 * trained.detach() + 0.2 * 3 for trained, _ in parts]
    for trained, _ in parts:
        nn.init.constant_(trained, 3.0)
    average.update_parameters(model)
    for (_, averaged), values in zip(parts, expected, strict=True):
        torch.testing.assert_close(averaged.detach(), values)


def test_swa_is_the_mean_of_the_epochs_after_its_start():
    model = net()
    average = make_average(model, resolve({"student": {"name": "tpsnet"}, "epochs": 9, "swa_start": 2}, "distill"))
    seen = []
    for epoch in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update_parameters(model)  # a step: no part of it
        average.end_epoch(model, epoch)
        seen.append(model[0].weight.detach().clone())
        expected = seen[-1] if epoch <= 2 else torch.stack(seen[2:]).mean(0)
        torch.testing.assert_close(average.module[0].weight.detach(), expected)


def test_norms_are_estimated_as_means_over_the_batches_and_nothing_else_is_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.9), nn.Conv2d(4, 2, 1))
    model.append(nn.BatchNorm2d(2))
    for _ in range(3):
        model(torch.rand(5, 3, 8, 8))
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    batches = list(torch.rand(4, 10, 3, 8, 8))
    estimate_norms(model, batches)
    assert not any(module.training for module in model.modules())
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    with torch.no_grad():
        maps = [model[0](images) for images in batches]
        torch.testing.assert_close(model[1].running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
        torch.testing.assert_close(model[1].running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))


def test_sam_takes_the_gradient_where_the_loss_has_risen_and_comes_back():
    """Against Foret et al.'s equations 2 and 3, on a net with BN, whose statistics see the first pass alone."""
    model, images, labels = net(), torch.rand(6, 3, 3, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    twin = net()
    twin.load_state_dict(model.state_dict())

    def backward(of):
        loss = nn.functional.cross_entropy(of(images), labels)
        loss.backward()
        return loss.item()

    first = backward(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ascended(model, model.parameters(), 0.3):
        assert all(parameter.grad is None for parameter in model.parameters())
        assert backward(model) > first
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "num_batches" not in name)
    assert model[1].momentum == 0.1

    backward(twin)
    gradients = [parameter.grad for parameter in twin.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter += 0.3 * gradient / norm
            parameter.grad = None
    backward(twin)
    for ours_, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, theirs.grad)


def test_lookahead_is_the_papers_two_lines():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    slow = [parameter.detach().clone() for parameter in model.parameters()]
    changes = {"student.name": "tpsnet", "optimizer.lookahead_steps": 3, "optimizer.lookahead_alpha": 0.3}
    average = make_average(model, resolve({}, "distill", changes))
    for update in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            model[1].running_mean += 1
        fast = [parameter.detach().clone() for parameter in model.parameters()]
        average.update_parameters(model)
        if update % 3 == 0:
            slow = [old + 0.3 * (new - old) for old, new in zip(slow, fast, strict=True)]
            fast = slow
        for expected, found in zip(fast, model.parameters(), strict=True):
            torch.testing.assert_close(found.detach(), expected)
        for expected, found in zip(slow, average.module.parameters(), strict=True):
            torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(average.module[1].running_mean, torch.full((2,), 0.7 * 0.3 * 3 + 0.3 * 6))


@pytest.mark.parametrize("shape", [(8, 27), (40, 12), (16, 16)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_orthogonal_matrix_keeps_the_directions_of_the_gradient(shape, size):
    matrix = size * torch.randn(shape)
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ v.T  # diagonal where the singular vectors are kept
    torch.testing.assert_close(found, found.diagonal().diag(), atol=1e-4, rtol=0)
    large = found.diagonal()[sizes > 0.013 * matrix.norm()]
    assert len(large) > 0.9 * len(sizes)
    assert 0.5 < large.min() <= found.max() < 1.25


def test_muon_leaves_filters_without_a_gradient_as_they_are():
    """As those behind the features that a method compares, where nothing else is learnt from."""
    model = net()
    before = model[0].weight.detach().clone()
    make_optimizer(Optimizer(name="muon"), model).step()
    assert torch.equal(model[0].weight, before)


def test_muon_takes_filters_that_are_zero():
    model = net()
    nn.init.zeros_(model[0].weight)
    optimizer = make_optimizer(Optimizer(name="muon"), model)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer.step()
    assert 0 < model[0].weight.norm() < 1


def test_muon_steps_filters_by_their_rate_and_the_rest_as_sgd():
    model = net()
    config = Optimizer(name="muon", lr=0.1, weight_decay=0, momentum=0.9, filter_lr=0.25, filter_momentum=0.5)
    optimizer, sgd = make_optimizer(config, model), torch.optim.SGD(
        (twin := nn.Linear(4, 2)).parameters(), lr=0.1, momentum=0.9, nesterov=True
    )  # fmt: skip
    twin.load_state_dict(model[4].state_dict())
    set_lr(optimizer, 0.1)
    momentum = torch.zeros_like(model[0].weight)
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = model[0].weight.detach().clone()
        momentum = model[0].weight.grad + 0.5 * momentum
        direction = model[0].weight.grad + 0.5 * momentum  # Nesterov's
        for ours_, theirs in zip(model[4].parameters(), twin.parameters(), strict=True):
            theirs.grad = ours_.grad.clone()
        optimizer.step()
        sgd.step()
        optimizer.zero_grad()
        step = -0.25 * orthogonal(direction.flatten(1)).view_as(direction)
        torch.testing.assert_close(model[0].weight.detach(), before * 2 / before.norm() + step)  # four filters: norm 2
    torch.testing.assert_close(model[4].weight, twin.weight)
