"""Where what can be made again is kept: outside the dataset, which is often read-only."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dcd`, or `~/.cache/dcd`. It need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcd"
