"""Kinds of evaluation data: where a folder has its images, and which output of a model each of its classes is.

Classes are matched by their names, never by where they stand. KINDS says how each kind departs from that.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipelines.sources.beton_shards import find_betons
from pipelines.sources.errors import DataError
from pipelines.sources.listing import list_folder
from training.classes import Classes, assumed_order, is_wordnet_id, match_by_name
from training.options import ConfigError

Name = Literal["classes", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-c"]
Asked = Literal["auto", Name]

# Sets of WordNet IDs, by the `fingerprint` of their names; the lists are timm's, timm/data/_info/imagenet*_synsets.txt.
IMAGENET, IMAGENET_A, IMAGENET_R = "385e0240499426c0", "f6aa4b23244554d9", "e19a59d84e3746fa"
SEVERITIES = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class Kind:
    """How a kind of data departs from class folders that are matched by name.

    recognises: whether data with classes of these names, for a model with those classes, is of this kind.
    numbered: the names are numbers, positions among ImageNet's sorted WordNet IDs.
    restricted: only the classes of the data compete; the other outputs of the model are left out.
    eval_crop: share of the shorter side to evaluate, where it is not that of ImageNet's val.
    """

    recognises: Callable[[list[str], Classes], bool] = lambda names, model: False
    numbered: bool = False
    restricted: bool = False
    eval_crop: float | None = None


def _are_numbers(names: list[str], model: Classes) -> bool:
    """Whether the names are numbers to this model: it has no classes of these names."""
    return bool(names) and all(map(str.isdecimal, names)) and not set(names) <= set(model.names or [])


# The first that recognises the data is taken. ImageNet-C is recognised by its folders: `find_parts`.
KINDS: dict[Name, Kind] = {
    # arXiv 1902.10811: folders 0 … 999, which sort as strings, "10" before "2"
    "imagenet-v2": Kind(_are_numbers, numbered=True),
    # arXiv 1907.07174 and 2006.16241: 200 classes each, and what is predicted is one of these
    "imagenet-a": Kind(lambda names, model: fingerprint(names) == IMAGENET_A, restricted=True),
    "imagenet-r": Kind(lambda names, model: fingerprint(names) == IMAGENET_R, restricted=True),
    # arXiv 1903.12261: the images are cut already
    "imagenet-c": Kind(eval_crop=1.0),
    "classes": Kind(lambda names, model: True),
}


class Part(NamedTuple):
    """Data that is evaluated as a whole: class folders, or a .beton file without its suffix.

    corruption, severity: of ImageNet-C, else "" and 0.
    """

    path: Path
    corruption: str = ""
    severity: int = 0


def fingerprint(names: Iterable[str]) -> str:
    """16 hexadecimal digits for a set of names."""
    return hashlib.sha256("\n".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:16]


def find_parts(data: Path, kind: Asked) -> list[Part]:
    """What is evaluated in `data`: a .beton file; a folder with val or val.beton in it; class folders; ImageNet-C.

    Raises:
        DataError: there is no such folder, or it is not of this kind.
    """
    data = Path(os.path.abspath(data))  # the last part of `.` is a name, too
    if data.suffix == ".beton" and data.is_file():
        if re.search(r"-\d{5}-of-\d{5}$", data.stem):
            raise DataError(f"{data} is a part of the data: name the folder {data.parent}")
        return [Part(data.with_suffix(""))]
    if not data.is_dir():
        raise DataError(f"no folder {data}: name one with class folders, with val or val.beton in it, or a .beton file")
    if kind != "imagenet-c" and (find_betons(data, "val") or (data / "val").is_dir()):
        return [Part(data / "val")]
    corruptions = _find_corruptions(data) if kind in ("auto", "imagenet-c") else {}
    if kind == "imagenet-c" and not corruptions:
        raise DataError(f"{data} is not ImageNet-C: it must look like {data}/CORRUPTION/SEVERITY/CLASS/*.JPEG")
    parts = [
        Part(folder / severity, name, int(severity))
        for name, folder in sorted(corruptions.items())
        for severity in SEVERITIES
        if (folder / severity).is_dir()
    ]
    return parts or [Part(data)]


def _find_corruptions(data: Path) -> dict[str, Path]:
    """{corruption: its folder} of ImageNet-C; `data` may also be one of its corruptions, or of its five archives."""
    if _is_corruption(data):
        return {data.name: data}
    found: dict[str, Path] = {}
    folders = [data / name for name in list_folder(data)[0] if not is_wordnet_id(name)]
    if not any(map(_is_corruption, folders)):
        folders = [group / name for group in folders for name in list_folder(group)[0]]
    for folder in filter(_is_corruption, folders):
        if folder.name in found:
            raise DataError(f"{data} holds {folder.name} twice, {found[folder.name]} and {folder}: move one away")
        found[folder.name] = folder
    return found


def _is_corruption(folder: Path) -> bool:
    """Whether the folder holds severities, which hold class folders; ImageNet-V2's numbers hold images."""
    severities = [folder / severity for severity in SEVERITIES if (folder / severity).is_dir()]
    return any(list_folder(severity)[0] for severity in severities)


class Matched(NamedTuple):
    """What the classes of the data are to the model.

    kind: of the data. outputs: of the model, for each class of the data. names: of the classes that compete, in the
    order of the logits. restricted: whether these are those of the data alone. notes: lines to say.
    """

    kind: Name
    outputs: list[int]
    names: list[str]
    restricted: bool
    notes: list[str]


def match(kind: Asked, path: Path, model: Classes, data: Classes) -> Matched:
    """Match the classes of the data with those of the checkpoint at `path`.

    Args:
        kind: of the data; auto: it is recognised.

    Raises:
        CheckpointError: the model does not know all classes of the data.
        DataError: the data is not of this kind.
        ConfigError: nobody says how ImageNet's classes are called.
    """
    if kind == "auto":
        kind = next(name for name, each in KINDS.items() if each.recognises(data.names or [], model))
    how, notes = KINDS[kind], []
    if how.numbered:
        data = Classes(data.count, _ids_of_numbers(data.names, model))
        notes.append(f"{kind}: the data's classes are numbers, positions among ImageNet's sorted WordNet IDs")
    if model.names is None and model.count == 1000 and data.names and all(map(is_wordnet_id, data.names)):
        notes.append(assumed_order(path, model, data))
        model = Classes(1000, imagenet_ids(model, data))
    outputs, note = match_by_name(path, model, data)
    left_out = model.count - len(outputs)
    if how.restricted and left_out:
        note = f"{kind}: only its {len(outputs)} classes compete, as is usual; {left_out} outputs are left out"
    names = _names_of_outputs(model, data)
    if how.restricted:
        names = [names[output] for output in outputs]
    return Matched(kind, outputs, names, how.restricted, notes + [note] * (note is not None))


def imagenet_ids(*known: Classes) -> list[str]:
    """The WordNet IDs of ImageNet's 1000 classes, sorted: from classes that are exactly these, else from timm.

    Raises:
        ConfigError: timm is not installed.
    """
    for classes in known:
        if classes.names is not None and fingerprint(classes.names) == IMAGENET:
            return sorted(classes.names)
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ConfigError(
            "neither the checkpoint nor the data names ImageNet's 1000 classes; timm does: pip install 'timm>=1.0.31'"
        ) from error
    return sorted(ImageNetInfo().label_names())


def in_words(names: Iterable[str]) -> dict[str, str]:
    """{WordNet ID: what it means in English}, of those names that are WordNet IDs; nothing without timm."""
    ids = [name for name in names if is_wordnet_id(name)]
    if not ids:
        return {}
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return {}
    known: Any = ImageNetInfo().label_descriptions(as_dict=True)
    return {name: known[name] for name in ids if name in known}


def _ids_of_numbers(names: list[str] | None, model: Classes) -> list[str]:
    """The WordNet IDs of ImageNet-V2's folders."""
    wrong = [name for name in names or [] if not name.isdecimal() or int(name) >= 1000]
    if names is None or wrong:
        found = f"has a class {wrong[0]}" if wrong else "does not name its classes"
        raise DataError(f"the data {found}: ImageNet-V2's folders are called 0 to 999; use another --kind")
    ids = imagenet_ids(model)
    return [ids[int(name)] for name in names]


def _names_of_outputs(model: Classes, data: Classes) -> list[str]:
    """A name for each output, also where nobody knows it."""
    known = model.names or data.names or []  # without names of its own, a model has the classes of the data
    return [*known, *(f"output {number}" for number in range(len(known), model.count))]
