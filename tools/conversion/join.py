"""Join parts, converted one by one or by many machines, into one dataset when all are there."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.sources.beton import DATASET_FILE, BetonSource
from pipelines.sources.beton_shards import find_betons
from pipelines.sources.errors import DataError
from tools.conversion.lock import locked
from tools.conversion.parts import Part
from tools.conversion.record import PARTIAL, write_record
from tools.conversion.source import SPLITS
from tools.conversion.writer import writing

RECORDS = re.compile(r"part-(\d{5})-of-(\d{5})\.json")


def find_parts(out: Path) -> list[Part]:
    """The parts that have a record in `out`, in order."""
    matches = filter(None, (RECORDS.fullmatch(file.name) for file in out.glob("part-*.json")))
    parts = (Part(int(match[1]), int(match[2])) for match in matches)
    return sorted(part for part in parts if part.number < part.count)


def read_part(out: Path, part: Part) -> dict[str, Any] | None:
    """The record of a part, or None where there is none.

    Raises:
        DataError: it cannot be read, or belongs to another part.
    """
    path = out / part.record
    try:
        record = json.loads(path.read_text())
        files = [record["splits"][split]["file"] for split in SPLITS]
        if files != [f"{part.stem(split)}.beton" for split in SPLITS]:
            raise ValueError(f"it is that of {files[0]}")
        made_of(record)  # these raise KeyError if something is missing
        left_out(record)
        _joined(path, "error", [record])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} does not read ({error}): remove {part.files}") from error
    return record


def made_of(record: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in all parts. `on_bad` may differ: it has no effect on a part without bad images."""
    options = {name: value for name, value in record["options"].items() if name != "on_bad"}
    return {"listing": record["listing"], "options": options}


def left_out(record: dict[str, Any]) -> int:
    """The number of bad images that the part leaves out."""
    return sum(len(record["splits"][split]["skipped"]) for split in SPLITS)


def check_files(out: Path, part: Part, record: dict[str, Any]) -> None:
    """Raises:
    DataError: a file of the part is missing or damaged.
    """
    try:
        for split in SPLITS:
            BetonSource(out / f"{part.stem(split)}.beton", (out / part.record, record))
    except DataError as error:
        raise DataError(str(error).removesuffix(": convert the dataset again")) from error  # only this part


def join_parts(src: Path, out: Path, on_bad: str, count: int | None = None) -> None:
    """Write dataset.json, if all parts are in `out`, undamaged, and made from the same images with the same options.

    Args:
        src: what the parts were made from. It is not read.
        count: the number of parts; by default from their names.

    Raises:
        DataError: a part is missing, damaged, or differs from the others.
    """
    if not out.is_dir():
        raise DataError(f"no folder {out}: convert the parts with --only K/N first")
    with locked(out):
        if (out / DATASET_FILE).exists():
            print(f"{out} is there already")
            return
        records = _read_parts(out, count)
        for split in SPLITS:
            find_betons(out, split)  # raises if there is another file of the split
        dataset = _joined(src, on_bad, list(records.values()))
        write_record(out / DATASET_FILE, dataset)
        with writing(out):
            for part in records:
                (out / part.record).unlink()
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
    counts = " and ".join(f"{dataset['splits'][split]['images']:,} {split}" for split in SPLITS)
    print(f"joined {len(records)} parts: {counts} images, in {out}")


def _read_parts(out: Path, count: int | None) -> dict[Part, dict[str, Any]]:
    """The records of all parts, after checking that they fit together."""
    counts = {part.count for part in find_parts(out)} | ({count} if count else set())
    if not counts:
        raise DataError(f"{out} holds no parts: convert them with --only K/N first")
    if len(counts) > 1:
        raise DataError(f"{out} holds parts of {' and of '.join(map(str, sorted(counts)))}: remove those of one")
    (count,) = counts
    records, problems, missing = {}, [], []
    for part in (Part(number, count) for number in range(count)):
        try:
            record = read_part(out, part)
            if record is None:
                missing.append(f"{part}")
                continue
            check_files(out, part, record)
            records[part] = record
        except DataError as error:
            problems.append(f"part {part}: {error}")
    if missing:
        problems.insert(0, f"missing: {', '.join(missing)}")
    if records:
        what = {part: json.dumps(made_of(record), sort_keys=True) for part, record in records.items()}
        ((common, _),) = Counter(what.values()).most_common(1)
        differing = [part for part in records if what[part] != common]
        if differing:
            files = ", ".join(part.files for part in differing)
            names = ", ".join(map(str, differing))
            problems.append(f"of other images or by other options than the rest: {names} (remove {files})")
    if problems:
        raise DataError(f"{out} is no dataset yet; {'; '.join(problems)}; convert these with --only K/{count}")
    return records


def _joined(src: Path, on_bad: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the dataset, from the records of its parts."""
    first = records[0]
    any_skip = "skip" in (on_bad, *(record["options"]["on_bad"] for record in records))
    splits = {}
    for split in SPLITS:
        shards = [record["splits"][split] for record in records]
        splits[split] = {"images": sum(shard["images"] for shard in shards), "shards": shards}
    versions: dict[str, set[str]] = {}
    for record in records:
        for package, version in record["versions"].items():
            versions.setdefault(package, set()).add(version)
    return {
        "format": first["format"],
        "classes": first["classes"],
        "source": {"kind": first["source"]["kind"], "path": str(src.resolve())},
        "options": {**first["options"], "on_bad": "skip" if any_skip else "error", "shards": len(records)},
        "splits": splits,
        "versions": {package: ", ".join(sorted(found)) for package, found in versions.items()},  # of all machines
    }
