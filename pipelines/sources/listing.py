"""Which files of a folder are images, and which class each belongs to.

    ROOT/CLASS/*.JPEG              the folder names the class; deeper folders (CLASS/images/*.JPEG) count to it
    ROOT/images/*.JPEG             and ROOT/val_annotations.txt, which names the class: Tiny ImageNet's val

The loaders and the converter all list by this module, so they take the same files. What is left out is counted and
named.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.sources.errors import DataError
from pipelines.sources.images import EXTENSIONS

# Names of what systems and programs leave behind; names that begin with a dot are hidden, too
HIDDEN = frozenset({"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"})
ANNOTATIONS = "val_annotations.txt"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or a program. It is left out and not counted."""
    return name.startswith(".") or name.lower() in HIDDEN


def is_image(name: str) -> bool:
    """Whether a file of this name must be an image that `images.examine` can read."""
    return name.lower().endswith(EXTENSIONS)


def class_name(name: str) -> str:
    """The class of a folder of this name: "é" has two forms in Unicode, and copying files may change the form."""
    return unicodedata.normalize("NFC", name)


@dataclass
class LeftOut:
    """Files that are left out, since their names are no images'. kinds: how many of each extension. first: one of them.

    deeper: images that lie deeper than ROOT/CLASS/FILE; they are not left out, but named. first_deeper: one of them.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    first: str = ""
    deeper: int = 0
    first_deeper: str = ""

    def add(self, path: str) -> None:
        self.first = self.first or path
        self.kinds[os.path.splitext(path)[1] or "no extension"] += 1

    def take_images(self, files: list[str]) -> list[str]:
        """The files whose names are images'; the others are left out."""
        for file in files:
            if not is_image(file):
                self.add(file)
        return [file for file in files if is_image(file)]

    def refuse(self, root: Path) -> None:
        """Raises:
        DataError: something was left out.
        """
        if self.kinds:
            raise DataError(f"{self.note(root)}: remove them, or go without --strict")

    def note(self, root: Path) -> str | None:
        """One line about both kinds, or None where there are none."""
        parts = []
        if self.kinds:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common(5))
            more = ", …" if len(self.kinds) > 5 else ""
            count = self.kinds.total()
            what = (
                f"{count:,} files that are no images by their names"
                if count > 1
                else "1 file that is no image by its name"
            )
            parts.append(f"left out {what} ({kinds}{more})")
            parts.append(f"such as {self.first}")
        if self.deeper:
            parts.append(f"{self.deeper:,} images lie in folders below their class's, such as {self.first_deeper}")
        return f"{root}: {', '.join(parts)}" if parts else None


@dataclass
class Listing:
    """The images of one split.

    Attributes:
        classes: names, sorted, in Unicode's composed form (NFC).
        names: (N) paths below the root, sorted by class, then by name. labels: (N), positions in `classes`.
        fingerprint: changes when a file is added, removed or renamed, not when one is overwritten.
        left_out: the files that are no images by their names.
    """

    classes: list[str]
    names: list[str]
    labels: list[int]
    fingerprint: str
    left_out: LeftOut


def list_images(root: Path) -> Listing:
    """The images below `root` and their classes.

    Raises:
        DataError: there is no such folder; it has no classes, or two of the same name; a class has no images; a link
            leads to nothing; something among the images is no file, but a pipe or a device.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}: it must hold CLASS/*.JPEG, or be converted to {root.name}.beton")
    walk = _Walk(root)
    if (root / ANNOTATIONS).is_file() and (root / "images").is_dir():
        by_class = _annotated(root, walk)
    else:
        by_class = _class_folders(root, walk)
    classes = sorted(by_class)
    names = [name for label in classes for name in sorted(by_class[label])]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return Listing(classes, names, labels, walk.fingerprint(), walk.left_out)


def list_folder(root: Path) -> tuple[list[str], list[str]]:
    """(folders, files) in `root` itself, each sorted, without hidden ones.

    Raises:
        DataError: as `list_images`, for what lies there.
    """
    return _Walk(root).entries("")


def list_tree(root: Path) -> tuple[list[str], LeftOut]:
    """The images below `root`, in whatever folders, as paths relative to it; and the files that are no images by their
    names.

    Raises:
        DataError: as `list_images`, for what lies there.
    """
    walk = _Walk(root)
    images = walk.images("")
    walk.left_out.deeper = 0  # no folder is a class here
    return images, walk.left_out


def _class_folders(root: Path, walk: "_Walk") -> dict[str, list[str]]:
    """{class: its images} of a folder of class folders."""
    folders, files = walk.entries("")
    for file in files:
        walk.left_out.add(file)  # also an image: it has no class
    if not folders:
        raise DataError(f"{root} holds no class folders: it must look like {root}/CLASS/*.JPEG")
    by_class: dict[str, list[str]] = {}
    for folder in folders:
        name = class_name(folder)
        if name in by_class:
            raise DataError(f"{root} holds two folders {name}, in two forms of Unicode: put their images into one")
        by_class[name] = walk.images(folder)
        if not by_class[name]:
            raise DataError(
                f"class {name} has no images in {root / folder}: add some (.JPEG, .png, …) or remove the folder"
            )
    inside = {os.path.dirname(image) for image in by_class[class_name(folders[0])]}
    if len(folders) == 1 and len(inside) > 1 and folders[0] not in inside:
        raise DataError(f"{root} holds one folder, in which the class folders lie: name {root / folders[0]} instead")
    return by_class


def _annotated(root: Path, walk: "_Walk") -> dict[str, list[str]]:
    """{class: its images} of Tiny ImageNet's val: a table with the columns file, class and a box, separated by tabs."""
    try:
        rows = [line.split("\t") for line in (root / ANNOTATIONS).read_text("utf-8-sig").splitlines() if line.strip()]
        class_of = {row[0].strip(): class_name(row[1].strip()) for row in rows}
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{root / ANNOTATIONS} does not read ({error}): download it again") from error
    by_class: dict[str, list[str]] = {}
    for image in walk.images("images"):
        name = class_of.get(os.path.basename(image))
        if not name:
            raise DataError(f"{root / ANNOTATIONS} has no class for {image}: download it again, or remove the image")
        by_class.setdefault(name, []).append(image)
    if not by_class:
        raise DataError(f"{root / 'images'} holds no images: download it again")
    walk.left_out.deeper = 0  # this form has its images there
    walk.note_time("", ANNOTATIONS)
    return by_class


class _Walk:
    """Lists folders below `root`; all paths are relative to it. Hashes what tells whether one of them has changed."""

    def __init__(self, root: Path):
        self._root = root
        self._seen = hashlib.sha256()
        self.left_out = LeftOut()

    def fingerprint(self) -> str:
        return self._seen.hexdigest()

    def note_time(self, folder: str, name: str, *more: object) -> None:
        """Hash the time of a folder or file. A folder's changes when a file in it is added, removed or renamed."""
        path = os.path.join(folder, name)
        changed = os.stat(self._root / path).st_mtime_ns
        self._seen.update("\0".join(map(str, (path, changed, *more, ""))).encode(errors="surrogateescape"))

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """(folders, files) in `folder`, each sorted, without hidden ones."""
        folders, files = [], []
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    if not is_hidden(entry.name):
                        name = os.path.join(folder, entry.name)
                        (folders if self._is_folder(entry, name) else files).append(name)
        except OSError as error:
            raise DataError(f"cannot read {self._root / folder} ({error.strerror or error})") from error
        self.note_time(folder, "", len(files))
        return sorted(folders), sorted(files)

    def _is_folder(self, entry: os.DirEntry, name: str) -> bool:
        """Whether an entry is a folder; else it is a file.

        Raises:
            DataError: it is neither.
        """
        is_link = entry.is_symlink()
        if is_link and not os.path.exists(entry.path):
            if is_image(name):
                return False  # reading it will say that nothing is there
            raise DataError(f"{entry.path} is a link to nothing: mend or remove it")  # perhaps it was a class folder
        if entry.is_dir() and not (is_image(name) and os.path.dirname(name)):
            inside, target = os.path.realpath(self._root / os.path.dirname(name)), os.path.realpath(entry.path)
            if is_link and os.path.commonpath([inside, target]) == target:
                raise DataError(f"{entry.path} is a link to a folder that it lies in: remove it")
            return True
        if not entry.is_file():
            raise DataError(f"{entry.path} is no file: remove it")  # a read from a pipe might never end
        return False

    def images(self, folder: str, depth: int = 0) -> list[str]:
        """The images in `folder` and below it."""
        folders, files = self.entries(folder)
        found = self.left_out.take_images(files)
        if depth:
            self.left_out.deeper += len(found)
            self.left_out.first_deeper = self.left_out.first_deeper or next(iter(found), "")
        for inner in folders:
            found += self.images(inner, depth + 1)
        return found
