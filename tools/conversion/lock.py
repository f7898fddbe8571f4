"""Locks that keep conversions apart. A lock ends with its process, however that ends."""

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

from pipelines.sources.errors import DataError

_held: list[int] = []


def _forget() -> None:
    """In a forked worker: it must not go on holding the locks when its parent is killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Generator[None]:
    """Lock a folder, or a file that is made where it isn't there: network file systems lock files, if anything.

    Args:
        shared: others may hold it, too, but nobody alone.

    Raises:
        DataError: somebody else has locked it.
    """
    file = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT) | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise DataError(f"another conversion is writing to {path}: wait for it, or name another folder") from error
    except OSError:
        pass  # some network file systems can't lock
    _held.append(file)
    try:
        yield
    finally:
        _held.remove(file)
        os.close(file)
