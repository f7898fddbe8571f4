"""LAMB (You et al., arXiv 1904.00962, algorithm 2) by timm's kernels, with its count of steps on the device."""

from collections.abc import Callable

import torch
from torch.optim import Optimizer


class Lamb(Optimizer):
    """`timm.optim.Lamb` counts its steps on the host, which does not know which of them were left out, and whose count
    a recorded step would keep for ever. Here the count is a tensor in the state of each group's first parameter.

    Args:
        groups: of parameters. lr: learning rate, > 0. betas: of the two moments, in [0, 1). eps: added to the root of
        the second. weight_decay: >= 0; where it is 0, the step is not scaled to the norm of the weight.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        from timm.optim.lamb import lamb

        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._lamb: Callable[..., None] = lamb  # declared with numbers, where a tensor does as well
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            self.state[group["params"][0]]["steps"] = torch.zeros((), device=group["params"][0].device)

    @torch.no_grad()
    # pyrefly: ignore[bad-override]: nobody hands over a closure
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            steps = self.state[group["params"][0]]["steps"].add_(1)
            beta1, beta2 = group["betas"]
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in parameters]
            self._lamb(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                foreach=True,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                beta3=1 - beta1,
                bias_correction1=1 - torch.pow(beta1, steps),
                bias_correction2=1 - torch.pow(beta2, steps),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled_decay=False,
                max_lr=None,
                trust_clip=False,
                always_adapt=False,
                caution=False,
            )
