"""What bounds a training run: the rates of the loader, of the model and of both together, and the phases of a step.

    python -m tools.profile_throughput -a resnet50_dcd -d DATA
    torchrun --nproc-per-node=4 -m tools.profile_throughput -a resnet50_dcd -d DATA -b 256 -j 48 --json out.json

It takes the options of train_dist.py, and measures that run as it is in its last epoch: full size of the images, mixup
as strong as it gets. Each figure is the median of several windows of a few steps; loader, model and both together take
turns, in training and in evaluation, so that whatever else the machine does falls on all. Model and both together go
through the trainer's own loops; the model alone gets one batch again and again.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pipelines.batch import Batch
from pipelines.loader import Loader
from training.build import errors_in_one_line, find_setting, open_trainer
from training.config import Config, parse_config
from training.distributed import Ranks, barrier, sum_over_ranks
from training.options import ConfigError
from training.precision import autocast_dtype
from training.profile.step_timer import TRACED_STEPS, StepTimer, StepTimes, StepTracer
from training.profile.verdict import Rates, find_bound
from training.recipes import RECIPES
from training.run_log import device_name, resolve, write_json
from training.step_listener import NO_LISTENER, StepListener
from training.trainer import Trainer

WARM_UP = 2  # steps before each window


@dataclass(frozen=True)
class ThroughputConfig(Config):
    """Measure what bounds a run: `python -m tools.profile_throughput -a ARCH -d DATA ...`, or by torchrun."""

    # --- the measurement ---
    windows: int = 5
    """Turns of loader, model and both together: a figure is the median of so many."""
    window_steps: int | None = None
    """Steps in a window; by default 10, or twice the workers of a rank if that is more."""
    trace: Path | None = None
    """Write a Chrome trace of three training steps to this file."""
    json: Path | None = None
    """Write the figures to this file."""

    def __post_init__(self):
        super().__post_init__()
        for flag, value in (("windows", self.windows), ("window-steps", self.window_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"--{flag} {value}: must be at least 1")
        for flag, path in (("trace", self.trace), ("json", self.json)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise ConfigError(f"--{flag} {path}: must be a file in a folder that exists")


class Feed:
    """The batches of a loader without an end, epoch after epoch. `first` is one of them."""

    def __init__(self, loader: Loader, epoch: int):
        self._loader = loader
        loader.set_epoch(epoch)
        if not len(loader):
            raise ConfigError(f"rank {loader.rank} gets none of {loader.num_samples} images: use fewer ranks")
        self.first = next(iter(loader))
        self.rest()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._loader
            self._loader.set_epoch(self._loader.epoch + 1)

    def rest(self) -> None:
        """End what the loader makes ahead, so that it takes nothing from what is measured next, nor gives to it.

        It then goes on behind the batches that it has handed out.
        """
        position = self._loader.state_dict()
        self._loader.load_state_dict({"epoch": position["epoch"], "step": self._loader.steps_per_epoch})
        for _ in self._loader:  # nothing is left of this epoch
            pass
        self._loader.load_state_dict(position)


class Window:
    """Stands in for a loader: the next `steps` of some batches. `images` counts what was handed out."""

    def __init__(self, batches: Iterator[Batch], steps: int):
        self._batches, self._steps = batches, steps
        self.images = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.islice(self._batches, self._steps):
            self.images += len(batch.labels)
            yield batch


def load(window: Window, listener: StepListener = NO_LISTENER) -> None:
    """Take the batches, and do nothing with them."""
    for _ in window:
        pass


def train(trainer: Trainer, window: Window, listener: StepListener = NO_LISTENER) -> None:
    """Train on the batches."""
    trainer.progress.epoch, trainer.progress.step = trainer.config.optim.epochs - 1, 0
    trainer.train_on(window, listener)


def evaluate(trainer: Trainer, window: Window, listener: StepListener = NO_LISTENER) -> None:
    """Evaluate on the batches."""
    trainer.evaluator.evaluate(batches=window)


def images_per_sec(
    trainer: Trainer,
    consume: Callable[[Window, StepListener], None],
    batches: Iterable[Batch],
    warm_up: int,
    steps: int,
    listener: StepListener = NO_LISTENER,
) -> float:
    """The rate of all ranks together, each until the slowest is done. `listener` hears of steps after `warm_up`."""
    iterator, ranks = iter(batches), trainer.ranks
    consume(Window(iterator, warm_up), NO_LISTENER)
    window = Window(iterator, steps)
    _meet(ranks)
    start = time.perf_counter()
    consume(window, listener)
    _meet(ranks)
    seconds = time.perf_counter() - start
    return sum_over_ranks(torch.tensor(window.images / seconds, dtype=torch.float64, device=ranks.device)).item()


def _meet(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    barrier()


def measure(trainer: Trainer, train_feed: Feed, eval_feed: Feed) -> tuple[dict[str, dict[str, list[float]]], StepTimes]:
    """Images/s in each window, {"train" or "eval": {"loader", "model" or "together": rates}}; and the steps' times."""
    config, workers = trainer.config, trainer.config.data.rank_workers(trainer.ranks.local_world_size)
    steps = config.window_steps or max(10, 2 * workers)
    loading = WARM_UP + workers  # each worker may make a batch of its own, and then the first of all come at once
    timer = StepTimer(trainer.ranks, trainer.model)
    modes = {
        "train": (train_feed, partial(train, trainer), timer),
        "eval": (eval_feed, partial(evaluate, trainer), NO_LISTENER),
    }
    rates = {mode: {"loader": [], "model": [], "together": []} for mode in modes}
    for _ in tqdm(range(config.windows), desc="turns", disable=not (trainer.ranks.is_first and sys.stderr.isatty())):
        for mode, (feed, compute, listener) in modes.items():
            alone = itertools.repeat(feed.first)
            rates[mode]["model"].append(images_per_sec(trainer, compute, alone, WARM_UP, steps))
            rates[mode]["loader"].append(images_per_sec(trainer, load, feed, loading, steps))
            feed.rest()
            rates[mode]["together"].append(images_per_sec(trainer, compute, feed, loading, steps, listener))
            feed.rest()
    times = timer.times()
    timer.close()
    return rates, times


def write_trace(trainer: Trainer, feed: Feed, path: Path) -> None:
    """The trace of rank 0; the others take part in its steps."""
    listener = StepTracer(path, trainer.ranks.device) if trainer.ranks.is_first else NO_LISTENER
    train(trainer, Window(iter(feed), 1 + TRACED_STEPS), listener)
    listener.close()


def table(rates: dict[str, Rates]) -> str:
    """The rates in Markdown."""
    lines = ["| images/s | loader alone | model alone | together |", "|---|---|---|---|"]
    for mode, title in (("train", "training"), ("eval", "evaluation")):
        lines.append(f"| {title} | {' | '.join(f'{rate:,.1f}' for rate in rates[mode])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Parse, measure, report on rank 0."""
    config = parse_config(argv, RECIPES, ThroughputConfig(), "python -m tools.profile_throughput")
    # Without a learning rate the same batch can be trained on for ever; no log, so that no step waits for the device.
    config = config.with_options(
        evaluate=False, lr=0.0, print_freq=10**9, checkpoint_minutes=1e9, stop_after_steps=None
    )
    with open_trainer(config, write_log=False) as trainer:
        config, ranks = trainer.config, trainer.ranks
        train_feed, eval_feed = Feed(trainer.loader, config.optim.epochs - 1), Feed(trainer.evaluator.loader, 0)
        windows, times = measure(trainer, train_feed, eval_feed)
        if config.trace is not None:
            write_trace(trainer, train_feed, config.trace)
        if not ranks.is_first:
            return
        rates = {
            mode: Rates(**{part: statistics.median(found) for part, found in parts.items()})
            for mode, parts in windows.items()
        }
        verdict = find_bound(times, find_setting(config, ranks), rates["train"])
        precision = autocast_dtype(config.precision.amp, ranks.device) or "fp32"
        print(f"{device_name(ranks.device)}, world size {ranks.world_size}")
        print(f"{config.model.arch}, batch {config.data.batch_size}, {config.data.input_size} pixels, {precision}")
        print(f"\n{table(rates)}\n\n{times}\n\n{verdict.sentence}")
        if config.json is not None:
            figures = {
                "images_per_sec": {mode: each._asdict() for mode, each in rates.items()},
                "images_per_sec_of_windows": windows,
                "train_step": times.to_dict(),
                "bound": verdict.bound,
                "verdict": verdict.sentence,
            }
            write_json(config.json, {**resolve(config, ranks), **figures})


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
