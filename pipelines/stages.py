"""The last stage, the same behind every executor: images go to the device, are augmented there, and are normalised.

    executor  ->  uint8 images  ->  device  ->  augmentations, as the plan has drawn them  ->  normalise  ->  Batch

An executor may normalise by itself where nothing is augmented: on a CPU that is faster as a part of the resize.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentation import PixelAugmentation
from pipelines.augmentations.groups import on_device
from pipelines.batch import Batch, Executed, Place
from pipelines.imagenet import MEAN, STD
from pipelines.plan import StepPlan
from pipelines.threads import Threads


@dataclass(frozen=True)
class DeviceStage:
    """What stands between an executor and the trainer.

    place: where the batches go. augmentations: on pixels, carried out one after another.
    """

    place: Place
    augmentations: tuple[PixelAugmentation, ...] = ()

    def run(self, executed: Executed, labels: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """A batch for each step that the executor has carried out, in order; `labels` are those of the dataset.

        On a GPU batches are made on one CUDA stream of the loader's, one ahead; on a CPU with augmentations in one
        thread, also one ahead. Closing the generator closes `executed`.

        Raises:
            TypeError: the executor has normalised images that are to be augmented.
        """
        if self.place.device.type == "cuda":
            return self._run_on_gpu(executed, labels)
        if self.augmentations:
            return self._run_in_thread(executed, labels)
        return self._run_here(executed, labels)

    def _run_here(self, executed: Executed, labels: NDArray[np.int64]) -> Generator[Batch, None, None]:
        with closing(executed):
            for step, images in executed:
                yield self._finish(step, images, labels)

    def _run_in_thread(self, executed: Executed, labels: NDArray[np.int64]) -> Generator[Batch, None, None]:
        waiting: deque[Callable[[], Batch]] = deque()
        with closing(executed), Threads(1) as thread:
            for step, images in executed:
                waiting.append(thread.submit(self._finish, step, images, labels))
                if len(waiting) == 2:
                    yield waiting.popleft()()
            while waiting:
                yield waiting.popleft()()

    def _run_on_gpu(self, executed: Executed, labels: NDArray[np.int64]) -> Generator[Batch, None, None]:
        stream = torch.cuda.Stream(self.place.device)
        waiting: deque[tuple[Batch, Any]] = deque()

        def hand_out() -> Batch:
            batch, finished = waiting.popleft()
            compute = torch.cuda.current_stream(self.place.device)
            compute.wait_event(finished)
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(compute)  # it was allocated on the other stream, which must not reuse it too early
            return batch

        with closing(executed):
            for step, images in executed:
                if images.is_cuda:
                    images.record_stream(stream)  # it comes from another stream, which must not reuse it too early
                with torch.cuda.stream(stream):
                    waiting.append((self._finish(step, images, labels), stream.record_event()))
                if len(waiting) == 2:
                    yield hand_out()
            while waiting:
                yield hand_out()

    def _finish(self, step: StepPlan, images: Tensor, labels: NDArray[np.int64]) -> Batch:
        """The batch of one step; copies from pinned memory do not wait."""
        if self.augmentations and images.dtype != torch.uint8:
            raise TypeError(f"augmentations change bytes, and the executor has made {images.dtype} of them")
        images = images.to(self.place.device, non_blocking=True)
        for augmentation, operations in zip(self.augmentations, step.operations, strict=True):
            images = augmentation.apply(images, operations)
        if images.dtype == torch.uint8:
            images = normalise(images)
        images = images.to(self.place.dtype).permute(0, 3, 1, 2)  # channels_last strides without a copy
        return Batch(images, on_device(labels[step.indices], self.place.device), torch.from_numpy(step.indices))


def normalise(images: Tensor) -> Tensor:
    """(images - MEAN) / STD of images (N, S, S, 3) uint8, contiguous: float32, (N, S, S, 3)."""
    scale, shift = _statistics(images.device, images.shape[2])
    rows = images.flatten(2).float()  # [N, S, S*3]
    return torch.addcmul(shift, rows, scale, out=rows).view(images.shape)


@lru_cache
def _statistics(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Factor and summand for one row of `width` pixels, (width * 3,) each.

    A whole row, because PyTorch is three times as fast on a CPU with long rows as with rows of three. Kept on the
    device, because a small copy from the host in every step would make the host wait for the device.
    """
    scale, mean = 1 / torch.tensor(STD), torch.tensor(MEAN)
    return scale.repeat(width).to(device), (-mean * scale).repeat(width).to(device)
