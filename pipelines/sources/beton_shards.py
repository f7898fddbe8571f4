"""A split in several .beton files, its shards, which are read as one: `train-00000-of-00016.beton` and so on.

The images keep their order, so their indices, and with them the plan, do not depend on the number of shards.
"""

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.fingerprint import digest
from pipelines.sources.beton import DATASET_FILE, BetonSource
from pipelines.sources.errors import DataError
from pipelines.sources.images import Examined

# The attributes of a source that have a row for each image
COLUMNS = ("labels", "sizes", "is_raw", "plain", "offsets", "lengths", "checksums")


def shard_name(split: str, number: int, count: int) -> str:
    """The name of shard `number` of `count`, counted from 0, without a suffix."""
    return f"{split}-{number:05d}-of-{count:05d}"


def find_betons(root: str | Path, split: str) -> list[Path]:
    """The .beton files of a split in the folder `root`: one, or its shards in order, or none.

    Raises:
        DataError: a shard is missing; or the split is there twice, as one file and as shards, or as two sets of shards.
    """
    root = Path(root)
    names = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.beton")
    matches = filter(None, (names.fullmatch(file.name) for file in root.glob(f"{split}-*.beton")))
    found = {(int(match[2]), int(match[1])) for match in matches}
    whole = root / f"{split}.beton"
    sets = [f"{count} shards" for count in sorted({count for count, _ in found})]
    if whole.exists():
        sets.insert(0, whole.name)
    if len(sets) > 1:
        raise DataError(f"{root} holds {split} twice, as {' and as '.join(sets)}: remove what is not wanted")
    if not found:
        return [whole] if whole.exists() else []
    ((count, _), *_) = found
    missing = [shard_name(split, number, count) for number in range(count) if (count, number) not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"no file {root / missing[0]}.beton{more}, of {count} shards: convert what is missing")
    return [root / f"{shard_name(split, number, count)}.beton" for number in range(count)]


def open_betons(root: str | Path, split: str) -> "BetonSource | BetonShards | None":
    """The split in `root`, or None where it is not in .beton files.

    Raises:
        DataError: see `find_betons` and `BetonSource`.
    """
    files = find_betons(root, split)
    if not files:
        return None
    return BetonShards(files) if files[0].stem != split else BetonSource(files[0])


class BetonShards:
    """One split in several files, with all that loaders and programs use of a `BetonSource`.

    Args:
        files: all shards, in order. `dataset.json` must lie beside them: it is written when all shards are there.

    Attributes:
        classes … checksums: as of a `BetonSource`; offsets: where the bytes of each image are in its own file.

    Raises:
        DataError: see `BetonSource`; or no dataset.json.
    """

    classes: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    is_raw: NDArray[np.bool_]
    plain: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    checksums: NDArray[np.uint64] | None
    has_names = True
    note: str | None = None

    def __init__(self, files: list[Path]):
        record = files[0].with_name(DATASET_FILE)
        try:
            dataset = json.loads(record.read_text())
        except FileNotFoundError as error:
            raise DataError(
                f"no file {record}: the shards beside it are no dataset until dcd-dataset SRC OUT --join (in a "
                f"checkout python -m tools.make_dataset SRC OUT --join) has found all of them"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{record} does not read ({error}): convert the dataset again") from error
        self._shards: list[BetonSource] = []
        for file in files:
            self._shards.append(BetonSource(file, (record, dataset)))
            self.classes = self._shards[-1].classes = self._shards[0].classes
        images = [len(shard) for shard in self._shards]
        self._ends = np.cumsum(images)
        self._starts = self._ends - images
        for column in COLUMNS:
            whole = np.concatenate([getattr(shard, column) for shard in self._shards])
            setattr(self, column, whole)
            for shard, part in zip(self._shards, np.split(whole, self._ends[:-1]), strict=True):
                setattr(shard, column, part)  # views: nothing is kept twice
        self._memory = np.array([shard.data.ctypes.data for shard in self._shards], np.uint64)

    def __len__(self) -> int:
        return len(self.labels)

    def _find(self, index: int) -> tuple[BetonSource, int]:
        """The shard that holds image `index`, and the index there."""
        number = np.searchsorted(self._ends, index, "right")
        return self._shards[number], index - self._starts[number]

    def name(self, index: int) -> str:
        """How an error names image `index`: by its shard and its place there."""
        shard, inner = self._find(index)
        return shard.name(inner)

    def fingerprint_parts(self) -> dict[str, str]:
        """See `BetonSource.fingerprint_parts`; the same as those of one file with all images."""
        assert self.checksums is not None  # shards have them
        return {"bytes": digest(self.checksums)}

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `BetonSource.read`."""
        shard, inner = self._find(index)
        return shard.read(inner)

    def read_sound(self, index: int) -> NDArray[np.uint8]:
        """See `BetonSource.read_sound`."""
        shard, inner = self._find(index)
        return shard.read_sound(inner)

    def examine(self, index: int, with_pixels: bool = True, memory: NDArray[np.uint8] | None = None) -> Examined:
        """See `BetonSource.examine`."""
        shard, inner = self._find(index)
        return shard.examine(inner, with_pixels, memory)

    def examine_stored(self, index: int, stored: NDArray[np.uint8]) -> Examined:
        """See `BetonSource.examine_stored`."""
        shard, inner = self._find(index)
        return shard.examine_stored(inner, stored)

    def decode(self, index: int, memory: NDArray[np.uint8] | None = None) -> Tensor:
        """See `BetonSource.decode`."""
        shard, inner = self._find(index)
        return shard.decode(inner, memory)

    def damaged_image(self, index: int, reason: str) -> DataError:
        """See `BetonSource.damaged_image`."""
        shard, inner = self._find(index)
        return shard.damaged_image(inner, reason)

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Where in memory the bytes of these images (N,) begin."""
        numbers = np.searchsorted(self._ends, indices, "right")
        return self._memory[numbers] + self.offsets[indices].astype(np.uint64)

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """See `BetonSource.will_need`."""
        numbers = np.searchsorted(self._ends, indices, "right")
        columns = (numbers, self.offsets[indices], self.lengths[indices])
        for number, offset, length in zip(*(column.tolist() for column in columns), strict=True):
            self._shards[number].will_read(offset, length)
