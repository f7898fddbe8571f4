"""A run ends cleanly, every time, on a busy machine."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.faults.conftest import SMALL
from tests.processes import until

RUNS = int(os.environ.get("FAULTS_RUNS", 100))
AT_ONCE = 4


@pytest.fixture
def busy():
    """Two processes that keep the cores busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("torchrun", "runs"), [(False, RUNS), (True, RUNS // 10)])
def test_no_run_fails_at_its_end(data, start, tmp_path, busy, torchrun, runs):
    """`runs` runs of two ranks with an evaluation at the end; no gloo thread is left when Python ends."""
    waiting, running, bad = list(range(runs)), {}, []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number = waiting.pop()
            args = [*SMALL, "-b", 12, "--epochs", 1, "-d", data["ffcv"], "-c", tmp_path / f"out{number}"]
            running[number] = start(*args, torchrun=torchrun, output=f"log{number}.txt")
        until(lambda: not all(job.running for job in running.values()), 600)
        for number in [number for number, job in running.items() if not job.running]:
            job = running.pop(number)
            ended = set(job.codes) == {0} and (tmp_path / f"out{number}" / "summary.json").exists()
            if not ended or "ends with threads" in job.output:
                bad.append((job.codes, job.output[-2000:]))
            shutil.rmtree(tmp_path / f"out{number}")
    assert not bad, f"{len(bad)} of {runs} runs failed, such as {bad[0]}"
