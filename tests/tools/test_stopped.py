"""What a program says when its user stops it by Ctrl-C: one line, and exit code 130."""

import os
import re
import signal
import subprocess
import sys

import torch

import dcd
from tests.helpers import MODEL, ROOT, environment

PROGRAMS = [path for path in sorted((ROOT / "tools").glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


def stop(command: list[str], ready: str) -> tuple[int, str]:
    """Start it, send it and all that it has started Ctrl-C's signal once it prints this; exit code and errors."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **pipes)
    for line in process.stdout:
        if ready in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_every_program_ends_by_what_says_so():
    assert len(PROGRAMS) > 10
    for path in (*PROGRAMS, ROOT / "train_dist.py"):
        main = path.read_text().partition('if __name__ == "__main__":\n')[2]
        assert re.search(r"^    (parse\(main\)|with errors_in_one_line\(\):)$", main, re.MULTILINE), path


def test_a_program_that_is_stopped():
    script = """
import time
from training.command_line import parse
def main() -> None:
    print("ready", flush=True)
    time.sleep(60)
parse(main)
"""
    assert stop([sys.executable, "-c", script], "ready") == (130, "error: stopped\n")


def test_an_evaluation_that_is_stopped(digits, tmp_path):
    """In the middle of its images, with the processes that load them; a file of before stays."""
    _, arch, *_ = MODEL.split()
    torch.save(
        {"state_dict": dcd.create_model(arch, 10, width_mult=0.1, fc_squeeze=16).state_dict()}, tmp_path / "a.pth"
    )
    (tmp_path / "figures.json").write_text("old")
    options = f"{MODEL} -b 1 -j 2 --backend torchvision --amp off --json {tmp_path}/figures.json".split()
    command = [sys.executable, "-m", "tools.evaluate", str(tmp_path / "a.pth"), str(digits), *options]
    assert stop(command, "world size 1") == (130, "error: stopped\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "figures.json"]
    assert (tmp_path / "figures.json").read_text() == "old"
