"""From options to a loader: the source is opened, the backend chosen and imported on use."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from pipelines.augmentation import PixelAugmentation
from pipelines.batch import ExecutorOptions, Source
from pipelines.config import BACKENDS, DataConfig
from pipelines.loader import Loader
from pipelines.sources.errors import DataError
from pipelines.stages import DeviceStage

# A backend is a module with a `create_executor(source, options)`, and a line here.
EXECUTORS = {
    "dali": "pipelines.executors.dali_executor",
    "ffcv": "pipelines.executors.ffcv_executor",
    "torchvision": "pipelines.executors.torchvision_executor",
    "synthetic": "pipelines.executors.synthetic_executor",
}


def build_loader(
    config: DataConfig,
    split: Literal["train", "val"],
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    augmentations: Sequence[PixelAugmentation] = (),
) -> Loader:
    """The loader of one split; its backend is imported here, on use.

    Args:
        device, dtype: of the batches.
        augmentations: on pixels, of this split, carried out one after another.

    Raises:
        DataError: missing or damaged data, a backend that can't be used, or a batch size that the world size does not
            divide.
    """
    if config.batch_size % world_size:
        raise DataError(
            f"--batch-size {config.batch_size} is global and is shared by {world_size} ranks: "
            f"use a multiple of {world_size}"
        )
    device, training = torch.device(device), split == "train"
    source = _open_source(config, split)
    backend = _choose_backend(source, device) if config.backend == "auto" else config.backend
    if backend not in EXECUTORS:
        raise DataError(f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
    options = ExecutorOptions(config, training, world_size, device, dtype, as_bytes=bool(augmentations))
    executor = import_module(EXECUTORS[backend]).create_executor(source, options)
    stage = DeviceStage(device, dtype, tuple(augmentations))
    return Loader(source, executor, stage, config, training, rank, world_size)


def _open_source(config: DataConfig, split: str) -> Source:
    if config.backend == "synthetic":
        from pipelines.sources.synthetic import SyntheticSource

        images = config.synthetic_images if split == "train" else config.synthetic_images // 10
        return SyntheticSource(images, config.synthetic_classes)
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
            f"no file {Path(config.root) / split}.beton: convert the dataset with python -m tools.make_dataset "
            "SRC OUT, or use --backend torchvision"
        )
    return FolderSource(Path(config.root) / split, config.strict)


def _choose_backend(source: Source, device: torch.device) -> str:
    """DALI decodes on a GPU; on a CPU our own threads are the fastest, and they read .beton files."""
    from pipelines.executors.dali_executor import is_installed
    from pipelines.sources.folder import FolderSource

    if device.type == "cuda" and is_installed():
        return "dali"
    return "torchvision" if isinstance(source, FolderSource) else "ffcv"
