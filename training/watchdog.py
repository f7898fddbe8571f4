"""Ends a run that makes no progress, names the rank that hangs and shows where; tells the ranks when one wants to stop.

The main thread of each rank notes what it does (`note`). A second thread writes the note into the store of the process
group every few seconds, and a third one watches the time. A rank that is halted, or whose machine is lost, writes
nothing more. If all ranks still write, the one that hangs is the one that does not wait for others.
"""

import faulthandler
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from signal import SIGUSR2
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from training.distributed import Ranks

WAITING = "waiting for the other ranks"
STOP_KEY = "watchdog/stop"


@dataclass(frozen=True)
class Note:
    """What a rank does. step: the optimizer step since the beginning of the run. written: number of notes so far."""

    step: int
    doing: str
    written: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


class Watchdog:
    """Watches over the main thread while the `with` block lasts.

    Args:
        ranks: this process among the others.
        timeout: after so many seconds (above 0) without a `note` the process ends with exit code 1, one line, and where
            its threads and its loading processes are.
        on_stop: called by a thread, repeatedly, once another rank has said that all should stop.
    """

    def __init__(self, ranks: Ranks, timeout: float, on_stop: Callable[[], None]):
        self._ranks, self._timeout, self._on_stop = ranks, timeout, on_stop
        self._interval = min(2.0, timeout / 16)
        self._note, self._noted = Note(0, "starting"), time.monotonic()
        self._closed = Event()
        # A connection for each thread: a client that waits for an answer blocks other threads.
        self._stores = [_store().clone() for _ in range(2)] if ranks.world_size > 1 else []

    def note(self, step: int, doing: str) -> None:
        """Called by the main thread at each progress: what it does now."""
        self._note, self._noted = Note(step, doing), time.monotonic()

    def tell_stop(self) -> None:
        """Tell the other ranks that this one wants to stop; a rank that waits for data does not reach the next step."""
        if self._stores:
            with suppress(RuntimeError):  # the store is gone, and then the other ranks are gone too
                self._stores[0].set(STOP_KEY, "")

    def __enter__(self) -> "Watchdog":
        self.note(self._note.step, self._note.doing)
        for target in (self._write, self._watch) if self._stores else (self._watch,):
            Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def _write(self) -> None:
        """Repeatedly put this rank's note into the store and look for a stop; ends when the store is gone."""
        written = 0
        while not self._closed.wait(self._interval if written else 0):
            written += 1
            note = Note(self._note.step, self._note.doing, written)
            try:
                self._stores[0].set(f"watchdog/{self._ranks.rank}", json.dumps(asdict(note)))
                if self._stores[0].check([STOP_KEY]):
                    self._on_stop()
            except RuntimeError:
                return

    def _watch(self) -> None:
        # At 0.75 of the timeout, because finding the culprit takes time too.
        while not self._closed.wait(self._interval):
            if time.monotonic() - self._noted > 0.75 * self._timeout:
                culprit = self._find_culprit()
                if time.monotonic() - self._noted > 0.75 * self._timeout and not self._closed.is_set():
                    break
        else:
            return
        print(
            f"rank {self._ranks.rank}: error: no progress for {time.monotonic() - self._noted:.0f} s "
            f"({self._note}); {culprit}: the same command goes on from the last checkpoint "
            f"(--timeout {self._timeout:g})",
            file=sys.stderr,
            flush=True,
        )
        _show_where()
        os._exit(1)  # no exception would reach the main thread where it hangs

    def _find_culprit(self) -> str:
        """What hangs, in words."""
        if not self._stores:
            return "this rank hangs"
        answers: list[dict[int, Note]] = []
        # The store may be on a machine that is out of reach; then a request to it never returns.
        inquiry = Thread(target=self._ask, args=(answers,), daemon=True)
        inquiry.start()
        inquiry.join(3 * self._interval)
        if len(answers) < 2:
            return "the machine where the ranks meet is out of reach"
        before, after = answers
        silent = [rank for rank in range(self._ranks.world_size) if before.get(rank) == after.get(rank)]
        busy = [rank for rank, note in after.items() if note.doing != WAITING]
        last = min(note.step for note in after.values()) if after else 0
        behind = [rank for rank in busy or after if after[rank].step == last]
        suspects = silent or behind or busy
        names = "; ".join(
            f"rank {rank} {'is silent' if rank in silent else 'hangs'} ({after.get(rank, 'has never written')})"
            for rank in suspects[:5]
        )
        return names + (f" and {len(suspects) - 5} more" if len(suspects) > 5 else "")

    def _ask(self, answers: list[dict[int, Note]]) -> None:
        """Read all notes twice, with a pause in which every rank must have written."""
        store = self._stores[1]
        for pause in (2 * self._interval, 0):
            found = {}
            for rank in range(self._ranks.world_size):
                if store.check([f"watchdog/{rank}"]):
                    found[rank] = Note(**json.loads(store.get(f"watchdog/{rank}")))
            answers.append(found)
            time.sleep(pause)


def _show_where() -> None:
    """Print the stacks of this process's threads, and have its loading processes print theirs, one after another."""
    faulthandler.dump_traceback(file=2)
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, SIGUSR2)
        time.sleep(0.2)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # private, but the one that all ranks have already
