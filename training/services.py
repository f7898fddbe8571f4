"""Weights & Biases and MLflow: the same figures and options as in the run's own files, for who has them installed.

A service never stops a run, nor makes it wait: a thread of its own talks to it, what it does not take is counted, and
the first failure is said in one line. Where the service is, and under which project, is set by its own environment
variables (WANDB_MODE, WANDB_PROJECT; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME).
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from training.options import ConfigError

PATIENCE_S = 10.0  # at the end of a run, for what a service has not taken yet


class Client(Protocol):
    """What is asked of a service. Each call may take long, and may raise anything."""

    def start(self, folder: Path, run_id: str | None, resolved: dict[str, Any]) -> str:
        """Begin a run, or go on with one that the service knows by this id. Returns its id."""

    def sent(self, name: str) -> float:
        """The last value of a figure that the service has of this run; -1 where it has none."""

    def send(self, figures: dict[str, float], global_step: int) -> None: ...

    def finish(self) -> None: ...


class WandB:
    """Weights & Biases. Its own files go into the run's output folder."""

    def start(self, folder: Path, run_id: str | None, resolved: dict[str, Any]) -> str:
        import wandb

        project, name = os.environ.get("WANDB_PROJECT", "dcd"), folder.absolute().name
        about = {"config": resolved, "allow_val_change": True}  # a run may go on with other options
        self._run = wandb.init(project=project, name=name, dir=str(folder), id=run_id, resume="allow", **about)
        for kind in ("train", "eval", "eval_ema"):
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/global_step")
        return self._run.id

    def sent(self, name: str) -> float:
        return self._run.summary.get(name, -1)

    def send(self, figures: dict[str, float], global_step: int) -> None:
        self._run.log(figures)  # its own step must rise, which that of two kinds of lines does not

    def finish(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow."""

    def start(self, folder: Path, run_id: str | None, resolved: dict[str, Any]) -> str:
        import mlflow

        self._mlflow = mlflow
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.absolute().name)
        if run_id is None:  # its parameters can't change; config.json has those of now
            options = list(resolved.get("config", {}).items())
            for start in range(0, len(options), 100):  # it takes no more at a time
                mlflow.log_params(dict(options[start : start + 100]))
            mlflow.log_dict(resolved, "config.json")
        self._known = mlflow.get_run(run.info.run_id).data.metrics
        return run.info.run_id

    def sent(self, name: str) -> float:
        return self._known.get(name, -1)

    def send(self, figures: dict[str, float], global_step: int) -> None:
        self._mlflow.log_metrics(figures, step=global_step)

    def finish(self) -> None:
        self._mlflow.end_run()


CLIENTS: dict[str, Callable[[], Client]] = {"wandb": WandB, "mlflow": MLflow}


def check_installed(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a service whose package is not there."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, such as wandb makes, is no package
            raise ConfigError(f"--{name} needs the package {name}: pip install {name}")


class Service:
    """One service, in a thread of its own; no method raises or waits, but for `close`, which waits for PATIENCE_S.

    Args:
        name: a key of CLIENTS. folder: the output folder. run_id: of the run that goes on, or None.
        resolved: all of config.json. remember: is told the run's id. say: is told in one line what has failed.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        run_id: str | None,
        resolved: dict[str, Any],
        remember: Callable[[str], None],
        say: Callable[[str], None],
    ):
        self.name, self._say, self._remember = name, say, remember
        self._client = CLIENTS[name]()
        self._about = folder, run_id, resolved
        self._queue: SimpleQueue[tuple[str, dict[str, float], int] | None] = SimpleQueue()
        self._given = self._taken = 0  # lines of the log
        self._failed = False
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def add(self, kind: str, values: dict[str, float], global_step: int) -> None:
        """Figures, under `kind`."""
        self._given += 1
        self._queue.put((kind, values, global_step))

    def close(self) -> None:
        """Wait a little for what is still to be sent, and say what was not."""
        self._queue.put(None)
        self._thread.join(PATIENCE_S)
        lost = self._given - self._taken
        if lost:
            self._say(f"warning: {lost} of {self._given} lines of the log did not reach {self.name}")
        elif self._thread.is_alive():
            self._say(f"warning: {self.name} has taken the whole log, and has not ended after {PATIENCE_S:.0f} s")

    def _work(self) -> None:
        started = self._try(self._start)
        while (line := self._queue.get()) is not None:
            if started and self._try(lambda line=line: self._send(*line)):
                self._taken += 1
        if started:
            self._try(self._client.finish)

    def _start(self) -> None:
        self._remember(self._client.start(*self._about))
        self._sent = {kind: self._client.sent(f"{kind}/global_step") for kind in ("train", "eval", "eval_ema")}

    def _send(self, kind: str, values: dict[str, float], global_step: int) -> None:
        if global_step > self._sent.get(kind, -1):  # a step that is done again is there already
            figures = {f"{kind}/{name}": value for name, value in values.items()}
            self._client.send({**figures, f"{kind}/global_step": global_step}, global_step)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:
            if not self._failed:
                what = " ".join(str(error).split()) or "no reason given"
                self._say(f"warning: {self.name} fails ({type(error).__name__}: {what}); the run goes on without")
            self._failed = True
            return False
        return True
