"""Test and measure on a GPU everything that needs one, in under nine minutes, unattended.

    make gpu-check OUT=folder                       or: python -m benchmarks.gpu_check folder
    python -m benchmarks.gpu_check folder --rehearse     tiny, on a CPU: whether it works; its figures mean nothing

It needs PyTorch with CUDA, torchvision, Triton and pytest, but no installation of this project. If anything else is
missing, its rows are skipped, and the report says so. The results are OUT/gpu_check.md, to be read, and
OUT/gpu_check.json, the same with all digits; both are rewritten after each section. Each section has a process of its
own and a time limit, so a section that hangs or crashes does not stop the others.

The exit code is 1 if a test or a measurement failed; a target that was missed is not a failure.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.record import Findings
from tools.profiling.machine import describe_machine
from tools.profiling.report import markdown_table
from training.command_line import path

ROOT = Path(__file__).parents[1]
TITLES = {
    "correctness": "Correctness",
    "compiling": "Compilation",
    "networks": "Models",
    "layers": "Roofline of the layers",
    "loaders": "Loaders",
    "timeline": "Where the time goes",
}
# Time limits in seconds; sections on one line run at the same time.
SECTIONS = (
    {"correctness": 130, "compiling": 130},
    {"networks": 240},
    {"layers": 45},
    {"loaders": 80},
    {"timeline": 30},
)
LIMIT_S = 530  # for all of them


class Section:
    """A section that is running in a process group of its own."""

    def __init__(self, name: str, folder: Path, seconds: float, rehearsal: bool):
        self.name, self._file = name, folder / f"{name}.json"
        self._deadline = time.monotonic() + seconds
        # The section stops itself a little earlier, so that its findings are complete.
        command = [sys.executable, "-m", "benchmarks.gpu", name, TITLES[name], str(self._file), str(seconds - 5)]
        command += ["--rehearse"] if rehearsal else []
        self._process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    def findings(self) -> Findings:
        """The findings, after waiting for the end of the section or its time limit."""
        why = None
        try:
            code = self._process.wait(max(0.1, self._deadline - time.monotonic()))
            why = f"ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            why = "cut off at its time limit"
        self.stop()
        found = Findings.read(self._file) if self._file.exists() else Findings(self.name)
        if why:
            found.failed.append(f"{self.name}: {why}")
        return found

    def stop(self) -> None:
        """Kill the section and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def check(names: list[str], rehearsal: bool) -> Iterator[Findings]:
    """Yield the findings of each named section when it is done."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for beside in SECTIONS:
            left = LIMIT_S - (time.monotonic() - start)
            limits = {name: min(seconds, left) for name, seconds in beside.items() if name in names}
            running = [Section(name, Path(folder), seconds, rehearsal) for name, seconds in limits.items()]
            try:
                for section in running:
                    yield section.findings()
            finally:
                for section in running:
                    section.stop()


def report(machine: dict[str, str], found: list[Findings], seconds: float, rehearsal: bool) -> str:
    """All findings in Markdown."""
    parts = ["# GPU check"]
    if rehearsal:
        parts.append("**A rehearsal, tiny and on a CPU: no figure below means anything.**")
    parts.append(", ".join(f"{name} {value}" for name, value in machine.items()) + f"; {seconds:.0f} s.")
    targets = [target for section in found for target in section.targets]
    if targets and not rehearsal:
        rows = [(target.what, target.wanted, target.found, target.verdict) for target in targets]
        parts.append(markdown_table(("figure", "to reach", "found", ""), rows))
    failed = [what for section in found for what in section.failed]
    parts.append("\n".join(["**Failed:**", "", *(f"- {what}" for what in failed)]) if failed else "Nothing failed.")
    for section in found:
        parts += [f"## {section.title}", *section.sentences]
        for table in section.tables:
            if table.rows:
                parts += [f"**{table.title}**", markdown_table(table.columns, table.rows)]
        notes = [*(f"- skipped: {what}" for what in section.skipped), *(f"- failed: {what}" for what in section.failed)]
        parts += ["\n".join(notes)] if notes else []
        parts.append(f"({section.seconds:.0f} s)")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    known = [name for beside in SECTIONS for name in beside]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=path, help="folder for gpu_check.md and gpu_check.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU: whether it works")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="SECTION", help=", ".join(known))
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here: check the driver and PyTorch's CUDA build, or use --rehearse")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {error}: name a folder that can be written to")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no section outlives this process
    start, machine = time.monotonic(), describe_machine(torch.device("cpu" if options.rehearse else "cuda"))
    found: list[Findings] = []
    for findings in check(options.only, options.rehearse):
        found.append(findings)
        seconds = time.monotonic() - start
        text = report(machine, found, seconds, options.rehearse)
        sections = [asdict(section) for section in found]
        content = {"machine": machine, "rehearsal": options.rehearse, "seconds": seconds, "sections": sections}
        (options.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "gpu_check.md").write_text(text)
    print(text, end="")
    if any(section.failed for section in found):
        sys.exit("error: something failed, see above")


if __name__ == "__main__":
    main()
