"""Measure every loader beside the libraries' own, on the same images and cores, in one run.

    python -m tools.bench_loader DATA --out OUT      a table; OUT.md, OUT.json and OUT.png

Each row runs in a process of its own, which stays: the rows take turns, an epoch each, so that a machine whose speed
changes changes it for all of them. An epoch gives the rate and the share of the cores that were busy, from its fifth
batch on; the first epoch of each row is not counted, and gives the time to the first batch and the highest memory.
"""

import contextlib
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread, local
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pipelines import native
from pipelines.batch import MEAN, STD, Place
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.sources.beton import BetonSource
from pipelines.sources.errors import DataError
from tools.conversion.images import Options
from tools.make_dataset import make_dataset
from training.command_line import parse
from training.run_log import device_name

RAW_SIDE = 256  # longest side in pixels of the images that are stored as pixels

# Batches at the beginning of an epoch: DALI's iterator has made them during the end of the last one.
UNCOUNTED = 4


@dataclass(frozen=True)
class Setting:
    """folder: images in class folders below train/. beton: the same, converted; raw: the same as pixels, smaller.
    batch_size images of size × size pixels; `workers` threads or processes; batches on `device`.
    """

    folder: Path
    beton: Path
    raw: Path
    batch_size: int
    size: int
    workers: int
    device: str


@dataclass
class Row:
    """What was measured. Rates in images/s, one an epoch; cpu in percent of `workers` cores; memory of all of its
    processes, shared pages divided between them, in GiB; first_batch_s from the start of the loader, imports included.
    """

    name: str
    kind: str  # "ours", "stock" or "limit"
    note: str = ""
    first_batch_s: float = float("nan")
    peak_memory_gib: float = float("nan")
    rates: list[float] = field(default_factory=list)
    cpu_percents: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rates else float("nan")


# An epoch by a row: called once for each, it yields the number of images of each batch.
Epochs = Callable[[], Iterator[int]]


def ours(setting: Setting, backend: str, form: str = "beton", size: int | None = None, exact: bool = False) -> Epochs:
    """One of our executors, float32 and normalised, by the plan. form: what of the setting it reads."""
    config = DataConfig(
        root=getattr(setting, form),
        backend=backend,
        batch_size=setting.batch_size,
        workers=setting.workers,
        input_size=size or setting.size,
        exact_decode=exact,
        synthetic_images=4096,
    )
    loader = build_loader(config, "train", Place(device=torch.device(setting.device)))
    epochs = iter(range(10**6))

    def epoch() -> Iterator[int]:
        loader.set_epoch(next(epochs))
        for batch in loader:
            yield len(batch.indices)

    return epoch


def stock_torchvision(setting: Setting) -> Epochs:
    """The ImageNet example's way: ImageFolder, Pillow, ToTensor, Normalize, DataLoader."""
    ways = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    loader = DataLoader(
        ImageFolder(setting.folder / "train", ways),
        setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
        pin_memory=setting.device == "cuda",
    )
    return lambda: (len(images.to(setting.device)) for images, _ in loader)


def stock_ffcv(setting: Setting, normalised: bool, form: str = "beton") -> Epochs:
    """FFCV's Loader with its own random crop; uint8, or normalised to float32."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    ways = [RandomResizedCropRGBImageDecoder((setting.size, setting.size)), RandomHorizontalFlip()]
    if normalised:
        ways.append(NormalizeImage(np.array(MEAN), np.array(STD), np.float32))
    loader = Loader(
        str(getattr(setting, form) / "train.beton"),
        batch_size=setting.batch_size,
        num_workers=setting.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": [*ways, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    return lambda: (len(labels) for _, labels in loader)


def stock_dali(setting: Setting) -> Epochs:
    """NVIDIA's ImageNet example's way: readers.file, decoders.image_random_crop, resize, crop_mirror_normalize."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    on_gpu = setting.device == "cuda"

    @pipeline_def(batch_size=setting.batch_size, num_threads=setting.workers, device_id=0 if on_gpu else None, seed=0)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(
            file_root=str(setting.folder / "train"), random_shuffle=True, pad_last_batch=True, name="reader"
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            random_aspect_ratio=[3 / 4, 4 / 3],
            random_area=[0.08, 1.0],
            num_attempts=100,
        )
        images = fn.resize(images, size=(setting.size, setting.size), interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mean=MEAN, std=STD, mirror=fn.random.coin_flip()
        )
        return images, labels

    loader = DALIClassificationIterator(
        pipeline(), reader_name="reader", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    return lambda: (len(batch[0]["data"]) for batch in loader)


def full_decode(setting: Setting, by_libjpeg_alone: bool) -> Epochs:
    """Every image whole, on all cores, accurate, nothing else done with it."""
    source = BetonSource(setting.beton / "train.beton")
    pool = ThreadPoolExecutor(setting.workers)
    memory = local()

    def decode(indices: range) -> int:
        if not hasattr(memory, "pixels"):
            memory.pixels = np.empty(int(source.sizes.astype(np.int64).prod(1).max()) * 3, np.uint8)
        return sum(
            native.decode_jpeg(source.read(index), memory.pixels, by_libjpeg_alone).size > 0 for index in indices
        )

    parts = [range(start, min(start + 64, len(source))) for start in range(0, len(source), 64)]
    return lambda: iter(pool.map(decode, parts))


def rows(setting: Setting) -> dict[str, tuple[Row, Callable[[Setting], Epochs]]]:
    """Every row by its name."""
    half, raw = setting.size // 2, f".beton of pixels, longest side {RAW_SIDE}"
    table = [
        (Row("FFCV executor", "ours", ".beton"), partial(ours, backend="ffcv")),
        (Row("DALI executor", "ours", ".beton"), partial(ours, backend="dali")),
        (Row("DALI executor, folder", "ours"), partial(ours, backend="dali", form="folder")),
        (Row("torchvision executor", "ours", ".beton"), partial(ours, backend="torchvision")),
        (Row("torchvision executor, folder", "ours"), partial(ours, backend="torchvision", form="folder")),
        (Row("FFCV Loader, uint8", "stock", "not normalised"), partial(stock_ffcv, normalised=False)),
        (Row("FFCV Loader", "stock"), partial(stock_ffcv, normalised=True)),
        (Row("DALI image_random_crop", "stock"), stock_dali),
        (Row("torchvision DataLoader", "stock", "Pillow"), stock_torchvision),
        (Row("full decode", "limit", "libjpeg-turbo, no resize"), partial(full_decode, by_libjpeg_alone=True)),
        (Row("full decode, our codes", "ours", "no resize"), partial(full_decode, by_libjpeg_alone=False)),
        (
            Row(f"FFCV executor, {half} pixels", "ours", "decoded at half size where that is enough"),
            partial(ours, backend="ffcv", size=half),
        ),
        (
            Row(f"FFCV executor, {half} pixels, exact", "ours", "--exact-decode"),
            partial(ours, backend="ffcv", size=half, exact=True),
        ),
        (Row("FFCV executor, raw", "ours", raw), partial(ours, backend="ffcv", form="raw")),
        (Row("FFCV Loader, raw", "stock", raw), partial(stock_ffcv, normalised=True, form="raw")),
        (Row("synthetic", "ours", "reads nothing"), partial(ours, backend="synthetic")),
    ]
    return {row.name: (row, build) for row, build in table}


def serve(pipe: Connection, name: str, setting: Setting) -> None:
    """In a row's process: an epoch for each request; answers (images/s, CPU seconds, seconds to the first batch)."""
    start = time.perf_counter()
    multiprocessing.set_start_method("fork", force=True)  # as in a program that a user starts
    torch.set_num_threads(setting.workers)
    try:
        epoch = rows(setting)[name][1](setting)
        while pipe.recv() is not None:
            used, began, count, first = 0.0, 0.0, 0, None
            for step, images in enumerate(epoch()):
                first = first or time.perf_counter()
                if step >= UNCOUNTED:
                    count += images
                elif step == UNCOUNTED - 1:
                    used, began = _cpu_seconds(), time.perf_counter()
            if setting.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            pipe.send((count / seconds, (_cpu_seconds() - used) / seconds, first - start))
    except EOFError:
        return
    except Exception as error:  # reported as the row's result: the other rows go on
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _cpu_seconds() -> float:
    """User and system time of this process and its living children."""
    process, total = psutil.Process(), 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def _watch_memory(pid: int, stop: Event, row: Row) -> None:
    """Keeps the highest memory of a process and its children in `row`."""
    highest = 0
    while not stop.wait(0.2):
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += each.memory_full_info().pss
        highest = max(highest, total)
    row.peak_memory_gib = highest / 2**30


def measure(setting: Setting, names: Iterable[str], epochs: int) -> list[Row]:
    """Every named row: one epoch to warm up, then `epochs` epochs, the rows in turn."""
    context = multiprocessing.get_context("spawn")
    found, pipes = [], {}
    for name in names:
        row = rows(setting)[name][0]
        found.append(row)
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, setting))
        process.start()
        theirs.close()
        stop = Event()
        watch = Thread(target=_watch_memory, args=(process.pid, stop, row))
        watch.start()
        _request(pipes[name], row)
        stop.set()
        watch.join()
        row.rates.clear(), row.cpu_percents.clear()
    for _ in range(epochs):
        for row in found:
            if not row.error:
                _request(pipes[row.name], row, setting.workers)
    for pipe in pipes.values():
        with contextlib.suppress(OSError):
            pipe.send(None)
    for process in multiprocessing.active_children():
        process.join()
    return found


def _request(pipe: Connection, row: Row, workers: int = 1) -> None:
    try:
        pipe.send("epoch")
        answer = pipe.recv()
    except (EOFError, OSError):
        answer = "its process ended"
    if isinstance(answer, str):
        row.error = answer
        print(f"{row.name}: {answer}", file=sys.stderr)
        return
    rate, cores, first = answer
    row.rates.append(rate)
    row.cpu_percents.append(100 * cores / workers)
    if row.first_batch_s != row.first_batch_s:  # the first epoch's
        row.first_batch_s = first
    print(f"{row.name}: {rate:,.0f} images/s", file=sys.stderr)


def table(found: list[Row]) -> str:
    """The rows in Markdown; the last column is relative to the full decode."""
    limit = next((row.rate for row in found if row.kind == "limit"), float("nan"))
    lines = [
        "| loader | | images/s | of the epochs | first batch s | CPU % | peak memory GiB | to full decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.error:
            lines.append(f"| {row.name} | {row.kind} | {row.error} | | | | | |")
            continue
        name = f"{row.name} ({row.note})" if row.note else row.name
        each = ", ".join(f"{rate:,.0f}" for rate in row.rates)
        cpu = statistics.median(row.cpu_percents)
        lines.append(
            f"| {name} | {row.kind} | {row.rate:,.0f} | {each} | {row.first_batch_s:.1f} | {cpu:.0f} | "
            f"{row.peak_memory_gib:.2f} | {row.rate / limit:.2f} |"
        )
    return "\n".join(lines)


def ratios(found: list[Row]) -> list[str]:
    """What each executor is to its library's own pipeline."""
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
    return [
        f"{one} is {rates[one] / rates[other]:.2f} times {other}"
        for one, other in pairs
        if one in rates and other in rates
    ]


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
    data: tyro.conf.Positional[Path],
    beton: Path | None = None,
    out: Path = Path("runs/loaders"),
    only: tuple[str, ...] = (),
    epochs: int = 3,
    batch_size: int = 256,
    size: int = 224,
    workers: int | None = None,
    device: str = "cpu",
) -> None:
    """Measure every loader on DATA/train.

    Args:
        data: a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, such as tools.make_fake_imagenet writes.
        beton: a folder with the same, converted; by default it is converted into a temporary folder.
        out: where OUT.md, OUT.json and OUT.png are written.
        only: names of rows; by default all.
        epochs: counted epochs of each row.
        batch_size: images in a batch.
        size: side of the images in pixels.
        workers: threads or processes of each loader; by default one for each core.
        device: where the batches end, cpu or cuda.
    """
    workers = workers or len(psutil.Process().cpu_affinity())
    try:
        with tempfile.TemporaryDirectory(dir=data.parent) as temporary:
            raw = Path(temporary, "raw")
            setting = Setting(data, beton or Path(temporary, "beton"), raw, batch_size, size, workers, device)
            names = only or tuple(rows(setting))
            unknown = [name for name in names if name not in rows(setting)]
            if unknown:
                raise DataError(f"no row {unknown[0]!r}: the rows are {', '.join(rows(setting))}")
            if beton is None:
                make_dataset(data, setting.beton, Options("verbatim"), "error", workers)
            if any(name.endswith(", raw") for name in names):
                make_dataset(data, raw, Options("reencode", RAW_SIDE, jpeg_fraction=0), "error", workers)
            images = len(BetonSource(setting.beton / "train.beton"))
            found = measure(setting, names, epochs)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    packages = ("torch", "torchvision", "ffcv", "nvidia-dali-cuda130", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    capability = torch.backends.cpu.get_cpu_capability()
    where = (
        f"{device_name(torch.device(device))} (processor: {capability}), Python {platform.python_version()}, {versions}"
    )
    what = f"{images:,} images, batches of {batch_size} at {size}×{size} pixels, {workers} workers, on {device}"
    text = "\n\n".join([f"{where}.", f"{what}; median of {epochs} epochs.", table(found), "\n".join(ratios(found))])
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"{text}\n")
    record = {"machine": where, "setting": what, "rows": [asdict(row) for row in found]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    plot(found, out.with_suffix(".png"), what)


if __name__ == "__main__":
    parse(main)
