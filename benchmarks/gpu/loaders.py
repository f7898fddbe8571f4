"""Measure every loader on fake ImageNet with all cores: its pixels, its rate alone, and training from it.

DALI decodes in two ways: only the box of each image, or whole images from which the box is cut afterwards
(`DataConfig.dali_full_decode`). In the second way the GPU's JPEG decoder takes a share of the images; several shares
are tried.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.networks import free
from benchmarks.gpu.record import Record
from benchmarks.programs import run_program
from pipelines.batch import MEAN, STD, Place
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.executors.dali_executor import is_installed as has_dali
from pipelines.executors.dali_probe import why_no_box_decode
from pipelines.executors.torchvision_executor import TorchvisionExecutor
from pipelines.loader import Loader
from pipelines.sources.folder import FolderSource
from tools.profiling.feed import Feed, endless_run, images_per_sec, load, median_rates, take_turns, train
from training.build import open_trainer
from training.distributed import Ranks
from training.profile.step_timer import StepTimer
from training.profile.verdict import Rates

UNCOUNTED = 6  # batches at the start, some of them made before the clock starts
ON_CORES = "torchvision on cores"  # `build_loader` would take the GPU's decoder for it
SHARES = (0.0, 0.5, 0.75, 0.9, 1.0)  # of the images, decoded by the GPU's JPEG decoder


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Make the images, then pixels, rates and training."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the images' sizes
        images = Path(folder, "images")
        size, batch_size, counts = (64, 8, (96, 16)) if rehearsal else (224, 256, (6144, 512))
        with record.part("fake ImageNet"):
            options = ("--train-images", counts[0], "--val-images", counts[1])
            run_program("benchmarks.make_fake_imagenet", images, *options)
        if not images.exists():
            return
        workers = len(os.sched_getaffinity(0))
        config = DataConfig(images, "torchvision", batch_size, workers, input_size=size, eval_size=size)
        ways = ways_to_load(record, config, Path(folder, "beton"), device)
        compare_pixels(record, ways, device)
        rates = measure_rates(record, ways, device, rehearsal)
        train_from(record, ways, rates, device, rehearsal)


def ways_to_load(record: Record, config: DataConfig, beton: Path, device: torch.device) -> dict[str, DataConfig]:
    """{name: configuration} of the loaders that can be measured here; the others are recorded as skipped."""
    ways = {"torchvision": config, ON_CORES: config}
    with record.part("FFCV"):
        import ffcv  # noqa: F401 (its absence skips the row: it writes the file)

        run_program("tools.make_dataset", config.root, beton)
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
    return ways | {
        f"DALI, whole images, hardware share {share}": replace(dali, dali_full_decode=share) for share in SHARES
    }


def open_loader(name: str, config: DataConfig, device: torch.device, dtype: torch.dtype) -> Loader:
    """The training loader of that name."""
    place = Place(device=device, dtype=dtype)
    if name != ON_CORES:
        return build_loader(config, "train", place)
    source = FolderSource(config.root / "train")
    executor = TorchvisionExecutor(source, device, config.rank_workers(1))
    return Loader(source, executor, True, config, AugmentationConfig(), place, seed=0)


def compare_pixels(record: Record, ways: dict[str, DataConfig], device: torch.device) -> None:
    """Compare each loader's pixels with libjpeg-turbo's on a CPU, on the first training batch."""
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)

    def pixels(name: str, config: DataConfig, where: torch.device) -> Tensor:
        loader = open_loader(name, config, where, torch.float32)
        try:
            return next(iter(loader)).images.cpu() * std + mean
        finally:
            loader.close()

    wanted = pixels(ON_CORES, ways[ON_CORES], torch.device("cpu"))
    title = f"Pixels: |difference| from torchvision's CPU decoder, of 255, {len(wanted)} images"
    table = record.table(title, "loader", "mean", "99.9th percentile", "highest")
    for name, config in ways.items():
        if config.dali_full_decode in (None, SHARES[0], SHARES[-1]):
            with record.part(f"pixels of {name}"):
                found = (pixels(name, replace(config, exact_decode=True), device) - wanted).abs().flatten()
                high = found.kthvalue(round(0.999 * len(found))).values
                record.add(table, name, found.mean().item(), high.item(), found.max().item())


def measure_rates(
    record: Record, ways: dict[str, DataConfig], device: torch.device, rehearsal: bool
) -> dict[str, float]:
    """Images/s of each loader alone."""
    config, ranks = ways[ON_CORES], Ranks(0, 0, 1, 1, device)
    title = f"Loaders alone, {config.input_size} pixels, batches of {config.batch_size}, {config.workers} cores"
    table = record.table(title, "loader", "images/s")
    rates = {}
    for name, config in ways.items():
        if record.has_time(name, 0.4 if rehearsal else 5):
            with record.part(name):
                loader = open_loader(name, config, device, torch.float32 if rehearsal else torch.bfloat16)
                try:
                    rates[name] = images_per_sec(ranks, load, Feed(loader, 0), UNCOUNTED, 2 if rehearsal else 24)
                finally:
                    loader.close()
                record.add(table, name, rates[name])
            free()
    return rates


def train_from(
    record: Record, ways: dict[str, DataConfig], rates: dict[str, float], device: torch.device, rehearsal: bool
) -> None:
    """Train by the trainer's own loop with the fastest way of each backend; compare with loader and model alone."""
    columns = ("loader", "loader alone", "model alone", "together", "to the smaller of both")
    table = record.table("Training, end to end, images/s", *columns)
    best: dict[str, str] = {}
    for name in sorted(rates.keys() - {ON_CORES}, key=rates.get, reverse=True):
        best.setdefault(ways[name].backend, name)
    quotients = []
    for name in best.values():
        if record.has_time(f"training from {name}", 1 if rehearsal else 22):
            with record.part(f"training from {name}"):
                found = train_beside(record, name, ways[name], device, rehearsal)
                quotients.append(found.together / min(found.loader, found.model))
                record.add(table, name, *found, quotients[-1])
            free()
    record.target("end to end, to the smaller of loader and model, best loader", 0.97, max(quotients, default=None))


def train_beside(record: Record, name: str, data: DataConfig, device: torch.device, rehearsal: bool) -> Rates:
    """Images/s of the loader alone, the model alone and both together."""
    config = endless_run(
        device,
        arch="mobilenetv2_dcd" if rehearsal else "resnet50_dcd",
        num_classes=1000,
        data=data.root,
        backend=data.backend,
        dali_full_decode=data.dali_full_decode,
        batch_size=data.batch_size,
        input_size=data.input_size,
        workers=data.workers,
        epochs=10,
    )
    rounds, warm_up, steps = (1, 1, 2) if rehearsal else (2, UNCOUNTED, 20)
    with open_trainer(config, write_log=False) as trainer:
        feed, timer = Feed(trainer.loader, 0), StepTimer(trainer.ranks, trainer.model)
        turns = [take_turns(trainer, train, feed, warm_up, steps, timer) for _ in range(rounds)]
        record.say(f"Training from {name}: {timer.times()}.")
        timer.close()
    return median_rates(turns)
