"""Makes files, and their names in a folder, last: they are synced."""

import errno
import os
from pathlib import Path

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # CIFS, some FUSE and other file systems sync files only


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names of the files in `folder`, where its file system can be asked to.

    Raises:
        OSError: the disk can't keep them.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Write a file to the disk. That the disk is full may only be found here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
