"""One section of `benchmarks.gpu_check`, in a process of its own:

python -m benchmarks.gpu NAME TITLE FILE SECONDS [--rehearse]
"""

import sys
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu.record import Record


def main(name: str, title: str, path: str, seconds: str, *flags: str) -> None:
    rehearsal = "--rehearse" in flags
    record = Record(title, Path(path), float(seconds))
    with record.part(name):
        import_module(f"benchmarks.gpu.{name}").run(record, torch.device("cpu" if rehearsal else "cuda"), rehearsal)


if __name__ == "__main__":
    main(*sys.argv[1:])
