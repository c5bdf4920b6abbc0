"""Optimizers, learning-rate schedules and the average of weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from toolkit.recipe import Optimizer, Schedule


def make_optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over three groups: weights, other parameters of norms and biases, biases of norms.

    Each group carries ``lr_factor``, what the scheduled learning rate is multiplied by.
    """
    norm_biases, small, weights = [], [], []
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if norm and name == "bias":
                norm_biases.append(parameter)
            elif norm or name == "bias":
                small.append(parameter)
            else:
                weights.append(parameter)
    decay = config.weight_decay
    small_decay = decay if config.decay_norm else 0.0
    groups = [
        {"params": weights, "weight_decay": decay, "lr_factor": 1.0},
        {"params": small, "weight_decay": small_decay, "lr_factor": 1.0},
        {
            "params": norm_biases,
            # Decay acts through the learning rate: keep its strength when the rate is raised.
            "weight_decay": small_decay / config.norm_bias_lr,
            "lr_factor": config.norm_bias_lr,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)


def lr_factor(config: Schedule, step: int, steps: int, steps_per_epoch: int) -> float:
    """Factor on the peak learning rate at ``step`` of ``steps``, both counted in optimizer updates from 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.initial_fraction + (1 - config.initial_fraction) * step / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    progress = (step - warmup) / max(steps - warmup, 1)
    fall = progress if config.name == "triangular" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - config.final_fraction) * fall


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential average of parameters and of BN's buffers (without them 0.4 points are lost)."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
