"""The cache folder, for what can be made again. It lies outside the dataset, which is often read-only."""

import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dcd`, else `~/.cache/dcd`. Where that can't be written to, a folder of this user in the
    temporary directory, with one warning.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        home = os.path.expanduser("~")  # "~" where there is no home; "/" is no home either
        base = os.path.join(home, ".cache") if home not in ("~", "/") else None
    return _usable(base)


@lru_cache
def _usable(base: str | None) -> Path:
    """`dcd` in `base` if it can be written to, else the temporary folder."""
    reason = "there is no home folder"
    if base is not None:
        folder = Path(base, "dcd")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
            reason = f"{folder} cannot be written to"
        except OSError as error:
            reason = str(error)
    folder = Path(tempfile.gettempdir(), f"dcd-cache-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="dcd-cache-"))  # code is loaded from it: nobody else may write to it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {reason}: caching in {folder}; XDG_CACHE_HOME names another folder", file=sys.stderr)
    return folder
