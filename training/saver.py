"""When and what a run saves, and how it goes on from it. `training/checkpoint.py` has the files."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from training.checkpoint import Best, CheckpointWriter
from training.classes import Classes, check_same
from training.config import Config
from training.distributed import Ranks, highest_over_ranks
from training.options import ConfigError
from training.progress import Progress
from training.run_log import RunLog
from training.same_data import check_same_data
from training.train_step import TrainStep

DIVERGED = "use a lower --lr, --warmup, --clip-grad or --amp bf16; the last checkpoint is from before"


class DivergedError(RuntimeError):
    """The loss or the weights are not finite any more; the message is one line that says what to do."""


class Saver:
    """Writes checkpoints on rank 0: parameters, optimizer and statistics there are those of all.

    Args:
        config: the options. ranks: this process among the others.
        step: the weights and the optimizer. progress: where the run stands.
        classes: of the outputs. data: the fingerprint of the training images, see `pipelines.fingerprint`.
        log: is told what happens.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        step: TrainStep,
        progress: Progress,
        classes: Classes,
        data: dict[str, str],
        log: RunLog,
    ):
        self._config, self._ranks, self._step, self._progress, self._log = config, ranks, step, progress, log
        self._classes = classes
        self._data = data  # and what is known from checkpoints of other forms of the data
        self._writer = CheckpointWriter(self.path().parent, config.run.keep, log.say)
        self._last_save, self._saved = time.monotonic(), (-1, -1)  # when, and of which epoch and step

    def path(self, name: str = "last.pth") -> Path:
        """A checkpoint of the run."""
        return self._config.run.checkpoint / "checkpoints" / name

    def prepare(self) -> None:
        """Take the output folder for this run, on rank 0, and make sure that checkpoints can be written.

        Raises:
            ConfigError: another run has it, or it cannot be written to.
        """
        if self._ranks.is_first:
            self._log.claim()
            self._writer.prepare()

    @property
    def is_due(self) -> bool:
        """Whether `--checkpoint-minutes` have passed since the last checkpoint."""
        return time.monotonic() - self._last_save > 60 * self._config.run.checkpoint_minutes

    def save(self, best: Best | None = None) -> None:
        """Write a checkpoint in the background.

        One that is already there for this step is not written again: it would take the place of an older one.

        Args:
            best: this model is the best so far, and is written to best.pth as well; what its evaluation was of.

        Raises:
            DivergedError: the weights are not finite any more; the last checkpoint stays.
        """
        self._last_save = time.monotonic()
        if not self._ranks.is_first or self._is_saved():
            return
        floats = [values for values in self._step.model.state_dict().values() if values.is_floating_point()]
        if not nn.utils.get_total_norm(floats).isfinite():
            raise DivergedError(f"the weights are not finite in epoch {self._progress.epoch + 1}: {DIVERGED}")
        state = {
            "architecture": self._config.model.architecture,
            "classes": self._classes.names,  # what the outputs mean; None where the data does not say
            "preprocessing": self._config.preprocessing.to_dict(),
            "data": self._data,  # which images it was trained on
            "config": self._config.to_dict(),
            "optimizer_name": self._config.optim.optimizer,
            **self._step.state_dict(),
            **self._progress.to_dict(),
            # All of it: every draw is keyed by the seed and by (epoch, step, rank or image).
            "random_state": {"seed": self._config.run.seed, "repeats": self._config.augmentation.repeats},
        }
        self._writer.save(state, best)
        self._saved = self._progress.epoch, self._progress.step

    def _is_saved(self) -> bool:
        if self._saved != (self._progress.epoch, self._progress.step):
            return False
        self._writer.wait()
        return self._writer.failure is None

    def wait(self) -> None:
        """Until the last checkpoint is written, or has failed to be."""
        self._writer.wait()

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: it could not be.
        """
        self._writer.wait()
        if self._writer.failure is not None:
            self._log.set_state("failed")
            raise OSError(f"the last checkpoint was not written: {self._writer.failure}") from self._writer.failure

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            ConfigError: it lies in the middle of an epoch that another seed or batch size has laid out, or is of
                another optimizer.
            CheckpointError: it is of other classes or training images than the data.
        """
        saved = Classes(state["architecture"]["num_classes"], state.get("classes"))
        for note in (check_same(saved, self._classes), check_same_data(state.get("data"), self._data)):
            if note:
                self._log.say(note)
        self._data.update({what: value for what, value in (state.get("data") or {}).items() if what not in self._data})
        self._check_position(state)
        theirs, ours = state.get("optimizer_name", "sgd"), self._config.optim.optimizer  # there was no other once
        if theirs != ours:
            raise ConfigError(f"the checkpoint is of --optimizer {theirs}, this run has {ours}: use the same")
        try:
            note = self._step.load_state_dict(state)
        except ValueError as error:
            raise ConfigError(
                f"the checkpoint's optimizer has other groups ({error}): was it --no-norm-decay or --freeze?"
            ) from error
        if note:
            self._log.say(note)
        self._progress.go_to(state)

    def _check_position(self, state: dict[str, Any]) -> None:
        drawn = state["random_state"]
        ours = self._config.run.seed, self._progress.steps_per_epoch, self._config.augmentation.repeats
        theirs = drawn["seed"], state["steps_per_epoch"], drawn.get("repeats", 1)  # there was no other once
        if state["step"] and theirs != ours:
            raise ConfigError(
                f"the checkpoint stands in the middle of an epoch of {theirs[1]} steps with --seed {theirs[0]} and "
                f"--repeats {theirs[2]}, this run has {ours[1]} steps, --seed {ours[0]} and --repeats {ours[2]}: "
                "use the same --batch-size, --seed, --repeats and data"
            )

    def check_start(self) -> None:
        """All ranks must begin in the same place.

        Raises:
            ConfigError: on every rank, where one has found another checkpoint than the others, or none.
        """
        here = self._progress.epoch, self._progress.step
        epoch, step, least_epoch, least_step = highest_over_ranks(*here, -here[0], -here[1])
        if (epoch, step) != (-least_epoch, -least_step):
            raise ConfigError(
                f"rank {self._ranks.rank} would go on from epoch {here[0] + 1}, step {here[1]}, another one from "
                f"elsewhere: {self._config.run.checkpoint} must be the same folder on every machine"
            )
