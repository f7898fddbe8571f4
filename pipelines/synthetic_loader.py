"""The executor that reads nothing: one resident batch again and again, the upper bound of every loader."""

from collections.abc import Generator, Iterable

import numpy as np
import torch

from pipelines.loader import Batch
from pipelines.plan import StepPlan


class SyntheticSource:
    """`num_images` images that exist in name only, of ImageNet's typical size, with labels in turn."""

    has_names, note = False, None

    def __init__(self, num_images: int, num_classes: int):
        self.classes = [f"{label:08d}" for label in range(num_classes)]
        self.labels = np.arange(num_images, dtype=np.int64) % num_classes
        self.sizes = np.broadcast_to(np.array([375, 500], np.int32), (num_images, 2))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def particulars(self) -> dict[str, str]:
        """None."""
        return {}


class SyntheticExecutor:
    """Hands out the same normally distributed images, resident on the device, with the labels of the plan."""

    def __init__(self, source: SyntheticSource, device: torch.device, dtype: torch.dtype):
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
