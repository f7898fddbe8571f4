"""AlexNet's lighting noise (Krizhevsky et al., 2012, section 4.1): colours shifted along their principal components."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentations.groups import on_device
from pipelines.imagenet import COLOR_EIGENVALUES, COLOR_EIGENVECTORS
from pipelines.plan import random_bits, uniform


@dataclass(frozen=True)
class LightingOption:
    lighting: float = 0.0
    """Lighting noise along the principal components of ImageNet's colours: its standard deviation, in AlexNet 0.1."""

    def augmentation(self) -> "Lighting | None":
        return Lighting(self.lighting) if self.lighting else None


@dataclass(frozen=True)
class Lighting:
    """[p₁ p₂ p₃] [α₁λ₁ α₂λ₂ α₃λ₃]ᵀ is added to each pixel of an image, with each α drawn from N(0, std²)."""

    std: float

    def __post_init__(self):
        if not 0 < self.std < float("inf"):
            raise ValueError(f"--lighting {self.std}: must be at least 0")

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int16]:
        """What is added to red, green and blue: (N, 3), in [-255, 255].

        It is rounded here: a sum with bytes would be rounded to the same.
        """
        drawn = uniform(random_bits(seed, epoch, indices, range(6), "lighting"))  # [N, 6]
        # Box and Muller, 1958: two uniform numbers make a normal one
        normal = np.sqrt(-2 * np.log1p(-drawn[:, :3])) * np.cos(2 * np.pi * drawn[:, 3:])  # [N, 3]
        shift = 255 * (self.std * normal * np.array(COLOR_EIGENVALUES)) @ np.array(COLOR_EIGENVECTORS).T
        return np.rint(shift).clip(-255, 255).astype(np.int16)

    def apply(self, images: Tensor, operations: NDArray[np.int16]) -> Tensor:
        shift = on_device(operations, images.device)[:, None, None]
        return (images + shift).clamp_(0, 255).to(torch.uint8)
