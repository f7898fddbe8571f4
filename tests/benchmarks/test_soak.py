"""`make soak`: that it counts all processes of a run, tells a leak from noise, and names what grew."""

import sys
import time
from dataclasses import replace

import pytest

from benchmarks import soak
from benchmarks.soak import Run, Sample, judge, watch

# Stands in for a training: takes 20 MiB, a thread and two open files every 50 ms, or once.
TRAINING = """
import os, sys, threading, time
kept, pipes = [], []
while True:
    if sys.argv[1] == "leaks" or not kept:
        kept.append(b"x" * (20 << 20))
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        pipes.append(os.pipe())
    print("ready", flush=True)
    time.sleep(0.05)
"""
# The same below another process
BELOW = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TRAINING!r}, *sys.argv[1:]])"


def recorded(**rates: float) -> list[Sample]:
    """Half an hour of samples every five seconds: a warm-up, noise of ±6 MiB, and `rates` in units per hour."""
    samples = []
    for i in range(360):
        hours = i / 720
        warm_up = 300 * (1 - 0.94**i)
        noise = 6 * ((7919 * i) % 13 / 6 - 1)
        counts = {name: int(base + rates.get(name, 0) * hours) for name, base in (("threads", 40), ("open_files", 60))}
        memory = 700 + warm_up + noise + rates.get("memory_mib", 0) * hours
        samples.append(Sample(5.0 * i, memory, processes=5, **counts))
    return samples


def grown(samples: list[Sample]) -> list[str]:
    return [trend.quantity for trend in judge(samples) if trend.grew]


@pytest.mark.parametrize("leak", [{"memory_mib": 60.0}, {"threads": 8.0}, {"open_files": 12.0}])
def test_a_leak_is_told_from_noise_and_from_the_warm_up(leak):
    assert grown(recorded()) == []
    assert grown(recorded(**leak)) == list(leak)
    (quantity, rate), *_ = leak.items()
    trend = next(trend for trend in judge(recorded(**leak)) if trend.quantity == quantity)
    assert trend.slope == pytest.approx(rate, rel=0.25)


def test_one_allocation_that_stays_is_no_leak():
    samples = recorded()
    later = [replace(each, memory_mib=each.memory_mib + 40 * (each.seconds > 700)) for each in samples]
    assert grown(later) == []


def test_real_processes_are_counted_with_their_children(tmp_path):
    scripts = {"flat": (TRAINING, "holds"), "leaks": (TRAINING, "leaks"), "below": (BELOW, "leaks")}
    runs = [Run(name, [sys.executable, "-c", *script], tmp_path / name) for name, script in scripts.items()]
    runs.append(Run("ends", [sys.executable, "-c", "print('ready\\nout of paper'); exit(3)"], tmp_path / "ends"))
    while not all("ready" in (run.folder / "log.txt").read_text() for run in runs):
        time.sleep(0.05)
    for _ in range(20):
        time.sleep(0.05)
        for run in runs:
            run.sample()
    watch(runs, seconds=0.1, interval=0.1)
    verdicts = {run.name: run.verdict for run in runs}
    assert verdicts["flat"] == "flat"
    assert all(word in verdicts["leaks"] for word in ("MiB", "threads", "open files")), verdicts
    assert verdicts["below"].startswith("left process ") and grown(runs[2].samples) == grown(runs[1].samples)
    assert verdicts["ends"] == "ended by itself with exit code 3: out of paper"
    assert runs[2].samples[-1].processes == 2 and not any(run.process.is_running() for run in runs)
    assert "| leaks | 0 | 0 |" in soak.table(runs)
