"""Convert ImageNet, in whichever form it lies there, to FFCV's format: every image checked, nothing changed.

    python -m tools.make_dataset SRC OUT                      the JPEGs as they are
    python -m tools.make_dataset SRC OUT --mode reencode      500 pixels, quality 90: FFCV's own recipe

OUT then holds train.beton, val.beton, the checksums of their images and dataset.json. Until all of it is there, all of
it lies in OUT/.partial; an interrupted conversion leaves nothing else, and the next one begins anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import features

from dcd.engine.folder_sync import sync_folder
from pipelines import native
from pipelines.sources.beton import DATASET_FILE, BetonSource
from pipelines.sources.errors import DataError
from tools.conversion.images import Options
from tools.conversion.inputs import SPLITS, Source, open_source
from tools.conversion.writer import Written, load_ffcv, sync, write_split, writing

FORMAT = 1
PARTIAL = ".partial"
FILES = tuple(f"{split}{suffix}" for split in SPLITS for suffix in (".beton", ".checksums.npy"))

# The lock on OUT, in a list for `_unlock`.
_locks: list[int] = []


def make_dataset(src: Path, out: Path, options: Options, on_bad: str, workers: int, strict: bool = False) -> None:
    """Convert `src` into `out`.

    Raises:
        DataError: anything that a user can mend.
    """
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"{out} lies in {src}: name a folder outside the source, which is never written to")
    wanted = {**_recorded(options), "on_bad": on_bad}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if _is_finished(out):
            _compare(out, src, wanted)
            return
        load_ffcv()
        source = open_source(src, strict)
        counts = ", ".join(f"{len(source.splits[split].labels):,} {split}" for split in SPLITS)
        print(f"{src}: {source.kind}, {len(source.classes):,} classes, {counts} images", flush=True)
        for folder, left_out in source.left_out.items():
            if note := left_out.note(folder):
                print(note, flush=True)
        partial = out / PARTIAL
        try:
            with writing(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            found = _convert(source, partial, options, on_bad, workers)
            _record(source, src, partial, wanted, found)
            _publish(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _report(out, found)


def _recorded(options: Options) -> dict[str, Any]:
    """The options that matter to the images."""
    return asdict(options) if options.mode == "reencode" else {"mode": options.mode}


def _unlock() -> None:
    """In a forked worker: it must not go on holding the lock when its parent is killed."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_unlock)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other conversions out of `out`. The lock goes with the process, however that ends."""
    folder = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise DataError(f"another conversion is writing to {out}: wait for it, or name another folder") from error
    except OSError:
        pass  # some network file systems can't lock a folder
    _locks.append(folder)
    try:
        yield
    finally:
        _unlock()


def _is_finished(out: Path) -> bool:
    """Whether `out` holds a dataset. One that was interrupted when only its renaming was left is renamed now."""
    if (out / PARTIAL / DATASET_FILE).exists():
        _publish(out)
    if (out / DATASET_FILE).exists():
        return True
    foreign = [name for name in FILES if (out / name).exists()]
    if foreign:
        raise DataError(f"{out} holds {foreign[0]} but no {DATASET_FILE}: remove it, or name another folder")
    return False


def _compare(out: Path, src: Path, wanted: dict[str, Any]) -> None:
    """Raises:
    DataError: the dataset in `out` was made from something else, or otherwise.
    """
    try:
        dataset = json.loads((out / DATASET_FILE).read_text())
        same = dataset["options"] == wanted and dataset["source"]["path"] == str(src.resolve())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{out / DATASET_FILE} does not read ({error}): remove {out}, or name another folder"
        ) from error
    if not same:
        raise DataError(f"{out} holds another dataset (see {DATASET_FILE}): remove it, or name another folder")
    print(f"{out} is there already")


def _convert(source: Source, partial: Path, options: Options, on_bad: str, workers: int) -> dict[str, Written]:
    """Write both splits; then name every image that is bad."""
    found: dict[str, Written] = {}
    useless = False  # once an image is bad that may not be, the others are checked, and no longer written
    for name in SPLITS:
        beton = partial / f"{name}.beton"
        found[name] = write_split(source.splits[name], beton, options, workers, on_bad == "error", useless)
        useless = useless or (on_bad == "error" and bool(found[name].bad))
    bad = [image for written in found.values() for image in written.bad]
    for name, reason in bad:
        print(f"bad image: {name}: {reason}", file=sys.stderr)
    if bad and on_bad == "error":
        count = "1 image does" if len(bad) == 1 else f"{len(bad):,} images do"
        raise DataError(f"{count} not decode: replace what is listed, or leave it out with --on-bad skip")
    return found


def _record(source: Source, src: Path, partial: Path, options: dict[str, Any], found: dict[str, Written]) -> None:
    """Write the checksums and, last, dataset.json, which says that all is there."""
    splits = {}
    for name, written in found.items():
        beton, checksums = partial / f"{name}.beton", partial / f"{name}.checksums.npy"
        with writing(checksums):
            np.save(checksums, written.checksums)
            sync(checksums)
        splits[name] = {
            "file": beton.name,
            "images": len(written.checksums),
            "bytes": beton.stat().st_size,
            "index_xxh64": BetonSource(beton).index_checksum(),
            "checksums": checksums.name,
            "checksums_xxh64": native.hex_checksum(written.checksums),
            "reencoded": [{"name": name, "reason": reason} for name, reason in written.odd],
            "skipped": [{"name": name, "reason": reason} for name, reason in written.bad],
        }
    dataset = {
        "format": FORMAT,
        "classes": source.classes,
        "source": {"kind": source.kind, "path": str(src.resolve())},
        "options": options,
        "splits": splits,
        "versions": _versions(),
    }
    text = json.dumps(dataset, indent=2) + "\n"
    temporary = partial / f"{DATASET_FILE}.tmp"
    with writing(partial / DATASET_FILE):
        temporary.write_text(text)
        sync(temporary)
        temporary.rename(partial / DATASET_FILE)
        sync_folder(partial)


def _versions() -> dict[str, str]:
    packages = ("dcd-trainer", "ffcv", "numpy", "pillow", "opencv-python-headless", "opencv-python", "pyarrow", "scipy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["libjpeg-turbo of pillow"] = features.version("libjpeg_turbo") or "none"
    return versions


def _publish(out: Path) -> None:
    """Rename everything in the partial folder into `out`, dataset.json last."""
    partial = out / PARTIAL
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    with writing(out):
        for name in (*FILES, DATASET_FILE):
            if (partial / name).exists():  # else an earlier start has renamed it
                (partial / name).rename(out / name)
        sync_folder(out)
        partial.rmdir()
    for number, handler in kept.items():
        signal.signal(number, handler)


def _report(out: Path, found: dict[str, Written]) -> None:
    size = sum((out / name).stat().st_size for name in FILES) / 2**30
    counts = " and ".join(f"{len(written.checksums):,} {name}" for name, written in found.items())
    print(f"wrote {counts} images, {size:.1f} GiB, to {out}")
    for what, images in (
        ("re-encoded as RGB", [image for written in found.values() for image in written.odd]),
        ("skipped", [image for written in found.values() for image in written.bad]),
    ):
        if images:
            print(f"{what}: {len(images):,}, listed in {out / DATASET_FILE}")


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main(
    src: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    mode: Literal["verbatim", "reencode"] = "verbatim",
    max_size: int = 500,
    quality: int = 90,
    jpeg_fraction: float = 1.0,
    on_bad: Literal["error", "skip"] = "error",
    strict: bool = False,
    workers: int | None = None,
) -> None:
    """Convert ImageNet to FFCV's format.

    Args:
        src: a folder with ImageNet: class folders (train/, val/), the official tars with the development kit, Kaggle's
            download, or Hugging Face's parquet shards.
        out: the folder for train.beton, val.beton and dataset.json. A dataset that is there already stays: that is
            success where it was made from SRC with the same options, else an error.
        mode: verbatim stores the bytes of the JPEGs; reencode shrinks and compresses every image again.
        max_size: reencode: longest side in pixels of what is stored; smaller images keep their size.
        quality: reencode: of the JPEGs, up to 100.
        jpeg_fraction: reencode: share of the images that become JPEG; the others become pixels, which load faster.
        on_bad: what to do when images do not decode: error lists all of them and writes nothing, skip leaves them out.
        strict: files among the images that are none by their names are an error; else a line names them.
        workers: processes; by default one for each core.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    try:
        for name, value, low, high in (
            ("--max-size", max_size, 1, 16_384),
            ("--quality", quality, 1, 100),
            ("--jpeg-fraction", jpeg_fraction, 0, 1),
            ("--workers", workers, 1, 4096),
        ):
            if not low <= value <= high:
                raise DataError(f"{name} {value}: it must be from {low} to {high}")
        options = Options(mode, max_size, quality, jpeg_fraction)
        signal.signal(signal.SIGTERM, _stop)
        make_dataset(src, out, options, on_bad, workers, strict)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped: nothing is left of this conversion; the same command begins it anew")


if __name__ == "__main__":
    import tyro  # which the annotations name

    from dcd.engine.command_line import parse

    parse(main)
