"""Reading checkpoint files, of whatever trainer, without running code that they may carry."""

import re
from pathlib import Path

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message is one line that says what to do."""


def read_file(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, on the CPU, read with `weights_only=True`.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged and foreign files
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): is it complete?"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file, without the prefixes of DataParallel, DDP and torch.compile."""
    content = read_file(path)
    state = content.get("model", content.get("state_dict", content))
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds no state dict under 'model' or 'state_dict'")
    return state
