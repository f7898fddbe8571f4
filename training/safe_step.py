"""Optimizer steps that spoil nothing: an update that is not finite is left out, a step that breaks off is undone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer


class SafeStep:
    """Steps the optimizer where the gradient is finite, without waiting for the device.

    Args:
        model: that is trained. optimizer, scaler: its own; a scaler that is enabled (fp16) decides by itself.
        clip_grad: highest norm of the gradient; None for any.
        average: a moving average whose statistics are kept like the model's, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler,
        clip_grad: float | None,
        average: nn.Module | None,
    ):
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer: Any = optimizer  # gets an attribute `found_inf` for a step
        self._scaler, self._clip_grad = scaler, clip_grad
        buffers = [*model.buffers(), *(average.buffers() if average is not None else ())]
        buffers.sort(key=torch.is_floating_point)  # the counts first: see `_copy`
        self._statistics = buffers
        self._before = [torch.empty_like(values) for values in buffers]
        self._kept = [torch.empty_like(values) for values in buffers]
        self._begun = self._updating = False

    def begin(self) -> None:
        """Before the forward pass, which changes the statistics of batch norms."""
        _copy(self._before, self._statistics)
        self._begun = True

    def update(self) -> Tensor:
        """Clip and step. Returns, on the device, 1.0 where the step was left out and 0.0 otherwise."""
        self._updating = True
        if self._scaler.is_enabled():
            return self._update_scaled()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        skipped = (~norm.isfinite()).float()
        if self._clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip_grad, norm)
        self._optimizer.found_inf = skipped  # by which GradScaler, too, tells a fused optimizer
        self._optimizer.step()
        del self._optimizer.found_inf
        return skipped

    def _update_scaled(self) -> Tensor:
        if self._clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._clip_grad)
        self._scaler.step(self._optimizer)
        # Private, but all that is public is the scale, which makes the host wait and tells less.
        found = self._scaler._found_inf_per_device(self._optimizer)
        skipped = torch.stack([flag.float().sum() for flag in found.values()]).amax()
        self._scaler.update()
        return skipped

    def end(self) -> None:
        """The step is done, with all that belongs to it."""
        self._begun = self._updating = False

    def forget(self) -> None:
        """The step that has begun never ran: its recording broke off."""
        if self._scaler.is_enabled():
            self._scaler._per_optimizer_states.clear()  # private: it may have noted that gradients are unscaled
        self.end()

    def break_off(self) -> bool:
        """After an error: undo the step that was running. Returns whether that was possible."""
        if self._begun and not self._updating:
            _copy(self._statistics, self._before)
            self._begun = False
        return not self._updating

    def keep_statistics(self) -> None:
        """All is well: `restore_statistics` will go back to the statistics of now."""
        _copy(self._kept, self._statistics)

    def restore_statistics(self) -> None:
        """Go back: a batch that is not finite has spoilt the running statistics."""
        _copy(self._statistics, self._kept)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy counts and numbers apart: a list of one dtype is one kernel on a GPU, a mixed one is a kernel for each."""
    counts = sum(not values.is_floating_point() for values in targets)
    for part in (slice(counts), slice(counts, None)):
        if targets[part]:
            torch._foreach_copy_(targets[part], sources[part])
