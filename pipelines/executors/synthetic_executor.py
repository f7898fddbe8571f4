"""The executor that reads nothing: one resident batch again and again, the upper bound of every loader."""

from collections.abc import Generator, Iterable

import torch

from pipelines.batch import Batch, Source
from pipelines.plan import StepPlan


class SyntheticExecutor:
    """Hands out the same normally distributed images, resident on the device, with the labels of the plan."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype):
        self._source, self._device, self._dtype = source, device, dtype
        self._images = torch.empty(0, 3, 0, 0)

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Generator[Batch, None, None]:
        for step in steps:
            count = len(step.indices)
            if self._images.shape[0] < count or self._images.shape[2] != image_size:
                generator = torch.Generator().manual_seed(0)
                images = torch.randn(count, 3, image_size, image_size, generator=generator)
                self._images = images.to(self._device, self._dtype, memory_format=torch.channels_last)
            labels = torch.from_numpy(self._source.labels[step.indices])
            if self._device.type == "cuda":
                labels = labels.pin_memory()  # from other memory a copy would make the host wait
            labels = labels.to(self._device, non_blocking=True)
            yield Batch(self._images[:count], labels, torch.from_numpy(step.indices))

    def close(self) -> None:
        self._images = torch.empty(0, 3, 0, 0)
