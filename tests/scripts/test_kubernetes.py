"""scripts/kubernetes/pytorchjob.yaml: what it must name, and its command with what the operator sets, run here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, SMALL, environment, read
from tests.processes import free_port


@pytest.fixture
def job() -> dict:
    """What Kubernetes is given: YAML's anchors are resolved before it is sent."""
    return yaml.safe_load((ROOT / "scripts" / "kubernetes" / "pytorchjob.yaml").read_text())["spec"]


def containers(job: dict) -> list[dict]:
    """The container of each replica, master first."""
    replicas = job["pytorchReplicaSpecs"]
    found = []
    for kind in ("Master", "Worker"):
        (container,) = replicas[kind]["template"]["spec"]["containers"]
        found += [container] * replicas[kind]["replicas"]
    return found


def test_every_machine_has_gpus_shared_memory_and_time_for_a_checkpoint(job):
    for kind, replica in job["pytorchReplicaSpecs"].items():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", kind
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["nprocPerNode"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert all("persistentVolumeClaim" in mounts[path] for path in ("/data", "/output"))
        assert replica["restartPolicy"] == "OnFailure" and pod["terminationGracePeriodSeconds"] > 30 + 10
        assert set(mounts) - {"/dev/shm"} <= set(container["args"])


def test_its_command_trains_with_the_operators_variables(job, tiny, tmp_path):
    """One rank in a pod; only the paths are of this machine."""
    pods = containers(job)
    out, port, command = tmp_path / "out", str(free_port()), tmp_path / "bin" / "dcd-train"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom dcd.launch import train_dist\ntrain_dist()\n")  # as pip writes it
    command.chmod(0o755)
    paths = {"/data": str(tiny), "/output": str(out)}
    started = []
    for number, pod in enumerate(pods):
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(len(pods)),
            "RANK": str(number),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
            "PET_NNODES": str(len(pods)),
            "PET_NODE_RANK": str(number),
            "PET_NPROC_PER_NODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
        }
        words = [paths.get(word, word) for word in [*pod["command"], *pod["args"]]]
        words += [*SMALL, "--mixup", "0", "-b", "12", "--stop-after-steps", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(words, env={**environment(), **variables}, cwd=tmp_path, **pipes))
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    config = read(out, "config.json")
    assert config["world_size"] == 2 and config["config"]["data"] == str(tiny), outputs
    assert read(out, "status.json")["state"] == "stopped"
    assert Path(config["command"][0]).name == "dcd-train"
