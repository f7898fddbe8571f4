"""`--dry-run`: build a run as it is meant, say what it is, and time ten of its steps on synthetic images.

The data is opened, and model and optimizer are built, so what is wrong with them is found here. Nothing is written to
the output folder.
"""

from collections.abc import Iterator
from datetime import timedelta
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from training.config import Config
from training.distributed import highest_over_ranks
from training.lockstep import Stopwatch
from training.options import ConfigError
from training.progress import Progress
from training.step_graph import WARM_UP as BEFORE_RECORDING
from training.trainer import Trainer

STEPS = 10  # that are timed
WARM_UP = 3  # steps before: algorithms are chosen, blocks compiled, memory allocated


def dry_run(trainer: Trainer) -> None:
    """Print on rank 0 what the run is, its memory, its rate and the time that it would take.

    Raises:
        ConfigError: a step does not fit into the GPU's memory.
    """
    say, config, batch_size = trainer.log.say, trainer.config, trainer.config.data.batch_size
    say("options other than the defaults:")
    for name, value in changed_options(config).items():
        say(f"  {name}: {value}")
    for line in _parts(trainer):
        say(line)
    size = config.data.largest_size(training=True)
    try:
        seconds = _time_steps(trainer, _synthetic_batch(trainer, size))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {batch_size} images does not fit into the GPU's memory: use a smaller --batch-size, more "
            f"--accumulate, or more ranks ({str(error).splitlines()[0]})"
        ) from error
    say(f"memory: {_memory(trainer)}")
    say(
        f"rate: {batch_size * STEPS / seconds:.4g} images/s, world size {trainer.ranks.world_size}: {STEPS} steps of "
        f"{batch_size} synthetic images, {size} x {size} pixels"
    )
    whole_run = timedelta(seconds=round(seconds / STEPS * trainer.progress.steps_per_epoch * config.optim.epochs))
    say(f"time: {whole_run} (h:min:s) for all steps at this rate; loading, evaluations and checkpoints come on top")


def changed_options(config: Config) -> dict[str, Any]:
    """The options that differ from the defaults, but for --dry-run itself."""
    defaults = Config().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != defaults[name] and name != "dry_run"}


def _parts(trainer: Trainer) -> Iterator[str]:
    """A line for each: data, steps, model, and where the run would begin."""
    config, train, val = trainer.config, trainer.loader, trainer.evaluator.loader
    steps, epochs, parameters = trainer.progress.steps_per_epoch, config.optim.epochs, [*trainer.model.parameters()]
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    yield f"data: {train.num_samples} images to train, {val.num_samples} to evaluate, {len(val.classes)} classes"
    yield f"steps: {steps} in an epoch, {steps * epochs} in {epochs} epochs, of {config.data.batch_size} images"
    yield f"model: {config.model.arch}, {sum(each.numel() for each in parameters)} parameters, {trained} to train"
    found = config.run.resume or trainer.saver.path()
    yield f"start: {f'the run would go on from {found}' if found.exists() else 'the first step'}"


def _synthetic_batch(trainer: Trainer, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's images of a step (N, 3, size, size), normally distributed, labels (N,) and indices (N,)."""
    count, device = trainer.config.data.batch_size // trainer.ranks.world_size, trainer.ranks.device
    dtype = trainer.train_step.precision.dtype or torch.float32
    images = torch.randn(count, 3, size, size, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    num_classes = trainer.config.model.num_classes
    assert num_classes is not None
    labels = torch.randint(num_classes, (count,), device=device)
    return images, labels, torch.arange(count)


def _time_steps(trainer: Trainer, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds for `STEPS` steps on this batch, on the slowest rank, after a warm-up. The model is spoilt by them."""
    device, train_step, progress = trainer.ranks.device, trainer.train_step, Progress(trainer.progress.steps_per_epoch)
    replayed = trainer.config.precision.cuda_graphs and device.type == "cuda"
    warm_up = BEFORE_RECORDING + WARM_UP if replayed else WARM_UP
    batches, watch = repeat(batch, warm_up + STEPS), Stopwatch()
    train_step.begin_epoch()
    trainer.log.start_epoch("dry run", warm_up + STEPS, 0)
    for each in trainer.lockstep.batches(batches, lambda: progress.global_step, watch):
        if progress.step == warm_up:
            _wait(device)
            watch.restart()
        train_step(each, progress)
        progress.step += 1
        trainer.log.advance()
    _wait(device)
    seconds = watch.seconds
    trainer.log.end_epoch()
    return highest_over_ranks(round(1e6 * seconds))[0] / 1e6


def _memory(trainer: Trainer) -> str:
    """The peak of the rank that has taken most."""
    gib, device = highest_over_ranks(trainer.peak_memory)[0] / 2**30, trainer.ranks.device
    if device.type == "cpu":
        return f"{gib:.2f} GiB resident, the peak of a rank's process without its loading processes"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{gib:.2f} of the GPU's {total:.2f} GiB allocated, the peak of a rank"


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
