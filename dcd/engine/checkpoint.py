"""Checkpoints that are there as a whole or not at all."""

import os
from pathlib import Path

import torch

from dcd.checkpoint_file import CheckpointError, read_file


def save(state: dict, path: Path) -> None:
    """Write `state` to a temporary file, then rename it to `path`: an interruption leaves the old file in place.

    Raises:
        OSError: the disk is full or not writable; the old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path, arch: str, num_classes: int) -> dict:
    """A checkpoint of this trainer, on the CPU.

    Raises:
        CheckpointError: missing, damaged, of another program or of another architecture.
    """
    state = read_file(path)
    if "optimizer" not in state or "step" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of this trainer: give it to --weight to start from its weights"
        )
    found = (state["arch"], state["num_classes"])
    if found != (arch, num_classes):
        raise CheckpointError(
            f"{path} holds {found[0]} with {found[1]} classes, this run is {arch} with {num_classes}: "
            "use the same --arch and data, or another --checkpoint folder"
        )
    return state
