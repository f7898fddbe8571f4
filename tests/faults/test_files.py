"""Full disks, read-only folders, damaged checkpoints, and two runs in one folder."""

import os
import signal
import subprocess

import pytest

from tests.faults.conftest import needs_root, options, same_bits
from tests.faults.test_killed import last_line
from tests.helpers import error_lines, last
from tests.processes import until


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    needs_root("mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder) -> None:
    """Fill the disk to the last byte."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_full_disk_stops_no_training(data, start, whole, disk):
    """The last good checkpoint stays; when there is room again, the run finishes with the same bits."""
    common, out = options(data, "ffcv", epochs=20), disk / "out"
    expected = whole(*common)
    job = start(*common, "-c", out)
    until(lambda: not job.running or last_line(out).get("global_step", 0) >= 5)
    fill(disk)
    until(lambda: not job.running or "warning: no checkpoint of" in job.output)
    assert job.running, job.output
    kept = last(out)
    good = kept["epoch"] * 4 + kept["step"]
    until(lambda: not job.running or job.output.count("warning: no checkpoint of") >= 4)
    assert job.running and last(out)["step"] == kept["step"] and good >= 4
    (disk / "ballast").unlink()
    assert set(job.wait()) == {0}, job.output
    assert "Traceback" not in job.output
    same_bits(out, expected)


def test_a_run_that_ends_on_a_full_disk_says_so_and_goes_on_later(data, start, whole, disk):
    common, out = options(data, "ffcv", epochs=6), disk / "out"
    expected = whole(*common)
    job = start(*common, "-c", out)
    until(lambda: not job.running or last_line(out).get("global_step", 0) >= 5)
    fill(disk)
    assert job.wait()[0] == 1 and "the last checkpoint was not written" in job.output, job.output
    assert "Traceback" not in job.output, job.output
    (disk / "ballast").unlink()
    assert set(start(*common, "-c", out).wait()) == {0}
    same_bits(out, expected)


def test_a_read_only_folder_is_an_error_before_the_first_step(data, start, disk):
    (disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    job = start(*options(data, "ffcv", epochs=2), "-c", disk / "out")
    assert set(job.wait()) == {1}
    assert any(f"cannot write to {disk / 'out'}" in line for line in error_lines(job.output)), job.output
    assert "epoch 1/2 step" not in job.output and "Traceback" not in job.output


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit at a tenth", "a bit at half", "a bit at nine tenths"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(data, start, whole, tmp_path, damage):
    common, out = options(data, "ffcv", epochs=3), tmp_path / "out"
    assert set(start(*common, "-c", out, "--stop-after-steps", 6).wait()) == {0}
    path = out / "checkpoints" / "last.pth"
    content = bytearray(path.read_bytes())
    if damage.startswith("a bit"):
        share = {"tenth": 0.1, "half": 0.5, "tenths": 0.9}[damage.split()[-1]]
        content[int(share * len(content))] ^= 1
    else:
        content = content[: 0 if damage == "empty" else len(content) * 2 // 3]
    path.write_bytes(content)
    job = start(*common, "-c", out, output="again.txt")
    assert set(job.wait()) == {0}, job.output
    assert f"warning: {path}" in job.output and "last.1.pth: epoch 2, step 1" in job.output, job.output
    same_bits(out, whole(*common))


def test_the_second_run_in_a_folder_leaves_the_first_alone(data, start, whole, tmp_path):
    common, out = options(data, "ffcv", epochs=8), tmp_path / "out"
    first = start(*common, "-c", out)
    until(lambda: not first.running or last_line(out).get("global_step", 0) >= 2)
    first.signal(signal.SIGSTOP)  # halted, so that it exists all the time
    second = start(*common, "-c", out, output="second.txt")
    codes = second.wait(60)
    first.signal(signal.SIGCONT)
    assert set(codes) == {1} and "is in use by another run" in "\n".join(error_lines(second.output)), second.output
    assert "Traceback" not in second.output
    assert set(first.wait()) == {0}, first.output
    same_bits(out, whole(*common))
    assert not os.path.exists(out / "checkpoints" / "last.tmp")
