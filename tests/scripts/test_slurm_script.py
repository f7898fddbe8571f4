"""scripts/slurm.sh with two nodes: stand-ins of Slurm's commands start its tasks on this machine."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, SMALL, lines, read
from tests.pipelines.helpers import converted
from tests.processes import Job, free_port, start_command, until

# Starts a task for each node, with what differs between nodes, and passes signals on to the tasks.
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
job = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
for node in "01":
    disk = os.path.join(os.environ["DISKS"], node)
    os.makedirs(disk, exist_ok=True)
    task = {"SLURM_NODEID": node, "SLURM_PROCID": node, "SLURM_TMPDIR": disk}
    tasks.append(subprocess.Popen(command, env={**os.environ, **job, **task}))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1", "n2", sep="\\n")
else:
    with open(os.environ["ASKED"], "a") as file:
        print(*sys.argv[1:], file=file)
"""
# Instead of torchrun and the ranks: waits for a signal if told to, and says how the run has ended.
TORCHRUN = """
import os, signal, sys
waits, state, code = os.environ["ENDS"].split(",")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
with open(os.environ["STARTED"], "a") as file:
    print("a task", file=file)
if waits == "True":
    signal.sigwait([signal.SIGUSR1, signal.SIGTERM])
if state and os.environ["SLURM_NODEID"] == "0":
    with open(os.path.join(sys.argv[-1], "status.json"), "w") as file:
        file.write('{\\n  "state": "%s",\\n  "time": "later"\\n}' % state)
sys.exit(int(code))
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """What Slurm sets for a batch script on two nodes, and where the stand-ins keep what they are asked."""
    program(tmp_path / "bin" / "srun", SRUN)
    program(tmp_path / "bin" / "scontrol", SCONTROL)
    return {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VENV": str(Path(sys.executable).parents[1]),
        "GPUS": "1",
        "DISKS": str(tmp_path / "disks"),
        "ASKED": str(tmp_path / "asked"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(free_port() % 20_000),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "2",
    }


def submit(slurm: dict[str, str], tmp_path, *args) -> Job:
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *map(str, args)]
    return start_command(command, tmp_path / "log", **slurm)


def asked(tmp_path) -> list[str]:
    """What Slurm has been asked for, besides the names of the nodes."""
    file = tmp_path / "asked"
    return file.read_text().splitlines() if file.exists() else []


def test_a_job_on_two_nodes_is_preempted_and_goes_on(tiny, slurm, tmp_path):
    """The signal goes to the batch script alone, as by --signal=B:USR1, and reaches the ranks of both nodes."""
    data, out = converted(tiny, tmp_path / "imagenet"), tmp_path / "out"
    args = [data, out, *SMALL, "-b", 12, "--epochs", 6, "-p", 1]
    job = submit(slurm, tmp_path, *args)
    until(lambda: not job.running or ((out / "metrics.jsonl").exists() and lines(out, "train")), 240)
    job.signal(signal.SIGUSR1)
    assert job.wait(120) == [75], job.output
    assert read(out, "status.json")["state"] == "preempted"
    assert read(out, "config.json")["world_size"] == 2
    assert job.output.count("the same command goes on from") == 1
    assert job.output.count("copied 5 files, 0.017 GB, to") == 2
    for node in "01":
        assert len([*(tmp_path / "disks" / node).rglob("train.beton")]) == 1
    assert asked(tmp_path) == [f"requeue {slurm['SLURM_JOB_ID']}"]
    before = job.output

    job = submit(slurm, tmp_path, *args)
    assert job.wait(240) == [0], job.output
    after = job.output.removeprefix(before)
    assert after.count("going on from") == 1 and after.count("is there already") == 2
    assert read(out, "status.json")["state"] == "finished"
    assert [line["global_step"] for line in lines(out, "train")] == [*range(1, 25)]
    assert len(asked(tmp_path)) == 1


@pytest.mark.parametrize(
    "number, waits, state, code, is_requeued",
    [
        (signal.SIGUSR1, True, "preempted", 1, True),
        (signal.SIGUSR1, True, "", 1, True),  # before the run could begin
        (signal.SIGUSR1, True, "finished", 0, False),
        (signal.SIGUSR1, True, "failed", 1, False),
        (signal.SIGTERM, True, "preempted", 1, False),  # scancel
        (None, False, "preempted", 1, True),  # only the tasks were signalled
        (None, False, "", 1, False),  # it failed before it began; what is there is of an earlier attempt
        (None, False, "stopped", 0, False),
    ],
)
def test_when_a_job_is_queued_again(number, waits, state, code, is_requeued, slurm, tmp_path):
    program(tmp_path / "venv" / "bin" / "torchrun", TORCHRUN)
    out, started = tmp_path / "out", tmp_path / "started"
    out.mkdir()
    (out / "status.json").write_text('{\n  "state": "preempted",\n  "time": "earlier"\n}')
    ends = {"ENDS": f"{waits},{state},{code}", "STARTED": str(started)}
    job = submit({**slurm, "VENV": str(tmp_path / "venv"), "LOCAL_DISK": "", **ends}, tmp_path, "data", out)
    until(lambda: started.exists() and len(started.read_text().splitlines()) == 2, 20)
    if number == signal.SIGTERM:  # Slurm sends it to the tasks itself; the script sends them nothing
        (srun,) = psutil.Process(job.pids[0]).children()
        job.signal(number)
        srun.send_signal(number)
    elif number:
        job.signal(number)
    assert job.wait(20) == [75 if is_requeued else code], job.output
    assert asked(tmp_path) == ([f"requeue {slurm['SLURM_JOB_ID']}"] if is_requeued else [])
    assert job.output.splitlines()[-1].startswith(f"job {slurm['SLURM_JOB_ID']}: {state or 'not started'}, ")
