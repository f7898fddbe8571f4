"""The executor by NVIDIA DALI: region decode, resize and normalise in one DALI pipeline, on the CPU or the GPU.

    thread:    steps of the plan -> bytes, boxes, flips -> DALI's own threads: decode the box, resize, flip, normalise

On a GPU nvJPEG and the hardware decoder decode ("mixed"). With `full_decode` whole images are decoded, and the boxes
are cut from them. DALI gets the bytes of a .beton file without a copy.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Executed, ExecutorOptions, ImageSource
from pipelines.executors.common import read_images
from pipelines.executors.dali_probe import decoder_options, why_no_box_decode
from pipelines.imagenet import MEAN, STD
from pipelines.plan import StepPlan
from pipelines.sources.errors import DataError
from pipelines.threads import in_background

# Each step with the stored bytes of its images
Inputs: TypeAlias = Generator[tuple[StepPlan, list[NDArray[np.uint8]]], None, None]

HARDWARE_SHARE = 0.65  # DALI's own default
BATCHES_AHEAD = 2  # in DALI, beside the one in use


def is_installed() -> bool:
    """Whether DALI can be imported. This does not import it."""
    return bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def choose_full_decode(
    wanted: float | None, device: torch.device, why_not: Callable[[torch.device], str | None] = why_no_box_decode
) -> float | None:
    """The wanted `DataConfig.dali_full_decode`; where a GPU can't decode boxes, whole images are decoded instead."""
    if wanted is not None or device.type != "cuda" or why_not(device) is None:
        return wanted
    return HARDWARE_SHARE


def create_executor(source: ImageSource, options: ExecutorOptions) -> "DaliExecutor":
    """The executor of a loader."""
    config, place = options.config, options.place
    batch_size = config.batch_size // place.world_size
    how = (options.workers, batch_size, config.dali_full_decode, options.as_bytes)
    return DaliExecutor(source, place.device, place.dtype, *how)


class DaliExecutor:
    """Decodes a folder or a .beton file by DALI.

    Args:
        source: the images. device, dtype: of the batches.
        workers: DALI's threads, at least 1.
        batch_size: images in a step of this rank, at most.
        full_decode: see `DataConfig.dali_full_decode`.
        as_bytes: hand out bytes instead of normalised floats.
    """

    def __init__(
        self,
        source: ImageSource,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        batch_size: int,
        full_decode: float | None = None,
        as_bytes: bool = False,
    ):
        if not is_installed():
            raise DataError(
                "--backend dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 "
                "(nvidia-dali-cuda120 beside a torch for CUDA 12)"
            )
        self._source, self._device = source, device
        # floats of half the bytes where the trainer wants 16 bits; bfloat16 has fewer digits still
        floats = torch.float32 if dtype == torch.float32 else torch.float16
        self._dtype = torch.uint8 if as_bytes else floats
        self._threads, self._batch_size = max(1, workers), batch_size
        self._full_decode = choose_full_decode(full_decode, device)
        self._pipeline: Any = None
        self._image_size = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_dali: deque[tuple[StepPlan, Any]] = deque()  # the steps in DALI, and their inputs
        self._is_running = False

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Executed:
        if image_size != self._image_size:
            self.close()
        if self._pipeline is None:
            self._pipeline, self._image_size = self._build(image_size), image_size
        inputs = in_background(self._read(steps), BATCHES_AHEAD)
        with closing(in_background(self._outputs(inputs), ahead=1)) as batches:
            yield from batches

    def close(self) -> None:
        if not self._is_running:  # else a thread was left behind in a read, and it still uses the pipeline
            self._end_pipeline()

    def _end_pipeline(self) -> None:
        # A private method, but the only way to end it now. An error puts the pipeline into a cycle of references. If a
        # garbage collection ends it later, perhaps in a forked process, that waits for its threads for ever.
        if self._pipeline is not None:
            self._pipeline._shutdown()
        self._pipeline = None

    def _build(self, size: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            self._batch_size,
            self._threads,
            device_id=self._device.index or 0 if on_gpu else None,
            prefetch_queue_depth=BATCHES_AHEAD,
        )
        with pipeline:
            encoded, start, shape, mirror = fn.external_source(
                self._next_step,
                num_outputs=4,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
                no_copy=True,  # `_in_dali` keeps the bytes until they are decoded
            )
            decoder = decoder_options("mixed" if on_gpu else "cpu")
            box = {"start": start, "shape": shape, "axes": [0, 1]}
            if self._full_decode is None:
                images = fn.decoders.image_slice(encoded, **decoder, **box)
            else:
                images = fn.decoders.image(encoded, **decoder, hw_decoder_load=self._full_decode)
                images = fn.slice(images, **box)
            images = fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
            if self._dtype == torch.uint8:
                images = fn.flip(images, horizontal=mirror)
            else:
                dtype = types.FLOAT if self._dtype == torch.float32 else types.FLOAT16
                statistics = {"mean": MEAN, "std": STD, "dtype": dtype, "output_layout": "HWC"}
                images = fn.crop_mirror_normalize(images, mirror=mirror, **statistics)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _read(self, steps: Iterable[StepPlan]) -> Inputs:
        source = self._source

        def read(index: int) -> NDArray[np.uint8]:
            if source.plain[index]:
                return source.read_sound(index)
            pixels = source.examine(index).pixels
            assert pixels is not None
            return _as_ppm(pixels)

        def announced() -> Iterable[StepPlan]:
            for step in steps:
                source.will_need(step.indices)
                yield step

        yield from read_images(announced(), read, self._threads)

    def _next_step(self) -> tuple[list[NDArray[np.uint8]], NDArray, NDArray, NDArray]:
        """The inputs of a batch, asked for by DALI. StopIteration at the end of the epoch, or where reading fails."""
        try:
            step, data = next(self._inputs)
        except DataError as error:
            self._error = error  # raised after the batches that DALI already has
            raise StopIteration from error
        starts, shapes = np.ascontiguousarray(step.boxes[:, :2]), np.ascontiguousarray(step.boxes[:, 2:])
        inputs = (data, starts, shapes, step.flips.astype(np.int32))
        self._in_dali.append((step, inputs))
        return inputs

    def _outputs(self, inputs: Inputs) -> Executed:
        """Keeps DALI filled and takes the batches out in order."""
        self._inputs, self._error = inputs, None
        finished, self._is_running = False, True
        try:
            self._pipeline.reset()
            self._pipeline.schedule_run()  # fills DALI's queue
            while self._in_dali:
                yield self._take()
            if self._error is not None:
                raise self._error
            finished = True
        finally:
            inputs.close()
            self._in_dali.clear()
            if not finished:  # DALI holds steps that would come out first in the next epoch
                self._end_pipeline()
            self._is_running = False

    def _take(self) -> tuple[StepPlan, Tensor]:
        """The oldest step in DALI, with its images."""
        step, _ = self._in_dali[0]
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise self._find_damaged(error, step) from error
        images = self._as_tensor(output.as_tensor())
        self._pipeline.release_outputs()
        self._in_dali.popleft()
        self._pipeline.schedule_run()
        return step, images

    def _as_tensor(self, output: Any) -> Tensor:
        """DALI's images (N, S, S, 3): on a CPU in DALI's memory, on a GPU copied into PyTorch's memory."""
        if self._stream is None:
            return torch.from_dlpack(output)  # the memory lives as long as the tensor
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self._stream):
            images = torch.empty(output.shape(), dtype=self._dtype, device=self._device)
            feed_ndarray(output, images, cuda_stream=self._stream)
        self._stream.synchronize()  # this thread waits, not that of the training
        return images

    def _find_damaged(self, error: RuntimeError, step: StepPlan) -> DataError:
        """The error that names the image: DALI does not say which one it could not decode, our own decoder does."""
        for index in step.indices:
            try:
                self._source.decode(index)
            except DataError as named:
                return named
        return DataError(f"DALI cannot decode one of the images {step.indices.tolist()}: {error}")


def _as_ppm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) in the simplest format that DALI's decoder reads."""
    height, width, _ = pixels.shape
    header = np.frombuffer(f"P6 {width} {height} 255\n".encode(), np.uint8)
    return np.concatenate([header, pixels.reshape(-1)])
