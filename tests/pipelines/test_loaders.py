"""The loaders: the same plan on every backend, worker count and world size; right pixels; nothing left running."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from pipelines.loader import MEAN, STD, DataConfig, build_loader
from pipelines.plan import CenterCrop, EpochPlan, RandomCrop
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource

# (left, top, right, bottom) of the cuts from two photographs of 640×427
CUTS = [
    (0, 0, 640, 427),
    (40, 20, 540, 395),
    (100, 0, 360, 400),
    (0, 60, 400, 360),
    (9, 9, 265, 265),
    (50, 70, 250, 220),
]


def write_photos(folder, blur=0):
    """Twelve photographs in two classes, in six sizes; train and val hold the same."""
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        whole = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
            for number, cut in enumerate(CUTS):
                whole.crop(cut).save(folder / split / name / f"{number}.JPEG", quality=95)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture
def small(photos):
    """Small images and an epoch of three training batches, to be quick."""
    return DataConfig(root=photos, batch_size=4, workers=0, input_size=64, eval_size=64, seed=5)


@pytest.fixture
def build():
    """`build_loader`, whose loaders are closed at the end of the test."""
    loaders = []

    def build(*args, **kwargs):
        loaders.append(build_loader(*args, **kwargs))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


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


def plan_of(config, split, epoch=0):
    crop = RandomCrop() if split == "train" else CenterCrop()
    return EpochPlan(config.seed, epoch, FolderSource(config.root / split).sizes, config.batch_size, crop)


def indices_of(batches):
    return [index for batch in batches for index in batch.indices.tolist()]


def pixels_of(image):
    return image.float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_number_of_workers_gives_the_plans_batches(small, build, split):
    source, loaders = FolderSource(small.root / split), []
    for workers in (0, 1, 2):
        loaders.append(build(replace(small, workers=workers), split))
    for epoch in (0, 1):  # the second one with the workers of the first
        plan, epochs = plan_of(small, split, epoch), []
        for loader in loaders:
            loader.set_epoch(epoch)
            assert len(loader) == loader.steps_per_epoch == len(plan) == 3
            epochs.append(list(loader))
            assert len(loader) == 0 and loader.state_dict() == {"epoch": epoch, "step": 3}
        for batches in epochs:
            for step, (batch, first) in enumerate(zip(batches, epochs[0], strict=True)):
                np.testing.assert_array_equal(batch.indices, plan.step(step).indices)
                np.testing.assert_array_equal(batch.labels, source.labels[batch.indices])
                assert torch.equal(batch.images, first.images)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("auto", torch.float32),
        ("torchvision", torch.bfloat16),
        ("synthetic", torch.float32),
        ("synthetic", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("split, sizes", [("train", [5, 5]), ("val", [5, 5, 2])])
def test_the_contract_of_a_batch(small, build, backend, dtype, split, sizes):
    config = replace(small, backend=backend, batch_size=5, eval_size=96, synthetic_images=12, synthetic_classes=7)
    if split == "val":
        config = replace(config, synthetic_images=120)  # evaluation pretends to hold a tenth
    loader = build(config, split, dtype=dtype)
    side = 64 if split == "train" else 96
    assert loader.num_samples == 12 and loader.image_size == side
    assert len(loader.classes) == (7 if backend == "synthetic" else 2) and loader.classes == sorted(loader.classes)
    batches = list(loader)
    assert [len(batch.indices) for batch in batches] == sizes
    for images, labels, indices in batches:
        assert images.dtype == dtype and images.shape == (len(indices), 3, side, side)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.isfinite().all()
        assert labels.dtype == indices.dtype == torch.int64 and labels.shape == indices.shape == (len(indices),)
        expected = indices % 7 if backend == "synthetic" else indices // 6  # six photographs in each class
        assert torch.equal(labels, expected)
    if split == "val":
        assert indices_of(batches) == list(range(12))
    else:
        assert len(set(indices_of(batches))) == 10


def test_bfloat16_images_are_the_rounded_float32_images(small, build):
    for batch, rounded in zip(build(small, "train"), build(small, "train", dtype=torch.bfloat16), strict=True):
        assert torch.equal(batch.images.bfloat16(), rounded.images)


@pytest.mark.parametrize("size", [224, 64])  # the small one shows whether the resize is antialiased
@pytest.mark.parametrize("split", ["train", "val"])
def test_pixels_are_those_of_a_float_resize_of_the_plans_box(photos, build, split, size):
    config = DataConfig(root=photos, batch_size=12, workers=0, input_size=size, eval_size=size)
    plan = plan_of(config, split).step(0)
    (batch,) = build(config, split)
    for image, index, box, flip in zip(batch.images, plan.indices, plan.boxes.tolist(), plan.flips, strict=True):
        top, left, height, width = box
        with Image.open(FolderSource(photos / split).path(index)) as file:
            full = torch.from_numpy(np.array(file)).permute(2, 0, 1).float()
        cut = full[None, :, top : top + height, left : left + width]
        expected = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
        expected = expected.flip(2) if flip else expected
        assert (pixels_of(image) - expected).abs().mean() <= 1
    assert 0 < plan.flips.sum() < 12 if split == "train" else not plan.flips.any()


def test_normalised_images_have_the_mean_and_deviation_of_imagenet_taken_out(tmp_path, build):
    # uniform grey: whatever the box, (grey - mean) / std of each channel
    (tmp_path / "val" / "grey").mkdir(parents=True)
    Image.new("RGB", (50, 40), (100, 150, 200)).save(tmp_path / "val" / "grey" / "a.png")
    (batch,) = build(DataConfig(root=tmp_path, workers=0), "val")
    expected = [(100 / 255 - 0.485) / 0.229, (150 / 255 - 0.456) / 0.224, (200 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(batch.images.mean((0, 2, 3)), torch.tensor(expected), atol=1e-5, rtol=0)
    assert batch.images.std((0, 2, 3)).max() < 1e-5


def test_evaluation_pixels_are_those_of_torchvisions_resize_and_center_crop(tmp_path, build):
    # Smooth photographs: those of two regions that begin half a pixel apart agree, of regions farther apart do not.
    write_photos(tmp_path, blur=3)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    loader = build(DataConfig(root=tmp_path, batch_size=5, workers=0), "val")
    for batch in loader:
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            with Image.open(FolderSource(tmp_path / "val").path(index)) as file:
                difference = (pixels_of(image) - usual(file)).abs().mean()
                # The box begins at a whole source pixel, torchvision's region mostly does not; in an image that is
                # enlarged, half a source pixel is more than half an output pixel.
                assert difference <= 2 * max(1, 256 / min(file.size)), index


def test_extreme_images_come_out_whole(tmp_path, build):
    for split in ("train", "val"):
        (tmp_path / split / "odd").mkdir(parents=True)
        for width, height in ((1, 1), (1000, 1), (3, 2000), (7, 7)):
            Image.new("RGB", (width, height), (10, 200, 90)).save(tmp_path / split / "odd" / f"{width}.png")
        (batch,) = build(DataConfig(root=tmp_path, batch_size=4, workers=0, input_size=32, eval_size=32), split)
        colour = torch.tensor([10.0, 200.0, 90.0]).view(3, 1, 1)
        torch.testing.assert_close(pixels_of(batch.images), colour.expand(4, 3, 32, 32), atol=1e-3, rtol=0)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "done, workers, world_size", [(0, 2, 1), (1, 0, 1), (2, 2, 1), (1, 0, 2), (2, 1, 2), (3, 0, 1)]
)
def test_another_loader_goes_on_with_exactly_the_images_that_are_left(small, build, split, done, workers, world_size):
    whole = build(small, split)
    whole.set_epoch(3)
    expected = list(whole)

    first = build(replace(small, workers=1), split)
    first.set_epoch(3)
    batches = iter(first)
    for _ in range(done):
        next(batches)
    assert first.state_dict() == {"epoch": 3, "step": done}  # of what was handed out, not of what workers have ahead

    parts = []
    for rank in range(world_size):
        loader = build(replace(small, workers=workers), split, rank, world_size)
        loader.load_state_dict(first.state_dict())
        assert len(loader) == 3 - done
        parts.append(list(loader))
    for step, left in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat([batch.indices for batch in left]), expected[done + step].indices)
        assert torch.equal(torch.cat([batch.images for batch in left]), expected[done + step].images)
    assert len(parts[0]) == 3 - done


def test_leaving_an_epoch_early_does_not_spoil_the_next_one(small, build):
    loader = build(replace(small, workers=2), "train")
    next(iter(loader))  # the workers have more batches of epoch 0 under way
    loader.set_epoch(1)
    plan = plan_of(small, "train", 1)
    assert indices_of(loader) == plan.order[:12].tolist()


def test_going_back_to_the_beginning_of_an_epoch_repeats_it(small, build):
    loader = build(small, "train")
    batches = list(loader)
    assert list(loader) == []  # the epoch is over
    loader.set_epoch(0)
    for batch, again in zip(batches, loader, strict=True):
        assert torch.equal(batch.images, again.images)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("backend, num_images", [("torchvision", 360), ("synthetic", 361)])
def test_the_ranks_see_the_evaluation_set_exactly_once(digits, build, world_size, backend, num_images):
    config = DataConfig(root=digits, backend=backend, batch_size=84, workers=0, eval_size=32, synthetic_images=3610)
    seen = []
    for rank in range(world_size):
        loader = build(config, "val", rank, world_size)
        expected, batches = len(loader), list(loader)
        assert len(batches) == expected == 5  # the last one of 24 or 25 images, so not divided evenly
        seen += indices_of(batches)
    assert sorted(seen) == list(range(num_images))


@pytest.mark.parametrize("backend", ["torchvision", "synthetic"])
def test_ranks_without_images_in_the_last_step_have_a_step_less(small, build, backend):
    config = replace(small, backend=backend, batch_size=5, synthetic_images=120)
    loaders = [build(config, "val", rank, 5) for rank in range(5)]  # 12 images: two batches of 5, one of 2
    assert sorted(len(loader) for loader in loaders) == [2, 2, 2, 3, 3]
    epochs = [list(loader) for loader in loaders]
    assert all(len(batch.indices) == 1 for batches in epochs for batch in batches)  # nobody is handed an empty batch
    assert sorted(indices_of(batch for batches in epochs for batch in batches)) == list(range(12))


def test_the_ranks_share_each_training_batch(small, build):
    batches = list(build(small, "train"))
    halves = [list(build(small, "train", rank, 2)) for rank in range(2)]
    for batch, first, second in zip(batches, *halves, strict=True):
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


def test_progressive_sizes(small, build):
    config = replace(small, workers=1, start_size=64, input_size=160, size_ramp=(1, 4))
    loader = build(config, "train")
    for epoch, size in ((0, 64), (1, 64), (2, 96), (4, 160), (9, 160), (3, 128)):
        loader.set_epoch(epoch)
        assert loader.image_size == size
        assert {tuple(batch.images.shape) for batch in loader} == {(4, 3, size, size)}
    evaluation = build(config, "val")
    evaluation.set_epoch(2)
    assert evaluation.image_size == 64


def test_progressive_sizes_are_rounded_to_32_except_the_last():
    config = DataConfig(start_size=160, input_size=200, size_ramp=(0, 10))
    assert [config.train_size(epoch) for epoch in (0, 3, 5, 8, 9, 10, 11)] == [160, 160, 192, 192, 192, 200, 200]
    assert DataConfig(input_size=200).train_size(0) == 200


def test_closing_in_the_middle_of_an_epoch_leaves_no_process_ten_times(small):
    before, files = children(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        loader = build_loader(replace(small, workers=2), "train")
        batches = iter(loader)
        next(batches)
        assert len(children() - before) == 2
        loader.close()
        loader.close()  # twice does no harm
        assert children() <= before and not multiprocessing.active_children()
        del batches
    assert len(os.listdir("/proc/self/fd")) <= files + 5  # nor pipes


def test_closing_before_and_after_an_epoch_leaves_no_process(small):
    before = children()
    loader = build_loader(replace(small, workers=2), "train")
    loader.close()
    loader = build_loader(replace(small, workers=2), "train")
    assert len(list(loader)) == 3
    loader.close()
    assert children() <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(photos, tmp_path, workers):
    before, bad = children(), tmp_path / "val" / "flower" / "2.JPEG"
    for file in (photos / "val").rglob("*.JPEG"):
        copy = tmp_path / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        whole = file.read_bytes()
        copy.write_bytes(whole[: len(whole) // 2] if copy == bad else whole)
    loader = build_loader(DataConfig(root=tmp_path, batch_size=4, workers=workers, eval_size=32), "val")
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert loader.state_dict() == {"epoch": 0, "step": 2}  # the image is number 8, in the third batch
    loader.close()
    assert children() <= before


def test_synthetic_training_follows_the_plan(build):
    config = DataConfig(
        backend="synthetic", batch_size=8, seed=3, input_size=32, synthetic_images=50, synthetic_classes=7
    )
    loader = build(config, "train", 1, 2)
    loader.set_epoch(2)
    plan = EpochPlan(3, 2, np.broadcast_to(np.array([375, 500]), (50, 2)), 8, RandomCrop())
    batches = list(loader)
    assert len(batches) == len(plan) == 6
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.indices, plan.step(step, 1, 2).indices)
        assert torch.equal(batch.labels, batch.indices % 7)
        assert torch.equal(batch.images, batches[0].images)  # resident: the same ones every time
    assert abs(batches[0].images.mean()) < 0.1 and abs(batches[0].images.std() - 1) < 0.1


@pytest.mark.parametrize("backend", ["torchvision", "synthetic"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_batch_size_that_the_world_size_does_not_divide_is_refused(small, backend, split):
    with pytest.raises(DataError, match="--batch-size 4 .* use a multiple of 3"):
        build_loader(replace(small, backend=backend), split, 0, 3)


def test_fewer_training_images_than_a_batch_are_refused(small, build):
    with pytest.raises(DataError, match="12 training images .* batch of 13"):
        build_loader(replace(small, batch_size=13), "train")
    with pytest.raises(DataError, match="12 training images"):
        build_loader(replace(small, batch_size=13, backend="synthetic", synthetic_images=12), "train")
    assert len(build(replace(small, batch_size=12), "train")) == 1
    assert len(build(replace(small, batch_size=13), "val")) == 1  # evaluation takes what there is


def test_an_unknown_backend_is_refused_with_the_known_ones(small):
    with pytest.raises(DataError, match="'tape'.* auto, torchvision, synthetic"):
        build_loader(replace(small, backend="tape"), "train")


def test_no_data_and_missing_data_are_refused(small, tmp_path):
    with pytest.raises(DataError, match="--data"):
        build_loader(replace(small, root=None), "train")
    with pytest.raises(DataError, match="no folder .*nowhere/train"):
        build_loader(replace(small, root=tmp_path / "nowhere"), "train")
