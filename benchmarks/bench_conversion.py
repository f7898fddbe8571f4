"""Compare the speed of tools.make_dataset with FFCV's own DatasetWriter, on train/ of an image folder.

    python -m benchmarks.bench_conversion SRC

The four conversions take turns, so other load on the machine affects all of them; a rate is the median of its runs. Our
conversion lists the folder, checks every image and waits for the disk (fsync). FFCV's writer also lists the folder, but
does not check or wait. Imports are not counted. Short runs before the first compile what is compiled once.
"""

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from pipelines.sources.errors import DataError
from tools.conversion.images import Options
from tools.conversion.inputs import open_source
from tools.conversion.writer import load_ffcv, write_split
from tools.profiling.machine import describe_machine
from tools.profiling.report import markdown_table, show, write_report
from tools.profiling.timing import in_turns
from training.command_line import parse


def ours(src: Path, workers: int, options: Options, out: Path) -> int:
    """Convert train as tools.make_dataset does. Returns the number of images."""
    split = open_source(src).splits["train"]
    write_split(split, out, options, workers, discard_on_bad=True)
    return len(split.labels)


def ffcvs(src: Path, workers: int, max_resolution: int | None, out: Path) -> int:
    """Convert train as FFCV's documentation does. Returns the number of images."""
    ffcv = load_ffcv()
    image = ffcv.fields.RGBImageField(write_mode="jpg", max_resolution=max_resolution, jpeg_quality=90)
    fields = {"image": image, "label": ffcv.fields.IntField()}
    dataset = ImageFolder(str(src / "train"))
    ffcv.writer.DatasetWriter(str(out), fields, num_workers=workers).from_indexed_dataset(dataset)
    return len(dataset)


def rate(convert: Callable[[Path], int], out: Path) -> float:
    """Images/s of one run to the file `out`, which is deleted."""
    os.sync()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # FFCV's progress bar
        images = convert(out)
    seconds = time.perf_counter() - start
    out.unlink()
    return images / seconds


def main(src: Path, workers: int | None = None, rounds: int = 3, folder: Path | None = None):
    """Print images/s of four conversions as a Markdown table.

    Args:
        src: an image folder, with train/ and val/.
        workers: processes; by default one for each core.
        rounds: timed runs of each conversion.
        folder: where a temporary folder is made for the files.
    """
    workers = workers or len(os.sched_getaffinity(0))
    reencode = Options("reencode", 500, 90, 1.0)
    conversions = {
        "FFCV, jpg": partial(ffcvs, src, workers, None),
        "ours, verbatim": partial(ours, src, workers, Options()),
        "FFCV, jpg, 500 pixels, quality 90": partial(ffcvs, src, workers, 500),
        "ours, reencode, 500 pixels, quality 90": partial(ours, src, workers, reencode),
    }
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            out = Path(temporary, "train.beton")
            timed = {name: partial(rate, convert, out) for name, convert in conversions.items()}
            rates = in_turns(timed, rounds, warm_up=1)  # the warm-up also brings the folder into memory
    except DataError as error:
        sys.exit(f"error: {error}")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    names = list(conversions)
    rows = [
        (name, medians[name], ", ".join(map(show, rates[name])), medians[name] / medians[baseline])
        for baseline, ours_ in zip(names[::2], names[1::2], strict=True)
        for name in (baseline, ours_)
    ]
    settings = {**describe_machine(torch.device("cpu")), "workers": workers}
    write_report(None, settings, [markdown_table(("conversion", "images/s", "of the runs", "ratio"), rows)])


if __name__ == "__main__":
    parse(main)
