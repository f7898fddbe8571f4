"""Colour jitter (Krizhevsky et al., 2012; as torchvision's ColorJitter): random brightness, contrast, saturation, hue.

The factors differ from image to image, so they are tensors and a batch takes one call for each of the four, where
torchvision's functions take one number for all images. The formulas are torchvision's for bytes; a result differs from
its by at most 1 of 255 for each operation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentations.groups import in_groups, on_device
from pipelines.plan import random_bits, uniform


@dataclass(frozen=True)
class ColorJitterOption:
    color_jitter: tuple[float, float, float, float] | None = None
    """Colour jitter: how far brightness, contrast and saturation may be from 1, and the hue from 0 in turns, at most
    0.5; e.g. 0.4 0.4 0.4 0.1."""

    def augmentation(self) -> "ColorJitter | None":
        return None if self.color_jitter is None else ColorJitter(self.color_jitter)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in a random order.

    Args:
        strengths: b, c, s ≥ 0 and h in [0, 0.5]. Factors are uniform in [max(0, 1 - b), 1 + b] etc., the hue is shifted
            by a share of a turn that is uniform in [-h, h]. An operation of strength 0 is left out.
    """

    strengths: tuple[float, float, float, float]

    def __post_init__(self):
        *factors, hue = self.strengths
        if not (all(0 <= strength < float("inf") for strength in factors) and 0 <= hue <= 0.5):
            given = " ".join(f"{strength:g}" for strength in self.strengths)
            raise ValueError(f"--color-jitter {given}: must be at least 0, the hue at most 0.5")

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """(N, K, 2): operations in [0, 4), in the order in which they are done, and their factors."""
        drawn = uniform(random_bits(seed, epoch, indices, range(8), "color jitter"))
        centre, spread = np.array([1.0, 1.0, 1.0, 0.0]), np.array(self.strengths)
        low = np.maximum(centre - spread, [0, 0, 0, -0.5])
        factors = low + (centre + spread - low) * drawn[:, :4]  # [N, 4]
        order = np.argsort(drawn[:, 4:], axis=1)  # [N, 4]
        rows = np.stack([order.astype(np.float64), np.take_along_axis(factors, order, 1)], -1)  # [N, 4, 2]
        return rows[spread[order] > 0].reshape(len(rows), np.count_nonzero(spread), 2)

    def apply(self, images: Tensor, operations: NDArray[np.float64]) -> Tensor:
        for chosen in operations.swapaxes(0, 1):
            kinds, factors = chosen[:, 0].astype(np.int64), chosen[:, 1].astype(np.float32)

            def change(group: Tensor, places: NDArray, kinds=kinds, factors=factors) -> Tensor:
                run = (_brightness, _contrast, _saturation, _hue)[kinds[places[0]]]
                return run(group, on_device(factors[places], group.device)[:, None, None, None])

            images = in_groups(images, kinds, change)
        return images


# From images (n, 3, S, S) uint8 and factors (n, 1, 1, 1) float32 to images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 255).to(torch.uint8)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def _hue(images: Tensor, turns: Tensor) -> Tensor:
    """The colour of hue h, between low and high, has low + (high - low) · (1 - clamp(min(k, 4 - k), 0, 1)) in each
    channel, where k = (n + 6h) mod 6 and n is 5 for red, 3 for green, 1 for blue: HSV, without its table of cases."""
    red, green, blue = images.float().unbind(1)  # [n, S, S]
    high, low = images.amax(1).float(), images.amin(1).float()
    chroma = high - low
    divisor = chroma.clamp(min=1)  # a grey pixel has no hue, and needs none
    of_green_or_blue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(high == red, (green - blue) / divisor, of_green_or_blue) + 6 * turns[:, 0]
    channels = []
    for n in (5, 3, 1):
        k = (sixths + n).remainder_(6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1).round_().to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) rounded down: (n, 1, S, S) float32."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """`share` of the images, which may be above 1, and 1 - share of the others."""
    return (images * share).add_(other * (1 - share)).clamp_(0, 255).to(torch.uint8)
