"""Test and measure on a GPU everything that needs one, in under nine minutes, unattended.

    make gpu-check OUT=folder                       or: python -m benchmarks.gpu_check folder
    python -m benchmarks.gpu_check folder --rehearse     tiny, on a CPU: whether it works; its figures mean nothing

It needs PyTorch with CUDA, torchvision, Triton and pytest, but no installation of this project. If anything else is
missing, its rows are skipped, and the report says so. The results are OUT/gpu_check.md, to be read, and
OUT/gpu_check.json, with all that the programs wrote; both are rewritten after each section. A section has a time limit,
and each program that it runs a process of its own, so one that hangs or crashes does not stop the others.

The exit code is 1 if a test or a measurement failed; a target that was missed is not a failure.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu import sections
from benchmarks.gpu.section import Findings, Section
from tools.profiling.machine import describe_machine
from tools.profiling.report import markdown_table
from training.command_line import path

LIMIT_S = 530  # for all sections
# {section: seconds that are kept for it}. What one leaves over, the next may use.
SECTIONS = {"correctness": 125, "networks": 195, "layers": 50, "loaders": 130, "timeline": 30}


def check(name: str, folder: Path, deadline: float, rehearsal: bool) -> Findings:
    """What one section finds, however far it comes."""
    start, section = time.monotonic(), Section(name.capitalize(), folder, deadline, rehearsal)
    try:
        getattr(sections, name)(section)
    except Exception as error:
        section.fail(name, f"{type(error).__name__}: {error}".splitlines()[0])
    section.found.seconds = time.monotonic() - start
    return section.found


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
        parts += [f"## {section.title}", *section.text]
        notes = [*(f"- skipped: {what}" for what in section.skipped), *(f"- failed: {what}" for what in section.failed)]
        parts += ["\n".join(notes)] if notes else []
        parts.append(f"({section.seconds:.0f} s)")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=path, help="folder for gpu_check.md and gpu_check.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU: whether it works")
    known = list(SECTIONS)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="SECTION", help=", ".join(known))
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here: check the driver and PyTorch's CUDA build, or use --rehearse")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {error}: name a folder that can be written to")
    for number in (signal.SIGTERM, signal.SIGINT):  # so that no program outlives this one
        signal.signal(number, signal.default_int_handler)  # nor ignores what ends it, as in the background of a shell
    start, machine = time.monotonic(), describe_machine(torch.device("cpu" if options.rehearse else "cuda"))
    found: list[Findings] = []
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [name for name in SECTIONS if name in options.only]
        for number, name in enumerate(chosen, 1):
            deadline = start + LIMIT_S - sum(SECTIONS[later] for later in chosen[number:])
            found.append(check(name, Path(folder), deadline, options.rehearse))
            seconds = time.monotonic() - start
            text = report(machine, found, seconds, options.rehearse)
            parts = [asdict(section) for section in found]
            content = {"machine": machine, "rehearsal": options.rehearse, "seconds": seconds, "sections": parts}
            (options.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
            (options.out / "gpu_check.md").write_text(text)
    print(text, end="")
    if any(section.failed for section in found):
        sys.exit("error: something failed, see above")


if __name__ == "__main__":
    main()
