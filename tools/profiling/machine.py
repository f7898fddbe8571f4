"""What a figure must be read with: machine, versions, command. Needs PyTorch alone."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DALI = "nvidia-dali-cuda120" if (torch.version.cuda or "").startswith("12.") else "nvidia-dali-cuda130"
PACKAGES = ("torch", "torchvision", "triton", "numpy", "ffcv", DALI)


def describe_machine(device: torch.device) -> dict[str, str]:
    """The device, the processor with what it can compute in, versions, commit, command and date."""
    able = torch.cpu.get_capabilities()
    kinds = {"avx512_bf16": "bf16", "amx_bf16": "bf16 matrices (AMX)"}
    more = [kind for name, kind in kinds.items() if able.get(name, False)]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "processor": names[0] if names else platform.machine(),
        "capability": " with ".join([torch.backends.cpu.get_cpu_capability(), *([" and ".join(more)] if more else [])]),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
        found = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}")
        machine |= {"gpu": found or torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    machine |= {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    commit = ""
    if (ROOT / ".git").exists():  # else it is installed: a repository around it is another project's
        commit = output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    return {
        **machine,
        "commit": commit or "unknown",
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def output_of(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def version(package: str) -> str:
    """The version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
