"""Train for half an hour on each backend, and judge whether memory, threads, open files and processes stay constant.

    python -m benchmarks.soak                      or: make soak ARGS="--minutes 10 --backends ffcv"

Each backend has its own run of train_dist.py, all at the same time: a small network on a few scanned digits, so that
epochs, evaluations and checkpoints follow each other in seconds. Every few seconds a sample sums over all processes of
a run. Memory is anonymous and shared memory, with shared memory counted once. Pages of files are not counted: they are
the system's cache, and the share of a process depends on which other processes have them open.

The first fifth of the time is the warm-up. Each quantity then has two growth rates per hour: the slope of a
least-squares line through all samples, and the step from the median of the middle third to the median of the last. A
quantity has grown if both exceed `BOUNDS`: noise moves one of them, a single allocation that stays moves the slope, a
leak moves both. The exit code is 1 if any quantity has grown, or a run has ended by itself.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.programs import run_program
from tools.profiling.machine import describe_machine
from tools.profiling.processes import sum_over_processes
from tools.profiling.report import table_of, write_report
from training.command_line import parse

ROOT = Path(__file__).parents[1]
# The learning rate stays constant for as long as the run can take, and is too low to diverge
TRAINING = (
    "-a mobilenetv2_dcd --width-mult 0.1 --fc-squeeze 16 --input-size 32 -b 16 -j 2 -p 5 --device cpu "
    "--lr 0.001 --lr-decay cos --epochs 10000000"
)
BACKENDS = {
    "ffcv": ("--backend", "ffcv", "-d", "beton"),
    "dali": ("--backend", "dali", "-d", "beton"),
    "torchvision": ("--backend", "torchvision", "-d", "folder"),
    "synthetic": ("--backend", "synthetic", "--synthetic-images", "160", "--num-classes", "10"),
}
PER_CLASS = {"train": 16, "val": 8}  # images of each of the ten classes
# The largest growth per hour that counts as flat. A day's training may grow by the size of one epoch's batches; a count
# that rises by one between the two medians of 30 minutes is above its bound.
BOUNDS = {"memory_mib": 32.0, "threads": 4.0, "open_files": 4.0, "processes": 4.0}
UNITS = {"memory_mib": "MiB of memory", "threads": "threads", "open_files": "open files", "processes": "processes"}
WARM_UP = 1 / 5
STOP_S = 60  # seconds within which a run must end after SIGTERM


@dataclass(frozen=True)
class Sample:
    """All processes of a run together, `seconds` after its start."""

    seconds: float
    memory_mib: float
    threads: int
    open_files: int
    processes: int


@dataclass(frozen=True)
class Trend:
    """One quantity after the warm-up. middle, last: medians of these thirds. slope, step: growth per hour."""

    quantity: str
    middle: float
    last: float
    slope: float
    step: float

    @property
    def grew(self) -> bool:
        return min(self.slope, self.step) > BOUNDS[self.quantity]


class Run:
    """A training under watch; its files are in `folder`.

    Args:
        name: for the report. command: starts the training. folder: its output goes to log.txt there.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path):
        self.name, self.folder = name, folder
        self.samples: list[Sample] = []
        self.error = ""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "wb") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        self._start = time.monotonic()

    def sample(self) -> None:
        """Take one sample; if the run has ended, that is its error."""
        if self.error:
            return
        if self.process.poll() is not None:
            self.error = f"ended by itself with exit code {self.process.returncode}: {self._last_words()}"
            return
        figures = {
            "memory_mib": lambda each: memory_kib(each.pid) / 2**10,
            "threads": psutil.Process.num_threads,
            "open_files": psutil.Process.num_fds,
            "processes": lambda _: 1,
        }
        sums: dict[str, Any] = {name: sum_over_processes(self.process, figure) for name, figure in figures.items()}
        self.samples.append(Sample(time.monotonic() - self._start, **sums))

    def stop(self) -> None:
        """Ask the run to end, and kill it if it does not."""
        if self.process.poll() is not None:
            return
        children = self.process.children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.error = self.error or f"did not end within {STOP_S} s after SIGTERM"
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
        for child in alive:
            self.error = self.error or f"left process {child.pid} behind"
            child.kill()

    @property
    def verdict(self) -> str:
        """ "flat", or one line that says what is wrong."""
        if self.error:
            return self.error
        trends = judge(self.samples)
        if not trends:
            return f"{len(self.samples)} samples are too few to judge"
        grown = [f"{UNITS[trend.quantity]} {trend.slope:+,.1f} per hour" for trend in trends if trend.grew]
        return f"grew: {', '.join(grown)}" if grown else "flat"

    def figures(self) -> tuple[int, int]:
        """The numbers of logged steps and evaluations."""
        metrics = self.folder / "out" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        steps = max((line["global_step"] for line in lines), default=0)
        return steps, sum(line["kind"] == "eval" for line in lines)

    def _last_words(self) -> str:
        lines = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


def memory_kib(pid: int) -> int:
    """Anonymous and shared memory of a process in KiB; memory of several processes is divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError as error:  # it has ended
        raise psutil.NoSuchProcess(pid) from error
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def judge(samples: Sequence[Sample]) -> list[Trend]:
    """The trend of each quantity after the warm-up; empty if a third has fewer than three samples."""
    if not samples:
        return []
    start, end = samples[0].seconds, samples[-1].seconds
    kept = [each for each in samples if each.seconds >= start + WARM_UP * (end - start)]
    third = len(kept) // 3
    if third < 3:
        return []
    hours = [each.seconds / 3600 for each in kept]
    middle_hour, last_hour = (statistics.median(part) for part in (hours[third:-third], hours[-third:]))
    trends = []
    for quantity in BOUNDS:
        values = [float(getattr(each, quantity)) for each in kept]
        middle, last = statistics.median(values[third:-third]), statistics.median(values[-third:])
        slope = statistics.linear_regression(hours, values).slope
        trends.append(Trend(quantity, middle, last, slope, (last - middle) / (last_hour - middle_hour)))
    return trends


def prepare(folder: Path) -> None:
    """Write a few of the digits below `folder`, as class folders (folder/) and as .beton files (beton/)."""
    run_program("tools.make_sample", folder / "digits")
    for split, count in PER_CLASS.items():
        for of_class in (folder / "digits" / split).iterdir():
            copy = folder / "folder" / split / of_class.name
            copy.mkdir(parents=True)
            for image in sorted(of_class.iterdir())[:count]:
                shutil.copy(image, copy)
    run_program("tools.make_dataset", folder / "folder", folder / "beton", "--workers", 1)


def command(backend: str, folder: Path, ranks: int) -> list[str]:
    """The command line of one backend's training on the data that `prepare` wrote into `folder`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    options = [str(folder / word) if word in ("beton", "folder") else word for word in BACKENDS[backend]]
    script = [sys.executable, *launcher, str(ROOT / "train_dist.py")]
    return [*script, *TRAINING.split(), *options, "-c", str(folder / backend / "out")]


def watch(runs: Sequence[Run], seconds: float, interval: float) -> None:
    """Sample all runs every `interval` seconds, for `seconds` in all, then stop them."""
    end = time.monotonic() + seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the runs are stopped too
    try:
        while (left := end - time.monotonic()) > 0 and not all(run.error for run in runs):
            time.sleep(min(interval, left))
            for run in runs:
                run.sample()
    finally:
        for run in runs:
            run.stop()


def table(runs: Sequence[Run]) -> str:
    """One row a run, in Markdown."""

    def moved(quantity: str) -> Callable[[Run], str]:
        def cell(run: Run) -> str:
            trends = [trend for trend in judge(run.samples) if trend.quantity == quantity]
            return "".join(f"{trend.middle:,.4g} → {trend.last:,.4g} ({trend.slope:+,.1f})" for trend in trends)

        return cell

    columns = {"backend": lambda run: run.name, "steps": lambda run: run.figures()[0]}
    columns |= {"evaluations": lambda run: run.figures()[1], "samples": lambda run: len(run.samples)}
    columns |= {UNITS[quantity]: moved(quantity) for quantity in BOUNDS} | {"result": lambda run: run.verdict}
    return table_of(runs, columns)


def sections(runs: Sequence[Run], minutes: float, ranks: int) -> list[str]:
    """Markdown: the setting, the table, and how to read it."""
    allowed = ", ".join(f"{bound:g} {UNITS[quantity]}" for quantity, bound in BOUNDS.items())
    images = {split: 10 * count for split, count in PER_CLASS.items()}
    return [
        f"{minutes:g} minutes, {len(runs)} run(s) at the same time, {ranks} rank(s) each, `{TRAINING}`, "
        f"{images['train']} images to train and {images['val']} to evaluate, a checkpoint after every epoch.",
        table(runs),
        "`a → b (c)`: medians of the middle and of the last third of the time after the warm-up (a fifth); the slope "
        f"by least squares, per hour. Flat: slope or step of the medians is at most {allowed} per hour.",
    ]


def main(
    minutes: float = 30.0,
    backends: tuple[str, ...] = tuple(BACKENDS),
    ranks: int = 1,
    interval: float = 5.0,
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Watch a training on each backend, print a table, and end with exit code 1 if anything grew.

    Args:
        minutes: how long they train.
        backends: names of backends; by default all.
        ranks: processes of each training.
        interval: seconds between two samples.
        folder: parent of a temporary folder for data and output.
        out: write the printed report to OUT.md, and all samples to OUT.json.
    """
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        sys.exit(f"error: no backend {unknown[0]!r}: the backends are {', '.join(BACKENDS)}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        where = Path(temporary)
        prepare(where)
        runs = [Run(name, command(name, where, ranks), where / name) for name in backends]
        watch(runs, 60 * minutes, interval)
        found = {
            run.name: {"verdict": run.verdict, "trends": judge(run.samples), "samples": run.samples} for run in runs
        }
        write_report(out, describe_machine(torch.device("cpu")), sections(runs, minutes, ranks), runs=found)
    bad = [run for run in runs if run.verdict != "flat"]
    if bad:
        sys.exit("\n".join(f"error: {run.name}: {run.verdict}" for run in bad))


if __name__ == "__main__":
    parse(main)
