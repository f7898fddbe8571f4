"""A split in many files is read as if it were in one, and never in part."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.sources.beton import BetonSource
from pipelines.sources.beton_shards import BetonShards, open_betons
from pipelines.sources.errors import DataError
from tests.pipelines.helpers import OF_BETONS, converted, indices_of

COUNTS = [1, 3, 7]


@pytest.fixture(scope="session")
def sharded(photos, tmp_path_factory):
    """{number of shards: a folder}, of the photographs half raw."""
    root = tmp_path_factory.mktemp("sharded")
    half_raw = {"mode": "reencode", "quality": 95, "jpeg_fraction": 0.5}
    return {count: converted(photos.folder, root / str(count), shards=count, **half_raw) for count in COUNTS}


@pytest.fixture
def copy(sharded, tmp_path):
    """A copy of the set of three, to be damaged."""
    shutil.copytree(sharded[3], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("count", COUNTS)
def test_shards_hold_what_one_file_holds(photos, sharded, count):
    whole = BetonSource(photos.half_raw / "train.beton")
    source = open_betons(sharded[count], "train")
    assert isinstance(source, BetonShards) and len(source) == 12
    assert source.classes == whole.classes == ["china", "flower"] and source.has_names
    for column in ("labels", "sizes", "is_raw", "lengths", "checksums"):
        found, expected = getattr(source, column), getattr(whole, column)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for index in np.arange(12):
        assert source.read(index).tobytes() == whole.read(index).tobytes()
        assert torch.equal(source.decode(index), whole.decode(index))
    indices = np.random.default_rng(0).permutation(12)
    source.will_need(indices)
    starts = [source.read(index).ctypes.data for index in indices]
    assert source.addresses(indices).tolist() == starts and source.addresses(indices).dtype == np.uint64


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("backend", OF_BETONS)
def test_order_crops_and_pixels_do_not_depend_on_the_number_of_shards(photos, sharded, build, backend, split):
    config = DataConfig(photos.half_raw, backend, batch_size=4, workers=2, input_size=64, eval_size=64)
    expected = list(build(config, split))
    for root in sharded.values():
        for batch, other in zip(build(replace(config, root=root), split), expected, strict=True):
            assert torch.equal(batch.indices, other.indices) and torch.equal(batch.labels, other.labels)
            assert torch.equal(batch.images, other.images)


def test_a_run_goes_on_with_another_number_of_shards(sharded, build):
    config = DataConfig(sharded[3], "ffcv", batch_size=4, workers=1, input_size=64)
    first, other = build(config, "train"), build(replace(config, root=sharded[7]), "train")
    batches = iter(first)
    next(batches)
    other.load_state_dict(first.state_dict())
    assert indices_of(other) == indices_of(batches)


def test_auto_takes_the_fastest_that_reads_shards(sharded, build):
    loader = build(DataConfig(sharded[3], batch_size=4, workers=1, eval_size=32), "val")
    assert type(loader._executor).__name__ == "FfcvExecutor"


@pytest.mark.parametrize("backend", OF_BETONS)
def test_a_damaged_image_is_named_by_its_place_in_its_shard(copy, backend):
    source = open_betons(copy, "val")
    with open(copy / "val-00002-of-00003.beton", "r+b") as file:  # it holds images 8 to 11
        file.seek(int(source.offsets[9] + source.lengths[9] // 2))
        file.write(b"\x12\x34\x56")
    loader = build_loader(DataConfig(copy, backend, batch_size=4, workers=1, eval_size=32), "val")
    with pytest.raises(DataError, match=r"image 1 of .*copy/val-00002-of-00003\.beton is damaged"):
        list(loader)
    loader.close()


def refused(root, *words):
    for backend in OF_BETONS:
        with pytest.raises(DataError) as error:
            build_loader(DataConfig(root, backend, batch_size=4, workers=0), "train")
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)


def test_a_missing_shard_is_named(copy):
    (copy / "train-00001-of-00003.beton").unlink()
    refused(copy, "no file ", "copy/train-00001-of-00003.beton, of 3 shards")
    (copy / "train-00002-of-00003.beton").unlink()
    refused(copy, "copy/train-00001-of-00003.beton and 1 more, of 3 shards")


def test_missing_checksums_of_a_shard_are_named(copy):
    (copy / "train-00001-of-00003.checksums.npy").unlink()
    refused(copy, "no file ", "train-00001-of-00003.checksums.npy, which ")


def test_a_split_that_is_there_twice_is_refused(photos, sharded, copy):
    shutil.copy(sharded[7] / "train-00006-of-00007.beton", copy)
    refused(copy, "holds train twice, as 3 shards and as 7 shards: remove")
    (copy / "train-00006-of-00007.beton").unlink()
    shutil.copy(photos.half_raw / "train.beton", copy)
    refused(copy, "holds train twice, as train.beton and as 3 shards: remove")


def test_shards_that_were_not_joined_are_no_dataset(copy):
    (copy / "dataset.json").unlink()
    refused(copy, "no file ", "dataset.json", "--join")


def test_shards_that_the_record_does_not_name_are_refused(copy, sharded):
    for text in ("", "[]", "{}", (sharded[7] / "dataset.json").read_text()):
        (copy / "dataset.json").write_text(text)
        refused(copy, "dataset.json", "convert the dataset again")


def test_a_shard_of_another_set_is_refused(copy):
    shutil.copy(copy / "train-00000-of-00003.beton", copy / "train-00001-of-00003.beton")
    refused(copy, "train-00001-of-00003.beton is damaged")


def test_one_shard_can_be_read_alone(sharded):
    """It is an ordinary file."""
    record = json.loads((sharded[3] / "dataset.json").read_text())["splits"]["train"]
    assert record["images"] == 12 and [shard["images"] for shard in record["shards"]] == [4, 4, 4]
    shard = BetonSource(sharded[3] / "train-00001-of-00003.beton")
    assert shard.labels.tolist() == [0, 0, 1, 1] and shard.classes == ["china", "flower"]
    assert shard.checksums is not None


def test_names_that_only_look_like_shards_are_left_alone(photos, tmp_path):
    shutil.copytree(photos.verbatim, tmp_path / "copy")
    for name in ("train-small.beton", "train-1-of-2.beton", "train-00000-of-00002.beton.tmp"):
        (tmp_path / "copy" / name).write_text("mine")
    assert isinstance(open_betons(tmp_path / "copy", "train"), BetonSource)
