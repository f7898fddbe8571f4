"""ImageNet in the forms that people have it in, recognised by what lies in a folder.

Whatever the form, a split's images are in one order: by class (sorted WordNet IDs), then by file name. They are read in
the order in which they are stored, a task at a time; a task is a few dozen images that one process converts.
"""

import csv
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.errors import DataError
from pipelines.sources.images import EXTENSIONS
from pipelines.sources.listing import LeftOut, Listing, list_images

IMAGES_PER_TASK = 64
SPLITS = ("train", "val")
KNOWN = (
    "train/ and val/ with a folder for each class; ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
    "ILSVRC2012_devkit_t12.tar.gz; ILSVRC/Data/CLS-LOC and LOC_val_solution.csv (Kaggle); or train-*.parquet and "
    "validation-*.parquet, or folders of these names (Hugging Face)"
)


class Reader(Protocol):
    """Reads the bytes of images. It is made in one process and used in others, which are forked."""

    tasks: list[Any]

    def read(self, task: Any) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        """(index in the dataset, bytes, or the error that kept them from being read) of each image of `task`."""


@dataclass(frozen=True)
class Split:
    """Attributes:
    labels: (N,) int64.
    names: (N,) bytes, the path of each image inside the source. An array, which forked processes share.
    largest: bytes of the largest image, or None where only reading tells.
    """

    labels: NDArray[np.int64]
    names: NDArray[np.bytes_]
    largest: int | None
    reader: Reader

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])


@dataclass(frozen=True)
class Source:
    """An ImageNet. kind: its form. classes: sorted; a label is a position in them. splits: train and val.

    left_out: what lies among the images and is none, by its folder.
    """

    kind: str
    classes: list[str]
    splits: dict[str, Split]
    left_out: dict[Path, LeftOut] = field(default_factory=dict)


def open_source(path: Path, strict: bool = False) -> Source:
    """List the images of the ImageNet below `path`.

    Args:
        strict: what would be left out is an error.

    Raises:
        DataError: it has no known form, a part is missing or damaged, or train and val differ in their classes.
    """
    from tools.conversion.shards import open_shards
    from tools.conversion.tars import open_tars

    if not path.is_dir():
        raise DataError(f"no folder {path}: SRC must be a folder that holds {KNOWN}")
    for open_form in (open_shards, _open_folders, open_tars, _open_kaggle):  # shards may lie in train/ and val/
        source = open_form(path)
        if source is not None:
            for folder, left_out in source.left_out.items() if strict else ():
                left_out.refuse(folder)
            return source
    raise DataError(f"{path} holds no ImageNet in a known form: it must hold {KNOWN}")


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


def check_classes(path: Path, train: list[str], val: list[str]) -> None:
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


class FileReader:
    """Reads one file for each image: `root`/`files[index]`."""

    def __init__(self, root: Path, files: NDArray[np.bytes_]):
        self._root = os.fsencode(root)
        self._files = files
        self.tasks = tasks_of(np.arange(len(files)))

    def read(self, task: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        for index in task.tolist():
            try:
                yield index, np.fromfile(os.path.join(self._root, self._files[index]), np.uint8)
            except OSError as error:
                yield index, error


def _open_folders(path: Path) -> Source | None:
    """ImageFolder: train/CLASS/*.JPEG and val/CLASS/*.JPEG."""
    if not check_parts(path, {f"{split}/": (path / split).is_dir() for split in SPLITS}):
        return None
    listings = {split: list_images(path / split) for split in SPLITS}
    check_classes(path, listings["train"].classes, listings["val"].classes)
    splits = {split: _folder_split(path, split, listing) for split, listing in listings.items()}
    left_out = {path / split: listing.left_out for split, listing in listings.items()}
    return Source("ImageFolder", listings["train"].classes, splits, left_out)


def _open_kaggle(path: Path) -> Source | None:
    """Kaggle's download: class folders for train, one folder and a table of labels for val."""
    data = Path("ILSVRC/Data/CLS-LOC") if (path / "ILSVRC").is_dir() else Path("Data/CLS-LOC")
    if not check_parts(path, {f"{data}/{split}/": (path / data / split).is_dir() for split in SPLITS}):
        return None
    listing = list_images(path / data / "train")
    classes, train = listing.classes, _folder_split(path, f"{data}/train", listing)
    solution = "LOC_val_solution.csv"
    tables = [folder / solution for folder in (path, path / "ILSVRC", path.absolute().parent)]
    table = next((file for file in tables if file.is_file()), None)
    if table is None:
        raise DataError(f"no file {tables[0]}: it names the classes of {path / data}/val; Kaggle has it beside ILSVRC")
    with open(table, newline="", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise DataError(f"{table} has no columns ImageId and PredictionString: download it again")
        wnids = {row["ImageId"]: (row["PredictionString"] or "").split(" ")[0] for row in rows}
    folder = path / data / "val"
    files = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS)]
    unknown = sorted(file for file in files if Path(file).stem not in wnids)
    if unknown:
        raise DataError(f"{table} has no class for {folder / unknown[0]}: download it again, or remove the image")
    images = sorted((wnids[Path(file).stem], file) for file in files)
    check_classes(path, classes, [wnid for wnid, _ in images])
    positions = {wnid: label for label, wnid in enumerate(classes)}
    labels = [positions[wnid] for wnid, _ in images]
    val = _file_split(path, [f"{data}/val/{file}" for _, file in images], labels)
    return Source("Kaggle", classes, {"train": train, "val": val})


def _folder_split(path: Path, folder: str, listing: Listing) -> Split:
    return _file_split(path, [f"{folder}/{name}" for name in listing.names], listing.labels)


def _file_split(path: Path, names: list[str], labels: list[int]) -> Split:
    """A split of one file for each image, in the dataset's order; `names` are paths below `path`."""
    files = np.array([os.fsencode(name) for name in names])
    return Split(np.array(labels, np.int64), files, _largest(path, names), FileReader(path, files))


def _largest(path: Path, names: list[str]) -> int:
    """Bytes of the largest file."""

    def size(name: str) -> int:
        try:
            return os.stat(path / name).st_size
        except OSError:
            return 0  # reading it will say what is wrong, and list it

    def largest(part: list[str]) -> int:
        return max(map(size, part))

    parts = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with ThreadPoolExecutor(32) as pool:  # this waits for the disk or the network, not for the processor
        return max(pool.map(largest, parts), default=0)
