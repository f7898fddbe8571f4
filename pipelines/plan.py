"""What an epoch does to the data, decided before any image is read.

    EpochPlan(seed, epoch, sizes, global_batch_size, crop, …)  ->  step -> (indices, boxes, flips, operations)

The plan is a pure function of its arguments: where an image stands, which box is cut from it, whether it is flipped and
how its pixels are changed depend on (seed, epoch, image index), with --repeats also on the number of the copy, and on
nothing else: not on the rank, the worker, the backend or the batch. The random numbers are counter-based (SplitMix64:
Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). So an image's numbers are drawn without
those of the others, and no version of a library changes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipelines.augmentation import PixelAugmentation

# Copy c of image i has the number i + c · COPY where numbers are drawn for it: no dataset has so many images.
COPY = 2**40
TRIES = 10  # of a random box before the fallback, as in torchvision's RandomResizedCrop
# The columns of an image's random numbers for crop and order: areas, aspect ratios, then one each.
TOP, LEFT, FLIP, ORDER = range(2 * TRIES, 2 * TRIES + 4)
NUM_DRAWS = ORDER + 1

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64: a bijection on 64 bits in which every input bit stirs every output bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_bits(seed: int, epoch: int, indices: NDArray, columns: range, stream: str = "") -> NDArray[np.uint64]:
    """64 random bits for each image (N,) and each column (K,): (N, K), keyed by (seed, epoch, index, stream).

    Args:
        columns: in [0, 65,536): the same column has the same bits in every call.
        stream: the name of what is drawn, so that no two augmentations draw the same numbers; "" is crop and order.
    """
    state = np.zeros(1, np.uint64)
    for key in (np.array([seed]), np.array([epoch]), np.asarray(indices)):
        state = _mix((state ^ key.astype(np.uint64)) + _GOLDEN)
    first = crc32(stream.encode()) << 16  # 0 for ""
    places = np.arange(first + columns.start + 1, first + columns.stop + 1, dtype=np.uint64)
    return _mix(state[:, None] + places * _GOLDEN)


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random bits as numbers in [0, 1): the upper 53 of each 64, which a float64 holds."""
    # pyrefly: ignore[bad-return]: NumPy declares a number of any precision
    return (bits >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class RandomCrop:
    """Training: a random box (Szegedy et al., arXiv 1409.4842) and a random horizontal flip.

    Args:
        area: lowest and highest share of the image's area, in (0, 1].
        ratio: lowest and highest width / height of the box, above 0; drawn uniformly in its logarithm.
        flip: probability of a horizontal flip, in [0, 1].
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self):
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"the crop's area must lie in (0, 1] and not fall, not {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"the crop's aspect ratio must be above 0 and not fall, not {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"the probability of a flip must lie in [0, 1], not {self.flip}")

    def draw(self, seed: int, epoch: int, indices: NDArray, sizes: NDArray) -> tuple[NDArray, NDArray]:
        """Boxes (N, 4) and flips (N,) for the images at `indices` (N,) of `sizes` (N, 2), height first.

        Copies of images (see `EpochPlan`) have numbers of their own instead of `indices`.
        """
        drawn = uniform(random_bits(seed, epoch, indices, range(NUM_DRAWS)))  # [N, NUM_DRAWS]
        image_h, image_w = sizes[:, 0, None].astype(float), sizes[:, 1, None].astype(float)  # [N, 1]

        area = image_h * image_w * (self.area[0] + (self.area[1] - self.area[0]) * drawn[:, :TRIES])
        low, high = np.log(self.ratio)
        ratio = np.exp(low + (high - low) * drawn[:, TRIES : 2 * TRIES])
        box_w, box_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [N, TRIES]
        fits = (box_w >= 1) & (box_w <= image_w) & (box_h >= 1) & (box_h <= image_h)

        first = fits.argmax(1)[:, None]  # the first try that fits; 0 where none does, replaced below
        # Where no try fits: the whole image, cut to the nearest ratio that is allowed.
        whole_w = np.minimum(image_w, np.maximum(1, np.rint(image_h * self.ratio[1])))
        whole_h = np.minimum(image_h, np.maximum(1, np.rint(image_w / self.ratio[0])))
        any_fits = fits.any(1, keepdims=True)
        box_w = np.where(any_fits, np.take_along_axis(box_w, first, 1), whole_w)
        box_h = np.where(any_fits, np.take_along_axis(box_h, first, 1), whole_h)
        top = np.where(any_fits, np.floor(drawn[:, TOP, None] * (image_h - box_h + 1)), (image_h - box_h) // 2)
        left = np.where(any_fits, np.floor(drawn[:, LEFT, None] * (image_w - box_w + 1)), (image_w - box_w) // 2)
        return np.concatenate([top, left, box_h, box_w], 1).astype(np.int32), drawn[:, FLIP] < self.flip


@dataclass(frozen=True)
class CenterCrop:
    """Evaluation: the square in the middle, never flipped.

    `share` of the shorter side is kept: 224 / 256 cuts what "resize the shorter side to 256, cut the middle 224"
    cuts, to the nearest source pixel.
    """

    share: float = 224 / 256

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of the centre crop must lie in (0, 1], not {self.share}")

    def draw(self, seed: int, epoch: int, indices: NDArray, sizes: NDArray) -> tuple[NDArray, NDArray]:
        """As `RandomCrop.draw`; seed and epoch change nothing."""
        side = np.maximum(1, np.rint(sizes.min(1) * self.share)).astype(np.int32)  # [N]
        top, left = (sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2
        return np.stack([top, left, side, side], 1).astype(np.int32), np.zeros(len(indices), bool)


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of one global batch of n images.

    indices (n,) int64, positions in the dataset; boxes (n, 4) int32, (top, left, height, width) in source pixels, at
    least 1×1 and inside the image; flips (n,) bool; operations: what each augmentation on pixels has drawn, (n, …).
    """

    indices: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    operations: tuple[NDArray, ...] = ()


class EpochPlan:
    """The plan of one epoch; `len()` is the number of its global batches.

    Args:
        seed, epoch: at least 0.
        sizes: (N, 2) height and width of every image in pixels.
        global_batch_size: images in a step over all ranks, at least 1.
        crop: draws the box and the flip of each image.
        shuffle: the order is drawn anew for each epoch; else it is the dataset's.
        drop_last: leave out the last batch where it is incomplete.
        augmentations: change the pixels, one after another; each draws what it does to each image.
        repeats: copies of each image in its batch, with a box, a flip and operations each: repeated augmentation
            (Berman et al., arXiv 1902.05509). An epoch has as many steps as without, and so sees a part of the images.
            It must divide `global_batch_size`.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        sizes: NDArray,
        global_batch_size: int,
        crop: RandomCrop | CenterCrop,
        *,
        shuffle: bool,
        drop_last: bool,
        augmentations: Sequence[PixelAugmentation] = (),
        repeats: int = 1,
    ):
        if not (0 <= seed < 2**63 and 0 <= epoch < 2**63):
            raise ValueError(f"seed and epoch must lie in [0, 2**63), not {seed} and {epoch}")
        if global_batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, not {global_batch_size}")
        if repeats < 1 or global_batch_size % repeats:
            raise ValueError(f"{repeats} copies of each image do not divide a batch of {global_batch_size}")
        self.seed, self.epoch, self.sizes, self.repeats = seed, epoch, sizes, repeats
        self.global_batch_size, self.crop, self.augmentations = global_batch_size, crop, augmentations
        self.order = np.arange(len(sizes))
        if shuffle:
            keys = random_bits(seed, epoch, self.order, range(ORDER, ORDER + 1))[:, 0]
            self.order = np.argsort(keys, kind="stable")
        whole, rest = divmod(len(sizes), global_batch_size)
        self._num_steps = whole if drop_last or not rest else whole + 1

    def __len__(self) -> int:
        return self._num_steps

    def bounds(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, int]:
        """Where rank's slice of a global batch begins and ends in the epoch, counted in images.

        The slices of all ranks together are the batch, each image and copy once; they differ by at most one image.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in an epoch of {len(self)} steps")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        start = step * self.global_batch_size
        size = min(self.global_batch_size, len(self.order) - start)
        return start + size * rank // world_size, start + size * (rank + 1) // world_size

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> StepPlan:
        """What `rank` of `world_size` ranks does in `step`."""
        start, stop = self.bounds(step, rank, world_size)
        # Each copy of all images of the batch follows the one before: an image has no copy of itself as a neighbour.
        images = self.global_batch_size // self.repeats
        copies, places = np.divmod(np.arange(start, stop) - step * self.global_batch_size, images)
        indices = self.order[step * images + places].astype(np.int64)
        numbers = indices + copies * COPY
        boxes, flips = self.crop.draw(self.seed, self.epoch, numbers, self.sizes[indices])
        operations = tuple(one.draw(self.seed, self.epoch, numbers) for one in self.augmentations)
        return StepPlan(indices, boxes, flips, operations)
