"""Every loader on fake ImageNet, with all cores: its pixels, its rate alone, and training from it.

DALI decodes in two ways: the box of each image alone, or whole images, a share of them by the GPU's own JPEG decoder,
of which the box is cut out afterwards (`DataConfig.dali_full_decode`). The share is swept.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipelines.batch import MEAN, STD, Batch, Place
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.executors.dali_executor import is_installed as has_dali
from pipelines.executors.dali_probe import why_no_box_decode
from pipelines.executors.torchvision_executor import TorchvisionExecutor
from pipelines.loader import Loader
from pipelines.sources.folder import FolderSource
from tools.gpu.networks import free
from tools.gpu.record import Record
from tools.profiling.steps import wait
from training.build import open_trainer
from training.config import Config
from training.profile.step_timer import StepTimer

UNCOUNTED = 6  # batches at the start, some of which were made before the clock starts
ON_CORES = "torchvision on cores"  # for which `build_loader` would take the GPU's decoder
SHARES = (0.0, 0.5, 0.75, 0.9, 1.0)  # of the images that the GPU's JPEG decoder gets


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Make the images, then pixels, rates and training."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the images' sizes
        images = Path(folder, "images")
        size, batch_size = (64, 8) if rehearsal else (224, 256)
        with record.part("fake ImageNet"):
            from tools.make_fake_imagenet import main as make_fake_imagenet

            make_fake_imagenet(images, *(96, 16) if rehearsal else (6144, 512))
        if not images.exists():
            return
        workers = len(os.sched_getaffinity(0))
        config = DataConfig(images, "torchvision", batch_size, workers, input_size=size, eval_size=size)
        ways = ways_to_load(record, config, Path(folder, "beton"), device)
        dtype = torch.float32 if rehearsal else torch.bfloat16
        compare_pixels(record, ways, device)
        rates = measure_rates(record, ways, device, dtype, 0.2 if rehearsal else 2.5)
        train_from(record, ways, rates, device, rehearsal)


def ways_to_load(record: Record, config: DataConfig, beton: Path, device: torch.device) -> dict[str, DataConfig]:
    """What can be measured here, by its name; the rest is skipped."""
    ways = {"torchvision": config, ON_CORES: config}
    with record.part("FFCV"):
        import ffcv  # noqa: F401 (its absence skips the row: it writes the file)

        from tools.conversion.images import Options
        from tools.make_dataset import make_dataset

        make_dataset(config.root, beton, Options(), "error", config.workers)
        ways["FFCV"] = replace(config, root=beton, backend="ffcv")
    if not has_dali():
        record.skip("DALI", "it is not installed here: pip install nvidia-dali-cuda130")
        return ways
    dali = replace(config, backend="dali")
    why_not = why_no_box_decode(device) if device.type == "cuda" else None
    if why_not is None:
        ways["DALI, the box"] = dali
    else:
        record.skip("DALI, the box", f"DALI cannot do it on this GPU: {why_not}")
    ways |= {f"DALI, whole images, hardware share {share}": replace(dali, dali_full_decode=share) for share in SHARES}
    return ways


def open_loader(name: str, config: DataConfig, device: torch.device, dtype: torch.dtype) -> Loader:
    """The training loader of that name."""
    if name != ON_CORES:
        return build_loader(config, "train", Place(device=device, dtype=dtype))
    source = FolderSource(config.root / "train")
    executor = TorchvisionExecutor(source, device, config.rank_workers(1))
    place = Place(device=device, dtype=dtype)
    return Loader(source, executor, True, config, AugmentationConfig(), place, seed=0)


def compare_pixels(record: Record, ways: dict[str, DataConfig], device: torch.device) -> None:
    """How far each loader's pixels are from those of libjpeg-turbo on a CPU, on the first training batch."""
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)

    def pixels(name: str, config: DataConfig, where: torch.device) -> Tensor:
        loader = open_loader(name, config, where, torch.float32)
        try:
            return next(iter(loader)).images.cpu() * std + mean
        finally:
            loader.close()

    table = record.table(
        f"Pixels: |difference| from torchvision's CPU decoder, of 255, {next(iter(ways.values())).batch_size} images",
        *("loader", "mean", "99.9th percentile", "highest"),
    )
    wanted = pixels(ON_CORES, ways[ON_CORES], torch.device("cpu"))
    for name, config in ways.items():
        if config.dali_full_decode not in (None, SHARES[0], SHARES[-1]):
            continue
        with record.part(f"pixels of {name}"):
            config = replace(config, exact_decode=True)
            found = (pixels(name, config, device) - wanted).abs().flatten()
            high = found.kthvalue(round(0.999 * len(found))).values
            record.add(table, name, found.mean().item(), high.item(), found.max().item())


def measure_rates(
    record: Record, ways: dict[str, DataConfig], device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, float]:
    """Images/s of each loader alone."""
    config = next(iter(ways.values()))
    table = record.table(
        f"Loaders alone, {config.input_size} pixels, batches of {config.batch_size}, {config.workers} cores",
        *("loader", "images/s", "cores busy in this process"),
    )
    rates = {}
    for name, config in ways.items():
        if record.has_time(name, 2 * seconds):
            with record.part(name):
                loader = open_loader(name, config, device, dtype)
                try:
                    rates[name], busy = loader_rate(loader, device, seconds)
                finally:
                    loader.close()
                record.add(table, name, rates[name], busy)
            free()
    return rates


def loader_rate(loader: Loader, device: torch.device, seconds: float) -> tuple[float, float]:
    """Images/s over at least that long, and how many cores this process kept busy."""
    count, start, used = 0, 0.0, 0.0
    for step, batch in enumerate(batches(loader)):
        if step == UNCOUNTED:
            wait(device)
            count, start, used = 0, time.perf_counter(), time.process_time()
        elif step > UNCOUNTED:
            count += len(batch.labels)
            if time.perf_counter() - start > seconds:
                break
    wait(device)
    passed = time.perf_counter() - start
    return count / passed, (time.process_time() - used) / passed


def batches(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def train_from(
    record: Record, ways: dict[str, DataConfig], rates: dict[str, float], device: torch.device, rehearsal: bool
) -> None:
    """Training by the trainer's own loop from the fastest way of each backend, beside loader and model alone."""
    table = record.table(
        "Training, end to end, images/s", "loader", "loader alone", "model alone", "together", "to the smaller of both"
    )
    best: dict[str, str] = {}
    for name in sorted(rates.keys() - {ON_CORES}, key=rates.get, reverse=True):
        best.setdefault(ways[name].backend, name)
    quotients = []
    for name in best.values():
        if record.has_time(f"training from {name}", 1 if rehearsal else 22):
            with record.part(f"training from {name}"):
                *row, quotient = train_beside(record, name, ways[name], device, rehearsal)
                record.add(table, name, *row, quotient)
                quotients.append(quotient)
            free()
    record.target("end to end, to the smaller of loader and model, best loader", 0.97, max(quotients, default=None))


def train_beside(
    record: Record, name: str, data: DataConfig, device: torch.device, rehearsal: bool
) -> tuple[float, float, float, float]:
    """Images/s of the loader alone, the model alone and both together; the last, to the smaller of the others."""
    from tools.profile_throughput import Feed, images_per_sec, load, train

    config = Config().with_options(
        arch="mobilenetv2_dcd" if rehearsal else "resnet50_dcd",
        num_classes=1000,
        data=data.root,
        backend=data.backend,
        dali_full_decode=data.dali_full_decode,
        batch_size=data.batch_size,
        input_size=data.input_size,
        workers=data.workers,
        device=device.type,
        epochs=10,
        lr=0.0,
        print_freq=10**9,
        checkpoint_minutes=1e9,
    )
    rounds, warm_up, steps = (1, 1, 2) if rehearsal else (2, UNCOUNTED, 20)
    turns = []
    with open_trainer(config, write_log=False) as trainer:
        feed, timer = Feed(trainer.loader, 0), StepTimer(trainer.ranks, trainer.model)
        for _ in range(rounds):
            model = images_per_sec(trainer, partial(train, trainer), itertools.repeat(feed.first), warm_up, steps)
            loader = images_per_sec(trainer, load, feed, warm_up, steps)
            feed.rest()
            together = images_per_sec(trainer, partial(train, trainer), feed, warm_up, steps, timer)
            feed.rest()
            turns.append((loader, model, together, together / min(loader, model)))
        record.say(f"Training from {name}: {timer.times()}.")
        timer.close()
    return tuple(map(statistics.median, zip(*turns, strict=True)))
