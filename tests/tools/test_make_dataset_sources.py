"""Sources that are not as they should be, and the liberties that each form has."""

import io
import os
import re
import shutil
import tarfile

import numpy as np
import pytest

from pipelines.sources.errors import DataError
from pipelines.sources.listing import LeftOut
from tools.conversion.inputs import open_source
from tools.conversion.shards import ROWS_PER_TASK

WNIDS = ["n01440764", "n02119789", "n15075141"]


@pytest.fixture
def copied(tmp_path):
    def copy(src):
        return shutil.copytree(src, tmp_path / "src")

    return copy


def refused(src, *words):
    with pytest.raises(DataError) as caught:
        open_source(src)
    message = str(caught.value)
    assert "\n" not in message and ": " in message
    for word in words:
        assert word in message, message


def everything(split):
    """{index: bytes} of a split, as its reader gives them."""
    return {index: data.tobytes() for task in split.reader.tasks for index, data in split.reader.read(task)}


# ----------------------------------------------------------------------------------------------------- what is missing


def test_no_folder_and_no_known_form(tmp_path):
    refused(tmp_path / "no", "no folder", "ILSVRC2012_img_train.tar")
    refused(tmp_path, "no ImageNet in a known form", "LOC_val_solution.csv", "train-*.parquet")


@pytest.mark.parametrize("name", ["imagenet-object-localization-challenge.zip", "ImageNet.TAR.GZ", "images.tgz"])
def test_archives_that_are_to_be_unpacked(tmp_path, folder, name):
    (tmp_path / name).touch()
    refused(tmp_path, f"holds {name}", "unpack it")
    refused(tmp_path / name, f"{name} is an archive", "unpack it")
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folder / split)
    assert open_source(tmp_path).kind == "ImageFolder"


@pytest.mark.parametrize("split, other", [("train", "val"), ("val", "train")])
def test_one_split_alone(folder, kaggle, copied, split, other):
    src = copied(folder)
    shutil.rmtree(src / other)
    refused(src, f"holds {split}/ but no {other}/")
    shutil.rmtree(src)
    src = copied(kaggle)
    shutil.rmtree(src / "ILSVRC/Data/CLS-LOC" / other)
    refused(src, f"CLS-LOC/{split}/ but no ", f"CLS-LOC/{other}/")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_one_archive_missing(tars, copied, name):
    src = copied(tars)
    (src / name).unlink()
    refused(src, f"but no {name}")


def test_shards_of_one_split_alone(shards, copied):
    src = copied(shards)
    for file in (src / "data").glob("validation-*"):
        file.unlink()
    refused(src, "holds data/train-*.parquet but no validation-*.parquet")


def test_classes_that_differ_and_classes_without_images(folder, copied):
    src = copied(folder)
    shutil.rmtree(src / "val" / WNIDS[1])
    refused(src, "differ in 1 classes", WNIDS[1], "which only train has")
    (src / "val" / WNIDS[1]).mkdir()
    refused(src, f"class {WNIDS[1]} has no images")


def test_something_else_in_place_of_an_image(folder, copied):
    src = copied(folder)
    (src / "train" / WNIDS[0] / "folder.JPEG").mkdir()
    refused(src, "folder.JPEG is no file")


# -------------------------------------------------------------------------------------------------------------- Kaggle


def test_kaggles_table_is_found_and_needed(kaggle, copied):
    src = copied(kaggle)
    assert open_source(src / "ILSVRC").classes == WNIDS  # the table is beside it
    (src / "LOC_val_solution.csv").rename(src / "ILSVRC" / "LOC_val_solution.csv")
    assert open_source(src).classes == WNIDS
    table = src / "ILSVRC" / "LOC_val_solution.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]))
    refused(src, "has no class for", lines[-1].split(",")[0])
    table.write_text("a,b\n1,2\n")
    refused(src, "no columns ImageId and PredictionString")
    table.unlink()
    refused(src, "no file", "LOC_val_solution.csv")


def val_as(source):
    return {source.splits["val"].name(i): label for i, label in enumerate(source.splits["val"].labels.tolist())}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.replace(",", ", ").encode(),
        lambda text: text.replace(",", " ,\t").replace("\n", "\r\n").encode(),
        lambda text: "\n".join(re.sub("^(ILSVRC[^,]*)", r"\1.JPEG", line) for line in text.split("\n")).encode(),
        lambda text: re.sub("(?m)^(.*),(.*)$", r'"\2",x,"\1"', text).encode(),  # columns in another order, quoted
        lambda text: (text + "\n,\n\n").encode(),
    ],
)
def test_kaggles_table_as_other_programs_save_it(kaggle, copied, change):
    src = copied(kaggle)
    expected = val_as(open_source(src))
    table = src / "LOC_val_solution.csv"
    table.write_bytes(change(table.read_text()))
    assert val_as(open_source(src)) == expected and len(expected) == 12


def test_a_table_with_holes(kaggle, copied):
    src = copied(kaggle)
    table = src / "LOC_val_solution.csv"
    lines = table.read_text().splitlines()
    name = lines[3].split(",")[0]
    for row, words in (
        (f"{name},", ("no class for", name)),
        (f"{name},  ", ("no class for", name)),
        (name, ("no class for", name)),
        (",n01440764 1 2 3 4", ("a row without an image",)),
        (f"{lines[3]}\n{name},n99999999 1 2", ("two classes for", name)),
    ):
        table.write_text("\n".join([*lines[:3], row, *lines[4:]]))
        refused(src, "LOC_val_solution.csv", *words)
    table.write_text("\n".join(lines).replace(",n01440764", ",n01440765"))
    refused(src, "differ in 2 classes", "n01440764")
    table.write_bytes("\n".join(lines).encode("utf-16"))
    refused(src, "LOC_val_solution.csv", "download it again")


def test_an_image_that_kaggles_table_names_and_is_not_there(kaggle, images, copied):
    src = copied(kaggle)
    _, name, _ = images["val"][5]
    (src / "ILSVRC/Data/CLS-LOC/val" / name).unlink()
    refused(src, f"no image {name.removesuffix('.JPEG')}", "LOC_val_solution.csv")


def test_kaggles_evaluation_images_in_class_folders(kaggle, images, copied):
    src = copied(kaggle)
    (src / "LOC_val_solution.csv").unlink()
    val = src / "ILSVRC/Data/CLS-LOC/val"
    for wnid, name, _ in images["val"]:
        (val / wnid).mkdir(exist_ok=True)
        (val / name).rename(val / wnid / name)
    (val / ".DS_Store").touch()
    (val / "._ILSVRC2012_val_00000001.JPEG").touch()
    assert everything(open_source(src).splits["val"]) == {i: data for i, (_, _, data) in enumerate(images["val"])}
    shutil.rmtree(val / WNIDS[1])
    refused(src, "differ in 1 classes", WNIDS[1])


def test_kaggles_evaluation_images_that_are_sorted_in_part(kaggle, images, copied):
    src = copied(kaggle)
    wnid, name, _ = images["val"][0]
    val = src / "ILSVRC/Data/CLS-LOC/val"
    (val / wnid).mkdir()
    (val / name).rename(val / wnid / name)
    refused(src, f"{val} holds both", wnid)


# ---------------------------------------------------------------------------------------------------------------- tars


def member(kind, name="x.JPEG", link=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


EVIL = {
    "absolute": member(tarfile.REGTYPE, "/etc/x.JPEG"),
    "outside": member(tarfile.REGTYPE, "a/../../x.JPEG"),
    "symbolic link": member(tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": member(tarfile.LNKTYPE, link="n01440764.tar"),
    "outside at the end": member(tarfile.REGTYPE, "a/.."),
    "folder outside": member(tarfile.DIRTYPE, "../a"),
    "two lines": member(tarfile.REGTYPE, "a\nb.JPEG"),
    "device": member(tarfile.CHRTYPE),
    "block device": member(tarfile.BLKTYPE),
    "sparse": member(tarfile.GNUTYPE_SPARSE),
    "unknown": member(b"Z"),
    "pipe": member(tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("place", ["train", "a class of train", "val"])
def test_members_that_no_honest_archive_holds_are_refused(tars, copied, evil, place):
    src = copied(tars)
    split = place.split()[-1]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(EVIL[evil])
    with tarfile.open(src / f"ILSVRC2012_img_{split}.tar", "a") as archive:
        if place == split:
            archive.addfile(EVIL[evil])
        else:
            inner = tarfile.TarInfo("n99999999.tar")
            inner.size = len(buffer.getvalue())
            archive.addfile(inner, io.BytesIO(buffer.getvalue()))
    refused(src, f"ILSVRC2012_img_{split}.tar", repr(EVIL[evil].name), "download it again")


def tar_of(*members, format=tarfile.GNU_FORMAT):
    """The bytes of an archive of these (name or TarInfo, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in members:
            info = member(tarfile.REGTYPE, info) if isinstance(info, str) else info
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_size(data, field, header=0):
    """An archive whose header at `header` has these 12 bytes for its size, and the right checksum."""
    block = bytearray(data[header : header + 512])
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + 512 :]


def pax(**headers):
    """An archive of two images, the first with these attributes, whatever its header says."""
    first = member(tarfile.REGTYPE, "x.JPEG")
    first.pax_headers = headers
    return tar_of((first, b"x" * 600), ("y.JPEG", b"y" * 600), format=tarfile.PAX_FORMAT)


TWO = tar_of(("x.JPEG", b"x" * 600), ("y.JPEG", b"y" * 600))
LONG = tar_of(("x" * 200 + ".JPEG", b"x"), ("y.JPEG", b"y"))  # three blocks for the first name, then its header
HOSTILE = {
    "negative size": with_size(TWO, b"\xff" * 12),
    "a size that leads back": with_size(TWO, b"\xff" * 10 + b"\xf8\x00"),
    "a size of 2 ** 80": with_size(TWO, b"\x80\x04" + bytes(10)),
    "a size of 8 GiB": with_size(TWO, b"7" * 11 + b"\0"),
    "a size that is no number": with_size(TWO, b"x" * 12),
    "a size that is too small": with_size(TWO, b"%011o\0" % 3),
    "more bytes than the size of the second": TWO.replace(b"y" * 600, b"y" * 1200),
    "a name of 2 ** 80 bytes": with_size(LONG, b"\x80\x04" + bytes(10)),
    "a name of 8 GiB": with_size(LONG, b"7" * 11 + b"\0"),
    "a name of -1 bytes": with_size(LONG, b"\xff" * 12),
    "names without end": tar_of((member(b"L", "x"), b"")) [:512] * 3000 + bytes(1024),
    "PAX: a negative size": pax(size="-1"),
    "PAX: a size that leads back": pax(size="-2048"),
    "PAX: an enormous size": pax(size=str(2**70)),
    "PAX: a size that is no number": pax(size="many"),
    "PAX: a smaller size": pax(size="3"),
    "PAX: a path outside": pax(path="../x.JPEG"),
    "PAX: an absolute path": pax(path="/x.JPEG"),
    "PAX: a path of two lines": pax(path="a\nb.JPEG"),
    "PAX: a path with a NUL": pax(path="a\0b.JPEG"),
    "PAX: an empty path": pax(path=""),
    "PAX: a sparse file": pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999"}),
    "PAX: a sparse file of no size": pax(**{"GNU.sparse.size": "many"}),
    "PAX: a sparse file of version 1": pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "an archive in an archive": tar_of(("x.JPEG", b"x"), ("y.tar", TWO)),
    "a name twice": tar_of(("x.JPEG", b"x"), ("y.JPEG", b"y"), ("x.JPEG", b"z")),
    "a name twice, in folders": tar_of(("a/x.JPEG", b"x"), ("b/x.JPEG", b"z")),
    "nothing but hidden files": tar_of(("._x.JPEG", b"x"), ("__MACOSX/x.JPEG", b"x")),
    "no end": TWO[:3072],
    "something behind the end": TWO[:4096] + TWO,
    "zeros in place of the second": TWO[:1536] + bytes(1 << 17),
    "zeros in place of a header": TWO[:1536] + bytes(512) + TWO[2048:],
    "rubbish in place of a header": TWO[:1536] + b"r" * 512 + TWO[2048:],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_archives_that_no_honest_program_has_written(tars, copied, what):
    """As a class of train, between two others."""
    src = copied(tars)
    honest = (member(tarfile.REGTYPE, f"{WNIDS[0]}.tar"), TWO), (member(tarfile.REGTYPE, f"{WNIDS[2]}.tar"), TWO)
    train = tar_of(honest[0], (f"{WNIDS[1]}.tar", HOSTILE[what]), honest[1])
    (src / "ILSVRC2012_img_train.tar").write_bytes(train)
    refused(src, f"ILSVRC2012_img_train.tar/{WNIDS[1]}.tar", "download it again")


@pytest.mark.parametrize("what", [what for what in HOSTILE if "hidden" not in what and "in an archive" not in what])
def test_the_same_of_the_outer_archive(tars, copied, what):
    src = copied(tars)
    train = HOSTILE[what].replace(b".JPEG", b".tar\0")
    (src / "ILSVRC2012_img_train.tar").write_bytes(train)
    refused(src, "ILSVRC2012_img_train.tar", "download it again")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_an_archive_that_is_cut_anywhere(tars, copied, name):
    """Between two members, too, where tarfile sees nothing but an end."""
    src = copied(tars)
    whole = (src / name).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in [*headers, *(at + 100 for at in headers), end]:
        (src / name).write_bytes(whole[:cut])
        refused(src, name, "download it again")


def test_names_of_any_bytes_and_hidden_files_in_archives(tars, copied):
    """Classes and images; what a Mac or a file manager has added is passed over."""
    src = copied(tars)
    hidden = ["._x.JPEG", ".DS_Store", "__MACOSX/x.JPEG", ".ipynb_checkpoints/x.JPEG", "@eaDir/x.JPEG", "a/.b/c.JPEG"]
    hidden += ["$RECYCLE.BIN/x.JPEG", "lost+found/x.JPEG"]
    image = os.fsdecode(b"\xff\xfe.JPEG")
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        first = member(tarfile.SYMTYPE, "._link.JPEG", "/etc/passwd")
        inner = tar_of((first, b""), *[(name, b"hidden") for name in hidden], (image, b"the image"), format=format)
        outer = [(f"{wnid}.tar", inner) for wnid in WNIDS]
        outer += [(f"__MACOSX/._{WNIDS[0]}.tar", b"hidden"), (f"._{WNIDS[0]}.tar", b"hidden"), (".tar", b"hidden")]
        (src / "ILSVRC2012_img_train.tar").write_bytes(tar_of(*outer, format=format))
        split = open_source(src).splits["train"]
        assert everything(split) == {i: b"the image" for i in range(3)}
        assert split.names[0] == b"ILSVRC2012_img_train.tar/n01440764.tar/\xff\xfe.JPEG"
    with tarfile.open(src / "ILSVRC2012_img_val.tar", "a") as archive:
        archive.addfile(member(tarfile.REGTYPE, "._ILSVRC2012_val_00000001.JPEG"))
    assert len(open_source(src).splits["val"].labels) == 12


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
@pytest.mark.parametrize("how", ["truncated", "rubbish", "empty"])
def test_damaged_archives(tars, copied, name, how):
    src = copied(tars)
    data = (src / name).read_bytes()
    (src / name).write_bytes({"truncated": data[: len(data) // 2], "rubbish": b"rubbish" * 1000, "empty": b""}[how])
    refused(src, name, "download it again")


def test_a_validation_archive_that_does_not_fit_the_development_kit(tars, images, copied, make_devkit):
    src = copied(tars)
    val = [wnid for wnid, _, _ in sorted(images["val"], key=lambda image: image[1])]
    make_devkit(src, [*val, val[0]])
    refused(src, "holds 12 images", "knows 13")
    make_devkit(src, val[:-1])
    refused(src, "ILSVRC2012_val_00000012.JPEG")


def test_long_names_folders_and_other_files_in_a_class_archive(tars, images, copied):
    src = copied(tars)
    buffer = io.BytesIO()
    name = "x" * 200 + ".JPEG"
    with tarfile.open(fileobj=buffer, mode="w") as inner:
        inner.addfile(member(tarfile.DIRTYPE, "n00000001"))
        for file, data in ((f"n00000001/{name}", b"the image"), ("n00000001/README", b"no image")):
            found = tarfile.TarInfo(file)
            found.size = len(data)
            inner.addfile(found, io.BytesIO(data))
    with tarfile.open(src / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in [*WNIDS, "n00000001"][-1:]:
            found = tarfile.TarInfo(f"{wnid}.tar")
            found.size = len(buffer.getvalue())
            outer.addfile(found, io.BytesIO(buffer.getvalue()))
    from tools.conversion import tars as module

    left_out = LeftOut()
    members = module._train_members(src / "ILSVRC2012_img_train.tar", left_out)
    assert left_out.kinds == {"no extension": 1} and left_out.first == "n00000001.tar/n00000001/README"
    assert [(wnid, path) for wnid, path, _, _ in members] == [("n00000001", f"n00000001.tar/{name}".encode())]
    split = module._split(src / "ILSVRC2012_img_train.tar", ["n00000001"], members)
    assert everything(split) == {0: b"the image"}


# -------------------------------------------------------------------------------------------------------------- shards


def test_labels_in_another_order_than_the_wordnet_ids(images, tmp_path, make_shards):
    make_shards(tmp_path / "a", images, label_of=WNIDS[::-1].index)
    make_shards(tmp_path / "b", images, names=WNIDS[::-1], label_of=WNIDS[::-1].index, with_paths=False)
    for name in "ab":
        source = open_source(tmp_path / name)
        assert source.classes == WNIDS
        stored = everything(source.splits["val"])
        expected = {data: WNIDS.index(wnid) for wnid, _, data in images["val"]}
        assert {stored[i]: label for i, label in enumerate(source.splits["val"].labels.tolist())} == expected


def test_names_of_classes_where_no_path_tells_them(images, tmp_path, make_shards):
    names = ["tench", "red fox", "acorn"]  # in the order of the labels, which stays
    make_shards(tmp_path / "a", images, names=names, with_paths=False)
    source = open_source(tmp_path / "a")
    assert source.classes == names
    assert source.splits["train"].labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert source.splits["train"].name(0).startswith("train-00000-of-00002.parquet/row ")
    make_shards(tmp_path / "b", images, names=names[:2], with_paths=False)
    refused(tmp_path / "b", "label 2", "none of its 2 classes")
    make_shards(tmp_path / "c", images, names=[*names, "nothing"], with_paths=False)
    refused(tmp_path / "c", "class nothing has no images")


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_every_row_is_read_once_whatever_the_size_of_row_groups(images, tmp_path, monkeypatch, rows, make_shards):
    from tools.conversion import shards as module

    assert ROWS_PER_TASK == (128, 1024)
    monkeypatch.setattr(module, "ROWS_PER_TASK", (4, 1024))
    make_shards(tmp_path / "a", images, group=rows)
    for split, expected in images.items():
        found = open_source(tmp_path / "a").splits[split]
        assert everything(found) == {i: data for i, (_, _, data) in enumerate(expected)}
        assert max(len(task.indices) for task in found.reader.tasks) <= 4
        assert np.array_equal(np.sort(np.concatenate([t.indices for t in found.reader.tasks])), range(len(expected)))


@pytest.fixture
def few_shards(images, tmp_path, make_shards):
    """The folder of train-0000{0,1}-of-00002.parquet and validation-0000{0,1}-of-00002.parquet, to be spoilt."""
    make_shards(tmp_path / "src" / "data", images)
    return tmp_path / "src" / "data"


TRAIN = "train-00000-of-00002", "train-00001-of-00002"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_shard_that_is_missing(few_shards, split):
    (few_shards / f"{split}-00001-of-00002.parquet").unlink()
    refused(few_shards.parent, "no file", f"data/{split}-00001-of-00002.parquet")
    refused(few_shards, f"{split}-00001-of-00002.parquet")


def test_a_shard_that_is_there_twice(few_shards):
    one, other = (few_shards / f"{name}.parquet" for name in TRAIN)
    hashed = few_shards / f"{TRAIN[1]}-1234abcd5678ef90.parquet"  # of another revision
    shutil.copy(other, hashed)
    refused(few_shards.parent, TRAIN[1], hashed.name, "the same part")
    other.unlink()
    one.rename(few_shards / f"{TRAIN[0]}-0123456789abcdef.parquet")
    everything_is_there(few_shards.parent)


def everything_is_there(src):
    assert {split: len(found.labels) for split, found in open_source(src).splits.items()} == {"train": 36, "val": 12}


def test_shards_of_two_revisions(few_shards):
    shutil.copy(few_shards / f"{TRAIN[1]}.parquet", few_shards / "train-00002-of-00003.parquet")
    refused(few_shards.parent, f"{TRAIN[0]}.parquet", "train-00002-of-00003.parquet", "revisions")


def test_a_hashed_name_is_missed_by_its_number(few_shards):
    (few_shards / f"{TRAIN[0]}.parquet").rename(few_shards / f"{TRAIN[0]}-0123456789abcdef.parquet")
    (few_shards / f"{TRAIN[1]}.parquet").unlink()
    refused(few_shards.parent, f"data/{TRAIN[1]}-*.parquet")


def test_shards_that_count_from_1_and_a_number_that_is_none(few_shards):
    one, other = (few_shards / f"{name}.parquet" for name in TRAIN)
    shutil.copy(other, few_shards / "train-00002-of-00002.parquet")
    refused(few_shards.parent, "train-00002-of-00002.parquet is none of 2 files")
    one.unlink()
    everything_is_there(few_shards.parent)


def test_names_without_numbers_are_read_but_not_beside_others(few_shards):
    one, other = (few_shards / f"{name}.parquet" for name in TRAIN)
    one.rename(few_shards / "train-a.parquet")
    refused(few_shards.parent, "train-a.parquet has no number", other.name)
    other.rename(few_shards / "train-b.parquet")
    everything_is_there(few_shards.parent)
    shutil.copy(few_shards / "train-a.parquet", few_shards / "._train-00000-of-00001.parquet")
    everything_is_there(few_shards.parent)


@pytest.mark.parametrize(
    "place", [f"{TRAIN[1]}.parquet.incomplete", "../.cache/huggingface/download/data/x.y.incomplete"]
)
def test_a_download_that_broke_off_is_named(few_shards, place):
    one, other = (few_shards / f"{name}.parquet" for name in TRAIN)
    left = few_shards / place
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    everything_is_there(few_shards.parent)  # it was begun anew, and finished
    other.unlink()
    refused(few_shards.parent, f"no file {other}", left.name, "broke off")
    one.rename(few_shards / "train-a.parquet")
    refused(few_shards.parent, left.name, "broke off", "remove")
    (few_shards / "train-a.parquet").unlink()
    refused(few_shards.parent, left.name, "broke off")


def test_evaluation_shards_of_two_names(few_shards):
    shutil.copy(few_shards / "validation-00000-of-00002.parquet", few_shards / "val-00000-of-00001.parquet")
    refused(few_shards.parent, "data/validation-*.parquet and data/val-*.parquet")


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize("val", ["validation", "val", "valid"])
def test_shards_in_a_folder_for_each_split(images, few_shards, tmp_path, inside, val):
    """With any names."""
    src = tmp_path / "folders"
    for split, name in (("train", "train"), ("validation", val)):
        (src / inside / name).mkdir(parents=True)
        for number in range(2):
            file = few_shards / f"{split}-{number:05d}-of-00002.parquet"
            shutil.copy(file, src / inside / name / (f"{number:04d}.parquet" if val == "val" else file.name))
    source = open_source(src)
    assert source.kind == "Hugging Face"
    for split, expected in images.items():
        assert everything(source.splits[split]) == {i: data for i, (_, _, data) in enumerate(expected)}
    shutil.copy(few_shards / "train-00000-of-00002.parquet", src)
    refused(src, "train-*.parquet", "train/*.parquet", "leave only one")
    (src / "train-00000-of-00002.parquet").unlink()
    shutil.rmtree(src / inside / val)
    refused(src, "train/*.parquet but no validation")


def test_damaged_shards_and_shards_of_something_else(shards, copied):
    import pyarrow as pa
    from pyarrow import parquet

    src = copied(shards)
    file = src / "data" / "train-00001-of-00002.parquet"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    refused(src, file.name, "is damaged or no parquet file", "download it again")
    parquet.write_table(pa.table({"text": ["a"], "label": [1]}), file)
    refused(src, file.name, "has no column image.bytes and no image.path")


def test_an_image_without_bytes_is_bad(images, tmp_path, make_shards):
    train = [(wnid, name, None if i == 3 else data) for i, (wnid, name, data) in enumerate(images["train"])]
    make_shards(tmp_path / "a", {"train": train, "val": images["val"]})
    assert everything(open_source(tmp_path / "a").splits["train"])[3] == b""
