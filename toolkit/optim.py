"""Optimizers, SAM, learning-rate schedules, averages of weights, and the statistics of batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from toolkit.recipe import Optimizer, Recipe, Schedule


class Muon(torch.optim.SGD):
    """Muon for the parameter groups with ``orthogonal=True``, SGD for the others.

    A filter bank ``[O,I,h,w]`` is taken as a matrix ``[O, I h w]``. Its step is the momentum of its gradient with
    all singular values brought near 1, times ``lr``; the bank itself is kept at norm sqrt(O), which changes
    nothing where BN follows. Products are computed in ``dtype``.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024), as in airbench94_muon.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **arguments: Any) -> None:
        self.dtype = dtype
        super().__init__(groups, **arguments)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no step needs its loss
        for group in self.param_groups:
            if not group["orthogonal"]:
                continue
            for filters in group["params"]:
                gradient, momentum = filters.grad, group["momentum"]
                if gradient is None:  # as in PyTorch's own
                    continue
                state = self.state[filters]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(filters)
                average = state["momentum_buffer"].mul_(momentum).add_(gradient)
                direction = gradient + momentum * average if group["nesterov"] else average
                filters.mul_(len(filters) ** 0.5 / filters.norm().clamp_min(1e-12))
                step = orthogonal(direction.flatten(1).to(self.dtype)).view(filters.shape)
                filters.add_(step, alpha=-group["lr"])
                filters.grad = None  # done: not for SGD
        super().step(closure)


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """``[R,C]`` with its singular values brought towards 1, by Newton-Schulz iterations.

    The quintic polynomial, its coefficients and the number of ``steps`` are those of airbench94_muon. It is steep at 0:
    after three steps what was above an eightieth of the matrix's norm is between about 0.5 and 1.2.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide if len(matrix) <= matrix.shape[1] else wide.T


def make_optimizer(config: Optimizer, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters: filters, other weights, biases and BN's weights, BN's biases.

    Each group carries ``lr_factor``, what the scheduled learning rate is multiplied by. ``dtype`` is what Muon
    computes in.
    """
    filters, weights, small, norm_biases = [], [], [], []
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if norm and name == "bias":
                norm_biases.append(parameter)
            elif norm or name == "bias":
                small.append(parameter)
            elif parameter.ndim == 4 and config.name == "muon":
                filters.append(parameter)
            else:
                weights.append(parameter)
    decay = config.weight_decay
    small_decay = decay if config.decay_norm else 0.0
    groups: list[dict[str, Any]] = [
        {
            "params": filters,
            "orthogonal": True,
            "momentum": config.filter_momentum,
            "weight_decay": 0.0,
            "lr_factor": config.filter_lr / config.lr,
        },
        {"params": weights, "weight_decay": decay, "lr_factor": 1.0},
        {"params": small, "weight_decay": small_decay, "lr_factor": 1.0},
        {
            "params": norm_biases,
            # Decay acts through the learning rate: keep its strength when the rate is raised.
            "weight_decay": small_decay / config.norm_bias_lr,
            "lr_factor": config.norm_bias_lr,
        },
    ]
    groups = [{"orthogonal": False} | group for group in groups if group["params"]]
    if config.name in ("adam", "adamw"):
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    arguments: Any = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov, "fused": True}
    return Muon(groups, dtype, **arguments) if config.name == "muon" else torch.optim.SGD(groups, **arguments)


def lr_factor(config: Schedule, done: float, epochs: int) -> float:
    """Factor on the peak learning rate when ``done`` of ``epochs`` are done, a fraction of one counted as such."""
    warmup = config.warmup_epochs
    if done < warmup:
        return config.initial_fraction + (1 - config.initial_fraction) * done / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return config.gamma ** sum(done >= milestone for milestone in config.milestones)
    progress = (done - warmup) / (epochs - warmup)
    fall = progress if config.name == "triangular" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - config.final_fraction) * fall


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The weights that are kept in place of the trained ones: an exponential average, Lookahead's, SWA's, or none.

    The first two average BN's buffers too (without them 0.4 points are lost).
    """
    if recipe.optimizer.lookahead_steps:
        return Lookahead(model, recipe.optimizer.lookahead_steps, recipe.optimizer.lookahead_alpha)
    if recipe.swa_start is not None:
        return StochasticAverage(model, recipe.swa_start)
    if recipe.average_decay:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay), use_buffers=True)
    return None


class Lookahead(AveragedModel):
    """Slow weights that every ``steps`` updates move by ``alpha`` to the trained ones, which then go on from there.

    Around any optimizer. The slow weights are the ones to evaluate (Zhang et al., arXiv 1907.08610).
    """

    updates: Tensor

    def __init__(self, model: nn.Module, steps: int, alpha: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(1 - alpha), use_buffers=True)
        self.steps = steps
        self.n_averaged.fill_(1)  # the slow weights begin as the model's, not as those of the first update
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        self.updates += 1
        if self.updates % self.steps:
            return
        super().update_parameters(model)
        for fast, slow in zip(model.parameters(), self.module.parameters(), strict=True):
            fast.copy_(slow)


class StochasticAverage(AveragedModel):
    """The mean of the weights at the ends of the epochs after the first ``start``; until then the trained weights.

    BN's statistics are not those of the mean weights: see ``estimate_norms`` (SWA, Izmailov et al., arXiv 1803.05407).
    """

    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__(model)
        self.start = start

    def update_parameters(self, model: nn.Module) -> None:
        """Nothing after a step."""

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        """After epoch ``epoch`` (from 1)."""
        if epoch <= self.start + 1:
            self.n_averaged.zero_()  # the next model is copied
        super().update_parameters(model)


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def estimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the statistics of batch normalisation anew, as means over batches of images ``[B,3,H,W]`` in [0,1].

    All else runs as in evaluation. The model is in eval mode after.
    """
    model.eval()
    momenta = {norm: norm.momentum for norm in norms(model)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        norm.eval()


@contextmanager
def ascended(model: nn.Module, trained: Iterable[Tensor], radius: float) -> Iterator[None]:
    """The trained weights moved by ``radius`` up their gradient, which is cleared: for the gradient there.

    The second half of a step of sharpness-aware minimisation: the weights come back after, the new gradient stays
    (Foret et al., arXiv 2010.01412). The running statistics of the model's BN stay those of the weights themselves.
    """
    moved = [parameter for parameter in trained if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    momenta = {norm: norm.momentum for norm in norms(model)}
    with torch.no_grad():
        scale = radius / (nn.utils.get_total_norm(gradients) + 1e-12)
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter += scale * gradient
            parameter.grad = None
        for norm in momenta:
            norm.momentum = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
