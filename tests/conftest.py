"""Fixtures of every test: an image index of their own, and the sample dataset. Without a GPU, Triton interprets, and
tests marked `gpu` are skipped."""

import os
import signal
from pathlib import Path

import pytest
import torch

from training.precision import autocast_dtype

# A shell has what it starts in the background ignore Ctrl-C's signal, and so does all that the tests start then.
signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # is read when triton is imported
# Is read when Inductor is imported. To find out by itself whether vector instructions work, it compiles a program and
# starts a Python for each kind that the processor says it has.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"


def pytest_report_header() -> str:
    """What the processor can do, on which speed depends, and what --amp auto becomes, but no result of a test."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"processor: {capability}, --amp auto: {autocast_dtype('auto', torch.device('cpu')) or 'off'}"


# Modules of which single tests, or a few with a fixture of theirs, take many seconds.
LONG = {"test_gpu_check", "test_train_dist", "test_documents", "test_export", "test_triton_compiles", "test_models"}
LONG |= {"test_slurm_script", "test_triton_gradients", "test_bench_loader", "test_installed", "test_run_profile"}


def pytest_collection_modifyitems(items):
    """The long ones come first: workers that share out the tests then end together."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Sizes of images and compiled code go to a temporary cache, in this process and in those that it starts.

    Inductor's own would be one for all: what it has compiled beside AVX-512 gives wrong numbers by
    ATEN_CPU_CAPABILITY=avx2.
    """
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The sample dataset: train/ with 1,437 and val/ with 360 images of ten classes."""
    from tools.make_sample import make_sample

    out = tmp_path_factory.mktemp("data") / "digits"
    make_sample(out)
    return out


@pytest.fixture(scope="session")
def tiny(digits, tmp_path_factory) -> Path:
    """A corner of the digits: three classes, 48 images to train and 23 to evaluate, which no 2 or 3 ranks divide."""
    from tests.helpers import part_of  # which imports packages that a machine for `make gpu-check` may lack

    return part_of(digits, tmp_path_factory.mktemp("tiny"), {"train": [16, 16, 16], "val": [8, 8, 7]})


@pytest.fixture
def exact_float32():
    """Convolutions and matrix products of a GPU take float32 as it is, not as TF32."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


@pytest.fixture
def main(capsys, exact_float32):
    """What `train_dist.py` prints, run in this process; the last line is the error where it ends with one."""
    import train_dist
    from training.build import errors_in_one_line

    def call(*args) -> str:
        try:
            with errors_in_one_line():
                train_dist.main([*map(str, args)])
        except SystemExit as error:
            return f"{capsys.readouterr().out}{error.code}"
        return capsys.readouterr().out

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield call
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path):
    """A function that starts a run in the background, which ends with the test. launcher: options of torchrun."""
    from tests.helpers import command
    from tests.processes import Job, start_command, warm_python

    jobs = []

    def start(*args, ranks: int = 2, torchrun: bool = False, launcher=(), output: str = "log.txt") -> Job:
        file = tmp_path / output
        if torchrun:
            jobs.append(start_command(command(*args, ranks=ranks, launcher=[*launcher]), file))
        else:
            jobs.append(warm_python().start(*args, ranks=ranks, output=file))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]
