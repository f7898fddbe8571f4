"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from training.options import ConfigError, OptimConfig


def sgd(groups: list[dict], config: OptimConfig) -> SGD:
    """SGD with momentum."""
    optimizer = SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.wd,
        nesterov=config.nesterov,
        # One kernel for all parameters; and with it GradScaler.step does not wait for the device.
        fused=True,
    )
    if config.momentum:
        # Fused SGD takes its first buffers from uninitialised memory, and leaves them so when GradScaler skips the
        # first step, as it does in fp16. Zeros give the same first step.
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# By the names of `OptimConfig.optimizer`: from groups of parameters and the options to an optimizer that is fused, for
# `SafeStep` leaves out an update by its `found_inf`.
OPTIMIZERS: dict[str, Callable[[list[dict], OptimConfig], Optimizer]] = {"sgd": sgd}


def build_optimizer(model: nn.Module, config: OptimConfig, lr: Tensor | None = None) -> Optimizer:
    """The optimizer of what is not frozen; `--no-norm-decay` takes weight decay from batch norms and biases (one
    dimension).

    Args:
        lr: a scalar on the device, float32: what it holds at a step is the learning rate. By default that of `config`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.norm_decay or p.dim() > 1]
    spared = [p for p in trained if not config.norm_decay and p.dim() <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = OPTIMIZERS[config.optimizer]([group for group in groups if group["params"]], config)
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    return optimizer


def learning_rate(config: OptimConfig, epochs_done: float) -> float:
    """The learning rate so many epochs after the start, a fraction within an epoch; >= 0."""
    warmup = config.warmup_epochs if config.warmup else 0
    if epochs_done < warmup:
        return config.lr * epochs_done / warmup
    share = (epochs_done - warmup) / (config.epochs - warmup)  # of the decay that is done, in [0, 1]
    match config.lr_decay:
        case "schedule":
            return config.lr * config.gamma ** sum(epoch <= epochs_done for epoch in config.schedule)
        case "step":
            return config.lr * config.gamma ** (epochs_done // config.step)
        case "cos":
            return config.lr * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return config.lr * (1 - share)
    raise ConfigError(f"unknown --lr-decay {config.lr_decay}")
