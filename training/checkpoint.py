"""The checkpoints of a run: each is there as a whole or not at all, and an older one stays beside the newest.

checkpoints/last.pth      the newest
checkpoints/last.1.pth    the one before it, and so on; `--keep` is their number
checkpoints/best.pth      the model with the best evaluation: what `dcd.load` needs, without the rest of the run
"""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor

from dcd.checkpoint_file import CheckpointError, DamagedCheckpointError, read_file
from training.folder_sync import sync_folder
from training.options import ConfigError

Best = Literal["model", "ema"]  # what the best evaluation was of
# What best.pth has of the state of a run. "best" says which of its weights the evaluation was of.
OF_THE_MODEL = ("architecture", "classes", "preprocessing", "config", "best_epoch", "best_top1", "model", "ema")


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread of its own: training waits only while the state is copied.

    Args:
        folder: of the checkpoints. keep: number of the newest to keep, at least 1.
        say: called with one line for each checkpoint that cannot be written.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]):
        self._folder, self._keep, self._say = folder, keep, say
        self._thread: Thread | None = None
        self.failure: OSError | None = None  # of the newest checkpoint
        self._fault: Exception | None = None  # of this program

    def prepare(self) -> None:
        """Check that the folder can be written to, and remove half-written files of a killed run.

        Raises:
            ConfigError: it cannot.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in ("last.tmp", "best.tmp"):
                (self._folder / name).touch()
                (self._folder / name).unlink()
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self._folder} ({error.strerror}): use another --checkpoint folder"
            ) from error

    def save(self, state: dict, best: Best | None = None) -> None:
        """Copy the state to the host, wait until the last checkpoint is written, then write this one in the background.

        Args:
            best: write best.pth as well; this is what the evaluation was of.
        """
        state = _on_host(state)
        self.wait()
        self._thread = Thread(target=self._write, args=(state, best))
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is written or has failed, and raise what is no failure of the disk."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if self._fault is not None:
            raise self._fault

    def _write(self, state: dict, best: Best | None) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(state, self._folder / "last.tmp")
            if best is not None:
                write_file(of_the_best(state, best), self._folder / "best.tmp")
            # Both are written before either has its name: last.pth must not know of a best top-1 that best.pth lacks.
            for age in range(self._keep - 1, 0, -1):
                if (newer := generation(self._folder, age - 1)).exists():
                    os.replace(newer, generation(self._folder, age))
            os.replace(self._folder / "last.tmp", generation(self._folder, 0))
            if best is not None:
                os.replace(self._folder / "best.tmp", self._folder / "best.pth")
            sync_folder(self._folder)
            self.failure = None
        except OSError as error:
            for name in ("last.tmp", "best.tmp"):
                (self._folder / name).unlink(missing_ok=True)
            self.failure = error
            self._say(
                f"warning: no checkpoint of epoch {state['epoch'] + 1}, step {state['step']} could be written "
                f"({error}); training goes on, and the one before it is still there"
            )
        except Exception as error:
            self._fault = error


def of_the_best(state: dict, best: Best) -> dict:
    """The content of best.pth. timm looks first under "state_dict": there are the better weights, which take no room
    twice."""
    better = {name.removeprefix("module."): value for name, value in state[best].items() if name != "n_averaged"}
    return {"best": best, "state_dict": better, **{key: state[key] for key in OF_THE_MODEL}}


def generation(folder: Path, age: int) -> Path:
    """The path of the checkpoint that is `age` generations older than the newest."""
    return folder / ("last.pth" if age == 0 else f"last.{age}.pth")


def write_file(state: dict, path: Path) -> None:
    """Write a checkpoint, and wait until the disk has it."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _on_host(value: Any) -> Any:
    """A copy of every tensor in a tree of dictionaries and lists, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_host(item) for item in value]
    return value


def load_newest(folder: Path, architecture: dict, say: Callable[[str], None]) -> tuple[dict, Path] | None:
    """The newest whole checkpoint of the run in `folder`, and its path; None where the run has none.

    Args:
        folder: of the checkpoints. architecture: see `load`. say: called with a line for each damaged checkpoint.

    Raises:
        CheckpointError: all are damaged, or the newest whole one has another architecture.
    """
    ages = sorted(
        int(path.name.split(".")[1]) for path in folder.glob("last.*.pth") if path.name.split(".")[1].isdigit()
    )
    paths = [path for path in (generation(folder, age) for age in [0, *ages]) if path.exists()]
    for path in paths:
        try:
            return load(path, architecture), path
        except DamagedCheckpointError as error:
            say(f"warning: {error}; trying the one before it")
    if paths:
        raise CheckpointError(f"no checkpoint in {folder} is whole: remove them to begin anew")
    return None


def load(path: Path, architecture: dict) -> dict:
    """A checkpoint of this trainer, on the CPU.

    Args:
        architecture: `ModelConfig.architecture` of the run that will resume from it.

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
