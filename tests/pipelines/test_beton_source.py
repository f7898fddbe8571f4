"""Reading .beton files: what is in them, and every way in which they can be damaged."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.loader import DataConfig, build_loader
from pipelines.sources.beton import ALLOCATION, FIELD, HEADER, BetonSource
from pipelines.sources.errors import DataError


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
        (start, bytes(100), ["ffcv", "torchvision", "dali"]),
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
    for text in ("", "{", "[]", "{}", json_intact.replace('"splits"', '"parts"')):
        record.write_text(text)
        with pytest.raises(DataError, match=r"dataset\.json .*do not read"):
            BetonSource(path)
    record.write_text(json_intact)
    checksums.unlink()
    with pytest.raises(DataError, match=r"no file .*val\.checksums\.npy"):
        BetonSource(path)


def test_fewer_classes_than_labels_are_refused(copy):
    record = json.loads((copy / "dataset.json").read_text())
    record["classes"] = ["china"]
    (copy / "dataset.json").write_text(json.dumps(record))
    refused(copy / "val.beton", "label 1 of 1 classes")


def test_a_missing_file_names_the_converter(tmp_path):
    with pytest.raises(DataError, match=r"no file .*val\.beton.*tools\.make_dataset"):
        BetonSource(tmp_path / "val.beton")
