"""The executor by torchvision and PyTorch's DataLoader.

    this process:      steps of the plan ->                                       -> to the device, normalise
    worker processes:                       one whole rank's batch each: decode (libjpeg-turbo), cut, resize, flip

A worker makes a whole batch, in uint8: one tensor through shared memory instead of hundreds, at a quarter of the
bytes. The workers stay alive from epoch to epoch.
"""

from collections.abc import Iterable, Iterator
from signal import SIG_IGN, SIGINT, SIGTERM, signal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.loader import Batch, normalise
from pipelines.plan import StepPlan
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource


def render(image: Tensor, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """Cut `box` (top, left, height, width) from image (3, H, W) uint8 and resize it, antialiased bilinear.

    Returns:
        (size, size, 3) uint8.
    """
    top, left, height, width = box
    image = image[None, :, top : top + height, left : left + width]
    image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0]
    return (image.flip(2) if flip else image).permute(1, 2, 0)


class _Batches(Dataset):
    """The key of an item is the work itself: (step of the plan, side of the images)."""

    def __init__(self, source: FolderSource):
        self.source = source

    def __getitem__(self, work: tuple[StepPlan, int]) -> tuple[Tensor, Tensor, Tensor] | DataError:
        step, size = work
        images = torch.empty(len(step.indices), size, size, 3, dtype=torch.uint8)
        try:
            for image, index, box, flip in zip(images, step.indices, step.boxes.tolist(), step.flips, strict=True):
                image.copy_(render(self.source.decode(index), box, flip, size))
        except DataError as error:
            return error  # raised in the training process; the DataLoader would wrap it into a page of text
        return images, torch.from_numpy(self.source.labels[step.indices]), torch.from_numpy(step.indices)


class _Work(Sampler):
    """Hands the DataLoader the work of one epoch; filled anew for each, so that the workers can stay."""

    def __init__(self):
        self.items: Iterable[tuple[StepPlan, int]] = ()

    def __iter__(self) -> Iterator[tuple[StepPlan, int]]:
        return iter(self.items)


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    # Ctrl-C and a launcher's SIGTERM reach the whole process group; the workers must outlive the last checkpoint.
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_IGN)


class TorchvisionExecutor:
    """Decodes a `FolderSource` on the CPU.

    Args:
        source: the images. device, dtype: of the batches.
        workers: processes, at least 0; with 0 the images are decoded in this process.
    """

    def __init__(self, source: FolderSource, device: torch.device, dtype: torch.dtype, workers: int):
        self._device, self._dtype = device, dtype
        self._work = _Work()
        self._batches: DataLoader | None = DataLoader(
            _Batches(source),
            batch_size=None,
            sampler=self._work,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # for the workers' seeds, which nothing uses: the global one is the trainer's
            worker_init_fn=_leave_signals_to_the_trainer if workers else None,
        )

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Iterator[Batch]:
        self._work.items = ((step, image_size) for step in steps)
        for batch in self._batches:
            if isinstance(batch, DataError):
                raise batch
            yield normalise(*batch, self._device, self._dtype)

    def close(self) -> None:
        # Private, but the only way: the workers ignore SIGTERM, and a DataLoader that is merely dropped keeps them.
        if self._batches is not None and self._batches._iterator is not None and self._batches.num_workers:
            self._batches._iterator._shutdown_workers()
        self._batches = None
