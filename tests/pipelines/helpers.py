"""What the tests of the data share: photographs, their .beton files, the plan of a loader, and reference pixels.

The converter and scikit-learn are imported where they are used: tests for a GPU may run without them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from pipelines.config import AugmentationConfig, DataConfig
from pipelines.imagenet import MEAN, STD
from pipelines.plan import CenterCrop, EpochPlan, RandomCrop, random_bits
from pipelines.sources.folder import FolderSource

# Every way from stored images to batches: backend and form of the data
EXECUTORS = ["ffcv", "dali", "dali on a folder", "torchvision", "torchvision on a folder"]
# The backends among them, by what they read
OF_BETONS = [name for name in EXECUTORS if " on a " not in name]
OF_FOLDERS = [name.removesuffix(" on a folder") for name in EXECUTORS if name.endswith(" on a folder")]

# (left, top, right, bottom) of the cuts from two photographs of 640×427
CUTS = [
    (0, 0, 640, 427),
    (40, 20, 540, 395),
    (100, 0, 360, 400),
    (0, 60, 400, 360),
    (9, 9, 265, 265),
    (50, 70, 250, 220),
]


@dataclass
class Photos:
    """Twelve photographs: in a folder, in .beton files verbatim, and half of them raw."""

    folder: Path
    verbatim: Path
    half_raw: Path

    @property
    def source(self) -> FolderSource:
        """What the folder's val (and train) holds."""
        return FolderSource(self.folder / "val")


def write_photos(folder: Path, blur: float = 0) -> None:
    """Twelve photographs in two classes, in six sizes; train and val hold the same."""
    from sklearn.datasets import load_sample_images

    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        whole = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
            for number, cut in enumerate(CUTS):
                whole.crop(cut).save(folder / split / name / f"{number}.JPEG", quality=95)


def converted(src: Path, out: Path, shards: int | None = None, **options) -> Path:
    """`out`, with the .beton files of `src` by these `Options`, each split in so many shards, or in one file.

    In this process, so that FFCV is imported once.
    """
    from tools.conversion.images import Options
    from tools.conversion.parts import Part
    from tools.make_dataset import make_dataset, make_parts

    how = (src, out, Options(**options), "error", 1)
    if shards is None:
        make_dataset(*how)
    else:
        make_parts(*how, [Part(number, shards) for number in range(shards)])
    return out


def listed_by_the_converter(root: Path, strict: bool = False):
    """The images that the converter finds in a folder: its `Source`."""
    from tools.conversion.inputs import open_source

    return open_source(root, strict)


def stored_by_the_converter(data: bytes):
    """What the converter makes of an image without options: its `Stored`."""
    from tools.conversion.images import Options, convert

    return convert(np.frombuffer(data, np.uint8), 0, Options())


def config_of(executor: str, photos: Photos) -> DataConfig:
    """Small images and an epoch of three training batches, to be quick; by one of `EXECUTORS`."""
    backend, _, folder = executor.partition(" on a ")
    root = photos.folder if folder else photos.verbatim
    return DataConfig(root=root, backend=backend, batch_size=4, workers=1, input_size=64, eval_size=64)


class Inverted:
    """An augmentation: half of the images become their negatives, drawn anew in each epoch."""

    def draw(self, seed, epoch, indices):
        return random_bits(seed, epoch, indices, range(1), "inverted")[:, 0] % 2 == 1

    def apply(self, images, operations):
        bits = 255 * torch.from_numpy(operations).to(images.device, torch.uint8)
        return images ^ bits[:, None, None, None]


class Unchanged:
    """Makes an executor hand out bytes, and leaves them as they are."""

    def draw(self, seed, epoch, indices):
        return indices

    def apply(self, images, operations):
        assert images.dtype == torch.uint8 and len(images) == len(operations)
        return images


@dataclass(frozen=True)
class Augmented(AugmentationConfig):
    """With these augmentations of pixels, in training and in evaluation."""

    augmentations: tuple = ()

    def pixel_augmentations(self, training: bool) -> tuple:
        return self.augmentations


def augmented(*augmentations) -> AugmentationConfig:
    return Augmented(augmentations=augmentations)


def training_plan(seed, epoch, sizes, batch_size) -> EpochPlan:
    """As the loader of train plans."""
    return EpochPlan(seed, epoch, sizes, batch_size, RandomCrop(), shuffle=True, drop_last=True)


def evaluation_plan(seed, epoch, sizes, batch_size) -> EpochPlan:
    """As the loader of val plans."""
    return EpochPlan(seed, epoch, sizes, batch_size, CenterCrop(), shuffle=False, drop_last=False)


def plan_of(config: DataConfig, photos: Photos, split: str, epoch: int = 0) -> EpochPlan:
    """The plan of a loader of the photographs."""
    plan = training_plan if split == "train" else evaluation_plan
    return plan(0, epoch, photos.source.sizes, config.batch_size)


def indices_of(batches) -> list[int]:
    """The indices of all images of the batches, in order."""
    return [index for batch in batches for index in batch.indices.tolist()]


def pixels_of(images: Tensor) -> Tensor:
    """Normalised images (…, 3, H, W) as pixels in [0, 255]."""
    return images.float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def by_image(*loaders, epoch=None):
    """{index: pixels (3, S, S), whole numbers in [0, 255]} of what is left of an epoch, or of all of `epoch`."""
    found = {}
    for loader in loaders:
        if epoch is not None:
            loader.set_epoch(epoch)
        for batch in loader:
            pixels = pixels_of(batch.images)
            assert (pixels - pixels.round()).abs().max() < 1e-3
            found |= zip(batch.indices.tolist(), pixels.round(), strict=True)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(pixels, expected[index]) for index, pixels in found.items())


def reference(path: Path, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """The pixels (3, size, size) float32 in [0, 255] of an image's box (top, left, height, width): the whole image by
    Pillow, that is libjpeg-turbo's accurate transform, the box resized in float32, antialiased bilinear.
    """
    top, left, height, width = box
    with Image.open(path) as file:
        whole = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float()
    cut = whole[None, :, top : top + height, left : left + width]
    image = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
    return image.flip(2) if flip else image
