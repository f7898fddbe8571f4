"""`train_dist.py --profile N`: time N steps of a real run, then trace a few more."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import nn

from training.config import Config
from training.distributed import Ranks
from training.profile.step_timer import TRACED_STEPS, StepTimer, StepTracer
from training.profile.verdict import Setting, find_bound
from training.run_log import RunLog, resolve, write_json
from training.step_listener import NO_LISTENER, StepListener

WARM_UP = 10  # steps before the timed ones


class RunProfile(StepListener):
    """Listens to the first steps of a run: `WARM_UP` pass, `--profile` are timed, `TRACED_STEPS` are traced on rank 0.

    After the timed steps the verdict is logged and `profile.json` is written to the output folder; after the traced
    steps, `trace.json`. If an epoch ends in between, the first wait for data of the next epoch counts, but the
    evaluation does not. The profile does not change the weights; only these steps may be slower.

    Args:
        config: with the number of steps in `run.profile`. ranks: this process among the others.
        model: the model that is trained. setting: the options that the verdict may advise to change.
        log: writes the figures.
    """

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, setting: Setting, log: RunLog):
        self._config, self._ranks, self._model, self._setting, self._log = config, ranks, model, setting, log
        self._listener = NO_LISTENER
        self._stages = self._run_stages()
        self._steps_left = next(self._stages)

    @property
    # pyrefly: ignore[bad-override]: others have an attribute
    def listens(self) -> bool:
        return self._listener.listens

    def start(self) -> None:
        self._listener.start()

    def phase(self, name: str) -> AbstractContextManager:
        return self._listener.phase(name)

    def end_step(self) -> None:
        self._listener.end_step()
        self._steps_left -= 1
        if self._steps_left == 0:
            self._steps_left = next(self._stages)
            self._listener.start()

    def close(self) -> None:
        """The run has ended; if it cut the profile short, the steps so far are reported."""
        if isinstance(self._listener, StepTimer):
            self._report(self._listener)
        elif self._steps_left > 0 and self._listener is NO_LISTENER:
            self._log.say(f"--profile: the run has ended within the {WARM_UP} steps before those that are timed")
        self._listener.close()

    def _run_stages(self) -> Iterator[float]:
        """Start the listener of each stage in turn, and yield its number of steps."""
        yield WARM_UP
        timer = self._listener = StepTimer(self._ranks, self._model)
        assert self._config.run.profile is not None
        yield self._config.run.profile
        self._report(timer)
        timer.close()
        if self._ranks.is_first:
            self._listener = StepTracer(self._log.folder / "trace.json", self._ranks.device)
            yield 1 + TRACED_STEPS
            self._listener.close()
        self._listener = NO_LISTENER
        yield float("-inf")

    def _report(self, timer: StepTimer) -> None:
        times = timer.times()
        if times is None:
            return
        verdict = find_bound(times, self._setting)
        self._log.say(f"profile: {times}")
        self._log.say(f"profile: {verdict.sentence}")
        if self._log.enabled:
            figures = {
                "images_per_sec": self._config.data.batch_size / times.step_time_s,
                "train_step": times.to_dict(),
                "bound": verdict.bound,
                "verdict": verdict.sentence,
            }
            write_json(self._log.folder / "profile.json", {**resolve(self._config, self._ranks), **figures})
