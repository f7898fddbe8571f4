"""Hugging Face's parquet shards: columns `image.bytes`, `image.path` and `label`."""

import contextlib
import json
import os
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.errors import DataError
from tools.conversion.shard_files import find_shards
from tools.conversion.source import Source, Split, check_classes

COLUMNS = ("label", "image.bytes", "image.path")
WNID = re.compile(r"n\d{8}")
SUFFIX = re.compile(r"_n\d{8}(?=\.\w+$)")  # what Hugging Face adds to the names of files
ROWS_PER_TASK = (128, 1024)  # minimum and maximum in a task


@dataclass(frozen=True)
class Task:
    """Rows of a row group, from row `first` on. indices: their positions in the dataset."""

    file: Path
    group: int
    first: int
    indices: NDArray[np.int64]


class ShardReader:
    def __init__(self, tasks: list[Task]):
        self.tasks = tasks

    def read(self, task: Task) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        with _reading(task.file) as parquet:
            row = 0
            # No threads: this process is forked, and the parent's threads do not exist in it.
            batches = parquet.iter_batches(64, row_groups=[task.group], columns=["image.bytes"], use_threads=False)
            for batch in batches:
                for value in batch.column(0).field(0):
                    at, row = row - task.first, row + 1
                    if at >= len(task.indices):
                        return
                    if at >= 0:
                        data = np.frombuffer(value.as_py() if value.is_valid else b"", np.uint8)
                        yield int(task.indices[at]), data


@dataclass(frozen=True)
class _Listing:
    """All rows of a split in the order of storage. groups: (file, number, rows) of each row group."""

    labels: NDArray[np.int64]
    paths: list[str | None]
    names: list[str]
    groups: list[tuple[Path, int, int]]
    features: dict[str, Any]


def open_shards(path: Path) -> Source | None:
    """The shards below `path`, or None where there are none."""
    files = find_shards(path)
    if files is None:
        return None
    listings = {split: _list_rows(path, files[split]) for split in files}
    classes, positions = _find_classes(path, listings)
    for listing in listings.values():
        # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
        unknown = sorted(set(listing.labels.tolist()) - set(positions))
        if unknown:
            raise DataError(f"label {unknown[0]} of {path} is none of its {len(classes)} classes: download it again")
    # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
    held = {split: {classes[positions[label]] for label in set(listings[split].labels.tolist())} for split in files}
    check_classes(path, *held.values())
    empty = sorted(set(classes) - held["train"])
    if empty:
        raise DataError(f"class {empty[0]} has no images in {path}: download it again")
    return Source("Hugging Face", classes, {split: _split(listings[split], positions) for split in files})


def _list_rows(path: Path, files: list[Path]) -> _Listing:
    labels, paths, names, groups, features = [], [], [], [], {}
    for file in files:
        with _reading(file) as parquet:
            columns = {parquet.schema.column(i).path for i in range(len(parquet.schema))}
            missing = [column for column in COLUMNS if column not in columns]
            if missing:
                raise DataError(f"{file} has no column {' and no '.join(missing)}: it must have {', '.join(COLUMNS)}")
            # The bytes of the images are not read.
            table = parquet.read(columns=["label", "image.path"], use_threads=False)
            if table["label"].null_count:
                raise DataError(f"{file} has rows without a label: download it again")
            labels.append(table["label"].to_numpy().astype(np.int64))
            inner = [row["path"] if row else None for row in table["image"].to_pylist()]
            paths += inner
            relative = file.relative_to(path)
            names += [f"{relative}/{name or f'row {row}'}" for row, name in enumerate(inner)]
            groups += [(file, i, parquet.metadata.row_group(i).num_rows) for i in range(parquet.num_row_groups)]
            metadata = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
            features = features or json.loads(metadata).get("info", {}).get("features", {})
    found = np.concatenate(labels)
    if not len(found):
        raise DataError(f"{files[0]} and its neighbours hold no rows: download them again")
    return _Listing(found, paths, names, groups, features)


def _find_classes(path: Path, listings: dict[str, _Listing]) -> tuple[list[str], dict[int, int]]:
    """(class names, {label in the shards: position in the class names})."""
    wnids: dict[int, set[str | None]] = {}
    for listing in listings.values():
        # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
        for label, name in zip(listing.labels.tolist(), listing.paths, strict=True):
            match = WNID.search(name or "")
            wnids.setdefault(label, set()).add(match and match[0])
    names = {label: name for label, found in wnids.items() if len(found) == 1 for name in found if name is not None}
    if len(names) < len(wnids) or len(set(names.values())) < len(names):
        label_feature = listings["train"].features.get("label", {})
        names = dict(enumerate(label_feature.get("names") or [])) or {label: str(label) for label in sorted(wnids)}
    if all(WNID.fullmatch(name) for name in names.values()):
        names = dict(sorted(names.items(), key=lambda item: item[1]))
    return list(names.values()), {label: position for position, label in enumerate(names)}


def _split(listing: _Listing, positions: dict[int, int]) -> Split:
    # pyrefly: ignore[not-iterable]: it takes what tolist() gives for a number
    labels = np.array([positions[label] for label in listing.labels.tolist()], np.int64)
    # Sorted by the file names of the other forms: the suffix would change the order.
    keys = np.array([os.fsencode(SUFFIX.sub("", name or "")) for name in listing.paths])
    order = np.lexsort((keys, labels))  # stable: images without a name stay as stored
    index = np.empty_like(order)  # position in the dataset of each row
    index[order] = np.arange(len(order))
    tasks, row = [], 0
    for file, group, rows in listing.groups:
        step = min(max(rows // 16, ROWS_PER_TASK[0]), ROWS_PER_TASK[1])
        for first in range(0, rows, step):
            tasks.append(Task(file, group, first, index[row + first : row + min(first + step, rows)]))
        row += rows
    names = np.array([os.fsencode(name) for name in listing.names])[order]
    return Split(labels[order], names, None, ShardReader(tasks))


@contextlib.contextmanager
def _reading(file: Path) -> Generator[Any]:
    """`file` as a pyarrow ParquetFile; a damaged file raises a DataError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"parquet files need pyarrow ({error}): install it with make setup") from error
    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} is damaged or no parquet file ({reason}): download it again") from error
