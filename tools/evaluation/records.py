"""What a model answers to each image, gathered over the ranks; every figure is computed from these records."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import sum_over_ranks

TOP = 5
COUNT, LABEL, CONFIDENCE, FIRST = range(4)  # columns of a record; FIRST and those behind it are the answers


class Answers(NamedTuple):
    """A model's answers to N images, in the order of the dataset, on the CPU.

    labels: (N,) int64. confidences: (N,) float64, the probability of the best answer, in [0, 1]; nan where the logits
    are no finite numbers. top: (N, 5) int64, the most probable classes, best first; -1 there, too, and where the model
    has fewer.
    """

    labels: Tensor
    confidences: Tensor
    top: Tensor

    @property
    def hits(self) -> Tensor:
        """(N, 5) bool: which of the answers is the label."""
        return self.top == self.labels[:, None]


class Records:
    """The answers of this rank, on the device: `collect` does not wait for it, `gather` does."""

    def __init__(self):
        self._indices: list[Tensor] = []
        self._rows: list[Tensor] = []

    def collect(self, indices: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Add a batch, see `Evaluator.evaluate`."""
        finite = logits.isfinite().all(1, keepdim=True)  # [N, 1]
        top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
        top = torch.where(finite, F.pad(top, (0, TOP - top.shape[1]), value=-1), -1)  # [N, 5]
        confidences = torch.where(finite, logits.float().softmax(1).amax(1, keepdim=True), torch.nan)  # [N, 1]
        columns = [torch.ones_like(confidences), labels[:, None], confidences, top]
        self._indices.append(indices)
        self._rows.append(torch.cat([column.double() for column in columns], dim=1))

    def gather(self, num_images: int, device: torch.device) -> Answers:
        """The answers of all ranks to the `num_images` images of the dataset, on every rank."""
        table = torch.zeros(num_images, FIRST + TOP, dtype=torch.float64, device=device)
        if self._rows:
            table.index_add_(0, torch.cat(self._indices).to(device), torch.cat(self._rows))
        table = sum_over_ranks(table).cpu()
        if not (table[:, COUNT] == 1).all():
            raise RuntimeError("an image was evaluated twice, or not at all")
        return Answers(table[:, LABEL].long(), table[:, CONFIDENCE], table[:, FIRST:].long())
