"""One run at a time in an output folder."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from training.options import ConfigError

PATIENCE_S = 5.0  # for a run that is just being killed, to be followed by this one
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)  # some network file systems


class FolderLock:
    """Keeps other runs out of a folder until the process ends, in whatever way.

    It is a lock of POSIX: forked workers do not inherit it, so none of them can keep it when this process has ended.

    Args:
        folder: the output folder; it is made.

    Raises:
        ConfigError: another run has it, or it cannot be written to.
    """

    def __init__(self, folder: Path):
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+")  # noqa: SIM115  (the lock ends with the file)
        except OSError as error:
            raise ConfigError(
                f"cannot write to {folder} ({error.strerror}): use another --checkpoint folder"
            ) from error
        give_up = time.monotonic() + PATIENCE_S
        while not self._try():
            if time.monotonic() > give_up:
                self._file.seek(0)
                raise ConfigError(
                    f"{folder} is in use by another run ({self._file.read().strip() or 'unknown'}): "
                    "wait for its end, or use another --checkpoint folder"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
        return True

    def close(self) -> None:
        self._file.close()
