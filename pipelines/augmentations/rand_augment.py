"""RandAugment (Cubuk et al., arXiv 1909.13719): some operations on each image, all with the same level of magnitude."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentations.operations import LEVELS, choose, run_operations
from pipelines.plan import random_bits, uniform


@dataclass(frozen=True)
class RandAugmentOption:
    rand_augment: Annotated[tuple[int, int] | None, "usual"] = None
    """RandAugment: operations on each image, and their level of magnitude in [0, 30]; usual are 2 9."""

    def augmentation(self) -> "RandAugment | None":
        return None if self.rand_augment is None else RandAugment(*self.rand_augment)


def limits(side: int) -> dict[str, float]:
    """Magnitudes of level 30 for images of this side in pixels, as torchvision's RandAugment has them.

    Units: a tangent, pixels, degrees, change of a factor, bits, steps of brightness.
    """
    lengths = {"shear x": 0.3, "shear y": 0.3, "translate x": 150 / 331 * side, "translate y": 150 / 331 * side}
    factors = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 0.9)
    return {**lengths, "rotate": 30.0, **factors, "posterize": 4.0, "solarize": 255.0}


@dataclass(frozen=True)
class RandAugment:
    """`count` operations, one after another, on each image, each of `level`."""

    count: int
    level: int

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"--rand-augment {self.count} {self.level}: there must be at least 1 operation")
        if not 0 <= self.level < LEVELS:
            raise ValueError(f"--rand-augment {self.count} {self.level}: the level must lie in [0, {LEVELS - 1}]")

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, count, 2): see `operations.choose`."""
        drawn = uniform(random_bits(seed, epoch, indices, range(2 * self.count), "rand augment"))
        return choose(drawn[:, 0::2], self.level, drawn[:, 1::2] < 0.5)

    def apply(self, images: Tensor, operations: NDArray[np.int64]) -> Tensor:
        for chosen in operations.swapaxes(0, 1):
            images = run_operations(images, chosen, limits(images.shape[1]))
        return images
