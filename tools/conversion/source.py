"""An ImageNet to be converted, in whatever form: its splits, and who reads them.

A split's images are in one order: by class (sorted WordNet IDs), then by file name. They are read in the order in which
they are stored, a task at a time; a task is a few dozen images that one process converts.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.errors import DataError
from pipelines.sources.listing import LeftOut

IMAGES_PER_TASK = 64
SPLITS = ("train", "val")


class Reader(Protocol):
    """Reads the bytes of images. It is made in one process and used in others, which are forked.

    A task is the indices of its images (N,), or has them as `indices`.
    """

    tasks: list[Any]

    def read(self, task: Any) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        """(index in the dataset, bytes, or the error that kept them from being read) of each image of `task`."""


@dataclass(frozen=True)
class Split:
    """Attributes:
    labels: (N,) int64.
    names: (N,) bytes, the path of each image inside the source. An array, which forked processes share.
    largest: bytes of the largest image, or None where that is not known before reading.
    first: position in the whole dataset of the first image; above 0 in a part.
    """

    labels: NDArray[np.int64]
    names: NDArray[np.bytes_]
    largest: int | None
    reader: Reader
    first: int = 0

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])


@dataclass(frozen=True)
class Source:
    """An ImageNet. kind: its form. classes: sorted; a label is a position in them. splits: train and val.

    left_out: for each folder, the files in it that are not images.
    """

    kind: str
    classes: list[str]
    splits: dict[str, Split]
    left_out: dict[Path, LeftOut] = field(default_factory=dict)


def tasks_of(order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices `order` (N,), in parts of a task each."""
    return [order[start : start + IMAGES_PER_TASK] for start in range(0, len(order), IMAGES_PER_TASK)]


def check_parts(path: Path, parts: dict[str, bool]) -> bool:
    """Whether a form is there, by which of its parts are: none, or all.

    Raises:
        DataError: only some are.
    """
    missing = [name for name, found in parts.items() if not found]
    if missing and len(missing) < len(parts):
        found = [name for name in parts if name not in missing]
        raise DataError(f"{path} holds {' and '.join(found)} but no {' and no '.join(missing)}: put both there")
    return not missing


def check_classes(path: Path, train: Collection[str], val: Collection[str]) -> None:
    """Raises:
    DataError: the splits differ in their classes.
    """
    differing = sorted(set(train) ^ set(val))
    if differing:
        where = "train" if differing[0] in train else "val"
        raise DataError(
            f"train and val of {path} differ in {len(differing)} classes, such as {differing[0]}, which only {where} "
            f"has: both must hold images of the same classes"
        )
