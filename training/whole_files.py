"""Files that are there whole or not at all, however their program ends."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from training.folder_sync import sync_file, sync_folder


@contextmanager
def whole_files(*paths: Path, alone: bool = False) -> Generator[list[Path]]:
    """Gives a file to write to for each of `paths`. At the end of the block the disk has all of them, and they take
    these names; where the block raises an error, what was there stays as it was.

    The files lie beside their paths, hidden, and end as these do, since some programs go by that. A pipe or a link, as
    /dev/stdout is, is written to as it is.

    Args:
        alone: no other process writes these paths, since there is a lock: what a killed one has left is written over.
            Otherwise each process has files of its own.

    Raises:
        OSError: they can't be written.
    """
    mark = "partial" if alone else f"{os.getpid()}.partial"
    files = {path: path.with_name(f".{path.stem}.{mark}{path.suffix}") for path in paths if _is_replaced(path)}
    try:
        yield [files.get(path, path) for path in paths]
        for file in files.values():
            sync_file(file)
        for path, file in files.items():
            os.replace(file, path)
        for folder in {path.parent for path in files}:
            sync_folder(folder)
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _is_replaced(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or not path.exists())
