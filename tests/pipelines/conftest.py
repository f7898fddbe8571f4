"""Photographs in a folder and in .beton files, and every backend that reads them.

The converter and scikit-learn are imported where they are used: tests for a GPU may run without them.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter

from pipelines.batch import MEAN, STD
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.sources.folder import FolderSource

# (left, top, right, bottom) of the cuts from two photographs of 640×427
CUTS = [
    (0, 0, 640, 427),
    (40, 20, 540, 395),
    (100, 0, 360, 400),
    (0, 60, 400, 360),
    (9, 9, 265, 265),
    (50, 70, 250, 220),
]


def write_photos(folder, blur=0):
    """Twelve photographs in two classes, in six sizes; train and val hold the same."""
    from sklearn.datasets import load_sample_images

    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        whole = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
            for number, cut in enumerate(CUTS):
                whole.crop(cut).save(folder / split / name / f"{number}.JPEG", quality=95)


def converted(src: Path, out: Path, **options) -> Path:
    """`out`, with the .beton files of `src` by these `Options`. In this process, so that FFCV is imported once."""
    from tools.conversion.images import Options
    from tools.make_dataset import make_dataset

    make_dataset(src, out, Options(**options), "error", workers=1)
    return out


def indices_of(batches):
    return [index for batch in batches for index in batch.indices.tolist()]


def pixels_of(image):
    return image.float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


@dataclass
class Photos:
    """The twelve photographs: in a folder, in .beton files verbatim, and half of them raw."""

    folder: Path
    verbatim: Path
    half_raw: Path

    @property
    def source(self) -> FolderSource:
        """What the folder's val (and train) holds."""
        return FolderSource(self.folder / "val")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Photos:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "folder")
    verbatim = converted(root / "folder", root / "verbatim")
    half_raw = converted(root / "folder", root / "half_raw", mode="reencode", quality=95, jpeg_fraction=0.5)
    return Photos(root / "folder", verbatim, half_raw)


# Every way from stored images to batches: backend and form of the data
EXECUTORS = ["ffcv", "dali", "dali on a folder", "torchvision", "torchvision on a folder"]


@pytest.fixture(params=EXECUTORS)
def small(request, photos) -> DataConfig:
    """Small images and an epoch of three training batches, to be quick; by every executor."""
    backend, _, folder = request.param.partition(" on a ")
    root = photos.folder if folder else photos.verbatim
    return DataConfig(root=root, backend=backend, batch_size=4, workers=1, input_size=64, eval_size=64)


@pytest.fixture
def build():
    """`build_loader`, whose loaders are closed at the end of the test."""
    loaders = []

    def build(*args, **kwargs):
        loaders.append(build_loader(*args, **kwargs))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()
