"""Where a run stands."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """What a checkpoint keeps beside the weights and the optimizer. Training goes on with this step of this epoch.

    Everything random in a step follows from (seed, epoch, step, rank), and the loaders' state is (epoch, step), so this
    is all that a run needs in order to go on as if never stopped.

    best_top1: in percent, -1 before the first evaluation that counts. bad_steps: whose loss or gradient was not finite.
    """

    steps_per_epoch: int
    epoch: int = 0
    step: int = 0
    best_top1: float = -1.0
    best_epoch: int = -1
    bad_steps: int = 0

    @property
    def global_step(self) -> int:
        """Optimizer steps since the beginning of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def epochs_done(self) -> float:
        """Epochs since the beginning of the run, with the fraction of this one."""
        return self.epoch + self.step / self.steps_per_epoch

    def to_dict(self) -> dict[str, int | float]:
        """For a checkpoint."""
        return asdict(self)

    def go_to(self, state: dict[str, Any]) -> None:
        """Stand where the run of a checkpoint stood."""
        for name in ("epoch", "step", "best_top1", "best_epoch"):
            setattr(self, name, state[name])
        self.bad_steps = state.get("bad_steps", 0)  # older checkpoints do not count them
