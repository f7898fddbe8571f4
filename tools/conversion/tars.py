"""The official archives: ILSVRC2012_img_{train,val}.tar and the development kit, read where they lie.

The archive of train holds one archive for each class. The headers are read once; an image is then read by its offset
in the outer file, and nothing is unpacked.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.sources.errors import DataError
from pipelines.sources.listing import LeftOut, is_hidden, is_image
from tools.conversion.source import Source, Split, check_classes, check_parts, tasks_of

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
MAX_META = 1 << 26  # bytes read of a file of the development kit; the real files have 70 and 200 kB
MAX_HEADER = 1 << 20  # bytes that tarfile may read at once: names and attributes, never an image
MAX_END = 1 << 16  # bytes of zeros after the last member; tar writes up to 10,240
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class TarReader:
    """Reads images from one file. offsets, sizes: (N,), in bytes."""

    def __init__(self, path: Path, offsets: NDArray[np.int64], sizes: NDArray[np.int64]):
        self._path, self._offsets, self._sizes = path, offsets, sizes
        self._file: BinaryIO | None = None  # opened in the process that reads
        self.tasks = tasks_of(np.argsort(offsets, kind="stable"))

    def read(self, task: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8] | OSError]]:
        file = self._file = self._file or open(self._path, "rb")  # noqa: SIM115  (it ends with the process)
        # pyrefly: ignore[not-iterable]: it takes what tolist() gives for a number
        for index in task.tolist():
            try:
                file.seek(int(self._offsets[index]))
                data = np.frombuffer(file.read(int(self._sizes[index])), np.uint8)
                if len(data) < self._sizes[index]:
                    raise OSError(f"{self._path} has become shorter")
                yield index, data
            except OSError as error:
                yield index, error


class _Headers(io.FileIO):
    """A file of which tarfile reads headers only. A header may claim any size, even for itself."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def open_tars(path: Path) -> Source | None:
    """The official archives in the folder `path`, or None where there is none of them."""
    if not check_parts(path, {name: (path / name).is_file() for name in (TRAIN, VAL, DEVKIT)}):
        return None
    wnids = _devkit_classes(path / DEVKIT)
    left_out = LeftOut()
    train, val = _train_members(path / TRAIN, left_out), _val_members(path / VAL, wnids)
    classes = sorted({wnid for wnid, _, _, _ in train})
    check_classes(path, classes, [wnid for wnid, _, _, _ in val])
    splits = {"train": _split(path / TRAIN, classes, train), "val": _split(path / VAL, classes, val)}
    return Source("official tars", classes, splits, {path / TRAIN: left_out})


Member = tuple[str, bytes, int, int]  # class, name inside the archive, offset, size


def _split(path: Path, classes: list[str], members: list[Member]) -> Split:
    positions = {wnid: label for label, wnid in enumerate(classes)}
    members.sort()
    offsets = np.array([offset for _, _, offset, _ in members], np.int64)
    sizes = np.array([size for _, _, _, size in members], np.int64)
    return Split(
        labels=np.array([positions[wnid] for wnid, _, _, _ in members], np.int64),
        names=np.array([os.fsencode(path.name) + b"/" + name for _, name, _, _ in members]),
        largest=int(sizes.max()),
        reader=TarReader(path, offsets, sizes),
    )


def _train_members(path: Path, left_out: LeftOut) -> list[Member]:
    """The images of all classes; other files are added to `left_out`."""
    members = []
    with _Headers(path) as file, _bar(path) as bar:
        for outer in _walk(path, file, 0, path.stat().st_size):
            name = Path(outer.name).name
            if not name.endswith(".tar"):
                raise DataError(f"{path} holds {outer.name!r} instead of one .tar for each class: download it again")
            wnid, before = name.removesuffix(".tar"), len(members)
            for member in _walk(path, file, outer.offset_data, outer.size, f"/{outer.name}"):
                if member.name.lower().endswith(".tar"):
                    raise DataError(f"{path}/{outer.name} holds another archive, {member.name!r}: download it again")
                if not is_image(member.name):
                    left_out.add(f"{name}/{member.name}")
                else:
                    inner = os.fsencode(f"{name}/{Path(member.name).name}")
                    members.append((wnid, inner, member.offset_data, member.size))
            if len(members) == before:
                raise DataError(f"class {wnid} has no images in {path}/{outer.name}: download it again")
            bar.update(outer.size)
    if not members:
        raise DataError(f"{path} holds no classes: download it again")
    return members


def _val_members(path: Path, wnids: list[str]) -> list[Member]:
    """The images of val. wnids: the class of each, in the order of the image numbers, which begin at 1."""
    members, seen = [], set()
    with _Headers(path) as file:
        for member in _walk(path, file, 0, path.stat().st_size):
            match = VAL_NAME.fullmatch(Path(member.name).name)
            number = int(match[1]) if match else 0
            if match is None or not 1 <= number <= len(wnids) or number in seen:
                raise DataError(
                    f"{path} holds {member.name!r}, which is no new one of the {len(wnids):,} images that {DEVKIT} "
                    f"knows: download both again"
                )
            seen.add(number)
            members.append((wnids[number - 1], os.fsencode(match[0]), member.offset_data, member.size))
    if len(members) != len(wnids):
        raise DataError(f"{path} holds {len(members):,} images, but {DEVKIT} knows {len(wnids):,}: download both again")
    return members


def _walk(path: Path, file: _Headers, start: int, size: int, inside: str = "") -> Iterator[tarfile.TarInfo]:
    """The files of the archive in `size` bytes of `file` from `start`, without hidden ones, with offsets in `file`.

    Raises:
        DataError: the archive is damaged, or holds something that an archive of images cannot hold.
    """
    try:
        names, before, end = set(), start, start + size
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # pyrefly: ignore[missing-attribute]
                archive.members = []  # otherwise it keeps every header
                name, parts = member.name, PurePosixPath(member.name).parts
                if member.size < 0 or not before < member.offset_data <= archive.offset:  # an endless loop
                    raise tarfile.ReadError(f"{name!r} has a size of {member.size:,} bytes")
                if member.offset_data + (member.size if member.isreg() else 0) > end:
                    raise tarfile.ReadError("unexpected end of data")
                before = member.offset_data
                if any(letter < " " for letter in name):
                    raise DataError(f"{path}{inside} holds {name!r}, which is no name: download it again")
                if name.startswith("/") or ".." in parts:
                    raise DataError(f"{path}{inside} holds the path {name!r}, which leads out of it: download it again")
                if member.isdir() or any(map(is_hidden, parts)):
                    continue
                if not (parts and member.isreg()) or member.issparse():
                    raise DataError(
                        f"{path}{inside} holds {name!r}, a link, device or other thing that is no file: "
                        f"download it again"
                    )
                if parts[-1] in names:
                    raise DataError(f"{path}{inside} holds {parts[-1]!r} twice: download it again")
                names.add(parts[-1])
                yield member
            _check_end(file, archive.offset, end)
    except DataError:
        raise
    except (
        tarfile.TarError,
        EOFError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # tarfile does not catch all
        raise DataError(f"{path}{inside} is damaged or no tar archive ({error}): download it again") from error


def _check_end(file: _Headers, offset: int, end: int) -> None:
    """tarfile takes anything that is not a header as the end of an archive, even a cut or a hole in a download.

    Raises:
        ReadError: the bytes from `offset` to `end` are not all zeros, or are more zeros than an archive ends with.
    """
    left = end - offset
    if tarfile.BLOCKSIZE <= left <= MAX_END:
        file.seek(offset)
        if file.read(left) == bytes(left):
            return
    raise tarfile.ReadError(f"it ends in the middle, {left:,} bytes before its end")


def _devkit_classes(path: Path) -> list[str]:
    """The WordNet ID of each validation image, in the order of the image numbers."""
    from scipy.io import loadmat

    try:
        with tarfile.open(path, "r:gz") as archive:
            files = {
                # pyrefly: ignore[missing-attribute]: what is no file has none, and ends below
                name: archive.extractfile(f"ILSVRC2012_devkit_t12/{name}").read(MAX_META)
                for name in (META, GROUND_TRUTH)
            }
        synsets = np.atleast_1d(loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        return [wnids[int(number)] for number in files[GROUND_TRUTH].split()]
    except Exception as error:  # gzip, tarfile and SciPy raise a dozen types for damaged files
        raise DataError(f"{path} is damaged or not the development kit ({error}): download it again") from error


def _bar(path: Path) -> tqdm:
    return tqdm(desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, leave=False, disable=None)
