"""Augmentation on pixels: drawn by the plan, carried out behind every executor alike."""

import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pipelines.batch import Place
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.executors.ffcv_executor import FfcvExecutor
from pipelines.loader import Loader
from pipelines.plan import CenterCrop, EpochPlan, RandomCrop, random_bits
from pipelines.sources.beton import BetonSource
from tests.pipelines.helpers import Inverted, Unchanged, assert_same, augmented, by_image, pixels_of


class Darker:
    """Pixels divided by 1, 2, 3 or 4. Notes the threads that it is called in."""

    def __init__(self):
        self.threads = set()

    def draw(self, seed, epoch, indices):
        return 1 + (random_bits(seed, epoch, indices, range(1), "darker")[:, 0] % 4).astype(np.uint8)

    def apply(self, images, operations):
        self.threads.add(threading.current_thread())
        return images // torch.from_numpy(operations)[:, None, None, None]


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_plans_images_are_changed_and_no_others_by_every_executor(small, build, split):
    plain = build(small, split, augmentation=augmented(Unchanged()))
    changed = build(small, split, augmentation=augmented(Inverted()))
    for epoch in (0, 1):
        drawn = random_bits(0, epoch, np.arange(12), range(1), "inverted")[:, 0] % 2 == 1
        assert 0 < drawn.sum() < 12
        expected = {i: 255 - image if drawn[i] else image for i, image in by_image(plain, epoch=epoch).items()}
        assert len(expected) == 12
        assert_same(by_image(changed, epoch=epoch), expected)


@dataclass(frozen=True)
class WithNegatives(AugmentationConfig):
    """What an augmentation adds to the options: one of its own, and here only in training."""

    negatives: bool = False

    def pixel_augmentations(self, training):
        return (Inverted(),) if training and self.negatives else ()


def test_an_option_decides_on_it_and_may_leave_evaluation_alone(small, build):
    inverted = by_image(build(small, "train", augmentation=augmented(Inverted())))
    assert_same(by_image(build(small, "train", augmentation=WithNegatives(negatives=True))), inverted)
    for split, negatives in [("train", False), ("val", True)]:
        batches = build(small, split, augmentation=WithNegatives(negatives=negatives)), build(small, split)
        for batch, plain in zip(*batches, strict=True):
            assert torch.equal(batch.indices, plain.indices) and torch.equal(batch.images, plain.images)


@pytest.mark.parametrize("done, world_size", [(0, 4), (1, 2), (2, 1)])
def test_an_augmented_epoch_goes_on_the_same_on_other_ranks_and_workers(small, build, done, world_size):
    first = build(small, "train", augmentation=augmented(Inverted()))
    whole = by_image(first, epoch=2)
    first.set_epoch(2)
    batches = iter(first)
    gone = [index for _ in range(done) for index in next(batches).indices.tolist()]
    state = first.state_dict()
    config = replace(small, workers=2)
    loaders = [
        build(config, "train", Place(rank, world_size), augmentation=augmented(Inverted()))
        for rank in range(world_size)
    ]
    for loader in loaders:
        loader.load_state_dict(state)
    assert_same(by_image(*loaders), {index: image for index, image in whole.items() if index not in gone})


def test_augmentations_follow_each_other_and_draw_apart(small, build):
    darker = Darker()
    plain = by_image(build(small, "train", augmentation=augmented(Unchanged())))
    inverted = Inverted().draw(0, 0, np.arange(12))
    divisor = darker.draw(0, 0, np.arange(12))
    for augmentations in ([Inverted(), darker], [darker, Inverted()]):
        expected = {}
        for index, image in plain.items():
            if augmentations[0] is darker:
                image = image // int(divisor[index])
            image = 255 - image if inverted[index] else image
            if augmentations[1] is darker:
                image = image // int(divisor[index])
            expected[index] = image
        assert_same(by_image(build(small, "train", augmentation=augmented(*augmentations))), expected)
    assert darker.threads and threading.current_thread() not in darker.threads
    assert not any(thread.is_alive() for thread in darker.threads)


# How far the bytes of a backend that can normalise are from what it hands out where nothing is augmented, in steps of
# 1/255: FFCV's fused normalisation does not round the result of the resize, DALI's comes after the rounding.
ROUNDING = {"ffcv": 0.501, "dali": 1e-4}


def test_without_augmentation_pixels_are_the_same_up_to_rounding(small, build):
    plain, as_bytes = build(small, "train"), build(small, "train", augmentation=augmented(Unchanged()))
    for batch, other in zip(plain, as_bytes, strict=True):
        assert torch.equal(batch.indices, other.indices) and torch.equal(batch.labels, other.labels)
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        difference = (pixels_of(batch.images) - pixels_of(other.images)).abs().max()
        assert difference <= ROUNDING.get(small.backend, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_augmented_images_are_normalised_in_float32_and_then_rounded(small, build, dtype):
    exact, rounded = (
        build(small, "train", Place(dtype=kind), augmentation=augmented(Inverted())) for kind in (torch.float32, dtype)
    )
    for batch, other in zip(exact, rounded, strict=True):
        assert torch.equal(batch.images.to(dtype), other.images)


def test_synthetic_images_are_augmented(build):
    config = DataConfig(backend="synthetic", batch_size=4, input_size=32, synthetic_images=40)
    plain = [by_image(build(config, "train", augmentation=augmented(one))) for one in (Unchanged(), Inverted())]
    inverted = Inverted().draw(0, 0, np.arange(40))
    assert_same(plain[1], {index: 255 - image if inverted[index] else image for index, image in plain[0].items()})


def test_an_error_in_an_augmentation_is_raised_where_batches_are_asked_for(small, build):
    class Broken(Unchanged):
        def apply(self, images, operations):
            raise RuntimeError("no such operation")

    with pytest.raises(RuntimeError, match="no such operation"):
        next(iter(build(small, "train", augmentation=augmented(Broken()))))


def test_an_executor_that_has_normalised_already_is_refused(photos):
    source, cpu = BetonSource(photos.verbatim / "train.beton"), torch.device("cpu")
    config = DataConfig(batch_size=4, input_size=32)
    options = (True, config, augmented(Inverted()), Place(), 0)
    for as_bytes in (True, False):
        executor = FfcvExecutor(source, cpu, 1, exact=True, as_bytes=as_bytes)
        loader = Loader(source, executor, *options)
        if as_bytes:
            assert len(list(loader)) == 3
        else:
            with pytest.raises(TypeError, match="augmentations change bytes"):
                list(loader)
        loader.close()


@pytest.mark.parametrize("crop", [RandomCrop(), CenterCrop()])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_operations_are_keyed_by_image_and_shared_out_by_rank(crop, world_size):
    sizes = np.full((103, 2), 100)
    drawn = Darker().draw(3, 5, np.arange(103))
    flags = {"shuffle": True, "drop_last": False}
    plain = EpochPlan(3, 5, sizes, 12, crop, **flags)
    plan = EpochPlan(3, 5, sizes, 12, crop, **flags, augmentations=[Inverted(), Darker()])
    for number in range(len(plan)):
        for rank in range(world_size):
            step, without = plan.step(number, rank, world_size), plain.step(number, rank, world_size)
            assert without.operations == () and len(step.operations) == 2
            np.testing.assert_array_equal(step.operations[1], drawn[step.indices])
            for name in ("indices", "boxes", "flips"):
                np.testing.assert_array_equal(getattr(step, name), getattr(without, name))


def test_streams_of_random_bits_have_nothing_in_common():
    def bits(columns, stream):
        return random_bits(1, 2, np.arange(1000), columns, stream)

    streams = ["", "inverted", "darker"]
    everything = np.concatenate([bits(range(40), stream) for stream in streams], 1)
    assert len(np.unique(everything)) == everything.size
    ones = np.unpackbits(everything.view(np.uint8)).mean()
    assert ones == pytest.approx(0.5, abs=0.002)  # 4.5 standard errors and more
    np.testing.assert_array_equal(bits(range(7, 9), "darker"), bits(range(40), "darker")[:, 7:9])
