"""Steps that all ranks do together: they stop before the same one, whatever happens to one of them."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from training.distributed import LostRankError, Ranks, highest_over_ranks
from training.interruption import Interrupted, Interruption
from training.step_listener import NO_LISTENER, StepListener
from training.watchdog import WAITING, Watchdog

GO_ON, STOP, FAIL = range(3)  # what a rank wants, before a step, of all


class Stopwatch:
    """The time since the last restart, and the part of it spent waiting for data, in seconds."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start, self.waited = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def waiting(self) -> Generator[None]:
        """The body is a wait."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before


class Lockstep:
    """Hands out batches, one for each step of all ranks, until one of the ranks stops or fails.

    Args:
        ranks: this process among the others. timeout: of the watchdog, in seconds, above 0.
    """

    def __init__(self, ranks: Ranks, timeout: float):
        self.interruption = Interruption()
        self.watchdog = Watchdog(ranks, timeout, self.interruption.request_from_thread)
        self.stopped = False  # True once all ranks have agreed to stop

    def listen(self) -> None:
        """Stop at a signal from now on; in the main thread."""
        self.interruption.listen(self.watchdog.tell_stop)

    def batches(
        self,
        batches: Iterable,
        global_step: Callable[[], int],
        watch: Stopwatch,
        listener: StepListener = NO_LISTENER,
        at_most: float = float("inf"),
    ) -> Iterator:
        """The batches: one for each step, None where this rank has no images in it but another has.

        Before each step the ranks tell each other whether they have theirs. So all stop before the same step, with the
        weights that belong there, whatever happens to one of them: a signal, also while it waits for data, or an error
        in its data. At a stop `stopped` becomes True. The error is raised where it is, and LostRankError on the other
        ranks.

        Args:
            global_step: tells the watchdog where this rank is. watch: of the waits for data.
            listener: is told of these waits. at_most: this rank wants to stop after so many batches.
        """
        iterator, handed_out = iter(batches), 0
        while True:
            with watch.waiting(), listener.phase("data"):
                self.watchdog.note(global_step(), "waiting for data")
                batch, wish, error = (None, STOP, None) if handed_out >= at_most else self._next(iterator)
                self.watchdog.note(global_step(), WAITING)
                wish, has_batch = highest_over_ranks(wish, batch is not None)
            if error is not None:
                raise error
            if wish == FAIL:
                raise LostRankError("another rank has failed; its own message says why")
            self.stopped = wish == STOP
            if self.stopped or not has_batch:
                return
            self.watchdog.note(global_step(), "computing")
            handed_out += 1
            yield batch

    def _next(self, iterator: Iterator) -> tuple[tuple | None, int, Exception | None]:
        """The next batch, if there is one; what this rank wants; and why it fails, if it does."""
        try:
            with self.interruption.interruptible():
                return next(iterator, None), GO_ON, None
        except Interrupted:
            return None, STOP, None
        except Exception as error:
            self.watchdog.tell_stop()
            return None, FAIL, error
