"""Ranks of Slurm's tasks."""

import pytest

from training.slurm import rank_variables

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[03-04,9]",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_task_of_a_step_is_a_rank():
    found = rank_variables(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "8",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
    }
    assert 1024 < port < 65536 and rank_variables({**STEP, "SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    given = rank_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("a-b[1-2]x,c", "a-b1x"), ("g[007]", "g007")]
)
def test_the_first_host(nodes, first):
    assert rank_variables({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_batch_script_is_one_process():
    """Its variables speak of the whole job, but it is no step of it."""
    assert rank_variables({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}
    assert rank_variables({}) == {}
