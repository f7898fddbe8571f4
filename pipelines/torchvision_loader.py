"""The executors by torchvision: on the CPU in PyTorch's DataLoader, on a GPU by its batch decoder.

    this process:      steps of the plan ->                                       -> to the device, normalise
    worker processes:                       one whole rank's batch each: decode (libjpeg-turbo), cut, resize, flip

A worker makes a whole batch, in uint8: one tensor through shared memory instead of hundreds, at a quarter of the
bytes. The workers stay alive from epoch to epoch.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from signal import SIG_IGN, SIGINT, SIGTERM, signal
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.loader import Batch
from pipelines.plan import StepPlan
from pipelines.sources.errors import DataError
from pipelines.stages import HostBatch, host_batch, in_background, normalise, to_device


class DecodingSource(Protocol):
    """What this backend needs of a source: `FolderSource` and `BetonSource` have it."""

    labels: NDArray[np.int64]

    def read(self, index: int) -> NDArray[np.uint8]:
        """The stored bytes of image `index`."""

    def decode(self, index: int) -> Tensor:
        """Image `index` as RGB, (3, H, W) uint8."""


def render(image: Tensor, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """Cut `box` (top, left, height, width) from image (3, H, W) uint8 and resize it, antialiased bilinear.

    Returns:
        (size, size, 3) uint8.
    """
    top, left, height, width = box
    # Pixel by pixel in memory, as decoders leave it: the resize is faster so, and its result needs no shuffling.
    cut = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    if cut.is_cuda:  # which resizes floats only
        resized = F.interpolate(cut.float(), (size, size), mode="bilinear", antialias=True)[0].round_().byte()
    else:
        resized = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
    return (resized.flip(2) if flip else resized).permute(1, 2, 0)


class _Batches(Dataset):
    """The key of an item is the work itself: (step of the plan, side of the images)."""

    def __init__(self, source: DecodingSource):
        self.source = source

    def __getitem__(self, work: tuple[StepPlan, int]) -> HostBatch | DataError:
        step, size = work
        images = torch.empty(len(step.indices), size, size, 3, dtype=torch.uint8)
        try:
            for image, index, box, flip in zip(images, step.indices, step.boxes.tolist(), step.flips, strict=True):
                image.copy_(render(self.source.decode(index), box, flip, size))
        except DataError as error:
            return error  # raised in the training process; the DataLoader would wrap it into a page of text
        return host_batch(images, step, self.source.labels)


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
    """Decodes a folder or a .beton file on the CPU.

    Args:
        source: the images. device, dtype: of the batches.
        workers: processes, at least 0; with 0 the images are decoded in this process.
    """

    def __init__(self, source: DecodingSource, device: torch.device, dtype: torch.dtype, workers: int):
        self._device, self._dtype = device, dtype
        self._work = _Work()
        self._batches: DataLoader | None = DataLoader(
            _Batches(source),
            batch_size=None,
            sampler=self._work,
            num_workers=workers,
            # forked: the source is shared, not copied, and a mapped file can't be sent
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # for the workers' seeds, which nothing uses: the global one is the trainer's
            worker_init_fn=_leave_signals_to_the_trainer if workers else None,
        )

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Generator[Batch, None, None]:
        self._work.items = ((step, image_size) for step in steps)
        yield from to_device(self._host_batches(), self._device, self._dtype)

    def _host_batches(self) -> Iterator[HostBatch]:
        for batch in self._batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def close(self) -> None:
        # Private, but the only way: the workers ignore SIGTERM, and a DataLoader that is merely dropped keeps them.
        if self._batches is not None and self._batches._iterator is not None and self._batches.num_workers:
            self._batches._iterator._shutdown_workers()
        self._batches = None


class TorchvisionGpuExecutor:
    """Decodes a folder or a .beton file on the GPU (nvJPEG), a batch at a time.

        thread 1:    steps of the plan -> bytes of the batch
        thread 2:                                            -> GPU: decode whole images, cut, resize, flip, normalise

    Args:
        source: the images. device, dtype: of the batches (on a CPU the CPU's decoder does the same).
    """

    def __init__(self, source: DecodingSource, device: torch.device, dtype: torch.dtype):
        self._source, self._device, self._dtype = source, device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Generator[Batch, None, None]:
        encoded = in_background(self._read(steps), ahead=2)
        with closing(in_background(self._decode(encoded, image_size), ahead=1)) as batches:
            for batch in batches:
                for tensor in batch[:2] if self._stream else ():
                    # it was allocated on the other stream
                    tensor.record_stream(torch.cuda.current_stream(self._device))
                yield batch

    def close(self) -> None:
        """Nothing: no thread outlives a run."""

    def _read(self, steps: Iterable[StepPlan]) -> Generator[tuple[StepPlan, list[Tensor]], None, None]:
        for step in steps:
            yield step, [torch.from_numpy(self._source.read(index).copy()) for index in step.indices]

    def _decode(
        self, encoded: Generator[tuple[StepPlan, list[Tensor]], None, None], size: int
    ) -> Generator[Batch, None, None]:
        with closing(encoded):
            for step, data in encoded:
                with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    whole = self._decode_batch(step, data)
                    boxes = zip(whole, step.boxes.tolist(), step.flips, strict=True)
                    images = torch.stack([render(image, box, flip, size) for image, box, flip in boxes])
                    batch = normalise(host_batch(images, step, self._source.labels), self._device, self._dtype)
                if self._stream:
                    self._stream.synchronize()  # this thread waits, not the training's
                yield batch

    def _decode_batch(self, step: StepPlan, data: list[Tensor]) -> list[Tensor]:
        """Whole images (3, H, W) uint8 on the device."""
        try:
            return decode_jpeg(data, ImageReadMode.RGB, device=self._device)
        except RuntimeError:
            # Not all are JPEGs, nvJPEG can't do one of them (CMYK), or one is damaged, which this will name.
            return [self._source.decode(index).to(self._device) for index in step.indices]
