"""Fixtures of the long tests, which run only with `-m faults` (make test-faults)."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import SMALL, difference, last, part_of
from tests.pipelines.helpers import converted
from tests.processes import WarmPython, warm_python

HERE = Path(__file__).parent
EVERYTHING = ["--dropout", 0.2, "--mixup", 0.4, "--mixup-epochs", 1, "--ema", 0.9, "--clip-grad", 1.0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests of this folder, and deselect them unless `-m` names the marker."""
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.faults)
    if "faults" not in config.option.markexpr:
        items[:] = [item for item in items if item not in ours]
        config.hook.pytest_deselected(items=ours)


@pytest.fixture(scope="session")
def data(digits, tmp_path_factory) -> dict[str, Path]:
    """{backend: the folder that it reads}: 48 images to train and 23 to evaluate."""
    root = tmp_path_factory.mktemp("faults")
    folder = part_of(digits, root / "folder", {"train": [16, 16, 16], "val": [8, 8, 7]})
    beton = converted(folder, root / "beton")
    return {"torchvision": folder, "ffcv": beton, "dali": beton}


@pytest.fixture(scope="session")
def warm() -> WarmPython:
    return warm_python()


@pytest.fixture
def whole(data, start, tmp_path_factory) -> Callable[..., dict]:
    """A function that runs an undisturbed training to its end, and returns its last checkpoint."""

    def whole(*args, ranks: int = 2) -> dict:
        out = tmp_path_factory.mktemp("whole")
        job = start(*args, "-c", out, ranks=ranks, output="whole.txt")
        assert set(job.wait()) == {0}, job.output
        return last(out)

    return whole


def options(data: dict[str, Path], backend: str, epochs: int, precision: str = "off") -> list:
    """Options of a small training that uses everything random, and logs and saves every step."""
    every = ["-p", 1, "--checkpoint-steps", 1, "--amp", precision, "--epochs", epochs]
    return [*SMALL, *EVERYTHING, "-b", 12, "--backend", backend, "-d", data[backend], *every]


def same_bits(out: Path, expected: dict) -> None:
    """Assert that the last checkpoint of `out` equals `expected`, except for the options."""
    found = last(out)
    assert difference({**found, "config": None}, {**expected, "config": None}) == []


def needs_root(*words: str) -> None:
    """Skip, with the reason, if this machine does not allow mounts or network namespaces."""
    done = subprocess.run(words, capture_output=True, text=True) if shutil.which(words[0]) else None
    if os.geteuid() or done is None or done.returncode:
        pytest.skip(f"not permitted or not installed: {' '.join(words)} {done.stderr.strip() if done else ''}")
