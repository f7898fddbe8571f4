"""The executor for FFCV's format: one process, threads that decode straight from the mapped file into the batch.

    thread 1:    steps of the plan -> jobs: addresses, boxes; ask the disk for the bytes
    thread 2:                              -> `native.render` on `workers` threads, a whole batch a call

It reads the same files as FFCV's own loader, without FFCV, which decodes whole images, ignores errors of the decoder,
draws its crops by worker, and compiles its pipeline at every start; docs/data.md has the figures.
"""

from collections.abc import Generator, Iterable
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import native
from pipelines.batch import Executed, ExecutorOptions, MappedSource
from pipelines.executors.common import Buffers
from pipelines.imagenet import MEAN, STD
from pipelines.plan import StepPlan
from pipelines.threads import in_background

BATCHES_AHEAD = 2


def create_executor(source: MappedSource, options: ExecutorOptions) -> "FfcvExecutor":
    """The executor of a loader; evaluation is always exact."""
    exact = options.config.exact_decode or not options.training
    return FfcvExecutor(source, options.place.device, options.workers, exact, options.as_bytes)


class FfcvExecutor:
    """Decodes .beton files, JPEG or raw, on the CPU.

    Args:
        source: the images. device: of the batches.
        workers: threads that decode; 0 is one.
        exact: see `native.render`.
        as_bytes: hand out bytes for a CPU, too, instead of normalised floats. A GPU always gets bytes: it normalises by
            itself, and takes them in a quarter of the time.
    """

    def __init__(self, source: MappedSource, device: torch.device, workers: int, exact: bool, as_bytes: bool = False):
        self._source, self._threads, self._exact = source, max(1, workers), exact
        on_gpu = device.type == "cuda"
        self._dtype = torch.uint8 if as_bytes or on_gpu else torch.float32
        self._buffers = Buffers(pinned=on_gpu)

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Executed:
        work = in_background(self._prepare(steps), BATCHES_AHEAD)
        return in_background(self._render(work, image_size), BATCHES_AHEAD)

    def close(self) -> None:
        """Nothing to do: no thread outlives a run, and the memory goes with the executor."""

    def _prepare(self, steps: Iterable[StepPlan]) -> Generator[tuple[StepPlan, NDArray], None, None]:
        """Each step with its jobs (N,) of `native.JOB`."""
        source = self._source
        for step in steps:
            jobs = np.zeros(len(step.indices), native.JOB)
            jobs["data"] = source.addresses(step.indices)
            jobs["size"] = source.lengths[step.indices]
            jobs["image_size"] = source.sizes[step.indices]
            jobs["box"], jobs["flip"] = step.boxes, step.flips
            jobs["is_raw"] = source.is_raw[step.indices]
            if source.checksums is not None:
                jobs["checksum"], jobs["has_checksum"] = source.checksums[step.indices], True
            source.will_need(step.indices)
            yield step, jobs

    def _render(self, work: Generator[tuple[StepPlan, NDArray], None, None], size: int) -> Executed:
        with closing(work):
            for step, jobs in work:
                images = self._buffers.empty(len(jobs), size, size, 3, dtype=self._dtype)
                try:
                    native.render(jobs, images.numpy(), self._threads, self._exact, MEAN, STD)
                except native.DecodeError as error:
                    index = step.indices[error.position]
                    raise self._source.damaged_image(index, str(error)) from error
                yield step, images
                del images  # so that its memory can be used again
