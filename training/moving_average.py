"""A moving average of a model's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """The exponential moving average of the parameters and buffers of a model; numbers that count are copied.

    PyTorch's own update reads and copies its counter in a way for which the host waits for the GPU in every step.

    Args:
        model: what the average begins with. decay: the share of the average that an update keeps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self._decay = decay

    def begin_with(self, model: nn.Module) -> None:
        """Let the average be what the model is, as its first value."""
        self.module.load_state_dict(model.state_dict())
        self.n_averaged.fill_(1)

    def update_parameters(self, model: nn.Module) -> None:
        """Bring in the model; the first time the average becomes what it is."""
        self.bring_in(model)
        self.count()

    def count(self) -> None:
        """The part of an update that is the host's: `n_averaged` stays on the CPU."""
        self.n_averaged += 1

    @torch.no_grad()
    def bring_in(self, model: nn.Module) -> None:
        """The part of an update that is the device's. It may be recorded, but for the first time."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        values = [*model.parameters(), *model.buffers()]
        share = 1 - self._decay if self.n_averaged else 1.0
        pairs = list(zip(averages, values, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        averages, values = zip(*floats, strict=True)
        torch._foreach_lerp_(averages, values, share)
        if counts:
            averages, values = zip(*counts, strict=True)
            torch._foreach_copy_(averages, values)
