"""Train for half an hour on each backend, and judge whether memory, threads, open files and processes stay as they are.

    python -m benchmarks.soak                      or: make soak ARGS="--minutes 10 --backends ffcv"

Each backend is a run of train_dist.py of its own, all at the same time: a small network on a few scanned digits, so
that epochs, evaluations and checkpoints follow each other in seconds. Every few seconds all processes of a run are
counted together. Memory is what they have taken, anonymous and shared memory, in which what they share is counted once;
pages of files are the system's cache, and their share of a process depends on what else has them open.

The first fifth of the time is the warm-up. After it a quantity has two rates, both in units per hour: the slope of a
line through all samples by least squares, and the step from the median of the middle third to that of the last. It has
grown where both exceed what `BOUNDS` allows: noise moves either, a single allocation that stays moves the first, a
leak moves both. The exit code is 1 where anything has grown, or a run has ended by itself.
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

import psutil
import torch

from benchmarks.programs import run_program
from tools.profiling.machine import describe_machine
from tools.profiling.processes import sum_over_processes
from tools.profiling.report import table_of, write_report
from training.command_line import parse

ROOT = Path(__file__).parents[1]
# A learning rate that stays where it is for as long as the run may take, and too low to diverge
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
# Growth per hour that is still called flat. A day's training may grow by what a single epoch's batches take; a count
# that rises by one between the two medians of 30 minutes is above its bound.
BOUNDS = {"memory_mib": 32.0, "threads": 4.0, "open_files": 4.0, "processes": 4.0}
UNITS = {"memory_mib": "MiB of memory", "threads": "threads", "open_files": "open files", "processes": "processes"}
WARM_UP = 1 / 5
STOP_S = 60  # a run that is asked to stop has ended by then


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
    """How one quantity went after the warm-up. slope, step: units per hour, see above."""

    quantity: str
    middle: float
    last: float
    slope: float
    step: float

    @property
    def grew(self) -> bool:
        return min(self.slope, self.step) > BOUNDS[self.quantity]


class Run:
    """A training that is being watched; its files are in `folder`.

    Args:
        name: for the report. command: what starts it. folder: where its output goes, in log.txt.
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
        """Count everything once, unless the run has ended, which is its error."""
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
        sums = {name: sum_over_processes(self.process, figure) for name, figure in figures.items()}
        self.samples.append(Sample(time.monotonic() - self._start, **sums))

    def stop(self) -> None:
        """Ask for the end, and take it by force where it does not come."""
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
        """flat, or what is wrong, in one line."""
        if self.error:
            return self.error
        trends = judge(self.samples)
        if not trends:
            return f"{len(self.samples)} samples are too few to judge"
        grown = [f"{UNITS[trend.quantity]} {trend.slope:+,.1f} per hour" for trend in trends if trend.grew]
        return f"grew: {', '.join(grown)}" if grown else "flat"

    def figures(self) -> tuple[int, int]:
        """Steps and evaluations that were logged."""
        metrics = self.folder / "out" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        steps = max((line["global_step"] for line in lines), default=0)
        return steps, sum(line["kind"] == "eval" for line in lines)

    def _last_words(self) -> str:
        lines = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


def memory_kib(pid: int) -> int:
    """Anonymous and shared memory of a process, what it shares with others divided between them, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError as error:  # it has ended: the file is gone, or empty
        raise psutil.NoSuchProcess(pid) from error
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def judge(samples: Sequence[Sample]) -> list[Trend]:
    """The trend of each quantity after the warm-up; none where fewer than three samples are left in a third."""
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
    """A few of the digits below `folder`, in class folders (folder/) and as .beton files (beton/)."""
    run_program("tools.make_sample", folder / "digits")
    for split, count in PER_CLASS.items():
        for of_class in (folder / "digits" / split).iterdir():
            copy = folder / "folder" / split / of_class.name
            copy.mkdir(parents=True)
            for image in sorted(of_class.iterdir())[:count]:
                shutil.copy(image, copy)
    run_program("tools.make_dataset", folder / "folder", folder / "beton", "--workers", 1)


def command(backend: str, folder: Path, ranks: int) -> list[str]:
    """The training of one backend on what `prepare` has left in `folder`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    options = [str(folder / word) if word in ("beton", "folder") else word for word in BACKENDS[backend]]
    script = [sys.executable, *launcher, str(ROOT / "train_dist.py")]
    return [*script, *TRAINING.split(), *options, "-c", str(folder / backend / "out")]


def watch(runs: Sequence[Run], seconds: float, interval: float) -> None:
    """Sample every run each `interval` seconds, for so many `seconds`, and stop them."""
    end = time.monotonic() + seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the runs end, too
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
    """What was run, the table, and how to read it."""
    allowed = ", ".join(f"{bound:g} {UNITS[quantity]}" for quantity, bound in BOUNDS.items())
    images = {split: 10 * count for split, count in PER_CLASS.items()}
    return [
        f"{minutes:g} minutes, {len(runs)} run(s) at the same time, {ranks} rank(s) each, `{TRAINING}`, "
        f"{images['train']} images to train and {images['val']} to evaluate, a checkpoint after every epoch.",
        table(runs),
        "`a → b (c)`: medians of the middle and of the last third of the time after the warm-up (a fifth); the slope "
        f"by least squares, per hour. Flat: not both grow by more than {allowed} per hour.",
    ]


def main(
    minutes: float = 30.0,
    backends: tuple[str, ...] = tuple(BACKENDS),
    ranks: int = 1,
    interval: float = 5.0,
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Watch a training by each backend, print a table, and end with exit code 1 where anything grew.

    Args:
        minutes: how long they train.
        backends: which; by default all.
        ranks: processes of each training.
        interval: seconds between two samples.
        folder: where a temporary folder is made for data and output.
        out: write what is printed to OUT.md, and all samples to OUT.json.
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
