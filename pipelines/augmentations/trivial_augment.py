"""TrivialAugment (Müller and Hutter, arXiv 2103.10158), with its wide magnitudes: one operation of a random level."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentations.operations import LEVELS, choose, run_operations
from pipelines.plan import random_bits, uniform


@dataclass(frozen=True)
class TrivialAugmentOption:
    trivial_augment: Annotated[bool, "usual"] = False
    """TrivialAugment: one operation on each image, of a random magnitude."""

    def augmentation(self) -> "TrivialAugment | None":
        return TrivialAugment() if self.trivial_augment else None


# Magnitudes of level 30, in the units of `rand_augment.limits`
LIMITS = {
    **dict.fromkeys(("shear x", "shear y"), 0.99),
    **dict.fromkeys(("translate x", "translate y"), 32.0),
    "rotate": 135.0,
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 0.99),
    "posterize": 6.0,
    "solarize": 255.0,
}


class TrivialAugment:
    """One operation on each image; operations and levels are equally likely."""

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 2): see `operations.choose`."""
        drawn = uniform(random_bits(seed, epoch, indices, range(3), "trivial augment"))
        return choose(drawn[:, 0], (drawn[:, 1] * LEVELS).astype(np.int64), drawn[:, 2] < 0.5)

    def apply(self, images: Tensor, operations: NDArray[np.int64]) -> Tensor:
        return run_operations(images, operations, LIMITS)
