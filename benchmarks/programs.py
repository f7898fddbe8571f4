"""Other programs of this repository, which prepare what is measured."""

import re
import subprocess
import sys

from pipelines.sources.errors import DataError


def run_program(name: str, *arguments: object) -> None:
    """`python -m NAME ARGUMENTS` in a process of its own; what it prints is not shown.

    Raises:
        ModuleNotFoundError: it imports a package that is not there. DataError: it fails otherwise; its last line.
    """
    done = subprocess.run([sys.executable, "-m", name, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or name).splitlines()[-1]
        if missing := re.match(r"ModuleNotFoundError: No module named '(\w+)", last):
            raise ModuleNotFoundError(last, name=missing[1])
        raise DataError(last.removeprefix("error: "))
