"""What tells the images of one dataset from those of another, for a run that goes on."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipelines.batch import Source


def fingerprint(source: Source) -> dict[str, str]:
    """{what was looked at: its number or hash}. Two datasets are the same where all that both have is equal.

    Every source has the number of its images, and their labels and sizes in the order of the dataset, of which the plan
    is made; a .beton file with checksums also has their bytes, a folder the names of its files. So the same images may
    lie in a folder or in .beton files that hold them as they are, wherever these are.
    """
    return {
        "number": str(len(source)),
        "labels": digest(source.labels),
        "sizes": digest(source.sizes),
        **source.particulars(),
    }


def digest(values: NDArray) -> str:
    """16 hexadecimal digits for the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).data.cast("B")).hexdigest()[:16]
