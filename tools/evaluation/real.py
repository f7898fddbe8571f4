"""ImageNet-ReaL (Beyer et al., arXiv 2006.07159): several labels, or none, for each image of ImageNet's val."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from pipelines.sources.errors import DataError
from tools.evaluation.figures import NO_OUTPUT


def read_real(path: Path) -> list[list[int]]:
    """The labels of ILSVRC2012_val_00000001, …, in order: positions in ImageNet's sorted WordNet IDs.

    Raises:
        DataError: the file does not read, or is no list of such lists.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--real {path} does not read ({error}): download real.json again") from error
    is_list = isinstance(content, list) and all(isinstance(each, list) for each in content)
    if not is_list or not all(type(label) is int and 0 <= label < 1000 for each in content for label in each):
        raise DataError(f"--real {path}: must be a list with a list of labels in [0, 1000) for each image of val")
    return content


def labels_of(names: Iterable[str], real: list[list[int]], outputs: dict[int, int]) -> list[list[int]]:
    """The labels of images by the names of their files, as outputs of the model; `NO_OUTPUT` where it has none.

    Args:
        real: of `read_real`. outputs: of the model, by position in ImageNet's sorted WordNet IDs.

    Raises:
        DataError: an image is not called as ImageNet's, or the file knows no such image.
    """
    found = []
    for name in names:
        called = re.search(r"ILSVRC2012_val_(\d{8})\b", name)
        if not called:
            raise DataError(
                f"--real goes by the names of files, and {name} is not called ILSVRC2012_val_NUMBER: "
                "name ImageNet's val as class folders"
            )
        if not 1 <= int(called[1]) <= len(real):
            raise DataError(f"--real has labels of {len(real):,} images, none of {called[0]}: use the whole real.json")
        found.append([outputs.get(label, NO_OUTPUT) for label in real[int(called[1]) - 1]])
    return found
