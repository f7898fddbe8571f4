"""The options of the data: what is read, and how it is cut. A string beside a type is a flag of the command line,
or a mark of `training/command_line.py`: "usual" options are in the short help."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pipelines.augmentation import PixelAugmentation
from pipelines.augmentations import OPTIONS
from pipelines.plan import CenterCrop, RandomCrop

Backend = Literal["auto", "dali", "ffcv", "torchvision", "synthetic"]
BACKENDS = get_args(Backend)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how."""

    root: Annotated[Path | None, "--data", "-d", "usual"] = None
    """Folder with train.beton and val.beton or their shards (tools.make_dataset), or with train/CLASS/*.JPEG and
    val/CLASS/*.JPEG, or other formats that Pillow reads."""
    backend: Annotated[Backend, "usual"] = "auto"
    """What reads the data; auto: DALI on a GPU if installed, else FFCV for .beton files, else torchvision; synthetic
    reads nothing and shows the upper bound."""
    batch_size: Annotated[int, "-b", "usual"] = 256
    """Images in an optimizer step, over all ranks."""
    workers: Annotated[int | None, "-j", "usual"] = None
    """Loading threads or processes of this machine, shared by its ranks; at most, and by default, one for each core."""
    input_size: Annotated[int, "usual"] = 224
    """Side of the training images in pixels."""
    eval_size: Annotated[int | None, "usual"] = None
    """Side of the evaluation images in pixels; by default --input-size."""
    start_size: int | None = None
    """Progressive resizing: train with this size at first, and grow to --input-size ..."""
    size_ramp: tuple[int, int] = (0, 0)
    """... between these two epochs, in steps of 32 pixels."""
    strict: bool = False
    """Files among the images whose names are not an image's are an error; else one line counts and names them."""
    exact_decode: bool = False
    """Decode training images pixel by pixel even where FFCV's backend could decode them at half their size."""
    dali_full_decode: float | None = None
    """DALI on a GPU: decode whole images, this share of them in [0, 1] by the GPU's JPEG decoder, and cut afterwards;
    by default only the box of each image is decoded."""
    synthetic_images: int = 1_281_167
    """Images in an epoch of the synthetic backend; an evaluation has a tenth of them."""
    synthetic_classes: int | None = None
    """Classes of the synthetic backend; by default --num-classes, or else 1000."""

    def __post_init__(self):
        """Raise ValueError for a value that no loader can carry out."""
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: must be at least 1")
        sizes = {"input-size": self.input_size, "eval-size": self.eval_size, "start-size": self.start_size}
        for flag, size in sizes.items():
            if size is not None and not 32 <= size <= 512:
                raise ValueError(f"--{flag} {size}: must lie between 32 and 512 pixels")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers {self.workers}: must be at least 0")
        share = self.dali_full_decode
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"--dali-full-decode {share}: must lie in [0, 1]")

    def image_size(self, training: bool, epoch: int) -> int:
        """Side in pixels of the images of an epoch, which counts from 0."""
        if not training:
            return self.eval_size or self.input_size
        if self.start_size is None:
            return self.input_size
        first, last = self.size_ramp
        done = min(1.0, max(0.0, (epoch - first) / max(1, last - first)))
        size = self.start_size + done * (self.input_size - self.start_size)
        return self.input_size if done == 1 else round(size / 32) * 32

    def largest_size(self, training: bool) -> int:
        """The highest `image_size` of all epochs."""
        return max(self.image_size(training, 0), self.image_size(training, self.size_ramp[1]))

    @property
    def machine_workers(self) -> int:
        """Loading threads or processes of this machine, over all of its ranks."""
        cores = len(os.sched_getaffinity(0))
        return cores if self.workers is None else min(self.workers, cores)

    def rank_workers(self, ranks_of_machine: int) -> int:
        """Loading threads or processes of each rank."""
        return -(-self.machine_workers // ranks_of_machine)


# The options of pixels are those of the modules in `pipelines/augmentations`. A dataclass has the fields of its last
# base first.
@dataclass(frozen=True)
class AugmentationConfig(*reversed(OPTIONS)):  # pyrefly: ignore[invalid-inheritance]
    """What is cut from an image, whether it is flipped, and what is done to its pixels."""

    crop_area: Annotated[tuple[float, float], "usual"] = (0.08, 1.0)
    """Lowest and highest share of the image's area in a training crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Lowest and highest width / height of a training crop."""
    flip: Annotated[float, "usual"] = 0.5
    """Probability of a horizontal flip in training."""
    eval_crop: float = 224 / 256
    """Share of the shorter side that evaluation keeps (224/256: resize to 256, cut 224)."""

    repeats: int = 1
    """Repeated augmentation: copies of each training image in its batch, each cut and changed in its own way; an epoch
    keeps its number of steps, and so sees a part of the images."""

    def __post_init__(self):
        """Raise ValueError for values out of range."""
        if self.repeats < 1:
            raise ValueError(f"--repeats {self.repeats}: must be at least 1")
        for training in (True, False):
            self.crop(training)
            self.pixel_augmentations(training)

    def crop(self, training: bool) -> RandomCrop | CenterCrop:
        """What draws the boxes and flips."""
        return RandomCrop(self.crop_area, self.crop_ratio, self.flip) if training else CenterCrop(self.eval_crop)

    def pixel_augmentations(self, training: bool) -> tuple[PixelAugmentation, ...]:
        """What is done to the pixels in training, one after another in the order of OPTIONS."""
        made = [option.augmentation(self) for option in OPTIONS] if training else []
        return tuple(one for one in made if one is not None)
