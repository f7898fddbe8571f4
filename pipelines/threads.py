"""Threads that make things ahead and beside each other, and never keep a program from ending.

One of them may be in a read that never returns: a dead network disk, a pipe that nobody writes to. So they are daemons,
for which Python does not wait at its end (it does for the threads of `concurrent.futures`), and whoever stops them
waits for a bounded time. Their queues are `SimpleQueue`, which holds no lock in Python: a signal handler may raise
while the main thread waits in one, and the queue is still whole.
"""

from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

PATIENCE_S = 2.0  # for a thread that is told to end


def in_background(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """The items, made in a thread of their own, at most `ahead` of them before they are asked for.

    An error in making them is raised here. Closing this generator closes `items` and ends the thread; a thread that has
    not ended after `PATIENCE_S` is left behind, with `items` as they are.
    """
    made: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    places: SimpleQueue[None] = SimpleQueue()  # one for each item that may be made
    for _ in range(ahead):
        places.put(None)
    stopped = False

    def fill() -> None:
        error = None
        try:
            for item in items:
                places.get()
                if stopped:
                    break
                made.put((item, None))
                del item  # the consumer's alone, while the next one is made
        except BaseException as raised:
            error = raised
        finally:
            items.close()
        made.put((None, error or StopIteration()))

    thread = Thread(target=fill, daemon=True)
    try:
        thread.start()
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            places.put(None)
            yield item
    finally:
        stopped = True
        places.put(None)  # it may wait for one
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
        done: SimpleQueue[tuple[R | None, BaseException | None]] = SimpleQueue()

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
        """The function of each argument, in order; the first error of any is raised."""
        done: SimpleQueue[tuple[int, R | None, BaseException | None]] = SimpleQueue()

        def call(place: int, argument: T) -> None:
            try:
                done.put((place, function(argument), None))
            except BaseException as error:
                done.put((place, None, error))

        arguments = list(arguments)
        for place, argument in enumerate(arguments):
            self._work.put(lambda place=place, argument=argument: call(place, argument))
        results: list[R | None] = [None] * len(arguments)
        for _ in arguments:
            place, results[place], error = done.get()
            if error is not None:
                raise error
        return results

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_) -> None:
        """End the threads when they have done what they are at; those that have not after `PATIENCE_S` are left."""
        self._closed = True
        for _ in self._threads:
            self._work.put(None)
        deadline = monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0, deadline - monotonic()))
