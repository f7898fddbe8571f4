"""Runs on one page: curves, options, results, mistakes with their images, and how dynamic the layers are.

    python -m tools.report runs/a runs/b --out report.html      # one file, which opens offline
    python -m tools.report runs/a --data /path/to/imagenet      # where the images are now

Runs may be of any state: going on, stopped, failed. What is left out is named in one line, here and on the page.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from tools.reporting.findings import NOT_THERE, Findings, find_out
from tools.reporting.page import page
from tools.reporting.runs import Run, read_runs
from training.command_line import parse
from training.options import ConfigError, require
from training.whole_files import whole_files

ROWS = 10  # of the tables of classes
MISTAKES = 24  # with their images


def main(
    runs: Annotated[list[Path], tyro.conf.arg(metavar="RUN [RUN ...]")],
    out: Path = Path("report.html"),
    data: Path | None = None,
    images: int = 256,
    model: bool = True,
) -> None:
    """Write a page about one run or many.

    Args:
        runs: output folders of trainings.
        out: the page, a single file.
        data: a folder with the validation images; by default where each run had its own.
        images: over how many of them the spread of the dynamic coefficients is taken.
        model: --no-model reads no checkpoint and no image: curves, options and results alone.
    """
    try:
        require(images >= 1, f"--images {images}: must be at least 1")
        require(out.absolute().parent.is_dir(), f"no folder {out.absolute().parent} for {out.name}: make it first")
        require(not out.is_dir(), f"--out {out} is a folder: name a file")
        found = read_runs(runs)
        for run in found:
            for note in run.notes:
                print(f"{run.name}: {note}")
        text = page(found, {run.name: _findings(run, data, images) if model else "--no-model" for run in found})
        with whole_files(out) as (file,):
            file.write_text(text, encoding="utf-8")
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{out}: {len(found)} {'run' if len(found) == 1 else 'runs'}, {len(text.encode()) / 2**20:.1f} MiB")


def _findings(run: Run, data: Path | None, images: int) -> Findings | str:
    """What the run's model does with the images, or why that is left out."""
    try:
        found = find_out(run, data, images, ROWS, MISTAKES)
    except NOT_THERE as error:
        print(f"{run.name}: mistakes and spread are left out: {error}")
        return str(error)
    for note in found.notes:
        print(f"{run.name}: {note}")
    return found


if __name__ == "__main__":
    parse(main)
