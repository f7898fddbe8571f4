"""What a run leaves in its output folder, and what it shows on the terminal. Only rank 0 has one that writes.

Files:

    config.json     every option, versions, device, git commit
    metrics.jsonl   one JSON object a line: {"kind": "train" | "eval" | "eval_ema", "global_step", "epoch", ...}
    tensorboard/    the same numbers as TensorBoard events
    checkpoints/    last.pth, best.pth
    summary.json    the result
"""

import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from dcd.engine.config import Config
from dcd.engine.distributed import Ranks
from dcd.engine.optim import autocast_dtype


class RunLog:
    """Writes the log of one run.

    Args:
        folder: the output folder. enabled: False on every rank but the first, where nothing is written.
    """

    def __init__(self, folder: Path, enabled: bool):
        self.folder, self.enabled = folder, enabled
        self._bar: tqdm | None = None
        self._show_bar = enabled and sys.stderr.isatty()

    def open(self, resolved: dict, global_step: int) -> None:
        """Write `config.json`, and go on with the metrics from `global_step`.

        Lines that a stopped run wrote after its last checkpoint are dropped: those steps are done again.
        """
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import; the other ranks need not

        write_json(self.folder / "config.json", resolved)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= global_step]
            _replace(metrics, "".join(f"{line}\n" for line in kept))
        self._metrics = open(metrics, "a", buffering=1)
        self._events = SummaryWriter(_in_utf8(self.folder / "tensorboard"), purge_step=global_step + 1)

    def write(self, kind: str, global_step: int, **values: float) -> None:
        """One line in `metrics.jsonl` and the same numbers in TensorBoard, under `kind`."""
        if self.enabled:
            # JSON has no NaN
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._metrics.write(json.dumps({"kind": kind, "global_step": global_step, **finite}) + "\n")
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, global_step)

    def say(self, text: str) -> None:
        """A line on the terminal, above the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start_epoch(self, title: str, steps: int, done: int) -> None:
        """Show a progress bar where there is a terminal."""
        if self._show_bar:
            self._bar = tqdm(desc=title, total=steps, initial=done, unit="step", leave=False, dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar:
            self._bar.update()

    def progress(self, position: str, figures: str) -> None:
        """The figures of the last steps: beside the bar, or as a plain line where there is no terminal."""
        if self._bar:
            self._bar.set_postfix_str(figures, refresh=False)
        else:
            self.say(f"{position} {figures}")

    def end_epoch(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None

    def close(self, summary: dict | None = None) -> None:
        """Flush everything; write `summary.json` when there is a summary. May be called twice."""
        self.end_epoch()
        if self.enabled and hasattr(self, "_metrics"):
            self._metrics.close()
            self._events.close()
            if summary is not None:
                write_json(self.folder / "summary.json", summary)


def resolve(config: Config, ranks: Ranks) -> dict:
    """Everything that determines a run, for `config.json`."""
    return {
        "config": config.to_dict(),
        "command": sys.argv,
        "world_size": ranks.world_size,
        "device": device_name(ranks.device),
        "amp_dtype": str(autocast_dtype(config.amp, ranks.device)),
        "versions": {
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
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _in_utf8(folder: Path) -> str:
    """The folder, by a name that TensorBoard takes: its own, or where that is no UTF-8, one of an open file's."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}"
    return str(folder)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["global_step"]
    except (ValueError, KeyError):
        return float("inf")  # cut off in the middle of a write


def _git_commit() -> str | None:
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None  # no git here
