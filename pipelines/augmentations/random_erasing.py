"""Random erasing (Zhong et al., arXiv 1708.04896): a rectangle of an image becomes ImageNet's mean colour."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentations.groups import on_device
from pipelines.imagenet import MEAN
from pipelines.plan import TRIES, random_bits, uniform


@dataclass(frozen=True)
class RandomErasingOption:
    random_erasing: Annotated[float, "usual"] = 0.0
    """Probability that a rectangle of an image, of 2 to 33 % of its area, is erased."""

    def augmentation(self) -> "RandomErasing | None":
        return RandomErasing(self.random_erasing) if self.random_erasing else None


@dataclass(frozen=True)
class RandomErasing:
    """Erases with probability `probability`.

    Areas and ratios are those of torchvision's RandomErasing; the ratio is drawn uniformly in its logarithm. The mean
    colour is 0 in the normalised image.
    """

    probability: float
    area = (0.02, 0.33)  # lowest and highest share of the image's area
    ratio = (0.3, 3.3)  # lowest and highest height / width

    def __post_init__(self):
        if not 0 < self.probability <= 1:
            raise ValueError(f"--random-erasing {self.probability}: must lie in [0, 1]")

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """(N, 4): top, left, bottom and right as shares of the side, in [0, 1]; zeros where nothing is erased.

        The first of ten tries that fits into the image is taken.
        """
        drawn = uniform(random_bits(seed, epoch, indices, range(2 * TRIES + 3), "random erasing"))
        areas = self.area[0] + (self.area[1] - self.area[0]) * drawn[:, :TRIES]
        low, high = np.log(self.ratio)
        ratios = np.exp(low + (high - low) * drawn[:, TRIES : 2 * TRIES])
        heights, widths = np.sqrt(areas * ratios), np.sqrt(areas / ratios)  # [N, TRIES]
        fits = (heights < 1) & (widths < 1)
        first = fits.argmax(1)[:, None]
        sides = np.concatenate([np.take_along_axis(each, first, 1) for each in (heights, widths)], 1)  # [N, 2]
        corners = drawn[:, 2 * TRIES : 2 * TRIES + 2] * (1 - sides)
        erased = fits.any(1) & (drawn[:, 2 * TRIES + 2] < self.probability)
        return np.where(erased[:, None], np.concatenate([corners, corners + sides], 1), 0.0)

    def apply(self, images: Tensor, operations: NDArray[np.float64]) -> Tensor:
        side = images.shape[1]
        borders = on_device(np.rint(operations * side).astype(np.int32), images.device)
        top, left, bottom, right = borders.T[..., None]  # [N, 1] each
        places = torch.arange(side, device=images.device)
        rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)  # [N, S]
        erased = (rows[:, :, None] & columns[:, None, :])[..., None]  # [N, S, S, 1]
        return torch.where(erased, _mean_color(images.device), images)


@lru_cache
def _mean_color(device: torch.device) -> Tensor:
    """(3,) uint8, kept on the device: a copy from the host in every step would make the host wait."""
    return torch.tensor(MEAN).round().to(torch.uint8).to(device)
