"""Speed of tools.make_dataset beside FFCV's own DatasetWriter, on the train/ of an image folder.

    python -m tools.bench_conversion SRC

The four conversions take turns, so that whatever else the machine does falls on all of them; a rate is the median of
its runs. Ours list the folder, check every image and wait for the disk (fsync); FFCV's does none of the last two.
Neither's imports are counted. Two short runs before the first compile what is compiled once.
"""

import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from torchvision.datasets import ImageFolder

from pipelines.sources.errors import DataError
from tools.conversion.images import Options
from tools.conversion.inputs import open_source
from tools.conversion.writer import load_ffcv, write_split
from training.command_line import parse
from training.run_log import device_name


def ours(src: Path, out: Path, workers: int, options: Options) -> int:
    """Convert train as tools.make_dataset does; the number of images."""
    split = open_source(src).splits["train"]
    write_split(split, out, options, workers, discard_on_bad=True)
    return len(split.labels)


def ffcvs(src: Path, out: Path, workers: int, max_resolution: int | None) -> int:
    """Convert train as FFCV's documentation does; the number of images."""
    ffcv = load_ffcv()
    image = ffcv.fields.RGBImageField(write_mode="jpg", max_resolution=max_resolution, jpeg_quality=90)
    fields = {"image": image, "label": ffcv.fields.IntField()}
    dataset = ImageFolder(str(src / "train"))
    ffcv.writer.DatasetWriter(str(out), fields, num_workers=workers).from_indexed_dataset(dataset)
    return len(dataset)


def rate(convert: Callable[[Path], int], folder: Path) -> float:
    """Images/s of one run, which is deleted."""
    out = folder / "train.beton"
    os.sync()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # FFCV's progress bar
        images = convert(out)
    seconds = time.perf_counter() - start
    out.unlink()
    return images / seconds


def main(src: tyro.conf.Positional[Path], workers: int | None = None, rounds: int = 3, folder: Path | None = None):
    """Print images/s of four conversions as a Markdown table.

    Args:
        src: an image folder, with train/ and val/.
        workers: processes; by default one for each core.
        rounds: timed runs of each conversion.
        folder: where a temporary folder is made for the files.
    """
    workers = workers or len(os.sched_getaffinity(0))
    reencode = Options("reencode", 500, 90, 1.0)
    conversions: dict[str, Callable[[Path], int]] = {
        "FFCV, jpg": lambda out: ffcvs(src, out, workers, None),
        "ours, verbatim": lambda out: ours(src, out, workers, Options()),
        "FFCV, jpg, 500 pixels, quality 90": lambda out: ffcvs(src, out, workers, 500),
        "ours, reencode, 500 pixels, quality 90": lambda out: ours(src, out, workers, reencode),
    }
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            rates: dict[str, list[float]] = {name: [] for name in conversions}
            for round_ in range(1 + rounds):
                for name, convert in conversions.items():
                    found = rate(convert, Path(temporary))
                    if round_:  # the first brings the folder into memory
                        rates[name].append(found)
    except DataError as error:
        sys.exit(f"error: {error}")
    where = f"{device_name(torch.device('cpu'))}, Python {platform.python_version()}, ffcv {version('ffcv')}"
    command = f"python -m tools.bench_conversion {' '.join(sys.argv[1:])}"
    print(f"{where}, {workers} workers, {time.strftime('%Y-%m-%d')}: {command}\n")
    print("| conversion | images/s | of the runs | ratio |\n|---|---|---|---|")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    names = list(conversions)
    for baseline, name in (names[:2], names[2:]):
        for row in (baseline, name):
            runs = ", ".join(f"{found:.0f}" for found in rates[row])
            ratio = medians[row] / medians[baseline]
            print(f"| {row} | {medians[row]:.0f} | {runs} | {ratio:.2f} |")


if __name__ == "__main__":
    parse(main)
