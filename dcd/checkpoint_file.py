"""Reads checkpoint files of any trainer, without running code that they may contain."""

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dcd.file_kinds import HEAD_BYTES, LEGACY, ZIP, foreign_kind, foreign_zip, is_safetensors
from dcd.foreign_types import STAND_INS

# The keys of the weights and of their moving average, by ours, timm, torchvision's references, DeepSpeed.
WEIGHTS = ("model", "state_dict", "module")
AVERAGES = ("ema", "state_dict_ema", "model_ema")

DESCRIPTION = "dcd"  # the key in the metadata of a safetensors file under which the rest of a checkpoint is, as JSON


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message is one line that says what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which a part is missing or has changed since it was written."""


def read_file(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, on the CPU, read with `weights_only=True`.

    The file is first compared with its checksums, which takes about as long as reading it once more. (The format
    before PyTorch 1.6 has no checksums.) Objects of other libraries are replaced by `foreign_types.Unread`.

    Of a safetensors file, which has no checksums either, the tensors are under "model", beside what
    `tools.convert_checkpoint` has written of the model.

    Raises:
        DamagedCheckpointError: empty, torn, or not as it was written.
        CheckpointError: no such file, not a checkpoint, or one with types that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: check the path")
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    kind = foreign_kind(head, path.stat().st_size)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}")
    if is_safetensors(head, path.stat().st_size):
        return _read_safetensors(path)
    if not any(head):
        raise _damaged(path, "it begins with zeros" if head else "it is empty")
    if ZIP.startswith(head[:4]):
        _check_zip(path)
    elif head[:1] != LEGACY[:1]:  # of any pickle
        raise _damaged(path, "it does not begin as a checkpoint of PyTorch does")
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # torch raises half a dozen types for a file that is not what it was
        raise _damaged(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(f"{path} is a safetensors file: pip install safetensors to read it") from error
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            return {**json.loads((file.metadata() or {}).get(DESCRIPTION, "{}")), "model": state}
    except (SafetensorError, OSError, ValueError, TypeError) as error:  # the last two: of a description that is none
        raise _damaged(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _check_zip(path: Path) -> None:
    """Compare every record of a file by torch.save with its checksum (CRC-32), which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch.serialization.set_crc32_options(False) writes zeros in their place.
            damaged = archive.testzip() if any(record.CRC for record in archive.infolist()) else None
    except Exception as error:  # as with torch.load
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if damaged is not None:
        raise _damaged(path, f"the checksum of its record {damaged} does not match")
    kind = foreign_zip(names)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}")


def _damaged(path: Path, reason: str) -> DamagedCheckpointError:
    reason = "its end is missing" if reason.endswith("File is not a zip file") else reason
    return DamagedCheckpointError(f"{path} is torn or damaged ({reason}): copy or download it again")


def _refused(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """The error for a file that `weights_only=True` refuses: for a type that may do harm, or another kind of pickle."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return CheckpointError(
            f"{path} holds a {found[1]}, which is not read because it could run code: "
            'save the weights alone where it was made, torch.save({"state_dict": model.state_dict()}, FILE)'
        )
    reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return CheckpointError(f"{path} cannot be read as a checkpoint: {reason.strip().partition(chr(10))[0]}")


@dataclass(frozen=True)
class Weights:
    """What a checkpoint file holds of a model.

    state: the weights, by name, on the CPU. classes: the names of the outputs' classes, in order, or None where the
    file has none. path: of the file, for messages. architecture, options: of a checkpoint of ours, the arguments of
    `create_model` and the options of the run by their names in its config.json; None in other files. of: "weights", or
    "moving average" where the state is that. has_average: whether the file has one.
    """

    state: dict[str, Tensor]
    classes: list[str] | None
    path: Path
    architecture: dict | None = None
    options: dict | None = None
    of: str = "weights"
    has_average: bool = False

    @property
    def blur_pool(self) -> bool:
        """Whether they were trained with blur pooling, which only our own checkpoints say; all others are taken for
        weights without."""
        return (self.architecture or {}).get("blur_pool") is True

    @property
    def num_classes(self) -> int | None:
        """The number of outputs, by the bias of the classifier in own, official and torchvision's names."""
        pattern = re.compile(r"(classifier(\.\d)?(\.static_linear|\.cls)?|fc)\.bias")
        widths = [len(tensor) for name, tensor in self.state.items() if pattern.fullmatch(name)]
        if len(widths) == 1:
            return widths[0]
        return len(self.classes) if self.classes else None


def read_weights(path: str | Path, ema: bool | None = False) -> Weights:
    """The weights in a checkpoint file: `weights_in` what `read_file` reads; raises what they raise."""
    return weights_in(read_file(path), Path(path), ema)


def weights_in(content: dict, path: Path, ema: bool | None = False) -> Weights:
    """The weights in what a checkpoint file holds, without the prefixes of DataParallel, DDP, torch.compile and
    Lightning.

    Args:
        content: of a checkpoint of ours, the official code, timm, torchvision's references, or a bare state dict.
        path: of the file, for messages.
        ema: the moving average of the weights, from a checkpoint of a trainer that keeps one. None: what the best
            evaluation was of, which our best.pth says, and else the weights.

    Raises:
        CheckpointError: it does not hold what is asked for.
    """
    ema = content.get("best") == "ema" if ema is None else ema
    wanted, places = ("moving average", AVERAGES) if ema else ("weights", WEIGHTS)
    where = next((key for key in places if isinstance(content.get(key), dict) and content[key]), None)
    if where is None and (ema or not any(isinstance(value, Tensor) for value in content.values())):
        keys = ", ".join([str(key) for key in content][:10])
        raise CheckpointError(f"{path} holds no {wanted} under {', '.join(places)}: its keys are {keys or 'none'}")
    state = content if where is None else content[where]
    state = {name: value for name, value in state.items() if name != "n_averaged"}  # a moving average's counter
    foreign = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(f"{path} holds {wanted} that are no tensors of PyTorch: {', '.join(foreign[:5])}")
    plain = {re.sub(r"^(module\.|_orig_mod\.|model\.)+", "", name): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise CheckpointError(f"{path} holds several models, whose names are the same behind 'module.' and 'model.'")
    classes = content.get("classes")
    is_named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    architecture, options = content.get("architecture"), content.get("config")
    architecture = architecture if isinstance(architecture, dict) else None
    options = options if architecture is not None and isinstance(options, dict) else None
    has_average = any(isinstance(content.get(key), dict) for key in AVERAGES)
    return Weights(plain, classes if is_named else None, path, architecture, options, wanted, has_average)
