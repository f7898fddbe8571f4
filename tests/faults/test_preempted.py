"""A signal ends a run within ten seconds with a checkpoint, whatever the run does at that moment."""

import os
import shutil
import signal
import time

import psutil
import pytest

from tests.faults.conftest import options, same_bits
from tests.faults.test_killed import STEPS_PER_EPOCH, last_line
from tests.helpers import last, read
from tests.processes import until

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


def reach(moment: str, job, out, folder) -> None:
    """Wait until the run reaches this moment."""
    until(lambda: not job.running or last_line(out).get("global_step", 0) > STEPS_PER_EPOCH)
    if moment == "evaluation":
        # The next evaluation waits for this image.
        replace_by_pipe(sorted((folder / "val").rglob("*.JPEG"))[3])
        until(lambda: not job.running or last_line(out).get("step") == STEPS_PER_EPOCH)
        time.sleep(2)
    elif moment == "waiting for an image":
        for image in sorted((folder / "train").rglob("*.JPEG")):
            replace_by_pipe(image)
        time.sleep(3)
    elif moment == "workers halted":
        for pid in job.pids:
            for worker in psutil.Process(pid).children(recursive=True):
                worker.suspend()
        time.sleep(2)
    elif moment == "between epochs":
        until(lambda: not job.running or last_line(out).get("kind") == "eval_ema", every=0.001)
    assert job.running, job.output


def replace_by_pipe(image) -> None:
    """Replace an image by a named pipe: a process that opens it waits."""
    image.rename(image.with_suffix(".kept"))
    os.mkfifo(image)


def mend(folder) -> None:
    for kept in folder.rglob("*.kept"):
        kept.replace(kept.with_suffix(".JPEG"))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "moment", ["training", "evaluation", "waiting for an image", "workers halted", "between epochs"]
)
def test_a_signal_ends_a_run_with_a_checkpoint(data, start, whole, tmp_path, moment, ranks, number):
    folder, out = shutil.copytree(data["torchvision"], tmp_path / "data"), tmp_path / "out"
    common = options({"torchvision": folder}, "torchvision", epochs=6)
    expected = whole(*common, ranks=ranks)
    job = start(*common, "-c", out, ranks=ranks)
    reach(moment, job, out, folder)
    before = time.monotonic()
    job.signal(number, ranks - 1)  # to one rank only: the ranks agree
    assert set(job.wait(30)) == {75}, job.output
    assert time.monotonic() - before < 10, job.output
    assert "stopped; the same command goes on" in job.output and read(out, "status.json")["state"] == "preempted"
    state = last(out)
    assert state["epoch"] * STEPS_PER_EPOCH + state["step"] >= STEPS_PER_EPOCH
    mend(folder)
    assert set(start(*common, "-c", out, ranks=ranks).wait()) == {0}
    same_bits(out, expected)


@pytest.mark.parametrize("to", ["torchrun", "a rank"])
def test_below_torchrun(data, start, whole, tmp_path, to):
    common, out = options(data, "ffcv", epochs=40), tmp_path / "out"
    job = start(*common, "-c", out, torchrun=True)
    until(lambda: not job.running or last_line(out).get("global_step", 0) >= 5)
    before = time.monotonic()
    os.kill(job.pids[0] if to == "torchrun" else job.ranks()[1].pid, signal.SIGTERM if to == "torchrun" else 10)
    assert job.wait(60) != [0], job.output
    assert time.monotonic() - before < 15, "10 s, and what torchrun takes"
    assert read(out, "status.json")["state"] == "preempted"
    expected = whole(*common)
    assert start(*common, "-c", out, torchrun=True).wait() == [0]
    same_bits(out, expected)


def test_a_second_signal_ends_at_once(data, start, tmp_path):
    """Even if the first signal has no effect: the other rank is halted, so the ranks cannot agree to stop."""
    job = start(*options(data, "ffcv", epochs=100), "-c", tmp_path / "out")
    until(lambda: not job.running or last_line(tmp_path / "out").get("global_step", 0) >= 5)
    job.signal(signal.SIGSTOP, 1)
    job.signal(signal.SIGTERM, 0)
    time.sleep(3)
    assert job.running and job.codes[0] is None
    job.signal(signal.SIGTERM, 0)
    until(lambda: job.running and job.codes[0] is not None, 2)
    assert job.codes[0] == 128 + signal.SIGTERM
