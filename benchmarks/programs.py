"""Run other programs of this repository, which prepare the data of a measurement."""

import re
import subprocess
import sys

from pipelines.sources.errors import DataError


def run_program(name: str, *arguments: object) -> None:
    """Run `python -m NAME ARGUMENTS` in a process of its own; its output is not shown.

    Raises:
        ModuleNotFoundError: a package that it imports is missing. DataError: any other failure; has its last line.
    """
    done = subprocess.run([sys.executable, "-m", name, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or name).splitlines()[-1]
        if missing := re.match(r"ModuleNotFoundError: No module named '(\w+)", last):
            raise ModuleNotFoundError(last, name=missing[1])
        raise DataError(last.removeprefix("error: "))
