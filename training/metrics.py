"""Sums that stay on the device until they are read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.distributed import sum_over_ranks


@dataclass(frozen=True)
class Summary:
    """Means over `images` images of all ranks; top1 and top5 in percent.

    not_finite: how many images had logits that were not finite. They count as wrong, and the loss is then nan.
    flipped: whether the logits are the mean of those of each image and its mirror image, as by --eval-flip.
    """

    loss: float
    top1: float
    top5: float
    images: int
    not_finite: int = 0
    flipped: bool = False

    @property
    def counted(self) -> str:
        """Over what the means are, in words."""
        return f"{self.images} images" + (", each with its mirror image" if self.flipped else "")

    @property
    def warning(self) -> str:
        """What to say where there are such images."""
        return (
            f"{self.not_finite} of {self.images} images have logits that are no finite numbers, and count as wrong; "
            "early in a training a few images that are unlike the others can do that to a dynamic network, "
            "whose layers multiply their input by a function of it (--zero-init-fusion begins without)"
        )


class Metrics:
    """Sums of loss, top-1 and top-5 hits and images on `device`, without a synchronisation until `reduce`."""

    def __init__(self, device: torch.device):
        # float64: counts stay exact, and a sum of losses does not depend on how the ranks split it
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Add one batch: the sum of its losses (a scalar), logits (N, K) and labels (N,).

        Returns:
            (N,) bool, the images whose logits are finite.
        """
        finite = logits.isfinite().all(1)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
        hits = (top == labels[:, None]) & finite[:, None]
        # One image with an infinite loss would make the sum infinite; nan says that there is no sum.
        self._sums[0] += torch.where(finite.all(), loss_sum, torch.nan)
        self._sums[1] += hits[:, 0].sum()
        self._sums[2] += hits.sum()
        self._sums[3] += len(labels)
        self._sums[4] += (~finite).sum()
        return finite

    def reduce(self) -> Summary:
        """The means over all ranks, on every rank; waits for the device, and starts again from zero."""
        loss, top1, top5, images, not_finite = sum_over_ranks(self._sums).tolist()
        self._sums.zero_()
        count = max(1, images)
        return Summary(loss / count, 100 * top1 / count, 100 * top5 / count, int(images), int(not_finite))
