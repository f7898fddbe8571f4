"""The executors by torchvision: on the CPU in PyTorch's DataLoader, on a GPU by its batch decoder.

    this process:      steps of the plan ->
    worker processes:                       one whole rank's batch each: decode (libjpeg-turbo), cut, resize, flip

A worker makes a whole batch in uint8, right in shared memory: one tensor instead of hundreds, a quarter of the bytes.
The workers are forked as soon as the executor is made, before the model, its memory and most threads are there: what
another thread has locked at the moment of a fork stays locked in the new process for ever. They live from epoch to
epoch. At the end they are killed, for they hold nothing that could be lost.
"""

import atexit
import faulthandler
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from errno import ENOSPC
from multiprocessing.queues import Queue
from signal import SIG_DFL, SIG_IGN, SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, signal
from threading import current_thread, main_thread
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from pipelines.batch import Executed, ExecutorOptions, ImageSource, Place
from pipelines.config import DataConfig
from pipelines.executors.common import read_images
from pipelines.plan import StepPlan
from pipelines.shared_memory import Need, free_and_size
from pipelines.sources.errors import DataError
from pipelines.threads import PATIENCE_S, in_background

BATCHES_AHEAD = 2  # of each worker
MEMORY_BYTES = 32 << 20  # that a worker keeps for an image, enough for 11 megapixels; larger ones are rare
LARGEST_REDUCTION = 64  # of one resize on a GPU: the weights of a pixel must fit into 48 KiB, as up to 94 they do


def render(image: Tensor, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """Cut `box` (top, left, height, width) from image (3, H, W) uint8 and resize it, antialiased bilinear.

    Returns:
        (size, size, 3) uint8.
    """
    top, left, height, width = box
    # Channels last, as decoders leave it: the resize is faster, and its result already has the layout that is wanted.
    cut = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    if cut.is_cuda:  # a GPU resizes floats only
        resized = cut.float()
        for step in resize_steps(height, width, size):
            resized = F.interpolate(resized, step, mode="bilinear", antialias=True)
        resized = resized[0].round_().byte()
    else:
        resized = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
    return (resized.flip(2) if flip else resized).permute(1, 2, 0)


def resize_steps(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """The sizes (height, width) that an image takes one after another, so that no step reduces a side to less than
    1 / `LARGEST_REDUCTION`. The last step reduces most: the result is then nearest to that of a single one.
    """
    steps = [(size, size)]
    while max(height / steps[0][0], width / steps[0][1]) > LARGEST_REDUCTION:
        steps.insert(0, (min(height, LARGEST_REDUCTION * steps[0][0]), min(width, LARGEST_REDUCTION * steps[0][1])))
    return steps


class _Batches(Dataset):
    """The key of an item is the work itself: (step of the plan, side of the images). The item is the step and its
    images (N, S, S, 3) uint8.
    """

    def __init__(self, source: ImageSource, need: Need):
        self.source, self._need = source, need
        # Images are decoded into it: the system would have to clear fresh memory for each of them.
        largest = 3 * int(source.sizes.astype(np.int64).prod(1).max())
        self._memory = np.empty(min(largest, MEMORY_BYTES), np.uint8)

    # pyrefly: ignore[bad-override-param-name]
    def __getitem__(self, work: tuple[StepPlan, int]) -> tuple[StepPlan, Tensor] | DataError:
        step, size = work
        try:
            images = self._empty(len(step.indices), size, size, 3)
            # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
            for image, index, box, flip in zip(images, step.indices, step.boxes.tolist(), step.flips, strict=True):
                image.copy_(render(self.source.decode(index, self._memory), box, flip, size))
        except DataError as error:
            return error  # raised in the training process; the DataLoader would wrap it into a page of text
        return step, images

    def _empty(self, *shape: int) -> Tensor:
        """Uninitialised bytes. In a worker they lie in shared memory: else the DataLoader would copy them there, in a
        thread whose failure nobody would notice.
        """
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        try:
            memory = torch.UntypedStorage._new_shared(math.prod(shape))  # as PyTorch's default_collate does
        except RuntimeError as error:
            raise DataError(f"shared memory has run out: {self._need.advice()}") from error
        return torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)


class _Work(Sampler):
    """Hands the DataLoader the work of one epoch. It is filled anew for each epoch, so that the workers can stay."""

    def __init__(self):
        self.items: Iterable[tuple[StepPlan, int]] = ()

    def __iter__(self) -> Iterator[tuple[StepPlan, int]]:
        return iter(self.items)


def create_executor(source: ImageSource, options: ExecutorOptions) -> "TorchvisionExecutor | TorchvisionGpuExecutor":
    """The executor of a loader: by the device's own decoder. All images are handed out as bytes."""
    config, place = options.config, options.place
    if place.device.type == "cuda":
        return TorchvisionGpuExecutor(source, place.device, options.workers)
    need = shared_memory_need(config, options.training, place, len(source))
    return TorchvisionExecutor(source, place.device, options.workers, need)


def shared_memory_need(config: DataConfig, training: bool, place: Place, num_images: int) -> Need:
    """The shared memory that the workers of this machine's ranks need: batches that are made ahead, and one in use."""
    steps = num_images // config.batch_size if training else math.ceil(num_images / config.batch_size)
    batch_size = math.ceil(min(config.batch_size, num_images) / place.world_size)
    batches = min(BATCHES_AHEAD * config.rank_workers(place.ranks_of_machine) + 1, steps)
    return Need(batches, batch_size * config.largest_size(training) ** 2 * 3, place.ranks_of_machine)


def _start_worker(worker_id: int) -> None:
    # Ctrl-C and the signals of a launcher or a batch system reach all processes. The workers must live until the last
    # checkpoint is written.
    for number in (SIGINT, SIGTERM, SIGUSR1):
        signal(number, SIG_IGN)
    faulthandler.register(SIGUSR2, file=2)  # by which a watchdog asks where this process is; sys.stderr may be no file
    Queue._on_queue_feeder_error = staticmethod(_give_up)


def _give_up(error: Exception, item: Any) -> None:
    """End this worker. Its death is noticed, while the batch that it can't send would be waited for without end."""
    print(f"a loading process cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


@atexit.register  # before multiprocessing's own, which sends SIGTERM and waits
def _kill_workers() -> None:
    """Kill the workers that no `close` has ended."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class TorchvisionExecutor:
    """Decodes a folder or a .beton file on the CPU.

    Args:
        source: the images. device: of the batches.
        workers: processes, at least 0; with 0 the images are decoded in this process.
        need: of shared memory, checked if there are workers; by default nothing is needed.

    Raises:
        DataError: there is too little shared memory.
    """

    def __init__(self, source: ImageSource, device: torch.device, workers: int, need: Need | None = None):
        self._need = need or Need()
        if workers and not self._need.is_met():
            raise DataError(f"too little shared memory: {self._need.advice()}")
        self._work = _Work()
        self._batches: DataLoader | None = DataLoader(
            _Batches(source, self._need),
            batch_size=None,
            collate_fn=lambda item: item,  # PyTorch's would make tensors of the step, which take shared memory
            sampler=self._work,
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            # forked: the source is shared, not copied, and a mapped file can't be sent
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # for the workers' seeds, which nothing uses: the global one is the trainer's
            worker_init_fn=_start_worker if workers else None,
        )
        if workers:
            iter(self._batches)  # starts them; there is no work yet
            if current_thread() is main_thread():
                # PyTorch's handler would raise in the middle of a training step. The end of a worker is also noticed
                # while its batch is waited for.
                signal(SIGCHLD, SIG_DFL)

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Executed:
        assert self._batches is not None  # it is not closed
        self._work.items = ((step, image_size) for step in steps)
        try:
            for item in self._batches:
                if isinstance(item, DataError):
                    raise item
                step, images = item
                yield step, images
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            has_room = free_and_size()[0] >= self._need.batch_bytes
            why = "was it killed for want of memory? use a lower -j" if has_room else self._need.advice()
            raise DataError(f"a loading process has ended ({str(error).splitlines()[0]}): {why}") from error
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            raise DataError(f"shared memory has run out: {self._need.advice()}") from error  # of a queue

    def close(self) -> None:
        if self._batches is not None and self._batches._iterator is not None:
            _end(self._batches._iterator)
        self._batches = None


def _end(iterator: Any) -> None:
    """Kill the workers of a DataLoader's iterator.

    PyTorch's own `_shutdown_workers` asks them to end, waits five seconds for each that is stuck in a read, sends
    SIGTERM, which they ignore, and waits for ever for a lock that a stopped worker may hold.
    """
    iterator._shutdown = True  # its own shutdown has nothing left to do
    _remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    if iterator._pin_memory:
        iterator._pin_memory_thread_done_event.set()
        iterator._worker_result_queue.cancel_join_thread()
        iterator._worker_result_queue.put((None, None))  # wakes it
        iterator._pin_memory_thread.join(PATIENCE_S)
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join(PATIENCE_S)
    for queue in iterator._index_queues:
        queue.close()
    end = time.monotonic() + PATIENCE_S
    for thread in filter(None, (queue._thread for queue in iterator._index_queues)):
        thread.join(max(0.0, end - time.monotonic()))  # it ends at once unless its pipe is full


def batch_decoder(device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """torchvision's decoder: of the bytes (N,) of JPEGs, at least one, to pixels (3, H, W) uint8 on the device.

    torchvision's decoders are deprecated since its release 0.29, in favour of torchcodec's. Those turn an image by the
    orientation in its EXIF data, which the plan, with the sizes of the stored images, does not know of.

    Raises:
        DataError: this torchvision has no decoder any more.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise DataError(
            "this torchvision has no decoder of JPEGs for a GPU: pip install 'torchvision>=0.26,<0.30', or use "
            "--backend dali, or --backend ffcv with .beton files"
        ) from error
    # pyrefly: ignore[bad-return]: a list of a list
    return lambda encoded: decode_jpeg(encoded, ImageReadMode.RGB, device=device)


class TorchvisionGpuExecutor:
    """Decodes a folder or a .beton file on the GPU (nvJPEG), a batch at a time.

        threads:     steps of the plan -> bytes of the batch
        thread:                                              -> GPU: decode whole images, cut, resize, flip

    Args:
        source: the images. device: of the batches (on a CPU the CPU's decoder does the same).
        workers: threads that read; 0 is one.
    """

    def __init__(self, source: ImageSource, device: torch.device, workers: int):
        self._source, self._device = source, device
        self._threads = max(1, workers)
        self._decoder = batch_decoder(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Executed:
        encoded = in_background(read_images(steps, self._read, self._threads), ahead=2)
        return in_background(self._decode(encoded, image_size), ahead=1)

    def close(self) -> None:
        """Nothing to do: no thread outlives a run."""

    def _read(self, index: int) -> Tensor:
        """The bytes (N,) of a plain JPEG, else the pixels (3, H, W)."""
        if self._source.plain[index]:
            return torch.from_numpy(self._source.read_sound(index).copy())
        return self._source.decode(index)

    def _decode(self, encoded: Generator[tuple[StepPlan, list[Tensor]], None, None], size: int) -> Executed:
        with closing(encoded):
            for step, data in encoded:
                with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    whole = self._decode_batch(step, data)
                    # pyrefly: ignore[bad-argument-type]: as above
                    boxes = zip(whole, step.boxes.tolist(), step.flips, strict=True)
                    images = torch.stack([render(image, box, flip, size) for image, box, flip in boxes])
                if self._stream:
                    # nvJPEG's hardware decoder writes before the work that is queued on its stream is done
                    # (torchvision's pull request 9606, torchcodec's 1634). The next batch is decoded into memory that
                    # this one has used, so this one must be finished. This thread waits, not that of the training.
                    self._stream.synchronize()
                yield step, images

    def _decode_batch(self, step: StepPlan, data: list[Tensor]) -> list[Tensor]:
        """Whole images (3, H, W) uint8 on the device."""
        encoded = [one for one in data if one.ndim == 1]
        try:
            decoded = iter(self._decoder(encoded) if encoded else [])
        except RuntimeError:
            # nvJPEG can't decode one of them, or it has changed since it was found sound; this names a damaged image.
            return [self._source.decode(index).to(self._device) for index in step.indices]
        return [next(decoded) if one.ndim == 1 else one.to(self._device) for one in data]
