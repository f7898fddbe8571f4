"""Write one split to a .beton file: worker processes convert, the parent says where each image goes.

    parent ── "convert", task ──> worker   reads, checks, re-encodes; holds the bytes
           <── rows of the task ──         sizes in pixels and bytes, checksums, what is bad
           ── "write", places ──> worker   writes the bytes at their places in the file
           <── "written" ──

Tasks are placed in their order, whoever finishes first, so a file does not depend on the number of workers. Workers may
run ahead of the slowest task by a few only; so memory does not depend on the number of images, but for their index. All
else in the file (header, fields, metadata, allocation table) is written by FFCV's own DatasetWriter.
"""

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines import native
from pipelines.sources.beton import ALLOCATION
from pipelines.sources.errors import DataError
from tools.conversion.images import BadImage, Options, Stored, convert
from tools.conversion.source import Split
from training.folder_sync import sync_file

MIN_PAGE_SIZE = 8 << 20  # FFCV's default
SHARD_PAGE_SIZE = 32 << 20  # where the sizes of the images are not known beforehand; ImageNet's largest has 15 MB
MAX_PAGE_SIZE = 1 << 31  # FFCV holds it in 32 bits
AHEAD = 4  # for each worker, so many tasks may be converted before their places in the file are known
STOPS = (signal.SIGINT, signal.SIGTERM)
QUEUED = 2  # tasks given to a worker at a time, so that it need not wait for the next

ADVICE = {  # by the reason for which something can't be written
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there, or name another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a folder that can be written to"),
    errno.EFBIG: "its file system, or ulimit -f, allows no such large file; name another folder",
    errno.EIO: "its disk or network fails; look after it, or name another folder",
}

ROW = np.dtype(
    [("index", "i8"), ("mode", "u1"), ("height", "u2"), ("width", "u2"), ("bytes", "i8"), ("checksum", "u8")]
)


@dataclass
class Written:
    """What became of a split. checksums: (images,) uint64. reencoded, bad: (name, reason), in their order."""

    checksums: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    reencoded: list[tuple[str, str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def write_split(
    split: Split, path: Path, options: Options, workers: int, discard_on_bad: bool, discard: bool = False
) -> Written:
    """Convert `split` into the file `path`.

    Args:
        discard_on_bad: the file won't be used if an image is bad, so write nothing more behind the first one; the
            others are still checked. Otherwise bad images are left out, and the order of the others stays.
        discard: the file won't be used in any case.

    Raises:
        DataError: the file can't be written, or a worker has died.
    """
    writer = _prepare(split, path, _page_size(split, options))
    rows = np.zeros(len(split.labels), ROW)
    places = np.zeros(len(split.labels), np.int64)  # in the file; the first page is the header's, so 0 is nowhere
    reencoded: dict[int, str] = {}
    bad: dict[int, str] = {}
    layout = _Layout(writer.data_region_start, writer.page_size)
    tasks = split.reader.tasks
    with (
        _workers(min(workers, len(tasks)), split, path, options, writer.page_size) as pool,
        tqdm(desc=path.stem, total=len(rows), unit=" images", smoothing=0.1, disable=None) as bar,
    ):
        converted: dict[int, tuple[_Worker, NDArray]] = {}
        begun = placed = written = 0
        while written < len(tasks):
            for worker in pool:
                while worker.queued < QUEUED and begun < min(len(tasks), placed + AHEAD * len(pool)):
                    worker.send("convert", begun)
                    worker.queued += 1
                    begun += 1
            for worker, (done, number, payload) in _answers(pool):
                if done == "written":
                    written += 1
                    bar.update(payload)
                    continue
                task_rows, task_reencoded, task_bad = payload
                worker.queued -= 1
                converted[number] = worker, task_rows
                reencoded.update(task_reencoded)
                bad.update(task_bad)
                bar.update(len(task_bad))
            while placed in converted:
                worker, task_rows = converted.pop(placed)
                discard = discard or (discard_on_bad and bool(bad))
                if discard:
                    worker.send("drop", placed)
                else:
                    task_places = layout.place(task_rows["bytes"])
                    rows[task_rows["index"]] = task_rows
                    places[task_rows["index"]] = task_places
                    worker.send("write", placed, task_places)
                placed += 1
    if not discard:
        _finish(writer, split.labels, rows, places, path)
    by_name = [[(split.name(index), reason) for index, reason in sorted(found.items())] for found in (reencoded, bad)]
    return Written(rows["checksum"][places > 0], *by_name)


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Say in one line that `path` can't be written."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "name another folder")
        raise DataError(f"cannot write {path} ({error.strerror or error}): {advice}") from error


class _Layout:
    """Places for images, one behind the other; no image crosses the end of a page."""

    def __init__(self, header_end: int, page_size: int):
        self._page_size = page_size
        self._next = -(-header_end // page_size) * page_size

    def place(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the file images of these sizes (N,) go, (N,), in bytes."""
        places = np.empty_like(sizes)
        # pyrefly: ignore[not-iterable]: it takes what tolist() gives for a number
        for i, size in enumerate(sizes.tolist()):
            left = -self._next % self._page_size or self._page_size
            if size > left:
                self._next += left
            places[i] = self._next
            self._next += size
        return places


def _page_size(split: Split, options: Options) -> int:
    """A power of two that every image fits into."""
    if options.mode == "reencode":
        needed = 3 * options.max_size**2
    elif split.largest is None:
        needed = SHARD_PAGE_SIZE
    else:
        needed = split.largest
    return min(max(MIN_PAGE_SIZE, 1 << (needed - 1).bit_length()), MAX_PAGE_SIZE)


def load_ffcv() -> Any:
    """FFCV, which takes seconds to import.

    Raises:
        DataError: it is not installed.
    """
    try:
        import cv2
        import ffcv.fields
        import ffcv.writer
    except ImportError as error:
        raise DataError(f"the format is written by FFCV, which does not import ({error}): make setup") from error
    cv2.setNumThreads(0)  # each worker is one thread
    return ffcv


def _prepare(split: Split, path: Path, page_size: int) -> Any:
    """FFCV's writer, which has written the file's header and fields."""
    ffcv = load_ffcv()
    fields = {"image": ffcv.fields.RGBImageField(), "label": ffcv.fields.IntField()}  # two: what programs unpack
    with writing(path):
        writer = ffcv.writer.DatasetWriter(str(path), fields, page_size=page_size)
        writer.num_samples = len(split.labels)
        writer.prepare()
    # FFCV shares the metadata among its workers. Here they are the parent's.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    return writer


def _finish(writer: Any, labels: NDArray[np.int64], rows: NDArray, places: NDArray[np.int64], path: Path) -> None:
    """Let FFCV write metadata, allocation table and header, without the images that have no place."""
    kept = np.flatnonzero(places)
    if not len(kept):
        raise DataError(f"not one image for {path.name} decodes: SRC is not what it should be")
    metadata = np.zeros(len(labels), writer.metadata_type)  # as long as the room for it, whatever was left out
    image_column, label_column = metadata.dtype.names
    for name in ("mode", "height", "width"):
        metadata[image_column][name][: len(kept)] = rows[name][kept]
    metadata[image_column]["data_ptr"][: len(kept)] = places[kept]
    metadata[label_column][: len(kept)] = labels[kept]
    allocations = np.zeros(len(kept), ALLOCATION)
    allocations["sample_id"] = np.arange(len(kept))
    allocations["ptr"], allocations["size"] = places[kept], rows["bytes"][kept]
    writer.header["num_samples"] = len(kept)
    writer.metadata_sm = SimpleNamespace(buf=metadata.tobytes())
    with writing(path):
        writer.finalize([allocations])
        sync_file(path)


class _Worker:
    """A process that runs `_work`, and our end of the pipe to it.

    Args:
        others: the workers that were started before. arguments: of `_work`, behind the pipe.
    """

    def __init__(self, others: list["_Worker"], *arguments: Any):
        context = multiprocessing.get_context("fork")  # the index is shared, and FFCV imported once
        self.connection, theirs = context.Pipe()
        # A fork copies the ends of the other workers' pipes. If they stayed open, nobody would see a process die.
        foreign = [self.connection, *(other.connection for other in others)]
        self.process = context.Process(target=_work, args=(theirs, foreign, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.queued = 0  # tasks sent that are not converted yet

    def send(self, action: str, number: int, payload: Any = None) -> None:
        try:
            self.connection.send((action, number, payload))
        except OSError as error:
            raise self.dead() from error

    def dead(self) -> DataError:
        self.process.join(5)
        code = self.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
        return DataError(
            f"a worker process died {how}: start again; if it was killed for memory (signal 9), with fewer --workers"
        )


@contextlib.contextmanager
def _workers(count: int, *arguments: Any) -> Generator[list[_Worker]]:
    """Workers of these arguments, which end with the `with` block, however it ends."""
    native.checksum(np.zeros(1, np.uint8))  # compiled once, here
    workers: list[_Worker] = []
    try:
        with _stops_wait():
            for _ in range(count):
                workers.append(_Worker(workers, *arguments))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()  # nothing is left for them to do
        for worker in workers:
            worker.process.join()


@contextlib.contextmanager
def _stops_wait() -> Generator[None]:
    """Signals that stop the program wait for the end of the block: Python drops an exception that is raised while it
    prepares a fork. A mask is not enough: a thread of a library takes the signal, and Python raises the exception here.
    """
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _answers(workers: list[_Worker]) -> Iterator[tuple[_Worker, tuple[str, int, Any]]]:
    """(worker, answer) of those that have one; waits for the first.

    Raises:
        DataError: a worker has died or can't write.
        RuntimeError: a worker met an error in the program.
    """
    by_connection = {worker.connection: worker for worker in workers}
    ready: list[Any] = wait(list(by_connection))
    for connection in ready:
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise by_connection[connection].dead() from error
        if isinstance(answer[2], DataError):
            raise answer[2]
        if answer[0] == "crashed":
            raise RuntimeError(f"in a worker process:\n{answer[2]}")
        yield by_connection[connection], answer


def _work(
    connection: Connection, foreign: list[Connection], split: Split, path: Path, options: Options, page_size: int
) -> None:
    """A worker process: convert and write what the parent says, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in foreign:
        other.close()
    gc.freeze()  # the collector need not look at what the parent had
    held: dict[int, list[Stored]] = {}
    number = -1
    try:
        with writing(path):
            file = os.open(path, os.O_WRONLY)
        while True:
            action, number, places = connection.recv()
            if action == "convert":
                held[number], *found = _convert_task(split, split.reader.tasks[number], options, page_size)
                connection.send(("converted", number, found))
                continue
            images = held.pop(number)
            if action == "write":
                with writing(path):
                    for image, place in zip(images, places.tolist(), strict=True):
                        _write(file, image.data, place)
                    # Begin to write to the disk now: all at the end would take as long as the conversion.
                    if images:
                        length = int(places[-1] - places[0]) + images[-1].data.nbytes
                        os.posix_fadvise(file, int(places[0]), length, os.POSIX_FADV_DONTNEED)
            connection.send(("written", number, len(images)))
    except (EOFError, ConnectionError):
        return  # the parent is gone
    except DataError as error:
        connection.send(("failed", number, error))
    except MemoryError:
        error = DataError("not enough memory: start again with fewer --workers")
        connection.send(("failed", number, error))
    except Exception:
        connection.send(("crashed", number, traceback.format_exc()))


def _convert_task(
    split: Split, task: Any, options: Options, page_size: int
) -> tuple[list[Stored], NDArray, dict[int, str], dict[int, str]]:
    """(images, their rows, {index: reason} of the re-encoded, {index: reason} of the bad) of one task."""
    images, rows, reencoded, bad = [], [], {}, {}
    for index, data in split.reader.read(task):
        try:
            if isinstance(data, OSError):
                raise BadImage(data.strerror or str(data))
            image = convert(data, split.first + index, options)
            if image.data.nbytes > page_size:
                raise BadImage(f"its {image.data.nbytes:,} bytes are more than a page of {page_size:,}")
        except BadImage as error:
            bad[index] = str(error)
            continue
        if image.reencoded_because is not None:
            reencoded[index] = image.reencoded_because
        images.append(image)
        checksum = native.checksum(image.data)
        rows.append((index, image.mode, image.height, image.width, image.data.nbytes, checksum))
    return images, np.array(rows, ROW), reencoded, bad


def _write(file: int, data: NDArray[np.uint8], place: int) -> None:
    """All of `data` at `place`: the system may write less than asked, as on a disk that is almost full."""
    left = data.data
    while left:
        count = os.pwrite(file, left, place)
        left, place = left[count:], place + count
