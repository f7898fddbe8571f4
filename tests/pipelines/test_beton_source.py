"""Reading .beton files: what is in them, and every way in which they can be damaged."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines import native
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.sources.beton import ALLOCATION, FIELD, HEADER, JPEG, RAW, BetonSource
from pipelines.sources.errors import DataError
from tests.betons import PAGES, Beton
from tests.pipelines.helpers import OF_BETONS


@pytest.fixture
def copy(photos, tmp_path):
    """A copy of the converted photographs, to be damaged."""
    shutil.copytree(photos.verbatim, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def stock(copy):
    """The same without what only our converter writes: as FFCV's own writer leaves it."""
    (copy / "dataset.json").unlink()
    return copy


def change(path, offset, data):
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


def refused(path, reason):
    with pytest.raises(DataError, match=reason) as error:
        BetonSource(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_it_holds_what_the_folder_holds(photos):
    folder = photos.source
    beton = BetonSource(photos.verbatim / "val.beton")
    assert len(beton) == 12 and beton.classes == folder.classes
    np.testing.assert_array_equal(beton.labels, folder.labels)
    np.testing.assert_array_equal(beton.sizes, folder.sizes)
    for i in range(12):
        assert beton.read(i).tobytes() == folder.path(i).read_bytes()
        assert (beton.decode(i) == folder.decode(i)).all()
    assert not beton.is_raw.any()


def test_raw_images(photos):
    beton = BetonSource(photos.half_raw / "val.beton")
    assert 0 < beton.is_raw.sum() < 12
    for i in range(12):
        assert beton.decode(i).shape == (3, *beton.sizes[i])
        with Image.open(photos.source.path(i)) as file:
            if beton.is_raw[i] and max(file.size) <= 500:
                np.testing.assert_allclose(beton.decode(i).permute(1, 2, 0), np.asarray(file), atol=2)


def test_a_beton_of_ffcvs_own_reads_without_names_and_checksums(photos, stock):
    beton = BetonSource(stock / "val.beton")
    assert beton.classes == ["0", "1"] and beton.checksums is None
    np.testing.assert_array_equal(beton.labels, photos.source.labels)
    loader = build_loader(DataConfig(root=stock, backend="ffcv", batch_size=4, workers=2, eval_size=32), "val")
    assert sum(len(batch.indices) for batch in loader) == 12
    loader.close()


def test_damage_that_the_decoder_can_see_is_named_without_checksums_too(stock):
    beton = BetonSource(stock / "val.beton")
    start, length = int(beton.offsets[8]), int(beton.lengths[8])
    whole = (stock / "val.beton").read_bytes()
    ended = b"\xff\xd9" * (length // 4)  # the image ends in its middle: other decoders go on with grey
    for at, data, backends in (
        (start + length // 2, ended, ["ffcv"]),
        (start, bytes(100), OF_BETONS),
    ):
        change(stock / "val.beton", at, data)
        for backend in backends:
            loader = build_loader(DataConfig(root=stock, backend=backend, batch_size=4, workers=1, eval_size=32), "val")
            with pytest.raises(DataError, match=r"image 8 of .*val\.beton is damaged"):
                list(loader)
            loader.close()
        (stock / "val.beton").write_bytes(whole)


@pytest.mark.parametrize("share", [0, 0.00001, 0.001, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_truncated_file_is_refused(copy, share, recorded):
    path = copy / "val.beton"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    if not recorded:
        (copy / "dataset.json").unlink()
    refused(path, "damaged")


@pytest.mark.parametrize("field, value", [("version", 1), ("version", 3), ("num_samples", 13), ("num_samples", 11)])
def test_a_wrong_header_is_refused(copy, field, value):
    path = copy / "val.beton"
    header = np.fromfile(path, HEADER, 1)
    header[field] = value
    change(path, 0, header.tobytes())
    refused(path, "version" if field == "version" else "damaged")


def test_no_flipped_byte_of_the_index_passes_or_crashes(copy, stock):
    """With the record every one is noticed; without it none does more than an error."""
    path = copy / "val.beton"
    whole = path.read_bytes()
    index = HEADER.itemsize + 2 * FIELD.itemsize + 12 * 24
    table = len(whole) - 12 * ALLOCATION.itemsize
    draw = np.random.default_rng(0)
    for at in [*range(HEADER.itemsize), *draw.integers(0, index, 40), *draw.integers(table, len(whole), 40)]:
        change(path, int(at), bytes([whole[at] ^ (1 << int(draw.integers(8)))]))
        try:
            source = BetonSource(path)
            ends = source.offsets + source.lengths
            assert (source.offsets >= 0).all() and (ends <= len(whole)).all() and (source.lengths > 0).all()
        except DataError as error:
            assert "\n" not in str(error)
        path.write_bytes(whole)


@pytest.mark.parametrize("part", ["header", "fields", "metadata", "table"])
def test_every_part_of_the_index_is_compared_with_the_record(copy, part):
    path = copy / "val.beton"
    size = path.stat().st_size
    at = {"header": 4, "fields": HEADER.itemsize + 500, "table": size - 20}.get(part)
    if part == "metadata":
        at = HEADER.itemsize + 2 * FIELD.itemsize + 3  # the height of an image
    before = path.read_bytes()[at]
    change(path, at, bytes([before ^ 1]))
    refused(path, "damaged")


def test_damaged_checksums_and_records_are_refused(copy):
    path, record = copy / "val.beton", copy / "dataset.json"
    checksums = copy / "val.checksums.npy"
    intact, json_intact = checksums.read_bytes(), record.read_text()
    checksums.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(DataError, match=r"val\.checksums\.npy is damaged"):
        BetonSource(path)
    endless = json_intact.replace('"bytes": ', '"bytes": 1e999, "": ')
    for text in ("", "{", "[]", "{}", json_intact.replace('"splits"', '"parts"'), "[" * 100_000, endless):
        record.write_text(text)
        with pytest.raises(DataError, match=r"dataset\.json .*do not read"):
            BetonSource(path)
    record.write_text(json_intact)
    checksums.unlink()
    with pytest.raises(DataError, match=r"no file .*val\.checksums\.npy"):
        BetonSource(path)


@pytest.mark.parametrize("array", [np.zeros(11, np.uint64), np.zeros(12, np.int64), np.zeros((12, 1), np.uint64)])
def test_checksums_that_are_not_one_for_each_image_are_refused(copy, array):
    np.save(copy / "val.checksums.npy", array)
    record = json.loads((copy / "dataset.json").read_text())
    record["splits"]["val"]["checksums_xxh64"] = native.hex_checksum(array)
    (copy / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="not one checksum for each of 12 images"):
        BetonSource(copy / "val.beton")


def test_checksums_with_a_torn_header_are_refused(copy):
    path = copy / "val.checksums.npy"
    path.write_bytes(path.read_bytes().replace(b"(12,)", b"(12, "))
    with pytest.raises(DataError, match=r"dataset\.json .*do not read"):
        BetonSource(copy / "val.beton")


def test_checksums_that_claim_to_be_endless_are_refused_without_the_memory(copy):
    header = {"descr": "<u8", "fortran_order": False, "shape": (2**45,)}
    with open(copy / "val.checksums.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match=r"dataset\.json .*do not read"):
        BetonSource(copy / "val.beton")


def test_fewer_classes_than_labels_are_refused(copy):
    record = json.loads((copy / "dataset.json").read_text())
    record["classes"] = ["china"]
    (copy / "dataset.json").write_text(json.dumps(record))
    refused(copy / "val.beton", "label 1 of 1 classes")


def enormous(beton, value):
    """What may hold an unsigned 64-bit number, each set to `value` in turn."""
    beton.header["num_samples"] = value
    yield
    beton.header["num_samples"] = 3
    table, beton.header["alloc_table_ptr"] = int(beton.header["alloc_table_ptr"][0]), value
    yield
    beton.header["alloc_table_ptr"] = table
    for image in range(3):
        place = int(beton.table["ptr"][image])
        beton.move(image, value)
        yield
        beton.move(image, place)
        beton.table["size"][image] = value
        yield
        beton.rows["image"]["mode"] = JPEG
        yield
        beton.rows["image"]["mode"] = RAW
        beton.table["size"][image] = 12
        beton.rows["label"][image] = np.uint64(value).astype(np.int64)
        yield
        beton.rows["label"][image] = 0


# Sums and products of these with what a .beton file holds wrap around 32, 63 or 64 bits.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "value", [2**31, 2**32, 2**58, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 // 24 + 1, 2**64 - 12, 2**64 - 1]
)
def test_numbers_that_overflow_are_refused(tmp_path, value):
    beton = Beton()
    assert BetonSource(beton.write(tmp_path / "a.beton")).lengths.tolist() == [12, 12, 12]
    for _ in enormous(beton, value):
        refused(beton.write(tmp_path / "a.beton"), "is damaged")
    assert len(BetonSource(beton.write(tmp_path / "a.beton"))) == 3


def into(image, place):
    return lambda beton: beton.move(image, place)


def set_to(part, name, value, at=0):
    return lambda beton: getattr(beton, part)[name].__setitem__(at, value)


def image_to(name, value):
    return lambda beton: beton.rows["image"][name].__setitem__(1, value)


def one_more(beton):
    beton.table = np.concatenate([beton.table, beton.table[:1]])


def one_less(beton):
    beton.table = beton.table[:2]


WRONG = {
    "an image in the header": (into(0, 0), "12 bytes at 0 "),
    "an image in the fields": (into(0, 40), "12 bytes at 40 "),
    "an image in the metadata": (into(0, PAGES - 1), "can't be an image's"),
    "an image in the allocation table": (into(2, PAGES + 36), "can't be an image's"),
    "an image that ends in the allocation table": (into(2, PAGES + 25), "can't be an image's"),
    "images that overlap": (into(1, PAGES + 11), "overlap"),
    "an image over another": (into(1, PAGES), "overlap"),
    "two images with the same bytes": (image_to("data_ptr", PAGES), "same bytes"),
    "an entry twice": (one_more, "4 places .* for 3 images"),
    "an entry too few": (one_less, "2 places .* for 3 images"),
    "an empty image": (set_to("table", "size", 0, 1), "0 bytes at"),
    "an image without height": (image_to("height", 0), "index of image 1"),
    "an image without width": (image_to("width", 0), "index of image 1"),
    "an enormous image": (image_to("width", 65535), "index of image 1"),
    "an unknown mode": (image_to("mode", 2), "index of image 1"),
    "no fields": (set_to("header", "num_fields", 0), "types"),
    "a field": (set_to("header", "num_fields", 1), "types"),
    "65,535 fields": (set_to("header", "num_fields", 65535), "list of fields"),
    "a label below 0": (set_to("rows", "label", -1, 1), "label -1"),
    "an enormous label": (set_to("rows", "label", 10**6, 1), "label 1000000"),
    "fewer images than it has": (set_to("header", "num_samples", 2), "3 places .* for 2 images"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", WRONG)
def test_a_file_made_wrong_is_refused(tmp_path, what):
    make_wrong, reason = WRONG[what]
    beton = Beton()
    make_wrong(beton)
    refused(beton.write(tmp_path / "a.beton"), reason)


def test_no_images_and_a_folder_are_refused(tmp_path):
    beton = Beton()
    beton.header["num_samples"], beton.table = 0, beton.table[:0]
    refused(beton.write(tmp_path / "a.beton"), "holds no images")
    (tmp_path / "b.beton").mkdir()
    refused(tmp_path / "b.beton", "directory")


def test_a_missing_file_names_the_converter(tmp_path):
    with pytest.raises(DataError, match=r"no file .*val\.beton.*tools\.make_dataset"):
        BetonSource(tmp_path / "val.beton")
