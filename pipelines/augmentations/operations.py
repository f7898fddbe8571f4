"""The operations that RandAugment and TrivialAugment choose from, and how images of a batch each get their own.

The fourteen operations are those of torchvision's RandAugment and TrivialAugmentWide. An operation has levels 0 to 30;
its magnitude rises linearly from 0 to a limit, which the two methods set differently. Images with the same operation
and level go through one call of `torchvision.transforms.v2.functional`.

As torchvision does by default, each pixel is taken from the nearest place, which is faster than interpolation, and what
comes from outside the image is black. Strides stay channels_last, as the loader hands the images out: on a CPU
sharpening is then much faster than with contiguous channels, and only autocontrast is slower, which makes them so.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augmentations.groups import in_groups

LEVELS = 31  # 0 to 30, as in both papers


def _functional():
    """Imported on use: options are read without torchvision."""
    from torchvision.transforms.v2 import functional

    return functional


def _shear(images: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    """By x and y, the tangents of the angles, about the upper left corner."""
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _functional().affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0])


def _translate(images: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    """By whole pixels to the right and down: a cut that reaches over the border, faster than resampling."""
    return _functional().crop(images, -int(y), -int(x), *images.shape[-2:])


class Operation(NamedTuple):
    """run: from images (n, 3, S, S) uint8 and a magnitude to the changed ones. signed: to either side by chance."""

    run: Callable[[Tensor, float], Tensor]
    signed: bool = False


OPERATIONS = {
    "identity": Operation(lambda images, _: images),
    "shear x": Operation(lambda images, tangent: _shear(images, x=tangent), signed=True),
    "shear y": Operation(lambda images, tangent: _shear(images, y=tangent), signed=True),
    "translate x": Operation(lambda images, pixels: _translate(images, x=pixels), signed=True),
    "translate y": Operation(lambda images, pixels: _translate(images, y=pixels), signed=True),
    "rotate": Operation(lambda images, degrees: _functional().rotate(images, degrees), signed=True),
    "brightness": Operation(lambda images, more: _functional().adjust_brightness(images, 1 + more), signed=True),
    "color": Operation(lambda images, more: _functional().adjust_saturation(images, 1 + more), signed=True),
    "contrast": Operation(lambda images, more: _functional().adjust_contrast(images, 1 + more), signed=True),
    "sharpness": Operation(lambda images, more: _functional().adjust_sharpness(images, 1 + more), signed=True),
    "posterize": Operation(lambda images, bits: _functional().posterize(images, 8 - round(bits))),
    "solarize": Operation(lambda images, below_white: _functional().solarize(images, 255 - below_white)),
    "autocontrast": Operation(lambda images, _: _functional().autocontrast(images.contiguous())),
    "equalize": Operation(lambda images, _: _functional().equalize(images)),
}
NAMES = tuple(OPERATIONS)
_SIGNED = np.array([operation.signed for operation in OPERATIONS.values()])
_WITHOUT_LEVEL = np.array([name in ("identity", "autocontrast", "equalize") for name in NAMES])


def choose(shares: NDArray[np.float64], levels: NDArray[np.int64] | int, negative: NDArray[np.bool_]) -> NDArray:
    """Operations with their levels: (…, 2) int64, the position in NAMES and a level in [-30, 30].

    Args:
        shares: (…), in [0, 1): where in the list of operations each one lies; all are equally likely.
        levels: (…), in [0, 30]; 0 is kept for operations without one, so that they are one group.
        negative: (…), where a signed operation goes to the other side.
    """
    operations = (shares * len(NAMES)).astype(np.int64)
    levels = np.where(_WITHOUT_LEVEL[operations], 0, levels)
    return np.stack([operations, np.where(_SIGNED[operations] & negative, -levels, levels)], -1)


def run_operations(images: Tensor, chosen: NDArray[np.int64], limits: Mapping[str, float]) -> Tensor:
    """Each image changed by its operation.

    Args:
        images: (N, S, S, 3) uint8. chosen: (N, 2), see `choose`.
        limits: the magnitude of level 30 of each operation that has levels.
    """

    def change(group: Tensor, places: NDArray) -> Tensor:
        operation, level = chosen[places[0]].tolist()
        name = NAMES[operation]
        # In float32 like torchvision's: where a magnitude is cut to a whole number, its last bit counts.
        magnitude = float(torch.linspace(0, limits.get(name, 0.0), LEVELS)[abs(level)])
        return OPERATIONS[name].run(group, math.copysign(magnitude, level))

    return in_groups(images, chosen, change)
