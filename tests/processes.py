"""Runs of train_dist.py in the background, to be watched, signalled and killed by tests."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
# The processes say where threads of a process group run into the end of Python.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "at_exit")}


def until(holds: Callable[[], bool], seconds: float = 120.0, every: float = 0.02) -> None:
    """Wait until `holds()`.

    Raises:
        TimeoutError: it did not within so many seconds.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came within {seconds} s")
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """Processes that belong together; `codes` holds their exit codes, None while they run (-N after signal N)."""

    def __init__(self, pids: list[int], poll: Callable[[int], int | None], output: Path):
        self.pids, self._poll, self._output = pids, poll, output
        self.codes: list[int | None] = [None] * len(pids)

    @property
    def running(self) -> bool:
        for place, pid in enumerate(self.pids):
            if self.codes[place] is None:
                self.codes[place] = self._poll(pid)
        return None in self.codes

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def signal(self, number: int, *places: int) -> None:
        """To the processes at these places, by default all, that have not ended."""
        for place in places or range(len(self.pids)):
            if self.codes[place] is None:
                os.kill(self.pids[place], number)

    def wait(self, seconds: float = 240.0) -> list[int]:
        """The exit codes, when all have ended."""
        until(lambda: not self.running, seconds)
        return self.codes

    def ranks(self) -> list[psutil.Process]:
        """The ranks that torchrun, which is this job, has started, in order."""
        children = psutil.Process(self.pids[0]).children()
        return sorted((each for each in children if "RANK" in each.environ()), key=lambda each: each.environ()["RANK"])

    def end(self) -> None:
        """Kill what is left, children included."""
        for pid in self.pids:
            if self.running and psutil.pid_exists(pid):
                for child in psutil.Process(pid).children(recursive=True):
                    child.kill()
        if self.running:
            self.signal(signal.SIGKILL)
            self.wait(30)


def start_command(command: list[str], output: Path, **env: str) -> Job:
    """A command in the background; its output is appended to a file."""
    with open(output, "ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT, **env}
        )
    return Job([process.pid], lambda _: process.poll(), output)


class WarmPython:
    """Starts runs by `warm_python.py`: what is imported once need not be imported for each."""

    def __init__(self):
        script = [sys.executable, str(ROOT / "tests" / "warm_python.py"), str(ROOT)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(script, env={**os.environ, **ENVIRONMENT}, cwd=ROOT, **pipes)
        assert json.loads(self._process.stdout.readline()) == "ready"

    def _ask(self, **request) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, *args, ranks: int, output: Path, envs: list[dict[str, str]] | None = None, module: str | None = None
    ) -> Job:
        """So many ranks, with torchrun's variables or with `envs`, one for each. With one rank: no variables at all.

        They run train_dist.py, or a module as a program.
        """
        if envs is None:
            port = free_port()
            envs = [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                for rank in range(ranks)
            ]
            envs = envs if ranks > 1 else [{}]
        common = {**os.environ, **ENVIRONMENT}
        program = ["-m", module] if module else [str(ROOT / "train_dist.py")]
        words = [*program, *map(str, args)]
        pids = [self._ask(start=words, env={**common, **env}, output=str(output)) for env in envs]
        return Job(pids, lambda pid: self._ask(poll=pid), output)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


@functools.cache
def warm_python() -> WarmPython:
    """One for all tests of this process."""
    python = WarmPython()
    atexit.register(python.close)
    return python
