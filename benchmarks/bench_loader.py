"""Compare our loaders with the libraries' own, on the same images and cores, in one run.

    python -m benchmarks.bench_loader DATA --out OUT      a table; OUT.md, OUT.json and OUT.png

Each row has a process of its own for the whole run. The rows take turns, an epoch each, so that changes in the speed of
the machine affect all of them. An epoch gives the rate and the share of busy cores, from its fifth batch on. The first
epoch of each row is a warm-up; it gives the time to the first batch and the peak memory.
"""

import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.programs import run_program
from pipelines import native
from pipelines.batch import Place
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.imagenet import MEAN, STD
from pipelines.sources.beton import BetonSource
from pipelines.sources.errors import DataError
from tools.profiling.machine import describe_machine
from tools.profiling.processes import sum_over_processes
from tools.profiling.report import show, table_of, write_report
from tools.profiling.timing import in_turns, wait
from training.command_line import parse

WHOLE = "DALI executor, folder, whole images, hardware share"  # the share that the GPU's JPEG decoder takes
SHARES = (0.0, 0.5, 0.75, 0.9, 1.0)
RAW_SIDE = 256  # longest side in pixels of the images that are stored as pixels

# Batches at the start of an epoch that are not counted: DALI's iterator makes them during the end of the last epoch.
UNCOUNTED = 4


@dataclass(frozen=True)
class Setting:
    """folder: images in class folders below train/. beton: the same, converted. raw: the same, smaller, as pixels.
    batch_size: images of size × size pixels. workers: threads or processes. device: where the batches end.
    """

    folder: Path
    beton: Path
    raw: Path
    batch_size: int
    size: int
    workers: int
    device: str


# Called once for each epoch; yields the number of images of each batch.
Epochs = Callable[[], Iterator[int]]


class Epoch(NamedTuple):
    """images_per_sec and busy cores, from the fifth batch on; seconds from the start to the first batch."""

    images_per_sec: float
    cores: float
    first_batch_s: float


@dataclass
class Row:
    """The figures of one loader. rates: images/s of each epoch. cpu_percents: of `workers` cores. peak_memory_gib: of
    all its processes, with shared pages divided among them. first_batch_s: from the start of the loader, imports
    included.
    """

    name: str
    kind: str  # "ours", "stock" or "limit"
    note: str
    first_batch_s: float | None = None
    peak_memory_gib: float | None = None
    rates: list[float] = field(default_factory=list)
    cpu_percents: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rates else math.nan


def ours(setting: Setting, root: Path, **options: Any) -> Epochs:
    """One of our executors, float32 and normalised. options: of `DataConfig`."""
    usual: dict[str, Any] = {"batch_size": setting.batch_size, "workers": setting.workers, "input_size": setting.size}
    config = DataConfig(root, **{**usual, **options})
    loader = build_loader(config, "train", Place(device=torch.device(setting.device)))
    epochs = iter(range(10**6))

    def epoch() -> Iterator[int]:
        loader.set_epoch(next(epochs))
        for batch in loader:
            yield len(batch.indices)

    return epoch


def stock_torchvision(setting: Setting, root: Path) -> Epochs:
    """The ImageNet example of PyTorch: ImageFolder, Pillow, ToTensor, Normalize, DataLoader."""
    crop, flip = transforms.RandomResizedCrop(setting.size), transforms.RandomHorizontalFlip()
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ways = transforms.Compose([crop, flip, transforms.ToTensor(), normalise])
    dataset = ImageFolder(root / "train", ways)
    usual = {"shuffle": True, "drop_last": True, "persistent_workers": True, "pin_memory": setting.device == "cuda"}
    loader = DataLoader(dataset, setting.batch_size, num_workers=setting.workers, **usual)
    return lambda: (len(images.to(setting.device)) for images, _ in loader)


def stock_ffcv(setting: Setting, root: Path, normalised: bool) -> Epochs:
    """FFCV's Loader with its own random crop; uint8, or normalised to float32."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    ways = [RandomResizedCropRGBImageDecoder((setting.size, setting.size)), RandomHorizontalFlip()]
    if normalised:
        ways.append(NormalizeImage(np.array(MEAN), np.array(STD), np.float32))
    fields = {"image": [*ways, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor(), Squeeze()]}
    usual = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": True, "pipelines": fields}
    loader = Loader(str(root / "train.beton"), setting.batch_size, setting.workers, **usual)
    return lambda: (len(labels) for _, labels in loader)


def stock_dali(setting: Setting, root: Path) -> Epochs:
    """NVIDIA's ImageNet example: readers.file, decoders.image_random_crop, resize, crop_mirror_normalize."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    on_gpu = setting.device == "cuda"

    @pipeline_def(batch_size=setting.batch_size, num_threads=setting.workers, device_id=0 if on_gpu else None, seed=0)
    def pipeline() -> Any:
        files = {"file_root": str(root / "train"), "random_shuffle": True, "pad_last_batch": True}
        encoded, labels = fn.readers.file(**files, name="reader")
        crop = {"random_aspect_ratio": [3 / 4, 4 / 3], "random_area": [0.08, 1.0], "num_attempts": 100}
        device = "mixed" if on_gpu else "cpu"
        images = fn.decoders.image_random_crop(encoded, device=device, output_type=types.RGB, **crop)
        images = fn.resize(images, size=(setting.size, setting.size), interp_type=types.INTERP_TRIANGULAR)
        normal = {"dtype": types.FLOAT, "output_layout": "CHW", "mean": MEAN, "std": STD}
        return fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), **normal), labels

    drop = {"last_batch_policy": LastBatchPolicy.DROP, "auto_reset": True}
    loader = DALIClassificationIterator(pipeline(), reader_name="reader", **drop)
    return lambda: (len(batch[0]["data"]) for batch in loader)


def full_decode(setting: Setting, root: Path, by_libjpeg: bool) -> Epochs:
    """Decode every image whole and exactly, on all cores, and do nothing else."""
    source = BetonSource(root / "train.beton")
    pool = ThreadPoolExecutor(setting.workers)
    memory = local()

    def decode(indices: range) -> int:
        if not hasattr(memory, "pixels"):
            memory.pixels = np.empty(int(source.sizes.astype(np.int64).prod(1).max()) * 3, np.uint8)
        return sum(native.decode_jpeg(source.read(index), memory.pixels, by_libjpeg).size > 0 for index in indices)

    parts = [range(start, min(start + 64, len(source))) for start in range(0, len(source), 64)]
    return lambda: iter(pool.map(decode, parts))


class Loader(NamedTuple):
    """kind: "ours", "stock" or "limit". reads: a folder of the setting, which `open` gets. note: for the table."""

    kind: str
    reads: str
    note: str
    open: Callable[[Setting, Path], Epochs]


def loaders(setting: Setting) -> dict[str, Loader]:
    """All rows by their names."""
    half, raw = setting.size // 2, f".beton of pixels, longest side {RAW_SIDE}"
    ffcv, dali, torchvision = (partial(ours, backend=name) for name in ("ffcv", "dali", "torchvision"))
    synthetic = partial(ours, backend="synthetic", synthetic_images=4096)
    at_half, exact = partial(ffcv, input_size=half), partial(ffcv, input_size=half, exact_decode=True)
    reduced = "decoded at half size where that is enough"
    rows = {
        "FFCV executor": Loader("ours", "beton", ".beton", ffcv),
        "DALI executor": Loader("ours", "beton", ".beton", dali),
        "DALI executor, folder": Loader("ours", "folder", "", dali),
        "torchvision executor": Loader("ours", "beton", ".beton", torchvision),
        "torchvision executor, folder": Loader("ours", "folder", "", torchvision),
        "FFCV Loader, uint8": Loader("stock", "beton", "not normalised", partial(stock_ffcv, normalised=False)),
        "FFCV Loader": Loader("stock", "beton", "", partial(stock_ffcv, normalised=True)),
        "DALI image_random_crop": Loader("stock", "folder", "", stock_dali),
        "torchvision DataLoader": Loader("stock", "folder", "Pillow", stock_torchvision),
        "full decode": Loader("limit", "beton", "libjpeg-turbo, no resize", partial(full_decode, by_libjpeg=True)),
        "full decode, our codes": Loader("ours", "beton", "no resize", partial(full_decode, by_libjpeg=False)),
        f"FFCV executor, {half} pixels": Loader("ours", "beton", reduced, at_half),
        f"FFCV executor, {half} pixels, exact": Loader("ours", "beton", "--exact-decode", exact),
        "FFCV executor, raw": Loader("ours", "raw", raw, ffcv),
        "FFCV Loader, raw": Loader("stock", "raw", raw, partial(stock_ffcv, normalised=True)),
        "synthetic": Loader("ours", "folder", "reads nothing", synthetic),
    }
    for share in SHARES if setting.device == "cuda" else ():
        whole = partial(dali, dali_full_decode=share)
        rows[f"{WHOLE} {share}"] = Loader("ours", "folder", f"--dali-full-decode {share}", whole)
    return rows


@cache
def opened(name: str, setting: Setting) -> Epochs:
    """The loader of that name, opened once in the process of its row."""
    multiprocessing.set_start_method("fork", force=True)  # as in a program that a user starts
    torch.set_num_threads(setting.workers)
    row = loaders(setting)[name]
    return row.open(setting, getattr(setting, row.reads))


def one_epoch(name: str, setting: Setting) -> Epoch:
    """One epoch, in the process of the row."""
    start = time.perf_counter()
    used, began, count, first = 0.0, start, 0, start
    for step, images in enumerate(opened(name, setting)()):
        if step == 0:
            first = time.perf_counter()
        if step >= UNCOUNTED:
            count += images
        elif step == UNCOUNTED - 1:
            used, began = cpu_seconds(), time.perf_counter()
    wait(torch.device(setting.device))
    seconds = time.perf_counter() - began
    return Epoch(count / seconds, (cpu_seconds() - used) / seconds, first - start)


def cpu_seconds() -> float:
    """User and system time of this process and its living children."""
    return sum_over_processes(psutil.Process(), lambda process: sum(process.cpu_times()[:2]))


def measure(setting: Setting, names: Iterable[str], epochs: int) -> list[Row]:
    """Every named row: one epoch to warm up, then `epochs` epochs, the rows in turn."""
    found = loaders(setting)
    rows = {name: Row(name, found[name].kind, found[name].note) for name in names}
    pools = {name: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for name in rows}
    with ExitStack() as stack:
        processes = {}
        for name, pool in pools.items():  # all start at the same time
            stack.enter_context(pool)
            stack.callback(close, pool)
            processes[name] = pool.submit(process_id)
        for name, row in rows.items():
            warm_up(pools[name], psutil.Process(processes[name].result()), row, setting)
        turns = {name: partial(count_epoch, pools[name], row, setting) for name, row in rows.items()}
        in_turns(turns, epochs)
    return list(rows.values())


def process_id() -> int:
    """Of this process, which has imported this file by then."""
    return os.getpid()


def close(pool: ProcessPoolExecutor) -> None:
    """End the processes that a row's loader has started."""
    with suppress(BrokenExecutor):  # it has crashed
        pool.submit(opened.cache_clear)


def warm_up(pool: ProcessPoolExecutor, process: psutil.Process, row: Row, setting: Setting) -> None:
    """The first epoch, whose rate is not counted."""
    epoch, highest = pool.submit(one_epoch, row.name, setting), 0.0
    while not epoch.done():
        futures.wait([epoch], timeout=0.2)
        highest = max(highest, sum_over_processes(process, lambda each: each.memory_full_info().pss))
    row.peak_memory_gib = highest / 2**30
    with errors_in(row):
        row.first_batch_s = epoch.result().first_batch_s


def count_epoch(pool: ProcessPoolExecutor, row: Row, setting: Setting) -> None:
    """One more epoch, unless the row has failed."""
    if not row.error:
        with errors_in(row):
            found = pool.submit(one_epoch, row.name, setting).result()
            row.rates.append(found.images_per_sec)
            row.cpu_percents.append(100 * found.cores / setting.workers)
            print(f"{row.name}: {found.images_per_sec:,.0f} images/s", file=sys.stderr)


@contextmanager
def errors_in(row: Row) -> Generator[None]:
    """An error in the body becomes the row's result; the other rows go on."""
    try:
        yield
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{row.name}: {row.error}", file=sys.stderr)


def table(found: list[Row]) -> str:
    """The rows in Markdown; the last column is relative to the full decode."""
    limit = next((row.rate for row in found if row.kind == "limit"), math.nan)
    return table_of(
        found,
        {
            "loader": lambda row: f"{row.name} ({row.note})" if row.note else row.name,
            "": lambda row: row.kind,
            "images/s": lambda row: row.error or row.rate,
            "of the epochs": lambda row: ", ".join(map(show, row.rates)),
            "first batch s": lambda row: row.first_batch_s,
            "CPU %": lambda row: statistics.median(row.cpu_percents or [math.nan]),
            "peak memory GiB": lambda row: row.peak_memory_gib,
            "to full decode": lambda row: row.rate / limit,
        },
    )


def ratios(found: list[Row]) -> list[str]:
    """The rate of each executor divided by the rate of its library's own pipeline."""
    rates = {row.name: row.rate for row in found if row.rates}
    pairs = (
        ("FFCV executor", "FFCV Loader"),
        ("FFCV executor", "FFCV Loader, uint8"),
        ("FFCV executor, raw", "FFCV Loader, raw"),
        ("DALI executor", "DALI image_random_crop"),
        ("DALI executor, folder", "DALI image_random_crop"),
        ("torchvision executor", "torchvision DataLoader"),
        ("torchvision executor, folder", "torchvision DataLoader"),
    )
    measured = [(one, other) for one, other in pairs if one in rates and other in rates]
    return [f"{one} is {rates[one] / rates[other]:.2f} times {other}" for one, other in measured]


def plot(found: list[Row], path: Path, title: str) -> None:
    """Horizontal bars of the median rates, with every epoch as a dot."""
    from matplotlib.figure import Figure

    shown = [row for row in reversed(found) if row.rates and row.name != "synthetic"]
    colours = {"ours": "tab:blue", "stock": "tab:gray", "limit": "tab:orange"}
    figure = Figure(figsize=(8, 0.45 * len(shown) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([row.name for row in shown], [row.rate for row in shown], color=[colours[row.kind] for row in shown])
    for place, row in enumerate(shown):
        axes.plot(row.rates, [place] * len(row.rates), "k.", markersize=4)
    axes.set_xlabel("images/s (bar: median of the epochs; blue: ours)")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main(
    data: Path,
    beton: Path | None = None,
    out: Path = Path("runs/loaders"),
    only: tuple[str, ...] = (),
    epochs: int = 3,
    batch_size: int = 256,
    size: int = 224,
    workers: int | None = None,
    device: str = "cpu",
    pictures: bool = True,
) -> None:
    """Measure every loader on DATA/train.

    Args:
        data: a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, such as benchmarks.make_fake_imagenet writes.
        beton: a folder with the same images converted; by default they are converted into a temporary folder.
        out: where OUT.md, OUT.json and OUT.png are written.
        only: names of rows; by default all.
        epochs: counted epochs of each row.
        batch_size: images in a batch.
        size: side of the images in pixels.
        workers: threads or processes of each loader; at most, and by default, one for each core.
        device: where the batches end, cpu or cuda; on cuda there are rows of DALI that decode whole images, too.
        pictures: draw OUT.png.
    """
    workers = DataConfig(workers=workers or None).machine_workers  # ours has no more than cores; nor may the others
    try:
        with tempfile.TemporaryDirectory(dir=data.parent) as temporary:
            raw = Path(temporary, "raw")
            setting = Setting(data, beton or Path(temporary, "beton"), raw, batch_size, size, workers, device)
            names = only or tuple(loaders(setting))
            unknown = [name for name in names if name not in loaders(setting)]
            if unknown:
                raise DataError(f"no row {unknown[0]!r}: the rows are {', '.join(loaders(setting))}")
            read = {loaders(setting)[name].reads for name in names}
            if "beton" in read and beton is None:
                run_program("tools.make_dataset", data, setting.beton, "--workers", workers)
            if "raw" in read:
                pixels = ("--mode", "reencode", "--max-size", RAW_SIDE, "--jpeg-fraction", 0)
                run_program("tools.make_dataset", data, raw, *pixels, "--workers", workers)
            images = len(ImageFolder(data / "train"))
            found = measure(setting, names, epochs)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    what = f"{images:,} images, batches of {batch_size} at {size}×{size} pixels, {workers} workers, on {device}"
    settings = describe_machine(torch.device(device))
    sections = [f"{what}; median of {epochs} epochs.", table(found), "\n".join(ratios(found))]
    write_report(out, settings, sections, setting=what, rows=found)
    if pictures:
        plot(found, out.with_name(f"{out.name}.png"), what)


if __name__ == "__main__":
    parse(main)
