"""The optimizers of `--optimizer`: each a function from groups of parameters and the options to an optimizer.

An optimizer leaves out a step by its `found_inf`, which lies on the device: PyTorch's fused ones do so by themselves,
the others by `left_out.leave_out_by_found_inf`.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch.optim import SGD, AdamW, Optimizer

from training.lamb import Lamb
from training.left_out import leave_out_by_found_inf
from training.nvidia_apex import fused_optimizer
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


def adamw(groups: list[dict], config: OptimConfig) -> AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""
    options = {"betas": config.betas, "eps": _eps(config, 1e-8), "weight_decay": config.wd}
    optimizer = AdamW(groups, lr=config.lr, fused=True, capturable=True, **options)
    # Private: an optimizer that may be recorded would warn of each step that is not, as the first ones are not.
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def lamb(groups: list[dict], config: OptimConfig) -> Optimizer:
    """AdamW with a step in proportion to each weight's norm (You et al., arXiv 1904.00962), of timm.

    `--clip-grad` alone clips; weights that `--no-norm-decay` spares keep a step of their own, as in timm.
    """
    _timm_optim(config)
    return leave_out_by_found_inf(Lamb(groups, config.lr, config.betas, _eps(config, 1e-6), config.wd))


def lars(groups: list[dict], config: OptimConfig) -> Optimizer:
    """SGD with a step in proportion to each weight's norm (You et al., arXiv 1708.03888, eq. 6), of timm.

    The trust coefficient is 0.001, the paper's. Weights that `--no-norm-decay` spares are trained by plain SGD.
    """
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.wd}
    return leave_out_by_found_inf(_timm_optim(config).Lars(groups, lr=config.lr, foreach=True, **options))


def muon(groups: list[dict], config: OptimConfig) -> Optimizer:
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), of timm: it takes convolutions, too.

    Its step is as long as AdamW's (Liu et al., arXiv 2502.16982, eq. 4), so that AdamW's `--lr` and `--wd` fit. Weights
    of one dimension, depthwise convolutions, small ones and the groups with `use_fallback` are trained by AdamW.
    """
    on_gpu = groups[0]["params"][0].is_cuda  # where a step may be recorded, and has its count on the device
    optimizer = _timm_optim(config).Muon(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.wd,
        betas=config.betas,
        eps=_eps(config, 1e-7),
        capturable=on_gpu,
    )
    optimizer._warned_capturable_if_run_uncaptured = True  # as in `adamw`
    return leave_out_by_found_inf(optimizer)


def apex_sgd(groups: list[dict], config: OptimConfig) -> Optimizer:
    """The SGD of NVIDIA's apex."""
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.wd}
    kind = fused_optimizer("FusedSGD", config.optimizer, groups[0]["params"][0].device)
    return leave_out_by_found_inf(kind(groups, lr=config.lr, **options))


def apex_lamb(groups: list[dict], config: OptimConfig) -> Optimizer:
    """The LAMB of NVIDIA's apex. `--clip-grad` alone clips.

    It counts its steps on the host, those that are left out, too: its first steps after one are a little longer.
    """
    options = {"betas": config.betas, "eps": _eps(config, 1e-6), "weight_decay": config.wd}
    kind = fused_optimizer("FusedLAMB", config.optimizer, groups[0]["params"][0].device)
    return leave_out_by_found_inf(kind(groups, lr=config.lr, max_grad_norm=float("inf"), **options))


def _eps(config: OptimConfig, usual: float) -> float:
    return usual if config.eps is None else config.eps


def _timm_optim(config: OptimConfig) -> ModuleType:
    """`timm.optim`, an optional package."""
    try:
        import timm.optim
    except ImportError as error:
        raise ConfigError(f"--optimizer {config.optimizer} is timm's: pip install 'timm>=1.0.31'") from error
    return timm.optim


# By the names of `OptimConfig.optimizer`.
OPTIMIZERS: dict[str, Callable[[list[dict], OptimConfig], Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "muon": muon,
    "apex-sgd": apex_sgd,
    "apex-lamb": apex_lamb,
}
# Their kernels take the learning rate as a number from the host: a step of them cannot be recorded.
WITH_LR_ON_HOST = ("apex-sgd", "apex-lamb")
