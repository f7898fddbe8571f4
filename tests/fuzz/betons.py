"""Fuzz `BetonSource`: it must open each randomly changed file or raise a DataError."""

import json
import time
import warnings
from pathlib import Path

import numpy as np

from pipelines import native
from pipelines.sources.beton import DATASET_FILE, JPEG, BetonSource
from pipelines.sources.errors import DataError
from tests import jpegs
from tests.betons import PAGES, Beton

# Numbers whose sums and products overflow, and numbers next to offsets in the file
NUMBERS = [0, 1, 2, 3, 12, 24, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, 2**64 - 24, 2**64 - 1]
NUMBERS += [PAGES + step for step in (-1, 0, 1, 11, 12, 13, 24, 36, 37)]
CHECKSUMS = "val.checksums.npy"


def write_seed(folder: Path) -> dict[str, bytes]:
    """Write two raw images and a JPEG, with the record of our converter. Returns {name: content} of the three files."""
    beton = Beton()
    jpeg = jpegs.write(np.zeros((2, 2, 3), np.uint8)).tobytes()
    beton.pages = beton.pages[:24] + jpeg
    beton.rows["image"]["mode"][2], beton.table["size"][2] = JPEG, len(jpeg)
    beton.header["alloc_table_ptr"] = PAGES + 24 + len(jpeg)
    (folder / DATASET_FILE).unlink(missing_ok=True)  # of an earlier run
    source = BetonSource(beton.write(folder / "val.beton"))
    checksums = np.array([native.checksum(source.read(i)) for i in range(3)], np.uint64)
    np.save(folder / CHECKSUMS, checksums)
    split = {
        "file": "val.beton",
        "bytes": len(source.data),
        "index_xxh64": source.index_checksum(),
        "checksums": CHECKSUMS,
    }
    split["checksums_xxh64"] = native.hex_checksum(checksums)
    (folder / DATASET_FILE).write_text(json.dumps({"classes": ["a", "b", "c"], "splits": {"val": split}}))
    assert len(BetonSource(folder / "val.beton")) == 3
    return {name: (folder / name).read_bytes() for name in ("val.beton", CHECKSUMS, DATASET_FILE)}


def changed(data: bytes, draw: np.random.Generator) -> bytes:
    """Make one to four changes: another number, random bytes, a part removed, doubled or moved."""
    for _ in range(draw.integers(1, 5)):
        # Most bytes of the 2 KB of fields have no effect, so most changes go before and after them.
        places = [draw.integers(24), draw.integers(-160, 0) + len(data), draw.integers(len(data) + 1)]
        places.append(PAGES - draw.integers(1, 80))
        at = int(np.clip(draw.choice(places), 0, len(data)))
        length = int(draw.choice([1, 2, 4, 8, 12, 24, int(draw.integers(1, 2000))]))
        number = (NUMBERS[draw.integers(len(NUMBERS))] + int(draw.choice([0, 0, -1, 1]))) % 2**64
        part = data[at : at + length]
        data = (
            data[:at]
            + [
                number.to_bytes(8, "little")[: min(length, 8)] + data[at + min(length, 8) :],
                draw.bytes(len(part)) + data[at + length :],
                data[at + length :],
                part + part + data[at + length :],
                data[at + length : at + 2 * length] + part + data[at + 2 * length :],
            ][draw.choice(5, p=[0.6, 0.1, 0.1, 0.1, 0.1])]
        )
    return data


def use(path: Path) -> bool:
    """Open a file and read it as a loader does. Returns whether it opened; raises on any wrong behaviour."""
    try:
        source = BetonSource(path)
    except DataError as error:
        assert "\n" not in str(error), "an error of more than one line"
        return False
    everything = np.arange(len(source))
    source.will_need(everything)
    assert len(source.labels) == len(source.sizes) == len(source.offsets) == len(source.lengths) == len(source.is_raw)
    assert (source.labels >= 0).all() and (source.labels < len(source.classes)).all()
    ends = source.offsets + source.lengths
    assert (source.offsets > 0).all() and (source.lengths > 0).all() and (ends <= len(source.data)).all()
    for i in everything:
        try:
            stored = source.read(i)
            if source.is_raw[i]:
                stored.reshape(*source.sizes[i], 3)
            else:
                native.check_jpeg(stored)
        except (DataError, native.DecodeError):
            continue
    return True


def fuzz(folder: Path, seconds: float, seed: int = 0) -> tuple[int, int]:
    """Returns (files, files that opened) in `seconds`. Raises on wrong behaviour; the file is then in `folder`."""
    draw = np.random.default_rng(seed)
    contents, stop = write_seed(folder), time.monotonic() + seconds
    count = opened = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while time.monotonic() < stop:
            recorded = count % 4 == 0  # with dataset.json, whose checksums show any change of the .beton file
            change = list(contents)[draw.integers(1, 3)] if recorded else "val.beton"
            for name, data in contents.items():
                if name == change:
                    data = changed(data, draw)
                if recorded or name != DATASET_FILE:
                    (folder / name).write_bytes(data)
                else:
                    (folder / name).unlink(missing_ok=True)
            opened += use(folder / "val.beton")
            count += 1
    return count, opened
