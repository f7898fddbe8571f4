"""What an augmentation on pixels is: a class in a file of its own, handed to `build_loader`.

plan:     draw(seed, epoch, indices)  ->  operations, one row for each image, before any image is read
stage:    apply(images, operations)   ->  images, a batch at a time, after decoding and before normalisation
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class PixelAugmentation(Protocol):
    """Changes the pixels of images. What happens to which image is drawn by the plan, as boxes and flips are."""

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray:
        """What is to be done to the images at `indices` (N,): an array of any type and shape (N, …).

        With --repeats the copies of an image have numbers of their own, beyond the dataset: see `plan.COPY`.

        A row depends on (seed, epoch, index) alone: `plan.random_bits` draws such numbers, by a stream of its own.
        """

    def apply(self, images: Tensor, operations: NDArray) -> Tensor:
        """The changed images.

        A CPU's images are changed in a thread of the loader, a GPU's on a CUDA stream of the loader.

        Args:
            images: (N, S, S, 3) uint8, RGB, on any device; they are not written to.
            operations: (N, …), the rows that `draw` gave for these images; in the host's memory, so that choosing by
                them never waits for a GPU.

        Returns:
            (N, S, S, 3) uint8, contiguous, on the same device.
        """
