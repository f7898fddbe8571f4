"""One file for each image: class folders, and Kaggle's download."""

import csv
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.errors import DataError
from pipelines.sources.images import EXTENSIONS
from pipelines.sources.listing import LeftOut, Listing, class_name, list_folder, list_images
from tools.conversion.source import SPLITS, Source, Split, check_classes, check_parts, tasks_of


class FileReader:
    """Reads one file for each image: `root`/`files[index]`."""

    def __init__(self, root: Path, files: NDArray[np.bytes_]):
        self._root = os.fsencode(root)
        self._files = files
        self.tasks = tasks_of(np.arange(len(files)))

    def read(self, task: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        # pyrefly: ignore[not-iterable]: it takes what tolist() gives for a number
        for index in task.tolist():
            try:
                yield index, np.fromfile(os.path.join(self._root, self._files[index]), np.uint8)
            except OSError as error:
                yield index, error


def open_folders(path: Path) -> Source | None:
    """ImageFolder: train/CLASS/*.JPEG and val/CLASS/*.JPEG."""
    if not check_parts(path, {f"{split}/": (path / split).is_dir() for split in SPLITS}):
        return None
    return _of_files("ImageFolder", path, {split: (split, list_images(path / split)) for split in SPLITS})


def open_kaggle(path: Path) -> Source | None:
    """Kaggle's download: class folders for train, one folder and a table of labels for val."""
    data = "ILSVRC/Data/CLS-LOC" if (path / "ILSVRC").is_dir() else "Data/CLS-LOC"
    if not check_parts(path, {f"{data}/{split}/": (path / data / split).is_dir() for split in SPLITS}):
        return None
    train, val = list_images(path / data / "train"), _list_kaggle_val(path, path / data / "val")
    return _of_files("Kaggle", path, {"train": (f"{data}/train", train), "val": (f"{data}/val", val)})


def _list_kaggle_val(path: Path, folder: Path) -> Listing:
    """Kaggle's evaluation images, in `folder`."""
    folders, files = list_folder(folder)
    if folders and files:
        raise DataError(f"{folder} holds both files and folders, {files[0]} and {folders[0]}: leave only one kind")
    if folders:  # val was sorted into class folders by a script, as many do
        return list_images(folder)
    table = next((file for file in _kaggle_tables(path) if file.is_file()), None)
    if table is None:
        table = _kaggle_tables(path)[0]
        raise DataError(f"no file {table}: it names the classes of {folder}; Kaggle has it beside ILSVRC")
    wnids = _read_solution(table)
    left_out = LeftOut()
    files = left_out.take_images(files)
    unknown = next((file for file in files if Path(file).stem not in wnids), None)
    if unknown:
        raise DataError(f"{table} has no class for {folder / unknown}: download it again, or remove the image")
    absent = min(wnids.keys() - {Path(file).stem for file in files}, default=None)
    if absent:
        raise DataError(f"{folder} has no image {absent}, which {table} names: put it there, or remove its row")
    images = sorted((class_name(wnids[Path(file).stem]), file) for file in files)
    classes = sorted({wnid for wnid, _ in images})
    labels = [classes.index(wnid) for wnid, _ in images]
    return Listing(classes, [file for _, file in images], labels, "", left_out)


def _kaggle_tables(path: Path) -> list[Path]:
    """Paths where the table of labels may be."""
    return [folder / "LOC_val_solution.csv" for folder in (path, path / "ILSVRC", path.absolute().parent)]


def _of_files(kind: str, path: Path, listings: dict[str, tuple[str, Listing]]) -> Source:
    """A source of one file for each image. listings: for each split, its folder below `path` and its images."""
    check_classes(path, listings["train"][1].classes, listings["val"][1].classes)
    splits = {}
    for split, (folder, listing) in listings.items():
        names = [f"{folder}/{name}" for name in listing.names]
        files = np.array([os.fsencode(name) for name in names])
        labels = np.array(listing.labels, np.int64)
        splits[split] = Split(labels, files, _largest(path, names), FileReader(path, files))
    left_out = {path / folder: listing.left_out for folder, listing in listings.values()}
    return Source(kind, listings["train"][1].classes, splits, left_out)


def _read_solution(table: Path) -> dict[str, str]:
    """{image name without its suffix: class} from Kaggle's table, which a spreadsheet program may have saved again.

    Raises:
        DataError: it is not Kaggle's table, or an image has no class or two classes.
    """
    wnids: dict[str, str] = {}
    try:
        with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            if not {"ImageId", "PredictionString"} <= set(header):
                raise DataError(f"{table} has no columns ImageId and PredictionString: download it again")
            for row in rows:
                cells = dict(zip(header, map(str.strip, row), strict=False))
                image, prediction = cells.get("ImageId", ""), cells.get("PredictionString", "").split()
                if not any(cells.values()):
                    continue
                if not image or not prediction:
                    raise DataError(f"{table} has no class for {image or 'a row without an image'}: download it again")
                name = image[: -len(Path(image).suffix)] if image.lower().endswith(EXTENSIONS) else image
                if wnids.setdefault(name, prediction[0]) != prediction[0]:
                    raise DataError(f"{table} has two classes for {image}: download it again")
    except csv.Error as error:
        raise DataError(f"{table} is no table ({error}): download it again") from error
    return wnids


def _largest(path: Path, names: list[str]) -> int:
    """Bytes of the largest file."""

    def size(name: str) -> int:
        try:
            return os.stat(path / name).st_size
        except OSError:
            return 0  # reading it later reports the error

    def largest(part: list[str]) -> int:
        return max(map(size, part))

    parts = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with ThreadPoolExecutor(32) as pool:  # this waits for the disk or the network, not for the processor
        return max(pool.map(largest, parts), default=0)
