"""Signals that ask a run to stop: from a batch system that takes the machine back, or from a user."""

import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Thread, main_thread

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A thread wakes the main thread by this signal. It is none of SIGNALS, for the request of another rank must not count
# as the first of two signals.
WAKE = signal.SIGURG
# Ctrl-C reaches torchrun and the ranks, and torchrun then sends a signal, too: two within this time are one request.
SAME_REQUEST_S = 2.0


class Interrupted(BaseException):
    """A signal has ended a wait."""


class Interruption:
    """Whether this process has been asked to stop.

    The first signal is a request: `requested` is True from then on, and a wait in `interruptible` ends. Another signal,
    at least `SAME_REQUEST_S` later, ends the process at once. A thread waits for that one, because a main thread that
    waits for another rank runs no signal handler.
    """

    def __init__(self):
        self.requested = False
        self._waiting = False
        self._written = -1

    def listen(self, on_first: Callable[[], None]) -> None:
        """Take over the signals; in the main thread.

        Args:
            on_first: is called by a thread at the first signal, at once, even while the main thread waits for others.
        """
        read, self._written = os.pipe()
        os.set_blocking(self._written, False)
        signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        # A forked process shares the pipe: a signal to it, as at its end, would count as one to this process.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        Thread(target=_end_at_the_second, args=(read, on_first), daemon=True).start()
        for number in (*SIGNALS, WAKE):
            signal.signal(number, self.request)

    def request(self, *_) -> None:
        """Ask for a stop; the handler of the signals."""
        self.requested = True
        if self._waiting:
            raise Interrupted

    def request_from_thread(self) -> None:
        """Ask for a stop, as another rank wants it; from any thread, and only where this process listens."""
        if self._written >= 0 and not self.requested:
            # pyrefly: ignore[bad-argument-type]: it runs, and has an identity
            signal.pthread_kill(main_thread().ident, WAKE)

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """A request ends the body by raising `Interrupted`."""
        try:
            self._waiting = True
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._waiting = False


def _end_at_the_second(wakeup: int, on_first: Callable[[], None]) -> None:
    """Read the numbers of signals as they arrive."""
    first = None
    while True:
        number = os.read(wakeup, 1)[0]
        if number not in SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
            Thread(target=on_first, daemon=True).start()  # it may have to wait; the second signal must not
        elif now - first > SAME_REQUEST_S:
            os._exit(128 + number)
