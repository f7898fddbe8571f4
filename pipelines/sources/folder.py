"""Images in ImageNet's folder layout: ROOT/CLASS/*.JPEG.

The plan needs the height and width of every image. They are read once from the files' headers and kept under
`$XDG_CACHE_HOME/dcd` (`~/.cache/dcd`), outside the dataset, which is often read-only.
"""

import contextlib
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from pipelines.cache import cache_folder
from pipelines.sources.errors import DataError
from pipelines.threads import Threads

EXTENSIONS = (".jpeg", ".jpg", ".png")
INDEX_VERSION = 1
HEADER_THREADS = 32  # reading headers waits for the disk, not for the processor


class FolderSource:
    """One split of an image folder.

    Args:
        root: the folder of the class folders, e.g. `imagenet/train`.

    Attributes:
        classes: the class folders' names, sorted; the label is the position in this list.
        labels: (N,) int64; images are sorted by class, then by name.
        sizes: (N, 2) int32, height and width in pixels as stored (EXIF rotation is ignored).

    Raises:
        DataError: no such folder, no classes, a class with no images, files that are no images.
    """

    has_names = True

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.classes, names, labels, fingerprint = list_images(self.root)
        self.labels = np.array(labels, dtype=np.int64)
        # One array of bytes instead of a list of strings: forked workers share it without copying.
        self._names = np.array([os.fsencode(name) for name in names])
        self.is_raw = np.zeros(len(labels), bool)  # all are encoded images
        self.sizes = _cached_sizes(self.root, names, fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Image `index` as a message names it."""
        return str(self.path(index))

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
            raise self.damaged_image(index, str(error)) from error

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Nothing: threads and processes read the files of a batch side by side."""

    def damaged_image(self, index: int, reason: str) -> DataError:
        """The error for an image that can't be used."""
        return DataError(f"{self.path(index)} does not decode ({reason}): replace or remove this file")

    def decode(self, index: int) -> Tensor:
        """Image `index` as RGB, (3, H, W) uint8.

        Raises:
            DataError: the file is gone, does not decode, or is not of the size in the index.
        """
        encoded = torch.from_numpy(self.read(index))
        try:
            image = decode_image(encoded, mode=ImageReadMode.RGB)  # of bytes: torchvision takes paths in UTF-8 only
        except RuntimeError as error:
            raise self.damaged_image(index, str(error).splitlines()[0]) from error
        if image.shape[1:] != tuple(self.sizes[index]):
            with contextlib.suppress(OSError):
                _index_path(self.root).unlink()
            raise DataError(
                f"{self.path(index)} has changed since it was indexed: start again to index the folder anew"
            )
        return (image.int() >> 8).byte() if image.dtype == torch.uint16 else image  # a PNG of 16 bits


def list_images(root: Path) -> tuple[list[str], list[str], list[int], str]:
    """Classes, names ("CLASS/FILE"), labels and a fingerprint of the listing."""
    if not root.is_dir():
        raise DataError(f"no folder {root}: it must hold CLASS/*.JPEG, or be converted to {root.name}.beton")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise DataError(f"{root} holds no class folders: it must look like {root}/CLASS/*.JPEG")
    names, labels = [], []
    fingerprint = hashlib.sha256(f"{INDEX_VERSION}".encode())
    for label, name in enumerate(classes):
        files = sorted(entry.name for entry in os.scandir(root / name) if entry.name.lower().endswith(EXTENSIONS))
        if not files:
            raise DataError(
                f"class {name} has no images in {root / name}: add some (.JPEG, .jpg, .png) or remove the folder"
            )
        names += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
        # A folder's time changes when a file in it is added, removed or renamed.
        fingerprint.update(
            f"{name}\0{os.stat(root / name).st_mtime_ns}\0{len(files)}\0".encode(errors="surrogateescape")
        )
    return classes, names, labels, fingerprint.hexdigest()


def _index_path(root: Path) -> Path:
    return cache_folder() / f"{root.name}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"


def _cached_sizes(root: Path, names: list[str], fingerprint: str) -> np.ndarray:
    """The sizes of all images: from the index where it fits the listing, else from the headers, then kept."""
    index = _index_path(root)
    try:
        with np.load(index) as stored:
            if str(stored["fingerprint"]) == fingerprint and len(stored["sizes"]) == len(names):
                return stored["sizes"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # no index, or one that another version wrote: made anew below
    sizes = _read_sizes(root, names)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = index.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, fingerprint=np.array(fingerprint), sizes=sizes)
        os.replace(temporary, index)
    except OSError as error:
        print(
            f"warning: cannot keep the image sizes in {index} ({error}); they are read again at each start",
            file=sys.stderr,
        )
    return sizes


def _read_sizes(root: Path, names: list[str]) -> np.ndarray:
    if len(names) > 100_000:
        print(f"reading the sizes of {len(names):,} images in {root} (once)", file=sys.stderr)

    def read(name: str) -> tuple[int, int] | str:
        try:
            with Image.open(root / name) as image:  # reads the header only
                return image.height, image.width
        except Exception as error:  # Pillow raises half a dozen types for damaged files
            return f"{root / name}: {type(error).__name__}"

    def read_many(part: list[str]) -> list[tuple[int, int] | str]:
        return [read(name) for name in part]

    parts = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with Threads(HEADER_THREADS) as threads:
        found = [size for part in threads.map(read_many, parts) for size in part]
    bad = [size for size in found if isinstance(size, str)]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"{len(bad)} files are no images; replace or remove them: {', '.join(bad[:5])}{more}")
    return np.array(found, dtype=np.int32)
