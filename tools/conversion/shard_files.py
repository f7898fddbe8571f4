"""Find the parquet files of each split, and check that each is there once.

Only the numbers in the names show that a file is missing or there twice: `train-00003-of-00014.parquet`, in older
repositories with a hash after the numbers.
"""

import re
from pathlib import Path

from pipelines.sources.errors import DataError
from pipelines.sources.listing import is_hidden
from tools.conversion.source import check_parts

NAMES = {"train": ("train",), "val": ("validation", "val", "valid")}
NUMBERED = re.compile(r"((?:.*-)?)(\d{1,6})-of-(\d{1,6})((?:-[0-9a-f]+)?)\.parquet")  # before, number, count, hash


def find_shards(path: Path) -> dict[str, list[Path]] | None:
    """The shards of each split, sorted: `train-*.parquet` or `train/*.parquet` in `path` or `path`/data.

    Returns:
        None where there are none.

    Raises:
        DataError: a shard is missing or there twice, or several sets of files could be the split.
    """
    found = {split: _search(path, names, ".parquet") for split, names in NAMES.items()}
    broken_off = sorted((path / ".cache/huggingface/download").rglob("*.incomplete"))  # of Hugging Face's client
    for names in NAMES.values():
        broken_off += [file for files in _search(path, names, ".incomplete").values() for file in files]
    for patterns in found.values():
        if len(patterns) > 1:
            raise DataError(f"{path} holds {' and '.join(patterns)}: leave only one of them there")
    if broken_off and not all(found.values()):
        raise DataError(f"{broken_off[0]} is of a download that broke off: finish it")
    parts = {next(iter(found[split]), f"{names[0]}-*.parquet"): bool(found[split]) for split, names in NAMES.items()}
    if not check_parts(path, parts):
        return None
    shards = {split: next(iter(patterns.values())) for split, patterns in found.items()}
    for files in shards.values():
        _check_numbers(files, broken_off)
    return shards


def _search(path: Path, names: tuple[str, ...], suffix: str) -> dict[str, list[Path]]:
    """The files of a split with this suffix: {pattern: the files that match it}."""
    patterns = [f"{folder}{name}{rest}{suffix}" for folder in ("", "data/") for name in names for rest in ("-*", "/*")]
    found = {pattern: sorted(file for file in path.glob(pattern) if not is_hidden(file.name)) for pattern in patterns}
    return {pattern: files for pattern, files in found.items() if files}


def _check_numbers(files: list[Path], broken_off: list[Path]) -> None:
    """Raises:
    DataError: the names have numbers, and not each number is there once; or they have none, and a download broke off.
    """
    matches = {file: match for file in files if (match := NUMBERED.fullmatch(file.name))}
    unfinished = f"{broken_off[0]} is of a download that broke off: finish it" if broken_off else None
    if not matches:
        if unfinished:
            raise DataError(f"{unfinished}, or remove that file")
        return
    sample, first = next(iter(matches.items()))
    plain = next((file for file in files if file not in matches), None)
    if plain is not None:
        raise DataError(f"{plain} has no number in its name, {sample.name} has one: leave only those that belong there")
    by_number: dict[int, Path] = {}
    for file, match in matches.items():
        if match[3] != first[3]:
            raise DataError(f"{sample} and {file.name} are of two revisions: leave only those of one")
        other = by_number.setdefault(int(match[2]), file)
        if other is not file:
            raise DataError(
                f"{other} and {file.name} are the same part of the data: leave only the one of its revision"
            )
    count = int(first[3])
    begin = 1 if count in by_number and 0 not in by_number else 0
    expected = range(begin, begin + count)
    foreign = next((file for number, file in by_number.items() if number not in expected), None)
    if foreign is not None:
        raise DataError(f"{foreign} is none of {count} files: remove it, and see whether the others belong together")
    missing = [number for number in expected if number not in by_number]
    if missing:
        name = f"{first[1]}{missing[0]:0{len(first[2])}}-of-{first[3]}{'-*' if first[4] else ''}.parquet"
        more = f", nor {len(missing) - 1:,} more" if missing[1:] else ""
        raise DataError(f"no file {sample.parent / name}{more}: {unfinished or 'download it'}")
