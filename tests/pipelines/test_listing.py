"""Which files are images of which class, for the loaders and the converter alike."""

import os
import socket
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from pipelines.sources.listing import is_hidden
from tests.pipelines.helpers import listed_by_the_converter

ROOT = Path(__file__).parents[2]
CAFE = unicodedata.normalize("NFC", "café")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """train and val with two classes of one image each, and an index folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("train/cat/a.JPEG", "train/dog/b.JPEG", "val/cat/c.JPEG", "val/dog/d.JPEG"):
        picture(tmp_path / "data" / name)
    return tmp_path / "data"


def picture(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (200, 100, 50)).save(path, **options)
    return path


def refused(root: Path, *words: str) -> None:
    """Both the loaders and the converter refuse the folder, by the same line."""
    lines = []
    for read in (lambda: FolderSource(root / "train"), lambda: listed_by_the_converter(root)):
        with pytest.raises(DataError) as caught:
            read()
        lines.append(str(caught.value))
        assert "\n" not in lines[-1]
    assert lines[0] == lines[1] and all(word in lines[0] for word in words), lines


def names(root: Path, split: str = "train") -> list[str]:
    """The images of a split by the loaders; the converter lists the same."""
    source = FolderSource(root / split)
    found = [source.path(i).relative_to(root).as_posix() for i in range(len(source))]
    converted = listed_by_the_converter(root)
    assert converted.classes == source.classes
    assert [converted.splits[split].name(i) for i in range(len(found))] == found
    assert converted.splits[split].labels.tolist() == source.labels.tolist()
    return found


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"]
)
@pytest.mark.parametrize("filled", [True, False])
def test_folders_of_systems_are_no_classes(root, hidden, filled):
    for folder in (root / "train" / hidden, root / "val" / hidden, root / "train" / "cat" / hidden):
        folder.mkdir()
        if filled:
            picture(folder / "x.JPEG")
    assert names(root) == ["train/cat/a.JPEG", "train/dog/b.JPEG"] and len(names(root, "val")) == 2
    assert FolderSource(root / "train").note is None


def test_files_of_systems_are_no_images(root):
    (root / "train" / "cat" / "._a.JPEG").write_bytes(b"\0\5\x16\7 a Mac's own")
    (root / "train" / ".DS_Store").write_bytes(b"\0")
    assert names(root) == ["train/cat/a.JPEG", "train/dog/b.JPEG"] and FolderSource(root / "train").note is None
    assert is_hidden("$Recycle.Bin") and not is_hidden("n01440764")


KINDS = ["jpg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "jp2", "avif", "ico"]


@pytest.mark.parametrize("end", KINDS)
def test_every_kind_that_pillow_reads_is_read(root, end):
    # Of an icon, Pillow 12 writes only the sizes from 16 pixels, unless others are named.
    path = picture(root / "train" / "cat" / f"b.{end.upper()}", sizes=[(9, 8)])
    assert f"train/cat/b.{end.upper()}" in names(root)
    image = FolderSource(root / "train").decode(1)
    with Image.open(path) as file:
        expected = file.convert("RGB").getpixel((2, 2))
    assert image.shape == (3, 8, 9) and abs(image[:, 2, 2].int() - image.new_tensor(expected).int()).max() <= 1


def test_images_in_deeper_folders_count_to_the_class_and_are_named(root):
    picture(root / "train" / "cat" / "more" / "b.JPEG")
    picture(root / "train" / "cat" / "more" / "still" / "c.JPEG")
    assert names(root)[:3] == ["train/cat/a.JPEG", "train/cat/more/b.JPEG", "train/cat/more/still/c.JPEG"]
    note = FolderSource(root / "train", strict=True).note  # they are read: nothing to refuse
    assert "2 images lie in folders below their class's, such as cat/more/b.JPEG" in note


def test_a_folder_too_high_is_no_dataset_of_one_class(root):
    root.rename(root.parent / "train")  # .../train/train/cat
    with pytest.raises(DataError, match="one folder, in which the class folders lie: name .*/train/train instead$"):
        FolderSource(_only_train(root.parent / "train"))


def _only_train(folder: Path) -> Path:
    for file in (folder / "val").rglob("*.JPEG"):
        file.unlink()
    for inner in ("val/cat", "val/dog", "val"):
        (folder / inner).rmdir()
    return folder


def test_what_is_left_out_is_counted_and_named_and_an_error_if_strict(root):
    for name in ("cat/a.xml", "cat/b.xml", "dog/readme", "labels.csv", "alone.JPEG"):
        (root / "train" / name).write_text("no image of a class")
    source = FolderSource(root / "train")
    assert len(source) == 2 and "\n" not in source.note
    assert "left out 5 files that are no images by their names" in source.note
    assert "2 .xml" in source.note and "1 no extension" in source.note and "such as alone.JPEG" in source.note
    with pytest.raises(DataError, match="left out 5 files .*: remove them, or go without --strict"):
        FolderSource(root / "train", strict=True)
    assert listed_by_the_converter(root).left_out[root / "train"].note(root / "train") == source.note
    with pytest.raises(DataError, match="left out 5 files .*: remove them, or go without --strict"):
        listed_by_the_converter(root, strict=True)


def test_a_link_to_a_class_folder_is_followed_and_one_to_nothing_is_named(root):
    (root / "train" / "dog").rename(root / "elsewhere")
    (root / "train" / "dog").symlink_to(root / "elsewhere")
    assert names(root) == ["train/cat/a.JPEG", "train/dog/b.JPEG"]
    (root / "elsewhere").rename(root / "gone")
    refused(root, str(root / "train" / "dog"), "is a link to nothing")
    (root / "train" / "dog").unlink()
    (root / "gone").rename(root / "train" / "dog")
    (root / "train" / "cat" / "more").symlink_to(root / "nowhere")  # perhaps a folder of images
    refused(root, str(root / "train" / "cat" / "more"), "is a link to nothing")


def test_a_link_from_an_image_to_nothing_is_named_as_an_image(root):
    link = root / "train" / "cat" / "b.JPEG"
    link.symlink_to("nowhere")
    with pytest.raises(DataError, match="1 file is no image; .*b.JPEG .No such file or directory"):
        FolderSource(root / "train")
    train = listed_by_the_converter(root).splits["train"]
    assert "train/cat/b.JPEG" in [train.name(i) for i in range(3)]  # and is bad when it is converted


def test_a_link_to_a_folder_that_it_lies_in_ends(root):
    (root / "train" / "cat" / "again").symlink_to(root / "train")
    refused(root, str(root / "train" / "cat" / "again"), "a folder that it lies in")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["train/cat/b.JPEG", "train/cat/notes", "train/notes"])
def test_what_is_no_file_would_be_waited_for_and_is_named(root, monkeypatch, kind, name):
    if kind == "pipe":
        os.mkfifo(root / name)
    elif kind == "device":
        (root / name).symlink_to("/dev/zero")
    else:
        monkeypatch.chdir((root / name).parent)  # a socket's path may have 107 bytes
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind((root / name).name)
    refused(root, str(root / name), "is no file: remove it")


def test_classes_in_two_forms_of_unicode_are_the_same(root):
    composed, taken_apart = CAFE, unicodedata.normalize("NFD", CAFE)
    assert composed != taken_apart
    picture(root / "train" / composed / "x.JPEG")
    picture(root / "val" / taken_apart / "y.JPEG")
    assert listed_by_the_converter(root).classes == FolderSource(root / "val").classes == [CAFE, "cat", "dog"]
    assert names(root, "val")[0] == f"val/{taken_apart}/y.JPEG"
    picture(root / "train" / taken_apart / "z.JPEG")
    refused(root, f"two folders {CAFE}", "two forms of Unicode")


def test_tiny_imagenet_is_read(root):
    for split in ("train", "val"):
        _only(root / split)
    for wnid in ("n01443537", "n01629819"):
        for number in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    rows = [("val_0.JPEG", "n01629819"), ("val_1.JPEG", "n01443537"), ("val_2.JPEG", "n01629819")]
    for file, _ in rows:
        picture(root / "val" / "images" / file)
    (root / "val" / "val_annotations.txt").write_text("".join(f"{file}\t{wnid}\t0\t0\t62\t62\n" for file, wnid in rows))
    assert names(root)[0] == "train/n01443537/images/n01443537_0.JPEG" and len(names(root)) == 4
    assert names(root, "val") == ["val/images/val_1.JPEG", "val/images/val_0.JPEG", "val/images/val_2.JPEG"]
    assert FolderSource(root / "val").labels.tolist() == [0, 1, 1] and FolderSource(root / "val").note is None
    picture(root / "val" / "images" / "val_3.JPEG")
    with pytest.raises(DataError, match=r"val_annotations.txt has no class for images/val_3.JPEG"):
        listed_by_the_converter(root)


def _only(folder: Path) -> None:
    for file in list(folder.rglob("*.JPEG")):
        file.unlink()
    for inner in list(folder.iterdir()):
        inner.rmdir()


def test_a_link_to_itself_is_one_to_nothing(root):
    (root / "train" / "cat" / "round").symlink_to("round")
    refused(root, str(root / "train" / "cat" / "round"), "link to nothing")


def test_a_folder_without_permission_says_so():
    script = """
import os, sys
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from pipelines.sources.images import has_native
has_native()
if os.getuid() == 0:
    os.setuid(65534)  # root reads everything
for root in sys.argv[1:]:
    try:
        FolderSource(root)
    except DataError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to others
        file, folder = Path(root, "file", "cat", "a.JPEG"), Path(root, "folder", "cat")
        picture(file).chmod(0)
        picture(folder / "a.JPEG")
        folder.chmod(0)
        os.chmod(root, 0o755)
        command = [sys.executable, "-c", script, str(file.parents[1]), str(folder.parent)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"{file} (Permission denied)"), done.stderr
    assert lines[1:] == [f"cannot read {folder} (Permission denied)"], done.stderr
