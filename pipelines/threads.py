"""Threads that work ahead or side by side, and that never keep a program from ending.

A thread may be in a read that never returns, from a dead network disk or a pipe that nobody writes to. So all threads
are daemons: Python does not wait for them at its end, as it does for those of `concurrent.futures`, and who stops them
waits for a limited time. Their queues are `SimpleQueue`s, which hold no lock in Python: a signal handler may raise
while the main thread waits for one, and the queue stays whole.
"""

from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

PATIENCE_S = 2.0  # how long a thread that was told to end is waited for


def in_background(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """The items, made in a thread of their own, which is at most `ahead` items ahead.

    An error in that thread is raised here, after the items before it. Closing this generator closes `items` and ends
    the thread; a thread that does not end within `PATIENCE_S` is left behind, with `items` not closed.
    """
    results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    free_places: SimpleQueue[None] = SimpleQueue()  # one entry for each item that may be made
    for _ in range(ahead):
        free_places.put(None)
    stopped = False

    def fill() -> None:
        error = None
        try:
            for item in items:
                free_places.get()
                if stopped:
                    break
                results.put((item, None))
                del item  # so that only the consumer holds it while the next one is made
        except BaseException as raised:
            error = raised
        finally:
            items.close()
        results.put((None, error or StopIteration()))

    thread = Thread(target=fill, daemon=True)
    try:
        thread.start()
        while True:
            item, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free_places.put(None)
            yield item
    finally:
        stopped = True
        free_places.put(None)  # the thread may wait for one
        if thread.is_alive():
            thread.join(PATIENCE_S)


class Threads:
    """A pool of `count` threads, at least 1.

    with Threads(4) as threads:
        results = threads.map(function, arguments)
    """

    def __init__(self, count: int):
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closed = False
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if not self._closed:
                work()

    def submit(self, function: Callable[..., R], *arguments: Any) -> Callable[[], R]:
        """Call the function on a thread. What is returned waits for the result, or raises the error."""
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def call() -> None:
            try:
                done.put((function(*arguments), None))
            except BaseException as error:
                done.put((None, error))

        def result() -> R:
            value, error = done.get()
            if error is not None:
                raise error
            return value

        self._work.put(call)
        return result

    def map(self, function: Callable[[T], R], arguments: Iterable[T]) -> list[R]:
        """The function's results, in order of the arguments. The first error is raised at once."""
        done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

        def call(place: int, argument: T) -> None:
            try:
                done.put((place, function(argument), None))
            except BaseException as error:
                done.put((place, None, error))

        arguments = list(arguments)
        for place, argument in enumerate(arguments):
            self._work.put(lambda place=place, argument=argument: call(place, argument))
        results: list[Any] = [None] * len(arguments)
        for _ in arguments:
            place, results[place], error = done.get()
            if error is not None:
                raise error
        return results

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_) -> None:
        """Let each thread finish its present call, and end it. What takes longer than `PATIENCE_S` is left behind."""
        self._closed = True
        for _ in self._threads:
            self._work.put(None)
        deadline = monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0, deadline - monotonic()))
