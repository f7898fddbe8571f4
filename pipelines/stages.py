"""What the executors have in common: batches in the host's memory, that memory, and the way to the device."""

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import MEAN, STD, Batch
from pipelines.plan import StepPlan
from pipelines.threads import Threads

T = TypeVar("T")


class HostBatch(NamedTuple):
    """A batch in the host's memory, pinned where it goes to a GPU.

    images (N, S, S, 3): uint8, or float32 that is normalised already; labels, indices (N,) int64.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def host_batch(images: Tensor, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> HostBatch:
    """The images (N, S, S, 3) at `indices` (N,), with their labels of the dataset's `labels`."""
    return HostBatch(images, torch.from_numpy(labels[indices]), torch.from_numpy(indices))


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
    """Memory for batches on the host. On a CPU it is used again as soon as nobody holds the tensor that it was handed
    out as, for the system clears fresh pages first, which shows in a loader's rate. Pinned memory PyTorch keeps itself.
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
        while (memory.shape, memory.dtype) != (shape, kind):  # one of another size is dropped
            memory = self._free.pop() if self._free else np.empty(shape, kind)
        handed_out = memory.view()  # lives as long as a tensor that is made of it
        weakref.finalize(handed_out, self._give_back, memory).atexit = False
        return torch.from_numpy(handed_out)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(memory)


@lru_cache
def _statistics(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Factor and summand for one row of `width` pixels, (width * 3,) each.

    A whole row, because PyTorch is three times as fast on a CPU with long rows as with rows of three. Kept on the
    device, because a small copy from the host in every step would make the host wait for the device.
    """
    scale, mean = 1 / torch.tensor(STD), torch.tensor(MEAN)
    return scale.repeat(width).to(device), (-mean * scale).repeat(width).to(device)


def normalise(batch: HostBatch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on the device, normalised, in `dtype`; copies from pinned memory do not wait."""
    images = batch.images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        scale, shift = _statistics(device, images.shape[2])
        rows = images.flatten(2).float()  # [N, S, S*3]
        images = torch.addcmul(shift, rows, scale, out=rows).view(images.shape)
    images = images.to(dtype).permute(0, 3, 1, 2)  # channels_last strides without a copy
    return Batch(images, batch.labels.to(device, non_blocking=True), batch.indices)


def to_device(batches: Iterable[HostBatch], device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
    """Batches on the device. On a GPU each is copied and normalised on a stream of its own, one batch ahead."""
    if device.type != "cuda":
        yield from (normalise(batch, device, dtype) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    waiting: list[tuple[Batch, torch.cuda.Event]] = []

    def hand_out() -> Batch:
        batch, copied = waiting.pop(0)
        compute = torch.cuda.current_stream(device)
        compute.wait_event(copied)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(compute)  # it was allocated on the other stream, which must not reuse it too early
        return batch

    for batch in batches:
        if batch.images.is_cuda:
            batch.images.record_stream(stream)  # it comes from another stream, which must not reuse it too early
        with torch.cuda.stream(stream):
            waiting.append((normalise(batch, device, dtype), stream.record_event()))
        if len(waiting) == 2:
            yield hand_out()
    while waiting:
        yield hand_out()
