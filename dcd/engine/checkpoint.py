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


def load(path: Path, architecture: dict) -> dict:
    """A checkpoint of this trainer, on the CPU.

    Args:
        architecture: `Config.architecture` of the run that is to go on from it.

    Raises:
        CheckpointError: missing, damaged, of another program or of another architecture.
    """
    state = read_file(path)
    if "optimizer" not in state or "architecture" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of this trainer: give it to --weight to start from its weights"
        )
    found = state["architecture"]
    if found != architecture:
        raise CheckpointError(
            f"{path} holds {_in_words(found)}, this run is {_in_words(architecture)}: "
            "use the same model and data, or another --checkpoint folder"
        )
    return state


def _in_words(architecture: dict) -> str:
    options = ", ".join(f"{name} {value}" for name, value in architecture.items() if name != "arch")
    return f"{architecture['arch']} ({options})"
