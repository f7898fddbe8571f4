"""A wheel, built and installed into an environment of its own: one name, its commands, and the library in it."""

import configparser
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dcd
from dcd.layers import available_paths
from pipelines import native_library
from tests.helpers import ROOT, SMALL, read
from tests.jpegs import smooth

PARTS = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "train_dist.py"]
PARTS += ["dcd", "pipelines", "training", "tools"]


def call(*command, **options) -> str:
    """Standard output and error together of a command that ends well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what a build leaves in the checkout could be in the next wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source / "out"), str(source)]
    call(sys.executable, "-m", "pip", "wheel", *options, env={**os.environ, "DCD_PREBUILT": "1"})
    (found,) = (source / "out").iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel. Torch and the others are those of this environment."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", str(environment))
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--ignore-installed"]
    call(*pip, str(wheel))
    return environment / "bin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A working folder with packages of the same names as ours, none of which may be imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("tools", "training", "pipelines", "benchmarks"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise AssertionError('another package of this name')\n")
    (folder / "train_dist.py").write_text("raise AssertionError('another module of this name')\n")
    return folder


@pytest.fixture
def environment(installed, elsewhere, tmp_path) -> dict[str, str]:
    """Of a process in which nothing can be compiled."""
    path = f"{installed}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(elsewhere), "CXX": "/nowhere/g++", "XDG_CACHE_HOME": str(tmp_path)}
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def test_a_wheel_has_one_name_and_all_modules(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"dcd"}
    modules = set()
    for room in ("dcd", "pipelines", "training", "tools"):
        found = [path for pattern in ("*.py", "*.cpp", "*.h") for path in (ROOT / room).rglob(pattern)]
        modules |= {f"{'' if room == 'dcd' else 'dcd/app/'}{path.relative_to(ROOT)}" for path in found}
    libraries = {"dcd/app/pipelines/native/native.so"}
    libraries |= {"dcd/native/avx512.so"} if platform.machine() == "x86_64" else set()
    assert names == modules | {"dcd/app/train_dist.py"} | libraries
    assert re.fullmatch(rf"dcd_trainer-{dcd.__version__}-py3-none-linux_\w+\.whl", wheel.name)


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {dcd.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_program_has_a_command(wheel):
    """A line of pyproject.toml, `dcd-NAME = "dcd.launch:tools.NAME"`."""
    commands = configparser.ConfigParser()
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")]
    commands.read_string(zipfile.ZipFile(wheel).read(name).decode())
    programs = {path for path in (ROOT / "tools").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    wanted = {f"dcd.launch:tools.{path.stem}" for path in programs} | {"dcd.launch:train_dist"}
    assert sorted(commands["console_scripts"].values()) == sorted(wanted)


def test_two_ranks_of_an_installed_package_train_on_images(installed, environment, elsewhere, tiny, tmp_path):
    """By torchrun, with loading processes and the library in the wheel, among packages of the same names."""
    data = ["-d", tiny, "--backend", "torchvision", "-b", "12", "--epochs", "1", "-c", tmp_path / "out"]
    torchrun = [installed / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = call(*map(str, [*torchrun, "--no-python", "dcd-train", *SMALL, *data]), env=environment, cwd=elsewhere)
    assert "note:" not in output and not list(tmp_path.glob("dcd/native-*"))
    config = read(tmp_path / "out", "config.json")
    assert read(tmp_path / "out", "status.json")["state"] == "finished" and config["world_size"] == 2
    assert config["versions"]["dcd"] == dcd.__version__ and config["git_commit"] is None
    assert Path(config["command"][0]).name == "dcd-train"


def test_a_command_of_tools_runs_by_its_name(environment, elsewhere, tmp_path):
    output = call("dcd-check-dataset", "--help", env=environment, cwd=elsewhere)
    assert re.match(r"usage: \S*dcd-check-dataset ", output)


def test_without_the_extra_a_command_names_it(installed, environment, elsewhere):
    script = "import sys; sys.modules['tyro'] = None; sys.argv = ['dcd-train']; import dcd.launch as a; a.train_dist()"
    options = {"env": environment, "cwd": elsewhere, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([installed / "python", "-c", script], **options)
    assert (done.returncode, done.stderr) == (1, "error: dcd-train needs tyro: pip install 'dcd-trainer[train]'\n")


DECODE = """
import sys, numpy as np, dcd.launch
sys.path.insert(0, str(dcd.launch.folder()))
from pipelines import native
pixels = np.empty((1, 24, 24, 3), np.float32)
data = np.fromfile(sys.argv[1], np.uint8)
job = np.zeros(1, native.JOB)
job["data"], job["size"], job["image_size"], job["box"] = data.ctypes.data, data.size, (67, 81), (3, 5, 50, 61)
native.render(job, pixels, 1, exact=False)
pixels.tofile(sys.argv[2])
"""


def test_the_library_in_a_wheel_is_used_where_it_fits(installed, environment, elsewhere, tmp_path):
    """Else one is compiled, which gives the same pixels."""
    Image.fromarray(smooth(67, 81, step=8)).save(tmp_path / "image.jpg", quality=80)
    command = [str(installed / "python"), "-c", DECODE, str(tmp_path / "image.jpg")]
    assert call(*command, str(tmp_path / "prebuilt"), env=environment, cwd=elsewhere) == ""
    assert not list(tmp_path.glob("dcd/native-*"))

    (library,) = installed.parent.glob("lib/python*/site-packages/dcd/app/pipelines/native/native.so")
    whole = library.read_bytes()
    library.write_bytes(b"of another kind of machine, for instance")
    del environment["CXX"]
    output = call(*command, str(tmp_path / "compiled"), env=environment, cwd=elsewhere)
    library.write_bytes(whole)
    assert output.startswith("note: the installed decoder does not fit (") and len(output.splitlines()) == 1
    assert len(list(tmp_path.glob("dcd/native-*.so"))) == 1
    assert (tmp_path / "prebuilt").read_bytes() == (tmp_path / "compiled").read_bytes()
    assert np.fromfile(tmp_path / "compiled", np.float32).std() > 1


def test_the_kernels_in_a_wheel_are_used_without_a_compiler(installed, environment, elsewhere, tmp_path):
    code = "import torch; from dcd.layers import available_paths; print(available_paths(torch.device('cpu')))"
    output = call(str(installed / "python"), "-c", code, env=environment, cwd=elsewhere)
    assert output == f"{available_paths(torch.device('cpu'))}\n"
    assert not list(tmp_path.glob("dcd/avx512-*"))


def test_a_library_for_another_processor_is_not_loaded(monkeypatch, tmp_path, capsys):
    """It would end the process by SIGILL."""
    monkeypatch.setattr(native_library, "PREBUILT", tmp_path / "native.so")
    (tmp_path / "native.so").write_bytes(b"")
    monkeypatch.setattr(native_library, "NEEDED", {"avx2048"})
    native_library.load_library()
    assert "does not fit (this processor has no avx2048): one is compiled" in capsys.readouterr().err
    monkeypatch.setenv("DCD_PREBUILT", "0")
    native_library.load_library()
    assert capsys.readouterr().err == ""
