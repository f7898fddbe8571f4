"""Images in folders, as `listing` finds them: ROOT/CLASS/*.JPEG.

The plan needs the height and width of every image. They are read once from the files' headers and kept in the cache
folder (`$XDG_CACHE_HOME/dcd`, else `~/.cache/dcd`), since a dataset is often read-only.
"""

import contextlib
import hashlib
import os
import sys
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.cache import cache_folder
from pipelines.fingerprint import digest
from pipelines.sources.checked import Checked
from pipelines.sources.errors import DataError
from pipelines.sources.images import BadImage, Examined, examine, has_native, read_header
from pipelines.sources.listing import list_images
from pipelines.threads import Threads

INDEX_VERSION = 2
HEADER = np.dtype([("size", np.int32, 2), ("plain", np.bool_)])
HEADER_THREADS = 32  # these threads wait for the disk, not for the processor


class FolderSource:
    """One split of an image folder.

    Args:
        root: the folder of the class folders, e.g. `imagenet/train`.
        strict: files in it that are no images by their names are an error.
        keep_bad: keep files whose headers are no images', with a size of 0 × 0; `examine` says what is wrong with them.
            Otherwise they are an error.

    Attributes:
        classes: the class folders' names, sorted; the label is the position in this list.
        labels: (N,) int64; images are sorted by class, then by name.
        sizes: (N, 2) int32, height and width in pixels as stored (EXIF rotation is ignored).
        plain: (N,) bool, whether the file is a JPEG that all decoders read alike (`images.Header`).
        note: one line about what was left out, or None.

    Raises:
        DataError: as `list_images`; or a file is no image.
    """

    has_names = True

    def __init__(self, root: str | Path, strict: bool = False, keep_bad: bool = False):
        self.root = Path(root)
        has_native()  # compiles native.cpp here once, not in each worker
        listing = list_images(self.root)
        if strict:
            listing.left_out.refuse(self.root)
        self.classes, self.labels = listing.classes, np.array(listing.labels, np.int64)
        self.note = listing.left_out.note(self.root)
        # An array of bytes, not a list of strings: forked workers share it without copying it.
        self._names = np.array([os.fsencode(name) for name in listing.names])
        self._fingerprint = hashlib.sha256(f"{INDEX_VERSION}{listing.fingerprint}".encode()).hexdigest()
        headers = _cached_headers(self.root, listing.names, self._fingerprint, keep_bad)
        self.sizes, self.plain = np.ascontiguousarray(headers["size"]), np.ascontiguousarray(headers["plain"])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Image `index` as a message names it."""
        return str(self.path(index))

    def fingerprint_parts(self) -> dict[str, str]:
        """The names of the files below the root, for `pipelines.fingerprint`."""
        return {"names of files": digest(self._names)}

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._names[index])

    def read(self, index: int) -> NDArray[np.uint8]:
        """The bytes of file `index`.

        Raises:
            DataError: the file does not read.
        """
        try:
            return np.fromfile(self.path(index), np.uint8)
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot read {self.path(index)} ({reason}): put the file back and start again") from error

    def read_sound(self, index: int) -> NDArray[np.uint8]:
        """The bytes of file `index`, for decoders that do not notice damage: all of its codes have been read once.

        Raises:
            DataError: as `examine`.
        """
        data = self.read(index)
        if index not in self._checked:
            self.examine_stored(index, data, with_pixels=False)
            self._checked.add(index)
        return data

    @cached_property
    def _checked(self) -> Checked:
        return Checked(_cache_name(self.root), self._fingerprint, len(self))

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Nothing to do: threads and processes read the files of a batch side by side."""

    def damaged_image(self, index: int, reason: str) -> DataError:
        """The error to raise for an image that can't be used."""
        return DataError(f"{self.path(index)} does not decode ({reason}): replace or remove this file")

    def examine(self, index: int, with_pixels: bool = True, memory: NDArray[np.uint8] | None = None) -> Examined:
        """Read all of image `index`; see `images.examine`.

        Raises:
            DataError: the file is gone, does not decode, or has another size than in the index.
        """
        return self.examine_stored(index, self.read(index), with_pixels, memory)

    def examine_stored(
        self, index: int, data: NDArray[np.uint8], with_pixels: bool = True, memory: NDArray[np.uint8] | None = None
    ) -> Examined:
        """As `examine`, of the bytes `data` (N,), which `read` has returned."""
        try:
            seen = examine(data, with_pixels, memory)
        except BadImage as error:
            raise self.damaged_image(index, str(error)) from error
        if (seen.height, seen.width) != tuple(self.sizes[index]):
            with contextlib.suppress(OSError):
                _index_path(self.root).unlink()
            raise DataError(
                f"{self.path(index)} has changed since it was indexed: start again to index the folder anew"
            )
        return seen

    def decode(self, index: int, memory: NDArray[np.uint8] | None = None) -> Tensor:
        """Image `index` as RGB, (3, H, W) uint8; it lies in `memory` (M,) if it fits.

        Raises:
            DataError: as `examine`.
        """
        return torch.from_numpy(self.examine(index, memory=memory).pixels).permute(2, 0, 1)


def _cache_name(root: Path) -> str:
    return f"{root.name}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}"


def _index_path(root: Path) -> Path:
    return cache_folder() / f"{_cache_name(root)}.npz"


def _cached_headers(root: Path, names: list[str], fingerprint: str, keep_bad: bool) -> NDArray:
    """The headers (N,) of dtype `HEADER`, from the index; if that does not fit the listing, from the files."""
    index = _index_path(root)
    try:
        with np.load(index) as stored:
            headers = stored["headers"]
            if str(stored["fingerprint"]) == fingerprint and headers.dtype == HEADER and len(headers) == len(names):
                return headers
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # no index, or one of another version: it is made anew below
    headers, bad = _read_headers(root, names)
    if bad and not keep_bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        count = "1 file is no image" if len(bad) == 1 else f"{len(bad)} files are no images"
        raise DataError(f"{count}; mend, replace or remove what is listed: {', '.join(bad[:5])}{more}")
    if bad:
        return headers
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = index.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, fingerprint=np.array(fingerprint), headers=headers)
        os.replace(temporary, index)
    except OSError as error:
        print(
            f"warning: cannot keep the image sizes in {index} ({error}); they are read again at each start",
            file=sys.stderr,
        )
    return headers


def _read_headers(root: Path, names: list[str]) -> tuple[NDArray, list[str]]:
    """The headers (N,) of dtype `HEADER`, 0 × 0 for bad files; and for each bad file, its path and what is wrong."""
    if len(names) > 100_000:
        print(f"reading the sizes of {len(names):,} images in {root} (once)", file=sys.stderr)

    def read(name: str) -> tuple[tuple[int, int], bool] | str:
        try:
            header = read_header(root / name)
            return (header.height, header.width), header.plain
        except BadImage as error:
            return f"{root / name} ({error})"
        except OSError as error:
            return f"{root / name} ({error.strerror})"

    def read_many(part: list[str]) -> list[tuple[tuple[int, int], bool] | str]:
        return [read(name) for name in part]

    parts = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with Threads(HEADER_THREADS) as threads:
        found = [header for part in threads.map(read_many, parts) for header in part]
    bad = [header for header in found if isinstance(header, str)]
    return np.array([((0, 0), False) if isinstance(header, str) else header for header in found], HEADER), bad
