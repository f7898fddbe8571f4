"""The executor that reads nothing: one resident batch again and again, the upper bound of every loader."""

from collections.abc import Iterable

import torch

from pipelines.batch import Executed, ExecutorOptions, Source
from pipelines.plan import StepPlan


def create_executor(source: Source, options: ExecutorOptions) -> "SyntheticExecutor":
    """The executor of a loader."""
    return SyntheticExecutor(options.place.device, options.place.dtype, options.as_bytes)


class SyntheticExecutor:
    """Hands out the same images, resident on the device: normally distributed, or with `as_bytes` random bytes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, as_bytes: bool = False):
        self._device, self._dtype, self._as_bytes = device, dtype, as_bytes
        self._images = torch.empty(0)

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Executed:
        for step in steps:
            count = len(step.indices)
            if len(self._images) < count or self._images.shape[1] != image_size:
                self._images = self._make(count, image_size)
            yield step, self._images[:count]

    def _make(self, count: int, size: int) -> torch.Tensor:
        """(count, size, size, 3)."""
        generator = torch.Generator().manual_seed(0)
        if self._as_bytes:
            images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
            images = images.to(self._device)
        else:
            images = torch.randn(count, 3, size, size, generator=generator)
            images = images.to(self._device, self._dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # another stream is to read them
        return images

    def close(self) -> None:
        self._images = torch.empty(0)
