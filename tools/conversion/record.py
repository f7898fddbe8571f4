"""What a conversion records of its files, and how it publishes them: synced, then renamed, the record last."""

import contextlib
import importlib.metadata
import json
import platform
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from pipelines import native
from pipelines.sources.beton import BetonSource
from tools.conversion.images import Options
from tools.conversion.source import Source
from tools.conversion.writer import Written, writing
from training.folder_sync import sync_file, sync_folder

FORMAT = 1
PARTIAL = ".partial"  # the folder for what is not finished


def relevant(options: Options) -> dict[str, Any]:
    """The options that matter to the images."""
    return asdict(options) if options.mode == "reencode" else {"mode": options.mode}


def file_record(beton: Path, written: Written) -> dict[str, Any]:
    """The record of one file; its checksums are written beside it."""
    checksums = beton.with_suffix(".checksums.npy")
    with writing(checksums):
        np.save(checksums, written.checksums)
        sync_file(checksums)
    return {
        "file": beton.name,
        "images": len(written.checksums),
        "bytes": beton.stat().st_size,
        "index_xxh64": BetonSource(beton).index_checksum(),
        "checksums": checksums.name,
        "checksums_xxh64": native.hex_checksum(written.checksums),
        "reencoded": [{"name": name, "reason": reason} for name, reason in written.reencoded],
        "skipped": [{"name": name, "reason": reason} for name, reason in written.bad],
    }


def dataset_record(source: Source, src: Path, options: dict[str, Any], splits: dict[str, Any]) -> dict[str, Any]:
    """The record of the whole dataset."""
    return {
        "format": FORMAT,
        "classes": source.classes,
        "source": {"kind": source.kind, "path": str(src.resolve())},
        "options": options,
        "splits": splits,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("dcd-trainer", "ffcv", "numpy", "pillow", "opencv-python-headless", "opencv-python", "pyarrow", "scipy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["libjpeg-turbo of pillow"] = features.version("libjpeg_turbo") or "none"
    return versions


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, which is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        sync_file(temporary)
        temporary.rename(path)
        sync_folder(path.parent)


def publish(partial: Path, out: Path, names: Sequence[str]) -> None:
    """Rename the files `names` from `partial` into `out`; the last is the record, which says that all are there."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    with writing(out):
        for name in names:
            if (partial / name).exists():  # else an earlier start has renamed it
                (partial / name).rename(out / name)
        sync_folder(out)
        partial.rmdir()
    for number, handler in kept.items():
        signal.signal(number, handler)
