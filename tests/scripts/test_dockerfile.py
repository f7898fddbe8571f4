"""scripts/Dockerfile: its commands run as they are, in an environment of their own. The image itself is built by
`make image`, which CI runs where there is a Docker engine.

What the commands would download or install from Debian is here already (`make setup`), so that they find it: only our
own package is built and installed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

from tests.helpers import ROOT

DOCKERFILE = (ROOT / "scripts" / "Dockerfile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
# Instructions, with their continued lines
INSTRUCTIONS = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M), re.M)


def test_it_installs_what_the_extras_name():
    """Of what trains and converts, all but PyTorch's own packages, in the same versions."""
    extras = re.findall(r"^(train|ffcv|convert) = \[(.*?)\](?: *#[^\n]*)?$", PYPROJECT, re.M | re.S)
    wanted = {each for _, text in extras for each in re.findall(r'"(.+?)"', text)}
    wanted -= {each for each in wanted if each.startswith(("torchvision", "dcd-trainer"))}
    assert len(extras) == 3 and set(re.findall(r'"([a-z]+[<>=][^"]+)"', DOCKERFILE)) == wanted


def test_its_commands_run_as_they_are(tmp_path):
    kinds = [kind for kind, _ in INSTRUCTIONS]
    assert kinds == ["ARG", "FROM", "WORKDIR", "COPY", "RUN", "RUN", "RUN", "RUN", "WORKDIR"]
    ignored = (ROOT / "scripts" / "Dockerfile.dockerignore").read_text().splitlines()
    names = [line.removeprefix("**/") for line in ignored if not line.startswith("#")]
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*names))  # COPY . .

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # stand for those of the base
    pip = venv / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {venv / "bin" / "python"} "$@"\n')
    pip.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",  # nothing is downloaded
        "PIP_NO_BUILD_ISOLATION": "0",  # by pip's own logic: no isolation
    }
    environment.pop("PYTHONPATH", None)
    outputs = []
    for kind, command in INSTRUCTIONS:
        if kind == "RUN":
            options = {"shell": True, "cwd": tmp_path / "source", "env": environment, "timeout": 240}
            done = subprocess.run(command, capture_output=True, text=True, **options)
            assert done.returncode == 0, (command, done.stdout + done.stderr)
            outputs.append(done.stdout)
    assert "Successfully installed dcd-trainer" in outputs[2] and "usage: " in outputs[3]
    assert [*packages.glob("dcd/app/pipelines/native/native.so")], "the decoder is compiled into it"
