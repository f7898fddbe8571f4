"""The executor for FFCV's format: one process, threads that decode straight from the mapped file into the batch.

    thread 1:    steps of the plan -> jobs: addresses, boxes; ask the disk for the bytes
    thread 2:                              -> `native.render` on `workers` threads, a whole batch a call
    caller:                                                                       -> to the device, normalise

It reads what FFCV's own loader reads, and nothing of FFCV's is needed for it. FFCV decodes whole images, ignores errors
of the decoder, draws its crops by worker, and compiles its pipeline at every start; see docs/data.md for the figures.
"""

from collections.abc import Generator, Iterable
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import native
from pipelines.batch import MEAN, STD, Batch
from pipelines.plan import StepPlan
from pipelines.sources.beton import BetonSource
from pipelines.sources.beton_shards import BetonShards
from pipelines.stages import Buffers, HostBatch, host_batch, to_device
from pipelines.threads import in_background

BATCHES_AHEAD = 2


class FfcvExecutor:
    """Decodes .beton files, JPEG or raw, on the CPU.

    Args:
        source: the images. device, dtype: of the batches.
        workers: threads that decode; 0 is one.
        exact: see `native.render`.
    """

    def __init__(
        self,
        source: BetonSource | BetonShards,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        exact: bool,
    ):
        self._source, self._device, self._dtype = source, device, dtype
        self._threads, self._exact = max(1, workers), exact
        self._buffers = Buffers(pinned=device.type == "cuda")

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Generator[Batch, None, None]:
        work = in_background(self._prepare(steps), BATCHES_AHEAD)
        with closing(in_background(self._render(work, image_size), BATCHES_AHEAD)) as batches:
            yield from to_device(batches, self._device, self._dtype)

    def close(self) -> None:
        """Nothing: no thread outlives a run, and memory goes with the executor."""

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

    def _render(
        self, work: Generator[tuple[StepPlan, NDArray], None, None], size: int
    ) -> Generator[HostBatch, None, None]:
        # A GPU normalises by itself, and takes bytes in a quarter of the time.
        dtype = torch.uint8 if self._device.type == "cuda" else torch.float32
        with closing(work):
            for step, jobs in work:
                images = self._buffers.empty(len(jobs), size, size, 3, dtype=dtype)
                try:
                    native.render(jobs, images.numpy(), self._threads, self._exact, MEAN, STD)
                except native.DecodeError as error:
                    index = step.indices[error.position]
                    raise self._source.damaged_image(index, str(error)) from error
                yield host_batch(images, step.indices, self._source.labels)
                del images  # so that its memory can be used again
