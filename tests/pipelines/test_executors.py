"""What must hold for every executor: FFCV, DALI and torchvision, on a folder and on a .beton file."""

import json
import os
import shutil
import threading
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipelines.batch import ExecutorOptions, ImageSource, MappedSource, Place, Source
from pipelines.build import build_loader
from pipelines.config import BACKENDS, AugmentationConfig, DataConfig
from pipelines.executors.torchvision_executor import TorchvisionGpuExecutor
from pipelines.loader import Loader
from pipelines.sources.beton import BetonSource
from pipelines.sources.errors import DataError
from tests.pipelines.helpers import EXECUTORS, OF_BETONS, OF_FOLDERS, indices_of, pixels_of, plan_of, reference


def errors(photos, config, split, build):
    """|pixel - reference| of every pixel of the first batch, in [0, 255]."""
    plan = plan_of(config, photos, split).step(0)
    size = config.input_size if split == "train" else config.eval_size
    batch = next(iter(build(config, split)))
    wanted = [
        reference(photos.source.path(index), box, flip, size)
        for index, box, flip in zip(plan.indices, plan.boxes.tolist(), plan.flips, strict=True)
    ]
    return (pixels_of(batch.images) - torch.stack(wanted)).abs()


def children():
    """The processes that this one has started and that still are, zombies too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # ended while we looked
            continue
        if int(parent) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def damaged_copy(photos, tmp_path):
    """A copy of the .beton files, to be damaged."""
    shutil.copytree(photos.verbatim, tmp_path / "copy")
    return tmp_path / "copy"


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_these_are_all_backends(root):
    tested = {name.split()[0] for name in EXECUTORS} | {"synthetic"}
    files = {file.name.removesuffix("_executor.py") for file in (root / "pipelines/executors").glob("*_executor.py")}
    assert tested == files == set(BACKENDS) - {"auto"}


class Promised:
    """A source of which nothing can be had but what a protocol names."""

    def __init__(self, source, protocol):
        self._source = source
        kinds = [kind for kind in protocol.__mro__ if kind.__module__ == protocol.__module__]
        self._names = {name for kind in kinds for name in (*vars(kind), *kind.__annotations__)}

    def __len__(self):
        return len(self._source)

    def __getattr__(self, name):
        assert name in self._names, f"{name} is not promised"
        return getattr(self._source, name)


def test_executors_use_of_a_source_what_its_protocol_promises(photos, small, build):
    """In one process: what a worker of torchvision uses would be found out there, too."""
    source = BetonSource(small.root / "train.beton") if small.root == photos.verbatim else photos.source
    narrow = Promised(source, MappedSource if small.backend == "ffcv" else ImageSource)
    with pytest.raises(AssertionError, match="examine_stored is not promised"):
        _ = narrow.examine_stored
    options = ExecutorOptions(replace(small, workers=0), training=True, place=Place(), as_bytes=False)
    executor = import_module(f"pipelines.executors.{small.backend}_executor").create_executor(narrow, options)
    loader = Loader(Promised(source, Source), executor, True, small, AugmentationConfig(), Place(), seed=0)
    for batch, expected in zip(loader, build(small, "train"), strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.labels, expected.labels)
    loader.close()


@pytest.mark.parametrize("world_size, workers", [(1, 1), (1, 4), (2, 1), (3, 4)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_are_the_plans_on_any_number_of_ranks_and_workers(small, photos, build, split, world_size, workers):
    config = replace(small, batch_size=6, workers=workers)
    source, plan = photos.source, plan_of(config, photos, split, epoch=1)
    loaders = [build(config, split, Place(rank, world_size)) for rank in range(world_size)]
    seen = []
    for rank, loader in enumerate(loaders):
        for epoch in (0, 1):  # the second one with the workers of the first
            loader.set_epoch(epoch)
            assert len(loader) == 2
            batches = list(loader)
        for step, batch in enumerate(batches):
            expected = plan.step(step, rank, world_size)
            np.testing.assert_array_equal(batch.indices, expected.indices)
            np.testing.assert_array_equal(batch.labels, source.labels[expected.indices])
        assert len(loader) == 0 and loader.state_dict() == {"epoch": 1, "step": 2}
        seen += indices_of(batches)
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("split", ["train", "val"])
def test_pixels_do_not_depend_on_ranks_or_workers(small, build, split):
    whole = list(build(small, split))
    for config, world_size in ((replace(small, workers=4), 1), (small, 2)):
        parts = [list(build(config, split, Place(rank, world_size))) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            images = torch.cat([part[step].images for part in parts])
            assert torch.equal(images, batch.images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split, sizes", [("train", [5, 5]), ("val", [5, 5, 2])])
def test_the_contract_of_a_batch(small, build, split, sizes, dtype):
    loader = build(replace(small, batch_size=5, eval_size=96), split, Place(dtype=dtype))
    side = 64 if split == "train" else 96
    assert loader.num_samples == 12 and loader.image_size == side and loader.classes == ["china", "flower"]
    batches = list(loader)
    assert [len(batch.indices) for batch in batches] == sizes
    for images, labels, indices in batches:
        assert images.dtype == dtype and images.shape == (len(indices), 3, side, side)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.isfinite().all()
        assert labels.dtype == indices.dtype == torch.int64 and labels.shape == indices.shape == (len(indices),)
        assert torch.equal(labels, indices // 6)  # six photographs in each class
    if split == "val":
        assert indices_of(batches) == list(range(12))
    else:
        assert len(set(indices_of(batches))) == 10


def test_16_bit_images_are_the_rounded_float32_images(small, build):
    # DALI rounds to float16 before bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        for batch, rounded in zip(build(small, "train"), build(small, "train", Place(dtype=dtype)), strict=True):
            tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-10
            torch.testing.assert_close(rounded.images.float(), batch.images, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [224, 64])  # the small one shows whether the resize is antialiased
@pytest.mark.parametrize("split", ["train", "val"])
def test_pixels_are_those_of_a_float_resize_of_the_plans_box(small, photos, build, split, size):
    config = replace(small, batch_size=12, input_size=size, eval_size=size, exact_decode=True)
    found = errors(photos, config, split, build)
    assert found.mean() <= 1 and found.flatten(1).mean(1).max() <= 2
    assert np.percentile(found, 99.9) <= 16


def test_a_fast_decode_differs_where_an_image_is_halved_and_never_in_evaluation(photos, build):
    config = DataConfig(root=photos.verbatim, backend="ffcv", batch_size=12, input_size=96, eval_size=64)
    fast = errors(photos, config, "train", build)
    exact = errors(photos, replace(config, exact_decode=True), "train", build)
    assert exact.mean() < 0.01 < fast.mean() < 3
    halved = plan_of(config, photos, "train").step(0).boxes[:, 2:].min(1) >= 192
    assert 0 < halved.sum() < 12
    different = (fast - exact).abs().flatten(1).amax(1) > 0.01
    np.testing.assert_array_equal(different, halved)
    assert errors(photos, config, "val", build).mean() < 0.01


def test_the_ffcv_executor_adds_no_error_of_its_own(photos, build):
    for size in (224, 64):
        config = DataConfig(root=photos.verbatim, backend="ffcv", batch_size=12, input_size=size, exact_decode=True)
        assert errors(photos, config, "train", build).max() < 0.01  # in [0, 255]: not even rounding


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("data", ["folder", "half_raw"])
def test_dali_cuts_the_same_pixels_from_whole_images(photos, build, data, split):
    config = DataConfig(root=getattr(photos, data), backend="dali", batch_size=6, input_size=96, eval_size=96)
    whole = build(replace(config, dali_full_decode=0.5), split)
    for batch, other in zip(build(config, split), whole, strict=True):
        assert torch.equal(batch.indices, other.indices)
        assert (pixels_of(batch.images) - pixels_of(other.images)).abs().max() < 0.01  # 0 with DALI 2.4


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_whole_images_outside_its_bounds_is_refused(share):
    with pytest.raises(ValueError, match=r"--dali-full-decode .*: must lie in \[0, 1\]"):
        DataConfig(dali_full_decode=share)


@pytest.mark.parametrize("backend", OF_BETONS)
def test_raw_images_come_out_like_the_jpegs_that_they_were(photos, build, backend):
    config = DataConfig(root=photos.half_raw, backend=backend, batch_size=12, workers=2, input_size=64, eval_size=64)
    # The raw half holds decoded pixels, the other was compressed a second time.
    plan = plan_of(config, photos, "val").step(0)
    (batch,) = build(config, "val")
    for image, index, box in zip(batch.images, plan.indices, plan.boxes.tolist(), strict=True):
        if max(photos.source.sizes[index]) <= 500:  # the largest were made smaller
            difference = pixels_of(image) - reference(photos.source.path(index), box, False, 64)
            assert difference.abs().mean() <= 3, index


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("done, world_size", [(0, 1), (1, 2), (2, 1), (3, 1)])
def test_any_other_loader_goes_on_with_exactly_the_images_that_are_left(small, photos, build, split, done, world_size):
    first = build(small, split)
    first.set_epoch(3)
    plan = plan_of(small, photos, split, 3)
    expected = [index for step in range(len(plan)) for index in plan.step(step).indices.tolist()]
    batches = iter(first)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"epoch": 3, "step": done}  # of what was handed out, not of what is under way
    for backend in OF_BETONS:
        other = replace(small, backend=backend, root=photos.verbatim, workers=2)
        parts = []
        for rank in range(world_size):
            loader = build(other, split, Place(rank, world_size))
            loader.load_state_dict(state)
            assert len(loader) == 3 - done
            parts.append(list(loader))
        left = [index for step in zip(*parts, strict=True) for index in indices_of(step)]
        assert left == expected[4 * done :]


def test_leaving_an_epoch_early_does_not_spoil_the_next_one(small, photos, build):
    loader = build(replace(small, workers=2), "train")
    next(iter(loader))  # more batches of epoch 0 are under way
    loader.set_epoch(1)
    assert indices_of(loader) == plan_of(small, photos, "train", 1).order[:12].tolist()


def test_batches_that_are_kept_stay_as_they_were(small, build):
    loader = build(small, "train")
    batches, copies = [], []
    for epoch in range(4):
        loader.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            copies.append(batch.images.clone())
    loader.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))


def test_closing_in_the_middle_of_an_epoch_leaves_nothing_ten_times(small):
    def open_and_leave():
        loader = build_loader(replace(small, workers=2), "train")
        batches = iter(loader)
        next(batches)
        loader.close()
        loader.close()  # twice does no harm

    for _ in range(3):
        open_and_leave()  # what the libraries keep for good: DALI's, PyTorch's and our own, once
    memory = psutil.Process().memory_info().rss
    before = children(), threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        open_and_leave()
    processes, python_threads, threads, files = before
    assert children() <= processes
    assert threading.active_count() <= python_threads
    assert len(os.listdir("/proc/self/task")) <= threads + 2
    assert len(os.listdir("/proc/self/fd")) <= files + 5
    assert psutil.Process().memory_info().rss - memory < 30 * 2**20


@pytest.mark.parametrize("backend", OF_BETONS)
@pytest.mark.parametrize("workers", [1, 2])
def test_overwritten_bytes_of_an_image_are_named(photos, tmp_path, backend, workers):
    root = damaged_copy(photos, tmp_path)
    source = BetonSource(root / "val.beton")
    # in the middle of the code: most decoders would go on and give something else
    overwrite(root / "val.beton", int(source.offsets[8] + source.lengths[8] // 2), b"\x12\x34\x56")
    loader = build_loader(DataConfig(root=root, backend=backend, batch_size=4, workers=workers, eval_size=32), "val")
    with pytest.raises(DataError, match=r"image 8 of .*copy/val\.beton is damaged") as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert loader.state_dict() == {"epoch": 0, "step": 2}  # the third batch was not handed out
    loader.close()


@pytest.mark.parametrize("backend", OF_FOLDERS)
@pytest.mark.parametrize("damage", ["truncated", "no image", "gone"])
def test_a_damaged_file_of_a_folder_is_named(photos, tmp_path, backend, damage):
    root = tmp_path / "copy"
    shutil.copytree(photos.folder, root)
    loader = build_loader(DataConfig(root=root, backend=backend, batch_size=4, workers=2, eval_size=32), "val")
    bad = root / "val" / "flower" / "2.JPEG"
    whole = bad.read_bytes()
    bad.unlink() if damage == "gone" else bad.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"x")
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert loader.state_dict() == {"epoch": 0, "step": 2}  # the image is number 8, in the third batch
    loader.close()


@pytest.mark.parametrize("backend", OF_BETONS)
def test_a_damaged_index_is_refused_by_every_backend(photos, tmp_path, backend):
    root = damaged_copy(photos, tmp_path)
    config = DataConfig(root=root, backend=backend, batch_size=4, workers=1)
    whole = (root / "val.beton").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"\x03" + whole[1:], b"\xff" * 64 + whole[64:]):
        (root / "val.beton").write_bytes(damaged)
        with pytest.raises(DataError, match=r"copy/val\.beton") as error:
            build_loader(config, "val")
        assert "\n" not in str(error.value)


def test_auto_takes_the_fastest_that_reads_the_data(photos, build):
    config = DataConfig(root=photos.verbatim, batch_size=4, workers=1, eval_size=32)
    assert type(build(config, "val")._executor).__name__ == "FfcvExecutor"
    config = replace(config, root=photos.folder)
    assert type(build(config, "val")._executor).__name__ == "TorchvisionExecutor"


def test_ffcv_on_a_folder_says_how_to_convert_it(photos):
    with pytest.raises(DataError, match=r"no file .*val\.beton.*tools\.make_dataset"):
        build_loader(DataConfig(root=photos.folder, backend="ffcv", batch_size=4), "val")


def test_a_torchvision_without_its_decoder_says_which_one_has_it(photos, monkeypatch):
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    with pytest.raises(DataError, match=r"pip install 'torchvision>=0\.26,<0\.30', or use --backend dali"):
        TorchvisionGpuExecutor(photos.source, torch.device("cpu"), 1)


def test_images_get_the_labels_that_a_model_has_for_them(small, build):
    """After a batch was handed out, too: no executor keeps labels of its own."""
    loader = build(small, "val")
    labels = [label for batch in loader for label in batch.labels.tolist()]
    loader.relabel([7, 3])
    loader.set_epoch(0)
    assert [label for batch in loader for label in batch.labels.tolist()] == [(7, 3)[label] for label in labels]


@pytest.mark.parametrize("backend", OF_BETONS)
def test_damage_is_found_where_there_are_no_checksums(photos, tmp_path, build, backend):
    for file in photos.verbatim.glob("*.beton"):  # without dataset.json, as FFCV's own writer leaves a file
        shutil.copy(file, tmp_path)
    source = BetonSource(tmp_path / "train.beton")
    assert source.checksums is None
    place = int(source.offsets[7] + source.lengths[7] // 2)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(place)
        file.write(bytes(1024))
    config = DataConfig(root=tmp_path, backend=backend, batch_size=4, workers=1, input_size=64, eval_size=64)
    with pytest.raises(DataError, match=r"image 7 of .*train.beton is damaged \(512 bytes of zeros"):
        list(build(config, "train"))
