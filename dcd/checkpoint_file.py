"""Reading checkpoint files, of whatever trainer, without running code that they may carry."""

import re
from pathlib import Path

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message is one line that says what to do."""


class DamagedCheckpointError(CheckpointError):
    """The file is torn, or has other bytes than were written."""


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
        raise DamagedCheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): is it complete?"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_state_dict(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint file, without the prefixes of DataParallel, DDP and torch.compile.

    Args:
        path: an official or own checkpoint, or a bare state dict.
        ema: the moving average of the weights, from a checkpoint of this project's trainer with `--ema`.

    Raises:
        CheckpointError: the file cannot be read, or does not hold what is asked for.
    """
    content = read_file(path)
    if ema:
        state = dict(content.get("ema") or {})
        state.pop("n_averaged", None)
    else:
        state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        wanted = "moving average under 'ema'" if ema else "state dict under 'model' or 'state_dict'"
        raise CheckpointError(f"{path} holds no {wanted}")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
