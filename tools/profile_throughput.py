"""What bounds a training run: the rates of the loader, of the model and of both together, and the phases of a step.

    python -m tools.profile_throughput -a resnet50_dcd -d DATA
    torchrun --nproc-per-node=4 -m tools.profile_throughput -a resnet50_dcd -d DATA -b 256 -j 48 --json out.json

It takes the options of train_dist.py, and measures that run as it is in its last epoch: full size of the images, mixup
as strong as it gets. Each figure is the median of several windows of a few steps; loader, model and both together take
turns, in training and in evaluation, so that whatever else the machine does falls on all. Model and both together go
through the trainer's own loops; the model alone gets one batch again and again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tools.profiling.feed import ENDLESS, WARM_UP, Feed, Window, evaluate, median_rates, take_turns, train
from tools.profiling.machine import describe_machine
from tools.profiling.report import markdown_table, write_report
from training.build import errors_in_one_line, find_setting, open_trainer
from training.config import Config, parse_config
from training.options import ConfigError
from training.precision import autocast_dtype
from training.profile.step_timer import TRACED_STEPS, StepTimer, StepTimes, StepTracer
from training.profile.verdict import Rates, find_bound
from training.recipes import RECIPES
from training.run_log import resolve, write_json
from training.step_listener import NO_LISTENER
from training.trainer import Trainer


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
        if self.precision.cuda_graphs:
            raise ConfigError(
                "--cuda-graphs: a graph has no phases to time: leave it out; train_dist.py logs the images/s with it"
            )
        if self.run.dry_run:
            raise ConfigError("--dry-run is of train_dist.py: leave it out")
        for flag, value in (("windows", self.windows), ("window-steps", self.window_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"--{flag} {value}: must be at least 1")
        for flag, path in (("trace", self.trace), ("json", self.json)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise ConfigError(f"--{flag} {path}: must be a file in a folder that exists")


def measure(trainer: Trainer) -> tuple[dict[str, list[Rates]], StepTimes]:
    """The rates in each turn, of "train" and "eval", and the times of the training steps. Writes the trace, too."""
    config, ranks = trainer.config, trainer.ranks
    assert isinstance(config, ThroughputConfig)
    workers = config.data.rank_workers(ranks.local_world_size)
    steps = config.window_steps or max(10, 2 * workers)
    loading = WARM_UP + workers  # each worker may make a batch of its own, and then the first of all come at once
    train_feed, eval_feed = Feed(trainer.loader, config.optim.epochs - 1), Feed(trainer.evaluator.loader, 0)
    timer = StepTimer(ranks, trainer.model)
    turns: dict[str, list[Rates]] = {"train": [], "eval": []}
    for _ in tqdm(range(config.windows), desc="turns", disable=not (ranks.is_first and sys.stderr.isatty())):
        turns["train"].append(take_turns(trainer, train, train_feed, loading, steps, timer))
        turns["eval"].append(take_turns(trainer, evaluate, eval_feed, loading, steps))
    times = timer.times()
    assert times is not None
    timer.close()
    if config.trace is not None:  # of rank 0; the others take part in its steps
        tracer = StepTracer(config.trace, ranks.device) if ranks.is_first else NO_LISTENER
        train(trainer, Window(iter(train_feed), 1 + TRACED_STEPS), tracer)
        tracer.close()
    return turns, times


def main(argv: list[str]) -> None:
    """Measure the run that the command line describes."""
    report(parse_config(argv, RECIPES, ThroughputConfig(), "python -m tools.profile_throughput"))


def report(config: ThroughputConfig) -> None:
    """Measure, and report on rank 0."""
    with open_trainer(config.with_options(evaluate=False, **ENDLESS), write_log=False) as trainer:
        assert isinstance(trainer.config, ThroughputConfig)
        config, ranks = trainer.config, trainer.ranks
        turns, times = measure(trainer)
        if not ranks.is_first:
            return
        rates = {mode: median_rates(found) for mode, found in turns.items()}
        verdict = find_bound(times, find_setting(config, ranks), rates["train"])
        precision = autocast_dtype(config.precision.amp, ranks.device) or "fp32"
        settings = {**describe_machine(ranks.device), "world size": ranks.world_size, "arch": config.model.arch}
        settings |= {"batch": config.data.batch_size, "pixels": config.data.input_size, "precision": precision}
        heads = ("images/s", "loader alone", "model alone", "together")
        table = markdown_table(heads, [("training", *rates["train"]), ("evaluation", *rates["eval"])])
        write_report(None, settings, [table, str(times), verdict.sentence])
        if config.json is not None:
            figures = {
                "images_per_sec": {mode: each._asdict() for mode, each in rates.items()},
                "images_per_sec_of_windows": {
                    mode: dict(zip(Rates._fields, map(list, zip(*found, strict=True)), strict=True))
                    for mode, found in turns.items()
                },
                "train_step": times.to_dict(),
                "bound": verdict.bound,
                "verdict": verdict.sentence,
            }
            write_json(config.json, {**resolve(config, ranks), **figures})


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
