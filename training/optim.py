"""Optimizer and learning-rate schedule."""

import math

from torch import Tensor, nn
from torch.optim import Optimizer

from training.optimizers import OPTIMIZERS, WITH_LR_ON_HOST
from training.options import ConfigError, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, lr: Tensor | None = None) -> Optimizer:
    """The optimizer of what is not frozen; `--no-norm-decay` takes weight decay from batch norms and biases (one
    dimension).

    Args:
        lr: a scalar on the device, float32: what it holds at a step is the learning rate, unless the optimizer is
            `WITH_LR_ON_HOST`. By default that of `config`.

    Raises:
        ConfigError: the optimizer is of a package that is not there.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.norm_decay or p.dim() > 1]
    spared = [p for p in trained if not config.norm_decay and p.dim() <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    if config.optimizer == "muon":
        groups = [part for group in groups for part in _classifier_apart(group, model)]
    optimizer = OPTIMIZERS[config.optimizer]([group for group in groups if group["params"]], config)
    for group in optimizer.param_groups if lr is not None and config.optimizer not in WITH_LR_ON_HOST else ():
        group["lr"] = lr
    return optimizer


def _classifier_apart(group: dict, model: nn.Module) -> list[dict]:
    """Muon is for hidden weights: those of `model.classifier` in a group of their own, for AdamW."""
    # pyrefly: ignore[missing-attribute]: a module
    ids = {id(parameter) for parameter in getattr(model, "classifier", nn.Identity()).parameters()}
    hidden = [parameter for parameter in group["params"] if id(parameter) not in ids]
    last = [parameter for parameter in group["params"] if id(parameter) in ids]
    return [{**group, "params": hidden}, {**group, "params": last, "use_fallback": True}]


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
