"""One section of `tools.gpu_check`, in a process of its own: `python -m tools.gpu NAME FILE SECONDS [--rehearse]`."""

import sys
from importlib import import_module
from pathlib import Path

import torch

from tools.gpu.record import Record

TITLES = {
    "right": "Right",
    "compiling": "Compilation",
    "networks": "Models",
    "layers": "Roofline of the layers",
    "loaders": "Loaders",
    "timeline": "Where the time goes",
}


def main(name: str, path: str, seconds: str, *flags: str) -> None:
    rehearsal = "--rehearse" in flags
    record = Record(TITLES[name], Path(path), float(seconds))
    with record.part(name):
        import_module(f"tools.gpu.{name}").run(record, torch.device("cpu" if rehearsal else "cuda"), rehearsal)


if __name__ == "__main__":
    main(*sys.argv[1:])
