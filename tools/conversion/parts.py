"""Part K of N of a source: a range of each split, in the dataset's order, that one process or machine converts alone.

An image keeps its position in the dataset, on which its form depends. The shards of all parts, one after the other,
hold what a single file would hold.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.beton_shards import shard_name
from pipelines.sources.errors import DataError
from tools.conversion.source import SPLITS, Reader, Source, Split, tasks_of

MAX_PARTS = 256  # whoever reads the shards holds all of them open, of the 1,024 files that are usual


@dataclass(frozen=True, order=True)
class Part:
    """number: from 0 to count - 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Raises:
        DataError: it is not K/N with K below N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]) <= MAX_PARTS:
            raise DataError(
                f"--only {text}: it must be K/N, K from 0 to N - 1 and N at most {MAX_PARTS}: 0/16 to 15/16"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """The name of its files, without a suffix."""
        return shard_name("part", self.number, self.count)

    @property
    def record(self) -> str:
        """The file that says that the whole part is there. After the join, dataset.json says so."""
        return f"{self.name}.json"

    @property
    def files(self) -> str:
        """All its files, as a pattern for a shell."""
        return f"{shard_name('*', self.number, self.count)}.*"

    def stem(self, split: str) -> str:
        return shard_name(split, self.number, self.count)

    def bounds(self, images: int) -> tuple[int, int]:
        """Where its images begin and end among those of a split."""
        return images * self.number // self.count, images * (self.number + 1) // self.count

    def of(self, source: Source) -> Source:
        """A source that holds this part alone.

        Raises:
            DataError: a split has fewer images than there are parts.
        """
        for name, split in source.splits.items():
            if len(split.labels) < self.count:
                raise DataError(f"{name} holds {len(split.labels)} images: they do not fill {self.count} shards")
        return replace(source, splits={name: self._of(split) for name, split in source.splits.items()})

    def _of(self, split: Split) -> Split:
        start, stop = self.bounds(len(split.labels))
        reader = _PartReader(split.reader, start, stop)
        return replace(
            split, labels=split.labels[start:stop], names=split.names[start:stop], reader=reader, first=start
        )


class _PartReader:
    """Reads those images alone whose index lies in [start, stop), and counts them from `start`."""

    def __init__(self, reader: Reader, start: int, stop: int):
        self._reader, self._start, self._stop = reader, start, stop
        tasks = reader.tasks
        if tasks and isinstance(tasks[0], np.ndarray):
            order = np.concatenate(tasks)
            self.tasks: list[Any] = tasks_of(order[(order >= start) & (order < stop)])
        else:
            self.tasks = [task for task in tasks if ((task.indices >= start) & (task.indices < stop)).any()]

    def read(self, task: Any) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        for index, data in self._reader.read(task):
            if self._start <= index < self._stop:
                yield index - self._start, data


def fingerprint(source: Source) -> str:
    """SHA-256 of classes, names and labels: equal wherever the same images are listed."""
    found = hashlib.sha256(json.dumps([source.kind, source.classes]).encode())
    for name in SPLITS:
        split = source.splits[name]
        for column in (split.labels, split.names):
            found.update(f"\0{name} {column.dtype} {len(column)}\0".encode())
            found.update(np.ascontiguousarray(column).data)
    return found.hexdigest()
