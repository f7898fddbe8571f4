"""Keeps which images of a dataset were found sound, for decoders that do not notice damage (DALI, nvJPEG).

Reading all codes of a JPEG, to see whether it is whole, takes a tenth of a loader's time. So it is done once for each
image, by the process that reads it first. The result is kept for later epochs and runs, in a file that the processes
of a machine share.
"""

import os
import sys
from pathlib import Path

import numpy as np

from pipelines.cache import cache_folder


class Checked:
    """The images of one dataset that are known to be sound.

    Args:
        name: of the file. count: of the images.
        fingerprint: 64 hexadecimal digits, kept in the file; where they differ, no image counts as checked.
    """

    def __init__(self, name: str, fingerprint: str, count: int):
        path, head = cache_folder() / f"{name}.checked", bytes.fromhex(fingerprint)
        try:
            if not _begins_with(path, head, len(head) + count):
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                with open(temporary, "wb") as file:
                    file.write(head)
                    file.truncate(len(head) + count)
                os.replace(temporary, path)
            self._sound = np.memmap(path, np.bool_, "r+", offset=len(head), shape=count)
        except (OSError, ValueError) as error:
            print(f"warning: images are checked again in every run: cannot keep {path} ({error})", file=sys.stderr)
            self._sound = np.zeros(count, np.bool_)

    def __contains__(self, index: int) -> bool:
        return bool(self._sound[index])

    def add(self, index: int) -> None:
        """Keep that image `index` was found sound."""
        self._sound[index] = True


def _begins_with(path: Path, head: bytes, size: int) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(head)) == head and os.fstat(file.fileno()).st_size == size
    except FileNotFoundError:
        return False
