"""What a run writes to its output folder and to the terminal. Only the log of rank 0 writes.

Files:

    config.json     every option, versions, device, git commit
    metrics.jsonl   one JSON object a line: {"kind": "train" | "eval" | "eval_ema", "global_step", "epoch", ...}
    tensorboard/    the same numbers as TensorBoard events, the options, and a grid of the first training images
    checkpoints/    last.pth, best.pth
    summary.json    the result
    status.json     {"state": "running" | "finished" | "stopped" | "preempted" | "failed", "time": ...}
    .lock           held by the process that writes here

and by --wandb and --mlflow, wandb.json and mlflow.json with the name by which the service knows the run.
"""

import errno
import io
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import dcd
from training.config import Config
from training.distributed import Ranks
from training.event_log import EventLog
from training.folder_lock import FolderLock
from training.precision import autocast_dtype
from training.services import Service
from training.whole_files import whole_files


class RunLog:
    """Writes the log of one run.

    Args:
        folder: the output folder. enabled: True on rank 0; False on the other ranks, which write nothing.
    """

    def __init__(self, folder: Path, enabled: bool):
        self.folder, self.enabled = folder, enabled
        self._bar: tqdm | None = None
        self._show_bar = enabled and sys.stderr.isatty()
        self._lock: FolderLock | None = None
        self._metrics: io.FileIO | None = None
        self._copies: list[EventLog | Service] = []  # where the figures go as well
        self._lost: dict[str, int] = {}  # lines that could not be written to a file

    def claim(self) -> None:
        """Keep other runs out of the folder.

        Raises:
            ConfigError: another run uses the folder, or it cannot be written to.
        """
        if self.enabled and self._lock is None:
            self._lock = FolderLock(self.folder)

    def set_state(self, state: Literal["running", "finished", "stopped", "preempted", "failed"]) -> None:
        """Write `status.json`: scripts read it, because torchrun does not pass on the exit code of its workers."""
        if self._lock is not None:
            content = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            self._try("status.json", lambda: write_json(self.folder / "status.json", content))

    def open(self, resolved: dict, global_step: int, services: tuple[str, ...] = ()) -> None:
        """Write `config.json`, and continue the metrics from `global_step`.

        Lines that a stopped run wrote after its last checkpoint are dropped: those steps are done again.

        Args:
            services: which of `training.services` get a copy; they are installed.
        """
        if not self.enabled:
            return
        self.set_state("running")
        write_json(self.folder / "config.json", resolved)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= global_step]
            _write(metrics, "".join(f"{line}\n" for line in kept))
        threading.excepthook = partial(_thread_failed, threading.excepthook)
        self._metrics = open(metrics, "ab", buffering=0)  # a line that cannot be written is dropped, not retried
        self._copies = [EventLog(self.folder, resolved.get("config", {}), global_step)]
        self._copies += [self._open_service(name, resolved, global_step) for name in services]

    def _open_service(self, name: str, resolved: dict, global_step: int) -> Service:
        file = self.folder / f"{name}.json"
        run_id = json.loads(file.read_text())["run_id"] if global_step and file.exists() else None
        return Service(
            name, self.folder, run_id, resolved, lambda run_id: write_json(file, {"run_id": run_id}), self.say
        )

    def write(self, kind: str, global_step: int, **values: float) -> None:
        """One line in `metrics.jsonl` and the same numbers in its copies, under `kind`."""
        if self.enabled:
            line = json.dumps(_finite({"kind": kind, "global_step": global_step, **values}), allow_nan=False) + "\n"
            self._try("metrics.jsonl", lambda: self._write_line(line))
            for copy in list(self._copies):
                self._copy(copy, lambda copy=copy: copy.add(kind, values, global_step))

    @property
    def wants_images(self) -> bool:
        """Whether `write_images` is still to be called for this run."""
        return any(isinstance(copy, EventLog) and copy.wants_images for copy in self._copies)

    def write_images(self, name: str, global_step: int, images: Tensor) -> None:
        """A grid of images (N, 3, H, W), in [0, 1], in TensorBoard."""
        for copy in [copy for copy in self._copies if isinstance(copy, EventLog) and copy.wants_images]:
            self._copy(copy, lambda copy=copy: copy.add_images(name, images, global_step))

    def _write_line(self, line: str) -> None:
        data = line.encode()
        if self._lost.get("metrics.jsonl"):
            data = b"\n" + data  # a part of the lost line may be in the file
        assert self._metrics is not None
        if self._metrics.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _copy(self, copy: EventLog | Service, write: Callable[[], None]) -> None:
        if not self._try(copy.name, write):
            self._copies.remove(copy)  # TensorBoard's thread has ended

    def _try(self, name: str, write: Callable[[], None]) -> bool:
        """A full disk does not stop training: lost writes are counted, and reported at the first one and at the end.

        Returns:
            whether it is written.
        """
        try:
            write()
        except OSError as error:
            self._lost[name] = self._lost.get(name, 0) + 1
            if self._lost[name] == 1:
                self.say(f"warning: cannot write {self.folder / name} ({error}); training goes on without")
            return False
        return True

    def say(self, text: str) -> None:
        """Print a line on the terminal, above the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start_epoch(self, title: str, steps: int, done: int) -> None:
        """Show a progress bar if there is a terminal."""
        if self._show_bar:
            self._bar = tqdm(desc=title, total=steps, initial=done, unit="step", leave=False, dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar:
            self._bar.update()

    def progress(self, position: str, figures: str) -> None:
        """The figures of the last steps: beside the bar, or as a plain line if there is no terminal."""
        if self._bar:
            self._bar.set_postfix_str(figures, refresh=False)
        else:
            self.say(f"{position} {figures}")

    def end_epoch(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None

    def close(self, summary: dict | None = None) -> None:
        """Flush everything, write `summary.json` if there is a summary, release the folder. May be called twice."""
        self.end_epoch()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
            for copy in self._copies:
                self._try(copy.name, copy.close)
            self._copies = []
            if summary is not None:
                write_json(self.folder / "summary.json", summary)
            for name, count in self._lost.items():
                self.say(f"warning: {count} writes to {self.folder / name} were lost")
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _thread_failed(otherwise: Callable, failed: threading.ExceptHookArgs) -> None:
    """Do not print an OSError of TensorBoard's thread: it is raised again when the next figures are added."""
    if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
        otherwise(failed)


def resolve(config: Config, ranks: Ranks) -> dict:
    """Everything that determines a run, for `config.json`."""
    return {
        "config": config.to_dict(),
        "command": sys.argv,
        "world_size": ranks.world_size,
        "device": device_name(ranks.device),
        "amp_dtype": str(autocast_dtype(config.precision.amp, ranks.device)),
        "versions": {
            "dcd": dcd.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "numpy": version("numpy"),
            "cuda": torch.version.cuda,
        },
        "git_commit": _git_commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as a whole or not at all. NaN and infinity become null, since JSON has neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    with whole_files(path) as (file,):
        file.write_text(text)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["global_step"]
    except (ValueError, KeyError):
        return float("inf")  # cut off in the middle of a write


def _git_commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None  # an installed package: a repository around it is another project's
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None  # git is not installed
