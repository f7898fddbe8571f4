"""The options by which a program that takes a checkpoint is told what that does not say."""

from dataclasses import dataclass
from typing import Annotated, Any

from training.command_line import CHOICES, Choice


@dataclass(frozen=True)
class CheckpointOptions:
    """What the checkpoint does not say."""

    arch: Annotated[str | None, "-a"] = None
    """Name of the model, where the checkpoint does not say it."""
    width_mult: float | None = None
    """Width multiplier of mobilenetv2 and mobilenetv2_dcd, likewise."""
    fc_squeeze: int | None = None
    """Divides the width of the coefficient branch of mobilenetv2_dcd, likewise."""
    ema: Choice = "auto"
    """Take the moving average of the weights; auto: what best.pth was chosen by, and else the weights."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For `dcd.load`."""
        return {**vars(self), "ema": CHOICES[self.ema]}


SAYS_ALL = CheckpointOptions()  # for a checkpoint that does
