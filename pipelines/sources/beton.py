"""Images in a .beton file, FFCV's format (version 2), written by `tools.make_dataset` or by FFCV itself.

    header | field descriptors | metadata: one row an image | pages of image bytes | allocation table

At the start everything but the pages is read, and checked: it must fit the file, and `dataset.json` beside it if there
is one. FFCV itself trusts every byte. The pages are mapped into memory, which the processes of a machine share.
"""

import hashlib
import json
import mmap
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import native
from pipelines.fingerprint import digest
from pipelines.sources.checked import Checked
from pipelines.sources.errors import DataError
from pipelines.sources.images import BadImage, Examined, examine

VERSION = 2
DATASET_FILE = "dataset.json"

# FFCV's types, which are little-endian and aligned as C structs
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
INT_FIELD, IMAGE_FIELD = 1, 2  # type numbers
MOST_CLASSES = 1_000_000  # a damaged label must not ask for a name for each number below it
JPEG, RAW = 0, 1  # modes of an image
FIELD_TYPES = {0: np.dtype("<f8"), INT_FIELD: np.dtype("<i8"), IMAGE_FIELD: IMAGE}


class BetonSource:
    """One split in a .beton file.

    Args:
        path: the file. `dataset.json` beside it adds the names of the classes and the checksums. Without it the classes
            have numbers for names, and only the decoder notices damage to an image.
        record: the path and content of another file to use in place of `dataset.json`.

    Attributes:
        classes: names, sorted; the label is the position in this list. has_names: False where they are numbers.
        labels: (N,) int64. sizes: (N, 2) int32, height and width in pixels.
        offsets, lengths: (N,) int64, where the bytes of each image are in `data`.
        is_raw: (N,) bool, whether these bytes are height × width × 3 pixels; plain: whether they are a JPEG.
        checksums: (N,) uint64, XXH64 of them, or None.
        data: (size of the file,) uint8, the mapped file. note: None, since the converter has reported what it left out.

    Raises:
        DataError: there is no such file, it has another format or version, or it is not whole.
    """

    def __init__(self, path: str | Path, record: tuple[Path, dict[str, Any]] | None = None):
        self.path = Path(path)
        self.note: str | None = None
        try:
            # Not np.memmap, which can't be asked to read ahead (`will_need`)
            with open(self.path, "rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except FileNotFoundError as error:
            raise DataError(
                f"no file {self.path}: make it with dcd-dataset SRC OUT (in a checkout python -m tools.make_dataset "
                "SRC OUT)"
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot read {self.path} ({error.strerror}): name a .beton file that can be read"
            ) from error
        except ValueError as error:
            raise self._damaged("it is empty") from error
        self.data = np.frombuffer(self._mapping, np.uint8)
        images, labels, allocations = self._read_index()
        if len(labels) == 0:
            raise DataError(f"{self.path} holds no images")
        self.labels = labels.astype(np.int64)
        self.sizes = np.stack([images["height"], images["width"]], 1).astype(np.int32)
        self.is_raw = images["mode"] == RAW
        self.plain = ~self.is_raw
        self.offsets, self.lengths = self._find_bytes(images, allocations)
        for label in (self.labels.min(), self.labels.max()):
            if not 0 <= label < MOST_CLASSES:
                raise self._damaged(f"label {label}, which is not in [0, {MOST_CLASSES:,})")
        self.classes = [str(label) for label in range(self.labels.max() + 1)]
        self.has_names = False
        self.checksums: NDArray[np.uint64] | None = None
        self._use_record(record)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """How an error names image `index`."""
        return f"image {index} of {self.path}"

    def fingerprint_parts(self) -> dict[str, str]:
        """A hash of the bytes of all images, if there are checksums, for `pipelines.fingerprint`."""
        return {} if self.checksums is None else {"bytes": digest(self.checksums)}

    def read(self, index: int) -> NDArray[np.uint8]:
        """The bytes of image `index`, a view of the mapped file, after comparing them with their checksum.

        Raises:
            DataError: they are not those that were converted.
        """
        offset = self.offsets[index]
        stored = self.data[offset : offset + self.lengths[index]]
        if self.checksums is not None and native.checksum(stored) != self.checksums[index]:
            raise self.damaged_image(index, "its bytes are not those that were converted")
        return stored

    def read_sound(self, index: int) -> NDArray[np.uint8]:
        """As `read`, for decoders that do not notice damage: without checksums, all codes have been read once.

        Raises:
            DataError: it is damaged.
        """
        stored = self.read(index)
        if self.checksums is None and not self.is_raw[index] and index not in self._checked:
            self.examine_stored(index, stored, with_pixels=False)
            self._checked.add(index)
        return stored

    @cached_property
    def _checked(self) -> Checked:
        path = self.path.resolve()
        key = hashlib.sha256(os.fsencode(path)).hexdigest()
        as_it_is = f"{key} {self.index_checksum()} {path.stat().st_mtime_ns}"
        return Checked(f"{path.stem}-{key[:16]}", hashlib.sha256(as_it_is.encode()).hexdigest(), len(self))

    def examine(self, index: int, with_pixels: bool = True, memory: NDArray[np.uint8] | None = None) -> Examined:
        """Read all of image `index`; see `images.examine`.

        Raises:
            DataError: its bytes have changed, or it does not decode.
        """
        return self.examine_stored(index, self.read(index), with_pixels, memory)

    def examine_stored(
        self, index: int, stored: NDArray[np.uint8], with_pixels: bool = True, memory: NDArray[np.uint8] | None = None
    ) -> Examined:
        """As `examine`, of the bytes `stored` (N,), which `read` has returned."""
        height, width = self.sizes[index].tolist()
        if self.is_raw[index]:
            return Examined(height, width, stored.reshape(height, width, 3), reencoded_because="pixels")
        try:
            seen = examine(stored, with_pixels, memory)
        except BadImage as error:
            raise self.damaged_image(index, str(error)) from error
        if (seen.height, seen.width) != (height, width):
            raise self.damaged_image(index, "its size is not the one in the index")
        return seen

    def decode(self, index: int, memory: NDArray[np.uint8] | None = None) -> Tensor:
        """Image `index` as RGB, (3, H, W) uint8; it lies in `memory` (M,) if it fits.

        Raises:
            DataError: as `examine`.
        """
        pixels = self.examine(index, memory=memory).pixels
        assert pixels is not None
        # PyTorch wants writable memory; the mapped file is not.
        return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Where in memory the bytes of these images (N,) begin."""
        return (self.data.ctypes.data + self.offsets[indices]).astype(np.uint64)

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Ask the system to read the bytes of these images (N,) from the disk; this does not wait for them."""
        # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
        for offset, length in zip(self.offsets[indices].tolist(), self.lengths[indices].tolist(), strict=True):
            self.will_read(offset, length)

    def will_read(self, offset: int, length: int) -> None:
        """As `will_need`, for `length` bytes of the file from `offset` on."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_WILLNEED, start, offset + length - start)

    def damaged_image(self, index: int, reason: str) -> DataError:
        """The error to raise for an image that can't be used."""
        return DataError(f"{self.name(index)} is damaged ({reason}): convert the dataset again")

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path} is damaged or no .beton file ({reason}): convert the dataset again")

    def _read(self, what: str, dtype: np.dtype, count: int, offset: int) -> NDArray:
        """`count` records from `offset` on; they must lie in the file."""
        if offset + count * dtype.itemsize > len(self.data):
            raise self._damaged(f"its {what} would end beyond the end of the file")
        return np.frombuffer(self._mapping, dtype, count, offset)

    def _read_index(self) -> tuple[NDArray, NDArray, NDArray]:
        """The columns of images and of labels from the metadata, and the allocation table, sorted by address."""
        header = self._read("header", HEADER, 1, 0)[0]
        if header["version"] != VERSION:
            raise self._damaged(f"version {header['version']} instead of {VERSION}")
        fields = self._read("list of fields", FIELD, int(header["num_fields"]), HEADER.itemsize)
        types = fields["type_id"].tolist()
        if sorted(types) != [INT_FIELD, IMAGE_FIELD]:
            raise DataError(
                f"{self.path} holds fields of FFCV's types {types[:5]} instead of one integer and one image, "
                f"{INT_FIELD} and {IMAGE_FIELD}: convert the dataset again"
            )
        # FFCV gives the columns no names, and aligns them.
        rows = np.dtype([(str(number), FIELD_TYPES[number]) for number in types], align=True)
        start = HEADER.itemsize + fields.nbytes
        metadata = self._read("metadata", rows, int(header["num_samples"]), start)
        table = int(header["alloc_table_ptr"])
        count, rest = divmod(len(self.data) - table, ALLOCATION.itemsize)
        if not start + metadata.nbytes <= table <= len(self.data) or rest:
            raise self._damaged("it has no allocation table at its end")
        self._index_parts = (0, start + metadata.nbytes), (table, len(self.data))
        allocations = self._read("allocation table", ALLOCATION, count, table)
        # `np.sort` of whole rows would take ten times as long.
        order = np.argsort(allocations["ptr"], kind="stable")
        return metadata[str(IMAGE_FIELD)], metadata[str(INT_FIELD)], allocations[order]

    def _check_places(self, allocations: NDArray, num_images: int) -> None:
        """Check that each image has a place between metadata and allocation table, not empty, and that none overlap."""
        (_, start), (stop, _) = self._index_parts
        if len(allocations) != num_images:
            raise self._damaged(f"{len(allocations):,} places in its allocation table for {num_images:,} images")
        places, sizes = allocations["ptr"], allocations["size"]
        inside = (start <= places) & (places < stop)
        inside &= (sizes > 0) & (sizes <= stop - places)  # unsigned; meaningless where the place is not inside
        if not inside.all():
            wrong = inside.argmin()
            raise self._damaged(f"{sizes[wrong]:,} bytes at {places[wrong]:,} can't be an image's")
        if (places[:-1] + sizes[:-1] > places[1:]).any():
            raise self._damaged("images whose bytes overlap")

    def _find_bytes(self, images: NDArray, allocations: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(offsets, lengths). Only the allocation table holds the length of an image."""
        self._check_places(allocations, len(images))
        at = np.searchsorted(allocations["ptr"], images["data_ptr"]).clip(max=len(images) - 1)
        entries = allocations[at]
        pixels = self.sizes.astype(np.uint64).prod(1)
        found = (entries["ptr"] == images["data_ptr"]) & (pixels > 0)
        found &= np.where(self.is_raw, entries["size"] == 3 * pixels, images["mode"] == JPEG)
        if not found.all():
            raise self._damaged(f"its index of image {found.argmin()} is wrong")
        if len(np.unique(at)) < len(at):
            raise self._damaged("two images with the same bytes")
        return entries["ptr"].astype(np.int64), entries["size"].astype(np.int64)

    def index_checksum(self) -> str:
        """Two XXH64, of what lies before the pages and behind them: 32 hexadecimal digits."""
        return "".join(native.hex_checksum(self.data[start:stop]) for start, stop in self._index_parts)

    def _use_record(self, record: tuple[Path, dict[str, Any]] | None) -> None:
        """Compare the file with dataset.json, and take the classes and checksums from there."""
        path = record[0] if record else self.path.with_name(DATASET_FILE)
        try:
            dataset = record[1] if record else json.loads(path.read_text())
            files = (file for split in dataset["splits"].values() for file in split.get("shards", [split]))
            split = {file["file"]: file for file in files}[self.path.name]
            expected_bytes, expected_index = int(split["bytes"]), str(split["index_xxh64"])
            expected_checksums = str(split["checksums_xxh64"])
            self.classes, self.has_names = [str(name) for name in dataset["classes"]], True
            checksums = np.load(self.path.with_name(split["checksums"]), mmap_mode="r")  # may claim more than it holds
            if not (
                isinstance(checksums, np.ndarray) and checksums.dtype == np.uint64 and checksums.shape == (len(self),)
            ):
                raise ValueError(f"not one checksum for each of {len(self):,} images")
            self.checksums = np.array(checksums)
        except FileNotFoundError as error:
            if Path(error.filename) == path:
                return
            raise DataError(f"no file {error.filename}, which {path} names: convert the dataset again") from error
        except Exception as error:  # NumPy and json raise more types than they document
            reason = f"{path} or the checksums that it names do not read ({error})"
            raise DataError(f"{reason}: convert the dataset again") from error
        if len(self.data) != expected_bytes:
            raise self._damaged(f"{len(self.data):,} bytes instead of {expected_bytes:,}")
        if self.index_checksum() != expected_index:
            raise self._damaged(f"its index is not the one that {path.name} records")
        if native.hex_checksum(self.checksums) != expected_checksums:
            raise DataError(f"{path.with_name(split['checksums'])} is damaged: convert the dataset again")
        if self.labels.max() >= len(self.classes):
            raise self._damaged(f"label {self.labels.max()} of {len(self.classes)} classes")
