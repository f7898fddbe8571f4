"""A training step as one CUDA graph: its kernels are recorded once, and from then on started by one call.

A recorded kernel reads and writes the memory that it was recorded with, and keeps the numbers that the host gave it. So
the batch is copied to a place that stays, and what changes from step to step (the learning rate, what is mixed) lies in
tensors. Random numbers are those of the generator's seed at each step.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

# Ordinary steps before the recording: cuDNN tries its algorithms, Triton compiles, and in the first ten DDP measures
# itself, for which it waits for the device.
WARM_UP = 11


class Recorder(Protocol):
    """What records the operations of a body, and repeats them on the same memory."""

    def record(self) -> AbstractContextManager:
        """The operations of the body are recorded, and need not be carried out."""

    def replay(self) -> None:
        """Carry them out."""


class CudaGraph:
    """A `Recorder` of what is started on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream):
        self._stream, self._graph = stream, torch.cuda.CUDAGraph()
        self.replay = self._graph.replay

    def record(self) -> AbstractContextManager:
        # Other threads, those of the loader and of NCCL, may meanwhile do what a recording does not allow.
        return torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local")


class StepGraph:
    """Calls `compute` in the first steps, then records it, and replays it from then on.

    It is recorded anew for each size of a batch.

    Args:
        compute: from images and labels to a tuple of tensors, without waiting for the device, and without a number from
            the host that changes.
        forget: undoes what a call of `compute` that broke off has left on the host.
        say: is told, in one line, where `compute` can't be recorded; then it is called in every step.
        stream: on which all of it runs; DDP must be made on it, too. None on a CPU.
        recorder: makes a new recorder.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        forget: Callable[[], None],
        say: Callable[[str], None],
        stream: torch.cuda.Stream | None,
        recorder: Callable[[], Recorder],
    ):
        self._compute, self._forget, self._say, self._stream, self._new = compute, forget, say, stream, recorder
        self._recorder: Recorder | None = None
        self._shape: torch.Size | None = None
        self._steps, self._possible = 0, True

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """`compute(images, labels)`; the results are of this step alone."""
        if images.shape != self._shape:
            self._recorder, self._shape, self._steps = None, images.shape, 0
        self._steps += 1
        with on_stream(self._stream):
            if self._recorder is None and self._possible and self._steps > WARM_UP:
                self._record(images, labels)
            if self._recorder is None:
                return self._compute(images, labels)
            self._images.copy_(images)
            self._labels.copy_(labels)
            self._recorder.replay()
            return tuple(result.clone() for result in self._results)

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        recorder = self._new()
        try:
            with recorder.record():
                self._results = self._compute(self._images, self._labels)
        except RuntimeError as error:
            self._forget()
            self._possible = False
            reason = str(error).splitlines()[0]
            self._say(f"--cuda-graphs: a step of this run cannot be recorded, and is not replayed: {reason}")
        else:
            self._recorder = recorder


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Generator[None]:
    """The body runs on a stream, between what is before and behind it on the present one."""
    if stream is None:
        yield
        return
    present = torch.cuda.current_stream(stream.device)
    stream.wait_stream(present)
    with torch.cuda.stream(stream):
        yield
    present.wait_stream(stream)
