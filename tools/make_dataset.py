"""Convert ImageNet, in whichever form it lies there, to FFCV's format: every image checked, nothing changed.

    python -m tools.make_dataset SRC OUT                      the JPEGs as they are
    python -m tools.make_dataset SRC OUT --mode reencode      500 pixels, quality 90: FFCV's own recipe

OUT then holds train.beton, val.beton, the checksums of their images and dataset.json. Until everything is finished it
lies in OUT/.partial. An interrupted conversion leaves nothing else, and the next one begins again.

    python -m tools.make_dataset SRC OUT --shards 16          in 16 parts; the next one does those that are missing
    python -m tools.make_dataset SRC OUT --only 3/16          part 3 alone, counted from 0, beside others like it
    python -m tools.make_dataset SRC OUT --join               when all parts are there, they become one dataset

A part is a shard of train, a shard of val, and until the join a record, part-00003-of-00016.json.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.sources.beton import DATASET_FILE
from pipelines.sources.errors import DataError
from tools.conversion.images import Options
from tools.conversion.inputs import open_source
from tools.conversion.join import check_files, find_parts, join_parts, left_out, made_of, read_part
from tools.conversion.lock import locked
from tools.conversion.parts import MAX_PARTS, Part, fingerprint
from tools.conversion.record import PARTIAL, dataset_record, file_record, publish, relevant, write_record
from tools.conversion.source import SPLITS, Source
from tools.conversion.writer import Written, load_ffcv, write_split, writing
from training.command_line import exit_stopped, parse

Stems = Mapping[str, str]  # {split: the name of its files, without a suffix}
WHOLE = {split: split for split in SPLITS}


@dataclass(frozen=True)
class _Job:
    """What all parts of a conversion share."""

    src: Path
    out: Path
    options: Options
    on_bad: str
    workers: int

    @property
    def wanted(self) -> dict[str, Any]:
        """The options as a record has them."""
        return {**relevant(self.options), "on_bad": self.on_bad}


def make_dataset(src: Path, out: Path, options: Options, on_bad: str, workers: int, strict: bool = False) -> None:
    """Convert `src` into `out`.

    Raises:
        DataError: anything that a user can mend.
    """
    job = _Job(src, out, options, on_bad, workers)
    _make_folder(src, out)
    with locked(out):
        if _is_finished(out):
            _compare(out, src, job.wanted)
            return
        _refuse_parts(out)
        load_ffcv()
        _check_bad(_convert(job, _open(src, strict), out / PARTIAL, WHOLE, DATASET_FILE))


def make_parts(
    src: Path, out: Path, options: Options, on_bad: str, workers: int, parts: Sequence[Part], strict: bool = False
) -> None:
    """Convert those of `parts` that `out` lacks into shards, and join the parts if these are all of them.

    Several processes may do so at once, on one machine or many. A part with a bad image fails, and the next one begins.

    Raises:
        DataError: anything that a user can mend.
    """
    job, count = _Job(src, out, options, on_bad, workers), parts[0].count
    _make_folder(src, out)
    with locked(out, shared=True):
        if _is_finished(out):
            _compare(out, src, {**job.wanted, "shards": count})
            return
        _refuse_parts(out, count)
        load_ffcv()
        source = _open(src, strict)
        with writing(out / PARTIAL):
            (out / PARTIAL).mkdir(exist_ok=True)
        listing = fingerprint(source)
        _check_bad(sum(_make_part(job, source, part, listing) for part in parts))
    if len(parts) == count:
        join_parts(src, out, on_bad, count)


def _make_part(job: _Job, source: Source, part: Part, listing: str) -> int:
    """Convert one part, unless it is there; the number of bad images that keep it from being written."""
    partial = job.out / PARTIAL / part.name
    stems = {split: part.stem(split) for split in SPLITS}
    with locked(partial.with_suffix(".lock")):
        if (partial / part.record).exists():  # only its renaming was left
            publish(partial, job.out, [*_names(stems), part.record])
        if _is_part_there(job.out, part, job.wanted, listing):
            print(f"part {part} is there already", flush=True)
            return 0
        bad = _convert(job, part.of(source), partial, stems, part.record, listing=listing)
        if bad:
            print(f"part {part} is not written", file=sys.stderr)
        return bad


def _convert(job: _Job, source: Source, folder: Path, stems: Stems, record: str, **more: str) -> int:
    """Write both splits into the new folder `folder`, and publish them with their record; name every bad image.

    Args:
        record: the name of the record, which has `more`, too.

    Returns:
        the number of bad images that keep the files from being used; then nothing is left of them.
    """
    discard_on_bad = job.on_bad == "error"
    found: dict[str, Written] = {}
    bad = 0  # after a bad image, the others are still checked, but no longer written
    try:
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for split, images in source.splits.items():
            beton = folder / f"{stems[split]}.beton"
            found[split] = write_split(images, beton, job.options, job.workers, discard_on_bad, bad > 0)
            bad += len(found[split].bad) if discard_on_bad else 0
        for written in found.values():
            for name, reason in written.bad:
                print(f"bad image: {name}: {reason}", file=sys.stderr)
        if bad:
            return bad
        files = {split: file_record(folder / f"{stems[split]}.beton", found[split]) for split in found}
        write_record(folder / record, {**dataset_record(source, job.src, job.wanted, files), **more})
        publish(folder, job.out, [*_names(stems), record])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _report(job.out, stems, record, found)
    return 0


def _is_part_there(out: Path, part: Part, wanted: dict[str, Any], listing: str) -> bool:
    """Whether `out` holds the whole part. A damaged one counts as missing.

    Raises:
        DataError: it was made from other images, or by other options, or not by this program.
    """
    record = read_part(out, part)
    if record is None:
        foreign = [name for name in _names({split: part.stem(split) for split in SPLITS}) if (out / name).exists()]
        if foreign:
            raise DataError(f"{out} holds {foreign[0]} but no {part.record}: remove it, or name another folder")
        return False
    if made_of(record) != made_of({"listing": listing, "options": wanted}):
        raise DataError(
            f"{out} holds part {part} of other images or by other options (see {part.record}): remove {part.files}, "
            f"or name another folder"
        )
    if (count := left_out(record)) and wanted["on_bad"] == "error":
        raise DataError(f"part {part} in {out} leaves out {count} images: use --on-bad skip, or remove {part.files}")
    try:
        check_files(out, part, record)
    except DataError as error:
        print(f"part {part} is converted again: {error}", file=sys.stderr)
        return False
    return True


def _refuse_parts(out: Path, count: int | None = None) -> None:
    """Raises:
    DataError: `out` holds parts of another number than `count`.
    """
    for part in find_parts(out):
        if part.count != count:
            raise DataError(f"{out} holds {part.record}: go on with --shards {part.count}, or name another folder")


def _make_folder(src: Path, out: Path) -> None:
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"{out} lies in {src}: name a folder outside the source, which is never written to")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)


def _open(src: Path, strict: bool) -> Source:
    source = open_source(src, strict)
    counts = ", ".join(f"{len(source.splits[split].labels):,} {split}" for split in SPLITS)
    print(f"{src}: {source.kind}, {len(source.classes):,} classes, {counts} images", flush=True)
    for folder, listed in source.left_out.items():
        if note := listed.note(folder):
            print(note, flush=True)
    return source


def _names(stems: Stems) -> list[str]:
    """The files of a dataset or part, but for its record."""
    return [f"{stem}{suffix}" for stem in stems.values() for suffix in (".beton", ".checksums.npy")]


def _is_finished(out: Path) -> bool:
    """Whether `out` holds a dataset; files whose renaming was interrupted are renamed now."""
    if (out / PARTIAL / DATASET_FILE).exists():
        publish(out / PARTIAL, out, [*_names(WHOLE), DATASET_FILE])
    if (out / DATASET_FILE).exists():
        return True
    foreign = [name for name in _names(WHOLE) if (out / name).exists()]
    if foreign:
        raise DataError(f"{out} holds {foreign[0]} but no {DATASET_FILE}: remove it, or name another folder")
    return False


def _compare(out: Path, src: Path, wanted: dict[str, Any]) -> None:
    """Raises:
    DataError: the dataset in `out` was made from another source, or by other options.
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


def _check_bad(bad: int) -> None:
    """Raises:
    DataError: there are bad images.
    """
    if bad:
        count = "1 image does" if bad == 1 else f"{bad:,} images do"
        raise DataError(f"{count} not decode: replace what is listed, or leave it out with --on-bad skip")


def _report(out: Path, stems: Stems, record: str, found: dict[str, Written]) -> None:
    size = sum((out / name).stat().st_size for name in _names(stems)) / 2**30
    counts = " and ".join(f"{len(found[split].checksums):,} {stem}" for split, stem in stems.items())
    print(f"wrote {counts} images, {size:.1f} GiB, to {out}", flush=True)
    for what, images in (
        ("re-encoded as RGB", [image for written in found.values() for image in written.reencoded]),
        ("skipped", [image for written in found.values() for image in written.bad]),
    ):
        if images:
            print(f"{what}: {len(images):,}, listed in {out / record}")


def _part(only: str, shards: int | None) -> Part:
    part = Part.parse(only)
    if shards not in (None, part.count):
        raise DataError(f"--only {only} is a part of {part.count}, not of --shards {shards}: leave out --shards")
    return part


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main(
    src: Path,
    out: Path,
    mode: Literal["verbatim", "reencode"] = "verbatim",
    max_size: int = 500,
    quality: int = 90,
    jpeg_fraction: float = 1.0,
    on_bad: Literal["error", "skip"] = "error",
    strict: bool = False,
    workers: int | None = None,
    shards: int | None = None,
    only: str | None = None,
    join: bool = False,
) -> None:
    """Convert ImageNet to FFCV's format.

    Args:
        src: a folder with ImageNet: class folders (train/, val/), the official tars with the development kit, Kaggle's
            download, or Hugging Face's parquet shards.
        out: the folder for train.beton, val.beton and dataset.json. A dataset that is there already stays: that is
            success where it was made from SRC with the same options, else an error.
        mode: verbatim stores the JPEGs as they are; reencode shrinks and compresses every image again.
        max_size: reencode: longest side in pixels of what is stored; smaller images keep their size.
        quality: reencode: of the JPEGs, up to 100.
        jpeg_fraction: reencode: share of the images that become JPEG; the others become pixels, which load faster.
        on_bad: what to do when images do not decode: error lists all of them and writes nothing, or no part that one
            is in; skip leaves them out.
        strict: files among the images that are none by their names are an error; else a line names them.
        workers: processes; by default one for each core.
        shards: convert in N parts, and write each split in N files; the same command goes on with those that are
            missing. The images and their order are those of one file.
        only: K/N: convert part K of N alone, K from 0 to N - 1 as in the files' names, beside other processes that do
            the other parts: --only $SLURM_ARRAY_TASK_ID/16 in a Slurm array of 0-15.
        join: convert nothing: check that all parts are there and whole, and write dataset.json.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    left = "nothing is left of this conversion; the same command begins it anew"
    if shards is not None or only is not None or join:
        left = "the parts that are finished stay; the same command goes on with what is missing"
    try:
        for name, value, low, high in (
            ("--max-size", max_size, 1, 16_384),
            ("--quality", quality, 1, 100),
            ("--jpeg-fraction", jpeg_fraction, 0, 1),
            ("--workers", workers, 1, 4096),
            ("--shards", shards, 1, MAX_PARTS),
        ):
            if value is not None and not low <= value <= high:
                raise DataError(f"{name} {value}: it must be from {low} to {high}")
        options = Options(mode, max_size, quality, jpeg_fraction)
        signal.signal(signal.SIGTERM, _stop)
        if join and only is not None:
            raise DataError("--join and --only: join when all parts are converted")
        if join:
            join_parts(src, out, on_bad, shards)
        elif only is not None:
            make_parts(src, out, options, on_bad, workers, [_part(only, shards)], strict)
        elif shards is not None:
            make_parts(src, out, options, on_bad, workers, [Part(number, shards) for number in range(shards)], strict)
        else:
            make_dataset(src, out, options, on_bad, workers, strict)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        exit_stopped(stop, left)


if __name__ == "__main__":
    parse(main)
