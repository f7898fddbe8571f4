"""Whether the results are right: the tests marked `gpu`, and compute-sanitizer over the kernels."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

from tools.gpu.record import Record

ROOT = Path(__file__).parents[2]
WORKERS = 6  # tests at a time: most wait for a compiler
SANITIZED = ["tests/dcd/test_triton.py", "tests/dcd/test_triton_matrices.py", "-q", "-x", "-k"]
SANITIZED += ["triton-3x3 or positions or zeros or kernels_of_the_images"]


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Both at once: neither takes times."""
    marked = "not gpu" if rehearsal else "gpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = ["tests/dcd/test_triton.py", "-k", "positions"] if rehearsal else files_marked("gpu")
        several = ["-n", str(WORKERS)] if find_spec("xdist") and not rehearsal else []
        command = [sys.executable, "-m", "pytest", *files, "-m", marked, "-q", f"--junitxml={report}", *several]
        command += ["--continue-on-collection-errors"]  # one file's missing package is no reason to run no other
        tests = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with record.part("compute-sanitizer"):
            sanitize(record)
        try:
            output, _ = tests.communicate(timeout=max(1, record.seconds_left - 14))
        except subprocess.TimeoutExpired:
            record.fail("tests marked gpu", "out of time")
            tests.send_signal(signal.SIGINT)  # it then reports the tests that are done
            try:
                output, _ = tests.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                tests.kill()
                output, _ = tests.communicate()
        read_report(record, report, output)


def files_marked(marker: str) -> list[str]:
    """The test files that name a marker: the others may import what is not installed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if f"mark.{marker}" in file.read_text()]


def read_report(record: Record, report: Path, output: str) -> None:
    """Counts by file, and each test that failed or was skipped."""
    if not report.exists():
        last = output.strip().splitlines()[-1:] or ["no output"]
        record.fail("tests marked gpu", f"no report: {last[0]}")
        return
    counts: dict[str, dict[str, int]] = {}
    skipped: dict[str, int] = {}
    for file, name, outcome, why in read_cases(report):
        counts.setdefault(file, dict.fromkeys(("passed", "failed", "skipped"), 0))[outcome] += 1
        if outcome == "failed":
            record.fail(f"{file}::{name}", why)
        if outcome == "skipped":
            skipped[f"{file}: {why}"] = skipped.get(f"{file}: {why}", 0) + 1
    table = record.table("Tests marked gpu", "file", "passed", "failed", "skipped")
    for file, count in counts.items():
        record.add(table, file, count["passed"], count["failed"], count["skipped"])
    for why, times in skipped.items():
        record.skip(f"{times} tests", why)
    if not counts:
        record.fail("tests marked gpu", "none was found")


def read_cases(report: Path) -> Iterator[tuple[str, str, str, str]]:
    """(file, test, passed, failed or skipped, why) from pytest's report."""
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        why = "" if bad is None else (bad.get("message") or bad.text or "").strip().splitlines()[0][:200]
        yield case.get("classname", "").replace(".", "/") + ".py", case.get("name", ""), outcome, why


def sanitize(record: Record) -> None:
    """Look for reads and writes out of bounds in some of the tests of the Triton kernels."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        record.skip("compute-sanitizer", "it is not installed here")
        return
    command = [program, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m", "pytest", *SANITIZED]
    # Without PyTorch's cache each tensor is an allocation of its own, so that its bounds are known.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1, record.seconds_left - 40)
        )
    except subprocess.TimeoutExpired:
        record.skip("compute-sanitizer", "out of time")
        return
    lines = [
        line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "passed" in line or "Error" in line
    ]
    verdict = "; ".join(line.strip("= ") for line in lines[-4:])
    if done.returncode:
        record.fail("compute-sanitizer", f"exit code {done.returncode}: {verdict}")
    else:
        record.say(f"compute-sanitizer (memcheck) over the Triton kernels: {verdict}.")
