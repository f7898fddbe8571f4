"""From options to a loader: the source is opened, the backend chosen and imported on use."""

from importlib import import_module
from pathlib import Path

import torch

from pipelines.batch import ExecutorOptions, Place, Source
from pipelines.config import BACKENDS, AugmentationConfig, DataConfig
from pipelines.loader import Loader
from pipelines.sources.errors import DataError

HERE, DEFAULT_AUGMENTATION = Place(), AugmentationConfig()


def build_loader(
    config: DataConfig,
    split: str,
    place: Place = HERE,
    augmentation: AugmentationConfig = DEFAULT_AUGMENTATION,
    seed: int = 0,
    training: bool | None = None,
) -> Loader:
    """The loader of one split; its backend is imported here, on use.

    Args:
        config, augmentation: the options. place: where the batches go, by default to one rank on the CPU.
        split: the name of a folder or .beton file in the folder of the data.
        seed: the order of the images, their boxes and flips follow from it; at least 0.
        training: in shuffled order, cut and changed at random; by default if the split is train.

    Raises:
        DataError: missing or damaged data, a backend that can't be used, or a batch size that the world size or
            --repeats does not divide.
    """
    if config.batch_size % place.world_size:
        raise DataError(
            f"--batch-size {config.batch_size} is global and is shared by {place.world_size} ranks: "
            f"use a multiple of {place.world_size}"
        )
    if config.batch_size % augmentation.repeats:
        raise DataError(f"--repeats {augmentation.repeats} must divide --batch-size {config.batch_size}")
    source = open_source(config, split)
    backend = _choose_backend(source, place.device) if config.backend == "auto" else config.backend
    if backend not in BACKENDS:
        raise DataError(f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
    training = split == "train" if training is None else training
    options = ExecutorOptions(config, training, place, as_bytes=bool(augmentation.pixel_augmentations(training)))
    # A backend is a module of this name with a `create_executor`, and its name in `config.Backend`.
    executor = import_module(f"pipelines.executors.{backend}_executor").create_executor(source, options)
    return Loader(source, executor, training, config, augmentation, place, seed)


def open_source(config: DataConfig, split: str) -> Source:
    """The images of one split, from .beton files where there are any, else from class folders.

    Raises:
        DataError: missing or damaged data.
    """
    if config.backend == "synthetic":
        from pipelines.sources.synthetic import SyntheticSource

        images = config.synthetic_images if split == "train" else config.synthetic_images // 10
        return SyntheticSource(images, config.synthetic_classes or 1000)
    from pipelines.sources.beton_shards import open_betons
    from pipelines.sources.folder import FolderSource

    if config.root is None:
        raise DataError(
            "no data: --data must name a folder that holds train and val, or train.beton and val.beton "
            "(or use --backend synthetic)"
        )
    source = open_betons(config.root, split)
    if source is not None:
        return source
    if config.backend == "ffcv":
        raise DataError(
            f"no file {Path(config.root) / split}.beton: convert the dataset with dcd-dataset SRC OUT (in a "
            "checkout python -m tools.make_dataset SRC OUT), or use --backend torchvision"
        )
    return FolderSource(Path(config.root) / split, config.strict)


def _choose_backend(source: Source, device: torch.device) -> str:
    """DALI decodes on a GPU; on a CPU our own threads are the fastest, and they read .beton files."""
    from pipelines.executors.dali_executor import is_installed
    from pipelines.sources.folder import FolderSource

    if device.type == "cuda" and is_installed():
        return "dali"
    return "torchvision" if isinstance(source, FolderSource) else "ffcv"
