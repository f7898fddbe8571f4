"""Rates of a run's loader alone, of its model alone, and of both together, by the trainer's own loops."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from pipelines.batch import Batch
from pipelines.loader import Loader
from tools.profiling.timing import wait
from training.distributed import Ranks, barrier, sum_over_ranks
from training.options import ConfigError
from training.profile.verdict import Rates
from training.step_listener import NO_LISTENER, StepListener
from training.trainer import Trainer

# Without a learning rate the same batch can be trained on for ever; no log, so that no step waits for the device.
ENDLESS = {"lr": 0.0, "print_freq": 10**9, "checkpoint_minutes": 1e9, "stop_after_steps": None}
WARM_UP = 2  # steps of the model before each window


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
    """The next `steps` of some batches. `images` counts what was handed out."""

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
    """Train on the batches, as in the last epoch."""
    trainer.progress.epoch, trainer.progress.step = trainer.config.optim.epochs - 1, 0
    trainer.train_on(window, listener)


def evaluate(trainer: Trainer, window: Window, listener: StepListener = NO_LISTENER) -> None:
    """Evaluate on the batches."""
    trainer.evaluator.evaluate(batches=window)


def images_per_sec(
    ranks: Ranks,
    consume: Callable[[Window, StepListener], None],
    batches: Iterable[Batch],
    warm_up: int,
    steps: int,
    listener: StepListener = NO_LISTENER,
) -> float:
    """The rate of all ranks together, each until the slowest is done. The listener hears the counted steps."""
    iterator = iter(batches)
    consume(Window(iterator, warm_up), NO_LISTENER)
    window = Window(iterator, steps)
    _meet(ranks)
    start = time.perf_counter()
    consume(window, listener)
    _meet(ranks)
    seconds = time.perf_counter() - start
    return sum_over_ranks(torch.tensor(window.images / seconds, dtype=torch.float64, device=ranks.device)).item()


def take_turns(
    trainer: Trainer,
    consume: Callable[[Trainer, Window, StepListener], None],
    feed: Feed,
    loading: int,
    steps: int,
    listener: StepListener = NO_LISTENER,
) -> Rates:
    """The model alone, on one batch again and again, the loader alone, and both together, in windows of `steps`.

    Args:
        consume: `train` or `evaluate`. loading: batches of the loader before its windows. listener: hears of the steps
            of both together.
    """
    ranks, compute = trainer.ranks, partial(consume, trainer)
    model = images_per_sec(ranks, compute, itertools.repeat(feed.first), WARM_UP, steps)
    loader = images_per_sec(ranks, load, feed, loading, steps)
    feed.rest()
    together = images_per_sec(ranks, compute, feed, loading, steps, listener)
    feed.rest()
    return Rates(loader, model, together)


def median_rates(turns: Iterable[Rates]) -> Rates:
    return Rates(*map(statistics.median, zip(*turns, strict=True)))


def _meet(ranks: Ranks) -> None:
    wait(ranks.device)
    barrier()
