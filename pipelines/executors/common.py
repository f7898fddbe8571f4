"""What executors share: images read side by side on threads, and memory for batches."""

import weakref
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.plan import StepPlan
from pipelines.threads import Threads

T = TypeVar("T")


def read_images(
    steps: Iterable[StepPlan], read: Callable[[int], T], threads: int
) -> Generator[tuple[StepPlan, list[T]], None, None]:
    """Each step with what `read` makes of its indices, on `threads` threads side by side."""

    def read_part(indices: NDArray[np.int64]) -> list[T]:
        return [read(index) for index in indices]

    with Threads(threads) as pool:
        for step in steps:
            parts = pool.map(read_part, np.array_split(step.indices, threads))
            yield step, [one for part in parts for one in part]


class Buffers:
    """Memory for batches on the host. Unpinned memory is used again as soon as nobody holds the tensor that was made of
    it: the system clears fresh pages first, which shows in a loader's rate. PyTorch itself keeps pinned memory.
    """

    KEPT = 6  # more than a loader has in hand at a time, unless its user keeps batches

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._free: list[np.ndarray] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        if self._pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        memory = np.empty(0)
        while (memory.shape, memory.dtype) != (shape, kind):  # memory of another size is dropped
            memory = self._free.pop() if self._free else np.empty(shape, kind)
        handed_out = memory.view()  # lives as long as a tensor that is made of it
        weakref.finalize(handed_out, self._give_back, memory).atexit = False
        return torch.from_numpy(handed_out)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(memory)
