"""Has an optimizer of any kind leave out a step by `found_inf`, without waiting for the device."""

import torch
from torch import Tensor
from torch.optim import Optimizer


def leave_out_by_found_inf(optimizer: Optimizer) -> Optimizer:
    """Give an optimizer what PyTorch's fused ones have: it takes part in `GradScaler.step`, and where its attribute
    `found_inf`, a scalar on the device, is 1.0 in a step, its weights and its state stay what they were.

    The step is done in any case. Weights and state are copied before it, and of the copies and what is there after it,
    one is chosen on the device: a few kernels for all tensors together, and memory for two copies during the step.

    Args:
        optimizer: whose state begins with zeros, and lies on the device as far as it depends on the steps.
    """
    _LeftOut(optimizer)
    return optimizer


class _LeftOut:
    """The two hooks around a step."""

    def __init__(self, optimizer: Optimizer):
        # pyrefly: ignore[missing-attribute]
        optimizer._step_supports_amp_scaling = True  # GradScaler then sets `found_inf` and `grad_scale`
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._tensors: list[Tensor] = []
        self._values: Tensor | None = None

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, scale.double().reciprocal().float())
        if hasattr(optimizer, "found_inf"):
            self._tensors = _changing(optimizer)
            self._values = _joined(self._tensors)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not hasattr(optimizer, "found_inf"):
            return
        known = set(map(id, self._tensors))
        new = [tensor for tensor in _changing(optimizer) if id(tensor) not in known]  # which the first step makes
        tensors = self._tensors + new
        after = _joined(tensors)
        assert self._values is not None
        before = torch.cat([self._values, after.new_zeros(len(after) - len(self._values))])
        torch.where(optimizer.found_inf > 0, before, after, out=after)
        torch._foreach_copy_([*map(_in_memory_order, tensors)], after.split([tensor.numel() for tensor in tensors]))
        self._tensors, self._values = [], None


def _changing(optimizer: Optimizer) -> list[Tensor]:
    """The weights, and their state on the same device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = [(p, value) for p in parameters if p in optimizer.state for value in optimizer.state[p].values()]
    return parameters + [value for p, value in values if isinstance(value, Tensor) and value.device == p.device]


def _joined(tensors: list[Tensor]) -> Tensor:
    """A copy of all values, one behind the other."""
    return torch.cat([*map(_in_memory_order, tensors)])


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view with one dimension; channels_last or not, a weight lies in memory without gaps."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
