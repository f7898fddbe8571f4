"""What loaders, sources and executors share: the batch, ImageNet's statistics, and what each promises to the others."""

from collections.abc import Generator, Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.plan import StepPlan
from pipelines.sources.images import Examined

# ImageNet's statistics, on pixels in [0, 255]
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Batch(NamedTuple):
    """images (N, 3, H, W), channels_last strides, normalised by ImageNet's mean and std, in the loader's dtype on the
    rank's device; labels (N,) int64 on the device, class ids in sorted order of the class names; indices (N,) int64
    on the CPU, positions in the dataset.
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

    `has_names`: whether `classes` are their names, not numbers that stand in for names that the source does not know.
    `note`: one line about what was left out, or None.
    """

    classes: list[str]
    has_names: bool
    note: str | None
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What image `index` is called in a message."""

    def particulars(self) -> dict[str, str]:
        """Its part of `fingerprint`."""


class ImageSource(Source, Protocol):
    """A source whose images can be read: what executors use besides.

    `plain`: (N,) bool, whether the stored bytes are a JPEG that all decoders read alike; other images are to be had as
    pixels alone. All methods raise DataError, which names the image.
    """

    plain: NDArray[np.bool_]

    def read_sound(self, index: int) -> NDArray[np.uint8]:
        """The stored bytes of image `index`, which is not damaged."""

    def examine(self, index: int) -> Examined:
        """All of image `index`, read by the one decoder whose verdict counts."""

    def decode(self, index: int, memory: NDArray[np.uint8] | None = None) -> Tensor:
        """The same as RGB, (3, H, W) uint8; in `memory` (M,) where it fits."""

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """These images (N,) will be read soon."""


class Executor(Protocol):
    """Carries out steps of the plan."""

    def run(self, steps: Iterable[StepPlan], image_size: int) -> Generator[Batch, None, None]:
        """One batch for each step, in order, of images `image_size` pixels high and wide.

        Closing the generator ends whatever works ahead for it. The last one is closed before the next `run`.
        """

    def close(self) -> None:
        """Free what is kept from one run to the next; the last run is closed."""
