"""Which class each output of a model means: classes are compared by name if both sides have names.

Class folders, .beton files of `tools.make_dataset`, and the checkpoints of runs on them have names. Official
checkpoints and data with numbered classes have none. There the number of classes must be equal; the order is assumed to
be the same, and a line says so.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dcd.checkpoint_file import CheckpointError


@dataclass(frozen=True)
class Classes:
    """The classes of data or of a model: their number, and their names in the order of the labels if known."""

    count: int
    names: list[str] | None = None


def is_wordnet_id(name: str) -> bool:
    """Whether a class is called as ImageNet's are."""
    return re.fullmatch(r"n\d{8}", name) is not None


def match_by_name(path: Path, model: Classes, data: Classes) -> tuple[list[int], str | None]:
    """For an evaluation of the checkpoint at `path`: the output of the model for each class of the data.

    Returns:
        (outputs, a line to say or None).

    Raises:
        CheckpointError: the model does not know all classes of the data, or no names tell whether it does.
    """
    if model.names is None or data.names is None:
        if model.count != data.count:
            unnamed = "the checkpoint" if model.names is None else "the data"
            raise CheckpointError(
                f"{path} has {model.count} classes, the data {data.count}, and {unnamed} does not name them: "
                "only data with all of the classes, in the same order, can be evaluated"
            )
        return list(range(data.count)), assumed_order(path, model, data)
    unknown = _some(set(data.names) - set(model.names))
    if unknown:
        raise CheckpointError(
            f"{path} does not know all classes of the data: {unknown} are not among its {_some(model.names)}; "
            "evaluate on data with its classes, under the same names"
        )
    outputs = [model.names.index(name) for name in data.names]
    count, of = len(outputs), len(model.names)
    return outputs, f"evaluating on {count} of the {of} classes of {path}" if count < of else None


def fits_classifier(path: Path, theirs: Classes, ours: Classes) -> tuple[bool, str | None]:
    """For a training that begins with the weights in `path`: whether their classifier has the same classes.

    Returns:
        (whether to load it, a line to say or None).
    """
    if theirs.count != ours.count:
        difference = f"{theirs.count} classes there, {ours.count} here"
    elif theirs.names is None or ours.names is None:
        return True, assumed_order(path, theirs, ours)
    elif theirs.names != ours.names:
        difference = _difference(theirs.names, ours.names)
    else:
        return True, None
    return False, f"{path}: all but the classifier is loaded ({difference}); the classifier begins anew"


def check_same(model: Classes, data: Classes) -> str | None:
    """For a run that resumes: a line to say, or None.

    Raises:
        CheckpointError: the checkpoint has other classes.
    """
    if model.names is not None and data.names is not None and model.names != data.names:
        raise CheckpointError(
            f"the checkpoint is of other classes ({_difference(model.names, data.names)}): "
            "use the same data, or begin in another --checkpoint folder with its weights as --weight"
        )
    return None if model.names == data.names else assumed_order("the checkpoint", model, data)


def assumed_order(path: Path | str, model: Classes, data: Classes) -> str:
    """What to say where the model or the data does not name its classes."""
    if model.names is not None:
        return f"the data does not name its classes: their order is assumed to be that of {path}"
    if model.count != 1000:
        return f"{path} does not name its classes: their order is assumed to be that of the data"
    others = [name for name in data.names or [] if not is_wordnet_id(name)]
    called = f", though the data's are called {_some(others)}" if others else ""
    return f"{path} does not name its classes: ImageNet's order, of sorted WordNet IDs, is assumed{called}"


def _difference(there: list[str], here: list[str]) -> str:
    """The difference of two unequal lists of names, in words."""
    sides = {"there": set(there) - set(here), "here": set(here) - set(there)}
    return "; ".join(f"only {side}: {_some(names)}" for side, names in sides.items() if names) or "in another order"


def _some(names: Iterable[str]) -> str:
    """The first three names in alphabetical order, and the number of the rest."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
