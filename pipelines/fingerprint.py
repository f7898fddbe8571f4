"""The fingerprint of a dataset: a run that resumes compares it, to notice that the images are others."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipelines.batch import Source


def fingerprint(source: Source) -> dict[str, str]:
    """{property: its number or hash}. Two datasets are the same if all properties that both have are equal.

    Every source has the number, labels and sizes of its images in the order of the dataset: the plan depends on them. A
    .beton file with checksums adds the bytes of its images, a folder the names of its files. So a dataset may move, and
    it may change from a folder to .beton files that hold the same bytes.
    """
    return {
        "number": str(len(source)),
        "labels": digest(source.labels),
        "sizes": digest(source.sizes),
        **source.fingerprint_parts(),
    }


def digest(values: NDArray) -> str:
    """16 hexadecimal digits for the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).data.cast("B")).hexdigest()[:16]
