"""Read every image of a dataset as training would, and say what it holds and what is wrong with it.

    python -m tools.check_dataset DATA                          train and val; folders, .beton files, shards
    python -m tools.check_dataset DATA --html page.html         and a page of thumbnails
    python -m tools.check_dataset DATA --json-file report.json  and everything that was found, for programs

The exit code is 1 if an image is damaged, train or val is missing, or their classes differ.
"""

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipelines import native
from pipelines.imagenet import MEAN, STD
from pipelines.sources.beton import BetonSource
from pipelines.sources.beton_shards import BetonShards, open_betons
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from pipelines.threads import Threads
from tools.thumbnails import Row, write_page
from training.command_line import parse
from training.whole_files import whole_files

SPLITS = ("train", "val")
CHUNK = 32  # images for each thread between two moves of the progress bar
SHOWN = 20  # lines on the terminal for each kind of finding; --json-file has all
PER_CLASS, PER_PAGE = 8, 4000  # thumbnails at most, by default: about 12 MB
MOST_CONVERTED = 200  # thumbnails of images that are converted
SAMPLINGS = {(1, 1): "4:4:4", (2, 2): "4:2:0", (2, 1): "4:2:2", (1, 2): "4:4:0", (4, 1): "4:1:1"}
Source = FolderSource | BetonSource | BetonShards


@dataclass(frozen=True)
class Seen:
    """A sound image. bytes: stored. sums, squares: (3,) int64, sums over its pixels and their squares, by channel."""

    bytes: int
    checksum: int
    layout: str
    is_converted: bool
    sums: NDArray[np.int64]
    squares: NDArray[np.int64]


@dataclass
class Report:
    """What a split holds. sizes: (N, 2), height and width. damaged, converted: (index, name, reason); an image is
    converted if it is not a plain JPEG. layouts: number of images by storage. twins: names of images with equal bytes.
    """

    split: str
    classes: list[str]
    images_of_class: list[int]
    sizes: NDArray[np.int32]
    note: str | None
    bytes: int = 0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[int, str, str]] = field(default_factory=list)
    converted: list[tuple[int, str, str]] = field(default_factory=list)
    twins: list[list[str]] = field(default_factory=list)
    checksums: dict[int, list[int]] = field(default_factory=dict)  # checksum of the bytes: indices of its images


def open_splits(data: Path) -> dict[str, Source]:
    """The splits below `data`, one or both of train and val; if there is none, `data` itself as a split.

    Raises:
        DataError: nothing is found, or it can't be opened.
    """
    if data.suffix == ".beton" and data.is_file():
        return {data.stem: BetonSource(data)}
    if not data.is_dir():
        raise DataError(f"no folder {data}: name one that holds train and val, or a .beton file")
    found: dict[str, Source] = {}
    for split in SPLITS:
        source = open_betons(data, split)
        if source is None and (data / split).is_dir():
            source = FolderSource(data / split, keep_bad=True)
        if source is not None:
            found[split] = source
    return found or {data.name: FolderSource(data, keep_bad=True)}


def layout(data: NDArray[np.uint8]) -> str:
    """How a JPEG is stored: sampling of its chroma, and whether it is progressive."""
    try:
        image: Any = Image.open(io.BytesIO(data.data))
    except OSError:
        return "JPEG, a header that Pillow does not know"  # libjpeg reads it
    with image:
        kind = ", progressive" if "progressive" in image.info else ""
        if image.mode == "L":
            return f"JPEG, grey{kind}"
        (_, *first, _), *others = image.layer
        plain = all(tuple(layer[1:3]) == (1, 1) for layer in others)
        sampling = SAMPLINGS.get(tuple(first)) if plain else None
        return f"JPEG, {sampling or 'sampled unusually'}{kind}"


def look(source: Source, index: int) -> Seen | str:
    """Image `index`, or what is wrong with it."""
    try:
        stored = source.read(index)
        seen = source.examine_stored(index, stored)
    except DataError as error:
        return str(error)
    kind = seen.reencoded_because or layout(stored)
    is_converted = seen.reencoded_because not in (None, "pixels")
    assert seen.pixels is not None
    rows = seen.pixels.reshape(seen.height, -1)
    sums = rows.sum(0, dtype=np.int64).reshape(-1, 3).sum(0)
    squares = np.square(rows, dtype=np.uint16).sum(0, dtype=np.int64).reshape(-1, 3).sum(0)
    return Seen(stored.nbytes, native.checksum(stored), kind, is_converted, sums, squares)


def look_at_all(source: Source, split: str, workers: int) -> Iterator[tuple[int, Seen | str]]:
    """Every image of a split, in order, on `workers` threads."""
    native.checksum(np.zeros(1, np.uint8))  # compiled once, here
    step = CHUNK * workers
    with (
        Threads(workers) as threads,
        tqdm(desc=split, total=len(source), unit=" images", smoothing=0.1, disable=None) as bar,
    ):
        for start in range(0, len(source), step):
            indices = range(start, min(start + step, len(source)))
            yield from zip(indices, threads.map(lambda index: look(source, index), indices), strict=True)
            bar.update(len(indices))


def check(source: Source, split: str, workers: int) -> Report:
    """Read all images of a split."""
    counts = [int(count) for count in np.bincount(source.labels, minlength=len(source.classes))]
    report = Report(split, source.classes, counts, source.sizes[source.sizes.all(1)], source.note)
    sums, squares, pixels = np.zeros(3, np.int64), np.zeros(3, np.int64), 0
    for index, seen in look_at_all(source, split, workers):
        if isinstance(seen, str):
            report.damaged.append((index, source.name(index), seen))
            continue
        report.bytes += seen.bytes
        report.layouts[seen.layout] += 1
        report.checksums.setdefault(seen.checksum, []).append(index)
        if seen.is_converted:
            report.converted.append((index, source.name(index), seen.layout))
        sums, squares = sums + seen.sums, squares + seen.squares
        pixels += int(source.sizes[index].astype(np.int64).prod())
    if pixels:
        mean = sums / pixels
        report.mean = [float(value) for value in mean]
        report.std = np.sqrt(np.maximum(squares / pixels - mean**2, 0)).tolist()
    report.twins = [[source.name(index) for index in same] for same in report.checksums.values() if len(same) > 1]
    return report


def shared(reports: list[Report], sources: dict[str, Source]) -> list[list[str]]:
    """Images with equal bytes in both splits: they would be evaluated after training on them."""
    if len(reports) < 2:
        return []
    one, other = reports
    common = one.checksums.keys() & other.checksums.keys()
    return [
        [sources[report.split].name(report.checksums[checksum][0]) for report in reports] for checksum in sorted(common)
    ]


def summary(report: Report) -> str:
    """A split in a few lines."""
    counts, areas = report.images_of_class, report.sizes.astype(np.int64).prod(1)
    # pyrefly: ignore[not-iterable]: it takes what tolist() gives for a number
    by_area = [f"{width}×{height}" for height, width in report.sizes[np.argsort(areas, kind="stable")].tolist()]
    sizes = f"{by_area[0]} to {by_area[-1]}, median {by_area[len(by_area) // 2]}" if by_area else "none"
    layouts = ", ".join(f"{count:,} {kind}" for kind, count in report.layouts.most_common())
    rarest = min(range(len(counts)), key=counts.__getitem__)
    lines = [
        f"{report.split}: {sum(counts):,} images of {len(counts):,} classes, {report.bytes / 2**30:.2f} GiB",
        f"  a class: {min(counts):,} to {max(counts):,} images, fewest in {report.classes[rarest]}",
        f"  width × height: {sizes}",
        f"  stored as: {layouts}",
    ]
    if report.mean:
        mean, std = (" ".join(f"{value:.2f}" for value in values) for values in (report.mean, report.std))
        imagenet = [" ".join(f"{value:.2f}" for value in values) for values in (MEAN, STD)]
        lines.append(f"  red, green, blue: mean {mean} (ImageNet's, by which images are normalised: {imagenet[0]})")
        lines.append(f"                    deviation {std} ({imagenet[1]})")
    return "\n".join(lines)


def findings(reports: list[Report], both: list[list[str]], differing: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of each kind of finding."""
    for report in reports:
        if report.note:
            yield "left out", [report.note]
        if report.damaged:
            yield f"damaged in {report.split}", [reason for _, _, reason in report.damaged]
        if report.converted:
            lines = [f"{name}: {what}" for _, name, what in report.converted]
            yield f"converted when they are read, in {report.split}", lines
        if report.twins:
            yield f"the same bytes in {report.split}", [" = ".join(names) for names in report.twins]
    if both:
        yield "the same bytes in both splits", [" = ".join(names) for names in both]
    if differing:
        yield "classes in one split alone", differing


def thumbnails(sources: dict[str, Source], reports: list[Report], per_class: int | None) -> Iterator[Row]:
    """What the page shows: first the images that are converted, then some of each class, evenly spread."""
    for report in reports:
        if report.converted:
            shown = [(index, f"{name}: {what}") for index, name, what in report.converted[:MOST_CONVERTED]]
            heading = f"converted when they are read, in {report.split}: {len(report.converted):,}"
            yield Row(heading, sources[report.split], shown)
    count = sum(len(report.classes) for report in reports)
    per_class = per_class or min(PER_CLASS, max(1, PER_PAGE // count))
    for report in reports:
        source, damaged = sources[report.split], {index for index, _, _ in report.damaged}
        by_class = np.split(np.argsort(source.labels, kind="stable"), np.cumsum(report.images_of_class)[:-1])
        for name, indices in zip(report.classes, by_class, strict=True):
            # pyrefly: ignore[not-iterable]: it takes what tolist() gives for a number
            whole = [index for index in indices.tolist() if index not in damaged]
            places = np.linspace(0, len(whole) - 1, min(per_class, len(whole))).round().astype(int).tolist()
            images = [(whole[place], source.name(whole[place])) for place in places]
            yield Row(f"{report.split} · {name} · {len(indices):,}", source, images)


def as_json(report: Report) -> dict[str, Any]:
    sizes = report.sizes
    return {
        "images": sum(report.images_of_class),
        "bytes": report.bytes,
        "images_of_class": dict(zip(report.classes, report.images_of_class, strict=True)),
        "heights_widths": {"least": sizes.min(0).tolist(), "most": sizes.max(0).tolist()} if len(sizes) else None,
        "mean": report.mean,
        "std": report.std,
        "layouts": report.layouts,
        "left_out": report.note,
        "damaged": [{"name": name, "reason": reason} for _, name, reason in report.damaged],
        "converted": [{"name": name, "what": what} for _, name, what in report.converted],
        "twins": report.twins,
    }


def main(
    data: Path,
    html: Path | None = None,
    json_file: Path | None = None,
    workers: int | None = None,
    per_class: int | None = None,
) -> None:
    """Read every image of a dataset.

    Args:
        data: a folder that holds train and val as class folders, .beton files or shards; or one of these alone.
        html: write a page of thumbnails as a single file.
        json_file: write everything that was found.
        workers: threads; by default one for each core.
        per_class: thumbnails of each class and split; by default 8, fewer if there are many classes.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    try:
        for option, value in (("--workers", workers), ("--per-class", per_class)):
            if value is not None and value < 1:
                raise DataError(f"{option} {value}: it must be at least 1")
        for file in filter(None, (html, json_file)):
            if not file.absolute().parent.is_dir():
                raise DataError(f"no folder {file.absolute().parent} for {file.name}: make it first")
        sources = open_splits(data)
        reports = [check(source, split, workers) for split, source in sources.items()]
        both = shared(reports, sources)
        classes = [set(report.classes) for report in reports]
        differing = sorted(set.union(*classes) - set.intersection(*classes))
        lines = [summary(report) for report in reports]
        is_half = len(reports) == 1 and data.is_dir() and reports[0].split != data.name
        if is_half:
            lines.append(f"there is no {'val' if reports[0].split == 'train' else 'train'}: a training needs both")
        for title, found in findings(reports, both, differing):
            more = [f"and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
            lines.append("\n  ".join([f"{title}: {len(found):,}", *found[:SHOWN], *more]))
        text = "\n".join(lines)
        print(text)
        if json_file is not None:
            record = {report.split: as_json(report) for report in reports}
            record = {"splits": record, "in_both_splits": both, "classes_in_one_split": differing}
            with whole_files(json_file) as (file,):
                file.write_text(json.dumps(record, indent=2) + "\n")
        if html is not None:
            with whole_files(html) as (file,):
                write_page(file, str(data), text, thumbnails(sources, reports, per_class))
            print(f"thumbnails: {html}")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    if differing or is_half or any(report.damaged for report in reports):
        sys.exit(1)
    print("nothing wrong was found")


if __name__ == "__main__":
    parse(main)
