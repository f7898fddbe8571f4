"""Copy a dataset of .beton files to a machine's own disk, once, and print where to read it.

    python -m tools.stage_dataset DATA DISK     ->  DISK/dcd-USER/NAME-KEY, or DATA

Standard output is that one folder, for `--data`; one line on standard error says why it is which. A second call, of
another job too, finds the copy. KEY stands for the names, sizes and times of the files, so a converted-again DATA is
copied anew. Each file appears under its name when it is whole, and a call that was interrupted is continued by the
next one. Where the copy cannot be, for want of room or for another reason, DATA is read where it is. Class folders are
not copied: they are many small files. Nothing is ever removed from DISK but what has failed to be copied.
"""

import fcntl
import hashlib
import os
import re
import shutil
import socket
import sys
from pathlib import Path

from training.command_line import parse
from training.whole_files import whole_files

# What training reads of a dataset (docs/data.md): each split, in one file or in shards, with its checksums; and the
# record, which comes last, because without it shards are no dataset.
FILES = re.compile(r"(train|val)(-\d{5}-of-\d{5})?\.(beton|checksums\.npy)")
RECORD = "dataset.json"


def stage(data: Path, disk: Path) -> Path:
    """Copy the dataset where it is not there yet.

    Args:
        data: a folder with .beton files. disk: a folder on the machine's own disk; it is made.

    Returns:
        The folder to read: the copy, or `data`.
    """
    files = files_of(data)
    if not files:
        say(f"{data} holds no .beton files: it is read where it is")
        return data
    private = disk / f"dcd-{os.getuid()}"
    folder = private / f"{data.resolve().name}-{key(files)}"
    try:
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        if private.is_symlink() or private.stat().st_uid != os.getuid():
            say(f"{private} belongs to somebody else: {data} is read where it is")
            return data
        folder.mkdir(exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another job on this machine may be copying the same
            return folder if complete(folder, files) else data
    except OSError as error:
        say(f"{folder} cannot be used ({error}): {data} is read where it is")
        return data


def files_of(data: Path) -> list[Path]:
    """The files of a dataset, the record last; none where it has no .beton files.

    Raises:
        FileNotFoundError: `data` is no folder.
    """
    found = sorted(file for file in data.iterdir() if FILES.fullmatch(file.name))
    if not any(file.suffix == ".beton" for file in found):
        return []
    record = data / RECORD
    return [*found, record] if record.exists() else found


def key(files: list[Path]) -> str:
    """8 hexadecimal digits that change where the files do: their paths, sizes, and times in seconds."""
    stats = [(str(file.resolve()), file.stat().st_size, int(file.stat().st_mtime)) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:8]


def complete(folder: Path, files: list[Path]) -> bool:
    """Copy what is missing in `folder`; False where it does not fit, or can't be copied."""
    missing = [file for file in files if not is_there(file, folder)]
    if not missing:
        say(f"{folder} is there already")
        return True
    needed, free = sum(file.stat().st_size for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        say(f"no room at {folder} for {gb(needed)}, {gb(free)} are free: {files[0].parent} is read where it is")
        return False
    try:
        for file in missing:
            copy(file, folder / file.name)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # of no use, and others may need the room
        say(f"{files[0].parent} is read where it is: it cannot be copied to {folder} ({error})")
        return False
    say(f"copied {len(missing)} files, {gb(needed)}, to {folder}")
    return True


def is_there(file: Path, folder: Path) -> bool:
    copied = folder / file.name
    return copied.is_file() and copied.stat().st_size == file.stat().st_size


def copy(file: Path, target: Path) -> None:
    """Copy a file, which has its name when all of it is on the disk.

    Raises:
        OSError: it can't be copied, or has changed meanwhile.
    """
    with whole_files(target, alone=True) as (partial,):  # by the lock of `stage`
        shutil.copyfile(file, partial)
        if partial.stat().st_size != file.stat().st_size:
            raise OSError(f"{file} has changed while it was copied")


def gb(count: int) -> str:
    return f"{count / 1e9:,.3f} GB"


def say(text: str) -> None:
    print(f"{socket.gethostname()}: {text}", file=sys.stderr, flush=True)


def main(data: Path, disk: Path) -> None:
    """Copy the .beton files of DATA to a folder on DISK, and print the folder to read."""
    try:
        folder = stage(data, disk)
    except OSError as error:
        sys.exit(f"error: {error}: name a folder that holds a dataset")
    sys.stdout.buffer.write(os.fsencode(folder) + b"\n")  # a path may be any bytes


if __name__ == "__main__":
    parse(main)
