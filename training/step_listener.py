"""The phases of a training step, and who is told about them.

The trainer says which phase it is in to a listener. `NO_LISTENER` makes no use of it, in ordinary steps; those that
take times are in `training/profile/`.

    data       the loader has no batch ready, on this rank or on another: before a step they tell each other
    copy       the batch is not on the device yet, or is brought into the model's memory format
    forward    mixup and CutMix, forward pass, loss
    backward   until this rank has its last gradient
    reduce     from then on, until the gradients are averaged over all ranks; 0 on one rank
    optimizer  gradients cleared and clipped, the optimizer's step, the moving average
    other      the rest: metrics, the log
"""

from contextlib import AbstractContextManager, nullcontext

PHASES = ("data", "copy", "forward", "backward", "reduce", "optimizer", "other")

_NOTHING = nullcontext()


class StepListener:
    """Is told by the trainer where it is in a step. This one makes no use of it, and costs next to nothing.

    Attributes:
        listens: whether it makes use of the steps now; they are then not replayed from a CUDA graph, which has no
            phases.
    """

    listens = False

    def start(self) -> None:
        """The steps of an epoch begin; a step that was not ended is forgotten."""

    def phase(self, name: str) -> AbstractContextManager:
        """The body belongs to one of `PHASES`."""
        return _NOTHING

    def end_step(self) -> None:
        """A step ends, and the next one begins."""

    def close(self) -> None:
        """No more steps will follow."""


NO_LISTENER = StepListener()
