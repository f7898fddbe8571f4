"""Sums that stay on the device until they are read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcd.engine.distributed import sum_over_ranks


@dataclass(frozen=True)
class Summary:
    """Means over `images` images of all ranks; top1 and top5 in percent."""

    loss: float
    top1: float
    top5: float
    images: int


class Metrics:
    """Sums of loss, top-1 and top-5 hits and images on `device`, without a synchronisation until `reduce`."""

    def __init__(self, device: torch.device):
        # float64: counts stay exact, and a sum of losses does not depend on how the ranks split it
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: the sum of its losses (a scalar), logits (N, K) and labels (N,)."""
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
        hits = top == labels[:, None]
        self._sums[0] += loss_sum
        self._sums[1] += hits[:, 0].sum()
        self._sums[2] += hits.sum()
        self._sums[3] += len(labels)

    def reduce(self) -> Summary:
        """The means over all ranks, on every rank; waits for the device, and starts again from zero."""
        loss, top1, top5, images = sum_over_ranks(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        count = max(1, images)
        return Summary(loss / count, 100 * top1 / count, 100 * top5 / count, int(images))
