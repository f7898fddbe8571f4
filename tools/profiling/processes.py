"""What all processes of a program take together."""

import contextlib
from collections.abc import Callable

import psutil


def sum_over_processes(process: psutil.Process, figure: Callable[[psutil.Process], float]) -> float:
    """The sum of a figure of a process and all that it has started, of those that live."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += figure(each)
    return total
