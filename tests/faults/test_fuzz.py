"""Files that a fuzzer changes: a short run of tests/fuzz/run.py."""

import os
import subprocess
import sys


def test_twenty_seconds_of_fuzzing_find_nothing(tmp_path, root):
    command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", "20", "--folder", tmp_path]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "number_of_executed_units" in done.stderr and ".beton files, of which" in done.stdout


def test_without_clang_the_error_names_the_package(tmp_path, root):
    command = [sys.executable, "-m", "tests.fuzz.run", "--folder", tmp_path]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("apt-get install clang libclang-rt-14-dev")
