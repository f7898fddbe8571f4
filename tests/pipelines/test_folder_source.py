"""The folder source: what it lists, what it keeps in its index and what it says of damaged data."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An index folder for each test, so that no test finds another one's index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dcd"


def picture(height, width, mode="RGB"):
    """A colourful gradient, which JPEG keeps almost as it is."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([255 * y / height, 255 * x / width, 255 * (1 - x / width)], -1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


@pytest.fixture
def train(tmp_path):
    """Two classes; the names' order differs from the order in which they are made."""
    train = tmp_path / "train"
    for name, size in (
        ("dog/b.JPEG", (40, 60)),
        ("dog/a.jpg", (50, 30)),
        ("cat/c.jpeg", (20, 20)),
        ("cat/a.png", (8, 9)),
    ):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        picture(*size).save(train / name)
    return train


def index_file(cache):
    (file,) = cache.iterdir()  # exactly one: no temporary file is left behind
    return file


def assert_one_line_naming(error, path):
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_classes_labels_paths_and_sizes(train):
    (train / "README.txt").write_text("files beside the class folders are no classes")
    (train / "cat" / "notes.txt").write_text("other files in a class folder are no images")
    source = FolderSource(train)
    assert source.classes == ["cat", "dog"]
    assert [source.path(i).relative_to(train).as_posix() for i in range(len(source))] == [
        "cat/a.png",
        "cat/c.jpeg",
        "dog/a.jpg",
        "dog/b.JPEG",
    ]
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1]
    assert source.sizes.dtype == np.int32 and source.sizes.tolist() == [[8, 9], [20, 20], [50, 30], [40, 60]]


def test_every_kind_of_image_decodes_to_rgb_as_pillow_decodes_it(tmp_path):
    folder = tmp_path / "train" / "all"
    folder.mkdir(parents=True)
    for mode in ("RGB", "L", "CMYK"):
        picture(33, 47, mode).save(folder / f"{mode}.JPEG", quality=95)
    picture(33, 47).save(folder / "progressive.JPEG", progressive=True)
    picture(33, 47).save(folder / "really_a_png.JPEG", format="PNG")  # ImageNet has one of these
    for mode in ("P", "RGBA"):
        picture(33, 47, mode).save(folder / f"{mode}.png")
    source = FolderSource(folder.parent)
    assert len(source) == 7
    for i in range(len(source)):
        image = source.decode(i)
        assert image.dtype == torch.uint8 and image.shape == (3, 33, 47)
        with Image.open(source.path(i)) as file:
            assert source.sizes[i].tolist() == [file.height, file.width]
            expected = np.asarray(file.convert("RGB"), int)
        difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
        assert difference.mean() <= 1, source.path(i)  # two versions of libjpeg may round differently


def test_exif_rotation_is_ignored_in_the_size_and_in_the_pixels(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    picture(20, 50).save(tmp_path / "train" / "cat" / "turned.JPEG", exif=exif)
    source = FolderSource(tmp_path / "train")
    assert source.sizes.tolist() == [[20, 50]]
    image = source.decode(0)
    assert image.shape == (3, 20, 50)
    assert image[1, :, -1].float().mean() > 230 > 30 > image[1, :, 0].float().mean()  # green grows to the right


def test_the_index_is_used_and_lies_outside_the_dataset(train, cache):
    listing = sorted(train.rglob("*"))
    sizes = FolderSource(train).sizes
    assert index_file(cache).suffix == ".npz" and sorted(train.rglob("*")) == listing
    with open(train / "cat" / "c.jpeg", "r+b") as file:  # written in place: the folder's time stays
        file.write(b"no header any more")
    np.testing.assert_array_equal(FolderSource(train).sizes, sizes)  # so the headers were not read again


def test_the_index_is_made_anew_when_a_file_is_added_or_removed(train):
    FolderSource(train)
    picture(70, 80).save(train / "cat" / "b.JPEG")
    assert FolderSource(train).sizes.tolist() == [[8, 9], [70, 80], [20, 20], [50, 30], [40, 60]]
    (train / "dog" / "a.jpg").unlink()
    assert FolderSource(train).sizes.tolist() == [[8, 9], [70, 80], [20, 20], [40, 60]]
    (train / "dog" / "b.JPEG").rename(train / "cat" / "d.JPEG")
    picture(11, 12).save(train / "dog" / "e.JPEG")  # as many files as before
    assert FolderSource(train).sizes.tolist() == [[8, 9], [70, 80], [20, 20], [40, 60], [11, 12]]


def test_splits_and_datasets_have_indexes_of_their_own(train, cache):
    FolderSource(train)
    for name in ("val/cat", "val/dog", "other/train/cat"):
        (train.parent / name).mkdir(parents=True)
        picture(5, 6).save(train.parent / name / "a.JPEG")
    assert FolderSource(train.parent / "val").sizes.tolist() == [[5, 6], [5, 6]]
    assert FolderSource(train.parent / "other" / "train").sizes.tolist() == [[5, 6]]
    assert len(list(cache.iterdir())) == 3


def test_an_index_that_cannot_be_written_only_warns(train, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a file where the cache folder should be: not even root can write there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert FolderSource(train).sizes.tolist() == [[8, 9], [20, 20], [50, 30], [40, 60]]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and str(tmp_path / "file") in warning


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "altered", "other fingerprint", "other arrays"])
def test_a_damaged_index_is_made_anew(train, cache, damage):
    sizes = FolderSource(train).sizes
    index = index_file(cache)
    with np.load(index) as stored:
        headers = stored["headers"]
    whole = index.read_bytes()
    if damage == "empty":  # what a full disk or a power cut leaves
        index.write_bytes(b"")
    elif damage == "text":
        index.write_text("no archive")
    elif damage == "truncated":
        index.write_bytes(whole[: len(whole) // 2])
    elif damage == "altered":
        middle = whole.index(b"headers.npy") + 180
        index.write_bytes(whole[:middle] + b"\xff" * 8 + whole[middle + 8 :])
    elif damage == "other fingerprint":
        np.savez(index, fingerprint=np.array("0"), headers=headers[::-1])
    else:
        np.savez(index, heights=sizes[:, 0])
    np.testing.assert_array_equal(FolderSource(train).sizes, sizes)
    with np.load(index) as stored:  # and is whole again
        np.testing.assert_array_equal(stored["headers"], headers)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        FolderSource(tmp_path / "nowhere" / "train")
    assert_one_line_naming(error, tmp_path / "nowhere" / "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        FolderSource(tmp_path / "file")
    assert_one_line_naming(error, tmp_path / "file")


def test_a_folder_with_no_classes_is_named(tmp_path):
    picture(8, 8).save(tmp_path / "a.JPEG")  # images in the wrong place
    with pytest.raises(DataError, match="no class folders") as error:
        FolderSource(tmp_path)
    assert_one_line_naming(error, tmp_path)


def test_a_class_with_no_images_is_named(train):
    (train / "cow").mkdir()
    (train / "cow" / "cow.txt").write_text("moo")
    with pytest.raises(DataError, match="class cow has no images") as error:
        FolderSource(train)
    assert_one_line_naming(error, train / "cow")


@pytest.mark.parametrize("content", [b"", b"this is a text\n"])
def test_files_that_are_no_images_are_named_when_the_folder_is_indexed(train, cache, content):
    bad = train / "dog" / "bad.JPEG"
    bad.write_bytes(content)
    with pytest.raises(DataError, match="^1 file is no image; .*that Pillow knows") as error:
        FolderSource(train)
    assert_one_line_naming(error, bad)
    bad.unlink()
    assert len(FolderSource(train)) == 4  # nothing wrong was kept


def test_of_many_bad_files_the_first_five_are_named(train):
    for i in range(7):
        (train / "dog" / f"bad{i}.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="7 files are no images.* and 2 more$") as error:
        FolderSource(train)
    assert "bad4" in str(error.value) and "bad5" not in str(error.value)


@pytest.mark.parametrize("name, lost", [("long.JPEG", 0.5), ("long.JPEG", 0.02), ("long.png", 0.5)])
def test_a_truncated_image_is_named_when_it_is_decoded(train, name, lost):
    file = train / "cat" / name
    picture(200, 300).save(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * (1 - lost))])
    source = FolderSource(train)  # the header is whole
    with pytest.raises(DataError, match="does not decode") as error:
        source.decode(2)
    assert_one_line_naming(error, file)


def test_a_file_that_has_gone_is_named(train):
    source = FolderSource(train)
    source.path(1).unlink()
    with pytest.raises(DataError) as error:
        source.decode(1)
    assert_one_line_naming(error, source.path(1))


def test_an_image_replaced_by_one_of_another_size_asks_for_a_new_start_which_works(train):
    source = FolderSource(train)
    picture(64, 64).save(train / "cat" / "c.jpeg")  # written over in place: the listing does not show it
    assert FolderSource(train).sizes[1].tolist() == [20, 20]
    with pytest.raises(DataError, match="start again") as error:
        source.decode(1)
    assert_one_line_naming(error, train / "cat" / "c.jpeg")
    source = FolderSource(train)
    assert source.sizes[1].tolist() == [64, 64] and source.decode(1).shape == (3, 64, 64)


def test_a_png_of_16_bits_becomes_8_bits_or_is_named(train):
    # torchvision decodes it to uint16, with which the resize cannot work
    Image.fromarray(np.full((8, 9), 256 * 200, np.uint16)).save(train / "cat" / "a.png")
    try:
        image = FolderSource(train).decode(0)
    except DataError as error:
        assert str(train / "cat" / "a.png") in str(error)
    else:
        assert image.dtype == torch.uint8 and (image == 200).all()


def test_a_name_that_is_no_utf8_still_decodes(train):
    # file systems allow any bytes; archives from other countries hold such names
    picture(13, 14).save(train / "cat" / "b.JPEG")
    os.rename(train / "cat" / "b.JPEG", os.fsencode(train / "cat") + b"/b\xe9.JPEG")
    source = FolderSource(train)
    assert source.sizes[1].tolist() == [13, 14] and source.decode(1).shape == (3, 13, 14)


def test_the_index_does_not_take_one_tree_for_another_of_the_same_name(tmp_path, monkeypatch):
    # relative and absolute names of one folder share an index; two folders of the same name do not
    for size, place in ((5, "a"), (6, "b")):
        (tmp_path / place / "train" / "cat").mkdir(parents=True)
        picture(size, size).save(tmp_path / place / "train" / "cat" / "x.JPEG")
        monkeypatch.chdir(tmp_path / place)
        assert FolderSource("train").sizes.tolist() == [[size, size]]
