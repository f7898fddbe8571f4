"""Recognise the form in which a folder holds ImageNet."""

import os
from pathlib import Path

from pipelines.sources.errors import DataError
from tools.conversion.folders import open_folders, open_kaggle
from tools.conversion.shards import open_shards
from tools.conversion.source import Source
from tools.conversion.tars import open_tars

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
KNOWN = (
    "train/ and val/ with a folder for each class; ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
    "ILSVRC2012_devkit_t12.tar.gz; ILSVRC/Data/CLS-LOC and LOC_val_solution.csv (Kaggle); or train-*.parquet and "
    "validation-*.parquet, or folders of these names (Hugging Face)"
)


def open_source(path: Path, strict: bool = False) -> Source:
    """List the images of the ImageNet below `path`.

    Args:
        strict: files that would be left out are an error.

    Raises:
        DataError: the form is not known, a part is missing or damaged, or the classes of train and val differ.
    """
    if path.is_file() and path.name.lower().endswith(ARCHIVES):
        raise DataError(f"{path} is an archive: unpack it, and name the folder")
    if not path.is_dir():
        raise DataError(f"no folder {path}: SRC must be a folder that holds {KNOWN}")
    for open_form in (open_shards, open_folders, open_tars, open_kaggle):  # shards may lie in train/ and val/
        source = open_form(path)
        if source is not None:
            for folder, left_out in source.left_out.items() if strict else ():
                left_out.refuse(folder)
            return source
    packed = sorted(entry.name for entry in os.scandir(path) if entry.name.lower().endswith(ARCHIVES))
    if packed:
        raise DataError(f"{path} holds {packed[0]} and no ImageNet in a known form: unpack it there")
    raise DataError(f"{path} holds no ImageNet in a known form: it must hold {KNOWN}")
