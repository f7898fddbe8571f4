"""A run that is killed at any moment and restarted reaches the weights of a run that was never killed."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from tests.faults.conftest import options, same_bits
from tests.helpers import lines, read
from tests.processes import until

KILLS = int(os.environ.get("FAULTS_KILLS", 20))
STEPS_PER_EPOCH = 4


def last_line(out) -> dict:
    """The last line of the log; empty if the log has no complete line at its end."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return json.loads(text.splitlines()[-1]) if text.endswith("\n") else {}


def wait_for(moment: str, job, out, rng: random.Random) -> None:
    """Wait until the run, just started, reaches this moment or has ended."""
    if moment == "start":
        time.sleep(rng.uniform(0, 1.5))
        return
    metrics, started = out / "metrics.jsonl", time.time()
    until(lambda: not job.running or (metrics.exists() and metrics.stat().st_mtime > started and last_line(out)))
    if moment == "training":
        time.sleep(rng.uniform(0, 1))
    elif moment == "evaluation":
        in_evaluation = {"kind": "train", "step": STEPS_PER_EPOCH}
        until(lambda: not job.running or in_evaluation.items() <= last_line(out).items())
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "writing":
        time.sleep(rng.uniform(0, 0.5))
        until(lambda: not job.running or (out / "checkpoints" / "last.tmp").exists(), every=0.0005)


@pytest.mark.parametrize("precision", ["off", "bf16"])
@pytest.mark.parametrize("backend", ["torchvision", "ffcv", "dali"])
def test_killed_at_random_moments(data, start, whole, tmp_path, backend, precision):
    """One or both of two ranks get SIGKILL. A surviving rank must end by itself, with an error."""
    epochs, out, rng = 4 + KILLS, tmp_path / "out", random.Random(0)
    common = options(data, backend, epochs, precision)
    expected, done = whole(*common), []
    moments = [("start", "training", "evaluation", "writing")[number % 4] for number in range(KILLS)]
    rng.shuffle(moments)
    for moment in moments:
        job = start(*common, "-c", out)
        wait_for(moment, job, out, rng)
        assert job.running, f"the run had ended before the kill in {moment}: {job.output[-2000:]}"
        # Before the ranks are connected, one waits for the other, and only torchrun or srun could end it: kill both.
        victims = (0, 1) if moment == "start" else rng.choice([(0,), (1,), (0, 1)])
        job.signal(signal.SIGKILL, *victims)
        codes = job.wait(60)
        assert all(codes[place] == -signal.SIGKILL for place in victims), codes
        assert 0 not in codes, f"a rank ended well without the other: {job.output[-2000:]}"
        done.append((moment, len(list((out / "checkpoints").glob("last.tmp")))))
    assert set(start(*common, "-c", out).wait()) == {0}
    same_bits(out, expected)
    steps = [line["global_step"] for line in lines(out, "train")]
    assert steps == list(range(1, STEPS_PER_EPOCH * epochs + 1)), "each step is in the log once"
    if KILLS >= 20:
        assert any(left for moment, left in done if moment == "writing"), (
            "no kill fell into the writing of a checkpoint"
        )


@pytest.mark.parametrize("fault", ["killed", "exception", "out of memory"])
def test_torchrun_restarts_a_run(data, start, whole, tmp_path, fault):
    """--max-restarts 3: one rank dies, torchrun restarts all ranks, and they resume from the last checkpoint."""
    folder = shutil.copytree(data["torchvision"], tmp_path / "data")
    common, out = options({"torchvision": folder}, "torchvision", epochs=10), tmp_path / "out"
    expected = whole(*common)
    job = start(*common, "-c", out, torchrun=True, launcher=("--max-restarts=3",))
    until(lambda: not job.running or last_line(out).get("global_step", 0) >= 5)
    if fault == "killed":
        job.ranks()[1].kill()
    elif fault == "out of memory":
        job.ranks()[1].rlimit(9, (1, 1))  # RLIMIT_AS: every further allocation fails
    else:
        victim = sorted((folder / "train").rglob("*.JPEG"))[5]
        content = victim.read_bytes()
        victim.write_bytes(content[: len(content) // 2])
        until(lambda: not job.running or "does not decode" in job.output)
        victim.write_bytes(content)
    assert job.wait() == [0], job.output
    assert job.output.count("going on from") >= 1, job.output
    same_bits(out, expected)
    assert read(out, "status.json")["state"] == "finished"
