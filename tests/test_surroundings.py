"""Where a run finds little: small shared memory, no home, odd paths. Real processes."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_train_dist import SMALL, command, error_lines, tiny  # noqa: F401 (a fixture)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def with_shared_memory(size: str, *args, ranks: int | None = None) -> subprocess.Popen:
    """train_dist.py where /dev/shm has that size."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("the kernel lets this user mount no tmpfs in a namespace of its own")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*prefix, *command(*args, ranks=ranks)], text=True, env=ENVIRONMENT, **pipes)


def output_of(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, output
    return output


ADVICE = ("--shm-size=64m", "--ipc=host", "-j 0", "make dataset")


def test_shared_memory_that_is_too_small_is_said_at_the_start(tiny, tmp_path):  # noqa: F811
    args = [*SMALL, "--input-size", 128, "-d", tiny, "-c", tmp_path, "-b", 12]
    output = output_of(with_shared_memory("1m", *args, ranks=2))
    found = error_lines(output)
    # 6 images of 128 pixels in a batch; the evaluation has two of them
    assert found and all(
        "/dev/shm has 1.0 MiB free of 1.0 MiB" in line
        and "need 1.1 MiB (2 batches of 0.3 MiB for each of 2 ranks)" in line
        for line in found
    )
    assert all(word in line for line in found for word in ADVICE)
    assert "going on" not in output and "images/s" not in output and output.count("Traceback") == 1, "torchrun's own"


def test_shared_memory_that_others_fill_ends_the_run_with_the_same_line(tiny, tmp_path):  # noqa: F811
    process = with_shared_memory(
        "4m", *SMALL, "--input-size", 96, "-d", tiny, "-c", tmp_path, "-b", 12, "--epochs", 500
    )
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 100
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    shared = Path(f"/proc/{process.pid}/root/dev/shm")
    with pytest.raises(OSError, match="No space left"), open(shared / "theirs", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    output = output_of(process)
    (line,) = error_lines(output)
    assert "shared memory has run out: /dev/shm has 0." in line and all(word in line for word in ADVICE)
    assert "it can go on from" in output and "Traceback" not in output
