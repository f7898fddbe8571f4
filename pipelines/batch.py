"""What loaders, sources and executors share: the batch, and what each promises to the others."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import DataConfig
from pipelines.plan import StepPlan
from pipelines.sources.errors import DataError
from pipelines.sources.images import Examined


class Batch(NamedTuple):
    """images (N, 3, H, W), channels_last strides, normalised by ImageNet's mean and std, in the loader's dtype on the
    rank's device; labels (N,) int64 on the device, class ids in sorted order of the class names, or after
    `Loader.relabel` outputs of the model; indices (N,) int64 on the CPU, positions in the dataset.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Place(NamedTuple):
    """Where batches go: to `rank` of `world_size` ranks, of which `ranks_of_machine` are on this machine; in the memory
    of `device`, the images in `dtype`.
    """

    rank: int = 0
    world_size: int = 1
    ranks_of_machine: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


class Source(Protocol):
    """The images of one split. `sizes` (N, 2) int32, height first; `labels` (N,) int64, positions in `classes`.

    `has_names`: whether `classes` are names. A source that knows no names has numbers there instead.
    `note`: one line about files that were left out, or None.
    """

    classes: list[str]
    has_names: bool
    note: str | None
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How messages name image `index`."""

    def fingerprint_parts(self) -> dict[str, str]:
        """What it adds to `fingerprint`: {property: number or hash}."""


class ImageSource(Source, Protocol):
    """A source whose images can be read one by one: all that executors for any form of the data use.

    `plain`: (N,) bool, whether the stored bytes are a JPEG that all decoders read alike. Other images must be read as
    pixels. All methods raise DataError, which names the image.
    """

    plain: NDArray[np.bool_]

    def read_sound(self, index: int) -> NDArray[np.uint8]:
        """The stored bytes of image `index`; it is checked for damage first."""

    def examine(self, index: int) -> Examined:
        """Image `index`, read whole by the decoder that decides what is damaged: `sources.images`."""

    def decode(self, index: int, memory: NDArray[np.uint8] | None = None) -> Tensor:
        """The same decoder's pixels, (3, H, W) uint8, RGB; they lie in `memory` (M,) if they fit."""

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """These images (N,) will be read soon."""


class MappedSource(Source, Protocol):
    """A source whose stored bytes all lie in memory: all that the executor for .beton files uses.

    lengths: (N,) int64, bytes of each image. is_raw: (N,) bool, True for height × width × 3 pixels, False for a JPEG.
    checksums: (N,) uint64, their XXH64, or None.
    """

    lengths: NDArray[np.int64]
    is_raw: NDArray[np.bool_]
    checksums: NDArray[np.uint64] | None

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Where in memory the bytes of these images (N,) begin."""

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """These images (N,) will be read soon."""

    def damaged_image(self, index: int, reason: str) -> DataError:
        """The error to raise for image `index`."""


# Steps of the plan, in order, each with its images: what an executor hands out
Executed: TypeAlias = Generator[tuple[StepPlan, Tensor], None, None]


class Executor(Protocol):
    """Carries out steps of the plan: reads and decodes each image, cuts its box, resizes and flips it."""

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Executed:
        """Each step with its images (N, S, S, 3), where S is `image_size`.

        They are uint8, or normalised floats unless `ExecutorOptions.as_bytes` asks for bytes. They lie in the host's
        memory, pinned where they go to a GPU, or on the GPU, where nothing is still writing to them.

        Closing the generator ends all work that runs ahead of it. It is closed before the next `run`.
        """

    def close(self) -> None:
        """Free what is kept between runs. The last run is closed by then."""


@dataclass(frozen=True)
class ExecutorOptions:
    """What an executor is made of, beside the source.

    training: the split is train. place: where the batches go.
    as_bytes: images are handed out as uint8, since their pixels are to be augmented.
    """

    config: DataConfig
    training: bool
    place: Place
    as_bytes: bool

    @property
    def workers(self) -> int:
        """Threads or processes of this rank."""
        return self.config.rank_workers(self.place.ranks_of_machine)
