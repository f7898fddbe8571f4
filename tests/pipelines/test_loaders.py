"""Loaders: sizes, statistics, ranks and refusals; what every executor must keep to is in test_executors.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipelines.batch import Place
from pipelines.build import build_loader
from pipelines.config import BACKENDS, DataConfig
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from tests.pipelines.helpers import OF_BETONS, OF_FOLDERS, indices_of, pixels_of, training_plan, write_photos


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
        loader = build(config, "val", Place(rank, world_size))
        expected, batches = len(loader), list(loader)
        assert len(batches) == expected == 5  # the last one of 24 or 25 images, so not divided evenly
        seen += indices_of(batches)
    assert sorted(seen) == list(range(num_images))


@pytest.mark.parametrize("backend", ["torchvision", "synthetic"])
def test_ranks_without_images_in_the_last_step_have_a_step_less(photos, build, backend):
    config = DataConfig(
        root=photos.folder, backend=backend, batch_size=5, workers=0, eval_size=32, synthetic_images=120
    )
    loaders = [build(config, "val", Place(rank, 5)) for rank in range(5)]  # 12 images: two batches of 5, one of 2
    assert sorted(len(loader) for loader in loaders) == [2, 2, 2, 3, 3]
    epochs = [list(loader) for loader in loaders]
    assert all(len(batch.indices) == 1 for batches in epochs for batch in batches)  # nobody is handed an empty batch
    assert sorted(indices_of(batch for batches in epochs for batch in batches)) == list(range(12))


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
    assert [config.image_size(True, epoch) for epoch in (0, 3, 5, 8, 9, 10, 11)] == [160, 160, 192, 192, 192, 200, 200]
    assert DataConfig(input_size=200).image_size(True, 0) == 200


def test_synthetic_training_follows_the_plan(build):
    config = DataConfig(backend="synthetic", batch_size=8, input_size=32, synthetic_images=50, synthetic_classes=7)
    loader = build(config, "train", Place(1, 2), seed=3)
    loader.set_epoch(2)
    plan = training_plan(3, 2, np.broadcast_to(np.array([375, 500]), (50, 2)), 8)
    batches = list(loader)
    assert len(batches) == len(plan) == 6
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.indices, plan.step(step, 1, 2).indices)
        assert torch.equal(batch.labels, batch.indices % 7)
        assert torch.equal(batch.images, batches[0].images)  # resident: the same ones every time
    assert abs(batches[0].images.mean()) < 0.1 and abs(batches[0].images.std() - 1) < 0.1


@pytest.mark.parametrize("backend", [*OF_BETONS, "synthetic"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_batch_size_that_the_world_size_does_not_divide_is_refused(photos, backend, split):
    with pytest.raises(DataError, match="--batch-size 4 .* use a multiple of 3"):
        build_loader(DataConfig(root=photos.verbatim, backend=backend, batch_size=4), split, Place(0, 3))


def test_fewer_training_images_than_a_batch_are_refused(photos, build):
    config = DataConfig(root=photos.folder, workers=0)
    with pytest.raises(DataError, match="12 training images .* batch of 13"):
        build_loader(replace(config, batch_size=13), "train")
    with pytest.raises(DataError, match="12 training images"):
        build_loader(replace(config, batch_size=13, backend="synthetic", synthetic_images=12), "train")
    assert len(build(replace(config, batch_size=12), "train")) == 1
    assert len(build(replace(config, batch_size=13), "val")) == 1  # evaluation takes what there is


def test_an_unknown_backend_is_refused_with_the_known_ones(photos):
    with pytest.raises(DataError, match=f"'tape'.* {', '.join(BACKENDS)}"):
        build_loader(DataConfig(root=photos.folder, backend="tape"), "train")


@pytest.mark.parametrize("backend", ["auto", *OF_FOLDERS])
def test_no_data_and_missing_data_are_refused(tmp_path, backend):
    with pytest.raises(DataError, match="--data"):
        build_loader(DataConfig(backend=backend), "train")
    with pytest.raises(DataError, match="no folder .*nowhere/train"):
        build_loader(DataConfig(root=tmp_path / "nowhere", backend=backend), "train")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synthetic_batches_are_batches(build, dtype):
    config = DataConfig(backend="synthetic", batch_size=5, eval_size=96, synthetic_images=120, synthetic_classes=7)
    loader = build(config, "val", Place(dtype=dtype))
    assert loader.num_samples == 12 and loader.image_size == 96 and len(loader.classes) == 7  # a tenth
    batches = list(loader)
    assert [len(batch.indices) for batch in batches] == [5, 5, 2] and indices_of(batches) == list(range(12))
    for images, labels, indices in batches:
        assert images.dtype == dtype and images.shape == (len(indices), 3, 96, 96)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.isfinite().all()
        assert labels.dtype == indices.dtype == torch.int64 and torch.equal(labels, indices % 7)
