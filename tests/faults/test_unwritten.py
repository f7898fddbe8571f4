"""No pixel comes from uninitialised memory, whatever the chroma sampling of a JPEG."""

import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import jpegs
from tests.fuzz.inputs import EXACT, FLIP, FLOATS, RAW, native_input

PROGRAM = Path(__file__).parents[1] / "fuzz" / "native_input.cpp"
SIZE = (150, 210)  # of the images under valgrind, which is 50 times as slow
BOXES = [(0, 0, 150, 210), (5, 60, 144, 144), (1, 3, 144, 146), (6, 50, 40, 36), (149, 209, 1, 1)]

# valgrind does not know AVX-512, so the program is compiled without -march=native. For valgrind each result of
# libjpeg's pmaddwd depends on two pixels, so libjpeg runs without vector instructions here. The test of two processes
# uses vectors.
ENVIRONMENT = {**os.environ, "JSIMD_FORCENONE": "1"}

# Renders the JPEGs in the file argv[1] and writes the pixels to argv[2]; a process of its own, with its environment.
RENDER = """
import pickle, sys
from pathlib import Path
import numpy as np
from pipelines import native

pixels = []
for data, box, side, exact in pickle.loads(Path(sys.argv[1]).read_bytes()):
    jobs, images = np.zeros(1, native.JOB), np.empty((1, side, side, 3), np.uint8)
    jobs["data"], jobs["size"], jobs["image_size"], jobs["box"] = data.ctypes.data, data.nbytes, (300, 420), box
    native.render(jobs, images, 1, exact)
    pixels.append(images.tobytes())
Path(sys.argv[2]).write_bytes(b"".join(pixels))
"""


def every_sampling():
    """All combinations of these sampling factors that libjpeg can write."""
    factors = list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4)))
    chroma = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
    for sampling in itertools.product(factors, chroma, chroma[:4]):
        try:
            jpegs.write(np.zeros((8, 8, 3), np.uint8), sampling)
        except ValueError:
            continue
        yield sampling


def test_the_same_pixels_whatever_memory_held_before(tmp_path, root):
    """Every sampling at every scale, with and without columns cut away; new memory is filled with 1, then with 200."""
    work = []
    for sampling in every_sampling():
        data = jpegs.write(jpegs.smooth(300, 420), sampling)
        for box, shrink in itertools.product([(10, 120, 288, 288), (3, 10, 288, 290), (0, 0, 300, 420)], [2, 4, 8]):
            work += [(data, box, 288 // shrink, False)]
        work += [(data, (10, 120, 288, 288), 144, True)]
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    results = []
    for value in ("1", "200"):
        command = [sys.executable, "-c", RENDER, tmp_path / "work", tmp_path / value]
        subprocess.run(command, cwd=root, env={**os.environ, "MALLOC_PERTURB_": value}, check=True)
        results.append(np.fromfile(tmp_path / value, np.uint8))
    assert len(results[0]) == sum(3 * side**2 for _, _, side, _ in work)
    np.testing.assert_array_equal(*results)


@pytest.fixture(scope="module")
def valgrind(tmp_path_factory):
    """A function that runs `native.cpp` under valgrind on inputs, and returns valgrind's report."""
    if shutil.which("valgrind") is None:
        pytest.fail("no valgrind on this machine: apt-get install valgrind")
    folder = tmp_path_factory.mktemp("valgrind")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g", "-pthread", "-DALONE"]
    subprocess.run([*compiler, PROGRAM, "-o", folder / "program", "-ljpeg"], check=True)

    def run(inputs: list[bytes]) -> str:
        paths = [folder / f"{number}" for number in range(len(inputs))]
        for path, data in zip(paths, inputs, strict=True):
            path.write_bytes(data)
        command = ["valgrind", "-q", "--error-exitcode=1", "--track-origins=yes", folder / "program", *paths]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stderr

    return run


@pytest.mark.parametrize("layout", jpegs.LAYOUTS)
def test_no_byte_is_read_that_was_never_written(valgrind, layout):
    data = jpegs.write(jpegs.smooth(*SIZE), jpegs.LAYOUTS[layout]).tobytes()
    ways = itertools.product(BOXES, (0, EXACT), (0, FLOATS | FLIP), (9, 36))
    assert valgrind([native_input(data, box, how + form, side) for box, how, form, side in ways]) == ""


def test_nor_of_progressive_or_raw_or_damaged_images(valgrind):
    pixels = jpegs.smooth(*SIZE)
    whole = jpegs.write(pixels, progressive=True).tobytes()
    files = [whole, whole[: len(whole) // 2], jpegs.write(pixels, arithmetic=True).tobytes(), b""]
    inputs = [native_input(data, BOXES[1], how, side) for data in files for how in (0, EXACT) for side in (9, 64)]
    inputs += [native_input(pixels.tobytes(), box, RAW, size=SIZE) for box in BOXES]
    assert valgrind(inputs) == ""
