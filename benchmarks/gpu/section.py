"""A section of `benchmarks.gpu_check`: what it finds, and the programs that it runs within its time."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Inductor compiles in a few threads, not in a process for each core; pytest says why a test failed in wide lines.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "COLUMNS": "200"}
LEAST_S = 5  # a program is not started for less


@dataclass
class Target:
    """A figure to reach or, with `at_most`, not to exceed. found: None if it was not measured."""

    what: str
    wanted: float
    found: float | None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "reached" if (self.found <= self.wanted if self.at_most else self.found >= self.wanted) else "missed"


@dataclass
class Findings:
    """text: paragraphs and tables in Markdown. skipped, failed: what and why. figures: {what: a program's JSON}"""

    title: str
    text: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    figures: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0


class Section:
    """Runs programs, each in a process group of its own, and collects what they find.

    Args:
        folder: for what they write. deadline: when the section must have ended, by `time.monotonic`.
        rehearsal: everything is to be tiny, and on a CPU.
    """

    def __init__(self, title: str, folder: Path, deadline: float, rehearsal: bool):
        self.found, self.folder, self.deadline, self.rehearsal = Findings(title), folder, deadline, rehearsal
        self.device = "cpu" if rehearsal else "cuda"
        self._running: list[subprocess.Popen] = []

    def skip(self, what: str, why: str) -> None:
        self.found.skipped.append(f"{what}: {why}")

    def fail(self, what: str, why: str) -> None:
        self.found.failed.append(f"{what}: {why}")

    def target(self, what: str, wanted: float, found: float | None, at_most: bool = False) -> None:
        self.found.targets.append(Target(what, wanted, found, at_most))

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so much is left; if not, the report names what is skipped."""
        if self.deadline - time.monotonic() >= seconds:
            return True
        self.skip(what, "out of time")
        return False

    def run(self, what: str, command: list[str], optional: bool = False, **environment: str) -> tuple[int | None, str]:
        """The exit code of a command, None if it was cut off or not even started, and its output.

        optional: that it takes longer than there is time is no failure.
        """
        if not self.has_time(what, LEAST_S):
            return None, ""
        print(f"{self.found.title}: {what}", file=sys.stderr, flush=True)
        environment = {**os.environ, **ENVIRONMENT, **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        self._running.append(process)
        try:
            output, _ = process.communicate(timeout=max(0.1, self.deadline - LEAST_S - time.monotonic()))
            return process.returncode, output
        except subprocess.TimeoutExpired:
            (self.skip if optional else self.fail)(what, "cut off at its time limit")
            process.send_signal(signal.SIGINT)  # pytest then reports the finished tests
            with contextlib.suppress(subprocess.TimeoutExpired):
                return None, process.communicate(timeout=LEAST_S - 1)[0]
            return None, ""
        finally:
            kill(process)
            self._running.remove(process)

    def judge(self, what: str, code: int | None, output: str, failures: Iterable[str] = ()) -> None:
        """If a program has failed, the report says why: as it says by itself, or by its last line."""
        last = (output.strip().splitlines() or ["no output"])[-1]
        for failure in failures:  # memory that does not suffice is no failure
            (self.skip if "OutOfMemoryError" in failure else self.fail)(what, failure)
        if code and (missing := re.search(r"No module named '(\w+)", last)):
            self.skip(what, f"{missing[1]} is not installed here")
        elif code and not failures:
            self.fail(what, last.removeprefix("error: ") if code > 0 else f"ended by signal {-code}: {last}")

    def measure(self, what: str, program: str, call: str = "main", optional: bool = False, **options: Any) -> dict:
        """What a program of ours writes to OUT.json, as far as it came; empty if nothing.

        Its function is called: a command line would need tyro. The report takes over what it writes to OUT.md.

        Args:
            optional: as in `run`. options: of the function, to which `out` is added.
        """
        out = self.folder / re.sub(r"\W+", "_", what)
        code = f"from pathlib import PosixPath; from {program} import *; {call}(**{ {**options, 'out': out}!r})"
        ended, output = self.run(what, [sys.executable, "-c", code], optional)
        file, report = out.with_suffix(".json"), out.with_suffix(".md")
        figures = self.found.figures[what] = json.loads(file.read_text()) if file.exists() else {}
        self.judge(what, ended, output, figures.get("failures", ()))
        if report.exists():
            self.found.text.append(f"### {what}")
            _, *paragraphs = re.sub("^#", "###", report.read_text().strip(), flags=re.MULTILINE).split("\n\n")
            for text in paragraphs:  # behind the description of the machine, which all have; notes stand there once
                if text.startswith("#") or text not in self.found.text:
                    self.found.text.append(text)
        return figures

    def at_the_same_time(self, *jobs: Callable[[], None]) -> None:
        with ThreadPoolExecutor(len(jobs)) as pool:
            try:
                for done in as_completed([pool.submit(job) for job in jobs]):
                    done.result()
            except BaseException:  # an error, or Ctrl-C: the others end, too
                self.deadline = 0.0
                for process in list(self._running):
                    kill(process)
                raise


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
