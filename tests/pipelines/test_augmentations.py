"""What every registered augmentation keeps: the plan alone decides, behind every executor; evaluation is as it was."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from pipelines.augmentations import OPTIONS
from pipelines.batch import Place
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.sources.errors import DataError
from tests.pipelines.helpers import Unchanged, assert_same, augmented, by_image, pixels_of

# An option of each, with which it changes images
EXAMPLES = {
    "rand_augment": (2, 9),
    "trivial_augment": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "lighting": 0.1,
    "random_erasing": 0.5,
}
ALL = AugmentationConfig(**EXAMPLES)


def alone(name):
    """The augmentation of one option."""
    (augmentation,) = AugmentationConfig(**{name: EXAMPLES[name]}).pixel_augmentations(training=True)
    return augmentation


def one_by_one(image, index, epoch):
    """A loader's image (3, S, S) as ALL changes it, in a batch of its own."""
    image = image.byte().permute(1, 2, 0)[None].contiguous()
    for augmentation in ALL.pixel_augmentations(training=True):
        image = augmentation.apply(image, augmentation.draw(0, epoch, np.array([index])))
    return image[0].permute(2, 0, 1).float()


def test_each_has_an_example_and_they_follow_each_other_in_this_order():
    assert [field.name for option in OPTIONS for field in fields(option)] == list(EXAMPLES)
    assert len(ALL.pixel_augmentations(training=True)) == len(OPTIONS)
    assert AugmentationConfig().pixel_augmentations(training=True) == ()


def test_an_image_is_changed_the_same_in_every_batch_and_by_every_executor(small, build):
    plain = build(small, "train", augmentation=augmented(Unchanged()))
    changed = build(small, "train", augmentation=ALL)
    for epoch in (0, 1):
        expected = {index: one_by_one(image, index, epoch) for index, image in by_image(plain, epoch=epoch).items()}
        assert_same(by_image(changed, epoch=epoch), expected)


def test_evaluation_is_as_it_was(small, build):
    for batch, plain in zip(build(small, "val", augmentation=ALL), build(small, "val"), strict=True):
        assert torch.equal(batch.indices, plain.indices) and torch.equal(batch.images, plain.images)


@pytest.mark.parametrize("done, world_size", [(1, 2), (2, 1)])
def test_an_epoch_goes_on_the_same_on_other_ranks_and_workers(small, build, done, world_size):
    first = build(small, "train", augmentation=ALL)
    whole = by_image(first, epoch=2)
    first.set_epoch(2)
    batches = iter(first)
    gone = [index for _ in range(done) for index in next(batches).indices.tolist()]
    places = [Place(rank, world_size) for rank in range(world_size)]
    loaders = [build(replace(small, workers=2), "train", place, augmentation=ALL) for place in places]
    for loader in loaders:
        loader.load_state_dict(first.state_dict())
    assert_same(by_image(*loaders), {index: image for index, image in whole.items() if index not in gone})


def test_repeats_hand_out_copies_of_an_image_and_leave_evaluation_alone(small, build):
    repeated = AugmentationConfig(repeats=2, lighting=0.1)
    plain = build(small, "train", augmentation=AugmentationConfig(lighting=0.1))
    loader = build(small, "train", augmentation=repeated)
    expected, batches = by_image(plain), list(loader)
    assert len(batches) == loader.steps_per_epoch == plain.steps_per_epoch
    seen = []
    for batch in batches:
        first, second = batch.indices.chunk(2)
        assert torch.equal(first, second) and torch.equal(*batch.labels.chunk(2))
        pixels = pixels_of(batch.images).round()
        assert all(torch.equal(image, expected[index]) for image, index in zip(pixels[:2], first.tolist(), strict=True))
        assert (pixels[:2] != pixels[2:]).any((1, 2, 3)).all()
        seen += first.tolist()
    assert len(set(seen)) == len(seen) == 6
    for batch, other in zip(build(small, "val", augmentation=repeated), build(small, "val"), strict=True):
        assert torch.equal(batch.indices, other.indices) and torch.equal(batch.images, other.images)


def test_repeats_that_do_not_divide_the_batch_are_refused(small, build):
    with pytest.raises(DataError, match="--repeats 3 must divide --batch-size 4"):
        build(small, "train", augmentation=AugmentationConfig(repeats=3))


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_changes_images_and_writes_to_none(name):
    images = torch.randint(0, 256, (16, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, augmentation = images.clone(), alone(name)
    changed = augmentation.apply(images, augmentation.draw(0, 0, np.arange(16)))
    assert torch.equal(images, before) and not torch.equal(changed, before)
    assert (changed.shape, changed.dtype, changed.is_contiguous()) == (images.shape, torch.uint8, True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_gpu_changes_images_as_a_cpu_does(name):
    """But for places between two pixels, and roundings that a later operation of RandAugment makes larger."""
    images = torch.rand(64, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear")  # smooth
    images = (255 * images).byte().permute(0, 2, 3, 1).contiguous()
    augmentation = alone(name)
    drawn = augmentation.draw(0, 0, np.arange(64))
    found, expected = augmentation.apply(images.cuda(), drawn), augmentation.apply(images, drawn)
    assert found.is_cuda and found.is_contiguous()
    assert ((found.cpu().int() - expected.int()).abs() > 1).float().mean() < 0.02


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_draws_by_seed_epoch_and_image_alone(name):
    augmentation = alone(name)
    drawn = augmentation.draw(3, 5, np.arange(1000))
    some = np.array([7, 998, 0])
    np.testing.assert_array_equal(augmentation.draw(3, 5, some), drawn[some])
    for seed, epoch in [(4, 5), (3, 6)]:
        other = augmentation.draw(seed, epoch, np.arange(1000))
        assert other.shape == drawn.shape and (other != drawn).any(tuple(range(1, drawn.ndim))).mean() > 0.4


def test_synthetic_images_are_augmented(build):
    config = DataConfig(backend="synthetic", batch_size=4, input_size=32, synthetic_images=12)
    plain = by_image(build(config, "train", augmentation=augmented(Unchanged())))
    expected = {index: one_by_one(image, index, 0) for index, image in plain.items()}
    assert_same(by_image(build(config, "train", augmentation=ALL)), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rand_augment": (0, 9)}, "--rand-augment 0 9: there must be at least 1 operation"),
        ({"rand_augment": (2, 31)}, r"--rand-augment 2 31: the level must lie in \[0, 30\]"),
        (
            {"color_jitter": (0.4, -0.1, 0.4, 0.1)},
            "--color-jitter 0.4 -0.1 0.4 0.1: must be at least 0, the hue at most",
        ),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "--color-jitter 0.4 0.4 0.4 0.6: must be at least 0, the hue at most"),
        ({"lighting": -0.1}, "--lighting -0.1: must be at least 0"),
        ({"repeats": 0}, "--repeats 0: must be at least 1"),
        ({"random_erasing": 1.5}, r"--random-erasing 1.5: must lie in \[0, 1\]"),
    ],
)
def test_one_line_for_a_value_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**options)
