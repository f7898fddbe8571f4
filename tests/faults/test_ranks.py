"""Other numbers of ranks, ranks that hang, machines that lose their connection, and ranks that Slurm starts."""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.faults.conftest import needs_root, options, same_bits
from tests.faults.test_killed import last_line
from tests.helpers import ROOT, SMALL, error_lines, last, read
from tests.processes import free_port, start_command, until

ONE_STEP = "--stop-after-steps", 1


@pytest.mark.parametrize(("ranks", "parts"), [(2, 2), (1, 4)])
def test_going_on_with_fewer_ranks(data, start, tmp_path, ranks, parts):
    """From a checkpoint of 4 ranks, fewer ranks that accumulate gradients over more parts get the same gradients.

    Only one step is compared. The gradients of this small network, whose last maps are single pixels, grow to a norm of
    a thousand, so the next step multiplies rounding differences by a thousand.
    """
    common = [*SMALL, "-b", 24, "--epochs", 4, "-d", data["ffcv"], "--mixup", 0.4, "--lr", 0.01]
    four, fewer = tmp_path / "four", tmp_path / "fewer"
    assert set(start(*common, "-c", four, "--stop-after-steps", 5, ranks=4).wait()) == {0}
    shutil.copytree(four, fewer)
    assert set(start(*common, "-c", four, *ONE_STEP, ranks=4).wait()) == {0}
    job = start(*common, "-c", fewer, *ONE_STEP, "--accumulate", parts, ranks=ranks, output="fewer.txt")
    assert set(job.wait()) == {0} and "going on from" in job.output, job.output
    found, expected = last(fewer), last(four)
    assert (found["epoch"], found["step"]) == (expected["epoch"], expected["step"]) == (2, 2)
    for name, value in expected["model"].items():
        if "running" not in name and "tracked" not in name:  # each rank has its own statistics
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-6)


def test_going_on_with_three_ranks(data, start, tmp_path):
    """Three ranks, and one rank that accumulates over three parts, both from a checkpoint of four ranks."""
    common = [*SMALL, "-b", 24, "--epochs", 4, "-d", data["ffcv"], "--lr", 0.01]
    assert set(start(*common, "-c", tmp_path / "three", "--stop-after-steps", 5, ranks=4).wait()) == {0}
    shutil.copytree(tmp_path / "three", tmp_path / "one")
    assert set(start(*common, "-c", tmp_path / "three", *ONE_STEP, ranks=3).wait()) == {0}
    assert set(start(*common, "-c", tmp_path / "one", *ONE_STEP, "--accumulate", 3, ranks=1).wait()) == {0}
    found, expected = last(tmp_path / "three"), last(tmp_path / "one")
    for name, value in expected["model"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("halted", [0, 1])
def test_a_rank_that_hangs_is_named(data, start, whole, tmp_path, halted):
    common, out = [*options(data, "ffcv", epochs=20), "--timeout", 12], tmp_path / "out"
    job = start(*common, "-c", out)
    until(lambda: not job.running or last_line(out).get("global_step", 0) >= 5)
    before = time.monotonic()
    job.signal(signal.SIGSTOP, halted)
    until(lambda: job.running and job.codes[1 - halted] is not None, 40)
    assert time.monotonic() - before < 25 and job.codes[1 - halted] == 1
    (line,) = error_lines(job.output)
    # Rank 0 holds the store: if rank 0 is halted, no other rank can read it.
    named = (
        rf"rank {halted} is silent .step \d+, " if halted else "where the ranks meet is out of reach|rank 0 is silent"
    )
    assert "no progress for" in line and re.search(named, line), line
    job.signal(signal.SIGKILL, halted)
    job.wait(10)
    expected = whole(*common)
    assert set(start(*common, "-c", out).wait()) == {0}
    same_bits(out, expected)


def test_srun_without_torchrun(data, warm, tmp_path):
    """Slurm's variables, as `srun -n 2` sets them on one machine."""
    job_id = free_port() % 1000
    envs = [
        {
            "SLURM_JOB_ID": str(job_id),
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "localhost",
        }
        for rank in range(2)
    ]
    args = [*SMALL, "-b", 12, "--epochs", 1, "-d", data["ffcv"], "-c", tmp_path / "out"]
    job = warm.start(*args, ranks=2, envs=envs, output=tmp_path / "log.txt")
    assert job.wait() == [0, 0], job.output
    assert read(tmp_path / "out", "config.json")["world_size"] == 2


# --- two machines ---

NODES = {"dcd-a": "10.213.7.1", "dcd-b": "10.213.7.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them."""
    needs_root("ip", "netns", "list")
    first, second = NODES
    for name in NODES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in NODES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield list(NODES)
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_that_lose_each_other(data, whole, two_machines, tmp_path):
    """One rank on each. The cable is cut: both report an error within --timeout. Restarted, they resume."""
    timeout = 12
    common, out = [*options(data, "ffcv", epochs=20), "--timeout", timeout], tmp_path / "out"
    expected = whole(*common)

    def start(run: str):
        port, jobs = free_port(), []
        for number, name in enumerate(two_machines):
            launcher = [
                f"--nnodes=2 --nproc-per-node=1 --node-rank={number}",
                f"--master-addr={NODES[two_machines[0]]}",
            ]
            words = " ".join([*launcher, f"--master-port={port}"]).split()
            script = [str(ROOT / "train_dist.py"), *map(str, common), "-c", str(out)]
            enter = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            log = tmp_path / f"{run}-{number}.txt"
            jobs.append(start_command([*enter, *words, *script], log, GLOO_SOCKET_IFNAME="cable"))
        return jobs

    jobs = start("cut")
    try:
        until(lambda: not all(job.running for job in jobs) or last_line(out).get("global_step", 0) >= 5)
        before = time.monotonic()
        ip("-n", two_machines[1], "link", "set", "cable", "down")
        until(lambda: all("error: " in job.output for job in jobs), timeout + 15)
        assert time.monotonic() - before < timeout + 10
        for rank, job in enumerate(jobs):
            assert any(line.startswith(f"rank {rank}: error: ") for line in job.output.splitlines()), job.output
        # torchrun on the second machine still waits for the first one, which it cannot reach
        for job in jobs:
            job.end()
        ip("-n", two_machines[1], "link", "set", "cable", "up")
        jobs = start("again")
        assert [job.wait() for job in jobs] == [[0], [0]], jobs[0].output + jobs[1].output
    finally:
        for job in jobs:
            job.end()
    assert "going on from" in jobs[0].output
    same_bits(out, expected)
