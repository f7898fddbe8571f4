"""Ranks from Slurm's environment: `srun -n 8 python train_dist.py …` needs no torchrun."""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 20_000, 20_000  # below the ports that Linux uses for outgoing connections


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables (RANK, WORLD_SIZE, …) for a task of a job step; empty outside of a job step.

    Outside of srun, as in a batch script, there is no job step: a process is alone, whatever the job has reserved.

    Args:
        environ: of the process; its MASTER_ADDR and MASTER_PORT are kept if set.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    if "SLURM_STEP_ID" not in environ or tasks is None:
        return {}
    on_each_node = _repeated(environ["SLURM_STEP_TASKS_PER_NODE"])
    job = re.sub(r"\D", "", environ["SLURM_JOB_ID"]) or "0"
    # Every task computes the same address; jobs on one machine should have different ports.
    port = FIRST_PORT + (int(job) * 100 + int(re.sub(r"\D", "", environ["SLURM_STEP_ID"]) or 0)) % PORTS
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(on_each_node[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": environ.get("MASTER_ADDR", _first_host(environ["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def _repeated(counts: str) -> list[int]:
    """Slurm's short form of counts, "4(x2),3", written out: [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _first_host(nodes: str) -> str:
    """The first name in Slurm's short form of host names: "gpu[03-05,9],login1" begins with gpu03."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    assert found is not None  # all of it may be empty
    prefix, numbers, suffix = found.groups()
    return f"{prefix}{numbers or ''}{suffix}"
