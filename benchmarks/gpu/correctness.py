"""Check the results: the tests marked `gpu`, and compute-sanitizer over the kernels."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]
WORKERS = 6  # tests at a time; most of them wait for a compiler
SANITIZED = ["tests/dcd/test_triton.py", "tests/dcd/test_triton_matrices.py", "-q", "-x", "-k"]
SANITIZED += ["triton-3x3 or positions or zeros or kernels_of_the_images"]
SUMMARY = ("-rfEs", "--continue-on-collection-errors")  # a missing package in one file does not stop the others
ENVIRONMENT = {**os.environ, "COLUMNS": "200"}  # wide lines, in which pytest says why a test failed


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Run both at the same time, since neither measures times."""
    files = ["tests/dcd/test_triton.py", "-k", "positions"] if rehearsal else files_marked("gpu")
    several = ["-n", str(WORKERS)] if find_spec("xdist") and not rehearsal else []
    marked = "not gpu" if rehearsal else "gpu"
    command = [sys.executable, "-m", "pytest", *files, "-m", marked, "-q", *SUMMARY, *several]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    tests = subprocess.Popen(command, cwd=ROOT, **pipes)
    with record.part("compute-sanitizer"):
        sanitize(record)
    try:
        output, _ = tests.communicate(timeout=max(1, record.seconds_left - 14))
    except subprocess.TimeoutExpired:
        record.fail("tests marked gpu", "out of time")
        tests.send_signal(signal.SIGINT)  # then pytest reports the finished tests
        try:
            output, _ = tests.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            tests.kill()
            output, _ = tests.communicate()
    read_summary(record, output)


def files_marked(marker: str) -> list[str]:
    """The test files that use a marker. The others may import packages that are not installed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if f"mark.{marker}" in file.read_text()]


def read_summary(record: Record, output: str) -> None:
    """Record the counts and each failed or skipped test, from the end of pytest's output (`-q` and `SUMMARY`)."""
    lines = output.strip().splitlines() or ["no output"]
    for line in lines:
        outcome, _, what = line.partition(" ")
        if outcome in ("FAILED", "ERROR"):
            record.fail(*(what.split(" - ", 1) if " - " in what else (what, outcome.lower())))
        if outcome == "SKIPPED":
            record.skip("tests", what)
    if " passed" in lines[-1]:
        record.say(f"Tests marked gpu: {lines[-1].strip('= ')}.")
    else:
        record.fail("tests marked gpu", f"none passed: {lines[-1]}")


def sanitize(record: Record) -> None:
    """Look for reads and writes out of bounds in some of the tests of the Triton kernels."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        record.skip("compute-sanitizer", "it is not installed here")
        return
    command = [program, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m", "pytest", *SANITIZED]
    # Without PyTorch's cache each tensor is an allocation of its own, with known bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = max(1, record.seconds_left - 40)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        record.skip("compute-sanitizer", "out of time")
        return
    words = ("ERROR SUMMARY", "passed", "Error")
    lines = [line.strip("= ") for line in done.stdout.splitlines() if any(word in line for word in words)]
    verdict = "; ".join(lines[-4:])
    if done.returncode:
        record.fail("compute-sanitizer", f"exit code {done.returncode}: {verdict}")
    else:
        record.say(f"compute-sanitizer (memcheck) over the Triton kernels: {verdict}.")
